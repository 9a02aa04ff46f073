// Where in the source something happens.
#pragma once
#include <compare>
#include <cstdint>
#include <source_location>
#include <string>

namespace vqkv::device::emulated {

// A place that source code names itself, or the instruction behind a call.
class Place {
 public:
  Place(const std::source_location& site)  // NOLINT: a site is a place
      : at_(site.file_name()), line_(site.line()), column_(site.column()) {}
  explicit Place(const void* instruction) : at_(instruction) {}
  auto operator<=>(const Place&) const = default;
  // "file.cu:12"; an instruction's address where addr2line or debug information is missing.
  std::string text() const;

 private:
  const void* at_;
  uint32_t line_ = 0, column_ = 0;  // 0: at_ is an instruction
};

}  // namespace vqkv::device::emulated
