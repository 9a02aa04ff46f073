// Bytes of a cache: the ledger by kind, what the allocator saw, and what the process peaked at. Each peak comes from a
// fresh child process, since a peak never goes down.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <span>

#include "attention/sequence.h"
#include "codec/codec_archive.h"
#include "common/tool.h"
#include "core/child_process.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/log.h"
#include "core/rng.h"
#include "core/thread_pool.h"
#include "experiment/protocol.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

// What a child is given: a file, since a codec trained in the child would count in its peak.
struct ChildCodec {
  std::string spec;
  std::filesystem::path temporary;
  ~ChildCodec() {
    std::error_code ignored;
    if (!temporary.empty()) std::filesystem::remove_all(temporary, ignored);
  }
};

void hand_over(const LoadedCodec& codec, ChildCodec& child) {
  if (!codec.policy.codes && codec.label == "exact") {
    child.spec = "exact";
    return;
  }
  std::string name = (std::filesystem::temp_directory_path() / "vqkv-memory-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) fail_data(fmt::format("{}: no folder could be made there", name));
  child.temporary = name;
  child.spec = (child.temporary / "c.codec.h5").string();
  save_codec_set(*codec.codecs, child.spec, {{"cache", codec.cache}});
}

// Runs this program again with one codec and one context and reads the JSON line it prints. Null when interrupted.
Json measure_in_child(const MemoryVerb& v, const std::string& label, const std::string& codec, int64_t context) {
  ChildProcess child({"/proc/self/exe", "memory", "--model", v.common.model, "--codec", codec, "--attention",
                      v.common.attention, "--weights", v.common.device.cpu_weights(), "--child-context",
                      std::to_string(context), "--threads", std::to_string(thread_count()), "-q"});
  std::string text(size_t{1} << 16, ' ');  // far more than the line takes
  constexpr double kNoLimit = std::numeric_limits<double>::infinity();
  const auto [end, received] =
      child.exchange({}, std::as_writable_bytes(std::span(text)), kNoLimit, [] { return interrupted(); });
  if (end == ChildProcess::End::kStopped) {
    child.signal(interrupt_signal());
    return nullptr;
  }
  text.resize(received);
  if (text.ends_with('\n')) {
    if (const std::string warnings = child.stderr_tail(); !warnings.empty()) std::fputs(warnings.c_str(), stderr);
    return parse_json(text, "child process");
  }
  const int code = child.exit_code();
  throw Error(code >= kExitUsage && code <= kExitUnavailable ? static_cast<ErrorKind>(code) : ErrorKind::kInternal,
              fmt::format("{} at {} tokens: the process that measured it: {}", label, context, child.last_words()));
}

// What the child does: a prompt of pseudo-random tokens through the compressed cache, as replay would feed it.
int run_child(const MemoryVerb& v) {
  const auto model = open_model(v.common);
  const auto codec = load_codec(v.common.codecs.at(0), v.common, model->facts());
  const int64_t loaded = peak_rss_bytes();
  Sequence sequence(codec.codecs, codec.policy, v.common.attention);
  Rng rng(1);
  std::vector<int32_t> tokens(static_cast<size_t>(v.child_context));
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(model->facts().vocab)));
  constexpr int64_t kBlock = 128;
  for (int64_t at = 0, n = 0; at < v.child_context && !interrupted(); at += n) {
    // The last token is a step: what attention keeps is what it keeps while decoding.
    n = std::min(kBlock, std::max<int64_t>(1, v.child_context - 1 - at));
    model->forward(std::span(tokens).subspan(static_cast<size_t>(at), static_cast<size_t>(n)), sequence.session(),
                   LogitRows::kNone, {});
  }
  if (interrupted()) return kExitOk;
  // What a policy gives up depends on the text: there is no formula.
  const std::string what = fmt::format("{} at {} tokens", codec.label, v.child_context);
  if (codec.policy.keep)
    sequence.check_ledger(what);
  else
    sequence.check_ledger(ledger_at(*codec.codecs, codec.policy, v.child_context), what);
  const Json out = {{"ledger", sequence.bytes().to_json()},
                    {"allocator", sequence.allocated()},
                    {"threads", attention_scratch_bytes()},
                    {"allocator_peak", sequence.allocated_peak()},
                    {"process_peak", peak_rss_bytes()},
                    {"process_loaded", loaded},
                    {"path", sequence.path()}};
  std::fputs((out.dump() + "\n").c_str(), stdout);
  return kExitOk;
}

}  // namespace

Json memory_row(const std::string& label, const CachePolicy& policy, const Json& codec_config, const ByteLedger& ledger,
                const CacheShape& shape, int64_t tokens) {
  Json row = ledger.to_json();
  row["codec"] = label;
  row["protocol"] = protocol_text(policy, codec_config);
  row["context"] = tokens;
  row["total"] = ledger.total_sequence();
  add_bits(row, ledger, shape, tokens);
  return row;
}

std::vector<Column> memory_columns(std::span<const Column> before_bits) {
  std::vector<Column> out{
      {"codec", "codec", "", false}, {"protocol", "protocol", "", false}, {"context", "context", "{:.0f}"}};
  out.insert(out.end(), before_bits.begin(), before_bits.end());
  for (const Column& c : bits_columns()) out.push_back(c);
  for (const auto& [key, title] : {std::pair{"total", "resident"},
                                   {"codes", "codes"},
                                   {"side", "side"},
                                   {"overlay", "overlay"},
                                   {"sinks", "sinks"},
                                   {"window", "window"},
                                   {"padding", "padding"},
                                   {"index", "index"},
                                   {"workspace", "workspace"},
                                   {"codebooks", "books (model)"}})
    out.push_back({key, title, "{:.0f}"});
  return out;
}

std::vector<int64_t> memory_contexts(const MemoryVerb& v) {
  auto contexts = parse_counts("--context", v.contexts);
  for (const int64_t context : contexts)
    if (context < 1 || context > (int64_t{1} << 24))
      fail_usage(fmt::format("--context {}: allowed: 1 to 2^24 tokens", context));
  return contexts;
}

int run_memory(const MemoryVerb& v) {
  if (v.child_context >= 0) return run_child(v);
  if (!v.shape.empty()) return run_memory_at_shape(v);
  if (v.common.model.empty()) fail_usage("memory: --model is required, or --shape for formulas alone");
  refuse_exec(v.common, "what another program keeps can't be counted; replay shows what it claims");
  make_attention_backend(v.common.attention);
  const auto contexts = memory_contexts(v);
  const int64_t measured_up_to = parse_count(v.measured_up_to);
  const ModelFacts model = read_model_facts(v.common.model);
  const CacheShape shape = model.cache_shape();
  std::vector<LoadedCodec> codecs{load_codec("exact", v.common, model)};
  for (auto& codec : load_codecs(v.common, model))
    if (codec.policy.codes || codec.label != "exact") codecs.push_back(std::move(codec));
  if (interrupted()) return kExitOk;
  Table table{memory_columns(), {}};
  for (const auto& [key, title] : {std::pair{"threads", "threads' tiles"},
                                   {"allocator", "allocator"},
                                   {"allocator_peak", "allocator peak"},
                                   {"process_peak", "process peak"}})
    table.columns.push_back({key, title, "{:.0f}"});
  table.columns.push_back({"path", "path", "", false});
  for (const LoadedCodec& codec : codecs) {
    ChildCodec child;
    hand_over(codec, child);
    for (const int64_t context : contexts) {
      if (interrupted()) break;
      const bool measurable = context <= measured_up_to && context <= model.longest_context();
      if (codec.policy.keep && !measurable) {
        log_warning(
            fmt::format("{}: what its cache holds at {} tokens depends on the text, and so long a context is not "
                        "measured",
                        codec.label, context));
        continue;
      }
      Json measured;
      if (measurable) {
        require_cache_memory(std::vector<HeldCaches>{{codec.label, *codec.codecs, codec.policy}}, context);
        log_info(fmt::format("measuring {} at {} tokens in a fresh process", codec.label, context));
        measured = measure_in_child(v, codec.label, child.spec, context);
        if (measured.is_null()) break;
      }
      const ByteLedger ledger =
          measurable ? ByteLedger::from_json(measured.at("ledger")) : ledger_at(*codec.codecs, codec.policy, context);
      Json row = memory_row(codec.label, codec.policy, codec.codecs->config(), ledger, shape, context);
      if (measurable)
        for (const char* key : {"threads", "allocator", "allocator_peak", "process_peak", "process_loaded", "path"})
          row[key] = measured[key];
      table.rows.push_back(std::move(row));
    }
  }
  print(table, v.common.format);
  return kExitOk;
}

}  // namespace vqkv::eval
