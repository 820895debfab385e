"""Plans as for long sequences: at the short lengths of tests all would be dense otherwise."""

import collections
import importlib
import random

import keras
import pytest

plan, terms = (importlib.import_module(f"sparse_attn.{name}") for name in ("plan", "terms"))
COSTS = {
    (plan, "TILE_PAIRS"): 0,
    (plan, "FIND_PAIRS"): 0,
    (terms, "PART_PAIRS"): 0,
    (plan.blocks, "SIZES"): (2, 4),  # of blocks that are looked for
}
BACKEND = keras.backend.backend()
ON_JAX = BACKEND == "jax"
CASES = {"tensorflow": 4, "jax": 2, "torch": 5}[BACKEND]  # JAX compiles for each shape
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


@pytest.fixture(autouse=True)
def _the_same_each_time():
    """Initial weights and dropout, which Keras would draw anew in each run."""
    keras.utils.set_random_seed(0)


@pytest.fixture
def default_costs():
    """The costs as users have them."""
    use(DEFAULTS)
    yield
    use(COSTS)


@pytest.fixture(autouse=True, scope="module")
def _compiled_for_one_module():
    """What JAX compiled is held no longer than for one module, and it is compiled in haste."""
    if not ON_JAX:
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="all cases of each test, not a few")
    parser.addoption("--cases", type=int, help="how many random calls the campaign makes")
    parser.addoption("--case", type=int, help="the number of the only one that it makes")
    parser.addoption("--campaign-seed", type=int, default=0, help="the seed of its random calls")


@pytest.hookimpl(trylast=True)  # after `-k` has chosen
def pytest_collection_modifyitems(config, items):
    """Of each test a few cases are run, drawn once and for all, unless `--all-cases` is given."""
    if config.getoption("--all-cases"):
        return
    cases = collections.defaultdict(list)
    for item in items:
        # The campaign has its own number of cases, which it compiles in groups.
        whole = item.path.stem == "test_campaign"
        cases[item.nodeid if whole else item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for name, each in cases.items():
        kept.update(random.Random(name).sample(each, min(CASES, len(each))))  # noqa: S311
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
