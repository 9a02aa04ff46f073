#include "attention/device_tiles.h"

#include <fmt/format.h>

#include <algorithm>
#include <type_traits>

#include "attention/level_decode.h"
#include "attention/pq_decode.h"
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

// The plan's only term where that is a Term, else null.
template <class Term>
const Term* alone(const DecodePlan& plan) {
  if (plan.terms.size() != 1) return nullptr;
  const auto wanted = [](const auto& t) -> const Term* {
    if constexpr (std::is_same_v<decltype(t), const Term&>)
      return &t;
    else
      return nullptr;
  };
  return std::visit(
      Overloaded{[&](const LevelsTerm& t) { return wanted(t); }, [&](const TableTerm& t) { return wanted(t); },
                 [&](const DenseTerm& t) { return wanted(t); }, [&](const SignTerm& t) { return wanted(t); }},
      plan.terms[0]);
}

// Why what stands around a plan's terms keeps kernels from them, or "".
std::string around_reason(const DecodePlan& plan) {
  if (!is_identity(plan.map) || !plan.inner_bias.empty() || !plan.outer_bias.empty() || plan.token_scale_side >= 0 ||
      plan.layout.overlay || plan.adds_lower)
    return "what surrounds its codes (a map, biases, scales of tokens, exceptions) kernels don't undo";
  if (plan.rope != RopePlacement::kPost || plan.score.kind != ScoreMap::Kind::kNone || plan.query != QueryForm::kExact)
    return "its keys stand before RoPE, or its queries or scores are no exact ones";
  return "";
}

}  // namespace

size_t TileFamily::code_bytes(int head_dim) const {
  return kind == Kind::kPq ? static_cast<size_t>(kPqTile * books)
                           : static_cast<size_t>(kLevelTile * head_dim * bits / 8);
}
size_t TileFamily::side_halves(int head_dim) const { return kind == Kind::kPq ? 0 : 2 * static_cast<size_t>(head_dim); }

std::optional<TileFamily> tile_family(const DecodePlan& plan, Role role, int head_dim, std::string& why) {
  TileFamily out;
  if (const auto* levels = alone<LevelsTerm>(plan)) {
    why = level_tiles_reason(plan, role, head_dim);
    out.bits = plan.layout.fields[static_cast<size_t>(levels->field)].bits;
  } else if (const auto* books = alone<TableTerm>(plan)) {
    why = pq_tiles_reason(plan, head_dim);
    out = {TileFamily::Kind::kPq, 0, head_dim / books->width, books->width};
  } else {
    why = "its codes are neither levels alone nor codewords of one set of books";
  }
  return why.empty() ? std::optional(out) : std::nullopt;
}

std::string level_tiles_reason(const DecodePlan& plan, Role role, int head_dim) {
  const LevelsTerm* levels = alone<LevelsTerm>(plan);
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
  if (term.offset != 0) return "its levels don't start at 0";
  return around_reason(plan);
}

void pack_level_tile(const DecodePlan& plan, const CodeBlock& codes, Role role, int64_t first, int head, int head_dim,
                     std::span<uint32_t> words, std::span<uint16_t> sides) {
  const LevelsTerm* levels = alone<LevelsTerm>(plan);
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

std::string pq_tiles_reason(const DecodePlan& plan, int head_dim) {
  const TableTerm* books = alone<TableTerm>(plan);
  if (!books) return "its codes are no codewords of one set of books";
  const TableTerm& term = *books;
  if (term.entries != kPqEntries || !term.disjoint || term.op != TableTerm::Op::kIdentity)
    return "kernels take product codes, 256 codewords a book";
  bool in_order = head_dim % term.width == 0 && term.slots * term.width == plan.code_channels;
  for (size_t i = 0; in_order && i < term.channel.size(); ++i) in_order = term.channel[i] == static_cast<int32_t>(i);
  if (!in_order) return "its books don't take the channels of a head as they follow each other";
  if (!pq_decoder_fits(head_dim / term.width, term.width))
    return fmt::format("{} books of {} channels; kernels take {}", head_dim / term.width, term.width, kPqDecoderShapes);
  if (term.stored_as != DType::kF16) return "its books are not f16";
  return around_reason(plan);
}

void pack_pq_books(const DecodePlan& plan, Role role, int head, int head_dim, std::span<uint16_t> out) {
  const TableTerm* term = alone<TableTerm>(plan);
  VQKV_CHECK(term && std::ssize(out) == int64_t{head_dim} * kPqEntries);
  const int width = term->width, books = head_dim / width;
  for (int b = 0; b < books; ++b) {
    const auto book = static_cast<size_t>(term->book_of_slot[static_cast<size_t>(head * books + b)]);
    for (int e = 0; e < kPqEntries; ++e) {
      const float* word = term->codewords->data() + (book * kPqEntries + static_cast<size_t>(e)) * size_t(width);
      const int slot = role == Role::kKey ? b * kPqEntries + e : pq_value_slot(width, b, e);
      for (int i = 0; i < width; ++i) out[static_cast<size_t>(slot * width + i)] = to_f16(word[i]).bits;
    }
  }
}

void pack_pq_tile(const DecodePlan& plan, const CodeBlock& codes, int64_t first, int head, int head_dim,
                  std::span<uint8_t> out) {
  const TableTerm* term = alone<TableTerm>(plan);
  VQKV_CHECK(term);
  const int books = head_dim / term->width;
  const int64_t tokens = std::min<int64_t>(kPqTile, codes.blocks * plan.layout.block_tokens - first);
  VQKV_CHECK(first % kPqTile == 0 && tokens >= 1 && std::ssize(out) == int64_t{kPqTile} * books);
  const std::vector<uint16_t>& numbers = codes.fields[static_cast<size_t>(term->field)];
  const int slots = plan.layout.fields[static_cast<size_t>(term->field)].slots;
  std::ranges::fill(out, uint8_t{0});
  for (int t = 0; t < tokens; ++t)
    for (int b = 0; b < books; ++b)
      out[static_cast<size_t>(pq_code_place(books, t, b))] =
          static_cast<uint8_t>(numbers[static_cast<size_t>((first + t) * slots + term->first_slot + head * books + b)]);
}

}  // namespace vqkv
