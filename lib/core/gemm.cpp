#include "core/gemm.h"

#include <omp.h>

#include <oneapi/dnnl/dnnl.hpp>

#include "core/thread_pool.h"

namespace vqkv {
namespace {

using dnnl::memory;

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::desc strided(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, memory::data_type type) {
  return memory::desc({rows, cols}, type, memory::dims{row_stride, col_stride});
}

dnnl::primitive_attr attributes(bool accumulate) {
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::library);
  if (accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
  return attr;
}

// oneDNN takes its thread count from OpenMP's setting of the calling thread.
void share_threads() { omp_set_num_threads(inside_parallel() ? 1 : thread_count()); }

template <class Body>
void guarded(Body&& body) {
  try {
    body();
  } catch (const dnnl::error& e) {
    fail_internal(std::string("oneDNN: ") + e.what());
  }
}

void run_matmul(const memory& a, const memory& b, const memory& c, bool accumulate) {
  const dnnl::matmul::primitive_desc pd({a.get_desc(), b.get_desc(), c.get_desc()}, attributes(accumulate), cpu_engine());
  dnnl::stream stream(cpu_engine());
  dnnl::matmul(pd).execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
  stream.wait();
}

}  // namespace

void gemm(ConstMatrix a, ConstMatrix b, bool transpose_b, MutMatrix c, bool accumulate) {
  const int64_t m = a.rows, k = a.cols, n = transpose_b ? b.rows : b.cols;
  VQKV_CHECK(k == (transpose_b ? b.cols : b.rows) && c.rows == m && c.cols == n);
  if (m == 0 || n == 0) return;
  share_threads();
  guarded([&] {
    const auto f32 = memory::data_type::f32;
    const memory ma(strided(m, k, a.stride, 1, f32), cpu_engine(), const_cast<float*>(a.data));
    const memory mb(strided(k, n, transpose_b ? 1 : b.stride, transpose_b ? b.stride : 1, f32), cpu_engine(),
                    const_cast<float*>(b.data));
    const memory mc(strided(m, n, c.stride, 1, f32), cpu_engine(), c.data);
    run_matmul(ma, mb, mc, accumulate);
  });
}

struct PackedWeights::Impl {
  int64_t in = 0, out = 0;
  DType storage = DType::kF32;
  memory packed;
};

PackedWeights::PackedWeights(ConstMatrix weights, DType storage) {
  VQKV_CHECK(storage == DType::kF32 || storage == DType::kBF16);
  auto impl = std::make_shared<Impl>();
  impl->out = weights.rows;
  impl->in = weights.cols;
  impl->storage = storage;
  guarded([&] {
    // One plain (out, in) copy.
    const auto type = storage == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
    memory plain(strided(impl->in, impl->out, 1, weights.stride, memory::data_type::f32), cpu_engine(),
                       const_cast<float*>(weights.data));
    impl->packed = memory(strided(impl->in, impl->out, 1, impl->in, type), cpu_engine());
    dnnl::stream stream(cpu_engine());
    dnnl::reorder(plain, impl->packed).execute(stream, plain, impl->packed);
    stream.wait();
  });
  impl_ = std::move(impl);
}

void PackedWeights::apply(ConstMatrix x, MutMatrix y, bool accumulate) const {
  VQKV_CHECK(impl_ && x.cols == impl_->in && y.cols == impl_->out && x.rows == y.rows);
  if (x.rows == 0) return;
  share_threads();
  guarded([&] {
    memory mx(strided(x.rows, x.cols, x.stride, 1, memory::data_type::f32), cpu_engine(), const_cast<float*>(x.data));
    const memory my(strided(y.rows, y.cols, y.stride, 1, memory::data_type::f32), cpu_engine(), y.data);
    if (impl_->storage == DType::kF32) {
      run_matmul(mx, impl_->packed, my, accumulate);
      return;
    }
    memory narrow(strided(x.rows, x.cols, x.cols, 1, memory::data_type::bf16), cpu_engine());
    dnnl::stream stream(cpu_engine());
    dnnl::reorder(mx, narrow).execute(stream, mx, narrow);
    stream.wait();
    run_matmul(narrow, impl_->packed, my, accumulate);
  });
}

int64_t PackedWeights::out_features() const { return impl_ ? impl_->out : 0; }
int64_t PackedWeights::in_features() const { return impl_ ? impl_->in : 0; }
int64_t PackedWeights::bytes() const { return impl_ ? static_cast<int64_t>(impl_->packed.get_desc().get_size()) : 0; }

}  // namespace vqkv
