// Every method of the registry, as its configs/codecs/NAME.yaml with the group `test` builds it, against every
// property.
#include <algorithm>
#include <cmath>
#include <map>

#include "codec/build.h"
#include "codec/transform/transform.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "support/catch.h"
#include "support/formula.h"
#include "support/memory_parameters.h"
#include "support/method_configs.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

CacheShape shape_of(int kv_heads, int head_dim) {
  CacheShape shape;
  shape.layers = 1;
  shape.kv_heads = kv_heads;
  shape.q_heads = 3 * kv_heads;
  shape.head_dim = head_dim;
  shape.rope = RopeFacts::plain(head_dim, head_dim - head_dim % 2, 10000);
  return shape;
}

struct Case {
  std::string label;
  UnitSpec spec;
  std::shared_ptr<const Codec> codec;  // trained
  TrainData data;
};

std::shared_ptr<Codec> train(const UnitSpec& spec, const TrainData& data) {
  std::shared_ptr<Codec> codec = make_codec(spec);
  codec->train(data.set(spec.unit), Rng(99));
  return codec;
}

// method x role x RoPE placement x heads of a unit, trained once; what does not fit has a reason and is left out.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> made;
    for (const Method* method : all_methods()) {
      const std::string name = method->describe().name;
      std::map<Role, int> accepted;
      for (const char* rope : {"post", "pre"})
        for (const int heads : {1, 2}) {
          Json config = test_config(name);
          set_rope(config, rope);
          config["heads"] = heads;
          for (const UnitSpec& spec : resolve_codec(config, shape_of(2, 64)).units) {
            if (spec.unit.first_head != 0 || (spec.unit.role == Role::kValue && std::string(rope) == "pre")) continue;
            if (!spec.check().empty()) continue;
            ++accepted[spec.unit.role];
            Case c{name + " " + role_name(spec.unit.role) + " " + rope + " heads " + std::to_string(heads), spec,
                   nullptr, data_of(spec.unit, 512)};
            c.codec = train(spec, c.data);
            made.push_back(std::move(c));
          }
        }
      INFO(name);
      REQUIRE(accepted[Role::kKey] > 0);
      REQUIRE(accepted[Role::kValue] > 0);
    }
    return made;
  }();
  return all;
}

Matrix<float> round_trip(const Codec& codec, const Matrix<float>& x, CodeBlock* codes = nullptr) {
  CodeBlock block;
  codec.encode(x, block);
  Matrix<float> y(x.rows, x.cols);
  codec.decode(block, y);
  if (codes) *codes = std::move(block);
  return y;
}

Matrix<float> head_rows(const Matrix<float>& x, int64_t n) {
  Matrix<float> out(n, x.cols);
  std::copy_n(x.data(), n * x.cols, out.data());
  return out;
}

double squared_distance(const Matrix<float>& a, const Matrix<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.storage.size(); ++i) sum += std::pow(double{a.storage[i]} - b.storage[i], 2);
  return sum;
}

bool same_codes(const CodeBlock& a, const CodeBlock& b) {
  const auto same_entry = [](const OverlayEntry& x, const OverlayEntry& y) {
    return x.token == y.token && x.channel == y.channel && x.value == y.value && x.add == y.add;
  };
  return a.fields == b.fields && a.sides == b.sides &&
         std::equal(a.overlay.begin(), a.overlay.end(), b.overlay.begin(), b.overlay.end(), same_entry);
}

Json formula_values(const UnitSpec& spec) {
  Json v = spec.knobs;
  v["head_dim"] = spec.unit.head_dim;
  v["heads"] = spec.unit.heads;
  v["channels"] = spec.unit.channels();
  v["role"] = role_name(spec.unit.role);
  return v;
}

}  // namespace

TEST_CASE("descriptions are complete, and canonical knobs a fixed point", "[conformance]") {
  for (const Method* method : all_methods()) {
    const MethodInfo info = method->describe();
    CAPTURE(info.name);
    CHECK(&find_method(info.name) == method);
    CHECK_FALSE(info.title.empty());
    CHECK_FALSE(info.bits.empty());
    CHECK((info.family == "table" || info.family == "levels" || info.family == "dense"));
    CHECK(info.version >= 1);
    const Json canonical = method->canonical(Json::object(), "codec");
    CHECK(method->canonical(canonical, "codec") == canonical);
    for (const Knob& k : method->knobs()) {
      CAPTURE(k.name);
      CHECK_FALSE(k.help.empty());
      CHECK_FALSE(k.range.empty());
      CHECK(canonical.contains(k.name));
    }
    for (const auto& [name, preset] : info.presets.items()) {
      CAPTURE(name);
      for (const auto& [key, value] : preset.items()) CHECK((key == "codec" || key == "cache" || key == "note"));
      CHECK_NOTHROW(canonical_codec_config({{"name", info.name}, {"preset", name}}));
    }
  }
  for (const TransformKind* kind : all_transforms()) {
    const TransformInfo info = kind->describe();
    CAPTURE(info.name);
    CHECK(&find_transform(info.name) == kind);
    CHECK_FALSE(info.title.empty());
    const Json canonical = kind->canonical(Json::object(), "transform");
    CHECK(kind->canonical(canonical, "transform") == canonical);
  }
}

TEST_CASE("the documented bits are the bits of the layout, for every preset", "[conformance]") {
  for (const Method* method : all_methods()) {
    const MethodInfo info = method->describe();
    std::vector<Json> configs = {test_config(info.name)};
    for (const auto& [name, preset] : info.presets.items())
      configs.push_back({{"name", info.name}, {"preset", name}, {"transform", Json::array()}});
    int compared = 0;
    for (Json& config : configs)
      for (const int head_dim : {64, 128})
        for (const char* heads : {"1", "all"}) {
          config["transform"] = Json::array();
          config["heads"] = heads[0] == '1' ? Json(1) : Json("all");
          for (const UnitSpec& spec : resolve_codec(config, shape_of(2, head_dim)).units) {
            if (!spec.check().empty()) continue;
            const CodeLayout layout = make_codec(spec)->layout();
            CAPTURE(info.name, spec.knobs.dump(), head_dim, heads, role_name(spec.unit.role));
            CHECK(layout.bits_per_token() / spec.unit.channels() ==
                  Approx(Formula::evaluate(info.bits, formula_values(spec))).epsilon(1e-12));
            ++compared;
          }
        }
    INFO(info.name);
    CHECK(compared > 0);
  }
  for (const TransformKind* kind : all_transforms()) {
    UnitSpec spec = resolve_codec({{"name", "exact"}, {"heads", "all"}}, shape_of(2, 64)).units[0];
    spec.transforms = {kind->canonical(Json::object(), "transform")};
    spec.transforms[0]["name"] = kind->describe().name;
    Json values = formula_values(spec);
    values.update(spec.transforms[0]);
    CAPTURE(kind->describe().name);
    CHECK(make_codec(spec)->layout().bits_per_token() / spec.unit.channels() ==
          Approx(16 * Formula::evaluate(kind->describe().width, values) +
                 Formula::evaluate(kind->describe().side_bits, values))
              .epsilon(1e-12));
  }
}

// baseline-methods 21.2 and vq-methods r.8, written out: the descriptions can't all be wrong together.
TEST_CASE("bits a value of the published settings", "[conformance][golden]") {
  const auto bits = [](const Json& config, int head_dim, Role role = Role::kKey) {
    for (const UnitSpec& spec : resolve_codec(config, shape_of(1, head_dim)).units)
      if (spec.unit.role == role) return make_codec(spec)->layout().bits_per_token() / spec.unit.channels();
    return 0.0;
  };
  for (const Role role : {Role::kKey, Role::kValue}) {
    CHECK(bits({{"name", "kivi"}, {"bits", 2}, {"group", 32}}, 128, role) == 3.0);
    CHECK(bits({{"name", "kivi"}, {"bits", 2}, {"group", 64}}, 128, role) == 2.5);
    CHECK(bits({{"name", "kivi"}, {"bits", 4}, {"group", 32}}, 64, role) == 5.0);
  }
  CHECK(bits({{"name", "rtn"}, {"preset", "quarot"}}, 128) == 4.25);
  CHECK(bits({{"name", "rtn"}, {"preset", "quarot"}}, 64) == 4.5);
  CHECK(bits({{"name", "rtn"}, {"bits", 8}, {"group", 32}, {"mode", "symmetric"}}, 64) == 8.5);
  CHECK(bits({{"name", "rtn"}, {"bits", 3}, {"group", 64}, {"axis", "channel"}}, 64) == 3.5);
  CHECK(bits({{"name", "exact"}}, 64) == 16.0);
  CHECK(bits({{"name", "pq"}, {"codebooks", 16}, {"bits", 8}}, 64) == 2.0);
  CHECK(bits({{"name", "rvq"}, {"codebooks", 8}, {"bits", 8}}, 64) == 1.0);
  // Kumar: 16 / (8 * 11 / 32 + 16 / 128) = 5.565 at head_dim 128, and 3.0 bits at 64.
  CHECK(16 / bits({{"name", "kumar"}, {"codebooks", 8}, {"bits", 11}, {"group", 32}}, 128) ==
        Approx(5.565).epsilon(1e-4));
  CHECK(bits({{"name", "kumar"}, {"codebooks", 8}, {"bits", 11}, {"group", 32}}, 64) == 3.0);
  // VQKV: 1 - (56 * 10 + 16 * 9) / (16 * 256) = 0.828125.
  const Json vqkv = {
      {"name", "simvq"}, {"k", {{"codebooks", 56}, {"bits", 10}}}, {"v", {{"codebooks", 16}, {"bits", 9}}}};
  CHECK(1 - (bits(vqkv, 128, Role::kKey) + bits(vqkv, 128, Role::kValue)) / 32 == 0.828125);
}

TEST_CASE("blocks have the sizes, code widths and side types of the layout", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    CodeBlock block;
    c.codec->encode(c.data.x, block);
    const CodeLayout& layout = c.codec->layout();
    const int64_t tokens = c.data.x.rows;
    REQUIRE(block.blocks * layout.block_tokens == tokens);
    REQUIRE(block.fields.size() == layout.fields.size());
    REQUIRE(block.sides.size() == layout.sides.size());
    for (size_t f = 0; f < layout.fields.size(); ++f) {
      const FieldSpec& spec = layout.fields[f];
      REQUIRE(block.fields[f].size() == static_cast<size_t>((spec.per_token ? tokens : block.blocks) * spec.slots));
      for (const uint16_t code : block.fields[f]) REQUIRE(code < (1u << spec.bits));
    }
    for (size_t s = 0; s < layout.sides.size(); ++s) {
      const SideSpec& spec = layout.sides[s];
      REQUIRE(block.sides[s].size() == static_cast<size_t>((spec.per_token ? tokens : block.blocks) * spec.slots));
      for (const float v : block.sides[s]) REQUIRE(round_side(spec.type, v) == v);
    }
    REQUIRE((layout.overlay || block.overlay.empty()));
    for (int level = -1; level < c.codec->levels(); ++level) {
      const DecodePlan plan = c.codec->plan({level, nullptr});
      CHECK_NOTHROW(check_plan(plan));
      CHECK(plan.channels == c.codec->channels());
      CHECK(plan.rope == c.codec->rope());
      // What check_inner relies on.
      for (size_t s = 0; s < layout.sides.size(); ++s)
        CHECK((layout.sides[s].name == "token_scale") == (plan.token_scale_side == static_cast<int>(s)));
    }
    // Books are what their storage type can hold: the ledger counts them so.
    for (const PlanTerm& term : c.codec->plan().terms)
      if (const auto* t = std::get_if<TableTerm>(&term))
        for (const float v : *t->codewords) REQUIRE(round_side(t->stored_as, v) == v);
  }
}

TEST_CASE("codes carry information, and most of it", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    const Matrix<float> y = round_trip(*c.codec, c.data.x);
    Matrix<float> zero(y.rows, y.cols);
    CHECK(squared_distance(y, c.data.x) < 0.7 * squared_distance(zero, c.data.x));
  }
}

TEST_CASE("a block is coded alike alone and among others", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    CodeBlock whole;
    c.codec->encode(c.data.x, whole);
    const int64_t tokens = c.codec->layout().block_tokens;
    for (const int64_t b : {int64_t{0}, whole.blocks / 2, whole.blocks - 1}) {
      CodeBlock one;
      c.codec->encode(c.data.x.view().slice_rows(b * tokens, tokens), one);
      REQUIRE(one.blocks == 1);
      for (size_t f = 0; f < one.fields.size(); ++f)
        REQUIRE(std::equal(one.fields[f].begin(), one.fields[f].end(),
                           whole.fields[f].begin() + b * static_cast<int64_t>(one.fields[f].size())));
      for (size_t s = 0; s < one.sides.size(); ++s)
        REQUIRE(std::equal(one.sides[s].begin(), one.sides[s].end(),
                           whole.sides[s].begin() + b * static_cast<int64_t>(one.sides[s].size())));
    }
    CodeBlock none;
    CHECK_NOTHROW(c.codec->encode(head_rows(c.data.x, 0), none));
    CHECK(none.blocks == 0);
  }
}

TEST_CASE("strided rows give the same codes", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    const int64_t n = 2 * c.codec->layout().block_tokens;
    Matrix<float> wide(n, c.data.x.cols + 5, 1e9f);
    for (int64_t t = 0; t < n; ++t) std::copy_n(c.data.x.row(t), c.data.x.cols, wide.row(t));
    CodeBlock a, b;
    c.codec->encode(c.data.x.view().slice_rows(0, n), a);
    c.codec->encode(wide.view().slice_cols(0, c.data.x.cols), b);
    CHECK(same_codes(a, b));
  }
}

TEST_CASE("zero, constant, tiny and huge rows decode to finite numbers", "[conformance]") {
  for (const Case& c : cases()) {
    const int64_t n = c.codec->layout().block_tokens;
    for (const float v : {0.0f, 1.0f, -3.5f, 1e-8f, 1e-20f, 6e4f, 1e6f, -1e6f}) {
      CAPTURE(c.label, v);
      for (const float y : round_trip(*c.codec, Matrix<float>(n, c.codec->channels(), v)).storage)
        REQUIRE(std::isfinite(y));
    }
    Matrix<float> loud = head_rows(c.data.x, n);
    for (float& v : loud.storage) v *= 1e5f;
    CAPTURE(c.label);
    for (const float y : round_trip(*c.codec, loud).storage) REQUIRE(std::isfinite(y));
  }
}

TEST_CASE("values that are not finite are refused", "[conformance]") {
  for (const Case& c : cases())
    for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
      CAPTURE(c.label, bad);
      Matrix<float> x = head_rows(c.data.x, c.codec->layout().block_tokens);
      x.storage.back() = bad;
      CodeBlock block;
      try {
        c.codec->encode(x, block);
        FAIL_CHECK("accepted");
      } catch (const Error& e) { CHECK(e.kind() == ErrorKind::kBadData); }
    }
}

TEST_CASE("coding again what was decoded stays close", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    const Matrix<float> once = round_trip(*c.codec, c.data.x);
    const Matrix<float> twice = round_trip(*c.codec, once);
    // A second pass loses less than the first did; without clipping it loses next to nothing.
    CHECK(squared_distance(twice, once) <=
          0.5 * squared_distance(once, c.data.x) + 1e-6 * static_cast<double>(once.storage.size()));
  }
}

TEST_CASE("training gives the same bits at one, two and four threads", "[conformance]") {
  const int before = thread_count();
  for (const Case& c : cases()) {
    if (!needs_of(c.spec).rows || c.spec.unit.heads != 1) continue;
    CAPTURE(c.label);
    MemoryParameters one;
    CodeBlock codes_of_one;
    for (const int threads : {1, 2, 4}) {
      set_thread_count(threads);
      const auto codec = train(c.spec, c.data);
      MemoryParameters saved;
      CodeBlock codes;
      codec->save(saved);
      codec->encode(c.data.x, codes);
      if (threads == 1) {
        one = saved;
        codes_of_one = codes;
      }
      CHECK(saved == one);
      CHECK(same_codes(codes, codes_of_one));
    }
  }
  set_thread_count(before);
}

TEST_CASE("what a method does not say it needs changes nothing", "[conformance]") {
  const auto check = [](const UnitSpec& spec, const TrainData& all) {
    const TrainNeeds needs = needs_of(spec);
    if (!needs.rows) return;
    TrainData some;
    some.x = all.x;
    some.position = all.position;
    some.document = all.document;
    if (needs.mass) some.received_mass = all.received_mass, some.received_mass2 = all.received_mass2;
    if (needs.queries) some.queries = all.queries;
    if (needs.moments) some.query_moment = all.query_moment, some.query_pair_moment = all.query_pair_moment;
    if (needs.output_weight) some.output_weight = all.output_weight;
    if (needs.other_role) some.other_role = all.other_role;
    MemoryParameters with_all, with_some;
    train(spec, all)->save(with_all);
    train(spec, some)->save(with_some);
    CHECK(with_all == with_some);
  };
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    check(c.spec, c.data);
    UnitSpec spec = c.spec;
    for (const char* weight : {"mass", "mass2"}) {
      if (!spec.knobs.contains("weight")) continue;
      spec.knobs["weight"] = weight;
      CHECK(needs_of(spec).mass);
      check(spec, c.data);
    }
  }
  for (const TransformKind* kind : all_transforms())
    for (const char* rope : {"post", "pre"}) {
      const std::string name = kind->describe().name;
      CAPTURE(name, rope);
      // One after another, so that what is carried through a chain is too.
      const Json config = {{"name", "exact"}, {"rope", rope}, {"k", {{"transform", Json::array({"center", name})}}}};
      const CodecPlan plan = resolve_codec(config, shape_of(1, 64));
      if (plan.skip.empty()) check(plan.units.at(0), data_of(plan.units[0].unit, 256));
    }
}

// The rows of `like` in their own place, the rest of them others: tokens from `kept` on.
TrainData others_behind(const TrainData& like, const UnitShape& unit, int64_t kept) {
  TrainData d = like;
  const Matrix<float> others = rows_of(like.x.rows, unit, 117);
  for (int64_t t = kept; t < d.x.rows; ++t)
    for (int64_t c = 0; c < d.x.cols; ++c) d.x(t, c) = 0.5f * others(t, c);
  return d;
}

TEST_CASE("nothing that is learned or fitted comes from the first tokens alone", "[conformance]") {
  // What changes with all tokens also changes where the first token, or the first block, stays as it was: a scale that
  // is calibrated on the first token (decoding starts with one) is wrong for every later one.
  int compared = 0;
  const auto check = [&](const UnitSpec& spec, const TrainData& data) {
    MemoryParameters of_data, of_others;
    const auto codec = train(spec, data);
    codec->save(of_data);
    train(spec, others_behind(data, spec.unit, 0))->save(of_others);
    const auto state = [&](int64_t kept) {
      const TrainData d = others_behind(data, spec.unit, kept);
      return codec->fit(d.x, d.other_role, d.queries);
    };
    const auto codes = [&](const SequenceState* fitted) {
      CodeBlock block;
      codec->encode(data.x, block, fitted);
      return block;
    };
    const auto own = codec->fit(data.x, data.other_role, data.queries);
    const bool fits = own && !same_codes(codes(own.get()), codes(state(0).get()));
    for (const int64_t kept : {int64_t{1}, int64_t{codec->layout().block_tokens}}) {
      CAPTURE(kept);
      MemoryParameters of_first;
      train(spec, others_behind(data, spec.unit, kept))->save(of_first);
      for (const auto& [name, tensor] : of_data.tensors) {
        CAPTURE(name);
        if (tensor == of_others.tensors.at(name)) continue;  // not learned from these rows
        CHECK_FALSE(tensor == of_first.tensors.at(name));
        ++compared;
      }
      if (fits) CHECK_FALSE(same_codes(codes(own.get()), codes(state(kept).get())));
    }
  };
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    if (c.spec.unit.heads == 1) check(c.spec, c.data);
  }
  for (const TransformKind* kind : all_transforms()) {
    const std::string name = kind->describe().name;
    CAPTURE(name);
    const Json config = {{"name", "exact"}, {"k", {{"transform", Json::array({name})}}}};
    const CodecPlan plan = resolve_codec(config, shape_of(1, 64));
    if (plan.skip.empty()) check(plan.units.at(0), data_of(plan.units[0].unit, 256));
  }
  CHECK(compared > 20);
}

TEST_CASE("what trains in steps says which knobs count them", "[conformance]") {
  for (const Method* method : all_methods()) {
    const MethodInfo info = method->describe();
    INFO(info.name);
    const std::vector<Knob> knobs = method->knobs();
    CHECK(std::any_of(knobs.begin(), knobs.end(), [](const Knob& k) { return k.effort; }) == info.trained);
  }
}

TEST_CASE("saved parameters load into the same codec", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    MemoryParameters saved, again;
    c.codec->save(saved);
    const auto loaded = make_codec(c.spec);
    loaded->load(saved);
    loaded->save(again);
    CHECK(saved == again);
    CodeBlock a, b;
    c.codec->encode(c.data.x, a);
    loaded->encode(c.data.x, b);
    CHECK(same_codes(a, b));
    Matrix<float> x(c.data.x.rows, c.data.x.cols), y(c.data.x.rows, c.data.x.cols);
    c.codec->decode(a, x);
    loaded->decode(b, y);
    CHECK(x.storage == y.storage);
    CHECK(c.codec->constant_bytes() == loaded->constant_bytes());
  }
}

TEST_CASE("corrupted parameters are refused", "[conformance]") {
  const auto refused = [](const UnitSpec& spec, const MemoryParameters& p) {
    try {
      make_codec(spec)->load(p);
    } catch (const Error& e) { return e.kind() == ErrorKind::kBadData; }
    return false;
  };
  for (const Case& c : cases()) {
    MemoryParameters saved;
    c.codec->save(saved);
    for (const auto& [name, tensor] : saved.tensors) {
      CAPTURE(c.label, name);
      MemoryParameters missing = saved, longer = saved, poisoned = saved;
      missing.tensors.erase(name);
      CHECK(refused(c.spec, missing));
      MemoryParameters::Tensor& t = longer.tensors.at(name);
      t.shape[0] += 1;
      t.data.resize(t.data.size() / static_cast<size_t>(t.shape[0] - 1) * static_cast<size_t>(t.shape[0]), 0.0f);
      CHECK(refused(c.spec, longer));
      for (const float bad : {std::nanf(""), INFINITY}) {
        poisoned.tensors.at(name).data.back() = bad;
        CHECK(refused(c.spec, poisoned));
      }
    }
    for (const auto& [name, value] : saved.values) {
      CAPTURE(c.label, name);
      MemoryParameters missing = saved, other = saved;
      missing.values.erase(name);
      CHECK(refused(c.spec, missing));
      for (const Json& bad : {Json(), Json("text"), Json::array({-1, 1e9}), Json({{"x", 1}})}) {
        other.values.at(name) = bad;
        CAPTURE(bad.dump());
        CHECK(refused(c.spec, other));
      }
    }
  }
}

TEST_CASE("odd units get a reason or a codec that works", "[conformance]") {
  for (const Method* method : all_methods()) {
    const std::string name = method->describe().name;
    for (const int head_dim : {1, 2, 3, 7, 24, 48, 80, 96}) {
      const CodecPlan plan = resolve_codec(test_config(name), shape_of(1, head_dim));
      for (const UnitSpec& spec : plan.units) {
        CAPTURE(name, head_dim, role_name(spec.unit.role));
        const std::string reason = spec.check();
        if (!reason.empty()) {
          CHECK(plan.skip.size() >= reason.size());
          CHECK_THROWS_AS(make_codec(spec), Error);
          continue;
        }
        const TrainData data = data_of(spec.unit, 512);
        const auto codec = train(spec, data);
        for (const float y : round_trip(*codec, data.x).storage) REQUIRE(std::isfinite(y));
      }
    }
  }
}

TEST_CASE("every method stands behind a chain", "[conformance]") {
  for (const Method* method : all_methods()) {
    const std::string name = method->describe().name;
    Json config = test_config(name);
    config["transform"] = Json::array({"center", "hadamard", "channel_scale"});
    for (const UnitSpec& spec : resolve_codec(config, shape_of(1, 64)).units) {
      CAPTURE(name, role_name(spec.unit.role));
      REQUIRE(spec.check() == "");
      const TrainData data = data_of(spec.unit, 512);
      const auto codec = train(spec, data);
      const Matrix<float> y = round_trip(*codec, data.x);
      Matrix<float> zero(y.rows, y.cols);
      CHECK(squared_distance(y, data.x) < 0.7 * squared_distance(zero, data.x));
      MemoryParameters saved;
      codec->save(saved);
      const auto loaded = make_codec(spec);
      loaded->load(saved);
      CHECK(round_trip(*loaded, data.x).storage == y.storage);
    }
  }
}
