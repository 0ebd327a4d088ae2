"""Remembered weights and the pull towards them."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.methods.common.anchor import important_rows, potential, pull_, remember


def test_remembered_weights_are_copies() -> None:
    w = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    kept = remember({"w": w})
    with torch.no_grad():
        w.zero_()
    assert kept["w"].tolist() == [[1, 1]] * 3
    assert kept["w"].dtype is torch.bfloat16 and not kept["w"].requires_grad


def test_pull_is_the_gradient_of_the_potential() -> None:
    torch.manual_seed(0)
    weights = {n: nn.Parameter(torch.randn(4, 3)) for n in "abc"}
    anchor = {n: torch.randn(4, 3) for n in "ab"}
    for importance in (None, {n: torch.rand(4, 3) for n in "ab"}):
        for p in weights.values():
            p.grad = torch.ones_like(p)
        slow = torch.autograd.grad(
            potential(weights, anchor, 3.0, importance), [weights["a"], weights["b"]]
        )
        grads = {n: p.grad for n, p in weights.items()}
        pull_(grads, weights, anchor, 3.0, importance)
        for n, expected in zip("ab", slow, strict=True):
            torch.testing.assert_close(weights[n].grad, 1 + expected)
        assert torch.equal(grads["c"], torch.ones(4, 3))


def test_rows_without_importance_are_passed_over() -> None:
    """Of the rows named, each is pulled as if all were; of ten words three mattered."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weights = {n: nn.Parameter(torch.randn(10, 3, dtype=dtype)) for n in ("words", "dense")}
        weights["bias"] = nn.Parameter(torch.randn(10, dtype=dtype))
        anchor = {n: torch.randn_like(w) for n, w in remember(weights).items()}
        importance = {n: torch.rand(w.shape) for n, w in weights.items()}
        importance["words"][[0, 2, 3, 4, 5, 6, 8]] = 0
        importance["dense"][[0, 2, 3, 4]] = 0  # more than half matter
        importance["bias"][1:] = 0  # a vector has no rows to spare
        rows = important_rows(importance)
        assert {n: r.tolist() for n, r in rows.items()} == {"words": [1, 7, 9]}
        slow, fast = ({n: torch.ones_like(w) for n, w in weights.items()} for _ in range(2))
        pull_(slow, weights, anchor, 300.0, importance)
        pull_(fast, weights, anchor, 300.0, importance, rows)
        torch.testing.assert_close(fast, slow)
        assert not torch.equal(fast["words"], torch.ones(10, 3, dtype=dtype))


def test_tensors_without_gradient_or_held_elsewhere_are_left_out() -> None:
    w = nn.Parameter(torch.ones(2))
    grads: dict[str, torch.Tensor | None] = {"w": None}
    pull_(grads, {"w": w}, {"w": torch.zeros(2), "elsewhere": torch.zeros(5)}, 1.0)
    assert grads == {"w": None}


def test_narrow_gradients_are_pulled_with_exact_importance() -> None:
    """1.0039 is no bfloat16; rounded to one before the product, 512·1.0039 would be 512."""
    w = nn.Parameter(torch.full((1,), 2.0, dtype=torch.bfloat16))
    grads: dict[str, torch.Tensor | None] = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    importance = {"w": torch.tensor([1.0039])}
    pull_(grads, {"w": w}, {"w": torch.zeros(1)}, 258.0, importance)
    assert grads["w"] is not None
    assert grads["w"].item() == torch.tensor(258.0 * 1.0039 * 2).bfloat16().item() != 516.0
