#include <cstring>

#include "core/clock.h"
#include "core/error.h"
#include "device/emulator.h"
#include "device/runtime.h"

namespace vqkv::device {

std::string require_device() { return "emulated"; }
void* allocate(size_t bytes, const std::string& name) {
  return emulated::memory().allocate(bytes, name, emulated::options().watched);
}
void release(void* p) noexcept { emulated::memory().release(p); }
void copy_in(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  emulated::memory().set_known(to, bytes);
  std::memcpy(to, from, bytes);
}
void copy_out(void* to, const void* from, size_t bytes) {
  synchronize();
  if (bytes == 0) return;
  if (emulated::options().watched && !emulated::memory().known(from, bytes))
    fail_internal("the emulated device: bytes are copied to the host that no kernel wrote");
  std::memcpy(to, from, bytes);
}
void fill_zero(void* p, size_t bytes) {
  if (bytes == 0) return;
  emulated::memory().set_known(p, bytes);
  std::memset(p, 0, bytes);
}
void copy_within(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  synchronize();
  if (emulated::options().watched && !emulated::memory().known(from, bytes))
    fail_internal("the emulated device: bytes are copied that no kernel wrote");
  emulated::memory().set_known(to, bytes);
  std::memmove(to, from, bytes);
}
double seconds_of(const std::function<void()>& work) {
  const Stopwatch watch;
  work();
  return watch.seconds();
}
HostCopy::HostCopy(size_t bytes, const std::string&) : bytes_(bytes), data_(::operator new(bytes)) {}
HostCopy::~HostCopy() { ::operator delete(data_); }
void HostCopy::start(const void* from, size_t bytes) {
  VQKV_CHECK(bytes <= bytes_);
  copy_out(data_, from, bytes);
}
const void* HostCopy::wait() { return data_; }
void synchronize() { emulated::require_faultless("what was launched"); }
void* stream() { return nullptr; }
void require(int, const char*) {}

}  // namespace vqkv::device
