// SmolLM2 against llama.cpp, an engine of its own: tests/golden/make_llama_goldens.py says how the facts were made.
#include <cstring>
#include <numeric>

#include "attention/session_cpu.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "model/runtime.h"
#include "support/catch.h"
#include "support/small_model.h"

using namespace vqkv;

namespace {

constexpr const char* kGolden = VQKV_SOURCE_DIR "/tests/golden/";

ModelRuntime& model() {
  static const std::unique_ptr<ModelRuntime> m = load_model(kModel);
  return *m;
}

struct Session {
  CompressedCache cache{exact_codec_set(model().facts().cache_shape()), CachePolicy::exact(DType::kF32)};
  std::unique_ptr<AttentionBackend> backend = make_attention_backend("cpu-reconstruct");
  KvSessionCpu kv{cache, *backend};
};

struct Positions {
  int64_t windows = 0, context = 0, top = 0;
  double perplexity = 0;
  std::vector<uint16_t> ids, top_id;
  std::vector<float> nll, top_logp;
};

Positions read_positions() {
  const std::string bytes = read_file(std::string(kGolden) + "smollm2_positions.bin");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  const Json header = Json::parse(bytes.substr(8, length));
  Positions p;
  p.perplexity = header.at("perplexity");
  const char* at = bytes.data() + 8 + length;
  const auto take = [&](size_t index, auto& out) {
    const Json& a = header.at("arrays").at(index);
    size_t count = 1;
    for (const auto& d : a.at("shape")) count *= d.get<size_t>();
    out.resize(count);
    std::memcpy(out.data(), at, count * sizeof out[0]);
    at += count * sizeof out[0];
  };
  take(0, p.ids);
  take(1, p.nll);
  take(2, p.top_id);
  take(3, p.top_logp);
  REQUIRE(at == bytes.data() + bytes.size());
  const Json& shape = header.at("arrays").at(2).at("shape");
  p.windows = shape.at(0);
  p.context = shape.at(1);
  p.top = shape.at(2);
  return p;
}

double log_sum(const float* logits, int64_t n) {
  const double most = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(static_cast<double>(logits[i]) - most);
  return most + std::log(sum);
}

}  // namespace

TEST_CASE(
    "SmolLM2: NLL and top-16 log-probabilities of 5,120 positions equal llama.cpp's to 1e-3, perplexity to 5 digits") {
  const Positions golden = read_positions();
  REQUIRE(golden.windows * golden.context >= 4000);
  const int64_t vocab = model().facts().vocab, block = 256;
  Matrix<float> logits(block, vocab);
  double worst_nll = 0, worst_top = 0, total = 0;
  for (int64_t w = 0; w < golden.windows; ++w) {
    Session session;
    std::vector<int32_t> ids(golden.ids.begin() + w * golden.context, golden.ids.begin() + (w + 1) * golden.context);
    for (int64_t first = 0; first < golden.context; first += block) {
      model().forward(std::span(ids).subspan(static_cast<size_t>(first), block), session.kv, LogitRows::kAll, logits);
      for (int64_t r = 0; r < block; ++r) {
        const int64_t position = first + r;
        const float* row = logits.row(r);
        const double sum = log_sum(row, vocab);
        if (position + 1 < golden.context) {
          const double nll = sum - row[ids[static_cast<size_t>(position + 1)]];
          worst_nll =
              std::max(worst_nll, std::abs(nll - golden.nll[static_cast<size_t>(w * (golden.context - 1) + position)]));
          total += nll;
        }
        for (int64_t t = 0; t < golden.top; ++t) {
          const size_t at = static_cast<size_t>((w * golden.context + position) * golden.top + t);
          worst_top = std::max(worst_top, std::abs(row[golden.top_id[at]] - sum - golden.top_logp[at]));
        }
      }
    }
  }
  const double perplexity = std::exp(total / static_cast<double>(golden.windows * (golden.context - 1)));
  CAPTURE(worst_nll, worst_top, perplexity, golden.perplexity);
  CHECK(worst_nll < 1e-3);
  CHECK(worst_top < 1e-3);
  CHECK(std::abs(perplexity - golden.perplexity) < 0.5e-5 * golden.perplexity);
}

TEST_CASE("SmolLM2: greedy continuations equal llama.cpp's token for token") {
  const Json golden = Json::parse(read_file(std::string(kGolden) + "smollm2_greedy.json"));
  Matrix<float> logits(1, model().facts().vocab);
  for (const Json& c : golden.at("continuations")) {
    const auto prompt = c.at("prompt_ids").get<std::vector<int32_t>>(),
               expected = c.at("ids").get<std::vector<int32_t>>();
    REQUIRE(expected.size() >= 64);
    CAPTURE(c.at("prompt").get<std::string>());
    CHECK(model().tokenizer().encode(c.at("prompt").get<std::string>(), true) == prompt);
    Session session;
    model().forward(prompt, session.kv, LogitRows::kLast, logits);
    std::vector<int32_t> got;
    while (got.size() < expected.size()) {
      const float* row = logits.row(0);
      got.push_back(static_cast<int32_t>(std::max_element(row, row + logits.cols) - row));
      model().forward(std::span(&got.back(), 1), session.kv, LogitRows::kLast, logits);
    }
    CHECK(got == expected);
  }
}

TEST_CASE("SmolLM2: logits of a block equal those of its tokens one at a time") {
  const Positions golden = read_positions();
  const std::vector<int32_t> ids(golden.ids.begin(), golden.ids.begin() + 96);
  const int64_t vocab = model().facts().vocab;
  Matrix<float> block(96, vocab), step(1, vocab), last(1, vocab);
  Session whole, steps, short_rows;
  model().forward(ids, whole.kv, LogitRows::kAll, block);
  model().forward(ids, short_rows.kv, LogitRows::kLast, last);
  CHECK(std::memcmp(last.data(), block.row(95), static_cast<size_t>(vocab) * sizeof(float)) == 0);
  double worst = 0;
  for (int64_t i = 0; i < 96; ++i) {
    model().forward(std::span(ids).subspan(static_cast<size_t>(i), 1), steps.kv, LogitRows::kLast, step);
    for (int64_t j = 0; j < vocab; ++j)
      worst = std::max(worst, static_cast<double>(std::abs(step(0, j) - block(i, j))));
  }
  CHECK(worst == 0);  // products and attention sum in one order for every block length
  CHECK(whole.cache.length() == 96);
  CHECK(steps.cache.length() == 96);
}
