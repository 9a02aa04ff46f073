"""scripts/check-layers refuses what it says it refuses, each by name: test_check_layers.py CHECK_LAYERS"""
import pathlib
import subprocess
import sys
import tempfile

FILES = {
    "lib/attention/inside.cpp": '#include "cache/map.h"\n#include "cache/view.h"\n',
    "lib/cache/own.cpp": '#include "cache/map.h"\n',
    "lib/cache/upwards.cpp": '#include "model/runtime.h"\n',
    "lib/io/hdf5_own.cpp": '#include "io/hdf5_library.h"\n#include <hdf5.h>\n',
    "lib/io/other.cpp": '#include "io/hdf5_library.h"\n',
    "lib/metric/hint.cpp": "x = nearest_name(a, b);\n",
    "lib/model/reader.cpp": "#include <hdf5.h>\n",
    "apps/tool/long.cpp": "\n" * 501,
    "apps/tool/long_enough.cpp": "\n" * 500,
}
WANTED = [
    "lib/attention/inside.cpp:1: cache/map.h is the inside of cache",
    "lib/cache/upwards.cpp:1: cache may not include model/runtime.h",
    "lib/io/other.cpp:1: io/hdf5_library.h is for lib/io/hdf5* alone",
    "lib/metric/hint.cpp:1: nearest_name( is called in lib/core/ alone",
    "lib/model/reader.cpp:1: hdf5.h belongs in lib/io",
    "apps/tool/long.cpp: 501 lines; at most 500",
]

with tempfile.TemporaryDirectory() as folder:
    for name, text in FILES.items():
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run([sys.argv[1], folder], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(("lib/", "apps/"))]
    assert done.returncode == 1, done
    for wanted in WANTED:
        assert any(line.startswith(wanted) for line in found), (wanted, found)
    assert len(found) == len(WANTED), found
    assert f"{len(FILES)} files" in done.stdout, done.stdout
