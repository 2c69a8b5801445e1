"""Run the suite against a backend and say what came of it."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from sa_softmax import backends
from sa_softmax._load import named
from sa_softmax._validate import DTYPES
from sa_softmax.backends.protocol import OPERATIONS, Backend
from sa_softmax.conformance import golden
from sa_softmax.conformance.cases import Case, Mismatch, cases

__all__ = ["SPEC_VERSION", "STATUSES", "SUITE_VERSION", "Report", "Result", "execute", "load", "parametrize", "run"]

SPEC_VERSION = "1.0"
SUITE_VERSION = "1.0"

STATUSES = ("passed", "failed", "skipped", "expected")
"""What a case can come to: skipped is what the backend does not declare, expected what failed as it was said to."""


@dataclass(frozen=True)
class Result:
    """What became of one case.

    status: one of STATUSES.
    error: the largest error in units of its bound; at most 1 for a pass. None if nothing was measured.
    """

    id: str
    clauses: tuple[str, ...]
    status: str
    error: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Report:
    """The outcome of a run, as the JSON file holds it."""

    backend: str
    version: str
    implementation: str
    device: str
    results: tuple[Result, ...]
    problems: tuple[str, ...]
    """What is wrong with the run itself: nothing executed, stale expectations, unexpected passes."""
    suite_version: str = SUITE_VERSION
    spec_version: str = SPEC_VERSION
    golden_sha256: str = field(default_factory=golden.digest)
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")

    def count(self, status: str) -> int:
        """How many cases came to ``status``."""
        return sum(result.status == status for result in self.results)

    @property
    def ok(self) -> bool:
        """Whether the backend conforms: no case failed, and the run itself has no problem."""
        return not self.problems and not self.count("failed")

    def worst(self) -> Result | None:
        """The passed case that came closest to its bound."""
        measured = [r for r in self.results if r.status == "passed" and r.error is not None]
        return max(measured, key=lambda r: r.error or 0.0, default=None)

    def write(self, path: Path) -> None:
        """Write the report as JSON, one case a line."""
        head = {key: value for key, value in asdict(self).items() if key != "results"}
        head["counts"] = {status: self.count(status) for status in STATUSES}
        lines = ",\n".join("  " + json.dumps(_line(result)) for result in self.results)
        path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "results": [\n{lines}\n ]\n}}\n')


def load(name: str) -> Backend:
    """A backend by its registered name, or ``module:attribute`` (an object, or a class or function that makes one).

    Raises ValueError for an unknown name or an object that does not meet the protocol, ImportError with the extra to
    install for a framework that is missing.
    """
    backend = named(name) if ":" in name else backends.get(name).adapter()
    _check_protocol(backend, name)
    return backend


def run(
    backend: Backend,
    *,
    device: str | None = None,
    expect: Path | None = None,
    progress: Callable[[list[Case]], Any] = iter,
) -> Report:
    """Run every case against ``backend``.

    Args:
        backend: an object that meets :class:`sa_softmax.backends.protocol.Backend`.
        device: one of ``backend.devices``; the first by default.
        expect: a file of expected failures, one ``ID  reason`` a line; an id may hold the wildcards of fnmatch.
            An expectation that matches no case that ran, or a case that passes, makes the run fail.
        progress: wraps the list of cases, to show how far the run is.

    Raises:
        ValueError: the device is not declared, or the expectations cannot be read.
    """
    device = _device(backend, device)
    expectations = {} if expect is None else _expectations(expect)
    results, problems = [], []
    matched = dict.fromkeys(expectations, False)
    for result in execute(backend, device, progress):
        patterns = [pattern for pattern in expectations if fnmatchcase(result.id, pattern)]
        if patterns and result.status != "skipped":
            matched |= dict.fromkeys(patterns, True)
            if result.status == "passed":
                problems.append(f"unexpected pass: {result.id} is expected to fail ({expectations[patterns[0]]})")
            else:
                reason = expectations[patterns[0]]
                result = Result(result.id, result.clauses, "expected", result.error, f"{reason}: {result.message}")
        results.append(result)
    problems += [
        f"stale expectation: no case that ran matches {pattern}" for pattern, hit in matched.items() if not hit
    ]
    if all(result.status == "skipped" for result in results):
        problems.append("no case was executed: the backend declares nothing that the suite can run")
    return Report(
        backend.name,
        getattr(backend, "version", "unknown"),
        getattr(backend, "implementation", "unknown"),
        device,
        tuple(results),
        tuple(problems),
    )


def execute(
    backend: Backend, device: str | None = None, progress: Callable[[list[Case]], Any] = iter
) -> Iterator[Result]:
    """The result of each case in turn."""
    device = _device(backend, device)
    for case in progress(list(cases())):
        missing = _undeclared(case, backend)
        if missing:
            yield Result(case.id, case.clauses, "skipped", message=missing)
            continue
        try:
            yield Result(case.id, case.clauses, "passed", case.check(backend, device))
        except Mismatch as mismatch:
            yield Result(case.id, case.clauses, "failed", message=str(mismatch))
        except Exception as error:
            yield Result(case.id, case.clauses, "failed", message=f"{type(error).__name__}: {error}"[:500])


def parametrize(backend: Backend, device: str | None = None) -> Any:
    """A pytest mark that gives a test one argument ``check`` per case; the test calls it::

        @parametrize(MyBackend())
        def test_conformance(check):
            check()

    What the backend does not declare is skipped.
    """
    import pytest

    _check_protocol(backend, type(backend).__name__)
    device = _device(backend, device)

    def param(case: Case) -> Any:
        missing = _undeclared(case, backend)
        marks = [pytest.mark.skip(reason=missing)] if missing else []
        return pytest.param(partial(case.check, backend, device), id=case.id, marks=marks)

    return pytest.mark.parametrize("check", [param(case) for case in cases()])


def _undeclared(case: Case, backend: Backend) -> str:
    if case.operation not in backend.operations:
        return f"{case.operation} is not declared"
    if case.dtype not in backend.dtypes:
        return f"{case.dtype} is not declared"
    return ""


def _device(backend: Backend, device: str | None) -> str:
    if device is None:
        return backend.devices[0]
    if device not in backend.devices:
        raise ValueError(f"backend {backend.name!r} has the devices {', '.join(backend.devices)}; got {device!r}")
    return device


def _check_protocol(backend: Any, name: str) -> None:
    see = "see sa_softmax.backends.protocol.Backend"
    missing = [
        attribute for attribute in ("name", "operations", "dtypes", "devices") if not hasattr(backend, attribute)
    ]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; {see}")
    for attribute, known in (("operations", OPERATIONS), ("dtypes", DTYPES), ("devices", None)):
        declared = getattr(backend, attribute)
        if isinstance(declared, str) or not isinstance(declared, Sequence) or not declared:
            raise ValueError(f"{name}.{attribute} must be a tuple with at least one name; got {declared!r}; {see}")
        unknown = [] if known is None else [str(item) for item in declared if item not in known]
        if unknown and known is not None:
            raise ValueError(f"{name}.{attribute} holds {', '.join(unknown)}; the suite knows {', '.join(known)}")
    for operation in backend.operations:
        if not callable(getattr(backend, operation, None)):
            raise ValueError(f"{name} declares {operation} in operations, but has no such method; {see}")


def _expectations(path: Path) -> dict[str, str]:
    expectations = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            pattern, _, reason = line.strip().partition(" ")
            if not reason.strip():
                raise ValueError(f"{path}:{number}: an expected failure is 'ID reason'; got {line!r} without a reason")
            expectations[pattern] = reason.strip()
    return expectations


def _line(result: Result) -> dict[str, Any]:
    """One case in the report; the clauses only where something is wrong, they fill the file otherwise."""
    line: dict[str, Any] = {"id": result.id, "status": result.status}
    if result.error is not None:
        line["error"] = float(f"{result.error:.3g}")
    if result.status in ("failed", "expected"):
        line["clauses"] = result.clauses
    if result.message:
        line["message"] = result.message
    return line
