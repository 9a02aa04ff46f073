#include "device/source_line.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <map>

namespace vqkv::device::emulated {

std::string Place::text() const {
  static std::map<Place, std::string>
      known;  // a program is started for each instruction, and a kernel that races asks often
  const auto [it, fresh] = known.emplace(*this, std::string());
  std::string& line = it->second;
  if (!fresh) return line;
  if (line_ > 0)
    return line = fmt::format("{}:{}", std::filesystem::path(static_cast<const char*>(at_)).filename().string(), line_);
  line = fmt::format("{}", at_);
  Dl_info image{};
  if (!dladdr(at_, &image) || !image.dli_fbase) return line;
  const auto within = reinterpret_cast<uintptr_t>(at_) - reinterpret_cast<uintptr_t>(image.dli_fbase) - 1;
  const std::string command = fmt::format("addr2line -s -e /proc/{}/exe {:#x} 2>/dev/null", getpid(), within);
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char text[512] = "";
    if (std::fgets(text, sizeof text, pipe) && text[0] != '?') {
      line = text;
      line.resize(line.find_last_not_of("\n ") + 1);
      if (const size_t more = line.find(" ("); more != std::string::npos) line.resize(more);  // a discriminator
    }
    pclose(pipe);
  }
  return line;
}

}  // namespace vqkv::device::emulated
