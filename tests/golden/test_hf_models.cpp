// Folders as users have them, against transformers: tests/golden/make_hf_models.py made them.
#include <filesystem>

#include "attention/session_cpu.h"
#include "core/json.h"
#include "generation/capture.h"
#include "generation/generate.h"
#include "golden/logits.h"
#include "model/model_files.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

const std::string kFolders = std::string(VQKV_SOURCE_DIR) + "/tests/golden/hf/";

// The first `rows` tokens and their logits.
Golden first_of(const Golden& all, int64_t rows) {
  Golden out{{all.ids.begin(), all.ids.begin() + rows}, Matrix<float>(rows, all.logits.cols)};
  for (int64_t r = 0; r < rows; ++r) std::copy_n(all.logits.row(r), all.logits.cols, out.logits.row(r));
  return out;
}

}  // namespace

TEST_CASE("folders as users have them: logits equal those of transformers 5") {
  int folders = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFolders)) {
    if (!entry.is_directory()) continue;
    CAPTURE(entry.path().string());
    const auto model = load_model(entry.path().string());
    const ModelFacts& facts = model->facts();
    Golden golden = read_golden(entry.path().string(), facts.vocab);
    if (facts.sliding_window > 0) golden = first_of(golden, facts.sliding_window);
    const auto tokens = static_cast<int64_t>(golden.ids.size());
    const Matrix<float> whole = logits_of(*model, golden.ids, tokens);
    CHECK(largest_difference(whole, golden.logits) < 5e-5 * spread(golden.logits));
    CHECK(logits_of(*model, golden.ids, 7).storage == whole.storage);
    ++folders;
  }
  CHECK(folders == 8);
}

TEST_CASE("the facts of folders as users have them") {
  const ModelFacts other = read_model_facts(kFolders + "tied_other_head"),
                   alone = read_model_facts(kFolders + "tied_head_alone"),
                   old_yarn = read_model_facts(kFolders + "yarn_old_spelling");
  CHECK_FALSE(other.tied_head);
  CHECK(alone.tied_head);
  CHECK((old_yarn.qkv_bias && old_yarn.o_bias));
  CHECK(old_yarn.rope.attention_factor == Approx(0.1 * std::log(4.0) + 1));
  CHECK(read_model_facts(kFolders + "yarn_attention_factor").rope.attention_factor == 0.7);
  CHECK(read_model_facts(kFolders + "null_window").sliding_window == 0);
}

TEST_CASE("a sliding window: contexts up to it run, longer ones are refused before anything is computed") {
  const auto model = load_model(kFolders + "sliding_window");
  REQUIRE(model->facts().sliding_window == 48);
  const Golden golden = read_golden(kFolders + "sliding_window", model->facts().vocab);
  const auto says = Catch::Contains("sliding window of 48");
  // Beyond the window transformers computes something else than full attention.
  CHECK_THROWS_WITH(logits_of(*model, golden.ids, kGoldenTokens), says);
  CHECK_THROWS_WITH(logits_of(*model, golden.ids, 7), says);

  CompressedCache cache(exact_codec_set(model->facts().cache_shape()), CachePolicy::exact(DType::kF32));
  const auto backend = make_attention_backend("cpu-reconstruct");
  KvSessionCpu kv(cache, *backend);
  GenerateOptions generation;
  generation.new_tokens = 8;
  CHECK_THROWS_WITH(generate(*model, kv, std::span(golden.ids).first(41), generation, {}), says);
  CHECK(cache.length() == 0);
  CHECK(generate(*model, kv, std::span(golden.ids).first(40), generation, {}).tokens.size() == 8);

  CaptureOptions capture;
  capture.context = 49;
  const std::vector<TextDocument> documents{{"text", golden.ids}};
  CHECK_THROWS_WITH(plan_capture(documents, capture, model->facts(), {}), says);
  capture.context = 48;
  CHECK(plan_capture(documents, capture, model->facts(), {}).tokens == kGoldenTokens);
}
