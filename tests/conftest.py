"""Fixtures of all tests. Compiled programs are cached between runs of the tests. Most optimisations
of XLA are off in the quick round, and on in the full round (`-m ""`, `make test-all`)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import hypothesis
import pytest

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/jax").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

QUICK = "not product"
"""The selection of tests that pyproject.toml makes."""

Command = Callable[..., "subprocess.CompletedProcess[str]"]

MINUSCULE = (
    "model.d_model=32",
    "model.attention.heads=2",
    "model.attention.kv_heads=1",
    "model.attention.head_dim=16",
    "model.mlp.hidden=48",
    "model.plan=[{repeats: 2}]",
    "train.steps=3",
    "train.batch=2",
    "train.length=32",
    "train.validation_batches=2",
)
"""Overrides of the preset tiny, for a model that trains in a second."""


QUICK_TO_COMPILE = ("xla_cpu_use_fusion_emitters=false", "xla_cpu_parallel_codegen_split_count=4")
"""Options of XLA that halve the time of compilation on a CPU."""


def pytest_configure(config: pytest.Config) -> None:
    """Choose XLA's optimisations before JAX is first used; child processes inherit the choice."""
    quick = config.option.markexpr == QUICK
    chosen = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
    if "jax" in sys.modules:  # imported by a plugin: JAX has read the environment
        sys.modules["jax"].config.update("jax_disable_most_optimizations", chosen == "1")
    if quick:
        given = os.environ.get("XLA_FLAGS", "").split()
        added = [f"--{option}" for option in known(QUICK_TO_COMPILE)]
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*given, *added]))


def known(options: Sequence[str]) -> list[str]:
    """Return those options of XLA that the installed jaxlib has; an unknown option would end the
    process."""
    package = importlib.util.find_spec("jaxlib")
    assert package is not None
    library = max(
        Path(str(package.origin)).parent.glob("*.so"), key=lambda file: file.stat().st_size
    )
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return [each for each in options if text.find(each.split("=")[0].encode()) >= 0]


@pytest.fixture(scope="module", autouse=True)
def _few_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the full round, forget compiled programs after each module: those of all tests fill the
    memory of a small machine."""
    yield
    if request.config.option.markexpr != QUICK and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """Run `mukv ARGS` in this process, since starting another costs seconds."""
    from mukv import cli
    from mukv.cli import launch

    given = ["mukv", *map(str, args)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", given),
        mock.patch.object(launch, "restart_with_allocator"),
        mock.patch.object(launch, "prepare"),
    ):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def mukv() -> Command:
    """Return a function that runs a command: mukv("train", "tiny") -> CompletedProcess."""
    return command


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a token file of forty short texts as bytes."""
    from mukv.data.build import build_tokens

    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        text = f"Déjà vu number {number}. " * (1 + number % 5)
        (folder / f"{number:02}.txt").write_text(text)
    return build_tokens([str(folder)], tmp_path_factory.mktemp("tokens") / "t", validation=0.3).path


@pytest.fixture(scope="session")
def trained(token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a minuscule model. Tests must not write to it."""
    out = tmp_path_factory.mktemp("runs") / "minuscule"
    done = command("train", "tiny", *MINUSCULE, f"data.path={token_file}", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the minuscule model as a Hugging Face folder. Tests must not write to it."""
    out = tmp_path_factory.mktemp("exported") / "folder"
    done = command("export", trained, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context manager: within `full_disk(limit)` no file may exceed `limit` bytes."""

    @contextmanager
    def limited(limit: int) -> Iterator[None]:
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of combinations that the laws were checked on."""
    passed = (report.nodeid for report in terminalreporter.stats.get("passed", []))
    laws = {name.split("[")[1].split("]")[0] for name in passed if "test_laws.py" in name}
    if laws:
        words = "combinations of attention, position and plan"
        terminalreporter.write_line(f"laws hold for {len(laws)} {words}")
    counted: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "counted":
                title, counts = value
                counted.setdefault(title, Counter()).update(counts)
    for title, counts in sorted(counted.items()):
        words = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
        terminalreporter.write_line(f"{title}: {counts.total()}: {words}")
    kills: dict[str, dict[str, int]] = {}
    hostile: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "kills":
                command, counts = value
                kills[command] = counts
            if name == "hostile":
                area, counts = value
                hostile.update({f"{area} {kind}": n for kind, n in counts.items()})
    if kills:
        total = sum(counts["killed"] for counts in kills.values())
        terminalreporter.write_line(f"killed before a file operation: {total} times")
        for command, counts in kills.items():
            words = ", ".join(f"{n} {kind}" for kind, n in counts.items())
            terminalreporter.write_line(f"  {command}: {words}")
    if hostile:
        terminalreporter.write_line(f"hostile inputs: {hostile.total()}")
        for kind, n in sorted(hostile.items()):
            terminalreporter.write_line(f"  {kind}: {n}")
