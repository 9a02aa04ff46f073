#include "core/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

#include "core/error.h"
#include "core/round_up.h"

namespace vqkv {
namespace {

constexpr int64_t kPage = int64_t{2} << 20;
constexpr int64_t kSlab = int64_t{32} << 20;  // address space; what is not touched takes no memory

class Slab {
 public:
  explicit Slab(int64_t bytes) : mapped_(round_up(bytes, kPage) + kPage) {
    map_ = mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    const int64_t skipped = (kPage - static_cast<int64_t>(reinterpret_cast<uintptr_t>(map_) % kPage)) % kPage;
    data_ = static_cast<std::byte*>(map_) + skipped;
    size_ = mapped_ - kPage;
    // A request: where it is refused, pages are small and everything still works.
    madvise(data_, static_cast<size_t>(size_), MADV_HUGEPAGE);
  }
  ~Slab() { munmap(map_, static_cast<size_t>(mapped_)); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  std::byte* take(int64_t bytes) {
    if (bytes > size_ - used_) return nullptr;
    std::byte* at = data_ + used_;
    used_ = std::min(size_, used_ + round_up(bytes, 64));
    return at;
  }

 private:
  int64_t mapped_;
  void* map_ = nullptr;
  std::byte* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace

std::shared_ptr<std::byte> huge_page_memory(int64_t bytes) {
  VQKV_CHECK(bytes > 0);
  static std::mutex mutex;
  static std::weak_ptr<Slab> open;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Slab> slab = open.lock();
  std::byte* at = slab ? slab->take(bytes) : nullptr;
  if (!at) {
    slab = std::make_shared<Slab>(std::max(bytes, kSlab));
    at = slab->take(bytes);
    open = slab;
  }
  return {std::move(slab), at};
}

}  // namespace vqkv
