"""Every method in METHODS, in several configurations, keeps the contract."""

from __future__ import annotations

import pytest

from holdfast.engine.method import Method
from holdfast.methods import (
    DPS,
    EWC,
    GPM,
    L2SP,
    METHODS,
    KfacEWC,
    KLAnchor,
    LwF,
    Merge,
    Replay,
    WiSE,
)
from holdfast.testing import MethodContract

# name -> [(configuration, bytes a weight it may remember)]
CONFIGURATIONS: dict[str, list[tuple[Method, float]]] = {
    "dps": [
        (DPS(stage=2), 4),
        (DPS(stage=3, modules="all", select="global", drop=0.5), 4),
        (DPS(stage=2, freeze="gradient"), 4),
        (DPS(stage=2, mix=True), 8.3),
        (DPS(stage=2, mix=True, freeze="gradient"), 8.3),
        (DPS(stage=2, mix=True, noise="weight", modules=("*.up.weight", "*.down.*")), 9.3),
        (DPS(stage=2, score="retention", drop=0.6, fisher_rows=5), 12),
    ],
    "ewc": [
        (EWC(rows=5), 8),
        (EWC(online=True, decay=0.5, labels="expected", rows=3), 8),
        (EWC(strength=0.0, labels="true", rows=3), 8),
    ],
    "gpm": [
        (GPM(rows=20), 0),
        (GPM(rows=5, threshold=0.9, project="gradient", others="train"), 0),
        (GPM(rows=20, threshold=0.8, width=4), 0),
        (GPM(rows=24, threshold=0.8, structure="low_rank", width=1, rank=3, others="train"), 0),
    ],
    "kfac_ewc": [
        (KfacEWC(rows=20), 8),
        (KfacEWC(strength=0.1, every=1, rows=5, width=4), 8),
        (KfacEWC(every=3, rows=24, structure="low_rank", width=1, rank=3), 8),
    ],
    "kl_anchor": [
        (KLAnchor(), 0),
        (KLAnchor(keep="weights", direction="reverse", strength=1.0), 4),
        (KLAnchor(anchor="base", keep="logits", token_weight="detached_probability"), 4),
        (KLAnchor(anchor="base", keep="weights"), 4),
    ],
    "lwf": [(LwF(), 0), (LwF(strength=0.3, temperature=1.0), 0), (LwF(rows="near"), 0)],
    "merge": [
        (Merge(rows=20), 4),
        (Merge(strength=3.0, rows=5, again=True, structure="block", width=4), 4),
        (Merge(rows=24, structure="low_rank", width=1, rank=3), 4),
    ],
    "l2sp": [(L2SP(), 4), (L2SP(strength=1.0, head_strength=0.0), 4)],
    "wise": [(WiSE(), 4), (WiSE(alpha=0.2, first=True, head=True), 4)],
    "replay": [
        (Replay(memory=4), 0),
        (Replay(memory=0.3, share=1.0, every=2, weight=2.0), 0),
        (Replay(memory=4, every=3, feedback=0.48), 0),
    ],
}
CASES = [m for cases in CONFIGURATIONS.values() for m, _ in cases]
LIMITS = {m: limit for cases in CONFIGURATIONS.values() for m, limit in cases}


def test_no_method_escapes() -> None:
    assert CONFIGURATIONS.keys() == METHODS.keys()
    for name, cases in CONFIGURATIONS.items():
        assert all(type(m) is METHODS[name] for m, _ in cases)


class Every(MethodContract):
    def limit(self, method: Method) -> float:
        return LIMITS[method]


class TestMethods(Every):
    @pytest.fixture(params=[m for m in CASES if not isinstance(m, Replay)], ids=repr)
    def method(self, request: pytest.FixtureRequest) -> Method:
        method: Method = request.param
        return method


class TestReplay(Every):
    accumulates = False  # it draws other rows for each micro-batch

    @pytest.fixture(params=[m for m in CASES if isinstance(m, Replay)], ids=repr)
    def method(self, request: pytest.FixtureRequest) -> Method:
        method: Method = request.param
        return method
