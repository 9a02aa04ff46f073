// What `ls` and `explain` say of everything that is registered: source, knobs, bits, what to mind, and what was assumed
// where a source leaves something open (baseline-methods 24, vq-methods a and c).
#include <set>
#include <string>

#include "cache/policies/kinds.h"
#include "codec/codec.h"
#include "codec/transform/transform.h"
#include "generation/strategies/strategy.h"
#include "support/catch.h"

using namespace vqkv;

namespace {

using Names = std::set<std::string>;

// Common practice, of no paper: nothing to cite.
const Names kOfNoPaper = {"codec exact",           "transform identity", "transform center", "transform channel_scale",
                          "transform token_scale", "policy all",         "strategy plain"};
const Names kNothingToMind = {"transform identity", "policy all", "strategy plain"};
const Names kAssumed = {"codec calibquant", "codec kvquant",  "codec kumar",        "codec simvq",
                        "codec specache",   "transform deco", "strategy quantspec", "strategy specache"};

struct Found {
  Names of_no_paper, nothing_to_mind, assumed;

  template <class Info>
  void add(const std::string& kind, const Info& info, const std::vector<Knob>& knobs) {
    const std::string name = kind + " " + info.name;
    CAPTURE(name);
    CHECK_FALSE(info.title.empty());
    CHECK(info.version >= 1);
    for (const Knob& k : knobs) {
      CAPTURE(k.name);
      CHECK_FALSE(k.help.empty());
      CHECK_FALSE(k.range.empty());
    }
    if (info.paper.empty()) of_no_paper.insert(name);
    if (info.caveat.empty()) nothing_to_mind.insert(name);
    if (!info.assumed.empty()) assumed.insert(name);
    // What nobody could confirm has a field of its own.
    CHECK_THAT(info.caveat, !Catch::Contains("unconfirmed"));
  }
};

}  // namespace

TEST_CASE("everything registered says its source, knobs, bits, what to mind and what was assumed", "[conformance]") {
  Found found;
  for (const Method* m : all_methods()) {
    found.add("codec", m->describe(), m->knobs());
    CHECK_FALSE(m->describe().bits.empty());
  }
  for (const TransformKind* k : all_transforms()) {
    found.add("transform", k->describe(), k->knobs());
    CHECK_FALSE(k->describe().side_bits.empty());
    CHECK_FALSE(k->describe().width.empty());
  }
  for (const PolicyKind* k : all_policies()) {
    found.add("policy", k->describe(), k->knobs());
    CHECK_FALSE(k->describe().bits.empty());
  }
  for (const StrategyKind* k : all_strategies()) {
    found.add("strategy", k->describe(), k->knobs());
    CHECK_FALSE(k->describe().bits.empty());
  }
  CHECK(found.of_no_paper == kOfNoPaper);
  CHECK(found.nothing_to_mind == kNothingToMind);
  CHECK(found.assumed == kAssumed);
}
