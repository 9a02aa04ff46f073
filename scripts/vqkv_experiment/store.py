"""Cells of a sweep's folder, the numbers of their records, and names for them."""
import glob
import json
import math
import os


def cells_of(store):
    """Cell id -> (plan line, record) of the finished cells."""
    with open(os.path.join(store, "plan.jsonl")) as f:
        plan = [json.loads(line) for line in f]
    records = {}
    for path in sorted(glob.glob(os.path.join(store, "results", "*.jsonl"))):
        with open(path) as f:
            for line in f:
                try:
                    r = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a torn last line
                if r.get("status") == "ok":
                    records[r["id"]] = r
    return {c["id"]: (c, records[c["id"]]) for c in plan if "id" in c and c["id"] in records}


def measurement(record, role, tag, context=None, sequences=None):
    """The measurement of that role ("report", "select", "cost", "time") and tag, or None."""
    for m in record["measurements"]:
        if m["role"] == role and m["tag"] == tag and (context is None or m.get("context") == context):
            if m.get("sequences") == sequences:
                return m
    return None


def value(record, role, tag, context=None, sequences=None, what="value"):
    """A number of that measurement; NaN where there is none."""
    m = measurement(record, role, tag, context, sequences)
    v = m.get(what) if m else None
    return math.nan if v is None else v


def by_layer(record, tag):
    """Of a metric on report documents: the mean over KV heads of each layer, [] where it has no map."""
    m = measurement(record, "report", tag)
    for d in (m or {}).get("details", []):
        if d["axis"] == "layer,kv_head":
            layers, heads = d["shape"]
            rows = [d["values"][i * heads:(i + 1) * heads] for i in range(layers)]
            return [sum(r) / heads if all(x is not None for x in r) else math.nan for r in rows]
    return []


def bits_of(record):
    """Codes, side data and exact exceptions, bits a value over keys and values."""
    return round(value(record, "cost", "bits_per_value.codes"), 3)


def knobs(role):
    """Of the codec of keys or values: they stand beside the name, or under "knobs" in the canonical form."""
    return {**role, **(role.get("knobs") or {})}


def transforms_of(role):
    """Names of the transforms before a codec, the first applied first."""
    return [t if isinstance(t, str) else t.get("name") for t in role.get("transform", [])]


def in_query_metric(role):
    return "query_metric" in transforms_of(role)


def coded_roles(codec):
    """"K", "V" or "KV": which roles a codec changes. Exact rows behind a transform that drops channels are changed."""
    changed = [r for r in "kv" if codec[r]["name"] != "exact" or transforms_of(codec[r])]
    return "".join(changed).upper()


def method_of(role):
    """Method with what its bits leave open: ggml-q4_0, fp8-e5m2, think+kivi, had+rtn, pq+qm, ggml-q4_0+query-q8."""
    k, before = knobs(role), transforms_of(role)
    name = k["name"] + "".join(f"-{k[key]}" for key in ("type", "format") if key in k)
    fitted = [t for t in before if t in ("think", "deco")]
    if name == "exact" and fitted:
        name = fitted.pop()
    rotated = ["had"] if "hadamard" in before else []
    query = [f"query-{k['query']}"] if k.get("query", "exact") != "exact" else []
    return "+".join([*fitted, *rotated, name, *(["qm"] if "query_metric" in before else []), *query])


def label_at_bits(cell, record):
    """METHOD@BITS, for tables that compare at equal bits: kivi@3.00, pq+qm@2.00; "K" or "V" behind it where one role alone
    is coded, with that role's bits."""
    codec = cell["config"]["codec"]
    roles, bits = coded_roles(codec), bits_of(record)
    names = {r: method_of(codec[r]) for r in "kv"}
    if len(roles) == 1:
        only = roles.lower()
        return f"{names[only]}@{2 * bits - 16:.2f} {roles}"
    if names["k"] in (names["v"], f"{names['v']}+qm", f"{names['v']}+query-q8", f"think+{names['v']}"):
        return f"{names['k']}@{bits:.2f}"
    return f"{names['k']}/{names['v']}@{bits:.2f}"


def knobs_of_axes(cell):
    """What the sweep set, by path: "k.rope". An axis of whole codecs counts by its knobs."""
    found = {}

    def add(path, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                if key != "name":
                    add(f"{path}.{key}" if path else key, inner)
        else:
            found[path] = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

    for path, value in {**cell["axes"], **cell["repeat"]}.items():
        add("" if path == "codec" else path.removeprefix("codec."), value)
    return found


def label_with_axes(plan):
    """A label(cell, record) for the cells of a plan.jsonl: METHOD@BITS and the knobs that its sweep varies: pq@2.00 k.rope=pre."""
    varied = []

    def label(cell, record):
        if not varied:
            with open(plan) as f:
                planned = [knobs_of_axes(c) for c in map(json.loads, f) if "id" in c and "skip" not in c]
            paths = dict.fromkeys(path for knobs in planned for path in knobs)
            varied.extend(path for path in paths if len(planned) == 1 or len({knobs.get(path) for knobs in planned}) > 1)
        own = knobs_of_axes(cell)
        return " ".join([label_at_bits(cell, record), *(f"{path}={own[path]}" for path in varied if path in own)])

    return label
