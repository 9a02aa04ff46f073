#include "core/rope.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <numbers>

#include "core/json.h"

namespace vqkv {

RopeFacts RopeFacts::plain(int head_dim, int rotary_dim, double theta) {
  VQKV_CHECK(rotary_dim % 2 == 0 && rotary_dim <= head_dim && theta > 0);
  RopeFacts f;
  f.head_dim = head_dim;
  f.rotary_dim = rotary_dim;
  f.theta = theta;
  for (int p = 0; p < rotary_dim / 2; ++p) f.inverse_frequency.push_back(std::pow(theta, -2.0 * p / rotary_dim));
  return f;
}

void RopeFacts::apply_llama3(double factor, double low_freq_factor, double high_freq_factor, double original_context) {
  scaling = "llama3";
  const double low_wavelength = original_context / low_freq_factor;
  const double high_wavelength = original_context / high_freq_factor;
  for (double& f : inverse_frequency) {
    const double wavelength = 2.0 * std::numbers::pi / f;
    if (wavelength < high_wavelength) continue;
    if (wavelength > low_wavelength) {
      f /= factor;
      continue;
    }
    const double smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
    f = (1.0 - smooth) * f / factor + smooth * f;
  }
}

void RopeFacts::apply_linear(double factor) {
  scaling = "linear";
  for (double& f : inverse_frequency) f /= factor;
}

double RopeFacts::yarn_scale(double factor, double multiplier) {
  return factor > 1 ? 0.1 * multiplier * std::log(factor) + 1 : 1;
}

void RopeFacts::apply_yarn(const Yarn& yarn) {
  VQKV_CHECK(theta > 1);
  scaling = "yarn";
  attention_factor = yarn_scale(yarn.factor);
  // The pair, not whole, that turns so many times within the original context.
  const auto pair_of = [&](double turns) {
    return rotary_dim * std::log(yarn.original_context / (turns * 2 * std::numbers::pi)) / (2 * std::log(theta));
  };
  double low = pair_of(yarn.beta_fast), high = pair_of(yarn.beta_slow);
  if (yarn.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, rotary_dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t p = 0; p < inverse_frequency.size(); ++p) {
    const double divided = std::clamp((static_cast<double>(p) - low) / (high - low), 0.0, 1.0);
    inverse_frequency[p] *= divided / yarn.factor + 1 - divided;
  }
}

void RopeFacts::apply_factors(const std::vector<float>& factors) {
  VQKV_CHECK(factors.size() == inverse_frequency.size());
  scaling = "factors";
  for (size_t p = 0; p < factors.size(); ++p) inverse_frequency[p] /= static_cast<double>(factors[p]);
}

Json RopeFacts::to_json() const {
  return {{"head_dim", head_dim},
          {"rotary_dim", rotary_dim},
          {"theta", theta},
          {"scaling", scaling},
          {"attention_factor", attention_factor},
          {"layout", "half"},
          {"inverse_frequency", inverse_frequency}};
}

RopeFacts RopeFacts::from_json(const Json& j) {
  RopeFacts f;
  try {
    f.head_dim = j.at("head_dim").get<int>();
    f.rotary_dim = j.at("rotary_dim").get<int>();
    f.theta = j.at("theta").get<double>();
    f.scaling = j.at("scaling").get<std::string>();
    f.attention_factor = j.at("attention_factor").get<double>();
    f.inverse_frequency = j.at("inverse_frequency").get<std::vector<double>>();
    if (j.at("layout").get<std::string>() != "half") fail_data("rope.layout must be \"half\"");
  } catch (const Json::exception& e) { fail_data(fmt::format("RoPE facts are incomplete: {}", e.what())); }
  if (f.head_dim < 1 || f.head_dim > 4096 || f.rotary_dim < 0 || f.rotary_dim % 2 || f.rotary_dim > f.head_dim ||
      f.inverse_frequency.size() != static_cast<size_t>(f.rotary_dim / 2))
    fail_data("RoPE facts contradict themselves (head_dim, rotary_dim, inverse_frequency)");
  for (const double v : f.inverse_frequency)
    if (!std::isfinite(v) || v < 0) fail_data("RoPE facts hold an inverse frequency that is negative or not finite");
  if (!std::isfinite(f.attention_factor) || !(f.attention_factor > 0))
    fail_data(fmt::format("RoPE facts: attention_factor is {}, a number above 0 is needed", f.attention_factor));
  return f;
}

namespace {
constexpr int64_t kBlock = 1024;  // positions a block
constexpr size_t kBlocks = 1 << 14;
}  // namespace

struct RopeTable::Blocks {
  // Blocks never move once made, so a row pointer stays valid while the table lives.
  std::vector<std::atomic<const float*>> published = std::vector<std::atomic<const float*>>(kBlocks);
  std::mutex making;
  std::vector<std::unique_ptr<float[]>> made;
};

RopeTable::RopeTable(RopeFacts facts) : facts_(std::move(facts)), blocks_(std::make_unique<Blocks>()) {}
RopeTable::~RopeTable() = default;

const float* RopeTable::make(size_t block) const {
  const std::lock_guard lock(blocks_->making);
  if (const float* rows = blocks_->published[block].load(std::memory_order_relaxed)) return rows;
  const int64_t half = facts_.rotary_dim / 2;
  auto rows = std::make_unique<float[]>(static_cast<size_t>(kBlock * 2 * half));
  for (int64_t i = 0; i < kBlock; ++i) {
    const double t = static_cast<double>(static_cast<int64_t>(block) * kBlock + i);
    for (int64_t p = 0; p < half; ++p) {
      const double angle = t * facts_.inverse_frequency[static_cast<size_t>(p)];
      rows[static_cast<size_t>(i * 2 * half + p)] = static_cast<float>(std::cos(angle) * facts_.attention_factor);
      rows[static_cast<size_t>(i * 2 * half + half + p)] =
          static_cast<float>(std::sin(angle) * facts_.attention_factor);
    }
  }
  blocks_->made.push_back(std::move(rows));
  const float* out = blocks_->made.back().get();
  blocks_->published[block].store(out, std::memory_order_release);
  return out;
}

const float* RopeTable::row(int64_t position) const {
  VQKV_CHECK(position >= 0 && position < static_cast<int64_t>(kBlocks) * kBlock);
  const auto block = static_cast<size_t>(position / kBlock);
  const float* rows = blocks_->published[block].load(std::memory_order_acquire);
  if (!rows) rows = make(block);
  return rows + position % kBlock * (facts_.rotary_dim / 2 * 2);
}

namespace {

// Every row's rotation, or its transposed times `factor`.
void rotate_rows(const RopeTable& table, const int32_t* positions, MutMatrix x, bool transposed, float factor) {
  const int64_t d = table.facts().head_dim, half = table.facts().rotary_dim / 2;
  VQKV_CHECK(x.cols % d == 0);
  for (int64_t r = 0; r < x.rows; ++r) {
    const float* cosine = table.row(positions[r]);
    const float* sine = cosine + half;
    for (float* h = x.row(r); h < x.row(r) + x.cols; h += d) {
      float* __restrict low = h;
      float* __restrict high = h + half;
      if (transposed) {
        for (int64_t p = 0; p < half; ++p) {
          const float a = low[p], b = high[p];
          low[p] = (a * cosine[p] + b * sine[p]) * factor;
          high[p] = (b * cosine[p] - a * sine[p]) * factor;
        }
      } else {
        for (int64_t p = 0; p < half; ++p) {
          const float a = low[p], b = high[p];
          low[p] = a * cosine[p] - b * sine[p];
          high[p] = a * sine[p] + b * cosine[p];
        }
      }
    }
  }
}

}  // namespace

void rope_apply(const RopeTable& table, const int32_t* positions, MutMatrix x, bool inverse) {
  // The table's cos and sin hold the factor once; undoing it takes its square out again.
  const double factor = table.facts().attention_factor;
  rotate_rows(table, positions, x, inverse, static_cast<float>(1.0 / (factor * factor)));
}

void rope_transpose(const RopeTable& table, const int32_t* positions, MutMatrix x) {
  rotate_rows(table, positions, x, true, 1.0f);
}

}  // namespace vqkv
