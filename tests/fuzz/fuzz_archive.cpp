// Codec files: sound containers with sound hashes, whose specifications, knobs, shapes and tensors the input decides.
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "codec/codec_archive.h"
#include "core/error.h"
#include "fuzz_input.h"
#include "io/archive.h"
#include "io/hdf5.h"

using namespace vqkv;

namespace {

struct Stored {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// What a sound file of each of a few configurations holds.
struct Sound {
  Json set;
  std::map<std::string, Stored> tensors;
  std::map<std::string, Json> facts;
};

struct Keep final : ParameterWriter {
  Sound* out = nullptr;
  std::string prefix;
  void tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data) override {
    size_t n = 1;
    for (const int64_t s : shape) n *= static_cast<size_t>(s);
    out->tensors[prefix + name] = {shape, std::vector<float>(data, data + n)};
  }
  void facts(const std::string& name, const Json& value) override { out->facts[prefix + name] = value; }
};

Sound make_sound(const char* config, const std::string& path) {
  CacheShape shape;
  shape.layers = 1;
  shape.q_heads = 2;
  shape.kv_heads = 2;
  shape.head_dim = 8;
  shape.rope = RopeFacts::plain(8, 8, 10000.0);
  shape.score_scale = 0.3f;
  const CodecPlan plan = resolve_codec(parse_json(config, "fuzz"), shape);
  if (!plan.skip.empty()) std::abort();
  std::vector<TrainedUnit> units;
  for (const UnitSpec& spec : plan.units) {
    auto codec = make_codec(spec);
    Matrix<float> x(64, spec.unit.channels());
    Rng rng(units.size());
    for (auto& v : x.storage) v = static_cast<float>(rng.normal());
    TrainSet train;
    train.x = x;
    train.head_dim = 8;
    train.heads = spec.unit.heads;
    const TrainReport report = codec->train(train, Rng(1));
    units.push_back({spec, std::move(codec), report});
  }
  const CodecSet set(shape, plan.config, std::move(units), "0");
  save_codec_set(set, path);
  Sound out;
  out.set = ArchiveReader(path, kCodecFormat, 1, kCodecVersion).facts("set");
  for (size_t i = 0; i < set.units().size(); ++i) {
    Keep keep;
    keep.out = &out;
    keep.prefix = "codec/0000" + std::to_string(i) + "/";
    set.units()[i].codec->save(keep);
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string path =
      (std::filesystem::temp_directory_path() / ("vqkv-fuzz-archive-" + std::to_string(getpid()) + ".h5")).string();
  static const std::vector<Sound> sound = [] {
    set_probe_enabled(false);
    std::atexit([] { std::filesystem::remove(path); });
    std::vector<Sound> out;
    for (const char* config : {R"({"name": "rtn", "group": 8, "transform": ["center", "hadamard"]})",
                               R"({"name": "pq", "codebooks": 2, "bits": 3})",
                               R"({"name": "kivi", "group": 8, "heads": "all"})", R"({"name": "exact"})"})
      out.push_back(make_sound(config, path));
    return out;
  }();
  fuzzing::Decisions d(data, size);
  Sound file = sound[d.below(sound.size())];
  for (int i = 0; i < 4 && d.more(); ++i) {
    auto it = file.tensors.begin();
    if (!file.tensors.empty()) std::advance(it, static_cast<std::ptrdiff_t>(d.below(file.tensors.size())));
    switch (file.tensors.empty() ? 5 : d.below(7)) {
      case 0:
        it->second.shape = {static_cast<int64_t>(it->second.values.size())};
        break;
      case 1:
        it->second.shape.insert(it->second.shape.begin(), 1);
        break;
      case 2:
        it->second.shape = {static_cast<int64_t>(d.below(9)), static_cast<int64_t>(d.below(9))};
        it->second.values.assign(static_cast<size_t>(it->second.shape[0] * it->second.shape[1]), 1.0f);
        break;
      case 3:
        if (!it->second.values.empty()) {
          const uint32_t bits = static_cast<uint32_t>(d.word());
          float v = 0;
          std::memcpy(&v, &bits, 4);
          if (std::isfinite(v)) it->second.values[d.below(it->second.values.size())] = v;
        }
        break;
      case 4:
        file.tensors.erase(it);
        break;
      case 5:
        d.break_json(file.set);
        break;
      default:
        if (!file.facts.empty())
          d.break_json(file.facts.begin()->second);
        else
          d.break_json(file.set);
    }
  }
  try {
    ArchiveWriter out(path, kCodecFormat, kCodecVersion);
    for (const auto& [name, t] : file.tensors) out.tensor(name, t.shape, t.values.data());
    for (const auto& [name, value] : file.facts) out.facts(name, value);
    out.facts("set", file.set);
    out.finish();
  } catch (const std::exception&) {
    return 0;  // not expressible
  }
  try {
    const CodecSet set = load_codec_set(path);
    for (const TrainedUnit& u : set.units()) {
      const int64_t n = u.codec->layout().block_tokens;
      if (n > 4096) continue;
      Matrix<float> x(n, u.codec->channels(), 0.5f), y(n, u.codec->channels());
      CodeBlock block;
      u.codec->encode(x, block);
      u.codec->decode(block, y);
    }
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::kBadData) {
      std::fprintf(stderr, "%s\n", e.what());
      __builtin_trap();
    }
  }
  return 0;
}
