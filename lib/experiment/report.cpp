#include "experiment/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "config/config.h"
#include "core/clock.h"
#include "core/error.h"
#include "experiment/cell_label.h"
#include "experiment/protocol.h"
#include "experiment/svg.h"
#include "io/atomic_file.h"
#include "metric/measurement.h"
#include "metric/statistics.h"

namespace vqkv {
namespace {

constexpr const char* kReport = "report";  // the documents whose numbers are shown
constexpr const char* kRankBy = "attention.softmax_kl";

constexpr const char* kStyle = R"(
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;max-width:1360px;margin:2em auto;padding:0 1.5em;color:#1b1b1b;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:2px 9px;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{background:#f6f6f6}td:first-child,th:first-child,td.text{text-align:left}
td.codec{white-space:normal;min-width:19em}td.codec,th.codec{text-align:left}tr.front td{background:#eef6ff}tr.warn td{color:#8a4b00}
.figures+.figures{margin-top:22px}.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,540px),1fr));gap:22px;align-items:start}
figure{margin:0;max-width:640px}figcaption{font-size:12.5px;color:#555}figcaption.title{font-weight:600;color:#1b1b1b;font-size:14px}
svg{background:#fff;max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#333}svg text.label{font-size:12.5px;font-weight:600}
svg text.name{font-size:11px;font-weight:600;fill:#111}svg .grid{stroke:#e8e8e8;fill:none}svg .frame{stroke:#999;fill:none}
.note{color:#555;font-size:13px}.scroll{overflow-x:auto}code{background:#f3f3f3;padding:0 3px;overflow-wrap:anywhere}
)";

// A cell that ran, with what every figure asks of it.
struct Point {
  const CellResult* cell = nullptr;
  std::string method, label, protocol;
  size_t number = 0;  // its row in the table of cells, counted from 1; figures call it by that
  double bits = 0, kl = 0, kl_error = 0;
  bool front = false;
  bool alone = false;  // a window with nothing behind it

  std::string numbered(const std::string& text) const { return fmt::format("{}: {}", number, text); }
};

// The front of least KL at bits no greater: ascending bits, strictly falling KL.
void mark_front(std::vector<Point>& points) {
  std::vector<Point*> order;
  for (auto& p : points)
    if (std::isfinite(p.bits) && std::isfinite(p.kl)) order.push_back(&p);
  std::stable_sort(order.begin(), order.end(), [](const Point* a, const Point* b) {
    return a->bits != b->bits ? a->bits < b->bits : a->kl < b->kl;
  });
  double best = std::numeric_limits<double>::infinity();
  for (Point* p : order)
    if (p->kl < best) {
      best = p->kl;
      p->front = true;
    }
}

std::string cell_text(double v, const char* format) {
  return std::isfinite(v) ? fmt::format(fmt::runtime(format), v) : std::string("–");
}

// NaN where one document gives none.
double error_of(const CellResult& c, const std::string& tag) {
  const Json* m = c.find(kReport, tag);
  return m && m->value("n", int64_t{0}) > 1 && m->contains("stderr") && (*m)["stderr"].is_number()
             ? (*m)["stderr"].get<double>()
             : std::nan("");
}

// What ran, as the record names it: "encode cpu avx2, decode reference, attend reference".
std::string arithmetic_of(const CellResult& c) {
  std::string out;
  const Json path = c.record.value("path", Json::object());
  for (const auto& [step, name] : path.items())
    out += fmt::format("{}{} {}", out.empty() ? "" : ", ", step, written(name));
  return out;
}

// Whether the rows of codecs stand on equal ground.
std::string ground_of(const std::vector<Point>& points) {
  std::set<std::string> protocols;
  for (const Point& p : points)
    if (!p.alone) protocols.insert(p.protocol);
  if (protocols.empty() || (protocols.size() == 1 && protocols.begin()->empty())) return "";
  if (protocols.size() == 1)
    return fmt::format("Exact beside the codes, in every row: {}. ", escape_html(*protocols.begin()));
  return fmt::format(
      "The rows stand under {} protocols (column protocol: what is exact beside the codes); codecs compare only within "
      "one. ",
      protocols.size());
}

int64_t documents_of(const CellResult& c) {
  const Json* m = c.find(kReport, kRankBy);
  return m ? m->value("n", int64_t{0}) : 0;
}

// "softmax KL, nats": the axis of what is measured under `tag`.
std::string axis_of(const std::vector<Point>& points, const std::string& tag) {
  for (const Point& p : points)
    if (const Json* m = p.cell->find(kReport, tag)) {
      const Measurement head = measurement_head_from_json(*m);
      return head.heading() + (head.unit == "1" ? "" : ", " + head.unit);
    }
  return tag;
}

// What the rows measured in `role`, in the order met; the measure that ranks the rows stands first.
std::vector<MeasureColumn> columns_of(const std::vector<Point>& points, const std::string& role) {
  std::vector<MeasureColumn> out;
  for (const Point& p : points)
    for (const Json& m : p.cell->record.at("measurements"))
      if (m.value("role", "") == role) add_column(out, measurement_head_from_json(m));
  std::stable_partition(out.begin(), out.end(), [](const MeasureColumn& c) { return c.tag == kRankBy; });
  return out;
}

Plot pareto(const std::vector<Point>& points, const std::string& tag, const std::string& title, int64_t context,
            int64_t sequences, const std::string& note) {
  Plot plot;
  plot.title = title;
  plot.x_label = sequences == 0 ? fmt::format("bits per value, resident per sequence at {} tokens", context)
                                : fmt::format("bits per value at {} tokens, books shared by {} sequence{}", context,
                                              sequences, sequences == 1 ? "" : "s");
  plot.y_label = axis_of(points, tag);
  plot.log_y = true;
  std::vector<std::pair<double, double>> all;
  std::map<std::string, PlotSeries> by_method;
  std::vector<Point> own = points;
  for (auto& p : own) {
    p.front = false;
    p.bits = p.cell->value("cost", "bits_per_value", context, sequences);
    p.kl = p.cell->value(kReport, tag);
    p.kl_error = error_of(*p.cell, tag);
  }
  mark_front(own);
  PlotSeries front{"front", {}, true, true};
  std::vector<const Point*> order;
  for (const auto& p : own) {
    auto& s = by_method[p.method];
    s.name = p.method;
    s.points.push_back({p.bits, p.kl, p.kl_error,
                        fmt::format("{}\n{:.3f} bits/value, {:.5g} ± {}", p.numbered(p.label), p.bits, p.kl,
                                    cell_text(p.kl_error, "{:.2g}")),
                        !p.front, p.front ? std::to_string(p.number) : ""});
    if (p.front) order.push_back(&p);
  }
  std::sort(order.begin(), order.end(), [](const Point* a, const Point* b) { return a->bits < b->bits; });
  for (const Point* p : order) front.points.push_back({p->bits, p->kl, 0, "", false, ""});
  for (auto& [name, s] : by_method) plot.series.push_back(std::move(s));
  plot.series.push_back(std::move(front));
  plot.caption = note;
  return plot;
}

std::string scatter(const std::vector<Point>& points, const std::string& x_tag, const std::string& y_tag,
                    const std::string& note) {
  Plot plot;
  plot.title = fmt::format("{} against {}", y_tag, x_tag);
  plot.x_label = axis_of(points, x_tag);
  plot.y_label = axis_of(points, y_tag);
  plot.log_x = plot.log_y = true;
  std::map<std::string, PlotSeries> by_method;
  std::vector<double> xs, ys;
  for (const auto& p : points) {
    const double x = p.cell->value(kReport, x_tag), y = p.cell->value(kReport, y_tag);
    if (!std::isfinite(x) || !std::isfinite(y)) continue;
    xs.push_back(x);
    ys.push_back(y);
    auto& s = by_method[p.method];
    s.name = p.method;
    s.points.push_back({x, y, error_of(*p.cell, y_tag), p.numbered(p.label), false, std::to_string(p.number)});
  }
  if (xs.size() < 3) return "";
  for (auto& [name, s] : by_method) plot.series.push_back(std::move(s));
  plot.caption = fmt::format("Spearman rank correlation {:.3f} over {} cells. {}", spearman(xs, ys), xs.size(), note);
  return render_plot(plot);
}

const Json* detail_of(const CellResult& c, const std::string& tag, const std::string& axis) {
  const Json* m = c.find(kReport, tag);
  if (!m || !m->contains("details")) return nullptr;
  for (const auto& d : (*m)["details"])
    if (d.value("axis", "") == axis) return &d;
  return nullptr;
}

std::vector<double> numbers_of(const Json& values) {
  std::vector<double> out;
  for (const auto& v : values) out.push_back(v.is_number() ? v.get<double>() : std::nan(""));
  return out;
}

std::string heat_map(const Point& p, const std::string& tag, const std::string& plan) {
  const Json* d = detail_of(*p.cell, tag, "layer,kv_head");
  if (!d || d->at("shape").size() != 2) return "";
  HeatMap m;
  m.title = p.numbered(p.label);
  m.caption = fmt::format("{} by layer and KV head: n = {} report documents; {:.3f} bits/value; plan {}.", tag,
                          documents_of(*p.cell), p.bits, plan.substr(0, 12));
  m.row_label = "layer";
  m.column_label = "KV head";
  m.rows = d->at("shape")[0].get<int64_t>();
  m.columns = d->at("shape")[1].get<int64_t>();
  m.values = numbers_of(d->at("values"));
  if (m.rows * m.columns != static_cast<int64_t>(m.values.size()) || m.values.empty()) return "";
  return render_heat_map(m);
}

// Error against position in 64-token means.
std::string position_plot(const std::vector<const Point*>& points, const std::string& tag, const std::string& note) {
  constexpr size_t kBucket = 64;
  Plot plot;
  plot.title = fmt::format("{} against position", tag);
  plot.x_label = "token position in the window";
  plot.y_label = tag;
  plot.caption =
      fmt::format("Means of {} tokens over layers, heads and windows; the coded tokens only. {}", kBucket, note);
  for (const Point* p : points) {
    const Json* d = detail_of(*p->cell, tag, "position");
    if (!d) continue;
    const auto values = numbers_of(d->at("values"));
    PlotSeries s{p->numbered(p->method), {}, true, false};
    for (size_t at = 0; at < values.size(); at += kBucket) {
      double sum = 0, count = 0;
      for (size_t i = at; i < std::min(values.size(), at + kBucket); ++i)
        if (std::isfinite(values[i])) sum += values[i], count += 1;
      if (count > 0) s.points.push_back({static_cast<double>(at) + 0.5 * kBucket, sum / count, 0, "", false, ""});
    }
    if (!s.points.empty()) plot.series.push_back(std::move(s));
  }
  return plot.series.empty() ? "" : render_plot(plot);
}

std::string table_of(const std::vector<Point>& points, const std::vector<int64_t>& contexts,
                     const std::vector<int64_t>& sequences) {
  const auto measured = columns_of(points, kReport), timed = columns_of(points, "time");
  std::string out = "<div class=\"scroll\"><table><tr><th>#</th><th class=\"codec\">codec</th>";
  const auto heading = [&](const MeasureColumn& c) {
    out += fmt::format("<th title=\"{}\">{}{}</th>", escape_html(c.tag), escape_html(c.title),
                       c.error ? "<br>± standard error" : "");
  };
  for (const MeasureColumn& c : measured) heading(c);
  for (const int64_t c : contexts) {
    out += fmt::format("<th>bits/value<br>resident, {}</th>", c);
    for (const int64_t s : sequences) out += fmt::format("<th>with books<br>{} seq, {}</th>", s, c);
  }
  for (const MeasureColumn& c : timed) heading(c);
  out +=
      "<th class=\"codec\">protocol</th><th class=\"codec\">arithmetic</th><th "
      "class=\"codec\">flags</th><th>cell</th></tr>\n";
  for (const auto& p : points) {
    std::string flags;
    if (p.cell->record.contains("flags"))
      for (const auto& f : p.cell->record["flags"]) flags += (flags.empty() ? "" : ", ") + written(f);
    out += fmt::format("<tr class=\"{}\"><td>{}</td><td class=\"codec\">{}</td>",
                       p.front         ? "front"
                       : flags.empty() ? ""
                                       : "warn",
                       p.number, escape_html(p.label));
    for (const MeasureColumn& c : measured)
      out += fmt::format("<td>{}{}</td>", measure_text(p.cell->value(kReport, c.tag), c.digits),
                         c.error ? " ± " + measure_text(error_of(*p.cell, c.tag), 2) : "");
    const auto bits = [&](int64_t context, int64_t shared) {
      out += "<td>" + cell_text(p.cell->value("cost", "bits_per_value", context, shared), "{:.3f}") + "</td>";
    };
    for (const int64_t c : contexts) {
      bits(c, 0);
      for (const int64_t s : sequences) bits(c, s);
    }
    for (const MeasureColumn& c : timed) out += "<td>" + measure_text(p.cell->value("time", c.tag), c.digits) + "</td>";
    for (const std::string& text : {p.protocol, arithmetic_of(*p.cell), flags})
      out += fmt::format("<td class=\"text\">{}</td>", escape_html(text));
    out += fmt::format("<td class=\"text\"><code>{}</code></td></tr>\n", escape_html(p.cell->id()));
  }
  return out + "</table></div>\n";
}

std::string names_of(const Json& documents, const Json& ids) {
  std::string out;
  for (const Json& id : ids)
    for (const Json& d : documents)
      if (d.at("id") == id) out += (out.empty() ? "" : ", ") + d.at("name").get<std::string>();
  return out;
}

// One trace in words; its documents by role where all cells agree on them.
std::string trace_text(const Json& t, const std::vector<CellResult>& cells) {
  std::string out = fmt::format(
      "Trace <code>{}</code>: {}, {} layers, {} query and {} KV heads of {}; {} tokens, {} recorded queries. Content "
      "<code>{}</code>, model <code>{}</code>.",
      escape_html(t.value("path", "?")), escape_html(t.value("model_name", "?")), t.value("layers", 0),
      t.value("q_heads", 0), t.value("kv_heads", 0), t.value("head_dim", 0), t.value("tokens", 0),
      t.value("queries", 0), escape_html(t.value("content_hash", "?")),
      escape_html(t.value("model_hash", "?").substr(0, 16)));
  const Json documents = t.value("documents", Json::array());
  std::string roles;
  for (const auto& [role, words] :
       {std::pair{"train", "trained on"}, {"select", "chosen on"}, {kReport, "reported on"}}) {
    std::set<std::string> lists;
    for (const CellResult& c : cells)
      if (const Json* ids = find_path(c.cell.at("config"), std::string("trace.") + role))
        lists.insert(names_of(documents, *ids));
    if (lists.empty() || *lists.rbegin() == "") continue;
    roles += fmt::format("{}{} {}", roles.empty() ? " Documents: " : "; ", words,
                         lists.size() == 1 ? escape_html(*lists.begin()) : "several lists, by cell");
  }
  return out + (roles.empty() ? "" : roles + ".");
}

}  // namespace

void write_report(const ResultSet& results, const std::string& out_html) {
  std::vector<Point> points;
  std::set<int64_t> context_set, sequence_set;
  for (const auto& c : results.cells) {
    if (c.status() != "ok") continue;
    const Json& config = c.cell.at("config");
    for (const auto& v : config.value("contexts", Json::array())) context_set.insert(v.get<int64_t>());
    for (const auto& v : config.value("sequences", Json::array())) sequence_set.insert(v.get<int64_t>());
    Point p;
    p.cell = &c;
    p.method = codec_names(config);
    p.label = cell_label(c.cell);
    p.protocol = protocol_of_cell(config);
    p.alone = find_path(config, "cache.policy.name") && *find_path(config, "cache.policy.name") == "streaming";
    points.push_back(std::move(p));
  }
  const std::vector<int64_t> contexts(context_set.begin(), context_set.end()),
      sequences(sequence_set.begin(), sequence_set.end());
  const int64_t longest = contexts.empty() ? 0 : contexts.back();
  for (auto& p : points) {
    p.bits = p.cell->value("cost", "bits_per_value", longest, 0);
    p.kl = p.cell->value(kReport, kRankBy);
    p.kl_error = error_of(*p.cell, kRankBy);
  }
  mark_front(points);
  std::stable_sort(points.begin(), points.end(), [](const Point& a, const Point& b) {
    return std::isfinite(a.bits) && (!std::isfinite(b.bits) || a.bits < b.bits);
  });
  for (size_t i = 0; i < points.size(); ++i) points[i].number = i + 1;

  const std::string plan = results.plan.value("plan", std::string("?"));
  int64_t n = 0;  // a window alone has no number of codes
  for (const Point& p : points) n = std::max(n, documents_of(*p.cell));
  const std::string counted =
      fmt::format("n = {} report document{}; plan {}.", n, n == 1 ? "" : "s", plan.substr(0, 12));
  const std::string note =
      counted + (n == 1 ? " One document gives no standard error." : " Bars are standard errors over the documents.") +
      " Numbers are rows of the table.";
  std::string html = "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>vqkv sweep " +
                     escape_html(plan.substr(0, 12)) + "</title><style>" + kStyle +
                     "</style></head><body>\n<h1>KV-cache codecs: a sweep</h1>\n";
  html += fmt::format(
      "<p class=\"note\">Plan <code>{}</code>: {} cells, {} ok, {} failed, {} skipped, {} pending. Written {}. "
      "Trained, chosen and reported on "
      "different documents; the numbers below are of the report documents. Attention is the default ranking: "
      "reconstruction error alone can rank codecs the wrong way round.</p>\n",
      escape_html(plan), results.cells.size(), results.count("ok"), results.count("failed"), results.count("skipped"),
      results.count("pending"), utc_now());
  for (const auto& t : results.plan.value("traces", Json::array()))
    html += "<p class=\"note\">" + trace_text(t, results.cells) + "</p>\n";
  for (const auto& problem : results.problems) html += "<p class=\"note\">Note: " + escape_html(problem) + "</p>\n";

  if (points.empty()) {
    html += "<p>No cell has finished yet.</p>";
  } else {
    html += "<h2>Bits against attention</h2><div class=\"figures\">\n";
    html += render_plot(
        pareto(points, kRankBy, "Softmax KL against resident bits", longest, 0, note + " Dominated cells are pale."));
    html += render_plot(pareto(points, "output.relative_error_after_wo", "Attention output error against resident bits",
                               longest, 0, note));
    for (const int64_t s : sequences)
      html += render_plot(pareto(points, kRankBy, fmt::format("With codebooks, {} sequence{}", s, s == 1 ? "" : "s"),
                                 longest, s, note));
    html += "</div>\n<h2>Cells</h2>\n<p class=\"note\">" + ground_of(points) +
            "In the order of bits; the front of softmax KL is tinted.</p>\n" + table_of(points, contexts, sequences);

    html += "<h2>Which cheap metric can be trusted?</h2><div class=\"figures\">\n";
    for (const auto& [x, y] :
         std::initializer_list<std::pair<const char*, const char*>>{{"key.nmse", kRankBy},
                                                                    {"key.unexplained_variance", kRankBy},
                                                                    {"logit.centred_rms", kRankBy},
                                                                    {"value.nmse", "output.relative_error_v_only"},
                                                                    {kRankBy, "output.relative_error_after_wo"}})
      html += scatter(points, x, y, note);
    html += "</div>\n";

    std::vector<const Point*> front;
    for (const auto& p : points)
      if (p.front) front.push_back(&p);
    std::sort(front.begin(), front.end(), [](const Point* a, const Point* b) { return a->bits < b->bits; });
    if (front.size() > 6) {  // the ends and four between
      std::vector<const Point*> some;
      for (size_t i = 0; i < 6; ++i) some.push_back(front[i * (front.size() - 1) / 5]);
      front = some;
    }
    html += "<h2>Where the error sits</h2><div class=\"figures\">\n";
    for (const Point* p : front) html += heat_map(*p, kRankBy, plan);
    html += "</div><div class=\"figures\">\n";
    std::set<std::string> by_position;
    for (const Point* p : front)
      for (const Json& m : p->cell->record.at("measurements"))
        if (const auto tag = m.value("tag", std::string()); detail_of(*p->cell, tag, "position"))
          by_position.insert(tag);
    for (const std::string& tag : by_position) html += position_plot(front, tag, counted);
    html += "</div>\n";
  }

  std::string others;
  for (const auto& c : results.cells)
    if (c.status() == "failed" || c.status() == "skipped")
      others += fmt::format("<tr><td>{}</td><td class=\"text\">{}</td><td class=\"text\">{}</td></tr>\n",
                            escape_html(cell_label(c.cell)), c.status(), escape_html(c.reason()));
  if (!others.empty())
    html +=
        "<h2>Cells that gave no number</h2><div "
        "class=\"scroll\"><table><tr><th>codec</th><th>status</th><th>reason</th></tr>\n" +
        others + "</table></div>\n";
  html += "</body></html>\n";
  write_file(out_html, html);
}

}  // namespace vqkv
