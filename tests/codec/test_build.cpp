#include "codec/build.h"

#include <atomic>

#include "core/error.h"
#include "core/json.h"
#include "core/thread_pool.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/memory_parameters.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Every channel of unit (layer, first head) has the mean 10 * layer + head.
struct MeanSource final : TrainSource {
  mutable std::atomic<int> calls = 0;
  int64_t rows = 50;
  TrainData unit(const UnitShape& u, const TrainNeeds&) const override {
    ++calls;
    TrainData d;
    Rng rng(static_cast<uint64_t>(u.layer * 100 + u.first_head));
    d.x = Matrix<float>(rows, u.channels());
    for (float& v : d.x.storage) v = static_cast<float>(rng.normal() * 1e-3 + 10 * u.layer + u.first_head);
    d.position.assign(static_cast<size_t>(rows), 0);
    d.document.assign(static_cast<size_t>(rows), 0);
    return d;
  }
};

float mean_of(const CodecSet& set, int layer, int head, Role role) {
  MemoryParameters p;
  set.units()[static_cast<size_t>(set.unit_index(layer, head, role))].codec->save(p);
  return p.tensors.at("transform.0.mean").data[0];
}

std::shared_ptr<const CodecSet> train(const char* config, const CacheShape& shape, const TrainSource& source,
                                      TrainOptions options = {}) {
  return train_codec_set(resolve_codec(parse_json(config, "test"), shape), shape, source, options);
}

}  // namespace

TEST_CASE("codecs are shared as the configuration says", "[build]") {
  const CacheShape shape = make_shape(3, 1, 2, 8);
  const MeanSource source;
  const auto none = train(R"({"name": "exact", "transform": ["center"]})", shape, source);
  CHECK(mean_of(*none, 2, 1, Role::kKey) == Approx(21).margin(.01));
  CHECK(none->constant_bytes() == 12 * 8 * 4);
  const auto heads = train(R"({"name": "exact", "transform": ["center"], "share": "heads"})", shape, source);
  CHECK(mean_of(*heads, 2, 1, Role::kKey) == Approx(20.5).margin(.01));
  CHECK(mean_of(*heads, 2, 0, Role::kKey) == Approx(20.5).margin(.01));
  CHECK(heads->constant_bytes() == 6 * 8 * 4);
  const auto layers = train(R"({"name": "exact", "transform": ["center"], "share": "layers"})", shape, source);
  CHECK(mean_of(*layers, 0, 0, Role::kValue) == Approx(10.5).margin(.01));
  CHECK(layers->constant_bytes() == 2 * 8 * 4);
  // What an override sets apart does not share.
  const auto apart = train(R"({"name": "exact", "transform": ["center"], "share": "layers",
                               "overrides": [{"layers": [0], "set": {"dtype": "f32"}}]})",
                           shape, source);
  CHECK(mean_of(*apart, 0, 0, Role::kKey) == Approx(0.5).margin(.01));
  CHECK(mean_of(*apart, 1, 0, Role::kKey) == Approx(15.5).margin(.01));
}

TEST_CASE("pooled rows are thinned evenly", "[build]") {
  MeanSource source;
  source.rows = 700000;  // two units of 700,000: half a million each are kept
  const CacheShape shape = make_shape(1, 1, 2, 2);
  const auto set = train(R"({"name": "exact", "transform": ["center"], "share": "heads"})", shape, source);
  CHECK(mean_of(*set, 0, 0, Role::kKey) == Approx(0.5).margin(1e-3));
}

TEST_CASE("what learns nothing reads nothing", "[build]") {
  const CacheShape shape = make_shape(2, 1, 2, 8);
  const MeanSource source;
  const auto set = train(R"({"name": "rtn", "group": 8, "transform": ["hadamard", "token_scale"]})", shape, source);
  CHECK(source.calls == 0);
  CHECK(set->units().size() == 8);
  train(R"({"name": "rtn", "group": 8, "v": {"transform": ["center"]}})", shape, source);
  CHECK(source.calls == 4);
}

TEST_CASE("failures name the unit, skips their reason", "[build]") {
  const CacheShape shape = make_shape(2, 1, 2, 8);
  MeanSource empty;
  empty.rows = 0;
  CHECK_THROWS_WITH(train(R"({"name": "exact", "transform": ["center"]})", shape, empty),
                    Catch::Contains("layer") && Catch::Contains("no token"));
  CHECK_THROWS_WITH(train(R"({"name": "rtn", "heads": 3})", shape, empty), Catch::Contains("divide"));
}

TEST_CASE("progress counts codecs and may stop the work", "[build]") {
  const CacheShape shape = make_shape(4, 1, 2, 8);
  const MeanSource source;
  int64_t last = 0;
  TrainOptions options;
  options.progress = [&](int64_t done, int64_t total) {
    CHECK(total == 16);
    CHECK(done == ++last);
    if (done == 3) fail_usage("stopped");
  };
  CHECK_THROWS_AS(train(R"({"name": "exact", "transform": ["center"]})", shape, source, options), Error);
  CHECK(last < 16);
}
