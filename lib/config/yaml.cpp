// The walk over yaml-cpp's events rather than its nodes: nodes keep duplicate keys silently, share aliased subtrees
// that a walker then expands without bound, and turn `yes` into a bool.
#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <sstream>
#include <unordered_map>

#include "config/config.h"
#include "core/error.h"

namespace vqkv {
namespace {

bool one_of(std::string_view s, std::initializer_list<std::string_view> list) {
  for (const auto& x : list)
    if (s == x) return true;
  return false;
}

bool all_digits(std::string_view s) {
  return !s.empty() && s.find_first_not_of("0123456789") == std::string_view::npos;
}

// [-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?
bool looks_like_float(std::string_view s) {
  if (!s.empty() && (s[0] == '-' || s[0] == '+')) s.remove_prefix(1);
  const size_t e = s.find_first_of("eE");
  std::string_view mantissa = s.substr(0, e);
  if (e != std::string_view::npos) {
    std::string_view exponent = s.substr(e + 1);
    if (!exponent.empty() && (exponent[0] == '-' || exponent[0] == '+')) exponent.remove_prefix(1);
    if (!all_digits(exponent)) return false;
  }
  const size_t dot = mantissa.find('.');
  if (dot == std::string_view::npos) return all_digits(mantissa);
  const std::string_view whole = mantissa.substr(0, dot), part = mantissa.substr(dot + 1);
  if (whole.empty()) return all_digits(part);
  return all_digits(whole) && (part.empty() || all_digits(part));
}

// A plain scalar by the core schema of YAML 1.2; `problem` is set for a number that can't be held.
Json core_scalar(const std::string& s, std::string& problem) {
  if (one_of(s, {"", "~", "null", "Null", "NULL"})) return Json();
  if (one_of(s, {"true", "True", "TRUE"})) return true;
  if (one_of(s, {"false", "False", "FALSE"})) return false;
  std::string_view digits = s;
  int base = 10;
  if (digits.starts_with("0x")) {
    base = 16;
    digits.remove_prefix(2);
  } else if (digits.starts_with("0o")) {
    base = 8;
    digits.remove_prefix(2);
  } else if (digits.starts_with("+"))
    digits.remove_prefix(1);
  const std::string_view unsigned_part =
      base == 10 && digits.starts_with("-") && !s.starts_with("+") ? digits.substr(1) : digits;
  const bool integral =
      base == 10  ? all_digits(unsigned_part)
      : base == 8 ? !digits.empty() && digits.find_first_not_of("01234567") == std::string_view::npos
                  : !digits.empty() && digits.find_first_not_of("0123456789abcdefABCDEF") == std::string_view::npos;
  if (integral) {
    int64_t value = 0;
    const auto r = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
    if (r.ec != std::errc()) problem = fmt::format("the integer '{}' does not fit 64 bits", s);
    return value;
  }
  if (looks_like_float(s)) {
    double value = 0;
    const char* first = s.data() + (s[0] == '+' ? 1 : 0);
    const auto r = std::from_chars(first, s.data() + s.size(), value);
    if (r.ec != std::errc() || r.ptr != s.data() + s.size() || !std::isfinite(value))
      problem = fmt::format("the number '{}' is out of range", s);
    return value;
  }
  std::string_view inf = s;
  if (!inf.empty() && (inf[0] == '-' || inf[0] == '+')) inf.remove_prefix(1);
  if (one_of(inf, {".inf", ".Inf", ".INF"}) || one_of(s, {".nan", ".NaN", ".NAN"}))
    problem = fmt::format("'{}' is not a finite number", s);
  return s;
}

// Position of the first byte that is not UTF-8 (or is NUL), or npos.
size_t invalid_utf8(std::string_view t) {
  for (size_t i = 0; i < t.size();) {
    const auto c = static_cast<unsigned char>(t[i]);
    const int n = c == 0                  ? 0
                  : c < 0x80              ? 1
                  : c >= 0xC2 && c < 0xE0 ? 2
                  : c >= 0xE0 && c < 0xF0 ? 3
                  : c >= 0xF0 && c < 0xF5 ? 4
                                          : 0;
    if (n == 0 || i + static_cast<size_t>(n) > t.size()) return i;
    uint32_t code = n == 1 ? c : c & (0xFFu >> (n + 1));
    for (int k = 1; k < n; ++k) {
      const auto d = static_cast<unsigned char>(t[i + static_cast<size_t>(k)]);
      if ((d & 0xC0) != 0x80) return i;
      code = (code << 6) | (d & 0x3Fu);
    }
    if ((n == 3 && code < 0x800) || (n == 4 && (code < 0x10000 || code > 0x10FFFF)) ||
        (code >= 0xD800 && code < 0xE000))
      return i;
    i += static_cast<size_t>(n);
  }
  return std::string_view::npos;
}

// Long texts weigh more, so that an alias to one can't multiply memory either.
int64_t weight(size_t bytes) { return 1 + static_cast<int64_t>(bytes / 32); }
constexpr size_t kMaxMarkBytes = 8 << 20;  // paths of deep trees are long; positions beyond this are not kept

class Builder final : public YAML::EventHandler {
 public:
  explicit Builder(std::string file) : file_(std::move(file)) {}

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& m, YAML::anchor_t anchor) override {
    if (expects_key()) fail(m, "a key is missing before ':'");
    place(Json(), m, anchor, 1);
  }
  void OnAlias(const YAML::Mark& m, YAML::anchor_t anchor) override {
    if (expects_key()) fail(m, "an alias can't be a key");
    const auto it = anchors_.find(anchor);
    if (it == anchors_.end()) fail(m, "an alias to a value that contains it");
    place(it->second.value, m, 0, it->second.nodes);
  }
  void OnScalar(const YAML::Mark& m, const std::string& tag, YAML::anchor_t anchor, const std::string& value) override {
    if (tag != "?" && tag != "!" && !tag.empty()) fail(m, fmt::format("tags are not supported, found {}", tag));
    // Escapes can make what the file itself may not hold: "\0", and yaml-cpp turns "\N" and "\_" into lone bytes.
    if (invalid_utf8(value) != std::string::npos) fail(m, "an escape that gives NUL or a text that is not UTF-8");
    if (expects_key()) {
      if (anchor) fail(m, "an anchor on a key");
      set_key(value, tag != "!", m);
      return;
    }
    std::string problem;
    Json v = tag == "!" ? Json(value) : core_scalar(value, problem);
    if (!problem.empty()) fail(m, problem);
    place(std::move(v), m, anchor, weight(value.size()));
  }
  void OnSequenceStart(const YAML::Mark& m, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(Json::array(), m, tag, anchor);
  }
  void OnMapStart(const YAML::Mark& m, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(Json::object(), m, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapEnd() override { close(); }

  bool has_root = false;
  Json root;
  std::map<std::string, ConfigMark> marks;

 private:
  struct Level {
    Json value;
    std::string key, path;
    bool has_key = false;
    YAML::anchor_t anchor = 0;
    YAML::Mark mark;
    int64_t nodes = 1;
  };
  struct Anchored {
    Json value;
    int64_t nodes = 0;
  };

  [[noreturn]] void fail(const YAML::Mark& m, const std::string& message) const {
    fail_usage(fmt::format("{}:{}:{}: {}", file_, m.line + 1, m.column + 1, message));
  }
  bool expects_key() const { return !levels_.empty() && levels_.back().value.is_object() && !levels_.back().has_key; }
  void mark(const std::string& path, const YAML::Mark& m) {
    mark_bytes_ += path.size() + file_.size() + sizeof(ConfigMark);
    if (mark_bytes_ <= kMaxMarkBytes) marks[path] = {file_, m.line + 1, m.column + 1};
  }
  std::string path_here() const {
    if (levels_.empty()) return "";
    const Level& l = levels_.back();
    if (l.value.is_array()) return fmt::format("{}[{}]", l.path, l.value.size());
    return l.path.empty() ? l.key : l.path + "." + l.key;
  }
  void set_key(const std::string& key, bool plain, const YAML::Mark& m) {
    Level& l = levels_.back();
    if (plain && key == "<<") fail(m, "merge keys (<<) are not supported; use include or write the values out");
    if (key.empty()) fail(m, "an empty key");
    if (key.size() > 256) fail(m, "a key longer than 256 bytes");
    if (l.value.contains(key)) fail(m, fmt::format("key '{}' stands twice in one map", key));
    l.key = key;
    l.has_key = true;
    l.value[key] = Json();
    l.nodes += weight(key.size());
    nodes_ += weight(key.size());
    mark(path_here(), m);
  }
  void place(Json v, const YAML::Mark& m, YAML::anchor_t anchor, int64_t nodes) {
    nodes_ += nodes;
    if (nodes_ > kMaxConfigNodes)
      fail(m, fmt::format("more than {} values (aliases count each time)", kMaxConfigNodes));
    if (anchor) anchors_[anchor] = {v, nodes};
    if (levels_.empty()) {
      root = std::move(v);
      has_root = true;
      return;
    }
    Level& l = levels_.back();
    l.nodes += nodes;
    if (l.value.is_array()) {
      mark(path_here(), m);
      l.value.push_back(std::move(v));
    } else {
      l.value[l.key] = std::move(v);
      l.has_key = false;
    }
  }
  void open(Json empty, const YAML::Mark& m, const std::string& tag, YAML::anchor_t anchor) {
    if (!tag.empty() && tag != "?" && tag != "!") fail(m, fmt::format("tags are not supported, found {}", tag));
    if (expects_key()) fail(m, "a key must be a plain text, not a list or a map; is a bracket left open?");
    if (levels_.size() >= static_cast<size_t>(kMaxConfigDepth))
      fail(m, fmt::format("nested deeper than {} levels", kMaxConfigDepth));
    Level l;
    l.path = path_here();
    l.value = std::move(empty);
    l.anchor = anchor;
    l.mark = m;
    levels_.push_back(std::move(l));
  }
  void close() {
    Level l = std::move(levels_.back());
    levels_.pop_back();
    nodes_ -= l.nodes - 1;  // place() counts the whole subtree again
    place(std::move(l.value), l.mark, l.anchor, l.nodes);
  }

  std::string file_;
  std::vector<Level> levels_;
  std::unordered_map<YAML::anchor_t, Anchored> anchors_;
  int64_t nodes_ = 0;
  size_t mark_bytes_ = 0;
};

// Column of a tab in the leading white space of line `number` (both from 0), or -1.
int tab_in_indentation(std::string_view text, int number) {
  for (; number > 0 && !text.empty(); --number) text.remove_prefix(std::min(text.find('\n'), text.size() - 1) + 1);
  const size_t end = std::min(text.find_first_not_of(" \t"), text.size()), tab = text.substr(0, end).find('\t');
  return tab == std::string_view::npos ? -1 : static_cast<int>(tab);
}

void parse_into(Builder& builder, std::string_view text, const std::string& file) {
  if (static_cast<int64_t>(text.size()) > kMaxConfigBytes)
    fail_usage(fmt::format("{}: {} bytes; a configuration has at most {}", file, text.size(), kMaxConfigBytes));
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  if (const size_t bad = invalid_utf8(text); bad != std::string_view::npos)
    fail_usage(fmt::format("{}: byte {} is not UTF-8 text", file, bad));
  std::istringstream in{std::string(text)};
  try {
    YAML::Parser parser(in);
    if (!parser.HandleNextDocument(builder)) return;
    Builder second(file);
    if (parser.HandleNextDocument(second)) fail_usage(fmt::format("{}: more than one YAML document", file));
  } catch (const YAML::Exception& e) {
    if (const int tab = tab_in_indentation(text, e.mark.line); tab >= 0)
      fail_usage(fmt::format("{}:{}:{}: a tab in front of the line; YAML is indented with spaces", file,
                             e.mark.line + 1, tab + 1));
    fail_usage(fmt::format("{}:{}:{}: not valid YAML: {}", file, e.mark.line + 1, e.mark.column + 1, e.msg));
  }
}

}  // namespace

Config parse_yaml(std::string_view text, const std::string& file) {
  Builder builder(file);
  parse_into(builder, text, file);
  Config out;
  out.marks = std::move(builder.marks);
  if (!builder.has_root || builder.root.is_null()) return out;
  if (!builder.root.is_object()) fail_usage(fmt::format("{}: the document must be a map (key: value)", file));
  out.tree = std::move(builder.root);
  return out;
}

Json parse_yaml_value(std::string_view text, const std::string& what) {
  Builder builder(what);
  parse_into(builder, text, what);
  return builder.root;
}

}  // namespace vqkv
