#include "attention/session.h"

#include <fmt/format.h>

#include "core/error.h"

namespace vqkv {
namespace {

[[noreturn]] void refuse_rollback(const KvSession& session) {
  fail_unavailable(fmt::format("sessions on {} take no token back, as speculative decoding does", session.device()));
}

}  // namespace

void KvSession::speculate() { refuse_rollback(*this); }
void KvSession::truncate(int64_t) { refuse_rollback(*this); }
void KvSession::commit(int64_t) { refuse_rollback(*this); }
void KvSession::recall(const RecalledPairs*) {
  fail_unavailable(fmt::format("sessions on {} take no pairs of a far tier", device()));
}

}  // namespace vqkv
