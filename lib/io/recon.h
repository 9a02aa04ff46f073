// Reconstructed keys and values that another program wrote: what `judge` holds against ours.
//   /key, /value  (layer, kv_head, token, channel), the trace's axes; float16, bfloat16, float32 or float64
//   attribute `keys` of the root: "pre_rope" or "post_rope"
//   attribute `trace` of the root, optional: the content hash of the trace that was coded
#pragma once
#include <memory>
#include <string>

#include "core/view.h"
#include "io/trace.h"

namespace vqkv {

class ReconReader {
 public:
  // Refuses (kBadData) what does not fit the trace.
  ReconReader(const std::string& path, const TraceReader& trace);
  ~ReconReader();
  bool keys_pre_rope() const;
  // (count, head_dim) of tokens [first, first + count). NaN and infinities are kBadData with their place.
  void key(int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const;
  void value(int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vqkv
