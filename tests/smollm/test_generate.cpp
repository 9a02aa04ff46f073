#include "attention/session_cpu.h"
#include "generation/generate.h"

#include "core/json.h"
#include "io/atomic_file.h"
#include "support/catch.h"

using namespace vqkv;

TEST_CASE("generation over SmolLM2: greedy as llama.cpp, stop tokens, callback, limits") {
  const auto model = load_model(VQKV_SOURCE_DIR "/data/models/SmolLM2-135M-Instruct.Q4_1.gguf");
  const Json golden = Json::parse(read_file(VQKV_SOURCE_DIR "/tests/golden/smollm2_greedy.json"));
  const Json& c = golden.at("continuations").at(0);
  const auto prompt = c.at("prompt_ids").get<std::vector<int32_t>>(),
             expected = c.at("ids").get<std::vector<int32_t>>();
  const auto backend = make_attention_backend("cpu-reconstruct");
  const auto options = [](std::vector<int32_t> stop = {}, bool exact_prefill = false) {
    return GenerateOptions{.new_tokens = 12, .stop = std::move(stop), .sampling = {}, .exact_prefill = exact_prefill};
  };
  const auto fresh = [&] {
    return CompressedCache(exact_codec_set(model->facts().cache_shape()), CachePolicy::exact(DType::kF32));
  };
  const std::vector<int32_t> start(expected.begin(), expected.begin() + 12);
  for (const bool exact_prefill : {false, true}) {
    CompressedCache cache = fresh();
    KvSessionCpu kv(cache, *backend);
    const Generated g = generate(*model, kv, prompt, options({}, exact_prefill));
    CHECK(g.tokens == start);
    CHECK(g.stop_token == -1);
    CHECK(g.decode_steps == 11);
    CHECK(cache.length() == static_cast<int64_t>(prompt.size()) + 11);
  }
  {  // a stop token is not part of the text; the callback ends it as well
    CompressedCache cache = fresh();
    KvSessionCpu kv(cache, *backend);
    const Generated g = generate(*model, kv, prompt, options({expected[5]}));
    const size_t first =
        static_cast<size_t>(std::find(expected.begin(), expected.end(), expected[5]) - expected.begin());
    CHECK(g.stop_token == expected[5]);
    CHECK(g.tokens == std::vector<int32_t>(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(first)));
  }
  {
    CompressedCache cache = fresh();
    KvSessionCpu kv(cache, *backend);
    int seen = 0;
    const Generated g = generate(*model, kv, prompt, options(), [&](int32_t) { return ++seen < 3; });
    CHECK(g.tokens.size() == 3);
    CHECK_THROWS_AS(generate(*model, kv, {}, {}), Error);
    GenerateOptions too_long;
    too_long.new_tokens = 9000;
    CHECK_THROWS_AS(generate(*model, kv, prompt, too_long), Error);
    const int32_t outside[] = {49152};
    CHECK_THROWS_AS(generate(*model, kv, outside, {}), Error);
  }
}
