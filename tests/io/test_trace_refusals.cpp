// Files that are not what they claim: each is refused by name, as bad data, in bounded time and memory.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <csignal>
#include <fstream>

#include "core/error.h"
#include "io/atomic_file.h"
#include "raw_trace.h"
#include "support/catch.h"
#include "trace_fixture.h"

using namespace vqkv;

namespace {

std::string refusal(const std::string& path) {
  try {
    const TraceReader reader(path);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK_THAT(e.what(), Catch::Contains(path));
    return e.what();
  }
  return "";
}

std::string refusal(const TempDir& dir, const RawTrace& t) {
  t.write(dir / "t.h5");
  return refusal(dir / "t.h5");
}

}  // namespace

TEST_CASE("the raw trace of these tests is itself sound", "[trace][refuse]") {
  const TempDir dir("raw");
  REQUIRE(refusal(dir, RawTrace()).empty());
  // Its content hash is made up: only verify() looks at it.
  const auto problems = TraceReader(dir / "t.h5").verify();
  REQUIRE(problems.size() == 1);
  REQUIRE_THAT(problems[0], Catch::Contains("content hash is"));
}

TEST_CASE("attributes of a trace are held to the format", "[trace][refuse]") {
  const TempDir dir("refuse-attributes");
  const auto with_text = [&](const std::string& name, const std::string& value) {
    RawTrace t;
    t.text[name] = value;
    return refusal(dir, t);
  };
  const auto with_int = [&](const std::string& name, int64_t value) {
    RawTrace t;
    t.integer[name] = value;
    return refusal(dir, t);
  };
  const auto with_model = [&](const std::string& key, const Json& value) {
    RawTrace t;
    t.model[key] = value;
    return refusal(dir, t);
  };
  REQUIRE_THAT(with_text("format", "vqkv-codec"), Catch::Contains("not a trace"));
  REQUIRE_THAT(with_int("format_version", 2), Catch::Contains("version 2"));
  REQUIRE_THAT(with_int("complete", 0), Catch::Contains("incomplete"));
  REQUIRE_THAT(with_text("keys", "rope"), Catch::Contains("pre_rope, post_rope"));
  REQUIRE_THAT(with_text("content_xxh3", "xyz"), Catch::Contains("content_xxh3"));
  REQUIRE_THAT(with_text("documents_json", "[1]"), Catch::Contains("documents_json"));
  REQUIRE_THAT(with_text("documents_json", "[\"only one\"]"), Catch::Contains("shape"));
  REQUIRE_THAT(with_text("documents_json", "[\"a\",\"b\""), Catch::Contains("JSON"));
  REQUIRE_THAT(with_text("provenance_json", "{\"a\":1,\"a\":2}"), Catch::Contains("twice"));
  REQUIRE_THAT(with_model("layers", 0), Catch::Contains("'layers' is 0"));
  REQUIRE_THAT(with_model("layers", 18446744073709551615ull), Catch::Contains("'layers'"));
  REQUIRE_THAT(with_model("layers", 1.5), Catch::Contains("integer"));
  REQUIRE_THAT(with_model("layers", 2), Catch::Contains("shape"));
  REQUIRE_THAT(with_model("q_heads", 3), !Catch::Contains("internal"));
  REQUIRE_THAT(with_model("kv_heads", 4096), Catch::Contains("no multiple"));
  REQUIRE_THAT(with_model("head_dim", 5), Catch::Contains("odd"));
  REQUIRE_THAT(with_model("dtype", "f8e5m2"), Catch::Contains("bf16, f16, f32"));
  REQUIRE_THAT(with_model("dtype", "f16"), Catch::Contains("is bf16, must be f16"));
  REQUIRE_THAT(with_model("score_scale", 0), Catch::Contains("score_scale"));
  REQUIRE_THAT(with_model("score_scale", "NaN"), Catch::Contains("score_scale"));
  REQUIRE_THAT(with_model("rope", Json::object()), Catch::Contains("rope"));
  REQUIRE_THAT(with_model("hidden", -1), Catch::Contains("hidden"));
  RawTrace t;
  t.model = nullptr;
  REQUIRE_THAT(refusal(dir, t), Catch::Contains("model_json"));
}

TEST_CASE("gradients of a trace are held to the format", "[trace][refuse]") {
  const TempDir dir("refuse-gradients");
  REQUIRE(refusal(dir, RawTrace("next-token")).empty());
  REQUIRE_THAT(refusal(dir, RawTrace("kld")), Catch::Contains("gradients") && Catch::Contains("next-token, sampled"));
  RawTrace promised;  // by name alone
  promised.model["gradients"] = "sampled";
  REQUIRE_THAT(refusal(dir, promised), Catch::Contains("/key_gradient2"));
  for (const GradientOf of : kGradientsOf)
    for (const std::string name : {squared_gradient_name(of), gradient_moment_name(of)}) {
      INFO(name);
      RawTrace t("sampled");
      t.drop(name);
      CHECK_THAT(refusal(dir, t), Catch::Contains("/" + name));
      RawTrace wide("sampled");
      wide.at(name).type = Hdf5Type::kF32;
      CHECK_THAT(refusal(dir, wide), Catch::Contains("/" + name + ": is f32"));
    }
  RawTrace nan("sampled");
  nan.at("key_gradient2").set<uint16_t>(5, 0x7fc0);
  nan.write(dir / "t.h5");
  const auto problems = TraceReader(dir / "t.h5").verify();
  REQUIRE(problems.size() == 2);
  CHECK_THAT(problems[0], Catch::Contains("/key_gradient2: 1 values are NaN") && Catch::Contains("token 1, channel 1"));
}

TEST_CASE("token types of a trace are held to the format", "[trace][refuse]") {
  const TempDir dir("refuse-token-types");
  REQUIRE(refusal(dir, RawTrace("", true)).empty());
  for (const Json& types : {Json("image"), Json::array(), Json{"image"}, Json{"text", 1}, Json{"text", "text"}}) {
    RawTrace t("", true);
    t.model["token_types"] = types;
    CHECK_THAT(refusal(dir, t), Catch::Contains("token_types is " + types.dump()));
  }
  RawTrace missing("", true), wide("", true), unknown("", true);
  missing.drop("token_type");
  CHECK_THAT(refusal(dir, missing), Catch::Contains("/token_type"));
  wide.at("token_type").type = Hdf5Type::kI64;
  CHECK_THAT(refusal(dir, wide), Catch::Contains("/token_type: is i64"));
  unknown.at("token_type").set<int32_t>(4, 2);
  CHECK_THAT(refusal(dir, unknown), Catch::Contains("/token_type[4] is 2; allowed: 0 to 1"));
}

TEST_CASE("datasets of a trace are held to the schema", "[trace][refuse]") {
  const TempDir dir("refuse-datasets");
  const auto broken = [&](const std::string& name, const std::function<void(RawDataset&)>& change) {
    RawTrace t;
    change(t.at(name));
    return refusal(dir, t);
  };
  for (const RawDataset& d : RawTrace().datasets) {
    INFO(d.name);
    RawTrace t;
    t.drop(d.name);
    CHECK_THAT(refusal(dir, t), Catch::Contains("/" + d.name));
    CHECK_THAT(broken(d.name,
                      [](RawDataset& r) {
                        r.type = Hdf5Type::kF64;
                        r.dims[0] += 1;
                      }),
               Catch::Contains("/" + d.name));
    CHECK_THAT(broken(d.name, [](RawDataset& r) { r.dims.push_back(1); }), Catch::Contains("/" + d.name));
    CHECK_THAT(broken(d.name, [](RawDataset& r) { r.write = false; }), Catch::Contains("written"));
  }
  CHECK_THAT(broken("key", [](RawDataset& r) { r.type = Hdf5Type::kF16; }), Catch::Contains("is f16, must be bf16"));
  CHECK_THAT(broken("token_id", [](RawDataset& r) { r.type = Hdf5Type::kF32; }),
             Catch::Contains("is f32, must be i32"));
  // A coordinate of NaN can only be a float, and floats are refused there.
  CHECK_THAT(broken("query_token",
                    [](RawDataset& r) {
                      r.type = Hdf5Type::kF32;
                      r.set<float>(0, NAN);
                    }),
             Catch::Contains("must be i32"));
  // Dims that claim more than the file could hold cost nothing.
  CHECK_THAT(broken("token",
                    [](RawDataset& r) {
                      r.dims = {int64_t{1} << 31};
                      r.write = false;
                    }),
             Catch::Contains("claims"));
  CHECK_THAT(broken("key",
                    [](RawDataset& r) {
                      r.dims = {1 << 20, 1 << 20, 1 << 20, 4};
                      r.chunk = {1, 1, 1, 4};
                      r.write = false;
                    }),
             Catch::Contains("/key"));
}

TEST_CASE("windows, positions and queries of a trace are in order", "[trace][refuse]") {
  const TempDir dir("refuse-order");
  const auto with = [&](const std::string& name, size_t index, int32_t value) {
    RawTrace t;
    t.at(name).set<int32_t>(index, value);
    return refusal(dir, t);
  };
  CHECK_THAT(with("token_id", 3, -1), Catch::Contains("/token_id[3] is -1"));
  CHECK_THAT(with("position", 1, 2), Catch::Contains("/position[1] is 2"));
  CHECK_THAT(with("position", 3, 3), Catch::Contains("/position[3]"));
  CHECK_THAT(with("window", 0, 1), Catch::Contains("/window[0] is 1"));
  CHECK_THAT(with("window", 4, 0), Catch::Contains("/window[4] is 0 after 1"));
  CHECK_THAT(with("doc", 1, 1), Catch::Contains("changes inside window"));
  CHECK_THAT(with("doc", 0, 2), Catch::Contains("/doc[0] is 2"));
  CHECK_THAT(with("doc", 5, 0), Catch::Contains("/doc[5]"));
  CHECK_THAT(with("query_token", 0, 5), Catch::Contains("must ascend"));
  CHECK_THAT(with("query_token", 1, 6), Catch::Contains("allowed: 0 to 5"));
  CHECK_THAT(with("layer", 0, -3), Catch::Contains("/layer[0] is -3"));
  RawTrace t;
  t.at("moment_count").set<int64_t>(1, INT64_MAX);
  CHECK_THAT(refusal(dir, t), Catch::Contains("/moment_count[1]"));
}

TEST_CASE("verify finds NaN and changed values, and reads of moments and mass refuse NaN", "[trace][refuse]") {
  const TempDir dir("verify");
  RawTrace t;
  t.at("key").set<uint16_t>(4 * 4 + 1, 0x7fc0);
  t.at("received_mass").set<float>(2, -1.0f);
  t.at("query_moment").set<double>(3, NAN);
  t.write(dir / "t.h5");
  const TraceReader r(dir / "t.h5");
  const auto problems = r.verify();
  REQUIRE(problems.size() == 3);
  CHECK_THAT(problems[0], Catch::Contains("/query_moment: 1 values are NaN or infinite"));
  CHECK_THAT(
      problems[1],
      Catch::Contains("/key: 1 values are NaN or infinite, the first at layer 0, kv_head 0, token 4, channel 1"));
  CHECK_THAT(problems[2], Catch::Contains("content hash"));
  CHECK_THROWS_WITH(r.query_moment(0, 0, 0), Catch::Contains("/query_moment: document 0, layer 0, head 0 holds nan"));
  CHECK_NOTHROW(r.query_moment(0, 0, 1));
  CHECK_THROWS_WITH(r.received_mass(0, 0, 0, 6), Catch::Contains("holds -1"));
}

TEST_CASE("a trace cut anywhere is refused", "[trace][refuse]") {
  const TempDir dir("truncated");
  write_trace(dir / "whole.h5", DType::kBF16, 10, 0);
  const std::string bytes = read_file(dir / "whole.h5");
  std::vector<size_t> sizes{0, 1, 7, 8, 9, 48, 96, 511, 512, 513, 2048, 4096};
  for (int i = 1; i < 40; ++i) sizes.push_back(bytes.size() * static_cast<size_t>(i) / 40);
  for (const size_t less : {size_t{1}, size_t{8}, size_t{64}, size_t{4096}}) sizes.push_back(bytes.size() - less);
  for (const size_t size : sizes) {
    INFO(size << " of " << bytes.size());
    std::ofstream(dir / "cut.h5", std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(size));
    CHECK_FALSE(refusal(dir / "cut.h5").empty());
  }
}

TEST_CASE("damaged bytes in the metadata never crash or hang the reader", "[trace][refuse]") {
  const TempDir dir("damaged");
  RawTrace().write(dir / "whole.h5");
  const std::string bytes = read_file(dir / "whole.h5");
  Rng rng(11);
  int refused = 0;
  for (int i = 0; i < 150; ++i) {
    std::string damaged = bytes;
    for (int k = 0; k < 8; ++k) damaged[rng.below(damaged.size())] = static_cast<char>(rng.next_u32());
    std::ofstream(dir / "d.h5", std::ios::binary).write(damaged.data(), static_cast<std::streamsize>(damaged.size()));
    refused += !refusal(dir / "d.h5").empty();
  }
  CHECK(refused > 10);
}

TEST_CASE("what is no trace file at all is refused", "[trace][refuse]") {
  const TempDir dir("no-trace");
  CHECK_THAT(refusal(dir / "absent.h5"), Catch::Contains("No such file"));
  CHECK_THAT(refusal(dir.path.string()), Catch::Contains("not a regular file"));
  std::ofstream(dir / "text.h5") << "format: vqkv-trace\n";
  CHECK_THAT(refusal(dir / "text.h5"), Catch::Contains("can't be opened as HDF5"));
  Hdf5File::create(dir / "empty.h5", "empty").close();
  CHECK_THAT(refusal(dir / "empty.h5"), Catch::Contains("not a trace"));
}

TEST_CASE("a probe that dies or never ends is bad data", "[trace][refuse]") {
  const auto message_of = [](const std::function<void()>& body) -> std::string {
    try {
      probe_in_child("x.h5", body);
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kBadData);
      return e.what();
    }
    return "";
  };
  CHECK(message_of([] {}).empty());
  CHECK(message_of([] { fail_data("x.h5: no"); }) == "x.h5: no");
  CHECK_THAT(message_of([] { raise(SIGSEGV); }), Catch::Contains("x.h5: a damaged container: libhdf5 crashed"));
  CHECK_THAT(message_of([] { std::abort(); }), Catch::Contains("crashed"));
  CHECK_THAT(message_of([] { raise(SIGXCPU); }), Catch::Contains("found no end"));
  CHECK_THAT(message_of([] { throw std::bad_alloc(); }), Catch::Contains("memory"));
}

TEST_CASE("a full disk: bad data that says so, no file left under either name", "[trace][refuse]") {
  const TempDir dir("full");
  // A file size limit stands for the disk: the write fails the same way, in the middle of a chunk.
  for (const rlim_t limit : {rlim_t{100}, rlim_t{5000}, rlim_t{60000}, rlim_t{120000}, rlim_t{200000}}) {
    INFO("limit " << limit);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      signal(SIGXFSZ, SIG_IGN);
      const rlimit r{limit, limit};
      setrlimit(RLIMIT_FSIZE, &r);
      int code = 1;
      try {
        write_trace(dir / "t.h5", DType::kBF16);
      } catch (const Error& e) {
        code = e.kind() == ErrorKind::kBadData && std::string(e.what()).find("t.h5") != std::string::npos &&
                       std::string(e.what()).find("File too large") != std::string::npos
                   ? 0
                   : 2;
        if (code) std::fprintf(stderr, "%s\n", e.what());
      }
      _exit(code);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(std::filesystem::is_empty(dir.path));
  }
}

TEST_CASE("a writer that is dropped leaves nothing", "[trace][refuse]") {
  const TempDir dir("dropped");
  {
    TraceWriter writer(dir / "t.h5", trace_info(DType::kBF16), {"a"}, 100, 10);
    writer.add(trace_window(trace_info(DType::kBF16), 0, 50, {1}, 4));
    CHECK(std::filesystem::exists(dir / "t.h5.partial"));
  }
  CHECK(std::filesystem::is_empty(dir.path));
}
