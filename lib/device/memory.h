// Memory of an emulated device, byte by byte: who wrote and read it last, and whether it holds a value at all.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device/happens_before.h"

namespace vqkv::device::emulated {

// What memory that nobody wrote holds: a NaN in every format.
inline constexpr unsigned char kPoison = 0xff;

enum class Access : uint8_t { kRead, kWrite, kAtomic };

struct Cell {
  Moment write, read[2];   // the last readers, of two warps where there were
  bool known = false;      // holds a value
  bool in_flight = false;  // of a copy that was not waited for
};

// Bytes that were asked for at once, between guards that nothing may touch.
struct Region {
  std::string name;  // "buffer codes", "shared piece 2"
  unsigned char* base = nullptr;
  size_t bytes = 0;
  bool shared = false;
  size_t used = 0;          // bytes of shared memory before this piece
  std::vector<Cell> cells;  // none: unwatched

  size_t offset(const void* p) const { return static_cast<size_t>(static_cast<const unsigned char*>(p) - base); }
};

// Takes what is wrong with an access: "race: ...", to be told once a line of source.
using Fault = std::function<void(const std::string& kind, const std::string& text)>;

class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Unwatched memory keeps no account of its bytes, 28 bytes each.
  void* allocate(size_t bytes, const std::string& name, bool watched);
  void release(void* p);
  // What a copy from the host filled; whether every byte that is copied to the host was written.
  void set_known(const void* p, size_t bytes);
  bool known(const void* p, size_t bytes);

  // Of a block: shared memory of `bytes`, in pieces that its threads carve alike.
  void start_block(size_t bytes, bool watched);
  // The k-th piece of a thread; `used`: bytes taken before. The reason why not in `wrong`, or "".
  unsigned char* take(size_t k, size_t used, size_t bytes, std::string& wrong);

  // Of a byte as a device lays it: shared memory without guards.
  uint64_t device_address(const Region& region, size_t offset) const;
  bool is_shared(const void* p) const { return p >= arena_ && p < arena_ + kArena; }
  // The region at p, its guards included, or null: memory of nobody.
  Region* find(const void* p);
  // One access of `thread` to bytes that lie in `region`, judged against those before it.
  void touch(Region& region, size_t offset, size_t bytes, Access access, unsigned thread, const HappensBefore& order,
             const Fault& fault);

 private:
  static constexpr size_t kArena = size_t{512} << 10;  // of shared memory, with guards
  static constexpr size_t kSharedGuard = 64, kGuard = 4096;
  unsigned char* arena_;
  size_t launched_ = 0;
  bool watched_ = true;
  std::vector<std::unique_ptr<Region>> pieces_;
  std::map<const unsigned char*, std::unique_ptr<Region>> buffers_;  // by base
  Region* last_ = nullptr;
};

}  // namespace vqkv::device::emulated
