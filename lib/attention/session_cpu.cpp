#include <algorithm>
#include <array>

#include "attention/session_cpu.h"
#include "core/clock.h"
#include "core/per_thread.h"
#include "core/thread_pool.h"

namespace vqkv {

KvSessionCpu::KvSessionCpu(CompressedCache& cache, AttentionBackend& backend, std::pmr::memory_resource* memory)
    : cache_(cache), backend_(backend), rotated_(memory) {}

int64_t KvSessionCpu::held_bytes() const { return capacity_bytes(rotated_); }

void KvSessionCpu::begin_block(int64_t tokens, Visibility visibility) { cache_.begin_block(tokens, visibility); }

void KvSessionCpu::attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) {
  const CacheView view(cache_);
  const CacheShape& shape = view.shape();
  VQKV_CHECK(q.cols == int64_t{shape.q_heads} * shape.head_dim && out.rows == q.rows && out.cols == q.cols);
  cache_.append(layer, k, v, q);
  const Stopwatch watch;
  // What a block needed is given back at the first step.
  if (q.rows == 1 && rotated_.size() > static_cast<size_t>(q.size()))
    std::pmr::vector<float>(rotated_.get_allocator()).swap(rotated_);
  rotated_.resize(static_cast<size_t>(q.size()));
  MutMatrix rotated(rotated_.data(), q.rows, q.cols);
  constexpr int64_t kRows = 32;  // a task: tens of microseconds
  parallel_for((q.rows + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t first = task * kRows, rows = std::min(kRows, q.rows - first);
    std::array<int32_t, kRows> positions;
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(q.row(first + r), q.cols, rotated.row(first + r));
      positions[static_cast<size_t>(r)] = static_cast<int32_t>(cache_.length() + first + r);
    }
    rope_apply(view.rope(), positions.data(), rotated.slice_rows(first, rows));
  });
  MassRequest mass = cache_.observe(layer);
  backend_.attend(view, layer, rotated, out, &stats_, tap_, mass.from < mass.to ? &mass : nullptr);
  attend_seconds_ += watch.seconds();
}

void KvSessionCpu::end_block() { cache_.end_block(); }

}  // namespace vqkv
