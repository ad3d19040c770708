import pytest
import torch
from influence_nets import brute_gradients, cases

from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.influence.captures import record, recording
from skperf.influence.gradients import (
    Dense,
    Outer,
    Tokens,
    _row_numel,
    combine,
    folded,
    inner,
    merged,
    paired,
    squared_norms,
    written_out,
)
from skperf.influence.layers import find_layers, from_vectors, one_by_one, to_vectors

CASES = cases()


@pytest.fixture(params=list(CASES))
def recorded(request):
    network, inputs = CASES[request.param]
    parameters = select_parameters(network.module)
    layers = find_layers(network.module, parameters)
    cotangents = torch.randn(len(inputs), 3, dtype=torch.float64)
    with recording(network.module):
        gradients = record(network, Rows(inputs), layers).pull(cotangents)
    return network, inputs, parameters, layers, cotangents, gradients


def test_factors_are_the_gradients_of_single_rows(recorded):
    network, inputs, parameters, layers, cotangents, gradients = recorded
    brute = brute_gradients(network, inputs, cotangents)
    torch.testing.assert_close(to_vectors(layers, gradients, parameters), brute)


def test_reference_path_agrees(recorded):
    network, inputs, parameters, _, cotangents, _ = recorded
    with recording(network.module):
        layers = [one_by_one(list(parameters), parameters)]
        (reference,) = record(network, Rows(inputs), layers).pull(cotangents)
    torch.testing.assert_close(reference.values, brute_gradients(network, inputs, cotangents))


def test_products_never_need_the_matrix(recorded):
    *_, parameters, layers, _, gradients = recorded
    matrix = to_vectors(layers, gradients, parameters)
    torch.testing.assert_close(inner(gradients, gradients), matrix @ matrix.T)
    torch.testing.assert_close(squared_norms(gradients), matrix.square().sum(1))
    dense = from_vectors(layers, matrix, parameters)
    torch.testing.assert_close(inner(dense, gradients), matrix @ matrix.T)
    torch.testing.assert_close(to_vectors(layers, dense, parameters), matrix)
    weights = torch.randn(2, len(matrix), dtype=torch.float64)
    for factor, written in zip(gradients, dense, strict=True):
        torch.testing.assert_close(combine(weights, factor), weights @ written.values)
        torch.testing.assert_close(paired(factor, factor), written.values.square().sum(1))


def test_some_parameters_alone():
    network, inputs = CASES["mlp"]
    for pattern in ("0.weight", "0.bias", ["2.*", "0.bias"]):
        parameters = select_parameters(network.module, pattern)
        layers = find_layers(network.module, parameters)
        cotangents = torch.randn(len(inputs), 3, dtype=torch.float64)
        alone = [one_by_one(list(parameters), parameters)]
        with recording(network.module):
            pulled = record(network, Rows(inputs), layers).pull(cotangents)
            (reference,) = record(network, Rows(inputs), alone).pull(cotangents)
        torch.testing.assert_close(to_vectors(layers, pulled, parameters), reference.values)
        torch.testing.assert_close(inner(pulled, pulled), inner([reference], [reference]))


def test_long_sequences_are_written_out_and_short_ones_not():
    torch.manual_seed(0)
    from skperf.backbone.network import Network

    class Mean(torch.nn.Module):
        def __init__(self, d):
            super().__init__()
            self.hidden = torch.nn.Linear(d, d)
            self.output = torch.nn.Linear(d, 2)

        def forward(self, x):
            return self.output(torch.tanh(self.hidden(x)).mean(1))

    for d, length, kind in ((3, 9, Dense), (40, 3, None)):
        network = Network(Mean(d).double(), [0, 1])
        parameters = select_parameters(network.module)
        layers = find_layers(network.module, parameters)
        inputs = torch.randn(5, length, d, dtype=torch.float64)
        cotangents = torch.randn(5, 2, dtype=torch.float64)
        with recording(network.module):
            pulled = record(network, Rows(inputs), layers).pull(cotangents)
        assert isinstance(pulled[0], Dense) == (kind is Dense)
        matrix = brute_gradients(network, inputs, cotangents)
        torch.testing.assert_close(inner(pulled, pulled), matrix @ matrix.T)
        torch.testing.assert_close(squared_norms(pulled), matrix.square().sum(1))


def test_weighted_sums_of_factors_with_positions():
    generator = torch.Generator().manual_seed(0)
    factor = Outer(torch.randn(5, 7, 3, generator=generator), torch.randn(5, 7, 4))
    weights = torch.randn(2, 5, generator=generator)
    torch.testing.assert_close(combine(weights, factor), weights @ written_out(factor))


@pytest.mark.parametrize("rows_last", [False, True])
def test_entries_of_one_row_are_added_up(rows_last):
    generator = torch.Generator().manual_seed(0)
    where = torch.arange(6).view(2, 3).T if rows_last else torch.arange(6).view(3, 2)
    factors = [
        Dense(torch.randn(6, 5, generator=generator)),
        Outer(torch.randn(6, 3), torch.randn(6, 2)),
        Outer(torch.randn(6, 4, 3), torch.randn(6, 4, 2)),
        Tokens(torch.randint(-1, 5, (6, 3), generator=generator), torch.randn(6, 3, 2), 5),
    ]
    for factor in factors:
        expected = written_out(factor)[where].sum(1)
        torch.testing.assert_close(written_out(folded(factor, 3, rows_last=rows_last)), expected)


def test_calls_of_one_layer_are_added_up():
    outer = [Outer(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(2)]
    long = Outer(torch.randn(4, 6, 3), torch.randn(4, 6, 2))
    tokens = [Tokens(torch.randint(-1, 3, (4, n)), torch.randn(4, n, 2), 3) for n in (2, 3)]
    table = Dense(torch.randn(4, 6))
    for parts in (outer, [*outer, long], tokens, [tokens[0], outer[0], table]):
        expected = sum(written_out(part) for part in parts)
        torch.testing.assert_close(written_out(merged(parts)), expected)


@pytest.mark.parametrize("n_tokens", [4, 9, 40], ids=["few", "as many", "many"])
@pytest.mark.parametrize("lengths", [(3, 3), (2, 5)])
def test_products_of_tables_whatever_the_number_of_tokens(n_tokens, lengths):
    generator = torch.Generator().manual_seed(n_tokens)
    factors = []
    for n, length in zip((600, 7), lengths, strict=True):
        indices = torch.randint(-1, n_tokens, (n, length), generator=generator)
        outputs = torch.randn(n, length, 2, generator=generator, dtype=torch.float64)
        factors.append(Tokens(indices, outputs, n_tokens))
    left, right = factors
    plain = torch.zeros(600, 7, dtype=torch.float64)
    for i in range(600):
        for a, token in enumerate(left.indices[i].tolist()):
            if token >= 0:
                met = (right.indices == token).to(plain)
                plain[i] += torch.einsum("jp,jpd,d->j", met, right.outputs, left.outputs[i, a])
    torch.testing.assert_close(inner([left], [right]), plain)
    nothing = Tokens(torch.full_like(right.indices, -1), right.outputs, n_tokens)
    assert not inner([left], [nothing]).any()


def test_a_row_holds_the_numbers_of_all_its_tensors():
    factor = Outer(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    assert _row_numel(factor) == 3 * 4 + 3 * 5
    assert _row_numel(factor[:0]) == 1
    assert _row_numel(Dense(torch.zeros(2, 7))) == 7
