// What a file holds beside numbers: objects, attributes, groups, named axes.
#include "io/hdf5.h"

#include <fmt/format.h>
#include <hdf5.h>
#include <hdf5_hl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "io/hdf5_library.h"

namespace vqkv {

using namespace h5;

namespace {
constexpr size_t kMaxText = size_t{64} << 20;
}  // namespace

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
  if (!f.id_) fail(shown, "", "can't be created");
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
  if (!f.id_) fail(path, "", "can't be opened as HDF5");
  return f;
}

void Hdf5File::close() {
  if (!id_) return;
  const Guard guard;
  const bool flushed = H5Fflush(id_.get(), H5F_SCOPE_LOCAL) >= 0;
  if (!flushed) fail(shown_, "", "can't be written");
  Hdf5Id id = std::move(id_);
  const int64_t raw = id.get();
  id = Hdf5Id();
  if (H5Iis_valid(raw) > 0) fail(shown_, "", "can't be closed");
}

bool Hdf5File::has_object(const std::string& name) const {
  const Guard guard;
  return H5Lexists(id_.get(), name.c_str(), H5P_DEFAULT) > 0;
}

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
    fail(shown_, object + "@" + name, "can't be written");
}

void Hdf5File::write_int(const std::string& object, const std::string& name, int64_t value) {
  const Guard guard;
  const Hdf5Id holder = open_object(id_.get(), shown_, object);
  const Hdf5Id space(H5Screate(H5S_SCALAR), close_space);
  if (H5Aexists(holder.get(), name.c_str()) > 0) H5Adelete(holder.get(), name.c_str());
  const Hdf5Id attribute(H5Acreate2(holder.get(), name.c_str(), H5T_STD_I64LE, space.get(), H5P_DEFAULT, H5P_DEFAULT),
                         close_attribute);
  if (!attribute || H5Awrite(attribute.get(), H5T_NATIVE_INT64, &value) < 0)
    fail(shown_, object + "@" + name, "can't be written");
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
  if (!a.id) fail(path, object + "@" + name, "can't be opened");
  a.type = Hdf5Id(H5Aget_type(a.id.get()), close_type);
  a.space = Hdf5Id(H5Aget_space(a.id.get()), close_space);
  if (!a.type || !a.space) fail(path, object + "@" + name, "can't be read");
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
    if (H5Aread(a.id.get(), a.type.get(), &pointer) < 0) fail(shown_, object + "@" + name, "can't be read");
    if (pointer) text = pointer;
    H5free_memory(pointer);
  } else {
    const size_t size = H5Tget_size(a.type.get());
    if (size == 0 || size > kMaxText)
      fail_data(fmt::format("{}: {}: attribute '{}' has {} bytes; at most {}", shown_, object, name, size, kMaxText));
    text.resize(size);
    if (H5Aread(a.id.get(), a.type.get(), text.data()) < 0) fail(shown_, object + "@" + name, "can't be read");
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
  if (H5Aread(a.id.get(), H5T_NATIVE_INT64, &value) < 0) fail(shown_, object + "@" + name, "can't be read");
  return value;
}

void Hdf5File::create_group(const std::string& path) {
  const Guard guard;
  const Hdf5Id links = with_parents();
  const Hdf5Id group(H5Gcreate2(id_.get(), path.c_str(), links.get(), H5P_DEFAULT, H5P_DEFAULT), close_group);
  if (!group) fail(shown_, path, "can't be created");
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
    fail(shown_, group, "can't be listed");
  return names;
}

void Hdf5File::make_scale(Hdf5Dataset& dataset, const std::string& axis) {
  const Guard guard;
  if (H5DSset_scale(dataset.id(), axis.c_str()) < 0) fail(shown_, dataset.name(), "can't become a dimension scale");
}
void Hdf5File::attach_scale(Hdf5Dataset& dataset, int axis, const Hdf5Dataset& scale) {
  const Guard guard;
  if (H5DSattach_scale(dataset.id(), scale.id(), static_cast<unsigned>(axis)) < 0)
    fail(shown_, dataset.name(), "can't take a dimension scale");
}
void Hdf5File::label_axis(Hdf5Dataset& dataset, int axis, const std::string& label) {
  const Guard guard;
  if (H5DSset_label(dataset.id(), static_cast<unsigned>(axis), label.c_str()) < 0)
    fail(shown_, dataset.name(), "can't take an axis label");
}

}  // namespace vqkv
