#include "core/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

namespace vqkv {

void fail_internal(const std::string& message) { throw Error(ErrorKind::kInternal, message); }
void fail_usage(const std::string& message) { throw Error(ErrorKind::kUsage, message); }
void fail_data(const std::string& message) { throw Error(ErrorKind::kBadData, message); }
void fail_unavailable(const std::string& message) { throw Error(ErrorKind::kUnavailable, message); }

void fail_check(const char* condition, const char* file, int line) {
  throw Error(ErrorKind::kInternal, fmt::format("internal check failed: {} ({}:{})", condition, file, line));
}

size_t checked_mul(size_t a, size_t b, const char* what) {
  size_t r = 0;
  if (__builtin_mul_overflow(a, b, &r)) fail_data(fmt::format("{}: {} x {} overflows", what, a, b));
  return r;
}

size_t checked_add(size_t a, size_t b, const char* what) {
  size_t r = 0;
  if (__builtin_add_overflow(a, b, &r)) fail_data(fmt::format("{}: {} + {} overflows", what, a, b));
  return r;
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
}

}  // namespace vqkv
