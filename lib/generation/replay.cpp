#include "generation/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/clock.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "generation/logits.h"

namespace vqkv {
namespace {

struct ModeName {
  ReplayMode mode;
  const char* name;
};
constexpr ModeName kModes[] = {{ReplayMode::kForced, "forced"},
                               {ReplayMode::kStepwise, "stepwise"},
                               {ReplayMode::kPrefillExact, "prefill-exact"},
                               {ReplayMode::kFakeQuant, "fake-quant"}};

constexpr int64_t kStretch = 256;  // tokens whose logits are held at once: 48 MiB at a vocabulary of 49,152

// One cache at work on one window.
struct Runner {
  const ReplayCandidate* candidate = nullptr;
  std::unique_ptr<AttentionBackend> backend;
  std::unique_ptr<CountingResource> memory;
  std::unique_ptr<CompressedCache> cache;
  std::unique_ptr<KvSession> session;

  void start(const ReplayCandidate& c) {
    candidate = &c;
    if (!backend) backend = make_attention_backend(c.attention);
    session.reset();
    cache.reset();
    memory = std::make_unique<CountingResource>();
    cache = std::make_unique<CompressedCache>(c.codecs, c.policy, memory.get());
    session = std::make_unique<KvSession>(*cache, *backend);
  }

  // Feeds tokens in the candidate's own manner; logits gets a row a token.
  void feed(ModelRuntime& model, std::span<const int32_t> tokens, MutMatrix logits, Visibility visibility) {
    const int64_t n = static_cast<int64_t>(tokens.size());
    const int64_t step = candidate->mode == ReplayMode::kStepwise && visibility == Visibility::kReplay ? 1
                         : visibility == Visibility::kReplay                                           ? candidate->block
                                                                                                       : n;
    for (int64_t at = 0; at < n; at += step) {
      const int64_t m = std::min(step, n - at);
      model.forward(tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(m)), *session, LogitRows::kAll,
                    logits.slice_rows(at, m), visibility);
    }
  }
};

struct Window {
  int32_t document = 0;
  std::vector<int32_t> tokens;  // BOS first where the model adds one
};

std::vector<Window> cut_windows(const ModelRuntime& model, std::span<const ReplayText> texts, const ReplayOptions& o) {
  const auto& special = model.tokenizer().special();
  const int64_t fresh = o.context - (special.add_bos ? 1 : 0);  // text tokens a window
  if (fresh < 2) fail_usage(fmt::format("a context of {} is too short to score anything", o.context));
  std::vector<std::vector<Window>> by_text(texts.size());
  for (size_t t = 0; t < texts.size(); ++t) {
    const auto& ids = texts[t].tokens;
    for (int64_t at = 0; at + fresh <= static_cast<int64_t>(ids.size()); at += fresh) {
      Window w;
      w.document = static_cast<int32_t>(t);
      if (special.add_bos) w.tokens.push_back(special.bos);
      w.tokens.insert(w.tokens.end(), ids.begin() + at, ids.begin() + at + fresh);
      by_text[t].push_back(std::move(w));
    }
  }
  // In turn over the documents, so that a limit takes from all of them.
  std::vector<Window> out;
  for (size_t round = 0;; ++round) {
    bool any = false;
    for (auto& windows : by_text) {
      if (round >= windows.size()) continue;
      if (o.windows > 0 && static_cast<int64_t>(out.size()) >= o.windows) return out;
      any = true;
      out.push_back(std::move(windows[round]));
    }
    if (!any) return out;
  }
}

// Where a window is cut: stretches end where the meaning of a position changes.
struct Stretches {
  int64_t context, prompt, last_quarter;  // prompt 0: nobody has one
  bool whole;                             // a fake-quant candidate wants the window in one piece

  int64_t end(int64_t at) const {
    if (whole) return context;
    int64_t e = std::min(context, at + kStretch);
    for (const int64_t cut : {prompt, last_quarter})
      if (cut > at && cut < e) e = cut;
    return e;
  }
};

Stretches stretches_for(std::span<const ReplayCandidate> candidates, const ReplayOptions& o) {
  Stretches s{o.context, 0, o.context - o.context / 4, false};
  for (const auto& c : candidates) {
    if (c.mode == ReplayMode::kPrefillExact) s.prompt = o.prompt > 0 ? o.prompt : o.context / 2;
    if (c.mode == ReplayMode::kFakeQuant) s.whole = true;
  }
  if (s.prompt >= o.context - 1) fail_usage(fmt::format("an exact prompt of {} tokens leaves nothing to score in {}", s.prompt, o.context));
  if (s.whole && s.prompt > 0) fail_usage("modes prefill-exact and fake-quant can't share one replay: they score other positions");
  return s;
}

}  // namespace

ReplayMode replay_mode_from_name(const std::string& name) {
  for (const auto& m : kModes)
    if (name == m.name) return m.mode;
  fail_usage(fmt::format("unknown mode '{}'; allowed: forced, stepwise, prefill-exact, fake-quant", name));
}

std::string replay_mode_name(ReplayMode mode) {
  for (const auto& m : kModes)
    if (mode == m.mode) return m.name;
  fail_internal("unknown replay mode");
}

ReplayResult replay(ModelRuntime& model, std::span<const ReplayText> texts, std::span<const ReplayCandidate> candidates,
                    const ReplayOptions& options, const std::function<bool()>& stop) {
  const int64_t vocab = model.facts().vocab;
  if (options.context > model.facts().context_length)
    fail_usage(fmt::format("a context of {} is beyond the model's {}", options.context, model.facts().context_length));
  const auto windows = cut_windows(model, texts, options);
  if (windows.empty())
    fail_data(fmt::format("no text holds a whole window of {} tokens; give a longer text or a smaller context", options.context));
  const Stretches stretches = stretches_for(candidates, options);

  ReplayResult result;
  result.bos = model.tokenizer().special().add_bos;
  result.tracks.resize(candidates.size());
  for (size_t c = 0; c < candidates.size(); ++c) result.tracks[c].label = candidates[c].label;

  const ReplayCandidate exact{
      .label = "exact",
      .codecs = exact_codec_set(model.facts().cache_shape()),
      .policy = CachePolicy::exact(candidates.empty() ? DType::kF16 : candidates[0].policy.exact_dtype)};
  Runner base;
  std::vector<Runner> runners(candidates.size());
  const int64_t longest = stretches.whole ? options.context : std::min(kStretch, options.context);
  Matrix<float> base_logits(longest, vocab), test_logits(candidates.empty() ? 0 : longest, vocab);

  Progress progress("replay: window", static_cast<int64_t>(windows.size()));
  for (size_t w = 0; w < windows.size(); ++w) {
    if (stop && stop()) break;
    const auto& ids = windows[w].tokens;
    const int64_t n = static_cast<int64_t>(ids.size());
    base.start(exact);
    for (size_t c = 0; c < candidates.size(); ++c) runners[c].start(candidates[c]);
    std::vector<int32_t> first_flip(candidates.size(), -1);

    for (int64_t at = 0, end = 0; at < n; at = end) {
      end = stretches.end(at);
      const int64_t m = end - at;
      const std::span<const int32_t> tokens(ids.data() + at, static_cast<size_t>(m));
      const auto truth = [&](int64_t i) { return ids[static_cast<size_t>(at + i + 1)]; };
      Stopwatch exact_time;
      base.feed(model, tokens, base_logits.view().slice_rows(0, m), Visibility::kReplay);
      result.exact_seconds += exact_time.seconds();
      // Nothing of an exact prompt is scored, for any candidate: all rows share their positions. The last token of a
      // window predicts nothing.
      const bool scores = at >= stretches.prompt;
      const int64_t scored = scores ? std::min(m, n - 1 - at) : 0;
      std::vector<LogitFacts> exact_rows(static_cast<size_t>(scored));
      parallel_for(scored, [&](int64_t i) { exact_rows[static_cast<size_t>(i)] = logit_facts(base_logits.row(i), vocab, truth(i)); });
      for (int64_t i = 0; i < scored; ++i) {
        result.position.push_back(static_cast<int32_t>(at + i + 1));
        result.window.push_back(static_cast<int32_t>(w));
        result.document.push_back(windows[w].document);
        result.nll_exact.push_back(exact_rows[static_cast<size_t>(i)].nll);
        result.text_bytes += static_cast<int64_t>(model.tokenizer().piece(truth(i)).size());
      }

      for (size_t c = 0; c < candidates.size(); ++c) {
        Runner& r = runners[c];
        ReplayTrack& track = result.tracks[c];
        const bool in_prompt = candidates[c].mode == ReplayMode::kPrefillExact && at < stretches.prompt;
        const Visibility visibility = candidates[c].mode == ReplayMode::kFakeQuant ? Visibility::kAllCoded
                                      : in_prompt                                  ? Visibility::kExactPrefill
                                                                                   : Visibility::kReplay;
        const AttendStats before = r.session->stats();
        Stopwatch time;
        r.feed(model, tokens, test_logits.view().slice_rows(0, m), visibility);
        if (in_prompt && end == stretches.prompt) r.cache->end_exact_prefill();
        track.model_seconds += time.seconds();
        if (!scores) continue;
        const AttendStats& after = r.session->stats();
        track.coded_mass += after.coded_mass - before.coded_mass;
        track.total_mass += after.total_mass - before.total_mass;
        if (at >= stretches.last_quarter) {
          track.coded_mass_last += after.coded_mass - before.coded_mass;
          track.total_mass_last += after.total_mass - before.total_mass;
        }
        const size_t first = track.nll.size(), count = static_cast<size_t>(scored);
        track.nll.resize(first + count);
        track.kld.resize(first + count);
        track.delta_p.resize(first + count);
        track.same_top.resize(first + count);
        parallel_for(scored, [&](int64_t i) {
          const size_t k = first + static_cast<size_t>(i);
          const LogitFacts f = logit_facts(test_logits.row(i), vocab, truth(i));
          const LogitFacts& e = exact_rows[static_cast<size_t>(i)];
          track.nll[k] = f.nll;
          track.kld[k] = kl_divergence(base_logits.row(i), e.log_sum, test_logits.row(i), f.log_sum, vocab);
          track.delta_p[k] = std::exp(-f.nll) - std::exp(-e.nll);
          track.same_top[k] = f.top == e.top;
        });
        for (size_t k = 0; k < count && first_flip[c] < 0; ++k)
          if (!track.same_top[first + k]) first_flip[c] = static_cast<int32_t>(at) + static_cast<int32_t>(k) + 1;
      }
    }
    for (size_t c = 0; c < candidates.size(); ++c) {
      ReplayTrack& track = result.tracks[c];
      track.path = runners[c].backend->name();
      track.flips.push_back(first_flip[c]);
      track.bytes = runners[c].cache->bytes();
      track.peak_cache_bytes = std::max(track.peak_cache_bytes, runners[c].memory->peak());
      track.encode_seconds += runners[c].cache->encode_seconds();
      track.attend_seconds += runners[c].session->attend_seconds();
    }
    ++result.windows;
    result.tokens += n;
    progress.update(static_cast<int64_t>(w) + 1);
  }
  return result;
}

}  // namespace vqkv
