// Attention to what eviction left, and the mass that tokens received.
#include <algorithm>
#include <numeric>
#include <optional>

#include "attention/backends_cpu.h"
#include "attention/plan_cases.h"
#include "attention/scan_cpu.h"
#include "attention/session_cpu.h"
#include "core/thread_pool.h"
#include "support/allocations.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Recorder final : AttentionTap {
  std::vector<Matrix<float>> seen;
  void on_probabilities(int, int, int64_t, ConstMatrix p) override {
    seen.emplace_back(p.rows, p.cols);
    for (int64_t i = 0; i < p.rows; ++i) std::copy_n(p.row(i), p.cols, seen.back().row(i));
  }
};

}  // namespace

TEST_CASE("Evicted tokens get no mass, and a tap sees the probabilities", "[evict]") {
  const CacheShape shape = make_shape(1, 2, 2, 64);
  const auto set = set_of(cases()[0], shape, 2);
  const Tokens x(shape, 330, 111);
  std::vector<std::vector<Matrix<float>>> all;
  std::vector<Matrix<float>> outs;
  for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "sums"}) {
    const auto backend = name == std::string("sums") ? make_tiled_backend(KeyScan::kFixed, ValueSums::kAlways)
                                                     : make_attention_backend(name);
    CompressedCache cache(set, policy_of(4, {16, 16}, {16, 16}));
    KvSessionCpu session(cache, *backend);
    Matrix<float> out(300, shape.q_heads * 64), last(30, shape.q_heads * 64);
    session.begin_block(300);
    session.attend(0, x.q.view().slice_rows(0, 300), x.k.view().slice_rows(0, 300), x.v.view().slice_rows(0, 300), out);
    session.end_block();
    std::vector<int64_t> gone = {0, 2, 290};
    for (int64_t t = 68; t < 132; ++t) gone.push_back(t);  // a whole page
    cache.evict(0, 0, gone);
    cache.evict(0, 1, std::span<const int64_t>(gone).subspan(3));
    Recorder tap;
    session.set_tap(&tap);
    session.begin_block(30);
    session.attend(0, x.q.view().slice_rows(300, 30), x.k.view().slice_rows(300, 30), x.v.view().slice_rows(300, 30),
                   last);
    session.end_block();
    REQUIRE(tap.seen.size() == 4);
    for (int64_t i = 0; i < 30; ++i) {
      double sum = 0;
      for (int64_t t = 0; t < 330; ++t) sum += tap.seen[0](i, t);
      CHECK(sum == Approx(1.0).epsilon(1e-5));
      for (const int64_t t : gone) CHECK(tap.seen[0](i, t) == 0);
      CHECK(tap.seen[2](i, 0) > 0);
      for (int64_t t = 300 + i + 1; t < 330; ++t) CHECK(tap.seen[3](i, t) == 0);
    }
    all.push_back(std::move(tap.seen));
    outs.push_back(std::move(last));
  }
  for (size_t b : {1, 2, 3}) {
    const double bound = tolerance(8, 64) + (b >= 2 ? 12.0 * scan::kScanLimit : 0.0);
    CHECK(worst_difference(outs[0], outs[b]) < bound);
    for (size_t h = 0; h < 4; ++h) CHECK(worst_difference(all[0][h], all[b][h]) < bound);
  }
}

TEST_CASE("Attention to what eviction left: every form of codes, every path, alike in steps and blocks", "[evict]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  for (const Case& c : cases())
    for (const int heads : {1, 2}) {
      CAPTURE(c.name, heads);
      const auto set = set_of(c, shape, heads);
      const Tokens x(shape, 500, 191);
      const CachePolicy policy = policy_of(4, {32, 32}, {64, 32});
      std::optional<Matrix<float>> reference;
      std::optional<std::vector<double>> reference_mass;
      struct Way {
        std::string name;
        KeyScan scan;
        ValueSums sums;
      };
      for (const Way& way : {Way{"reference", {}, {}}, Way{"cpu-reconstruct", KeyScan::kNone, ValueSums::kNever},
                             Way{"cpu-table", KeyScan::kFixed, ValueSums::kWherePays},
                             Way{"sums", KeyScan::kNone, ValueSums::kAlways}}) {
        CAPTURE(way.name);
        const DecodePlan& keys = set->units()[0].codec->plan();
        const DecodePlan& values = set->units().back().codec->plan();
        if (way.scan != KeyScan::kNone && table_scan_reason(keys)) continue;
        if (way.sums == ValueSums::kAlways && code_domain_reason(values)) continue;
        const auto run = [&](int64_t block, std::vector<double>& received) {
          const auto backend =
              way.name == "reference" ? make_attention_backend("reference") : make_tiled_backend(way.scan, way.sums);
          CompressedCache cache(set, policy);
          Matrix<float> q = x.q, out(500, x.q.cols);
          std::vector<int32_t> positions(500);
          std::iota(positions.begin(), positions.end(), 0);
          rope_apply(RopeTable(shape.rope), positions.data(), q);
          received.assign(500, 0.0);
          for (int64_t t = 0; t < 500;) {
            const int64_t n = std::min(block, 500 - t) <= 250 - t || t >= 250 ? std::min(block, 500 - t) : 250 - t;
            cache.begin_block(n);
            cache.append(0, x.k.view().slice_rows(t, n), x.v.view().slice_rows(t, n));
            const std::vector<int32_t> seen[2] = {CacheView(cache).seen(0, 0), CacheView(cache).seen(0, 1)};
            std::vector<double> columns[2] = {std::vector<double>(seen[0].size()), std::vector<double>(seen[1].size())};
            MassRequest mass{0, 500, {columns[0], columns[1]}};
            backend->attend(cache, 0, q.view().slice_rows(t, n), MutMatrix(out).slice_rows(t, n), nullptr, nullptr,
                            &mass);
            for (size_t i = 0; i < seen[0].size(); ++i) received[static_cast<size_t>(seen[0][i])] += columns[0][i];
            cache.end_block();
            t += n;
            if (t != 250) continue;
            // Sinks, codes, what spans the boundary, the exact window; both heads, then one of them.
            std::vector<int64_t> both = {1, 247}, one = {0, 2, 248};
            for (int64_t p = 5; p < 240; ++p) {
              if (p % 64 > 20 && p % 64 < 60) both.push_back(p);
              if (p % 7 == 3) one.push_back(p);
            }
            cache.evict(0, 0, both);
            cache.evict(0, 1, both);
            cache.evict(0, 0, one);
          }
          return out;
        };
        std::vector<double> mass, other;
        const Matrix<float> whole = run(500, mass);
        if (!reference) {
          reference = whole;
          reference_mass = mass;
        }
        const double bound = tolerance(8, 64) + (way.scan != KeyScan::kNone ? 12.0 * scan::kScanLimit : 0.0);
        CHECK(worst_difference(*reference, whole) < bound);
        for (size_t t = 0; t < 500; ++t) REQUIRE(mass[t] == Approx((*reference_mass)[t]).margin(500 * bound));
        for (const int64_t block : {1, 33}) {
          if (block == 1 && way.name == "reference") continue;
          CHECK((run(block, other).storage == whole.storage));
        }
      }
    }
}

TEST_CASE("The mass of tokens: what a tap's probabilities sum to, alike in steps and blocks", "[evict]") {
  const CacheShape shape = make_shape(1, 3, 2, 64);
  const Tokens x(shape, 420, 171);
  struct Way {
    std::string name;
    KeyScan scan;
    ValueSums sums;
  };
  for (const Way& way :
       {Way{"reference", {}, {}}, Way{"cpu-reconstruct", KeyScan::kNone, ValueSums::kNever},
        Way{"cpu-table", KeyScan::kFixed, ValueSums::kWherePays},
        Way{"cpu-table8", KeyScan::kBytes, ValueSums::kWherePays}, Way{"sums", KeyScan::kFixed, ValueSums::kAlways}})
    for (const bool drops : {false, true}) {
      CAPTURE(way.name, drops);
      const auto make = [&] {
        return way.name == "reference" ? make_attention_backend("reference") : make_tiled_backend(way.scan, way.sums);
      };
      CachePolicy policy = policy_of(4, {32, 16}, {32, 16});
      policy.drops = drops;
      // Queries [from, to) alone count, whatever blocks they come in.
      constexpr int64_t kFrom = 130, kTo = 391;
      const auto run = [&](int64_t block, AttentionTap* tap) {
        std::vector<std::vector<double>> received(2, std::vector<double>(420, 0.0));
        const auto backend = make();
        CompressedCache cache(set_of(cases()[0], shape, 2), policy);
        KvSessionCpu rotates(cache, *backend);
        Matrix<float> q = x.q, out(420, x.q.cols);
        std::vector<int32_t> positions(420);
        std::iota(positions.begin(), positions.end(), 0);
        rope_apply(RopeTable(shape.rope), positions.data(), q);
        for (int64_t t = 0; t < 420; t += block) {
          const int64_t n = std::min(block, 420 - t);
          cache.begin_block(n);
          cache.append(0, x.k.view().slice_rows(t, n), x.v.view().slice_rows(t, n));
          MassRequest mass{kFrom, kTo, {received[0], received[1]}};
          backend->attend(cache, 0, q.view().slice_rows(t, n), MutMatrix(out).slice_rows(t, n), nullptr, tap, &mass);
          cache.end_block();
        }
        return received;
      };
      Recorder tap;
      const auto whole = run(420, &tap);
      REQUIRE(tap.seen.size() == 6);
      for (size_t h = 0; h < 2; ++h)
        for (int64_t t = 0; t < 420; ++t) {
          double sum = 0;
          for (size_t g = 0; g < 3; ++g)
            for (int64_t i = kFrom; i < kTo; ++i) sum += tap.seen[3 * h + g](i, t);
          REQUIRE(whole[h][static_cast<size_t>(t)] == Approx(sum).margin(1e-4));
        }
      for (const int64_t block : {1, 37, 256}) CHECK(run(block, nullptr) == whole);
    }
}

TEST_CASE("The mass of tokens takes some tiles more than attention, however many tokens there are", "[evict][memory]") {
  if (!counts_allocations()) return;
  const int before = thread_count();
  set_thread_count(1);
  const CacheShape shape = make_shape(1, 2, 2, 64);
  constexpr int64_t kQueries = 256;
  for (const char* name : {"cpu-reconstruct", "cpu-table", "cpu-table8"})
    for (const int64_t tokens : {2048, 8192}) {
      const Tokens x(shape, tokens, 211);
      CompressedCache cache(set_of(cases()[0], shape, 2), policy_of(4, {32, 32}, {64, 32}));
      cache.begin_block(tokens - kQueries);
      cache.append(0, x.k.view().slice_rows(0, tokens - kQueries), x.v.view().slice_rows(0, tokens - kQueries));
      cache.end_block();
      cache.begin_block(kQueries);
      cache.append(0, x.k.view().slice_rows(tokens - kQueries, kQueries),
                   x.v.view().slice_rows(tokens - kQueries, kQueries));
      Matrix<float> out(kQueries, x.q.cols);
      std::vector<std::vector<double>> received(2, std::vector<double>(static_cast<size_t>(tokens), 0.0));
      const auto peak = [&](bool observes) {
        const auto backend = make_attention_backend(name);
        MassRequest mass{0, tokens, {received[0], received[1]}};
        restart_peak();
        const int64_t from = live_bytes();
        backend->attend(cache, 0, x.q.view().slice_rows(tokens - kQueries, kQueries), out, nullptr, nullptr,
                        observes ? &mass : nullptr);
        return peak_bytes() - from;
      };
      peak(true);  // what the thread works in
      const int64_t without = peak(false), with = peak(true);
      CAPTURE(name, tokens, without, with);
      CHECK(received[0][5] > 0);
      CHECK(with - without < 4 * int64_t{128 * 128 * sizeof(float)});  // all masses at 8k: 33 MB
    }
  set_thread_count(before);
}
