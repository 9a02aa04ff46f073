"""scripts/dump_hf.py with torch and transformers: gradients by autograd are those of `vqkv-dump capture --gradients`, and of
a multimodal model the tokens of an image are marked as such and can be coded alone.

    python3 -m venv /tmp/hf && /tmp/hf/bin/pip install -r tests/scripts/check_dump_hf.txt
    /tmp/hf/bin/python tests/scripts/check_dump_hf.py build/release/bin

Not in CI: torch is 2 GB and more. There test_dump_hf.py runs the writing half, without the framework.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import h5py
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from tiny_codecs import root

DUMP, TINY = root / "scripts/dump_hf.py", root / "tests/golden/tiny"
TOLERANCE = 2e-3  # of squares, which are bf16 on both sides
PATCHES = 16      # of an image: 16 x 16 pixels in patches of 4
TEXT_SIZES = dict(vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16)


def run(*command, fails=False):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout}{done.stderr}"
    return done.stderr if fails else done.stdout


def dump(*arguments, fails=False):
    return run(sys.executable, DUMP, *arguments, "--dtype", "f32", fails=fails)


def gradients(binaries, folder):
    """Of each tiny model, by both tools, in two documents and four windows."""
    vocabulary, rng = 96, np.random.default_rng(3)
    documents = [folder / f"{i}.json" for i in range(2)]
    for path, n in zip(documents, (150, 90)):
        path.write_text(json.dumps(rng.integers(0, vocabulary, n).tolist()))
    for name in ("llama", "qwen2", "qwen3", "mistral"):
        theirs, ours = folder / f"{name}.hf.trace.h5", folder / f"{name}.trace.h5"
        common = ("--model", TINY / name, "--token-ids", *documents, "--context", 100, "--gradients", "next-token")
        dump(*common, "-o", theirs)
        run(binaries / "vqkv-dump", "capture", *common, "--dtype", "f32", "-o", ours)
        run(binaries / "vqkv-dump", "verify", theirs)
        compared = run(sys.executable, root / "tests/scripts/compare_traces.py", theirs, ours, TOLERANCE)
        worst = max(float(line.split()[1]) for line in compared.splitlines() if "gradient" in line)
        assert compared.count("gradient") == 6
        print(f"{name}: gradients differ by {worst:.1e} at most")


def tokenizer():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    model.pre_tokenizer, model.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=model, extra_special_tokens={"image_token": "<image>"})
    out.add_special_tokens({"pad_token": "<pad>"})
    return out


def llava(folder):
    """Random weights: a CLIP that sees 16 x 16 pixels, a Llama that reads bytes."""
    tokens = tokenizer()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                                    image_size=16, patch_size=4),
        text_config=transformers.LlamaConfig(**TEXT_SIZES), image_token_id=tokens.convert_tokens_to_ids("<image>"), image_seq_length=PATCHES)
    torch.manual_seed(1)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(images, tokens, patch_size=4, vision_feature_select_strategy="default",
                                num_additional_image_tokens=1).save_pretrained(folder)
    return config.image_token_id


def images(binaries, folder):
    model, out = folder / "llava", folder / "llava.trace.h5"
    token = llava(model)
    rng, texts, pictures = np.random.default_rng(5), [], []
    for i, text in enumerate(("USER: <image>\nWhat is that? ASSISTANT: noise", "nothing but noise, and some words about it", "a: <image> b")):
        texts.append(folder / f"{i}.txt")
        texts[-1].write_text(text)
        pictures.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 255, (20, 16 + 2 * i, 3), dtype="u1")).save(pictures[-1])
    prompts = ("--model", model, "--image", *pictures, "--text", *texts)
    dump(*prompts, "--gradients", "next-token", "-o", out)
    run(binaries / "vqkv-dump", "verify", out)
    facts = json.loads(run(binaries / "vqkv-dump", "inspect", out, "--json", "-q"))
    assert facts["tokens_by_type"] == {"image": 3 * PATCHES, "text": facts["tokens"] - 3 * PATCHES}, facts["tokens_by_type"]
    with h5py.File(out) as f:
        assert np.array_equal(f["token_type"][...], (f["token_id"][...] == token).astype("i4"))
        first = f["token_type"][...][f["doc"][...] == 0]
        assert list(np.flatnonzero(first)) == list(range(6, 6 + PATCHES))  # behind "USER: "
        # What is seen of a picture is in the keys of its tokens: they differ from each other, and from another picture's.
        image = [f["value"][0, 0][(f["doc"][...] == d) & (f["token_type"][...] == 1)] for d in (0, 1)]
        assert np.ptp(image[0], axis=0).max() > 1e-3 and np.abs(image[0] - image[1]).max() > 1e-3
    sweep, plan, results = folder / "s.yaml", folder / "p.jsonl", folder / "out"
    sweep.write_text("codec: {name: calibquant, preset: b4}\ncontexts: [256]\n")
    run(binaries / "vqkv-sweep", "plan", sweep, f"trace.path={out}", "trace.report=[0, 1, 2]", "-o", plan)
    run(binaries / "vqkv-sweep", "run", plan, "-o", results)
    (record,) = [json.loads(line) for path in (results / "results").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert record["status"] == "ok" and record["flags"] == [], record
    assert record["config"]["cache"]["coded"] == "image"
    kl = next(m["value"] for m in record["measurements"] if m["tag"] == "attention.softmax_kl" and m["role"] == "report")
    assert kl > 0
    print(f"llava: {PATCHES} image tokens a prompt, softmax KL {kl:.2g} with them at 4 bits")
    assert "an image can't be cut" in dump(*prompts, "--context", 30, "-o", out, fails=True)
    assert "2 images and 3 texts" in dump("--model", model, "--image", *pictures[:2], "--text", *texts, "-o", out, fails=True)


def main():
    binaries = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        gradients(binaries, pathlib.Path(folder))
        images(binaries, pathlib.Path(folder))
    print(f"ok: transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
