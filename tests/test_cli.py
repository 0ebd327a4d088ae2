"""The command line as a user meets it: exit codes, one clear line, help that answers at once."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from safetensors.torch import load_file

from holdfast import __version__
from holdfast.cli import build_parser, main
from holdfast.cli.options import given
from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.experiments.runs import open_run
from holdfast.experiments.settings import Settings

VERBS = (
    "train", "sequence", "selftrain", "compare", "search", "rates", "combine", "predict", "export",
    "delta", "plan", "check", "runs", "report", "verify", "methods", "doctor", "demo",
)  # fmt: skip
SHORT = ["--epochs", "0.5", "--batch-size", "4", "--save-steps", "0", "--max-length", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    models.save_bert(folder / "bert")
    for topic in models.TOPICS:
        models.write_task(folder, topic)
    (folder / "one.jsonl").write_text('{"text": "x", "label": "a"}\n' * 9)
    (folder / "bad.yaml").write_text("methods:\n  dsp: {}\n")
    (folder / "typo.yaml").write_text("methods:\n  dps: {dorp: 0.5}\n")
    return folder


def started(*words: str, **more: Any) -> subprocess.Popen[str]:
    hidden = ("HF_", "TRANSFORMERS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast", *words], text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


# --- where output goes ----------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("methods >&- 2>&-", 0),
        ("methods | true; exit ${PIPESTATUS[0]}", 141),
        ("methods >/dev/full", 2),
    ],
)
def test_what_becomes_of_the_output_is_one_code_and_no_traceback(words: str, code: int) -> None:
    """A run of days ended in a traceback, with 1, for its last line."""
    line = f"{shlex.quote(sys.executable)} -m holdfast {words}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 2) and "Traceback" not in done.stderr


def test_letters_that_the_output_has_not_are_replaced() -> None:
    words = [sys.executable, "-c", "import sys; from holdfast.cli import main; "
             "print('nothing'); main(['methods']); print('caf\\xe9 \\udce9')"]  # fmt: skip
    done = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"},
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"caf? ?\n") and not done.stderr


# --- options --------------------------------------------------------------------------------------

TRAINING = """--model --out --bad-rows --strip --train-size --evaluation-size --epochs --batch-size
    --accumulation --lr --weight-decay --warmup --schedule --head --max-length --selection
    --save-steps --group-by-length --bf16 --compile --bf16-eval --mix"""
ENGINE = "--engine --address --partition --time --cpus --gpus"
OPTIONS = {
    "train": f"--task --recipe --seed --reference --lm-eval --report-to {TRAINING}",
    "sequence": f"""--tasks --alone --recipe --seed --from --old-task --without-old-rows
        --max-forgetting --trust-code --reference --lm-eval --report-to {TRAINING}""",
    "selftrain": f"""--task --unlabelled --student --recipe --seed --rounds --rows --passes --pseudo
        --choose --alpha --phce --student-lr {ENGINE}
        {TRAINING.replace("--head", "").replace("--mix", "")}""",
    "compare": f"""--tasks --protocol --data --only-served --recipes --flat --budget --rates --seeds
        --repeat --reference --lm-eval --report-to --workers --jobs {ENGINE} --only {TRAINING}""",
    "plan": "work",
    "search": f"""--tasks --shift --trials --replicates --confirm --confirm-seeds --learn-old
        --sampler --population --pruner --objective --parts --tune --flat --seeds --storage
        --workers --jobs {ENGINE} --recipe --seed
        {TRAINING.replace("--lr", "").replace("--head", "")}""",
    "rates": f"""--tasks --from --old-task --from-probe --tolerance --confirm --parts --rows
        --recipe --seed --trust-code
        {TRAINING.replace("--head", "").replace("--save-steps", "")}""",
    "combine": "paths --out --base --layers",
    "predict": "run_folder rows --task --out --keep --batch-size --trust-code",
    "export": "run_folder --task --out --onnx --license --trust-code",
    "delta": "action",
    "check": "before after --max-forgetting --junit --trust-code",
    "runs": "folder",
    "doctor": "",
    "report": "paths --out",
    "verify": "paths",
    "methods": "name",
    "demo": "--out --workers",
}


def verbs() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    return next(a.choices for a in actions if isinstance(a, argparse._SubParsersAction))


def test_the_options_are_frozen() -> None:
    """Others script against them: what appears or vanishes has to be meant."""
    found = {
        name: {word for a in parser._actions for word in a.option_strings or [a.dest]}
        for name, parser in verbs().items()
    }
    assert found == {n: {"-h", "--help", *words.split()} for n, words in OPTIONS.items()}


def test_every_setting_has_an_option_and_its_help_names_the_default() -> None:
    options = {a.dest: a for a in verbs()["sequence"]._actions}
    defaults = Settings().to_dict()
    assert set(defaults) <= set(options)
    for name, value in defaults.items():
        if value not in (None, False):
            said = str(options[name].help).rpartition("(")[2].rstrip(")")
            assert said == str(value) or float(said) == value, name


def test_options_that_are_not_given_leave_the_default() -> None:
    chosen = build_parser().parse_args(["train", "--task", "x"])
    assert given(chosen) == {}
    chosen = build_parser().parse_args(["train", "--task", "x", "--warmup", "5", "--lr", "1e-5"])
    assert given(chosen) == {"warmup": 5, "lr": 1e-5}
    assert isinstance(given(chosen)["warmup"], int)  # steps; 0.1 would be a share


@pytest.mark.parametrize(
    ("verb", "home"),
    [
        ("train --task {}", "experiments.sequence.run_sequence"),
        ("sequence --old-task {} --from x --tasks builtin:intents {}",
         "experiments.sequence.run_sequence"),
        ("compare --recipes plain --out x --tasks builtin:intents {}",
         "experiments.compare.compare"),
        ("search --out x --tasks builtin:intents {}", "search.run.search"),
    ],
)  # fmt: skip
def test_options_about_rows_are_those_of_every_task(
    verb: str, home: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the spec itself, which is what the record holds; a builtin task has none."""
    asked: list[Any] = []

    def instead(model: Any, tasks: list[str], *_: Any, **more: Any) -> None:
        asked.append([*tasks, more.get("old_task")])
        raise Refused("enough")

    monkeypatch.setattr(f"holdfast.{home}", instead)
    words = verb.format(*[f"{place}/mood.jsonl"] * 2).split()
    for more, query in (
        ("", ""),
        ("--strip", "?strip=yes"),
        ("--bad-rows skip", "?bad_rows=skip"),
        ("--bad-rows skip --strip", "?bad_rows=skip&strip=yes"),
    ):
        assert main([*words, *more.split()]) == 2
        file = f"{place}/mood.jsonl{query}"
        builtin = ["builtin:intents"] if "builtin" in verb else []
        assert asked.pop() == [*builtin, file, file if "old" in verb else None]


def test_another_package_adds_a_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[holdfast.verbs]\ngreet = theirs_greet\nhalf = theirs_half\n"
    )
    (tmp_path / "theirs_greet.py").write_text(
        "ABOUT, EXAMPLE, RESUMES = 'say a word', 'holdfast greet --word you', False\n"
        "def options(parser): parser.add_argument('--word')\n"
        "def run(chosen): print('hello', chosen.word)\n"
    )
    (tmp_path / "theirs_half.py").write_text("ABOUT = 'half a verb'\n")
    assert main(["greet"]) == 2 and "no verb 'greet'" in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["greet", "--word", "there"]) == 0
    assert capsys.readouterr().out == "hello there\n"
    assert main(["half"]) == 2
    said = capsys.readouterr().err
    assert "theirs_half of theirs is no verb: it has no EXAMPLE, RESUMES, options, run" in said


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    example = shlex.split(capsys.readouterr().out.rpartition("example:\n  holdfast ")[2])
    assert example[0] == verb
    build_parser().parse_args(example)


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from holdfast.cli import main\n"
        "for words in ([], ['--version'], *([v, '--help'] for v in sys.argv[1:])):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'rich'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *VERBS], capture_output=True, text=True)
    assert done.stdout.endswith("HEAVY []\n")


def test_the_package_runs_as_the_command_does() -> None:
    code = [sys.executable, "-m", "holdfast", "--version"]
    done = subprocess.run(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"holdfast {__version__}\n"), done.stderr


def test_all_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert tuple(verbs()) == VERBS and all(re.search(rf"\n    {v}\s", out) for v in VERBS)


def test_methods_lists_every_method_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from holdfast.methods import METHODS
    from holdfast.recipe import PRESETS

    assert main(["methods"]) == 0
    out, errors = capsys.readouterr()
    rows = {line.split("│")[1].strip() for line in out.splitlines() if line.count("│") > 2}
    assert rows >= {*METHODS, *PRESETS} and errors == ""


def test_methods_stand_in_groups_with_what_a_step_was_measured_to_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the table is whole in a hundred columns."""
    from holdfast.cli import methods as verb
    from holdfast.methods import METHODS

    monkeypatch.setattr("holdfast.cli.options.sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(verb, "costs", lambda: {"steps": {"ewc": {"mean": 1.0549}}})
    verb.every()
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    lines = plain.partition("recipes")[0].splitlines()
    assert max(map(len, lines)) == 100
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in lines if line.count("│") > 2]
    found, group = {}, ""
    for first, *rest in cells:
        group = first if first and not any(rest) else group
        if first in METHODS:
            found[first] = group
            assert rest[3] == ("× 1.05" if first == "ewc" else "–")
    assert found == {name: kind.group for name, kind in METHODS.items()}


@pytest.mark.parametrize("name", ["dps", "ewc", "merge"])
def test_a_method_is_shown_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from holdfast.methods import METHODS

    assert main(["methods", name]) == 0
    out, kind = capsys.readouterr().out, METHODS[name]
    rows = [[c.strip() for c in r.split("│")[1:-1]] for r in out.splitlines() if r.startswith("│")]
    assert [row[:2] for row in rows] == [
        [f.name, json.dumps(getattr(kind(), f.name))] for f in fields(kind)
    ]
    for text in (kind.summary, kind.group, kind.cost, kind.use, kind.bytes_per_weight, kind.paper,
                 str(sys.modules[kind.__module__].__doc__).strip()):  # fmt: skip
        assert text in out
    takes = {row[0]: row[2:] for row in rows}
    if name == "ewc":
        assert takes["strength"] == ["number ≥ 0", "10 … 100000, log"]
        assert takes["decay"] == ["number ≥ 0, ≤ 1", "0.5 … 1"]
        assert takes["labels"] == ["auto, true, sampled, expected", "–"]
    if name == "dps":
        assert takes["stage"] == ["share below 1, or whole number > 0", "0.01 … 0.25, log"]
        assert takes["frequency_penalty"][0] == "true, false or null"
        assert takes["modules"][0].endswith(" or list of text")


def test_a_recipe_is_shown_as_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from holdfast.recipe import PRESETS, Recipe

    assert main(["methods", "default"]) == 0
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert Recipe.load(tmp_path / "r.yaml") == PRESETS["default"]()


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "ewk"]) == 2
    assert "did you mean 'ewc'?" in capsys.readouterr().err


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--lr 0", "--lr"),
        ("--epochs 0", "--epochs"), ("--warmup 1.0", "--warmup"),
        ("--schedule liner", "--schedule"),
        ("--seed -1", "--seed"), ("--recipe dsp", "did you mean 'dps'"),
        ("--recipe {}/bad.yaml", "did you mean 'dps'"), ("--recipe {}/typo.yaml", "'drop'"),
        ("--recipe {}/none.yaml", "none.yaml"), ("--task {}/none.csv", "none.csv"),
        ("--task {}/one.jsonl", "one class"), ("--task builtin:nothing", "builtin"),
        ("--model {}", "config.json"), ("--model {}/none", "no such folder"),
        ("--out {}/one.jsonl/x", "--out"), ("--selection 1.0", "--selection"),
        ("--max-length 65", "say --max-length 64"), ("--model minlm", "did you mean 'minilm'"),
        (f"--out {'x' * 300}", "too long"), (f"--recipe {'x' * 300}", "no recipe called"),
        (f"--recipe {'x' * 300}.yaml", "too long"), ("--reference {}/none.txt", "none.txt"),
        ("--task {}/none.txt", "none.txt"), ("--lm-eval arc", "is for language models"),
        ("--mix {}/mood.jsonl:0.1", "--mix"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_two(
    words: str, says: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = f"train --task {place}/mood.jsonl --model {place}/bert --out {tmp_path}/run"
    plain += " --recipe plain --max-length 64"
    assert main([*plain.split(), *words.format(place).split()]) == 2
    out, errors = capsys.readouterr()
    assert errors.startswith("holdfast: ") and errors.count("\n") == 1 and says in errors
    assert out == "" and not (tmp_path / "run" / "tasks").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "required: VERB; see holdfast --help"),
        ("trian", "no verb 'trian'; did you mean 'train'?"),
        ("zzz", "no verb 'zzz'; known are check, combine, compare"),
        ("train", "required: --task; see holdfast train --help"),
        ("train --task x --lrr 1", "unknown option '--lrr'; did you mean '--lr'?"),
        ("train --task x --lrr=1", "unknown option '--lrr'; did you mean '--lr'?"),
        ("train --task x --zzz", "unknown option '--zzz'; see holdfast train --help"),
        ("train --task x y", "unknown word 'y'; see holdfast train --help"),
        ("train --task x --lr fast", "argument --lr: invalid float value: 'fast'; see"),
        ("train --task x --warmup many", "invalid number value: 'many'; see"),
        ("train --task x --lr 1_0", "argument --lr: invalid float value: '1_0'; see"),
        ("train --task x --batch-size 1_0", "--batch-size: invalid int value: '1_0'; see"),
        ("train --task x --seed ١٠", "argument --seed: invalid int value: '١٠'; see"),
        ("train --task x --warmup 1_0", "invalid number value: '1_0'; see"),
        ("compare --tasks x --flat 1_0", "argument --flat: invalid float value: '1_0'; see"),
        ("sequence --tasks", "--tasks: expected at least one argument; see"),
        ("sequence --taks x", "unknown option '--taks'; did you mean '--tasks'?"),
        ("train --task x --learning-rate 1", "did you mean '--lr'?"),
        ("train --task x --gpu 0", "the device is found by itself"),
        ("report", "required: paths; see holdfast report --help"),
        ("--versoin", "required: VERB; see"),
    ],
)
def test_words_that_are_no_command_are_one_line_and_two(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(words.split())
    except SystemExit as end:
        code = end.code
    assert code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("holdfast: ") and errors.count("\n") == 1 and says in errors


class SafetensorError(Exception):
    """As the library raises it, which knows nothing of OSError."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "r/x"), "r/x: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
         "could not be written"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_a_fault_of_the_disk_in_mid_run_is_one_line_and_two(
    error: Exception, says: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("holdfast.experiments.sequence.run_sequence", fails)
    assert main(["train", "--task", f"{place}/mood.jsonl", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("holdfast: ") and errors.count("\n") == 1
    assert says in errors and "goes on from the last checkpoint" in errors


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a shape that does not fit")

    monkeypatch.setattr("holdfast.experiments.sequence.run_sequence", fails)
    with pytest.raises(RuntimeError, match="shape"):
        main(["train", "--task", "x"])


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "x.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_recipes_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--tasks", "x", "--recipes", "plain", "plain", "--out", "y"]) == 2
    assert "one name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flat", ["2e-4", "1e-4 1e-4", "0.0001 1e-4", "-1", "nan", "1e-3 --budget 2"]
)
def test_flat_rates_that_cannot_serve_are_refused(
    flat: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The usual rate is plain's own already."""
    words = f"compare --tasks builtin:intents --recipes plain --out {tmp_path}/c --flat {flat}"
    assert main(words.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and ("--flat" in errors or "--lr" in errors)
    assert not (tmp_path / "c").exists()


# --- done -----------------------------------------------------------------------------------------


def test_a_whole_run_says_only_what_it_should(place: Path, tmp_path: Path) -> None:
    """In a new process without a network: no traceback, no advice, no bars of others."""
    words = ["sequence", "--tasks", f"{place}/mood.jsonl", f"{place}/colour.jsonl", "--recipe",
             "ewc", "--model", f"{place}/bert", "--out", str(tmp_path / "run"), *SHORT]  # fmt: skip
    process = started(*words)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "mood" in out and "colour" in out and "record.json" in out
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")]
    ours = ("ewc · mood", "ewc · colour", "mood: ", "colour: ")
    assert not [line for line in lines if not line.startswith(ours)]
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_verbs_end_to_end(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--task", f"{place}/mood.jsonl", "--recipe", "dps", "--seed", "2"]
    train += ["--model", f"{place}/bert", "--out", f"{tmp_path}/a", *SHORT]
    assert main(train) == 0
    first = capsys.readouterr().out
    assert main(train) == 0  # read, not trained
    assert capsys.readouterr().out == first
    assert main([*train, "--lr", "1e-3"]) == 2
    assert "other settings" in capsys.readouterr().err
    compare = ["compare", "--tasks", f"{place}/mood.jsonl", "--recipes", "plain", "l2sp",
               "--seeds", "0", "1", "--model", f"{place}/bert", "--flat", "3e-4",
               "--out", f"{tmp_path}/c", *SHORT]  # fmt: skip
    assert main(compare) == 0
    found = sorted({p.parts[-3] for p in (tmp_path / "c").rglob("record.json")})
    assert found == ["l2sp", "plain", "plain-0-0003"]
    out = capsys.readouterr().out
    assert "l2sp" in out and "plain, lr 0.0003" in out and "(control)" in out
    cells = (tmp_path / "c" / "runs.csv").read_text().splitlines()
    assert cells[0].startswith("recipe,seed,learned") and len(cells) == 1 + 6
    page = tmp_path / "page.html"
    assert main(["report", f"{tmp_path}/a", f"{tmp_path}/c", "--out", str(page)]) == 0
    assert "l2sp" in page.read_text()


PROTOCOL = """
about: two orders of two tasks, and a third that is only tested on
source: nobody
scenario: task-incremental
tasks:
  mood: {folder: mood.jsonl}
  tint: {folder: tint.jsonl, stand_in: {folder: colour.jsonl, differs: other colours}}
  far: {folder: far.jsonl}
sequences:
  there: [mood, far, tint]
  back: [tint, mood]
tests:
  question: {good: person, bad: place, red: count, blue: count}
settings: {epochs: 1, batch_size: 4}
cited:
  - {source: a paper, model: T5, averages: {SeqFT: 18.9}, sequence: back}
  - {source: a paper, model: T5, averages: {SeqFT: 24.9}, sequence: there}
caveats: [another model]
"""


def test_a_protocol_is_run_whole_and_says_what_differs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PROTOCOL.replace("  far:", "  question: {folder: question.jsonl}\n  far:"))
    words = ["compare", "--protocol", f"{file}", "--data", f"{place}", "--recipes", "plain",
             "--flat", "1e-3", "--seeds", "0", "--model", f"{place}/bert",
             "--out", f"{tmp_path}/p", *SHORT[:2], *SHORT[4:]]  # fmt: skip
    assert main(words) == 2
    assert "not to be had: far (folder far.jsonl); --only-served" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    assert main([*words, "--only-served"]) == 0
    found = sorted(str(p.parent.relative_to(tmp_path / "p"))
                   for p in (tmp_path / "p").rglob("record.json"))  # fmt: skip
    assert found == [
        f"{s}/{r}/seed-0" for s in ("back", "there") for r in ("plain-0-001", "plain")
    ]  # fmt: skip
    record = Record.load(tmp_path / "p" / "back" / "plain" / "seed-0")
    assert record.names == ["tint", "mood"] and record.settings["batch_size"] == 4
    told = record.extra["protocol"]
    assert told["name"] == "mine" and told["left_out"] == ["far"] and told["sequence"] == "back"
    assert told["differs"] == ["tint: other colours",
                               "epochs 0.5 was asked for; the protocol has epochs 1"]  # fmt: skip
    assert told["cited"] == [{"source": "a paper", "model": "T5", "averages": {"SeqFT": 18.9}}]
    assert {*record.extra["elsewhere"]} == {"tint", "mood"}
    assert 0 <= record.extra["elsewhere"]["tint"]["question"] <= 1
    out = capsys.readouterr().out
    assert "protocol mine: 2 things differ" in out and "left out: far" in out
    assert "after tint: question 0." in out
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count("18.9") == 1 and "24.9" not in page  # of three tasks, of which two ran
    assert "another model" in page and "other colours" in page and "far" in page
    assert "the best flat rate here" in page and "cited: a paper" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--recipes plain --out x", "one of the arguments --protocol --tasks is required"),
        ("--recipes plain --out x --tasks a --protocol b", "not allowed with argument"),
        ("--recipes plain --out x --protocol standard", "no protocol 'standard'"),
        ("--recipes plain --out x --tasks builtin:intents --only-served", "add --protocol"),
        ("--recipes plain --out x --tasks builtin:intents --data y", "add --protocol"),
    ],
)
def test_protocols_that_cannot_be_meant_are_refused(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["compare", *words.split()])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 2 and says in capsys.readouterr().err


def test_a_large_batch_by_accumulation_looks_ahead_as_a_whole_one_does(
    place: Path, tmp_path: Path
) -> None:
    """`--recipe extrapolation --accumulation N`: the same steps, and others than plain ones."""
    found = {}
    model = models.save_bert(tmp_path / "bert", dropout=0.0)
    for recipe, size, times in (("extrapolation", 4, 2), ("extrapolation", 8, 1), ("plain", 8, 1)):
        out = tmp_path / f"{recipe}-{times}"
        line = ["train", "--task", f"{place}/mood.jsonl", "--recipe", recipe, *SHORT]
        line += ["--model", f"{model}", "--out", f"{out}"]
        line += ["--batch-size", f"{size}", "--accumulation", f"{times}", "--epochs", "3"]
        assert main(line) == 0
        learned = load_file(out / "final" / "model.safetensors")
        # The gradient of keys' biases is 0 but for rounding, of which Adam makes steps.
        found[recipe, times] = {n: w for n, w in learned.items() if "key.bias" not in n}
    split, whole, plain = found.values()
    assert models.distance(split, whole) < 1e-5 < 1e-4 < models.distance(plain, whole)


def test_what_was_skipped_and_mended_is_known_to_the_record_and_to_going_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (place / "mood.jsonl").read_text().splitlines()]
    lines = ["text;label"]
    lines += [f"{row['text']};{' ' * (i % 7 == 0)}{row['label']}" for i, row in enumerate(rows)]
    file = tmp_path / "moods.csv"
    file.write_text("\n".join([*lines, "a film", "a book;", ""]))
    train = ["train", "--task", str(file), "--model", f"{place}/bert", "--out", f"{tmp_path}/a"]
    train += ["--recipe", "plain", *SHORT]
    assert main(train) == 2
    assert f"2 bad rows: line {len(lines) + 1}: 1 cells where" in capsys.readouterr().err
    assert main([*train, "--bad-rows", "skip"]) == 2
    assert "labels in several spellings" in capsys.readouterr().err
    assert main([*train, "--bad-rows", "skip", "--strip"]) == 0
    capsys.readouterr()
    (task,) = json.loads((tmp_path / "a" / "record.json").read_text())["tasks"]
    assert task["source"] == f"{file}?bad_rows=skip&strip=yes"
    assert sum(task["rows"].values()) == len(rows)
    assert [line.removeprefix(f"{file}: ") for line in task["warnings"][:3]] == [
        "no comma in the header line: separated by ';'",
        f"2 bad rows skipped, the first in line {len(lines) + 1}: 1 cells where the header has 2",
        f"{len(rows[::7])} rows with a label mended in blanks or case",
    ]
    go_on = ["sequence", "--from", f"{tmp_path}/a", "--tasks", f"{place}/colour.jsonl"]
    assert main([*go_on, "--out", f"{tmp_path}/b"]) == 0
    file.write_text(file.read_text().replace("a film\n", "a film; good\n"))
    assert main([*go_on, "--out", f"{tmp_path}/c"]) == 2
    assert "its rows changed since it was learned" in capsys.readouterr().err


def answers_of(wrong: str) -> Any:
    """All rows right, but by the run in a folder."""

    def answers(served: Any, task: Any) -> Any:
        truth = [[r.label, r.label] for r in task.evaluation]
        final = Path(wrong) / "final" == served.folder
        return np.array(truth) + np.array([0, -9 * final])

    return answers


def test_from_october_to_a_gate(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task a month later, labels for new rows, a model for others, and a check that can fail."""
    first, then = str(tmp_path / "october"), str(tmp_path / "november")
    settings = ["--model", f"{place}/bert", *SHORT]
    assert main(["sequence", "--tasks", f"{place}/mood.jsonl", "--out", first, *settings]) == 0
    go_on = ["sequence", "--from", first, "--tasks", f"{place}/colour.jsonl", "--out", then]
    assert main([*go_on, "--max-forgetting", "1"]) == 0
    assert "may fall by 1" in capsys.readouterr().out
    assert main(["check", first, then, "--max-forgetting", "1", "--junit", f"{tmp_path}/x"]) == 0
    with pytest.raises(SystemExit) as end:
        main(["check", first, then, "--max-forgetting", "nan"])
    assert end.value.code == 2
    with monkeypatch.context() as patch:  # as if it had said nothing right
        patch.setattr("holdfast.experiments.gate._answers", answers_of(then))
        assert main(["check", first, then]) == 3 and "LOST" in capsys.readouterr().out
        assert main([*go_on, "--max-forgetting", "0.1"]) == 3
    assert main(["check", then, first]) == 2
    assert "no task 'colour'" in capsys.readouterr().err

    rows = tmp_path / "rows.csv"
    rows.write_text("id,body\n7,a good film\n9,a dull book\n")
    predict = ["predict", then, f"{rows}?text=body", "--task", "mood"]
    assert main([*predict, "--keep", "id", "--out", f"{tmp_path}/p.jsonl"]) == 0
    said = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [each["id"] for each in said] == ["7", "9"]
    assert all(each["label"] in each["probabilities"] for each in said)
    assert main([*predict, "--out", f"{tmp_path}/p.csv"]) == 0
    assert (tmp_path / "p.csv").read_text().startswith("label,probability\n")
    assert main([*predict, "--out", f"{tmp_path}/p.txt"]) == 2
    assert main(["predict", then, str(rows), "--task", "mood", "--out", f"{tmp_path}/p.csv"]) == 2
    assert "no column 'text'" in capsys.readouterr().err
    assert main([*predict, "--keep", "label", "--out", f"{tmp_path}/p.csv"]) == 2
    # A run as what changed in the one before serves every task as it does.
    assert main(["delta", "save", first, then, f"{tmp_path}/d.safetensors"]) == 0
    assert main(["delta", "apply", first, f"{tmp_path}/d.safetensors", f"{tmp_path}/again"]) == 0
    again = ["predict", f"{tmp_path}/again", f"{rows}?text=body", "--task", "mood"]
    assert main([*again, "--keep", "id", "--out", f"{tmp_path}/again.jsonl"]) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "p.jsonl").read_text()
    export = ["export", then, "--task", "mood", "--out", f"{tmp_path}/m"]
    assert main(export) == 0 and (tmp_path / "m" / "config.json").is_file()
    assert main(export) == 2
    for card in (tmp_path / "m", Path(then) / "final"):  # its two lines load what lies there
        text = (card / "README.md").read_text(encoding="utf-8")
        found: dict[str, Any] = {}
        exec(text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(card)), found)
        assert ("model" in found) == (card.name == "m")
        assert found.get("served") is None or set(found["served"].tasks) == {"mood", "colour"}
    assert found["served"].models and "mood" in text
    copied = tmp_path / "copied"
    shutil.copytree(Path(then) / "final", copied)
    capsys.readouterr()
    assert main(["export", str(copied), "--task", "mood", "--out", f"{tmp_path}/n"]) == 0
    assert "no README.md" in capsys.readouterr().err
    assert main([*export[:-1], f"{tmp_path}/o", "--license", "A b"]) == 2
    assert not (tmp_path / "o").exists()
    capsys.readouterr()
    (tmp_path / "november" / "record.json").write_text("{")
    assert main(["runs", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "1 of 1" in listed and "not JSON" in listed and " lr " in listed
    assert not list((tmp_path / "november").glob("*.tmp"))
    assert main(["doctor"]) == 0 and "torch" in capsys.readouterr().out


# --- interrupted ----------------------------------------------------------------------------------


def interrupted(
    place: Path, out: Path, words: list[str], number: int = signal.SIGINT
) -> tuple[int, str]:
    process = started(*words, "--model", f"{place}/bert", "--out", str(out), start_new_session=True)
    end = time.monotonic() + 120
    while not list(out.rglob("checkpoint-*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as Ctrl-C does: to all processes of the terminal
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, errors


LONG = ["--epochs", "500", "--batch-size", "2", "--save-steps", "5", "--max-length", "16"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_without_a_traceback(
    number: int, place: Path, tmp_path: Path
) -> None:
    words = ["train", "--task", f"{place}/mood.jsonl", "--recipe", "plain", *LONG]
    code, errors = interrupted(place, tmp_path, words, number)
    assert code == 128 + number
    assert "Traceback" not in errors and "goes on from the last checkpoint" in errors
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_of_a_comparison(place: Path, tmp_path: Path) -> None:
    words = ["compare", "--tasks", f"{place}/mood.jsonl", "--recipes", "plain", "ewc", "--seeds",
             "0", "1", "2", "--workers", "2", *LONG]  # fmt: skip
    code, errors = interrupted(place, tmp_path, words)
    assert code == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("asked", ["{}", "{}?text=body"])
def test_predictions_are_not_written_over_their_rows(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "in.csv"
    rows.write_text("body\na film\n")
    again = tmp_path / "in" / ".." / "in.csv"  # the same file by another path
    (tmp_path / "in").mkdir()
    words = ["predict", str(tmp_path), asked.format(rows), "--task", "mood", "--out", str(again)]
    assert main(words) == 2
    assert "is the file of the rows, which would be lost" in capsys.readouterr().err
    assert rows.read_text() == "body\na film\n"


@pytest.mark.parametrize("name", ["epochs", "batch-size", "accumulation", "train-size", "warmup",
                                  "evaluation-size", "max-length", "save-steps"])  # fmt: skip
def test_numbers_that_nothing_counts_to_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--task", "builtin:sentiment", "--out", str(tmp_path / "run")]
    for value in ("1e308" if name == "epochs" else str(10**30), str(2**31)):
        assert main([*words, f"--{name}", value]) == 2
        assert f"--{name}" in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_not_utf_8_is_refused_up_front(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record could not be written after the training."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9")
    usual = {"task": "builtin:sentiment", "model": "minilm", "out": str(tmp_path / "run")}
    for name in usual:
        given = usual | {name: odd}
        assert main(["train", *(f"--{k}={v}" for k, v in given.items())]) == 2
        said = capsys.readouterr().err
        assert "a name that is not UTF-8; rename it" in said and len(said.splitlines()) == 1
    assert not [*tmp_path.iterdir()]
    with pytest.raises(Refused, match="not UTF-8"), open_run(odd, {}):
        pass
