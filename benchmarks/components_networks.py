"""Networks and examples whose components the benchmarks attribute.

"resnet" (the shipped residual network, 560 filters, 250 Fashion-MNIST images), "rnet" (140
filters, 200 faces and non-faces), "minilm" (72 heads under a logistic head on 100 R8 texts) and
"lite0" (21,008 filters, 20 photographs and their mirror images at 128 px). The last two need
fetched files.
"""

import numpy as np
import torch

from skperf import from_module
from skperf.components import ComponentAttributor


def resnet():
    from skperf.datasets import load_fashion_mnist, load_small_resnet

    X, y = load_fashion_mnist(subset="test", return_X_y=True)
    return load_small_resnet(), X[:250], np.unique(y, return_inverse=True)[1][:250], "auto"


def rnet():
    from skperf.datasets import load_faces, load_rnet

    faces = load_faces()
    X, y = faces.images, faces.target
    return load_rnet(), X, np.unique(y, return_inverse=True)[1], "conv_filters"


def lite0():
    from benchmarks.data import fetch_efficientnet_lite0, fetch_imagenet_photos

    photos = fetch_imagenet_photos()
    X, y = torch.as_tensor(photos.images).float(), photos.target
    X = X / 255 if X.max() > 1 else X
    X = torch.nn.functional.interpolate(X, size=128, mode="bilinear", antialias=True)
    X = torch.cat([X, X.flip(3)])
    return fetch_efficientnet_lite0(), X.numpy(), np.concatenate([y, y]), "conv_filters"


def minilm():
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    from benchmarks.data import fetch_minilm, fetch_r8

    folder = fetch_minilm()
    encoder = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bunch = fetch_r8(subset="train")
    rows = np.random.default_rng(0).permutation(len(bunch.data))[:400]
    texts = [bunch.data[i] for i in rows]
    classes, y = np.unique(np.asarray(bunch.target)[rows], return_inverse=True)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=32)["input_ids"]
    X = np.asarray(tokens)
    body = TextClassifier(encoder, len(classes))
    with torch.inference_mode():
        features = torch.cat(
            [body.embed(torch.as_tensor(X[i : i + 50])) for i in range(0, 400, 50)]
        )
    head = LogisticRegression(max_iter=500).fit(features[100:].numpy(), y[100:])
    present = head.classes_
    with torch.no_grad():
        body.head.weight.zero_()
        body.head.bias.fill_(-20.0)
        body.head.weight[present] = torch.as_tensor(head.coef_, dtype=torch.float32)
        body.head.bias[present] = torch.as_tensor(head.intercept_, dtype=torch.float32)
    return body.eval(), X[:100], y[:100], "attention_heads"


class TextClassifier(torch.nn.Module):
    """Mean of the last hidden states, then a linear layer."""

    def __init__(self, encoder, n_classes):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, n_classes)

    def embed(self, tokens):
        """Mean over the tokens that are no padding."""
        mask = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, tokens):
        """Logits."""
        return self.head(self.embed(tokens))


NETWORKS = {"resnet": resnet, "rnet": rnet, "lite0": lite0, "minilm": minilm}


def attributor(module, components, n_classes, **options):
    estimator = from_module(module, np.arange(n_classes))
    return ComponentAttributor(estimator, components=components, **options)


def n_logits(module, X):
    with torch.inference_mode():
        inputs = torch.as_tensor(X[:1])
        inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
        out = module(inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits).shape[1]
