// Codecs of several tiers by age: their configuration, levels of a residual code, and the file that holds them.
#include <unistd.h>
#include <filesystem>

#include "codec/build.h"
#include "codec/codec_archive.h"
#include "codec/level.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "io/archive.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

Json tier_json(const std::string& text) { return parse_json(text, "test"); }

CodecPlan plan_of(const std::string& text) { return resolve_codec(tier_json(text), small_shape()); }

std::shared_ptr<const CodecSet> train(const std::string& text) {
  const CodecPlan plan = plan_of(text);
  REQUIRE(plan.skip == "");
  return train_codec_set(plan, small_shape(), MadeUp(600), {});
}

const TrainedUnit& unit_at(const CodecSet& set, int tier, int layer, int head, Role role) {
  return set.units()[static_cast<size_t>(set.unit_index(layer, head, role, tier))];
}

const char* const kThree = R"({"tiers": [
    {"tokens": 128, "name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 4},
    {"tokens": 64, "k": {"level": 2}, "v": {"level": 3}},
    {"k": {"level": 1}, "v": {"name": "pq", "codebooks": 4, "bits": 3}}]})";

}  // namespace

TEST_CASE("tiers are canonical codecs with the tokens that they hold", "[tiers]") {
  const Json c = canonical_codec_config(tier_json(kThree));
  CHECK(canonical_codec_config(c) == c);
  CHECK(c.size() == 1);
  CHECK(c["tiers"][0]["tokens"] == 128);
  CHECK(c["tiers"][0]["k"]["encoding"] == "greedy");
  CHECK(c["tiers"][1] == tier_json(R"({"tokens": 64, "k": {"level": 2}, "v": {"level": 3}})"));
  CHECK(c["tiers"][2]["v"]["bits"] == 3);
  CHECK_FALSE(c["tiers"][2].contains("tokens"));
  CHECK(canonical_codec_config(
            tier_json(R"({"tiers": [{"tokens": 64, "name": "pq"}, {"name": "rvq", "v": {"bits": 3}}]})"))["tiers"][1] ==
        canonical_codec_config(tier_json(R"({"name": "rvq", "v": {"bits": 3}})")));
  CHECK(canonical_codec_config(tier_json(R"({"tiers": [{"tokens": 64, "name": "rvq"}, {"level": 2}]})"))["tiers"][1] ==
        tier_json(R"({"k": {"level": 2}, "v": {"level": 2}})"));
  // One tier is a codec like any other.
  CHECK(canonical_codec_config(tier_json(R"({"tiers": [{"name": "rtn", "bits": 3}]})")) ==
        canonical_codec_config(tier_json(R"({"name": "rtn", "bits": 3})")));
  CHECK(preset_cache_config(
            tier_json(R"({"tiers": [{"tokens": 64, "name": "kivi", "preset": "default"}, {"name": "pq"}]})")) ==
        preset_cache_config(tier_json(R"({"name": "kivi", "preset": "default"})")));

  const CodecPlan plan = plan_of(kThree);
  CHECK(plan.skip == "");
  CHECK(plan.tiers == std::vector<int64_t>{128, 64});
  REQUIRE(plan.units.size() == 3 * 8);
  CHECK(plan.units[8].tier == 1);
  CHECK(plan.units[8].level == 2);
  CHECK(plan.units[8].knobs == plan.units[0].knobs);
  CHECK(plan.units[16].level == 1);
  CHECK(plan.units[18].unit.role == Role::kValue);
  CHECK(plan.units[18].level == 0);
  CHECK(plan.units[18].method == "pq");
  CHECK(plan_of(R"({"name": "pq", "codebooks": 4})").tiers.empty());
}

TEST_CASE("mistakes in tiers are named", "[tiers]") {
  const auto message = [](const char* text) -> std::string {
    try {
      return plan_of(text).skip;
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kUsage);
      return e.what();
    }
  };
  using Catch::Contains;
  CHECK_THAT(message(R"({"tiers": [], "name": "pq"})"), Contains("codec.name") && Contains("beside `tiers`"));
  CHECK_THAT(message(R"({"tiers": 3})"), Contains("codec.tiers") && Contains("the newest first"));
  CHECK_THAT(message(R"({"tiers": [{"name": "pq"}, {"name": "rtn"}]})"),
             Contains("codec.tiers[0]") && Contains("tokens"));
  CHECK_THAT(message(R"({"tiers": [{"name": "pq", "tokens": 0}, {"name": "rtn"}]})"),
             Contains("codec.tiers[0].tokens") && Contains("1"));
  CHECK_THAT(message(R"({"tiers": [{"name": "pq", "tokens": 64}, {"name": "rtn", "tokens": 64}]})"),
             Contains("codec.tiers[1].tokens") && Contains("oldest"));
  CHECK_THAT(message(R"({"tiers": [{"name": "pq", "tokens": 64}, {"name": "rtn", "bit": 3}]})"),
             Contains("codec.tiers[1]") && Contains("did you mean 'bits'"));
  CHECK_THAT(message(R"({"tiers": [{"level": 2, "tokens": 64}, {"name": "rtn"}]})"),
             Contains("codec.tiers[0].level") && Contains("newest"));
  CHECK_THAT(message(R"({"tiers": [{"name": "rvq", "tokens": 64}, {"level": 2, "bits": 3}]})"),
             Contains("codec.tiers[1]") && Contains("'bits'"));
  CHECK_THAT(
      message(R"({"tiers": [{"name": "rvq", "tokens": 64}, {"k": {"level": 2, "bits": 3}, "v": {"level": 1}}]})"),
      Contains("codec.tiers[1].k") && Contains("'bits'"));
  CHECK_THAT(message(R"({"tiers": [{"name": "rvq", "tokens": 64},
                                   {"name": "pq", "k": {"level": 2}, "overrides": [{"set": {"bits": 3}}]}]})"),
             Contains("codec.tiers[1].overrides"));
  CHECK_THAT(message(R"({"tiers": [{"name": "rvq", "codebooks": 4, "tokens": 64}, {"level": 4}]})"),
             Contains("codec.tiers[1]") && Contains("4 stages") && Contains("1 to 3"));
  CHECK_THAT(
      message(R"({"tiers": [{"name": "pq", "codebooks": 4, "tokens": 64}, {"level": 1}]})"),
      Contains("codec.tiers[1]") && Contains("one level alone") && Contains("(quantspec, rvq, kumar, simvq, commvq)"));
  CHECK_THAT(message(R"({"tiers": [{"name": "rvq", "tokens": 64}, {"level": 3, "tokens": 64}, {"level": 3}]})"),
             Contains("codec.tiers[2]") && Contains("3 stages"));
  CHECK_THAT(
      message(
          R"({"tiers": [{"name": "rtn", "group": 16, "tokens": 64}, {"name": "rtn", "group": 16, "rope": "pre"}]})"),
      Contains("codec.tiers[1]") && Contains("same side of RoPE"));
  CHECK_THAT(message(R"({"tiers": [{"name": "rtn", "group": 16, "tokens": 64},
                                   {"name": "rtn", "group": 16, "overrides": [{"layers": [2], "set": {"bits": 2}}]}]})"),
             Contains("codec.tiers[1].overrides[0].layers"));
}

TEST_CASE("a level is the code of fewer stages, and shares the books", "[tiers]") {
  const UnitShape unit = unit_of(16);
  const auto x = gaussian(900, 16, 3), test = gaussian(70, 16, 4);
  const Json knobs = {{"codebooks", 4}, {"bits", 4}, {"encoding", "greedy"}, {"refine", 0}};
  Json fewer = knobs;
  fewer["codebooks"] = 2;
  const std::shared_ptr<const Codec> whole = trained("rvq", knobs, unit, x), two = trained("rvq", fewer, unit, x);
  const std::shared_ptr<const Codec> level = codec_level(whole, 2);
  CodeBlock all, own, encoded;
  whole->encode(test, all);
  two->encode(test, own);
  level->encode(test, encoded);
  const CodeBlock cut = cut_codes(all, whole->layout(), level->layout());
  CHECK(level->layout().bits_per_token() == two->layout().bits_per_token());
  CHECK(cut.fields == own.fields);
  CHECK(cut.fields == encoded.fields);
  Matrix<float> from_cut(70, 16), from_two(70, 16), from_whole(70, 16);
  level->decode(cut, from_cut);
  two->decode(own, from_two);
  whole->decode(all, from_whole, {1, nullptr});
  CHECK(from_cut.storage == from_two.storage);
  CHECK(from_cut.storage == from_whole.storage);
  check_plan(level->plan());
  CHECK(std::get<TableTerm>(level->plan().terms[0]).codewords == std::get<TableTerm>(whole->plan().terms[0]).codewords);
  CHECK(level->constant_bytes() == 0);
  CHECK(cut_codes(cut, level->layout(), codec_level(level, 1)->layout()).fields ==
        cut_codes(all, whole->layout(), codec_level(whole, 1)->layout()).fields);
  CHECK_THROWS_WITH(codec_level(level, 2), Catch::Contains("2 stages"));
  CHECK_THROWS_WITH(NibbleDummy(unit).level_layout(0), Catch::Contains("no levels"));

  // Behind transforms, a token scale among them, and in groups.
  for (const char* text :
       {R"({"name": "rvq", "codebooks": 3, "bits": 4, "group": 8, "transform": ["center", "token_scale", "hadamard"]})",
        R"({"name": "simvq", "codebooks": 3, "bits": 4, "transform": ["rotation"]})",
        R"({"name": "kumar", "codebooks": 3, "bits": 4, "group": 8, "ema_steps": 3})"}) {
    CAPTURE(text);
    CodecPlan plan = plan_of(text);
    REQUIRE(plan.skip == "");
    auto made = make_codec(plan.units[0]);
    made->train(train_set(x, plan.units[0].unit), Rng(5));
    const std::shared_ptr<const Codec> chained = std::move(made);
    const auto first = codec_level(chained, 1);
    CodeBlock codes;
    chained->encode(test, codes);
    Matrix<float> a(70, 16), b(70, 16);
    first->decode(cut_codes(codes, chained->layout(), first->layout()), a);
    chained->decode(codes, b, {0, nullptr});
    CHECK(a.storage == b.storage);
    CHECK(first->layout().code_bits_per_block() * 3 == chained->layout().code_bits_per_block());
    CHECK(first->layout().side_bits_per_block() == chained->layout().side_bits_per_block());
    double last = round_trip_mse(*chained, test);
    for (const int stages : {2, 1}) {
      const double shorter = round_trip_mse(*codec_level(chained, stages), test);
      CHECK(shorter == round_trip_mse(*chained, test, stages - 1));
      CHECK(shorter > last);
      last = shorter;
    }
  }
}

TEST_CASE("every method whose codes have levels is named where one is refused, and has them in tiers", "[tiers]") {
  CHECK(methods_with_levels() == std::vector<std::string>{"quantspec", "rvq", "kumar", "simvq", "commvq"});
  for (const std::string& name : methods_with_levels()) {
    CAPTURE(name);
    Json config = {{"tiers", {{{"tokens", 64}, {"name", name}, {"codebooks", 3}, {"bits", 3}}, {{"level", 2}}}}};
    double kept = 2.0 / 3;
    if (name == "kumar") config["tiers"][0]["group"] = 8;
    if (name == "quantspec") {  // two nibbles
      config = {{"tiers", {{{"tokens", 64}, {"name", name}}, {{"level", 1}}}}};
      kept = 0.5;
    }
    std::vector<Role> roles = {Role::kKey, Role::kValue};
    if (name == "commvq") {  // its values have no stages
      roles = {Role::kKey};
      config["tiers"][0]["value_steps"] = 2;
      config["tiers"][1] = {{"k", {{"level", 2}}}, {"v", {{"name", "exact"}}}};
    }
    const auto set = train(config.dump());
    CHECK(set->tiers() == 2);
    for (const Role role : roles) {
      const CodeLayout &whole = unit_at(*set, 0, 1, 1, role).codec->layout(),
                       &level = unit_at(*set, 1, 1, 1, role).codec->layout();
      CHECK(static_cast<double>(level.code_bits_per_block()) ==
            Approx(kept * static_cast<double>(whole.code_bits_per_block())));
    }
  }
}

TEST_CASE("a set of several tiers trains each codec once and counts its books once", "[tiers]") {
  const auto set = train(kThree), one = train(R"({"name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 4})"),
             oldest = train(R"({"name": "pq", "codebooks": 4, "bits": 3})");
  REQUIRE(set->tiers() == 3);
  CHECK(set->tier_tokens() == std::vector<int64_t>{128, 64});
  CHECK(set->units().size() == 3 * 8);
  for (const Role role : {Role::kKey, Role::kValue}) {
    const TrainedUnit &a = unit_at(*set, 0, 1, 1, role), &b = unit_at(*one, 0, 1, 1, role);
    Archive in_set, alone;
    a.codec->save(in_set);
    b.codec->save(alone);
    CHECK(in_set.tensors == alone.tensors);  // what is coded first doesn't know of older tiers
    CHECK(unit_at(*set, 1, 1, 1, role).report.vectors == 0);
  }
  CHECK(set->constant_bytes() == one->constant_bytes() + oldest->constant_bytes() / 2);
  CHECK(unit_at(*set, 2, 0, 0, Role::kKey).codec->layout().fields[0].slots == 1);
  CHECK(unit_at(*set, 1, 0, 0, Role::kValue).codec->layout().fields[0].slots == 3);
  // Shared codecs are levels together.
  const auto shared = train(R"({"tiers": [{"tokens": 64, "name": "rvq", "share": "layers", "codebooks": 2, "bits": 3},
                                          {"level": 1}]})");
  CHECK(unit_at(*shared, 1, 0, 0, Role::kKey).codec == unit_at(*shared, 1, 1, 1, Role::kKey).codec);
}

TEST_CASE("what can't be one of several tiers is refused by name", "[tiers]") {
  const CacheShape shape = small_shape();
  const auto build = [&](const std::function<std::unique_ptr<Codec>(const UnitShape&)>& older) {
    std::vector<TrainedUnit> units = exact_codec_set(shape)->units();
    const std::vector<TrainedUnit> others = units;
    for (TrainedUnit u : others) {
      u.spec.tier = 1;
      u.codec = older(u.spec.unit);
      units.push_back(std::move(u));
    }
    CodecSet(shape, Json::object(), std::move(units), "", {64});
  };
  CHECK_THROWS_WITH(build([](const UnitShape& u) { return std::make_unique<LowerDummy>(u); }),
                    Catch::Contains("codec.tiers[1]") && Catch::Contains("layer below"));
  CHECK_THROWS_WITH(build([](UnitShape u) {
                      u.rope = RopePlacement::kPre;
                      return std::make_unique<SparseDummy>(u, 3, true);
                    }),
                    Catch::Contains("codec.tiers[1]") && Catch::Contains("RoPE"));
  std::vector<TrainedUnit> lone = exact_codec_set(shape)->units();
  lone[0].spec.tier = 1;
  CHECK_THROWS_WITH(CodecSet(shape, Json::object(), lone, ""), Catch::Contains("tier 1 of 1"));
  CHECK_THROWS_WITH(CodecSet(shape, Json::object(), lone, "", {64}), Catch::Contains("no codec"));
}

TEST_CASE("a codec file keeps its tiers, one tier is written as before", "[tiers][codec_archive]") {
  const std::string path =
      (std::filesystem::temp_directory_path() / ("vqkv-tiers-" + std::to_string(getpid()) + ".codec.h5")).string();
  const auto set = train(kThree);
  save_codec_set(*set, path);
  const CodecSet loaded = load_codec_set(path);
  CHECK(loaded.tier_tokens() == set->tier_tokens());
  CHECK(canonical_json(loaded.config()) == canonical_json(set->config()));
  CHECK(loaded.constant_bytes() == set->constant_bytes());
  REQUIRE(loaded.units().size() == set->units().size());
  const auto test = gaussian(40, 16, 9);
  for (size_t i = 0; i < loaded.units().size(); ++i) {
    const TrainedUnit &a = set->units()[i], &b = loaded.units()[i];
    CHECK(a.spec.tier == b.spec.tier);
    CHECK(a.spec.level == b.spec.level);
    CodeBlock x, y;
    a.codec->encode(test, x);
    b.codec->encode(test, y);
    CHECK(x.fields == y.fields);
  }

  const Json good = ArchiveReader(path, kCodecFormat, 1, kCodecVersion).facts("set");
  const auto refusal = [&](const std::function<void(Json&)>& change) -> std::string {
    Json changed = good;
    change(changed);
    ArchiveWriter out(path, kCodecFormat, kCodecVersion);
    out.facts("set", changed);
    out.finish();
    try {
      load_codec_set(path);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kBadData);
      return e.what();
    }
    return "no error";
  };
  CHECK_THAT(refusal([](Json& s) { s["tiers"] = {0}; }), Catch::Contains("tiers: 0"));
  CHECK_THAT(refusal([](Json& s) { s["tiers"] = "x"; }), Catch::Contains("'tiers'"));
  CHECK_THAT(refusal([](Json& s) { s["units"] = Json::array({s["units"][8]}); }), Catch::Contains("no such unit"));
  CHECK_THAT(refusal([](Json& s) {
               s["units"] = Json::array({s["units"][8]});
               s["units"][0]["spec"]["tier"] = 3;
             }),
             Catch::Contains("tier"));

  save_codec_set(*exact_codec_set(small_shape()), path);
  CHECK_FALSE(ArchiveReader(path, kCodecFormat, 1, 1).facts("set").contains("tiers"));
  CHECK_FALSE(ArchiveReader(path, kCodecFormat, 1, 1).facts("set")["units"][0]["spec"].contains("tier"));
  std::filesystem::remove(path);
}
