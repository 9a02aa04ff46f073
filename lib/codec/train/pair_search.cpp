#include "codec/train/pair_search.h"

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

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
  const float* u;            // (entries)
  const float* v;            // (stride), infinite beyond the entries
  const float* cross;        // (entries, stride)
  const float* cross_least;  // (entries): of each row of cross
  int64_t entries, stride;
};

// No sum of a pair of `a` is below it, since rounding keeps the order of sums: what a bound leaves out, no search would
// have found.
float least_sum(const PairJob& job, int64_t a, float v_least) { return (job.u[a] + job.cross_least[a]) + v_least; }

// Those of the codes a with a pair that may be, with `norm`, `most` at most; ascending.
std::span<const int32_t> within(const PairJob& job, float v_least, float norm, float most) {
  thread_local std::vector<int32_t> found;
  found.resize(static_cast<size_t>(job.entries));
  size_t n = 0;
  for (int64_t a = 0; a < job.entries; ++a) {
    found[n] = static_cast<int32_t>(a);
    n += norm + least_sum(job, a, v_least) <= most;
  }
  return std::span(found).first(n);
}
}  // namespace
}  // namespace vqkv
#endif

HWY_BEFORE_NAMESPACE();
namespace vqkv {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A lane is a code b and keeps its best a; v_b joins at the end, since it orders no two of them. The sums are those of
// pair_shares, in the same order, so that no distance there is below that of the nearest. N vectors at once: a vector
// waits for its own comparisons.
template <int N>
HWY_INLINE void nearest_of_vectors(const PairJob& job, std::span<const int32_t> codes, int64_t b0,
                                   PairSearch::Pair& best) {
  const hn::CappedTag<float, kLanes> d;
  const hn::RebindToSigned<decltype(d)> di;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> low[N];
  hn::Vec<decltype(di)> low_index[N];
  for (int j = 0; j < N; ++j) {
    low[j] = hn::Set(d, std::numeric_limits<float>::infinity());
    low_index[j] = hn::Zero(di);
  }
  for (const int32_t a : codes) {
    const float* cross = job.cross + a * job.stride + b0;
    const auto u = hn::Set(d, job.u[a]);
    const auto index = hn::Set(di, a);
    for (int j = 0; j < N; ++j) {
      const auto sum = hn::Add(u, hn::Load(d, cross + j * lanes));
      const auto nearer = hn::Lt(sum, low[j]);
      low[j] = hn::IfThenElse(nearer, sum, low[j]);
      low_index[j] = hn::IfThenElse(hn::RebindMask(di, nearer), index, low_index[j]);
    }
  }
  alignas(64) float score[kLanes];
  alignas(64) int32_t found[kLanes];
  for (int j = 0; j < N; ++j, b0 += lanes) {
    hn::Store(hn::Add(low[j], hn::Load(d, job.v + b0)), d, score);
    hn::Store(low_index[j], di, found);
    for (int64_t i = 0; i < lanes; ++i)
      if (score[i] < best.score) best = {found[i], static_cast<int32_t>(b0 + i), score[i]};
  }
}

float least_of(const float* values, int64_t stride) {
  const hn::CappedTag<float, kLanes> d;
  auto least = hn::Load(d, values);
  for (int64_t i = static_cast<int64_t>(hn::Lanes(d)); i < stride; i += static_cast<int64_t>(hn::Lanes(d)))
    least = hn::Min(least, hn::Load(d, values + i));
  return hn::GetLane(hn::MinOfLanes(d, least));
}

PairSearch::Pair nearest_of(const PairJob& job, std::span<const int32_t> codes) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(hn::CappedTag<float, kLanes>()));
  PairSearch::Pair best{0, 0, std::numeric_limits<float>::infinity()};
  int64_t b0 = 0;
  for (; b0 + 4 * lanes <= job.stride; b0 += 4 * lanes) nearest_of_vectors<4>(job, codes, b0, best);
  for (; b0 < job.entries; b0 += lanes) nearest_of_vectors<1>(job, codes, b0, best);
  return best;
}

// The pair of the code that looks nearest rules out most others, behind the first stages.
PairSearch::Pair nearest_pair(const PairJob& job) {
  const float v_least = least_of(job.v, job.stride);
  int32_t first = 0;
  float least = std::numeric_limits<float>::infinity();
  for (int64_t a = 0; a < job.entries; ++a)
    if (const float sum = least_sum(job, a, v_least); sum < least) {
      least = sum;
      first = static_cast<int32_t>(a);
    }
  return nearest_of(job, within(job, v_least, 0, nearest_of(job, {&first, 1}).score));
}

void pair_shares(const PairJob& job, float norm, float least, float temperature, PairSearch::Shares& out) {
  constexpr float kNegligible = 20;
  const hn::CappedTag<float, kLanes> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  // Most blocks end at the squares, which are let through with the rounding of roots and squares.
  const float farthest = least + kNegligible * temperature;
  const auto nearest = hn::Set(d, least), most = hn::Set(d, farthest);
  const auto screen = hn::Set(d, farthest * farthest * (1 + 0x1p-20f));
  const auto length = hn::Set(d, norm), cooled = hn::Set(d, 1 / temperature);
  float* to = out.p.data();
  for (const int64_t a : within(job, least_of(job.v, job.stride), norm, hn::GetLane(screen))) {
    const auto u = hn::Set(d, job.u[a]);
    for (int64_t b0 = 0; b0 < job.stride; b0 += kLanes) {
      bool any = false;
      for (int64_t b = b0; b < b0 + kLanes; b += lanes) {
        const auto score = hn::Add(hn::Add(u, hn::Load(d, job.cross + a * job.stride + b)), hn::Load(d, job.v + b));
        const auto square = hn::Max(hn::Zero(d), hn::Add(length, score));
        auto p = hn::Zero(d);
        if (!hn::AllFalse(d, hn::Le(square, screen))) {
          const auto distance = hn::Sqrt(square);
          p = hn::IfThenElseZero(hn::Le(distance, most), hn::Exp(d, hn::Mul(hn::Sub(nearest, distance), cooled)));
          any = true;
        }
        hn::Store(p, d, to + b - b0);
      }
      if (!any) continue;
      out.blocks.push_back({static_cast<int32_t>(a), static_cast<int32_t>(b0)});
      to += kLanes;
    }
  }
}

void add_shares(const PairSearch::Shares& shares, int64_t entries, double weight, double* HWY_RESTRICT count,
                int64_t count_stride, double* HWY_RESTRICT rho, double* HWY_RESTRICT kappa) {
  const hn::CappedTag<double, kLanes / 2> d;
  const hn::Rebind<float, decltype(d)> of_shares;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  std::fill_n(rho, entries, 0.0);
  std::fill_n(kappa, entries, 0.0);
  const float* p = shares.p.data();
  for (const auto& block : shares.blocks) {
    const int64_t n = std::min(kLanes, entries - block.b);
    auto sum = hn::Zero(d);
    double rest = 0;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      const auto part = hn::PromoteTo(d, hn::Load(of_shares, p + i));
      sum = hn::Add(sum, part);
      hn::StoreU(hn::Add(part, hn::LoadU(d, kappa + block.b + i)), d, kappa + block.b + i);
    }
    for (; i < n; ++i) {
      rest += double{p[i]};
      kappa[block.b + i] += double{p[i]};
    }
    rho[block.a] += hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
    p += kLanes;
  }
  double total = 0;
  for (int64_t a = 0; a < entries; ++a) total += rho[a];
  const double factor = weight / total;
  for (int64_t a = 0; a < entries; ++a) {
    rho[a] *= factor;
    kappa[a] *= factor;
  }
  p = shares.p.data();
  const auto f = hn::Set(d, factor);
  for (const auto& block : shares.blocks) {
    const int64_t n = std::min(kLanes, entries - block.b);
    double* to = count + block.a * count_stride + block.b;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
      hn::StoreU(hn::MulAdd(f, hn::PromoteTo(d, hn::Load(of_shares, p + i)), hn::LoadU(d, to + i)), d, to + i);
    for (; i < n; ++i) to[i] += factor * double{p[i]};
    p += kLanes;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace vqkv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vqkv {
HWY_EXPORT(nearest_pair);
HWY_EXPORT(pair_shares);
HWY_EXPORT(add_shares);

PairSearch::PairSearch(Matrix<float> words) : words_(std::move(words)), stride_(round_up(words_.rows, kLanes)) {
  VQKV_CHECK(words_.rows >= 1 && words_.cols >= 2 && words_.cols % 2 == 0);
  use_allowed_simd();
  const int64_t half = words_.cols / 2;
  cross_least_.assign(static_cast<size_t>(words_.rows), std::numeric_limits<float>::infinity());
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
      float& rounded = cross_[static_cast<size_t>(a * stride_ + b)];
      rounded = static_cast<float>(2 * cross);
      cross_least_[static_cast<size_t>(a)] = std::min(cross_least_[static_cast<size_t>(a)], rounded);
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
  return HWY_DYNAMIC_DISPATCH(nearest_pair)({u, v, cross_.data(), cross_least_.data(), entries(), stride_});
}

void PairSearch::shares(const float* u, const float* v, float norm, float least, float temperature, Shares& out) const {
  static_assert(Shares::kBlock == kLanes);
  out.blocks.clear();
  // Blocks that are not kept are written behind the last that is.
  out.p.resize(std::max(out.p.size(), static_cast<size_t>(entries() * stride_ + kLanes)));
  HWY_DYNAMIC_DISPATCH(pair_shares)
  ({u, v, cross_.data(), cross_least_.data(), entries(), stride_}, norm, least, temperature, out);
}

void PairSearch::add(const Shares& shares, double weight, double* count, int64_t count_stride, double* rho,
                     double* kappa) const {
  HWY_DYNAMIC_DISPATCH(add_shares)(shares, entries(), weight, count, count_stride, rho, kappa);
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
