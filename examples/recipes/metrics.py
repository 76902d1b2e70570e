"""What a run has logged: one JSON object a line, of which a killed run may leave the last half."""

import json
import warnings
from os import PathLike
from pathlib import Path
from typing import Any


def read_metrics(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, none if the file is missing.

    A line that is not whole is left out, with a warning unless it is the last.
    """
    if not Path(path).exists():
        return []
    texts = Path(path).read_text("utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, KeyError, TypeError):
            if text.strip() and number < len(texts):
                warnings.warn(f"{path}, line {number} is not whole: left out.", stacklevel=2)
    return lines


def by_name(lines: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Sort numbers by name and step; what is under "val" counts as if it stood beside.

    If a step comes twice, as in a run that was killed and resumed, the later line holds.
    """
    metrics: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in {**line, **line.get("val", {})}.items():
            if isinstance(value, int | float) and name != "step":
                metrics.setdefault(name, {})[line["step"]] = float(value)
    return {name: dict(sorted(values.items())) for name, values in metrics.items()}
