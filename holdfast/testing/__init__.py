"""Tools to test your own methods with: the contract suite, replay of trajectories."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["MethodContract"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'holdfast.testing' has no attribute {name!r}")
    import pytest

    if "holdfast.testing.contract" not in sys.modules:
        pytest.register_assert_rewrite("holdfast.testing.contract")
    from holdfast.testing.contract import MethodContract

    return MethodContract


if TYPE_CHECKING:
    from holdfast.testing.contract import MethodContract as MethodContract
