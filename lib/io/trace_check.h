// A trace is bound to its bytes: nothing is measured on values that are no longer those of its content hash.
#pragma once
#include <memory>
#include <string>

#include "io/trace.h"

namespace vqkv {

// Opens a trace whose values are those it was written with; kBadData, naming what is wrong, when verify() finds a
// problem or the file changes meanwhile. The whole file is read once for each of its states: size, times of
// modification and status change and inode are remembered in PATH.verified. Of several processes one reads, the others
// wait for it. Where nothing can be remembered (a folder that can't be written), every call reads the file.
std::shared_ptr<const TraceReader> open_verified_trace(const std::string& path);

}  // namespace vqkv
