// vqkv-eval of this build over the real small model, as its tests run it.
#pragma once
#include <fmt/format.h>

#include <string>
#include <vector>

#include "codec/build.h"
#include "codec/codec_archive.h"
#include "core/json.h"
#include "model/runtime.h"
#include "support/catch.h"
#include "support/run_tool.h"
#include "support/small_model.h"
#include "support/sweep_trace.h"

namespace vqkv {

inline const std::string kText = VQKV_SOURCE_DIR "/data/jargon-3.txt";

struct NoRows final : TrainSource {
  TrainData unit(const UnitShape&, const TrainNeeds&) const override { return {}; }
};

inline void write_codec(const std::string& path, const Json& config, const Json& cache, const std::string& hash = "") {
  static const ModelFacts facts = read_model_facts(kModel);
  const CacheShape shape = facts.cache_shape();
  TrainOptions options;
  options.cell = "test";
  options.model_hash = hash.empty() ? facts.hash : hash;
  save_codec_set(*train_codec_set(resolve_codec(config, shape), shape, NoRows(), options), path, {{"cache", cache}});
}

// The tool in a folder of its own, as `vqkv-eval VERB` where a verb is given.
struct EvalTool {
  TestFolder dir;
  std::string verb;
  ToolRun operator()(std::vector<std::string> arguments) const {
    if (!verb.empty()) arguments.insert(arguments.begin(), verb);
    return run_tool_of_build("vqkv-eval", dir.path.string(), arguments);
  }
  Json json(std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--json", "-q"});
    const ToolRun r = (*this)(arguments);
    INFO(r.err);
    REQUIRE(r.code == 0);
    CHECK(r.err.empty());
    return Json::parse(r.out);  // stdout is one document and nothing else
  }
  void refuses(int code, const std::string& part, const std::vector<std::string>& arguments) const {
    const ToolRun r = (*this)(arguments);
    INFO(fmt::format("{}\n{}", fmt::join(arguments, " "), r.err));
    CHECK(r.code == code);
    CHECK(r.out.empty());
    CHECK(r.err.find(part) != std::string::npos);
  }
};

// With a codec for the small model.
struct Eval : EvalTool {
  std::string codec = dir / "rtn4.codec.h5";
  Eval() { write_codec(codec, {{"name", "rtn"}, {"bits", 4}}, {{"sinks", 4}, {"window", 16}, {"flush", 16}}); }
};

}  // namespace vqkv
