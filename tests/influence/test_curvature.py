import numpy as np
import pytest
import torch
from influence_nets import brute_curvature, brute_gradients, cases

from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.influence.captures import record, recording
from skperf.influence.curvature import (
    CurvatureProduct,
    Filtered,
    RowSpace,
    _pushed,
    dense_curvature,
    gradient_flow,
)
from skperf.influence.gradients import inner
from skperf.influence.layers import find_layers
from skperf.influence.methods import RowForm
from skperf.influence.output_rows import prepare_forward_mode, representatives, softmax_rows
from skperf.influence.tiles import gather

NETWORK, INPUTS = cases()["mlp"]
SHARES = torch.arange(1.0, 8.0, dtype=torch.float64) / 28
PARAMETERS = select_parameters(NETWORK.module)
LAYERS = find_layers(NETWORK.module, PARAMETERS)
EXACT = brute_curvature(NETWORK, INPUTS, SHARES)


def pull(cotangents, examples=None):
    with recording(NETWORK.module):
        return gather(
            NETWORK,
            lambda network, rows: record(network, rows, LAYERS),
            Rows(INPUTS),
            cotangents,
            examples=examples,
            batch_size=3,
        )


@pytest.fixture
def row_space():
    rows = softmax_rows(NETWORK.logits(INPUTS), SHARES)
    return RowSpace.of(pull(rows.cotangents, rows.examples))


@pytest.fixture
def gradients():
    cotangents = torch.randn(7, 3, dtype=torch.float64)
    return pull(cotangents), brute_gradients(NETWORK, INPUTS, cotangents)


def test_rows_hold_the_whole_gauss_newton_matrix(row_space):
    assert row_space.trace == pytest.approx(float(EXACT.trace()))


def test_fewer_rows_keep_the_trace_they_report():
    logits = NETWORK.logits(INPUTS)
    p = logits.softmax(1)
    total = (SHARES * (1 - p.square().sum(1))).sum()
    for kept in (0.5, 0.9):
        rows = softmax_rows(logits, SHARES, kept_trace=kept)
        assert kept - 0.2 < rows.kept_trace < 1
        # the others stand for what is left out, all but the examples least in doubt
        held = float(rows.cotangents.square().sum() / total)
        assert 1 - (1 - kept) / 10 <= held <= 1 + 1e-12
        fewer = softmax_rows(logits, SHARES, kept_trace=kept, max_rows=len(rows.examples) - 1)
        assert fewer.kept_trace < rows.kept_trace


def test_representatives_are_unbiased_and_keep_the_large_ones():
    values = torch.tensor([5.0, 3.0, 1.0, 0.5, 0.3, 0.2], dtype=torch.float64)
    indices, sizes = representatives(values, 4)
    assert indices[:2].tolist() == [0, 1]
    assert sizes.tolist() == pytest.approx([5.0, 3.0, 1.0, 1.0])
    everything = representatives(values, 6)
    assert everything[0].tolist() == list(range(6))
    torch.testing.assert_close(everything[1], values)
    assert len(representatives(values, 0)[0]) == 0
    values = torch.rand(400, dtype=torch.float64).square().sort(descending=True).values
    for n in (1, 7, 100, 399):
        indices, sizes = representatives(values, n)
        assert len(set(indices.tolist())) == n
        assert float(sizes.sum()) == pytest.approx(float(values.sum()))
        assert bool((sizes >= values[indices] - 1e-12).all())
        # the cumulated sum is met at equal steps: no entry is far from its share
        reached = torch.zeros(400, dtype=torch.float64)
        reached[indices] = sizes
        assert float((reached.cumsum(0) - values.cumsum(0)).abs().max()) <= float(sizes.max())


@pytest.mark.parametrize(("n_classes", "spread"), [(5, 1.0), (150, 1.0), (300, 8.0)])
def test_rows_add_up_to_the_softmax_hessians_and_never_to_more(n_classes, spread):
    torch.manual_seed(0)
    logits = spread * torch.randn(4, n_classes, dtype=torch.float64)
    p, shares = logits.softmax(1), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    rows = softmax_rows(logits, shares)
    for i, share in enumerate(shares):
        own = rows.cotangents[rows.examples == i]
        torch.testing.assert_close(own.T @ own, share * hessians[i])
    # where less is asked for, what is left out is small, and the rest stands for it
    fewer = softmax_rows(logits, shares, kept_trace=0.99).cotangents
    trace = float(torch.einsum("n,nii->", shares, hessians))
    assert trace * 0.99 <= float(fewer.square().sum()) <= trace * (1 + 1e-12)


def test_woodbury_is_the_damped_inverse(row_space, gradients):
    factors, matrix = gradients
    expected = matrix @ torch.linalg.solve(EXACT + 0.1 * torch.eye(len(EXACT)), matrix.T)
    lift = RowForm(Filtered.damped(row_space, 0.1))
    stored = lift.store(None, factors)
    terms = lift(None, factors)
    scores = inner([factor for _, factor in terms], [stored[i] for i, _ in terms]) / 0.1
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("dtype", "damping", "rtol"), [("float64", 1e-8, 1e-5), ("float32", 1e-5, 1e-2)]
)
def test_small_damping_keeps_its_digits_or_is_refused(row_space, gradients, dtype, damping, rtol):
    factors, matrix = gradients
    expected = matrix @ torch.linalg.solve(EXACT + damping * torch.eye(len(EXACT)), matrix.T)
    cast = [
        [f.with_tensors(*(t.to(getattr(torch, dtype)) for t in f.tensors)) for f in some]
        for some in (row_space.rows, factors)
    ]
    space = RowSpace.of(cast[0])
    lift = RowForm(Filtered.damped(space, damping))
    terms, stored = lift(None, cast[1]), lift.store(None, cast[1])
    scores = inner([factor for _, factor in terms], [stored[i] for i, _ in terms]) / damping
    assert float((scores - expected).norm() / expected.norm()) < rtol
    with pytest.raises(ValueError, match="lost in the rounding"):
        Filtered.damped(space, damping * 1e-9)


def test_spectral_filter_is_the_matrix_function(row_space, gradients):
    factors, matrix = gradients
    time, decay = 7.0, 0.01
    values, vectors = torch.linalg.eigh(EXACT)
    applied = (1 - torch.exp(-time * (values + decay))) / (values + decay)
    expected = matrix @ (vectors * applied) @ vectors.T @ matrix.T
    multiplied = Filtered.of(row_space, gradient_flow(time, decay)).apply(factors)
    torch.testing.assert_close(inner(multiplied, factors), expected, rtol=1e-6, atol=1e-8)


def test_flow_filter_runs_from_gradient_dot_to_the_inverse():
    values = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        gradient_flow(1e-6)(values), torch.full_like(values, 1e-6), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(gradient_flow(1e4)(values)[1:], 1 / values[1:])


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_products_agree_with_the_written_out_matrix(kind):
    codes = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    product = CurvatureProduct(NETWORK, PARAMETERS, Rows(INPUTS), codes, SHARES, kind, batch_size=3)
    with recording(NETWORK.module):
        matrix = dense_curvature(product, chunk=7)
    if kind == "ggn":
        expected = EXACT
    else:
        names = list(PARAMETERS)

        def loss(*values):
            logits = NETWORK(INPUTS, dict(zip(names, values, strict=True)))
            return (
                SHARES * torch.nn.functional.cross_entropy(logits, codes, reduction="none")
            ).sum()

        blocks = torch.autograd.functional.hessian(loss, tuple(PARAMETERS.values()))
        sizes = [p.numel() for p in PARAMETERS.values()]
        expected = torch.cat(
            [
                torch.cat([b.reshape(n, -1) for b in row], 1)
                for row, n in zip(blocks, sizes, strict=True)
            ]
        )
    torch.testing.assert_close(matrix, expected)
    vectors = torch.randn(4, len(matrix), dtype=torch.float64)
    with recording(NETWORK.module):
        torch.testing.assert_close(product(vectors), vectors @ matrix)
        halves = [product(vectors, torch.arange(7)[part::2]) for part in (0, 1)]
    weights = [float(SHARES[part::2].sum()) for part in (0, 1)]
    total = sum(w * h for w, h in zip(weights, halves, strict=True))
    torch.testing.assert_close(total, vectors @ matrix)


def test_certain_predictions_have_no_rows():
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    rows = softmax_rows(logits, torch.full((2,), 0.5, dtype=torch.float64))
    assert len(rows.examples) == 0
    assert rows.kept_trace == 1
    assert np.isfinite(rows.cotangents.numpy()).all()


class Cube(torch.autograd.Function):
    """A function that has no rule for forward mode."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def test_outputs_move_as_they_should_where_there_is_no_forward_mode():
    prepare_forward_mode()
    at = {"w": torch.tensor([1.0, -2.0, 0.5])}
    move = _pushed(lambda parameters: Cube.apply(parameters["w"]), at)
    assert move.__name__ == "twice_backward"
    moved = move({"w": torch.tensor([1.0, 0.5, 4.0])})
    torch.testing.assert_close(moved, torch.tensor([3.0, 6.0, 3.0]))


def test_what_is_applied_to_vectors_is_the_damped_inverse(row_space, gradients):
    factors, matrix = gradients
    expected = matrix @ torch.linalg.solve(EXACT + 0.1 * torch.eye(len(EXACT)), matrix.T)
    applied = RowForm(Filtered.damped(row_space, 0.1)).applied(None, factors)
    # EXACT is of another order of sums, and the inverse of its rounding
    torch.testing.assert_close(inner(applied, factors), expected, rtol=1e-5, atol=1e-6)
