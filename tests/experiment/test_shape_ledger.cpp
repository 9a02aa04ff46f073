// Bytes at a shape without weights or training: the formulas of baseline-methods 21.2 and vq-methods a.6, b.6 and c.6,
// written out here, and the ledger of a codec set that is there.
#include "experiment/shape_ledger.h"

#include "codec/build.h"
#include "core/json.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/method_configs.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

const CacheShape kLlama8b = make_shape(32, 4, 8, 128);
constexpr int64_t kLengths[] = {1024, 1500, 4096, 5001, 32768};

double real(int64_t n) { return static_cast<double>(n); }

void check_held(const Json& codec, const Json& cache, double (*formula)(double tokens, double residual_phase),
                double exceptions = 0) {
  const ShapeLedger ledger(codec, cache, kLlama8b, exceptions);
  for (const int64_t t : kLengths) {
    CAPTURE(codec.dump(), t);
    CHECK(ledger.held(t) == Approx(formula(real(t), real(t % 128))).epsilon(1e-9));
  }
}

}  // namespace

TEST_CASE("what a sequence holds at Llama-3.1-8B's shape is what the papers' formulas say", "[shape][golden]") {
  // KIVI: K [(T - rho)(b + 32/G) + 16 rho]/T, V with its newest R exact. No query sees the last block of a cache coded
  // before its step is over, so rho is T mod R.
  check_held({{"name", "kivi"}, {"preset", "default"}}, nullptr,
             [](double t, double rho) { return ((t - rho) * 3 + 16 * rho + (t - 128) * 3 + 16 * 128) / (2 * t); });
  check_held({{"name", "kivi"}, {"preset", "kivi4"}}, nullptr,
             [](double t, double rho) { return ((t - rho) * 5 + 16 * rho + (t - 128) * 5 + 16 * 128) / (2 * t); });
  // QJL: K (m + m_o + 32)/d + 8 n_o/(32 d), m and m_o by layer; V as KIVI.
  check_held({{"name", "qjl"}, {"preset", "default"}}, nullptr, [](double t, double r) {
    const double outliers = 8.0 * 8 / (32 * 128), general = (256 + 256 + 32) / 128.0 + outliers,
                 initial = (512 + 128 + 32) / 128.0 + outliers, keys = (15 * initial + 17 * general) / 32;
    return ((t - r) * keys + 16 * r + (t - 128) * 3 + 16 * 128) / (2 * t);
  });
  // QuantSpec: r = G + T mod G exact.
  check_held({{"name", "quantspec"}, {"preset", "default"}}, nullptr, [](double t, double phase) {
    const double r = 128 + phase;
    return ((t - r) * 8.25 + 16 * r) / t;
  });
  // KVQuant: K [(T - s)(b + 32 rho + 32/D) + 16 s]/T, V with 64/D; outliers are counted whole, once a unit.
  const ShapeLedger kvquant({{"name", "kvquant"}, {"preset", "nuq4"}}, nullptr, kLlama8b, 0.01);
  for (const int64_t t : kLengths) {
    const double keys = (real(t - 1) * (4 + .32 + 32. / 1024) + 16) / real(t),
                 values = (real(t - 1) * (4 + .32 + 64. / 1024) + 16) / real(t);
    CHECK(kvquant.held(t) == Approx((keys + values) / 2).epsilon(1e-5));
  }
  // VQKV: 56 codes of 10 bits a key and 16 of 9 a value, 4 sinks and the newest 1,024 besides the step's own.
  const ShapeLedger vqkv({{"name", "simvq"}, {"preset", "vqkv"}}, {{"sinks", 4}, {"window", 1025}, {"flush", 1}},
                         kLlama8b);
  for (const int64_t t : {2048, 8192, 131072})
    CHECK(vqkv.held(t) == Approx((real(t - 1028) * 2.75 + 1028 * 16) / real(t)).epsilon(1e-9));
  // ThinK: 77 of 128 channels of the prompt's keys but its newest 32, a mask of d bits a head.
  const ShapeLedger think({{"name", "exact"}, {"preset", "think"}},
                          {{"sinks", 0}, {"window", 32}, {"flush", 1}, {"prompt", 1000}, {"generated", "exact"}},
                          kLlama8b);
  for (const int64_t generated : {0, 24, 3000}) {
    const double t = real(1000 + generated), keys = (968 * 9.625 + 16 * real(32 + generated) + 1) / t;
    CHECK(think.held(1000 + generated) == Approx((keys + 16) / 2).epsilon(1e-12));
  }
  // DecoQuant: b + 16/D + 4096/(T D).
  const ShapeLedger deco({{"name", "rtn"}, {"preset", "decoquant"}}, {{"sinks", 0}, {"window", 1}, {"flush", 1}},
                         kLlama8b);
  for (const int64_t t : kLengths) {
    CHECK(deco.held(t) == Approx(4 + 16. / 1024 + 4096 / (real(t) * 1024)).epsilon(1e-12));
    CHECK(deco.bits({}, t) == Approx(deco.held(t)).epsilon(1e-12));
  }
  CHECK(deco.bits() == 4 + 16. / 1024);
}

TEST_CASE("bits of codes and side data by role", "[shape][golden]") {
  const auto ledger = [](const Json& codec, double exceptions = 0) {
    return ShapeLedger(codec, nullptr, kLlama8b, exceptions);
  };
  const ShapeLedger comm = ledger({{"name", "commvq"}, {"preset", "default"}});
  CHECK(comm.bits(Role::kKey) == Approx(11 * 12 / 128. + 16 / 1024.));
  CHECK(comm.bits(Role::kValue) == Approx(1 + 16 / 1024.));
  const ShapeLedger comm2 = ledger({{"name", "commvq"}, {"preset", "commvq2"}});
  CHECK(comm2.bits(Role::kKey) == Approx(21 * 12 / 128. + 16 / 1024.));
  CHECK(comm2.bits(Role::kValue) == Approx(2 + 16 / 1024.));
  CHECK(ledger({{"name", "kumar"}, {"preset", "published"}}).bits() == 2.875);
  CHECK(ledger({{"name", "kumar"}, {"preset", "vqllm2"}}).bits() == 2.125);
  const ShapeLedger vqkv = ledger({{"name", "simvq"}, {"preset", "vqkv"}});
  CHECK(vqkv.bits(Role::kKey) == 4.375);
  CHECK(vqkv.bits(Role::kValue) == 1.125);
  CHECK(vqkv.bits() == 2.75);
  const ShapeLedger nibbles = ledger({{"name", "quantspec"}, {"preset", "default"}});
  CHECK(nibbles.bits() == 8.25);
  CHECK(nibbles.bits({}, 0, 0) == 4.25);
  CHECK(ledger({{"name", "specache"}, {"preset", "b1"}}).bits() == 1.5);
  const ShapeLedger calib = ledger({{"name", "calibquant"}, {"preset", "default"}});
  CHECK(calib.bits() == 1);
  CHECK(calib.bits({}, 256) == Approx(1 + 32 / 256.));
  CHECK(ledger({{"name", "kvquant"}, {"preset", "nuq2"}}, 0.01).bits(Role::kKey) == Approx(2 + .32 + 32 / 1024.));
}

TEST_CASE("the mean over a window's phases is the formula with the mean residual", "[shape]") {
  const ShapeLedger kivi({{"name", "kivi"}, {"preset", "default"}}, nullptr, kLlama8b);
  for (const int64_t t : kLengths)  // K's residual at its mean, 63.5 of 128
    CHECK(kivi.held_in_the_mean(t) == Approx(3 + 13 * (63.5 + 128) / (2 * real(t))).epsilon(1e-9));
  // Where nothing waits for a flush there is one phase.
  const ShapeLedger sliding({{"name", "rtn"}}, {{"sinks", 4}, {"window", 100}, {"flush", 1}}, kLlama8b);
  CHECK(sliding.held_in_the_mean(1000) == Approx(sliding.held(1000)).epsilon(1e-12));
}

TEST_CASE("the ledger at a shape is that of the codec set which training gives, but for its books", "[shape]") {
  const CacheShape shape = make_shape(2, 2, 2, 64);
  const Json cache = {{"sinks", 2}, {"window", 20}, {"flush", 32}};
  for (const char* method : {"rtn", "kivi", "qjl", "quantspec", "pq", "kumar", "simvq", "commvq", "fp8", "ggml"}) {
    CAPTURE(method);
    Json config = test_config(method);
    const CodecPlan plan = resolve_codec(config, shape);
    REQUIRE(plan.skip.empty());
    const auto set = train_codec_set(plan, shape, MadeUp(300), {});
    const ShapeLedger ledger(config, cache, shape);
    for (const int64_t t : {0, 10, 100, 777}) {
      ByteLedger real_one = ledger_at(*set, CachePolicy::from_json(cache), t);
      real_one.codebooks = 0;
      CHECK(ledger.at(t).to_json() == real_one.to_json());
    }
  }
}

TEST_CASE("a shape or a cache that can't hold a codec is refused", "[shape]") {
  check_says(error_of([] { ShapeLedger({{"name", "kivi"}, {"group", 256}}, nullptr, kLlama8b); }), {"group"});
  check_says(error_of([] {
               ShapeLedger({{"name", "kivi"}}, {{"sinks", 0}, {"window", 8}, {"flush", 8}}, kLlama8b);
             }),
             {"flush"});
  check_says(error_of([] {
               ShapeLedger({{"tiers", {{{"tokens", 128}, {"name", "rtn"}}, {{"name", "rtn"}, {"bits", 2}}}}}, nullptr,
                           kLlama8b);
             }),
             {"codec.tiers"});
}
