"""python -m training.report RUN: write RUN/report.html, one page that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from rollout.display import console
from rollout.hydra import run_command
from training.report.page import write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.report", description="A training run as one HTML page.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory; the run may still go on")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; default RUN/report.html")
    arguments = parser.parse_args()
    run_command(lambda: console.print(str(write(arguments.run, arguments.out)), highlight=False))


if __name__ == "__main__":
    main()
