// Scalar codes on an evenly spaced grid with a scale and, where the grid is not centred, a zero a group: the common
// part of rtn, kivi and calibquant.
#pragma once
#include <string>

#include "codec/codec.h"

namespace vqkv {

// The grid of one group, as stored: x ~ zero + scale * (code - offset).
struct AffineLine {
  float scale = 1;
  float zero = 0;  // what the decoder adds
  float integer_zero = 0;
};

// Codes of n values of one group: codes[i * code_step] of x[i * x_step].
using AffineRun = void (*)(const AffineLine& line, int bits, const float* x, int64_t x_step, uint16_t* codes,
                           int64_t code_step, int64_t n);

struct AffineGrid {
  // asymmetric: x ~ min + s q. integer_zero: x ~ s (q - z) with a whole z (QuaRot). symmetric: x ~ s q, |q| <=
  // 2^(bits-1)-1. signed: the same, but what is clipped below may reach -2^(bits-1).
  enum class Mode { kAsymmetric, kIntegerZero, kSymmetric, kSigned } mode = Mode::kAsymmetric;
  int bits = 4;
  double clip = 1.0;  // multiplies both ends of the range
  double inset = 0;   // then moves both in by this share of it; asymmetric alone
  DType scale_type = DType::kF16;
  bool range_holds_zero = false;  // widen every range to hold 0

  // A scale alone, no zero.
  bool centred() const { return mode == Mode::kSymmetric || mode == Mode::kSigned; }
  // Of a group whose values lie in [low, high].
  AffineLine line(float low, float high) const;
  AffineRun run() const;
};

// Groups of `group` channels of one token (along_tokens false) or of `group` tokens of one channel.
struct AffineGroups {
  int group = 32;
  bool along_tokens = false;
};

class AffineCodec : public Codec {
 public:
  AffineCodec(const AffineGrid& grid, const AffineGroups& groups, const UnitShape& unit);

  int channels() const override { return channels_; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state = nullptr) const override;
  LevelsTerm term() const;  // all that its plan adds
  DecodePlan plan(const PlanQuery& query = {}) const override;
  void save(ParameterWriter&) const override {}
  void load(const ParameterReader&) override {}

 private:
  AffineGrid grid_;
  AffineGroups groups_;
  int channels_;
  RopePlacement rope_;
  CodeLayout layout_;
};

// Why `group` channels of one token can't be a group of this unit, or "". A group lies inside a head or holds whole
// heads.
std::string check_channel_group(int group, const UnitShape& unit);
// The same for groups that lie inside a head.
std::string check_head_group(int group, const UnitShape& unit);

}  // namespace vqkv
