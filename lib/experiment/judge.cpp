#include "experiment/judge.h"

#include <fmt/format.h>

#include "config/config.h"
#include "core/error.h"
#include "experiment/fidelity.h"
#include "experiment/protocol.h"
#include "experiment/trace_facts.h"
#include "io/recon.h"
#include "io/trace_check.h"
#include "metric/metric.h"

namespace vqkv {
namespace {

class ReconSource final : public DecodedSource {
 public:
  ReconSource(const ReconReader& recon, const TraceRows& rows) : recon_(recon), rows_(rows) {}
  void decoded(int layer, int head, const EvalWindow& w, MutMatrix k_hat, MutMatrix v_hat) const override {
    const int real_layer = rows_.scope().layers.at(static_cast<size_t>(layer)),
              real_head = rows_.scope().heads.at(static_cast<size_t>(head));
    recon_.key(real_layer, real_head, w.window.first_token, w.window.tokens, k_hat);
    recon_.value(real_layer, real_head, w.window.first_token, w.window.tokens, v_hat);
    if (!recon_.keys_pre_rope()) rope_apply(rows_.rope(), w.position.data(), k_hat, true);
  }

 private:
  const ReconReader& recon_;
  const TraceRows& rows_;
};

}  // namespace

Json judge(const JudgeOptions& options) {
  const auto reader = open_verified_trace(options.trace);
  const TraceReader& trace = *reader;
  const ReconReader recon(options.recon, trace);
  Config config;
  std::vector<int32_t> all;
  for (const auto& d : trace.documents()) all.push_back(d.id);
  config.tree = {
      {"trace", {{"path", options.trace}, {"report", all}}}, {"codec", {{"name", "exact"}}}, {"cache", Json::object()}};
  for (const auto& o : options.overrides) {
    for (const char* fixed :
         {"codec", "trace.path", "trace.train", "trace.select", "contexts", "sequences", "sweep", "seed", "train"})
      if (o.starts_with(std::string(fixed) + "=") || o.starts_with(std::string(fixed) + "."))
        fail_usage(fmt::format("{}: {} has no meaning for `judge`: the codec is the other program's", o, fixed));
    apply_override(config, o);
  }
  const CellConfig cell = read_cell_config(config);
  check_against_trace(config, cell, read_trace_facts(options.trace));
  const bool named = ConfigReader(config, "").has("metrics") && config.tree.at("metrics") != "all";
  for (const auto& name : cell.metrics)  // `all` means all that there are for rows
    if (named && find_metric(name).describe().of_codes)
      fail_usage(fmt::format("{}: metrics: {} counts codes, and a file of keys and values holds none",
                             config.where("metrics"), name));
  const TraceRows rows(trace, cell);
  if (!cell.policy().codes) fail_usage(fmt::format("{}: cache.rule: none codes nothing", config.where("cache.rule")));
  if (!cell.policy().keeps_codes())
    fail_usage(fmt::format("{}: cache.policy: no coded token stays, so no reconstruction is read",
                           config.where("cache.policy")));
  if (const std::string reason = rows.codes_nothing(); !reason.empty())
    fail_usage(fmt::format("{}: cache: {}{}", config.where("cache.window"), reason,
                           cell.policy().codes_images ? "" : "; write cache.window=N for a narrower window"));
  FidelityResult f;
  try {
    f = measure_fidelity(rows, ReconSource(recon, rows), [&](int) {
      if (options.stop && options.stop()) throw Stopped();
    });
  } catch (const Stopped&) { return Json(); }
  Json out = {
      {"measurements", Json::array()}, {"config", cell.canonical()}, {"protocol", protocol_text(cell.policy())}};
  for (const auto& m : f.report) {
    Json j = to_json(m);
    j["role"] = "report";
    out["measurements"].push_back(std::move(j));
  }
  const CacheShape& s = trace.info().shape;
  const double values = 2.0 * s.layers * s.kv_heads * s.head_dim * static_cast<double>(trace.tokens());
  for (const auto& [tag, value, unit] :
       {std::tuple{"bytes", static_cast<double>(options.bytes), "bytes"},
        std::tuple{"bits_per_value.codes", 8.0 * static_cast<double>(options.bytes) / values, "bits/value"}})
    out["measurements"].push_back({{"role", "cost"},
                                   {"tag", tag},
                                   {"value", value},
                                   {"unit", unit},
                                   {"stderr", 0},
                                   {"n", 1},
                                   {"better", "lower"},
                                   {"exact", true}});
  out["coverage"] = {{"report_tokens", rows.tokens(true)},
                     {"report_queries", rows.queries(true)},
                     {"coded_share_k", f.coded_share_k},
                     {"coded_share_v", f.coded_share_v}};
  return out;
}

}  // namespace vqkv
