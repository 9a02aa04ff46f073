#include "experiment/training_curve.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "core/error.h"
#include "experiment/fidelity.h"

namespace vqkv {
namespace {

// What a training curve is measured by: a metric and its number. Keys' share is the first; values show in outputs
// alone.
struct CurveLoss {
  const char *metric, *tag;
};
constexpr CurveLoss kCurveLosses[] = {{"softmax_kl", "attention.softmax_kl"},
                                      {"attention_output", "output.relative_error"}};
constexpr double kUndertrained = 0.05;  // the last doubling still gains more than this

// The plan with `factor` times the training of every unit, methods and transforms; false when nothing is trained in
// steps.
bool scale_effort(CodecPlan& plan, double factor) {
  bool any = false;
  const auto scale = [&](const std::vector<Knob>& knobs, Json& values) {
    for (const Knob& k : knobs) {
      const auto it = values.find(k.name);
      if (!k.effort || it == values.end() || *it == 0) continue;  // 0: a part of the training that is switched off
      *it = std::max<int64_t>(1, std::llround(it->get<double>() * factor));
      any = true;
    }
  };
  for (UnitSpec& u : plan.units) {
    scale(find_method(u.method).knobs(), u.knobs);
    for (Json& t : u.transforms) scale(find_transform(t.at("name").get<std::string>()).knobs(), t);
  }
  return any;
}

CellConfig of_curve(const CellConfig& config) {
  CellConfig out = config;
  if (!config.curve_layers.empty()) out.layers = config.curve_layers;
  return out;
}

}  // namespace

CodecPlan curve_plan(const CellConfig& config, const CacheShape& shape) {
  CodecPlan plan = plan_in_scope(resolve_codec(config.codec, shape), scope_of(of_curve(config), shape));
  if (!plan.skip.empty()) plan.skip = "train.curve: " + plan.skip;
  return plan;
}

Json training_curve(const TraceReader& reader, const CellConfig& config, const CodecSet& full, const TrainOn& train,
                    const std::function<void()>& check) {
  CellConfig measured = of_curve(config);
  measured.report = config.select;  // measured as one role of documents; report documents are not looked at
  measured.select = {};
  measured.metrics = {};
  for (const CurveLoss& loss : kCurveLosses) measured.metrics.push_back(loss.metric);
  const TraceRows rows(reader, measured);
  const CodecPlan plan = curve_plan(config, reader.info().shape);
  VQKV_CHECK(plan.skip.empty());
  CodecPlan half = plan, twice = plan;
  if (!scale_effort(half, 0.5) || !scale_effort(twice, 2.0))
    return {{"reason", "nothing here is trained in iterations"}};
  Json losses = Json::array();
  for (const CurveLoss& loss : kCurveLosses) losses.push_back({{"tag", loss.tag}});
  const auto measure = [&](const char* effort, const CodecSet& set) {
    const std::vector<Measurement> of_set = measure_fidelity(rows, set, [&](int) { check(); }).report;
    for (Json& loss : losses) {
      const auto m = std::ranges::find_if(
          of_set, [&](const Measurement& x) { return x.tag == loss["tag"] && std::isfinite(x.value); });
      if (m == of_set.end())
        fail_data(fmt::format("train.curve: the select documents give no {}; do they hold recorded queries?",
                              loss["tag"].get<std::string>()));
      loss[effort] = m->value;
    }
  };
  measure("half", *train(rows, half));
  if (config.curve_layers.empty())
    measure("full", full);
  else
    measure("full", *train(rows, plan));
  measure("twice", *train(rows, twice));
  return {{"role", "select"}, {"layers", rows.scope().layers}, {"losses", losses}};
}

bool undertrained(const Json& curve) {
  return std::ranges::any_of(curve.value("losses", Json::array()), [](const Json& loss) {
    const double full = loss.at("full"), twice = loss.at("twice");
    return full - twice > kUndertrained * full;
  });
}

}  // namespace vqkv
