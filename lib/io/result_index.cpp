#include "io/result_index.h"

#include <fmt/format.h>
#include <sqlite3.h>

#include <cmath>
#include <memory>

#include "core/error.h"
#include "io/atomic_file.h"

namespace vqkv {
namespace {

void flatten_into(const Json& v, const std::string& path, Json& out) {
  if (v.is_object() && !v.empty()) {
    for (const auto& [key, item] : v.items()) flatten_into(item, path.empty() ? key : path + "." + key, out);
  } else if (!path.empty()) {
    out[path] = v;
  }
}

std::string plain(const Json& v) {
  if (v.is_null()) return "";
  if (v.is_string()) return v.get<std::string>();
  if (v.is_number_float()) return std::isfinite(v.get<double>()) ? canonical_json(v) : "nan";
  return v.dump();
}

std::string csv(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

Json get(const Json& o, const char* key) {
  const auto it = o.find(key);
  return it == o.end() ? Json() : *it;
}

// The configuration's leaves, and the swept paths where canonical form spells them otherwise (codec.bits becomes
// codec.k.bits and codec.v.bits).
Json columns_of(const Json& record) {
  Json flat = flatten_paths(get(record, "config"));
  for (const char* part : {"axes", "repeat"}) {
    const Json values = get(record, part);
    for (const auto& [path, value] : values.items())
      if (!flat.contains(path)) flat[path] = value;
  }
  return flat;
}

std::string flags_of(const Json& record) {
  std::string out;
  for (const auto& f : record.value("flags", Json::array())) out += (out.empty() ? "" : " ") + plain(f);
  return out;
}

constexpr const char* kMeasurementKeys[] = {"role", "tag",    "context", "sequences", "value",
                                            "unit", "stderr", "n",       "better",    "exact"};

struct Database {
  sqlite3* db = nullptr;
  std::string path;
  // Without SQLite's own locks: AtomicFile holds one on the file. Messages call it `p`.
  Database(const std::string& p, const std::string& on_disk) : path(p) {
    if (sqlite3_open_v2(on_disk.c_str(), &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, "unix-none") != SQLITE_OK) {
      const std::string why = db ? sqlite3_errmsg(db) : "out of memory";
      sqlite3_close(db);
      fail_data(fmt::format("{}: SQLite: {}", p, why));
    }
  }
  ~Database() { sqlite3_close(db); }
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;
  void check(int code) const {
    if (code != SQLITE_OK && code != SQLITE_DONE && code != SQLITE_ROW)
      fail_data(fmt::format("{}: SQLite: {}", path, sqlite3_errmsg(db)));
  }
  void exec(const char* sql) const { check(sqlite3_exec(db, sql, nullptr, nullptr, nullptr)); }
};

class Insert {
 public:
  Insert(const Database& db, const char* sql) : db_(db) {
    sqlite3_stmt* s = nullptr;
    db.check(sqlite3_prepare_v2(db.db, sql, -1, &s, nullptr));
    statement_.reset(s);
  }
  void operator()(const std::vector<Json>& values) {
    for (size_t i = 0; i < values.size(); ++i) {
      const Json& v = values[i];
      const int at = static_cast<int>(i) + 1;
      if (v.is_null())
        db_.check(sqlite3_bind_null(statement_.get(), at));
      else if (v.is_number_integer())
        db_.check(sqlite3_bind_int64(statement_.get(), at, v.get<int64_t>()));
      else if (v.is_number())
        db_.check(sqlite3_bind_double(statement_.get(), at, v.get<double>()));
      else if (v.is_boolean())
        db_.check(sqlite3_bind_int64(statement_.get(), at, v.get<bool>() ? 1 : 0));
      else {
        const std::string text = plain(v);
        db_.check(
            sqlite3_bind_text(statement_.get(), at, text.data(), static_cast<int>(text.size()), SQLITE_TRANSIENT));
      }
    }
    db_.check(sqlite3_step(statement_.get()));
    db_.check(sqlite3_reset(statement_.get()));
  }

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* s) const { sqlite3_finalize(s); }
  };
  const Database& db_;
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
};

}  // namespace

Json flatten_paths(const Json& tree) {
  Json out = Json::object();
  flatten_into(tree, "", out);
  return out;
}

void add_config_columns(const Json& cell, std::set<std::string>& columns) {
  const Json flat = columns_of(cell);
  for (const auto& [key, unused] : flat.items()) columns.insert(key);
}

void write_result_csv(const std::string& path, const std::set<std::string>& config_columns,
                      const RecordSource& records) {
  AtomicFile file(path);
  std::string out = "id,status,reason,flags,protocol";
  for (const char* k : kMeasurementKeys) out += fmt::format(",{}", k);
  for (const auto& c : config_columns) out += "," + csv(c);
  file.write(out + "\n");
  records([&](const Json& r) {
    out.clear();
    const Json flat = columns_of(r);
    std::string tail;
    for (const auto& c : config_columns) tail += "," + csv(plain(get(flat, c.c_str())));
    const std::string head = csv(plain(get(r, "id"))) + "," + csv(plain(get(r, "status"))) + "," +
                             csv(plain(get(r, "reason"))) + "," + csv(flags_of(r)) + "," +
                             csv(plain(get(r, "protocol")));
    Json measurements = get(r, "measurements");
    if (!measurements.is_array() || measurements.empty())
      measurements = Json::array({Json::object()});  // a cell without numbers keeps its line
    for (const auto& m : measurements) {
      out += head;
      for (const char* k : kMeasurementKeys) out += "," + csv(plain(get(m, k)));
      out += tail + "\n";
    }
    file.write(out);
  });
  file.commit();
}

void write_result_sqlite(const std::string& path, const RecordSource& records, const Json& plan_header) {
  AtomicFile file(path);
  {  // the database is closed before it gets its name
    const Database db(path, file.partial_path());
    db.exec(
        "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN;"
        "CREATE TABLE plan(key TEXT PRIMARY KEY, value TEXT);"
        "CREATE TABLE cell(cell TEXT PRIMARY KEY, id TEXT, status TEXT, reason TEXT, attempt INTEGER, flags TEXT, "
        "protocol TEXT, record TEXT);"
        "CREATE TABLE config(cell TEXT, path TEXT, value);"
        "CREATE TABLE measurement(cell TEXT, role TEXT, tag TEXT, context INTEGER, sequences INTEGER, value REAL, unit "
        "TEXT,"
        " stderr REAL, n INTEGER, better TEXT, exact INTEGER);");
    Insert plan(db, "INSERT INTO plan VALUES(?,?)");
    for (const auto& [key, value] : plan_header.items()) plan({key, plain(value)});
    Insert cell(db, "INSERT INTO cell VALUES(?,?,?,?,?,?,?,?)");
    Insert config(db, "INSERT INTO config VALUES(?,?,?)");
    Insert measurement(db, "INSERT INTO measurement VALUES(?,?,?,?,?,?,?,?,?,?,?)");
    records([&](const Json& r) {
      const Json id = get(r, "cell");
      cell({id, get(r, "id"), get(r, "status"), get(r, "reason"), get(r, "attempt"), flags_of(r), get(r, "protocol"),
            r.dump()});
      const Json flat = columns_of(r);
      for (const auto& [key, value] : flat.items()) config({id, key, value});
      for (const auto& m : r.value("measurements", Json::array())) {
        std::vector<Json> row{id};
        for (const char* k : kMeasurementKeys) row.push_back(get(m, k));
        measurement(row);
      }
    });
    db.exec("CREATE INDEX by_tag ON measurement(tag, role); CREATE INDEX by_path ON config(path, value); COMMIT;");
  }
  file.commit();
}

}  // namespace vqkv
