// One token a pass.
#include "cache/model.h"
#include "generation/strategies/strategy.h"

namespace vqkv {
namespace {

struct PlainKnobs {
  KnobTable table() { return {}; }
};

class Plain final : public Strategy {
 public:
  explicit Plain(const PlainKnobs&) {}
  std::shared_ptr<const CacheModel> cache_model(std::shared_ptr<const CodecSet> codecs,
                                                const CachePolicy&) const override {
    return std::make_shared<const CacheModel>(std::move(codecs));
  }
  Generated generate(ModelRuntime& model, Sequence& sequence, std::span<const int32_t> prompt,
                     const GenerateOptions& options, const std::function<bool(int32_t)>& on_token,
                     StrategyCounts& counts) override {
    return vqkv::generate(model, sequence.session(), prompt, options, on_token,
                          [&] { counts.target.add(model.weight_bytes(), sequence.cache().reads(1)); });
  }
};

StrategyInfo describe_plain() {
  StrategyInfo info;
  info.name = "plain";
  info.title = "one token a pass, greedy or sampled";
  info.bits = "all that the cache holds: the codec's bits of what is coded, 16 of what is exact";
  return info;
}

}  // namespace

VQKV_DEFINE_STRATEGY(plain, PlainKnobs, Plain, describe_plain)

}  // namespace vqkv
