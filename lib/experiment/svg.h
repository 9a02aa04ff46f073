// Figures of the report: inline SVG, deterministic bytes, no script.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace vqkv {

struct PlotPoint {
  double x = 0, y = 0;
  double error = 0;    // half-height of the error bar, in y
  std::string label;   // shown when pointed at
  bool muted = false;  // dominated
  std::string name;    // stands beside the point where there is room
};

struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points;
  bool line = false;  // joined, without markers
  bool dashed = false;
};

struct Plot {
  std::string title, caption, x_label, y_label;
  bool log_x = false, log_y = false;
  std::vector<PlotSeries> series;
};

// Points that a logarithmic axis can't show, and NaN, are left out; the caption says how many.
std::string render_plot(const Plot& plot);

struct HeatMap {
  std::string title, caption, row_label, column_label;
  int64_t rows = 0, columns = 0;
  std::vector<double> values;  // (rows, columns); NaN is drawn grey
  bool log = true;
};
std::string render_heat_map(const HeatMap& map);

std::string escape_html(const std::string& text);

}  // namespace vqkv
