// Entropy of the codes and codewords that are never used: free diagnostics of a codebook.
#include <cmath>

#include "metric/by_head.h"

namespace vqkv {
namespace {

// Histograms per (layer, first head of the unit, role, field, slot), over all documents.
class CodeUsage final : public Metric {
 public:
  void add(const FidelitySample& s) override {
    count(s, s.key_codes, s.key_layout, 0);
    count(s, s.value_codes, s.value_layout, 1);
  }

  std::vector<Measurement> finish() override {
    std::vector<Measurement> out;
    for (int role = 0; role < 2; ++role) {
      double entropy = 0, bits = 0, dead = 0, slots = 0;
      for (const auto& [key, histogram] : histograms_) {
        if (std::get<2>(key) != role) continue;
        double total = 0, h = 0, unused = 0;
        for (const double c : histogram) total += c;
        for (const double c : histogram) {
          if (c > 0)
            h -= c / total * std::log2(c / total);
          else
            unused += 1;
        }
        entropy += h;
        bits += std::log2(static_cast<double>(histogram.size()));
        dead += unused / static_cast<double>(histogram.size());
        slots += 1;
      }
      if (slots == 0) continue;
      const std::string prefix = role == 0 ? "key" : "value";
      const auto add = [&](const char* what, const char* title, double value, const char* unit, Better better) {
        out.push_back(titled(plain(prefix + what, value, unit, better), prefix + title, Shown::kNowhere));
      };
      add(".code_entropy", " code entropy", entropy / slots, "bits/code", Better::kNeither);
      add(".code_entropy_share", " code entropy of its width", entropy / bits, "1", Better::kHigher);
      add(".dead_codes", " dead codes", dead / slots, "1", Better::kLower);
    }
    return out;
  }

 private:
  void count(const FidelitySample& s, const std::vector<std::vector<uint16_t>>* codes, const CodeLayout* layout,
             int role) {
    if (codes == nullptr || layout == nullptr) return;
    for (size_t f = 0; f < codes->size(); ++f) {
      const size_t slots = static_cast<size_t>(layout->fields[f].slots), entries = size_t{1} << layout->fields[f].bits;
      const auto& field = (*codes)[f];
      for (size_t slot = 0; slot < slots; ++slot) {
        auto& histogram = histograms_[{s.layer, s.kv_head, role, static_cast<int>(f), static_cast<int>(slot)}];
        histogram.resize(entries);
        for (size_t i = slot; i < field.size(); i += slots) histogram[field[i]] += 1;
      }
    }
  }
  static Measurement plain(std::string tag, double value, std::string unit, Better better) {
    Measurement m;
    m.tag = std::move(tag);
    m.value = value;
    m.unit = std::move(unit);
    m.better = better;
    return m;
  }
  std::map<std::tuple<int, int, int, int, int>, std::vector<double>> histograms_;
};

const MetricInfo kCodeUsageInfo{"code_usage",
                                "entropy of codes, share of dead codewords",
                                "bits/code",
                                "mean over slots of -sum p log2 p; its share of the code's width; codewords never used",
                                "ecosystem practice",
                                "with fewer tokens than codewords the entropy is bounded by the tokens",
                                Better::kNeither,
                                false,
                                true};

}  // namespace

VQKV_DEFINE_METRIC(code_usage, CodeUsage, kCodeUsageInfo)

}  // namespace vqkv
