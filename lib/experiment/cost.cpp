#include "experiment/cost.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "core/json.h"
#include "experiment/tier_rows.h"
#include "metric/measurement.h"

namespace vqkv {
namespace {

Json row(const std::string& tag, double value, const std::string& unit, int64_t context, int64_t sequences) {
  Measurement m;
  m.tag = tag;
  m.value = value;
  m.unit = unit;
  m.n = 1;
  m.exact = true;
  Json j = to_json(m);
  j["role"] = "cost";
  if (context > 0) j["context"] = context;
  if (sequences > 0) j["sequences"] = sequences;
  return j;
}

int64_t values_per_token(const CacheShape& s) { return int64_t{2} * s.layers * s.kv_heads * s.head_dim; }

double shared_bytes(double resident, int64_t constants, int64_t sequences) {
  return resident + (sequences > 0 ? static_cast<double>(constants) / static_cast<double>(sequences) : 0);
}

// Share of the coded tokens that the tier holds in the longest of the contexts; of the newest where nothing is coded.
double tier_share(const CodecSet& codecs, const CachePolicy& policy, Role role, int tier,
                  const std::vector<int64_t>& contexts) {
  if (codecs.tiers() == 1) return 1;
  const int64_t longest = contexts.empty() ? 0 : *std::ranges::max_element(contexts);
  const std::vector<int64_t> held = tokens_by_tier(codecs, policy, role, longest);
  const int64_t all = std::accumulate(held.begin(), held.end(), int64_t{0});
  return all > 0 ? static_cast<double>(held[static_cast<size_t>(tier)]) / static_cast<double>(all) : tier == 0;
}

}  // namespace

double bits_per_value(const ByteLedger& ledger, const CacheShape& shape, int64_t tokens, int64_t sequences) {
  return 8 * shared_bytes(static_cast<double>(ledger.total_sequence()), ledger.codebooks, sequences) /
         static_cast<double>(values_per_token(shape) * tokens);
}

Json cost_measurements(const CodecSet& codecs, const CellConfig& config, const CachePolicy& policy,
                       std::span<const UnitExtras> extras) {
  Json out = Json::array();
  const double per_token = static_cast<double>(values_per_token(codecs.shape()));
  double bits = 0;
  for (size_t i = 0; i < codecs.units().size(); ++i) {
    const TrainedUnit& u = codecs.units()[i];
    const double held = tier_share(codecs, policy, u.spec.unit.role, u.spec.tier, config.contexts);
    const CodeLayout& layout = u.codec->layout();
    bits += held * (layout.bits_per_token() + layout.overlay_bits_per_token(extras.empty() ? 0 : extras[i].exceptions));
  }
  if (policy.keeps_codes()) out.push_back(row("bits_per_value.codes", bits / per_token, "bits/value", 0, 0));
  const int64_t constants = policy.keeps_codes() ? codecs.constant_bytes() : 0;
  out.push_back(row("bytes.constants", static_cast<double>(constants), "bytes", 0, 0));
  for (const int64_t context : config.contexts) {
    const auto resident = static_cast<double>(ledger_at(codecs, policy, context, extras).total_sequence());
    const double values = per_token * static_cast<double>(context);
    out.push_back(row("bytes", resident, "bytes", context, 0));
    out.push_back(row("bits_per_value", 8 * resident / values, "bits/value", context, 0));
    for (const int64_t n : config.sequences) {
      const double shared = shared_bytes(resident, constants, n);
      out.push_back(row("bytes", shared, "bytes", context, n));
      out.push_back(row("bits_per_value", 8 * shared / values, "bits/value", context, n));
    }
  }
  return out;
}

Json cost_ledgers(const CodecSet& codecs, const CellConfig& config, const CachePolicy& policy,
                  std::span<const UnitExtras> extras) {
  Json out = Json::object();
  for (const int64_t context : config.contexts)
    out[std::to_string(context)] = ledger_at(codecs, policy, context, extras).to_json();
  return out;
}

}  // namespace vqkv
