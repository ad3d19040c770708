"""The skorch net that trains programs, and nothing but programs."""

from contextlib import suppress

import numpy as np
import torch
from skorch.dataset import Dataset, unpack_data

from skperf.backbone._nets import Net, _StopTraining
from skperf.backbone.modes import preserved_rng
from skperf.reprogramming.black_box import CALLS_PER_DIRECTION, ESTIMATORS
from skperf.reprogramming.label_mapping import (
    FROM_COUNTS,
    REFRESHED,
    cooccurrence,
    labels_of_interest,
)


class QueryBudgetSpentError(Exception):
    """The next step would send more images to the encoder than allowed."""


class ProgramNet(Net):
    """A :class:`~skperf.backbone._nets.Net` over a ProgrammedEncoder."""

    def __init__(
        self,
        module,
        *,
        weight_decay=0.0,
        gradient="exact",
        n_directions=8,
        smoothing=0.01,
        query_budget=None,
        mapping=None,
        mapping_per_class=1,
        mapping_smoothing=1.0,
        **kwargs,
    ):
        self.held_out = None
        self.weight_decay = weight_decay
        self.gradient = gradient
        self.n_directions = n_directions
        self.smoothing = smoothing
        self.query_budget = query_budget
        self.mapping = mapping
        self.mapping_per_class = mapping_per_class
        self.mapping_smoothing = mapping_smoothing
        super().__init__(module, **kwargs)

    def train_step_single(self, batch, **fit_params):
        """Compute the loss of a batch and all gradients."""
        inputs, targets = unpack_data(batch)
        if self.query_budget is not None:
            self._check_budget(len(inputs["images"]))
        self._set_training(True)
        logits = self.infer(inputs)
        loss = self.get_loss(logits, targets, training=True)
        if loss.requires_grad:
            loss.backward()
        if self.gradient != "exact":
            self._estimate_gradient(inputs, targets, loss.detach())
        return {"loss": loss, "y_pred": logits}

    def get_loss(self, y_pred, y_true, X=None, training=False):
        """Compute the loss of a batch: y_pred (n, n_classes) or (2, n, n_classes)."""
        loss = self._mean_loss(y_pred, y_true)
        if not training:
            return loss
        if self.weight_decay:
            loss = loss + self.weight_decay / 2 * self.module_.image.square().sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} in epoch {len(self.history)} at "
                f"lr={self.lr}: training diverges. Lower lr (and text_lr)."
            )
        if self.mapping in REFRESHED:
            self._count(y_true)
        return loss

    def on_epoch_end(self, net, **kwargs):
        """Refresh the label mapping from the source labels that the epoch has seen."""
        super().on_epoch_end(net, **kwargs)
        # the program of the last epoch was trained against the mapping it had then
        if self.mapping in REFRESHED and len(self.history) < self.max_epochs:
            self.set_mapping(self.counts_)
        self.counts_ = None

    def begin(self, images, n_classes):
        """Build the module, before any training: images (n, ...)."""
        self._begin(images, np.arange(n_classes))
        return self

    def learn(self, images, codes, weight, held_out=None):
        """Train until the epochs, the patience or the query budget are over.

        Shapes: images (n, ...), codes (n,), weight (n,).
        """
        module = self.module_
        targets = torch.as_tensor(codes)
        if weight is not None:
            weight = torch.as_tensor(weight).to(module.image.dtype)
            targets = (targets, weight)
        # what Net.partial_fit does, with several inputs for each row
        with preserved_rng(module.image.device):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator_)))
            inputs = self.inputs(images)
            if module.none_margin is not None and "plain" in inputs and not self.history:
                module.set_none_level(inputs["plain"], weight)
            if held_out is not None:
                held_out = Dataset(self.inputs(held_out[0]), held_out[1])
            self.held_out = held_out
            self.notify("on_train_begin", X=inputs, y=targets)
            with suppress(QueryBudgetSpentError, _StopTraining):
                self.fit_loop(inputs, targets)
            self.notify("on_train_end", X=inputs, y=targets)
        self.held_out = None

    def get_split_datasets(self, X, y=None, **fit_params):
        """Give the training rows and those held out."""
        return self.get_dataset(X, y), self.held_out

    def inputs(self, images):
        """Put the images and, where it is trained with, their zero-shot embeddings together.

        Shapes: images (n, ...).
        """
        module = self.module_
        inputs = {"images": images.to(module.image.dtype)}
        if module.has_unit_embeddings and module.training_alpha > 0 and self.max_epochs:
            plain = module.batches(images, self.batch_size, programmed=False)
            # a copy, since tensors of inference mode take no part in training
            inputs["plain"] = torch.cat(list(plain)).clone()
        return inputs

    def set_mapping(self, counts):
        """Estimate the label mapping: counts (n_source, n_classes)."""
        estimate = FROM_COUNTS[self.mapping]
        mapping = estimate(counts, self.mapping_per_class, self.mapping_smoothing)
        self.module_.mapping.copy_(mapping)

    def __getstate__(self):
        # skorch writes module parameters to a stream of their own: keep the encoder out of
        # it, so that it is pickled once with whoever else holds it
        encoder = self.__dict__.get("module__encoder")
        self.__dict__["module__encoder"] = None
        try:
            return super().__getstate__() | {"shared_encoder": encoder}
        finally:
            self.__dict__["module__encoder"] = encoder

    def __setstate__(self, state):
        encoder = state["shared_encoder"]
        super().__setstate__({k: v for k, v in state.items() if k != "shared_encoder"})
        self.__dict__["module__encoder"] = encoder
        if hasattr(self, "module_"):
            self.module_.encoder = encoder

    def _count(self, y_true):
        codes, weight = y_true if isinstance(y_true, tuple | list) else (y_true, None)
        n_classes = self.module_.mapping.shape[1]
        top = labels_of_interest(self.mapping, n_classes)
        codes = codes.to(self.module_.outputs.device)
        counts = cooccurrence(self.module_.outputs, codes, n_classes, weight=weight, top=top)
        previous = getattr(self, "counts_", None)
        self.counts_ = counts if previous is None else previous + counts

    def _mean_loss(self, logits, targets):
        # a program is trained on weighted means: a row of weight 0 is as good as absent
        weight = targets[1] if isinstance(targets, tuple | list) else None
        scale = 1.0 if weight is None else len(weight) / weight.sum().clamp_min(1e-30)
        if logits.ndim == 2:
            return super().get_loss(logits, targets) * scale
        each = [super(ProgramNet, self).get_loss(mix, targets) for mix in logits]
        return sum(each) / len(logits) * scale

    def _estimate_gradient(self, inputs, targets, base):
        module = self.module_
        outputs = module.outputs
        images, plain = (
            None if values is None else values.to(module.image)
            for values in (inputs["images"], inputs.get("plain"))
        )

        def loss_at(weights):
            logits = module.logits(module.encode(images, weights), plain)
            loss = self._mean_loss(logits, targets)
            return loss + self.weight_decay / 2 * weights.square().sum()

        with torch.no_grad():
            module.image.grad = ESTIMATORS[self.gradient](
                loss_at,
                module.image.detach(),
                base,
                n_directions=self.n_directions,
                step=self.smoothing,
                generator=self.generator_,
            )
        module.outputs = outputs

    def _check_budget(self, n_images):
        calls = 1
        if self.gradient != "exact":
            calls += self.n_directions * CALLS_PER_DIRECTION[self.gradient]
        if self.module_.n_queries + calls * n_images > self.query_budget:
            raise QueryBudgetSpentError
