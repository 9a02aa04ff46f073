// `memory --shape`: the formulas of the ledger alone, for a model that need not be here.
#include <fmt/format.h>

#include <filesystem>
#include <numeric>
#include <optional>

#include "common/tool.h"
#include "config/config.h"
#include "core/error.h"
#include "experiment/plan.h"
#include "experiment/protocol.h"
#include "experiment/shape_ledger.h"
#include "experiment/shapes.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

// Of no codec.
constexpr const char* kNeverCounted = "what attention keeps between steps, and what threads work in";

struct ShapedCodec {
  std::string label;
  ShapeLedger ledger;
  std::optional<int64_t> constants;      // none: training makes them
  std::vector<std::string> not_counted;  // of this codec
};

ShapedCodec exact_at(const CacheShape& shape) {
  return {"exact", ShapeLedger({{"name", "exact"}}, {{"rule", "none"}}, shape), 0, {}};
}

ShapedCodec read_codec(const std::string& path, const MemoryVerb& v, const CacheShape& shape) {
  if (!path.ends_with(".yaml") && !path.ends_with(".yml"))
    fail_usage(
        fmt::format("--codec {}: at a shape a codec is exact or a cell.yaml; a frozen one is of its own model: "
                    "give --model",
                    path));
  Config config = load_config(path);
  for (const auto& o : v.common.overrides) apply_override(config, o);
  const CellConfig cell = read_single_cell(config);
  check_cell_file(cell, path, v.common);
  const CodecPlan plan = resolve_single_cell(config, cell, shape);
  const std::string learner = what_learns(plan);
  ShapedCodec out{file_label(path, std::filesystem::path(path).stem().string()),
                  annotated(config, [&] { return ShapeLedger(cell.codec, cell.cache, shape, v.exceptions); }),
                  {},
                  {}};
  if (learner.empty())
    out.constants = constants_without_training(plan, shape);
  else
    out.not_counted.push_back(fmt::format("books and other constants of the model: {} learns them", learner));
  if (out.ledger.policy().keep)
    out.not_counted.emplace_back(
        "the bytes of its pages and indices: which tokens a head gives up only a text tells, and `replay` measures; "
        "held is what each head sees right behind a decision, sums included");
  if (out.ledger.keeps_exceptions() && v.exceptions == 0)
    out.not_counted.emplace_back(
        "exact exceptions, but for their pointers: how many there are only rows tell; --exceptions 0.01 counts as "
        "many");
  return out;
}

// Whether the window repeats itself from flush to flush, and soon enough to be summed up.
bool periodic(const CachePolicy& policy) {
  constexpr int64_t kLongest = 4096;
  return policy.keeps_codes() && policy.prompt == 0 && policy.k.flush <= kLongest && policy.v.flush <= kLongest &&
         std::lcm(policy.k.flush, policy.v.flush) <= kLongest;
}

Json row_of(const ShapedCodec& codec, int64_t tokens) {
  const ShapeLedger& l = codec.ledger;
  if (l.policy().keep)
    return {{"codec", codec.label},        {"protocol", protocol_text(l.policy(), l.config())},
            {"context", tokens},           {"bits_coded", l.bits({}, tokens)},
            {"bits_held", l.held(tokens)}, {"not_counted", codec.not_counted}};
  ByteLedger bytes = l.at(tokens);
  bytes.codebooks = codec.constants.value_or(0);
  Json row = memory_row(codec.label, l.policy(), l.config(), bytes, l.shape(), tokens);
  if (!codec.constants)
    for (const char* with_books : {"codebooks", "bits_per_value_1", "bits_per_value_64"}) row.erase(with_books);
  if (l.policy().keeps_codes()) row["bits_coded"] = l.bits({}, tokens);
  row["bits_held"] = l.held(tokens);
  if (periodic(l.policy())) row["bits_held_mean"] = l.held_in_the_mean(tokens);
  row["not_counted"] = Json::array({kNeverCounted});
  for (const std::string& what : codec.not_counted) row["not_counted"].push_back(what);
  return row;
}

}  // namespace

int run_memory_at_shape(const MemoryVerb& v) {
  const CacheShape shape = find_shape(v.shape);
  const auto contexts = memory_contexts(v);
  if (!(v.exceptions >= 0 && v.exceptions <= 1)) fail_usage("--exceptions is a share from 0 to 1");
  refuse_idle_overrides(v.common);
  std::vector<ShapedCodec> codecs{exact_at(shape)};
  std::map<std::string, int> seen;
  bool exceptions = false;
  for (const std::string& spec : v.common.codecs) {
    if (spec == "exact") continue;
    codecs.push_back(read_codec(spec, v, shape));
    codecs.back().label = own_label(seen, codecs.back().label);
    exceptions |= codecs.back().ledger.keeps_exceptions();
    if (interrupted()) return kExitOk;
  }
  if (v.exceptions > 0 && !exceptions) fail_usage("--exceptions: no codec of --codec keeps any");
  const Column before_bits[] = {{"bits_coded", "codes+side", "{:.3f}"},
                                {"bits_held", "held", "{:.3f}"},
                                {"bits_held_mean", "held, mean", "{:.3f}"}};
  Table table{memory_columns(before_bits), {}};
  for (const ShapedCodec& codec : codecs)
    for (const int64_t context : contexts) table.rows.push_back(row_of(codec, context));
  if (!print(table, v.common.format, table.rows)) return kExitOk;
  std::string notes = fmt::format(
      "\nAt {}: {} layers, {} query heads, {} KV heads of {}; no weights, no training, nothing allocated.\n"
      "Bits a value. codes+side: of a coded one, exceptions included; held: with sinks and window, as papers count; "
      "held, mean: with the window at its mean over a period of flushes; bits/value: with the padding and the indices "
      "of the allocation.\n"
      "Not counted: {}; `memory --model` measures them.\n",
      v.shape, shape.layers, shape.q_heads, shape.kv_heads, shape.head_dim, kNeverCounted);
  for (const ShapedCodec& codec : codecs)
    for (const std::string& what : codec.not_counted)
      notes += fmt::format("Not counted of {}: {}.\n", codec.label, what);
  std::fputs(notes.c_str(), stdout);
  return kExitOk;
}

}  // namespace vqkv::eval
