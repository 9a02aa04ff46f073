// The rows of a table of replays: each codec's own, those that say what a window does alone and what nothing can be
// told apart from, the protocol of a row in words, what a codec had seen of the texts, and which rows are compared.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/exec_codec.h"
#include "codec/codec_set.h"
#include "core/json.h"
#include "generation/replay.h"
#include "generation/replay_statistics.h"

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
// Why none stands beside a policy that codes, for a note: "keys: blocks of 128; values: window 129: keys and values
// leave by rules of their own, ..."; "" where one does, and where nothing is coded.
std::string no_streaming_beside(const CachePolicy& policy);

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

// A codec with what was said of it where it came from.
struct LoadedCodec {
  std::string label;
  std::shared_ptr<const CodecSet> codecs;
  CachePolicy policy;
  Json cache = nullptr;   // the policy's canonical section
  Json origin = nullptr;  // {path, hash, train} of the trace that it learned from, null where not told
  std::shared_ptr<const ExecCodec> exec = nullptr;  // of exec:COMMAND
};

struct ReplayRow {
  enum class Kind { kProtocol, kCodec, kWindowless };
  ReplayCandidate candidate;
  Kind kind = Kind::kProtocol;  // protocol: no codec's (self-noise, streaming)
  Learned learned = {.known = true};
  std::shared_ptr<const ExecCodec> exec = nullptr;  // of its own where the codec is another program

  // No query that is scored in a window of `context` tokens meets a code: the numbers are the exact cache's.
  bool codes_nothing(int64_t context) const;
  // What a reader must know of the row: Learned::flags, "nothing-coded", "off-label", "quantized-query", and a policy
  // that took nothing out.
  std::vector<std::string> flags(const ReplayTrack& track, int64_t context) const;
};

struct ReplayRowOptions {
  ReplayMode mode = ReplayMode::kForced;
  int64_t block = 256;  // queries a block
  int64_t self_noise_block = 256;
  std::string attention = kReplayAttention;
  bool windowless = false;  // a second row for each codec, without its window
};

// Self-noise, each codec with its windowless twin where asked, `streaming` once a protocol (no_streaming_beside says
// where none is). The exact rows of self-noise are of the first codec's type.
std::vector<ReplayRow> replay_rows(std::span<const LoadedCodec> codecs, const CacheShape& shape,
                                   std::span<const ReplayText> texts, const ReplayRowOptions& options);

std::vector<ReplayCandidate> candidates_of(std::span<const ReplayRow> rows);

// Every pair of codecs under the same kind of policy (windowed with windowed). Verdicts are corrected over all of them.
std::vector<PairedDifference> compare_rows(const ReplayResult& result, std::span<const ReplayRow> rows,
                                           int64_t context);

}  // namespace vqkv
