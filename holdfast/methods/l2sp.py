"""L2-SP: weight decay towards the starting point (Li et al., ICML 2018, arXiv 1802.01483).

    P(w) = α/2 · ‖w_S − w⁰_S‖² + β/2 · ‖w_head‖²        gradient α (w_S − w⁰_S), β w_head

w_S are the weights that were there before the task (all but its head), w⁰_S their values when the
task begins. α and β have the unit loss / weight². Unlike decoupled decay, the pull enters the
gradient and is scaled by Adam. Biases and norms are pulled too, as in the paper's equation, though
not in many implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from holdfast.engine.method import Method, Range, View
from holdfast.methods.common.anchor import pull_, remember


@dataclass(frozen=True, kw_only=True)
class L2SP(Method):
    """Decay towards the weights at the start of the task.

    strength: α ≥ 0, on shared weights.
    head_strength: β ≥ 0, on the task's own head, towards zero.
    """

    name: ClassVar[str] = "l2sp"
    summary: ClassVar[str] = "pulls weights back to where the task began"
    paper: ClassVar[str] = "Li et al., ICML 2018, arXiv 1802.01483"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "one pass over weights and anchor"
    use: ClassVar[str] = "few rows"
    bytes_per_weight: ClassVar[str] = "4 (the anchor, in the weight's own type)"
    per_task: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(1e-4, 1.0, log=True),
        "head_strength": Range(1e-4, 1.0, log=True),
    }

    strength: Annotated[float, Field(ge=0)] = 0.01
    head_strength: Annotated[float, Field(ge=0)] = 0.01

    def begin_task(self, view: View) -> None:
        view.state.weights["start"] = remember(view.shared)

    def penalty_grad_(self, view: View) -> None:
        pull_(view.grads, view.weights, view.state.weights["start"], self.strength)
        for name in view.weights.keys() - view.shared.keys():
            grad = view.grads[name]
            if grad is not None:
                grad.add_(view.weights[name].detach(), alpha=self.head_strength)
