// How wide text and terminals are, in columns.
#pragma once
#include <cstddef>
#include <string_view>

namespace vqkv {

// Of the terminal that a descriptor is; 0 where it is none, or doesn't say.
size_t terminal_columns(int descriptor);
// Of one line of UTF-8: its code points.
size_t text_columns(std::string_view line);
// As much of the line as `columns` hold.
std::string_view first_columns(std::string_view line, size_t columns);

}  // namespace vqkv
