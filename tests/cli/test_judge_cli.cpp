// `judge` against reconstructions with known errors, and files that lie.
#include <fmt/format.h>

#include <cmath>

#include "core/error.h"
#include "experiment/judge.h"
#include "io/hdf5.h"
#include "io/trace.h"
#include "support/catch.h"
#include "support/run_tool.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

struct Recon {
  double key_noise = 0, value_noise = 0;
  bool post_rope = false;
  Hdf5Type type = Hdf5Type::kF32;
  std::string keys = "pre_rope", trace;
  int64_t extra_tokens = 0;
  bool with_nan = false, without_value = false;
};

void write_recon(const std::string& path, const TraceReader& t, const Recon& how) {
  const CacheShape& s = t.info().shape;
  const int64_t n = t.tokens(), d = s.head_dim;
  Hdf5File file = Hdf5File::create(path, path);
  const RopeTable rope(s.rope);
  for (int which = 0; which < (how.without_value ? 1 : 2); ++which) {
    Hdf5Dataset data =
        file.create_dataset(which ? "/value" : "/key", how.type, {s.layers, s.kv_heads, n + how.extra_tokens, d});
    std::vector<float> all;
    Rng rng(static_cast<uint64_t>(which) + 5);
    for (int l = 0; l < s.layers; ++l)
      for (int h = 0; h < s.kv_heads; ++h) {
        Matrix<float> x(n, d);
        if (which)
          t.value(l, h, 0, n, x);
        else
          t.key(l, h, 0, n, x);
        if (!which && how.post_rope) rope_apply(rope, t.position().data(), x);
        for (auto& v : x.storage) v += static_cast<float>((which ? how.value_noise : how.key_noise) * rng.normal());
        if (how.with_nan && which == 0 && l == 1 && h == 1) x(300, 3) = NAN;
        all.insert(all.end(), x.storage.begin(), x.storage.end());
        all.resize(all.size() + static_cast<size_t>(how.extra_tokens * d));
      }
    if (how.type == Hdf5Type::kF32) data.write_all(all.data());
    if (how.type == Hdf5Type::kF64) data.write_all(std::vector<double>(all.begin(), all.end()).data());
    if (how.type == Hdf5Type::kI32) data.write_all(std::vector<int32_t>(all.begin(), all.end()).data());
  }
  if (!how.keys.empty()) file.write_text("/", "keys", how.keys);
  if (!how.trace.empty()) file.write_text("/", "trace", how.trace);
  file.close();
}

double value(const Json& record, const std::string& tag) {
  for (const auto& m : record.at("measurements"))
    if (m.at("tag") == tag) return m.at("value").is_null() ? NAN : m.at("value").get<double>();
  return NAN;
}

}  // namespace

TEST_CASE("judge: known errors come out as they went in", "[cli][judge]") {
  const TestFolder dir;
  JudgeOptions o;
  o.trace = dir / "t.trace.h5";
  o.recon = dir / "r.h5";
  o.bytes = 1000;
  o.overrides = {"trace.report=[3, 4]", "cache={sinks: 4, window: 16, flush: 16}"};
  write_sweep_trace(o.trace);
  const TraceReader t(o.trace);

  write_recon(o.recon, t, {});
  const Json exact = judge(o);
  CHECK(value(exact, "key.nmse") == 0);
  CHECK(value(exact, "value.nmse") == 0);
  CHECK(value(exact, "attention.softmax_kl") == Approx(0).margin(1e-9));
  // 1000 bytes over 5 documents of 160 tokens, 2 layers, 2 heads of 16 channels, keys and values.
  CHECK(value(exact, "bits_per_value.codes") == Approx(8.0 * 1000 / (2.0 * 2 * 2 * 16 * 800)));

  Recon noisy;
  noisy.value_noise = 0.5;
  write_recon(o.recon, t, noisy);
  const Json n = judge(o);
  CHECK(value(n, "key.nmse") == 0);
  CHECK(value(n, "attention.softmax_kl") == Approx(0).margin(1e-9));
  // The noise's variance over the values', counted here.
  double error = 0;
  for (int l = 0; l < 2; ++l)
    for (int h = 0; h < 2; ++h) {
      Matrix<float> v(800, 16);
      t.value(l, h, 0, 800, v);
      double energy = 0;
      for (int64_t r = 480; r < 800; ++r)
        for (int64_t c = 0; c < 16; ++c) energy += double{v(r, c)} * v(r, c);
      error += 0.25 * 320 * 16 / energy / 4;
    }
  CHECK(value(n, "value.nmse") == Approx(error).epsilon(0.1));

  // Keys after RoPE, in double: the same file otherwise.
  Recon post;
  post.key_noise = 0.3;
  write_recon(o.recon, t, post);
  const double kl = value(judge(o), "attention.softmax_kl");
  CHECK(kl > 1e-4);
  post.type = Hdf5Type::kF64;
  write_recon(o.recon, t, post);
  CHECK(value(judge(o), "attention.softmax_kl") == kl);
  Recon rotated;
  rotated.post_rope = true;
  rotated.keys = "post_rope";
  rotated.trace = t.info().content_hash;
  write_recon(o.recon, t, rotated);
  CHECK(value(judge(o), "key.nmse") < 1e-10);
}

TEST_CASE("judge: the table says in words which tokens stood exact", "[cli][judge]") {
  const TestFolder dir;
  const std::string trace = dir / "t.trace.h5", recon = dir / "r.h5";
  write_sweep_trace(trace);
  write_recon(recon, TraceReader(trace), {});
  for (const auto& [cache, words] :
       {std::pair{"cache={sinks: 4, window: 16, flush: 16}", "window 16, blocks of 16 + 4 sinks"},
        {"cache={sinks: 0, window: 1, flush: 1}", "no exact token but its own"}}) {
    CHECK(judge({.trace = trace, .recon = recon, .bytes = 1000, .overrides = {cache}, .stop = {}}).at("protocol") ==
          words);
    const auto run = [&](const char* format) {
      const ToolRun r = run_tool_of_build("vqkv-sweep", dir.path.string(),
                                          {"judge", trace, recon, "--bytes", "1000", cache, "--format", format});
      INFO(r.err);
      REQUIRE(r.code == 0);
      return r.out;
    };
    CHECK_THAT(run("md"), Catch::Contains("| protocol") && Catch::Contains(fmt::format("| {}", words)));
    for (const Json& m : Json::parse(run("json"))) {
      CAPTURE(m.at("tag"));
      CHECK(m.value("protocol", "") == (m.at("role") == "report" ? words : ""));
    }
  }
}

TEST_CASE("judge: keys after RoPE are turned back with the model's attention factor", "[cli][judge]") {
  const TestFolder dir;
  JudgeOptions o;
  o.trace = dir / "t.trace.h5";
  o.recon = dir / "r.h5";
  o.bytes = 1000;
  o.overrides = {"trace.report=[3, 4]", "cache={sinks: 4, window: 16, flush: 16}"};
  RopeFacts rope = RopeFacts::plain(16, 16, 10000);
  rope.attention_factor = 1.25;
  write_sweep_trace(o.trace, 5, 160, 2, 2, 16, 1, 0, &rope);
  const TraceReader t(o.trace);
  CHECK(t.info().shape.rope.attention_factor == 1.25);
  Recon rotated;
  rotated.post_rope = true;
  rotated.keys = "post_rope";
  rotated.trace = t.info().content_hash;
  write_recon(o.recon, t, rotated);
  const Json record = judge(o);
  CHECK(value(record, "key.nmse") < 1e-10);
  CHECK(value(record, "attention.softmax_kl") == Approx(0).margin(1e-6));
}

TEST_CASE("judge: files that lie are refused with their place", "[cli][judge]") {
  const TestFolder dir;
  JudgeOptions o;
  o.trace = dir / "t.trace.h5";
  o.recon = dir / "r.h5";
  o.bytes = 1000;
  o.overrides = {"cache.window=16"};
  write_sweep_trace(o.trace);
  const TraceReader t(o.trace);
  const auto refused = [&](const Recon& how, const std::string& part, ErrorKind kind = ErrorKind::kBadData) {
    write_recon(o.recon, t, how);
    try {
      judge(o);
      FAIL("accepted");
    } catch (const Error& e) {
      INFO(e.what());
      CHECK(e.kind() == kind);
      CHECK(std::string(e.what()).find(part) != std::string::npos);
    }
  };
  Recon how;
  how.keys = "";
  refused(how, "attribute `keys` is missing");
  how.keys = "rotated";
  refused(how, "\"pre_rope\" or \"post_rope\"");
  how = {};
  how.trace = "0123";
  refused(how, "made from the trace 0123");
  how = {};
  how.extra_tokens = 1;
  refused(how, "/key is (2, 2, 801, 16)");
  how = {};
  how.type = Hdf5Type::kI32;
  refused(how, "float16, bfloat16, float32 or float64");
  how = {};
  how.without_value = true;
  refused(how, "/value is missing");
  how = {};
  how.with_nan = true;
  refused(how, "/key: layer 1, head 1, token 300, channel 3");
  // Numbers of the exact cache would say nothing of the file.
  o.overrides = {"cache.window=1000"};
  refused({}, "command line: cache: nothing is coded: the longest window of the report documents holds 160 tokens",
          ErrorKind::kUsage);
  o.overrides = {"cache.rule=none"};
  refused({}, "command line: cache.rule: none codes nothing", ErrorKind::kUsage);
  o.overrides = {"cache.window=16", "cache.flush=16", "cache.policy=streaming"};
  refused({}, "command line: cache.policy: no coded token stays", ErrorKind::kUsage);
  for (const char* metrics : {"metrics=[code_usage]", "metrics=code_usage", "metrics=[code_usage, softmax_kl]"}) {
    o.overrides = {"cache.window=16", metrics};
    refused({}, "command line: metrics: code_usage counts codes, and a file of keys and values holds none",
            ErrorKind::kUsage);
  }
  o.overrides = {"codec.name=rtn"};
  refused({}, "no meaning for `judge`", ErrorKind::kUsage);
  o.overrides = {"trace.report=[9]"};
  refused({}, "document 9", ErrorKind::kUsage);
}
