#include "model/runtime_device.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "model/session_device.h"

namespace vqkv {

DeviceRuntime::DeviceRuntime(const std::string& path)
    : path_(path), weights_(ModelWeights::open(path)), llama_(*weights_) {}

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

void DeviceRuntime::forward_batch(std::span<const SequenceBlock> batch, LogitRows rows, MutMatrix logits) {
  int64_t done = 0;  // rows of logits
  for (const SequenceBlock& b : batch) {
    auto* session = dynamic_cast<DeviceSession*>(b.kv);
    VQKV_CHECK(session && !b.tokens.empty());
    const int64_t n = std::ssize(b.tokens);
    facts().require_context(session->cache().length() + n);
    session->set_rows_tap(b.tap);
    for (int64_t at = 0; at < n;) {
      const int64_t count = session->alike(n - at, b.visibility), first = session->cache().length();
      session->begin_block(count, b.visibility);
      std::vector<int32_t> positions(static_cast<size_t>(count)), wanted;
      std::iota(positions.begin(), positions.end(), static_cast<int32_t>(first));
      if (rows == LogitRows::kAll) {
        wanted.resize(positions.size());
        std::iota(wanted.begin(), wanted.end(), 0);
      } else if (rows == LogitRows::kLast && at + count == n) {
        wanted.push_back(static_cast<int32_t>(count) - 1);
      }
      llama_.forward(b.tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(count)), positions, *session, wanted,
                     wanted.empty() ? MutMatrix() : logits.slice_rows(done, std::ssize(wanted)));
      session->end_block();
      done += std::ssize(wanted);
      at += count;
    }
    session->set_rows_tap(nullptr);
  }
}

}  // namespace vqkv
