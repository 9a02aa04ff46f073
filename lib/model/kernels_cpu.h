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

// ---- Their gradients: of rms_norm with respect to x, given the one with respect to out.
// dx[i] = weight[i] * dout[i] / r - x[i] * mean(x * weight * dout) / r^3 [+ dx[i] when accumulate], r = sqrt(mean(x^2)
// + eps); the means in double. dx may be dout unless accumulate.
void rms_norm_backward(const float* x, const float* weight, double eps, const float* dout, float* dx, int64_t n,
                       bool accumulate);
// gate and up, as they went into swiglu, become the gradients with respect to them; dout with respect to its result.
void swiglu_backward(float* gate, float* up, const float* dout, int64_t n);

// ---- Softmax. x[i] = exp(x[i] - max x); the sum in double. n >= 1.
struct ExpSum {
  float max = 0;
  double sum = 0;
};
ExpSum exp_row(float* x, int64_t n);
// Of columns, some rows at a time: s (rows, n), contiguous. top[j] = max(top[j], s[r][j])
void column_max(const float* s, int64_t rows, int64_t n, float* top);
// s[r][j] = exp(scale * s[r][j] - shift[j])
void exp_columns(float* s, int64_t rows, int64_t n, float scale, const float* shift);
// sum[j] += s[r][j]
void add_columns(const float* s, int64_t rows, int64_t n, float* sum);
// ds[r][j] = scale * p[r][j] * (ds[r][j] - mean[j]), which came in as the gradient with respect to p, `mean` its mean
// under p.
void softmax_backward(const float* p, int64_t rows, int64_t n, float scale, const float* mean, float* ds);

}  // namespace vqkv
