"""Draw the pictures of README, gallery and reference: `python docs/make_pictures.py`."""

from html import escape
from pathlib import Path

from sparse_attn import parse_pattern

HERE = Path(__file__).parent
# The cover: in each row patterns, and the lines of a caption.
COVER = [
    [["Causal()"], ["Local(6)"], ["Atrous(4)"]],
    [["Causal() &", "Strided(8)"], ["Causal() &", "(Local(4) |", " Prefix(2))"], ["Blocks(8)"]],
]
POSITIONS = 48
# An example of each pattern, and at how many positions it is drawn.
EXAMPLES = {
    "Full()": 48,
    "Causal()": 48,
    "Local(6)": 48,
    "Atrous(4)": 48,
    "Strided(8)": 48,
    "Dilated(4, 3)": 48,
    "Blocks(8)": 48,
    "Fixed(8, 2)": 48,
    "Prefix(4)": 48,
    "Global((0, 20, 21))": 48,
    "Random(48, 4, 3)": 48,
    "Neighborhood((7, 7), 1)": 49,
    "Axial((7, 7))": 49,
    "Band(12, -3, 3)": 48,
    "Grid((6,), (Band(1, 0), Band(2, 2)))": 48,
    "PerHead([Local(6), Atrous(4)])": 48,
    "Longformer(4, 2)": 48,
    "BigBird(48, 4, 2)": 48,
    "StreamingLLM(8, 3)": 48,
    "PrefixLM(12)": 48,
    "SparseTransformer(8)": 48,
}
COMBINED = {
    "Causal() & (Local(4) | Atrous(8))": 48,
    "Causal() & Fixed(8)": 48,
    "Causal() & Neighborhood((7, 7), 2)": 49,
    "~Local(6)": 48,
    "Local((12, 0)) & ~Atrous(2)": 48,
    "Blocks(8, reach=1) | Global(2)": 48,
}
COLUMNS = 3  # of the gallery, where a page does not lay it out anew
SIDE = 192  # of one pattern's own SVG, at 48 positions
# Of the cover, in its own units. At 343 pixels across, what a phone has, captions are 11 high.
GAP, FONT, LINE = 16, 20, 24


def files():
    """What is drawn: a dict of paths and their text."""
    drawn = {HERE / "pattern.svg": side_by_side(COVER)}
    lines = ["# Gallery", "", "Queries go down and keys across; what is dark may be attended."]
    for title, examples in (("Patterns", EXAMPLES), ("Combinations", COMBINED)):
        cells = []
        for number, (code, positions) in enumerate(examples.items()):
            name = code.partition("(")[0] if title == "Patterns" else f"combination-{number}"
            drawing = parse_pattern(code).svg(positions, cells=positions)
            drawn[HERE / "pictures" / f"{name}.svg"] = drawing + "\n"
            code = code.replace("|", "\\|")
            cells.append(f"![{code}](pictures/{name}.svg)<br>`{code}`")
        lines += ["", f"## {title}", "", "|" + " |" * COLUMNS, "|" + "---|" * COLUMNS]
        for start in range(0, len(cells), COLUMNS):
            lines.append(f"| {' | '.join(cells[start : start + COLUMNS])} |")
    return {**drawn, HERE / "gallery.md": "\n".join(lines) + "\n"}


def side_by_side(rows):
    """Patterns in rows, each with its code under it: a str, an SVG document."""
    width = GAP + (SIDE + GAP) * len(rows[0])
    y, pieces = GAP, []
    for captions in rows:
        for column, lines in enumerate(captions):
            x = GAP + column * (SIDE + GAP)
            drawing = parse_pattern(" ".join(lines)).svg(POSITIONS, cells=POSITIONS)
            pieces.append(f'<g transform="translate({x} {y})">{drawing}</g>')
            for number, line in enumerate(lines, start=1):
                at = f'x="{x + SIDE // 2}" y="{y + SIDE + number * LINE}"'
                pieces.append(f'<text {at} xml:space="preserve">{escape(line)}</text>')
        y += SIDE + max(map(len, captions)) * LINE + 2 * GAP
    height = y - GAP // 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="monospace" font-size="{FONT}" '
        f'text-anchor="middle" fill="#1f2328"><title>Patterns of sparse_attn: queries down, '
        f'keys across</title><rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
        f"{''.join(pieces)}</svg>\n"
    )


if __name__ == "__main__":
    (HERE / "pictures").mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
