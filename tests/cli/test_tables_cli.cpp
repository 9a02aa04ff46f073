// The tables of papers as vqkv-eval prints them, and a real replay that enters a row.
#include <filesystem>
#include <regex>
#include <set>

#include "io/atomic_file.h"
#include "support/eval_tool.h"

using namespace vqkv;

namespace {

const std::string kPaper = R"(paper: mine
title: A paper
arxiv: "2601.00001"
venue: nowhere
tables:
- id: bits
  title: Bits a value
  source: section 1
  protocol: codes and side data
  shape: {name: M, layers: 2, q_heads: 4, kv_heads: 2, head_dim: 64}
  quantity: bits
  columns: [bits a value]
  rows:
  - {method: KIVI-2, values: [3], codec: {name: kivi, preset: default}}
  - {method: KIVI-4, values: [about 4], codec: {name: kivi, preset: kivi4}, remark: nominal}
- id: perplexity
  title: Perplexity
  source: section 2
  model: SmolLM2 135M Instruct
  texts: jargon
  mode: forced
  context: 96
  quantity: ppl
  needs: the model
  fill: vqkv-eval replay
  columns: [perplexity]
  rows:
  - {method: exact, values: [10], codec: {name: exact}}
  - {method: RTN, values: [11], codec: {name: rtn, bits: 4}, cache: {sinks: 4, window: 16, flush: 16}}
  - {method: RTN-2, values: [12], codec: {name: rtn, bits: 2}, cache: {sinks: 4, window: 16, flush: 16}}
)";

// What `tables mine.yaml` prints of the first table: written by hand.
const std::string kGolden = R"(# A paper (arXiv 2601.00001, nowhere)

## mine/bits: Bits a value

At M: 2 layers, 2 KV heads of 64.
Protocol: codes and side data.
Source: section 1.

| method | of           |   paper | our ledger | mind    |
| ------ | ------------ | ------: | ---------: | ------- |
| KIVI-2 | bits a value |       3 |          3 |         |
| KIVI-4 | bits a value | about 4 |          5 | nominal |

## mine/perplexity: Perplexity
)";

}  // namespace

TEST_CASE("vqkv-eval tables: one table as text, the rest as data", "[cli][eval][papers]") {
  const Eval eval;
  const std::string mine = eval.dir / "mine.yaml";
  write_file(mine, kPaper);
  const ToolRun r = eval({"tables", mine, "-q"});
  CHECK(r.code == 0);
  CHECK(r.err.empty());
  CHECK(r.out.substr(0, kGolden.size()) == kGolden);
  CHECK(r.out.find("| measured under these conditions |") != std::string::npos);
  CHECK(r.out.find("Needs the model.\nFilled by: vqkv-eval replay.\n") != std::string::npos);

  const Json full = eval.json({"tables", mine});
  REQUIRE(full["papers"].size() == 1);
  const Json& number = full["papers"][0]["tables"][0]["numbers"][1];
  CHECK(number["computed"] == 5);
  CHECK(number["value"] == "about 4");
  CHECK(number["source"] == "section 1");
  CHECK(number["measured"].empty());
  const ToolRun csv = eval({"tables", mine, "--format", "csv", "-q"});
  CHECK(csv.out.rfind("paper,table,method,what,by,value,quantity,computed,measured,other,", 0) == 0);
  CHECK(csv.out.find("mine,bits,KIVI-4,bits a value,paper,about 4,bits,5,") != std::string::npos);

  const Json list = eval.json({"ls", "tables"});
  CHECK(list.size() >= 11);
  for (const Json& p : list) {
    CHECK(p["measured"] == 0);
    CHECK(p["numbers"] > 0);
  }
}

TEST_CASE("vqkv-eval tables: what fills a table can be typed", "[cli][eval][papers]") {
  const Eval eval;
  const Json full = eval.json({"tables"});
  std::set<std::string> verbs, files;
  const std::regex verb("vqkv-(eval|sweep|dump) [a-z]+"), file("(configs|scripts|docs)/[a-z_/-]+\\.[a-z]+");
  for (const Json& p : full["papers"])
    for (const Json& t : p["tables"]) {
      const std::string fill = t["fill"];
      for (std::sregex_iterator m(fill.begin(), fill.end(), verb), end; m != end; ++m) verbs.insert(m->str());
      for (std::sregex_iterator m(fill.begin(), fill.end(), file), end; m != end; ++m) files.insert(m->str());
    }
  CHECK(verbs.size() >= 4);
  for (const std::string& v : verbs) {
    CAPTURE(v);
    const size_t space = v.find(' ');
    CHECK(run_tool_of_build(v.substr(0, space), eval.dir.path.string(), {v.substr(space + 1), "--help"}).code == 0);
  }
  for (const std::string& f : files) {
    CAPTURE(f);
    CHECK(std::filesystem::exists(std::string(VQKV_SOURCE_DIR) + "/" + f));
  }
}

TEST_CASE("vqkv-eval tables: a replay of the small model enters the row whose conditions it meets",
          "[cli][eval][papers]") {
  const Eval eval;
  const std::string mine = eval.dir / "mine.yaml", result = eval.dir / "r.json", text = eval.dir / "jargon-short.txt";
  write_file(text, text_of(kText).substr(0, 1200));
  const Json r = eval.json({"replay", "--model", kModel, "--codec", eval.codec, "--text", text, "--context", "96",
                            "--windows", "0", "--skip-no-window", "-o", result});
  std::string paper = kPaper;
  const std::string name = r["facts"]["model"];
  const size_t at = paper.find("SmolLM2 135M Instruct");
  paper.replace(at, std::string("SmolLM2 135M Instruct").size(), name);
  write_file(mine, paper);
  const auto numbers = [&](const std::string& file) {
    return eval.json({"tables", file, "--measured", result})["papers"][0]["tables"][1]["numbers"];
  };
  const Json own = numbers(mine);
  REQUIRE(own[0]["measured"].size() == 1);
  CHECK(own[0]["measured"][0]["value"] == r["rows"][1]["ppl.exact"]);
  REQUIRE(own[1]["measured"].size() == 1);
  CHECK(own[1]["measured"][0]["value"] == r["rows"][1]["ppl"]);
  CHECK(own[1]["measured"][0]["of_exact"] == r["rows"][1]["ppl.exact"]);
  CHECK(own[2]["measured"].empty());  // of other bits
  CHECK(own[2]["other"].empty());

  // Another model's row: the number stands apart, with what it does not meet.
  paper.replace(at, name.size(), "Big-8B");
  write_file(mine, paper);
  const Json other = numbers(mine);
  CHECK(other[1]["measured"].empty());
  REQUIRE(other[1]["other"].size() == 1);
  CHECK(other[1]["other"][0]["unmet"] == Json::array({name}));
  const ToolRun table = eval({"tables", mine, "--measured", result, "-q"});
  CHECK(table.out.find("measured under others: no reproduction") != std::string::npos);

  // A file that serves no table is told of.
  const ToolRun none = eval({"tables", "think", "--measured", result, "-q"});
  CHECK(none.code == 0);
  CHECK(none.err.find("r.json: no number of these tables") != std::string::npos);
  CHECK(eval.json({"ls", "tables", "--measured", result}).size() >= 11);
}

TEST_CASE("vqkv-eval tables: what is wrong is told, with its exit code", "[cli][eval][papers]") {
  const Eval eval;
  const std::string mine = eval.dir / "mine.yaml", result = eval.dir / "memory.json";
  write_file(mine, std::string(kPaper).replace(kPaper.find("source: section 1"), 6, "sourse"));
  eval.refuses(2, "mine.yaml:8:", {"tables", mine, "-q"});
  eval.refuses(2, "did you mean 'kivi'", {"tables", "kivy", "-q"});
  write_file(result, "[{\"codec\": \"exact\"}]");
  eval.refuses(3, "memory.json: neither", {"tables", "kivi", "--measured", result, "-q"});
  write_file(result, "{");
  eval.refuses(3, "memory.json", {"tables", "kivi", "--measured", result, "-q"});
  eval.refuses(2, "--measured goes with", {"ls", "modes", "--measured", result, "-q"});
  eval.refuses(2, "", {"tables", "kivi", "--measured", eval.dir / "absent.json", "-q"});
}
