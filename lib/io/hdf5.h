// HDF5 behind RAII and our own errors. No HDF5 header leaves hdf5*.cpp: identifiers are int64_t, as hid_t is.
// libhdf5 serialises its calls anyway; one global lock of ours makes every function here thread-safe, also where the
// library was built without thread safety. Errors are kBadData and name file and object; the library prints nothing.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vqkv {

// Types as they lie in the file, all little-endian. Reading and writing use the same type in memory: letting the
// library convert 16-bit floats costs 45 to 70 times (measured: 37 MB/s against 10 GB/s), so it never does.
enum class Hdf5Type { kBF16, kF16, kF32, kF64, kI32, kI64 };
size_t hdf5_type_size(Hdf5Type t);
std::string hdf5_type_name(Hdf5Type t);

// An owned identifier.
class Hdf5Id {
 public:
  using Close = int (*)(int64_t);
  Hdf5Id() = default;
  Hdf5Id(int64_t id, Close close) : id_(id), close_(close) {}
  Hdf5Id(Hdf5Id&& o) noexcept : id_(std::exchange(o.id_, -1)), close_(o.close_) {}
  Hdf5Id& operator=(Hdf5Id&& o) noexcept;
  ~Hdf5Id() { reset(); }
  void reset();
  int64_t get() const { return id_; }
  explicit operator bool() const { return id_ >= 0; }

 private:
  int64_t id_ = -1;
  Close close_ = nullptr;
};

class Hdf5Dataset {
 public:
  const std::string& name() const { return name_; }
  Hdf5Type type() const { return type_; }
  const std::vector<int64_t>& dims() const { return dims_; }
  int64_t count() const;  // elements
  int64_t id() const { return id_.get(); }

  // A box of the dataset; `data` holds product(count) elements of type(), row-major.
  void read(const std::vector<int64_t>& start, const std::vector<int64_t>& count, void* data) const;
  void write(const std::vector<int64_t>& start, const std::vector<int64_t>& count, const void* data);
  void read_all(void* data) const { read(std::vector<int64_t>(dims_.size(), 0), dims_, data); }
  void write_all(const void* data) { write(std::vector<int64_t>(dims_.size(), 0), dims_, data); }
  // One whole chunk, straight to the file: no selection, no conversion, no cache.
  void write_chunk(const std::vector<int64_t>& offset, const void* data, size_t bytes);
  void set_extent(const std::vector<int64_t>& dims);

 private:
  friend class Hdf5File;
  Hdf5Id id_;
  std::string file_, name_;
  Hdf5Type type_ = Hdf5Type::kF32;
  std::vector<int64_t> dims_;
};

class Hdf5File {
 public:
  Hdf5File() = default;
  Hdf5File(Hdf5File&&) noexcept = default;
  Hdf5File& operator=(Hdf5File&&) noexcept = default;
  // Truncates `on_disk`. Messages call the file `shown` (the final name, while a .partial is written).
  static Hdf5File create(const std::string& on_disk, const std::string& shown);
  // Read-only. The plug-in search for filters is off: a file can't make us load code.
  static Hdf5File open(const std::string& path);
  // Flushes and closes; throws when that fails (a full disk). The destructor closes silently.
  void close();
  const std::string& path() const { return shown_; }

  bool has_object(const std::string& name) const;
  bool has_attribute(const std::string& object, const std::string& name) const;
  void write_text(const std::string& object, const std::string& name, std::string_view text);
  void write_int(const std::string& object, const std::string& name, int64_t value);
  // UTF-8 text of fixed or variable length, at most 64 MiB; any integer type.
  std::string read_text(const std::string& object, const std::string& name) const;
  int64_t read_int(const std::string& object, const std::string& name) const;

  void create_group(const std::string& path);  // with the groups on the way, as create_dataset does
  std::vector<std::string> children(const std::string& group) const;  // by name, ascending

  // chunk empty: contiguous. Fill values are never written. Maximal dims = dims.
  Hdf5Dataset create_dataset(const std::string& name, Hdf5Type type, const std::vector<int64_t>& dims,
                             const std::vector<int64_t>& chunk = {});
  // Refuses a type other than the six, storage outside the file, filters other than shuffle, deflate and fletcher32,
  // chunks above 64 MiB, chunks that were never written, and more data than the file could hold.
  Hdf5Dataset open_dataset(const std::string& name) const;

  // Named axes, as h5py and xarray show them.
  void make_scale(Hdf5Dataset& dataset, const std::string& axis);
  void attach_scale(Hdf5Dataset& dataset, int axis, const Hdf5Dataset& scale);
  void label_axis(Hdf5Dataset& dataset, int axis, const std::string& label);

 private:
  Hdf5Id id_;
  std::string shown_;
  int64_t file_bytes_ = 0;
};

// libhdf5 1.10 itself crashes or hangs on some hostile containers. Runs `inspect` in a forked child with limits on
// address space and processor seconds; a child that dies is kBadData naming `path`, and so is a message it raised.
void probe_in_child(const std::string& path, const std::function<void()>& inspect);
// Fuzz targets are a process of their own and need the coverage: they switch the probe off.
void set_probe_enabled(bool enabled);

}  // namespace vqkv
