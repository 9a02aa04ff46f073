// The checker checked: every planted fault is told, or seen in the numbers, and none where nothing is planted.
#include <algorithm>

#include "core/dtype.h"
#include "device/emulator.h"
#include "device/mutants.h"
#include "device/traffic.h"
#include "support/catch.h"
#include "support/error_of.h"

using namespace vqkv;
using namespace vqkv::device;
using emulated::Order;

namespace {

const emulated::Options kOrders[] = {{Order::kForward}, {Order::kReverse}, {Order::kRandom, 1}, {Order::kRandom, 2}};

// What the run told, and what it computed: nothing where it failed.
struct Ran {
  std::string told;
  std::vector<float> values;
};

Ran run(const Mutant& mutant, bool broken, const emulated::Options& options) {
  emulated::configure(options);
  Ran out;
  out.told = error_of([&] { out.values = mutant.run(broken); }, ErrorKind::kInternal);
  emulated::take_faults();
  emulated::configure({});
  return out;
}

}  // namespace

TEST_CASE("the emulated device tells planted faults, in every order, and nothing of sound kernels", "[emulator]") {
  for (const Mutant& mutant : mutants()) {
    CAPTURE(mutant.name);
    const Ran sound = run(mutant, false, {});
    CHECK(sound.told.empty());
    REQUIRE_FALSE(sound.values.empty());
    for (const emulated::Options& options : kOrders) {
      CAPTURE(static_cast<int>(options.order), options.seed);
      const Ran again = run(mutant, false, options);
      CHECK(again.told.empty());
      CHECK(again.values == sound.values);
      if (!emulated::kInstrumented) continue;  // a sanitizer would end the program
      const Ran broken = run(mutant, true, options);
      CAPTURE(broken.told);
      for (const std::string& part : mutant.told) CHECK(broken.told.find(part) != std::string::npos);
      if (mutant.told.empty()) {
        CHECK(broken.told.empty());
        CHECK(broken.values != sound.values);
      } else {
        CHECK_FALSE(broken.told.empty());
      }
    }
  }
}

TEST_CASE("lanes hold matrices of shared memory, and their transposes, as products take them", "[emulator]") {
  emulated::configure({});
  const std::vector<float> found = matrices_of_shared_memory();
  for (unsigned m = 0; m < 4; ++m)
    for (unsigned l = 0; l < 32; ++l)
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = l / 4, column = l % 4 * 2 + i;
        CAPTURE(m, l, i);
        CHECK(found.at(((m * 2) * 32 + l) * 2 + i) == static_cast<float>((m * 8 + row) * 8 + column));
        CHECK(found.at(((m * 2 + 1) * 32 + l) * 2 + i) == static_cast<float>((m * 8 + column) * 8 + row));
      }
}

#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("the emulated device counts wavefronts of banks and sectors of each line", "[emulator]") {
  // Of a warp's one request of each kind: passes, and the fewest there could be.
  struct Expected {
    int shared_stride, global_stride;
    uint64_t shared4, ideal4, shared8, ideal8, global, ideal;
  };
  for (const Expected& e : {Expected{1, 1, 1, 1, 2, 2, 4, 4}, Expected{2, 8, 2, 1, 4, 2, 32, 4},
                            Expected{32, 2, 32, 1, 32, 2, 8, 4}, Expected{0, 0, 1, 1, 2, 2, 1, 1}}) {
    CAPTURE(e.shared_stride, e.global_stride);
    emulated::configure({.profile = true});
    run_strides(e.shared_stride, e.global_stride);
    emulated::configure({});
    int seen = 0;
    for (const emulated::Traffic& t : emulated::take_traffic()) {
      CHECK(t.line.starts_with("traffic.cu:"));
      if (t.writes) continue;
      CAPTURE(t.line, t.shared, t.bytes);
      CHECK(t.requests == 1);
      const uint64_t passes = !t.shared ? e.global : t.bytes == 4 ? e.shared4 : e.shared8;
      const uint64_t ideal = !t.shared ? e.ideal : t.bytes == 4 ? e.ideal4 : e.ideal8;
      CHECK(t.passes == passes);
      CHECK(t.ideal == ideal);
      ++seen;
    }
    CHECK(seen == 3);
  }
}
#endif

TEST_CASE("halves are rounded once", "[emulator]") {
  // Halfway between 1 and the next half, and a little beyond in ways that fp32 can't hold.
  CHECK(emulated::f16_of(1 + 0x1p-11) == to_f16(1.0f).bits);
  CHECK(emulated::f16_of(1 + 0x1p-11 + 0x1p-40) == to_f16(1.0f + 0x1p-10f).bits);
  CHECK(emulated::f16_of(1 + 3 * 0x1p-11 - 0x1p-40) == to_f16(1.0f + 0x1p-10f).bits);
  CHECK(emulated::f16_of(-(1 + 0x1p-11 + 0x1p-40)) == to_f16(-1.0f - 0x1p-10f).bits);
  CHECK(emulated::f16_of(0x1p-25 * (1 + 0x1p-30)) == 1);  // the least half
  CHECK(emulated::f16_of(0x1p-25) == 0);
  CHECK(emulated::f16_of(65520.0) == 0x7c00);
  for (uint32_t bits = 0; bits < 0x7c00; ++bits)
    REQUIRE(emulated::f16_of(double{to_float(f16{static_cast<uint16_t>(bits)})}) == bits);
}
