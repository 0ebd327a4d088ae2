"""`holdfast doctor`: what this machine gives holdfast to work with, and what could be better."""

from __future__ import annotations

import argparse

ABOUT = "tell versions, device, threads and precision, and what slows them down"
EXAMPLE = "holdfast doctor"
RESUMES = False


def options(_: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(_: argparse.Namespace) -> None:
    from holdfast.experiments.doctor import machine

    for line in machine():
        print(line)
