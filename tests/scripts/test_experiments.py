"""Every experiment by its one command, in its test form; and the statistics of scripts/vqkv_experiment against brute force and
against those of the tools. test_experiments.py FOLDER, where the tools lie; without it, what needs no tool."""
import itertools
import json
import math
import pathlib
import subprocess
import sys
import tempfile

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / "scripts"))
from vqkv_experiment import figures, results, statistics, store, tables
from vqkv_experiment.driver import Experiment


def close(a, b, tolerance=1e-12):
    assert abs(a - b) <= tolerance * max(1.0, abs(a), abs(b)), f"{a} is not {b}"


def check_statistics():
    close(statistics.spearman([1, 2, 3, 4], [10, 20, 40, 30]), 0.8)  # 1 - 6 * 2 / (4 * 15)
    assert math.isnan(statistics.spearman([1, 1, 1], [1, 2, 3]))
    assert statistics.ranks_of([3, 1, 3, 2]) == [2.5, 0, 2.5, 1]
    d = [0.3, -0.1, 0.4, 0.15, 0.2, 0.05, 0.6]
    total = sum(d)
    flipped = [sum(s * x for s, x in zip(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    p, low, high = statistics.sign_flip(d)
    close(p, sum(abs(t) >= abs(total) - 1e-12 for t in flipped) / len(flipped))
    for centre, refused in ((low - 1e-9, True), (low + 1e-9, False), (high - 1e-9, False), (high + 1e-9, True)):
        assert (statistics.sign_flip([x - centre for x in d])[0] <= 0.05) == refused, centre
    assert all(math.isnan(x) for x in statistics.sign_flip([1.0, 2.0, 3.0])[1:])  # 2^-2 is the least p
    for a, b in zip(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]):
        close(a, b)
    assert [statistics.clusters_to_reach(x) for x in (1, 0.05, 0.05 / 100)] == [1, 6, 12]
    columns = {"a": [0.0] * 8, "b": [1.0] * 8, "c": [0.5, -0.5] * 4}
    found = statistics.compare(columns, [("a", "b"), ("a", "c")])
    assert [v["verdict"] for v in found] == ["a", "same"] and found[0]["mean"] == -1
    assert statistics.compare({"a": [0.0] * 4, "b": [1.0] * 4}, [("a", "b")])[0]["verdict"] == "none"
    for bad in ([], [1.0] * 21):
        try:
            statistics.sign_flip(bad)
            raise AssertionError("not refused")
        except ValueError:
            pass


def check_tables(folder):
    assert [results.budget_of(b) for b in (0.74, 0.75, 1.5, 1.6, 2.5, 4.5, 4.51)] == [None, 1, 1, None, 2, 4, None]
    path = str(folder / "t.csv")
    tables.write_csv(path, [{"label": "a", "x": 0.125}, {"label": "b", "x": math.nan, "y": 3}])
    assert pathlib.Path(path).read_text() == "label,x,y\na,0.125,\nb,,3\n"
    assert tables.read_csv(path) == [{"label": "a", "x": 0.125}, {"label": "b", "y": 3.0}]
    assert tables.markdown([["a", "1"]], ["codec", "n"]) == "| codec | n |\n|-------|--:|\n| a     | 1 |"
    text = figures.chart("t < u", "x", "y", {"one": [(1, 2, ""), (2, 0, ""), (3, 20, "")], "absent": [(1, 0, "")]}, log_y=True, lines=True)
    assert text.count("<circle") == 3 and "t &lt; u" in text and "absent" not in text  # what a logarithm can't show is left out


def check_taken(folder):
    x = Experiment.__new__(Experiment)
    x.folder, x.name, x.runs = root / "experiments/transfer", "transfer", folder / "runs"
    here, set_aside = "0123456789abcdef", "fedcba9876543210"
    for run, name in (("k-or-v", here), ("k-or-v.before", set_aside)):
        kept = x.runs / run / "values/codecs" / f"{name}.codec.h5"
        kept.parent.mkdir(parents=True)
        kept.write_text(name)
    own = x.runs / "transfer/cross"
    for _ in range(2):
        x._take_trained([{"train_id": here + "0" * 48}, {"train_id": set_aside + "0" * 48}, {"skip": "no such"}], own)
    assert [p.name for p in own.glob("codecs/*")] == [f"{here}.codec.h5"] and (own / f"codecs/{here}.codec.h5").read_text() == here


def check_labels():
    def label(k, v):
        codec = {"k": k, "v": v}
        return store.label_at_bits({"config": {"codec": codec}}, {"measurements": [
            {"role": "cost", "tag": "bits_per_value.codes", "value": 4.5}]})
    plain = {"name": "ggml", "knobs": {"type": "q4_0", "query": "exact"}}
    rounded = {"name": "ggml", "knobs": {"type": "q4_0", "query": "q8"}}
    assert label(plain, plain) == "ggml-q4_0@4.50"
    assert label(rounded, plain) == "ggml-q4_0+query-q8@4.50"
    assert label({**rounded, "transform": ["hadamard"]}, {**plain, "transform": ["hadamard"]}) == "had+ggml-q4_0+query-q8@4.50"
    other = {"name": "ggml", "knobs": {"type": "q8_0", "query": "exact"}}
    assert label(rounded, other) == "ggml-q4_0+query-q8/ggml-q8_0@4.50"

    # Cells of equal bits are told apart by what their sweep varies, in an axis of whole codecs, too.
    with tempfile.TemporaryDirectory() as folder:
        def labels(*axes):
            plan = pathlib.Path(folder, "plan.jsonl")
            role = {"name": "pq"}
            cells = [{"id": str(i), "axes": a, "repeat": {}, "config": {"codec": {"k": role, "v": role}}} for i, a in enumerate(axes)]
            plan.write_text("\n".join(map(json.dumps, [{"axes": ["codec"]}, *cells])) + "\n")
            of = store.label_with_axes(plan)
            return [of(c, {"measurements": [{"role": "cost", "tag": "bits_per_value.codes", "value": 2.0}]}) for c in cells]
        assert labels({"codec": {"name": "pq", "k": {"rope": "pre", "bits": 4}}}, {"codec": {"name": "pq", "k": {"bits": 4}, "heads": 1}}) == [
            "pq@2.00 k.rope=pre", "pq@2.00 heads=1"]
        assert labels({"codec.k.bits": 4, "codec.group": [1, 2]}, {"codec.k.bits": 2, "codec.group": [1, 2]}) == [
            "pq@2.00 k.bits=4", "pq@2.00 k.bits=2"]


def run(script, *arguments):
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)


def check_cheap_metric(folder, summary):
    script, out = root / "experiments/which-cheap-metric/run", folder / "ranks.csv"
    done = run(script, summary, out)
    assert done.returncode == 0 and out.exists(), done.stderr
    assert run(script, folder / "none.csv").returncode == 3
    # Softmax KL in the order of KLD, key NMSE against it; output error is not there.
    lines = [{"label": str(i), "part": "bits2", "roles": "KV", "bits": 2, "kld_last": i, "softmax_kl": i * i, "key_nmse": -i} for i in range(1, 7)]
    tables.write_csv(str(folder / "made.csv"), lines)
    assert run(script, folder / "made.csv", out).returncode == 0
    ranks = {(r["metric"], r["cells"], r["protocol"]): r.get("spearman") for r in tables.read_csv(out)}
    assert ranks["softmax_kl", "all", "window"] == 1 and ranks["key_nmse", "2 bits", "window"] == -1
    assert ranks["output_error", "all", "window"] is None and ranks["softmax_kl", "all", "no window"] is None


def files_of(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in (".csv", ".md", ".svg", ".json")}


def check_experiment(script, binaries, out):
    """Twice: the second time nothing is run or written anew."""
    name = script.parent.name
    arguments = ("--test", "--bin", binaries, "--out", out)
    done = run(script, *arguments)
    assert done.returncode == 0, f"{name}\n{done.stderr}"
    made = files_of(out / name)
    assert {"summary.csv", "table.md"} <= {p.name for p in made}, f"{name}: {sorted(p.name for p in made)}"
    again = run(script, *arguments)
    assert again.returncode == 0 and files_of(out / name) == made, f"{name}: the second run differs\n{again.stderr}"
    assert "== " + name + ": replay" not in again.stderr and ", data/" not in again.stderr, again.stderr
    for row in tables.read_csv(out / name / "summary.csv"):
        assert row.keys() & {"kld_last", "kld_at_end", "acceptance"}, f"{name}: {row}"
    return done.stderr


def check_against_tools(folder):
    """The tools' own comparisons of a slice, from the documents' means that stand beside them."""
    checked = 0
    for path in folder.glob("replay-*/slice-*.json"):
        played = json.loads(path.read_text())
        rows = {r["codec"]: r for r in played["rows"]}
        for c in played["comparisons"]:
            if c["what"] == "kld.last_quarter":
                a, b = (results.documents(rows[c[side]]) for side in "ab")
                p, _, _ = statistics.sign_flip([x - y for x, y in zip(a, b)])
                close(p, c["p"])
                close(sum(x - y for x, y in zip(a, b)) / len(a), c["mean"], 1e-9)
                checked += 1
    assert checked > 0


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        check_statistics()
        check_tables(folder)
        check_taken(folder)
        check_labels()
        scripts = sorted((root / "experiments").glob("*/run"))
        assert len(scripts) >= 10
        for script in scripts:
            readme = (script.parent / "README.md").read_text()
            assert f"experiments/{script.parent.name}/run" in readme, f"{script.parent.name}: its README doesn't say how to run it"
        if len(sys.argv) < 2:
            return
        binaries = pathlib.Path(sys.argv[1]).resolve()
        for script in scripts:
            if script.parent.name != "which-cheap-metric":
                check_experiment(script, binaries, folder)
        check_against_tools(folder / "equal-bytes")
        check_cheap_metric(folder, folder / "equal-bytes/summary.csv")
        # Other texts under the same name are refused, not mixed in.
        request = folder / "transfer/replay-held/request.json"
        request.write_text(request.read_text().replace('"160"', '"161"'))
        done = run(root / "experiments/transfer/run", "--test", "--bin", binaries, "--out", folder)
        assert done.returncode == 1 and "asked for otherwise" in done.stderr, done.stderr
        done = run(root / "experiments/transfer/run", "--test", "--bin", folder / "nowhere", "--out", folder / "new")
        assert done.returncode == 1 and "is not there" in done.stderr, done.stderr
    print("ok")


if __name__ == "__main__":
    main()
