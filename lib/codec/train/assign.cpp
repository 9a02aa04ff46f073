#include "codec/train/assign.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "codec/train/assign_tile.h"
#include "codec/train/simd.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "core/thread_pool.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codec/train/assign.cpp"
#include <hwy/foreach_target.h>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#ifndef VQKV_ASSIGN_ONCE
#define VQKV_ASSIGN_ONCE
namespace vqkv {
using namespace assign;
namespace {
// Channels a pass: 128 * 64 floats are 32 KiB, which leaves room in L1 for the codewords that stream by.
constexpr int64_t kPass = 128;
// One pass up to here: spilling the scores costs more than a tile that overflows L1 a little.
constexpr int64_t kSinglePass = 192;
// At 8 channels little is left of the gain (1.1 to 1.2 times); narrower vectors and fewer codewords were not tried.
constexpr int64_t kScreenedChannels = 8, kScreenedBlocks = 4;
// AMX takes 32 channels at once: at 16 nothing is gained, at 8 a third is lost.
constexpr int64_t kTiledChannels = 32;
// Beyond, a tile in both types leaves no room in L2.
constexpr int64_t kScreenedChannelsMost = 1024;
}  // namespace
}  // namespace vqkv
#endif

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET <= HWY_AVX3
constexpr int kRowVectors = 2;  // 32 registers: 16 accumulators
#else
constexpr int kRowVectors = 1;  // 16 registers: 8 accumulators
#endif

// Narrow codewords (kWidth > 0): comparing scores costs as much as making them, so a lane keeps its best score and the
// block that held it, 10 operations for 8 codewords instead of 24, and the codeword is found afterwards by scoring that
// one block again, in the same order and so with the same bits.
template <int kWidth>
void resolve_block(const TileJob& job, const int32_t* best_block) {
  const hn::CappedTag<float, kBlock> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t r = 0; r < kTile; ++r) {
    const int64_t block = best_block[r];
    const auto best = hn::Set(d, job.best[r]);
    job.best_index[r] = static_cast<int32_t>(block * kBlock);
    // No score below infinity: a row that leaves fp32. Padding scores infinity too and must not be found.
    if (!(job.best[r] < std::numeric_limits<float>::infinity())) continue;
    for (int64_t i = 0; i < kBlock; i += lanes) {
      auto score = hn::LoadU(d, job.half_norm + block * kBlock + i);
      const float* c = job.packed + block * job.packed_stride + i;
#pragma GCC unroll 16
      for (int k = 0; k < kWidth; ++k)
        score = hn::NegMulAdd(hn::LoadU(d, c + k * kBlock), hn::Set(d, job.tile[k * kTile + r]), score);
      const auto where = hn::FindFirstTrue(d, hn::Eq(score, best));
      if (where < 0) continue;
      job.best_index[r] = static_cast<int32_t>(block * kBlock + i + where);
      break;
    }
  }
}

template <int kWidth>
void score_tile(const TileJob& job) {
  const hn::CappedTag<float, 16> d;
  const hn::RebindToSigned<decltype(d)> di;
  using V = hn::Vec<decltype(d)>;
  using VI = hn::Vec<decltype(di)>;
  constexpr int R = kRowVectors;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t channels = kWidth > 0 ? kWidth : job.channels;
  const bool first = kWidth > 0 || job.first, last = kWidth > 0 || job.last;
  alignas(64) int32_t best_block[kTile];

  for (int64_t v0 = 0; v0 < kTile; v0 += R * lanes) {
    V best[R];
    VI best_index[R];
    for (int r = 0; r < R; ++r) {
      best[r] = hn::Set(d, std::numeric_limits<float>::infinity());
      best_index[r] = hn::Zero(di);
    }
    for (int64_t b = 0; b < job.blocks; ++b) {
      V a[kBlock][R];
      if (first) {
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) a[i][r] = hn::Set(d, job.half_norm[b * kBlock + i]);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) a[i][r] = hn::Load(d, job.scores + (b * kBlock + i) * kTile + v0 + r * lanes);
      }
      const float* c = job.packed + b * job.packed_stride;
      const float* t = job.tile + v0;
      for (int64_t k = 0; k < channels; ++k, c += kBlock, t += kTile) {
        V x[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) x[r] = hn::Load(d, t + r * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) {
          const V codeword = hn::Set(d, c[i]);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) a[i][r] = hn::NegMulAdd(codeword, x[r], a[i][r]);
        }
      }
      if (!last) {
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) hn::Store(a[i][r], d, job.scores + (b * kBlock + i) * kTile + v0 + r * lanes);
        continue;
      }
      if constexpr (kWidth > 0) {
        const VI block = hn::Set(di, static_cast<int32_t>(b));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const V low = hn::Min(hn::Min(hn::Min(a[0][r], a[1][r]), hn::Min(a[2][r], a[3][r])),
                                hn::Min(hn::Min(a[4][r], a[5][r]), hn::Min(a[6][r], a[7][r])));
          const auto nearer = hn::Lt(low, best[r]);
          best[r] = hn::IfThenElse(nearer, low, best[r]);
          best_index[r] = hn::IfThenElse(hn::RebindMask(di, nearer), block, best_index[r]);
        }
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; ++i) {
          const VI index = hn::Set(di, static_cast<int32_t>(b * kBlock + i));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const auto nearer = hn::Lt(a[i][r], best[r]);
            best[r] = hn::IfThenElse(nearer, a[i][r], best[r]);
            best_index[r] = hn::IfThenElse(hn::RebindMask(di, nearer), index, best_index[r]);
          }
        }
      }
    }
    if (!last) continue;
    int32_t* out = kWidth > 0 ? best_block : job.best_index;
    for (int r = 0; r < R; ++r) {
      hn::Store(best[r], d, job.best + v0 + r * lanes);
      hn::Store(best_index[r], di, out + v0 + r * lanes);
    }
  }
  if constexpr (kWidth > 0) resolve_block<kWidth>(job, best_block);
}

#if HWY_TARGET <= HWY_AVX2
// Four rows of eight channels: out[i] holds channel i of the rows, then channel i + 4.
template <class V>
HWY_INLINE void transpose4(V x0, V x1, V x2, V x3, V* out) {
  const hn::FixedTag<float, 8> d;
  const hn::RepartitionToWide<decltype(d)> wide;
  const auto a = hn::BitCast(wide, hn::InterleaveLower(d, x0, x1)),
             b = hn::BitCast(wide, hn::InterleaveLower(d, x2, x3));
  const auto c = hn::BitCast(wide, hn::InterleaveUpper(d, x0, x1)),
             e = hn::BitCast(wide, hn::InterleaveUpper(d, x2, x3));
  out[0] = hn::BitCast(d, hn::InterleaveLower(wide, a, b));
  out[1] = hn::BitCast(d, hn::InterleaveUpper(wide, a, b));
  out[2] = hn::BitCast(d, hn::InterleaveLower(wide, c, e));
  out[3] = hn::BitCast(d, hn::InterleaveUpper(wide, c, e));
}

// The same as below for whole blocks of 8 x 8, with 0.6 of the instructions.
void fill_blocks(ConstMatrix x, const float* offset, float* tile) {
  const hn::FixedTag<float, 8> d;
  for (int64_t r = 0; r < x.rows; r += 8) {
    // What comes next is on its way while these are scored: the next channels of a product code, else the next tile.
    for (int64_t i = r; i < r + 8; ++i) {
      hwy::Prefetch(x.row(i) + x.cols);
      if (x.cols == x.stride)
        for (int64_t k = 0; k < x.cols; k += 16) hwy::Prefetch(x.row(i + kTile) + k);
    }
    for (int64_t k = 0; k < x.cols; k += 8) {
      const auto shift = hn::LoadU(d, offset + k);
      const auto row = [&](int64_t i) { return hn::Sub(hn::LoadU(d, x.row(r + i) + k), shift); };
      hn::Vec<decltype(d)> low[4], high[4];
      transpose4(row(0), row(1), row(2), row(3), low);
      transpose4(row(4), row(5), row(6), row(7), high);
      float* out = tile + k * kTile + r;
      for (int64_t i = 0; i < 4; ++i) {
        hn::Store(hn::ConcatLowerLower(d, high[i], low[i]), d, out + i * kTile);
        hn::Store(hn::ConcatUpperUpper(d, high[i], low[i]), d, out + (i + 4) * kTile);
      }
    }
  }
}
#endif

// tile[k][r] = x(r, k) - offset[k], by 4 x 4 blocks; rows past x.rows become zero. Element stores alone took a third of
// the time of a product code.
void fill_tile(ConstMatrix x, const float* offset, float* tile) {
#if HWY_TARGET <= HWY_AVX2
  if (x.rows == kTile && x.cols % 8 == 0) return fill_blocks(x, offset, tile);
#endif
  int64_t rows4 = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> d;
  const hn::RepartitionToWide<decltype(d)> wide;
  const int64_t cols4 = x.cols / 4 * 4;
  rows4 = x.rows / 4 * 4;
  for (int64_t r = 0; r < rows4; r += 4) {
    for (int64_t k = 0; k < cols4; k += 4) {
      const auto shift = hn::LoadU(d, offset + k);
      const auto x0 = hn::Sub(hn::LoadU(d, x.row(r) + k), shift);
      const auto x1 = hn::Sub(hn::LoadU(d, x.row(r + 1) + k), shift);
      const auto x2 = hn::Sub(hn::LoadU(d, x.row(r + 2) + k), shift);
      const auto x3 = hn::Sub(hn::LoadU(d, x.row(r + 3) + k), shift);
      const auto a = hn::BitCast(wide, hn::InterleaveLower(d, x0, x1));  // 00 10 01 11
      const auto b = hn::BitCast(wide, hn::InterleaveLower(d, x2, x3));
      const auto c = hn::BitCast(wide, hn::InterleaveUpper(d, x0, x1));
      const auto e = hn::BitCast(wide, hn::InterleaveUpper(d, x2, x3));
      float* out = tile + k * kTile + r;
      hn::Store(hn::BitCast(d, hn::InterleaveLower(wide, a, b)), d, out);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(wide, a, b)), d, out + kTile);
      hn::Store(hn::BitCast(d, hn::InterleaveLower(wide, c, e)), d, out + 2 * kTile);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(wide, c, e)), d, out + 3 * kTile);
    }
    for (int64_t k = cols4; k < x.cols; ++k)
      for (int64_t i = r; i < r + 4; ++i) tile[k * kTile + i] = x(i, k) - offset[k];
  }
#endif
  for (int64_t r = rows4; r < kTile; ++r)
    for (int64_t k = 0; k < x.cols; ++k) tile[k * kTile + r] = r < x.rows ? x(r, k) - offset[k] : 0.0f;
}

void score_tile_any(const TileJob& job) {
  switch (job.channels) {
    case 2:
      return score_tile<2>(job);
    case 4:
      return score_tile<4>(job);
    case 8:
      return score_tile<8>(job);
    case 16:
      return score_tile<16>(job);
    default:
      return score_tile<0>(job);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(fill_tile);
HWY_EXPORT(score_tile_any);

namespace assign {

Bf16Screen::Bf16Screen(const float* packed, int64_t blocks, int64_t channels) {
  tiles_ = cpu_features().amx;
  if ((!tiles_ && !cpu_features().bf16_products) || channels < (tiles_ ? kTiledChannels : kScreenedChannels) ||
      channels > kScreenedChannelsMost || blocks < kScreenedBlocks)
    return;
  const int64_t pairs = (channels + 1) / 2, steps = (pairs + 15) / 16;
  pairs_.assign(static_cast<size_t>(tiles_ ? (blocks + 1) / 2 * steps * 256 : blocks * pairs * kBlock), 0);
  const float rounding = 4.0f * static_cast<float>(channels + 4) * 0x1p-24f;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* from = packed + b * channels * kBlock;
    double most = 0, most_lost = 0;  // squares: longest codeword, most that rounding takes; padding is zero
    for (int64_t i = 0; i < kBlock; ++i) {
      double square = 0, lost = 0;
      for (int64_t k = 0; k < channels; ++k) {
        const double c = from[k * kBlock + i], d = c - double{to_float(to_bf16(from[k * kBlock + i]))};
        square += c * c;
        lost += d * d;
      }
      most = std::max(most, square);
      most_lost = std::max(most_lost, lost);
    }
    if (!(most <= 1e36)) {  // a score could leave fp32
      pairs_.clear();
      return;
    }
    const auto length = static_cast<float>(std::sqrt(most)), lost = static_cast<float>(std::sqrt(most_lost));
    constexpr float kSlack = 1.001f;  // the bound is computed in fp32 itself
    bound_.push_back(
        {.by_length = kSlack * (1.004f * lost + length * rounding + 0x1p-110f),
         .by_loss = kSlack * length,
         .offset = kSlack * (length * length / 2 * rounding + length * 0x1p-69f + 0x1p-110f * (1 + length))});
    for (int64_t p = 0; p < pairs; ++p)
      for (int64_t i = 0; i < kBlock; ++i) {
        const float high = 2 * p + 1 < channels ? -from[(2 * p + 1) * kBlock + i] : 0.0f;
        const int64_t at =
            tiles_ ? ((b / 2 * steps + p / 16) * 16 + b % 2 * kBlock + i) * 16 + p % 16 : (b * pairs + p) * kBlock + i;
        if constexpr (kX86Units) pairs_[static_cast<size_t>(at)] = bf16_pair(-from[2 * p * kBlock + i], high);
      }
  }
}

bool Bf16Screen::nearest(const TileJob& job) const {
  if constexpr (kX86Units) return nearest_bf16({&job, pairs_.data(), bound_.data(), tiles_});
  fail_internal("no processor of this build has bf16 products");
}

}  // namespace assign

Assigner::Assigner(ConstMatrix codewords) : entries_(codewords.rows), width_(codewords.cols) {
  VQKV_CHECK(entries_ >= 1 && width_ >= 1);
  use_allowed_simd();
  const int64_t blocks = (entries_ + kBlock - 1) / kBlock;
  offset_.resize(static_cast<size_t>(width_));
  packed_.assign(static_cast<size_t>(blocks * width_ * kBlock), 0.0f);
  half_norm_.assign(static_cast<size_t>(blocks * kBlock), std::numeric_limits<float>::infinity());
  std::vector<double> mean(static_cast<size_t>(width_), 0.0);
  for (int64_t s = 0; s < entries_; ++s)
    for (int64_t k = 0; k < width_; ++k) mean[static_cast<size_t>(k)] += codewords(s, k);
  for (int64_t k = 0; k < width_; ++k)
    offset_[static_cast<size_t>(k)] = static_cast<float>(mean[static_cast<size_t>(k)] / static_cast<double>(entries_));
  for (int64_t s = 0; s < entries_; ++s) {
    float* block = packed_.data() + (s / kBlock) * width_ * kBlock + s % kBlock;
    double norm = 0;
    for (int64_t k = 0; k < width_; ++k) {
      const float c = codewords(s, k) - offset_[static_cast<size_t>(k)];
      block[k * kBlock] = c;
      norm += static_cast<double>(c) * c;
    }
    half_norm_[static_cast<size_t>(s)] = static_cast<float>(norm / 2);
  }
  screen_ = Bf16Screen(packed_.data(), blocks, width_);
}

void Assigner::assign_rows(ConstMatrix x, int32_t* index, float* distance) const {
  VQKV_CHECK(entries_ > 0 && x.cols == width_);
  const int64_t blocks = static_cast<int64_t>(half_norm_.size()) / kBlock;
  const int64_t pass = width_ <= kSinglePass || !screen_.empty() ? width_ : kPass;
  thread_local AlignedVector<float> tile, scores;
  tile.resize(static_cast<size_t>(pass * kTile));
  if (pass < width_) scores.resize(static_cast<size_t>(blocks * kBlock * kTile));
  alignas(64) float best[kTile];
  alignas(64) int32_t best_index[kTile];

  for (int64_t first = 0; first < x.rows; first += kTile) {
    const int64_t rows = std::min(kTile, x.rows - first);
    double norm[kTile];
    if (distance) std::fill_n(norm, kTile, 0.0);
    for (int64_t k0 = 0; k0 < width_; k0 += pass) {
      const int64_t channels = std::min(pass, width_ - k0);
      const ConstMatrix part = x.slice_rows(first, rows).slice_cols(k0, channels);
      HWY_DYNAMIC_DISPATCH(fill_tile)(part, offset_.data() + k0, tile.data());
      if (distance) {
        for (int64_t k = 0; k < channels; ++k)
          for (int64_t r = 0; r < kTile; ++r) {
            const double v = tile[static_cast<size_t>(k * kTile + r)];
            norm[r] += v * v;
          }
      }
      const TileJob job{.x = part,
                        .offset = offset_.data() + k0,
                        .tile = tile.data(),
                        .channels = channels,
                        .packed = packed_.data() + k0 * kBlock,
                        .packed_stride = width_ * kBlock,
                        .half_norm = half_norm_.data(),
                        .blocks = blocks,
                        .scores = scores.data(),
                        .first = k0 == 0,
                        .last = k0 + channels == width_,
                        .best = best,
                        .best_index = best_index};
      if (!screen_.empty() && screen_.nearest(job)) continue;
      HWY_DYNAMIC_DISPATCH(score_tile_any)(job);
    }
    std::copy_n(best_index, rows, index + first);
    if (distance)
      for (int64_t r = 0; r < rows; ++r)
        distance[first + r] = static_cast<float>(std::max(0.0, norm[r] + 2.0 * static_cast<double>(best[r])));
  }
}

void Assigner::assign(ConstMatrix x, int32_t* index, float* distance) const {
  constexpr int64_t kChunk = 8 * kTile;
  parallel_for((x.rows + kChunk - 1) / kChunk, [&](int64_t i) {
    const int64_t first = i * kChunk;
    assign_rows(x.slice_rows(first, std::min(kChunk, x.rows - first)), index + first,
                distance ? distance + first : nullptr);
  });
}

}  // namespace vqkv
#endif
