#include "device/happens_before.h"

#include <algorithm>

namespace vqkv::device::emulated {

void HappensBefore::start_block(unsigned threads) {
  block_ = ++epoch_;
  clocks_.assign(threads, {});
  for (unsigned t = 0; t < threads; ++t) clocks_[t][t % kLanes] = 1;
  fenced_.assign(threads, {});
  fence_epoch_ = everything_ = fences_ = 0;
  acquired_.clear();
}

void HappensBefore::join(unsigned warp, unsigned arrived) {
  Clocks seen{};
  const auto each = [&](auto visit) {
    for (unsigned l = 0; l < kLanes; ++l)
      if (arrived >> l & 1) visit(l, clocks_[warp * kLanes + l]);
  };
  each([&](unsigned, const Clocks& c) {
    for (unsigned k = 0; k < kLanes; ++k) seen[k] = std::max(seen[k], c[k]);
  });
  each([&](unsigned l, Clocks& c) {
    c = seen;
    ++c[l];
  });
}

// A thread's fence publishes what it did itself and, since barriers order all threads, every earlier epoch.
void HappensBefore::fence(unsigned thread, unsigned alive) {
  if (fence_epoch_ != epoch_) fence_epoch_ = epoch_, fences_ = 0;
  if (fenced_[thread].epoch != epoch_) ++fences_;
  fenced_[thread] = {epoch_, clocks_[thread][thread % kLanes]++};
  if (fences_ == alive) everything_ = epoch_;
}

void HappensBefore::atomic(unsigned thread, const void* address) {
  std::vector<Published>& released = released_[address];
  for (const Published& p : released) acquired_.push_back({p, epoch_, static_cast<uint16_t>(thread)});
  const Fence& own = fenced_[thread];
  if (own.epoch < block_) return;  // no fence yet: nothing is published
  released.push_back(
      {block_, std::max(everything_, own.epoch - 1), own.epoch, static_cast<uint16_t>(thread), own.clock});
}

Moment HappensBefore::now(unsigned thread, bool atomic) const {
  Moment m;
  m.epoch = epoch_;
  m.thread = static_cast<uint16_t>(thread & 0x7fffu);
  m.atomic = atomic;
  m.clock = clocks_[thread][thread % kLanes];
  return m;
}

bool HappensBefore::before(const Moment& then, unsigned thread, bool shared) const {
  if (then.epoch >= block_) {
    if (then.epoch != epoch_ || then.thread == thread) return true;
    return then.thread / kLanes == thread / kLanes && clocks_[thread][then.thread % kLanes] >= then.clock;
  }
  if (shared || then.epoch < launch_) return true;
  return std::any_of(acquired_.begin(), acquired_.end(), [&](const Acquired& a) {
    if (a.thread != thread && a.epoch == epoch_) return false;  // another thread's, with no barrier since
    return (then.epoch >= a.what.first && then.epoch <= a.what.last) ||
           (then.epoch == a.what.own_epoch && then.thread == a.what.own_thread && then.clock <= a.what.own_clock);
  });
}

}  // namespace vqkv::device::emulated
