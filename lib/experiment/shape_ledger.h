// Bytes at the shape of a model that need not be here: the ledger asks for layouts, not for weights or training.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cache/cache.h"
#include "codec/codec_set.h"

namespace vqkv {

class ShapeLedger {
 public:
  // codec, cache: those sections of a configuration; without `cache` the rule that a preset brings, or the default one.
  // exceptions: share of the coded values that stay exact beside their codes, where the codec keeps such; how many they
  // are is known only of rows. What is fitted to a prompt counts as fitted to a made-up one. kUsage for a configuration
  // that is wrong, or that the shape or the cache can't hold.
  ShapeLedger(const Json& codec, const Json& cache, const CacheShape& shape, double exceptions = 0);

  // Bits a coded value of a role, or of both: codes, side data and exceptions, a mean over layers and heads. tokens:
  // the prompt over which what is fitted to it spreads; 0: without. level: as PlanQuery, -1 for whole codes.
  double bits(std::optional<Role> role = {}, int64_t tokens = 0, int level = -1) const;

  // Of a sequence of so many tokens; no codebooks, which only training makes.
  ByteLedger at(int64_t tokens) const { return ledger_at(*codecs_, policy_, tokens, extras_); }
  // Bits a value of what a sequence of `tokens` tokens holds: codes, side data and exceptions, sinks and window.
  // Padding and indices of the allocation apart, as in the formulas of papers; bits_per_value (cost.h) counts them.
  // Under a policy that gives tokens up by attention: of what each head sees right behind a decision at that length,
  // and the sums that it decides by where they go on.
  double held(int64_t tokens) const;
  // The same with the window at its mean over a period of flushes, of which `tokens` itself is one moment: (what is
  // held beyond bits(), in the mean of the lengths from `tokens` on, over `tokens`) + bits().
  double held_in_the_mean(int64_t tokens) const;

  bool keeps_exceptions() const;  // of some values beside their codes
  const CacheShape& shape() const { return codecs_->shape(); }
  const CachePolicy& policy() const { return policy_; }
  const Json& config() const { return codecs_->config(); }  // canonical

 private:
  double held_where_decided(int64_t tokens) const;
  std::shared_ptr<const CodecSet> codecs_;
  CachePolicy policy_;
  std::vector<UnitExtras> extras_;  // one a unit
};

}  // namespace vqkv
