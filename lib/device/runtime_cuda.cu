#include <cuda_runtime.h>

#include "core/error.h"
#include "device/runtime.h"

namespace vqkv::device {

void require(int error, const char* what) {
  const auto e = static_cast<cudaError_t>(error);
  if (e == cudaSuccess) return;
  const std::string message = std::string("CUDA, ") + what + ": " + cudaGetErrorString(e);
  if (e == cudaErrorNoDevice || e == cudaErrorInsufficientDriver)
    fail_unavailable(message + "; --device cpu needs neither");
  if (e == cudaErrorNoKernelImageForDevice)
    fail_unavailable(message + "; kernels are compiled for A100 and H100 (CMAKE_CUDA_ARCHITECTURES)");
  if (e == cudaErrorMemoryAllocation) fail_usage(message);
  fail_internal(message);
}

namespace {
int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  require(cudaGetDevice(&device), "the current device");
  require(cudaDeviceGetAttribute(&value, which, device), "an attribute of the device");
  return value;
}
}  // namespace

std::string require_device() {
  int devices = 0, device = 0;
  require(cudaGetDeviceCount(&devices), "looking for a device");
  if (devices == 0) require(cudaErrorNoDevice, "looking for a device");
  require(cudaGetDevice(&device), "the current device");
  if (attribute(cudaDevAttrMemoryPoolsSupported) == 0) fail_unavailable("CUDA: the device has no memory pools");
  cudaDeviceProp facts{};
  require(cudaGetDeviceProperties(&facts, device), "the current device");
  return facts.name;
}

void require_shared(size_t bytes) {
  static const auto most = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (bytes > most)
    fail_unavailable("a kernel takes " + std::to_string(bytes) + " bytes of shared memory; the device has " +
                     std::to_string(most) + " for a block (A100 and H100 have enough)");
}

// In the order of launches, from the device's pool: small buffers come and go with every pass, and neither waits for
// the device. What is released stays in the pool.
void* allocate(size_t bytes, const std::string& name) {
  static const bool keeps = [] {
    int device = 0;
    require(cudaGetDevice(&device), "the current device");
    cudaMemPool_t pool = nullptr;
    require(cudaDeviceGetDefaultMemPool(&pool, device), "the device's memory pool");
    uint64_t all = UINT64_MAX;
    require(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), "the device's memory pool");
    return true;
  }();
  (void)keeps;
  void* p = nullptr;
  require(cudaMallocAsync(&p, bytes, static_cast<cudaStream_t>(stream())), (name + ", memory of the device").c_str());
  return p;
}
void release(void* p) noexcept { cudaFreeAsync(p, static_cast<cudaStream_t>(stream())); }
void copy_in(void* to, const void* from, size_t bytes) {
  require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream())),
          "copying to the device");
  // Elsewhere the driver has taken the bytes to memory of its own by now; here it may read the caller's.
  static const bool reads_in_place = attribute(cudaDevAttrPageableMemoryAccess) != 0;
  if (reads_in_place) synchronize();
}
void copy_out(void* to, const void* from, size_t bytes) {
  require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream())),
          "copying from the device");
  synchronize();
}
void fill_zero(void* p, size_t bytes) {
  require(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream())), "filling memory of the device");
}
void copy_within(void* to, const void* from, size_t bytes) {
  require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream())),
          "copying on the device");
}
double seconds_of(const std::function<void()>& work) {
  cudaEvent_t begin = nullptr, end = nullptr;
  require(cudaEventCreate(&begin), "an event");
  require(cudaEventCreate(&end), "an event");
  require(cudaEventRecord(begin, static_cast<cudaStream_t>(stream())), "an event");
  work();
  require(cudaEventRecord(end, static_cast<cudaStream_t>(stream())), "an event");
  require(cudaEventSynchronize(end), "what was timed");
  float milliseconds = 0;
  require(cudaEventElapsedTime(&milliseconds, begin, end), "an event");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e-3 * double{milliseconds};
}
HostCopy::HostCopy(size_t bytes, const std::string& name) : bytes_(bytes) {
  require(cudaMallocHost(&data_, bytes), (name + ", pinned memory of the host").c_str());
  cudaEvent_t event = nullptr;
  const cudaError_t made = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (made != cudaSuccess) cudaFreeHost(data_);
  require(made, "an event");
  arrived_ = event;
}
HostCopy::~HostCopy() {
  cudaEventSynchronize(static_cast<cudaEvent_t>(arrived_));  // a copy that nobody waited for
  cudaEventDestroy(static_cast<cudaEvent_t>(arrived_));
  cudaFreeHost(data_);
}
void HostCopy::start(const void* from, size_t bytes) {
  VQKV_CHECK(bytes <= bytes_);
  const auto at = static_cast<cudaStream_t>(stream());
  require(cudaMemcpyAsync(data_, from, bytes, cudaMemcpyDeviceToHost, at), "copying from the device");
  require(cudaEventRecord(static_cast<cudaEvent_t>(arrived_), at), "an event");
}
const void* HostCopy::wait() {
  require(cudaEventSynchronize(static_cast<cudaEvent_t>(arrived_)), "what was launched");
  return data_;
}
void synchronize() { require(cudaStreamSynchronize(static_cast<cudaStream_t>(stream())), "what was launched"); }
void* stream() { return cudaStreamPerThread; }

}  // namespace vqkv::device
