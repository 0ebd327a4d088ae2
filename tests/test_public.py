"""The public face: names that resolve, and an import that costs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import models
import pytest

import holdfast
from holdfast.methods import METHODS

ROOT = Path(__file__).parents[1]


def fresh(code: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_holdfast_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'pyarrow', 'matplotlib'}"
    assert fresh(f"import sys, holdfast; print(sorted({heavy} & sys.modules.keys()))") == "[]"


def test_reports_and_records_leave_torch_unloaded() -> None:
    code = "import sys, holdfast as h; h.write_report; h.Record; print('torch' in sys.modules)"
    assert fresh(code) == "False"


def test_every_public_name_resolves() -> None:
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None
    assert set(holdfast.__all__) <= set(dir(holdfast))
    with pytest.raises(AttributeError, match="no attribute 'Recipes'"):
        holdfast.Recipes  # noqa: B018


def test_the_public_names_are_these() -> None:
    """Others script against them: a change here is a change of the public face."""
    methods = [made.__name__ for made in METHODS.values()]
    known = "DPS EWC GPM KfacEWC KLAnchor L2SP LwF Merge Replay WiSE"
    assert {*known.split()} <= {*methods}
    assert sorted(holdfast.__all__) == sorted([
        "__version__", "parts", "Parts", "Rates", "Recipe", "Bound", "Method", "View",
        "Range", *methods, "HeadFirst", "HeadLast", "LoRA", "PEFT", "Refused", "with_recipe",
        "RecipeCallback", "Trainer",
        "Task", "load_task", "run_sequence", "load", "compare", "Record", "write_report",
    ])  # fmt: skip


@pytest.mark.parametrize("first", [
    "import holdfast", "from holdfast.recipe import Recipe", "import holdfast.network.parts",
    "from holdfast.network.parts import Parts", "import holdfast; holdfast.Recipe",
])  # fmt: skip
def test_parts_is_a_function_whatever_was_imported_before(first: str) -> None:
    """The submodule of the same name stands in the way of the function."""
    code = f"{first}\nimport holdfast, torch\nprint(holdfast.parts(torch.nn.Linear(1, 1)).order)"
    assert fresh(code) == "('head',)"


def test_compare_is_a_function_whatever_was_imported_before() -> None:
    code = "import holdfast.experiments.compare, holdfast; print(callable(holdfast.compare))"
    assert fresh(code) == "True"


def test_the_plain_loop_of_the_design_runs(tmp_path: Path) -> None:
    import torch

    recipe = holdfast.Recipe(
        rates=holdfast.Rates.bertcl(),
        methods=[holdfast.DPS(drop=0.3, stage=0.05), holdfast.EWC(strength=1e3)],
        max_grad_norm=1.0,
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert holdfast.Recipe.load(tmp_path / "recipe.yaml") == recipe
    model = recipe.prepare(models.bert())
    optimizer = torch.optim.AdamW(
        recipe.param_groups(model, lr=2e-5, weight_decay=0.01), fused=True
    )
    bound = recipe.bind(model, optimizer, total_steps=3)
    batch = models.collate(models.rows(4))
    for _ in range(3):
        out = model(**batch)
        (out.loss + bound.penalty(batch, out)).backward()
        optimizer.step()
        optimizer.zero_grad()
    bound.end_task([batch])
    assert bound.finished == ["task"] and bound.step == 3
    assert bound.state_dict()["meta"]["step"] == 3
    bound.unbind()


def test_a_refusal_is_a_value_error_of_one_line() -> None:
    error = holdfast.Refused("is wrong", where="here", remedy="mend it")
    assert isinstance(error, ValueError) and str(error) == "here: is wrong; mend it"


def test_the_lock_holds_what_is_tested_by_hashes() -> None:
    """Each pin of constraints.txt, each dependency that `make test` installs, nothing unhashed."""
    import tomllib

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    def pins(file: str) -> dict[str, str]:
        text = (ROOT / file).read_text(encoding="utf-8")
        found = re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.M)
        return {plain(name): version for name, version in found}

    locked = pins("requirements.lock")
    assert pins("constraints.txt").items() <= locked.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {
        plain(re.split(r"[\[>=]", line)[0])
        for extra in ("demo", "search", "slurm", "dev")
        for line in [*project["dependencies"], *project["optional-dependencies"][extra]]
    }
    assert wanted - {"holdfast"} <= locked.keys()
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"[\w.-]+==", line):
            assert line.endswith(" \\") and re.match(r"    --hash=sha256:[0-9a-f]{64}\b", after), (
                line
            )
