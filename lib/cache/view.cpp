#include "cache/view.h"

#include <algorithm>

#include "cache/map.h"
#include "cache/store.h"
#include "core/error.h"

namespace vqkv {

CacheView::CacheView(const CompressedCache& cache) : CacheView(cache.map()) {}

CacheView::CacheView(const SequenceMap& map) : model_(map.model.get()), policy_(&map.policy), map_(&map) {}

int64_t CacheView::length() const { return map_->length; }
int64_t CacheView::tokens(int layer) const {
  return map_->length + (map_->open && layer < map_->appended ? map_->pending : 0);
}
int64_t CacheView::coded_end(Role role, int64_t position, int tier) const {
  return map_->coded_end(role, position, tier);
}
int64_t CacheView::coded_end(int layer, Role role) const { return map_->role(layer, role).coded_end; }
int64_t CacheView::exact_begin(int layer, Role role) const { return map_->role(layer, role).exact_begin; }

const CodedForm& CacheView::form(size_t unit) const { return map_->form_read(unit); }
const SequenceState* CacheView::state(size_t unit) const { return map_->state(unit); }

const RecalledPairs* CacheView::recalled() const { return map_->recalled; }

bool CacheView::lists_slots(size_t unit) const { return map_->lists_slots(unit); }
std::span<const int32_t> CacheView::slot_positions(size_t unit) const { return map_->slot_positions(unit); }

CodedBody CacheView::body(int layer, int head, Role role, int tier) const {
  return map_->body(unit(layer, head, role, tier));
}

void CacheView::load_keys(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const {
  load_exact_keys(*map_, layer, head, first, count, out, stride);
}
void CacheView::load_values(int layer, int head, int64_t first, int64_t count, float* out, int64_t stride) const {
  load_exact_values(*map_, layer, head, first, count, out, stride);
}

int64_t CacheView::slots(size_t unit) const { return map_->slots(unit); }
int64_t CacheView::slot_begin(size_t unit) const { return map_->slot_begin(unit); }

CodeBlock CacheView::fetch_codes(size_t unit) const { return fetch_codes(unit, slot_begin(unit), slots(unit)); }

CodeBlock CacheView::fetch_codes(size_t unit, int64_t first, int64_t count) const {
  const PageLayout& pages = *form(unit).pages;
  const CodedBody body = map_->body(unit);
  const int64_t block = pages.layout().block_tokens, from = first / block;
  VQKV_CHECK(first >= slot_begin(unit) && first % block == 0 && count % block == 0);
  VQKV_CHECK(count >= 0 && first + count <= map_->slot_end(unit));
  CodeBlock out;
  out.resize(pages.layout(), count / block);
  for (int64_t done = 0; done < out.blocks;) {
    const int64_t page = (from + done) / pages.blocks(), within = (from + done) % pages.blocks();
    const int64_t n = std::min(pages.blocks() - within, out.blocks - done);
    pages.fetch(body.page(page), within, out, done, n);
    done += n;
  }
  for (int64_t t = 0; t < count && pages.layout().overlay; ++t)
    for (const StoredOverlay& o : body.exceptions(pages, first + t))
      out.overlay.push_back(
          {static_cast<int32_t>(t), o.channel & 0x7fff, to_float(o.value), (o.channel & 0x8000) != 0});
  return out;
}

bool CacheView::any_evicted() const {
  return std::ranges::any_of(map_->evicted, [](const EvictedSet& s) { return s.words != nullptr; });
}

Matrix<float> CacheView::decode_codes(size_t unit, int64_t first, int64_t count) const {
  Matrix<float> lower, x(count, unit_shape(unit).channels());
  if (const int below = added_unit(unit); below >= 0) lower = decode_codes(static_cast<size_t>(below), first, count);
  decode_plan(form(unit).plan, fetch_codes(unit, first, count), x, lower);
  return x;
}

bool CacheView::any_evicted(int layer, int head) const { return map_->evicted_set(layer, head).words != nullptr; }
bool CacheView::evicted(int layer, int head, int64_t position) const {
  return map_->evicted_set(layer, head).contains(position);
}

std::vector<int32_t> CacheView::seen(int layer, int head) const { return map_->seen(layer, head, tokens(layer)); }

const std::byte* CodedBody::page(int64_t index) const { return HostStore::at(unit_->pages.at(index)); }
int64_t CodedBody::exceptions_before(const PageLayout& pages, int64_t slot) const {
  if (slot == slot_end_) return unit_->overlay_count;
  const uint32_t given = pages.exception_pointers(page(slot / pages.tokens()))[slot % pages.tokens()];
  return given - unit_->overlay_dropped;
}
std::span<const StoredOverlay> CodedBody::exceptions(const PageLayout& pages, int64_t slot) const {
  const int64_t begin = exceptions_before(pages, slot), end = exceptions_before(pages, slot + 1);
  return {reinterpret_cast<const StoredOverlay*>(HostStore::at(unit_->overlay)) + begin,
          static_cast<size_t>(end - begin)};
}

}  // namespace vqkv
