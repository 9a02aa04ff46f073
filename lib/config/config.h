// Configuration: strict YAML, includes and key=value overrides, as one JSON tree that remembers where each value
// stands. A YAML path is an override's path is a result column. No interpolation and no environment: a file means the
// same tomorrow.
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/json.h"

namespace vqkv {

struct ConfigMark {
  std::string file;  // or "command line"
  int line = 0;      // from 1; 0: no position (an override)
  int column = 0;
  std::string text() const;  // "file:line:column"
};

struct Config {
  Json tree = Json::object();
  std::map<std::string, ConfigMark> marks;  // by path: "codec.k.bits", "sweep.skip[0].codec.name"
  std::vector<std::string> overrides;       // applied so far, in order: they hold over a group chosen later, too

  // "file:line:column" of `path`, or of its nearest enclosing path.
  std::string where(const std::string& path) const;
  // `message` led by the position of the longest path of this configuration that it names or leads to, so that a check
  // deep in a codec, which knows "codec.k.bits" and no file, still points at the line. Once is enough.
  std::string annotate(const std::string& message) const;
};

// What `f` gives; a usage error from below it gets its position here.
template <class F>
auto annotated(const Config& config, F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kUsage) throw;
    fail_usage(config.annotate(e.what()));
  }
}

// Limits that hostile files run into: a message and kUsage instead of a hang.
inline constexpr int64_t kMaxConfigBytes = 1 << 20;  // a file
inline constexpr int kMaxConfigDepth = 32;
inline constexpr int kMaxConfigNodes = 200'000;  // after aliases are expanded; a long text weighs more
inline constexpr int kMaxConfigFiles = 64;       // opened through include

// One document whose root is a map (an empty file is an empty map). Refused: duplicate keys, merge keys (<<), tags,
// keys that are not scalars, infinities and NaN, text that is not UTF-8. Plain scalars follow the core schema of
// YAML 1.2, so `yes` and `on` are strings. Throws kUsage with file:line:column.
Config parse_yaml(std::string_view text, const std::string& file);

// A scalar or flow collection, as in the value of an override.
Json parse_yaml_value(std::string_view text, const std::string& what);

// The file with its `include:` (a path or a list, relative to the file that names them) merged in order below it.
Config load_config(const std::string& path);

// Maps merge key by key, anything else in `over` replaces what stands in `base`.
void merge_config(Config& base, const Config& over);

// "a.b=value". The value is YAML (a scalar or flow collection), but for trace.path and group, which are texts and keep
// every character. Below sweep.grid and sweep.repeat the rest of the path is one key, as in the file.
void apply_override(Config& config, const std::string& assignment);

// `groups: {test: {...}}` are named sets of values; `group: test` merges one over the rest, overrides apart. Both keys
// disappear.
void apply_group(Config& config);

// "codec.bits" as one key of a map, at any depth below `path` (not inside lists): kUsage that says how to nest it.
void refuse_dotted_keys(const Config& config, const std::string& path = "");

// "codec.k.bits" -> {"codec", "k", "bits"}; kUsage for an empty part.
std::vector<std::string> split_path(const std::string& path);
// Null when absent. A number names an entry of a list: "codec.tiers.0.bits".
const Json* find_path(const Json& tree, const std::string& path);
Json* find_path(Json& tree, const std::string& path);
// The path as marks and messages spell it, entries of lists in brackets: "codec.tiers[0].bits".
std::string mark_path(const Json& tree, const std::string& path);
// Creates the maps on the way; kUsage when something on the way is neither a map nor a list that has such an entry.
void set_path(Json& tree, const std::string& path, Json value);

// Without the keys whose value is null, at any depth: null is a key that was not given.
Json without_nulls(const Json& tree);

// kUsage for a list without entries: what it would mean (none? all?) nobody can say. `instead`: what to write, beside
// leaving the key out.
void refuse_empty_list(const std::string& path, const Json& value, const std::string& instead = "");

// kUsage: "`path`: expected `what`, found `found`".
[[noreturn]] void fail_expected(const std::string& path, const std::string& what, const Json& found);

// Strict typed reading of one map. Every key must be asked for; finish() refuses the others with the nearest name. A
// key whose value is null counts as absent, and a list is never empty.
class ConfigReader {
 public:
  ConfigReader(const Config& config, std::string path);  // the map at `path`; absent or null reads as empty
  // A map whose file is not known here: messages carry the path alone, and Config::annotate finds the line.
  ConfigReader(const Json& map, std::string path);
  bool has(const std::string& key) const;
  std::string text(const std::string& key, const std::string& fallback);
  int64_t integer(const std::string& key, int64_t fallback, int64_t low, int64_t high);
  bool boolean(const std::string& key, bool fallback);
  std::string choice(const std::string& key, const std::string& fallback, const std::vector<std::string>& allowed);
  // A list of integers: [0, 3], {range: [0, 6]} or {range: [0, 6, 2]} (inclusive), or one integer. `all` where
  // `fallback_all`: empty result.
  std::vector<int64_t> integers(const std::string& key, int64_t low, int64_t high, bool may_be_all);
  std::vector<std::string> texts(const std::string& key);
  const Json& raw(const std::string& key);  // null when absent
  // Refuses a map without `key`; `help` says what belongs there.
  void require(const std::string& key, const std::string& help);
  void finish() const;
  [[noreturn]] void fail(const std::string& key, const std::string& message) const;

 private:
  const Json* find(const std::string& key);
  std::string place(const std::string& key) const;  // "file:line:column: path.key"
  [[noreturn]] void fail_expected(const std::string& key, const std::string& what, const Json& found) const;
  void require_map();
  const Config* config_ = nullptr;
  std::string path_;
  const Json* map_ = nullptr;
  std::vector<std::string> known_;
};

// The values of a {range: [first, last]} or {range: [first, last, step]} or of a list; `what` leads messages.
std::vector<Json> range_or_list(const Json& value, const std::string& what);

}  // namespace vqkv
