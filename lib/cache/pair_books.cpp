#include "cache/pair_books.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "cache/decode_cpu.h"
#include "core/index.h"
#include "core/round_up.h"

namespace vqkv {
namespace {

using Reason = std::optional<std::string>;

// The two readings of the same books, or null.
std::pair<const TableTerm*, const TableTerm*> readings(const DecodePlan& plan) {
  std::vector<const TableTerm*> tables;
  const auto look = Overloaded{[&](const TableTerm& t) { tables.push_back(&t); }, [](const LevelsTerm&) {},
                               [](const DenseTerm&) {}, [](const SignTerm&) {}};
  for (const PlanTerm& term : plan.terms) std::visit(look, term);
  if (tables.size() != 2 || plan.terms.size() != 2) return {};
  const TableTerm &a = *tables[0], &b = *tables[1];
  if (a.op != TableTerm::Op::kIdentity || b.op != TableTerm::Op::kRotate90) return {};
  if (a.codewords != b.codewords || a.width != b.width || a.entries != b.entries) return {};
  if (a.slots != b.slots || a.book_of_slot != b.book_of_slot || a.channel != b.channel) return {};
  return {&a, &b};
}

// The largest power of two that divides all of `words`, or 0 where they are zero or not finite.
double common_step(const AlignedVector<float>& words) {
  int lowest = 1024;
  for (const float v : words) {
    if (!std::isfinite(v)) return 0;
    if (v == 0) continue;
    int exponent;
    const auto mantissa = static_cast<uint32_t>(std::ldexp(std::frexp(std::abs(v), &exponent), 24));
    lowest = std::min(lowest, exponent - 24 + std::countr_zero(mantissa));
  }
  return lowest == 1024 ? 0 : std::ldexp(1.0, lowest);
}

// Keeps `books` as multiples of a step where they are, and small enough.
void narrow(PairBooks& books) {
  const double step = common_step(books.words);
  if (step == 0 || static_cast<float>(step) == 0) return;
  const int64_t book = books.entries * PairBooks::kFloats;
  for (const PairBooks::Block& b : books.blocks) {
    double most = 0;  // of a sum over stages, each with two codes
    for (size_t s = 0; s < b.stages.size(); ++s) {
      double largest = 0;
      const float* from = books.words.data() + b.words + s * at(book);
      for (int64_t i = 0; i < book; ++i) largest = std::max(largest, std::abs(double{from[i]}));
      most += 2 * largest / step;
    }
    if (most > 32767) return;
  }
  books.step = static_cast<float>(step);
  for (const float v : books.words) books.multiples.push_back(static_cast<int16_t>(double{v} / step));
  books.words = {};
}

}  // namespace

std::shared_ptr<const AlignedVector<float>> turned_books(const TableTerm& t, std::vector<TurnedBooks>& turned) {
  for (const TurnedBooks& known : turned)
    if (known.books == t.codewords && known.width == t.width) return known.words;
  const auto out = std::make_shared<AlignedVector<float>>(*t.codewords);
  const int half = t.width / 2;
  for (int64_t w = 0; w < int64_t{t.books} * t.entries; ++w) {
    const float* from = t.codewords->data() + w * t.width;
    float* to = out->data() + w * t.width;
    for (int i = 0; i < half; ++i) {
      to[i] = -from[i + half];
      to[i + half] = from[i];
    }
  }
  turned.push_back({t.codewords, t.width, out});
  return out;
}

std::optional<std::string> pair_sum_reason(const DecodePlan& plan) {
  if (!readings(plan).first) return "their terms are not one table of complex codewords read twice, once turned";
  if (!is_identity(plan.map) || !plan.inner_bias.empty() || !plan.outer_bias.empty())
    return "something is done to them behind their codes";
  return std::nullopt;
}

std::shared_ptr<const PairBooks> PairBooks::of(const DecodePlan& plan, int head, int head_dim) {
  if (pair_sum_reason(plan) || head_dim % 2 != 0) return nullptr;
  const TableTerm& t = *readings(plan).first;
  const int half = t.width / 2, pairs = head_dim / 2, low = head * head_dim;
  // Codeword pair that gives pair p of the head in each slot that gives any, or -1.
  std::vector<std::pair<int, std::vector<int>>> slots;
  for (int s = 0; s < t.slots; ++s) {
    const int32_t* channel = t.channel.data() + int64_t{s} * t.width;
    const auto inside = [&](int i) { return channel[i] >= low && channel[i] < low + head_dim; };
    std::vector<int> of_pair(at(pairs), -1);
    bool any = false;
    for (int i = 0; i < half; ++i) {
      if (!inside(i) && !inside(i + half)) continue;
      if (!inside(i) || channel[i + half] != channel[i] + pairs || of_pair[at(channel[i] - low)] >= 0) return nullptr;
      of_pair[at(channel[i] - low)] = i;
      any = true;
    }
    if (any) slots.emplace_back(s, std::move(of_pair));
  }
  auto out = std::make_shared<PairBooks>();
  out->entries = t.entries;
  const auto turned = static_cast<int>(slots.size());  // their codes come after all codes as they are
  for (int first = 0; first < pairs; first += kPairs) {
    Block block;
    block.words = out->words.size();
    for (int i = 0; i < turned; ++i) {
      const auto& [slot, of_pair] = slots[at(i)];
      const auto begin = of_pair.begin() + first, end = of_pair.begin() + std::min(pairs, first + kPairs);
      if (std::all_of(begin, end, [](int p) { return p < 0; })) continue;
      block.stages.push_back({i, turned + i});
      const float* book = t.codewords->data() + int64_t{t.book_of_slot[at(slot)]} * t.entries * t.width;
      const size_t base = out->words.size();
      out->words.resize(base + at(int64_t{t.entries} * kFloats), 0.0f);
      for (int e = 0; e < t.entries; ++e)
        for (auto p = begin; p != end; ++p) {
          if (*p < 0) continue;
          float* to = out->words.data() + base + at(int64_t{e} * kFloats + (p - begin));
          to[0] = book[int64_t{e} * t.width + *p];
          to[kPairs] = book[int64_t{e} * t.width + *p + half];
        }
    }
    out->blocks.push_back(std::move(block));
  }
  narrow(*out);
  return out;
}

void PairBooks::sum(const uint16_t* codes, int64_t code_stride, int64_t count, float* out) const {
  if (!multiples.empty()) return sum_multiples(codes, code_stride, count, out);
  std::vector<const uint16_t*> a, b;
  for (const Block& block : blocks) {
    a.clear();
    b.clear();
    for (const Stage& s : block.stages) {
      a.push_back(codes + s.a * code_stride);
      b.push_back(codes + s.b * code_stride);
    }
    kernels::sum_pairs(words.data() + block.words, entries, a.data(), b.data(), static_cast<int64_t>(a.size()), count,
                       out, row_floats());
    out += kFloats;
  }
}

void PairBooks::sum_multiples(const uint16_t* codes, int64_t code_stride, int64_t count, float* out) const {
  constexpr int64_t kRun = 64;
  std::vector<uint32_t> offsets;  // (runs, 2 * stages, kRun)
  const std::vector<Stage>* known = nullptr;
  for (const Block& block : blocks) {
    const auto stages = static_cast<int64_t>(block.stages.size()), run = 2 * stages * kRun;
    if (!known || *known != block.stages) {  // most often those of the block before
      offsets.resize(at((count + kRun - 1) / kRun * run));
      for (int64_t s = 0; s < 2 * stages; ++s) {
        const Stage& stage = block.stages[at(s % stages)];
        const uint16_t* from = codes + (s < stages ? stage.a : stage.b) * code_stride;
        const auto base = static_cast<uint32_t>(s % stages * entries * kFloats);
        for (int64_t first = 0; first < count; first += kRun) {
          uint32_t* to = offsets.data() + first / kRun * run + s * kRun;
          const int64_t n = std::min(kRun, count - first);
          for (int64_t t = 0; t < n; ++t) to[t] = base + uint32_t{kFloats} * from[first + t];
        }
      }
      known = &block.stages;
    }
    for (int64_t first = 0; first < count; first += kRun)
      kernels::sum_pair_multiples(multiples.data() + block.words, offsets.data() + first / kRun * run, stages,
                                  std::min(kRun, count - first), step, out + first * row_floats(), row_floats());
    out += kFloats;
  }
}

int64_t PairBooks::held_bytes() const {
  int64_t n = static_cast<int64_t>(sizeof(PairBooks) + words.capacity() * sizeof(float) +
                                   multiples.capacity() * sizeof(int16_t) + blocks.capacity() * sizeof(Block));
  for (const Block& b : blocks) n += static_cast<int64_t>(b.stages.capacity() * sizeof(Stage));
  return n;
}

}  // namespace vqkv
