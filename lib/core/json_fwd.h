// For headers that only name Json.
#pragma once
#include <nlohmann/json_fwd.hpp>

namespace vqkv {
using Json = nlohmann::json;
}
