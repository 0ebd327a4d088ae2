"""Loggers of Transformers (TensorBoard, MLflow, W&B, Trackio, …) over a whole sequence: one run.

Each task has a Trainer of its own, whose loggers would make a run a task and count its steps from
0. So the Trainers of a sequence have none, but one callback: it keeps the integrations from the
first task to the last, hands on what a Trainer logs at the step counted over the sequence, and
adds what the record holds. `loggers.json` says which run each logger made, and what it was sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from holdfast.errors import Refused, nearest
from holdfast.experiments import metrics
from holdfast.experiments.record import Record
from holdfast.files import write_text_atomic

if TYPE_CHECKING:
    from holdfast.experiments.learner import Learner

SENT, EVENTS, WHERE = "loggers.json", "logs", "--report-to"


@dataclass
class Sent:
    """What one logger was sent, so that a run that is resumed sends nothing twice."""

    run: str | None = None  # the logger's own id of its run
    points: int = 0  # of those in the record
    steps: dict[str, int] = field(default_factory=dict)  # of Trainer's logs: tag -> last step


def points(record: Record) -> Iterator[tuple[int, dict[str, float]]]:
    """What a record holds in the order it was measured: the step over the sequence, and values.

    While a run goes on, further points only come at the end.
    """
    end, named = 0, record.names

    def told(step: int, values: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
        return step, {f"holdfast/{k}": v for k, v in values.items() if v is not None}

    def general(values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"general/{measure}": value for measure, value in values.items()}

    yield told(0, general(record.general.get("base", {})))
    for i, task in enumerate(named):
        for point in record.history:
            if point["learning"] == i:
                scores = zip(named, point.get("scores") or (), strict=False)
                yield told(point["step"], {f"selection/{n}": score for n, score in scores})
        if i >= len(record.seconds):
            return  # it is being learned
        end += record.steps[i] or 0
        values: dict[str, Any] = {
            f"score/{n}": s for n, s in zip(named, record.scores[i], strict=True)
        }
        values |= metrics.summary([row[: i + 1] for row in record.scores[: i + 1]]) if i else {}
        values |= general(record.general.get("after", {}).get(task, {}))
        moved = record.movement.get(task, {})
        values |= {f"movement/{part}": far for part, far in moved.get("parts", {}).items()}
        values |= {"changed": moved.get("changed"), "mask_overlap": moved.get("overlap")}
        yield told(end, values)


class Loggers(TrainerCallback):
    """The integrations named in `report_to`, which live as long as a sequence.

    `Refused` for a name that Transformers does not know, or whose package is not installed.
    """

    def __init__(self, report_to: Sequence[str] = ()) -> None:
        for name in report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise Refused(f"no logger {name!r}", where=WHERE,
                              remedy=nearest(name, list(INTEGRATION_TO_CALLBACK)))  # fmt: skip
        try:
            self.made = {name: INTEGRATION_TO_CALLBACK[name]() for name in report_to}
        except (RuntimeError, ImportError) as error:
            raise Refused(str(error), where=WHERE) from None

    @contextlib.contextmanager
    def over(self, learner: Learner) -> Iterator[None]:
        """One run of each logger for as long as the block lasts: a new one, or the folder's."""
        if not self.made:
            yield
            return
        folder = learner.folder.resolve()
        self.path, self.record = folder / SENT, learner.record
        self.called, self.sent = self._before(f"{folder.parent.name}-{folder.name}")
        self.args = learner.plan.arguments(folder, seed=learner.seed,
                                           rows=len(learner.tasks[0].train))  # fmt: skip
        self.args.run_name = self.called
        self.state, self.control = TrainerState(), TrainerControl()
        with contextlib.ExitStack() as ends:
            for name in self.made:
                self._begin(name, folder, ends)
            self.tell()
            yield

    def _before(self, name: str) -> tuple[str, dict[str, Sent]]:
        """The run's name, and what each logger was sent by earlier processes."""
        sent = {name: Sent() for name in self.made}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            body = json.loads(self.path.read_text(encoding="utf-8"))
            return str(body["name"]), sent | {k: Sent(**v) for k, v in body["sent"].items()}
        return f"{name}-{secrets.token_hex(3)}", sent  # loggers may tell runs by their name

    def _begin(self, name: str, folder: Path, ends: contextlib.ExitStack) -> None:
        logger, sent = self.made[name], self.sent[name]
        if name == "tensorboard":
            asked = logger.logging_dir  # by TENSORBOARD_LOGGING_DIR, for all runs
            logger.logging_dir = str(Path(asked, self.called) if asked else folder / EVENTS)
        try:
            # Not by their integrations: one of an earlier run would end ours when it is deleted.
            if name in ("mlflow", "wandb") and _active(name) is None:
                ends.callback(_opened(name, self.called, sent.run))
            logger.on_train_begin(self.args, self.state, self.control, model=None)
        except Exception as error:  # a server that is away, a run that was deleted
            said = str(error).strip().partition("\n")[0]
            raise Refused(f"{name} cannot begin ({said})", where=WHERE,
                          remedy=f"mend it, or leave {name} out") from error  # fmt: skip
        sent.run = _active(name)
        ends.callback(logger.on_train_end, self.args, self.state, self.control)

    # --- what is sent -----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Hand on what a Trainer logs; a step that is repeated after a kill was sent before."""
        step = state.global_step + sum(n or 0 for n in self.record.steps)
        for name, sent in self._each():
            new = {tag: v for tag, v in (logs or {}).items() if sent.steps.get(tag, -1) < step}
            if new:
                self._send(name, step, new)
                sent.steps |= dict.fromkeys(new, step)
        self._save()

    def tell(self) -> None:
        """Send what the record holds and a logger was not sent yet."""
        for name, sent in self._each():
            for step, values in list(points(self.record))[sent.points :]:
                if values:
                    self._send(name, step, values)
                sent.points += 1
        self._save()

    def _each(self) -> list[tuple[str, Sent]]:
        return [(name, self.sent[name]) for name in self.made]

    def _send(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self.state.global_step = step
        self.made[name].on_log(self.args, self.state, self.control, logs=dict(values))

    def _save(self) -> None:
        if self.made:
            body = {"name": self.called, "sent": {k: asdict(v) for k, v in self.sent.items()}}
            write_text_atomic(self.path, json.dumps(body, indent=1))


def _opened(name: str, called: str, known: str | None) -> Callable[[], object]:
    """Open a run, or one of before again, in the integration's project; returns what closes it."""
    module: Any = sys.modules[name]
    if name == "mlflow":
        module.start_run(run_id=known, run_name=called)
        return lambda: module.end_run()
    project = os.environ.get("WANDB_PROJECT", "huggingface")
    module.init(project=project, name=called, id=known, resume="allow")
    return lambda: module.finish()


def _active(name: str) -> str | None:
    """The id of the run that a logger has open in this process, where it has such runs."""
    module: Any = sys.modules.get(name)
    if name == "mlflow":
        run = module.active_run()
        return None if run is None else str(run.info.run_id)
    run = module.run if name == "wandb" else None
    return None if run is None else str(run.id)
