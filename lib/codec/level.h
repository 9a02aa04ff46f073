// Levels: shorter forms of one code, e.g. the first stages of a residual code, as codecs of their own.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace vqkv {

// Methods whose codes have levels by default, on one head of 64 channels.
std::vector<std::string> methods_with_levels();

// Why `whole` has no level of `stages` stages, or "".
std::string level_reason(const Codec& whole, int stages);

// The first `stages` of whole.levels() stages. It shares the books of `whole`, which the ledger counts there, and
// encodes what `whole` does, cut. kUsage with level_reason.
std::shared_ptr<const Codec> codec_level(std::shared_ptr<const Codec> whole, int stages);

// What a block of layout `from` holds of `to`, one of its levels (Codec::level_layout): no value is coded again.
CodeBlock cut_codes(const CodeBlock& codes, const CodeLayout& from, const CodeLayout& to);

}  // namespace vqkv
