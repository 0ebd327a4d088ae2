"""Several ranks and machines: not tried here, but by tests that start processes of their own."""

from __future__ import annotations

from holdfast.testing.faults.suite import untried

RANKS = "needs two processes: tests/distributed/test_ranks.py"
for _fault in ("R1", "R2", "R7", "R11"):
    untried(_fault, "Trainer", RANKS)
    untried(_fault, "plain loop", RANKS)
untried("R3", "plain loop", "needs shards: tests/distributed/shards.py")
untried("R4", "Trainer", "needs DeepSpeed: tests/distributed/test_refusals.py has a stand-in")
for _fault in ("R5", "R6"):
    untried(_fault, "Trainer", "needs torchrun and a kill: tests/distributed/test_killed.py")
untried("R8", "plain loop", RANKS)
untried("R9", "command line", "needs PostgreSQL: tests/search/test_postgres.py")
untried("R10", "command line", "needs a Ray cluster: tests/experiments/test_engines.py")
