"""scripts/check-promises refuses what it says it refuses, each by name: test_check_promises.py CHECK_PROMISES"""
import pathlib
import subprocess
import sys
import tempfile

README = """# tool

1. **Bytes are counted.** All of them.
2. **Nobody waits.**
"""
TESTS = 'TEST_CASE("bytes are \\"counted\\" "\n          "twice", "[x]") {}\n'
ROWS = {"bytes are counted": '`core:bytes are "counted" twice`', "nobody waits": '`core:bytes are "counted" twice`'}
FAULTS = [  # rows of the table -> what is said of them
    (ROWS, None),
    ({**ROWS, "nobody waits": "`core:nobody waits`"}, "no test of tests/core is called 'nobody waits'"),
    ({**ROWS, "nobody waits": "none yet"}, "no test in the row 'nobody waits'"),
    ({"bytes are counted": ROWS["bytes are counted"]}, "no row for README.md's promise 'Nobody waits'"),
]


def check(root, rows):
    table = "\n".join(f"| {promise} | {tests} |" for promise, tests in rows.items())
    (root / "CONTRIBUTING.md").write_text("## Which test holds which promise\n\n| promise (README) | tests |\n"
                                          f"| --- | --- |\n{table}\n\n## Next\n\n`core:no promise`\n")
    return subprocess.run([sys.argv[1], root], capture_output=True, text=True)


with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    (root / "tests" / "core").mkdir(parents=True)
    (root / "tests" / "core" / "test_x.cpp").write_text(TESTS)
    (root / "README.md").write_text(README)
    for rows, fault in FAULTS:
        done = check(root, rows)
        assert done.returncode == (fault is not None), done
        assert done.stdout == ("2 tests hold 2 promises\n" if fault is None else f"CONTRIBUTING.md: {fault}\n"), done
    (root / "README.md").write_text("no promises")
    assert "no numbered promises" in check(root, ROWS).stdout
