// What the splits of one launch of attention leave for each other, on a device.
#pragma once
#include <cstddef>

#include "core/error.h"
#include "device/runtime.h"

namespace vqkv {

// For each row (sequence, KV head), split and query head of the group.
struct SplitStates {
  float* out = nullptr;         // (rows, splits, group, head_dim)
  float* state = nullptr;       // (rows, splits, group, 2): the largest score, and the sum
  unsigned* arrived = nullptr;  // (rows): 0 before a launch, and after it
};

// Room for them, kept from launch to launch; none for one split alone.
class SplitRoom {
 public:
  SplitRoom(int rows, int splits, int group, int head_dim) : splits_(splits) {
    VQKV_CHECK(rows >= 1 && splits >= 1 && group >= 1 && head_dim >= 1);
    if (splits == 1) return;
    const auto n = static_cast<size_t>(rows), parts = n * static_cast<size_t>(splits) * static_cast<size_t>(group);
    out_ = device::Buffer<float>(parts * static_cast<size_t>(head_dim), "outputs of splits");
    state_ = device::Buffer<float>(parts * 2, "states of splits");
    arrived_ = device::Buffer<unsigned>(n, "arrivals");
    arrived_.zero();
  }
  int splits() const { return splits_; }
  SplitStates states() { return {out_.data(), state_.data(), arrived_.data()}; }

 private:
  int splits_;
  device::Buffer<float> out_, state_;
  device::Buffer<unsigned> arrived_;
};

}  // namespace vqkv
