#include "codec/train/scalar_kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

#include "core/error.h"

namespace vqkv {
namespace {

constexpr size_t kCells = 4096;

// Weighted sums of some neighbouring values, measured from a value in their midst.
struct Sums {
  double weight = 0, value = 0, square = 0;
  void add(double w, double v) {
    weight += w;
    value += w * v;
    square += w * v * v;
  }
};
Sums operator+(const Sums& a, const Sums& b) { return {a.weight + b.weight, a.value + b.value, a.square + b.square}; }
Sums operator-(const Sums& a, const Sums& b) { return {a.weight - b.weight, a.value - b.value, a.square - b.square}; }

// Values in order, in cells that hold some weight.
std::vector<Sums> cells_of(std::span<const float> x, std::span<const double> weight, double middle) {
  const auto [low, high] = std::ranges::minmax(x);
  const auto weight_of = [&](size_t i) { return weight.empty() ? 1.0 : weight[i]; };
  std::vector<Sums> cells;
  if (x.size() > kCells) {
    cells.resize(kCells);
    const double per_value = static_cast<double>(kCells) / (double{high} - low);
    for (size_t i = 0; i < x.size(); ++i) {
      const double at = high > low ? (double{x[i]} - low) * per_value : 0;
      cells[std::min(kCells - 1, static_cast<size_t>(at))].add(weight_of(i), x[i] - middle);
    }
  } else {
    std::vector<size_t> order(x.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::ranges::stable_sort(order, {}, [&](size_t i) { return x[i]; });
    for (size_t i = 0; i < order.size(); ++i) {
      if (i == 0 || x[order[i]] != x[order[i - 1]]) cells.emplace_back();
      cells.back().add(weight_of(order[i]), x[order[i]] - middle);
    }
  }
  std::erase_if(cells, [](const Sums& c) { return !(c.weight > 0); });
  return cells;
}

class Runs {
 public:
  explicit Runs(const std::vector<Sums>& cells) : before_(1) {
    for (const Sums& c : cells) before_.push_back(before_.back() + c);
  }
  // Where each of `runs` runs begins, ascending; runs <= cells.
  std::vector<size_t> best(size_t runs) {
    const size_t n = before_.size() - 1;
    last_.assign(n + 1, std::numeric_limits<double>::infinity());
    last_[0] = 0;
    std::vector<std::vector<uint16_t>> begins(runs, std::vector<uint16_t>(n + 1));
    for (size_t r = 0; r < runs; ++r) {
      next_.assign(n + 1, std::numeric_limits<double>::infinity());
      solve(begins[r], r + 1, n, r, n - 1);
      last_.swap(next_);
    }
    std::vector<size_t> out(runs);
    for (size_t r = runs, end = n; r-- > 0; end = out[r]) out[r] = begins[r][end];
    return out;
  }
  Sums sums(size_t begin, size_t end) const { return before_[end] - before_[begin]; }

 private:
  double cost(size_t begin, size_t end) const {
    const Sums s = sums(begin, end);
    return std::max(0.0, s.square - s.value * s.value / s.weight);
  }
  // The last run of all that end in [low, high] begins in [first, last]; the lowest begin of equal ones.
  void solve(std::vector<uint16_t>& begins, size_t low, size_t high, size_t first, size_t last) {
    if (low > high) return;
    const size_t end = (low + high) / 2;
    size_t best = first;
    for (size_t begin = first; begin <= std::min(last, end - 1); ++begin) {
      const double total = last_[begin] + cost(begin, end);
      if (total >= next_[end]) continue;
      next_[end] = total;
      best = begin;
    }
    begins[end] = static_cast<uint16_t>(best);
    solve(begins, low, end - 1, first, best);
    solve(begins, end + 1, high, best, last);
  }

  std::vector<Sums> before_;         // of the cells before each
  std::vector<double> last_, next_;  // least cost of the cells before each, in one run less and in these runs
};

}  // namespace

std::vector<float> scalar_kmeans(std::span<const float> x, std::span<const double> weight, int levels) {
  VQKV_CHECK(!x.empty() && levels >= 1 && (weight.empty() || weight.size() == x.size()));
  const auto [low, high] = std::ranges::minmax(x);
  const double middle = 0.5 * (double{low} + high);
  const std::vector<Sums> cells = cells_of(x, weight, middle);
  VQKV_CHECK(!cells.empty());
  Runs runs(cells);
  std::vector<size_t> begins = runs.best(std::min(cells.size(), static_cast<size_t>(levels)));
  begins.push_back(cells.size());
  std::vector<float> out;
  for (size_t r = 0; r + 1 < begins.size(); ++r) {
    const Sums s = runs.sums(begins[r], begins[r + 1]);
    out.push_back(static_cast<float>(middle + s.value / s.weight));
  }
  std::ranges::sort(out);  // neighbours that differ by less than the sums are exact to
  out.resize(static_cast<size_t>(levels), out.back());
  return out;
}

int nearest_level(std::span<const float> levels, double v) {
  // Between neighbours the lower one up to their middle.
  int code = 0;
  for (size_t i = 1; i < levels.size(); ++i) code += v > 0.5 * (double{levels[i - 1]} + levels[i]);
  return code;
}

}  // namespace vqkv
