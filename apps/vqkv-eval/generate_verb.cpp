// Text generated with the exact cache and with each codec from the same prompt, side by side, with the first
// divergence.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "common/tool.h"
#include "continuation.h"
#include "core/log.h"

namespace vqkv::eval {
namespace {

Json token_json(const Tokenizer& tokenizer, const Generated& g, int64_t at) {
  const auto ids = g.with_stop();
  if (at < 0 || at >= static_cast<int64_t>(ids.size())) return nullptr;
  const int32_t id = ids[static_cast<size_t>(at)];
  return {{"id", id}, {"text", shown(tokenizer, id)}};
}

// Lines of at most `width` characters, broken at spaces where there are any. A character is a code point: close enough.
std::vector<std::string> wrapped(const std::string& text, size_t width) {
  std::vector<std::string> out{""};
  size_t used = 0, space = std::string::npos;  // characters in the last line; byte of its last space
  for (size_t at = 0; at < text.size();) {
    size_t bytes = 1;
    while (at + bytes < text.size() && (text[at + bytes] & 0xC0) == 0x80) ++bytes;
    const char c = text[at];
    if (c == '\n') {
      out.emplace_back();
      used = 0;
      space = std::string::npos;
    } else if (c != '\r') {
      if (used == width) {
        std::string rest;
        if (space != std::string::npos) {
          rest = out.back().substr(space + 1);
          out.back().resize(space);
        }
        used = static_cast<size_t>(std::count_if(rest.begin(), rest.end(), [](char x) { return (x & 0xC0) != 0x80; }));
        out.push_back(std::move(rest));
        space = std::string::npos;
      }
      if (c == ' ') space = out.back().size();
      out.back() += c == '\t' ? std::string(" ") : text.substr(at, bytes);
      ++used;
    }
    at += bytes;
  }
  return out;
}

std::string side_by_side(const std::string& left_title, const std::string& left, const std::string& right_title,
                         const std::string& right) {
  constexpr size_t kWidth = 56;
  const auto a = wrapped(left, kWidth), b = wrapped(right, kWidth);
  std::string out;
  const auto line = [&](const std::string& x, const std::string& y) {
    const size_t used =
        static_cast<size_t>(std::count_if(x.begin(), x.end(), [](char c) { return (c & 0xC0) != 0x80; }));
    out += x + std::string(kWidth - std::min(used, kWidth), ' ') + " | " + y + "\n";
  };
  line(left_title, right_title);
  out += std::string(kWidth, '-') + "-+-" + std::string(kWidth, '-') + "\n";
  for (size_t i = 0; i < std::max(a.size(), b.size()); ++i) line(i < a.size() ? a[i] : "", i < b.size() ? b[i] : "");
  return out;
}

// The text with a mark where it leaves the other one.
std::string marked(const Tokenizer& tokenizer, const Generated& g, int64_t divergence) {
  if (divergence < 0 || divergence >= static_cast<int64_t>(g.tokens.size()))
    return printable(tokenizer.decode(g.tokens, true));
  const auto cut = g.tokens.begin() + divergence;
  std::string before, after;
  for (auto t = g.tokens.begin(); t != g.tokens.end(); ++t)
    (t < cut ? before : after) += tokenizer.padded(*t) ? "" : tokenizer.piece(*t);
  return printable(before) + "»" + printable(after);
}

}  // namespace

int run_generate(const GenerateVerb& v) {
  const Continued all = continue_prompt(v);
  const std::vector<Continuation>& runs = all.runs;
  if (runs.empty()) return kExitOk;
  const Tokenizer& tokenizer = all.model->tokenizer();

  Table table{{{"codec", "codec", "", false},
               {"protocol", "protocol", "", false},
               {"path", "path", "", false},
               {"new_tokens", "tokens", "{:.0f}"},
               {"stopped", "ended by", "", false},
               {"divergence", "first divergence", "{:.0f}"},
               {"exact_token", "exact token", "", false},
               {"codec_token", "codec token", "", false},
               {"coded_mass", "coded mass", "{:.3f}"},
               {"bits_per_value", "bits/value", "{:.3f}"},
               {"prefill", "prefill tok/s", "{:.1f}"},
               {"decode", "decode tok/s", "{:.2f}"}},
              {}};
  if (v.strategy != "plain") {
    table.columns.insert(table.columns.begin() + 1, {"strategy", "strategy", "", false});
    for (Column& column : strategy_columns()) table.columns.push_back(std::move(column));
  }
  for (const Continuation& run : runs) {
    const Generated& g = run.generated;
    Json row = row_of(v, all, run);
    const auto padded =
        std::count_if(g.tokens.begin(), g.tokens.end(), [&](int32_t id) { return tokenizer.padded(id); });
    row["padded_tokens"] = padded;
    if (padded > 0)
      log_warning(
          fmt::format("{}: {} of {} new tokens are beyond the tokenizer's {} entries (the model has {} rows): "
                      "they print as nothing, their ids stand in --json",
                      run.label(), padded, g.tokens.size(), tokenizer.size(), all.model->facts().vocab));
    row["first_divergence"] = nullptr;
    if (run.divergence >= 0) {
      const Json a = token_json(tokenizer, runs[0].generated, run.divergence),
                 b = token_json(tokenizer, g, run.divergence);
      row["first_divergence"] = {{"index", run.divergence}, {"exact", a}, {"codec", b}};
      row["divergence"] = run.divergence;
      row["exact_token"] = a.is_null() ? "" : a["text"].dump();
      row["codec_token"] = b.is_null() ? "" : b["text"].dump();
    }
    table.rows.push_back(std::move(row));
  }
  const Json full = {{"facts", facts_of(v, all)}, {"prompt", all.prompt}, {"rows", table.rows}};
  if (!print(table, v.common.format, full)) return kExitOk;
  std::string out;
  if (runs.size() == 1) out = "\n" + printable(tokenizer.decode(runs[0].generated.tokens, true)) + "\n";
  for (size_t r = 1; r < runs.size(); ++r) {
    const int64_t at = runs[r].divergence;
    out += "\n" + side_by_side("exact", marked(tokenizer, runs[0].generated, at), runs[r].label(),
                               marked(tokenizer, runs[r].generated, at));
    out += at < 0 ? "Equal, token for token.\n"
                  : fmt::format("» marks the first divergence, new token {} (counted from 0).\n", at);
  }
  std::fputs(out.c_str(), stdout);
  return kExitOk;
}

}  // namespace vqkv::eval
