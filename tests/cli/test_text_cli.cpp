// Texts and ids as the tools take them: special tokens in texts, BOS, and models whose tokenizer can't be read.
#include <filesystem>

#include "core/json.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "support/model_writers.h"
#include "support/run_tool.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using Catch::Contains;

namespace {

const std::string kTiny = VQKV_SOURCE_DIR "/tests/golden/tiny/";

// The tiny Llama with a tokenizer that puts <s> in front and knows a, b, ab, s and names for the other ids.
struct TinyModel {
  TestFolder dir;
  std::string model = dir / "model";
  TinyModel() {
    std::filesystem::copy(kTiny + "llama", model);
    Json json = Json::parse(R"({
      "added_tokens": [{"id": 3, "content": "<s>", "special": true}, {"id": 4, "content": "<end>", "special": true}],
      "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
      "post_processor": {"type": "TemplateProcessing", "special_tokens": {},
                         "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
      "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "s": 5}, "merges": ["a b"]}})");
    for (int id = 6; id < 96; ++id) json["model"]["vocab"]["token" + std::to_string(id)] = id;
    write_file(model + "/tokenizer.json", json.dump());
    write_file(dir / "plain.txt", "abaabb");
    write_file(dir / "special.txt", "<s>aba<end>abb");
  }
  // Leaves the tokenizer six entries, beside 96 rows in the model.
  void pad() const {
    Json json = Json::parse(read_file(model + "/tokenizer.json", 1 << 20));
    for (int id = 6; id < 96; ++id) json["model"]["vocab"].erase("token" + std::to_string(id));
    write_file(model + "/tokenizer.json", json.dump());
  }
  ToolRun run(const std::string& tool, const std::vector<std::string>& arguments) const {
    return run_tool_of_build(tool, dir.path.string(), arguments);
  }
  Json json(const std::string& tool, std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--json", "-q"});
    const ToolRun r = run(tool, arguments);
    INFO(r.err);
    REQUIRE(r.code == 0);
    return Json::parse(r.out);
  }
};

}  // namespace

TEST_CASE("texts with --special: special tokens in texts become ids in every verb that reads texts", "[cli][text]") {
  const TinyModel m;
  const std::string text = m.dir / "special.txt";
  const auto ids = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"tokens", "--model", m.model, "--text", text});
    return m.json("vqkv-dump", more)[0]["ids"];
  };
  CHECK(ids({}) == Json({5, 2, 0, 2, 1}));  // what is not in the vocabulary is left out
  CHECK(ids({"--special"}) == Json({3, 2, 0, 4, 2, 1}));

  const auto captured = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"capture", "--model", m.model, "--text", text, "--dry-run", "--context", "64"});
    return m.json("vqkv-dump", more)[0]["tokens"];
  };
  CHECK(captured({}) == 6);             // BOS in front
  CHECK(captured({"--special"}) == 6);  // the text's own

  std::string many = "<s>";
  for (int i = 0; i < 60; ++i) many += "aba<end>abb";
  write_file(m.dir / "many.txt", many);
  const auto replayed = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"replay", "--model", m.model, "--text", m.dir / "many.txt", "--codec", "exact",
                               "--context", "32", "--windows", "0"});
    return m.json("vqkv-eval", more)["facts"]["windows"];
  };
  CHECK(replayed({}) == 7);             // 241 ids, 31 a window
  CHECK(replayed({"--special"}) == 9);  // 301 ids, the first of them BOS

  const auto prompt = [&](const std::string& written, std::vector<std::string> more) {
    more.insert(more.begin(),
                {"generate", "--model", m.model, "--codec", "exact", "--new-tokens", "1", "--prompt", written});
    return m.json("vqkv-eval", more)["prompt"];
  };
  CHECK(prompt("<s>ab<end>", {}) == Json({3, 5, 2}));
  CHECK(prompt("<s>ab<end>", {"--special"}) == Json({3, 2, 4}));
  CHECK(prompt("ab<end>", {"--special"}) == Json({3, 2, 4}));

  const ToolRun both =
      m.run("vqkv-eval", {"generate", "--model", m.model, "--codec", "exact", "--prompt", "a", "--chat", "--special"});
  CHECK(both.code == 2);
  CHECK_THAT(both.err, Contains("--special"));
  write_file(m.dir / "a.ids", "0 1");
  CHECK(m.run("vqkv-dump", {"tokens", "--model", m.model, "--token-ids", m.dir / "a.ids", "--special"}).code == 2);
  // A model without a known template names the way that there is.
  const ToolRun chat =
      m.run("vqkv-eval", {"generate", "--model", m.model, "--codec", "exact", "--prompt", "a", "--chat"});
  CHECK(chat.code == 3);
  CHECK_THAT(chat.err, Contains("with --special in place of --chat"));
}

TEST_CASE("ids of --token-ids that start with BOS are used as they are, with a notice", "[cli][text]") {
  const TinyModel m;
  const auto capture = [&](const std::string& ids, bool notice) {
    write_file(m.dir / "x.ids", ids);
    const ToolRun r = m.run("vqkv-dump", {"capture", "--model", m.model, "--token-ids", m.dir / "x.ids", "--dry-run",
                                          "--context", "4", "--json"});
    INFO(r.err);
    REQUIRE(r.code == 0);
    CHECK((r.err.find("x.ids: starts with BOS") != std::string::npos) == notice);
    const Json row = Json::parse(r.out)[0];
    return std::pair(row["windows"].get<int>(), row["tokens"].get<int>());
  };
  CHECK(capture("0 1 2", false) == std::pair(1, 4));
  CHECK(capture("3 0 1 2", true) == std::pair(1, 4));
  CHECK(capture("3 0 1 2 3 1 1 1", true) == std::pair(2, 8));  // cut in windows already
}

TEST_CASE("ids of --token-ids need no tokenizer", "[cli][text]") {
  const TinyModel m;
  std::string numbers = "0";
  for (int i = 1; i < 128; ++i) numbers += " " + std::to_string(i * 7 % 96);
  write_file(m.dir / "x.ids", numbers);
  const std::string ids = m.dir / "x.ids";
  const std::string unknown = m.dir / "unknown";
  std::filesystem::copy(kTiny + "llama", unknown);
  write_file(unknown + "/tokenizer.json", R"({"model": {"type": "Unigram", "vocab": []}})");
  for (const std::string& model : {kTiny + "llama.gguf", kTiny + "llama", unknown}) {
    INFO(model);
    const ToolRun tokens = m.run("vqkv-dump", {"tokens", "--model", model, "--token-ids", ids, "--ids"});
    CHECK(tokens.code == 0);
    CHECK(tokens.out == numbers + "\n");
    CHECK_THAT(tokens.err, Contains("the token ids are used as they are, no BOS is added"));
    CHECK(m.run("vqkv-dump", {"tokens", "--model", model, "--token-ids", ids}).code == 0);

    const std::string trace = m.dir / "t.trace.h5";
    const ToolRun capture =
        m.run("vqkv-dump", {"capture", "--model", model, "--token-ids", ids, "--context", "48", "-o", trace, "--json"});
    INFO(capture.err);
    REQUIRE(capture.code == 0);
    const Json row = Json::parse(capture.out)[0];
    CHECK(row["tokens"] == 128);
    CHECK(row["bos"] == false);
    CHECK(m.json("vqkv-dump", {"inspect", trace})["gradients"].is_null());
    std::filesystem::remove(trace);

    const Json replay =
        m.json("vqkv-eval", {"replay", "--model", model, "--codec", "exact", "--token-ids", ids, "--context", "64"});
    CHECK(replay["facts"]["windows"] == 2);
    CHECK(replay["facts"]["bos"] == false);
    CHECK(replay["rows"][0].contains("ppl"));
    CHECK_FALSE(replay["rows"][0].contains("bits_per_byte"));

    // A text does need one, and so does an id to be in the model's vocabulary.
    const ToolRun text = m.run("vqkv-dump", {"tokens", "--model", model, "--text", m.dir / "plain.txt"});
    CHECK(text.code == 3);
    write_file(m.dir / "far.ids", "1 96");
    const ToolRun far =
        m.run("vqkv-dump", {"capture", "--model", model, "--token-ids", m.dir / "far.ids", "--dry-run"});
    CHECK(far.code == 3);
    CHECK_THAT(far.err, Contains("token id 96 is outside the vocabulary of 96"));
  }
}

TEST_CASE("ids of padded vocabulary rows: drawn, kept in --json, printed as nothing, and said", "[cli][text]") {
  const TinyModel m;
  m.pad();
  const std::vector<std::string> verb{"generate", "--model",      m.model, "--prompt",      "abab", "--codec",
                                      "exact",    "--new-tokens", "24",    "--temperature", "2",    "--seed",
                                      "3"};
  const Json full = m.json("vqkv-eval", verb);
  for (const Json& row : full["rows"]) {
    const auto ids = row["tokens"].get<std::vector<int32_t>>();
    const std::vector<std::string> pieces{"a", "b", "ab", "", "", "s"};  // special ones are left out
    std::string text;
    int64_t padded = 0;
    for (const int32_t id : ids) id < 6 ? void(text += pieces[static_cast<size_t>(id)]) : void(++padded);
    CHECK(padded > 0);
    CHECK(row["padded_tokens"] == padded);
    CHECK(row["text"] == text);
    CHECK(ids.size() == row["new_tokens"].get<size_t>());
  }
  const ToolRun run = m.run("vqkv-eval", verb);
  INFO(run.err);
  CHECK(run.code == 0);
  CHECK_THAT(run.err, Contains("are beyond the tokenizer's 6 entries (the model has 96 rows)"));
}

TEST_CASE("ids of padded vocabulary rows in --token-ids are used as they are, in every verb", "[cli][text]") {
  const TinyModel m;
  m.pad();
  std::string numbers = "3";
  for (int i = 1; i < 128; ++i) numbers += " " + std::to_string(i * 7 % 96);
  const std::string ids = m.dir / "x.ids";
  write_file(ids, numbers);
  CHECK(m.run("vqkv-dump", {"tokens", "--model", m.model, "--token-ids", ids, "--ids"}).out == numbers + "\n");
  const ToolRun table = m.run("vqkv-dump", {"tokens", "--model", m.model, "--token-ids", ids});
  CHECK(table.code == 0);
  CHECK(m.run("vqkv-dump",
              {"capture", "--model", m.model, "--token-ids", ids, "--context", "32", "-o", m.dir / "t.trace.h5"})
            .code == 0);
  const std::vector<std::string> replay{"replay",      "--model", m.model,     "--codec", "exact",
                                        "--token-ids", ids,       "--context", "32"};
  const Json rows = m.json("vqkv-eval", replay)["rows"];
  CHECK(rows[0].contains("ppl"));
  CHECK_FALSE(rows[0].contains("bits_per_byte"));  // some scored tokens have no bytes
  write_file(ids, numbers + " 96");
  const ToolRun far = m.run("vqkv-eval", replay);
  CHECK(far.code == 3);
  CHECK_THAT(far.err, Contains("token id 96 is outside the vocabulary of 96"));
}

TEST_CASE("RoPE's attention factor is said where it is not 1", "[cli][text]") {
  const TinyModel m;
  const std::string yarn = VQKV_SOURCE_DIR "/tests/golden/hf/yarn_attention_factor", trace = m.dir / "t.trace.h5";
  write_file(m.dir / "x.ids", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16");
  CHECK_THAT(m.run("vqkv-dump", {"model", yarn}).out, Contains("queries and keys times 0.7 (attention factor)"));
  CHECK_THAT(m.run("vqkv-dump", {"model", m.model}).out, !Contains("attention factor"));
  const ToolRun capture =
      m.run("vqkv-dump", {"capture", "--model", yarn, "--token-ids", m.dir / "x.ids", "--context", "16", "-o", trace});
  INFO(capture.err);
  REQUIRE(capture.code == 0);
  CHECK_THAT(m.run("vqkv-dump", {"inspect", trace}).out, Contains("queries and keys times 0.7 (attention factor)"));
}

TEST_CASE("capture --gradients: recorded, verified, shown", "[cli][text]") {
  const TinyModel m;
  std::string numbers = "9";
  for (int i = 1; i < 160; ++i) numbers += " " + std::to_string(i * 7 % 96);
  write_file(m.dir / "x.ids", numbers);
  const std::string trace = m.dir / "t.trace.h5";
  const auto capture = [&](std::vector<std::string> more) {
    more.insert(more.begin(),
                {"capture", "--model", kTiny + "qwen3.gguf", "--token-ids", m.dir / "x.ids", "--context", "80"});
    return m.json("vqkv-dump", more)[0];
  };
  const Json plain = capture({"--dry-run"}), planned = capture({"--gradients", "sampled", "--dry-run"});
  CHECK_FALSE(plain.contains("gradients"));
  CHECK(planned["gradients"] == "sampled");
  CHECK(planned["bytes"].get<int64_t>() > plain["bytes"].get<int64_t>());
  // The work and not the seconds, which divide it by a rate that is measured anew each time.
  CHECK(planned["multiply_adds"].get<double>() > 2 * plain["multiply_adds"].get<double>());
  CHECK(capture({"--gradients", "next-token", "-o", trace})["gradients"] == "next-token");
  CHECK(m.json("vqkv-dump", {"verify", trace})[0]["ok"] == true);
  const Json facts = m.json("vqkv-dump", {"inspect", trace});
  CHECK(facts["gradients"] == "next-token");
  for (const Json& row : facts["heads"]) CHECK(row["gradient_rms"].get<double>() > 0);
  const ToolRun shown = m.run("vqkv-dump", {"inspect", trace});
  CHECK_THAT(shown.out, Contains("of the NLL of the text's next tokens") && Contains("RMS of gradient"));
  const ToolRun unknown = m.run("vqkv-dump", {"capture", "--model", kTiny + "qwen3.gguf", "--token-ids",
                                              m.dir / "x.ids", "--gradients", "kld", "--dry-run"});
  CHECK(unknown.code == 2);
  CHECK_THAT(unknown.err, Contains("next-token") && Contains("sampled"));
}
