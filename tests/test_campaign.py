"""Some hundred random calls, of the campaign in `tests/campaign`.

`--cases 10000` runs more of them, `--campaign-seed` others, and `--case` one alone.
"""

import itertools

import numpy as np
import pytest

from sparse_attn.reference import dense_attention
from tests.campaign import oracle, patterns
from tests.campaign.breaks import BREAKS, broken
from tests.campaign.cases import BACKEND, GROUP, case, tensors
from tests.campaign.run import failure, forget

GROUPS = {"tensorflow": 50, "jax": 50, "torch": 75}[BACKEND]
OF_EACH = 4  # cases of a group


def pytest_generate_tests(metafunc):
    if "numbers" not in metafunc.fixturenames:
        return
    one, count = (metafunc.config.getoption(name) for name in ("--case", "--cases"))
    groups = [range(x * GROUP, x * GROUP + OF_EACH) for x in range(GROUPS)]
    if count is not None:
        groups = [range(x, min(x + GROUP, count)) for x in range(0, count, GROUP)]
    groups = groups if one is None else [[one]]
    metafunc.parametrize("numbers", groups, ids=[str(x[0]) for x in groups])


@pytest.fixture
def seed(request):
    return request.config.getoption("--campaign-seed")


@pytest.fixture(autouse=True, scope="module")
def _compiled_for_one_module():
    yield
    forget()


def test_random_calls_equal_oracle(numbers, seed):
    told = []
    for number in numbers:
        each = case(seed, number)
        wrong = failure(each)
        if wrong:
            told.append(f"{each}\n  {wrong}")
    again = "  python -m tests.campaign --seed S --case N makes a case smaller"
    assert not told, "\n".join([*told, again])


def test_predicates_equal_definitions():
    for number in range(1000):
        rng = np.random.default_rng([1, number])
        longest, (n, m) = 40, rng.integers(1, 41, 2)
        pattern = patterns.draw(rng, longest)
        expected = patterns.allowed(pattern, np.arange(n)[:, None], np.arange(m)[None, :])
        np.testing.assert_array_equal(pattern.mask(n, m), expected, err_msg=repr(pattern))


def test_random_blocks_are_as_many_as_wanted_and_none_is_skipped():
    for number in range(200):
        rng = np.random.default_rng([2, number])
        pattern = patterns.draw_of(patterns.Random, rng, 40)
        blocks = np.arange(-(-pattern.length // pattern.block_size))
        for row in blocks:
            listed = [block for block in pattern.lists[row] if block >= 0]
            free = [x for x in blocks if pattern.skip is None or not pattern.skip(row, x)]
            assert len(set(listed)) == len(listed) == min(pattern.num_blocks, len(free))
            assert set(listed) <= set(free)


def test_oracle_equals_reference():
    """The two oracles share no line; `reference` takes derivatives of mods by differences."""
    kept = 0
    for number in itertools.count():
        each = case(3, number * GROUP)
        smooth = not any(mod.causal or mod.can_forbid or mod.has_table for mod in each.mods)
        if each.dtype not in ("float32", "float64") or not smooth or 0 in (each.n, each.m):
            continue
        kept += 1
        _compare_oracles(each)
        if kept == 30:
            break


def _compare_oracles(each):
    given = tensors(each)
    expected, _ = oracle.attention(each, given)

    def score_mod(scores, q_pos, k_pos, head):
        for mod in each.mods:
            scores, *_ = mod.values(scores, q_pos, k_pos, head, None)
        return scores

    options = {x: given.get(x) for x in ("query_mask", "key_mask", "attention_mask", "bias")}
    segments = given.get("segments")
    if "pair" in each.segments:
        segments = segments, given["key_segments"]
    # What `dense_attention` promises of padding it does not of all that nobody may see.
    seen = oracle.pairs(each, given).any(axis=2)
    for name in ("key", "value"):
        groups = seen.reshape(each.batch, each.key_heads, -1, each.m).any(axis=2)
        given[name] = np.where(np.moveaxis(groups, 1, 2)[..., None], given[name], 0)
    out, lse, gradients = dense_attention(
        given["query"], given["key"], given["value"], each.pattern,
        segment_ids=segments,
        score_mod=score_mod if each.mods else None,
        scale=each.scale,
        query_positions=given.get("positions"),
        out_grad=given["d_out"],
        lse_grad=np.where(np.isfinite(expected["lse"]), given.get("d_lse", 0), 0),
        **options,
    )  # fmt: skip
    for name, x in {"out": out, "lse": lse, **gradients}.items():
        told = f"{name} of {each}"
        np.testing.assert_allclose(x, expected[name], rtol=1e-6, atol=1e-7, err_msg=told)


@pytest.mark.parametrize("name", BREAKS)
def test_campaign_sees_a_fault(name, seed):
    """Some case of those that run above fails."""
    with broken(name):
        for number in range(0, GROUPS * GROUP, GROUP):
            each = case(seed, number)
            if BREAKS[name].concerns(each) and failure(each):
                return
    raise AssertionError(f"{GROUPS} cases do not see {name}")
