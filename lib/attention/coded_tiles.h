// The codes of sequences on a device, attended where they lie: host code over level_decode.h and pq_decode.h.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "attention/device_tiles.h"
#include "attention/exact_rows.h"
#include "cache/view.h"
#include "device/runtime.h"

namespace vqkv {

class PqDecoder;
class LevelDecoder;

// What all sequences of a codec set share on a device: its books. Immutable.
class CodedForms {
 public:
  // kUnavailable, naming unit and reason, where kernels don't take all of the model's codes.
  explicit CodedForms(const CacheModel& model);
  const TileFamily& family() const { return family_; }
  // f16, (kv_heads, 256 * head_dim) as PqDecode reads them.
  const uint16_t* books(int layer, Role role) const;

 private:
  TileFamily family_;
  size_t of_layer_ = 0;                // halves
  device::Buffer<uint16_t> books_[2];  // (layers, of_layer_)
};

// Codes of one sequence: of each layer and role in tiles of 32 tokens, the first at the first coded token.
class CodedTiles {
 public:
  CodedTiles(std::shared_ptr<const CodedForms> forms, const CacheShape& shape);
  ~CodedTiles();
  // Slots [first, end) of all units of a layer and role, from what the cache holds; those before are there.
  void put(const CacheView& cache, int layer, Role role, int64_t first, int64_t end);
  // Row r of `rows` queries, (rows, kv_heads, group, head_dim) times log2(e) / sqrt(head_dim), attends to the first
  // coded[r] slots and to the exact rows that `exact` says of it (most_pages 0: all rows have one page table). coded
  // and exact.lengths lie on the device; `longest`: tokens that some row sees. out: as queries.
  void attend(int layer, const float* queries, int rows, const int32_t* coded, const ExactRows& exact, int64_t longest,
              float* out);
  int64_t bytes() const;  // on the device, books apart

 private:
  struct Layer {
    device::Buffer<uint8_t> codes[2];
    device::Buffer<uint16_t> sides[2];
  };
  void reserve(int64_t tiles);

  std::shared_ptr<const CodedForms> forms_;
  CacheShape shape_;
  std::vector<Layer> layers_;
  int64_t room_ = 0, held_ = 0;  // tiles
  device::Buffer<int32_t> table_;
  std::unique_ptr<PqDecoder> pq_;
  std::unique_ptr<LevelDecoder> levels_;
  int rows_ = 0, splits_ = 0;  // of the decoder
};

}  // namespace vqkv
