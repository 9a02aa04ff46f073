// ThinK: of each head's keys the channels that the newest queries of a prompt look at least are dropped, for that
// prompt (baseline-methods 7).
#include <algorithm>

#include "codec/transform/kept_channels.h"
#include "core/error.h"

namespace vqkv {
namespace {

struct ThinkKnobs {
  double ratio = 0.4;
  int queries = 32;
  KnobTable table() {
    return KnobTable()
        .real("ratio", &ratio, 0.0, 0.99, "share of the channels of a head that is dropped, rounded down")
        .integer("queries", &queries, 2, 65536, "newest tokens of a prompt whose queries are asked");
  }
};

class Think final : public KeptChannels {
 public:
  Think(const ThinkKnobs& knobs, const UnitShape& unit) : KeptChannels(knobs.ratio, unit), queries_(knobs.queries) {}

  void train(const TrainSet&, const Rng&) override {}
  FitNeeds fit_needs() const override { return {.tokens = queries_, .queries = true}; }
  std::unique_ptr<Transform> fit(ConstMatrix x, ConstMatrix q) const override {
    VQKV_CHECK(x.rows > 0 && q.rows % x.rows == 0);
    // || Q_c K_c^T ||^2, whose means differ by a factor of all channels.
    const int64_t asked = std::min<int64_t>(queries_, x.rows) * (q.rows / x.rows);
    std::vector<double> score = energy_of(x);
    const std::vector<double> energy = energy_of(q, q.rows - asked);
    for (size_t c = 0; c < energy.size(); ++c) score[c] *= energy[c];
    auto fitted = std::make_unique<Think>(*this);
    fitted->keep_best(score);
    return fitted;
  }
  int64_t fitted_bytes() const override { return (int64_t{unit_.channels()} + 7) / 8; }
  void save(ParameterWriter&, const std::string&) const override {}
  void load(const ParameterReader&, const std::string&) override {}

 private:
  int queries_;
};

TransformInfo describe_think() {
  return {
      "think",
      "drops the channels of each head's keys that the newest queries of a prompt look at least",
      "Xu et al., ThinK: Thinner Key Cache by Query-Driven Pruning, ICLR 2025, arXiv 2407.21018",
      "a mask of one bit a channel is stored for each prompt: 1/T bits a value over T tokens. What is coded after the "
      "prompt keeps its mask. The paper keeps the newest 32 tokens and all that is generated whole: `cache: {window: "
      "32, flush: 1, prompt: N, generated: exact}`. One mask serves the query heads of a KV head, whose energies are "
      "summed; the authors' code repeats keys for each and scores them apart. 20 % of keys and values at ratio 0.4 is "
      "before the rounding down, the window and what is generated; kvpress sets the channels to zero and keeps their "
      "memory, so its ratio is not of bytes. What learns behind it learns on the loudest channels of the train tokens, "
      "which are no prompt's: let a codec that learns nothing follow",
      "0",
      false,
      1,
      Json::object(),
      "(head_dim - floor(ratio * head_dim)) / head_dim"};
}
std::string check_think(const ThinkKnobs&, const UnitShape& unit) {
  if (unit.role == Role::kValue) return "values meet no query; put it under codec.k";
  return unit.rope == RopePlacement::kPre ? "channels are ranked by the scores that they add to, after RoPE" : "";
}

}  // namespace

VQKV_DEFINE_TRANSFORM(think, ThinkKnobs, Think, describe_think, check_think)

}  // namespace vqkv
