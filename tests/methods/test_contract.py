"""Every method keeps the contract, in the configurations that its own test names as `CONTRACT`."""

from __future__ import annotations

from importlib import import_module

import pytest

from holdfast.engine.method import GROUPS, Method
from holdfast.methods import METHODS
from holdfast.testing import MethodContract

TESTS = {name: import_module(f"test_{name}") for name in METHODS}
LIMITS: dict[Method, float] = {m: most for test in TESTS.values() for m, most in test.CONTRACT}
ONCE = {name for name, test in TESTS.items() if not getattr(test, "ACCUMULATES", True)}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_and_is_tested_as_itself(name: str) -> None:
    kind = METHODS[name]
    assert kind.group in GROUPS[:-1] and len(kind.cost) > 1 and len(kind.use) > 1
    assert TESTS[name].CONTRACT and all(type(m) is kind for m, _ in TESTS[name].CONTRACT)


class Every(MethodContract):
    def limit(self, method: Method) -> float:
        return LIMITS[method]


class TestMethods(Every):
    @pytest.fixture(params=[m for m in LIMITS if m.name not in ONCE], ids=repr)
    def method(self, request: pytest.FixtureRequest) -> Method:
        method: Method = request.param
        return method


class TestDrawing(Every):
    """Methods that draw anew for each micro-batch."""

    accumulates = False

    @pytest.fixture(params=[m for m in LIMITS if m.name in ONCE], ids=repr)
    def method(self, request: pytest.FixtureRequest) -> Method:
        method: Method = request.param
        return method
