// Frozen codec sets on disk: what comes back codes and decodes with the same bits.
#include <unistd.h>
#include <filesystem>
#include <fstream>
#include <map>

#include "codec/codec_archive.h"
#include "codec/vq_support.h"
#include "core/error.h"
#include "io/archive.h"
#include "io/atomic_file.h"
#include "support/cache_shape.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

struct TempDir {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("vqkv-codec-archive-" + std::to_string(getpid()));
  TempDir() { std::filesystem::create_directories(path); }
  ~TempDir() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
};

CodecSet train_codecs(const char* config) {
  const CacheShape shape = small_shape();
  const CodecPlan plan = resolve_codec(parse_json(config, "test"), shape);
  REQUIRE(plan.skip == "");
  std::vector<TrainedUnit> units;
  std::map<std::string, std::shared_ptr<const Codec>> shared;
  for (const UnitSpec& spec : plan.units) {
    std::shared_ptr<const Codec>& slot =
        shared[role_name(spec.unit.role) + (spec.share == "layers" ? "" : std::to_string(units.size()))];
    TrainReport report{1.5, 600, 3, {0.5, 0.25}};
    if (!slot) {
      auto codec = make_codec(spec);
      const auto x = gaussian(600, spec.unit.channels(), 7 + units.size());
      report = codec->train(train_set(x, spec.unit), Rng(units.size()));
      slot = std::move(codec);
    }
    units.push_back({spec, slot, report});
  }
  return CodecSet(shape, plan.config, std::move(units), "abc123");
}

void check_equal(const CodecSet& a, const CodecSet& b) {
  REQUIRE(a.units().size() == b.units().size());
  CHECK(canonical_json(a.config()) == canonical_json(b.config()));
  CHECK(a.model_hash() == b.model_hash());
  CHECK(a.constant_bytes() == b.constant_bytes());
  for (size_t i = 0; i < a.units().size(); ++i) {
    const TrainedUnit &x = a.units()[i], &y = b.units()[i];
    CHECK(x.spec.method == y.spec.method);
    CHECK(x.spec.share == y.spec.share);
    CHECK(x.spec.unit.layer == y.spec.unit.layer);
    CHECK(canonical_json(x.report.to_json()) == canonical_json(y.report.to_json()));
    const auto test = gaussian(64, x.codec->channels(), 99);
    CodeBlock ca, cb;
    x.codec->encode(test, ca);
    y.codec->encode(test, cb);
    CHECK(ca.fields == cb.fields);
    CHECK(ca.sides == cb.sides);
    Matrix<float> da(64, test.cols), db(64, test.cols);
    x.codec->decode(ca, da);
    y.codec->decode(cb, db);
    CHECK(da.storage == db.storage);
  }
}

std::string refusal(const std::string& path) {
  try {
    load_codec_set(path);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kBadData);
    CHECK_THAT(e.what(), Catch::Contains(path));
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a codec set reads back with the same bits", "[codec_archive]") {
  const TempDir dir;
  for (
      const char* config :
      {R"({"name": "exact"})", R"({"name": "rtn", "group": 16, "bits": 3, "transform": ["center", "hadamard"]})",
       R"({"name": "pq", "codebooks": 4, "bits": 4, "heads": "all", "rope": "pre", "v": {"transform": ["center"]}})",
       R"({"name": "pq", "codebooks": 4, "bits": 4, "v": {"name": "rtn", "group": 16}, "overrides": [{"layers": [1], "set": {"k.bits": 5}}]})"}) {
    INFO(config);
    const CodecSet set = train_codecs(config);
    save_codec_set(set, dir / "c.codec.h5", {{"cache", {{"sinks", 4}}}});
    Json facts;
    const CodecSet loaded = load_codec_set(dir / "c.codec.h5", &facts);
    CHECK(facts == Json{{"cache", {{"sinks", 4}}}});
    CHECK(loaded.shape().rope.inverse_frequency == set.shape().rope.inverse_frequency);
    CHECK(loaded.shape().score_scale == 0.25f);
    check_equal(set, loaded);
    // Saving what was loaded gives the same content.
    save_codec_set(loaded, dir / "d.codec.h5", facts);
    CHECK(canonical_json(ArchiveReader(dir / "c.codec.h5", kCodecFormat, 1, 1).facts("set")) ==
          canonical_json(ArchiveReader(dir / "d.codec.h5", kCodecFormat, 1, 1).facts("set")));
  }
}

TEST_CASE("a codec that units share is stored once and shared again", "[codec_archive]") {
  const TempDir dir;
  const CodecSet set = train_codecs(R"({"name": "pq", "codebooks": 4, "bits": 4, "share": "layers"})");
  save_codec_set(set, dir / "c.codec.h5");
  const CodecSet loaded = load_codec_set(dir / "c.codec.h5");
  check_equal(set, loaded);
  CHECK(loaded.units()[0].codec == loaded.units()[4].codec);
}

TEST_CASE("a codec file is refused by what it says", "[codec_archive]") {
  const TempDir dir;
  const std::string path = dir / "c.codec.h5";
  const CodecSet set = train_codecs(R"({"name": "rtn", "group": 16, "bits": 3, "transform": ["center"]})");
  save_codec_set(set, path);
  const Json good = ArchiveReader(path, kCodecFormat, 1, 1).facts("set");
  // The container is whole and its hashes fit; only what `set` says is changed.
  const auto with = [&](const std::function<void(Json&)>& change) {
    Json changed = good;
    change(changed);
    ArchiveWriter out(dir / "bad.h5", kCodecFormat, 1);
    for (size_t i = 0; i < set.units().size(); ++i) {
      struct Writer final : ParameterWriter {
        ArchiveWriter* archive = nullptr;
        std::string prefix;
        void tensor(const std::string& n, const std::vector<int64_t>& s, const float* d) override {
          archive->tensor(prefix + n, s, d);
        }
        void facts(const std::string& n, const Json& v) override { archive->facts(prefix + n, v); }
      } writer;
      writer.archive = &out;
      writer.prefix = "codec/0000" + std::to_string(i) + "/";
      set.units()[i].codec->save(writer);
    }
    out.facts("set", changed);
    out.finish();
    return refusal(dir / "bad.h5");
  };
  CHECK(with([](Json&) {}).empty());
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["method"] = "rtm"; }), Catch::Contains("did you mean 'rtn'"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["version"] = 99; }), Catch::Contains("version 99"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["knobs"]["bits"] = 99; }), Catch::Contains("bits"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["knobs"]["bits"] = "many"; }), Catch::Contains("bits"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["knobs"]["new"] = 1; }), Catch::Contains("new"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["transforms"][0]["name"] = "centre"; }),
             Catch::Contains("centre"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["transforms"] = {1}; }), Catch::Contains("name"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["layer"] = 2; }), Catch::Contains("'layer' is 2"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["role"] = "q"; }), Catch::Contains("allowed: k, v"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["spec"]["head_dim"] = 32; }), Catch::Contains("head_dim"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["codec"] = 7; }), Catch::Contains("7"));
  CHECK_THAT(with([](Json& j) {
               j["units"][2]["codec"] = 0;
               j["units"][2]["spec"]["role"] = "v";
             }),
             Catch::Contains("another kind"));
  CHECK_THAT(with([](Json& j) { j["units"].erase(0); }), Catch::Contains("no codec"));
  CHECK_THAT(with([](Json& j) { j["units"].push_back(j["units"][0]); }), Catch::Contains("units"));
  CHECK_THAT(with([](Json& j) { j["units"] = Json::object(); }), Catch::Contains("units"));
  CHECK_THAT(with([](Json& j) { j["shape"]["kv_heads"] = 3; }), Catch::Contains("no multiple"));
  CHECK_THAT(with([](Json& j) { j["shape"]["layers"] = 1000000000; }), Catch::Contains("'layers'"));
  CHECK_THAT(with([](Json& j) { j["units"][0]["report"].erase("curve"); }), Catch::Contains("training report"));
}

TEST_CASE("a damaged codec file is bad data, never a crash", "[codec_archive]") {
  const TempDir dir;
  save_codec_set(train_codecs(R"({"name": "pq", "codebooks": 4, "bits": 4})"), dir / "c.h5");
  const std::string bytes = read_file(dir / "c.h5");
  Rng rng(5);
  int refused = 0;
  for (int i = 0; i < 60; ++i) {
    std::string copy = bytes;
    for (int k = 0; k < 4; ++k) copy[rng.below(copy.size())] ^= static_cast<char>(1 + rng.below(255));
    std::ofstream(dir / "d.h5", std::ios::binary).write(copy.data(), static_cast<std::streamsize>(copy.size()));
    refused += !refusal(dir / "d.h5").empty();
  }
  CHECK(refused > 10);
  for (int i = 0; i < 20; ++i) {
    std::ofstream(dir / "d.h5", std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size() * static_cast<size_t>(i) / 20));
    CHECK_FALSE(refusal(dir / "d.h5").empty());
  }
}
