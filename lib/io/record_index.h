// results/NAME.jsonl and its index NAME.index: one short line a record, so that resuming and `status` read a hundred
// bytes a cell and not gigabytes of measurements. The records alone are the truth: what the index lacks (a kill between
// the two writes, a store of an earlier release) is read from them, and an index that doesn't fit them is left out.
#pragma once
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "core/json.h"
#include "io/store.h"

namespace vqkv {

// Of a record's line in the file of records.
struct RecordPlace {
  int64_t at = 0, bytes = 0;                      // its newline included
  int64_t line = 0;                               // from 1
  std::string in(const std::string& path) const;  // "PATH at byte 1234 line 5"
};

struct RecordEntry {
  RecordPlace place;
  Json facts;  // of the record's {cell, status, attempt, reason, flags}, what it has
};

struct RecordIndex {
  std::vector<RecordEntry> entries;  // in the order of the records
  int64_t read = 0;                  // of them, from the records for want of an index
  std::string torn;                  // as JsonlRead::torn
};

// Of the records at `path`; a missing file is empty. Throws kBadData for a line that it reads and that is no object,
// except an unfinished last one.
RecordIndex read_record_index(const std::string& path);

// Reads single records.
class RecordReader {
 public:
  explicit RecordReader(std::string path);
  // The record at a place that an index gave; kBadData when none stands there.
  Json read(const RecordPlace& place);

 private:
  std::string path_;
  std::ifstream in_;
};

// Appends records and their index. The index is neither synced nor needed.
class RecordWriter {
 public:
  explicit RecordWriter(const std::string& path);  // as JsonlWriter
  void append(const Json& record);

 private:
  JsonlWriter records_;
  std::ofstream index_;
};

}  // namespace vqkv
