"""From a run's record to one HTML page, everything inline. Texts of episodes are data here, never markup or code."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rollout.errors import UserError
from training.dotted_names import dotted
from training.report.charts import LEARNING, SPEED, drawn
from training.report.record import Row, RunRecord, read
from training.timing import PARTS

HERE = Path(__file__).parent
MOST_POINTS = 1200  # of a curve: more are means of neighbours
MOST_EPISODE_BYTES = 6_000_000  # more steps than fit are left out evenly
PART_NOTES = {
    "sync": "weights to the engine, and the probe",
    "generate": "the model wrote for at least one episode",
    "tools": "tools ran and the model wrote for nobody",
    "reward": "verifiers and reward functions, while neither went on",
    "wait": "the trainer waited for rollouts beyond these; with max_staleness: all that it waited",
    "anchor": "the trainer's own log-probs before the first update",
    "critic": "forward, backward and update of the value model",
    "train": "forward, backward and update of the policy",
    "warm_up": "rounds that trained the value model alone",
    "other": "packing, advantages, checkpoints",
}


def write(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run to ``out``, whole or not at all, and give its place. Raises UserError."""
    text = render(read(run))
    target = out or run / "report.html"
    scratch = target.with_name(target.name + ".tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {error.strerror}; free its place, or give another by --out") from error
    return target


def render(record: RunRecord) -> str:
    """The page's HTML."""
    known = {key for row in record.metrics for key, value in row.items() if _finite(value)}
    learning, speed = drawn(LEARNING, known), drawn(SPEED, known)
    episodes, shown = _episodes(record.episodes)
    data = {
        "metrics": _columns(record.metrics),
        "charts": {"learning": learning, "speed": speed},
        "parts": [part for part in PARTS if f"time/{part}" in known],
        "evaluations": _points(record.evaluations),
        "episodes": episodes,
    }
    script = "\n".join((HERE / name).read_text() for name in ("charts.js", "viewer.js"))
    style = (HERE / "page.css").read_text()
    # Text that found a way into the markup could still not run: only this script may, and nothing may be fetched.
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return jinja.get_template("page.html.jinja").render(
        record=record,
        policy=policy,
        script=script,
        style=style,
        data=embedded(data),
        state=_state(record),
        headline=_headline(record),
        summary=list(dotted(record.summary).items()),
        times=_times(record.metrics),
        evaluations=record.evaluations,
        difficulties=_difficulties(record.evaluations),
        episodes_shown=shown,
    )


def embedded(data: Any) -> str:
    """JSON that may stand inside of a script element whatever its strings say; numbers that are not finite are null."""
    text = json.dumps(_plain(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _state(record: RunRecord) -> str:
    last, planned = record.metrics[-1]["step"], record.config.get("steps")
    if record.summary and (planned is None or last >= planned):
        return f"{last} steps, finished"
    return f"step {last}" + (f" of {planned}" if planned else "") + ", still running or stopped"


def _headline(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, figure, remark."""
    found = []
    ends = [e for e in record.evaluations if "sampled" in e]
    for mode in ("sampled", "greedy"):
        values = [e[mode]["accuracy"] for e in ends if mode in e]
        if len(values) > 1:
            found.append((f"accuracy, {mode}", f"{values[0]:.3f} → {values[-1]:.3f}", "unseen, first → last"))
        elif values:
            found.append((f"accuracy, {mode}", f"{values[0]:.3f}", f"unseen, step {ends[0]['step']}"))
    rewards = [row["reward"] for row in record.metrics if _finite(row.get("reward"))]
    if rewards:
        found.append(("reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}", "rollouts, first → last"))
    steps = [row["time/step"] for row in record.metrics if _finite(row.get("time/step"))]
    if steps:
        found.append(("seconds a step", f"{sum(steps) / len(steps):.2f}", f"mean of {len(steps)}"))
    if "seconds_total" in record.summary:
        found.append(("seconds in all", f"{record.summary['seconds_total']:,.0f}", "the whole command"))
    return found


def _times(metrics: list[Row]) -> list[tuple[str, str, float, float]]:
    """Part of a step, what it is, seconds over the run, share."""
    seconds = {part: sum(row.get(f"time/{part}", 0.0) for row in metrics) for part in PARTS}
    total = sum(seconds.values()) or 1.0
    return [(part, PART_NOTES[part], spent, spent / total) for part, spent in seconds.items() if spent > 0]


def _difficulties(evaluations: list[Row]) -> list[tuple[str, Row | None, Row]]:
    """By difficulty the sampled figures before and after: of the first evaluation and the last."""
    found = [e["sampled"]["by_difficulty"] for e in evaluations if "by_difficulty" in e.get("sampled", {})]
    if not found:
        return []
    return [(name, found[0].get(name) if len(found) > 1 else None, last) for name, last in found[-1].items()]


def _points(evaluations: list[Row]) -> list[Row]:
    return [
        {"step": e["step"], "mode": mode, **{k: e[mode][k] for k in ("accuracy", "accuracy_low", "accuracy_high")}}
        for mode in ("sampled", "greedy")
        for e in evaluations
        if mode in e
    ]


def _columns(metrics: list[Row]) -> dict[str, list[Any]]:
    """By metric one value a step, null where it has none; of many steps the means of neighbours."""
    size = -(-len(metrics) // MOST_POINTS)
    bins = [metrics[i : i + size] for i in range(0, len(metrics), size)]
    keys = dict.fromkeys(key for row in metrics for key, value in row.items() if _finite(value))
    columns: dict[str, list[Any]] = {}
    for key in keys:
        values = [[row[key] for row in part if _finite(row.get(key))] for part in bins]
        columns[key] = [float(f"{sum(v) / len(v):.6g}") if v else None for v in values]
    columns["step"] = [part[-1]["step"] for part in bins]
    return columns


def _episodes(rows: list[Row]) -> tuple[list[Row], str]:
    """Those that the page holds, and what to say of the others."""
    steps = sorted({row["step"] for row in rows})
    share = MOST_EPISODE_BYTES / max(sum(len(json.dumps(row)) for row in rows), 1)
    if share >= 1:
        return rows, ""
    few = max(2, int(len(steps) * share))
    kept = {steps[round(i * (len(steps) - 1) / (few - 1))] for i in range(few)}
    return [row for row in rows if row["step"] in kept], f"{len(kept)} of {len(steps)} logged steps, evenly chosen"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
