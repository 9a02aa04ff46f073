// Methods from outside the tree, registered by hand.
#include <algorithm>
#include <mutex>

#include "codec/build.h"
#include "codec/codec_set.h"
#include "core/error.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/dummy_codecs.h"

using namespace vqkv;
using Catch::Contains;

namespace {

// A built-in method under another name.
class Renamed final : public Method {
 public:
  Renamed(const Method& method, std::string name) : method_(method), name_(std::move(name)) {}
  MethodInfo describe() const override {
    MethodInfo info = method_.describe();
    info.name = name_;
    return info;
  }
  std::vector<Knob> knobs() const override { return method_.knobs(); }
  Json canonical(const Json& knobs, const std::string& path) const override { return method_.canonical(knobs, path); }
  std::string check(const Json& knobs, const UnitShape& unit) const override { return method_.check(knobs, unit); }
  TrainNeeds needs(const Json& knobs) const override { return method_.needs(knobs); }
  std::unique_ptr<Codec> make(const Json& knobs, const UnitShape& unit) const override {
    return method_.make(knobs, unit);
  }

 private:
  const Method& method_;
  std::string name_;
};

}  // namespace

TEST_CASE("a registered method is found, listed and planned beside the built-in ones", "[registry]") {
  static const Renamed mine(find_method("rtn"), "mine");
  CHECK_THROWS_WITH(find_method("mine"), Contains("codec 'mine' is not known"));
  const size_t before = all_methods().size();
  register_method(mine);
  CHECK(&find_method("mine") == &mine);
  CHECK(all_methods().size() == before + 1);
  CHECK(all_methods().back() == &mine);
  CHECK(find_method("rtn").describe().name == "rtn");
  const CacheShape shape = test::make_shape(1, 1, 2, 32);
  CHECK(resolve_codec({{"name", "mine"}, {"bits", 3}}, shape).units.at(0).method == "mine");

  for (const char* taken : {"rtn", "mine"}) {
    const Renamed again(mine, taken);
    CHECK_THROWS_WITH(register_method(again), Contains("'" + std::string(taken) + "' is registered already"));
  }
  for (const char* bad : {"", "Mine", "my-method", "2x", "a b", "a.b"}) {
    const Renamed named(mine, bad);
    CHECK_THROWS_WITH(register_method(named), Contains("can't be called '" + std::string(bad) + "'"));
  }
  CHECK(all_methods().size() == before + 1);
}

namespace {

// Rows and what they were given of the layer below, of every codec that trained.
struct Learned {
  std::mutex mutex;  // codecs train side by side
  std::vector<std::pair<Matrix<float>, Matrix<float>>> sets;
  static Matrix<float> copy(ConstMatrix x) {
    Matrix<float> out(x.rows, x.cols);
    for (int64_t t = 0; t < x.rows; ++t) std::copy_n(x.row(t), x.cols, out.row(t));
    return out;
  }
};

class LowerMethod final : public Method {
 public:
  LowerMethod(std::string name, Learned& learned, bool says = true)
      : name_(std::move(name)), learned_(learned), says_(says) {}
  MethodInfo describe() const override {
    MethodInfo info;
    info.name = name_;
    return info;
  }
  std::vector<Knob> knobs() const override { return {}; }
  Json canonical(const Json& knobs, const std::string&) const override { return knobs; }
  std::string check(const Json&, const UnitShape&) const override { return ""; }
  TrainNeeds needs(const Json&) const override { return {.rows = true, .lower = says_}; }
  std::unique_ptr<Codec> make(const Json&, const UnitShape& unit) const override {
    struct Trained final : test::DummyCodec {
      Trained(const UnitShape& of, Learned& to) : DummyCodec(of), learned(to) {
        layout_.sides = {{"row", DType::kF32, channels(), true}};
      }
      TrainReport train(const TrainSet& set, const Rng&) override {
        const std::lock_guard lock(learned.mutex);
        learned.sets.emplace_back(Learned::copy(set.x), Learned::copy(set.lower));
        return {};
      }
      bool sees_lower() const override { return true; }
      void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override {}
      DecodePlan plan(const PlanQuery&) const override { return empty_plan(); }
      Learned& learned;
    };
    return std::make_unique<Trained>(unit, learned_);
  }

 private:
  std::string name_;
  Learned& learned_;
  bool says_;
};

// Rows that tell layer, head and token.
struct ByLayer final : TrainSource {
  TrainData unit(const UnitShape& unit, const TrainNeeds&) const override {
    TrainData d;
    d.x = Matrix<float>(10, unit.channels());
    for (int64_t t = 0; t < 10; ++t) {
      d.position.push_back(static_cast<int32_t>(t));
      d.document.push_back(0);
      for (int c = 0; c < unit.channels(); ++c)
        d.x(t, c) = static_cast<float>(1000 * (unit.layer + 1) + 100 * unit.first_head + 10 * t + c % 10);
    }
    return d;
  }
};

}  // namespace

TEST_CASE("a method that sees the layer below learns from its rows", "[registry][lower]") {
  static Learned learned;
  static const LowerMethod above("above", learned), silent("silent", learned, false);
  register_method(above);
  register_method(silent);
  const CacheShape shape = test::make_shape(3, 1, 2, 8);
  for (const char* share : {"none", "heads", "layers"}) {
    learned.sets.clear();
    const CodecPlan plan = resolve_codec({{"name", "above"}, {"share", share}}, shape);
    REQUIRE(plan.skip.empty());
    const auto set = train_codec_set(plan, shape, ByLayer(), {});
    CHECK(set->lower_unit(static_cast<size_t>(set->unit_index(2, 1, Role::kKey))) == set->unit_index(1, 1, Role::kKey));
    int64_t rows = 0;
    for (const auto& [x, lower] : learned.sets) {
      CAPTURE(share);
      REQUIRE(lower.rows == x.rows);
      for (int64_t t = 0; t < x.rows; ++t)
        for (int64_t c = 0; c < x.cols; ++c) REQUIRE(lower(t, c) == (x(t, c) < 2000 ? 0 : x(t, c) - 1000));
      rows += x.rows;
    }
    CHECK(rows == 3 * 2 * 2 * 10);
  }
  CHECK_THROWS_AS(train_codec_set(resolve_codec({{"name", "silent"}}, shape), shape, ByLayer(), {}), Error);
  CHECK_THAT(resolve_codec({{"name", "above"}, {"transform", {"center"}}}, shape).skip,
             Contains("drop the transforms"));
  CHECK(find_method("above").needs({}).names() == std::vector<std::string>{"tokens", "the layer below's tokens"});
}
