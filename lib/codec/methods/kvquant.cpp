// KVQuant: keys on a range a channel that is fixed in training, values on a range a token over all heads of the unit,
// both on one table of levels that need not be even; the ends of every distribution are kept exactly.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "codec/methods/table_codec.h"
#include "codec/train/scalar_kmeans.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/finite.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct KvquantKnobs {
  int bits = 3;
  std::string datatype = "nuq";
  double outliers = 0.01;
  std::string weight = "none";
  bool scale_aware = true;
  bool q_norm = false;
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 8, "bits of a code (the paper: 2, 3 or 4)")
        .choice("datatype", &datatype, {"nuq", "int"},
                "levels by weighted k-means over all normalized values of the unit, or evenly spaced")
        .real("outliers", &outliers, 0.0, 0.5,
              "share of values that are stored exactly, half of it at each end: beyond a channel's quantiles for keys, "
              "the outermost of a token for values")
        .choice("weight", &weight, {"none", "mass", "mass2", "fisher"},
                "of a value in k-means: equal, the attention mass of its token, or its squared gradient (the paper)")
        .boolean("scale_aware", &scale_aware,
                 "k-means counts errors of the values themselves (the paper's appendix), not of normalized ones")
        .boolean("q_norm", &q_norm, "decoded levels keep mean and deviation of the values (the paper, for 2 bits)");
  }
  TrainNeeds needs() const { return {.mass = weight == "mass" || weight == "mass2", .gradients = weight == "fisher"}; }
  // Every value normalized with its weight; before them a sorted channel a thread.
  TrainMemory memory(const UnitShape& unit, int64_t rows) const {
    return {.scratch = static_cast<double>(rows) * unit.channels() * (sizeof(float) + sizeof(double))};
  }
};

// Exact values at each end of a token of `channels` values.
int exact_at_each_end(const KvquantKnobs& k, int channels) {
  return static_cast<int>(std::ceil(k.outliers / 2 * channels - 1e-9));
}

// The q-quantile of sorted values, linear between neighbours.
double quantile(const std::vector<float>& sorted, double q) {
  const double at = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  const double next = sorted[std::min(below + 1, sorted.size() - 1)];
  return sorted[below] + (at - static_cast<double>(below)) * (next - sorted[below]);
}

// Mean and deviation of values that are given one by one.
struct Moments {
  double n = 0, sum = 0, square = 0;
  void add(double v) {
    n += 1;
    sum += v;
    square += v * v;
  }
  double mean() const { return sum / n; }
  double deviation() const { return std::sqrt(std::max(0.0, square / n - mean() * mean())); }
};

class KvquantCodec final : public Codec {
 public:
  KvquantCodec(const KvquantKnobs& k, const UnitShape& unit)
      : knobs_(k), keys_(unit.role == Role::kKey), channels_(unit.channels()), rope_(unit.rope) {
    layout_.fields = {{"code", k.bits, channels_, true}};
    if (!keys_) layout_.sides = {{"scale", kStored, 1, true}, {"zero", kStored, 1, true}};
    layout_.overlay = k.outliers > 0;
    const int top = (1 << k.bits) - 1;
    for (int i = 0; i <= top; ++i) levels_.push_back(constant(2.0 * i / top - 1));
    if (keys_) {
      zero_.assign(static_cast<size_t>(channels_), 0.0f);
      range_.assign(static_cast<size_t>(channels_), 1.0f);
    }
  }

  int channels() const override { return channels_; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }

  TrainReport train(const TrainSet& set, const Rng&) override {
    const Stopwatch watch;
    check_encode_input(*this, set.x);
    const bool fisher = knobs_.weight == "fisher";
    if (fisher && set.squared_gradient.rows != set.x.rows)
      fail_data("weight: fisher needs the squared gradient of every value: there is none here, nor behind a transform");
    const std::vector<float> token_weight = training_weights(set, fisher ? "none" : knobs_.weight);
    if (keys_) fit_ranges(set.x);
    std::vector<float> inside;  // normalized values that are coded, in order
    std::vector<double> weight;
    inside.reserve(static_cast<size_t>(set.x.rows * channels_));
    weight.reserve(inside.capacity());
    Row row;
    double weighed = 0;
    for (int64_t t = 0; t < set.x.rows; ++t) {
      look(set.x.row(t), row);
      for (int c = 0; c < channels_; ++c) {
        if (row.exact[at(c)]) continue;
        double w = token_weight.empty() ? 1.0 : double{token_weight[static_cast<size_t>(t)]};
        if (fisher) w *= set.squared_gradient(t, c);
        if (knobs_.scale_aware) w *= double{range(row, c)} * range(row, c);
        inside.push_back(static_cast<float>(normalized(row, c, set.x(t, c))));
        weight.push_back(w);
        weighed += w;
      }
    }
    if (!(weighed > 0) || !std::isfinite(weighed)) fail_data("the weights of all values are zero, or not finite");
    if (knobs_.datatype == "nuq") levels_ = scalar_kmeans(inside, weight, static_cast<int>(levels_.size()));
    for (float& level : levels_) level = constant(level);
    if (knobs_.q_norm) fit_norm(inside);
    TrainReport report;
    report.vectors = set.x.rows;
    report.seconds = watch.seconds();
    return report;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    constexpr int64_t kChunk = 64;
    std::vector<std::vector<OverlayEntry>> exact(static_cast<size_t>((x.rows + kChunk - 1) / kChunk));
    parallel_chunks(x.rows, kChunk, [&](int64_t first, int64_t end) {
      Row row;
      std::vector<OverlayEntry>& found = exact[static_cast<size_t>(first / kChunk)];
      for (int64_t t = first; t < end; ++t) {
        look(x.row(t), row);
        if (!keys_) {
          out.sides[0][static_cast<size_t>(t)] = row.range;
          out.sides[1][static_cast<size_t>(t)] = row.zero;
        }
        uint16_t* codes = out.fields[0].data() + t * channels_;
        for (int c = 0; c < channels_; ++c) {
          codes[c] = static_cast<uint16_t>(nearest_level(levels_, normalized(row, c, x(t, c))));
          if (row.exact[at(c)]) found.push_back({static_cast<int32_t>(t), c, constant(x(t, c)), false});
        }
      }
    });
    for (const auto& part : exact) out.overlay.insert(out.overlay.end(), part.begin(), part.end());
  }

  DecodePlan plan(const PlanQuery&) const override {
    DecodePlan plan = empty_plan();
    plan.constants_as = kStored;
    LevelsTerm term;
    for (const float level : levels_) term.levels.push_back(constant(double{level} * gain_ + shift_));
    if (keys_) {
      plan.map = DiagonalMap{range_};
      plan.outer_bias = zero_;
    } else {
      term.scale_side = 0;
      term.zero_side = 1;
      term.group_channels = channels_;
    }
    plan.terms = {term};
    return plan;
  }

  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks& counted) const override {
    // Levels that decode to others stand beside them.
    return Codec::constant_bytes(counted) +
           (knobs_.q_norm ? static_cast<int64_t>(levels_.size() * dtype_size(kStored)) : 0);
  }

  void save(ParameterWriter& out) const override {
    out.tensor("levels", {static_cast<int64_t>(levels_.size())}, levels_.data());
    const float norm[] = {gain_, shift_};
    out.tensor("norm", {2}, norm);
    if (!keys_) return;
    out.tensor("zero", {channels_}, zero_.data());
    out.tensor("range", {channels_}, range_.data());
  }
  void load(const ParameterReader& in) override {
    const auto read = [&](const char* name, int64_t size) {
      const AlignedVector<float> v = in.tensor(name, {size});
      if (!all_finite(v.data(), size)) fail_data(std::string("tensor '") + name + "' holds a value that is not finite");
      return std::vector<float>(v.begin(), v.end());
    };
    levels_ = read("levels", static_cast<int64_t>(levels_.size()));
    if (!std::ranges::is_sorted(levels_)) fail_data("tensor 'levels' does not ascend");
    const std::vector<float> norm = read("norm", 2);
    gain_ = norm[0];
    shift_ = norm[1];
    if (!keys_) return;
    zero_ = read("zero", channels_);
    range_ = read("range", channels_);
    if (!(std::ranges::min(range_) > 0)) fail_data("tensor 'range' holds a range that is not above 0");
  }

 private:
  // What of a token is exact, and where the rest of a value token lies.
  struct Row {
    float zero = 0, range = 1;
    std::vector<char> exact;     // (channels)
    std::vector<int32_t> order;  // (channels), of values: scratch
  };

  // Ranges, levels and exact values alike (the paper: 16 bits each).
  static constexpr DType kStored = DType::kF16;
  static float constant(double v) { return round_side(kStored, static_cast<float>(v)); }

  static size_t at(int c) { return static_cast<size_t>(c); }
  float range(const Row& row, int c) const { return keys_ ? range_[at(c)] : row.range; }
  double normalized(const Row& row, int c, float x) const {
    return (double{x} - (keys_ ? zero_[at(c)] : row.zero)) / range(row, c);
  }

  void look(const float* x, Row& row) const {
    row.exact.assign(at(channels_), 0);
    if (keys_) {
      if (layout_.overlay)
        for (int c = 0; c < channels_; ++c) row.exact[at(c)] = std::abs(normalized(row, c, x[c])) > 1;
      return;
    }
    const int ends = exact_at_each_end(knobs_, channels_);
    row.order.resize(at(channels_));
    std::iota(row.order.begin(), row.order.end(), 0);
    const auto less = [&](int32_t a, int32_t b) { return x[a] < x[b] || (x[a] == x[b] && a < b); };
    const auto first = row.order.begin() + ends, last = row.order.end() - ends;
    std::nth_element(row.order.begin(), first, row.order.end(), less);
    const double low = x[*first];
    std::nth_element(first, last - 1, row.order.end(), less);
    const double high = x[*(last - 1)];
    for (auto i = row.order.begin(); i != first; ++i) row.exact[at(*i)] = 1;
    for (auto i = last; i != row.order.end(); ++i) row.exact[at(*i)] = 1;
    row.zero = constant(0.5 * (low + high));
    row.range = round_scale(kStored, static_cast<float>(0.5 * (high - low)));
  }

  void fit_ranges(ConstMatrix x) {
    parallel_for(channels_, [&](int64_t c) {
      std::vector<float> column(static_cast<size_t>(x.rows));
      for (int64_t t = 0; t < x.rows; ++t) column[static_cast<size_t>(t)] = x(t, c);
      std::ranges::sort(column);
      const double low = quantile(column, knobs_.outliers / 2), high = quantile(column, 1 - knobs_.outliers / 2);
      zero_[static_cast<size_t>(c)] = constant(0.5 * (low + high));
      range_[static_cast<size_t>(c)] = round_scale(kStored, static_cast<float>(0.5 * (high - low)));
    });
  }

  void fit_norm(const std::vector<float>& inside) {
    Moments before, after;
    for (const float v : inside) {
      before.add(v);
      after.add(levels_[at(nearest_level(levels_, v))]);
    }
    const double gain = after.deviation() > 0 ? before.deviation() / after.deviation() : 1;
    gain_ = static_cast<float>(gain);
    shift_ = static_cast<float>(before.mean() - gain * after.mean());
  }

  KvquantKnobs knobs_;
  bool keys_;
  int channels_;
  RopePlacement rope_;
  CodeLayout layout_;
  std::vector<float> levels_;        // (2^bits), ascending, of normalized values
  float gain_ = 1, shift_ = 0;       // levels decode to gain * level + shift
  std::vector<float> zero_, range_;  // (channels), of keys
};

MethodInfo describe_kvquant() {
  MethodInfo info;
  info.name = "kvquant";
  info.title = "keys on a calibrated range a channel, values on a range a token, uneven levels, outliers exact";
  info.paper =
      "Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, NeurIPS "
      "2024, arXiv 2401.18079";
  info.bibtex = "hooper2024kvquant";
  info.family = "levels";
  info.bits = "bits + (role == v ? 32 / channels : 0)";
  info.caveat =
      "exact outliers come on top: 32 bits each and 32 a token, in all outliers * 32 + 32 / channels bits a value, so "
      "pool all heads (heads: all, the default). The paper weighs k-means by squared gradients (weight: fisher, "
      "refused where a trace has none: vqkv-dump capture --gradients next-token) and runs it from a seed; ours is "
      "exact. Its perplexities code every token, the "
      "query's own "
      "included (a preset's cache rule); its kernels attend to prompts exactly and cap outliers in fixed slots of 64 "
      "bits";
  info.assumed =
      "whether its released datatypes counted errors of the values or of normalized ones is unconfirmed: of the "
      "values, as its formula says (scale_aware: false takes the other reading)";
  const Json cache = {{"sinks", 1}, {"window", 0}, {"flush", 1}};
  const auto preset = [&](int bits) {
    return Json{{"codec", {{"rope", "pre"}, {"heads", "all"}, {"bits", bits}, {"q_norm", bits == 2}}},
                {"cache", cache}};
  };
  info.presets = {{"default", {{"codec", {{"rope", "pre"}, {"heads", "all"}}}, {"cache", cache}}},
                  {"nuq4", preset(4)},
                  {"nuq2", preset(2)}};
  info.presets["default"]["note"] = "nuq3-1%, the first token exact";
  info.presets["nuq4"]["note"] = "nuq4-1%";
  info.presets["nuq2"]["note"] = "nuq2-1% with Q-Norm";
  return info;
}

std::string check_kvquant(const KvquantKnobs& k, const UnitShape& unit) {
  const int channels = unit.channels(), ends = exact_at_each_end(k, channels);
  if (unit.role == Role::kValue && 2 * ends >= channels)
    return "outliers: " + std::to_string(ends) + " exact values at each end leave none of a token's " +
           std::to_string(channels) + " to code";
  if (k.outliers > 0 && channels >= 1 << 15) return "outliers: an exact value names its channel in 15 bits";
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(kvquant, KvquantKnobs, KvquantCodec, describe_kvquant, check_kvquant)

}  // namespace vqkv
