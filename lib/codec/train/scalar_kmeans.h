// k-means of scalars, exactly: the clusters of sorted values are runs, and the best runs follow by dynamic programming
// (Wang and Song, Ckmeans.1d.dp, The R Journal 3(2), 2011; rows by divide and conquer, since where a run begins never
// moves left as its end moves right).
#pragma once
#include <span>
#include <vector>

namespace vqkv {

// The `levels` ascending values with the least sum of weight * (distance to the nearest)^2. x (n >= 1), finite; weight
// (n) or empty, finite, non-negative and not all 0. With fewer distinct values than levels the largest is repeated.
// More than 4096 values are first pooled into 4096 equal cells between their ends, whose sums stay exact: only where a
// run begins is rounded, to a cell.
std::vector<float> scalar_kmeans(std::span<const float> x, std::span<const double> weight, int levels);

// The index of the level nearest to v, of the lower one in the middle between two; levels ascending.
int nearest_level(std::span<const float> levels, double v);

}  // namespace vqkv
