// A tokenizer.model file (Llama-2, Mistral), run by libsentencepiece itself, and the tokens that other files add.
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
  SentencePieceTokenizer(const std::string& path, const std::function<void(TokenizerData&)>& complete) : where_(path) {
    const std::string model = read_file(path, kMaxModelBytes);
    load(processor_, model);
    TokenizerData data = pieces();
    if (complete) complete(data);
    special_ = std::move(data.special);
    chat_template_ = std::move(data.chat_template);
    types_ = std::move(data.types);
    added_.assign(data.tokens.begin() + processor_.GetPieceSize(), data.tokens.end());
    for (size_t i = 0; i < data.tokens.size(); ++i) {
      const std::string& token = data.tokens[i];
      const bool user = types_[i] == TokenType::kUserDefined;
      if (!user && types_[i] != TokenType::kControl) continue;
      if (token.empty() || token.size() > TokenMatcher::kLongest) continue;
      if (user) user_.add(token, static_cast<int32_t>(i));
      special_or_user_.add(token, static_cast<int32_t>(i));
    }
    // The model's add_dummy_prefix is not in the library's interface; what it does to a letter shows it.
    const std::vector<int> probe = processor_.EncodeAsIds("x");
    prefix_ = data.prefix;
    if (probe.empty() || !processor_.IdToPiece(probe[0]).starts_with("\xe2\x96\x81")) {
      prefix_.where = PrefixSpace::Where::kNever;
    } else if (prefix_.where != PrefixSpace::Where::kEvery || !prefix_.before_space) {
      bare_ = std::make_unique<sentencepiece::SentencePieceProcessor>();
      load(*bare_, model + std::string(kNoPrefix));
    }
  }

  std::string kind() const override { return "sentencepiece"; }
  int32_t size() const override { return static_cast<int32_t>(types_.size()); }

  std::vector<int32_t> encode(std::string_view text, bool parse_special) const override {
    require_utf8(text, "text to tokenize");
    std::vector<int32_t> out;
    const auto plain = [&](std::string_view stretch) {
      const bool bare = bare_ && !prefix_.applies(stretch, stretch.data() == text.data());
      std::vector<int> ids;
      // A string, since the library's own view type differs between its versions.
      const auto status = (bare ? *bare_ : processor_).Encode(std::string(stretch), &ids);
      if (!status.ok()) fail_data(fmt::format("{}: {}", where_, status.ToString()));
      out.insert(out.end(), ids.begin(), ids.end());
    };
    (parse_special ? special_or_user_ : user_).cut(text, plain, [&](int32_t id) { out.push_back(id); });
    return out;
  }

  std::string piece(int32_t id) const override {
    require_id(id, types_.size());
    if (id >= processor_.GetPieceSize()) return added_[static_cast<size_t>(id - processor_.GetPieceSize())];
    const std::string& token = processor_.IdToPiece(id);
    if (processor_.IsControl(id) || processor_.IsUnknown(id)) return token;
    if (processor_.IsByte(id)) return std::string(1, static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16)));
    return unescape_spaces(token);
  }

  std::string decode(const std::vector<int32_t>& ids, bool skip_special) const override {
    std::string out;
    bool first = true;  // the space in front of the first piece is the one that encode put there
    for (const int32_t id : ids) {
      if (padded(id)) continue;
      const std::string text = piece(id);
      if (types_[static_cast<size_t>(id)] == TokenType::kControl) {
        if (!skip_special) out += text;
        continue;
      }
      const bool added = first && prefix_.where != PrefixSpace::Where::kNever && text.starts_with(' ');
      out += added ? text.substr(1) : text;
      first = false;
    }
    return out;
  }

 private:
  // A NormalizerSpec with add_dummy_prefix off. Serialized messages of one type that stand behind each other are
  // merged, the last value of a field holds.
  static constexpr std::string_view kNoPrefix{"\x1a\x02\x18\x00", 4};

  void load(sentencepiece::SentencePieceProcessor& processor, const std::string& model) const {
    const auto status = processor.LoadFromSerializedProto(model);
    if (!status.ok()) fail_data(fmt::format("{}: not a SentencePiece model: {}", where_, status.ToString()));
  }

  TokenizerData pieces() const {
    TokenizerData data;
    data.where = where_;
    for (int32_t id = 0; id < processor_.GetPieceSize(); ++id) {
      data.tokens.push_back(processor_.IdToPiece(id));
      data.types.push_back(processor_.IsUnknown(id)   ? TokenType::kUnknown
                           : processor_.IsControl(id) ? TokenType::kControl
                           : processor_.IsByte(id)    ? TokenType::kByte
                           : processor_.IsUnused(id)  ? TokenType::kUnused
                                                      : TokenType::kNormal);
    }
    data.unknown = processor_.unk_id();
    data.special.bos = processor_.bos_id();
    data.special.eos = processor_.eos_id();
    return data;
  }

  void require_id(int32_t id, size_t size) const {
    if (id < 0 || static_cast<size_t>(id) >= size) {
      fail_data(fmt::format("token id {} is outside the vocabulary of {} tokens ({})", id, size, where_));
    }
  }

  std::string where_;
  sentencepiece::SentencePieceProcessor processor_;
  std::unique_ptr<sentencepiece::SentencePieceProcessor> bare_;  // without a prefix space, where one is wanted at times
  std::vector<TokenType> types_;
  std::vector<std::string> added_;  // tokens behind the pieces
  TokenMatcher user_, special_or_user_;
  PrefixSpace prefix_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(const std::string& model_path,
                                                        const std::function<void(TokenizerData&)>& complete) {
  return std::make_unique<SentencePieceTokenizer>(model_path, complete);
}

}  // namespace vqkv
