"""Second edition: records of options, thresholds that belong to scores, files, classes by name."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import EpochScoring
from torch import nn

from skperf.backbone import prediction_time_batch_norm
from skperf.reprogramming import Pixels, Reprogrammer, Training, _program_file
from skperf.reprogramming._training import hold_out
from tests.reprogramming.conftest import assert_same_state, state_of


def test_options_stand_in_records_and_answer_to_their_bare_names(towers, pictures, parameters):
    X, y = pictures
    assert len(inspect.signature(Reprogrammer).parameters) == 24
    given = Training(lr=0.2)
    model = Reprogrammer(towers, training=given, text_lr=0.3, canvas=12)
    assert (given.text_lr, model.training.text_lr, model.training.lr) == ("auto", 0.3, 0.2)
    assert model.get_params()["pixels__canvas"] == 12
    assert clone(model).training.text_lr == 0.3
    with pytest.raises(TypeError, match="learning_rate"):
        Reprogrammer(learning_rate=0.1)
    base = Reprogrammer(towers, **parameters | {"max_epochs": 1})
    search = GridSearchCV(base, {"training__lr": [0.1, 0.2]}, cv=2).fit(X, y)
    assert search.best_estimator_.training.lr in (0.1, 0.2)
    assert base.training is None
    with pytest.raises(ValueError, match="'lr' parameter of Training"):
        Reprogrammer(towers, training=Training(lr=-1), **parameters).fit(X, y)
    with pytest.raises(ValueError, match="'resize' parameter of Pixels"):
        Reprogrammer(towers, pixels=Pixels(resize="round"), **parameters).fit(X, y)


def test_fitted_as_fitted_after_new_parameters(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    scores, inliers = model.score_samples(X), model.predict_inlier(X)
    model.set_params(ood_score="entropy", channels="last", batch_size=7, ood_retention=0.5)
    np.testing.assert_allclose(model.score_samples(X), scores, atol=1e-5)
    np.testing.assert_array_equal(model.predict_inlier(X), inliers)


def test_every_score_has_its_own_threshold(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    assert model.ood_score_ in ("mahalanobis", "knn", "vim")  # can be held against left-out classes
    assert model.ood_threshold_ == model.ood_thresholds_[model.ood_score_]
    assert set(model.ood_thresholds_) >= {"mcm", "energy", "entropy", "knn", "vim", "mahalanobis"}
    for name, threshold in model.ood_thresholds_.items():
        verdict = model.predict_inlier(X, ood_score=name)
        assert ((model.score_samples(X, ood_score=name) >= threshold) == (verdict > 0)).all()
        assert (verdict > 0).mean() > 0.8
    with pytest.raises(ValueError, match="there is no score 'height'"):
        model.score_samples(X, ood_score="height")
    unlabelled = Reprogrammer(towers, class_names=["cat", "dog", "bird"], **parameters).fit(X)
    assert unlabelled.ood_score_ == "mcm"
    assert model.with_classes(["fish", "cat"]).ood_score_ == "max_logit"


def test_cross_fitted_thresholds_keep_fresh_rows(towers, parameters):
    """Ten rows a class and 10 draws: the mean share of fresh rows that is kept."""
    kept = []
    shared = parameters | {"max_epochs": 2, "alpha": 0.0, "class_names": ["cat", "dog", "bird"]}
    for draw in range(10):
        generator = np.random.RandomState(draw)
        y = np.arange(330) % 3
        X = generator.uniform(0, 0.6, (330, 3, 12, 12)).astype(np.float32)
        for row, code in zip(X, y, strict=True):
            row[:, :, 4 * code : 4 * code + 4] += 0.4
        model = Reprogrammer(towers, **shared).fit(X[:30], y[:30])
        kept.append((model.predict_inlier(X[30:]) > 0).mean())
    assert abs(np.mean(kept) - 0.95) < 0.04


def test_thresholds_of_scores_on_outputs_are_read_from_all_rows(towers, parameters):
    """Thirty rows held out would leave the kept share a deviation of .04."""
    kept, shared = [], parameters | {"max_epochs": 1, "class_names": ["cat", "dog", "bird"]}
    for draw in range(8):
        generator = np.random.RandomState(draw)
        X, y = generator.uniform(0, 1, (800, 3, 12, 12)).astype(np.float32), np.arange(800) % 3
        model = Reprogrammer(towers, **shared).fit(X[:300], y[:300])
        inliers = [
            model.predict_inlier(X[300:], ood_score=s) for s in ("mahalanobis", "knn", "vim")
        ]
        kept.append((np.array(inliers) > 0).mean(1))
    assert (np.sqrt(np.mean((np.array(kept) - 0.95) ** 2, 0)) < 0.03).all()


def test_too_few_rows_for_the_retention_are_told(towers, pictures, parameters):
    X, y = pictures
    with pytest.warns(UserWarning, match=r"needs at least 19 rows .* support a retention of 0.90"):
        Reprogrammer(towers, **parameters).fit(X[:9], y[:9])


def test_held_out_rows_come_from_classes_of_few_rows_too():
    codes = np.repeat(np.arange(100), 5)
    train, held_out = hold_out(codes, 0.1, np.random.RandomState(0))
    assert len(held_out) == 50
    assert len(np.union1d(train, held_out)) == 500
    assert (np.bincount(codes[train]) >= 3).all()
    assert len(hold_out(np.arange(30), 0.5, np.random.RandomState(0))[1]) == 0


def test_zero_shot_without_labels_and_classes_by_name(towers, pictures, parameters):
    X, y = pictures
    names = ["bird", "cat", "dog"]
    labelled = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    zero_shot = Reprogrammer(towers, class_names=names, **parameters).fit(X)
    np.testing.assert_allclose(zero_shot.predict_proba(X), labelled.predict_proba(X), atol=1e-6)
    assert zero_shot.classes_.tolist() == names
    with pytest.raises(ValueError, match=r"class_names is needed|requires y"):
        Reprogrammer(towers, **parameters).fit(X)
    model = Reprogrammer(towers, alpha=0.0, **parameters).fit(X, y)
    other = model.with_classes(["horse", "zebra", "cat"], X)
    assert other.classes_.tolist() == ["horse", "zebra", "cat"]
    np.testing.assert_array_equal(other.program_, model.program_)
    np.testing.assert_allclose(
        other.class_embeddings_[2], model.class_embeddings_[1], atol=1e-5
    )  # what was learned of the cat
    assert (other.predict_inlier(X) > 0).mean() > 0.9
    with pytest.raises(ValueError, match="give with_classes some rows"):
        model.with_classes(["horse", "zebra"]).predict_inlier(X)
    fewer = Reprogrammer(towers, class_names=names, **parameters | {"max_epochs": 0})
    assert fewer.fit(X[:5], np.array([0, 2, 0, 2, 0])).classes_.tolist() == [0, 1, 2]


def test_synonyms_prompts_by_class_and_functions(towers, tokenizer, pictures, parameters):
    X, y = pictures
    shared = parameters | {"max_epochs": 0}
    named = {"cat": ["cat", "zebra"], "dog": "dog", "bird": "bird"}
    model = Reprogrammer(towers, class_names=named, **shared).fit(X, y)
    texts = tokenizer(["a photo of a cat", "a photo of a zebra"])
    each = nn.functional.normalize(towers.eval().encode_text(texts), dim=-1)
    mean = nn.functional.normalize(each.mean(0), dim=-1).detach().numpy()
    np.testing.assert_allclose(model.class_embeddings_[1], mean, atol=1e-5)
    own = {"cat": ["a cat", "the cat"], "dog": ["the {}"], "bird": lambda name: f"a {name}"}
    assert Reprogrammer(towers, prompts=own, **shared).fit(X, y).predict(X).shape == (120,)
    with pytest.raises(ValueError, match=r"no entry for the labels \['dog'\]"):
        Reprogrammer(towers, prompts={"cat": "a cat", "bird": "a bird"}, **shared).fit(X, y)


def test_pictures_of_every_kind(towers, pictures, parameters):
    X, y = pictures
    bytes_ = np.round(X * 255).astype(np.uint8)
    model = Reprogrammer(towers, **parameters).fit(bytes_, y)
    expected = model.predict_proba(bytes_)
    photos = [Image.fromarray(x.transpose(1, 2, 0)) for x in bytes_]
    np.testing.assert_allclose(model.predict_proba(photos), expected, atol=1e-6)
    np.testing.assert_allclose(model.predict_proba([*bytes_]), expected, atol=1e-6)

    class OnDisk(torch.utils.data.Dataset):
        def __len__(self):
            return len(bytes_)

        def __getitem__(self, i):
            return torch.tensor(bytes_[i]), 0

    np.testing.assert_allclose(model.predict_proba(OnDisk()), expected, atol=1e-6)
    ragged = [photos[0].resize((30, 20)), photos[1].convert("L"), photos[2].convert("RGBA")]
    assert model.predict(ragged).shape == (3,)
    assert model.predict(bytes_[:2, :1]).shape == (2,)
    assert not hasattr(model, "n_features_in_")
    again = clone(model).fit(photos, y)
    np.testing.assert_allclose(again.predict_proba(bytes_), expected, atol=1e-4)
    last = clone(model).set_params(channels="last").fit(bytes_.transpose(0, 2, 3, 1), y)
    assert last.predict(np.zeros((1, 20, 30, 3), np.uint8)).shape == (1,)


def test_without_a_border_pictures_are_embedded_once(towers, pictures, parameters, monkeypatch):
    X, y = pictures
    seen = []
    encode = type(towers).encode_image
    monkeypatch.setattr(
        type(towers), "encode_image", lambda self, x: (seen.append(len(x)), encode(self, x))[1]
    )
    model = Reprogrammer(towers, **parameters | {"border": 0, "max_epochs": 6}).fit(X, y)
    assert sum(seen) == len(X) + 1 == model.n_queries_
    assert model.history_[-1, "train_loss"] < model.history_[0, "train_loss"]


@pytest.mark.parametrize("head", ["probe", "cache", "adapter", "attributes"])
def test_heads_on_plain_embeddings(towers, pictures, parameters, head, tmp_path):
    X, y = pictures
    more = {"head": head, "border": 0, "prompts": ["a {}", "the {}", "a photo of a {}"]}
    model = Reprogrammer(towers, **parameters | more).fit(X, y)
    assert model.head_ == head
    with torch.no_grad():
        logits = model.to_module()(torch.tensor(X)).numpy()
    np.testing.assert_allclose(logits, model.decision_function(X), atol=1e-4)
    model.save_program(tmp_path / "program.safetensors")
    again = Reprogrammer(towers, tokenizer=parameters["tokenizer"])
    again.load_program(tmp_path / "program.safetensors")
    np.testing.assert_allclose(again.predict_proba(X), model.predict_proba(X), atol=1e-5)


def test_nobody_is_better_off_with_a_probe(towers, parameters):
    generator = np.random.RandomState(0)
    y = np.arange(500) % 3
    X = generator.uniform(0, 0.9, (500, 3, 12, 12)).astype(np.float32)
    for row, code in zip(X, y, strict=True):
        row[:, :, 4 * code : 4 * code + 4] += 0.06
    X = X.clip(0, 1)
    parameters |= {"class_names": ["cat", "dog", "bird"]}
    model = Reprogrammer(towers, **parameters).fit(X[:200], y[:200])
    zero_shot = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X[:200], y[:200])
    probe = LogisticRegression(C=100, max_iter=500).fit(zero_shot.transform(X[:200]), y[:200])
    theirs = probe.score(zero_shot.transform(X[200:]), y[200:])
    assert model.score(X[200:], y[200:]) >= theirs - 2 * np.sqrt(0.25 / 300)


@pytest.mark.parametrize("each", [1, 2])
def test_one_row_a_class_or_two_are_learned_from(towers, pictures, parameters, each):
    X, y = pictures
    rows = np.arange(3 * each)
    with pytest.warns(UserWarning, match="ood_retention"):
        model = Reprogrammer(towers, **parameters).fit(X[rows], y[rows])
    assert model.head_ == "probe"
    zero_shot = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    assert model.score(X, y) > zero_shot.score(X, y)


def test_class_weight_and_augmentation(towers, pictures, parameters):
    X, y = pictures
    kept = np.flatnonzero((y != "bird") | (np.arange(120) % 4 == 0))
    weight = np.where(y[kept] == "bird", 4.0, 1.0)
    shared = parameters | {"validation_fraction": 0.0, "alpha": 0.0, "head": "linear"}
    by_class = {"bird": 4.0, "cat": 1.0, "dog": 1.0}
    one = Reprogrammer(towers, class_weight=by_class, **shared).fit(X[kept], y[kept])
    two = Reprogrammer(towers, **shared).fit(X[kept], y[kept], sample_weight=weight)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    seen = []

    def brighter(images, generator):
        seen.append(images.shape)
        return images + 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)

    model = Reprogrammer(towers, augment=brighter, **shared).fit(X, y)
    assert seen[0][1:] == (3, 12, 12)
    assert not np.array_equal(model.program_, one.program_)
    with pytest.raises(ValueError, match="augment made images of shape"):
        Reprogrammer(towers, augment=lambda images, generator: images[:, :1], **shared).fit(X, y)


def test_programs_that_look_at_the_picture(towers, pictures, parameters):
    X, y = pictures
    plain = Reprogrammer(towers, layout="mask", **parameters | {"max_epochs": 0}).fit(X, y)
    np.testing.assert_allclose(plain.reprogram(X[:4]), X[:4], atol=1e-6)
    model = Reprogrammer(towers, layout="mask", alpha=0.0, **parameters).fit(X, y)
    assert model.history_[-1, "train_loss"] < model.history_[0, "train_loss"]
    assert np.abs(model.reprogram(X[:4]) - X[:4]).max() > 0


def test_context_of_the_prompts_alone(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, text="context", **parameters).fit(X, y)
    assert model.text_delta_.shape == (4, 16)  # a photo of a
    with pytest.raises(ValueError, match="no such words in common"):
        Reprogrammer(towers, text="context", prompts="{}", **parameters).fit(X, y)


def test_probabilities_are_read_by_their_logarithm(pictures):
    X, y = pictures
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(36, 5)).eval()

    def probabilities(images):
        with torch.no_grad():
            return net(torch.tensor(images)).softmax(1).numpy()

    model = Reprogrammer(probabilities, border=2, gradient="spsa", max_epochs=0).fit(X, y)
    expected = np.log(probabilities(X))
    np.testing.assert_allclose(model.transform(X), expected, atol=1e-5)


def test_batch_statistics_on_request(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters | {"batch_size": 120, "alpha": 1.0}).fit(X, y)
    before = state_of(towers)
    bright = (X * 0.5 + 0.4).clip(0, 1)
    ours = model.decision_function(bright, batch_norm="batch")
    with prediction_time_batch_norm(towers):
        np.testing.assert_array_equal(model.decision_function(bright), ours)
    assert not np.allclose(model.decision_function(bright), ours)
    assert_same_state(before, state_of(towers))
    with pytest.raises(ValueError, match="batch_norm must be"):
        model.predict(X, batch_norm="both")


def test_callbacks_are_added(towers, pictures, parameters):
    from skorch.callbacks import Callback, EarlyStopping

    class Mine(Callback):
        pass

    params = {"callbacks": [("mine", Mine())]}
    model = Reprogrammer(towers, net_params=params, **parameters).fit(*pictures)
    assert {"schedule", "mine"} <= {name for name, _ in model.net_.callbacks_}
    for given in (None, Mine()):
        model = Reprogrammer(towers, net_params={"callbacks": given}, **parameters).fit(*pictures)
        assert "schedule" in {name for name, _ in model.net_.callbacks_}
    watching = {"callbacks": [EarlyStopping(monitor="valid_loss")]}
    with pytest.raises(ValueError, match="watch rows held out, but none"):
        Reprogrammer(
            towers, net_params=watching, training=Training(early_stopping=False), **parameters
        ).fit(*pictures)


def test_lists_of_pictures_in_arrays_and_of_16_bits(towers, parameters):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (40, 24, 24, 3), dtype=np.uint8)
    X = np.empty(40, dtype=object)
    X[:] = [Image.fromarray(array) for array in arrays]
    y = np.array(["red", "blue"])[np.arange(40) % 2]
    model = Reprogrammer(towers, **parameters).fit(X, y)
    expected = model.decision_function(arrays.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(model.decision_function(X), expected, atol=1e-5)
    deep = Image.fromarray(arrays[0, ..., 0].astype(np.uint16) * 200)
    with pytest.raises(ValueError, match="more than 8 bits"):
        model.predict([deep])


def test_changed_weights_are_noticed(towers, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(towers, **parameters).fit(X, y)
    towers.visual[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="not those that the program was fitted with"):
        model.predict(X)


def test_normalisation_travels_with_the_program(pictures, tmp_path):
    X, y = pictures
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Flatten(), nn.Linear(6 * 25, 7))
    statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    shared = {"border": 2, "max_epochs": 2, "random_state": 0}
    model = Reprogrammer(net, normalize=statistics, resize="squash", **shared).fit(X, y)
    path = tmp_path / "program.safetensors"
    model.save_program(path)
    again = Reprogrammer(net).load_program(path)
    wide = X[:8, :, :, :9]
    np.testing.assert_allclose(again.predict_proba(wide), model.predict_proba(wide), atol=1e-6)
    assert again.encoder_.mean == statistics[0]
    with pytest.raises(ValueError, match="another preparation of the images"):
        Reprogrammer(net, normalize=((0.5,) * 3, (0.5,) * 3)).load_program(path)


@pytest.mark.parametrize(
    "said",
    [
        {"resize": "contain", "interpolation": "nearest"},
        {"normalize": None},
        {"normalize": ((0.3,) * 3, (0.6,) * 3)},
    ],
)
def test_what_the_writer_said_beside_its_processor_travels(towers, pictures, tmp_path, said):
    X, y = pictures
    processor = {"size": 12, "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear"}
    shared = {"border": 2, "max_epochs": 1, "random_state": 0, "head": "linear"}
    model = Reprogrammer(towers, processor=processor, **shared, **said).fit(X, y)
    path, wide = tmp_path / "program.safetensors", X[:8, :, :, :9]
    model.save_program(path)
    for given in ({}, {"processor": processor}, {"processor": processor, **said}):
        again = Reprogrammer(towers, **given).load_program(path)
        np.testing.assert_allclose(again.predict_proba(wide), model.predict_proba(wide), atol=1e-6)
    with pytest.raises(ValueError, match="another preparation of the images"):
        Reprogrammer(
            towers, processor=processor | {"mean": (0.1,) * 3}, resize="none"
        ).load_program(path)


def test_a_score_of_an_earlier_version_is_told(towers, pictures, parameters, tmp_path):
    path = tmp_path / "program.safetensors"
    model = Reprogrammer(towers, ood_score="mahalanobis", **parameters).fit(*pictures)
    model.save_program(path)

    def older(known, tensors):
        tensors["scorer.whitening"] = tensors.pop("scorer.directions")

    damaged(path, older)
    with pytest.raises(ValueError, match="'mahalanobis' as an earlier version wrote it"):
        Reprogrammer(towers, tokenizer=model.tokenizer).load_program(path)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(LogisticRegression(), "encoder is a LogisticRegression"), (nn.Linear, "class Linear; give")],
)
def test_no_encoder_is_told_before_anything_of_the_rows(encoder, message):
    X, y = np.zeros((6, 12)), np.arange(6) % 2
    with pytest.raises(TypeError, match=message):
        Reprogrammer(encoder).fit(X, y)


def damaged(path, change):
    """Write the program anew after a change of its description and tensors."""
    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["skperf_program"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(known, tensors)
    known["checksum"] = _program_file._checksum(known, tensors)
    save_file(tensors, path, metadata={"skperf_program": json.dumps(known)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda k, t: t.pop("image"), r"lacks the tensors \['image'\]"),
        (lambda k, t: t.update(picture=t.pop("image")), "lacks the tensors"),
        (lambda k, t: t.update(more=torch.zeros(3)), r"'unknown': \['more'\]"),
        (lambda k, t: t.update(text=t["text"][:-1].clone()), "of another shape"),
        (lambda k, t: k.update(classes=["cat", "cat", "dog"]), "not all different"),
        (lambda k, t: k.update(classes=["cat", "dog"]), "names 3 of 2 classes"),
        (lambda k, t: k.update(canvas=[10**6, 10**6]), "its canvas"),
        (lambda k, t: k.update(canvas=[13, 12]), "has 84 pixels"),
        (lambda k, t: k.update(text=[10**6, 10**6, 0]), "of another shape"),
        (lambda k, t: t.pop("used_tokens"), "lacks or garbles 'used_tokens'"),
        (
            lambda k, t: (k["parameters"].update(layout="mask"), k.update(canvas=[8192, 8192])),
            "have more weights than",
        ),
        (lambda k, t: k["choice"].update(alpha=2.0), "alpha is not in"),
        (lambda k, t: k["choice"]["thresholds"].update(mcm=float("nan")), "not finite"),
        (lambda k, t: t["image"].fill_(float("nan")), "'image' holds values that are not finite"),
        (lambda k, t: k.pop("canvas"), "lacks or garbles 'canvas'"),
        (lambda k, t: k.update(format=1), "save the program anew"),
        (lambda k, t: k.update(pipeline=[]), "lacks or garbles"),
        (lambda k, t: k.update(classes="abc"), "program.safetensors"),
        (lambda k, t: k.update(module_head={}), "program.safetensors"),
        (lambda k, t: k.update(outputs=[]), "program.safetensors: not enough values"),
        (lambda k, t: k.update(set_canvas=10**9), "its canvas 1000000000 is another"),
    ],
    ids=range(21),
)
def test_damaged_files_are_refused(towers, pictures, parameters, tmp_path, change, match):
    X, y = pictures
    model = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    path = tmp_path / "program.safetensors"
    model.save_program(path)
    damaged(path, change)
    reader = Reprogrammer(towers, tokenizer=parameters["tokenizer"])
    before = dict(vars(reader))
    with pytest.raises(ValueError, match=match):
        reader.load_program(path)
    assert vars(reader) == before


def test_callbacks_are_dropped_on_request(towers, pictures, parameters):
    X, y = pictures
    shared = parameters | {"validation_fraction": 0.0, "alpha": 0.0, "lr": 0.05, "border": 0}
    shared |= {"text": "bias"}
    bare = Reprogrammer(towers, net_params={"callbacks": "disable"}, **shared).fit(X, y)
    assert bare.net_.callbacks_ == []
    assert {group["lr"] for group in bare.net_.optimizer_.param_groups} >= {0.05}
    assert bare.n_iter_ == parameters["max_epochs"]
    with pytest.raises(ValueError, match="'disable' without early stopping"):
        clone(bare).set_params(early_stopping=True).fit(X, y)
    with pytest.raises(ValueError, match="callbacks is 'none'"):
        Reprogrammer(towers, net_params={"callbacks": "none"}, **shared).fit(X, y)


def test_flat_rows_with_their_channels_last(towers, pictures, parameters):
    X, y = pictures
    shared = parameters | {"max_epochs": 0, "image_shape": (12, 12, 3), "channels": "last"}
    flat = np.moveaxis(X, 1, -1).reshape(len(X), -1)
    model = Reprogrammer(towers, **shared).fit(flat, y)
    plain = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(flat), plain.predict_proba(X))


def test_synonyms_in_a_set_have_one_order(towers, pictures, parameters):
    X, y = pictures
    names = {"cat": {"cat", "zebra", "quux"}, "dog": "dog", "bird": ("bird", "fish")}
    model = Reprogrammer(towers, class_names=names, **parameters | {"max_epochs": 0}).fit(X, y)
    assert model.class_names_ == ["bird", "cat", "dog"]


def test_thresholds_of_flat_rows_keep_fresh_ones():
    """No encoder, 40 rows of two classes and 12 draws: the mean share that is kept."""
    kept = []
    for draw in range(12):
        generator = np.random.RandomState(draw)
        y = np.arange(340) % 2
        X = generator.normal(size=(340, 4)) + 2 * y[:, None]
        model = Reprogrammer(max_epochs=3, random_state=0).fit(X[:40], y[:40])
        kept.append((model.predict_inlier(X[40:]) > 0).mean())
    assert abs(np.mean(kept) - 0.95) < 0.04


@pytest.mark.parametrize("on_train", [True, False])
def test_scorers_among_the_callbacks_see_the_classes(towers, pictures, parameters, on_train):
    X, y = pictures
    scorer = EpochScoring("accuracy", name="right", on_train=on_train, lower_is_better=False)
    shared = parameters | {"max_epochs": 2, "early_stopping": True, "validation_fraction": 0.3}
    model = Reprogrammer(towers, net_params={"callbacks": scorer}, **shared).fit(X, y)
    plain = Reprogrammer(towers, **shared).fit(X, y)
    right = np.array(model.history_[:, "right"])
    assert len(right) == 2
    assert ((right >= 0) & (right <= 1)).all()
    np.testing.assert_array_equal(model.predict_proba(X), plain.predict_proba(X))


def test_a_processor_of_another_size_is_refused_by_name(pictures):
    transformers = pytest.importorskip("transformers")
    processor = transformers.PerceiverImageProcessorPil(
        size={"height": 12, "width": 12}, crop_size={"height": 14, "width": 14}
    )
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    net(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match=r"processor Perceiver.* does more .* or in size"):
        Reprogrammer(net, processor=processor, border=2, max_epochs=0).fit(*pictures)
