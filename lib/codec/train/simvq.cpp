#include "codec/train/simvq.h"

#define EIGEN_DONT_PARALLELIZE  // its split over threads would show in the last bits
#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "core/row_products.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

using RowMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct SimVqRows {
  Matrix<float> x;
  std::vector<float> weight;  // or empty
  double of(int64_t r) const { return weight.empty() ? 1.0 : double{weight[static_cast<size_t>(r)]}; }
};

RowMatrix widened(const Matrix<float>& m) {
  return Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(m.data(), m.rows,
                                                                                                 m.cols)
      .cast<double>();
}

constexpr int64_t kMomentRows = 64;  // whose outer products are summed together

// The start of a stage: a layer that gives the codewords 0.36 of the residual's covariance around its mean.
SimVqStage start_of(const Matrix<float>& rest, const SimVqRows& rows, uint64_t seed) {
  const int64_t width = rest.cols;
  SimVqStage stage;
  stage.seed = seed;
  stage.linear = Matrix<float>(width, width);
  stage.bias.assign(static_cast<size_t>(width), 0.0f);
  Eigen::VectorXd mean = Eigen::VectorXd::Zero(width);
  RowMatrix moment = RowMatrix::Zero(width, width);
  double total = 0;
  for (int64_t first = 0; first < rest.rows; first += kMomentRows) {
    const int64_t count = std::min(kMomentRows, rest.rows - first);
    RowMatrix v(count, width);
    Eigen::VectorXd w(count);
    for (int64_t r = 0; r < count; ++r) {
      v.row(r) = Eigen::Map<const Eigen::RowVectorXf>(rest.row(first + r), width).cast<double>();
      w(r) = rows.of(first + r);
      total += w(r);
      mean += w(r) * v.row(r).transpose();
    }
    add_outer_products(v.data(), w.data(), count, width, moment.data());
  }
  if (total <= 0) return stage;
  mean /= total;
  RowMatrix covariance = moment.selfadjointView<Eigen::Lower>();
  covariance = covariance / total - mean * mean.transpose();
  covariance.diagonal().array() += 1e-6 * std::max(covariance.trace(), 0.0) / static_cast<double>(width) + 1e-30;
  const Eigen::LLT<Eigen::MatrixXd> factor{Eigen::MatrixXd(covariance)};
  if (factor.info() == Eigen::Success) {
    const Eigen::MatrixXd lower = factor.matrixL();
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j < width; ++j)
        stage.linear(i, j) = static_cast<float>(0.6 * std::sqrt(static_cast<double>(width)) * lower(i, j));
  }
  for (int64_t i = 0; i < width; ++i) stage.bias[static_cast<size_t>(i)] = static_cast<float>(mean(i));
  return stage;
}

double weighted_sum(const std::vector<float>& values, const SimVqRows& rows) {
  double sum = 0;
  for (size_t r = 0; r < values.size(); ++r) sum += values[r] * rows.of(static_cast<int64_t>(r));
  return sum;
}

void subtract(const Matrix<float>& book, const std::vector<int32_t>& index, Matrix<float>& rest) {
  for (int64_t r = 0; r < rest.rows; ++r) {
    const float* c = book.row(index[static_cast<size_t>(r)]);
    for (int64_t k = 0; k < rest.cols; ++k) rest(r, k) -= c[k];
  }
}

// The layer that fits the rows best, given their codewords: (A + ridge) L = B with one row a codeword and a 1 for the
// bias.
void solve(const Matrix<float>& rest, const SimVqRows& rows, const std::vector<int32_t>& index, const RowMatrix& base,
           SimVqStage& stage) {
  const int64_t width = rest.cols, entries = base.rows();
  Eigen::VectorXd count = Eigen::VectorXd::Zero(entries);
  RowMatrix sum = RowMatrix::Zero(entries, width);
  for (int64_t r = 0; r < rest.rows; ++r) {
    const int32_t j = index[static_cast<size_t>(r)];
    const double w = rows.of(r);
    count(j) += w;
    double* to = sum.data() + j * width;
    const float* from = rest.row(r);
    for (int64_t k = 0; k < width; ++k) to[k] += w * from[k];
  }
  const RowMatrix scaled = count.asDiagonal() * base;
  Eigen::MatrixXd a = base.transpose() * scaled;  // (width + 1, width + 1)
  const Eigen::MatrixXd b = base.transpose() * sum;
  a.diagonal().array() += 1e-8 * a.trace() + 1e-30;
  const Eigen::MatrixXd layer = a.llt().solve(b);
  if (!layer.allFinite()) return;  // no data to speak of: the layer stays
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < width; ++j) stage.linear(i, j) = static_cast<float>(layer(j, i));
    stage.bias[static_cast<size_t>(i)] = static_cast<float>(layer(width, i));
  }
}

RowMatrix with_ones(const Matrix<float>& base) {
  RowMatrix out(base.rows, base.cols + 1);
  out.leftCols(base.cols) = widened(base);
  out.rightCols(1).setOnes();
  return out;
}

// base: the frozen matrix of the stage, with ones. Drawing it costs more than all else here.
Matrix<float> codewords_of(const SimVqStage& stage, const RowMatrix& base) {
  const int64_t width = stage.linear.rows;
  const RowMatrix product = base.leftCols(width) * widened(stage.linear).transpose();
  Matrix<float> out(base.rows(), width);
  for (int64_t s = 0; s < out.rows; ++s)
    for (int64_t k = 0; k < width; ++k)
      out(s, k) = static_cast<float>(product(s, k) + stage.bias[static_cast<size_t>(k)]);
  return out;
}

double variance_of_rows(const SimVqRows& rows) {
  const int64_t width = rows.x.cols;
  Eigen::VectorXd mean = Eigen::VectorXd::Zero(width);
  double total = 0, square = 0;
  for (int64_t r = 0; r < rows.x.rows; ++r) {
    const Eigen::VectorXd v = Eigen::Map<const Eigen::VectorXf>(rows.x.row(r), width).cast<double>();
    total += rows.of(r);
    mean += rows.of(r) * v;
    square += rows.of(r) * v.squaredNorm();
  }
  return total > 0 ? std::max(square - mean.squaredNorm() / total, 1e-30) : 1e-30;
}

// Adam on the layers of all stages. The gradient of a codeword is that of |x - sum|^2 + beta |residual - codeword|^2,
// with the residual held fixed; its sums over the rows of each codeword are all that a layer needs.
class BookDescent {
 public:
  BookDescent(const SimVqRows& rows, const SimVqOptions& options, std::vector<SimVqStage>& stages)
      : rows_(rows), options_(options), stages_(stages), first_(stages.size()), second_(stages.size()) {
    const int64_t width = rows.x.cols;
    for (size_t i = 0; i < stages.size(); ++i) {
      first_[i] = second_[i] = RowMatrix::Zero(width, width + 1);
      base_.push_back(with_ones(simvq_base(stages[i].seed, options.entries, width)));
    }
  }

  void step(Rng& rng) {
    ++steps_;
    const std::vector<int64_t> picked = rng.sample(rows_.x.rows, options_.batch);
    const auto n = static_cast<int64_t>(picked.size()), width = rows_.x.cols;
    Matrix<float> rest(n, width);
    double total = 0;
    for (int64_t r = 0; r < n; ++r) {
      std::copy_n(rows_.x.row(picked[static_cast<size_t>(r)]), width, rest.row(r));
      total += rows_.of(picked[static_cast<size_t>(r)]);
    }
    if (total <= 0) return;
    const size_t count = stages_.size();
    std::vector<std::vector<int32_t>> index(count);
    std::vector<RowMatrix> own(count);  // per codeword sums of (codeword - residual)
    for (size_t i = 0; i < count; ++i) {
      const Matrix<float> book = codewords(i);
      index[i].resize(static_cast<size_t>(n));
      Assigner(book).assign(rest, index[i].data());
      subtract(book, index[i], rest);  // now residual - codeword
      own[i] = sums(rest, picked, index[i]);
    }
    parallel_for(static_cast<int64_t>(count), [&](int64_t at) {
      const auto i = static_cast<size_t>(at);
      // `rest` is x - sum of all stages by now.
      const RowMatrix g = sums(rest, picked, index[i]) + options_.beta * own[i];
      const RowMatrix gradient =
          (-2.0 / (total * static_cast<double>(width))) * (g.transpose() * base_[i]);  // (width, width + 1)
      update(i, gradient);
    });
  }

  Matrix<float> codewords(size_t stage) const { return codewords_of(stages_[stage], base_[stage]); }

 private:
  RowMatrix sums(const Matrix<float>& values, const std::vector<int64_t>& picked,
                 const std::vector<int32_t>& index) const {
    RowMatrix out = RowMatrix::Zero(options_.entries, values.cols);
    for (int64_t r = 0; r < values.rows; ++r) {
      const double w = rows_.of(picked[static_cast<size_t>(r)]);
      double* to = out.data() + index[static_cast<size_t>(r)] * values.cols;
      for (int64_t k = 0; k < values.cols; ++k) to[k] += w * values(r, k);
    }
    return out;
  }

  void update(size_t i, const RowMatrix& gradient) {
    first_[i] = 0.9 * first_[i] + 0.1 * gradient;
    second_[i] = 0.999 * second_[i] + 0.001 * gradient.cwiseProduct(gradient);
    const double a = 1 - std::pow(0.9, steps_), b = 1 - std::pow(0.999, steps_);
    const int64_t width = gradient.rows();
    for (int64_t r = 0; r < width; ++r)
      for (int64_t c = 0; c <= width; ++c) {
        const double change = options_.learning_rate * (first_[i](r, c) / a) / (std::sqrt(second_[i](r, c) / b) + 1e-8);
        float& value = c < width ? stages_[i].linear(r, c) : stages_[i].bias[static_cast<size_t>(r)];
        value = static_cast<float>(value - change);
      }
  }

  const SimVqRows& rows_;
  const SimVqOptions& options_;
  std::vector<SimVqStage>& stages_;
  std::vector<RowMatrix> base_;            // (entries, width + 1), last column 1
  std::vector<RowMatrix> first_, second_;  // Adam's moments, (width, width + 1)
  int steps_ = 0;
};

}  // namespace

Matrix<float> simvq_base(uint64_t seed, int64_t entries, int64_t width) {
  Matrix<float> base(entries, width);
  Rng rng(seed);
  const double scale = 1 / std::sqrt(static_cast<double>(width));
  for (float& v : base.storage) v = static_cast<float>(scale * rng.normal());
  return base;
}

Matrix<float> simvq_codewords(const SimVqStage& stage, int64_t entries) {
  return codewords_of(stage, with_ones(simvq_base(stage.seed, entries, stage.linear.rows)));
}

SimVqTraining train_simvq(ConstMatrix x, std::span<const float> weight, const SimVqOptions& options, const Rng& rng) {
  VQKV_CHECK(x.rows >= 1 && options.stages >= 1 && options.rounds >= 1);
  SimVqRows rows;
  Rng sampler = rng.split(0);
  const std::vector<int64_t> picked = sampler.sample(x.rows, options.entries * options.points_per_codeword);
  rows.x = Matrix<float>(static_cast<int64_t>(picked.size()), x.cols);
  for (size_t r = 0; r < picked.size(); ++r) {
    std::copy_n(x.row(picked[r]), x.cols, rows.x.row(static_cast<int64_t>(r)));
    if (!weight.empty()) rows.weight.push_back(weight[static_cast<size_t>(picked[r])]);
  }
  const double variance = variance_of_rows(rows);

  SimVqTraining result;
  std::vector<Matrix<float>> books;
  result.vectors = rows.x.rows;
  Matrix<float> rest = rows.x;
  std::vector<int32_t> index(static_cast<size_t>(rest.rows));
  std::vector<float> error(index.size());
  for (int i = 0; i < options.stages; ++i) {
    SimVqStage stage = start_of(rest, rows, rng.split(1 + static_cast<uint64_t>(i)).key());
    const RowMatrix base = with_ones(simvq_base(stage.seed, options.entries, x.cols));
    Matrix<float> book = codewords_of(stage, base);
    if (!options.sgd) {
      double last = 0;
      for (int round = 0; round < options.rounds; ++round) {
        Assigner(book).assign(rest, index.data(), error.data());
        ++result.iterations;
        const double now = weighted_sum(error, rows);
        if (round > 0 && now >= last * (1 - 1e-4)) break;  // converged: the rest of the rounds gains under 1e-4 each
        last = now;
        solve(rest, rows, index, base, stage);
        book = codewords_of(stage, base);
      }
    }
    round_codewords(options.sgd ? DType::kF32 : options.stored_as, book);
    Assigner(book).assign(rest, index.data(), error.data());
    subtract(book, index, rest);
    result.curve.push_back(weighted_sum(error, rows) / variance);
    result.stages.push_back(std::move(stage));
    books.push_back(std::move(book));
  }
  if (options.sgd) {
    BookDescent descent(rows, options, result.stages);
    Rng batches = rng.split(UINT64_MAX);
    for (int step = 0; step < options.steps; ++step) descent.step(batches);
    result.iterations = options.steps;
    for (size_t i = 0; i < books.size(); ++i) {
      books[i] = descent.codewords(i);
      round_codewords(options.stored_as, books[i]);
    }
  }
  result.quantizer = ResidualQuantizer(std::move(books), options.beam);
  if (options.sgd) {
    std::vector<uint16_t> codes(static_cast<size_t>(rows.x.rows * options.stages));
    result.quantizer.encode(rows.x, codes.data(), error.data());
    result.curve.push_back(weighted_sum(error, rows) / variance);
  }
  return result;
}

}  // namespace vqkv
