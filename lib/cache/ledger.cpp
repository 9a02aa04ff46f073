#include "cache/ledger.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {

Json ByteLedger::to_json() const {
  return {{"codes", codes},         {"side", side},
          {"overlay", overlay},     {"sinks", sinks},
          {"window", window},       {"padding", padding},
          {"index", index},         {"workspace", workspace},
          {"codebooks", codebooks}, {"total_sequence", total_sequence()}};
}

ByteLedger ByteLedger::from_json(const Json& ledger) {
  const auto of = [&](const char* kind) { return ledger.at(kind).get<int64_t>(); };
  return {of("codes"),   of("side"),  of("overlay"),   of("sinks"),    of("window"),
          of("padding"), of("index"), of("workspace"), of("codebooks")};
}

void require_equal(const ByteLedger& formula, const ByteLedger& held, int64_t allocated, const std::string& what) {
  if (held.total_sequence() != allocated)
    fail_internal(
        fmt::format("{}: the ledger says {} bytes and the allocator {}", what, held.total_sequence(), allocated));
  const auto check = [&](const char* kind, int64_t ByteLedger::*bytes) {
    if (formula.*bytes != held.*bytes)
      fail_internal(fmt::format("{}: the formula says {} bytes of {} and the cache holds {}", what, formula.*bytes,
                                kind, held.*bytes));
  };
  const bool exceptions = held.overlay != formula.overlay, fitted = held.workspace != formula.workspace;
  check("codes", &ByteLedger::codes);
  check("sinks", &ByteLedger::sinks);
  check("window", &ByteLedger::window);
  check("codebooks", &ByteLedger::codebooks);
  if (!exceptions) check("padding", &ByteLedger::padding);
  if (fitted) return;
  check("side", &ByteLedger::side);
  check("index", &ByteLedger::index);
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
