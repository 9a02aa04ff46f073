// What the lines of a kernel ask of memory: the k-th time each lane of a warp passes an instruction is one request.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "device/happens_before.h"
#include "device/source_line.h"

namespace vqkv::device::emulated {

// Of one line, over all launches that were profiled.
struct Traffic {
  std::string line;
  bool shared = false, writes = false;
  unsigned bytes = 0;     // a lane
  uint64_t requests = 0;  // of a warp
  uint64_t passes = 0;    // wavefronts over the 32 banks of shared memory, or sectors of 32 bytes of global memory
  uint64_t ideal = 0;     // the fewest that could bring as many different bytes
};

class Profile {
 public:
  // `address`: of shared memory as a device lays it, without guards.
  void add(const Place& place, unsigned thread, bool shared, bool writes, uint64_t address, unsigned bytes);
  void end_block();  // a warp's requests don't go on in the next
  std::vector<Traffic> take();

 private:
  struct Request {
    std::array<uint64_t, kLanes> address{};
    uint32_t lanes = 0;
  };
  struct Passes {  // of one instruction and warp
    std::vector<Request> requests;
    std::array<size_t, kLanes> passed{};
  };
  struct Key {
    Place place;
    bool shared, writes;
    unsigned bytes;
    auto operator<=>(const Key&) const = default;
  };
  std::map<std::pair<Key, unsigned>, Passes> open_;  // by instruction and warp
  std::map<Key, Traffic> sums_;
};

}  // namespace vqkv::device::emulated
