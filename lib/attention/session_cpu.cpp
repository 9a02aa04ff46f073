#include <algorithm>
#include <array>

#include "attention/attention.h"
#include "cache/policies/keep_policy.h"
#include "core/clock.h"
#include "core/thread_pool.h"

namespace vqkv {

// Sums the columns of every block's probabilities by KV head, and hands them on to the tap of the caller.
class KvSession::MassTap final : public AttentionTap {
 public:
  MassTap(KeepPolicy& policy, const CacheShape& shape)
      : policy_(policy), layers_(shape.layers), heads_(shape.kv_heads), group_(shape.group()) {}

  void begin(int64_t first, int64_t tokens) {
    first_ = first;
    mass_.assign(static_cast<size_t>(layers_ * heads_), std::vector<double>(static_cast<size_t>(tokens), 0.0));
  }
  void on_probabilities(int layer, int q_head, int64_t first_position, ConstMatrix p) override {
    std::vector<double>& mass = mass_[static_cast<size_t>(layer * heads_ + q_head / group_)];
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t t = 0; t < p.cols; ++t) mass[static_cast<size_t>(t)] += p(i, t);
    if (next) next->on_probabilities(layer, q_head, first_position, p);
  }
  void finish(CompressedCache& cache) {
    for (int layer = 0; layer < layers_; ++layer)
      for (int head = 0; head < heads_; ++head) {
        const std::vector<double>& mass = mass_[static_cast<size_t>(layer * heads_ + head)];
        policy_.observe(layer, head, first_, std::vector<float>(mass.begin(), mass.end()));
      }
    apply_keep_policy(policy_, cache);
  }

  AttentionTap* next = nullptr;

 private:
  KeepPolicy& policy_;
  int layers_, heads_, group_;
  int64_t first_ = 0;
  std::vector<std::vector<double>> mass_;  // (layers * kv_heads, tokens)
};

KvSession::KvSession(CompressedCache& cache, AttentionBackend& backend) : cache_(cache), backend_(backend) {}
KvSession::~KvSession() = default;

void KvSession::begin_block(int64_t tokens, Visibility visibility) {
  cache_.begin_block(tokens, visibility);
  if (mass_) mass_->begin(cache_.length(), cache_.length() + tokens);
}

void KvSession::set_keep_policy(KeepPolicy* policy) {
  mass_ = policy ? std::make_unique<MassTap>(*policy, cache_.shape()) : nullptr;
}

void KvSession::attend(int layer, ConstMatrix q, ConstMatrix k, ConstMatrix v, MutMatrix out) {
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
  if (mass_) mass_->next = tap_;
  backend_.attend(view, layer, rotated, out, &stats_, mass_ ? mass_.get() : tap_);
  attend_seconds_ += watch.seconds();
}

void KvSession::end_block() {
  cache_.end_block();
  if (mass_) mass_->finish(cache_);
}

}  // namespace vqkv
