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

void CacheRows::queries(int head, MutMatrix out) const {
  const CacheShape& shape = map_.model->shape();
  const int layer = map_.model->units()[unit_].shape.layer;
  const int64_t group = shape.group(), d = shape.head_dim, tokens = out.rows / group;
  const HeldQueries& held = map_.queries[static_cast<size_t>(layer)];
  VQKV_CHECK(tokens <= held.count);
  const ConstMatrix all(reinterpret_cast<const float*>(HostStore::at(held.rows)), tokens, shape.q_heads * d);
  std::vector<int32_t> position(static_cast<size_t>(group));
  for (int64_t t = 0; t < tokens; ++t) {
    const MutMatrix rows = out.slice_rows(t * group, group);
    for (int64_t g = 0; g < group; ++g) std::copy_n(all.row(t) + (head * group + g) * d, d, rows.row(g));
    std::ranges::fill(position, static_cast<int32_t>(t));
    if (map_.model->keys_post_rope(layer, head)) rope_apply(map_.model->rope(), position.data(), rows);
  }
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
