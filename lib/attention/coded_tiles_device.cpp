#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "attention/coded_tiles.h"
#include "attention/level_decode.h"
#include "attention/pq_decode.h"
#include "core/error.h"

namespace vqkv {

using device::Buffer;

CodedForms::CodedForms(const CacheModel& model) {
  const CacheShape& shape = model.shape();
  if (model.tiers() > 1) fail_unavailable("attention on a device: tiers of codes by age have no kernel");
  bool first = true;
  for (const CacheModel::Unit& unit : model.units()) {
    const auto refuse = [&](const std::string& why) {
      fail_unavailable(fmt::format("attention on a device can't run {} of layer {}: {}",
                                   unit.shape.role == Role::kKey ? "keys" : "values", unit.shape.layer, why));
    };
    if (unit.codec->fit_needs().tokens > 0) refuse("its parameters are fitted to each prompt");
    std::string why;
    const auto family = tile_family(unit.form->plan, unit.shape.role, shape.head_dim, why);
    if (!family) refuse(why);
    if (!first && *family != family_) refuse("its codes are of another form than those before it");
    family_ = *family;
    first = false;
  }
  VQKV_CHECK(!first);
  const int most = family_.kind == TileFamily::Kind::kPq ? kPqGroup : kLevelGroup;
  if (shape.group() > most)
    fail_unavailable(fmt::format(
        "attention on a device: {} query heads a KV head; kernels of these codes take up to {}", shape.group(), most));
  if (family_.kind != TileFamily::Kind::kPq) return;
  const auto of_head = static_cast<size_t>(shape.head_dim) * kPqEntries;
  of_layer_ = static_cast<size_t>(shape.kv_heads) * of_head;
  for (const Role role : {Role::kKey, Role::kValue}) {
    std::vector<uint16_t> halves(static_cast<size_t>(shape.layers) * of_layer_);
    for (const CacheModel::Unit& unit : model.units()) {
      if (unit.shape.role != role) continue;
      for (int h = 0; h < unit.shape.heads; ++h) {
        const size_t at = static_cast<size_t>(unit.shape.layer) * of_layer_ +
                          static_cast<size_t>(unit.shape.first_head + h) * of_head;
        pack_pq_books(unit.form->plan, role, h, shape.head_dim, std::span(halves).subspan(at, of_head));
      }
    }
    books_[role == Role::kValue] = Buffer<uint16_t>(std::span<const uint16_t>(halves), "books");
  }
}

const uint16_t* CodedForms::books(int layer, Role role) const {
  return books_[role == Role::kValue].data() + static_cast<size_t>(layer) * of_layer_;
}

CodedTiles::CodedTiles(std::shared_ptr<const CodedForms> forms, const CacheShape& shape)
    : forms_(std::move(forms)), shape_(shape), layers_(static_cast<size_t>(shape.layers)) {
  reserve(8);
}

CodedTiles::~CodedTiles() = default;

void CodedTiles::reserve(int64_t tiles) {
  if (tiles <= room_) return;
  const auto room = static_cast<size_t>(std::max(tiles, room_ + room_ / 2)),
             heads = static_cast<size_t>(shape_.kv_heads);
  const auto grow = [&](auto& buffer, size_t of_head, const char* name) {
    using B = std::remove_reference_t<decltype(buffer)>;
    if (of_head == 0) return;
    B larger(room * heads * of_head, name);
    larger.zero();  // tokens beyond the last of a tile are read
    if (held_ > 0)
      device::copy_within(larger.data(), buffer.data(),
                          static_cast<size_t>(held_) * heads * of_head * sizeof(*larger.data()));
    buffer = std::move(larger);
  };
  const TileFamily& family = forms_->family();
  for (Layer& layer : layers_)
    for (int role = 0; role < 2; ++role) {
      grow(layer.codes[role], family.code_bytes(shape_.head_dim), "codes");
      grow(layer.sides[role], family.side_halves(shape_.head_dim), "scales and zeros");
    }
  std::vector<int32_t> table(room);
  std::iota(table.begin(), table.end(), 0);
  table_ = Buffer<int32_t>(std::span<const int32_t>(table), "tile table");
  room_ = static_cast<int64_t>(room);
}

void CodedTiles::put(const CacheView& cache, int layer, Role role, int64_t first, int64_t end) {
  static_assert(kPqTile == kLevelTile);
  if (first >= end) return;
  const int64_t from = first / kPqTile, to = (end + kPqTile - 1) / kPqTile;
  reserve(to);
  const TileFamily& family = forms_->family();
  const size_t code_bytes = family.code_bytes(shape_.head_dim), halves = family.side_halves(shape_.head_dim),
               heads = static_cast<size_t>(shape_.kv_heads), count = static_cast<size_t>(to - from) * heads;
  std::vector<uint32_t> codes(count * code_bytes / sizeof(uint32_t));
  std::vector<uint16_t> sides(count * halves);
  for (const size_t u : cache.layer_units(layer)) {
    const UnitShape& unit = cache.unit_shape(u);
    if (unit.role != role) continue;
    const CodeBlock block = cache.fetch_codes(u, from * kPqTile, end - from * kPqTile);
    const DecodePlan& plan = cache.form(u).plan;
    for (int64_t t = from; t < to; ++t)
      for (int h = 0; h < unit.heads; ++h) {
        const size_t at = static_cast<size_t>(t - from) * heads + static_cast<size_t>(unit.first_head + h);
        const auto words = std::span(codes).subspan(at * code_bytes / sizeof(uint32_t), code_bytes / sizeof(uint32_t));
        if (family.kind == TileFamily::Kind::kPq)
          pack_pq_tile(plan, block, (t - from) * kPqTile, h, shape_.head_dim,
                       {reinterpret_cast<uint8_t*>(words.data()), code_bytes});
        else
          pack_level_tile(plan, block, role, (t - from) * kLevelTile, h, shape_.head_dim, words,
                          std::span(sides).subspan(at * halves, halves));
      }
  }
  Layer& to_layer = layers_[static_cast<size_t>(layer)];
  const size_t r = role == Role::kValue, before = static_cast<size_t>(from) * heads;
  device::copy_in(to_layer.codes[r].data() + before * code_bytes, codes.data(), count * code_bytes);
  if (halves > 0)
    device::copy_in(to_layer.sides[r].data() + before * halves, sides.data(), sides.size() * sizeof(uint16_t));
  held_ = std::max(held_, to);
}

void CodedTiles::attend(int layer, const float* queries, int rows, const int32_t* coded, const ExactRows& exact,
                        int64_t longest, float* out) {
  const int group = shape_.group(), d = shape_.head_dim;
  const TileFamily& family = forms_->family();
  const bool pq = family.kind == TileFamily::Kind::kPq;
  // Blocks enough to fill a card; tables of product codes fill a multiprocessor.
  const int parts = rows * shape_.kv_heads, most = static_cast<int>(std::max<int64_t>(1, longest / 256));
  const int splits = std::clamp((pq ? 132 : 512) / parts, 1, most);
  if (rows != rows_ || splits != splits_) {
    if (pq)
      pq_ = std::make_unique<PqDecoder>(rows, shape_.kv_heads, group, family.books, family.width, splits);
    else
      levels_ = std::make_unique<LevelDecoder>(rows, shape_.kv_heads, group, d, family.bits, splits);
    rows_ = rows, splits_ = splits;
  }
  const Layer& l = layers_[static_cast<size_t>(layer)];
  const auto describe = [&](auto& call) {
    call.queries = queries;
    call.tile_table = table_.data();
    call.lengths = coded;
    call.out = out;
    call.sequences = rows;
    call.kv_heads = shape_.kv_heads;
    call.group = group;
    call.most_tiles = 0;  // one table for all rows
    call.exact = exact;
  };
  if (pq) {
    PqDecode call;
    describe(call);
    call.key_books = forms_->books(layer, Role::kKey);
    call.value_books = forms_->books(layer, Role::kValue);
    call.key_codes = l.codes[0].data();
    call.value_codes = l.codes[1].data();
    (*pq_)(call);
  } else {
    LevelDecode call;
    describe(call);
    call.key_codes = reinterpret_cast<const uint32_t*>(l.codes[0].data());
    call.value_codes = reinterpret_cast<const uint32_t*>(l.codes[1].data());
    call.key_sides = l.sides[0].data();
    call.value_sides = l.sides[1].data();
    (*levels_)(call);
  }
}

int64_t CodedTiles::bytes() const {
  size_t sum = table_.size() * sizeof(int32_t);
  for (const Layer& l : layers_)
    for (int role = 0; role < 2; ++role) sum += l.codes[role].size() + l.sides[role].size() * sizeof(uint16_t);
  return static_cast<int64_t>(sum);
}

}  // namespace vqkv
