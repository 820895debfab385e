"""Plans as for long sequences: at the short lengths of tests all would be dense otherwise."""

import importlib

import pytest

plan, terms = (importlib.import_module(f"sparse_attn.{name}") for name in ("plan", "terms"))
COSTS = {
    (plan, "TILE_PAIRS"): 0,
    (plan, "FIND_PAIRS"): 0,
    (terms, "PART_PAIRS"): 0,
    (plan.blocks, "SIZES"): (2, 4),  # of blocks that are looked for
}
DEFAULTS = {(module, name): getattr(module, name) for module, name in COSTS}


def use(costs):
    for (module, name), value in costs.items():
        setattr(module, name, value)
    plan._cached_plan.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def _costs_of_long_sequences():
    """For the tests of this folder; doctests show what users see."""
    use(COSTS)
    yield
    use(DEFAULTS)


@pytest.fixture
def default_costs():
    """The costs as users have them."""
    use(DEFAULTS)
    yield
    use(COSTS)
