#include "codec/train/commvq.h"

#define EIGEN_DONT_PARALLELIZE  // its split over threads would show in the last bits
#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <complex>

#include "codec/train/residual.h"
#include "core/gemm.h"
#include "core/index.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

constexpr int64_t kTileRows = 64;

struct Rows {
  Matrix<float> x;
  std::vector<float> weight;       // or empty
  std::vector<double> importance;  // of a row's error
  double weight_of(int64_t r) const { return weight.empty() ? 1.0 : double{weight[at(r)]}; }
};

// x and -i x of a tile with its scores.
struct Tile {
  Matrix<float> turned, u, v;
  Tile(const PairSearch& book)
      : turned(kTileRows, book.width()), u(kTileRows, book.stride()), v(kTileRows, book.stride()) {}
  void fill(const PairSearch& book, ConstMatrix x) {
    book.scores(x, turned.view().slice_rows(0, x.rows), u.view().slice_rows(0, x.rows), v.view().slice_rows(0, x.rows));
  }
};

double squared_norm(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  return sum;
}

void add_scaled(double factor, const float* x, int64_t n, double* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

// Adds one row with its marginals.
void add_row(const std::vector<double>& rho, const std::vector<double>& kappa, const float* x, const float* turned,
             PairSums& sums) {
  for (int64_t a = 0; a < sums.sum.rows; ++a) {
    if (rho[at(a)] > 0) add_scaled(rho[at(a)], x, sums.sum.cols, sums.sum.row(a));
    if (kappa[at(a)] > 0) add_scaled(kappa[at(a)], turned, sums.sum.cols, sums.sum.row(a));
  }
}

// Runs of rows whose sums are made apart and added up in order: few, so that they stay small beside the rows.
struct RowRuns {
  explicit RowRuns(int64_t rows)
      : length(std::max<int64_t>(256, (rows + 63) / 64)), count((rows + length - 1) / length) {}
  int64_t length, count;
};

struct Expectation {
  PairSums sums;
  double error = 0;  // of the nearest pairs, by importance
};

// Of responsibilities at `temperature`; 0: the error alone.
Expectation expect(const Rows& rows, const PairSearch& book, double temperature) {
  const int64_t width = rows.x.cols, entries = book.entries();
  const RowRuns runs(rows.x.rows);
  std::vector<Expectation> part(at(runs.count), {PairSums(entries, width), 0});
  parallel_for(runs.count, [&](int64_t run) {
    Expectation& own = part[at(run)];
    Tile tile(book);
    PairSearch::Shares near;
    std::vector<double> rho(at(entries)), kappa(at(entries));
    const int64_t end = std::min(rows.x.rows, (run + 1) * runs.length);
    for (int64_t first = run * runs.length; first < end; first += kTileRows) {
      const ConstMatrix x = rows.x.view().slice_rows(first, std::min(kTileRows, end - first));
      tile.fill(book, x);
      for (int64_t r = 0; r < x.rows; ++r) {
        const float *u = tile.u.row(r), *v = tile.v.row(r);
        const auto norm = static_cast<float>(squared_norm(x.row(r), width));
        const float square = std::max(0.0f, norm + book.nearest(u, v).score);
        own.error += rows.importance[at(first + r)] * double{square};
        if (temperature <= 0) continue;
        book.shares(u, v, norm, std::sqrt(square), static_cast<float>(temperature), near);
        book.add(near, rows.weight_of(first + r), own.sums.count.data(), own.sums.count.cols, rho.data(), kappa.data());
        add_row(rho, kappa, x.row(r), tile.turned.row(r), own.sums);
      }
    }
  });
  for (size_t i = 1; i < part.size(); ++i) {
    part[0].sums += part[i].sums;
    part[0].error += part[i].error;
  }
  return part[0];
}

Matrix<float> narrowed(const Matrix<double>& m) {
  Matrix<float> out(m.rows, m.cols);
  std::copy(m.storage.begin(), m.storage.end(), out.storage.begin());
  return out;
}

// The book after one soft assignment, at temperature 1, to entries^2 rows drawn at random.
Matrix<float> start_of(const Rows& rows, const CommVqOptions& options, Rng rng) {
  const int64_t width = rows.x.cols, pairs = options.entries * options.entries;
  Matrix<float> centre(pairs, width);
  std::vector<float> centre_norm;
  for (int64_t c = 0; c < pairs; ++c) {
    std::copy_n(rows.x.row(static_cast<int64_t>(rng.below(static_cast<uint64_t>(rows.x.rows)))), width, centre.row(c));
    centre_norm.push_back(static_cast<float>(squared_norm(centre.row(c), width)));
  }
  const std::vector<int64_t> picked = rng.sample(rows.x.rows, options.start_points);
  PairSums sums(options.entries, width);
  std::vector<double> rho(at(options.entries)), kappa(rho);
  Matrix<float> product, x, turned(1, width);
  std::vector<float> p(at(pairs));
  for (size_t first = 0; first < picked.size(); first += at(kTileRows)) {
    const int64_t count = std::min<int64_t>(kTileRows, static_cast<int64_t>(picked.size() - first));
    x.reshape(count, width);
    product.reshape(count, pairs);
    for (int64_t r = 0; r < count; ++r) std::copy_n(rows.x.row(picked[first + at(r)]), width, x.row(r));
    gemm(x, centre, true, product);
    for (int64_t r = 0; r < count; ++r) {
      const auto norm = static_cast<float>(squared_norm(x.row(r), width));
      double total = 0;
      for (int64_t c = 0; c < pairs; ++c) {  // distances near the rows' own length: no shift is needed
        p[at(c)] = std::exp(-std::sqrt(std::max(0.0f, norm + centre_norm[at(c)] - 2 * product(r, c))));
        total += p[at(c)];
      }
      if (!(total > 0)) continue;
      std::fill(rho.begin(), rho.end(), 0.0);
      std::fill(kappa.begin(), kappa.end(), 0.0);
      const double weight = rows.weight_of(picked[first + at(r)]);
      for (int64_t a = 0; a < options.entries; ++a)
        for (int64_t b = 0; b < options.entries; ++b) {
          const double share = weight * (p[at(a * options.entries + b)] / total);
          sums.count(a, b) += share;
          rho[at(a)] += share;
          kappa[at(b)] += share;
        }
      for (int64_t i = 0; i < width / 2; ++i) {
        turned(0, i) = x(r, width / 2 + i);
        turned(0, width / 2 + i) = -x(r, i);
      }
      add_row(rho, kappa, x.row(r), turned.row(0), sums);
    }
  }
  return narrowed(solve_pairs(sums));
}

double variance_of(const Rows& rows) {
  const int64_t width = rows.x.cols;
  std::vector<double> mean(at(width), 0.0);
  double total = 0, square = 0;
  for (int64_t r = 0; r < rows.x.rows; ++r) {
    const double w = rows.importance[at(r)];
    total += w;
    square += w * squared_norm(rows.x.row(r), width);
    add_scaled(w, rows.x.row(r), width, mean.data());
  }
  for (const double m : mean) square -= m * m / std::max(total, 1e-300);
  return std::max(square, 1e-30 * std::max(total, 1e-30));
}

// Rounds a book to multiples of `step`.
void round_to_step(double step, Matrix<float>& book) {
  for (float& v : book.storage) v = static_cast<float>(std::nearbyint(double{v} / step) * step);
}

// The step of all stages of a code, from its first book: a power of two, 512 to 1,024 to the largest number there.
double common_step(const Matrix<float>& book) {
  float most = 0x1p-14f;  // steps of 2^-24, the smallest number of f16
  for (const float v : book.storage) most = std::max(most, std::abs(v));
  return std::exp2(std::ceil(std::log2(double{most})) - 10);
}

// One stage on what is left; its books are not rounded.
Matrix<float> train_stage(const Rows& rest, int stage, const CommVqOptions& options, const Rng& rng,
                          int64_t& iterations) {
  constexpr double kHot = 1e-3, kCold = 1e-5, kStall = 1e-5;
  const double unit = std::pow(10.0, -((stage + 3) / 4));
  Matrix<float> book = start_of(rest, options, rng), best;
  double least = 0;
  for (int step = 0; step <= options.steps; ++step) {
    const double along = options.steps > 1 ? static_cast<double>(step) / (options.steps - 1) : 0;
    const bool last = step == options.steps;  // which looks at the error of the book before it alone
    const Expectation e = expect(rest, PairSearch(book), last ? 0 : unit * kHot * std::pow(kCold / kHot, along));
    if (best.rows == 0 || e.error < least) {
      best = book;
      least = e.error;
    } else if (e.error <= least * (1 + kStall)) {
      break;
    }
    if (last) break;
    ++iterations;
    book = narrowed(solve_pairs(e.sums));
  }
  return best;
}

}  // namespace

PairQuantizer::PairQuantizer(std::vector<Matrix<float>> books) {
  VQKV_CHECK(!books.empty());
  auto stages = std::make_shared<std::vector<PairSearch>>();
  for (Matrix<float>& book : books) stages->emplace_back(std::move(book));
  stages_ = std::move(stages);
}

void PairQuantizer::encode_rows(ConstMatrix x, uint16_t* a, uint16_t* b, int64_t row_stride,
                                int64_t stage_stride) const {
  Tile tile(stage(0));
  Matrix<float> rest(kTileRows, x.cols);
  for (int64_t first = 0; first < x.rows; first += kTileRows) {
    const MutMatrix part = rest.view().slice_rows(0, std::min(kTileRows, x.rows - first));
    for (int64_t r = 0; r < part.rows; ++r) std::copy_n(x.row(first + r), x.cols, part.row(r));
    for (int i = 0; i < stages(); ++i) {
      tile.fill(stage(i), part);
      for (int64_t r = 0; r < part.rows; ++r) {
        const PairSearch::Pair pair = stage(i).nearest(tile.u.row(r), tile.v.row(r));
        const int64_t to = (first + r) * row_stride + i * stage_stride;
        a[to] = static_cast<uint16_t>(pair.a);
        b[to] = static_cast<uint16_t>(pair.b);
        stage(i).subtract(pair, part.row(r));
      }
    }
  }
}

void PairSums::operator+=(const PairSums& o) {
  for (size_t i = 0; i < count.storage.size(); ++i) count.storage[i] += o.count.storage[i];
  for (size_t i = 0; i < sum.storage.size(); ++i) sum.storage[i] += o.sum.storage[i];
}

Matrix<double> solve_pairs(const PairSums& sums, double ridge) {
  using Complex = std::complex<double>;
  using Dense = Eigen::Matrix<Complex, Eigen::Dynamic, Eigen::Dynamic>;
  const int64_t entries = sums.count.rows, half = sums.sum.cols / 2;
  Dense h = Dense::Zero(entries, entries), b(entries, half);
  for (int64_t i = 0; i < entries; ++i) {
    for (int64_t j = 0; j < entries; ++j) {
      h(i, i) += sums.count(i, j) + sums.count(j, i);
      h(i, j) += Complex(0, sums.count(i, j) - sums.count(j, i));
    }
    for (int64_t p = 0; p < half; ++p) b(i, p) = Complex(sums.sum(i, p), sums.sum(i, half + p));
  }
  const double mean = h.diagonal().real().sum() / static_cast<double>(entries);
  h.diagonal().array() += ridge * mean + 1e-300;
  const Dense z = h.llt().solve(b);
  Matrix<double> out(entries, 2 * half);
  for (int64_t i = 0; i < entries; ++i)
    for (int64_t p = 0; p < half; ++p) {
      out(i, p) = z(i, p).real();
      out(i, half + p) = z(i, p).imag();
    }
  return out;
}

CommVqTraining train_commvq(ConstMatrix x, std::span<const float> weight, std::span<const float> scale,
                            const CommVqOptions& options, const Rng& rng) {
  VQKV_CHECK(x.rows >= 1 && options.stages >= 1 && options.steps >= 1 && static_cast<int64_t>(scale.size()) == x.rows);
  const std::vector<int64_t> picked = rng.split(0).sample(x.rows, options.points);
  Rows rest;
  rest.x = Matrix<float>(static_cast<int64_t>(picked.size()), x.cols);
  for (size_t r = 0; r < picked.size(); ++r) {
    const int64_t row = picked[r];
    std::copy_n(x.row(row), x.cols, rest.x.row(static_cast<int64_t>(r)));
    if (!weight.empty()) rest.weight.push_back(weight[at(row)]);
    const double w = weight.empty() ? 1.0 : double{weight[at(row)]};
    rest.importance.push_back(w * scale[at(row)] * scale[at(row)]);
  }
  CommVqTraining result;
  result.vectors = rest.x.rows;
  const double variance = variance_of(rest);
  std::vector<Matrix<float>> books;
  double step = 0;
  for (int i = 0; i < options.stages; ++i) {
    Matrix<float> book = train_stage(rest, i, options, rng.split(1 + static_cast<uint64_t>(i)), result.iterations);
    if (i == 0) step = common_step(book);
    if (options.stored_as != DType::kBF16) round_to_step(step, book);  // of 8 bits, which no common step serves
    round_codewords(options.stored_as, book);
    const PairSearch search(book);
    const RowRuns runs(rest.x.rows);
    std::vector<double> error(at(runs.count), 0.0);
    parallel_for(runs.count, [&](int64_t run) {
      Tile tile(search);
      const int64_t end = std::min(rest.x.rows, (run + 1) * runs.length);
      for (int64_t first = run * runs.length; first < end; first += kTileRows) {
        const MutMatrix part = rest.x.view().slice_rows(first, std::min(kTileRows, end - first));
        tile.fill(search, part);
        for (int64_t r = 0; r < part.rows; ++r) {
          search.subtract(search.nearest(tile.u.row(r), tile.v.row(r)), part.row(r));
          error[at(run)] += double{rest.importance[at(first + r)]} * squared_norm(part.row(r), part.cols);
        }
      }
    });
    double sum = 0;
    for (const double e : error) sum += e;
    result.curve.push_back(sum / variance);
    books.push_back(std::move(book));
  }
  result.quantizer = PairQuantizer(std::move(books));
  return result;
}

}  // namespace vqkv
