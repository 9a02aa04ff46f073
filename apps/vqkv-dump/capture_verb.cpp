// capture: reads texts with the reference runtime and writes a trace.
#include <fmt/format.h>

#include <filesystem>

#include "attention/provided.h"
#include "common/tool.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/gemm.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "generation/capture.h"
#include "io/atomic_file.h"
#include "verbs.h"

namespace vqkv::dump {
namespace {

// Multiply-adds a second of our own matrix product on this machine, now: 8 products of 256 x 1024 x 1024.
double gemm_rate() {
  Matrix<float> x(256, 1024, 0.5f), w(1024, 1024, 0.25f), y(256, 1024);
  gemm(x, w, true, y);
  const Stopwatch watch;
  for (int i = 0; i < 8; ++i) gemm(x, w, true, y);
  return 8 * 256.0 * 1024.0 * 1024.0 / watch.seconds();
}

// Multiply-adds of a capture. Each token passes each weight but the output head once. Attention, the sums that a trace
// keeps and the writing take about as long again on the small model (30 layers, context 2048); large models are weights
// first.
double multiply_adds(const ModelFacts& facts, const CapturePlan& plan, const CaptureOptions& options) {
  const double d = facts.head_dim, heads = facts.q_heads, layers = facts.layers;
  const double head = static_cast<double>(facts.vocab) * facts.hidden;
  const double weights = std::max(0.0, static_cast<double>(facts.parameters) - (facts.tied_head ? 1.0 : 2.0) * head);
  const double attention =
      layers * heads * d * static_cast<double>(options.context);  // half the square, twice the products
  const double moments = layers * heads * d * d * 4;              // in double
  const double once = weights + attention * 2 + moments;
  // A forward and a backward pass, about three times the work of one forward, with the head's products twice.
  const double gradients = options.gradients.empty() ? 0 : 3 * (weights + attention) + 2 * head + 3 * moments;
  return static_cast<double>(plan.tokens) * (once + gradients);
}

}  // namespace

int run_capture(const CaptureVerb& v) {
  // What can't be is told before anything is read.
  const std::string device = v.device.require();
  if (!v.gradients.empty() && !v.device.on_cpu())
    fail_unavailable("--gradients: a device has no backward pass; --device cpu records gradients");
  if (v.out.empty() && !v.dry_run) fail_usage("capture needs -o FILE.trace.h5, or --dry-run");
  CaptureOptions options;
  options.context = v.context;
  options.max_tokens = v.text.max_tokens;
  options.query_stride = v.query_stride;
  options.query_tail = v.query_tail;
  options.dtype = dtype_from_name(v.dtype);
  options.output_weight = v.output_weight;
  options.gradients = v.gradients;

  const ModelFacts facts = read_model_facts(v.model);
  std::unique_ptr<Tokenizer> loaded;
  const Tokenizer* tokenizer =
      tokenizer_for(v.text, [&]() -> const Tokenizer& { return *(loaded = load_tokenizer(v.model)); });
  const auto documents = read_documents(v.text, tokenizer, facts.vocab);
  const CapturePlan plan = plan_capture(documents, options, facts, tokenizer ? tokenizer->special() : SpecialTokens{});
  TraceInfo info = capture_info(facts, options);
  const int64_t bytes =
      TraceWriter::estimate_bytes(info, plan.tokens, plan.queries, static_cast<int64_t>(plan.names.size()));
  Json row = {{"model", facts.name},
              {"documents", plan.names.size()},
              {"windows", plan.windows.size()},
              {"tokens", plan.tokens},
              {"queries", plan.queries},
              {"bos", plan.bos},
              {"dtype", v.dtype},
              {"bytes", bytes}};
  Table table;
  table.columns = {{"model", "model", "", false},
                   {"documents", ""},
                   {"windows", ""},
                   {"tokens", ""},
                   {"queries", ""},
                   {"bos", "BOS a window", "", false},
                   {"dtype", "stored as", "", false},
                   {"bytes", ""}};
  if (!v.gradients.empty()) {
    row["gradients"] = v.gradients;
    table.columns.push_back({"gradients", "gradients of", "", false});
  }
  if (v.dry_run) {
    const double work = multiply_adds(facts, plan, options);
    row["multiply_adds"] = work;
    table.columns.push_back({"multiply_adds", "multiply-adds, about", "{:.3g}"});
    if (v.device.on_cpu()) {  // a device's rate would take a model on it
      row["seconds"] = work / gemm_rate();
      table.columns.push_back({"seconds", "seconds, about", "{:.1f}"});
    }
    table.rows.push_back(row);
    print(table, v.format);
    if (!v.out.empty()) require_free_space(v.out, bytes);
    return kExitOk;
  }

  // Before the minutes, not after them.
  require_free_space(v.out, bytes);
  log_info(fmt::format("{}: {} tokens in {} windows of {} documents, {} to write", facts.name, plan.tokens,
                       plan.windows.size(), plan.names.size(), human_bytes(static_cast<double>(bytes))));
  const Stopwatch watch;
  Json sources = Json::array();
  for (const TextDocument& d : documents) sources.push_back({{"name", d.name}, {"tokens", d.tokens.size()}});
  const auto model = v.device.open(v.model);
  info.provenance = {{"tool", "vqkv-dump"},
                     {"version", version_facts()},
                     {"command", v.command},
                     {"time", utc_now()},
                     {"threads", thread_count()},
                     {"weights", model->weights()},
                     {"device", device},
                     {"context", v.context},
                     {"query_stride", v.query_stride},
                     {"query_tail", v.query_tail},
                     {"bos", plan.bos},
                     {"documents", sources}};
  TraceWriter writer(v.out, info, plan.names, plan.tokens, plan.queries);
  bool complete = false;
  {
    Progress progress("tokens", plan.tokens);
    const auto go_on = [&](int64_t done) {
      progress.update(done);
      return !interrupted();
    };
    complete = v.device.on_cpu() ? capture_trace(*model, plan, writer, go_on)
                                 : capture_trace(*model, plan, writer, go_on, kDeviceAttention);
  }
  if (!complete) {
    log_warning(fmt::format("{} was not written", v.out));
    return kExitOk;  // run_tool turns it into 128 + signal
  }
  row["bytes"] = static_cast<int64_t>(std::filesystem::file_size(v.out));
  row["seconds"] = watch.seconds();
  row["write_seconds"] = writer.write_seconds();
  row["hash_seconds"] = writer.hash_seconds();
  row["out"] = v.out;
  table.columns.push_back({"seconds", "seconds", "{:.1f}"});
  table.columns.push_back({"write_seconds", "of it writing", "{:.2f}"});
  table.columns.push_back({"hash_seconds", "hashing", "{:.2f}"});
  table.columns.push_back({"out", "trace", "", false});
  table.rows.push_back(row);
  print(table, v.format);
  return kExitOk;
}

}  // namespace vqkv::dump
