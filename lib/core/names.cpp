#include "core/names.h"

#include <fmt/format.h>

#include <algorithm>

namespace vqkv {
namespace {

std::string with_hints(const std::string& lead, const std::string& name, const std::vector<std::string>& known) {
  return fmt::format("{}{}; {}", lead, did_you_mean(name, known),
                     known.empty() ? "there are none" : fmt::format("allowed: {}", fmt::join(known, ", ")));
}

}  // namespace

std::string did_you_mean(const std::string& name, const std::vector<std::string>& known) {
  const std::string near = nearest_name(name, known);
  return near.empty() ? "" : fmt::format(", did you mean '{}'?", near);
}

std::string unknown_name(const std::string& what, const std::string& name, const std::vector<std::string>& known) {
  return with_hints(fmt::format("{} '{}' is not known", what, name), name, known);
}

void fail_unknown(const std::string& what, const std::string& name, const std::vector<std::string>& known) {
  fail_usage(unknown_name(what, name, known));
}

void refuse_twice(const std::string& what, const std::vector<std::string>& names) {
  for (auto name = names.begin(); name != names.end(); ++name)
    if (std::find(names.begin(), name, *name) != name) fail_usage(fmt::format("{}: '{}' stands twice", what, *name));
}

void fail_unknown_key(const std::string& path, const std::string& key, const std::vector<std::string>& known) {
  fail_usage(with_hints(fmt::format("{}{}unknown key '{}'", path, path.empty() ? "" : ": ", key), key, known));
}

}  // namespace vqkv
