#include "attention/sequence.h"

#include <fmt/format.h>

#include "cache/model.h"

namespace vqkv {

Sequence::Sequence(std::shared_ptr<const CacheModel> model, const CachePolicy& policy, const std::string& attention)
    : Sequence(std::move(model), policy, make_attention_backend(attention), true) {}
Sequence::Sequence(std::shared_ptr<const CodecSet> codecs, const CachePolicy& policy, const std::string& attention)
    : Sequence(std::make_shared<const CacheModel>(std::move(codecs)), policy, attention) {}
Sequence::Sequence(const CacheShape& shape, const CachePolicy& policy, const std::string& attention)
    : Sequence(std::make_shared<const CacheModel>(shape), policy, attention) {}
Sequence::Sequence(std::shared_ptr<const CacheModel> model, const CachePolicy& policy,
                   std::shared_ptr<AttentionBackend> backend)
    : Sequence(std::move(model), policy, std::move(backend), false) {}
Sequence::Sequence(std::shared_ptr<const CacheModel> model, const CachePolicy& policy,
                   std::shared_ptr<AttentionBackend> backend, bool own_backend)
    : model_(std::move(model)), policy_(policy), backend_(std::move(backend)), own_backend_(own_backend) {
  restart();
}

void Sequence::restart() {
  // The old cache goes before the new one comes: a codec in another program serves one at a time.
  session_.reset();
  cache_.reset();
  memory_ = std::make_unique<CountingResource>();
  cache_ = std::make_unique<CompressedCache>(model_, policy_, memory_.get());
  session_ = make_kv_session(*cache_, *backend_, memory_.get());
}

ByteLedger Sequence::bytes() const {
  ByteLedger b = cache_->bytes();
  b.workspace += session_->held_bytes() + own_backend_bytes();
  return b;
}

std::string Sequence::path() const { return fmt::format("{}", fmt::join(backend_->paths(), "+")); }

double Sequence::coded_share() const {
  const AttendStats& s = session_->stats();
  return s.total_mass > 0 ? s.coded_mass / s.total_mass : 0;
}

void Sequence::check_ledger(const std::string& what) const {
  // The ledger against itself: the allocator alone can differ.
  const ByteLedger held = bytes();
  require_equal(held, held, allocated(), what);
}

void Sequence::check_ledger(const ByteLedger& formula, const std::string& what) const {
  check_ledger(what);
  // Apart from attention's: a formula's workspace differs where something was fitted, and then less is compared.
  require_equal(formula, cache_->bytes(), memory_->live() - session_->held_bytes(), what);
}

}  // namespace vqkv
