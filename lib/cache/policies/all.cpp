// Every token stays: exactly while it is recent, as codes afterwards.
#include "cache/policies/kinds.h"
#include "core/json.h"

namespace vqkv {
namespace {

class All final : public PolicyKind {
 public:
  PolicyInfo describe() const override {
    return {.name = "all",
            .title = "every token stays, as codes once it leaves the window",
            .paper = "",
            .bits = "(16 (sinks + window) + codec (T - sinks - window)) / T",
            .caveat = ""};
  }
  void apply(const Json&, CachePolicy&) const override {}
};

}  // namespace

VQKV_DEFINE_POLICY(all, All)

}  // namespace vqkv
