// CommVQ: keys in residual stages of Z_a + i Z_b over groups of RoPE pairs, which commute with RoPE, divided by the
// length of the whole unit; values as bits, which a small network picks, times a learned matrix.
#include "codec/train/commvq.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "codec/methods/table_codec.h"
#include "codec/train/binary_code.h"
#include "core/clock.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct CommvqKnobs {
  int codebooks = 11;
  int bits = 6;
  int group = 0;
  std::string scale_type = "bf16";
  std::string stored_as = "f16";
  int steps = 12;
  int points = 8192;
  int start_points = 128;
  int value_bits = 1;
  int hidden = 0;
  int value_steps = 300;
  int value_batch = 256;
  double learning_rate = 1e-3;
  double output_loss = 0;
  TrainNeeds needs() const { return {.mass = output_loss > 0}; }
  KnobTable table() {
    return KnobTable()
        .integer("codebooks", &codebooks, 1, 256, "residual stages of a key, of two codes each (the paper: 11 or 21)")
        .integer("bits", &bits, 1, 8, "bits of a code: 2^bits complex codewords a stage, which both codes share")
        .integer(
            "group", &group, 0, 65536,
            "channels of a key that share codes, whole RoPE pairs, of several heads where it is wider than one; 0: "
            "the paper's 128, or all of a narrower unit")
        .choice("scale_type", &scale_type, {"bf16", "f16", "f32"},
                "storage of a token's length over the unit; codes are of values divided by the stored one")
        .choice("stored_as", &stored_as, {"f16", "bf16", "f32"},
                "storage of codewords, of the matrix and of the network")
        .integer("steps", &steps, 1, 10000, "steps of expectation and maximization a stage (published: 100)")
        .effort()
        .integer("points", &points, 1, 1 << 24, "tokens trained on at most; more are sampled (published: 1048576)")
        .integer("start_points", &start_points, 1, 1 << 24,
                 "of those, tokens of the soft assignment that a stage starts from (published: all)")
        .integer("value_bits", &value_bits, 1, 16, "bits of a value, each a row of the matrix (the paper: 1 or 2)")
        .integer(
            "hidden", &hidden, 0, 65536,
            "width of the network between its layers; 0: that of its output, 2 * value_bits a channel, at most 4096")
        .integer("value_steps", &value_steps, 1, 10000000,
                 "steps of gradient descent on matrix and network (published: 100000 to 1000000)")
        .effort()
        .integer("value_batch", &value_batch, 1, 1 << 20, "values a step (published: 8192)")
        .real("learning_rate", &learning_rate, 1e-6, 1.0, "of those steps")
        .real("output_loss", &output_loss, 0, 1e6,
              "weight of attention's output error beside the values' own, each over its mean square (published: 1 "
              "beside 1/2, so 2); above 0 it needs the attention mass that each token received");
  }
  int hidden_width(const UnitShape& unit) const {
    return hidden == 0 ? std::min(4096, 2 * value_bits * unit.channels()) : hidden;
  }
  // Of a group of keys.
  int width(const UnitShape& unit) const { return group == 0 ? std::min(128, unit.channels()) : group; }
  TrainMemory memory(const UnitShape& unit, int64_t rows) const;
};

TrainMemory CommvqKnobs::memory(const UnitShape& unit, int64_t rows) const {
  const double channels = unit.channels(), f = sizeof(float);
  if (unit.role == Role::kValue) {
    // The network with its gradient and two moments, then with what it is packed into; rows of a step on their way.
    const double out = value_bits * channels, inner = hidden_width(unit);
    const double layers = inner * (channels + 2 * out), network = layers + out * channels;
    const double batch = std::min<double>(static_cast<double>(rows), value_batch);
    return {.scratch = f * (3 * network + batch * (3 * channels + 4 * inner + 7 * out)),
            .kept = f * (network + layers)};
  }
  // The rows over their lengths, a group of the sample, and the sums of 64 runs of it and of the start's products.
  const double entries = std::exp2(bits), of = width(unit),
               points_used = std::min<double>(static_cast<double>(rows), points);
  const double sums = std::min(64.0, std::ceil(points_used / 256)) * entries * (entries + of) * sizeof(double);
  const double books = codebooks * entries * channels * f;
  return {.scratch = f * channels * static_cast<double>(rows) + points_used * (f * of + 2 * sizeof(double)) +
                     std::max(sums, f * entries * entries * (of + 64)),
          .kept = 3 * books + codebooks * entries * entries * f * channels / of};  // words, packed, plan's; products
}

class CommvqKeys final : public Codec {
 public:
  CommvqKeys(const CommvqKnobs& k, const UnitShape& unit)
      : knobs_(k),
        channels_(unit.channels()),
        groups_(unit.channels() / k.width(unit)),
        rope_(unit.rope),
        stored_as_(dtype_from_name(k.stored_as)),
        channel_(group_channels("rope_pair", unit, groups_)) {
    const int slots = k.codebooks * groups_;
    layout_.fields = {{"first", k.bits, slots, true}, {"second", k.bits, slots, true}};
    layout_.sides = {{"token_scale", dtype_from_name(k.scale_type), 1, true}};
  }

  int channels() const override { return channels_; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return rope_; }
  int levels() const override { return knobs_.codebooks; }
  CodeLayout level_layout(int level) const override {
    VQKV_CHECK(level >= 0 && level < knobs_.codebooks);
    CodeLayout out = layout_;
    for (FieldSpec& field : out.fields) field.slots = (level + 1) * groups_;
    return out;
  }

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    const Stopwatch watch;
    check_encode_input(*this, set.x);
    Matrix<float> x(set.x.rows, set.x.cols);
    std::vector<float> scale(static_cast<size_t>(set.x.rows));
    divide(set.x, x, scale.data());
    CommVqOptions options;
    options.stages = knobs_.codebooks;
    options.entries = entries();
    options.stored_as = stored_as_;
    options.points = knobs_.points;
    options.start_points = knobs_.start_points;
    options.steps = knobs_.steps;
    TrainReport report;
    std::vector<PairQuantizer> quantizers;
    for (int g = 0; g < groups_; ++g) {
      CommVqTraining t = train_commvq(x.view().slice_cols(g * width(), width()), set.weight, scale, options,
                                      rng.split(static_cast<uint64_t>(g)));
      quantizers.push_back(std::move(t.quantizer));
      report.vectors = std::max(report.vectors, t.vectors);
      report.iterations += t.iterations;
      report.curve.insert(report.curve.end(), t.curve.begin(), t.curve.end());
    }
    install(std::move(quantizers));
    report.seconds = watch.seconds();
    return report;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    VQKV_CHECK(!quantizers_.empty());
    out.resize(layout_, x.rows);
    const int64_t slots = layout_.fields[0].slots;
    constexpr int64_t kChunk = 128;
    parallel_chunks(x.rows, kChunk, [&](int64_t first, int64_t end) {
      Matrix<float> divided(end - first, channels_);
      divide(x.slice_rows(first, end - first), divided, out.sides[0].data() + first);
      for (int64_t g = 0; g < groups_; ++g)
        quantizers_[static_cast<size_t>(g)].encode_rows(divided.view().slice_cols(g * width(), width()),
                                                        out.fields[0].data() + first * slots + g,
                                                        out.fields[1].data() + first * slots + g, slots, groups_);
    });
  }

  DecodePlan plan(const PlanQuery& query) const override {
    VQKV_CHECK(codewords_ && query.level < knobs_.codebooks);
    DecodePlan plan = empty_plan();
    plan.token_scale_side = 0;
    TableTerm term;
    term.slots = (query.level < 0 ? knobs_.codebooks : query.level + 1) * groups_;
    term.entries = static_cast<int>(entries());
    term.width = width();
    term.books = knobs_.codebooks * groups_;
    term.codewords = codewords_;
    term.stored_as = stored_as_;
    for (int slot = 0; slot < term.slots; ++slot) {
      term.book_of_slot.push_back(slot);
      const auto from = channel_.begin() + slot % groups_ * width();
      term.channel.insert(term.channel.end(), from, from + width());
    }
    plan.terms.emplace_back(term);
    term.field = 1;
    term.op = TableTerm::Op::kRotate90;  // of the same books, which are counted once
    plan.terms.emplace_back(std::move(term));
    return plan;
  }

  void save(ParameterWriter& out) const override {
    VQKV_CHECK(codewords_);
    out.tensor("codewords", {knobs_.codebooks * groups_, entries(), width()}, codewords_->data());
  }
  void load(const ParameterReader& in) override {
    const AlignedVector<float> words =
        read_stored(in, "codewords", {knobs_.codebooks * groups_, entries(), width()}, stored_as_);
    const int64_t size = entries() * width();
    std::vector<PairQuantizer> quantizers;
    for (int64_t g = 0; g < groups_; ++g) {
      std::vector<Matrix<float>> books;
      for (int64_t stage = 0; stage < knobs_.codebooks; ++stage) {
        books.emplace_back(entries(), width());
        std::copy_n(words.data() + (stage * groups_ + g) * size, size, books.back().data());
      }
      quantizers.emplace_back(std::move(books));
    }
    install(std::move(quantizers));
  }

 private:
  int width() const { return channels_ / groups_; }
  int64_t entries() const { return int64_t{1} << knobs_.bits; }

  // Rows in the order of groups, [x..., y...] each, over the stored lengths: scale (rows).
  void divide(ConstMatrix x, MutMatrix out, float* scale) const {
    for (int64_t r = 0; r < x.rows; ++r) {
      const float* row = x.row(r);
      double square = 0;
      for (int c = 0; c < channels_; ++c) square += double{row[c]} * row[c];
      scale[r] = round_scale(layout_.sides[0].type, static_cast<float>(std::min(std::sqrt(square), 3e38)));
      for (int c = 0; c < channels_; ++c) out(r, c) = row[channel_[static_cast<size_t>(c)]] / scale[r];
    }
  }

  void install(std::vector<PairQuantizer> quantizers) {
    quantizers_ = std::move(quantizers);
    auto words = std::make_shared<AlignedVector<float>>();
    for (int stage = 0; stage < knobs_.codebooks; ++stage)
      for (const PairQuantizer& q : quantizers_) {
        const AlignedVector<float>& book = q.stage(stage).words().storage;
        words->insert(words->end(), book.begin(), book.end());
      }
    codewords_ = std::move(words);
  }

  CommvqKnobs knobs_;
  int channels_, groups_;
  RopePlacement rope_;
  DType stored_as_;
  std::vector<int32_t> channel_;  // (groups, width): unit channel of each codeword element
  CodeLayout layout_;
  std::vector<PairQuantizer> quantizers_;                  // (groups)
  std::shared_ptr<const AlignedVector<float>> codewords_;  // (stages, groups, entries, width)
};

class CommvqValues final : public Codec {
 public:
  CommvqValues(const CommvqKnobs& k, const UnitShape& unit)
      : knobs_(k), channels_(unit.channels()), hidden_(k.hidden_width(unit)), stored_as_(dtype_from_name(k.stored_as)) {
    layout_.fields = {{"bits", 8, k.value_bits * channels_ / 8, true}};
    layout_.sides = {{"token_scale", dtype_from_name(k.scale_type), 1, true}};
  }

  int channels() const override { return channels_; }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return RopePlacement::kPost; }

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    const Stopwatch watch;
    check_encode_input(*this, set.x);
    BinaryCodeOptions options;
    options.symbols = symbols();
    options.hidden = hidden_;
    options.steps = knobs_.value_steps;
    options.batch = knobs_.value_batch;
    options.learning_rate = knobs_.learning_rate;
    BinaryCode code = train_binary_code(set.x, loss_weights(set), options, rng.split(0));
    BinaryCode::visit(code, [&](const std::string& name, const std::vector<int64_t>& shape, float* values) {
      if (name == "channel_scale") return;  // what rows are divided by: it may be any size
      round_to(stored_as_, values, std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()));
    });
    install(std::move(code));
    TrainReport report;
    report.vectors = set.x.rows;
    report.iterations = knobs_.value_steps;
    report.curve = {error_over_variance(set, rng.split(1))};
    report.seconds = watch.seconds();
    return report;
  }

  void encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const override {
    check_encode_input(*this, x);
    VQKV_CHECK(encoder_);
    out.resize(layout_, x.rows);
    const int64_t slots = layout_.fields[0].slots;
    constexpr int64_t kChunk = 64;
    parallel_chunks(x.rows, kChunk, [&](int64_t first, int64_t end) {
      float* scale = out.sides[0].data() + first;
      encoder_->encode_rows(x.slice_rows(first, end - first), out.fields[0].data() + first * slots, slots, scale);
      for (int64_t r = 0; r < end - first; ++r) scale[r] = round_scale(layout_.sides[0].type, scale[r]);
    });
  }

  DecodePlan plan(const PlanQuery&) const override {
    VQKV_CHECK(encoder_);
    DecodePlan plan = empty_plan();
    plan.token_scale_side = 0;
    plan.inner_bias = bias_;
    SignTerm term;
    term.rows = knobs_.value_bits * channels_;
    term.width = channels_;
    term.projection = {encoder_, &encoder_->code().rows.storage};
    term.stored_as = stored_as_;
    term.factor = 0.5f;
    plan.terms = {term};
    return plan;
  }

  using Codec::constant_bytes;
  int64_t constant_bytes(CountedBooks& counted) const override {
    const BinaryCode& code = encoder_->code();
    const size_t network =
        code.first.storage.size() + code.first_bias.size() + code.second.storage.size() + code.second_bias.size();
    return Codec::constant_bytes(counted) + static_cast<int64_t>(network * dtype_size(stored_as_)) +
           static_cast<int64_t>(code.channel_scale.size() * sizeof(float));
  }

  void save(ParameterWriter& out) const override {
    VQKV_CHECK(encoder_);
    BinaryCode::visit(encoder_->code(), [&](const std::string& name, const std::vector<int64_t>& shape,
                                            const float* values) { out.tensor(name, shape, values); });
  }
  void load(const ParameterReader& in) override {
    BinaryCode code = empty_binary_code(channels_, symbols(), hidden_);
    BinaryCode::visit(code, [&](const std::string& name, const std::vector<int64_t>& shape, float* values) {
      const bool scale = name == "channel_scale";
      const AlignedVector<float> read = read_stored(in, name, shape, scale ? DType::kF32 : stored_as_);
      if (scale && !(std::ranges::min(read) > 0)) fail_data("channel_scale: holds a scale that is not above 0");
      std::ranges::copy(read, values);
    });
    install(std::move(code));
  }

 private:
  // Of each token's squared error. The error of an output is the sum of p e over tokens; where their errors e are
  // uncorrelated, its square is expected to be the sum of p^2 |e|^2, and p^2 summed over queries is what a trace has.
  std::vector<float> loss_weights(const TrainSet& set) const {
    std::vector<float> weight(set.weight.begin(), set.weight.end());
    if (knobs_.output_loss <= 0) return weight;
    if (static_cast<int64_t>(set.received_mass2.size()) != set.x.rows)
      fail_data("output_loss needs the received attention mass of every token, which the trace does not hold");
    double own = 0, outputs = 0;
    for (int64_t r = 0; r < set.x.rows; ++r) {
      double square = 0;
      for (int c = 0; c < channels_; ++c) square += double{set.x(r, c)} * set.x(r, c);
      own += square;
      outputs += set.received_mass2[static_cast<size_t>(r)] * square;
    }
    if (!(outputs > 0) || !std::isfinite(outputs)) fail_data("output_loss found no attention mass");
    weight.resize(static_cast<size_t>(set.x.rows), 1.0f);
    for (size_t r = 0; r < weight.size(); ++r)
      weight[r] *= static_cast<float>(1 + knobs_.output_loss * own / outputs * set.received_mass2[r]);
    return weight;
  }

  int64_t symbols() const { return int64_t{knobs_.value_bits} * channels_ / 2; }

  void install(BinaryCode code) {
    encoder_ = std::make_shared<const BinaryEncoder>(std::move(code));
    const Matrix<float>& rows = encoder_->code().rows;
    // Bits are 0 or 1, signs -1 or 1.
    bias_.assign(static_cast<size_t>(channels_), 0.0f);
    for (int64_t c = 0; c < rows.cols; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < rows.rows; ++r) sum += rows(r, c);
      bias_[static_cast<size_t>(c)] = static_cast<float>(sum / 2);
    }
  }

  double error_over_variance(const TrainSet& set, Rng rng) const {
    const std::vector<int64_t> picked = rng.sample(set.x.rows, 4096);
    Matrix<float> x(static_cast<int64_t>(picked.size()), channels_), y(x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(set.x.row(picked[static_cast<size_t>(r)]), x.cols, x.row(r));
    CodeBlock block;
    encode(x, block, nullptr);
    decode(block, y);
    double error = 0, variance = 0;
    for (int64_t c = 0; c < x.cols; ++c) {
      double sum = 0, square = 0;
      for (int64_t r = 0; r < x.rows; ++r) {
        error += std::pow(double{x(r, c)} - y(r, c), 2);
        sum += x(r, c);
        square += double{x(r, c)} * x(r, c);
      }
      variance += square - sum * sum / static_cast<double>(x.rows);
    }
    return error / std::max(variance, 1e-30);
  }

  CommvqKnobs knobs_;
  int channels_, hidden_;
  DType stored_as_;
  CodeLayout layout_;
  std::shared_ptr<const BinaryEncoder> encoder_;
  std::vector<float> bias_;  // half their sum
};

struct CommvqCodec {
  static std::unique_ptr<Codec> make(const CommvqKnobs& k, const UnitShape& unit) {
    if (unit.role == Role::kKey) return std::make_unique<CommvqKeys>(k, unit);
    return std::make_unique<CommvqValues>(k, unit);
  }
};

MethodInfo describe_commvq() {
  MethodInfo info;
  info.name = "commvq";
  info.title = "keys as sums of Z_a + i Z_b over groups of RoPE pairs, values as bits times a learned matrix";
  info.paper =
      "Li et al., CommVQ: Commutative Vector Quantization for KV Cache Compression, ICML 2025, arXiv 2506.18879";
  info.bibtex = "li2025commvq";
  info.family = "table";
  // 2: sums of the matrix are divided by channel scales in double; 3: key books are multiples of one step
  info.version = 3;
  info.bits =
      "(role == v ? value_bits : 2 * bits * codebooks / (group == 0 ? min(128, channels) : group)) + (scale_type == "
      "f32 ? 32 : 16) / channels";
  info.caveat =
      "a token's length over all heads of the layer takes 16 bits of keys and of values: pool them (heads: all, the "
      "default). Key books count once, both codes read them: half of what the paper's table counts, which has each "
      "codeword as a matrix of 2 x 2, and 1/64 of the table of all sums that the authors' code keeps beside them and "
      "leaves out of its account, as the paper does the values' network, which counts here. Their search of that table "
      "and ours of 2 * 2^bits inner products find the same codes. Training is theirs with fewer steps and tokens "
      "(preset published: all of them); their no improvement within 1e-5 is here 1e-5 of the error. Values start "
      "as a scalar quantizer of each channel: from a random start, as published, hundreds of steps end far above it. "
      "They learn from their own error alone unless output_loss is set: the authors add that of attention's outputs, "
      "from the model that runs beside; here it is its expectation where the errors of tokens are uncorrelated and "
      "each query looks as it did at exact keys: each token's error by the squared probabilities that it received. "
      "Their code draws symbols at random when it encodes, too; here the largest is taken. It codes prompts after they "
      "were attended exactly, replay mode prefill-exact, keeps no sinks, and 0 to 127 exact tokens, which come with "
      "`preset: default`";
  const Json cache = {{"sinks", 0}, {"window", 1}, {"flush", 128}};
  const auto preset = [&](Json codec, const char* note) {
    codec.update({{"heads", "all"}, {"k", {{"rope", "pre"}}}});
    return Json{{"codec", codec}, {"cache", cache}, {"note", note}};
  };
  info.presets = {
      {"default", preset({{"output_loss", 2}}, "CommVQ-1: 1.03 bits a key value, 1 a value")},
      {"commvq2", preset({{"codebooks", 21}, {"value_bits", 2}, {"output_loss", 2}}, "CommVQ-2: 1.97 and 2 bits")},
      {"published", preset({{"steps", 100},
                            {"points", 1048576},
                            {"start_points", 1048576},
                            {"value_steps", 100000},
                            {"value_batch", 8192},
                            {"output_loss", 2}},
                           "the training effort of CommVQ-1: hours a layer on a CPU, and days")}};
  return info;
}

std::string check_commvq(const CommvqKnobs& k, const UnitShape& unit) {
  if (unit.role == Role::kValue)
    return k.value_bits * unit.channels() % 8 == 0
               ? ""
               : fmt::format("{} bits a value of {} channels are no whole bytes", k.value_bits, unit.channels());
  const int width = k.width(unit);
  if (unit.channels() % width != 0)
    return fmt::format("groups of {} channels don't divide the {} of a unit", width, unit.channels());
  return check_groups("rope_pair", unit, unit.channels() / width);
}

}  // namespace

VQKV_DEFINE_METHOD(commvq, CommvqKnobs, CommvqCodec, describe_commvq, check_commvq)

}  // namespace vqkv
