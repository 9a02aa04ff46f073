// What a call that must be refused says, and that it says what it must.
#pragma once
#include <functional>
#include <initializer_list>
#include <string>

#include "core/error.h"
#include "support/catch.h"

namespace vqkv {

// The message of the Error of this kind that `call` ends in; empty where it ends well.
inline std::string error_of(const std::function<void()>& call, ErrorKind kind = ErrorKind::kUsage) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(static_cast<int>(e.kind()) == static_cast<int>(kind));
    return e.what();
  }
  return "";
}
inline std::string data_error_of(const std::function<void()>& call) { return error_of(call, ErrorKind::kBadData); }

inline void check_says(const std::string& message, std::initializer_list<const char*> parts) {
  INFO("message: " << message);
  CHECK_FALSE(message.empty());
  for (const char* part : parts) CHECK(message.find(part) != std::string::npos);
}

inline void check_says(const std::string& message, const std::string& part) {
  INFO("message: " << message);
  CHECK(message.find(part) != std::string::npos);
}

}  // namespace vqkv
