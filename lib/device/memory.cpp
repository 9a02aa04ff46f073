#include "device/memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/error.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#endif

namespace vqkv::device::emulated {
namespace {

constexpr size_t kPage = 4096;
// As a device aligns what it allocates, and pieces of shared memory.
constexpr size_t kPiece = 16;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

unsigned char* pages(size_t bytes) {
  auto* p = static_cast<unsigned char*>(std::aligned_alloc(kPage, rounded(bytes, kPage)));
  if (!p) fail_usage(fmt::format("the emulated device: {} bytes of memory can't be had", bytes));
  return p;
}

std::string who(unsigned thread) {
  return fmt::format("thread {} (warp {}, lane {})", thread, thread / kLanes, thread % kLanes);
}

}  // namespace

Memory::Memory() : arena_(pages(kArena)) { ASAN_POISON_MEMORY_REGION(arena_, kArena); }

Memory::~Memory() {
  ASAN_UNPOISON_MEMORY_REGION(arena_, kArena);
  std::free(arena_);
  while (!buffers_.empty()) release(buffers_.begin()->second->base);
}

void* Memory::allocate(size_t bytes, const std::string& name, bool watched) {
  auto region = std::make_unique<Region>();
  unsigned char* raw = pages(bytes + 2 * kGuard);
  std::memset(raw, kPoison, bytes + 2 * kGuard);
  region->name = "buffer " + name;
  region->base = raw + kGuard;
  region->bytes = bytes;
  if (watched) region->cells.resize(bytes);
  ASAN_POISON_MEMORY_REGION(raw, kGuard);
  ASAN_POISON_MEMORY_REGION(raw + kGuard + rounded(bytes, 8), kGuard - 8);
  unsigned char* base = region->base;
  buffers_[base] = std::move(region);
  return base;
}

void Memory::release(void* p) {
  const auto it = buffers_.find(static_cast<unsigned char*>(p));
  VQKV_CHECK(it != buffers_.end());
  unsigned char* raw = it->second->base - kGuard;
  ASAN_UNPOISON_MEMORY_REGION(raw, it->second->bytes + 2 * kGuard);
  std::free(raw);
  buffers_.erase(it);
  last_ = nullptr;
}

void Memory::set_known(const void* p, size_t bytes) {
  Region* r = find(p);
  VQKV_CHECK(r && r->offset(p) + bytes <= r->bytes);
  if (r->cells.empty()) return;
  for (size_t i = 0; i < bytes; ++i) r->cells[r->offset(p) + i].known = true;
}

bool Memory::known(const void* p, size_t bytes) {
  Region* r = find(p);
  VQKV_CHECK(r && r->offset(p) + bytes <= r->bytes);
  if (r->cells.empty()) return true;
  const auto first = r->cells.begin() + static_cast<std::ptrdiff_t>(r->offset(p));
  return std::all_of(first, first + static_cast<std::ptrdiff_t>(bytes), [](const Cell& c) { return c.known; });
}

void Memory::start_block(size_t bytes, bool watched) {
  watched_ = watched;
  launched_ = bytes;
  pieces_.clear();
  last_ = nullptr;
  ASAN_UNPOISON_MEMORY_REGION(arena_, kArena);
  std::memset(arena_, kPoison, kArena);
  ASAN_POISON_MEMORY_REGION(arena_, kArena);
}

unsigned char* Memory::take(size_t k, size_t used, size_t bytes, std::string& wrong) {
  unsigned char* base = arena_ + used + (k + 1) * kSharedGuard;
  if (used + rounded(bytes, kPiece) > launched_)
    wrong = fmt::format("shared memory: the kernel takes {} bytes and was launched with {}",
                        used + rounded(bytes, kPiece), launched_);
  VQKV_CHECK(base + bytes + kSharedGuard <= arena_ + kArena && k <= pieces_.size());
  if (k == pieces_.size()) {
    auto piece = std::make_unique<Region>();
    piece->name = fmt::format("shared piece {}", k);
    piece->base = base;
    piece->bytes = bytes;
    piece->shared = true;
    piece->used = used;
    if (watched_) piece->cells.resize(bytes);
    ASAN_UNPOISON_MEMORY_REGION(base, bytes);
    pieces_.push_back(std::move(piece));
  } else if (pieces_[k]->base != base || pieces_[k]->bytes != bytes) {
    wrong = "shared memory: threads of a block carve it differently";
  }
  return base;
}

uint64_t Memory::device_address(const Region& region, size_t offset) const {
  return region.shared ? region.used + offset : reinterpret_cast<uint64_t>(region.base) + offset;
}

Region* Memory::find(const void* address) {
  const auto* p = static_cast<const unsigned char*>(address);
  const auto near = [&](const Region& r, size_t guard) { return p >= r.base - guard && p < r.base + r.bytes + guard; };
  if (last_ && near(*last_, 0)) return last_;
  if (is_shared(p)) {  // the nearest piece below, else the first
    if (pieces_.empty()) return nullptr;
    const auto it = std::find_if(pieces_.rbegin(), pieces_.rend(), [&](const auto& r) { return r->base <= p; });
    return last_ = it == pieces_.rend() ? pieces_.front().get() : it->get();
  }
  const auto above = buffers_.upper_bound(p + kGuard);
  if (above == buffers_.begin()) return nullptr;
  Region* below = std::prev(above)->second.get();
  return near(*below, kGuard) ? last_ = below : nullptr;
}

void Memory::touch(Region& region, size_t offset, size_t bytes, Access access, unsigned thread,
                   const HappensBefore& order, const Fault& fault) {
  if (region.cells.empty()) return;
  const bool writes = access != Access::kRead, reads = access != Access::kWrite;
  const Moment now = order.now(thread, access == Access::kAtomic);
  const auto races = [&](const Moment& then) {
    return then.epoch != 0 && !(now.atomic && then.atomic) && !order.before(then, thread, region.shared);
  };
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& c = region.cells[i];
    const auto tell = [&](const std::string& kind, const std::string& text) {
      fault(kind, fmt::format("{}, {} byte {}", text, region.name, i));
    };
    const auto race = [&](const char* kind, const Moment& then) {
      tell(kind,
           order.of_this_block(then)
               ? fmt::format("race, {}: {} and {} with no barrier between them", kind, who(thread), who(then.thread))
               : fmt::format("race, {}: {} and one of another block with no fence and atomics between them", kind,
                             who(thread)));
    };
    if (c.in_flight) tell("in flight", who(thread) + " touches what an asynchronous copy fills before it waits for it");
    if (reads && !c.known) {
      tell("unwritten", who(thread) + " reads what nobody wrote");
      c.known = true;  // once
    }
    if (races(c.write)) race(writes ? "write after write" : "read after write", c.write);
    if (!writes) {
      // Two warps' readers are kept: a write must be ordered behind both.
      Moment& first = c.read[0];
      if (first.thread != now.thread && (first.thread / kLanes != thread / kLanes || c.read[1].epoch != now.epoch))
        c.read[1] = first;
      first = now;
      continue;
    }
    for (const Moment& read : c.read)
      if (races(read)) {
        race("write after read", read);
        break;
      }
    c.write = now;
    c.known = true;
  }
}

}  // namespace vqkv::device::emulated
