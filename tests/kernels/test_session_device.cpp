// Caches on a device: what each layer attends to is what the same rows give on the processor, from the same codes,
// across flushes, in blocks and steps; and the runtime over them gives the processor's logits.
#include <cmath>
#include <numeric>

#include "attention/sequence.h"
#include "codec/build.h"
#include "kernels/difference.h"
#include "model/runtime_device.h"
#include "model/session_device.h"
#include "support/catch.h"
#include "support/device.h"
#include "support/error_of.h"
#include "support/random_model.h"
#include "support/train_data.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

// Hands a session's layers on, and keeps what they gave.
class Watched final : public DeviceAttention {
 public:
  Watched(DeviceSession& session, int64_t cols) : session_(session), cols_(cols), to_host_(session.cache().shape()) {}
  void attend(int layer, QkvRows rows, float* out) override {
    session_.attend(layer, rows, out);
    to_host_.start(layer, rows);
    Matrix<float> found(rows.rows, cols_);
    device::copy_out(found.data(), out, found.storage.size() * sizeof(float));
    given.push_back(std::move(found));
  }
  void launched(int layer) override { session_.append(layer, to_host_.wait(layer)); }
  std::vector<Matrix<float>> given;  // a layer

 private:
  DeviceSession& session_;
  int64_t cols_;
  QkvToHost to_host_;
};

struct Rows final : ModelTap {
  std::vector<Matrix<float>> q, k, v;  // a layer
  void on_qkv(int, int64_t, ConstMatrix a, ConstMatrix b, ConstMatrix c) override {
    for (const auto& [to, from] : {std::pair(&q, a), std::pair(&k, b), std::pair(&v, c)}) {
      to->emplace_back(from.rows, from.cols);
      for (int64_t r = 0; r < from.rows; ++r) std::copy_n(from.row(r), from.cols, to->back().row(r));
    }
  }
};

std::shared_ptr<const CodecSet> codecs_for(const CacheShape& shape, const Json& config) {
  return train_codec_set(resolve_codec(config, shape), shape, MadeUp(600), {});
}

CachePolicy policy_of(const Json& cache) { return CachePolicy::from_json(canonical_cache_config(cache)); }

struct Setting {
  int head_dim, q_heads;
  Json codec, cache;
};

// 2 KV heads.
std::vector<Setting> settings() {
  return {{64, 6, {{"name", "kivi"}, {"bits", 2}}, {{"sinks", 4}, {"window", 20}, {"flush", 32}}},
          {64, 4, {{"name", "kivi"}, {"bits", 4}}, {{"sinks", 0}, {"window", 33}, {"flush", 32}}},
          {64, 6, {{"name", "pq"}, {"codebooks", 32}, {"heads", "all"}}, {{"sinks", 2}, {"window", 8}, {"flush", 40}}},
          {64, 6, {{"name", "pq"}, {"codebooks", 16}, {"share", "heads"}}, {{"sinks", 4}, {"window", 1}, {"flush", 1}}},
          {128, 8, {{"name", "pq"}, {"codebooks", 32}}, {{"sinks", 3}, {"window", 16}, {"flush", 24}}},
          {128, 2, {{"name", "pq"}, {"codebooks", 16}}, {{"sinks", 1}, {"window", 9}, {"flush", 8}}}};
}

}  // namespace

TEST_CASE("a coded cache on a device attends as the processor does to the same rows", "[kernel][session]") {
  for (const Setting& s : settings()) {
    CAPTURE(s.head_dim, s.codec.dump(), s.cache.dump());
    const testing::TempFolder folder;
    const std::string path = folder.file("m.gguf");
    write_random_model(path, {.q_heads = s.q_heads, .head_dim = s.head_dim});
    const auto weights = ModelWeights::open(path);
    LlamaDevice model(*weights);
    const CacheShape shape = model.facts().cache_shape();
    const auto shared = std::make_shared<const CacheModel>(codecs_for(shape, s.codec));
    const CachePolicy policy = policy_of(s.cache);
    Sequence coded(shared, policy, std::make_shared<DeviceBackend>()), plain(shared, policy, "reference");
    auto& session = dynamic_cast<DeviceSession&>(coded.session());
    Rng rng(5);
    // Blocks up to the next flush each, then steps, then a block again.
    std::vector<int64_t> blocks{58, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 26};
    double worst = 0;
    const auto play = [&](int64_t left) {
      while (left > 0) {
        const int64_t n = session.alike(left, Visibility::kReplay), first = coded.cache().length();
        left -= n;
        std::vector<int32_t> tokens(static_cast<size_t>(n)), positions(tokens.size());
        for (int32_t& t : tokens) t = static_cast<int32_t>(rng.below(64));
        std::iota(positions.begin(), positions.end(), static_cast<int32_t>(first));
        Rows rows;
        Watched watched(session, int64_t{shape.q_heads} * shape.head_dim);
        session.set_rows_tap(&rows);
        session.begin_block(n);
        model.forward(tokens, positions, watched, {}, {});
        session.end_block();
        plain.session().begin_block(n);
        for (int l = 0; l < shape.layers; ++l) {
          const auto at = static_cast<size_t>(l);
          Matrix<float> expected(n, watched.given[at].cols);
          plain.session().attend(l, rows.q[at], rows.k[at], rows.v[at], expected);
          worst = std::max(worst, relative_difference(watched.given[at], expected));
        }
        plain.session().end_block();
      }
    };
    // Judging every access takes most of the time; the kernels of codes have tests of their own for that.
    if (s.codec.value("bits", 0) != 2)
      unwatched([&] { std::ranges::for_each(blocks, play); });
    else
      std::ranges::for_each(blocks, play);
    CHECK(coded.cache().length() == 95);
    CHECK(coded.cache().coded_end(Role::kKey, 94) > policy.sinks + 30);
    CHECK(worst < 3e-3);  // half's rounding of tables, weights and rows
    CHECK(worst > 0);
  }
}

TEST_CASE("the runtime of a device over its sessions gives the processor's logits", "[kernel][session]") {
  const testing::TempFolder folder;
  const std::string path = folder.file("m.gguf");
  write_random_model(path, {.q_heads = 6, .head_dim = 64});
  const auto plain = load_model(path);
  DeviceRuntime device(path);
  const CacheShape shape = plain->facts().cache_shape();
  const auto coded = std::make_shared<const CacheModel>(codecs_for(shape, {{"name", "kivi"}, {"bits", 4}}));
  const auto exact = std::make_shared<const CacheModel>(shape);
  struct Case {
    std::shared_ptr<const CacheModel> model;
    CachePolicy policy;
    Visibility prompt;
  };
  const CachePolicy policy = policy_of({{"sinks", 4}, {"window", 20}, {"flush", 32}});
  CachePolicy window_alone = policy;
  window_alone.drops = true;
  for (const Case& c : {Case{coded, policy, Visibility::kReplay}, Case{coded, policy, Visibility::kExactPrefill},
                        Case{exact, CachePolicy::exact(DType::kBF16), Visibility::kReplay},
                        Case{exact, CachePolicy::exact(DType::kF16), Visibility::kReplay},
                        Case{exact, window_alone, Visibility::kReplay}}) {
    CAPTURE(c.model == coded, static_cast<int>(c.prompt));
    // Two sequences, one of them behind the other.
    const auto play = [&](ModelRuntime& model, const std::shared_ptr<AttentionBackend>& backend, Matrix<float>& out) {
      std::vector<Sequence> sequences;
      for (int i = 0; i < 2; ++i) sequences.emplace_back(c.model, c.policy, backend);
      Rng rng(9);
      const auto draw = [&](int64_t n) {
        std::vector<int32_t> tokens(static_cast<size_t>(n));
        for (int32_t& t : tokens) t = static_cast<int32_t>(rng.below(64));
        return tokens;
      };
      for (int i = 0; i < 2; ++i) {
        KvSession& kv = sequences[static_cast<size_t>(i)].session();
        const std::vector<int32_t> prompt = draw(60 + 9 * i);
        if (c.prompt == Visibility::kExactPrefill) kv.expect_prompt(std::ssize(prompt));
        // In two blocks.
        const std::span<const int32_t> all(prompt);
        model.forward(all.subspan(0, 41), kv, LogitRows::kNone, {}, c.prompt);
        model.forward(all.subspan(41), kv, LogitRows::kLast, out.view().slice_rows(i, 1), c.prompt);
        if (c.prompt == Visibility::kExactPrefill) kv.end_exact_prefill();
      }
      for (int64_t step = 1; step < 6; ++step) {
        // The one goes on by a token, the other by several, with a flush among them.
        const std::vector<int32_t> a = draw(1), b = draw(step == 2 ? 33 : 1);
        const SequenceBlock batch[] = {{a, &sequences[0].session()}, {b, &sequences[1].session()}};
        model.forward_batch(batch, LogitRows::kLast, out.view().slice_rows(2 * step, 2));
      }
      for (const Sequence& s : sequences) s.check_ledger("a test");
    };
    Matrix<float> expected(12, 64), found(12, 64);
    play(*plain, make_attention_backend("reference"), expected);
    play(device, std::make_shared<DeviceBackend>(), found);
    CHECK(relative_difference(found, expected) <
          0.03);  // bf16 of weights and inputs, and the codes that follow from them
  }
}

TEST_CASE("what a device has no form of is refused with the reason", "[kernel][session]") {
  const testing::TempFolder folder;
  const std::string path = folder.file("m.gguf");
  write_random_model(path, {.q_heads = 4, .head_dim = 64});
  const ModelFacts facts = read_model_facts(path);
  const CacheShape shape = facts.cache_shape();
  const auto refusal = [&](const Json& codec, const Json& cache) {
    return error_of(
        [&] {
          Sequence(std::make_shared<const CacheModel>(codecs_for(shape, codec)), policy_of(cache),
                   std::make_shared<DeviceBackend>());
        },
        ErrorKind::kUnavailable);
  };
  const Json kivi = {{"name", "kivi"}, {"bits", 2}}, flush = {{"window", 32}, {"flush", 32}};
  check_says(refusal({{"name", "rtn"}, {"bits", 3}}, flush), {"keys of layer 0", "3 bits"});
  check_says(refusal(kivi, {{"rule", "kivi"}, {"residual", 32}}), "cache.rule: window");
  check_says(refusal(kivi, {{"window", 32}, {"flush", 32}, {"exact_dtype", "f32"}}), "exact rows of f32");
  check_says(refusal(kivi, {{"window", 0}, {"flush", 32}}), "cache.window");
  check_says(refusal(kivi, {{"window", 32}, {"flush", 32}, {"policy", "h2o"}}), "keep every token");
  check_says(refusal(kivi, {{"window", 32}, {"flush", 32}, {"prompt", 64}}), {"cache.prompt"});
  const std::string wide = folder.file("wide.gguf");
  write_random_model(wide, {.q_heads = 10, .head_dim = 64});
  const CacheShape of_wide = read_model_facts(wide).cache_shape();
  check_says(error_of(
                 [&] {
                   CodedForms(CacheModel(codecs_for(of_wide, {{"name", "pq"}, {"codebooks", 16}})));
                 },
                 ErrorKind::kUnavailable),
             {"5 query heads", "up to 4"});
  Sequence ready(std::make_shared<const CacheModel>(codecs_for(shape, kivi)), policy_of(flush),
                 std::make_shared<DeviceBackend>());
  const auto unavailable = [](const auto& call) { return error_of(call, ErrorKind::kUnavailable); };
  check_says(unavailable([&] { ready.session().begin_block(1, Visibility::kAllCoded); }), {"no fake-quant"});
  check_says(unavailable([&] { ready.session().speculate(); }), {"take no token back"});
}
