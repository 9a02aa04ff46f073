// The KLD block of a replay (evaluation.md 5.5): what a table row says of one candidate against the exact cache.
#pragma once
#include <string>
#include <vector>

#include "generation/replay.h"
#include "metric/measurement.h"
#include "metric/statistics.h"

namespace vqkv {

// Tags: ppl.exact, ppl, ppl.ratio (exp of the paired mean), ppl.difference, ln_ppl.correlation, bits_per_byte,
// kld.mean, kld.last_quarter (the headline), kld.{max,p99.9,p99,p95,p90,median,p10,p5,p1,min}, delta_p.{mean,rms,...},
// same_top, first_flip.median, coded_mass, coded_mass.last_quarter. Errors are over windows (cluster_error); `context`
// is the window length that the last quarter refers to. Fewer than 100 positions: kUsage, no statistics.
std::vector<Measurement> kld_block(const ReplayResult& result, const ReplayTrack& track, int64_t context);

// Mean of `values` in equal buckets of position; empty buckets give NaN.
struct Bucket {
  int64_t first = 0, last = 0, n = 0;  // positions [first, last]
  double mean = 0, error = 0;
};
std::vector<Bucket> position_buckets(const ReplayResult& result, const std::vector<double>& values, int64_t context,
                                     int buckets);

// Two candidates on the same positions: mean of (a - b) of the per-position KLD and NLL, with a 95 % interval from a
// bootstrap over windows. `better`: -1 a is better, +1 b is better, 0 the interval holds zero (or is unknown).
struct PairedDifference {
  std::string a, b, what;  // what: "kld", "kld.last_quarter" or "nll"
  double mean = 0;
  Interval interval;
  int better = 0;
};
std::vector<PairedDifference> compare_tracks(const ReplayResult& result, const ReplayTrack& a, const ReplayTrack& b,
                                             int64_t context, int comparisons = 1);

}  // namespace vqkv
