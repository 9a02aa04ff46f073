#include "cache/ledger.h"

#include "core/json.h"

namespace vqkv {

Json ByteLedger::to_json() const {
  return {{"codes", codes},         {"side", side},
          {"overlay", overlay},     {"sinks", sinks},
          {"window", window},       {"padding", padding},
          {"index", index},         {"workspace", workspace},
          {"codebooks", codebooks}, {"total_sequence", total_sequence()}};
}

void* CountingResource::do_allocate(size_t bytes, size_t alignment) {
  void* p = upstream_->allocate(bytes, alignment);
  charge(static_cast<int64_t>(bytes));
  return p;
}

void CountingResource::do_deallocate(void* p, size_t bytes, size_t alignment) {
  upstream_->deallocate(p, bytes, alignment);
  charge(-static_cast<int64_t>(bytes));
}

void CountingResource::charge(int64_t bytes) {
  const int64_t now = live_.fetch_add(bytes) + bytes;
  int64_t seen = peak_.load();
  while (now > seen && !peak_.compare_exchange_weak(seen, now)) {}
}

}  // namespace vqkv
