// Non-owning row-major views and an aligned owning buffer. Row-major everywhere; the last index is the fastest.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <type_traits>
#include <vector>

#include "core/error.h"

namespace vqkv {

// (rows, cols) with a row stride in elements.
template <class T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  MatrixView() = default;
  MatrixView(T* d, int64_t r, int64_t c) : data(d), rows(r), cols(c), stride(c) {}
  MatrixView(T* d, int64_t r, int64_t c, int64_t s) : data(d), rows(r), cols(c), stride(s) {}
  template <class U>
  requires(std::is_const_v<T>&& std::is_same_v<std::remove_const_t<T>, U>) MatrixView(const MatrixView<U>& o)
      : data(o.data), rows(o.rows), cols(o.cols), stride(o.stride) {}

  T* row(int64_t r) const { return data + r * stride; }
  T& operator()(int64_t r, int64_t c) const { return data[r * stride + c]; }
  MatrixView slice_rows(int64_t first, int64_t count) const { return {data + first * stride, count, cols, stride}; }
  MatrixView slice_cols(int64_t first, int64_t count) const { return {data + first, rows, count, stride}; }
  bool contiguous() const { return stride == cols || rows <= 1; }
  int64_t size() const { return rows * cols; }
};

using ConstMatrix = MatrixView<const float>;
using MutMatrix = MatrixView<float>;

// 64-byte aligned allocation, so that every row buffer can be loaded with full-width vectors.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete (p, std::align_val_t{64}); }
  bool operator==(const AlignedAllocator&) const { return true; }
};
template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

// Owning row-major matrix.
template <class T>
struct Matrix {
  AlignedVector<T> storage;
  int64_t rows = 0;
  int64_t cols = 0;

  Matrix() = default;
  Matrix(int64_t r, int64_t c, T fill = T{}) : storage(static_cast<size_t>(r * c), fill), rows(r), cols(c) {}
  // To (r, c), values in any state; memory is kept where that is its shape.
  void reshape(int64_t r, int64_t c) {
    if (rows == r && cols == c) return;
    *this = Matrix();
    *this = Matrix(r, c);
  }
  T* data() { return storage.data(); }
  const T* data() const { return storage.data(); }
  T* row(int64_t r) { return storage.data() + r * cols; }
  const T* row(int64_t r) const { return storage.data() + r * cols; }
  T& operator()(int64_t r, int64_t c) { return storage[static_cast<size_t>(r * cols + c)]; }
  const T& operator()(int64_t r, int64_t c) const { return storage[static_cast<size_t>(r * cols + c)]; }
  MatrixView<T> view() { return {data(), rows, cols}; }
  MatrixView<const T> view() const { return {data(), rows, cols}; }
  operator MatrixView<T>() { return view(); }
  operator MatrixView<const T>() const { return view(); }
};

}  // namespace vqkv
