// Partial softmax states of the tiled backends, and how they are merged.
#include <algorithm>
#include <cmath>

#include "attention/code_sums_cpu.h"
#include "attention/kernels_cpu.h"
#include "attention/tiled_cpu.h"
#include "core/index.h"
#include "core/small_matrix.h"
#include "core/thread_pool.h"

namespace vqkv {
void Partial::reset(const TiledCall& call, const Piece& own, CodeSums* code_sums) {
  piece = own;
  sums = code_sums;
  const auto rows = static_cast<size_t>(piece.rows());
  width = call.width;
  top.assign(rows, kNegativeInfinity);
  sum.assign(rows, 0.0f);
  coded.assign(rows, 0.0f);
  out.assign(rows * static_cast<size_t>(width), 0.0f);
  own_domain = false;
  if (call.coded_unit(piece.head, Role::kValue) < 0) return;
  const TileDecoder& decoder = call.decoder(piece.head, Role::kValue);
  own_domain = decoder.folded() || piece.by_code;
  if (!own_domain) return;
  token_scale = decoder.has_token_scale();
  y_width = decoder.code_width();
  y_stride = padded(y_width);
  // Sums by code unfold whole groups of rows.
  y.assign((sums ? (rows + 15) / 16 * 16 : rows) * static_cast<size_t>(y_stride), 0.0f);
  mass.assign(rows, 0.0f);
  scaled.assign(rows, 0.0f);
  if (sums) sums->reset(decoder, piece.rows());
}

int64_t Partial::held_bytes() const {
  int64_t bytes = 0;
  for (const AlignedVector<float>* v : {&top, &sum, &coded, &out, &y, &mass, &scaled}) bytes += capacity_bytes(*v);
  return bytes;
}

void Partial::absorb(int64_t row, float* line, int64_t columns, int64_t begin, int64_t end) {
  const size_t r = at(row);
  const float found = kernels::row_max(line, columns);
  if (std::isnan(found)) {  // stays: the row must not pass for one that sees nothing here
    sum[r] = found;
    if (top[r] == kNegativeInfinity) top[r] = 0.0f;
    std::fill(line, line + columns, 0.0f);
    return;
  }
  // Sums by code are thousands of numbers a row: they follow a new maximum only where it is e^16 higher. fp32 holds
  // such sums with the same relative error, and far from its largest number.
  const float slack = sums && top[r] != kNegativeInfinity ? 16.0f : 0.0f;
  const float higher = found > top[r] + slack ? found : top[r];
  if (higher == kNegativeInfinity) {
    std::fill(line, line + columns, 0.0f);
    return;
  }
  if (higher > top[r] && top[r] != kNegativeInfinity) {
    const float f = std::exp(top[r] - higher);
    sum[r] *= f;
    coded[r] *= f;
    kernels::scale_row(out_row(row), width, f);
    if (own_domain) {
      mass[r] *= f;
      scaled[r] *= f;
      kernels::scale_row(y_row(row), y_stride, f);
    }
    if (sums) sums->scale(row - piece.row_begin, f);
  }
  top[r] = higher;
  sum[r] += kernels::exp_row(line, columns, higher);
  if (end > begin) coded[r] += kernels::range_sum(line, begin, end);
}

void Partial::weigh(int64_t row, float* line, int64_t begin, int64_t end, const float* scale) {
  const float m = kernels::range_sum(line, begin, end);
  mass[at(row)] += m;
  if (!token_scale) {
    scaled[at(row)] += m;
    return;
  }
  for (int64_t t = begin; t < end; ++t) line[t] *= scale[t];
  scaled[at(row)] += kernels::range_sum(line, begin, end);
}

void Partial::unfold(const TiledCall& call) {
  if (!own_domain) return;
  const TileDecoder& decoder = call.decoder(piece.head, Role::kValue);
  if (sums) sums->unfold(y.data(), y_stride);
  sums = nullptr;
  decoder.map().multiply(y.data(), y_stride, out.data(), width, piece.rows(), true);
  for (int64_t r = 0; r < piece.rows(); ++r) {
    const auto i = static_cast<size_t>(r);
    float* to = out.data() + r * width;
    if (!decoder.inner_bias().empty()) kernels::add_scaled(decoder.inner_bias().data(), call.d, scaled[i], to);
    if (!decoder.outer_bias().empty()) kernels::add_scaled(decoder.outer_bias().data(), call.d, mass[i], to);
  }
}

void merge_partials(const TiledCall& call, const std::vector<Partial>& partials, size_t pieces, MutMatrix out,
                    AttendStats* stats, RowStates* states) {
  if (states) states->resize(at(call.cache.shape().kv_heads * call.rows));
  const int64_t heads = call.cache.shape().kv_heads;
  std::vector<std::vector<const Partial*>> of_head(static_cast<size_t>(heads));
  for (size_t i = 0; i < pieces; ++i) of_head[static_cast<size_t>(partials[i].piece.head)].push_back(&partials[i]);
  std::vector<float> share(at(heads * call.rows), 0.0f);
  constexpr int64_t kRowsAtOnce = 64;
  const int64_t steps = (call.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  parallel_for(heads * steps, [&](int64_t item) {
    const int64_t h = item / steps;
    for (int64_t row = item % steps * kRowsAtOnce; row < std::min(call.rows, (item % steps + 1) * kRowsAtOnce); ++row) {
      const auto each = [&](auto&& body) {
        for (const Partial* p : of_head[at(h)])
          if (row >= p->piece.row_begin && row < p->piece.row_end && p->top[p->at(row)] != kNegativeInfinity) body(*p);
      };
      float top = kNegativeInfinity;
      each([&](const Partial& p) { top = std::max(top, p.top[p.at(row)]); });
      float* to = out.row(row / call.group) + (h * call.group + row % call.group) * call.d;
      std::fill(to, to + call.d, 0.0f);
      // Without a score there is no softmax: 0/0, as by the definition.
      float sum = 0, coded = 0;
      each([&](const Partial& p) {
        const size_t r = p.at(row);
        const float f = std::exp(p.top[r] - top);
        sum += f * p.sum[r];
        coded += f * p.coded[r];
        kernels::add_scaled(p.out.data() + static_cast<int64_t>(r) * p.width, call.d, f, to);
      });
      kernels::scale_row(to, call.d, 1.0f / sum);
      share[at(h * call.rows + row)] = coded / sum;
      if (states) (*states)[at(h * call.rows + row)] = {top, sum};
    }
  });
  if (!stats) return;
  for (const float s : share) {
    stats->coded_mass += s;
    stats->total_mass += 1.0;
  }
}

}  // namespace vqkv
