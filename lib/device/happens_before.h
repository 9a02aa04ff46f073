// Which events of a launch are ordered on a device, whatever order the emulator runs them in: by a barrier of the
// block, by __syncwarp in a warp (a shuffle orders nothing), and between blocks by a fence, an atomic and another on
// the same address. Launches are ordered as they come.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <vector>

namespace vqkv::device::emulated {

inline constexpr unsigned kLanes = 32;

// When a thread did something. An epoch lasts from one barrier of a block to its next and is of that block alone.
struct Moment {
  uint32_t epoch = 0;  // 0: never
  uint16_t thread : 15 = 0;
  uint16_t atomic : 1 = 0;
  uint16_t clock = 0;  // of the thread within its warp
};

class HappensBefore {
 public:
  void start_launch() { launch_ = ++epoch_, released_.clear(); }
  void start_block(unsigned threads);
  void barrier() { ++epoch_; }
  // The lanes of `arrived` in warp `warp` meet in a __syncwarp.
  void join(unsigned warp, unsigned arrived);
  void fence(unsigned thread, unsigned alive);
  // An atomic operation of `thread`: it takes over what others published before at this address, and publishes.
  void atomic(unsigned thread, const void* address);

  Moment now(unsigned thread, bool atomic) const;
  // Whether what happened then is ordered before what `thread` does now. `shared`: in shared memory, which blocks don't
  // have in common.
  bool before(const Moment& then, unsigned thread, bool shared) const;
  bool of_this_block(const Moment& then) const { return then.epoch >= block_; }

 private:
  using Clocks = std::array<uint16_t, kLanes>;
  // What others may see: epochs [first, last] of a block, and what one thread did up to a moment of a later epoch.
  struct Published {
    uint32_t first = 0, last = 0, own_epoch = 0;
    uint16_t own_thread = 0, own_clock = 0;
  };
  struct Fence {
    uint32_t epoch = 0;
    uint16_t clock = 0;
  };
  struct Acquired {
    Published what;
    uint32_t epoch;
    uint16_t thread;
  };
  uint32_t epoch_ = 1, block_ = 1, launch_ = 1;
  std::vector<Clocks> clocks_;                 // a thread: what it has seen of each lane of its warp
  std::vector<Fence> fenced_;                  // a thread: its last one
  uint32_t fence_epoch_ = 0, everything_ = 0;  // the epoch that is being fenced; the last that all threads have fenced
  unsigned fences_ = 0;
  std::map<const void*, std::vector<Published>> released_;
  std::vector<Acquired> acquired_;
};

}  // namespace vqkv::device::emulated
