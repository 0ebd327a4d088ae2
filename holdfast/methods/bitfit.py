"""BitFit: train biases only (Ben Zaken et al., ACL 2022, arXiv 2106.10199).

Every bias of the network trains, those of norms included, and the task's own head. Everything else
gets no gradient, no update and no decay. The paper takes rates from 1e-4 to 1e-3 (‡ from memory),
larger than for full fine-tuning. A network without biases (most recent decoders) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.engine.forwarding import adapters
from holdfast.engine.method import View
from holdfast.errors import Refused
from holdfast.methods.common.subnetwork import LeavesOut


@dataclass(frozen=True, kw_only=True)
class BitFit(LeavesOut):
    """Train biases and the task's own head."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "trains biases and the task's own head"
    paper: ClassVar[str] = "Ben Zaken et al., ACL 2022, arXiv 2106.10199"
    group: ClassVar[str] = "subnetwork"
    cost: ClassVar[str] = "less than plain training: gradients of matrices are not computed"
    use: ClassVar[str] = "few rows, or many tasks on one encoder, each saved as its biases"
    bytes_per_weight: ClassVar[str] = "0"

    def begin_task(self, view: View) -> None:
        biases = [n for n in view.shared if "bias" in n.rpartition(".")[2]]
        if not biases:
            adapted = adapters(view.bound.models[view.task])
            raise Refused("no bias of the shared network trains", where="bitfit",
                          remedy="leave out peft" if adapted else "take sift or lisa")  # fmt: skip
        self.leave_out(view, [n for n in view.shared if n not in biases])
