#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "core/error.h"
#include "device/gemm.h"
#include "device/runtime.h"

namespace vqkv::device {
namespace {

constexpr size_t kWorkspace = size_t{32} << 20;
constexpr const char* kLibrary = "libcublasLt.so.13";

// The functions of cuBLASLt that are used, found when they are first needed.
struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescCreate) product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmul) multiply = nullptr;
  cublasLtHandle_t handle = nullptr;

  Library() {
    void* opened = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (!opened)
      fail_unavailable(std::string("products on a device need cuBLASLt: ") + dlerror() +
                       "; it comes with CUDA 13, LD_LIBRARY_PATH says where");
    const auto find = [&]<class F>(F& function, const char* name) {
      function = reinterpret_cast<F>(dlsym(opened, name));
      if (!function) fail_unavailable(std::string(kLibrary) + " has no " + name);
    };
    find(create, "cublasLtCreate");
    find(product, "cublasLtMatmulDescCreate");
    find(set_product, "cublasLtMatmulDescSetAttribute");
    find(layout, "cublasLtMatrixLayoutCreate");
    find(preference, "cublasLtMatmulPreferenceCreate");
    find(set_preference, "cublasLtMatmulPreferenceSetAttribute");
    find(choose, "cublasLtMatmulAlgoGetHeuristic");
    find(multiply, "cublasLtMatmul");
    check(create(&handle), "cublasLtCreate");
  }
  static void check(cublasStatus_t status, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS)
      fail_internal(std::string("cuBLASLt, ") + what + ": status " + std::to_string(static_cast<int>(status)));
  }
};

// One shape of product, chosen once: Y' = W' X' in the columns that cuBLASLt counts in, W (outputs, inputs) turned.
struct Product {
  cublasLtMatmulDesc_t how = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulHeuristicResult_t chosen{};

  Product(const Library& lib, int rows, int outputs, int inputs) {
    const cublasOperation_t turned = CUBLAS_OP_T;
    Library::check(lib.product(&how, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product");
    Library::check(lib.set_product(how, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned), "a product");
    Library::check(lib.layout(&w, CUDA_R_16BF, static_cast<uint64_t>(inputs), static_cast<uint64_t>(outputs), inputs),
                   "a layout");
    Library::check(lib.layout(&x, CUDA_R_16BF, static_cast<uint64_t>(inputs), static_cast<uint64_t>(rows), inputs),
                   "a layout");
    Library::check(lib.layout(&y, CUDA_R_32F, static_cast<uint64_t>(outputs), static_cast<uint64_t>(rows), outputs),
                   "a layout");
    cublasLtMatmulPreference_t wanted = nullptr;
    Library::check(lib.preference(&wanted), "a preference");
    Library::check(lib.set_preference(wanted, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof kWorkspace),
                   "a preference");
    int found = 0;
    Library::check(lib.choose(lib.handle, how, w, x, y, y, wanted, 1, &chosen, &found), "the choice of a kernel");
    if (found == 0) fail_internal("cuBLASLt has no kernel for a product");
  }
};

}  // namespace

void multiply_rows_bf16(const uint16_t* x, const uint16_t* w, int rows, int outputs, int inputs, bool add, float* y) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static const Library lib;
  static Buffer<uint8_t> workspace(kWorkspace, "the workspace of products");
  static std::map<std::tuple<int, int, int>, Product> known;
  const auto key = std::tuple(rows, outputs, inputs);
  auto it = known.find(key);
  if (it == known.end()) it = known.emplace(key, Product(lib, rows, outputs, inputs)).first;
  const Product& p = it->second;
  const float one = 1, under = add ? 1.0f : 0.0f;
  Library::check(lib.multiply(lib.handle, p.how, &one, w, p.w, x, p.x, &under, y, p.y, y, p.y, &p.chosen.algo,
                              workspace.data(), kWorkspace, static_cast<cudaStream_t>(stream())),
                 "a product");
}

}  // namespace vqkv::device
