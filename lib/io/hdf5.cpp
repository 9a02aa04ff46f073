#include "io/hdf5.h"

#include <H5PLpublic.h>
#include <fmt/format.h>
#include <hdf5.h>
#include <hdf5_hl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "core/error.h"

namespace vqkv {
namespace {

static_assert(sizeof(hid_t) == sizeof(int64_t));

std::mutex global_mutex;
// Guards nest. Not a recursive mutex: its owner is a thread id, and the probe's forked child has another one.
thread_local int guard_depth = 0;

// Held around every call into the library. Error printing is a setting of each thread's error stack.
class Guard {
 public:
  Guard() {
    if (guard_depth == 0) global_mutex.lock();
    ++guard_depth;
    static const bool started = [] {
      H5dont_atexit();  // we close what we open; the library's own clean-up loops and prints after a full disk
      H5open();
      H5PLset_loading_state(0);
      return true;
    }();
    static thread_local const bool quiet = [] { return H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0; }();
    (void)started;
    (void)quiet;
    H5Eclear2(H5E_DEFAULT);
  }
  ~Guard() {
    if (--guard_depth == 0) global_mutex.unlock();
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
};

// The innermost entry of the error stack says what the system refused.
std::string library_reason() {
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* e, void* out) -> herr_t {
        if (n == 0 && e->desc) *static_cast<std::string*>(out) = e->desc;
        return 0;
      },
      &reason);
  // "file write failed: time = ..., errno = 28, error message = 'No space left on device', buf = ..."
  const auto at = reason.find("error message = '");
  if (at != std::string::npos) {
    const auto first = at + 17, last = reason.find('\'', first);
    reason = reason.substr(first, last == std::string::npos ? last : last - first);
  }
  return reason.empty() ? "libhdf5 gives no reason" : reason;
}

[[noreturn]] void fail_h5(const std::string& file, const std::string& object, const std::string& what) {
  const std::string reason = library_reason();
  std::string message = object.empty() ? fmt::format("{}: {}: {}", file, what, reason)
                                       : fmt::format("{}: {}: {}: {}", file, object, what, reason);
  if (reason.find("lock") != std::string::npos)
    message += " (another process may be writing it; on a file system without locks set HDF5_USE_FILE_LOCKING=FALSE)";
  fail_data(message);
}

int close_file(int64_t id) { return H5Fclose(id); }
int close_dataset(int64_t id) { return H5Dclose(id); }
int close_space(int64_t id) { return H5Sclose(id); }
int close_type(int64_t id) { return H5Tclose(id); }
int close_plist(int64_t id) { return H5Pclose(id); }
int close_attribute(int64_t id) { return H5Aclose(id); }
int close_group(int64_t id) { return H5Gclose(id); }
int close_object(int64_t id) { return H5Oclose(id); }

// A bfloat16 that describes itself: sign 1, exponent 8 at bit 7 with bias 127, mantissa 7 at bit 0.
hid_t bf16_type() {
  static const hid_t type = [] {
    const hid_t t = H5Tcopy(H5T_IEEE_F32LE);
    H5Tset_fields(t, 15, 7, 8, 0, 7);
    H5Tset_size(t, 2);
    H5Tset_ebias(t, 127);
    return t;
  }();
  return type;
}
hid_t f16_type() {
  static const hid_t type = [] {
    const hid_t t = H5Tcopy(H5T_IEEE_F32LE);
    H5Tset_fields(t, 15, 10, 5, 0, 10);
    H5Tset_size(t, 2);
    H5Tset_ebias(t, 15);
    return t;
  }();
  return type;
}
constexpr Hdf5Type kAllTypes[] = {Hdf5Type::kBF16, Hdf5Type::kF16, Hdf5Type::kF32,
                                  Hdf5Type::kF64,  Hdf5Type::kI32, Hdf5Type::kI64};
hid_t library_type(Hdf5Type t) {
  switch (t) {
    case Hdf5Type::kBF16:
      return bf16_type();
    case Hdf5Type::kF16:
      return f16_type();
    case Hdf5Type::kF32:
      return H5T_IEEE_F32LE;
    case Hdf5Type::kF64:
      return H5T_IEEE_F64LE;
    case Hdf5Type::kI32:
      return H5T_STD_I32LE;
    case Hdf5Type::kI64:
      return H5T_STD_I64LE;
  }
  fail_internal("unknown HDF5 type");
}

std::vector<hsize_t> to_hsize(const std::vector<int64_t>& v) {
  std::vector<hsize_t> out;
  for (const int64_t x : v) {
    VQKV_CHECK(x >= 0);
    out.push_back(static_cast<hsize_t>(x));
  }
  return out;
}

constexpr size_t kMaxText = size_t{64} << 20;

}  // namespace

size_t hdf5_type_size(Hdf5Type t) {
  switch (t) {
    case Hdf5Type::kBF16:
    case Hdf5Type::kF16:
      return 2;
    case Hdf5Type::kF32:
    case Hdf5Type::kI32:
      return 4;
    case Hdf5Type::kF64:
    case Hdf5Type::kI64:
      return 8;
  }
  fail_internal("unknown HDF5 type");
}
std::string hdf5_type_name(Hdf5Type t) {
  switch (t) {
    case Hdf5Type::kBF16:
      return "bf16";
    case Hdf5Type::kF16:
      return "f16";
    case Hdf5Type::kF32:
      return "f32";
    case Hdf5Type::kF64:
      return "f64";
    case Hdf5Type::kI32:
      return "i32";
    case Hdf5Type::kI64:
      return "i64";
  }
  fail_internal("unknown HDF5 type");
}

Hdf5Id& Hdf5Id::operator=(Hdf5Id&& o) noexcept {
  if (this != &o) {
    reset();
    id_ = std::exchange(o.id_, -1);
    close_ = o.close_;
  }
  return *this;
}
void Hdf5Id::reset() {
  if (id_ < 0) return;
  const Guard guard;
  close_(id_);
  id_ = -1;
}

// ---- Datasets -------------------------------------------------------------------------------------------------------

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
    fail_h5(path, name, "can't select a part");
  return box;
}
}  // namespace

void Hdf5Dataset::read(const std::vector<int64_t>& start, const std::vector<int64_t>& size, void* data) const {
  if (std::find(size.begin(), size.end(), 0) != size.end()) return;
  const Guard guard;
  const Box box = select_box(file_, name_, dims_, start, size);
  if (H5Dread(id_.get(), library_type(type_), box.memory.get(), box.file.get(), H5P_DEFAULT, data) < 0)
    fail_h5(file_, name_, "can't be read");
}

void Hdf5Dataset::write(const std::vector<int64_t>& start, const std::vector<int64_t>& size, const void* data) {
  if (std::find(size.begin(), size.end(), 0) != size.end()) return;
  const Guard guard;
  const Box box = select_box(file_, name_, dims_, start, size);
  if (H5Dwrite(id_.get(), library_type(type_), box.memory.get(), box.file.get(), H5P_DEFAULT, data) < 0)
    fail_h5(file_, name_, "can't be written");
}

void Hdf5Dataset::write_chunk(const std::vector<int64_t>& offset, const void* data, size_t bytes) {
  const Guard guard;
  const auto o = to_hsize(offset);
  if (H5Dwrite_chunk(id_.get(), H5P_DEFAULT, 0, o.data(), bytes, data) < 0) fail_h5(file_, name_, "can't be written");
}

void Hdf5Dataset::set_extent(const std::vector<int64_t>& dims) {
  const Guard guard;
  const auto d = to_hsize(dims);
  if (H5Dset_extent(id_.get(), d.data()) < 0) fail_h5(file_, name_, "can't be resized");
  dims_ = dims;
}

// ---- Files ----------------------------------------------------------------------------------------------------------

Hdf5File Hdf5File::create(const std::string& on_disk, const std::string& shown) {
  const Guard guard;
  const Hdf5Id access(H5Pcreate(H5P_FILE_ACCESS), close_plist);
  // 1.10 file format: constant-time chunk index. Chunks start at page boundaries.
  H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110);
  H5Pset_alignment(access.get(), 64 << 10, 4096);
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  Hdf5File f;
  f.shown_ = shown;
  f.id_ = Hdf5Id(H5Fcreate(on_disk.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), close_file);
  if (!f.id_) fail_h5(shown, "", "can't be created");
  return f;
}

Hdf5File Hdf5File::open(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) fail_data(fmt::format("{}: {}", path, std::strerror(errno)));
  if (!S_ISREG(status.st_mode)) fail_data(fmt::format("{}: not a regular file", path));
  const Guard guard;
  const Hdf5Id access(H5Pcreate(H5P_FILE_ACCESS), close_plist);
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  Hdf5File f;
  f.shown_ = path;
  f.file_bytes_ = static_cast<int64_t>(status.st_size);
  f.id_ = Hdf5Id(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), close_file);
  if (!f.id_) fail_h5(path, "", "can't be opened as HDF5");
  return f;
}

void Hdf5File::close() {
  if (!id_) return;
  const Guard guard;
  const bool flushed = H5Fflush(id_.get(), H5F_SCOPE_LOCAL) >= 0;
  if (!flushed) fail_h5(shown_, "", "can't be written");
  Hdf5Id id = std::move(id_);
  const int64_t raw = id.get();
  id = Hdf5Id();
  if (H5Iis_valid(raw) > 0) fail_h5(shown_, "", "can't be closed");
}

bool Hdf5File::has_object(const std::string& name) const {
  const Guard guard;
  return H5Lexists(id_.get(), name.c_str(), H5P_DEFAULT) > 0;
}

namespace {
Hdf5Id open_object(int64_t file, const std::string& path, const std::string& object) {
  // Only what lies in this file: soft and external links could name anything.
  if (object != "/") {
    H5L_info_t link;
    if (H5Lget_info(file, object.c_str(), &link, H5P_DEFAULT) < 0)
      fail_data(fmt::format("{}: {}: missing", path, object));
    if (link.type != H5L_TYPE_HARD)
      fail_data(fmt::format("{}: {}: a soft or external link; links are not followed", path, object));
  }
  Hdf5Id id(H5Oopen(file, object.c_str(), H5P_DEFAULT), close_object);
  if (!id) fail_h5(path, object, "can't be opened");
  return id;
}
}  // namespace

bool Hdf5File::has_attribute(const std::string& object, const std::string& name) const {
  const Guard guard;
  return H5Aexists_by_name(id_.get(), object.c_str(), name.c_str(), H5P_DEFAULT) > 0;
}

void Hdf5File::write_text(const std::string& object, const std::string& name, std::string_view text) {
  VQKV_CHECK(text.find('\0') == std::string_view::npos);
  const Guard guard;
  const Hdf5Id holder = open_object(id_.get(), shown_, object);
  // Variable length: h5py then shows str, and the text isn't bound by the 64 KiB of an object header.
  const Hdf5Id type(H5Tcopy(H5T_C_S1), close_type);
  H5Tset_size(type.get(), H5T_VARIABLE);
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  const Hdf5Id space(H5Screate(H5S_SCALAR), close_space);
  const std::string copy(text);
  const char* pointer = copy.c_str();
  if (H5Aexists(holder.get(), name.c_str()) > 0) H5Adelete(holder.get(), name.c_str());
  const Hdf5Id attribute(H5Acreate2(holder.get(), name.c_str(), type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT),
                         close_attribute);
  if (!attribute || H5Awrite(attribute.get(), type.get(), &pointer) < 0)
    fail_h5(shown_, object + "@" + name, "can't be written");
}

void Hdf5File::write_int(const std::string& object, const std::string& name, int64_t value) {
  const Guard guard;
  const Hdf5Id holder = open_object(id_.get(), shown_, object);
  const Hdf5Id space(H5Screate(H5S_SCALAR), close_space);
  if (H5Aexists(holder.get(), name.c_str()) > 0) H5Adelete(holder.get(), name.c_str());
  const Hdf5Id attribute(H5Acreate2(holder.get(), name.c_str(), H5T_STD_I64LE, space.get(), H5P_DEFAULT, H5P_DEFAULT),
                         close_attribute);
  if (!attribute || H5Awrite(attribute.get(), H5T_NATIVE_INT64, &value) < 0)
    fail_h5(shown_, object + "@" + name, "can't be written");
}

namespace {
struct Attribute {
  Hdf5Id holder, id, type, space;
};
Attribute open_attribute(int64_t file, const std::string& path, const std::string& object, const std::string& name,
                         H5T_class_t want, const char* want_name) {
  Attribute a;
  a.holder = open_object(file, path, object);
  if (H5Aexists(a.holder.get(), name.c_str()) <= 0)
    fail_data(fmt::format("{}: {}: attribute '{}' is missing", path, object, name));
  a.id = Hdf5Id(H5Aopen(a.holder.get(), name.c_str(), H5P_DEFAULT), close_attribute);
  if (!a.id) fail_h5(path, object + "@" + name, "can't be opened");
  a.type = Hdf5Id(H5Aget_type(a.id.get()), close_type);
  a.space = Hdf5Id(H5Aget_space(a.id.get()), close_space);
  if (!a.type || !a.space) fail_h5(path, object + "@" + name, "can't be read");
  if (H5Tget_class(a.type.get()) != want || H5Sget_simple_extent_npoints(a.space.get()) != 1)
    fail_data(fmt::format("{}: {}: attribute '{}' must be one {}", path, object, name, want_name));
  return a;
}
}  // namespace

std::string Hdf5File::read_text(const std::string& object, const std::string& name) const {
  const Guard guard;
  const Attribute a = open_attribute(id_.get(), shown_, object, name, H5T_STRING, "text");
  std::string text;
  if (H5Tis_variable_str(a.type.get()) > 0) {
    char* pointer = nullptr;
    if (H5Aread(a.id.get(), a.type.get(), &pointer) < 0) fail_h5(shown_, object + "@" + name, "can't be read");
    if (pointer) text = pointer;
    H5free_memory(pointer);
  } else {
    const size_t size = H5Tget_size(a.type.get());
    if (size == 0 || size > kMaxText)
      fail_data(fmt::format("{}: {}: attribute '{}' has {} bytes; at most {}", shown_, object, name, size, kMaxText));
    text.resize(size);
    if (H5Aread(a.id.get(), a.type.get(), text.data()) < 0) fail_h5(shown_, object + "@" + name, "can't be read");
    text.resize(std::min(text.find('\0'), text.size()));
  }
  if (text.size() > kMaxText)
    fail_data(
        fmt::format("{}: {}: attribute '{}' has {} bytes; at most {}", shown_, object, name, text.size(), kMaxText));
  return text;
}

int64_t Hdf5File::read_int(const std::string& object, const std::string& name) const {
  const Guard guard;
  const Attribute a = open_attribute(id_.get(), shown_, object, name, H5T_INTEGER, "integer");
  int64_t value = 0;
  if (H5Aread(a.id.get(), H5T_NATIVE_INT64, &value) < 0) fail_h5(shown_, object + "@" + name, "can't be read");
  return value;
}

namespace {
// Groups on the way to an object are made with it.
Hdf5Id with_parents() {
  Hdf5Id links(H5Pcreate(H5P_LINK_CREATE), close_plist);
  H5Pset_create_intermediate_group(links.get(), 1);
  return links;
}
}  // namespace

void Hdf5File::create_group(const std::string& path) {
  const Guard guard;
  const Hdf5Id links = with_parents();
  const Hdf5Id group(H5Gcreate2(id_.get(), path.c_str(), links.get(), H5P_DEFAULT, H5P_DEFAULT), close_group);
  if (!group) fail_h5(shown_, path, "can't be created");
}

std::vector<std::string> Hdf5File::children(const std::string& group) const {
  const Guard guard;
  const Hdf5Id holder = open_object(id_.get(), shown_, group);
  if (H5Iget_type(holder.get()) != H5I_GROUP) fail_data(fmt::format("{}: {}: not a group", shown_, group));
  std::vector<std::string> names;
  const auto collect = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
    auto& list = *static_cast<std::vector<std::string>*>(out);
    list.emplace_back(name);
    return list.size() > 1000000 ? -1 : 0;
  };
  if (H5Literate(holder.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, collect, &names) < 0)
    fail_h5(shown_, group, "can't be listed");
  return names;
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
  if (!out.id_) fail_h5(shown_, name, "can't be created");
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
  if (!out.id_) fail_h5(shown_, name, "can't be opened");
  const Hdf5Id type(H5Dget_type(out.id_.get()), close_type), space(H5Dget_space(out.id_.get()), close_space);
  const Hdf5Id plist(H5Dget_create_plist(out.id_.get()), close_plist);
  if (!type || !space || !plist) fail_h5(shown_, name, "can't be described");
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
  if (rank < 1) fail_h5(shown_, name, "has no shape");
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
      if (H5Pget_chunk(plist.get(), rank, chunk) != rank) fail_h5(shown_, name, "has no chunk shape");
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
        fail_h5(shown_, name, "chunk index can't be read");
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

void Hdf5File::make_scale(Hdf5Dataset& dataset, const std::string& axis) {
  const Guard guard;
  if (H5DSset_scale(dataset.id(), axis.c_str()) < 0) fail_h5(shown_, dataset.name(), "can't become a dimension scale");
}
void Hdf5File::attach_scale(Hdf5Dataset& dataset, int axis, const Hdf5Dataset& scale) {
  const Guard guard;
  if (H5DSattach_scale(dataset.id(), scale.id(), static_cast<unsigned>(axis)) < 0)
    fail_h5(shown_, dataset.name(), "can't take a dimension scale");
}
void Hdf5File::label_axis(Hdf5Dataset& dataset, int axis, const std::string& label) {
  const Guard guard;
  if (H5DSset_label(dataset.id(), static_cast<unsigned>(axis), label.c_str()) < 0)
    fail_h5(shown_, dataset.name(), "can't take an axis label");
}

// The probe forks under the lock, so that the child inherits a library at rest.
void with_library_lock(const std::function<void()>& body) {
  const Guard guard;
  body();
}

}  // namespace vqkv
