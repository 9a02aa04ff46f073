// The runtime on a device beside the one on the processor: the same model, its weights rounded to bf16 in both.
#include <algorithm>
#include <cmath>

#include "attention/sequence.h"
#include "cache/model.h"
#include "core/rng.h"
#include "kernels/difference.h"
#include "kernels/source.h"
#include "model/runtime_device.h"
#include "model/session_device.h"
#include "support/catch.h"
#include "support/device.h"
#include "support/error_of.h"

using namespace vqkv;

namespace {

const std::string kTiny = kSource + "/tests/golden/tiny/";

std::vector<int32_t> some_tokens(int64_t n, int vocab, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> out(static_cast<size_t>(n));
  for (int32_t& t : out) t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab)));
  return out;
}

}  // namespace

TEST_CASE("logits of the device's runtime are those of the processor's within bf16's rounding", "[kernel][runtime]") {
  for (const std::string family : {"llama", "mistral", "qwen2", "qwen3"}) {
    CAPTURE(family);
    const auto model = load_model(kTiny + family + ".gguf");
    const int vocab = model->facts().vocab;
    const std::vector<int32_t> a = some_tokens(70, vocab, 1), b = some_tokens(9, vocab, 2);
    Matrix<float> expected_a(70, vocab), expected_b(9, vocab);
    const auto exact = [&](const std::vector<int32_t>& tokens, Matrix<float>& out) {
      Sequence sequence(std::make_shared<const CacheModel>(model->facts().cache_shape()),
                        CachePolicy::exact(DType::kBF16), "reference");
      model->forward(tokens, sequence.session(), LogitRows::kAll, out);
    };
    exact(a, expected_a);
    exact(b, expected_b);

    // Two sequences in one batch, the first in two parts, the second token by token, its last beside the other's part.
    DeviceRuntime device(kTiny + family + ".gguf");
    const auto shared = std::make_shared<const CacheModel>(device.facts().cache_shape());
    const auto cache = [&] {
      return Sequence(shared, CachePolicy::exact(DType::kBF16), std::make_shared<DeviceBackend>());
    };
    Sequence of_a = cache(), of_b = cache();
    Matrix<float> found_a(70, vocab), found_b(9, vocab), both(42, vocab);
    const std::span<const int32_t> all_a(a), all_b(b);
    const SequenceBlock first[] = {{all_a.subspan(0, 40), &of_a.session()}, {all_b.subspan(0, 2), &of_b.session()}};
    device.forward_batch(first, LogitRows::kAll, both);
    std::copy_n(both.storage.begin(), 40 * vocab, found_a.storage.begin());
    std::copy_n(both.storage.begin() + 40 * vocab, 2 * vocab, found_b.storage.begin());
    for (int64_t t = 2; t < 8; ++t)
      device.forward(all_b.subspan(static_cast<size_t>(t), 1), of_b.session(), LogitRows::kLast,
                     found_b.view().slice_rows(t, 1));
    const SequenceBlock rest[] = {{all_b.subspan(8), &of_b.session()}, {all_a.subspan(40), &of_a.session()}};
    device.forward_batch(rest, LogitRows::kAll, both.view().slice_rows(0, 31));
    std::copy_n(both.storage.begin(), vocab, found_b.view().row(8));
    std::copy_n(both.storage.begin() + vocab, 30 * vocab, found_a.view().row(40));
    CHECK(of_a.cache().length() == 70);
    CHECK(of_b.cache().length() == 9);
    // Inputs of products keep 8 bits, weights 8, over 2 layers.
    CHECK(relative_difference(found_a, expected_a, true) < 0.02);
    CHECK(relative_difference(found_b, expected_b, true) < 0.02);
    of_b.restart();
    Matrix<float> again(9, vocab);
    device.forward(b, of_b.session(), LogitRows::kAll, again);
    CHECK(relative_difference(again, expected_b, true) < 0.02);
  }
}

TEST_CASE("the device's runtime refuses tokens outside the vocabulary and contexts beyond the model's",
          "[kernel][runtime]") {
  DeviceRuntime device(kTiny + "llama.gguf");
  Sequence sequence(std::make_shared<const CacheModel>(device.facts().cache_shape()), CachePolicy::exact(),
                    std::make_shared<DeviceBackend>());
  const std::vector<int32_t> outside{device.facts().vocab},
      many(static_cast<size_t>(device.facts().longest_context()) + 1, 1);
  check_says(error_of([&] { device.forward(many, sequence.session(), LogitRows::kNone, {}); }), {"context"});
  CHECK(sequence.cache().length() == 0);
  check_says(error_of([&] { device.forward(outside, sequence.session(), LogitRows::kNone, {}); }),
             {"not in the vocabulary"});
}

TEST_CASE("SmolLM2 on the device: the processor's logits, and its likeliest tokens", "[kernel][runtime][smollm2]") {
  const std::string path = small_model();
  if (path.empty()) return;
  const auto model = load_model(path);
  const int vocab = model->facts().vocab;
  const std::vector<int32_t> tokens = model->tokenizer().encode("The capital of France is Paris, and that of Italy is");
  const auto n = std::ssize(tokens);
  REQUIRE(n > 8);
  Matrix<float> expected(n, vocab), found(n, vocab);
  Sequence sequence(std::make_shared<const CacheModel>(model->facts().cache_shape()), CachePolicy::exact(DType::kBF16),
                    "reference");
  model->forward(tokens, sequence.session(), LogitRows::kAll, expected);
  unwatched([&] {
    DeviceRuntime device(path);
    Sequence on_device(std::make_shared<const CacheModel>(model->facts().cache_shape()),
                       CachePolicy::exact(DType::kBF16), std::make_shared<DeviceBackend>());
    // A prompt, then token by token.
    const std::span<const int32_t> all(tokens);
    device.forward(all.subspan(0, static_cast<size_t>(n - 2)), on_device.session(), LogitRows::kAll,
                   found.view().slice_rows(0, n - 2));
    for (int64_t t = n - 2; t < n; ++t)
      device.forward(all.subspan(static_cast<size_t>(t), 1), on_device.session(), LogitRows::kLast,
                     found.view().slice_rows(t, 1));
  });
  CHECK(relative_difference(found, expected, true) < 0.02);
  int same = 0;
  for (int64_t t = 0; t < n; ++t) {
    const auto likeliest = [&](const Matrix<float>& m) {
      return std::max_element(m.view().row(t), m.view().row(t) + vocab) - m.view().row(t);
    };
    same += likeliest(found) == likeliest(expected);
  }
  CHECK(same >= n - 1);  // two that are nearly as likely may change places
}
