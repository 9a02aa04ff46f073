// A tokenizer.model file (Llama-2, Mistral), run by libsentencepiece itself.
#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include "core/error.h"
#include "io/atomic_file.h"
#include "model/added_tokens.h"
#include "model/tokenizer_data.h"

namespace vqkv {
namespace {

constexpr int64_t kMaxModelBytes = int64_t{64} << 20;  // Mistral's, the largest of the supported families, has 0.6 MB

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::string& path, TokenizerData data) : where_(path) {
    const std::string model = read_file(path, kMaxModelBytes);
    const auto status = processor_.LoadFromSerializedProto(model);
    if (!status.ok()) fail_data(fmt::format("{}: not a SentencePiece model: {}", path, status.ToString()));
    special_ = std::move(data.special);
    chat_template_ = std::move(data.chat_template);
    if (special_.bos < 0) special_.bos = processor_.bos_id();
    if (special_.eos < 0) special_.eos = processor_.eos_id();
    if (special_.add_bos && special_.bos < 0)
      fail_data(path + ": the tokenizer adds a BOS token, but the model has none");
    if (special_.stop.empty() && special_.eos >= 0) special_.stop.push_back(special_.eos);
    for (const int32_t id : special_.stop) require_id(id);
    if (special_.bos >= 0) require_id(special_.bos);
    for (int32_t id = 0; id < processor_.GetPieceSize(); ++id) {
      const std::string& piece = processor_.IdToPiece(id);
      if (processor_.IsControl(id) && !piece.empty() && piece.size() <= TokenMatcher::kLongest) control_.add(piece, id);
    }
    // The model's add_dummy_prefix is not in the library's interface; what it does to a letter shows it.
    const std::vector<int> probe = processor_.EncodeAsIds("x");
    add_space_prefix_ = !probe.empty() && processor_.IdToPiece(probe[0]).starts_with("\xe2\x96\x81");
  }

  std::string kind() const override { return "sentencepiece"; }
  int32_t size() const override { return processor_.GetPieceSize(); }

  std::vector<int32_t> encode(std::string_view text, bool parse_special) const override {
    require_utf8(text, "text to tokenize");
    std::vector<int32_t> out;
    const auto plain = [&](std::string_view stretch) {
      std::vector<int> ids;
      // A string, since the library's own view type differs between its versions.
      const auto status = processor_.Encode(std::string(stretch), &ids);
      if (!status.ok()) fail_data(fmt::format("{}: {}", where_, status.ToString()));
      out.insert(out.end(), ids.begin(), ids.end());
    };
    if (parse_special) {
      control_.cut(text, plain, [&](int32_t id) { out.push_back(id); });
    } else {
      plain(text);
    }
    return out;
  }

  std::string piece(int32_t id) const override {
    require_id(id);
    const std::string& token = processor_.IdToPiece(id);
    if (processor_.IsControl(id) || processor_.IsUnknown(id)) return token;
    if (processor_.IsByte(id)) return std::string(1, static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16)));
    std::string out;
    for (size_t i = 0; i < token.size();) {
      if (token.compare(i, 3, "\xe2\x96\x81") == 0) {
        out += ' ';
        i += 3;
      } else {
        out += token[i++];
      }
    }
    return out;
  }

  std::string decode(const std::vector<int32_t>& ids, bool skip_special) const override {
    std::string out;
    bool first = true;  // the space in front of the first piece is the one that encode put there
    for (const int32_t id : ids) {
      const std::string text = piece(id);
      if (processor_.IsControl(id)) {
        if (!skip_special) out += text;
        continue;
      }
      out += first && add_space_prefix_ && text.starts_with(' ') ? text.substr(1) : text;
      first = false;
    }
    return out;
  }

 private:
  void require_id(int32_t id) const {
    if (id < 0 || id >= size()) {
      fail_data(fmt::format("token id {} is outside the vocabulary of {} tokens ({})", id, size(), where_));
    }
  }

  std::string where_;
  sentencepiece::SentencePieceProcessor processor_;
  TokenMatcher control_;
  bool add_space_prefix_ = true;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_path, TokenizerData data) {
  return std::make_unique<SentencePieceTokenizer>(model_path, std::move(data));
}

}  // namespace vqkv
