// Scalar codes in groups that are laid over memory: the common part of quanto and hqq, as transformers' QuantizedCache
// calls them. It hands a quantizer the keys or values of a layer as one tensor (heads, tokens, head_dim), and a group
// is so many of its values by their place n = (head * tokens + token) * head_dim + channel, whatever head, token or
// channel that is.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace vqkv {

struct TensorGroups {
  // Of `count` groups of `group` values, the one of place n is
  //   kNeighbours: n / group              quanto's axis 0, hqq's axis 1
  //   kStrided: n % count                 hqq's axis 0
  //   kTokens: of one channel, each `group` tokens as they follow each other, head after head    quanto's axis -1
  enum class Form { kNeighbours, kStrided, kTokens } form = Form::kNeighbours;
  int bits = 4;
  int group = 64;
  int tokens = 1;              // of the tensor: coded together
  DType type = DType::kBF16;   // the model's: what values are rounded to before, and scales and zeros are stored as
  bool zero_of_codes = false;  // x ~ scale * (code + zero), else scale * code + zero
  int padding = 0;             // bits a group that packing leaves unused, a multiple of 16
};

class TensorCodec : public Codec {
 public:
  TensorCodec(const TensorGroups& groups, const UnitShape& unit);

  int channels() const override { return channels_; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state = nullptr) const override;
  DecodePlan plan(const PlanQuery& query = {}) const override;
  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 protected:
  // Codes one tensor. x: (count, group), rounded to the type; codes likewise; scale and zero: (count), of the type.
  virtual void code(ConstMatrix x, uint16_t* codes, float* scale, float* zero) const = 0;
  const TensorGroups& groups() const { return groups_; }
  float rounded(float v) const { return round_side(groups_.type, v); }

 private:
  TensorGroups groups_;
  int channels_;
  int64_t count_;
  RopePlacement rope_;
  CodeLayout layout_;
  std::vector<int32_t> member_;  // (count, group): token * channels + channel
  std::shared_ptr<const std::vector<int32_t>>
      group_of_;  // LevelsTerm's; null where groups lie as those of other codecs
};

}  // namespace vqkv
