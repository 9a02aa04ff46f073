// Several sequences in one call of a model, and sessions of other kinds than the processor's.
#include "attention/plan_codec.h"
#include "attention/sequence.h"
#include "cache/model.h"
#include "golden/logits.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::vector<int32_t> some_tokens(int64_t n, uint64_t seed, int vocab) {
  Rng rng(seed);
  std::vector<int32_t> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))));
  return out;
}

// Exact caches and codes of two kinds, under unlike policies and on unlike paths.
std::vector<Sequence> unlike_sequences(const CacheShape& shape) {
  const auto set = [&](const auto& add) {
    return std::make_shared<const CacheModel>(make_set(shape, 1, [&](Role, int channels) {
      DecodePlan p = empty_plan(channels);
      add(p);
      return std::make_shared<PlanCodec>(p);
    }));
  };
  const auto tables = set([](DecodePlan& p) { add_table(p, 4, 4); });
  const auto levels = set([&](DecodePlan& p) { add_levels(p, 2, shape.head_dim, 1, true); });
  std::vector<Sequence> out;
  out.emplace_back(shape, CachePolicy::exact(DType::kF32), "cpu-reconstruct");
  out.emplace_back(tables, CachePolicy{.sinks = 4, .k = {16, 16}, .v = {16, 16}}, "cpu-table");
  out.emplace_back(levels, CachePolicy{.sinks = 0, .k = {1, 1}, .v = {1, 1}}, "cpu-reconstruct");
  out.emplace_back(tables, CachePolicy{.sinks = 1, .k = {8, 4}, .v = {9, 1}}, "auto");
  return out;
}

constexpr int64_t kLengths[] = {3, 40, 17, 64};  // of the prompts
constexpr int64_t kSteps = 24;

// A session of another kind: attention in double over everything, on what an exact cache would hold.
class NaiveSession final : public KvSession {
 public:
  NaiveSession(const CacheShape& shape, std::string device)
      : cache_(shape, CachePolicy::exact(DType::kF32)), rope_(shape.rope), device_(std::move(device)) {
    keys_.resize(static_cast<size_t>(shape.layers));
    values_.resize(keys_.size());
  }
  std::string device() const override { return device_; }
  const CompressedCache& cache() const override { return cache_; }
  using KvSession::begin_block;
  void begin_block(int64_t n, Visibility visibility) override { cache_.begin_block(n, visibility); }
  void attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) override {
    cache_.append(layer, k, v);
    const CacheShape& shape = cache_.shape();
    const int64_t d = shape.head_dim, first = cache_.length();
    auto& keys = keys_[static_cast<size_t>(layer)];
    auto& values = values_[static_cast<size_t>(layer)];
    std::vector<std::vector<float>> queries;
    for (int64_t i = 0; i < q.rows; ++i) {
      keys.push_back(rotated(k.row(i), k.cols, first + i));
      values.emplace_back(v.row(i), v.row(i) + v.cols);
      queries.push_back(rotated(q.row(i), q.cols, first + i));
    }
    for (int64_t i = 0; i < q.rows; ++i)
      for (int h = 0; h < shape.q_heads; ++h) {
        const int64_t kv = h / shape.group() * d;
        std::vector<double> p;
        double sum = 0;
        for (int64_t t = 0; t <= first + i; ++t) {
          double dot = 0;
          for (int64_t c = 0; c < d; ++c)
            dot += static_cast<double>(queries[static_cast<size_t>(i)][static_cast<size_t>(h * d + c)]) *
                   keys[static_cast<size_t>(t)][static_cast<size_t>(kv + c)];
          p.push_back(std::exp(dot * shape.score_scale));
          sum += p.back();
        }
        for (int64_t c = 0; c < d; ++c) {
          double x = 0;
          for (size_t t = 0; t < p.size(); ++t) x += p[t] / sum * values[t][static_cast<size_t>(kv + c)];
          out(i, h * d + c) = static_cast<float>(x);
        }
      }
  }
  void end_block() override { cache_.end_block(); }
  void expect_prompt(int64_t tokens) override { cache_.expect_prompt(tokens); }
  void end_exact_prefill() override { cache_.end_exact_prefill(); }
  const AttendStats& stats() const override { return stats_; }
  double attend_seconds() const override { return 0; }
  void set_tap(AttentionTap*) override {}
  int64_t held_bytes() const override {
    int64_t bytes = 0;
    for (const auto* layers : {&keys_, &values_})
      for (const auto& rows : *layers)
        for (const auto& row : rows) bytes += static_cast<int64_t>(row.size() * sizeof(float));
    return bytes;
  }

 private:
  std::vector<float> rotated(const float* row, int64_t cols, int64_t position) const {
    std::vector<float> out(row, row + cols);
    const auto at = static_cast<int32_t>(position);
    rope_apply(rope_, &at, MutMatrix(out.data(), 1, cols));
    return out;
  }
  CompressedCache cache_;
  RopeTable rope_;
  std::string device_;
  AttendStats stats_;
  std::vector<std::vector<std::vector<float>>> keys_, values_;  // by layer and token
};

}  // namespace

TEST_CASE("a batch of sequences of unlike lengths and codecs gives, bit for bit, what each gives alone", "[batch]") {
  for (const auto& [name, weights] :
       {std::pair{"llama", DType::kF32}, {"qwen2", DType::kF32}, {"qwen3", DType::kF32}, {"mistral", DType::kBF16}}) {
    CAPTURE(name);
    const auto model = load_model(kTiny + name, {.weights = weights});
    const int vocab = model->facts().vocab;
    std::vector<Sequence> together = unlike_sequences(model->facts().cache_shape()),
                          alone = unlike_sequences(model->facts().cache_shape());
    std::vector<std::vector<int32_t>> tokens;
    int64_t prompts = 0;
    for (size_t s = 0; s < together.size(); ++s) {
      tokens.push_back(some_tokens(kLengths[s] + kSteps, s + 1, vocab));
      prompts += kLengths[s];
    }
    const auto batch = [&](int64_t begin_step, int64_t n) {  // step -1: the prompts
      std::vector<SequenceBlock> out;
      for (size_t s = 0; s < together.size(); ++s)
        out.push_back({.tokens = begin_step < 0
                                     ? std::span(tokens[s]).first(static_cast<size_t>(kLengths[s]))
                                     : std::span(tokens[s]).subspan(static_cast<size_t>(kLengths[s] + begin_step),
                                                                    static_cast<size_t>(n)),
                       .kv = &together[s].session()});
      return out;
    };
    const auto check = [&](const std::vector<SequenceBlock>& blocks, LogitRows rows, const Matrix<float>& got) {
      int64_t at = 0;
      for (size_t s = 0; s < blocks.size(); ++s) {
        const int64_t n = rows == LogitRows::kLast ? 1 : static_cast<int64_t>(blocks[s].tokens.size());
        Matrix<float> want(n, vocab);
        model->forward(blocks[s].tokens, alone[s].session(), rows, want);
        CAPTURE(s, at);
        CHECK(std::equal(want.storage.begin(), want.storage.end(), got.row(at)));
        at += n;
      }
      CHECK(at == got.rows);
    };
    Matrix<float> all(prompts, vocab), last(4, vocab);
    model->forward_batch(batch(-1, 0), LogitRows::kAll, all);
    check(batch(-1, 0), LogitRows::kAll, all);
    for (int64_t step = 0; step < kSteps; ++step) {
      const int64_t n = step == 0 ? 4 : 1;  // blocks of several tokens, then single steps
      const auto blocks = batch(step, n);
      model->forward_batch(blocks, LogitRows::kLast, last);
      check(blocks, LogitRows::kLast, last);
      step += n - 1;
    }
    for (size_t s = 0; s < together.size(); ++s) {
      CHECK(together[s].cache().length() == kLengths[s] + kSteps);
      CHECK(together[s].memory().live() == alone[s].memory().live());
      CHECK(together[s].path() == alone[s].path());
      together[s].check_ledger(name);
    }
    CHECK(together[1].coded_share() > 0);
  }
}

TEST_CASE("what a batch can't be is refused, and nothing has begun", "[batch]") {
  const auto model = load_model(kTiny + "llama");
  const int vocab = model->facts().vocab;
  Sequence a(model->facts().cache_shape(), CachePolicy::exact(), "cpu-reconstruct"),
      b(model->facts().cache_shape(), CachePolicy::exact(), "cpu-reconstruct");
  const std::vector<int32_t> good{1, 2}, bad{1, vocab};
  Matrix<float> logits(2, vocab);
  const std::vector<SequenceBlock> twice{{good, &a.session()}, {good, &a.session()}},
      beyond{{good, &a.session()}, {bad, &b.session()}}, empty{{good, &a.session()}, {{}, &b.session()}};
  for (const auto& batch : {twice, beyond, empty})
    CHECK_THROWS_AS(model->forward_batch(batch, LogitRows::kLast, logits), Error);
  // A policy decides within the block: forward() cuts it, a batch is as it is.
  const Json cache = {{"policy", {{"name", "h2o"}, {"interval", 1}}}};
  Sequence decides(std::make_shared<const CacheModel>(exact_codec_set(model->facts().cache_shape())),
                   CachePolicy::from_json(cache), "cpu-reconstruct");
  const std::vector<SequenceBlock> across{{good, &a.session()}, {good, &decides.session()}};
  CHECK_THROWS_WITH(model->forward_batch(across, LogitRows::kLast, logits), Catch::Contains("decides after 1"));
  const std::vector<SequenceBlock> fine{{good, &a.session()}, {good, &b.session()}};
  model->forward_batch(fine, LogitRows::kLast, logits);
  CHECK(std::equal(logits.row(0), logits.row(0) + vocab, logits.row(1)));
}

TEST_CASE("a model attends through any session of its device", "[batch]") {
  const auto model = load_model(kTiny + "llama");
  const CacheShape shape = model->facts().cache_shape();
  const auto ids = some_tokens(40, 7, model->facts().vocab);
  NaiveSession naive(shape, "cpu");
  Sequence ours(shape, CachePolicy::exact(DType::kF32), "cpu-reconstruct");
  Matrix<float> a(40, model->facts().vocab), b(40, model->facts().vocab);
  model->forward(ids, naive, LogitRows::kAll, a);
  model->forward(ids, ours.session(), LogitRows::kAll, b);
  CHECK(largest_difference(a, b) < 1e-5 * spread(b));

  NaiveSession elsewhere(shape, "cuda");
  try {
    model->forward(ids, elsewhere, LogitRows::kAll, a);
    FAIL("not refused");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kUnavailable);
    CHECK(std::string(e.what()).find("the cache's session on cuda") != std::string::npos);
  }
  CHECK(elsewhere.cache().length() == 0);
}
