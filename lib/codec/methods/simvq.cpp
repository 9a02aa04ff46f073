// Residual SimVQ, the code of VQKV.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "codec/methods/branches.h"
#include "codec/methods/table_codec.h"
#include "codec/train/simvq.h"

namespace vqkv {
namespace {

struct SimVqKnobs {
  int codebooks = 28;
  int bits = 10;
  int low_codebooks = 0;
  int low_period = 8192;
  std::string encoding = "greedy";
  int beam = 4;
  std::string trainer = "als";
  int rounds = 50;
  int points = 64;
  int steps = 200;
  int batch = 65536;
  double learning_rate = 1e-3;
  double beta = 0.25;
  std::string stored_as = "f16";
  KnobTable table() {
    return KnobTable()
        .integer("codebooks", &codebooks, 1, 256, "residual stages")
        .integer("bits", &bits, 1, 16, "bits of a code: 2^bits codewords a stage")
        .integer("low_codebooks", &low_codebooks, 0, 255,
                 "keys: how many of the codebooks are the stages of a branch of its own for the channels of low RoPE "
                 "frequency; the others code the other channels. 0: one branch of all channels")
        .integer("low_period", &low_period, 1, 1 << 30,
                 "tokens: a RoPE pair that takes more of them for a turn is low, as is a channel that doesn't rotate; "
                 "meant is the context that the model was trained at. Behind a transform that mixes channels the "
                 "branches are two sets of channels and no more")
        .choice("encoding", &encoding, {"greedy", "beam"},
                "nearest codeword stage by stage, or the best of several partial sums")
        .integer("beam", &beam, 1, 64, "partial sums kept with encoding beam")
        .choice("trainer", &trainer, {"als", "sgd"}, "alternating least squares, or the published gradient descent")
        .integer("rounds", &rounds, 1, 1000, "als: rounds a stage at most; a stage ends when a round gains under 1e-4")
        .effort()
        .integer("points", &points, 1, 1 << 20, "training vectors a codeword at most; more are sampled")
        .integer("steps", &steps, 1, 1000000, "sgd: steps of Adam on all stages at once")
        .effort()
        .integer("batch", &batch, 1, 1 << 24, "sgd: vectors a step")
        .real("learning_rate", &learning_rate, 1e-6, 1.0, "sgd: learning rate")
        .real("beta", &beta, 0.0, 10.0, "sgd: weight of the stages' own errors")
        .choice("stored_as", &stored_as, {"f16", "bf16", "f32", "f8e5m2"}, "storage of codewords");
  }
  TrainMemory memory(const UnitShape& unit, int64_t rows) const;
  std::vector<int32_t> branch(const UnitShape& unit, bool low) const {
    return channels_by_period(unit, low_period, low);
  }
  // Knobs of a branch, whose unit is branch_unit.
  SimVqKnobs of_branch(bool low) const {
    SimVqKnobs k = *this;
    k.codebooks = low ? low_codebooks : codebooks - low_codebooks;
    k.low_codebooks = 0;
    return k;
  }
};

UnitShape branch_unit(UnitShape unit, const std::vector<int32_t>& channel) {
  unit.heads = 1;
  unit.head_dim = static_cast<int>(channel.size());
  unit.rope_facts = RopeFacts::plain(unit.head_dim, 0, 1);  // its pairs are not where a head has them
  return unit;
}

TableShape simvq_shape(const SimVqKnobs& k, const UnitShape& unit) {
  TableShape s;
  s.channels = unit.channels();
  s.stages = k.codebooks;
  s.bits = k.bits;
  s.stored_as = dtype_from_name(k.stored_as);
  s.rope = unit.rope;
  return s;
}

TrainMemory SimVqKnobs::memory(const UnitShape& unit, int64_t rows) const {
  if (low_codebooks > 0) {  // one after the other
    TrainMemory out;
    for (const bool low : {true, false}) {
      const TrainMemory part = of_branch(low).memory(branch_unit(unit, branch(unit, low)), rows);
      out.scratch = std::max(out.scratch, part.scratch);
      out.kept += part.kept;
    }
    return out;
  }
  return table_memory(simvq_shape(*this, unit), rows, encoding == "beam" ? beam : 1, false, points);
}

class SimVqCodec final : public TableCodec {
 public:
  SimVqCodec(const SimVqKnobs& k, const UnitShape& unit)
      : TableCodec(simvq_shape(k, unit), k.encoding == "beam" ? k.beam : 1, group_channels("contiguous", unit, 1)),
        knobs_(k) {}

  static std::unique_ptr<Codec> make(const SimVqKnobs& k, const UnitShape& unit) {
    if (k.low_codebooks == 0) return std::make_unique<SimVqCodec>(k, unit);
    std::vector<Branch> branches;
    for (const bool low : {true, false}) {
      std::vector<int32_t> channel = k.branch(unit, low);
      auto codec = std::make_unique<SimVqCodec>(k.of_branch(low), branch_unit(unit, channel));
      branches.push_back({low ? "low" : "high", std::move(channel), std::move(codec)});
    }
    return make_branches(std::move(branches), unit.rope);
  }

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    const auto start = std::chrono::steady_clock::now();
    check_encode_input(*this, set.x);
    SimVqOptions options;
    options.stages = shape().stages;
    options.entries = shape().entries();
    options.beam = beam();
    options.stored_as = shape().stored_as;
    options.points_per_codeword = knobs_.points;
    options.rounds = knobs_.rounds;
    options.sgd = knobs_.trainer == "sgd";
    options.steps = knobs_.steps;
    options.batch = knobs_.batch;
    options.learning_rate = knobs_.learning_rate;
    options.beta = knobs_.beta;
    SimVqTraining t = train_simvq(set.x, set.weight, options, rng);
    install({t.quantizer});
    stages_ = std::move(t.stages);
    TrainReport report;
    report.vectors = t.vectors;
    report.iterations = t.iterations;
    report.curve = std::move(t.curve);
    report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

  // The layers and seeds make the codewords again, but only with this machine's arithmetic: the codewords are stored
  // too.
  void save(ParameterWriter& out) const override {
    TableCodec::save(out);
    const int64_t count = shape().stages, width = shape().width();
    AlignedVector<float> linear, bias;
    Json seeds = Json::array();
    for (const SimVqStage& s : stages_) {
      linear.insert(linear.end(), s.linear.storage.begin(), s.linear.storage.end());
      bias.insert(bias.end(), s.bias.begin(), s.bias.end());
      seeds.push_back(fmt::format("{:016x}", s.seed));
    }
    out.tensor("linear", {count, width, width}, linear.data());
    out.tensor("bias", {count, width}, bias.data());
    out.facts("seeds", seeds);
  }

  void load(const ParameterReader& in) override {
    const int64_t count = shape().stages, width = shape().width();
    const auto linear = in.tensor("linear", {count, width, width});
    const auto bias = in.tensor("bias", {count, width});
    for (const auto* values : {&linear, &bias})
      for (const float v : *values)
        if (!std::isfinite(v)) fail_data(fmt::format("linear, bias: {} is not finite", v));
    const Json seeds = in.facts("seeds");
    if (!seeds.is_array() || static_cast<int64_t>(seeds.size()) != count)
      fail_data(fmt::format("seeds: expected {} of 16 hexadecimal digits", count));
    std::vector<SimVqStage> stages(static_cast<size_t>(count));
    for (size_t i = 0; i < stages.size(); ++i) {
      const std::string text = seeds[i].is_string() ? seeds[i].get<std::string>() : "";
      if (text.size() != 16 || text.find_first_not_of("0123456789abcdef") != std::string::npos)
        fail_data(fmt::format("seeds: {} is not 16 hexadecimal digits", seeds[i].dump()));
      stages[i].seed = std::stoull(text, nullptr, 16);
      stages[i].linear = Matrix<float>(width, width);
      std::copy_n(linear.data() + static_cast<int64_t>(i) * width * width, width * width, stages[i].linear.data());
      stages[i].bias.assign(bias.begin() + static_cast<int64_t>(i) * width,
                            bias.begin() + static_cast<int64_t>(i + 1) * width);
    }
    TableCodec::load(in);
    stages_ = std::move(stages);
  }

 private:
  SimVqKnobs knobs_;
  std::vector<SimVqStage> stages_;
};

MethodInfo describe_simvq() {
  MethodInfo info;
  info.name = "simvq";
  info.title = "residual SimVQ (VQKV): frozen random codebooks through trained linear layers";
  info.paper = "VQKV: Wang et al. (arXiv 2603.16435); SimVQ: Zhu et al. (arXiv 2411.02038)";
  info.bibtex = "wang2026vqkv";
  info.family = "table";
  info.bits = "bits * codebooks / channels";
  info.caveat =
      "the published 82.8 % is 4.375 bits a key value and 1.125 a value value, before window and codebooks; k-means "
      "(rvq) is "
      "about 10 % better where training vectors are plenty, simvq where they are few";
  info.assumed =
      "who shares books (share: the presets share them over the heads of a layer), keys after RoPE (rope), and of "
      "training all but learning rate and batch: trainer sgd takes Adam on all stages at once and beta 0.25 for the "
      "stages' own errors. Of the two branches of key channels only the conference version's reviews tell: the presets "
      "with branches split between RoPE pairs at a turn of low_period tokens and halve the stages (low_codebooks), "
      "both of them guesses; the other presets have one branch, as the later text";
  const auto shape = [](int key_books, int value_books) {
    return Json{{"share", "heads"},
                {"k", {{"codebooks", key_books}, {"bits", 10}}},
                {"v", {{"codebooks", value_books}, {"bits", 9}}}};
  };
  const auto branches = [](Json codec, int low_books) {
    codec["k"]["low_codebooks"] = low_books;
    return codec;
  };
  info.presets = {
      {"default", Json::object()},
      {"vqkv",
       {{"codec", shape(56, 16)},
        {"note", "head_dim 128; published with 4 sinks and a window of 1024; that heads share books is our reading"}}},
      {"vqkv64", {{"codec", shape(28, 8)}, {"note", "the same bits a value at head_dim 64"}}},
      {"vqkv_branches",
       {{"codec", branches(shape(56, 16), 28)},
        {"note", "vqkv with keys in two branches by RoPE frequency, half of the stages each: the same bits a value"}}},
      {"vqkv64_branches", {{"codec", branches(shape(28, 8), 14)}, {"note", "vqkv64 likewise"}}}};
  return info;
}

std::string check_simvq(const SimVqKnobs& k, const UnitShape& unit) {
  if (k.low_codebooks == 0) return "";
  if (unit.role == Role::kValue) return "low_codebooks: values have no frequencies of RoPE; give it for k alone";
  if (k.low_codebooks >= k.codebooks)
    return fmt::format("low_codebooks: {} of {} codebooks leave none for the other channels", k.low_codebooks,
                       k.codebooks);
  const size_t low = k.branch(unit, true).size(), all = static_cast<size_t>(unit.channels());
  if (low == 0 || low == all)
    return fmt::format(
        "low_period: {} of {} channels belong to RoPE pairs that take over {} tokens for a turn or don't "
        "rotate; both branches need some",
        low, all, k.low_period);
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(simvq, SimVqKnobs, SimVqCodec, describe_simvq, check_simvq)

}  // namespace vqkv
