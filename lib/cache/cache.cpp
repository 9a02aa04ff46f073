#include "cache/cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "cache/cache_rows.h"
#include "cache/coding.h"
#include "cache/map.h"
#include "cache/store.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {
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
  // Tokens [from, to) go to `slot` and those after it.
  struct Run {
    int64_t from, to, slot;
  };
  // Codes into pages that are there; exceptions are returned.
  std::vector<OverlayEntry> encode(size_t unit, const Run& run);
  void add_overlay(size_t unit, int64_t slot, std::span<const OverlayEntry> entries);
  // What of [from, to) some head of the unit still sees, in whole codec blocks.
  std::vector<Run> survivors(size_t unit, int64_t from, int64_t to) const;
  // Room for the slots of `runs`, the survivors of `tokens` tokens, and their positions.
  void make_room(size_t unit, int64_t tokens, std::span<const Run> runs);
  void resize_overlay(UnitMap& unit, int64_t capacity);
  // Codec blocks from `first` on, into zeroed places.
  void store_blocks(size_t unit, int64_t first, const CodeBlock& codes);
  // Gives up the slots that no head of the unit sees any more: the others move together, pages behind them are freed.
  void compact(size_t unit);

  // The policy's rule decides at the end of the open block.
  void decide();

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
    auto state = fit_unit(*unit.codec, unit.shape, CacheRows(map, u), tokens);
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

std::vector<OverlayEntry> CompressedCache::Parts::encode(size_t unit, const Run& run) {
  const CacheModel::Unit& u = model->units()[unit];
  const CodedForm& form = map.form(unit);
  CodeBlock codes = encode_unit(*u.codec, form.plan, u.shape, CacheRows(map, unit), run.from, run.to, map.state(unit));
  store_blocks(unit, run.slot / form.plan.layout.block_tokens, codes);
  return std::move(codes.overlay);
}

void CompressedCache::Parts::store_blocks(size_t unit, int64_t first, const CodeBlock& codes) {
  const PageLayout& pages = *map.form(unit).pages;
  for (int64_t done = 0; done < codes.blocks;) {
    const int64_t page = (first + done) / pages.blocks(), within = (first + done) % pages.blocks();
    const int64_t count = std::min(codes.blocks - done, pages.blocks() - within);
    pages.store(HostStore::at(map.units[unit].pages.at(page)), within, codes, done, count);
    done += count;
  }
}

std::vector<CompressedCache::Parts::Run> CompressedCache::Parts::survivors(size_t unit, int64_t from,
                                                                           int64_t to) const {
  const int64_t block = map.form(unit).plan.layout.block_tokens;
  std::vector<Run> runs;
  int64_t slot = map.slots(unit);
  for (int64_t t = from; t < to; t += block) {
    if (!map.alive(unit, t, t + block)) continue;
    if (runs.empty() || runs.back().to != t) runs.push_back({t, t, slot});
    runs.back().to += block;
    slot += block;
  }
  return runs;
}

void CompressedCache::Parts::make_room(size_t unit, int64_t tokens, std::span<const Run> runs) {
  const int64_t held = map.slots(unit);
  int64_t slots = held;
  for (const Run& r : runs) slots += r.to - r.from;
  BlockTable& table = map.units[unit].pages;
  const PageLayout& pages = *map.form(unit).pages;
  const int64_t live = (slots + pages.tokens() - 1) / pages.tokens();
  map.resize(table, std::max<int64_t>(live, table.count));
  while (table.count < live) table.blocks[table.count++] = store.allocate(pages.bytes());
  if (!map.lists_slots(unit)) {
    if (slots - held == tokens) return;
    std::vector<int32_t> all(static_cast<size_t>(held));
    std::iota(all.begin(), all.end(), static_cast<int32_t>(map.policy.sinks));
    map.list_slots(unit, all);
  }
  SlotList& list = *map.units[unit].listed;
  map.reserve_slots(list, slots);
  for (const Run& r : runs)
    for (int64_t t = r.from; t < r.to; ++t) list.positions[list.count++] = static_cast<int32_t>(t);
}

void CompressedCache::Parts::compact(size_t unit) {
  UnitMap& s = map.units[unit];
  const PageLayout& pages = *map.form(unit).pages;
  const int64_t block = pages.layout().block_tokens, slots = map.slots(unit), blocks = slots / block;
  const std::span<const int32_t> listed = map.slot_positions(unit);
  const auto position = [&](int64_t slot) {
    return listed.empty() ? map.policy.sinks + slot : int64_t{listed[static_cast<size_t>(slot)]};
  };
  std::vector<int64_t> kept;  // blocks
  for (int64_t b = 0; b < blocks; ++b)
    if (const int64_t t = position(b * block); map.alive(unit, t, t + block)) kept.push_back(b);
  if (static_cast<int64_t>(kept.size()) == blocks) return;
  // Pages before the first gap stay as they are; the others are written anew.
  int64_t first = 0;
  while (first < static_cast<int64_t>(kept.size()) && kept[static_cast<size_t>(first)] == first) ++first;
  first = first / pages.blocks() * pages.blocks();
  CodeBlock codes;
  codes.resize(pages.layout(), static_cast<int64_t>(kept.size()) - first);
  for (int64_t i = 0; i < codes.blocks;) {
    const int64_t b = kept[static_cast<size_t>(first + i)], within = b % pages.blocks();
    int64_t n = 1;
    while (i + n < codes.blocks && within + n < pages.blocks() && kept[static_cast<size_t>(first + i + n)] == b + n)
      ++n;
    pages.fetch(HostStore::at(s.pages.at(b / pages.blocks())), within, codes, i, n);
    i += n;
  }
  const auto live = static_cast<int32_t>((static_cast<int64_t>(kept.size()) + pages.blocks() - 1) / pages.blocks());
  while (s.pages.count > live) store.release(s.pages.blocks[--s.pages.count], pages.bytes());
  map.resize(s.pages, live);
  for (int64_t p = first / pages.blocks(); p < live; ++p)
    std::fill_n(HostStore::at(s.pages.at(p)), pages.bytes(), std::byte{0});
  store_blocks(unit, first, codes);

  std::vector<int64_t> to(static_cast<size_t>(blocks), -1);
  for (size_t i = 0; i < kept.size(); ++i) to[static_cast<size_t>(kept[i])] = static_cast<int64_t>(i);
  auto* overlay = reinterpret_cast<StoredOverlay*>(HostStore::at(s.overlay));
  int64_t exceptions = 0;
  for (int64_t i = 0; i < s.overlay_count; ++i) {
    StoredOverlay o = overlay[i];
    const int64_t b = to[static_cast<size_t>(o.token / block)];
    if (b < 0) continue;
    o.token = static_cast<int32_t>(b * block + o.token % block);
    overlay[exceptions++] = o;
  }
  s.overlay_count = exceptions;
  resize_overlay(s, exceptions);

  std::vector<int32_t> positions;
  for (const int64_t b : kept)
    for (int64_t i = 0; i < block; ++i) positions.push_back(static_cast<int32_t>(position(b * block + i)));
  map.list_slots(unit, positions);
}

void CompressedCache::Parts::decide() {
  for (int layer = 0; layer < model->shape().layers; ++layer) {
    map.decide(layer);
    for (const size_t u : model->layer_units(layer)) compact(u);
  }
  map.decided = map.observed = map.total();
}

void CompressedCache::Parts::resize_overlay(UnitMap& s, int64_t capacity) {
  if (capacity == s.overlay_capacity) return;
  const int64_t entry = sizeof(StoredOverlay);
  const BlockAddress moved = capacity > 0 ? store.allocate(capacity * entry) : 0;
  if (capacity > 0) std::copy_n(HostStore::at(s.overlay), s.overlay_count * entry, HostStore::at(moved));
  store.release(s.overlay, s.overlay_capacity * entry);
  s.overlay = moved;
  s.overlay_capacity = capacity;
}

void CompressedCache::Parts::add_overlay(size_t unit, int64_t slot, std::span<const OverlayEntry> entries) {
  if (entries.empty()) return;
  const CodeLayout& layout = map.form(unit).plan.layout;
  VQKV_CHECK(layout.overlay && layout.overlay_value_bits == 16 && model->units()[unit].shape.channels() < (1 << 15));
  UnitMap& s = map.units[unit];
  const int64_t needed = s.overlay_count + static_cast<int64_t>(entries.size());
  if (needed > s.overlay_capacity) resize_overlay(s, std::max(needed, s.overlay_capacity * 3 / 2));
  auto* to = reinterpret_cast<StoredOverlay*>(HostStore::at(s.overlay));
  for (const OverlayEntry& e : entries)
    to[s.overlay_count++] = {static_cast<int32_t>(slot) + e.token,
                             static_cast<uint16_t>(e.channel | (e.add ? 0x8000 : 0)), to_f16(e.value)};
}

void CompressedCache::Parts::code(std::span<const int> layers, int64_t tokens, int64_t k_end, int64_t v_end) {
  if (layers.size() > 1 && model->sees_lower()) {  // a layer is coded when the one below it is
    for (const int& layer : layers) code({&layer, 1}, tokens, k_end, v_end);
    return;
  }
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
    std::vector<Run> runs;
    std::vector<std::vector<OverlayEntry>> overlays;  // a run
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
      if (to > from) tasks.push_back({u, from, to, survivors(u, from, to), {}});
      if (first) fits.push_back(u);
    }
  }
  if (tasks.empty()) return;
  const bool whole = map.exact_prompt || map.visibility == Visibility::kAllCoded;
  fit(fits, whole ? tokens : fit_tokens(map.policy, tokens));
  // Allocation alone and in order, before and after coding: the caller's resource is asked by the caller's thread, and
  // the order of blocks in memory does not depend on threads.
  for (Task& task : tasks) {
    make_room(task.unit, task.to - task.from, task.runs);
    task.overlays.resize(task.runs.size());
  }
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    Task& task = tasks[static_cast<size_t>(i)];
    for (size_t r = 0; r < task.runs.size(); ++r) task.overlays[r] = encode(task.unit, task.runs[r]);
  });
  for (const Task& task : tasks) {
    for (size_t r = 0; r < task.runs.size(); ++r) add_overlay(task.unit, task.runs[r].slot, task.overlays[r]);
    const UnitShape& u = model->units()[task.unit].shape;
    map.role(u.layer, u.role).coded_end = task.to;
  }
  encode_seconds += watch.seconds();
}

CompressedCache::CompressedCache(std::shared_ptr<const CacheModel> model, CachePolicy policy,
                                 std::pmr::memory_resource* memory) {
  if (!model->codecs()) policy.codes = policy.drops;
  parts_ = std::make_unique<Parts>(std::move(model), policy, memory);
}
CompressedCache::CompressedCache(std::shared_ptr<const CodecSet> codecs, CachePolicy policy,
                                 std::pmr::memory_resource* memory)
    : CompressedCache(std::make_shared<const CacheModel>(std::move(codecs)), policy, memory) {}
CompressedCache::CompressedCache(const CacheShape& shape, CachePolicy policy, std::pmr::memory_resource* memory)
    : CompressedCache(std::make_shared<const CacheModel>(shape), policy, memory) {}
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
  if (map.policy.keep && visibility == Visibility::kAllCoded)
    fail_usage(
        fmt::format("fake-quant codes all tokens at once; {} decides as the text goes on", map.policy.keep->text()));
  if (map.policy.keep && visibility == Visibility::kExactPrefill && map.prompt < map.length + n)
    fail_internal(fmt::format("an exact prompt reaches {} tokens where {} were expected; {} decides at its end",
                              map.length + n, map.prompt, map.policy.keep->text()));
  VQKV_CHECK(n <= map.next_decision() - map.length);
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
  if (map.total() == map.next_decision()) c.decide();
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

void CompressedCache::expect_prompt(int64_t tokens) {
  SequenceMap& map = parts_->map;
  VQKV_CHECK(!map.open && tokens >= map.length);
  map.prompt = tokens;
}

int64_t CompressedCache::block_limit() const { return parts_->map.next_decision() - parts_->map.length; }

MassRequest CompressedCache::observe(int layer) {
  VQKV_CHECK(parts_->map.open && layer < parts_->map.appended);
  return parts_->map.observe(layer);
}

void CompressedCache::truncate(int64_t n) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open && n >= 0 && n <= map.length);
  for (const RoleMap& r : map.roles)
    if (n < r.coded_end && r.coded_end > map.policy.sinks)
      fail_internal(
          fmt::format("truncate to {} tokens: {} are coded; only exact tokens can be rolled back", n, r.coded_end));
  if (n < map.length && n < map.decided)
    fail_internal(
        fmt::format("truncate to {} tokens: at {} {} took tokens out; roll back to {} or later, or take a policy that "
                    "takes none out (all, streaming)",
                    n, map.decided, map.policy.keep->text(), map.decided));
  if (n < map.length && n < map.observed)
    fail_internal(fmt::format(
        "truncate to {} tokens: {} sums what tokens received, and what the queries from {} on gave "
        "can't be told apart; roll back to {} or later, or take a policy that sums nothing (all, streaming)",
        n, map.policy.keep->text(), n, map.observed));
  map.length = n;
  for (RoleMap& r : map.roles) c.drop_exact(r, r.exact_begin, n);
  map.forget_evictions(n);
}

void CompressedCache::evict(int layer, int kv_head, std::span<const int64_t> positions) {
  Parts& c = *parts_;
  SequenceMap& map = c.map;
  VQKV_CHECK(!map.open && layer >= 0 && layer < shape().layers && kv_head >= 0 && kv_head < shape().kv_heads);
  if (c.model->sees_lower()) fail_usage("codecs that see the layer below need every token in it; none can be given up");
  if (positions.empty()) return;
  map.mark_evicted(layer, kv_head, positions);
  for (const Role role : {Role::kKey, Role::kValue})
    if (const int unit = c.model->unit_of(layer, kv_head, role); unit >= 0) c.compact(static_cast<size_t>(unit));
}

}  // namespace vqkv
