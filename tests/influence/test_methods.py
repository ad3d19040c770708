"""Every method against brute force, through the estimator."""

import numpy as np
import pytest
import torch
from influence_nets import Convolutional, Text, brute_curvature, brute_gradients, mlp
from scipy.stats import pearsonr
from sklearn.frozen import FrozenEstimator

from skperf import from_module
from skperf.backbone._opening import open_network
from skperf.backbone.outputs import log_odds
from skperf.influence import (
    CG,
    EKFAC,
    GGN,
    GIF,
    KFAC,
    TRAK,
    Arnoldi,
    Exact,
    InfluenceScorer,
    LiSSA,
    TracIn,
)

N, DAMPING = 40, 0.05


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    X, y = load_digits(n_class=3, return_X_y=True)
    return (X[:, 10:34] / 16)[:60], y[:60]


@pytest.fixture(scope="module")
def reference(digits):
    """Network, gradients of all rows and the Gauss-Newton matrix, by brute force."""
    X, y = digits
    module = mlp(24, 6, 3)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs[:N]), codes[:N]).backward()
        optimizer.step()
    network = open_network(from_module(module, [0, 1, 2]))
    logits = network(inputs)
    slopes = logits.softmax(1) - torch.nn.functional.one_hot(codes, 3)
    gradients = brute_gradients(network, inputs, slopes.detach())
    curvature = brute_curvature(network, inputs[:N], torch.full((N,), 1 / N, dtype=torch.float64))
    return module, gradients, curvature


@pytest.mark.parametrize("normalize", [True, False])
def test_tracin_is_a_product_or_a_cosine(digits, reference, normalize):
    (X, y), (module, gradients, _) = digits, reference
    scorer = InfluenceScorer(
        from_module(module, [0, 1, 2]),
        method=TracIn(learning_rate=0.5, normalize=normalize),
        checkpoints=[module],
    )
    found = scorer.fit(X[:N], y[:N]).influence(X[N:], y[N:])
    rows = gradients / gradients.norm(dim=1, keepdim=True) if normalize else gradients
    np.testing.assert_allclose(found, 0.5 * (rows[N:] @ rows[:N].T).numpy(), rtol=1e-6, atol=1e-9)


def exact_influence(reference, damping=DAMPING):
    _, gradients, curvature = reference
    damped = curvature + damping * torch.eye(len(curvature), dtype=torch.float64)
    return (gradients[N:] @ torch.linalg.solve(damped, gradients[:N].T) / N).numpy()


def fitted(module, digits, **params):
    X, y = digits
    params = {"damping": DAMPING, "random_state": 0, **params}
    return InfluenceScorer(from_module(module, [0, 1, 2]), **params).fit(X[:N], y[:N])


def queried(scorer, digits):
    X, y = digits
    return scorer.influence(X[N:], y[N:])


def test_gradient_dot_is_brute_force(reference, digits):
    module, gradients, _ = reference
    scorer = fitted(module, digits, method="gradient_dot")
    expected = (gradients[N:] @ gradients[:N].T).numpy()
    np.testing.assert_allclose(queried(scorer, digits), expected, rtol=1e-10)
    np.testing.assert_allclose(scorer.self_influence_, gradients[:N].square().sum(1), rtol=1e-10)
    assert scorer.unit_ == "squared gradient"


@pytest.mark.parametrize(
    ("method", "rtol"),
    [
        (Exact(), 1e-9),
        (GGN(kept_trace=1.0, max_rows=None), 1e-8),
        (CG(tol=1e-12), 1e-7),
        (LiSSA(tol=1e-7), 1e-4),
        (Arnoldi(n_components=171, max_iter=171), 1e-6),
    ],
)
def test_curvature_methods_converge_to_the_dense_inverse(reference, digits, method, rtol):
    scorer = fitted(reference[0], digits, method=method)
    expected = exact_influence(reference)
    np.testing.assert_allclose(
        queried(scorer, digits), expected, rtol=rtol, atol=rtol * np.abs(expected).max()
    )
    assert scorer.unit_ == "loss"
    X, y = digits
    own = fitted(reference[0], digits, method=method).influence(X[:5], y[:5])
    np.testing.assert_allclose(
        np.diag(own[:, :5]), scorer.self_influence(X[:5], y[:5]), rtol=1e-6, atol=1e-12
    )


def test_half_of_the_rows_stand_for_all_of_them(reference, digits):
    expected = exact_influence(reference)
    scorer = fitted(reference[0], digits, method=GGN(kept_trace=1.0, max_rows=40))
    scores = queried(scorer, digits)
    assert scorer.kept_trace_ < 0.98
    assert pearsonr(scores.ravel(), expected.ravel())[0] > 0.98
    assert (scores * expected).sum() / (expected**2).sum() == pytest.approx(1, abs=0.05)
    trace = float(reference[2].trace())
    assert float(scorer._learned.stages[0].fit.lift.filtered.curvature.trace) == pytest.approx(
        trace, rel=0.1
    )


@pytest.mark.parametrize("method", [CG(tol=1e-12, curvature="hessian"), Exact("hessian")])
def test_hessian_in_place_of_gauss_newton(reference, digits, method):
    X, y = digits
    module = reference[0]
    names = [name for name, _ in module.named_parameters()]

    def mean_loss(*values):
        logits = torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (torch.as_tensor(X[:N]),)
        )
        return torch.nn.functional.cross_entropy(logits, torch.as_tensor(y[:N]))

    values = tuple(p.detach() for p in module.parameters())
    blocks = torch.autograd.functional.hessian(mean_loss, values)
    hessian = torch.cat(
        [
            torch.cat([b.reshape(v.numel(), -1) for b in row], 1)
            for row, v in zip(blocks, values, strict=True)
        ]
    )
    expected = exact_influence((None, reference[1], hessian), damping=0.5)
    scorer = fitted(module, digits, method=method, damping=0.5)
    np.testing.assert_allclose(queried(scorer, digits), expected, rtol=1e-6, atol=1e-9)


def test_indefinite_curvature_is_an_error(reference, digits):
    scorer = fitted(reference[0], digits, method=CG(curvature="hessian"), damping=1e-6)
    with pytest.raises(ValueError, match="indefinite"):
        queried(scorer, digits)
    with pytest.raises(ValueError, match="indefinite"):
        fitted(reference[0], digits, method=Exact("hessian"), damping=1e-6)


def test_lissa_that_diverges_is_an_error(reference, digits):
    scorer = fitted(reference[0], digits, method=LiSSA(scale=0.02))
    with pytest.raises(ValueError, match="diverges"):
        queried(scorer, digits)


def test_ekfac_fast_score_is_the_dense_one(reference, digits):
    exact = queried(fitted(reference[0], digits, method=EKFAC(rank=None)), digits)
    fast = queried(fitted(reference[0], digits, method="ekfac"), digits)
    assert pearsonr(exact.ravel(), fast.ravel())[0] > 0.999
    assert pearsonr(exact.ravel(), exact_influence(reference).ravel())[0] > 0.8


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_ekfac_and_kfac_by_hand(reference, digits, curvature):
    """One layer, written out: eigenbasis of A and B, second moments of the rows in it."""
    X, y = digits
    network = open_network(from_module(reference[0], [0, 1, 2]))
    inputs = torch.as_tensor(X)
    hidden = torch.tanh(reference[0][0](inputs)).detach()
    features = torch.cat([hidden, torch.ones(60, 1)], 1)
    p = network(inputs).softmax(1).detach()
    slopes = p - torch.nn.functional.one_hot(torch.as_tensor(y), 3)
    if curvature == "empirical":
        fisher = (slopes[:, :, None] * slopes[:, None])[:N]
    else:
        fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None])[:N]
    A = features[:N].T @ features[:N] / N
    B = fisher.mean(0)
    (a_values, a_vectors), (b_values, b_vectors) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    in_basis = torch.einsum("kj,nkl,lj->nj", b_vectors, fisher, b_vectors)
    moments = in_basis.T @ (features[:N] @ a_vectors).square() / N
    for method, values in (("ekfac", moments), ("kfac", b_values[:, None] * a_values)):
        rotated = torch.einsum("nk,kj,nd,de->nje", slopes, b_vectors, features, a_vectors)
        weighted = rotated / (values + DAMPING)
        expected = weighted[N:].flatten(1) @ rotated[:N].flatten(1).T / N
        record = {"ekfac": EKFAC, "kfac": KFAC}[method]
        exact = record(rank=None, curvature=curvature)
        scorer = fitted(reference[0], digits, method=exact, parameters="last")
        # its rows hold all but a thousandth of the trace
        np.testing.assert_allclose(queried(scorer, digits), expected, rtol=5e-3, atol=1e-4)
        few = record(rank=6, curvature=curvature)
        fast = fitted(reference[0], digits, method=few, parameters="last")
        assert pearsonr(queried(fast, digits).ravel(), expected.numpy().ravel())[0] > 0.9999


def test_datainf_is_its_formula(reference, digits):
    module, gradients, _ = reference
    scorer = fitted(module, digits, method="datainf")
    total = 0
    for part in gradients.split([144, 6, 18, 3], 1):
        train, queries = part[:N], part[N:]
        shrunk = (queries @ train.T) / (DAMPING + train.square().sum(1))
        total = total + (queries @ train.T - shrunk @ (train @ train.T) / N) / (N * DAMPING)
    np.testing.assert_allclose(queried(scorer, digits), total, rtol=1e-8)


def test_trak_with_enough_projections_is_its_kernel(reference, digits):
    X, y = digits
    module, gradients, _ = reference
    scorer = fitted(module, digits, method=TRAK(n_projections=10**6))
    network = open_network(from_module(module, [0, 1, 2]))
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    logits = network(inputs).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(log_odds(logits, codes).sum(), logits)
    odds = brute_gradients(network, inputs, slopes)
    kernel = odds[:N].T @ odds[:N] / N + DAMPING * torch.eye(171, dtype=torch.float64)
    expected = gradients[N:] @ torch.linalg.solve(kernel, gradients[:N].T) / N
    np.testing.assert_allclose(queried(scorer, digits), expected, rtol=1e-6, atol=1e-9)
    few = fitted(module, digits, method=TRAK(n_projections=100))
    assert pearsonr(queried(few, digits).ravel(), expected.numpy().ravel())[0] > 0.6


def test_tracin_sums_over_checkpoints(reference, digits):
    module, gradients, _ = reference
    other = mlp(24, 6, 3, seed=5)
    scorer = fitted(
        module,
        digits,
        method=TracIn(learning_rate=[0.5, 0.1]),
        checkpoints=[other.state_dict(), module],
    )
    first = queried(fitted(other, digits, method="gradient_dot"), digits)
    expected = 0.5 * first + 0.1 * (gradients[N:] @ gradients[:N].T).numpy()
    np.testing.assert_allclose(queried(scorer, digits), expected, rtol=1e-9)
    with pytest.raises(ValueError, match=r"checkpoint 0 .* '0.weight' is of shape \(7, 24\)"):
        fitted(module, digits, method="tracin", checkpoints=[mlp(24, 7, 3).state_dict()])
    with pytest.raises(ValueError, match="give a list of state dicts"):
        fitted(module, digits, method="tracin")


def test_gif_is_the_restricted_least_squares(reference, digits):
    module, gradients, curvature = reference
    method = GIF(ratio=0.2, tol=1e-14, max_iter=400, curvature="ggn")
    scorer = fitted(module, digits, method=method)
    report = scorer._learned.stages[0].fit.report
    chosen = torch.as_tensor(report["chosen"])
    assert 0.1 < chosen.double().mean() <= 0.2
    largest = float(torch.linalg.eigvalsh(curvature)[-1])
    assert report["ridge"] == pytest.approx(1e-3 * largest**2, rel=0.05)
    columns = curvature[:, chosen]
    normal = columns.T @ columns
    normal = normal + report["ridge"] * torch.eye(len(normal), dtype=torch.float64)
    update = torch.linalg.solve(normal, columns.T @ gradients[:N].T)
    expected = gradients[N:, chosen] @ update / N
    np.testing.assert_allclose(queried(scorer, digits), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [Convolutional, Text])
def test_other_architectures_through_both_paths(kind):
    torch.manual_seed(0)
    module = kind().double()
    rng = np.random.default_rng(0)
    X = rng.normal(size=(12, 1, 8, 8)) if kind is Convolutional else rng.integers(0, 30, (12, 4))
    y = rng.integers(0, 3, 12)
    results = {}
    for method in ("gradient_dot", "ggn", "ekfac", "datainf", "trak"):
        scorer = InfluenceScorer(module, method=method, random_state=0).fit(X, y)
        results[method] = scorer.influence(X[:5], y[:5])
        assert np.isfinite(results[method]).all()
    for method in ("gradient_dot", "ggn"):
        reference = InfluenceScorer(module, method=method, gradients="reference").fit(X, y)
        np.testing.assert_allclose(
            reference.influence(X[:5], y[:5]), results[method], rtol=1e-7, atol=1e-12
        )


def test_damping_does_not_depend_on_batches_or_row_order(reference, digits):
    X, y = digits
    order = np.random.default_rng(0).permutation(N)
    for method in ("ggn", "ekfac", "kfac", "datainf", "trak", CG(tol=1e-10), "exact"):
        params = {"method": method, "damping": "auto"}
        scorer = fitted(reference[0], digits, **params)
        small = fitted(reference[0], digits, batch_size=7, **params)
        np.testing.assert_allclose(small.damping_, scorer.damping_, rtol=1e-9)
        np.testing.assert_allclose(
            queried(small, digits), queried(scorer, digits), rtol=1e-4, atol=1e-9
        )
        if method == "trak":
            continue
        shuffled = InfluenceScorer(
            from_module(reference[0], [0, 1, 2]), random_state=0, **params
        ).fit(X[:N][order], y[:N][order])
        np.testing.assert_allclose(shuffled.damping_, scorer.damping_, rtol=1e-9)
        np.testing.assert_allclose(
            queried(shuffled, digits), queried(scorer, digits)[:, order], rtol=1e-3, atol=1e-8
        )


def test_frozen_and_bare_modules_agree(reference, digits):
    X, y = digits
    bare = InfluenceScorer(reference[0], damping=DAMPING).fit(X[:N], y[:N])
    frozen = InfluenceScorer(FrozenEstimator(bare.estimator_), damping=DAMPING).fit(X[:N], y[:N])
    np.testing.assert_array_equal(queried(bare, digits), queried(frozen, digits))


class Bag(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(30, 5)
        self.output = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.output(torch.tanh(self.bag(x)))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("method", [CG, LiSSA, Arnoldi, Exact, GIF])
def test_layers_without_second_derivatives_are_named_at_fit(method, curvature):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 30, (20, 4)), rng.integers(0, 3, 20)
    ratio = {"ratio": 0.5} if method is GIF else {}
    params = {"method": method(curvature=curvature, **ratio), "damping": 1.0}
    message = rf"'{method.name}'.*'bag' \(EmbeddingBag\).*Use method='ggn'"
    with pytest.raises(ValueError, match=message):
        InfluenceScorer(Bag(), **params).fit(X, y)
    head = InfluenceScorer(Bag(), parameters="output.*", **params).fit(X, y)
    assert np.isfinite(head.influence(X[:3], y[:3])).all()
