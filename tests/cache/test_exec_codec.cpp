// A codec in another program, as a cache sees it; what children may do wrong stands in tests/cli/test_exec_cli.cpp.
#include "cache/exec_codec.h"

#include "cache/view.h"
#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "support/cache_shape.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;
using Catch::Contains;

namespace {

const ExecOptions kGood{.command = "python3 '" VQKV_SOURCE_DIR "/tests/cli/exec_child.py' good"};

void feed_noise(CompressedCache& cache, int64_t n, uint64_t seed) {
  Rng rng(seed);
  Matrix<float> k(n, 16), v(n, 16);
  for (float& x : k.storage) x = static_cast<float>(rng.normal());
  for (float& x : v.storage) x = static_cast<float>(rng.normal());
  cache.begin_block(n);
  cache.append(0, k, v);
  cache.end_block();
}

}  // namespace

TEST_CASE("a codec in another program serves one sequence after another, and counts what each claims",
          "[cache][exec]") {
  CachePolicy policy;
  policy.sinks = 2;
  policy.k = {8, 4};
  policy.v = {4, 4};
  const ExecCodec exec(make_shape(1, 1, 2, 8), policy, kGood);
  CHECK(exec.name() == "child");
  CHECK(exec.claimed_bytes() == 0);
  for (const int64_t tokens : {40, 24}) {
    CompressedCache cache(exec.codecs(), policy);
    feed_noise(cache, tokens, 1);
    const int64_t coded =
        cache.coded_end(Role::kKey, tokens) + cache.coded_end(Role::kValue, tokens) - 2 * policy.sinks;
    CHECK(coded > 0);
    CHECK(exec.claimed_bytes() == coded * 16 / 2);  // 4 bits a value, as this child says
    CompressedCache second(exec.codecs(), policy);
    CHECK_THROWS_WITH(feed_noise(second, tokens, 2), Contains("one sequence at a time"));
  }
  const auto other = exec.under(CachePolicy{.sinks = 0, .k = {1, 1}, .v = {1, 1}});
  CompressedCache cache(exec.codecs(), policy), beside(other->codecs(), {.sinks = 0, .k = {1, 1}, .v = {1, 1}});
  feed_noise(cache, 40, 3);
  feed_noise(beside, 40, 3);
  CHECK(other->claimed_bytes() == (40 + 40) * 16 / 2);
}

TEST_CASE("a codec in another program is refused under a policy that gives tokens up", "[cache][exec]") {
  const CachePolicy policy = CachePolicy::from_json(
      canonical_cache_config({{"window", 8}, {"flush", 4}, {"policy", {{"name", "h2o"}, {"interval", 16}}}}));
  CHECK_THROWS_WITH(ExecCodec(make_shape(1, 1, 2, 8), policy, kGood), Contains("a policy that gives tokens up (h2o"));
}
