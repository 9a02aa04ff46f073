#include "codec/level.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "core/error.h"

namespace vqkv {
namespace {

class LevelCodec final : public Codec {
 public:
  LevelCodec(std::shared_ptr<const Codec> whole, int stages)
      : whole_(std::move(whole)), last_(stages - 1), layout_(whole_->level_layout(last_)) {}

  int channels() const override { return whole_->channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return whole_->rope(); }
  int levels() const override { return last_ + 1; }
  CodeLayout level_layout(int level) const override {
    VQKV_CHECK(level <= last_);
    return whole_->level_layout(level);
  }
  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks&) const override { return 0; }  // those of the whole

  TrainReport train(const TrainSet&, const Rng&) override { fail_internal("a level has no training of its own"); }
  void save(ParameterWriter&) const override { fail_internal("a level is saved as the codec that it is of"); }
  void load(const ParameterReader&) override { fail_internal("a level is loaded as the codec that it is of"); }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state) const override {
    CodeBlock codes;
    whole_->encode(x, codes, state);
    out = cut_codes(codes, whole_->layout(), layout_);
  }
  void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out, const SequenceState* state) const override {
    CodeBlock codes;
    whole_->encode_at(x, at, codes, state);
    out = cut_codes(codes, whole_->layout(), layout_);
  }
  DecodePlan plan(const PlanQuery& query) const override {
    VQKV_CHECK(query.level <= last_);
    DecodePlan plan = whole_->plan({query.level < 0 ? last_ : query.level, query.state});
    plan.layout = layout_;
    return plan;
  }

 private:
  std::shared_ptr<const Codec> whole_;
  int last_;
  CodeLayout layout_;
};

}  // namespace

std::vector<std::string> methods_with_levels() {
  UnitShape unit;
  unit.head_dim = 64;
  std::vector<std::string> out;
  for (const Method* m : all_methods()) {
    const Json knobs = m->canonical(Json::object(), "");
    if (m->check(knobs, unit).empty() && m->make(knobs, unit)->levels() > 1) out.push_back(m->describe().name);
  }
  return out;
}

std::string level_reason(const Codec& whole, int stages) {
  const int all = whole.levels();
  if (all == 1)
    return fmt::format(
        "its codes have one level alone, the whole; a level is the first stages of a code of several ({})",
        fmt::join(methods_with_levels(), ", "));
  if (stages >= 1 && stages < all) return "";
  return fmt::format("it has {} stages, so a level of it has 1 to {}, not {}", all, all - 1, stages);
}

std::shared_ptr<const Codec> codec_level(std::shared_ptr<const Codec> whole, int stages) {
  const std::string reason = level_reason(*whole, stages);
  if (!reason.empty()) fail_usage(fmt::format("level {}: {}", stages, reason));
  return std::make_shared<LevelCodec>(std::move(whole), stages);
}

CodeBlock cut_codes(const CodeBlock& codes, const CodeLayout& from, const CodeLayout& to) {
  VQKV_CHECK(to.block_tokens == from.block_tokens && to.sides.size() == from.sides.size());
  VQKV_CHECK(to.fields.size() == from.fields.size());
  CodeBlock out;
  out.resize(to, codes.blocks);
  for (size_t f = 0; f < to.fields.size(); ++f) {
    const auto all = static_cast<size_t>(from.fields[f].slots), kept = static_cast<size_t>(to.fields[f].slots);
    VQKV_CHECK(kept <= all);
    for (size_t t = 0; t * kept < out.fields[f].size(); ++t)
      std::copy_n(codes.fields[f].data() + t * all, kept, out.fields[f].data() + t * kept);
  }
  out.sides = codes.sides;
  out.overlay = codes.overlay;
  return out;
}

}  // namespace vqkv
