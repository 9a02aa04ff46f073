#include "cache/tile_decoder.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cache/decode_cpu.h"
#include "core/error.h"
#include "core/index.h"
#include "core/per_thread.h"
#include "core/small_matrix.h"

namespace vqkv {
namespace {

constexpr int64_t kTileTokens = 128;

using kernels::padded;

// The signs of every byte.
constexpr int kByteRows = 8;
const std::array<std::array<float, kByteRows>, 256>& signs_of_bytes() {
  static const auto all = [] {
    std::array<std::array<float, kByteRows>, 256> out{};
    for (int byte = 0; byte < 256; ++byte)
      for (int b = 0; b < kByteRows; ++b) out[at(byte)][at(b)] = byte >> b & 1 ? 1.0f : -1.0f;
    return out;
  }();
  return all;
}

struct Buffers {
  AlignedVector<float> rows, columns, mapped, signs, sums;
  std::vector<uint16_t> codes;
  int64_t held_bytes() const {
    return capacity_bytes(codes) + capacity_bytes(rows) + capacity_bytes(columns) + capacity_bytes(mapped) +
           capacity_bytes(signs) + capacity_bytes(sums);
  }
};
Buffers& buffers() { return PerThread<Buffers>::here(); }
float* ensure(AlignedVector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.assign(at(n), 0.0f);
  return v.data();
}

}  // namespace

int64_t tile_decoder_scratch_bytes() { return PerThread<Buffers>::held_bytes(); }

TileDecoder::TileDecoder(const DecodePlan& plan, std::shared_ptr<const PageLayout> pages, Role role, int head,
                         int head_dim, std::vector<TurnedBooks>& turned)
    : pages_(std::move(pages)), head_dim_(head_dim), low_(int64_t{head} * head_dim) {
  // The head's own code channels: a map that mixes heads leads to all of them.
  map_ = HeadMap(plan.map, plan.code_channels, static_cast<int>(low_), head_dim);
  const int64_t code_low = map_.first_row();
  code_width_ = map_.rows();
  overlay_ = plan.layout.overlay;
  const auto slice = [&](const std::vector<float>& all) {
    return all.empty() ? std::vector<float>() : std::vector<float>(all.begin() + low_, all.begin() + low_ + head_dim);
  };
  inner_ = slice(plan.inner_bias);
  outer_ = slice(plan.outer_bias);
  if (plan.token_scale_side >= 0) {
    scale_side_ = plan.token_scale_side;
    const int groups = plan.layout.sides[at(scale_side_)].slots;
    VQKV_CHECK(plan.channels % groups == 0);
    scale_width_ = plan.channels / groups;
    scale_slot_ = static_cast<int>(low_ / scale_width_);
    scale_slots_ = static_cast<int>((low_ + head_dim - 1) / scale_width_) - scale_slot_ + 1;
  }
  folded_ = map_.moves() && !overlay_ && !plan.adds_lower && scale_slots_ <= 1 &&
            (role == Role::kValue || plan.rope == RopePlacement::kPost);
  // Rounded queries are other than those that exact keys meet: they are a product of their own, map or not.
  if (role == Role::kKey && plan.query != QueryForm::kExact) folded_ = true;

  if (role == Role::kKey && plan.rope == RopePlacement::kPre) pairs_ = PairBooks::of(plan, head, head_dim);
  bool mixed = false;
  {
    bool tables = false, others = false;
    const auto look = Overloaded{[&](const TableTerm&) { tables = true; }, [&](const LevelsTerm&) { others = true; },
                                 [&](const DenseTerm&) { others = true; }, [&](const SignTerm&) { tables = true; }};
    for (const PlanTerm& term : plan.terms) std::visit(look, term);
    mixed = tables && others;
  }
  std::vector<bool> written(at(code_width_), false);
  const auto first_writer = [&](const std::vector<int32_t>& channels) {
    bool fresh = !mixed;
    for (const int32_t c : channels) fresh = fresh && !written[at(c)];
    for (const int32_t c : channels) {
      // A slot that covers a channel twice has to add.
      if (written[at(c)] && fresh && std::count(channels.begin(), channels.end(), c) > 1) fresh = false;
      written[at(c)] = true;
    }
    return fresh;
  };
  const auto add = Overloaded{
      [&](const TableTerm& t) {
        const bool turns = t.op == TableTerm::Op::kRotate90 && !pairs_;  // whose books turn nothing
        books_.push_back(turns ? turned_books(t, turned) : t.codewords);
        for (int s = 0; s < t.slots; ++s) {
          Slot slot;
          slot.field = t.field;
          slot.slot = t.first_slot + s;
          slot.entries = t.entries;
          slot.stride = t.width;
          std::vector<int32_t> element, channel;
          for (int i = 0; i < t.width; ++i) {
            const int64_t c = t.channel[at(int64_t{s} * t.width + i)] - code_low;
            if (c < 0 || c >= code_width_) continue;
            element.push_back(i);
            channel.push_back(static_cast<int32_t>(c));
          }
          if (channel.empty()) continue;
          slot.width = static_cast<int>(channel.size());
          for (size_t i = 1; i < channel.size(); ++i)
            slot.contiguous = slot.contiguous && channel[i] == channel[i - 1] + 1 && element[i] == element[i - 1] + 1;
          slot.begin = channel[0];
          slot.words = books_.back()->data() + int64_t{t.book_of_slot[at(s)]} * t.entries * t.width;
          if (slot.contiguous) slot.words += element[0];
          slot.store = first_writer(channel);
          if (!slot.contiguous) {
            slot.element = std::move(element);
            slot.channel = std::move(channel);
          }
          slots_.push_back(std::move(slot));
        }
      },
      [&](const LevelsTerm& l) {
        for (int64_t c = 0; c < code_width_; ++c) {
          Levels levels;
          levels.field = l.field;
          levels.channel = static_cast<int>(c);
          levels.slot = static_cast<int>(code_low + c);
          levels.term = l;
          levels.store = first_writer({static_cast<int32_t>(c)});
          levels_.push_back(std::move(levels));
        }
      },
      [&](const DenseTerm& dense) {
        for (size_t i = 0; i < dense.channel.size(); ++i) {
          const int64_t c = dense.channel[i] - code_low;
          if (c < 0 || c >= code_width_) continue;
          dense_.push_back(
              {dense.side, static_cast<int>(i), static_cast<int>(c), first_writer({static_cast<int32_t>(c)})});
        }
      },
      // They add to what tables wrote, or to zeros.
      [&](const SignTerm& t) {
        const int runs = plan.code_channels / t.width;
        for (int run = 0; run < runs; ++run) {
          const int64_t low = std::max(code_low, int64_t{run} * t.width);
          const int64_t high = std::min(code_low + code_width_, int64_t{run + 1} * t.width);
          if (low >= high) continue;
          Signs signs;
          signs.term = t;
          signs.run = run;
          if (t.outlier_field >= 0) signs.outliers = plan.layout.fields[at(t.outlier_field)].slots / runs;
          signs.from = static_cast<int>(low - int64_t{run} * t.width);
          signs.channel = static_cast<int>(low - code_low);
          signs.width = static_cast<int>(high - low);
          signs.stride = padded(signs.width);
          books_.push_back(t.projection);
          if (signs.width % kernels::kLane == 0) {
            signs.stride = t.width;
            signs.words = t.projection->data() + signs.from;
          } else {
            auto copy = std::make_shared<AlignedVector<float>>(at(t.rows * signs.stride), 0.0f);
            for (int64_t i = 0; i < t.rows; ++i)
              std::copy_n(t.projection->data() + i * t.width + signs.from, signs.width,
                          copy->data() + i * signs.stride);
            signs.words = copy->data();
            books_.push_back(std::move(copy));
          }
          signs_.push_back(std::move(signs));
        }
      }};
  for (const PlanTerm& term : plan.terms) std::visit(add, term);
  for (const Slot& s : slots_) code_slots_.push_back({s.field, s.slot, s.entries});
  for (const Signs& s : signs_)
    for (int i = 0; i < s.term.slots(); ++i)
      code_slots_.push_back({s.term.field, s.run * s.term.slots() + i, 1 << kByteRows});
  only_levels_ = plan.terms.size() == 1 && !levels_.empty();
  const bool all = !mixed && std::all_of(written.begin(), written.end(), [](bool w) { return w; });
  const bool others = !levels_.empty() || !dense_.empty();
  zero_rows_ = !all && (!slots_.empty() || !signs_.empty() || !others);
  zero_columns_ = !all && others;
}

int64_t TileDecoder::bytes(std::set<const void*>& shared) const {
  const auto of = [](const auto& v) { return static_cast<int64_t>(v.capacity() * sizeof(v[0])); };
  int64_t n = of(slots_) + of(levels_) + of(dense_) + of(signs_) + of(code_slots_) + of(books_) + map_.memory_bytes() +
              of(inner_) + of(outer_);
  for (const Slot& s : slots_) n += of(s.element) + of(s.channel);
  for (const Levels& l : levels_) n += of(l.term.levels);
  for (const auto& b : books_)
    if (shared.insert(b.get()).second) n += of(*b);
  if (pairs_ && shared.insert(pairs_.get()).second) n += pairs_->held_bytes();
  return n;
}

void TileDecoder::decode_tables(const std::byte* page, int64_t first, int64_t count, float* rows,
                                int64_t stride) const {
  uint16_t codes[kTileTokens];
  if (pairs_) return decode_pairs(page, first, count, rows, stride);
  for (const Slot& s : slots_) {
    pages_->codes(page, s.field, s.slot, first, count, codes);
    if (s.contiguous) {
      kernels::lookup_rows(s.words, s.stride, codes, count, s.width, rows + s.begin, stride, !s.store);
    } else {
      const int32_t* element = s.element.data();
      const int32_t* channel = s.channel.data();
      for (int64_t t = 0; t < count; ++t) {
        const float* word = s.words + int64_t{codes[t]} * s.stride;
        float* row = rows + t * stride;
        if (s.store)
          for (int i = 0; i < s.width; ++i) row[channel[i]] = word[element[i]];
        else
          for (int i = 0; i < s.width; ++i) row[channel[i]] += word[element[i]];
      }
    }
  }
}

void TileDecoder::decode_pairs(const std::byte* page, int64_t first, int64_t count, float* rows, int64_t stride) const {
  Buffers& b = buffers();
  b.codes.resize(code_slots_.size() * at(kTileTokens));
  for (size_t i = 0; i < code_slots_.size(); ++i)
    pages_->codes(page, code_slots_[i].field, code_slots_[i].slot, first, count, b.codes.data() + i * at(kTileTokens));
  const int64_t floats = pairs_->row_floats(), half = head_dim_ / 2;
  float* sums = ensure(b.sums, kTileTokens * floats);
  pairs_->sum(b.codes.data(), kTileTokens, count, sums);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t p = 0; p < half; p += PairBooks::kPairs) {
      const float* from = sums + t * floats + 2 * p;
      const int64_t n = std::min<int64_t>(PairBooks::kPairs, half - p);
      std::copy_n(from, n, rows + t * stride + p);
      std::copy_n(from + PairBooks::kPairs, n, rows + t * stride + half + p);
    }
}

void TileDecoder::find_reach(const Signs& signs, const std::byte* page, int64_t block, float* reach) const {
  const bool outliers = signs.term.reach == SignTerm::Reach::kOutliers;
  std::fill_n(reach, signs.width, outliers ? 0.0f : 1.0f);
  for (int i = 0; i < signs.outliers; ++i) {
    uint16_t channel;
    pages_->codes(page, signs.term.outlier_field, signs.run * signs.outliers + i, block, 1, &channel);
    if (const int c = channel - signs.from; c >= 0 && c < signs.width) reach[c] = outliers ? 1.0f : 0.0f;
  }
}

void TileDecoder::add_signs(const Signs& signs, const std::byte* page, int64_t first, int64_t count, float* rows,
                            int64_t stride) const {
  // Depth by depth: a product is one chain in row order however it is cut (core/small_matrix.h).
  constexpr int kDepth = 64;
  const SignTerm& t = signs.term;
  Buffers& b = buffers();
  float* sign = ensure(b.signs, kTileTokens * kDepth);
  const int64_t wide = padded(signs.width);
  float* sum = ensure(b.sums, kTileTokens * wide + wide);
  float* reach = sum + kTileTokens * wide;
  uint16_t codes[kTileTokens];
  for (int row = 0; row < t.rows; row += kDepth) {
    const int depth = std::min(kDepth, t.rows - row);
    for (int i = 0; i < depth; i += kByteRows) {
      pages_->codes(page, t.field, signs.run * t.slots() + (row + i) / kByteRows, first, count, codes);
      for (int64_t k = 0; k < count; ++k)
        std::copy_n(signs_of_bytes()[codes[k]].data(), kByteRows, sign + k * kDepth + i);
    }
    kernels::multiply(sign, kDepth, signs.words + row * signs.stride, signs.stride, sum, wide, count, depth, wide,
                      row > 0);
  }
  float scale[kTileTokens];
  std::fill_n(scale, count, 1.0f);
  if (t.scale_side >= 0) pages_->side(page, t.scale_side, signs.run, first, count, scale);
  int64_t known = -1;  // block whose reach is there
  for (int64_t k = 0; k < count; ++k) {
    if (const int64_t block = (first + k) / pages_->layout().block_tokens; block != known)
      find_reach(signs, page, known = block, reach);
    const float* from = sum + k * wide;
    float* to = rows + k * stride + signs.channel;
    const float f = t.factor * scale[k];
    for (int c = 0; c < signs.width; ++c) to[c] += reach[c] * (f * from[c]);
  }
}

void TileDecoder::decode_columns(const std::byte* page, int64_t first, int64_t count, float* columns,
                                 int64_t stride) const {
  uint16_t codes[kTileTokens];
  float scale[kTileTokens], zero[kTileTokens], value[kTileTokens];
  const CodeLayout& layout = pages_->layout();
  // Metadata of a group, spread over tokens.
  const auto group_values = [&](const Levels& l, int side, float* out) {
    const SideSpec& spec = layout.sides[at(side)];
    if (l.term.group_of) {
      const auto channels = static_cast<int64_t>(l.term.group_of->size()) / layout.block_tokens;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t block = (first + t) / layout.block_tokens, within = (first + t) % layout.block_tokens;
        pages_->side(page, side, (*l.term.group_of)[at(within * channels + l.slot)], block, 1, out + t);
      }
      return;
    }
    const int group = l.slot / l.term.group_channels;
    if (spec.per_token) {
      pages_->side(page, side, group, first, count, out);
      return;
    }
    const int groups = spec.slots / (layout.block_tokens / l.term.group_tokens);
    for (int64_t t = 0; t < count;) {
      const int64_t block = (first + t) / layout.block_tokens, within = (first + t) % layout.block_tokens;
      const int64_t n = std::min(count - t, l.term.group_tokens - within % l.term.group_tokens);
      float v;
      pages_->side(page, side, static_cast<int>(within / l.term.group_tokens) * groups + group, block, 1, &v);
      std::fill_n(out + t, n, v);
      t += n;
    }
  };
  int known_group = -1;
  const LevelsTerm* scale_term = nullptr;
  for (const Levels& l : levels_) {
    pages_->codes(page, l.field, l.slot, first, count, codes);
    // Neighbouring channels of a group share their metadata.
    const int group = l.slot / l.term.group_channels;
    if (l.term.group_of || group != known_group || scale_term == nullptr) {
      if (l.term.scale_side >= 0) group_values(l, l.term.scale_side, scale);
      if (l.term.zero_side >= 0) group_values(l, l.term.zero_side, zero);
      if (l.term.zero_of_codes && l.term.scale_side >= 0)
        for (int64_t t = 0; t < count; ++t) zero[t] *= scale[t];
    }
    known_group = group;
    scale_term = &l.term;
    kernels::decode_levels(codes, count, l.term.levels.empty() ? nullptr : l.term.levels.data(), l.term.offset,
                           l.term.scale_side >= 0 ? scale : nullptr, l.term.zero_side >= 0 ? zero : nullptr,
                           columns + l.channel * stride, !l.store);
    if (&l != &levels_.back() && (&l)[1].field != l.field) scale_term = nullptr;
  }
  for (const Dense& d : dense_) {
    float* to = columns + d.channel * stride;
    if (d.store) {
      pages_->side(page, d.side, d.slot, first, count, to);
    } else {
      pages_->side(page, d.side, d.slot, first, count, value);
      for (int64_t t = 0; t < count; ++t) to[t] += value[t];
    }
  }
}

void TileDecoder::token_scale(const CodedBody& body, int64_t first, int64_t count, float* out) const {
  for (int64_t t = 0; t < count;) {
    const int64_t page = (first + t) / pages_->tokens(), within = (first + t) % pages_->tokens();
    const int64_t n = std::min(count - t, pages_->tokens() - within);
    pages_->side(body.page(page), scale_side_, scale_slot_, within, n, out + t);
    t += n;
  }
}

void TileDecoder::codes(const CodedBody& body, int64_t first, int64_t count, uint16_t* out, int64_t stride) const {
  for (int64_t t = 0; t < count;) {
    const int64_t page = (first + t) / pages_->tokens(), within = (first + t) % pages_->tokens();
    const int64_t n = std::min(count - t, pages_->tokens() - within);
    const std::byte* bytes = body.page(page);
    for (size_t i = 0; i < code_slots_.size(); ++i)
      pages_->codes(bytes, code_slots_[i].field, code_slots_[i].slot, within, n,
                    out + static_cast<int64_t>(i) * stride + t);
    t += n;
  }
}

void TileDecoder::apply_overlay(const CodedBody& body, int64_t first, int64_t count, bool transposed, float* out,
                                int64_t stride) const {
  for (int64_t t = 0; t < count; ++t)
    for (const StoredOverlay& o : body.exceptions(*pages_, first + t)) {
      const int64_t channel = (o.channel & 0x7fff) - low_;
      if (channel < 0 || channel >= head_dim_) continue;
      float& to = transposed ? out[channel * stride + t] : out[t * stride + channel];
      to = (o.channel & 0x8000) ? to + to_float(o.value) : to_float(o.value);
    }
}

void TileDecoder::decode(const CodedBody& body, int64_t first, int64_t count, bool transposed, float* out,
                         int64_t stride) const {
  VQKV_CHECK(count <= kTileTokens);
  Buffers& b = buffers();
  const bool tables = !slots_.empty() || !signs_.empty(), others = !levels_.empty() || !dense_.empty();
  const bool rebuild_map = map_.moves() && !map_.turns() && !folded_;
  // y goes where it is wanted: tables and signs write rows, levels and dense channels write columns of tokens.
  const bool want_rows = !transposed || rebuild_map;
  const int64_t y_stride = rebuild_map ? padded(code_width_) : stride;
  float* y = rebuild_map ? ensure(b.mapped, kTileTokens * y_stride) : out;
  float* rows = want_rows ? y : ensure(b.rows, kTileTokens * padded(code_width_));
  const int64_t row_stride = want_rows ? y_stride : padded(code_width_);
  float* columns = want_rows ? ensure(b.columns, code_width_ * kTileTokens) : y;
  const int64_t column_stride = want_rows ? kTileTokens : y_stride;
  if (zero_rows_)
    for (int64_t t = 0; t < count; ++t) std::fill_n(rows + t * row_stride, code_width_, 0.0f);
  if (zero_columns_)
    for (int64_t c = 0; c < code_width_; ++c) std::fill_n(columns + c * column_stride, count, 0.0f);
  for (int64_t t = 0; t < count;) {
    const int64_t page = (first + t) / pages_->tokens(), within = (first + t) % pages_->tokens();
    const int64_t n = std::min(count - t, pages_->tokens() - within);
    const std::byte* bytes = body.page(page);
    if (tables) decode_tables(bytes, within, n, rows + t * row_stride, row_stride);
    for (const Signs& s : signs_) add_signs(s, bytes, within, n, rows + t * row_stride, row_stride);
    if (others) decode_columns(bytes, within, n, columns + t, column_stride);
    t += n;
  }
  if (want_rows && others) kernels::transpose(columns, column_stride, code_width_, count, rows, row_stride, tables);
  if (!want_rows && tables) kernels::transpose(rows, row_stride, count, code_width_, columns, column_stride, others);
  if (folded_) return;
  if (rebuild_map) {
    const int64_t wide = padded(head_dim_);
    float* x = ensure(b.rows, kTileTokens * wide);
    map_.multiply(y, y_stride, x, wide, count, false);
    if (transposed) {
      kernels::transpose(x, wide, count, head_dim_, out, stride, false);
    } else {
      for (int64_t t = 0; t < count; ++t) std::copy_n(x + t * wide, head_dim_, out + t * stride);
    }
  }
  if (map_.turns()) map_.turn(out, stride, count, transposed);
  const std::vector<float>& diagonal = map_.diagonal();
  if (!diagonal.empty() || !inner_.empty() || !outer_.empty() || scale_side_ >= 0) {
    float scale[kTileTokens];
    const auto element = [&](int64_t t, int64_t c) -> float& {
      return transposed ? out[c * stride + t] : out[t * stride + c];
    };
    for (int64_t c = 0; c < head_dim_;) {
      // Channels of one scale group.
      const int64_t end = scale_side_ >= 0
                              ? std::min<int64_t>(head_dim_, ((low_ + c) / scale_width_ + 1) * scale_width_ - low_)
                              : head_dim_;
      if (scale_side_ >= 0) {
        for (int64_t t = 0; t < count;) {
          const int64_t page = (first + t) / pages_->tokens(), within = (first + t) % pages_->tokens();
          const int64_t n = std::min(count - t, pages_->tokens() - within);
          pages_->side(body.page(page), scale_side_, static_cast<int>((low_ + c) / scale_width_), within, n, scale + t);
          t += n;
        }
      }
      for (; c < end; ++c) {
        const float g = diagonal.empty() ? 1.0f : diagonal[at(c)], in = inner_.empty() ? 0.0f : inner_[at(c)],
                    add = outer_.empty() ? 0.0f : outer_[at(c)];
        for (int64_t t = 0; t < count; ++t) {
          float& v = element(t, c);
          v = add + (scale_side_ >= 0 ? scale[t] : 1.0f) * (in + v * g);
        }
      }
    }
  }
  if (overlay_) apply_overlay(body, first, count, transposed, out, stride);
}

void TileDecoder::keys(const CodedBody& body, int64_t first, int64_t count, float* out, int64_t stride) const {
  decode(body, first, count, true, out, stride);
}
void TileDecoder::values(const CodedBody& body, int64_t first, int64_t count, float* out, int64_t stride) const {
  decode(body, first, count, false, out, stride);
}

void TileDecoder::rows(const CodedBody& body, int64_t first, int64_t count, float* out, int64_t stride) const {
  if (!folded_) return values(body, first, count, out, stride);
  const int64_t wide = padded(code_width_);
  float* y = ensure(buffers().mapped, kTileTokens * wide);
  values(body, first, count, y, wide);
  map_.multiply(y, wide, out, stride, count, false);
  float scale[kTileTokens];
  std::fill_n(scale, count, 1.0f);
  if (has_token_scale()) token_scale(body, first, count, scale);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < head_dim_; ++c) {
      float& v = out[t * stride + c];
      v = (outer_.empty() ? 0.0f : outer_[at(c)]) + scale[t] * ((inner_.empty() ? 0.0f : inner_[at(c)]) + v);
    }
}

}  // namespace vqkv
