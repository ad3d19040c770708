import io
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn
from torch.nn import functional

from skperf.backbone.views import view
from skperf.reprogramming import RELEASED_SETTINGS, Reprogrammer
from tests.reprogramming.conftest import assert_same_state, state_of


def zero_shot_logits(towers, tokenizer, X, names):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (towers.mean, towers.std))
    towers = view(towers)
    with torch.no_grad():
        u = functional.normalize(towers.encode_image((torch.tensor(X) - mean) / std), dim=-1)
        texts = tokenizer([f"a photo of a {name}" for name in names])
        q = functional.normalize(towers.encode_text(texts), dim=-1)
    return (towers.logit_scale.exp() * u @ q.T).detach().numpy()


def test_no_epochs_is_zero_shot_exactly(towers, tokenizer, pictures, parameters):
    X, y = pictures
    expected = zero_shot_logits(towers, tokenizer, X, ["bird", "cat", "dog"])
    for alpha in ("auto", 0.0, 0.4, 1.0):
        model = Reprogrammer(towers, **parameters | {"max_epochs": 0, "alpha": alpha}).fit(X, y)
        np.testing.assert_allclose(model.decision_function(X), expected, atol=2e-5)
        assert not model.program_.any()
        assert not model.text_delta_.any()


def test_alpha_one_is_zero_shot_after_training(towers, tokenizer, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, alpha=1.0, **parameters).fit(X, y)
    expected = zero_shot_logits(towers, tokenizer, X, ["bird", "cat", "dog"])
    np.testing.assert_allclose(model.decision_function(X), expected, atol=2e-5)
    assert model.program_.any()


def test_training_lowers_the_loss_and_leaves_the_encoder(towers, pictures, parameters):
    X, y = pictures
    before = state_of(towers)
    stream = torch.get_rng_state()
    model = Reprogrammer(towers, **parameters | {"max_epochs": 10, "alpha": 0.0}).fit(X, y)
    model.predict(X)
    model.alpha_path(X, y)
    assert_same_state(before, state_of(towers))
    assert torch.equal(stream, torch.get_rng_state())
    losses = model.history_[:, "train_loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert len(losses) == model.n_iter_ == 10
    assert set(dict(model.net_.module_.named_parameters())) == {"image", "text", "head.weight"}


@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError("broken"), FloatingPointError])
def test_encoder_survives_an_exception(towers, pictures, parameters, raised, tower, monkeypatch):
    X, y = pictures
    before = state_of(towers)
    calls = []
    encode = getattr(type(towers), tower)

    def failing(self, inputs):
        calls.append(1)
        if len(calls) == 4:
            raise raised
        return encode(self, inputs)

    monkeypatch.setattr(type(towers), tower, failing)
    model = Reprogrammer(towers, **parameters)
    with pytest.raises(raised if isinstance(raised, type) else type(raised)):
        model.fit(X, y)
    assert_same_state(before, state_of(towers))
    with pytest.raises(NotFittedError):
        model.predict(X)


def test_divergence_names_the_rate_and_leaves_nothing_half_fitted(towers, pictures, parameters):
    X, y = pictures
    wild = {**parameters, "lr": 1e25, "bound": "none", "weight_decay": 1.0}
    model = Reprogrammer(towers, **wild)
    with pytest.raises(FloatingPointError, match=r"became inf in epoch \d+ at lr=1e\+25.*Lower lr"):
        model.fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)
    assert not hasattr(model, "classes_")
    model.set_params(**parameters, lr="auto", bound="tanh", weight_decay=0.0).fit(X, y)
    before = dict(vars(model))
    with pytest.raises(FloatingPointError):
        model.set_params(**wild).fit(X, y)
    assert {n: v for n, v in vars(model).items() if n.endswith("_")} == {
        n: v for n, v in before.items() if n.endswith("_")
    }


def test_border_solves_what_only_a_border_can():
    """The encoder sees one pixel of the edge only; its sign decides for all pictures."""

    class Edge(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))
            self.last = nn.Linear(2, 2)
            with torch.no_grad():
                self.last.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 40.0]]))
                self.last.bias.copy_(torch.tensor([0.0, -20.0]))

        def forward(self, images):
            middle = images[:, 0, 3:5, 3:5].mean((1, 2))
            edge = images[:, 0, 0, 0] * self.factor
            return self.last(torch.stack([middle, edge], 1))

    X = np.zeros((60, 1, 8, 8), dtype=np.float32)
    y = np.arange(60) % 2
    X[:, 0, 3:5, 3:5] = y[:, None, None]
    parameters = {"border": 2, "mapping": np.eye(2), "batch_size": 60, "random_state": 0}
    plain = Reprogrammer(Edge(), max_epochs=0, **parameters).fit(X, y)
    assert plain.score(X, y) == 0.5
    model = Reprogrammer(Edge(), max_epochs=80, lr=0.1, **parameters).fit(X, y)
    assert model.score(X, y) == 1.0
    assert model.program_[0, 0, 0] == pytest.approx(0.45, abs=0.05)
    assert not model.program_[:, 2:-2, 2:-2].any()


def test_unused_rows_and_other_words_stay(towers, tokenizer, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    assert model.used_tokens_.tolist() == [3, 4, 5, 7, 8, 9]
    assert np.abs(model.text_delta_).sum(1).all()
    program, delta = model.net_.module_.text_program, model.net_.module_.text
    ids = tokenizer(["the zebra"])
    hook = program.hook(delta)
    assert torch.equal(model.encoder_.encode_text(ids, hook), towers.encode_text(ids))


def test_alpha_path_equals_refits(towers, pictures, parameters):
    X, y = pictures
    alphas = (0.0, 0.3, 1.0)
    path = Reprogrammer(towers, **parameters).fit(X, y).alpha_path(X, y, alphas)
    for alpha, accuracy, score in zip(alphas, path.accuracy, path.score, strict=True):
        refit = Reprogrammer(towers, alpha=alpha, **parameters).fit(X, y)
        assert accuracy == pytest.approx(refit.score(X, y))
        assert score == pytest.approx(refit.score_samples(X).mean(), rel=1e-5)


def test_auto_alpha_is_at_least_as_good_as_both_ends(towers, pictures, parameters):
    model = Reprogrammer(towers, **parameters).fit(*pictures)
    curve = model.alpha_curve_
    assert curve.alphas[0] == 0
    assert curve.alphas[-1] == 1
    assert curve.accuracy[curve.alphas.index(model.alpha_)] == pytest.approx(max(curve.accuracy))


def test_list_of_alphas_is_kept_to(towers, pictures, parameters):
    model = Reprogrammer(towers, alpha=[0.2, 0.7], **parameters).fit(*pictures)
    assert model.alpha_ in (0.2, 0.7)


def test_predictions_agree(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, alpha=0.4, **parameters).fit(X, y)
    logits = model.decision_function(X)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)
    assert (model.classes_[logits.argmax(1)] == model.predict(X)).all()
    embeddings = model.transform(X)
    expected = model.logit_scale_ * embeddings @ model.class_embeddings_.T
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    module = model.to_module()
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.tensor(X)).numpy(), logits, atol=1e-4)
    assert module.model is not towers
    own = dict(module.model.named_parameters())
    assert all(own[n].data_ptr() == p.data_ptr() for n, p in towers.named_parameters())
    names = model.get_feature_names_out()
    assert names[0] == "reprogrammer0"
    assert len(names) == embeddings.shape[1]


def test_two_classes_have_one_decision(towers, pictures, parameters):
    X, y = pictures
    X, y = X[y != "bird"], y[y != "bird"]
    model = Reprogrammer(towers, **parameters).fit(X, y)
    decision = model.decision_function(X)
    assert decision.shape == (len(X),)
    assert ((decision > 0) == (model.predict(X) == model.classes_[1])).all()


def test_forms_of_images_agree(towers, pictures, parameters):
    X, y = (part[:60] for part in pictures)
    parameters |= {"max_epochs": 1}
    bytes_ = np.round(X * 255).astype(np.uint8)
    floats = bytes_.astype(np.float32) / 255
    expected = Reprogrammer(towers, **parameters).fit(floats, y).predict_proba(floats)
    forms = {
        "uint8": (bytes_, {}),
        "flat": (floats.reshape(len(X), -1), {"image_shape": (3, 12, 12)}),
        "last": (np.moveaxis(floats, 1, -1), {"channels": "last"}),
        "range": (floats * 2 - 1, {"input_range": (-1.0, 1.0)}),
        "tensor": (torch.tensor(floats), {}),
    }
    for name, (form, more) in forms.items():
        model = Reprogrammer(towers, **parameters, **more).fit(form, y)
        np.testing.assert_allclose(model.predict_proba(form), expected, atol=1e-4, err_msg=name)


def test_one_channel_of_another_size(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X[:, :1, ::2, ::2], y)
    seen = model.reprogram(X[:3, :1, ::2, ::2])
    assert seen.shape == (3, 3, 12, 12)
    assert seen.min() >= 0
    assert seen.max() <= 1
    np.testing.assert_array_equal(seen[:, 0, 2:-2, 2:-2], seen[:, 1, 2:-2, 2:-2])


@pytest.mark.parametrize("score", ["mcm", "max_logit", "energy", "entropy", "disagreement"])
def test_threshold_keeps_the_share_of_held_out_rows(towers, pictures, parameters, score):
    X, y = pictures
    parameters |= {"validation_fraction": 0.5, "ood_score": score, "ood_retention": 0.8}
    model = Reprogrammer(towers, **parameters).fit(X, y)
    verdict = model.predict_inlier(X)
    assert set(verdict) <= {1, -1}
    assert (verdict == 1).mean() > 0.6
    assert ((model.score_samples(X) >= model.ood_threshold_) == (verdict == 1)).all()


def test_sample_weight_zero_is_absence(towers, pictures, parameters):
    X, y = pictures
    parameters |= {"batch_size": 500, "validation_fraction": 0.0}
    weight = np.tile([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], 20)
    weighted = Reprogrammer(towers, **parameters).fit(X, y, sample_weight=weight)
    part = Reprogrammer(towers, **parameters).fit(X[weight > 0], y[weight > 0])
    np.testing.assert_allclose(weighted.program_, part.program_, atol=1e-5)
    np.testing.assert_allclose(weighted.text_delta_, part.text_delta_, atol=1e-5)


def test_clone_shares_and_pickle_carries_the_encoder(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters)
    assert clone(model).encoder is towers
    assert clone(make_pipeline(model)).steps[0][1].encoder is towers
    model.fit(X, y)
    assert clone(model).fit(X, y).encoder_.model is towers
    stream = io.BytesIO()
    pickle.dump(model, stream)
    again = pickle.loads(stream.getvalue())
    assert again.encoder is not towers
    assert again.encoder is again.encoder_.model is again.net_.module_.encoder.model
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    again.partial_fit(X, y)
    size = sum(t.numel() * t.element_size() for t in towers.state_dict().values())
    assert len(stream.getvalue()) < size + 100_000


def test_saved_program_is_small_and_knows_its_encoder(towers, pictures, parameters, tmp_path):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    path = tmp_path / "program.safetensors"
    model.save_program(path)
    assert path.stat().st_size < 20_000
    fresh = Reprogrammer(towers, tokenizer=parameters["tokenizer"]).load_program(path)
    np.testing.assert_array_equal(fresh.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(fresh.predict_inlier(X), model.predict_inlier(X))
    assert fresh.border == 2
    torch.manual_seed(1)
    other = type(towers)()
    with pytest.raises(ValueError, match="made for another encoder: its fingerprint is"):
        Reprogrammer(other, tokenizer=parameters["tokenizer"]).load_program(path)


def test_grid_search_in_two_processes(towers, pictures, parameters):
    X, y = pictures
    grid = {"border": [1, 3], "prompts": ["a {}", "a photo of the {}"]}
    parameters |= {"max_epochs": 1}
    search = GridSearchCV(Reprogrammer(towers, **parameters), grid, cv=2, n_jobs=2)
    search.fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.encoder is towers


def test_pipeline_and_same_seed_same_result(towers, pictures, parameters):
    X, y = pictures
    pipeline = make_pipeline(FunctionTransformer(), Reprogrammer(towers, **parameters))
    probabilities = [clone(pipeline).fit(X, y).predict_proba(X) for _ in range(2)]
    np.testing.assert_array_equal(*probabilities)


def test_partial_fit_goes_on(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters | {"lr": 0.05, "alpha": 0.0})
    model.partial_fit(X[y != "bird"], y[y != "bird"], classes=["bird", "cat", "dog"])
    losses = [model.history_[-1, "train_loss"]]
    for _ in range(8):
        model.partial_fit(X, y)
        losses.append(model.history_[-1, "train_loss"])
    assert losses[-1] < losses[1]
    assert model.n_iter_ == 9
    with pytest.raises(ValueError, match="not among the classes"):
        model.partial_fit(X, np.where(y == "cat", "fish", y))


def test_failed_partial_fit_keeps_the_last_state(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, bound="none", weight_decay=1.0, **parameters)
    model.partial_fit(X, y)
    expected = model.predict_proba(X)
    for group in model.net_.optimizer_.param_groups:
        group["lr"] = 1e25
    with pytest.raises(FloatingPointError):
        model.partial_fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), expected)


def test_early_stopping_goes_back_to_the_best(towers, pictures, parameters):
    X, y = pictures
    y = np.random.RandomState(0).permutation(y)  # nothing to learn but by heart
    parameters |= {"max_epochs": 60, "early_stopping": True, "n_iter_no_change": 2, "lr": 0.5}
    parameters |= {"schedule": "constant", "alpha": 0.0, "training_alpha": 0.0, "text_lr": 0.1}
    model = Reprogrammer(towers, validation_fraction=0.3, **parameters).fit(X, y)
    losses = model.history_[:, "valid_loss"]
    assert len(losses) < 60
    assert model.alpha_curve_.loss[0] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("head", ["prompts", "linear"])
def test_heads_of_a_text_image_encoder_start_from_the_prompts(
    towers, tokenizer, pictures, parameters, head
):
    X, y = pictures
    model = Reprogrammer(towers, head=head, **parameters | {"max_epochs": 0}).fit(X, y)
    expected = zero_shot_logits(towers, tokenizer, X, ["bird", "cat", "dog"])
    np.testing.assert_allclose(model.decision_function(X), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["none", "bias", "position", "table", "table+position"])
@pytest.mark.parametrize("layout", ["overlay", "pad"])
def test_every_program_trains(towers, pictures, parameters, kind, layout):
    X, y = pictures
    model = Reprogrammer(towers, text=kind, layout=layout, **parameters).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()
    assert (model.text_delta_ is None) == (kind == "none")


def test_released_settings_run(towers, pictures, parameters):
    X, y = pictures
    more = {k: parameters[k] for k in ("tokenizer", "border", "max_epochs", "random_state")}
    model = Reprogrammer.released(towers, **more, warmup=0.1).fit(X, y)
    assert model.alpha_ == 0.4
    assert model.objective == RELEASED_SETTINGS["objective"] == "contrastive"
    assert len(model.text_delta_) == len(model.used_tokens_) + 8


def test_calibrated_scale_lowers_the_loss(towers, pictures, parameters):
    X, y = pictures
    codes = np.searchsorted(np.unique(y), y)

    def loss(scale):
        model = Reprogrammer(towers, logit_scale=scale, **parameters | {"max_epochs": 0})
        probabilities = model.fit(X, y).predict_proba(X)
        return model.logit_scale_, -np.log(probabilities[np.arange(len(y)), codes]).mean()

    best, lowest = loss("calibrated")
    assert all(loss(factor * best)[1] > lowest for factor in (0.8, 1.25))


def test_flat_rows_of_any_range_need_no_encoder():
    generator = np.random.RandomState(0)
    X = generator.normal(1e6, 1e3, (200, 5))
    y = np.where(X[:, 0] > 1e6, "above", "below")
    model = Reprogrammer(random_state=0).fit(X, y)
    assert model.score(X, y) > 0.9
    with pytest.raises(ValueError, match="Use pickle"):
        model.save_program("nowhere")


@pytest.mark.cuda
def test_work_on_another_device_leaves_the_encoder_where_it_is(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, device="cuda", **parameters).fit(X, y)
    assert next(towers.parameters()).device.type == "cpu"
    assert model.encoder_.device.type == "cuda"
    here = Reprogrammer(towers, **parameters).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), here.predict_proba(X), atol=1e-2)
