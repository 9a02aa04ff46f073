#include "cache/exec_codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>

#include "cache/keep_rule.h"
#include "core/child_process.h"
#include "core/error.h"
#include "core/finite.h"

namespace vqkv {
namespace {

static_assert(std::endian::native == std::endian::little);  // as the stream is

constexpr char kMagic[] = "vqkvexec";
constexpr uint32_t kVersion = 1;
constexpr uint32_t kBlock = 0x6b6f6c62;  // "blok"
constexpr uint32_t kMaxHello = 1 << 16;  // bytes of the child's JSON
constexpr uint64_t kMaxClaim = uint64_t{1} << 50;

struct Hello {
  char magic[8];
  uint32_t version, json_bytes;
};
static_assert(sizeof(Hello) == 16);

// Before the rows of a block, both ways.
struct Header {
  uint32_t magic, sequence, layer, role;  // role 0: keys, 1: values
  uint64_t number;                        // there: position of the first token; back: bytes that the block takes
  uint32_t tokens, channels;              // channels: kv_heads * head_dim
};
static_assert(sizeof(Header) == 32);

std::string shown(std::span<const std::byte> bytes) {
  std::string out;
  for (const std::byte b : bytes.first(std::min<size_t>(bytes.size(), 40))) {
    const auto c = static_cast<char>(b);
    out += c >= ' ' && c <= '~' ? std::string(1, c) : fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  }
  return out;
}

}  // namespace

// What is said over the pipes; one answer is awaited at a time.
class ExecCodec::Talk {
 public:
  Talk(const CacheShape& shape, const CachePolicy& policy, const ExecOptions& options)
      : shape_(shape), policy_(policy), options_(options), child_(split_command(options.command)) {
    shake_hands();
  }

  struct Facts {
    std::string name;
    RopePlacement keys = RopePlacement::kPost;
    int block_tokens[2] = {1, 1};
  };
  const Facts& facts() const { return facts_; }
  const ExecOptions& options() const { return options_; }
  Json config() const {
    return {{"name", "exec"},
            {"command", options_.command},
            {"program", facts_.name},
            {"keys", facts_.keys == RopePlacement::kPre ? "pre_rope" : "post_rope"}};
  }
  int64_t claimed_bytes() const {
    const std::lock_guard lock(mutex_);
    return claimed_;
  }

  // Whoever asks from now on is refused: the caller ends the child.
  ChildProcess* leave() {
    const std::lock_guard lock(mutex_);
    if (broken_.empty()) broken_ = fmt::format("exec:{}: the program was ended", options_.command);
    return &child_;
  }

  // A (layer, role) of a sequence begins, and ends.
  void begin(int layer, Role role) {
    const std::lock_guard lock(mutex_);
    if (live_count_ == 0) {
      ++sequence_;
      claimed_ = 0;
      live_.assign(static_cast<size_t>(2 * shape_.layers), 0);
    }
    if (live(layer, role)) fail_internal("a codec in another program serves one sequence at a time");
    live(layer, role) = true;
    ++live_count_;
  }
  void end(int layer, Role role) {
    const std::lock_guard lock(mutex_);
    live(layer, role) = false;
    --live_count_;
  }

  // The next tokens of a (layer, role), the first at `position`; `out` receives what the child makes of them.
  void code(int layer, Role role, int64_t position, ConstMatrix x, float* out) {
    const std::lock_guard lock(mutex_);
    for (int64_t at = 0; at < x.rows;) {
      const int64_t n = std::min(x.rows - at, policy_.rule(role).flush);
      code_block(layer, role, position + at, x.slice_rows(at, n), out + at * x.cols);
      at += n;
    }
  }

 private:
  // A sequence of this (layer, role) has begun and not ended.
  char& live(int layer, Role role) { return live_[static_cast<size_t>(2 * layer + (role == Role::kValue))]; }

  // Ends in kBadData, now and for whoever asks next: the stream is out of step.
  [[noreturn]] void fail(const std::string& where, const std::string& what) {
    broken_ = fmt::format("exec:{}: {}{}; the program: {}", options_.command, where, what, child_.last_words());
    fail_data(broken_);
  }

  void exchange(std::span<const std::byte> send, std::span<std::byte> receive, const std::string& where,
                const std::function<void(std::span<const std::byte>)>& look) {
    const auto [end, received] = child_.exchange(send, receive, options_.seconds, options_.stop, look);
    if (end == ChildProcess::End::kDone) return;
    const std::string came =
        fmt::format("{} of {} bytes of an answer came{}", received, receive.size(),
                    received > 0 && received < sizeof(Header) ? fmt::format(" ('{}')", shown(receive.first(received)))
                                                              : std::string());
    if (end == ChildProcess::End::kStopped) fail(where, "interrupted while its answer was awaited");
    if (end == ChildProcess::End::kTimeout) fail(where, fmt::format("{} within {} s", came, options_.seconds));
    fail(where, came + " before it closed its stream");
  }

  void shake_hands() {
    const auto rule = [](const FlushRule& r) {
      Json out = {{"window", r.window}, {"flush", r.flush}};
      if (r.first > 0) out["first"] = r.first;
      return out;
    };
    const std::string json = Json{
        {"layers", shape_.layers},
        {"q_heads", shape_.q_heads},
        {"kv_heads", shape_.kv_heads},
        {"head_dim", shape_.head_dim},
        {"rope", shape_.rope.to_json()},
        {"dtype", "f32"},
        {"cache",
         {{"sinks", policy_.sinks},
          {"exact_dtype", dtype_name(policy_.exact_dtype)},
          {"prompt", policy_.prompt},
          {"generated", policy_.codes_generated ? "coded" : "exact"},
          {"k", rule(policy_.k)},
          {"v",
           rule(policy_.v)}}}}.dump();
    Hello hello{{}, kVersion, static_cast<uint32_t>(json.size())};
    std::memcpy(hello.magic, kMagic, sizeof hello.magic);
    std::string sent(reinterpret_cast<const char*>(&hello), sizeof hello);
    sent += json;
    const std::string where = "handshake: ";
    exchange(std::as_bytes(std::span(sent)), std::as_writable_bytes(std::span(&hello, 1)), where,
             [&](std::span<const std::byte> got) {
               if (std::memcmp(got.data(), kMagic, std::min(got.size(), sizeof hello.magic)) != 0)
                 fail(where,
                      fmt::format("'{}' came, which is not '{}' (stdout belongs to the stream)", shown(got), kMagic));
             });
    if (hello.version != kVersion)
      fail(where, fmt::format("version {} of the stream; this is {}", hello.version, kVersion));
    if (hello.json_bytes > kMaxHello)
      fail(where, fmt::format("{} bytes of JSON are announced; allowed: {}", hello.json_bytes, kMaxHello));
    std::string text(hello.json_bytes, '\0');
    exchange({}, std::as_writable_bytes(std::span(text)), where, {});
    Json said;
    try {
      said = parse_json(text, "its JSON");
    } catch (const Error& e) { fail(where, e.what()); }
    read_facts(said, where);
  }

  void read_facts(const Json& said, const std::string& where) {
    if (!said.is_object()) fail(where, fmt::format("its JSON is {}, not an object", said.dump()));
    const auto refuse = [&](const std::string& key, const Json& value, const char* allowed) {
      fail(where, fmt::format("{}: {}; allowed: {}", key, value.dump(), allowed));
    };
    for (const auto& [key, value] : said.items())
      if (key != "name" && key != "keys" && key != "block_tokens") refuse(key, value, "name, keys, block_tokens");
    const Json name = said.value("name", Json()), keys = said.value("keys", Json()),
               blocks = said.value("block_tokens", Json::object());
    const auto printable = [](char c) { return c >= ' ' && c <= '~'; };
    if (name.is_string()) facts_.name = name.get<std::string>();
    if (facts_.name.empty() || facts_.name.size() > 40 ||
        !std::all_of(facts_.name.begin(), facts_.name.end(), printable))
      refuse("name", name, "1 to 40 printable characters");
    if (keys != "pre_rope" && keys != "post_rope") refuse("keys", keys, "\"pre_rope\" or \"post_rope\"");
    facts_.keys = keys == "pre_rope" ? RopePlacement::kPre : RopePlacement::kPost;
    if (!blocks.is_object()) refuse("block_tokens", blocks, "{\"k\": tokens, \"v\": tokens}");
    for (const auto& [role, tokens] : blocks.items()) {
      if (role != "k" && role != "v") refuse("block_tokens." + role, tokens, "k, v");
      if (!tokens.is_number_integer() || tokens < 1 || tokens > 65536)
        refuse("block_tokens." + role, tokens, "1 to 65536 tokens");
      facts_.block_tokens[role == "v"] = tokens.get<int>();
    }
  }

  void code_block(int layer, Role role, int64_t position, ConstMatrix x, float* out) {
    if (!broken_.empty()) fail_data(broken_);
    const std::string where = fmt::format("layer {}, {}, positions {} to {}: ", layer,
                                          role == Role::kKey ? "keys" : "values", position, position + x.rows - 1);
    const Header asked{kBlock,
                       sequence_,
                       static_cast<uint32_t>(layer),
                       static_cast<uint32_t>(role == Role::kValue),
                       static_cast<uint64_t>(position),
                       static_cast<uint32_t>(x.rows),
                       static_cast<uint32_t>(x.cols)};
    const size_t values = static_cast<size_t>(x.size()), size = sizeof asked + values * sizeof(float);
    sent_.resize(size);
    received_.resize(size);
    std::memcpy(sent_.data(), &asked, sizeof asked);
    for (int64_t t = 0; t < x.rows; ++t)
      std::memcpy(sent_.data() + sizeof asked + static_cast<size_t>(t * x.cols) * sizeof(float), x.row(t),
                  static_cast<size_t>(x.cols) * sizeof(float));
    Header answer{};
    bool checked = false;
    exchange(sent_, received_, where, [&](std::span<const std::byte> got) {
      if (checked) return;
      if (std::memcmp(got.data(), &asked.magic, std::min(got.size(), sizeof asked.magic)) != 0)
        fail(where,
             fmt::format("'{}' came where an answer begins with 'blok' (stdout belongs to the stream)", shown(got)));
      if (got.size() < sizeof answer) return;
      std::memcpy(&answer, got.data(), sizeof answer);
      check_answer(asked, answer, where);
      checked = true;
    });
    if (const size_t more = child_.unread(); more > 0)
      fail(where, fmt::format("{} bytes came beyond the {} of the answer", more, size));
    std::memcpy(out, received_.data() + sizeof answer, values * sizeof(float));
    const int64_t bad = first_not_finite(out, static_cast<int64_t>(values));
    if (bad >= 0)
      fail(where, fmt::format("{} came for position {}, KV head {}, channel {}; values must be finite", out[bad],
                              position + bad / x.cols, bad % x.cols / shape_.head_dim, bad % shape_.head_dim));
    claimed_ += static_cast<int64_t>(answer.number);
  }

  void check_answer(const Header& asked, const Header& answer, const std::string& where) {
    for (const auto& [name, field] : {std::pair{"sequence", &Header::sequence}, std::pair{"layer", &Header::layer},
                                      std::pair{"role", &Header::role}, std::pair{"tokens", &Header::tokens},
                                      std::pair{"channels", &Header::channels}})
      if (answer.*field != asked.*field)
        fail(where, fmt::format("the answer says {} {}, where {} was asked", name, answer.*field, asked.*field));
    if (answer.number > kMaxClaim) fail(where, fmt::format("it claims {} bytes", answer.number));
  }

  const CacheShape shape_;
  const CachePolicy policy_;
  const ExecOptions options_;
  Facts facts_;
  mutable std::mutex mutex_;
  ChildProcess child_;
  std::string broken_;
  uint32_t sequence_ = 0;
  int64_t live_count_ = 0, claimed_ = 0;
  std::vector<char> live_;  // (layers * 2)
  std::vector<std::byte> sent_, received_;
};

class ExecCodec::UnitCodec final : public Codec {
 public:
  UnitCodec(std::shared_ptr<Talk> talk, const UnitShape& unit) : talk_(std::move(talk)), unit_(unit) {
    layout_.block_tokens = talk_->facts().block_tokens[unit.role == Role::kValue];
    layout_.sides = {{"row", DType::kF32, unit.channels(), true}};
  }
  int channels() const override { return unit_.channels(); }
  const CodeLayout& layout() const override { return layout_; }
  RopePlacement rope() const override { return unit_.rope; }
  TrainReport train(const TrainSet&, const Rng&) override { return {}; }

  // Says that a sequence has begun, and when it ends.
  struct State final : SequenceState {
    State(Talk& to, const UnitShape& of) : talk(to), unit(of) { talk.begin(unit.layer, unit.role); }
    ~State() override { talk.end(unit.layer, unit.role); }
    int64_t bytes() const override { return 0; }
    Talk& talk;
    UnitShape unit;
  };
  FitNeeds fit_needs() const override { return {.tokens = 1}; }
  std::unique_ptr<SequenceState> fit(ConstMatrix, ConstMatrix, ConstMatrix) const override {
    return std::make_unique<State>(*talk_, unit_);
  }

  void encode(ConstMatrix, CodeBlock&, const SequenceState*) const override {
    fail_internal("a codec in another program is told the positions of its rows");
  }
  void encode_at(ConstMatrix x, const EncodeContext& at, CodeBlock& out, const SequenceState* state) const override {
    VQKV_CHECK(state);
    check_encode_input(*this, x);
    out.resize(layout_, x.rows / layout_.block_tokens);
    if (x.rows > 0) talk_->code(unit_.layer, unit_.role, at.positions.front(), x, out.sides[0].data());
  }

  DecodePlan plan(const PlanQuery&) const override { return dense_plan(); }

  void save(ParameterWriter&) const override { fail_usage("a codec in another program can't be kept in a file"); }
  void load(const ParameterReader&) override { fail_internal("a codec in another program has no parameters here"); }

 private:
  std::shared_ptr<Talk> talk_;
  UnitShape unit_;
  CodeLayout layout_;
};

ExecCodec::ExecCodec(const CacheShape& shape, const CachePolicy& policy, const ExecOptions& options) {
  // Tokens given up before they were coded would never be handed over, nor could what the program claims shrink.
  if (policy.keep)
    fail_usage(
        fmt::format("exec:{}: a codec in another program codes every token; a policy that gives tokens up ({}) "
                    "needs a codec of this program",
                    options.command, policy.keep->text()));
  talk_ = std::make_shared<Talk>(shape, policy, options);
  std::vector<TrainedUnit> units;
  for (int layer = 0; layer < shape.layers; ++layer)
    for (const Role role : {Role::kKey, Role::kValue}) {
      TrainedUnit u;
      u.spec.method = "exec";
      u.spec.unit = {.role = role,
                     .head_dim = shape.head_dim,
                     .heads = shape.kv_heads,
                     .layer = layer,
                     .rope = role == Role::kKey ? talk_->facts().keys : RopePlacement::kPost,
                     .rope_facts = shape.rope};
      u.codec = std::make_shared<UnitCodec>(talk_, u.spec.unit);
      units.push_back(std::move(u));
    }
  codecs_ = std::make_shared<const CodecSet>(shape, talk_->config(), std::move(units), "");
}

std::shared_ptr<const ExecCodec> ExecCodec::under(const CachePolicy& policy) const {
  return std::make_shared<const ExecCodec>(codecs_->shape(), policy, talk_->options());
}
void ExecCodec::end_together(std::span<const std::shared_ptr<const ExecCodec>> programs) {
  std::vector<ChildProcess*> children;
  for (const auto& p : programs) children.push_back(p->talk_->leave());
  ChildProcess::end_together(children);
}
const std::string& ExecCodec::name() const { return talk_->facts().name; }
int64_t ExecCodec::claimed_bytes() const { return talk_->claimed_bytes(); }

}  // namespace vqkv
