"""A tiny model that learns a sequence of tasks, step by step, for the contract suite."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.recipe import Recipe

TASKS = ("one", "two")
Batch = dict[str, Tensor]


class Block(nn.Module):
    """A residual layer with a norm and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 2), nn.Linear(width + 2, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        # (rows, tokens, width) throughout
        y: Tensor = self.norm(x + self.dropout(self.down(torch.tanh(self.up(x)))))
        return y


class Encoder(nn.Module):
    """Embeddings and two blocks."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class Classifier(nn.Module):
    """An encoder, which tasks can share, and a head; has the interface of Hugging Face models."""

    def __init__(self, classes: int = 3, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder if encoder is not None else Encoder()
        self.classifier = nn.Linear(6, classes)

    @property
    def base_model(self) -> nn.Module:
        """What tasks share."""
        return self.encoder

    def get_output_embeddings(self) -> None:
        """None: the head is the task's own."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.classifier(self.encoder(tokens))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def make_batch(task: str, step: int, rows: int = 8) -> Batch:
    """The rows of one step, a function of (task, step) alone."""
    draw = torch.Generator().manual_seed(1000 * TASKS.index(task) + step)
    tokens = torch.randint(11, (rows, 5), generator=draw)
    return {"tokens": tokens, "labels": (tokens.sum(1) + TASKS.index(task)) % 3}


class ToyTraining:
    """Learns `TASKS` one after another with a method (None: plain); can be saved at any step."""

    def __init__(
        self,
        method: Method | None,
        *,
        steps: int = 9,
        dtype: torch.dtype = torch.float32,
        reverse: bool = False,
        frozen: Collection[str] = (),
        dropout: bool = True,
    ) -> None:
        self.method, self.steps, self.dtype = method, steps, dtype
        self.reverse, self.frozen, self.dropout = reverse, frozen, dropout
        self.recipe = Recipe(methods=[method] if method else [], max_grad_norm=1.0)
        self.bound = self.recipe.unbound(seed=7)
        self.models: dict[str, nn.Module] = {}

    # --- learning -----------------------------------------------------------------------------

    def add_model(self, task: str, *, seed: int = 0) -> nn.Module:
        """The task's model, on the encoder of the first."""
        torch.manual_seed(seed + TASKS.index(task))
        shared = next(iter(self.models.values())).base_model if self.models else None
        assert shared is None or isinstance(shared, nn.Module)
        model: nn.Module = Classifier(encoder=shared).to(self.dtype)
        if shared is None:
            model = self.recipe.prepare(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout) and not self.dropout:
                module.p = 0.0
        for name, p in model.named_parameters():
            p.requires_grad_(name not in self.frozen)
        self.models[task] = model
        return model

    def begin(self, task: str, *, seed: int = 0) -> None:
        """Make a model and an optimizer, and bind."""
        self.model = self.add_model(task, seed=seed)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            parameters[::-1] if self.reverse else parameters, lr=0.02, weight_decay=0.1
        )
        rows = [make_batch(task, step) for step in range(self.steps)]
        self.bound.begin_task(task, self.optimizer, self.steps, model=self.model, data=rows)

    def backward(self, step: int, *, pieces: int = 1) -> None:
        """The gradients of a step, its rows in one or several micro-batches."""
        self.optimizer.zero_grad()
        batch = make_batch(self.bound.task, step)
        for piece in zip(*(t.chunk(pieces) for t in batch.values()), strict=True):
            inputs = dict(zip(batch, piece, strict=True))
            outputs = self.model(**inputs)
            loss = outputs.loss
            if self.bound.has_penalty:
                loss = loss + self.bound.penalty(inputs, outputs)
            (loss / pieces).backward()

    def learn(self, start: int = 0, stop: int | None = None, *, pieces: int = 1) -> None:
        """Steps `start` to `stop` (default: the last) of the current task."""
        for step in range(start, self.steps if stop is None else stop):
            self.backward(step, pieces=pieces)
            self.optimizer.step()

    def end(self) -> None:
        """Close the task."""
        task = self.bound.task
        self.bound.end_task(lambda: self._rows(task))

    def _rows(self, task: str) -> Iterator[Mapping[str, Any]]:
        for step in range(3):
            yield make_batch(task, step)

    def learn_all(self, **how: Any) -> ToyTraining:
        """Both tasks, from beginning to end."""
        for task in TASKS:
            self.begin(task)
            self.learn(**how)
            self.end()
        return self

    # --- comparing and saving -------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """A copy of every parameter and buffer of every model."""
        return {
            f"{task}: {name}": t.detach().clone()
            for task, model in self.models.items()
            for name, t in model.state_dict().items()
        }

    def everything(self) -> dict[str, Any]:
        """A copy of all that a step may change, save `skipped`."""
        state = self.bound.state_dict()
        found: dict[str, Any] = {f"weight {k}": t for k, t in self.weights().items()}
        found |= {f"state {k}": t.clone() for k, t in state["tensors"].items()}
        found |= {f"meta {k}": v for k, v in copy.deepcopy(state["meta"]).items()}
        for name, p in self.bound.weights.items():
            moments = self.optimizer.state.get(p, {})
            found |= {f"optimizer {name} {k}": copy.deepcopy(v) for k, v in moments.items()}
        del found["meta skipped"]
        return found

    def save(self) -> dict[str, Any]:
        """What a checkpoint holds: models, optimizer, random state, and ours as bytes and JSON."""
        state = self.bound.state_dict()
        tensors = {k: t.clone().contiguous() for k, t in state["tensors"].items()}
        return {
            "models": {t: copy.deepcopy(m.state_dict()) for t, m in self.models.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "random": torch.get_rng_state(),
            "tensors": save(tensors),
            "meta": json.dumps(state["meta"], allow_nan=False),
        }

    @classmethod
    def load(cls, saved: Mapping[str, Any], method: Method, *, closed: bool) -> ToyTraining:
        """A new toy with other initial weights, resumed from where another was saved.

        closed: whether the task it was saved in had ended, so that the next one is to begin.
        """
        toy = cls(method)
        state = {"tensors": load(saved["tensors"]), "meta": json.loads(saved["meta"])}
        tasks = list(saved["models"])
        for task in tasks if closed else tasks[:-1]:
            toy.add_model(task, seed=50)
        if closed:
            toy.bound.load_state_dict(state)
        else:
            toy.begin(tasks[-1], seed=50)
            toy.optimizer.load_state_dict(saved["optimizer"])
            toy.bound.load_state_dict(state)
        for task, model in toy.models.items():
            model.load_state_dict(saved["models"][task])
        toy.bound.models |= toy.models
        torch.set_rng_state(saved["random"])
        return toy
