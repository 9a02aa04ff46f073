#include "cache/impl.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "cache/coding.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/thread_pool.h"

namespace vqkv {

using Impl = CompressedCache::Impl;

void UnitFacts::prepare() {
  decoders.clear();
  for (int h = 0; h < shape.heads; ++h) decoders.emplace_back(plan, pages, shape.role, h, shape.head_dim);
}

Impl::Impl(const CacheShape& shape_in, CachePolicy policy_in, std::shared_ptr<const CodecSet> codecs_in,
           std::pmr::memory_resource* memory_in)
    : shape(shape_in),
      policy(policy_in),
      codecs(std::move(codecs_in)),
      memory(memory_in),
      rope(std::make_shared<RopeTable>(shape_in.rope)),
      roles(memory_in),
      stores(memory_in),
      evicted(memory_in) {
  VQKV_CHECK(shape.layers > 0 && shape.kv_heads > 0 && shape.head_dim > 0 && shape.q_heads % shape.kv_heads == 0);
  VQKV_CHECK(policy.sinks >= 0 && policy.k.flush >= 1 && policy.v.flush >= 1 && policy.k.window >= 0 &&
             policy.v.window >= 0);
  unit_index.assign(static_cast<size_t>(2 * shape.layers * shape.kv_heads), -1);
  layer_units.resize(static_cast<size_t>(shape.layers));
  if (codecs) {
    std::map<const Codec*, std::pair<DecodePlan, std::shared_ptr<const PageLayout>>> shared;
    units.reserve(codecs->units().size());
    for (const TrainedUnit& u : codecs->units()) {
      const UnitShape& at = u.spec.unit;
      VQKV_CHECK(u.codec && at.layer >= 0 && at.layer < shape.layers && at.first_head >= 0 &&
                 at.first_head + at.heads <= shape.kv_heads && u.codec->channels() == at.heads * shape.head_dim);
      const int64_t block = u.codec->layout().block_tokens, flush = policy.rule(at.role).flush;
      if (policy.codes && flush % block != 0)
        fail_usage(fmt::format("cache.{}: flush {} is not a multiple of the {} tokens that codec '{}' codes together",
                               role_name(at.role), flush, block, u.spec.method));
      auto known = shared.find(u.codec.get());
      if (known == shared.end())
        known =
            shared.emplace(u.codec.get(), std::pair(u.codec->plan(), std::make_shared<PageLayout>(u.codec->layout())))
                .first;
      UnitFacts facts;
      facts.shape = at;
      facts.codec = u.codec.get();
      facts.plan = known->second.first;
      facts.pages = known->second.second;
      int64_t& together = block_tokens[static_cast<int>(at.role)];
      together = std::lcm(together, block);
      layer_units[static_cast<size_t>(at.layer)].push_back(units.size());
      for (int h = 0; h < at.heads; ++h) {
        int& index = unit_index[slot(at.layer, at.role) * static_cast<size_t>(shape.kv_heads) +
                                static_cast<size_t>(at.first_head + h)];
        VQKV_CHECK(index < 0);
        index = static_cast<int>(units.size());
      }
      facts.prepare();
      units.push_back(std::move(facts));
    }
    if (!units.empty())
      for (const int index : unit_index) VQKV_CHECK(index >= 0);
  }
  if (units.empty() && policy.codes) fail_internal("a policy that codes needs a codec for every layer and head");
  roles.reserve(static_cast<size_t>(2 * shape.layers));
  for (int i = 0; i < 2 * shape.layers; ++i) {
    RoleStore s;
    s.exact_begin = s.coded_end = policy.sinks;
    roles.push_back(s);
  }
  evicted.reserve(static_cast<size_t>(shape.layers * shape.kv_heads));
  evicted.resize(static_cast<size_t>(shape.layers * shape.kv_heads));
  if (!units.empty()) {
    stores.reserve(units.size());
    stores.resize(units.size());
  }
}

Impl::~Impl() {
  for (RoleStore& s : roles) {
    release(s.sinks, policy.sinks * row_bytes());
    free_table(s.chunks, kChunkTokens * row_bytes());
  }
  for (const EvictedSet& e : evicted) release(e.words, e.count * static_cast<int64_t>(sizeof(uint64_t)));
  for (size_t u = 0; u < stores.size(); ++u) {
    free_table(stores[u].pages, units[u].pages->bytes());
    release(stores[u].overlay, stores[u].overlay_capacity * static_cast<int64_t>(sizeof(StoredOverlay)));
    release(stores[u].state_charge, stores[u].state_bytes);
  }
}

void Impl::resize_table(BlockTable& table, int64_t live) {
  const int64_t capacity = BlockTable::capacity_for(live);
  VQKV_CHECK(live >= table.count && live < INT32_MAX);
  if (capacity == table.capacity) return;
  auto** blocks = capacity == 0
                      ? nullptr
                      : reinterpret_cast<std::byte**>(allocate(capacity * static_cast<int64_t>(sizeof(std::byte*))));
  std::copy_n(table.blocks, table.count, blocks);
  release(table.blocks, table.capacity * static_cast<int64_t>(sizeof(std::byte*)));
  table.blocks = blocks;
  table.capacity = static_cast<int32_t>(capacity);
}

void Impl::free_table(BlockTable& table, int64_t block_bytes) {
  for (int32_t i = 0; i < table.count; ++i) release(table.blocks[i], block_bytes);
  release(table.blocks, table.capacity * static_cast<int64_t>(sizeof(std::byte*)));
  table = {};
}

void Impl::grow_chunks(RoleStore& store, int64_t tokens) {
  if (!store.sinks && policy.sinks > 0) {
    store.sinks = allocate(policy.sinks * row_bytes());
    std::memset(store.sinks, 0, static_cast<size_t>(policy.sinks * row_bytes()));
  }
  BlockTable& t = store.chunks;
  if (t.count == 0) t.first = (std::max(store.exact_begin, policy.sinks) - policy.sinks) / kChunkTokens;
  const int64_t past = std::max<int64_t>(0, tokens - policy.sinks);
  const int64_t live = std::max<int64_t>(t.count, (past + kChunkTokens - 1) / kChunkTokens - t.first);
  resize_table(t, live);
  while (t.count < live) {
    std::byte* chunk = allocate(kChunkTokens * row_bytes());
    std::memset(chunk, 0, static_cast<size_t>(kChunkTokens * row_bytes()));
    t.blocks[t.count++] = chunk;
  }
}

// Keeps exact tokens [begin, tokens) beyond the sinks.
void Impl::drop_exact(RoleStore& store, int64_t begin, int64_t tokens) {
  const int64_t chunk_bytes = kChunkTokens * row_bytes();
  BlockTable& t = store.chunks;
  store.exact_begin = std::max(begin, policy.sinks);
  const int64_t low = store.exact_begin - policy.sinks, high = tokens - policy.sinks;
  const int64_t first = low / kChunkTokens, last = high > low ? (high + kChunkTokens - 1) / kChunkTokens : first;
  while (t.count > 0 && t.first + t.count > last) release(t.blocks[--t.count], chunk_bytes);
  const int64_t dead = std::min<int64_t>(t.count, std::max<int64_t>(0, first - t.first));
  for (int64_t i = 0; i < dead; ++i) release(t.blocks[i], chunk_bytes);
  std::copy(t.blocks + dead, t.blocks + t.count, t.blocks);
  t.count -= static_cast<int32_t>(dead);
  t.first += dead;
  resize_table(t, t.count);
}

namespace {

// Element (head, channel, token) of a chunk that holds `held` tokens. Keys are channel-major, so that a tile of K^T is
// read in runs of tokens; values are token-major.
int64_t place(Role role, int64_t head, int64_t channel, int64_t token, int64_t head_dim, int64_t held) {
  return role == Role::kKey ? (head * head_dim + channel) * held + token : (head * held + token) * head_dim + channel;
}

// Refuses what leaves the type: an infinity would poison every query, and a clipped value would be another one.
void narrow(const CachePolicy& policy, const float* values, int64_t n, std::byte* base, int64_t index) {
  policy.check_exact(values, n);
  switch (policy.exact_dtype) {
    case DType::kF16:
      to_f16(values, reinterpret_cast<f16*>(base) + index, n);
      return;
    case DType::kBF16:
      to_bf16(values, reinterpret_cast<bf16*>(base) + index, n);
      return;
    default:
      std::memcpy(reinterpret_cast<float*>(base) + index, values, static_cast<size_t>(4 * n));
      return;
  }
}

void widen(DType type, const std::byte* base, int64_t index, int64_t count, float* out) {
  switch (type) {
    case DType::kF16:
      to_float(reinterpret_cast<const f16*>(base) + index, out, count);
      return;
    case DType::kBF16:
      to_float(reinterpret_cast<const bf16*>(base) + index, out, count);
      return;
    default:
      std::memcpy(out, reinterpret_cast<const float*>(base) + index, static_cast<size_t>(4 * count));
      return;
  }
}

// Runs of tokens that lie in one block of memory: the sinks, then chunk by chunk.
template <class Body>
void for_each_run(const RoleStore& store, int64_t sinks, int64_t first, int64_t count, Body&& body) {
  for (int64_t t = first; t < first + count;) {
    if (t < sinks) {
      const int64_t n = std::min(sinks, first + count) - t;
      body(store.sinks, sinks, t, t - first, n);
      t += n;
    } else {
      const int64_t chunk = (t - sinks) / kChunkTokens, within = (t - sinks) % kChunkTokens;
      const int64_t n = std::min(kChunkTokens - within, first + count - t);
      body(store.chunks.at(chunk), kChunkTokens, within, t - first, n);
      t += n;
    }
  }
}

}  // namespace

void Impl::store_exact(int layer, Role role, int head, ConstMatrix rows, int64_t first_token) {
  const int64_t d = shape.head_dim;
  std::vector<float> line(static_cast<size_t>(std::max(d, std::max(policy.sinks, kChunkTokens))));
  for_each_run(role_store(layer, role), policy.sinks, first_token, rows.rows,
               [&](std::byte* base, int64_t held, int64_t within, int64_t at, int64_t n) {
                 if (role == Role::kKey) {
                   for (int64_t c = 0; c < d; ++c) {
                     for (int64_t i = 0; i < n; ++i) line[static_cast<size_t>(i)] = rows(at + i, head * d + c);
                     narrow(policy, line.data(), n, base, place(role, head, c, within, d, held));
                   }
                 } else {
                   for (int64_t i = 0; i < n; ++i) {
                     std::copy_n(rows.row(at + i) + head * d, d, line.data());
                     narrow(policy, line.data(), d, base, place(role, head, 0, within + i, d, held));
                   }
                 }
               });
}

void Impl::load_keys(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const {
  const int64_t d = shape.head_dim;
  for_each_run(role_store(layer, Role::kKey), policy.sinks, first, count,
               [&](const std::byte* base, int64_t held, int64_t within, int64_t at, int64_t n) {
                 for (int64_t c = 0; c < d; ++c)
                   widen(policy.exact_dtype, base, place(Role::kKey, head, c, within, d, held), n,
                         out + c * stride + at);
               });
}

void Impl::load_values(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const {
  const int64_t d = shape.head_dim;
  for_each_run(role_store(layer, Role::kValue), policy.sinks, first, count,
               [&](const std::byte* base, int64_t held, int64_t within, int64_t at, int64_t n) {
                 for (int64_t i = 0; i < n; ++i)
                   widen(policy.exact_dtype, base, place(Role::kValue, head, 0, within + i, d, held), d,
                         out + (at + i) * stride);
               });
}

int64_t Impl::whole_blocks(Role role, int64_t end) const {
  const int64_t block = block_tokens[static_cast<int>(role)];
  return policy.sinks + std::max<int64_t>(0, end - policy.sinks) / block * block;
}

namespace {

// A layer's exact rows, for the coder.
struct LayerRows final : ExactRows {
  LayerRows(const Impl& cache, int layer) : cache(cache), layer(layer) {}
  void load(Role role, int head, int64_t first, MutMatrix out) const override {
    if (role == Role::kValue) {
      cache.load_values(layer, head, first, out.rows, out.data, out.stride);
      return;
    }
    Matrix<float> transposed(out.cols, out.rows);
    cache.load_keys(layer, head, first, out.rows, transposed.data(), out.rows);
    for (int64_t t = 0; t < out.rows; ++t)
      for (int64_t c = 0; c < out.cols; ++c) out(t, c) = transposed(c, t);
  }
  const Impl& cache;
  int layer;
};

}  // namespace

void Impl::fit(size_t unit, int64_t tokens) {
  UnitFacts& u = units[unit];
  u.state = fit_unit(*u.codec, u.shape, LayerRows(*this, u.shape.layer), tokens);
  if (!u.state) return;
  u.plan = u.codec->plan({-1, u.state.get()});
  u.prepare();
}

void Impl::encode(size_t unit, int64_t from, int64_t to) {
  UnitFacts& u = units[unit];
  const CodeBlock codes =
      encode_unit(*u.codec, u.plan, u.shape, LayerRows(*this, u.shape.layer), from, to, u.state.get());
  UnitStore& s = stores[unit];
  const int64_t block = u.pages->layout().block_tokens;
  for (int64_t done = 0; done < codes.blocks;) {
    const int64_t at = (from - policy.sinks) / block + done;
    const int64_t page = at / u.pages->blocks(), within = at % u.pages->blocks();
    const int64_t count = std::min(codes.blocks - done, u.pages->blocks() - within);
    u.pages->store(s.pages.at(page), within, codes, done, count);
    done += count;
  }
  if (codes.overlay.empty()) return;
  VQKV_CHECK(u.pages->layout().overlay && u.pages->layout().overlay_value_bits == 16 && u.shape.channels() < (1 << 15));
  const int64_t entry = sizeof(StoredOverlay), added = static_cast<int64_t>(codes.overlay.size());
  if (s.overlay_count + added > s.overlay_capacity) {
    const int64_t capacity = std::max(s.overlay_count + added, s.overlay_capacity * 3 / 2);
    auto* grown = reinterpret_cast<StoredOverlay*>(allocate(capacity * entry));
    std::copy_n(s.overlay, s.overlay_count, grown);
    release(s.overlay, s.overlay_capacity * entry);
    s.overlay = grown;
    s.overlay_capacity = capacity;
  }
  for (const OverlayEntry& e : codes.overlay)
    s.overlay[s.overlay_count++] = {static_cast<int32_t>(from - policy.sinks) + e.token,
                                    static_cast<uint16_t>(e.channel | (e.add ? 0x8000 : 0)), to_f16(e.value)};
}

CodeBlock Impl::fetch_codes(size_t unit) const {
  const UnitFacts& u = units[unit];
  const UnitStore& s = stores[unit];
  const int64_t blocks =
      (role_store(u.shape.layer, u.shape.role).coded_end - policy.sinks) / u.pages->layout().block_tokens;
  CodeBlock out;
  out.resize(u.pages->layout(), blocks);
  for (int64_t at = 0; at < blocks; at += u.pages->blocks()) {
    const std::byte* page = s.pages.at(at / u.pages->blocks());
    if (page) u.pages->fetch(page, 0, out, at, std::min(u.pages->blocks(), blocks - at));
  }
  for (int64_t i = 0; i < s.overlay_count; ++i) {
    const StoredOverlay& o = s.overlay[i];
    out.overlay.push_back({o.token, o.channel & 0x7fff, to_float(o.value), (o.channel & 0x8000) != 0});
  }
  return out;
}

void Impl::evict(int layer, int head, std::span<const int64_t> positions) {
  EvictedSet& set = evicted[static_cast<size_t>(layer * shape.kv_heads + head)];
  int64_t words = set.count;
  for (const int64_t p : positions) {
    VQKV_CHECK(p >= 0 && p < length);
    words = std::max(words, p / 64 + 1);
  }
  if (words > set.count) {
    auto* grown = reinterpret_cast<uint64_t*>(allocate(words * static_cast<int64_t>(sizeof(uint64_t))));
    std::fill_n(std::copy_n(set.words, set.count, grown), words - set.count, 0);
    release(set.words, set.count * static_cast<int64_t>(sizeof(uint64_t)));
    set.words = grown;
    set.count = words;
  }
  for (const int64_t p : positions) set.words[p / 64] |= uint64_t{1} << (p % 64);

  for (const Role role : {Role::kKey, Role::kValue}) {
    const int index = unit_of(layer, head, role);
    if (index < 0) continue;
    const UnitFacts& u = units[static_cast<size_t>(index)];
    UnitStore& s = stores[static_cast<size_t>(index)];
    const int64_t tokens = u.pages->tokens(), full = (role_store(layer, role).coded_end - policy.sinks) / tokens;
    for (int64_t page = 0; page < full; ++page) {
      std::byte*& at = s.pages.blocks[page];
      bool dead = at != nullptr;
      for (int h = u.shape.first_head; dead && h < u.shape.first_head + u.shape.heads; ++h)
        for (int64_t t = 0; dead && t < tokens; ++t)
          dead = evicted_set(layer, h).contains(policy.sinks + page * tokens + t);
      if (!dead) continue;
      release(at, u.pages->bytes());
      at = nullptr;
      ++s.dead_pages;
    }
  }
}

void Impl::forget_evictions(int64_t from) {
  for (EvictedSet& set : evicted)
    for (int64_t w = from / 64; w < set.count; ++w)
      set.words[w] &= w > from / 64 ? 0 : (uint64_t{1} << (from % 64)) - 1;
}

void Impl::code_role_units(const std::vector<int>& layers, int64_t tokens, int64_t k_end, int64_t v_end) {
  struct Task {
    size_t unit;
    int64_t from, to;
  };
  std::vector<Task> tasks;
  const Stopwatch watch;
  for (const int layer : layers) {
    for (const size_t u : layer_units[static_cast<size_t>(layer)]) {
      const RoleStore& store = roles[slot(layer, units[u].shape.role)];
      const int64_t end = units[u].shape.role == Role::kKey ? k_end : v_end;
      if (end > store.coded_end) tasks.push_back({u, store.coded_end, end});
    }
  }
  if (tasks.empty()) return;
  // Parameters of the prompt: for both roles when the first of them codes, since a codec may look at either.
  std::vector<size_t> fits;
  for (const int layer : layers)
    if (role_store(layer, Role::kKey).coded_end == policy.sinks &&
        role_store(layer, Role::kValue).coded_end == policy.sinks && (k_end > policy.sinks || v_end > policy.sinks))
      for (const size_t u : layer_units[static_cast<size_t>(layer)])
        if (!units[u].state) fits.push_back(u);
  const bool whole = exact_prompt || visibility == Visibility::kAllCoded;
  const int64_t prompt = whole ? tokens : fit_tokens(policy, tokens);
  parallel_for(static_cast<int64_t>(fits.size()), [&](int64_t i) { fit(fits[static_cast<size_t>(i)], prompt); });
  for (const size_t u : fits) {
    if (!units[u].state) continue;
    stores[u].state_bytes = units[u].state->bytes();
    stores[u].state_charge = allocate(stores[u].state_bytes);
  }
  // Allocation first and alone: the order of blocks in memory does not depend on threads.
  for (const Task& task : tasks) {
    UnitStore& s = stores[task.unit];
    const PageLayout& pages = *units[task.unit].pages;
    const int64_t live = (task.to - policy.sinks + pages.tokens() - 1) / pages.tokens();
    resize_table(s.pages, std::max<int64_t>(live, s.pages.count));
    while (s.pages.count < live) {
      std::byte* page = allocate(pages.bytes());
      std::memset(page, 0, static_cast<size_t>(pages.bytes()));
      s.pages.blocks[s.pages.count++] = page;
    }
  }
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    encode(task.unit, task.from, task.to);
  });
  for (const Task& task : tasks) {
    const UnitFacts& u = units[task.unit];
    roles[slot(u.shape.layer, u.shape.role)].coded_end = task.to;
  }
  encode_seconds += watch.seconds();
}

}  // namespace vqkv
