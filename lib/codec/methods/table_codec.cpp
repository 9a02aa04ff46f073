#include "codec/methods/table_codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "codec/train/beam.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {
constexpr int64_t kEncodeTile = 64;
constexpr int64_t kEncodeChunk = 256;
}  // namespace

TableCodec::TableCodec(const TableShape& shape, int beam, std::vector<int32_t> channel) : shape_(shape), beam_(beam) {
  VQKV_CHECK(shape.groups >= 1 && shape.channels % shape.groups == 0 && shape.bits >= 1 && shape.bits <= 16);
  set_channels(std::move(channel));
  layout_.fields = {{"code", shape.bits, shape.stages * shape.groups, true}};
  if (shape.scale_slots > 0) layout_.sides = {{"token_scale", shape.scale_type, shape.scale_slots, true}};
}

void TableCodec::set_channels(std::vector<int32_t> channel) {
  VQKV_CHECK(static_cast<int>(channel.size()) == shape_.channels);
  channel_ = std::move(channel);
  in_order_ = true;
  for (int c = 0; c < shape_.channels; ++c) in_order_ = in_order_ && channel_[static_cast<size_t>(c)] == c;
}

void TableCodec::gather(ConstMatrix x, MutMatrix out, float* scales) const {
  const int slots = shape_.scale_slots;
  std::vector<float> inverse(static_cast<size_t>(std::max(slots, 1)), 1.0f);
  for (int64_t r = 0; r < x.rows; ++r) {
    const float* row = x.row(r);
    float* to = out.row(r);
    for (int s = 0; s < slots; ++s) {
      // Unbiased standard deviation over the channels of a head; a constant head keeps its values.
      const int n = shape_.channels / slots;
      double mean = 0, sum = 0;
      for (int c = 0; c < n; ++c) mean += row[s * n + c];
      mean /= n;
      for (int c = 0; c < n; ++c) sum += (row[s * n + c] - mean) * (row[s * n + c] - mean);
      const double deviation = n > 1 ? std::sqrt(sum / (n - 1)) : 0.0;
      const bool narrow = shape_.scale_type == DType::kF8E5M2;  // its finite normal numbers
      const double bounded = std::clamp(deviation, narrow ? 0x1p-14 : 0.0, narrow ? 57344.0 : 3e38);
      const float scale = deviation > 0 ? round_scale(shape_.scale_type, static_cast<float>(bounded)) : 1.0f;
      inverse[static_cast<size_t>(s)] = scale;
      if (scales) scales[r * slots + s] = scale;
    }
    if (slots == 0) {
      for (int c = 0; c < shape_.channels; ++c) to[c] = row[channel_[static_cast<size_t>(c)]];
    } else {
      const int n = shape_.channels / slots;
      for (int c = 0; c < shape_.channels; ++c) {
        const int from = channel_[static_cast<size_t>(c)];
        to[c] = row[from] / inverse[static_cast<size_t>(from / n)];
      }
    }
  }
}

TrainReport TableCodec::train_groups(const TrainSet& set, const std::string& grouping, const std::string& weight,
                                     int refine, const KmeansOptions& kmeans, const Rng& rng) {
  const auto start = std::chrono::steady_clock::now();
  check_encode_input(*this, set.x);
  if (grouping == "variance") set_channels(variance_channels(set.x, shape_.groups));
  const std::vector<float> weights = training_weights(set, weight);
  ResidualOptions options;
  options.stages = shape_.stages;
  options.entries = shape_.entries();
  options.beam = beam_;
  options.refine = refine;
  options.stored_as = shape_.stored_as;
  options.kmeans = kmeans;
  Matrix<float> x(set.x.rows, set.x.cols);
  gather(set.x, x, nullptr);
  TrainReport report;
  std::vector<ResidualQuantizer> quantizers;
  for (int g = 0; g < shape_.groups; ++g) {
    ResidualTraining t = train_residual(x.view().slice_cols(g * shape_.width(), shape_.width()), weights, options,
                                        rng.split(static_cast<uint64_t>(g)));
    quantizers.push_back(std::move(t.quantizer));
    report.vectors = std::max(report.vectors, t.vectors);
    report.iterations += t.iterations;
    report.curve.insert(report.curve.end(), t.curve.begin(), t.curve.end());
  }
  install(std::move(quantizers));
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

void TableCodec::install(std::vector<ResidualQuantizer> quantizers) {
  VQKV_CHECK(static_cast<int>(quantizers.size()) == (shape_.shared_book ? 1 : shape_.groups));
  quantizers_ = std::move(quantizers);
  const auto size = static_cast<size_t>(shape_.entries() * shape_.width());
  auto words = std::make_shared<AlignedVector<float>>(size * quantizers_.size() * static_cast<size_t>(shape_.stages));
  for (int stage = 0; stage < shape_.stages; ++stage)
    for (size_t g = 0; g < quantizers_.size(); ++g) {
      const Matrix<float>& book = quantizers_[g].books()[static_cast<size_t>(stage)];
      VQKV_CHECK(book.storage.size() == size);
      std::copy(book.storage.begin(), book.storage.end(),
                words->begin() + static_cast<int64_t>((static_cast<size_t>(stage) * quantizers_.size() + g) * size));
    }
  codewords_ = std::move(words);
}

TrainMemory table_memory(const TableShape& s, int64_t rows, int beam, bool refine, int points) {
  const double width = s.width(), entries = static_cast<double>(s.entries()), stages = s.stages;
  const double pool = static_cast<double>(rows) * (s.shared_book ? s.groups : 1);  // vectors of one quantizer
  // Of a quantizer: books, their panels to search in (with a screen in bf16 where no beam does) and a beam's tables.
  const bool searches = beam > 1 && s.stages > 1;
  const double tables = stages * (stages - 1) / 2 * entries * entries * sizeof(f16);
  const double quantizer = stages * entries * width * (searches ? 8 : 10) +
                           (searches && tables <= static_cast<double>(kBeamTableBytes) ? tables : 0);
  const double words = stages * entries * width * sizeof(float);
  const double sample = std::min(pool, entries * points) * (width * sizeof(float) + 3 * sizeof(int64_t));
  const double fit = refine && s.stages > 1 ? pool * width * sizeof(float) + 2 * quantizer : 0;
  return {.scratch = static_cast<double>(rows) * s.channels * sizeof(float) +
                     pool * (width * sizeof(float) + stages * sizeof(uint16_t) + 2 * sizeof(float)) +
                     std::max(sample, fit),
          .kept = (s.shared_book ? 1 : s.groups) * (quantizer + words)};
}

void TableCodec::encode(ConstMatrix x, CodeBlock& out, const SequenceState*) const {
  check_encode_input(*this, x);
  VQKV_CHECK(!quantizers_.empty());
  out.resize(layout_, x.rows);
  const int64_t slots = layout_.fields[0].slots, width = shape_.width();
  const bool direct = in_order_ && shape_.scale_slots == 0;
  parallel_chunks(x.rows, kEncodeChunk, [&](int64_t begin, int64_t end) {
    Matrix<float> gathered(direct ? 0 : kEncodeTile, direct ? 0 : shape_.channels);
    for (int64_t first = begin; first < end; first += kEncodeTile) {
      ConstMatrix tile = x.slice_rows(first, std::min(kEncodeTile, end - first));
      if (!direct) {
        const MutMatrix to = gathered.view().slice_rows(0, tile.rows);
        gather(tile, to, shape_.scale_slots > 0 ? out.sides[0].data() + first * shape_.scale_slots : nullptr);
        tile = to;
      }
      for (int64_t g = 0; g < shape_.groups; ++g)
        quantizers_[shape_.shared_book ? 0 : static_cast<size_t>(g)].encode_rows(
            tile.slice_cols(g * width, width), out.fields[0].data() + first * slots + g, slots, shape_.groups);
    }
  });
}

CodeLayout TableCodec::level_layout(int level) const {
  VQKV_CHECK(level >= 0 && level < shape_.stages);
  CodeLayout out = layout_;
  out.fields[0].slots = (level + 1) * shape_.groups;
  return out;
}

DecodePlan TableCodec::plan(const PlanQuery& query) const {
  VQKV_CHECK(codewords_ && query.level < shape_.stages);
  DecodePlan plan = empty_plan();
  if (shape_.scale_slots > 0) plan.token_scale_side = 0;
  TableTerm term;
  const int stages = query.level < 0 ? shape_.stages : query.level + 1;
  term.slots = stages * shape_.groups;
  term.entries = static_cast<int>(shape_.entries());
  term.width = shape_.width();
  term.books = shape_.stages * (shape_.shared_book ? 1 : shape_.groups);
  term.codewords = codewords_;
  term.stored_as = shape_.stored_as;
  for (int stage = 0; stage < stages; ++stage)
    for (int g = 0; g < shape_.groups; ++g) {
      term.book_of_slot.push_back(shape_.shared_book ? stage : stage * shape_.groups + g);
      term.channel.insert(term.channel.end(), channel_.begin() + g * shape_.width(),
                          channel_.begin() + (g + 1) * shape_.width());
    }
  term.disjoint = stages == 1;
  plan.terms = {std::move(term)};
  return plan;
}

void TableCodec::save(ParameterWriter& out) const {
  VQKV_CHECK(codewords_);
  out.tensor("codewords", {shape_.stages * static_cast<int64_t>(quantizers_.size()), shape_.entries(), shape_.width()},
             codewords_->data());
  out.facts("channels", Json(channel_));
}

void TableCodec::load(const ParameterReader& in) {
  const Json stored = in.facts("channels");
  const auto count = static_cast<size_t>(shape_.channels);
  std::vector<int32_t> channel;
  std::vector<bool> seen(count, false);
  if (!stored.is_array() || stored.size() != count)
    fail_data(fmt::format("channels: expected {} channel numbers", shape_.channels));
  for (const Json& c : stored) {
    if (!c.is_number_integer() || c.get<int64_t>() < 0 || c.get<int64_t>() >= shape_.channels || seen[c.get<size_t>()])
      fail_data(fmt::format("channels: {} is repeated or not in 0..{}", c.dump(), shape_.channels - 1));
    seen[c.get<size_t>()] = true;
    channel.push_back(c.get<int32_t>());
  }
  set_channels(std::move(channel));

  const int64_t groups = shape_.shared_book ? 1 : shape_.groups;
  const AlignedVector<float> words =
      read_stored(in, "codewords", {shape_.stages * groups, shape_.entries(), shape_.width()}, shape_.stored_as);
  const auto size = static_cast<int64_t>(shape_.entries()) * shape_.width();
  std::vector<ResidualQuantizer> quantizers;
  for (int64_t g = 0; g < groups; ++g) {
    std::vector<Matrix<float>> books;
    for (int64_t stage = 0; stage < shape_.stages; ++stage) {
      books.emplace_back(shape_.entries(), shape_.width());
      std::copy_n(words.data() + (stage * groups + g) * size, size, books.back().data());
    }
    quantizers.emplace_back(std::move(books), beam_);
  }
  install(std::move(quantizers));
}

AlignedVector<float> read_stored(const ParameterReader& in, const std::string& name, const std::vector<int64_t>& shape,
                                 DType stored_as) {
  AlignedVector<float> values = in.tensor(name, shape);
  for (const float v : values) {
    float rounded = v;
    round_to(stored_as, &rounded, 1);
    if (!std::isfinite(v) || rounded != v)
      fail_data(fmt::format("{}: {} is not a finite {} number", name, v, dtype_name(stored_as)));
  }
  return values;
}

std::vector<int32_t> group_channels(const std::string& grouping, const UnitShape& unit, int groups) {
  const int channels = unit.channels(), width = channels / groups;
  std::vector<int32_t> order(static_cast<size_t>(channels));
  std::iota(order.begin(), order.end(), 0);
  if (grouping == "strided") {
    for (int c = 0; c < channels; ++c) order[static_cast<size_t>(c % groups * width + c / groups)] = c;
  } else if (grouping == "rope_pair") {
    size_t at = 0;
    // A sub-vector holds its first members, then their partners: [x..., y...], as rotating kernels read it.
    for (int g = 0; g < groups; ++g)
      for (int member = 0; member < 2; ++member)
        for (int i = 0; i < width / 2; ++i) {
          const auto [first, partner] = unit.pair(g * (width / 2) + i);
          order[at++] = member == 0 ? first : partner;
        }
  }
  return order;
}

std::vector<int32_t> variance_channels(ConstMatrix x, int groups) {
  const int channels = static_cast<int>(x.cols), width = channels / groups;
  std::vector<double> mean(static_cast<size_t>(channels), 0.0), variance(mean);
  for (int64_t r = 0; r < x.rows; ++r)
    for (int c = 0; c < channels; ++c) mean[static_cast<size_t>(c)] += x(r, c);
  for (double& m : mean) m /= static_cast<double>(std::max<int64_t>(x.rows, 1));
  for (int64_t r = 0; r < x.rows; ++r)
    for (int c = 0; c < channels; ++c)
      variance[static_cast<size_t>(c)] +=
          (x(r, c) - mean[static_cast<size_t>(c)]) * (x(r, c) - mean[static_cast<size_t>(c)]);
  std::vector<int32_t> rank(static_cast<size_t>(channels)), order(rank);
  std::iota(rank.begin(), rank.end(), 0);
  std::stable_sort(rank.begin(), rank.end(), [&](int32_t a, int32_t b) {
    return variance[static_cast<size_t>(a)] > variance[static_cast<size_t>(b)];
  });
  for (int i = 0; i < channels; ++i)
    order[static_cast<size_t>(i % groups * width + i / groups)] = rank[static_cast<size_t>(i)];
  return order;
}

std::string check_groups(const std::string& grouping, const UnitShape& unit, int groups) {
  const int channels = unit.channels();
  if (channels % groups != 0) return fmt::format("{} sub-vectors don't divide {} channels", groups, channels);
  if (grouping == "rope_pair" && unit.head_dim % 2 != 0)
    return fmt::format("rope_pair: the {} channels of a head make no pairs", unit.head_dim);
  if (grouping == "rope_pair" && channels / groups % 2 != 0)
    return fmt::format("rope_pair needs sub-vectors of an even number of channels, not {}", channels / groups);
  return "";
}

std::vector<float> training_weights(const TrainSet& set, const std::string& mode) {
  std::vector<float> weight(set.weight.begin(), set.weight.end());
  if (mode == "none") return weight;
  const std::span<const float> mass = mode == "mass2" ? set.received_mass2 : set.received_mass;
  if (static_cast<int64_t>(mass.size()) != set.x.rows)
    fail_data(fmt::format("weight: {} needs the received attention mass of every token, which the trace does not hold",
                          mode));
  if (weight.empty()) weight.assign(mass.size(), 1.0f);
  double sum = 0;
  for (size_t i = 0; i < mass.size(); ++i) sum += mass[i];
  const double mean = sum / static_cast<double>(std::max<size_t>(mass.size(), 1));
  if (!(mean > 0) || !std::isfinite(mean)) fail_data(fmt::format("weight: {} found no attention mass", mode));
  for (size_t i = 0; i < mass.size(); ++i) weight[i] *= static_cast<float>(std::max(mass[i] / mean, 0.01));
  return weight;
}

}  // namespace vqkv
