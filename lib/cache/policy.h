// Which tokens are exact and which are coded, as pure functions of the query's position.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "codec/codec.h"
#include "core/dtype.h"
#include "core/json_fwd.h"

namespace vqkv {

class CodecSet;
class KeepRule;
struct CodecPlan;

// When tokens leave the exact window, for one role. At the attention of the query at position i, with S sinks, tokens
// [S, coded_end(S, i)) are coded and the rest, its own included, are exact:
//   coded_end = S + floor(max(0, i + 1 - window - S) / flush) * flush
// A plain window of w tokens in pages of F: {w, F}. KIVI keys: {1, R} (a sawtooth tail of 0..R-1, coded after the step
// that filled it); KIVI values: {R + 1, 1} (the newest R besides the step's own). With a first lot of P tokens, a
// prompt, those are coded together once all of them are there, for the queries behind them, and the rule counts from P
// on instead of S: transformers' QuantizedCache is {1, R, P}.
struct FlushRule {
  int64_t window = 128;
  int64_t flush = 64;
  int64_t first = 0;
  // When coded tokens leave the tiers that hold the newest `tokens` of them: the same rule, later.
  FlushRule after(int64_t tokens) const { return {window + tokens, flush, first}; }
  int64_t coded_end(int64_t sinks, int64_t position) const {
    if (position < first) return std::min(sinks, position + 1);
    const int64_t begin = std::max(sinks, first);
    const int64_t past = std::max<int64_t>(0, position + 1 - window - begin);
    return std::min(begin, position + 1) + past / flush * flush;
  }
  // The end of what is coded while `total` tokens are there: what the next query will see coded, but without a window
  // no block that only its own token completes.
  int64_t coded_among(int64_t sinks, int64_t total) const {
    if (total < first) return std::min(sinks, total);
    const int64_t begin = std::max(sinks, first);
    const int64_t past = std::max<int64_t>(0, total + 1 - std::max<int64_t>(window, 1) - begin);
    return std::min(begin, total) + past / flush * flush;
  }
};

// Tokens [begin, end) of a text.
struct TokenRun {
  int64_t begin = 0, end = 0;
  int64_t tokens() const { return end - begin; }
};

// `cache:` of a configuration: {sinks: 4, window: 128, flush: 64, rule: window|kivi|residual|none, residual: 128,
//  exact_dtype: f16, k: {...}, v: {...}, prompt: 0, generated: coded|exact, policy: NAME or {name, knobs}}, or
// {coded: image, exact_dtype: f16}. rule none codes nothing (the exact cache); policy says which tokens stay
// (cache/policies/kinds.h), all of them without one.
struct CachePolicy {
  int64_t sinks = 4;
  FlushRule k, v;
  bool codes = true;                // false: everything stays exact
  bool drops = false;               // what leaves the window is dropped instead of coded; k and v are one rule
  DType exact_dtype = DType::kF16;  // of sinks and window
  // What heads give up as the text goes on (cache/keep_rule.h); null: nothing.
  std::shared_ptr<const KeepRule> keep = nullptr;
  // Tokens of the prompt, where that is said: nothing is coded before its last one is there, and codecs fit their
  // parameters to all of it. What follows is coded as the rules say or, where codes_generated is false, never.
  int64_t prompt = 0;
  bool codes_generated = true;
  // Of each text its image tokens alone are coded, together, for the queries behind the last of them; what stands
  // before them is held as sinks are. Where they lie of_text says; a policy that was not told so codes nothing.
  bool codes_images = false;
  int64_t fitted_from = 0;  // the first token that codecs fit their parameters to: that of an image under codes_images
  // Nothing is coded while fewer tokens are there: the prompt, and what the codecs need to fit their parameters
  // (for_codecs).
  int64_t waits = 0;
  // This policy for a text whose image tokens are `images` (none: an empty run). Before for_codecs.
  CachePolicy of_text(const TokenRun& images) const;
  // This policy in a cache of `codecs`.
  CachePolicy for_codecs(const CodecSet& codecs) const;
  std::string waits_text() const;  // why, for messages: "nothing is coded before ..."
  // Error (data): one of n values leaves exact_dtype, or is not finite. place(i) says where value i stands.
  template <class Place>
  void check_exact(const float* values, int64_t n, Place&& place) const {
    if (const int64_t bad = first_beyond(values, n); bad >= 0) fail_beyond(place(bad), values[bad]);
  }
  // Rounds n values in place, as the cache stores what is exact, and checks them.
  template <class Place>
  void round_exact(float* values, int64_t n, Place&& place) const {
    check_exact(values, n, place);
    round_to(exact_dtype, values, n);
  }
  bool keeps_codes() const { return codes && !drops; }
  const FlushRule& rule(Role r) const { return r == Role::kKey ? k : v; }
  // First token that is exact for the query at `position`, beyond the sinks; newer: the first in a tier that is newer
  // than one behind `newer` tokens (CodecSet::newer_tokens).
  int64_t coded_end(Role r, int64_t position, int64_t newer = 0) const {
    if (!codes || position + 1 < waits) return std::min(sinks, position + 1);
    // A first lot is coded for the query behind it.
    const int64_t last = prompt - 1 + (rule(r).first > 0);
    return rule(r).after(newer).coded_end(sinks, codes_generated ? position : std::min(position, last));
  }
  // The same while `total` tokens are there (FlushRule::coded_among).
  int64_t coded_among(Role r, int64_t total, int64_t newer = 0) const {
    if (!codes || total < waits) return std::min(sinks, total);
    if (!codes_generated && total >= prompt) return coded_end(r, total, newer);  // nothing that a later query would add
    return rule(r).after(newer).coded_among(sinks, total);
  }
  // The end of those of `total` tokens that are coded sooner or later as the text goes on.
  int64_t coded_at_last(Role r, int64_t total) const {
    return codes_generated && codes && total >= waits ? total : coded_among(r, total);
  }

  static CachePolicy from_json(const Json& cache_config);
  static CachePolicy exact(DType dtype = DType::kF16);

 private:
  int64_t first_beyond(const float* values, int64_t n) const;  // -1: none
  [[noreturn]] void fail_beyond(const std::string& place, float value) const;
};
Json canonical_cache_config(const Json& cache_config);
// Why no cache holds the codecs under the policy, or "": tiers that don't end where tokens are flushed, or codes of
// more tokens than leave the window together. Names its path. Of a plan: before anything is trained.
std::string cache_conflict(const CachePolicy& policy, const CodecPlan& plan);
std::string cache_conflict(const CachePolicy& policy, const CodecSet& codecs);

}  // namespace vqkv
