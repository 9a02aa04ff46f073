#include "codec/train/binary_code.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "core/index.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

constexpr int kChoices = 4;
constexpr double kNormEpsilon = 1e-5;   // of LayerNorm
constexpr double kScaleEpsilon = 1e-6;  // of channel scales
constexpr int64_t kRowsAtOnce = 64;

// Which bits of a symbol choice `c` sets.
constexpr bool sets_low(int c) { return c == 0 || c == 2; }
constexpr bool sets_high(int c) { return c == 1 || c == 2; }

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2)); }
double gelu_slope(double x) {
  return 0.5 * (1 + std::erf(x / std::numbers::sqrt2)) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
}

// x over the channel scales: its length, and the vector over that and through LayerNorm.
double normalize(const float* x, const std::vector<float>& scale, float* out) {
  const auto width = static_cast<int64_t>(scale.size());
  double square = 0, mean = 0, spread = 0;
  for (int64_t c = 0; c < width; ++c) square += std::pow(double{x[c]} / scale[at(c)], 2);
  const double length = std::sqrt(square), inverse = length > 0 ? 1 / length : 0;
  for (int64_t c = 0; c < width; ++c) mean += double{x[c]} / scale[at(c)] * inverse;
  mean /= static_cast<double>(width);
  for (int64_t c = 0; c < width; ++c) spread += std::pow(double{x[c]} / scale[at(c)] * inverse - mean, 2);
  const double narrow = 1 / std::sqrt(spread / static_cast<double>(width) + kNormEpsilon);
  for (int64_t c = 0; c < width; ++c)
    out[c] = static_cast<float>((double{x[c]} / scale[at(c)] * inverse - mean) * narrow);
  return length;
}

int largest(const float* logits) { return static_cast<int>(std::max_element(logits, logits + kChoices) - logits); }

void add_bias(const std::vector<float>& bias, MutMatrix y) {
  for (int64_t r = 0; r < y.rows; ++r)
    for (int64_t c = 0; c < y.cols; ++c) y(r, c) += bias[at(c)];
}

Matrix<float> transposed(const Matrix<float>& m) {
  Matrix<float> out(m.cols, m.rows);
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t c = 0; c < m.cols; ++c) out(c, r) = m(r, c);
  return out;
}

std::vector<float> column_sums(const Matrix<float>& m) {
  std::vector<double> sum(at(m.cols), 0.0);
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t c = 0; c < m.cols; ++c) sum[at(c)] += m(r, c);
  return {sum.begin(), sum.end()};
}

// Rows one by one, each its own.
template <class Body>
void each_row(int64_t rows, Body&& body) {
  parallel_chunks(rows, kRowsAtOnce, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) body(r);
  });
}

// One array of parameters with its gradient and Adam's moments.
struct Moving {
  float* value;
  std::vector<float> gradient, first, second;
  Moving(float* v, size_t n) : value(v), gradient(n), first(n), second(n) {}
};

class NetworkDescent {
 public:
  NetworkDescent(ConstMatrix x, std::span<const float> weight, const BinaryCodeOptions& options, BinaryCode& code)
      : x_(x), weight_(weight), options_(options), code_(code) {
    const auto add = [&](float* v, size_t n) { moving_.emplace_back(v, n); };
    add(code.first.data(), code.first.storage.size());
    add(code.first_bias.data(), code.first_bias.size());
    add(code.second.data(), code.second.storage.size());
    add(code.second_bias.data(), code.second_bias.size());
    add(code.rows.data(), code.rows.storage.size());  // E itself while it is trained
    double square = 0, total = 0;
    for (int64_t r = 0; r < x.rows; ++r) {
      total += weight_of(r);
      for (int64_t c = 0; c < x.cols; ++c) square += weight_of(r) * x(r, c) * x(r, c);
    }
    mean_square_ = total > 0 ? std::max(square / total, 1e-300) : 1;
  }

  void step(int number, Rng rng) {
    const std::vector<int64_t> picked = rng.split(0).sample(x_.rows, options_.batch);
    const auto n = static_cast<int64_t>(picked.size());
    const int64_t width = code_.width(), symbols = code_.symbols();
    double total = 0;
    for (const int64_t r : picked) total += weight_of(r);
    if (!(total > 0)) return;

    Matrix<float> input(n, width), before(n, code_.hidden()), hidden(n, code_.hidden()), logits(n, kChoices * symbols),
        set(n, 2 * symbols), sum(n, width);
    std::vector<double> length(at(n));
    each_row(n,
             [&](int64_t r) { length[at(r)] = normalize(x_.row(picked[at(r)]), code_.channel_scale, input.row(r)); });
    gemm(input, code_.first, true, before);
    add_bias(code_.first_bias, before);
    each_row(n, [&](int64_t r) {
      for (int64_t c = 0; c < hidden.cols; ++c) hidden(r, c) = static_cast<float>(gelu(before(r, c)));
    });
    gemm(hidden, code_.second, true, logits);
    add_bias(code_.second_bias, logits);
    // The draw; logits become softmax(logits + noise).
    const Rng noise = rng.split(1);
    each_row(n, [&](int64_t r) {
      Rng own = noise.split(static_cast<uint64_t>(r));
      for (int64_t s = 0; s < symbols; ++s) {
        float* y = logits.row(r) + kChoices * s;
        for (int c = 0; c < kChoices; ++c) {
          const double uniform = (own.next_u32() + 0.5) * 0x1p-32;
          y[c] -= static_cast<float>(std::log(-std::log(uniform)));
        }
        const int chosen = largest(y);
        set(r, 2 * s) = sets_low(chosen);
        set(r, 2 * s + 1) = sets_high(chosen);
        const float top = y[chosen];
        float all = 0;
        for (int c = 0; c < kChoices; ++c) all += y[c] = std::exp(y[c] - top);
        for (int c = 0; c < kChoices; ++c) y[c] /= all;
      }
    });
    gemm(set, code_.rows, false, sum);

    // Gradient of sum of weight |x - p c u|^2 / (total mean_square), u = sum / |sum|, by `sum`, in its place.
    each_row(n, [&](int64_t r) {
      const int64_t row = picked[at(r)];
      double square = 0, along = 0;
      for (int64_t c = 0; c < width; ++c) square += double{sum(r, c)} * sum(r, c);
      const double size = std::sqrt(square), factor = 2 * weight_of(row) / (total * mean_square_);
      std::vector<double> slope(at(width));
      for (int64_t c = 0; c < width; ++c) {
        const double gain = length[at(r)] * code_.channel_scale[at(c)], u = size > 0 ? sum(r, c) / size : 0;
        slope[at(c)] = factor * gain * (gain * u - x_(row, c));
        along += slope[at(c)] * u;
      }
      for (int64_t c = 0; c < width; ++c)
        sum(r, c) = size > 0 ? static_cast<float>((slope[at(c)] - along * sum(r, c) / size) / size) : 0.0f;
    });
    gradient(4, transposed(set), sum);
    Matrix<float> by_set(n, 2 * symbols);
    gemm(sum, code_.rows, true, by_set);
    each_row(n, [&](int64_t r) {
      for (int64_t s = 0; s < symbols; ++s) {
        float* y = logits.row(r) + kChoices * s;
        const double low = by_set(r, 2 * s), high = by_set(r, 2 * s + 1);
        double mean = 0, by[kChoices];
        for (int c = 0; c < kChoices; ++c) {
          by[c] = (sets_low(c) ? low : 0) + (sets_high(c) ? high : 0);
          mean += y[c] * by[c];
        }
        for (int c = 0; c < kChoices; ++c) y[c] = static_cast<float>(y[c] * (by[c] - mean));
      }
    });
    gradient(2, transposed(logits), hidden);
    moving_[3].gradient = column_sums(logits);
    Matrix<float> by_hidden(n, code_.hidden());
    gemm(logits, code_.second, false, by_hidden);
    each_row(n, [&](int64_t r) {
      for (int64_t c = 0; c < by_hidden.cols; ++c)
        by_hidden(r, c) = static_cast<float>(by_hidden(r, c) * gelu_slope(before(r, c)));
    });
    gradient(0, transposed(by_hidden), input);
    moving_[1].gradient = column_sums(by_hidden);
    update(number);
  }

 private:
  double weight_of(int64_t r) const { return weight_.empty() ? 1.0 : double{weight_[at(r)]}; }

  void gradient(size_t of, const Matrix<float>& across, const Matrix<float>& down) {
    gemm(across, down, false, MutMatrix(moving_[of].gradient.data(), across.rows, down.cols));
  }

  void update(int number) {
    constexpr double kFirst = 0.9, kSecond = 0.95, kDecay = 0.1, kEpsilon = 1e-8, kLongest = 1;
    constexpr int64_t kAtOnce = 4096;
    double square = 0;
    for (const Moving& m : moving_)
      for (const float g : m.gradient) square += double{g} * g;
    const double clip = std::min(1.0, kLongest / (std::sqrt(square) + 1e-30));
    const int warm = std::clamp(options_.steps / 10, 1, 100);
    const double rate =
        options_.learning_rate *
        (number < warm ? (number + 1.0) / warm
                       : 0.5 * (1 + std::cos(std::numbers::pi * (number - warm) / std::max(options_.steps - warm, 1))));
    const double a = 1 - std::pow(kFirst, number + 1), b = 1 - std::pow(kSecond, number + 1);
    for (Moving& m : moving_)
      parallel_chunks(std::ssize(m.gradient), kAtOnce, [&](int64_t begin, int64_t end) {
        for (size_t i = at(begin); i < at(end); ++i) {
          const double g = clip * m.gradient[i];
          m.first[i] = static_cast<float>(kFirst * m.first[i] + (1 - kFirst) * g);
          m.second[i] = static_cast<float>(kSecond * m.second[i] + (1 - kSecond) * g * g);
          const double change = m.first[i] / a / (std::sqrt(m.second[i] / b) + kEpsilon);
          m.value[i] = static_cast<float>(m.value[i] * (1 - rate * kDecay) - rate * change);
        }
      });
  }

  ConstMatrix x_;
  std::span<const float> weight_;
  const BinaryCodeOptions& options_;
  BinaryCode& code_;
  std::vector<Moving> moving_;
  double mean_square_ = 1;
};

struct Spread {
  double mean = 0, deviation = 0;
};

// Of each channel, over rows as code.rows stands for them (over the channel scales and their length), and as the
// network sees them.
struct Spreads {
  std::vector<Spread> row, input;
};
Spreads spreads_of(ConstMatrix x, const std::vector<float>& channel_scale) {
  const int64_t step = std::max<int64_t>(1, x.rows / 8192);
  std::vector<double> sum(at(4 * x.cols), 0.0);
  std::vector<float> input(at(x.cols));
  double n = 0;
  for (int64_t r = 0; r < x.rows; r += step, ++n) {
    const double length = normalize(x.row(r), channel_scale, input.data());
    for (int64_t c = 0; c < x.cols; ++c) {
      const double y = length > 0 ? double{x(r, c)} / channel_scale[at(c)] / length : 0, z = input[at(c)];
      double* own = sum.data() + 4 * c;
      own[0] += y;
      own[1] += y * y;
      own[2] += z;
      own[3] += z * z;
    }
  }
  Spreads out;
  const auto of = [&](double first, double second) {
    return Spread{first / n, std::sqrt(std::max(second / n - first / n * first / n, 1e-12))};
  };
  for (int64_t c = 0; c < x.cols; ++c) {
    const double* own = sum.data() + 4 * c;
    out.row.push_back(of(own[0], own[1]));
    out.input.push_back(of(own[2], own[3]));
  }
  return out;
}

// The network and matrix of the best scalar quantizer of a Gaussian in each channel, of one or two bits: what descent
// begins with. Pairs of hidden units give a channel as it is, GELU(x) - GELU(-x) = x, and the nearest of levels l is
// the largest of l x - l^2 / 2. A sum of rows has no constant of its own, so the last bit of the last channel is one
// that is always set. Layers and matrix hold random numbers; what is beyond two bits keeps them.
void start_scalar(ConstMatrix x, BinaryCode& code) {
  constexpr double kSharp = 20;                   // of logits: 10 apart in the middle of a cell
  constexpr double kOne = 0.7979, kTwo = 0.4979;  // half the distance of levels, in deviations
  const int64_t width = code.width(), symbols = code.symbols();
  if (code.hidden() < 2 * width || 2 * symbols < width) return;
  const bool two = symbols >= width;
  const Spreads spreads = spreads_of(x, code.channel_scale);
  for (int64_t i = 0; i < 2 * width; ++i) {
    std::fill_n(code.first.row(i), width, 0.0f);
    code.first(i, i / 2) = i % 2 == 0 ? 1.0f : -1.0f;
    code.first_bias[at(i)] = 0;
  }
  const int64_t used = two ? width : width / 2, constant = 2 * used - 1;  // symbols, bit
  const double rest = static_cast<double>(2 * (symbols - used));
  for (int64_t b = 2 * used; b < code.rows.rows; ++b)  // small beside what two bits leave
    for (int64_t c = 0; c < width; ++c)
      code.rows(b, c) *=
          static_cast<float>(0.6 * spreads.row[at(c)].deviation * std::sqrt(2.0 * double(symbols) / rest));
  for (int64_t b = 0; b < 2 * used; ++b) std::fill_n(code.rows.row(b), width, 0.0f);
  for (int64_t s = 0; s < used; ++s)
    for (int k = 0; k < kChoices; ++k) {
      float* to = code.second.row(kChoices * s + k);
      std::fill_n(to, 2 * width, 0.0f);
      code.second_bias[at(kChoices * s + k)] =
          2 * s + 1 == constant && !sets_high(k) ? static_cast<float>(-5 * kSharp) : 0.0f;
    }
  for (int64_t c = 0; c < width; ++c) {
    const int64_t s = two ? c : c / 2;
    const bool low = two || c % 2 == 0, high = (two || c % 2 == 1) && 2 * s + 1 != constant;
    const double half = low && high ? kTwo : low || high ? kOne : 0;
    // The level of a choice in deviations: low counts two halves, high of two bits four.
    const double base = -half * ((low ? 1 : 0) + (high ? (two ? 2 : 1) : 0));
    const Spread &row = spreads.row[at(c)], &input = spreads.input[at(c)];
    if (low) code.rows(2 * s, c) = static_cast<float>(2 * half * row.deviation);
    if (high) code.rows(2 * s + 1, c) = static_cast<float>((two ? 4 : 2) * half * row.deviation);
    code.rows(constant, c) = static_cast<float>(row.mean + base * row.deviation);
    for (int k = 0; k < kChoices; ++k) {
      const double in = base + 2 * half * ((low && sets_low(k) ? 1 : 0) + (high && sets_high(k) ? (two ? 2 : 1) : 0));
      // The score of level m + d in is that of m, which all choices share, and d in (x - m) - (d in)^2 / 2.
      const double slope = kSharp * in / std::max(input.deviation, 0.1);
      float* to = code.second.row(kChoices * s + k);
      to[2 * c] += static_cast<float>(slope);
      to[2 * c + 1] -= static_cast<float>(slope);
      code.second_bias[at(kChoices * s + k)] -= static_cast<float>(slope * input.mean + kSharp * in * in / 2);
    }
  }
}

}  // namespace

BinaryCode empty_binary_code(int64_t width, int64_t symbols, int64_t hidden) {
  BinaryCode code;
  code.channel_scale.assign(at(width), 1.0f);
  code.first = Matrix<float>(hidden, width);
  code.first_bias.assign(at(hidden), 0.0f);
  code.second = Matrix<float>(kChoices * symbols, hidden);
  code.second_bias.assign(at(kChoices * symbols), 0.0f);
  code.rows = Matrix<float>(2 * symbols, width);
  return code;
}

BinaryEncoder::BinaryEncoder(BinaryCode code)
    : code_(std::move(code)), first_(code_.first, DType::kF32), second_(code_.second, DType::kF32) {}

void BinaryEncoder::encode_rows(ConstMatrix x, uint16_t* bits, int64_t stride, float* scale) const {
  const int64_t width = code_.width(), symbols = code_.symbols();
  VQKV_CHECK(x.cols == width);
  Matrix<float> input(kRowsAtOnce, width), hidden(kRowsAtOnce, code_.hidden()), logits(kRowsAtOnce, kChoices * symbols);
  std::vector<double> sum(at(width));
  for (int64_t first = 0; first < x.rows; first += kRowsAtOnce) {
    const int64_t n = std::min(kRowsAtOnce, x.rows - first);
    std::vector<double> length(at(n));
    for (int64_t r = 0; r < n; ++r) length[at(r)] = normalize(x.row(first + r), code_.channel_scale, input.row(r));
    const MutMatrix h = hidden.view().slice_rows(0, n), l = logits.view().slice_rows(0, n);
    first_.apply(input.view().slice_rows(0, n), h);
    add_bias(code_.first_bias, h);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < h.cols; ++c) h(r, c) = static_cast<float>(gelu(h(r, c)));
    second_.apply(h, l);
    add_bias(code_.second_bias, l);
    for (int64_t r = 0; r < n; ++r) {
      uint16_t* to = bits + (first + r) * stride;
      std::fill_n(to, (2 * symbols + 7) / 8, uint16_t{0});
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t b = 0; b < 2 * symbols; ++b) {
        const int chosen = largest(l.row(r) + b / 2 * kChoices);
        if (!(b % 2 == 0 ? sets_low(chosen) : sets_high(chosen))) continue;
        to[b / 8] = static_cast<uint16_t>(to[b / 8] | 1 << b % 8);
        for (int64_t c = 0; c < width; ++c) sum[at(c)] += code_.rows(b, c);
      }
      double square = 0;
      for (int64_t c = 0; c < width; ++c) square += std::pow(sum[at(c)] / code_.channel_scale[at(c)], 2);
      scale[first + r] = square > 0 ? static_cast<float>(std::min(length[at(r)] / std::sqrt(square), 3e38)) : 0.0f;
    }
  }
}

BinaryCode train_binary_code(ConstMatrix x, std::span<const float> weight, const BinaryCodeOptions& options,
                             const Rng& rng) {
  VQKV_CHECK(x.rows >= 1 && options.symbols >= 1 && options.hidden >= 1 && options.steps >= 1);
  BinaryCode code = empty_binary_code(x.cols, options.symbols, options.hidden);
  for (int64_t c = 0; c < x.cols; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < x.rows; ++r) sum += std::abs(x(r, c));
    code.channel_scale[at(c)] = static_cast<float>(sum / static_cast<double>(x.rows) + kScaleEpsilon);
  }
  // As the authors', layers start as uniform numbers within 1 / sqrt(inputs), and so does the matrix, but for what
  // start_scalar sets.
  Rng start = rng.split(0);
  const auto fill = [&](auto& values, int64_t inputs) {
    const double bound = 1 / std::sqrt(static_cast<double>(inputs));
    for (float& v : values) v = static_cast<float>(bound * (2 * start.uniform() - 1));
  };
  fill(code.first.storage, x.cols);
  fill(code.first_bias, x.cols);
  fill(code.second.storage, options.hidden);
  fill(code.second_bias, options.hidden);
  fill(code.rows.storage, 2 * options.symbols);
  start_scalar(x, code);
  NetworkDescent descent(x, weight, options, code);
  const Rng steps = rng.split(1);
  for (int i = 0; i < options.steps; ++i) descent.step(i, steps.split(static_cast<uint64_t>(i)));
  float most = 0;
  for (int64_t r = 0; r < code.rows.rows; ++r)
    for (int64_t c = 0; c < x.cols; ++c) most = std::max(most, std::abs(code.rows(r, c) *= code.channel_scale[at(c)]));
  if (most > 0)
    for (float& v : code.rows.storage) v = std::ldexp(v, -std::ilogb(most));
  return code;
}

}  // namespace vqkv
