#pragma once
#include "core/json_fwd.h"

namespace vqkv {

// {version, revision, dirty, build, compiler}: what a bug report and a result record need.
Json version_facts();

}  // namespace vqkv
