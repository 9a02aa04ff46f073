#include "model/chat_template.h"

#include <map>
#include <set>

#include "core/error.h"
#include "support/catch.h"
#include "support/token_goldens.h"

using namespace vqkv;
using namespace vqkv::testing;

TEST_CASE("chat templates render what Jinja2 renders", "[chat]") {
  int rendered = 0, refused = 0;
  std::set<std::string> names;
  const std::map<std::string, ChatPrompt> prompts{{"none", ChatPrompt::kNone},
                                                  {"answer", ChatPrompt::kAnswer},
                                                  {"without thinking", ChatPrompt::kAnswerWithoutThinking}};
  for (const Json& row : token_golden("chat.json")) {
    std::vector<ChatMessage> messages;
    for (const Json& m : row["messages"]) messages.push_back({m[0].get<std::string>(), m[1].get<std::string>()});
    const auto name = row["template"].get<std::string>();
    const ChatPrompt prompt = prompts.at(row["prompt"].get<std::string>());
    INFO(row.dump());
    names.insert(name);
    if (row["text"].is_null()) {
      CHECK_THROWS_AS(render_chat(name, messages, prompt, "<BOS>", "<EOS>"), Error);
      ++refused;
    } else {
      CHECK(render_chat(name, messages, prompt, "<BOS>", "<EOS>") == row["text"].get<std::string>());
      ++rendered;
    }
  }
  CHECK(rendered >= 250);
  CHECK(refused >= 20);
  CHECK(names.size() == chat_template_names().size());
}

TEST_CASE("the normal form ignores formatting and nothing else", "[chat]") {
  const auto form = chat_template_normal_form;
  CHECK(form("{% if a %}{{ 'x\\n' }}{% endif %}") == form("{%if a%}\n  {{- \"x\n\" }}{%endif%}\n"));
  CHECK(form("{{ a }}{# c #}") == form("{{a}}"));
  CHECK(form("{{ a['b'] + \"c\" }}") == form("{{a[\"b\"]+'c'}}"));
  CHECK(form("{%- if x %}\n    {{- y }}\n{%- endif %}\n") == form("{% if x %}{{ y }}{% endif %}"));
  CHECK(form("{{ not a }}") != form("{{ nota }}"));
  CHECK(form("{{ 'a' }}") != form("{{ 'a ' }}"));
  CHECK(form("{{ 'a' }}") != form("{{ a }}"));
  CHECK(form("a {{ x }}") != form("a{{ x }}"));
  CHECK(form("{{ x }} ") != form("{{ x }}"));
  CHECK(form("{{ x }}\n\n") != form("{{ x }}"));
  CHECK(form("{% if a %}\n\nx") != form("{% if a %}\nx"));
  CHECK(form("{{ 'it\\'s' }}") == form("{{ \"it's\" }}"));
  CHECK(form("{{ '\\x41' }}") != form("{{ 'x41' }}"));
  CHECK(form("{{ '}}' }}") != form("{{ '' }}"));
  for (const char* broken : {"{{", "{%", "{#", "{{ 'a", "{% x", "{%-%}", "{{-}}", "{##}", "{%%}", "'\\"})
    CHECK_NOTHROW(form(broken));
}

TEST_CASE("unknown templates, names and roles are refused", "[chat]") {
  CHECK(chat_template_name("{{ messages }}").empty());
  CHECK(chat_template_name("").empty());
  CHECK(chat_template_name(
            "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
            "'<|im_end|>' + '\\n' }}\n{% endfor %}")
            .empty());
  const auto render = [](const char* name, const std::vector<ChatMessage>& messages,
                         ChatPrompt prompt = ChatPrompt::kAnswer) {
    return render_chat(name, messages, prompt, "", "");
  };
  CHECK_THROWS_WITH(render("vicuna", {{"user", "x"}}), Catch::Contains("known: smollm2"));
  CHECK_THROWS_AS(render("mistral-v9", {{"user", "x"}}), Error);
  CHECK_THROWS_AS(render("chatml", {}), Error);
  CHECK_THROWS_WITH(render("llama2", {{"assistant", "x"}}), Catch::Contains("wanted user"));
  CHECK_THROWS_AS(render("mistral-v0.2", {{"system", "x"}, {"user", "y"}}), Error);
  for (const char* name : {"qwen2.5", "qwen3", "qwen3-2507", "llama3.1", "llama3.2", "zephyr"})
    CHECK_THROWS_WITH(render(name, {{"tool", "42"}}), Catch::Contains("role \"tool\""));
  for (const std::string_view name : chat_template_names()) {
    const std::vector<ChatMessage> messages{{"user", "x"}};
    if (name == "qwen3") continue;
    CHECK_THROWS_WITH(render_chat(name, messages, ChatPrompt::kAnswerWithoutThinking, "", ""),
                      Catch::Contains("thinking cannot be switched off"));
  }
}
