#include "io/trace_streams.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace vqkv {

// A value is NaN or infinite when, and only when, its exponent is all ones. A maximum of integers is what compilers
// vectorise best.
bool any_not_finite(const uint8_t* bytes, int64_t n, Hdf5Type type) {
  if (type == Hdf5Type::kF32) {
    const auto* v = reinterpret_cast<const int32_t*>(bytes);
    int32_t top = 0;
    for (int64_t i = 0; i < n; ++i) top = std::max(top, v[i] & 0x7f800000);
    return top == 0x7f800000;
  }
  const auto* v = reinterpret_cast<const int16_t*>(bytes);
  const int16_t mask = type == Hdf5Type::kBF16 ? 0x7f80 : 0x7c00;
  int16_t top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, static_cast<int16_t>(v[i] & mask));
  return top == mask;
}

void narrow(const float* in, uint8_t* out, int64_t n, Hdf5Type type) {
  switch (type) {
    case Hdf5Type::kBF16:
      to_bf16(in, reinterpret_cast<bf16*>(out), n);
      return;
    case Hdf5Type::kF16:
      to_f16(in, reinterpret_cast<f16*>(out), n);
      return;
    default:
      std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
  }
}

RowStreams::RowStreams(Hdf5Dataset dataset, const TraceDataset& layout)
    : dataset_(std::move(dataset)),
      heads_(layout.dims[1]),
      chunk_rows_(layout.chunk[2]),
      rank_(layout.dims.size()),
      streams_(static_cast<size_t>(layout.dims[0] * layout.dims[1])) {
  row_bytes_ = static_cast<int64_t>(hdf5_type_size(layout.type)) * (rank_ == 4 ? layout.dims[3] : 1);
}

void RowStreams::append(int64_t layer, int64_t head, const uint8_t* bytes, int64_t rows) {
  Stream& s = at(layer, head);
  while (rows > 0) {
    const int64_t filled = s.rows % chunk_rows_;
    const int64_t take = std::min(rows, chunk_rows_ - filled);
    if (filled == 0 && take == chunk_rows_) {
      write(layer, head, s.rows, bytes);
    } else {
      s.tail.resize(chunk_bytes());
      std::memcpy(s.tail.data() + filled * row_bytes_, bytes, static_cast<size_t>(take * row_bytes_));
      if (filled + take == chunk_rows_) write(layer, head, s.rows - filled, s.tail.data());
    }
    s.rows += take;
    bytes += take * row_bytes_;
    rows -= take;
  }
}

void RowStreams::finish(int64_t rows) {
  auto dims = dataset_.dims();
  if (dims[2] != rows) {
    dims[2] = rows;
    dataset_.set_extent(dims);
  }
  for (size_t i = 0; i < streams_.size(); ++i) {
    Stream& s = streams_[i];
    VQKV_CHECK(s.rows == rows);
    const int64_t filled = s.rows % chunk_rows_;
    if (filled == 0) continue;
    std::fill(s.tail.begin() + filled * row_bytes_, s.tail.end(), uint8_t{0});
    write(static_cast<int64_t>(i) / heads_, static_cast<int64_t>(i) % heads_, s.rows - filled, s.tail.data());
  }
}

std::vector<std::string> RowStreams::hashes() const {
  std::vector<std::string> out;
  for (const Stream& s : streams_) out.push_back(s.hash.hex());
  return out;
}

void RowStreams::write(int64_t layer, int64_t head, int64_t row, const uint8_t* bytes) {
  std::vector<int64_t> offset{layer, head, row};
  if (rank_ == 4) offset.push_back(0);
  dataset_.write_chunk(offset, bytes, chunk_bytes());
}

}  // namespace vqkv
