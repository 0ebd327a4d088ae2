"""`holdfast rates`: a learning rate for each part of the network, without a search."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli.options import (
    add_run,
    add_settings,
    add_tasks,
    add_trust,
    asked_tasks,
    given,
    group,
    number,
    show,
)

if TYPE_CHECKING:
    from rich.table import Table

    from holdfast.network.rates import Rates

ABOUT = "measure by one short probe how fast each part should learn the next task"
EXAMPLE = "holdfast rates --from-probe .1 --tasks data/trec6 data/sst2 --out runs/r"
RESUMES = True


def options(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, "the old ones and, last, the new one; with --from the new one alone. ")
    what = group(parser, "what")
    what.add_argument(
        "--from", dest="from_run", type=Path, metavar="RUN",
        help="a finished run that learned the old tasks, or a saved model, with --old-task",
    )  # fmt: skip
    what.add_argument("--old-task", metavar="TASK", help="what that model was trained on")
    how = group(parser, "how rates are found").add_argument
    how("--from-probe", type=number, nargs="?", const=0.1, default=0.1, metavar="STEPS",
        help="steps of the probe, or a share of the new task's: a tenth at most (.1)")  # fmt: skip
    how("--tolerance", type=float, default=0.05, metavar="NATS",
        help="the harm to an old row's answer that is aimed at, as KL (0.05)")  # fmt: skip
    how("--confirm", type=int, default=1, metavar="N",
        help="0 to 3 runs as short as the probe, which correct the base rate (1)")  # fmt: skip
    how("--parts", type=int, default=10,
        help="multipliers at most: embeddings, points over the layers, head (10)")  # fmt: skip
    how("--rows", type=int, default=512, help="of each task that are read to measure (512)")
    add_run(parser, recipe="plain")
    add_settings(parser, without=["alone", "head", "save_steps"])
    add_trust(parser)
    parser.set_defaults(model=None, recipe=None, seed=None)


def run(chosen: argparse.Namespace) -> None:
    tasks = asked_tasks(chosen.tasks, chosen)
    old = None if chosen.old_task is None else asked_tasks([chosen.old_task], chosen)[0]
    from holdfast.search.from_probe import rates_from_probe

    model = chosen.model or ("minilm" if chosen.from_run is None else None)
    rates = rates_from_probe(
        model, tasks, chosen.recipe, out=chosen.out, share=chosen.from_probe,
        tolerance=chosen.tolerance, confirm=chosen.confirm, rows=chosen.rows, most=chosen.parts,
        from_run=chosen.from_run, old_task=old, seed=chosen.seed, **given(chosen),
    )  # fmt: skip
    show(table(rates), *lines(rates), f"{chosen.out / 'rates.yaml'}  {chosen.out / 'recipe.yaml'}")


def table(rates: Rates) -> Table:
    """What the probe measured, and the multiplier of each part."""
    from rich.table import Table

    told, base = rates.provenance, rates.geometric_mean_rate or 0.0
    made = Table("part", title=f"{told['tasks'][-1]['name']}, probed", title_justify="left")
    for head in ("benefit b", "harm h", "b / h", "multiplier", "rate"):
        made.add_column(head, justify="right")
    for each, m in zip(told["parts"], rates.multipliers, strict=True):
        b, h = each["benefit"], each["harm"]
        cells = ["–" if v is None else f"{v:.2e}" for v in (b, h, b / h if b and h else None)]
        made.add_row(each["part"], *cells, f"{m:.3f}", f"{m * base:.2e}")
    made.caption = ("b: fall of the new loss, to first order; h: KL of an old row's answer, to "
                    "second; nats")  # fmt: skip
    made.caption_justify = "left"
    return made


def lines(rates: Rates) -> list[str]:
    """The base rate, what confirmed it, and what all of it cost."""
    told = rates.provenance
    said = [f"base rate {rates.geometric_mean_rate:.3g}, for --lr"]
    if told["bounded"]:
        said[0] += " (a bound: a tenth of the probe's, or 2.5 times it)"
    for run in told["confirmed"]:
        said.append(f"confirmed at {run['rate']:.3g}: harm {run['measured']:.2e}, predicted "
                    f"{run['predicted']:.2e}, aimed at {run['aimed']:.2e}; selection scores new "
                    f"{run['new']:.3f}, old {run['old']:.3f}")  # fmt: skip
    steps = told["steps"]
    runs = "".join(f" + {n}" for n in steps["confirm"])
    said.append(f"steps: {steps['probe']}{runs} of probe and confirming runs, the new task has "
                f"{steps['of']}; {steps['old']} for the old ones")  # fmt: skip
    return said
