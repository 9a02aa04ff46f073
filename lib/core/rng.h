// Counter-based random numbers: a stream is a key, so results do not depend on who drew first.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace vqkv {

// Philox4x32-10 (Salmon et al., SC'11). Same key, same sequence, on every machine and at every thread count.
class Rng {
 public:
  explicit Rng(uint64_t key) : key_(key) {}
  // A stream named by text (cell id, layer, head, role): the first 64 bits of its SHA-256.
  static Rng from_text(std::string_view text);
  // An independent stream derived from this one.
  Rng split(uint64_t index) const;

  uint32_t next_u32();
  uint64_t next_u64();
  double uniform();            // [0, 1), 53 bits
  double normal();             // N(0, 1), Box-Muller
  uint64_t below(uint64_t n);  // [0, n), unbiased; n > 0
  // k distinct indices of [0, n), ascending; all of them when k >= n.
  std::vector<int64_t> sample(int64_t n, int64_t k);
  uint64_t key() const { return key_; }

 private:
  void refill();
  uint64_t key_;
  uint64_t counter_ = 0;
  std::array<uint32_t, 4> block_{};
  int left_ = 0;
  bool has_spare_ = false;
  double spare_ = 0;
};

}  // namespace vqkv
