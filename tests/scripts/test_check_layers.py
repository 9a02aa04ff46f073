"""scripts/check-layers refuses what it says it refuses, each by name: test_check_layers.py CHECK_LAYERS"""
import pathlib
import subprocess
import sys
import tempfile

FILES = {
    "lib/attention/inside.cpp": '#include "cache/map.h"\n#include "cache/view.h"\n',
    "lib/attention/kernel.cu": '#include "device/device.h"\n#include "device/memory.h"\n#include <cuda_fp16.h>\n'
                               'asm("x");  // asm\n__shared__ int a;\nk<<<1, 2>>>();  // asm\n// __activemask\n',
    "lib/device/cuda.h": "#include <cuda_fp16.h>\n__shared__ int a;\n",
    "lib/attention/x86.cpp": "#include <immintrin.h>\nconst __m256 x = _mm256_setzero_ps();\n",
    "lib/attention/x86_avx2.cpp": "#include <immintrin.h>\n",
    "lib/cache/own.cpp": '#include "cache/map.h"\n',
    "lib/cache/own_cpu.cpp": '#include "cache/own_cpu.h"\n#include <hwy/highway.h>\n',
    "lib/cache/upwards.cpp": '#include "model/runtime.h"\n',
    "lib/io/hdf5_own.cpp": '#include "io/hdf5_library.h"\n#include <hdf5.h>\n',
    "lib/io/other.cpp": '#include "io/hdf5_library.h"\n',
    "lib/core/asked.cpp": "#if VQKV_X86_UNITS\n#include <immintrin.h>\n#else\n#include <cpuid.h>\n#endif\n",
    "lib/metric/hint.cpp": "x = nearest_name(a, b);\n",
    "lib/model/borrowed.cpp": '#include "cache/own_cpu.h"\n#include "core/dtype_avx2.h"\n',
    "lib/model/lanes.cpp": "#include <hwy/highway.h>\n",
    "lib/model/reader.cpp": "#include <hdf5.h>\n",
    "apps/tool/long.cpp": "\n" * 501,
    "apps/tool/long_enough.cpp": "\n" * 500,
}
WANTED = [
    "lib/attention/inside.cpp:1: cache/map.h is the inside of cache",
    "lib/attention/kernel.cu:2: device/memory.h is the inside of device",
    "lib/attention/kernel.cu:3: kernel files run emulated, too: device/device.h alone",
    "lib/attention/kernel.cu:3: cuda_fp16.h belongs in lib/device/cuda.h",
    "lib/attention/kernel.cu:4: kernel files run emulated, too: PTX is wrapped",
    "lib/attention/kernel.cu:5: kernel files run emulated, too: device::Shared",
    "lib/attention/kernel.cu:6: kernel files run emulated, too: device::launch",
    "lib/attention/x86.cpp:1: of x86-64 alone",
    "lib/attention/x86.cpp:2: of x86-64 alone",
    "lib/cache/upwards.cpp:1: cache may not include model/runtime.h",
    "lib/core/asked.cpp:4: of x86-64 alone",
    "lib/io/other.cpp:1: io/hdf5_library.h is for lib/io/hdf5* alone",
    "lib/metric/hint.cpp:1: nearest_name( is called in lib/core/ alone",
    "lib/model/borrowed.cpp:1: cache/own_cpu.h is of one processor and stays in cache",
    "lib/model/borrowed.cpp:1: cache/own_cpu.h is the inside of cache",
    "lib/model/borrowed.cpp:2: core/dtype_avx2.h is of one processor and stays in core",
    "lib/model/lanes.cpp:1: hwy/highway.h belongs in lib/core/",
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
