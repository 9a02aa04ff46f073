// What stands in a table of replays beside each codec's own row: rows that say what a window does alone and what
// nothing can be told apart from, the protocol of a row in words, and what a codec had seen of the texts.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "codec/codec_set.h"
#include "core/json.h"
#include "generation/replay.h"

namespace vqkv {

// The protocol of a row: "exact prompt, then window 128, blocks of 64 + 4 sinks".
std::string protocol_of(const ReplayCandidate& candidate);

// Exact against exact with rows of another type: what no codec can be told apart from. Other blocks alone would not do:
// the runtime gives the same bits for every block length. `block`: of the candidates beside it.
ReplayCandidate self_noise(const CacheShape& shape, DType exact_dtype, const std::string& attention, int64_t block);

// The same policy without any window: only a token's own exact form (and a tail shorter than a codec block).
CachePolicy without_window(const CodecSet& codecs, CachePolicy policy);

// The same sinks and window with nothing between them, where one rule serves both roles.
std::optional<CachePolicy> streaming_beside(CachePolicy policy);

// What a codec learned from, as far as its trace is still where it was.
struct Learned {
  bool known = false;     // false: nobody can say
  double seen = 0;        // share of the texts, in runs of 32 tokens, that stands in its train documents
  int64_t positions = 0;  // it was trained on positions below this one; 0: it learned nothing

  // Of a replay of `context` tokens: "training unknown", "trained on these texts", "extrapolated".
  std::vector<std::string> flags(int64_t context) const;
};
// `origin`: {path, train: [documents], hash} of the trace that it was trained on; null where none is named.
Learned what_it_learned(const CodecSet& codecs, const Json& origin, std::span<const ReplayText> texts);

}  // namespace vqkv
