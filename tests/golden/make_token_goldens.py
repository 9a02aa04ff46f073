#!/usr/bin/env python3
"""Makes tests/golden/data/tokens/: hard strings, small vocabularies, and the ids that independent tokenizers give them.

Run once, from the repository root, with data/models/SmolLM2-135M-Instruct.Q4_1.gguf there:
  python3 tests/golden/make_token_goldens.py [--llama-cpp]
Made with tokenizers 0.23.3, sentencepiece 0.2.3, gguf 0.19.0, and compared with llama-cpp-python 0.3.36
(--llama-cpp prints where it differs). The tests read only the files.

  strings.json            the strings, once
  smollm2.ids.json        the vocabulary and merges of the real GGUF, under Digits + ByteLevel, by `tokenizers`
  {gpt2,qwen2,llama-bpe,smollm}.tokenizer.json, .ids.json   vocabularies trained on data/*.txt and the strings under the
                          published expression; qwen2 with NFC, llama-bpe with ignore_merges and words that no merges build
  spm.model, spm.vocab.json, spm.ids.json    a SentencePiece BPE model with byte fallback, its scores, its own ids
ids.json: {"ids": plain text, "special": {index: ids where added tokens are recognised and that changes the ids}}
"""
import argparse, json, pathlib, random, re, sys, unicodedata

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/data/tokens"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
UNREACHABLE = ["\u0120unreachable", "hapax", "\u00e4\u00b8\u0143\u00e6\u0138\u0129"]  # the last: the bytes of 中文


def hard_strings():
    s = ["", " ", "  ", "   ", "\n", "\r\n", "\t", "a", " a", "a ", "  a  ", "\u00a0", "\u00a0\u00a0x", "x\u00a0y",
         "Hello, world!", "Hello world", " Hello  world ", "hello\nworld", "hello\n\nworld\n", "hello \n world",
         "tabs\tand\t\ttabs", "trailing   ", "   leading", "\n\n\n", " \n ", " \n\n  \n", "\r", "\r\r\n\n\r\n", "a\rb\r\nc\nd",
         "a\r\n\r\nb", "end \r\n", "x\n \n\ty", "\t\t\n\n  z", "a\u2028b\u2029c", "a\u0085b", " \u0085 ", "\u000b\u000c x \u000b"]
    # apostrophes
    for c in ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]:
        s += [f"it{c}", f"IT{c.upper()}", f"it{c} x", f"it {c}", f"{c}{c}", f"9{c}", f"it\u2019{c[1:]}", f"'{c.title()}"]
    s += ["it'\u017f", "IT'\u017fX", "don't", "DON'T", "I'Ll", "we'RE", "'sane", "'Tis", "rock'n'roll", "o'clock", "'''", "''s''t",
          "\u02bcs", "l\u2019\u00e9t\u00e9", "qu'il d'a"]
    # digits of every kind
    s += ["1", "12", "123", "1234", "12345678901234567890", " 1", "  1", " 12 345", "a1b2c3", "1a", "x 9", "x  99  y", "3.14159",
          "1,234,567.89", "-1", "+1e-10", "0x1F600", "2024-01-31T23:59:59Z", "192.168.0.1", "\u0661\u0662\u0663", "\u0967\u0968",
          "\u2167", "\u2460\u2461", "\u00bd\u00bc", "x\u00b2+y\u00b3", "\uff11\uff12\uff13\uff14", "\u4e00\u4e8c\u4e09", "1\u0301", "\U0001d7d8\U0001d7d9",
          "1st 2nd 3rd", "v1.2.3-rc4", "\u3007", "1 2  3   4", "\n1\n22\n333\n4444", "$1,000", "50%", "\u0e51\u0e52\u0e53", "12\u00a034"]
    # code
    s += ["def f(x):\n    return x**2\n", "int main(void) {\n\treturn 0;\n}\n", "if (a&&b||!c) { x+=1; }", "    for i in range(10):\n        print(i)",
          "SELECT * FROM t WHERE a='b';", "<html><body class=\"x\">&nbsp;</body></html>", "#include <stdio.h>", "a=b;c=d;;;;", "x->y::z<T>()",
          "https://example.org/a/b?c=d&e=f#g", "user@example.org", "C:\\Users\\x\\n", "/usr/lib/x86_64", "foo_bar_baz", "camelCaseHTTPServer",
          "__init__", "a--b---c", "====", "####", "```py\nx\n```", "{\"a\": [1, 2.5, null]}", "\\u0041\\n", "%s %d %%", "a/*b*/c//d", "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./",
          "...", "....", "?!", "!!!???", "--", "\u2014", "\u2026", "\u201cquoted\u201d", "\u00abguillemets\u00bb", "(a)(b)", "[[x]]", "a...b", "a . b"]
    # scripts
    s += ["\u00c4\u00d6\u00dc\u00e4\u00f6\u00fc\u00df", "na\u00efve caf\u00e9 r\u00e9sum\u00e9", "\u0130stanbul \u0131\u015f\u0131k", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
          "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u200f\u0627\u0644\u0639\u0631\u0628\u064a\u0629 abc \u200e123", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
          "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4e2d\u6587\u548cEnglish\u6df7\u5408", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
          "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0", "\u0531\u0580\u0565\u0582", "\u1f18\u03bd \u1f00\u03c1\u03c7\u1fc7", "\U00020000\U0002a6d6", "\u3042\u3099\u304b\u3099", "\u212b\u2126\u00c5", "\ufb01\ufb02\ufb03", "\uff21\uff22\uff43",
          "\u01c4\u01c5\u01c6", "\u00aa\u00ba", "\u2160\u2170", "\u02b0\u02b1", "\u1d2c", "\u2c00", "\U00010400\U00010428", "\u13a0\uab70", "\u0149", "\u1e9e"]
    # combining marks, normalisation
    s += ["e\u0301", "\u00e9", "a\u030a\u0323", "a\u0323\u030a", "\u1e69 s\u0323\u0307 s\u0307\u0323", "q\u0307\u0323", "\u0301", " \u0301", "x\u0301\u0302\u0303\u0304", "\u1100\u1161", "\uac00\u11a8", "\u0958", "\u0915\u093c",
          "\u2adc", "\u2add\u0338", ">\u0338", "=\u0338", "Z\u0351\u036b\u0343A\u0334L\u0321G\u0322O\u031b", "\u0344", "\u0340\u0341", "\u0374", "\u1fef", "\u2000\u2001x", "\u0f73", "\u09c7\u09be", "\U0001d15e", "\U0001d1bb"]
    # emoji, joiners, private use, non-characters, format characters
    s += ["\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", "\u2764\ufe0f", "1\ufe0f\u20e3", "\u263a", " \U0001f600 \U0001f602", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
          "\u200b", "a\u200bb", "\u200d", "\ufeffBOM", "\u2060", "\u00ad soft", "\u180e", "a \u180e b", "\ufffd", "\ufffd\ufffd\ufffd", "\ue000\uf8ff", "\uffff", "\U0010ffff", "\ufffe", "\U0001fffe",
          "\u0000", "a\u0000b", "\u0001\u0002\u0003", "\u001b[31mred\u001b[0m", "\u007f", "\u0080\u009f", "\u001c\u001d\u001e\u001f", " \u001f x", "\u202eabc\u202c", "\u2066x\u2069", "\u3000", "\u3000\u3000\u5168\u89d2",
          "\u1680x\u2003y\u202fz\u205f", "\u00a0\n\u00a0", " \u3000 a", "\u2007 \u2008"]
    # text that looks like broken or escaped bytes, and like the byte alphabet itself
    s += ["\u00c3\u00a9", "\u00ef\u00bb\u00bf", "\\xff\\xfe", "<0x0A>", "<0xE2><0x96><0x81>", "\u0120hello", "\u010a", "\u0120\u0120", "\u2581hello", "\u2581", "\u2581\u2581 x", "a\u2581b", "\u0100\u0101", "\u00ff\u00fe", "&#x1F600;", "%F0%9F%98%80", "=?utf-8?q?x?="]
    # special tokens, whole and broken
    s += ["<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>b", " <|im_end|> ", "<|im_end|><|im_end|>", "<|im_end|", "<|im_end |>", "<<|im_end|>>",
          "<|im_start|", "<|IM_END|>", "x<|endoftext|>", "<|endoftext|>x", "</s>", "<s>", "<unk>", "<s>[INST] hi [/INST]", "a</s> b", "<pad>", "\n<|im_end|>\n", "  <|im_start|>  ", "1<|im_end|>2",
          "<|\u0131m_end|>", "\u00e9<|im_end|>\u0301"]
    s += [" unreachable", "unreachable", "hapax", "hapax hapax", "\u4e2d\u6587"]
    # long runs
    s += ["a" * 1000, " " * 500, " " * 500 + "x", "\n" * 300, "ab" * 300, "9" * 400, "!" * 300, "\u00e9" * 200, "\U0001f600" * 60, "the " * 200, " \n" * 150, "\t" * 200 + "x", "'" * 101, "\u4e2d" * 150, "e\u0301" * 120,
          "aA1 " * 100, "=" * 80 + "\n" + "-" * 80, "\u0301" * 64, "x" * 63 + "y" * 65]
    # real text
    for name in ["jargon-0", "jargon-2", "kjv-0", "kjv-1"]:
        text = (ROOT / f"data/{name}.txt").read_text(encoding="utf-8")
        s += [text[k: k + 400] for k in (0, 9000, 21111)]
    # random mixtures of everything above and of assigned characters of the first planes
    rng = random.Random(20)
    assigned = [chr(c) for c in range(0x21, 0x2fa1e) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")]
    pieces = [p for p in s if 0 < len(p) < 12]
    for _ in range(60):
        s.append("".join(rng.choice(pieces) for _ in range(rng.randint(3, 9))))
    for _ in range(40):
        s.append("".join(rng.choice(assigned + [" ", " "] * 4000) for _ in range(rng.randint(5, 25))))
    return list(dict.fromkeys(s))


def byte_level(name, vocabulary=None, merges=None):
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama-bpe"))
    if name == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        split = pre_tokenizers.Split(Regex({"qwen2": QWEN2, "llama-bpe": LLAMA3}[name]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(path, value):
    (OUT / path).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{path}  {(OUT / path).stat().st_size} bytes", file=sys.stderr)


def write_ids(name, strings, plain, special):
    ids = [plain(t) for t in strings]
    with_special = {str(i): special(t) for i, t in enumerate(strings)}
    write(f"{name}.ids.json", {"ids": ids, "special": {i: v for i, v in with_special.items() if v != ids[int(i)]}})
    return ids


def train(name, strings):
    tokenizer = byte_level(name)
    corpus = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "data").glob("*.txt"))]
    corpus += [t for t in strings if not any(w in t for w in ("unreachable", "hapax", "\u4e2d\u6587"))] * 3
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=2600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    state = json.loads(tokenizer.to_str())
    if name == "llama-bpe":
        vocabulary = state["model"]["vocab"]
        for word in UNREACHABLE:
            assert word not in vocabulary, word
            vocabulary[word] = len(vocabulary)
    plain = Tokenizer.from_str(json.dumps(state))
    special = Tokenizer.from_str(json.dumps(state))
    special.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    (OUT / f"{name}.tokenizer.json").write_text(special.to_str())
    write_ids(name, strings, lambda t: plain.encode(t).ids, lambda t: special.encode(t).ids)


def smollm2(strings, compare):
    path = ROOT / "data/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    plain, special = byte_level("smollm", vocabulary, merges), byte_level("smollm", vocabulary, merges)
    special.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k == 3])
    ids = write_ids("smollm2", strings, lambda t: plain.encode(t).ids, lambda t: special.encode(t).ids)
    if compare:
        from llama_cpp import Llama
        model = Llama(str(path), vocab_only=True, verbose=False)
        for text, wanted in zip(strings, ids):
            got = model.tokenize(text.encode(), add_bos=False, special=False)
            if got != wanted:
                print(f"llama.cpp differs: {text[:60]!r}: {got[:20]} instead of {wanted[:20]}")


def spm(strings):
    corpus = [line for p in sorted((ROOT / "data").glob("*.txt")) for line in p.read_text(encoding="utf-8").splitlines()]
    prefix = OUT / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(prefix), vocab_size=1200, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, character_coverage=0.9995,
        allow_whitespace_only_pieces=True, user_defined_symbols=["<tool>", "\u2581\u2581\u2581\u2581"], num_threads=1, minloglevel=2)
    (OUT / "spm.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(str(prefix) + ".model")
    def kind(i):
        return 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 5 if model.is_unused(i) else \
            4 if model.id_to_piece(i) in ("<tool>", "\u2581\u2581\u2581\u2581") else 1
    n = model.get_piece_size()
    write("spm.vocab.json", {"tokens": [model.id_to_piece(i) for i in range(n)], "scores": [model.get_score(i) for i in range(n)],
                             "types": [kind(i) for i in range(n)]})
    def special(text):   # as transformers' slow Llama tokenizer: each stretch between control tokens is a text of its own
        parts = re.split("(<s>|</s>)", text)
        return [i for p in parts if p for i in ([model.piece_to_id(p)] if p in ("<s>", "</s>") else model.encode(p))]
    write_ids("spm", strings, model.encode, special)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--llama-cpp", action="store_true", help="print where llama.cpp's ids of the real model differ")
arguments = parser.parse_args()
OUT.mkdir(parents=True, exist_ok=True)
strings = hard_strings()
print(f"{len(strings)} strings", file=sys.stderr)
write("strings.json", strings)
smollm2(strings, arguments.llama_cpp)
for name in ("gpt2", "smollm", "qwen2", "llama-bpe"):
    train(name, strings)
spm(strings)
