#include "codec/methods/branches.h"

#include <algorithm>
#include <numbers>
#include <variant>

#include "core/error.h"

namespace vqkv {
namespace {

std::string named(const Branch& b, const std::string& name) { return b.name + "/" + name; }

class BranchWriter final : public ParameterWriter {
 public:
  BranchWriter(ParameterWriter& out, const Branch& branch) : out_(out), branch_(branch) {}
  void tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data) override {
    out_.tensor(named(branch_, name), shape, data);
  }
  void facts(const std::string& name, const Json& value) override { out_.facts(named(branch_, name), value); }

 private:
  ParameterWriter& out_;
  const Branch& branch_;
};

class BranchReader final : public ParameterReader {
 public:
  BranchReader(const ParameterReader& in, const Branch& branch) : in_(in), branch_(branch) {}
  AlignedVector<float> tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    return in_.tensor(named(branch_, name), shape);
  }
  std::vector<int64_t> shape(const std::string& name) const override { return in_.shape(named(branch_, name)); }
  Json facts(const std::string& name) const override { return in_.facts(named(branch_, name)); }

 private:
  const ParameterReader& in_;
  const Branch& branch_;
};

Matrix<float> columns_of(ConstMatrix x, const std::vector<int32_t>& channel) {
  Matrix<float> out(x.rows, static_cast<int64_t>(channel.size()));
  for (int64_t r = 0; r < x.rows; ++r)
    for (size_t c = 0; c < channel.size(); ++c) out(r, static_cast<int64_t>(c)) = x(r, channel[c]);
  return out;
}

class BranchCodec final : public Codec {
 public:
  BranchCodec(std::vector<Branch> branches, RopePlacement rope) : branches_(std::move(branches)), rope_(rope) {
    std::vector<int32_t> all;
    for (const Branch& b : branches_) {
      const CodeLayout& inner = b.codec->layout();
      VQKV_CHECK(b.codec->channels() == static_cast<int>(b.channel.size()) && b.codec->rope() == rope);
      VQKV_CHECK(inner.block_tokens == 1 && inner.sides.empty() && !inner.overlay);
      all.insert(all.end(), b.channel.begin(), b.channel.end());
      levels_ = std::max(levels_, b.codec->levels());
    }
    std::sort(all.begin(), all.end());
    channels_ = static_cast<int>(all.size());
    for (int c = 0; c < channels_; ++c) VQKV_CHECK(all[static_cast<size_t>(c)] == c);
    layout_ = level_layout(levels_ - 1);
  }

  int channels() const override { return channels_; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }
  int levels() const override { return levels_; }

  CodeLayout level_layout(int level) const override {
    VQKV_CHECK(level >= 0 && level < levels_);
    CodeLayout out;
    for (const Branch& b : branches_)
      for (FieldSpec f : b.codec->level_layout(level_of(b, level)).fields) {
        f.name = b.name + "_" + f.name;
        out.fields.push_back(std::move(f));
      }
    return out;
  }

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    check_encode_input(*this, set.x);
    TrainReport report;
    for (size_t i = 0; i < branches_.size(); ++i) {
      const Matrix<float> x = columns_of(set.x, branches_[i].channel);
      TrainSet part;  // what else the set has is of all channels
      part.x = x;
      part.position = set.position;
      part.document = set.document;
      part.weight = set.weight;
      part.head_dim = branches_[i].codec->channels();
      const TrainReport of = branches_[i].codec->train(part, rng.split(i));
      report.seconds += of.seconds;
      report.vectors = std::max(report.vectors, of.vectors);
      report.iterations += of.iterations;
      report.curve.insert(report.curve.end(), of.curve.begin(), of.curve.end());
    }
    return report;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    out.resize(layout_, x.rows);
    size_t field = 0;
    for (const Branch& b : branches_) {
      CodeBlock codes;
      b.codec->encode(columns_of(x, b.channel), codes);
      for (std::vector<uint16_t>& f : codes.fields) out.fields[field++] = std::move(f);
    }
  }

  DecodePlan plan(const PlanQuery& query) const override {
    VQKV_CHECK(query.level < levels_);
    DecodePlan out = empty_plan();
    int field = 0;
    for (const Branch& b : branches_) {
      DecodePlan inner = b.codec->plan({query.level < 0 ? -1 : level_of(b, query.level), nullptr});
      VQKV_CHECK(is_identity(inner.map) && inner.inner_bias.empty() && inner.outer_bias.empty());
      const auto other = [] { fail_internal("a branch is coded by tables alone"); };
      const auto move =
          Overloaded{[&](TableTerm& t) {
                       t.field += field;
                       for (int32_t& c : t.channel) c = b.channel[static_cast<size_t>(c)];
                     },
                     [&](LevelsTerm&) { other(); }, [&](DenseTerm&) { other(); }, [&](SignTerm&) { other(); }};
      for (PlanTerm& term : inner.terms) {
        std::visit(move, term);
        out.terms.push_back(std::move(term));
      }
      field += static_cast<int>(inner.layout.fields.size());
    }
    return out;
  }

  void save(ParameterWriter& out) const override {
    for (const Branch& b : branches_) {
      BranchWriter writer(out, b);
      b.codec->save(writer);
      out.facts(named(b, "branch"), Json(b.channel));
    }
  }
  void load(const ParameterReader& in) override {
    for (const Branch& b : branches_) {
      if (in.facts(named(b, "branch")) != Json(b.channel))
        fail_data(named(b, "branch") + ": not the channels that the frequencies of RoPE and the knobs give");
      b.codec->load(BranchReader(in, b));
    }
  }

 private:
  static int level_of(const Branch& b, int level) { return std::min(level, b.codec->levels() - 1); }

  std::vector<Branch> branches_;
  RopePlacement rope_;
  int channels_ = 0;
  int levels_ = 1;
  CodeLayout layout_;
};

}  // namespace

std::unique_ptr<Codec> make_branches(std::vector<Branch> branches, RopePlacement rope) {
  return std::make_unique<BranchCodec>(std::move(branches), rope);
}

std::vector<int32_t> channels_by_period(const UnitShape& unit, int64_t period, bool slow) {
  std::vector<bool> is_slow(static_cast<size_t>(unit.head_dim), true);
  const std::vector<double>& frequency = unit.rope_facts.inverse_frequency;
  for (size_t p = 0; p < frequency.size(); ++p) {
    const auto [x, y] = unit.pair(static_cast<int>(p));
    is_slow[static_cast<size_t>(x)] = is_slow[static_cast<size_t>(y)] =
        frequency[p] * static_cast<double>(period) < 2 * std::numbers::pi;
  }
  std::vector<int32_t> out;
  for (int c = 0; c < unit.channels(); ++c)
    if (is_slow[static_cast<size_t>(c % unit.head_dim)] == slow) out.push_back(c);
  return out;
}

}  // namespace vqkv
