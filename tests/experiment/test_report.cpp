#include "codec/codec_set.h"
#include "experiment/cell_label.h"
#include "experiment/protocol.h"
#include "experiment/report.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>

#include "experiment/cost.h"
#include "experiment/svg.h"
#include "io/atomic_file.h"
#include "metric/measurement.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

Json measurement(const std::string& role, const std::string& tag, double value, double error = 0) {
  return {{"role", role}, {"tag", tag},  {"value", value},    {"stderr", error},
          {"n", 3},       {"unit", "1"}, {"better", "lower"}, {"exact", false}};
}

CellResult cell(int i, const std::string& method, double bits, double kl) {
  CellResult c;
  c.cell = {{"cell", std::to_string(i)},
            {"id", "c" + std::to_string(i)},
            {"axes", {{"codec.bits", i}}},
            {"config", {{"codec", {{"name", method}, {"bits", i}}}, {"contexts", {4096}}, {"sequences", {1, 64}}}}};
  Json ms = Json::array();
  Json m = measurement("report", "attention.softmax_kl", kl, kl / 10);
  m["details"] =
      Json::array({{{"axis", "layer,kv_head"}, {"shape", {2, 3}}, {"values", {kl, kl / 2, 2 * kl, nullptr, kl, kl}}}});
  ms.push_back(m);
  for (const char* tag : {"key.nmse", "value.nmse", "output.relative_error_after_wo", "logit.centred_rms"})
    ms.push_back(measurement("report", tag, kl * 0.3));
  for (const int s : {0, 1, 64}) {
    Json b = measurement("cost", "bits_per_value", bits + (s > 0 ? 1.0 / s : 0));
    b["context"] = 4096;
    if (s > 0) b["sequences"] = s;
    ms.push_back(b);
  }
  c.record = {{"status", "ok"}, {"measurements", ms}, {"flags", Json::array({"extrapolated"})}};
  return c;
}

size_t count(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += what.size()) ++n;
  return n;
}

}  // namespace

TEST_CASE("the report is one file that needs no network and names its cells, fronts and losses") {
  ResultSet r;
  r.plan = {{"plan", "abcdef0123456789"}, {"traces", Json::array()}};
  r.cells = {cell(2, "rvq", 2.1, 0.05), cell(3, "rvq", 3.1, 0.01), cell(4, "rtn", 4.5, 0.02),
             cell(5, "pq<x>", 1.1, 0.3)};
  CellResult skipped;
  skipped.cell = r.cells[0].cell;
  skipped.record = {{"status", "skipped"}, {"reason", "sub-vectors of 3 channels don't divide 64"}};
  r.cells.push_back(skipped);
  const auto path = std::filesystem::temp_directory_path() / ("vqkv-report-" + std::to_string(getpid()) + ".html");
  write_report(r, path.string());
  const std::string html = read_file(path.string());
  std::filesystem::remove(path);
  CHECK(html.find("http") == std::string::npos);
  CHECK(html.find("<script") == std::string::npos);
  CHECK(html.find("pq&lt;x&gt;") != std::string::npos);
  CHECK(html.find("pq<x>") == std::string::npos);
  CHECK(html.find("sub-vectors of 3 channels") != std::string::npos);
  CHECK(html.find("abcdef012345") != std::string::npos);
  CHECK(html.find("Spearman rank correlation 1.000 over 4 cells") != std::string::npos);
  CHECK(count(html, "<svg") == count(html, "</svg>"));
  CHECK(count(html, "<svg") >= 8);
  CHECK(count(html, "class=\"front\"") == 3);  // rtn at 4.5 bits is dominated by rvq at 3.1
  CHECK(html.find("n = 3 report documents; plan abcdef012345. Bars are standard errors") != std::string::npos);
  // A figure calls a cell by its row of the table.
  CHECK(html.find("<td>2</td><td class=\"codec\">rvq bits=2</td><td>0.05 ± 0.005</td>") != std::string::npos);
  CHECK(html.find(">2</text>") != std::string::npos);
  CHECK(html.find("2: rvq bits=2") != std::string::npos);
  CHECK(count(html, "plan abcdef012345") == count(html, "<svg"));
}

TEST_CASE("a cell's label names its methods and what its sweep sets") {
  const auto names = [](const char* codec) { return codec_names({{"codec", Json::parse(codec)}}); };
  CHECK(names(R"({"name": "rvq", "bits": 4})") == "rvq");
  CHECK(names(R"({"name": "rvq", "k": {"rope": "pre"}})") == "rvq");
  CHECK(names(R"({"name": "rvq", "v": {"name": "kivi"}})") == "rvq + kivi");
  CHECK(names(R"({"k": {"name": "qjl"}, "v": {"name": "kivi"}})") == "qjl + kivi");
  CHECK(names(R"({"tiers": [{"tokens": 64, "name": "rvq"}, {"level": 2}]})") == "rvq, older level");
  CHECK(names(R"({"tiers": [{"tokens": 64, "name": "rvq"}, {"k": {"level": 2}, "v": {"name": "rtn"}}]})") ==
        "rvq, older level + rtn");
  CHECK(codec_names(Json::object()) == "?");
  const Json axes = Json::parse(R"({"codec.bits": 4, "codec.k": {"name": "rvq", "rope": "pre"}, "codec.name": "rvq",
                                    "codec.overrides": [1, 2]})");
  CHECK(cell_label({{"config", {{"codec", {{"name", "rvq"}}}}}, {"axes", axes}}) ==
        "rvq bits=4 rope=pre overrides=[1, 2]");
}

TEST_CASE("every row of the report names its protocol and its arithmetic, unequal ground is said") {
  ResultSet r;
  r.plan = {{"plan", "abcdef0123456789"}, {"traces", Json::array()}};
  r.cells = {cell(2, "rtn", 2.1, 0.05), cell(3, "kivi", 3.1, 0.01), cell(4, "rtn", 4.5, 0.02)};
  const auto html_of = [&] {
    for (CellResult& c : r.cells) {
      const Json codec = c.cell["config"]["codec"];
      c.cell["config"]["codec"] = {{"k", {{"name", codec.value("name", "rtn")}}},
                                   {"v", {{"name", codec.value("name", "rtn")}}}};
      c.record["path"] = {{"encode", "cpu avx2"}, {"decode", "reference"}};
    }
    const auto path = std::filesystem::temp_directory_path() / ("vqkv-report-" + std::to_string(getpid()) + ".html");
    write_report(r, path.string());
    std::string html = read_file(path.string());
    std::filesystem::remove(path);
    return html;
  };
  const auto with_policy = [](CellResult& c, const char* cache) {
    c.cell["config"]["cache"] = canonical_cache_config(Json::parse(cache));
  };
  for (CellResult& c : r.cells) with_policy(c, R"({"window": 64, "flush": 32})");
  const std::string equal = html_of();
  CHECK(equal.find("Exact beside the codes, in every row: window 64, blocks of 32 + 4 sinks.") != std::string::npos);
  CHECK(count(equal, "<td class=\"text\">window 64, blocks of 32 + 4 sinks</td>") == 3);
  CHECK(count(equal, "<td class=\"text\">decode reference, encode cpu avx2</td>") == 3);

  r.cells[1] = cell(3, "kivi", 3.1, 0.01);
  with_policy(r.cells[1], R"({"rule": "kivi", "sinks": 0, "residual": 32})");
  const std::string unequal = html_of();
  CHECK(unequal.find("The rows stand under 2 protocols") != std::string::npos);
  CHECK(unequal.find("<td class=\"text\">keys: blocks of 32; values: window 33 (preset kivi r32)</td>") !=
        std::string::npos);
}

TEST_CASE("a measure that nobody knows yet has its column, axis and curve in the report, as it says itself") {
  ResultSet r;
  r.plan = {{"plan", "abcdef0123456789"}, {"traces", Json::array()}};
  r.cells = {cell(2, "rvq", 2.1, 0.05), cell(3, "rvq", 3.1, 0.01)};
  Measurement m;
  m.tag = "test.new_measure";
  m.unit = "furlongs";
  m.value = 1.23456789;
  m.stderr_ = 0.0625;
  m.n = 3;
  m.details.push_back({"position", {3}, {1, 2, 3}});
  Measurement hidden = titled(m, "hidden one", Shown::kNowhere), sharp = titled(m, "Sharp & new", Shown::kValue, 6);
  hidden.tag = "test.hidden";
  sharp.tag = "test.sharp";
  for (const Measurement& each : {m, hidden, sharp}) {
    Json j = to_json(each);
    Json head = j;
    head.erase("details");
    CHECK(to_json(measurement_head_from_json(j)) == head);
    j["role"] = "report";
    for (CellResult& c : r.cells) c.record["measurements"].push_back(j);
  }
  const auto path = std::filesystem::temp_directory_path() / ("vqkv-report-" + std::to_string(getpid()) + ".html");
  write_report(r, path.string());
  const std::string html = read_file(path.string());
  std::filesystem::remove(path);
  CHECK(html.find("<th title=\"test.new_measure\">test.new_measure<br>± standard error</th>") != std::string::npos);
  CHECK(count(html, "<td>1.235 ± 0.062</td>") == 2);
  CHECK(html.find("<th title=\"test.sharp\">Sharp &amp; new</th>") != std::string::npos);
  CHECK(count(html, "<td>1.23457</td>") == 2);
  CHECK(html.find("hidden one") == std::string::npos);
  CHECK(html.find("test.new_measure against position") != std::string::npos);
}

TEST_CASE("a protocol in words") {
  const auto text = [](const char* cache) { return protocol_text(CachePolicy::from_json(Json::parse(cache))); };
  CHECK(text("{}") == "window 128, blocks of 64 + 4 sinks");
  CHECK(text(R"({"sinks": 0, "window": 128, "flush": 1})") == "window 128");
  CHECK(text(R"({"sinks": 0, "window": 1, "flush": 1})") == "no exact token but its own");
  CHECK(text(R"({"sinks": 0, "window": 1, "flush": 128})") == "blocks of 128");
  CHECK(text(R"({"sinks": 0, "window": 0, "flush": 1})") == "no exact token");
  CHECK(text(R"({"sinks": 1, "rule": "kivi"})") == "keys: blocks of 128; values: window 129 + 1 sink");
  CHECK(text(R"({"rule": "none"})") == "everything exact");
  const Json codec = canonical_codec_config(Json::parse(R"({"tiers": [
      {"tokens": 1024, "name": "rvq", "codebooks": 4}, {"tokens": 64, "k": {"level": 2}, "v": {"level": 1}},
      {"name": "pq"}]})"));
  const Json cache = canonical_cache_config(Json::object());
  const std::string tiers =
      "window 128, blocks of 64 + 4 sinks, 1,024 newest coded tokens rvq, next 64 keys rvq at 2 "
      "stages, values rvq at 1 stage, older pq";
  CHECK(protocol_text(CachePolicy::from_json(cache), codec) == tiers);
  CHECK(protocol_of_cell({{"codec", codec}, {"cache", cache}}) == tiers);
  CHECK(protocol_text(CachePolicy::from_json({{"policy", "streaming"}}), codec).find("rvq") == std::string::npos);
  // Tiers of one method say what tells them apart, and no more.
  const auto of_tiers = [&](const char* list) {
    const Json config = canonical_codec_config({{"tiers", Json::parse(list)}});
    const std::string all = protocol_text(CachePolicy::from_json(cache), config);
    return all.substr(all.find("128 newest"));
  };
  CHECK(of_tiers(R"([{"tokens": 128, "name": "rtn", "bits": 4}, {"name": "rtn", "bits": 2}])") ==
        "128 newest coded tokens rtn (bits 4), older rtn (bits 2)");
  CHECK(of_tiers(R"([{"tokens": 128, "name": "rtn", "v": {"bits": 2}}, {"name": "rtn", "bits": 2, "clip": 0.75}])") ==
        "128 newest coded tokens keys rtn (bits 4, clip 1.0), values rtn (clip 1.0), older keys rtn (bits 2, clip "
        "0.75), values rtn (clip 0.75)");
  CHECK(of_tiers(R"([{"tokens": 128, "name": "rvq", "codebooks": 4}, {"tokens": 64, "level": 2}, {"name": "rvq",
                      "codebooks": 1}])") ==
        "128 newest coded tokens rvq (codebooks 4), next 64 rvq at 2 stages, older rvq (codebooks 1)");
  CHECK(of_tiers(R"([{"tokens": 128, "name": "rtn"}, {"name": "rtn", "transform": ["hadamard"]}])") ==
        "128 newest coded tokens rtn (transform none), older rtn (transform hadamard)");
  CHECK(of_tiers(R"([{"tokens": 128, "name": "rtn", "transform": [{"name": "low_rank", "rank": 8}]},
                     {"name": "rtn", "transform": [{"name": "low_rank", "rank": 4}]}])")
            .find("\"rank\":4") != std::string::npos);
  CHECK(of_tiers(R"([{"tokens": 128, "name": "rtn", "overrides": [{"layers": 0, "set": {"k.bits": 8}}]},
                     {"name": "rtn"}])")
            .find("older keys rtn (overrides none), values rtn") != std::string::npos);
}

TEST_CASE("one report document gives no standard error, and the report says so") {
  ResultSet r;
  r.plan = {
      {"plan", "abcdef0123456789"},
      {"traces",
       Json::array({{{"path", "t.h5"},
                     {"documents", Json::array({{{"id", 0}, {"name", "a.txt"}}, {{"id", 4}, {"name", "b<.txt"}}})}}})}};
  r.cells = {cell(2, "rvq", 2.1, 0.05), cell(3, "rvq", 3.1, 0.01)};
  for (CellResult& c : r.cells) {
    c.cell["config"]["trace"] = {{"train", {0}}, {"report", {4}}};
    for (Json& m : c.record["measurements"]) m["n"] = 1;
  }
  const auto path = std::filesystem::temp_directory_path() / ("vqkv-report-" + std::to_string(getpid()) + ".html");
  write_report(r, path.string());
  const std::string html = read_file(path.string());
  std::filesystem::remove(path);
  CHECK(html.find("n = 1 report document; plan abcdef012345. One document gives no standard error") !=
        std::string::npos);
  CHECK(html.find("<td>0.05</td>") != std::string::npos);
  CHECK(html.find("Documents: trained on a.txt; reported on b&lt;.txt.") != std::string::npos);
  CHECK(html.find("nan") == std::string::npos);
}

TEST_CASE("an axis drops what it can't show and says so") {
  Plot p;
  p.title = "t";
  p.log_y = true;
  p.series = {{"s",
               {{1, 0.1, 0, "a", false, ""},
                {2, 0, 0, "b", false, ""},
                {3, std::nan(""), 0, "c", false, ""},
                {4, 10, 0, "d", false, ""}},
               false,
               false}};
  const std::string svg = render_plot(p);
  CHECK(svg.find("2 points could not be drawn") != std::string::npos);
  CHECK(svg.find("nan") == std::string::npos);
  CHECK(svg.find("inf") == std::string::npos);
}

TEST_CASE("bits a cached value, with the constants shared or apart") {
  CacheShape shape;  // 64 values a token
  shape.layers = shape.kv_heads = 2;
  shape.head_dim = 8;
  ByteLedger ledger;
  ledger.codes = 1000;
  ledger.window = 280;
  ledger.codebooks = 640;
  CHECK(bits_per_value(ledger, shape, 10, 0) == 16.0);
  CHECK(bits_per_value(ledger, shape, 10, 1) == 24.0);
  CHECK(bits_per_value(ledger, shape, 10, 64) == 16.125);
}
