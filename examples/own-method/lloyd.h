#pragma once
#include "codec/codec.h"

namespace lloyd {
const vqkv::Method& vqkv_method_lloyd();
}
