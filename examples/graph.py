"""A graph network of your own: has a graph a triangle, then is it in one piece?

    holdfast sequence --model examples/graph.py --tasks examples/graph.py:triangle \
        examples/graph.py:connected --recipe dps --epochs 10 --lr 3e-3 --out runs/graph

Graphs differ in size, so rows differ in shape: `collate` pads them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class GraphNet(nn.Module):
    """Two rounds of messages between neighbours, then a mean over nodes (Kipf & Welling 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 32), nn.Linear(64, 32)
        self.heads = nn.ModuleDict({name: nn.Linear(32, 2) for name in ("triangle", "connected")})

    def forward(self, links: Tensor, nodes: Tensor, task: str) -> Tensor:
        """links: (rows, nodes, nodes); nodes: (rows, nodes), 1 for each that there is."""
        degree = links.sum(-1, keepdim=True)
        two = links @ links  # walks of two steps
        x = torch.cat(
            [degree, (two @ links).diagonal(dim1=1, dim2=2)[..., None], links @ degree], -1
        )
        x = self.first(x / 4).relu()
        x = self.second(torch.cat([x, links @ x / degree.clamp(min=1)], -1)).relu()
        mean = (x * nodes[..., None]).sum(1) / nodes.sum(1, keepdim=True)
        answer: Tensor = self.heads[task](mean)
        return answer


def model() -> nn.Module:
    return GraphNet()


def tasks() -> dict[str, Any]:
    graphs = [nx.gnp_random_graph(5 + i % 6, 0.28, seed=i) for i in range(600)]
    links = [nx.to_numpy_array(graph) for graph in graphs]
    answers = {
        "triangle": [sum(nx.triangles(graph).values()) > 0 for graph in graphs],
        "connected": [nx.is_connected(graph) for graph in graphs],
    }
    return {
        name: {
            "train": [{"links": a, "labels": int(y)} for a, y in zip(links, said, strict=True)],
            "loss": partial(loss, task=name), "score": partial(score, task=name),
            "metric": "accuracy",
        }
        for name, said in answers.items()
    }  # fmt: skip


def collate(rows: list[Any]) -> dict[str, Tensor]:
    most = max(len(row["links"]) for row in rows)
    links, nodes = torch.zeros(len(rows), most, most), torch.zeros(len(rows), most)
    for i, row in enumerate(rows):
        size = len(row["links"])
        links[i, :size, :size], nodes[i, :size] = torch.from_numpy(np.array(row["links"])), 1.0
    labels = torch.tensor([int(row["labels"]) for row in rows])
    return {"links": links, "nodes": nodes, "labels": labels}


def loss(net: nn.Module, batch: Any, *, task: str) -> tuple[Tensor, Tensor]:
    logits = net(batch["links"], batch["nodes"], task)
    return functional.cross_entropy(logits, batch["labels"]), logits


def score(net: nn.Module, batch: Any, *, task: str) -> Tensor:
    said = net(batch["links"], batch["nodes"], task).argmax(-1)
    return torch.eq(said, batch["labels"]).float()
