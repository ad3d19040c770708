"""A classifier with a changed copy of its network."""

from sklearn.base import BaseEstimator

from skperf.backbone._modules import ModuleClassifier


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
    batch_size : int, default=256
        Rows that go through the module at once.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    edit_report_ : dict
        What was done and what it cost.
    """

    def __init__(self, estimator, module, classes, edit_report, *, batch_size=256):
        super().__init__(module, classes, batch_size=batch_size)
        self.estimator = estimator
        self.edit_report = edit_report

    @property
    def edit_report_(self):
        return self.edit_report

    def revert(self):
        """Give back the original.

        Returns
        -------
        classifier
            The fitted estimator from before the edit.
        """
        return self.estimator


def edited(estimator, network, report) -> BaseEstimator:
    """Wrap an edited network."""
    return EditedClassifier(
        estimator, network.to_module(), network.classes, report, batch_size=network.batch_size
    )
