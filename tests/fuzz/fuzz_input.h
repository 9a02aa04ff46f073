// Fuzzer bytes as a stream of small decisions, for targets that build a valid container and break it in places.
#pragma once
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "core/json.h"

namespace vqkv::fuzzing {

class Decisions {
 public:
  Decisions(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool more() const { return left_ > 0; }
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  size_t below(size_t n) { return n ? byte() % n : 0; }
  uint64_t word() {
    uint64_t v = 0;
    for (int i = 0; i < 8; ++i) v = v << 8 | byte();
    return v;
  }
  // Sizes at which arithmetic breaks, or small ones.
  int64_t size() {
    static constexpr int64_t kHard[] = {0,
                                        1,
                                        2,
                                        3,
                                        4,
                                        7,
                                        1023,
                                        1024,
                                        1025,
                                        65535,
                                        65536,
                                        INT32_MAX,
                                        int64_t{1} << 31,
                                        int64_t{1} << 32,
                                        int64_t{1} << 40,
                                        INT64_MAX / 8,
                                        INT64_MAX};
    return byte() & 1 ? kHard[below(std::size(kHard))] : static_cast<int64_t>(byte());
  }
  std::string text() {
    std::string out;
    for (size_t n = below(32); n > 0; --n) {
      const char c = static_cast<char>(byte());
      if (c) out += c;
    }
    return out;
  }
  Json json() {
    switch (below(9)) {
      case 0:
        return nullptr;
      case 1:
        return static_cast<int64_t>(byte()) - 3;
      case 2:
        return word();
      case 3:
        return -static_cast<int64_t>(word() >> 1);
      case 4:
        return static_cast<double>(static_cast<int64_t>(word())) * 1e-3;
      case 5:
        return std::string(1, static_cast<char>('a' + below(26)));
      case 6:
        return Json::array({1, "x", nullptr});
      case 7:
        return Json::object({{"a", 1}});
      default:
        return byte() % 2 == 0;
    }
  }
  // Replaces one value somewhere inside `j`, removes it, or adds one.
  void break_json(Json& j) {
    Json* at = &j;
    for (int depth = 0; depth < 6 && at->is_structured() && !at->empty(); ++depth) {
      if (depth > 0 && byte() % 4 == 0) break;
      auto it = at->begin();
      std::advance(it, static_cast<std::ptrdiff_t>(below(at->size())));
      if (byte() % 16 == 0) {
        at->erase(it);
        return;
      }
      at = &*it;
    }
    *at = json();
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

}  // namespace vqkv::fuzzing
