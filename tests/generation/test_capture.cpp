// Capture against a model that hands over known numbers, and its sums against plain ones.
#include "generation/capture.h"

#include <unistd.h>
#include <cmath>
#include <filesystem>

#include "core/error.h"
#include "core/rng.h"
#include "core/rope.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

// Q, K, V of a position are a fixed function of (layer, token, position); handed to the tap in blocks of `block`.
class FakeRuntime final : public ModelRuntime {
 public:
  FakeRuntime(int64_t block_size, bool bos) : block(block_size) {
    facts_.name = "fake";
    facts_.hash = "00";
    facts_.layers = 2;
    facts_.hidden = 12;
    facts_.q_heads = 4;
    facts_.kv_heads = 2;
    facts_.head_dim = 8;
    facts_.vocab = 100;
    facts_.context_length = 64;
    facts_.rope = RopeFacts::plain(8, 8, 100.0);
    special.add_bos = bos;
    special.bos = 7;
    for (int l = 0; l < 2; ++l) {
      output_.push_back(Matrix<float>(12, 32));
      Rng rng(static_cast<uint64_t>(100 + l));
      for (auto& v : output_.back().storage) v = static_cast<float>(rng.normal());
    }
  }
  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override { return "none"; }
  const Tokenizer& tokenizer() const override { fail_data("none"); }
  ConstMatrix output_weight(int layer) const override { return output_[static_cast<size_t>(layer)]; }
  static Matrix<float> rows(uint64_t what, std::span<const int32_t> tokens, int64_t first, int64_t cols) {
    Matrix<float> out(static_cast<int64_t>(tokens.size()), cols);
    for (int64_t r = 0; r < out.rows; ++r) {
      Rng rng(what * 1000003 + static_cast<uint64_t>(tokens[static_cast<size_t>(r)]) * 997 +
              static_cast<uint64_t>(first + r));
      for (int64_t c = 0; c < cols; ++c) out(r, c) = static_cast<float>(rng.normal());
    }
    return out;
  }
  void forward_batch(std::span<const SequenceBlock> batch, LogitRows, MutMatrix) override {
    REQUIRE(batch.size() == 1);
    const auto& [tokens, session, visibility, tap] = batch[0];
    KvSession& kv = *session;
    CHECK(kv.cache().length() == 0);
    for (int64_t at = 0; at < static_cast<int64_t>(tokens.size()); at += block) {
      const auto part =
          tokens.subspan(static_cast<size_t>(at),
                         std::min<size_t>(static_cast<size_t>(block), tokens.size() - static_cast<size_t>(at)));
      for (int l = 0; l < 2; ++l) {
        const uint64_t key = static_cast<uint64_t>(l) * 3;
        tap->on_qkv(l, at, rows(key, part, at, 32), rows(key + 1, part, at, 16), rows(key + 2, part, at, 16));
      }
    }
  }
  double backward(std::span<const int32_t> tokens, LogitLoss& loss, GradientTap& tap) override {
    if (!differentiates) return ModelRuntime::backward(tokens, loss, tap);
    loss.require(static_cast<int64_t>(tokens.size()), facts_.vocab);
    for (int l = 1; l >= 0; --l) {
      const uint64_t key = 10 + static_cast<uint64_t>(l) * 3;
      tap.on_gradients(l, rows(key, tokens, 0, 16), rows(key + 1, tokens, 0, 16), rows(key + 2, tokens, 0, 16));
    }
    return 0;
  }
  int64_t block;
  bool differentiates = true;
  SpecialTokens special;

 private:
  ModelFacts facts_;
  std::vector<Matrix<float>> output_;
};

std::vector<int32_t> some_tokens(int64_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<int32_t>(rng.below(100)));
  return out;
}

struct TempFile {
  std::string path =
      (std::filesystem::temp_directory_path() / ("vqkv-capture-" + std::to_string(getpid()) + ".h5")).string();
  ~TempFile() { std::filesystem::remove(path); }
};

}  // namespace

TEST_CASE("a capture plan cuts windows and picks queries", "[capture]") {
  FakeRuntime model(64, true);
  CaptureOptions o;
  o.context = 20;
  o.query_stride = 8;
  o.query_tail = 3;
  const std::vector<TextDocument> docs{{"a", some_tokens(45, 1)}, {"b", some_tokens(5, 2)}};
  const CapturePlan plan = plan_capture(docs, o, model.facts(), model.special);
  REQUIRE(plan.windows.size() == 4);  // 19 + 19 + 7 of a, 5 of b, each behind a BOS
  CHECK(plan.tokens == 20 + 20 + 8 + 6);
  for (const auto& w : plan.windows) CHECK(w.tokens[0] == 7);
  CHECK(plan.windows[0].query_token == std::vector<int32_t>{0, 8, 16, 17, 18, 19});
  CHECK(plan.windows[2].query_token == std::vector<int32_t>{0, 5, 6, 7});
  CHECK(plan.windows[3].document == 1);
  CHECK(std::equal(docs[0].tokens.begin() + 19, docs[0].tokens.begin() + 38, plan.windows[1].tokens.begin() + 1));
  CHECK(plan.queries == 6 + 6 + 4 + 4);
  o.max_tokens = 4;
  CHECK(plan_capture(docs, o, model.facts(), model.special).tokens == 10);
  o.context = 65;
  CHECK_THROWS_WITH(plan_capture(docs, o, model.facts(), model.special), Catch::Contains("beyond the model's 64"));
  o.context = 1;
  CHECK_THROWS_AS(plan_capture(docs, o, model.facts(), model.special), Error);
  o.context = 20;
  const std::vector<TextDocument> own{{"e", {7, 1, 2, 3}}};  // BOS stands there already
  CHECK(plan_capture(own, o, model.facts(), model.special).windows[0].tokens == std::vector<int32_t>{7, 1, 2, 3});
  const std::vector<TextDocument> bad{{"c", {3, 100}}};
  CHECK_THROWS_WITH(plan_capture(bad, o, model.facts(), model.special), Catch::Contains("c: token 1 is 100"));
  const std::vector<TextDocument> empty{{"d", {}}};
  CHECK_THROWS_WITH(plan_capture(empty, o, model.facts(), model.special), Catch::Contains("no token"));
}

TEST_CASE("a capture records rows, moments, mass and W_O, in any blocks and at any thread count", "[capture]") {
  const TempFile file;
  CaptureOptions o;
  o.context = 24;
  o.query_stride = 5;
  o.query_tail = 2;
  o.dtype = DType::kF32;
  const std::vector<TextDocument> docs{{"a", some_tokens(40, 1)}, {"b", some_tokens(13, 2)}};
  std::string hash;
  for (const int64_t block : {int64_t{64}, int64_t{7}, int64_t{1}}) {
    for (const int threads : {1, 2}) {
      set_thread_count(threads);
      FakeRuntime model(block, false);
      const CapturePlan plan = plan_capture(docs, o, model.facts(), model.special);
      TraceWriter writer(file.path, capture_info(model.facts(), o), plan.names, plan.tokens, plan.queries);
      int64_t last = 0;
      REQUIRE(capture_trace(model, plan, writer, [&](int64_t done) {
        last = done;
        return true;
      }));
      CHECK(last == plan.tokens);
      const TraceReader trace(file.path);
      CHECK(trace.verify().empty());
      // Blocks change the order of additions in the sums, not the rows; threads change nothing.
      if (block == 64) {
        if (threads == 1) hash = trace.info().content_hash;
        CHECK(trace.info().content_hash == hash);
      }
      const RopeTable rope(model.facts().rope);
      const int64_t d = 8, group = 2;
      const float scale = model.facts().cache_shape().score_scale;
      for (int l = 0; l < 2; ++l) {
        const Matrix<float> w_o = trace.output_weight(l);
        CHECK(std::equal(w_o.storage.begin(), w_o.storage.end(), model.output_weight(l).data));
        for (int h = 0; h < 2; ++h) {
          std::vector<std::vector<double>> moment(2, std::vector<double>(64)), pairs(2, std::vector<double>(4));
          for (const TraceWindow& w : trace.windows()) {
            const std::span<const int32_t> tokens(trace.token_id().data() + w.first_token,
                                                  static_cast<size_t>(w.tokens));
            Matrix<float> q = FakeRuntime::rows(static_cast<uint64_t>(l) * 3, tokens, 0, 32);
            Matrix<float> k = FakeRuntime::rows(static_cast<uint64_t>(l) * 3 + 1, tokens, 0, 16);
            const Matrix<float> v = FakeRuntime::rows(static_cast<uint64_t>(l) * 3 + 2, tokens, 0, 16);
            Matrix<float> got(w.tokens, d), got_v(w.tokens, d), got_q(w.queries, d);
            trace.key(l, h, w.first_token, w.tokens, got);
            trace.value(l, h, w.first_token, w.tokens, got_v);
            trace.query(l, h * 2 + 1, w.first_query, w.queries, got_q);
            for (int64_t t = 0; t < w.tokens; ++t)
              for (int64_t c = 0; c < d; ++c) {
                REQUIRE(got(t, c) == k(t, h * d + c));
                REQUIRE(got_v(t, c) == v(t, h * d + c));
              }
            for (int64_t i = 0; i < w.queries; ++i)
              for (int64_t c = 0; c < d; ++c)
                REQUIRE(got_q(i, c) == q(trace.query_token()[static_cast<size_t>(w.first_query + i)] - w.first_token,
                                         (h * 2 + 1) * d + c));
            const size_t doc = static_cast<size_t>(w.document);
            for (int64_t t = 0; t < w.tokens; ++t)
              for (int64_t g = 0; g < group; ++g)
                for (int64_t p = 0; p < 4; ++p) {
                  const double a = q(t, (h * group + g) * d + p), b = q(t, (h * group + g) * d + p + 4);
                  pairs[doc][static_cast<size_t>(p)] += a * a + b * b;
                }
            std::vector<int32_t> positions;
            for (int64_t t = 0; t < w.tokens; ++t) positions.push_back(static_cast<int32_t>(t));
            rope_apply(rope, positions.data(), q);
            rope_apply(rope, positions.data(), k);
            for (int64_t t = 0; t < w.tokens; ++t)
              for (int64_t g = 0; g < group; ++g)
                for (int64_t i = 0; i < d; ++i)
                  for (int64_t j = 0; j < d; ++j)
                    moment[doc][static_cast<size_t>(i * d + j)] +=
                        double{q(t, (h * group + g) * d + i)} * double{q(t, (h * group + g) * d + j)};
            std::vector<double> mass(static_cast<size_t>(w.tokens)), mass2 = mass;
            for (int64_t i = 0; i < w.queries; ++i) {
              const int64_t at = trace.query_token()[static_cast<size_t>(w.first_query + i)] - w.first_token;
              for (int64_t g = 0; g < group; ++g) {
                std::vector<double> score;
                double total = 0;
                for (int64_t t = 0; t <= at; ++t) {
                  double s = 0;
                  for (int64_t c = 0; c < d; ++c) s += double{q(at, (h * group + g) * d + c)} * double{k(t, h * d + c)};
                  score.push_back(std::exp(s * double{scale}));
                  total += score.back();
                }
                for (size_t t = 0; t < score.size(); ++t) {
                  mass[t] += score[t] / total;
                  mass2[t] += score[t] / total * score[t] / total;
                }
              }
            }
            const auto m1 = trace.received_mass(l, h, w.first_token, w.tokens),
                       m2 = trace.received_mass2(l, h, w.first_token, w.tokens);
            for (size_t t = 0; t < mass.size(); ++t) {
              REQUIRE(double{m1[t]} == Approx(mass[t]).epsilon(2e-6));
              REQUIRE(double{m2[t]} == Approx(mass2[t]).epsilon(4e-6));
            }
          }
          for (int doc = 0; doc < 2; ++doc) {
            const Matrix<double> m = trace.query_moment(l, h, doc);
            const auto p = trace.query_pair_moment(l, h, doc);
            for (size_t i = 0; i < 64; ++i)
              REQUIRE(m.storage[i] == Approx(moment[static_cast<size_t>(doc)][i]).epsilon(1e-12).margin(1e-9));
            for (size_t i = 0; i < 4; ++i) REQUIRE(p[i] == Approx(pairs[static_cast<size_t>(doc)][i]).epsilon(1e-12));
          }
        }
      }
    }
  }
  set_thread_count(2);
}

TEST_CASE("a capture records squared gradients and their second moments on request", "[capture]") {
  const TempFile file;
  CaptureOptions o;
  o.context = 24;
  const std::vector<TextDocument> docs{{"a", some_tokens(40, 1)}, {"b", some_tokens(13, 2)}};
  FakeRuntime model(64, false);
  const CapturePlan plan = plan_capture(docs, o, model.facts(), model.special);
  const auto capture = [&] {
    TraceWriter writer(file.path, capture_info(model.facts(), o), plan.names, plan.tokens, plan.queries);
    capture_trace(model, plan, writer);
  };
  for (const std::string loss : {"next-token", "sampled"}) {
    o.gradients = loss;
    capture();
    const TraceReader trace(file.path);
    CHECK(trace.verify().empty());
    CHECK(trace.info().gradients == loss);
    for (const GradientOf of : kGradientsOf)
      for (int l = 0; l < 2; ++l)
        for (int h = 0; h < 2; ++h) {
          std::vector<Matrix<double>> moment(2, Matrix<double>(8, 8));
          for (const TraceWindow& w : trace.windows()) {
            const std::span<const int32_t> tokens(trace.token_id().data() + w.first_token,
                                                  static_cast<size_t>(w.tokens));
            const Matrix<float> g =
                FakeRuntime::rows(10 + static_cast<uint64_t>(l) * 3 + static_cast<uint64_t>(of), tokens, 0, 16);
            Matrix<float> square(w.tokens, 8);
            trace.squared_gradient(of, l, h, w.first_token, w.tokens, square);
            for (int64_t t = 0; t < w.tokens; ++t)
              for (int64_t i = 0; i < 8; ++i) {
                REQUIRE(square(t, i) == to_float(to_bf16(g(t, h * 8 + i) * g(t, h * 8 + i))));
                for (int64_t j = 0; j < 8; ++j)
                  moment[static_cast<size_t>(w.document)](i, j) += double{g(t, h * 8 + i)} * double{g(t, h * 8 + j)};
              }
          }
          for (int doc = 0; doc < 2; ++doc) {
            const Matrix<double> m = trace.gradient_moment(of, l, h, doc);
            for (size_t i = 0; i < 64; ++i)
              REQUIRE(m.storage[i] == Approx(moment[static_cast<size_t>(doc)].storage[i]).epsilon(1e-12).margin(1e-12));
          }
        }
  }
  o.gradients = "kld";
  CHECK_THROWS_WITH(capture(), Catch::Contains("'kld'") && Catch::Contains("next-token, sampled"));
  o.gradients = "next-token";
  model.differentiates = false;
  try {
    capture();
    FAIL_CHECK("captured");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kUnavailable);
    CHECK_THAT(e.what(), Catch::Contains("no backward pass"));
  }
}

TEST_CASE("a capture that is stopped leaves no file", "[capture]") {
  const TempFile file;
  FakeRuntime model(64, false);
  CaptureOptions o;
  o.context = 10;
  const std::vector<TextDocument> docs{{"a", some_tokens(40, 1)}};
  const CapturePlan plan = plan_capture(docs, o, model.facts(), model.special);
  {
    TraceWriter writer(file.path, capture_info(model.facts(), o), plan.names, plan.tokens, plan.queries);
    CHECK_FALSE(capture_trace(model, plan, writer, [](int64_t done) { return done < 20; }));
  }
  CHECK_FALSE(std::filesystem::exists(file.path));
  CHECK_FALSE(std::filesystem::exists(file.path + ".partial"));
}

TEST_CASE("query moments of wide heads equal plain sums on every instruction set", "[capture]") {
  Rng rng(5);
  for (const int64_t d : {2, 64, 80, 96, 128}) {
    Matrix<float> q(33, 3 * d);
    for (auto& v : q.storage) v = static_cast<float>(rng.normal());
    std::vector<double> got(static_cast<size_t>(d * d), 0.0), want = got;
    add_moment(q, 3, got.data());
    for (int64_t h = 0; h < 3; ++h)
      for (int64_t t = 0; t < 33; ++t)
        for (int64_t i = 0; i < d; ++i)
          for (int64_t j = 0; j < d; ++j)
            want[static_cast<size_t>(i * d + j)] += double{q(t, h * d + i)} * double{q(t, h * d + j)};
    CHECK(got == want);  // the same additions in the same order
  }
}

TEST_CASE("pair moments of a partly rotated head", "[capture]") {
  Matrix<float> q(1, 8);
  for (int c = 0; c < 8; ++c) q(0, c) = static_cast<float>(1 << c);
  std::vector<double> pairs(4, 0.0);
  add_query_pair_moment(q, 1, 4, pairs.data());  // pairs (0, 2), (1, 3), then (4, 5), (6, 7)
  CHECK(pairs == std::vector<double>{1 + 16, 4 + 64, 256 + 1024, 4096 + 16384});
}
