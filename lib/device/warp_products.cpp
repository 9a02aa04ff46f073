// What the lanes of a warp compute together from what all bring.
#include <bit>
#include <cmath>
#include <cstring>

#include "core/dtype.h"
#include "device/emulator.h"

namespace vqkv::device::emulated {
namespace {

// One of the two 16-bit numbers of the `which`-th pair that lane `from` brought.
uint16_t number(const Deposits& all, unsigned from, unsigned which, unsigned half) {
  uint32_t pair = 0;
  std::memcpy(&pair, all[from].data() + which * sizeof pair, sizeof pair);
  return static_cast<uint16_t>(half ? pair >> 16 : pair);
}

}  // namespace

uint16_t f16_of(double v) {
  // Through fp32 rounded to odd, so that the second rounding sees on which side of a tie the number lay.
  float f = static_cast<float>(v);
  if (double{f} != v && std::isfinite(f)) {
    if (std::abs(double{f}) > std::abs(v)) f = std::nextafter(f, 0.0f);
    f = std::bit_cast<float>(std::bit_cast<uint32_t>(f) | 1u);
  }
  return to_f16(f).bits;
}

// C += A B of one warp: A (16, 16) by rows and B (16, 8) by columns in 16 bits, C (16, 8) in fp32, summed in double and
// rounded once. Lane l holds rows l / 4 and l / 4 + 8 of A and C, columns 2 (l % 4) and the next, and of A those 8
// further.
void multiply(Meeting kind, float* c, const uint32_t* a, const uint32_t* b, Site site) {
  const uint32_t brought[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  unsigned present = 0;
  const Deposits& all = meet(kind, ~0u, brought, sizeof brought, site, present);
  const auto element = [&](unsigned from, unsigned which, unsigned half) {
    const uint16_t bits = number(all, from, which, half);
    return double{kind == Meeting::kProductBf16 ? to_float(bf16{bits}) : to_float(f16{bits})};
  };
  const unsigned l = lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < 16; ++k)
      sum += element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
             element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    c[i] = static_cast<float>(sum);
  }
  leave();
}

// Of an (8, 8) matrix of 16-bit numbers lane l holds row l / 4, columns 2 (l % 4) and the next; then of its transpose.
uint32_t transpose8(uint32_t pair, Site site) {
  unsigned present = 0;
  const Deposits& all = meet(Meeting::kTranspose, ~0u, &pair, sizeof pair, site, present);
  const unsigned row = lane() / 4, column = lane() % 4 * 2;
  const uint32_t low = number(all, column * 4 + row / 2, 0, row % 2);
  const uint32_t high = number(all, (column + 1) * 4 + row / 2, 0, row % 2);
  leave();
  return low | high << 16;
}

// Lane l brings row l % 8 of matrix l / 8; of each matrix, or of its transpose, it gets what transpose8 calls its own.
void load_matrices(uint32_t* out, const uint16_t* row, bool transposed, Site site) {
  constexpr size_t kRow = 16;
  on_access(row, kRow, Access::kRead, site);
  unsigned present = 0;
  const Deposits& all = meet(Meeting::kMatrices, ~0u, row, kRow, site, present);
  const unsigned mine = lane() / 4, pair = lane() % 4;
  for (unsigned m = 0; m < 4; ++m) {
    const auto element = [&](unsigned r, unsigned c) { return uint32_t{number(all, m * 8 + r, c / 2, c % 2)}; };
    out[m] = transposed ? element(2 * pair, mine) | element(2 * pair + 1, mine) << 16
                        : element(mine, 2 * pair) | element(mine, 2 * pair + 1) << 16;
  }
  leave();
}

}  // namespace vqkv::device::emulated
