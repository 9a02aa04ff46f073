// Many sequences on one codec set: what is shared, what each costs, and whose thread asks for memory.
#include <malloc.h>

#include <thread>

#include "attention/plan_codec.h"
#include "cache/cache_support.h"
#include "cache/model.h"
#include "cache/view.h"
#include "core/thread_pool.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Bytes that the allocator holds for this process, its own headers and rounding included.
int64_t process_bytes() {
  const struct mallinfo2 m = mallinfo2();
  return static_cast<int64_t>(m.uordblks + m.hblkhd);
}

// Accepts its maker's thread alone.
class OneThread final : public std::pmr::memory_resource {
 public:
  int strangers() const { return strangers_; }

 private:
  void* do_allocate(size_t bytes, size_t alignment) override {
    if (std::this_thread::get_id() != owner_) ++strangers_;
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* p, size_t bytes, size_t alignment) override {
    if (std::this_thread::get_id() != owner_) ++strangers_;
    std::pmr::new_delete_resource()->deallocate(p, bytes, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
  std::thread::id owner_ = std::this_thread::get_id();
  std::atomic<int> strangers_{0};
};

}  // namespace

TEST_CASE("a process grows by the ledger's resident bytes for every sequence, by the books once", "[cache][memory]") {
  // 2 bits a value, as the columns at 1 and 64 sequences are computed.
  const CacheShape shape = make_shape(6, 3, 3, 64);
  const auto set = make_set(shape, 1, [](Role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 4);
    return std::make_shared<PlanCodec>(p);
  });
  const Tokens x(shape, 1024, 3);
  std::vector<CompressedCache> caches;
  caches.reserve(65);
  const auto model = std::make_shared<const CacheModel>(set);
  caches.emplace_back(model, CachePolicy());
  feed(caches[0], x, 0, 1024);  // buffers of threads, rotation table
  const int64_t begin = process_bytes(), ledger = caches[0].bytes().total_sequence();
  if (begin == 0) return;  // an allocator that tells nothing (sanitizers)
  for (const size_t sequences : {1, 8, 64}) {
    while (caches.size() < sequences + 1) {
      caches.emplace_back(model, CachePolicy());
      feed(caches.back(), x, 0, 1024);
    }
    const double each = static_cast<double>(process_bytes() - begin) / static_cast<double>(sequences);
    CAPTURE(sequences, ledger, each);
    CHECK(each > 0.999 * static_cast<double>(ledger));
    CHECK(each < 1.02 * static_cast<double>(ledger));
  }
  for (size_t u = 0; u < set->units().size(); ++u)
    CHECK(&CacheView(caches[0]).form(u) == &CacheView(caches[64]).form(u));
}

TEST_CASE("what a sequence fits to its prompt is its own, and counted", "[cache][memory]") {
  const CacheShape shape = make_shape(2, 1, 2, 16);
  const auto set = dummy_codec_set(shape, RopePlacement::kPost, 2,
                                   [](const UnitShape& unit) { return std::make_unique<PromptDummy>(unit); });
  const auto model = std::make_shared<const CacheModel>(set);
  CountingResource memory;
  {
    CompressedCache cache(model, CachePolicy(), &memory), other(model, CachePolicy());
    CHECK_FALSE(cache.fitted());
    feed(cache, Tokens(shape, 300, 5), 0, 300);
    feed(other, Tokens(shape, 300, 8), 0, 300);
    CHECK(cache.fitted());
    for (size_t u = 0; u < set->units().size(); ++u) {
      const CacheView view(cache);
      REQUIRE(view.state(u) != nullptr);
      CHECK(&view.form(u) != model->units()[u].form.get());
      CHECK(view.form(u).plan.outer_bias != CacheView(other).form(u).plan.outer_bias);
    }
    // A mean a channel and unit, and at least the decoders' terms of every channel.
    const ByteLedger b = cache.bytes();
    CHECK(b.workspace > static_cast<int64_t>(4 * 32 * sizeof(LevelsTerm)));
    CHECK(b.total_sequence() == memory.live());
  }
  CHECK(memory.live() == 0);
}

TEST_CASE("the caller's memory is asked for by the caller's thread", "[cache][threads]") {
  const CacheShape shape = make_shape(2, 1, 8, 16);
  const auto set = dummy_codec_set(shape, RopePlacement::kPost, 1,
                                   [](const UnitShape& unit) { return std::make_unique<SparseDummy>(unit, 2, false); });
  const int before = thread_count();
  set_thread_count(4);
  OneThread memory;
  {
    CompressedCache cache(set, CachePolicy(), &memory);
    const Tokens x(shape, 1000, 7);
    feed(cache, x, 0, 600);
    feed(cache, x, 600, 400);
    CHECK(cache.bytes().overlay > 0);
  }
  set_thread_count(before);
  CHECK(memory.strangers() == 0);
}
