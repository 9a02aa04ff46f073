// What attention keeps between blocks: counted, and in the ledger of the sequence that it is kept for.
#include <malloc.h>

#include "attention/feed.h"
#include "cache/model.h"
#include "core/thread_pool.h"
#include "support/allocations.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// 2 bits a value.
std::shared_ptr<const CacheModel> model_of(const CacheShape& shape, RopePlacement keys) {
  return std::make_shared<const CacheModel>(make_set(shape, 1, [&](Role role, int channels) {
    DecodePlan p = empty_plan(channels);
    add_table(p, 8, 4);
    if (role == Role::kKey) p.rope = keys;
    return std::make_shared<PlanCodec>(p);
  }));
}

struct OneThread {
  int before = thread_count();
  OneThread() { set_thread_count(1); }
  ~OneThread() { set_thread_count(before); }
};

int64_t process_bytes() {
  const struct mallinfo2 m = mallinfo2();
  return static_cast<int64_t>(m.uordblks + m.hblkhd);
}

}  // namespace

TEST_CASE("the ledger of a sequence holds what attention keeps for it, to the allocator", "[memory]") {
  if (!counts_allocations()) return;
  const OneThread one;
  const CacheShape shape = make_shape(2, 3, 2, 64);
  const Tokens x(shape, 1400, 1);
  for (const RopePlacement keys : {RopePlacement::kPost, RopePlacement::kPre})
    for (const char* name : {"reference", "cpu-reconstruct", "cpu-table", "cpu-table8", "auto"}) {
      if (keys == RopePlacement::kPre && std::string(name).starts_with("cpu-table")) continue;
      CAPTURE(name, keys == RopePlacement::kPre);
      const auto model = model_of(shape, keys);
      int64_t kept = 0, cached = 0;                // after the blocks
      for (const bool measured : {false, true}) {  // first: rotation table of the model, what the thread works in
        const int64_t before = live_bytes(), threads = attention_scratch_bytes();
        Sequence sequence(model, CachePolicy(), name);
        const auto check = [&] {
          const int64_t grown = live_bytes() - before - (attention_scratch_bytes() - threads);
          const int64_t ledger = sequence.bytes().total_sequence();
          CAPTURE(sequence.cache().length(), grown, ledger, sequence.cache().bytes().total_sequence());
          CHECK(sequence.allocated() == ledger);
          CHECK_NOTHROW(sequence.check_ledger("c"));
          if (!measured) return;
          CHECK(grown >= ledger);
          CHECK(static_cast<double>(grown) < 1.02 * static_cast<double>(ledger) + 8192);
        };
        const bool slow = std::string(name) == "reference";
        const int64_t blocks = slow ? 300 : 1300;
        for (int64_t t = 0; t < blocks; t += 100) feed(sequence, x, t, 100);
        check();
        kept = sequence.bytes().workspace;
        feed(sequence, x, blocks, 1);
        check();
        cached = sequence.bytes().workspace;
        for (int64_t t = 1; t < 4; ++t) feed(sequence, x, blocks + t, 1);
        check();
        if (!slow) CHECK(sequence.bytes().workspace > sequence.session().held_bytes());
      }
      // The first step gives back what blocks needed; tables of angles stay.
      CHECK(cached < kept / 2 + (keys == RopePlacement::kPre ? 256 * 1400 : 0));
    }
}

TEST_CASE("a process grows by the ledger of every sequence that attended, by the backend they share once", "[memory]") {
  const OneThread one;
  const CacheShape shape = make_shape(3, 2, 3, 64);
  const Tokens x(shape, 400, 3);
  const auto model = model_of(shape, RopePlacement::kPre);
  const std::shared_ptr<AttentionBackend> backend = make_attention_backend("auto");
  std::vector<Sequence> sequences;
  sequences.reserve(65);
  const auto add = [&] {
    Sequence& s = sequences.emplace_back(model, CachePolicy(), backend);
    for (int64_t t = 0; t < 400; t += 100) feed(s, x, t, 100);
  };
  add();  // buffers of threads and backend, rotation table
  const int64_t begin = process_bytes(), ledger = sequences[0].bytes().total_sequence(), held = backend->held_bytes();
  CHECK(sequences[0].session().held_bytes() == 100 * 6 * 64 * 4);
  CHECK(ledger == sequences[0].cache().bytes().total_sequence() + 100 * 6 * 64 * 4);
  CHECK(held > 400 * 256);
  if (begin == 0) return;  // an allocator that tells nothing (sanitizers)
  for (const size_t count : {1, 8, 64}) {
    while (sequences.size() < count + 1) add();
    const double each = static_cast<double>(process_bytes() - begin) / static_cast<double>(count);
    CAPTURE(count, ledger, each);
    CHECK(each > 0.999 * static_cast<double>(ledger));
    CHECK(each < 1.02 * static_cast<double>(ledger));
  }
  CHECK(backend->held_bytes() == held);
}
