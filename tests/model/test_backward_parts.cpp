// What a backward pass is made of: losses of logits, causal attention, and the kernels between the products.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/rng.h"
#include "model/backward.h"
#include "model/causal_attention.h"
#include "model/kernels_cpu.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

Matrix<float> random_matrix(int64_t rows, int64_t cols, uint64_t key, double gain = 1) {
  Matrix<float> m(rows, cols);
  Rng rng(key);
  for (float& v : m.storage) v = static_cast<float>(gain * rng.normal());
  return m;
}

double softmax_at(ConstMatrix logits, int64_t row, int64_t at) {
  double top = logits(row, 0), sum = 0;
  for (int64_t v = 0; v < logits.cols; ++v) top = std::max(top, double{logits(row, v)});
  for (int64_t v = 0; v < logits.cols; ++v) sum += std::exp(double{logits(row, v)} - top);
  return std::exp(double{logits(row, at)} - top) / sum;
}

// One head in double, from the formulas.
struct DoubleHead {
  int64_t n, d;
  Matrix<double> p, out, dq, dk, dv;
  DoubleHead(const AttentionHead& h, ConstMatrix dout)
      : n(h.q.rows), d(h.q.cols), p(n, n), out(n, d), dq(n, d), dk(n, d), dv(n, d) {
    const double scale = h.scale;
    for (int64_t t = 0; t < n; ++t) {
      double top = -1e300, sum = 0;
      for (int64_t s = 0; s <= t; ++s) {
        for (int64_t c = 0; c < d; ++c) p(t, s) += scale * double{h.q(t, c)} * double{h.k(s, c)};
        top = std::max(top, p(t, s));
      }
      for (int64_t s = 0; s <= t; ++s) sum += p(t, s) = std::exp(p(t, s) - top);
      for (int64_t s = 0; s <= t; ++s) {
        p(t, s) /= sum;
        for (int64_t c = 0; c < d; ++c) out(t, c) += p(t, s) * double{h.v(s, c)};
      }
      std::vector<double> dp(static_cast<size_t>(t + 1));
      double mean = 0;
      for (int64_t s = 0; s <= t; ++s) {
        double& slope = dp[static_cast<size_t>(s)];
        for (int64_t c = 0; c < d; ++c) {
          slope += double{dout(t, c)} * double{h.v(s, c)};
          dv(s, c) += p(t, s) * double{dout(t, c)};
        }
        mean += p(t, s) * slope;
      }
      for (int64_t s = 0; s <= t; ++s) {
        const double ds = scale * p(t, s) * (dp[static_cast<size_t>(s)] - mean);
        for (int64_t c = 0; c < d; ++c) {
          dq(t, c) += ds * double{h.k(s, c)};
          dk(s, c) += ds * double{h.q(t, c)};
        }
      }
    }
  }
};

double worst(ConstMatrix got, const Matrix<double>& want) {
  double size = 0, off = 0;
  for (int64_t r = 0; r < want.rows; ++r)
    for (int64_t c = 0; c < want.cols; ++c) {
      size = std::max(size, std::abs(want(r, c)));
      off = std::max(off, std::abs(double{got(r, c)} - want(r, c)));
    }
  return size > 0 ? off / size : off;
}

}  // namespace

TEST_CASE("causal attention and its gradient equal the formulas in double, in any number of tiles", "[backward]") {
  for (const auto& [n, d, gain] : {std::tuple<int64_t, int64_t, double>{1, 4, 1},
                                   {5, 6, 2},
                                   {128, 64, 1},
                                   {129, 16, 6},
                                   {257, 8, 2},
                                   {700, 10, 3}}) {
    CAPTURE(n, d, gain);
    // Heads lie beside others, so every view is strided.
    const Matrix<float> q = random_matrix(n, d + 3, 1, gain), k = random_matrix(n, 2 * d, 2, gain),
                        v = random_matrix(n, d + 1, 3), dout = random_matrix(n, d + 2, 4);
    const AttentionHead head{q.view().slice_cols(3, d), k.view().slice_cols(d, d), v.view().slice_cols(0, d), 0.4f};
    const ConstMatrix grad = dout.view().slice_cols(1, d);
    const DoubleHead want(head, grad);
    Matrix<float> out(n, d + 5, -7.0f), dq(n, d + 4, -7.0f), dk(n, d), dv(n, d);
    const MutMatrix o = out.view().slice_cols(5, d), gq = dq.view().slice_cols(2, d);
    std::vector<float> log_sum(static_cast<size_t>(n));
    attend_causal(head, o, log_sum.data());
    CHECK(worst(o, want.out) < 1e-5);
    attend_causal_backward(head, o, log_sum.data(), grad, gq, dk, dv);
    CHECK(worst(gq, want.dq) < 2e-5);
    CHECK(worst(dk, want.dk) < 2e-5);
    CHECK(worst(dv, want.dv) < 2e-5);
    for (int64_t t = 0; t < n; ++t) {
      CHECK(out(t, 4) == -7);
      CHECK((dq(t, 1) == -7 && dq(t, d + 2) == -7));
    }
    // Keys' and values' gradients are added to what is there.
    const Matrix<float> once_k = dk, once_v = dv;
    attend_causal_backward(head, o, log_sum.data(), grad, gq, dk, dv);
    for (size_t i = 0; i < dk.storage.size(); ++i) {
      CHECK(dk.storage[i] == Approx(2 * once_k.storage[i]).margin(1e-4));
      CHECK(dv.storage[i] == Approx(2 * once_v.storage[i]).margin(1e-4));
    }
  }
}

TEST_CASE("the last token's key and value hear of their own query alone", "[backward]") {
  const int64_t n = 300, d = 8;
  const Matrix<float> q = random_matrix(n, d, 1), k = random_matrix(n, d, 2), v = random_matrix(n, d, 3),
                      dout = random_matrix(n, d, 4);
  Matrix<float> last(n, d), out(n, d), dq(n, d), dk(n, d), dv(n, d), dk_last(n, d), dv_last(n, d);
  std::copy_n(dout.row(n - 1), d, last.row(n - 1));
  const AttentionHead head{q, k, v, 0.3f};
  std::vector<float> log_sum(static_cast<size_t>(n));
  attend_causal(head, out, log_sum.data());
  attend_causal_backward(head, out, log_sum.data(), dout, dq, dk, dv);
  attend_causal_backward(head, out, log_sum.data(), last, dq, dk_last, dv_last);
  CHECK(std::memcmp(dk.row(n - 1), dk_last.row(n - 1), static_cast<size_t>(d) * sizeof(float)) == 0);
  CHECK(std::memcmp(dv.row(n - 1), dv_last.row(n - 1), static_cast<size_t>(d) * sizeof(float)) == 0);
  CHECK(std::memcmp(dk.row(n - 2), dk_last.row(n - 2), static_cast<size_t>(d) * sizeof(float)) != 0);
}

TEST_CASE("scores of hundreds leave the gradients finite", "[backward]") {
  const int64_t n = 200, d = 4;
  const Matrix<float> q = random_matrix(n, d, 1, 30), k = random_matrix(n, d, 2, 30), v = random_matrix(n, d, 3),
                      dout = random_matrix(n, d, 4);
  Matrix<float> out(n, d), dq(n, d), dk(n, d), dv(n, d);
  std::vector<float> log_sum(static_cast<size_t>(n));
  const AttentionHead head{q, k, v, 1.0f};
  attend_causal(head, out, log_sum.data());
  attend_causal_backward(head, out, log_sum.data(), dout, dq, dk, dv);
  const DoubleHead want(head, dout);
  CHECK(worst(out, want.out) < 1e-3);
  CHECK(worst(dv, want.dv) < 1e-3);
  for (const Matrix<float>* m : {&dq, &dk, &dv})
    for (const float x : m->storage) CHECK(std::isfinite(x));
}

TEST_CASE("the NLL of logits and its gradient, also of a label whose probability underflows", "[backward]") {
  Matrix<float> logits = random_matrix(3, 50, 5, 2);
  logits(2, 7) = -500;
  const Matrix<float> before = logits;
  NllLoss loss({3, NllLoss::kNoLabel, 7});
  const double total = loss.differentiate(0, logits);
  CHECK(total ==
        Approx(-std::log(softmax_at(before, 0, 3)) - std::log(softmax_at(before, 2, 0)) + double{before(2, 0)} + 500)
            .epsilon(1e-6));
  for (int64_t v = 0; v < 50; ++v) {
    CHECK(logits(0, v) == Approx(softmax_at(before, 0, v) - (v == 3)).margin(1e-6));
    CHECK(logits(1, v) == 0);
    CHECK(logits(2, v) == Approx(softmax_at(before, 2, v) - (v == 7)).margin(1e-6));
  }
  Matrix<float> part(1, 50);  // positions stand where they are said to
  std::copy_n(before.row(2), 50, part.row(0));
  NllLoss(std::vector<int32_t>{3, NllLoss::kNoLabel, 7}).differentiate(2, part);
  CHECK(std::equal(part.storage.begin(), part.storage.end(), logits.row(2)));
  CHECK(NllLoss::next_tokens(std::vector<int32_t>{}).differentiate(0, MutMatrix(nullptr, 0, 50)) == 0);
}

TEST_CASE("sampled labels come as often as the model says, and are a position's own", "[backward]") {
  constexpr int64_t kRows = 3, kVocab = 6, kDraws = 4000;
  const Matrix<float> logits = random_matrix(kRows, kVocab, 6);
  const auto label_of = [](const float* gradient) { return std::min_element(gradient, gradient + kVocab) - gradient; };
  std::vector<double> count(kRows * kVocab);
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    Matrix<float> x = logits;
    const double loss = SampledNllLoss(kRows, seed).differentiate(0, x);
    double want = 0;
    for (int64_t r = 0; r + 1 < kRows; ++r) {
      const auto label = label_of(x.row(r));
      ++count[static_cast<size_t>(r * kVocab + label)];
      want -= std::log(softmax_at(logits, r, label));
    }
    REQUIRE(loss == Approx(want).epsilon(1e-6));
    for (int64_t v = 0; v < kVocab; ++v) REQUIRE(x(kRows - 1, v) == 0);  // nothing comes after the last token
    if (seed > 20) continue;
    Matrix<float> second = logits;  // the same draw, row by row
    for (int64_t r = 0; r < kRows; ++r) SampledNllLoss(kRows, seed).differentiate(r, second.view().slice_rows(r, 1));
    REQUIRE(second.storage == x.storage);
  }
  for (int64_t r = 0; r + 1 < kRows; ++r)
    for (int64_t v = 0; v < kVocab; ++v) {
      const double p = softmax_at(logits, r, v), share = count[static_cast<size_t>(r * kVocab + v)] / kDraws;
      CHECK(std::abs(share - p) < 5 * std::sqrt(p * (1 - p) / kDraws) + 1e-9);
    }
}

TEST_CASE("gradients of RMSNorm and SwiGLU equal finite differences", "[backward]") {
  constexpr double kStep = 1e-5;
  for (const int64_t n : {1, 7, 40}) {
    const Matrix<float> x = random_matrix(1, n, 1), w = random_matrix(1, n, 2), g = random_matrix(1, n, 3);
    const auto norm = [&](std::vector<double> y) {  // g . rms_norm(y)
      double square = 0, sum = 0;
      for (const double v : y) square += v * v;
      const double scale = 1 / std::sqrt(square / static_cast<double>(n) + 1e-3);
      for (int64_t i = 0; i < n; ++i) sum += y[static_cast<size_t>(i)] * scale * double{w(0, i)} * double{g(0, i)};
      return sum;
    };
    Matrix<float> dx(1, n, 2.0f), alone(1, n), in_place = g;
    rms_norm_backward(x.data(), w.data(), 1e-3, g.data(), dx.data(), n, true);
    rms_norm_backward(x.data(), w.data(), 1e-3, g.data(), alone.data(), n, false);
    rms_norm_backward(x.data(), w.data(), 1e-3, in_place.data(), in_place.data(), n, false);
    CHECK(in_place.storage == alone.storage);
    Matrix<float> gate = random_matrix(1, n, 4, 3), up = random_matrix(1, n, 5);
    if (n > 2) gate(0, 1) = -200;
    const Matrix<float> gate_in = gate, up_in = up;
    swiglu_backward(gate.data(), up.data(), g.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> above(x.storage.begin(), x.storage.end()), below = above;
      above[static_cast<size_t>(i)] += kStep;
      below[static_cast<size_t>(i)] -= kStep;
      const double slope = (norm(above) - norm(below)) / (2 * kStep);
      CHECK(alone(0, i) == Approx(slope).epsilon(1e-4).margin(1e-5));
      CHECK(dx(0, i) == Approx(2 + slope).epsilon(1e-4).margin(1e-5));
      const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
      const double a = gate_in(0, i), b = up_in(0, i), out = g(0, i);
      CHECK(gate(0, i) ==
            Approx(out * b * (silu(a + kStep) - silu(a - kStep)) / (2 * kStep)).epsilon(1e-4).margin(1e-6));
      CHECK(up(0, i) == Approx(out * silu(a)).epsilon(1e-5).margin(1e-7));
    }
  }
}

TEST_CASE("SwiGLU of gates far below and above zero", "[backward]") {
  for (const int64_t n : {1, 40}) {
    for (const float g : {-1e30f, -5000.0f, -300.0f, -120.0f, -104.5f, -90.0f, -20.0f, 20.0f, 300.0f, 1e30f}) {
      std::vector<float> gate(static_cast<size_t>(n), g), up(static_cast<size_t>(n), 2.0f),
          dout(static_cast<size_t>(n), 1.0f), product = gate;
      swiglu(product.data(), up.data(), n);
      swiglu_backward(gate.data(), up.data(), dout.data(), n);
      const double sigmoid = 1 / (1 + std::exp(-double{g}));
      CAPTURE(g);
      for (size_t i = 0; i < product.size(); ++i) {
        CHECK(product[i] == Approx(2 * double{g} * sigmoid).epsilon(1e-5).margin(1e-4));
        CHECK(up[i] == Approx(double{g} * sigmoid).epsilon(1e-5).margin(1e-4));
        CHECK(gate[i] == Approx(2 * sigmoid).epsilon(1e-5).margin(1e-4));
      }
    }
  }
}
