#include "experiment/cell_config.h"

#include <fmt/format.h>

#include <algorithm>

#include "codec/codec_set.h"
#include "core/error.h"
#include "metric/metric.h"

namespace vqkv {
namespace {

constexpr int64_t kMaxDocument = 1'000'000;
constexpr int64_t kMaxTokens = int64_t{1} << 24;

Json all_or_list(const std::vector<int64_t>& v) { return v.empty() ? Json("all") : Json(v); }

void refuse_overlap(const Config& config, const char* a, const std::vector<int64_t>& x, const char* b,
                    const std::vector<int64_t>& y) {
  for (const int64_t d : x)
    if (std::find(y.begin(), y.end(), d) != y.end())
      fail_usage(fmt::format("{}: trace.{}: document {} also stands in trace.{}; documents have one role",
                             config.where(std::string("trace.") + a), a, d, b));
}

}  // namespace

CellConfig read_cell_config(const Config& config, bool measured) {
  CellConfig c;
  refuse_dotted_keys(config);
  ConfigReader top(config, "");
  for (const char* section : {"trace", "codec", "cache", "train"}) top.raw(section);
  ConfigReader trace(config, "trace");
  c.trace = trace.text("path", "");
  c.train = trace.integers("train", 0, kMaxDocument, false);
  c.select = trace.integers("select", 0, kMaxDocument, false);
  c.report = trace.integers("report", 0, kMaxDocument, false);
  c.train_tokens = trace.integer("train_tokens", 0, 0, int64_t{1} << 40);
  c.queries = trace.integer("queries", 0, 0, kMaxTokens);
  trace.finish();
  const bool documents = !c.train.empty() || !c.select.empty() || !c.report.empty();
  if (c.trace.empty() && (measured || documents))
    trace.fail("path", "the trace to sweep over is missing; write trace.path=FILE.trace.h5");
  if (c.report.empty() && measured)
    trace.fail("report", "no document to report on; `vqkv-dump inspect` lists a trace's documents");
  refuse_overlap(config, "train", c.train, "select", c.select);
  refuse_overlap(config, "train", c.train, "report", c.report);
  refuse_overlap(config, "select", c.select, "report", c.report);
  for (auto* list : {&c.train, &c.select, &c.report}) std::sort(list->begin(), list->end());

  const Json* codec = find_path(config.tree, "codec");
  if (!codec || codec->is_null())
    fail_usage(
        fmt::format("{}: codec: no codec is configured; `vqkv-sweep ls codecs` lists them", config.where("codec")));
  c.codec = annotated(config, [&] { return canonical_codec_config(*codec); });
  const Json* cache = find_path(config.tree, "cache");
  const bool own_cache = cache && !cache->is_null();
  c.cache = annotated(config, [&] {
    if (own_cache) return canonical_cache_config(*cache);
    const Json asked = preset_cache_config(*codec);
    return canonical_cache_config(asked.is_null() ? Json::object() : asked);
  });
  annotated(config, [&] { return c.policy(); });  // rules that don't go with the policy

  c.layers = top.integers("layers", 0, 100'000, true);
  c.heads = top.integers("heads", 0, 100'000, true);
  std::sort(c.layers.begin(), c.layers.end());
  std::sort(c.heads.begin(), c.heads.end());
  const bool all_metrics_wanted = !top.has("metrics") || top.raw("metrics") == Json("all");
  if (all_metrics_wanted) {
    top.raw("metrics");
    for (const MetricKind* m : all_metrics()) c.metrics.push_back(m->describe().name);
  } else {
    c.metrics = top.texts("metrics");
    for (const auto& name : c.metrics)
      annotated(config, [&] {
        try {
          find_metric(name);
        } catch (const Error& e) { fail_usage(fmt::format("metrics: {}", e.what())); }
      });
  }
  std::sort(c.metrics.begin(), c.metrics.end());
  if (std::adjacent_find(c.metrics.begin(), c.metrics.end()) != c.metrics.end())
    top.fail("metrics", "a metric stands twice");
  c.contexts = top.integers("contexts", 1, kMaxTokens, false);
  if (!top.has("contexts")) c.contexts = {4096, 32768};
  c.sequences = top.integers("sequences", 1, 1'000'000, false);
  if (!top.has("sequences")) c.sequences = {1, 64};
  c.seed = top.integer("seed", 0, 0, INT64_MAX);
  top.finish();
  ConfigReader train(config, "train");
  if (const Json& curve = train.raw("curve"); curve.is_null() || curve.is_boolean()) {
    c.curve = train.boolean("curve", false);
  } else {
    c.curve = true;
    c.curve_layers = train.integers("curve", 0, 100'000, false);
    std::sort(c.curve_layers.begin(), c.curve_layers.end());
    for (const int64_t l : c.curve_layers)
      if (!c.layers.empty() && !std::binary_search(c.layers.begin(), c.layers.end(), l))
        train.fail("curve", fmt::format("layer {} is none of the cell's (layers)", l));
  }
  if (c.curve && c.select.empty())
    train.fail("curve", "a training curve is measured on select documents; name some in trace.select");
  train.finish();
  return c;
}

Json CellConfig::canonical() const {
  return {{"trace",
           {{"path", trace},
            {"train", train},
            {"select", select},
            {"report", report},
            {"train_tokens", train_tokens},
            {"queries", queries}}},
          {"codec", codec},
          {"cache", cache},
          {"layers", all_or_list(layers)},
          {"heads", all_or_list(heads)},
          {"metrics", metrics},
          {"contexts", contexts},
          {"sequences", sequences},
          {"seed", seed},
          {"train", {{"curve", curve_layers.empty() ? Json(curve) : Json(curve_layers)}}}};
}

}  // namespace vqkv
