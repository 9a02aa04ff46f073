// The cache rule residual: transformers' QuantizedCache.
#include "cache/policy.h"
#include "codec/build.h"
#include "core/json.h"
#include "support/cache_shape.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

// A flush at every 128th token behind the prompt, whose own queries see it exactly.
TEST_CASE("QuantizedCache's rule: the prompt whole, then 128 tokens together", "[policy][quanto]") {
  const CachePolicy p = CachePolicy::from_json({{"sinks", 0}, {"rule", "residual"}, {"prompt", 300}});
  const CachePolicy exact =
      CachePolicy::from_json({{"sinks", 0}, {"rule", "residual"}, {"prompt", 300}, {"generated", "exact"}});
  for (const Role role : {Role::kKey, Role::kValue}) {
    for (const auto& [position, end] :
         {std::pair{0, 0}, {299, 0}, {300, 300}, {427, 300}, {428, 428}, {555, 428}, {556, 556}})
      CHECK(p.coded_end(role, position) == end);
    for (const auto& [total, end] : {std::pair{299, 0}, {300, 300}, {427, 300}, {428, 428}})
      CHECK(p.coded_among(role, total) == end);
    for (const auto& [position, end] : {std::pair{299, 0}, {300, 300}, {600, 300}})
      CHECK(exact.coded_end(role, position) == end);
    CHECK(exact.coded_among(role, 300) == 300);
    CHECK(exact.coded_at_last(role, 300) == 300);
    CHECK(exact.coded_at_last(role, 299) == 0);
  }
  // Without a prompt it begins with the first token.
  const CachePolicy none = CachePolicy::from_json({{"sinks", 0}, {"rule", "residual"}, {"residual", 8}});
  CHECK(none.coded_end(Role::kKey, 7) == 0);
  CHECK(none.coded_end(Role::kKey, 8) == 8);
  const CacheShape shape = make_shape(1, 2, 2, 64);
  const auto conflict = [&](const Json& codec, const CachePolicy& policy) {
    return cache_conflict(policy, resolve_codec(codec, shape));
  };
  CHECK(conflict({{"name", "quanto"}}, p) == "");
  CHECK(conflict({{"name", "quanto"}, {"axis", -1}}, p) ==
        "cache.prompt: 300 tokens behind the sinks are not a multiple of the 64 that codec 'quanto' codes together");
  CHECK(conflict({{"name", "hqq"}, {"tokens", 300}}, exact) == "");
  CHECK(conflict({{"name", "hqq"}, {"tokens", 300}}, p).find("cache.k: flush 128 is not a multiple of the 300") == 0);
  CHECK(conflict({{"tiers", {{{"tokens", 128}, {"name", "rtn"}}, {{"name", "quanto"}}}}}, p)
            .find("cache.rule: residual codes all of cache.prompt together") == 0);
}
