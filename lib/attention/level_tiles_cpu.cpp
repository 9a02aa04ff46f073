#include "attention/level_tiles_cpu.h"

#include <algorithm>

#include "attention/packed_levels_cpu.h"
#include "core/index.h"
#include "core/round_up.h"
#include "core/small_matrix.h"

namespace vqkv {
namespace {

using kernels::kLevelRun;
using kernels::kNibbleCodes;
using kernels::PackedLevels;

constexpr int64_t kSegment = 64;  // tokens of a page that are taken at once: pages hold multiples of them
constexpr int64_t kRowsAtOnce = 24;

struct Scratch {
  AlignedVector<float> scale, zero, scales, zeros, folded, part, scores, weights, sums;
  std::vector<uint32_t> words;
  const void* turned = nullptr;  // codes that `words` are of, and `scales` and `zeros` the groups
  int64_t held_bytes() const {
    int64_t n = capacity_bytes(words);
    for (const AlignedVector<float>* v : {&scale, &zero, &scales, &zeros, &folded, &part, &scores, &weights, &sums})
      n += capacity_bytes(*v);
    return n;
  }
};
Scratch& scratch() { return PerThread<Scratch>::here(); }

// The codes of one head, and the scales and zeros of their groups.
class Levels {
 public:
  explicit Levels(const TileDecoder& decoder)
      : term_(*decoder.only_levels()),
        pages_(decoder.pages()),
        first_(decoder.level_slot()),
        width_(decoder.code_width()) {
    const CodeLayout& layout = pages_.layout();
    packed_.bits = layout.fields[at(term_.field)].bits;
    packed_.stride = pages_.field_offset(term_.field, 1) - pages_.field_offset(term_.field, 0);
    packed_.even = term_.levels.empty();
    packed_.offset = term_.offset;
    const int codes = 1 << packed_.bits;
    for (int k = 0; k < 4 / packed_.bits; ++k)
      for (int i = 0; i < 16; ++i) {
        const int code = i >> (k * packed_.bits) & (codes - 1);
        packed_.level[k][i] = packed_.even                                   ? static_cast<float>(code) - term_.offset
                              : code < static_cast<int>(term_.levels.size()) ? term_.levels[at(code)]
                                                                             : 0.0f;
      }
    const int side = term_.scale_side >= 0 ? term_.scale_side : term_.zero_side;
    by_token_ = side >= 0 && layout.sides[at(side)].per_token;
    group_tokens_ = side >= 0 ? term_.group_tokens : pages_.tokens();
    if (side >= 0 && !by_token_) groups_ = layout.sides[at(side)].slots / (layout.block_tokens / term_.group_tokens);
  }

  bool by_token() const { return by_token_; }
  bool block_is_group() const { return group_tokens_ >= pages_.layout().block_tokens; }
  int64_t width() const { return width_; }
  int64_t page_tokens() const { return pages_.tokens(); }
  int64_t group_tokens() const { return group_tokens_; }  // of what of_channels gives
  // From channel c and token `within` (a multiple of 32) of a page on.
  PackedLevels codes(const std::byte* page, int64_t c, int64_t within) const {
    PackedLevels p = packed_;
    p.codes = reinterpret_cast<const uint8_t*>(page + pages_.field_offset(term_.field, static_cast<int>(first_ + c)) +
                                               within * p.bits / 8);
    return p;
  }
  // End of the channels that share groups with channel c, by token.
  int64_t group_end(int64_t c) const {
    return std::min(width_, ((first_ + c) / term_.group_channels + 1) * term_.group_channels - first_);
  }
  // By token: scales and zeros of a page, (groups, page_tokens()) from the first group of the head on, valid until the
  // next call.
  std::pair<const float*, const float*> of_tokens(const std::byte* page) const {
    const int64_t low = first_ / term_.group_channels, high = (first_ + width_ - 1) / term_.group_channels + 1;
    return read(page, low, (high - low) * pages_.tokens());
  }
  // Otherwise: the same as (channels of the head or runs of them, blocks()) of the group of tokens that holds `within`.
  std::pair<const float*, const float*> of_blocks(const std::byte* page, int64_t within) const {
    const int64_t group = within % pages_.layout().block_tokens / group_tokens_;
    const int64_t low = first_ / term_.group_channels, high = (first_ + width_ - 1) / term_.group_channels + 1;
    return read(page, group * groups_ + low, (high - low) * pages_.blocks());
  }
  // Values of one block of those, for each channel.
  void spread(const float* all, int64_t within, float* out) const {
    const int64_t blocks = pages_.blocks(), block = within / pages_.layout().block_tokens;
    const int64_t low = first_ / term_.group_channels;
    if (term_.group_channels > 1)
      for (int64_t c = 0; c < width_; ++c) out[c] = all[((first_ + c) / term_.group_channels - low) * blocks + block];
    else if (blocks == 2)  // spelled out, so that compilers take vectors
      for (int64_t c = 0; c < width_; ++c) out[c] = all[2 * c + block];
    else
      for (int64_t c = 0; c < width_; ++c) out[c] = all[blocks * c + block];
  }
  // Brings the codes and groups of a page nearer: others are read for long enough meanwhile.
  void prefetch(const std::byte* page) const {
    const auto lines = [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; at += 64) __builtin_prefetch(page + at);
    };
    const auto last = static_cast<int>(first_ + width_ - 1);
    lines(pages_.field_offset(term_.field, static_cast<int>(first_)),
          pages_.field_offset(term_.field, last) + packed_.stride);
    for (const int side : {term_.scale_side, term_.zero_side})
      if (side >= 0 && (by_token_ || block_is_group()))
        lines(pages_.side_offset(side, static_cast<int>(first_ / term_.group_channels)),
              pages_.side_offset(side, last / term_.group_channels + 1));
  }

 private:
  std::pair<const float*, const float*> read(const std::byte* page, int64_t slot, int64_t count) const {
    Scratch& s = scratch();
    s.turned = nullptr;
    float* scale = ensure_floats(s.scales, count);
    float* zero = ensure_floats(s.zeros, count);
    // The runs of slots lie beside each other.
    const auto side = [&](int of, float without, float* out) {
      if (of < 0)
        std::fill_n(out, count, without);
      else
        pages_.side(page, of, static_cast<int>(slot), 0, count, out);
    };
    side(term_.scale_side, 1.0f, scale);
    side(term_.zero_side, 0.0f, zero);
    if (term_.zero_of_codes && term_.scale_side >= 0)
      for (int64_t i = 0; i < count; ++i) zero[i] *= scale[i];
    return {scale, zero};
  }

  const LevelsTerm& term_;
  const PageLayout& pages_;
  PackedLevels packed_;
  int64_t first_, width_;
  bool by_token_ = false;
  int64_t group_tokens_ = 0;
  int64_t groups_ = 0;  // of channels, in a group of tokens
};

// out (rows, kLevelRun) = logits of the run at token `within` of a page; by token.
void score_by_token(const Levels& levels, const std::byte* page, int64_t within, const float* q, int64_t q_stride,
                    int64_t rows, float* out, int64_t out_stride) {
  Scratch& s = scratch();
  const float none[kRowsAtOnce] = {};
  const auto [scales, zeros] = levels.of_tokens(page);
  const float *scale = scales + within, *zero = zeros + within;
  float* part = ensure_floats(s.scores, kRowsAtOnce * kLevelRun);
  for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * out_stride, kLevelRun, 0.0f);
  for (int64_t c = 0, end = 0; c < levels.width(); c = end) {
    end = levels.group_end(c);
    const int64_t n = end - c, stride = round_up(n, kNibbleCodes);
    float* own = ensure_floats(s.folded, kRowsAtOnce * stride);
    float total[kRowsAtOnce];
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += own[r * stride + i] = q[r * q_stride + c + i];
      std::fill(own + r * stride + n, own + (r + 1) * stride, 0.0f);
      total[r] = sum;
    }
    kernels::score_levels(levels.codes(page, c, within), own, stride, rows, n, none, part, kLevelRun);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < kLevelRun; ++t)
        out[r * out_stride + t] += scale[t] * part[r * kLevelRun + t] + zero[t] * total[r];
    scale += levels.page_tokens();
    zero += levels.page_tokens();
  }
}

}  // namespace

void forget_levels() { scratch().turned = nullptr; }

int64_t level_scratch_bytes() { return PerThread<Scratch>::held_bytes(); }

std::optional<std::string> packed_levels_reason(const DecodePlan& plan, const LevelsTerm& t) {
  if (plan.terms.size() != 1) return "the plan has levels beside other terms";
  const int bits = plan.layout.fields[at(t.field)].bits;
  if (bits != 1 && bits != 2 && bits != 4) return "levels of " + std::to_string(bits) + " bits";
  if (t.group_of) return "groups of levels that are no runs of tokens or channels";
  const auto by_token = [&](int side) { return plan.layout.sides[at(side)].per_token; };
  const int side = t.scale_side >= 0 ? t.scale_side : t.zero_side;
  if (side < 0) return {};
  if (t.scale_side >= 0 && t.zero_side >= 0 && by_token(t.scale_side) != by_token(t.zero_side))
    return "scales and zeros of different groups";
  if (by_token(side) && t.group_channels < 8) return "groups of fewer than 8 channels";
  if (!by_token(side) && t.group_tokens % kLevelRun != 0)
    return "groups of tokens that are no multiples of " + std::to_string(kLevelRun);
  return {};
}

void score_level_chunk(const TiledCall& call, const Piece& piece, int64_t origin, int64_t low, int64_t high,
                       TileScratch& s) {
  const int head = piece.head;
  const HeadQueries& q = call.heads[head];
  const TileDecoder& decoder = call.decoder(head, Role::kKey);
  const HeadColumns& columns = call.columns(head);
  const int64_t span = kChunkTiles * kTile;
  const auto store = [&](int64_t row, int64_t from, int64_t n, const float* line) {
    std::copy_n(line, n, s.table_scores.data() + (row - piece.row_begin) * span + columns.sinks + from - origin);
  };
  ensure_floats(s.run_scale, span);
  if (q.token_scale) call.token_scale(head, Role::kKey, low, high - low, s.run_scale.data());
  if (!columns.whole) {
    const float* x = decoder.folded() ? q.y.data() : q.x.data();
    const int64_t stride = decoder.folded() ? q.y_stride : call.d;
    float* keys = ensure_floats(s.other_keys, decoder.width() * kTile);
    float* line = ensure_floats(s.run_scores, kTile);
    for (int64_t from = low, n = 0; from < high; from += n) {
      n = std::min(kTile, high - from);
      call.decode(head, Role::kKey, from, n, keys, kTile);
      for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
        kernels::multiply(x + row * stride, stride, keys, kTile, line, kTile, 1, decoder.width(), padded(n), false);
        if (decoder.folded()) q.unfold_scores(row, s.run_scale.data() + from - low, 0, n, line);
        store(row, from, n, line);
      }
    }
    return;
  }
  const Levels levels(decoder);
  Scratch& own = scratch();
  const CodedBody body = call.body(head, Role::kKey);
  const int64_t coded = columns.k_end.back() - columns.sinks;
  const int64_t base = low / kLevelRun * kLevelRun, length = round_up(high - base, kLevelRun);
  const int64_t width = levels.width(), stride = padded(width);
  float* lines = ensure_floats(s.run_scores, kRowsAtOnce * length);
  ensure_floats(own.scale, width);
  ensure_floats(own.zero, width);
  for (int64_t row = piece.row_begin; row < piece.row_end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, piece.row_end - row);
    const float* x = q.y.data() + row * q.y_stride;
    float* folded = nullptr;
    float sums[kRowsAtOnce];
    int64_t known = -1;  // group of tokens that `folded` is of
    std::pair<const float*, const float*> groups;
    for (int64_t slot = base; slot < high; slot += kLevelRun) {
      const std::byte* page = body.page(slot / levels.page_tokens());
      const int64_t within = slot % levels.page_tokens();
      if (const int64_t next = slot / levels.page_tokens() + 1; within == 0 && next * levels.page_tokens() < coded)
        levels.prefetch(body.page(next));
      float* out = lines + slot - base;
      if (levels.by_token()) {
        score_by_token(levels, page, within, x, q.y_stride, rows, out, length);
        continue;
      }
      if (const int64_t group = slot / levels.group_tokens(); group != known) {
        // One reading serves all blocks of a page where a block is one group.
        if (known < 0 || !levels.block_is_group() || within == 0) groups = levels.of_blocks(page, within);
        known = group;
        levels.spread(groups.first, within, own.scale.data());
        levels.spread(groups.second, within, own.zero.data());
        folded = ensure_floats(own.folded, kRowsAtOnce * stride);
        std::fill_n(sums, rows, 0.0f);
        kernels::fold_line(x, q.y_stride, rows, own.scale.data(), own.zero.data(), width, folded, stride, sums);
        for (int64_t r = 0; r < rows; ++r) std::fill(folded + r * stride + width, folded + (r + 1) * stride, 0.0f);
      }
      kernels::score_levels(levels.codes(page, 0, within), folded, stride, rows, width, sums, out, length);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* line = lines + r * length + low - base;
      q.unfold_scores(row + r, s.run_scale.data(), 0, high - low, line);
      store(row + r, low, high - low, line);
    }
  }
}

void sum_level_tile(const TiledCall& call, int head, int64_t begin, int64_t from, int64_t end, const float* p,
                    int64_t rows, float* y, int64_t y_stride) {
  const Levels levels(call.decoder(head, Role::kValue));
  const CodedBody body = call.body(head, Role::kValue);
  Scratch& s = scratch();
  const HeadColumns& columns = call.columns(head);
  const int64_t coded = columns.v_end.back() - columns.sinks;
  const int64_t first = begin - columns.sinks, width = levels.width(), stride = padded(width);
  constexpr int64_t kWide = kSegment + kernels::kLane;  // aligned, and readable past a segment
  float* weights = ensure_floats(s.weights, kRowsAtOnce * kWide);
  s.words.resize(at(16 * stride));
  VQKV_CHECK(rows <= kRowsAtOnce);
  if (levels.by_token()) {
    int64_t groups = 0;
    for (int64_t c = 0; c < width; c = levels.group_end(c)) ++groups;
    float* sums = ensure_floats(s.sums, groups * kRowsAtOnce);  // of p * zero
    std::fill_n(sums, groups * kRowsAtOnce, 0.0f);
    float* part = ensure_floats(s.part, kRowsAtOnce * stride);
    for (int64_t slot = first + from, n = 0; slot < first + end; slot += n) {
      const int64_t within = slot % levels.page_tokens(), low = within % kSegment;
      n = std::min(kSegment - low, first + end - slot);
      const std::byte* page = body.page(slot / levels.page_tokens());
      PackedLevels codes = levels.codes(page, 0, within - low);
      // Tiles and rows may share a segment.
      if (s.turned != codes.codes) {
        kernels::turn_words(codes, width, 2 * codes.bits, s.words.data(), stride);
        levels.of_tokens(page);
        s.turned = codes.codes;
      }
      if (n < kSegment) std::fill_n(weights, rows * kWide, 0.0f);
      if (const int64_t next = slot / levels.page_tokens() + 1; next * levels.page_tokens() < coded)
        levels.prefetch(body.page(next));
      const float *scale = s.scales.data(), *zero = s.zeros.data();
      float* sum = sums;
      for (int64_t c = 0, next = 0; c < width; c = next, sum += kRowsAtOnce) {
        next = levels.group_end(c);
        kernels::fold_line(p + slot - first, kTile, rows, scale + within, zero + within, n, weights + low, kWide, sum);
        scale += levels.page_tokens();
        zero += levels.page_tokens();
        // Where whole vectors of sums would reach into the next group or row: aside.
        if ((next - c) % kernels::kLane == 0 || (next == width && c + padded(next - c) <= y_stride)) {
          kernels::sum_levels(codes, s.words.data() + c, stride, weights, kWide, rows, low, low + n, next - c, y + c,
                              y_stride);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) std::copy_n(y + r * y_stride + c, next - c, part + r * stride);
        kernels::sum_levels(codes, s.words.data() + c, stride, weights, kWide, rows, low, low + n, next - c, part,
                            stride);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(part + r * stride, next - c, y + r * y_stride + c);
      }
    }
    for (int64_t c = 0, next = 0; c < width; c = next, sums += kRowsAtOnce) {
      next = levels.group_end(c);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = c; i < next; ++i) y[r * y_stride + i] += sums[r];
    }
    return;
  }
  float* scale = ensure_floats(s.scale, width);
  float* zero = ensure_floats(s.zero, width);
  float* part = ensure_floats(s.sums, kRowsAtOnce * stride);
  for (int64_t slot = first + from, n = 0; slot < first + end; slot += n) {
    const int64_t within = slot % levels.page_tokens(), low = within % kSegment;
    n = std::min({kSegment - low, levels.group_tokens() - slot % levels.group_tokens(), first + end - slot});
    const std::byte* page = body.page(slot / levels.page_tokens());
    const PackedLevels codes = levels.codes(page, 0, within - low);
    s.turned = nullptr;
    kernels::turn_words(codes, width, 2 * codes.bits, s.words.data(), stride);
    const auto [scales, zeros] = levels.of_blocks(page, within);
    levels.spread(scales, within, scale);
    levels.spread(zeros, within, zero);
    std::fill_n(weights, rows * kWide, 0.0f);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(p + r * kTile + slot - first, n, weights + r * kWide + low);
    std::fill_n(part, rows * stride, 0.0f);
    kernels::sum_levels(codes, s.words.data(), stride, weights, kWide, rows, low, low + n, width, part, stride);
    for (int64_t r = 0; r < rows; ++r) {
      float mass = 0;
      for (int64_t t = low; t < low + n; ++t) mass += weights[r * kWide + t];
      for (int64_t c = 0; c < width; ++c) y[r * y_stride + c] += scale[c] * part[r * stride + c] + zero[c] * mass;
    }
  }
}

}  // namespace vqkv
