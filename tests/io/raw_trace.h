// A trace laid down dataset by dataset, so that tests and fuzzers can break one thing at a time.
#pragma once
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "core/json.h"
#include "io/hdf5.h"
#include "io/trace_layout.h"

namespace vqkv {

struct RawDataset {
  std::string name;
  Hdf5Type type;
  std::vector<int64_t> dims, chunk;
  std::vector<uint8_t> bytes;  // shorter than the dims say: the rest is zero; empty with `write` off
  bool write = true;
  template <class T>
  void set(size_t index, T value) {
    if ((index + 1) * sizeof(T) <= bytes.size()) std::memcpy(bytes.data() + index * sizeof(T), &value, sizeof(T));
  }
};

struct RawTrace {
  TraceSizes sizes{1, 2, 1, 4, 3, 6, 2, 2};  // two documents of 3 tokens, one query each
  std::vector<RawDataset> datasets;
  std::map<std::string, std::string> text;
  std::map<std::string, int64_t> integer;
  Json model;

  explicit RawTrace(const std::string& gradients = "", bool token_types = false) {
    sizes.gradients = !gradients.empty();
    sizes.token_types = token_types;
    for (const TraceDataset& d : trace_datasets(sizes, DType::kBF16)) {
      RawDataset r{d.name, d.type, d.dims, d.chunk, {}, true};
      r.bytes.resize(static_cast<size_t>(d.count()) * hdf5_type_size(d.type));
      datasets.push_back(std::move(r));
    }
    for (size_t t = 0; t < 6; ++t) {
      at("token").set<int32_t>(t, static_cast<int32_t>(t));
      at("position").set<int32_t>(t, static_cast<int32_t>(t % 3));
      at("doc").set<int32_t>(t, static_cast<int32_t>(t / 3));
      at("window").set<int32_t>(t, static_cast<int32_t>(t / 3));
    }
    at("query_token").set<int32_t>(0, 2);
    at("query_token").set<int32_t>(1, 5);
    at("moment_count").set<int64_t>(0, 6);
    at("moment_count").set<int64_t>(1, 6);
    model = {{"name", "raw"},
             {"hash", "0"},
             {"layers", 1},
             {"q_heads", 2},
             {"kv_heads", 1},
             {"head_dim", 4},
             {"hidden", 3},
             {"dtype", "bf16"},
             {"score_scale", 0.5},
             {"facts", Json::object()},
             {"rope",
              {{"head_dim", 4},
               {"rotary_dim", 4},
               {"theta", 10000.0},
               {"scaling", "none"},
               {"attention_factor", 1.0},
               {"layout", "half"},
               {"inverse_frequency", {1.0, 0.01}}}}};
    if (sizes.gradients) model["gradients"] = gradients;
    if (sizes.token_types) model["token_types"] = {"text", "image"};
    text = {{"format", "vqkv-trace"},
            {"keys", "pre_rope"},
            {"content_xxh3", std::string(32, '0')},
            {"provenance_json", "{}"},
            {"documents_json", "[\"a\",\"b\"]"}};
    integer = {{"format_version", 1}, {"complete", 1}};
  }

  RawDataset& at(const std::string& name) {
    for (RawDataset& d : datasets)
      if (d.name == name) return d;
    throw std::runtime_error("no dataset " + name);
  }
  void drop(const std::string& name) {
    std::erase_if(datasets, [&](const RawDataset& d) { return d.name == name; });
  }

  void write(const std::string& path) const {
    Hdf5File file = Hdf5File::create(path, path);
    for (const RawDataset& d : datasets) {
      std::vector<int64_t> chunk = d.chunk;
      for (size_t i = 0; i < chunk.size() && i < d.dims.size(); ++i)
        chunk[i] = std::max<int64_t>(1, std::min(chunk[i], d.dims[i]));
      if (chunk.size() != d.dims.size()) chunk.clear();
      Hdf5Dataset out = file.create_dataset("/" + d.name, d.type, d.dims, chunk);
      if (!d.write) continue;
      std::vector<uint8_t> bytes = d.bytes;
      bytes.resize(static_cast<size_t>(out.count()) * hdf5_type_size(d.type));
      out.write_all(bytes.data());
    }
    for (const auto& [name, value] : text) file.write_text("/", name, value);
    if (!model.is_null()) file.write_text("/", "model_json", canonical_json(model));
    for (const auto& [name, value] : integer) file.write_int("/", name, value);
    file.close();
  }
};

}  // namespace vqkv
