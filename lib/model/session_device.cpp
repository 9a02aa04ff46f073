#include "model/session_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "attention/exact_decode.h"
#include "core/error.h"

namespace vqkv {

using device::Buffer;

DeviceRows::DeviceRows(const CacheShape& shape)
    : shape_(shape), keys_(static_cast<size_t>(shape.layers)), values_(static_cast<size_t>(shape.layers)) {}

int64_t DeviceRows::page_values() const { return int64_t{shape_.kv_heads} * kDevicePageTokens * shape_.head_dim; }

void DeviceRows::reserve(int64_t tokens, int64_t held) {
  const int64_t needed = (tokens + kDevicePageTokens - 1) / kDevicePageTokens;
  if (needed <= room_) return;
  const int64_t room = std::max(needed, room_ + room_ / 2),
                kept = (held + kDevicePageTokens - 1) / kDevicePageTokens * page_values();
  for (auto* all : {&keys_, &values_})
    for (Buffer<uint16_t>& rows : *all) {
      Buffer<uint16_t> larger(static_cast<size_t>(room * page_values()), "exact rows");
      larger.zero();  // whole pages are copied when they grow
      if (rows.size() > 0 && kept > 0)
        device::copy_within(larger.data(), rows.data(), static_cast<size_t>(kept) * sizeof(uint16_t));
      rows = std::move(larger);
    }
  std::vector<int32_t> pages(static_cast<size_t>(room));
  std::iota(pages.begin(), pages.end(), 0);
  pages_ = Buffer<int32_t>(std::span<const int32_t>(pages), "page table");
  room_ = room;
}

int64_t DeviceRows::bytes() const {
  return 2 * shape_.layers * room_ * page_values() * static_cast<int64_t>(sizeof(uint16_t)) +
         room_ * static_cast<int64_t>(sizeof(int32_t));
}

DeviceSession::DeviceSession(CompressedCache& cache, std::shared_ptr<const CodedForms> forms)
    : cache_(cache), forms_(std::move(forms)), shape_(cache.shape()), rows_(shape_) {
  const CachePolicy& policy = cache.policy();
  const auto refuse = [](const std::string& why) { fail_unavailable("a cache on a device: " + why); };
  if (policy.keep) refuse("its policy must keep every token (all), or those of a window (streaming)");
  if (policy.codes_images) refuse("it codes image tokens alone (cache.coded)");
  const DType exact = policy.exact_dtype;
  if (exact != DType::kF16 && (forms_ || exact != DType::kBF16))
    refuse(fmt::format("exact rows of {}; {}", dtype_name(exact),
                       forms_ ? "beside codes it keeps f16" : "it keeps f16 or bf16"));
  if (!forms_) return;
  if (policy.k.window != policy.v.window || policy.k.flush != policy.v.flush || policy.k.first != policy.v.first)
    refuse("keys and values must be coded together (cache.rule: window)");
  if (policy.k.window < 1) refuse("it needs a window of 1 token or more (cache.window)");
  // The query that completes a prompt sees codes of its own block.
  if (policy.waits > 0 && policy.k.first == 0) refuse("what waits for a prompt is not coded there (cache.prompt)");
  tiles_ = std::make_unique<CodedTiles>(forms_, cache.shape());
}

DeviceSession::~DeviceSession() = default;

void DeviceSession::set_tap(AttentionTap* tap) {
  if (tap) fail_unavailable("a device hands out no attention probabilities");
}

void DeviceSession::attend(int, ConstMatrix, ConstMatrix, ConstMatrix, MutMatrix) {
  fail_internal("a session on a device attends within that device's runtime");
}

int64_t DeviceSession::device_bytes() const { return rows_.bytes() + (tiles_ ? tiles_->bytes() : 0); }

void DeviceSession::catch_up() {
  if (!tiles_) return;
  const CacheView view(cache_);
  const int64_t coded = view.coded_end(0, Role::kKey) - cache_.policy().sinks;
  if (coded <= put_) return;
  for (int l = 0; l < shape_.layers; ++l)
    for (const Role role : {Role::kKey, Role::kValue}) tiles_->put(view, l, role, put_, coded);
  put_ = coded;
}

int64_t DeviceSession::alike(int64_t tokens, Visibility visibility) const {
  if ((!tiles_ && !cache_.policy().drops) || visibility == Visibility::kExactPrefill) return tokens;
  const CachePolicy& policy = cache_.policy();
  const auto seen = [&](int64_t position) { return std::max(policy.sinks, policy.coded_end(Role::kKey, position)); };
  const int64_t first = cache_.length();
  int64_t n = 1;
  while (n < tokens && seen(first + n) == seen(first)) ++n;
  return n;
}

void DeviceSession::begin_block(int64_t tokens, Visibility visibility) {
  if (visibility == Visibility::kAllCoded || visibility == Visibility::kDraft)
    fail_unavailable("a cache on a device: every query sees what its position says (no fake-quant, no drafts)");
  VQKV_CHECK(alike(tokens, visibility) == tokens);
  catch_up();
  cache_.begin_block(tokens, visibility);
  plan(tokens);
}

void DeviceSession::plan(int64_t tokens) {
  const int64_t sinks = cache_.policy().sinks, first = cache_.length();
  const auto before = static_cast<int64_t>(held_.size());
  if (tiles_ || cache_.policy().drops) seen_ = std::max<int64_t>(seen_, cache_.coded_end(Role::kKey, first) - sinks);
  VQKV_CHECK(!tiles_ || seen_ <= put_);
  // What queries see as codes from now on leaves its place to the last of those that stay.
  const auto gone = [&](int32_t position) { return position >= sinks && position < sinks + seen_; };
  const auto left = static_cast<size_t>(std::ranges::count_if(held_, [&](int32_t p) { return !gone(p); }));
  std::vector<RowMove> moves;
  for (size_t to = 0, from = left; from < held_.size(); ++from) {
    if (gone(held_[from])) continue;
    while (!gone(held_[to])) ++to;
    moves.push_back({static_cast<int32_t>(from), static_cast<int32_t>(to)});
    held_[to] = held_[from];
  }
  held_.resize(left);
  before_ = std::ssize(held_);
  const auto n = static_cast<size_t>(tokens);
  const std::vector<int32_t> of(n, 0), coded(n, static_cast<int32_t>(seen_));
  std::vector<int32_t> place(n), exact(n);
  for (size_t r = 0; r < n; ++r) {
    place[r] = static_cast<int32_t>(held_.size());
    held_.push_back(static_cast<int32_t>(first) + static_cast<int32_t>(r));
    exact[r] = static_cast<int32_t>(held_.size());
  }
  rows_.reserve(std::max(before, std::ssize(held_)), before);
  sequence_ = Buffer<int32_t>(std::span<const int32_t>(of), "sequences");
  place_ = Buffer<int32_t>(std::span<const int32_t>(place), "places");
  coded_ = Buffer<int32_t>(std::span<const int32_t>(coded), "coded tokens");
  exact_ = Buffer<int32_t>(std::span<const int32_t>(exact), "exact tokens");
  moves_ = moves.empty() ? Buffer<RowMove>() : Buffer<RowMove>(std::span<const RowMove>(moves), "moves");
}

void DeviceSession::attend(int layer, QkvRows rows, float* out) {
  rows.keys = rows_.keys(layer);
  rows.values = rows_.values(layer);
  rows.page_table = rows_.page_table();
  rows.sequence = sequence_.data();
  rows.place = place_.data();
  rows.most_pages = 0;
  rows.page_tokens = kDevicePageTokens;
  rows.f16 = cache_.policy().exact_dtype == DType::kF16;
  move_rows({rows.keys, rows.values, moves_.data(), static_cast<int>(moves_.size()), shape_.kv_heads, shape_.head_dim});
  place_qkv_rows(rows);
  const ExactRows exact{rows.keys, rows.values, rows.page_table, exact_.data(), 0};
  // A block that sees no codes is a prompt, with tensor cores to it.
  if (tiles_ && (seen_ > 0 || rows.rows == 1))
    tiles_->attend(layer, rows.queries, rows.rows, coded_.data(), exact, cache_.length() + rows.rows, out);
  else
    attend_exact(exact, rows.queries, rows.rows, out);
}

void DeviceSession::attend_exact(const ExactRows& rows, const float* queries, int64_t tokens, float* out) {
  const auto describe = [&](auto& call) {
    call.queries = queries;
    call.keys = rows.keys;
    call.values = rows.values;
    call.page_table = rows.page_table;
    call.out = out;
    call.kv_heads = shape_.kv_heads;
    call.group = shape_.group();
    call.head_dim = shape_.head_dim;
    call.most_pages = 0;
    call.f16 = cache_.policy().exact_dtype == DType::kF16;
  };
  if (tokens > 1) {
    const PrefillBlock block[] = {{0, static_cast<int32_t>(tokens), static_cast<int32_t>(before_), 0}};
    block_ = Buffer<PrefillBlock>(std::span<const PrefillBlock>(block), "block");
    ExactPrefill call;
    describe(call);
    call.of_block = block_.data();
    call.blocks = 1;
    call.longest = static_cast<int>(tokens);
    return exact_prefill(call);
  }
  // Contexts are cut while there are fewer parts than fill a card.
  const int splits = std::clamp(std::min(256 / shape_.kv_heads, static_cast<int>(before_ / 256)), 1, 64);
  if (!decoder_ || splits != splits_)
    decoder_ = std::make_unique<ExactDecoder>(1, shape_.kv_heads, shape_.group(), shape_.head_dim, splits_ = splits);
  ExactDecode call;
  describe(call);
  call.lengths = rows.lengths;
  call.sequences = 1;
  (*decoder_)(call);
}

void DeviceSession::append(int layer, ConstMatrix qkv) {
  const int64_t q = int64_t{shape_.q_heads} * shape_.head_dim, kv = int64_t{shape_.kv_heads} * shape_.head_dim;
  const ConstMatrix queries = qkv.slice_cols(0, q), keys = qkv.slice_cols(q, kv), values = qkv.slice_cols(q + kv, kv);
  if (rows_tap_) rows_tap_->on_qkv(layer, cache_.length(), queries, keys, values);
  cache_.append(layer, keys, values, queries);
}

void DeviceSession::end_block() { cache_.end_block(); }

void DeviceBackend::attend(const CacheView&, int, ConstMatrix, MutMatrix, AttendStats*, AttentionTap*, MassRequest*) {
  fail_internal("attention on a device runs within that device's runtime");
}

std::unique_ptr<KvSession> DeviceBackend::make_session(CompressedCache& cache, std::pmr::memory_resource*) {
  std::shared_ptr<const CodedForms> forms;
  if (cache.policy().keeps_codes()) {
    std::shared_ptr<const CodedForms>& known = forms_[cache.model()];
    if (!known) known = std::make_shared<const CodedForms>(*cache.model());
    forms = known;
  }
  return std::make_unique<DeviceSession>(cache, std::move(forms));
}

}  // namespace vqkv
