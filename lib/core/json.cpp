#include "core/json.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <set>
#include <vector>

#include "core/error.h"

template class nlohmann::basic_json<>;

namespace vqkv {
namespace {

constexpr int kMaxDepth = 64;

void append_canonical(const Json& v, std::string& out) {
  switch (v.type()) {
    case Json::value_t::object: {
      out += '{';
      bool first = true;
      for (const auto& [key, item] : v.items()) {
        if (!first) out += ',';
        first = false;
        out += Json(key).dump();
        out += ':';
        append_canonical(item, out);
      }
      out += '}';
      return;
    }
    case Json::value_t::array: {
      out += '[';
      for (size_t i = 0; i < v.size(); ++i) {
        if (i) out += ',';
        append_canonical(v[i], out);
      }
      out += ']';
      return;
    }
    case Json::value_t::number_float: {
      const double d = v.get<double>();
      if (!std::isfinite(d)) fail_usage("a configuration value is not a finite number");
      char buffer[64];
      const auto r = std::to_chars(buffer, buffer + sizeof buffer, d);
      std::string text(buffer, r.ptr);
      out += text;
      return;
    }
    default:
      out += v.dump();
  }
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  std::vector<std::set<std::string>> keys;
  const auto line_of = [&](size_t byte) {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < byte && i < text.size(); ++i) {
      if (text[i] == '\n') {
        ++line;
        column = 1;
      } else {
        ++column;
      }
    }
    return fmt::format("{}:{}:{}", where, line, column);
  };
  const Json::parser_callback_t watch = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMaxDepth) fail_data(fmt::format("{}: nested deeper than {} levels", where, kMaxDepth));
    switch (event) {
      case Json::parse_event_t::object_start:
        keys.emplace_back();
        break;
      case Json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!keys.back().insert(value.get<std::string>()).second)
          fail_data(fmt::format("{}: key \"{}\" stands twice in one object", where, value.get<std::string>()));
        break;
      default:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::parse_error& e) {
    // The library's own number and place in front of its words say less than ours.
    const std::string_view all = e.what();
    const size_t words = all.find("syntax error");
    fail_data(fmt::format("{}: not valid JSON: {}", line_of(e.byte ? e.byte - 1 : 0),
                          words == std::string_view::npos ? all : all.substr(words)));
  } catch (const Json::exception& e) { fail_data(fmt::format("{}: not valid JSON: {}", where, e.what())); }
}

std::string canonical_json(const Json& value) {
  std::string out;
  append_canonical(value, out);
  return out;
}

}  // namespace vqkv
