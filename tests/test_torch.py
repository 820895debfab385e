"""PyTorch's transforms, compiler and exporter."""

import dataclasses

import keras
import numpy as np
import pytest

from sparse_attn import (
    BigBird,
    Blocks,
    Causal,
    Global,
    Local,
    Neighborhood,
    ScoreMod,
    Strided,
    layouts,
    sparse_attention,
    stream,
)
from sparse_attn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
)
from sparse_attn.reference import dense_attention
from tests.cases import EACH_CLASS
from tests.compare import close, random_inputs, random_masks, to_numpy

torch = pytest.importorskip("torch", reason="the extra [torch] is not installed")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="these are PyTorch's")

EACH_LAYOUT = [
    Local(3),
    Causal(),
    Strided(4),
    Global((1, 7)),
    BigBird(32, 4, 1),
    Neighborhood((8, 4), 1),
    Blocks(4),
]
MODES = {"kept": (stream.PIECE_BYTES, 2**30), "streamed": (4000, 0)}
# PyTorch makes rules for forward mode by what it has deprecated itself.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
by_pattern = pytest.mark.parametrize("pattern", EACH_LAYOUT, ids=repr)


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Sets the size of pieces, and returns `max_score_bytes`."""
    piece_bytes, max_score_bytes = MODES[request.param]
    monkeypatch.setattr(stream, "PIECE_BYTES", piece_bytes)
    return {"max_score_bytes": max_score_bytes}


def tensors(n, seed=0, **sizes):
    return [torch.tensor(x) for x in random_inputs(n, n, seed, **sizes)]


def close_all(found, expected, what, dtype="float64"):
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        close(to_numpy(x), to_numpy(y), f"{what} {number}", dtype)


# ---- torch.func ----------------------------------------------------------------


@by_pattern
def test_func_grad_and_vmap_equal_the_oracle(pattern, mode):
    n = 13
    inputs, (weight, *_) = tensors(n), tensors(n, seed=1)
    weight = weight[..., :3]
    key_mask = torch.tensor(random_masks(n, n)["key_mask"])

    def loss(q, k, v, weight, key_mask):
        out = sparse_attention(q, k, v, pattern, key_mask=key_mask, **mode)
        return (out * weight).sum(), out

    def of_one(*rows):
        total, out = loss(*(row[None] for row in rows))
        return total, out[0]

    out, _, gradients = dense_attention(
        *map(to_numpy, inputs), pattern, key_mask=to_numpy(key_mask), out_grad=to_numpy(weight)
    )
    expected = [*gradients.values()][:3]
    grad = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)
    found, outs = grad(*inputs, weight, key_mask)
    close_all([outs, *found], [out, *expected], "grad")
    of_each = torch.func.grad(of_one, argnums=(0, 1, 2), has_aux=True)
    found, outs = torch.func.vmap(of_each)(*inputs, weight, key_mask)
    close_all([outs, *found], [out, *expected], "vmap of grad")

    def total(*rows):
        return torch.func.vmap(of_one)(*rows, weight, key_mask)[0].sum()

    close_all(torch.func.grad(total, argnums=(0, 1, 2))(*inputs), expected, "grad of vmap")
    linked = [x.clone().requires_grad_() for x in inputs]
    close_all(torch.autograd.grad(total(*linked), linked), expected, "autograd of vmap")


def few(pattern, mode):
    """A function of few queries, that gives few numbers, and its inputs."""
    q, k, v = tensors(13, b=1, h=1)

    def function(q):
        return sparse_attention(q, k, v, pattern, **mode)[0, 6:9, 0]

    return function, q


@forward_mode
@by_pattern
def test_jacobians_equal_those_by_rows(pattern, mode):
    function, q = few(pattern, mode)
    expected = torch.autograd.functional.jacobian(function, q)
    found = [
        torch.func.jacrev(function)(q),
        torch.func.jacfwd(function)(q),
        torch.autograd.functional.jacobian(function, q, vectorize=True),
    ]
    close_all(found, [expected] * 3, "jacobian")


@dataclasses.dataclass(frozen=True, eq=False)
class Tables(ScoreMod):
    """Scores times what a table has for a distance, and more of it added."""

    tensors: tuple

    def modify(self, scores, q_pos, k_pos, head, factors, terms):
        place = keras.ops.clip(q_pos - k_pos, -2, 2) + 2
        return scores * factors[place] + terms[place]


@forward_mode
def test_jacobians_by_the_tensors_of_a_score_mod(mode):
    inputs = tensors(13, b=1, h=1)
    tables = tuple(torch.tensor(x) for x in np.random.default_rng(0).normal(size=(2, 5)))

    def function(factors, terms):
        mod = Tables((factors, terms))
        out = sparse_attention(*inputs, Causal() & Strided(4), score_mod=mod, **mode)
        return out[0, 6:9, 0]

    expected = torch.autograd.functional.jacobian(function, tables)
    vectorized = torch.autograd.functional.jacobian(function, tables, vectorize=True)
    close_all(vectorized, expected, "jacobian")
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        close_all(transform(function, argnums=(0, 1))(*tables), expected, "jacobian")


@forward_mode
@pytest.mark.parametrize("pattern", [Causal() & Local(3), Global(2)], ids=repr)
def test_hessians_equal_those_by_rows(pattern, mode):
    function, q = few(pattern, mode)
    q = q[:, :8]

    def loss(q):
        rows = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 5))
        return (function(rows) ** 2).sum()

    expected = torch.autograd.functional.hessian(loss, q)
    twice = torch.func.jacrev(torch.func.jacrev(loss))
    close_all([torch.func.hessian(loss)(q), twice(q)], [expected] * 2, "hessian")


@forward_mode
@pytest.mark.parametrize("pattern", [Strided(4), BigBird(32, 4, 1)], ids=repr)
def test_forward_mode_equals_backward_mode(pattern, mode):
    from torch.autograd import forward_ad

    inputs, tangents = tensors(13), tensors(13, seed=1)

    def function(*inputs):
        return sparse_attention(*inputs, pattern, **mode)

    _, expected = torch.autograd.functional.jvp(function, tuple(inputs), tuple(tangents))
    _, found = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents)
        dual = forward_ad.unpack_dual(function(*duals)).tangent
    close_all([found, dual], [expected] * 2, "jvp")


class OfLinear(torch.nn.Module):
    """A module of PyTorch around the function."""

    def __init__(self, pattern, **options):
        super().__init__()
        self.project = torch.nn.Linear(6, 3 * 2 * 4, dtype=torch.float64)
        self.pattern, self.options = pattern, options

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return sparse_attention(q, k, v, self.pattern, **self.options)


def of_each_row(loss, parameters, x):
    """What autograd gives for one row of the batch after the other."""
    rows = [torch.autograd.grad(loss(row[None]), parameters) for row in x]
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.mark.parametrize("pattern", [Causal() & Strided(4), Global(2)], ids=repr)
def test_gradients_of_each_row_through_a_functional_call(pattern, mode):
    torch.manual_seed(0)
    module, x = OfLinear(pattern, **mode), torch.randn(3, 13, 6, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters, row):
        return (torch.func.functional_call(module, parameters, (row[None],)) ** 2).sum()

    expected = of_each_row(lambda row: (module(row) ** 2).sum(), list(parameters.values()), x)
    frozen = {name: parameter.detach() for name, parameter in parameters.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(frozen, x)
    close_all(found.values(), expected, "gradient")


LAYERS = {
    "self": lambda **options: SelfAttention(
        2, 4, BigBird(32, 4, 1), rotary_embedding=RotaryEmbedding(), **options
    ),
    "multi-head": lambda **options: MultiHeadAttention(
        2, 4, pattern=Causal() & Strided(4), use_gate=True, **options
    ),
    "grouped": lambda **options: GroupedQueryAttention(
        4, 4, 2, pattern=Local(3), score_mod=RelativePositionBias(4), **options
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_each_row_of_a_layer(name, mode):
    layer = LAYERS[name](**mode)
    torch.manual_seed(0)
    x = torch.randn(3, 13, 6)
    count = 1 if name == "self" else 2
    layer(*[x] * count)
    variables = [variable.value for variable in layer.trainable_variables]

    def loss(values, row):
        out, _ = layer.stateless_call(values, [], *[row[None]] * count)
        return (out**2).sum()

    expected = of_each_row(lambda row: (layer(*[row] * count) ** 2).sum(), variables, x)
    values = [variable.detach() for variable in variables]
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    assert np.abs(to_numpy(expected[0])).max() > 0.1
    close_all(found, expected, "gradient", "float32")


# ---- torch.compile and torch.export --------------------------------------------


class Block(torch.nn.Module):
    """A module of PyTorch around a layer."""

    def __init__(self, pattern, **options):
        super().__init__()
        self.project = torch.nn.Linear(8, 8)
        self.attend = SelfAttention(2, 4, pattern, seed=1, **options)
        self.attend.build((None, None, 8))

    def forward(self, x):
        return torch.sigmoid(self.attend(torch.tanh(self.project(x))))


class ModuleOfBlocks(torch.nn.Module):
    """The sum of blocks of several patterns."""

    def __init__(self, patterns, **options):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(pattern, **options) for pattern in patterns)

    def forward(self, x):
        total = 0.0
        for block in self.blocks:
            total = total + block(x)
        return total

    def step(self, x, forward):
        """The output, and the gradients of all weights."""
        out = forward(x)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return [out, *torch.autograd.grad((out**2).sum(), weights)]


def check_compiled(patterns, lengths, **options):
    from torch._dynamo.testing import CompileCounterWithBackend

    module, counter = ModuleOfBlocks(patterns, **options), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    try:
        compiled = torch.compile(module, backend=counter)
        for n in lengths:
            x = torch.randn(2, n, 8)
            found, expected = (module.step(x, each) for each in (compiled, module))
            close_all(found, expected, "output or gradient", "float32")
    finally:
        torch._dynamo.reset()
    # Of each block what stands before its layer, and behind; nothing of the layer.
    assert 2 <= counter.frame_count <= 2 * len(patterns) * (1 + len(lengths))
    assert counter.op_count <= 3 * counter.frame_count


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of itself
@pytest.mark.parametrize("kind", EACH_CLASS)
def test_a_compiled_module_gives_what_it_gives_eagerly(kind):
    check_compiled(EACH_CLASS[kind], [48])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_gives_what_it_gives_eagerly_at_other_lengths(mode):
    check_compiled([Strided(4), BigBird(64, 4, 1)], [13, 29], **mode)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_gives_what_it_gives_eagerly(mode):
    inputs = [x.requires_grad_() for x in tensors(13)]

    def step(q, k, v):
        return torch.tanh(sparse_attention(q * 2, k, v, BigBird(32, 4, 1), **mode))

    torch._dynamo.reset()
    try:
        outs = [f(*inputs) for f in (torch.compile(step, backend="aot_eager"), step)]
        found, expected = ([out, *torch.autograd.grad(out.sum(), inputs)] for out in outs)
    finally:
        torch._dynamo.reset()
    close_all(found, expected, "output or gradient")


def exported(module, x, **dims):
    layouts._known_rows.cache_clear()  # as in a process that has called no layer yet
    dims = {axis: torch.export.Dim(name, min=1, max=64) for name, axis in dims.items()}
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=(dims,)).module()


def check_exported(patterns, options):
    module = ModuleOfBlocks(patterns, **options)
    run = exported(module, torch.randn(2, 48, 8), b=0)
    for b in (1, 2, 5):
        x = torch.randn(b, 48, 8)
        with torch.no_grad():
            close(to_numpy(run(x)), to_numpy(module(x)), f"batch of {b}", "float32")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EACH_CLASS)
def test_an_exported_module_takes_batches_of_any_size(kind):
    check_exported(EACH_CLASS[kind], {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", [Causal(), Strided(4), BigBird(64, 4, 1)], ids=repr)
def test_an_exported_module_takes_batches_of_any_size_where_it_would_be_streamed(
    pattern, monkeypatch
):
    monkeypatch.setattr(stream, "PIECE_BYTES", 4000)
    check_exported([pattern], {"max_score_bytes": 0})


@pytest.mark.filterwarnings("ignore")
def test_an_exported_module_has_gradients():
    module = ModuleOfBlocks([Strided(4)])
    x = torch.randn(2, 48, 8, requires_grad=True)
    run = torch.export.export(module, (x,)).module()
    found, expected = (torch.autograd.grad((f(x) ** 2).sum(), x) for f in (run, module))
    close_all(found, expected, "gradient", "float32")


@pytest.mark.filterwarnings("ignore")
def test_a_graph_of_all_of_a_module_is_refused():
    from torch._dynamo.exc import Unsupported

    module, x = ModuleOfBlocks([Local(3)]), torch.randn(2, 48, 8)
    torch._dynamo.reset()
    try:
        with pytest.raises(Unsupported, match=r"torch\.compiler\.disable"):
            torch.compile(module, backend="eager", fullgraph=True)(x)
        with pytest.raises(Unsupported, match=r"torch\.compiler\.disable"):
            torch.export.export(module, (x,), strict=True)
    finally:
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", [Local(3), Neighborhood((16, 4), 1)], ids=repr)
def test_a_module_is_not_exported_for_lengths_that_would_be_wrong(pattern):
    from torch._dynamo.exc import UserError

    with pytest.raises(UserError, match=r"marked n as dynamic.*specialized it to be a constant"):
        exported(ModuleOfBlocks([pattern]), torch.randn(2, 48, 8), b=0, n=1)
