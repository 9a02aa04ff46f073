#include "experiment/shapes.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <vector>

#include "core/json.h"
#include "core/names.h"

namespace vqkv {
namespace {

constexpr NamedShape kShapes[] = {
    {"llama-7b", 32, 32, 32, 128, "data/papers/kvquant.yaml"},
    {"llama-2-7b", 32, 32, 32, 128, "data/papers/decoquant.yaml"},
    {"llama-3-8b", 32, 32, 8, 128, "data/papers/kumar.yaml"},
    {"llama-3.1-8b", 32, 32, 8, 128, "baseline-methods 1; evaluation 8.1"},
    {"llama-3.2-1b", 16, 32, 8, 64, "baseline-methods 1"},
    {"llama-3.2-3b", 28, 24, 8, 128, "evaluation 8.1"},
    {"qwen2.5-0.5b", 24, 14, 2, 64, "evaluation 8.1"},
    {"qwen2.5-1.5b", 28, 12, 2, 128, "evaluation 8.1"},
    {"smollm2-135m", 30, 9, 3, 64, "evaluation 8.1"},
    {"tinyllama-1.1b", 22, 32, 4, 64, "vq-methods r.8"},
};

// Far beyond any model; each head has units of its own.
constexpr int64_t kMaxHeads = 1 << 16, kMaxChannels = 1 << 20;

constexpr const char* kFlag = "--shape";

std::string lower_case(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// "layers=32,q_heads=32" as a map.
Json map_of(const std::string& text) {
  Json map = Json::object();
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, comma - at);
    const size_t equals = word.find('=');
    if (equals == std::string::npos) fail_usage(fmt::format("{} {}: '{}' is not key=number", kFlag, text, word));
    const std::string key = word.substr(0, equals);
    if (map.contains(key)) fail_usage(fmt::format("{} {}: {} stands twice", kFlag, text, key));
    map[key] = parse_yaml_value(word.substr(equals + 1), fmt::format("{} {}", kFlag, key));
    at = comma + 1;
  }
  return map;
}

}  // namespace

std::span<const NamedShape> named_shapes() { return kShapes; }

CacheShape read_shape(ConfigReader& reader) {
  CacheShape s;
  for (const auto& [key, into] : {std::pair{"layers", &s.layers},
                                  {"q_heads", &s.q_heads},
                                  {"kv_heads", &s.kv_heads},
                                  {"head_dim", &s.head_dim}}) {
    reader.require(key, "layers, q_heads, kv_heads and head_dim make a shape");
    *into = static_cast<int>(reader.integer(key, 0, 1, 1 << 16));
  }
  reader.finish();
  if (s.q_heads % s.kv_heads != 0 || s.head_dim % 2 != 0)
    reader.fail("", "query heads are a multiple of KV heads, and head_dim is even");
  if (int64_t{s.layers} * s.kv_heads > kMaxHeads || int64_t{s.q_heads} * s.head_dim > kMaxChannels)
    reader.fail("", fmt::format("at most {} KV heads in all layers and {} channels of query heads in one", kMaxHeads,
                                kMaxChannels));
  s.rope = RopeFacts::plain(s.head_dim, s.head_dim, 10000.0);
  s.score_scale = static_cast<float>(1 / std::sqrt(s.head_dim));
  return s;
}

CacheShape find_shape(const std::string& text) {
  Json map;
  if (text.find('=') != std::string::npos) {
    map = map_of(text);
  } else {
    const std::string name = lower_case(text);
    const auto it = std::ranges::find_if(kShapes, [&](const NamedShape& s) { return name == s.name; });
    if (it == std::end(kShapes)) {
      std::vector<std::string> known;
      for (const NamedShape& s : kShapes) known.emplace_back(s.name);
      fail_unknown(fmt::format("{}: shape", kFlag), name, known);
    }
    map = {{"layers", it->layers}, {"q_heads", it->q_heads}, {"kv_heads", it->kv_heads}, {"head_dim", it->head_dim}};
  }
  ConfigReader reader(map, kFlag);
  return read_shape(reader);
}

}  // namespace vqkv
