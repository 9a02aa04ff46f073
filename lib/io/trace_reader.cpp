#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "core/error.h"
#include "io/json_fields.h"
#include "io/trace.h"
#include "io/trace_layout.h"

namespace vqkv {
namespace {

// What any model of today fits in, far below what would make a hostile file expensive.
constexpr int64_t kMaxLayers = 4096, kMaxHeads = 4096, kMaxHeadDim = 4096, kMaxHidden = 1 << 20;

bool is_finite_pattern(const uint8_t* value, Hdf5Type type) {
  switch (type) {
    case Hdf5Type::kBF16:
      return (*reinterpret_cast<const uint16_t*>(value) & 0x7f80) != 0x7f80;
    case Hdf5Type::kF16:
      return (*reinterpret_cast<const uint16_t*>(value) & 0x7c00) != 0x7c00;
    case Hdf5Type::kF32:
      return std::isfinite(*reinterpret_cast<const float*>(value));
    case Hdf5Type::kF64:
      return std::isfinite(*reinterpret_cast<const double*>(value));
    default:
      return true;
  }
}

// 16-bit values of a dataset, or f32 as they are.
void widen(const void* in, float* out, int64_t n, Hdf5Type type) {
  if (type == Hdf5Type::kF32)
    std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
  else if (type == Hdf5Type::kBF16)
    to_float(static_cast<const bf16*>(in), out, n);
  else
    to_float(static_cast<const f16*>(in), out, n);
}

constexpr int64_t kReadRows = 4096;  // 512 KiB of 16-bit rows at head_dim 64: stays in the second-level cache

}  // namespace

struct TraceReader::Impl {
  std::string path, model_json;
  TraceInfo info;
  Hdf5File file;
  std::vector<TraceDataset> layout;
  std::map<std::string, Hdf5Dataset> data;
  int64_t tokens = 0, queries = 0;
  std::vector<TraceDocument> documents;
  std::vector<TraceWindow> windows;
  std::vector<int32_t> token_id, token_type, position, document_of, query_token;
  std::vector<int64_t> moment_count;

  explicit Impl(const std::string& p) : path(p) { open(); }
  void open();
  void read_attributes(int64_t* hidden);
  std::vector<int32_t> integers(const std::string& name, int64_t low, int64_t high) const;
  void read_windows();
  void rows(const char* name, int layer, int head, int64_t first, int64_t count, MutMatrix out) const;
  std::vector<double> moments(const char* name, int layer, int kv_head, int document, std::vector<int64_t> rest) const;
  Matrix<double> square(const char* name, int layer, int kv_head, int document) const;
  std::vector<float> mass(const char* name, int layer, int kv_head, int64_t first, int64_t count) const;
  [[noreturn]] void refuse(const std::string& what) const { fail_data(fmt::format("{}: {}", path, what)); }
};

void TraceReader::Impl::read_attributes(int64_t* hidden) {
  if (!file.has_attribute("/", "format") || file.read_text("/", "format") != kTraceFormat)
    refuse(fmt::format("not a trace: attribute 'format' must be \"{}\"", kTraceFormat));
  const int64_t version = file.read_int("/", "format_version");
  if (version != kTraceVersion)
    refuse(fmt::format("trace format version {}; this build reads version {}", version, kTraceVersion));
  if (file.read_int("/", "complete") != 1)
    refuse("incomplete: its writer did not finish (attribute 'complete' is not 1)");
  const std::string keys = file.read_text("/", "keys");
  if (keys != "pre_rope" && keys != "post_rope")
    refuse(fmt::format("attribute 'keys' is \"{}\"; allowed: pre_rope, post_rope", keys));
  info.keys_pre_rope = keys == "pre_rope";
  info.content_hash = file.read_text("/", "content_xxh3");
  if (info.content_hash.size() != 32 || info.content_hash.find_first_not_of("0123456789abcdef") != std::string::npos)
    refuse("attribute 'content_xxh3' must be 32 hexadecimal digits");

  model_json = file.read_text("/", "model_json");
  const std::string where = path + ": model_json";
  const Json model = parse_json(model_json, where);
  if (!model.is_object()) fail_data(where + ": must be an object");
  CacheShape& s = info.shape;
  s.layers = static_cast<int>(integer_field(model, "layers", 1, kMaxLayers, where));
  s.q_heads = static_cast<int>(integer_field(model, "q_heads", 1, kMaxHeads, where));
  s.kv_heads = static_cast<int>(integer_field(model, "kv_heads", 1, kMaxHeads, where));
  s.head_dim = static_cast<int>(integer_field(model, "head_dim", 2, kMaxHeadDim, where));
  *hidden = integer_field(model, "hidden", 0, kMaxHidden, where);
  if (s.q_heads % s.kv_heads)
    fail_data(fmt::format("{}: {} query heads are no multiple of {} KV heads", where, s.q_heads, s.kv_heads));
  if (s.head_dim % 2) fail_data(fmt::format("{}: head_dim {} is odd", where, s.head_dim));
  info.hidden = static_cast<int>(*hidden);
  info.stored = dtype_from_name(choice_field(model, "dtype", {"bf16", "f16", "f32"}, where));
  info.model_name = text_field(model, "name", where);
  info.model_hash = text_field(model, "hash", where);
  const auto scale = model.find("score_scale");
  if (scale == model.end() || !scale->is_number() || !(scale->get<float>() > 0) || !std::isfinite(scale->get<float>()))
    fail_data(where + ": 'score_scale' must be a positive number");
  s.score_scale = scale->get<float>();
  if (model.contains("gradients")) info.gradients = choice_field(model, "gradients", {"next-token", "sampled"}, where);
  if (const auto types = model.find("token_types"); types != model.end()) {
    const auto wrong = [&] {
      fail_data(fmt::format("{}: token_types is {}; must be a list of different names, the first of them text", where,
                            types->dump()));
    };
    if (!types->is_array() || types->empty() || types->front() != "text") wrong();
    for (const Json& type : *types) {
      if (!type.is_string() || std::ranges::count(*types, type) > 1) wrong();
      info.token_types.push_back(type.get<std::string>());
    }
  }
  if (!model.contains("rope")) fail_data(where + ": 'rope' is missing");
  try {
    s.rope = RopeFacts::from_json(model["rope"]);
  } catch (const Error& e) { fail_data(fmt::format("{}: rope: {}", where, e.what())); }
  if (s.rope.head_dim != s.head_dim)
    fail_data(fmt::format("{}: rope.head_dim is {}, head_dim {}", where, s.rope.head_dim, s.head_dim));
  info.model = model.value("facts", Json());
  info.provenance = parse_json(file.read_text("/", "provenance_json"), path + ": provenance_json");
  const Json names = parse_json(file.read_text("/", "documents_json"), path + ": documents_json");
  if (!names.is_array() || names.empty()) refuse("documents_json: must be a list of names");
  for (const Json& n : names) {
    if (!n.is_string()) refuse("documents_json: must be a list of names");
    documents.push_back({static_cast<int32_t>(documents.size()), n.get<std::string>(), 0});
  }
}

std::vector<int32_t> TraceReader::Impl::integers(const std::string& name, int64_t low, int64_t high) const {
  const Hdf5Dataset& d = data.at(name);
  std::vector<int32_t> out(static_cast<size_t>(d.count()));
  d.read_all(out.data());
  for (size_t i = 0; i < out.size(); ++i)
    if (out[i] < low || out[i] > high)
      refuse(fmt::format("/{}[{}] is {}; allowed: {} to {}", name, i, out[i], low, high));
  return out;
}

void TraceReader::Impl::read_windows() {
  token_id = integers("token_id", 0, INT32_MAX);
  if (!info.token_types.empty()) token_type = integers("token_type", 0, std::ssize(info.token_types) - 1);
  position = integers("position", 0, tokens - 1);
  document_of = integers("doc", 0, static_cast<int64_t>(documents.size()) - 1);
  query_token = integers("query_token", 0, tokens - 1);
  const std::vector<int32_t> window = integers("window", 0, tokens - 1);
  for (size_t t = 0; t < window.size(); ++t) {
    const int32_t last_window = t ? window[t - 1] : -1, last_doc = t ? document_of[t - 1] : -1;
    const bool starts = t == 0 || window[t] != last_window;
    if (window[t] != last_window && window[t] != last_window + 1)
      refuse(fmt::format("/window[{}] is {} after {}; windows are numbered in order", t, window[t], last_window));
    if (document_of[t] != last_doc && document_of[t] != last_doc + 1)
      refuse(fmt::format("/doc[{}] is {} after {}; documents are numbered in order", t, document_of[t], last_doc));
    if (!starts && document_of[t] != last_doc) refuse(fmt::format("/doc[{}] changes inside window {}", t, window[t]));
    if (starts) windows.push_back({document_of[t], static_cast<int64_t>(t), 0, 0, 0});
    TraceWindow& w = windows.back();
    if (position[t] != static_cast<int64_t>(t) - w.first_token)
      refuse(fmt::format("/position[{}] is {}; positions count up from 0 in each window", t, position[t]));
    ++w.tokens;
    ++documents[static_cast<size_t>(document_of[t])].tokens;
  }
  for (const TraceDocument& d : documents)
    if (d.tokens == 0) refuse(fmt::format("document {} ('{}') has no token", d.id, d.name));
  size_t q = 0;
  for (TraceWindow& w : windows) {
    w.first_query = static_cast<int64_t>(q);
    while (q < query_token.size() && query_token[q] < w.first_token + w.tokens) {
      if (q && query_token[q] <= query_token[q - 1])
        refuse(fmt::format("/query_token[{}] is {} after {}; must ascend", q, query_token[q], query_token[q - 1]));
      ++q;
    }
    w.queries = static_cast<int64_t>(q) - w.first_query;
  }
  if (q != query_token.size()) refuse(fmt::format("/query_token[{}] is {}; must ascend", q, query_token[q]));
}

void TraceReader::Impl::open() {
  file = Hdf5File::open(path);
  int64_t hidden = 0;
  read_attributes(&hidden);
  const auto length = [&](const char* name, int64_t high) {
    const Hdf5Dataset d = file.open_dataset(std::string("/") + name);
    if (d.dims().size() != 1 || d.dims()[0] < 1 || d.dims()[0] > high)
      refuse(fmt::format("/{}: must have one dimension of 1 to {}", name, high));
    return d.dims()[0];
  };
  tokens = length("token", kTraceMaxTokens);
  queries = length("query_token", tokens);
  const TraceSizes sizes{.layers = info.shape.layers,
                         .q_heads = info.shape.q_heads,
                         .kv_heads = info.shape.kv_heads,
                         .head_dim = info.shape.head_dim,
                         .hidden = hidden,
                         .tokens = tokens,
                         .queries = queries,
                         .documents = static_cast<int64_t>(documents.size()),
                         .gradients = !info.gradients.empty(),
                         .token_types = !info.token_types.empty()};
  layout = trace_datasets(sizes, info.stored);
  for (const TraceDataset& want : layout) {
    Hdf5Dataset d = file.open_dataset("/" + want.name);
    if (d.type() != want.type)
      refuse(fmt::format("/{}: is {}, must be {}", want.name, hdf5_type_name(d.type()), hdf5_type_name(want.type)));
    if (d.dims() != want.dims) {
      const auto shape = [](const std::vector<int64_t>& v) {
        std::string s;
        for (const int64_t x : v) s += (s.empty() ? "" : ", ") + std::to_string(x);
        return "(" + s + ")";
      };
      refuse(fmt::format("/{}: has shape {}, must be {}", want.name, shape(d.dims()), shape(want.dims)));
    }
    data.emplace(want.name, std::move(d));
  }
  info.layer_index = integers("layer", 0, INT32_MAX);
  for (size_t l = 1; l < info.layer_index.size(); ++l)
    if (info.layer_index[l] <= info.layer_index[l - 1])
      refuse(fmt::format("/layer[{}] is {} after {}; must ascend", l, info.layer_index[l], info.layer_index[l - 1]));
  read_windows();
  moment_count.resize(documents.size());
  data.at("moment_count").read_all(moment_count.data());
  for (size_t i = 0; i < moment_count.size(); ++i)
    if (moment_count[i] != documents[i].tokens * info.shape.group())
      refuse(fmt::format("/moment_count[{}] is {}; {} tokens with {} query heads a KV head make {}", i, moment_count[i],
                         documents[i].tokens, info.shape.group(), documents[i].tokens * info.shape.group()));
}

void TraceReader::Impl::rows(const char* name, int layer, int head, int64_t first, int64_t count, MutMatrix out) const {
  const Hdf5Dataset& d = data.at(name);
  const int64_t width = info.shape.head_dim;
  VQKV_CHECK(layer >= 0 && layer < d.dims()[0] && head >= 0 && head < d.dims()[1] && first >= 0 && count >= 0 &&
             first <= d.dims()[2] - count && out.rows == count && out.cols == width);
  const Hdf5Type type = d.type();
  const size_t element = hdf5_type_size(type);
  std::vector<uint8_t> raw;
  for (int64_t r = 0; r < count; r += kReadRows) {
    const int64_t n = std::min(kReadRows, count - r);
    const std::vector<int64_t> start{layer, head, first + r, 0}, size{1, 1, n, width};
    if (type == Hdf5Type::kF32 && out.contiguous()) {
      d.read(start, size, out.row(r));
      continue;
    }
    raw.resize(static_cast<size_t>(n * width) * element);
    d.read(start, size, raw.data());
    if (out.contiguous()) {
      widen(raw.data(), out.row(r), n * width, type);
    } else {
      for (int64_t i = 0; i < n; ++i)
        widen(raw.data() + static_cast<size_t>(i * width) * element, out.row(r + i), width, type);
    }
  }
}

std::vector<double> TraceReader::Impl::moments(const char* name, int layer, int kv_head, int document,
                                               std::vector<int64_t> rest) const {
  const Hdf5Dataset& d = data.at(name);
  VQKV_CHECK(document >= 0 && document < d.dims()[0] && layer >= 0 && layer < d.dims()[1] && kv_head >= 0 &&
             kv_head < d.dims()[2]);
  std::vector<int64_t> start{document, layer, kv_head}, size{1, 1, 1};
  size_t n = 1;
  for (const int64_t x : rest) {
    start.push_back(0);
    size.push_back(x);
    n *= static_cast<size_t>(x);
  }
  std::vector<double> out(n);
  d.read(start, size, out.data());
  for (const double v : out)
    if (!std::isfinite(v))
      refuse(fmt::format("/{}: document {}, layer {}, head {} holds {}", name, document, layer, kv_head, v));
  return out;
}

Matrix<double> TraceReader::Impl::square(const char* name, int layer, int kv_head, int document) const {
  const int64_t d = info.shape.head_dim;
  const std::vector<double> v = moments(name, layer, kv_head, document, {d, d});
  Matrix<double> out(d, d);
  std::copy(v.begin(), v.end(), out.data());
  return out;
}

std::vector<float> TraceReader::Impl::mass(const char* name, int layer, int kv_head, int64_t first,
                                           int64_t count) const {
  const Hdf5Dataset& d = data.at(name);
  VQKV_CHECK(layer >= 0 && layer < d.dims()[0] && kv_head >= 0 && kv_head < d.dims()[1] && first >= 0 && count >= 0 &&
             first <= d.dims()[2] - count);
  std::vector<float> out(static_cast<size_t>(count));
  d.read({layer, kv_head, first}, {1, 1, count}, out.data());
  for (const float v : out)
    if (!std::isfinite(v) || v < 0) refuse(fmt::format("/{}: layer {}, head {} holds {}", name, layer, kv_head, v));
  return out;
}

TraceReader::TraceReader(const std::string& path) {
  probe_in_child(path, [&] { const Impl probe(path); });
  impl_ = std::make_unique<Impl>(path);
}
TraceReader::~TraceReader() = default;

const TraceInfo& TraceReader::info() const { return impl_->info; }
const std::string& TraceReader::path() const { return impl_->path; }
int64_t TraceReader::tokens() const { return impl_->tokens; }
int64_t TraceReader::queries() const { return impl_->queries; }
const std::vector<TraceDocument>& TraceReader::documents() const { return impl_->documents; }
const std::vector<TraceWindow>& TraceReader::windows() const { return impl_->windows; }
const std::vector<int32_t>& TraceReader::token_id() const { return impl_->token_id; }
const std::vector<int32_t>& TraceReader::position() const { return impl_->position; }
const std::vector<int32_t>& TraceReader::document_of() const { return impl_->document_of; }
const std::vector<int32_t>& TraceReader::query_token() const { return impl_->query_token; }
const std::vector<int32_t>& TraceReader::token_type() const { return impl_->token_type; }

void TraceReader::key(int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const {
  impl_->rows("key", layer, kv_head, first, count, out);
}
void TraceReader::value(int layer, int kv_head, int64_t first, int64_t count, MutMatrix out) const {
  impl_->rows("value", layer, kv_head, first, count, out);
}
void TraceReader::query(int layer, int q_head, int64_t first, int64_t count, MutMatrix out) const {
  impl_->rows("query", layer, q_head, first, count, out);
}

Matrix<double> TraceReader::query_moment(int layer, int kv_head, int document) const {
  return impl_->square("query_moment", layer, kv_head, document);
}
std::vector<double> TraceReader::query_pair_moment(int layer, int kv_head, int document) const {
  return impl_->moments("query_pair_moment", layer, kv_head, document, {impl_->info.shape.head_dim / 2});
}
int64_t TraceReader::moment_count(int document) const { return impl_->moment_count.at(static_cast<size_t>(document)); }
std::vector<float> TraceReader::received_mass(int layer, int kv_head, int64_t first, int64_t count) const {
  return impl_->mass("received_mass", layer, kv_head, first, count);
}
std::vector<float> TraceReader::received_mass2(int layer, int kv_head, int64_t first, int64_t count) const {
  return impl_->mass("received_mass2", layer, kv_head, first, count);
}

bool TraceReader::has_output_weight() const { return impl_->info.hidden > 0; }
Matrix<float> TraceReader::output_weight(int layer) const {
  VQKV_CHECK(has_output_weight() && layer >= 0 && layer < impl_->info.shape.layers);
  const Hdf5Dataset& d = impl_->data.at("output_weight");
  Matrix<float> out(d.dims()[1], d.dims()[2]);
  std::vector<uint8_t> raw(static_cast<size_t>(out.rows * out.cols) * hdf5_type_size(d.type()));
  d.read({layer, 0, 0}, {1, out.rows, out.cols}, raw.data());
  widen(raw.data(), out.data(), out.rows * out.cols, d.type());
  return out;
}

bool TraceReader::has_gradients() const { return !impl_->info.gradients.empty(); }
void TraceReader::squared_gradient(GradientOf of, int layer, int kv_head, int64_t first, int64_t count,
                                   MutMatrix out) const {
  VQKV_CHECK(has_gradients());
  const char* name = squared_gradient_name(of);
  impl_->rows(name, layer, kv_head, first, count, out);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < out.cols; ++c)
      if (const float v = out(r, c); !std::isfinite(v) || v < 0)
        impl_->refuse(
            fmt::format("/{}: layer {}, head {}, row {}, channel {} holds {}", name, layer, kv_head, first + r, c, v));
}
Matrix<double> TraceReader::gradient_moment(GradientOf of, int layer, int kv_head, int document) const {
  VQKV_CHECK(has_gradients());
  return impl_->square(gradient_moment_name(of), layer, kv_head, document);
}

std::vector<std::string> TraceReader::verify() const {
  const Impl& m = *impl_;
  std::vector<std::string> problems;
  TraceHash hash(m.info.keys_pre_rope, m.model_json);
  std::vector<uint8_t> buffer;
  for (const TraceDataset& layout : m.layout) {
    const Hdf5Dataset& d = m.data.at(layout.name);
    const size_t lead = static_cast<size_t>(std::max(0, layout.hash_lead)), element = hdf5_type_size(layout.type);
    // The first dimension of a block is read in pieces of at most 8 MiB, or one row.
    size_t row = element;
    for (size_t i = lead + 1; i < layout.dims.size(); ++i) row *= static_cast<size_t>(layout.dims[i]);
    const int64_t step = std::max<int64_t>(1, static_cast<int64_t>((size_t{8} << 20) / row));
    std::vector<std::string> blocks;
    int64_t bad = 0;
    std::string first_bad;
    for (int64_t b = 0; b < layout.blocks(); ++b) {
      std::vector<int64_t> start(layout.dims.size(), 0), size = layout.dims;
      int64_t rest = b;
      for (size_t i = lead; i-- > 0;) {
        start[i] = rest % layout.dims[i];
        size[i] = 1;
        rest /= layout.dims[i];
      }
      ContentHash block;
      for (int64_t r = 0; r < layout.dims[lead]; r += step) {
        start[lead] = r;
        size[lead] = std::min(step, layout.dims[lead] - r);
        const size_t bytes = static_cast<size_t>(size[lead]) * row;
        buffer.resize(bytes);
        d.read(start, size, buffer.data());
        block.update(buffer.data(), bytes);
        for (size_t i = 0; i < bytes; i += element)
          if (!is_finite_pattern(buffer.data() + i, layout.type) && bad++ == 0) {
            size_t at = static_cast<size_t>(r) * row / element + i / element;
            std::vector<int64_t> index = start;
            for (size_t k = layout.dims.size(); k-- > lead;) {
              index[k] = static_cast<int64_t>(at % static_cast<size_t>(layout.dims[k]));
              at /= static_cast<size_t>(layout.dims[k]);
            }
            for (size_t k = 0; k < index.size(); ++k)
              first_bad += fmt::format("{}{} {}", k ? ", " : "", layout.axes[k], index[k]);
          }
      }
      blocks.push_back(block.hex());
    }
    if (layout.hash_lead >= 0) hash.dataset(layout, blocks);
    if (bad)
      problems.push_back(
          fmt::format("/{}: {} values are NaN or infinite, the first at {}", layout.name, bad, first_bad));
  }
  if (hash.hex() != m.info.content_hash)
    problems.push_back(
        fmt::format("content hash is {}, the file says {}: its values were changed", hash.hex(), m.info.content_hash));
  return problems;
}

}  // namespace vqkv
