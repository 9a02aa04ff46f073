// Evaluates the bits formula of a method's description, so that the documentation can't drift from the layout.
// expression: a ? b : c over + - * / == <, numbers, names, words, and log2 ceil floor min max.
#pragma once
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/json.h"

namespace vqkv::test {

class Formula {
 public:
  // Numbers and booleans of `values` are names; a string is compared with a bare word: mode == symmetric.
  static double evaluate(const std::string& text, const Json& values) {
    Formula f(text, values);
    const Value v = f.ternary();
    f.skip();
    if (f.at_ != text.size()) f.fail("unexpected '" + text.substr(f.at_) + "'");
    return f.number(v);
  }

 private:
  struct Value {
    bool is_word = false;
    double number = 0;
    std::string word;
  };
  Formula(const std::string& text, const Json& values) : text_(text), values_(values) {}

  [[noreturn]] void fail(const std::string& why) const { throw std::runtime_error("formula '" + text_ + "': " + why); }
  double number(const Value& v) const {
    if (v.is_word) fail("'" + v.word + "' is neither a knob nor a number");
    return v.number;
  }
  void skip() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  bool eat(const std::string& token) {
    skip();
    if (text_.compare(at_, token.size(), token) != 0) return false;
    at_ += token.size();
    return true;
  }
  static Value of(double d) { return {false, d, ""}; }

  Value ternary() {
    const Value condition = comparison();
    if (!eat("?")) return condition;
    const Value yes = ternary();
    if (!eat(":")) fail("':' expected");
    const Value no = ternary();
    return number(condition) != 0 ? yes : no;
  }
  Value comparison() {
    Value left = sum();
    if (eat("==")) {
      const Value right = sum();
      if (left.is_word || right.is_word) return of(left.is_word && right.is_word && left.word == right.word);
      return of(left.number == right.number);
    }
    if (eat("<")) return of(number(left) < number(sum()));
    return left;
  }
  Value sum() {
    Value left = product();
    for (;;) {
      if (eat("+"))
        left = of(number(left) + number(product()));
      else if (eat("-"))
        left = of(number(left) - number(product()));
      else
        return left;
    }
  }
  Value product() {
    Value left = primary();
    for (;;) {
      if (eat("*"))
        left = of(number(left) * number(primary()));
      else if (eat("/"))
        left = of(number(left) / number(primary()));
      else
        return left;
    }
  }
  Value primary() {
    skip();
    if (eat("(")) {
      const Value v = ternary();
      if (!eat(")")) fail("')' expected");
      return v;
    }
    if (at_ < text_.size() && (std::isdigit(static_cast<unsigned char>(text_[at_])) || text_[at_] == '.')) {
      char* end = nullptr;
      const double d = std::strtod(text_.c_str() + at_, &end);
      at_ = static_cast<size_t>(end - text_.c_str());
      return of(d);
    }
    std::string name;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_'))
      name += text_[at_++];
    if (name.empty()) fail("a value expected at '" + text_.substr(at_) + "'");
    if (eat("(")) return call(name);
    if (!values_.contains(name)) return {true, 0, name};
    const Json& v = values_[name];
    if (v.is_string()) return {true, 0, v.get<std::string>()};
    return of(v.is_boolean() ? (v.get<bool>() ? 1.0 : 0.0) : v.get<double>());
  }
  Value call(const std::string& name) {
    const double a = number(ternary());
    double b = 0;
    const bool two = eat(",");
    if (two) b = number(ternary());
    if (!eat(")")) fail("')' expected");
    if (name == "log2" && !two) return of(std::log2(a));
    if (name == "ceil" && !two) return of(std::ceil(a));
    if (name == "floor" && !two) return of(std::floor(a));
    if (name == "min" && two) return of(std::min(a, b));
    if (name == "max" && two) return of(std::max(a, b));
    fail("unknown function '" + name + "'");
  }

  const std::string& text_;
  const Json& values_;
  size_t at_ = 0;
};

}  // namespace vqkv::test
