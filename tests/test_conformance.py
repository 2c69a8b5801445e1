"""The suite itself: the right backends pass, every wrong one is rejected, and nothing passes by accident."""

import importlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import backends
from typer.testing import CliRunner

from sa_softmax import __main__ as command_line
from sa_softmax import reference
from sa_softmax._validate import VARIANTS
from sa_softmax.backends import Entry
from sa_softmax.backends.numpy.adapter import ReferenceAdapter as Adapter
from sa_softmax.conformance import Case, GoldenDataError, cases, execute, generate, golden, load, oracle, run
from sa_softmax.conformance.cases import Mismatch, compare
from sa_softmax.conformance.inputs import LENGTHS, RowInput
from sa_softmax.conformance.kernel_mutants import kernel_mutants
from sa_softmax.conformance.mutants import mutants

mp = oracle.mp


# What passes and what does not.


@pytest.mark.parametrize("entry", backends())
def test_backend_conforms(entry: Entry) -> None:
    report = run(entry.adapter())
    failed = [f"{result.id}: {result.message}" for result in report.results if result.status == "failed"]
    assert not failed, "\n".join(failed[:20])
    assert report.ok
    assert report.count("passed") > 600


def shuffled(all_cases: Sequence[Case]) -> list[Case]:
    """A mutant that is wrong here and there meets one of its cases early."""
    return random.Random(0).sample(all_cases, len(all_cases))


@pytest.mark.parametrize("name", mutants())
def test_mutant_is_rejected(name: str) -> None:
    mutant = mutants()[name]
    assert any(result.status == "failed" for result in execute(mutant, progress=shuffled)), f"no case rejects {name}"


@pytest.mark.parametrize("name", kernel_mutants())
def test_kernel_mutant_is_rejected_for_a_wrong_answer(name: str) -> None:
    mutant = kernel_mutants()[name]
    for case in shuffled(cases()):
        try:
            case.check(mutant, "cpu")
        except Mismatch:
            return
    raise AssertionError(f"no case rejects {name}")


def test_there_are_many_mutants_and_each_differs_from_the_reference() -> None:
    everything = mutants() | kernel_mutants()
    assert len(everything) == len(mutants()) + len(kernel_mutants()) >= 200
    assert all(isinstance(mutant, Adapter) for mutant in everything.values())


def plain_softmax(record: golden.Record, variant: str) -> dict[str, Any]:
    """What a backend that computes softmax, or attention with it, answers; 0 on fully masked rows."""
    from unittest import mock

    softmax = np.errstate(all="ignore")(
        lambda z, on, axis, variant: np.where(on, reference._softmax(z, on, axis)[0], 0)
    )

    def vjp(z: Any, on: Any, g: Any, axis: int, variant: str) -> Any:
        with np.errstate(all="ignore"):
            p, g = reference._softmax(z, on, axis)[0], np.where(on, g, 0)
            return np.where(on, p * (g - (p * g).sum(axis, keepdims=True)), 0)

    with mock.patch.multiple(reference, _forward=softmax, _vjp=vjp):
        return answers(record, variant)


def answers(record: golden.Record, variant: str) -> dict[str, Any]:
    from sa_softmax.conformance.cases import _PARTS, call

    result: dict[str, Any] = {}
    for operation, outputs in _PARTS[record.is_attention].values():
        result |= dict(zip(outputs, call(Adapter(), operation, record, variant, "cpu"), strict=True))
    return result


def accepted(record: golden.Record, variant: str, part: tuple[str, ...], answer: dict[str, Any]) -> bool:
    try:
        for name in part:
            if name in record.outputs():
                compare(name, answer[name], record.expected(name, variant))
    except Mismatch:
        return False
    return True


def exactly_right(record: golden.Record, variant: str, part: tuple[str, ...], answer: dict[str, Any]) -> bool:
    """Whether the exact values themselves, rounded to the output's dtype, are the answer."""
    names = [name for name in part if name in record.outputs()]
    exact = [record.expected(name, variant) for name in names]
    with np.errstate(over="ignore"):
        return all(
            np.allclose(
                answer[name].astype(float),
                e.value.astype(e.dtype).astype(float),
                rtol=4 * np.finfo(np.float32).eps,
                atol=0,
                equal_nan=True,
            )
            if e.dtype != np.float64
            else np.allclose(answer[name], e.value, rtol=1e-14, atol=0, equal_nan=True)
            for name, e in zip(names, exact, strict=True)
        )


@pytest.mark.parametrize("wrong", ["zeros", "plain softmax"])
def test_no_bound_is_so_loose_that_a_wrong_answer_passes(wrong: str) -> None:
    checked = 0
    for record in golden.records():
        for variant in VARIANTS:
            if wrong == "zeros":
                answer = {
                    name: np.zeros(e.value.shape, e.dtype)
                    for name in record.outputs()
                    for e in [record.expected(name, variant)]
                }
            else:
                answer = plain_softmax(record, variant)
            parts = (("o",), ("dq", "dk", "dv", "dbias")) if record.is_attention else (("y",), ("dx",))
            for part in parts:
                if accepted(record, variant, part, answer):
                    assert exactly_right(record, variant, part, answer), (
                        f"{record.id} {variant} {part} lets {wrong} pass"
                    )
                else:
                    checked += 1
    assert checked > 2500


# The golden data.


def test_golden_data_is_small_and_covers_the_lengths() -> None:
    assert sum(path.stat().st_size for path in golden.DIRECTORY.iterdir()) <= 5_000_000
    names = {record.id.split("/")[1] for record in golden.records() if record.id.startswith("row.length/")}
    assert names == {f"n={n}" for n in LENGTHS}
    assert {1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 127, 129, 257, 1000, 1024, 4097, 65537} <= set(LENGTHS)


def test_generator_makes_the_committed_data_bit_by_bit() -> None:
    committed = {record.id: record for record in golden.records()}
    entries = {entry["id"]: entry for entry in json.loads((golden.DIRECTORY / "manifest.json").read_text())["records"]}
    inputs = list(generate.inputs())
    assert [f"{case.name}/{case.dtype}" for case in inputs] == list(entries)
    small = [case for case in inputs if isinstance(case, RowInput) or case.q.size * case.k.size < 500]
    for case in small[::17]:
        entry, given, expected = generate.record(case)
        record = committed[entry["id"]]
        assert json.loads(json.dumps(entry)) == entries[entry["id"]]
        assert set(given) == set(record.inputs)
        assert set(expected) == set(record._expected)
        for made, stored in ((given, record.inputs), (expected, record._expected)):
            for name, array in made.items():
                assert array.dtype == stored[name].dtype
                assert array.tobytes() == stored[name].tobytes(), f"{entry['id']}/{name}"


@pytest.mark.parametrize("damage", ["truncated", "one bit", "replaced", "missing"])
def test_damaged_golden_data_is_refused(damage: str, tmp_path: Path) -> None:
    directory = tmp_path / "golden"
    shutil.copytree(golden.DIRECTORY, directory)
    victim = directory / "expected.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "replaced":  # a header that claims more than the file holds
        victim.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    else:
        victim.unlink()
    with pytest.raises(GoldenDataError, match=r"expected\.safetensors"):
        golden.records(directory)


def test_oracle_agrees_with_finite_differences() -> None:
    """The gradient formula of the golden data against differences of its own forward, at 50 digits."""
    x = oracle.exact(np.array([0.75, -1.5, 2.0, 0.25, -0.5]))
    g = oracle.exact(np.array([1.0, -0.25, 0.5, -2.0, 0.75]))
    on = np.array([True, True, True, False, True])
    step = mp.mpf(10) ** -15
    for variant in VARIANTS:
        for sign in (1, -1, "positive", "negative"):
            row = abs(x) if sign == "positive" else -abs(x) if sign == "negative" else sign * x
            dx = oracle.row(row, g, on, variant, tiny=0, u=1).dx
            for j in range(len(x)):
                e = np.array([step if i == j else mp.mpf(0) for i in range(len(x))])
                up, down = (oracle.row(row + s * e, g, on, variant, tiny=0, u=1).y for s in (1, -1))
                assert abs((g * (up - down)).sum() / (2 * step) - dx[j]) < mp.mpf(10) ** -25


# The runner.


class Declared(Adapter):
    """The reference with fewer capabilities, or some wrong answers."""

    name = "declared"

    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


class WrongForIntegers(Adapter):
    name = "wrong-for-integers"

    def sa_softmax(self, x: Any, **options: Any) -> Any:
        return super().sa_softmax(x.astype(np.float32) if x.dtype == np.int32 else x, **options)


def test_undeclared_capabilities_are_skipped_in_plain_sight() -> None:
    report = run(Declared(operations=("sa_softmax",), dtypes=("float32",)))
    assert report.ok
    skipped = [result for result in report.results if result.status == "skipped"]
    assert {result.message for result in skipped} == {
        "sa_softmax_vjp is not declared", "sa_attention is not declared", "sa_attention_vjp is not declared",
        "float16 is not declared", "bfloat16 is not declared", "float64 is not declared",
    }  # fmt: skip
    assert len(skipped) + report.count("passed") == len(cases())


@pytest.mark.parametrize("nothing", [{"operations": ()}, {"dtypes": ()}])
def test_a_run_without_cases_fails(nothing: dict[str, Any]) -> None:
    report = run(Declared(**nothing))
    assert not report.ok
    assert any("no case was executed" in problem for problem in report.problems)


def expectations(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "expect.txt"
    path.write_text(text)
    return path


def test_expected_failures_pass_and_are_counted(tmp_path: Path) -> None:
    assert not run(WrongForIntegers()).ok
    report = run(WrongForIntegers(), expect=expectations(tmp_path, "# reasons\n\nrow.errors/int32  casts by design\n"))
    assert report.ok
    assert report.count("expected") == 1


def test_stale_and_unexpected_passes_fail(tmp_path: Path) -> None:
    text = "row.errors/int32 casts\nrow.errors/int33 no such case\nrow.errors/bool passes\n"
    report = run(WrongForIntegers(), expect=expectations(tmp_path, text))
    assert not report.ok
    assert len(report.problems) == 2
    assert any("stale expectation" in problem and "row.errors/int33" in problem for problem in report.problems)
    assert any("unexpected pass: row.errors/bool" in problem for problem in report.problems)


def test_expectation_without_a_reason_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a reason"):
        run(Adapter(), expect=expectations(tmp_path, "row.errors/int32\n"))


def test_bitwise_promise_is_held_to() -> None:
    class Sloppy(Adapter):
        name = "sloppy"
        bitwise_rows = True

        def sa_softmax(self, x: Any, **options: Any) -> Any:
            y = super().sa_softmax(x, **options)
            return np.nextafter(y, np.asarray(np.inf, y.dtype)) if len(x) == 1 and y.dtype == np.float64 else y

    failed = {result.id for result in run(Sloppy()).results if result.status == "failed"}
    assert "row.independence/alone/float64/product/forward" in failed


def test_an_exception_is_a_failure_that_names_itself() -> None:
    class Raising(Adapter):
        name = "raising"

        def sa_softmax(self, x: Any, **options: Any) -> Any:
            raise RuntimeError("kernel not built")

    report = run(Raising())
    messages = {result.message for result in report.results if result.status == "failed"}
    assert any("RuntimeError: kernel not built" in message for message in messages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "unknown backend 'nope'; known: numpy, torch"),
        ("no_such_module:Adapter", "there is no module 'no_such_module', neither in the current folder"),
        ("sa_softmax.backends.numpy.adapter:Missing", "has no attribute 'Missing'; did you mean Adapter"),
        ("builtins:object", "lacks name, operations, dtypes, devices"),
    ],
)
def test_a_backend_that_cannot_be_loaded_is_a_clear_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def Adapter(:", r"importing bad_backend raised SyntaxError: .*bad_backend.py"),
        ("import not_installed_at_all", "its module needs 'not_installed_at_all', which is not installed"),
        ("import numpy\nnumpy.no_such", r"importing bad_backend raised AttributeError: .*bad_backend.py:2"),
        ("def Adapter(device): pass", r"Adapter\(\) raised TypeError: .*It is called without arguments"),
        ("class Adapter:\n def __init__(self): raise OSError('no GPU')", r"raised OSError: no GPU .*bad_backend.py:2"),
        ("", "has no attribute 'Adapter'"),
        ("operations = ()", r"operations must be a tuple with at least one name; got \(\)"),
        ("operations = 'sa_softmax'", "operations must be a tuple with at least one name; got 'sa_softmax'"),
        ("devices = ()", r"devices must be a tuple with at least one name; got \(\)"),
        (
            "operations = ('sa_softmax', 'softmax')",
            "operations holds softmax; the suite knows sa_softmax, sa_softmax_vjp",
        ),
        ("operations = ('sa_softmax', 'sa_attention')", "declares sa_attention in operations, but has no such method"),
    ],
)
def test_a_module_of_ones_own_that_cannot_be_used_is_told_in_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source[:4] in ("oper", "devi"):
        head = "class Adapter:\n name, operations, dtypes, devices = 'own', ('sa_softmax',), ('float32',), ('cpu',)\n"
        source = f"{head} sa_softmax = print\n {source}\n"
    (tmp_path / "bad_backend.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_backend", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        load("bad_backend:Adapter")
    assert "\n" not in str(caught.value)
    sys.modules.pop("bad_backend", None)


def test_unknown_capability_and_device_are_clear_errors() -> None:
    with pytest.raises(ValueError, match="has the devices cpu; got 'cuda'"):
        run(Adapter(), device="cuda")
    sys.modules["declares_too_much"] = type(sys)("declares_too_much")
    sys.modules["declares_too_much"].backend = lambda: Declared(dtypes=("float8",))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="dtypes holds float8; the suite knows float16"):
        load("declares_too_much:backend")


# The entry points.


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(command_line._app(), list(arguments))


def test_command_line_reports_and_exits(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = invoke("conformance", "--backend", "numpy", "--report", str(path))
    assert result.exit_code == 0
    assert "conforms to spec" in result.output
    report = json.loads(path.read_text())
    assert report["backend"] == "numpy"
    assert report["golden_sha256"] == golden.digest()
    assert report["counts"]["passed"] == len(report["results"]) == len(cases())


def test_a_report_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    result = invoke("conformance", "--backend", "numpy", "--report", str(tmp_path / "missing" / "report.json"))
    assert result.exit_code == 2
    assert "conforms" not in result.output
    assert "there is no folder" in " ".join(result.stderr.split())


class InTuple(Adapter):
    name = "tuple"

    def sa_softmax(self, x: Any, **options: Any) -> Any:
        return (super().sa_softmax(x, **options),)


def test_a_lone_result_in_a_tuple_is_refused_and_failures_of_one_kind_are_told_once() -> None:
    result = invoke("conformance", "--backend", "test_conformance:InTuple")
    assert result.exit_code == 1
    assert result.output.count("y must be a NumPy array; got tuple") == 1
    assert " more (clauses " in " ".join(result.output.split())
    assert max(map(len, result.output.splitlines())) <= 80


def test_command_line_fails_for_a_wrong_backend() -> None:
    result = invoke("conformance", "--backend", "test_conformance:WrongForIntegers")
    assert result.exit_code == 1
    assert "row.errors/int32" in result.output
    assert "clauses D4" in result.output


@pytest.mark.parametrize("arguments", [("--backend", "nope"), ("--backend", "numpy", "--device", "cuda")])
def test_command_line_says_what_cannot_run(arguments: tuple[str, ...]) -> None:
    assert invoke("conformance", *arguments).exit_code == 2


def test_command_line_names_the_extra_of_a_missing_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "installed", lambda self: self.name == "numpy")
    absent = ModuleNotFoundError("No module named 'torch'")
    with mock.patch.object(importlib, "import_module", side_effect=absent):
        result = invoke("conformance", "--backend", "torch")
    assert result.exit_code == 2
    assert "pip install 'sa-softmax[torch]'" in result.stderr
    listing = invoke("backends")
    assert listing.exit_code == 0
    assert "sa-softmax[mlx]" in listing.output


def test_module_entry_points() -> None:
    for module in ("sa_softmax", "sa_softmax.conformance"):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        assert "--backend" in done.stdout or "conformance" in done.stdout


def test_pytest_entry_gives_one_test_a_case(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from sa_softmax.backends.numpy.adapter import Adapter\n"
        "from sa_softmax.conformance import parametrize\n\n"
        "class Mine(Adapter):\n"
        "    dtypes = ('float64',)\n"
        "    operations = ('sa_softmax',)\n\n"
        "@parametrize(Mine())\n"
        "def test_conformance(check):\n"
        "    check()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True
    )
    ran = sum(case.operation == "sa_softmax" and case.dtype == "float64" for case in cases())
    assert f"{ran} passed, {len(cases()) - ran} skipped" in done.stdout
