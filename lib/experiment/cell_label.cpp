#include "experiment/cell_label.h"

#include <fmt/format.h>

#include "config/config.h"

namespace vqkv {
namespace {

// The scalars of a map: "codebooks=4 bits=8 k(rope=pre)".
std::string knobs_text(const Json& map) {
  std::string out;
  for (const auto& [key, value] : map.items()) {
    if (key == "name") continue;
    out += (out.empty() ? "" : " ") +
           (value.is_object() ? key + "(" + knobs_text(value) + ")" : key + "=" + written(value));
  }
  return out;
}

// Of one codec: a role that is a level of a newer tier's has no method of its own.
std::string names_of(const Json& codec) {
  const auto name = [&](const char* role) {
    for (const Json* from : {find_path(codec, role), &codec})
      for (const char* key : {"name", "level"})
        if (from && from->is_object() && from->contains(key))
          return *key == 'n' ? written(from->at(key)) : std::string(key);
    return std::string("?");
  };
  const std::string k = name("k"), v = name("v");
  return k == v ? k : k + " + " + v;
}

}  // namespace

std::string written(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return value.dump();
  std::string out;
  for (const Json& item : value) out += (out.empty() ? "" : ", ") + written(item);
  return "[" + out + "]";
}

std::string codec_names(const Json& config) {
  const Json codec = config.value("codec", Json::object());
  if (!codec.contains("tiers")) return names_of(codec);
  std::string out;
  for (const Json& tier : codec["tiers"]) out += (out.empty() ? "" : ", older ") + names_of(tier);
  return out;
}

std::string cell_label(const Json& cell) {
  std::string label = codec_names(cell.at("config"));
  if (cell.contains("axes") && cell["axes"].is_object())
    for (const auto& [path, value] : cell["axes"].items()) {
      if (path.ends_with(".name") || (value.is_object() && knobs_text(value).empty())) continue;
      if (value.is_object())
        label += " " + knobs_text(value);
      else
        label += fmt::format(" {}={}", path.substr(path.find_last_of('.') + 1), written(value));
    }
  return label;
}

}  // namespace vqkv
