"""Whatever a file of a stranger holds, a parser returns a value or refuses in one line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from holdfast import DPS, EWC, L2SP, Rates, Recipe, Refused
from holdfast.experiments.record import Record
from holdfast.files import parse_json, read_yaml
from holdfast.search.plan import FILE, known
from holdfast.search.trials import read_study
from holdfast.tasks import load_task
from holdfast.tasks.protocol import HOME, Protocol
from holdfast.tasks.spec import parse
from holdfast.training.loop import load_checkpoint, save_checkpoint
from holdfast.training.manifest import commit, damage

EXAMPLES = int(os.environ.get("EXAMPLES", "20"))
SHARED = settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])

# What stands where something else should: of every type, at every extreme.
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "NaN", "1e999", "../x", "a" * 5000, "\ud800", "\x00", "=1+1", 10**400]),
)
JUNK = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=6) | st.sampled_from(["name", "type", "schema"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(body: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value in nested lists and mappings."""
    yield at
    if isinstance(body, dict | list):
        for key in body if isinstance(body, dict) else range(len(body)):
            yield from places(body[key], (*at, key))


@st.composite
def changed(draw: Any, body: Any) -> Any:
    """A body in which values were replaced, deleted or added."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(st.sampled_from([p for p in places(body) if p] or [("none",)]))
        inner = body
        for key in above:
            inner = inner[key]
        what = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if what == "delete":
            del inner[last]
        elif what == "add" and isinstance(inner, dict):
            inner[draw(st.text(max_size=6))] = draw(JUNK)
        else:
            inner[last] = draw(JUNK)
        if not body:
            break
    return body


@st.composite
def torn(draw: Any, content: bytes) -> bytes:
    """Bytes some of which are others, more or fewer."""
    start = draw(st.integers(0, len(content)))
    end = start + draw(st.integers(0, 9))
    return content[:start] + draw(st.binary(max_size=12)) + content[end:]


def value_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except Refused as refusal:
        assert "\n" not in str(refusal) and "\x1b" not in str(refusal)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parsers")


def written(path: Path, body: Any) -> Path:
    """A body as JSON, or as it is; what cannot be written is no file of anybody's."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path.write_bytes(content)
    return path


# --- YAML ---------------------------------------------------------------------------------------

RECIPE = Recipe(rates=Rates.bertcl(), methods=[EWC(strength=3.0), DPS(stage=5, drop=0.4)],
                max_grad_norm=1.0, name="a").to_dict()  # fmt: skip
PROTOCOLS = sorted(HOME.glob("*.yaml"))


@SHARED
@given(changed(RECIPE))
def test_recipes(body: Any) -> None:
    value_or_refused(lambda: Recipe.from_dict(body))


@SHARED
@given(changed(Rates.bertcl().to_dict()))
def test_rates(body: Any) -> None:
    value_or_refused(lambda: Rates.from_dict(body))


@SHARED
@given(st.one_of(torn(yaml.safe_dump(RECIPE).encode()), st.binary(max_size=40),
                 st.text("&*!:{}[]-\n ab1|>'\"#%@`,?\t", max_size=30).map(str.encode)))  # fmt: skip
def test_yaml_of_any_bytes(home: Path, content: bytes) -> None:
    path = home / "recipe.yaml"
    path.write_bytes(content)
    value_or_refused(lambda: Recipe.load(path))
    value_or_refused(lambda: Rates.load(path))
    with suppress(UnicodeDecodeError):
        value_or_refused(lambda: read_yaml(content.decode(), where="--method"))


@SHARED
@given(st.sampled_from(PROTOCOLS).flatmap(lambda p: changed(yaml.safe_load(p.read_text()))))
def test_protocols(home: Path, body: Any) -> None:
    try:
        text = yaml.safe_dump(body, allow_unicode=True)
        (home / "p.yaml").write_text(text, encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError, ValueError):
        return
    value_or_refused(lambda: Protocol.named(str(home / "p.yaml")))


@SHARED
@given(st.sampled_from(["ewc", "dps", "replay", "nothing"]),
       st.dictionaries(st.sampled_from(["strength", "rows", "stage", "drop", "memory", "x"]), JUNK,
                       max_size=3))  # fmt: skip
def test_options_of_methods(name: str, options: dict[str, Any]) -> None:
    value_or_refused(lambda: Recipe.from_dict({"methods": [{name: options}]}))


# --- rows ---------------------------------------------------------------------------------------

TEXTS = ["the film was good", 'a "book", said\nsomebody', "NA", "dull"] * 3
ROWS = {
    ".jsonl": "\n".join(json.dumps({"text": f"{t} {i}", "label": "ab"[i % 2]})
                        for i, t in enumerate(TEXTS)),
    ".csv": "text,label\n" + "\n".join(f'"{t.replace(chr(34), chr(34) * 2)} {i}",{"ab"[i % 2]}'
                                       for i, t in enumerate(TEXTS)),
    ".tsv": "text\tlabel\n" + "\n".join(f"{t.split()[0]} {i}\t{'ab'[i % 2]}"
                                        for i, t in enumerate(TEXTS)),
}  # fmt: skip


@SHARED
@given(st.sampled_from([*ROWS]).flatmap(
    lambda suffix: st.tuples(st.just(suffix), st.one_of(
        torn(ROWS[suffix].encode()), st.binary(max_size=60), st.text(max_size=40).map(
            lambda text: text.encode("utf-8", "surrogatepass"))))))  # fmt: skip
def test_rows(home: Path, given_: tuple[str, bytes]) -> None:
    suffix, content = given_
    path = home / f"rows{suffix}"
    path.write_bytes(content)
    value_or_refused(lambda: load_task(path))


@SHARED
@given(st.one_of(
    st.text(max_size=30), st.text("abc:/?=&.@%#,\x00é ", max_size=30),
    st.builds("{}?{}={}".format, st.sampled_from(["x.csv", "builtin:sentiment", "a/b", "hub:a/b"]),
              st.sampled_from(["text", "label", "name", "type", "metric", "split", "x"]),
              st.text(max_size=12))))  # fmt: skip
def test_specs_of_tasks(text: str) -> None:
    value_or_refused(lambda: parse(text))


# --- JSON ---------------------------------------------------------------------------------------

RECORD = Record(
    tasks=[{"name": "one", "metric": "accuracy"}, {"name": "two", "metric": "accuracy"}],
    scores=[[0.9, None], [0.7, 0.8]], seed=1, seconds=[1.0, 2.0], steps=[3, 4],
    history=[{"learning": 0, "step": 2, "epoch": 1.0, "loss": 0.5, "scores": [0.4, None]}],
    settings={"lr": 1e-3}, recipe={"name": "plain"}, alone={"two": 0.9}, status="done",
).to_dict()  # fmt: skip
TRIALS = {"trials": [{"number": n, "state": "complete", "value": 1.2 + n, "rate": 1e-3,
                      "old": 0.6, "new": 0.6, **{f"x.layer.{i}": 0.5 for i in range(2)},
                      "x.embeddings": 1.0, "x.head": 1.0} for n in range(2)]}  # fmt: skip


@SHARED
@given(changed(RECORD))
def test_records(home: Path, body: Any) -> None:
    value_or_refused(lambda: Record.from_dict(body))
    value_or_refused(lambda: Record.load(written(home / "record.json", body)))


@SHARED
@given(changed(TRIALS))
def test_searches(home: Path, body: Any) -> None:
    value_or_refused(lambda: read_study(written(home / "search.json", body)))


@SHARED
@given(st.one_of(torn(json.dumps(RECORD).encode()), st.binary(max_size=30)))
def test_json_of_any_bytes(home: Path, content: bytes) -> None:
    with suppress(ValueError, RecursionError):  # which its callers refuse
        parse_json(content.decode())
    value_or_refused(lambda: Record.load(written(home / "record.json", content)))
    value_or_refused(lambda: read_study(written(home / "search.json", content)))


class Planned:
    """What a search asks of its plan."""

    identity: dict[str, Any] = {"trials": 3, "model": "x", "settings": {"lr": 1e-3}}  # noqa: RUF012


@SHARED
@given(st.one_of(changed({"name": "s", "storage": "sqlite:///x", "config": Planned.identity}),
                 torn(b'{"name": "s", "storage": "x", "config": {}}')))  # fmt: skip
@example(body={"name": "s", "storage": "sqlite:///x", "config": {"settings": None}})
def test_studies(home: Path, body: Any) -> None:
    written(home / FILE, body)
    value_or_refused(lambda: known(home, Planned(), "sqlite:///x"))  # type: ignore[arg-type]


def bound(steps: int = 0) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    made = Recipe(methods=[L2SP(), DPS(stage=2)]).bind(model, optimizer, total_steps=20)
    for _ in range(steps):
        loss = model(torch.ones(2, 3)).square().sum()
        (loss + made.penalty({}, None)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


@pytest.fixture(scope="module")
def saved(home: Path) -> dict[str, bytes]:
    """The JSON files of a checkpoint."""
    save_checkpoint(home / "checkpoint-3", bound(3), position={"epoch": 1})
    return {path.name: path.read_bytes() for path in (home / "checkpoint-3").glob("*.json")}


@pytest.mark.parametrize("name", ["loop.json", "holdfast.json", "manifest.json"])
@SHARED
@given(st.data())
def test_states_of_checkpoints(
    name: str, home: Path, saved: dict[str, bytes], data: st.DataObject
) -> None:
    """By somebody who makes the manifest anew, so that checksums fit."""
    folder, good = home / "checkpoint-3", saved[name]
    body = data.draw(st.one_of(changed(json.loads(good)), torn(good)))
    try:
        written(folder / name, body)
        if name != "manifest.json":
            commit(folder)
        value_or_refused(lambda: damage(folder))
        value_or_refused(lambda: load_checkpoint(folder, bound()))
    finally:
        for each in (name, "manifest.json"):
            (folder / each).write_bytes(saved[each])


@pytest.mark.slow
def test_a_thousand_of_each() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    more = {"EXAMPLES": "1000", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*words, "--timeout=1800", __file__], env={**os.environ, **more},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
