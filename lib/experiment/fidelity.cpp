#include "experiment/fidelity.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <mutex>

#include "cache/keep_rule.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "experiment/tier_rows.h"

namespace vqkv {
namespace {

struct Layer {
  int windows = 0, heads = 0;
  std::vector<HeadRows> rows;     // (windows, heads)
  std::vector<CodeBlock> blocks;  // (windows, units of the layer)
  HeadRows& at(int w, int h) { return rows[static_cast<size_t>(w * heads + h)]; }
  std::span<HeadRows> window(int w) { return {&at(w, 0), static_cast<size_t>(heads)}; }
};

struct MetricSet {
  std::vector<std::unique_ptr<Metric>> metrics;
  MetricSet(const std::vector<std::string>& names, bool dropped) {
    for (const auto& n : names)
      if (const MetricKind& kind = find_metric(n); !dropped || kind.describe().of_dropped)
        metrics.push_back(kind.make());
  }
  std::vector<Measurement> finish() {
    std::vector<Measurement> out;
    for (auto& m : metrics)
      for (auto& x : m->finish()) {
        require_measured(x);
        out.push_back(std::move(x));
      }
    return out;
  }

 private:
  // NaN says that nothing was measured, and then n is 0; what was measured is a number.
  static void require_measured(const Measurement& m) {
    bool good = std::isfinite(m.value) || (std::isnan(m.value) && m.n == 0);
    good = good && std::isfinite(m.stderr_);
    for (const double x : m.per_document) good = good && std::isfinite(x);
    if (!good) fail_data(fmt::format("{} is {} with an error of {}", m.tag, m.value, m.stderr_));
  }
};

// Queries of one window that are measured together.
struct Tile {
  size_t window = 0;
  int64_t first = 0, queries = 0;
  bool opens = false;  // the window's rows and codes count with it
};

// Whether two queries of a window see the same older tiers.
using SameTiers = std::function<bool(size_t window, int64_t a, int64_t b)>;

// All queries of all windows in order, in batches whose attention rows are in memory at once.
// With several tiers a tile's queries see the same ones, and a window's rows are those at its end, in a tile without
// queries.
std::vector<std::vector<Tile>> batches_of(const std::vector<EvalWindow>& windows, int group, const ScoreLimits& limits,
                                          const SameTiers& same = {}) {
  std::vector<std::vector<Tile>> batches;
  int64_t held = 0;
  for (size_t w = 0; w < windows.size(); ++w) {
    const int64_t all = static_cast<int64_t>(windows[w].query_row.size());
    const int64_t scores = group * windows[w].window.tokens,
                  step = std::max<int64_t>(1, limits.tile / std::max<int64_t>(1, scores));
    int64_t first = 0;
    bool opens = true;
    while (opens || first < all) {  // a window without queries has rows to compare
      Tile tile{w, first, std::min(step, all - first), opens};
      if (same && opens) tile.queries = 0;
      for (int64_t q = 1; same && q < tile.queries; ++q)
        if (!same(w, first, first + q)) tile.queries = q;
      opens = false;
      if (batches.empty() || held + tile.queries * scores > limits.held) {
        batches.emplace_back();
        held = 0;
      }
      batches.back().push_back(tile);
      held += tile.queries * scores;
      first += tile.queries;
    }
  }
  return batches;
}

FidelitySample sample_of(const TraceRows& rows, const CodecSet* codecs, int l, int h, const Tile& tile,
                         const HeadRows& r, const Matrix<float>& queries, ConstMatrix w_o,
                         std::array<Matrix<float>, 2>& aged) {
  const EvalWindow& w = rows.windows()[tile.window];
  CachePolicy policy = rows.policy(w);
  if (codecs) policy = policy.for_codecs(*codecs);
  FidelitySample s;
  const int64_t sinks = std::min(policy.sinks, w.window.tokens);
  s.layer = rows.scope().layers[static_cast<size_t>(l)];
  s.kv_head = rows.scope().heads[static_cast<size_t>(h)];
  s.document = w.window.document;
  s.k = r.k;
  s.k_hat = r.k_hat;
  s.v = r.v;
  s.v_hat = r.v_hat;
  if (!r.older_k.empty())
    for (const Role role : {Role::kKey, Role::kValue}) {
      const bool key = role == Role::kKey;
      const std::vector<int64_t> ends =
          tile.queries > 0 ? older_ends(*codecs, policy, role, w.query_position[static_cast<size_t>(tile.first)])
                           : older_ends_among(*codecs, policy, role, w.window.tokens);
      Matrix<float>& rows_then = aged[static_cast<size_t>(role)];
      rows_then = rows_by_age(key ? r.k_hat : r.v_hat, key ? r.older_k : r.older_v, ends, sinks);
      (key ? s.k_hat : s.v_hat) = rows_then;
    }
  s.group = rows.scope().shape.group();
  s.q = queries.view().slice_rows(tile.first * s.group, tile.queries * s.group);
  const auto first = w.query_position.begin() + tile.first;
  s.query_position.assign(first, first + tile.queries);
  s.sinks = sinks;
  s.dropped = policy.drops;
  s.score = r.score;
  s.query = r.query;
  for (const int64_t p : s.query_position) {
    s.coded_end_k.push_back(std::min({policy.coded_end(Role::kKey, p), p + 1, r.coded_k}));
    s.coded_end_v.push_back(std::min({policy.coded_end(Role::kValue, p), p + 1, r.coded_v}));
  }
  s.score_scale = rows.scope().shape.score_scale;
  s.w_o = w_o;
  // Rows and codes are those of the window: they count once. Codes are those of the newest tier, which all tokens pass.
  const bool opens = tile.opens;
  s.coded_last_k = opens ? r.coded_k : s.sinks;
  s.coded_last_v = opens ? r.coded_v : s.sinks;
  const auto layout = [&](Role role) {
    return &codecs->units()[static_cast<size_t>(codecs->unit_index(l, h, role))].codec->layout();
  };
  if (codecs && opens && r.key_block) {
    s.key_codes = &r.key_block->fields;
    s.key_layout = layout(Role::kKey);
  }
  if (codecs && opens && r.value_block) {
    s.value_codes = &r.value_block->fields;
    s.value_layout = layout(Role::kValue);
  }
  return s;
}

using FillLayer = std::function<CodingTotals(int layer, Layer& data)>;

FidelityResult measure(const TraceRows& rows, const CodecSet* codecs, const FillLayer& fill,
                       const std::function<void(int)>& progress, const ScoreLimits& limits) {
  const CachePolicy policy = rows.config().policy();
  if (const std::string reason = not_swept(policy); !reason.empty()) fail_usage(reason);
  const auto& windows = rows.windows();
  const CacheShape& shape = rows.scope().shape;
  MetricSet sets[2] = {MetricSet(rows.config().metrics, policy.drops), MetricSet(rows.config().metrics, policy.drops)};
  SameTiers same;
  if (codecs && codecs->tiers() > 1 && policy.keeps_codes())
    same = [&](size_t w, int64_t a, int64_t b) {
      const std::vector<int64_t>& at = windows[w].query_position;
      return std::ranges::all_of(std::array{Role::kKey, Role::kValue}, [&](Role role) {
        return older_ends(*codecs, policy, role, at[static_cast<size_t>(a)]) ==
               older_ends(*codecs, policy, role, at[static_cast<size_t>(b)]);
      });
    };
  const std::vector<std::vector<Tile>> batches = batches_of(windows, shape.group(), limits, same);
  std::vector<std::shared_ptr<AttentionRows>> rooms;  // of a batch; the next takes what fits
  FidelityResult out;
  double attended = 0, coded_k = 0, coded_v = 0;
  for (int l = 0; l < shape.layers; ++l) {
    progress(l);
    Layer layer;
    layer.windows = static_cast<int>(windows.size());
    layer.heads = shape.kv_heads;
    layer.rows.resize(windows.size() * static_cast<size_t>(shape.kv_heads));
    parallel_for(static_cast<int64_t>(layer.rows.size()), [&](int64_t i) {
      const int w = static_cast<int>(i) / layer.heads, h = static_cast<int>(i) % layer.heads;
      const RopePlacement held = codecs ? held_rope(*codecs, l, h) : RopePlacement::kPost;
      layer.at(w, h) = exact_rows(rows, l, h, windows[static_cast<size_t>(w)], held);
    });
    const CodingTotals t = fill(l, layer);
    out.encode_seconds += t.encode;
    out.decode_seconds += t.decode;
    out.coded_values += t.values;

    const Stopwatch watch;
    // Tiles side by side, heads in turn: a sample's attention rows are computed once for all metrics, so at most one
    // batch of one head's is in memory; metrics of one kind of document see them in a fixed order.
    for (int h = 0; h < shape.kv_heads; ++h) {
      const Matrix<float> w_o = rows.output_weight(l, h, 1);
      std::vector<Matrix<float>> queries(windows.size());
      parallel_for(static_cast<int64_t>(windows.size()), [&](int64_t i) {
        queries[static_cast<size_t>(i)] = rows.queries(l, h, windows[static_cast<size_t>(i)]);
      });
      for (const std::vector<Tile>& batch : batches) {
        std::vector<FidelitySample> samples(batch.size());
        std::vector<std::array<Matrix<float>, 2>> aged(batch.size());  // rows of samples where tiers have several forms
        rooms.resize(batch.size());
        parallel_for(static_cast<int64_t>(batch.size()), [&](int64_t i) {
          const Tile& tile = batch[static_cast<size_t>(i)];
          FidelitySample& s = samples[static_cast<size_t>(i)];
          s = sample_of(rows, codecs, l, h, tile, layer.at(static_cast<int>(tile.window), h), queries[tile.window], w_o,
                        aged[static_cast<size_t>(i)]);
          std::shared_ptr<AttentionRows>& room = rooms[static_cast<size_t>(i)];
          if (!room) room = std::make_shared<AttentionRows>();
          s.build_rows(room);
        });
        const auto kinds = static_cast<int64_t>(sets[0].metrics.size());
        parallel_for(2 * kinds, [&](int64_t i) {
          const bool report = i >= kinds;
          Metric& m = *sets[report ? 1 : 0].metrics[static_cast<size_t>(i % kinds)];
          for (size_t b = 0; b < batch.size(); ++b)
            if (windows[batch[b].window].report == report) m.add(samples[b]);
        });
        for (size_t b = 0; b < batch.size(); ++b) {
          if (!windows[batch[b].window].report) continue;
          for (size_t q = 0; q < samples[b].query_position.size(); ++q) {
            attended += static_cast<double>(samples[b].query_position[q] + 1);
            coded_k += static_cast<double>(std::max<int64_t>(0, samples[b].coded_end_k[q] - samples[b].sinks));
            coded_v += static_cast<double>(std::max<int64_t>(0, samples[b].coded_end_v[q] - samples[b].sinks));
          }
        }
      }
    }
    out.measure_seconds += watch.seconds();
  }
  progress(shape.layers);
  out.select = rows.tokens(false) > 0 ? sets[0].finish() : std::vector<Measurement>();
  out.report = sets[1].finish();
  if (attended > 0) {
    out.coded_share_k = coded_k / attended;
    out.coded_share_v = coded_v / attended;
  }
  return out;
}

}  // namespace

std::string not_swept(const CachePolicy& policy) {
  if (!policy.keep) return "";
  return fmt::format(
      "cache.policy {} decides by what all queries attend to, and a trace holds some queries; `vqkv-eval replay` "
      "measures it",
      policy.keep->text());
}

int64_t ScoreLimits::peak(const std::vector<EvalWindow>& windows, int group) const {
  int64_t most = 0;
  for (const auto& batch : batches_of(windows, group, *this)) {
    int64_t held = 0;
    for (const Tile& t : batch) held += t.queries * group * windows[t.window].window.tokens;
    most = std::max(most, held);
  }
  return most;
}

FidelityResult measure_fidelity(const TraceRows& rows, const CodecSet& codecs, const std::function<void(int)>& progress,
                                const ScoreLimits& limits) {
  const auto& windows = rows.windows();
  std::vector<CodingTotals> by_unit(codecs.units().size());  // over the report windows
  // (units, windows): decoded rows that the layer above or the next tier sees, while it is coded
  const bool ages = codecs.tiers() > 1 && rows.config().policy().keeps_codes();
  std::vector<Matrix<float>> decoded(codecs.sees_lower() || ages ? codecs.units().size() * windows.size() : 0);
  std::vector<char> seen(codecs.units().size());
  for (size_t u = 0; u < seen.size(); ++u)
    if (codecs.lower_unit(u) >= 0) seen[static_cast<size_t>(codecs.lower_unit(u))] = true;
  const auto rows_of = [&](int unit, size_t w) { return &decoded[static_cast<size_t>(unit) * windows.size() + w]; };
  FidelityResult result = measure(
      rows, &codecs,
      [&](int l, Layer& layer) {
        std::vector<size_t> units;
        for (size_t u = 0; u < codecs.units().size(); ++u)
          if (codecs.units()[u].spec.unit.layer == l && (ages || codecs.units()[u].spec.tier == 0)) units.push_back(u);
        layer.blocks.resize(units.size() * windows.size());
        std::vector<CodingTotals> parts(layer.blocks.size());
        const auto block_of = [&](size_t unit, size_t w) -> CodeBlock& {
          const auto at = std::lower_bound(units.begin(), units.end(), unit) - units.begin();
          return layer.blocks[w * units.size() + static_cast<size_t>(at)];
        };
        // Tier by tier, since each codes what the one before holds.
        for (int tier = 0; tier < codecs.tiers(); ++tier)
          parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t i) {
            const size_t w = static_cast<size_t>(i) / units.size(), u = units[static_cast<size_t>(i) % units.size()];
            const TrainedUnit& unit = codecs.units()[u];
            if (unit.spec.tier != tier) return;
            CodeBlock& block = layer.blocks[static_cast<size_t>(i)];
            CodingTotals& part = parts[static_cast<size_t>(i)];
            const int lower = codecs.lower_unit(u);
            if (tier == 0)
              part = code_unit(rows, codecs, unit, windows[w], layer.window(static_cast<int>(w)), block,
                               lower < 0 ? ConstMatrix() : ConstMatrix(*rows_of(lower, w)),
                               seen[u] || ages ? rows_of(static_cast<int>(u), w) : nullptr);
            else
              part = code_older_unit(
                  rows, codecs, u, windows[w], layer.window(static_cast<int>(w)),
                  [&](size_t newer) {
                    return CodedUnit{&block_of(newer, w), rows_of(static_cast<int>(newer), w)};
                  },
                  block, *rows_of(static_cast<int>(u), w));
          });
        for (const size_t u : units)
          for (size_t w = 0; w < windows.size() && ages; ++w) *rows_of(static_cast<int>(u), w) = Matrix<float>();
        for (const size_t u : units)
          for (size_t w = 0; w < windows.size() && codecs.lower_unit(u) >= 0; ++w)
            *rows_of(codecs.lower_unit(u), w) = Matrix<float>();
        CodingTotals t;
        for (size_t i = 0; i < parts.size(); ++i) {
          t += parts[i];
          if (windows[i / units.size()].report) by_unit[units[i % units.size()]] += parts[i];
        }
        return t;
      },
      progress, limits);
  const double reported =
      static_cast<double>(std::count_if(windows.begin(), windows.end(), [](const EvalWindow& w) { return w.report; }));
  const auto mean = [&](int64_t sum) { return reported > 0 ? std::llround(static_cast<double>(sum) / reported) : 0; };
  for (const CodingTotals& t : by_unit)
    result.extras.push_back(
        {.exceptions = t.tokens > 0 ? static_cast<double>(t.exceptions) / static_cast<double>(t.tokens) : 0,
         .state_bytes = mean(t.state_bytes),
         .form_bytes = mean(t.form_bytes)});
  return result;
}

FidelityResult measure_fidelity(const TraceRows& rows, const DecodedSource& source,
                                const std::function<void(int)>& progress) {
  const auto& windows = rows.windows();
  return measure(rows, nullptr,
                 [&](int l, Layer& layer) {
                   parallel_for(static_cast<int64_t>(layer.rows.size()), [&](int64_t i) {
                     const int w = static_cast<int>(i) / layer.heads, h = static_cast<int>(i) % layer.heads;
                     const EvalWindow& window = windows[static_cast<size_t>(w)];
                     HeadRows& r = layer.at(w, h);
                     const CachePolicy policy = rows.policy(window);
                     const int64_t n = window.window.tokens, sinks = std::min(policy.sinks, n);
                     r.k_hat = Matrix<float>(n, r.k.cols);
                     r.v_hat = Matrix<float>(n, r.v.cols);
                     source.decoded(l, h, window, r.k_hat, r.v_hat);
                     rope_apply(rows.rope(), window.position.data(), r.k_hat);
                     r.coded_k = policy.coded_at_last(Role::kKey, n);
                     r.coded_v = policy.coded_at_last(Role::kValue, n);
                     const auto put_exact = [&](const Matrix<float>& x, int64_t coded_end, Matrix<float>& hat) {
                       std::copy_n(x.data(), sinks * x.cols, hat.data());
                       std::copy(x.row(coded_end), x.row(n), hat.row(coded_end));
                     };
                     put_exact(r.k, r.coded_k, r.k_hat);
                     put_exact(r.v, r.coded_v, r.v_hat);
                   });
                   CodingTotals t;
                   t.values = 2 * rows.tokens(true) * layer.heads * int64_t{rows.scope().shape.head_dim};
                   return t;
                 },
                 progress, {});
}

}  // namespace vqkv
