#include "model/model_files_rope.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "model/model_files_common.h"

namespace vqkv::model_files {
namespace {

constexpr std::array<std::string_view, 4> kKinds{"default", "linear", "llama3", "yarn"};
// Keys of kinds that aren't supported, also where the kind itself isn't said.
constexpr std::array<const char*, 6> kOtherKinds{"mrope_section", "mrope_interleaved", "short_factor", "long_factor",
                                                 "alpha",         "axial_dims"};

// The places of one fact.
class Places {
 public:
  explicit Places(const Config& config) {
    for (const char* name : {"rope_parameters", "rope_scaling"})
      if (const auto object = config.object(name)) inner_.push_back(*object);
    all_ = inner_;
    all_.push_back(config);
    for (const Config& place : inner_) check(place);
    kind_ = read_kind();
  }
  const std::string& kind() const { return kind_; }

  // Of a scaling's own key: the one number that all objects with the key agree on.
  double number(const std::string& key, double lowest, double highest) const {
    if (const Config* place = holder(inner_, key)) return place->number(key, lowest, highest);
    fail_data(fmt::format("{}: \"{}\" is missing, which \"{}\" needs", inner_.front().where(), key, kind_));
  }
  double number_or(const std::string& key, double lowest, double highest, double fallback) const {
    const Config* place = holder(inner_, key);
    return place ? place->number(key, lowest, highest) : fallback;
  }
  // Of a key that may stand at the top of the configuration too; null where no place has it.
  const Config* anywhere(const std::string& key) const { return holder(all_, key); }
  bool boolean_or(const std::string& key, bool fallback) const {
    const Config* place = holder(inner_, key);
    return place ? place->boolean_or(key, fallback) : fallback;
  }
  [[noreturn]] void fail(const std::string& key, const std::string& allowed) const {
    holder(all_, key)->fail(key, allowed);
  }

 private:
  static void check(const Config& place) {
    if (place.json().empty())
      fail_data(fmt::format("{} is {{}}, which says nothing; leave it out or write null where nothing is scaled",
                            place.where()));
    for (const char* key : kOtherKinds)
      if (place.has(key)) place.fail(key, fmt::format("a key of a RoPE that is not supported; {}", kRecordInstead));
    for (const auto& [key, value] : place.json().items())
      if (value.is_object())
        place.fail(key, fmt::format("a RoPE for each type of layer is not supported; {}", kRecordInstead));
  }

  static const Config* holder(const std::vector<Config>& places, const std::string& key) {
    const Config* first = nullptr;
    for (const Config& place : places) {
      if (!place.has(key)) continue;
      if (first && first->at(key) != place.at(key))
        place.fail(key, fmt::format("and {} says {}: which is right?", first->where(), first->at(key).dump()));
      if (!first) first = &place;
    }
    return first;
  }

  std::string read_kind() const {
    std::string kind, said_at;
    for (const Config& place : inner_) {
      for (const char* key : {"rope_type", "type"}) {
        if (!place.has(key)) continue;
        const std::string found = place.string_or(key, "");
        if (std::find(kKinds.begin(), kKinds.end(), found) == kKinds.end())
          place.fail(key, fmt::format("only default, linear, llama3 and yarn are supported; {}", kRecordInstead));
        if (!kind.empty() && found != kind)
          place.fail(key, fmt::format("and {} says \"{}\": which is right?", said_at, kind));
        kind = found;
        said_at = fmt::format("{}: \"{}\"", place.where(), key);
      }
    }
    if (!kind.empty()) return kind;
    for (const Config& place : inner_)
      if (place.has("factor"))
        place.fail("factor", "and \"rope_type\" is missing, which says what it does (linear, llama3 or yarn)");
    return "default";
  }

  std::vector<Config> inner_, all_;
  std::string kind_;
};

void apply_yarn(const Places& places, int64_t context_length, RopeFacts& rope) {
  if (!(rope.theta > 1)) places.fail("rope_theta", "more than 1 is needed for yarn");
  RopeFacts::Yarn yarn;
  yarn.factor = places.number("factor", 1, 1e6);
  // null and 0 mean the paper's values, as in transformers.
  const auto turns = [&](const char* key, double usual) {
    const double found = places.number_or(key, 0, 1e6, 0);
    return found > 0 ? found : usual;
  };
  yarn.beta_fast = turns("beta_fast", yarn.beta_fast);
  yarn.beta_slow = turns("beta_slow", yarn.beta_slow);
  if (!(yarn.beta_fast > yarn.beta_slow))
    fail_data(fmt::format("{}: beta_fast ({}) must be more than beta_slow ({})", places.anywhere("factor")->where(),
                          yarn.beta_fast, yarn.beta_slow));
  yarn.truncate = places.boolean_or("truncate", true);
  const Config* original = places.anywhere("original_max_position_embeddings");
  yarn.original_context = original ? original->number("original_max_position_embeddings", 1, kMaxContext)
                                   : static_cast<double>(context_length);
  rope.apply_yarn(yarn);
  const double scale = places.number_or("mscale", 0, 1e3, 0), all = places.number_or("mscale_all_dim", 0, 1e3, 0);
  if (scale > 0 && all > 0)
    rope.attention_factor = RopeFacts::yarn_scale(yarn.factor, scale) / RopeFacts::yarn_scale(yarn.factor, all);
  rope.attention_factor = places.number_or("attention_factor", 1e-3, 1e3, rope.attention_factor);
}

}  // namespace

RopeFacts rope_of(const Config& config, int head_dim, int64_t context_length) {
  const Places places(config);
  if (const Config* partial = places.anywhere("partial_rotary_factor");
      partial && partial->number("partial_rotary_factor", 0, 1) != 1)
    partial->fail("partial_rotary_factor", fmt::format("only 1 is supported; {}", kRecordInstead));
  const Config* theta = places.anywhere("rope_theta");
  RopeFacts rope = RopeFacts::plain(head_dim, head_dim, theta ? theta->number("rope_theta", 1, kMaxTheta) : 10000.0);
  if (places.kind() == "linear") {
    rope.apply_linear(places.number("factor", 1, 1e6));
  } else if (places.kind() == "yarn") {
    apply_yarn(places, context_length, rope);
  } else if (places.kind() == "llama3") {
    const double factor = places.number("factor", 1, 1e6), low = places.number("low_freq_factor", 1e-3, 1e6),
                 high = places.number("high_freq_factor", 1e-3, 1e6);
    if (!(high > low)) places.fail("high_freq_factor", fmt::format("more than low_freq_factor ({}) is needed", low));
    const Config* original = places.anywhere("original_max_position_embeddings");
    if (!original) places.number("original_max_position_embeddings", 1, kMaxContext);
    rope.apply_llama3(factor, low, high, original->number("original_max_position_embeddings", 1, kMaxContext));
  }
  return rope;
}

void check_stored_frequencies(const std::string& where, std::span<const float> stored, double precision,
                              const RopeFacts& rope) {
  const RopeFacts plain = RopeFacts::plain(rope.head_dim, rope.rotary_dim, rope.theta);
  const auto differs = [&](const std::vector<double>& wanted) {
    // 1e-5: a power computed in fp32. 6e-8: the smallest f16.
    for (size_t p = 0; p < wanted.size(); ++p)
      if (!(std::abs(static_cast<double>(stored[p]) - wanted[p]) <= (1e-5 + precision) * wanted[p] + 6e-8)) return p;
    return wanted.size();
  };
  const size_t pair = differs(plain.inverse_frequency);
  if (pair == stored.size() || differs(rope.inverse_frequency) == stored.size()) return;
  fail_data(
      fmt::format("{}: frequency {} is {}, and config.json means {} (rope_theta {}, scaling {}): which is right? The "
                  "tensor can be left out of the file",
                  where, pair, stored[pair], rope.inverse_frequency[pair], rope.theta, rope.scaling));
}

}  // namespace vqkv::model_files
