"""Plans as for long sequences: at the short lengths of tests all would be dense otherwise."""

import importlib

plan = importlib.import_module("sparse_attn.plan")
DEFAULTS = {name: getattr(plan, name) for name in ("PART_PAIRS", "TILE_PAIRS", "FIND_PAIRS")}
for name in DEFAULTS:
    setattr(plan, name, 0)
plan.blocks.SIZES = (2, 4)  # of blocks that are looked for
