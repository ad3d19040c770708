import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import data
from benchmarks.data import recipes
from benchmarks.data.__main__ import main
from benchmarks.data.archives import Archive
from benchmarks.data.conversions import pack_texts
from benchmarks.data.efficientnet import EfficientNetLite0, _SamePaddedConv2d
from benchmarks.data.recipes import RECIPES, Recipe, prepare
from benchmarks.data.text import WordVectors

FETCHERS = {
    "fetch_mnist": "mnist",
    "fetch_emoji": "emoji_google",
    "fetch_r8": "r8",
    "fetch_newsgroups": "newsgroups",
    "fetch_spam_assassin": "spam_assassin",
    "fetch_imagenet_photos": "imagenet_photos",
    "fetch_efficientnet_lite0": "efficientnet_lite0",
    "fetch_minilm": "minilm",
    "fetch_wordllama": "wordllama",
}


@pytest.mark.parametrize("fetcher", FETCHERS)
def test_missing_file_message_says_what_to_run(cache, fetcher):
    command = f"python -m benchmarks.data fetch {FETCHERS[fetcher]}"
    with pytest.raises(FileNotFoundError, match=f"is not in {cache}; run: {command}"):
        getattr(data, fetcher)()


def test_unknown_emoji_style_is_refused(cache):
    with pytest.raises(ValueError, match="style must be one of"):
        data.fetch_emoji("apple")


@pytest.fixture
def filled(cache):
    cache.mkdir()
    texts = {
        f"{key}_{subset}": value
        for subset in ("train", "test")
        for key, value in pack_texts([f"{subset} one", "two"]).items()
    }
    labels = np.array(["ship", "earn"])
    np.savez(cache / "r8.npz", labels_train=labels, labels_test=labels, **texts)
    groups = np.array(["hard-ham-1", "spam-2"])
    np.savez(cache / "spam_assassin.npz", groups=groups, **pack_texts(["hello", "buy"]))
    return cache


def test_labelled_texts(filled):
    everything = data.fetch_r8(subset="all")
    assert everything.data == ["train one", "two", "test one", "two"]
    assert everything.target_names[everything.target].tolist() == ["ship", "earn"] * 2
    assert data.fetch_r8(subset="test").data == ["test one", "two"]


def test_emails(filled):
    emails = data.fetch_spam_assassin()
    assert emails.data == ["hello", "buy"]
    assert emails.target_names[emails.target].tolist() == ["ham", "spam"]


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """A recipe whose archive needs no download."""
    monkeypatch.setattr(recipes, "download", lambda archive: tmp_path / archive.filename)
    (tmp_path / "thing.whl").write_bytes(b"archive")
    archive = Archive("pip", "thing==1", "thing.whl", "0" * 64, 7, "CC0-1.0")

    def use(convert):
        monkeypatch.setitem(RECIPES, "thing", Recipe("a thing", "thing.txt", archive, convert))

    return use


def test_prepare_converts_once(cache, recipe):
    cache.mkdir()
    calls = []
    recipe(lambda archive, output: calls.append(output.write_text("converted")))
    assert prepare("thing").read_text() == "converted"
    assert prepare("thing") == cache / "thing.txt"
    assert len(calls) == 1


def test_prepare_can_drop_the_archive(cache, recipe, tmp_path):
    cache.mkdir()
    recipe(lambda archive, output: output.write_text("converted"))
    prepare("thing", keep_archive=False)
    assert not (tmp_path / "thing.whl").exists()


def test_interrupted_conversion_leaves_nothing(cache, recipe):
    def stop_half_way(archive, output):
        output.write_text("half")
        raise KeyboardInterrupt

    cache.mkdir()
    recipe(stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        prepare("thing")
    assert list(cache.iterdir()) == []


def test_command_lists_everything(cache, capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert str(cache) in shown
    assert all(name in shown for name in RECIPES)


def test_command_fetches(cache, recipe, capsys):
    cache.mkdir()
    recipe(lambda archive, output: output.write_text("converted"))
    assert main(["fetch", "thing"]) == 0
    assert str(cache / "thing.txt") in capsys.readouterr().out


def test_command_reports_failure_in_its_status(cache, recipe, capsys):
    def fail(archive, output):
        raise OSError("the registry is down")

    cache.mkdir()
    recipe(fail)
    assert main(["fetch", "thing"]) == 1
    assert "thing: the registry is down" in capsys.readouterr().err


def test_command_refuses_unknown_names(capsys):
    with pytest.raises(SystemExit):
        main(["fetch", "imagenet"])
    assert "invalid choice: 'imagenet'" in capsys.readouterr().err


def test_word_vectors_average_tokens():
    class Tokenizer:
        def encode_batch(self, texts, add_special_tokens):
            words = {"red": 1, "car": 2}
            return [type("E", (), {"ids": [words[w] for w in text.split()]})() for text in texts]

    vectors = WordVectors(np.array([[9.0], [1.0], [2.0]], np.float32), Tokenizer())
    assert vectors.encode(["red car", "car"], length=3).tolist() == [[1, 2, 0], [2, 0, 0]]
    assert vectors.embed(["red car", "car", ""]).ravel().tolist() == [1.5, 2, 0]


def test_efficientnet_has_the_filters_of_the_published_one():
    network = EfficientNetLite0().eval()
    convolutions = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
    assert len(convolutions) == 49
    assert sum(each.out_channels for each in convolutions) == 21_008
    assert sum(each.numel() for each in network.parameters()) == 4_652_008
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("side", "kernel_size", "stride"), [(8, 3, 2), (7, 3, 2), (7, 5, 1), (6, 5, 2)]
)
def test_same_padding_puts_the_surplus_behind(side, kernel_size, stride):
    convolution = _SamePaddedConv2d(1, 1, kernel_size, stride, bias=False)
    image = torch.randn(1, 1, side, side)
    n_out = -(-side // stride)
    surplus = max((n_out - 1) * stride + kernel_size - side, 0)
    padded = nn.functional.pad(image, [surplus // 2, surplus - surplus // 2] * 2)
    expected = nn.functional.conv2d(padded, convolution.weight, stride=stride)
    assert expected.shape[-1] == n_out
    torch.testing.assert_close(convolution(image), expected)


@pytest.mark.fetched("efficientnet_lite0", "imagenet_photos")
def test_efficientnet_knows_photographs():
    photos = data.fetch_imagenet_photos()
    with torch.inference_mode():
        logits = data.fetch_efficientnet_lite0()(torch.from_numpy(photos.images).float() / 255)
    assert (logits.argmax(1).numpy() == photos.target).mean() >= 0.8


@pytest.mark.fetched("wordllama", "r8")
def test_word_vectors_tell_topics():
    train, test = (data.fetch_r8(subset=subset) for subset in ("train", "test"))
    vectors = data.fetch_wordllama()
    rows = vectors.embed(train.data[:1000])
    centres = np.stack([rows[train.target[:1000] == c].mean(0) for c in range(8)])
    answers = (vectors.embed(test.data[:300]) @ centres.T).argmax(1)
    assert (answers == test.target[:300]).mean() > 0.6


@pytest.mark.fetched("minilm")
def test_sentence_vectors_put_like_sentences_together():
    texts = ["The cat sleeps.", "Shares fell on Monday.", "A kitten is taking a long nap."]
    vectors = data.sentence_vectors(texts, batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 2] > cosines[0, 1] + 0.2
    np.testing.assert_allclose(data.sentence_vectors(texts[::-1]), vectors[::-1], atol=1e-5)


@pytest.mark.fetched("mnist", "emoji_google", "emoji_twitter")
def test_fetched_images():
    digits = data.fetch_mnist()
    assert digits.images.shape == (10_000, 28, 28)
    assert digits.target_names[digits.target[:3]].tolist() == [str(d) for d in digits.target[:3]]
    google, twitter = (data.fetch_emoji(style) for style in ("google", "twitter"))
    assert google.images.shape == twitter.images.shape == (1636, 3, 64, 64)
    np.testing.assert_array_equal(google.names, twitter.names)
    assert len(google.target_names) == 8


@pytest.mark.fetched("imagenet_classes")
def test_class_names():
    names = np.load(RECIPES["imagenet_classes"].path())["names"].tolist()
    assert len(names) == 1000
    assert names[:2] == ["tench", "goldfish"]
