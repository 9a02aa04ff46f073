#include "io/recon.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "core/dtype.h"
#include "core/error.h"
#include "io/hdf5.h"

namespace vqkv {

struct ReconReader::Impl {
  std::string path;
  Hdf5File file;
  Hdf5Dataset data[2];
  bool pre_rope = false;

  void rows(int which, int layer, int head, int64_t first, int64_t count, MutMatrix out) const {
    const Hdf5Dataset& d = data[which];
    const int64_t width = d.dims()[3];
    VQKV_CHECK(out.rows == count && out.cols == width && out.contiguous());
    std::vector<std::byte> raw(static_cast<size_t>(count * width) * hdf5_type_size(d.type()));
    d.read({layer, head, first, 0}, {1, 1, count, width}, raw.data());
    const int64_t n = count * width;
    switch (d.type()) {
      case Hdf5Type::kF16:
        to_float(reinterpret_cast<const f16*>(raw.data()), out.data, n);
        break;
      case Hdf5Type::kBF16:
        to_float(reinterpret_cast<const bf16*>(raw.data()), out.data, n);
        break;
      case Hdf5Type::kF32:
        std::memcpy(out.data, raw.data(), raw.size());
        break;
      default:
        for (int64_t i = 0; i < n; ++i) {
          double v;
          std::memcpy(&v, raw.data() + i * static_cast<int64_t>(sizeof v), sizeof v);
          out.data[i] = static_cast<float>(v);
        }
    }
    for (int64_t i = 0; i < n; ++i)
      if (!std::isfinite(out.data[i]))
        fail_data(fmt::format("{}: /{}: layer {}, head {}, token {}, channel {} is {}; values must be finite", path,
                              which ? "value" : "key", layer, head, first + i / width, i % width, out.data[i]));
  }
};

namespace {

void open_checked(const std::string& path, const TraceReader& trace, Hdf5File& file, Hdf5Dataset (&data)[2],
                  bool& pre_rope) {
  file = Hdf5File::open(path);
  if (!file.has_attribute("/", "keys"))
    fail_data(fmt::format("{}: the root attribute `keys` is missing: \"pre_rope\" or \"post_rope\"", path));
  const std::string keys = file.read_text("/", "keys");
  if (keys != "pre_rope" && keys != "post_rope")
    fail_data(fmt::format("{}: attribute keys is \"{}\"; \"pre_rope\" or \"post_rope\" is expected", path, keys));
  pre_rope = keys == "pre_rope";
  if (file.has_attribute("/", "trace")) {
    const std::string hash = file.read_text("/", "trace");
    if (hash != trace.info().content_hash)
      fail_data(fmt::format("{}: made from the trace {}, but {} has the content hash {}", path, hash, trace.path(),
                            trace.info().content_hash));
  }
  const CacheShape& s = trace.info().shape;
  const std::vector<int64_t> want = {s.layers, s.kv_heads, trace.tokens(), s.head_dim};
  for (int i = 0; i < 2; ++i) {
    const char* name = i ? "/value" : "/key";
    if (!file.has_object(name)) fail_data(fmt::format("{}: the dataset {} is missing", path, name));
    data[i] = file.open_dataset(name);
    if (data[i].dims() != want)
      fail_data(fmt::format("{}: {} is ({}); (layer, kv_head, token, channel) of {} is ({})", path, name,
                            fmt::join(data[i].dims(), ", "), trace.path(), fmt::join(want, ", ")));
    const Hdf5Type t = data[i].type();
    if (t == Hdf5Type::kI32 || t == Hdf5Type::kI64)
      fail_data(fmt::format("{}: {} holds {}; float16, bfloat16, float32 or float64 is expected", path, name,
                            hdf5_type_name(t)));
  }
}

}  // namespace

ReconReader::ReconReader(const std::string& path, const TraceReader& trace) : impl_(std::make_unique<Impl>()) {
  if (!std::filesystem::exists(path)) fail_data(fmt::format("{}: does not exist", path));
  impl_->path = path;
  probe_in_child(path, [&] {
    Hdf5File file;
    Hdf5Dataset data[2];
    bool pre = false;
    open_checked(path, trace, file, data, pre);
  });
  open_checked(path, trace, impl_->file, impl_->data, impl_->pre_rope);
}
ReconReader::~ReconReader() = default;
bool ReconReader::keys_pre_rope() const { return impl_->pre_rope; }
void ReconReader::key(int layer, int head, int64_t first, int64_t count, MutMatrix out) const {
  impl_->rows(0, layer, head, first, count, out);
}
void ReconReader::value(int layer, int head, int64_t first, int64_t count, MutMatrix out) const {
  impl_->rows(1, layer, head, first, count, out);
}

}  // namespace vqkv
