"""A folder with a tiny model and tiny tasks, and the three ways into holdfast from there."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast.cli import main
from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.recipe import Recipe
from holdfast.testing.faults.suite import Wrong

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the film book was is and good bad red blue fine dull"
VOCABULARY = WORDS.split()
LABELS = ("good", "bad")


class Place:
    """folder: this try's own; home: where the model lies that all tries share."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def bert(self) -> Path:
        """A model as `--model` takes it: two layers of sixteen, random weights."""
        folder = self.home / "bert"
        if not folder.exists():
            save_bert(folder)
        return folder

    def copied_bert(self) -> Path:
        """A copy that may be changed."""
        return Path(shutil.copytree(self.bert, self / "bert"))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, name: str = "task.jsonl", *, count: int = 24, more: str = "") -> Path:
        """A task of two classes, as a file."""
        lines = [json.dumps({"text": f"the {LABELS[i % 2]} film {i}{more}", "label": LABELS[i % 2]})
                 for i in range(count)]  # fmt: skip
        return self.write(name, "\n".join(lines) + "\n")

    # --- the command line -----------------------------------------------------------------------

    def command(self, *words: object) -> tuple[int, str]:
        """The exit code of a command, and all that it said."""
        said, log = io.StringIO(), logging.getLogger("holdfast")
        handler = logging.StreamHandler(said)
        log.addHandler(handler)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            log.removeHandler(handler)
        return code, said.getvalue()

    def train(self, *tasks: object, verb: str = "train", out: str = "run",
              model: Path | None = None, **options: object) -> tuple[int, str]:  # fmt: skip
        """`holdfast train` or `sequence` for two epochs of two steps, on this place's model."""
        given = {"model": model or self.bert, "out": self / out, "epochs": 1, "batch_size": 8,
                 "max_length": 16} | options  # fmt: skip
        words = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
        return self.command(verb, "--task" if verb == "train" else "--tasks", *tasks, *words)

    def refused(self, *tasks: object, says: str | Sequence[str] = (), begun: bool = False,
                **how: Any) -> str:  # fmt: skip
        """Such a training is refused in one line that says so much, before anything is made.

        begun: what only the model can tell is refused after the run's folder was made.
        """
        out = self / str(how.get("out", "run"))
        code, said = self.train(*tasks, **how)
        check_refusal(code, said, says)
        if begun and (out / "record.json").exists():
            equal(self.record(out.name)["status"] != "done", True, "the run's status")
        elif not begun:
            assert not (out / "record.json").exists(), "refused, but a run was begun"
        return said

    def record(self, out: str = "run") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self / out / "record.json").read_text())
        return found

    # --- holdfast.Trainer -------------------------------------------------------------------------

    def trainer(self, data: Any = None, *, recipe: Recipe | None = None, model: Any = None,
                **more: Any) -> Any:  # fmt: skip
        """A `holdfast.Trainer` of eight steps in two epochs."""
        import transformers

        from holdfast.training.trainer import Trainer

        plain = {"output_dir": str(self / "trainer"), "per_device_train_batch_size": 4,
                 "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no",
                 "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 100,
                 "dataloader_pin_memory": False, "seed": 0}  # fmt: skip
        made = Trainer(model=model or classifier(), recipe=recipe or Recipe(),
                       args=transformers.TrainingArguments(**plain | more), data_collator=collate,
                       train_dataset=encoded() if data is None else data)  # fmt: skip
        made.remove_callback(transformers.PrinterCallback)
        return made


def check_refusal(code: int, said: str, says: str | Sequence[str] = ()) -> None:
    """Exit code 2, the last line ours, with what it has to name."""
    if code == 0:
        raise Wrong(f"accepted without a refusal: {said.strip()[-200:]!r}")
    assert code == 2, f"exit code {code}, not 2: {said.strip()[-200:]}"
    assert "Traceback" not in said, "a traceback"
    lines = [line for line in said.replace("\r", "\n").splitlines() if "holdfast: " in line]
    assert lines, f"no line of ours: {said.strip()[-200:]}"
    line = lines[-1]  # it may stand behind a bar
    for word in (says,) if isinstance(says, str) else says:
        assert word in line, f"does not say {word!r}: {line}"


def refuses(call: Callable[[], Any], *says: str) -> str:
    """The line of the `Refused` that a call raises."""
    try:
        call()
    except Refused as refusal:
        for word in says:
            assert word in str(refusal), f"does not say {word!r}: {refusal}"
        return str(refusal)
    raise Wrong("went on without a word")


def equal(one: object, two: object, what: str) -> None:
    """Raise `Wrong` where a result is another."""
    if one != two:
        raise Wrong(f"{what}: {str(one)[:80]} where {str(two)[:80]} was wanted")


# --- tiny models and their rows -------------------------------------------------------------------


def bert_config(**more: Any) -> Any:
    import transformers

    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
             "hidden_dropout_prob": 0.1, "initializer_range": 0.2}  # fmt: skip
    return transformers.BertConfig(**sizes | more)


def save_bert(folder: Path, *, seed: int = 0) -> None:
    """An encoder without a head, and its tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    torch.manual_seed(seed)
    transformers.BertModel(bert_config()).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def classifier(*, seed: int = 0, **more: Any) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    model: nn.Module = transformers.BertForSequenceClassification(bert_config(**more))
    return model


def encoded(count: int = 16, *, labels: Callable[[int], Any] = lambda i: i % 2) -> list[Any]:
    """Rows of a Trainer, all of one length."""
    return [{"input_ids": [2, 5 + i % 7, 12 + i % 2, 3], "labels": labels(i)} for i in range(count)]


def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {k: torch.tensor([row[k] for row in batch]) for k in batch[0]}


class Loop:
    """A loop of one's own: a network of two layers, AdamW, and a recipe at work."""

    def __init__(self, *methods: Method, lr: float = 0.05, dtype: torch.dtype = torch.float32,
                 clip: float | None = None, frozen: str = "", backwards: bool = False,
                 seed: int = 0) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        for name, p in self.model.named_parameters():
            p.requires_grad_(not (frozen and name.startswith(frozen)))
        given = [*self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            given[::-1] if backwards else given, lr=lr, weight_decay=0.1
        )
        recipe = Recipe(methods=methods, max_grad_norm=clip)
        self.bound: Bound = recipe.bind(self.model, self.optimizer, total_steps=20)

    def backward(self, at: int, *, bad: float | None = None, scale: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(at)
        dtype = next(self.model.parameters()).dtype
        x = torch.randn(4, 3, generator=draw).to(dtype)
        loss = self.model(x).square().sum()
        if self.bound.has_penalty:
            loss = loss + self.bound.penalty({"x": x}, None)
        (loss * scale).backward()
        if bad is not None:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = bad  # type: ignore[union-attr]

    def step(self, at: int, *, bad: float | None = None) -> None:
        """A step on rows that are a function of `at`; `bad` is put into a gradient."""
        self.backward(at, bad=bad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, start: int, stop: int) -> Loop:
        for at in range(start, stop):
            self.step(at)
        return self

    def everything(self) -> dict[str, Any]:
        """A copy of all that a step may change."""
        found: dict[str, Any] = {k: v.clone() for k, v in self.model.state_dict().items()}
        state = self.bound.state_dict()
        found |= {f"state {k}": v.clone() for k, v in state["tensors"].items()}
        for name, w in self.bound.weights.items():
            for key, value in self.optimizer.state.get(w, {}).items():
                found[f"optimizer {name} {key}"] = copy.deepcopy(value)
        return found


def same(one: Mapping[str, Any], two: Mapping[str, Any], what: str = "results") -> None:
    """Raise `Wrong` unless all tensors are equal bit for bit, and of one type."""
    if one.keys() != two.keys():
        raise Wrong(f"{what}: {sorted(one.keys() ^ two.keys())[:3]} on one side alone")
    for name, value in one.items():
        other = two[name]
        if isinstance(value, Tensor):
            fits = value.dtype == other.dtype and torch.equal(
                value.contiguous().reshape(-1).view(torch.uint8),
                other.contiguous().reshape(-1).view(torch.uint8),
            )
        else:
            fits = value == other
        if not fits:
            raise Wrong(f"{what}: {name} differs")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """What holdfast logs as a warning."""
    told: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log, handler = logging.getLogger("holdfast"), Kept(logging.WARNING)
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)


class StopAt(TrainerCallback):
    """Saves at a step and stops there, as a kill right after a checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
