#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "io/atomic_file.h"
#include "io/trace.h"
#include "io/trace_layout.h"
#include "io/trace_streams.h"

namespace vqkv {
namespace {

TraceSizes sizes_of(const TraceInfo& info, int64_t tokens, int64_t queries, int64_t documents) {
  return {.layers = info.shape.layers,
          .q_heads = info.shape.q_heads,
          .kv_heads = info.shape.kv_heads,
          .head_dim = info.shape.head_dim,
          .hidden = info.hidden,
          .tokens = tokens,
          .queries = queries,
          .documents = documents,
          .gradients = !info.gradients.empty(),
          .token_types = !info.token_types.empty()};
}

constexpr int64_t kWriteOutBytes = int64_t{8} << 20;  // asking for every megabyte cost 8 % of the processor time
constexpr int64_t kFetchRows = 8;
constexpr int64_t kNarrowRows = 32;  // 24 KiB of f32 at SmolLM2's 3 heads of 64 channels: the narrowed rows stay in L1

}  // namespace

struct TraceWriter::Impl {
  std::string path;
  TraceInfo info;
  std::vector<std::string> documents;
  int64_t max_tokens, max_queries;
  std::unique_ptr<AtomicFile> target;
  Hdf5File file;
  std::map<std::string, TraceDataset> layout;
  std::map<std::string, RowStreams> streams;   // key, value, query, received_mass, received_mass2, squared gradients
  std::map<std::string, Hdf5Dataset> vectors;  // what finish() writes at once
  // A sum over all positions of a document, (document, layer, kv_head, ...): moments. Of the current one, all layers.
  struct DocumentSum {
    Hdf5Dataset dataset;
    ContentHash hash;
    std::vector<double> sum;
  };
  std::map<std::string, DocumentSum> sums;
  Hdf5Dataset output;
  std::vector<std::string> output_hash;  // (layers), empty until written
  std::vector<int32_t> token_id, token_type, position, doc, window, query_token;
  std::vector<int64_t> moment_count;
  int64_t windows = 0;
  std::string model_json;
  double hash_seconds = 0, write_seconds = 0;
  int64_t stored_bytes = 0, handed_over = 0;  // handed_over: since the system was last asked to write out
  std::vector<uint8_t> scratch[2];

  // Rows of one layer and dataset: rows (n, heads*d), the first at `first_row` of the axis. add_rows takes what there
  // is of each layer in turn: keys, values, queries and the gradients' squares.
  struct RowJob {
    std::string name;
    Hdf5Type type;
    int layer;
    int64_t heads;
    const Matrix<float>* rows;
    int64_t first_row;
  };

  Impl(const std::string& p, TraceInfo i, std::vector<std::string> names, int64_t t, int64_t q)
      : path(p), info(std::move(i)), documents(std::move(names)), max_tokens(t), max_queries(q) {}

  int64_t group() const { return info.shape.group(); }
  void check_window(const TraceWindowData& w) const;
  void add_rows(const std::vector<RowJob>& jobs, size_t jobs_of_layer);
  void check_finite(const RowJob& job) const;
  void add_sum(const std::string& name, size_t layer, const std::vector<double>& part);
  void add_mass(const std::string& name, int layer, const std::vector<float>& mass, int64_t n);
  void flush_document();
  void write_vector(const std::string& name, const void* data, TraceHash& hash);
  Hdf5Dataset& dataset(const std::string& name);
  Hdf5Dataset create(const TraceDataset& d) { return file.create_dataset("/" + d.name, d.type, d.dims, d.chunk); }
};

TraceWriter::TraceWriter(const std::string& path, TraceInfo info, std::vector<std::string> document_names,
                         int64_t max_tokens, int64_t max_queries)
    : impl_(std::make_unique<Impl>(path, std::move(info), std::move(document_names), max_tokens, max_queries)) {
  Impl& m = *impl_;
  const CacheShape& s = m.info.shape;
  VQKV_CHECK(s.layers > 0 && s.kv_heads > 0 && s.q_heads > 0 && s.q_heads % s.kv_heads == 0 && s.head_dim > 0 &&
             s.head_dim % 2 == 0 && m.info.hidden >= 0);
  VQKV_CHECK(!m.documents.empty() && max_queries > 0);
  if (max_tokens < 1 || max_tokens > kTraceMaxTokens)
    fail_usage(fmt::format("a trace holds 1 to {} tokens, not {}", kTraceMaxTokens, max_tokens));
  if (m.info.layer_index.empty())
    for (int l = 0; l < s.layers; ++l) m.info.layer_index.push_back(l);
  VQKV_CHECK(static_cast<int>(m.info.layer_index.size()) == s.layers);

  const int64_t documents = static_cast<int64_t>(m.documents.size());
  require_free_space(path, estimate_bytes(m.info, max_tokens, max_queries, documents));
  for (const TraceDataset& d : trace_datasets(sizes_of(m.info, max_tokens, max_queries, documents), m.info.stored))
    m.layout[d.name] = d;
  Json model = {{"name", m.info.model_name},    {"hash", m.info.model_hash},
                {"layers", s.layers},           {"q_heads", s.q_heads},
                {"kv_heads", s.kv_heads},       {"head_dim", s.head_dim},
                {"hidden", m.info.hidden},      {"dtype", std::string(dtype_name(m.info.stored))},
                {"score_scale", s.score_scale}, {"rope", s.rope.to_json()},
                {"facts", m.info.model}};
  if (!m.info.gradients.empty()) model["gradients"] = m.info.gradients;
  if (!m.info.token_types.empty()) model["token_types"] = m.info.token_types;
  m.model_json = canonical_json(model);

  m.target = std::make_unique<AtomicFile>(path);
  m.file = Hdf5File::create(m.target->partial_path(), path);
  m.file.write_text("/", "format", kTraceFormat);
  m.file.write_int("/", "format_version", kTraceVersion);
  m.file.write_int("/", "complete", 0);
  std::vector<std::string> rows{"key", "value", "query", "received_mass", "received_mass2"},
      moments{"query_moment", "query_pair_moment"};
  if (!m.info.gradients.empty())
    for (const GradientOf of : kGradientsOf) {
      rows.push_back(squared_gradient_name(of));
      moments.push_back(gradient_moment_name(of));
    }
  for (const std::string& name : rows) m.streams[name] = RowStreams(m.create(m.layout.at(name)), m.layout.at(name));
  for (const std::string& name : moments) m.sums[name].dataset = m.create(m.layout.at(name));
  if (m.info.hidden > 0) {
    m.output = m.create(m.layout.at("output_weight"));
    m.output_hash.resize(static_cast<size_t>(s.layers));
  }
}

TraceWriter::~TraceWriter() = default;

void TraceWriter::Impl::check_window(const TraceWindowData& w) const {
  const CacheShape& s = info.shape;
  const size_t n = w.token_id.size(), layers = static_cast<size_t>(s.layers);
  const auto rows = [&](const std::vector<Matrix<float>>& v, size_t count, int64_t heads) {
    VQKV_CHECK(v.size() == layers);
    for (const auto& x : v) VQKV_CHECK(x.rows == static_cast<int64_t>(count) && x.cols == heads * s.head_dim);
  };
  VQKV_CHECK(n > 0 && w.position.size() == n && w.token_type.size() == (info.token_types.empty() ? 0 : n));
  for (const int32_t type : w.token_type) VQKV_CHECK(type >= 0 && type < std::ssize(info.token_types));
  for (size_t i = 0; i < n; ++i) VQKV_CHECK(w.position[i] == static_cast<int32_t>(i));
  for (size_t i = 0; i < w.query_token.size(); ++i)
    VQKV_CHECK(w.query_token[i] >= 0 && w.query_token[i] < static_cast<int32_t>(n) &&
               (i == 0 || w.query_token[i] > w.query_token[i - 1]));
  rows(w.key, n, s.kv_heads);
  rows(w.value, n, s.kv_heads);
  rows(w.query, w.query_token.size(), s.q_heads);
  VQKV_CHECK(w.query_moment.size() == layers && w.query_pair_moment.size() == layers &&
             w.received_mass.size() == layers && w.received_mass2.size() == layers);
  const size_t h = static_cast<size_t>(s.kv_heads), d = static_cast<size_t>(s.head_dim);
  for (size_t l = 0; l < layers; ++l)
    VQKV_CHECK(w.query_moment[l].size() == h * d * d && w.query_pair_moment[l].size() == h * d / 2 &&
               w.received_mass[l].size() == h * n && w.received_mass2[l].size() == h * n);
  for (size_t of = 0; !info.gradients.empty() && of < std::size(kGradientsOf); ++of) {
    rows(w.squared_gradient[of], n, s.kv_heads);
    VQKV_CHECK(w.gradient_moment[of].size() == layers);
    for (const auto& m : w.gradient_moment[of]) VQKV_CHECK(m.size() == h * d * d);
  }
  const int32_t current = doc.empty() ? -1 : doc.back();
  if (w.document != current && w.document != current + 1)
    fail_internal(fmt::format("{}: a window of document {} after document {}; documents are written in order", path,
                              w.document, current));
  VQKV_CHECK(w.document < static_cast<int32_t>(documents.size()));
  VQKV_CHECK(static_cast<int64_t>(token_id.size() + n) <= max_tokens &&
             static_cast<int64_t>(query_token.size() + w.query_token.size()) <= max_queries);
}

void TraceWriter::Impl::check_finite(const RowJob& job) const {
  const int64_t d = info.shape.head_dim;
  for (int64_t h = 0; h < job.heads; ++h)
    for (int64_t r = 0; r < job.rows->rows; ++r)
      for (int64_t c = 0; c < d; ++c) {
        const float original = (*job.rows)(r, h * d + c);
        alignas(float) uint8_t stored[sizeof(float)];
        narrow(&original, stored, 1, job.type);
        if (any_not_finite(stored, 1, job.type))
          fail_data(fmt::format("{}: /{} at layer {}, head {}, row {}, channel {} is {}{}", path, job.name, job.layer,
                                h, job.first_row + r, c, original,
                                std::isfinite(original)
                                    ? fmt::format(", too large for {}; use bf16 or f32", hdf5_type_name(job.type))
                                    : ""));
      }
}

void TraceWriter::Impl::add_rows(const std::vector<RowJob>& jobs, size_t jobs_of_layer) {
  const int64_t d = info.shape.head_dim;
  const auto row_bytes = [&](const RowJob& job) { return d * static_cast<int64_t>(hdf5_type_size(job.type)); };
  const auto bytes_of = [&](const RowJob& job) { return job.heads * job.rows->rows * row_bytes(job); };
  struct Block {
    const RowJob* job;
    uint8_t* out;  // of the whole job: (heads, rows, d)
    int64_t first;
  };
  struct Piece {
    const RowJob* job;
    int64_t head;
    const uint8_t* bytes;
  };
  std::vector<Block> blocks;
  std::vector<Piece> ready, filling;
  // While one thread hands a layer to the file, the others narrow the next one: on a fast medium narrowing takes about
  // as long as writing. Layers are written in order whatever the number of threads. One step a layer, not one a
  // dataset: the few queries leave the writer nothing to do while keys are narrowed (20 of 140 ms).
  for (size_t first_job = 0;; first_job += jobs_of_layer) {
    const bool last = first_job >= jobs.size();
    blocks.clear();
    filling.clear();
    int64_t bytes = 0;
    for (size_t j = first_job; !last && j < first_job + jobs_of_layer; ++j) bytes += bytes_of(jobs[j]);
    std::vector<uint8_t>& buffer = scratch[first_job / jobs_of_layer % 2];
    if (buffer.size() < static_cast<size_t>(bytes)) buffer.resize(static_cast<size_t>(bytes));
    uint8_t* out = buffer.data();
    for (size_t j = first_job; !last && j < first_job + jobs_of_layer; out += bytes_of(jobs[j]), ++j) {
      const int64_t n = jobs[j].rows->rows;
      for (int64_t r = 0; r < n; r += kNarrowRows) blocks.push_back({&jobs[j], out, r});
      for (int64_t h = 0; h < jobs[j].heads; ++h) filling.push_back({&jobs[j], h, out + h * n * row_bytes(jobs[j])});
    }
    // The disk works while the next layers are made, instead of all at once when the file is committed. Asking it to
    // takes processor time too (18 of 165 ms on one thread), so another thread does.
    const bool write_out = handed_over >= kWriteOutBytes;
    if (write_out) handed_over = 0;
    std::vector<uint8_t> bad(blocks.size());
    parallel_for(2 + static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      if (i == 0) {
        for (const Piece& p : ready) {
          streams.at(p.job->name).append(p.job->layer, p.head, p.bytes, p.job->rows->rows);
          handed_over += p.job->rows->rows * row_bytes(*p.job);
        }
        return;
      }
      if (i == 1) {
        if (write_out) target->start_writing_out();
        return;
      }
      // Row by row, all heads of it: read in the order of memory, once. Head by head, each of them strides over all
      // rows, which took twice the processor time.
      const Block& block = blocks[static_cast<size_t>(i - 2)];
      const Matrix<float>& rows = *block.job->rows;
      const int64_t count = std::min(kNarrowRows, rows.rows - block.first);
      const int64_t stride = row_bytes(*block.job);
      const auto place = [&](int64_t h, int64_t r) { return block.out + (h * rows.rows + r) * stride; };
      for (int64_t r = block.first; r < block.first + count; ++r) {
        if (r + kFetchRows < rows.rows)
          for (int64_t c = 0; c < rows.cols; c += 16) __builtin_prefetch(rows.row(r + kFetchRows) + c);
        for (int64_t h = 0; h < block.job->heads; ++h) narrow(rows.row(r) + h * d, place(h, r), d, block.job->type);
      }
      for (int64_t h = 0; h < block.job->heads; ++h)
        bad[static_cast<size_t>(i - 2)] |= any_not_finite(place(h, block.first), count * d, block.job->type);
    });
    if (last) return;
    for (size_t i = 0; i < blocks.size(); ++i)
      if (bad[i]) check_finite(*blocks[i].job);
    const Stopwatch hash_watch;
    parallel_for(static_cast<int64_t>(filling.size()), [&](int64_t i) {
      const Piece& p = filling[static_cast<size_t>(i)];
      streams.at(p.job->name).hash(p.job->layer, p.head, p.bytes, p.job->rows->rows);
    });
    hash_seconds += hash_watch.seconds();
    std::swap(ready, filling);
  }
}

void TraceWriter::Impl::add_mass(const std::string& name, int layer, const std::vector<float>& mass, int64_t n) {
  RowStreams& stream = streams.at(name);
  for (const float v : mass)
    if (!std::isfinite(v) || v < 0) fail_data(fmt::format("{}: /{} at layer {} holds {}", path, name, layer, v));
  for (int64_t h = 0; h < info.shape.kv_heads; ++h) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mass.data() + h * n);
    const Stopwatch hash_watch;
    stream.hash(layer, h, bytes, n);
    hash_seconds += hash_watch.seconds();
    stream.append(layer, h, bytes, n);
  }
}

void TraceWriter::Impl::flush_document() {
  if (doc.empty()) return;
  for (auto& [name, s] : sums) {
    for (const double x : s.sum)
      if (!std::isfinite(x)) fail_data(fmt::format("{}: /{} of document {} is not finite", path, name, doc.back()));
    const Stopwatch hash_watch;
    s.hash.update(s.sum.data(), s.sum.size() * sizeof(double));
    hash_seconds += hash_watch.seconds();
    std::vector<int64_t> start(layout.at(name).dims.size(), 0), size = layout.at(name).dims;
    start[0] = doc.back();
    size[0] = 1;
    s.dataset.write(start, size, s.sum.data());
  }
}

void TraceWriter::Impl::add_sum(const std::string& name, size_t layer, const std::vector<double>& part) {
  std::vector<double>& sum = sums.at(name).sum;
  if (sum.empty()) sum.assign(part.size() * static_cast<size_t>(info.shape.layers), 0.0);
  for (size_t k = 0; k < part.size(); ++k) sum[layer * part.size() + k] += part[k];
}

void TraceWriter::add(const TraceWindowData& w) {
  Impl& m = *impl_;
  m.check_window(w);
  const Stopwatch watch;
  const double hashed_before = m.hash_seconds;
  const CacheShape& s = m.info.shape;
  const int64_t n = static_cast<int64_t>(w.token_id.size());
  const int64_t first_token = static_cast<int64_t>(m.token_id.size()),
                first_query = static_cast<int64_t>(m.query_token.size());
  if (m.doc.empty() || w.document != m.doc.back()) {
    m.flush_document();
    for (auto& [name, sum] : m.sums) sum.sum.clear();
    m.moment_count.push_back(0);
  }
  const Hdf5Type stored = stored_type(m.info.stored);
  std::vector<Impl::RowJob> jobs;
  for (int l = 0; l < s.layers; ++l) {
    const size_t i = static_cast<size_t>(l);
    jobs.push_back({"key", stored, l, s.kv_heads, &w.key[i], first_token});
    jobs.push_back({"value", stored, l, s.kv_heads, &w.value[i], first_token});
    jobs.push_back({"query", stored, l, s.q_heads, &w.query[i], first_query});
    if (m.info.gradients.empty()) continue;
    for (const GradientOf of : kGradientsOf) {
      const char* name = squared_gradient_name(of);
      jobs.push_back(
          {name, m.layout.at(name).type, l, s.kv_heads, &w.squared_gradient[static_cast<size_t>(of)][i], first_token});
    }
  }
  m.add_rows(jobs, jobs.size() / static_cast<size_t>(s.layers));
  for (int l = 0; l < s.layers; ++l) {
    const size_t i = static_cast<size_t>(l);
    m.add_mass("received_mass", l, w.received_mass[i], n);
    m.add_mass("received_mass2", l, w.received_mass2[i], n);
    m.add_sum("query_moment", i, w.query_moment[i]);
    m.add_sum("query_pair_moment", i, w.query_pair_moment[i]);
    if (m.info.gradients.empty()) continue;
    for (const GradientOf of : kGradientsOf)
      m.add_sum(gradient_moment_name(of), i, w.gradient_moment[static_cast<size_t>(of)][i]);
  }
  m.moment_count.back() += n * m.group();
  for (int64_t t = 0; t < n; ++t) {
    m.token_id.push_back(w.token_id[static_cast<size_t>(t)]);
    m.position.push_back(static_cast<int32_t>(t));
    m.doc.push_back(w.document);
    m.window.push_back(static_cast<int32_t>(m.windows));
  }
  m.token_type.insert(m.token_type.end(), w.token_type.begin(), w.token_type.end());
  for (const int32_t q : w.query_token) m.query_token.push_back(static_cast<int32_t>(first_token) + q);
  ++m.windows;
  m.write_seconds += watch.seconds() - (m.hash_seconds - hashed_before);
}

void TraceWriter::output_weight(int layer, ConstMatrix w) {
  Impl& m = *impl_;
  const CacheShape& s = m.info.shape;
  VQKV_CHECK(m.info.hidden > 0 && layer >= 0 && layer < s.layers && w.rows == m.info.hidden &&
             w.cols == int64_t{s.q_heads} * s.head_dim);
  const Stopwatch watch;
  const Hdf5Type type = stored_type(m.info.stored);
  const int64_t row_bytes = w.cols * static_cast<int64_t>(hdf5_type_size(type));
  std::vector<uint8_t> scratch(static_cast<size_t>(w.rows * row_bytes));
  for (int64_t r = 0; r < w.rows; ++r) narrow(w.row(r), scratch.data() + r * row_bytes, w.cols, type);
  if (any_not_finite(scratch.data(), w.size(), type))
    fail_data(fmt::format("{}: W_O of layer {} holds a value that is not finite", m.path, layer));
  const Stopwatch hash_watch;
  ContentHash hash;
  hash.update(scratch.data(), scratch.size());
  m.output_hash[static_cast<size_t>(layer)] = hash.hex();
  const double hashed = hash_watch.seconds();
  m.output.write({layer, 0, 0}, {1, w.rows, w.cols}, scratch.data());
  m.hash_seconds += hashed;
  m.write_seconds += watch.seconds() - hashed;
}

void TraceWriter::Impl::write_vector(const std::string& name, const void* data, TraceHash& hash) {
  const TraceDataset& d = layout.at(name);
  vectors[name] = create(d);
  vectors[name].write_all(data);
  if (d.hash_lead >= 0) {
    ContentHash h;
    h.update(data, static_cast<size_t>(d.count()) * hdf5_type_size(d.type));
    hash.dataset(d, {h.hex()});
  }
}

Hdf5Dataset& TraceWriter::Impl::dataset(const std::string& name) {
  if (streams.count(name)) return streams.at(name).dataset();
  if (sums.count(name)) return sums.at(name).dataset;
  if (name == "output_weight") return output;
  return vectors.at(name);
}

void TraceWriter::finish() {
  Impl& m = *impl_;
  const Stopwatch watch;
  const int64_t tokens = static_cast<int64_t>(m.token_id.size()), queries = static_cast<int64_t>(m.query_token.size());
  if (m.moment_count.size() != m.documents.size())
    fail_internal(
        fmt::format("{}: {} documents announced, {} written", m.path, m.documents.size(), m.moment_count.size()));
  VQKV_CHECK(tokens > 0 && queries > 0);
  for (const std::string& h : m.output_hash) VQKV_CHECK(!h.empty());
  m.flush_document();

  const auto tables =
      trace_datasets(sizes_of(m.info, tokens, queries, static_cast<int64_t>(m.documents.size())), m.info.stored);
  // Chunk shapes stay those of creation; dims are final now.
  for (const TraceDataset& d : tables) m.layout.at(d.name).dims = d.dims;
  TraceHash hash(m.info.keys_pre_rope, m.model_json);
  std::vector<int32_t> index;
  for (const TraceDataset& d : tables) {
    if (m.streams.count(d.name)) {
      RowStreams& s = m.streams.at(d.name);
      s.finish(d.dims[2]);
      hash.dataset(d, s.hashes());
    } else if (m.sums.count(d.name)) {
      hash.dataset(d, {m.sums.at(d.name).hash.hex()});
    } else if (d.name == "output_weight") {
      hash.dataset(d, m.output_hash);
    } else if (d.name == "moment_count") {
      m.write_vector(d.name, m.moment_count.data(), hash);
    } else {
      const std::map<std::string, const std::vector<int32_t>*> named{
          {"layer", &m.info.layer_index}, {"token_id", &m.token_id},
          {"position", &m.position},      {"doc", &m.doc},
          {"window", &m.window},          {"query_token", &m.query_token},
          {"token_type", &m.token_type}};
      const auto it = named.find(d.name);
      if (it == named.end()) {
        index.resize(static_cast<size_t>(d.dims[0]));
        for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int32_t>(i);
      }
      m.write_vector(d.name, (it == named.end() ? index : *it->second).data(), hash);
    }
  }
  // Named axes: every coordinate is a dimension scale, every data axis has its scale and label.
  for (const TraceDataset& d : tables)
    if (d.is_coordinate()) m.file.make_scale(m.dataset(d.name), d.name);
  for (const TraceDataset& d : tables) {
    if (d.is_coordinate()) continue;
    Hdf5Dataset& data = m.dataset(d.name);
    for (size_t i = 0; i < d.axes.size(); ++i) {
      m.file.attach_scale(data, static_cast<int>(i), m.dataset(d.axes[i]));
      m.file.label_axis(data, static_cast<int>(i), d.axes[i]);
    }
  }
  m.info.content_hash = hash.hex();
  m.file.write_text("/", "keys", m.info.keys_pre_rope ? "pre_rope" : "post_rope");
  m.file.write_text("/", "model_json", m.model_json);
  m.file.write_text("/", "provenance_json",
                    canonical_json(m.info.provenance.is_null() ? Json::object() : m.info.provenance));
  m.file.write_text("/", "documents_json", canonical_json(m.documents));
  m.file.write_text("/", "content_xxh3", m.info.content_hash);
  m.file.write_int("/", "complete", 1);  // last
  m.vectors.clear();
  m.streams.clear();
  m.sums.clear();
  m.output = {};
  m.file.close();
  for (const TraceDataset& d : tables) m.stored_bytes += d.stored_bytes();
  m.target->commit();
  m.write_seconds += watch.seconds();
}

const std::string& TraceWriter::records_gradients() const { return impl_->info.gradients; }
bool TraceWriter::records_output_weight() const { return impl_->info.hidden > 0; }
double TraceWriter::hash_seconds() const { return impl_->hash_seconds; }
double TraceWriter::write_seconds() const { return impl_->write_seconds; }
int64_t TraceWriter::bytes_written() const { return impl_->stored_bytes; }

int64_t TraceWriter::estimate_bytes(const TraceInfo& info, int64_t tokens, int64_t queries, int64_t documents) {
  size_t total = size_t{256} << 10;  // headers, chunk index, attributes
  for (const TraceDataset& d : trace_datasets(sizes_of(info, tokens, queries, documents), info.stored))
    total = checked_add(total, static_cast<size_t>(d.stored_bytes()), "trace size");
  return static_cast<int64_t>(total);
}

}  // namespace vqkv
