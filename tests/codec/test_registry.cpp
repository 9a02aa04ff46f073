// Methods from outside the tree, registered by hand.
#include <algorithm>

#include "codec/codec_set.h"
#include "core/error.h"
#include "support/catch.h"

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
  CacheShape shape;
  shape.layers = 1;
  shape.q_heads = shape.kv_heads = 2;
  shape.head_dim = 32;
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
