#include "generation/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/sequence.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/names.h"
#include "core/thread_pool.h"
#include "generation/logits.h"
#include "model/text_input.h"

namespace vqkv {
namespace {

constexpr ReplayModeInfo kModes[] = {
    {ReplayMode::kForced, "forced", "what decoding token by token does, computed in blocks"},
    {ReplayMode::kStepwise, "stepwise",
     "token by token; the same bits as forced (under --attention auto another path: up to rounding)"},
    {ReplayMode::kPrefillExact, "prefill-exact", "exact attention over the prompt, coded once, then as forced"},
    {ReplayMode::kFakeQuant, "fake-quant",
     "every K and V beyond the sinks decoded, the token's own included, no window; some papers' perplexity"}};

constexpr int64_t kStretch = 256;  // tokens whose logits are held at once: 48 MiB at a vocabulary of 49,152

// One cache at work on one window.
struct Runner {
  const ReplayCandidate* candidate = nullptr;
  std::optional<Sequence> sequence;  // one for all windows

  void start(const ReplayCandidate& c) {
    candidate = &c;
    if (sequence)
      sequence->restart();
    else
      sequence.emplace(c.codecs, c.policy, c.attention);
  }

  // Feeds tokens in the candidate's own manner; logits gets a row a token. A fake-quant stretch is one block, since its
  // queries see the codes of tokens after them in a codec block. False when `stop` said so between blocks.
  bool feed(ModelRuntime& model, std::span<const int32_t> tokens, MutMatrix logits, Visibility visibility,
            const std::function<bool()>& stop) {
    const int64_t n = static_cast<int64_t>(tokens.size());
    const int64_t step = visibility == Visibility::kAllCoded ? n
                         : candidate->mode == ReplayMode::kStepwise && visibility == Visibility::kReplay
                             ? 1
                             : candidate->block;
    for (int64_t at = 0; at < n; at += step) {
      if (stop && stop()) return false;
      const int64_t m = std::min(step, n - at);
      try {
        model.forward(tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(m)), sequence->session(),
                      LogitRows::kAll, logits.slice_rows(at, m), visibility);
      } catch (const Error& e) { throw Error(e.kind(), fmt::format("{}: {}", candidate->label, e.what())); }
    }
    return true;
  }
};

struct Window {
  int32_t document = 0;
  std::vector<int32_t> tokens;  // BOS first where the model adds one
};

std::vector<Window> cut_windows(const SpecialTokens& special, std::span<const ReplayText> texts,
                                const ReplayOptions& o) {
  if (o.context < 2) fail_usage(fmt::format("a context of {} is too short to score anything", o.context));
  std::vector<std::vector<Window>> by_text(texts.size());
  for (size_t t = 0; t < texts.size(); ++t) {
    const auto& ids = texts[t].tokens;
    for (int64_t at = 0; at < static_cast<int64_t>(ids.size());) {
      Window w;
      w.document = static_cast<int32_t>(t);
      w.tokens = take_window(ids, at, o.context, special);
      if (static_cast<int64_t>(w.tokens.size()) == o.context) by_text[t].push_back(std::move(w));
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

std::vector<Window> windows_of(const ModelRuntime& model, std::span<const ReplayText> texts, const ReplayOptions& o) {
  model.facts().require_context(o.context);
  const Tokenizer* tokenizer = model.find_tokenizer();
  auto windows = cut_windows(tokenizer ? tokenizer->special() : SpecialTokens{}, texts, o);
  if (windows.empty())
    fail_data(
        fmt::format("no text holds a whole window of {} tokens; give a longer text or a smaller context", o.context));
  return windows;
}

// Tokens of each window that are read exactly and not scored.
int64_t prompt_of(ReplayMode mode, const ReplayOptions& o) {
  if (mode != ReplayMode::kPrefillExact) return 0;
  const int64_t prompt = o.prompt > 0 ? o.prompt : o.context / 2;
  if (prompt >= o.context)
    fail_usage(fmt::format("an exact prompt of {} tokens leaves nothing to score in {}", prompt, o.context));
  return prompt;
}

// Where a window is cut: stretches end where the meaning of a position changes.
struct Stretches {
  int64_t context, prompt, last_quarter;  // prompt 0: nobody has one
  // Fake-quant candidates code whole codec blocks, so their stretches end on the grid first + n * grid (or at the end
  // of the window); then stretches give what one pass would. grid 0: no common grid, the window is one stretch.
  int64_t first = 0, grid = 1;

  bool on_grid(int64_t at) const { return grid > 0 && at >= first && (at - first) % grid == 0; }
  int64_t end(int64_t at) const {
    int64_t e = context;
    if (grid > 0 && at + kStretch < context) e = std::max(first + grid, first + (at + kStretch - first) / grid * grid);
    for (const int64_t cut : {prompt, last_quarter})
      if (cut > at && cut < e && on_grid(cut)) e = cut;
    return std::min(e, context);
  }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t at = 0, e = 0; at < context; at = e) {
      e = end(at);
      most = std::max(most, e - at);
    }
    return most;
  }
};

Stretches stretches_for(std::span<const ReplayCandidate> candidates, const ReplayOptions& o) {
  Stretches s{.context = o.context, .prompt = 0, .last_quarter = o.context - o.context / 4};
  bool fake = false;
  for (const auto& c : candidates) {
    s.prompt = std::max(s.prompt, prompt_of(c.mode, o));
    if (c.mode != ReplayMode::kFakeQuant || !c.policy.keeps_codes()) continue;
    if (fake && s.first != c.policy.sinks) s.grid = 0;
    s.first = c.policy.sinks;
    fake = true;
    const CachePolicy policy = c.policy.for_codecs(*c.codecs);
    if (policy.waits > o.context)
      fail_usage(fmt::format("{}: fake-quant codes every token of a window of {}; {}", c.label, o.context,
                             policy.waits_text()));
    if (policy.waits > 0) s.grid = 0;  // for more than a stretch may hold
    for (const auto& u : c.codecs->units())
      if (s.grid > 0) s.grid = std::lcm(s.grid, static_cast<int64_t>(u.codec->layout().block_tokens));
    if (s.grid > kStretch) s.grid = 0;
  }
  if (fake && s.prompt > 0)
    fail_usage("modes prefill-exact and fake-quant can't share one replay: they score other positions");
  return s;
}

// The facts of one prediction; an error says whose it is and where.
LogitFacts facts_of(const std::string& label, int64_t position, const float* logits, int64_t vocab, int32_t truth) {
  try {
    return logit_facts(logits, vocab, truth);
  } catch (const Error& e) { throw Error(e.kind(), fmt::format("{}: position {}: {}", label, position, e.what())); }
}

// Tokens [at, end) of a window through every cache; `out` is of this window alone. False when `stop` said so.
bool replay_stretch(ModelRuntime& model, const std::vector<int32_t>& ids, int64_t at, int64_t end,
                    const Stretches& stretches, Runner& base, std::vector<Runner>& runners, Matrix<float>& base_logits,
                    Matrix<float>& test_logits, const std::function<bool()>& stop, ReplayResult& out) {
  const int64_t vocab = model.facts().vocab, m = end - at;
  const std::span<const int32_t> tokens(ids.data() + at, static_cast<size_t>(m));
  const Stopwatch exact_time;
  if (!base.feed(model, tokens, base_logits.view().slice_rows(0, m), Visibility::kReplay, stop)) return false;
  out.exact_seconds += exact_time.seconds();

  // Row i predicts the token at at + i + 1. Tokens of an exact prompt are not scored, for any candidate, so that all
  // rows share their positions; the last token of a window predicts nothing.
  const int64_t first = std::max<int64_t>(0, stretches.prompt - 1 - at);
  const int64_t scored = std::max<int64_t>(0, std::min(m, stretches.context - 1 - at) - first);
  const auto truth = [&](int64_t i) { return ids[static_cast<size_t>(at + first + i + 1)]; };
  std::vector<LogitFacts> exact(static_cast<size_t>(scored));
  parallel_for(scored, [&](int64_t i) {
    exact[static_cast<size_t>(i)] =
        facts_of(base.candidate->label, at + first + i + 1, base_logits.row(first + i), vocab, truth(i));
  });
  for (int64_t i = 0; i < scored; ++i) {
    out.position.push_back(static_cast<int32_t>(at + first + i + 1));
    out.nll_exact.push_back(exact[static_cast<size_t>(i)].nll);
  }

  for (size_t c = 0; c < runners.size(); ++c) {
    Runner& r = runners[c];
    ReplayTrack& track = out.tracks[c];
    const ReplayMode mode = r.candidate->mode;
    const bool in_prompt = at < stretches.prompt;
    const Visibility visibility = mode == ReplayMode::kFakeQuant                   ? Visibility::kAllCoded
                                  : mode == ReplayMode::kPrefillExact && in_prompt ? Visibility::kExactPrefill
                                                                                   : Visibility::kReplay;
    if (visibility == Visibility::kExactPrefill && at == 0) r.sequence->session().expect_prompt(stretches.prompt);
    const AttendStats before = r.sequence->session().stats();
    const Stopwatch time;
    if (!r.feed(model, tokens, test_logits.view().slice_rows(0, m), visibility, stop)) return false;
    if (visibility == Visibility::kExactPrefill && end == stretches.prompt) r.sequence->session().end_exact_prefill();
    track.model_seconds += time.seconds();
    if (!in_prompt) {
      const AttendStats& after = r.sequence->session().stats();
      track.coded_mass += after.coded_mass - before.coded_mass;
      track.total_mass += after.total_mass - before.total_mass;
      if (at >= stretches.last_quarter) {
        track.coded_mass_last += after.coded_mass - before.coded_mass;
        track.total_mass_last += after.total_mass - before.total_mass;
      }
    }
    const size_t begin = track.nll.size(), count = begin + static_cast<size_t>(scored);
    track.nll.resize(count);
    track.kld.resize(count);
    track.delta_p.resize(count);
    track.same_top.resize(count);
    parallel_for(scored, [&](int64_t i) {
      const size_t k = begin + static_cast<size_t>(i);
      const LogitFacts f =
          facts_of(r.candidate->label, at + first + i + 1, test_logits.row(first + i), vocab, truth(i));
      const LogitFacts& e = exact[static_cast<size_t>(i)];
      track.nll[k] = f.nll;
      track.kld[k] = kl_divergence(base_logits.row(first + i), e.log_sum, test_logits.row(first + i), f.log_sum, vocab);
      track.delta_p[k] = std::exp(-f.nll) - std::exp(-e.nll);
      track.same_top[k] = f.top == e.top;
    });
  }
  return true;
}

// Adds what a candidate did in one window to its track.
void append_window(const ReplayTrack& one, const Runner& runner, ReplayTrack& track,
                   const std::vector<int32_t>& position) {
  const Sequence& sequence = *runner.sequence;
  track.path = sequence.path();
  const auto flip = std::find(one.same_top.begin(), one.same_top.end(), uint8_t{0});
  track.flips.push_back(flip == one.same_top.end() ? -1 : position[static_cast<size_t>(flip - one.same_top.begin())]);
  track.nll.insert(track.nll.end(), one.nll.begin(), one.nll.end());
  track.kld.insert(track.kld.end(), one.kld.begin(), one.kld.end());
  track.delta_p.insert(track.delta_p.end(), one.delta_p.begin(), one.delta_p.end());
  track.same_top.insert(track.same_top.end(), one.same_top.begin(), one.same_top.end());
  track.coded_mass += one.coded_mass;
  track.total_mass += one.total_mass;
  track.coded_mass_last += one.coded_mass_last;
  track.total_mass_last += one.total_mass_last;
  track.model_seconds += one.model_seconds;
  track.encode_seconds += sequence.cache().encode_seconds();
  track.attend_seconds += sequence.session().attend_seconds();
  if (runner.candidate->claimed_bytes) track.claimed_bytes = runner.candidate->claimed_bytes();
  track.bytes = sequence.cache().bytes();
  track.gave_up = track.gave_up || CacheView(sequence.cache()).any_evicted();
  track.peak_cache_bytes = std::max(track.peak_cache_bytes, sequence.memory().peak());
}

}  // namespace

std::span<const ReplayModeInfo> replay_modes() { return kModes; }

ReplayMode replay_mode_from_name(const std::string& name) {
  std::vector<std::string> known;
  for (const auto& m : kModes) {
    if (name == m.name) return m.mode;
    known.push_back(m.name);
  }
  fail_unknown("mode", name, known);
}

std::string replay_mode_name(ReplayMode mode) {
  for (const auto& m : kModes)
    if (mode == m.mode) return m.name;
  fail_internal("unknown replay mode");
}

int64_t scored_positions(const ModelRuntime& model, std::span<const ReplayText> texts, const ReplayOptions& options,
                         ReplayMode mode) {
  const auto windows = static_cast<int64_t>(windows_of(model, texts, options).size());
  return windows * (options.context - std::max<int64_t>(1, prompt_of(mode, options)));
}

ReplayResult replay(ModelRuntime& model, std::span<const ReplayText> texts, std::span<const ReplayCandidate> candidates,
                    const ReplayOptions& options, const std::function<bool()>& stop) {
  const int64_t vocab = model.facts().vocab;
  VQKV_CHECK(options.block > 0);
  const auto windows = windows_of(model, texts, options);
  const Tokenizer* tokenizer = model.find_tokenizer();
  const bool add_bos = tokenizer && tokenizer->special().add_bos;
  // A token that the tokenizer has no text for leaves no bytes to divide by.
  const auto untold = [&](const auto& w) {
    return std::any_of(w.tokens.begin(), w.tokens.end(), [&](int32_t id) { return tokenizer->padded(id); });
  };
  if (tokenizer && std::any_of(windows.begin(), windows.end(), untold)) tokenizer = nullptr;
  const Stretches stretches = stretches_for(candidates, options);

  ReplayResult result;
  result.bos = add_bos;
  result.prompt = stretches.prompt;
  result.tracks.resize(candidates.size());
  for (size_t c = 0; c < candidates.size(); ++c) result.tracks[c].label = candidates[c].label;

  const ReplayCandidate exact{.label = "exact",
                              .codecs = exact_codec_set(model.facts().cache_shape()),
                              .policy = CachePolicy::exact(options.exact_dtype),
                              .attention = options.attention,
                              .block = options.block};
  Runner base;
  std::vector<Runner> runners(candidates.size());
  Matrix<float> base_logits(stretches.longest(), vocab),
      test_logits(candidates.empty() ? 0 : stretches.longest(), vocab);

  Progress progress("replay: window", static_cast<int64_t>(windows.size()));
  for (size_t w = 0; w < windows.size(); ++w) {
    const auto& ids = windows[w].tokens;
    // Nothing of a window that is not finished counts.
    ReplayResult one;
    one.tracks.resize(candidates.size());
    base.start(exact);
    for (size_t c = 0; c < candidates.size(); ++c) runners[c].start(candidates[c]);
    for (int64_t at = 0, end = 0; at < options.context; at = end) {
      end = stretches.end(at);
      try {
        if (!replay_stretch(model, ids, at, end, stretches, base, runners, base_logits, test_logits, stop, one))
          return result;
      } catch (const Error& e) {
        if (stop && stop()) return result;  // another program's answer was awaited no longer
        throw Error(e.kind(), fmt::format("window {}: {}", w, e.what()));
      }
    }
    base.sequence->check_ledger(exact.label);
    result.exact_path = base.sequence->path();
    for (size_t c = 0; c < candidates.size(); ++c) {
      runners[c].sequence->check_ledger(candidates[c].label);
      append_window(one.tracks[c], runners[c], result.tracks[c], one.position);
    }
    const size_t scored = one.position.size();
    result.position.insert(result.position.end(), one.position.begin(), one.position.end());
    result.window.insert(result.window.end(), scored, static_cast<int32_t>(w));
    result.document.insert(result.document.end(), scored, windows[w].document);
    result.nll_exact.insert(result.nll_exact.end(), one.nll_exact.begin(), one.nll_exact.end());
    for (const int32_t p : one.position)
      if (tokenizer) result.text_bytes += static_cast<int64_t>(tokenizer->piece(ids[static_cast<size_t>(p)]).size());
    result.exact_seconds += one.exact_seconds;
    ++result.windows;
    result.tokens += options.context;
    progress.update(static_cast<int64_t>(w) + 1);
  }
  return result;
}

}  // namespace vqkv
