#include "core/hash.h"

#include <fmt/format.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <xxhash.h>

#include <fstream>
#include <vector>

#include "core/error.h"

namespace vqkv {
namespace {

class Sha256 {
 public:
  Sha256() {
    // Its exit handler would free what threads share before the last of ours ends, whose own state then leaks.
    static const int started = OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, nullptr);
    context_ = started == 1 ? EVP_MD_CTX_new() : nullptr;
    if (!context_ || EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) != 1) fail_internal("SHA-256 can't start");
  }
  ~Sha256() { EVP_MD_CTX_free(context_); }
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void update(const void* data, size_t size) {
    if (EVP_DigestUpdate(context_, data, size) != 1) fail_internal("SHA-256 update failed");
  }
  Sha256Digest finish() {
    Sha256Digest digest{};
    unsigned length = 0;
    if (EVP_DigestFinal_ex(context_, digest.data(), &length) != 1 || length != digest.size())
      fail_internal("SHA-256 failed");
    return digest;
  }

 private:
  EVP_MD_CTX* context_ = nullptr;
};

}  // namespace

Sha256Digest sha256(const void* data, size_t size) {
  Sha256 h;
  h.update(data, size);
  return h.finish();
}

std::string to_hex(const uint8_t* bytes, size_t size) {
  std::string out;
  out.reserve(2 * size);
  for (size_t i = 0; i < size; ++i) out += fmt::format("{:02x}", bytes[i]);
  return out;
}

std::string sha256_hex(std::string_view text) {
  const auto d = sha256(text.data(), text.size());
  return to_hex(d.data(), d.size());
}

std::string sha256_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail_data(fmt::format("{}: can't be opened for reading", path));
  Sha256 h;
  std::vector<char> buffer(1 << 20);
  while (in.read(buffer.data(), static_cast<std::streamsize>(buffer.size())) || in.gcount() > 0)
    h.update(buffer.data(), static_cast<size_t>(in.gcount()));
  if (in.bad()) fail_data(fmt::format("{}: read error", path));
  const auto d = h.finish();
  return to_hex(d.data(), d.size());
}

struct ContentHash::State {
  XXH3_state_t* xxh;
};

ContentHash::ContentHash() : state_(new State{XXH3_createState()}) { XXH3_128bits_reset(state_->xxh); }
ContentHash::~ContentHash() {
  if (state_) XXH3_freeState(state_->xxh);
}
ContentHash::ContentHash(ContentHash&&) noexcept = default;
ContentHash& ContentHash::operator=(ContentHash&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}
void ContentHash::update(const void* data, size_t size) { XXH3_128bits_update(state_->xxh, data, size); }
std::string ContentHash::hex() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->xxh));
  return to_hex(canonical.digest, sizeof(canonical.digest));
}

}  // namespace vqkv
