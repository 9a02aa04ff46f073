#include "attention/level_pages.h"

#include <fmt/format.h>

#include <algorithm>

#include "attention/level_decode.h"
#include "core/error.h"

namespace vqkv {
namespace {

// The slot of a side that a value's group has, among those of its token or block.
int64_t side_at(const LevelsTerm& term, const DecodePlan& plan, int side, int64_t token, int channel) {
  const SideSpec& spec = plan.layout.sides[static_cast<size_t>(side)];
  if (spec.per_token) return token * spec.slots + channel / term.group_channels;
  const int64_t block = token / plan.layout.block_tokens, within = token % plan.layout.block_tokens;
  const int64_t groups = plan.code_channels / term.group_channels;
  return block * spec.slots + within / term.group_tokens * groups + channel / term.group_channels;
}

// The plan's only term where that is one of levels, else null.
const LevelsTerm* levels_alone(const DecodePlan& plan) {
  if (plan.terms.size() != 1) return nullptr;
  const auto none = [](const auto&) -> const LevelsTerm* { return nullptr; };
  return std::visit(Overloaded{[](const LevelsTerm& t) -> const LevelsTerm* { return &t; },
                               [&](const TableTerm& t) { return none(t); }, [&](const DenseTerm& t) { return none(t); },
                               [&](const SignTerm& t) { return none(t); }},
                    plan.terms[0]);
}

}  // namespace

std::string level_tiles_reason(const DecodePlan& plan, Role role, int head_dim) {
  const LevelsTerm* levels = levels_alone(plan);
  if (!levels) return "its codes are no levels alone";
  const LevelsTerm& term = *levels;
  const int bits = plan.layout.fields[static_cast<size_t>(term.field)].bits;
  if (bits != 2 && bits != 4) return fmt::format("levels of {} bits; kernels take 2 and 4", bits);
  if (head_dim != 64 && head_dim != 128) return fmt::format("head_dim {}; kernels take 64 and 128", head_dim);
  if (!term.levels.empty() || term.zero_of_codes || term.group_of || term.scale_side < 0 || term.zero_side < 0)
    return "its levels are no code times a scale and a zero";
  const bool keys = role == Role::kKey;
  const bool by_token = plan.layout.sides[static_cast<size_t>(term.scale_side)].per_token;
  if (keys ? by_token || term.group_tokens != kLevelTile || term.group_channels != 1
           : !by_token || term.group_channels != 32)
    return keys ? "keys need a scale for each channel of 32 tokens"
                : "values need a scale for each token and 32 channels";
  for (const int side : {term.scale_side, term.zero_side})
    if (plan.layout.sides[static_cast<size_t>(side)].type != DType::kF16) return "its scales are not f16";
  if (!is_identity(plan.map) || !plan.inner_bias.empty() || !plan.outer_bias.empty() || plan.token_scale_side >= 0 ||
      plan.layout.overlay || plan.adds_lower || term.offset != 0)
    return "what surrounds its levels (a map, biases, scales of tokens, exceptions) kernels don't undo";
  if (plan.rope != RopePlacement::kPost || plan.score.kind != ScoreMap::Kind::kNone || plan.query != QueryForm::kExact)
    return "its keys stand before RoPE, or its queries or scores are no exact ones";
  return "";
}

void pack_level_tile(const DecodePlan& plan, const CodeBlock& codes, Role role, int64_t first, int head, int head_dim,
                     std::span<uint32_t> words, std::span<uint16_t> sides) {
  const LevelsTerm* levels = levels_alone(plan);
  VQKV_CHECK(levels);
  const LevelsTerm& term = *levels;
  const FieldSpec& field = plan.layout.fields[static_cast<size_t>(term.field)];
  const std::vector<uint16_t>& numbers = codes.fields[static_cast<size_t>(term.field)];
  const int64_t tokens = std::min<int64_t>(kLevelTile, codes.blocks * plan.layout.block_tokens - first);
  VQKV_CHECK(first % kLevelTile == 0 && tokens >= 1 && std::ssize(words) == int64_t{head_dim} * field.bits &&
             std::ssize(sides) == int64_t{2} * head_dim);
  std::ranges::fill(words, 0u);
  std::ranges::fill(sides, uint16_t{0});
  for (int t = 0; t < tokens; ++t)
    for (int c = 0; c < head_dim; ++c) {
      const int channel = head * head_dim + c;
      const LevelPlace at = role == Role::kKey ? level_key_place(field.bits, head_dim, t, c)
                                               : level_value_place(field.bits, head_dim, t, c);
      words[static_cast<size_t>(at.word)] |= uint32_t{numbers[static_cast<size_t>((first + t) * field.slots + channel)]}
                                             << at.shift;
      for (const bool zero : {false, true}) {
        const int side = zero ? term.zero_side : term.scale_side;
        const float number =
            codes.sides[static_cast<size_t>(side)][static_cast<size_t>(side_at(term, plan, side, first + t, channel))];
        const int place =
            role == Role::kKey ? level_key_side(head_dim, c, zero) : level_value_side(head_dim, t, c / 32, zero);
        sides[static_cast<size_t>(place)] = to_f16(number).bits;
      }
    }
}

}  // namespace vqkv
