"""Every `check_*` of this folder, on two ranks of one group (see `ranks.py`)."""

from __future__ import annotations

import re

import pytest
from launch import HERE, MODULES

CHECKS = [
    f"{module}.{name}"
    for module in MODULES
    for name in re.findall(r"^def (check_\w+)", (HERE / f"{module}.py").read_text(), re.M)
]


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, verdicts: dict[str, list[str | None]]) -> None:
    said = verdicts.get(name, [None, None])
    assert said == ["", ""], "\n".join(t or "" for t in said) or "not run: an earlier check failed"


def test_the_page_names_tests_that_exist() -> None:
    page = (HERE.parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    files = {*HERE.glob("*.py"), *HERE.parent.rglob("test_*.py")}
    known = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"`((?:check|test)_\w+)`", page))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in known]
