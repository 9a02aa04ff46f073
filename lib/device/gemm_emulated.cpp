#include "core/dtype.h"
#include "core/error.h"
#include "device/emulator.h"
#include "device/gemm.h"

namespace vqkv::device {

void multiply_rows_bf16(const uint16_t* x, const uint16_t* w, int rows, int outputs, int inputs, bool add, float* y) {
  const auto n = static_cast<size_t>(rows), m = static_cast<size_t>(outputs), k = static_cast<size_t>(inputs);
  emulated::Memory& memory = emulated::memory();
  if (emulated::options().watched && !(memory.known(x, n * k * sizeof *x) && memory.known(w, m * k * sizeof *w) &&
                                       (!add || memory.known(y, n * m * sizeof *y))))
    fail_internal("the emulated device: a product reads what nobody wrote");
  memory.set_known(y, n * m * sizeof *y);
  for (size_t r = 0; r < n; ++r)
    for (size_t o = 0; o < m; ++o) {
      double sum = 0;
      for (size_t i = 0; i < k; ++i) sum += double{to_float(bf16{x[r * k + i]})} * double{to_float(bf16{w[o * k + i]})};
      y[r * m + o] = static_cast<float>(add ? double{y[r * m + o]} + sum : sum);
    }
}

}  // namespace vqkv::device
