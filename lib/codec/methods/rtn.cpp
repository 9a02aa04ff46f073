// Round to nearest on a grid between the ends of each group: the plain grid of baselines.
#include "codec/methods/affine.h"

namespace vqkv {
namespace {

struct RtnKnobs {
  int bits = 4;
  int group = 32;
  std::string axis = "token";
  std::string mode = "asymmetric";
  double clip = 1.0;
  std::string scale_type = "f16";
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 16, "bits of a code")
        .integer("group", &group, -1, 65536,
                 "values that share a scale; with axis token 0: the channels of a head, -1: of the unit")
        .choice("axis", &axis, {"token", "channel"},
                "groups along the channels of one token, or along the tokens of one channel")
        .choice("mode", &mode, {"asymmetric", "integer_zero", "symmetric", "signed"},
                "minimum and scale, scale and whole zero point, or scale alone, with as many codes below 0 as above or "
                "one more below, which clipped values reach")
        .real("clip", &clip, 0.05, 1.0, "multiplies both ends of a group's range")
        .choice("scale_type", &scale_type, {"f16", "bf16", "f32"}, "storage of scales and zeros");
  }
};

int group_of(const RtnKnobs& k, const UnitShape& unit) {
  return k.group == 0 ? unit.head_dim : k.group < 0 ? unit.channels() : k.group;
}

class RtnCodec final : public AffineCodec {
 public:
  RtnCodec(const RtnKnobs& k, const UnitShape& unit) : AffineCodec(grid(k, unit), groups(k, unit), unit) {}

 private:
  static AffineGrid grid(const RtnKnobs& k, const UnitShape& unit) {
    AffineGrid g;
    g.mode = k.mode == "symmetric"      ? AffineGrid::Mode::kSymmetric
             : k.mode == "signed"       ? AffineGrid::Mode::kSigned
             : k.mode == "integer_zero" ? AffineGrid::Mode::kIntegerZero
                                        : AffineGrid::Mode::kAsymmetric;
    g.bits = k.bits;
    g.clip = k.clip;
    g.scale_type = dtype_from_name(k.scale_type);
    // QuaRot widens the ranges of keys to hold 0 and leaves those of values alone.
    g.range_holds_zero = k.mode == "integer_zero" && unit.role == Role::kKey;
    return g;
  }
  static AffineGroups groups(const RtnKnobs& k, const UnitShape& unit) {
    return {group_of(k, unit), k.axis == "channel"};
  }
};

MethodInfo describe_rtn() {
  MethodInfo info;
  info.name = "rtn";
  info.title = "round to nearest on a uniform grid, one scale a group";
  info.paper =
      "preset quarot (mode integer_zero, clip 0.95, group 0, the hadamard transform): QuaRot's cache (Ashkboos et al., "
      "NeurIPS 2024, arXiv 2404.00456); preset decoquant (mode symmetric, one scale a token of the layer, the deco "
      "transform): DecoQuant (Liu et al., ACL 2024, arXiv 2405.12591)";
  info.bibtex = "ashkboos2024quarot";
  info.family = "levels";
  info.bits =
      "bits + (scale_type == f32 ? 32 : 16) * (mode == symmetric ? 1 : mode == signed ? 1 : 2) / (group == 0 ? "
      "head_dim : group < 0 ? channels : group)";
  info.trained = false;
  info.caveat =
      "1-bit min-max is worse than sending zeros; below 4 bits tune clip (0.55 to 0.85) and prefer asymmetric";
  info.presets = {
      {"default", Json::object()},
      {"rtn2", {{"codec", {{"bits", 2}}}}},
      {"per_channel", {{"codec", {{"axis", "channel"}, {"group", 32}, {"bits", 4}}}}},
      {"symmetric", {{"codec", {{"mode", "symmetric"}, {"bits", 8}, {"group", 0}}}}},
      {"quarot",
       {{"codec", {{"mode", "integer_zero"}, {"clip", 0.95}, {"group", 0}, {"bits", 4}, {"transform", {"hadamard"}}}},
        {"note", "4-bit cache of QuaRot; the clip is right for 4 bits only"}}},
      {"quarot_symmetric",
       {{"codec", {{"mode", "signed"}, {"clip", 0.95}, {"group", 0}, {"bits", 4}, {"transform", {"hadamard"}}}},
        {"note", "QuaRot's option without zero points"}}},
      {"decoquant",
       {{"codec", {{"mode", "symmetric"}, {"group", -1}, {"bits", 4}, {"heads", "all"}, {"transform", {"deco"}}}},
        {"note",
         "b + 16/D + 4096/(T D) bits over the T tokens of a layer of D channels, with the matrix of each prompt"}}}};
  return info;
}

std::string check_rtn(const RtnKnobs& k, const UnitShape& unit) {
  if ((k.mode == "symmetric" || k.mode == "signed") && k.bits < 2) return k.mode + " codes need 2 bits";
  if (k.axis == "token") return check_channel_group(group_of(k, unit), unit);
  return k.group < 1 ? "axis channel needs a group of 1 token or more" : "";
}

}  // namespace

VQKV_DEFINE_METHOD(rtn, RtnKnobs, RtnCodec, describe_rtn, check_rtn)

}  // namespace vqkv
