#include "codec/plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "core/error.h"
#include "core/row_products.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

const FieldSpec& field_of(const DecodePlan& plan, int field) {
  VQKV_CHECK(field >= 0 && field < static_cast<int>(plan.layout.fields.size()));
  return plan.layout.fields[static_cast<size_t>(field)];
}
const SideSpec& side_of(const DecodePlan& plan, int side) {
  VQKV_CHECK(side >= 0 && side < static_cast<int>(plan.layout.sides.size()));
  return plan.layout.sides[static_cast<size_t>(side)];
}

void check_term(const DecodePlan& plan, const TableTerm& t) {
  const FieldSpec& f = field_of(plan, t.field);
  VQKV_CHECK(f.per_token);
  VQKV_CHECK(t.first_slot >= 0 && t.slots >= 1 && t.first_slot + t.slots <= f.slots);
  VQKV_CHECK(t.entries >= 1 && t.entries <= (1 << f.bits) && t.width >= 1 && t.books >= 1);
  VQKV_CHECK(t.codewords && t.codewords->size() == static_cast<size_t>(t.books) * static_cast<size_t>(t.entries) *
                                                       static_cast<size_t>(t.width));
  VQKV_CHECK(t.book_of_slot.size() == static_cast<size_t>(t.slots));
  VQKV_CHECK(t.channel.size() == static_cast<size_t>(t.slots) * static_cast<size_t>(t.width));
  for (const int32_t b : t.book_of_slot) VQKV_CHECK(b >= 0 && b < t.books);
  for (const int32_t c : t.channel) VQKV_CHECK(c >= 0 && c < plan.code_channels);
  VQKV_CHECK(t.op == TableTerm::Op::kIdentity || t.width % 2 == 0);
  if (t.disjoint) {
    std::vector<int32_t> sorted = t.channel;
    std::sort(sorted.begin(), sorted.end());
    VQKV_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
  }
}

// Slots of the side that holds a term's metadata groups.
void check_groups(const DecodePlan& plan, const LevelsTerm& t, int side) {
  if (side < 0) return;
  const SideSpec& s = side_of(plan, side);
  if (t.group_of) {
    VQKV_CHECK(!s.per_token && t.group_of->size() == static_cast<size_t>(plan.layout.block_tokens) *
                                                         static_cast<size_t>(plan.code_channels));
    for (const int32_t slot : *t.group_of) VQKV_CHECK(slot >= 0 && slot < s.slots);
    return;
  }
  const int channel_groups = plan.code_channels / t.group_channels;
  VQKV_CHECK(s.slots == (s.per_token ? channel_groups : channel_groups * (plan.layout.block_tokens / t.group_tokens)));
}

void check_term(const DecodePlan& plan, const LevelsTerm& t) {
  const FieldSpec& f = field_of(plan, t.field);
  VQKV_CHECK(f.per_token && f.slots == plan.code_channels);
  VQKV_CHECK(t.levels.empty() || t.levels.size() <= (size_t{1} << f.bits));
  VQKV_CHECK(t.group_channels >= 1 && plan.code_channels % t.group_channels == 0);
  VQKV_CHECK(t.group_tokens >= 1 && plan.layout.block_tokens % t.group_tokens == 0);
  check_groups(plan, t, t.scale_side);
  check_groups(plan, t, t.zero_side);
}

void check_term(const DecodePlan& plan, const DenseTerm& t) {
  const SideSpec& s = side_of(plan, t.side);
  VQKV_CHECK(s.per_token && static_cast<size_t>(s.slots) == t.channel.size());
  for (const int32_t c : t.channel) VQKV_CHECK(c >= 0 && c < plan.code_channels);
}

void check_term(const DecodePlan& plan, const SignTerm& t) {
  const FieldSpec& f = field_of(plan, t.field);
  VQKV_CHECK(t.rows >= 1 && t.width >= 1 && plan.code_channels % t.width == 0);
  const int runs = plan.code_channels / t.width;
  VQKV_CHECK(f.per_token && f.bits == 8 && f.slots == runs * t.slots());
  VQKV_CHECK(t.projection && t.projection->size() % static_cast<size_t>(t.width) == 0 &&
             t.projection->size() >= static_cast<size_t>(t.rows) * static_cast<size_t>(t.width));
  if (t.scale_side >= 0) {
    const SideSpec& s = side_of(plan, t.scale_side);
    VQKV_CHECK(s.per_token && s.slots == runs);
  }
  VQKV_CHECK((t.outlier_field < 0) == (t.reach == SignTerm::Reach::kAll));
  if (t.outlier_field < 0) return;
  const FieldSpec& outlier = field_of(plan, t.outlier_field);
  VQKV_CHECK(!outlier.per_token && outlier.slots % runs == 0);
}

// Do codewords lie on neighbouring channels as they are? Then whole vectors are added, where they are wide enough.
bool words_in_order(const TableTerm& t) {
  constexpr int kWide = 16;
  if (t.width < kWide) return false;
  for (size_t i = 0; i < t.channel.size(); ++i)
    if (i % static_cast<size_t>(t.width) != 0 && t.channel[i] != t.channel[i - 1] + 1) return false;
  return t.op == TableTerm::Op::kIdentity;
}
bool words_in_order(const LevelsTerm&) { return false; }
bool words_in_order(const DenseTerm&) { return false; }
bool words_in_order(const SignTerm&) { return false; }

// One token of a block: where its codes and side values lie.
struct TokenRef {
  int64_t token;
  int64_t block;
  int64_t in_block;
};

void add_term(const DecodePlan& plan, const TableTerm& t, const CodeBlock& block, const TokenRef& at, bool in_order,
              std::vector<double>& y) {
  const int field_slots = plan.layout.fields[static_cast<size_t>(t.field)].slots;
  const uint16_t* codes = block.fields[static_cast<size_t>(t.field)].data() + at.token * field_slots + t.first_slot;
  const int half = t.width / 2;
  constexpr int kTogether = 32;
  std::array<const float*, kTogether> words;  // in order, all on the same channels: the stages of a residual code
  int held = 0;
  for (int s = 0; s < t.slots; ++s) {
    const int code = codes[s];
    VQKV_CHECK(code < t.entries);
    const int book = t.book_of_slot[static_cast<size_t>(s)];
    const float* word = t.codewords->data() + (int64_t{book} * t.entries + code) * t.width;
    const int32_t* channel = t.channel.data() + int64_t{s} * t.width;
    if (in_order) {
      words[static_cast<size_t>(held++)] = word;
      if (held < kTogether && s + 1 < t.slots && channel[t.width] == channel[0]) continue;
      add_rows(words.data(), held, t.width, y.data() + channel[0]);
      held = 0;
      continue;
    }
    for (int i = 0; i < t.width; ++i) {
      double v = word[i];
      if (t.op == TableTerm::Op::kRotate90) v = i < half ? -word[i + half] : word[i - half];
      y[static_cast<size_t>(channel[i])] += v;
    }
  }
}

double group_value(const DecodePlan& plan, const LevelsTerm& t, int side, const CodeBlock& block, const TokenRef& at,
                   int channel) {
  const SideSpec& spec = plan.layout.sides[static_cast<size_t>(side)];
  const std::vector<float>& values = block.sides[static_cast<size_t>(side)];
  if (t.group_of) {
    const int32_t slot = (*t.group_of)[static_cast<size_t>(at.in_block * plan.code_channels + channel)];
    return values[static_cast<size_t>(at.block * spec.slots + slot)];
  }
  const int group = channel / t.group_channels;
  if (spec.per_token) return values[static_cast<size_t>(at.token * spec.slots + group)];
  const int channel_groups = plan.code_channels / t.group_channels;
  return values[static_cast<size_t>(at.block * spec.slots + at.in_block / t.group_tokens * channel_groups + group)];
}

void add_term(const DecodePlan& plan, const LevelsTerm& t, const CodeBlock& block, const TokenRef& at, bool,
              std::vector<double>& y) {
  const uint16_t* codes = block.fields[static_cast<size_t>(t.field)].data() + at.token * plan.code_channels;
  for (int j = 0; j < plan.code_channels; ++j) {
    VQKV_CHECK(t.levels.empty() || codes[j] < t.levels.size());
    const double level =
        t.levels.empty() ? double{static_cast<float>(codes[j])} - t.offset : double{t.levels[codes[j]]};
    const double scale = t.scale_side < 0 ? 1.0 : group_value(plan, t, t.scale_side, block, at, j);
    const double zero = t.zero_side < 0 ? 0.0 : group_value(plan, t, t.zero_side, block, at, j);
    y[static_cast<size_t>(j)] += t.zero_of_codes ? scale * (level + zero) : scale * level + zero;
  }
}

void add_term(const DecodePlan&, const DenseTerm& t, const CodeBlock& block, const TokenRef& at, bool,
              std::vector<double>& y) {
  const size_t slots = t.channel.size();
  const float* values = block.sides[static_cast<size_t>(t.side)].data() + static_cast<size_t>(at.token) * slots;
  for (size_t i = 0; i < slots; ++i) y[static_cast<size_t>(t.channel[i])] += values[i];
}

void add_term(const DecodePlan& plan, const SignTerm& t, const CodeBlock& block, const TokenRef& at, bool,
              std::vector<double>& y) {
  const int runs = plan.code_channels / t.width;
  const uint16_t* bytes = block.fields[static_cast<size_t>(t.field)].data() + at.token * runs * t.slots();
  std::vector<double> sign(static_cast<size_t>(t.rows)), sum(static_cast<size_t>(t.width));
  for (int r = 0; r < runs; ++r, bytes += t.slots()) {
    for (int i = 0; i < t.rows; ++i) sign[static_cast<size_t>(i)] = bytes[i / 8] >> i % 8 & 1 ? 1.0 : -1.0;
    std::fill(sum.begin(), sum.end(), 0.0);
    add_row_product(sign.data(), t.rows, t.projection->data(), t.width, sum.data());
    std::vector<char> added(sum.size(), t.reach != SignTerm::Reach::kOutliers);
    if (t.outlier_field >= 0) {
      const int slots = plan.layout.fields[static_cast<size_t>(t.outlier_field)].slots, each = slots / runs;
      const uint16_t* outlier = block.fields[static_cast<size_t>(t.outlier_field)].data() + at.block * slots + r * each;
      for (int i = 0; i < each; ++i) {
        VQKV_CHECK(outlier[i] < t.width);
        added[outlier[i]] = t.reach == SignTerm::Reach::kOutliers;
      }
    }
    double scale = t.factor;
    if (t.scale_side >= 0)
      scale *= block.sides[static_cast<size_t>(t.scale_side)][static_cast<size_t>(at.token * runs + r)];
    for (size_t i = 0; i < sum.size(); ++i)
      if (added[i]) y[static_cast<size_t>(r * t.width) + i] += scale * sum[i];
  }
}

// in_order: for each term, words_in_order.
void decode_token(const DecodePlan& plan, const std::vector<char>& in_order, const CodeBlock& block, const TokenRef& at,
                  std::vector<double>& y, std::vector<double>& z, float* x) {
  std::fill(y.begin(), y.end(), 0.0);
  for (size_t i = 0; i < plan.terms.size(); ++i)
    std::visit([&](const auto& t) { add_term(plan, t, block, at, in_order[i] != 0, y); }, plan.terms[i]);
  for (int j = 0; j < plan.channels; ++j)
    z[static_cast<size_t>(j)] = plan.inner_bias.empty() ? 0.0 : double{plan.inner_bias[static_cast<size_t>(j)]};
  add_product(plan.map, y.data(), plan.channels, z.data());
  const int scale_slots =
      plan.token_scale_side < 0 ? 1 : plan.layout.sides[static_cast<size_t>(plan.token_scale_side)].slots;
  const int scale_width = plan.channels / scale_slots;
  for (int j = 0; j < plan.channels; ++j) {
    const auto c = static_cast<size_t>(j);
    double v = z[c];
    if (plan.token_scale_side >= 0)
      v *= block.sides[static_cast<size_t>(plan.token_scale_side)]
                      [static_cast<size_t>(at.token * scale_slots + j / scale_width)];
    if (!plan.outer_bias.empty()) v += plan.outer_bias[c];
    x[j] = static_cast<float>(v);
  }
}

}  // namespace

bool DecodePlan::table_only() const {
  const auto is_table = Overloaded{[](const TableTerm&) { return true; }, [](const LevelsTerm&) { return false; },
                                   [](const DenseTerm&) { return false; }, [](const SignTerm&) { return false; }};
  return std::all_of(terms.begin(), terms.end(), [&](const PlanTerm& t) { return std::visit(is_table, t); });
}

int64_t DecodePlan::constant_bytes(CountedBooks& counted) const {
  int64_t bytes = 0;
  const auto number = static_cast<int64_t>(dtype_size(constants_as));
  const auto add =
      Overloaded{[&](const TableTerm& t) {
                   if (counted.insert(t.codewords).second)
                     bytes += static_cast<int64_t>(t.codewords->size()) * static_cast<int64_t>(dtype_size(t.stored_as));
                 },
                 [&](const LevelsTerm& t) { bytes += static_cast<int64_t>(t.levels.size()) * number; },
                 [](const DenseTerm&) {},  // its values are side data
                 [&](const SignTerm& t) {
                   if (counted.insert(t.projection).second)
                     bytes += static_cast<int64_t>(t.projection->size() * dtype_size(t.stored_as));
                 }};
  for (const PlanTerm& term : terms) std::visit(add, term);
  return bytes + stored_bytes(map, number) + static_cast<int64_t>(inner_bias.size() + outer_bias.size()) * number;
}

void check_plan(const DecodePlan& plan) {
  VQKV_CHECK(plan.channels >= 1 && plan.code_channels >= 1 && plan.layout.block_tokens >= 1);
  const auto channels = static_cast<size_t>(plan.channels);
  // A level may read no slot of a field.
  for (const FieldSpec& f : plan.layout.fields) VQKV_CHECK(f.bits >= 1 && f.bits <= 16 && f.slots >= 0);
  for (const SideSpec& s : plan.layout.sides) VQKV_CHECK(s.slots >= 1);
  for (const PlanTerm& term : plan.terms) std::visit([&](const auto& t) { check_term(plan, t); }, term);
  check_map(plan.map, plan.code_channels, plan.channels);
  if (plan.query != QueryForm::kExact) {
    const auto* hadamard = std::get_if<HadamardMap>(&plan.map);
    VQKV_CHECK(hadamard || is_identity(plan.map));
    if (hadamard)
      for (const std::vector<float>* signs : {&hadamard->before, &hadamard->after})
        for (const float s : *signs) VQKV_CHECK(std::abs(s) == 1.0f);
    VQKV_CHECK(plan.rope == RopePlacement::kPost && plan.code_channels == plan.channels && !plan.layout.overlay &&
               !plan.adds_lower && plan.token_scale_side < 0 && plan.inner_bias.empty() && plan.outer_bias.empty());
  }
  VQKV_CHECK(plan.inner_bias.empty() || plan.inner_bias.size() == channels);
  VQKV_CHECK(plan.outer_bias.empty() || plan.outer_bias.size() == channels);
  if (plan.token_scale_side >= 0) {
    const SideSpec& s = side_of(plan, plan.token_scale_side);
    VQKV_CHECK(s.per_token && plan.channels % s.slots == 0);
  }
}

void decode_plan(const DecodePlan& plan, const CodeBlock& block, MutMatrix x, ConstMatrix lower) {
  check_plan(plan);
  const int64_t block_tokens = plan.layout.block_tokens;
  VQKV_CHECK(x.rows == block.blocks * block_tokens && x.cols == plan.channels);
  VQKV_CHECK(block.fields.size() == plan.layout.fields.size() && block.sides.size() == plan.layout.sides.size());
  for (size_t f = 0; f < block.fields.size(); ++f) {
    const FieldSpec& spec = plan.layout.fields[f];
    VQKV_CHECK(block.fields[f].size() == static_cast<size_t>((spec.per_token ? x.rows : block.blocks) * spec.slots));
  }
  for (size_t s = 0; s < block.sides.size(); ++s) {
    const SideSpec& spec = plan.layout.sides[s];
    VQKV_CHECK(block.sides[s].size() == static_cast<size_t>((spec.per_token ? x.rows : block.blocks) * spec.slots));
  }
  std::vector<char> in_order;
  for (const PlanTerm& term : plan.terms)
    in_order.push_back(std::visit([](const auto& t) { return words_in_order(t); }, term));
  constexpr int64_t kChunk = 256;  // tokens are independent, so the chunking changes no bit
  parallel_for((x.rows + kChunk - 1) / kChunk, [&](int64_t chunk) {
    std::vector<double> y(static_cast<size_t>(plan.code_channels)), z(static_cast<size_t>(plan.channels));
    for (int64_t t = chunk * kChunk; t < std::min(x.rows, (chunk + 1) * kChunk); ++t)
      decode_token(plan, in_order, block, {t, t / block_tokens, t % block_tokens}, y, z, x.row(t));
  });
  for (const OverlayEntry& e : block.overlay) {
    VQKV_CHECK(e.token >= 0 && e.token < x.rows && e.channel >= 0 && e.channel < plan.channels);
    x(e.token, e.channel) = e.add ? x(e.token, e.channel) + e.value : e.value;
  }
  if (!plan.adds_lower || lower.rows == 0) return;
  VQKV_CHECK(lower.rows == x.rows && lower.cols == x.cols);
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t c = 0; c < x.cols; ++c) x(t, c) += lower(t, c);
}

}  // namespace vqkv
