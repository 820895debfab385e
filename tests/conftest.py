"""Plans as for long sequences: at the short lengths of tests all would be dense otherwise."""

import importlib

import pytest

plan, terms = (importlib.import_module(f"sparse_attn.{name}") for name in ("plan", "terms"))
COSTS = [(plan, "TILE_PAIRS", 0), (plan, "FIND_PAIRS", 0), (terms, "PART_PAIRS", 0)]
COSTS += [(plan.blocks, "SIZES", (2, 4))]  # of blocks that are looked for
DEFAULTS = [(module, name, getattr(module, name)) for module, name, _ in COSTS]
for module, name, value in COSTS:
    setattr(module, name, value)


@pytest.fixture
def default_costs(monkeypatch):
    """The costs as users have them."""
    for module, name, value in DEFAULTS:
        monkeypatch.setattr(module, name, value)
    plan._cached_plan.cache_clear()
    yield
    plan._cached_plan.cache_clear()
