#include "device/emulator.h"
#include "support/catch.h"
#include "support/device.h"

using vqkv::device::emulated::configure;
using vqkv::device::emulated::Order;

void vqkv::in_every_order(const std::function<void()>& test) {
  for (const auto& [order, seed, name] :
       {std::tuple{Order::kForward, 1, "forward"}, std::tuple{Order::kReverse, 1, "reverse"},
        std::tuple{Order::kRandom, 1, "random 1"}, std::tuple{Order::kRandom, 2, "random 2"}}) {
    CAPTURE(name);
    configure({order, static_cast<uint64_t>(seed)});
    test();
    configure({});
  }
}

void vqkv::unwatched(const std::function<void()>& test) {
  configure({.watched = false});
  test();
  configure({});
}

std::optional<vqkv::SharedTraffic> vqkv::shared_traffic_of(const std::function<void()>& test) {
  if (!vqkv::device::emulated::kInstrumented) return std::nullopt;
  SharedTraffic sum;
  configure({.profile = true});
  test();
  configure({});
  for (const auto& line : vqkv::device::emulated::take_traffic()) {
    if (!line.shared) continue;
    (line.writes ? sum.written : sum.read) += line.passes;
    (line.writes ? sum.fewest_written : sum.fewest_read) += line.ideal;
  }
  return sum;
}
