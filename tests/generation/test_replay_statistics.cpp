// The KLD block on replays made by hand, whose numbers can be worked out on paper.
#include "generation/replay_statistics.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

// `windows` windows of `context` tokens in turn over the documents; every prediction of the exact cache has the NLL
// 1 + window.
ReplayResult made(int windows, int context, int documents = 1) {
  ReplayResult r;
  r.windows = windows;
  for (int w = 0; w < windows; ++w)
    for (int p = 1; p < context; ++p) {
      r.position.push_back(p);
      r.window.push_back(w);
      r.document.push_back(w % documents);
      r.nll_exact.push_back(1.0 + w);
    }
  r.tokens = int64_t{windows} * context;
  return r;
}

ReplayTrack track(const ReplayResult& r, const std::string& label, double (*kld)(int32_t position, int32_t window)) {
  ReplayTrack t;
  t.label = label;
  for (size_t i = 0; i < r.position.size(); ++i) {
    t.kld.push_back(kld(r.position[i], r.window[i]));
    t.nll.push_back(r.nll_exact[i] + 0.5);
    t.delta_p.push_back(r.position[i] % 2 ? 0.1 : -0.3);
    t.same_top.push_back(r.position[i] % 4 != 0);
  }
  t.flips.assign(static_cast<size_t>(r.windows), 4);
  return t;
}

const Measurement& find(const std::vector<Measurement>& all, const std::string& tag) {
  const auto it = std::find_if(all.begin(), all.end(), [&](const Measurement& m) { return m.tag == tag; });
  INFO(tag);
  REQUIRE(it != all.end());
  return *it;
}

}  // namespace

TEST_CASE("perplexities, their ratio and difference, bits per byte") {
  ReplayResult r = made(2, 65, 2);  // 64 positions a window
  r.text_bytes = 512;
  const auto block = kld_block(r, track(r, "a", [](int32_t, int32_t) { return 0.0; }), 65);
  CHECK(find(block, "ppl.exact").value == Approx(std::exp(1.5)));
  CHECK(find(block, "ppl").value == Approx(std::exp(2.0)));
  CHECK(find(block, "ppl.ratio").value == Approx(std::exp(0.5)));
  // Every paired difference is the same, so the ratio is certain although the perplexities are not.
  CHECK(find(block, "ppl.ratio").stderr_ == Approx(0).margin(1e-12));
  CHECK(find(block, "ppl.exact").stderr_ > 1);
  CHECK(find(block, "ppl.difference").value == Approx(std::exp(2.0) - std::exp(1.5)));
  CHECK(find(block, "ln_ppl.correlation").value == Approx(1));
  CHECK(find(block, "bits_per_byte").value == Approx(2.0 * 128 / (std::log(2.0) * 512)));
  CHECK(find(block, "ppl.ratio").n == 2);
  CHECK(find(block, "ppl.ratio").per_document == std::vector<double>{0.5, 0.5});
}

TEST_CASE("means of documents: of all positions, and of the last quarter") {
  ReplayResult r = made(4, 101, 2);  // windows 0 and 2 are of document 0, 1 and 3 of document 1
  const auto block = kld_block(r, track(r, "a", [](int32_t p, int32_t w) { return p * (1.0 + w); }), 101);
  CHECK(find(block, "kld.mean").per_document == std::vector<double>{2 * 50.5, 3 * 50.5});
  CHECK(find(block, "kld.last_quarter").per_document == std::vector<double>{2 * 88, 3 * 88});
}

TEST_CASE("quantiles, the last quarter, same-top and the change of p") {
  ReplayResult r = made(2, 101);  // positions 1..100, twice
  const auto block = kld_block(r, track(r, "a", [](int32_t p, int32_t) { return static_cast<double>(p); }), 101);
  CHECK(find(block, "kld.mean").value == Approx(50.5));
  CHECK(find(block, "kld.max").value == 100);
  CHECK(find(block, "kld.min").value == 1);
  CHECK(find(block, "kld.median").value == Approx(50.5));
  // 200 sorted values 1, 1, 2, 2, ...: order statistic 0.9 * 199 = 179.1 lies between the pair of 90 and 90/91.
  CHECK(find(block, "kld.p90").value == Approx(90.1));
  // The last quarter: positions from 101 - 25 = 76 on, 76..100.
  CHECK(find(block, "kld.last_quarter").value == Approx(88));
  CHECK(find(block, "same_top").value == Approx(0.75));
  CHECK(find(block, "delta_p.mean").value == Approx(-0.1));
  CHECK(find(block, "delta_p.rms").value == Approx(std::sqrt((0.01 + 0.09) / 2)));
  CHECK(find(block, "first_flip.median").value == 4);
  CHECK(find(block, "kld.last_quarter").stderr_ == Approx(0).margin(1e-12));  // both windows agree
}

TEST_CASE("the coded mass, and windows without a flip count as the whole window") {
  ReplayResult r = made(3, 65);
  ReplayTrack t = track(r, "a", [](int32_t, int32_t) { return 0.25; });
  t.flips = {-1, 10, -1};
  t.coded_mass = 30;
  t.total_mass = 120;
  t.coded_mass_last = 20;
  t.total_mass_last = 40;
  const auto block = kld_block(r, t, 65);
  CHECK(find(block, "first_flip.median").value == 65);
  CHECK(find(block, "coded_mass").value == 0.25);
  CHECK(find(block, "coded_mass.last_quarter").value == 0.5);
}

TEST_CASE("the statistics say which columns a table of replays has, in which group and order") {
  ReplayResult r = made(2, 101);
  r.text_bytes = 512;
  ReplayTrack t = track(r, "a", [](int32_t p, int32_t) { return static_cast<double>(p); });
  t.total_mass_last = t.total_mass = 1;
  std::vector<MeasureColumn> columns;
  for (const Measurement& m : kld_block(r, t, 101)) add_column(columns, m);
  std::vector<std::string> told;
  for (const MeasureColumn& c : columns) told.push_back(c.group + ":" + c.tag + ":" + c.title);
  CHECK(told == std::vector<std::string>{":coded_mass.last_quarter:coded mass", "kld:kld.last_quarter:KLD last 1/4",
                                         "kld:kld.mean:KLD", "kld:kld.p99:p99", "kld:kld.median:median",
                                         "kld:delta_p.rms:Δp rms", "kld:same_top:same top", "ppl:ppl:PPL",
                                         "ppl:ppl.ratio:PPL ratio", "ppl:bits_per_byte:bits/byte"});
}

TEST_CASE("no statistics under 100 positions") {
  ReplayResult r = made(1, 100);  // 99 positions
  CHECK_THROWS_AS(kld_block(r, track(r, "a", [](int32_t, int32_t) { return 0.0; }), 100), Error);
}

TEST_CASE("position buckets cover the window, an empty one says so") {
  const ReplayResult r = made(2, 64);
  const ReplayTrack t = track(r, "a", [](int32_t p, int32_t w) { return p < 32 ? 1.0 : 2.0 + w; });
  const auto buckets = position_buckets(r, t.kld, 64, 4);
  REQUIRE(buckets.size() == 4);
  CHECK(buckets[0].first == 0);
  CHECK(buckets[3].last == 63);
  int64_t n = 0;
  for (const auto& b : buckets) n += b.n;
  CHECK(n == 2 * 63);
  CHECK(buckets[0].mean == 1);
  CHECK(buckets[1].mean == 1);
  CHECK(buckets[2].mean == Approx(2.5));
  CHECK(buckets[2].error == Approx(0.5));  // windows 2 and 3
  ReplayResult late = r;
  for (auto& p : late.position) p = std::max(p, 40);  // as after an exact prompt
  CHECK(std::isnan(position_buckets(late, t.kld, 64, 4)[0].mean));
}

TEST_CASE("the error of a perplexity difference keeps both slopes") {
  // Two windows, exact NLLs 1 and 2, the codec's NLL higher by ln 4 everywhere: the paired difference of the NLLs is
  // certain, that of the perplexities is not, since 3 * exp(1.5) moves with the text.
  ReplayResult r = made(2, 65);
  ReplayTrack t = track(r, "a", [](int32_t, int32_t) { return 0.0; });
  for (size_t i = 0; i < t.nll.size(); ++i) t.nll[i] = r.nll_exact[i] + std::log(4.0);
  const auto block = kld_block(r, t, 65);
  CHECK(find(block, "ppl.difference").value == Approx(3 * std::exp(1.5)));
  CHECK(find(block, "ppl.difference").stderr_ == Approx(3 * std::exp(1.5) * 0.5));  // windows at 1 and 2: +- 0.5
  CHECK(find(block, "ppl.ratio").stderr_ == Approx(0).margin(1e-12));
}

TEST_CASE("errors and tests are over documents where there are several, over windows of one") {
  const ReplayResult two = made(12, 65, 2), one = made(12, 65);
  CHECK(replay_clusters(two).name == "document");
  CHECK(replay_clusters(two).count == 2);
  CHECK(replay_clusters(one).name == "window");
  CHECK(replay_clusters(one).count == 12);
  const auto by_window = [](int32_t, int32_t w) { return w % 2 ? 1.0 : 2.0; };
  const auto block = kld_block(two, track(two, "a", by_window), 65);
  CHECK(find(block, "kld.mean").n == 2);
  CHECK(find(block, "kld.mean").stderr_ == Approx(0.5));  // documents at 1 and 2
}

namespace {

using Pairs = std::vector<std::pair<size_t, size_t>>;

ReplayResult with_tracks(ReplayResult r, std::vector<ReplayTrack> tracks) {
  r.tracks = std::move(tracks);
  return r;
}

}  // namespace

TEST_CASE("two codecs are told apart by paired differences, and corrected for how many are compared") {
  // Windows differ by far more than the codecs do: only pairing sees that b is worse everywhere.
  ReplayResult r = made(8, 65);
  const ReplayTrack a = track(r, "a", [](int32_t, int32_t w) { return 1.0 * w; });
  const ReplayTrack b =
      track(r, "b", [](int32_t p, int32_t w) { return 1.0 * w + 0.01 + 0.001 * (w % 3) + (p >= 49 ? 0.1 : 0.0); });
  // Noise of both signs is no verdict.
  const ReplayTrack c = track(r, "c", [](int32_t, int32_t w) { return 1.0 * w + (w % 2 ? 0.1 : -0.09); });
  r = with_tracks(r, {a, b, c});
  const auto d = compare_tracks(r, Pairs{{0, 1}}, 65);
  REQUIRE(d.size() == 3);
  CHECK(d[0].what == "kld");
  CHECK(d[0].better == -1);
  CHECK(d[0].mean < 0);
  CHECK(d[0].interval.low <= d[0].mean);
  CHECK(d[0].interval.high >= d[0].mean);
  CHECK(d[0].p == 2.0 / 256);
  CHECK(d[0].corrected == Approx(3 * 2.0 / 256));
  CHECK(d[1].what == "kld.last_quarter");
  CHECK(d[1].mean == Approx(-0.1 - 0.01 - 0.001 * 7 / 8));  // w % 3 over 8 windows sums to 7
  CHECK(d[2].what == "nll");
  CHECK(d[2].better == 0);  // equal NLLs: nobody is better
  CHECK(verdict(d[0], "window") == "a is better");
  CHECK(verdict(d[2], "window") == "not told apart");
  CHECK(compare_tracks(r, Pairs{{1, 0}}, 65)[0].better == 1);
  CHECK(compare_tracks(r, Pairs{{0, 2}}, 65)[0].better == 0);

  // Among nine rows the same p counts less, and eight windows can't carry a verdict: 2^-7 is above 5 % / 9.
  const auto more = compare_tracks(r, Pairs{{0, 1}, {0, 2}, {1, 2}}, 65);
  REQUIRE(more.size() == 9);
  CHECK(more[0].p == d[0].p);
  CHECK(more[0].corrected > d[0].corrected);
  CHECK(!more[0].better);
  CHECK(more[0].needed == 9);
  CHECK(verdict(more[0], "window") == "no verdict: 8 windows can't reach 5 % over these comparisons, 9 would do");
  CHECK(more[0].interval.low == d[0].interval.low);  // of the row alone

  // A single window knows no interval and no verdict.
  ReplayResult single = made(1, 129);
  single = with_tracks(single, {track(single, "a", [](int32_t, int32_t) { return 0.0; }),
                                track(single, "b", [](int32_t, int32_t) { return 1.0; })});
  const auto lone = compare_tracks(single, Pairs{{0, 1}}, 129);
  CHECK(std::isnan(lone[0].interval.low));
  CHECK(!lone[0].better);
  CHECK(compare_tracks(single, Pairs{}, 129).empty());
}

TEST_CASE("under the null few tables hold any verdict at all") {
  // Four codecs that differ by nothing but noise of their own in every window; each table compares six pairs by three
  // measures. The chance that a table claims anything stays at or below 5 %.
  for (const int windows : {2, 3, 4, 6, 12}) {
    const int trials = 400;
    int wrong = 0;
    for (int t = 0; t < trials; ++t) {
      Rng rng(static_cast<uint64_t>(t));
      ReplayResult r = made(windows, 17);
      for (const char* label : {"a", "b", "c", "d"}) {
        r.tracks.push_back(track(r, label, [](int32_t, int32_t) { return 0.0; }));
        for (int w = 0; w < windows; ++w) {
          const double effect = rng.normal();
          for (size_t i = static_cast<size_t>(w) * 16; i < static_cast<size_t>(w + 1) * 16; ++i) {
            r.tracks.back().kld[i] = 1 + 0.1 * effect;
            r.tracks.back().nll[i] += 0.1 * effect;
          }
        }
      }
      bool any = false;
      for (const auto& d : compare_tracks(r, Pairs{{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}}, 17)) {
        any = any || d.better.value_or(0) != 0;
        CHECK(d.better.has_value() == (windows == 12));
      }
      wrong += any;
    }
    INFO(windows << " windows");
    CHECK(wrong <= 0.05 * trials);
  }
}

TEST_CASE("a number that is not finite ends the statistics by name") {
  const ReplayResult r = made(2, 65);
  const auto error_of = [&](const ReplayTrack& t) -> std::string {
    ReplayResult both = r;
    both.tracks = {track(r, "fine", [](int32_t, int32_t) { return 0.1; }), t};
    const std::pair<size_t, size_t> pair{0, 1};
    CHECK_THROWS_AS(compare_tracks(both, std::span(&pair, 1), 65), Error);
    try {
      kld_block(r, t, 65);
    } catch (const Error& e) { return e.what(); }
    return "no error";
  };
  const double nan = std::nan("");
  const ReplayTrack good = track(r, "a", [](int32_t, int32_t) { return 0.0; });
  ReplayTrack t = good;
  t.kld[70] = nan;
  CHECK(error_of(t) == "a: the KLD of position 7 in window 1 is nan");
  t = good;
  t.nll[3] = HUGE_VAL;
  CHECK(error_of(t) == "a: the NLL of position 4 in window 0 is inf");
  t = good;
  t.delta_p[0] = nan;
  CHECK(error_of(t) == "a: the change of p of position 1 in window 0 is nan");
  t = good;
  t.total_mass = nan;
  CHECK(error_of(t) == "a: an attention mass is nan");
}
