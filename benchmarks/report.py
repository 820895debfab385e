"""Tables and plots of stored results: what `python -m benchmarks` writes beside its JSON."""

import io
import os
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.rows import FULL, LOCAL, exponent

# How a quantity and its limit are said to the maintainers, in the terms of the bar.
QUANTITIES = {
    "time": ("{:.2f} of its time", "≤ {:.3g}"),
    "speed": ("{:.1f} times as fast", "≥ {:.3g}"),
    "peak memory": ("{:.2f} of its peak memory", "≤ {:.3g}"),
    "gigabytes": ("{:.1f} GB for the whole process", "≤ {:.3g} GB"),
    "exponent of time": ("time ~ n^{:.2f}", "≤ {:.3g}"),
    "exponent of memory": ("memory ~ n^{:.2f}", "≤ {:.3g}"),
    "share": ("{:.0%} of its rate", "≥ {:.0%}"),
}
# The comparisons of the page: a title, what is said of them, and how the names of their rows start.
# A row is in the last section whose text its name starts with.
SECTIONS = [
    ("Attention", "On tensors that are projected already, `(1, n, 8, 64)`.", [""]),
    (
        "Layers",
        "With the projections of queries, keys, values and output.",
        ["layer", "Longformer"],
    ),
    (
        "Short sequences",
        "At 128 positions a pattern saves nothing: this shows the overhead beside dense attention.",
        ["short"],
    ),
    (
        "Memory of long sequences",
        "The most memory that the process had at any time, with Python and the framework.",
        ["memory"],
    ),
    (
        "Share of the arithmetic peak",
        "Operations on allowed pairs in a second, beside those of a large matrix product in one.",
        ["share"],
    ),
    (
        "Tile widths",
        "The tiles that a plan chooses, beside tiles half and twice as wide.",
        ["tiles"],
    ),
    ("Growth", "", ["growth"]),
]
# What is plotted: its key in a measurement, and its unit.
PLOTS = {"time": ("seconds", 1e3, "milliseconds"), "memory": ("above", 1e-6, "MB above the start")}
# Okabe and Ito's colours, which the colour-blind can tell apart; grey for the yellow, too pale.
COLOURS = ["#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#777777"]
MARKERS = "osD^v*XP"


def write(results, path):
    """Write the page and the plots of results beside their JSON file; return the paths."""
    images = {what: path.with_name(f"{path.stem}-{what}.svg") for what in PLOTS}
    for what, image in images.items():
        write_whole(image, plot(results, what))
    page = path.with_suffix(".md")
    write_whole(page, markdown(results, {what: image.name for what, image in images.items()}))
    return [page, *images.values()]


def write_whole(path, text):
    """Write a file, or leave what was there: never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"dir": path.parent, "delete": False, "encoding": "utf-8"}
    with tempfile.NamedTemporaryFile("w", **options) as part:
        part.write(text)
    Path(part.name).chmod(0o644)
    os.replace(part.name, path)


def reached(bar):
    """Whether a stored bar is reached, or `None` if it has no limit or no value."""
    if bar["limit"] is None or bar["value"] is None:
        return None
    at_least = QUANTITIES[bar["quantity"]][1].startswith("≥")
    return bar["value"] >= bar["limit"] if at_least else bar["value"] <= bar["limit"]


def claims(name, row):
    """What a row says, a tuple of str for each bar: contender, peer, measured, bar, reached."""
    for bar in row["bars"]:
        measured, limit = QUANTITIES[bar["quantity"]]
        yield (
            *_contender_and_peer(name, row, bar),
            "failed" if bar["value"] is None else measured.format(bar["value"]),
            "" if bar["limit"] is None else limit.format(bar["limit"]),
            {True: "yes", False: "no", None: ""}[reached(bar)],
        )


def _contender_and_peer(name, row, bar):
    peer = "" if bar["against"] is None else _label(name, row, bar["against"])
    return _label(name, row, bar["of"]), peer


def result(bar):
    """What was measured, as the page says it: times are all said as speeds."""
    value = bar["value"]
    if value is None:
        return "failed"
    if bar["quantity"] not in ("time", "speed"):
        return QUANTITIES[bar["quantity"]][0].format(value)
    speed = 1 / value if bar["quantity"] == "time" else value
    digits = 2 if round(speed, 2) < 1 else 1 if speed < 10 else 0
    return f"{speed:.{digits}f} times as fast"


def _label(name, row, index):
    """A contender as its row calls it, with what the row's name leaves open."""
    jobs = [m["job"] for m in row["measurements"]]
    job = jobs[index]
    parts = [job["contender"]]
    if job["pattern"] not in name and not job["contender"].startswith("GEMM"):
        parts.append(job["pattern"])
    if len({j["dtype"] for j in jobs}) > 1:
        parts.append(job["dtype"])
    return ", ".join(parts)


def summary(results):
    """What was reached of the bars, for the maintainers: a Markdown table, a str."""
    lines = [
        (name, *claim)
        for name, row in results["rows"].items()
        for claim in claims(name, row)
        if claim[3]
    ]
    return _table(["work", "contender", "against", "measured", "bar", "reached"], lines)


def comparisons(rows):
    """The ratios of some rows as a Markdown table, a str."""
    lines = []
    for name, row in rows.items():
        for bar in row["bars"]:
            contender, peer = _contender_and_peer(name, row, bar)
            lines.append((name, contender, result(bar), peer))
    columns = 4 if any(line[3] for line in lines) else 3
    head = ["work", "contender", "result", "compared with"]
    return _table(head[:columns], [line[:columns] for line in lines])


def _table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "".join(
        f"| {' | '.join(str(x).replace('|', chr(92) + '|') for x in row)} |\n" for row in rows
    )


def markdown(results, images):
    """The page: a str. `images` has the file names of the plots of time and memory."""
    parts = [
        f"# {results['title']}",
        "Each table says how a contender compares with another one at the same work. In the names "
        "of the work, n is the number of positions, and a pattern is written as in Python: "
        "`Local(256)` is a window of 256 positions on each side. The contenders are described "
        "[below](#contenders).",
        "## How it was measured",
        "Batch 1, 8 heads of 64 features, float32 unless it says otherwise. Training is a forward "
        "pass and the gradients of all inputs and weights, without an optimizer. The contenders "
        "of a row take turns, each in a process of its own and on the same inputs; its time is "
        "the median over the turns. Before that, its results are compared with a float64 "
        f"reference. `{results['command']}` measures all of it and writes this page.",
        "Under each table all measurements can be unfolded. There ms is milliseconds of a call; "
        "GFLOP/s counts operations on allowed pairs, where training counts as 3.5 forward passes; "
        "peak MB is the most memory of the whole process (on a GPU: of the GPU), and above is "
        "what of it came after its start; error is the largest error of a row of the result, "
        "relative to a typical row.",
    ]
    for title, text, _ in SECTIONS:
        rows = {name: row for name, row in results["rows"].items() if section(name) == title}
        if title == "Growth":
            parts += [f"## {title}", *growth(results, images)]
        elif rows:
            parts += [f"## {title}", text, comparisons(rows)]
        if rows:
            parts += measured(rows)
    parts += [
        "## Contenders",
        _contenders(results["rows"]),
        "## Machine and versions",
        _machines(results["rows"]),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def section(name):
    """The title of the section of a row."""
    titles = [title for title, _, starts in SECTIONS if name.startswith(tuple(starts))]
    return titles[-1]


def growth(results, images):
    """What is said of the growth with the length: a list of str."""
    return [
        f"Of `{LOCAL}` where nothing else is said. Memory is what a process takes above what it "
        "had before its first call; that includes what compiling takes. A slope is the exponent "
        "of n: 1 is linear and 2 is quadratic. A curve ends where the memory of the machine does, "
        "or where a call takes too long. Points of long sequences are medians of three turns only.",
        *[f"![{what} against n]({image})" for what, image in images.items()],
        slopes(results),
    ]


def measured(rows):
    """What was measured in some rows, folded away: a list of str."""
    return [
        "<details>\n<summary>All measurements of this section</summary>",
        *[f"**{name}**\n\n{_measurements(name, row)}" for name, row in rows.items()],
        "</details>",
    ]


def _measurements(name, row):
    head = ["contender", "n", "ms", "GFLOP/s", "peak MB", "above", "error"]
    lines = []
    for i, m in enumerate(row["measurements"]):
        first = (_label(name, row, i), m["job"]["n"])
        if "failed" in m:
            lines.append((*first, f"failed: {m['failed']}", "", "", "", ""))
            continue
        rate = f"{m['flops'] / m['seconds'] / 1e9:.0f}" if m["flops"] else ""
        memory = [f"{m[key] / 1e6:.0f}" for key in ("peak", "above")]
        error = f"{max(m['errors'].values()):.0e}"
        time = 1e3 * m["seconds"]
        lines.append(
            (*first, f"{time:.0f}" if time >= 100 else f"{time:.3g}", rate, *memory, error)
        )
    return _table(head, lines)


def _contenders(rows):
    used = {m["job"]["contender"] for row in rows.values() for m in row["measurements"]}
    return _table(["name", "is"], [(x, CONTENDERS[x].about) for x in CONTENDERS if x in used])


def _machines(rows):
    groups = defaultdict(list)
    for name, row in rows.items():
        known = [", ".join(f"{k} {v}" for k, v in row[x].items()) for x in ("machine", "versions")]
        groups[*known].append(name)
    lines = []
    for known, names in groups.items():
        dates = [rows[name]["date"] for name in names]
        when = " to ".join(dict.fromkeys([min(dates), max(dates)]))
        where = "" if len(groups) == 1 else f" Rows: {'; '.join(names)}"
        lines.append(f"- {when}: {'; '.join(known)}.{where}")
    return "\n".join(lines)


def curves(results):
    """Measurements of the growth, by length: a dict by (label, task)."""
    found = defaultdict(list)
    for row in results["rows"].values():
        for m in row["measurements"] if row["curve"] else []:
            job = m["job"]
            if "failed" not in m and m["above"] > 0:
                pattern = {LOCAL: "", FULL: ", dense"}.get(job["pattern"], f", {job['pattern']}")
                found[job["contender"] + pattern, job["task"]].append(m)
    return {key: sorted(points, key=lambda m: m["job"]["n"]) for key, points in found.items()}


def _slope(points, key):
    """The exponent of a curve, as a str."""
    found = exponent([m["job"]["n"] for m in points], [m[key] for m in points])
    return "-" if found is None else f"{found:.2f}"


def slopes(results):
    lines = [
        (*about, _slope(points, "seconds"), _slope(points, "above"))
        for about, points in sorted(curves(results).items())
    ]
    return _table(["contender", "task", "slope of time", "slope of memory"], lines)


def plot(results, what):
    """Time or memory against n, forward above training: a str, an SVG document.

    It is narrow, so that it can be read on a phone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    key, scale, unit = PLOTS[what]
    found = curves(results)
    labels = sorted({label for label, _ in found}, key=lambda x: (not _is_ours(x), x))
    with matplotlib.rc_context({"svg.hashsalt": "sparse_attn", "font.size": 12}):
        figure = Figure(figsize=(5.6, 11), layout="constrained")
        for axis, task in zip(figure.subplots(2, 1), ("forward", "training"), strict=True):
            ticks = sorted({m["job"]["n"] for (_, t), points in found.items() for m in points})
            for i, label in enumerate(labels):
                if points := found.get((label, task)):
                    axis.loglog(
                        [m["job"]["n"] for m in points],
                        [m[key] * scale for m in points],
                        color=COLOURS[i % len(COLOURS)],
                        marker=MARKERS[i % len(MARKERS)],
                        linestyle="-" if _is_ours(label) else "--",
                        label=f"{label}, slope {_slope(points, key)}",
                    )
            axis.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else n for n in ticks])
            axis.set_xticks([], minor=True)
            axis.set(title=task, xlabel="n", ylabel=unit)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _is_ours(label):
    return label.startswith("sparse_attn")
