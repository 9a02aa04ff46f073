#include "codec/train/rotation.h"

#include <dlfcn.h>
#include <faiss/VectorTransform.h>
#include <faiss/impl/ProductQuantizer.h>
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>

namespace vqkv {
namespace {

// OpenBLAS splits LAPACK's work over threads of its own, which changes last bits. It is loaded behind libblas, under no
// name that a link could count on, and absent where another BLAS serves.
void one_blas_thread() {
  using Setter = void (*)(int);
  if (const auto set = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads"))) set(1);
}

}  // namespace

Matrix<float> opq_rotation(ConstMatrix x, const OpqOptions& options, Rng rng) {
  VQKV_CHECK(options.groups >= 1 && x.cols % options.groups == 0);
  if (x.rows < 256) fail_data(fmt::format("the opq rotation needs at least 256 training vectors, not {}", x.rows));
  const std::vector<int64_t> rows = rng.sample(x.rows, options.points);
  const auto n = static_cast<int64_t>(rows.size());
  Matrix<float> points(n, x.cols);
  for (int64_t i = 0; i < n; ++i) std::copy_n(x.row(rows[static_cast<size_t>(i)]), x.cols, points.row(i));

  omp_set_num_threads(1);
  one_blas_thread();
  const auto d = static_cast<size_t>(x.cols);
  faiss::ProductQuantizer pq(d, static_cast<size_t>(options.groups), 8);
  pq.cp.min_points_per_centroid = 1;
  pq.cp.max_points_per_centroid = static_cast<int>(n / 256 + 1);
  pq.cp.seed = static_cast<int>(rng.split(1).key() & 0x7fffffff);
  faiss::OPQMatrix opq(static_cast<int>(d), options.groups);
  opq.niter = options.iterations;
  opq.max_train_points = static_cast<size_t>(n);
  opq.verbose = false;
  opq.pq = &pq;
  opq.train(n, points.data());
  Matrix<float> rotation(x.cols, x.cols);
  VQKV_CHECK(opq.A.size() == rotation.storage.size());
  std::copy(opq.A.begin(), opq.A.end(), rotation.storage.begin());
  return rotation;
}

}  // namespace vqkv
