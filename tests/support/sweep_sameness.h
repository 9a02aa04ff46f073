// One sweep with the real binaries: at one and two threads, in one and three shards, killed and resumed. The same
// measurements, codec files and codes, bit for bit.
#pragma once
#include <fmt/format.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "codec/codec_archive.h"
#include "core/thread_pool.h"
#include "experiment/result_set.h"
#include "experiment/runner.h"
#include "io/trace.h"
#include "support/catch.h"
#include "support/memory_parameters.h"
#include "support/run_tool.h"

namespace vqkv::test {

inline ToolRun succeed(const std::string& tool, const std::string& folder, const std::vector<std::string>& arguments) {
  const ToolRun r = run_tool_of_build(tool, folder, arguments);
  INFO(fmt::format("{} {}\n{}", tool, fmt::join(arguments, " "), r.err));
  REQUIRE(r.code == 0);
  return r;
}

// The content hash of a trace of `model`, captured with so many threads.
inline std::string capture_hash(const std::string& folder, const std::string& trace, int threads,
                                std::vector<std::string> input) {
  input.insert(input.begin(), "capture");
  input.insert(input.end(), {"--threads", std::to_string(threads), "-o", trace, "-q"});
  succeed("vqkv-dump", folder, input);
  const Json row = Json::parse(succeed("vqkv-dump", folder, {"verify", trace, "--json", "-q"}).out).at(0);
  CHECK(row.at("ok") == true);
  return row.at("content_xxh3");
}

// Records in plan order, without times and provenance.
inline std::vector<std::string> records_of(const std::string& results) {
  std::vector<std::string> out;
  for (const CellResult& c : load_results(results).cells) {
    INFO(results << ": cell " << c.id() << " " << c.status() << " " << c.reason());
    CHECK(c.status() == "ok");
    out.push_back(c.record.is_null() ? "" : comparable(c.record).dump());
  }
  return out;
}

// What a codec file holds, training seconds and the writer's facts apart, and the codes it gives to rows of the trace.
struct CodecContent {
  std::string config, model_hash;
  std::vector<std::string> units;                          // specification and training report
  std::vector<MemoryParameters> parameters;                // of each distinct codec
  std::vector<std::vector<std::vector<uint16_t>>> fields;  // of each distinct codec
  std::vector<std::vector<std::vector<float>>> sides;
};

inline CodecContent codec_content(const std::string& file, const TraceReader& trace, int threads) {
  constexpr int64_t kRows = 128;  // a multiple of every method's block here
  const int before = thread_count();
  set_thread_count(threads);
  CodecContent out;
  const CodecSet set = load_codec_set(file);
  out.config = canonical_json(set.config());
  out.model_hash = set.model_hash();
  std::map<const Codec*, size_t> seen;
  for (const TrainedUnit& u : set.units()) {
    const UnitShape& shape = u.spec.unit;
    const auto [it, fresh] = seen.emplace(u.codec.get(), seen.size());
    Json report = u.report.to_json();
    report.erase("seconds");
    out.units.push_back(fmt::format("{} {} {} {} {} {} {} {}", role_name(shape.role), shape.layer, shape.first_head,
                                    u.spec.method, canonical_json(u.spec.knobs), canonical_json(u.spec.transforms),
                                    it->second, canonical_json(report)));
    if (!fresh) continue;
    u.codec->save(out.parameters.emplace_back());
    Matrix<float> x(kRows, shape.channels());
    for (int h = 0; h < shape.heads; ++h) {
      const MutMatrix columns = x.view().slice_cols(h * shape.head_dim, shape.head_dim);
      if (shape.role == Role::kKey)
        trace.key(shape.layer, shape.first_head + h, 0, kRows, columns);
      else
        trace.value(shape.layer, shape.first_head + h, 0, kRows, columns);
    }
    CodeBlock code;
    u.codec->encode(x, code);
    out.fields.push_back(code.fields);
    out.sides.push_back(code.sides);
  }
  set_thread_count(before);
  return out;
}

inline void check_same(const CodecContent& a, const CodecContent& b) {
  CHECK(a.config == b.config);
  CHECK(a.model_hash == b.model_hash);
  CHECK(a.units == b.units);
  CHECK(a.parameters.size() == b.parameters.size());
  CHECK((a.parameters == b.parameters));
  CHECK((a.fields == b.fields));
  CHECK((a.sides == b.sides));
}

inline void check_sweep_sameness(const std::string& folder, const std::string& trace, const std::string& plan) {
  const auto run = [&](const std::string& name, const std::vector<std::string>& more) {
    std::vector<std::string> arguments{"run", plan, "-o", folder + "/" + name, "-q"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  succeed("vqkv-sweep", folder, run("one", {"--threads", "1"}));
  const std::vector<std::string> expected = records_of(folder + "/one");
  REQUIRE(expected.size() >= 3);  // one for each of three shards

  succeed("vqkv-sweep", folder, run("two", {"--threads", "2", "--keep-codecs"}));
  CHECK(records_of(folder + "/two") == expected);

  for (const char* shard : {"2/3", "0/3", "1/3"})
    succeed("vqkv-sweep", folder, run("shards", {"--shard", shard, "--threads", "2", "--keep-codecs"}));
  CHECK(records_of(folder + "/shards") == expected);

  // kill -9 once the first cell is on disk, so that the next one is under way.
  const std::vector<std::string> command = run("killed", {"--threads", "2", "--keep-codecs"});
  const std::string records = folder + "/killed/results/main.jsonl";
  const pid_t child = start_tool("vqkv-sweep", folder, command);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(10);
  const auto lines = [&] {
    const std::string text = text_of(records);
    return std::count(text.begin(), text.end(), '\n');
  };
  while (lines() < 1 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  kill(child, SIGKILL);
  const ToolRun killed = finish_tool(folder, child);
  INFO(killed.err);
  CHECK(killed.code == 128 + SIGKILL);
  const int64_t before = load_results(folder + "/killed").count("ok");
  CHECK(before >= 1);
  CHECK(before < static_cast<int64_t>(expected.size()));
  succeed("vqkv-sweep", folder, command);
  CHECK(records_of(folder + "/killed") == expected);

  // Codec files. The run on one thread kept none, so that its export trains again; the others export what was kept.
  const TraceReader reader(trace);
  for (const CellResult& c : load_results(folder + "/one").cells) {
    CAPTURE(c.cell["axes"].dump());
    const auto content = [&](const std::string& name, int threads) {
      const std::string file = fmt::format("{}/{}-{}.codec.h5", folder, name, c.id());
      succeed(
          "vqkv-sweep", folder,
          {"export", folder + "/" + name, "--cell", c.id(), "-o", file, "--threads", std::to_string(threads), "-q"});
      return codec_content(file, reader, threads);
    };
    const CodecContent one = content("one", 1);
    CHECK_FALSE(one.units.empty());
    for (const char* other : {"two", "shards", "killed"}) {
      CAPTURE(other);
      check_same(one, content(other, 2));
    }
  }
}

}  // namespace vqkv::test
