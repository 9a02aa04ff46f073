"""A trace as h5py, xarray and h5ls see it: axes have names, values are right. And a trace that h5py changed: what the
tools can't read is refused by its name."""
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import h5netcdf  # noqa: F401
    import h5py
    import netCDF4  # noqa: F401  what xarray opens a file with unless told otherwise
    import numpy as np
    import xarray as xr
    if not shutil.which("h5ls"):
        raise ImportError("no h5ls")
except ImportError as e:
    print(f"not run: {e} (Debian: python3-h5py python3-h5netcdf python3-netcdf4 python3-xarray hdf5-tools)")
    sys.exit(1 if os.environ.get("VQKV_NO_SKIP") else 77)

make_trace = sys.argv[1]
vqkv_dump = sys.argv[2] if len(sys.argv) > 2 else None


def refusal(path, name, **how):
    """What `vqkv-dump verify` says of a copy of `path` whose dataset `name` was stored anew."""
    copy = path.replace(".trace.h5", ".copy.h5")
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as f:
        del f[name]
        f.create_dataset(name, **how)
    done = subprocess.run([vqkv_dump, "verify", copy], capture_output=True, text=True)
    assert done.returncode == 3, done
    return done.stderr


def expected(what, layers, heads, tokens):
    l, h, t, c = np.ix_(np.arange(layers), np.arange(heads), np.asarray(tokens), np.arange(8))
    return ((what * 71 + l * 31 + h * 17 + t * 3 + c * 5) % 255 - 127).astype("f4")


with tempfile.TemporaryDirectory() as folder:
    for dtype in ("bf16", "f16", "f32"):
        path = os.path.join(folder, dtype + ".trace.h5")
        subprocess.run([make_trace, path, dtype], check=True)
        queries = [0, 7, 1000, 1099, 1100, 1149]
        with h5py.File(path) as f:
            assert f.attrs["format"] == "vqkv-trace" and f.attrs["format_version"] == 1 and f.attrs["complete"] == 1
            assert f["key"].shape == (3, 2, 1150, 8) and f["key"].chunks == (1, 1, 1024, 8) and f["key"].compression is None
            assert [d.label for d in f["key"].dims] == ["layer", "kv_head", "token", "channel"]
            assert [d.label for d in f["query"].dims] == ["layer", "q_head", "query_token", "channel"]
            assert f["key"].dims[2][0].name == "/token"
            # 16-bit types describe themselves: h5py widens bf16 to float32, f16 is numpy's own.
            assert f["key"].dtype == {"bf16": "float32", "f16": "float16", "f32": "float32"}[dtype]
            assert f["key"].id.get_type().get_size() == (4 if dtype == "f32" else 2)
            assert np.array_equal(f["key"][:], expected(0, 3, 2, range(1150)))
            assert np.array_equal(f["value"][:], expected(1, 3, 2, range(1150)))
            assert np.array_equal(f["query"][:], expected(2, 3, 4, queries))
        with xr.open_dataset(path, engine="h5netcdf") as ds:
            assert ds["key"].dims == ("layer", "kv_head", "token", "channel")
            assert ds["query_moment"].dims == ("document", "layer", "kv_head", "channel", "channel_b")
            assert ds["output_weight"].dims == ("layer", "hidden", "attention_channel")
            assert list(ds["query_token"].values) == queries
            assert np.array_equal(ds["value"].sel(layer=2, kv_head=1, token=1133).values, expected(1, 3, 2, [1133])[2, 1, 0])
            assert np.array_equal(ds["query"].sel(query_token=1149, layer=0).values, expected(2, 3, 4, [1149])[0, :, 0])
            assert np.array_equal(ds["key"].isel(token=(ds["doc"] == 1).values).values, expected(0, 3, 2, range(1100, 1150)))
            assert list(ds["position"].sel(token=[0, 1099, 1100, 1149]).values) == [0, 1099, 0, 49]
            moment = np.arange(2 * 8 * 8).reshape(2, 8, 8) / 3.0
            assert np.array_equal(ds["query_moment"].sel(document=1, layer=2).values, moment + 2)
            assert list(ds["moment_count"].values) == [2200, 100]
        if dtype != "f16":  # some versions of netCDF4, which xarray prefers where it is installed, know no f16
            with xr.open_dataset(path) as ds:
                assert ds["key"].dims == ("layer", "kv_head", "token", "channel") and ds["key"].dtype == "float32"
                assert np.array_equal(ds["key"].values, expected(0, 3, 2, range(1150)))
        if vqkv_dump and dtype == "bf16":
            opaque = refusal(path, "key", data=np.zeros((3, 2, 1150, 8), "V2"))
            assert "/key: 2 untyped (opaque) bytes a value, as h5py stores ml_dtypes' bfloat16" in opaque, opaque
            swapped = refusal(path, "key", data=np.zeros((3, 2, 1150, 8), ">f4"))
            assert "/key: another float of 32 bits; allowed: bf16" in swapped, swapped
            lzf = refusal(path, "key", data=np.zeros((3, 2, 1150, 8), "f4"), compression="lzf")
            assert "/key: filter lzf (32000) is not supported; allowed: none" in lzf, lzf
    listing = subprocess.run(["h5ls", "-r", path], check=True, capture_output=True, text=True).stdout
    for line in ("/key                     Dataset {3, 2, 1150, 8}", "/query                   Dataset {3, 4, 6, 8}",
                 "/query_moment            Dataset {2, 3, 2, 8, 8}", "/position                Dataset {1150}"):
        assert line in listing, listing
    assert "UNKNOWN" not in listing and len(listing.splitlines()) == 25, listing
print("ok")
