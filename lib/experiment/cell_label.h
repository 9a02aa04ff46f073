// A cell in words, for rows and figures.
#pragma once
#include <string>

#include "core/json.h"

namespace vqkv {

// A value as a plan writes it: texts without quotes, lists in brackets.
std::string written(const Json& value);

// The methods of a cell's configuration: "rvq"; "rvq + kivi" where keys and values have one each; "rvq, older pq" for
// tiers.
std::string codec_names(const Json& config);

// The same and what the axes of its sweep set: "rvq codebooks=4 bits=8 k(rope=pre)".
std::string cell_label(const Json& cell);

}  // namespace vqkv
