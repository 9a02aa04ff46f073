// The real tools over the real small model: strategies of decoding, listed, explained, run beside their target.
#include "io/atomic_file.h"
#include "support/eval_tool.h"

using namespace vqkv;

namespace {

struct StrategyEval : Eval {
  std::string nibbles = dir / "nibbles.codec.h5", prompt = dir / "prompt.txt";
  StrategyEval() {
    write_codec(nibbles, {{"name", "quantspec"}, {"group", 64}}, {{"sinks", 0}, {"window", 65}, {"flush", 64}});
    write_file(prompt, text_of(kText).substr(0, 1200));
  }
  std::vector<std::string> with(const std::string& verb, std::vector<std::string> more) const {
    std::vector<std::string> all = {verb,   "--model",      kModel, "--codec",      nibbles, "--prompt-file",
                                    prompt, "--new-tokens", "24",   "--ignore-stop"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
};

}  // namespace

TEST_CASE("vqkv-eval strategy: the plain rows, the guessing one, and its target's text", "[cli][eval][strategy]") {
  const StrategyEval eval;
  const Json r = eval.json(eval.with("strategy", {"strategy.gamma=3"}));
  REQUIRE(r["rows"].size() == 3);
  const Json &exact = r["rows"][0], &target = r["rows"][1], &guessed = r["rows"][2];
  CHECK(exact["codec"] == "exact");
  CHECK(target["codec"] == "nibbles");
  CHECK(target["strategy"] == "plain");
  CHECK_FALSE(target.contains("acceptance"));
  CHECK(target["tokens_a_pass"] == 1.0);
  CHECK(guessed["strategy"] == "quantspec");
  CHECK(guessed["knobs"] == Json({{"gamma", 3}, {"draft_weights", "mlp"}, {"weight_group", 128}}));
  CHECK(guessed["target"] == "nibbles");
  CHECK(guessed["same_text"] == "yes");
  CHECK(guessed["tokens"] == target["tokens"]);
  CHECK(guessed["path"] == "cpu-reconstruct");
  for (const char* kind :
       {"codes", "side", "window", "padding", "index"})  // attention's own buffers are those of a block
    CHECK(guessed["bytes"][kind] == target["bytes"][kind]);
  const Json& counts = guessed["counts"];
  CHECK(counts["target"]["passes"].get<int>() + counts["accepted"].get<int>() == 23);
  CHECK(guessed["acceptance"].get<double>() ==
        Approx(counts["accepted"].get<double>() / counts["drafted"].get<double>()));
  CHECK(guessed["acceptance"] > 0.5);
  CHECK(guessed["tokens_a_pass"] > 1.5);
  CHECK(guessed["moved_bytes"] == 0);
  // A pass of the draft reads half the codes, and the matrices of the MLPs in 4 bits instead of 32.
  const auto a_pass = [&](const char* who, const char* what) {
    return counts[who][what].get<double>() / counts[who]["passes"].get<double>();
  };
  CHECK(a_pass("draft", "codes") < 0.6 * a_pass("target", "codes"));
  CHECK(a_pass("draft", "weights") < 0.6 * a_pass("target", "weights"));
  CHECK(exact["code_bytes"] == 0);
  CHECK(exact["exact_bytes"].get<double>() > target["code_bytes"].get<double>() + target["exact_bytes"].get<double>());

  const ToolRun table = eval(eval.with("strategy", {"-q"}));
  CHECK(table.code == 0);
  CHECK(table.out.rfind("| codec", 0) == 0);
  for (const char* part : {"acceptance", "tokens/pass", "weights B/token", "its text", "each weight, code"})
    CHECK(table.out.find(part) != std::string::npos);
}

TEST_CASE("vqkv-eval generate takes a strategy, beside the plain row that it stands for", "[cli][eval][strategy]") {
  const StrategyEval eval;
  const Json r = eval.json(eval.with("generate", {"--strategy", "quantspec", "--temperature", "0.8", "--seed", "3"}));
  REQUIRE(r["rows"].size() == 3);
  CHECK(r["rows"][2]["tokens"] == r["rows"][1]["tokens"]);
  CHECK(r["rows"][2]["same_text"] == "yes");
  const ToolRun text = eval(eval.with("generate", {"--strategy", "quantspec", "-q"}));
  CHECK(text.code == 0);
  CHECK(text.out.find("nibbles by quantspec") != std::string::npos);
  const ToolRun plain = eval(eval.with("generate", {"-q"}));
  CHECK(plain.code == 0);
  CHECK(plain.out.find("acceptance") == std::string::npos);
}

TEST_CASE("vqkv-eval strategy specache: bytes moved between its tiers", "[cli][eval][strategy]") {
  const StrategyEval eval;
  const std::string copy = eval.dir / "copy.codec.h5";
  write_codec(copy, {{"name", "specache"}}, {{"sinks", 0}, {"window", 64}, {"flush", 64}});
  const Json r = eval.json({"strategy", "--strategy", "specache", "--model", kModel, "--codec", copy, "--prompt-file",
                            eval.prompt, "--new-tokens", "6", "--ignore-stop", "--exact-prefill", "strategy.pairs=32"});
  const Json& row = r["rows"][2];
  CHECK(row["target"] == "exact");
  CHECK(row["tokens_a_pass"] == 1.0);
  CHECK(row["counts"]["fetched"] == 30 * 3 * 32 * 2 * 64 * 2);
  CHECK(row["moved_bytes"] == row["counts"]["fetched"]);  // a fetch a token
  CHECK(row["counts"]["far"].get<int64_t>() > row["bytes"]["codes"].get<int64_t>());
}

TEST_CASE("strategies are listed and explained, and refused by name", "[cli][eval][strategy]") {
  const StrategyEval eval;
  const Json rows = eval.json({"ls", "strategies"});
  CHECK(rows[0]["name"] == "plain");
  const auto sweep = [&](const std::vector<std::string>& arguments) {
    return run_tool_of_build("vqkv-sweep", eval.dir.path.string(), arguments);
  };
  CHECK(Json::parse(sweep({"ls", "strategies", "--json"}).out) == rows);
  const Json told = Json::parse(sweep({"explain", "strategy.quantspec", "--json"}).out);
  CHECK(told["strategy"] == "quantspec");
  CHECK(told["bibtex"] == "tiwari2025quantspec");
  CHECK(told["knobs"][0]["knob"] == "gamma");
  const Json codec = Json::parse(sweep({"explain", "quantspec", "--json"}).out);
  CHECK(codec["codec"] == "quantspec");
  CHECK(codec["see also"] == "strategy.quantspec");
  CHECK(sweep({"explain", "codec.plain"}).code == 2);

  eval.refuses(2, "did you mean 'quantspec'", eval.with("strategy", {"--strategy", "quantspecs"}));
  eval.refuses(2, "did you mean 'gamma'", eval.with("strategy", {"strategy.gama=3"}));
  eval.refuses(2, "strategy 'plain' has no knobs; name the one that it is of with --strategy",
               eval.with("generate", {"strategy.gamma=3"}));
  eval.refuses(2, "strategy.gamma", eval.with("strategy", {"strategy.gamma=0"}));
  eval.refuses(2, "a draft can't read codec 'rtn'",
               {"strategy", "--model", kModel, "--codec", eval.codec, "--prompt", "One day"});
  eval.refuses(2, "keeps them to itself",
               {"strategy", "--model", kModel, "--codec", "exec:true", "--prompt", "One day"});
}
