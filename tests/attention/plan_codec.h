// A codec made of any DecodePlan: its codes are a hash of the row, so that backends can be compared on every shape of
// plan without training anything. What it stores has nothing to do with its input but is a pure function of it.
#pragma once
#include <cmath>
#include <cstring>
#include <functional>

#include "attention/session_cpu.h"
#include "codec/codec_set.h"
#include "core/rng.h"
#include "support/cache_shape.h"

namespace vqkv::test {

inline Matrix<float> random_matrix(int64_t rows, int64_t cols, uint64_t key, double scale = 1.0) {
  Rng rng(key);
  Matrix<float> m(rows, cols);
  for (float& v : m.storage) v = static_cast<float>(scale * rng.normal());
  return m;
}

class PlanCodec final : public Codec {
 public:
  explicit PlanCodec(DecodePlan plan, int overlay_every = 0) : plan_(std::move(plan)), overlay_every_(overlay_every) {
    plan_.layout.overlay = overlay_every > 0;
    check_plan(plan_);
  }
  int channels() const override { return plan_.channels; }
  const CodeLayout& layout() const override { return plan_.layout; }
  RopePlacement rope() const override { return plan_.rope; }
  QueryForm query_form() const override { return plan_.query; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }
  DecodePlan plan(const PlanQuery&) const override { return plan_; }
  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    const CodeLayout& l = plan_.layout;
    out.resize(l, x.rows / l.block_tokens);
    for (int64_t b = 0; b < out.blocks; ++b) {
      // One stream a block, keyed by its content: independent of neighbours.
      uint64_t key = 1469598103934665603ull;
      for (int64_t t = b * l.block_tokens; t < (b + 1) * l.block_tokens; ++t)
        for (int64_t c = 0; c < x.cols; ++c) {
          uint32_t bits;
          std::memcpy(&bits, &x.row(t)[c], 4);
          key = (key ^ bits) * 1099511628211ull;
        }
      Rng rng(key);
      for (size_t f = 0; f < l.fields.size(); ++f) {
        const int64_t n = int64_t{l.fields[f].slots} * (l.fields[f].per_token ? l.block_tokens : 1);
        for (int64_t i = 0; i < n; ++i)
          out.fields[f][static_cast<size_t>(b * n + i)] =
              static_cast<uint16_t>(rng.below(entries(static_cast<int>(f))));
      }
      for (size_t s = 0; s < l.sides.size(); ++s) {
        const int64_t n = int64_t{l.sides[s].slots} * (l.sides[s].per_token ? l.block_tokens : 1);
        for (int64_t i = 0; i < n; ++i) {
          float v = static_cast<float>(0.5 + rng.uniform());
          round_to(l.sides[s].type, &v, 1);
          out.sides[s][static_cast<size_t>(b * n + i)] = v;
        }
      }
      if (overlay_every_ > 0)
        for (int64_t t = b * l.block_tokens; t < (b + 1) * l.block_tokens; ++t)
          if (rng.below(static_cast<uint64_t>(overlay_every_)) == 0)
            out.overlay.push_back({static_cast<int32_t>(t),
                                   static_cast<int32_t>(rng.below(static_cast<uint64_t>(x.cols))),
                                   round_to_f16(static_cast<float>(3 * rng.normal())), rng.below(2) == 0});
    }
  }

 private:
  uint64_t entries(int field) const {
    uint64_t n = uint64_t{1} << plan_.layout.fields[static_cast<size_t>(field)].bits;
    for (const PlanTerm& t : plan_.terms) {
      if (const auto* table = std::get_if<TableTerm>(&t); table && table->field == field)
        n = std::min<uint64_t>(n, static_cast<uint64_t>(table->entries));
      if (const auto* levels = std::get_if<LevelsTerm>(&t); levels && levels->field == field && !levels->levels.empty())
        n = std::min<uint64_t>(n, levels->levels.size());
      if (const auto* signs = std::get_if<SignTerm>(&t); signs && signs->outlier_field == field)
        n = std::min<uint64_t>(n, static_cast<uint64_t>(signs->width));
    }
    return n;
  }
  DecodePlan plan_;
  int overlay_every_;
};

inline std::shared_ptr<const AlignedVector<float>> random_book(int64_t n, uint64_t key, double scale = 1.0) {
  Rng rng(key);
  auto book = std::make_shared<AlignedVector<float>>(static_cast<size_t>(n));
  for (float& v : *book) v = round_to_f16(static_cast<float>(scale * rng.normal()));
  return book;
}

// Adds a product code: `slots` codewords of consecutive (or strided) channels; stages > 1 repeat it (residual).
inline void add_table(DecodePlan& plan, int bits, int width, int stages = 1, bool strided = false,
                      bool shared_book = false, int entries = 0, uint64_t key = 77) {
  const int per_stage = plan.code_channels / width, slots = per_stage * stages;
  plan.layout.fields.push_back({"code" + std::to_string(plan.layout.fields.size()), bits, slots, true});
  TableTerm t;
  t.field = static_cast<int>(plan.layout.fields.size()) - 1;
  t.slots = slots;
  t.entries = entries ? entries : 1 << bits;
  t.width = width;
  t.books = shared_book ? stages : slots;
  t.codewords = random_book(int64_t{t.books} * t.entries * width, key, 1.0 / stages);
  for (int s = 0; s < slots; ++s) {
    t.book_of_slot.push_back(shared_book ? s / per_stage : s);
    for (int i = 0; i < width; ++i)
      t.channel.push_back(strided ? i * per_stage + s % per_stage : s % per_stage * width + i);
  }
  t.disjoint = stages == 1;
  plan.terms.push_back(t);
}

// Adds keys before RoPE of complex codewords, Z_a + i Z_b a stage, over groups of `width` channels in whole pairs of
// heads, as CommVQ has them.
inline void add_pairs(DecodePlan& plan, int head_dim, int bits, int width, int stages, bool on_step = true,
                      uint64_t key = 79) {
  const int groups = plan.channels / width, slots = groups * stages;
  plan.rope = RopePlacement::kPre;
  TableTerm t;
  t.slots = t.books = slots;
  t.entries = 1 << bits;
  t.width = width;
  auto book = std::make_shared<AlignedVector<float>>(
      *random_book(int64_t{slots} * t.entries * width, key, 1.0 / std::sqrt(2.0 * stages)));
  if (on_step)  // of 1/256: sums of whole numbers
    for (float& v : *book) v = std::nearbyint(256 * v) / 256;
  t.codewords = book;
  for (int s = 0; s < slots; ++s) {
    t.book_of_slot.push_back(s);
    for (int i = 0; i < width; ++i) {
      const int pair = s % groups * (width / 2) + i % (width / 2), half = head_dim / 2;
      t.channel.push_back(pair / half * head_dim + pair % half + (i < width / 2 ? 0 : half));
    }
  }
  for (const TableTerm::Op op : {TableTerm::Op::kIdentity, TableTerm::Op::kRotate90}) {
    t.field = static_cast<int>(plan.layout.fields.size());
    t.op = op;
    plan.layout.fields.push_back({"code" + std::to_string(t.field), bits, slots, true});
    plan.terms.emplace_back(t);
  }
}

inline void add_levels(DecodePlan& plan, int bits, int group_channels, int group_tokens, bool per_token,
                       bool table = false) {
  plan.layout.fields.push_back({"level", bits, plan.code_channels, true});
  LevelsTerm t;
  t.field = static_cast<int>(plan.layout.fields.size()) - 1;
  t.offset = table ? 0.0f : static_cast<float>(1 << (bits - 1));
  if (table)
    for (int i = 0; i < (1 << bits); ++i) t.levels.push_back(static_cast<float>(std::sin(1.3 * i)));
  t.group_channels = group_channels;
  t.group_tokens = group_tokens;
  const int groups = plan.code_channels / group_channels * (per_token ? 1 : plan.layout.block_tokens / group_tokens);
  t.scale_side = static_cast<int>(plan.layout.sides.size());
  plan.layout.sides.push_back({"scale", DType::kF16, groups, per_token});
  t.zero_side = static_cast<int>(plan.layout.sides.size());
  plan.layout.sides.push_back({"zero", DType::kF16, groups, per_token});
  plan.terms.push_back(t);
}

// Signs of `rows` projections of every run of `width` channels, with a scale of their own; with outliers, those of half
// the rows for that many channels of a run and block.
inline void add_signs(DecodePlan& plan, int rows, int width, int outliers = 0, bool scaled = true) {
  const int runs = plan.code_channels / width;
  const auto add = [&](int n, int outlier_field, SignTerm::Reach reach) {
    SignTerm t;
    t.rows = n;
    t.width = width;
    t.projection = random_book(int64_t{rows} * width, 78);
    t.factor = 1.0f / std::sqrt(static_cast<float>(n));
    t.field = static_cast<int>(plan.layout.fields.size());
    plan.layout.fields.push_back({"sign" + std::to_string(t.field), 8, runs * t.slots(), true});
    if (scaled) {
      t.scale_side = static_cast<int>(plan.layout.sides.size());
      plan.layout.sides.push_back({"scale" + std::to_string(t.scale_side), DType::kF16, runs, true});
    }
    t.outlier_field = outlier_field;
    t.reach = reach;
    plan.terms.push_back(t);
  };
  if (outliers == 0) return add(rows, -1, SignTerm::Reach::kAll);
  const int field = static_cast<int>(plan.layout.fields.size());
  plan.layout.fields.push_back({"outlier", 8, runs * outliers, false});
  add(rows, field, SignTerm::Reach::kOthers);
  add(rows / 2, field, SignTerm::Reach::kOutliers);
}

inline void add_dense(DecodePlan& plan, std::vector<int32_t> channels, DType type = DType::kF16) {
  DenseTerm t;
  t.side = static_cast<int>(plan.layout.sides.size());
  plan.layout.sides.push_back({"dense", type, static_cast<int>(channels.size()), true});
  t.channel = std::move(channels);
  plan.terms.push_back(t);
}

inline void add_map(DecodePlan& plan, uint64_t key) {
  const Matrix<float> m = random_matrix(plan.code_channels, plan.channels, key, 1.0 / std::sqrt(plan.code_channels));
  plan.map = DenseMap{plan.code_channels, plan.channels, {m.storage.begin(), m.storage.end()}};
}

// Channel j of the unit takes code j * 7 modulo their number, in its own share of them a head; every fifth takes none.
inline void add_gather(DecodePlan& plan) {
  GatherMap map{plan.code_channels, {}, {}};
  for (int j = 0; j < plan.channels; ++j) map.from.push_back(j % 5 == 3 ? -1 : j * 7 % plan.code_channels);
  plan.map = map;
}

inline std::vector<float> random_bias(int n, uint64_t key) {
  const Matrix<float> m = random_matrix(1, n, key, 0.5);
  return {m.storage.begin(), m.storage.end()};
}

inline void add_token_scale(DecodePlan& plan, int slots) {
  plan.token_scale_side = static_cast<int>(plan.layout.sides.size());
  plan.layout.sides.push_back({"norm", DType::kF16, slots, true});
}

inline DecodePlan empty_plan(int channels, int block_tokens = 1, int code_channels = 0) {
  DecodePlan p;
  p.channels = channels;
  p.code_channels = code_channels ? code_channels : channels;
  p.layout.block_tokens = block_tokens;
  return p;
}

// One codec for every layer and unit of `heads` heads, by role.
using MakeCodec = std::function<std::shared_ptr<const Codec>(Role, int channels)>;
inline std::shared_ptr<const CodecSet> make_set(const CacheShape& shape, int heads, const MakeCodec& make) {
  std::vector<TrainedUnit> units;
  for (int layer = 0; layer < shape.layers; ++layer)
    for (const Role role : {Role::kKey, Role::kValue})
      for (int first = 0; first < shape.kv_heads; first += heads) {
        TrainedUnit u;
        u.spec.method = "plan";
        u.spec.unit = {role, shape.head_dim, heads, layer, first, RopePlacement::kPost, shape.rope};
        u.codec = make(role, heads * shape.head_dim);
        u.spec.unit.rope = u.codec->rope();
        units.push_back(std::move(u));
      }
  return std::make_shared<CodecSet>(shape, Json::object(), std::move(units), "");
}

// Random K, V, Q with a few planted outlier channels and loud first tokens, as real models have them.
struct Tokens {
  Matrix<float> q, k, v;
  Tokens(const CacheShape& s, int64_t n, uint64_t key, bool hard = false)
      : q(random_matrix(n, s.q_heads * s.head_dim, key)),
        k(random_matrix(n, s.kv_heads * s.head_dim, key + 1)),
        v(random_matrix(n, s.kv_heads * s.head_dim, key + 2)) {
    if (!hard) return;
    for (int64_t t = 0; t < n; ++t)
      for (int h = 0; h < s.kv_heads; ++h) {
        k(t, h * s.head_dim + 3) += 30.0f;
        k(t, h * s.head_dim + s.head_dim / 2 + 5) -= 20.0f;
        if (t < 2)
          for (int c = 0; c < s.head_dim; ++c) k(t, h * s.head_dim + c) *= 8.0f;
      }
  }
};

struct Replay {
  Matrix<float> out;  // (n, q_heads * d) of the last layer
  AttendStats stats;
  double coded_share() const { return stats.coded_mass / stats.total_mass; }
};

// Runs n tokens through every layer (the same rows in each) in blocks; checks the ledger against the resource each
// time.
template <class Check>
Replay replay(std::shared_ptr<const CodecSet> set, const CachePolicy& policy, AttentionBackend& backend,
              const Tokens& x, int64_t block, Visibility visibility, Check&& check) {
  CountingResource memory;
  Replay r;
  const CacheShape shape = set->shape();
  r.out = Matrix<float>(x.q.rows, x.q.cols);
  CompressedCache cache(set, policy, &memory);
  KvSessionCpu session(cache, backend);
  for (int64_t t = 0; t < x.q.rows; t += block) {
    const int64_t m = std::min(block, x.q.rows - t);
    session.begin_block(m, visibility);
    for (int layer = 0; layer < shape.layers; ++layer)
      session.attend(layer, x.q.view().slice_rows(t, m), x.k.view().slice_rows(t, m), x.v.view().slice_rows(t, m),
                     MutMatrix(r.out).slice_rows(t, m));
    session.end_block();
    check(cache, memory);
  }
  r.stats = session.stats();
  return r;
}
inline Replay replay(std::shared_ptr<const CodecSet> set, const CachePolicy& policy, AttentionBackend& backend,
                     const Tokens& x, int64_t block, Visibility visibility = Visibility::kReplay) {
  return replay(std::move(set), policy, backend, x, block, visibility,
                [](const CompressedCache&, const CountingResource&) {});
}

inline CachePolicy policy_of(int64_t sinks, FlushRule k, FlushRule v) {
  CachePolicy p;
  p.sinks = sinks;
  p.k = k;
  p.v = v;
  return p;
}

inline double worst_difference(const Matrix<float>& a, const Matrix<float>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.storage.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(a.storage[i]) - b.storage[i]));
  return worst;
}

}  // namespace vqkv::test
