#include "io/archive.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <map>

#include "core/error.h"
#include "core/hash.h"
#include "io/atomic_file.h"
#include "io/hdf5.h"

namespace vqkv {
namespace {

void check_name(const std::string& name) {
  const bool plain =
      name.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-/") == std::string::npos;
  bool parts = !name.empty() && name.front() != '/' && name.back() != '/' && name.find("//") == std::string::npos;
  for (size_t at = 0; parts && at <= name.size();) {  // "." and ".." mean something to HDF5
    const size_t end = std::min(name.find('/', at), name.size());
    const std::string part = name.substr(at, end - at);
    parts = part != "." && part != "..";
    at = end + 1;
  }
  if (!plain || !parts || name.size() > 512) fail_internal(fmt::format("'{}' is no name for an archive", name));
}

std::string hash_of(const void* data, size_t bytes) {
  ContentHash h;
  h.update(data, bytes);
  return h.hex();
}

// "a/b/c" -> the fact "c" of group "/a/b".
std::pair<std::string, std::string> split(const std::string& name) {
  const size_t slash = name.rfind('/');
  if (slash == std::string::npos) return {"/", name};
  return {"/" + name.substr(0, slash), name.substr(slash + 1)};
}

}  // namespace

struct ArchiveWriter::Impl {
  std::string path;
  AtomicFile target;
  Hdf5File file;
  Json index = {{"tensors", Json::object()}, {"facts", Json::object()}};
  explicit Impl(const std::string& p) : path(p), target(p) {}
  void take_name(const std::string& name) {
    check_name(name);
    if (index["tensors"].contains(name) || index["facts"].contains(name))
      fail_internal(fmt::format("{}: '{}' is written twice", path, name));
  }
};

ArchiveWriter::ArchiveWriter(const std::string& path, const std::string& format, int64_t version)
    : impl_(std::make_unique<Impl>(path)) {
  impl_->file = Hdf5File::create(impl_->target.partial_path(), path);
  impl_->file.write_text("/", "format", format);
  impl_->file.write_int("/", "format_version", version);
  impl_->file.write_int("/", "complete", 0);
}
ArchiveWriter::~ArchiveWriter() = default;

void ArchiveWriter::tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data) {
  impl_->take_name(name);
  size_t count = 1;
  for (const int64_t n : shape) {
    VQKV_CHECK(n >= 0);
    count = checked_mul(count, static_cast<size_t>(n), name.c_str());
  }
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(data[i]))
      fail_data(fmt::format("{}: parameter '{}' holds {} at element {}", impl_->path, name, data[i], i));
  // HDF5 has no rank-0 array of ours: a scalar is stored as one element, its shape stands in the index.
  Hdf5Dataset out =
      impl_->file.create_dataset("/" + name, Hdf5Type::kF32, shape.empty() ? std::vector<int64_t>{1} : shape);
  out.write_all(data);
  impl_->index["tensors"][name] = {{"shape", shape}, {"xxh3", hash_of(data, count * sizeof(float))}};
}

void ArchiveWriter::facts(const std::string& name, const Json& value) {
  impl_->take_name(name);
  const auto [group, key] = split(name);
  if (group != "/" && !impl_->file.has_object(group)) impl_->file.create_group(group);
  const std::string text = canonical_json(value);
  impl_->file.write_text(group, key, text);
  impl_->index["facts"][name] = hash_of(text.data(), text.size());
}

void ArchiveWriter::finish() {
  const std::string index = canonical_json(impl_->index);
  impl_->file.write_text("/", "index_json", index);
  impl_->file.write_text("/", "content_xxh3", hash_of(index.data(), index.size()));
  impl_->file.write_int("/", "complete", 1);
  impl_->file.close();
  impl_->target.commit();
}

struct ArchiveReader::Impl {
  std::string path, content_hash;
  int64_t version = 0;
  Hdf5File file;
  struct Tensor {
    Hdf5Dataset data;
    std::vector<int64_t> shape;
    std::string hash;
  };
  std::map<std::string, Tensor> tensors;
  std::map<std::string, std::string> facts;  // name -> hash

  Impl(const std::string& p, const std::string& format, int64_t oldest, int64_t newest);
  [[noreturn]] void refuse(const std::string& what) const { fail_data(fmt::format("{}: {}", path, what)); }
  const Tensor& find(const std::string& name) const {
    const auto it = tensors.find(name);
    if (it == tensors.end()) refuse(fmt::format("parameter '{}' is missing", name));
    return it->second;
  }
};

ArchiveReader::Impl::Impl(const std::string& p, const std::string& format, int64_t oldest, int64_t newest)
    : path(p), file(Hdf5File::open(p)) {
  if (!file.has_attribute("/", "format") || file.read_text("/", "format") != format)
    refuse(fmt::format("attribute 'format' must be \"{}\"", format));
  version = file.read_int("/", "format_version");
  if (version < oldest || version > newest)
    refuse(fmt::format("format version {}; this build reads {} to {}", version, oldest, newest));
  if (file.read_int("/", "complete") != 1)
    refuse("incomplete: its writer did not finish (attribute 'complete' is not 1)");
  const std::string text = file.read_text("/", "index_json");
  content_hash = file.read_text("/", "content_xxh3");
  if (hash_of(text.data(), text.size()) != content_hash)
    refuse("index_json does not match content_xxh3: the file is damaged");
  const Json index = parse_json(text, path + ": index_json");
  try {
    for (const auto& [name, hash] : index.at("facts").items()) facts[name] = hash.get<std::string>();
    for (const auto& [name, entry] : index.at("tensors").items()) {
      Tensor t{file.open_dataset("/" + name), entry.at("shape").get<std::vector<int64_t>>(),
               entry.at("xxh3").get<std::string>()};
      if (t.data.type() != Hdf5Type::kF32 || t.data.dims() != (t.shape.empty() ? std::vector<int64_t>{1} : t.shape))
        refuse(fmt::format("parameter '{}': is {} ({}), the index says f32 ({})", name, hdf5_type_name(t.data.type()),
                           fmt::join(t.data.dims(), ", "), fmt::join(t.shape, ", ")));
      tensors.emplace(name, std::move(t));
    }
  } catch (const Json::exception& e) { refuse(fmt::format("index_json: {}", e.what())); }
}

ArchiveReader::ArchiveReader(const std::string& path, const std::string& format, int64_t oldest, int64_t newest) {
  probe_in_child(path, [&] { const Impl probe(path, format, oldest, newest); });
  impl_ = std::make_unique<Impl>(path, format, oldest, newest);
}
ArchiveReader::~ArchiveReader() = default;

const std::string& ArchiveReader::path() const { return impl_->path; }
int64_t ArchiveReader::version() const { return impl_->version; }
const std::string& ArchiveReader::content_hash() const { return impl_->content_hash; }
bool ArchiveReader::has_facts(const std::string& name) const { return impl_->facts.count(name) > 0; }
std::vector<int64_t> ArchiveReader::shape(const std::string& name) const { return impl_->find(name).shape; }

AlignedVector<float> ArchiveReader::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  const Impl::Tensor& t = impl_->find(name);
  bool fits = t.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == -1 || shape[i] == t.shape[i];
  if (!fits)
    impl_->refuse(fmt::format("parameter '{}' has shape ({}), must be ({})", name, fmt::join(t.shape, ", "),
                              fmt::join(shape, ", ")));
  AlignedVector<float> out(static_cast<size_t>(t.data.count()));
  t.data.read_all(out.data());
  if (hash_of(out.data(), out.size() * sizeof(float)) != t.hash)
    impl_->refuse(fmt::format("parameter '{}' does not match its hash: the file is damaged", name));
  for (const float v : out)
    if (!std::isfinite(v)) impl_->refuse(fmt::format("parameter '{}' holds {}", name, v));
  return out;
}

Json ArchiveReader::facts(const std::string& name) const {
  const auto it = impl_->facts.find(name);
  if (it == impl_->facts.end()) impl_->refuse(fmt::format("facts '{}' are missing", name));
  const auto [group, key] = split(name);
  const std::string text = impl_->file.read_text(group, key);
  if (hash_of(text.data(), text.size()) != it->second)
    impl_->refuse(fmt::format("facts '{}' do not match their hash: the file is damaged", name));
  return parse_json(text, fmt::format("{}: {}", impl_->path, name));
}

}  // namespace vqkv
