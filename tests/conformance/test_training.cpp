// Every method of the registry: what it learns from, and what it keeps of that.
#include <algorithm>
#include <cmath>

#include "codec/build.h"
#include "codec/transform/transform.h"
#include "conformance/trained_methods.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "support/catch.h"
#include "support/memory_parameters.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// The rows of `like` in their own place, the rest of them others: tokens from `kept` on.
TrainData others_behind(const TrainData& like, const UnitShape& unit, int64_t kept) {
  TrainData d = like;
  const Matrix<float> others = rows_of(like.x.rows, unit, 117);
  for (int64_t t = kept; t < d.x.rows; ++t)
    for (int64_t c = 0; c < d.x.cols; ++c) d.x(t, c) = 0.5f * others(t, c);
  return d;
}

}  // namespace

TEST_CASE("training gives the same bits at one, two and four threads", "[conformance]") {
  const int before = thread_count();
  for (const Case& c : cases()) {
    if (!needs_of(c.spec).rows || c.spec.unit.heads != 1) continue;
    CAPTURE(c.label);
    MemoryParameters one;
    CodeBlock codes_of_one;
    for (const int threads : {1, 2, 4}) {
      set_thread_count(threads);
      const auto codec = train(c.spec, c.data);
      MemoryParameters saved;
      CodeBlock codes;
      codec->save(saved);
      codec->encode(c.data.x, codes);
      if (threads == 1) {
        one = saved;
        codes_of_one = codes;
      }
      CHECK(saved == one);
      CHECK(same_codes(codes, codes_of_one));
    }
  }
  set_thread_count(before);
}

TEST_CASE("what a method does not say it needs changes nothing", "[conformance]") {
  const auto check = [](const UnitSpec& spec, const TrainData& all) {
    const TrainNeeds needs = needs_of(spec);
    if (!needs.rows) return;
    TrainData some;
    some.x = all.x;
    some.position = all.position;
    some.document = all.document;
    if (needs.mass) some.received_mass = all.received_mass, some.received_mass2 = all.received_mass2;
    if (needs.queries) some.queries = all.queries;
    if (needs.moments) some.query_moment = all.query_moment, some.query_pair_moment = all.query_pair_moment;
    if (needs.output_weight) some.output_weight = all.output_weight;
    if (needs.other_role) some.other_role = all.other_role;
    if (needs.gradients) some.squared_gradient = all.squared_gradient;
    MemoryParameters with_all, with_some;
    train(spec, all)->save(with_all);
    train(spec, some)->save(with_some);
    CHECK(with_all == with_some);
  };
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    check(c.spec, c.data);
    UnitSpec spec = c.spec;
    for (const char* weight : {"mass", "mass2"}) {
      if (!spec.knobs.contains("weight")) continue;
      spec.knobs["weight"] = weight;
      CHECK(needs_of(spec).mass);
      check(spec, c.data);
    }
  }
  for (const TransformKind* kind : all_transforms())
    for (const char* rope : {"post", "pre"}) {
      const std::string name = kind->describe().name;
      CAPTURE(name, rope);
      // One after another, so that what is carried through a chain is too.
      const Json config = {{"name", "exact"}, {"rope", rope}, {"k", {{"transform", Json::array({"center", name})}}}};
      const CodecPlan plan = resolve_codec(config, make_shape(1, 3, 1, 64));
      if (plan.skip.empty()) check(plan.units.at(0), data_of(plan.units[0].unit, 256));
    }
}

TEST_CASE("nothing that is learned or fitted comes from the first tokens alone", "[conformance]") {
  // What changes with all tokens also changes where the first token, or the first block, stays as it was: a scale that
  // is calibrated on the first token (decoding starts with one) is wrong for every later one.
  int compared = 0, fitting = 0;
  const auto check = [&](const UnitSpec& spec, const TrainData& data) {
    MemoryParameters of_data, of_others;
    const auto codec = train(spec, data);
    codec->save(of_data);
    train(spec, others_behind(data, spec.unit, 0))->save(of_others);
    const bool key = spec.unit.role == Role::kKey;
    const Matrix<float> queries = rows_of(codec->fit_needs().queries ? 2 * data.x.rows : 0, spec.unit, 119);
    const auto state = [&](int64_t kept) {
      const TrainData d = others_behind(data, spec.unit, kept);
      return key ? codec->fit(d.x, d.other_role, queries) : codec->fit(d.other_role, d.x, queries);
    };
    const auto codes = [&](const SequenceState* fitted) {
      CodeBlock block;
      codec->encode(data.x, block, fitted);
      return block;
    };
    const auto own = state(data.x.rows);
    CHECK((own == nullptr || codec->fit_needs().tokens > 1));  // and no sequence gives it fewer (fit_unit)
    const bool fits = own && !same_codes(codes(own.get()), codes(state(0).get()));
    for (const int64_t kept : {int64_t{1}, int64_t{codec->layout().block_tokens}}) {
      CAPTURE(kept);
      MemoryParameters of_first;
      train(spec, others_behind(data, spec.unit, kept))->save(of_first);
      for (const auto& [name, tensor] : of_data.tensors) {
        CAPTURE(name);
        if (tensor == of_others.tensors.at(name)) continue;  // not learned from these rows
        CHECK_FALSE(tensor == of_first.tensors.at(name));
        ++compared;
      }
      if (fits) CHECK_FALSE(same_codes(codes(own.get()), codes(state(kept).get())));
    }
    fitting += fits;
  };
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    if (c.spec.unit.heads == 1) check(c.spec, c.data);
  }
  for (const TransformKind* kind : all_transforms()) {
    const std::string name = kind->describe().name;
    CAPTURE(name);
    const Json config = {{"name", "exact"}, {"k", {{"transform", Json::array({name})}}}};
    const CodecPlan plan = resolve_codec(config, make_shape(1, 3, 1, 64));
    if (plan.skip.empty()) check(plan.units.at(0), data_of(plan.units[0].unit, 256));
  }
  CHECK(fitting >= 2);
  CHECK(compared > 20);
}

TEST_CASE("what trains in steps says which knobs count them", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    const std::vector<Knob> knobs = find_method(c.spec.method).knobs();
    const TrainReport report = make_codec(c.spec)->train(c.data.set(c.spec.unit), Rng(99));
    CHECK(std::any_of(knobs.begin(), knobs.end(), [](const Knob& k) { return k.effort; }) == (report.iterations > 0));
    CHECK((report.vectors > 0) == find_method(c.spec.method).needs(c.spec.knobs).rows);
  }
}

TEST_CASE("saved parameters load into the same codec", "[conformance]") {
  for (const Case& c : cases()) {
    CAPTURE(c.label);
    MemoryParameters saved, again;
    c.codec->save(saved);
    std::shared_ptr<Codec> loaded = make_codec(c.spec);
    loaded->load(saved);
    loaded->save(again);
    loaded = fitted(std::move(loaded), c.spec, c.data);
    CHECK(saved == again);
    CodeBlock a, b;
    c.codec->encode(c.data.x, a);
    loaded->encode(c.data.x, b);
    CHECK(same_codes(a, b));
    Matrix<float> x(c.data.x.rows, c.data.x.cols), y(c.data.x.rows, c.data.x.cols);
    c.codec->decode(a, x);
    loaded->decode(b, y);
    CHECK(x.storage == y.storage);
    CHECK(c.codec->constant_bytes() == loaded->constant_bytes());
  }
}

TEST_CASE("corrupted parameters are refused", "[conformance]") {
  const auto refused = [](const UnitSpec& spec, const MemoryParameters& p) {
    try {
      make_codec(spec)->load(p);
    } catch (const Error& e) { return e.kind() == ErrorKind::kBadData; }
    return false;
  };
  for (const Case& c : cases()) {
    MemoryParameters saved;
    c.codec->save(saved);
    for (const auto& [name, tensor] : saved.tensors) {
      CAPTURE(c.label, name);
      MemoryParameters missing = saved, longer = saved, poisoned = saved;
      missing.tensors.erase(name);
      CHECK(refused(c.spec, missing));
      MemoryParameters::Tensor& t = longer.tensors.at(name);
      t.shape[0] += 1;
      t.data.resize(t.data.size() / static_cast<size_t>(t.shape[0] - 1) * static_cast<size_t>(t.shape[0]), 0.0f);
      CHECK(refused(c.spec, longer));
      for (const float bad : {std::nanf(""), INFINITY}) {
        poisoned.tensors.at(name).data.back() = bad;
        CHECK(refused(c.spec, poisoned));
      }
    }
    for (const auto& [name, value] : saved.values) {
      CAPTURE(c.label, name);
      MemoryParameters missing = saved, other = saved;
      missing.values.erase(name);
      CHECK(refused(c.spec, missing));
      for (const Json& bad : {Json(), Json("text"), Json::array({-1, 1e9}), Json({{"x", 1}})}) {
        other.values.at(name) = bad;
        CAPTURE(bad.dump());
        CHECK(refused(c.spec, other));
      }
    }
  }
}
