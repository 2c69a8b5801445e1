"""Reports that a person can read: progress while a run goes on, a table of one run, a matrix of several."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sa_softmax.conformance.cases import Case, cases
from sa_softmax.conformance.runner import STATUSES, Report, Result

__all__ = ["matrix", "print_report", "progress"]

_SHOWN_FAILURES = 20


def progress(title: str, console: Console) -> Callable[[list[Case]], Iterable[Case]]:
    """What to pass as ``progress`` to :func:`sa_softmax.conformance.run` for a bar on ``console``."""
    return partial(track, description=title, console=console, transient=True)


def print_report(report: Report, console: Console) -> None:
    """Print the table of a run, its first failures with their clauses, and the verdict."""
    console.print(_table(report))
    failed = [result for result in report.results if result.status == "failed"]
    alike: dict[str, list[Result]] = {}
    for result in failed:
        alike.setdefault(result.message, []).append(result)
    for message, results in list(alike.items())[:_SHOWN_FAILURES]:
        more = f" and {len(results) - 1} more" if len(results) > 1 else ""
        console.print(f"[red]failed[/] {results[0].id}{more} [dim](clauses {_clauses(results)})[/]")
        console.print(f"       {message}", markup=False, highlight=False)
    shown = sum(len(results) for results in list(alike.values())[:_SHOWN_FAILURES])
    if len(failed) > shown:
        console.print(f"... and {len(failed) - shown} more; --report FILE.json lists them all")
    for problem in report.problems:
        console.print(f"[red]problem[/] {problem}")
    if failed:
        console.print(f"clauses of docs/spec.md touched by failures: {_clauses(failed)}")
    counts = ", ".join(f"{report.count(status)} {status}" for status in STATUSES)
    worst = report.worst()
    closest = f"; closest to its bound: {worst.id} at {worst.error:.2f}" if worst and worst.error else ""
    verdict = "[green]conforms[/]" if report.ok else "[red]does not conform[/]"
    console.print(f"{report.backend} on {report.device} {verdict} to spec {report.spec_version}: {counts}{closest}")


def _clauses(results: Iterable[Result]) -> str:
    return ", ".join(sorted({clause for result in results for clause in result.clauses}))


def matrix(reports: Sequence[Report]) -> Table:
    """Backends against groups of cases: the largest error in units of its bound, or how many cases failed."""
    table = Table(
        title="Conformance: the largest error of each group, in units of its bound",
        caption="-: not declared", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("group", no_wrap=True)
    for report in reports:
        table.add_column(report.backend, justify="right", no_wrap=True)
    for group in _groups():
        table.add_row(group, *(_cell(_of(report, group)) for report in reports))
    table.add_section()
    table.add_row("cases passed", *(str(report.count("passed")) for report in reports))
    return table


def _table(report: Report) -> Table:
    name = f"{report.backend} ({report.version}, {report.implementation}) on {report.device}"
    table = Table(title=name, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("group", no_wrap=True)
    for title in ("passed", "failed", "expected", "skipped", "worst\nforward", "worst\ngradient"):
        table.add_column(title, justify="right")
    for group in _groups():
        results = _of(report, group)
        cells = [
            str(sum(result.status == status for result in results) or "")
            for status in ("passed", "failed", "expected", "skipped")
        ]
        for part in ("forward", "vjp"):
            cells.append(_worst(result for result in results if result.id.endswith(f"/{part}")))
        table.add_row(group, *cells, style="red" if cells[1] else "")
    table.caption = "worst: largest error among the passed cases, in units of its bound"
    return table


def _groups() -> list[str]:
    return list(dict.fromkeys(case.group for case in cases()))


def _of(report: Report, group: str) -> list[Result]:
    return [result for result in report.results if result.id.startswith(f"{group}/")]


def _worst(results: Iterable[Result]) -> str:
    errors = [result.error for result in results if result.status == "passed" and result.error is not None]
    return f"{max(errors):.2f}" if errors else ""


def _cell(results: Sequence[Result]) -> str:
    if all(result.status == "skipped" for result in results):
        return "[dim]-[/]"
    failed = sum(result.status == "failed" for result in results)
    return f"[red]{failed} failed[/]" if failed else _worst(results)
