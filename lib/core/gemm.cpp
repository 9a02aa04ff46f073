#include "core/gemm.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>

#include "core/cpu.h"
#include "core/huge_pages.h"
#include "core/panel.h"
#include "core/panel_int4.h"
#include "core/round_up.h"
#include "core/small_matrix.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

using dnnl::memory;

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine = [] {
  // VQKV_CPU lowers our own kernels; oneDNN follows, so that a lowered run is lowered throughout.
#if defined(__x86_64__)
    if (!cpu_features().avx512) dnnl::set_max_cpu_isa(cpu_features().avx2 ? dnnl::cpu_isa::avx2 : dnnl::cpu_isa::sse41);
#endif
    return dnnl::engine(dnnl::engine::kind::cpu, 0);
  }();
  return engine;
}

// oneDNN reads its thread count from the OpenMP setting of the calling thread. Ours is always one; what other users of
// OpenMP had set comes back.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

template <class Body>
void guarded(Body&& body) {
  try {
    const OneThread one;
    body();
  } catch (const dnnl::error& e) {
    fail_internal(fmt::format("oneDNN: {} (status {})", e.what(), static_cast<int>(e.status)));
  }
}

memory::desc strided(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return memory::desc({rows, cols}, memory::data_type::f32, memory::dims{row_stride, col_stride});
}

// Everything that a compiled product depends on.
struct Product {
  int64_t m, n, k, a_stride, b_row_stride, b_col_stride, c_stride;
  bool accumulate;
  auto operator<=>(const Product&) const = default;
};

struct Compiled {
  memory::desc a, b, c, scratch;
  dnnl::matmul primitive;
};

Compiled compile(const Product& p) {
  Compiled r;
  r.a = strided(p.m, p.k, p.a_stride, 1);
  r.b = strided(p.k, p.n, p.b_row_stride, p.b_col_stride);
  r.c = strided(p.m, p.n, p.c_stride, 1);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (p.accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
  const dnnl::matmul::primitive_desc pd({r.a, r.b, r.c}, attr, cpu_engine());
  r.scratch = pd.scratchpad_desc();
  r.primitive = dnnl::matmul(pd);
  return r;
}

// Making a primitive costs as much as a small product, so each thread keeps its own.
void run(const Product& p, const float* a, const float* b, float* c) {
  constexpr size_t kKept = 256;
  thread_local std::map<Product, Compiled> kept;
  thread_local AlignedVector<std::byte> scratch;
  auto it = kept.find(p);
  if (it == kept.end()) {
    if (kept.size() >= kKept) kept.clear();
    it = kept.emplace(p, compile(p)).first;
  }
  const Compiled& f = it->second;
  if (scratch.size() < f.scratch.get_size()) scratch.resize(f.scratch.get_size());
  thread_local dnnl::stream stream(cpu_engine());
  f.primitive.execute(stream, {{DNNL_ARG_SRC, memory(f.a, cpu_engine(), const_cast<float*>(a))},
                               {DNNL_ARG_WEIGHTS, memory(f.b, cpu_engine(), const_cast<float*>(b))},
                               {DNNL_ARG_DST, memory(f.c, cpu_engine(), c)},
                               {DNNL_ARG_SCRATCHPAD, memory(f.scratch, cpu_engine(), scratch.data())}});
  stream.wait();
}

// Equal parts of at most `most`, each a multiple of `unit` but the last.
struct Cut {
  int64_t total, size, count;
  Cut(int64_t n, int64_t most, int64_t unit) : total(n) {
    const int64_t parts = (n + most - 1) / most;
    size = round_up((n + parts - 1) / parts, unit);
    count = (n + size - 1) / size;
  }
  int64_t first(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return std::min(size, total - i * size); }
};

// body(row, rows, col, cols) over a grid of tiles that the shape alone decides.
template <class Body>
void for_tiles(const Cut& rows, const Cut& cols, Body&& body) {
  parallel_for(rows.count * cols.count, [&](int64_t i) {
    const int64_t r = i / cols.count, c = i % cols.count;
    guarded([&] { body(rows.first(r), rows.length(r), cols.first(c), cols.length(c)); });
  });
}

}  // namespace

void gemm(ConstMatrix a, ConstMatrix b, bool transpose_b, MutMatrix c, bool accumulate) {
  const int64_t m = a.rows, k = a.cols, n = transpose_b ? b.rows : b.cols;
  VQKV_CHECK(k == (transpose_b ? b.cols : b.rows) && c.rows == m && c.cols == n);
  if (m == 0 || n == 0) return;
  const int64_t row_stride = transpose_b ? 1 : b.stride, col_stride = transpose_b ? b.stride : 1;
  // b is repacked inside every tile: tall tiles keep that below one part in a hundred of the work.
  for_tiles(Cut(m, 256, 32), Cut(n, 1024, 64), [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
    run({rows, cols, k, a.stride, row_stride, col_stride, c.stride, accumulate}, a.row(row), b.data + col * col_stride,
        c.row(row) + col);
  });
}

struct PackedWeights::Impl {
  int64_t in = 0, out = 0;
  DType type = DType::kF32;
  int64_t group = 0;                // inputs a scale of 4-bit weights; 0: they are of `type`
  std::shared_ptr<std::byte> data;  // panels, one after the other, and zeros
  int64_t bytes() const {
    return group > 0 ? panels() * Int4Panel{in, group}.bytes()
                     : panels() * panel_size() * static_cast<int64_t>(dtype_size(type));
  }
  int64_t panels() const { return (out + kPanelWidth - 1) / kPanelWidth; }
  int64_t panel_size() const { return (type == DType::kBF16 ? round_up(in, 2) : in) * kPanelWidth; }
  // Of element (k, column), in elements.
  int64_t place(int64_t k, int64_t column) const {
    const int64_t lane = column % kPanelWidth;
    return column / kPanelWidth * panel_size() +
           (type == DType::kBF16 ? k / 2 * 2 * kPanelWidth + 2 * lane + k % 2 : k * kPanelWidth + lane);
  }
  const std::byte* panel(int64_t p) const {
    return data.get() + p * panel_size() * static_cast<int64_t>(dtype_size(type));
  }
  std::byte* int4_panel(int64_t p) const { return data.get() + p * Int4Panel{in, group}.bytes(); }
  bool rounds_inputs() const { return type == DType::kBF16 && cpu_features().bf16_products; }
  template <class T, class Narrow>
  void pack(ConstMatrix w, int64_t first, Narrow&& narrow);
};

// Rows of w become columns [first, first + w.rows).
template <class T, class Narrow>
void PackedWeights::Impl::pack(ConstMatrix w, int64_t first, Narrow&& narrow) {
  T* all = reinterpret_cast<T*>(data.get());
  parallel_for((w.rows + kPanelWidth - 1) / kPanelWidth, [&](int64_t chunk) {
    for (int64_t r = chunk * kPanelWidth; r < std::min(w.rows, (chunk + 1) * kPanelWidth); ++r) {
      for (int64_t k = 0; k < in; ++k) all[place(k, first + r)] = narrow(w(r, k));
    }
  });
}

PackedWeights::PackedWeights(ConstMatrix weights, DType storage)
    : PackedWeights(std::span<const ConstMatrix>(&weights, 1), storage) {}

PackedWeights::PackedWeights(std::span<const ConstMatrix> stacked, DType storage) {
  VQKV_CHECK(!stacked.empty() && (storage == DType::kF32 || storage == DType::kBF16));
  auto impl = std::make_shared<Impl>();
  impl->in = stacked[0].cols;
  impl->type = storage;
  for (const ConstMatrix& w : stacked) {
    VQKV_CHECK(w.cols == impl->in);
    impl->out += w.rows;
  }
  VQKV_CHECK(impl->in > 0 && impl->out > 0);
  impl->data = huge_page_memory(impl->bytes());
  int64_t first = 0;
  for (const ConstMatrix& w : stacked) {
    if (storage == DType::kF32)
      impl->pack<float>(w, first, [](float v) { return v; });
    else
      impl->pack<bf16>(w, first, [](float v) { return to_bf16(v); });
    first += w.rows;
  }
  impl_ = std::move(impl);
}

void PackedWeights::apply(ConstMatrix x, MutMatrix y, bool accumulate) const {
  VQKV_CHECK(impl_ && x.cols == impl_->in && y.cols == impl_->out && x.rows == y.rows);
  if (x.rows == 0) return;
  const Impl& w = *impl_;
  const int64_t rounded_stride = round_up(w.in, 2);
  const bf16* rounded = nullptr;
  if (w.rounds_inputs()) {
    thread_local AlignedVector<bf16> kept;
    kept.resize(static_cast<size_t>(x.rows * rounded_stride));
    bf16* to = kept.data();
    rounded = to;
    constexpr int64_t kRowsPerTask = 32;
    parallel_for((x.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
      for (int64_t r = task * kRowsPerTask; r < std::min(x.rows, (task + 1) * kRowsPerTask); ++r) {
        to_bf16(x.row(r), to + r * rounded_stride, w.in);
        if (w.in % 2 == 1) to[r * rounded_stride + w.in] = bf16{0};
      }
    });
  }
  // Up to 192 rows share one pass over a panel; a panel is a task, so that even 576 outputs are nine of them.
  const Cut rows(x.rows, 192, 6);
  parallel_for(rows.count * w.panels(), [&](int64_t i) {
    const int64_t tile = i / w.panels(), panel = i % w.panels(), row = rows.first(tile), col = panel * kPanelWidth;
    thread_local AlignedVector<float> wide;
    if (w.group > 0) {
      if (const auto size = static_cast<size_t>(w.in * kPanelWidth); wide.size() < size) wide.resize(size);
      Int4Panel{w.in, w.group}.widen(w.int4_panel(panel), wide.data());
    }
    multiply_panel({.panel = w.group > 0 ? static_cast<const void*>(wide.data()) : w.panel(panel),
                    .type = w.type,
                    .depth = w.in,
                    .x = x.row(row),
                    .x_rounded = rounded ? rounded + row * rounded_stride : nullptr,
                    .x_stride = rounded ? rounded_stride : x.stride,
                    .rows = rows.length(tile),
                    .y = y.row(row) + col,
                    .y_stride = y.stride,
                    .cols = std::min(kPanelWidth, w.out - col),
                    .accumulate = accumulate});
  });
}

void PackedWeights::apply_transposed(ConstMatrix y, MutMatrix x, bool accumulate) const {
  VQKV_CHECK(impl_ && x.cols == impl_->in && y.cols == impl_->out && x.rows == y.rows);
  const Impl& w = *impl_;
  // 16 panels at a time: 2.3 MB of 576 inputs, and sums long enough that adding to x costs little.
  constexpr int64_t kOutputs = 16 * kPanelWidth;
  thread_local AlignedVector<float> kept;
  if (const auto size = static_cast<size_t>(std::min(w.out, kOutputs) * w.in); kept.size() < size) kept.resize(size);
  const MutMatrix plain(kept.data(), std::min(w.out, kOutputs), w.in);
  for (int64_t first = 0; first < w.out; first += kOutputs) {
    const int64_t outputs = std::min(kOutputs, w.out - first);
    parallel_for((outputs + kPanelWidth - 1) / kPanelWidth, [&](int64_t i) {
      const int64_t row = first + i * kPanelWidth, columns = std::min(kPanelWidth, w.out - row);
      if (w.type == DType::kF32 && w.group == 0) {
        const auto* panel = reinterpret_cast<const float*>(w.panel(row / kPanelWidth));
        kernels::transpose(panel, kPanelWidth, w.in, columns, plain.row(row - first), w.in, false);
      } else {
        for (int64_t r = row; r < row + columns; ++r) copy_row(r, plain.row(r - first));
      }
    });
    gemm(y.slice_cols(first, outputs), plain.slice_rows(0, outputs), false, x, accumulate || first > 0);
  }
}

void PackedWeights::copy_row(int64_t r, float* out) const {
  VQKV_CHECK(impl_ && r >= 0 && r < impl_->out);
  if (impl_->group > 0) {
    Int4Panel{impl_->in, impl_->group}.widen_column(impl_->int4_panel(r / kPanelWidth), r % kPanelWidth, out);
    return;
  }
  const std::byte* all = impl_->data.get();
  for (int64_t k = 0; k < impl_->in; ++k) {
    const int64_t at = impl_->place(k, r);
    out[k] = impl_->type == DType::kF32 ? reinterpret_cast<const float*>(all)[at]
                                        : to_float(reinterpret_cast<const bf16*>(all)[at]);
  }
}

PackedWeights PackedWeights::quantized(int group) const {
  VQKV_CHECK(impl_ && group >= 1);
  auto impl = std::make_shared<Impl>();
  impl->in = impl_->in;
  impl->out = impl_->out;
  impl->group = group;
  impl->data = huge_page_memory(impl->bytes());
  const Int4Panel form{impl->in, impl->group};
  parallel_for(impl->panels(), [&](int64_t panel) {
    std::vector<float> row(static_cast<size_t>(impl->in));
    for (int64_t lane = 0; lane < std::min(kPanelWidth, impl->out - panel * kPanelWidth); ++lane) {
      copy_row(panel * kPanelWidth + lane, row.data());
      form.narrow(row.data(), lane, impl->int4_panel(panel));
    }
  });
  PackedWeights out;
  out.impl_ = std::move(impl);
  return out;
}

int64_t PackedWeights::bytes() const { return impl_ ? impl_->bytes() : 0; }
bool PackedWeights::rounds_inputs() const { return impl_ && impl_->rounds_inputs(); }
int64_t PackedWeights::out_features() const { return impl_ ? impl_->out : 0; }
int64_t PackedWeights::in_features() const { return impl_ ? impl_->in : 0; }

}  // namespace vqkv
