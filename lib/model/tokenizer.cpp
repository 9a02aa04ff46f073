#include "model/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "core/error.h"
#include "io/atomic_file.h"
#include "model/tokenizer_data.h"
#include "model/tokenizer_gguf.h"

namespace vqkv {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kMaxJson = int64_t{256} << 20;  // the largest tokenizer.json of the supported families has 17 MB

std::string read_if_there(const fs::path& path) {
  return fs::exists(path) ? read_file(path.string(), kMaxJson) : std::string();
}

void apply_settings(TokenizerData& data, const fs::path& folder) {
  const fs::path config = folder / "tokenizer_config.json";
  if (const std::string text = read_if_there(config); !text.empty())
    apply_tokenizer_config(data, text, config.string());
  // Newer checkpoints keep the template in a file of its own, which goes first.
  if (std::string text = read_if_there(folder / "chat_template.jinja"); !text.empty())
    data.chat_template = std::move(text);
  for (const char* name : {"generation_config.json", "config.json"}) {
    const fs::path path = folder / name;
    if (const std::string text = read_if_there(path); !text.empty()) {
      apply_generation_config(data, text, path.string());
      break;
    }
  }
}

std::unique_ptr<Tokenizer> load_folder(const fs::path& folder) {
  const fs::path json = folder / "tokenizer.json", model = folder / "tokenizer.model";
  // A SentencePiece checkpoint has both files; its own library reads the original. Files of that name that hold another
  // format (Llama 3's is a list of base64 lines) stand beside a byte-level tokenizer.json, or are refused by the
  // library.
  bool byte_level = false;
  std::string text;
  if (fs::exists(json)) {
    text = read_file(json.string(), kMaxJson);
    byte_level = text.find("\"ByteLevel\"") != std::string::npos;
  }
  if (fs::exists(model) && !byte_level) {
    TokenizerData data;
    data.special.add_bos = true;  // what Llama's tokenizer class does unless its configuration says otherwise
    apply_settings(data, folder);
    std::sort(data.special.stop.begin(), data.special.stop.end());
    return make_sentencepiece_tokenizer(model.string(), std::move(data));
  }
  if (text.empty()) fail_data(folder.string() + ": neither tokenizer.json nor tokenizer.model is there");
  TokenizerData data = parse_tokenizer_json(text, json.string());
  apply_settings(data, folder);
  complete_stop_tokens(data);
  if (data.special.add_bos && data.special.bos < 0)
    fail_data(json.string() + ": the tokenizer adds a BOS token, but no file names one");
  return make_bpe_tokenizer(std::move(data));
}

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& model_path) {
  const fs::path path(model_path);
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) fail_data(model_path + ": no such file or folder");
  if (fs::is_directory(status)) return load_folder(path);
  return tokenizer_from_gguf(GgufFile(model_path));
}

}  // namespace vqkv
