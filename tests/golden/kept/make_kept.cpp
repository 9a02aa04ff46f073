// make_kept FOLDER: the files of this release's formats that every later release must open
// (tests/golden/test_kept.cpp): a small trace, a codec archive of every method, and expected.json with what they decode
// to.
//
//   build/release/tests/make_kept tests/golden/kept/v1     # made once a format version, never again
#include <fmt/format.h>

#include <cstdio>
#include <filesystem>

#include "codec/codec_archive.h"
#include "core/error.h"
#include "experiment/runner.h"
#include "golden/kept/kept_trace.h"
#include "io/atomic_file.h"

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
    {"simvq", "{name: simvq, codebooks: 2, bits: 3, rounds: 3, share: layers}"}};

Json expected(const CodecSet& set) {
  Json units = Json::array();
  for (const TrainedUnit& u : set.units()) {
    const UnitShape& shape = u.spec.unit;
    Matrix<float> x(std::max(4, u.codec->layout().block_tokens), shape.channels());
    const auto what = shape.role == Role::kKey ? kept::kKey : kept::kValue;
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.cols; ++c) x(r, c) = kept::value_at(what, 0, shape.first_head + c / 16, r, c % 16);
    CodeBlock code;
    u.codec->encode(x, code);
    VQKV_CHECK(code.overlay.empty());  // none of these has one
    Matrix<float> y(x.rows, x.cols);
    u.codec->decode(code, y);
    units.push_back({{"role", role_name(shape.role)},
                     {"first_head", shape.first_head},
                     {"blocks", code.blocks},
                     {"fields", code.fields},
                     {"sides", code.sides},
                     {"first_row", std::vector<float>(y.row(0), y.row(1))},
                     {"last_row", std::vector<float>(y.row(y.rows - 1), y.row(y.rows))}});
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
    if (!std::filesystem::is_empty(folder))
      fail_usage(folder.string() + ": holds files already; kept files never change");
    const std::string trace = (folder / "small.trace.h5").string();
    Json out = {{"content_xxh3", kept::write_trace(trace)}, {"codecs", Json::object()}};
    for (const auto& [name, codec] : kCodecs) {
      const auto set = codecs_of_cell(
          make_cell(parse_yaml(fmt::format("trace: {{path: \"{}\", train: [0], report: [1]}}\ncodec: {}\ncache: "
                                           "{{sinks: 0, window: 16, flush: 16}}\n",
                                           trace, codec),
                               name)),
          nullptr);
      save_codec_set(*set, (folder / (std::string(name) + ".codec.h5")).string(), {{"made_by", "make_kept"}});
      out["codecs"][name] = expected(*set);
    }
    write_file((folder / "expected.json").string(), out.dump() + "\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
