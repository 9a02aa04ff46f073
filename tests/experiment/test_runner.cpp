#include <fmt/format.h>
#include <stdlib.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>

#include "config/sweep.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/log.h"
#include "experiment/choose.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "experiment/small_plan.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

std::map<std::string, std::string> contents(const std::string& folder) {
  std::map<std::string, std::string> out;
  for (const auto& c : load_results(folder).cells) out[c.id()] = c.record.is_null() ? "" : comparable(c.record).dump();
  return out;
}

}  // namespace

TEST_CASE("a sweep with rounded queries: another number at the same bytes, and the row says so", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5";
  write_sweep_trace(trace, 5, 160, 2, 2, 32);
  const Plan plan =
      small_plan(trace,
                 "cache: {sinks: 4, window: 16, flush: 16}\ncontexts: [128]\n"
                 "sweep:\n  grid:\n    codec:\n      - {name: ggml}\n      - {name: ggml, k: {query: q8}}\n"
                 "      - {name: ggml, query: q8}\n      - {name: ggml, k: {query: q8, rope: pre}}\n"
                 "      - {name: ggml, k: {query: q8, transform: [center]}}\n");
  RunOptions options;
  options.folder = dir / "out";
  run_plan(plan, options);
  const ResultSet results = load_results(options.folder);
  REQUIRE(results.cells.size() == 5);
  const CellResult &exact = results.cells[0], &rounded = results.cells[1];
  CHECK(exact.record.at("flags").empty());
  CHECK(rounded.record.at("flags") == Json::array({"quantized-query"}));
  CHECK(exact.record.at("ledger") == rounded.record.at("ledger"));
  for (const char* tag : {"attention.softmax_kl", "logit.centred_rms", "output.relative_error"}) {
    CAPTURE(tag);
    const double from = exact.value("report", tag), to = rounded.value("report", tag);
    CHECK(from != to);
    CHECK(to == Approx(from).epsilon(0.1));  // 8 bits beside the keys' 4
  }
  CHECK(exact.value("report", "key.nmse") == rounded.value("report", "key.nmse"));
  for (const auto& [cell, reason] :
       {std::pair{2, "give it for k alone"}, {3, "keys after RoPE alone"}, {4, "drop the other transforms"}}) {
    const Json& record = results.cells[static_cast<size_t>(cell)].record;
    CHECK(record.at("status") == "skipped");
    CHECK_THAT(record.at("reason").get<std::string>(), Catch::Contains(reason));
  }
}

TEST_CASE("a run is the same at any thread count, in shards and in lanes", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = small_plan(trace);
  RunOptions options;
  options.folder = dir / "one";
  {
    const Threads t(1);
    const RunSummary s = run_plan(plan, options);
    CHECK(s.ok == 6);
    CHECK(s.skipped == 1);
    CHECK(s.failed == 0);
    CHECK(s.left == 0);
  }
  const auto expected = contents(options.folder);
  for (const auto& [id, text] : expected) CHECK_FALSE(text.empty());
  const Threads t(2);
  options.folder = dir / "two";
  run_plan(plan, options);
  CHECK(contents(options.folder) == expected);
  options.folder = dir / "lanes";
  options.jobs = 2;
  run_plan(plan, options);
  CHECK(contents(options.folder) == expected);
  options.folder = dir / "shards";
  options.jobs = 1;
  options.shards = 3;
  for (int i = 2; i >= 0; --i) {
    options.shard = i;
    options.writer = fmt::format("shard-{}-of-3", i);
    run_plan(plan, options);
  }
  CHECK(contents(options.folder) == expected);
  const RunSummary again = run_plan(plan, options);
  CHECK(again.ok + again.failed + again.skipped == 0);
  CHECK(again.before == 3);
}

TEST_CASE("records hold what tables need", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  RunOptions options;
  options.folder = dir / "out";
  options.command = "test";
  run_plan(small_plan(trace), options);
  const ResultSet r = load_results(options.folder);
  // Finer codes are closer, in every metric of the ladder, on both kinds of documents.
  for (const char* role : {"select", "report"})
    for (const char* tag : {"key.nmse", "value.nmse", "attention.softmax_kl", "output.relative_error"}) {
      INFO(role << " " << tag);
      CHECK(r.cells[0].value(role, tag) > 2 * r.cells[1].value(role, tag));
      CHECK(r.cells[1].value(role, tag) > 2 * r.cells[2].value(role, tag));
      CHECK(r.cells[2].value(role, tag) > 0);
    }
  CHECK(r.cells[0].find("report", "key.nmse")->at("n") == 2);
  CHECK(r.cells[0].find("select", "key.nmse")->at("n") == 1);
  // rtn, 4 bits, groups of 16 with f16 scale and zero: 4 + 32/16 bits.
  CHECK(r.cells[1].value("cost", "bits_per_value.codes") == Approx(6.0));
  const double at128 = r.cells[1].value("cost", "bits_per_value", 128),
               at1024 = r.cells[1].value("cost", "bits_per_value", 1024);
  CHECK(at128 > at1024);
  CHECK(at1024 > 6.0);
  CHECK(r.cells[5].value("cost", "bits_per_value", 128, 1) > r.cells[5].value("cost", "bits_per_value", 128, 64));
  CHECK(r.cells[5].value("cost", "bits_per_value", 128, 64) > r.cells[5].value("cost", "bits_per_value", 128));
  const Json& trained = r.cells[5].record["train"];
  CHECK(trained["units"] == 4);
  CHECK(trained["tokens"] == 2 * (160 - 4));
  CHECK(r.cells[5].record["path"]["encode"] == "cpu " + cpu_arithmetic());
  CHECK(r.cells[5].record["prov"]["command"] == "test");
  CHECK(r.cells[1].record["coverage"]["coded_share_k"].get<double>() > 0.5);
  CHECK(r.cells[6].status() == "skipped");
  check_says(r.cells[6].reason(), "3 heads");
  CHECK_FALSE(r.cells[5].flagged("extrapolated"));
}

TEST_CASE("a cell whose metrics say nothing of its codec is skipped with the reason", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan =
      small_plan(trace, "codec: {name: exact}\nsweep: {grid: {metrics: [[code_usage], [code_usage, key_nmse]]}}\n");
  RunOptions options;
  options.folder = dir / "r";
  const RunSummary s = run_plan(plan, options);
  CHECK(s.ok == 1);
  CHECK(s.skipped == 1);
  for (const auto& c : load_results(options.folder).cells) {
    const bool silent = c.cell.at("config").at("metrics") == Json{"code_usage"};
    CHECK(c.status() == (silent ? "skipped" : "ok"));
    if (silent) CHECK(c.reason() == "of its metrics (code_usage) none says anything of this codec");
  }
}

TEST_CASE("an unfinished record runs again, another plan is refused", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = small_plan(trace);
  RunOptions options;
  options.folder = dir / "out";
  run_plan(plan, options);
  const auto expected = contents(options.folder);
  const std::string file = options.folder + "/results/main.jsonl";
  std::string text = read_file(file);
  text.resize(text.size() - 100);
  std::ofstream(file, std::ios::trunc) << text;
  CHECK(load_results(options.folder).count("pending") == 1);
  CHECK(load_results(options.folder).problems.size() == 1);
  CHECK(run_plan(plan, options).ok + run_plan(plan, options).skipped <= 1);
  CHECK(contents(options.folder) == expected);
  CHECK(load_results(options.folder).problems.empty());

  // Resuming asks the index for what is done; the records themselves are read by who shows them, and by all once they
  // are younger than their index.
  const std::string sound = read_file(file);
  const auto written = std::filesystem::last_write_time(file);
  std::string damaged = sound;
  damaged.replace(damaged.find("\"measurements\"") + 20, 3, "\"\"\"");
  write_file(file, damaged);
  std::filesystem::last_write_time(file, written + std::chrono::hours(1));
  check_says(data_error_of([&] { run_plan(plan, options); }), file + " at byte");
  std::filesystem::last_write_time(file, written);
  CHECK(run_plan(plan, options).before == 7);
  CHECK(load_results(options.folder, Records::kStatus).count("ok") == 6);
  check_says(data_error_of([&] { load_results(options.folder); }), file + " at byte");
  write_file(file, sound);

  const std::string refusal = error_of([&] { run_plan(small_plan(trace, kSweep, "seed: 9\n"), options); });
  check_says(refusal, "holds the results of another plan");
  check_says(refusal, "seed: 0 in the store, 9 in the new plan");
  check_says(refusal, "Use another -o");

  // The trace is replaced under the plan.
  std::filesystem::remove(trace);
  write_sweep_trace(trace, 5, 160, 2, 2, 16, 77);
  options.folder = dir / "fresh";
  CHECK(run_plan(plan, options).failed == 6);
  check_says(load_results(options.folder).cells[0].reason(), "plan again for the new trace");
  std::filesystem::remove(trace);
  options.folder = dir / "gone";
  check_says(data_error_of([&] { run_plan(plan, options); }), "a.trace.h5");
}

// The 16-bit floats of a row stand in the file as they are.
std::string stored_bytes(const Matrix<float>& row) {
  std::string bytes;
  for (int64_t c = 0; c < row.cols; ++c) {
    const uint32_t bits = std::bit_cast<uint32_t>(row(0, c));
    bytes += {static_cast<char>(bits >> 16), static_cast<char>(bits >> 24)};
  }
  return bytes;
}

// Puts a NaN into a stored row, which no writer of ours would do.
void poison(const std::string& file, const Matrix<float>& row) {
  const std::string pattern = stored_bytes(row);
  std::string bytes = read_file(file);
  const size_t at = bytes.find(pattern);
  REQUIRE(at != std::string::npos);
  REQUIRE(bytes.find(pattern, at + 1) == std::string::npos);
  bytes.replace(at + 6, 2, "\xc0\x7f");  // channel 3
  write_file(file, bytes);
}

TEST_CASE("a value that is not finite ends the cells that read it, by name and place", "[runner]") {
  const TestFolder dir;
  const struct {
    const char* what;
    int64_t row;  // of document 3 (report) or 0 (train)
    std::function<void(const TraceReader&, int64_t, Matrix<float>&)> read;
  } cases[] = {{"/key: layer 1, head 1, row 600, channel 3 is nan", 600,
                [](const TraceReader& t, int64_t r, Matrix<float>& m) { t.key(1, 1, r, 1, m); }},
               {"/value: layer 1, head 1, row 50, channel 3 is nan", 50,
                [](const TraceReader& t, int64_t r, Matrix<float>& m) { t.value(1, 1, r, 1, m); }},
               {"/query: layer 1, head 3, row 70, channel 3 is nan", 70,
                [](const TraceReader& t, int64_t r, Matrix<float>& m) { t.query(1, 3, r, 1, m); }}};
  for (const auto& c : cases) {
    const std::string trace = dir / "a.trace.h5";
    write_sweep_trace(trace);
    const Plan plan = small_plan(trace, "codec: {name: rvq, codebooks: 2, bits: 4, iterations: 2}\n",
                                 "cache: {sinks: 4, window: 16, flush: 16}\n");
    Matrix<float> row(1, 16);
    c.read(TraceReader(trace), c.row, row);
    poison(trace, row);
    RunOptions options;
    options.folder = dir / std::to_string(c.row);
    check_says(data_error_of([&] { run_plan(plan, options); }), "content hash is");
    options.trust_trace = true;
    CHECK(run_plan(plan, options).failed == 1);
    check_says(load_results(options.folder).cells[0].reason(), trace + ": " + c.what);
  }
}

TEST_CASE("a trace that was edited in place is refused, unless it is trusted and the rows say so", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan =
      small_plan(trace, "codec: {name: rtn, bits: 4, group: 16}\n", "cache: {sinks: 4, window: 16, flush: 16}\n");
  RunOptions options;
  options.folder = dir / "sound";
  CHECK(run_plan(plan, options).ok == 1);
  CHECK_FALSE(load_results(options.folder).cells[0].flagged("trusted-trace"));
  CHECK(std::filesystem::exists(trace + ".verified"));

  // One bit of one key, the size and the time of modification as they were.
  Matrix<float> row(1, 16);
  TraceReader(trace).key(1, 1, 600, 1, row);
  const auto modified = std::filesystem::last_write_time(trace);
  const std::string pattern = stored_bytes(row);
  const size_t at = read_file(trace).find(pattern);
  REQUIRE(at != std::string::npos);
  {
    std::fstream file(trace, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(at));
    file.put(static_cast<char>(pattern[0] ^ 1));
  }
  std::filesystem::last_write_time(trace, modified);
  options.folder = dir / "edited";
  const std::string refusal = data_error_of([&] { run_plan(plan, options); });
  check_says(refusal, trace);
  check_says(refusal, "its values were changed");
  CHECK(load_results(options.folder).count("pending") == 1);
  check_says(data_error_of([&] { codecs_of_cell(plan.cells[0], nullptr); }), "its values were changed");

  options.trust_trace = true;
  CHECK(run_plan(plan, options).ok == 1);
  CHECK(load_results(options.folder).cells[0].flagged("trusted-trace"));
}

TEST_CASE("stopping drops what is unfinished, failures are kept until asked", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  const Plan plan = small_plan(trace);
  RunOptions options;
  options.folder = dir / "out";
  int asked = 0;
  options.stop = [&] { return ++asked > 6; };
  const RunSummary s = run_plan(plan, options);
  CHECK(s.left > 0);
  options.stop = nullptr;
  run_plan(plan, options);
  options.folder = dir / "whole";
  run_plan(plan, options);
  CHECK(contents(dir / "out") == contents(dir / "whole"));
  options.folder = dir / "late";
  options.time_budget = 1e-9;
  const RunSummary late = run_plan(plan, options);
  CHECK(late.out_of_time);
  CHECK(late.left == 7);
}

TEST_CASE("extrapolation, subsamples and curves are named in the row", "[runner]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace, 5, 160, 3, 2);
  const std::string codec =
      "codec: {name: rvq, codebooks: 1, bits: 4, iterations: 2}\ncache: {sinks: 4, window: 16, flush: 16}\n";
  RunOptions options;
  options.folder = dir / "out";
  run_plan(small_plan(trace, "layers: [2]\nheads: [1]\ntrain: {curve: true}\n", codec), options);
  const ResultSet r = load_results(options.folder);
  REQUIRE(r.cells[0].status() == "ok");
  CHECK(r.cells[0].flagged("subsampled"));
  CHECK(r.cells[0].record["coverage"]["layers"] == Json::parse("[2]"));
  const Json& losses = r.cells[0].record["train"]["curve"]["losses"];
  REQUIRE(losses.size() == 2);
  bool gains = false;
  for (const Json& loss : losses) {
    CHECK(loss["full"] == r.cells[0].find("select", loss["tag"])->at("value"));
    CHECK(loss["half"].get<double>() > 0);
    gains |= loss["full"].get<double>() - loss["twice"].get<double>() > 0.05 * loss["full"].get<double>();
  }
  CHECK(r.cells[0].flagged("undertrained") == gains);

  // Of a layer that is named, the curve is that of a cell of this layer alone.
  options.folder = dir / "named";
  run_plan(small_plan(trace, "layers: [0, 2]\nheads: [1]\ntrain: {curve: [2]}\n", codec), options);
  const ResultSet named = load_results(options.folder);
  REQUIRE(named.cells[0].status() == "ok");
  const Json& of_layer = named.cells[0].record["train"]["curve"];
  CHECK(of_layer["layers"] == Json::parse("[2]"));
  CHECK(of_layer["losses"].size() == 2);
  CHECK(of_layer["losses"][0]["tag"] == losses[0]["tag"]);
  CHECK(named.cells[0].find("select", "attention.softmax_kl")->at("value") != of_layer["losses"][0]["full"]);

  // Document 0 ends at position 79, the tested ones at 159; with document 1 the positions are covered.
  const std::string split = dir / "split.trace.h5";
  write_sweep_trace(split, 5, 160, 1, 1, 16, 1, 80);
  const auto flagged = [&](const std::string& train) {
    options.folder = dir / ("train-" + train);
    run_plan(make_plan(parse_yaml(
                 fmt::format("trace: {{path: {}, train: [{}], select: [2], report: [3, 4]}}\n{}", split, train, codec),
                 "s.yaml")),
             options);
    return load_results(options.folder).cells[0].flagged("extrapolated");
  };
  CHECK(flagged("0"));
  CHECK_FALSE(flagged("0, 1"));
  CHECK(r.plan["traces"][0]["layers"] == 3);
}

TEST_CASE("choosing looks at select documents and aggregates repeats", "[runner][choose]") {
  const TestFolder dir;
  const std::string trace = dir / "a.trace.h5";
  write_sweep_trace(trace);
  RunOptions options;
  options.folder = dir / "out";
  run_plan(small_plan(trace, "sweep: {grid: {codec.bits: [2, 4, 8]}, repeat: {seed: [1, 2]}}\n",
                      "codec: {name: rtn, group: 16}\ncache: {sinks: 4, window: 16, flush: 16}\n"),
           options);
  const ResultSet r = load_results(options.folder);
  ChooseOptions c;
  c.budget = parse_budget("7bpv");
  c.column = "codes";
  const auto best = choose(r, c);
  REQUIRE(best.size() == 2);
  CHECK(best[0].cells.size() == 2);
  CHECK(best[0].cells[0]->cell["axes"]["codec.bits"] == 4);
  CHECK(best[0].spread == 0);
  CHECK(best[0].n == 2);
  CHECK(best[0].select != best[0].report);
  c.budget = parse_budget("1MiB");
  check_says(error_of([&] { choose(r, c); }), "bits a value");
  c.column = "resident";
  CHECK(choose(r, c).size() == 0);  // 32768 tokens need more
  c.by = "attention.softmaxkl";
  check_says(error_of([&] { choose(r, c); }), "did you mean 'attention.softmax_kl'?");
  for (const char* bad : {"", "2.5", "-1bpv", "2.5 bpv", "1MB", "nanbpv", "1e999bpv"})
    check_says(error_of([&] { parse_budget(bad); }), "is not a budget");
}

TEST_CASE("shards by number and by environment", "[runner]") {
  int i = -1, n = -1;
  parse_shard("2/8", i, n);
  CHECK((i == 2 && n == 8));
  for (const char* bad : {"8/8", "-1/2", "1", "1/2x", "a/b", "0/0", ""})
    check_says(error_of([&] { parse_shard(bad, i, n); }), "--shard");
  for (const char* name : {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_PROCID",
                           "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"})
    unsetenv(name);
  check_says(error_of([&] { parse_shard("auto", i, n); }), "none of");
  setenv("PMI_RANK", "1", 1);
  setenv("PMI_SIZE", "2", 1);
  parse_shard("auto", i, n);
  CHECK((i == 1 && n == 2));
  setenv("SLURM_ARRAY_TASK_ID", "13", 1);
  setenv("SLURM_ARRAY_TASK_COUNT", "4", 1);
  setenv("SLURM_ARRAY_TASK_MIN", "10", 1);
  parse_shard("auto", i, n);
  CHECK((i == 3 && n == 4));
  setenv("SLURM_ARRAY_TASK_ID", "20", 1);
  check_says(error_of([&] { parse_shard("auto", i, n); }), "consecutive");
  for (const char* name :
       {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "PMI_RANK", "PMI_SIZE"})
    unsetenv(name);
}
