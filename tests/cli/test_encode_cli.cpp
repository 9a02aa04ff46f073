// `encode`: the codes of a trace as other programs read them, and what it refuses. That scripts/vqkv.py reads them:
// tests/scripts/test_vqkv.py.
#include "experiment/encode.h"

#include <filesystem>

#include "codec/build.h"
#include "codec/codec_archive.h"
#include "io/archive.h"
#include "io/trace.h"
#include "support/catch.h"
#include "support/error_of.h"
#include "support/run_tool.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { return {}; }
};

struct Files {
  TestFolder dir;
  std::string trace = dir / "t.trace.h5", codecs = dir / "c.codec.h5", out = dir / "t.codes.h5";
  CacheShape shape;
  Files() {
    write_sweep_trace(trace);
    shape = TraceReader(trace).info().shape;
  }
  void write(const Json& codec, const Json& cache, const std::string& hash = std::string(64, 'b')) const {
    TrainOptions options;
    options.cell = "test";
    options.model_hash = hash;
    save_codec_set(*train_codec_set(resolve_codec(codec, shape), shape, NoRows(), options), codecs, {{"cache", cache}});
  }
  Json operator()(const std::vector<std::string>& overrides = {}) const {
    return encode({.codecs = codecs, .trace = trace, .out = out, .overrides = overrides, .provenance = {}, .stop = {}});
  }
};

const Json kCoded = {{"name", "rtn"}, {"bits", 3}, {"group", 8}, {"k", {{"rope", "pre"}}}};
const Json kCache = {{"sinks", 4}, {"window", 16}, {"flush", 16}};

}  // namespace

TEST_CASE("encode: codes decode to the rows beside them, window by window", "[cli][encode]") {
  const Files files;
  files.write(kCoded, kCache);
  const Json counts = files({"trace.report=[1, 3]"});
  CHECK(counts == Json{{"windows", 2}, {"units", 2 * 8}, {"tokens", 2 * 156}});

  const ArchiveReader in(files.out, kCodesFormat, kCodesVersion, kCodesVersion);
  const Json facts = in.facts("codes");
  CHECK(facts.at("codec") == codec_archive_hash(files.codecs));
  CHECK(facts.at("trace") == TraceReader(files.trace).info().content_hash);
  CHECK(facts.at("windows")[1] == Json{{"document", 3}, {"first_token", 480}, {"tokens", 160}, {"sinks", 4}});
  const CodecSet set = load_codec_set(files.codecs);
  for (const auto& [number, name] :
       {std::pair(0, "window/00000/unit/00000"), std::pair(7, "window/00001/unit/00007")}) {
    const Codec& codec = *set.units()[static_cast<size_t>(number)].codec;
    CodeBlock block;
    block.resize(codec.layout(), 156);
    const auto codes = in.tensor(std::string(name) + "/field/code", {156, 16});
    block.fields[0].assign(codes.begin(), codes.end());
    for (size_t s = 0; s < 2; ++s) {
      const auto side = in.tensor(std::string(name) + "/side/" + codec.layout().sides[s].name, {156, 2});
      block.sides[s].assign(side.begin(), side.end());
    }
    Matrix<float> rows(156, 16);
    codec.decode(block, rows);
    const auto kept = in.tensor(std::string(name) + "/rows", {156, 16});
    CHECK(std::equal(kept.begin(), kept.end(), rows.data()));
    CHECK_FALSE(in.has_facts(std::string(name) + "/prompt"));
  }
}

TEST_CASE("encode: parameters of a prompt are those of each window", "[cli][encode]") {
  const Files files;
  files.write({{"name", "calibquant"}, {"bits", 4}}, {{"sinks", 0}, {"window", 16}, {"flush", 16}, {"prompt", 64}});
  files({"trace.report=[0, 1]", "cache.sinks=2"});
  const ArchiveReader in(files.out, kCodesFormat, kCodesVersion, kCodesVersion);
  const Json first = in.facts("window/00000/unit/00002/prompt"), second = in.facts("window/00001/unit/00002/prompt");
  CHECK(first.at("map").at("kind") == "diagonal");
  CHECK(first.at("map").at("factor").size() == 16);
  CHECK(first.at("outer_bias").size() == 16);
  CHECK(first != second);
  CHECK(in.facts("codes").at("cache").at("sinks") == 2);
}

TEST_CASE("encode: what has no such codes is refused, and leaves no file", "[cli][encode]") {
  const Files files;
  const auto refuses = [&](ErrorKind kind, const std::string& part, const std::vector<std::string>& overrides = {}) {
    check_says(error_of([&] { files(overrides); }, kind), part);
    CHECK_FALSE(std::filesystem::exists(files.out));
  };
  files.write(kCoded, kCache);
  refuses(ErrorKind::kUsage, "codec.bits=2: `encode` takes trace.report, cache.sinks", {"codec.bits=2"});
  refuses(ErrorKind::kUsage, "nothing is coded", {"cache.sinks=1000"});
  refuses(ErrorKind::kUsage, "nothing is coded before the 1000 tokens of cache.prompt are there",
          {"cache.prompt=1000"});
  refuses(ErrorKind::kUsage, "document", {"trace.report=[9]"});
  files.write({{"name", "calibquant"}, {"bits", 4}}, kCache);
  refuses(ErrorKind::kUsage, "codec 'calibquant' fits its parameters to 16 tokens of a prompt at least, not to 8",
          {"cache.prompt=8"});
  files.write(kCoded, {{"rule", "none"}});
  refuses(ErrorKind::kUsage, "no coded token stays");
  files.write(kCoded, kCache, std::string(64, 'c'));
  refuses(ErrorKind::kBadData, "trained on the model with hash ccc");
  Json tier = kCoded, newest = kCoded;
  newest["tokens"] = 64;
  tier["bits"] = 2;
  files.write({{"tiers", Json::array({newest, tier})}}, kCache);
  refuses(ErrorKind::kUsage, "a codec of 2 tiers");

  files.write(kCoded, kCache);
  const ToolRun done = run_tool_of_build("vqkv-sweep", files.dir.path.string(),
                                         {"encode", files.codecs, files.trace, "-o", files.out, "--json", "-q"});
  INFO(done.err);
  CHECK(done.code == 0);
  CHECK(Json::parse(done.out)[0] == Json{{"file", files.out}, {"windows", 5}, {"units", 5 * 8}, {"tokens", 5 * 156}});
  CHECK(run_tool_of_build("vqkv-sweep", files.dir.path.string(), {"encode", files.codecs}).code == 2);
}
