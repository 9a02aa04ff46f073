#include "cache/coding.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "codec/level.h"
#include "core/error.h"
#include "core/finite.h"

namespace vqkv {
namespace {

// The unit's heads side by side.
Matrix<float> gather(const UnitShape& unit, const HeldRows& rows, Role role, int64_t first, int64_t count) {
  Matrix<float> x(count, unit.channels());
  for (int h = 0; h < unit.heads; ++h)
    rows.load(role, unit.first_head + h, first, x.view().slice_cols(h * unit.head_dim, unit.head_dim));
  return x;
}

void check_codes(const DecodePlan& plan, const CodeBlock& codes) {
  const auto check = Overloaded{[&](const TableTerm& table) {
                                  // Other slots of the field may have books of their own; their terms check them.
                                  const size_t slots =
                                      static_cast<size_t>(plan.layout.fields[static_cast<size_t>(table.field)].slots);
                                  const std::vector<uint16_t>& all = codes.fields[static_cast<size_t>(table.field)];
                                  for (size_t t = 0; t < all.size(); t += slots)
                                    for (int s = table.first_slot; s < table.first_slot + table.slots; ++s)
                                      VQKV_CHECK(all[t + static_cast<size_t>(s)] < table.entries);
                                },
                                [&](const LevelsTerm& levels) {
                                  if (levels.levels.empty()) return;
                                  for (const uint16_t c : codes.fields[static_cast<size_t>(levels.field)])
                                    VQKV_CHECK(c < levels.levels.size());
                                },
                                [](const DenseTerm&) {},
                                [&](const SignTerm& signs) {
                                  if (signs.outlier_field < 0) return;
                                  for (const uint16_t c : codes.fields[static_cast<size_t>(signs.outlier_field)])
                                    VQKV_CHECK(c < signs.width);
                                }};
  for (const PlanTerm& term : plan.terms) std::visit(check, term);
}

// One of them would make every row that attends to its token NaN: it is named where it arises.
void check_values(const CodeLayout& layout, const CodeBlock& codes, int64_t first) {
  for (size_t s = 0; s < codes.sides.size(); ++s) {
    const std::vector<float>& side = codes.sides[s];
    const int64_t bad = first_not_finite(side.data(), static_cast<int64_t>(side.size()));
    if (bad < 0) continue;
    const SideSpec& spec = layout.sides[s];
    fail_data(fmt::format("the {} of token {} is {}; side values must be finite", spec.name,
                          first + bad / spec.slots * (spec.per_token ? 1 : layout.block_tokens),
                          side[static_cast<size_t>(bad)]));
  }
  for (const OverlayEntry& e : codes.overlay)
    if (!std::isfinite(e.value))
      fail_data(fmt::format("the exact exception of token {}, channel {} is {}; it must be finite", first + e.token,
                            e.channel, e.value));
}

}  // namespace

int64_t fit_tokens(const CachePolicy& policy, int64_t held) {
  if (policy.prompt > 0) return std::min(held, policy.prompt);
  const auto first = [&](const FlushRule& rule) {
    return policy.sinks + std::max<int64_t>(1, rule.window) + rule.flush - 1;
  };
  return std::min(held, std::max(policy.waits, std::min(first(policy.k), first(policy.v))));
}

std::string prompt_conflict(const CachePolicy& policy, const std::string& method, const Codec& codec) {
  const int64_t least = codec.fit_needs().tokens;
  if (policy.codes_images && codec.fit_needs().queries)
    return fmt::format(
        "cache.coded: image: codec '{}' fits its parameters to the queries of a prompt, which are those of text",
        method);
  if (policy.codes_images || policy.prompt == 0 || policy.prompt >= least) return "";
  return fmt::format("cache.prompt: codec '{}' fits its parameters to {} tokens of a prompt at least, not to {}",
                     method, least, policy.prompt);
}

std::unique_ptr<SequenceState> fit_unit(const Codec& codec, const UnitShape& unit, int group, const HeldRows& rows,
                                        int64_t tokens, int64_t from) {
  const FitNeeds needs = codec.fit_needs();
  VQKV_CHECK(tokens - from >= needs.tokens && (from == 0 || !needs.queries));
  Matrix<float> q(needs.queries ? tokens * group : 0, unit.channels());
  for (int h = 0; h < unit.heads && q.rows > 0; ++h)
    rows.queries(unit.first_head + h, q.view().slice_cols(h * unit.head_dim, unit.head_dim));
  auto state = codec.fit(gather(unit, rows, Role::kKey, from, tokens - from),
                         gather(unit, rows, Role::kValue, from, tokens - from), q);
  if (state && needs.tokens < 1)
    fail_internal("a codec fits parameters to a prompt and does not say to how many tokens (Codec::fit_needs)");
  return state;
}

CodeBlock encode_unit(const Codec& codec, const DecodePlan& plan, const UnitShape& unit, const HeldRows& rows,
                      int64_t from, int64_t to, const SequenceState* state) {
  const int64_t block = plan.layout.block_tokens;
  VQKV_CHECK(to >= from && (to - from) % block == 0);
  std::vector<int32_t> positions(static_cast<size_t>(to - from));
  rows.positions(from, positions);
  Matrix<float> lower(codec.sees_lower() ? to - from : 0, unit.channels());
  if (codec.sees_lower() && unit.layer > 0) rows.lower(from, lower);
  CodeBlock codes;
  codec.encode_at(gather(unit, rows, unit.role, from, to - from), {positions, lower}, codes, state);
  VQKV_CHECK(codes.blocks == (to - from) / block);
  check_codes(plan, codes);
  check_values(plan.layout, codes, from);
  return codes;
}

CodeBlock codes_of(const CodeBlock& codes, const CodeLayout& layout, int64_t from, int64_t to) {
  const int64_t block = layout.block_tokens;
  VQKV_CHECK(from % block == 0 && to % block == 0 && from <= to && to <= codes.blocks * block);
  CodeBlock out;
  out.resize(layout, (to - from) / block);
  const auto take = [&](const auto& all, auto& some, const auto& specs) {
    for (size_t i = 0; i < specs.size(); ++i) {
      const int64_t each = specs[i].slots * (specs[i].per_token ? block : 1);
      std::copy_n(all[i].begin() + from / block * each, some[i].size(), some[i].begin());
    }
  };
  take(codes.fields, out.fields, layout.fields);
  take(codes.sides, out.sides, layout.sides);
  for (OverlayEntry e : codes.overlay) {
    e.token -= static_cast<int32_t>(from);
    if (e.token >= 0 && e.token < to - from) out.overlay.push_back(e);
  }
  return out;
}

void refuse_fitted_tier(const std::string& method) {
  fail_usage(
      fmt::format("codec.tiers: codec '{}' fits parameters to each prompt, and a tier has none of its own", method));
}

void AgedRows::lower(int64_t, MutMatrix) const { fail_internal("no tier sees the layer below"); }
void AgedRows::queries(int, MutMatrix) const { fail_internal("no tier is fitted to queries"); }

CodeBlock age_unit(const Codec& codec, bool level, const DecodePlan& plan, const UnitShape& unit, const AgedRows& rows,
                   int64_t from, int64_t to) {
  if (!level) return encode_unit(codec, plan, unit, rows, from, to, nullptr);
  CodeBlock codes = cut_codes(rows.codes(from, to), rows.layout(), plan.layout);
  check_codes(plan, codes);
  return codes;
}

}  // namespace vqkv
