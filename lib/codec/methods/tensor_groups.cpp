#include "codec/methods/tensor_groups.h"

#include "core/error.h"
#include "core/thread_pool.h"
#include "core/view.h"

namespace vqkv {

TensorCodec::TensorCodec(const TensorGroups& groups, const UnitShape& unit)
    : groups_(groups),
      channels_(unit.channels()),
      count_(int64_t{groups.tokens} * unit.channels() / groups.group),
      rope_(unit.rope) {
  using Form = TensorGroups::Form;
  const int tokens = groups.tokens, group = groups.group, d = unit.head_dim;
  VQKV_CHECK(count_ * group == int64_t{tokens} * channels_ && groups.padding % 16 == 0);
  // Groups inside a token have sides of that token; groups of other forms have sides of the tensor.
  const bool per_token = groups.form == Form::kNeighbours && d % group == 0;
  member_.resize(static_cast<size_t>(count_ * group));
  std::vector<int32_t> filled(static_cast<size_t>(count_), 0);
  int64_t n = 0;
  for (int h = 0; h < unit.heads; ++h)
    for (int t = 0; t < tokens; ++t)
      for (int c = 0; c < d; ++c, ++n) {
        const int channel = h * d + c;
        const int64_t g = per_token                       ? int64_t{t} * (channels_ / group) + channel / group
                          : groups.form == Form::kStrided ? n % count_
                          : groups.form == Form::kTokens  ? (int64_t{h} * tokens + t) / group * d + c
                                                          : n / group;
        member_[static_cast<size_t>(g * group + filled[static_cast<size_t>(g)]++)] = t * channels_ + channel;
      }
  layout_.block_tokens = tokens;
  layout_.fields = {{"code", groups.bits, channels_, true}};
  const int slots = per_token ? channels_ / group : static_cast<int>(count_);
  layout_.sides = {{"scale", groups.type, slots, per_token}, {"zero", groups.type, slots, per_token}};
  if (groups.padding > 0)
    layout_.sides.push_back({"padding", DType::kF16, static_cast<int>(count_ * groups.padding / 16), false});
  if (per_token || (groups.form == Form::kTokens && tokens == group)) return;
  auto group_of = std::make_shared<std::vector<int32_t>>(member_.size());
  for (size_t i = 0; i < member_.size(); ++i)
    (*group_of)[static_cast<size_t>(member_[i])] = static_cast<int32_t>(i / static_cast<size_t>(group));
  group_of_ = std::move(group_of);
}

void TensorCodec::encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const {
  check_encode_input(*this, x);
  out.resize(layout_, x.rows / groups_.tokens);
  const int64_t group = groups_.group, values = count_ * group;
  parallel_chunks(out.blocks, 1, [&](int64_t first, int64_t end) {
    Matrix<float> gathered(count_, group);
    std::vector<uint16_t> codes(member_.size());
    for (int64_t b = first; b < end; ++b) {
      const ConstMatrix part = x.slice_rows(b * groups_.tokens, groups_.tokens);
      for (int64_t i = 0; i < values; ++i) {
        const int32_t at = member_[static_cast<size_t>(i)];
        gathered.storage[static_cast<size_t>(i)] = rounded(part(at / channels_, at % channels_));
      }
      code(gathered, codes.data(), out.sides[0].data() + b * count_, out.sides[1].data() + b * count_);
      uint16_t* to = out.fields[0].data() + b * values;
      for (int64_t i = 0; i < values; ++i) to[member_[static_cast<size_t>(i)]] = codes[static_cast<size_t>(i)];
    }
  });
}

DecodePlan TensorCodec::plan(const PlanQuery&) const {
  DecodePlan plan = empty_plan();
  LevelsTerm term;
  term.scale_side = 0;
  term.zero_side = 1;
  term.zero_of_codes = groups_.zero_of_codes;
  term.group_of = group_of_;
  if (!group_of_ && layout_.sides[0].per_token) {
    term.group_channels = groups_.group;
  } else if (!group_of_) {
    term.group_tokens = groups_.group;
  }
  plan.terms = {term};
  return plan;
}

}  // namespace vqkv
