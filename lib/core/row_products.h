// Sums and products of single rows that have one order and no fused multiply-add: what they give has the same bits on
// every instruction set, alone or beside other rows.
#pragma once
#include <cstdint>

namespace vqkv {

// out (cols) += x (rows) * m (rows, cols), row-major: row after row, rows whose x is 0 left out.
void add_row_product(const float* x, int64_t rows, const float* m, int64_t cols, float* out);
void add_row_product(const double* x, int64_t rows, const float* m, int64_t cols, double* out);

// out (cols) += every one of `rows` (count), each (cols), row after row.
void add_rows(const float* const* rows, int64_t count, int64_t cols, double* out);

// sum (n, n) += weight[r] * v[r] * v[r]^T for every row of v (rows, n), row after row; the weights are 1 where null.
// Made on and below the diagonal; what lies above is left in any state.
void add_outer_products(const double* v, const double* weight, int64_t rows, int64_t n, double* sum);

}  // namespace vqkv
