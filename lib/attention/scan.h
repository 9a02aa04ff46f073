// Table scans: the logit of a coded key is a sum of one table entry a slot. Codes come as runs of 64 tokens a slot, as
// pages hold them.
//
// The fast form keeps a table in 16-bit fixed point, split into two byte tables: entry = low + step * q with q in
// [0, 65535] and step = (widest slot range) / 65535, so a sum over n slots errs by at most n * step / 2 plus fp32
// rounding. A row whose bound exceeds kScanLimit is scanned in fp32 instead. Plain 8-bit tables would be twice as fast,
// but err by up to n * range / 510 (0.3 logit at 16 slots of range 10), which shows in a KL divergence.
#pragma once
#include <cstdint>
#include <vector>

#include "core/view.h"

namespace vqkv::scan {

constexpr int64_t kRun = 64;
constexpr int64_t kEntries = 256;            // of a byte table; shorter books are padded
constexpr float kScanLimit = 0x1p-10f;       // logits; e^(2^-10) moves a probability by 0.1 %
constexpr int64_t kMaxSlots = 256;           // sums of bytes stay below 2^16

// The byte tables of one row.
struct FixedTables {
  AlignedVector<uint8_t> low_byte, high_byte;  // (slots, 256)
  float base = 0, step = 0;                    // logit = base + step * sum
  bool exact_enough = false;                   // slots * step / 2 <= kScanLimit
};

// lut: (slots, stride) fp32 with `entries` used each.
void quantize(const float* lut, int64_t slots, int64_t entries, int64_t stride, FixedTables& out);

// True where the byte scan has a kernel on this processor (AVX-512 VBMI).
bool fixed_available();
// out[64 n + t] = base + step * sum over slots, for `count` runs of 64 tokens; runs[n]: (slots, 64) bytes.
void fixed(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
// The same without the instructions, for tests and other processors.
void fixed_portable(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
void fixed_vbmi(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, float* out);
// 8-bit tables alone (the high bytes): the yardstick of bench_scan, on no path.
void coarse_vbmi(const FixedTables& tables, const uint8_t* const* runs, int64_t count, int64_t slots, uint16_t* sums);

// out[t] = sum over slots of lut[slot][codes[slot][t]] in fp32.
void plain(const float* lut, int64_t stride, const uint16_t* codes, int64_t slots, float* out);

}  // namespace vqkv::scan
