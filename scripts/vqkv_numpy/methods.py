"""The registered methods by name (lib/codec/methods/methods.inc)."""
from .numbers import UnknownKind
from .scalars import CalibQuant, Exact, Fp8, Ggml, Kivi, Kvquant, QjlValues, QuantSpec, Rtn, SpeCache
from .tensors import Hqq, Quanto
from .vectors import CommVqKeys, CommVqValues, Kumar, Pq, QjlKeys, Rvq, make_simvq

METHODS = {"exact": Exact, "rtn": Rtn, "kivi": Kivi, "quantspec": QuantSpec, "specache": SpeCache, "kvquant": Kvquant,
           "ggml": Ggml, "fp8": Fp8, "pq": Pq, "rvq": Rvq, "kumar": Kumar, "simvq": make_simvq, "calibquant": CalibQuant,
           "quanto": Quanto, "hqq": Hqq,
           "commvq": {"k": CommVqKeys, "v": CommVqValues}, "qjl": {"k": QjlKeys, "v": QjlValues}}


def make_method(name, knobs, unit, params):
    if name not in METHODS:
        raise UnknownKind(f"method '{name}'; known: {', '.join(METHODS)}")
    kind = METHODS[name]
    return (kind[unit.role] if isinstance(kind, dict) else kind)(knobs, unit, params)
