// Drops the channels of each head that matter least: codes hold the others, side by side.
#include <cmath>

#include "codec/transform/kept_channels.h"
#include "core/error.h"

namespace vqkv {
namespace {

struct PruneKnobs {
  double ratio = 0.4;
  KnobTable table() {
    return KnobTable().real("ratio", &ratio, 0.0, 0.99,
                            "share of the channels of a head that is dropped, rounded down");
  }
  TrainNeeds needs() const { return {.moments = true}; }
};

class PruneChannels final : public KeptChannels {
 public:
  PruneChannels(const PruneKnobs& knobs, const UnitShape& unit) : KeptChannels(knobs.ratio, unit) {}

  void train(const TrainSet& set, const Rng&) override {
    std::vector<double> score = energy_of_queries(set);
    const std::vector<double> energy = energy_of(set.x);
    for (size_t c = 0; c < score.size(); ++c) score[c] *= energy[c];
    keep_best(score);
  }

  void save(ParameterWriter& out, const std::string& prefix) const override {
    const std::vector<float> channel(channel_.begin(), channel_.end());
    out.tensor(prefix + "channel", {unit_.heads, kept_}, channel.data());
  }
  void load(const ParameterReader& in, const std::string& prefix) override {
    const AlignedVector<float> channel = in.tensor(prefix + "channel", {unit_.heads, kept_});
    for (size_t i = 0; i < channel.size(); ++i) {
      const float low = static_cast<float>(static_cast<int>(i) / kept_ * unit_.head_dim);
      const bool rises = i % static_cast<size_t>(kept_) == 0 ? channel[i] >= low : channel[i] > channel[i - 1];
      if (!rises || !(channel[i] < low + static_cast<float>(unit_.head_dim)) || channel[i] != std::floor(channel[i]))
        fail_data(prefix + "channel: must be channels of each head in rising order");
    }
    channel_.assign(channel.begin(), channel.end());
  }

 private:
  // Mean square of what the queries of a key's head hold in each channel; 1 for values.
  std::vector<double> energy_of_queries(const TrainSet& set) const {
    std::vector<double> out(static_cast<size_t>(unit_.channels()), 1.0);
    if (unit_.role == Role::kValue) return out;
    if (unit_.rope == RopePlacement::kPre && !set.query_pair_moment.empty()) {
      for (size_t p = 0; p < set.query_pair_moment.size(); ++p) {
        const auto [a, b] = unit_.pair(static_cast<int>(p));
        out[static_cast<size_t>(a)] = out[static_cast<size_t>(b)] = 0.5 * set.query_pair_moment[p];
      }
      return out;
    }
    if (set.query_moment.rows != unit_.channels())
      fail_data("prune_channels: the training data hold no second moment of the queries");
    for (int c = 0; c < unit_.channels(); ++c) out[static_cast<size_t>(c)] = set.query_moment(c, c);
    return out;
  }
};

TransformInfo describe_prune_channels() {
  return {"prune_channels",
          "drops the channels of each head that matter least",
          "ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): the score of a key channel is the energy of its queries "
          "times its own; here over the training tokens, and over those of each prompt in think",
          "dropped channels decode to 0, which loses their means too: put center before it. ThinK keeps values whole; "
          "theirs are ranked by their own energy",
          "0",
          true,
          1,
          Json::object(),
          "(head_dim - floor(ratio * head_dim)) / head_dim"};
}
std::string check_prune_channels(const PruneKnobs&, const UnitShape& unit) {
  return unit.role == Role::kKey && unit.rope == RopePlacement::kPre && unit.head_dim % 2 != 0
             ? "pairs need an even head_dim"
             : "";
}

}  // namespace

VQKV_DEFINE_TRANSFORM(prune_channels, PruneKnobs, PruneChannels, describe_prune_channels, check_prune_channels)

}  // namespace vqkv
