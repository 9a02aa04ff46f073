// CUDA's device language for a host compiler: the names that kernel files use, and no more. What threads do together
// goes through the emulator; plain memory accesses reach it by the compiler's instrumentation (hooks.cpp).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "core/dtype.h"
#include "device/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// Not instrumented: what it touches was told to the emulator already. A lambda or a std:: helper inside would be.
#define VQKV_UNWATCHED __attribute__((no_sanitize("thread", "undefined")))

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half h) { return vqkv::to_float(vqkv::f16{h.bits}); }
inline __half __float2half_rn(float v) { return {vqkv::to_f16(v).bits}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __bfloat162float(__nv_bfloat16 b) { return vqkv::to_float(vqkv::bf16{b.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  return {v != v ? uint16_t{0x7fff} : vqkv::to_bf16(v).bits};  // a device has one NaN
}
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
inline __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) {
  const auto one = [](__half x, __half y) {
    return __half{vqkv::device::emulated::f16_of(double{__half2float(x)} * double{__half2float(y)})};
  };
  return {one(a.x, b.x), one(a.y, b.y)};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto one = [](__half x, __half y, __half z) {
    return __half{
        vqkv::device::emulated::f16_of(double{__half2float(x)} * double{__half2float(y)} + double{__half2float(z)})};
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
// Four bytes chosen from the eight of x and y, lowest first.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) out |= static_cast<unsigned>(both >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return out;
}
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
using std::max;
using std::min;

namespace vqkv::device {

using Site = std::source_location;
inline constexpr unsigned kAllLanes = ~0u;

namespace emulated {

template <class T>
VQKV_UNWATCHED T shuffle(Meeting kind, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  unsigned present = 0;
  const Deposits& all = meet(kind, mask, &value, sizeof value, site, present);
  T out;
  __builtin_memcpy(&out, all[source_lane(kind, argument, width, present, site)].data(), sizeof out);
  leave();
  return out;
}

}  // namespace emulated
}  // namespace vqkv::device

#define VQKV_SHUFFLE(name, kind)                                                                                       \
  template <class T>                                                                                                   \
  T name(unsigned mask, T value, int argument, int width = 32,                                                         \
         vqkv::device::Site site = vqkv::device::Site::current()) {                                                    \
    return vqkv::device::emulated::shuffle(vqkv::device::emulated::Meeting::kind, mask, value, argument, width, site); \
  }
VQKV_SHUFFLE(__shfl_sync, kShuffleIndex)
VQKV_SHUFFLE(__shfl_xor_sync, kShuffleXor)
VQKV_SHUFFLE(__shfl_down_sync, kShuffleDown)
VQKV_SHUFFLE(__shfl_up_sync, kShuffleUp)
#undef VQKV_SHUFFLE

inline void __syncthreads(vqkv::device::Site site = vqkv::device::Site::current()) {
  vqkv::device::emulated::barrier(site);
}
inline void __syncwarp(unsigned mask = ~0u, vqkv::device::Site site = vqkv::device::Site::current()) {
  unsigned present = 0;
  vqkv::device::emulated::meet(vqkv::device::emulated::Meeting::kSync, mask, nullptr, 0, site, present);
  vqkv::device::emulated::leave();
}
inline void __threadfence() { vqkv::device::emulated::fence(); }
VQKV_UNWATCHED inline unsigned __ballot_sync(unsigned mask, int predicate,
                                             vqkv::device::Site site = vqkv::device::Site::current()) {
  using namespace vqkv::device::emulated;
  const unsigned char vote = predicate != 0;
  unsigned present = 0, out = 0;
  const Deposits& all = meet(Meeting::kVote, mask, &vote, 1, site, present);
  for (unsigned l = 0; l < kLanes; ++l)
    if (present >> l & 1) out |= unsigned{all[l][0]} << l;
  leave();
  return out;
}
inline int __any_sync(unsigned mask, int predicate, vqkv::device::Site site = vqkv::device::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

template <class T>
VQKV_UNWATCHED T atomicAdd(T* p, T value, vqkv::device::Site site = vqkv::device::Site::current()) {
  vqkv::device::emulated::on_access(p, sizeof(T), vqkv::device::emulated::Access::kAtomic, site);
  const T before = *p;
  *p = before + value;
  return before;
}

namespace vqkv::device {

// Typed pieces of a block's dynamic shared memory, each on 16 bytes. All threads carve alike. Pieces lie apart here, so
// that an index beyond one is told; on a device they follow each other.
class Shared {
 public:
  template <class T>
  T* take(size_t count, Site site = Site::current()) {
    return static_cast<T*>(emulated::take_shared(pieces_, used_, count * sizeof(T), site));
  }

 private:
  size_t pieces_ = 0, used_ = 0;
};

// The bits of a value as another of its size.
template <class To, class From>
To bits_as(const From& from) {
  return std::bit_cast<To>(from);
}

// One access of all of T, up to 16 bytes; plain assignments of vectors may be split.
template <class T>
VQKV_UNWATCHED T load(const T* p, Site site = Site::current()) {
  emulated::on_access(p, sizeof(T), emulated::Access::kRead, site);
  T out;
  __builtin_memcpy(&out, p, sizeof out);
  return out;
}
template <class T>
VQKV_UNWATCHED void store(T* p, T value, Site site = Site::current()) {
  emulated::on_access(p, sizeof(T), emulated::Access::kWrite, site);
  __builtin_memcpy(p, &value, sizeof value);
}

// 16 bytes from global to shared memory, which hold nothing until a wait leaves at most N younger groups. Where nothing
// is `held` there, zeros, and `from` is not read.
inline void copy_async16(void* to, const void* from, bool held = true, Site site = Site::current()) {
  emulated::copy_async(to, held ? from : nullptr, 16, site);
}
inline void commit_copies() { emulated::commit_copies(); }
template <int N>
void wait_copies() {
  emulated::wait_copies(N);
}

// C += A B of a warp, shapes (16, 16) and (16, 8) in 16 bits; C in fp32 (device/warp_products.cpp says which lane holds
// what).
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  emulated::multiply(emulated::Meeting::kProductBf16, c, a, b, site);
}
inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  emulated::multiply(emulated::Meeting::kProductF16, c, a, b, site);
}
// The transpose of an (8, 8) matrix of 16-bit numbers over the lanes of a warp.
inline uint32_t transpose8(uint32_t pair, Site site = Site::current()) { return emulated::transpose8(pair, site); }
// Four (8, 8) matrices of 16-bit numbers from shared memory: lane l names row l % 8 of matrix l / 8, on 16 bytes. Of
// each it gets row l / 4, columns 2 (l % 4) and the next, or that of the transpose.
inline void load_matrices(uint32_t (&out)[4], const uint16_t* row, Site site = Site::current()) {
  emulated::load_matrices(out, row, false, site);
}
inline void load_transposes(uint32_t (&out)[4], const uint16_t* row, Site site = Site::current()) {
  emulated::load_matrices(out, row, true, site);
}

// 2^x; approximate on a device (2 units in the last place).
inline float exp2_fast(float x) { return std::exp2(x); }

struct Config {
  dim3 grid, block;
  size_t shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Config& config, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
    static void run(void* call) { std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->parameters); }
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  emulated::run({config.grid, config.block, config.shared_bytes, &Call::run, &call, &call, sizeof call});
}

}  // namespace vqkv::device
