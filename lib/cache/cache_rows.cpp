#include "cache/cache_rows.h"

#include <algorithm>
#include <numeric>

#include "cache/store.h"
#include "cache/view.h"

namespace vqkv {
namespace {

// A token's place is its position: what a policy gives up leaves a gap.
void count_from(int64_t first, std::span<int32_t> out) {
  std::iota(out.begin(), out.end(), static_cast<int32_t>(first));
}

}  // namespace

void CacheRows::load(Role role, int head, int64_t first, MutMatrix out) const {
  const int layer = map_.model->units()[unit_].shape.layer;
  if (role == Role::kValue) {
    load_exact_values(map_, layer, head, first, out.rows, out.data, out.stride);
    return;
  }
  Matrix<float> transposed(out.cols, out.rows);
  load_exact_keys(map_, layer, head, first, out.rows, transposed.data(), out.rows);
  for (int64_t t = 0; t < out.rows; ++t)
    for (int64_t c = 0; c < out.cols; ++c) out(t, c) = transposed(c, t);
}

void CacheRows::positions(int64_t first, std::span<int32_t> out) const { count_from(first, out); }

void CacheRows::lower(int64_t first, MutMatrix out) const {
  const auto below = static_cast<size_t>(map_.model->units()[unit_].lower);
  const Matrix<float> rows = CacheView(map_).decode_codes(below, first - map_.policy.sinks, out.rows);
  for (int64_t t = 0; t < out.rows; ++t) std::copy_n(rows.row(t), out.cols, out.row(t));
}

size_t CacheAgedRows::newer(Role role, int kv_head) const {
  const CacheModel::Unit& u = map_.model->units()[unit_];
  return static_cast<size_t>(map_.model->unit_of(u.shape.layer, kv_head, role, u.tier - 1));
}

void CacheAgedRows::load(Role role, int kv_head, int64_t first, MutMatrix out) const {
  const size_t from = newer(role, kv_head);
  const UnitShape& u = map_.model->units()[from].shape;
  const Matrix<float> rows = CacheView(map_).decode_codes(from, first - map_.policy.sinks, out.rows);
  for (int64_t t = 0; t < out.rows; ++t)
    std::copy_n(rows.row(t) + (kv_head - u.first_head) * u.head_dim, out.cols, out.row(t));
}

void CacheAgedRows::positions(int64_t first, std::span<int32_t> out) const { count_from(first, out); }

CodeBlock CacheAgedRows::codes(int64_t from, int64_t to) const {
  const UnitShape& u = map_.model->units()[unit_].shape;
  return CacheView(map_).fetch_codes(newer(u.role, u.first_head), from - map_.policy.sinks, to - from);
}

const CodeLayout& CacheAgedRows::layout() const {
  const UnitShape& u = map_.model->units()[unit_].shape;
  return map_.form(newer(u.role, u.first_head)).plan.layout;
}

}  // namespace vqkv
