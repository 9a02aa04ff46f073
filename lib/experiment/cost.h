// The byte columns of a cell.
#pragma once
#include <span>

#include "cache/cache.h"
#include "codec/codec_set.h"
#include "experiment/cell_config.h"

namespace vqkv {

// Rises when the same codec and policy count other bytes: part of a cell's identity.
inline constexpr int kLedgerVersion = 7;

// Bits a cached value at `tokens` tokens of context: all that `ledger` holds of one sequence, and the constants shared
// by `sequences` sequences (0: without them): arithmetic, of sequences that hold what this one does; that they hold it
// and share the constants is measured in tests/attention/test_memory.cpp. K and V count 2 * layers * kv_heads *
// head_dim values a token.
double bits_per_value(const ByteLedger& ledger, const CacheShape& shape, int64_t tokens, int64_t sequences);

// Measurements of role "cost", as JSON:
//   bits_per_value.codes              codes, side data and exact exceptions of a coded value, K and V together; of the
//                                     tiers as the longest context mixes them
//   bytes, bits_per_value             resident bytes of one sequence at `context`, all kinds of the ledger
//   bytes, bits_per_value + sequences the same with the model-side constants shared by that many sequences
//   bytes.constants                   codebooks, transforms, encoders
// Layers and heads are those in scope. `policy` is the cell's, of a text with as many image tokens as it has
// (TraceRows::policy); `extras` are those of FidelityResult.
Json cost_measurements(const CodecSet& codecs, const CellConfig& config, const CachePolicy& policy,
                       std::span<const UnitExtras> extras);
// The ledgers behind them: {context: {codes: ..., ...}}.
Json cost_ledgers(const CodecSet& codecs, const CellConfig& config, const CachePolicy& policy,
                  std::span<const UnitExtras> extras);

}  // namespace vqkv
