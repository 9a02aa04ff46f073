#include "experiment/trace_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "core/error.h"
#include "core/finite.h"
#include "experiment/protocol.h"

namespace vqkv {
namespace {

// `keep` of n indices, evenly spaced, the last one included; all of them for keep <= 0 or keep >= n.
std::vector<int64_t> evenly(int64_t n, int64_t keep) {
  std::vector<int64_t> out;
  if (keep <= 0 || keep >= n) {
    out.resize(static_cast<size_t>(n));
    std::iota(out.begin(), out.end(), int64_t{0});
    return out;
  }
  for (int64_t i = 0; i < keep; ++i) out.push_back((i + 1) * n / keep - 1);
  return out;
}

// A NaN must end a cell: metrics take a ratio that is not finite for one that was not measured, and leave it out of
// their means. `row` counts along the dataset's third axis.
void require_finite(const TraceReader& reader, const char* dataset, int layer, int head, int64_t first, ConstMatrix x) {
  for (int64_t r = 0; r < x.rows; ++r) {
    if (all_finite(x.row(r), x.cols)) continue;
    for (int64_t c = 0; c < x.cols; ++c)
      if (!std::isfinite(x(r, c)))
        fail_data(fmt::format("{}: {}: layer {}, head {}, row {}, channel {} is {}; values must be finite",
                              reader.path(), dataset, layer, head, first + r, c, x(r, c)));
  }
}

bool contains(const std::vector<int64_t>& v, int64_t x) { return std::binary_search(v.begin(), v.end(), x); }

std::vector<int> chosen(const std::vector<int64_t>& wanted, int n) {
  std::vector<int> out;
  if (wanted.empty()) {
    out.resize(static_cast<size_t>(n));
    std::iota(out.begin(), out.end(), 0);
  } else {
    for (const int64_t i : wanted) out.push_back(static_cast<int>(i));
  }
  return out;
}

// The image tokens of a window. kBadData: they are no run.
TokenRun image_run(const TraceReader& reader, const TraceWindow& w) {
  const std::vector<std::string>& types = reader.info().token_types;
  const auto image = std::ranges::find(types, "image") - types.begin();
  if (image == std::ssize(types)) return {};
  const auto of_window =
      std::span(reader.token_type()).subspan(static_cast<size_t>(w.first_token), static_cast<size_t>(w.tokens));
  const auto is_image = [&](int32_t type) { return type == image; };
  const auto begin = std::ranges::find_if(of_window, is_image);
  const auto end = std::find_if_not(begin, of_window.end(), is_image);
  if (const auto more = std::find_if(end, of_window.end(), is_image); more != of_window.end())
    fail_data(fmt::format(
        "{}: document {}: image tokens {} to {} of a window are followed by text and by another at {}; cache.coded: "
        "image codes one run a text",
        reader.path(), w.document, begin - of_window.begin(), end - of_window.begin() - 1, more - of_window.begin()));
  return {begin - of_window.begin(), end - of_window.begin()};
}

}  // namespace

Scope scope_of(const CellConfig& config, const CacheShape& full) {
  Scope s;
  s.layers = chosen(config.layers, full.layers);
  s.heads = chosen(config.heads, full.kv_heads);
  s.subsampled = static_cast<int>(s.layers.size()) != full.layers || static_cast<int>(s.heads.size()) != full.kv_heads;
  s.shape = full;
  s.shape.layers = static_cast<int>(s.layers.size());
  s.shape.kv_heads = static_cast<int>(s.heads.size());
  s.shape.q_heads = s.shape.kv_heads * full.group();
  return s;
}

CodecPlan plan_in_scope(const CodecPlan& plan, const Scope& scope) {
  if (!scope.subsampled || !plan.skip.empty()) return plan;
  CodecPlan out;
  out.config = plan.config;
  out.tiers = plan.tiers;
  for (const UnitSpec& unit : plan.units) {
    const auto layer = std::find(scope.layers.begin(), scope.layers.end(), unit.unit.layer);
    if (layer == scope.layers.end()) continue;
    const auto chosen = [&](int l) { return std::find(scope.layers.begin(), scope.layers.end(), l); };
    if (unit.unit.layer > 0 && needs_of(unit).lower && chosen(unit.unit.layer - 1) == scope.layers.end()) {
      out.skip = fmt::format("layers: codec '{}' in layer {} sees the rows of layer {}, which is not chosen",
                             unit.method, unit.unit.layer, unit.unit.layer - 1);
      return out;
    }
    std::vector<int> places;
    for (int h = unit.unit.first_head; h < unit.unit.first_head + unit.unit.heads; ++h) {
      const auto at = std::find(scope.heads.begin(), scope.heads.end(), h);
      if (at != scope.heads.end()) places.push_back(static_cast<int>(at - scope.heads.begin()));
    }
    if (places.empty()) continue;
    if (static_cast<int>(places.size()) != unit.unit.heads) {
      out.skip = fmt::format("heads: the chosen heads cut the unit of heads {} to {}", unit.unit.first_head,
                             unit.unit.first_head + unit.unit.heads - 1);
      return out;
    }
    UnitSpec spec = unit;
    spec.unit.layer = static_cast<int>(layer - scope.layers.begin());
    spec.unit.first_head = places[0];
    out.units.push_back(std::move(spec));
  }
  return out;
}

TraceRows::TraceRows(const TraceReader& reader, const CellConfig& config)
    : reader_(reader),
      config_(config),
      policy_(config.policy()),
      scope_(scope_of(config, reader.info().shape)),
      rope_(reader.info().shape.rope) {
  int32_t trained_to = -1, tested_to = -1;
  std::vector<std::pair<size_t, int64_t>> all;  // (train window, row)
  for (const TraceWindow& w : reader.windows()) {
    const auto first = reader.position().begin() + w.first_token;
    const bool report = contains(config_.report, w.document), select = contains(config_.select, w.document);
    if (contains(config_.train, w.document)) {
      train_windows_.push_back({w, {}});
      const TokenRun coded = policy_.codes_images ? image_run(reader, w) : TokenRun{policy_.sinks, w.tokens};
      for (int64_t i = coded.begin; i < coded.end; ++i) all.emplace_back(train_windows_.size() - 1, i);
    }
    if (!report && !select) continue;
    EvalWindow e;
    e.window = w;
    e.report = report;
    if (policy_.codes_images) e.images = image_run(reader, w);
    e.position.assign(first, first + w.tokens);
    for (const int64_t q : evenly(w.queries, config_.queries)) {
      e.query_row.push_back(w.first_query + q);
      e.query_position.push_back(reader.query_token()[static_cast<size_t>(w.first_query + q)] - w.first_token);
    }
    if (const int64_t end = policy_.codes_images ? e.images.end : w.tokens; end > 0)
      tested_to = std::max(tested_to, e.position[static_cast<size_t>(end - 1)]);  // they count up
    windows_.push_back(std::move(e));
  }
  for (const int64_t i : evenly(static_cast<int64_t>(all.size()), config_.train_tokens)) {
    const auto [window, row] = all[static_cast<size_t>(i)];
    TrainWindow& t = train_windows_[window];
    t.rows.push_back(row);
    train_.push_back(t.window.first_token + row);
    trained_to = std::max(trained_to, reader.position()[static_cast<size_t>(train_.back())]);
  }
  extrapolated_ = !train_.empty() && trained_to < tested_to;
}

int64_t TraceRows::tokens(bool report) const {
  int64_t n = 0;
  for (const auto& w : windows_) n += w.report == report ? w.window.tokens : 0;
  return n;
}

int64_t TraceRows::queries(bool report) const {
  int64_t n = 0;
  for (const auto& w : windows_) n += w.report == report ? static_cast<int64_t>(w.query_row.size()) : 0;
  return n;
}

CachePolicy TraceRows::policy() const {
  int64_t before = 0, images = 0, with_images = 0, windows = 0;
  for (const EvalWindow& w : windows_) {
    if (!w.report) continue;
    ++windows;
    images += w.images.tokens();
    before += w.images.tokens() > 0 ? w.images.begin : 0;
    with_images += w.images.tokens() > 0;
  }
  if (images == 0) return policy_;
  const int64_t begin = std::llround(static_cast<double>(before) / static_cast<double>(with_images));
  return policy_.of_text({begin, begin + std::llround(static_cast<double>(images) / static_cast<double>(windows))});
}

std::string TraceRows::codes_nothing(const CodecSet* codecs) const {
  const EvalWindow* longest = nullptr;
  std::string reason;
  for (const EvalWindow& w : windows_) {
    if (!w.report || (longest && w.window.tokens < longest->window.tokens && !policy_.codes_images)) continue;
    const CachePolicy own = codecs ? policy(w).for_codecs(*codecs) : policy(w);
    reason = vqkv::codes_nothing(own, w.window.tokens);
    if (reason.empty()) return "";
    longest = &w;
  }
  return policy_.codes_images ? "nothing is coded: no window of the report documents has the tokens of an image"
                              : reason;
}

Matrix<float> TraceRows::keys(int layer, int head, const EvalWindow& w) const {
  const CacheShape& s = reader_.info().shape;
  Matrix<float> k(w.window.tokens, s.head_dim);
  read_keys(layer, head, w.window, k);
  if (!reader_.info().keys_pre_rope) rope_apply(rope_, w.position.data(), k, true);
  return k;
}

Matrix<float> TraceRows::values(int layer, int head, const EvalWindow& w) const {
  Matrix<float> v(w.window.tokens, reader_.info().shape.head_dim);
  read_values(layer, head, w.window, v);
  return v;
}

void TraceRows::check_exact(Role role, int layer, int head, const EvalWindow& w, ConstMatrix x) const {
  for (int64_t r = 0; r < x.rows; ++r)
    policy_.check_exact(x.row(r), x.cols,
                        [&](int64_t channel) { return place(role, layer, head, w.window.first_token + r, channel); });
}

std::string TraceRows::place(Role role, int layer, int head, int64_t row, int64_t channel) const {
  return fmt::format("{}: {}: layer {}, head {}, row {}, channel {}", reader_.path(),
                     role == Role::kKey ? "/key" : "/value", scope_.layers.at(static_cast<size_t>(layer)),
                     scope_.heads.at(static_cast<size_t>(head)), row, channel);
}

void TraceRows::read_keys(int layer, int head, const TraceWindow& w, MutMatrix out) const {
  const int l = scope_.layers.at(static_cast<size_t>(layer)), h = scope_.heads.at(static_cast<size_t>(head));
  reader_.key(l, h, w.first_token, w.tokens, out);
  require_finite(reader_, "/key", l, h, w.first_token, out);
}

void TraceRows::read_values(int layer, int head, const TraceWindow& w, MutMatrix out) const {
  const int l = scope_.layers.at(static_cast<size_t>(layer)), h = scope_.heads.at(static_cast<size_t>(head));
  reader_.value(l, h, w.first_token, w.tokens, out);
  require_finite(reader_, "/value", l, h, w.first_token, out);
}

void TraceRows::read_queries(int layer, int q_head, int64_t first, int64_t count, MutMatrix out) const {
  const int l = scope_.layers.at(static_cast<size_t>(layer));
  reader_.query(l, q_head, first, count, out);
  require_finite(reader_, "/query", l, q_head, first, out);
}

Matrix<float> TraceRows::queries(int layer, int head, const EvalWindow& w) const {
  const CacheShape& s = reader_.info().shape;
  const int64_t n = static_cast<int64_t>(w.query_row.size()), d = s.head_dim, group = s.group();
  Matrix<float> out(n * group, d), one(w.window.queries, d);
  std::vector<int32_t> position;
  for (const int64_t p : w.query_position) position.push_back(w.position[static_cast<size_t>(p)]);
  for (int64_t g = 0; g < group; ++g) {
    const int q_head = static_cast<int>(scope_.heads.at(static_cast<size_t>(head)) * group + g);
    read_queries(layer, q_head, w.window.first_query, w.window.queries, one);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = w.query_row[static_cast<size_t>(i)] - w.window.first_query;
      std::copy_n(one.row(from), d, out.row(i * group + g));
      rope_apply(rope_, &position[static_cast<size_t>(i)], out.view().slice_rows(i * group + g, 1));
    }
  }
  return out;
}

void TraceRows::first_queries(int layer, int head, const EvalWindow& w, bool rotated, MutMatrix out) const {
  const int64_t group = reader_.info().shape.group(), n = out.rows / group;
  const auto recorded = reader_.query_token().begin() + w.window.first_query;
  int64_t there = 0;
  for (int64_t i = 0; i < w.window.queries; ++i) there += recorded[i] < w.window.first_token + n;
  if (there != n)
    fail_data(
        fmt::format("{}: document {}: a codec fits its parameters to the queries of a prompt's first {} tokens, and {} "
                    "of them are recorded; capture every query (vqkv-dump capture --query-stride 1)",
                    reader_.path(), w.window.document, n, there));
  Matrix<float> one(n, out.cols);
  for (int64_t g = 0; g < group; ++g) {
    const int q_head = static_cast<int>(scope_.heads.at(static_cast<size_t>(head)) * group + g);
    read_queries(layer, q_head, w.window.first_query, n, one);
    if (rotated) rope_apply(rope_, w.position.data(), one);
    for (int64_t t = 0; t < n; ++t) std::copy_n(one.row(t), out.cols, out.row(t * group + g));
  }
}

Matrix<float> TraceRows::output_weight(int layer, int first_head, int heads) const {
  if (!reader_.has_output_weight()) return {};
  const int64_t width = int64_t{reader_.info().shape.group()} * reader_.info().shape.head_dim;
  const int l = scope_.layers.at(static_cast<size_t>(layer));
  const Matrix<float> all = reader_.output_weight(l);
  Matrix<float> out(all.rows, heads * width);
  for (int h = 0; h < heads; ++h) {
    const int64_t from = scope_.heads.at(static_cast<size_t>(first_head + h)) * width;
    require_finite(reader_, "/output_weight", l, scope_.heads.at(static_cast<size_t>(first_head + h)), 0,
                   all.view().slice_cols(from, width));
    for (int64_t r = 0; r < all.rows; ++r) std::copy_n(all.row(r) + from, width, out.row(r) + h * width);
  }
  return out;
}

std::string TraceRows::place(const UnitShape& unit) const {
  UnitShape in_model = unit;
  in_model.layer = scope_.layers.at(static_cast<size_t>(unit.layer));
  in_model.first_head = scope_.heads.at(static_cast<size_t>(unit.first_head));
  return TrainSource::place(in_model);
}

TrainData TraceRows::unit(const UnitShape& unit, const TrainNeeds& needs) const {
  if (needs.gradients && !reader_.has_gradients())
    fail_data(fmt::format(
        "{}: holds no squared gradients, which a codec of this cell is weighted by (weight: fisher); capture "
        "them (vqkv-dump capture --gradients next-token), or take weight: none",
        reader_.path()));
  TrainData t;
  for (const int64_t row : train_) {
    t.position.push_back(reader_.position()[static_cast<size_t>(row)]);
    t.document.push_back(reader_.document_of()[static_cast<size_t>(row)]);
  }
  add_rows(unit, needs, t);
  if (needs.gradients) add_gradients(unit, t);
  if (needs.output_weight) t.output_weight = output_weight(unit.layer, unit.first_head, unit.heads);
  if (needs.queries) add_queries(unit, t);
  if (needs.moments && unit.role == Role::kKey) add_moments(unit, t);
  return t;
}

void TraceRows::add_rows(const UnitShape& unit, const TrainNeeds& needs, TrainData& t) const {
  const int64_t d = reader_.info().shape.head_dim, n = train_rows(), width = d * unit.heads;
  const int layer = scope_.layers.at(static_cast<size_t>(unit.layer));
  t.x = Matrix<float>(n, width);
  if (needs.other_role) t.other_role = Matrix<float>(n, width);
  if (needs.mass) {
    t.received_mass.assign(static_cast<size_t>(n), 0);
    t.received_mass2.assign(static_cast<size_t>(n), 0);
  }
  // Keys as the unit sees them; as the other role of a value they are rotated.
  const bool rotated = unit.role == Role::kValue || unit.rope == RopePlacement::kPost;
  const auto add = [&](Role role, int h, Matrix<float>& to) {
    int64_t at = 0;
    for (const TrainWindow& w : train_windows_) {
      Matrix<float> x(w.window.tokens, d);
      if (role == Role::kKey) {
        read_keys(unit.layer, unit.first_head + h, w.window, x);
        if (rotated == reader_.info().keys_pre_rope)
          rope_apply(rope_, reader_.position().data() + w.window.first_token, x, !rotated);
      } else {
        read_values(unit.layer, unit.first_head + h, w.window, x);
      }
      policy_.round_exact(x.data(), x.rows * d, [&](int64_t i) {
        return place(role, unit.layer, unit.first_head + h, w.window.first_token + i / d, i % d);
      });
      for (const int64_t r : w.rows) std::copy_n(x.row(r), d, to.row(at++) + h * d);
    }
  };
  for (int h = 0; h < unit.heads; ++h) {
    add(unit.role, h, t.x);
    if (needs.other_role) add(unit.role == Role::kKey ? Role::kValue : Role::kKey, h, t.other_role);
    if (!needs.mass) continue;
    const int head = scope_.heads.at(static_cast<size_t>(unit.first_head + h));
    size_t at = 0;
    for (const TrainWindow& w : train_windows_) {
      const auto mass = reader_.received_mass(layer, head, w.window.first_token, w.window.tokens);
      const auto mass2 = reader_.received_mass2(layer, head, w.window.first_token, w.window.tokens);
      for (const int64_t r : w.rows) {
        t.received_mass[at] += mass[static_cast<size_t>(r)];
        t.received_mass2[at++] += mass2[static_cast<size_t>(r)];
      }
    }
  }
}

void TraceRows::add_gradients(const UnitShape& unit, TrainData& t) const {
  const int64_t d = reader_.info().shape.head_dim;
  const int layer = scope_.layers.at(static_cast<size_t>(unit.layer));
  const GradientOf of = unit.role == Role::kValue           ? GradientOf::kValue
                        : unit.rope == RopePlacement::kPost ? GradientOf::kRotatedKey
                                                            : GradientOf::kKey;
  t.squared_gradient = Matrix<float>(train_rows(), d * unit.heads);
  for (int h = 0; h < unit.heads; ++h) {
    const int head = scope_.heads.at(static_cast<size_t>(unit.first_head + h));
    int64_t at = 0;
    for (const TrainWindow& w : train_windows_) {
      Matrix<float> x(w.window.tokens, d);
      reader_.squared_gradient(of, layer, head, w.window.first_token, w.window.tokens, x);
      for (const int64_t r : w.rows) std::copy_n(x.row(r), d, t.squared_gradient.row(at++) + h * d);
    }
  }
}

void TraceRows::add_queries(const UnitShape& unit, TrainData& t) const {
  const int64_t d = reader_.info().shape.head_dim, width = d * unit.heads, group = reader_.info().shape.group();
  std::vector<int64_t> query_rows;  // of the trace's query axis
  for (const TrainWindow& w : train_windows_)
    for (int64_t q = 0; q < w.window.queries; ++q) query_rows.push_back(w.window.first_query + q);
  const std::vector<int64_t> kept = evenly(static_cast<int64_t>(query_rows.size()), kMaxTrainQueries / group);
  t.queries = Matrix<float>(static_cast<int64_t>(kept.size()) * group, width);
  for (int h = 0; h < unit.heads; ++h) {
    for (int64_t g = 0; g < group; ++g) {
      const int q_head = static_cast<int>(scope_.heads.at(static_cast<size_t>(unit.first_head + h)) * group + g);
      Matrix<float> all(reader_.queries(), d);
      read_queries(unit.layer, q_head, 0, reader_.queries(), all);
      for (size_t i = 0; i < kept.size(); ++i) {
        const int64_t row = query_rows[static_cast<size_t>(kept[i])];
        const MutMatrix to = t.queries.view().slice_rows(static_cast<int64_t>(i) * group + g, 1).slice_cols(h * d, d);
        std::copy_n(all.row(row), d, to.row(0));
        rope_apply(rope_, &reader_.position()[static_cast<size_t>(reader_.query_token()[static_cast<size_t>(row)])],
                   to);
      }
    }
  }
}

void TraceRows::add_moments(const UnitShape& unit, TrainData& t) const {
  const int64_t d = reader_.info().shape.head_dim, width = d * unit.heads, group = reader_.info().shape.group();
  const int layer = scope_.layers.at(static_cast<size_t>(unit.layer));
  t.query_moment = Matrix<float>(width, width);
  t.query_pair_moment.assign(static_cast<size_t>(width / 2), 0);
  for (int h = 0; h < unit.heads; ++h) {
    const int head = scope_.heads.at(static_cast<size_t>(unit.first_head + h));
    Matrix<double> moment(d, d);
    std::vector<double> pairs(static_cast<size_t>(d / 2), 0.0);
    double positions = 0;
    for (const int64_t document : config_.train) {
      // Documents are addressed by place, named by id.
      const auto& list = reader_.documents();
      const auto it = std::find_if(list.begin(), list.end(), [&](const TraceDocument& x) { return x.id == document; });
      const int place = static_cast<int>(it - list.begin());
      const Matrix<double> m = reader_.query_moment(layer, head, place);
      const std::vector<double> p = reader_.query_pair_moment(layer, head, place);
      for (int64_t i = 0; i < d * d; ++i) moment.data()[i] += m.data()[i];
      for (size_t i = 0; i < pairs.size(); ++i) pairs[i] += p[i];
      positions += static_cast<double>(reader_.moment_count(place)) / static_cast<double>(group);
    }
    if (positions == 0) continue;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j)
        t.query_moment(h * d + i, h * d + j) = static_cast<float>(moment(i, j) / positions);
    for (int64_t i = 0; i < d / 2; ++i)
      t.query_pair_moment[static_cast<size_t>(h * d / 2 + i)] =
          static_cast<float>(pairs[static_cast<size_t>(i)] / positions);
  }
}

}  // namespace vqkv
