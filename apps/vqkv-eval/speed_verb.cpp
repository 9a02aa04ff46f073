// Prefill and decode speed, the exact cache in the same run, alternating, medians.
#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "attention/sequence.h"
#include "cache/model.h"
#include "common/tool.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/rng.h"
#include "core/thread_pool.h"
#include "experiment/protocol.h"
#include "metric/statistics.h"
#include "verbs.h"

namespace vqkv::eval {
namespace {

struct Times {
  std::vector<double> prefill, decode, encode, attend;
  int64_t device_bytes = 0;  // of all sequences
  int64_t coded = 0;         // tokens of a sequence whose keys or values the last query saw as codes
  std::string path;
};

void measure(ModelRuntime& model, const LoadedCodec& codec, const SpeedVerb& v, std::span<const int32_t> tokens,
             Times& out) {
  const auto shared = std::make_shared<const CacheModel>(codec.codecs);
  const std::shared_ptr<AttentionBackend> backend = make_attention_backend(v.common.attention);
  std::vector<Sequence> sequences;
  for (int s = 0; s < v.batch; ++s) sequences.emplace_back(shared, codec.policy, backend);
  const auto tokens_of = [&](int sequence, int64_t first, int64_t n) {
    return tokens.subspan(static_cast<size_t>(sequence * (v.prompt_tokens + v.new_tokens) + first),
                          static_cast<size_t>(n));
  };
  const auto all = static_cast<double>(v.batch);
  Matrix<float> logits(v.batch, model.facts().vocab);
  Stopwatch time;
  constexpr int64_t kBlock = 512;
  for (int s = 0; s < v.batch; ++s)
    for (int64_t at = 0; at < v.prompt_tokens; at += kBlock) {
      const int64_t n = std::min(kBlock, v.prompt_tokens - at);
      const bool last = at + n == v.prompt_tokens;
      model.forward(tokens_of(s, at, n), sequences[static_cast<size_t>(s)].session(),
                    last ? LogitRows::kLast : LogitRows::kNone, last ? logits.view().slice_rows(s, 1) : MutMatrix());
      if (interrupted()) return;
    }
  const double prefill = all * static_cast<double>(v.prompt_tokens) / time.seconds();
  time.restart();
  std::vector<SequenceBlock> blocks(sequences.size());
  for (int64_t i = 0; i < v.new_tokens && !interrupted(); ++i) {
    for (int s = 0; s < v.batch; ++s)
      blocks[static_cast<size_t>(s)] = {.tokens = tokens_of(s, v.prompt_tokens + i, 1),
                                        .kv = &sequences[static_cast<size_t>(s)].session()};
    model.forward_batch(blocks, LogitRows::kLast, logits);
  }
  if (interrupted()) return;
  out.prefill.push_back(prefill);
  if (v.new_tokens > 0) out.decode.push_back(all * static_cast<double>(v.new_tokens) / time.seconds());
  double encode = 0, attend = 0;
  out.device_bytes = 0;
  for (const Sequence& s : sequences) {
    s.check_ledger(codec.label);
    encode += s.cache().encode_seconds();
    attend += s.session().attend_seconds();
    out.device_bytes += s.session().device_bytes();
  }
  out.encode.push_back(encode);
  if (v.common.device.on_cpu()) out.attend.push_back(attend);
  const CompressedCache& cache = sequences[0].cache();
  for (const Role role : {Role::kKey, Role::kValue})
    out.coded = std::max(out.coded, cache.coded_end(role, cache.length() - 1) - codec.policy.sinks);
  out.path = sequences[0].path();
}

}  // namespace

int run_speed(const SpeedVerb& v) {
  refuse_exec(v.common, "speed would time pipes and another program, not a cache");
  const auto model = open_model(v.common);
  const ModelFacts& facts = model->facts();
  facts.require_context(v.prompt_tokens + v.new_tokens);
  std::vector<LoadedCodec> codecs{load_codec("exact", v.common, facts)};
  for (auto& c : load_codecs(v.common, facts))
    if (c.policy.codes || c.label != "exact") codecs.push_back(std::move(c));
  if (interrupted()) return kExitOk;
  for (const LoadedCodec& c : codecs) require_device_form(v.common, c.label, c.codecs, c.policy);
  for (const LoadedCodec& c : codecs)
    require_cache_memory(std::vector<HeldCaches>{{c.label, *c.codecs, c.policy, v.batch}},
                         v.prompt_tokens + v.new_tokens);
  Rng rng(1);
  std::vector<int32_t> tokens(static_cast<size_t>((v.prompt_tokens + v.new_tokens) * v.batch));
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng.below(static_cast<uint64_t>(facts.vocab)));

  std::vector<Times> times(codecs.size());
  Times warm_up;
  measure(*model, codecs[0], v, tokens, warm_up);
  Progress progress("speed: round", v.repeats);
  for (int r = 0; r < v.repeats && !interrupted(); ++r) {
    for (size_t c = 0; c < codecs.size(); ++c)
      measure(*model, codecs[c], v, tokens, times[c]);  // alternating: drift hits all alike
    progress.update(r + 1);
  }
  if (times[0].prefill.empty()) return kExitOk;
  // Without decode steps there is no such number.
  const auto median = [](const std::vector<double>& x) { return x.empty() ? Json() : Json(quantile(x, 0.5)); };
  const auto paired = [&](const std::vector<double>& x, const std::vector<double>& exact) {
    return median(paired_ratios(x, exact));
  };
  Table table{{{"codec", "codec", "", false},
               {"protocol", "protocol", "", false},
               {"path", "path", "", false},
               {"batch", "batch", "{:.0f}"},
               {"coded", "coded tokens", "{:.0f}"},
               {"prefill", "prefill tok/s", "{:.1f}"},
               {"prefill_ratio", "/ exact", "{:.3f}"},
               {"decode", "decode tok/s", "{:.2f}"},
               {"decode_ratio", "/ exact", "{:.3f}"},
               {"encode_s", "encode s", "{:.3f}"},
               {"attend_s", "attend s", "{:.3f}"},
               {"repeats", "runs", "{:.0f}"},
               {"threads", "threads", "{:.0f}"}},
              {}};
  for (size_t c = 0; c < codecs.size(); ++c)
    table.rows.push_back({{"codec", codecs[c].label},
                          {"protocol", protocol_text(codecs[c].policy, codecs[c].codecs->config())},
                          {"path", times[c].path},
                          {"batch", v.batch},
                          {"coded", times[c].coded},
                          {"prefill", median(times[c].prefill)},
                          {"decode", median(times[c].decode)},
                          {"prefill_ratio", paired(times[c].prefill, times[0].prefill)},
                          {"decode_ratio", paired(times[c].decode, times[0].decode)},
                          {"encode_s", median(times[c].encode)},
                          {"attend_s", median(times[c].attend)},
                          {"repeats", times[c].prefill.size()},
                          {"threads", thread_count()},
                          {"prompt_tokens", v.prompt_tokens},
                          {"new_tokens", v.new_tokens},
                          {"weights", model->weights()},
                          {"device", v.common.device.require()}});
  for (size_t c = 0; c < codecs.size() && !v.common.device.on_cpu(); ++c)
    table.rows[c]["device_bytes"] = times[c].device_bytes;
  for (const Json& row : table.rows)
    if (row["codec"] != "exact" && row["coded"] == 0)
      log_warning(fmt::format("{}: none of {} tokens is coded ({}), so its times are those of exact rows",
                              row["codec"].get<std::string>(), v.prompt_tokens + v.new_tokens,
                              row["protocol"].get<std::string>()));
  print(table, v.common.format);
  return kExitOk;
}

}  // namespace vqkv::eval
