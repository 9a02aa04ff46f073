// Trains every codec of a plan. Where the data come from is the caller's: traces, or rows made up by a test.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "codec/codec_set.h"

namespace vqkv {

// What one unit learns from, owned; set() is the view that a codec takes. Fields as in TrainSet.
struct TrainData {
  Matrix<float> x, queries, query_moment, output_weight, other_role, squared_gradient, lower;
  std::vector<int32_t> position, document;
  std::vector<float> weight, received_mass, received_mass2, query_pair_moment;

  TrainSet set(const UnitShape& unit) const;
};

class TrainSource {
 public:
  virtual ~TrainSource() = default;
  // Rows of the train documents in order, keys in unit.rope's domain; nothing that is not needed. Called from several
  // threads at once, once a unit (and for its rows by a unit that sees them from above), and not at all for a unit that
  // learns nothing. Rows of the layer below come from there: TrainNeeds::lower is not the source's business.
  virtual TrainData unit(const UnitShape& unit, const TrainNeeds& needs) const = 0;
  // Where the unit stands in the model, for messages: "layer 3, role k, heads 0..1".
  virtual std::string place(const UnitShape& unit) const;
};

struct TrainOptions {
  std::string cell;  // names the random streams, with layer, head and role: the same cell gives the same codecs
  std::string model_hash;
  // After each trained codec, from one thread at a time. May throw to stop: what has begun is finished and dropped.
  std::function<void(int64_t done, int64_t total)> progress;
};

// What the unit's method and its transforms learn from, together.
TrainNeeds needs_of(const UnitSpec& spec);

// What training the unit on so many rows takes, its transforms included: roughly, and nothing where it learns nothing.
TrainMemory memory_of(const UnitSpec& spec, int64_t rows);

// Units that end in one codec, as indices of plan.units, in the order of training.
std::vector<std::vector<size_t>> units_by_codec(const CodecPlan& plan);
// Of units that share, together: 256 MiB of keys at head_dim 64.
inline constexpr int64_t kPooledRows = int64_t{1} << 20;

// One codec a unit; units that share (`share: heads` within a layer, `layers` over all of them) and agree in everything
// else get one codec trained on all their rows, thinned evenly to kPooledRows. Bit-identical at any thread count.
// Throws kUsage with plan.skip where it is set.
std::shared_ptr<const CodecSet> train_codec_set(const CodecPlan& plan, const CacheShape& shape,
                                                const TrainSource& source, const TrainOptions& options);

}  // namespace vqkv
