#include "core/huge_pages.h"

#include <algorithm>
#include <vector>

#include "support/catch.h"

using namespace vqkv;

TEST_CASE("huge_page_memory: zeroed, aligned, apart, and alive as long as its pointer") {
  const std::vector<int64_t> sizes = {1, 63, 4096, int64_t{3} << 20, int64_t{31} << 20, int64_t{40} << 20, 100};
  std::vector<std::shared_ptr<std::byte>> blocks;
  for (const int64_t size : sizes) {
    blocks.push_back(huge_page_memory(size));
    std::byte* at = blocks.back().get();
    CHECK(reinterpret_cast<uintptr_t>(at) % 64 == 0);
    CHECK(std::all_of(at, at + size, [](std::byte b) { return b == std::byte{0}; }));
    std::fill(at, at + size, static_cast<std::byte>(blocks.size()));
  }
  for (size_t i = 0; i < blocks.size(); i += 2) blocks[i].reset();
  for (size_t i = 1; i < blocks.size(); i += 2)
    CHECK(std::all_of(blocks[i].get(), blocks[i].get() + sizes[i],
                      [&](std::byte b) { return b == static_cast<std::byte>(i + 1); }));
  blocks.clear();
  CHECK(*huge_page_memory(1) == std::byte{0});
}
