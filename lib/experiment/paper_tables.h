// What papers print, as data: data/papers/*.yaml, one file a paper, compiled in. docs/paper-tables.md describes them.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "config/config.h"
#include "core/cache_shape.h"
#include "core/json.h"

namespace vqkv {

struct PaperFile {
  const char* name;  // "kivi.yaml"
  std::string_view text;
};
std::span<const PaperFile> paper_files();  // by name

// What a condition is where nobody could confirm it: nothing equals it.
inline constexpr const char* kUnconfirmed = "unconfirmed";

// One number of a paper with the conditions that it holds under, as far as they are recorded.
struct PaperNumber {
  std::string method;  // "KIVI-2, G = 32"
  std::string what;    // of its column: "LongBench, average"
  Json value;          // a number, or the paper's words: "2.35 to 3.47 times"
  // What of ours answers it: one of quantities(), or "": nothing yet, and the table says what it needs.
  std::string quantity;
  std::string source;       // section of our notes, with its own source where that is not the paper
  std::string unconfirmed;  // what of it is; "": nothing
  std::string remark;

  std::vector<std::string> models;  // names of one model, any of them; empty: unconfirmed
  std::vector<std::string> texts;   // what names of files begin with; empty: unconfirmed
  std::string mode;                 // of a replay, or kUnconfirmed
  std::string strategy;             // of decoding
  int64_t context = 0;              // tokens a window of a replay; 0: unconfirmed
  int64_t tokens = 0;               // of a sequence or a prompt; 0: none named
  bool mean_residual = false;       // `held` at the mean of its window over a period of flushes
  Json codec, cache;                // sections of a configuration; null: none
  std::vector<Json> scaled;         // `codec` for the heads of a smaller model: never the row's own number
  std::string shape_name;
  std::optional<CacheShape> shape;
  double exceptions = 0;    // share of coded values that stay exact
  int64_t exact_pairs = 0;  // of tokens, that lie beside the cache
};

struct PaperTable {
  std::string id, title;
  bool by_formula = false;  // arithmetic of a formula: the paper prints none of these numbers
  std::string protocol;     // in words
  std::string needs, fill;  // of what nothing here answers; a measured quantity has them too
  std::vector<PaperNumber> numbers;
};

struct Paper {
  std::string name, title, arxiv, venue;
  std::vector<PaperTable> tables;
};

// What a number may be: `computed` by the ledger for a codec at a shape, or else measured.
struct Quantity {
  const char *name, *meaning;
  bool computed;
};
std::span<const Quantity> quantities();
bool is_computed(const PaperNumber& number);
bool is_measured(const PaperNumber& number);

// Strict: a key or quantity that is not known, a number without a source, a row of another length than its columns, a
// table that nothing answers and that does not say what it needs, a quantity without its conditions are kUsage with
// file:line:column.
Paper read_paper(const Config& config);

// Of the names: papers that are compiled in, "all" of them, or files *.yaml of the same form. kUsage for another name,
// with the nearest, and for one that stands twice.
std::vector<Paper> find_papers(const std::vector<std::string>& names);

// What the ledger says of a computed number. kUsage where its codec or cache is wrong.
double computed_value(const PaperNumber& number);

}  // namespace vqkv
