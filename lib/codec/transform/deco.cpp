// DecoQuant: the singular axes of a prompt's own values in runs of 16 channels, and the square roots of their singular
// values, which stay with the prompt; what is left to code is as loud in every axis (baseline-methods 8).
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "codec/transform/symmetric.h"
#include "codec/transform/transform.h"
#include "core/row_products.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

struct DecoKnobs {
  int run = 16;
  KnobTable table() { return KnobTable().integer("run", &run, 2, 64, "channels that share the axes, in runs"); }
};

// x = a * back in every run, a = x * forward. X, the runs of a prompt below each other, is U L V^T; back = L^(1/2) V^T,
// and a = U L^(1/2).
class Deco final : public Transform {
 public:
  Deco(const DecoKnobs& knobs, const UnitShape& unit) : channels_(unit.channels()), run_(knobs.run) {
    for (auto* m : {&forward_, &back_}) {
      m->assign(static_cast<size_t>(run_) * static_cast<size_t>(run_), 0.0f);
      for (size_t i = 0; i < m->size(); i += static_cast<size_t>(run_) + 1) (*m)[i] = 1.0f;
    }
  }

  void train(const TrainSet&, const Rng&) override {}
  // A run of a token is a row of X: two tokens would do for a layer, and be most of what they are fitted to.
  FitNeeds fit_needs() const override { return {.tokens = run_}; }
  std::unique_ptr<Transform> fit(ConstMatrix x, ConstMatrix) const override {
    auto fitted = std::make_unique<Deco>(*this);
    fitted->set_axes(symmetric_eigen(gram_of(x), run_));
    return fitted;
  }
  int64_t fitted_bytes() const override { return int64_t{2} * run_ * run_; }  // f16

  void forward(ConstMatrix x, MutMatrix y) const override {
    parallel_chunks(x.rows, 64, [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; ++r)
        for (int64_t c = 0; c < channels_; c += run_) {
          std::fill_n(y.row(r) + c, run_, 0.0f);
          add_row_product(x.row(r) + c, run_, forward_.data(), run_, y.row(r) + c);
        }
    });
  }
  void inverse(LinearMap& map, std::vector<float>&) const override {
    BlockMap blocks;
    blocks.blocks.assign(static_cast<size_t>(channels_ / run_), {run_, run_, {back_.begin(), back_.end()}});
    map = std::move(blocks);
  }
  int mixed_channels() const override { return run_; }
  bool commutes_with_rope() const override { return false; }
  void save(ParameterWriter&, const std::string&) const override {}
  void load(const ParameterReader&, const std::string&) override {}

 private:
  // X^T X
  std::vector<double> gram_of(ConstMatrix x) const {
    const auto n = static_cast<size_t>(run_);
    std::vector<double> gram(n * n, 0.0), row(static_cast<size_t>(channels_));
    for (int64_t r = 0; r < x.rows; ++r) {
      std::copy_n(x.row(r), channels_, row.data());
      add_outer_products(row.data(), nullptr, channels_ / run_, run_, gram.data());
    }
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < i; ++j) gram[j * n + i] = gram[i * n + j];
    return gram;
  }

  void set_axes(const SymmetricEigen& gram) {
    const auto n = static_cast<size_t>(run_);
    // Singular values below a millionth of the largest count as that: what they leave of an axis could not be undone.
    const double least = std::sqrt(std::max(gram.values[0], 0.0)) * 1e-6;
    for (size_t i = 0; i < n; ++i) {
      const double singular = std::max(std::sqrt(std::max(gram.values[i], 0.0)), least);
      const double root = std::clamp(std::sqrt(singular), 0x1p-10, 65504.0);  // as f16 holds it and its digits
      for (size_t j = 0; j < n; ++j)
        back_[i * n + j] = round_side(DType::kF16, static_cast<float>(root * gram.vectors[j * n + i]));
    }
    // forward is the inverse of what is stored, B^T (B B^T)^-1, so that nothing is lost before the codes.
    std::vector<double> outer(n * n, 0.0), inverse(n * n, 0.0), forward(n * n, 0.0);
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j)
        for (size_t l = 0; l < n; ++l) outer[i * n + j] += double{back_[i * n + l]} * back_[j * n + l];
    const SymmetricEigen e = symmetric_eigen(outer, run_);
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j)
        for (size_t l = 0; l < n; ++l) inverse[i * n + j] += e.vectors[i * n + l] * e.vectors[j * n + l] / e.values[l];
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j)
        for (size_t l = 0; l < n; ++l) forward[i * n + j] += back_[l * n + i] * inverse[l * n + j];
    forward_.assign(forward.begin(), forward.end());
  }

  int channels_, run_;
  AlignedVector<float> forward_, back_;  // (run, run)
};

TransformInfo describe_deco() {
  TransformInfo info;
  info.name = "deco";
  info.title = "divides a prompt's values by the square roots of their singular values, in runs of 16 channels";
  info.paper =
      "Liu et al., Unlocking Data-free Low-bit Quantization with Matrix Decomposition for KV Cache Compression "
      "(DecoQuant), ACL 2024, arXiv 2405.12591";
  info.caveat =
      "a run x run matrix in f16 is stored for each prompt and unit: 16 run^2 / (T channels) bits a value over T "
      "tokens. The paper's matrix is that of a whole layer: `heads: all`, `rtn` `preset: decoquant`. Noise comes back "
      "louder where values are. While a "
      "sequence lives its matrix is also held written out for every head, which bytes of short texts count as "
      "workspace. What learns behind it learns on the train tokens as on one prompt: let a codec that learns nothing "
      "follow";
  info.assumed =
      "how the paper codes what follows the prompt is unconfirmed, and its code keeps that exact: here the prompt's "
      "matrix serves it too, or `cache: {prompt: N, generated: exact}` keeps it";
  info.side_bits = "0";
  info.trained = false;
  return info;
}
std::string check_deco(const DecoKnobs& k, const UnitShape& unit) {
  return unit.head_dim % k.run == 0
             ? ""
             : fmt::format("runs of {} channels don't divide a head of {}", k.run, unit.head_dim);
}

}  // namespace

VQKV_DEFINE_TRANSFORM(deco, DecoKnobs, Deco, describe_deco, check_deco)

}  // namespace vqkv
