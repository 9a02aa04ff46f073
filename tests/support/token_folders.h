// The tokenizer folders of tests/golden/data/folders, written out for one test: see make_folder_goldens.py.
#pragma once
#include <string>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "support/model_writers.h"

namespace vqkv::testing {

inline std::string token_folders_file(const std::string& name) {
  return read_file(std::string(VQKV_SOURCE_DIR) + "/tests/golden/data/folders/" + name);
}

inline Json token_folders() { return parse_json(token_folders_file("folders.json"), "folders.json"); }

// {file name: the name of a file of data/folders, or {"base": such a name, "set": top-level keys}, or JSON}
class TokenFolder {
 public:
  explicit TokenFolder(const Json& files) {
    for (const auto& [name, content] : files.items()) write(name, content);
  }
  void write(const std::string& name, const Json& content) const {
    if (content.is_string()) {
      folder_.write(name, token_folders_file(content.get<std::string>()));
    } else if (content.contains("base")) {
      Json json = parse_json(token_folders_file(content["base"].get<std::string>()), name);
      json.update(content["set"]);
      folder_.write(name, json.dump());
    } else {
      folder_.write(name, content.dump());
    }
  }
  std::string path() const { return folder_.path(); }

 private:
  TempFolder folder_;
};

// The files of one folder of folders.json.
inline Json token_folder_files(const std::string& name) {
  for (const Json& folder : token_folders()["folders"])
    if (folder["name"] == name) return folder["files"];
  fail_internal("no folder \"" + name + "\"");
}

}  // namespace vqkv::testing
