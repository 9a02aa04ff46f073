#include "model/tokenizer.h"

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

SideFiles read_side_files(const fs::path& folder) {
  return {.folder = folder.string(),
          .tokenizer_config = read_if_there(folder / "tokenizer_config.json"),
          .special_tokens_map = read_if_there(folder / "special_tokens_map.json"),
          .added_tokens = read_if_there(folder / "added_tokens.json"),
          .generation_config = read_if_there(folder / "generation_config.json"),
          .config = read_if_there(folder / "config.json"),
          .chat_template = read_if_there(folder / "chat_template.jinja")};
}

std::unique_ptr<Tokenizer> load_folder(const fs::path& folder) {
  const fs::path json = folder / "tokenizer.json", model = folder / "tokenizer.model";
  // A SentencePiece checkpoint has both files; its own library reads the original. Files of that name that hold another
  // format (Llama 3's is a list of base64 lines) stand beside a byte-level tokenizer.json, or are refused by the
  // library.
  const std::string text = read_if_there(json);
  const bool byte_level = text.find("\"ByteLevel\"") != std::string::npos;
  if (fs::exists(model) && !byte_level) {
    return make_sentencepiece_tokenizer(model.string(), [&](TokenizerData& data) {
      if (!text.empty()) apply_tokenizer_json(data, text, json.string());
      apply_side_files(data, read_side_files(folder));
    });
  }
  if (text.empty()) fail_data(folder.string() + ": neither tokenizer.json nor tokenizer.model is there");
  TokenizerData data = parse_tokenizer_json(text, json.string());
  apply_side_files(data, read_side_files(folder));
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
