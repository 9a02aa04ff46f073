// The self-contained HTML report of a store.
#pragma once
#include <string>

#include "experiment/result_set.h"

namespace vqkv {

// Inline SVG, no network. Figures: Pareto fronts, layer x head heat map, error against position, metric against metric
// with rank correlation; each with n, interval and plan hash. Numbers come from report documents.
void write_report(const ResultSet& results, const std::string& out_html);

}  // namespace vqkv
