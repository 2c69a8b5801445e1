"""docs/spec.md and the cases hold each other: every clause is exercised, every case has its clauses."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from sa_softmax.conformance import cases
from sa_softmax.conformance.golden import SAFETY
from sa_softmax.conformance.runner import SPEC_VERSION

ROOT = Path(__file__).parent.parent
SPEC = (ROOT / "docs" / "spec.md").read_text()
CLAUSES = dict(re.findall(r"^\*\*([A-Z]\d+)\. (.*?)(?=^\*\*[A-Z]\d+\. |^## |\Z)", SPEC, re.MULTILINE | re.DOTALL))


def names_of(case_id: str) -> str:
    return "/".join(case_id.split("/")[:2])


def listed(clause: str) -> set[str]:
    """The group/name pairs that the clause's "Cases:" line selects."""
    line = re.search(r"^Cases: (.*?)\.$", CLAUSES[clause], re.MULTILINE | re.DOTALL)
    if line is None:
        return set()
    chosen, _, dropped = line[1].partition(" without ")
    names = {names_of(case.id) for case in cases()}

    def select(text: str) -> set[str]:
        patterns = re.findall(r"`([^`]+)`", text)
        for pattern in patterns:
            assert any(fnmatchcase(name, pattern) for name in names), f"{clause}: {pattern} matches no case"
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}

    return select(chosen) - select(dropped)


@pytest.mark.parametrize("clause", CLAUSES)
def test_clause_lists_exactly_the_cases_that_carry_it(clause: str) -> None:
    assert listed(clause) == {names_of(case.id) for case in cases() if clause in case.clauses}


@pytest.mark.parametrize("clause", CLAUSES)
def test_clause_is_exercised(clause: str) -> None:
    checked_by = re.findall(r"^Checked by: `([^`]+)`\.$", CLAUSES[clause], re.MULTILINE)
    assert listed(clause) or checked_by
    for path in checked_by:
        assert re.search(rf"\b{clause}\b", (ROOT / path).read_text()), f"{path} does not name {clause}"


def test_clauses_are_numbered_without_gaps() -> None:
    for letter in {clause[0] for clause in CLAUSES}:
        numbers = [int(clause[1:]) for clause in CLAUSES if clause[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1))


def test_every_case_carries_clauses_of_the_spec() -> None:
    for case in cases():
        assert case.clauses, case.id
        assert set(case.clauses) <= set(CLAUSES), case.id


def test_version_and_tolerance_are_those_of_the_suite() -> None:
    assert f"Version {SPEC_VERSION}." in SPEC
    assert f"u\\,|y| + {SAFETY}\\,u_c\\,scale + floor" in SPEC
    assert f"The factor {SAFETY} is" in SPEC
