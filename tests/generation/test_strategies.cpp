// Strategies of decoding on the tiny models: what they guess may change what is read, never the text.
#include "generation/strategies/strategy.h"

#include "cache/model.h"
#include "codec/build.h"
#include "golden/logits.h"
#include "support/error_of.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Learnt final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { fail_internal("nothing learns here"); }
};

std::shared_ptr<const CodecSet> codecs_for(const ModelRuntime& model, const Json& config) {
  const CacheShape shape = model.facts().cache_shape();
  const CodecPlan plan = resolve_codec(config, shape);
  REQUIRE(plan.skip == "");
  return train_codec_set(plan, shape, Learnt(), {});
}

CachePolicy buffered(int64_t group) {
  CachePolicy policy;
  policy.sinks = 0;
  policy.k = policy.v = {group + 1, group};
  return policy;
}

GenerateOptions new_tokens(int64_t n) {
  GenerateOptions options;
  options.new_tokens = n;
  return options;
}

struct Run {
  Generated text;
  StrategyCounts counts;
  ByteLedger bytes;
};

Run run(ModelRuntime& model, const std::string& name, const Json& knobs, const std::shared_ptr<const CodecSet>& codecs,
        const CachePolicy& policy, std::span<const int32_t> prompt, const GenerateOptions& options,
        const std::string& attention = "cpu-reconstruct") {
  const auto strategy = find_strategy(name).make(knobs);
  Sequence sequence(strategy->cache_model(codecs, policy), policy, attention);
  Run out;
  out.text = strategy->generate(model, sequence, prompt, options, {}, out.counts);
  sequence.check_ledger(name);
  out.bytes = sequence.cache().bytes();
  return out;
}

}  // namespace

TEST_CASE("strategies are described, their knobs canonical", "[strategy]") {
  CHECK(all_strategies().size() >= 2);
  for (const StrategyKind* kind : all_strategies()) {
    const StrategyInfo info = kind->describe();
    CAPTURE(info.name);
    CHECK(&find_strategy(info.name) == kind);
    CHECK_FALSE(info.title.empty());
    CHECK((info.target == "codec" || info.target == "exact"));
    CHECK((info.name == "plain" || !(info.paper.empty() || info.bibtex.empty() || info.caveat.empty())));
    const Json canonical = kind->canonical(Json::object(), "strategy");
    CHECK(kind->canonical(canonical, "strategy") == canonical);
    for (const Knob& k : kind->knobs()) {
      CHECK_FALSE(k.help.empty());
      CHECK_FALSE(k.range.empty());
      CHECK(canonical.contains(k.name));
    }
  }
  check_says(error_of([] { find_strategy("quantspec").canonical({{"gama", 3}}, "strategy"); }), "gamma");
}

TEST_CASE("quantspec's text is that of its INT8 target, token for token", "[strategy][quantspec]") {
  for (const std::string family : {"llama", "mistral", "qwen2", "qwen3"}) {
    const auto model = load_model(kTiny + family + ".gguf");
    const auto prompt = read_golden(kTiny + family, model->facts().vocab).ids;
    const int64_t group = model->facts().head_dim % 16 == 0 ? 16 : model->facts().head_dim;
    const auto codecs = codecs_for(*model, {{"name", "quantspec"}, {"group", group}});
    for (const double temperature : {0.0, 1.0})
      for (const bool exact_prompt : {false, true}) {
        GenerateOptions options = new_tokens(90);
        options.sampling.temperature = temperature;
        options.exact_prefill = exact_prompt;
        const Run target = run(*model, "plain", {}, codecs, buffered(group), prompt, options);
        REQUIRE(target.text.tokens.size() == 90);
        CHECK(target.counts.target.passes == 89);
        for (const std::string weights : {"same", "mlp", "layers"})
          for (const int gamma : {1, 4, 7}) {
            CAPTURE(family, temperature, exact_prompt, weights, gamma);
            const Run guessed = run(*model, "quantspec", {{"gamma", gamma}, {"draft_weights", weights}}, codecs,
                                    buffered(group), prompt, options);
            CHECK(guessed.text.tokens == target.text.tokens);
            CHECK(guessed.bytes.to_json() == target.bytes.to_json());
            const StrategyCounts& c = guessed.counts;
            CHECK(c.target.passes + c.accepted == 89);  // a pass gives what it accepts and one more
            CHECK(c.drafted == c.draft.passes);
            CHECK(c.accepted <= c.drafted);
            CHECK(c.drafted <= gamma * c.target.passes);
            CHECK(guessed.text.decode_steps == c.target.passes);
          }
      }
  }
}

TEST_CASE("a draft that reads what its target reads is always right", "[strategy][quantspec]") {
  const auto model = load_model(kTiny + "llama.gguf");
  const auto prompt = read_golden(kTiny + "llama", model->facts().vocab).ids;
  const auto codecs = codecs_for(*model, {{"name", "quantspec"}, {"group", 16}});
  CachePolicy wide = buffered(16);
  wide.k.window = wide.v.window = 512;  // nothing is coded
  const GenerateOptions options = new_tokens(41);
  const Run exact = run(*model, "plain", {}, codecs, wide, prompt, options);
  const Run guessed =
      run(*model, "quantspec", {{"gamma", 4}, {"draft_weights", "same"}}, codecs, wide, prompt, options);
  CHECK(guessed.text.tokens == exact.text.tokens);
  CHECK(guessed.counts.accepted == guessed.counts.drafted);
  CHECK(guessed.counts.target.passes == 8);  // five tokens each
  // A token that ends the text was drafted right, too, and what was drafted behind it was never judged.
  for (const size_t at : {2u, 8u, 21u, 33u}) {
    GenerateOptions stops = options;
    stops.stop = {exact.text.tokens[at]};
    const Run ended = run(*model, "quantspec", {{"gamma", 4}, {"draft_weights", "same"}}, codecs, wide, prompt, stops);
    CHECK(ended.text.stop_token == exact.text.tokens[at]);
    CHECK(ended.counts.accepted == ended.counts.drafted);
  }
  // Drafts in 4 bits read fewer bytes of weights, and are wrong now and then.
  const Run rounded = run(*model, "quantspec", {{"gamma", 4}, {"draft_weights", "layers"}, {"weight_group", 16}},
                          codecs, wide, prompt, options);
  const auto a_pass = [](const PassBytes& p) { return p.weights / p.passes; };
  CHECK(a_pass(rounded.counts.draft) < a_pass(guessed.counts.draft));
  CHECK(a_pass(rounded.counts.target) == a_pass(guessed.counts.target));
  CHECK(rounded.counts.accepted < rounded.counts.drafted);
  CHECK(rounded.text.tokens == exact.text.tokens);
}

TEST_CASE("a stop token ends a round where it ends the target", "[strategy][quantspec]") {
  const auto model = load_model(kTiny + "qwen3.gguf");
  const auto prompt = read_golden(kTiny + "qwen3", model->facts().vocab).ids;
  const auto codecs = codecs_for(*model, {{"name", "quantspec"}, {"group", 16}});
  const Run whole = run(*model, "plain", {}, codecs, buffered(16), prompt, new_tokens(60));
  for (const size_t at : {1u, 5u, 20u, 43u}) {
    GenerateOptions options = new_tokens(60);
    options.stop = {whole.text.tokens[at]};
    const Run target = run(*model, "plain", {}, codecs, buffered(16), prompt, options);
    const Run guessed = run(*model, "quantspec", {{"gamma", 5}}, codecs, buffered(16), prompt, options);
    CHECK(guessed.text.with_stop() == target.text.with_stop());
    CHECK(guessed.text.stop_token == target.text.stop_token);
    CHECK(guessed.bytes.to_json() == target.bytes.to_json());
  }
}

TEST_CASE("specache with all pairs is the exact cache, with none its low-bit copy", "[strategy][specache]") {
  for (const std::string family : {"llama", "mistral", "qwen3"})
    for (const double temperature : {0.0, 1.0})
      for (const std::string attention : {"cpu-reconstruct", "reference", "auto"}) {
        CAPTURE(family, temperature, attention);
        const auto model = load_model(kTiny + family + ".gguf");
        const auto prompt = read_golden(kTiny + family, model->facts().vocab).ids;
        const auto codecs = codecs_for(*model, {{"name", "specache"}, {"bits", 1}, {"group", 16}});
        CachePolicy policy = buffered(16);
        policy.v.window = 24;
        GenerateOptions options = new_tokens(60);
        options.sampling.temperature = temperature;
        options.exact_prefill = true;
        const Run exact = run(*model, "plain", {}, exact_codec_set(model->facts().cache_shape()), CachePolicy::exact(),
                              prompt, options, attention);
        const Run coded = run(*model, "plain", {}, codecs, policy, prompt, options, attention);
        const Run all = run(*model, "specache", {{"pairs", 1000}}, codecs, policy, prompt, options, attention);
        const Run none = run(*model, "specache", {{"pairs", 0}}, codecs, policy, prompt, options, attention);
        CHECK(all.text.tokens == exact.text.tokens);
        CHECK(none.text.tokens == coded.text.tokens);
        CHECK(none.counts.moved == 0);
        // The copy alone would not do, but where greedy text goes round in circles.
        if (temperature > 0) CHECK(coded.text.tokens != exact.text.tokens);
        for (const Run* r : {&all, &none}) {
          CHECK(r->bytes.to_json() == coded.bytes.to_json());  // guesses leave no trace
          CHECK(r->counts.target.passes == 59);
          CHECK(r->counts.drafted == 59);
          // Every token but the last drawn.
          CHECK(r->counts.far == find_strategy("specache")
                                     .make(Json::object())
                                     ->bytes_beside(model->facts().cache_shape(), policy, std::ssize(prompt) + 59));
        }
      }
}

TEST_CASE("specache fetches as many pairs as it says, of tokens that are coded", "[strategy][specache]") {
  const auto model = load_model(kTiny + "llama.gguf");
  const auto prompt = read_golden(kTiny + "llama", model->facts().vocab).ids;
  const auto codecs = codecs_for(*model, {{"name", "specache"}, {"group", 16}});
  GenerateOptions options = new_tokens(21);
  options.exact_prefill = true;
  const Run few = run(*model, "specache", {{"pairs", 8}}, codecs, buffered(16), prompt, options);
  // 80 tokens of prompt, of which 63 or more are coded: 20 fetches of 8 pairs, for 2 layers of 2 KV heads of 16
  // channels.
  const int64_t fetch = 8 * 2 * 2 * (2 * 16 * 2);
  CHECK(few.counts.moved == 20 * fetch);
  CHECK(few.counts.fetched == fetch);
  CHECK(few.counts.draft.passes == 20);
  CHECK(few.counts.draft.weights == model->weight_bytes());  // of the pass before the first token
  CHECK(few.counts.target.weights == 20 * model->weight_bytes());
  const Run coded = run(*model, "plain", {}, codecs, buffered(16), prompt, options);
  CHECK(few.counts.target.codes == coded.counts.target.codes);
  CHECK(few.counts.target.exact == coded.counts.target.exact + 20 * fetch);
  const Run all = run(*model, "specache", {{"pairs", 1000}}, codecs, buffered(16), prompt, options);
  CHECK(all.counts.moved > few.counts.moved);
  CHECK(all.counts.moved % (2 * 2 * (2 * 16 * 2)) == 0);
}

TEST_CASE("specache refuses what no exact row can stand in for", "[strategy][specache]") {
  const auto model = load_model(kTiny + "llama.gguf");
  const auto strategy = find_strategy("specache").make({});
  const auto refusal = [&](const Json& config, const CachePolicy& policy) {
    return error_of([&] { strategy->cache_model(codecs_for(*model, config), policy); });
  };
  const Json copy = {{"name", "specache"}, {"group", 16}};
  check_says(refusal(copy, CachePolicy::exact()), "keeps none");
  CachePolicy bare = buffered(16);
  bare.k.window = 0;
  check_says(refusal(copy, bare), "window of 1 token");
  check_says(refusal({{"name", "rtn"}, {"group", 16}, {"k", {{"rope", "pre"}}}}, buffered(16)), "keys before RoPE");
  check_says(refusal({{"name", "rtn"}, {"group", 16}, {"transform", {"hadamard"}}}, buffered(16)), "folded");
}

TEST_CASE("quantspec refuses what it can't draft from", "[strategy][quantspec]") {
  const auto model = load_model(kTiny + "llama.gguf");
  const auto strategy = find_strategy("quantspec").make({});
  const auto codecs = codecs_for(*model, {{"name", "quantspec"}, {"group", 16}});
  const auto refusal = [&](const std::shared_ptr<const CodecSet>& set, const CachePolicy& policy) {
    return error_of([&] { strategy->cache_model(set, policy); });
  };
  check_says(refusal(codecs_for(*model, {{"name", "rtn"}, {"group", 16}}), buffered(16)), {"codec 'rtn'", "level"});
  check_says(refusal(codecs, CachePolicy::exact()), "keeps none");
  CachePolicy bare = buffered(16);
  bare.k.window = 0;
  check_says(refusal(codecs, bare), "window of 1 token");
  CachePolicy kivi = buffered(16);
  kivi.v = {17, 1};
  check_says(refusal(codecs, kivi), {"cache.v", "every step"});
  CachePolicy prompted = buffered(16);
  prompted.prompt = 64;
  check_says(refusal(codecs, prompted), "cache.prompt");
}
