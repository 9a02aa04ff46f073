// What the lines of a plan's file are held against.
#pragma once
#include <string>
#include <vector>

#include "core/json.h"

namespace vqkv {

// What the line of a cell says that its own configuration doesn't, or "". Json::exception: its configuration
// lacks a field.
std::string cell_problem(const Json& cell);
// Plan::hash() of cells.
std::string plan_hash(const std::vector<Json>& cells);
// Of the cells' lines as their file holds them.
std::string hash_of_lines(const std::vector<Json>& cells);

}  // namespace vqkv
