#include "codec/linear_map.h"

#include <algorithm>
#include <bit>

#include "core/error.h"
#include "core/index.h"
#include "core/row_products.h"

namespace vqkv {
namespace {

double factor_at(const std::vector<float>& factor, int i) { return factor.empty() ? 1.0 : double{factor[at(i)]}; }
bool all_signs(const std::vector<float>& factor) {
  return std::all_of(factor.begin(), factor.end(), [](float f) { return f == 1.0f || f == -1.0f; });
}

// A block in double, with its place.
struct Part {
  int row = 0, rows = 0, col = 0, cols = 0;
  std::vector<double> values;
};

// Runs of channels, as short as they can be, that the map does not mix with others. Columns that nothing comes to have
// no rows.
std::vector<Part> parts_of(const LinearMap& map, int rows, int cols) {
  std::vector<std::pair<int, int>> ends;  // (row, col) behind each part
  const auto each_channel = [&] {
    for (int i = 1; i <= cols; ++i) ends.emplace_back(i, i);
  };
  std::visit(Overloaded{[&](const IdentityMap&) { each_channel(); }, [&](const DiagonalMap&) { each_channel(); },
                        [&](const GatherMap& m) {
                          std::vector<int> least(at(cols) + 1, rows);  // row that columns from here on begin with
                          for (int j = cols; j-- > 0;)
                            least[at(j)] =
                                m.from[at(j)] < 0 ? least[at(j) + 1] : std::min(least[at(j) + 1], int{m.from[at(j)]});
                          int next = 0;
                          for (int j = 0; j + 1 < cols; ++j) {
                            next = std::max(next, m.from[at(j)] + 1);
                            if (next <= least[at(j) + 1]) ends.emplace_back(next, j + 1);
                          }
                          ends.emplace_back(rows, cols);
                        },
                        [&](const BlockMap& m) {
                          int row = 0, col = 0;
                          for (const BlockMap::Block& b : m.blocks) ends.emplace_back(row += b.rows, col += b.cols);
                        },
                        [&](const HadamardMap& m) {
                          for (int i = m.block; i <= cols; i += m.block) ends.emplace_back(i, i);
                        },
                        [&](const DenseMap&) { ends.emplace_back(rows, cols); }},
             map);
  std::vector<Part> parts;
  std::vector<double> unit(at(rows), 0.0), line(at(cols));
  int row = 0, col = 0;
  for (const auto& [row_end, col_end] : ends) {
    Part p{row, row_end - row, col, col_end - col, {}};
    for (int i = row; i < row_end; ++i) {
      std::fill(line.begin(), line.end(), 0.0);
      unit[at(i)] = 1.0;
      add_product(map, unit.data(), cols, line.data());
      unit[at(i)] = 0.0;
      p.values.insert(p.values.end(), line.begin() + col, line.begin() + col_end);
    }
    parts.push_back(std::move(p));
    row = row_end;
    col = col_end;
  }
  return parts;
}

// Neighbouring parts as one.
Part together(const std::vector<Part>& parts, size_t first, size_t end) {
  Part out{parts[first].row, 0, parts[first].col, 0, {}};
  for (size_t i = first; i < end; ++i) {
    out.rows += parts[i].rows;
    out.cols += parts[i].cols;
  }
  out.values.assign(at(int64_t{out.rows} * out.cols), 0.0);
  for (size_t i = first; i < end; ++i)
    for (int r = 0; r < parts[i].rows; ++r)
      std::copy_n(parts[i].values.data() + int64_t{r} * parts[i].cols, parts[i].cols,
                  out.values.data() + int64_t{parts[i].row - out.row + r} * out.cols + parts[i].col - out.col);
  return out;
}

BlockMap::Block product(const Part& a, const Part& b) {
  VQKV_CHECK(a.cols == b.rows && a.col == b.row);
  BlockMap::Block out{a.rows, b.cols, {}};
  std::vector<double> line(at(b.cols));
  for (int i = 0; i < a.rows; ++i) {
    std::fill(line.begin(), line.end(), 0.0);
    for (int m = 0; m < a.cols; ++m) {
      const double v = a.values[at(int64_t{i} * a.cols + m)];
      if (v == 0) continue;
      for (int j = 0; j < b.cols; ++j) line[at(j)] += v * b.values[at(int64_t{m} * b.cols + j)];
    }
    out.values.insert(out.values.end(), line.begin(), line.end());
  }
  return out;
}

LinearMap block_product(const LinearMap& first, const LinearMap& second, int rows, int middle, int cols) {
  const std::vector<Part> a = parts_of(first, rows, middle), b = parts_of(second, middle, cols);
  BlockMap out;
  for (size_t i = 0, j = 0; i < a.size();) {
    // The next place between channels where both maps can be cut.
    const size_t i0 = i++, j0 = j++;
    for (;;) {
      const int left = a[i - 1].col + a[i - 1].cols, right = b[j - 1].row + b[j - 1].rows;
      if (left == right) break;
      left < right ? ++i : ++j;
    }
    if (i == a.size()) j = b.size();  // columns that nothing comes to
    out.blocks.push_back(product(together(a, i0, i), together(b, j0, j)));
  }
  if (out.blocks.size() > 1) return out;
  return DenseMap{rows, cols, std::move(out.blocks[0].values)};
}

// As a gather: diagonal maps and gathers.
const GatherMap* as_gather(const LinearMap& map, GatherMap& made) {
  return std::visit(
      Overloaded{[](const IdentityMap&) -> const GatherMap* { return nullptr; },
                 [&](const DiagonalMap& m) -> const GatherMap* {
                   made.rows = static_cast<int>(m.factor.size());
                   for (int i = 0; i < made.rows; ++i) made.from.push_back(i);
                   made.factor = m.factor;
                   return &made;
                 },
                 [](const GatherMap& m) { return &m; }, [](const BlockMap&) -> const GatherMap* { return nullptr; },
                 [](const HadamardMap&) -> const GatherMap* { return nullptr; },
                 [](const DenseMap&) -> const GatherMap* { return nullptr; }},
      map);
}

LinearMap gather_product(const GatherMap& first, const GatherMap& second) {
  GatherMap out{first.rows, {}, {}};
  bool in_place = first.rows == static_cast<int>(second.from.size());
  for (size_t j = 0; j < second.from.size(); ++j) {
    const int middle = second.from[j];
    out.from.push_back(middle < 0 ? -1 : first.from[at(middle)]);
    in_place = in_place && out.from[j] == static_cast<int>(j);
    if (first.factor.empty() && second.factor.empty()) continue;
    const double own = middle < 0 ? 0.0 : factor_at(first.factor, middle);
    out.factor.push_back(static_cast<float>(own * factor_at(second.factor, static_cast<int>(j))));
  }
  if (!in_place) return out;
  if (out.factor.empty()) return IdentityMap{};
  return DiagonalMap{std::move(out.factor)};
}

std::vector<float> times(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> out(b);
  for (size_t i = 0; i < a.size(); ++i) out[i] *= a[i];
  return out;
}

}  // namespace

bool is_identity(const LinearMap& map) { return std::holds_alternative<IdentityMap>(map); }

void check_map(const LinearMap& map, int rows, int cols) {
  VQKV_CHECK(rows >= 1 && cols >= 1);
  const auto factors = [&](const std::vector<float>& v) { VQKV_CHECK(v.empty() || v.size() == at(cols)); };
  std::visit(Overloaded{[&](const IdentityMap&) { VQKV_CHECK(rows == cols); },
                        [&](const DiagonalMap& m) { VQKV_CHECK(rows == cols && m.factor.size() == at(cols)); },
                        [&](const GatherMap& m) {
                          VQKV_CHECK(m.rows == rows && m.from.size() == at(cols));
                          for (const int32_t f : m.from) VQKV_CHECK(f >= -1 && f < rows);
                          factors(m.factor);
                        },
                        [&](const BlockMap& m) {
                          int row = 0, col = 0;
                          for (const BlockMap::Block& b : m.blocks) {
                            VQKV_CHECK(b.rows >= 0 && b.cols >= 1 && b.values.size() == at(int64_t{b.rows} * b.cols));
                            row += b.rows;
                            col += b.cols;
                          }
                          VQKV_CHECK(row == rows && col == cols);
                        },
                        [&](const HadamardMap& m) {
                          VQKV_CHECK(rows == cols && m.channels == cols && m.block >= 1 && cols % m.block == 0 &&
                                     std::has_single_bit(static_cast<unsigned>(m.block)));
                          factors(m.before);
                          factors(m.after);
                        },
                        [&](const DenseMap& m) {
                          VQKV_CHECK(m.rows == rows && m.cols == cols && m.values.size() == at(int64_t{rows} * cols));
                        }},
             map);
}

void add_product(const LinearMap& map, const double* y, int cols, double* x) {
  std::visit(Overloaded{[&](const IdentityMap&) {
                          for (int j = 0; j < cols; ++j) x[j] += y[j];
                        },
                        [&](const DiagonalMap& m) {
                          for (int j = 0; j < cols; ++j) x[j] += y[j] * m.factor[at(j)];
                        },
                        [&](const GatherMap& m) {
                          for (int j = 0; j < cols; ++j)
                            if (const int from = m.from[at(j)]; from >= 0) x[j] += y[from] * factor_at(m.factor, j);
                        },
                        [&](const BlockMap& m) {
                          for (const BlockMap::Block& b : m.blocks) {
                            add_row_product(y, b.rows, b.values.data(), b.cols, x);
                            y += b.rows;
                            x += b.cols;
                          }
                        },
                        [&](const HadamardMap& m) {
                          std::vector<double> v(at(m.block));
                          for (int c = 0; c < cols; c += m.block) {
                            for (int i = 0; i < m.block; ++i) v[at(i)] = y[c + i] * factor_at(m.before, c + i);
                            walsh_hadamard(v.data(), m.block);
                            for (int i = 0; i < m.block; ++i) x[c + i] += v[at(i)] * factor_at(m.after, c + i);
                          }
                        },
                        [&](const DenseMap& m) { add_row_product(y, m.rows, m.values.data(), cols, x); }},
             map);
}

std::vector<float> apply(const LinearMap& map, const std::vector<float>& v, int cols) {
  const std::vector<double> y(v.begin(), v.end());
  std::vector<double> x(at(cols), 0.0);
  add_product(map, y.data(), cols, x.data());
  return {x.begin(), x.end()};
}

std::vector<double> dense_of(const LinearMap& map, int rows, int cols) {
  std::vector<double> out(at(int64_t{rows} * cols), 0.0);
  for (const Part& p : parts_of(map, rows, cols))
    for (int r = 0; r < p.rows; ++r)
      std::copy_n(p.values.data() + int64_t{r} * p.cols, p.cols, out.data() + int64_t{p.row + r} * cols + p.col);
  return out;
}

LinearMap compose(const LinearMap& first, const LinearMap& second, int rows, int middle, int cols) {
  if (is_identity(first)) return second;
  if (is_identity(second)) return first;
  GatherMap made_a, made_b;
  const GatherMap *a = as_gather(first, made_a), *b = as_gather(second, made_b);
  if (a && b) return gather_product(*a, *b);
  if (const auto* h = std::get_if<HadamardMap>(&first); h && std::holds_alternative<DiagonalMap>(second)) {
    HadamardMap out = *h;
    out.after = times(out.after, made_b.factor);
    return out;
  }
  if (const auto* h = std::get_if<HadamardMap>(&second); h && std::holds_alternative<DiagonalMap>(first)) {
    HadamardMap out = *h;
    out.before = times(out.before, made_a.factor);
    return out;
  }
  return block_product(first, second, rows, middle, cols);
}

int64_t stored_bytes(const LinearMap& map, int64_t number) {
  const auto numbers = [&](const std::vector<float>& v) { return static_cast<int64_t>(v.size()) * number; };
  const auto factors = [&](const std::vector<float>& v) {
    return all_signs(v) ? static_cast<int64_t>((v.size() + 7) / 8) : numbers(v);
  };
  return std::visit(
      Overloaded{[](const IdentityMap&) { return int64_t{0}; }, [&](const DiagonalMap& m) { return numbers(m.factor); },
                 [&](const GatherMap& m) { return int64_t{2} * m.rows + numbers(m.factor); },
                 [&](const BlockMap& m) {
                   int64_t n = 0;
                   for (const BlockMap::Block& b : m.blocks) n += numbers(b.values);
                   return n;
                 },
                 [&](const HadamardMap& m) { return factors(m.before) + factors(m.after); },
                 [&](const DenseMap& m) { return numbers(m.values); }},
      map);
}

int64_t memory_bytes(const LinearMap& map) {
  const auto of = [](const auto& v) { return static_cast<int64_t>(v.capacity() * sizeof(v[0])); };
  return std::visit(
      Overloaded{[](const IdentityMap&) { return int64_t{0}; }, [&](const DiagonalMap& m) { return of(m.factor); },
                 [&](const GatherMap& m) { return of(m.from) + of(m.factor); },
                 [&](const BlockMap& m) {
                   int64_t n = of(m.blocks);
                   for (const BlockMap::Block& b : m.blocks) n += of(b.values);
                   return n;
                 },
                 [&](const HadamardMap& m) { return of(m.before) + of(m.after); },
                 [&](const DenseMap& m) { return of(m.values); }},
      map);
}

MapSlice columns_of(const LinearMap& map, int rows, int first, int count) {
  const auto slice = [&](const std::vector<float>& v) {
    return v.empty() ? v : std::vector<float>(v.begin() + first, v.begin() + first + count);
  };
  // No code reaches these columns: one row that nobody reads.
  const MapSlice nothing{GatherMap{1, std::vector<int32_t>(at(count), -1), {}}, 0, 1};
  // Columns [col, col + cols) of a (rows, cols) block that lie among those asked for; none: no columns.
  const auto cut = [&](const std::vector<float>& values, int block_rows, int col, int cols) {
    const int low = std::max(first, col) - col, high = std::min(first + count, col + cols) - col;
    BlockMap::Block out{block_rows, std::max(0, high - low), {}};
    for (int r = 0; r < block_rows && high > low; ++r)
      out.values.insert(out.values.end(), values.begin() + int64_t{r} * cols + low,
                        values.begin() + int64_t{r} * cols + high);
    return out;
  };
  const auto blocks = [&](const BlockMap& m) {
    MapSlice out;
    BlockMap kept;
    int row = 0, col = 0;
    for (const BlockMap::Block& b : m.blocks) {
      BlockMap::Block part = cut(b.values, b.rows, col, b.cols);
      if (part.cols > 0) {
        if (kept.blocks.empty()) out.row = row;
        out.rows += part.rows;
        kept.blocks.push_back(std::move(part));
      }
      row += b.rows;
      col += b.cols;
    }
    if (out.rows == 0)
      out = nothing;
    else if (kept.blocks.size() == 1)
      out.map = DenseMap{out.rows, count, std::move(kept.blocks[0].values)};
    else
      out.map = std::move(kept);
    return out;
  };
  return std::visit(
      Overloaded{[&](const IdentityMap&) {
                   return MapSlice{IdentityMap{}, first, count};
                 },
                 [&](const DiagonalMap& m) {
                   return MapSlice{DiagonalMap{slice(m.factor)}, first, count};
                 },
                 [&](const GatherMap& m) {
                   GatherMap part{0, {m.from.begin() + first, m.from.begin() + first + count}, slice(m.factor)};
                   int low = rows, high = 0;
                   for (const int32_t f : part.from) {
                     if (f < 0) continue;
                     low = std::min(low, int{f});
                     high = std::max(high, f + 1);
                   }
                   if (low >= high) return nothing;
                   part.rows = high - low;
                   for (int32_t& f : part.from) f = f < 0 ? -1 : f - low;
                   return MapSlice{std::move(part), low, high - low};
                 },
                 [&](const BlockMap& m) { return blocks(m); },
                 [&](const HadamardMap& m) {
                   if (first % m.block == 0 && count % m.block == 0)
                     return MapSlice{HadamardMap{count, m.block, slice(m.before), slice(m.after)}, first, count};
                   BlockMap written;  // blocks wider than what is asked for
                   for (const Part& p : parts_of(map, rows, rows))
                     written.blocks.push_back({p.rows, p.cols, {p.values.begin(), p.values.end()}});
                   return blocks(written);
                 },
                 [&](const DenseMap& m) {
                   return MapSlice{DenseMap{m.rows, count, cut(m.values, m.rows, 0, m.cols).values}, 0, m.rows};
                 }},
      map);
}

}  // namespace vqkv
