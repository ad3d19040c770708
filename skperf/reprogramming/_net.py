"""The skorch net that trains programs, and nothing but programs."""

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from skorch.dataset import Dataset, unpack_data

from skperf.backbone._callbacks import StopTraining
from skperf.backbone._nets import Net, seed_of
from skperf.backbone.modes import differentiating
from skperf.reprogramming.black_box import CALLS_PER_DIRECTION, estimated_gradient
from skperf.reprogramming.label_mapping import (
    REFRESHED,
    cooccurrence,
    estimated,
    labels_of_interest,
)

#: Prompts whose gradient one step takes; beyond that, classes that the batch lacks are drawn.
PROMPTS_IN_A_STEP = 512


class QueryBudgetSpentError(Exception):
    """The next step would send more images to the encoder than allowed."""


class ProgramNet(Net):
    """A `Net` over a ProgrammedEncoder; its rows are numbers of pictures, read batch by batch."""

    module_: Any

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
        augment=None,
        **kwargs,
    ):
        self.held_out = None
        self.source = None
        self.weight_decay = weight_decay
        self.gradient = gradient
        self.n_directions = n_directions
        self.smoothing = smoothing
        self.query_budget = query_budget
        self.mapping = mapping
        self.mapping_per_class = mapping_per_class
        self.mapping_smoothing = mapping_smoothing
        self.augment = augment
        super().__init__(module, **kwargs)

    def begin(self, n_classes):
        """Build the module, before any training."""
        self.classes_inferred_ = np.arange(n_classes)
        self.module_widths_ = {}
        self.drawn_state_ = self.random_state
        self.seed_, self.n_steps_ = seed_of(self.random_state), 0
        self.generator_ = torch.Generator().manual_seed(self.seed_)
        self.initialize()
        return self

    def learn(self, source, codes, weight, rows, held_out=None):
        """Train until it is over: codes (n,), weight (n,) of all, rows (m,), held_out (k,)."""
        module = self.module_
        self.source = source
        inputs, targets = self._inputs(rows), torch.as_tensor(codes)[rows]
        if weight is not None:
            weight = torch.as_tensor(weight).to(module.image.dtype)[rows]
            targets = (targets, weight)
        if module.none_margin is not None and "plain" in inputs and not self.history:
            module.set_none_level(inputs["plain"], weight)
        if held_out is not None:
            held_out = Dataset(self._inputs(held_out), torch.as_tensor(codes)[held_out])
        self.held_out = held_out
        # what Net.partial_fit does, with several inputs for each row
        with suppress(QueryBudgetSpentError, StopTraining):
            self.notify("on_train_begin", X=inputs, y=targets)
            self.fit_loop(inputs, targets)
        self.notify("on_train_end", X=inputs, y=targets)
        self.held_out = self.source = None

    def infer(self, x, classes=None, **fit_params):
        """Compute the logits of a batch of picture numbers."""
        module = self.module_
        rows, plain = x["rows"], x.get("plain")
        plain = None if plain is None else plain.to(module.image)
        if self._cached():
            module.outputs = self.source.plain[rows].to(module.image)
            return module.logits(module.outputs, plain, classes)
        return module(self._placed(rows), plain, classes)

    def train_step_single(self, batch, **fit_params):
        """Compute the loss of a batch and all gradients."""
        inputs, targets = unpack_data(batch)
        if self.query_budget is not None:
            self._check_budget(len(inputs["rows"]))
        self._set_training(True)
        classes, targets = self._classes_of_the_step(targets)
        logits = self.infer(inputs, classes)
        loss = self.get_loss(logits, targets, training=True)
        if loss.requires_grad:
            with differentiating():
                loss.backward()
        if self.gradient != "exact":
            self._estimate_gradient(inputs, targets, loss.detach())
        return {"loss": loss, "y_pred": logits}

    def notify(self, method_name, **kwargs):
        """Call a method of the callbacks, which see the classes' logits alone."""
        if getattr(kwargs.get("y_pred"), "ndim", 0) == 3:
            kwargs["y_pred"] = kwargs["y_pred"][0, :, : len(self.classes_)]
        super().notify(method_name, **kwargs)

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
                f"lr={self.lr}: training diverges, or the encoder's outputs are not finite. Lower "
                "lr (and text_lr), or mend the encoder."
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

    def get_split_datasets(self, X, y=None, **fit_params):
        """Give the training rows and those held out."""
        return self.get_dataset(X, y), self.held_out

    def set_mapping(self, counts):
        """Estimate the label mapping: counts (n_source, n_classes)."""
        options = self.mapping_per_class, self.mapping_smoothing
        self.module_.mapping.copy_(estimated(self.mapping, counts, *options))

    def put_encoder(self, encoder):
        """Say which encoder the module is to use."""
        self.__dict__["module__encoder"] = encoder
        self.module_.encoder = encoder

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

    def _inputs(self, rows):
        inputs = {"rows": torch.as_tensor(rows)}
        module = self.module_
        if module.has_unit_embeddings and module.training_alpha > 0 and self.max_epochs:
            inputs["plain"] = self.source.plain[rows]
        return inputs

    def _cached(self):
        # nothing changes the pictures: their outputs are known
        trains = self.module_.image.numel() or self.augment is not None
        return not trains and self.source.plain is not None

    def _placed(self, rows):
        placed = self.source(rows).to(self.module_.image)
        if self.augment is not None and self.module_.training:
            augmented = self.augment(placed, self.generator_).clamp(0, 1)
            if augmented.shape != placed.shape:
                raise ValueError(
                    f"augment made images of shape {tuple(augmented.shape)} of such of shape "
                    f"{tuple(placed.shape)}; it must keep the shape."
                )
            return augmented
        return placed

    def _classes_of_the_step(self, targets):
        prompts = self.module_.prompts
        if self.module_.text is None or len(prompts.tokens) <= PROMPTS_IN_A_STEP:
            return None, targets
        codes, weight = targets if isinstance(targets, tuple | list) else (targets, None)
        present, codes = codes.unique(return_inverse=True)
        per_class = max(1, len(prompts.tokens) // prompts.n_classes)
        order = torch.randperm(prompts.n_classes, generator=self.generator_)
        others = order[~torch.isin(order, present)]
        classes = torch.cat(
            [present, others[: max(0, PROMPTS_IN_A_STEP // per_class - len(present))]]
        )
        classes = classes.to(self.module_.image.device)
        return classes, codes if weight is None else (codes, weight)

    def _count(self, y_true):
        codes, weight = y_true if isinstance(y_true, tuple | list) else (y_true, None)
        n_classes = self.module_.mapping.shape[1]
        top = labels_of_interest(self.mapping, n_classes)
        codes = codes.to(self.module_.outputs.device)
        counts = cooccurrence(self.module_.outputs, codes, n_classes, weight=weight, top=top)
        previous = getattr(self, "counts_", None)
        self.counts_ = counts if previous is None else previous + counts

    def _mean_loss(self, logits, targets):
        codes, weight = targets if isinstance(targets, tuple | list) else (targets, None)
        codes = codes.to(logits.device)
        mixes = logits if logits.ndim == 3 else logits[None]
        losses = sum(self.criterion_(mix, codes) for mix in mixes) / len(mixes)
        if weight is None:
            return losses.mean()
        weight = weight.to(losses)
        return (losses * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def _estimate_gradient(self, inputs, targets, base):
        module = self.module_
        outputs = module.outputs
        placed, plain = self._placed(inputs["rows"]), inputs.get("plain")
        plain = None if plain is None else plain.to(module.image)

        def loss_at(weights):
            logits = module.logits(module.encode(placed, weights), plain)
            loss = self._mean_loss(logits, targets)
            return loss + self.weight_decay / 2 * weights.square().sum()

        with torch.no_grad():
            module.image.grad = estimated_gradient(
                self.gradient,
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
