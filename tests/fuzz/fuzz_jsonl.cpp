// Any bytes as a file of records: whole lines, a tolerated torn end, or a message.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/error.h"
#include "io/result_index.h"
#include "io/store.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto read = vqkv::parse_jsonl(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz.jsonl");
    for (const auto& r : read.records) vqkv::flatten_paths(r);
  } catch (const vqkv::Error& e) {
    if (e.kind() != vqkv::ErrorKind::kBadData) __builtin_trap();
  }
  return 0;
}
