#include "device/mutants.h"

#include "core/dtype.h"
#include "device/device.h"
#include "device/runtime.h"

namespace vqkv::device {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// ---- shared memory and barriers ----

// A table that all threads fill is read by others behind a barrier, then the room is used again.
__global__ void table_kernel(const float* in, float* out, int missing) {
  Shared shared;
  float* table = shared.take<float>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  table[t] = in[t];
  if (missing != 1) __syncthreads();
  const float other = table[(t + 32) % kThreads];
  if (missing != 2) __syncthreads();
  table[t] = other * 2.0f;
  __syncthreads();
  out[t] = table[(t + 64) % kThreads];
}

std::vector<float> numbers(int n) {
  std::vector<float> v(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<float>(i % 17 - 8);
  return v;
}

std::vector<float> run_table(int missing) {
  Buffer<float> in(std::span<const float>(numbers(kThreads)), "in"), out(kThreads, "out");
  launch(table_kernel, {dim3(1), dim3(kThreads), kThreads * sizeof(float)}, in.data(), out.data(), missing);
  return out.values();
}
std::vector<float> no_barrier_after_writes(bool broken) { return run_table(broken ? 1 : 0); }
std::vector<float> no_barrier_before_reuse(bool broken) { return run_table(broken ? 2 : 0); }

__global__ void overrun_kernel(float* out, int by) {
  Shared shared;
  float* first = shared.take<float>(kThreads);
  float* second = shared.take<float>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  second[t] = 1.0f;
  __syncthreads();
  first[t + by] = 2.0f;
  __syncthreads();
  out[t] = second[t];
}
std::vector<float> shared_overrun(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(overrun_kernel, {dim3(1), dim3(kThreads), 2 * kThreads * sizeof(float)}, out.data(), broken ? 1 : 0);
  return out.values();
}
std::vector<float> too_little_shared(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(overrun_kernel, {dim3(1), dim3(kThreads), (2 * kThreads - (broken ? 16u : 0u)) * sizeof(float)}, out.data(),
         0);
  return out.values();
}

__global__ void unwritten_kernel(float* out, int entries) {
  Shared shared;
  float* table = shared.take<float>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  if (t < entries) table[t] = static_cast<float>(t);
  __syncthreads();
  out[t] = table[kThreads - 1 - t];
}
std::vector<float> unwritten_shared(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(unwritten_kernel, {dim3(1), dim3(kThreads), kThreads * sizeof(float)}, out.data(),
         kThreads - (broken ? 8 : 0));
  return out.values();
}

__global__ void two_barriers_kernel(float* out, int two) {
  const int t = static_cast<int>(threadIdx.x);
  if (two && t >= 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = static_cast<float>(t);
}
std::vector<float> divergent_barrier(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(two_barriers_kernel, {dim3(1), dim3(kThreads)}, out.data(), broken ? 1 : 0);
  return out.values();
}

// ---- warps ----

// A sum over the lanes by shuffles.
__global__ void butterfly_kernel(const float* in, float* out, unsigned mask, int first_step) {
  const int t = static_cast<int>(threadIdx.x);
  float x = in[t];
  for (int step = first_step; step > 0; step /= 2) x += __shfl_xor_sync(step == 16 ? mask : kAllLanes, x, step);
  out[t] = x;
}
std::vector<float> run_butterfly(unsigned mask, int first_step) {
  Buffer<float> in(std::span<const float>(numbers(kThreads)), "in"), out(kThreads, "out");
  launch(butterfly_kernel, {dim3(1), dim3(kThreads)}, in.data(), out.data(), mask, first_step);
  return out.values();
}
std::vector<float> half_a_mask(bool broken) { return run_butterfly(broken ? 0x0000ffffu : kAllLanes, 16); }
std::vector<float> missing_step(bool broken) { return run_butterfly(kAllLanes, broken ? 8 : 16); }

__global__ void some_lanes_kernel(float* out, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float x = static_cast<float>(lane);
  if (lane < lanes) x = __shfl_xor_sync(kAllLanes, x, 1);
  __syncthreads();
  out[threadIdx.x] = x;
}
std::vector<float> shuffle_of_some(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(some_lanes_kernel, {dim3(1), dim3(kThreads)}, out.data(), broken ? 20 : 32);
  return out.values();
}

// Lanes exchange through shared memory of their warp; a shuffle before it orders nothing.
__global__ void warp_exchange_kernel(float* out, int sync) {
  Shared shared;
  float* room = shared.take<float>(kThreads);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  room[t] = static_cast<float>(t);
  if (sync) __syncwarp();
  const float all = __shfl_sync(kAllLanes, 1.0f, 0);
  out[t] = room[warp * 32 + (lane + 1) % 32] * all;
}
std::vector<float> no_syncwarp(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(warp_exchange_kernel, {dim3(1), dim3(kThreads), kThreads * sizeof(float)}, out.data(), broken ? 0 : 1);
  return out.values();
}

// ---- asynchronous copies ----

__global__ void copies_kernel(const float* in, float* out, int tiles, int short_wait, int no_wait) {
  Shared shared;
  float4* stage = shared.take<float4>(2 * kThreads);
  const int t = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) copy_async16(stage + tile % 2 * kThreads + t, in + (tile * kThreads + t) * 4);
    commit_copies();
  };
  fetch(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (short_wait)
      wait_copies<2>();
    else
      wait_copies<1>();
    if (no_wait) break;
    const float4 v = load(stage + tile % 2 * kThreads + t);
    sum += v.x + 2 * v.y + 3 * v.z + 4 * v.w;
  }
  if (!no_wait) wait_copies<0>();
  out[t] = sum;
}
std::vector<float> run_copies(int short_wait, int no_wait) {
  constexpr int kTiles = 5;
  Buffer<float> in(std::span<const float>(numbers(kTiles * kThreads * 4)), "in"), out(kThreads, "out");
  launch(copies_kernel, {dim3(1), dim3(kThreads), 2 * kThreads * sizeof(float4)}, in.data(), out.data(), kTiles,
         short_wait, no_wait);
  return out.values();
}
std::vector<float> copies_waited_short(bool broken) { return run_copies(broken ? 1 : 0, 0); }
std::vector<float> copies_left_behind(bool broken) { return run_copies(0, broken ? 1 : 0); }

// ---- global memory and blocks ----

__global__ void write_kernel(float* out, int stride, int offset) {
  out[static_cast<int>(blockIdx.x) * stride + static_cast<int>(threadIdx.x) + offset] = 1.0f;
}
std::vector<float> run_write(int stride, int offset) {
  Buffer<float> out(2 * kThreads, "out");
  out.zero();
  for (int i = 0; i < 2; ++i) launch(write_kernel, {dim3(2), dim3(kThreads)}, out.data(), stride, offset);
  return out.values();
}
std::vector<float> global_overrun(bool broken) { return run_write(kThreads, broken ? 4 : 0); }
std::vector<float> blocks_race(bool broken) { return run_write(broken ? kThreads / 2 : kThreads, 0); }

__global__ void add_kernel(const float* parts, float* out, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += parts[i];
  out[threadIdx.x] = sum;
}
__global__ void leaves_early_kernel(float* parts, int leaver) {
  if (static_cast<int>(threadIdx.x / 32) == leaver) return;
  parts[threadIdx.x] = static_cast<float>(threadIdx.x);
}
std::vector<float> output_left_out(bool broken) {
  Buffer<float> parts(kThreads, "parts"), out(1, "out");
  launch(leaves_early_kernel, {dim3(1), dim3(kThreads)}, parts.data(), broken ? kWarps - 1 : -1);
  launch(add_kernel, {dim3(1), dim3(1)}, static_cast<const float*>(parts.data()), out.data(), kThreads);
  return out.values();
}

// The last block to arrive adds what all blocks left.
__global__ void last_block_kernel(float* parts, unsigned* counter, float* out, int fence) {
  Shared shared;
  unsigned* last = shared.take<unsigned>(1);
  parts[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(threadIdx.x);
  if (fence == 2) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fence == 1) __threadfence();  // barriers before it order what other threads of the block did
    *last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * kThreads + threadIdx.x];
  out[threadIdx.x] = sum;
}
std::vector<float> run_last_block(int fence) {
  constexpr unsigned kBlocks = 4;
  Buffer<float> parts(kBlocks * kThreads, "parts"), out(kThreads, "out");
  Buffer<unsigned> counter(1, "counter");
  counter.zero();
  launch(last_block_kernel, {dim3(kBlocks), dim3(kThreads), 16}, parts.data(), counter.data(), out.data(), fence);
  return out.values();
}
std::vector<float> no_fence(bool broken) { return run_last_block(broken ? 0 : 2); }
std::vector<float> no_fence_of_one(bool broken) { return run_last_block(broken ? 0 : 1); }

__global__ void host_memory_kernel(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }
std::vector<float> host_memory(bool broken) {
  static std::vector<float> here = numbers(kThreads);
  Buffer<float> in(std::span<const float>(here), "in"), out(kThreads, "out");
  launch(host_memory_kernel, {dim3(1), dim3(kThreads)}, broken ? static_cast<const float*>(here.data()) : in.data(),
         out.data());
  return out.values();
}

__global__ void neighbour_kernel(float* out, int neighbour) {
  Shared shared;
  float** places = shared.take<float*>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  float mine = static_cast<float>(t);
  places[t] = &mine;
  __syncthreads();
  out[t] = *places[(t + neighbour) % kThreads];
  __syncthreads();
}
std::vector<float> anothers_local(bool broken) {
  Buffer<float> out(kThreads, "out");
  launch(neighbour_kernel, {dim3(1), dim3(kThreads), kThreads * sizeof(float*)}, out.data(), broken ? 1 : 0);
  return out.values();
}

// ---- what the compiler's checks see ----

__global__ void vectors_kernel(const unsigned* in, float* out, int offset, int plain) {
  const auto* p = reinterpret_cast<const uint2*>(in + offset) + threadIdx.x;
  const uint2 v = plain ? *p : load(p);
  out[threadIdx.x] = static_cast<float>(v.x + v.y);
}
std::vector<float> run_vectors(int offset, int plain) {
  std::vector<unsigned> values(2 * kThreads + 2);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<unsigned>(i);
  Buffer<unsigned> in(std::span<const unsigned>(values), "in");
  Buffer<float> out(kThreads, "out");
  launch(vectors_kernel, {dim3(1), dim3(kThreads)}, static_cast<const unsigned*>(in.data()), out.data(), offset, plain);
  return out.values();
}
std::vector<float> misaligned_load(bool broken) { return run_vectors(broken ? 1 : 0, 0); }
std::vector<float> misaligned_vector(bool broken) { return run_vectors(broken ? 1 : 0, 1); }

__global__ void registers_kernel(float* out, int index, int shift) {
  float x[4] = {0, 1, 2, 3};
  out[threadIdx.x] = x[index] + static_cast<float>(1u << shift);
}
std::vector<float> run_registers(int index, int shift) {
  Buffer<float> out(1, "out");
  launch(registers_kernel, {dim3(1), dim3(1)}, out.data(), index, shift);
  return out.values();
}
std::vector<float> register_index(bool broken) { return run_registers(broken ? 4 : 3, 0); }
std::vector<float> shift_too_far(bool broken) { return run_registers(3, broken ? 32 : 31); }

// ---- tensor cores ----

// C = A B of one warp: A (16, 16) by rows, B (16, 8) by columns.
__global__ void multiply_kernel(const uint32_t* a, const uint32_t* b, float* c, int wrong) {
  const int lane = static_cast<int>(threadIdx.x), row = lane / 4, pair = lane % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = a[(row + i % 2 * 8) * 8 + pair + i / 2 * 4];
  for (int i = 0; i < 2; ++i) right[i] = b[row * 8 + (wrong ? pair ^ 1 : pair) + i * 4];
  float sum[4] = {0, 0, 0, 0};
  multiply_bf16(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + pair * 2 + i % 2] = sum[i];
}
std::vector<float> wrong_fragment(bool broken) {
  const auto pairs = [](int n, int by) {
    std::vector<uint32_t> out(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
      const auto bits = [&](int j) { return uint32_t{to_bf16(static_cast<float>(j * by % 7 - 3)).bits}; };
      out[static_cast<size_t>(i)] = bits(2 * i) | bits(2 * i + 1) << 16;
    }
    return out;
  };
  Buffer<uint32_t> a(std::span<const uint32_t>(pairs(128, 3)), "a"), b(std::span<const uint32_t>(pairs(64, 5)), "b");
  Buffer<float> c(128, "c");
  launch(multiply_kernel, {dim3(1), dim3(32)}, static_cast<const uint32_t*>(a.data()),
         static_cast<const uint32_t*>(b.data()), c.data(), broken ? 1 : 0);
  return c.values();
}

// Four matrices of shared memory, 8 rows on 16 bytes each, and their transposes.
__global__ void matrices_kernel(uint32_t* out, int order, int offset) {
  Shared shared;
  uint16_t* rows = shared.take<uint16_t>(4 * 64 + 8);
  for (int i = static_cast<int>(threadIdx.x); i < 4 * 64 + 8; i += 32) rows[i] = static_cast<uint16_t>(i);
  __syncthreads();
  uint32_t plain[4], turned[4];
  load_matrices(plain, rows + (static_cast<int>(threadIdx.x) ^ order) * 8 + offset);
  load_transposes(turned, rows + static_cast<int>(threadIdx.x) * 8);
  for (int m = 0; m < 4; ++m)
    out[(m * 2) * 32 + threadIdx.x] = plain[m], out[(m * 2 + 1) * 32 + threadIdx.x] = turned[m];
}
std::vector<float> run_matrices(int order, int offset) {
  Buffer<uint32_t> out(8 * 32, "out");
  launch(matrices_kernel, {dim3(1), dim3(32), (4 * 64 + 8) * sizeof(uint16_t)}, out.data(), order, offset);
  std::vector<float> values;
  for (const uint32_t pair : out.values())
    values.push_back(static_cast<float>(pair & 0xffffu)), values.push_back(static_cast<float>(pair >> 16));
  return values;
}
std::vector<float> matrices_in_another_order(bool broken) { return run_matrices(broken ? 8 : 0, 0); }
std::vector<float> misaligned_matrix(bool broken) { return run_matrices(0, broken ? 4 : 0); }

}  // namespace

std::vector<float> matrices_of_shared_memory() { return run_matrices(0, 0); }

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = {
      {"no barrier after a table is filled", no_barrier_after_writes, {"race", "mutants.cu:"}},
      {"no barrier before shared memory is used again", no_barrier_before_reuse, {"race", "write after read"}},
      {"an index beyond its piece of shared memory",
       shared_overrun,
       {"writes beyond shared piece 0 of 512 bytes, at byte 512"}},
      {"less shared memory than is taken", too_little_shared, {"takes 1024 bytes and was launched with 960"}},
      {"entries of a table that nobody writes", unwritten_shared, {"reads what nobody wrote"}},
      {"two barriers that halves of a block meet", divergent_barrier, {"divergent barrier"}},
      {"a shuffle with half a mask", half_a_mask, {"not in the mask"}},
      {"a butterfly without a step", missing_step, {}},
      {"a shuffle of some lanes with all in its mask", shuffle_of_some, {"deadlock", "80 threads", "48 threads"}},
      {"no __syncwarp before lanes read each other's", no_syncwarp, {"race, read after write"}},
      {"a wait that leaves one copy too many", copies_waited_short, {"before it waits for it"}},
      {"an end with copies in flight", copies_left_behind, {"ends with asynchronous copies"}},
      {"an index beyond a buffer", global_overrun, {"beyond buffer out of 1024 bytes"}},
      {"two blocks that write the same bytes", blocks_race, {"race, write after write", "one of another block"}},
      {"a warp that leaves without its output", output_left_out, {"reads what nobody wrote", "buffer parts"}},
      {"no fence before the counter of blocks", no_fence, {"race, read after write", "one of another block"}},
      {"no fence of the counting thread", no_fence_of_one, {"race, read after write", "one of another block"}},
      {"a pointer to host memory", host_memory, {"no device memory"}},
      {"another thread's local memory", anothers_local, {"another thread's local memory"}},
      {"a load of 8 bytes at 4", misaligned_load, {"no multiple"}},
      {"a vector of 8 bytes at 4", misaligned_vector, {"none for its type"}},
      {"an index beyond an array of registers", register_index, {"beyond its end"}},
      {"a shift by the width", shift_too_far, {"shifts by 32"}},
      {"a fragment of another column", wrong_fragment, {}},
      {"matrices in another order", matrices_in_another_order, {}},
      {"a row of a matrix at 8 bytes", misaligned_matrix, {"no multiple"}}};
  return all;
}

}  // namespace vqkv::device
