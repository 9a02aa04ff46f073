// Folders as users have them, against transformers 5.24 (make_folder_goldens.py). transformers 4.57.6 gives the same
// but in the folders that the file marks: with a Llama class, 5 puts the prefix space by a rule of its own, and its
// <unk> is no token of a byte-level vocabulary. We follow 5.
#include "model/tokenizer.h"
#include "support/catch.h"
#include "support/token_folders.h"

using namespace vqkv;
using namespace vqkv::testing;
using Ids = std::vector<int32_t>;

namespace {

void check_folder(const Json& golden, const Json& texts) {
  const TokenFolder folder(golden["files"]);
  const auto tokenizer = load_tokenizer(folder.path());
  const SpecialTokens& special = tokenizer->special();
  CHECK(tokenizer->size() == golden["size"].get<int32_t>());
  CHECK(special.bos == golden["bos"].get<int32_t>());
  CHECK(special.eos == golden["eos"].get<int32_t>());
  CHECK(special.stop.front() == special.eos);
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto text = texts[i].get<std::string>();
    INFO(texts[i].dump());
    CHECK(tokenizer->encode(text) == golden["plain"][i].get<Ids>());
    Ids ids = tokenizer->encode(text, true);
    if (special.add_bos) ids.insert(ids.begin(), special.bos);
    CHECK(ids == golden["ids"][i].get<Ids>());
  }
}

}  // namespace

TEST_CASE("tokenizer folders give the ids of transformers", "[tokens][folders]") {
  const Json golden = token_folders();
  for (const Json& folder : golden["folders"]) DYNAMIC_SECTION(folder["name"].get<std::string>()) {
      check_folder(folder, golden["texts"]);
    }
}
