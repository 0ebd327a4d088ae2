"""Dynamic scale training (Chen et al. 2020, arXiv 2004.12432) in a plain loop: small objects in
pictures are learned from pictures that are made smaller, as often as the losses ask for it.

    r_t = Σ over small objects of ℓ / Σ ℓ;  if r_t < .1 the next batch is stitched:
    each of its pictures is four at half size, 2 × 2

The paper's rule is for detection, where every object has a label and a place. Here a picture has
one object and one class, so that a stitched picture has four labels: its loss is the mean of the
four cross-entropies (a quarter of the target each), and each counts as small or not by the size
that its object has in the stitched picture. Written from the published formula: its code is not
free.

Which rows come next is the loop's affair, so that any recipe goes along. Beside the rule: plain
batches, and as many stitched ones spread evenly, which is what the feedback must beat. One seed of
generated pictures tells how it is done, not whether it helps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import holdfast

SIDE, SMALL, THRESHOLD, STEPS = 16, 5.0, 0.1, 100
Batch = tuple[Tensor, Tensor, Tensor]  # pictures (rows, 1, side, side), classes and sizes (rows,)


def pictures(rows: int, draw: torch.Generator, small: float = 0.05) -> Batch:
    """Bars that lie, stand or cross, 8 pixels long, or 4 with probability `small`."""
    made = 0.4 * torch.randn(rows, 1, SIDE, SIDE, generator=draw)
    kind = torch.randint(3, (rows,), generator=draw)
    size = torch.where(torch.rand(rows, generator=draw) < small, 4, 8)
    for i, (k, s) in enumerate(zip(kind.tolist(), size.tolist(), strict=True)):
        y, x = torch.randint(SIDE - s + 1, (2,), generator=draw).tolist()
        if k != 1:
            made[i, 0, y + s // 2, x : x + s] += 1
        if k != 0:
            made[i, 0, y : y + s, x + s // 2] += 1
    return made, kind, size.float()


def stitched(x: Tensor) -> Tensor:
    """(4 n, 1, side, side) -> (n, 1, side, side): rows 4i to 4i + 3 at half size, left to right."""
    half = functional.avg_pool2d(x, 2).unflatten(0, (-1, 2, 2))  # (n, down, right, 1, side/2, …)
    return half.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def losses(net: nn.Module, batch: Batch, *, stitch: bool) -> tuple[Tensor, Tensor]:
    """The loss of each object, and whether it is small where it stands: (rows,) each."""
    x, kind, size = batch
    logits = net(stitched(x)).repeat_interleave(4, 0) if stitch else net(x)
    return functional.cross_entropy(logits, kind, reduction="none"), size / (1 + stitch) < SMALL


def share(each: Tensor, small: Tensor) -> float:
    """r_t: the part of the loss that small objects have."""
    return float(each[small].sum() / each.sum())


def trained(stitch: Callable[[int, float], bool], rows: int = 32) -> tuple[nn.Module, int]:
    """A network after `STEPS` steps, and how many were stitched. stitch: of step t and r_{t−1}."""
    torch.manual_seed(0)
    draw, r, count = torch.Generator().manual_seed(1), 1.0, 0
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    recipe = holdfast.Recipe(methods=[holdfast.L2SP(strength=1e-4)], max_grad_norm=1.0)
    optimizer = torch.optim.AdamW(recipe.param_groups(net, lr=5e-3))
    bound = recipe.bind(net, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        now = stitch(step, r)
        each, small = losses(net, pictures(4 * rows if now else rows, draw), stitch=now)
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        r, count = share(each.detach(), small), count + now
    bound.end_task()
    return net, count


def main() -> None:
    _, many = trained(by_rule := lambda _, r: r < THRESHOLD)
    evenly = lambda t, _: (t + 1) * many // STEPS > t * many // STEPS  # noqa: E731
    for name, stitch in (("plain", lambda *_: False), ("by r_t", by_rule), ("evenly", evenly)):
        net, count = trained(stitch)
        shown = []
        for small in (1.0, 0.0):
            x, kind, _ = pictures(1000, torch.Generator().manual_seed(2), small)
            with torch.no_grad():
                shown.append(float((net(x).argmax(1) == kind).float().mean()))
        print(f"{name:7} {count:3d} of {STEPS} steps stitched;"
              f" accuracy on small {shown[0]:.3f}, on large {shown[1]:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
