// The tools as functions, for programs that add methods of their own: such a program is the tool, with these methods
// beside the built-in ones (docs/extending.md). Installed, as target vqkv::tools.
#pragma once
#include <vector>

#include "codec/codec.h"

namespace vqkv {

using Methods = std::vector<const Method*>;
class DeviceForms;

// What `main` returns: the exit code of the tool. A method that can't be registered is 2. device: null where the
// program has no kernels for one.
int dump_main(int argc, char** argv, const Methods& methods = {}, const DeviceForms* device = nullptr);
int sweep_main(int argc, char** argv, const Methods& methods = {});
int eval_main(int argc, char** argv, const Methods& methods = {}, const DeviceForms* device = nullptr);

}  // namespace vqkv
