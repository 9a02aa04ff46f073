// Each metric against a brute-force reading of its formula, on random data with planted outliers.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "metric/metric.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

struct Case {
  static constexpr int64_t n = 96, d = 16, group = 3;
  Matrix<float> k{n, d}, k_hat{n, d}, v{n, d}, v_hat{n, d}, q, w_o{20, group*d};
  FidelitySample sample;

  explicit Case(double noise) {
    Rng rng(5);
    const auto fill = [&](Matrix<float>& m) {
      for (float& x : m.storage) x = static_cast<float>(rng.normal());
    };
    for (Matrix<float>* m : {&k, &v, &w_o}) fill(*m);
    for (int64_t t = 0; t < n; ++t) k(t, 3) += 6;  // an outlier channel, as real keys have
    k_hat = k;
    v_hat = v;
    for (float& x : k_hat.storage) x += static_cast<float>(noise * rng.normal());
    for (float& x : v_hat.storage) x += static_cast<float>(noise * rng.normal());
    sample.query_position = {5, 40, 70, 95};
    q = Matrix<float>(static_cast<int64_t>(sample.query_position.size()) * group, d);
    fill(q);
    sample.layer = 1;
    sample.kv_head = 2;
    sample.k = k;
    sample.k_hat = k_hat;
    sample.v = v;
    sample.v_hat = v_hat;
    sample.q = q;
    sample.group = group;
    sample.sinks = 4;
    sample.coded_end_k = {4, 24, 48, 80};
    sample.coded_end_v = {4, 28, 52, 76};
    sample.coded_last_k = 80;
    sample.coded_last_v = 76;
    sample.score_scale = 0.25f;
    sample.w_o = w_o;
  }

  std::map<std::string, double> run(const std::string& name) const {
    const auto metric = find_metric(name).make();
    FidelitySample fresh = sample;
    fresh.build_rows();
    metric->add(fresh);
    std::map<std::string, double> out;
    for (const auto& m : metric->finish()) out[m.tag] = m.value;
    return out;
  }

  // Row of (query i, group member g): exact and coded logits, and probabilities, in double.
  struct Row {
    std::vector<double> s, hat, p, p_hat;
    int64_t begin, end_k, end_v;
  };
  Row row(size_t i, int64_t g) const {
    Row r;
    const int64_t length = sample.query_position[i] + 1;
    r.begin = std::min<int64_t>(4, length);
    r.end_k = sample.coded_end_k[i];
    r.end_v = sample.coded_end_v[i];
    for (int64_t j = 0; j < length; ++j) {
      double a = 0, b = 0;
      for (int64_t c = 0; c < d; ++c) {
        a += static_cast<double>(q(static_cast<int64_t>(i) * group + g, c)) * k(j, c);
        b += static_cast<double>(q(static_cast<int64_t>(i) * group + g, c)) * k_hat(j, c);
      }
      r.s.push_back(0.25 * a);
      r.hat.push_back(j >= r.begin && j < r.end_k ? 0.25 * b : 0.25 * a);
    }
    const auto soft = [](const std::vector<double>& s) {
      std::vector<double> p(s.size());
      double top = *std::max_element(s.begin(), s.end()), sum = 0;
      for (size_t j = 0; j < s.size(); ++j) sum += p[j] = std::exp(s[j] - top);
      for (double& x : p) x /= sum;
      return p;
    };
    r.p = soft(r.s);
    r.p_hat = soft(r.hat);
    return r;
  }
};

}  // namespace

TEST_CASE("softmax KL, total variation and coded mass equal their definitions") {
  const Case c(0.3);
  double kl = 0, tv = 0, mass = 0, rows = 0;
  for (size_t i = 0; i < 4; ++i)
    for (int64_t g = 0; g < Case::group; ++g, ++rows) {
      const auto r = c.row(i, g);
      for (size_t j = 0; j < r.p.size(); ++j) {
        kl += r.p[j] * std::log(r.p[j] / r.p_hat[j]);
        tv += 0.5 * std::fabs(r.p[j] - r.p_hat[j]);
        if (static_cast<int64_t>(j) >= r.begin && static_cast<int64_t>(j) < r.end_k) mass += r.p[j];
      }
    }
  const auto got = c.run("softmax_kl");
  CHECK(got.at("attention.softmax_kl") == Approx(kl / rows).epsilon(1e-4));
  CHECK(got.at("attention.total_variation") == Approx(tv / rows).epsilon(1e-4));
  CHECK(got.at("attention.coded_mass") == Approx(mass / rows).epsilon(1e-4));
}

TEST_CASE("rounded queries meet coded keys alone: logits by hand") {
  // Four tokens of 32 channels, the second and third coded. Scales of powers of two: every number here is exact.
  Matrix<float> k(4, 32), q(1, 32);
  q(0, 0) = 63.5f;  // the scale is 0.5
  q(0, 1) = 0.25f;  // half a step, away from zero: 0.5
  q(0, 2) = -3.3f;  // -6.6 steps: -3.5
  for (int64_t t = 0; t < 4; ++t) {
    k(t, 0) = static_cast<float>(t);
    k(t, 1) = -8;
    k(t, 2) = 4;
  }
  Matrix<float> k_hat = k;
  k_hat(1, 0) = 1.5f;
  DecodePlan plan;
  plan.channels = plan.code_channels = 32;
  plan.query = QueryForm::kQ8;
  FidelitySample s;
  s.k = k;
  s.k_hat = k_hat;
  s.v = k;
  s.v_hat = k;
  s.q = q;
  s.query_position = {3};
  s.sinks = 1;
  s.coded_end_k = s.coded_end_v = {3};
  s.score_scale = 0.125f;
  const float exact = 0.25f * -8 - 3.3f * 4, rounded = 0.5f * -8 - 3.5f * 4;
  s.build_rows();
  CHECK(s.rows().s_hat(0, 1) == Approx(0.125f * (1.5f * 63.5f + exact)));
  s.query = CodedQueries(plan, 0, 32);
  s.build_rows();
  const AttentionRows& r = s.rows();
  for (int64_t t = 0; t < 4; ++t) CHECK(r.s(0, t) == Approx(0.125f * (static_cast<float>(t) * 63.5f + exact)));
  CHECK(r.s_hat(0, 0) == r.s(0, 0));
  CHECK(r.s_hat(0, 1) == 0.125f * (1.5f * 63.5f + rounded));
  CHECK(r.s_hat(0, 2) == 0.125f * (2 * 63.5f + rounded));
  CHECK(r.s_hat(0, 3) == r.s(0, 3));
}

TEST_CASE("softmax KL is finite and right where exact and coded logits are thousands apart") {
  for (const bool below : {true, false}) {
    CAPTURE(below);
    Case c(0.3);
    for (float& x : c.q.storage) x *= 0.01f;
    for (int64_t r = 0; r < c.q.rows; ++r) c.q(r, 3) = 400;
    for (int64_t t = 4; t < 80; ++t) {  // what is coded, but for the tail of each query
      c.k(t, 3) = below ? 40.0f + 0.01f * static_cast<float>(t) : 0.0f;
      c.k_hat(t, 3) = below ? 0.0f : 40.0f + 0.01f * static_cast<float>(t);
    }
    for (size_t i = 1; i < 4; ++i) c.sample.coded_end_k[i] = std::min<int64_t>(80, c.sample.query_position[i] + 1);
    double kl = 0, rows = 0;
    for (size_t i = 0; i < 4; ++i)
      for (int64_t g = 0; g < Case::group; ++g, ++rows) {
        const auto r = c.row(i, g);
        const auto log_sum = [](const std::vector<double>& s) {
          const double top = *std::max_element(s.begin(), s.end());
          double sum = 0;
          for (const double x : s) sum += std::exp(x - top);
          return top + std::log(sum);
        };
        const double of_exact = log_sum(r.s), of_coded = log_sum(r.hat);
        for (size_t j = 0; j < r.p.size(); ++j) kl += r.p[j] * (r.s[j] - of_exact - (r.hat[j] - of_coded));
      }
    CHECK(kl / rows > 300);
    CHECK(c.run("softmax_kl").at("attention.softmax_kl") == Approx(kl / rows).epsilon(1e-4));
  }
}

TEST_CASE("what maps the scores of coded keys maps those of a sweep, over each query's own range") {
  Case plain(0.3), mapped(0.3);
  mapped.sample.score = {ScoreMap::Kind::kRange, 0.25f, 1.0f};
  plain.sample.build_rows();
  mapped.sample.build_rows();
  const AttentionRows &a = plain.sample.rows(), &b = mapped.sample.rows();
  for (int64_t r = 0; r < a.s.rows; ++r) {
    const auto row = static_cast<size_t>(r);
    const int64_t begin = a.coded_begin[row], end = a.coded_end[row];
    const auto [low, high] = std::minmax_element(a.s_hat.row(r) + begin, a.s_hat.row(r) + end);
    for (int64_t t = 0; t < a.tokens[row]; ++t) {
      CHECK(b.s(r, t) == a.s(r, t));
      const bool coded = t >= begin && t < end;
      const double expected =
          coded ? *low + 0.25 + (double{a.s_hat(r, t)} - *low) * (*high - *low - 1.25) / (*high - *low) : a.s_hat(r, t);
      CHECK(b.s_hat(r, t) == Approx(expected).epsilon(1e-5).margin(1e-5));
    }
  }
  CHECK(mapped.run("softmax_kl").at("attention.softmax_kl") != plain.run("softmax_kl").at("attention.softmax_kl"));
}

TEST_CASE("attention output error equals its definition, also after W_O and by role") {
  const Case c(0.3);
  double error = 0, energy = 0, k_error = 0, v_error = 0, w_error = 0, w_energy = 0;
  for (size_t i = 0; i < 4; ++i) {
    std::vector<double> flat, flat_hat;
    for (int64_t g = 0; g < Case::group; ++g) {
      const auto r = c.row(i, g);
      for (int64_t ch = 0; ch < Case::d; ++ch) {
        double o = 0, both = 0, ko = 0, vo = 0;
        for (size_t j = 0; j < r.p.size(); ++j) {
          const int64_t t = static_cast<int64_t>(j);
          const double value = c.v(t, ch), coded = t >= r.begin && t < r.end_v ? c.v_hat(t, ch) : c.v(t, ch);
          o += r.p[j] * value;
          both += r.p_hat[j] * coded;
          ko += r.p_hat[j] * value;
          vo += r.p[j] * coded;
        }
        error += (both - o) * (both - o);
        k_error += (ko - o) * (ko - o);
        v_error += (vo - o) * (vo - o);
        energy += o * o;
        flat.push_back(o);
        flat_hat.push_back(both);
      }
    }
    for (int64_t h = 0; h < c.w_o.rows; ++h) {
      double a = 0, b = 0;
      for (size_t x = 0; x < flat.size(); ++x) {
        a += c.w_o(h, static_cast<int64_t>(x)) * flat[x];
        b += c.w_o(h, static_cast<int64_t>(x)) * flat_hat[x];
      }
      w_error += (a - b) * (a - b);
      w_energy += a * a;
    }
  }
  const auto got = c.run("attention_output");
  CHECK(got.at("output.relative_error") == Approx(std::sqrt(error / energy)).epsilon(1e-4));
  CHECK(got.at("output.relative_error_k_only") == Approx(std::sqrt(k_error / energy)).epsilon(1e-4));
  CHECK(got.at("output.relative_error_v_only") == Approx(std::sqrt(v_error / energy)).epsilon(1e-4));
  CHECK(got.at("output.relative_error_after_wo") == Approx(std::sqrt(w_error / w_energy)).epsilon(1e-4));
}

TEST_CASE("logit error is blind to a constant shift, and the slope sees shrinking") {
  Case c(0);
  // k_hat = 0.5 k: every logit halves, so the slope is 0.5.
  for (size_t i = 0; i < c.k.storage.size(); ++i) c.k_hat.storage[i] = 0.5f * c.k.storage[i];
  auto got = c.run("logit_error");
  CHECK(got.at("logit.slope") == Approx(0.5).epsilon(1e-5));
  // A constant added to one key channel moves all logits of a query alike.
  c.k_hat = c.k;
  for (int64_t t = 0; t < Case::n; ++t) c.k_hat(t, 2) += 10;
  got = c.run("logit_error");
  CHECK(got.at("logit.centred_rms") < 1e-4);
  CHECK(got.at("logit.slope") == Approx(1).epsilon(1e-4));
}

TEST_CASE("a lossless codec measures zero everywhere and overlaps fully") {
  const Case c(0);
  CHECK(c.run("key_nmse").at("key.nmse") == 0);
  CHECK(c.run("value_nmse").at("value.nmse") == 0);
  CHECK(c.run("softmax_kl").at("attention.softmax_kl") < 1e-7);
  CHECK(c.run("attention_output").at("output.relative_error") < 1e-6);
  for (const auto& [tag, value] : c.run("top_k"))
    if (!std::isnan(value)) CHECK(value == Approx(1).epsilon(1e-6));
}

TEST_CASE("reconstruction error counts coded tokens alone") {
  Case c(0);
  c.k_hat(2, 0) += 100;   // a sink
  c.k_hat(85, 0) += 100;  // in the window of the last query
  CHECK(c.run("key_nmse").at("key.nmse") == 0);
  c.k_hat(50, 1) += 1;
  double energy = 0;
  for (int64_t t = 4; t < 80; ++t)
    for (int64_t ch = 0; ch < Case::d; ++ch) energy += c.k(t, ch) * c.k(t, ch);
  CHECK(c.run("key_nmse").at("key.nmse") == Approx(1 / energy).epsilon(1e-4));
}

TEST_CASE("code usage: entropy in bits and dead codewords") {
  Case c(0);
  std::vector<uint16_t> field;
  for (int t = 0; t < 64; ++t) {
    field.push_back(static_cast<uint16_t>(t % 4));  // slot 0: 4 of 16 codes, 2 bits
    field.push_back(7);                             // slot 1: one code
  }
  const std::vector<std::vector<uint16_t>> codes{field};
  CodeLayout layout;
  layout.fields = {{"code", 4, 2, true}};
  c.sample.key_codes = &codes;
  c.sample.key_layout = &layout;
  const auto got = c.run("code_usage");
  CHECK(got.at("key.code_entropy") == Approx(1.0));
  CHECK(got.at("key.code_entropy_share") == Approx(0.25));
  CHECK(got.at("key.dead_codes") == Approx((12.0 / 16 + 15.0 / 16) / 2));
}

TEST_CASE("every measurement of every metric says what tables print: a heading of its own, or that it stands nowhere") {
  Case c(0.3);
  std::vector<MeasureColumn> columns;
  std::set<std::string> tags, headings;
  for (const MetricKind* kind : all_metrics()) {
    INFO(kind->describe().name);
    FidelitySample fresh = c.sample;
    fresh.build_rows();
    const auto metric = kind->make();
    metric->add(fresh);
    size_t shown = 0;
    for (const Measurement& m : metric->finish()) {
      INFO(m.tag);
      CHECK(tags.insert(m.tag).second);
      CHECK(headings.insert(m.heading()).second);
      CHECK_FALSE(m.title.empty());
      const size_t before = columns.size();
      const Measurement back = measurement_head_from_json(to_json(m));
      CHECK((back.title == m.title && back.shown == m.shown && back.digits == m.digits && back.group == m.group));
      add_column(columns, back);
      add_column(columns, m);
      CHECK(columns.size() == before + (m.shown != Shown::kNowhere));
      shown += columns.size() - before;
    }
    CHECK((shown > 0 || kind->describe().name == "code_usage"));
  }
  CHECK(measure_text(0.0123456, 3) == "0.0123");
  CHECK(measure_text(std::nan(""), 3) == "–");
}

TEST_CASE("an unknown metric names the nearest") {
  CHECK_THROWS_WITH(find_metric("softmax_k"), Catch::Contains("did you mean 'softmax_kl'"));
}

TEST_CASE("a value that is not finite ends a metric by name, no mean leaves it out", "[finite]") {
  const auto error_of = [](const auto& f) -> std::string {
    try {
      f();
    } catch (const Error& e) { return e.what(); }
    return "no error";
  };
  const auto has = [](const std::string& text, const std::string& part) {
    INFO(text);
    CHECK(text.find(part) != std::string::npos);
  };
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF, 3e38f}) {
    Case c(0.1);
    CAPTURE(bad);
    c.k_hat(20, 3) = bad;  // coded for the later queries
    c.q(4, 3) = c.q(7, 3) = 20;
    has(error_of([&] { c.run("softmax_kl"); }), "layer 1, KV head 2, document 0: the coded logit of token 20");
    c.k_hat = c.k;
    c.v_hat(20, 3) = bad;
    // A head that is fine beside it must not speak for both.
    for (const char* name : {"value_nmse", "attention_output"}) {
      const auto metric = find_metric(name).make();
      Case good(0.1);
      good.sample.kv_head = 0;
      good.sample.build_rows();
      c.sample.build_rows();
      metric->add(good.sample);
      metric->add(c.sample);
      const std::string error = error_of([&] { metric->finish(); });
      if (bad == 3e38f) {  // finite, if huge
        CHECK(error == "no error");
        continue;
      }
      has(error, ": layer 1, KV head 2, document 0 gives ");
      has(error, name[0] == 'v' ? "value.nmse" : "output.relative_error");
    }
  }
}

TEST_CASE("rows are built by whoever makes the sample, before metrics run side by side") {
  Case c(0.1);
  const auto metric = find_metric("softmax_kl").make();
  CHECK_THROWS_AS(metric->add(c.sample), Error);
  // A window without recorded queries has rows too: none.
  c.q = Matrix<float>(0, Case::d);
  c.sample.q = c.q;
  c.sample.query_position.clear();
  c.sample.coded_end_k.clear();
  c.sample.coded_end_v.clear();
  c.sample.build_rows();
  for (const MetricKind* kind : all_metrics()) {
    INFO(kind->describe().name);
    const auto m = kind->make();
    m->add(c.sample);
    for (const Measurement& x : m->finish()) CHECK((std::isfinite(x.value) || x.n == 0));
  }
}
