// What exact exceptions cost in a cache, against the formulas of the method that has them
// (baseline-methods 21.2, 21.3).
#include "cache/view.h"
#include "codec/build.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

std::shared_ptr<const CodecSet> kvquant(const CacheShape& shape, int bits, double outliers) {
  const Json config = {{"name", "kvquant"}, {"bits", bits}, {"outliers", outliers}};
  return train_codec_set(resolve_codec(config, shape), shape, MadeUp(256), {});
}

CachePolicy first_token_exact() { return CachePolicy::from_json({{"sinks", 1}, {"window", 0}, {"flush", 1}}); }

// What the formulas count: all but page tails and tables.
int64_t bits_of(const ByteLedger& b) { return 8 * (b.codes + b.side + b.overlay + b.sinks + b.window); }

}  // namespace

TEST_CASE("the ledger of KVQuant is the paper's formula, counted in a cache", "[conformance][golden]") {
  const CacheShape shape = make_shape(1, 4, 2, 64);
  constexpr int64_t kTokens = 200, kWidth = 128;
  for (const int bits : {2, 3, 4})
    for (const double outliers : {0.0, 0.01, 0.05}) {
      CAPTURE(bits, outliers);
      const auto set = kvquant(shape, bits, outliers);
      CompressedCache cache(set, first_token_exact());
      const Matrix<float> k = rows_of(kTokens, set->units()[0].spec.unit, 31);
      const Matrix<float> v = rows_of(kTokens, set->units()[1].spec.unit, 32);
      for (int64_t t = 0; t < kTokens; t += 50) {
        cache.begin_block(50, Visibility::kReplay);
        cache.append(0, k.view().slice_rows(t, 50), v.view().slice_rows(t, 50), {});
        cache.end_block();
      }
      const CacheView view(cache);
      const int64_t coded = kTokens - 1;
      int64_t exact[2];
      for (const size_t u : {0, 1}) {
        REQUIRE(view.slots(u) == coded);
        exact[u] = static_cast<int64_t>(view.fetch_codes(u).overlay.size());
      }
      const int64_t ends = outliers == 0.05 ? 4 : outliers == 0.01 ? 1 : 0;  // ceil of half the share of 128
      CHECK(exact[1] == coded * 2 * ends);
      CHECK((exact[0] > 0) == (outliers > 0));
      const int64_t pointer = outliers > 0 ? 32 : 0;
      // (T - s)(b + 32 rho + 32 / D) + 16 s for keys, 64 / D for values; without outliers no row pointers.
      const int64_t keys = coded * (bits * kWidth + pointer) + 32 * exact[0] + 16 * kWidth;
      const int64_t values = coded * (bits * kWidth + 32 + pointer) + 32 * exact[1] + 16 * kWidth;
      CHECK(bits_of(cache.bytes()) == keys + values);
      CHECK(cache.bytes().overlay == (2 * coded * pointer + 32 * (exact[0] + exact[1])) / 8);
    }
}

TEST_CASE("bits a value of KVQuant at a context, at the shapes of Llama-3.1-8B and of a small model",
          "[conformance][golden]") {
  struct Row {
    int head_dim;
    int64_t tokens;
    double bits;  // of 4-bit codes with 1 % outliers, to two places
  };
  for (const Row& row : {Row{128, 1024, 4.38}, Row{128, 4096, 4.37}, Row{128, 32768, 4.37}, Row{64, 1024, 4.43},
                         Row{64, 4096, 4.42}, Row{64, 32768, 4.41}})
    for (const int bits : {4, 3, 2}) {
      const CacheShape shape = make_shape(1, 8, 8, row.head_dim);
      const auto set = kvquant(shape, bits, 0.01);
      const double width = 8.0 * row.head_dim;
      const std::vector<UnitExtras> extras(2, {.exceptions = .01 * width});
      const ByteLedger b = ledger_at(*set, first_token_exact(), row.tokens, extras);
      CAPTURE(row.head_dim, row.tokens, bits);
      CHECK(static_cast<double>(bits_of(b)) / (2 * width * static_cast<double>(row.tokens)) ==
            Approx(row.bits - 4 + bits).margin(.0051));
    }
}
