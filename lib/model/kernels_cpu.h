// The element-wise work between the products of a layer, one row at a time; vectorised with run-time dispatch.
#pragma once
#include <cstdint>

namespace vqkv {

// out[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps); the mean in double. out may be x.
void rms_norm(const float* x, const float* weight, double eps, float* out, int64_t n);

// gate[i] = gate[i] * sigmoid(gate[i]) * up[i]
void swiglu(float* gate, const float* up, int64_t n);

// x[i] += bias[i]
void add_bias(float* x, const float* bias, int64_t n);

}  // namespace vqkv
