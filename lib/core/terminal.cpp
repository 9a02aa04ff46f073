#include "core/terminal.h"

#include <sys/ioctl.h>

#include <algorithm>

namespace vqkv {
namespace {

bool begins_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }

}  // namespace

size_t terminal_columns(int descriptor) {
  winsize size{};
  return ioctl(descriptor, TIOCGWINSZ, &size) == 0 ? size_t{size.ws_col} : size_t{0};
}

size_t text_columns(std::string_view line) {
  return static_cast<size_t>(std::count_if(line.begin(), line.end(), begins_character));
}

std::string_view first_columns(std::string_view line, size_t columns) {
  size_t seen = 0;
  for (size_t at = 0; at < line.size(); ++at)
    if (begins_character(line[at]) && ++seen > columns) return line.substr(0, at);
  return line;
}

}  // namespace vqkv
