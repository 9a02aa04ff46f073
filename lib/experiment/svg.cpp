#include "experiment/svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace vqkv {
namespace {

// Okabe and Ito's colours, told apart by most colour-blind readers, and a shape each.
constexpr std::array<const char*, 8> kColours{"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                              "#E69F00", "#56B4E9", "#7A5195", "#444444"};
constexpr const char* kFrontColour = "#888888";  // of dashed lines, which stand for no method
constexpr double kWidth = 640, kHeight = 400, kLeft = 74, kRight = 16, kTop = 18, kBottom = 52;

struct Axis {
  double low = 0, high = 1;
  bool log = false;
  double from = 0, to = 1;  // pixels

  double map(double v) const {
    const double t =
        log ? (std::log10(v) - std::log10(low)) / (std::log10(high) - std::log10(low)) : (v - low) / (high - low);
    return from + t * (to - from);
  }
  bool shows(double v) const { return std::isfinite(v) && (!log || v > 0); }
  std::vector<double> ticks() const {
    std::vector<double> out;
    if (log) {
      const int first = static_cast<int>(std::floor(std::log10(low))),
                last = static_cast<int>(std::ceil(std::log10(high)));
      const bool few = last - first <= 3;
      for (int e = first; e <= last; ++e)
        for (const double m : few ? std::vector<double>{1, 2, 5} : std::vector<double>{1}) {
          const double v = m * std::pow(10.0, e);
          if (v >= low * 0.999 && v <= high * 1.001) out.push_back(v);
        }
      return out;
    }
    const double rough = (high - low) / 6, power = std::pow(10.0, std::floor(std::log10(rough)));
    double step = power;
    for (const double m : {1.0, 2.0, 5.0, 10.0})
      if (m * power >= rough) {
        step = m * power;
        break;
      }
    for (double v = std::ceil(low / step) * step; v <= high + 1e-9 * step; v += step)
      out.push_back(std::fabs(v) < 1e-12 * step ? 0 : v);
    return out;
  }
};

Axis fit(const std::vector<double>& values, bool log, double from, double to) {
  Axis a;
  a.log = log;
  a.from = from;
  a.to = to;
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const double v : values)
    if (a.shows(v)) {
      low = std::min(low, v);
      high = std::max(high, v);
    }
  if (!(low <= high)) {
    a.low = log ? 0.1 : 0;
    a.high = 1;
    return a;
  }
  if (log) {
    a.low = low / 1.25;
    a.high = high * 1.25;
    if (a.high / a.low < 4) {
      a.low /= 1.6;
      a.high *= 1.6;
    }
  } else {
    const double pad = high > low ? 0.06 * (high - low) : std::max(0.5, 0.1 * std::fabs(high));
    a.low = low >= 0 && low - pad < 0 ? 0 : low - pad;
    a.high = high + pad;
  }
  return a;
}

std::string number(double v) {
  if (v != 0 && (std::fabs(v) < 1e-3 || std::fabs(v) >= 1e5)) return fmt::format("{:.0e}", v);
  return fmt::format("{:.4g}", v);
}

std::string marker(size_t series, double x, double y, const std::string& colour, const std::string& title, bool muted) {
  const std::string style = fmt::format("fill=\"{}\" fill-opacity=\"{}\" stroke=\"{}\" stroke-opacity=\"{}\"", colour,
                                        muted ? 0.12 : 0.85, colour, muted ? 0.35 : 1);
  const std::string body = "><title>" + title + "</title>";
  switch (series / kColours.size() % 2 == 0 ? series % 4 : (series + 1) % 4) {
    case 0:
      return fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4.2\" {}{}</circle>", x, y, style, body);
    case 1:
      return fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"7.6\" height=\"7.6\" {}{}</rect>", x - 3.8, y - 3.8,
                         style, body);
    case 2:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l4.9 8.4h-9.8z\" {}{}</path>", x, y - 5.4, style, body);
    default:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l5 5l-5 5l-5 -5z\" {}{}</path>", x, y - 5.0, style, body);
  }
}

struct Box {
  double left, right, top, bottom;
};
Box box_around(double x, double y, double width, double height) {
  return {x - width / 2, x + width / 2, y - height / 2, y + height / 2};
}

// The name right of a point and above it, or at another of its corners where it covers no marker and no other name; ""
// where there is none.
std::string name_beside(double x, double y, const std::string& name, std::vector<Box>& taken) {
  if (name.empty()) return "";
  const double width = 7 * static_cast<double>(name.size()), height = 9;
  for (const double down : {-9.0, 9.0})
    for (const double side : {1.0, -1.0}) {
      const Box box = box_around(x + side * (6 + width / 2), y + down, width, height);
      if (box.left < kLeft || box.right > kWidth - kRight || box.top < kTop || box.bottom > kHeight - kBottom) continue;
      if (std::any_of(taken.begin(), taken.end(), [&](const Box& b) {
            return b.left < box.right && box.left < b.right && b.top < box.bottom && box.top < b.bottom;
          }))
        continue;
      taken.push_back(box);
      return fmt::format("<text class=\"name\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n",
                         (box.left + box.right) / 2, box.bottom, escape_html(name));
    }
  return "";
}

std::string open_figure(const std::string& title, double width, double height) {
  return fmt::format(
      "<figure><figcaption class=\"title\">{}</figcaption><svg viewBox=\"0 0 {:.0f} {:.0f}\" width=\"{:.0f}\" "
      "role=\"img\" aria-label=\"{}\">\n",
      escape_html(title), width, height, width, escape_html(title));
}

std::string close_figure(const std::string& caption) {
  return "</svg><figcaption>" + escape_html(caption) + "</figcaption></figure>\n";
}

}  // namespace

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string render_plot(const Plot& plot) {
  std::vector<double> xs, ys;
  for (const auto& s : plot.series)
    for (const auto& p : s.points) {
      xs.push_back(p.x);
      ys.push_back(p.y);
      if (p.error > 0) {
        ys.push_back(p.y + p.error);
        if (!plot.log_y) ys.push_back(p.y - p.error);
      }
    }
  const Axis x = fit(xs, plot.log_x, kLeft, kWidth - kRight), y = fit(ys, plot.log_y, kHeight - kBottom, kTop);
  // The legend stands below the axes, where it covers no point; some 6.4 pixels a character.
  constexpr double kEntry = 40, kCharacter = 6.4, kLine = 17;
  std::vector<std::pair<double, double>> places;
  double lx = kLeft, ly = kHeight + 9;
  for (const auto& series : plot.series) {
    const double width = kEntry + kCharacter * static_cast<double>(series.name.size());
    if (lx > kLeft && lx + width > kWidth) {
      lx = kLeft;
      ly += kLine;
    }
    places.emplace_back(lx, ly);
    if (!series.name.empty()) lx += width;
  }
  std::string out = open_figure(plot.title, kWidth, ly + 10);
  for (const double t : x.ticks())
    out += fmt::format(
        "<path class=\"grid\" d=\"M{0:.1f} {1}V{2}\"/><text x=\"{0:.1f}\" y=\"{3}\" "
        "text-anchor=\"middle\">{4}</text>\n",
        x.map(t), kTop, kHeight - kBottom, kHeight - kBottom + 16, number(t));
  for (const double t : y.ticks())
    out += fmt::format(
        "<path class=\"grid\" d=\"M{1} {0:.1f}H{2}\"/><text x=\"{3}\" y=\"{4:.1f}\" text-anchor=\"end\">{5}</text>\n",
        y.map(t), kLeft, kWidth - kRight, kLeft - 6, y.map(t) + 4, number(t));
  out += fmt::format("<rect class=\"frame\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>\n", kLeft, kTop,
                     kWidth - kRight - kLeft, kHeight - kBottom - kTop);
  out += fmt::format("<text class=\"label\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                     (kLeft + kWidth - kRight) / 2, kHeight - 12, escape_html(plot.x_label));
  out +=
      fmt::format("<text class=\"label\" transform=\"translate(16 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
                  (kTop + kHeight - kBottom) / 2, escape_html(plot.y_label));

  int64_t left_out = 0;
  std::vector<Box> taken;
  for (const auto& s : plot.series)
    for (const auto& p : s.points)
      if (!s.line && x.shows(p.x) && y.shows(p.y)) taken.push_back(box_around(x.map(p.x), y.map(p.y), 8, 8));
  for (size_t s = 0; s < plot.series.size(); ++s) {
    const auto& series = plot.series[s];
    const std::string colour = series.dashed ? kFrontColour : kColours[s % kColours.size()];
    std::string path;
    for (const auto& p : series.points) {
      if (!x.shows(p.x) || !y.shows(p.y)) {
        ++left_out;
        continue;
      }
      const double px = x.map(p.x), py = y.map(p.y);
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", px, py);
      if (series.line) continue;
      out += name_beside(px, py, p.name, taken);
      if (p.error > 0) {
        const double low = plot.log_y ? std::max(p.y - p.error, y.low) : p.y - p.error;
        out += fmt::format("<path d=\"M{0:.1f} {1:.1f}V{2:.1f}\" stroke=\"{3}\" stroke-opacity=\"{4}\"/>\n", px,
                           y.map(low), y.map(p.y + p.error), colour, p.muted ? 0.2 : 0.7);
      }
      out += marker(s, px, py, colour, escape_html(p.label), p.muted) + "\n";
    }
    const char* dashes = series.dashed ? " stroke-dasharray=\"5 4\"" : "";
    if (series.line && !path.empty())
      out += fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\"{}/>\n", path, colour, dashes);
    if (series.name.empty()) continue;
    const auto [left, base] = places[s];
    out += series.line ? fmt::format("<path d=\"M{:.1f} {:.1f}h16\" stroke=\"{}\" stroke-width=\"2\"{}/>", left,
                                     base - 4, colour, dashes)
                       : marker(s, left + 8, base - 4, colour, "", false);
    out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", left + 21, base, escape_html(series.name));
  }
  std::string caption = plot.caption;
  if (left_out > 0) caption += fmt::format(" {} points could not be drawn on these axes.", left_out);
  return out + close_figure(caption);
}

std::string render_heat_map(const HeatMap& m) {
  const double cell_h = std::clamp(300.0 / static_cast<double>(std::max<int64_t>(1, m.rows)), 9.0, 22.0),
               cell_w = std::clamp(420.0 / static_cast<double>(std::max<int64_t>(1, m.columns)), 12.0, 60.0);
  const double left = 62, top = 26, width = left + cell_w * static_cast<double>(m.columns) + 96,
               height = top + cell_h * static_cast<double>(m.rows) + 34;
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const double v : m.values)
    if (std::isfinite(v) && (!m.log || v > 0)) {
      low = std::min(low, v);
      high = std::max(high, v);
    }
  const bool any = low <= high;
  const auto shade = [&](double v) {
    if (!any || !std::isfinite(v) || (m.log && v <= 0)) return std::string("#eee");
    const double t = high > low ? (m.log ? std::log(v / low) / std::log(high / low) : (v - low) / (high - low)) : 0.5;
    // White through orange to dark red: light is good.
    const double r = 255 - 127 * std::max(0.0, 2 * t - 1), g = 250 - 190 * t, b = 240 - 225 * std::min(1.0, 1.4 * t);
    return fmt::format("#{:02x}{:02x}{:02x}", static_cast<int>(r), static_cast<int>(g), static_cast<int>(b));
  };
  std::string out = open_figure(m.title, width, height);
  int64_t every = 1;  // row labels a line of text apart
  while (cell_h * static_cast<double>(every) < 12) every += every == 1 ? 1 : every == 2 ? 3 : 5;
  for (int64_t r = 0; r < m.rows; ++r) {
    if (r % every == 0)
      out += fmt::format("<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>", left - 6,
                         top + cell_h * (static_cast<double>(r) + 0.5) + 4, r);
    for (int64_t c = 0; c < m.columns; ++c) {
      const double v = m.values[static_cast<size_t>(r * m.columns + c)];
      out += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"{}\"><title>{} {}, {} {}: "
          "{}</title></rect>\n",
          left + cell_w * static_cast<double>(c), top + cell_h * static_cast<double>(r), cell_w - 1, cell_h - 1,
          shade(v), escape_html(m.row_label), r, escape_html(m.column_label), c,
          std::isfinite(v) ? number(v) : "not measured");
    }
  }
  for (int64_t c = 0; c < m.columns; ++c)
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                       left + cell_w * (static_cast<double>(c) + 0.5), top - 6, c);
  out += fmt::format("<text class=\"label\" x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>",
                     left + cell_w * static_cast<double>(m.columns) / 2, height - 8, escape_html(m.column_label));
  out += fmt::format(
      "<text class=\"label\" transform=\"translate(14 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
      top + cell_h * static_cast<double>(m.rows) / 2, escape_html(m.row_label));
  if (any)
    for (int i = 0; i <= 4; ++i) {
      const double t = i / 4.0, v = m.log ? low * std::pow(high / low, t) : low + t * (high - low);
      const double x = left + cell_w * static_cast<double>(m.columns) + 14, y = top + 20 * i;
      out += fmt::format(
          "<rect x=\"{0:.1f}\" y=\"{1:.1f}\" width=\"16\" height=\"19\" fill=\"{2}\"/><text x=\"{3:.1f}\" "
          "y=\"{4:.1f}\">{5}</text>\n",
          x, y, shade(v), x + 21, y + 14, fmt::format("{:.2g}", v));
    }
  return out + close_figure(m.caption);
}

}  // namespace vqkv
