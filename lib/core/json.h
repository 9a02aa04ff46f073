// JSON: strict parsing and the canonical form that identities are made of.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

extern template class nlohmann::basic_json<>;  // compiled once, in json.cpp

namespace vqkv {

using Json = nlohmann::json;  // objects are sorted maps, so a dump has one key order

// Strict: a duplicate key, more than 64 levels, or a number that is not finite is an error.
// `where` names the file for the message (kBadData, with line and column).
Json parse_json(std::string_view text, const std::string& where);

// Canonical text: sorted keys, no spaces, shortest round-trip numbers; an integral double prints as an integer,
// so that 4 and 4.0 have one identity.
std::string canonical_json(const Json& value);

}  // namespace vqkv
