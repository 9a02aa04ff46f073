// One prompt continued over the exact cache and over each codec, plainly and by a strategy: what `generate` and
// `strategy` both run and tell in their own ways.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "generation/strategies/strategy.h"
#include "model/tokenizer.h"
#include "verbs.h"

namespace vqkv::eval {

struct Continuation {
  LoadedCodec codec;
  std::string strategy = "plain";
  size_t target = 0;  // the run whose text this one reproduces: itself, but for a strategy that guesses
  Generated generated;
  StrategyCounts counts;
  std::string path;
  ByteLedger bytes;
  std::optional<int64_t> claimed_bytes;  // by a codec in another program
  int64_t device_bytes = 0;              // KvSession::device_bytes, at the end
  int64_t length = 0;                    // tokens held at the end
  double encode_seconds = 0;
  std::optional<double> coded_share, attend_seconds;  // of the attention mass; a device tells neither
  int64_t divergence = -1;         // index of the first new token that differs from the exact cache's; -1: none
  int64_t target_divergence = -1;  // the same from the target's

  bool guesses() const { return strategy != "plain"; }
  std::string label() const { return guesses() ? codec.label + " by " + strategy : codec.label; }
};

struct Continued {
  std::unique_ptr<ModelRuntime> model;
  std::vector<int32_t> prompt;
  Json knobs;                      // of the strategy
  std::vector<Continuation> runs;  // the first over the exact cache; fewer when interrupted
};

// Why no strategy but the plain one decodes over exec:COMMAND.
inline constexpr char kCodesOfItsOwn[] =
    "a strategy reads codes in ways of its own, and a codec in another program keeps them to itself";

// Runs all of it; refuses what is wrong in flags, prompt and codecs before the first token.
Continued continue_prompt(const GenerateVerb& verb);

// What holds for all rows, as facts of the JSON.
Json facts_of(const GenerateVerb& verb, const Continued& all);
// The row of one run, as far as both verbs have it: strategy, counts a token behind the first, seconds.
Json row_of(const GenerateVerb& verb, const Continued& all, const Continuation& run);
// What row_of tells of a strategy.
std::vector<Column> strategy_columns();

// One token as it prints; a padded row of the model's vocabulary has no text.
std::string shown(const Tokenizer& tokenizer, int32_t id);

}  // namespace vqkv::eval
