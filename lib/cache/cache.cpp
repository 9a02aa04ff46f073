#include "cache/cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "cache/coding.h"
#include "cache/map.h"
#include "cache/store.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
namespace {

// A layer's exact rows, for the coder.
struct LayerRows final : ExactRows {
  LayerRows(const SequenceMap& of_map, int of_layer) : map(of_map), layer(of_layer) {}
  void load(Role role, int head, int64_t first, MutMatrix out) const override {
    if (role == Role::kValue) {
      load_exact_values(map, layer, head, first, out.rows, out.data, out.stride);
      return;
    }
    Matrix<float> transposed(out.cols, out.rows);
    load_exact_keys(map, layer, head, first, out.rows, transposed.data(), out.rows);
    for (int64_t t = 0; t < out.rows; ++t)
      for (int64_t c = 0; c < out.cols; ++c) out(t, c) = transposed(c, t);
  }
  const SequenceMap& map;
  int layer;
};

}  // namespace

struct CompressedCache::Parts {
  Parts(std::shared_ptr<const CacheModel> of_model, CachePolicy policy, std::pmr::memory_resource* memory)
      : model(std::move(of_model)), map(model, policy, memory), store(memory) {}
  ~Parts();
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;

  // Room for the exact rows of tokens [0, tokens).
  void grow_chunks(RoleMap& role, int64_t tokens);
  // Keeps exact tokens [begin, tokens) beyond the sinks.
  void drop_exact(RoleMap& role, int64_t begin, int64_t tokens);
  void free_blocks(const BlockTable& table, int64_t bytes) {
    for (int32_t i = 0; i < table.count; ++i) store.release(table.blocks[i], bytes);
  }
  int64_t chunk_bytes() const { return kChunkTokens * map.row_bytes(); }

  // Codes what `layers` hold exactly up to the ends of their roles, of `tokens` tokens.
  void code(std::span<const int> layers, int64_t tokens, int64_t k_end, int64_t v_end);
  void fit(std::span<const size_t> units, int64_t tokens);
  // Codes into pages that are there; exceptions are returned.
  std::vector<OverlayEntry> encode(size_t unit, int64_t from, int64_t to);
  void add_overlay(size_t unit, int64_t from, std::span<const OverlayEntry> entries);

  std::shared_ptr<const CacheModel> model;
  SequenceMap map;
  HostStore store;
  double encode_seconds = 0;
  std::vector<float> staging;  // rotated keys of one append; freed by end_block
};

CompressedCache::Parts::~Parts() {
  for (const RoleMap& r : map.roles) {
    store.release(r.sinks, map.policy.sinks * map.row_bytes());
    free_blocks(r.chunks, chunk_bytes());
  }
  for (size_t u = 0; u < map.units.size(); ++u) {
    const UnitMap& s = map.units[u];
    free_blocks(s.pages, map.form(u).pages->bytes());
    store.release(s.overlay, s.overlay_capacity * static_cast<int64_t>(sizeof(StoredOverlay)));
  }
  for (const auto& f : map.fitted)
    if (f) store.charge(-(f->state_bytes + f->form_bytes));
}

void CompressedCache::Parts::grow_chunks(RoleMap& role, int64_t tokens) {
  const int64_t sinks = map.policy.sinks;
  if (!role.sinks && sinks > 0) role.sinks = store.allocate(sinks * map.row_bytes());
  BlockTable& t = role.chunks;
  if (t.count == 0) t.first = (std::max(role.exact_begin, sinks) - sinks) / kChunkTokens;
  const int64_t past = std::max<int64_t>(0, tokens - sinks);
  const int64_t live = std::max<int64_t>(t.count, (past + kChunkTokens - 1) / kChunkTokens - t.first);
  map.resize(t, live);
  while (t.count < live) t.blocks[t.count++] = store.allocate(chunk_bytes());
}

void CompressedCache::Parts::drop_exact(RoleMap& role, int64_t begin, int64_t tokens) {
  const int64_t sinks = map.policy.sinks;
  BlockTable& t = role.chunks;
  role.exact_begin = std::max(begin, sinks);
  const int64_t low = role.exact_begin - sinks, high = tokens - sinks;
  const int64_t first = low / kChunkTokens, last = high > low ? (high + kChunkTokens - 1) / kChunkTokens : first;
  while (t.count > 0 && t.first + t.count > last) store.release(t.blocks[--t.count], chunk_bytes());
  const int64_t dead = std::min<int64_t>(t.count, std::max<int64_t>(0, first - t.first));
  for (int64_t i = 0; i < dead; ++i) store.release(t.blocks[i], chunk_bytes());
  std::copy(t.blocks + dead, t.blocks + t.count, t.blocks);
  t.count -= static_cast<int32_t>(dead);
  t.first += dead;
  map.resize(t, t.count);
}

void CompressedCache::Parts::fit(std::span<const size_t> units, int64_t tokens) {
  std::vector<std::unique_ptr<FittedForm>> made(units.size());
  parallel_for(static_cast<int64_t>(units.size()), [&](int64_t i) {
    const size_t u = units[static_cast<size_t>(i)];
    const CacheModel::Unit& unit = model->units()[u];
    auto state = fit_unit(*unit.codec, unit.shape, LayerRows(map, unit.shape.layer), tokens);
    if (!state) return;
    CodedForm form(*unit.codec, unit.shape, state.get(), unit.form->pages);
    const int64_t state_bytes = state->bytes(), form_bytes = FittedForm::bytes(form, *unit.form);
    made[static_cast<size_t>(i)].reset(new FittedForm{std::move(state), std::move(form), state_bytes, form_bytes});
  });
  for (size_t i = 0; i < units.size(); ++i) {
    if (!made[i]) continue;
    map.fitted.resize(map.units.size());
    store.charge(made[i]->state_bytes + made[i]->form_bytes);
    map.fitted[units[i]] = std::move(made[i]);
  }
}

std::vector<OverlayEntry> CompressedCache::Parts::encode(size_t unit, int64_t from, int64_t to) {
  const CacheModel::Unit& u = model->units()[unit];
  const CodedForm& form = map.form(unit);
  CodeBlock codes = encode_unit(*u.codec, form.plan, u.shape, LayerRows(map, u.shape.layer), from, to, map.state(unit));
  const PageLayout& pages = *form.pages;
  for (int64_t done = 0; done < codes.blocks;) {
    const int64_t at = (from - map.policy.sinks) / pages.layout().block_tokens + done;
    const int64_t page = at / pages.blocks(), within = at % pages.blocks();
    const int64_t count = std::min(codes.blocks - done, pages.blocks() - within);
    pages.store(HostStore::at(map.units[unit].pages.at(page)), within, codes, done, count);
    done += count;
  }
  return std::move(codes.overlay);
}

void CompressedCache::Parts::add_overlay(size_t unit, int64_t from, std::span<const OverlayEntry> entries) {
  if (entries.empty()) return;
  const CodeLayout& layout = map.form(unit).plan.layout;
  VQKV_CHECK(layout.overlay && layout.overlay_value_bits == 16 && model->units()[unit].shape.channels() < (1 << 15));
  UnitMap& s = map.units[unit];
  const int64_t entry = sizeof(StoredOverlay), needed = s.overlay_count + static_cast<int64_t>(entries.size());
  if (needed > s.overlay_capacity) {
    const int64_t capacity = std::max(needed, s.overlay_capacity * 3 / 2);
    const BlockAddress grown = store.allocate(capacity * entry);
    std::copy_n(HostStore::at(s.overlay), s.overlay_count * entry, HostStore::at(grown));
    store.release(s.overlay, s.overlay_capacity * entry);
    s.overlay = grown;
    s.overlay_capacity = capacity;
  }
  auto* to = reinterpret_cast<StoredOverlay*>(HostStore::at(s.overlay));
  for (const OverlayEntry& e : entries)
    to[s.overlay_count++] = {static_cast<int32_t>(from - map.policy.sinks) + e.token,
                             static_cast<uint16_t>(e.channel | (e.add ? 0x8000 : 0)), to_f16(e.value)};
}

void CompressedCache::Parts::code(std::span<const int> layers, int64_t tokens, int64_t k_end, int64_t v_end) {
  if (map.policy.drops) {
    for (const int layer : layers)
      for (const Role role : {Role::kKey, Role::kValue}) {
        int64_t& end = map.role(layer, role).coded_end;
        end = std::max(end, role == Role::kKey ? k_end : v_end);
      }
    return;
  }
  struct Task {
    size_t unit;
    int64_t from, to;
    std::vector<OverlayEntry> overlay;
  };
  std::vector<Task> tasks;
  // Parameters of the prompt: for both roles when the first of them codes, since a codec may look at either.
  std::vector<size_t> fits;
  const Stopwatch watch;
  for (const int layer : layers) {
    bool coded = false;
    for (const Role role : {Role::kKey, Role::kValue})
      coded = coded || map.role(layer, role).coded_end > map.policy.sinks;
    const bool first = !coded && std::max(k_end, v_end) > map.policy.sinks;
    for (const size_t u : model->layer_units(layer)) {
      const Role role = model->units()[u].shape.role;
      const int64_t from = map.role(layer, role).coded_end, to = role == Role::kKey ? k_end : v_end;
      if (to > from) tasks.push_back({u, from, to, {}});
      if (first) fits.push_back(u);
    }
  }
  if (tasks.empty()) return;
  const bool whole = map.exact_prompt || map.visibility == Visibility::kAllCoded;
  fit(fits, whole ? tokens : fit_tokens(map.policy, tokens));
  // Allocation alone and in order, before and after coding: the caller's resource is asked by the caller's thread, and
  // the order of blocks in memory does not depend on threads.
  for (const Task& task : tasks) {
    BlockTable& table = map.units[task.unit].pages;
    const PageLayout& pages = *map.form(task.unit).pages;
    const int64_t live = (task.to - map.policy.sinks + pages.tokens() - 1) / pages.tokens();
    map.resize(table, std::max<int64_t>(live, table.count));
    while (table.count < live) table.blocks[table.count++] = store.allocate(pages.bytes());
  }
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    Task& task = tasks[static_cast<size_t>(i)];
    task.overlay = encode(task.unit, task.from, task.to);
  });
  for (const Task& task : tasks) {
    add_overlay(task.unit, task.from, task.overlay);
    const UnitShape& u = model->units()[task.unit].shape;
    map.role(u.layer, u.role).coded_end = task.to;
  }
  encode_seconds += watch.seconds();
}

CompressedCache::CompressedCache(std::shared_ptr<const CacheModel> model, CachePolicy policy,
                                 std::pmr::memory_resource* memory)
    : parts_(std::make_unique<Parts>(std::move(model), policy, memory)) {}
CompressedCache::CompressedCache(std::shared_ptr<const CodecSet> codecs, CachePolicy policy,
                                 std::pmr::memory_resource* memory)
    : CompressedCache(std::make_shared<const CacheModel>(std::move(codecs)), policy, memory) {}
CompressedCache::CompressedCache(const CacheShape& shape, CachePolicy policy, std::pmr::memory_resource* memory) {
  policy.codes = policy.drops;
  parts_ = std::make_unique<Parts>(std::make_shared<const CacheModel>(shape), policy, memory);
}
CompressedCache::~CompressedCache() = default;
CompressedCache::CompressedCache(CompressedCache&&) noexcept = default;

const CacheShape& CompressedCache::shape() const { return parts_->model->shape(); }
const CachePolicy& CompressedCache::policy() const { return parts_->map.policy; }
const CodecSet* CompressedCache::codecs() const { return parts_->model->codecs(); }
const SequenceMap& CompressedCache::map() const { return parts_->map; }
int64_t CompressedCache::length() const { return parts_->map.length; }
double CompressedCache::encode_seconds() const { return parts_->encode_seconds; }
ByteLedger CompressedCache::bytes() const { return parts_->map.bytes(); }
int64_t CompressedCache::bits_held() const { return 8 * bytes().total_sequence(); }
bool CompressedCache::fitted() const { return !parts_->map.fitted.empty(); }

int64_t CompressedCache::coded_begin(Role) const { return parts_->map.policy.sinks; }
int64_t CompressedCache::coded_end(Role role, int64_t position) const { return parts_->map.coded_end(role, position); }

void CompressedCache::begin_block(int64_t n, Visibility visibility) {
  SequenceMap& map = parts_->map;
  VQKV_CHECK(!map.open && n > 0 && map.length + n < INT32_MAX);
  if (map.policy.drops && visibility == Visibility::kAllCoded)
    fail_usage("fake-quant codes every token; a cache that drops what leaves its window has none to code");
  VQKV_CHECK(!map.exact_prompt || visibility == Visibility::kExactPrefill);  // end_exact_prefill() comes first
  map.open = true;
  map.pending = n;
  map.appended = 0;
  map.visibility = visibility;
}

void CompressedCache::append(int layer, ConstMatrix k, ConstMatrix v) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  const CacheShape& shape = c.model->shape();
  const int64_t d = shape.head_dim, width = shape.kv_heads * d, pending = map.pending;
  VQKV_CHECK(map.open && layer == map.appended && layer < shape.layers);
  VQKV_CHECK(k.rows == pending && v.rows == pending && k.cols == width && v.cols == width);

  // Keys: heads whose unit codes after RoPE are rotated once, here.
  c.staging.resize(static_cast<size_t>(pending * width));
  MutMatrix rows(c.staging.data(), pending, width);
  constexpr int64_t kRows = 32;  // a task: tens of microseconds
  parallel_for((pending + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t first = task * kRows, count = std::min(kRows, pending - first);
    std::array<int32_t, kRows> positions;
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(k.row(first + r), width, rows.row(first + r));
      positions[static_cast<size_t>(r)] = static_cast<int32_t>(map.length + first + r);
    }
    for (int h = 0; h < shape.kv_heads; ++h)
      if (c.model->keys_post_rope(layer, h))
        rope_apply(c.model->rope(), positions.data(), rows.slice_rows(first, count).slice_cols(h * d, d));
  });
  // Allocation first and alone: the order of blocks in memory does not depend on threads.
  for (const Role role : {Role::kKey, Role::kValue}) c.grow_chunks(map.role(layer, role), map.total());
  const auto store = [&](int64_t i) {
    const Role role = i % 2 == 0 ? Role::kKey : Role::kValue;
    store_exact(map, layer, role, static_cast<int>(i / 2), role == Role::kKey ? ConstMatrix(rows) : v, map.length);
  };
  const int64_t stores = 2 * shape.kv_heads;
  if (pending < kRows)  // a step stores less than waking a thread costs
    for (int64_t i = 0; i < stores; ++i) store(i);
  else
    parallel_for(stores, store);
  ++map.appended;
  if (!map.policy.codes || map.visibility == Visibility::kExactPrefill) return;
  // What the last query of this block and the first of the next will see coded.
  int64_t end[2];
  for (const Role role : {Role::kKey, Role::kValue}) {
    end[static_cast<int>(role)] = map.visibility == Visibility::kAllCoded ? map.whole_blocks(role, map.total())
                                                                          : map.policy.coded_among(role, map.total());
  }
  c.code({&layer, 1}, map.total(), end[0], end[1]);
}

void CompressedCache::end_block() {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(map.open && map.appended == c.model->shape().layers);
  map.open = false;
  map.length += map.pending;
  map.pending = 0;
  std::vector<float>().swap(c.staging);  // "= {}" would keep its memory
  if (map.visibility == Visibility::kExactPrefill) map.exact_prompt = map.policy.codes;
  for (RoleMap& r : map.roles) c.drop_exact(r, map.exact_prompt ? r.exact_begin : r.coded_end, map.length);
}

void CompressedCache::end_exact_prefill() {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open);
  if (!map.exact_prompt) return;
  std::vector<int> layers(static_cast<size_t>(c.model->shape().layers));
  std::iota(layers.begin(), layers.end(), 0);
  c.code(layers, map.length, map.policy.coded_among(Role::kKey, map.length),
         map.policy.coded_among(Role::kValue, map.length));
  map.exact_prompt = false;
  for (RoleMap& r : map.roles) c.drop_exact(r, r.coded_end, map.length);
}

void CompressedCache::truncate(int64_t n) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open && n >= 0 && n <= map.length);
  for (const RoleMap& r : map.roles)
    if (n < r.coded_end && r.coded_end > map.policy.sinks)
      fail_internal(
          fmt::format("truncate to {} tokens: {} are coded; only exact tokens can be rolled back", n, r.coded_end));
  map.length = n;
  for (RoleMap& r : map.roles) c.drop_exact(r, r.exact_begin, n);
  map.forget_evictions(n);
}

void CompressedCache::evict(int layer, int kv_head, std::span<const int64_t> positions) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open && layer >= 0 && layer < shape().layers && kv_head >= 0 && kv_head < shape().kv_heads);
  if (positions.empty()) return;
  map.mark_evicted(layer, kv_head, positions);
  for (const Role role : {Role::kKey, Role::kValue}) {
    const int index = c.model->unit_of(layer, kv_head, role);
    if (index < 0) continue;
    const auto unit = static_cast<size_t>(index);
    UnitMap& s = map.units[unit];
    const PageLayout& pages = *map.form(unit).pages;
    const int64_t full = map.body_tokens(unit) / pages.tokens();
    for (int64_t page = 0; page < full; ++page) {
      BlockAddress& at = s.pages.blocks[page];
      if (at == 0 || !map.page_is_dead(unit, page)) continue;
      c.store.release(at, pages.bytes());
      at = 0;
      ++s.dead_pages;
    }
  }
}

}  // namespace vqkv
