"""Runs an experiment with vqkv's tools: one trace for all, sweeps, replays in slices; run again, it goes on where it was.

The `run` of an experiment makes an Experiment of its own path, asks it for sweeps and replays, and writes tables:

    x = Experiment(__file__, __doc__)
    cells = x.sweep("ablation")                        # the group of its plan.yaml; `test` in its stead under --test
    rows = x.replay("held", cells, x.held(), context=384)
    x.write_summary(...)

Exit: 0 all is there; 1 a tool failed, or a cell can't be coded; 2 usage; 75 --minutes are over, run again to go on; 130
interrupted.
"""
import argparse
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import time

from . import store, tables

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT_OF_TIME = 75
DOCUMENTS = [f"data/{name}.txt" for name in ("jargon-0", "jargon-1", "jargon-2", "jargon-3", "kjv-0", "kjv-1", "kjv-2")]
REPORTED = (3, 6)  # documents that sweeps report on: nothing learns from them, nothing is chosen on them (setup.yaml)


@dataclasses.dataclass
class Cell:
    """A finished cell of a sweep."""
    store: str    # its folder
    part: str     # the group of the plan that it is of
    line: dict    # of plan.jsonl
    record: dict  # what the sweep measured
    label: str = ""

    @property
    def id(self):
        return self.line["id"]

    @property
    def name(self):
        """What its codec is called in a replay's rows."""
        return self.line["cell"][:12]

    @property
    def axes(self):
        return {**self.line["axes"], **self.line["repeat"]}

    def value(self, tag, role="report", context=None, sequences=None, what="value"):
        return store.value(self.record, role, tag, context, sequences, what)


class Experiment:
    def __init__(self, file, about, arguments=None):
        self.folder = pathlib.Path(file).resolve().parent
        self.name = self.folder.name
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--test", action="store_true", help="the `test` groups of the plan on few tokens: seconds")
        parser.add_argument("--bin", default="build/release/bin", help="where vqkv-dump, vqkv-sweep and vqkv-eval lie")
        parser.add_argument("--out", help="folder of all runs (default: out/experiments, out/experiments-test with --test)")
        parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell and no replay after so long")
        parser.add_argument("--tables", action="store_true", help="run nothing: tables of what is there already")
        self.options = parser.parse_args(arguments)
        self.test = self.options.test
        self.bin = pathlib.Path(self.options.bin).resolve()
        self.runs = pathlib.Path(self.options.out or ("out/experiments-test" if self.test else "out/experiments"))
        if not self.runs.is_absolute():
            self.runs = ROOT / self.runs
        self.out = self.runs / self.name
        self.out.mkdir(parents=True, exist_ok=True)
        self.trace = self.runs / "smollm2.trace.h5"
        self.start = time.monotonic()
        self.complete = True  # nothing was left out
        self._model = None

    # ---- Tools ----

    def say(self, text):
        print(f"== {self.name}: {text}", file=sys.stderr, flush=True)

    def tool(self, name, *arguments):
        """stdout of a tool; its messages go to stderr. Where it fails, so does the experiment."""
        command = [str(self.bin / name), *map(str, arguments)]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            sys.exit(f"{command[0]} is not there: scripts/build release vqkv-dump vqkv-sweep vqkv-eval, or --bin FOLDER")
        except KeyboardInterrupt:
            sys.exit(130)
        if done.returncode:
            print(f"exit {done.returncode} of: {' '.join(command)}", file=sys.stderr)
            sys.exit(130 if done.returncode in (130, -2) else 1)
        return done.stdout

    def model(self):
        if self._model is None:
            done = subprocess.run([ROOT / "scripts/get-model"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)
            self._model = done.stdout.strip()
        return self._model

    def seconds_left(self):
        return 60 * self.options.minutes - (time.monotonic() - self.start)

    def may_run(self):
        """False, and remembered, where nothing may be started."""
        if not self.options.tables and self.seconds_left() > 0:
            return True
        self.complete = False
        return False

    # ---- Trace ----

    def capture(self):
        """What all experiments sweep: 7 documents, a window of 2,560 tokens each, all queries, squared gradients."""
        if self.trace.exists() or not self.may_run():
            return
        tokens = 160 if self.test else 2560
        self.say(f"capture of {len(DOCUMENTS)} documents, {tokens} tokens each")
        self.tool("vqkv-dump", "capture", "--model", self.model(), "--context", tokens, "--max-tokens", tokens,
                  "--query-stride", 1, "--gradients", "next-token", "-o", self.trace, "-q", "--text", *DOCUMENTS)

    # ---- Sweeps ----

    def parts(self, *groups):
        """The groups to sweep: those given or, under --test, `test` alone, once all the others could be planned."""
        self.capture()
        if not self.test:
            return groups
        for group in groups:
            self._plan(group, self.out / f"{group}.planned.jsonl")
        return ("test",)

    def _plan(self, group, path):
        trace = self.trace.relative_to(ROOT) if self.trace.is_relative_to(ROOT) else self.trace
        self.tool("vqkv-sweep", "plan", self.folder / "plan.yaml", f"trace.path={trace}", "--group", group, "-o", path, "-q")
        with open(path) as f:
            cells = [json.loads(line) for line in f][1:]
        for cell in cells:
            if "skip" in cell and not cell["skip"].startswith("sweep.skip["):
                sys.exit(f"{self.folder / 'plan.yaml'}, group {group}: a cell can't be coded: {cell['skip']}\n{cell['axes']}")
        return cells

    def _take_trained(self, planned, folder):
        """Codecs that another sweep trained serve here as well: a training's name says all that decides it."""
        own = folder / "codecs"
        taken = 0
        for name in {f"{cell['train_id'][:16]}.codec.h5" for cell in planned if "train_id" in cell}:
            there = next((p for e in sorted(self.folder.parent.iterdir()) for p in (self.runs / e.name).glob(f"*/codecs/{name}")), None)
            if there is None or (own / name).exists():
                continue
            own.mkdir(parents=True, exist_ok=True)
            try:
                os.link(there, own / name)
                taken += 1
            except OSError:  # of another file system, or there by now: trained anew
                pass
        if taken:
            self.say(f"{taken} trainings were made before")

    def sweep(self, group, label=store.label_at_bits):
        """The finished cells of a group, in the order of the plan. `label(line, record)` names them; two of one name are an
        error. Without time left, or under --tables, what is there."""
        self.capture()
        folder, plan = self.out / group, self.out / f"{group}.jsonl"
        if self.may_run():
            planned = self._plan(group, plan)
            self.say(f"sweep {group}: {len(planned)} cells")
            self._take_trained(planned, folder)
            budget = [] if math.isinf(self.options.minutes) else ["--time-budget", f"{max(1, int(self.seconds_left()))}s"]
            self.tool("vqkv-sweep", "run", plan, "-o", folder, "--keep-codecs", *budget, *(["-q"] if self.test else []))
        if not (folder / "plan.jsonl").exists():
            return []
        cells = [Cell(str(folder), group, line, record, label(line, record))
                 for line, record in store.cells_of(folder).values()]
        with open(folder / "plan.jsonl") as f:
            missing = sum("skip" not in json.loads(line) for line in f) - 1 - len(cells)
        if missing:
            self.complete = False
            self.say(f"sweep {group}: {missing} cells are not there")
        self.require_names(cells)
        return cells

    @staticmethod
    def require_names(cells):
        seen = {}
        for c in cells:
            if seen.setdefault(c.label, c) is not c:
                sys.exit(f"two cells are called {c.label}: {seen[c.label].id} and {c.id}")

    # ---- Replays ----

    def held(self):
        """Texts that no sweep trained or chose on: 14 documents; one of each domain under --test."""
        texts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "data/held").glob("*.txt"))
        return [texts[0], texts[-1]] if self.test else texts + [DOCUMENTS[i] for i in REPORTED]

    def export(self, cell):
        path = self.out / "codecs" / f"{cell.name}.codec.h5"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            self.tool("vqkv-sweep", "export", cell.store, "--cell", cell.id, "-o", path, "-q")
        return path

    def replay(self, name, codecs, texts, context, windowless=True, each=8, ids=False, arguments=()):
        """Label of a codec -> its row of `vqkv-eval replay`, and of protocol rows under their own names; rows without a
        window have " (no window)" behind it. `codecs`: cells, or paths of cell files. One window of `context` tokens of each
        text, or file of token ids. Codecs are replayed `each` at a time and kept in OUT/replay-NAME."""
        folder = self.out / f"replay-{name}"
        folder.mkdir(exist_ok=True)
        asked = ["--context", context, "--windows", len(texts), *arguments, *([] if windowless else ["--skip-no-window"]),
                 "--token-ids" if ids else "--text", *texts]
        self._same_request(folder / "request.json", {"arguments": list(map(str, asked)), "model": pathlib.Path(self.model()).name})
        def name_of(codec):
            return codec.name if isinstance(codec, Cell) else pathlib.Path(codec).stem
        labels = {name_of(c): c.label if isinstance(c, Cell) else name_of(c) for c in codecs}
        rows = self._replayed(folder)
        left = [c for c in codecs if name_of(c) not in rows]
        for first in range(0, len(left), each):
            if not self.may_run():
                self.say(f"replay {name}: {len(left) - first} codecs are not there")
                break
            some = left[first:first + each]
            self.say(f"replay {name}: {', '.join(labels[name_of(c)] for c in some)}; {len(left) - first - len(some)} more are left")
            paths = [self.export(c) if isinstance(c, Cell) else ROOT / c for c in some]
            number = len(list(folder.glob("slice-*.json")))
            self.tool("vqkv-eval", "replay", "--model", self.model(), *(x for p in paths for x in ("--codec", p)), *asked,
                      "--format", "jsonl", "-o", folder / f"slice-{number:03}.json", *(["-q"] if self.test else []))
            rows = self._replayed(folder)

        def named(row):
            base, bare, rest = row.partition(" (no window)")
            return labels.get(base, base) + bare + rest
        return {named(k): r for k, r in rows.items() if k.partition(" (no window)")[0] in labels or self.is_protocol(k)}

    @staticmethod
    def is_protocol(label):
        return label.startswith(("self-noise", "streaming"))

    @staticmethod
    def _same_request(path, request):
        if path.exists():
            with open(path) as f:
                if json.load(f) != request:
                    sys.exit(f"{path.parent} holds replays that were asked for otherwise ({path.name}); move it away")
        else:
            path.write_text(json.dumps(request, indent=1) + "\n")

    @staticmethod
    def _replayed(folder):
        rows = {}
        for path in sorted(folder.glob("slice-*.json")):
            with open(path) as f:
                played = json.load(f)
            if played["facts"]["interrupted"]:
                path.unlink()  # some of the windows: again
                continue
            for row in played["rows"]:
                row["facts"] = played["facts"]
                label = row["codec"]
                if label.startswith("streaming"):  # numbered in each slice anew; the protocol tells them apart
                    label = f"streaming: {row['protocol']}"
                rows.setdefault(label, row)
        return rows

    # ---- Results ----

    def write_summary(self, rows, name="summary.csv"):
        """A CSV file in OUT, rows in the order given."""
        path = self.out / name
        tables.write_csv(str(path), rows)
        self.say(f"{path}: {len(rows)} rows" + ("" if self.complete else ", not all that were planned"))
        return path

    def write_figure(self, name, text):
        path = self.out / name
        path.write_text(text)
        self.say(str(path))

    def end(self):
        """Exit code."""
        if self.complete or self.options.tables:
            return 0
        self.say("not complete; run again to go on")
        return OUT_OF_TIME
