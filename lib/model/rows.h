// Row-wise work of a model's layers, spread over the threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/thread_pool.h"
#include "core/view.h"
#include "model/kernels_cpu.h"

namespace vqkv {

// body(r) for every row, some rows a task: a few hundred microseconds at most.
template <class Body>
void for_rows(int64_t rows, Body&& body) {
  constexpr int64_t kRowsPerTask = 16;
  parallel_chunks(rows, kRowsPerTask, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) body(r);
  });
}

// rms_norm of every row; out may be x.
inline void norm_rows(ConstMatrix x, const float* weight, double eps, MutMatrix out) {
  for_rows(x.rows, [&](int64_t r) { rms_norm(x.row(r), weight, eps, out.row(r), x.cols); });
}

}  // namespace vqkv
