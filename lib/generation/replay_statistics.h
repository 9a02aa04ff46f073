// The KLD block of a replay (evaluation.md 5.5): what a table row says of one candidate against the exact cache.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "generation/replay.h"
#include "metric/measurement.h"
#include "metric/statistics.h"

namespace vqkv {

// Fewer scored positions than statistics need: kUsage.
void require_positions(int64_t scored);

// Tags: ppl.exact, ppl, ppl.ratio (exp of the paired mean), ppl.difference, ln_ppl.correlation, bits_per_byte,
// kld.mean, kld.last_quarter (the headline), kld.{max,p99.9,p99,p95,p90,median,p10,p5,p1,min}, delta_p.{mean,rms,...},
// same_top, first_flip.median, coded_mass, coded_mass.last_quarter. Errors are over documents or windows
// (replay_clusters, cluster_error); `context` is the window length that the last quarter refers to. Throws what
// require_positions does.
std::vector<Measurement> kld_block(const ReplayResult& result, const ReplayTrack& track, int64_t context);

// Mean of `values` in equal buckets of position; empty buckets give NaN.
struct Bucket {
  int64_t first = 0, last = 0, n = 0;  // positions [first, last]
  double mean = 0, error = 0;
};
std::vector<Bucket> position_buckets(const ReplayResult& result, const std::vector<double>& values, int64_t context,
                                     int buckets);

// What an error or a test counts as independent: documents where the replay has several, otherwise windows.
struct ReplayClusters {
  const std::vector<int32_t>& of;  // one a scored position
  std::string name;                // "document" or "window"
  int64_t count = 0;
};
ReplayClusters replay_clusters(const ReplayResult& result);

// Two candidates on the same positions: mean of (a - b) of the per-position KLD and NLL, by a sign-flip test over
// clusters.
struct PairedDifference {
  size_t a = 0, b = 0;  // tracks of the result
  std::string what;     // "kld", "kld.last_quarter" or "nll"
  double mean = 0;
  Interval interval;            // 95 % for this row alone; NaN with fewer than six clusters
  double p = 1, corrected = 1;  // corrected: Holm, over all rows returned together
  int64_t clusters = 0;
  int64_t needed = 0;  // clusters with which the first row of so many can reach 5 %
  // -1 a is better, +1 b is better, 0 not told apart; nothing where `clusters` can't reach the level.
  std::optional<int> better;
};
std::vector<PairedDifference> compare_tracks(const ReplayResult& result,
                                             std::span<const std::pair<size_t, size_t>> pairs, int64_t context);
// "a is better", "b is better", "not told apart", or that there is no verdict and how many clusters would do.
std::string verdict(const PairedDifference& difference, const std::string& cluster_name);

}  // namespace vqkv
