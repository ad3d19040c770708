"""What one does with fitted programs: predict, reject, embed, look along alpha, save."""

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._validation import array_rows as check_rows
from skperf.backbone.network import Network
from skperf.reprogramming._judging import represent, score_path
from skperf.reprogramming._program_file import read_program, write_program
from skperf.reprogramming._task import ALPHA_GRID, as_images
from skperf.reprogramming.rejection import SCORES
from skperf.reprogramming.residual import alpha_curve


class ProgrammedMixin(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClassifierMixin):
    """The methods of a fitted `Reprogrammer`; how it gets fitted is not known here."""

    def predict(self, X):
        """Predict labels.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n,)
            The class with the largest logit.
        """
        codes = self._logits(X).argmax(1)
        return self.classes_[codes]

    def predict_proba(self, X):
        """Compute class probabilities.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Softmax of the class logits.
        """
        return softmax(self._logits(X).astype(np.float64), axis=1)

    def decision_function(self, X):
        """Compute class logits.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n, n_classes) or (n,)
            Logits; with two classes, of the second against the first.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def score_samples(self, X):
        """Score how much rows look like the task's images.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n,)
            Higher is more in-distribution.
        """
        if self.ood_score == "disagreement":
            return self._run(X, lambda module, images: module.agreement(images))
        score = SCORES[self.ood_score]

        def scored(module, images):
            similarities = module.similarities(module.represent(images))
            return score(similarities, self.ood_temperature)

        return self._run(X, scored)

    def predict_inlier(self, X):
        """Tell which rows belong to the task at all.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n,)
            +1 where the score reaches ``ood_threshold_``, else -1.
        """
        scores = self.score_samples(X)
        return np.where(scores >= self.ood_threshold_, 1, -1)

    def transform(self, X):
        """Embed rows with the programs and the residual.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n, n_outputs)
            Mixed unit embeddings; for other encoders what they return.
        """
        embeddings = self._run(X, lambda module, images: module.represent(images))
        return embeddings.astype(np.float32, copy=False)

    def reprogram(self, X):
        """Give the images that the encoder sees, before its normalisation.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n, channels, height, width)
            In [0, 1].
        """
        return self._run(X, lambda module, images: module.reprogram(images))

    def alpha_path(self, X, y, alphas=ALPHA_GRID):
        """Follow accuracy and score along the residual, without refitting.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images as in :meth:`fit`.
        y : array-like of shape (n,)
            Labels.
        alphas : sequence of float, default=(0, 0.1, ..., 1)
            Mixes, 0 = reprogrammed, 1 = zero-shot.

        Returns
        -------
        Bunch
            ``alphas``, and at each of them ``accuracy``, ``loss`` and ``score`` (the mean
            of what :meth:`score_samples` would give).

        Raises
        ------
        ValueError
            If the encoder has no zero-shot representation.
        """
        images = self._images(X)
        module, size = self.net_.module_, self.net_.batch_size
        if not module.has_unit_embeddings:
            raise ValueError("there is no alpha to vary: the encoder has no zero-shot head.")
        codes = Network(self._module, self.classes_).codes(y).cpu()
        with self.encoder_.open():
            representations = represent(module, images, size)
        options = {"scale": self.logit_scale_, "renormalize": self.renormalize}
        curve = alpha_curve(representations, codes, alphas, **options)
        return Bunch(
            alphas=np.array(curve.alphas),
            accuracy=np.array(curve.accuracy),
            loss=np.array(curve.loss),
            score=score_path(self, representations, alphas),
        )

    def to_module(self):
        """Give the whole as a module from images in [0, 1] to class logits.

        Returns
        -------
        nn.Module
            Contains the encoder itself, not a copy, as ``model``; programs and head are the
            parameters ``programmed.*``. It knows no rejection: :meth:`predict_inlier` does.
        """
        check_is_fitted(self)
        return self._module

    def save_program(self, path):
        """Write everything but the encoder to a safetensors file.

        Parameters
        ----------
        path : path-like
            Where to.
        """
        check_is_fitted(self)
        write_program(self, path)

    def load_program(self, path):
        """Read what :meth:`save_program` wrote; the encoder must be the same.

        Parameters
        ----------
        path : path-like
            Where from.

        Returns
        -------
        Reprogrammer
            Itself, fitted, with the parameters that belong to the program.

        Raises
        ------
        ValueError
            If the program was made for another encoder.
        """
        read_program(self, path)
        return self

    def __sklearn_is_fitted__(self):
        return hasattr(self, "net_")

    def _as_images(self, X):
        return as_images(
            X,
            image_shape=self.image_shape,
            channels=self.channels,
            input_range=self.input_range,
            any_rows=self.encoder is None,
        )

    def _images(self, X):
        check_is_fitted(self)
        return self._as_images(check_rows(self, X))

    def _logits(self, X):
        return self._run(X, lambda module, images: module(images))

    def _run(self, X, function):
        images, module = self._images(X), self._module
        image = self.net_.module_.image
        with self.encoder_.open(), torch.inference_mode():
            parts = [
                function(module, batch.to(image)).cpu() for batch in images.split(self.batch_size)
            ]
        return torch.cat(parts).numpy()
