#include "experiment/tier_rows.h"

#include <algorithm>

#include "cache/coding.h"
#include "core/clock.h"
#include "core/error.h"

namespace vqkv {
namespace {

class WindowAgedRows final : public AgedRows {
 public:
  WindowAgedRows(const CodecSet& codecs, const TrainedUnit& unit, const EvalWindow& w, int64_t sinks,
                 const std::function<CodedUnit(size_t)>& newer)
      : codecs_(codecs), unit_(unit), window_(w), sinks_(sinks), newer_(newer) {}

  void load(Role role, int head, int64_t first, MutMatrix out) const override {
    const size_t from = before(role, head);
    const UnitShape& u = codecs_.units()[from].spec.unit;
    const Matrix<float>& rows = *newer_(from).rows;
    for (int64_t t = 0; t < out.rows; ++t)
      std::copy_n(rows.row(first - sinks_ + t) + (head - u.first_head) * u.head_dim, out.cols, out.row(t));
  }
  void positions(int64_t first, std::span<int32_t> out) const override {
    std::copy_n(window_.position.begin() + first, out.size(), out.begin());
  }
  CodeBlock codes(int64_t from, int64_t to) const override {
    return codes_of(*newer_(own_before()).block, layout(), from - sinks_, to - sinks_);
  }
  const CodeLayout& layout() const override { return codecs_.units()[own_before()].codec->layout(); }

 private:
  size_t before(Role role, int head) const {
    return static_cast<size_t>(codecs_.unit_index(unit_.spec.unit.layer, head, role, unit_.spec.tier - 1));
  }
  size_t own_before() const { return before(unit_.spec.unit.role, unit_.spec.unit.first_head); }
  const CodecSet& codecs_;
  const TrainedUnit& unit_;
  const EvalWindow& window_;
  int64_t sinks_;
  const std::function<CodedUnit(size_t)>& newer_;
};

// end(newer tokens) of each tier from 1 on.
template <class End>
std::vector<int64_t> by_tier(const CodecSet& codecs, End&& end) {
  std::vector<int64_t> out;
  for (int tier = 1; tier < codecs.tiers(); ++tier) out.push_back(end(codecs.newer_tokens(tier)));
  return out;
}

}  // namespace

std::vector<int64_t> older_ends(const CodecSet& codecs, const CachePolicy& policy, Role role, int64_t position) {
  return by_tier(codecs, [&](int64_t newer) { return policy.coded_end(role, position, newer); });
}

std::vector<int64_t> older_ends_among(const CodecSet& codecs, const CachePolicy& policy, Role role, int64_t total) {
  return by_tier(codecs, [&](int64_t newer) { return policy.coded_among(role, total, newer); });
}

std::vector<int64_t> tokens_by_tier(const CodecSet& codecs, const CachePolicy& policy, Role role, int64_t total) {
  std::vector<int64_t> out{policy.coded_among(role, total)};
  for (const int64_t end : older_ends_among(codecs, policy, role, total)) {
    out.back() -= end;
    out.push_back(end);
  }
  out.back() -= std::min(policy.sinks, total);
  return out;
}

CodingTotals code_older_unit(const TraceRows& rows, const CodecSet& codecs, size_t unit, const EvalWindow& w,
                             std::span<HeadRows> heads, const std::function<CodedUnit(size_t)>& newer, CodeBlock& block,
                             Matrix<float>& decoded) {
  const TrainedUnit& own = codecs.units()[unit];
  const UnitShape& u = own.spec.unit;
  const CachePolicy policy = rows.config().policy();
  const bool key = u.role == Role::kKey;
  const int64_t n = w.window.tokens, sinks = std::min(policy.sinks, n);
  const int64_t end = older_ends_among(codecs, policy, u.role, n)[static_cast<size_t>(own.spec.tier - 1)];
  const int64_t coded = std::max<int64_t>(0, end - sinks);
  CodingTotals t;
  decoded = Matrix<float>(coded, u.channels());
  if (coded > 0) {
    const DecodePlan plan = own.codec->plan();
    Stopwatch watch;
    block = age_unit(*own.codec, own.spec.level > 0, plan, u, WindowAgedRows(codecs, own, w, sinks, newer), sinks,
                     sinks + coded);
    t.encode = watch.seconds();
    watch.restart();
    decode_plan(plan, block, decoded);
    require_finite(rows, u, w, sinks, decoded);
    t.decode = watch.seconds();
  }
  t.values = coded * u.channels();
  t.tokens = coded;
  t.exceptions = static_cast<int64_t>(block.overlay.size());
  for (int h = 0; h < u.heads; ++h) {
    HeadRows& to = heads[static_cast<size_t>(u.first_head + h)];
    std::vector<Matrix<float>>& older = key ? to.older_k : to.older_v;
    older.resize(static_cast<size_t>(codecs.tiers() - 1));
    Matrix<float>& hat = older[static_cast<size_t>(own.spec.tier - 1)];
    hat = Matrix<float>(sinks + coded, u.head_dim);
    put_decoded(rows, own, w, decoded, h, sinks, hat);
  }
  return t;
}

Matrix<float> rows_by_age(ConstMatrix newest, std::span<const Matrix<float>> older, std::span<const int64_t> ends,
                          int64_t sinks) {
  Matrix<float> out(newest.rows, newest.cols);
  for (int64_t t = 0; t < out.rows; ++t) std::copy_n(newest.row(t), out.cols, out.row(t));
  for (size_t i = 0; i < ends.size(); ++i)
    for (int64_t t = sinks; t < ends[i]; ++t) std::copy_n(older[i].row(t), out.cols, out.row(t));
  return out;
}

}  // namespace vqkv
