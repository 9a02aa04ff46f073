// A method outside the tree of vqkv: scalar codes whose levels are learned from the values, with one scale a token.
#include "lloyd.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/finite.h"

namespace lloyd {
namespace {

using namespace vqkv;

// Names, defaults, ranges and help: what a YAML file, `explain` and a sweep's axes know of the method.
struct Knobs {
  int bits = 3;
  int iterations = 20;
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 8, "bits of a code: 2^bits levels")
        .integer("iterations", &iterations, 1, 1000, "rounds of training")
        .effort();
  }
};

class LloydCodec final : public Codec {
 public:
  LloydCodec(const Knobs& knobs, const UnitShape& unit) : knobs_(knobs), rope_(unit.rope) {
    layout_.fields = {{"code", knobs.bits, unit.channels(), true}};
    layout_.sides = {{"scale", DType::kF16, 1, true}};
  }

  int channels() const override { return layout_.fields[0].slots; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }

  TrainReport train(const TrainSet& set, const Rng&) override {
    // At most 2^20 values, evenly thinned: enough for 256 levels.
    const int64_t step = std::max<int64_t>(1, set.x.size() >> 20);
    std::vector<double> values;
    for (int64_t t = 0, i = 0; t < set.x.rows; ++t) {
      const float scale = scale_of(set.x.row(t));
      for (int64_t c = 0; c < set.x.cols; ++c, ++i)
        if (i % step == 0) values.push_back(set.x(t, c) / scale);
    }
    std::sort(values.begin(), values.end());
    std::vector<double> sum{0.0};  // of the values before each
    for (const double v : values) sum.push_back(sum.back() + v);
    const size_t n = size_t{1} << knobs_.bits;
    levels_.resize(n);
    for (size_t i = 0; i < n; ++i) levels_[i] = static_cast<float>(values[(2 * i + 1) * values.size() / (2 * n)]);
    TrainReport report;
    for (report.iterations = 0; report.iterations < knobs_.iterations; ++report.iterations)
      for (size_t i = 0, first = 0; i < n; ++i) {
        const double end = i + 1 < n ? (levels_[i] + levels_[i + 1]) / 2 : INFINITY;
        const auto last = static_cast<size_t>(std::lower_bound(values.begin(), values.end(), end) - values.begin());
        if (last > first) levels_[i] = static_cast<float>((sum[last] - sum[first]) / static_cast<double>(last - first));
        first = std::max(first, last);
      }
    report.vectors = set.x.rows;
    return report;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    uint16_t* code = out.fields[0].data();
    for (int64_t t = 0; t < x.rows; ++t) {
      const float scale = out.sides[0][static_cast<size_t>(t)] = scale_of(x.row(t));
      for (int64_t c = 0; c < x.cols; ++c) *code++ = nearest(x(t, c) / scale);
    }
  }

  DecodePlan plan(const PlanQuery&) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.levels = levels_;
    term.scale_side = 0;
    term.group_channels = channels();
    plan.terms = {term};
    return plan;
  }

  void save(ParameterWriter& out) const override {
    out.tensor("levels", {static_cast<int64_t>(levels_.size())}, levels_.data());
  }
  void load(const ParameterReader& in) override {
    const auto levels = in.tensor("levels", {int64_t{1} << knobs_.bits});
    if (first_not_finite(levels.data(), static_cast<int64_t>(levels.size())) >= 0)
      fail_data("lloyd: a level is not finite");
    levels_.assign(levels.begin(), levels.end());
  }

 private:
  // The root mean square of a token's values, as it is stored.
  float scale_of(const float* row) const {
    double squares = 0;
    for (int c = 0; c < channels(); ++c) squares += double{row[c]} * row[c];
    return round_scale(DType::kF16, static_cast<float>(std::sqrt(squares / channels())));
  }
  uint16_t nearest(float v) const {
    const auto above = std::lower_bound(levels_.begin(), levels_.end(), v);
    if (above == levels_.begin()) return 0;
    const auto i = above - levels_.begin();
    return static_cast<uint16_t>(above == levels_.end() || v - levels_[static_cast<size_t>(i - 1)] <= *above - v ? i - 1
                                                                                                                 : i);
  }

  Knobs knobs_;
  RopePlacement rope_;
  CodeLayout layout_;
  std::vector<float> levels_;  // ascending
};

MethodInfo describe() {
  MethodInfo info;
  info.name = "lloyd";
  info.title = "scalar codes on levels learned from the values, one scale a token";
  info.paper = "Lloyd, IEEE Transactions on Information Theory 1982";
  info.bibtex = "lloyd1982least";
  info.family = "levels";
  info.bits = "bits + 16 / channels";
  info.caveat = "one set of levels for all channels: channels of other shapes pay for it";
  return info;
}

std::string check(const Knobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_METHOD(lloyd, Knobs, LloydCodec, describe, check)

}  // namespace lloyd
