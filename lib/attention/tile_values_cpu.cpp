#include <algorithm>

#include "attention/level_tiles_cpu.h"
#include "attention/tile_parts_cpu.h"
#include "core/small_matrix.h"

namespace vqkv {

TileForms load_value_tile(const TiledCall& call, int head, bool by_code, int64_t begin, int64_t count, TileScratch& s) {
  TileForms f;
  const RoleExtent e = call.extent(head, Role::kValue, begin, count);
  f.main = ensure_floats(s.values, kTile * call.width);
  f.folded = e.any_coded() && call.decoder(head, Role::kValue).folded();
  f.table = e.any_coded() && by_code;
  const int64_t shared_end = f.folded || f.table ? e.coded_begin : e.all_coded_end;
  if (e.begin > 0) std::fill(f.main, f.main + e.begin * call.width, 0.0f);  // weights of zero still multiply them
  if (e.coded_begin > e.begin)
    call.load_exact(head, Role::kValue, begin + e.begin, e.coded_begin - e.begin, f.main + e.begin * call.width,
                    call.width);
  if (e.all_coded_end < count)
    call.load_exact(head, Role::kValue, begin + e.all_coded_end, count - e.all_coded_end,
                    f.main + e.all_coded_end * call.width, call.width);
  f.other_begin = shared_end;
  f.other_end = e.any_coded_end;
  if (e.dropped)  // weights of zero still multiply them
    std::fill(f.main + e.coded_begin * call.width, f.main + e.all_coded_end * call.width, 0.0f);
  if (!e.any_coded()) return f;
  const TileDecoder& decoder = call.decoder(head, Role::kValue);
  const int64_t origin = begin - call.columns(head).sinks;
  if (shared_end > e.coded_begin)
    call.decode(head, Role::kValue, origin + e.coded_begin, shared_end - e.coded_begin,
                f.main + e.coded_begin * call.width, call.width);
  if (f.table && !decoder.only_levels()) {
    s.value_codes.resize(decoder.code_slots().size() * kTile);
    call.codes(head, Role::kValue, origin + f.other_begin, f.other_end - f.other_begin,
               s.value_codes.data() + f.other_begin, kTile);
  } else if (!f.table && f.other_end > f.other_begin) {
    const int64_t wide = padded(decoder.width());
    f.other = ensure_floats(s.other_values, kTile * wide);
    call.decode(head, Role::kValue, origin + f.other_begin, f.other_end - f.other_begin, f.other + f.other_begin * wide,
                wide);
  }
  if ((f.folded || f.table) && f.other_end > f.other_begin && decoder.has_token_scale()) {
    ensure_floats(s.scale, 2 * kTile);
    call.token_scale(head, Role::kValue, origin + f.other_begin, f.other_end - f.other_begin,
                     s.scale.data() + kTile + f.other_begin);
  }
  return f;
}

void sum_tile(const TiledCall& call, const TileForms& v, Partial& p, int64_t begin, int64_t count, int64_t row,
              int64_t batch, TileScratch& s) {
  const auto add_main = [&](int64_t r, int64_t n, int64_t from, int64_t to) {
    if (to > from)
      kernels::multiply(s.scores.data() + r * kTile + from, kTile, v.main + from * call.width, call.width,
                        p.out_row(row + r), call.width, n, to - from, call.width, true);
  };
  if (!(v.other || v.table) || count <= v.other_begin) {
    add_main(0, batch, 0, count);
    return;
  }
  const int64_t other_end = std::min(count, v.other_end);
  const HeadColumns& columns = call.columns(p.piece.head);
  // Rows see ever later boundaries.
  const auto boundary = [&](int64_t i) {
    return std::clamp(columns.v_end[static_cast<size_t>((row + i) / call.group)] - begin, v.other_begin, other_end);
  };
  add_main(0, batch, 0, v.other_begin);
  for (int64_t r = 0; r < batch;) {
    // Rows that see the same boundary go together.
    const int64_t end = boundary(r);
    int64_t n = 1;
    while (r + n < batch && boundary(r + n) == end) ++n;
    if (end > v.other_begin) {
      if (v.folded || v.table)
        for (int64_t i = r; i < r + n; ++i) {
          // From the row's own first token, whatever others see: sums depend on where they begin.
          const int64_t from = columns.from[static_cast<size_t>((row + i) / call.group)] - begin;
          const int64_t first = std::max(v.other_begin, from);
          p.weigh(row + i, s.scores.data() + i * kTile, first,
                  std::max(first, std::min(end, call.seen(p.piece.head, row + i, begin, end))), s.scale.data() + kTile);
        }
      if (v.table && !p.sums) {
        sum_level_tile(call, p.piece.head, begin, v.other_begin, end, s.scores.data() + r * kTile, n, p.y_row(row + r),
                       p.y_stride);
      } else if (v.folded && !v.table) {
        kernels::multiply(s.scores.data() + r * kTile + v.other_begin, kTile, v.other + v.other_begin * p.y_stride,
                          p.y_stride, p.y_row(row + r), p.y_stride, n, end - v.other_begin, p.y_stride, true);
      } else if (!v.table) {
        kernels::multiply(s.scores.data() + r * kTile + v.other_begin, kTile, v.other + v.other_begin * call.width,
                          call.width, p.out_row(row + r), call.width, n, end - v.other_begin, call.width, true);
      }
    }
    add_main(r, n, end, other_end);
    r += n;
  }
  if (v.table && p.sums) {
    const int64_t lanes = p.sums->lanes(), last = boundary(batch - 1), n = last - v.other_begin;
    if (n > 0) {
      for (int64_t r = batch; r < lanes; ++r) std::fill_n(s.scores.data() + r * kTile + v.other_begin, n, 0.0f);
      float* weights = ensure_floats(s.weights, kTile * lanes);
      if (lanes == 1)
        std::copy_n(s.scores.data() + v.other_begin, n, weights);
      else
        kernels::transpose(s.scores.data() + v.other_begin, kTile, lanes, n, weights, lanes, false);
      for (int64_t r = 0; r < batch; ++r)
        for (int64_t t = boundary(r); t < last; ++t) weights[(t - v.other_begin) * lanes + r] = 0.0f;
      p.sums->add(row - p.piece.row_begin, weights, n, s.value_codes.data() + v.other_begin, kTile);
    }
  }
  add_main(0, batch, other_end, count);
}

}  // namespace vqkv
