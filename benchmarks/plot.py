"""Plot the runs stored by `benchmarks.against`: one SVG for each set, in ``benchmarks/plots/``.

uv run --no-project --with matplotlib python -m benchmarks.plot
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

HOME = Path(__file__).parent
PANELS = (("wall", "wall time / ours"), ("cpu", "CPU time / ours"), ("peak", "memory / ours"))
SETS = {
    "even": "10 files of the same size, 28 columns",
    "skewed": "one file has half the rows",
    "tiny": "500 rows a file",
    "mixed": "texts, dates and nested columns pass through",
    "wide": "2,000 columns",
}


def ratios(runs: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """Return the median of each contender over the median of ours."""
    ours = median(run[key] for run in runs["ours"])
    return {name: median(run[key] for run in some) / ours for name, some in runs.items()}


def draw(kind: str, runs: dict[str, list[dict[str, float]]], pyplot: Any) -> Path:
    """Draw one plot, with the fastest contender on top. Return its path."""
    order = sorted(runs, key=lambda name: -ratios(runs, "wall")[name])
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 0.9 + 0.32 * len(order)), sharey=True)
    for axes, (key, title) in zip(panels, PANELS, strict=True):
        found = ratios(runs, key)
        colors = ["#d95f02" if name == "ours" else "#8da0cb" for name in order]
        bars = axes.barh(order, [found[name] for name in order], color=colors)
        axes.bar_label(bars, labels=[f"{found[name]:.2f}" for name in order], padding=3, fontsize=8)
        axes.axvline(1.0, color="#555555", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.18)
        axes.tick_params(labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(kind + "".join(f" · {text}" for name, text in SETS.items() if kind.startswith(name)), fontsize=11)
    figure.tight_layout()
    suffix = "-first" if kind.endswith("first job") else ""
    out = HOME / "plots" / f"{kind.split(',', maxsplit=1)[0]}-{kind.split()[1]}M{suffix}.svg"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
    return out


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    for kind, runs in json.loads((HOME / "against.json").read_text())["sets"].items():
        print(draw(kind, runs, pyplot).relative_to(HOME.parent))


if __name__ == "__main__":
    main()
