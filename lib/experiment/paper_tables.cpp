#include "experiment/paper_tables.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "codec/codec_set.h"
#include "core/names.h"
#include "experiment/shape_ledger.h"
#include "experiment/shapes.h"
#include "generation/replay.h"
#include "generation/strategies/strategy.h"

namespace vqkv {
namespace {

constexpr Quantity kQuantities[] = {
    {"bits", "bits a coded value, keys and values together: codes, side data and exceptions", true},
    {"bits.k", "the same of keys", true},
    {"bits.v", "the same of values", true},
    {"bits.draft", "the same of what the first level of every code reads", true},
    {"held", "bits a value that a sequence of `tokens` tokens holds, sinks and window included", true},
    {"ratio", "16 over bits", true},
    {"saved", "bits less than 16, in percent of them", true},
    {"share", "bits in percent of 16", true},
    {"ppl", "perplexity of a replay", false},
    {"acceptance", "drafted tokens that stand in the text of a strategy, in percent", false},
};

const Quantity* quantity_of(const PaperNumber& n) {
  const auto it = std::ranges::find_if(kQuantities, [&](const Quantity& q) { return n.quantity == q.name; });
  return it == std::end(kQuantities) ? nullptr : &*it;
}

// Keys that a table, a row and a column may each have; the later of them holds, but `cache` merges key by key.
constexpr const char* kConditions[] = {"quantity", "source",   "unconfirmed", "remark",     "model",      "texts",
                                       "mode",     "strategy", "context",     "tokens",     "residual",   "codec",
                                       "cache",    "scaled",   "shape",       "exceptions", "exact_pairs"};

void require_keys(const Json& map, const std::string& path, std::initializer_list<const char*> own, bool conditions) {
  ConfigReader reader(map, path);
  for (const char* key : own) reader.raw(key);
  if (conditions)
    for (const char* key : kConditions) reader.raw(key);
  reader.finish();
}

void take_conditions(Json& into, const Json& from) {
  for (const char* key : kConditions) {
    const auto it = from.find(key);
    if (it == from.end()) continue;
    if (it->is_null())
      into.erase(key);
    else if (std::string_view(key) == "cache" && it->is_object() && into.contains(key))
      into[key].merge_patch(*it);
    else
      into[key] = *it;
  }
}

// A check that knows its section alone, told with the row that it stands in.
template <class F>
void led_by(const std::string& path, F&& check) {
  try {
    check();
  } catch (const Error& e) { throw Error(e.kind(), fmt::format("{}: {}", path, e.what())); }
}

// A text that has to be there.
std::string text_of(ConfigReader& reader, const std::string& key, const std::string& help) {
  const std::string text = reader.text(key, "");
  if (text.empty()) reader.fail(key, "is missing: " + help);
  return text;
}

// "unconfirmed" reads as none.
std::vector<std::string> names_of(ConfigReader& reader, const std::string& key) {
  std::vector<std::string> names = reader.texts(key);
  if (names == std::vector<std::string>{kUnconfirmed}) names.clear();
  return names;
}

// `merged`: the conditions of table, row and column together; `path`: of the row.
PaperNumber read_number(const Json& merged, const std::string& path) {
  ConfigReader r(merged, path);
  PaperNumber n;
  n.quantity = r.text("quantity", "");
  if (!n.quantity.empty() && !quantity_of(n)) {
    std::vector<std::string> known;
    for (const Quantity& q : kQuantities) known.push_back(q.name);
    fail_unknown(path + ".quantity: quantity", n.quantity, known);
  }
  n.source = text_of(r, "source", "every number names where it stands");
  n.unconfirmed = r.text("unconfirmed", "");
  n.remark = r.text("remark", "");
  n.models = names_of(r, "model");
  n.texts = names_of(r, "texts");
  n.mode = r.text("mode", "");
  if (!n.mode.empty() && n.mode != kUnconfirmed) replay_mode_from_name(n.mode);
  n.strategy = r.text("strategy", "");
  if (!n.strategy.empty()) find_strategy(n.strategy, path + ".strategy");
  if (r.raw("context") != Json(kUnconfirmed)) n.context = r.integer("context", 0, 2, 1 << 24);
  n.tokens = r.integer("tokens", 0, 1, 1 << 24);
  n.mean_residual = r.choice("residual", "there", {"there", "mean"}) == "mean";
  n.codec = r.raw("codec");
  n.cache = r.raw("cache");
  if (const Json& list = r.raw("scaled"); !list.is_null()) {
    if (!list.is_array() || list.empty()) fail_expected(path + ".scaled", "a list of codec sections", list);
    n.scaled.assign(list.begin(), list.end());
  }
  if (const Json& map = r.raw("shape"); !map.is_null()) {
    ConfigReader shape(map, path + ".shape");
    n.shape_name = text_of(shape, "name", "whose shape it is");
    n.shape = read_shape(shape);
  }
  const Json share = r.raw("exceptions");
  if (!share.is_null() && (!share.is_number() || share.get<double>() < 0 || share.get<double>() > 1))
    fail_expected(path + ".exceptions", "a share from 0 to 1", share);
  n.exceptions = share.is_null() ? 0 : share.get<double>();
  n.exact_pairs = r.integer("exact_pairs", 0, 1, 1 << 24);

  const std::string what = n.quantity;
  if (is_computed(n) || is_measured(n)) r.require("codec", what + " is of a codec");
  if (is_computed(n)) r.require("shape", what + " is computed at a shape");
  if (what == "held") r.require("tokens", "what is held depends on the length");
  if (is_measured(n)) r.require("model", "of whom it was measured, or " + std::string(kUnconfirmed));
  for (const char* key : {"texts", "mode", "context"})
    if (what == "ppl") r.require(key, "a condition of a perplexity, or " + std::string(kUnconfirmed));
  if (what == "acceptance") r.require("strategy", "whose drafts they are");
  // What is wrong with them is told when the file is read, not when a number is asked for.
  if (!n.codec.is_null()) led_by(path, [&] { canonical_codec_config(n.codec); });
  for (const Json& codec : n.scaled) led_by(path + ".scaled", [&] { canonical_codec_config(codec); });
  if (!n.cache.is_null()) led_by(path, [&] { canonical_cache_config(n.cache); });
  return n;
}

struct Column {
  std::string what;
  Json conditions = Json::object();
};

std::vector<Column> read_columns(const Json& list, const std::string& path) {
  if (!list.is_array() || list.empty()) fail_expected(path, "a list of headings, or of {what, conditions}", list);
  std::vector<Column> out;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string here = fmt::format("{}[{}]", path, i);
    if (list[i].is_string()) {
      out.push_back({list[i].get<std::string>()});
      continue;
    }
    require_keys(list[i], here, {"what"}, true);
    ConfigReader r(list[i], here);
    out.push_back({text_of(r, "what", "what stands in the column"), list[i]});
  }
  return out;
}

PaperTable read_table(const Json& map, const std::string& path) {
  require_keys(map, path, {"id", "title", "by", "protocol", "needs", "fill", "columns", "rows"}, true);
  ConfigReader r(map, path);
  PaperTable t;
  t.id = text_of(r, "id", "a name within the paper");
  t.title = text_of(r, "title", "what the table is of");
  t.by_formula = r.choice("by", "paper", {"paper", "formula"}) == "formula";
  t.protocol = r.text("protocol", "");
  t.needs = r.text("needs", "");
  t.fill = r.text("fill", "");
  const std::vector<Column> columns = read_columns(r.raw("columns"), path + ".columns");
  const Json rows = r.raw("rows");
  if (!rows.is_array() || rows.empty()) fail_expected(path + ".rows", "a list of {method, values}", rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::string here = fmt::format("{}.rows[{}]", path, i);
    require_keys(rows[i], here, {"method", "values"}, true);
    ConfigReader row(rows[i], here);
    const std::string method = text_of(row, "method", "whose numbers they are");
    const Json values = row.raw("values");
    if (!values.is_array() || values.size() != columns.size())
      fail_expected(here + ".values", fmt::format("a list of {}, one a column", columns.size()), values);
    for (size_t c = 0; c < columns.size(); ++c) {
      if (values[c].is_null()) continue;  // the paper prints none
      if (!values[c].is_number() && !values[c].is_string())
        fail_expected(here + ".values", "numbers, or the paper's words", values[c]);
      Json merged = Json::object();
      for (const Json* conditions : {&map, static_cast<const Json*>(&rows[i]), &columns[c].conditions})
        take_conditions(merged, *conditions);
      PaperNumber n = read_number(merged, here);
      n.method = method;
      n.what = columns[c].what;
      n.value = values[c];
      if (!is_computed(n) && (t.needs.empty() || t.fill.empty()))
        r.fail("needs",
               "nothing here answers this table: `needs` says what would, `fill` the command, or that there is none");
      t.numbers.push_back(std::move(n));
    }
  }
  if (t.numbers.empty()) fail_usage(path + ".rows: a table without a number");
  return t;
}

}  // namespace

std::span<const Quantity> quantities() { return kQuantities; }

bool is_computed(const PaperNumber& n) {
  const Quantity* q = quantity_of(n);
  return q && q->computed;
}

bool is_measured(const PaperNumber& n) {
  const Quantity* q = quantity_of(n);
  return q && !q->computed;
}

Paper read_paper(const Config& config) {
  return annotated(config, [&] {
    ConfigReader r(config, "");
    for (const char* key : {"paper", "title", "arxiv", "venue", "tables"}) r.raw(key);
    r.finish();
    Paper p;
    p.name = text_of(r, "paper", "the name that the tables are asked for by");
    p.title = text_of(r, "title", "of the paper");
    p.arxiv = text_of(r, "arxiv", "its number, in quotes");
    p.venue = text_of(r, "venue", "where it appeared, or the year");
    const Json tables = r.raw("tables");
    if (!tables.is_array() || tables.empty()) fail_expected("tables", "a list of tables", tables);
    std::set<std::string> ids;
    for (size_t i = 0; i < tables.size(); ++i) {
      p.tables.push_back(read_table(tables[i], fmt::format("tables[{}]", i)));
      if (!ids.insert(p.tables.back().id).second)
        fail_usage(fmt::format("tables[{}].id: '{}' stands twice", i, p.tables.back().id));
    }
    return p;
  });
}

std::vector<Paper> find_papers(const std::vector<std::string>& names) {
  refuse_twice("tables", names);
  std::vector<std::string> known{"all"};
  for (const PaperFile& f : paper_files())
    known.push_back(std::string(f.name).substr(0, std::string(f.name).find('.')));
  if (std::ranges::find(names, "all") != names.end() && names.size() > 1)
    fail_usage("tables: all of them and others beside");
  std::vector<Paper> out;
  for (const std::string& name : names) {
    if (name.ends_with(".yaml") || name.ends_with(".yml")) {
      out.push_back(read_paper(load_config(name)));
      continue;
    }
    if (std::ranges::find(known, name) == known.end()) fail_unknown("paper", name, known);
    for (const PaperFile& f : paper_files())
      if (name == "all" || name + ".yaml" == f.name) out.push_back(read_paper(parse_yaml(f.text, f.name)));
  }
  return out;
}

double computed_value(const PaperNumber& n) {
  VQKV_CHECK(is_computed(n) && n.shape);
  const ShapeLedger ledger(n.codec, n.cache, *n.shape, n.exceptions);
  if (n.quantity == "bits.k") return ledger.bits(Role::kKey, n.tokens);
  if (n.quantity == "bits.v") return ledger.bits(Role::kValue, n.tokens);
  if (n.quantity == "bits.draft") return ledger.bits({}, n.tokens, 0);
  if (n.quantity == "held")
    return (n.mean_residual ? ledger.held_in_the_mean(n.tokens) : ledger.held(n.tokens)) +
           16 * static_cast<double>(n.exact_pairs) / static_cast<double>(n.tokens);
  const double bits = ledger.bits({}, n.tokens);
  if (n.quantity == "ratio") return 16 / bits;
  if (n.quantity == "saved") return 100 * (1 - bits / 16);
  if (n.quantity == "share") return 100 * bits / 16;
  return bits;
}

}  // namespace vqkv
