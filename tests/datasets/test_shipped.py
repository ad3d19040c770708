import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from skperf import datasets
from skperf.datasets._shipped import data_file

LOADERS = {
    "load_fashion_mnist": (3000, 784, (28, 28), 10),
    "load_faces": (200, 1728, (3, 24, 24), 2),
    "load_emoji": (600, 3072, (3, 32, 32), 8),
}


@pytest.mark.parametrize("name", LOADERS)
def test_images_and_flat_rows_hold_the_same_pixels(name):
    n, n_features, shape, n_classes = LOADERS[name]
    bunch = getattr(datasets, name)()
    assert bunch.images.shape == (n, *shape)
    assert bunch.images.dtype == np.uint8
    assert bunch.data.shape == (n, n_features)
    assert bunch.data.dtype == np.float32
    np.testing.assert_allclose(bunch.data * 255, bunch.images.reshape(n, -1), atol=1e-4)
    assert bunch.data.max() == 1
    assert bunch.target_names.shape == (n_classes,)
    assert set(bunch.target) == set(range(n_classes))
    assert bunch.target.dtype == np.int64
    assert bunch.DESCR


@pytest.mark.parametrize("name", [*LOADERS, "load_email_vectors"])
def test_return_X_y_gives_the_same_rows(name):
    load = getattr(datasets, name)
    bunch = load()
    data, target = load(return_X_y=True)
    np.testing.assert_array_equal(data, bunch.data)
    np.testing.assert_array_equal(target, bunch.target)


def test_fashion_mnist_is_balanced_in_both_subsets():
    train, test = (datasets.load_fashion_mnist(subset=subset) for subset in ("train", "test"))
    assert np.bincount(train.target).tolist() == [100] * 10
    assert np.bincount(test.target).tolist() == [200] * 10
    assert train.is_train.all()
    assert not test.is_train.any()
    everything = datasets.load_fashion_mnist()
    np.testing.assert_array_equal(everything.data[everything.is_train], train.data)
    np.testing.assert_array_equal(everything.data[~everything.is_train], test.data)


def test_no_test_row_of_fashion_mnist_is_a_training_row():
    train, test = (datasets.load_fashion_mnist(subset=subset) for subset in ("train", "test"))
    assert not {row.tobytes() for row in train.images} & {row.tobytes() for row in test.images}


def test_emoji_rows_are_the_same_in_both_styles():
    google, twitter = (datasets.load_emoji(style) for style in ("google", "twitter"))
    np.testing.assert_array_equal(google.names, twitter.names)
    np.testing.assert_array_equal(google.target, twitter.target)
    assert google.is_train.sum() == 300
    assert len(datasets.load_emoji(subset="test").names) == 300
    # The same things drawn by other hands: like each other, never equal.
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(google.data, twitter.data, strict=True)]
    assert 0.4 < np.mean(correlations) < 0.95


def test_email_vectors_are_unit_vectors_that_tell_spam():
    emails = datasets.load_email_vectors()
    np.testing.assert_allclose(np.linalg.norm(emails.data, axis=1), 1, atol=1e-2)
    assert np.bincount(emails.target).tolist() == [300, 300]
    # the beginnings are of the same mails, and lead to nobody
    counts = CountVectorizer(binary=True, min_df=3).fit_transform(emails.texts)
    words = LogisticRegression(max_iter=1000).fit(counts[:400], emails.target[:400])
    assert words.score(counts[400:], emails.target[400:]) > 0.8
    addresses = set(re.findall(r"\S+@\S+", " ".join(emails.texts)))
    assert all("someone@example.org".startswith(each) for each in addresses)
    model = LogisticRegression(C=10, max_iter=1000).fit(emails.data[:400], emails.target[:400])
    assert model.score(emails.data[400:], emails.target[400:]) > 0.88


@pytest.mark.parametrize("load", [datasets.load_fashion_mnist, datasets.load_emoji])
def test_unknown_subset_is_refused(load):
    with pytest.raises(ValueError, match="subset must be 'all', 'train' or 'test', got 'unseen'"):
        load(subset="unseen")


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style must be 'google' or 'twitter', got 'apple'"):
        datasets.load_emoji("apple")


def test_every_shipped_file_has_a_licence_note():
    notes = data_file("LICENSES.md").read_text()
    files = [path.name for path in data_file("").iterdir() if path.suffix not in (".md", ".txt")]
    assert len(files) >= 8
    assert [name for name in files if f"`{name}`" not in notes] == []


def test_shipped_files_stay_small_and_unpickled():
    sizes = {path.name: path.stat().st_size for path in data_file("").iterdir()}
    assert sum(sizes.values()) < 10e6
    encoder = [size for name, size in sizes.items() if name.startswith("text_image_encoder")]
    assert sum(encoder) < 8e6
    for path in data_file("").glob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays)
