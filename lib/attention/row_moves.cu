#include "attention/exact_rows.h"
#include "attention/row_moves.h"
#include "device/device.h"

namespace vqkv {
namespace {

constexpr int kThreads = 32;

// A block a move, head and role.
__global__ void __launch_bounds__(kThreads) move_rows_kernel(RowMoves p) {
  const RowMove move = p.moves[blockIdx.x];
  const int head = static_cast<int>(blockIdx.y);
  uint16_t* rows = blockIdx.z == 0 ? p.keys : p.values;
  const auto at = [&](int token) {
    const size_t row =
        (static_cast<size_t>(token / kDevicePageTokens) * static_cast<size_t>(p.kv_heads) + static_cast<size_t>(head)) *
            kDevicePageTokens +
        static_cast<size_t>(token % kDevicePageTokens);
    return reinterpret_cast<uint4*>(rows + row * static_cast<size_t>(p.head_dim));
  };
  const uint4* from = at(move.from);
  uint4* to = at(move.to);
  for (int c = static_cast<int>(threadIdx.x); c < p.head_dim / 8; c += kThreads)
    device::store(to + c, device::load(from + c));
}

}  // namespace

void move_rows(const RowMoves& call) {
  if (call.count == 0) return;
  const dim3 grid(static_cast<unsigned>(call.count), static_cast<unsigned>(call.kv_heads), 2);
  device::launch(move_rows_kernel, {grid, dim3(kThreads)}, call);
}

}  // namespace vqkv
