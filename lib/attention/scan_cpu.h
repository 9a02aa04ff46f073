// Table scans: the logit of a coded key is a sum of one table entry a slot. Codes come as runs of 64 tokens a slot, as
// pages hold them.
//
// The fast form keeps a table in 16-bit fixed point, split into two byte tables: entry = low + step * q with q in
// [0, 65535] and step = (widest slot range) / 65535, so a sum over n slots errs by at most n * step / 2 plus fp32
// rounding. Tables of single bytes take half the work and a 256th of the precision: step = (widest slot range) / 255, a
// bound of 0.1 logit at 16 slots of range 3. Each row keeps its own bound, and is scanned in the cheapest form whose
// bound, times the largest token scale, stays below the backend's limit: bytes, 16 bits, fp32.
//
// fp32 tables hold rows beside each other (kernels::sum_by_code), so that one load serves all query heads of a group.
#pragma once
#include <cstdint>
#include <vector>

#include "core/per_thread.h"
#include "core/view.h"

namespace vqkv::scan {

constexpr int64_t kRun = 64;
constexpr int64_t kEntries = 256;       // of a byte table; shorter books are padded
constexpr float kScanLimit = 0x1p-10f;  // logits, of cpu-table; no probability moves by more than 0.2 % of itself
// Logits, of byte tables in cpu-table8: no probability moves by more than 28 % of itself (e^(2/8)), numerator and sum
// erring against each other. Errors of the slots are independent, so the usual one is the bound / sqrt(3 slots): 2 %
// at 16.
constexpr float kByteScanLimit = 0x1p-3f;
constexpr int64_t kMaxSlots = 256;  // sums of bytes stay below 2^16

// The 16-bit tables of one row.
struct FixedTables {
  AlignedVector<uint8_t> low_byte, high_byte;  // (slots, 256)
  int64_t entries = 0;                         // used of the 256
  float base = 0, step = 0;                    // logit = base + step * sum
  float bound = 0;                             // largest error of a sum: slots * step / 2
  int64_t held_bytes() const { return capacity_bytes(low_byte) + capacity_bytes(high_byte); }
};

// lut: (slots, stride) fp32 with `entries` used each.
void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, FixedTables& out);

// The 8-bit tables of one row.
struct ByteTables {
  AlignedVector<uint8_t> bytes;  // (slots, 256)
  int64_t entries = 0;           // used of the 256
  float base = 0, step = 0;      // logit = base + step * sum
  float bound = 0;  // largest error of a sum: each slot's largest rounding error, added up; <= slots * step / 2
  int64_t held_bytes() const { return capacity_bytes(bytes); }
};
void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, ByteTables& out);

// True where byte scans are the fastest on this processor for books of so many entries: any with AVX-512 VBMI; up to 64
// with AVX2, whose 16-entry shuffles look up 32 G codes a second and core at 16 entries and 3.5 G at 256, where fp32
// tables of 4 rows side by side give 8 G and of 1 row 3.7 G (bench_scan under VQKV_CPU=avx2; gathers: 2.1 G).
bool fixed_pays(int64_t entries);
// out[64 n + t] = base + step * sum over slots, for `count` runs of 64 tokens; runs[n]: (slots, 64) bytes.
void fixed(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void bytes(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
// The same without the instructions, for tests and other processors: equal to the last bit.
void fixed_portable(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void bytes_portable(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void fixed_avx2(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void bytes_avx2(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void fixed_vbmi(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void bytes_vbmi(const ByteTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);

}  // namespace vqkv::scan
