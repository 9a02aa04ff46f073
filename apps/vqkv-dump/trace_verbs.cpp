// inspect and verify: what a trace holds, and whether it still holds it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "common/tool.h"
#include "core/error.h"
#include "core/log.h"
#include "core/rope.h"
#include "core/thread_pool.h"
#include "experiment/head_statistics.h"
#include "io/trace.h"
#include "verbs.h"

namespace vqkv::dump {
namespace {

constexpr int64_t kRows = 4096;  // rows held at once by a task

double gradient_rms(const TraceReader& trace, GradientOf of, int layer, int head, int64_t tokens) {
  double sum = 0;
  for (int64_t at = 0; at < tokens; at += kRows) {
    Matrix<float> square(std::min(kRows, tokens - at), trace.info().shape.head_dim);
    trace.squared_gradient(of, layer, head, at, square.rows, square);
    for (const float v : square.storage) sum += double{v};
  }
  return std::sqrt(sum / static_cast<double>(tokens * trace.info().shape.head_dim));
}

// One (layer, KV head): keys before and after RoPE, and values.
std::vector<Json> head_rows(const TraceReader& trace, const RopeTable& rope, int layer, int head, int64_t tokens) {
  const int64_t d = trace.info().shape.head_dim;
  HeadStatistics pre(d), post(d), value(d);
  for (const bool second : {false, true})
    for (int64_t at = 0; at < tokens; at += kRows) {
      const int64_t n = std::min(kRows, tokens - at);
      Matrix<float> k(n, d), v(n, d);
      trace.key(layer, head, at, n, k);
      trace.value(layer, head, at, n, v);
      Matrix<float> turned = k;
      rope_apply(rope, trace.position().data() + at, turned, !trace.info().keys_pre_rope);
      const Matrix<float>&before = trace.info().keys_pre_rope ? k : turned,
            &after = trace.info().keys_pre_rope ? turned : k;
      if (second) {
        pre.second_pass(before);
        post.second_pass(after);
        value.second_pass(v);
      } else {
        pre.first_pass(before);
        post.first_pass(after);
        value.first_pass(v);
      }
    }
  std::vector<Json> out;
  const std::pair<const char*, const HeadStatistics*> parts[] = {
      {"k pre-RoPE", &pre}, {"k post-RoPE", &post}, {"v", &value}};
  for (size_t i = 0; i < std::size(parts); ++i) {
    const auto& [name, statistics] = parts[i];
    Json row = statistics->to_json();
    if (trace.has_gradients()) row["gradient_rms"] = gradient_rms(trace, kGradientsOf[i], layer, head, tokens);
    row["layer"] = trace.info().layer_index[static_cast<size_t>(layer)];
    row["head"] = head;
    row["rows"] = name;
    out.push_back(std::move(row));
  }
  return out;
}

std::string gradients_text(const TraceReader& trace) {
  if (!trace.has_gradients()) return "not recorded";
  return fmt::format("recorded, of the NLL of {} tokens",
                     trace.info().gradients == "sampled" ? "the model's own" : "the text's next");
}

// How many tokens there are of each type, by name; null where types were not recorded.
Json tokens_by_type(const TraceReader& trace) {
  Json out;
  for (size_t type = 0; type < trace.info().token_types.size(); ++type)
    out[trace.info().token_types[type]] = std::ranges::count(trace.token_type(), static_cast<int32_t>(type));
  return out;
}

std::string token_types_text(const Json& counts) {
  if (counts.is_null()) return "not recorded, all text";
  std::string out;
  for (const auto& [type, count] : counts.items())
    out += fmt::format("{}{} {}", out.empty() ? "" : ", ", count.get<int64_t>(), type);
  return out;
}

Json trace_facts(const TraceReader& trace) {
  const TraceInfo& i = trace.info();
  const CacheShape& s = i.shape;
  Json documents = Json::array();
  for (const TraceDocument& d : trace.documents())
    documents.push_back({{"document", d.id}, {"name", d.name}, {"tokens", d.tokens}});
  int64_t longest = 0;
  for (const TraceWindow& w : trace.windows()) longest = std::max(longest, w.tokens);
  const int64_t element = static_cast<int64_t>(dtype_size(i.stored));
  return {{"path", trace.path()},
          {"file_bytes", static_cast<int64_t>(std::filesystem::file_size(trace.path()))},
          {"key_bytes", int64_t{s.layers} * s.kv_heads * s.head_dim * trace.tokens() * element},
          {"query_bytes", int64_t{s.layers} * s.q_heads * s.head_dim * trace.queries() * element},
          {"model", i.model_name},
          {"model_hash", i.model_hash},
          {"content_xxh3", i.content_hash},
          {"layers", s.layers},
          {"q_heads", s.q_heads},
          {"kv_heads", s.kv_heads},
          {"head_dim", s.head_dim},
          {"rope", s.rope.to_json()},
          {"keys", i.keys_pre_rope ? "pre_rope" : "post_rope"},
          {"dtype", std::string(dtype_name(i.stored))},
          {"tokens", trace.tokens()},
          {"tokens_by_type", tokens_by_type(trace)},
          {"queries", trace.queries()},
          {"windows", trace.windows().size()},
          {"longest_window", longest},
          {"documents", documents},
          {"output_weight", trace.has_output_weight()},
          {"gradients", i.gradients.empty() ? Json() : Json(i.gradients)},
          {"provenance", i.provenance}};
}

}  // namespace

int run_inspect(const InspectVerb& v) {
  const TraceReader trace(v.trace);
  const CacheShape& s = trace.info().shape;
  const int64_t tokens = v.max_tokens > 0 ? std::min(v.max_tokens, trace.tokens()) : trace.tokens();
  const RopeTable rope(s.rope);
  std::vector<std::vector<Json>> by_head(static_cast<size_t>(s.layers * s.kv_heads));
  Progress progress("layers", s.layers);
  for (int l = 0; l < s.layers && !interrupted(); ++l) {
    parallel_for(s.kv_heads, [&](int64_t h) {
      by_head[static_cast<size_t>(l * s.kv_heads + h)] = head_rows(trace, rope, l, static_cast<int>(h), tokens);
    });
    progress.update(l + 1);
  }
  if (interrupted()) return kExitOk;  // run_tool turns it into 128 + signal
  Table table;
  table.columns = {{"layer", ""},
                   {"head", ""},
                   {"rows", "rows", "", false},
                   {"norm", "mean norm", "{:.4g}"},
                   {"norm_cv", "cv of norm", "{:.3f}"},
                   {"mean_share", "share of mean", "{:.3f}"},
                   {"rank90", "rank"},
                   {"rank90_centred", "rank, centred"},
                   {"kurtosis", "kurtosis", "{:.2f}"},
                   {"max_abs", "max abs", "{:.4g}"},
                   {"outlier_channels", "outlier channels"},
                   {"worst_channel", "worst channel"},
                   {"worst_ratio", "its RMS / median", "{:.1f}"}};
  if (trace.has_gradients()) table.columns.push_back({"gradient_rms", "RMS of gradient", "{:.3g}"});
  for (auto& rows : by_head)
    for (Json& row : rows) table.rows.push_back(std::move(row));
  if (v.format == TableFormat::kJson) {
    Json facts = trace_facts(trace);
    facts["inspected_tokens"] = tokens;
    facts["heads"] = table.rows;
    std::puts(facts.dump(2).c_str());
    return kExitOk;
  }
  if (v.format == TableFormat::kMarkdown) {
    Table summary;
    summary.columns = {{"fact", "fact", "", false}, {"value", "value", "", false}};
    const auto say = [&](const std::string& fact, const Json& value) {
      summary.rows.push_back({{"fact", fact}, {"value", value}});
    };
    const Json f = trace_facts(trace);
    say("model", fmt::format("{} ({})", trace.info().model_name, trace.info().model_hash.substr(0, 12)));
    say("file", human_bytes(f["file_bytes"].get<double>()));
    say("key, value (layer, kv_head, token, channel)",
        fmt::format("({}, {}, {}, {}) {}, {} each", s.layers, s.kv_heads, trace.tokens(), s.head_dim,
                    dtype_name(trace.info().stored), human_bytes(f["key_bytes"].get<double>())));
    say("query (layer, q_head, query_token, channel)",
        fmt::format("({}, {}, {}, {}), {}", s.layers, s.q_heads, trace.queries(), s.head_dim,
                    human_bytes(f["query_bytes"].get<double>())));
    say("keys stored", trace.info().keys_pre_rope ? "before RoPE" : "after RoPE");
    say("RoPE", rope_text(s.rope));
    say("windows",
        fmt::format("{}, the longest of {} tokens", trace.windows().size(), f["longest_window"].get<int64_t>()));
    for (const TraceDocument& d : trace.documents())
      say(fmt::format("document {}", d.id), fmt::format("{}, {} tokens", d.name, d.tokens));
    say("token types", token_types_text(f["tokens_by_type"]));
    say("W_O", trace.has_output_weight() ? "recorded" : "not recorded");
    say("squared gradients", gradients_text(trace));
    say("content hash (XXH3-128)", trace.info().content_hash);
    if (tokens < trace.tokens()) say("inspected", fmt::format("the first {} tokens", tokens));
    print(summary, v.format);
    std::puts(
        "\nAn outlier channel has an RMS above 3 times the median channel's. Kurtosis is around each channel's mean; a "
        "Gaussian has 3. Rank: directions that hold 90 % of the rows' energy, as they are and without each channel's "
        "mean; few directions of rows with a large share of the mean are mostly that mean.\n");
  }
  print(table, v.format);
  return kExitOk;
}

int run_verify(const std::string& path, TableFormat format) {
  const TraceReader trace(path);
  const auto problems = trace.verify();
  Table table;
  table.columns = {{"trace", "trace", "", false},
                   {"ok", "ok", "", false},
                   {"tokens", ""},
                   {"content_xxh3", "content hash", "", false},
                   {"problems", "problems", "", false}};
  std::string list;
  for (const std::string& p : problems) list += (list.empty() ? "" : "; ") + p;
  const bool machine = format == TableFormat::kJson || format == TableFormat::kJsonl;
  table.rows.push_back({{"trace", path},
                        {"ok", problems.empty()},
                        {"tokens", trace.tokens()},
                        {"content_xxh3", trace.info().content_hash},
                        {"problems", machine ? Json(problems) : Json(list.empty() ? "none" : list)}});
  print(table, format);
  if (problems.empty()) return kExitOk;
  std::fflush(stdout);
  fail_data(fmt::format("{}: {}", path, list));
}

}  // namespace vqkv::dump
