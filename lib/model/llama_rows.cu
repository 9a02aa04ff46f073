#include "device/pairs.h"
#include "model/llama_rows.h"

namespace vqkv {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(device::kAllLanes, v, step);
  return v;
}

// The sum over a block, to all its threads; `room`: a number a warp.
__device__ float block_sum(float v, float* room) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
  v = warp_sum(v);
  if (lane == 0) room[warp] = v;
  __syncthreads();
  float all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all += room[w];
  return all;
}

__device__ __forceinline__ uint16_t bf16_bits(float v) { return device::bits_as<uint16_t>(__float2bfloat16_rn(v)); }

__device__ __forceinline__ uint2 bf16_of(float4 v) {
  return make_uint2(device::bf16_pair(v.x, v.y), device::bf16_pair(v.z, v.w));
}

__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* tokens, const uint16_t* table, int cols, float* x) {
  const size_t row = blockIdx.x, from = static_cast<size_t>(tokens[row]) * static_cast<size_t>(cols);
  for (int c = static_cast<int>(threadIdx.x); c < cols; c += kThreads)
    x[row * static_cast<size_t>(cols) + static_cast<size_t>(c)] =
        __uint_as_float(static_cast<unsigned>(table[from + static_cast<size_t>(c)]) << 16);
}

__global__ void __launch_bounds__(kThreads)
    norm_kernel(const float* x, const float* weight, float eps, int cols, uint16_t* y) {
  device::Shared shared;
  float* room = shared.take<float>(kWarps);
  const auto* row = reinterpret_cast<const float4*>(x + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(cols));
  auto* out = reinterpret_cast<uint2*>(y + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(cols));
  const auto* scale = reinterpret_cast<const float4*>(weight);
  float squares = 0;
  for (int c = static_cast<int>(threadIdx.x); c < cols / 4; c += kThreads) {
    const float4 v = device::load(row + c);
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
  }
  const float factor = 1.0f / sqrtf(block_sum(squares, room) / static_cast<float>(cols) + eps);
  for (int c = static_cast<int>(threadIdx.x); c < cols / 4; c += kThreads) {
    const float4 v = device::load(row + c), w = device::load(scale + c);
    device::store(out + c,
                  bf16_of(make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w)));
  }
}

__global__ void __launch_bounds__(kThreads) swiglu_kernel(const float* gate_up, int cols, uint16_t* y) {
  const size_t row = blockIdx.y;
  const int c = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (c >= cols) return;
  const float gate = gate_up[row * 2 * static_cast<size_t>(cols) + static_cast<size_t>(c)];
  const float up = gate_up[(row * 2 + 1) * static_cast<size_t>(cols) + static_cast<size_t>(c)];
  y[row * static_cast<size_t>(cols) + static_cast<size_t>(c)] = bf16_bits(gate / (1.0f + expf(-gate)) * up);
}

__global__ void __launch_bounds__(kThreads) bias_kernel(float* x, const float* bias, int cols) {
  const int c = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (c < cols) x[static_cast<size_t>(blockIdx.y) * static_cast<size_t>(cols) + static_cast<size_t>(c)] += bias[c];
}

__global__ void __launch_bounds__(kThreads) round_kernel(const float* x, int64_t fours, uint16_t* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < fours)
    device::store(reinterpret_cast<uint2*>(y) + i, bf16_of(device::load(reinterpret_cast<const float4*>(x) + i)));
}

// A warp a head of one row.
__global__ void __launch_bounds__(kThreads) qkv_kernel(QkvRows p) {
  const int warp = __shfl_sync(device::kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
  const int lane = static_cast<int>(threadIdx.x & 31), heads = p.q_heads + 2 * p.kv_heads;
  const int head = static_cast<int>(blockIdx.x) * kWarps + warp, row = static_cast<int>(blockIdx.y);
  if (head >= heads) return;
  const bool query = head < p.q_heads, key = !query && head < p.q_heads + p.kv_heads;
  const int d = p.head_dim, own = query ? head : (head - p.q_heads) % p.kv_heads;
  float* x = p.qkv + (static_cast<size_t>(row) * static_cast<size_t>(heads) + static_cast<size_t>(head)) *
                         static_cast<size_t>(d);
  const float* norm = query ? p.q_norm : key ? p.k_norm : nullptr;
  float squares = 0;
  for (int c = lane; c < d; c += 32) {
    const float v = p.bias ? x[c] + p.bias[head * d + c] : x[c];
    if (p.bias) x[c] = v;
    squares = fmaf(v, v, squares);
  }
  if (norm) {
    const float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(d) + p.norm_eps);
    for (int c = lane; c < d; c += 32) x[c] = x[c] * factor * norm[c];
  }
  __syncwarp();  // pairs lie in lanes apart

  const int pairs = p.rotary_dim / 2;
  const float* cosine = p.rotation + static_cast<size_t>(row) * static_cast<size_t>(p.rotary_dim);
  const auto rotated = [&](int c) {
    if (c >= p.rotary_dim || (!query && !key)) return x[c];
    const int pair = c % pairs;
    const float a = cosine[pair], b = cosine[pairs + pair], u = x[pair], v = x[pair + pairs];
    return c < pairs ? u * a - v * b : u * b + v * a;
  };
  if (query) {
    float* to = p.queries + (static_cast<size_t>(row) * static_cast<size_t>(p.q_heads) + static_cast<size_t>(own)) *
                                static_cast<size_t>(d);
    for (int c = lane; c < d; c += 32) to[c] = rotated(c) * p.query_scale;
    return;
  }
  const int place = p.place[row];
  const int page = p.page_table[p.sequence[row] * p.most_pages + place / p.page_tokens];
  uint16_t* to = (key ? p.keys : p.values) +
                 ((static_cast<size_t>(page) * static_cast<size_t>(p.kv_heads) + static_cast<size_t>(own)) *
                      static_cast<size_t>(p.page_tokens) +
                  static_cast<size_t>(place % p.page_tokens)) *
                     static_cast<size_t>(d);
  for (int c = lane; c < d; c += 32)
    to[c] = p.f16 ? device::bits_as<uint16_t>(__float2half_rn(rotated(c))) : bf16_bits(rotated(c));
}

__global__ void __launch_bounds__(kThreads) most_likely_kernel(const float* logits, int vocab, int32_t* tokens) {
  device::Shared shared;
  float* values = shared.take<float>(kWarps);
  int* places = shared.take<int>(kWarps);
  const float* row = logits + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(vocab);
  float most = -INFINITY;
  int place = vocab;
  for (int c = static_cast<int>(threadIdx.x); c < vocab; c += kThreads)
    if (row[c] > most || place == vocab) most = row[c], place = c;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(device::kAllLanes, most, step);
    const int at = __shfl_xor_sync(device::kAllLanes, place, step);
    if (other > most || (other == most && at < place)) most = other, place = at;
  }
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = most, places[threadIdx.x / 32] = place;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w)
    if (values[w] > most || (values[w] == most && places[w] < place)) most = values[w], place = places[w];
  tokens[blockIdx.x] = place;
}

unsigned blocks(int n, int each) { return static_cast<unsigned>((n + each - 1) / each); }

}  // namespace

void embed_rows(const int32_t* tokens, const uint16_t* table, int rows, int cols, float* x) {
  device::launch(embed_kernel, {dim3(static_cast<unsigned>(rows)), dim3(kThreads)}, tokens, table, cols, x);
}

void norm_rows_bf16(const float* x, const float* weight, float eps, int rows, int cols, uint16_t* y) {
  device::launch(norm_kernel, {dim3(static_cast<unsigned>(rows)), dim3(kThreads), kWarps * sizeof(float)}, x, weight,
                 eps, cols, y);
}

void swiglu_rows_bf16(const float* gate_up, int rows, int cols, uint16_t* y) {
  device::launch(swiglu_kernel, {dim3(blocks(cols, kThreads), static_cast<unsigned>(rows)), dim3(kThreads)}, gate_up,
                 cols, y);
}

void round_rows_bf16(const float* x, int64_t n, uint16_t* y) {
  device::launch(round_kernel, {dim3(static_cast<unsigned>((n / 4 + kThreads - 1) / kThreads)), dim3(kThreads)}, x,
                 n / 4, y);
}

void add_bias_rows(float* x, const float* bias, int rows, int cols) {
  device::launch(bias_kernel, {dim3(blocks(cols, kThreads), static_cast<unsigned>(rows)), dim3(kThreads)}, x, bias,
                 cols);
}

void place_qkv_rows(const QkvRows& call) {
  device::launch(
      qkv_kernel,
      {dim3(blocks(call.q_heads + 2 * call.kv_heads, kWarps), static_cast<unsigned>(call.rows)), dim3(kThreads)}, call);
}

void most_likely_rows(const float* logits, int rows, int vocab, int32_t* tokens) {
  device::launch(most_likely_kernel,
                 {dim3(static_cast<unsigned>(rows)), dim3(kThreads), 2 * ((kWarps * 4 + 15) / 16 * 16)}, logits, vocab,
                 tokens);
}

}  // namespace vqkv
