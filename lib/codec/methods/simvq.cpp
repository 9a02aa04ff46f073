// Residual SimVQ, the code of VQKV.
#include <fmt/format.h>

#include <chrono>
#include <cmath>

#include "codec/methods/table_codec.h"
#include "codec/train/simvq.h"

namespace vqkv {
namespace {

struct SimVqKnobs {
  int codebooks = 28;
  int bits = 10;
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
};

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
  return table_memory(simvq_shape(*this, unit), rows, encoding == "beam" ? beam : 1, false, points);
}

class SimVqCodec final : public TableCodec {
 public:
  SimVqCodec(const SimVqKnobs& k, const UnitShape& unit)
      : TableCodec(simvq_shape(k, unit), k.encoding == "beam" ? k.beam : 1, group_channels("contiguous", unit, 1)),
        knobs_(k) {}

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
      "who shares books (share: the presets share them over the heads of a layer), keys after RoPE (rope), how the "
      "conference version splits key channels into two branches (one here), and of training all but learning rate and "
      "batch: trainer sgd takes Adam on all stages at once and beta 0.25 for the stages' own errors";
  const auto shape = [](int key_books, int value_books) {
    return Json{{"share", "heads"},
                {"k", {{"codebooks", key_books}, {"bits", 10}}},
                {"v", {{"codebooks", value_books}, {"bits", 9}}}};
  };
  info.presets = {
      {"default", Json::object()},
      {"vqkv",
       {{"codec", shape(56, 16)},
        {"note", "head_dim 128; published with 4 sinks and a window of 1024; that heads share books is our reading"}}},
      {"vqkv64", {{"codec", shape(28, 8)}, {"note", "the same bits a value at head_dim 64"}}}};
  return info;
}

std::string check_simvq(const SimVqKnobs&, const UnitShape&) { return ""; }

}  // namespace

VQKV_DEFINE_METHOD(simvq, SimVqKnobs, SimVqCodec, describe_simvq, check_simvq)

}  // namespace vqkv
