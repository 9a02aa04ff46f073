// Gradients with respect to keys and values: against finite differences in double, and what must hold of them exactly.
#include "model/backward.h"

#include <algorithm>
#include <cstring>

#include "attention/sequence.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "model/double_model.h"
#include "model/llama_cpu.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::testing;
using Catch::Contains;

namespace {

ModelFacts small_facts() {
  ModelFacts f;
  f.name = f.architecture = "random";
  f.layers = 2;
  f.hidden = 20;
  f.q_heads = 4;
  f.kv_heads = 2;
  f.head_dim = 6;
  f.ffn = 22;
  f.vocab = 17;
  f.context_length = 2048;
  f.norm_eps = 1e-5;
  f.rope = RopeFacts::plain(6, 6, 1000.0);
  return f;
}

struct Family {
  const char* name;
  ModelFacts facts;
};
std::vector<Family> families() {
  std::vector<Family> out;
  const auto add = [&](const char* name, auto&& change) {
    out.push_back({name, small_facts()});
    change(out.back().facts);
  };
  add("grouped heads, an own output head", [](ModelFacts&) {});
  add("a key head a query head, tied", [](ModelFacts& f) {
    f.kv_heads = 4;
    f.tied_head = true;
  });
  add("one key head, three layers, head_dim not hidden / heads", [](ModelFacts& f) {
    f.kv_heads = 1;
    f.layers = 3;
    f.head_dim = 8;
    f.rope = RopeFacts::plain(8, 8, 1e4);
    f.rope.apply_llama3(8, 1, 4, 8);
  });
  add("bias on q, k, v", [](ModelFacts& f) { f.qkv_bias = true; });
  add("bias on q, k, v and the output", [](ModelFacts& f) { f.qkv_bias = f.o_bias = true; });
  add("norm on q and k, tied", [](ModelFacts& f) { f.qk_norm = f.tied_head = true; });
  add("norm and bias, YaRN with an attention factor", [](ModelFacts& f) {
    f.qk_norm = f.qkv_bias = true;
    f.rope.apply_yarn({.factor = 4, .original_context = 8});
    REQUIRE(f.rope.attention_factor > 1.1);
  });
  add("some channels don't rotate", [](ModelFacts& f) { f.rope = RopeFacts::plain(6, 4, 100.0); });
  return out;
}

std::vector<int32_t> some_tokens(int64_t n, int vocab, uint64_t seed = 3) {
  Rng rng(seed);
  std::vector<int32_t> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))));
  return out;
}

struct Gradients final : GradientTap {
  std::vector<Matrix<float>> of[3];  // by part and layer
  double loss = 0;
  explicit Gradients(int layers) {
    for (auto& part : of) part.resize(static_cast<size_t>(layers));
  }
  void on_gradients(int layer, ConstMatrix key, ConstMatrix rotated_key, ConstMatrix value) override {
    const ConstMatrix rows[] = {key, rotated_key, value};
    for (size_t p = 0; p < 3; ++p) {
      Matrix<float>& to = of[p].at(static_cast<size_t>(layer));
      CHECK(to.rows == 0);  // once a layer
      to = Matrix<float>(rows[p].rows, rows[p].cols);
      for (int64_t r = 0; r < to.rows; ++r) std::copy_n(rows[p].row(r), to.cols, to.row(r));
    }
  }
  const Matrix<float>& at(Part part, int layer) const {
    return of[static_cast<size_t>(part)][static_cast<size_t>(layer)];
  }
};

Gradients gradients_of(LlamaCpu& model, const std::vector<int32_t>& tokens, LogitLoss& loss) {
  Gradients out(model.facts().layers);
  out.loss = model.backward(tokens, loss, out);
  return out;
}
Gradients gradients_of(LlamaCpu& model, const std::vector<int32_t>& tokens) {
  NllLoss loss = NllLoss::next_tokens(tokens);
  return gradients_of(model, tokens, loss);
}

Matrix<double> log_softmax(const Matrix<double>& logits) {
  Matrix<double> out = logits;
  for (int64_t t = 0; t < out.rows; ++t) {
    double sum = 0;
    for (int64_t v = 0; v < out.cols; ++v) sum += std::exp(out(t, v));
    for (int64_t v = 0; v < out.cols; ++v) out(t, v) -= std::log(sum);
  }
  return out;
}
double nll(const Matrix<double>& logits, const std::vector<int32_t>& labels) {
  const Matrix<double> log_p = log_softmax(logits);
  double sum = 0;
  for (int64_t t = 0; t < log_p.rows; ++t)
    if (const int32_t label = labels[static_cast<size_t>(t)]; label >= 0) sum -= log_p(t, label);
  return sum;
}
std::vector<int32_t> next(const std::vector<int32_t>& tokens) {
  std::vector<int32_t> out(tokens.begin() + 1, tokens.end());
  out.push_back(-1);
  return out;
}

// Every `stride`-th number of every layer and part: central differences of `loss` of the logits.
template <class Loss>
void check_differences(const DoubleModel& reference, const ModelFacts& f, const std::vector<int32_t>& tokens,
                       const Gradients& got, int64_t stride, Loss&& loss) {
  constexpr double kStep = 1e-5;
  for (int l = 0; l < f.layers; ++l)
    for (const Part part : {Part::kKey, Part::kRotatedKey, Part::kValue}) {
      const Matrix<float>& g = got.at(part, l);
      REQUIRE(g.rows == static_cast<int64_t>(tokens.size()));
      REQUIRE(g.cols == int64_t{f.kv_heads} * f.head_dim);
      double scale = 0;
      for (const float v : g.storage) scale = std::max(scale, std::abs(double{v}));
      CHECK(scale > 1e-3);
      double worst = 0;
      for (int64_t i = (l + static_cast<int>(part)) % stride; i < g.rows * g.cols; i += stride) {
        Nudge nudge{l, part, i / g.cols, i % g.cols, kStep};
        const double above = loss(reference.logits(tokens, {nudge}));
        nudge.amount = -kStep;
        const double slope = (above - loss(reference.logits(tokens, {nudge}))) / (2 * kStep);
        worst = std::max(worst, std::abs(slope - double{g(nudge.token, nudge.channel)}));
      }
      CAPTURE(l, static_cast<int>(part), scale);
      CHECK(worst < 2e-5 * scale);
    }
}

}  // namespace

TEST_CASE("gradients of the NLL equal finite differences in double, for every feature of the family", "[backward]") {
  for (const Family& family : families()) {
    CAPTURE(family.name);
    const RandomWeights weights(family.facts, 7);
    LlamaCpu model(weights, DType::kF32, "");
    const DoubleModel reference(weights);
    const auto tokens = some_tokens(9, family.facts.vocab);
    const Gradients got = gradients_of(model, tokens);
    const auto loss = [&](const Matrix<double>& logits) { return nll(logits, next(tokens)); };
    CHECK(got.loss == Approx(loss(reference.logits(tokens))).epsilon(1e-6));
    check_differences(reference, family.facts, tokens, got, 5, loss);
  }
}

TEST_CASE("gradients of the KL divergence equal finite differences, and vanish where the target is the model's own",
          "[backward]") {
  const ModelFacts facts = small_facts();
  const RandomWeights weights(facts, 8), other(facts, 9);
  LlamaCpu model(weights, DType::kF32, "");
  const DoubleModel reference(weights);
  const auto tokens = some_tokens(8, facts.vocab);
  const auto from_third = [&](const Matrix<double>& logits) {  // positions 3 to 6
    const Matrix<double> log_p = log_softmax(logits);
    Matrix<float> out(4, log_p.cols);
    for (int64_t t = 0; t < 4; ++t)
      for (int64_t v = 0; v < log_p.cols; ++v) out(t, v) = static_cast<float>(log_p(t + 3, v));
    return out;
  };
  const Matrix<float> target = from_third(DoubleModel(other).logits(tokens));
  KldLoss loss(target, 3);
  const Gradients got = gradients_of(model, tokens, loss);
  const auto kld = [&](const Matrix<double>& logits) {
    const Matrix<double> log_p = log_softmax(logits);
    double sum = 0;
    for (int64_t t = 0; t < 4; ++t)
      for (int64_t v = 0; v < log_p.cols; ++v)
        sum += std::exp(double{target(t, v)}) * (double{target(t, v)} - log_p(t + 3, v));
    return sum;
  };
  CHECK(got.loss == Approx(kld(reference.logits(tokens))).epsilon(1e-5));
  check_differences(reference, facts, tokens, got, 5, kld);

  const Matrix<float> own_target = from_third(reference.logits(tokens));
  KldLoss own(own_target, 3);
  const Gradients none = gradients_of(model, tokens, own);
  CHECK(std::abs(none.loss) < 1e-5);
  for (const auto& part : none.of)
    for (const Matrix<float>& g : part)
      for (const float v : g.storage) CHECK(std::abs(v) < 1e-4);
}

TEST_CASE("a window of several tiles: logits, MLP rows, queries and keys", "[backward]") {
  ModelFacts facts = small_facts();
  facts.layers = 1;
  const RandomWeights weights(facts, 10);
  LlamaCpu model(weights, DType::kF32, "");
  const DoubleModel reference(weights);
  const auto tokens = some_tokens(530, facts.vocab);
  const Gradients got = gradients_of(model, tokens);
  check_differences(reference, facts, tokens, got, 530 * 12 / 7 + 1,
                    [&](const Matrix<double>& logits) { return nll(logits, next(tokens)); });
}

TEST_CASE("the loss is that of the runtime's own logits", "[backward]") {
  ModelFacts facts = small_facts();
  facts.qk_norm = facts.qkv_bias = true;
  LlamaCpu model(RandomWeights(facts, 11), DType::kF32, "");
  const auto tokens = some_tokens(300, facts.vocab);
  Sequence sequence(facts.cache_shape(), CachePolicy::exact(DType::kF32), "cpu-reconstruct");
  Matrix<float> logits(300, facts.vocab);
  model.forward(tokens, sequence.session(), LogitRows::kAll, logits);
  Matrix<double> wide(logits.rows, logits.cols);
  std::ranges::copy(logits.storage, wide.storage.begin());
  CHECK(gradients_of(model, tokens).loss == Approx(nll(wide, next(tokens))).epsilon(1e-6));
}

TEST_CASE("the same bits at 1, 2 and 3 threads, and again", "[backward]") {
  ModelFacts facts = small_facts();
  facts.qk_norm = facts.o_bias = facts.qkv_bias = true;
  LlamaCpu model(RandomWeights(facts, 12), DType::kF32, "");
  const auto tokens = some_tokens(600, facts.vocab);
  const int before = thread_count();
  set_thread_count(1);
  const Gradients one = gradients_of(model, tokens);
  for (const int threads : {2, 3, 3}) {
    set_thread_count(threads);
    const Gradients more = gradients_of(model, tokens);
    CHECK(more.loss == one.loss);
    for (size_t p = 0; p < 3; ++p)
      for (size_t l = 0; l < one.of[p].size(); ++l) CHECK(more.of[p][l].storage == one.of[p][l].storage);
  }
  set_thread_count(before);
}

TEST_CASE("nothing behind the scored position has a gradient, and losses of positions add up", "[backward]") {
  const ModelFacts facts = small_facts();
  LlamaCpu model(RandomWeights(facts, 13), DType::kF32, "");
  const auto tokens = some_tokens(12, facts.vocab);
  const auto scored = [&](std::initializer_list<int64_t> positions) {
    std::vector<int32_t> labels(tokens.size(), NllLoss::kNoLabel);
    for (const int64_t t : positions) labels[static_cast<size_t>(t)] = static_cast<int32_t>(t % facts.vocab);
    NllLoss loss(labels);
    return gradients_of(model, tokens, loss);
  };
  const Gradients a = scored({2}), b = scored({7}), both = scored({2, 7}), none = scored({});
  CHECK(none.loss == 0);
  CHECK(both.loss == Approx(a.loss + b.loss).epsilon(1e-6));
  for (size_t p = 0; p < 3; ++p)
    for (int l = 0; l < facts.layers; ++l) {
      const auto at = static_cast<size_t>(l);
      for (int64_t t = 0; t < 12; ++t)
        for (int64_t c = 0; c < both.of[p][at].cols; ++c) {
          CHECK(none.of[p][at](t, c) == 0);
          if (t > 2) CHECK(a.of[p][at](t, c) == 0);
          if (t > 7) CHECK(b.of[p][at](t, c) == 0);
          CHECK(both.of[p][at](t, c) == Approx(a.of[p][at](t, c) + b.of[p][at](t, c)).margin(1e-5));
        }
      CHECK(b.of[p][at](7, 0) != 0);  // its own key and value
    }
}

TEST_CASE("moving all rotated keys of a head together changes nothing: their gradients sum to zero", "[backward]") {
  const ModelFacts facts = small_facts();
  LlamaCpu model(RandomWeights(facts, 14), DType::kF32, "");
  const auto tokens = some_tokens(40, facts.vocab);
  const Gradients got = gradients_of(model, tokens);
  for (int l = 0; l < facts.layers; ++l) {
    const Matrix<float>& g = got.at(Part::kRotatedKey, l);
    for (int64_t c = 0; c < g.cols; ++c) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < g.rows; ++t) {
        sum += double{g(t, c)};
        size += std::abs(double{g(t, c)});
      }
      CHECK(size > 1e-3);
      CHECK(std::abs(sum) < 1e-5 * size);
    }
  }
}

TEST_CASE("gradients with bf16 weights are near those with fp32", "[backward]") {
  const ModelFacts facts = small_facts();
  const RandomWeights weights(facts, 15);
  LlamaCpu exact(weights, DType::kF32, ""), narrow(weights, DType::kBF16, "");
  const auto tokens = some_tokens(30, facts.vocab);
  const Gradients want = gradients_of(exact, tokens), got = gradients_of(narrow, tokens);
  for (size_t p = 0; p < 3; ++p)
    for (size_t l = 0; l < want.of[p].size(); ++l) {
      double off = 0, size = 0;
      for (size_t i = 0; i < want.of[p][l].storage.size(); ++i) {
        const double a = want.of[p][l].storage[i], b = got.of[p][l].storage[i];
        off += (a - b) * (a - b);
        size += a * a;
      }
      CHECK(off > 0);
      CHECK(off < 0.1 * 0.1 * size);
    }
}

TEST_CASE("a backward pass refuses what it can't differentiate, by name", "[backward]") {
  ModelFacts facts = small_facts();
  facts.context_length = 16;
  LlamaCpu model(RandomWeights(facts, 16), DType::kF32, "");
  Gradients tap(facts.layers);
  const auto refused = [&](const std::vector<int32_t>& tokens, LogitLoss& loss) -> std::string {
    try {
      model.backward(tokens, loss, tap);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      return e.what();
    }
    return "";
  };
  const std::vector<int32_t> tokens{1, 2, 3};
  NllLoss none({}), short_one({1, 2}), negative({1, -2, 3}), beyond({1, 2, 17}), fine({1, 2, 3});
  CHECK_THAT(refused({}, none), Contains("at least one token"));
  CHECK_THAT(refused(tokens, short_one), Contains("2 labels") && Contains("3 tokens"));
  CHECK_THAT(refused(tokens, negative), Contains("position 1 is -2") && Contains("0 to 16"));
  CHECK_THAT(refused(tokens, beyond), Contains("position 2 is 17"));
  CHECK_THAT(refused({1, 17, 3}, fine), Contains("token id 17") && Contains("0 to 16"));
  NllLoss long_one = NllLoss::next_tokens(some_tokens(17, 17));
  CHECK_THAT(refused(some_tokens(17, 17), long_one), Contains("17") && Contains("16"));
  const Matrix<float> target(2, 17), other_vocabulary(2, 16);
  KldLoss late(target, 2), narrow(other_vocabulary, 0);
  CHECK_THAT(refused(tokens, late), Contains("from 2 on"));
  CHECK_THAT(refused(tokens, narrow), Contains("over 16 tokens") && Contains("17"));
  SampledNllLoss sampled(4, 1);
  CHECK_THAT(refused(tokens, sampled), Contains("4 tokens") && Contains("of 3"));
}
