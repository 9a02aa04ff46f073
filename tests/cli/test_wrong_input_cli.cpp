// The real vqkv-eval over the real small model: what it refuses, and how it ends.
#include <fmt/format.h>
#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <thread>

#include "core/clock.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "support/eval_tool.h"

using namespace vqkv;

TEST_CASE("vqkv-eval: wrong input ends with its code and its place", "[cli][eval]") {
  const Eval eval;
  const std::vector<std::string> replay{"replay", "--model", kModel, "--text", kText, "--codec"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), replay.begin(), replay.end());
    return more;
  };
  // Usage.
  eval.refuses(2, "did you mean 'replay'", {"repaly"});
  eval.refuses(2, "did you mean '--context'", with({"exact", "--contxt", "64"}));
  eval.refuses(2, "--model", {"replay", "--codec", "exact"});
  eval.refuses(2, "did you mean 'reference'", with({"exact", "--attention", "refrence"}));
  eval.refuses(2, "allowed: forced, stepwise", with({"exact", "--mode", "force"}));
  eval.refuses(2, "neither exact nor", with({"exat"}));
  eval.refuses(2, "no text was given", {"replay", "--model", kModel, "--codec", "exact"});
  eval.refuses(2, "did you mean 'window'", with({eval.codec, "cache.windw=3"}));
  eval.refuses(2, "only --mode prefill-exact tells a prompt", with({"exact", "--prompt", "32"}));
  eval.refuses(2, "'cache.policy=h2o': the exact cache takes no overrides", with({"exact", "cache.policy=h2o"}));
  eval.refuses(2, "--mode fake-quant: rtn4 stands under the policy h2o, which decides as the text goes on",
               with({eval.codec, "cache.policy=h2o", "--mode", "fake-quant"}));
  eval.refuses(2,
               "error: command line: cache.policy.observe: expected at most the 16 tokens of cache.policy.interval, "
               "found 32",
               with({eval.codec, "cache.policy={name: snapkv, interval: 16}"}));
  // Before a codec is read or trained.
  const std::string gone = "/nowhere.codec.h5";
  eval.refuses(2, "error: 63 scored positions are too few for statistics; give at least 100",
               with({gone, "--context", "64", "--windows", "1"}));
  eval.refuses(2, "error: 28 scored positions are too few",
               with({gone, "--context", "128", "--windows", "1", "--mode", "prefill-exact", "--prompt", "100"}));
  eval.refuses(2, "an exact prompt of 128 tokens leaves nothing to score in 128",
               with({gone, "--context", "128", "--mode", "prefill-exact", "--prompt", "128"}));
  eval.refuses(2, "beyond the model's", with({gone, "--context", "8193"}));
  eval.refuses(2, "beyond the model's",
               {"generate", "--model", kModel, "--codec", gone, "--prompt", "a", "--new-tokens", "8192"});
  eval.refuses(3, "/nowhere/full.json", with({gone, "-o", "/nowhere/full.json"}));
  // An override ends the list of texts; what is neither is a file that is not there.
  eval.refuses(2, "did you mean 'window'",
               {"replay", "--model", kModel, "--codec", eval.codec, "--text", kText, "cache.windw=3"});
  eval.refuses(2, "error: --text: File does not exist: gone.txt",
               {"replay", "--model", kModel, "--codec", eval.codec, "--text", "gone.txt"});
  eval.refuses(2, "--no-thinking requires --chat",
               {"generate", "--model", kModel, "--codec", "exact", "--prompt", "a", "--no-thinking"});
  eval.refuses(2, "only qwen3 has that switch",
               {"generate", "--model", kModel, "--codec", "exact", "--prompt", "a", "--chat", "--no-thinking"});
  eval.refuses(2, "a frozen codec takes only cache.*", with({eval.codec, "codec.bits=3"}));
  eval.refuses(2, "has no meaning", with({eval.codec, "cache.residual=32"}));
  eval.refuses(2, "no prompt was given", {"generate", "--model", kModel, "--codec", "exact"});
  eval.refuses(2, "top_p", {"generate", "--model", kModel, "--codec", "exact", "--prompt", "a", "--top-p", "0"});
  eval.refuses(2, "not a count", {"memory", "--model", kModel, "--context", "4q"});
  // What stands twice in a list.
  eval.refuses(2, "--context 100,100: 100 stands twice", {"memory", "--model", kModel, "--context", "100,100"});
  eval.refuses(2, "--context 4096,4k: 4k stands twice", {"memory", "--model", kModel, "--context", "4096,4k"});
  eval.refuses(2, "--metrics: 'kld' stands twice", with({"exact", "--metrics", "kld,kld"}));
  eval.refuses(2, "stands twice", with({"exact", "--text", kText}));
  // Data.
  eval.refuses(3, "nowhere.gguf", {"replay", "--model", "/nowhere.gguf", "--codec", "exact", "--text", kText});
  eval.refuses(3, "nowhere.codec.h5", with({gone}));
  write_codec(eval.dir / "other.codec.h5", {{"name", "rtn"}}, {{"sinks", 4}}, std::string(64, 'b'));
  eval.refuses(3, "other.codec.h5: trained on the model with hash bbbb", with({eval.dir / "other.codec.h5"}));
  const std::string archive = read_file(eval.codec);
  write_file(eval.dir / "half.codec.h5", archive.substr(0, archive.size() / 2));
  eval.refuses(3, "half.codec.h5", with({eval.dir / "half.codec.h5"}));
  write_file(eval.dir / "bad.txt", std::string(2000, 'a') + "\xff\xfe");
  eval.refuses(3, "not UTF-8: byte 0xff at offset 2000",
               {"replay", "--model", kModel, "--codec", "exact", "--text", eval.dir / "bad.txt"});
  write_file(eval.dir / "short.txt", "too short");
  eval.refuses(3, "no text holds a whole window",
               {"replay", "--model", kModel, "--codec", "exact", "--text", eval.dir / "short.txt"});
  write_file(eval.dir / "ids.txt", "1 2 49152");
  eval.refuses(3, "token id 49152",
               {"replay", "--model", kModel, "--codec", "exact", "--token-ids", eval.dir / "ids.txt"});
  // Not there.
  eval.refuses(4, "CUDA", with({"exact", "--attention", "cuda-table"}));
}

TEST_CASE("names that are not UTF-8 are refused before minutes of work would be written under them", "[cli][eval]") {
  const Eval eval;
  const std::string text = eval.dir / "caf\xe9.txt";
  write_file(text, text_of(kText));
  const auto refuses = [&](const std::string& tool, const std::vector<std::string>& arguments) {
    const ToolRun r = run_tool_of_build(tool, eval.dir.path.string(), arguments);
    INFO(r.err);
    CHECK(r.code == 2);
    CHECK(r.out.empty());
    CHECK_THAT(r.err, Catch::Contains("caf\xef\xbf\xbd.txt' is not UTF-8") && Catch::Contains("rename the file"));
  };
  refuses("vqkv-eval", {"replay", "--model", kModel, "--codec", "exact", "--context", "128", "--text", text});
  refuses("vqkv-dump", {"capture", "--model", kModel, "--max-tokens", "16", "-o", eval.dir / "t.h5", "--text", text});
  refuses("vqkv-sweep", {"plan", "sweep.yaml", "trace.path=" + text, "--dry-run"});
}

TEST_CASE("vqkv-eval: overrides of a frozen codec's cache are one change, as the keys of a file are", "[cli][eval]") {
  const Eval eval;
  const auto protocol = [&](std::vector<std::string> overrides) {
    overrides.insert(overrides.begin(),
                     {"memory", "--model", kModel, "--codec", eval.codec, "--context", "512", "--measure-up-to", "0"});
    return eval.json(overrides)[1]["protocol"].get<std::string>();
  };
  const std::string own = "window 16, blocks of 16 + 4 sinks";
  CHECK(protocol({"cache.policy=all"}) == own);
  CHECK(protocol({"cache.prompt=0"}) == own);
  CHECK(protocol({"cache.generated=coded"}) == own);
  CHECK(protocol({"cache.policy=streaming", "cache.policy=all"}) == own);
  CHECK(protocol({"cache.k.rule=none", "cache.v.rule=none"}) == "everything exact");
  const std::string within = own + ", within a prompt of 32 tokens",
                    parted = "keys: window 48, blocks of 16; values: window 32, blocks of 16 + 4 sinks";
  CHECK(protocol({"cache.prompt=32", "cache.generated=exact"}) == within);
  CHECK(protocol({"cache.generated=exact", "cache.prompt=32"}) == within);
  CHECK(protocol({"cache.k.window=48", "cache.window=32"}) == parted);
  CHECK(protocol({"cache.window=32", "cache.k.window=48"}) == parted);
  const std::vector<std::string> memory{"memory", "--model", kModel, "--codec", eval.codec};
  for (const char* meaningless : {"cache.residual=32", "cache.k.residual=32"}) {
    std::vector<std::string> arguments = memory;
    arguments.emplace_back(meaningless);
    eval.refuses(2, "has no meaning under the cache rules", arguments);
  }
  // Nor is it lost in a codec that is made here, and not frozen.
  const std::string kivi = eval.dir / "kivi.yaml";
  write_file(kivi, "codec: {name: kivi}\ncache: {rule: kivi, residual: 32}\n");
  for (const char* meaningless : {"cache.window=32", "cache.v.flush=32"})
    eval.refuses(2, std::string("'") + meaningless + "' has no meaning under the cache rules",
                 {"memory", "--model", kModel, "--codec", kivi, meaningless});
}

TEST_CASE("vqkv-eval: caches beyond this machine's memory are refused before any of it is taken", "[cli][eval]") {
  const Eval eval;
  const std::string sinks = "cache.sinks=16777216", needed = "bytes of memory needed";
  eval.refuses(2, "16777216 sinks), 512 tokens, the largest of 5 caches",
               {"replay", "--model", kModel, "--codec", eval.codec, "--text", kText, "--context", "512", sinks});
  eval.refuses(2, needed, {"generate", "--model", kModel, "--codec", eval.codec, "--prompt", "a", sinks});
  eval.refuses(2, needed, {"memory", "--model", kModel, "--codec", eval.codec, "--context", "512", sinks});
  eval.refuses(2, "exact (everything exact), 1024 sequences of 8128 tokens",
               {"speed", "--model", kModel, "--batch", "1024", "--prompt-tokens", "8000", "--new-tokens", "128"});
  // Sinks that are never allocated cost nothing.
  CHECK(
      eval.json({"memory", "--model", kModel, "--codec", eval.codec, "--context", "512", "--measure-up-to", "0", sinks})
          .size() == 2);
}

namespace {

// The process that `parent` started, once it is there.
pid_t child_of(pid_t parent) {
  for (int i = 0; i < 6000; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      const std::string number = entry.path().filename(), stat = text_of(entry.path() / "stat");
      const size_t after_name = stat.rfind(") ");  // "12 (name) S PARENT ..."
      if (number.find_first_not_of("0123456789") == std::string::npos && after_name != std::string::npos &&
          std::atoi(stat.c_str() + after_name + 4) == parent)
        return std::stoi(number);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  FAIL("no child was started");
  return -1;
}

}  // namespace

TEST_CASE("vqkv-eval memory: how the process that measures ended is said in words", "[cli][eval]") {
  const Eval eval;
  // The exact cache alone: an archive would be looked at by another process first.
  const std::vector<std::string> arguments{"memory", "--model",         kModel, "--codec", "exact", "--context",
                                           "8k",     "--measure-up-to", "8k",   "-q"};
  pid_t tool = start_tool("vqkv-eval", eval.dir.path.string(), arguments);
  kill(child_of(tool), SIGKILL);
  const ToolRun killed = finish_tool(eval.dir.path.string(), tool);
  CHECK(killed.code == 1);
  CHECK(killed.out.empty());
  CHECK_THAT(killed.err, Catch::Contains("exact at 8192 tokens: the process that measured it: killed by signal 9 "
                                         "(Killed), nothing on its stderr"));
  // An interrupt ends both, and what was asked for is not printed by halves.
  tool = start_tool("vqkv-eval", eval.dir.path.string(), arguments);
  const pid_t measuring = child_of(tool);
  kill(tool, SIGINT);
  const ToolRun stopped = finish_tool(eval.dir.path.string(), tool);
  CHECK(stopped.code == 130);
  CHECK(stopped.err == "interrupted\n");
  CHECK(kill(measuring, 0) != 0);
}

TEST_CASE("vqkv-eval: an interrupt is one line on stderr in every verb", "[cli][eval]") {
  const Eval eval;
  for (const std::vector<std::string>& verb :
       {std::vector<std::string>{"speed", "--prompt-tokens", "4096", "--codec", "exact"},
        {"generate", "--codec", "exact", "--prompt", "a", "--new-tokens", "4096", "--ignore-stop"}}) {
    std::vector<std::string> arguments = verb;
    arguments.insert(arguments.end(), {"--model", kModel, "-q"});
    const pid_t tool = start_tool("vqkv-eval", eval.dir.path.string(), arguments);
    wait_for_handlers(tool);
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    kill(tool, SIGTERM);
    const ToolRun r = finish_tool(eval.dir.path.string(), tool);
    CHECK(r.code == 143);
    CHECK(r.err == "interrupted\n");
  }
}

TEST_CASE("vqkv-eval: an interrupt keeps what is finished and says so", "[cli][eval]") {
  const Eval eval;
  const pid_t child = start_tool("vqkv-eval", eval.dir.path.string(),
                                 {"replay", "--model", kModel, "--codec", eval.codec, "--text", kText, "--context",
                                  "128", "--windows", "0", "--json"});
  // A sanitizer build on a busy machine takes over a minute for its first window; ctest bounds the rest.
  for (int i = 0; i < 12000 && text_of(eval.dir / "stderr").find("window") == std::string::npos; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  kill(child, SIGINT);
  const ToolRun r = finish_tool(eval.dir.path.string(), child);
  CHECK(r.code == 130);
  const Json partial = Json::parse(r.out);
  CHECK(partial["facts"]["interrupted"] == true);
  CHECK(partial["facts"]["windows"] >= 1);
  // Before anything is finished nothing is printed.
  const pid_t early = start_tool(
      "vqkv-eval", eval.dir.path.string(),
      {"replay", "--model", kModel, "--codec", "exact", "--text", kText, "--context", "2048", "--mode", "stepwise"});
  wait_for_handlers(early);
  kill(early, SIGTERM);
  const ToolRun nothing = finish_tool(eval.dir.path.string(), early);
  CHECK(nothing.code == 143);
  CHECK(nothing.out.empty());
  CHECK(nothing.err.ends_with("interrupted\n"));
}

TEST_CASE("vqkv-dump: a device that is not there is told before anything is read", "[cli][dump]") {
  const TestFolder dir;
  const ToolRun r = run_tool_of_build(
      "vqkv-dump", dir.path.string(),
      {"capture", "--model", "/nowhere.gguf", "--text", kText, "-o", "t.trace.h5", "--device", "cuda"});
  CAPTURE(r.err);
  if (r.code == 3) return;  // one is there, and the model is not
  CHECK(r.code == 4);
  CHECK(r.err.find("--device cpu") != std::string::npos);
}
