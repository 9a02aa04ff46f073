#include <algorithm>
#include <array>

#include "attention/session_cpu.h"
#include "cache/policies/keep_policy.h"
#include "core/clock.h"
#include "core/thread_pool.h"

namespace vqkv {

KvSessionCpu::KvSessionCpu(CompressedCache& cache, AttentionBackend& backend) : cache_(cache), backend_(backend) {}

void KvSessionCpu::begin_block(int64_t tokens, Visibility visibility) {
  cache_.begin_block(tokens, visibility);
  mass_.clear();
  if (policy_) mass_.resize(static_cast<size_t>(cache_.shape().layers * cache_.shape().kv_heads));
}

void KvSessionCpu::attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) {
  const CacheView view(cache_);
  const CacheShape& shape = view.shape();
  VQKV_CHECK(q.cols == int64_t{shape.q_heads} * shape.head_dim && out.rows == q.rows && out.cols == q.cols);
  cache_.append(layer, k, v);
  const Stopwatch watch;
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
  MassRequest mass{cache_.length(), cache_.length() + q.rows, {}};
  if (policy_)
    for (int h = 0; h < shape.kv_heads; ++h) {
      std::vector<double>& received = mass_[static_cast<size_t>(layer * shape.kv_heads + h)];
      received.assign(view.seen(layer, h).size(), 0.0);
      mass.received.emplace_back(received);
    }
  backend_.attend(view, layer, rotated, out, &stats_, tap_, policy_ ? &mass : nullptr);
  attend_seconds_ += watch.seconds();
}

void KvSessionCpu::end_block() {
  const int64_t first = cache_.length();
  cache_.end_block();
  if (!policy_) return;
  const int heads = cache_.shape().kv_heads;
  for (size_t i = 0; i < mass_.size(); ++i) {
    const int layer = static_cast<int>(i) / heads, head = static_cast<int>(i) % heads;
    const std::vector<int32_t> seen = CacheView(cache_).seen(layer, head);
    std::vector<double> by_token(static_cast<size_t>(cache_.length()), 0.0);
    for (size_t c = 0; c < seen.size(); ++c) by_token[static_cast<size_t>(seen[c])] = mass_[i][c];
    policy_->observe(layer, head, first, by_token);
  }
  apply_keep_policy(*policy_, cache_);
}

}  // namespace vqkv
