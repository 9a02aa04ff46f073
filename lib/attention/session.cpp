#include <numeric>

#include "attention/attention.h"
#include "core/clock.h"

namespace vqkv {

KvSession::KvSession(CompressedCache& cache, AttentionBackend& backend)
    : cache_(cache), backend_(backend), rope_(std::make_unique<RopeTable>(cache.shape().rope)) {}
KvSession::~KvSession() = default;

void KvSession::begin_block(int64_t tokens, Visibility visibility) { cache_.begin_block(tokens, visibility); }

void KvSession::attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) {
  const CacheShape& shape = cache_.shape();
  VQKV_CHECK(q.cols == int64_t{shape.q_heads} * shape.head_dim && out.rows == q.rows && out.cols == q.cols);
  cache_.append(layer, k, v);
  const Stopwatch watch;
  rotated_.resize(static_cast<size_t>(q.size()));
  MutMatrix rotated(rotated_.data(), q.rows, q.cols);
  for (int64_t r = 0; r < q.rows; ++r) std::copy_n(q.row(r), q.cols, rotated.row(r));
  std::vector<int32_t> positions(static_cast<size_t>(q.rows));
  std::iota(positions.begin(), positions.end(), static_cast<int32_t>(cache_.length()));
  rope_apply(*rope_, positions.data(), rotated);
  backend_.attend(cache_, layer, rotated, out, &stats_, tap_);
  attend_seconds_ += watch.seconds();
}

void KvSession::end_block() { cache_.end_block(); }

}  // namespace vqkv
