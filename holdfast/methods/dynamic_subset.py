"""Dynamic subset tuning (Stahlberg et al., 2024, arXiv 2411.08610).

After every step at most ⌈ε n⌉ of the n entries of each covered tensor differ from the start of the
task, Θ0. Which ones is chosen anew each time, from where the optimizer went:

    Θ' = the optimizer's step from Θ_t          M = the ⌈ε n⌉ largest entries of |Θ' − Θ0|
    Θ_{t+1} = M ⊙ Θ' + (1 − M) ⊙ Θ0

All other entries equal Θ0 bit for bit, so that what a task changed is a sparse difference. An entry
enters the subset when one step takes it further from Θ0 than another has come in many. Of ties the
first entries count. The optimizer's moments go on for all entries. (‡ The distance by which the
paper chooses could not be verified.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from holdfast.engine.method import Range, View
from holdfast.errors import Refused
from holdfast.methods.common.anchor import remember
from holdfast.methods.common.importance import wide
from holdfast.methods.common.order import later
from holdfast.methods.common.subnetwork import Modules, Subnetwork, restore_
from holdfast.ops.distributed import like, local
from holdfast.ops.selection import top


@dataclass(frozen=True, kw_only=True)
class DynamicSubset(Subnetwork):
    """Let few entries differ from the start of the task, chosen anew in each step.

    share: ε, of the entries of each covered tensor, that may differ, 0 < share < 1.
    modules: what is covered: weights of "linear" layers (HF Conv1D included), all "matrices", the
        network's "layers" whole, "all", or globs of parameter names, each of which must match.
        The rest trains.
    head: whether the task's own head trains whole; if not, it is covered as other weights are.
    """

    name: ClassVar[str] = "dynamic_subset"
    summary: ClassVar[str] = "lets few entries differ from the start, chosen anew in each step"
    paper: ClassVar[str] = "Stahlberg et al., 2024, arXiv 2411.08610"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "a selection and two passes over the covered weights"
    use: ClassVar[str] = "many tasks from one start, each saved as a sparse difference"
    bytes_per_weight: ClassVar[str] = "4 (the start, in the weight's own type)"
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {"share": Range(0.001, 0.2, log=True)}

    share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    modules: Modules = "all"

    def begin_task(self, view: View) -> None:
        super().begin_task(view)
        if holding := [m.name for m in later(view, self) if m.holds]:
            raise Refused(f"{', '.join(holding)} would hold entries that have to go back",
                          where="dynamic_subset", remedy="list it after them")  # fmt: skip
        names = view.state.numbers["covered"]
        view.state.weights["start"] = remember({n: view.weights[n] for n in names})

    def after_step(self, view: View) -> None:
        for name, start in view.state.weights["start"].items():
            if view.grads[name] is not None:
                w = view.weights[name].detach()
                moved = torch.sub(local(w).to(wide(w.dtype)), local(start)).abs_()
                restore_(view, name, start, top({name: like(moved, w)}, self.share)[name])
