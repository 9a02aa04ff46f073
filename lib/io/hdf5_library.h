// What the parts of the HDF5 room share: the lock, the error stack, identifiers' closers and types. Names hid_t
// int64_t, so that no HDF5 header is needed here; nothing outside hdf5*.cpp includes this.
#pragma once
#include <string>

#include "io/hdf5.h"

namespace vqkv::h5 {

// Held around every call into the library; guards nest.
class Guard {
 public:
  Guard();
  ~Guard();
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
};

// kBadData: "file: object: what: the library's reason".
[[noreturn]] void fail(const std::string& file, const std::string& object, const std::string& what);

int close_file(int64_t id);
int close_dataset(int64_t id);
int close_space(int64_t id);
int close_type(int64_t id);
int close_plist(int64_t id);
int close_attribute(int64_t id);
int close_group(int64_t id);
int close_object(int64_t id);

int64_t library_type(Hdf5Type t);

// Only what lies in this file: soft and external links could name anything.
Hdf5Id open_object(int64_t file, const std::string& path, const std::string& object);
// A link creation list with which groups on the way to an object are made with it.
Hdf5Id with_parents();

}  // namespace vqkv::h5
