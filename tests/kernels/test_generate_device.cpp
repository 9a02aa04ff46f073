// vqkv-eval generate and speed --device cuda, with the kernels that this program links.
#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "common/tools.h"
#include "core/error.h"
#include "core/json.h"
#include "generation/device_forms.h"
#include "kernels/source.h"
#include "support/catch.h"
#include "support/device.h"
#include "support/random_model.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct Run {
  int code = 0;
  std::string out;
};

Run eval(const testing::TempFolder& folder, std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "vqkv-eval");
  std::vector<char*> argv;
  for (std::string& a : arguments) argv.push_back(a.data());
  argv.push_back(nullptr);
  const std::string path = folder.file("stdout");
  std::fflush(stdout);
  const int kept = dup(1), file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  dup2(file, 1);
  close(file);
  Run run;
  run.code = eval_main(static_cast<int>(arguments.size()), argv.data(), {}, &linked_device_forms());
  std::fflush(stdout);
  dup2(kept, 1);
  close(kept);
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  run.out = text.str();
  return run;
}

}  // namespace

TEST_CASE("vqkv-eval generates on a device, beside the exact cache there", "[kernel][eval]") {
  const testing::TempFolder folder;
  const std::string model = folder.file("m.gguf"), codec = folder.write("kivi4.yaml",
                                                                        "codec: {name: kivi, bits: 4}\n"
                                                                        "cache: {sinks: 4, window: 16, flush: 32}\n");
  write_random_model(model, {.q_heads = 6, .head_dim = 64});
  const auto generate = [&](const std::string& device) {
    const Run run = eval(folder, {"generate", "--model", model, "--codec", codec, "--prompt",
                                  "0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[0123456789", "--new-tokens", "12",
                                  "--device", device, "--json", "-q"});
    REQUIRE(run.code == 0);
    return Json::parse(run.out);
  };
  const Json found = generate("cuda"), expected = generate("cpu");
  CHECK(found["facts"]["device"] == linked_device_forms().require_device());
  CHECK(found["facts"]["weights"] == "bf16 x bf16");
  REQUIRE(found["rows"].size() == 2);
  // Of a sequence: a page of 64 tokens and the table of pages; 8 tiles of 32 tokens and theirs.
  constexpr int64_t kHeads = 2 * 2 * 2;  // layers, roles, KV heads
  constexpr int64_t pages = kHeads * 64 * 64 * 2 + 4, tiles = kHeads * 8 * (32 * 64 / 2 + 2 * 64 * 2) + 8 * 4;
  for (size_t r = 0; r < 2; ++r) {
    const Json &a = found["rows"][r], &b = expected["rows"][r];
    CHECK(a["path"] == "cuda");
    CHECK(a["coded_mass"].is_null());
    CHECK(a["weight_bytes"].get<double>() > 0);
    CHECK(a["tokens"].size() == 12);
    CHECK(a["device_bytes"] == (r == 0 ? pages : pages + tiles));
    // A random model's tokens are nearly as likely as each other: the first ones agree.
    CHECK(a["tokens"][0] == b["tokens"][0]);
  }
  for (const char* kind : {"codes", "side", "sinks", "window"})
    CHECK(found["rows"][1]["bytes"][kind] == expected["rows"][1]["bytes"][kind]);

  const Run speed = eval(folder, {"speed", "--model", model, "--codec", codec, "--prompt-tokens", "60", "--new-tokens",
                                  "3", "--batch", "2", "--repeats", "1", "--device", "cuda", "--json", "-q"});
  REQUIRE(speed.code == 0);
  const Json rows = Json::parse(speed.out);
  REQUIRE(rows.size() == 2);
  CHECK(rows[1]["coded"] == 32);
  CHECK(rows[1]["decode"].get<double>() > 0);
  CHECK(rows[1]["attend_s"].is_null());
  CHECK(rows[1]["device_bytes"] == 2 * (pages + tiles));
}

TEST_CASE("vqkv-eval replays on a device: the processor's divergence within what the rounding of bf16 costs",
          "[kernel][eval]") {
  const testing::TempFolder folder;
  const std::string model = folder.file("m.gguf"), ids = folder.file("ids"),
                    codec = folder.write("kivi2.yaml",
                                         "codec: {name: kivi, bits: 2}\n"
                                         "cache: {sinks: 4, window: 16, flush: 32}\n");
  write_random_model(model, {.q_heads = 6, .head_dim = 64});
  std::ofstream text(ids);
  for (int i = 0; i < 260; ++i) text << (i * 29 + i / 7) % 60 << ' ';
  text.close();
  const auto replay = [&](const std::string& device, const std::string& mode) {
    const Run run =
        eval(folder, {"replay", "--model", model, "--codec", codec, "--token-ids", ids, "--context", "130", "--windows",
                      "2", "--skip-no-window", "--mode", mode, "--device", device, "--json", "-q"});
    REQUIRE(run.code == 0);
    return Json::parse(run.out);
  };
  const Json expected = replay("cpu", "forced");
  for (const std::string mode : {"forced", "stepwise"}) {
    CAPTURE(mode);
    Json found;
    unwatched([&] { found = replay("cuda", mode); });  // sessions have tests where every access is judged
    CHECK(found["facts"]["exact_path"] == "cuda");
    REQUIRE(found["rows"].size() == expected["rows"].size());
    for (size_t r = 0; r < found["rows"].size(); ++r) {
      const Json &a = found["rows"][r], &b = expected["rows"][r];
      CAPTURE(a.dump(), b.dump());
      if (r == 0) continue;  // self-noise, of another type
      CHECK(a["codec"] == b["codec"]);
      CHECK_FALSE(a.contains("coded_mass"));
      const double x = a["kld.mean"].get<double>(), y = b["kld.mean"].get<double>();
      CHECK(std::abs(x - y) < 0.2 * y);
    }
  }
}

TEST_CASE("SmolLM2 continues a text on a device as on the processor, from exact rows and from codes",
          "[kernel][eval][smollm2]") {
  const testing::TempFolder folder;
  const std::string model = small_model(), codec = folder.write("kivi4.yaml",
                                                                "codec: {name: kivi, bits: 4}\n"
                                                                "cache: {sinks: 4, window: 4, flush: 32}\n");
  if (model.empty()) return;
  const auto generate = [&](const std::string& device) {
    Run run;
    unwatched([&] {
      run = eval(folder,
                 {"generate", "--model", model, "--codec", codec, "--prompt",
                  "The seven days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday. "
                  "The seven days of the week are Monday, Tuesday, Wednesday, Thursday, Friday,",
                  "--new-tokens", "6", "--device", device, "--json", "-q"});
    });
    REQUIRE(run.code == 0);
    return Json::parse(run.out);
  };
  const Json found = generate("cuda"), expected = generate("cpu");
  for (size_t r = 0; r < 2; ++r) CHECK(found["rows"][r]["tokens"] == expected["rows"][r]["tokens"]);
  CHECK(found["rows"][1]["bytes"]["codes"].get<int64_t>() > 0);
}

TEST_CASE("vqkv-eval says what it can't do on a device", "[kernel][eval]") {
  const testing::TempFolder folder;
  const std::string model = folder.file("m.gguf"),
                    kivi = folder.write("kivi.yaml", "codec: {name: kivi, bits: 2}\ncache: {rule: kivi}\n");
  write_random_model(model, {.q_heads = 4, .head_dim = 64});
  const std::vector<std::string> generate{"generate", "--model", model, "--codec",  kivi,
                                          "--prompt", "0123",    "-q",  "--device", "cuda"};
  const auto code = [&](std::vector<std::string> more) {
    more.insert(more.begin(), generate.begin(), generate.end());
    return eval(folder, more).code;
  };
  CHECK(code({}) == static_cast<int>(ErrorKind::kUnavailable));
  CHECK(code({"--strategy", "quantspec"}) == static_cast<int>(ErrorKind::kUnavailable));
  CHECK(code({"--attention", "cpu-table"}) == static_cast<int>(ErrorKind::kUsage));
  CHECK(code({"--weights", "f32"}) == static_cast<int>(ErrorKind::kUsage));
}
