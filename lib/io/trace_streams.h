// Rows on their way into a trace: narrowed to the stored type, hashed and written chunk by chunk.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/hash.h"
#include "io/trace_layout.h"

namespace vqkv {

// True when any of n stored values is NaN or infinite.
bool any_not_finite(const uint8_t* bytes, int64_t n, Hdf5Type type);
// n values to their stored type: bf16, f16 (to nearest even), or f32 as they are.
void narrow(const float* in, uint8_t* out, int64_t n, Hdf5Type type);

// A dataset that grows along its third axis, one (lead0, lead1) row stream at a time. Whole chunks go straight from the
// caller's buffer to the file; only a stream's last, unfinished chunk is held (128 KiB a head at head_dim 64 in bf16).
class RowStreams {
 public:
  RowStreams() = default;
  RowStreams(Hdf5Dataset dataset, const TraceDataset& layout);

  // The hash half and the writing half are timed apart by the caller.
  void hash(int64_t layer, int64_t head, const uint8_t* bytes, int64_t rows) {
    at(layer, head).hash.update(bytes, static_cast<size_t>(rows * row_bytes_));
  }
  void append(int64_t layer, int64_t head, const uint8_t* bytes, int64_t rows);
  // Final length known: shrink, then write the unfinished chunks, zero-padded.
  void finish(int64_t rows);
  std::vector<std::string> hashes() const;
  Hdf5Dataset& dataset() { return dataset_; }

 private:
  struct Stream {
    int64_t rows = 0;
    std::vector<uint8_t> tail;
    ContentHash hash;
  };
  size_t chunk_bytes() const { return static_cast<size_t>(chunk_rows_ * row_bytes_); }
  Stream& at(int64_t layer, int64_t head) { return streams_[static_cast<size_t>(layer * heads_ + head)]; }
  void write(int64_t layer, int64_t head, int64_t row, const uint8_t* bytes);

  Hdf5Dataset dataset_;
  int64_t heads_ = 0, chunk_rows_ = 0, row_bytes_ = 0;
  size_t rank_ = 0;
  std::vector<Stream> streams_;
};

}  // namespace vqkv
