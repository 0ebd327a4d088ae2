"""What a resumed run has to share with the run it continues: settings and rows, by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import transformers
from models import arguments, bert, collate, rows, same, weights
from test_checkpoints import StopAt
from tiny import adamw, bind, net
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import holdfast
from holdfast import DPS, L2SP, LoRA, Recipe, RecipeCallback, Refused
from holdfast.engine.plan import STREAMED, UNREAD, rows_hash
from holdfast.tasks.kinds.packed import Packed
from holdfast.training.checkpoints import META
from holdfast.training.loop import load_checkpoint, save_checkpoint

ROWS = rows(16)
OTHER = [dict(row, labels=1 - row["labels"]) for row in ROWS]


def made(out: Path, *, data: Any = None, recipe: Any = None, stop: int | None = None,
         cls: Any = holdfast.Trainer, model: Any = None, own: Any = None,
         **more: Any) -> Any:  # fmt: skip
    """Eight steps, in two epochs."""
    args = arguments(out, **{"num_train_epochs": 2, **more})
    own = {"recipe": recipe or Recipe(methods=[DPS(stage=2)])} if own is None else own
    trainer = cls(model=model or bert(), args=args, train_dataset=ROWS if data is None else data,
                  data_collator=collate, **own)  # fmt: skip
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    made(out, stop=3).train()
    return out / "checkpoint-3"


# --- a Trainer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"seed": 7}, "seed: 0 → 7"),
        ({"lr_scheduler_type": "cosine"}, 'lr_scheduler_type: "linear" → "cosine"'),
        ({"warmup_steps": 5}, "warmup_steps: 0.* → 5"),
        ({"adam_beta1": 0.5}, "adam_beta1: 0.9 → 0.5"),
        ({"bf16": True}, "bf16: false → true"),
        ({"label_smoothing_factor": 0.3}, "label_smoothing_factor: 0.* → 0.3"),
        ({"learning_rate": 1e-3}, r"\blr: 0.01 → 0.001"),
        ({"data": OTHER}, 'rows: "'),
        ({"data": ROWS[::-1]}, 'rows: "'),
    ],
)
def test_a_trainer_names_what_differs(more: Any, named: str, saved: Path, tmp_path: Path) -> None:
    """Each went on without a word, and gave another result (faults C9, D13)."""
    with pytest.raises(Refused, match=named) as refusal:
        made(tmp_path, **more).train(resume_from_checkpoint=str(saved))
    assert "pass exact_resume=False" in str(refusal.value)


def test_a_precision_from_the_environment_is_compared(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(Refused, match="bf16: false → true"):
        made(tmp_path).train(resume_from_checkpoint=str(saved))


def test_what_changes_no_step_is_no_difference(saved: Path, tmp_path: Path) -> None:
    more = {"logging_steps": 3, "run_name": "b", "save_strategy": "epoch", "data": list(ROWS),
            "gradient_checkpointing": True, "dataloader_num_workers": 1}  # fmt: skip
    made(tmp_path, **more).train(resume_from_checkpoint=str(saved))


class Drawing(Dataset[Any]):
    """Rows from a generator of their own; reading one changes what is read next."""

    def __init__(self) -> None:
        self.draw = random.Random(0)

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, place: int) -> Any:
        return dict(ROWS[place], labels=self.draw.randrange(2))


def popping(batch: Any) -> Any:
    """A collator that changes its rows in place."""
    made = collate([{k: v for k, v in row.items() if k != "place"} for row in batch])
    for row in batch:
        row.pop("place", None)
    return made


@pytest.mark.parametrize("callback", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_rows_are_compared_as_they_are_before_training(
    drawn: bool, callback: bool, tmp_path: Path
) -> None:
    """At the first checkpoint they were others than at the beginning of a process."""

    def trainer() -> Any:
        own = {"callbacks": [RecipeCallback(Recipe(methods=[L2SP()]))]} if callback else None
        cls = transformers.Trainer if callback else holdfast.Trainer
        more = {"save_strategy": "steps", "save_steps": 3, "remove_unused_columns": False}
        data = Drawing() if drawn else [dict(row, place=i) for i, row in enumerate(ROWS)]
        again = made(tmp_path, cls=cls, own=own, data=data, max_grad_norm=0.0, **more)
        again.data_collator = popping
        return again

    trainer().train()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_new_rate_is_at_work_where_it_is_asked_for_and_noted(
    saved: Path, tmp_path: Path
) -> None:
    """Trainer itself goes on with the saved rate."""
    own = {"recipe": Recipe(methods=[DPS(stage=2)]), "exact_resume": False}
    more = {"save_strategy": "steps", "save_steps": 4}
    again = made(tmp_path, own=own, learning_rate=1e-3, **more)
    with pytest.warns(UserWarning, match="lr: 0.01 → 0.001"):
        again.train(resume_from_checkpoint=str(saved))
    logs = [log for log in again.state.log_history if "learning_rate" in log]
    rates = [log["learning_rate"] for log in logs if log["step"] > 3]
    assert rates == pytest.approx([1e-3 * (8 - step) / 8 for step in range(3, 8)])
    noted = json.loads((tmp_path / "checkpoint-8" / META).read_text())["changes"]
    assert "step 3: lr: 0.01 → 0.001" in noted and again.bound.changes == noted


def test_what_lies_below_adapters_is_compared(tmp_path: Path) -> None:
    """It is in no checkpoint of adapters, so that other weights there would be gone on with."""
    peft = pytest.importorskip("peft", reason="adapters of a user's own")
    setting = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    torch.manual_seed(0)
    made(tmp_path, model=peft.get_peft_model(bert(), setting), recipe=Recipe(), stop=3).train()
    for seed, fits in ((0, True), (5, False)):
        again = made(tmp_path / "b", model=peft.get_peft_model(bert(seed=seed), setting),
                     recipe=Recipe())  # fmt: skip
        if fits:
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
            continue
        with pytest.raises(Refused, match='frozen: "'):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_recipes_adapters_go_on_over_the_same_weights(tmp_path: Path) -> None:
    made(tmp_path, recipe=Recipe(peft=LoRA(rank=2)), stop=3).train()
    again = made(tmp_path / "b", recipe=Recipe(peft=LoRA(rank=2)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.bound.changes == []


def test_a_callback_compares_too(tmp_path: Path) -> None:
    def trainer(data: Any = None, exact: bool = True, **more: Any) -> Any:
        callback = RecipeCallback(Recipe(methods=[L2SP()]), exact_resume=exact)
        more |= {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.0}
        return made(tmp_path, cls=transformers.Trainer, data=data,
                    own={"callbacks": [callback]}, **more)  # fmt: skip

    trainer().train()
    at = str(tmp_path / "checkpoint-3")
    for more, named in (({"data": OTHER}, "rows: "), ({"seed": 4}, "seed: 0 → 4")):
        with pytest.raises(Refused, match=named):
            trainer(**more).train(resume_from_checkpoint=at)
    with pytest.warns(UserWarning, match="rows: "):
        trainer(OTHER, exact=False).train(resume_from_checkpoint=at)
    for more, named in (({"learning_rate": 1e-3}, "learning_rate: 0.01 → 0.001"),
                        ({"weight_decay": 0.5}, "weight_decay: 0.0 → 0.5")):  # fmt: skip
        with pytest.raises(Refused, match=f"Trainer has taken the old one: {named}"):
            trainer(exact=False, **more).train(resume_from_checkpoint=at)


def test_streamed_rows_are_said_not_to_be_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(copy.deepcopy(ROWS))

    made(tmp_path, data=Stream(), max_steps=4, stop=2).train()
    again = made(tmp_path / "b", data=Stream(), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "streamed: not compared" in caplog.text


# --- a loop of one's own --------------------------------------------------------------------------


def loop(lr: float = 0.05, steps: int = 8, **options: Any) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    bound = bind(model, optimizer, L2SP(), total_steps=steps)
    return bound, schedule


def step(bound: Any, schedule: Any) -> None:
    (bound.models["task"](torch.ones(4, 3)).square().sum() + bound.penalty()).backward()
    bound.optimizer.step()
    bound.optimizer.zero_grad()
    schedule.step()


@pytest.fixture
def looped(tmp_path: Path) -> Path:
    """After three steps: the schedule has changed the rate."""
    bound, schedule = loop()
    for _ in range(3):
        step(bound, schedule)
    save_checkpoint(tmp_path / "checkpoint-3", bound, position={}, plan={"seed": 1},
                    schedule=schedule)  # fmt: skip
    return tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    ("more", "plan", "named"),
    [
        ({"lr": 0.5}, {"seed": 1}, "lr: 0.05 → 0.5"),
        ({"betas": (0.5, 0.9)}, {"seed": 1}, r"betas: \[0.9, 0.999\] → \[0.5, 0.9\]"),
        ({"steps": 7}, {"seed": 1}, "steps: 8 → 7"),
        ({}, {"seed": 2}, "seed: 1 → 2"),
        ({}, None, "seed: 1 → null"),
    ],
)
def test_a_loop_names_what_differs(more: Any, plan: Any, named: str, looped: Path) -> None:
    bound, schedule = loop(**more)
    before = weights(bound.models["task"])
    with pytest.raises(Refused, match=named):
        load_checkpoint(looped, bound, plan=plan, schedule=schedule)
    assert same(before, weights(bound.models["task"])) and not bound.optimizer.state


def test_a_loop_goes_on_with_what_was_saved_and_tells(looped: Path) -> None:
    bound, schedule = loop(lr=0.5)
    with pytest.warns(UserWarning, match="lr: 0.05 → 0.5"):
        load_checkpoint(looped, bound, plan={"seed": 1}, exact_resume=False, schedule=schedule)
    assert bound.optimizer.param_groups[0]["initial_lr"] == 0.05
    assert bound.changes == ["step 3: lr: 0.05 → 0.5"]
    save_checkpoint(looped, bound, position={}, schedule=schedule)
    assert json.loads((looped / META).read_text())["changes"] == bound.changes


def test_more_steps_are_kept(looped: Path) -> None:
    bound, schedule = loop(steps=12)
    load_checkpoint(looped, bound, plan={"seed": 1}, schedule=schedule)
    assert (bound.step, bound.total_steps, bound.changes) == (3, 12, [])


def test_a_bare_state_is_compared_as_well() -> None:
    """What Lightning keeps in its own checkpoints."""
    one = bind(model := net(), adamw(model), L2SP())
    other = net()
    two = bind(other, adamw(other, betas=(0.5, 0.9)), L2SP())
    with pytest.raises(Refused, match="betas"):
        two.load_state_dict(one.state_dict())


# --- rows -----------------------------------------------------------------------------------------


class Made(Dataset[Any]):
    """Rows that take work, with a random crop."""

    def __init__(self, count: int = 3000, wrong: int | None = None) -> None:
        self.count, self.wrong, self.reads = count, wrong, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        self.reads += 1
        crop = torch.rand(2) + random.random()
        return {"x": crop + place, "labels": int(place == self.wrong)}


def test_equal_rows_have_equal_hashes_and_others_have_not() -> None:
    one = rows_hash(ROWS)
    assert one == rows_hash(copy.deepcopy(ROWS)) != rows_hash(OTHER)
    swapped = [ROWS[1], ROWS[0], *ROWS[2:]]
    assert len({one, rows_hash(swapped), rows_hash(ROWS[:-1]), rows_hash(Subset(ROWS, [0]))}) == 4
    x, y = torch.randn(5, 2), torch.arange(5)
    assert rows_hash(TensorDataset(x, y)) == rows_hash(TensorDataset(x.clone(), y))
    assert rows_hash(TensorDataset(x, y)) != rows_hash(TensorDataset(x, y.flip(0)))
    assert rows_hash(TensorDataset(x, y)) != rows_hash(TensorDataset(x, y.int()))
    assert rows_hash(None) is None and rows_hash(iter(ROWS)) == STREAMED


@dataclasses.dataclass(slots=True)
class Slotted:
    label: int


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Slotted(0), Slotted(1)),
        ({0, 1}, {0, 2}),
        (Decimal(1), Decimal(2)),
        (date(2020, 1, 1), date(2020, 1, 2)),
        (b"a", b"b"),
        (SimpleNamespace(a=[Slotted(0)]), SimpleNamespace(a=[Slotted(1)])),
        (Slotted, SimpleNamespace),
    ],
)
def test_rows_of_any_object_are_told_apart(one: Any, two: Any) -> None:
    """Of all but the first kinds only the name of the type counted (faults D13)."""
    assert rows_hash([{"x": one}]) == rows_hash([{"x": copy.deepcopy(one)}])
    assert rows_hash([{"x": one}]) != rows_hash([{"x": two}])


def test_arrays_of_objects_are_not_their_addresses() -> None:
    one, two = (numpy.array([f"a{i}" for i in range(3)], dtype=object) for _ in range(2))
    assert rows_hash([one]) == rows_hash([two]) != rows_hash([two[:2]])


def test_rows_with_keys_that_are_no_text_are_said_not_to_be_compared() -> None:
    assert rows_hash([{(0, 1): 2}]) == UNREAD


def test_packed_rows_are_hashed_as_arrays() -> None:
    packed, other = (Packed.of(few, lambda r: list(r)) for few in (ROWS, OTHER))
    assert rows_hash(packed) == rows_hash(Packed.of(ROWS, lambda r: list(r)))
    assert len({rows_hash(packed), rows_hash(other), rows_hash(packed[:8])}) == 3


def test_a_table_is_its_rows_however_it_lies_in_memory() -> None:
    datasets = pytest.importorskip("datasets", reason="tables of Hugging Face")
    table = datasets.Dataset.from_list(ROWS)
    pieces = datasets.concatenate_datasets([table.select(range(5)), table.select(range(5, 16))])
    picked = table.select([*range(15, -1, -1)]).select([*range(15, -1, -1)])
    assert rows_hash(table) == rows_hash(pieces) == rows_hash(picked)
    others = (datasets.Dataset.from_list(OTHER), table.select(range(15, -1, -1)))
    long = datasets.Dataset.from_list([{"text": "a" * (i % 7), "x": [i]} for i in range(1500)])
    halves = [long.select(range(700)), long.select(range(700, 1500))]
    assert rows_hash(long) == rows_hash(datasets.concatenate_datasets(halves))
    assert rows_hash(table) not in {rows_hash(other) for other in others}


def test_rows_that_take_work_are_sampled_and_draw_nothing() -> None:
    made = Made()
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    assert rows_hash(made) == rows_hash(Made())
    assert made.reads == 1000  # every third of 3,000
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert rows_hash(made) != rows_hash(Made(wrong=0))
    assert rows_hash(made) != rows_hash(Made(2999))


def test_rows_that_cannot_be_read_stop_nothing() -> None:
    class Broken(Made):
        def __getitem__(self, place: int) -> Any:
            raise OSError("gone")

    assert rows_hash(Broken()) == UNREAD


def test_an_option_that_only_one_version_of_torch_has_is_no_difference() -> None:
    one = bind(model := net(), adamw(model), L2SP()).state_dict()
    one["meta"]["plan"]["options"] |= {"of_another": True}
    two = bind(model := net(), adamw(model), L2SP())
    two.load_state_dict(one)
    assert two.changes == []


# --- forms of other versions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loop.json", META])
@pytest.mark.parametrize(("schema", "remedy"), [(99, "pip install --upgrade"), (0, "that wrote it"),
                                                (None, "that wrote it")])  # fmt: skip
def test_another_schema_is_refused(
    name: str, schema: Any, remedy: str, looped: Path, tmp_path: Path
) -> None:
    from holdfast.training.manifest import commit

    body = json.loads((looped / name).read_text())
    (looped / name).write_text(json.dumps({**body, "schema": schema}))
    commit(looped)
    bound, schedule = loop()
    with pytest.raises(Refused, match=f"{name} of schema {schema}, .*{remedy}"):
        load_checkpoint(looped, bound, plan={"seed": 1}, schedule=schedule)
    assert not bound.optimizer.state


def test_a_state_of_another_schema_is_refused() -> None:
    bound = bind(model := net(), adamw(model), L2SP())
    state = bound.state_dict()
    with pytest.raises(Refused, match=r"a state of schema 2, .*pip install --upgrade"):
        bound.load_state_dict({**state, "meta": {**state["meta"], "schema": 2}})


GOLDEN = Path(__file__).parent / "golden" / "checkpoint-3"


def golden() -> Any:
    return loop(weight_decay=0.125)


def write_golden() -> None:
    """`python -c "import test_plan; test_plan.write_golden()"`, once for each new schema."""
    bound, schedule = golden()
    for _ in range(3):
        step(bound, schedule)
    save_checkpoint(GOLDEN, bound, position={"batch": 3}, plan={"seed": 1}, schedule=schedule)


def test_a_checkpoint_of_the_first_schema_loads(tmp_path: Path) -> None:
    """Written by 0.1.0 and kept: it loads for ever, or a migration has to read it."""
    shutil.copytree(GOLDEN, tmp_path / "checkpoint-3")
    bound, schedule = golden()
    position = load_checkpoint(tmp_path / "checkpoint-3", bound, plan={"seed": 1},
                               schedule=schedule)  # fmt: skip
    assert position == {"batch": 3} and (bound.step, schedule.last_epoch) == (3, 3)
    from safetensors.torch import load_file

    kept = load_file(GOLDEN / "weights.safetensors")
    held = {f"task/{n}": w.detach() for n, w in bound.weights.items()}
    assert same(kept, held)
    w = bound.weights["0.weight"]
    moments = load_file(GOLDEN / "optimizer.safetensors")
    assert torch.equal(bound.optimizer.state[w]["exp_avg"], moments["0.weight/exp_avg"])
