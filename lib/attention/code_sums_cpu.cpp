#include "attention/code_sums_cpu.h"

#include <algorithm>
#include <bit>

#include "attention/kernels_cpu.h"
#include "attention/level_tiles_cpu.h"
#include "attention/tiled_cpu.h"

namespace vqkv {
namespace {

constexpr int64_t kSums = int64_t{1} << 17;      // floats a thread: 512 KiB, half of a second-level cache of today
constexpr int64_t kLevelSegment = 4 * kTile;     // few enough partial states for the second-level cache at 32k tokens
constexpr int64_t kMostRows = int64_t{1} << 30;  // levels keep no sums
constexpr int64_t kShortest = 1024, kLongest = 16384;  // tokens of a segment

int64_t longest_book(const TileDecoder& decoder) {
  int64_t entries = 0;
  for (const TileDecoder::CodeSlot& s : decoder.code_slots()) entries = std::max<int64_t>(entries, s.entries);
  return entries;
}

// bits[b * lanes + i] = the sum of sums[e * lanes + i] over codes e with bit b, minus that over those without: halves
// of the codes are folded together, the highest bit first. sums: (256, lanes), and destroyed.
void fold_bytes(float* sums, int64_t lanes, float* bits) {
  for (int b = 7; b >= 0; --b) {
    const int64_t half = (int64_t{1} << b) * lanes;
    float* to = bits + b * lanes;
    std::fill_n(to, lanes, 0.0f);
    for (int64_t e = 0; e < half; e += lanes)
      for (int64_t i = 0; i < lanes; ++i) {
        to[i] += sums[half + e + i] - sums[e + i];
        sums[e + i] += sums[half + e + i];
      }
  }
}

}  // namespace

std::optional<std::string> code_domain_reason(const DecodePlan& plan) {
  if (plan.terms.empty()) return "the plan has no terms";
  using Reason = std::optional<std::string>;
  const auto of_term = Overloaded{[](const TableTerm&) -> Reason { return {}; },
                                  [&](const LevelsTerm& t) { return packed_levels_reason(plan, t); },
                                  [](const DenseTerm&) -> Reason { return "the plan has exact channels"; },
                                  [](const SignTerm& t) -> Reason {
                                    if (t.outlier_field >= 0)
                                      return "blocks set channels apart: one table cannot serve all of them";
                                    if (t.scale_side >= 0) return "signs have a scale of their own beside the token's";
                                    return {};
                                  }};
  for (const PlanTerm& term : plan.terms)
    if (Reason reason = std::visit(of_term, term)) return reason;
  if (plan.layout.overlay) return "exact exceptions change single channels of decoded rows";
  if (plan.adds_lower) return "rows of the layer below are added to decoded ones";
  if (plan.token_scale_side >= 0 && plan.layout.sides[static_cast<size_t>(plan.token_scale_side)].slots > 1)
    return "more than one token scale a unit";
  return std::nullopt;
}

ValueRule value_rule(const DecodePlan& plan, const TileDecoder& decoder, int64_t group, ValueSums when) {
  if (when != ValueSums::kNever && decoder.only_levels())
    return code_domain_reason(plan) ? ValueRule{} : ValueRule{kLevelSegment, 1};
  const auto slots = static_cast<int64_t>(decoder.code_slots().size());
  if (when == ValueSums::kNever || code_domain_reason(plan) || slots * longest_book(decoder) > kSums) return {};
  if (when == ValueSums::kAlways) return {4 * kTile, 1};
  // Nanoseconds of an EPYC of family 25 at its 3.7 GHz, by `bench_attention --regret` (columns keys+decode and
  // keys+sums at 512 to 32,768 tokens, G 1 to 8, d 64 and 128) and `bench_scan` (sums_by_code). Only their ratios
  // matter here.
  const double rows = static_cast<double>(group), lanes = static_cast<double>(lanes_for(group));
  double decode = 0.0172 * rows * static_cast<double>(decoder.code_width()), sum = 0, product = 0, books = 0;
  const double per_code = lanes == 1 ? 0.36 : 0.5 + 0.015 * lanes;
  for (const TileDecoder::Slot& s : decoder.slots()) {
    decode += 0.5 + 0.09 * s.width;
    sum += per_code;
    product += s.entries * (0.5 + 0.25 * rows * std::max(1.0, s.width / 16.0));
    books += 4.0 * s.entries * s.width;
  }
  for (const TileDecoder::Signs& s : decoder.signs()) {
    const double each = static_cast<double>(s.term.rows) * s.width;
    decode += 0.11 * s.term.rows + 0.0172 * each;
    sum += per_code * s.term.slots();
    product += s.term.slots() * 512 * 0.1 * lanes + 0.0172 * rows * each;
    books += 4.0 * each;
  }
  if (books > 0x1p20) product *= 2.5;  // they no longer fit the second-level cache
  if (decode <= sum) return {};
  const double even = product / (decode - sum);  // tokens at which both cost the same
  // Signs are so dear to decode that a sixteenth of what is saved would be more than the sums themselves.
  const double length = decoder.signs().empty() ? even : product / std::min(sum, decode - sum);
  const auto segment = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(16 * length)));
  return {std::clamp(segment, kShortest, kLongest), std::max<int64_t>(kTile, static_cast<int64_t>(even))};
}

int64_t summed_rows(const TileDecoder& decoder) {
  if (decoder.only_levels()) return kMostRows;
  const int64_t one = static_cast<int64_t>(decoder.code_slots().size()) * longest_book(decoder);
  return std::max<int64_t>(16, kSums / one / 16 * 16);
}

void CodeSums::reset(const TileDecoder& decoder, int64_t rows) {
  decoder_ = &decoder;
  rows_ = rows;
  lanes_ = lanes_for(rows);
  slots_ = static_cast<int64_t>(decoder.code_slots().size());
  entries_ = longest_book(decoder);
  const int64_t groups = (rows + lanes_ - 1) / lanes_;
  sums_.assign(static_cast<size_t>(groups * slots_ * entries_ * lanes_ + lanes_), 0.0f);
}

void CodeSums::add(int64_t row, const float* weights, int64_t count, const uint16_t* codes, int64_t stride) {
  float* sums = sums_.data() + row / lanes_ * slots_ * entries_ * lanes_ + row % lanes_;
  kernels::add_by_code(weights, lanes_, codes, stride, slots_, count, sums, entries_ * lanes_);
}

void CodeSums::scale(int64_t row, float f) {
  float* sums = sums_.data() + row / lanes_ * slots_ * entries_ * lanes_ + row % lanes_;
  for (int64_t i = 0; i < slots_ * entries_; ++i) sums[i * lanes_] *= f;
}

void CodeSums::unfold(float* y, int64_t y_stride) {
  AlignedVector<float> part;
  const auto tables = static_cast<int64_t>(decoder_->slots().size());
  for (int64_t row = 0; row < rows_; row += lanes_) {
    const int64_t n = lanes_;  // rows past the last have no mass
    for (int64_t i = 0; i < tables; ++i) {
      const TileDecoder::Slot& s = decoder_->slots()[static_cast<size_t>(i)];
      const float* sums = sums_.data() + (row / lanes_ * slots_ + i) * entries_ * lanes_;
      float* to = y + row * y_stride;
      if (s.contiguous) {
        kernels::multiply_transposed(sums, lanes_, s.words, s.stride, to + s.begin, y_stride, n, s.entries, s.width);
        continue;
      }
      const int64_t last = *std::max_element(s.element.begin(), s.element.end()) + 1;
      part.assign(static_cast<size_t>(n * last), 0.0f);
      kernels::multiply_transposed(sums, lanes_, s.words, s.stride, part.data(), last, n, s.entries, last);
      for (int64_t r = 0; r < n; ++r)
        for (int c = 0; c < s.width; ++c)
          to[r * y_stride + s.channel[static_cast<size_t>(c)]] +=
              part[static_cast<size_t>(r * last + s.element[static_cast<size_t>(c)])];
    }
    float* sums = sums_.data() + (row / lanes_ * slots_ + tables) * entries_ * lanes_;
    for (const TileDecoder::Signs& s : decoder_->signs()) {
      part.assign(static_cast<size_t>(8 * s.term.slots() * n), 0.0f);
      for (int64_t i = 0; i < s.term.slots(); ++i, sums += entries_ * lanes_)
        fold_bytes(sums, n, part.data() + 8 * i * n);
      for (float& v : part) v *= s.term.factor;
      kernels::multiply_transposed(part.data(), n, s.words, s.stride, y + row * y_stride + s.channel, y_stride, n,
                                   s.term.rows, s.width);
    }
  }
}

}  // namespace vqkv
