// Memory of a device and the order of what it does. One form for a CUDA device (runtime_cuda.cu), one for the emulated
// one (runtime_emulated.cpp); a program links one of them.
#pragma once
#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace vqkv::device {

// kUnavailable with the reason, and what would work, where there is no device; its name otherwise.
std::string require_device();

// Bytes of a device, which hold nothing yet. kUsage where there are not as many; `name` is what messages call them.
void* allocate(size_t bytes, const std::string& name);
void release(void* p) noexcept;
// In the order of launches. Copies to the host wait for what was launched before, and throw kInternal for what failed.
void copy_in(void* to, const void* from, size_t bytes);
void copy_out(void* to, const void* from, size_t bytes);
void fill_zero(void* p, size_t bytes);
void copy_within(void* to, const void* from, size_t bytes);
void synchronize();
// Between events before and behind what `work` launches; of an emulated device the host's, which says nothing.
double seconds_of(const std::function<void()>& work);

// The stream of this thread's launches: a cudaStream_t.
void* stream();
// Of a call of the CUDA runtime (its cudaError_t): kUnavailable where there is no device or driver, kUsage where memory
// is out, else kInternal.
void require(int error, const char* what);

// A copy to the host that goes on while the host does other things: into pinned memory of its own, one at a time.
class HostCopy {
 public:
  HostCopy(size_t bytes, const std::string& name);
  ~HostCopy();
  HostCopy(const HostCopy&) = delete;
  HostCopy& operator=(const HostCopy&) = delete;
  size_t bytes() const { return bytes_; }
  // In the order of launches; as many bytes as there is room for at most.
  void start(const void* from, size_t bytes);
  // What was copied, once it is there; until the next start. kInternal for what failed before it.
  const void* wait();

 private:
  size_t bytes_;
  void* data_ = nullptr;
  void* arrived_ = nullptr;  // a cudaEvent_t
};

// An array on the device. Starts unwritten; moves, and is released with its owner.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(size_t count, const std::string& name)
      : data_(static_cast<T*>(allocate(count * sizeof(T), name))), count_(count) {}
  Buffer(std::span<const T> values, const std::string& name) : Buffer(values.size(), name) { fill(values); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() {
    if (data_) release(data_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  // values: as many as it holds.
  void fill(std::span<const T> values) { copy_in(data_, values.data(), values.size() * sizeof(T)); }
  void zero() { fill_zero(data_, count_ * sizeof(T)); }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    copy_out(out.data(), data_, count_ * sizeof(T));
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace vqkv::device
