// A name that nobody registered is refused in one wording, whatever it should have named.
#include <functional>

#include "attention/attention.h"
#include "cache/policies/kinds.h"
#include "cache/policy.h"
#include "codec/codec.h"
#include "codec/codec_set.h"
#include "codec/transform/transform.h"
#include "core/dtype.h"
#include "core/json.h"
#include "core/names.h"
#include "generation/replay.h"
#include "generation/strategies/strategy.h"
#include "metric/metric.h"
#include "support/catch.h"
#include "support/error_of.h"

using namespace vqkv;

namespace {

// One registry: its names, and what looks one up.
struct Named {
  std::string what;
  std::vector<std::string> names;
  std::function<void(const std::string&)> find;
};

template <class Entries>
std::vector<std::string> names_of(const Entries& entries) {
  std::vector<std::string> out;
  for (const auto* e : entries) out.push_back(e->describe().name);
  return out;
}

}  // namespace

TEST_CASE("every registry refuses an unknown name in the same words", "[names]") {
  std::vector<std::string> backends = attention_backend_names();
  backends.push_back("auto");
  for (const Named& r : std::vector<Named>{
           {"codec", names_of(all_methods()), [](const std::string& n) { find_method(n); }},
           {"transform", names_of(all_transforms()), [](const std::string& n) { find_transform(n, ""); }},
           {"policy", names_of(all_policies()), [](const std::string& n) { find_policy(n, ""); }},
           {"strategy", names_of(all_strategies()), [](const std::string& n) { find_strategy(n); }},
           {"metric", names_of(all_metrics()), [](const std::string& n) { find_metric(n); }},
           {"attention backend", backends, [](const std::string& n) { make_attention_backend(n); }},
           {"dtype", {}, [](const std::string& n) { dtype_from_name(n); }},
           {"mode", {"forced", "stepwise", "prefill-exact", "fake-quant"}, [](const std::string& n) {
              replay_mode_from_name(n);
            }}}) {
    INFO(r.what);
    const std::string wrong = r.names.empty() ? "bf17" : r.names[0] + "x", message = error_of([&] { r.find(wrong); });
    CHECK_THAT(message, Catch::StartsWith(r.what + " '" + wrong + "' is not known, did you mean '"));
    CHECK_THAT(message, Catch::Contains("'?; allowed: "));
    if (!r.names.empty()) CHECK(message == unknown_name(r.what, wrong, r.names));
  }
}

TEST_CASE("every configuration refuses an unknown key, a wrong type and an unknown choice in the same words",
          "[names]") {
  const auto codec = [](const char* text) { return error_of([&] { canonical_codec_config(Json::parse(text)); }); };
  const auto cache = [](const char* text) { return error_of([&] { canonical_cache_config(Json::parse(text)); }); };
  for (const std::string& message : {codec(R"({"name": "rtn", "bist": 4})"),
                                     codec(R"({"name": "rtn", "transform": [{"name": "rotation", "knd": 1}]})"),
                                     codec(R"({"name": "rtn", "overrides": [{"laiers": 1, "set": {"bits": 2}}]})"),
                                     cache(R"({"windw": 1})"), cache(R"({"k": {"windw": 1}})")}) {
    INFO(message);
    CHECK_THAT(message, Catch::Contains(": unknown key '"));
    CHECK_THAT(message, Catch::Contains("', did you mean '"));
    CHECK_THAT(message, Catch::Contains("'?; allowed: "));
  }
  CHECK_THAT(codec(R"({"name": "rtn", "bits": "x"})"), Catch::StartsWith("codec.bits: expected an integer in "));
  CHECK_THAT(codec(R"({"name": "rtn", "bits": 99})"), Catch::Contains(", found 99"));
  CHECK_THAT(codec(R"({"name": 3})"), Catch::StartsWith("codec.name: expected a text, found 3"));
  CHECK_THAT(codec(R"({"name": "rtn", "heads": 0})"), Catch::StartsWith("codec.heads: expected "));
  CHECK_THAT(cache(R"({"sinks": -1})"), Catch::StartsWith("cache.sinks: expected an integer in [0, "));
  CHECK_THAT(codec(R"({"name": "rtn", "rope": "pots"})"),
             Catch::StartsWith("codec.rope: 'pots' is not known, did you mean 'post'?; allowed: post, pre"));
  CHECK_THAT(cache(R"({"rule": "kiwi"})"),
             Catch::StartsWith(
                 "cache.rule: 'kiwi' is not known, did you mean 'kivi'?; allowed: window, kivi, residual, none"));
}
