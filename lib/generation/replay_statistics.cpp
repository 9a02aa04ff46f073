#include "generation/replay_statistics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "core/error.h"

namespace vqkv {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Per-position values and their clusters, for the positions that `keep` accepts.
struct Picked {
  std::vector<double> x;
  std::vector<int32_t> cluster;
};

template <class Keep>
Picked pick(const ReplayResult& r, const std::vector<double>& x, Keep keep) {
  Picked p;
  const auto clusters = replay_clusters(r);
  for (size_t i = 0; i < x.size(); ++i)
    if (keep(r.position[i])) {
      p.x.push_back(x[i]);
      p.cluster.push_back(clusters.of[i]);
    }
  return p;
}

std::vector<double> difference(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> d(a.size());
  for (size_t i = 0; i < a.size(); ++i) d[i] = a[i] - b[i];
  return d;
}

// Sorting and comparing would hide what is not a number, and a ratio of masses would call it zero.
void require_finite(const ReplayResult& r, const ReplayTrack& t) {
  const auto all = [&](const char* what, const std::vector<double>& x) {
    for (size_t i = 0; i < x.size(); ++i)
      if (!std::isfinite(x[i]))
        fail_data(fmt::format("{}: the {} of position {} in window {} is {}", t.label, what, r.position[i], r.window[i],
                              x[i]));
  };
  all("NLL", t.nll);
  all("KLD", t.kld);
  all("change of p", t.delta_p);
  for (const double mass : {t.coded_mass, t.total_mass, t.coded_mass_last, t.total_mass_last})
    if (!std::isfinite(mass)) fail_data(fmt::format("{}: an attention mass is {}", t.label, mass));
}

// Means per document in document order of the positions that `keep` accepts, for paired tests elsewhere.
template <class Keep>
std::vector<double> per_document(const ReplayResult& r, const std::vector<double>& x, Keep keep) {
  std::vector<double> sum, count;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!keep(r.position[i])) continue;
    const size_t d = static_cast<size_t>(r.document[i]);
    if (d >= sum.size()) sum.resize(d + 1), count.resize(d + 1);
    sum[d] += x[i];
    count[d] += 1;
  }
  std::vector<double> out;
  for (size_t d = 0; d < sum.size(); ++d)
    if (count[d] > 0) out.push_back(sum[d] / count[d]);
  return out;
}

class Block {
 public:
  explicit Block(int64_t clusters) : clusters_(clusters) {}
  // The group of what follows.
  void of(std::string group) { group_ = std::move(group); }
  // The next one has a column in tables.
  Block& show(std::string title, Shown shown, int digits = 4) {
    title_ = std::move(title);
    shown_ = shown;
    digits_ = digits;
    return *this;
  }
  Measurement& add(std::string tag, double value, std::string unit, double error, Better better) {
    Measurement m;
    m.tag = std::move(tag);
    m.value = value;
    m.unit = std::move(unit);
    m.stderr_ = error;
    m.n = clusters_;
    m.better = better;
    m.group = group_;
    all_.push_back(titled(std::move(m), std::exchange(title_, ""), std::exchange(shown_, Shown::kNowhere), digits_));
    return all_.back();
  }
  std::vector<Measurement> take() { return std::move(all_); }

 private:
  int64_t clusters_;
  std::string group_, title_;
  Shown shown_ = Shown::kNowhere;
  int digits_ = 4;
  std::vector<Measurement> all_;
};

}  // namespace

ReplayClusters replay_clusters(const ReplayResult& r) {
  const auto distinct = [](const std::vector<int32_t>& ids) {
    return static_cast<int64_t>(std::set<int32_t>(ids.begin(), ids.end()).size());
  };
  const int64_t documents = distinct(r.document);
  if (documents > 1) return {r.document, "document", documents};
  return {r.window, "window", distinct(r.window)};
}

void require_positions(int64_t scored) {
  constexpr int64_t kLeast = 100;
  if (scored < kLeast)
    fail_usage(fmt::format("{} scored positions are too few for statistics; give at least {}", scored, kLeast));
}

std::vector<Measurement> kld_block(const ReplayResult& r, const ReplayTrack& t, int64_t context) {
  const size_t n = t.kld.size();
  VQKV_CHECK(n == r.position.size() && n == r.nll_exact.size());
  require_finite(r, t);
  require_positions(static_cast<int64_t>(n));
  const auto clusters = replay_clusters(r);
  Block out(clusters.count);
  const auto error_of = [&](const std::vector<double>& x) { return cluster_error(x, clusters.of); };
  const auto mean_of = [](const std::vector<double>& x) { return mean_error(x).mean; };

  if (t.total_mass > 0)  // a device tells none
    out.add("coded_mass", t.coded_mass / t.total_mass, "1", 0, Better::kNeither);
  if (t.total_mass_last > 0)
    out.show("coded mass", Shown::kValue, 3)
        .add("coded_mass.last_quarter", t.coded_mass_last / t.total_mass_last, "1", 0, Better::kNeither);

  out.of("kld");
  const auto every = [](int32_t) { return true; };
  const auto in_last = [&](int32_t p) { return p >= context - context / 4; };
  const auto last = pick(r, t.kld, in_last);
  if (!last.x.empty())
    out.show("KLD last 1/4", Shown::kWithError, 3)
        .add("kld.last_quarter", mean_of(last.x), "nats", cluster_error(last.x, last.cluster), Better::kLower)
        .per_document = per_document(r, t.kld, in_last);
  out.show("KLD", Shown::kValue, 3)
      .add("kld.mean", mean_of(t.kld), "nats", error_of(t.kld), Better::kLower)
      .per_document = per_document(r, t.kld, every);
  constexpr std::pair<const char*, double> kQuantiles[] = {{"max", 1},  {"p99.9", .999}, {"p99", .99}, {"p95", .95},
                                                           {"p90", .9}, {"median", .5},  {"p10", .1},  {"p5", .05},
                                                           {"p1", .01}, {"min", 0}};
  std::vector<double> q;
  for (const auto& [name, value] : kQuantiles) q.push_back(value);
  const auto kq = quantiles(t.kld, q), dq = quantiles(t.delta_p, q);
  for (size_t i = 0; i < q.size(); ++i) {
    const std::string name = kQuantiles[i].first;
    if (name == "median" || name == "p99") out.show(name, Shown::kValue, 3);
    out.add("kld." + name, kq[i], "nats", 0, Better::kLower);
  }

  std::vector<double> squared(n), same(n);
  for (size_t i = 0; i < n; ++i) {
    squared[i] = t.delta_p[i] * t.delta_p[i];
    same[i] = t.same_top[i];
  }
  const double rms = std::sqrt(mean_of(squared));
  out.add("delta_p.mean", mean_of(t.delta_p), "1", error_of(t.delta_p), Better::kNeither);
  out.show("Δp rms", Shown::kValue)
      .add("delta_p.rms", rms, "1", rms > 0 ? error_of(squared) / (2 * rms) : 0, Better::kLower);
  for (size_t i = 0; i < q.size(); ++i)
    out.add(fmt::format("delta_p.{}", kQuantiles[i].first), dq[i], "1", 0, Better::kNeither);
  out.show("same top", Shown::kValue).add("same_top", mean_of(same), "1", error_of(same), Better::kHigher);

  // The first flip is censored at the window's end where there was none.
  std::vector<double> flips;
  for (const int32_t f : t.flips) flips.push_back(f < 0 ? static_cast<double>(context) : f);
  out.add("first_flip.median", quantile(flips, 0.5), "tokens", 0, Better::kHigher);

  const double nll = mean_of(t.nll), nll_exact = mean_of(r.nll_exact);
  const auto delta_nll = difference(t.nll, r.nll_exact);
  const double ratio = mean_of(delta_nll);
  // Errors of exp(mean) by the delta method; ratio and difference use the paired NLLs, hence tighter than the two
  // apart. The difference keeps the slopes of both: exp(nll) alone is right only where the perplexities are about
  // equal.
  out.of("ppl");
  out.add("ppl.exact", std::exp(nll_exact), "1", std::exp(nll_exact) * error_of(r.nll_exact), Better::kLower);
  out.show("PPL", Shown::kValue, 6).add("ppl", std::exp(nll), "1", std::exp(nll) * error_of(t.nll), Better::kLower);
  out.show("PPL ratio", Shown::kWithError, 6)
      .add("ppl.ratio", std::exp(ratio), "1", std::exp(ratio) * error_of(delta_nll), Better::kLower)
      .per_document = per_document(r, delta_nll, every);
  std::vector<double> slopes(n);
  for (size_t i = 0; i < n; ++i) slopes[i] = std::exp(nll) * t.nll[i] - std::exp(nll_exact) * r.nll_exact[i];
  out.add("ppl.difference", std::exp(nll) - std::exp(nll_exact), "1", error_of(slopes), Better::kLower);
  out.add("ln_ppl.correlation", pearson(t.nll, r.nll_exact), "1", 0, Better::kHigher);
  if (r.text_bytes > 0)
    out.show("bits/byte", Shown::kValue)
        .add("bits_per_byte", nll * static_cast<double>(n) / (std::log(2.0) * static_cast<double>(r.text_bytes)),
             "bits/byte",
             error_of(t.nll) * static_cast<double>(n) / (std::log(2.0) * static_cast<double>(r.text_bytes)),
             Better::kLower);
  return out.take();
}

std::vector<Bucket> position_buckets(const ReplayResult& r, const std::vector<double>& values, int64_t context,
                                     int buckets) {
  VQKV_CHECK(values.size() == r.position.size() && buckets > 0);
  std::vector<Bucket> out;
  for (int b = 0; b < buckets; ++b) {
    Bucket bucket;
    bucket.first = context * b / buckets;
    bucket.last = context * (b + 1) / buckets - 1;
    const auto in = pick(r, values, [&](int32_t p) { return p >= bucket.first && p <= bucket.last; });
    bucket.n = static_cast<int64_t>(in.x.size());
    bucket.mean = in.x.empty() ? kNaN : mean_error(in.x).mean;
    bucket.error = in.x.empty() ? kNaN : cluster_error(in.x, in.cluster);
    out.push_back(bucket);
  }
  return out;
}

std::vector<PairedDifference> compare_tracks(const ReplayResult& r, std::span<const std::pair<size_t, size_t>> pairs,
                                             int64_t context) {
  constexpr double kLevel = 0.05;
  const auto all = [](int32_t) { return true; };
  const auto last = [&](int32_t p) { return p >= context - context / 4; };
  std::vector<std::string> measures{"kld", "nll"};
  if (std::any_of(r.position.begin(), r.position.end(), last))
    measures.insert(measures.begin() + 1, "kld.last_quarter");
  std::vector<PairedDifference> out;
  std::vector<double> p;
  for (const ReplayTrack& t : r.tracks) require_finite(r, t);
  const double each = kLevel / static_cast<double>(std::max<size_t>(1, pairs.size() * measures.size()));
  for (const auto& [a, b] : pairs)
    for (const auto& what : measures) {
      const ReplayTrack &x = r.tracks[a], &y = r.tracks[b];
      const auto values = what == "nll" ? difference(x.nll, y.nll) : difference(x.kld, y.kld);
      const Picked d = what == "kld.last_quarter" ? pick(r, values, last) : pick(r, values, all);
      // The stream is named, so a table reprints the same numbers.
      const SignFlip test =
          sign_flip(d.x, d.cluster, Rng::from_text(fmt::format("paired/{}/{}/{}", x.label, y.label, what)), each);
      out.push_back({.a = a,
                     .b = b,
                     .what = what,
                     .mean = mean_error(d.x).mean,
                     .interval = test.interval,
                     .p = test.p,
                     .clusters = test.clusters,
                     .needed = clusters_to_reach(each),
                     .better = {}});
      p.push_back(test.p);
    }
  const auto corrected = holm(p);
  for (size_t i = 0; i < out.size(); ++i) {
    PairedDifference& d = out[i];
    d.corrected = corrected[i];
    if (d.clusters >= d.needed) d.better = d.corrected > kLevel ? 0 : d.mean < 0 ? -1 : 1;
  }
  return out;
}

std::string verdict(const PairedDifference& d, const std::string& cluster_name) {
  if (!d.better)
    return fmt::format("no verdict: {} {}{} can't reach 5 % over these comparisons, {} would do", d.clusters,
                       cluster_name, d.clusters == 1 ? "" : "s", d.needed);
  return *d.better < 0 ? "a is better" : *d.better > 0 ? "b is better" : "not told apart";
}

}  // namespace vqkv
