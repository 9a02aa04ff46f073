"""The measuring part of scripts/bench: what each row runs, how rounds alternate, and the table of docs/benchmarks.md."""
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench"
DOC = ROOT / "docs" / "benchmarks.md"
END = "<!-- bench:end -->"
PEERS = ROOT / "build" / "peers"
MODELS = ROOT / "data" / "models"
QUANTIZED = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
F32 = MODELS / "SmolLM2-135M-Instruct.F32.gguf"


class Missing(Exception):
    """What a row needs and this machine or run lacks."""


def note(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Context:
    """Where the binaries are, how long a sample lasts, and the peer processes that stay alive between rounds."""

    def __init__(self, args, build):
        self.build = ROOT / build
        self.min_time = 0.1 if args.quick else 0.5
        self.quick = args.quick
        self.python = None
        self.served = {}
        self.environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
        self.environment["VQKV_MODEL"] = str(QUANTIZED)

    def google(self, program, bench, counter="items_per_second", one_core=False):
        """One run of one Google Benchmark; its rate. one_core: a single thread, and its processor time."""
        binary = self.build / "bench" / program
        if not binary.exists():
            raise Missing(f"{program}, which was not built")
        command = [str(binary), f"--benchmark_filter=^{re.escape(bench)}$", "--benchmark_format=json",
                   f"--benchmark_min_time={self.min_time}"]
        cores = sorted(os.sched_getaffinity(0))
        run = subprocess.run(command, env=self.environment, capture_output=True, text=True,
                             preexec_fn=lambda: os.sched_setaffinity(0, cores[:1] if one_core else cores))
        if run.returncode != 0:
            raise SystemExit(f"error: {program} {bench} failed ({run.returncode}): {run.stderr.strip()[-400:]}")
        text = run.stdout
        rows = json.loads(text[text.index("{"):])["benchmarks"] if "{" in text else []
        if rows and rows[0].get("error_occurred"):
            raise Missing(rows[0].get("error_message", "something this processor lacks"))
        if not rows or counter not in rows[0]:
            raise Missing(f"'{bench}' of {program}, which this build lacks")  # an older one, by --against
        return float(rows[0][counter]) * (rows[0]["real_time"] / rows[0]["cpu_time"] if one_core else 1)

    def serve(self, name, command, request, key):
        """Asks a peer process, started at the first request, for one number."""
        if self.python is None:
            raise Missing("`scripts/bench --peers`")
        if name not in self.served:
            self.served[name] = subprocess.Popen([str(self.python), *command], env=self.environment, text=True,
                                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                 stderr=subprocess.DEVNULL)
        process = self.served[name]
        process.stdin.write(request + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the peer '{name}' ended at '{request}'; run it by hand: {' '.join(command)}")
        return float(json.loads(line)[key])

    def llama(self, request, threads):
        command = ["tests/bench/peers/llama_peer.py", str(F32), "serve", "--threads", str(threads)]
        return self.serve(f"llama.cpp, {threads} threads", command, request, "tok_s" if threads > 1 else "tok_processor_s")

    def faiss(self, bench):
        repeat = "1" if self.quick else "3"
        return self.serve("faiss-cpu", ["tests/bench/peers/faiss_peer.py", "--serve", "--repeat", repeat], bench,
                          "vectors_per_second")

    def close(self):
        for process in self.served.values():
            process.stdin.close()
            process.wait()


THREADS = min(2, len(os.sched_getaffinity(0)))


class Row:
    """ours and peer take a Context and return a rate (higher is better). A row without a peer is held to a rate. A row of
    wall time on what others share (disk, both cores) takes `repeat` times the rounds: five left its median to chance."""

    def __init__(self, name, title, unit, ours, peer=None, peer_name="", target=None, scale=1.0, repeat=1):
        self.name, self.title, self.unit, self.ours, self.peer = name, title, unit, ours, peer
        self.peer_name, self.target, self.scale, self.repeat = peer_name, target, scale, repeat

    def measure(self, context, rounds):
        rounds *= 1 if context.quick else self.repeat
        ours, peer = [], []
        for i in range(rounds):
            # A B, then B A: neither side always runs on the caches and clocks that the other left.
            sides = [(self.ours, ours)] + ([(self.peer, peer)] if self.peer else [])
            for side, values in sides if i % 2 == 0 else reversed(sides):
                values.append(side(context))
        result = {"ours": statistics.median(ours) * self.scale, "rounds": rounds, "ours_all": ours}
        if self.peer:
            ratios = [a / b for a, b in zip(ours, peer)]
            result |= {"peer": statistics.median(peer) * self.scale, "peer_all": peer,
                       "ratio": statistics.median(ratios), "ratios": ratios}
        return result


def kld_row(context):
    """Mean KLD of llama.cpp's full logits against ours, over windows of 1,024 tokens."""
    if context.python is None:
        raise Missing("`scripts/bench --peers`")
    ids, logits, windows = OUT / "kld-ids.txt", OUT / "kld-logits.raw", 1 if context.quick else 2
    command = [str(context.build / "bin" / "vqkv-dump"), "tokens", "--model", str(QUANTIZED), "--text",
               "data/jargon-0.txt", "--json"]
    documents = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ids.write_text(" ".join(str(t) for t in documents[0]["ids"][:windows * 1024]))
    try:
        subprocess.run([str(context.python), "tests/bench/peers/llama_peer.py", str(F32), "logits", "--ids", str(ids),
                        "--context", "1024", "-o", str(logits)], env=context.environment, check=True,
                       stdout=subprocess.DEVNULL)
        run = subprocess.run([str(context.build / "bench" / "peer_kld"), str(QUANTIZED), str(ids), str(logits), "1024"],
                             env=context.environment, check=True, capture_output=True, text=True)
    finally:
        logits.unlink(missing_ok=True)   # 200 MB a window
    return json.loads(run.stdout)


def replay_row(context, rounds=3):
    """Replay with coded caches; bench_replay alternates with the exact cache stretch by stretch by itself."""
    program = context.build / "bench" / "bench_replay"
    if not program.exists():
        raise Missing("bench_replay, which was not built")
    command = [str(program), "512" if context.quick else "1024", str(1 if context.quick else rounds)]
    run = subprocess.run(command, env=context.environment, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def replay_rate(context):
    """Tokens a second over the codecs that bench_replay runs."""
    rates = [row["tokens_per_s"] for row in replay_row(context, rounds=1)["rows"] if row["codec"] != "exact"]
    return len(rates) / sum(1 / r for r in rates)


SWEEP_TEXTS = ("jargon-0", "jargon-1", "jargon-2", "jargon-3", "kjv-0", "kjv-1", "kjv-2")


def tool(context, name, *arguments):
    """Runs one of the tools of the context's build, quietly."""
    path = context.build / "bin" / f"vqkv-{name}"
    if not path.exists():
        raise Missing(f"{path.name}, which was not built")
    run = subprocess.run([str(path), *map(str, arguments), "-q"], env=context.environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise Missing(f"`vqkv-{name} {arguments[0]}` to end well: {' '.join(run.stderr.split())[-300:]}")


def quickstart_trace(context):
    trace = OUT / "sweep.trace.h5"
    if not trace.exists():
        note("capturing the quickstart's trace; this takes a minute")
        tool(context, "dump", "capture", "--model", QUANTIZED, "--context", 1024, "--max-tokens", 2048, "-o", trace, "--text",
             *(f"data/{text}.txt" for text in SWEEP_TEXTS))
    return trace


def quickstart_plan(context, folder, name, text, *overrides):
    """A plan of the quickstart's setup and `text`, without streaming rows: builds of before those plan the same cells."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    setup = (ROOT / "experiments" / "first-look" / "setup.yaml").read_text().splitlines(True)
    (folder / "setup.yaml").write_text("".join(line for line in setup if not line.startswith("sweep: {streaming")))
    (folder / name).write_text(text)
    plan = folder / "plan.jsonl"
    arguments = ["sweep", "plan", folder / name, f"trace.path={quickstart_trace(context)}", *overrides, "-o", plan]
    try:
        tool(context, *arguments, "sweep.streaming=false")
    except Missing:
        tool(context, *arguments)
    return plan


def sweep_rate(context):
    """Cells of the quickstart's sweep, planned and run on two layers, a second of processor time."""
    quickstart_trace(context)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = (ROOT / "experiments" / "first-look" / "quick.yaml").read_text()
    plan, store = quickstart_plan(context, OUT / "sweep", "quick.yaml", text, "layers=[0, 15]"), OUT / "sweep" / "cells"
    tool(context, "sweep", "run", plan, "-o", store, "--threads", 1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cells = sum(1 for line in (store / "results" / "main.jsonl").open())
    return cells / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


MANY = """include: [setup.yaml]
layers: [0]
heads: [0]
codec: {name: rtn, group: 64}
sweep: {grid: {codec.bits: [2, 3, 4, 8], seed: {range: [1, 24999]}}}
"""


def plan_rate(context):
    """Cells of a plan of 99,996, written, a second of wall time."""
    quickstart_trace(context)
    before = time.monotonic()
    plan = quickstart_plan(context, OUT / "plan", "many.yaml", MANY)
    with plan.open() as f:
        return sum(1 for _ in f) / (time.monotonic() - before)


def google(program, bench, counter="items_per_second", one_core=False):
    return lambda context: context.google(program, bench, counter, one_core)


def pq(groups, entries):
    bench = f"product/{groups}/{entries}"
    return google("bench_assign", bench), lambda context: context.faiss(bench)


def kmeans(width, entries):
    return google("bench_train", f"kmeans_ours/{width}/{entries}"), google("bench_train", f"kmeans_plain/{width}/{entries}")


def coded_attention(bench):
    """One step over 32,768 tokens, four query heads a KV head, d = 128: keys and values as codes against bf16."""
    shape = "context:32768/group:4/d:128"
    return (google("bench_attention", f"step/{bench}/{shape}", "tokens/s"),
            google("bench_attention", f"step/exact_bf16/{shape}", "tokens/s"))


def decode_head(bench):
    """Tokens of one head of a unit of 8 heads: its own block of the map against the whole map written out."""
    return google("bench_cache", f"decode_head/{bench}"), google("bench_cache", f"decode_head/{bench}_dense")


REBUILT = "ours, the model side made for every cache"
WRITTEN_OUT = "ours, the map of the unit written out"
LLAMA = "llama.cpp, no BLAS"
EXACT = "ours over an exact bf16 cache"
WHEEL = "faiss-cpu wheel, 1 thread"
DEBIAN = "Debian's FAISS in the same process, 1 thread"
ROWS = [
    Row("fma", "fp32 multiply-adds in registers, one core", "GF/s", google("bench_ceilings", "fma"), scale=1e-9),
    Row("memory", "Reading memory, all threads", "GB/s",
        google("bench_ceilings", "read_memory/0/real_time", "bytes_per_second"), scale=1e-9),
    Row("prefill", f"Prefill, SmolLM2-135M, fp32 weights, 512 tokens, {THREADS} threads", "tok/s",
        google("bench_runtime", "prefill/512/real_time"), lambda c: c.llama("prefill", THREADS), LLAMA, 2.5,
        repeat=3),
    Row("prefill-1", "The same, 1 thread", "tok/s", google("bench_runtime", "prefill/512/real_time", one_core=True),
        lambda c: c.llama("prefill", 1), LLAMA),
    Row("decode", f"Decode after 512 tokens, fp32 weights, {THREADS} threads", "tok/s",
        google("bench_runtime", "decode/512/iterations:64/real_time"), lambda c: c.llama("decode", THREADS), LLAMA, 1.0,
        repeat=3),
    Row("decode-1", "The same, 1 thread", "tok/s",
        google("bench_runtime", "decode/512/iterations:64/real_time", one_core=True), lambda c: c.llama("decode", 1), LLAMA),
    Row("prefill-bf16", "Prefill of 512 tokens, bf16 weights, 1 thread", "tok/s",
        google("bench_runtime", "prefill_bf16/512/real_time", one_core=True),
        google("bench_runtime", "prefill/512/real_time", one_core=True), "fp32 weights"),
    Row("decode-bf16", "Decode after 512 tokens, bf16 weights, 1 thread", "tok/s",
        google("bench_runtime", "decode_bf16/512/iterations:64/real_time", one_core=True),
        google("bench_runtime", "decode/512/iterations:64/real_time", one_core=True), "fp32 weights"),
    Row("backward", "Gradients of the NLL with respect to all keys and values, forward pass included, 2,048 tokens, fp32 "
        f"weights, {THREADS} threads", "tok/s", google("bench_runtime", "backward/2048/real_time"),
        google("bench_runtime", "forward/2048/real_time"), "ours, a forward pass with all logits", 0.286),
    Row("pq-assign", "PQ 16×256 assignment, d = 128, 1 thread", "M vec/s", *pq(16, 256), WHEEL, 4.0, 1e-6),
    Row("pq-assign-32", "PQ 32×256 assignment, d = 128, 1 thread", "M vec/s", *pq(32, 256), WHEEL, 4.0, 1e-6),
    Row("rvq-encode", "RVQ 8×256 encoding, beam 5, d = 128, 1 thread", "M vec/s",
        google("bench_train", "residual/8/256/5"),
        lambda c: max(c.faiss("residual/8/256/beam5"), c.faiss("residual/8/256/beam5/table")),
        WHEEL + ", the faster of its two ways", 2.0, 1e-6),
    Row("commvq-encode", "Encoding a stage of CommVQ's keys, 2×6 bits, d = 128, 1 thread", "M vec/s", google("bench_assign", "pairs"),
        google("bench_assign", "pairs_exhaustive"), "ours, products with all 4,096 sums, as published", 16.0, 1e-6),
    Row("kmeans-8", "k-means, d = 8 (a PQ sub-vector), 256 codewords", "M vec·it/s", *kmeans(8, 256), DEBIAN,
        3.0, 1e-6),
    Row("kmeans-64", "k-means, d = 64, 256 codewords", "M vec·it/s", *kmeans(64, 256), DEBIAN, 3.0, 1e-6),
    Row("kmeans-128", "k-means, d = 128, 1,024 codewords", "M vec·it/s", *kmeans(128, 1024), DEBIAN, 3.0,
        1e-6),
    Row("trace-write", "Writing a trace, content hash apart", "GB/s",
        google("bench_trace", "trace_write/iterations:5/manual_time", "bytes_per_second"),
        google("bench_trace", "plain_write/iterations:5/manual_time", "bytes_per_second"), "plain pwrite of the same bytes",
        0.9, 1e-9, repeat=5),
    Row("trace-read", "Reading keys and values of a trace as f32, page cache", "GB/s",
        google("bench_trace", "trace_read/iterations:5/real_time", "bytes_per_second"), target=1.0, scale=1e-9),
    Row("key-scan", "Table-lookup key scan, S = 256, 16-bit tables (two byte lookups a code), 16 slots, one core", "G lookups/s",
        google("bench_scan", "scan_fixed16/slots:16/entries:256/rows:1", "lookups/s"), target=30.0, scale=1e-9),
    Row("key-scan-8", "The same with 8-bit tables (`--attention cpu-table8`)", "G lookups/s",
        google("bench_scan", "scan_bytes8/slots:16/entries:256/rows:1", "lookups/s"), target=30.0, scale=1e-9),
    Row("cache-start", "An empty cache and its session at the shape of SmolLM2-135M, pq 16×256, on a shared model side",
        "k/s", google("bench_cache", "start/shared_pq"), google("bench_cache", "start/rebuilt_pq"), REBUILT, 5.0, 1e-3),
    Row("cache-start-memory", "The same in memory", "caches/MB", google("bench_cache", "start/shared_pq", "caches/MB"),
        google("bench_cache", "start/rebuilt_pq", "caches/MB"), REBUILT, 5.0),
    Row("sequences-64", "A cache of 1,024 tokens at that shape, one of 64 that share books: the ledger's bytes a byte that the "
        "process grows", "ledger/growth", lambda c: 1 / c.google("bench_cache", "sequences/64/iterations:1", "growth"), target=0.98),
    Row("sweep", "The quickstart's 11 cells on 2 of 30 layers, planned, trained and measured, processor time, 1 thread",
        "cells/s", sweep_rate),
    Row("plan-100k", "A plan of 99,996 cells, written", "k cells/s", plan_rate, scale=1e-3),
    Row("decode-head", "Decoding pre-RoPE keys of one head of a unit of 8, pq 16×256 a head behind a rotation of each head",
        "M tok/s", *decode_head("keys_rotation"), WRITTEN_OUT, 4.0, 1e-6),
    Row("decode-head-hadamard", "The same behind Hadamard", "M tok/s", *decode_head("keys_hadamard"), WRITTEN_OUT, 4.0,
        1e-6),
    Row("decode-head-values", "Values behind a rotation, in the code domain", "M tok/s", *decode_head("values_rotation"),
        WRITTEN_OUT, 4.0, 1e-6),
    Row("coded-attention", "Attention of one query over 32,768 coded tokens, pq 16×256, G = 4, d = 128, 1 thread", "M tok/s",
        *coded_attention("pq_table"), EXACT, 3.0, 1e-6),
    Row("coded-attention-32", "The same, pq 32×256", "M tok/s", *coded_attention("pq32_table"), EXACT, 3.0, 1e-6),
    Row("coded-attention-rvq", "The same, rvq 8×256", "M tok/s", *coded_attention("rvq8_table"), EXACT, 3.0, 1e-6),
    Row("coded-attention-commvq", "The same, CommVQ: keys of 11 stages of 2×6 bits before RoPE, values of a bit a channel", "M tok/s",
        *coded_attention("commvq_table"), EXACT, 1.0, 1e-6),
    Row("coded-attention-affine", "The same, 2-bit levels, keys in groups of 32 tokens, values of 32 channels", "M tok/s",
        *coded_attention("affine_table"), EXACT, 3.0, 1e-6),
    Row("coded-attention-signs", "The same, keys of 256 signs and a norm, values of 2 bits in groups of 32", "M tok/s",
        *coded_attention("signs_table"), EXACT, 4.0, 1e-6),
]
def beside(build, context):
    """The rows of ours with those of another build as their peer."""
    ours = [*ROWS, Row(REPLAY[0], "Forced replay, encoding included, over the codecs of bench_replay", "tok/s", replay_rate)]
    return [Row(r.name, r.title, r.unit, r.ours, lambda _, r=r: r.ours(context), f"{build}", None, r.scale, r.repeat)
            for r in ours]


REPLAY = ("replay", {"pq": 0.6})   # targets by the codec's first word
KLD = ("kld", "KLD of the full vocabulary, llama.cpp ‖ ours, F32 weights and cache", 1e-8)


def machine():
    facts = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags", "").split()
    simd = [f for f in ("avx2", "avx512f", "avx512vbmi", "avx512_bf16") if f in flags]
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    model = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        model += f" (family {facts['cpu family']}, model {facts['model']})"
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "memory_GiB": round(memory), "simd": simd,
            "system": system, "compiler": compiler}


def find_peers(args):
    given = os.environ.get("VQKV_PEERS_VENV")
    folder = pathlib.Path(given) if given else PEERS / "venv"
    python = folder / "bin" / "python"
    if given and not python.exists():
        raise SystemExit(f"error: VQKV_PEERS_VENV names {given}, which has no bin/python")
    if args.peers and not given:
        make_peers(folder)
    return python if python.exists() else None


def make_peers(folder):
    python = folder / "bin" / "python"
    if not python.exists():
        note("making a virtual environment under build/peers")
        if subprocess.run([sys.executable, "-c", "import ensurepip"], stderr=subprocess.DEVNULL).returncode != 0:
            root = [] if os.geteuid() == 0 else ["sudo"]
            subprocess.run([*root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "python3-venv"],
                           check=True, stdout=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, stdout=sys.stderr)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if subprocess.run([str(python), "-c", "import faiss, numpy, gguf"], stderr=subprocess.DEVNULL).returncode != 0:
        note("installing faiss-cpu, numpy and gguf")
        subprocess.run([*install, "faiss-cpu", "numpy", "gguf"], check=True, stdout=sys.stderr)
    if subprocess.run([str(python), "-c", "import llama_cpp"], stderr=subprocess.DEVNULL).returncode != 0:
        note("building llama-cpp-python for this processor, without a BLAS; this takes minutes")
        subprocess.run([*install, "--no-binary", "llama-cpp-python", "llama-cpp-python"], check=True, stdout=sys.stderr,
                       env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_BLAS=OFF"})


def make_f32(python):
    if not F32.exists():
        note("dequantizing the model to an F32 GGUF")
        subprocess.run([str(python), "tests/golden/make_f32_gguf.py", str(QUANTIZED), str(F32)], check=True,
                       stdout=subprocess.DEVNULL)


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def busy(result):
    """More runnable threads than cores: an engine whose threads wait in busy loops is slowed more than one that sleeps."""
    return result["load"] > result["machine"]["cores"] + 1


def verdict(value, target, at_most=False):
    if target is None:
        return "–"
    return "met" if (value <= target if at_most else value >= target) else "**missed**"


def table(results, rows):
    lines = ["| row | what | ours | peer | ratio (range) | target | | date |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        r = results.get(row.name)
        if r is None:
            continue
        if "needs" in r:
            lines.append(f"| `{row.name}` | {row.title} | – | {row.peer_name} | needs {r['needs']} | – | – | {r['date']} |")
            continue
        ours = f"{number(r['ours'])} {row.unit}"
        if "ratio" in r:
            peer = f"{number(r['peer'])} ({row.peer_name})"
            ratio = f"{r['ratio']:.2f} ({min(r['ratios']):.2f}–{max(r['ratios']):.2f})"
            target = "–" if row.target is None else f"≥ {row.target:g}×"
            state = verdict(r["ratio"], row.target)
            if row.peer_name == LLAMA and row.target is not None and busy(r):
                state = "not judged: busy machine"
        else:
            peer, ratio = "–", "–"
            target = "–" if row.target is None else f"≥ {row.target:g} {row.unit}"
            state = verdict(r["ours"], row.target)
        lines.append(f"| `{row.name}` | {row.title} | {ours} | {peer} | {ratio} | {target} | {state} | {r['date']} |")
    name, title, target = KLD
    if (r := results.get(name)) is not None:
        if "needs" in r:
            lines.append(f"| `{name}` | {title} | – | llama.cpp | needs {r['needs']} | – | – | {r['date']} |")
        else:
            lines.append(f"| `{name}` | {title}, {r['tokens']:,} positions | mean {r['kld_mean']:.1e}, max {r['kld_max']:.1e}, "
                         f"same top {100 * r['same_top']:.2f} % | llama.cpp | – | ≤ {target:.0e} | "
                         f"{verdict(r['kld_mean'], target, at_most=True)} | {r['date']} |")
    if (r := results.get(REPLAY[0])) is not None and "rows" in r:
        exact = r["rows"][0]["tokens_per_s"]
        for row in r["rows"][1:]:
            target = REPLAY[1].get(row["codec"].split()[0])
            state = "explained below" if target is None else verdict(row["ratio"], target)
            lines.append(f"| `replay` | Forced replay, encoding included, {row['codec']}, {r['context']:,} tokens, {r['threads']} "
                         f"threads ({row['path']}) | {number(row['tokens_per_s'])} tok/s | {number(exact)} (exact cache, same run) "
                         f"| {row['ratio']:.2f} (arithmetic {row['ratio_by_arithmetic']:.2f}) | "
                         f"{'–' if target is None else f'≥ {target:g}×'} | {state} | {r['date']} |")
    return lines


def report(results, facts, rows):
    revisions = ", ".join(dict.fromkeys(r["revision"] for r in results.values()))
    loads = [r["load"] for r in results.values()]
    lines = [f"**{facts['processor']}**, {facts['cores']} cores, {facts['memory_GiB']} GiB, {', '.join(facts['simd'])}; "
             f"{facts['system']}, {facts['compiler']}; revisions {revisions}. `OPENBLAS_CORETYPE` is unset. Load "
             f"average while measuring: {min(loads):.1f}–{max(loads):.1f} on {facts['cores']} cores.", "", *table(results, rows)]
    return "\n".join(lines)


def write_doc(text, processor):
    """One table a processor: the one of this processor is replaced, a first one follows the others."""
    begin = f"<!-- bench:begin {processor} -->"
    before = DOC.read_text()
    if END not in before:
        raise SystemExit(f"error: {DOC.relative_to(ROOT)} has no '{END}'")
    if begin in before:
        head, rest = before.split(begin, 1)
        tail = rest.split(END, 1)[1]
    else:
        last = before.rindex(END) + len(END)
        head, tail = before[:last] + "\n\n", before[last:]
    DOC.write_text(f"{head}{begin}\n{text}\n{END}{tail}")


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Speeds beside peers, paired in one run; medians of "
                                     "paired rounds. Results go to out/bench/NAME.json; docs/benchmarks.md is written when "
                                     "every row has one.")
    names = [row.name for row in ROWS] + [KLD[0], REPLAY[0]]
    parser.add_argument("--peers", action="store_true", help="install the peers into build/peers first")
    parser.add_argument("--quick", action="store_true", help="3 short rounds instead of 5; docs are left alone")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of a row instead of 5; docs are left alone")
    parser.add_argument("--only", action="append", metavar="NAME", choices=names, help="a row; may be given again")
    parser.add_argument("--build", default=None, metavar="DIR", help="a build that is there, e.g. build/ci")
    parser.add_argument("--against", default=None, metavar="DIR", help="another build, made by `scripts/build bench` in its own "
                        "checkout: every row of ours in both in turns, and the ratio of ours to that; docs are left alone")
    parser.add_argument("--list", action="store_true", help="the rows' names")
    args = parser.parse_args()
    if args.list:
        print("\n".join(names))
        return
    if args.rounds < 1:
        raise SystemExit("error: --rounds: at least 1")
    rounds = 3 if args.quick else args.rounds
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    if args.build is None:
        args.build = "build/bench"
        for command in (["scripts/install-dependencies"], ["scripts/build", "bench"]):
            subprocess.run(command, check=True, stdout=sys.stderr)
    for flag, build in (("--build", args.build), ("--against", args.against)):
        if build is not None and not (pathlib.Path(build) / "build.ninja").exists():
            raise SystemExit(f"error: {flag} {build}: no build is there")
    subprocess.run(["scripts/get-model"], check=True, stdout=sys.stderr)
    if "OPENBLAS_CORETYPE" in os.environ:
        note(f"unsetting OPENBLAS_CORETYPE={os.environ.pop('OPENBLAS_CORETYPE')}: it picks OpenBLAS's kernels, and can halve them")
    facts = machine()
    note(f"{facts['processor']}, {facts['cores']} cores, {', '.join(facts['simd'])}; {facts['compiler']}")
    context = Context(args, args.build)
    rows, out = ROWS, OUT
    if args.against:
        if args.only == [KLD[0]]:
            raise SystemExit(f"error: --against: {KLD[0]} compares with llama.cpp, not with a build")
        rows, out = beside(args.against, Context(args, args.against)), OUT / "against"
        out.mkdir(exist_ok=True)
    else:
        context.python = find_peers(args)
        if context.python:
            make_f32(context.python)
    revision = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()

    measured = {}

    def keep(name, run):
        note(name)
        try:
            result = run()
        except Missing as e:
            result = {"needs": str(e)}
        result |= {"name": name, "date": datetime.date.today().isoformat(), "revision": revision, "load": os.getloadavg()[0],
                   "machine": facts, "command": " ".join(["scripts/bench", f"--against {args.against}" if args.against else "--peers",
                                                          f"--only {name}"])}
        measured[name] = result
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")

    with contextlib.closing(context):
        for row in rows:
            if not args.only or row.name in args.only:
                keep(row.name, lambda: row.measure(context, rounds))
        if not args.against and (not args.only or KLD[0] in args.only):
            keep(KLD[0], lambda: kld_row(context))
        if not args.against and (not args.only or REPLAY[0] in args.only):
            keep(REPLAY[0], lambda: replay_row(context))

    if args.against:
        print(report(measured, facts, rows))
        return
    results = {n: json.loads((out / f"{n}.json").read_text()) for n in names if (out / f"{n}.json").exists()}
    text = report(results, facts, rows)
    print(text)
    if args.quick or args.rounds != 5 or len(results) < len(names):
        why = "--quick" if args.quick else "--rounds" if args.rounds != 5 else "not every row was measured"
        note(f"docs/benchmarks.md is left as it is ({why})")
    else:
        write_doc(text, facts["processor"])


if __name__ == "__main__":
    main()
