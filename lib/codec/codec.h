// Codec: the contract of every method. A codec belongs to one unit (N heads of one layer) and one role, is trained
// once, immutable afterwards, and codes blocks of tokens.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "codec/code_block.h"
#include "codec/knobs.h"
#include "codec/plan.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/rope.h"
#include "core/view.h"

namespace vqkv {

enum class Role { kKey, kValue };
std::string role_name(Role r);  // "k", "v"

// What a codec may learn from, for one unit and role. Rows are tokens of the train documents, in order. Only what the
// method or one of its transforms needs is there (TrainNeeds).
struct TrainSet {
  ConstMatrix x;                          // (n, channels), in the codec's RoPE domain, before any transform
  std::span<const int32_t> position;      // (n)
  std::span<const int32_t> document;      // (n)
  std::span<const float> weight;          // (n) or empty: importance of a token
  std::span<const float> received_mass;   // (n) or empty: sum of p over recorded queries
  std::span<const float> received_mass2;  // (n) or empty: sum of p^2
  ConstMatrix queries;                    // (m, channels) post-RoPE sample, heads of a unit side by side; may be empty
  // Second moment of the queries over ALL train positions, summed over the query heads of each KV head: (channels,
  // channels) with one head_dim block a head (post-RoPE) and E|q_p|^2 per pair (pre-RoPE). Empty for values.
  ConstMatrix query_moment;
  std::span<const float> query_pair_moment;  // (channels / 2)
  ConstMatrix output_weight;  // W_O slice of the unit's query heads: (hidden, group * channels); may be empty
  ConstMatrix other_role;     // (n, channels) of the other role
  // (n, channels): (dL/dx)^2 at every value of x, L the loss that the trace names (docs/formats.md); may be empty.
  // Nothing of it is known behind a transform.
  ConstMatrix squared_gradient;
  // (n, channels): rows of the same heads and role one layer below, in this codec's RoPE domain; zero in layer 0.
  // Exact, where encode_at gets them as decoded: train documents are thinned, and no prompt of theirs is coded.
  ConstMatrix lower;
  int head_dim = 0;
  int heads = 1;  // heads of the unit
};

// What of a TrainSet a method or transform reads. The rest is not read from a trace, and empty.
struct TrainNeeds {
  bool rows = false;           // x, position, document, weight: all that learns has these
  bool mass = false;           // received_mass, received_mass2
  bool queries = false;        // queries
  bool moments = false;        // query_moment, query_pair_moment
  bool output_weight = false;  // output_weight
  bool other_role = false;     // other_role
  bool gradients = false;      // squared_gradient
  bool lower = false;          // lower; said by every method whose codec sees_lower(), also by one that learns nothing
  TrainNeeds& operator|=(const TrainNeeds& o);
  std::vector<std::string> names() const;  // of what is set, for listings
};

// Bytes that training a unit takes in this process.
struct TrainMemory {
  double scratch = 0;  // at its peak, beside the TrainSet
  double kept = 0;     // of the trained codec: books, and what encodes with them
};

// Per-prompt parameters (pruned channels, bases, calibrated levels): fitted once on a prompt, counted as side data.
struct SequenceState {
  virtual ~SequenceState() = default;
  virtual int64_t bytes() const = 0;
};

// What fit() asks for. 0 tokens: the codec fits nothing.
struct FitNeeds {
  int64_t tokens = 0;    // of a prompt, at least: nothing is coded before they are there
  bool queries = false;  // q; the other codecs' is empty, and no cache holds queries for them
};

struct TrainReport {
  double seconds = 0;
  int64_t vectors = 0;  // trained on
  int64_t iterations = 0;
  std::vector<double> curve;  // training error after each stage or sweep, relative to the variance of x
  Json to_json() const;
};

class ParameterWriter;
class ParameterReader;

// How a plan may be asked for: a prefix of residual stages or of nibbles, and a prompt's parameters.
struct PlanQuery {
  int level = -1;  // -1: everything
  const SequenceState* state = nullptr;
};

// Where the rows that are coded stand.
struct EncodeContext {
  std::span<const int32_t> positions;  // (n) in their text, whatever was given up before them
  // (n, channels): rows of the same heads and role one layer below as their own unit decodes them, in this codec's RoPE
  // domain; zero in layer 0. Empty for a codec that doesn't see_lower().
  ConstMatrix lower;
};

class Codec {
 public:
  virtual ~Codec() = default;

  virtual int channels() const = 0;
  virtual const CodeLayout& layout() const = 0;
  virtual RopePlacement rope() const = 0;

  // Once. Methods without training leave it empty. Bit-identical for one Rng at any thread count.
  virtual TrainReport train(const TrainSet& set, const Rng& rng) = 0;

  // A codec that overrides fit() says here what it asks for; one that fits without is kInternal (cache/coding.h).
  virtual FitNeeds fit_needs() const { return {}; }
  // The parameters of one prompt, or null. Asked once a sequence and unit, before its first token is coded, in sweeps
  // and caches with the same rows: those of the prompt's first n tokens, n being what is there when the first token is
  // coded token by token, and at least fit_needs().tokens (fit_tokens in cache/coding.h).
  // k, v: (n, channels), as encode gets them of the units that code these heads' keys and values.
  // q: (n * group, channels), row t * group + g: query head g of each KV head of the unit at token t, heads side by
  // side, in the RoPE domain of k (an attention factor included where that is after RoPE), fp32 as the model computed
  // them or a trace recorded them, without the score scale.
  // Every value is finite. Thread-safe. A codec behind transforms gets its own role's rows, and for keys q, as they are
  // behind them: q . k is the same there but for token scales and what is equal for all keys.
  virtual std::unique_ptr<SequenceState> fit(ConstMatrix k, ConstMatrix v, ConstMatrix q) const;

  // x: (n, channels) with n a multiple of layout().block_tokens, in this codec's RoPE domain. Rejects NaN and
  // infinities (kBadData). Thread-safe; may use parallel_for. Rows are coded independently of their neighbours outside
  // a block.
  virtual void encode(ConstMatrix x, CodeBlock& out, const SequenceState* state = nullptr) const = 0;
  // The same for a codec that looks at where its rows stand: what sweeps and caches call (cache/coding.h).
  virtual void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out,
                         const SequenceState* state = nullptr) const;
  // encode_at reads EncodeContext::lower. The layer below then needs a unit of the same heads, RoPE placement and a
  // block length that divides this one's (CodecSet refuses others), and no policy may give up single tokens.
  virtual bool sees_lower() const { return false; }

  virtual DecodePlan plan(const PlanQuery& query = {}) const = 0;
  // Of keys: DecodePlan::query, whatever a prompt fits.
  virtual QueryForm query_form() const { return QueryForm::kExact; }
  virtual int levels() const { return 1; }  // how many values PlanQuery::level may take
  // layout() with the slots that plan({level}) reads: the first ones of each field. What is coded once can be cut to it
  // (codec/level.h). kUsage for a codec that has no levels.
  virtual CodeLayout level_layout(int level) const;

  // Decodes through plan(): one definition of what a code means. lower: as in decode_plan.
  void decode(const CodeBlock& block, MutMatrix x, const PlanQuery& query = {}, ConstMatrix lower = {}) const;

  // Model-side constants: what plan() needs, and encoder-only parameters where a codec has them; without the books in
  // `counted` (codecs of several units may share one), which its own join.
  virtual int64_t constant_bytes(CountedBooks& counted) const;
  int64_t constant_bytes() const;  // of this codec alone

  // Trained parameters as named arrays; configuration is stored by the caller.
  virtual void save(ParameterWriter& out) const = 0;
  virtual void load(const ParameterReader& in) = 0;

 protected:
  // A plan of this codec's channels, layout and placement, which adds nothing yet.
  DecodePlan empty_plan() const;
  // Of a codec whose one side of each token is its row.
  DecodePlan dense_plan() const;
};

// What every encode does first: the shape (kInternal) and that all values are finite (kBadData).
void check_encode_input(const Codec& codec, ConstMatrix x);
// `value` as `type` stores it, saturated at its largest finite number.
float round_side(DType type, float value);
// The same for a scale that something is divided by: at least the smallest normal number of the type.
float round_scale(DType type, float value);

// Named arrays of one codec: what an archive stores. Types: f32 tensors and small JSON facts.
class ParameterWriter {
 public:
  virtual ~ParameterWriter() = default;
  virtual void tensor(const std::string& name, const std::vector<int64_t>& shape, const float* data) = 0;
  virtual void facts(const std::string& name, const Json& value) = 0;
};
class ParameterReader {
 public:
  virtual ~ParameterReader() = default;
  // Throws kBadData when absent or of another shape (-1 in `shape` matches anything).
  virtual AlignedVector<float> tensor(const std::string& name, const std::vector<int64_t>& shape) const = 0;
  virtual std::vector<int64_t> shape(const std::string& name) const = 0;
  virtual Json facts(const std::string& name) const = 0;
};

// ---- Registry -------------------------------------------------------------------------------------------------------

// What a method needs to know of its unit before it is built.
struct UnitShape {
  Role role = Role::kKey;
  int head_dim = 0;
  int heads = 1;  // heads of the unit
  int layer = 0;  // in a sweep of some layers its place among them: see Method::in_layer
  int first_head = 0;
  RopePlacement rope = RopePlacement::kPost;  // as configured; a method that needs one placement refuses the other
  // The model's, of one head, in sweeps, in caches and behind a codec file alike: which channels rotate, at which
  // frequencies, by which factor. head_dim 0 where there is no model: all channels rotate.
  RopeFacts rope_facts = {};
  int channels() const { return head_dim * heads; }
  int rotary_dim() const { return rope_facts.head_dim == 0 ? head_dim : rope_facts.rotary_dim; }
  // Channels of pair p of the unit, p below channels() / 2: the pairs of RoPE first, in each head, then neighbours
  // among the channels that don't rotate. query_pair_moment and the grouping rope_pair count them like this.
  std::pair<int, int> pair(int p) const {
    const int half = rotary_dim() / 2, in_head = p % (head_dim / 2);
    const int head = p / (head_dim / 2) * head_dim;
    return in_head < half ? std::pair{head + in_head, head + in_head + half}
                          : std::pair{head + 2 * in_head, head + 2 * in_head + 1};
  }
};

// The one description of a method: `ls`, `explain`, README's table and the sweep columns read it.
struct MethodInfo {
  std::string name;
  std::string title;   // one line
  std::string paper;   // authors, venue, arXiv id
  std::string bibtex;  // key
  std::string family;  // table | levels | dense | sign
  // Bits a value of the coded body, overlay apart, in the knobs' names and the unit's: `bits * codebooks / head_dim`,
  // `bits + (mode == asymmetric ? 32 : 16) / group`. The conformance suite evaluates it and compares with the layout:
  // numbers, names, + - * / ( ) == < ? :, log2 ceil floor min max; channels, head_dim, heads, layer, role (k or v).
  std::string bits;
  std::string caveat;
  std::string assumed;  // what the source leaves open or could not be read, and what was taken; empty: nothing
  bool trained = true;  // false: learns nothing, and no data are read for it but what its needs() say
  int version = 1;      // raised when codes or training change; part of a cell's identity
  // The paper codes the tokens of images alone (`cache: {coded: image}`): a row whose cache codes text with it is
  // flagged off-label.
  bool images_alone = false;
  std::vector<std::string> rope = {"post", "pre"};
  // Name -> {codec: {...}, cache: {...}, note: "..."}, all optional: published configurations. `codec` holds what would
  // stand under `codec:` (knobs, rope, transform, k, v); `preset: NAME` in a configuration starts from it, and a
  // configuration without one starts from presets["default"] where there is one. `cache` is the method's own flush
  // rule, taken when a configuration names the preset and has no `cache:` section (preset_cache_config).
  Json presets;
};

class Method {
 public:
  virtual ~Method() = default;
  virtual MethodInfo describe() const = 0;
  // Knobs at their defaults, for explain and canonicalisation.
  virtual std::vector<Knob> knobs() const = 0;
  // Checks `knobs` (flat object) and completes it with defaults.
  virtual Json canonical(const Json& knobs, const std::string& path) const = 0;
  // Canonical knobs as they hold in one layer of the model: equal ones give equal codecs, and in_layer of them changes
  // nothing, whatever the layer. Units carry these, so that neither sharing nor a sweep of some layers, which numbers
  // its units anew, asks where a unit stands.
  virtual Json in_layer(const Json& knobs, int) const { return knobs; }
  // A reason why this method can't code this unit with these knobs ("sub-vectors of 3 channels don't divide 64"), or
  // "".
  virtual std::string check(const Json& knobs, const UnitShape& unit) const = 0;
  // What it learns from with these knobs.
  virtual TrainNeeds needs(const Json& knobs) const = 0;
  // What training on so many rows takes, roughly, for `plan --dry-run`; without a word of the method a copy of the
  // rows.
  virtual TrainMemory memory(const Json& knobs, const UnitShape& unit, int64_t rows) const;
  virtual std::unique_ptr<Codec> make(const Json& knobs, const UnitShape& unit) const = 0;
};

// By name: those of methods.inc in its order, then registered ones. find throws kUsage with `path`, where the name was
// written, and the nearest name.
const std::vector<const Method*>& all_methods();
const Method& find_method(const std::string& name, const std::string& path = "");
// Adds a method from outside this tree, for the life of the process; before anything looks methods up, from one thread
// (docs/extending.md). kUsage for a name that is taken, or that is not lower-case letters, digits and underscores after
// a letter.
void register_method(const Method& method);

// Of a knobs struct; `learns` is the `trained` of its description.
template <class Knobs>
TrainNeeds needs_of(const Knobs& knobs, bool learns) {
  TrainNeeds out{.rows = learns};
  if constexpr (requires { knobs.needs(); }) out |= knobs.needs();
  return out;
}

// A method file defines `struct XKnobs { ...; KnobTable table(); }`, its Codec, and ends with
//   VQKV_DEFINE_METHOD(x, XKnobs, XCodec, describe_x, check_x)
// where XCodec is constructible from (const XKnobs&, const UnitShape&) or, for a method that codes keys and values by
// different means, has `static std::unique_ptr<Codec> make(const XKnobs&, const UnitShape&)`, describe_x() gives
// MethodInfo and check_x(const XKnobs&, const UnitShape&) the reason or "". What it learns from beside the rows, XKnobs
// says in `TrainNeeds needs() const`; none where it has no such function. What that takes in memory, they say in
// `TrainMemory memory(const UnitShape&, int64_t rows) const` where it is more than a copy of the rows. Knobs that
// differ by layer have `void settle(int layer)` (Method::in_layer), which codec and check find done.
template <class Knobs, class CodecType>
class MethodOf final : public Method {
 public:
  using Describe = MethodInfo (*)();
  using Check = std::string (*)(const Knobs&, const UnitShape&);
  MethodOf(Describe describe_method, Check check_method) : describe_(describe_method), check_(check_method) {}
  MethodInfo describe() const override { return describe_(); }
  std::vector<Knob> knobs() const override { return default_knobs<Knobs>(); }
  Json canonical(const Json& knobs, const std::string& path) const override {
    Knobs k;
    KnobTable table = k.table();  // its getters point into k
    table.apply(knobs, path);
    return table.values();
  }
  Json in_layer(const Json& knobs, int layer) const override {
    if constexpr (kLayered)
      return parse(knobs, layer).table().values();
    else
      return knobs;
  }
  std::string check(const Json& knobs, const UnitShape& unit) const override {
    return check_(parse(knobs, unit.layer), unit);
  }
  TrainNeeds needs(const Json& knobs) const override { return needs_of(parse(knobs), describe_().trained); }
  TrainMemory memory(const Json& knobs, const UnitShape& unit, int64_t rows) const override {
    if constexpr (requires(const Knobs& k) { k.memory(unit, rows); })
      return parse(knobs, unit.layer).memory(unit, rows);
    else
      return Method::memory(knobs, unit, rows);
  }
  std::unique_ptr<Codec> make(const Json& knobs, const UnitShape& unit) const override {
    if constexpr (requires(const Knobs& k) { CodecType::make(k, unit); })
      return CodecType::make(parse(knobs, unit.layer), unit);
    else
      return std::make_unique<CodecType>(parse(knobs, unit.layer), unit);
  }

 private:
  static constexpr bool kLayered = requires(Knobs & k, int layer) { k.settle(layer); };
  static Knobs parse(const Json& values) {
    Knobs k;
    k.table().apply(values, "codec");
    return k;
  }
  static Knobs parse(const Json& values, int layer) {
    Knobs k = parse(values);
    if constexpr (kLayered) k.settle(layer);
    return k;
  }
  Describe describe_;
  Check check_;
};

#define VQKV_DEFINE_METHOD(name, KnobsType, CodecType, describe, check)          \
  const ::vqkv::Method& vqkv_method_##name() {                                   \
    static const ::vqkv::MethodOf<KnobsType, CodecType> method(describe, check); \
    return method;                                                               \
  }

}  // namespace vqkv
