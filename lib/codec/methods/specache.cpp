// SpeCache's near copy: KIVI's axes at 2 bits, and at 1 bit with levels inside the range. At the ends of a range, where
// min-max puts them, one bit is worse than zeros.
#include "codec/methods/affine.h"

namespace vqkv {
namespace {

struct SpeCacheKnobs {
  int bits = 2;
  int group = 64;
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 2,
                 "bits of a code; at 1 the levels stand at a quarter and three quarters of a range")
        .integer("group", &group, 2, 1024, "keys: tokens a scale; values: channels a scale");
  }
};

class SpeCacheCodec final : public AffineCodec {
 public:
  SpeCacheCodec(const SpeCacheKnobs& k, const UnitShape& unit)
      : AffineCodec(grid(k), {k.group, unit.role == Role::kKey}, unit) {}

 private:
  static AffineGrid grid(const SpeCacheKnobs& k) {
    AffineGrid g;
    g.bits = k.bits;
    g.inset = k.bits == 1 ? 0.25 : 0;
    return g;
  }
};

MethodInfo describe_specache() {
  MethodInfo info;
  info.name = "specache";
  info.title = "the copy that SpeCache keeps near: KIVI's axes, 1 bit at the quarters of a range";
  info.paper =
      "Jie et al., SpeCache: Speculative Key-Value Caching for Efficient Generation of LLMs, ICML 2025, arXiv "
      "2503.16163";
  info.bibtex = "jie2025specache";
  info.family = "levels";
  info.bits = "bits + 32 / group";
  info.trained = false;
  info.caveat =
      "half of the method: the strategy specache fetches exact pairs beside it, from a far copy of 16 bits a value "
      "that these bits leave out";
  info.assumed =
      "no code of the authors was found: levels, window and group are those of the paper's summary and of a "
      "re-implementation by others, less its overflow at the largest value";
  info.rope = {"post"};
  const Json cache = {{"sinks", 0}, {"rule", "window"}, {"window", 64}, {"flush", 64}};
  info.presets = {
      {"default", {{"cache", cache}, {"note", "2 bits behind the newest 64 to 127 tokens; the paper keeps 64"}}},
      {"b1", {{"codec", {{"bits", 1}}}, {"cache", cache}}}};
  return info;
}

std::string check_specache(const SpeCacheKnobs& k, const UnitShape& unit) {
  return unit.role == Role::kValue ? check_head_group(k.group, unit) : "";
}

}  // namespace

VQKV_DEFINE_METHOD(specache, SpeCacheKnobs, SpeCacheCodec, describe_specache, check_specache)

}  // namespace vqkv
