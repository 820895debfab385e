"""Draw `pattern.svg`, the picture of the README: `python docs/make_picture.py`."""

from html import escape
from pathlib import Path

from sparse_attn import parse_pattern

PICTURE = Path(__file__).with_name("pattern.svg")

PATTERNS = [
    ["Causal()", "Local(6)", "Atrous(4)"],
    ["Causal() & Strided(8)", "Causal() & (Local(4) | Prefix(2))", "Blocks(8)"],
]
POSITIONS = 48
SIDE = 192  # of one pattern's own SVG, at 48 positions
SCALE = 1.25
GAP = 40
LABEL = 52  # height below a pattern


def picture():
    """The patterns side by side, each with its code under it: a str, an SVG document."""
    step = SIDE * SCALE + GAP
    line = SIDE * SCALE + LABEL
    width = GAP + step * len(PATTERNS[0])
    height = GAP + line * len(PATTERNS)
    pieces = []
    for row, names in enumerate(PATTERNS):
        for column, name in enumerate(names):
            x, y = GAP + column * step, GAP + row * line
            drawing = parse_pattern(name).svg(POSITIONS, cells=POSITIONS)
            pieces.append(f'<g transform="translate({x:g} {y:g}) scale({SCALE})">{drawing}</g>')
            pieces.append(f'<text x="{x + SIDE * SCALE / 2:g}" y="{y + SIDE * SCALE + 22:g}">')
            pieces.append(f"{escape(name)}</text>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="monospace" font-size="13" '
        f'text-anchor="middle" fill="#1f2328"><title>Patterns of sparse_attn: queries down, '
        f'keys across</title><rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
        f"{''.join(pieces)}</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
