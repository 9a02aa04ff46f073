// Levels attended where their codes lie: kernels against double, the layouts of methods against decoded tiles.
#include <algorithm>
#include <cmath>

#include "attention/backends_cpu.h"
#include "attention/packed_levels_cpu.h"
#include "attention/plan_cases.h"
#include "attention/scan_cpu.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

TEST_CASE("Sums over packed levels equal double, for any rows, channels and ends of a run", "[sums][table]") {
  constexpr int kTokens = 64;
  for (const int bits : {1, 2, 4})
    for (const bool even : {true, false})
      for (const int64_t rows : {1, 2, 3, 4, 7, 9})
        for (const int64_t channels : {1, 7, 40, 48, 64, 80, 128}) {
          CAPTURE(bits, even, rows, channels);
          const int codes = 1 << bits;
          kernels::PackedLevels p;
          p.bits = bits;
          p.stride = kTokens * bits / 8;
          p.even = even;
          p.offset = 0.5f;
          const auto level = [&](int code) {
            return even ? static_cast<float>(code) - 0.5f : static_cast<float>(std::sin(1.3 * code));
          };
          for (int k = 0; k < 4 / bits; ++k)
            for (int i = 0; i < 16; ++i) p.level[k][i] = level(i >> (k * bits) & (codes - 1));
          Rng rng(7);
          std::vector<uint8_t> bytes(static_cast<size_t>(channels * p.stride));
          for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng.below(256));
          const auto value = [&](int64_t c, int64_t t) {
            const int byte = bytes[static_cast<size_t>(c * p.stride + t * bits / 8)];
            return static_cast<double>(level(byte >> (t * bits % 8) & (codes - 1)));
          };
          const int64_t wide = (channels + 15) / 16 * 16;
          Matrix<float> q = random_matrix(rows, wide, 11), base = random_matrix(1, rows, 12);
          for (int64_t r = 0; r < rows; ++r) std::fill(q.row(r) + channels, q.row(r) + wide, 0.0f);
          Matrix<float> out(rows, kernels::kLevelRun);
          for (const int64_t first : {0, 32}) {
            p.codes = bytes.data() + first * bits / 8;
            kernels::score_levels(p, q.data(), wide, rows, channels, base.data(), out.data(), kernels::kLevelRun);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t t = 0; t < kernels::kLevelRun; ++t) {
                double want = base(0, r);
                for (int64_t c = 0; c < channels; ++c) want += double{q(r, c)} * value(c, first + t);
                REQUIRE(out(r, t) == Approx(want).margin(2e-4));
              }
          }
          p.codes = bytes.data();
          std::vector<uint32_t> words(static_cast<size_t>(2 * bits * wide));
          kernels::turn_words(p, channels, 2 * bits, words.data(), wide);
          for (const auto& [first, end] : {std::pair{0, 64}, {5, 59}, {17, 18}, {33, 64}}) {
            Matrix<float> w = random_matrix(rows, kTokens + kernels::kNibbleCodes, 13),
                          y = random_matrix(rows, wide, 14);
            for (int64_t r = 0; r < rows; ++r) {
              std::fill(w.row(r), w.row(r) + first, 0.0f);
              std::fill(w.row(r) + end, w.row(r) + w.cols, 0.0f);
            }
            const Matrix<float> before = y;
            kernels::sum_levels(p, words.data(), wide, w.data(), w.cols, rows, first, end, channels, y.data(), wide);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < channels; ++c) {
                double want = before(r, c);
                for (int64_t t = first; t < end; ++t) want += double{w(r, t)} * value(c, t);
                REQUIRE(y(r, c) == Approx(want).margin(2e-4));
              }
          }
        }
}

TEST_CASE("Packed levels equal decoded tiles at every head size and group, with sinks and windows", "[sums][table]") {
  const auto reference = make_attention_backend("reference"), decoded = make_attention_backend("cpu-reconstruct");
  for (const int d : {40, 48, 64, 80, 96, 128})
    for (const int group : {1, 2, 3, 4, 5, 8}) {
      // Keys in token groups of each channel, values in channel groups of each token, as KIVI; and the other way.
      for (const bool swapped : {false, true}) {
        CAPTURE(d, group, swapped);
        const CacheShape shape = make_shape(1, group, 2, d);
        const auto set = make_set(shape, swapped ? 2 : 1, [&](Role role, int channels) {
          DecodePlan p = empty_plan(channels, 32);
          if ((role == Role::kKey) != swapped)
            add_levels(p, 2, 1, 32, false);
          else
            add_levels(p, 2, d % 16 == 0 ? 16 : 20, 1, true);
          return std::make_shared<PlanCodec>(p);
        });
        const Tokens x(shape, 420, 31);
        const CachePolicy policy = policy_of(group, {40, 32}, {group == 4 ? 0 : 33, 32});
        const auto levels = make_attention_backend("cpu-table");
        const Replay want = replay(set, policy, *decoded, x, 60), got = replay(set, policy, *levels, x, 60);
        CHECK(levels->paths().back() == "cpu-table-sums");  // the first block sees nothing coded
        CHECK(worst_difference(want.out, got.out) < tolerance(8, d));
        CHECK(want.coded_share() == Approx(got.coded_share()).epsilon(1e-5));
        CHECK(got.coded_share() > 0.5);
        CHECK((replay(set, policy, *levels, x, 1).out.storage == got.out.storage));
        if (group == 3) CHECK(worst_difference(replay(set, policy, *reference, x, 60).out, got.out) < tolerance(8, d));
      }
    }
}

TEST_CASE("Levels that can't be attended where they lie say why", "[table]") {
  const auto table = make_attention_backend("cpu-table");
  const auto reason = [&](int bits, int group_channels, int group_tokens, bool per_token, bool beside = false) {
    DecodePlan p = empty_plan(64, 96);
    add_levels(p, bits, group_channels, group_tokens, per_token);
    if (beside) add_table(p, 8, 4);
    CHECK((code_domain_reason(p).has_value() == table->can(p, Role::kKey).has_value()));
    return table->can(p, Role::kKey).value_or("");
  };
  CHECK(reason(2, 32, 1, true) == "");
  CHECK(reason(4, 1, 32, false) == "");
  CHECK_THAT(reason(3, 32, 1, true), Catch::Contains("3 bits"));
  CHECK_THAT(reason(2, 4, 1, true), Catch::Contains("fewer than 8 channels"));
  CHECK_THAT(reason(2, 1, 48, false), Catch::Contains("no multiples of 32"));
  CHECK_THAT(reason(2, 32, 1, true, true), Catch::Contains("beside other terms"));
}
