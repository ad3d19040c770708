"""What is chosen on held-out rows once the programs are trained."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional

from skperf.reprogramming.classifier import ReprogrammedClassifier
from skperf.reprogramming.rejection import SCORES, agreement, retention_threshold
from skperf.reprogramming.residual import AlphaCurve, Representations, alpha_curve


@dataclass(frozen=True)
class Choice:
    """What held-out rows decide."""

    alpha: float
    logit_scale: float
    threshold: float
    curve: AlphaCurve | None


def choose(estimator, net, alphas, images, codes, weight):
    """Choose alpha, the scale of the logits and the threshold from one pass over rows.

    Shapes: images (n, ...), codes (n,), weight (n,).
    """
    module = net.module_
    codes = torch.as_tensor(codes)
    weight = torch.ones(len(codes)) if weight is None else torch.as_tensor(weight).float()
    if not module.has_unit_embeddings:
        outputs = torch.cat(list(module.batches(images, net.batch_size)))
        with torch.no_grad():
            similarities = module.logits(outputs.to(module.image.device)).cpu()
        scale = _scale(estimator, 1.0, similarities, codes, weight)
        scores = SCORES[estimator.ood_score](similarities, estimator.ood_temperature)
        return Choice(0.0, scale, _threshold(estimator, scores), None)
    plain = max(alphas) > 0 or estimator.ood_score == "disagreement"
    representations = represent(module, images, net.batch_size, plain=plain)
    scale = module.encoder.logit_scale
    curve = alpha_curve(
        representations,
        codes,
        alphas,
        scale=scale,
        renormalize=estimator.renormalize,
        weight=weight,
    )
    alpha = curve.best()
    similarities = representations.similarities(alpha, renormalize=estimator.renormalize)
    scores = _scores(estimator, representations, similarities)
    scale = _scale(estimator, scale, similarities, codes, weight)
    return Choice(alpha, scale, _threshold(estimator, scores), curve)


def represent(module, images, batch_size, *, plain=True):
    """Embed rows and classes with and without the programs: images (n, ...)."""
    programmed = torch.cat(list(module.batches(images, batch_size)))
    zero = programmed
    if plain:
        zero = torch.cat(list(module.batches(images, batch_size, programmed=False)))
    with module.encoder.open(), torch.no_grad():
        classes = module.classes().detach().cpu()
    return Representations(programmed, zero, classes, module.zero_shot.cpu())


def score_path(estimator, representations, alphas):
    """Give the mean score at each alpha: -> (n_alphas,)."""
    means = []
    for alpha in alphas:
        similarities = representations.similarities(alpha, renormalize=estimator.renormalize)
        means.append(float(_scores(estimator, representations, similarities).mean()))
    return np.array(means)


def assemble(estimator, net, task, classes, choice):
    """Put the fitted attributes together: classes (n_classes,)."""
    module = net.module_
    classifier = ReprogrammedClassifier(
        module,
        alpha=choice.alpha,
        scale=choice.logit_scale,
        image_shape=task.image_shape,
        renormalize=estimator.renormalize,
    )
    classifier.eval()
    picture = task.program.picture(module.image.detach())
    with module.encoder.open(), torch.no_grad():
        classes_embedded = classifier.classes()
    if task.head == "linear" and classes_embedded is None:
        classes_embedded = module.head.weight.detach() * module.stretch
    return {
        "_task": task,
        "_module": classifier,
        "classes_": classes,
        "class_names_": task.names,
        "encoder_": task.encoder,
        "net_": net,
        "program_": picture.cpu().numpy(),
        "text_delta_": None if module.text is None else module.text.detach().cpu().numpy(),
        "used_tokens_": None if task.text is None else task.text.used.numpy(),
        "label_mapping_": module.mapping.cpu().numpy() if task.head == "mapping" else None,
        "class_embeddings_": None if classes_embedded is None else classes_embedded.cpu().numpy(),
        "alpha_": choice.alpha,
        "logit_scale_": choice.logit_scale,
        "ood_threshold_": choice.threshold,
        "alpha_curve_": choice.curve,
        "history_": net.history,
        "n_iter_": len(net.history),
        "n_queries_": module.n_queries + 1,
        "_n_features_out": task.n_outputs,
    }


def _scores(estimator, representations, similarities):
    if estimator.ood_score == "disagreement":
        return agreement(representations.images, representations.images_zero)
    return SCORES[estimator.ood_score](similarities, estimator.ood_temperature)


def _threshold(estimator, scores):
    return retention_threshold(scores.numpy(), estimator.ood_retention)


def _scale(estimator, scale, similarities, codes, weight):
    if estimator.logit_scale != "calibrated":
        return scale if estimator.logit_scale == "encoder" else float(estimator.logit_scale)

    def loss(log_factor):
        logits = similarities * (scale * float(np.exp(log_factor)))
        losses = functional.cross_entropy(logits, codes, reduction="none")
        return float(losses @ weight / weight.sum())

    return scale * float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))
