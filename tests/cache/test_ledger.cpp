// The ledger held against its formula and the allocator.
#include "cache/ledger.h"

#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;

TEST_CASE("a ledger that is not its formula, or not what was allocated, is an error that names the bytes") {
  const auto error_of = [](const ByteLedger& formula, const ByteLedger& held, int64_t allocated) -> std::string {
    try {
      require_equal(formula, held, allocated, "c at 100 tokens");
    } catch (const Error& e) { return e.what(); }
    return "";
  };
  const ByteLedger formula{
      .codes = 100, .side = 20, .sinks = 8, .window = 64, .padding = 30, .index = 16, .codebooks = 5};
  CHECK(error_of(formula, formula, formula.total_sequence()).empty());
  CHECK(error_of(formula, formula, formula.total_sequence() + 1) ==
        "c at 100 tokens: the ledger says 238 bytes and the allocator 239");
  const std::pair<int64_t ByteLedger::*, std::string> kinds[] = {
      {&ByteLedger::codes, "101 bytes of codes and the cache holds 100"},
      {&ByteLedger::side, "21 bytes of side and the cache holds 20"},
      {&ByteLedger::sinks, "9 bytes of sinks and the cache holds 8"},
      {&ByteLedger::window, "65 bytes of window and the cache holds 64"},
      {&ByteLedger::padding, "31 bytes of padding and the cache holds 30"},
      {&ByteLedger::index, "17 bytes of index and the cache holds 16"},
      {&ByteLedger::codebooks, "6 bytes of codebooks and the cache holds 5"}};
  for (const auto& [kind, message] : kinds) {
    ByteLedger wrong = formula;
    wrong.*kind += 1;
    CHECK(error_of(wrong, formula, formula.total_sequence()) == "c at 100 tokens: the formula says " + message);
  }
  // What no formula knows: exceptions and their room to grow, and what was fitted to the prompt.
  ByteLedger held = formula;
  held.overlay += 24;
  held.padding += 8;
  CHECK(error_of(formula, held, held.total_sequence()).empty());
  held.workspace += 1000;
  held.side += 64;
  held.index += 32;
  CHECK(error_of(formula, held, held.total_sequence()).empty());
  held.codes -= 1;
  CHECK_FALSE(error_of(formula, held, held.total_sequence()).empty());
}
