// Residual vector quantization for the KV cache as published by Kumar: standard-deviation scale, strided groups for
// keys, books shared by the groups and heads of a layer, k-means start, moving-average training.
#include <algorithm>
#include <chrono>
#include <numeric>

#include "codec/methods/table_codec.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct KumarKnobs {
  int codebooks = 8;
  int bits = 11;
  int group = 32;
  std::string grouping = "published";
  std::string scale_type = "f16";
  std::string stored_as = "f16";
  int iterations = 10;
  int points = 50;
  int ema_steps = 50;
  int ema_batch = 16384;
  double ema_decay = 0.99;
  KnobTable table() {
    return KnobTable()
        .integer("codebooks", &codebooks, 1, 64, "residual stages")
        .integer("bits", &bits, 1, 16, "bits of a code: 2^bits codewords a stage")
        .integer("group", &group, 1, 4096,
                 "channels of a group inside a head; all groups and heads of the unit share the books")
        .choice("grouping", &grouping, {"published", "strided", "contiguous"},
                "published: for keys strided over channels in the order x_0, y_0, x_1, y_1, ... of RoPE pairs, as the "
                "authors' models lay them, so x and y of a pair part; contiguous for values. strided: over channels as "
                "they lie here, x and y of a pair together")
        .choice("scale_type", &scale_type, {"f16", "bf16", "f32", "f8e5m2"},
                "storage of the standard deviation of a token and head; codes are of values divided by the stored one")
        .choice("stored_as", &stored_as, {"f16", "bf16", "f32", "f8e5m2"}, "storage of codewords")
        .integer("iterations", &iterations, 1, 1000, "k-means iterations of the start")
        .effort()
        .integer("points", &points, 1, 1 << 20, "vectors a codeword in the start at most (published: 50)")
        .integer("ema_steps", &ema_steps, 0, 100000, "moving-average steps after the start (published: 200)")
        .effort()
        .integer("ema_batch", &ema_batch, 1, 1 << 24, "vectors a step, sampled")
        .real("ema_decay", &ema_decay, 0.0, 0.99999, "what a step keeps of counts and sums");
  }
  TrainMemory memory(const UnitShape& unit, int64_t rows) const;
};

TableShape kumar_shape(const KumarKnobs& k, const UnitShape& unit) {
  TableShape s;
  s.channels = unit.channels();
  s.groups = unit.channels() / k.group;
  s.stages = k.codebooks;
  s.bits = k.bits;
  s.shared_book = true;
  s.scale_slots = unit.heads;
  s.scale_type = dtype_from_name(k.scale_type);
  s.stored_as = dtype_from_name(k.stored_as);
  s.rope = unit.rope;
  return s;
}

TrainMemory KumarKnobs::memory(const UnitShape& unit, int64_t rows) const {
  return table_memory(kumar_shape(*this, unit), rows, 1, false, points);
}

// Inside a head of d channels, strided group j holds channels j, j + d / group, ...: of keys as published those of the
// interleaved layout of the authors' models, where the members of a RoPE pair are neighbours.
std::vector<int32_t> kumar_channels(const KumarKnobs& k, const UnitShape& unit) {
  const bool interleaved = k.grouping == "published" && unit.role == Role::kKey;
  UnitShape head = unit;
  head.heads = 1;
  auto order =
      group_channels(interleaved || k.grouping == "strided" ? "strided" : "contiguous", head, unit.head_dim / k.group);
  if (interleaved && unit.head_dim % 2 == 0)
    for (int32_t& c : order) {
      const auto [x, y] = head.pair(c / 2);
      c = c % 2 == 0 ? x : y;
    }
  std::vector<int32_t> channel;
  for (int h = 0; h < unit.heads; ++h)
    for (const int32_t c : order) channel.push_back(h * unit.head_dim + c);
  return channel;
}

// Counts and sums that forget: one stage's moving averages.
struct Average {
  std::vector<double> count;
  Matrix<double> sum;
};

class KumarCodec final : public TableCodec {
 public:
  KumarCodec(const KumarKnobs& k, const UnitShape& unit)
      : TableCodec(kumar_shape(k, unit), 1, kumar_channels(k, unit)), knobs_(k) {}

  TrainReport train(const TrainSet& set, const Rng& rng) override {
    const auto start = std::chrono::steady_clock::now();
    check_encode_input(*this, set.x);
    // One pool of group vectors: rows are (token, head, group).
    Matrix<float> scaled(set.x.rows, set.x.cols);
    gather(set.x, scaled, nullptr);
    const ConstMatrix pool(scaled.data(), set.x.rows * shape().groups, shape().width());
    std::vector<float> weight;
    for (const float w : set.weight) weight.insert(weight.end(), static_cast<size_t>(shape().groups), w);

    ResidualOptions options;
    options.stages = shape().stages;
    options.entries = shape().entries();
    options.stored_as = DType::kF32;  // the averages go on from here; storage rounds at the end
    options.kmeans = {knobs_.iterations, knobs_.points};
    ResidualTraining t = train_residual(pool, weight, options, rng.split(0));
    TrainReport report;
    report.vectors = pool.rows;
    report.iterations = t.iterations + knobs_.ema_steps;
    report.curve = t.curve;
    std::vector<Matrix<float>> books = moving_average(pool, weight, t.quantizer, rng.split(1));
    for (auto& book : books) round_codewords(shape().stored_as, book);
    install({ResidualQuantizer(std::move(books), 1)});
    report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

 private:
  // The weighted counts and sums of residuals of one batch, stage by stage, in row order.
  static std::vector<Average> batch_sums(ConstMatrix x, const std::vector<float>& weight, const ResidualQuantizer& q) {
    const int stages = q.stages();
    std::vector<uint16_t> codes(static_cast<size_t>(x.rows * stages));
    q.encode(x, codes.data());
    std::vector<Average> out(static_cast<size_t>(stages));
    for (Average& a : out) {
      a.count.assign(static_cast<size_t>(q.entries()), 0.0);
      a.sum = Matrix<double>(q.entries(), q.width());
    }
    // A stage only writes its own sums; its residual follows from the codes of the stages before it.
    parallel_for(stages, [&](int64_t i) {
      Average& a = out[static_cast<size_t>(i)];
      std::vector<float> rest(static_cast<size_t>(x.cols));
      for (int64_t r = 0; r < x.rows; ++r) {
        std::copy_n(x.row(r), x.cols, rest.data());
        for (int64_t j = 0; j < i; ++j) {
          const float* c = q.books()[static_cast<size_t>(j)].row(codes[static_cast<size_t>(r * stages + j)]);
          for (size_t k = 0; k < rest.size(); ++k) rest[k] -= c[k];
        }
        const auto code = codes[static_cast<size_t>(r * stages + i)];
        const double w = weight.empty() ? 1.0 : double{weight[static_cast<size_t>(r)]};
        a.count[code] += w;
        for (size_t k = 0; k < rest.size(); ++k) a.sum(code, static_cast<int64_t>(k)) += w * rest[k];
      }
    });
    return out;
  }

  std::vector<Matrix<float>> moving_average(ConstMatrix pool, const std::vector<float>& pool_weight,
                                            const ResidualQuantizer& start, Rng rng) const {
    std::vector<Matrix<float>> books = start.books();
    if (knobs_.ema_steps == 0) return books;
    constexpr double kSmoothing = 1e-5;  // Laplace
    constexpr float kClip = 100.0f;
    const double decay = knobs_.ema_decay;
    std::vector<Average> average;
    for (int step = 0; step < knobs_.ema_steps; ++step) {
      const std::vector<int64_t> rows = rng.sample(pool.rows, knobs_.ema_batch);
      Matrix<float> batch(static_cast<int64_t>(rows.size()), pool.cols);
      std::vector<float> weight;
      for (size_t r = 0; r < rows.size(); ++r) {
        std::copy_n(pool.row(rows[r]), pool.cols, batch.row(static_cast<int64_t>(r)));
        if (!pool_weight.empty()) weight.push_back(pool_weight[static_cast<size_t>(rows[r])]);
      }
      const std::vector<Average> now = batch_sums(batch, weight, ResidualQuantizer(books, 1));
      if (average
              .empty()) {  // the averages start at the first batch's counts, with sums that reproduce the k-means books
        average = now;
        for (size_t i = 0; i < average.size(); ++i)
          for (int64_t s = 0; s < books[i].rows; ++s)
            for (int64_t k = 0; k < books[i].cols; ++k)
              average[i].sum(s, k) = average[i].count[static_cast<size_t>(s)] * static_cast<double>(books[i](s, k));
      }
      for (size_t i = 0; i < average.size(); ++i) {
        Average& a = average[i];
        double total = 0;
        for (size_t s = 0; s < a.count.size(); ++s) {
          a.count[s] = decay * a.count[s] + (1 - decay) * now[i].count[s];
          total += a.count[s];
        }
        for (size_t v = 0; v < a.sum.storage.size(); ++v)
          a.sum.storage[v] = decay * a.sum.storage[v] + (1 - decay) * now[i].sum.storage[v];
        const double denominator = total + static_cast<double>(a.count.size()) * kSmoothing;
        for (size_t s = 0; s < a.count.size(); ++s) {
          // A codeword that no batch has met has neither count nor sum: it keeps its place.
          if (a.count[s] <= 0) continue;
          const double smoothed = (a.count[s] + kSmoothing) / denominator * total;
          for (int64_t k = 0; k < books[i].cols; ++k)
            books[i](static_cast<int64_t>(s), k) =
                std::clamp(static_cast<float>(a.sum(static_cast<int64_t>(s), k) / smoothed), -kClip, kClip);
        }
      }
    }
    return books;
  }

  KumarKnobs knobs_;
};

MethodInfo describe_kumar() {
  MethodInfo info;
  info.name = "kumar";
  info.title = "residual codes of scaled 32-channel groups, one set of books for a layer";
  info.paper = "Kumar, Residual vector quantization for KV cache compression (ENLSP 2024, PMLR 262, arXiv 2410.15704)";
  info.bibtex = "kumar2024residual";
  info.family = "table";
  info.version = 2;  // 2: strided keys in the authors' layout of RoPE pairs
  info.bits = "bits * codebooks / group + (scale_type == f32 ? 32 : scale_type == f8e5m2 ? 8 : 16) / head_dim";
  info.caveat =
      "published on keys before RoPE and without an exact window; share books over a layer's heads with share: heads "
      "or heads: all; at head_dim 64 the scale alone costs 0.25 bits a value, and the published groups of a key are "
      "all x "
      "and all y of its RoPE pairs";
  info.assumed = "the paper's body was not available: all but its abstract is read from the authors' code";
  info.presets = {
      {"default", Json::object()},
      {"published",
       {{"codec", {{"ema_steps", 200}, {"ema_batch", 65536}, {"rope", "pre"}, {"share", "heads"}}},
        {"note", "every token coded; 2.875 bits a value at head_dim 128, 3.0 at 64"}}},
      {"vqllm2",
       {{"codec", {{"bits", 8}, {"rope", "pre"}, {"share", "heads"}}}, {"note", "2 bits a value and the scale"}}},
      {"vqllm1",
       {{"codec", {{"bits", 8}, {"codebooks", 4}, {"rope", "pre"}, {"share", "heads"}}},
        {"note", "1 bit a value and the scale"}}}};
  return info;
}

std::string check_kumar(const KumarKnobs& k, const UnitShape& unit) {
  if (unit.head_dim % k.group != 0)
    return "groups of " + std::to_string(k.group) + " channels don't divide a head of " + std::to_string(unit.head_dim);
  return "";
}

}  // namespace

VQKV_DEFINE_METHOD(kumar, KumarKnobs, KumarCodec, describe_kumar, check_kumar)

}  // namespace vqkv
