// Replay: the text is fed again with a compressed cache, and every prediction is held against the exact cache's.
// Four semantics (evaluation.md 5.2), named in every row, because they answer different questions.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/runtime.h"

namespace vqkv {

enum class ReplayMode {
  kForced,        // token-by-token semantics, computed in blocks
  kStepwise,      // one token at a time: what kForced must equal
  kPrefillExact,  // exact attention over a prompt, coded once, then as kForced for the rest
  kFakeQuant,     // every K and V beyond the sinks replaced by its decoded form, the token's own included
};
struct ReplayModeInfo {
  ReplayMode mode;
  const char *name, *meaning;
};
std::span<const ReplayModeInfo> replay_modes();
ReplayMode replay_mode_from_name(const std::string& name);  // forced|stepwise|prefill-exact|fake-quant
std::string replay_mode_name(ReplayMode mode);

// What compares caches runs all of them, the exact one included, on one path whatever the length of a block.
inline constexpr const char* kReplayAttention = "cpu-reconstruct";

// One cache to replay with.
struct ReplayCandidate {
  std::string label;
  std::shared_ptr<const CodecSet> codecs;
  CachePolicy policy;
  std::string attention = kReplayAttention;  // backend name
  ReplayMode mode = ReplayMode::kForced;
  // Queries a block (1 in kStepwise). Any length gives the same bits, except under "auto", which may take another path
  // for a block of one.
  int64_t block = 256;
  // What a codec in another program says it keeps of the sequence at hand (ExecCodec); unset: the ledger counts it.
  std::function<int64_t()> claimed_bytes = {};
};

struct ReplayOptions {
  int64_t context = 1024;  // tokens a window, BOS included
  int64_t windows = 0;     // 0: all that the texts hold; otherwise taken from the documents in turn
  int64_t prompt = 0;      // kPrefillExact: tokens of the prompt; 0: half the context
  int64_t block = 256;     // queries a block of the exact cache; 1 where candidates go stepwise, so that times compare
  DType exact_dtype = DType::kF16;           // of the exact cache
  std::string attention = kReplayAttention;  // of the exact cache
};

// What a candidate did, position by position, in window order. A position is a scored prediction: every token of a
// window but its first; in a replay with kPrefillExact, every token after the prompt (the first of them is predicted by
// exact attention, as in those papers' generation).
struct ReplayTrack {
  std::string label, path;                          // path: what attention ran, joined by + where several did
  std::vector<double> nll;                          // -ln p(true token), nats
  std::vector<double> kld;                          // KL(exact || this) over the whole vocabulary, nats
  std::vector<double> delta_p;                      // p_this(true) - p_exact(true)
  std::vector<uint8_t> same_top;                    // equal arg-max
  std::vector<int32_t> flips;                       // per window: position of the first arg-max flip, or -1
  double coded_mass = 0, total_mass = 0;            // attention mass, scored positions
  double coded_mass_last = 0, total_mass_last = 0;  // queries in the last quarter of each window (0: not told apart)
  double model_seconds = 0, encode_seconds = 0, attend_seconds = 0;
  ByteLedger bytes;  // of the last window, at its end
  int64_t peak_cache_bytes = 0;
  bool gave_up = false;                  // the policy took a token out of some head's sight, in some window
  std::optional<int64_t> claimed_bytes;  // likewise, where the candidate has any
};

struct ReplayResult {
  std::vector<int32_t> position;          // of the predicted token within its window
  std::vector<int32_t> window, document;  // of each scored position
  std::vector<double> nll_exact;
  std::string exact_path;           // what attention the exact cache ran
  std::vector<ReplayTrack> tracks;  // one a candidate
  int64_t windows = 0, tokens = 0;  // tokens fed
  int64_t text_bytes = 0;           // bytes of the scored tokens' text, for bits per byte; 0 where some have none
  int64_t prompt = 0;               // tokens of each window that were not scored; 0 without kPrefillExact
  bool bos = false;                 // the model adds BOS and each window starts with it
  double exact_seconds = 0;         // of the exact cache, in turn with the candidates
};

struct ReplayText {
  std::string name;
  std::vector<int32_t> tokens;  // BOS first only where the source itself has it
};

// Positions that a replay in `mode` will score. Throws what such a replay throws of texts, context and prompt alone:
// kUsage for a context beyond the model's or without a prediction, kBadData where no text holds a whole window.
int64_t scored_positions(const ModelRuntime& model, std::span<const ReplayText> texts, const ReplayOptions& options,
                         ReplayMode mode);

// Windows do not overlap. Candidates run beside the exact cache stretch by stretch, so that logits are never kept for
// more than a stretch. kUsage, before anything runs, for modes that don't go together and for kFakeQuant in windows
// shorter than what the policy or a codec waits for. At the end of each window every cache's ledger is held against its
// allocator (kInternal when they differ). `stop` is asked between blocks; the finished windows are returned.
ReplayResult replay(ModelRuntime& model, std::span<const ReplayText> texts, std::span<const ReplayCandidate> candidates,
                    const ReplayOptions& options, const std::function<bool()>& stop = {});

}  // namespace vqkv
