// Residual quantization: a vector, or each of its groups of channels, as a sum of codewords.
#include "codec/methods/table_codec.h"

namespace vqkv {
namespace {

struct RvqKnobs {
  int codebooks = 8;
  int bits = 8;
  int group = 0;
  std::string grouping = "contiguous";
  std::string encoding = "beam";
  int beam = 4;
  int refine = 2;
  std::string weight = "none";
  std::string stored_as = "f16";
  int iterations = 20;
  int points = 256;
  KnobTable table() {
    return KnobTable()
        .integer("codebooks", &codebooks, 1, 256, "residual stages, each with a codebook")
        .integer("bits", &bits, 1, 16, "bits of a code: 2^bits codewords a codebook")
        .integer("group", &group, 0, 65536,
                 "channels of a sub-vector with residual stages of its own; 0: all channels of the unit")
        .choice("grouping", &grouping, {"contiguous", "strided", "rope_pair", "variance"},
                "which channels make a sub-vector; behind query_metric the default is variance (see pq)")
        .choice("encoding", &encoding, {"greedy", "beam"},
                "nearest codeword stage by stage, or the best of several partial sums")
        .integer("beam", &beam, 1, 64, "partial sums kept with encoding beam; the price is encoding time alone")
        .integer("refine", &refine, 0, 100,
                 "sweeps that refit all codebooks by least squares; 0 keeps the prefix property")
        .choice("weight", &weight, {"none", "mass", "mass2"},
                "training weight of a token: the attention mass it received, or its square")
        .choice("stored_as", &stored_as, {"f16", "bf16", "f32", "f8e5m2"}, "storage of codewords")
        .integer("iterations", &iterations, 1, 1000, "k-means iterations a stage")
        .effort()
        .integer("points", &points, 1, 1 << 20, "training vectors a codeword at most; more are sampled");
  }
  TrainNeeds needs() const { return {.mass = weight != "none"}; }
  int width(const UnitShape& unit) const { return group == 0 ? unit.channels() : group; }
  int used_beam() const { return encoding == "beam" ? beam : 1; }
  TrainMemory memory(const UnitShape& unit, int64_t rows) const;
};

TableShape rvq_shape(const RvqKnobs& k, const UnitShape& unit) {
  TableShape s;
  s.channels = unit.channels();
  s.groups = unit.channels() / k.width(unit);
  s.stages = k.codebooks;
  s.bits = k.bits;
  s.stored_as = dtype_from_name(k.stored_as);
  s.rope = unit.rope;
  return s;
}

TrainMemory RvqKnobs::memory(const UnitShape& unit, int64_t rows) const {
  return table_memory(rvq_shape(*this, unit), rows, used_beam(), refine > 0, points);
}

class RvqCodec final : public TableCodec {
 public:
  RvqCodec(const RvqKnobs& k, const UnitShape& unit)
      : TableCodec(rvq_shape(k, unit), k.used_beam(),
                   group_channels(k.grouping, unit, unit.channels() / k.width(unit))),
        knobs_(k) {}

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    return train_groups(set, knobs_.grouping, knobs_.weight, knobs_.refine, {knobs_.iterations, knobs_.points}, rng);
  }

 private:
  RvqKnobs knobs_;
};

MethodInfo describe_rvq() {
  MethodInfo info;
  info.name = "rvq";
  info.title = "residual quantization by k-means, with beam search and joint refinement";
  info.paper =
      "Chen, Guan, Wang, Sensors 2010; beam search and refinement as in Liu et al. (arXiv 1509.05195) and FAISS; "
      "grouped residual codes as in GSRQ (arXiv 2607.01065)";
  info.bibtex = "chen2010residual";
  info.family = "table";
  info.bits = "bits * codebooks / (group == 0 ? channels : group)";
  info.caveat =
      "under about 500 training vectors a codeword the stages overfit; with a beam or refinement a prefix of the "
      "stages still decodes, but is no longer the best shorter code";
  info.presets = {{"default", Json::object()},
                  {"embedded",
                   {{"codec", {{"encoding", "greedy"}, {"refine", 0}}},
                    {"note", "any prefix of the stages is the code of fewer stages"}}},
                  {"grouped", {{"codec", {{"group", 16}, {"codebooks", 4}, {"bits", 8}}}}}};
  return info;
}

std::string check_rvq(const RvqKnobs& k, const UnitShape& unit) {
  const int width = k.width(unit);
  if (width > unit.channels() || unit.channels() % width != 0)
    return "sub-vectors of " + std::to_string(width) + " channels don't divide " + std::to_string(unit.channels());
  return check_groups(k.grouping, unit, unit.channels() / width);
}

}  // namespace

VQKV_DEFINE_METHOD(rvq, RvqKnobs, RvqCodec, describe_rvq, check_rvq)

}  // namespace vqkv
