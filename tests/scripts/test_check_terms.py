"""scripts/check-terms refuses what it says it refuses, each by name: test_check_terms.py CHECK_TERMS COMPILER"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

FILES = {
    # Every kind has its answer: one more does not compile.
    "lib/cache/whole.cpp": """#include "codec/linear_map.h"
#include "codec/plan.h"
using namespace vqkv;
int of(const PlanTerm& t) {
  return std::visit(
      Overloaded{[](const TableTerm&) { return 1; }, [](const LevelsTerm&) { return 2; }, [](const DenseTerm&) { return 3; },
                 [](const SignTerm&) { return 4; }}, t);
}
""",
    # One kind by itself, and the rest falls through.
    "lib/cache/one_kind.cpp": """#include "codec/plan.h"
using namespace vqkv;
const void* of(const PlanTerm& t) { return std::get_if<TableTerm>(&t); }
""",
    # An answer for whatever comes.
    "lib/cache/any_map.cpp": """#include "codec/linear_map.h"
using namespace vqkv;
int of(const LinearMap& m) {
  return std::visit(Overloaded{[](const GatherMap&) { return 1; }, [](const auto&) { return 0; }}, m);
}
""",
}
WANTED = [
    "lib/cache/any_map.cpp: compiles with a kind of LinearMap it doesn't know",
    "lib/cache/one_kind.cpp: compiles with a kind of PlanTerm it doesn't know",
    "lib/cache/one_kind.cpp:3: one kind of term by itself",
]

lib = pathlib.Path(sys.argv[1]).resolve().parent.parent / "lib"
with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    shutil.copytree(lib, root / "lib", ignore=lambda at, names: [n for n in names if n.endswith((".cpp", ".cu"))])
    for name, text in FILES.items():
        (root / name).write_text(text)
    done = subprocess.run([sys.argv[1], sys.argv[2], root], capture_output=True, text=True)
    found = sorted(done.stdout.splitlines())
    assert done.returncode == 1, done
    assert len(found) == len(WANTED) and all(f.startswith(w) for f, w in zip(found, WANTED)), (found, WANTED)
