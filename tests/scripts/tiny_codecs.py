"""What the tests of scripts/vqkv.py share: the tools over a tiny committed model, and codec archives made with them."""
import json
import pathlib
import subprocess
import sys

import numpy as np

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / "scripts"))
MODEL = root / "tests/golden/tiny/qwen3"
CONTEXT, DOCUMENTS = 320, 4


class Tools:
    """vqkv-dump, vqkv-sweep and vqkv-eval in `binaries`; what they write lies in `folder`."""

    def __init__(self, binaries, folder):
        self.binaries, self.folder = pathlib.Path(binaries), pathlib.Path(folder)
        vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
        rng = np.random.default_rng(11)
        self.ids = [rng.integers(0, vocabulary, CONTEXT).tolist() for _ in range(DOCUMENTS)]
        self.documents = []
        for i, ids in enumerate(self.ids):
            self.documents.append(str(self.folder / f"{i}.json"))
            pathlib.Path(self.documents[-1]).write_text(json.dumps(ids))
        self.trace = str(self.folder / "t.trace.h5")
        self.run("vqkv-dump", "capture", "--model", MODEL, "--token-ids", *self.documents, "--context", CONTEXT,
                 "--query-stride", 1, "--gradients", "next-token", "-o", self.trace)

    def run(self, tool, *arguments):
        """stdout, as JSON; a tool that fails ends the test with its words."""
        command = [str(self.binaries / tool), *map(str, arguments), "--json", "-q"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return json.loads(done.stdout) if done.stdout else None

    def archive(self, name, text, group=""):
        """NAME.codec.h5 of a cell, given as the text of its YAML file, trained on all documents but the last."""
        sweep, plan, out = (str(self.folder / (name + end)) for end in (".yaml", ".plan.jsonl", ".out"))
        pathlib.Path(sweep).write_text(text)
        last = DOCUMENTS - 1
        self.run("vqkv-sweep", "plan", sweep, f"trace.path={self.trace}", f"trace.train={list(range(last))}",
                 f"trace.report=[{last}]", "metrics=[value_nmse]", *(["--group", group] if group else []), "-o", plan)
        cells = [json.loads(line) for line in open(plan)][1:]
        assert len(cells) == 1 and "skip" not in cells[0], cells[0].get("skip")
        self.run("vqkv-sweep", "run", plan, "-o", out, "--keep-codecs")
        path = str(self.folder / (name + ".codec.h5"))
        self.run("vqkv-sweep", "export", out, "--cell", cells[0]["id"], "-o", path)
        return path


def refused(kind, words, call):
    try:
        call()
    except kind as e:
        assert words in str(e), e
        return
    raise AssertionError(f"not refused: {words}")
