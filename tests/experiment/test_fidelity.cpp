// What a sweep does with codecs that no registered method is: broken ones, exact exceptions, parameters fitted to the
// prompt.
#include "experiment/fidelity.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "experiment/cost.h"
#include "experiment/training_curve.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Recorded {
  TestFolder folder;
  std::unique_ptr<TraceReader> reader;
  CellConfig config;
  std::unique_ptr<TraceRows> rows;
  explicit Recorded(int64_t tokens = 160, int64_t first_document = 0,
                    const std::function<void(TraceWindowData&)>& edit = {}, const std::string& gradients = "") {
    config.trace = folder / "t.trace.h5";
    write_sweep_trace(config.trace, 4, tokens, 2, 2, 16, 1, first_document, nullptr, edit, 8, gradients);
    config.train = {1};
    config.select = {2};
    config.report = {0, 3};
    config.cache = canonical_cache_config({{"sinks", 4}, {"window", 16}, {"flush", 16}});
    config.metrics = {"attention_output", "key_nmse", "logit_error", "softmax_kl", "top_k", "value_nmse"};
    config.contexts = {tokens};
    reader = std::make_unique<TraceReader>(config.trace);
    rows = std::make_unique<TraceRows>(*reader, config);
  }
  FidelityResult measure(const CodecSet& set) const {
    return measure_fidelity(*rows, set, [](int) {});
  }
  // The last window as a replay feeds it, in one block.
  void replay(CompressedCache& cache) const {
    const CacheShape& shape = cache.shape();
    const EvalWindow& w = rows->windows().back();
    const int64_t tokens = w.window.tokens;
    cache.begin_block(tokens);
    for (int l = 0; l < shape.layers; ++l) {
      Matrix<float> k(tokens, shape.kv_heads * shape.head_dim), v = k;
      for (int h = 0; h < shape.kv_heads; ++h) {
        const Matrix<float> from_k = rows->keys(l, h, w), from_v = rows->values(l, h, w);
        for (int64_t t = 0; t < tokens; ++t) {
          std::copy_n(from_k.row(t), shape.head_dim, k.row(t) + h * shape.head_dim);
          std::copy_n(from_v.row(t), shape.head_dim, v.row(t) + h * shape.head_dim);
        }
      }
      cache.append(l, k, v);
    }
    cache.end_block();
  }
};

// One code; a side value or the plan's bias holds what it must not.
class BrokenDummy final : public DummyCodec {
 public:
  BrokenDummy(const UnitShape& unit, float side, float bias) : DummyCodec(unit), side_(side), bias_(bias) {
    layout_.fields = {{"code", 1, channels(), true}};
    layout_.sides = {{"scale", DType::kF32, 1, true}};
  }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* = nullptr) const override {
    out.resize(layout_, x.rows);
    for (auto& s : out.sides[0]) s = 1;
    out.sides[0].back() = side_;
  }
  DecodePlan plan(const PlanQuery& = {}) const override {
    DecodePlan plan = empty_plan();
    LevelsTerm term;
    term.scale_side = 0;
    term.group_channels = channels();
    plan.terms = {term};
    plan.outer_bias.assign(static_cast<size_t>(channels()), 0);
    plan.outer_bias.back() = bias_;
    return plan;
  }

 private:
  float side_, bias_;
};

}  // namespace

TEST_CASE("rows that decode to no number end the measurement with their place", "[fidelity]") {
  const Recorded in;
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF})
    for (const Role role : {Role::kKey, Role::kValue})
      for (const bool side : {false, true}) {
        const auto set = dummy_codec_set(in.rows->scope().shape, RopePlacement::kPost, 2, [&](const UnitShape& unit) {
          const bool broken = unit.layer == 1 && unit.role == role;
          return std::make_unique<BrokenDummy>(unit, broken && side ? bad : 1, broken && !side ? bad : 0);
        });
        std::string error = "no error";
        try {
          in.measure(*set);
        } catch (const Error& e) { error = e.what(); }
        INFO(error);
        // Windows go side by side: any of them may be the first.
        for (const std::string& part :
             side ? std::vector{fmt::format("the scale of token 159 is {}", bad)}
                  : std::vector{fmt::format("layer 1, role {}, KV head 1, document ", role_name(role)),
                                fmt::format(": token 4, channel 15 decodes to {}", bad)})
          CHECK(error.find(part) != std::string::npos);
      }
}

TEST_CASE("what the exact type cannot hold is refused in a sweep as in a replay, wherever it stands", "[fidelity]") {
  const auto error_of = [](const auto& body) -> std::string {
    try {
      body();
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kBadData);
      return e.what();
    }
    return "";
  };
  struct Case {
    const char* what;
    int64_t token;  // of 160, 4 of them sinks; blocks of 16 tokens leave a tail of 12
    std::vector<std::pair<int64_t, float>> values;
    bool pre = true, post = true;  // refused where keys are held before and after RoPE
  };
  for (const Case& c : {Case{"a sink", 2, {{15, 70'144}}}, Case{"a coded row", 60, {{15, 70'144}}},
                        Case{"a short tail", 158, {{15, 70'144}}},
                        // Held by f16 before they are turned, at 60,000 * (sin + cos) no longer.
                        Case{"turned keys", 158, {{0, 59'904}, {8, 59'904}}, false, true}})
    for (const Role role : {Role::kKey, Role::kValue}) {
      if (role == Role::kValue && !c.pre) continue;
      Recorded in(160, 0, [&](TraceWindowData& w) {
        for (const auto& [channel, value] : c.values)
          if (w.document == 3) (role == Role::kKey ? w.key : w.value)[1](c.token, 16 + channel) = value;
      });
      for (const bool streaming : {false, true})
        for (const RopePlacement rope : {RopePlacement::kPre, RopePlacement::kPost})
          for (const char* exact : {"f16", "bf16"}) {
            CAPTURE(c.what, role_name(role), streaming, static_cast<int>(rope), exact);
            Json cache = {{"sinks", 4}, {"window", 16}, {"flush", 16}, {"exact_dtype", exact}};
            if (streaming) cache["policy"] = "streaming";
            in.config.cache = canonical_cache_config(cache);
            in.rows = std::make_unique<TraceRows>(*in.reader, in.config);
            const auto set = dummy_codec_set(in.rows->scope().shape, rope, 1, [](const UnitShape& unit) {
              return std::make_unique<PositionDummy>(unit, 16);
            });
            const std::string swept = error_of([&] { in.measure(*set); }),
                              replayed = error_of([&] {
                                CompressedCache held(set, in.config.policy());
                                in.replay(held);
                              });
            INFO(swept);
            INFO(replayed);
            const bool refused = std::string(exact) == "f16" && (rope == RopePlacement::kPre ? c.pre : c.post);
            REQUIRE(swept.empty() == !refused);
            REQUIRE(replayed.empty() == !refused);
            if (!refused) continue;
            const auto words = [](const std::string& text) { return text.substr(text.find(", channel ")); };
            CHECK(words(swept) == words(replayed));
            CHECK_THAT(swept, Catch::Contains(fmt::format("/{}: layer 1, head 1, row {}, channel ",
                                                          role == Role::kKey ? "key" : "value", 3 * 160 + c.token)));
            CHECK_THAT(swept, Catch::Contains("leaves f16, the cache's exact_dtype; bf16 and f32 reach further"));
          }
    }
}

TEST_CASE("windows without recorded queries are measured where they can be", "[fidelity]") {
  const Recorded in(160, 6);  // document 0: 6 tokens, no query
  REQUIRE(in.rows->windows().at(0).query_row.empty());
  const auto set = dummy_codec_set(in.rows->scope().shape, RopePlacement::kPost, 1,
                                   [](const UnitShape& unit) { return std::make_unique<SparseDummy>(unit, 2, false); });
  for (const Measurement& m : in.measure(*set).report) {
    INFO(m.tag);
    CHECK(m.n == (m.tag.starts_with("key") || m.tag.starts_with("value") ? 2 : 1));
  }
}

TEST_CASE("the bytes of a sweep are those of a replay: exact exceptions and what is fitted to the prompt",
          "[fidelity]") {
  const int64_t tokens = 160;
  const Recorded in(tokens);
  const CacheShape& shape = in.rows->scope().shape;
  for (const bool fitted : {false, true}) {
    const auto set =
        dummy_codec_set(shape, RopePlacement::kPost, 2, [&](const UnitShape& unit) -> std::unique_ptr<Codec> {
          if (fitted) return std::make_unique<PromptDummy>(unit);
          return std::make_unique<SparseDummy>(unit, unit.role == Role::kKey ? 3 : 1, false);
        });
    const FidelityResult f = in.measure(*set);
    CountingResource memory;
    CompressedCache cache(set, in.config.policy(), &memory);
    in.replay(cache);
    const ByteLedger held = cache.bytes();
    CHECK(cost_ledgers(*set, in.config, in.config.policy(), f.extras).at(std::to_string(tokens)) == held.to_json());
    CHECK(held.total_sequence() == memory.live());
    CHECK((fitted ? held.workspace : held.overlay) > 0);
    double bits = 0;
    for (const Json& m : cost_measurements(*set, in.config, in.config.policy(), f.extras)) {
      if (m.at("tag") == "bytes" && !m.contains("sequences")) CHECK(m.at("value") == held.total_sequence());
      if (m.at("tag") == "bits_per_value.codes") bits = m.at("value").get<double>();
    }
    // 3 or 4 bits, an f16 scale a unit of 32 channels and role; 4 bytes an exception, 4 of 64 values, and 4 a token.
    CHECK(bits == Approx(fitted ? 4.0 + 16.0 / 32 : 3.0 + 16.0 / 32 + 4 * 32.0 / 64 + 32.0 / 32));
  }
}

TEST_CASE("nothing is read for a method that it does not need", "[fidelity]") {
  const Recorded in;
  UnitShape unit;
  unit.head_dim = 16;
  unit.heads = 2;
  const TrainData rows = in.rows->unit(unit, {.rows = true});
  CHECK(rows.x.rows == 156);
  CHECK(rows.position.size() == 156);
  for (const Matrix<float>* m : {&rows.other_role, &rows.queries, &rows.query_moment, &rows.output_weight})
    CHECK(m->rows == 0);
  CHECK(rows.received_mass.empty());
  CHECK(rows.query_pair_moment.empty());
  const TrainData all = in.rows->unit(
      unit, {.rows = true, .mass = true, .queries = true, .moments = true, .output_weight = true, .other_role = true});
  CHECK(all.x.storage == rows.x.storage);
  CHECK(all.other_role.rows == 156);
  CHECK(all.queries.rows == 20 * 2);
  CHECK(all.query_moment.rows == 32);
  CHECK(all.query_moment(17, 17) == Approx(2 * all.query_moment(16, 16)));
  CHECK(all.query_pair_moment.size() == 16);
  CHECK(all.output_weight.cols == 64);
  CHECK(all.received_mass2[9] == Approx(0.5));  // of two heads
}

TEST_CASE("squared gradients that a trace does not hold are refused with its path and the knob", "[fidelity]") {
  const Recorded in;
  const CacheShape& full = in.reader->info().shape;
  CellConfig config = in.config;
  config.layers = {1};  // which is the only one, and still layer 1
  const TraceRows rows(*in.reader, config);
  const CodecPlan plan =
      plan_in_scope(resolve_codec({{"name", "kvquant"}, {"heads", 2}, {"weight", "fisher"}}, full), rows.scope());
  REQUIRE(plan.skip.empty());
  try {
    train_codec_set(plan, rows.scope().shape, rows, {});
    FAIL_CHECK("trained");
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK_THAT(e.what(), Catch::Contains("layer 1, role ") && Catch::Contains(", heads 0..1: kvquant: ") &&
                             Catch::Contains(in.config.trace) && Catch::Contains("holds no squared gradients") &&
                             Catch::Contains("vqkv-dump capture --gradients") && Catch::Contains("weight: none"));
  }
}

TEST_CASE("squared gradients come to a codec in its domain, row by row", "[fidelity]") {
  const Recorded in(160, 0, {}, "next-token");
  UnitShape unit;
  unit.layer = 1;
  unit.head_dim = 16;
  unit.heads = 2;
  for (const auto& [role, rope, factor] :
       {std::tuple<Role, RopePlacement, float>{Role::kKey, RopePlacement::kPre, 1.0f},
        {Role::kKey, RopePlacement::kPost, 100.0f},
        {Role::kValue, RopePlacement::kPost, 1.0f}}) {
    unit.role = role;
    unit.rope = rope;
    const TrainData data = in.rows->unit(unit, {.rows = true, .gradients = true});
    REQUIRE(data.squared_gradient.rows == 156);
    REQUIRE(data.squared_gradient.cols == 32);
    for (int64_t r = 0; r < 156; ++r)
      for (int64_t c = 0; c < 32; ++c) {
        const float square = data.squared_gradient(r, c), want = factor * static_cast<float>(r + 5);  // after 4 sinks
        // Whether a value was negative is its own before RoPE.
        if (role == Role::kKey && rope == RopePlacement::kPost)
          REQUIRE((square == to_float(to_bf16(want)) || square == to_float(to_bf16(want * 1e-3f))));
        else
          REQUIRE(square == to_float(to_bf16(want * (data.x(r, c) < 0 ? 1e-3f : 1.0f))));
      }
  }
  CHECK(in.rows->unit(unit, {.rows = true}).squared_gradient.rows == 0);
}

TEST_CASE("kvquant learns by the squared gradients of a trace", "[fidelity]") {
  const Recorded in(160, 0, {}, "next-token");
  // Of values on the side of the gradients, of all others.
  const auto errors = [&](const std::string& weight) {
    const Json config = {{"name", "kvquant"}, {"bits", 2}, {"outliers", 0}, {"weight", weight}};
    const auto set =
        train_codec_set(resolve_codec(config, in.rows->scope().shape), in.rows->scope().shape, *in.rows, {});
    UnitShape unit;
    unit.role = Role::kValue;
    unit.head_dim = 16;
    unit.heads = 2;
    const TrainData data = in.rows->unit(unit, {.rows = true});
    const auto index = static_cast<size_t>(set->unit_index(0, 0, Role::kValue));
    const Codec& codec = *set->units()[index].codec;
    CodeBlock block;
    codec.encode(data.x, block);
    Matrix<float> back(data.x.rows, data.x.cols);
    codec.decode(block, back);
    double above = 0, below = 0;
    for (size_t i = 0; i < back.storage.size(); ++i) {
      const double off = double{back.storage[i]} - double{data.x.storage[i]};
      (data.x.storage[i] < 0 ? below : above) += off * off;
    }
    return std::pair(above, below);
  };
  const auto fisher = errors("fisher"), plain = errors("none");
  CHECK(fisher.first < 0.8 * plain.first);
  CHECK(fisher.second > plain.second);
}

TEST_CASE("numbers about decoded rows are of what a cache codes sooner or later", "[fidelity]") {
  // What is not coded comes back as zeros, the rest halved.
  struct Halves final : DecodedSource {
    const TraceRows& rows;
    int64_t end_k, end_v;
    Halves(const TraceRows& of, int64_t k, int64_t v) : rows(of), end_k(k), end_v(v) {}
    void decoded(int layer, int head, const EvalWindow& w, MutMatrix k_hat, MutMatrix v_hat) const override {
      const auto halve = [](const Matrix<float>& x, int64_t end, MutMatrix hat) {
        for (int64_t t = 0; t < x.rows; ++t)
          for (int64_t c = 0; c < x.cols; ++c) hat(t, c) = t < end ? x(t, c) / 2 : 0;
      };
      halve(rows.keys(layer, head, w), end_k, k_hat);
      halve(rows.values(layer, head, w), end_v, v_hat);
    }
  };
  // From token 96 on rows are loud: whoever counts them sees other numbers.
  const Recorded in(160, 0, [](TraceWindowData& w) {
    for (auto* of : {&w.key, &w.value})
      for (Matrix<float>& x : *of)
        for (int64_t t = 96; t < x.rows; ++t)
          for (int64_t c = 0; c < x.cols; ++c) x(t, c) *= static_cast<float>(1 + t % 7);
  });
  struct Case {
    Json cache;
    int64_t end_k, end_v;
  };
  const Json k = {{"window", 16}, {"flush", 16}}, v = {{"window", 0}, {"flush", 1}};
  for (const auto& [cache, end_k, end_v] :
       {Case{{{"sinks", 4}, {"k", k}, {"v", v}, {"prompt", 96}, {"generated", "exact"}}, 68, 96},
        Case{{{"sinks", 4}, {"k", k}, {"v", v}, {"prompt", 96}}, 160, 160},
        Case{{{"sinks", 4}, {"k", k}, {"v", v}}, 160, 160}}) {
    CAPTURE(cache.dump());
    CellConfig config = in.config;
    config.cache = canonical_cache_config(cache);
    config.metrics = {"code_usage", "key_nmse", "value_nmse"};
    const TraceRows rows(*in.reader, config);
    for (const Measurement& m : measure_fidelity(rows, Halves(rows, end_k, end_v), [](int) {}).report)
      if (m.tag == "key.nmse" || m.tag == "value.nmse") CHECK(m.value == Approx(0.25).epsilon(1e-6));
    const auto set = train_codec_set(resolve_codec({{"name", "rtn"}, {"bits", 4}, {"group", 16}}, rows.scope().shape),
                                     rows.scope().shape, rows, {});
    const FidelityResult coded = measure_fidelity(rows, *set, [](int) {});
    CHECK(coded.coded_values == 3 * 2 * 2 * 16 * (end_k - 4 + end_v - 4));  // windows, layers, heads
    const EvalWindow& w = rows.windows().front();
    std::vector<HeadRows> heads = {exact_rows(rows, 0, 0, w), exact_rows(rows, 0, 1, w)};
    CodeBlock block;
    for (const TrainedUnit& u : set->units()) {
      if (u.spec.unit.layer > 0) continue;
      code_unit(rows, *set, u, w, heads, block);
      const HeadRows& head = heads[static_cast<size_t>(u.spec.unit.first_head)];
      const bool key = u.spec.unit.role == Role::kKey;
      CHECK((key ? head.coded_k : head.coded_v) == (key ? end_k : end_v));
      CHECK(block.blocks == (key ? end_k : end_v) - 4);
    }
  }
}

TEST_CASE("a sweep gives codecs the decoded rows of the layer below", "[fidelity]") {
  const Recorded in;
  const auto set = dummy_codec_set(in.rows->scope().shape, RopePlacement::kPre, 2,
                                   [](const UnitShape& unit) { return std::make_unique<LowerDummy>(unit, 8); });
  for (const Measurement& m : in.measure(*set).report) {
    if (m.tag.find("nmse") == std::string::npos) continue;
    CAPTURE(m.tag);
    CHECK(m.value > 0);
    CHECK(m.value < 1e-3);  // rows without those that they were coded from are as far off as rows of another token
  }
}

TEST_CASE("a codec that sees the layer below is skipped where that layer is not chosen", "[fidelity]") {
  struct Above final : Method {
    MethodInfo describe() const override {
      MethodInfo info;
      info.name = "above";
      return info;
    }
    std::vector<Knob> knobs() const override { return {}; }
    Json canonical(const Json& knobs, const std::string&) const override { return knobs; }
    std::string check(const Json&, const UnitShape&) const override { return ""; }
    TrainNeeds needs(const Json&) const override { return {.lower = true}; }
    std::unique_ptr<Codec> make(const Json&, const UnitShape& unit) const override {
      return std::make_unique<LowerDummy>(unit);
    }
  };
  static const Above above;
  register_method(above);
  const Recorded in;
  const CacheShape& full = in.reader->info().shape;
  const auto chosen = [&](std::vector<int64_t> layers) {
    CellConfig config = in.config;
    config.layers = std::move(layers);
    return plan_in_scope(resolve_codec({{"name", "above"}}, full), scope_of(config, full));
  };
  CHECK(chosen({0}).skip.empty());
  CHECK(chosen({0, 1}).skip.empty());
  const char* const missing = "layer 1 sees the rows of layer 0, which is not chosen";
  CHECK_THAT(chosen({1}).skip, Catch::Contains(missing));
  CellConfig config = in.config;
  config.codec = {{"name", "above"}};
  config.curve_layers = {1};
  CHECK_THAT(curve_plan(config, full).skip, Catch::StartsWith("train.curve: ") && Catch::Contains(missing));
  config.curve_layers = {0};
  CHECK(curve_plan(config, full).units.size() == chosen({0}).units.size());
}

TEST_CASE("a sweep of some layers codes each as a sweep of all layers does", "[fidelity]") {
  const CacheShape full = make_shape(20, 2, 1, 64);
  CellConfig config;
  config.layers = {2, 17};
  for (const Method* method : all_methods()) {
    const CodecPlan all = resolve_codec({{"name", method->describe().name}}, full),
                    some = plan_in_scope(all, scope_of(config, full));
    if (!all.skip.empty() || !some.skip.empty()) continue;
    for (const UnitSpec& spec : some.units) {
      const auto layer = config.layers[static_cast<size_t>(spec.unit.layer)];
      const auto whole = std::ranges::find_if(all.units, [&](const UnitSpec& other) {
        return other.unit.layer == layer && other.unit.role == spec.unit.role;
      });
      REQUIRE(whole != all.units.end());
      CAPTURE(spec.method, layer, role_name(spec.unit.role));
      CHECK(make_codec(spec)->layout().bits_per_token() == make_codec(*whole)->layout().bits_per_token());
    }
  }
}

TEST_CASE("a query of a sweep sees each token in the tier of its age", "[fidelity][tiers]") {
  const Recorded in;
  const CacheShape& shape = in.rows->scope().shape;
  const auto trained = [&](const char* codec) {
    const CodecPlan plan = resolve_codec(parse_json(codec, "test"), shape);
    REQUIRE(plan.skip == "");
    return train_codec_set(plan, shape, *in.rows, {});
  };
  const auto value = [](const std::vector<Measurement>& all, const char* tag) {
    for (const Measurement& m : all)
      if (m.tag == tag) return m.value;
    FAIL(tag);
    return 0.0;
  };
  const char* const tags[] = {"attention.softmax_kl", "output.relative_error", "key.nmse", "value.nmse"};
  const FidelityResult whole =
                           in.measure(*trained(R"({"name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 4})")),
                       first =
                           in.measure(*trained(R"({"name": "rvq", "preset": "embedded", "codebooks": 1, "bits": 4})"));
  // No token lives long enough: what one tier gives, sample by sample.
  const FidelityResult young = in.measure(*trained(R"({"tiers": [
      {"tokens": 160, "name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 4}, {"level": 1}]})"));
  const FidelityResult mixed = in.measure(*trained(R"({"tiers": [
      {"tokens": 48, "name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 4}, {"level": 1}]})"));
  for (const char* tag : tags) {
    CAPTURE(tag);
    const double a = value(whole.report, tag), b = value(first.report, tag);
    CHECK(value(young.report, tag) == Approx(a).epsilon(1e-6));
    CHECK(value(mixed.report, tag) > a);
    CHECK(value(mixed.report, tag) < b);
    CHECK(value(mixed.select, tag) > value(whole.select, tag));
  }
  CHECK(mixed.coded_share_k == whole.coded_share_k);
  CHECK(mixed.extras.size() == 2 * whole.extras.size());
  // Bits are those of the mix at the context: of 128 coded tokens 48 are in the newest tier.
  const auto set = trained(R"({"tiers": [
      {"tokens": 48, "name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 4}, {"level": 1}]})");
  const Json costs = cost_measurements(*set, in.config, in.config.policy(), mixed.extras);
  CHECK(costs[0]["tag"] == "bits_per_value.codes");
  CHECK(costs[0]["value"].get<double>() == Approx((48 * 16 + 80 * 4) / 128.0 / 16));
  CHECK(ledger_at(*set, in.config.policy(), 160, mixed.extras).codes ==
        2 * shape.layers * shape.kv_heads * (48 * 16 + 80 * 4) / 8);
  CHECK_THROWS_WITH(in.measure(*[&] {
    std::vector<TrainedUnit> units = dummy_codec_set(shape, RopePlacement::kPost, 1, [](const UnitShape& unit) {
                                       return std::make_unique<PromptDummy>(unit);
                                     })->units();
    const auto exact = exact_codec_set(shape);
    for (TrainedUnit u : exact->units()) {
      u.spec.tier = 1;
      units.push_back(std::move(u));
    }
    return std::make_shared<CodecSet>(shape, Json::object(), std::move(units), "", std::vector<int64_t>{48});
  }()),
                    Catch::Contains("each prompt"));
}
