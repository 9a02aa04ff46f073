#include "core/version.h"

#include "core/json.h"
#include "vqkv_revision.h"

namespace vqkv {

Json version_facts() {
  return {{"version", VQKV_VERSION},
          {"revision", VQKV_GIT_REVISION},
          {"dirty", VQKV_GIT_DIRTY},
          {"build", VQKV_BUILD_TYPE},
          {"compiler", __VERSION__}};
}

}  // namespace vqkv
