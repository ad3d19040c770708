"""A classifier with a changed copy of its network."""

from typing import Any

from torch import nn

from skperf.backbone._modules import ModuleClassifier
from skperf.backbone._opening import source_of
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.network import Network


@undisturbed
class EditedClassifier(ModuleClassifier):
    """A fitted classifier whose network was edited, whatever method made the edit.

    ``clone`` returns it as it is, so it may stand wherever an `estimator` does.

    Parameters
    ----------
    estimator : classifier
        The fitted original, which is left as it was.
    module : nn.Module
        The changed copy of its network; returns logits.
    classes : array-like of shape (n_classes,)
        Labels in the order of the logits' columns.
    edit_report : dict
        What was done and what it cost.
    **options : dict
        Of the module: ``forward``, ``readout``, ``loss`` and ``batch_size`` as in
        :func:`from_module`; ``before``, the steps of a pipeline before the network; ``width`` and
        ``names``, the columns that rows must have.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    edit_report_ : dict
        What was done and what it cost.
    """

    def __init__(
        self,
        estimator: Any,
        module: nn.Module,
        classes: Any,
        edit_report: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(module, classes, **options)
        self.estimator = estimator
        self.edit_report = edit_report

    @property
    def edit_report_(self) -> dict[str, Any]:
        return self.edit_report

    def revert(self) -> Any:
        """Give back the original.

        Returns
        -------
        classifier
            The fitted estimator from before the edit.
        """
        return self.estimator


def edited(
    estimator: Any,
    network: Network,
    report: dict[str, Any],
    *,
    width: int | None = None,
    names: Any = None,
) -> EditedClassifier:
    """Wrap an edited network, which checks rows as the estimator that edited it did."""
    # a view computes in float32 and trains nothing: give both back as the original has them
    source = source_of(estimator)
    if source is not None:
        originals = dict(source.named_parameters())
        for name, parameter in network.module.named_parameters():
            if name in originals:
                parameter.data = parameter.data.to(originals[name].dtype)
                parameter.requires_grad_(originals[name].requires_grad)
    made = EditedClassifier(
        estimator,
        network.module,
        network.classes,
        report,
        forward=network.forward,
        readout=network.readout,
        loss=network.loss,
        batch_size=network.batch_size,
        before=network.before,
        width=width,
        names=names,
    )
    made.probabilities = network.probabilities
    return made
