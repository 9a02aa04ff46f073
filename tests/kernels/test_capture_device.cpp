// vqkv-dump capture --device cuda, with the kernels that this program links: the trace is the processor's within bf16's
// rounding.
#include <cmath>
#include <fstream>

#include "common/tools.h"
#include "core/error.h"
#include "core/json.h"
#include "generation/device_forms.h"
#include "io/trace.h"
#include "kernels/difference.h"
#include "kernels/source.h"
#include "support/catch.h"
#include "support/test_folder.h"

using namespace vqkv;

namespace {

int dump(std::vector<std::string> arguments, const DeviceForms* device) {
  arguments.insert(arguments.begin(), "vqkv-dump");
  std::vector<char*> argv;
  for (std::string& a : arguments) argv.push_back(a.data());
  argv.push_back(nullptr);
  return dump_main(static_cast<int>(arguments.size()), argv.data(), {}, device);
}

}  // namespace

TEST_CASE("a capture on a device is the processor's within bf16's rounding", "[kernel][capture]") {
  const TestFolder folder;
  const std::string ids = folder / "ids.txt", on_cpu = folder / "cpu.trace.h5", on_device = folder / "cuda.trace.h5";
  std::ofstream text(ids);
  for (int i = 0; i < 90; ++i) text << (i * 37 + 11) % 90 << ' ';
  text.close();
  for (const std::string family : {"llama", "qwen2", "qwen3"}) {
    CAPTURE(family);
    const auto capture = [&](const std::string& device, const std::string& out) {
      // The last window is shorter than those before it.
      return dump(
          {"capture", "--model", kSource + "/tests/golden/tiny/" + family + ".gguf", "--token-ids", ids, "--context",
           "40", "--query-stride", "4", "--dtype", "f32", "--device", device, "-o", out, "--quiet"},
          &linked_device_forms());
    };
    REQUIRE(capture("cpu", on_cpu) == 0);
    REQUIRE(capture("cuda", on_device) == 0);
    const TraceReader a(on_device), b(on_cpu);
    REQUIRE(a.tokens() == b.tokens());
    CHECK(a.info().provenance.at("weights") == "bf16 x bf16");
    CHECK(a.info().provenance.at("device") == linked_device_forms().require_device());
    CHECK(b.info().provenance.at("device") == "cpu");
    const CacheShape shape = b.info().shape;
    const auto check = [&](auto read, int64_t rows) {
      Matrix<float> found(rows, shape.head_dim), expected(rows, shape.head_dim);
      read(a, found.view());
      read(b, expected.view());
      CHECK(relative_difference(found, expected) <
            0.015);  // eight bits of weights, inputs and, in attention, weights of tokens
    };
    for (int l = 0; l < shape.layers; ++l) {
      CAPTURE(l);
      for (int h = 0; h < shape.kv_heads; ++h) {
        check([&](const TraceReader& t, MutMatrix out) { t.key(l, h, 0, t.tokens(), out); }, b.tokens());
        check([&](const TraceReader& t, MutMatrix out) { t.value(l, h, 0, t.tokens(), out); }, b.tokens());
      }
      check([&](const TraceReader& t, MutMatrix out) { t.query(l, 0, 0, t.queries(), out); }, b.queries());
      CHECK(a.output_weight(l).storage == b.output_weight(l).storage);
    }
  }
}

TEST_CASE("a capture on a device refuses what a device does not have", "[kernel][capture]") {
  const std::string model = kSource + "/tests/golden/tiny/llama.gguf", text = kSource + "/data/jargon-0.txt";
  const std::vector<std::string> capture{"capture", "--model",       model,      "--text", text,
                                         "-o",      "/nowhere/t.h5", "--device", "cuda"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), capture.begin(), capture.end());
    return more;
  };
  CHECK(dump(with({"--weights", "f32"}), &linked_device_forms()) == static_cast<int>(ErrorKind::kUsage));
  CHECK(dump(with({"--gradients", "sampled"}), &linked_device_forms()) == static_cast<int>(ErrorKind::kUnavailable));
  CHECK(dump(capture, nullptr) == static_cast<int>(ErrorKind::kUnavailable));
}
