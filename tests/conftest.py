"""Plans as for long sequences: at the short lengths of tests all would be dense otherwise."""

import importlib

plan, terms = (importlib.import_module(f"sparse_attn.{name}") for name in ("plan", "terms"))
COSTS = [(plan, "TILE_PAIRS"), (plan, "FIND_PAIRS"), (terms, "PART_PAIRS")]
DEFAULTS = [(module, name, getattr(module, name)) for module, name in COSTS]
for module, name in COSTS:
    setattr(module, name, 0)
plan.blocks.SIZES = (2, 4)  # of blocks that are looked for
