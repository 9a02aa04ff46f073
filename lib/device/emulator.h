// Runs kernels on a processor, and stricter than a device does: one fiber a thread, block after block, in an order that
// a test chooses. Every access of a kernel file is judged (hooks.cpp): bounds, races, missing values, copies in flight;
// barriers and warp operations that threads meet in differently, and deadlocks, are told with their lines of source.
//
// What it can't show: how tensor cores and approximate functions round, what streams overlap, and speed.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <string_view>
#include <vector>

#include "device/memory.h"
#include "device/profile.h"
#include "device/source_line.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace vqkv::device::emulated {

using Site = std::source_location;

// In what order threads that could all go on do, and blocks.
enum class Order : uint8_t { kForward, kReverse, kRandom };

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kInstrumented = false;  // a sanitizer takes what kernel files' accesses call
#else
inline constexpr bool kInstrumented = true;
#endif

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;             // of a random order
  bool profile = false;          // count traffic by line
  bool watched = kInstrumented;  // judge accesses to memory: of kernels that are instrumented
};

// One machine for the process; one launch at a time.
void configure(const Options& options);
const Options& options();
// What launches did wrong since the last call, each kind once a line of source. Empty: nothing.
std::vector<std::string> take_faults();
std::vector<Traffic> take_traffic();

// Throws kInternal with the first faults, if there are any.
void require_faultless(std::string_view what);

Memory& memory();

// A kernel with its arguments, which lie at [parameters, parameters + parameter_bytes).
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  void (*run)(void*) = nullptr;
  void* closure = nullptr;
  const void* parameters = nullptr;
  size_t parameter_bytes = 0;
};
void run(const Launch& launch);

// The bits of the half nearest to v, rounded once.
uint16_t f16_of(double v);

// ---- for emulation.h and hooks.cpp: of the thread that runs ----

unsigned lane();
void barrier(Site site);
void fence();

// An operation that the lanes of a mask do together.
enum class Meeting : uint8_t {
  kSync,
  kShuffleXor,
  kShuffleIndex,
  kShuffleDown,
  kShuffleUp,
  kVote,
  kProductBf16,
  kProductF16,
  kTranspose,
  kMatrices
};
inline constexpr size_t kDeposit = 32;  // bytes that a lane brings, at most
using Deposits = std::array<std::array<unsigned char, kDeposit>, kLanes>;
// Brings `bytes`, waits for the lanes of `mask`, and gives what all brought; `present`: lanes that came. leave() when
// it was read.
const Deposits& meet(Meeting kind, unsigned mask, const void* brought, size_t bytes, Site site, unsigned& present);
void leave();
// The lane that a shuffle reads, in segments of `width` lanes; told where it takes no part.
unsigned source_lane(Meeting kind, int argument, int width, unsigned present, Site site);

void* take_shared(size_t& pieces, size_t& used, size_t bytes, Site site);
void copy_async(void* to, const void* from, size_t bytes, Site site);  // from null: zeros
void commit_copies();
void wait_copies(int keep);
// kProductBf16 or kProductF16.
void multiply(Meeting kind, float* c, const uint32_t* a, const uint32_t* b, Site site);
uint32_t transpose8(uint32_t pair, Site site);
void load_matrices(uint32_t* out, const uint16_t* row, bool transposed, Site site);

void on_access(const void* p, size_t bytes, Access access, const Place& place);
// What the compiler's own checks found, at "file.cu:12".
void on_undefined(const std::string& what, const std::string& line);

}  // namespace vqkv::device::emulated
