// Every registered transform, with a table and a levels code behind it, through every attention path.
#include <map>

#include "attention/plan_codec.h"
#include "attention/scan_cpu.h"
#include "codec/codec_archive.h"
#include "codec/transform/transform.h"
#include "support/catch.h"
#include "support/method_configs.h"
#include "support/sweep_trace.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

const Json kCodes[] = {{{"name", "pq"}, {"codebooks", 8}, {"bits", 4}, {"iterations", 3}, {"points", 16}},
                       {{"name", "rtn"}, {"bits", 4}, {"group", 16}}};

}  // namespace

TEST_CASE("every transform goes through every attention path", "[conformance][transform]") {
  CachePolicy policy;
  policy.sinks = 4;
  policy.k = {40, 32};
  policy.v = {33, 32};
  const auto reference = make_attention_backend("reference");
  for (const TransformKind* kind : all_transforms()) {
    const std::string name = kind->describe().name;
    std::map<std::string, int> ran;
    for (const Json& codec : kCodes)
      for (const char* rope : {"post", "pre"})
        for (const int heads : {1, 2}) {
          if (!takes(*kind, Role::kKey, rope)) continue;
          const CacheShape shape = make_shape(1, 3, 2, 64);
          Json config = codec;
          config["heads"] = heads;
          config["k"] = {{"rope", rope}, {"transform", Json::array({"center", test_transform(name), "identity"})}};
          if (takes(*kind, Role::kValue))
            config["v"] = {{"transform", Json::array({test_transform(name), "hadamard"})}};
          const CodecPlan plan = resolve_codec(config, shape);
          CAPTURE(name, codec.dump(), rope, heads, plan.skip);
          REQUIRE(plan.skip.empty());
          const auto set = train_codec_set(plan, shape, MadeUp(300), {});
          const Tokens x(shape, 200, 21);
          const Replay want = replay(set, policy, *reference, x, 23);
          CHECK(want.coded_share() > 0.2);
          for (const std::string& path : attention_backend_names()) {
            const auto backend = make_attention_backend(path);
            bool can = true;
            for (const TrainedUnit& u : set->units()) can = can && !backend->can(u.codec->plan(), u.spec.unit.role);
            if (!can) continue;
            CAPTURE(path);
            const double tolerance = path == "cpu-table8" ? 0.1 : path == "cpu-table" ? 0.01 : 1e-4;
            for (const int64_t block : {1, 23})
              CHECK(worst_difference(want.out, replay(set, policy, *backend, x, block).out) < tolerance);
            ++ran[path];
          }
        }
    INFO(name);
    for (const std::string& path : attention_backend_names()) CHECK(ran[path] > 0);
  }
}

TEST_CASE("a set behind every transform keeps its codes in an archive", "[conformance][transform]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  for (const TransformKind* kind : all_transforms()) {
    const std::string name = kind->describe().name;
    CAPTURE(name);
    Json config = kCodes[0];
    config["heads"] = 2;
    config["k"] = {{"transform", Json::array({test_transform(name)})}};
    if (takes(*kind, Role::kValue)) config["v"] = config["k"];
    const auto set = train_codec_set(resolve_codec(config, shape), shape, MadeUp(300), {});
    const TestFolder folder;
    save_codec_set(*set, folder / "set.vqkv", Json::object());
    const CodecSet loaded = load_codec_set(folder / "set.vqkv");
    CHECK(loaded.constant_bytes() == set->constant_bytes());
    for (size_t u = 0; u < set->units().size(); ++u) {
      const Codec &a = *set->units()[u].codec, &b = *loaded.units()[u].codec;
      const Matrix<float> x = rows_of(50, set->units()[u].spec.unit, 5);
      CodeBlock codes, again;
      a.encode(x, codes);
      b.encode(x, again);
      CHECK(codes.fields == again.fields);
      CHECK(codes.sides == again.sides);
      Matrix<float> y(x.rows, x.cols), z = y;
      a.decode(codes, y);
      b.decode(again, z);
      CHECK(y.storage == z.storage);
    }
  }
}
