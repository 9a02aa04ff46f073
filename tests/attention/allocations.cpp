// operator new that counts, by what malloc gives, so that nothing is stored beside the blocks.
#include "support/allocations.h"

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace vqkv::test {
namespace {

std::atomic<int64_t> live{0}, peak{0};

[[maybe_unused]] void* counted(void* p) {
  if (!p) throw std::bad_alloc();
  const auto bytes = static_cast<int64_t>(malloc_usable_size(p));
  const int64_t now = live.fetch_add(bytes) + bytes;
  int64_t seen = peak.load();
  while (now > seen && !peak.compare_exchange_weak(seen, now)) {}
  return p;
}

[[maybe_unused]] void release(void* p) {
  live.fetch_sub(static_cast<int64_t>(malloc_usable_size(p)));
  std::free(p);
}

}  // namespace

int64_t live_bytes() { return live; }
int64_t peak_bytes() { return peak; }
void restart_peak() { peak = live.load(); }

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
bool counts_allocations() { return false; }
}  // namespace vqkv::test
#else
bool counts_allocations() { return true; }
}  // namespace vqkv::test

void* operator new(size_t n) { return vqkv::test::counted(std::malloc(n > 0 ? n : 1)); }
void* operator new(size_t n, std::align_val_t to) {
  const auto align = static_cast<size_t>(to);
  return vqkv::test::counted(std::aligned_alloc(align, (n + align - 1) / align * align));
}
void operator delete(void* p) noexcept { vqkv::test::release(p); }
void operator delete(void* p, size_t) noexcept { vqkv::test::release(p); }
void operator delete(void* p, std::align_val_t) noexcept { vqkv::test::release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { vqkv::test::release(p); }
#endif
