// The rows that a sweep measures are those that a replay attends to: every registered method, with and without
// transforms, keys before and after RoPE, and the seams of few methods or none (exact exceptions, parameters fitted to
// the prompt).
#include <map>

#include "cache/view.h"
#include "codec/build.h"
#include "codec/codec_archive.h"
#include "codec/transform/transform.h"
#include "core/thread_pool.h"
#include "experiment/fidelity.h"
#include "experiment/tier_rows.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"
#include "support/memory_parameters.h"
#include "support/method_configs.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

constexpr int64_t kTokens = 256;

// Windows and flushes of their own for keys and values: what is fitted to the prompt depends on both.
struct Policy {
  const char* cache;
  int64_t keys, values;  // of kTokens, that are coded
};
const Policy kWindows{R"({"sinks": 4, "k": {"window": 40, "flush": 64}, "v": {"window": 70, "flush": 64}})", 192, 128};
// Nothing is coded before 200 tokens are there, and nothing of what follows them.
const Policy kPrompt{
    R"({"sinks": 4, "k": {"window": 40, "flush": 64}, "v": {"window": 70, "flush": 64}, "prompt": 200, "generated": "exact"})",
    128, 64};
// An image between texts.
const Policy kImage{R"({"coded": "image"})", 150, 150};
constexpr TokenRun kImageTokens{41, 191};

struct Recorded {
  Policy policy;
  TestFolder folder;
  std::unique_ptr<TraceReader> reader;
  std::unique_ptr<TraceRows> rows;
  explicit Recorded(int layers = 1, int head_dim = 64, const RopeFacts* rope = nullptr, int64_t every = 8,
                    const Policy& of = kWindows)
      : policy(of) {
    write_sweep_trace(folder / "t.trace.h5", 3, kTokens, layers, 2, head_dim, 1, 0, rope,
                      image_at(kImageTokens.begin, kImageTokens.end), every, "", {"text", "image"});
    CellConfig config;
    config.trace = folder / "t.trace.h5";
    config.train = {0, 1};
    config.report = {2};
    config.cache = canonical_cache_config(parse_json(policy.cache, "test"));
    reader = std::make_unique<TraceReader>(config.trace);
    rows = std::make_unique<TraceRows>(*reader, config);
  }
};

// What a replay of the window holds coded: (tokens, head_dim) a head, keys after RoPE.
struct Replayed {
  Replayed(const Recorded& in, std::shared_ptr<const CodecSet> set, int64_t block, bool exact_prompt = false)
      : cache(std::move(set), in.rows->policy(in.rows->windows().at(0)), &memory) {
    const CacheShape& shape = cache.shape();
    const EvalWindow& w = in.rows->windows().at(0);
    std::vector<Matrix<float>> k, v, q;  // q: where the trace has those of every token
    for (int layer = 0; layer < shape.layers; ++layer) {
      k.emplace_back(kTokens, shape.kv_heads * shape.head_dim);
      v.push_back(k.back());
      if (w.window.queries == kTokens) q.emplace_back(kTokens, shape.q_heads * shape.head_dim);
      for (int h = 0; h < shape.q_heads && !q.empty(); ++h) {
        Matrix<float> one(kTokens, shape.head_dim);
        in.reader->query(layer, h, w.window.first_query, kTokens, one);
        for (int64_t t = 0; t < kTokens; ++t)
          std::copy_n(one.row(t), shape.head_dim, q.back().row(t) + h * shape.head_dim);
      }
      for (int h = 0; h < shape.kv_heads; ++h) {
        const Matrix<float> from_k = in.rows->keys(layer, h, w), from_v = in.rows->values(layer, h, w);
        for (int64_t t = 0; t < kTokens; ++t) {
          std::copy_n(from_k.row(t), shape.head_dim, k.back().row(t) + h * shape.head_dim);
          std::copy_n(from_v.row(t), shape.head_dim, v.back().row(t) + h * shape.head_dim);
        }
      }
    }
    for (int64_t t = 0; t < kTokens; t += block) {
      const int64_t n = std::min(block, kTokens - t);
      cache.begin_block(n, exact_prompt ? Visibility::kExactPrefill : Visibility::kReplay);
      for (size_t layer = 0; layer < k.size(); ++layer)
        cache.append(static_cast<int>(layer), k[layer].view().slice_rows(t, n), v[layer].view().slice_rows(t, n),
                     q.empty() ? ConstMatrix() : ConstMatrix(q[layer].view().slice_rows(t, n)));
      cache.end_block();
    }
    cache.end_exact_prefill();
  }
  Matrix<float> coded(const TraceRows& rows, int layer, int head, Role role) const {
    const auto unit = static_cast<size_t>(cache.codecs()->unit_index(layer, head, role));
    const CacheView view(cache);
    const UnitShape& u = view.unit_shape(unit);
    const DecodePlan& plan = view.plan(layer, head, role);
    const Matrix<float> all = view.decode_codes(unit, 0, view.slots(unit));
    Matrix<float> x(all.rows, u.head_dim);
    for (int64_t t = 0; t < x.rows; ++t) {
      std::copy_n(all.row(t) + (head - u.first_head) * x.cols, x.cols, x.row(t));
      const auto position = static_cast<int32_t>(t + cache.policy().sinks);
      if (role == Role::kKey && plan.rope == RopePlacement::kPre)
        rope_apply(rows.rope(), &position, x.view().slice_rows(t, 1));
    }
    return x;
  }
  CountingResource memory;
  CompressedCache cache;
};

void check_same_rows(const Recorded& in, std::shared_ptr<const CodecSet> set, bool steps = false) {
  const TraceRows& rows = *in.rows;
  const EvalWindow& w = rows.windows().at(0);
  const int layers = set->shape().layers, kv_heads = set->shape().kv_heads;
  std::vector<HeadRows> heads;  // (layers, kv_heads)
  for (int i = 0; i < layers * kv_heads; ++i) heads.push_back(exact_rows(rows, i / kv_heads, i % kv_heads, w));
  std::vector<CodeBlock> blocks(set->units().size());
  std::vector<Matrix<float>> decoded(set->units().size());
  for (size_t u = 0; u < set->units().size(); ++u) {
    const auto first = static_cast<size_t>(set->units()[u].spec.unit.layer * kv_heads);
    const int lower = set->lower_unit(u);
    code_unit(rows, *set, set->units()[u], w, std::span(heads).subspan(first, static_cast<size_t>(kv_heads)), blocks[u],
              lower < 0 ? ConstMatrix() : ConstMatrix(decoded[static_cast<size_t>(lower)]), &decoded[u]);
  }

  struct Way {
    int64_t block;
    bool exact_prompt;  // seen exactly and coded at its end
  };
  for (const auto& [block, exact_prompt] : {Way{kTokens, false}, Way{19, false}, Way{19, true}, Way{1, false}}) {
    if (block == 1 && !steps) continue;
    if (exact_prompt && rows.config().policy().prompt > 0) continue;  // ends where it is told, not where the text does
    const Replayed replayed(in, set, block, exact_prompt);
    CHECK(replayed.cache.bytes().total_sequence() == replayed.memory.live());
    const int64_t sinks = replayed.cache.policy().sinks;
    for (int i = 0; i < layers * kv_heads; ++i)
      for (const Role role : {Role::kKey, Role::kValue}) {
        const int layer = i / kv_heads, h = i % kv_heads;
        CAPTURE(block, exact_prompt, layer, h, role_name(role));
        const Matrix<float> held = replayed.coded(rows, layer, h, role);
        const HeadRows& from = heads[static_cast<size_t>(i)];
        const Matrix<float>& measured = role == Role::kKey ? from.k_hat : from.v_hat;
        const DecodePlan& keys = CacheView(replayed.cache).plan(layer, h, Role::kKey);
        const ScoreMap& map = keys.score;
        CHECK(from.query.exact() == (keys.query == QueryForm::kExact));
        CHECK(from.score.kind == map.kind);
        CHECK(from.score.high_shift == map.high_shift);
        REQUIRE(held.rows == (role == Role::kKey ? in.policy.keys : in.policy.values));
        bool same = true;
        for (int64_t t = 0; t < held.rows; ++t)
          same = same && std::equal(held.row(t), held.row(t) + held.cols, measured.row(sinks + t));
        CHECK(same);
      }
  }
}

}  // namespace

TEST_CASE("a sweep measures the rows that a replay holds: every method", "[conformance][coder]") {
  const Recorded windows, prompt(1, 64, nullptr, 8, kPrompt);
  for (const Method* method : all_methods()) {
    const std::string name = method->describe().name;
    std::map<std::string, int> ran;
    for (const std::string& group : test_groups(name))
      for (const char* rope : {"post", "pre"})
        for (const int heads : {1, 2})
          for (const bool transforms : {false, true}) {
            Json config = test_config(name, group);
            set_rope(config, rope);
            config["heads"] = heads;
            if (transforms) config["transform"] = chain_of(name);
            const CodecPlan plan =
                plan_in_scope(resolve_codec(config, windows.reader->info().shape), windows.rows->scope());
            if (!plan.skip.empty()) continue;
            CAPTURE(name, group, rope, heads, transforms);
            const std::shared_ptr<const CodecSet> set =
                train_codec_set(plan, windows.rows->scope().shape, *windows.rows, {});
            check_same_rows(windows, set);
            check_same_rows(prompt, set);
            ++ran[std::string(rope) + (transforms ? ", transforms" : ", plain")];
          }
    for (const std::string& rope : method->describe().rope)
      for (const char* with : {", transforms", ", plain"}) {
        CAPTURE(name, rope, with);
        CHECK(ran[rope + with] > 0);
      }
  }
}

TEST_CASE("a sweep measures the rows that a replay holds: every transform", "[conformance][coder]") {
  const Recorded sparse, every_query(1, 64, nullptr, 1);
  for (const TransformKind* kind : all_transforms()) {
    const std::string name = kind->describe().name;
    for (const char* rope : {"post", "pre"})
      for (const int heads : {1, 2}) {
        if (!takes(*kind, Role::kKey, rope)) continue;
        const Json own = test_transform(name);
        Json config = test_config("pq");
        config["codebooks"] = 8;
        config["heads"] = heads;
        config["k"] = {{"rope", rope}, {"transform", Json::array({"center", own})}};
        if (takes(*kind, Role::kValue)) config["v"] = {{"transform", Json::array({own})}};
        const bool fits = kind->make(kind->canonical(Json::object(), ""), {.head_dim = 64})->fit_needs().tokens > 0;
        const Recorded& in = fits ? every_query : sparse;
        const CodecPlan plan = plan_in_scope(resolve_codec(config, in.reader->info().shape), in.rows->scope());
        CAPTURE(name, rope, heads, plan.skip);
        REQUIRE(plan.skip.empty());
        check_same_rows(in, train_codec_set(plan, in.rows->scope().shape, *in.rows, {}), fits);
      }
  }
}

TEST_CASE("a codec set has the same parameters at one, two and four threads: every method", "[conformance]") {
  const Recorded in;
  const int before = thread_count();
  for (const Method* method : all_methods()) {
    const std::string name = method->describe().name;
    for (const char* share : {"none", "heads"}) {
      Json config = test_config(name);
      config["share"] = share;
      config["transform"] = chain_of(name);
      if (config["transform"].size() == 3) {  // the method stands behind what mixes channels: behind what learns to
        config["transform"] = Json::array({"center", "rotation"});
        config["k"]["transform"] = Json::array({"center", "query_metric", "rotation"});
      }
      const CodecPlan plan = plan_in_scope(resolve_codec(config, in.reader->info().shape), in.rows->scope());
      CAPTURE(name, share, plan.skip);
      REQUIRE(plan.skip.empty());
      std::vector<MemoryParameters> one;
      for (const int threads : {1, 2, 4}) {
        set_thread_count(threads);
        const auto set = train_codec_set(plan, in.rows->scope().shape, *in.rows, {});
        std::vector<MemoryParameters> saved;
        for (const TrainedUnit& u : set->units()) u.codec->save(saved.emplace_back());
        if (threads == 1) one = saved;
        CHECK(saved == one);
      }
    }
  }
  set_thread_count(before);
}

TEST_CASE("a sweep measures the rows that a replay holds: exceptions, fitted parameters", "[conformance][coder]") {
  const Recorded in(1, 64, nullptr, 1);
  const CacheShape& shape = in.rows->scope().shape;
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre})
    for (const int heads : {1, 2}) {
      CAPTURE(static_cast<int>(rope), heads);
      for (const bool add : {false, true})
        check_same_rows(in, dummy_codec_set(shape, rope, heads, [&](const UnitShape& unit) {
                          return std::make_unique<SparseDummy>(unit, 3, add);
                        }));
      // Fitted to what is there when the first token is coded (107), to more, and to queries.
      for (const bool other_role : {false, true})
        for (const FitNeeds needs :
             {FitNeeds{2, false}, FitNeeds{2, true}, FitNeeds{150, false}, FitNeeds{150, true}}) {
          CAPTURE(other_role, needs.tokens, needs.queries);
          check_same_rows(in,
                          dummy_codec_set(shape, rope, heads,
                                          [&](const UnitShape& unit) {
                                            return std::make_unique<PromptDummy>(unit, other_role, needs);
                                          }),
                          true);
        }
    }
}

TEST_CASE("a sweep measures the rows that a replay holds: an image between texts", "[conformance][coder]") {
  const Recorded in(2, 16, nullptr, 8, kImage);
  const TraceRows& rows = *in.rows;
  CHECK(rows.train_rows() == 2 * kImageTokens.tokens());  // of two documents
  const auto check = [&](const Json& config) {
    CAPTURE(config.dump());
    const CodecPlan plan = plan_in_scope(resolve_codec(config, in.reader->info().shape), rows.scope());
    REQUIRE(plan.skip.empty());
    REQUIRE(cache_conflict(rows.config().policy(), plan).empty());
    check_same_rows(in, train_codec_set(plan, rows.scope().shape, rows, {}), true);
  };
  for (const char* rope : {"post", "pre"})
    for (const char* preset : {"default", "b4"})
      check({{"name", "calibquant"}, {"preset", preset}, {"k", {{"rope", rope}}}});
  check({{"name", "rvq"}, {"codebooks", 2}, {"bits", 4}, {"transform", {"center"}}});

  // Ranges are those of the image's own tokens, whatever stands around it.
  const auto set =
      train_codec_set(resolve_codec({{"name", "calibquant"}, {"bits", 8}, {"value_clip", 1}}, rows.scope().shape),
                      rows.scope().shape, rows, {});
  const Replayed replayed(in, set, 19);
  const Matrix<float> held = replayed.coded(rows, 0, 1, Role::kValue), exact = rows.values(0, 1, rows.windows().at(0));
  for (int64_t c = 0; c < held.cols; ++c) {
    float low = INFINITY, high = -INFINITY;
    for (int64_t t = kImageTokens.begin; t < kImageTokens.end; ++t) {
      low = std::min(low, exact(t, c));
      high = std::max(high, exact(t, c));
    }
    for (int64_t t = 0; t < held.rows; ++t)
      CHECK(held(t, c) == Approx(exact(kImageTokens.begin + t, c)).margin((high - low) * 0.6 / 255 + 1e-3));
  }
}

TEST_CASE("a sweep codes nothing of a window that is too short to be fitted to, and needs every query of a longer one",
          "[conformance][coder]") {
  const Recorded in(1, 16), all(1, 16, nullptr, 1);
  const auto code = [](const Recorded& from, FitNeeds needs) {
    const TraceRows& rows = *from.rows;
    const EvalWindow& w = rows.windows().at(0);
    const auto set = dummy_codec_set(rows.scope().shape, RopePlacement::kPost, 1, [&](const UnitShape& unit) {
      return std::make_unique<PromptDummy>(unit, false, needs);
    });
    std::vector<HeadRows> heads = {exact_rows(rows, 0, 0, w), exact_rows(rows, 0, 1, w)};
    CodeBlock block;
    code_unit(rows, *set, set->units()[0], w, heads, block);
    CHECK((heads[0].coded_k > 4) == (block.blocks > 0));
    return block.blocks;
  };
  CHECK(code(in, {kTokens, false}) == kTokens - 4);
  CHECK(code(all, {kTokens, true}) == kTokens - 4);
  CHECK(code(all, {kTokens + 1, true}) == 0);
  CHECK_THROWS_WITH(code(in, {2, true}), Catch::Contains("the queries of a prompt's first 107 tokens, and 13 of them "
                                                         "are recorded") &&
                                             Catch::Contains("--query-stride 1"));
}

TEST_CASE("a sweep measures the rows that a replay holds: positions, rows of the layer below", "[conformance][coder]") {
  const Recorded in(3, 16);
  const auto check = [&](RopePlacement rope, int heads,
                         const std::function<std::unique_ptr<Codec>(const UnitShape&)>& make) {
    CAPTURE(static_cast<int>(rope), heads);
    check_same_rows(in, dummy_codec_set(in.rows->scope().shape, rope, heads, make));
  };
  for (const RopePlacement rope : {RopePlacement::kPost, RopePlacement::kPre})
    for (const int heads : {1, 2}) {
      for (const int block : {1, 32})
        check(rope, heads, [&](const UnitShape& unit) { return std::make_unique<PositionDummy>(unit, block); });
      check(rope, heads, [](const UnitShape& unit) { return std::make_unique<LowerDummy>(unit); });
      // Over codecs with exact exceptions, or a map and biases.
      for (const bool table : {false, true})
        check(rope, heads, [&](const UnitShape& unit) -> std::unique_ptr<Codec> {
          if (unit.layer == 2) return std::make_unique<LowerDummy>(unit);
          if (table) return std::make_unique<TableDummy>(unit, TableDummy::Options());
          return std::make_unique<SparseDummy>(unit, 3, true);
        });
    }
}

TEST_CASE("a codec knows the model's RoPE, in a sweep, in a cache and from its file", "[conformance][coder]") {
  RopeFacts model = RopeFacts::plain(16, 12, 500);
  model.apply_yarn({.factor = 4, .original_context = 64});
  REQUIRE(model.attention_factor > 1.1);
  const Recorded in(2, 16, &model);
  const CacheShape& shape = in.reader->info().shape;
  const CodecPlan plan =
      plan_in_scope(resolve_codec(parse_json(R"({"name": "exact", "rope": "pre"})", "test"), shape), in.rows->scope());
  const auto exact = train_codec_set(plan, in.rows->scope().shape, *in.rows, {});
  save_codec_set(*exact, in.folder / "c.codec.h5");
  const CodecSet read = load_codec_set(in.folder / "c.codec.h5");
  for (const auto* units : {&exact->units(), &read.units()})
    for (const TrainedUnit& u : *units) CHECK(u.spec.unit.rope_facts.to_json() == model.to_json());

  for (const int heads : {1, 2}) {
    const auto set = dummy_codec_set(in.rows->scope().shape, RopePlacement::kPre, heads,
                                     [](const UnitShape& unit) { return std::make_unique<FoldingDummy>(unit); });
    check_same_rows(in, set);
    // Behind the cache's own rotation the keys lie on the codec's grid: both turn by the same angles.
    const Replayed replayed(in, set, 19);
    const Matrix<float> keys = replayed.coded(*in.rows, 1, 1, Role::kKey);
    REQUIRE(keys.rows > 0);
    double worst = 0;
    for (const float v : keys.storage)
      worst = std::max(worst, std::abs(std::remainder(v, double{FoldingDummy::kStep})));
    CHECK(worst < 1e-4);
  }
}

TEST_CASE("a sweep measures the rows that a replay holds: tiers by age", "[conformance][coder][tiers]") {
  const Recorded in;
  const TraceRows& rows = *in.rows;
  const EvalWindow& w = rows.windows().at(0);
  for (const char* text :
       {R"({"tiers": [{"tokens": 64, "name": "rvq", "preset": "embedded", "codebooks": 4, "bits": 5, "iterations": 3},
                      {"level": 2}]})",
        R"({"tiers": [{"tokens": 64, "name": "rvq", "codebooks": 3, "bits": 5, "iterations": 3, "rope": "pre",
                       "heads": 2, "transform": ["center", "token_scale"]},
                      {"k": {"level": 1}, "v": {"name": "rtn", "bits": 3, "group": 32}}]})",
        R"({"tiers": [{"tokens": 64, "name": "kivi", "bits": 4, "group": 32, "heads": 2},
                      {"tokens": 64, "name": "rtn", "bits": 3, "group": 32, "transform": ["hadamard"]},
                      {"name": "pq", "codebooks": 16, "bits": 4, "iterations": 3}]})"}) {
    CAPTURE(text);
    const CodecPlan plan =
        plan_in_scope(resolve_codec(parse_json(text, "test"), in.reader->info().shape), rows.scope());
    REQUIRE(plan.skip == "");
    const auto set = train_codec_set(plan, rows.scope().shape, rows, {});
    const CachePolicy policy = rows.config().policy();
    std::vector<HeadRows> heads;
    for (int h = 0; h < 2; ++h) heads.push_back(exact_rows(rows, 0, h, w));
    std::vector<CodeBlock> blocks(set->units().size());
    std::vector<Matrix<float>> decoded(set->units().size());
    for (size_t u = 0; u < blocks.size(); ++u)  // tier by tier, as units stand
      if (set->units()[u].spec.tier == 0)
        code_unit(rows, *set, set->units()[u], w, heads, blocks[u], {}, &decoded[u]);
      else
        code_older_unit(
            rows, *set, u, w, heads,
            [&](size_t newer) {
              return CodedUnit{&blocks[newer], &decoded[newer]};
            },
            blocks[u], decoded[u]);
    for (const int64_t block : {kTokens, int64_t{19}, int64_t{1}})
      for (const bool exact_prompt : {false, true}) {
        const Replayed replayed(in, set, block, exact_prompt);
        const CacheView view(replayed.cache);
        for (int h = 0; h < 2; ++h)
          for (const Role role : {Role::kKey, Role::kValue})
            for (int tier = 0; tier < set->tiers(); ++tier) {
              CAPTURE(block, exact_prompt, h, role_name(role), tier);
              const auto unit = static_cast<size_t>(set->unit_index(0, h, role, tier));
              const int64_t first = view.slot_begin(unit), n = view.slots(unit);
              CHECK(n == tokens_by_tier(*set, policy, role, kTokens)[static_cast<size_t>(tier)]);
              const Matrix<float> held = view.decode_codes(unit, first, n);
              const HeadRows& from = heads[static_cast<size_t>(h)];
              const Matrix<float>& measured =
                  tier == 0 ? role == Role::kKey ? from.k_hat : from.v_hat
                            : (role == Role::kKey ? from.older_k : from.older_v)[static_cast<size_t>(tier - 1)];
              bool same = true;
              for (int64_t t = 0; t < n; ++t) {
                std::vector<float> row(64);
                std::copy_n(held.row(t) + (h - view.unit_shape(unit).first_head) * 64, 64, row.data());
                const auto position = static_cast<int32_t>(policy.sinks + first + t);
                if (role == Role::kKey && view.form(unit).plan.rope == RopePlacement::kPre)
                  rope_apply(rows.rope(), &position, MutMatrix(row.data(), 1, 64));
                same = same && std::equal(row.begin(), row.end(), measured.row(position));
              }
              CHECK(same);
            }
      }
  }
}
