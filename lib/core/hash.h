// SHA-256 for identities, XXH3-128 for the content of large files.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace vqkv {

using Sha256Digest = std::array<uint8_t, 32>;
Sha256Digest sha256(const void* data, size_t size);
std::string sha256_hex(std::string_view text);
std::string to_hex(const uint8_t* bytes, size_t size);

// Streaming SHA-256 of a file, as hex. Throws kBadData when it can't be read.
std::string sha256_file(const std::string& path);

// Streaming XXH3-128; hex() gives 32 digits, canonical (big-endian) order.
class ContentHash {
 public:
  ContentHash();
  ~ContentHash();
  ContentHash(ContentHash&&) noexcept;
  ContentHash& operator=(ContentHash&&) noexcept;
  void update(const void* data, size_t size);
  std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vqkv
