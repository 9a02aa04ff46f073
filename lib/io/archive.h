// Archive: a small HDF5 file of named f32 tensors and JSON facts in groups, written atomically, every read checked
// against a hash. Frozen codecs are kept in one (codec/codec_archive.h says which names). Layout: docs/formats.md.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/view.h"

namespace vqkv {

// Names are paths: parts of [A-Za-z0-9_.-], joined by '/'. A tensor and a fact may not share a name.
class ArchiveWriter {
 public:
  // `format` and `version` are checked by the reader. Writes PATH.partial; without finish() nothing is left.
  ArchiveWriter(const std::string& path, const std::string& format, int64_t version);
  ~ArchiveWriter();
  void tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data);
  void facts(const std::string& name, const Json& value);
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class ArchiveReader {
 public:
  // Refuses (kBadData) another format, a version outside [oldest, newest], what is incomplete or damaged. Opened in a
  // forked probe first.
  ArchiveReader(const std::string& path, const std::string& format, int64_t oldest, int64_t newest);
  ~ArchiveReader();
  const std::string& path() const;
  int64_t version() const;
  const std::string& content_hash() const;  // of its index, and so of all that it holds
  bool has_facts(const std::string& name) const;
  // kBadData when absent; tensor: also when it has another shape (-1 in `shape` matches anything), holds a value that
  // is not finite, or does not match its hash.
  std::vector<int64_t> shape(const std::string& name) const;
  AlignedVector<float> tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  Json facts(const std::string& name) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vqkv
