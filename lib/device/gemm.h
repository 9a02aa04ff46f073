// Products with weights on a device: cuBLASLt's (gemm_cuda.cpp), and plain sums where the device is emulated.
#pragma once
#include <cstdint>

namespace vqkv::device {

// y (rows, outputs) = x (rows, inputs) times the rows of w (outputs, inputs), both bf16, summed in fp32; `add`: on top
// of what y holds. kUnavailable where cuBLASLt is not there: it is opened when it is first needed, 541 MB that nothing
// links.
void multiply_rows_bf16(const uint16_t* x, const uint16_t* w, int rows, int outputs, int inputs, bool add, float* y);

}  // namespace vqkv::device
