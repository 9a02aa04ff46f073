// What a cache shows the coder of a unit.
#pragma once
#include "cache/coding.h"
#include "cache/map.h"

namespace vqkv {

class CacheRows final : public HeldRows {
 public:
  CacheRows(const SequenceMap& map, size_t unit) : map_(map), unit_(unit) {}
  void load(Role role, int kv_head, int64_t first, MutMatrix out) const override;
  void positions(int64_t first, std::span<int32_t> out) const override;
  void lower(int64_t first, MutMatrix out) const override;
  void queries(int kv_head, MutMatrix out) const override;

 private:
  const SequenceMap& map_;
  size_t unit_;
};

// The same of a unit in an older tier.
class CacheAgedRows final : public AgedRows {
 public:
  CacheAgedRows(const SequenceMap& map, size_t unit) : map_(map), unit_(unit) {}
  void load(Role role, int kv_head, int64_t first, MutMatrix out) const override;
  void positions(int64_t first, std::span<int32_t> out) const override;
  CodeBlock codes(int64_t from, int64_t to) const override;
  const CodeLayout& layout() const override;

 private:
  size_t newer(Role role, int kv_head) const;
  const SequenceMap& map_;
  size_t unit_;
};

}  // namespace vqkv
