"""Every refusal, by its message and before any training."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from skperf.reprogramming import Reprogrammer


@pytest.fixture
def logits():
    return nn.Sequential(nn.Conv2d(3, 2, 3, stride=3), nn.Flatten(), nn.Linear(32, 4))


def refuse(model, X, y, match, error=ValueError):
    with pytest.raises(error, match=match):
        model.fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda X: X[:, 0], "X has 3 dimensions; expected images"),
        (lambda X: X[None], "sample|X has 5 dimensions"),
        (lambda X: X.reshape(len(X), -1), "flat rows of 432 values; say image_shape"),
        (lambda X: X[:, :2], "X has 2 channels, expected 1 or 3"),
        (lambda X: np.moveaxis(X, 1, -1), "set channels='last'"),
        (lambda X: np.where(X[0, 0, 0, 0] == X, np.nan, X), "NaN"),
        (lambda X: np.where(X[0, 0, 0, 0] == X, np.inf, X), "infinity"),
        (lambda X: X * 3 - 1, r"values from -0.9999 to .*\[0, 1\] or uint8. Already normalised\?"),
        (lambda X: (X * 255).astype(int), r"expected floats in \[0, 1\] or uint8"),
    ],
    ids=["3-D", "5-D", "flat", "channels", "last", "NaN", "inf", "range", "integers"],
)
def test_images(towers, pictures, parameters, change, match):
    X, y = pictures
    refuse(Reprogrammer(towers, **parameters), change(X), y, match)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"border": -2}, "border=-2 does not fit"),
        ({"border": 6}, "border=6 does not fit a canvas of 12 x 12 .* at most 5"),
        ({"border": 16}, "border=16 does not fit a canvas of 12 x 12"),
        ({"class_names": ["cat", "dog"]}, "2 names but y has the 3 classes"),
        (
            {"class_names": ["cat", "dog", "bird"]},
            r"the labels in another order than \['bird', 'cat', 'dog'\]",
        ),
        ({"class_names": {"cat": "cat"}}, r"no name for the labels \['bird', 'dog'\]"),
        ({"prompts": "a photo"}, r"'a photo' has no '\{\}'"),
        ({"prompts": ["a {}", "cat"]}, r"'cat' has no '\{\}'"),
        ({"prompts": "a " * 9 + "{}"}, "the text tower takes 8"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\]"),
        ({"alpha": [0.0, 2.0]}, r"alpha must lie in \[0, 1\]"),
        ({"head": "mapping"}, "needs an encoder that returns logits .* returns embeddings"),
        ({"tokenizer": None}, "give tokenizer="),
        ({"lr": -1.0}, "'lr' parameter"),
        ({"layout": "round"}, "'layout' parameter"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)) + str(value),
)
def test_parameters(towers, pictures, parameters, more, match):
    X, y = pictures
    refuse(Reprogrammer(towers, **parameters | more), X, y, match)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"alpha": 0.4}, "no zero-shot head. Use alpha=0"),
        ({"alpha": [0.0, 1.0]}, "no zero-shot head"),
        ({"head": "prompts"}, "needs an encoder with a text tower"),
        ({"text": "table"}, "needs an encoder with a text tower"),
        ({"mapping": "ilm", "mapping_m": 2}, "needs 6 source labels for 3 classes"),
        ({"mapping": "flm", "mapping_m": 2}, "the encoder has 4"),
        ({"mapping": "rlm", "mapping_m": 2}, "the encoder has 4"),
        ({"mapping": np.ones((3, 4))}, r"shape \(3, 4\), expected \(4, 3\)"),
        ({"mapping": np.full((4, 3), np.nan)}, "not finite"),
        ({"ood_score": "disagreement"}, "ood_score='disagreement' compares"),
    ],
    ids=range(10),
)
def test_encoders_without_text(logits, pictures, more, match):
    refuse(Reprogrammer(logits, border=2, **more), *pictures, match)


def test_mapping_on_features(logits, pictures):
    model = Reprogrammer(logits[:2], border=2, head="mapping")
    refuse(model, *pictures, "needs an encoder that returns logits .* returns features")


def test_channels_that_the_encoder_does_not_take(pictures):
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(200, 4))
    refuse(Reprogrammer(grey, border=2), *pictures, "X has 3 channels; the encoder takes 1")


def test_size_that_the_encoder_does_not_take(logits, pictures):
    model = Reprogrammer(logits, border=2, canvas=20)
    refuse(model, *pictures, r"does not take images of shape \(3, 20, 20\)")


@pytest.mark.parametrize("shape", [(3, 12, 13), (11, 12), (432,)])
def test_image_shape_that_does_not_fit(towers, pictures, parameters, shape):
    X, y = pictures
    model = Reprogrammer(towers, image_shape=shape, **parameters)
    refuse(model, X.reshape(len(X), -1), y, "does not make 432 values")


def test_callable_has_no_gradient(pictures):
    model = Reprogrammer(lambda images: images.mean((2, 3)), border=2)
    refuse(model, *pictures, "no gradient; use gradient='spsa' or 'rge'")


def test_callable_with_scores_of_the_wrong_shape(pictures):
    model = Reprogrammer(lambda images: images.mean(), border=2, gradient="spsa")
    refuse(model, *pictures, "turned 1 images into an array of shape")


def test_one_class(towers, pictures, parameters):
    X, _ = pictures
    refuse(Reprogrammer(towers, **parameters), X, np.zeros(len(X)), "one class only")


def test_a_fit_that_breaks_off_leaves_the_one_before(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    before, expected = dict(vars(model)), model.predict_proba(X)
    with pytest.raises(ValueError, match="2 names"):
        model.set_params(class_names=["cat", "dog"]).fit(X, y)
    with pytest.raises(ValueError, match="NaN"):
        model.set_params(class_names=None).fit(np.full_like(X, np.nan), y)
    assert vars(model) == before
    np.testing.assert_array_equal(model.predict_proba(X), expected)


def test_class_absent_from_the_fold(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, class_names=["bird", "cat", "dog"], **parameters)
    refuse(model, X[y != "dog"], y[y != "dog"], "Where a fold lacks a class, split by class")
    by_label = dict.fromkeys(["bird", "cat", "dog", "fish"], "bird")
    with pytest.warns(UserWarning, match="cannot tell the names of some classes apart"):
        Reprogrammer(towers, class_names=by_label, **parameters).fit(X[y != "dog"], y[y != "dog"])


def test_alpha_path_without_zero_shot_head(logits, pictures):
    model = Reprogrammer(logits, border=2, max_epochs=1).fit(*pictures)
    with pytest.raises(ValueError, match="there is no alpha to vary"):
        model.alpha_path(*pictures)


def test_range_is_checked_in_prediction_too(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    with pytest.raises(ValueError, match="Already normalised"):
        model.predict(X * 5)


def test_file_that_holds_no_program(towers, tokenizer, tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no program of a Reprogrammer"):
        Reprogrammer(towers, tokenizer=tokenizer).load_program(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("labels", "alphas", "match"),
    [
        (lambda y: np.where(y == "cat", None, y.astype(object)), (0, 1), "y contains NaN"),
        (lambda y: np.where(y == "cat", 3, y.astype(object)), (0, 1), "y mixes texts"),
        (lambda y: y[:5], (0, 1), "12 pictures and y 5 labels"),
        (lambda y: np.where(y == "cat", "cow", y), (0, 1), "not among the classes: .*cow"),
        (lambda y: y, (0, 2), r"alpha must lie in \[0, 1\]"),
        (lambda y: y, "half", r"alpha must lie in \[0, 1\]"),
        (lambda y: y, (), r"alpha must lie in \[0, 1\]"),
    ],
    ids=["none", "mixed", "short", "unknown", "alpha", "word", "empty"],
)
def test_alpha_path_names_the_argument(towers, pictures, parameters, labels, alphas, match):
    X, y = pictures[0][:12], pictures[1][:12]
    model = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    with pytest.raises(ValueError, match=match):
        model.alpha_path(X, labels(y), alphas)
    assert model.alpha_path(X, y, 0.5).alphas == [0.5]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_epochs": 0}, {"head": "probe"}])
@pytest.mark.filterwarnings("ignore:ood_retention")
def test_a_single_row_is_enough(towers, pictures, parameters, labelled, options):
    X, names = pictures[0][:1], ["cat", "dog", "bird"]
    shared = parameters | {"class_names": names} | options
    model = Reprogrammer(towers, **shared).fit(X, [0] if labelled else None)
    assert np.isfinite(model.predict_proba(pictures[0])).all()
    if labelled:
        assert (model.classes_ == [0, 1, 2]).all()
    assert model.predict_inlier(X) == [1]


class Spectral(nn.Module):
    """Computes in numpy, or lets go of its input, so that no gradient comes through."""

    def __init__(self, cut):
        super().__init__()
        self.layer, self.cut, self.image_size = nn.Linear(192, 10), cut, 8

    def forward(self, images):
        if self.cut == "detach":
            return self.layer(images.detach().flatten(1))
        return self.layer(torch.as_tensor(np.abs(images.numpy())).flatten(1))


@pytest.mark.parametrize("cut", ["numpy", "detach"])
@pytest.mark.parametrize("layout", ["overlay", "mask"])
def test_an_encoder_without_gradients_is_refused_by_name_where_a_picture_is_trained(cut, layout):
    X, y = np.random.default_rng(0).random((30, 3, 8, 8), np.float32), np.arange(30) % 3
    model = Reprogrammer(Spectral(cut), layout=layout, border=1, max_epochs=1, random_state=0)
    with pytest.raises(ValueError, match=r"Spectral lets no gradient.*border=0.*'spsa'"):
        model.fit(X, y)


@pytest.mark.parametrize("cut", ["numpy", "detach"])
def test_an_encoder_without_gradients_serves_by_its_features_or_by_calls(cut):
    X, y = np.random.default_rng(0).random((200, 3, 8, 8), np.float32), np.arange(200) % 3

    def brighter(images, generator):
        return images + 0.01

    for options in ({"border": 0}, {"border": 0, "augment": brighter}, {"gradient": "spsa"}):
        options = {"border": 1, "head": "linear", "max_epochs": 1, "random_state": 0} | options
        model = Reprogrammer(Spectral(cut), **options)
        assert np.isfinite(model.fit(X, y).predict_proba(X)).all()
