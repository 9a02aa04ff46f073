// Arithmetic of a plan's linear maps.
#pragma once
#include <vector>

#include "codec/plan.h"

namespace vqkv {

// (rows, cols) of the map written out; rows is only needed where the map is identity or diagonal (rows == cols).
std::vector<double> dense_of(const LinearMap& map, int rows, int cols);
// v (rows) -> v * map (cols).
std::vector<float> apply(const LinearMap& map, const std::vector<float>& v, int cols);
// y * first * second, first (rows, middle), second (middle, cols). Stored bytes add up: a deployment may keep both.
LinearMap compose(const LinearMap& first, const LinearMap& second, int rows, int middle, int cols);
int64_t stored_bytes(const LinearMap& map);

}  // namespace vqkv
