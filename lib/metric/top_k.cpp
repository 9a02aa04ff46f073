// Do the most attended tokens stay the most attended?
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "metric/by_head.h"

namespace vqkv {
namespace {

constexpr std::array<int64_t, 4> kSizes{1, 4, 16, 64};

class TopK final : public Metric {
 public:
  void add(const FidelitySample& s) override {
    const AttentionRows& r = s.rows();
    std::vector<int32_t> exact, coded;
    std::array<double, kSizes.size()> overlap{}, mass{}, best{}, rows{};
    for (int64_t i = 0; i < r.s.rows; ++i) {
      const int64_t n = r.tokens[static_cast<size_t>(i)];
      const float *a = r.s.row(i), *b = r.s_hat.row(i), *p = r.p.row(i);
      const int64_t deepest = std::min<int64_t>(kSizes.back(), n);
      order(a, n, deepest, exact);
      order(b, n, deepest, coded);
      for (size_t k = 0; k < kSizes.size(); ++k) {
        const int64_t size = kSizes[k];
        if (n < 2 * size) continue;  // with all tokens in both sets there is nothing to see
        std::vector<int32_t> x(exact.begin(), exact.begin() + size), y(coded.begin(), coded.begin() + size), both;
        std::sort(x.begin(), x.end());
        std::sort(y.begin(), y.end());
        std::set_intersection(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(both));
        overlap[k] += static_cast<double>(both.size()) / static_cast<double>(size);
        for (const int32_t j : x) best[k] += p[j];
        for (const int32_t j : y) mass[k] += p[j];
        rows[k] += 1;
      }
    }
    for (size_t k = 0; k < kSizes.size(); ++k) {
      overlap_[k].add(s, overlap[k], rows[k]);
      recall_[k].add(s, mass[k], best[k]);
    }
  }

  std::vector<Measurement> finish() override {
    std::vector<Measurement> out;
    for (size_t k = 0; k < kSizes.size(); ++k) {
      const int size = static_cast<int>(kSizes[k]);
      out.push_back(titled(overlap_[k].measure(fmt::format("attention.top{}_overlap", size), "1", Better::kHigher),
                           fmt::format("top-{} overlap", size), Shown::kNowhere));
      out.push_back(titled(recall_[k].measure(fmt::format("attention.top{}_mass_recall", size), "1", Better::kHigher),
                           fmt::format("top-{} recall", size), size == 16 ? Shown::kValue : Shown::kNowhere));
    }
    return out;
  }

 private:
  // The `count` largest of s[0..n), largest first, ties to the lowest index.
  static void order(const float* s, int64_t n, int64_t count, std::vector<int32_t>& out) {
    out.resize(static_cast<size_t>(n));
    std::iota(out.begin(), out.end(), 0);
    std::partial_sort(out.begin(), out.begin() + count, out.end(),
                      [s](int32_t x, int32_t y) { return s[x] != s[y] ? s[x] > s[y] : x < y; });
  }
  std::array<ByHead, kSizes.size()> overlap_, recall_;
};

const MetricInfo kTopKInfo{
    "top_k",
    "overlap of the most attended tokens",
    "1",
    "|top-k(s) & top-k(s^)| / k for k = 1, 4, 16, 64 over rows of at least 2k tokens; exact mass of "
    "top-k(s^) over that of top-k(s)",
    "sparse-attention literature",
    "the overlap counts near ties as losses; the recall doesn't",
    Better::kHigher,
    true};

}  // namespace

VQKV_DEFINE_METRIC(top_k, TopK, kTopKInfo)

}  // namespace vqkv
