#include "io/hdf5_library.h"

#include <H5PLpublic.h>
#include <fmt/format.h>
#include <hdf5.h>

#include <mutex>

#include "core/error.h"

namespace vqkv {
namespace h5 {
namespace {

static_assert(sizeof(hid_t) == sizeof(int64_t));

std::mutex global_mutex;
// Guards nest. Not a recursive mutex: its owner is a thread id, and the probe's forked child has another one.
thread_local int guard_depth = 0;

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

}  // namespace

// Error printing is a setting of each thread's error stack.
Guard::Guard() {
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
Guard::~Guard() {
  if (--guard_depth == 0) global_mutex.unlock();
}

void fail(const std::string& file, const std::string& object, const std::string& what) {
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

namespace {
// Two bytes that describe themselves: the sign on top, then the exponent, then `mantissa` bits.
hid_t two_byte_float(size_t mantissa, size_t exponent, size_t bias) {
  const hid_t t = H5Tcopy(H5T_IEEE_F32LE);
  H5Tset_fields(t, 15, mantissa, exponent, 0, mantissa);
  H5Tset_size(t, 2);
  H5Tset_ebias(t, bias);
  return t;
}
hid_t bf16_type() {
  static const hid_t type = two_byte_float(7, 8, 127);
  return type;
}
hid_t f16_type() {
  static const hid_t type = two_byte_float(10, 5, 15);
  return type;
}
}  // namespace

int64_t library_type(Hdf5Type t) {
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

Hdf5Id open_object(int64_t file, const std::string& path, const std::string& object) {
  if (object != "/") {
    H5L_info_t link;
    if (H5Lget_info(file, object.c_str(), &link, H5P_DEFAULT) < 0)
      fail_data(fmt::format("{}: {}: missing", path, object));
    if (link.type != H5L_TYPE_HARD)
      fail_data(fmt::format("{}: {}: a soft or external link; links are not followed", path, object));
  }
  Hdf5Id id(H5Oopen(file, object.c_str(), H5P_DEFAULT), close_object);
  if (!id) fail(path, object, "can't be opened");
  return id;
}

Hdf5Id with_parents() {
  Hdf5Id links(H5Pcreate(H5P_LINK_CREATE), close_plist);
  H5Pset_create_intermediate_group(links.get(), 1);
  return links;
}

}  // namespace h5

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
  const h5::Guard guard;
  close_(id_);
  id_ = -1;
}

}  // namespace vqkv
