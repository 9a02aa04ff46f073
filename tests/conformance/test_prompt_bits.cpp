// What is fitted to a prompt costs what its paper's formula says (baseline-methods 21.2): the ledger, bit for bit.
#include "cache/cache_support.h"
#include "codec/build.h"
#include "support/catch.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Held {
  ByteLedger ledger;
  double bits;  // a value of keys and values, without room that is unused, indices and plans in memory
};

Held held(const Json& codec, const CachePolicy& policy, const CacheShape& shape, int64_t tokens, int64_t block = 37) {
  const CodecPlan plan = resolve_codec(codec, shape);
  REQUIRE(plan.skip == "");
  const auto set = train_codec_set(plan, shape, MadeUp(300), {});
  const Tokens x(shape, tokens, 5);
  CountingResource memory;
  CompressedCache cache(set, policy, &memory);
  for (int64_t t = 0; t < tokens; t += block) {
    feed(cache, x, t, std::min(block, tokens - t));
    REQUIRE(cache.bytes().total_sequence() == memory.live());
  }
  const ByteLedger b = cache.bytes();
  require_equal(ledger_at(*set, policy, tokens), b, memory.live(), "held");
  const auto values = static_cast<double>(2 * shape.layers * shape.kv_heads * shape.head_dim * tokens);
  return {b, 8.0 * static_cast<double>(b.codes + b.side + b.overlay + b.sinks + b.window) / values};
}

CachePolicy policy(const Json& config) { return CachePolicy::from_json(config); }

}  // namespace

TEST_CASE("ThinK's bits: pruned keys of the prompt, a mask, whole keys in the window and behind the prompt",
          "[conformance][golden]") {
  for (const auto& [d, pruned] : {std::pair{64, 25}, {128, 51}}) {
    const CacheShape shape = make_shape(2, 4, 2, d);
    const double kept = 16.0 * (d - pruned) / d;
    CHECK(kept == (d == 64 ? 9.75 : 9.625));
    for (const int64_t generated : {0, 1, 45, 200}) {
      const int64_t prompt = 160, tokens = prompt + generated, w = 32;
      CAPTURE(d, generated);
      const Held h =
          held({{"name", "exact"}, {"preset", "think"}},
               policy({{"sinks", 0}, {"window", w}, {"flush", 1}, {"prompt", prompt}, {"generated", "exact"}}), shape,
               tokens);
      const double t = static_cast<double>(tokens);
      const double keys = (kept * static_cast<double>(prompt - w) + 16.0 * static_cast<double>(w + generated) + 1) / t;
      CHECK(h.bits == Approx((keys + 16.0) / 2).epsilon(1e-12));
      CHECK(h.ledger.codebooks == 0);
    }
    // Before KIVI, at a multiple of its residual: (b + 32/G) of what is left, and the newest R values exact.
    const int64_t tokens = 512, r = 128;
    const Held h = held({{"name", "kivi"}, {"preset", "think"}},
                        policy({{"sinks", 0}, {"rule", "kivi"}, {"residual", r}, {"prompt", 200}}), shape, tokens);
    const double t = static_cast<double>(tokens), keys = 3.0 * (d - pruned) / d + 1 / t,
                 values = (3.0 * static_cast<double>(tokens - r) + 16.0 * static_cast<double>(r)) / t;
    CHECK(h.bits == Approx((keys + values) / 2).epsilon(1e-12));
  }
}

TEST_CASE("CalibQuant's bits: codes and two numbers a channel of the prompt, whole values behind it",
          "[conformance][golden]") {
  const CacheShape shape = make_shape(2, 4, 2, 64);
  for (const int bits : {1, 2, 4, 8})
    for (const int64_t generated : {0, 1, 150}) {
      CAPTURE(bits, generated);
      const int64_t prompt = 128;
      const Held h =
          held({{"name", "calibquant"}, {"bits", bits}},
               policy({{"sinks", 0}, {"window", 0}, {"flush", 1}, {"prompt", prompt}, {"generated", "exact"}}), shape,
               prompt + generated);
      const auto coded = static_cast<double>(prompt), rest = static_cast<double>(generated);
      CHECK(h.bits == Approx((coded * (bits + 32 / coded) + 16 * rest) / (coded + rest)).epsilon(1e-12));
      CHECK(h.ledger.codebooks == 0);
    }
}

TEST_CASE("CalibQuant's bits where an image stands between texts: whole values of all text", "[conformance][golden]") {
  const CacheShape shape = make_shape(2, 4, 2, 64);
  for (const int bits : {1, 4})
    for (const int64_t before : {0, 41})
      for (const int64_t behind : {0, 1, 150}) {
        CAPTURE(bits, before, behind);
        const int64_t image = 128, tokens = before + image + behind;
        const CachePolicy own = policy({{"coded", "image"}}).of_text({before, before + image});
        const Held h = held({{"name", "calibquant"}, {"bits", bits}}, own, shape, tokens);
        const auto coded = static_cast<double>(image), rest = static_cast<double>(before + behind);
        CHECK(h.bits == Approx((coded * (bits + 32 / coded) + 16 * rest) / (coded + rest)).epsilon(1e-12));
        CHECK(h.ledger.sinks + h.ledger.window == 2 * 2 * 2 * 64 * 2 * (before + behind));
      }
  // Of a text without an image, or one too small to be fitted to, all is exact.
  for (const TokenRun& images : {TokenRun{}, TokenRun{10, 25}}) {
    const Held h = held({{"name", "calibquant"}}, policy({{"coded", "image"}}).of_text(images), shape, 200);
    CHECK(h.bits == 16);
    CHECK(h.ledger.codes == 0);
  }
}

TEST_CASE("DecoQuant's bits: codes, a scale a token of the layer, a matrix a prompt", "[conformance][golden]") {
  for (const int d : {64, 128})
    for (const int bits : {2, 3, 4})
      for (const int64_t tokens : {64, 300}) {
        const CacheShape shape = make_shape(2, 4, 4, d);
        CAPTURE(d, bits, tokens);
        const Held h = held({{"name", "rtn"}, {"preset", "decoquant"}, {"bits", bits}},
                            policy({{"sinks", 0}, {"window", 1}, {"flush", 1}, {"prompt", 64}}), shape, tokens);
        const double channels = 4.0 * d;
        CHECK(h.bits == Approx(bits + 16 / channels + 4096 / (static_cast<double>(tokens) * channels)).epsilon(1e-12));
        CHECK(h.ledger.codebooks == 0);
      }
}
