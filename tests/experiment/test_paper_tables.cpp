// Tables of papers: the strict loader, the files that are compiled in, and which measured numbers enter a row.
#include "experiment/paper_tables.h"

#include <cmath>
#include <set>

#include "codec/codec_set.h"
#include "experiment/paper_measured.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/test_folder.h"

using namespace vqkv;

namespace {

const std::string kText = R"(paper: mine
title: A paper
arxiv: "2601.00001"
venue: nowhere
tables:
- id: bits
  title: Bits
  source: section 1
  shape: {name: M, layers: 2, q_heads: 4, kv_heads: 2, head_dim: 64}
  columns: [{what: keys, quantity: bits.k}, {what: both, quantity: bits}]
  rows:
  - {method: A, values: [3, 3.0], codec: {name: kivi, preset: default}}
  - {method: B, values: [~, about 5], codec: {name: kivi, preset: kivi4}}
- id: perplexity
  title: Perplexity
  source: section 2
  model: [Big-8B, Meta-Big-8B]
  texts: wikitext-2
  mode: fake-quant
  context: 2048
  quantity: ppl
  needs: the model
  fill: vqkv-eval replay
  columns: [perplexity]
  rows:
  - {method: exact, values: [5.5], codec: {name: exact}}
  - {method: A, values: [6.5], codec: {name: quantspec, preset: default}, scaled: [{name: quantspec, preset: g64}]}
- id: other
  title: A task
  source: section 3
  unconfirmed: shots
  needs: a data set
  fill: none yet
  columns: [score]
  rows:
  - {method: A, values: [unconfirmed]}
)";

Paper read(const std::string& text) { return read_paper(parse_yaml(text, "mine.yaml")); }

std::string with(const std::string& from, const std::string& to) {
  std::string text = kText;
  const size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  return text.replace(at, from.size(), to);
}

void refused(const std::string& from, const std::string& to, std::initializer_list<const char*> parts) {
  INFO(from << " -> " << to);
  check_says(error_of([&] { read(with(from, to)); }), parts);
}

// What the second row of `perplexity` asks for.
MeasuredNumber measured_a() {
  MeasuredNumber m;
  m.quantity = "ppl";
  m.value = 6.6;
  m.of_exact = 5.6;
  m.codec = "a";
  m.config = canonical_codec_config({{"name", "quantspec"}});
  m.policy.sinks = 0;
  m.policy.k = m.policy.v = {129, 128};
  m.model = "meta_big 8b";
  m.mode = "fake-quant";
  m.texts = {"wikitext-2-test.txt"};
  m.context = 2048;
  return m;
}

}  // namespace

TEST_CASE("a paper's file is read number by number, columns over rows over tables", "[papers]") {
  const Paper p = read(kText);
  CHECK(p.name == "mine");
  CHECK(p.arxiv == "2601.00001");
  REQUIRE(p.tables.size() == 3);
  REQUIRE(p.tables[0].numbers.size() == 3);  // null: the paper prints none
  const PaperNumber& first = p.tables[0].numbers[0];
  CHECK(first.method == "A");
  CHECK(first.what == "keys");
  CHECK(first.quantity == "bits.k");
  CHECK(first.source == "section 1");
  CHECK(first.value == 3);
  CHECK(computed_value(first) == 3);
  CHECK(p.tables[0].numbers[2].value == "about 5");
  CHECK(computed_value(p.tables[0].numbers[2]) == 5);
  CHECK(is_measured(p.tables[1].numbers[1]));
  CHECK(p.tables[1].numbers[1].models == std::vector<std::string>{"Big-8B", "Meta-Big-8B"});
  CHECK(p.tables[2].numbers[0].unconfirmed == "shots");
  CHECK_FALSE(is_computed(p.tables[2].numbers[0]));
  CHECK_FALSE(is_measured(p.tables[2].numbers[0]));
}

TEST_CASE("a cache section is completed by columns, any other key replaced, null takes it back", "[papers]") {
  const Paper p = read(R"(paper: p
title: t
arxiv: "1"
venue: v
tables:
- id: a
  title: t
  source: s
  remark: of the table
  quantity: held
  shape: {name: M, layers: 1, q_heads: 2, kv_heads: 2, head_dim: 64}
  codec: {name: exact, preset: think}
  cache: {sinks: 0, window: 32, flush: 1, generated: exact}
  columns: [{what: at 100, tokens: 100, cache: {prompt: 100}}, {what: at 200, tokens: 200, cache: {prompt: 200}}]
  rows:
  - {method: A, values: [1, 2], remark: ~}
)");
  CHECK(p.tables[0].numbers[0].cache["prompt"] == 100);
  CHECK(p.tables[0].numbers[1].cache["prompt"] == 200);
  CHECK(p.tables[0].numbers[1].cache["window"] == 32);
  CHECK(p.tables[0].numbers[0].remark.empty());
}

TEST_CASE("what is wrong in a paper's file is refused with its line", "[papers]") {
  refused("  source: section 1\n", "",
          {"mine.yaml:", "tables[0].rows[0]", "source", "every number names where it stands"});
  refused("venue: nowhere", "venus: nowhere", {"mine.yaml:4:", "unknown key 'venus'", "venue"});
  refused("venue: nowhere\n", "", {"venue", "is missing"});
  refused("  fill: vqkv-eval replay", "  fil: vqkv-eval replay",
          {"mine.yaml:23:", "unknown key 'fil'", "did you mean 'fill'"});
  refused("method: A, values: [3,", "methud: A, values: [3,", {"mine.yaml:12:", "unknown key 'methud'", "method"});
  refused("what: keys, quantity: bits.k", "what: keys, quantity: bits.q", {"bits.q", "bits.k"});
  refused("what: keys,", "what: keys, mode: [1],", {"mode", "a text"});
  refused("values: [3, 3.0]", "values: [3]", {"tables[0].rows[0].values", "a list of 2"});
  refused("values: [3, 3.0]", "values: [3, true]", {"numbers, or the paper's words"});
  refused("  needs: a data set\n", "", {"tables[2]", "needs"});
  refused("  fill: none yet\n", "", {"tables[2]", "needs"});
  refused("  mode: fake-quant\n", "", {"tables[1].rows[0]", "`mode` is missing"});
  refused("  mode: fake-quant\n", "  mode: fake\n", {"fake"});
  refused("  context: 2048\n", "  context: soon\n", {"context", "an integer"});
  refused("  texts: wikitext-2\n", "", {"`texts` is missing"});
  refused("  model: [Big-8B, Meta-Big-8B]\n", "", {"`model` is missing"});
  refused("codec: {name: kivi, preset: default}", "codec: {name: kiwi}", {"tables[0].rows[0]", "kiwi", "kivi"});
  refused(", codec: {name: kivi, preset: default}", "", {"`codec` is missing"});
  refused(", head_dim: 64}", "}", {"head_dim"});
  refused("q_heads: 4", "q_heads: 3", {"multiple of KV heads"});
  refused("- id: other", "- id: bits", {"tables[2].id", "stands twice"});
  check_says(error_of([] { read("paper: a\ntitle: b\narxiv: \"1\"\nvenue: c\ntables: []\n"); }), {"a list of tables"});
  refused("values: [unconfirmed]", "values: [~]", {"tables[2].rows", "without a number"});
  refused("scaled: [{name: quantspec, preset: g64}]", "scaled: {name: quantspec}", {"scaled", "a list"});
  check_says(error_of([] { find_papers({"kivy"}); }), {"kivy", "did you mean 'kivi'"});
  check_says(error_of([] { find_papers({"kivi", "kivi"}); }), {"stands twice"});
  check_says(error_of([] { find_papers({"kivi", "all"}); }), {"all"});
  check_says(error_of([] { find_papers({"/nowhere/mine.yaml"}); }), {"/nowhere/mine.yaml"});
}

TEST_CASE("the papers that are compiled in: all numbers have sources, and formulas are what the ledger says",
          "[papers][golden]") {
  std::set<std::string> names;
  for (const Paper& p : find_papers({"all"})) {
    CHECK(names.insert(p.name).second);
    for (const PaperTable& t : p.tables)
      for (const PaperNumber& n : t.numbers) {
        CAPTURE(p.name, t.id, n.method, n.what);
        CHECK_FALSE(n.source.empty());
        if (n.value == kUnconfirmed) CHECK_FALSE(n.unconfirmed.empty());
        if (!is_computed(n)) continue;
        const double computed = computed_value(n);
        CHECK(std::isfinite(computed));
        if (!t.by_formula || !n.value.is_number()) continue;
        // To the digits that the formula's value is given with, two at least; three of them were rounded the other way.
        const std::string text = canonical_json(n.value);
        const size_t dot = text.find('.');
        const auto digits = dot == std::string::npos ? size_t{2} : std::max<size_t>(2, text.size() - dot - 1);
        CHECK(computed == Approx(n.value.get<double>()).margin(0.55 * std::pow(10.0, -static_cast<double>(digits))));
      }
  }
  for (const char* name : {"vqkv", "commvq", "kumar", "kivi", "kvquant", "qjl", "calibquant", "quantspec", "think",
                           "decoquant", "specache"})
    CHECK(names.contains(name));
  CHECK(paper_files().size() == names.size());
}

TEST_CASE("a measured number is a row's own under the row's conditions alone", "[papers]") {
  const Paper p = read(kText);
  const PaperNumber &exact = p.tables[1].numbers[0], &row = p.tables[1].numbers[1];
  const MeasuredNumber same = measured_a();
  REQUIRE(unmet_conditions(row, same));
  CHECK(unmet_conditions(row, same)->empty());
  CHECK_FALSE(unmet_conditions(exact, same));                   // another codec
  CHECK_FALSE(unmet_conditions(p.tables[0].numbers[0], same));  // a number of the ledger's

  // Of another method, of other bits, under another cache, of another metric: not taken at all.
  const auto strange = [&](const auto& change) {
    MeasuredNumber m = same;
    change(m);
    return !unmet_conditions(row, m).has_value();
  };
  CHECK(strange([](MeasuredNumber& m) { m.config = canonical_codec_config({{"name", "kivi"}}); }));
  CHECK(strange([](MeasuredNumber& m) { m.config = canonical_codec_config({{"name", "quantspec"}, {"group", 32}}); }));
  CHECK(strange([](MeasuredNumber& m) { m.policy.sinks = 4; }));
  CHECK(strange([](MeasuredNumber& m) {
    m.mode = "forced";
    m.policy.v.window = 1;
  }));
  CHECK(strange([](MeasuredNumber& m) { m.quantity = "acceptance"; }));
  CHECK(strange([](MeasuredNumber& m) { m.strategy = "quantspec"; }));
  CHECK_FALSE(strange([](MeasuredNumber& m) { m.policy.v.window = 1; }));  // fake-quant has no window

  // Under other conditions it stands apart, and they are named.
  const auto unmet = [&](const PaperNumber& n, const auto& change) {
    MeasuredNumber m = same;
    change(m);
    const auto names = unmet_conditions(n, m);
    REQUIRE(names);
    return *names;
  };
  using Names = std::vector<std::string>;
  CHECK(unmet(row, [](MeasuredNumber& m) { m.model = "Small-135M"; }) == Names{"Small-135M"});
  CHECK(unmet(row, [](MeasuredNumber& m) { m.model = "Big-8B-Instruct"; }) == Names{"Big-8B-Instruct"});
  CHECK(unmet(row, [](MeasuredNumber& m) {
          m.texts = {"wikitext-2-test.txt", "c4.txt"};
        }) == Names{"wikitext-2-test.txt and 1 more"});
  CHECK(unmet(row, [](MeasuredNumber& m) { m.context = 1024; }) == Names{"1024 tokens a window"});
  CHECK(unmet(row, [](MeasuredNumber& m) { m.mode = "forced"; }) == Names{"mode forced"});
  CHECK(unmet(row, [](MeasuredNumber& m) { m.notes = {"the first 6 windows"}; }) == Names{"the first 6 windows"});
  CHECK(unmet(row, [](MeasuredNumber& m) {
          m.config = canonical_codec_config({{"name", "quantspec"}, {"group", 64}});
        }) == Names{"a, for smaller heads"});
  // What nobody could confirm is never met.
  PaperNumber open = row;
  open.context = 0;
  open.models.clear();
  open.mode = kUnconfirmed;
  CHECK(unmet(open, [](MeasuredNumber&) {}).size() == 3);
  // The exact cache's own number asks for neither mode nor cache.
  CHECK(unmet(exact, [](MeasuredNumber& m) {
          m.exact_cache = true;
          m.mode = "forced";
        }).empty());
}

TEST_CASE("acceptance is of a strategy behind a prompt of the row's length", "[papers]") {
  PaperNumber row;
  row.quantity = "acceptance";
  row.strategy = "quantspec";
  row.models = {"M"};
  row.mode = "prefill-exact";
  row.tokens = 4096;
  row.codec = {{"name", "quantspec"}, {"preset", "default"}};
  MeasuredNumber m = measured_a();
  m.quantity = "acceptance";
  m.strategy = "quantspec";
  m.mode = "prefill-exact";
  m.model = "M";
  m.tokens = 4000;
  REQUIRE(unmet_conditions(row, m));
  CHECK(unmet_conditions(row, m)->empty());
  m.tokens = 3000;
  CHECK(unmet_conditions(row, m) == std::vector<std::string>{"a prompt of 3000 tokens"});
  m.strategy = "specache";
  CHECK_FALSE(unmet_conditions(row, m));
}

TEST_CASE("result files are read strictly", "[papers]") {
  const TestFolder dir;
  const std::string path = dir / "r.json";
  const auto refuses = [&](const Json& j, std::initializer_list<const char*> parts) {
    write_file(path, j.dump());
    check_says(data_error_of([&] { read_measured(path); }), parts);
  };
  const Json row = {
      {"codec", "a"},
      {"mode", "forced"},
      {"ppl", 26.0},
      {"ppl.exact", 25.0},
      {"config", {{"k", {{"name", "rtn"}}}}},
      {"cache", {{"sinks", 4}, {"k", {{"window", 64}, {"flush", 32}}}, {"v", {{"window", 65}, {"flush", 1}}}}},
      {"bytes", {{"codes", 10}, {"side", 2}}},
      {"flags", Json::array({"extrapolated"})}};
  const Json facts = {{"model", "S"},
                      {"command", "vqkv-eval replay"},
                      {"context", 100},
                      {"windows", 6},
                      {"documents", {{{"name", "a.txt"}, {"tokens", 1000}}, {{"name", "b.txt"}, {"tokens", 99}}}}};
  Json whole = {{"facts", facts}, {"rows", {row}}};
  write_file(path, whole.dump());
  const auto read_back = read_measured(path);
  REQUIRE(read_back.size() == 2);
  CHECK(read_back[0].exact_cache);
  CHECK(read_back[0].value == 25);
  CHECK(read_back[0].notes == std::vector<std::string>{"the first 6 windows"});
  CHECK(read_back[1].value == 26);
  CHECK(*read_back[1].of_exact == 25);
  CHECK(read_back[1].notes == std::vector<std::string>{"the first 6 windows", "extrapolated"});
  CHECK(read_back[1].texts == std::vector<std::string>{"a.txt", "b.txt"});
  CHECK(read_back[1].policy.v.window == 65);
  // A row that holds no code is nobody's number.
  whole["rows"][0]["bytes"] = {{"codes", 0}, {"side", 0}};
  whole["facts"]["windows"] = 10;
  write_file(path, whole.dump());
  REQUIRE(read_measured(path).size() == 1);
  CHECK(read_measured(path)[0].notes.empty());

  refuses(Json::array({{{"codec", "exact"}, {"context", 1024}}}),
          {"r.json", "neither `vqkv-eval replay` nor `strategy`"});
  refuses({{"rows", {row}}}, {"neither"});
  refuses({{"facts", facts}, {"rows", Json::array()}}, {"neither"});
  for (const char* key : {"mode", "ppl.exact", "config", "cache", "bytes", "flags"}) {
    Json less = {{"facts", facts}, {"rows", {row}}};
    less["rows"][0].erase(key);
    refuses(less, {"rows[0]", key});
  }
  for (const char* key : {"model", "documents", "context", "windows", "command"}) {
    Json less = {{"facts", facts}, {"rows", {row}}};
    less["facts"].erase(key);
    refuses(less, {"r.json", key});
  }
  Json odd = {{"facts", facts}, {"rows", {row}}};
  odd["facts"]["context"] = 0;
  refuses(odd, {"context"});
}
