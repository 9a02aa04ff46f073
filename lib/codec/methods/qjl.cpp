// QJL: keys as the signs of random projections, apart for the loudest channels of a group of tokens; values per token.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "codec/methods/affine.h"
#include "codec/sign_sketch.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct QjlKnobs {
  double rows = 2;
  double outlier_rows = 2;
  int initial_layers = 15;
  double initial_rows = 4;
  double initial_outlier_rows = 1;
  int outliers = 8;
  int group = 32;
  int value_bits = 2;
  bool orthogonal = true;
  int seed = 42;
  KnobTable table() {
    return KnobTable()
        .real("rows", &rows, 0.125, 64, "signs of a key over head_dim: m / d")
        .real("outlier_rows", &outlier_rows, 0, 64, "signs of its outlier channels over head_dim; 0: they decode to 0")
        .integer("initial_layers", &initial_layers, 0, 65536, "first layers, with sketches of their own size")
        .real("initial_rows", &initial_rows, 0.125, 64, "rows of those")
        .real("initial_outlier_rows", &initial_outlier_rows, 0, 64, "outlier_rows of those")
        .integer("outliers", &outliers, 0, 255, "channels of a head that each group of tokens sets apart: its loudest")
        .integer("group", &group, 1, 1024, "keys: tokens that share outlier channels; values: channels a scale")
        .integer("value_bits", &value_bits, 1, 8, "bits of a value's code")
        .boolean("orthogonal", &orthogonal,
                 "projections in orthogonal chunks of head_dim, as the authors' code; else "
                 "Gaussian, as the paper's proof")
        .integer("seed", &seed, 0, 2147483647, "stream of the projections");
  }
  // One layer's sketch.
  void settle(int layer) {
    if (layer < initial_layers) {
      rows = initial_rows;
      outlier_rows = initial_outlier_rows;
    }
    initial_layers = 0;
  }
  double rows_of_outliers() const { return outliers == 0 ? 0 : outlier_rows; }
};

int times(double share, const UnitShape& unit) { return static_cast<int>(std::lround(share * unit.head_dim)); }

// The root of a sum of squares, as storage holds it.
float stored_norm(const std::vector<double>& v) {
  const double norm = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
  return round_side(DType::kF16, static_cast<float>(std::min(norm, 3.0e38)));
}

class QjlKeys final : public Codec {
 public:
  QjlKeys(const QjlKnobs& k, const UnitShape& unit)
      : unit_(unit),
        outliers_(k.outliers),
        rows_(times(k.rows, unit)),
        outlier_rows_(times(k.rows_of_outliers(), unit)),
        sketch_(sign_sketch(rows_, unit.head_dim, k.orthogonal, k.seed)) {
    layout_.fields = {{"sign", 8, unit.heads * rows_ / 8, true}};
    // Where a key has one part its norm scales the token, and scores need no decoding.
    layout_.sides = {{outliers_ == 0 ? "token_scale" : "norm", DType::kF16, unit.heads, true}};
    if (outliers_ == 0) return;
    layout_.block_tokens = k.group;
    layout_.fields.push_back({"outlier", 8, unit.heads * outliers_, false});
    if (outlier_rows_ == 0) return;
    layout_.fields.push_back({"outlier_sign", 8, unit.heads * outlier_rows_ / 8, true});
    layout_.sides.push_back({"outlier_norm", DType::kF16, unit.heads, true});
  }

  int channels() const override { return unit_.channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return unit_.rope; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows / layout_.block_tokens);
    parallel_for(out.blocks, [&](int64_t block) {
      for (int h = 0; h < unit_.heads; ++h)
        encode_group(x.slice_rows(block * layout_.block_tokens, layout_.block_tokens)
                         .slice_cols(int64_t{h} * unit_.head_dim, unit_.head_dim),
                     block, h, out);
    });
  }

  DecodePlan plan(const PlanQuery&) const override {
    DecodePlan plan = empty_plan();
    SignTerm signs = sketch_->term(rows_);
    if (outliers_ == 0) {
      plan.token_scale_side = 0;
      plan.terms = {signs};
      return plan;
    }
    signs.scale_side = 0;
    signs.outlier_field = 1;
    signs.reach = SignTerm::Reach::kOthers;
    plan.terms = {signs};
    if (outlier_rows_ == 0) return plan;
    SignTerm outlier = sketch_->term(outlier_rows_);
    outlier.field = 2;
    outlier.scale_side = 1;
    outlier.outlier_field = 1;
    outlier.reach = SignTerm::Reach::kOutliers;
    plan.terms.emplace_back(outlier);
    return plan;
  }

  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  // x: the tokens of one block, (block_tokens, head_dim) of head h.
  void encode_group(ConstMatrix x, int64_t block, int h, CodeBlock& out) const {
    const std::vector<char> apart = outlier_channels(x);
    for (int c = 0, n = 0; c < unit_.head_dim; ++c)
      if (apart[static_cast<size_t>(c)])
        out.fields[1][static_cast<size_t>((block * unit_.heads + h) * outliers_ + n++)] = static_cast<uint16_t>(c);
    std::vector<double> part(static_cast<size_t>(unit_.head_dim));
    const auto code = [&](int64_t t, bool outlier, int rows, size_t field, size_t side) {
      for (int64_t c = 0; c < x.cols; ++c)
        part[static_cast<size_t>(c)] = (apart[static_cast<size_t>(c)] != 0) == outlier ? double{x(t, c)} : 0.0;
      const int64_t at = (block * x.rows + t) * unit_.heads + h;
      out.sides[side][static_cast<size_t>(at)] = stored_norm(part);
      sketch_->signs(part.data(), rows, out.fields[field].data() + at * (rows / 8));
    };
    for (int64_t t = 0; t < x.rows; ++t) {
      code(t, false, rows_, 0, 0);
      if (outlier_rows_ > 0) code(t, true, outlier_rows_, 2, 1);
    }
  }

  // 1 for the channels of the largest norms over the tokens, of equal ones the first.
  std::vector<char> outlier_channels(ConstMatrix x) const {
    std::vector<double> energy(static_cast<size_t>(x.cols), 0.0);
    for (int64_t t = 0; t < x.rows; ++t)
      for (int64_t c = 0; c < x.cols; ++c) energy[static_cast<size_t>(c)] += double{x(t, c)} * x(t, c);
    std::vector<size_t> order(energy.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return energy[a] > energy[b]; });
    std::vector<char> out(energy.size(), 0);
    for (int i = 0; i < outliers_; ++i) out[order[static_cast<size_t>(i)]] = 1;
    return out;
  }

  UnitShape unit_;
  int outliers_, rows_, outlier_rows_;
  std::shared_ptr<const SignSketch> sketch_;
  CodeLayout layout_;
};

struct QjlCodec {
  static std::unique_ptr<Codec> make(const QjlKnobs& k, const UnitShape& unit) {
    if (unit.role == Role::kKey) return std::make_unique<QjlKeys>(k, unit);
    AffineGrid grid;
    grid.bits = k.value_bits;
    return std::make_unique<AffineCodec>(grid, AffineGroups{k.group, false}, unit);
  }
};

MethodInfo describe_qjl() {
  MethodInfo info;
  info.name = "qjl";
  info.title = "keys as the signs of random projections, values per token in channel groups";
  info.paper =
      "Zandieh, Daliri, Han, QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead, AAAI "
      "2025, arXiv 2406.03482";
  info.bibtex = "zandieh2025qjl";
  info.family = "sign";
  info.bits =
      "role == v ? value_bits + 32 / group : (layer < initial_layers ? initial_rows : rows) + 16 / head_dim + "
      "(outliers == 0 ? 0 : 8 * outliers / (group * head_dim) + ((layer < initial_layers ? initial_outlier_rows : "
      "outlier_rows) == 0 ? 0 : (layer < initial_layers ? initial_outlier_rows : outlier_rows) + 16 / head_dim))";
  info.trained = false;
  info.version = 2;  // 2: sizes of the model's layer in a sweep of some layers, and under `share: layers`
  info.caveat =
      "scores are unbiased but vary by sqrt(pi / 2 / m) |q| |k|, which softmax does not average: the paper's `3 bits` "
      "are 4.27 to 5.27 for keys of head_dim 128. Of the parts of a key each has its norm stored, where the authors' "
      "code derives that of the rest from those of the whole and the outlier channels: same bits, less rounding. Sizes "
      "are over head_dim: the paper's are m = 256, 512 in 15 of 32 layers, at 128. Its buffer of 128 exact tokens "
      "comes with `preset: default`, and only then";
  const Json cache = {{"sinks", 0}, {"rule", "kivi"}, {"residual", 128}};
  info.presets = {
      {"default", {{"cache", cache}, {"note", "the paper's accuracy setting; one sketch for all layers of a size"}}},
      {"no_outliers",
       {{"codec", {{"outliers", 0}}},
        {"cache", cache},
        {"note", "as the authors measure memory and speed, not accuracy; without the second norm, which is 0"}}}};
  return info;
}

std::string check_qjl(const QjlKnobs& k, const UnitShape& unit) {
  if (unit.role == Role::kValue) return check_head_group(k.group, unit);
  if (unit.head_dim > 256) return "outlier channels are numbered in 8 bits, and a head has more than 256";
  if (k.outliers >= unit.head_dim) return fmt::format("{} outlier channels of a head of {}", k.outliers, unit.head_dim);
  for (const double share : {k.rows, k.rows_of_outliers()})
    if (times(share, unit) % 8 != 0 || std::abs(times(share, unit) - share * unit.head_dim) > 1e-9)
      return fmt::format("{} times a head of {} are no whole bytes of signs", share, unit.head_dim);
  if (k.rows_of_outliers() > k.rows) return "signs of outlier channels come from the first rows of the sketch";
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(qjl, QjlKnobs, QjlCodec, describe_qjl, check_qjl)

}  // namespace vqkv
