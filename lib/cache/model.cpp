#include "cache/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "codec/level.h"
#include "core/error.h"
#include "core/per_thread.h"

namespace vqkv {
namespace {

// Books of tables, groups of levels and projections of signs.
std::set<const void*> books_of(const DecodePlan& plan) {
  std::set<const void*> books;
  for (const PlanTerm& term : plan.terms)
    std::visit(Overloaded{[&](const TableTerm& t) { books.insert(t.codewords.get()); },
                          [&](const LevelsTerm& t) { books.insert(t.group_of.get()); }, [](const DenseTerm&) {},
                          [&](const SignTerm& t) { books.insert(t.projection.get()); }},
               term);
  return books;
}

}  // namespace

CodedForm::CodedForm(const Codec& codec, const UnitShape& unit, const PlanQuery& query,
                     std::shared_ptr<const PageLayout> page_layout, const CodedForm* model)
    : plan(codec.plan(query)), pages(std::move(page_layout)) {
  if (model) turned = model->turned;
  VQKV_CHECK(!plan.adds_lower || codec.sees_lower());
  for (int h = 0; h < unit.heads; ++h) decoders.emplace_back(plan, pages, unit.role, h, unit.head_dim, turned);
}

int64_t CodedForm::bytes(const CodedForm& other) const {
  std::set<const void*> shared = books_of(other.plan);
  for (const TileDecoder& d : other.decoders) d.bytes(shared);  // what they made of those books
  int64_t n = static_cast<int64_t>(sizeof(CodedForm)) + capacity_bytes(plan.terms) + memory_bytes(plan.map) +
              capacity_bytes(plan.inner_bias) + capacity_bytes(plan.outer_bias) + capacity_bytes(plan.layout.fields) +
              capacity_bytes(plan.layout.sides) + capacity_bytes(turned) + capacity_bytes(decoders);
  const auto add = Overloaded{[&](const TableTerm& t) {
                                n += capacity_bytes(t.book_of_slot) + capacity_bytes(t.channel);
                                if (shared.insert(t.codewords.get()).second) n += capacity_bytes(*t.codewords);
                              },
                              [&](const LevelsTerm& t) {
                                n += capacity_bytes(t.levels);
                                if (t.group_of && shared.insert(t.group_of.get()).second)
                                  n += capacity_bytes(*t.group_of);
                              },
                              [&](const DenseTerm& t) { n += capacity_bytes(t.channel); },
                              [&](const SignTerm& t) {
                                if (shared.insert(t.projection.get()).second) n += capacity_bytes(*t.projection);
                              }};
  for (const PlanTerm& term : plan.terms) std::visit(add, term);
  for (const TileDecoder& d : decoders) n += d.bytes(shared);
  return n;
}

CacheModel::CacheModel(const CacheShape& shape) : shape_(shape), rope_(shape.rope) {
  VQKV_CHECK(shape.layers > 0 && shape.kv_heads > 0 && shape.head_dim > 0 && shape.q_heads % shape.kv_heads == 0);
  unit_index_.assign(static_cast<size_t>(2 * shape.layers * shape.kv_heads), -1);
  layer_units_.resize(static_cast<size_t>(shape.layers));
}

CacheModel::CacheModel(std::shared_ptr<const CodecSet> codecs, int draft_stages) : CacheModel(codecs->shape()) {
  VQKV_CHECK(draft_stages >= 0);
  draft_level_ = draft_stages - 1;
  codecs_ = std::move(codecs);
  constant_bytes_ = codecs_->constant_bytes();
  const auto tiers = static_cast<size_t>(codecs_->tiers());
  unit_index_.resize(unit_index_.size() * tiers, -1);
  layer_units_.resize(layer_units_.size() * tiers);
  std::map<const Codec*, std::shared_ptr<const CodedForm>> forms, draft_forms;
  for (const TrainedUnit& u : codecs_->units()) {
    const UnitShape& at = u.spec.unit;
    std::shared_ptr<const CodedForm>& form = forms[u.codec.get()];
    if (!form)
      form = std::make_shared<CodedForm>(*u.codec, at, PlanQuery{}, std::make_shared<PageLayout>(u.codec->layout()));
    std::shared_ptr<const CodedForm>& draft = draft_forms[u.codec.get()];
    if (!draft && drafts()) {
      const std::string reason =
          u.codec->fit_needs().tokens > 0 ? "it fits parameters to each prompt" : level_reason(*u.codec, draft_stages);
      if (!reason.empty())
        fail_usage(fmt::format("a draft can't read codec '{}' (role {}) at level {}: {}", u.spec.method,
                               role_name(at.role), draft_stages, reason));
      draft = std::make_shared<CodedForm>(*u.codec, at, PlanQuery{draft_level_}, form->pages, form.get());
    }
    VQKV_CHECK(static_cast<int>(form->decoders.size()) == at.heads);
    int64_t& together = block_tokens_[static_cast<int>(at.role)];
    together = std::lcm(together, int64_t{form->plan.layout.block_tokens});
    const int row = u.spec.tier * shape_.layers + at.layer;
    layer_units_[static_cast<size_t>(row)].push_back(units_.size());
    for (int h = at.first_head; h < at.first_head + at.heads; ++h)
      unit_index_[static_cast<size_t>((2 * row + (at.role == Role::kValue)) * shape_.kv_heads + h)] =
          static_cast<int>(units_.size());
    fits_queries_ = fits_queries_ || u.codec->fit_needs().queries;
    units_.push_back(
        {at, u.codec.get(), form, draft, codecs_->lower_unit(units_.size()), u.spec.tier, u.spec.level > 0});
  }
}

bool CacheModel::fits_queries(int layer) const {
  return fits_queries_ &&
         std::ranges::any_of(layer_units(layer), [&](size_t u) { return units_[u].codec->fit_needs().queries; });
}

void CacheModel::check(const CachePolicy& policy) const {
  VQKV_CHECK(policy.sinks >= 0 && policy.k.flush >= 1 && policy.v.flush >= 1 && policy.k.window >= 0 &&
             policy.v.window >= 0);
  if (!policy.keeps_codes()) return;
  if (units_.empty()) fail_internal("a policy that codes needs a codec for every layer and head");
  if (const std::string reason = cache_conflict(policy, *codecs_); !reason.empty()) fail_usage(reason);
}

}  // namespace vqkv
