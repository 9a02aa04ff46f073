#include "codec/train/residual.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "codec/train/beam.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {
constexpr int64_t kResidualTile = 64;
constexpr int64_t kResidualChunk = 512;
}  // namespace

struct ResidualQuantizer::Impl {
  std::vector<Matrix<float>> books;
  std::vector<Assigner> assigners;  // greedy
  std::optional<BeamEncoder> beam;
};

ResidualQuantizer::ResidualQuantizer(std::vector<Matrix<float>> books, int beam) {
  VQKV_CHECK(!books.empty() && beam >= 1);
  auto impl = std::make_shared<Impl>();
  impl->books = std::move(books);
  if (beam > 1 && impl->books.size() > 1) {
    impl->beam.emplace(impl->books, beam);
  } else {
    for (const auto& book : impl->books) impl->assigners.emplace_back(book);
  }
  impl_ = std::move(impl);
}

int ResidualQuantizer::stages() const { return impl_ ? static_cast<int>(impl_->books.size()) : 0; }
int64_t ResidualQuantizer::entries() const { return impl_->books[0].rows; }
int64_t ResidualQuantizer::width() const { return impl_->books[0].cols; }
const std::vector<Matrix<float>>& ResidualQuantizer::books() const { return impl_->books; }

void ResidualQuantizer::encode_rows(ConstMatrix x, uint16_t* codes, int64_t row_stride, int64_t stage_stride,
                                    float* error) const {
  VQKV_CHECK(impl_ && x.cols == width());
  const int64_t columns = width();
  thread_local AlignedVector<float> rest;
  rest.resize(static_cast<size_t>(kResidualTile * columns));
  const MutMatrix residual(rest.data(), kResidualTile, columns);
  int32_t index[kResidualTile];
  for (int64_t first = 0; first < x.rows; first += kResidualTile) {
    const int64_t rows = std::min(kResidualTile, x.rows - first);
    const ConstMatrix tile = x.slice_rows(first, rows);
    uint16_t* out = codes + first * row_stride;
    if (impl_->beam) {
      impl_->beam->encode_rows(tile, out, row_stride, stage_stride);
    } else {
      ConstMatrix input = tile;
      for (size_t i = 0; i < impl_->books.size(); ++i) {
        impl_->assigners[i].assign_rows(input, index);
        for (int64_t r = 0; r < rows; ++r)
          out[r * row_stride + static_cast<int64_t>(i) * stage_stride] = static_cast<uint16_t>(index[r]);
        if (i + 1 == impl_->books.size()) break;
        for (int64_t r = 0; r < rows; ++r) {
          const float* c = impl_->books[i].row(index[r]);
          const float* from = input.row(r);
          float* to = residual.row(r);
          for (int64_t k = 0; k < columns; ++k) to[k] = from[k] - c[k];
        }
        input = ConstMatrix(residual).slice_rows(0, rows);
      }
    }
    if (!error) continue;
    const MutMatrix decoded = residual.slice_rows(0, rows);
    std::fill_n(decoded.data, rows * columns, 0.0f);
    add_decoded(out, row_stride, stage_stride, stages(), decoded);
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t k = 0; k < columns; ++k)
        sum += (double{tile(r, k)} - decoded(r, k)) * (double{tile(r, k)} - decoded(r, k));
      error[first + r] = static_cast<float>(sum);
    }
  }
}

void ResidualQuantizer::encode(ConstMatrix x, uint16_t* codes, float* error) const {
  const int64_t count = stages();
  parallel_chunks(x.rows, kResidualChunk, [&](int64_t first, int64_t end) {
    encode_rows(x.slice_rows(first, end - first), codes + first * count, count, 1, error ? error + first : nullptr);
  });
}

void ResidualQuantizer::add_decoded(const uint16_t* codes, int64_t row_stride, int64_t stage_stride, int stages_used,
                                    MutMatrix y) const {
  for (int64_t r = 0; r < y.rows; ++r)
    for (int i = 0; i < stages_used; ++i) {
      const float* c = impl_->books[static_cast<size_t>(i)].row(codes[r * row_stride + i * stage_stride]);
      float* out = y.row(r);
      for (int64_t k = 0; k < y.cols; ++k) out[k] += c[k];
    }
}

void round_codewords(DType stored_as, Matrix<float>& codewords) {
  round_to(stored_as, codewords.data(), static_cast<int64_t>(codewords.storage.size()));
  for (const float v : codewords.storage)
    if (!std::isfinite(v))
      fail_data(fmt::format("a codeword leaves the range of {}; store codewords as bf16 or f32 (stored_as)",
                            dtype_name(stored_as)));
}

namespace {

// Sums in row order and in double: the same at any thread count.
double weighted_sum(const std::vector<float>& values, std::span<const float> weight) {
  double sum = 0;
  for (size_t r = 0; r < values.size(); ++r) sum += double{values[r]} * (weight.empty() ? 1.0 : double{weight[r]});
  return sum;
}

// Total weighted squared distance of the rows to their mean.
double spread(ConstMatrix x, std::span<const float> weight) {
  std::vector<double> mean(static_cast<size_t>(x.cols), 0.0), squares(mean);
  const auto weight_of = [&](int64_t r) { return weight.empty() ? 1.0 : double{weight[static_cast<size_t>(r)]}; };
  double total = 0;
  for (int64_t r = 0; r < x.rows; ++r) {
    const double w = weight_of(r);
    total += w;
    for (int64_t k = 0; k < x.cols; ++k) mean[static_cast<size_t>(k)] += w * x(r, k);
  }
  if (total <= 0) return 0;
  for (double& m : mean) m /= total;
  for (int64_t r = 0; r < x.rows; ++r) {
    const double w = weight_of(r);
    for (int64_t k = 0; k < x.cols; ++k) {
      const double d = x(r, k) - mean[static_cast<size_t>(k)];
      squares[static_cast<size_t>(k)] += w * d * d;
    }
  }
  return std::accumulate(squares.begin(), squares.end(), 0.0);
}

// rest -= or += the codewords that the rows chose at one stage.
void shift(const Matrix<float>& book, const std::vector<uint16_t>& codes, int64_t stages, int64_t stage, float sign,
           Matrix<float>& rest) {
  parallel_chunks(rest.rows, kResidualChunk, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) {
      const float* c = book.row(codes[static_cast<size_t>(r * stages + stage)]);
      float* out = rest.row(r);
      for (int64_t k = 0; k < rest.cols; ++k) out[k] += sign * c[k];
    }
  });
}

// One sweep of least squares over the stages; codes stay fixed.
void refit(ConstMatrix x, std::span<const float> weight, const std::vector<uint16_t>& codes, DType stored_as,
           std::vector<Matrix<float>>& books) {
  const auto stages = static_cast<int64_t>(books.size());
  Matrix<float> rest(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, rest.row(r));
  for (int64_t i = 0; i < stages; ++i) shift(books[static_cast<size_t>(i)], codes, stages, i, -1.0f, rest);
  for (int64_t i = 0; i < stages; ++i) {
    Matrix<float>& book = books[static_cast<size_t>(i)];
    shift(book, codes, stages, i, 1.0f, rest);
    Matrix<double> sum(book.rows, book.cols);
    std::vector<double> mass(static_cast<size_t>(book.rows), 0.0);
    for (int64_t r = 0; r < x.rows; ++r) {
      const uint16_t code = codes[static_cast<size_t>(r * stages + i)];
      const double w = weight.empty() ? 1.0 : double{weight[static_cast<size_t>(r)]};
      mass[code] += w;
      for (int64_t k = 0; k < x.cols; ++k) sum(code, k) += w * rest(r, k);
    }
    for (int64_t s = 0; s < book.rows; ++s)
      if (mass[static_cast<size_t>(s)] > 0)  // a codeword that nobody chose stays where it is
        for (int64_t k = 0; k < book.cols; ++k)
          book(s, k) = static_cast<float>(sum(s, k) / mass[static_cast<size_t>(s)]);
    round_codewords(stored_as, book);
    shift(book, codes, stages, i, -1.0f, rest);
  }
}

}  // namespace

ResidualTraining train_residual(ConstMatrix x, std::span<const float> weight, const ResidualOptions& options,
                                const Rng& rng) {
  VQKV_CHECK(options.stages >= 1 && x.rows >= 1);
  ResidualTraining result;
  const double variance = std::max(spread(x, weight), 1e-30);
  Matrix<float> rest(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, rest.row(r));

  std::vector<Matrix<float>> books;
  std::vector<float> error(static_cast<size_t>(x.rows));
  std::vector<uint16_t> codes(static_cast<size_t>(x.rows * options.stages));
  for (int i = 0; i < options.stages; ++i) {
    KmeansResult stage = kmeans(rest, weight, options.entries, options.kmeans, rng.split(static_cast<uint64_t>(i)));
    round_codewords(options.stored_as, stage.codewords);
    result.vectors = std::max(result.vectors, stage.points);
    result.iterations += stage.iterations;
    result.repeated += stage.repeated;
    std::vector<int32_t> index(static_cast<size_t>(x.rows));
    Assigner(stage.codewords).assign(rest, index.data(), error.data());
    result.curve.push_back(weighted_sum(error, weight) / variance);
    if (i + 1 < options.stages) {
      for (int64_t r = 0; r < x.rows; ++r)
        codes[static_cast<size_t>(r * options.stages + i)] = static_cast<uint16_t>(index[static_cast<size_t>(r)]);
      shift(stage.codewords, codes, options.stages, i, -1.0f, rest);
    }
    books.push_back(std::move(stage.codewords));
  }

  result.quantizer = ResidualQuantizer(books, options.beam);
  if (options.stages == 1 || options.refine == 0) return result;
  result.quantizer.encode(x, codes.data(), error.data());
  double best = weighted_sum(error, weight);
  for (int sweep = 0; sweep < options.refine; ++sweep) {
    refit(x, weight, codes, options.stored_as, books);
    const ResidualQuantizer candidate(books, options.beam);
    candidate.encode(x, codes.data(), error.data());
    ++result.iterations;
    const double now = weighted_sum(error, weight);
    result.curve.push_back(now / variance);
    // Encoding is a search, not a minimum: a sweep may lose.
    if (now < best) {
      best = now;
      result.quantizer = candidate;
    }
  }
  return result;
}

}  // namespace vqkv
