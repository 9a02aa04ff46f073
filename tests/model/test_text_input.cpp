#include "model/text_input.h"

#include "core/error.h"
#include "support/catch.h"

using namespace vqkv;

TEST_CASE("token ids are read from a JSON array or plain numbers") {
  CHECK(parse_token_ids("[1, 2,3]\n", 10, "t") == std::vector<int32_t>{1, 2, 3});
  CHECK(parse_token_ids("1 2\n3", 10, "t") == std::vector<int32_t>{1, 2, 3});
  CHECK(parse_token_ids("", 10, "t").empty());
}

TEST_CASE("a bad token id names its place") {
  CHECK_THROWS_WITH(parse_token_ids("1 x", 10, "ids.txt"), Catch::Contains("ids.txt: byte 2"));
  CHECK_THROWS_WITH(parse_token_ids("1 10", 10, "ids.txt"),
                    Catch::Contains("token id 10 is outside the vocabulary of 10"));
  CHECK_THROWS_WITH(parse_token_ids("1.5", 10, "ids.txt"), Catch::Contains("byte 0"));
  CHECK_THROWS_WITH(parse_token_ids("99999999999999999999", 10, "t"), Catch::Contains("byte 0"));
  CHECK_THROWS_WITH(parse_token_ids("-1", 10, "t"), Catch::Contains("outside the vocabulary"));
}
