// reference: the naive definition in double. Decodes the whole coded body through decode_plan, holds everything, and is
// what the fast backends are judged by.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/backends_cpu.h"
#include "codec/query_form.h"
#include "codec/score_map.h"
#include "core/error.h"

namespace vqkv {
namespace {

class ReferenceBackend final : public AttentionBackend {
 public:
  std::string name() const override { return "reference"; }
  std::optional<std::string> can(const DecodePlan&, Role) const override { return std::nullopt; }

  void attend(const CacheView& cache, int layer, ConstMatrix q, MutMatrix out, AttendStats* stats, AttentionTap* tap,
              MassRequest* mass) override {
    const CacheShape& shape = cache.shape();
    const int64_t d = shape.head_dim, tokens = cache.length() + q.rows;
    for (int h = 0; h < shape.kv_heads; ++h) {
      const std::vector<int32_t> seen = mass ? cache.seen(layer, h) : std::vector<int32_t>();
      Forms forms;
      load(cache, layer, h, Role::kKey, tokens, forms.exact_k, forms.coded_k);
      load(cache, layer, h, Role::kValue, tokens, forms.exact_v, forms.coded_v);
      std::vector<Matrix<float>> probabilities(static_cast<size_t>(shape.group()),
                                               Matrix<float>(tap ? q.rows : 0, tokens));
      for (int64_t i = 0; i < q.rows; ++i) {
        const int64_t position = cache.length() + i;
        const int64_t k_end = cache.coded_end(Role::kKey, position);
        const Choice value(cache, Role::kValue, position, forms.exact_v, forms.coded_v);
        for (int g = 0; g < shape.group(); ++g) {
          const int head = h * shape.group() + g;
          const std::vector<double> p = softmax(cache, layer, h, position, q.row(i) + head * d, forms);
          std::vector<double> sum(static_cast<size_t>(d), 0.0);
          double coded = 0;
          for (size_t t = 0; t < p.size(); ++t) {
            const int64_t token = static_cast<int64_t>(t);
            const Matrix<float>& v = value.of(token);
            if (p[t] != 0)  // an evicted token may have no form left
              for (int64_t c = 0; c < d; ++c) sum[static_cast<size_t>(c)] += p[t] * v(token, c);
            if (token >= cache.policy().sinks && token < k_end) coded += p[t];
            if (tap) probabilities[static_cast<size_t>(g)](i, token) = static_cast<float>(p[t]);
          }
          if (mass && position >= mass->from && position < mass->to)
            for (size_t c = 0; c < seen.size() && seen[c] <= position; ++c)
              mass->received[static_cast<size_t>(h)][c] += p[static_cast<size_t>(seen[c])];
          for (int64_t c = 0; c < d; ++c) out(i, head * d + c) = static_cast<float>(sum[static_cast<size_t>(c)]);
          if (stats) {
            stats->coded_mass += coded;
            stats->total_mass += 1.0;
          }
        }
      }
      for (int g = 0; tap && g < shape.group(); ++g)
        tap->on_probabilities(layer, h * shape.group() + g, cache.length(), probabilities[static_cast<size_t>(g)]);
    }
  }

 private:
  struct Forms {
    Matrix<float> exact_k, exact_v;               // (tokens, head_dim); rows of other forms are unset
    std::vector<Matrix<float>> coded_k, coded_v;  // (tiers) of such
  };
  // Which form of a token the query at a position sees.
  struct Choice {
    const Matrix<float>& exact;
    const std::vector<Matrix<float>>& coded;
    int64_t sinks;
    std::vector<int64_t> ends;  // (tiers)
    Choice(const CacheView& cache, Role role, int64_t position, const Matrix<float>& exact_form,
           const std::vector<Matrix<float>>& coded_forms)
        : exact(exact_form), coded(coded_forms), sinks(cache.policy().sinks) {
      for (int tier = 0; tier < cache.tiers(); ++tier) ends.push_back(cache.coded_end(role, position, tier));
    }
    const Matrix<float>& of(int64_t token) const {
      if (token < sinks || token >= ends[0]) return exact;
      size_t tier = 0;
      while (tier + 1 < ends.size() && token < ends[tier + 1]) ++tier;
      return coded[tier];
    }
  };

  static void load(const CacheView& cache, int layer, int head, Role role, int64_t tokens, Matrix<float>& exact,
                   std::vector<Matrix<float>>& coded) {
    const int64_t d = cache.shape().head_dim, exact_begin = cache.exact_begin(layer, role);
    exact = Matrix<float>(tokens, d);
    coded.assign(static_cast<size_t>(cache.tiers()), Matrix<float>(tokens, d));
    const auto load_exact = [&](int64_t first, int64_t count) {
      if (count <= 0) return;
      if (role == Role::kValue) {
        cache.load_values(layer, head, first, count, exact.row(first), d);
        return;
      }
      Matrix<float> transposed(d, count);
      cache.load_keys(layer, head, first, count, transposed.data(), count);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < d; ++c) exact(first + t, c) = transposed(c, t);
    };
    load_exact(0, std::min(cache.policy().sinks, tokens));
    load_exact(exact_begin, tokens - exact_begin);
    for (int tier = 0; cache.policy().keeps_codes() && tier < cache.tiers(); ++tier) {
      const int found = cache.unit_of(layer, head, role, tier);
      if (found < 0) continue;
      const auto unit = static_cast<size_t>(found);
      const int64_t begin = cache.slot_begin(unit);
      const Matrix<float> x = cache.decode_codes(unit, begin, cache.slots(unit));
      const std::span<const int32_t> listed = cache.slot_positions(unit);
      for (int64_t s = 0; s < x.rows; ++s)
        std::copy_n(x.row(s) + (head - cache.unit_shape(unit).first_head) * d, d,
                    coded[static_cast<size_t>(tier)].row(listed.empty() ? cache.policy().sinks + begin + s
                                                                        : listed[static_cast<size_t>(s)]));
      if (!cache.recalled()) continue;
      const RecalledPairs::Head& pairs = cache.recalled()->head(layer, head);
      cache.recalled()->visit(layer, head, 0, tokens, [&](int64_t i, int64_t position) {
        std::copy_n((role == Role::kKey ? pairs.k : pairs.v).row(i), d, coded[static_cast<size_t>(tier)].row(position));
      });
    }
    if (role == Role::kValue || cache.keys_post_rope(layer, head)) return;
    const auto rotate = [&](Matrix<float>& m) {
      for (int64_t t = 0; t < tokens; ++t) {
        const auto position = static_cast<int32_t>(t);
        rope_apply(cache.rope(), &position, m.view().slice_rows(t, 1));
      }
    };
    rotate(exact);
    for (Matrix<float>& m : coded) rotate(m);
  }

  static std::vector<double> softmax(const CacheView& cache, int layer, int head, int64_t position, const float* q,
                                     const Forms& forms) {
    const int64_t d = cache.shape().head_dim, sinks = cache.policy().sinks, end = cache.coded_end(Role::kKey, position);
    std::vector<double> s(static_cast<size_t>(position + 1), -std::numeric_limits<double>::infinity());
    const bool any_evicted = cache.any_evicted(layer, head);
    const Choice key(cache, Role::kKey, position, forms.exact_k, forms.coded_k);
    const int unit = end > sinks ? cache.unit_of(layer, head, Role::kKey) : -1;
    std::vector<float> coded_q(q, q + d);
    if (unit >= 0) {
      const int in_unit = head - cache.unit_shape(static_cast<size_t>(unit)).first_head;
      const CodedQueries queries(cache.plan(layer, head, Role::kKey), in_unit, static_cast<int>(d));
      if (!queries.exact()) queries.in_keys(q, coded_q.data());
    }
    for (int64_t t = 0; t <= position; ++t) {
      if ((any_evicted && cache.evicted(layer, head, t)) || (cache.policy().drops && t >= sinks && t < end)) continue;
      const Matrix<float>& k = key.of(t);
      const float* x = t >= sinks && t < end ? coded_q.data() : q;
      double sum = 0;
      for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(x[c]) * k(t, c);
      s[static_cast<size_t>(t)] = sum * cache.shape().score_scale;
    }
    if (unit >= 0) map_scores(cache.plan(layer, head, Role::kKey).score, s.data() + sinks, end - sinks);
    const double top = *std::max_element(s.begin(), s.end());
    double sum = 0;
    for (double& v : s) sum += v = std::exp(v - top);  // exp(-inf) of what is not seen is 0; a NaN stays one
    for (double& v : s) v /= sum;
    return s;
  }
};

}  // namespace

std::unique_ptr<AttentionBackend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace vqkv
