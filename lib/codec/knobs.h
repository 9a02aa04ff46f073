// Knobs: the parameters of a method, transform or policy, as data. One table drives YAML checking, `explain`, sweep
// axes and the canonical configuration.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/json_fwd.h"

namespace vqkv {

struct Knob {
  std::string name;
  std::string help;                      // one sentence with the unit
  std::string type;                      // "int" | "float" | "bool" | "choice" | "text"
  std::string range;                     // as shown by `explain`: "1..16", "greedy|beam"
  std::function<Json()> get;             // current value
  std::function<void(const Json&)> set;  // checks type and range; throws kUsage saying what is allowed
  bool effort = false;                   // how long training runs: what a training curve halves and doubles
};

// Built by a knobs struct over its own members:
//   KnobTable table() { return KnobTable().integer("bits", &bits, 1, 16, "bits of a code").choice(...); }
class KnobTable {
 public:
  KnobTable& integer(std::string name, int* value, int low, int high, std::string help);
  KnobTable& real(std::string name, double* value, double low, double high, std::string help);
  KnobTable& boolean(std::string name, bool* value, std::string help);
  KnobTable& choice(std::string name, std::string* value, std::vector<std::string> allowed, std::string help);

  // Marks the knob before it, an integer, as training effort.
  KnobTable& effort();

  // Sets every key of `values` (a flat object); an unknown key is an error with the nearest name. `path` prefixes
  // messages.
  void apply(const Json& values, const std::string& path);
  // All knobs with their current values: the canonical form.
  Json values() const;
  const std::vector<Knob>& knobs() const { return knobs_; }

 private:
  std::vector<Knob> knobs_;
};

// The knobs of a default-constructed Knobs, which lives as long as their getters may read it.
template <class Knobs>
std::vector<Knob> default_knobs() {
  static Knobs defaults;
  return defaults.table().knobs();
}

}  // namespace vqkv
