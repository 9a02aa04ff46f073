// What a dataset is: its numbers' type, its shape and storage, reading and writing boxes of it.
#include <fmt/format.h>
#include <hdf5.h>

#include <algorithm>
#include <map>

#include "core/error.h"
#include "io/hdf5_library.h"

namespace vqkv {

using namespace h5;

namespace {

constexpr Hdf5Type kAllTypes[] = {Hdf5Type::kBF16, Hdf5Type::kF16, Hdf5Type::kF32,
                                  Hdf5Type::kF64,  Hdf5Type::kI32, Hdf5Type::kI64};

std::vector<hsize_t> to_hsize(const std::vector<int64_t>& v) {
  std::vector<hsize_t> out;
  for (const int64_t x : v) {
    VQKV_CHECK(x >= 0);
    out.push_back(static_cast<hsize_t>(x));
  }
  return out;
}
}  // namespace

int64_t Hdf5Dataset::count() const {
  size_t n = 1;
  for (const int64_t d : dims_) n = checked_mul(n, static_cast<size_t>(d), name_.c_str());
  return static_cast<int64_t>(n);
}

namespace {
// Selected file space and the matching memory space of a box.
struct Box {
  Hdf5Id file, memory;
};
Box select_box(const std::string& path, const std::string& name, const std::vector<int64_t>& dims,
               const std::vector<int64_t>& start, const std::vector<int64_t>& count) {
  VQKV_CHECK(start.size() == dims.size() && count.size() == dims.size());
  for (size_t i = 0; i < dims.size(); ++i)
    VQKV_CHECK(start[i] >= 0 && count[i] >= 0 && start[i] <= dims[i] && count[i] <= dims[i] - start[i]);
  const auto d = to_hsize(dims), s = to_hsize(start), c = to_hsize(count);
  const int rank = static_cast<int>(dims.size());
  Box box{{H5Screate_simple(rank, d.data(), nullptr), close_space},
          {H5Screate_simple(rank, c.data(), nullptr), close_space}};
  if (!box.file || !box.memory ||
      H5Sselect_hyperslab(box.file.get(), H5S_SELECT_SET, s.data(), nullptr, c.data(), nullptr) < 0)
    fail(path, name, "can't select a part");
  return box;
}
}  // namespace

void Hdf5Dataset::read(const std::vector<int64_t>& start, const std::vector<int64_t>& size, void* data) const {
  if (std::find(size.begin(), size.end(), 0) != size.end()) return;
  const Guard guard;
  const Box box = select_box(file_, name_, dims_, start, size);
  if (H5Dread(id_.get(), library_type(type_), box.memory.get(), box.file.get(), H5P_DEFAULT, data) < 0)
    fail(file_, name_, "can't be read");
}

void Hdf5Dataset::write(const std::vector<int64_t>& start, const std::vector<int64_t>& size, const void* data) {
  if (std::find(size.begin(), size.end(), 0) != size.end()) return;
  const Guard guard;
  const Box box = select_box(file_, name_, dims_, start, size);
  if (H5Dwrite(id_.get(), library_type(type_), box.memory.get(), box.file.get(), H5P_DEFAULT, data) < 0)
    fail(file_, name_, "can't be written");
}

void Hdf5Dataset::write_chunk(const std::vector<int64_t>& offset, const void* data, size_t bytes) {
  const Guard guard;
  const auto o = to_hsize(offset);
  if (H5Dwrite_chunk(id_.get(), H5P_DEFAULT, 0, o.data(), bytes, data) < 0) fail(file_, name_, "can't be written");
}

void Hdf5Dataset::set_extent(const std::vector<int64_t>& dims) {
  const Guard guard;
  const auto d = to_hsize(dims);
  if (H5Dset_extent(id_.get(), d.data()) < 0) fail(file_, name_, "can't be resized");
  dims_ = dims;
}

Hdf5Dataset Hdf5File::create_dataset(const std::string& name, Hdf5Type type, const std::vector<int64_t>& dims,
                                     const std::vector<int64_t>& chunk) {
  const Guard guard;
  const auto d = to_hsize(dims);
  const Hdf5Id space(H5Screate_simple(static_cast<int>(d.size()), d.data(), nullptr), close_space);
  const Hdf5Id plist(H5Pcreate(H5P_DATASET_CREATE), close_plist);
  H5Pset_fill_time(plist.get(), H5D_FILL_TIME_NEVER);
  if (!chunk.empty()) {
    const auto c = to_hsize(chunk);
    H5Pset_chunk(plist.get(), static_cast<int>(c.size()), c.data());
  }
  const Hdf5Id links = with_parents();
  Hdf5Dataset out;
  out.file_ = shown_;
  out.name_ = name;
  out.type_ = type;
  out.dims_ = dims;
  out.id_ = Hdf5Id(
      H5Dcreate2(id_.get(), name.c_str(), library_type(type), space.get(), links.get(), plist.get(), H5P_DEFAULT),
      close_dataset);
  if (!out.id_) fail(shown_, name, "can't be created");
  return out;
}

namespace {
// What a number type is that is none of ours. 2 untyped bytes are what h5py makes of a NumPy bfloat16 array, silently.
std::string foreign_type(int64_t type) {
  const size_t size = H5Tget_size(type);
  switch (H5Tget_class(type)) {
    case H5T_OPAQUE:
      return size == 2 ? std::string(
                             "2 untyped (opaque) bytes a value, as h5py stores ml_dtypes' bfloat16: write its bits as "
                             "the bf16 type of docs/formats.md (TraceWriter in scripts/dump_hf.py does), or float32")
                       : fmt::format("{} untyped (opaque) bytes a value", size);
    case H5T_FLOAT:
      return fmt::format("another float of {} bits", 8 * size);
    case H5T_INTEGER:
      return fmt::format("another integer of {} bits", 8 * size);
    default:
      return "no number type";
  }
}

// Filters that h5py, PyTables and hdf5plugin offer, by their registered numbers.
std::string filter_text(int id) {
  const std::map<int, const char*> names = {
      {4, "szip"},      {5, "nbit"},    {6, "scale-offset"},   {305, "lzo"},   {307, "bzip2"},  {32000, "lzf"},
      {32001, "blosc"}, {32004, "lz4"}, {32008, "bitshuffle"}, {32013, "zfp"}, {32015, "zstd"}, {32026, "blosc2"}};
  const auto it = names.find(id);
  return it == names.end() ? std::to_string(id) : fmt::format("{} ({})", it->second, id);
}
}  // namespace

Hdf5Dataset Hdf5File::open_dataset(const std::string& name) const {
  const Guard guard;
  {
    const Hdf5Id object = open_object(id_.get(), shown_, name);
    if (H5Iget_type(object.get()) != H5I_DATASET) fail_data(fmt::format("{}: {}: not a dataset", shown_, name));
  }
  // Whole rows are read straight into the caller's buffer: a chunk cache would only copy.
  const Hdf5Id access(H5Pcreate(H5P_DATASET_ACCESS), close_plist);
  H5Pset_chunk_cache(access.get(), H5D_CHUNK_CACHE_NSLOTS_DEFAULT, 0, H5D_CHUNK_CACHE_W0_DEFAULT);
  Hdf5Dataset out;
  out.file_ = shown_;
  out.name_ = name;
  out.id_ = Hdf5Id(H5Dopen2(id_.get(), name.c_str(), access.get()), close_dataset);
  if (!out.id_) fail(shown_, name, "can't be opened");
  const Hdf5Id type(H5Dget_type(out.id_.get()), close_type), space(H5Dget_space(out.id_.get()), close_space);
  const Hdf5Id plist(H5Dget_create_plist(out.id_.get()), close_plist);
  if (!type || !space || !plist) fail(shown_, name, "can't be described");
  const auto known = std::find_if(std::begin(kAllTypes), std::end(kAllTypes),
                                  [&](Hdf5Type t) { return H5Tequal(type.get(), library_type(t)) > 0; });
  if (known == std::end(kAllTypes))
    fail_data(fmt::format("{}: {}: {}; allowed: bf16, f16, f32, f64, i32, i64 (little-endian)", shown_, name,
                          foreign_type(type.get())));
  out.type_ = *known;

  hsize_t dims[H5S_MAX_RANK];
  if (H5Sget_simple_extent_type(space.get()) != H5S_SIMPLE)
    fail_data(fmt::format("{}: {}: not an array", shown_, name));
  const int rank = H5Sget_simple_extent_dims(space.get(), dims, nullptr);
  if (rank < 1) fail(shown_, name, "has no shape");
  for (int i = 0; i < rank; ++i) {
    if (dims[i] > hsize_t{1} << 40) fail_data(fmt::format("{}: {}: dimension {} is {}", shown_, name, i, dims[i]));
    out.dims_.push_back(static_cast<int64_t>(dims[i]));
  }
  const size_t bytes = checked_mul(static_cast<size_t>(out.count()), hdf5_type_size(out.type_), name.c_str());

  bool deflated = false;
  const int filters = H5Pget_nfilters(plist.get());
  for (int i = 0; i < filters; ++i) {
    unsigned flags = 0, config = 0;
    size_t values = 0;
    char filter_name[64] = "";
    const H5Z_filter_t id = H5Pget_filter2(plist.get(), static_cast<unsigned>(i), &flags, &values, nullptr,
                                           sizeof filter_name, filter_name, &config);
    if (id != H5Z_FILTER_DEFLATE && id != H5Z_FILTER_SHUFFLE && id != H5Z_FILTER_FLETCHER32)
      fail_data(fmt::format("{}: {}: filter {} is not supported; allowed: none, shuffle, deflate, fletcher32", shown_,
                            name, filter_text(id)));
    deflated |= id == H5Z_FILTER_DEFLATE;
  }
  // deflate can't shrink below 1:1032, so no honest file claims more.
  if (bytes / (deflated ? 1032 : 1) > static_cast<size_t>(file_bytes_))
    fail_data(fmt::format("{}: {}: claims {} bytes in a file of {}", shown_, name, bytes, file_bytes_));
  if (H5Pget_external_count(plist.get()) > 0)
    fail_data(fmt::format("{}: {}: data outside the file is not followed", shown_, name));
  switch (H5Pget_layout(plist.get())) {
    case H5D_CHUNKED: {
      hsize_t chunk[H5S_MAX_RANK];
      if (H5Pget_chunk(plist.get(), rank, chunk) != rank) fail(shown_, name, "has no chunk shape");
      size_t chunk_bytes = hdf5_type_size(out.type_), expected = 1;
      for (int i = 0; i < rank; ++i) {
        if (chunk[i] == 0) fail_data(fmt::format("{}: {}: chunk dimension {} is 0", shown_, name, i));
        chunk_bytes = checked_mul(chunk_bytes, static_cast<size_t>(chunk[i]), name.c_str());
        expected *= static_cast<size_t>((dims[i] + chunk[i] - 1) / chunk[i]);
      }
      if (chunk_bytes > size_t{64} << 20)
        fail_data(fmt::format("{}: {}: chunks of {} bytes; at most 64 MiB", shown_, name, chunk_bytes));
      hsize_t written = 0;
      if (bytes > 0 && H5Dget_num_chunks(out.id_.get(), space.get(), &written) < 0)
        fail(shown_, name, "chunk index can't be read");
      // An absent chunk reads as zeros, which looks like very compressible keys.
      if (bytes > 0 && written != expected)
        fail_data(fmt::format("{}: {}: {} of {} chunks were written", shown_, name, static_cast<uint64_t>(written),
                              expected));
      break;
    }
    case H5D_CONTIGUOUS:
    case H5D_COMPACT: {
      H5D_space_status_t status;
      if (bytes > 0 && (H5Dget_space_status(out.id_.get(), &status) < 0 || status != H5D_SPACE_STATUS_ALLOCATED))
        fail_data(fmt::format("{}: {}: was never written", shown_, name));
      break;
    }
    default:
      fail_data(fmt::format("{}: {}: virtual storage is not followed", shown_, name));
  }
  return out;
}

}  // namespace vqkv
