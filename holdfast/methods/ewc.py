"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796, eq. 3).

After each task t its weights θ_t and the diagonal F_t of its Fisher information are remembered;
later tasks are penalised for moving weights that mattered:

    P(θ) = λ/2 · Σ_t Σ_i F_{t,i} (θ_i − θ_{t,i})²        ∂P/∂θ_i = λ Σ_t F_{t,i} (θ_i − θ_{t,i})

**Separate** anchors (`online=False`) need no tensors per task: up to a constant the sum over t is
one quadratic with F = Σ F_t around the weighted mean θ̄ = Σ F_t θ_t / Σ F_t. **Online** EWC
(Schwarz et al., ICML 2018, arXiv 1805.06370) decays the past and anchors at the latest weights:
F ← decay · F + F_t, θ̄ ← θ_t.

λ has the unit of old rows per new row: with losses averaged over rows, λ = N_old / N_new is the
Laplace approximation of training on both; larger values are needed in practice, because the
diagonal understates the curvature. Implementations that drop the ½ or square batch-mean gradients
need another λ.
The task's own head is never anchored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from holdfast.engine.method import Method, Range, View
from holdfast.methods.common.anchor import important_rows, pull_, remember
from holdfast.methods.common.importance import Labels, diagonal_fisher


@dataclass(frozen=True, kw_only=True)
class EWC(Method):
    """Elastic weight consolidation, separate or online.

    strength: λ ≥ 0, in old rows per new row (see the module).
    online: one running Fisher, anchored at the latest weights.
    decay: of the past Fisher when online, 0 ≤ decay ≤ 1.
    labels, rows: how the Fisher is estimated; see `holdfast.methods.common.importance`.
    """

    name: ClassVar[str] = "ewc"
    summary: ClassVar[str] = (
        "pulls weights back to where old tasks need them, by Fisher information"
    )
    paper: ClassVar[str] = (
        "Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; online: arXiv 1805.06370"
    )
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "one pass over weights, anchor and Fisher information"
    use: ClassVar[str] = "the next task, without old rows"
    bytes_per_weight: ClassVar[str] = "8 (Fisher information and anchor), for any number of tasks"
    needs_old_task: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("strength",)
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(1e1, 1e5, log=True),
        "decay": Range(0.5, 1.0),
    }

    strength: Annotated[float, Field(ge=0)] = 1e3
    online: bool = False
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    labels: Labels = "auto"
    rows: Annotated[int, Field(gt=0)] = 512

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def reads_whole(self) -> Literal["gradients", "inputs"] | None:
        return "gradients" if self.labels in ("auto", "true") else None

    def penalty_grad_(self, view: View) -> None:
        slots = view.state.weights
        if "fisher" in slots:
            rows = view.state.tensors.get("rows", {})
            pull_(view.grads, view.weights, slots["anchor"], self.strength, slots["fisher"], rows)

    def end_task(self, view: View) -> None:
        if not view.shared:
            return  # nothing that tasks share trains, so there is nothing to hold
        fisher = diagonal_fisher(
            view.forward,
            view.data(),
            view.shared,
            modules=view.modules,
            model=view.bound.models[view.task],
            labels=self.labels,
            rows=self.rows,
            generator=view.generator,
        )
        now = remember(view.shared)
        old, anchor = view.state.slot("fisher"), view.state.slot("anchor")
        for name, f in fisher.items():
            if name not in old:
                old[name], anchor[name] = f, now[name]
            elif self.online:
                old[name] = old[name] * self.decay + f
                anchor[name] = now[name]
            else:
                old[name] = old[name] + f
                # θ̄ + F_t / ΣF (θ_t − θ̄); where ΣF = 0 the newest weight is the anchor.
                share = torch.where(old[name] > 0, f / old[name], torch.ones_like(f))
                anchor[name] = torch.lerp(anchor[name].to(f.dtype), now[name].to(f.dtype), share)
        view.state.tensors["rows"] = important_rows(old)
