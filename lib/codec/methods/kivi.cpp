// KIVI: keys along the tokens of each channel, values along the channels of each token. The axes, and the residual
// window of its cache rule, are load-bearing: swapping the axes costs most of GSM8K (baseline-methods 2.6).
#include "codec/methods/affine.h"

namespace vqkv {
namespace {

struct KiviKnobs {
  int bits = 2;
  int group = 32;
  KnobTable table() {
    return KnobTable()
        .integer("bits", &bits, 1, 8, "bits of a code (the paper: 2 or 4)")
        .integer("group", &group, 2, 1024, "keys: tokens a scale; values: channels a scale");
  }
};

class KiviCodec final : public AffineCodec {
 public:
  KiviCodec(const KiviKnobs& k, const UnitShape& unit)
      : AffineCodec(grid(k), {k.group, unit.role == Role::kKey}, unit) {}

 private:
  static AffineGrid grid(const KiviKnobs& k) {
    AffineGrid g;
    g.bits = k.bits;
    return g;
  }
};

MethodInfo describe_kivi() {
  MethodInfo info;
  info.name = "kivi";
  info.title = "per-channel keys in token groups, per-token values in channel groups";
  info.paper = "Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024, arXiv 2402.02750";
  info.bibtex = "liu2024kivi";
  info.family = "levels";
  info.bits = "bits + 32 / group";
  info.trained = false;
  info.caveat =
      "the paper's residual window (cache rule kivi) comes with a preset, `preset: default`, and only then; in the "
      "paper prompts are attended exactly, replay mode prefill-exact";
  info.rope = {"post"};
  const Json cache = {{"sinks", 0}, {"rule", "kivi"}, {"residual", 128}};
  info.presets = {{"default", {{"cache", cache}, {"note", "2 bits, G = 32, R = 128: the paper's setting"}}},
                  {"kivi4", {{"codec", {{"bits", 4}}}, {"cache", cache}}},
                  {"g64", {{"codec", {{"group", 64}}}, {"cache", cache}}},
                  {"r32",
                   {{"cache", {{"sinks", 0}, {"rule", "kivi"}, {"residual", 32}}},
                    {"note", "the repository's example for Llama-3.1-8B"}}},
                  {"think",
                   {{"codec", {{"k", {{"transform", {"think"}}}}}},
                    {"cache", cache},
                    {"note", "ThinK before KIVI: the prompt's mask serves every later block (`explain think`)"}}}};
  return info;
}

std::string check_kivi(const KiviKnobs& k, const UnitShape& unit) {
  // A group of values never exceeds a head: the scales of two heads differ.
  return unit.role == Role::kValue ? check_head_group(k.group, unit) : "";
}

}  // namespace

VQKV_DEFINE_METHOD(kivi, KiviKnobs, KiviCodec, describe_kivi, check_kivi)

}  // namespace vqkv
