#include "model/runtime_device.h"

#include <algorithm>

#include "core/error.h"
#include "model/session_device.h"

namespace vqkv {

DeviceRuntime::DeviceRuntime(const std::string& path)
    : path_(path), weights_(ModelWeights::open(path)), llama_(*weights_), to_host_(llama_.facts().cache_shape()) {}

const Tokenizer& DeviceRuntime::tokenizer() const {
  if (!tokenizer_) tokenizer_ = load_tokenizer(path_);
  return *tokenizer_;
}

ConstMatrix DeviceRuntime::output_weight(int layer) const {
  output_.resize(static_cast<size_t>(facts().layers));
  Matrix<float>& w = output_[static_cast<size_t>(layer)];
  if (w.rows == 0) w = weights_->read(Weight::kO, layer);
  return w;
}

namespace {

// A sequence's block, and how far it is.
struct Part {
  DeviceSession* session = nullptr;
  const SequenceBlock* block = nullptr;
  int64_t first_logits = 0;  // its row of them
  int64_t done = 0;
  int64_t rows = 0;  // of the open pass
  int64_t left() const { return std::ssize(block->tokens) - done; }
};

// Hands each its rows of a pass, and those of the host a layer later, with the next on its way.
class EachItsRows final : public DeviceAttention {
 public:
  EachItsRows(std::span<const Part> parts, const ModelFacts& facts, QkvToHost& to_host)
      : parts_(parts), facts_(facts), to_host_(to_host) {}
  void attend(int layer, QkvRows rows, float* out) override {
    const QkvRows all = rows;
    const auto q_cols = static_cast<size_t>(facts_.q_heads * facts_.head_dim),
               cols = q_cols + static_cast<size_t>(2 * facts_.kv_heads * facts_.head_dim);
    for (const Part& p : parts_) {
      if (p.rows == 0) continue;
      const auto n = static_cast<size_t>(p.rows);
      rows.rows = static_cast<int>(p.rows);
      p.session->attend(layer, rows, out);
      rows.qkv += n * cols;
      rows.rotation += n * static_cast<size_t>(rows.rotary_dim);
      rows.queries += n * q_cols;
      out += n * q_cols;
    }
    to_host_.start(layer, all);
  }
  void launched(int layer) override {
    if (layer > 0) append(layer - 1);
    if (layer + 1 == facts_.layers) append(layer);
  }

 private:
  void append(int layer) {
    const ConstMatrix all = to_host_.wait(layer);
    int64_t first = 0;
    for (const Part& p : parts_) {
      if (p.rows > 0) p.session->append(layer, all.slice_rows(first, p.rows));
      first += p.rows;
    }
  }

  std::span<const Part> parts_;
  const ModelFacts& facts_;
  QkvToHost& to_host_;
};

}  // namespace

void DeviceRuntime::forward_batch(std::span<const SequenceBlock> batch, LogitRows rows, MutMatrix logits) {
  std::vector<Part> parts;
  int64_t of_logits = 0;
  for (const SequenceBlock& b : batch) {
    auto* session = dynamic_cast<DeviceSession*>(b.kv);
    VQKV_CHECK(session && !b.tokens.empty());
    facts().require_context(session->cache().length() + std::ssize(b.tokens));
    session->set_rows_tap(b.tap);
    parts.push_back({session, &b, of_logits});
    of_logits += rows == LogitRows::kAll ? std::ssize(b.tokens) : rows == LogitRows::kLast ? 1 : 0;
  }
  VQKV_CHECK(rows == LogitRows::kNone || (logits.rows == of_logits && logits.cols == facts().vocab));
  while (std::ranges::any_of(parts, [](const Part& p) { return p.left() > 0; })) {
    std::vector<int32_t> tokens, positions, wanted;
    std::vector<int64_t> to;  // the row of logits that each wanted one is
    for (Part& p : parts) {
      p.rows = 0;
      const int64_t most = std::min(p.left(), kMostRows - std::ssize(tokens));
      if (most == 0) continue;
      p.rows = p.session->alike(most, p.block->visibility);
      p.session->begin_block(p.rows, p.block->visibility);
      for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t at = p.done + i;
        tokens.push_back(p.block->tokens[static_cast<size_t>(at)]);
        positions.push_back(static_cast<int32_t>(p.session->cache().length() + i));
        const bool last = at + 1 == std::ssize(p.block->tokens);
        if (rows == LogitRows::kNone || (rows == LogitRows::kLast && !last)) continue;
        wanted.push_back(static_cast<int32_t>(tokens.size()) - 1);
        to.push_back(p.first_logits + (rows == LogitRows::kAll ? at : 0));
      }
    }
    EachItsRows attention(parts, facts(), to_host_);
    Matrix<float> some(std::ssize(wanted), wanted.empty() ? 0 : facts().vocab);
    llama_.forward(tokens, positions, attention, wanted, some);
    for (size_t i = 0; i < to.size(); ++i)
      std::copy_n(some.row(static_cast<int64_t>(i)), logits.cols, logits.row(to[i]));
    for (Part& p : parts) {
      if (p.rows > 0) p.session->end_block();
      p.done += p.rows;
    }
  }
  for (Part& p : parts) p.session->set_rows_tap(nullptr);
}

}  // namespace vqkv
