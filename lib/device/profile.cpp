#include "device/profile.h"

#include <algorithm>
#include <set>

namespace vqkv::device::emulated {
namespace {

constexpr uint64_t kBanks = 32, kWord = 4, kSector = 32;

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

}  // namespace

void Profile::add(const Place& place, unsigned thread, bool shared, bool writes, uint64_t address, unsigned bytes) {
  Passes& p = open_[{Key{place, shared, writes, bytes}, thread / kLanes}];
  const unsigned lane = thread % kLanes;
  const size_t k = p.passed[lane]++;
  if (k >= p.requests.size()) p.requests.resize(k + 1);
  p.requests[k].address[lane] = address;
  p.requests[k].lanes |= 1u << lane;
}

void Profile::end_block() {
  for (const auto& [key, passes] : open_)
    for (const Request& r : passes.requests) {
      const Key& k = key.first;
      Traffic& t = sums_[k];
      ++t.requests;
      if (!k.shared) {
        std::set<uint64_t> sectors, bytes;
        for (unsigned l = 0; l < kLanes; ++l)
          for (uint64_t b = 0; (r.lanes >> l & 1) && b < k.bytes; ++b) {
            sectors.insert((r.address[l] + b) / kSector);
            bytes.insert(r.address[l] + b);
          }
        t.passes += sectors.size();
        t.ideal += ceil_div(bytes.size(), kSector);
        continue;
      }
      // 8 bytes a lane are served by half warps, 16 by quarters; equal words of a bank at once.
      const unsigned phases = static_cast<unsigned>(std::max<uint64_t>(1, k.bytes / kWord)), lanes = kLanes / phases;
      for (unsigned first = 0; first < kLanes; first += lanes) {
        std::set<uint64_t> words[kBanks];
        size_t worst = 0, all = 0;
        for (unsigned l = first; l < first + lanes; ++l)
          for (uint64_t w = r.address[l] / kWord; (r.lanes >> l & 1) && w <= (r.address[l] + k.bytes - 1) / kWord; ++w)
            words[w % kBanks].insert(w);
        for (const auto& bank : words) worst = std::max(worst, bank.size()), all += bank.size();
        t.passes += worst;
        t.ideal += ceil_div(all, kBanks);
      }
    }
  open_.clear();
}

std::vector<Traffic> Profile::take() {
  std::vector<Traffic> out;
  for (auto& [key, t] : sums_) {
    t.line = key.place.text();
    t.shared = key.shared;
    t.writes = key.writes;
    t.bytes = key.bytes;
    out.push_back(std::move(t));
  }
  sums_.clear();
  return out;
}

}  // namespace vqkv::device::emulated
