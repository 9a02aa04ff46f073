"""scripts/bench --against: rows of ours in two builds, in turns: test_bench.py SCRIPTS_FOLDER"""
import sys

sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import bench


class Build:
    """A build whose programs take turns in `log` and give one rate."""
    quick = False

    def __init__(self, name, rate, log):
        self.name, self.rate, self.log = name, rate, log

    def google(self, program, row, *_):
        self.log.append(self.name)
        if self.rate is None:
            raise bench.Missing(f"{program}, which was not built")
        return self.rate


log = []
rows = {row.name: row for row in bench.beside("old/build", Build("old", 2e9, log))}
assert {"sweep", "replay", "sequences-64", "prefill", "coded-attention"} <= rows.keys() and "kld" not in rows
result = rows["fma"].measure(Build("new", 3e9, log), 3)
assert log == ["new", "old", "old", "new", "new", "old"], log
assert (result["ours"], result["peer"], result["ratio"]) == (3, 2, 1.5), result
assert rows["prefill"].peer_name == "old/build" and rows["prefill"].target is None

facts = {"processor": "p", "cores": 2, "memory_GiB": 1, "simd": [], "system": "s", "compiler": "c"}
result |= {"date": "today", "revision": "r", "load": 0.0, "machine": facts}
assert "| `fma` |" in (text := bench.report({"fma": result}, facts, rows.values())) and "1.50 (1.50–1.50)" in text, text

# Growth is a cost: less of it is a ratio above 1.
growth = bench.beside("old", Build("old", 1.10, log))
ratio = next(r for r in growth if r.name == "sequences-64").measure(Build("new", 1.01, log), 1)["ratio"]
assert abs(ratio - 1.10 / 1.01) < 1e-12, ratio
try:
    next(iter(bench.beside("old", Build("old", None, log)))).measure(Build("new", 1, log), 1)
    raise AssertionError("a row that the other build lacks was measured")
except bench.Missing:
    pass
