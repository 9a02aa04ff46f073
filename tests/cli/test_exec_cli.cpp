// Codecs in other programs: vqkv-eval with exec:COMMAND over a tiny model, with children that behave and children that
// don't.
#include <fmt/format.h>
#include <signal.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <sstream>
#include <thread>

#include "codec/build.h"
#include "codec/codec_archive.h"
#include "core/rng.h"
#include "io/atomic_file.h"
#include "model/runtime.h"
#include "support/catch.h"
#include "support/run_tool.h"
#include "support/sweep_trace.h"

using namespace vqkv;
using Catch::Contains;

namespace {

const std::string kTinyLlama = VQKV_SOURCE_DIR "/tests/golden/tiny/llama";  // 2 layers, 2 KV heads of 16, 96 tokens
const std::string kRtn = "exec:/usr/bin/python3 '" VQKV_SOURCE_DIR "/scripts/exec_rtn.py'";

std::string child(const std::string& way) {
  return "exec:python3 '" VQKV_SOURCE_DIR "/tests/cli/exec_child.py' " + way;
}

struct ExecEval {
  TestFolder dir;
  std::string ids = dir / "ids.txt";
  ExecEval() {
    Rng rng(3);
    std::string text;
    for (int i = 0; i < 4096; ++i) text += std::to_string(rng.below(96)) + " ";
    write_file(ids, text);
  }
  ToolRun operator()(const std::vector<std::string>& arguments) const {
    return run_tool_of_build("vqkv-eval", dir.path.string(), arguments);
  }
  std::vector<std::string> replay(const std::string& codec, std::vector<std::string> more = {}) const {
    std::vector<std::string> out{"replay", "--model", kTinyLlama,      "--codec",         codec,          "--token-ids",
                                 ids,      "-q",      "cache.sinks=2", "cache.window=16", "cache.flush=8"};
    if (std::find(more.begin(), more.end(), "--context") == more.end())
      more.insert(more.end(), {"--context", "64", "--windows", "4"});
    out.insert(out.end(), more.begin(), more.end());
    return out;
  }
  Json json(const std::string& codec, std::vector<std::string> more = {}) const {
    more.push_back("--json");
    const ToolRun r = (*this)(replay(codec, more));
    INFO(r.err);
    REQUIRE(r.code == 0);
    return Json::parse(r.out);
  }
  void refuses(int code, const std::vector<std::string>& parts, const std::vector<std::string>& arguments) const {
    const ToolRun r = (*this)(arguments);
    INFO(fmt::format("{}\n{}", fmt::join(arguments, " "), r.err));
    CHECK(r.code == code);
    CHECK(r.out.empty());
    for (const std::string& part : parts) CHECK_THAT(r.err, Contains(part));
  }
};

// What a logging child was asked: by stream (sequence, layer, role), the blocks as (position, tokens).
using Streams = std::map<std::array<int, 3>, std::vector<std::pair<int, int>>>;
Streams logged(const std::string& path, Json* hello = nullptr) {
  std::istringstream lines(read_file(path));
  std::string line;
  REQUIRE(std::getline(lines, line));
  if (hello) *hello = Json::parse(line);
  Streams out;
  while (std::getline(lines, line)) {
    const auto b = Json::parse(line).get<std::vector<int>>();
    CHECK(b[5] == 32);
    out[{b[0], b[1], b[2]}].emplace_back(b[3], b[4]);
  }
  return out;
}

}  // namespace

TEST_CASE("exec: rows that come back as they went are the exact cache, and bytes are claims", "[cli][exec]") {
  const ExecEval eval;
  for (const char* mode : {"forced", "stepwise", "prefill-exact", "fake-quant"}) {
    CAPTURE(mode);
    const Json r = eval.json(child("good"), {"--mode", mode});
    for (const Json& row : r["rows"]) {
      const std::string label = row["codec"];
      CAPTURE(label);
      if (!label.starts_with("exec:child")) continue;
      CHECK(row["kld.mean"] == 0);
      CHECK(row["same_top"] == 1);
      CHECK_THAT(row["bits_per_value"].get<std::string>(), Contains("claimed by exec:child, not held"));
      CHECK_FALSE(row.contains("bits_per_value_1"));
      CHECK(row["flags"] == Json({"training unknown"}));
      if (std::string(mode) != "fake-quant") CHECK(row["coded_mass.last_quarter"] > 0.1);
      // 4 bits a value of what is coded, as the child says.
      const int64_t coded = row["claimed_bytes"].get<int64_t>() / (2 * 2 * 16);
      if (label.ends_with("(no window)")) CHECK(coded == 62);
      if (label == "exec:child") CHECK(coded == (std::string(mode) == "fake-quant" ? 62 : 40));
    }
    CHECK(r["rows"][1]["codec"] == "exec:child");
    CHECK(r["rows"][1]["config"]["command"] == child("good").substr(5));
  }
  const Json pre = eval.json(child("pre"));
  CHECK(pre["rows"][1]["config"]["keys"] == "pre_rope");
  CHECK(pre["rows"][1]["kld.mean"] < 1e-4);  // float16 before instead of after RoPE
  CHECK_THAT(eval(eval.replay(child("good"))).out, Contains("claimed by exec:child, not held"));
}

TEST_CASE("exec: tokens are handed over once, in order, in blocks of the policy, anew for each window", "[cli][exec]") {
  const ExecEval eval;
  const auto asked = [&](const std::string& name, std::vector<std::string> more, Json* hello = nullptr) {
    more.push_back("--skip-no-window");
    const std::string log = eval.dir / name;
    eval.json(child("log '" + log + "'"), more);
    return logged(log, hello);
  };
  Json hello;
  const Streams forced = asked("forced", {}, &hello);
  CHECK(hello["layers"] == 2);
  CHECK(hello["q_heads"] == 6);
  CHECK(hello["kv_heads"] == 2);
  CHECK(hello["head_dim"] == 16);
  CHECK(hello["rope"]["rotary_dim"] == 16);
  CHECK(hello["cache"]["sinks"] == 2);
  CHECK(hello["cache"]["k"] == Json({{"window", 16}, {"flush", 8}}));
  REQUIRE(forced.size() == 4 * 2 * 2);
  for (const auto& [stream, blocks] : forced) {
    CAPTURE(stream[0], stream[1], stream[2]);
    CHECK((stream[0] >= 1 && stream[0] <= 4));  // a sequence a window
    CHECK(blocks == std::vector<std::pair<int, int>>{{2, 8}, {10, 8}, {18, 8}, {26, 8}, {34, 8}});
  }
  CHECK(asked("stepwise", {"--mode", "stepwise"}) == forced);
  CHECK(asked("blocks", {"--block", "7"}) == forced);
  CHECK(asked("prompt", {"--mode", "prefill-exact", "--prompt", "30"}) == forced);
  // A prompt that is said to end waits and then comes in the same blocks; behind it nothing may come at all.
  CHECK(hello["cache"]["prompt"] == 0);
  CHECK(hello["cache"]["generated"] == "coded");
  CHECK(asked("waits", {"cache.prompt=30"}) == forced);
  for (const auto& [stream, blocks] : asked("exact", {"cache.prompt=30", "cache.generated=exact"}, &hello))
    CHECK(blocks == std::vector<std::pair<int, int>>{{2, 8}});
  CHECK(hello["cache"]["prompt"] == 30);
  CHECK(hello["cache"]["generated"] == "exact");
}

TEST_CASE("exec: the example in Python is the built-in rtn", "[cli][exec]") {
  if (std::system("/usr/bin/python3 -c 'import numpy' 2> /dev/null") != 0) {
    if (std::getenv("VQKV_NO_SKIP")) FAIL("python3-numpy is missing");
    WARN("skipped: python3-numpy is missing");
    return;
  }
  const ExecEval eval;
  const ModelFacts facts = read_model_facts(kTinyLlama);
  struct NoRows final : TrainSource {
    TrainData unit(const UnitShape&, const TrainNeeds&) const override { return {}; }
  };
  for (const auto& [bits, keys, rope] : {std::tuple{4, "post_rope", "post"}, std::tuple{2, "pre_rope", "pre"}}) {
    CAPTURE(bits, keys);
    TrainOptions options;
    options.model_hash = facts.hash;
    const CacheShape shape = facts.cache_shape();
    save_codec_set(
        *train_codec_set(resolve_codec({{"name", "rtn"}, {"bits", bits}, {"group", 16}, {"rope", rope}}, shape), shape,
                         NoRows(), options),
        eval.dir / "rtn.codec.h5", {{"cache", Json::object()}});
    for (const char* mode : {"forced", "fake-quant"}) {
      const Json r = eval.json(fmt::format("{} --bits {} --group 16 --keys {}", kRtn, bits, keys),
                               {"--mode", mode, "--codec", eval.dir / "rtn.codec.h5"});
      std::map<std::string, Json> rows;
      for (const Json& row : r["rows"]) rows[row["codec"]] = row;
      for (const char* window : {"", " (no window)"}) {
        if (*window && std::string(mode) == "fake-quant") continue;
        const Json &theirs = rows.at(fmt::format("exec:rtn-{}.py{}", bits, window)),
                   &ours = rows.at(fmt::format("rtn{}", window));
        CAPTURE(mode, window);
        CHECK(ours["kld.mean"] > 1e-5);
        CHECK(theirs["kld.mean"].get<double>() == Approx(ours["kld.mean"].get<double>()).epsilon(1e-4));
        CHECK(theirs["ppl"].get<double>() == Approx(ours["ppl"].get<double>()).epsilon(1e-6));
        // The program's claim is what the ledger of the built-in counts as codes and side data.
        CHECK(theirs["claimed_bytes"] == ours["bytes"]["codes"].get<int64_t>() + ours["bytes"]["side"].get<int64_t>());
      }
    }
  }
}

TEST_CASE("exec: a child that dies, hangs or lies ends in its place with what came", "[cli][exec]") {
  const ExecEval eval;
  const auto refuses = [&](const std::string& way, std::vector<std::string> parts, std::vector<std::string> more = {}) {
    parts.push_back("error: ");
    parts.push_back(child(way) + ": ");
    more.push_back("--skip-no-window");
    eval.refuses(3, parts, eval.replay(child(way), more));
  };
  const std::vector<std::string> soon{"--exec-timeout", "2"};
  // The handshake.
  refuses("print", {"handshake: 'hello from a pri", "not 'vqkvexec'"});
  refuses("old", {"handshake: version 7 of the stream; this is 1"});
  refuses("bad-json", {"handshake: its JSON"});
  refuses("huge-json", {"1073741824 bytes of JSON"});
  refuses("no-keys", {"keys: null; allowed: \"pre_rope\" or \"post_rope\""});
  refuses("no-such-key", {"dtype: \"f16\"; allowed: name, keys, block_tokens"});
  refuses("end", {"handshake: 0 of 16 bytes", "exit code 1, its stderr ends with:\nno such weights"});
  refuses("silent", {"handshake: 0 of 16 bytes of an answer came within 2 s", "still running"}, soon);
  // Blocks. Requests count from 0; on one thread they come layer by layer, keys first.
  const std::vector<std::string> one{"--threads", "1"}, limited{"--threads", "1", "--exec-timeout", "5"};
  const std::string first = "window 0: exec:", keys = "layer 0, keys, positions 2 to 9: ";
  refuses("die 0", {first, keys, "0 of 1056 bytes", "exit code 9, its stderr ends with:\nout of luck"}, one);
  refuses("kill 0", {keys, "killed by signal 9"}, one);
  refuses("hang 0", {keys, "within 5 s", "still running"}, limited);
  refuses("short 0", {keys, "1052 of 1056 bytes", "within 5 s"}, limited);
  refuses("tokens 0", {keys, "the answer says tokens 7, where 8 was asked"}, one);
  refuses("layer 0", {keys, "the answer says layer 1, where 0 was asked"}, one);
  refuses("claim 0", {keys, "it claims 1152921504606846976 bytes"}, one);
  refuses("nan 0", {keys, "nan came for position 3, KV head 0, channel 0"}, one);
  refuses("infinity 0", {keys, "inf came for position 3"}, one);
  refuses("print-later 0", {keys, "'loss 0.25", "where an answer begins with 'blok'"}, one);
  refuses("more 0", {keys, "4 bytes came beyond the 1056 of the answer"}, one);
  refuses("more 19", {"layer 1, values, positions 34 to 41: 4 bytes came beyond"}, one);  // of the first window
  refuses("nan 20", {"window 1: ", "layer 0, keys, positions 2 to 9: "}, {"--threads", "1"});
  refuses("die 1", {"out of luck"});  // on several threads: one of the two
}

TEST_CASE("exec: large blocks, early answers and a flooded stderr don't deadlock", "[cli][exec]") {
  const ExecEval eval;
  const std::vector<std::string> large{
      "--context",        "2200",           "--windows", "1", "cache.flush=1024",
      "--skip-no-window", "--exec-timeout", "20"};  // 128 KiB a block, twice what a pipe holds
  CHECK(eval.json(child("good"), large)["rows"][1]["kld.mean"] == 0);
  CHECK(eval.json(child("early"), large)["rows"][1]["kld.mean"] > 0);  // zeros
  CHECK(eval.json(child("noisy"), {"--skip-no-window"})["rows"][1]["kld.mean"] == 0);
}

TEST_CASE("exec: what can't be is refused before anything runs", "[cli][exec]") {
  const ExecEval eval;
  eval.refuses(2, {"an empty command"}, eval.replay("exec:"));
  eval.refuses(2, {"has no end to its '"}, eval.replay("exec:python3 'a.py"));
  eval.refuses(2, {"'no-such-program' can't be started: No such file"}, eval.replay("exec:no-such-program x.yaml"));
  eval.refuses(2, {"takes only cache.* overrides"}, eval.replay(child("good"), {"codec.bits=3"}));
  eval.refuses(2, {"did you mean 'window'"}, eval.replay(child("good"), {"cache.windw=3"}));
  eval.refuses(2, {"flush 8 is not a multiple of the 48 tokens that codec 'exec' codes together"},
               eval.replay(child("blocks")));
  eval.refuses(4, {"--attention cpu-table can't run exec:child"},
               eval.replay(child("good"), {"--attention", "cpu-table"}));
  eval.refuses(
      2, {"a strategy reads codes in ways of its own"},
      {"generate", "--model", kTinyLlama, "--codec", child("good"), "--prompt", "a", "--strategy", "specache"});
  eval.refuses(2, {"can't be counted"}, {"memory", "--model", kTinyLlama, "--codec", child("good")});
  eval.refuses(2, {"another program, not a cache"}, {"speed", "--model", kTinyLlama, "--codec", child("good")});
  eval.refuses(2, {"--exec-timeout"}, eval.replay(child("good"), {"--exec-timeout", "0"}));
  eval.refuses(2, {"--exec-timeout"}, eval.replay(child("good"), {"--exec-timeout", "nan"}));
}

TEST_CASE("exec: an interrupt is this program's to answer, and the child ends with it", "[cli][exec]") {
  const ExecEval eval;
  const std::string pid_file = eval.dir / "pid";
  const pid_t tool = start_tool("vqkv-eval", eval.dir.path.string(), eval.replay(child("hang 0 '" + pid_file + "'")));
  while (!std::filesystem::exists(pid_file)) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  ::kill(tool, SIGINT);
  const ToolRun r = finish_tool(eval.dir.path.string(), tool);
  INFO(r.err);
  CHECK(r.code == 130);
  CHECK(r.err.find("Traceback") == std::string::npos);
  CHECK(::kill(std::stoi(read_file(pid_file)), 0) != 0);
}

TEST_CASE("exec: generate goes token by token through the child", "[cli][exec]") {
  const ExecEval eval;
  const std::string model = eval.dir / "model";
  std::filesystem::copy(kTinyLlama, model);
  Json tokenizer = Json::parse(R"({
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})");
  for (int id = 3; id < 96; ++id) tokenizer["model"]["vocab"]["token" + std::to_string(id)] = id;
  write_file(model + "/tokenizer.json", tokenizer.dump());
  const ToolRun r = eval({"generate", "--model", model, "--codec", child("good"), "--prompt", "abaabbabababaab",
                          "--json", "-q", "--new-tokens", "40", "cache.window=8", "cache.flush=4"});
  INFO(r.err);
  REQUIRE(r.code == 0);
  const Json row = Json::parse(r.out)["rows"][1];
  CHECK(row["codec"] == "exec:child");
  CHECK(row["coded_mass"] > 0.1);
  CHECK(row["first_divergence"].is_null());
  CHECK_THAT(row["bits_per_value"].get<std::string>(), Contains("claimed by exec:child, not held"));
}

TEST_CASE("exec: programs are told to end together, none waits for another's end", "[cli][exec]") {
  const ExecEval eval;
  const std::string a = eval.dir / "a", b = eval.dir / "b";
  auto arguments = eval.replay(child(fmt::format("meet '{}' '{}'", a, b)));
  arguments.insert(arguments.end(), {"--codec", child(fmt::format("meet '{}' '{}'", b, a)), "--skip-no-window"});
  const ToolRun r = eval(arguments);
  INFO(r.err);
  CHECK(r.code == 0);
  CHECK(std::filesystem::exists(a + ".met"));
  CHECK(std::filesystem::exists(b + ".met"));
}
