#include "codec/train/pair_search.h"

#include <algorithm>
#include <limits>

#include "codec/train/simd.h"
#include "core/round_up.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "codec/train/pair_search.cpp"
#include <hwy/foreach_target.h>

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#ifndef VQKV_PAIR_SEARCH_ONCE
#define VQKV_PAIR_SEARCH_ONCE
namespace vqkv {
namespace {
constexpr int64_t kLanes = 16;  // a book's rows of cross terms are whole vectors of every processor

struct PairJob {
  const float* u;      // (entries)
  const float* v;      // (stride), infinite beyond the entries
  const float* cross;  // (entries, stride)
  int64_t entries, stride;
};
}  // namespace
}  // namespace vqkv
#endif

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A lane is a code b and keeps its best a; v_b joins at the end, since it orders no two of them. The sums are those of
// pair_shares, in the same order, so that no distance there is below that of the nearest.
PairSearch::Pair nearest_pair(const PairJob& job) {
  const hn::CappedTag<float, kLanes> d;
  const hn::RebindToSigned<decltype(d)> di;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  alignas(64) float score[kLanes];
  alignas(64) int32_t index[kLanes];
  PairSearch::Pair best{0, 0, std::numeric_limits<float>::infinity()};
  for (int64_t b0 = 0; b0 < job.entries; b0 += lanes) {
    auto low = hn::Set(d, std::numeric_limits<float>::infinity());
    auto low_index = hn::Zero(di);
    const float* cross = job.cross + b0;
    for (int64_t a = 0; a < job.entries; ++a, cross += job.stride) {
      const auto sum = hn::Add(hn::Set(d, job.u[a]), hn::Load(d, cross));
      const auto nearer = hn::Lt(sum, low);
      low = hn::IfThenElse(nearer, sum, low);
      low_index = hn::IfThenElse(hn::RebindMask(di, nearer), hn::Set(di, static_cast<int32_t>(a)), low_index);
    }
    hn::Store(hn::Add(low, hn::Load(d, job.v + b0)), d, score);
    hn::Store(low_index, di, index);
    for (int64_t i = 0; i < lanes; ++i)
      if (score[i] < best.score) best = {index[i], static_cast<int32_t>(b0 + i), score[i]};
  }
  return best;
}

void pair_shares(const PairJob& job, float norm, float least, float temperature, std::vector<PairSearch::Share>& out) {
  constexpr float kNegligible = 20;
  const hn::CappedTag<float, kLanes> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto nearest = hn::Set(d, least), most = hn::Set(d, least + kNegligible * temperature);
  const auto length = hn::Set(d, norm), cooled = hn::Set(d, 1 / temperature);
  alignas(64) float share[kLanes];
  for (int64_t a = 0; a < job.entries; ++a)
    for (int64_t b0 = 0; b0 < job.entries; b0 += lanes) {
      const auto score =
          hn::Add(hn::Add(hn::Set(d, job.u[a]), hn::Load(d, job.cross + a * job.stride + b0)), hn::Load(d, job.v + b0));
      const auto distance = hn::Sqrt(hn::Max(hn::Zero(d), hn::Add(length, score)));
      const auto near = hn::Le(distance, most);
      if (hn::AllFalse(d, near)) continue;
      const auto p = hn::Exp(d, hn::Mul(hn::Sub(nearest, distance), cooled));
      hn::Store(hn::IfThenElseZero(near, p), d, share);
      for (int64_t i = 0; i < lanes; ++i)
        if (share[i] > 0) out.push_back({static_cast<int32_t>(a), static_cast<int32_t>(b0 + i), share[i]});
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(nearest_pair);
HWY_EXPORT(pair_shares);

PairSearch::PairSearch(Matrix<float> words) : words_(std::move(words)), stride_(round_up(words_.rows, kLanes)) {
  VQKV_CHECK(words_.rows >= 1 && words_.cols >= 2 && words_.cols % 2 == 0);
  use_allowed_simd();
  const int64_t half = words_.cols / 2;
  norm_.assign(static_cast<size_t>(stride_), std::numeric_limits<float>::infinity());
  cross_.assign(static_cast<size_t>(words_.rows * stride_), 0.0f);
  Matrix<float> twice = words_;
  for (float& v : twice.storage) v *= -2;
  products_ = PackedWeights(twice, DType::kF32);
  for (int64_t a = 0; a < words_.rows; ++a) {
    const float* z = words_.row(a);
    double norm = 0;
    for (int64_t i = 0; i < words_.cols; ++i) norm += double{z[i]} * z[i];
    norm_[static_cast<size_t>(a)] = static_cast<float>(norm);
    for (int64_t b = 0; b < words_.rows; ++b) {
      const float* w = words_.row(b);
      double cross = 0;  // Re<z, i w>
      for (int64_t i = 0; i < half; ++i) cross += double{z[half + i]} * w[i] - double{z[i]} * w[half + i];
      cross_[static_cast<size_t>(a * stride_ + b)] = static_cast<float>(2 * cross);
    }
  }
}

void PairSearch::scores(ConstMatrix x, MutMatrix turned, MutMatrix u, MutMatrix v) const {
  VQKV_CHECK(x.cols == width() && turned.rows == x.rows && u.cols == stride_ && v.cols == stride_);
  const int64_t half = width() / 2;
  for (int64_t r = 0; r < x.rows; ++r) {
    std::copy_n(x.row(r) + half, half, turned.row(r));
    for (int64_t i = 0; i < half; ++i) turned(r, half + i) = -x(r, i);
    std::copy(norm_.begin(), norm_.end(), u.row(r));
    std::copy(norm_.begin(), norm_.end(), v.row(r));
  }
  products_.apply(x, u.slice_cols(0, entries()), true);
  products_.apply(turned, v.slice_cols(0, entries()), true);  // Re<x, i Z> is Re<-i x, Z>
}

PairSearch::Pair PairSearch::nearest(const float* u, const float* v) const {
  return HWY_DYNAMIC_DISPATCH(nearest_pair)({u, v, cross_.data(), entries(), stride_});
}

void PairSearch::shares(const float* u, const float* v, float norm, float least, float temperature,
                        std::vector<Share>& out) const {
  out.clear();
  HWY_DYNAMIC_DISPATCH(pair_shares)({u, v, cross_.data(), entries(), stride_}, norm, least, temperature, out);
}

void PairSearch::subtract(const Pair& pair, float* x) const {
  const int64_t half = width() / 2;
  const float *z = words_.row(pair.a), *w = words_.row(pair.b);
  for (int64_t i = 0; i < half; ++i) {
    x[i] -= z[i] - w[half + i];
    x[half + i] -= z[half + i] + w[i];
  }
}

}  // namespace vqkv
#endif
