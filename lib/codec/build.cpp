#include "codec/build.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <mutex>

#include "codec/transform/transform.h"
#include "core/error.h"
#include "core/json.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

// Units that end in one codec.
struct Job {
  std::vector<size_t> members;  // indices of plan.units, in order
  std::string stream;           // of the random numbers
};

std::vector<Job> jobs_of(const CodecPlan& plan) {
  std::vector<Job> jobs;
  std::map<std::string, size_t> shared;
  for (size_t i = 0; i < plan.units.size(); ++i) {
    const UnitSpec& s = plan.units[i];
    if (s.level > 0) continue;
    const bool alone = s.share == "none";
    const std::string layer = s.share == "layers" ? "all" : std::to_string(s.unit.layer);
    const std::string head = alone ? std::to_string(s.unit.first_head) : "all";
    const std::string tier = s.tier > 0 ? fmt::format("tier {}/", s.tier) : "";
    const std::string stream = fmt::format("{}{}/{}/{}", tier, layer, head, role_name(s.unit.role));
    // Overrides may split a group: only units with equal configurations share.
    const std::string key = fmt::format("{}/{}/{}/{}/{}/{}", stream, s.unit.heads, s.unit.rope == RopePlacement::kPre,
                                        s.method, canonical_json(s.knobs), canonical_json(s.transforms));
    const auto [it, fresh] = shared.emplace(key, jobs.size());
    if (fresh) jobs.push_back({{}, stream});
    jobs[it->second].members.push_back(i);
  }
  return jobs;
}

// Rows r of `from` for which keep(r), appended.
template <class Keep>
void append_rows(Matrix<float>& to, const Matrix<float>& from, Keep keep) {
  if (from.rows == 0) return;
  VQKV_CHECK(to.rows == 0 || to.cols == from.cols);
  to.cols = from.cols;
  for (int64_t r = 0; r < from.rows; ++r) {
    if (!keep(r)) continue;
    to.storage.insert(to.storage.end(), from.row(r), from.row(r) + from.cols);
    ++to.rows;
  }
}
template <class T, class Keep>
void append_values(std::vector<T>& to, const std::vector<T>& from, Keep keep) {
  for (size_t r = 0; r < from.size(); ++r)
    if (keep(static_cast<int64_t>(r))) to.push_back(from[r]);
}

void add_unit(TrainData& pool, const TrainData& part, int64_t most) {
  // Even thinning: row r is kept where the running share of kept rows steps.
  const int64_t n = part.x.rows;
  const auto thin = [&](int64_t r) { return n <= most || (r + 1) * most / n != r * most / n; };
  const auto all = [](int64_t) { return true; };
  append_rows(pool.x, part.x, thin);
  append_rows(pool.other_role, part.other_role, thin);
  append_rows(pool.squared_gradient, part.squared_gradient, thin);
  append_rows(pool.lower, part.lower, thin);
  append_values(pool.position, part.position, thin);
  append_values(pool.document, part.document, thin);
  append_values(pool.weight, part.weight, thin);
  append_values(pool.received_mass, part.received_mass, thin);
  append_values(pool.received_mass2, part.received_mass2, thin);
  append_rows(pool.queries, part.queries, all);
  // The error through W_O adds up over units: their slices are stacked.
  append_rows(pool.output_weight, part.output_weight, all);
  if (pool.query_moment.rows == 0)
    pool.query_moment = part.query_moment;
  else
    for (size_t i = 0; i < pool.query_moment.storage.size(); ++i)
      pool.query_moment.storage[i] += part.query_moment.storage[i];
  if (pool.query_pair_moment.empty())
    pool.query_pair_moment = part.query_pair_moment;
  else
    for (size_t i = 0; i < pool.query_pair_moment.size(); ++i) pool.query_pair_moment[i] += part.query_pair_moment[i];
}

void check_data(const TrainData& d, const UnitShape& unit) {
  const auto rows = static_cast<size_t>(d.x.rows);
  VQKV_CHECK(d.x.rows == 0 || d.x.cols == unit.channels());
  VQKV_CHECK(d.position.size() == rows && d.document.size() == rows);
  VQKV_CHECK(d.weight.empty() || d.weight.size() == rows);
  VQKV_CHECK(d.received_mass.empty() || d.received_mass.size() == rows);
  VQKV_CHECK(d.received_mass2.empty() || d.received_mass2.size() == rows);
  VQKV_CHECK(d.other_role.rows == 0 || d.other_role.rows == d.x.rows);
  for (const auto* m : {&d.squared_gradient, &d.lower})
    VQKV_CHECK(m->rows == 0 || (m->rows == d.x.rows && m->cols == d.x.cols));
  if (rows == 0) fail_data("the train documents hold no token to learn from");
  for (const auto* m : {&d.x, &d.squared_gradient, &d.lower, &d.queries, &d.query_moment, &d.output_weight})
    for (const float v : m->storage)
      if (!std::isfinite(v)) fail_data("the training data hold a value that is not finite");
}

TrainData read_unit(const TrainSource& source, const UnitShape& unit, const TrainNeeds& needs) {
  TrainData data = source.unit(unit, needs);
  if (needs.lower && unit.layer == 0) data.lower = Matrix<float>(data.x.rows, data.x.cols);
  if (needs.lower && unit.layer > 0) {
    UnitShape below = unit;
    --below.layer;
    data.lower = source.unit(below, {.rows = true}).x;
  }
  check_data(data, unit);
  return data;
}

TrainedUnit train_job(const CodecPlan& plan, const Job& job, const TrainSource& source, const Rng& rng) {
  const UnitSpec& spec = plan.units[job.members[0]];
  std::unique_ptr<Codec> codec = make_codec(spec);
  TrainedUnit out;
  out.spec = spec;
  const TrainNeeds needs = needs_of(spec);
  VQKV_CHECK(!codec->sees_lower() || needs.lower);  // who picks layers asks the method
  if (needs.rows) {
    TrainData data;
    if (job.members.size() == 1) {
      data = read_unit(source, spec.unit, needs);
    } else {
      for (const size_t i : job.members) {
        const TrainData part = read_unit(source, plan.units[i].unit, needs);
        add_unit(data, part, std::max<int64_t>(1, kPooledRows / static_cast<int64_t>(job.members.size())));
      }
    }
    out.report = codec->train(data.set(spec.unit), rng);
  }
  check_plan(codec->plan());
  out.codec = std::move(codec);
  return out;
}

}  // namespace

std::string TrainSource::place(const UnitShape& u) const {
  return fmt::format("layer {}, role {}, heads {}..{}", u.layer, role_name(u.role), u.first_head,
                     u.first_head + u.heads - 1);
}

TrainSet TrainData::set(const UnitShape& unit) const {
  TrainSet s;
  s.x = x;
  s.position = position;
  s.document = document;
  s.weight = weight;
  s.received_mass = received_mass;
  s.received_mass2 = received_mass2;
  s.queries = queries;
  s.query_moment = query_moment;
  s.query_pair_moment = query_pair_moment;
  s.output_weight = output_weight;
  s.other_role = other_role;
  s.squared_gradient = squared_gradient;
  s.lower = lower;
  s.head_dim = unit.head_dim;
  s.heads = unit.heads;
  return s;
}

TrainNeeds needs_of(const UnitSpec& spec) {
  TrainNeeds out = find_method(spec.method).needs(spec.knobs);
  for (Json t : spec.transforms) {
    const TransformKind& kind = find_transform(t.at("name").get<std::string>());
    t.erase("name");
    out |= kind.needs(t);
  }
  return out;
}

TrainMemory memory_of(const UnitSpec& spec, int64_t rows) {
  const TrainNeeds needs = needs_of(spec);
  if (!needs.rows) return {};
  ChainShape behind;
  check_chain(spec.transforms, spec.unit, &behind);
  TrainMemory out = find_method(spec.method).memory(spec.knobs, behind.unit, rows);
  // A transform's rows stand beside those before it, and the method's beside the last ones.
  const double copy = static_cast<double>(rows) * spec.unit.channels() * sizeof(float);
  const size_t transforms = spec.transforms.size();
  if (transforms > 0) out.scratch = copy + std::max(out.scratch, transforms > 1 ? copy : 0);
  return out;
}

std::vector<std::vector<size_t>> units_by_codec(const CodecPlan& plan) {
  std::vector<std::vector<size_t>> out;
  for (const Job& job : jobs_of(plan)) out.push_back(job.members);
  return out;
}

std::shared_ptr<const CodecSet> train_codec_set(const CodecPlan& plan, const CacheShape& shape,
                                                const TrainSource& source, const TrainOptions& options) {
  if (!plan.skip.empty()) fail_usage(plan.skip);
  const std::vector<Job> jobs = jobs_of(plan);
  const auto total = static_cast<int64_t>(jobs.size());
  std::vector<TrainedUnit> trained(jobs.size());
  std::mutex mutex;
  int64_t done = 0;
  std::atomic<bool> stop = false;
  const auto run = [&](int64_t j) {
    if (stop) return;
    const Job& job = jobs[static_cast<size_t>(j)];
    const UnitSpec& spec = plan.units[job.members[0]];
    try {
      trained[static_cast<size_t>(j)] = train_job(plan, job, source, Rng::from_text(options.cell + "/" + job.stream));
      const std::lock_guard lock(mutex);
      ++done;
      if (options.progress) options.progress(done, total);
    } catch (const Error& e) {
      stop = true;
      throw Error(e.kind(), fmt::format("{}: {}: {}", source.place(spec.unit), spec.method, e.what()));
    } catch (...) {
      stop = true;
      throw;
    }
  };
  // Fewer codecs than threads: one after the other, and each trains on all threads.
  if (total >= thread_count())
    parallel_for(total, run);
  else
    for (int64_t j = 0; j < total; ++j) run(j);

  std::vector<TrainedUnit> units(plan.units.size());
  for (size_t j = 0; j < jobs.size(); ++j)
    for (const size_t i : jobs[j].members) units[i] = trained[j];
  for (size_t i = 0; i < units.size(); ++i) units[i].spec = plan.units[i];
  set_levels(units);
  return std::make_shared<CodecSet>(shape, plan.config, std::move(units), options.model_hash, plan.tiers);
}

}  // namespace vqkv
