// The main program of tests that need a device: 77, with the reason, where there is none.
#define CATCH_CONFIG_RUNNER
#include <cstdio>

#include "core/error.h"
#include "device/runtime.h"
#include "support/catch.h"
#include "support/device.h"

void vqkv::in_every_order(const std::function<void()>& test) { test(); }
std::optional<vqkv::SharedTraffic> vqkv::shared_traffic_of(const std::function<void()>&) { return std::nullopt; }
void vqkv::unwatched(const std::function<void()>& test) { test(); }

int main(int argc, char** argv) {
  try {
    std::printf("%s\n", vqkv::device::require_device().c_str());
  } catch (const vqkv::Error& e) {
    std::printf("skipped: %s\n", e.what());
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
