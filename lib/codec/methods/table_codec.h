// Codes that are sums of codewords over groups of channels: the common part of pq, rvq, kumar and simvq. A derived
// class trains the quantizers; encoding, plan and storage are here.
#pragma once
#include <string>
#include <vector>

#include "codec/codec.h"
#include "codec/train/residual.h"

namespace vqkv {

struct TableShape {
  int channels = 0;
  int groups = 1;  // sub-vectors of channels / groups channels each
  int stages = 1;  // codes a sub-vector
  int bits = 8;
  bool shared_book = false;  // one set of books for all groups
  int scale_slots = 0;       // > 0: standard deviations a token, one for each channels / scale_slots channels
  DType scale_type = DType::kF16;
  DType stored_as = DType::kF16;
  RopePlacement rope = RopePlacement::kPost;

  int width() const { return channels / groups; }
  int64_t entries() const { return int64_t{1} << bits; }
};

// Slots are stage-major (slot = stage * groups + group), so that a prefix of slots is a prefix of stages.
class TableCodec : public Codec {
 public:
  TableCodec(const TableShape& shape, int beam, std::vector<int32_t> channel);

  int channels() const override { return shape_.channels; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return shape_.rope; }
  int levels() const override { return shape_.stages; }
  CodeLayout level_layout(int level) const override;
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state = nullptr) const override;
  DecodePlan plan(const PlanQuery& query = {}) const override;
  void save(ParameterWriter& out) const override;
  void load(const ParameterReader& in) override;

 protected:
  const TableShape& shape() const { return shape_; }
  const std::vector<int32_t>& channel() const { return channel_; }
  void set_channels(std::vector<int32_t> channel);

  // Rows of x as the quantizers see them: channels in the order of groups, divided by the token's scale where there is
  // one; scales (rows, scale_slots) may be null then.
  void gather(ConstMatrix x, MutMatrix out, float* scales) const;
  // A quantizer for each group: channels as `grouping` says (variance looks at the rows), tokens weighted by `weight`
  // (see training_weights), `refine` sweeps over the stages. The report's curve holds one group behind the other.
  TrainReport train_groups(const TrainSet& set, const std::string& grouping, const std::string& weight, int refine,
                           const KmeansOptions& kmeans, const Rng& rng);
  // One quantizer a group, or one for all with shared_book.
  void install(std::vector<ResidualQuantizer> quantizers);
  int beam() const { return beam_; }

 private:
  TableShape shape_;
  int beam_;
  std::vector<int32_t> channel_;  // (groups, width): unit channel of each codeword element
  bool in_order_ = true;          // channel_ is 0, 1, 2, ...
  CodeLayout layout_;
  std::vector<ResidualQuantizer> quantizers_;
  std::shared_ptr<const AlignedVector<float>> codewords_;  // (books, entries, width), book = stage * groups + group
};

// Of train_groups and the codec that it leaves. points: training vectors a codeword.
TrainMemory table_memory(const TableShape& shape, int64_t rows, int beam, bool refine, int points);

// Which channels make a sub-vector, (groups, width).
//   contiguous  group g holds channels g * width ...
//   strided     channel c goes to group c mod groups, place c div groups
//   rope_pair   pairs of a head (UnitShape::pair) stay together, in order
// `variance` needs data: see variance_channels.
std::vector<int32_t> group_channels(const std::string& grouping, const UnitShape& unit, int groups);
// The channel of variance rank i goes to group i mod groups (equal-volume grouping, NOVA-KV, arXiv 2608.04074).
std::vector<int32_t> variance_channels(ConstMatrix x, int groups);
// Why `groups` sub-vectors can't be made of this unit, or "".
std::string check_groups(const std::string& grouping, const UnitShape& unit, int groups);

// A tensor whose values are finite and exact in `stored_as`; kBadData where it is not one.
AlignedVector<float> read_stored(const ParameterReader& in, const std::string& name, const std::vector<int64_t>& shape,
                                 DType stored_as);

// Training weights of `mode` none | mass | mass2: the attention mass that each token received, times the set's own
// weights; empty where all are equal. Tokens keep at least 1 % of the mean, so that none is ignored. Throws kBadData
// where the set does not have what the mode asks for.
std::vector<float> training_weights(const TrainSet& set, const std::string& mode);

}  // namespace vqkv
