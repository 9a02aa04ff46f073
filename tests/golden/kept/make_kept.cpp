// make_kept FOLDER: the files of this release's formats that every later release must open
// (tests/golden/test_kept.cpp): a small trace, a codec archive of every method, and expected.json with what they code
// and decode to. What is there stays as it is; a new method's archive is
// added, and ledger.json, what each costs, made again when kLedgerVersion rises.
//
//   build/release/tests/make_kept tests/golden/kept/v1
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>

#include "codec/codec_archive.h"
#include "core/error.h"
#include "experiment/cost.h"
#include "experiment/runner.h"
#include "golden/kept/kept_trace.h"
#include "io/atomic_file.h"
#include "support/cache_shape.h"
#include "support/train_data.h"

using namespace vqkv;

namespace {

// Every method, and between them every transform, both placements of RoPE, and every way to share.
const std::pair<const char*, const char*> kCodecs[] = {
    {"exact", "{name: exact, dtype: bf16}"},
    {"rtn", "{name: rtn, bits: 3, group: 16, transform: [center, hadamard], v: {axis: channel, bits: 2, group: 8}}"},
    {"kivi", "{name: kivi, bits: 2, group: 16}"},
    {"pq",
     "{name: pq, codebooks: 4, bits: 3, iterations: 3, k: {rope: pre, transform: [center, query_metric]}, v: "
     "{transform: "
     "[rotation]}}"},
    {"rvq",
     "{name: rvq, codebooks: 2, bits: 3, beam: 2, refine: 1, iterations: 3, heads: all, k: {transform: "
     "[channel_scale]}, "
     "v: {transform: [token_scale]}}"},
    {"kumar",
     "{name: kumar, codebooks: 2, bits: 3, group: 16, iterations: 3, ema_steps: 2, share: heads, k: {rope: pre}}"},
    {"simvq", "{name: simvq, codebooks: 2, bits: 3, rounds: 3, share: layers}"},
    {"ggml", "{name: ggml, type: q5_1, v: {type: iq4_nl}}"},
    {"fp8", "{name: fp8, scale: head, v: {format: e5m2}}"},
    {"kvquant", "{name: kvquant, bits: 3, outliers: 0.1, heads: all, k: {rope: pre}}"},
    {"qjl", "{name: qjl, outliers: 3, group: 16, initial_layers: 0}"},
    {"commvq",
     "{name: commvq, codebooks: 2, bits: 3, steps: 3, start_points: 32, group: 32, value_bits: 2, hidden: 16, "
     "value_steps: 20, value_batch: 16, heads: all, k: {rope: pre}}"},
    {"calibquant", "{name: calibquant, preset: b4}"},
    {"quantspec", "{name: quantspec, group: 16}"},
    {"specache", "{name: specache, group: 16}"},
    {"quanto", "{name: quanto, group: 16, k: {axis: -1}, v: {group: 32}}"},
    {"hqq", "{name: hqq, group: 16, tokens: 16, heads: all, k: {bits: 3}, v: {axis: 1, bits: 2, group: 32}}"}};

std::shared_ptr<const CodecSet> trained(const std::string& name, const std::string& codec, const std::string& trace) {
  if (name == "ggml") {  // its blocks of 32 channels don't divide the trace's heads, and it learns nothing
    const CacheShape shape = test::make_shape(1, 2, 2, 32);
    return train_codec_set(resolve_codec(parse_yaml(codec, name).tree, shape), shape, test::MadeUp(1),
                           {.cell = {}, .model_hash = kept::info().model_hash, .progress = {}});
  }
  return codecs_of_cell(make_cell(parse_yaml(fmt::format("trace: {{path: \"{}\", train: [0], report: [1]}}\ncodec: {}\n"
                                                         "cache: {{sinks: 0, window: 16, flush: 16}}\n",
                                                         trace, codec),
                                             name)),
                        nullptr);
}

Json expected(const CodecSet& set) {
  Json units = Json::array();
  for (const TrainedUnit& u : set.units()) {
    const UnitShape& shape = u.spec.unit;
    const Matrix<float> x = kept::rows_of(u);
    CodeBlock code;
    const auto state = kept::state_of(*u.codec, x);
    u.codec->encode(x, code, state.get());
    Matrix<float> y(x.rows, x.cols);
    u.codec->decode(code, y, {.state = state.get()});
    units.push_back({{"role", role_name(shape.role)},
                     {"first_head", shape.first_head},
                     {"version", find_method(u.spec.method).describe().version},
                     {"blocks", code.blocks},
                     {"fields", code.fields},
                     {"sides", code.sides},
                     {"first_row", std::vector<float>(y.row(0), y.row(1))},
                     {"last_row", std::vector<float>(y.row(y.rows - 1), y.row(y.rows))}});
    for (const OverlayEntry& e : code.overlay) units.back()["overlay"].push_back({e.token, e.channel, e.value, e.add});
  }
  return units;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "make_kept FOLDER\n");
    return 2;
  }
  try {
    const std::filesystem::path folder = argv[1];
    std::filesystem::create_directories(folder);
    const std::string trace = (folder / "small.trace.h5").string(), facts = (folder / "expected.json").string();
    Json out = std::filesystem::exists(facts)
                   ? parse_json(read_file(facts), facts)
                   : Json{{"content_xxh3", kept::write_trace(trace)}, {"codecs", Json::object()}};
    for (const auto& [name, codec] : kCodecs) {
      if (out["codecs"].contains(name)) continue;
      const auto set = trained(name, codec, trace);
      save_codec_set(*set, (folder / (std::string(name) + ".codec.h5")).string(), {{"made_by", "make_kept"}});
      out["codecs"][name] = expected(*set);
    }
    write_file(facts, out.dump() + "\n");
    Json ledger = {{"version", kLedgerVersion}, {"codecs", Json::object()}};
    for (const auto& [name, codec] : kCodecs)
      ledger["codecs"][name] = kept::ledger_of(load_codec_set((folder / (std::string(name) + ".codec.h5")).string()));
    write_file((folder / "ledger.json").string(), ledger.dump(1) + "\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
