// AttentionBackend: queries against a CompressedCache. Partial softmax states of sinks, coded body and window are
// merged.
#pragma once
#include <memory>
#include <memory_resource>
#include <optional>
#include <string>
#include <vector>

#include "cache/view.h"

namespace vqkv {

class KvSession;

// What a caller may watch: a public seam, set by KvSession::set_tap, which none of the tools does. Called once per
// (layer, query head) of a block; slow.
struct AttentionTap {
  virtual ~AttentionTap() = default;
  // p: (queries, tokens) softmax probabilities, causal zeros included.
  virtual void on_probabilities(int layer, int q_head, int64_t first_position, ConstMatrix p) = 0;
};

struct AttendStats {
  // Sum over (layer, query head, query) of the attention mass on tokens coded for that query and role K, and their
  // count.
  double coded_mass = 0;
  double total_mass = 0;
};

class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  virtual std::string name() const = 0;  // "reference", "cpu-reconstruct", "cpu-table", "cpu-table8", "auto"
  // Every path that has run so far, sorted; what a row of results names: the name of how keys were scored, with "-sums"
  // where values were summed by code.
  virtual std::vector<std::string> paths() const { return {name()}; }
  // A reason why it can't run this plan for this role, or nothing. The caller decides; there is no fallback inside.
  virtual std::optional<std::string> can(const DecodePlan& plan, Role role) const = 0;
  // mass: what a policy of which tokens stay asks for (cache/keep_rule.h); null for nothing.
  // q: (n, q_heads * head_dim) POST-RoPE queries of the block just appended to `layer`, the first at position
  // cache.length(). out: same shape as q.
  virtual void attend(const CacheView& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats = nullptr,
                      AttentionTap* tap = nullptr, MassRequest* mass = nullptr) = 0;
  // What a model calls to attend to `cache` by this backend; both outlive it, and so does the memory that its buffers
  // come from. Over a cache in host memory, where it is not overridden.
  virtual std::unique_ptr<KvSession> make_session(CompressedCache& cache, std::pmr::memory_resource* memory);
  // Bytes that it keeps between calls, there once for all sequences that it serves. What its threads work in is apart:
  // attention_scratch_bytes.
  virtual int64_t held_bytes() const { return 0; }
};

// What the threads of the process keep to attend and decode in, some tiles each, whatever the backends and sequences;
// while nothing attends. No ledger's.
int64_t attention_scratch_bytes();

// "reference" (double, decodes everything), "cpu-reconstruct", "cpu-table" (logits of coded keys err by at most 2^-10;
// values summed by code where that is cheaper than decoding, up to fp32 rounding the same), "cpu-table8" (logits err by
// at most 2^-3: 8-bit tables wherever they keep that bound; a measurement made with it carries that error), or "auto"
// (single-query steps by whichever of these is cheaper for keys and for values, never cpu-table8; blocks of queries by
// cpu-reconstruct; paths() tells which ran). Unknown names: kUsage; names of absent devices: kUnavailable.
std::unique_ptr<AttentionBackend> make_attention_backend(const std::string& name);
std::vector<std::string> attention_backend_names();

}  // namespace vqkv
