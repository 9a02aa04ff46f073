// Fields of JSON that stands in data files: what is missing, of another type or out of range is kBadData in one
// wording.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/json_fwd.h"

namespace vqkv {

// "`where`: 'key' must be an integer", "`where`: 'key' is 7; allowed: 0 to 5". Anything but an object has no fields.
int64_t integer_field(const Json& j, const char* key, int64_t low, int64_t high, const std::string& where);
std::string text_field(const Json& j, const char* key, const std::string& where);
std::string choice_field(const Json& j, const char* key, std::initializer_list<const char*> allowed,
                         const std::string& where);

}  // namespace vqkv
