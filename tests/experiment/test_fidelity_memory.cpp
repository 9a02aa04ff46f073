// Attention rows are held in tiles of queries: the numbers stay, and memory no longer grows with queries x tokens.
#include <cmath>

#include "codec/build.h"
#include "experiment/fidelity.h"
#include "experiment/plan.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

Json cell_of(const std::string& trace) {
  Config config = parse_yaml(
      "trace: {train: [0], select: [1], report: [2, 3]}\ncodec: {name: kivi, bits: 2, group: 16}\n"
      "cache: {sinks: 4, window: 16, flush: 16}\n",
      "t.yaml");
  config.tree["trace"]["path"] = trace;
  return make_cell(config);
}

}  // namespace

TEST_CASE("measuring in tiles of queries gives the numbers of whole windows", "[fidelity]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5";
  write_sweep_trace(trace, 4, 320, 1, 2);
  const TraceReader reader(trace);
  const Json cell = cell_of(trace);
  const TraceRows rows(reader, config_of(cell));
  const auto codecs =
      train_codec_set(plan_in_scope(resolve_codec(rows.config().codec, reader.info().shape), rows.scope()),
                      rows.scope().shape, rows, {});
  const auto measured = [&](const ScoreLimits& limits) {
    return measure_fidelity(
        rows, *codecs, [](int) {}, limits);
  };
  const FidelityResult whole = measured({});
  REQUIRE(whole.report.size() > 10);
  for (const ScoreLimits limits : {ScoreLimits{1, 1}, ScoreLimits{5 * 640, 12 * 640}, ScoreLimits{1 << 22, 640 * 41}}) {
    const FidelityResult tiled = measured(limits);
    for (const auto& [a, b] : {std::pair{&whole.report, &tiled.report}, std::pair{&whole.select, &tiled.select}}) {
      REQUIRE(a->size() == b->size());
      for (size_t i = 0; i < a->size(); ++i) {
        const Measurement &x = (*a)[i], &y = (*b)[i];
        INFO(x.tag << " in tiles of " << limits.tile);
        CHECK(x.tag == y.tag);
        CHECK(x.n == y.n);
        CHECK(std::fabs(x.value - y.value) <= 1e-6 * std::fabs(x.value) + 1e-9);
        CHECK(std::fabs(x.stderr_ - y.stderr_) <= 1e-4 * std::fabs(x.stderr_) + 1e-9);
      }
    }
    CHECK(tiled.coded_share_k == whole.coded_share_k);
    CHECK(tiled.coded_values == whole.coded_values);
  }
}

TEST_CASE("the scores in memory are those of the limits, whatever the context", "[fidelity]") {
  const ScoreLimits limits{1000, 5000};
  const auto window = [](int64_t tokens, int64_t queries) {
    EvalWindow w;
    w.window.tokens = tokens;
    w.query_row.resize(static_cast<size_t>(queries));
    return w;
  };
  CHECK(limits.peak({window(10, 5)}, 2) == 100);
  CHECK(limits.peak({window(10, 5), window(10, 40)}, 2) == 900);
  CHECK(limits.peak({window(10, 100'000)}, 2) == 5000);
  CHECK(limits.peak({window(100, 100'000), window(10, 100'000)}, 2) == 5000);
  CHECK(limits.peak({window(4000, 7)}, 2) == 8000);  // one query's is the least
  CHECK(limits.peak({window(10, 0)}, 2) == 0);
}
