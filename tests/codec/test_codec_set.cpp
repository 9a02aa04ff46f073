#include "codec/codec_set.h"

#include "core/error.h"
#include "core/json.h"
#include "support/cache_shape.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

Json json(const std::string& text) { return parse_json(text, "test"); }

const UnitSpec& unit_at(const CodecPlan& plan, int layer, Role role, int head) {
  for (const UnitSpec& u : plan.units)
    if (u.unit.layer == layer && u.unit.role == role && head >= u.unit.first_head &&
        head < u.unit.first_head + u.unit.heads)
      return u;
  throw std::runtime_error("no such unit");
}

}  // namespace

TEST_CASE("common knobs hold for both roles, k and v refine them", "[codec_set]") {
  const Json c =
      canonical_codec_config(json(R"({"name": "rtn", "bits": 3, "group": 64, "rope": "pre", "v": {"bits": 2}})"));
  CHECK(c["k"]["bits"] == 3);
  CHECK(c["v"]["bits"] == 2);
  CHECK(c["v"]["group"] == 64);
  CHECK(c["k"]["rope"] == "pre");
  CHECK_FALSE(c["v"].contains("rope"));
  CHECK(c["k"]["clip"] == 1.0);
  CHECK(c["k"]["heads"] == 1);
  CHECK(canonical_json(canonical_codec_config(c)) == canonical_json(c));
}

TEST_CASE("a role that names another method starts from its defaults", "[codec_set]") {
  const Json c = canonical_codec_config(
      json(R"({"name": "rtn", "axis": "channel", "heads": 3, "v": {"name": "kivi", "group": 64}})"));
  CHECK(c["k"]["axis"] == "channel");
  CHECK(c["v"]["name"] == "kivi");
  CHECK(c["v"]["bits"] == 2);
  CHECK(c["v"]["heads"] == 3);
}

TEST_CASE("presets are a starting point", "[codec_set]") {
  const Json c = canonical_codec_config(json(R"({"name": "rtn", "preset": "quarot", "v": {"bits": 3}})"));
  CHECK(c["k"]["mode"] == "integer_zero");
  CHECK(c["k"]["clip"] == 0.95);
  CHECK(c["k"]["transform"][0]["name"] == "hadamard");
  CHECK(c["v"]["bits"] == 3);
  CHECK(c["v"]["clip"] == 0.95);
  CHECK_THROWS_WITH(canonical_codec_config(json(R"({"name": "rtn", "preset": "quarrot"})")), Catch::Contains("quarot"));
  CHECK_THROWS_WITH(canonical_codec_config(json(R"({"name": "kivi", "preset": ""})")), Catch::Contains("default"));
}

TEST_CASE("mistakes are named with what was allowed", "[codec_set]") {
  const auto message = [](const char* text) -> std::string {
    try {
      resolve_codec(parse_json(text, "test"), make_shape(2, 3, 3, 64));
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      return e.what();
    }
    return "no error";
  };
  CHECK_THAT(message(R"({"bits": 3})"), Catch::Contains("name"));
  CHECK_THAT(message(R"({"name": "rtm"})"), Catch::Contains("did you mean 'rtn'"));
  CHECK_THAT(message(R"({"name": "rtn", "gruop": 3})"), Catch::Contains("did you mean 'group'"));
  CHECK_THAT(message(R"({"name": "rtn", "trasform": []})"), Catch::Contains("did you mean 'transform'"));
  CHECK_THAT(message(R"({"name": "rtn", "transform": ["hadamar"]})"), Catch::Contains("did you mean 'hadamard'"));
  CHECK_THAT(message(R"({"name": "rtn", "transform": [{"name": "token_scale", "per": "heads"}]})"),
             Catch::Contains("codec.transform[0].per"));
  CHECK_THAT(message(R"({"name": "rtn", "k": {"rope": "before"}})"), Catch::Contains("codec.k.rope"));
  CHECK_THAT(message(R"({"name": "rtn", "v": {"rope": "pre"}})"), Catch::Contains("codec.v.rope"));
  CHECK_THAT(message(R"({"name": "rtn", "heads": 0})"), Catch::Contains("heads"));
  CHECK_THAT(message(R"({"name": "rtn", "overrides": [{"layer": [0], "set": {"bits": 2}}]})"),
             Catch::Contains("did you mean 'layers'"));
  CHECK_THAT(message(R"({"name": "rtn", "overrides": [{"layers": [2], "set": {"bits": 2}}]})"),
             Catch::Contains("out of range"));
  CHECK_THAT(message(R"({"name": "rtn", "overrides": [{"layers": [0], "set": {"k.bit": 2}}]})"),
             Catch::Contains("did you mean 'bits'"));
  CHECK_THAT(message(R"({"name": "rtn", "overrides": [{"layers": [0], "set": {"key.bits": 2}}]})"),
             Catch::Contains("k. or v."));
  CHECK_THAT(message(R"({"name": "rtn", "heads": "all", "overrides": [{"heads": [0], "set": {"bits": 2}}]})"),
             Catch::Contains("in two"));
  CHECK_THAT(message(R"({"name": "rtn", "overrides": [{"heads": [0], "set": {"heads": 3}}]})"),
             Catch::Contains("whole layers"));
}

TEST_CASE("overrides reach their layers, heads and roles, later ones win", "[codec_set]") {
  const CodecPlan plan = resolve_codec(json(R"({"name": "rtn", "bits": 4, "overrides": [
      {"layers": [0, 2], "set": {"k.bits": 8}},
      {"layers": [2], "heads": [1], "set": {"bits": 2}},
      {"layers": [1], "set": {"v": {"name": "kivi"}}},
      {"layers": [1], "set": {"v.bits": 3, "k.heads": "all"}}]})"),
                                       make_shape(3, 3, 3, 64));
  CHECK(plan.skip == "");
  CHECK(unit_at(plan, 0, Role::kKey, 0).knobs["bits"] == 8);
  CHECK(unit_at(plan, 0, Role::kValue, 0).knobs["bits"] == 4);
  CHECK(unit_at(plan, 2, Role::kKey, 0).knobs["bits"] == 8);
  CHECK(unit_at(plan, 2, Role::kKey, 1).knobs["bits"] == 2);
  CHECK(unit_at(plan, 2, Role::kValue, 1).knobs["bits"] == 2);
  CHECK(unit_at(plan, 1, Role::kValue, 0).method == "kivi");
  CHECK(unit_at(plan, 1, Role::kValue, 0).knobs["bits"] == 3);
  CHECK(unit_at(plan, 1, Role::kKey, 2).unit.heads == 3);
  CHECK(plan.units.size() == 2 * 9 - 2);
}

TEST_CASE("what does not divide is skipped with its reason", "[codec_set]") {
  CHECK_THAT(resolve_codec(json(R"({"name": "rtn", "heads": 2})"), make_shape(2, 3, 3, 64)).skip,
             Catch::Contains("2 heads don't divide 3"));
  CHECK_THAT(resolve_codec(json(R"({"name": "rtn", "group": 48})"), make_shape(2, 3, 3, 64)).skip,
             Catch::Contains("layer 0, role k: rtn"));
  CHECK_THAT(resolve_codec(json(R"({"name": "kivi", "rope": "pre"})"), make_shape(2, 3, 3, 64)).skip,
             Catch::Contains("post-RoPE only"));
  CHECK_THAT(resolve_codec(json(R"({"name": "rtn", "transform": ["query_metric"]})"), make_shape(1, 3, 1, 64)).skip,
             Catch::Contains("codec.k"));
  CHECK_THAT(
      resolve_codec(json(R"({"name": "rtn", "transform": ["token_scale", "token_scale"]})"), make_shape(1, 3, 1, 64))
          .skip,
      Catch::Contains("one token scale"));
  CHECK_THAT(
      resolve_codec(
          json(
              R"({"name": "rtn", "transform": ["hadamard", {"name": "token_scale", "per": "channels", "width": 32}]})"),
          make_shape(1, 3, 1, 64))
          .skip,
      Catch::Contains("mixes 64"));
  CHECK_THAT(resolve_codec(json(R"({"name": "rtn", "rope": "pre", "k": {"transform": ["hadamard", "query_metric"]}})"),
                           make_shape(1, 3, 1, 64))
                 .skip,
             Catch::Contains("before transforms that mix"));
  CHECK(resolve_codec(json(R"({"name": "rtn", "heads": "all", "group": 192})"), make_shape(2, 3, 3, 64)).skip == "");
}

TEST_CASE("units know the model's RoPE", "[codec_set]") {
  CacheShape shape = make_shape(1, 3, 2, 16);
  shape.rope = RopeFacts::plain(16, 8, 10000);
  shape.rope.apply_yarn({.factor = 4, .original_context = 64});
  const CodecPlan plan = resolve_codec(json(R"({"name": "rtn", "bits": 3})"), shape);
  for (const UnitShape& unit : {unit_at(plan, 0, Role::kKey, 1).unit, unit_at(plan, 0, Role::kValue, 0).unit}) {
    CHECK(unit.rotary_dim() == 8);
    CHECK(unit.rope_facts.to_json() == shape.rope.to_json());
  }
}

TEST_CASE("a cache rule comes with the preset that names it, never with a bare method", "[codec_set]") {
  CHECK(preset_cache_config(json(R"({"name": "kivi"})")).is_null());
  CHECK(preset_cache_config(json(R"({"k": {"name": "kivi"}, "v": {"name": "rtn"}})")).is_null());
  CHECK(preset_cache_config(json(R"({"name": "rtn"})")).is_null());
  const Json kivi = preset_cache_config(json(R"({"name": "kivi", "preset": "default"})"));
  CHECK(kivi["rule"] == "kivi");
  CHECK(kivi["residual"] == 128);
  CHECK(preset_cache_config(json(R"({"name": "kivi", "preset": "r32"})"))["residual"] == 32);
  const Json mixed = preset_cache_config(json(R"({"k": {"name": "kivi", "preset": "default"}, "v": {"name": "rtn"}})"));
  CHECK(mixed["k"]["rule"] == "kivi");
  CHECK_FALSE(mixed.contains("v"));
}

TEST_CASE("behind query_metric groups spread what it sorted, unless the configuration says otherwise", "[codec_set]") {
  const auto grouping = [](const char* text, const char* role = "k") {
    const Json c = canonical_codec_config(json(text));
    CHECK(canonical_codec_config(c) == c);
    return c[role]["grouping"];
  };
  CHECK(grouping(R"({"name": "pq"})") == "contiguous");
  CHECK(grouping(R"({"name": "pq", "k": {"transform": ["center", "query_metric"]}})") == "variance");
  CHECK(grouping(R"({"name": "pq", "k": {"transform": ["center", "query_metric"]}})", "v") == "contiguous");
  CHECK(grouping(R"({"name": "pq", "k": {"transform": ["query_metric"], "grouping": "contiguous"}})") == "contiguous");
  CHECK(grouping(R"({"name": "pq", "grouping": "strided", "k": {"transform": ["query_metric"]}})") == "strided");
  CHECK(grouping(R"({"name": "rvq", "group": 16, "k": {"transform": ["query_metric"]}})") == "variance");
  // A method without such groups is left alone.
  CHECK(grouping(R"({"name": "kumar", "k": {"transform": ["query_metric"]}})") == "published");
  CHECK_FALSE(canonical_codec_config(json(R"({"name": "rtn", "k": {"transform": ["query_metric"]}})"))["k"].contains(
      "grouping"));
  // An override that brings or takes the transform brings or takes its default.
  const auto of_layer_1 = [](const char* text) {
    const CodecPlan plan = resolve_codec(json(text), make_shape(2, 3, 1, 64));
    CHECK(plan.skip == "");
    return unit_at(plan, 1, Role::kKey, 0).knobs["grouping"];
  };
  CHECK(of_layer_1(R"({"name": "pq", "overrides": [{"layers": [1], "set": {"k.transform": ["query_metric"]}}]})") ==
        "variance");
  CHECK(of_layer_1(R"({"name": "pq", "k": {"transform": ["query_metric"]},
                       "overrides": [{"layers": [1], "set": {"k.transform": []}}]})") == "contiguous");
  CHECK(of_layer_1(R"({"name": "pq", "overrides": [{"layers": [1],
                       "set": {"k.transform": ["query_metric"], "k.grouping": "strided"}}]})") == "strided");
}

TEST_CASE("the exact set covers every head", "[codec_set]") {
  const auto set = exact_codec_set(make_shape(3, 3, 2, 16));
  CHECK(set->units().size() == 12);
  for (int layer = 0; layer < 3; ++layer)
    for (int head = 0; head < 2; ++head)
      for (const Role role : {Role::kKey, Role::kValue}) {
        const UnitShape& u = set->units()[static_cast<size_t>(set->unit_index(layer, head, role))].spec.unit;
        CHECK((u.layer == layer && u.first_head == head && u.role == role));
      }
  CHECK(set->constant_bytes() == 0);
}

TEST_CASE("a set with holes, overlaps or foreign units is refused", "[codec_set]") {
  const CacheShape shape = make_shape(2, 3, 2, 16);
  const std::vector<TrainedUnit> units = exact_codec_set(shape)->units();
  const auto build = [&](std::vector<TrainedUnit> u) { CodecSet(shape, Json::object(), std::move(u), ""); };
  CHECK_NOTHROW(build(units));
  auto missing = units;
  missing.pop_back();
  CHECK_THROWS_AS(build(missing), Error);
  auto twice = units;
  twice.push_back(units[0]);
  CHECK_THROWS_AS(build(twice), Error);
  auto foreign = units;
  foreign[0].spec.unit.layer = 7;
  CHECK_THROWS_AS(build(foreign), Error);
}
