"""The authors' own functions, called on our rows: from checkouts that lie in one folder, each by the name of its repository, at
the revisions of REVISIONS. Needs torch (a build for CPUs will do), and for kernels in Triton its interpreter
(TRITON_INTERPRET=1, set here). Nothing of theirs is copied: what asks for a GPU by name gets the CPU instead."""
import contextlib
import os
import pathlib
import sys
import types
from types import SimpleNamespace

import numpy as np

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

REVISIONS = {"KIVI": ("jy-yuan/KIVI", "876b4d2d08e3"), "KVQuant": ("SqueezeAILab/KVQuant", "57a238357f0f"),
             "QJL": ("amirzandieh/QJL", "421d61cb97da"), "calibquant": ("ActiveSky/calibquant", "57f7c8aaffd2"),
             "QuantSpec": ("rishabh-16/QuantSpec", "b2c3747cae6a"), "ThinK": ("SalesforceAIResearch/ThinK", "d200577a7e52"),
             "DecoQuant_code": ("lpyhdzx/DecoQuant_code", "7184cba73f7d"), "SimVQ": ("youngsheen/SimVQ", "d8bd94d9ca30"),
             "vqllm": ("iankur/vqllm", "1bab5b647fb7"), "CommVQ": ("UMass-Embodied-AGI/CommVQ", "d1f0377429b3"),
             "SpeCache": ("intelli-jsong/SpeCache", "22503219ca1f")}

torch.Tensor.cuda = lambda self, *_, **__: self
torch.nn.Module.cuda = lambda self, *_, **__: self
torch.cuda.device = lambda *_: contextlib.nullcontext()


def f32(x):
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))


def by_head(given):
    """(1, heads, tokens, head_dim)."""
    return f32(given.x.reshape(len(given.x), given.heads, -1).swapaxes(0, 1))[None].contiguous()


def rows(y):
    """Back from by_head."""
    return y[0].float().numpy().swapaxes(0, 1).reshape(y.shape[2], -1)


class Checkouts:
    def __init__(self, folder):
        self.folder, self.loaded = pathlib.Path(folder).resolve(), {}

    def module(self, path, package=None, edits=(), **stand_ins):
        """The module at `path` of a checkout, in its package's place. edits: texts of its source (constants of a shape that
        are not arguments) and what stands there instead; stand_ins: modules that are no part of what is asked here."""
        key = (path, tuple(edits))
        if key not in self.loaded:
            for name, stand_in in stand_ins.items():
                sys.modules.setdefault(name, stand_in)
            file = self.folder / path
            if package:
                root = self.folder / package
                sys.path.insert(0, str(root.parent))
                name = ".".join(file.relative_to(root.parent).with_suffix("").parts)
                if root.name not in sys.modules:  # without what its __init__ asks for
                    for parent in [p for p in file.relative_to(root.parent).parents if p.parts][::-1]:
                        stub = types.ModuleType(".".join(parent.parts))
                        stub.__path__ = [str(root.parent / parent)]
                        sys.modules[stub.__name__] = stub
            else:
                name = f"authors_{len(self.loaded)}"
            module = types.ModuleType(name)
            module.__file__, module.__package__ = str(file), name.rpartition(".")[0]
            sys.modules[name] = module
            source = file.read_text()
            for old, new in edits:
                if old not in source:
                    raise SystemExit(f"{file}: no '{old}': another revision?")
                source = source.replace(old, new)
            exec(compile(source, str(file), "exec"), module.__dict__)
            self.loaded[key] = module
        return self.loaded[key]

    def ways(self, name):
        """What of the authors' stands beside our reading of a system: words -> a way of compare_authors.py."""
        return {how: SimpleNamespace(run=lambda given, run=run: run(self, given), excuse=excuse)
                for how, (run, excuse) in WAYS.get(name, {}).items()}


# ---- KIVI ----

def kivi(bits, dtype):
    def run(at, given):
        pack = at.module("KIVI/quant/new_pack.py")
        x, kind = by_head(given).to(dtype), "k" if given.role == "k" else "v"
        packed = getattr(pack, f"quant_and_pack_{kind}cache")(x, 32, bits)
        codes = pack.unpack_tensor(packed[0], bits, 2 if kind == "k" else 3).to(dtype)
        group = (1, given.heads, -1, 32, x.shape[3]) if kind == "k" else (*x.shape[:3], -1, 32)
        return rows((codes.view(group) * packed[1] + packed[2]).view(x.shape))
    return run


def kivi_triton(bits):
    def run(at, given):
        pack = at.module("KIVI/quant/new_pack.py")
        x = by_head(given).half()
        if given.role == "k":  # the cache packs keys transposed
            x = x.transpose(2, 3).contiguous()
        code, scale, low = pack.triton_quantize_and_pack_along_last_dim(x, 32, bits)
        y = pack.unpack_and_dequant_vcache(code, scale[..., None], low[..., None], 32, bits)
        return rows(y.transpose(2, 3) if given.role == "k" else y)
    return run


# ---- KVQuant ----

def kvquant_calibrated(at, given, bits, outliers):
    k = at.module("KVQuant/quant/kvquant/simquant_module_quantizer.py")
    width = given.x.shape[1]
    calibration = k.SimQuant(torch.nn.Linear(width, width, bias=False), bits, qchannel=0 if given.role == "k" else -1)
    calibration.out, calibration.nsamples = f32(given.train), 1
    return calibration.quantize(include_sparse=True, sparsity_threshold=1 - outliers, nuq=True,
                                fisher=f32(given.train_gradient2))


def kvquant(bits, outliers, own_levels):
    """Their thresholds and their layer. That multiplies by a weight first; here that is what the trace holds already."""
    def run(at, given):
        k = at.module("KVQuant/quant/kvquant/simquant_module_quantizer.py")
        width, keys = given.x.shape[1], given.role == "k"
        upper, lower, levels = kvquant_calibrated(at, given, bits, outliers)
        if not own_levels:
            levels = [given.levels().astype(np.float32)[:, None]]
        layer = k.QuantLinearSim("", bits, (upper, lower, levels), width, width, torch.eye(width).half(), None,
                                 perchannel=keys, include_sparse=True, sparsity_threshold=1 - outliers,
                                 dynamicquantization=not keys, nuq=True, nf_nuq=False)
        return layer(f32(given.x)).float().numpy()
    return run


def kvquant_levels(bits, outliers):
    """The error that their levels have where they were learned, beside ours."""
    def run(at, given):
        from compare_authors import kvquant_learned
        return kvquant_learned(lambda g: kvquant_calibrated(at, g, bits, outliers)[2][0].reshape(-1))(given)
    return run


# ---- QJL ----

def qjl(draws=0):
    """Signs and norms by their code in PyTorch; that of the score is CUDA alone, and read in NumPy here. draws: that many of
    their projections beside as many of ours, else ours alone."""
    def run(at, given):
        if draws:
            from compare_authors import qjl_reading
            seeds = range(draws)
            return (np.concatenate([given.x] * draws), np.concatenate([qjl_reading(given, seed) for seed in seeds]),
                    np.concatenate([once(at, given, seed) for seed in seeds]))
        return once(at, given)

    def once(at, given, seed=None):
        from vqkv_numpy.vectors import sign_sketch
        q = at.module("QJL/models/llama3_utils_qjl.py",
                      edits=((", device='cuda')", ")"), ("[:, :, :, :, :s // 16]", "")),
                      qjl_kernel=SimpleNamespace(qjl_kernel=None))
        m, (tokens, d) = given.unit.method, given.x.shape
        made = q.QJLSketch((d, m.rows), m.outlier_rows, device="cpu", rng=torch.Generator().manual_seed(seed or 0))
        if seed is None:
            made.proj_dir_quant = f32(sign_sketch(m.rows, d, True, m.knobs["seed"]))
        s, group = made.proj_dir_quant.double().numpy(), m.layout.block_tokens
        x = f32(given.x).view(1, 1, tokens // group, group, d)
        loud = x.norm(dim=-2).topk(m.outliers, dim=-1).indices
        mask = torch.zeros(1, 1, tokens // group, d).scatter_(-1, loud, 1.0)
        inlier, outlier = made.qjl_qunatize(x, mask, made.proj_dir_quant)

        def signs(packed, count):
            bits = np.unpackbits(packed.numpy().reshape(tokens, -1), axis=1, bitorder="little")
            return 2.0 * bits[:, :count] - 1

        apart = mask.bool().numpy().repeat(group, axis=2).reshape(tokens, d)
        norm, outlier_norm = (np.linalg.norm(v, axis=1, keepdims=True) for v in (given.x, np.where(apart, given.x, 0)))
        rest = np.sqrt(norm**2 - outlier_norm**2)
        half = np.sqrt(np.pi / 2)
        inside = half / m.rows * rest * (signs(inlier, m.rows) @ s)
        outside = half / m.outlier_rows * outlier_norm * (signs(outlier, m.outlier_rows) @ s[: m.outlier_rows])
        return np.where(apart, outside, inside)
    return run


# ---- CalibQuant, QuantSpec, SpeCache (by another hand), ThinK, DecoQuant ----

def calibquant(bits, clip):
    def run(at, given):
        c = at.module("calibquant/calibquant.py", edits=(("@torch.compile", ""),))
        factor = {"k": c.SCALE_K, "v": c.SCALE_V}[given.role] if clip else 1
        return c.quant(f32(given.x)[None], bits, per_channel=True, scale=factor)[0][0].numpy()
    return run


def quantspec(dtype):
    def run(at, given):
        q = at.module("QuantSpec/kernels/quantize/quant_pack_int8toint8_upperlower.py", package="QuantSpec/kernels")
        x, group = by_head(given).to(dtype), 32
        if given.role == "v":  # their groups of a value are its head; tokens of a transposed one are its channels
            x = x.transpose(2, 3).contiguous()
        wide = x.shape[3]
        packed = -(-wide // 128) * 128  # their kernel packs 128 together
        x = x.repeat(1, 1, 1, -(-packed // wide))[..., :packed].contiguous()
        upper, lower, scale, low = q.triton_int8toint8_upperlower_quantize_along_penultimate_dim_and_pack_along_last_dim(
            x, group, 4)

        def nibbles(code):
            code = code.view(torch.uint8)
            return torch.stack([code & 15, code >> 4], dim=-1).flatten(-2).to(dtype)

        scale, low = (v.repeat_interleave(group, dim=2) for v in (scale, low))
        y = (nibbles(upper) * scale + (nibbles(lower) - 8) * (scale / 16) + low)[..., :wide]
        return rows(y.transpose(2, 3) if given.role == "v" else y)
    return run


def specache(at, given):
    s = at.module("SpeCache/specache/utils_specache_quant.py")
    method = "channel" if given.role == "k" else "token"
    codes, scale, zero = s.quantize_and_pack_cache(by_head(given), method, 32, 1, simulate=True, do_specache_ver=True)
    y = (codes.clamp(0, 1) * scale + zero).numpy()  # the loudest value of a group gets code 2 there
    return (y.reshape(given.x.shape[1], -1).T if method == "channel" else y).reshape(given.x.shape)


def think(at, given):
    """Their mask is each query head's, ours the KV head's: theirs here, of one head with the energies of all its queries."""
    t = at.module("ThinK/ThinK_flash/src/kv_pruning_utils.py")
    queries = f32(np.sqrt((given.queries**2).mean(axis=0)))[None, None]
    _, _, kept = t.key_pruner_query_driven(f32(given.prompt)[None, None], queries, 32, 0.4)
    return np.where(kept[0, 0].numpy(), given.x, 0)


def decoquant(bits, run_of):
    def run(at, given):
        svd = SimpleNamespace(computeSVD=lambda m: np.linalg.svd(m, full_matrices=False))
        os.environ["DECOQUANT_PATH"] = str(at.folder / "DecoQuant_code")
        mpo = at.module("DecoQuant_code/language_model/tools/Matrix2MPO_beta.py", svd_module=svd)
        fake = at.module("DecoQuant_code/icl/models/fake_quant.py")
        tokens, width = given.prompt.shape
        shape = mpo.MPO([tokens, 1], [width // run_of, run_of], 100000)
        parts, _, _ = shape.matrix2mpo(given.prompt.astype(np.float32))
        large, small = (torch.from_numpy(np.ascontiguousarray(p, np.float32)) for p in parts)
        # One scale a token: as many rows as tokens.
        large = fake.quantize_activation_per_token_absmax(large.reshape(tokens, -1).clone(), bits).numpy()
        y = large.reshape(-1, run_of) @ small.numpy().reshape(run_of, run_of)
        return y.reshape(tokens, width)[: len(given.x)]
    return run


# ---- SimVQ, vqllm, CommVQ ----

def simvq(at, given):
    """Their quantizer a stage, greedily on what the stages before leave: the books as ours were trained, through a layer that
    changes nothing."""
    q = at.module("SimVQ/taming/modules/vqvae/quantize.py")
    rest = f32(given.x)
    for words in given.books():
        stage = q.SimVQ1D(*words.shape)
        stage.embedding.weight.data = f32(words)
        torch.nn.init.eye_(stage.embedding_proj.weight)
        torch.nn.init.zeros_(stage.embedding_proj.bias)
        with torch.no_grad():
            rest = rest - stage(rest.T[None])[0][0][0].T
    return given.x - rest.numpy()


def interleaved(given, x):
    """(1, tokens, heads, 1, head_dim) as the authors' models lay keys before RoPE: x_0, y_0, x_1, ..."""
    x = x.reshape(len(x), given.heads, -1)
    if given.role == "k":
        x = x.reshape(*x.shape[:2], 2, -1).swapaxes(2, 3).reshape(x.shape)
    return f32(x)[None, :, :, None]


def halves(given, y):
    y = y[0, :, :, 0].numpy()
    if given.role == "k":
        y = y.reshape(*y.shape[:2], -1, 2).swapaxes(2, 3).reshape(y.shape)
    return y.reshape(len(y), -1)


def vqllm_quantizers(at, stages, entries, width):
    q = at.module("vqllm/vqllm/quantizer/quantize.py", package="vqllm/vqllm")
    made = [q.VQVAEQuantize(1, entries, width, decay=0.99) for _ in range(stages)]
    for one in made:
        one.reorder_channel = True
    return made


def vqllm_code(at, given, quantizers):
    u = at.module("vqllm/vqllm/quantizer/utils.py", package="vqllm/vqllm")
    code = u.quantize_key if given.role == "k" else u.quantize_value
    with torch.no_grad():
        return halves(given, code(interleaved(given, given.x), None, quantizers, False)[0])


def vqllm(at, given):
    """Books as ours were trained."""
    books = given.books()
    quantizers = vqllm_quantizers(at, *books.shape)
    for one, words in zip(quantizers, books):
        one.codebook.weight.data = f32(words)
        one.data_initialized.fill_(1)
        one.eval()
    return vqllm_code(at, given, quantizers)


def vqllm_trained(at, given):
    """Their k-means start and moving averages, as many steps of as many group vectors as ours."""
    u = at.module("vqllm/vqllm/quantizer/utils.py", package="vqllm/vqllm")
    knobs, books = given.unit.method.knobs, given.books()
    np.random.seed(0)
    torch.manual_seed(0)
    quantizers = vqllm_quantizers(at, *books.shape)
    code = u.quantize_key if given.role == "k" else u.quantize_value
    of_token = given.x.shape[1] // books.shape[2]
    for step in range(knobs["ema_steps"] + 1):  # the first finds the start, from all there is
        picked = given.train
        if step > 0:
            picked = picked[np.random.choice(len(picked), min(len(picked), knobs["ema_batch"] // of_token), replace=False)]
        with torch.no_grad(), contextlib.redirect_stdout(None):
            for one in quantizers:
                one.train(step > 0 or one.data_initialized.item() == 0)
            code(interleaved(given, picked), None, quantizers, True)
            if step > 0:
                for one in quantizers:
                    one.update_codebook_weight()
    return vqllm_code(at, given, [one.eval() for one in quantizers])


def commvq_trained(at, given):
    """Their expectation and maximization on the tokens that ours learned from, in their 100 steps a stage."""
    if given.role == "v":
        return None, None, None
    m, width = given.unit.method, given.unit.method.codewords.shape[2]
    em = at.module("CommVQ/training/quantize_key_cache.py", edits=(
        ("N_BITS = 12", f"N_BITS = {2 * m.knobs['bits']}"), ("M_GROUP = 128", f"M_GROUP = {width}")),
        **{"tqdm.contrib.concurrent": SimpleNamespace(process_map=None)})
    torch.manual_seed(0)
    x = f32(given.train.reshape(len(given.train), given.heads, 2, -1).swapaxes(2, 3).reshape(len(given.train), -1))
    length = x.norm(dim=1, keepdim=True)
    em.N, books = len(x), []
    for g in range(m.groups):
        rest, centres, scale = (x / length)[:, g * width : (g + 1) * width], [], 1.0
        for stage in range(m.stages):
            centres.append(em.run_em_algorithm(rest, length, scale)["clustering_centers"])
            scale = scale / 10 if stage % 4 == 0 else scale
            rest = rest - em.quantize_tensor(rest, centres[-1])
        books.append(centres)
    return commvq_keys(at, given, books)


def commvq_rows(given, y):
    return y.reshape(len(y), given.heads, -1, 2).swapaxes(2, 3).reshape(len(y), -1)


def commvq_keys(at, given, books):
    """books (groups, stages) of centres (entries^2, width): their KeyCompressor's encode and decode."""
    e = at.module("CommVQ/commvq/compress_evaluation.py", edits=((", 2, 64).transpose(3, 4)", ", 2, -1).transpose(3, 4)"),))
    made = e.KeyCompressor.__new__(e.KeyCompressor)
    torch.nn.Module.__init__(made)
    made.num_key_value_heads, made.layer_idx = given.heads, given.unit.layer
    made.codebook = torch.stack([torch.stack(stages) for stages in books], dim=1)
    with torch.no_grad():
        y = made.decode(*made.encode(f32(given.x)[None]))
    return commvq_rows(given, y[0].numpy())


def commvq_values(at, given):
    """Their ValueCompressor with our network and matrix, and the likeliest symbol for the one that it draws."""
    e = at.module("CommVQ/commvq/compress_evaluation.py", edits=((", 2, 64).transpose(3, 4)", ", 2, -1).transpose(3, 4)"),))
    p, width = {k: f32(v) for k, v in given.unit.method.params.items()}, given.x.shape[1]
    made = e.ValueCompressor(given.unit.method.knobs["value_bits"], width)
    hidden = len(p["first"])
    made.enc1, made.out = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, made.embed_dim)
    made.enc1.weight.data, made.enc1.bias.data = p["first"], p["first_bias"]
    made.out.weight.data, made.out.bias.data = p["second"], p["second_bias"]
    made.learnable_scale.data = p["channel_scale"]
    made.embedding.data = p["rows"] / p["channel_scale"]
    likeliest = lambda x, **_: torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)  # noqa: E731
    drawn, torch.nn.functional.gumbel_softmax = torch.nn.functional.gumbel_softmax, likeliest
    try:
        with torch.no_grad():
            return made.decode(*made.encode(f32(given.x)[None]))[0].numpy()
    finally:
        torch.nn.functional.gumbel_softmax = drawn


def commvq(at, given):
    """Books as ours were trained."""
    if given.role == "v":
        return commvq_values(at, given)
    books = []
    for g in range(given.unit.method.groups):
        z = [stage[g] for stage in given.complex_books()]
        centres = [(w[:, None] + 1j * w[None]).reshape(-1, w.shape[1]) for w in z]
        books.append([f32(np.stack([c.real, c.imag], axis=2).reshape(len(c), -1)) for c in centres])
    return commvq_keys(at, given, books)


WAYS = {  # what of theirs: (function of the checkouts and of Given, why its error may differ)
    "KIVI, 2 bits": {"authors' PyTorch in fp32": (kivi(2, torch.float32), ""),
                     "authors' PyTorch in fp16": (kivi(2, torch.float16), ""), "authors' Triton in fp16": (kivi_triton(2), "")},
    "KIVI, 4 bits": {"authors' PyTorch in fp32": (kivi(4, torch.float32), ""),
                     "authors' PyTorch in fp16": (kivi(4, torch.float16), ""), "authors' Triton in fp16": (kivi_triton(4), "")},
    "KVQuant": {"authors' thresholds and layer, our levels": (kvquant(3, 0.01, False), ""),
                "authors' thresholds, levels and layer": (kvquant(3, 0.01, True), "learned"),
                "authors' levels, weighted": (kvquant_levels(3, 0.01), "learned")},
    "QJL": {"authors' PyTorch, our projections": (qjl(), ""), "authors' PyTorch, 8 draws each": (qjl(8), "drawn")},
    "CalibQuant, 1 bit": {"authors' PyTorch": (calibquant(1, True), "")},
    "CalibQuant, 2 bits": {"authors' PyTorch": (calibquant(2, False), "")},
    "QuantSpec": {"authors' Triton in fp32": (quantspec(torch.float32), ""),
                  "authors' Triton in fp16": (quantspec(torch.float16), "fp16")},
    "SpeCache, 1 bit": {"a port's PyTorch, codes clamped": (specache, "")},
    "ThinK": {"authors' PyTorch": (think, "")},
    "DecoQuant": {"authors' PyTorch and NumPy": (decoquant(4, 16), "")},
    "VQKV": {"SimVQ's PyTorch, our books": (simvq, "")},
    "Kumar": {"authors' PyTorch, our books": (vqllm, ""), "authors' PyTorch, their training": (vqllm_trained, "learned")},
    "CommVQ": {"authors' PyTorch, our books": (commvq, ""), "authors' PyTorch, their training": (commvq_trained, "learned")},
}
