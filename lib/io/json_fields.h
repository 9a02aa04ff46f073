// Fields of JSON that stands in data files: what is missing, of another type or out of range is kBadData in one
// wording.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/json_fwd.h"

namespace vqkv {

// "`where`: 'key' is missing; an integer is expected", "`where`: 'key' must be an integer", "`where`: 'key' is 7;
// allowed: 0 to 5". Anything but an object has no fields.
int64_t integer_field(const Json& j, const char* key, int64_t low, int64_t high, const std::string& where);
double number_field(const Json& j, const char* key, const std::string& where);  // null, which stands for NaN: NaN
bool boolean_field(const Json& j, const char* key, const std::string& where);
std::string text_field(const Json& j, const char* key, const std::string& where);
const Json& map_field(const Json& j, const char* key, const std::string& where);
// `what` it must be: "a list of texts", whose entries are as `is` says.
const Json& list_field(const Json& j, const char* key, bool (*is)(const Json&), const char* what,
                       const std::string& where);
std::string choice_field(const Json& j, const char* key, std::initializer_list<const char*> allowed,
                         const std::string& where);

}  // namespace vqkv
