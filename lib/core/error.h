// Errors: one exception type whose kind is the documented exit code of the tools.
#pragma once
#include <stdexcept>
#include <string>

namespace vqkv {

// The value is the exit code of a tool that ends with such an error.
enum class ErrorKind : int {
  kInternal = 1,     // our fault
  kUsage = 2,        // command line or configuration
  kBadData = 3,      // a file, model or trace that is not what it claims
  kUnavailable = 4,  // a requested backend or device that is not there
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

[[noreturn]] void fail_internal(const std::string& message);
[[noreturn]] void fail_usage(const std::string& message);
[[noreturn]] void fail_data(const std::string& message);
[[noreturn]] void fail_unavailable(const std::string& message);

// A violated precondition of our own code: always checked, throws kInternal with the place.
[[noreturn]] void fail_check(const char* condition, const char* file, int line);
#define VQKV_CHECK(condition) ((condition) ? (void)0 : ::vqkv::fail_check(#condition, __FILE__, __LINE__))

// Overflow-checked size arithmetic for everything read from a file; throws kBadData naming `what`.
size_t checked_mul(size_t a, size_t b, const char* what);
size_t checked_add(size_t a, size_t b, const char* what);

// The entry of `known` nearest to `name` (edit distance), or "" when nothing is near.
template <class Range>
std::string nearest_name(const std::string& name, const Range& known);
size_t edit_distance(const std::string& a, const std::string& b);

template <class Range>
std::string nearest_name(const std::string& name, const Range& known) {
  std::string best;
  size_t best_distance = name.size() / 2 + 2;
  for (const auto& k : known) {
    const size_t distance = edit_distance(name, std::string(k));
    if (distance < best_distance) {
      best_distance = distance;
      best = std::string(k);
    }
  }
  return best;
}

}  // namespace vqkv
