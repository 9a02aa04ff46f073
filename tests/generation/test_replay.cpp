// Replay over a model whose logits are made up.
#include "generation/replay.h"

#include <fmt/format.h>

#include <limits>

#include "codec/build.h"
#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

struct FakeTokenizer final : Tokenizer {
  std::string kind() const override { return "fake"; }
  int32_t size() const override { return 32; }
  std::vector<int32_t> encode(std::string_view, bool) const override { return {}; }
  std::string decode(const std::vector<int32_t>&, bool) const override { return ""; }
  std::string piece(int32_t) const override { return "x"; }
};

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { fail_internal("nothing learns here"); }
};

// Zeros everywhere but one logit of one position, in caches that code.
class FakeRuntime final : public ModelRuntime {
 public:
  explicit FakeRuntime(float bad_logit) : bad(bad_logit) {
    facts_.name = "fake";
    facts_.layers = 1;
    facts_.q_heads = facts_.kv_heads = 1;
    facts_.head_dim = 16;
    facts_.vocab = 32;
    facts_.context_length = 128;
    facts_.rope = RopeFacts::plain(16, 16, 100.0);
  }
  const ModelFacts& facts() const override { return facts_; }
  std::string weights() const override { return "none"; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  ConstMatrix output_weight(int) const override { return {}; }
  void forward(std::span<const int32_t> tokens, KvSession& kv, LogitRows, MutMatrix logits, Visibility visibility,
               ModelTap*) override {
    const auto n = static_cast<int64_t>(tokens.size());
    const int64_t first = kv.cache().length();
    kv.begin_block(n, visibility);
    const Matrix<float> zeros(n, 16);
    Matrix<float> out(n, 16);
    kv.attend(0, zeros, zeros, zeros, out);
    kv.end_block();
    for (int64_t r = 0; r < n; ++r)
      for (int64_t v = 0; v < logits.cols; ++v)
        logits(r, v) = first + r == 40 && v == 5 && kv.cache().policy().codes ? bad : 0;
  }
  float bad;

 private:
  ModelFacts facts_;
  FakeTokenizer tokenizer_;
};

}  // namespace

TEST_CASE("a logit that is not finite ends a replay with the candidate, the window and the position", "[replay]") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    FakeRuntime model(bad);
    const CacheShape shape = model.facts().cache_shape();
    const ReplayCandidate candidate{
        .label = "two bits",
        .codecs =
            train_codec_set(resolve_codec({{"name", "rtn"}, {"bits", 2}, {"group", 16}}, shape), shape, NoRows(), {}),
        .policy = {}};
    const ReplayText text{"t", std::vector<int32_t>(128, 5)};
    std::string error = "no error";
    try {
      replay(model, std::span(&text, 1), std::span(&candidate, 1), {.context = 64});
    } catch (const Error& e) { error = e.what(); }
    CHECK(error ==
          fmt::format("window 0: two bits: position 41: the logit of token 5 is {}; logits must be finite", bad));
  }
}
