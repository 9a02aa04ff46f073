#include "codec/methods/affine.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

// Round half to even, as the published codes do, by adding and taking away 1.5 * 2^52: exact for |v| < 2^51 and, unlike
// nearbyint, something that compilers vectorise.
double round_half_even(double v) {
  constexpr double kShift = 0x1.8p52;
  return v + kShift - kShift;
}

// Clamped before rounding, so that huge ratios are safe.
template <AffineGrid::Mode mode>
void code_run(const AffineLine& g, int bits, const float* x, int64_t x_step, uint16_t* codes, int64_t code_step,
              int64_t n) {
  const double top = (1 << bits) - 1, most = (1 << (bits - 1)) - 1;
  const double scale = g.scale, zero = g.zero, shift = g.integer_zero;
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i * x_step];
    double code = 0;
    if constexpr (mode == AffineGrid::Mode::kAsymmetric) {
      code = round_half_even(std::clamp((v - zero) / scale, 0.0, top));
    } else if constexpr (mode == AffineGrid::Mode::kIntegerZero) {
      code = std::clamp(round_half_even(std::clamp(v / scale, -0x1p50, 0x1p50)) + shift, 0.0, top);
    } else {
      const double least = mode == AffineGrid::Mode::kSigned ? most + 1 : most;
      code = round_half_even(std::clamp(v / scale, -least, most)) + least;
    }
    codes[i * code_step] = static_cast<uint16_t>(static_cast<int>(code));
  }
}

}  // namespace

AffineLine AffineGrid::line(float low, float high) const {
  AffineLine g;
  // Ranges of finite floats may exceed a float: double until rounded to storage.
  if (centred()) {
    const double most = std::max(std::abs(double{low}), std::abs(double{high})) * clip;
    g.scale = round_scale(scale_type, static_cast<float>(most / ((1 << (bits - 1)) - 1)));
    return g;
  }
  // A (nearly) constant group has no scale of its own, and its whole zero point would overflow: measure from 0.
  const bool flat = mode == AffineGrid::Mode::kIntegerZero &&
                    double{high} - low < 1e-6 * std::max(std::abs(double{low}), std::abs(double{high}));
  if (range_holds_zero || flat) {
    low = std::min(low, 0.0f);
    high = std::max(high, 0.0f);
  }
  const double top = (1 << bits) - 1;
  double bottom = low * clip, end = high * clip;
  if (inset > 0) {
    const double margin = inset * (end - bottom);
    bottom += margin;
    end -= margin;
  }
  g.scale = round_scale(scale_type, static_cast<float>(std::min((end - bottom) / top, 3.0e38)));
  if (mode == AffineGrid::Mode::kAsymmetric) {
    g.zero = round_side(scale_type, static_cast<float>(bottom));
  } else {
    g.integer_zero = static_cast<float>(std::nearbyint(-bottom / g.scale));
    g.zero = round_side(scale_type, -g.scale * g.integer_zero);
  }
  return g;
}

AffineRun AffineGrid::run() const {
  switch (mode) {
    case Mode::kAsymmetric:
      return code_run<Mode::kAsymmetric>;
    case Mode::kIntegerZero:
      return code_run<Mode::kIntegerZero>;
    case Mode::kSymmetric:
      return code_run<Mode::kSymmetric>;
    case Mode::kSigned:
      return code_run<Mode::kSigned>;
  }
  fail_internal("a mode of a grid");
}

AffineCodec::AffineCodec(const AffineGrid& grid, const AffineGroups& groups, const UnitShape& unit)
    : grid_(grid), groups_(groups), channels_(unit.channels()), rope_(unit.rope) {
  layout_.fields = {{"code", grid.bits, channels_, true}};
  const bool along_tokens = groups.along_tokens;
  if (along_tokens) layout_.block_tokens = groups.group;
  const int slots = along_tokens ? channels_ : channels_ / groups.group;
  layout_.sides = {{"scale", grid.scale_type, slots, !along_tokens}};
  if (!grid.centred()) layout_.sides.push_back({"zero", grid.scale_type, slots, !along_tokens});
}

void AffineCodec::encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const {
  check_encode_input(*this, x);
  out.resize(layout_, x.rows / layout_.block_tokens);
  const int slots = layout_.sides[0].slots;
  const int tokens = layout_.block_tokens;                     // of a group
  const int width = groups_.along_tokens ? 1 : groups_.group;  // channels of a group
  const AffineRun run = grid_.run();
  const auto encode_block = [&](int64_t block) {
    for (int s = 0; s < slots; ++s) {
      const ConstMatrix part = x.slice_rows(block * tokens, tokens).slice_cols(int64_t{s} * width, width);
      float low = part(0, 0), high = part(0, 0);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < width; ++c) {
          low = std::min(low, part(t, c));
          high = std::max(high, part(t, c));
        }
      const AffineLine g = grid_.line(low, high);
      const auto at = static_cast<size_t>(block * slots + s);
      out.sides[0][at] = g.scale;
      if (out.sides.size() > 1) out.sides[1][at] = g.zero;
      uint16_t* codes = out.fields[0].data() + block * tokens * channels_ + int64_t{s} * width;
      if (groups_.along_tokens)
        run(g, grid_.bits, part.data, part.stride, codes, channels_, tokens);
      else
        run(g, grid_.bits, part.data, 1, codes, 1, width);
    }
  };
  parallel_chunks(out.blocks, 32, [&](int64_t first, int64_t end) {
    for (int64_t b = first; b < end; ++b) encode_block(b);
  });
}

LevelsTerm AffineCodec::term() const {
  LevelsTerm term;
  term.scale_side = 0;
  if (layout_.sides.size() > 1) term.zero_side = 1;
  const int half = 1 << (grid_.bits - 1);
  if (grid_.centred()) term.offset = static_cast<float>(grid_.mode == AffineGrid::Mode::kSigned ? half : half - 1);
  term.group_channels = groups_.along_tokens ? 1 : groups_.group;
  term.group_tokens = layout_.block_tokens;
  return term;
}

DecodePlan AffineCodec::plan(const PlanQuery&) const {
  DecodePlan plan = empty_plan();
  plan.terms = {term()};
  return plan;
}

std::string check_head_group(int group, const UnitShape& unit) {
  return unit.head_dim % group == 0
             ? ""
             : fmt::format("groups of {} channels don't divide a head of {}", group, unit.head_dim);
}

std::string check_channel_group(int group, const UnitShape& unit) {
  if (group >= 1 && unit.channels() % group == 0 && (unit.head_dim % group == 0 || group % unit.head_dim == 0))
    return "";
  return fmt::format("groups of {} channels divide neither a head of {} nor a unit of {} heads", group, unit.head_dim,
                     unit.heads);
}

}  // namespace vqkv
