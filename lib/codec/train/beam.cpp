#include "codec/train/beam.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "codec/train/simd.h"
#include "core/round_up.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codec/train/beam.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#ifndef VQKV_BEAM_ONCE
#define VQKV_BEAM_ONCE
namespace vqkv {
namespace {
constexpr int64_t kPanel = 64;     // codewords side by side
constexpr int64_t kRowBlock = 6;   // rows scored together: 6 * 4 accumulators of AVX-512's 32 registers
constexpr int64_t kTileRows = 24;  // rows a tile: 24 * 2048 scores are 192 KiB, in L2 beside a stage's table
constexpr int kMaxBeam = 64;

// The best candidates so far, ascending; equal scores stay in order of arrival.
struct Candidates {
  int capacity = 0;
  int size = 0;
  std::array<float, kMaxBeam> score;
  std::array<int32_t, kMaxBeam> parent, code;

  float worst() const {
    return size < capacity ? std::numeric_limits<float>::infinity() : score[static_cast<size_t>(size - 1)];
  }
  void insert(float value, int32_t from, int32_t with) {
    int at = size < capacity ? size++ : size - 1;
    for (; at > 0 && score[static_cast<size_t>(at - 1)] > value; --at) {
      const auto a = static_cast<size_t>(at);
      score[a] = score[a - 1];
      parent[a] = parent[a - 1];
      code[a] = code[a - 1];
    }
    score[static_cast<size_t>(at)] = value;
    parent[static_cast<size_t>(at)] = from;
    code[static_cast<size_t>(at)] = with;
  }
};
}  // namespace
}  // namespace vqkv
#endif

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET <= HWY_AVX3
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// out[r][s] = half_norm[s] - x[r].c[s] for `rows` rows (a multiple of kRowBlock) and all panels.
void score_panels(const float* x, int64_t rows, int64_t width, const float* packed, const float* half_norm,
                  int64_t panels, float* out, int64_t out_stride) {
  const hn::CappedTag<float, 16> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t s0 = 0; s0 < kPanel; s0 += kVectors * lanes) {
      const float* panel = packed + p * width * kPanel + s0;
      const float* norm = half_norm + p * kPanel + s0;
      for (int64_t r0 = 0; r0 < rows; r0 += kRowBlock) {
        V a[kRowBlock][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) a[r][v] = hn::LoadU(d, norm + v * lanes);
        const float* c = panel;
        const float* row = x + r0 * width;
        for (int64_t k = 0; k < width; ++k, c += kPanel) {
          V codeword[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) codeword[v] = hn::LoadU(d, c + v * lanes);
#pragma GCC unroll 8
          for (int r = 0; r < kRowBlock; ++r) {
            const V value = hn::Set(d, row[r * width + k]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) a[r][v] = hn::NegMulAdd(value, codeword[v], a[r][v]);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            hn::StoreU(a[r][v], d, out + (r0 + r) * out_stride + p * kPanel + s0 + v * lanes);
      }
    }
  }
}

// Offers score + base[s] - unit * sum of the rows' entries to the candidates, for all s. rows: table rows of what the
// parent has chosen, in stage order; none where base belongs to the parent's own residual.
void offer(float score, int32_t parent, const float* base, const f16* const* rows, int count, float unit,
           int64_t padded, Candidates& candidates) {
  const hn::CappedTag<float, 16> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const hn::Rebind<hwy::float16_t, decltype(d)> half;
  const V start = hn::Set(d, score), factor = hn::Set(d, unit);
  float worst = candidates.worst();
  V limit = hn::Set(d, worst);
  alignas(64) float value[16];
  uint8_t bits[8];
  // Four vectors at a time hide the latency of the tables, which come from L2 and L3.
  for (int64_t s0 = 0; s0 < padded; s0 += 4 * lanes) {
    V v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = hn::LoadU(d, base + s0 + i * lanes);
    for (int row = 0; row < count; ++row) {
      const auto* table = reinterpret_cast<const hwy::float16_t*>(rows[row] + s0);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        v[i] = hn::NegMulAdd(hn::PromoteTo(d, hn::LoadU(half, table + i * lanes)), factor, v[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = hn::Add(v[i], start);
    if (hn::AllFalse(d, hn::Lt(hn::Min(hn::Min(v[0], v[1]), hn::Min(v[2], v[3])), limit))) continue;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto better = hn::Lt(v[i], limit);
      if (hn::AllFalse(d, better)) continue;
      hn::Store(v[i], d, value);
      std::fill_n(bits, 8, uint8_t{0});
      hn::StoreMaskBits(d, better, bits);
      for (uint32_t rest = bits[0] | static_cast<uint32_t>(bits[1]) << 8; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        if (!(value[lane] < worst)) continue;
        candidates.insert(value[lane], parent, static_cast<int32_t>(s0 + i * lanes + lane));
        worst = candidates.worst();
      }
      limit = hn::Set(d, worst);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(score_panels);
HWY_EXPORT(offer);

BeamEncoder::BeamEncoder(const std::vector<Matrix<float>>& books, int beam)
    : stages_(static_cast<int>(books.size())), beam_(beam) {
  VQKV_CHECK(stages_ >= 1 && beam_ >= 1 && beam_ <= kMaxBeam);
  use_allowed_simd();
  entries_ = books[0].rows;
  width_ = books[0].cols;
  const int64_t panels = (entries_ + kPanel - 1) / kPanel;
  padded_ = panels * kPanel;

  std::vector<double> mean(static_cast<size_t>(width_), 0.0);
  for (int64_t s = 0; s < entries_; ++s)
    for (int64_t k = 0; k < width_; ++k) mean[static_cast<size_t>(k)] += books[0](s, k);
  offset_.resize(static_cast<size_t>(width_));
  for (size_t k = 0; k < offset_.size(); ++k) offset_[k] = static_cast<float>(mean[k] / static_cast<double>(entries_));

  const int64_t padded_rows = round_up(entries_, kRowBlock);
  std::vector<Matrix<float>> rows;  // the books as rows to score, for the tables
  for (int i = 0; i < stages_; ++i) {
    const Matrix<float>& book = books[static_cast<size_t>(i)];
    VQKV_CHECK(book.rows == entries_ && book.cols == width_);
    rows.emplace_back(padded_rows, width_);
    AlignedVector<float> packed(static_cast<size_t>(padded_ * width_), 0.0f);
    AlignedVector<float> norms(static_cast<size_t>(padded_), std::numeric_limits<float>::infinity());
    for (int64_t s = 0; s < entries_; ++s) {
      double norm = 0;
      for (int64_t k = 0; k < width_; ++k) {
        const float c = book(s, k) - (i == 0 ? offset_[static_cast<size_t>(k)] : 0.0f);
        rows.back()(s, k) = c;
        packed[static_cast<size_t>((s / kPanel * width_ + k) * kPanel + s % kPanel)] = c;
        norm += static_cast<double>(c) * c;
      }
      norms[static_cast<size_t>(s)] = static_cast<float>(norm / 2);
    }
    packed_.push_back(std::move(packed));
    half_norm_.push_back(std::move(norms));
  }

  const int64_t table_entries = int64_t{stages_} * (stages_ - 1) / 2 * entries_ * padded_;
  if (beam_ == 1 || table_entries > kBeamTableBytes / static_cast<int64_t>(sizeof(f16))) return;
  // A product is at most the product of the longest codewords of two stages: a unit that keeps it under 2^15.
  float longest = 0;
  for (const auto& norms : half_norm_)
    for (int64_t s = 0; s < entries_; ++s) longest = std::max(longest, norms[static_cast<size_t>(s)]);
  table_unit_ = std::exp2(std::clamp(std::ceil(std::log2(std::max(2 * longest, 0x1p-100f))) - 14.0f, -100.0f, 120.0f));
  const AlignedVector<float> zeros(static_cast<size_t>(padded_), 0.0f);
  Matrix<float> products(padded_rows, padded_);
  for (int i = 0; i < stages_; ++i) {
    AlignedVector<f16> table(static_cast<size_t>(i * entries_ * padded_));
    for (int j = 0; j < i; ++j) {
      HWY_DYNAMIC_DISPATCH(score_panels)
      (rows[static_cast<size_t>(j)].data(), padded_rows, width_, packed_[static_cast<size_t>(i)].data(), zeros.data(),
       panels, products.data(), padded_);
      for (float& v : products.storage) v /= table_unit_;
      to_f16(products.data(), table.data() + j * entries_ * padded_, entries_ * padded_);
    }
    tables_.push_back(std::move(table));
  }
}

void BeamEncoder::encode_rows(ConstMatrix x, uint16_t* codes, int64_t row_stride, int64_t stage_stride) const {
  VQKV_CHECK(x.cols == width_);
  for (int64_t first = 0; first < x.rows; first += kTileRows)
    encode_tile(x.slice_rows(first, std::min(kTileRows, x.rows - first)), codes + first * row_stride, row_stride,
                stage_stride);
}

void BeamEncoder::encode_tile(ConstMatrix x, uint16_t* codes, int64_t row_stride, int64_t stage_stride) const {
  const int64_t panels = padded_ / kPanel;
  const auto width = static_cast<size_t>(width_);
  struct Path {  // beam entries of one row, after some stages
    Candidates best;
    std::vector<uint16_t> codes;  // (beam, stages)
  };
  thread_local std::vector<Path> paths, next;
  thread_local AlignedVector<float> residual, next_residual, scores;
  paths.resize(static_cast<size_t>(x.rows));
  next.resize(static_cast<size_t>(x.rows));
  const bool tables = uses_tables();
  // Direct: `per_row` residuals a row, one a beam entry. Tables: x itself, scored against all stages at once.
  int64_t per_row = 1;
  const auto padded_count = [](int64_t rows) { return round_up(rows, kRowBlock); };
  residual.assign(static_cast<size_t>(padded_count(x.rows)) * width, 0.0f);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (size_t k = 0; k < width; ++k) residual[static_cast<size_t>(r) * width + k] = x.row(r)[k] - offset_[k];
    Path& path = paths[static_cast<size_t>(r)];
    path.best.size = 1;
    path.best.score[0] = 0;
    path.codes.assign(static_cast<size_t>(beam_ * stages_), 0);
  }
  const int64_t stride = tables ? stages_ * padded_ : padded_;
  if (tables) {
    const int64_t rows = padded_count(x.rows);
    scores.resize(static_cast<size_t>(rows * stride));
    for (int i = 0; i < stages_; ++i) HWY_DYNAMIC_DISPATCH(score_panels)
    (residual.data(), rows, width_, packed_[static_cast<size_t>(i)].data(), half_norm_[static_cast<size_t>(i)].data(),
     panels, scores.data() + i * padded_, stride);
  }

  std::vector<const f16*> chosen(static_cast<size_t>(stages_));
  for (int i = 0; i < stages_; ++i) {
    const auto stage = static_cast<size_t>(i);
    if (!tables) {
      const int64_t rows = padded_count(x.rows * per_row);
      residual.resize(static_cast<size_t>(rows) * width, 0.0f);
      scores.resize(static_cast<size_t>(rows * stride));
      HWY_DYNAMIC_DISPATCH(score_panels)
      (residual.data(), rows, width_, packed_[stage].data(), half_norm_[stage].data(), panels, scores.data(), stride);
    }
    for (int64_t r = 0; r < x.rows; ++r) {
      const Path& from = paths[static_cast<size_t>(r)];
      Path& to = next[static_cast<size_t>(r)];
      to.best.capacity = i + 1 == stages_ ? 1 : beam_;
      to.best.size = 0;
      to.codes.resize(static_cast<size_t>(beam_ * stages_));
      for (int b = 0; b < from.best.size; ++b) {
        const uint16_t* path = from.codes.data() + b * stages_;
        const float* base = scores.data() + (tables ? r * stride + i * padded_ : (r * per_row + b) * stride);
        if (tables)
          for (int j = 0; j < i; ++j)
            chosen[static_cast<size_t>(j)] = tables_[stage].data() + (j * entries_ + path[j]) * padded_;
        HWY_DYNAMIC_DISPATCH(offer)
        (from.best.score[static_cast<size_t>(b)], b, base, chosen.data(), tables ? i : 0, table_unit_, padded_,
         to.best);
      }
      if (to.best.size == 0) to.best.insert(0, 0, 0);  // no finite score: values near the end of fp32
      for (int b = 0; b < to.best.size; ++b) {
        const auto at = static_cast<size_t>(b);
        uint16_t* path = to.codes.data() + b * stages_;
        std::copy_n(from.codes.data() + to.best.parent[at] * stages_, i, path);
        path[i] = static_cast<uint16_t>(to.best.code[at]);
      }
    }
    if (!tables && i + 1 < stages_) {
      next_residual.assign(static_cast<size_t>(padded_count(x.rows * beam_)) * width, 0.0f);
      for (int64_t r = 0; r < x.rows; ++r) {
        const Candidates& best = next[static_cast<size_t>(r)].best;
        for (int b = 0; b < best.size; ++b) {
          const auto at = static_cast<size_t>(b);
          const float* parent = residual.data() + static_cast<size_t>(r * per_row + best.parent[at]) * width;
          float* child = next_residual.data() + static_cast<size_t>(r * beam_ + b) * width;
          const float* c = packed_[stage].data() + best.code[at] / kPanel * width_ * kPanel + best.code[at] % kPanel;
          for (size_t k = 0; k < width; ++k) child[k] = parent[k] - c[k * kPanel];
        }
      }
      residual.swap(next_residual);
      per_row = beam_;
    }
    paths.swap(next);
  }
  for (int64_t r = 0; r < x.rows; ++r)
    for (int i = 0; i < stages_; ++i)
      codes[r * row_stride + i * stage_stride] = paths[static_cast<size_t>(r)].codes[static_cast<size_t>(i)];
}

}  // namespace vqkv
#endif
