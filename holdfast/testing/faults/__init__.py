"""The 82 faults that holdfast is to survive, tried from every way into it:

    python -m holdfast.testing.faults --group data

A group is a module, a try a function that is given a `Place` and returns if the fault was survived.
It raises `Wrong` where a result changed without a word, and anything else where it failed.
"""

from __future__ import annotations

from holdfast.testing.faults.suite import GROUPS, MEANINGS, Outcome, Wrong, run_all

__all__ = ["GROUPS", "MEANINGS", "Outcome", "Wrong", "run_all"]
