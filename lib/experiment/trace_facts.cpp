#include "experiment/trace_facts.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"

namespace vqkv {
namespace {

std::string document_list(const TraceFacts& f) {
  std::string out;
  for (size_t i = 0; i < f.documents.size() && i < 12; ++i)
    out += fmt::format("{}{} {} ({} tokens)", i ? ", " : "", f.documents[i].id, f.documents[i].name,
                       f.documents[i].tokens);
  if (f.documents.size() > 12) out += fmt::format(", … {} in all", f.documents.size());
  return out;
}

}  // namespace

TraceFacts read_trace_facts(const std::string& path) {
  const TraceReader reader(path);
  const TraceInfo& info = reader.info();
  TraceFacts f;
  f.shape = info.shape;
  f.documents = reader.documents();
  Json documents = Json::array();
  for (const auto& d : f.documents) documents.push_back({{"id", d.id}, {"name", d.name}, {"tokens", d.tokens}});
  f.json = {{"path", path},
            {"content_hash", info.content_hash},
            {"model_name", info.model_name},
            {"model_hash", info.model_hash},
            {"layers", info.shape.layers},
            {"q_heads", info.shape.q_heads},
            {"kv_heads", info.shape.kv_heads},
            {"head_dim", info.shape.head_dim},
            {"tokens", reader.tokens()},
            {"queries", reader.queries()},
            {"documents", documents}};
  return f;
}

void check_against_trace(const Config& config, const CellConfig& c, const TraceFacts& f) {
  const auto check_documents = [&](const char* role, const std::vector<int64_t>& ids) {
    for (const int64_t id : ids) {
      const bool known =
          std::any_of(f.documents.begin(), f.documents.end(), [&](const TraceDocument& d) { return d.id == id; });
      if (!known)
        fail_usage(fmt::format("{}: trace.{}: document {} is not in {}, which has {}",
                               config.where(std::string("trace.") + role), role, id, c.trace, document_list(f)));
    }
  };
  check_documents("train", c.train);
  check_documents("select", c.select);
  check_documents("report", c.report);
  const auto check_layers = [&](const std::string& key, const std::vector<int64_t>& layers) {
    for (const int64_t l : layers)
      if (l >= f.shape.layers)
        fail_usage(fmt::format("{}: {}: {} is not in {}, which has layers 0 to {}", config.where(key), key, l, c.trace,
                               f.shape.layers - 1));
  };
  check_layers("layers", c.layers);
  check_layers("train.curve", c.curve_layers);
  for (const int64_t h : c.heads)
    if (h >= f.shape.kv_heads)
      fail_usage(fmt::format("{}: heads: {} is not in {}, which has KV heads 0 to {}", config.where("heads"), h,
                             c.trace, f.shape.kv_heads - 1));
}

}  // namespace vqkv
