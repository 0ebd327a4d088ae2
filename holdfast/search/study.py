"""A study shared by processes, on one host or on many: who works on which trial, what came of it.

Optuna's ask and tell has no leases (its heartbeat serves only `optimize`). Here a worker that takes
a trial holds the lease of `leases/<number>` for as long as it lives, see
`holdfast.experiments.lease`. Asking, and looking for a trial whose worker died, happen under the
lease of `leases/study`, so that no two workers take one trial and no trial is asked beyond the
plan. A trial whose worker died is taken up again, until it has had `ATTEMPTS` workers in all.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import Busy, Refused
from holdfast.experiments.lease import Lease, Watch, take, take_in_turn
from holdfast.experiments.record import scrub
from holdfast.search import storage as stores
from holdfast.search.objective import Scores
from holdfast.search.plan import Plan, keep, known, refuse_other
from holdfast.search.rows import CONFIRMS, best_of, rows
from holdfast.search.space import Control

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

ATTEMPTS = 3
FINISHED = ("complete", "pruned", "fail")
LEASES, STUDY = "leases", "study"


@dataclass
class Claim:
    """A trial that this worker holds. `close` releases it, finished or not."""

    study: Study
    number: int
    identity: int  # the trial's id in its storage
    params: dict[str, float]
    control: str | None  # its label, or None for a searched trial
    lease: Lease
    confirms: int | None = None  # the number of the trial that it trains again
    seeds: Sequence[int] = ()  # of its replicates

    @property
    def whole(self) -> bool:
        """Whether it runs to its end, whatever it scores."""
        return self.control is not None or self.confirms is not None

    def report(self, rung: int, value: float) -> bool:
        """Report the value at a rung; returns whether to prune. Controls are never pruned.

        A trial that is repeated, after its worker was killed, reports no rung twice. What confirms
        reports none: other trials are compared at one seed.
        """
        if self.study.plan.objective == "pareto" or self.confirms is not None:
            return False
        return bool(self.study.ask(lambda: self._judge(rung, value)))

    def _judge(self, rung: int, value: float) -> bool:
        known = self.study.storage.get_trial(self.identity).intermediate_values
        if rung not in known:
            self.study.storage.set_trial_intermediate_value(self.identity, rung, float(value))
        elif rung < max(known):
            return False  # it was judged here before, and went on
        frozen = self.study.storage.get_trial(self.identity)
        stop = self.study.study.pruner.prune(self.study.study, frozen)
        return stop and self.control is None

    def done(self, scores: Scores, rows: list[dict[str, Any]]) -> None:
        """Finish the trial: its scores, the mean over replicates, and those of each."""
        self._note({**asdict(scores), "replicates": rows})
        self._tell("COMPLETE", scores.values(self.study.plan.objective))

    def pruned(self, reason: str, steps: int, seconds: float) -> None:
        self._note({"reason": reason, "steps": steps, "seconds": seconds})
        self._tell("PRUNED")

    def failed(self, reason: str, steps: int = 0, seconds: float = 0.0) -> None:
        self._note({"reason": reason, "steps": steps, "seconds": seconds})
        self._tell("FAIL")

    def excuse(self) -> None:
        """Do not count this attempt: the trial is not to blame that its worker stops."""
        storage = self.study.storage
        known = self.study.ask(lambda: storage.get_trial(self.identity).user_attrs)
        self._note({"attempts": max(0, known.get("attempts", 1) - 1)})

    def blame(self, error: BaseException) -> None:
        """Keep what ended this attempt, for the trial's reason if it was the last."""
        said = str(error).partition("\n")[0]
        self._note({"error": f"{type(error).__name__}: {said}"[:200]})

    def close(self) -> None:
        self.lease.release()

    def _note(self, values: Mapping[str, Any]) -> None:
        note = self.study.storage.set_trial_user_attr
        for key, value in values.items():
            self.study.ask(partial(note, self.identity, key, value))

    def _tell(self, state: str, values: list[float] | None = None) -> None:
        end = stores.optuna().trial.TrialState[state]
        tell = self.study.study.tell
        self.study.ask(lambda: tell(self.number, values, state=end, skip_if_finished=True))


class Study:
    """An Optuna study in a folder, with leases."""

    def __init__(self, folder: str | Path, plan: Plan, storage: str | None = None) -> None:
        optuna = stores.optuna()
        self.folder, self.plan = Path(folder), plan
        self.url, self._watch = stores.address(storage, self.folder), Watch()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_links(
                self.folder, (LEASES, "trials", "first", "population", "final", stores.DATABASE)
            )
            for inner in (LEASES, f"{LEASES}/{STUDY}", "trials"):
                (self.folder / inner).mkdir(exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot be written: {error.strerror}", where=str(self.folder),
                          remedy="choose another --out") from None  # fmt: skip
        with self.lock():
            where = stores.kept(self.url, self.folder)
            name = known(self.folder, plan, where)
            self.storage = stores.open_storage(self.url)  # before `keep`: it may be mistyped
            self.name = name or keep(self.folder, plan, where)
            directions = ["maximize"] * (2 if plan.objective == "pareto" else 1)
            self.study = self.ask(lambda: optuna.create_study(
                storage=self.storage, study_name=self.name, directions=directions,
                load_if_exists=True, pruner=stores.pruner(plan.pruner, plan.seed),
                sampler=stores.sampler(plan.sampler, plan.seed),
            ))  # fmt: skip
            config = self.study.user_attrs.get("config")
            if config is None:
                self.study.set_user_attr("config", plan.identity)
                self.study.set_user_attr("title", plan.title)
            else:
                refuse_other(config, plan.identity, scrub(self.url))
            self.ask(lambda: self._enqueue(plan.controls))
        self._check_confirmed()
        self._identity = self.storage.get_study_id_from_name(self.name)

    def _enqueue(self, wanted: list[Control]) -> None:
        """Enqueue the controls that are missing, in order: the order gives their numbers."""
        there = {t.user_attrs.get("control") for t in self.trials()}
        for control in wanted:
            if control.label not in there:
                marks = {"control": control.label, "kind": control.kind}
                self.study.enqueue_trial(control.params, user_attrs=marks)

    def _check_confirmed(self) -> None:
        """Refuse fewer further seeds than trials were confirmed with.

        Trials with more of them come before all others: later ones, however good, never would win.
        """
        there = {t.user_attrs["seed"] for t in self.trials() if CONFIRMS in t.user_attrs}
        if there and not (self.plan.confirm and there <= {*self.plan.further_seeds}):
            raise Refused(f"its best trials were confirmed with {len(there)} further seeds, and "
                          "later ones would not be", where=str(self.folder),
                          remedy=f"--confirm 2 or more and --confirm-seeds {max(2, len(there))} or "
                          "more, or another --out")  # fmt: skip

    def check_unchanged(self) -> None:
        """Refuse a model whose files are no longer those that the study began with.

        They are read when a process first trains, and anew for each final run.
        """
        known(self.folder, self.plan, stores.kept(self.url, self.folder))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time: short work only."""
        held = take_in_turn(self.folder / LEASES / STUDY)
        try:
            yield
        finally:
            held.release()

    def trials(self) -> list[FrozenTrial]:
        """All trials by number, as they are now."""
        found: list[FrozenTrial] = self.ask(lambda: self.study.get_trials(deepcopy=False))
        return found

    def ask(self, call: Callable[[], Any]) -> Any:
        """`call()` to the storage; a server may restart meanwhile (faults R9)."""
        local = self.url.startswith(("sqlite", stores.JOURNAL))
        return call() if local else stores.patiently(call)

    def counts(self) -> Counter[str]:
        """How many trials are in each state, by Optuna's names in lower case."""
        return Counter(t.state.name.lower() for t in self.trials())

    @property
    def over(self) -> bool:
        """Whether every trial that was planned is finished, and the best of them confirmed."""
        trials = self.trials()
        if _searched(trials) < self.plan.searching or not all(
            t.state.is_finished() for t in trials
        ):
            return False
        return not self._unconfirmed(trials)

    def _unconfirmed(self, trials: list[FrozenTrial]) -> list[tuple[FrozenTrial, int]]:
        """The best trials and the further seeds with which none of them was begun.

        All of them with one seed before the next. None before all others are finished: which are
        the best, on the seeds that all trials share, is then settled.
        """
        if not all(t.state.is_finished() for t in trials if CONFIRMS not in t.user_attrs):
            return []
        there = {(t.user_attrs.get(CONFIRMS), t.user_attrs.get("seed")) for t in trials}
        top = best_of(rows(trials, self.plan.space), self.plan.confirm)
        return [(trials[r.number], seed) for seed in self.plan.further_seeds for r in top
                if (r.number, seed) not in there]  # fmt: skip

    # --- asking -------------------------------------------------------------------------------

    def claim(self) -> Claim | None:
        """A trial to work on; None where there is none *now*: see `over`."""
        with self.lock():
            claim: Claim | None = self.ask(self._claim)
            return claim

    def _claim(self) -> Claim | None:
        """A trial whose leases and attempts are ours, of those there are or one more.

        Where an answer is lost, an asked trial stays behind that runs and nobody holds: the next
        to ask takes it.
        """
        trials = self.trials()
        states = stores.optuna().trial.TrialState
        for trial in trials:
            if trial.state != states.RUNNING or (held := self.lease(trial.number)) is None:
                continue
            with _released_on_error(held):
                # Its worker may have finished and released it since the list was read.
                now = self.storage.get_trial(self._id(trial.number))
                claim = self._take(now, held) if now.state == states.RUNNING else None
            if claim is not None:
                return claim
            held.release()
        waiting = any(t.state == states.WAITING for t in trials)
        if not waiting and _searched(trials) >= self.plan.searching:
            for trial, seed in (again := self._unconfirmed(trials)):
                marks = {CONFIRMS: trial.number, "seed": seed}
                self.study.enqueue_trial(trial.params, user_attrs=marks)
            if not again:
                return None
        self._seed(len(trials))
        asked = self.study.ask()
        taken = self.lease(asked.number)
        assert taken is not None, "a trial that was just made has no other worker"
        with _released_on_error(taken):
            return self._take(asked, taken)

    def _seed(self, number: int) -> None:
        """Seed the sampler by a trial's number, whichever process asks and however often it began.

        A process that resumes a study does not draw the same trials again.
        """
        seed = (self.plan.seed * 100_003 + number) % 2**32
        self.study.sampler = stores.sampler(self.plan.sampler, seed)

    def lease(self, number: int) -> Lease | None:
        """The lease of a trial, or None while another process has it, and is heard from."""
        folder = self.folder / LEASES / str(number)
        folder.mkdir(exist_ok=True)
        if self._watch.free(folder):
            with contextlib.suppress(Busy):
                return take(folder)
        return None

    def _id(self, number: int) -> int:
        """A trial's id in the storage, which may hold other studies too."""
        return self.storage.get_trial_id_from_study_id_trial_number(self._identity, number)

    def _take(self, trial: FrozenTrial | Trial, held: Lease) -> Claim | None:
        """The claim on a trial; None, and the trial failed, if its workers ended too often."""
        told, identity = trial.user_attrs, self._id(trial.number)
        attempts, control = int(told.get("attempts", 0)), told.get("control")
        claim = Claim(self, trial.number, identity, {}, control, held, told.get(CONFIRMS),
                      [told["seed"]] if CONFIRMS in told else self.plan.seeds)  # fmt: skip
        if attempts >= ATTEMPTS:
            last = f", at last by {told['error']}" if "error" in told else ""
            claim.failed(f"its worker ended {attempts} times before it did{last}")
            return None
        claim._note({"attempts": attempts + 1})
        ranges, whole = self.plan.space.ranges, self.plan.space.whole
        if not ranges.keys() <= trial.params.keys():
            open_type = stores.optuna().trial.Trial  # a FrozenTrial is only a snapshot
            if not isinstance(trial, open_type):
                # Its worker died while parameters were drawn: those drawn are kept, and drawn once
                # more only so that the rest are what they would have been.
                self._seed(trial.number)
                half, trial = trial, open_type(self.study, identity)
                for name, where in half.distributions.items():
                    self.study.sampler.sample_independent(self.study, half, name, where)
            for name, r in ranges.items():
                if name in whole:
                    trial.suggest_int(name, math.ceil(r.low), math.floor(r.high), log=r.log)
                else:
                    trial.suggest_float(name, r.low, r.high, log=r.log)
        claim.params.update({name: trial.params[name] for name in ranges})
        return claim


def _searched(trials: Sequence[FrozenTrial]) -> int:
    """How many trials there are, but for those that confirm others."""
    return sum(CONFIRMS not in t.user_attrs for t in trials)


def refuse_links(folder: Path, names: Sequence[str]) -> None:
    """Refuse links that were planted where a search writes; runs look within their own folders."""
    for path in (path for name in names for path in (folder / name, *(folder / name).glob("*"))):
        if path.is_symlink():
            raise Refused("is a symbolic link, and searches write through none", where=str(path),
                          remedy="remove it, or choose another --out")  # fmt: skip


@contextlib.contextmanager
def _released_on_error(held: Lease) -> Iterator[None]:
    try:
        yield
    except BaseException:
        held.release()
        raise


def wait(seconds: float, look: Callable[[], None]) -> None:
    """Sleep in short pieces, so that a signal is handled soon."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        look()
        time.sleep(min(left, 0.2))
