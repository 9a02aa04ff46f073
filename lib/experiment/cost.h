// The byte columns of a cell.
#pragma once
#include <span>

#include "cache/cache.h"
#include "codec/codec_set.h"
#include "experiment/cell_config.h"

namespace vqkv {

// Rises when the same codec and policy count other bytes: part of a cell's identity.
inline constexpr int kLedgerVersion = 1;

// Measurements of role "cost", as JSON:
//   bits_per_value.codes              codes, side data and exact exceptions of a coded value, K and V together
//   bytes, bits_per_value             resident bytes of one sequence at `context`, all kinds of the ledger
//   bytes, bits_per_value + sequences the same with the model-side constants shared by that many sequences
//   bytes.constants                   codebooks, transforms, encoders
// bits_per_value counts 2 * layers * kv_heads * head_dim values a token, of the layers and heads in scope.
// `extras` are those of FidelityResult.
Json cost_measurements(const CodecSet& codecs, const CellConfig& config, std::span<const UnitExtras> extras);
// The ledgers behind them: {context: {codes: ..., ...}}.
Json cost_ledgers(const CodecSet& codecs, const CellConfig& config, std::span<const UnitExtras> extras);

}  // namespace vqkv
