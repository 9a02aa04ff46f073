#include "experiment/encode.h"

#include <fmt/format.h>

#include <algorithm>

#include "cache/coding.h"
#include "codec/codec_archive.h"
#include "config/config.h"
#include "core/error.h"
#include "experiment/coded_rows.h"
#include "experiment/trace_facts.h"
#include "io/archive.h"
#include "io/trace_check.h"

namespace vqkv {
namespace {

Json to_json(const LinearMap& map) {
  return std::visit(
      Overloaded{[](const IdentityMap&) {
                   return Json{{"kind", "identity"}};
                 },
                 [](const DiagonalMap& m) {
                   return Json{{"kind", "diagonal"}, {"factor", m.factor}};
                 },
                 [](const GatherMap& m) {
                   return Json{{"kind", "gather"}, {"rows", m.rows}, {"from", m.from}, {"factor", m.factor}};
                 },
                 [](const BlockMap& m) {
                   Json blocks = Json::array();
                   for (const BlockMap::Block& b : m.blocks)
                     blocks.push_back({{"rows", b.rows}, {"cols", b.cols}, {"values", b.values}});
                   return Json{{"kind", "blocks"}, {"blocks", std::move(blocks)}};
                 },
                 [](const HadamardMap& m) {
                   return Json{{"kind", "hadamard"}, {"block", m.block}, {"before", m.before}, {"after", m.after}};
                 },
                 [](const DenseMap& m) {
                   return Json{{"kind", "dense"}, {"rows", m.rows}, {"cols", m.cols}, {"values", m.values}};
                 }},
      map);
}

void write(ArchiveWriter& out, const std::string& name, const CodeLayout& layout, const CodeBlock& block,
           const Matrix<float>& rows) {
  const auto each = [&](bool per_token) { return per_token ? rows.rows : block.blocks; };
  for (size_t f = 0; f < layout.fields.size(); ++f) {
    const FieldSpec& spec = layout.fields[f];
    const AlignedVector<float> codes(block.fields[f].begin(), block.fields[f].end());
    out.tensor(name + "/field/" + spec.name, {each(spec.per_token), spec.slots}, codes.data());
  }
  for (size_t s = 0; s < layout.sides.size(); ++s) {
    const SideSpec& spec = layout.sides[s];
    out.tensor(name + "/side/" + spec.name, {each(spec.per_token), spec.slots}, block.sides[s].data());
  }
  if (!block.overlay.empty()) {
    AlignedVector<float> overlay;
    for (const OverlayEntry& e : block.overlay)
      for (const float v : {static_cast<float>(e.token), static_cast<float>(e.channel), e.value, e.add ? 1.0f : 0.0f})
        overlay.push_back(v);
    out.tensor(name + "/overlay", {static_cast<int64_t>(block.overlay.size()), 4}, overlay.data());
  }
  out.tensor(name + "/rows", {rows.rows, rows.cols}, rows.data());
}

// The codecs' own, with what may be said differently; all documents unless trace.report says which.
Config config_of(const EncodeOptions& options, const TraceReader& trace, const Json& codec_facts) {
  Config config;
  std::vector<int32_t> all;
  for (const auto& d : trace.documents()) all.push_back(d.id);
  config.tree = {{"trace", {{"path", options.trace}, {"report", all}}},
                 {"codec", {{"name", "exact"}}},
                 {"cache", codec_facts.value("cache", Json::object())}};
  const std::vector<std::string> open = {"trace.report", "cache.sinks", "cache.prompt", "cache.exact_dtype"};
  for (const auto& o : options.overrides) {
    if (std::none_of(open.begin(), open.end(), [&](const std::string& key) { return o.starts_with(key + "="); }))
      fail_usage(fmt::format("{}: `encode` takes {} alone; the rest is the codec file's", o, fmt::join(open, ", ")));
    apply_override(config, o);
  }
  return config;
}

void require_same_model(const CodecSet& codecs, const TraceReader& trace, const std::string& path) {
  const CacheShape &have = codecs.shape(), &want = trace.info().shape;
  if (have.layers != want.layers || have.kv_heads != want.kv_heads || have.head_dim != want.head_dim ||
      have.group() != want.group())
    fail_data(fmt::format("{}: made for {} layers, {}/{} heads of {}; {} has {} layers, {}/{} heads of {}", path,
                          have.layers, have.q_heads, have.kv_heads, have.head_dim, trace.path(), want.layers,
                          want.q_heads, want.kv_heads, want.head_dim));
  if (!codecs.model_hash().empty() && codecs.model_hash() != trace.info().model_hash)
    fail_data(fmt::format("{}: trained on the model with hash {}; {} is of {}", path, codecs.model_hash(), trace.path(),
                          trace.info().model_hash));
}

}  // namespace

Json encode(const EncodeOptions& options) {
  Json codec_facts;
  const CodecSet codecs = load_codec_set(options.codecs, &codec_facts);
  if (codecs.tiers() > 1)
    fail_usage(fmt::format("{}: a codec of {} tiers; encode writes what one codes", options.codecs, codecs.tiers()));
  if (codecs.sees_lower())
    fail_usage(options.codecs + ": a codec that sees the layer below; its codes decode with that layer's alone");
  const auto trace = open_verified_trace(options.trace);
  require_same_model(codecs, *trace, options.codecs);
  const Config config = config_of(options, *trace, codec_facts);
  const CellConfig cell = read_cell_config(config);
  check_against_trace(config, cell, read_trace_facts(options.trace));
  const CachePolicy policy = cell.policy();
  if (!policy.keeps_codes())
    fail_usage(fmt::format("{}: under its cache rule or policy no coded token stays", options.codecs));
  for (const TrainedUnit& u : codecs.units())
    if (const std::string reason = prompt_conflict(policy, u.spec.method, *u.codec); !reason.empty())
      fail_usage(reason);
  const TraceRows rows(*trace, cell);

  ArchiveWriter out(options.out, kCodesFormat, kCodesVersion);
  Json windows = Json::array();
  int64_t written = 0, tokens = 0;
  for (size_t i = 0; i < rows.windows().size(); ++i) {
    const EvalWindow& w = rows.windows()[i];
    int64_t coded = 0;
    std::vector<HeadRows> heads;
    for (size_t number = 0; number < codecs.units().size(); ++number) {
      const TrainedUnit& unit = codecs.units()[number];
      const UnitShape& u = unit.spec.unit;
      if (options.stop && options.stop()) return Json();
      if (number == 0 || u.layer != codecs.units()[number - 1].spec.unit.layer) {
        heads.clear();
        for (int h = 0; h < codecs.shape().kv_heads; ++h)
          heads.push_back(exact_rows(rows, u.layer, h, w, held_rope(codecs, u.layer, h)));
      }
      CodeBlock block;
      Matrix<float> decoded;
      std::unique_ptr<SequenceState> state;
      code_unit(rows, codecs, unit, w, heads, block, {}, &decoded, &state);
      if (decoded.rows == 0) continue;
      const std::string name = fmt::format("window/{:05}/unit/{:05}", i, number);
      write(out, name, unit.codec->layout(), block, decoded);
      if (state) {
        const DecodePlan plan = unit.codec->plan({-1, state.get()});
        out.facts(name + "/prompt",
                  {{"map", to_json(plan.map)}, {"inner_bias", plan.inner_bias}, {"outer_bias", plan.outer_bias}});
      }
      ++written;
      coded = std::max(coded, decoded.rows);
    }
    windows.push_back({{"document", w.window.document},
                       {"first_token", w.window.first_token},
                       {"tokens", w.window.tokens},
                       {"sinks", std::min(rows.policy(w).sinks, w.window.tokens)}});
    tokens += coded;
  }
  if (written == 0) {
    const CachePolicy waiting = policy.for_codecs(codecs);
    if (policy.codes_images) fail_usage(fmt::format("{}: {}", options.trace, rows.codes_nothing(&codecs)));
    fail_usage(fmt::format("{}: no window of its documents holds a whole block behind {} sinks; {}", options.trace,
                           policy.sinks, waiting.waits > 0 ? waiting.waits_text() : "nothing is coded"));
  }
  out.facts("codes", {{"codec", codec_archive_hash(options.codecs)},
                      {"trace", trace->info().content_hash},
                      {"cache", cell.cache},
                      {"windows", windows}});
  out.facts("facts", options.provenance);
  out.finish();
  return {{"windows", windows.size()}, {"units", written}, {"tokens", tokens}};
}

}  // namespace vqkv
