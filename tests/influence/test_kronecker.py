import pytest
import torch
from influence_nets import cases

from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.influence.captures import record, recording
from skperf.influence.gradients import Outer, inner, written_out
from skperf.influence.kronecker import kronecker_basis, separable
from skperf.influence.layers import find_layers


def pulled(name, n_rows=7):
    network, inputs = cases()[name]
    layers = find_layers(network.module, select_parameters(network.module))
    cotangents = torch.randn(len(inputs), 3, dtype=torch.float64)
    with recording(network.module):
        tape = record(network, Rows(inputs), layers)
        return network, inputs, layers, cotangents, tape.pull(cotangents)


@pytest.mark.parametrize("name", ["mlp", "convolutional", "text"])
def test_ekfac_is_the_second_moment_in_the_kronecker_basis(name):
    _, inputs, layers, _, gradients = pulled(name)
    weights = torch.full((len(inputs),), 1 / len(inputs), dtype=torch.float64)
    for layer, rows in zip(layers, gradients, strict=True):
        basis = kronecker_basis(rows, rows, layer.matrix_shape, corrected=True, weights=weights)
        matrix = written_out(rows).view(len(rows), *basis.values.shape)
        if basis.outputs is not None:
            eye = torch.eye(len(basis.outputs), dtype=torch.float64)
            torch.testing.assert_close(basis.outputs.T @ basis.outputs, eye)
            by_token = basis.inputs is None
            matrix = matrix @ basis.outputs if by_token else basis.outputs.T @ matrix
        if basis.inputs is not None:
            matrix = matrix @ basis.inputs
        torch.testing.assert_close(basis.values, matrix.square().sum(0))
        torch.testing.assert_close(written_out(basis.rotate(rows)), matrix.flatten(1))
        torch.testing.assert_close(
            inner([basis.rotate(rows)], [basis.rotate(rows)]), inner([rows], [rows])
        )


def test_kfac_is_the_kronecker_product_of_the_moments():
    _, inputs, layers, _, gradients = pulled("mlp")
    weights = torch.full((len(inputs),), 1 / len(inputs), dtype=torch.float64)
    layer, rows = layers[0], gradients[0]
    basis = kronecker_basis(rows, rows, layer.matrix_shape, corrected=False, weights=weights)
    moment = torch.kron(
        rows.outputs.T @ rows.outputs, rows.inputs.T @ (weights[:, None] * rows.inputs)
    )
    vectors = torch.kron(basis.outputs, basis.inputs)
    torch.testing.assert_close((vectors * basis.values.flatten()) @ vectors.T, moment)


def test_separable_terms_reproduce_the_scores():
    torch.manual_seed(0)
    inputs = torch.randn(400, 30, dtype=torch.float64) * torch.logspace(0, -2, 30)
    outputs = torch.randn(400, 20, dtype=torch.float64) * torch.logspace(0, -2, 20)
    values = outputs.square().T @ inputs.square() / 400
    inverse = 1 / (values + 0.1 * values.mean())
    rows = Outer(inputs, outputs)
    full = (written_out(rows) * inverse.flatten()) @ written_out(rows).T
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-12):
        u, v = separable(values, inverse, tolerance=tolerance, max_rank=20)
        fast = sum(
            inner([Outer(inputs * b, outputs * a)], [rows]) for a, b in zip(u, v, strict=True)
        )
        errors.append(float((fast - full).norm() / full.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.1
    assert errors[2] < 1e-5
