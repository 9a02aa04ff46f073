#include "cache/cache_parts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "cache/cache_rows.h"
#include "cache/coding.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {

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
  for (size_t layer = 0; layer < map.queries.size(); ++layer) keep_queries(static_cast<int>(layer), 0);
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
  drop_front(t, first, chunk_bytes());
}

void CompressedCache::Parts::drop_front(BlockTable& t, int64_t first, int64_t bytes) {
  const int64_t dead = std::min<int64_t>(t.count, std::max<int64_t>(0, first - t.first));
  for (int64_t i = 0; i < dead; ++i) store.release(t.blocks[i], bytes);
  std::copy(t.blocks + dead, t.blocks + t.count, t.blocks);
  t.count -= static_cast<int32_t>(dead);
  t.first += dead;
  map.resize(t, t.count);
}

void CompressedCache::Parts::keep_queries(int layer, int64_t count) {
  HeldQueries& held = map.queries[static_cast<size_t>(layer)];
  const int64_t capacity = HeldQueries::capacity_for(count), had = HeldQueries::capacity_for(held.count);
  const int64_t kept = std::exchange(held.count, count);
  if (capacity == had) return;
  const BlockAddress moved = capacity > 0 ? store.allocate(capacity * map.query_bytes()) : 0;
  std::copy_n(HostStore::at(held.rows), std::min(kept, count) * map.query_bytes(), HostStore::at(moved));
  store.release(held.rows, had * map.query_bytes());
  held.rows = moved;
}

void CompressedCache::Parts::hold_queries(int layer, ConstMatrix q) {
  if (map.queries.empty() || map.coded(layer) || !model->fits_queries(layer)) return;
  const int64_t from = map.queries[static_cast<size_t>(layer)].count, to = fit_tokens(map.policy, map.total());
  if (from == to) return;
  VQKV_CHECK(from == map.length);
  if (q.rows != map.pending || q.cols * static_cast<int64_t>(sizeof(float)) != map.query_bytes())
    fail_internal(fmt::format("a codec of layer {} is fitted to the queries of its prompt; append got {} of {}", layer,
                              q.rows, map.pending));
  keep_queries(layer, to);
  std::byte* rows = HostStore::at(map.queries[static_cast<size_t>(layer)].rows);
  for (int64_t t = from; t < to; ++t)
    std::memcpy(rows + t * map.query_bytes(), q.row(t - from), static_cast<size_t>(map.query_bytes()));
}

void CompressedCache::Parts::fit(std::span<const size_t> units, int64_t tokens) {
  std::vector<std::unique_ptr<FittedForm>> made(units.size());
  parallel_for(static_cast<int64_t>(units.size()), [&](int64_t i) {
    const size_t u = units[static_cast<size_t>(i)];
    const CacheModel::Unit& unit = model->units()[u];
    auto state =
        fit_unit(*unit.codec, unit.shape, model->shape().group(), CacheRows(map, u), tokens, map.policy.fitted_from);
    if (!state) return;
    if (model->tiers() > 1) refuse_fitted_tier(model->codecs()->units()[u].spec.method);
    CodedForm form(*unit.codec, unit.shape, {-1, state.get()}, unit.form->pages, unit.form.get());
    const int64_t state_bytes = state->bytes(), form_bytes = FittedForm::bytes(form, *unit.form);
    made[static_cast<size_t>(i)].reset(new FittedForm{std::move(state), std::move(form), state_bytes, form_bytes});
  });
  for (size_t i = 0; i < units.size(); ++i) {
    if (!made[i]) continue;
    map.fitted.resize(map.units.size());
    map.fitted_to = tokens;
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
  int64_t slot = map.slot_end(unit);
  for (int64_t t = from; t < to; t += block) {
    if (!map.alive(unit, t, t + block)) continue;
    if (runs.empty() || runs.back().to != t) runs.push_back({t, t, slot});
    runs.back().to += block;
    slot += block;
  }
  return runs;
}

void CompressedCache::Parts::make_room(size_t unit, int64_t tokens, std::span<const Run> runs) {
  const int64_t held = map.slot_end(unit);
  int64_t slots = held;
  for (const Run& r : runs) slots += r.to - r.from;
  BlockTable& table = map.units[unit].pages;
  const PageLayout& pages = *map.form(unit).pages;
  if (table.count == 0) table.first = held / pages.tokens();
  const int64_t live = (slots + pages.tokens() - 1) / pages.tokens() - table.first;
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
  std::vector<OverlayEntry> exceptions;
  const CodedBody body = map.body(unit);
  for (size_t i = 0; i < kept.size() && pages.layout().overlay; ++i)
    for (int64_t t = 0; t < block; ++t)
      for (const StoredOverlay& o : body.exceptions(pages, kept[i] * block + t))
        exceptions.push_back({static_cast<int32_t>(static_cast<int64_t>(i) * block + t), o.channel & 0x7fff,
                              to_float(o.value), (o.channel & 0x8000) != 0});
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

  if (pages.layout().overlay) {
    s.overlay_count = 0;
    add_overlay(unit, 0, static_cast<int64_t>(kept.size()) * block, exceptions);
    resize_overlay(s, s.overlay_count);
  }

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
  s.overlay_capacity = static_cast<int32_t>(capacity);
}

void CompressedCache::Parts::drop_overlay(UnitMap& s, int64_t count) {
  if (count == 0) return;
  auto* entries = reinterpret_cast<StoredOverlay*>(HostStore::at(s.overlay));
  std::copy(entries + count, entries + s.overlay_count, entries);
  s.overlay_count -= static_cast<int32_t>(count);
  s.overlay_dropped += static_cast<uint32_t>(count);
  resize_overlay(s, s.overlay_count);
}

void CompressedCache::Parts::add_overlay(size_t unit, int64_t slot, int64_t tokens,
                                         std::span<const OverlayEntry> entries) {
  const PageLayout& pages = *map.form(unit).pages;
  if (!pages.layout().overlay) {
    VQKV_CHECK(entries.empty());
    return;
  }
  UnitMap& s = map.units[unit];
  const int64_t needed = s.overlay_count + static_cast<int64_t>(entries.size());
  VQKV_CHECK(model->units()[unit].shape.channels() < (1 << 15) && needed < INT32_MAX);
  if (needed > s.overlay_capacity)
    resize_overlay(s, std::max<int64_t>(needed, std::min<int64_t>(int64_t{s.overlay_capacity} * 3 / 2, INT32_MAX)));
  auto* to = reinterpret_cast<StoredOverlay*>(HostStore::at(s.overlay));
  auto e = entries.begin();
  for (int64_t t = 0; t < tokens; ++t) {
    std::byte* page = HostStore::at(s.pages.at((slot + t) / pages.tokens()));
    pages.exception_pointers(page)[(slot + t) % pages.tokens()] =
        s.overlay_dropped + static_cast<uint32_t>(s.overlay_count);
    for (; e != entries.end() && e->token == t; ++e)
      to[s.overlay_count++] = {static_cast<uint16_t>(e->channel | (e->add ? 0x8000 : 0)), to_f16(e->value)};
  }
  VQKV_CHECK(e == entries.end());  // in the order of their tokens
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
    const bool first = !map.coded(layer) && std::max(k_end, v_end) > map.policy.sinks;
    for (const size_t u : model->layer_units(layer)) {
      const Role role = model->units()[u].shape.role;
      const int64_t from = map.role(layer, role).coded_end, to = role == Role::kKey ? k_end : v_end;
      if (to > from) tasks.push_back({u, from, to, survivors(u, from, to), {}});
      if (first) fits.push_back(u);
    }
  }
  if (tasks.empty()) return;
  fit(fits, fit_tokens(map.policy, tokens));
  for (const int layer : layers)
    if (!map.queries.empty()) keep_queries(layer, 0);
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
    for (size_t r = 0; r < task.runs.size(); ++r) {
      const Run& run = task.runs[r];
      add_overlay(task.unit, run.slot, run.to - run.from, task.overlays[r]);
    }
    const UnitShape& u = model->units()[task.unit].shape;
    map.role(u.layer, u.role).coded_end = task.to;
  }
  encode_seconds += watch.seconds();
}

void CompressedCache::Parts::age(std::span<const int> layers, int64_t tokens) {
  if (!map.policy.keeps_codes()) return;
  struct Task {
    size_t unit;
    Run run;
    std::vector<OverlayEntry> overlay;
  };
  for (int tier = 1; tier < model->tiers(); ++tier) {
    const Stopwatch watch;
    std::vector<Task> tasks;
    for (const int layer : layers)
      for (const size_t u : model->layer_units(layer, tier)) {
        const Role role = model->units()[u].shape.role;
        const int64_t from = map.tier_end(tier, layer, role);
        const int64_t to = std::min(map.policy.coded_among(role, tokens, model->newer_tokens(tier)),
                                    map.tier_end(tier - 1, layer, role));
        if (to > from) tasks.push_back({u, {from, to, from - map.policy.sinks}, {}});
      }
    for (const Task& t : tasks) make_room(t.unit, t.run.to - t.run.from, {&t.run, 1});
    parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      Task& t = tasks[static_cast<size_t>(i)];
      const CacheModel::Unit& u = model->units()[t.unit];
      CodeBlock codes =
          age_unit(*u.codec, u.level, u.form->plan, u.shape, CacheAgedRows(map, t.unit), t.run.from, t.run.to);
      store_blocks(t.unit, t.run.slot / u.form->plan.layout.block_tokens, codes);
      t.overlay = std::move(codes.overlay);
    });
    for (const Task& t : tasks) {
      add_overlay(t.unit, t.run.slot, t.run.to - t.run.from, t.overlay);
      const UnitShape& u = model->units()[t.unit].shape;
      map.boundary(tier, u.layer, u.role).coded_end = t.run.to;
    }
    encode_seconds += watch.seconds();
  }
}

void CompressedCache::Parts::settle() {
  std::vector<int> layers(static_cast<size_t>(model->shape().layers));
  std::iota(layers.begin(), layers.end(), 0);
  code(layers, map.length, map.policy.coded_among(Role::kKey, map.length),
       map.policy.coded_among(Role::kValue, map.length));
  age(layers, map.length);
  for (RoleMap& r : map.roles) drop_exact(r, r.coded_end, map.length);
  drop_aged();
}

void CompressedCache::Parts::drop_aged() {
  for (int older = 1; older < model->tiers(); ++older)
    for (int layer = 0; layer < model->shape().layers; ++layer)
      for (const size_t u : model->layer_units(layer, older - 1)) {
        const Role role = model->units()[u].shape.role;
        const int64_t begin = map.boundary(older, layer, role).coded_end - map.policy.sinks;
        const int64_t end = map.tier_end(older - 1, layer, role) - map.policy.sinks;
        UnitMap& s = map.units[u];
        const PageLayout& pages = *map.form(u).pages;
        if (pages.layout().overlay && s.overlay_count > 0) drop_overlay(s, map.body(u).exceptions_before(pages, begin));
        // A page without a token is given up, though the next one would come into it.
        drop_front(s.pages, (begin == end ? begin + pages.tokens() - 1 : begin) / pages.tokens(), pages.bytes());
      }
  for (TierBoundary& b : map.boundaries) b.begin = b.coded_end;
}

}  // namespace vqkv
