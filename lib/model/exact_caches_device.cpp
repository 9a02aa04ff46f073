#include "model/exact_caches_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "attention/exact_decode.h"
#include "attention/exact_prefill.h"
#include "core/error.h"

namespace vqkv {

using device::Buffer;

// Blocks next to each other that one kernel attends are a run: of a token each, or of more.
struct ExactCaches::Batch {
  struct Run {
    bool steps = false;
    int first_block = 0, blocks = 0, first_row = 0;
    int64_t longest = 0;  // steps: tokens that a sequence holds; else tokens of a block
  };
  std::span<const Block> of;
  bool tapped = false;
  std::vector<Run> runs;
  Buffer<PrefillBlock> blocks;
  Buffer<int32_t> sequences, positions, lengths;  // of rows: whose they are, where, and how many tokens they see
};

ExactCaches::ExactCaches(LlamaDevice& model, int sequences, int64_t tokens)
    : model_(model),
      facts_(model.facts()),
      most_pages_(static_cast<int>((tokens + kDevicePageTokens - 1) / kDevicePageTokens)),
      length_(static_cast<size_t>(sequences), 0),
      to_host_(facts_.cache_shape()) {
  VQKV_CHECK(sequences >= 1 && tokens >= 1);
  const size_t values = static_cast<size_t>(facts_.layers) * length_.size() * static_cast<size_t>(most_pages_) *
                        static_cast<size_t>(facts_.kv_heads * kDevicePageTokens * facts_.head_dim);
  // Pages of a sequence follow each other.
  std::vector<int32_t> pages(length_.size() * static_cast<size_t>(most_pages_));
  std::iota(pages.begin(), pages.end(), 0);
  pages_ = Buffer<int32_t>(std::span<const int32_t>(pages), "page table");
  keys_ = Buffer<uint16_t>(values, "keys");
  values_ = Buffer<uint16_t>(values, "values");
}

ExactCaches::~ExactCaches() = default;

void ExactCaches::truncate(int sequence, int64_t tokens) {
  VQKV_CHECK(tokens >= 0 && tokens <= length(sequence));
  length_[static_cast<size_t>(sequence)] = tokens;
}

ExactDecoder& ExactCaches::decoder(int sequences, int64_t longest) {
  // Contexts are cut while there are fewer parts than fill a card.
  const int parts = sequences * facts_.kv_heads;
  const int splits = std::clamp(std::min(256 / parts, static_cast<int>(longest / 256)), 1, 64);
  if (!decoder_ || decoder_rows_ != sequences || decoder_splits_ != splits) {
    decoder_ = std::make_unique<ExactDecoder>(sequences, facts_.kv_heads, facts_.q_heads / facts_.kv_heads,
                                              facts_.head_dim, splits);
    decoder_rows_ = sequences, decoder_splits_ = splits;
  }
  return *decoder_;
}

void ExactCaches::attend(int layer, QkvRows rows, float* out) {
  Batch& batch = *batch_;
  const size_t of_layer = keys_.size() / static_cast<size_t>(facts_.layers) * static_cast<size_t>(layer);
  rows.keys = keys_.data() + of_layer;
  rows.values = values_.data() + of_layer;
  rows.page_table = pages_.data();
  rows.sequence = batch.sequences.data();
  rows.place = batch.positions.data();
  rows.most_pages = most_pages_;
  rows.page_tokens = kDevicePageTokens;
  place_qkv_rows(rows);
  if (batch.tapped) to_host_.start(layer, rows);
  const auto describe = [&](auto& call) {
    call.keys = rows.keys;
    call.values = rows.values;
    call.page_table = pages_.data();
    call.kv_heads = facts_.kv_heads;
    call.group = facts_.q_heads / facts_.kv_heads;
    call.head_dim = facts_.head_dim;
    call.most_pages = most_pages_;
  };
  for (const Batch::Run& run : batch.runs) {
    if (run.steps) {
      const auto row = static_cast<size_t>(run.first_row);
      const size_t at = row * static_cast<size_t>(facts_.q_heads * facts_.head_dim);
      ExactDecode call;
      describe(call);
      call.queries = rows.queries + at;
      call.out = out + at;
      call.table = batch.sequences.data() + row;
      call.lengths = batch.lengths.data() + row;
      call.sequences = run.blocks;
      decoder(run.blocks, run.longest)(call);
    } else {
      ExactPrefill call;
      describe(call);
      call.queries = rows.queries;
      call.out = out;
      call.of_block = batch.blocks.data() + run.first_block;
      call.blocks = run.blocks;
      call.longest = static_cast<int>(run.longest);
      exact_prefill(call);
    }
  }
}

void ExactCaches::launched(int layer) {
  if (batch_->tapped && layer > 0) hand_over(layer - 1);  // with this layer on its way
}

void ExactCaches::hand_over(int layer) {
  const int64_t q = int64_t{facts_.q_heads} * facts_.head_dim, kv = int64_t{facts_.kv_heads} * facts_.head_dim;
  const ConstMatrix all = to_host_.wait(layer);
  int64_t first = 0;
  for (const Block& b : batch_->of) {
    const ConstMatrix x = all.slice_rows(first, std::ssize(b.tokens));
    if (b.tap)
      b.tap->on_qkv(layer, length(b.sequence), x.slice_cols(0, q), x.slice_cols(q, kv), x.slice_cols(q + kv, kv));
    first += std::ssize(b.tokens);
  }
}

void ExactCaches::forward(std::span<const Block> batch, LogitRows rows, MutMatrix logits) {
  if (batch.empty()) return;
  std::vector<int32_t> tokens, sequence, position, lengths, wanted;
  std::vector<PrefillBlock> blocks;
  auto attended = std::make_unique<Batch>();
  attended->of = batch;
  for (const Block& b : batch) {
    VQKV_CHECK(b.sequence >= 0 && b.sequence < std::ssize(length_) && !b.tokens.empty());
    VQKV_CHECK(std::ranges::count(batch, b.sequence, &Block::sequence) == 1);
    const int64_t held = length(b.sequence), n = std::ssize(b.tokens), end = held + n;
    if (end > int64_t{most_pages_} * kDevicePageTokens)
      fail_usage(fmt::format("sequence {} would hold {} tokens; its cache on the device has room for {}", b.sequence,
                             end, int64_t{most_pages_} * kDevicePageTokens));
    facts_.require_context(end);
    attended->tapped |= b.tap != nullptr;
    const auto first_row = static_cast<int>(tokens.size());
    const bool step = n == 1;
    if (attended->runs.empty() || attended->runs.back().steps != step)
      attended->runs.push_back({step, static_cast<int>(blocks.size()), 0, first_row, 0});
    Batch::Run& run = attended->runs.back();
    ++run.blocks;
    run.longest = std::max(run.longest, step ? end : n);
    blocks.push_back({first_row, static_cast<int32_t>(n), static_cast<int32_t>(held), b.sequence});
    tokens.insert(tokens.end(), b.tokens.begin(), b.tokens.end());
    for (int64_t at = held; at < end; ++at) {
      sequence.push_back(b.sequence);
      position.push_back(static_cast<int32_t>(at));
      lengths.push_back(static_cast<int32_t>(at + 1));
      if (rows == LogitRows::kAll || (rows == LogitRows::kLast && at + 1 == end))
        wanted.push_back(static_cast<int32_t>(position.size()) - 1);
    }
  }
  attended->blocks = Buffer<PrefillBlock>(std::span<const PrefillBlock>(blocks), "blocks");
  attended->sequences = Buffer<int32_t>(std::span<const int32_t>(sequence), "sequences");
  attended->positions = Buffer<int32_t>(std::span<const int32_t>(position), "positions");
  attended->lengths = Buffer<int32_t>(std::span<const int32_t>(lengths), "lengths");
  batch_ = std::move(attended);
  model_.forward(tokens, position, *this, wanted, logits);
  if (batch_->tapped) hand_over(facts_.layers - 1);
  for (const Block& b : batch) length_[static_cast<size_t>(b.sequence)] += std::ssize(b.tokens);
}

}  // namespace vqkv
