// Capture: the reference runtime reads a text with the exact cache, and a tap records what the cache saw.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "io/trace.h"
#include "model/runtime.h"
#include "model/text_input.h"

namespace vqkv {

struct CaptureOptions {
  int64_t context = 2048;     // tokens a window, BOS included
  int64_t max_tokens = 0;     // of each document; 0: all
  int64_t query_stride = 16;  // queries at positions 0, stride, 2 stride, ... of a window are recorded,
  int64_t query_tail = 64;    // and the last ones of each window
  DType dtype = DType::kBF16;
  bool output_weight = true;
  std::string gradients = "";  // TraceInfo::gradients: the loss whose gradients are recorded too, or none
};

// The windows that a capture will read: consecutive, not overlapping, the last of a document as long as it comes. Each
// starts with BOS where the model adds one.
struct CapturePlan {
  struct Window {
    int32_t document = 0;
    std::vector<int32_t> tokens;
    std::vector<int32_t> query_token;  // positions within the window, ascending
  };
  std::vector<Window> windows;
  std::vector<std::string> names;  // of the documents
  int64_t tokens = 0, queries = 0;
  bool bos = false;
};
// kUsage for options out of range, kBadData for an empty document or a token outside the vocabulary.
CapturePlan plan_capture(std::span<const TextDocument> documents, const CaptureOptions& options,
                         const ModelFacts& facts, const SpecialTokens& special);

// What the trace will say of the model; provenance is the caller's.
TraceInfo capture_info(const ModelFacts& facts, const CaptureOptions& options);

// Runs the model over every window and writes K, V, Q, moments, mass and W_O, and with info.gradients what a backward
// pass through the window says of keys and values (kUnavailable from a runtime that has none). Moments are over all
// positions, in double; mass is the softmax of each recorded query over its causal keys, summed. `progress(done
// tokens)` is called after each window; false stops, and so does the result: the trace must then be dropped. Calls
// writer.finish() when done. Bit-identical at any thread count. attention: of the model's device.
bool capture_trace(ModelRuntime& model, const CapturePlan& plan, TraceWriter& writer,
                   const std::function<bool(int64_t)>& progress = {}, const std::string& attention = "cpu-reconstruct");

// ---- The sums, apart, since they are tested against plain ones
// -------------------------------------------------------

// moment (d, d) += sum over rows and `heads` adjacent heads of q q^T; q is (n, heads*d), strided. Symmetric. For
// gradients of one head likewise.
void add_moment(ConstMatrix q, int heads, double* moment);
// pairs (d/2) += sum over rows and heads of x_p^2 + y_p^2, with the RoPE pairs (p, p + rotary_dim/2) first and the
// channels that don't rotate after them, in adjacent twos.
void add_query_pair_moment(ConstMatrix q, int heads, int rotary_dim, double* pairs);
// mass[t] += sum of p, mass2[t] += sum of p^2, where p is the softmax of scale * q.k over keys [0, position of q].
// q is (m, heads*d) post-RoPE at positions `position` (m); k is (t, d) post-RoPE, strided; every position < t.
void add_received_mass(ConstMatrix q, int heads, std::span<const int32_t> position, ConstMatrix k, float scale,
                       double* mass, double* mass2);

}  // namespace vqkv
