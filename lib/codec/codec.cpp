#include "codec/codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/finite.h"
#include "core/names.h"

namespace vqkv {

#define VQKV_METHOD(name) const Method& vqkv_method_##name();
#include "codec/methods/methods.inc"
#undef VQKV_METHOD

std::string role_name(Role r) { return r == Role::kKey ? "k" : "v"; }

TrainNeeds& TrainNeeds::operator|=(const TrainNeeds& o) {
  rows |= o.rows;
  mass |= o.mass;
  queries |= o.queries;
  moments |= o.moments;
  output_weight |= o.output_weight;
  other_role |= o.other_role;
  gradients |= o.gradients;
  lower |= o.lower;
  return *this;
}

std::vector<std::string> TrainNeeds::names() const {
  const std::pair<bool, const char*> all[] = {{rows, "tokens"},
                                              {mass, "received attention mass"},
                                              {queries, "queries"},
                                              {moments, "second moments of the queries"},
                                              {output_weight, "W_O"},
                                              {other_role, "the other role's tokens"},
                                              {gradients, "squared gradients"},
                                              {lower, "the layer below's tokens"}};
  std::vector<std::string> out;
  for (const auto& [set, name] : all)
    if (set) out.emplace_back(name);
  return out;
}

Json TrainReport::to_json() const {
  return {{"seconds", seconds}, {"vectors", vectors}, {"iterations", iterations}, {"curve", curve}};
}

std::unique_ptr<SequenceState> Codec::fit(ConstMatrix, ConstMatrix, ConstMatrix) const { return nullptr; }

void Codec::encode_at(ConstMatrix x, const EncodeContext&, CodeBlock& out, const SequenceState* state) const {
  encode(x, out, state);
}

CodeLayout Codec::level_layout(int) const { fail_usage("this codec has no levels: its codes can't be cut"); }

void Codec::decode(const CodeBlock& block, MutMatrix x, const PlanQuery& query, ConstMatrix lower) const {
  decode_plan(plan(query), block, x, lower);
}

DecodePlan Codec::empty_plan() const {
  DecodePlan plan;
  plan.channels = plan.code_channels = channels();
  plan.layout = layout();
  plan.rope = rope();
  plan.query = query_form();
  return plan;
}

DecodePlan Codec::dense_plan() const {
  DecodePlan plan = empty_plan();
  DenseTerm term;
  term.channel.resize(static_cast<size_t>(channels()));
  std::iota(term.channel.begin(), term.channel.end(), 0);
  plan.terms = {term};
  return plan;
}

int64_t Codec::constant_bytes(CountedBooks& counted) const { return plan().constant_bytes(counted); }
int64_t Codec::constant_bytes() const {
  CountedBooks none;
  return constant_bytes(none);
}

void check_encode_input(const Codec& codec, ConstMatrix x) {
  VQKV_CHECK(x.cols == codec.channels() && x.rows % codec.layout().block_tokens == 0);
  for (int64_t t = 0; t < x.rows; ++t) {
    const float* row = x.row(t);
    if (all_finite(row, x.cols)) continue;
    for (int64_t c = 0; c < x.cols; ++c)
      if (!std::isfinite(row[c]))
        fail_data(fmt::format("token {}, channel {}: {} cannot be coded; values must be finite", t, c, row[c]));
  }
}

float round_side(DType type, float value) {
  if (type == DType::kF16) value = std::fmin(std::fmax(value, -65504.0f), 65504.0f);
  if (type == DType::kBF16) value = std::fmin(std::fmax(value, -0x1.FEp127f), 0x1.FEp127f);
  round_to(type, &value, 1);
  return value;
}

float round_scale(DType type, float value) {
  // A subnormal scale would flush or lose all its digits: the smallest normal number is the floor.
  const float floor_value = type == DType::kF16 ? 0x1p-14f : 0x1p-126f;
  return round_side(type, std::fmax(value, floor_value));
}

TrainMemory Method::memory(const Json&, const UnitShape& unit, int64_t rows) const {
  return {.scratch = static_cast<double>(rows) * unit.channels() * sizeof(float)};
}

namespace {

// Names beside methods: describing every entry anew would dominate the resolution of plans.
struct Registry {
  std::vector<const Method*> methods = {
#define VQKV_METHOD(name) &vqkv_method_##name(),
#include "codec/methods/methods.inc"
#undef VQKV_METHOD
  };
  std::vector<std::string> names;
  Registry() {
    for (const Method* m : methods) names.push_back(m->describe().name);
  }
};

Registry& registry() {
  static Registry all;
  return all;
}

}  // namespace

const std::vector<const Method*>& all_methods() { return registry().methods; }

const Method& find_method(const std::string& name, const std::string& path) {
  const auto& [methods, names] = registry();
  const auto it = std::find(names.begin(), names.end(), name);
  if (it != names.end()) return *methods[static_cast<size_t>(it - names.begin())];
  fail_unknown(path.empty() ? "codec" : path + ": codec", name, names);
}

void register_method(const Method& method) {
  auto& [methods, names] = registry();
  const std::string name = method.describe().name;
  if (name.empty() || !(name[0] >= 'a' && name[0] <= 'z') ||
      name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") != std::string::npos)
    fail_usage(fmt::format(
        "a method can't be called '{}': lower-case letters, digits and underscores are allowed, after a letter", name));
  if (std::find(names.begin(), names.end(), name) != names.end())
    fail_usage(fmt::format("a method called '{}' is registered already; give yours another name", name));
  methods.push_back(&method);
  names.push_back(name);
}

}  // namespace vqkv
