// Loops over threads: whose error is told.
#include "core/thread_pool.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "support/catch.h"

using namespace vqkv;

TEST_CASE("of bodies that fail side by side the one of the lowest index is told, whichever came first") {
  const int before = thread_count();
  set_thread_count(2);
  for (int round = 0; round < 50; ++round) {
    std::atomic<bool> failing{false};
    const auto body = [&](int64_t i) {
      if (i == 1) failing = true;
      while (!failing) std::this_thread::yield();
      if (i == 0 && round % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      throw std::runtime_error(std::to_string(i));
    };
    CHECK_THROWS_WITH(parallel_for(8, body), "0");
  }
  set_thread_count(before);
}
