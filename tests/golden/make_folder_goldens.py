#!/usr/bin/env python3
"""Makes tests/golden/data/folders/: tokenizer folders as users have them, and the ids that transformers gives texts in them.

Run from the repository root with transformers 5.24.0 (tokenizers 0.23.3, sentencepiece 0.2.3), then with transformers
4.57.6 and --compare, which notes in the file where the two differ; both twice where llama4.json is not there yet. The
tests read only the files.

  spm.model       a SentencePiece BPE model of 600 pieces with byte fallback
  bpe.json        a byte-level tokenizer.json of 510 tokens, no added ones
  llama.json, mistral.json    what transformers 5 saves of spm.model for a Llama and a Mistral folder
  llama4.json     what transformers 4 saves of it (--compare writes it): its normalizer prepends
  folders.json    the texts; and of each folder its files, the ids of each text with special tokens recognised ("ids",
                  BOS in front where transformers puts one) and as plain text ("plain"), and the number of tokens
"""
import argparse, copy, json, os, pathlib, shutil, sys, tempfile

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/data/folders"
TEXTS = ["<|im_start|>user\nHi<|im_end|>", "the <s>x", " the", "a</s> b", "a<think>b", "", "  two", "a\nb", "\u00e9\u4e2d\U0001f600", "\u2581x", "\n",
         "<s>the", "<unk>x", "Hello world, it is 1999.", " <|im_start|> x", "x </s>", "the the", "<|im_start|><|im_end|>", "a <think> b"]
IM = {"<|im_start|>": 600, "<|im_end|>": 601}


def token(content, special=True, **more):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special, **more}


def decoder(ids, special=True):
    return {str(i): token(t, special) for t, i in ids.items()}


def template(bos):
    start = [{"SpecialToken": {"id": bos[0], "type_id": 0}}] if bos else []
    a = {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": start + [a], "pair": start + [a, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}} if bos else {}}


def corpus():
    return [line for p in sorted((ROOT / "data").glob("*.txt")) for line in p.read_text(encoding="utf-8").splitlines()]


def make_bases():
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(OUT / "spm"), vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, character_coverage=0.9995,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    (OUT / "spm.vocab").unlink()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=510, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    (OUT / "bpe.json").write_text(bpe.to_str())
    save("llama.json", {"legacy": False})
    save("mistral.json", {"legacy": True}, "mistral")


def save(name, settings, model_type="llama"):
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
        write_folder(pathlib.Path(folder), {"tokenizer.model": "spm.model", "tokenizer_config.json": config, "config.json": {"model_type": model_type}})
        AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
        text = json.loads((pathlib.Path(saved) / "tokenizer.json").read_text())
        (OUT / name).write_text(json.dumps(text, ensure_ascii=False, separators=(",", ":")))


def folders():
    llama = {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1}  # as LLaMA's first conversions have it
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    spm = {"tokenizer.model": "spm.model", "config.json": llama, "tokenizer_config.json": config}
    yield "spm", spm
    yield "spm, no bos", {**spm, "tokenizer_config.json": {**config, "add_bos_token": False}}
    yield "spm, added_tokens.json", {**spm, "added_tokens.json": IM}
    yield "spm, added_tokens_decoder", {**spm, "tokenizer_config.json": {**config, "added_tokens_decoder": decoder(IM)}}
    yield "spm, added tokens that are not special", {**spm, "tokenizer_config.json": {**config, "added_tokens_decoder": decoder(IM, False)}}
    yield "spm, legacy", {**spm, "config.json": {**llama, "model_type": "mistral"},
                          "tokenizer_config.json": {**config, "legacy": True, "added_tokens_decoder": decoder(IM)}}
    yield "spm, legacy, Llama class", {**spm, "tokenizer_config.json": {**config, "legacy": True}}
    yield "spm, legacy not told, Llama class", {**spm, "tokenizer_config.json": {k: v for k, v in config.items() if k != "legacy"}}

    bos = {"<s>": 510, "</s>": 511}
    think = {"<think>": 512}
    def bpe(**more):
        return {"base": "bpe.json", "set": {"added_tokens": [{"id": i, **token(t)} for t, i in bos.items()], "post_processor": template(("<s>", 510)), **more}}
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    plain = {"tokenizer.json": bpe(), "config.json": {"model_type": "llama"}, "tokenizer_config.json": fast}
    yield "bpe", plain
    yield "bpe, added_tokens.json", {**plain, "added_tokens.json": think}
    yield "bpe, added_tokens_decoder", {**plain, "tokenizer_config.json": {**fast, "added_tokens_decoder": {**decoder(bos), **decoder(think, False)}}}
    yield "bpe, added_tokens_decoder, special", {**plain, "tokenizer_config.json": {**fast, "added_tokens_decoder": decoder(think)}}
    none = bpe(post_processor=template(None))
    yield "bpe, the template has bos and the flag does not", {**plain, "tokenizer_config.json": {**fast, "add_bos_token": False}}
    yield "bpe, the flag has bos and the template does not", {**plain, "tokenizer.json": none, "tokenizer_config.json": {**fast, "add_bos_token": True}}
    yield "bpe, Llama class, the flag and the template agree", {**plain, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", **names, "add_bos_token": True}}
    yield "bpe, Llama class, both say no", {**plain, "tokenizer.json": none, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", **names, "add_bos_token": False}}
    both = {**spm, "tokenizer.json": {"base": "llama.json", "set": {}}}
    yield "spm and tokenizer.json", both
    yield "spm and tokenizer.json, added there", {**both, "tokenizer.json": {"base": "llama.json", "set": {"added_tokens": [
        {"id": i, **token(t)} for t, i in {"<unk>": 0, "<s>": 1, "</s>": 2, **IM}.items()]}}}


def json_folders():
    def folder(base, model_type, settings, added=None):
        change = {} if added is None else {"added_tokens": [{"id": i, **t} for i, t in added]}
        return {"tokenizer.json": {"base": base, "set": change}, "config.json": {"model_type": model_type},
                "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}}
    im = [(0, token("<unk>")), (1, token("<s>")), (2, token("</s>")), (600, token("<|im_start|>")), (601, token("<|im_end|>")),
          (602, token("<think>", False, normalized=True))]
    yield "llama.json as saved", folder("llama.json", "llama", {"tokenizer_class": "LlamaTokenizer"})
    yield "llama.json, legacy", folder("llama.json", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    yield "llama.json, any class", folder("llama.json", "llama", {"tokenizer_class": "PreTrainedTokenizerFast"})
    yield "llama.json, added tokens", folder("llama.json", "llama", {"tokenizer_class": "LlamaTokenizer"}, im)
    yield "mistral.json as saved", folder("mistral.json", "mistral", {"tokenizer_class": "TokenizersBackend"})
    yield "mistral.json, added tokens", folder("mistral.json", "mistral", {"tokenizer_class": "TokenizersBackend"}, im)
    if (OUT / "llama4.json").exists():
        yield "llama4.json in a Mistral folder", folder("llama4.json", "mistral", {"tokenizer_class": "LlamaTokenizer"})
        yield "llama4.json, any class", folder("llama4.json", "llama", {"tokenizer_class": "PreTrainedTokenizerFast"})
        yield "llama4.json, any class, added tokens", folder("llama4.json", "llama", {"tokenizer_class": "PreTrainedTokenizerFast"}, im)
        yield "llama4.json, Llama class", folder("llama4.json", "llama", {"tokenizer_class": "LlamaTokenizer"})


def write_folder(path, files):
    for name, content in files.items():
        if isinstance(content, str):
            shutil.copy(OUT / content, path / name)
        elif "base" in content:
            (path / name).write_text(json.dumps({**json.loads((OUT / content["base"]).read_text()), **content["set"]}))
        else:
            (path / name).write_text(json.dumps(content))


def answers(files):
    with tempfile.TemporaryDirectory() as folder:
        write_folder(pathlib.Path(folder), files)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return {"ids": [tokenizer(t)["input_ids"] for t in TEXTS],
                "plain": [tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in TEXTS],
                "size": len(tokenizer), "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="with transformers 4: note where its ids differ")
    compare = parser.parse_args().compare
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "folders.json"
    if compare:
        assert transformers.__version__ == "4.57.6", transformers.__version__
        save("llama4.json", {"legacy": True})
        golden = json.loads(path.read_text())
        for case in golden["folders"]:
            try:
                old = answers(case["files"])
            except ValueError as error:   # a class of transformers 5
                case["transformers 4"] = str(error).split(" does")[0] + " is not known"
                continue
            case["transformers 4"] = [what for what in ("ids", "plain", "size", "bos", "eos") if old[what] != case[what]]
    else:
        assert transformers.__version__ == "5.24.0", transformers.__version__
        if not (OUT / "spm.model").exists():
            make_bases()
        golden = {"texts": TEXTS, "folders": []}
        for name, files in [*folders(), *json_folders()]:
            golden["folders"].append({"name": name, "files": files, **answers(files)})
    lines = [json.dumps(case, separators=(",", ":")) for case in golden["folders"]]
    path.write_text('{"texts":' + json.dumps(golden["texts"]) + ',"folders":[\n' + ",\n".join(lines) + "\n]}\n")
    for case in golden["folders"]:
        print(case["name"], case.get("transformers 4", ""), file=sys.stderr)


if __name__ == "__main__":
    main()
