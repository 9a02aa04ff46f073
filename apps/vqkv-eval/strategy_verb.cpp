// What a strategy of decoding guesses right, what it reads for a token, and whether its text is its target's: beside
// the plain one over the same cache and over the exact one.
#include <cstdio>

#include "common/tool.h"
#include "continuation.h"

namespace vqkv::eval {

int run_strategy(const GenerateVerb& v) {
  refuse_exec(v.common, kCodesOfItsOwn);
  const Continued all = continue_prompt(v);
  if (all.runs.empty()) return kExitOk;
  Table table{{{"codec", "codec", "", false},
               {"strategy", "strategy", "", false},
               {"path", "path", "", false},
               {"new_tokens", "tokens", "{:.0f}"}},
              {}};
  for (Column& column : strategy_columns()) table.columns.push_back(std::move(column));
  table.columns.push_back({"bits_per_value", "bits/value", "{:.3f}"});
  table.columns.push_back({"decode", "decode tok/s", "{:.2f}"});
  for (const Continuation& run : all.runs) table.rows.push_back(row_of(v, all, run));
  const Json full = {{"facts", facts_of(v, all)}, {"prompt", all.prompt}, {"rows", table.rows}};
  if (print(table, v.common.format, full))
    std::fputs(
        "\nBytes a token behind the first: what passes behind the prompt read at least, drafts included, each weight, "
        "code and exact row once a pass.\n",
        stdout);
  return kExitOk;
}

}  // namespace vqkv::eval
