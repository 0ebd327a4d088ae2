"""Try the faults and print what came of each:

    python -m holdfast.testing.faults --group data
    python -m holdfast.testing.faults --only D12,N1 --json faults.json

The exit code is 1 if one was lost, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from holdfast.errors import Refused, nearest
from holdfast.experiments.record import commit, versions
from holdfast.files import write_text_atomic
from holdfast.testing.faults.suite import (
    DOORS,
    GROUPS,
    MEANINGS,
    Outcome,
    by_fault,
    counted,
    run_all,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m holdfast.testing.faults", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--group", choices=[*GROUPS.values()], help="one group of faults (all)")
    parser.add_argument("--only", default="", metavar="D12,…", help="some faults (all)")
    parser.add_argument("--slow", action="store_true", help="those that take minutes too")
    parser.add_argument("--json", metavar="FILE", help="write the outcomes there as well")
    chosen = parser.parse_args(arguments)
    only = [word for word in chosen.only.split(",") if word]
    try:
        if unknown := [word for word in only if word not in MEANINGS]:
            raise Refused(f"no fault {unknown[0]!r}", remedy=nearest(unknown[0], [*MEANINGS]))
        found = run_all(chosen.group, only, slow=chosen.slow, tell=_progress)
        if chosen.json:
            write_text_atomic(Path(chosen.json), _told(found, arguments))
    except Refused as refusal:
        print(f"holdfast.testing.faults: {refusal}", file=sys.stderr)
        return 2
    print(table(found))
    return int(any(each.lost for each in found))


def _told(found: Collection[Outcome], arguments: Sequence[str] | None) -> str:
    """The outcomes as JSON, an outcome a line, with the command that tried them."""
    survived, silent = counted(found)
    words = sys.argv[1:] if arguments is None else arguments
    head = {
        "command": f"python -m holdfast.testing.faults {shlex.join(words)}",
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
        "survived": survived,
        "of": len(by_fault(found)),
        "silent_wrongs": silent,
    }
    each = ",\n".join(json.dumps(asdict(o), ensure_ascii=False) for o in found)
    return f'{json.dumps(head)[:-1]}, "outcomes": [\n{each}\n]}}\n'


def _progress(outcome: Outcome) -> None:
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        print(f"\r{outcome.fault:4} {outcome.door:13}", end="", file=sys.__stderr__, flush=True)


def table(found: Collection[Outcome]) -> str:
    """Fault × door, each loss and each reason for not trying in a line, and the count."""
    width = max(map(len, MEANINGS.values()))
    lines = [f"{'':5}{'':{width}}  " + "".join(f"{door:14}" for door in DOORS)]
    rows = by_fault(found)
    for fault, row in rows.items():
        cells = [f"{row[door].came if door in row else '·':14}" for door in DOORS]
        lines.append(f"{fault:5}{MEANINGS[fault]:{width}}  {''.join(cells)}".rstrip())
    lost = [o for o in found if o.lost]
    lines += [f"\n{len(lost)} lost:" if lost else "\nnone lost"]
    lines += [f"{o.fault:5}{o.door}: {o.came}: {o.why}" for o in lost]
    reasons: dict[str, list[str]] = {}
    for fault, row in rows.items():
        for outcome in row.values():
            if outcome.came == "not tried":
                reasons.setdefault(outcome.why, []).append(fault)
    lines += ["\nnot tried here:"] if reasons else []
    lines += [f"  {', '.join(dict.fromkeys(faults))}: {why}" for why, faults in reasons.items()]
    survived, silent = counted(found)
    of = len(MEANINGS) if rows.keys() == MEANINGS.keys() else len(rows)
    lines.append(f"\n{survived} of {of} survived, silent wrongs {silent}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
