"""`holdfast delta`: what changed between a base model and a fine-tuned one, as one small file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.training.delta import Size

ABOUT = "keep a fine-tuned model as what changed in its base: one file that serves both ways"
EXAMPLES = {
    "save": "minilm runs/a trec6.safetensors",
    "apply": "minilm trec6.safetensors models/trec6",
    "revert": "models/trec6 trec6.safetensors models/base",
    "merge": "minilm trec6.safetensors sst2.safetensors both.safetensors",
}
EXAMPLE = f"holdfast delta save {EXAMPLES['save']}"
RESUMES = False
RULES = ("refuse", "sum", "mean", "last")
MODEL = "a saved model's folder, a run's, or minilm"


def options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, about: str, *words: tuple[str, str]) -> argparse.ArgumentParser:
        made = actions.add_parser(
            name, allow_abbrev=False, help=about, description=about[0].upper() + about[1:] + ".",
            epilog=f"example:\n  holdfast delta {name} {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        for word, help in words:
            made.add_argument(word.lower(), metavar=word, help=help)
        return made

    file, out = ("FILE", "a delta file"), ("OUT", "a new folder")
    action("save", "write what changed from BASE to TUNED to FILE",
           ("BASE", MODEL), ("TUNED", MODEL), ("FILE", "a .safetensors file"))  # fmt: skip
    action(
        "apply", "make the tuned model of its base, exact to the bit", ("BASE", MODEL), file, out
    )
    action("revert", "make the base of the tuned model, exact to the bit", ("TUNED", MODEL), file,
           out)  # fmt: skip
    merge = action("merge", "make one delta of several of one base", ("BASE", MODEL))
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE", help="delta files")
    merge.add_argument("out", type=Path, metavar="OUT", help="a new file")
    merge.add_argument("--on-conflict", choices=RULES, default="refuse",
                       help="where files move an entry to different values (refuse)")  # fmt: skip


def run(chosen: argparse.Namespace) -> None:
    from holdfast.training import delta

    if chosen.action == "save":
        file = Path(chosen.file)
        print(told(file, delta.save(_folder(chosen.base), _folder(chosen.tuned), file)))
    elif chosen.action == "apply":
        delta.apply(_folder(chosen.base), Path(chosen.file), Path(chosen.out))
        print(chosen.out)
    elif chosen.action == "revert":
        delta.revert(_folder(chosen.tuned), Path(chosen.file), Path(chosen.out))
        print(chosen.out)
    else:
        size = delta.merge(_folder(chosen.base), chosen.files, chosen.out,
                           on_conflict=chosen.on_conflict)  # fmt: skip
        print(told(chosen.out, size))


def told(file: Path, size: Size) -> str:
    """How small a delta file is, in one line."""
    share, part = size.moved / max(size.entries, 1), size.file / max(size.model, 1)
    return (f"{file}: {size.moved:,} of {size.entries:,} weights changed ({share:.2%}), "
            f"{size.whole} tensors held whole; {size.file:,} bytes, {part:.2%} of the model's "
            f"{size.model:,}")  # fmt: skip


def _folder(model: str) -> Path:
    """Where a model lies: of a run, what it left to be used."""
    from holdfast.experiments.runs import FINAL
    from holdfast.tasks.kinds.pretrained import locate

    folder = Path(locate(model) if model == "minilm" else model)
    return folder / FINAL if (folder / FINAL).is_dir() else folder
