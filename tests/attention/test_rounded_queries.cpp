// ggml's caches with queries rounded where they meet coded keys: every path rounds alike, exact keys meet exact
// queries.
#include "attention/plan_cases.h"
#include "attention/scan_cpu.h"
#include "core/error.h"
#include "core/json.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::shared_ptr<const CodecSet> ggml_set(const Json& keys, const CacheShape& shape) {
  const CodecPlan plan = resolve_codec({{"name", "ggml"}, {"type", "q4_0"}, {"heads", 2}, {"k", keys}}, shape);
  CAPTURE(plan.skip);
  REQUIRE(plan.skip.empty());
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) units.push_back({spec, make_codec(spec), {}});
  return std::make_shared<CodecSet>(shape, plan.config, std::move(units), "");
}

}  // namespace

TEST_CASE("ggml with rounded queries: every path gives the reference's rows, blocks those of steps", "[query]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const auto reference = make_attention_backend("reference");
  const Tokens x(shape, 330, 31);
  for (const bool rotated : {false, true}) {
    Json keys = {{"query", "q8"}}, plain = Json::object();
    if (rotated) keys["transform"] = plain["transform"] = Json::array({"hadamard"});
    const auto set = ggml_set(keys, shape), exact = ggml_set(plain, shape);
    for (const CachePolicy& policy : {policy_of(4, {40, 32}, {33, 32}), policy_of(0, {0, 32}, {0, 32})}) {
      CAPTURE(rotated, policy.sinks);
      const Replay want = replay(set, policy, *reference, x, 23);
      CHECK(want.coded_share() > 0.2);
      const double moved = worst_difference(want.out, replay(exact, policy, *reference, x, 23).out);
      CHECK(moved > 1e-4);  // and far above what paths may differ by
      CHECK(moved < 0.1);
      for (const std::string name : {"cpu-reconstruct", "cpu-table", "auto"}) {
        CAPTURE(name);
        const auto backend = make_attention_backend(name);
        REQUIRE_FALSE(backend->can(set->units()[0].codec->plan(), Role::kKey));
        const Replay blocks = replay(set, policy, *backend, x, 23), steps = replay(set, policy, *backend, x, 1);
        CHECK(worst_difference(want.out, blocks.out) < tolerance(8, 64));
        CHECK(worst_difference(want.out, steps.out) < tolerance(8, 64));
        if (name != "auto") CHECK((blocks.out.storage == steps.out.storage));
      }
    }
    // No code in sight: nothing is rounded.
    const CachePolicy window = policy_of(4, {330, 32}, {330, 32});
    CHECK((replay(set, window, *reference, x, 23).out.storage == replay(exact, window, *reference, x, 23).out.storage));
  }
}

TEST_CASE("rounded queries are refused where several tiers share the coded keys", "[query]") {
  const Json tiers = {{"tiers", Json::array({{{"tokens", 64}, {"name", "ggml"}, {"type", "q8_0"}},
                                             {{"name", "ggml"}, {"type", "q4_0"}, {"k", {{"query", "q8"}}}}})}};
  const CacheShape shape = make_shape(1, 1, 1, 64);
  const CodecPlan plan = resolve_codec(tiers, shape);
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) units.push_back({spec, make_codec(spec), {}});
  CHECK_THROWS_WITH(CodecSet(shape, plan.config, std::move(units), "", plan.tiers),
                    Catch::Contains("rounded for the whole coded segment"));
}
