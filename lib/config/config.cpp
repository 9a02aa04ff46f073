#include "config/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <utility>

#include "core/error.h"
#include "core/names.h"
#include "core/whole_number.h"

namespace vqkv {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kMaxRangeValues = 100'000;

std::string join(const std::string& path, const std::string& key) { return path.empty() ? key : path + "." + key; }

void merge_tree(Json& base, const Json& over) {
  if (!base.is_object() || !over.is_object()) {
    base = over;
    return;
  }
  for (const auto& [key, value] : over.items()) {
    if (base.contains(key))
      merge_tree(base[key], value);
    else
      base[key] = value;
  }
}

std::string read_text(const fs::path& path, const std::string& named_by) {
  std::error_code ec;
  const auto status = fs::status(path, ec);
  const std::string lead = named_by.empty() ? "" : named_by + ": ";
  if (ec || !fs::exists(status)) fail_usage(fmt::format("{}configuration file {} does not exist", lead, path.string()));
  if (fs::is_directory(status))
    fail_usage(fmt::format("{}{} is a folder; a YAML file is expected", lead, path.string()));
  std::ifstream in(path, std::ios::binary);
  if (!in) fail_usage(fmt::format("{}{} can't be read", lead, path.string()));
  // One byte beyond the limit is enough to refuse, so a device or a huge file costs nothing.
  std::string text(static_cast<size_t>(kMaxConfigBytes) + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  return text;
}

struct Loader {
  std::vector<fs::path> open;  // the chain of files being read
  int files = 0;

  Config load(const fs::path& path, const std::string& named_by) {
    std::error_code ec;
    fs::path identity = fs::weakly_canonical(path, ec);
    if (ec) identity = path;
    if (std::find(open.begin(), open.end(), identity) != open.end()) {
      std::string chain;
      for (const auto& p : open) chain += p.filename().string() + " -> ";
      fail_usage(fmt::format("{}: include goes in a circle: {}{}", named_by, chain, identity.filename().string()));
    }
    if (++files > kMaxConfigFiles)
      fail_usage(fmt::format("{}: more than {} included files", named_by, kMaxConfigFiles));
    Config own = parse_yaml(read_text(path, named_by), path.string());
    const Json list = own.tree.value("include", Json());
    own.tree.erase("include");
    if (list.is_null()) return own;
    const std::string where = own.where("include");
    refuse_empty_list(where + ": include", list);
    std::vector<std::string> names;
    if (list.is_string())
      names.push_back(list.get<std::string>());
    else if (list.is_array()) {
      for (const auto& n : list) {
        if (!n.is_string()) fail_expected(where + ": include", "a file name", n);
        names.push_back(n.get<std::string>());
      }
    } else {
      fail_expected(where + ": include", "a file name or a list of them", list);
    }
    open.push_back(identity);
    Config out;
    for (const auto& n : names) merge_config(out, load(path.parent_path() / n, where));
    open.pop_back();
    merge_config(out, own);
    return out;
  }
};

bool is_boundary(char c) { return !(std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '['); }

}  // namespace

std::string ConfigMark::text() const { return line > 0 ? fmt::format("{}:{}:{}", file, line, column) : file; }

std::string Config::where(const std::string& path) const {
  for (std::string p = path;;) {
    const auto it = marks.find(p);
    if (it != marks.end()) return it->second.text();
    const size_t cut = p.find_last_of(".[");
    if (cut == std::string::npos) return "configuration";
    p.resize(cut);
  }
}

std::string Config::annotate(const std::string& message) const {
  const ConfigMark* best = nullptr;
  std::string best_path;
  size_t length = 0;
  for (const auto& [path, mark] : marks) {
    if (path.size() <= length) continue;
    for (size_t at = message.find(path); at != std::string::npos; at = message.find(path, at + 1)) {
      const size_t end = at + path.size();
      // What follows may be deeper than anything that was written: "codec.transform[0].rank" of a default.
      const bool starts = at == 0 || is_boundary(message[at - 1]);
      const bool ends =
          end == message.size() || is_boundary(message[end]) || message[end] == '.' || message[end] == '[';
      if (!starts || !ends) continue;
      best = &mark;
      best_path = path;
      length = path.size();
      break;
    }
  }
  // "codec: unknown key 'bitz'" means the key's own line.
  constexpr std::string_view kUnknown = "unknown key '";
  if (const size_t at = message.find(kUnknown); best && at != std::string::npos) {
    const size_t begin = at + kUnknown.size();
    const auto it = marks.find(best_path + "." + message.substr(begin, message.find('\'', begin) - begin));
    if (it != marks.end()) best = &it->second;
  }
  return best && !message.starts_with(best->text()) ? best->text() + ": " + message : message;
}

Config load_config(const std::string& path) { return Loader().load(path, ""); }

void merge_config(Config& base, const Config& over) {
  merge_tree(base.tree, over.tree);
  for (const auto& [path, mark] : over.marks) base.marks[path] = mark;
}

void refuse_dotted_keys(const Config& config, const std::string& path) {
  const Json* map = path.empty() ? &config.tree : find_path(config.tree, path);
  if (!map || !map->is_object()) return;
  for (const auto& [key, value] : map->items()) {
    const std::string here = join(path, key);
    const size_t dot = key.find('.');
    if (dot != std::string::npos)
      fail_usage(
          fmt::format("{}: '{}' is one key with a dot in it; in a file a path is nested maps, {}: {{{}: ...}}. Dots "
                      "belong to overrides on the command line, to sweep axes and to `set`",
                      config.where(here), here, key.substr(0, dot), key.substr(dot + 1)));
    refuse_dotted_keys(config, here);
  }
}

std::vector<std::string> split_path(const std::string& path) {
  std::vector<std::string> parts;
  for (size_t at = 0;;) {
    const size_t dot = path.find('.', at);
    parts.push_back(path.substr(at, dot - at));
    if (parts.back().empty()) fail_usage(fmt::format("'{}' is not a path: an empty part between dots", path));
    if (dot == std::string::npos) return parts;
    at = dot + 1;
  }
}

namespace {

// What `part` of a path names in a map, or in a list by its number from 0; null when absent.
const Json* child_of(const Json& at, const std::string& part) {
  if (at.is_object()) {
    const auto it = at.find(part);
    return it == at.end() ? nullptr : &*it;
  }
  const bool number = !part.empty() && part.size() < 7 && part.find_first_not_of("0123456789") == std::string::npos;
  if (!at.is_array() || !number) return nullptr;
  const auto index = static_cast<size_t>(std::stoi(part));
  return index < at.size() ? &at[index] : nullptr;
}

}  // namespace

const Json* find_path(const Json& tree, const std::string& path) {
  const Json* at = &tree;
  for (const auto& part : split_path(path)) {
    at = child_of(*at, part);
    if (!at) return nullptr;
  }
  return at;
}
Json* find_path(Json& tree, const std::string& path) { return const_cast<Json*>(find_path(std::as_const(tree), path)); }

std::string mark_path(const Json& tree, const std::string& path) {
  const Json* at = &tree;
  std::string out;
  for (const auto& part : split_path(path)) {
    out = at && at->is_array() ? out + "[" + part + "]" : join(out, part);
    if (at) at = child_of(*at, part);
  }
  return out;
}

void set_path(Json& tree, const std::string& path, Json value) {
  Json* at = &tree;
  const auto parts = split_path(path);
  if (parts.size() > static_cast<size_t>(kMaxConfigDepth))
    fail_usage(fmt::format("'{}' has more than {} parts", path, kMaxConfigDepth));
  std::string so_far;
  const auto step = [&](Json& from, const std::string& part) -> Json& {
    if (!from.is_array()) return from[part];
    if (const Json* entry = child_of(from, part)) return const_cast<Json&>(*entry);
    fail_usage(fmt::format("{}: {} is a list of {} entries, numbered from 0; '{}' is none of them", path, so_far,
                           from.size(), part));
  };
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    Json& next = step(*at, parts[i]);
    so_far = join(so_far, parts[i]);
    if (next.is_null()) next = Json::object();
    if (!next.is_object() && !next.is_array())
      fail_usage(fmt::format("{}: {} is {}, not a map, so it can't hold {}", path, so_far, next.dump(), parts[i + 1]));
    at = &next;
  }
  step(*at, parts.back()) = std::move(value);
}

void apply_override(Config& config, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0)
    fail_usage(fmt::format("'{}' is not an override; write path=value, for example codec.bits=4", assignment));
  const std::string path = assignment.substr(0, equals);
  // A file may be named "a #1: [x].h5" or 2024, and a group too: these are texts, not YAML.
  const bool verbatim = path == "trace.path" || path == "group";
  const std::string text = assignment.substr(equals + 1);
  Json value = verbatim ? Json(text) : parse_yaml_value(text, "command line: " + path);
  bool done = false;
  for (const std::string prefix : {"sweep.grid.", "sweep.repeat."}) {
    if (!path.starts_with(prefix) || path.size() == prefix.size()) continue;
    const std::string map = prefix.substr(0, prefix.size() - 1);
    const Json* existing = find_path(config.tree, map);
    Json axes = existing ? *existing : Json::object();
    if (!axes.is_object()) fail_usage(fmt::format("{}: {} is not a map", path, map));
    axes[path.substr(prefix.size())] = value;
    set_path(config.tree, map, std::move(axes));
    done = true;
  }
  if (!done) set_path(config.tree, path, std::move(value));
  // Positions inside what was replaced no longer say where a value comes from.
  const std::string shown = mark_path(config.tree, path);
  for (auto it = config.marks.lower_bound(shown); it != config.marks.end() && it->first.starts_with(shown);) {
    const bool inside =
        it->first.size() > shown.size() && (it->first[shown.size()] == '.' || it->first[shown.size()] == '[');
    it = inside ? config.marks.erase(it) : std::next(it);
  }
  config.marks[shown] = {"command line", 0, 0};  // messages name the path
  config.overrides.push_back(assignment);
}

void apply_group(Config& config) {
  const Json groups = config.tree.value("groups", Json());
  const Json chosen = config.tree.value("group", Json());
  config.tree.erase("groups");
  config.tree.erase("group");
  if (!groups.is_null() && !groups.is_object())
    fail_expected(config.where("groups") + ": groups", "a map of named sets of values", groups);
  std::vector<std::string> known;
  for (const auto& [name, values] : groups.items()) {
    if (values.is_null()) continue;
    if (!values.is_object()) fail_expected(config.where("groups." + name) + ": groups." + name, "a map", values);
    known.push_back(name);
  }
  if (chosen.is_null()) return;
  if (!chosen.is_string()) fail_expected(config.where("group") + ": group", "the name of a group", chosen);
  const std::string name = chosen.get<std::string>();
  if (std::find(known.begin(), known.end(), name) == known.end())
    fail_unknown(config.where("group") + ": group:", name, known);
  Config over;
  over.tree = groups[name];
  const std::string prefix = "groups." + name + ".";
  for (const auto& [path, mark] : config.marks)
    if (path.starts_with(prefix)) over.marks[path.substr(prefix.size())] = mark;
  merge_config(config, over);
  for (const std::string& assignment : std::exchange(config.overrides, {})) {
    const std::string path = assignment.substr(0, assignment.find('='));
    if (path != "group" && path != "groups" && !path.starts_with("groups.")) apply_override(config, assignment);
  }
}

std::vector<Json> range_or_list(const Json& value, const std::string& what) {
  if (value.is_array()) return std::vector<Json>(value.begin(), value.end());
  if (!value.is_object() || value.size() != 1 || !value.contains("range"))
    fail_expected(what, "a list [a, b] or {range: [first, last, step]}", value);
  const Json& r = value["range"];
  bool numbers = r.is_array() && (r.size() == 2 || r.size() == 3);
  bool integers = numbers;
  if (numbers)
    for (const auto& x : r) {
      numbers = numbers && x.is_number();
      if (!numbers) break;
      integers = integers && whole_number(x);
      numbers = numbers && std::fabs(x.get<double>()) <= 1e15;  // steps stay exact and can't overflow
    }
  if (!numbers) fail_expected(what + ".range", "[first, last] or [first, last, step] of numbers up to 1e15", r);
  std::vector<Json> out;
  const double first = r[0].get<double>(), last = r[1].get<double>(), step = r.size() == 3 ? r[2].get<double>() : 1.0;
  if (!(step != 0) || (last - first) / step < 0)
    fail_usage(fmt::format("{}.range: {} never reaches its end", what, r.dump()));
  const double count = std::floor((last - first) / step + 1e-9) + 1;
  if (!(count <= static_cast<double>(kMaxRangeValues)))
    fail_usage(fmt::format("{}.range: more than {} values", what, kMaxRangeValues));
  for (int64_t i = 0; i < static_cast<int64_t>(count); ++i) {
    if (integers)
      out.push_back(*whole_number(r[0]) + i * (r.size() == 3 ? *whole_number(r[2]) : 1));
    else
      out.push_back(first + static_cast<double>(i) * step);
  }
  return out;
}

Json without_nulls(const Json& tree) {
  if (!tree.is_structured()) return tree;
  Json out = tree.is_object() ? Json::object() : Json::array();
  if (tree.is_object()) {
    for (const auto& [key, value] : tree.items())
      if (!value.is_null()) out[key] = without_nulls(value);
  } else {
    for (const auto& value : tree) out.push_back(without_nulls(value));
  }
  return out;
}

void refuse_empty_list(const std::string& path, const Json& value, const std::string& instead) {
  if (value.is_array() && value.empty())
    fail_usage(
        fmt::format("{}: an empty list; leave the key out (or write null) for what holds without it{}", path, instead));
}

void fail_expected(const std::string& path, const std::string& what, const Json& found) {
  fail_usage(fmt::format("{}: expected {}, found {}", path, what, found.dump()));
}

ConfigReader::ConfigReader(const Config& config, std::string path) : config_(&config), path_(std::move(path)) {
  map_ = path_.empty() ? &config.tree : find_path(config.tree, path_);
  require_map();
}

ConfigReader::ConfigReader(const Json& map, std::string path) : path_(std::move(path)), map_(&map) { require_map(); }

void ConfigReader::require_map() {
  if (map_ && map_->is_null()) map_ = nullptr;
  if (map_ && !map_->is_object()) fail_expected("", "a map of `key: value` pairs", *map_);
}

std::string ConfigReader::place(const std::string& key) const {
  const std::string path = key.empty() ? path_ : join(path_, key);
  return config_ ? config_->where(path) + ": " + path : path;
}

const Json* ConfigReader::find(const std::string& key) {
  if (std::find(known_.begin(), known_.end(), key) == known_.end()) known_.push_back(key);
  if (!map_) return nullptr;
  const auto it = map_->find(key);
  return it == map_->end() || it->is_null() ? nullptr : &*it;
}

bool ConfigReader::has(const std::string& key) const { return map_ && map_->contains(key) && !(*map_)[key].is_null(); }

void ConfigReader::fail(const std::string& key, const std::string& message) const {
  fail_usage(fmt::format("{}: {}", place(key), message));
}

void ConfigReader::fail_expected(const std::string& key, const std::string& what, const Json& found) const {
  vqkv::fail_expected(place(key), what, found);
}

void ConfigReader::require(const std::string& key, const std::string& help) {
  if (!find(key)) fail("", fmt::format("`{}` is missing: {}", key, help));
}

std::string ConfigReader::text(const std::string& key, const std::string& fallback) {
  const Json* v = find(key);
  if (!v) return fallback;
  if (!v->is_string()) fail_expected(key, "a text", *v);
  return v->get<std::string>();
}

std::string ConfigReader::choice(const std::string& key, const std::string& fallback,
                                 const std::vector<std::string>& allowed) {
  const Json* v = find(key);
  if (!v) return fallback;
  const std::string value = v->is_string() ? v->get<std::string>() : v->dump();
  if (!v->is_string() || std::find(allowed.begin(), allowed.end(), value) == allowed.end())
    fail_unknown(place(key) + ":", value, allowed);
  return value;
}

int64_t ConfigReader::integer(const std::string& key, int64_t fallback, int64_t low, int64_t high) {
  const Json* v = find(key);
  if (!v) return fallback;
  const std::optional<int64_t> i = whole_number(*v);
  if (!i || *i < low || *i > high) fail_expected(key, fmt::format("an integer in [{}, {}]", low, high), *v);
  return *i;
}

bool ConfigReader::boolean(const std::string& key, bool fallback) {
  const Json* v = find(key);
  if (!v) return fallback;
  if (!v->is_boolean()) fail_expected(key, "true or false", *v);
  return v->get<bool>();
}

std::vector<int64_t> ConfigReader::integers(const std::string& key, int64_t low, int64_t high, bool may_be_all) {
  const Json* v = find(key);
  if (!v || (may_be_all && v->is_string() && v->get<std::string>() == "all")) return {};
  refuse_empty_list(place(key), *v, may_be_all ? ", or all" : "");
  std::vector<Json> values;
  if (v->is_number())
    values.push_back(*v);
  else if (v->is_string())
    fail_expected(key, std::string(may_be_all ? "all, " : "") + "a list of integers or {range: [first, last, step]}",
                  *v);
  else
    values = range_or_list(*v, place(key));
  std::vector<int64_t> out;
  for (const auto& x : values) {
    const std::optional<int64_t> i = whole_number(x);
    if (!i || *i < low || *i > high) fail_expected(key, fmt::format("integers in [{}, {}]", low, high), x);
    if (std::find(out.begin(), out.end(), *i) != out.end()) fail(key, fmt::format("{} stands twice", *i));
    out.push_back(*i);
  }
  return out;
}

std::vector<std::string> ConfigReader::texts(const std::string& key) {
  const Json* v = find(key);
  if (!v) return {};
  std::vector<std::string> out;
  if (v->is_string()) return {v->get<std::string>()};
  if (!v->is_array()) fail_expected(key, "a list of names", *v);
  refuse_empty_list(place(key), *v);
  for (const auto& x : *v) {
    if (!x.is_string()) fail_expected(key, "a list of names", x);
    out.push_back(x.get<std::string>());
  }
  return out;
}

const Json& ConfigReader::raw(const std::string& key) {
  static const Json none;
  const Json* v = find(key);
  return v ? *v : none;
}

void ConfigReader::finish() const {
  if (!map_) return;
  for (const auto& [key, value] : map_->items()) {
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    const std::string where = config_ ? config_->where(join(path_, key)) : "";
    fail_unknown_key(where + (where.empty() || path_.empty() ? "" : ": ") + path_, key, known_);
  }
}

}  // namespace vqkv
