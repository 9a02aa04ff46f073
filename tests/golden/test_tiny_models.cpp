// Every family against llama.cpp, on tiny models with random weights: tests/golden/make_tiny_models.py made them.
#include <cmath>
#include <cstring>

#include "core/cpu.h"
#include "core/thread_pool.h"
#include "golden/logits.h"
#include "model/llama_cpu.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct FirstLayer final : ModelTap {
  Matrix<float> q, k, v;
  int calls = 0;
  static Matrix<float> copy(ConstMatrix m) {
    Matrix<float> out(m.rows, m.cols);
    for (int64_t r = 0; r < m.rows; ++r) std::copy_n(m.row(r), m.cols, out.row(r));
    return out;
  }
  void on_qkv(int layer, int64_t first_position, ConstMatrix q_in, ConstMatrix k_in, ConstMatrix v_in) override {
    CHECK(layer == calls++);
    CHECK(first_position == 0);
    if (layer != 0) return;
    q = copy(q_in);
    k = copy(k_in);
    v = copy(v_in);
  }
};

std::vector<double> norm(std::vector<double> x, size_t first, size_t n, const Matrix<float>& weight, double eps) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[first + i] * x[first + i];
  const double scale = 1 / std::sqrt(sum / static_cast<double>(n) + eps);
  for (size_t i = 0; i < n; ++i) x[first + i] *= scale * weight.storage[i];
  return x;
}

// What the tap must see of one token in the first layer, in double from the weights.
std::vector<double> expected(const ModelWeights& w, int32_t token, Weight matrix, Weight bias, Weight head_norm) {
  const Matrix<float> embedding = w.read(Weight::kEmbedding), m = w.read(matrix, 0);
  std::vector<double> x(embedding.row(token), embedding.row(token) + embedding.cols);
  x = norm(x, 0, x.size(), w.read(Weight::kAttentionNorm, 0), w.facts().norm_eps);
  std::vector<double> y(static_cast<size_t>(m.rows));
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) y[static_cast<size_t>(r)] += x[static_cast<size_t>(c)] * m(r, c);
    if (w.has(bias)) y[static_cast<size_t>(r)] += w.read(bias, 0).storage[static_cast<size_t>(r)];
  }
  const size_t d = static_cast<size_t>(w.facts().head_dim);
  if (matrix != Weight::kV && w.has(head_norm))
    for (size_t h = 0; h < y.size(); h += d) y = norm(y, h, d, w.read(head_norm, 0), w.facts().norm_eps);
  return y;
}

}  // namespace

TEST_CASE("tiny models of every family: logits equal llama.cpp's") {
  for (const std::string name : {"llama", "mistral", "qwen2", "qwen3"}) {
    CAPTURE(name);
    const auto gguf = load_model(kTiny + name + ".gguf"), folder = load_model(kTiny + name);
    const Golden golden = read_golden(kTiny + name, gguf->facts().vocab);
    const double scale = spread(golden.logits);
    const Matrix<float> whole = logits_of(*gguf, golden.ids, kGoldenTokens);
    CHECK(largest_difference(whole, golden.logits) < 2e-5 * scale);
    CHECK(logits_of(*gguf, golden.ids, 7).storage == whole.storage);
    const Matrix<float> twin = logits_of(*folder, golden.ids, kGoldenTokens);
    if (name == "llama")  // the GGUF carries its RoPE factors rounded to fp32, the folder the formula
      CHECK(largest_difference(twin, whole) < 2e-5 * scale);
    else
      CHECK(twin.storage == whole.storage);
    // bf16 weights, and perhaps inputs, are off by 2^-9 each: not equal, and not far.
    const auto narrow = load_model(kTiny + name + ".gguf", {.weights = DType::kBF16});
    CHECK(gguf->weights() == "f32");
    CHECK(narrow->weights() == (cpu_features().bf16_products ? "bf16 x bf16" : "bf16 x f32"));
    CHECK(logits_of(*narrow, golden.ids, 7).storage == logits_of(*narrow, golden.ids, kGoldenTokens).storage);
    Matrix<float> off = logits_of(*narrow, golden.ids, kGoldenTokens);
    for (size_t i = 0; i < off.storage.size(); ++i) off.storage[i] -= whole.storage[i];
    CHECK(spread(off) > 0);
    CHECK(spread(off) < 0.06 * scale);
  }
}

TEST_CASE("tiny models: logits have the same bits with 1 and 3 threads") {
  const int before = thread_count();
  for (const std::string name : {"llama", "qwen2"}) {
    const auto model = load_model(kTiny + name + ".gguf");
    const Golden golden = read_golden(kTiny + name, model->facts().vocab);
    set_thread_count(1);
    const Matrix<float> one = logits_of(*model, golden.ids, 33);
    set_thread_count(3);
    CHECK(logits_of(*model, golden.ids, 33).storage == one.storage);
    set_thread_count(before);
  }
}

TEST_CASE("tiny models: a tap sees q, k, v after bias and head norm, before RoPE, W_O is the file's") {
  for (const std::string name : {"llama", "qwen2", "qwen3"}) {
    CAPTURE(name);
    const auto weights = ModelWeights::open(kTiny + name + ".gguf");
    const auto model = load_model(kTiny + name + ".gguf");
    const Golden golden = read_golden(kTiny + name, model->facts().vocab);
    FirstLayer tap;
    logits_of(*model, golden.ids, kGoldenTokens, &tap);
    CHECK(tap.calls == model->facts().layers);
    for (const int64_t t : {int64_t{0}, int64_t{41}, kGoldenTokens - 1}) {
      const int32_t token = golden.ids[static_cast<size_t>(t)];
      const std::pair<const Matrix<float>*, std::vector<double>> pairs[] = {
          {&tap.q, expected(*weights, token, Weight::kQ, Weight::kQBias, Weight::kQNorm)},
          {&tap.k, expected(*weights, token, Weight::kK, Weight::kKBias, Weight::kKNorm)},
          {&tap.v, expected(*weights, token, Weight::kV, Weight::kVBias, Weight::kKNorm)}};
      for (const auto& [seen, wanted] : pairs) {
        REQUIRE(seen->cols == static_cast<int64_t>(wanted.size()));
        for (int64_t c = 0; c < seen->cols; ++c) CHECK(std::abs((*seen)(t, c) - wanted[static_cast<size_t>(c)]) < 2e-5);
      }
    }
    const ConstMatrix w_o = model->output_weight(1);
    const Matrix<float> stored = weights->read(Weight::kO, 1);
    REQUIRE((w_o.rows == stored.rows && w_o.cols == stored.cols));
    CHECK(std::memcmp(w_o.data, stored.data(), stored.storage.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("a token outside the vocabulary is refused") {
  const auto model = load_model(kTiny + "qwen2.gguf");
  CHECK_THROWS_AS(logits_of(*model, {0, 97}, 2), Error);
  CHECK_THROWS_AS(logits_of(*model, {-1}, 1), Error);
  CHECK_THROWS_AS(load_model(kTiny + "qwen2.gguf", {.weights = DType::kF16}), Error);
}
