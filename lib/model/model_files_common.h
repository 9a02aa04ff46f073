// Shared by the two readers of model files; private to lib/model.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/model_files.h"

namespace vqkv::model_files {

// Ranges that no real model leaves; a file that does is damaged or hostile. Their products stay far from overflow.
inline constexpr int64_t kMaxLayers = 1024, kMaxHidden = 1 << 17, kMaxHeads = 1024, kMaxHeadDim = 1024,
                         kMaxFfn = 1 << 20, kMaxVocab = 1 << 22, kMaxContext = int64_t{1} << 30;
inline constexpr double kMaxTheta = 1e12;

// What helps where a model computes something that the runtime doesn't.
inline constexpr std::string_view kRecordInstead =
    "scripts/dump_hf.py records a trace of such a model with transformers, for sweeps";

// Weights that every layer has, in this order; kQBias..kOBias and kQNorm, kKNorm where the facts say so.
bool belongs_to_layer(Weight weight);
std::vector<Weight> weights_of(const ModelFacts& facts);

// (rows, cols) of a weight.
std::pair<int64_t, int64_t> shape_of(const ModelFacts& facts, Weight weight);

// Throws kBadData when the stored shape is not the one that the facts demand. A vector may be written with one axis.
void check_shape(const std::string& path, const std::string& tensor, std::span<const int64_t> found,
                 const ModelFacts& facts, Weight weight);

// Facts that contradict each other: heads, head_dim, ranges. `where` names the file.
void check_facts(const std::string& where, const ModelFacts& facts);

int64_t count_parameters(const ModelFacts& facts);

// A name from a file as it may stand in messages and JSON: at most 200 bytes, valid UTF-8, no control characters.
std::string label(std::string_view text);

// SHA-256 over a text with, per part, its name, size and the XXH3-128 of each 64 MiB of its content: every byte counts,
// at memory speed and on all threads (SHA-256 alone reads about 0.5 to 2 GB/s on one).
struct HashPart {
  std::string_view name;
  std::span<const uint8_t> bytes;
};
std::string content_identity(std::span<const HashPart> parts);

std::unique_ptr<ModelWeights> open_gguf(const std::string& path);
std::unique_ptr<ModelWeights> open_hf(const std::string& folder);

}  // namespace vqkv::model_files
