// Where the compiler's instrumentation of kernel files leads: they alone are compiled with -fsanitize=thread and some
// checks of undefined behaviour, and the functions that those call are these instead of a sanitizer's. This file is
// compiled without.
#include <fmt/format.h>

#include <cstdint>
#include <filesystem>

#include "device/emulator.h"

using vqkv::device::emulated::Access;
using vqkv::device::emulated::on_access;
using vqkv::device::emulated::on_undefined;
using vqkv::device::emulated::Place;

#define VQKV_ACCESS(name, bytes, access) \
  extern "C" void __tsan_##name(void* p) { on_access(p, bytes, access, Place(__builtin_return_address(0))); }
#define VQKV_ACCESSES(bytes)                                 \
  VQKV_ACCESS(read##bytes, bytes, Access::kRead)             \
  VQKV_ACCESS(write##bytes, bytes, Access::kWrite)           \
  VQKV_ACCESS(unaligned_read##bytes, bytes, Access::kRead)   \
  VQKV_ACCESS(unaligned_write##bytes, bytes, Access::kWrite) \
  VQKV_ACCESS(volatile_read##bytes, bytes, Access::kRead)    \
  VQKV_ACCESS(volatile_write##bytes, bytes, Access::kWrite)
VQKV_ACCESSES(1)
VQKV_ACCESSES(2)
VQKV_ACCESSES(4)
VQKV_ACCESSES(8)
VQKV_ACCESSES(16)

extern "C" void __tsan_read_range(void* p, size_t bytes) {
  on_access(p, bytes, Access::kRead, Place(__builtin_return_address(0)));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  on_access(p, bytes, Access::kWrite, Place(__builtin_return_address(0)));
}
// The guard of a static local, in the host's part of a kernel file.
extern "C" uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_vptr_update(void**, void*) {}

namespace {

// What every check hands over begins with its place.
struct Checked {
  const char* file;
  uint32_t line, column;
};

void undefined(const void* data, const std::string& what) {
  const auto* at = static_cast<const Checked*>(data);
  on_undefined(what, fmt::format("{}:{}", std::filesystem::path(at->file).filename().string(), at->line));
}

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t address) {
  undefined(data, fmt::format("uses the address {:#x}, which is none for its type", address));
}
extern "C" void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  undefined(data, fmt::format("indexes an array at {}, beyond its end", static_cast<intptr_t>(index)));
}
extern "C" void __ubsan_handle_shift_out_of_bounds(void* data, uintptr_t, uintptr_t by) {
  undefined(data, fmt::format("shifts by {}, more bits than there are, or out of the sign", static_cast<intptr_t>(by)));
}
