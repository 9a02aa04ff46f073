// Buffers that each thread keeps between calls, and what they hold in all.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

namespace vqkv {

// Bytes that a vector holds on to, whatever of them is in use.
template <class V>
int64_t capacity_bytes(const V& v) {
  return static_cast<int64_t>(v.capacity() * sizeof(typename V::value_type));
}

// One T a thread. T has `int64_t held_bytes() const`.
template <class T>
class PerThread {
 public:
  static T& here() {
    thread_local Entry entry;
    return entry.value;
  }
  // Of all threads; while none of them works with its own.
  static int64_t held_bytes() {
    All& all = registry();
    const std::lock_guard lock(all.mutex);
    int64_t bytes = 0;
    for (const Entry* e : all.entries) bytes += e->value.held_bytes();
    return bytes;
  }

 private:
  struct Entry {
    T value;
    Entry() {
      All& all = registry();
      const std::lock_guard lock(all.mutex);
      all.entries.push_back(this);
    }
    ~Entry() {
      All& all = registry();
      const std::lock_guard lock(all.mutex);
      std::erase(all.entries, this);
    }
  };
  struct All {
    std::mutex mutex;
    std::vector<const Entry*> entries;
  };
  static All& registry() {
    static All& all = *new All;  // threads may end after statics do
    return all;
  }
};

}  // namespace vqkv
