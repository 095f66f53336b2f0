"""Fuzzes one target until the time is up or an input fails; coverage of the Python code guides the choice of inputs.

    cd tests && python -m fuzz.run operators -max_total_time=300

Options are libFuzzer's. A failing input is written to a file, which is replayed by naming it: fuzz.run operators FILE.
"""

import importlib
import sys

import atheris

# A target is a module of this folder with a function target(data: bytes) that raises on a failure. The readers of
# other files that strangers may hand us get theirs here, and in tests/test_fuzz.py.
TARGETS = ("operators", "idx", "checkpoint", "cifar")


def main() -> None:
    """The first argument names the target."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"the first argument must be one of {', '.join(TARGETS)}, got {' '.join(sys.argv[1:2]) or 'nothing'}")
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["gem_fast"]):
        module = importlib.import_module(f"fuzz.{name}")
    atheris.Setup([sys.argv[0], "-rss_limit_mb=8192", *sys.argv[1:]], module.target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
