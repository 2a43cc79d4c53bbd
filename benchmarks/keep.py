"""python -m benchmarks.keep NAME [FLAGS]: run a benchmark and keep its last line, with date and commit, in results/.

Figures of a tree with changes that are not committed, before or while it ran, are kept as ``dirty``.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.arms import code, commit, uncommitted

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.keep NAME [FLAGS]")
    name, *flags = sys.argv[1:]
    at, ran, dirty = commit(), code(), bool(uncommitted())
    process = subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}", *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line if line.strip() else last
    status = process.wait()
    try:
        result = json.loads(last)
    except ValueError:
        sys.exit(f"error: benchmark {name} printed no JSON object as its last line; nothing was kept")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    kept = {"date": now, "commit": at, "dirty": dirty or code() != ran, "flags": flags, **result}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    table()
    print(f"kept in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    sys.exit(status)


def table() -> None:
    """Rewrite results/README.md: every kept bar on a line."""
    lines = [
        "# Kept figures",
        "",
        "Written by `python -m benchmarks.keep NAME`. Each file holds the benchmark's last line, its date and commit;",
        "dirty: the tree had changes that were not committed. `gsm8k_tiny` is the summary of the run that it names.",
        "",
        "| benchmark | figure | measured | bar | met | machine | date | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        kept = json.loads(path.read_text())
        for bar in kept["bars"]:
            value, met = kept["figures"][bar["figure"]], "yes" if bar["met"] else "**no**"
            made_by = kept["commit"][:9] + (", dirty" if kept.get("dirty") else "")  # older files do not say
            cells = (kept["benchmark"], bar["figure"], f"{value:.4g}", f"{bar['op']} {bar['bound']:g}", met)
            lines.append(f"| {' | '.join((*cells, kept['machine'], kept['date'][:10], made_by))} |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
