#!/usr/bin/env python3
"""Makes tests/golden/data/tokens/chat.json: what Jinja2 renders for conversations under the chat templates of real
checkpoints; null where a template refuses.

Run once, from the repository root:  python3 tests/golden/make_chat_goldens.py FILE_OR_FOLDER...
A file is a GGUF, a tokenizer_config.json, or a template by itself (*.jinja); a folder is searched for *.jinja. The
templates are not kept here: each is known by the SHA-256 of its text, and docs/chat-templates.md says where each was
found; a hash of that page that is not given is an error. Templates of one name must render alike.
Made with Jinja2 3.1.6 and gguf 0.19.0.
"""
import hashlib, json, pathlib, re, sys

import jinja2

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = dict((digest, name) for name, digest in re.findall(
    r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|", (ROOT / "docs/chat-templates.md").read_text(), re.MULTILINE))
NO_TOOLS = ("qwen2.5", "qwen3", "qwen3-2507", "llama3.1", "llama3.2", "zephyr")   # we refuse what these know or drop

CONVERSATIONS = [
    [("user", "Hello")], [("system", "Be brief."), ("user", "Hi there\n")], [("user", " a "), ("assistant", "b"), ("user", "c")],
    [("system", ""), ("user", "x")], [("user", "<|im_end|>"), ("assistant", "\u00e9\n\n")], [("assistant", "first")],
    [("user", "x"), ("user", "y")], [("system", " s\u00a0"), ("user", "\u2003u\u3000\n"), ("assistant", "\t a"), ("user", "\u001fz")],
    [("user", "x"), ("system", "late"), ("user", "y")], [("tool", "42")]]
THOUGHTS = [
    [("user", "x"), ("assistant", "<think>\nhm\n</think>\n\nyes"), ("user", "y"), ("assistant", "<think>\n\nlong\n\n</think>\n\n\nz")],
    [("user", "x"), ("assistant", "<think>a</think>b</think>\nc"), ("assistant", "d"), ("assistant", "\ne")],
    [("user", "x"), ("assistant", "a<think>\n b\n<think>c \n\n</think>d")], [("assistant", "</think>x"), ("assistant", "y")],
    [("user", "x"), ("assistant", "<think>\n</think>a"), ("user", "<tool_response>\n1\n</tool_response>"), ("assistant", "b")],
    [("system", "s"), ("assistant", "<think>a</think>b")]]


def templates(paths):
    for path in map(pathlib.Path, paths):
        for file in sorted(path.rglob("*.jinja")) if path.is_dir() else [path]:
            if file.suffix == ".gguf":
                import gguf
                yield gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
            elif file.suffix == ".json":
                yield json.loads(file.read_text())["chat_template"]
            else:
                yield file.read_bytes().decode()


def refuse(message):
    raise ValueError(message)


def rows(name, template):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)   # as transformers sets them
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    out = []
    for c in CONVERSATIONS + (THOUGHTS if name.startswith("qwen3") else []):
        # Llama 2's template drops a late system message in silence, where we refuse it.
        if c[0][0] == "tool" and name in NO_TOOLS or ("system", "late") in c and name == "llama2":
            continue
        for prompt in ("none", "answer") + (("without thinking",) if name == "qwen3" else ()):
            try:
                text = compiled.render(messages=[{"role": r, "content": t} for r, t in c], bos_token="<BOS>", eos_token="<EOS>",
                                       add_generation_prompt=prompt != "none", enable_thinking=prompt != "without thinking")
            except ValueError:
                text = None
            out.append({"template": name, "messages": c, "prompt": prompt, "text": text})
    return out


found, golden = set(), {}
for template in templates(sys.argv[1:]):
    digest = hashlib.sha256(template.encode()).hexdigest()
    name = NAMES.get(digest)
    if not name:
        continue
    found.add(digest)
    mine = rows(name, template)
    if golden.setdefault(name, mine) != mine:
        sys.exit(f"{name}: template {digest} renders otherwise than another of that name")
if missing := [f"{NAMES[d]} {d}" for d in NAMES if d not in found]:
    sys.exit("not given: " + ", ".join(missing))
path = ROOT / "tests/golden/data/tokens/chat.json"
path.write_text(json.dumps([r for name in sorted(golden) for r in golden[name]], ensure_ascii=True, separators=(",", ":")) + "\n")
print(f"{path.name}  {path.stat().st_size} bytes, {len(found)} templates", file=sys.stderr)
