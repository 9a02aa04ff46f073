// `cache: {coded: image}`: which tokens of a text are coded, and what does not go with it.
#include "cache/policy.h"
#include "codec/codec_set.h"
#include "core/json.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/error_of.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {
const Json kImages = {{"coded", "image"}};
}

TEST_CASE("coded: image codes an image once it is there and no text, whatever query looks", "[policy]") {
  const CachePolicy policy = CachePolicy::from_json(kImages);
  CHECK(policy.keeps_codes());
  for (const Role role : {Role::kKey, Role::kValue}) {
    for (const CachePolicy& text : {policy, policy.of_text({}), policy.of_text({7, 7})})
      for (const int64_t n : {1, 100, 100'000}) {
        CHECK(text.coded_end(role, n - 1) <= text.sinks);
        CHECK(text.coded_among(role, n) <= text.sinks);
        CHECK(text.coded_at_last(role, n) <= text.sinks);
      }
    const CachePolicy own = policy.of_text({41, 617});
    CHECK(own.sinks == 41);
    CHECK(own.fitted_from == 41);
    for (const int64_t position : {0, 40, 41, 615})
      CHECK(own.coded_end(role, position) == std::min(position + 1, int64_t{41}));
    for (const int64_t position : {616, 617, 5000}) CHECK(own.coded_end(role, position) == 617);
    CHECK(own.coded_among(role, 616) == 41);
    CHECK(own.coded_among(role, 617) == 617);
    CHECK(own.coded_at_last(role, 5000) == 617);
  }
  // Any other policy holds for every text.
  const CachePolicy window = CachePolicy::from_json({{"window", 8}}).of_text({41, 617});
  CHECK(window.sinks == 4);
  CHECK(window.waits == 0);
}

TEST_CASE("coded: image says by itself what is exact", "[policy]") {
  const Json canonical = canonical_cache_config(kImages);
  CHECK(canonical_cache_config(canonical) == canonical);
  CHECK(canonical.at("coded") == "image");
  CHECK(canonical_cache_config({{"coded", "image"}, {"exact_dtype", "bf16"}, {"policy", "all"}, {"window", nullptr}})
            .at("exact_dtype") == "bf16");
  // Written out or not, the default is one identity.
  CHECK(canonical_cache_config({{"coded", "all"}}) == canonical_cache_config(Json::object()));
  const Json refused = {{"sinks", 4},    {"window", 16},          {"flush", 8},           {"rule", "kivi"},
                        {"prompt", 100}, {"policy", "streaming"}, {"k", {{"window", 16}}}};
  for (const auto& [key, value] : refused.items()) {
    Json config = kImages;
    config[key] = value;
    check_says(error_of([&, &config = config] { canonical_cache_config(config); }),
               {("cache." + key).c_str(), "coded: image"});
  }
  check_says(error_of([] { canonical_cache_config({{"coded", "images"}}); }), {"cache.coded", "image"});
}

TEST_CASE("codecs that look at a prompt's queries, code in blocks or by age don't go with coded: image", "[policy]") {
  const CacheShape shape = make_shape(1, 2, 2, 64);
  const auto conflict = [&](const Json& codec) {
    return cache_conflict(CachePolicy::from_json(kImages), resolve_codec(codec, shape));
  };
  CHECK(conflict({{"name", "calibquant"}}).empty());
  CHECK(conflict({{"name", "rtn"}, {"bits", 4}, {"group", 32}}).empty());
  CHECK_THAT(conflict({{"name", "exact"}, {"preset", "think"}}),
             Catch::Contains("coded: image") && Catch::Contains("queries"));
  CHECK_THAT(conflict({{"name", "kivi"}, {"group", 32}}), Catch::Contains("flush 1"));
  CHECK_THAT(conflict({{"tiers", {{{"tokens", 64}, {"name", "rtn"}, {"bits", 8}}, {{"name", "rtn"}, {"bits", 4}}}}}),
             Catch::Contains("coded: image") && Catch::Contains("tiers"));
}
