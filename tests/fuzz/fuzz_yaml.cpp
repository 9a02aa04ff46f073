// Any bytes as a configuration: a message or a tree, never a crash, a hang or unbounded memory.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "config/config.h"
#include "config/sweep.h"
#include "core/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    vqkv::Config config = vqkv::parse_yaml(text, "fuzz.yaml");
    vqkv::canonical_json(config.tree);
    vqkv::apply_group(config);
    const vqkv::Sweep sweep = vqkv::expand_sweep(config);
    for (const auto& p : sweep.points) (void)p.tree.size();
  } catch (const vqkv::Error& e) {
    if (e.kind() != vqkv::ErrorKind::kUsage) __builtin_trap();
  }
  try {
    vqkv::Config config;
    vqkv::apply_override(config, std::string(text));
  } catch (const vqkv::Error&) {}
  return 0;
}
