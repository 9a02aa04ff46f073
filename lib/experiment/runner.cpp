#include "experiment/runner.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>

#include "codec/build.h"
#include "codec/codec_archive.h"
#include "core/clock.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "experiment/cost.h"
#include "experiment/fidelity.h"
#include "experiment/protocol.h"
#include "experiment/result_set.h"
#include "experiment/store_folder.h"
#include "experiment/training_curve.h"
#include "io/record_index.h"
#include "io/trace_check.h"

namespace vqkv {
namespace {

std::string trace_path(const Json& cell) { return cell.at("config").at("trace").at("path").get<std::string>(); }

// Traces are opened once a run, verified unless the user trusts them. The cell's content hash must still be the file's.
class Traces {
 public:
  explicit Traces(bool trusted) : trusted_(trusted) {}
  std::shared_ptr<const TraceReader> reader(const std::string& path) {
    const std::lock_guard lock(mutex_);
    auto& slot = open_[path];
    if (!slot) slot = trusted_ ? std::make_shared<const TraceReader>(path) : open_verified_trace(path);
    return slot;
  }
  std::shared_ptr<const TraceReader> open(const Json& cell) {
    const std::string path = trace_path(cell);
    const auto slot = reader(path);
    if (slot->info().content_hash != cell.at("trace").get<std::string>())
      fail_data(fmt::format("{}: its content hash is {}, the plan was made for {}; plan again for the new trace", path,
                            slot->info().content_hash, cell.at("trace").get<std::string>()));
    return slot;
  }

 private:
  bool trusted_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<const TraceReader>> open_;
};

// Cells that differ only in what is measured share their codecs. The first that asks makes them, others that ask
// meanwhile wait; the last few stay in memory.
class Trained {
 public:
  explicit Trained(size_t most) : most_(most) {}

  // `check` is asked while waiting and may throw. Where `make` throws, the next that waits makes them.
  template <class Make>
  std::shared_ptr<const CodecSet> get(const std::string& id, const std::function<void()>& check, Make make) {
    std::unique_lock lock(mutex_);
    while (true) {
      for (const auto& [key, set] : kept_)
        if (key == id) return set;
      if (making_.insert(id).second) break;
      made_.wait_for(lock, std::chrono::milliseconds(100));
      check();
    }
    lock.unlock();
    const auto end = [&] {
      lock.lock();
      making_.erase(id);
      made_.notify_all();
    };
    std::shared_ptr<const CodecSet> set;
    try {
      set = make();
    } catch (...) {
      end();
      throw;
    }
    end();
    if (kept_.size() >= most_) kept_.erase(kept_.begin());
    kept_.emplace_back(id, set);
    return set;
  }

 private:
  size_t most_;
  std::mutex mutex_;
  std::condition_variable made_;
  std::set<std::string> making_;
  std::vector<std::pair<std::string, std::shared_ptr<const CodecSet>>> kept_;
};

std::shared_ptr<const CodecSet> train(const TraceRows& rows, const CodecPlan& plan, const Json& cell,
                                      const std::function<void()>& check) {
  TrainOptions options;
  options.cell = cell.at("train_id").get<std::string>();
  options.model_hash = cell.at("model").get<std::string>();
  options.progress = [&](int64_t, int64_t) { check(); };
  return train_codec_set(plan, rows.scope().shape, rows, options);
}

Json role_rows(const std::vector<Measurement>& measurements, const char* role) {
  Json out = Json::array();
  for (const auto& m : measurements) {
    Json j = to_json(m);
    j["role"] = role;
    out.push_back(std::move(j));
  }
  return out;
}

void append(Json& to, const Json& from) {
  for (const auto& x : from) to.push_back(x);
}

Json time_row(const std::string& tag, double seconds) {
  Measurement m;
  m.tag = tag;
  m.value = seconds;
  m.unit = "s";
  m.n = 1;
  const std::string step = tag.substr(tag.find('.') + 1);
  Json row = to_json(titled(std::move(m), step + " s", step == "train" ? Shown::kValue : Shown::kNowhere));
  row["role"] = "time";
  return row;
}

std::string kept_codec_path(const std::string& folder, const std::string& train_id) {
  return (std::filesystem::path(folder) / "codecs" / (train_id.substr(0, 16) + ".codec.h5")).string();
}

// What an earlier run kept, or null.
std::shared_ptr<const CodecSet> load_kept(const std::string& folder, const std::string& train_id) {
  const std::string path = kept_codec_path(folder, train_id);
  if (folder.empty() || !std::filesystem::exists(path)) return nullptr;
  try {
    Json facts;
    auto set = std::make_shared<const CodecSet>(load_codec_set(path, &facts));
    if (facts.value("train_id", std::string()) != train_id)
      fail_data(fmt::format("{}: holds codecs of another configuration", path));
    return set;
  } catch (const Error& e) {
    throw Error(e.kind(), fmt::format("{}; without this file they are trained anew", e.what()));
  }
}

// Measures one cell. `check` throws Stopped.
Json measure_cell(const Json& cell, const TraceReader& reader, Trained& trained, const RunOptions& options,
                  const std::function<void()>& check) {
  const CellConfig config = config_of(cell);
  const TraceRows rows(reader, config);
  Json r = {{"status", "ok"}};
  const CodecPlan plan = plan_in_scope(resolve_codec(config.codec, reader.info().shape), rows.scope());
  if (!plan.skip.empty()) return {{"status", "skipped"}, {"reason", plan.skip}};
  if (config.curve)
    if (const CodecPlan curve = curve_plan(config, reader.info().shape); !curve.skip.empty())
      return {{"status", "skipped"}, {"reason", curve.skip}};
  if (rows.tokens(true) == 0) return {{"status", "failed"}, {"reason", "the report documents hold no token"}};

  const std::string train_id = cell.at("train_id").get<std::string>();
  const auto shared = trained.get(train_id, check, [&] {
    if (auto kept = load_kept(options.folder, train_id)) return kept;
    if (!options.keep_codecs) return train(rows, plan, cell, check);
    // Another shard that trains the same ends first; its codecs are ours then.
    const std::string path = kept_codec_path(options.folder, train_id);
    const FileLock lock(path + ".lock", check);
    if (auto kept = load_kept(options.folder, train_id)) return kept;
    auto made = train(rows, plan, cell, check);
    save_codec_set(*made, path, {{"train_id", train_id}});
    return made;
  });
  const std::shared_ptr<const CodecSet> codecs = fit_to_plan(shared, plan);
  const FidelityResult f = measure_fidelity(rows, *codecs, [&](int) { check(); });

  if (f.report.empty())
    return {{"status", "skipped"},
            {"reason",
             fmt::format("of its metrics ({}) none says anything of this codec", fmt::join(config.metrics, ", "))}};

  Json measurements = Json::array();
  append(measurements, role_rows(f.report, "report"));
  append(measurements, role_rows(f.select, "select"));
  append(measurements, cost_measurements(*codecs, config, rows.policy(), f.extras));
  double train_seconds = 0;
  int64_t vectors = 0, iterations = 0, units = 0;
  std::set<const Codec*> seen;
  for (const TrainedUnit& u : codecs->units()) {
    if (!seen.insert(u.codec.get()).second) continue;
    train_seconds += u.report.seconds;
    vectors += u.report.vectors;
    iterations = std::max(iterations, u.report.iterations);
    units += u.report.vectors > 0;
  }
  append(measurements,
         Json::array({time_row("time.train", train_seconds), time_row("time.encode", f.encode_seconds),
                      time_row("time.decode", f.decode_seconds), time_row("time.measure", f.measure_seconds)}));
  r["measurements"] = std::move(measurements);
  r["ledger"] = cost_ledgers(*codecs, config, rows.policy(), f.extras);
  r["train"] = {{"units", units}, {"vectors", vectors}, {"iterations", iterations}, {"tokens", rows.train_rows()}};
  r["coverage"] = {{"layers", rows.scope().layers},        {"heads", rows.scope().heads},
                   {"report_tokens", rows.tokens(true)},   {"select_tokens", rows.tokens(false)},
                   {"report_queries", rows.queries(true)}, {"coded_values", f.coded_values},
                   {"coded_share_k", f.coded_share_k},     {"coded_share_v", f.coded_share_v}};
  r["path"] = {{"encode", "cpu " + cpu_arithmetic()}, {"decode", "reference"}, {"attend", "reference"}};
  Json flags = Json::array();
  if (units > 0 && rows.extrapolated()) flags.push_back("extrapolated");
  if (!rows.codes_nothing(codecs.get()).empty()) flags.push_back("nothing-coded");
  if (off_label(*codecs, config.policy())) flags.push_back("off-label");
  if (quantizes_queries(*codecs, config.policy())) flags.push_back("quantized-query");
  if (rows.scope().subsampled) flags.push_back("subsampled");
  if (options.trust_trace) flags.push_back("trusted-trace");
  if (config.curve) {
    const auto trained_on = [&](const TraceRows& of, const CodecPlan& efforts) {
      return train(of, efforts, cell, check);
    };
    const Json curve = training_curve(reader, config, *codecs, trained_on, check);
    r["train"]["curve"] = curve;
    if (undertrained(curve)) flags.push_back("undertrained");
  }
  r["flags"] = std::move(flags);
  return r;
}

Json provenance(const RunOptions& options, const std::string& start) {
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  return {{"tool", version_facts()},
          {"command", options.command},
          {"host", host},
          {"cpu", cpu_model_name()},
          {"threads", thread_count()},
          {"jobs", options.jobs},
          {"shard", fmt::format("{}/{}", options.shard, options.shards)},
          {"writer", options.writer},
          {"start", start},
          {"end", utc_now()},
          {"peak_rss_bytes", peak_rss_bytes()}};
}

int environment_number(const char* name) {
  const char* text = std::getenv(name);
  if (!text || !*text) return -1;
  char* end = nullptr;
  const long v = std::strtol(text, &end, 10);
  return *end == '\0' && v >= 0 && v < 10'000'000 ? static_cast<int>(v) : -1;
}

// How a record says why its cell failed. Of a trace that is gone meanwhile the exception goes on: no fault of the cell.
Json failed(const Json& cell, const std::exception& e) {
  const auto* error = dynamic_cast<const Error*>(&e);
  if (error && error->kind() == ErrorKind::kBadData && !std::filesystem::exists(trace_path(cell))) throw;
  const bool memory = dynamic_cast<const std::bad_alloc*>(&e) != nullptr;
  return {{"status", "failed"},
          {"reason", memory ? "out of memory" : e.what()},
          {"kind", static_cast<int>(error ? error->kind() : ErrorKind::kInternal)}};
}

}  // namespace

std::string axes_text(const Json& cell) {
  std::string out;
  for (const char* part : {"axes", "repeat"})
    for (const auto& [path, value] : cell.at(part).items())
      out += fmt::format(" {}={}", path, value.is_string() ? value.get<std::string>() : value.dump());
  return out;
}

Json comparable(Json record) {
  for (const char* key : {"prov", "attempt"}) record.erase(key);
  if (record.contains("measurements")) {
    Json kept = Json::array();
    for (const auto& m : record["measurements"])
      if (m.value("role", "") != "time") kept.push_back(m);
    record["measurements"] = std::move(kept);
  }
  return record;
}

std::shared_ptr<const CodecSet> codecs_of_cell(const Json& cell, const std::function<bool()>& stop,
                                               const std::string& folder) {
  const CellConfig config = config_of(cell);
  if (auto kept = load_kept(folder, cell.at("train_id").get<std::string>()))
    return fit_to_plan(kept, resolve_codec(config.codec, kept->shape()));
  Traces traces(false);
  const auto reader = traces.open(cell);
  const TraceRows rows(*reader, config);
  const CodecPlan plan = plan_in_scope(resolve_codec(config.codec, reader->info().shape), rows.scope());
  if (!plan.skip.empty())
    fail_usage(fmt::format("cell {} can't be built: {}", cell.at("id").get<std::string>(), plan.skip));
  try {
    return train(rows, plan, cell, [&] {
      if (stop && stop()) throw Stopped();
    });
  } catch (const Stopped&) { return nullptr; }
}

std::string run_first_layer(const Json& cell, const TraceReader& reader, const std::function<bool()>& stop) {
  CellConfig config = config_of(cell);
  config.layers = {config.layers.empty() ? 0 : config.layers[0]};
  const TraceRows rows(reader, config);
  const CodecPlan plan = plan_in_scope(resolve_codec(config.codec, reader.info().shape), rows.scope());
  const auto check = [&] {
    if (stop && stop()) throw Stopped();
  };
  try {
    if (plan.skip.empty()) measure_fidelity(rows, *train(rows, plan, cell, check), [&](int) { check(); });
  } catch (const Stopped&) {
  } catch (const std::exception& e) { return failed(cell, e).at("reason").get<std::string>(); }
  return "";
}

RunSummary run_plan(const Plan& plan, const RunOptions& options) {
  namespace fs = std::filesystem;
  VQKV_CHECK(options.shards >= 1 && options.shard >= 0 && options.shard < options.shards && options.jobs >= 1);
  require_versions(plan);
  open_store(options.folder, plan);
  RecordWriter writer((fs::path(options.folder) / "results" / (options.writer + ".jsonl")).string());
  const ResultSet before = load_results(options.folder, plan, Records::kStatus);
  for (const auto& p : before.problems) log_warning(p);

  RunSummary summary;
  std::vector<size_t> todo;
  for (size_t i = 0; i < plan.cells.size(); ++i) {
    if (static_cast<int>(i % static_cast<size_t>(options.shards)) != options.shard) continue;
    const std::string status = before.cells[i].status();
    if (status == "ok" || status == "skipped" || (status == "failed" && !options.retry_failed))
      ++summary.before;
    else
      todo.push_back(i);
  }
  // Cells that share a training follow each other, in the order of the first.
  std::map<std::string, size_t> first;
  for (const size_t i : todo) first.emplace(plan.cells[i].at("train_id").get<std::string>(), i);
  std::stable_sort(todo.begin(), todo.end(), [&](size_t a, size_t b) {
    return first.at(plan.cells[a].at("train_id").get<std::string>()) <
           first.at(plan.cells[b].at("train_id").get<std::string>());
  });
  const Stopwatch clock;
  Traces traces(options.trust_trace);
  for (const size_t i : todo)  // a trace that is gone or was edited is no fault of its cells: nothing is recorded
    if (!plan.cells[i].contains("skip")) traces.reader(trace_path(plan.cells[i]));
  Trained trained(std::max(kTrainingsKept, static_cast<size_t>(options.jobs)));
  std::mutex mutex;  // writer, summary, progress
  std::atomic<size_t> next{0};
  std::atomic<bool> ended{false};
  Progress progress("cells", static_cast<int64_t>(todo.size()));
  const auto stopped = [&] { return options.stop && options.stop(); };
  const auto check = [&] {
    if (stopped()) throw Stopped();
  };

  const auto run_one = [&](size_t index) {
    const Json& cell = plan.cells[index];
    const std::string start = utc_now();
    Json r;
    try {
      if (cell.contains("skip"))
        r = {{"status", "skipped"}, {"reason", cell.at("skip")}};
      else
        r = measure_cell(cell, *traces.open(cell), trained, options, check);
    } catch (const Stopped&) { return; } catch (const std::exception& e) {
      r = failed(cell, e);
    }
    r["schema"] = 1;
    for (const char* key :
         {"cell", "id", "index", "config", "axes", "repeat", "group", "train_id", "trace", "model", "versions"})
      r[key] = cell.at(key);
    r["plan"] = plan.hash();
    r["attempt"] =
        before.cells[index].record.is_null() ? int64_t{1} : before.cells[index].record.value("attempt", int64_t{0}) + 1;
    r["prov"] = provenance(options, start);
    const std::string status = r.at("status").get<std::string>();
    const std::lock_guard lock(mutex);
    writer.append(r);
    (status == "ok" ? summary.ok : status == "skipped" ? summary.skipped : summary.failed) += 1;
    if (status == "failed") {
      log_warning(fmt::format("cell {} failed{}: {}", cell.at("id").get<std::string>(), axes_text(cell),
                              r.at("reason").get<std::string>()));
      if (options.fail_fast) ended = true;
    }
    for (const auto& f : r.value("flags", Json::array())) {
      const char* what = f == "extrapolated"    ? "positions beyond those trained on"
                         : f == "nothing-coded" ? "no query saw a coded token, its numbers are the exact cache's"
                         : f == "off-label"     ? "its paper codes image tokens alone, and text is coded"
                                                : nullptr;
      if (what)
        log_warning(
            fmt::format("cell {}: {}; its row says {}", cell.at("id").get<std::string>(), what, f.get<std::string>()));
    }
    progress.update(summary.ok + summary.skipped + summary.failed, cell.at("id").get<std::string>() + axes_text(cell));
  };
  const auto lane = [&](int64_t) {
    while (!ended && !stopped()) {
      if (options.time_budget > 0 && clock.seconds() > options.time_budget) {
        const std::lock_guard lock(mutex);
        summary.out_of_time = next < todo.size();
        return;
      }
      const size_t i = next.fetch_add(1);
      if (i >= todo.size()) return;
      run_one(todo[i]);
    }
  };
  // One thread budget: a cell alone spreads over all threads, cells side by side keep to one each.
  if (options.jobs == 1)
    lane(0);
  else
    parallel_for(options.jobs, lane);
  summary.left = static_cast<int64_t>(todo.size()) - summary.ok - summary.failed - summary.skipped;
  return summary;
}

void parse_shard(const std::string& text, int& shard, int& shards) {
  if (text == "auto") {
    struct Source {
      const char *rank, *size, *first;
    };
    for (const Source& s :
         {Source{"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"},
          Source{"SLURM_PROCID", "SLURM_NTASKS", nullptr},
          Source{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", nullptr}, Source{"PMI_RANK", "PMI_SIZE", nullptr}}) {
      const int rank = environment_number(s.rank), size = environment_number(s.size);
      if (rank < 0 || size < 1) continue;
      const int first = s.first ? std::max(0, environment_number(s.first)) : 0;
      if (rank - first < 0 || rank - first >= size)
        fail_usage(
            fmt::format("--shard auto: {}={} lies outside {}={} counted from {}; give the array consecutive numbers",
                        s.rank, rank, s.size, size, first));
      shard = rank - first;
      shards = size;
      return;
    }
    fail_usage(
        "--shard auto: none of SLURM_ARRAY_TASK_ID, SLURM_PROCID, OMPI_COMM_WORLD_RANK, PMI_RANK is set with its "
        "count; write --shard i/n");
  }
  int consumed = 0;
  if (std::sscanf(text.c_str(), "%d/%d%n", &shard, &shards, &consumed) != 2 ||
      consumed != static_cast<int>(text.size()) || shards < 1 || shard < 0 || shard >= shards || shards > 1'000'000)
    fail_usage(fmt::format("--shard {}: write i/n with 0 <= i < n, or auto", text));
}

}  // namespace vqkv
