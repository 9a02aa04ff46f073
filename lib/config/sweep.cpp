#include "config/sweep.h"

#include <fmt/format.h>

#include "core/error.h"
#include "core/hash.h"

namespace vqkv {
namespace {

struct Axis {
  std::vector<std::string> paths;
  std::vector<std::string> shown;         // where each path stands: "sweep.grid.codec.bits"
  std::vector<std::vector<Json>> values;  // [choice][path]
  bool repeat = false;
};

struct Swept {
  std::string path, shown;
  Json values;
};

std::string at(const Config& c, const std::string& path) { return c.where(path) + ": " + path; }

// {codec: {bits: [4, 8]}} and {codec.bits: [4, 8]} are one spelling of an axis.
void flatten(const Config& c, const Json& map, const std::string& prefix, const std::string& shown,
             std::vector<Swept>& out) {
  for (const auto& [key, value] : map.items()) {
    const std::string path = prefix.empty() ? key : prefix + "." + key;
    split_path(path);
    const std::string name = shown + "." + key;
    if (value.is_null()) continue;
    refuse_empty_list(at(c, name), value);
    if (value.is_object() && !value.contains("range")) {
      flatten(c, value, path, name, out);
      continue;
    }
    for (const auto& other : out)
      if (other.path == path) fail_usage(fmt::format("{}: {} is swept twice", at(c, name), path));
    out.push_back({path, name, Json(range_or_list(value, at(c, name)))});
  }
}

void require_map(const Config& c, const Json& v, const std::string& path) {
  if (!v.is_object()) fail_expected(at(c, path), "a map of paths to lists", v);
}

void add_product(const Config& c, const Json& map, const std::string& shown, bool repeat, std::vector<Axis>& axes) {
  if (map.is_null()) return;
  require_map(c, map, shown);
  std::vector<Swept> flat;
  flatten(c, map, "", shown, flat);
  for (const auto& [path, place, values] : flat) {
    Axis a;
    a.paths = {path};
    a.shown = {place};
    a.repeat = repeat;
    for (const auto& v : values) a.values.push_back({v});
    axes.push_back(std::move(a));
  }
}

void add_zip(const Config& c, const Json& list, std::vector<Axis>& axes) {
  if (list.is_null()) return;
  const Json entries = list.is_object() ? Json::array({list}) : list;
  if (!entries.is_array()) fail_expected(at(c, "sweep.zip"), "a list of maps", entries);
  refuse_empty_list(at(c, "sweep.zip"), entries);
  for (size_t i = 0; i < entries.size(); ++i) {
    const std::string shown = fmt::format("sweep.zip[{}]", i);
    require_map(c, entries[i], shown);
    std::vector<Swept> flat;
    flatten(c, entries[i], "", shown, flat);
    if (flat.empty()) continue;
    Axis a;
    a.values.resize(flat[0].values.size());
    for (const auto& [path, place, values] : flat) {
      if (values.size() != a.values.size())
        fail_usage(fmt::format("{}: {} has {} values and {} has {}; zipped lists have one length", at(c, shown),
                               flat[0].path, a.values.size(), path, values.size()));
      a.paths.push_back(path);
      a.shown.push_back(place);
      for (size_t k = 0; k < values.size(); ++k) a.values[k].push_back(values[k]);
    }
    axes.push_back(std::move(a));
  }
}

bool matches(const Json& tree, const Json& rule) {
  for (const auto& [path, want] : rule.items()) {
    const Json* have = find_path(tree, path);
    if (want.is_object()) {
      if (!have || !matches(*have, want)) return false;
    } else if (!have || *have != want) {
      return false;
    }
  }
  return true;
}

}  // namespace

Sweep expand_sweep(const Config& config) {
  Json base = config.tree;
  base.erase("sweep");
  ConfigReader reader(config, "sweep");
  std::vector<Axis> axes;
  add_product(config, reader.raw("grid"), "sweep.grid", false, axes);
  add_zip(config, reader.raw("zip"), axes);
  add_product(config, reader.raw("repeat"), "sweep.repeat", true, axes);
  const Json skip = reader.raw("skip");
  const bool streaming = reader.boolean("streaming", config.tree.contains("sweep") && config.tree["sweep"].is_object());
  reader.finish();
  if (!skip.is_null() && !skip.is_array()) fail_expected(at(config, "sweep.skip"), "a list of maps", skip);
  refuse_empty_list(at(config, "sweep.skip"), skip);
  for (size_t i = 0; i < skip.size(); ++i) {
    require_map(config, skip[i], fmt::format("sweep.skip[{}]", i));
    if (skip[i].empty())
      fail_usage(fmt::format("{}: an empty rule would skip every cell", at(config, fmt::format("sweep.skip[{}]", i))));
  }

  int64_t count = 1;
  for (size_t i = 0; i < axes.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      for (const auto& p : axes[i].paths)
        for (const auto& q : axes[j].paths)
          if (p == q || p.starts_with(q + ".") || q.starts_with(p + "."))
            fail_usage(fmt::format("{}: {} and {} are both swept, and one would overwrite the other",
                                   at(config, "sweep"), q, p));
    count *= static_cast<int64_t>(axes[i].values.size());
    if (count > kMaxSweepPoints)
      fail_usage(fmt::format("{}: more than {} cells", at(config, "sweep"), kMaxSweepPoints));
  }

  const int64_t bytes = static_cast<int64_t>(canonical_json(base).size()) + 64;
  if (count > kMaxSweepBytes / bytes)
    fail_usage(fmt::format("{}: {} cells of {} bytes each are too much", at(config, "sweep"), count, bytes));

  Sweep out;
  out.marks = config.marks;
  out.streaming = streaming;
  for (const auto& a : axes)
    for (size_t k = 0; k < a.paths.size(); ++k)
      out.marks[mark_path(base, a.paths[k])] = {config.where(a.shown[k]), 0, 0};
  out.points.reserve(static_cast<size_t>(count));
  std::vector<size_t> choice(axes.size(), 0);
  for (int64_t i = 0; i < count; ++i) {
    SweepPoint p;
    p.tree = base;
    for (size_t a = 0; a < axes.size(); ++a) {
      for (size_t k = 0; k < axes[a].paths.size(); ++k) {
        const std::string& path = axes[a].paths[k];
        const Json& value = axes[a].values[choice[a]][k];
        set_path(p.tree, path, value);
        (axes[a].repeat ? p.repeat : p.axes)[path] = value;
      }
    }
    for (size_t s = 0; s < skip.size() && p.skip.empty(); ++s)
      if (matches(p.tree, skip[s])) p.skip = fmt::format("sweep.skip[{}] matches: {}", s, canonical_json(skip[s]));
    out.points.push_back(std::move(p));
    for (size_t a = axes.size(); a-- > 0;) {
      if (++choice[a] < axes[a].values.size()) break;
      choice[a] = 0;
    }
  }
  return out;
}

std::string config_hash(const Json& value) { return sha256_hex(canonical_json(value)); }

}  // namespace vqkv
