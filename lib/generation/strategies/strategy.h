// Strategies of decoding: how the tokens behind a prompt come about. One file each, registered by one line in
// strategies.inc. Speculative ones guess tokens with less than the model and the cache, and say what they read for it.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "attention/sequence.h"
#include "codec/knobs.h"
#include "core/json.h"
#include "generation/generate.h"

namespace vqkv {

struct StrategyInfo {
  std::string name, title;
  std::string paper;   // authors, venue, arXiv id
  std::string bibtex;  // key
  // Whose text it reproduces, or comes near to: "codec", one token at a time through the same cache; "exact", through
  // the exact one.
  std::string target = "codec";
  std::string bits;  // that a token reads of the cache, a value
  std::string caveat;
  std::string assumed;  // what the source leaves open, and what was taken; empty: nothing
  int version = 1;      // raised when other tokens or counts come out
};

// Bytes that passes of a model had to read, each weight, code and exact row once a pass.
struct PassBytes {
  int64_t passes = 0;
  int64_t weights = 0;
  int64_t codes = 0;  // of the cache, with side data
  int64_t exact = 0;  // of its sinks, window and prefetched pairs
  void add(int64_t weight_bytes, const CacheReads& cache);
  int64_t total() const { return weights + codes + exact; }
  Json to_json() const;
};

// What a generation did behind its prompt.
struct StrategyCounts {
  PassBytes target, draft;
  int64_t drafted = 0, accepted = 0;  // tokens that were guessed, and those of them that stand in the text
  // Of a far tier: bytes that came from it, that the last fetch brought, and that it holds in the end.
  int64_t moved = 0, fetched = 0, far = 0;
  Json to_json() const;
};

class Strategy {
 public:
  virtual ~Strategy() = default;
  // The model of the caches that it decodes over. kUsage, with the reason, where codecs or policy don't serve it.
  virtual std::shared_ptr<const CacheModel> cache_model(std::shared_ptr<const CodecSet> codecs,
                                                        const CachePolicy& policy) const = 0;
  // Bytes that it holds beside a cache of `tokens` under the policy, in tiers of its own.
  virtual int64_t bytes_beside(const CacheShape& shape, const CachePolicy& policy, int64_t tokens) const {
    (void)shape, (void)policy, (void)tokens;
    return 0;
  }
  // As vqkv::generate, over an empty sequence of such a model; one call at a time. Adds to `counts`.
  virtual Generated generate(ModelRuntime& model, Sequence& sequence, std::span<const int32_t> prompt,
                             const GenerateOptions& options, const std::function<bool(int32_t)>& on_token,
                             StrategyCounts& counts) = 0;
};

class StrategyKind {
 public:
  virtual ~StrategyKind() = default;
  virtual StrategyInfo describe() const = 0;
  virtual std::vector<Knob> knobs() const = 0;
  // Checks `knobs` (flat object) and completes it with defaults.
  virtual Json canonical(const Json& knobs, const std::string& path) const = 0;
  virtual std::unique_ptr<Strategy> make(const Json& knobs) const = 0;
};

// By name, in the order of strategies.inc. find throws kUsage with `path`, where the name was written, and the nearest
// name.
const std::vector<const StrategyKind*>& all_strategies();
const StrategyKind& find_strategy(const std::string& name, const std::string& path = "");

// kUsage where a cache under the policy keeps no codes, or can't take tokens back behind every prompt.
void require_rollback(const std::string& strategy, const CachePolicy& policy);

// Type: a Strategy constructible from Knobs.
template <class Knobs, class Type>
class StrategyOf final : public StrategyKind {
 public:
  explicit StrategyOf(StrategyInfo (*describe_strategy)()) : describe_(describe_strategy) {}
  StrategyInfo describe() const override { return describe_(); }
  std::vector<Knob> knobs() const override { return default_knobs<Knobs>(); }
  Json canonical(const Json& knobs, const std::string& path) const override {
    return parse(knobs, path).table().values();
  }
  std::unique_ptr<Strategy> make(const Json& knobs) const override {
    return std::make_unique<Type>(parse(knobs, "strategy"));
  }

 private:
  static Knobs parse(const Json& values, const std::string& path) {
    Knobs knobs;
    knobs.table().apply(values, path);
    return knobs;
  }
  StrategyInfo (*describe_)();
};

// A strategy file ends with this.
#define VQKV_DEFINE_STRATEGY(name, Knobs, Type, describe)         \
  const ::vqkv::StrategyKind& vqkv_strategy_##name() {            \
    static const ::vqkv::StrategyOf<Knobs, Type> kind(&describe); \
    return kind;                                                  \
  }

}  // namespace vqkv
