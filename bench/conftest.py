import platform
from collections.abc import Iterator

import pytest
import torch

import gem_fast

THREADS = 2


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> Iterator[None]:
    """All methods get the same two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["gem_fast"] = gem_fast.build_info()
    machine_info["threads"] = THREADS


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, object]) -> None:
    """Keeps what says what kind of machine it was and drops whose it was, and each single measurement."""
    output_json.pop("commit_info", None)
    machine = output_json["machine_info"]
    assert isinstance(machine, dict)
    machine.pop("node", None)
    machine["cpu"] = {key: machine["cpu"][key] for key in ("brand_raw", "arch", "count") if key in machine["cpu"]}
    results = output_json["benchmarks"]
    assert isinstance(results, list)
    for result in results:
        result["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per benchmark: what users ask for is how many times as fast."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    terminalreporter.section(f"times as fast ({platform.machine()}, {THREADS} threads, medians of ratios)")
    for bench in session.benchmarks:
        info = bench.extra_info
        if "times_as_fast" not in info:
            continue
        ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in info["times_as_fast"].items())
        terminalreporter.line(f"{bench.name}: {info['median_seconds']['ours'] * 1e3:.3f} ms; {ratios}")
