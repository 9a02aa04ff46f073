// Product quantization: each sub-vector by the nearest codeword of its own codebook.
#include "codec/methods/table_codec.h"

namespace vqkv {
namespace {

struct PqKnobs {
  int codebooks = 16;
  int bits = 8;
  std::string grouping = "contiguous";
  std::string weight = "none";
  std::string stored_as = "f16";
  int iterations = 25;
  int points = 256;
  KnobTable table() {
    return KnobTable()
        .integer("codebooks", &codebooks, 1, 4096, "sub-vectors of a unit, each with a codebook")
        .integer("bits", &bits, 1, 16, "bits of a code: 2^bits codewords a codebook")
        .choice("grouping", &grouping, {"contiguous", "strided", "rope_pair", "variance"},
                "which channels make a sub-vector; variance deals them out by rank, so that every sub-vector spans the "
                "spectrum. Behind query_metric the default is variance: that transform sorts the channels, and "
                "contiguous groups spend as many bits on weak ones as on strong ones")
        .choice("weight", &weight, {"none", "mass", "mass2"},
                "training weight of a token: the attention mass it received, or its square")
        .choice("stored_as", &stored_as, {"f16", "bf16", "f32", "f8e5m2"}, "storage of codewords")
        .integer("iterations", &iterations, 1, 1000, "k-means iterations")
        .effort()
        .integer("points", &points, 1, 1 << 20, "training vectors a codeword at most; more are sampled");
  }
  TrainNeeds needs() const { return {.mass = weight != "none"}; }
  TrainMemory memory(const UnitShape& unit, int64_t rows) const;
};

TableShape pq_shape(const PqKnobs& k, const UnitShape& unit) {
  TableShape s;
  s.channels = unit.channels();
  s.groups = k.codebooks;
  s.bits = k.bits;
  s.stored_as = dtype_from_name(k.stored_as);
  s.rope = unit.rope;
  return s;
}

TrainMemory PqKnobs::memory(const UnitShape& unit, int64_t rows) const {
  return table_memory(pq_shape(*this, unit), rows, 1, false, points);
}

class PqCodec final : public TableCodec {
 public:
  PqCodec(const PqKnobs& k, const UnitShape& unit)
      : TableCodec(pq_shape(k, unit), 1, group_channels(k.grouping, unit, k.codebooks)), knobs_(k) {}

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    return train_groups(set, knobs_.grouping, knobs_.weight, 0, {knobs_.iterations, knobs_.points}, rng);
  }

 private:
  PqKnobs knobs_;
};

MethodInfo describe_pq() {
  MethodInfo info;
  info.name = "pq";
  info.title = "product quantization: one codeword for each group of channels";
  info.paper =
      "Jegou, Douze, Schmid, TPAMI 2011; for KV caches MILLION (DAC 2025), CQ (NeurIPS 2024, arXiv 2405.03917), "
      "equal-volume grouping NOVA-KV (arXiv 2608.04074)";
  info.bibtex = "jegou2011product";
  info.family = "table";
  info.bits = "bits * codebooks / channels";
  info.caveat =
      "codebooks of their own for every layer and head beat a shared table by far; the codebooks cost "
      "2^bits * channels * 16 bits a unit, which short contexts feel";
  info.presets = {
      {"default", Json::object()},
      {"million4",
       {{"codec", {{"codebooks", 32}, {"bits", 8}}}, {"note", "4 bits a value at head_dim 64; 64 codebooks at 128"}}},
      {"nova",
       {{"codec", {{"codebooks", 16}, {"bits", 8}, {"grouping", "variance"}, {"transform", {"query_metric"}}}},
        {"note", "keys at head_dim 64; 32 codebooks at 128. Values are 2-bit scalars there"}}}};
  return info;
}

std::string check_pq(const PqKnobs& k, const UnitShape& unit) { return check_groups(k.grouping, unit, k.codebooks); }

}  // namespace

VQKV_DEFINE_METHOD(pq, PqKnobs, PqCodec, describe_pq, check_pq)

}  // namespace vqkv
