#include "codec/codec_archive.h"

#include <fmt/format.h>

#include <cmath>
#include <map>
#include <optional>

#include "core/error.h"
#include "core/whole_number.h"
#include "io/archive.h"
#include "io/json_fields.h"

namespace vqkv {
namespace {

// Far above any model, far below what would make a hostile file expensive.
constexpr int kMaxLayers = 4096, kMaxHeads = 4096, kMaxHeadDim = 4096, kMaxUnitChannels = 1 << 17;

std::string codec_name(int64_t i) { return fmt::format("codec/{:05}", i); }

class Writer final : public ParameterWriter {
 public:
  Writer(ArchiveWriter& out, std::string prefix) : out_(out), prefix_(std::move(prefix)) {}
  void tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data) override {
    out_.tensor(prefix_ + "/" + name, shape, data);
  }
  void facts(const std::string& name, const Json& value) override { out_.facts(prefix_ + "/" + name, value); }

 private:
  ArchiveWriter& out_;
  std::string prefix_;
};

class Reader final : public ParameterReader {
 public:
  Reader(const ArchiveReader& in, std::string prefix) : in_(in), prefix_(std::move(prefix)) {}
  AlignedVector<float> tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    return in_.tensor(prefix_ + "/" + name, shape);
  }
  std::vector<int64_t> shape(const std::string& name) const override { return in_.shape(prefix_ + "/" + name); }
  Json facts(const std::string& name) const override { return in_.facts(prefix_ + "/" + name); }

 private:
  const ArchiveReader& in_;
  std::string prefix_;
};

// Within the range of int.
int int_field(const Json& j, const char* key, int64_t low, int64_t high, const std::string& where) {
  return static_cast<int>(integer_field(j, key, low, high, where));
}

Json spec_to_json(const UnitSpec& s) {
  Json out{{"role", role_name(s.unit.role)},
           {"layer", s.unit.layer},
           {"first_head", s.unit.first_head},
           {"heads", s.unit.heads},
           {"head_dim", s.unit.head_dim},
           {"rope", s.unit.rope == RopePlacement::kPre ? "pre" : "post"},
           {"method", s.method},
           {"version", find_method(s.method).describe().version},
           {"knobs", s.knobs},
           {"transforms", s.transforms},
           {"share", s.share}};
  if (s.tier > 0) out["tier"] = s.tier;
  if (s.level > 0) out["level"] = s.level;
  return out;
}

UnitSpec spec_from_json(const Json& j, const CacheShape& shape, int tiers, const std::string& where) {
  UnitSpec s;
  if (j.contains("tier")) s.tier = int_field(j, "tier", 1, tiers - 1, where);
  if (j.contains("level")) s.level = int_field(j, "level", 1, UINT16_MAX, where);
  s.unit.role = choice_field(j, "role", {"k", "v"}, where) == "k" ? Role::kKey : Role::kValue;
  s.unit.layer = int_field(j, "layer", 0, shape.layers - 1, where);
  s.unit.heads = int_field(j, "heads", 1, shape.kv_heads, where);
  s.unit.first_head = int_field(j, "first_head", 0, shape.kv_heads - s.unit.heads, where);
  s.unit.head_dim = int_field(j, "head_dim", shape.head_dim, shape.head_dim, where);
  s.unit.rope_facts = shape.rope;
  if (s.unit.channels() > kMaxUnitChannels)
    fail_data(fmt::format("{}: a unit of {} channels; at most {}", where, s.unit.channels(), kMaxUnitChannels));
  s.unit.rope = choice_field(j, "rope", {"post", "pre"}, where) == "pre" ? RopePlacement::kPre : RopePlacement::kPost;
  s.share = choice_field(j, "share", {"none", "heads", "layers"}, where);
  s.method = text_field(j, "method", where);
  for (const char* key : {"knobs", "transforms"})
    if (!j.contains(key)) fail_data(fmt::format("{}: '{}' is missing", where, key));
  s.knobs = j["knobs"];
  s.transforms = j["transforms"];
  if (!s.knobs.is_object() || !s.transforms.is_array())
    fail_data(where + ": 'knobs' must be an object and 'transforms' a list");
  for (const Json& t : s.transforms) text_field(t, "name", where + ": transforms");
  const MethodInfo info = find_method(s.method).describe();
  const int version = int_field(j, "version", 1, INT32_MAX, where);
  if (version > info.version)
    fail_data(
        fmt::format("{}: method '{}' version {}; this build knows up to {}", where, s.method, version, info.version));
  return s;
}

TrainReport report_from_json(const Json& j, const std::string& where) {
  TrainReport r;
  try {
    r.seconds = j.at("seconds").get<double>();
    r.vectors = j.at("vectors").get<int64_t>();
    r.iterations = j.at("iterations").get<int64_t>();
    r.curve = j.at("curve").get<std::vector<double>>();
  } catch (const Json::exception& e) { fail_data(fmt::format("{}: training report: {}", where, e.what())); }
  return r;
}

CodecSet load(const ArchiveReader& in) {
  const std::string where = in.path() + ": set";
  const Json set = in.facts("set");
  if (!set.is_object() || !set.contains("units") || !set["units"].is_array() || !set.contains("shape") ||
      !set.contains("config"))
    fail_data(where + ": 'shape', 'config' and a list 'units' must be there");
  const CacheShape shape = cache_shape_from_json(set["shape"], where + ": shape");
  const std::string model_hash = text_field(set, "model_hash", where);
  std::vector<int64_t> tiers;
  if (set.contains("tiers")) {
    if (!set["tiers"].is_array() || set["tiers"].size() >= kMaxTiers)
      fail_data(fmt::format("{}: 'tiers' must be a list of up to {} numbers of tokens", where, kMaxTiers - 1));
    for (const Json& t : set["tiers"]) {
      const std::optional<int64_t> tokens = whole_number(t);
      if (!tokens || *tokens < 1 || *tokens > kMaxTierTokens)
        fail_data(fmt::format("{}: tiers: {} is no number of tokens", where, t.dump()));
      tiers.push_back(*tokens);
    }
  }
  const int64_t most = int64_t{2} * shape.layers * shape.kv_heads * static_cast<int64_t>(tiers.size() + 1);
  if (static_cast<int64_t>(set["units"].size()) > most)
    fail_data(fmt::format("{}: {} units; at most {}", where, set["units"].size(), most));
  std::vector<TrainedUnit> units;
  std::map<int, size_t> owner;  // codec number -> first unit that uses it
  for (const Json& u : set["units"]) {
    const std::string here = fmt::format("{}: unit {}", in.path(), units.size());
    if (!u.is_object() || !u.contains("spec") || !u.contains("report"))
      fail_data(here + ": 'spec' and 'report' must be there");
    TrainedUnit unit{spec_from_json(u["spec"], shape, static_cast<int>(tiers.size()) + 1, here), nullptr,
                     report_from_json(u["report"], here)};
    if (unit.spec.level > 0) {
      units.push_back(std::move(unit));
      continue;
    }
    const int number = int_field(u, "codec", 0, most - 1, here);
    const auto known = owner.find(number);
    if (known != owner.end()) {
      if (!unit.spec.same_codec(units[known->second].spec))
        fail_data(
            fmt::format("{}: shares codec {} with unit {}, which is of another kind", here, number, known->second));
      unit.codec = units[known->second].codec;
    } else {
      std::unique_ptr<Codec> codec = make_codec(unit.spec);
      codec->load(Reader(in, codec_name(number)));
      unit.codec = std::move(codec);
      owner[number] = units.size();
    }
    units.push_back(std::move(unit));
  }
  set_levels(units);
  return CodecSet(shape, set["config"], std::move(units), model_hash, std::move(tiers));
}

}  // namespace

std::string codec_archive_hash(const std::string& path) {
  return ArchiveReader(path, kCodecFormat, kCodecOldest, kCodecVersion).content_hash();
}

Json cache_shape_to_json(const CacheShape& s) {
  return {{"layers", s.layers},     {"q_heads", s.q_heads},         {"kv_heads", s.kv_heads},
          {"head_dim", s.head_dim}, {"score_scale", s.score_scale}, {"rope", s.rope.to_json()}};
}

CacheShape cache_shape_from_json(const Json& j, const std::string& where) {
  CacheShape s;
  s.layers = int_field(j, "layers", 1, kMaxLayers, where);
  s.q_heads = int_field(j, "q_heads", 1, kMaxHeads, where);
  s.kv_heads = int_field(j, "kv_heads", 1, kMaxHeads, where);
  s.head_dim = int_field(j, "head_dim", 2, kMaxHeadDim, where);
  if (s.q_heads % s.kv_heads)
    fail_data(fmt::format("{}: {} query heads are no multiple of {} KV heads", where, s.q_heads, s.kv_heads));
  const auto scale = j.find("score_scale");
  if (scale == j.end() || !scale->is_number() || !(scale->get<float>() > 0) || !std::isfinite(scale->get<float>()))
    fail_data(where + ": 'score_scale' must be a positive number");
  s.score_scale = scale->get<float>();
  if (!j.contains("rope")) fail_data(where + ": 'rope' is missing");
  try {
    s.rope = RopeFacts::from_json(j["rope"]);
  } catch (const Error& e) { fail_data(fmt::format("{}: {}", where, e.what())); }
  if (s.rope.head_dim != s.head_dim)
    fail_data(fmt::format("{}: rope.head_dim is {}, head_dim {}", where, s.rope.head_dim, s.head_dim));
  return s;
}

void save_codec_set(const CodecSet& set, const std::string& path, const Json& facts) {
  ArchiveWriter out(path, kCodecFormat, kCodecVersion);
  std::map<const Codec*, int64_t> number;  // shared codecs once
  Json units = Json::array();
  for (const TrainedUnit& u : set.units()) {
    if (u.spec.level > 0) {  // of another unit's codec
      units.push_back({{"spec", spec_to_json(u.spec)}, {"report", u.report.to_json()}});
      continue;
    }
    const auto [it, fresh] = number.emplace(u.codec.get(), static_cast<int64_t>(number.size()));
    if (fresh) {
      Writer writer(out, codec_name(it->second));
      u.codec->save(writer);
    }
    units.push_back({{"spec", spec_to_json(u.spec)}, {"codec", it->second}, {"report", u.report.to_json()}});
  }
  Json facts_of_set = {{"shape", cache_shape_to_json(set.shape())},
                       {"config", set.config()},
                       {"model_hash", set.model_hash()},
                       {"units", units}};
  if (set.tiers() > 1) facts_of_set["tiers"] = set.tier_tokens();
  out.facts("set", facts_of_set);
  out.facts("facts", facts);
  out.finish();
}

CodecSet load_codec_set(const std::string& path, Json* facts) {
  const ArchiveReader in(path, kCodecFormat, kCodecOldest, kCodecVersion);
  try {
    if (facts) *facts = in.has_facts("facts") ? in.facts("facts") : Json::object();
    return load(in);
  } catch (const Error& e) {
    // A knob out of range or an unknown method is a usage error on a command line; in a file it is the file's fault.
    // So is a check that fails on what the file says, and a message without the path.
    const std::string message = e.what();
    fail_data(message.starts_with(path) ? message : path + ": " + message);
  } catch (const Json::exception& e) { fail_data(fmt::format("{}: {}", path, e.what())); }
}

}  // namespace vqkv
