"""Draws assets/bench-*.svg, the plots of docs/results.md; called by bench.py --report. Needs matplotlib."""
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

# mid-grey and Okabe and Ito's colours (jfly.uni-koeln.de/color) can be read on white and on black
GREY, COLOURS = "#808080", ("#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#E69F00", "#F0E442")
PHASES = {  # what ends at the kernel's marks 1.. and at the next layer's first mark, and its colour
    "S0 x, S1 LayerNorm": "#808080", "S2 q, k, v rows": "#0072B2", "S8 units, wait for (1)": "#56B4E9",
    "S3-S5 rope, append, attend": "#D55E00", "S8 units, wait for (2)": "#56B4E9",
    "S6, S7 out rows": "#E69F00", "S8 units": "#009E73", "S9 sum, wait for (3)": "#CC79A7",
    "S9 add to x": "#F0E442", "wait for (4)": "#80808040"}


def draw(name, data, sizes, baselines):
    """Draws a GPU's record `data`, results/<name>.json; returns [(title, path)].

    `sizes` {model: bytes of a token} places models on an axis. A plot is a layer's timeline, or ms a token of
    fused and of `baselines`, by model size, or of fused by tokens cached.
    """
    images = []
    rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "legend.frameon": False,
        "savefig.transparent": True, "axes.spines.top": False, "axes.spines.right": False, **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)})
    styles = {"floor": {"color": GREY, "linestyle": "--", "label": "floor"}}
    for what, colour in zip(("greedy", *baselines), COLOURS, strict=True):
        label = "fused" if what == "greedy" else what
        styles[what] = {"color": colour, "marker": "o", "markersize": 4, "label": label}

    def save(ax, title, part, xlabel):
        images.append((title, f"assets/{name}-{part}.svg"))
        ax.set(xlabel=f"{xlabel}; {data['gpu']}")
        ax.figure.savefig(Path(__file__).with_name(f"{name}-{part}.svg"), metadata={"Date": None},
                          bbox_inches="tight")

    curves = {}  # {(what, model): {tokens cached: ms a token}}
    for row in data["rows"].values():
        what, model, cached = row["what"], row["model"], row["context"]
        if row["kind"] == "timeline" and "marks_us" in row:
            save(draw_layer(row), f"One layer of {model}, thread block by thread block", f"timeline-{model}",
                 f"us since the layer's start; {model}, {cached} tokens cached")
        if row["kind"] == "step" and what in styles and "us" in row:
            if what == "greedy":
                curves.setdefault(("floor", model), {})[cached] = row["floor_us"] / 1e3
            curves.setdefault((what, model), {})[cached] = median(row["us"]) / 1e3
    few, *more = sorted({cached for curve in curves.values() for cached in curve}) or [0]
    if not more:  # too little for a plot
        return images
    size, context = (Figure(figsize=(8, 4.8)).gca() for _ in range(2))
    for ax in (size, context):
        ax.set(ylabel="ms a token", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(color=GREY, alpha=0.25, linewidth=0.6)
    for what, style in styles.items():  # of no points, plot() makes no line, nor does the legend
        size.plot(*zip(*sorted((sizes[model], curve[few]) for (of, model), curve in curves.items()
                               if of == what and few in curve)), **style)
    ticks = {sizes[model]: model.removeprefix("pythia-") for _, model in curves}
    size.set(xscale="log")
    size.set_xticks([], minor=True)
    size.set_xticks(list(ticks), ticks.values())
    size.legend()
    for (what, model), curve in curves.items():
        if what in ("floor", "greedy"):
            context.plot(*zip(*sorted(curve.items())), **styles[what])
        if what == "greedy":
            context.annotate(model.removeprefix("pythia-"), max(curve.items()), (6, 0), va="center", size=9,
                             textcoords="offset points")
    save(size, "Time a token against model size", "size", f"model, {few} tokens cached")
    save(context, "Time a token against tokens cached", "context",
         "tokens cached (solid: fused, dashed: floor)")
    return images


def draw_layer(row):
    """Axes with one layer, a line a thread block."""
    ax, marks = Figure(figsize=(8, 5.6)).gca(), np.array(row["marks_us"])
    ends = np.c_[marks[:, 1:], marks[:, 0] + row["layer_us"]]
    for (phase, colour), begin, end in zip(PHASES.items(), marks.T, ends.T):
        ax.fill_betweenx(range(len(marks) + 1), np.r_[begin, begin[-1]], np.r_[end, end[-1]], step="post",
                         color=colour, linewidth=0, label=phase)
    ax.set(ylabel=f"thread block (those before {row['with_head']} have a head)", ylim=(len(marks), -1))
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9)
    return ax
