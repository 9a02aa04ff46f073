// Small codecs for seams that few registered methods use or none: exact exceptions, parameters fitted to a prompt,
// decoding at a level, blocks of tokens with sides and fields of their own, and every part of a table plan at once.
// They are tests' means: correct and deterministic, not good.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "codec/codec_set.h"
#include "core/error.h"

namespace vqkv::test {

class DummyCodec : public Codec {
 public:
  explicit DummyCodec(const UnitShape& unit) : unit_(unit) {}
  int channels() const override { return unit_.channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return unit_.rope; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }
  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 protected:
  static uint16_t clamp_code(double v, int top) {
    return static_cast<uint16_t>(std::clamp(std::nearbyint(v), 0.0, double(top)));
  }

  UnitShape unit_;
  CodeLayout layout_;
};

// 3-bit absmax codes a token; the `outliers` largest channels of each token are kept exactly, as replacements or as
// additions to what the codes give. The grid is made without them.
class SparseDummy final : public DummyCodec {
 public:
  SparseDummy(const UnitShape& unit, int outliers, bool add) : DummyCodec(unit), outliers_(outliers), add_(add) {
    layout_.fields = {{"code", 3, channels(), true}};
    layout_.sides = {{"scale", DType::kF16, 1, true}};
    layout_.overlay = true;
  }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* = nullptr) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    for (int64_t t = 0; t < x.rows; ++t) {
      std::vector<int> order(static_cast<size_t>(channels()));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return std::abs(x(t, a)) > std::abs(x(t, b)); });
      const auto kept = static_cast<size_t>(std::min(outliers_, channels()));
      const float most = kept < order.size() ? std::abs(x(t, order[kept])) : 0;
      const float scale = round_scale(DType::kF16, most / 3);
      out.sides[0][static_cast<size_t>(t)] = scale;
      for (int c = 0; c < channels(); ++c)
        out.fields[0][static_cast<size_t>(t * channels() + c)] = clamp_code(x(t, c) / scale + 3, 6);
      std::sort(order.begin(), order.begin() + static_cast<int64_t>(kept));
      for (size_t i = 0; i < kept; ++i) {
        const int c = order[i];
        const float decoded = scale * (static_cast<float>(out.fields[0][static_cast<size_t>(t * channels() + c)]) - 3);
        out.overlay.push_back(
            {static_cast<int32_t>(t), c, round_side(DType::kF16, add_ ? x(t, c) - decoded : x(t, c)), add_});
      }
    }
  }
  DecodePlan plan(const PlanQuery& = {}) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.offset = 3;
    term.scale_side = 0;
    term.group_channels = channels();
    plan.terms = {term};
    return plan;
  }

 private:
  int outliers_;
  bool add_;
};

// Subtracts what it fits to its prompt: the channel means of its own rows or of those of the other role and, where it
// asks for queries, a sum over them in which each counts differently. Without a state it codes plain values.
class PromptDummy final : public DummyCodec {
 public:
  struct State final : SequenceState {
    std::vector<float> mean;
    int64_t bytes() const override { return static_cast<int64_t>(mean.size() * sizeof(float)); }
  };
  explicit PromptDummy(const UnitShape& unit, bool other_role = false, FitNeeds needs = {.tokens = 2})
      : DummyCodec(unit), other_role_(other_role), needs_(needs) {
    layout_.fields = {{"code", 4, channels(), true}};
    layout_.sides = {{"scale", DType::kF16, 1, true}};
  }
  FitNeeds fit_needs() const override { return needs_; }
  std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix v, ConstMatrix q) const override {
    const ConstMatrix x = (unit_.role == Role::kKey) != other_role_ ? k : v;
    VQKV_CHECK(x.rows >= needs_.tokens && x.cols == channels());
    VQKV_CHECK(needs_.queries ? q.rows >= x.rows && q.rows % x.rows == 0 && q.cols == x.cols : q.rows == 0);
    auto state = std::make_unique<State>();
    for (int64_t c = 0; c < x.cols; ++c) {
      double sum = 0, of_queries = 0;
      for (int64_t t = 0; t < x.rows; ++t) sum += x(t, c);
      for (int64_t r = 0; r < q.rows; ++r) of_queries += q(r, c) / static_cast<double>(2 + r);
      state->mean.push_back(static_cast<float>(sum / static_cast<double>(x.rows) + 0.1 * of_queries));
    }
    return state;
  }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state = nullptr) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    const auto* s = static_cast<const State*>(state);
    for (int64_t t = 0; t < x.rows; ++t) {
      float most = 0;
      const auto value = [&](int c) { return s ? x(t, c) - s->mean[static_cast<size_t>(c)] : x(t, c); };
      for (int c = 0; c < channels(); ++c) most = std::max(most, std::abs(value(c)));
      const float scale = round_scale(DType::kF16, most / 7);
      out.sides[0][static_cast<size_t>(t)] = scale;
      for (int c = 0; c < channels(); ++c)
        out.fields[0][static_cast<size_t>(t * channels() + c)] = clamp_code(value(c) / scale + 7, 14);
    }
  }
  DecodePlan plan(const PlanQuery& query = {}) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.offset = 7;
    term.scale_side = 0;
    term.group_channels = channels();
    plan.terms = {term};
    if (query.state) plan.outer_bias = static_cast<const State*>(query.state)->mean;
    return plan;
  }

 private:
  bool other_role_;
  FitNeeds needs_;
};

// Codes what the decoded row of the layer below leaves over, in absmax codes of `bits` bits a token, and says in its
// plan that the row is added.
class LowerDummy final : public DummyCodec {
 public:
  explicit LowerDummy(const UnitShape& unit, int bits = 4) : DummyCodec(unit), top_((1 << bits) - 2) {
    layout_.fields = {{"code", bits, channels(), true}};
    layout_.sides = {{"scale", DType::kF16, 1, true}};
  }
  bool sees_lower() const override { return true; }
  void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override { fail_internal("no layer below"); }
  void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    VQKV_CHECK(at.lower.rows == x.rows && at.lower.cols == x.cols);
    out.resize(layout_, x.rows);
    for (int64_t t = 0; t < x.rows; ++t) {
      float most = 0;
      for (int c = 0; c < channels(); ++c) most = std::max(most, std::abs(x(t, c) - at.lower(t, c)));
      const float half = static_cast<float>(top_) / 2, scale = round_scale(DType::kF16, most / half);
      out.sides[0][static_cast<size_t>(t)] = scale;
      for (int c = 0; c < channels(); ++c)
        out.fields[0][static_cast<size_t>(t * channels() + c)] =
            clamp_code((x(t, c) - at.lower(t, c)) / scale + half, top_);
    }
  }
  DecodePlan plan(const PlanQuery& = {}) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.offset = static_cast<float>(top_) / 2;
    term.scale_side = 0;
    term.group_channels = channels();
    plan.terms = {term};
    plan.adds_lower = true;
    return plan;
  }

 private:
  int top_;
};

// The row as it is, moved by 1/8 a position (modulo 64): what decodes to the right rows was given the right positions.
// They are kept beside it.
class PositionDummy final : public DummyCodec {
 public:
  explicit PositionDummy(const UnitShape& unit, int block_tokens = 1) : DummyCodec(unit) {
    layout_.block_tokens = block_tokens;
    layout_.sides = {{"row", DType::kF32, channels(), true}, {"position", DType::kF32, 1, true}};
  }
  static float moved(float x, int64_t position) { return x + static_cast<float>(position % 64) / 8; }
  void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override { fail_internal("no positions"); }
  void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    VQKV_CHECK(static_cast<int64_t>(at.positions.size()) == x.rows && at.lower.rows == 0);
    out.resize(layout_, x.rows / layout_.block_tokens);
    for (int64_t t = 0; t < x.rows; ++t) {
      const int32_t position = at.positions[static_cast<size_t>(t)];
      out.sides[1][static_cast<size_t>(t)] = static_cast<float>(position);
      for (int c = 0; c < channels(); ++c)
        out.sides[0][static_cast<size_t>(t * channels() + c)] = moved(x(t, c), position);
    }
  }
  DecodePlan plan(const PlanQuery& = {}) const override { return dense_plan(); }
};

// Folds the model's RoPE into its codes: a row on this side of RoPE becomes the row whose rotation lies on a grid of
// step 1/16, by the frequencies and the factor of its unit.
class FoldingDummy final : public DummyCodec {
 public:
  static constexpr float kStep = 1.0f / 16;
  explicit FoldingDummy(const UnitShape& unit) : DummyCodec(unit), table_(unit.rope_facts) {
    layout_.sides = {{"row", DType::kF32, channels(), true}};
  }
  void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override { fail_internal("no positions"); }
  void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    const MutMatrix rows(out.sides[0].data(), x.rows, x.cols);
    for (int64_t t = 0; t < x.rows; ++t) std::copy_n(x.row(t), x.cols, rows.row(t));
    const bool turns = unit_.rope == RopePlacement::kPre;
    if (turns) rope_apply(table_, at.positions.data(), rows);
    for (float& v : out.sides[0]) v = std::nearbyint(v / kStep) * kStep;
    if (turns) rope_apply(table_, at.positions.data(), rows, true);
  }
  DecodePlan plan(const PlanQuery& = {}) const override { return dense_plan(); }

 private:
  RopeTable table_;
};

// 8-bit codes as an upper and a lower nibble (QuantSpec's shape): level 0 reads the upper one, level 1 (and -1) both.
class NibbleDummy final : public DummyCodec {
 public:
  explicit NibbleDummy(const UnitShape& unit) : DummyCodec(unit) {
    layout_.fields = {{"upper", 4, channels(), true}, {"lower", 4, channels(), true}};
    layout_.sides = {{"scale", DType::kF16, 1, true}};
  }
  int levels() const override { return 2; }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* = nullptr) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    for (int64_t t = 0; t < x.rows; ++t) {
      float most = 0;
      for (int c = 0; c < channels(); ++c) most = std::max(most, std::abs(x(t, c)));
      const float scale = round_scale(DType::kF16, most / 127);
      out.sides[0][static_cast<size_t>(t)] = scale;
      for (int c = 0; c < channels(); ++c) {
        const uint16_t code = clamp_code(x(t, c) / scale + 128, 255);
        out.fields[0][static_cast<size_t>(t * channels() + c)] = static_cast<uint16_t>(code >> 4);
        out.fields[1][static_cast<size_t>(t * channels() + c)] = static_cast<uint16_t>(code & 15);
      }
    }
  }
  DecodePlan plan(const PlanQuery& query = {}) const override {
    DecodePlan plan = empty_plan();
    const bool draft = query.level == 0;
    LevelsTerm upper;
    for (int u = 0; u < 16; ++u) upper.levels.push_back(static_cast<float>(16 * u - 128) + (draft ? 7.5f : 0.0f));
    upper.scale_side = 0;
    upper.group_channels = channels();
    plan.terms = {upper};
    if (!draft) {
      LevelsTerm lower;
      lower.field = 1;
      lower.scale_side = 0;
      lower.group_channels = channels();
      plan.terms.emplace_back(lower);
    }
    return plan;
  }
};

// Blocks of `tokens` tokens: scale and zero a block, run of `run` tokens and pair of channels; a per-block field that
// decoding does not need (the number of runs whose range is empty).
class BlockDummy final : public DummyCodec {
 public:
  BlockDummy(const UnitShape& unit, int tokens, int run, int bits) : DummyCodec(unit), run_(run), bits_(bits) {
    VQKV_CHECK(tokens % run == 0 && channels() % 2 == 0);
    layout_.block_tokens = tokens;
    layout_.fields = {{"code", bits, channels(), true}, {"empty_runs", 5, 1, false}};
    const int slots = channels() / 2 * (tokens / run);
    layout_.sides = {{"scale", DType::kF16, slots, false}, {"zero", DType::kF32, slots, false}};
  }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* = nullptr) const override {
    check_encode_input(*this, x);
    const int tokens = layout_.block_tokens, pairs = channels() / 2, slots = layout_.sides[0].slots;
    out.resize(layout_, x.rows / tokens);
    for (int64_t b = 0; b < out.blocks; ++b) {
      int empty = 0;
      for (int r = 0; r < tokens / run_; ++r)
        for (int p = 0; p < pairs; ++p) {
          const ConstMatrix part = x.slice_rows(b * tokens + r * run_, run_).slice_cols(2 * p, 2);
          float low = part(0, 0), high = low;
          for (int t = 0; t < run_; ++t)
            for (int c = 0; c < 2; ++c) {
              low = std::min(low, part(t, c));
              high = std::max(high, part(t, c));
            }
          empty += low == high;
          const int top = (1 << bits_) - 1;
          const float scale = round_scale(DType::kF16, (high - low) / static_cast<float>(top));
          const auto at = static_cast<size_t>(b * slots + r * pairs + p);
          out.sides[0][at] = scale;
          out.sides[1][at] = low;
          for (int t = 0; t < run_; ++t)
            for (int c = 0; c < 2; ++c)
              out.fields[0][static_cast<size_t>((b * tokens + r * run_ + t) * channels() + 2 * p + c)] =
                  clamp_code((part(t, c) - low) / scale, top);
        }
      out.fields[1][static_cast<size_t>(b)] = static_cast<uint16_t>(std::min(empty, 31));
    }
  }
  DecodePlan plan(const PlanQuery& = {}) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.scale_side = 0;
    term.zero_side = 1;
    term.group_channels = 2;
    term.group_tokens = run_;
    plan.terms = {term};
    return plan;
  }

 private:
  int run_, bits_;
};

// Residual stages of a product code with random codewords of float16, in a coded domain behind a dense map, with both
// biases and token scales; the last stage's codeword acts through rotate90 where asked. Level s: the first s + 1
// stages.
class TableDummy final : public DummyCodec {
 public:
  struct Options {
    int stages = 2;
    int width = 4;  // channels of a codeword; divides the unit
    int bits = 6;
    int scale_slots = 1;  // token scales of the unit; 0: none
    bool map = true;
    bool bias = true;
    bool rotate_last = false;
    uint64_t seed = 5;
  };
  TableDummy(const UnitShape& unit, Options options) : DummyCodec(unit), o_(options) {
    const int groups = channels() / o_.width;
    VQKV_CHECK(channels() % o_.width == 0);
    layout_.fields = {{"code", o_.bits, groups * o_.stages, true}};
    if (o_.scale_slots > 0) layout_.sides = {{"token_scale", DType::kF16, o_.scale_slots, true}};
    Rng rng(o_.seed);
    const size_t n = static_cast<size_t>(channels());
    auto words = std::make_shared<AlignedVector<float>>();
    for (int s = 0; s < o_.stages; ++s)
      for (int64_t i = 0; i < (int64_t{1} << o_.bits) * o_.width; ++i)
        words->push_back(round_to_f16(static_cast<float>(rng.normal() * std::pow(0.5, s))));
    words_ = words;
    if (o_.map) {  // rotations of neighbouring channels: orthonormal, dense enough
      DenseMap map{channels(), channels(), std::vector<float>(n * n)};
      for (size_t i = 0; i + 1 < n; i += 2) {
        const double a = rng.uniform() * 6.28;
        map.values[i * n + i] = map.values[(i + 1) * n + i + 1] = static_cast<float>(std::cos(a));
        map.values[i * n + i + 1] = static_cast<float>(std::sin(a));
        map.values[(i + 1) * n + i] = static_cast<float>(-std::sin(a));
      }
      if (n % 2) map.values[n * n - 1] = 1;
      map_ = std::move(map);
    }
    if (!o_.bias) return;
    for (size_t i = 0; i < n; ++i) {
      if (o_.scale_slots > 0) inner_.push_back(static_cast<float>(0.1 * rng.normal()));
      outer_.push_back(static_cast<float>(0.2 * rng.normal()));
    }
  }
  int levels() const override { return o_.stages; }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* = nullptr) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    const int n = channels(), groups = n / o_.width;
    std::vector<double> z(static_cast<size_t>(n)), y(static_cast<size_t>(n));
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int c = 0; c < n; ++c)
        z[static_cast<size_t>(c)] = double{x(t, c)} - (outer_.empty() ? 0.0f : outer_[static_cast<size_t>(c)]);
      for (int g = 0; g < o_.scale_slots; ++g) {
        const int width = n / o_.scale_slots;
        double sum = 0;
        for (int c = g * width; c < (g + 1) * width; ++c) sum += z[static_cast<size_t>(c)] * z[static_cast<size_t>(c)];
        const float s = round_scale(DType::kF16, static_cast<float>(std::sqrt(sum / width)));
        out.sides[0][static_cast<size_t>(t * o_.scale_slots + g)] = s;
        for (int c = g * width; c < (g + 1) * width; ++c) z[static_cast<size_t>(c)] /= s;
      }
      for (int c = 0; c < n; ++c) z[static_cast<size_t>(c)] -= inner_.empty() ? 0.0f : inner_[static_cast<size_t>(c)];
      for (int i = 0; i < n; ++i) {  // the map is orthonormal: its transpose undoes it
        const auto* map = std::get_if<DenseMap>(&map_);
        double sum = map ? 0 : z[static_cast<size_t>(i)];
        for (int c = 0; c < n && map; ++c)
          sum += map->values[static_cast<size_t>(i * n + c)] * z[static_cast<size_t>(c)];
        y[static_cast<size_t>(i)] = sum;
      }
      for (int s = 0; s < o_.stages; ++s)
        for (int g = 0; g < groups; ++g)
          out.fields[0][static_cast<size_t>(t * groups * o_.stages + s * groups + g)] =
              nearest(s, y.data() + g * o_.width);
    }
  }
  DecodePlan plan(const PlanQuery& query = {}) const override {
    DecodePlan plan = empty_plan();
    const int groups = channels() / o_.width;
    const int stages = query.level < 0 ? o_.stages : std::min(query.level + 1, o_.stages);
    for (const bool rotated : {false, true}) {
      const int first = rotated ? o_.stages - 1 : 0;
      const int last = rotated ? stages : std::min(stages, o_.rotate_last ? o_.stages - 1 : o_.stages);
      if ((rotated && !o_.rotate_last) || first >= last) continue;
      TableTerm term;
      term.first_slot = first * groups;
      term.slots = (last - first) * groups;
      term.entries = 1 << o_.bits;
      term.width = o_.width;
      term.books = o_.stages;
      term.codewords = words_;
      term.op = rotated ? TableTerm::Op::kRotate90 : TableTerm::Op::kIdentity;
      term.disjoint = last - first == 1;
      for (int s = first; s < last; ++s)
        for (int g = 0; g < groups; ++g) {
          term.book_of_slot.push_back(s);
          for (int i = 0; i < o_.width; ++i) term.channel.push_back(g * o_.width + i);
        }
      plan.terms.emplace_back(term);
    }
    plan.map = map_;
    plan.inner_bias = inner_;
    plan.outer_bias = outer_;
    if (o_.scale_slots > 0) plan.token_scale_side = 0;
    return plan;
  }

 private:
  double part(int stage, int code, int i) const {
    const float* word = words_->data() + ((int64_t{stage} << o_.bits) + code) * o_.width;
    if (!(o_.rotate_last && stage == o_.stages - 1)) return word[i];
    const int half = o_.width / 2;
    return i < half ? -word[i + half] : word[i - half];
  }
  // The nearest codeword of a stage, lowest index first; subtracts it from v.
  uint16_t nearest(int stage, double* v) const {
    int best = 0;
    double best_distance = 0;
    for (int code = 0; code < 1 << o_.bits; ++code) {
      double distance = 0;
      for (int i = 0; i < o_.width; ++i) distance += (v[i] - part(stage, code, i)) * (v[i] - part(stage, code, i));
      if (code == 0 || distance < best_distance) {
        best = code;
        best_distance = distance;
      }
    }
    for (int i = 0; i < o_.width; ++i) v[i] -= part(stage, best, i);
    return static_cast<uint16_t>(best);
  }

  Options o_;
  std::shared_ptr<const AlignedVector<float>> words_;
  LinearMap map_;
  std::vector<float> inner_, outer_;
};

// A set with one codec of `make` for every unit of `heads` heads.
inline std::shared_ptr<const CodecSet> dummy_codec_set(
    const CacheShape& shape, RopePlacement key_rope, int heads,
    const std::function<std::unique_ptr<Codec>(const UnitShape&)>& make) {
  std::vector<TrainedUnit> units;
  for (int layer = 0; layer < shape.layers; ++layer)
    for (const Role role : {Role::kKey, Role::kValue})
      for (int first = 0; first < shape.kv_heads; first += heads) {
        TrainedUnit unit;
        unit.spec.unit.role = role;
        unit.spec.unit.head_dim = shape.head_dim;
        unit.spec.unit.heads = heads;
        unit.spec.unit.layer = layer;
        unit.spec.unit.first_head = first;
        unit.spec.unit.rope = role == Role::kKey ? key_rope : RopePlacement::kPost;
        unit.spec.unit.rope_facts = shape.rope;
        unit.spec.method = "dummy";
        unit.codec = make(unit.spec.unit);
        units.push_back(std::move(unit));
      }
  return std::make_shared<CodecSet>(shape, Json::object(), std::move(units), "");
}

}  // namespace vqkv::test
