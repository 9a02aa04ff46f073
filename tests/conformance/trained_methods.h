// Every method of the registry, as the groups `test` and `test_...` of its configs/codecs/NAME.yaml build it, trained
// once.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>

#include "codec/build.h"
#include "support/cache_shape.h"
#include "support/catch.h"
#include "support/codec_rows.h"
#include "support/method_configs.h"
#include "support/train_data.h"

namespace vqkv::test {

struct Case {
  std::string label;
  UnitSpec spec;
  std::shared_ptr<const Codec> codec;  // trained
  TrainData data;
};

// A codec under the parameters of one prompt wherever no others are given.
class OfPrompt final : public Codec {
 public:
  OfPrompt(std::shared_ptr<Codec> codec, std::unique_ptr<SequenceState> state)
      : codec_(std::move(codec)), state_(std::move(state)) {}
  int channels() const override { return codec_->channels(); }
  const CodeLayout& layout() const override { return codec_->layout(); }
  RopePlacement rope() const override { return codec_->rope(); }
  TrainReport train(const TrainSet& set, const Rng& rng) override { return codec_->train(set, rng); }
  FitNeeds fit_needs() const override { return codec_->fit_needs(); }
  std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix v, ConstMatrix q) const override {
    return codec_->fit(k, v, q);
  }
  void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state) const override {
    codec_->encode(x, out, state ? state : state_.get());
  }
  DecodePlan plan(const PlanQuery& query) const override {
    return codec_->plan({query.level, query.state ? query.state : state_.get()});
  }
  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks& counted) const override { return codec_->constant_bytes(counted); }
  void save(ParameterWriter& out) const override { codec_->save(out); }
  void load(const ParameterReader& in) override { codec_->load(in); }

 private:
  std::shared_ptr<Codec> codec_;
  std::unique_ptr<SequenceState> state_;
};

// The codec as it codes `data`, with the parameters that it fits to them where it fits some.
inline std::shared_ptr<Codec> fitted(std::shared_ptr<Codec> codec, const UnitSpec& spec, const TrainData& data) {
  if (codec->fit_needs().tokens == 0) return codec;
  const bool key = spec.unit.role == Role::kKey;
  const Matrix<float> queries = rows_of(codec->fit_needs().queries ? data.x.rows : 0, spec.unit, 21);
  auto state = codec->fit(key ? data.x : data.other_role, key ? data.other_role : data.x, queries);
  return std::make_shared<OfPrompt>(std::move(codec), std::move(state));
}

inline std::shared_ptr<Codec> train(const UnitSpec& spec, const TrainData& data) {
  std::shared_ptr<Codec> codec = make_codec(spec);
  codec->train(data.set(spec.unit), Rng(99));
  return fitted(std::move(codec), spec, data);
}

// method x group x role x RoPE placement x heads of a unit, trained once; what does not fit has a reason and is left
// out.
inline const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> made;
    for (const Method* method : all_methods()) {
      const std::string name = method->describe().name;
      std::map<Role, int> accepted;
      for (const std::string& group : test_groups(name))
        for (const char* rope : {"post", "pre"})
          for (const int heads : {1, 2}) {
            Json config = test_config(name, group);
            set_rope(config, rope);
            config["heads"] = heads;
            for (const UnitSpec& spec : resolve_codec(config, make_shape(1, 3, 2, 64)).units) {
              if (spec.unit.first_head != 0 || (spec.unit.role == Role::kValue && std::string(rope) == "pre")) continue;
              if (!spec.check().empty()) continue;
              ++accepted[spec.unit.role];
              std::string label = name + " " + role_name(spec.unit.role) + " " + rope + " heads ";
              label += std::to_string(heads) + (group == "test" ? "" : " " + group);
              Case c{std::move(label), spec, nullptr, data_of(spec.unit, 512)};
              c.codec = train(spec, c.data);
              made.push_back(std::move(c));
            }
          }
      INFO(name);
      REQUIRE(accepted[Role::kKey] > 0);
      REQUIRE(accepted[Role::kValue] > 0);
    }
    return made;
  }();
  return all;
}

inline Matrix<float> head_rows(const Matrix<float>& x, int64_t n) {
  Matrix<float> out(n, x.cols);
  std::copy_n(x.data(), n * x.cols, out.data());
  return out;
}

inline double squared_distance(const Matrix<float>& a, const Matrix<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.storage.size(); ++i) sum += std::pow(double{a.storage[i]} - b.storage[i], 2);
  return sum;
}

inline bool same_codes(const CodeBlock& a, const CodeBlock& b) {
  const auto same_entry = [](const OverlayEntry& x, const OverlayEntry& y) {
    return x.token == y.token && x.channel == y.channel && x.value == y.value && x.add == y.add;
  };
  return a.fields == b.fields && a.sides == b.sides &&
         std::equal(a.overlay.begin(), a.overlay.end(), b.overlay.begin(), b.overlay.end(), same_entry);
}

inline Json formula_values(const UnitSpec& spec) {
  Json v = spec.knobs;
  v["head_dim"] = spec.unit.head_dim;
  v["layer"] = spec.unit.layer;
  v["heads"] = spec.unit.heads;
  v["channels"] = spec.unit.channels();
  v["role"] = role_name(spec.unit.role);
  return v;
}

}  // namespace vqkv::test
