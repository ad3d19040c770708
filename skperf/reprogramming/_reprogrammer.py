"""The estimator: a frozen encoder, reprogrammed for a task of one's own."""

import copy

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    clone,
)
from sklearn.utils import Bunch, check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._nets import seed_of
from skperf.backbone._sklearn import DOC_LINK, check_sample_weight, fit_context
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import as_array, check_labels, check_rows
from skperf.backbone.interrupts import undisturbed
from skperf.reprogramming._options import (
    ALPHA_GRID,
    CONSTRAINTS,
    RECORD_OF,
    RECORDS,
    RELEASED_SETTINGS,
    Settings,
    form_of,
    takes_options,
)
from skperf.reprogramming._program_file import read_program, write_program
from skperf.reprogramming._task import checked_alphas, settle
from skperf.reprogramming._training import (
    Labelled,
    embed,
    first_net,
    fit_program,
    reopened,
    train_further,
    zero_shot_program,
)
from skperf.reprogramming._training import with_classes as with_other_classes
from skperf.reprogramming.encoders import FrozenEncoder, opener_of
from skperf.reprogramming.pictures import Pictures, is_array, is_table, refuse_uneven
from skperf.reprogramming.residual import alpha_curve
from skperf.reprogramming.tokens import tokens_for

_SHARED = ("encoder", "processor", "tokenizer")
_PRIVATE = ("_task", "_fitted", "_settings", "_n_features_out")


@undisturbed
class Reprogrammer(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    ClassifierMixin,
    BaseEstimator,
):
    """Classifier around a frozen encoder: a program on its inputs and one on its tokens.

    Logits are ``scale * mix(u, u0) @ mix(q, q0).T``, where u and q embed the reprogrammed
    images and prompts, u0 and q0 the plain ones, and ``mix(a, b) = (1 - alpha) a + alpha b``,
    or those of a head on the plain embeddings where that does better on rows left out.
    Only programs and heads are trained; the encoder is shared by clones and never touched.

    Parameters
    ----------
    encoder : object, optional
        A transformers text-image model such as ``CLIPModel`` or ``SiglipModel``; an object with
        ``encode_image`` and ``encode_text`` as in open_clip; any ``nn.Module`` from images to
        logits or features; a callable from arrays (n, channels, height, width) to scores or
        probabilities (n, s), with `gradient` "rge" or "spsa". None: fixed features of flat rows
        of any range.
    processor : object, optional
        How the encoder wants its images: a transformers processor, a composition of
        torchvision's steps, or a dict such as open_clip's ``preprocess_cfg``; by default what
        the model says of itself.
    tokenizer : callable, optional
        A transformers or open_clip tokenizer.
    class_names : list or dict, optional
        In the order of ``classes_``, or by label; by default the labels as words. A list in
        place of a name holds synonyms, whose embeddings are averaged.
    prompts : str, callable, list of these, or dict, default="a photo of a {}"
        Templates or functions of a name; the embeddings of several are averaged. A dict by label
        holds the prompts of each class, with or without a place for its name.
    layout : {"overlay", "pad", "mask"}, default="overlay"
        Whether a border lies on the picture's edge, the picture shrinks into it, or a pattern
        covers the picture through a mask drawn from each sample.
    border : int, default=16
        Width of the border in pixels of the canvas (meant for 224). With 0 there is none: the
        pictures are embedded once, and training takes seconds.
    init : {"zeros", "normal"}, default="zeros"
        Start of the border; zeros start from the plain picture.
    text : {"auto", "none", "bias", "position", "context", "table", "table+position", "all", \
"all+position"}, default="auto"
        What is added to token embeddings: one row; a row for each position, or for those before
        the class name; one for each token in the prompts, or also for start, end and padding.
        "auto" is "table" for the heads "auto" and "prompts", else "none".
    head : {"auto", "prompts", "mapping", "linear", "probe", "cache", "adapter", "attributes"}, \
default="auto"
        Class prompts; a map of the encoder's own labels; a trained linear layer, which where
        there are prompts is an offset to their unit embeddings. On the plain embeddings: a
        softmax regression held to the prompts, a cache of training rows (Tip-Adapter), a
        bottleneck (CLIP-Adapter), the nearest of a class's prompts. "auto" trains "linear"
        (with text towers) or "mapping" (on logits), and lets the heads on plain embeddings
        compete by cross-validation unless `text`, `alpha` or `mapping` is given.
    mapping : {"blm", "blm+", "rlm", "flm", "ilm", "linear"} or array (s, n_classes), default="blm"
        Bayesian, its soft form, random, frequent, iterative, trained, or given.
    objective : {"cross_entropy", "contrastive"}, default="cross_entropy"
        Over all classes, or between the images and captions of a batch.
    alpha : "auto", float or list of float, default="auto"
        0 = reprogrammed, 1 = zero-shot. Of a list, or of 0, 0.1, ..., 1 for "auto", the best
        on rows left out (accuracy, then loss); 0 without a zero-shot head.
    ood_score : {"auto", "mcm", "max_logit", "energy", "entropy", "disagreement", "mahalanobis", \
"knn", "vim"}, default="auto"
        Score of :meth:`score_samples`. "auto" is "max_logit" where training knows "none of
        these" (`none_margin`), else what best tells each class from the others without knowing
        of it.
    ood_temperature : float, default=1.0
        Divides the cosines (or logits) in the score.
    ood_retention : float, default=0.95
        Share of fresh rows of the task that the thresholds keep.
    max_epochs : int, default=25
        0 is the zero-shot classifier.
    batch_size : int, default=128
        Images in a step.
    gradient : {"exact", "rge", "spsa"}, default="exact"
        How the border's gradient is found; the latter two only call the encoder.
    device : str, optional
        Where to work; an encoder that lives elsewhere is copied there.
    random_state : int, RandomState or None, default=None
        Seeds the split, the order and whatever is drawn.
    verbose : int, default=0
        Above 0, shows progress.
    pixels : Pixels, optional
        Shape, channels, range, normalisation and resizing of the images.
    training : Training, optional
        Rates, decay, schedule, validation and stopping. Fields of this and of `pixels` may be
        given by their bare names too: ``lr=0.1``, ``image_shape=(28, 28)``.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels.
    program_ : ndarray of shape (channels, height, width) or (n_features,)
        What is added to images.
    text_delta_ : ndarray of shape (n_rows, width) or None
        What is added to tokens: rows of ``used_tokens_``, then of positions.
    used_tokens_ : ndarray of shape (n_used,) or None
        Token ids with a row of their own.
    class_embeddings_ : ndarray of shape (n_classes, d) or None
        What images are held against, mixed by ``alpha_``.
    label_mapping_ : ndarray of shape (s, n_classes) or None
        With a map of the encoder's own labels.
    alpha_ : float
        The mix that was chosen.
    alpha_curve_ : AlphaCurve or None
        Accuracy and loss of each alpha on the rows that were judged.
    logit_scale_ : float
        Between cosines and logits.
    head_ : str
        The head that gives the class logits.
    head_losses_ : dict
        Loss of each head that competed, on the rows that were judged.
    ood_score_ : str
        The score that was chosen.
    ood_threshold_ : float
        Its threshold.
    ood_thresholds_ : dict
        The threshold of every score.
    class_names_ : list of str
        The first name of each class.
    encoder_ : FrozenEncoder
        Handle to the encoder.
    net_ : ProgramNet
        The skorch net, with ``history_``; it owns the programs only.
    history_ : skorch.History
        Losses by epoch.
    n_iter_ : int
        Epochs.
    n_queries_ : int
        Images that `fit` sent to the encoder.

    See Also
    --------
    RELEASED_SETTINGS : What the authors' released code does, as parameters.

    References
    ----------
    Geng and Chen, "Model Reprogramming Outperforms Fine-tuning on Out-of-distribution Data
    in Text-Image Encoders" (SaTML 2024).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skperf import Reprogrammer
    >>> X, y = load_iris(return_X_y=True)
    >>> model = Reprogrammer(random_state=0).fit(X, y)
    >>> bool(model.score(X, y) > 0.9)
    True
    """

    _doc_link_module = "skperf"
    _doc_link_template = DOC_LINK
    _parameter_constraints = CONSTRAINTS

    @takes_options
    def __init__(
        self,
        encoder=None,
        *,
        processor=None,
        tokenizer=None,
        class_names=None,
        prompts="a photo of a {}",
        layout="overlay",
        border=16,
        init="zeros",
        text="auto",
        head="auto",
        mapping="blm",
        objective="cross_entropy",
        alpha="auto",
        ood_score="auto",
        ood_temperature=1.0,
        ood_retention=0.95,
        max_epochs=25,
        batch_size=128,
        gradient="exact",
        device=None,
        random_state=None,
        verbose=0,
        pixels=None,
        training=None,
    ):
        self.encoder = encoder
        self.processor = processor
        self.tokenizer = tokenizer
        self.class_names = class_names
        self.prompts = prompts
        self.layout = layout
        self.border = border
        self.init = init
        self.text = text
        self.head = head
        self.mapping = mapping
        self.objective = objective
        self.alpha = alpha
        self.ood_score = ood_score
        self.ood_temperature = ood_temperature
        self.ood_retention = ood_retention
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.gradient = gradient
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.pixels = pixels
        self.training = training

    def get_params(self, deep=True):
        """Get the parameters; deep, with those of the records.

        Parameters
        ----------
        deep : bool, default=True
            Whether those of the records come along, as ``training__lr``.

        Returns
        -------
        dict
            Values by name.
        """
        params = super().get_params(deep)
        for record, kind in RECORDS.items():
            if deep and params[record] is None:
                params |= {
                    f"{record}__{name}": value for name, value in kind().get_params().items()
                }
        return params

    def set_params(self, **params):
        """Set parameters, those of the records also by their bare names.

        Parameters
        ----------
        **params : dict
            Values by name: ``lr=0.1`` means ``training__lr=0.1``.

        Returns
        -------
        Reprogrammer
            Itself.
        """
        params = {
            f"{RECORD_OF[name]}__{name}" if name in RECORD_OF else name: value
            for name, value in params.items()
        }
        for record, kind in RECORDS.items():
            reached = any(name.startswith(f"{record}__") for name in params)
            if reached and params.get(record, getattr(self, record)) is None:
                params = {record: kind()} | params if record not in params else params
                setattr(self, record, params[record] or kind())
        return super().set_params(**params)

    @classmethod
    def released(cls, encoder=None, **params):
        """Make an estimator that does what the authors' released code does.

        Parameters
        ----------
        encoder : object, optional
            As in the constructor.
        **params : dict
            Override the settings; on small images the border and the first size, on short
            training the warm-up must be.

        Returns
        -------
        Reprogrammer
            Not fitted.
        """
        return cls(encoder, **(RELEASED_SETTINGS | params))

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y=None, sample_weight=None):
        """Train the programs, then choose alpha, thresholds and head on rows left out.

        Parameters
        ----------
        X : array-like of shape (n, 3, H, W), (n, 1, H, W) or (n, n_features)
            Images in [0, 1] or uint8; flat rows need `image_shape`. Also a list of PIL pictures
            or arrays of any sizes, or a map-style data set of them, which stays where it is.
        y : array-like of shape (n,), optional
            Labels. Without them, and with `class_names`, the zero-shot classifier.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows.

        Returns
        -------
        Reprogrammer
            Itself.
        """
        with unchanged_on_error(self):
            self._forget()
            settings = self._frozen_settings()
            seed, generator = self._randomness(settings)
            if y is None and self.class_names is not None:
                pictures, classes = self._pictures(X, reset=True), self._named_classes()
                task = settle(settings, pictures, classes)
                fitted, net = zero_shot_program(settings, task, pictures, seed)
            else:
                pictures, codes, classes, weight = self._open(settings, X, y, sample_weight)
                task = settle(settings, pictures, classes)
                fitted, net = fit_program(settings, task, pictures, codes, weight, generator, seed)
            self._publish(settings, task, classes, fitted, net)
        return self

    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train the programs one epoch further, at a constant rate.

        From the second call on, alpha and the thresholds are chosen on the new rows before
        these are learned.

        Parameters
        ----------
        X : array-like of shape (n, 3, H, W), (n, 1, H, W) or (n, n_features)
            As in :meth:`fit`.
        y : array-like of shape (n,)
            Labels.
        classes : array-like of shape (n_classes,), optional
            All labels there will be; needed at the first call if `y` lacks some.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows.

        Returns
        -------
        Reprogrammer
            Itself.
        """
        with unchanged_on_error(self):
            first = not hasattr(self, "net_")
            settings = self._frozen_settings() if first else self._settings
            known = classes if first else self.classes_
            pictures, codes, labels, weight = self._open(
                settings, X, y, sample_weight, known, reset=first
            )
            task = settle(settings, pictures, labels) if first else self._task.reopened()
            plain = embed(task, pictures, settings.batch_size) if task.keeps_outputs else None
            labelled = Labelled(task, pictures, codes, weight, plain)
            if first:
                net = first_net(settings, labelled, self._randomness(settings)[0])
            else:
                net = reopened(self.net_, task)
            fitted, net = train_further(settings, task, labelled, net, first)
            self._publish(settings, task, labels, fitted, net)
        return self

    def predict(self, X, *, batch_norm="stored"):
        """Predict labels.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.
        batch_norm : {"stored", "batch"}, default="stored"
            Statistics of batch normalisation: the encoder's own, or those of the batch at hand
            (see :func:`skperf.backbone.prediction_time_batch_norm`).

        Returns
        -------
        ndarray of shape (n,)
            The class with the largest logit.
        """
        codes = self._logits(X, batch_norm).argmax(1)
        return self.classes_[codes]

    def predict_proba(self, X, *, batch_norm="stored"):
        """Compute class probabilities.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.
        batch_norm : {"stored", "batch"}, default="stored"
            As in :meth:`predict`.

        Returns
        -------
        ndarray of shape (n, n_classes)
            Softmax of the class logits.
        """
        return softmax(self._logits(X, batch_norm).astype(np.float64), axis=1)

    def decision_function(self, X, *, batch_norm="stored"):
        """Compute class logits.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.
        batch_norm : {"stored", "batch"}, default="stored"
            As in :meth:`predict`.

        Returns
        -------
        ndarray of shape (n, n_classes) or (n,)
            Logits; with two classes, of the second against the first.
        """
        logits = self._logits(X, batch_norm)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def score_samples(self, X, *, ood_score=None):
        """Score how much rows look like the task's images.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.
        ood_score : str, optional
            Another score than the one that was chosen.

        Returns
        -------
        ndarray of shape (n,)
            Higher is more in-distribution.
        """
        return self._record().scores(self._pictures(X), ood_score)

    def predict_inlier(self, X, *, ood_score=None):
        """Tell which rows belong to the task at all.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Images or rows as in :meth:`fit`.
        ood_score : str, optional
            Another score than the one that was chosen; it is held against its own threshold.

        Returns
        -------
        ndarray of shape (n,)
            +1 where the score reaches its threshold, else -1.

        Raises
        ------
        ValueError
            If the classes are not those of `fit` and the thresholds not known.
        """
        return self._record().inliers(self._pictures(X), ood_score)

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
        embeddings = self._record().embeddings(self._pictures(X))
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
        return self._record().reprogrammed(self._pictures(X))

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
        fitted = self._record()
        if not fitted.programmed.has_unit_embeddings:
            raise ValueError("there is no alpha to vary: the encoder has no zero-shot head.")
        alphas, pictures = checked_alphas(alphas), self._pictures(X)
        codes = _codes(check_labels(y), self.classes_, len(pictures))
        parts = fitted.representations(pictures)
        options = {"scale": self.logit_scale_, "renormalize": fitted.renormalize}
        curve = alpha_curve([parts], torch.as_tensor(codes), alphas, **options)
        return Bunch(
            alphas=np.array(curve.alphas),
            accuracy=np.array(curve.accuracy),
            loss=np.array(curve.loss),
            score=np.array(fitted.path_scores(parts, alphas)),
        )

    def with_classes(self, names, X=None):
        """Give the same program on other classes, known by their names alone.

        Parameters
        ----------
        names : list of str
            Of the classes, and their labels. What was learned of a class of the same name stays.
        X : array-like of shape (n, ...), optional
            Images of the new classes, without labels: thresholds are read from them. Without,
            the new estimator does not tell inliers.

        Returns
        -------
        Reprogrammer
            Fitted, around the same encoder.

        Raises
        ------
        ValueError
            If the encoder has no text tower.
        """
        fitted = self._record()
        if not fitted.programmed.has_unit_embeddings:
            raise ValueError("other classes are known by their prompts; this encoder has no texts.")
        twin = clone(self).set_params(class_names=list(names))
        settings = twin._frozen_settings()
        classes = twin._named_classes()
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(twin, name, getattr(self, name))
        task, fitted, net = with_other_classes(settings, self._task, fitted, self.net_, classes)
        twin._publish(settings, task, classes, fitted, net)
        if X is not None:
            twin._fitted = fitted.with_thresholds(twin._pictures(X), settings.ood_retention)
            twin._publish(settings, task, classes, twin._fitted, net)
        return twin

    def to_module(self):
        """Give the whole as a module from images in [0, 1] to class logits.

        Returns
        -------
        nn.Module
            Contains a view of the encoder, ``model``, which shares its weights and nothing
            else; programs and head are the parameters ``programmed.*`` and ``head.*``. It knows
            no rejection: :meth:`predict_inlier` does.
        """
        return self._record().open(own=True)

    def save_program(self, path):
        """Write everything but the encoder to a safetensors file.

        Parameters
        ----------
        path : path-like
            Where to.
        """
        width = getattr(self, "n_features_in_", None)
        said = {"classes": self.classes_.tolist(), "n_features": width}
        write_program(self._record(), self._settings, self._task, said, path)

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
            If the program was made for another encoder or another way of preparing its images,
            or if the file is damaged.
        """
        with unchanged_on_error(self):
            mine = self._frozen_settings()
            params, read = read_program(mine, path)
            self._forget()
            # not into a record that somebody else may hold
            self.pixels, self.training = mine.pixels, mine.training
            self.set_params(**params)
            if read.n_features is not None:
                self.n_features_in_ = read.n_features
            settings = self._frozen_settings()
            self._publish(settings, read.task, read.classes, read.fitted, read.net)
        return self

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_fitted")

    def __sklearn_clone__(self):
        handles = copy.copy(self)
        for name in _SHARED:
            setattr(handles, name, _Handle(getattr(self, name)))
        twin = super(Reprogrammer, handles).__sklearn_clone__()
        for name in _SHARED:
            setattr(twin, name, getattr(self, name))
        return twin

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        tags.input_tags.three_d_array = True
        return tags

    def _forget(self):
        for name in [name for name in vars(self) if name.endswith("_") or name in _PRIVATE]:
            delattr(self, name)

    def _record(self):
        check_is_fitted(self)
        return self._fitted

    def _logits(self, X, batch_norm):
        fitted = self._record()
        if batch_norm not in ("stored", "batch"):
            raise ValueError(f"batch_norm must be 'stored' or 'batch', got {batch_norm!r}.")
        return fitted.logits(self._pictures(X), batch_norm)

    def _frozen_settings(self):
        if self.encoder is not None and not isinstance(self.encoder, FrozenEncoder):
            opener_of(self.encoder)  # refuses what is none before anything is said of X
        values = {name: getattr(self, name) for name in self._get_param_names()}
        for record, kind in RECORDS.items():
            values[record] = kind() if values[record] is None else clone(values[record])
            values[record]._validate_params()
        return Settings(**values)

    def _randomness(self, settings):
        seed = seed_of(settings.random_state)
        known = settings.random_state
        return seed, check_random_state(seed if known is None else known)

    @property
    def _pixels(self):
        if hasattr(self, "_settings"):
            return self._settings.pixels
        return RECORDS["pixels"]() if self.pixels is None else self.pixels

    def _given(self, X):
        X = as_array(X)
        if self._pixels.rows != "tokens" or not len(X):
            return X
        if isinstance(X[0], str):
            if self.tokenizer is None:
                raise ValueError("X holds texts, which must be tokenized: give tokenizer=.")
            return tokens_for(self.tokenizer, None)(list(X)).ids.numpy()
        refuse_uneven(X)
        ids = np.asarray(X)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min() < 0:
            raise ValueError(
                f"X holds {ids.dtype} of shape {ids.shape} where token ids are expected: whole "
                "numbers from 0 on, (n, length), filled up to one length."
            )
        return ids

    def _pictures(self, X, *, reset=False):
        X = self._given(X)
        # token ids are no table: texts may be of any length
        if self.encoder is None or (is_table(X) and self._pixels.rows != "tokens"):
            refuse_uneven(X)
            X = check_rows(self, X, reset=reset).array
        elif is_array(X):
            X = np.asarray(X)
        if not len(X):
            raise ValueError("X holds no rows.")
        return Pictures.of(X, form_of(self._pixels, self.encoder is None))

    def _named_classes(self):
        names = self.class_names
        if isinstance(names, dict):
            return np.array(list(names))
        firsts = [name[0] if isinstance(name, list | tuple) else name for name in names]
        if len(set(firsts)) < len(firsts):
            raise ValueError(f"class_names holds a name twice: {firsts[:20]}.")
        return np.array(firsts)

    def _open(self, settings, X, y, sample_weight, classes=None, *, reset=True):
        if y is None:
            raise ValueError(
                "This Reprogrammer estimator requires y to be passed, but the target y is None; "
                "without labels, class_names is needed."
            )
        pictures, y = self._pictures(X, reset=reset), check_labels(y)
        check_classification_targets(y)
        labels = np.unique(y if classes is None else np.asarray(classes))
        names = self.class_names
        if classes is None and isinstance(names, list | tuple | np.ndarray):
            numbers = labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < len(names)
            # classes without a row: labels that count through the names
            labels = np.arange(len(names)) if numbers and len(names) > len(labels) else labels
        if len(labels) < 2:
            raise ValueError(f"y holds one class only ({labels.tolist()}); at least 2 are needed.")
        codes, weight = _codes(y, labels, len(pictures)), None
        if sample_weight is not None:
            weight = check_sample_weight(sample_weight, y, dtype=np.float64)
            if classes is None and len(np.unique(y[weight > 0])) < 2:
                raise ValueError("only one class has rows of positive weight.")
        balance = settings.training.class_weight
        if balance is not None:
            present = np.unique(y)
            factors = compute_class_weight(balance, classes=present, y=y)
            factors = factors[np.searchsorted(present, y)]
            weight = factors if weight is None else weight * factors
        return pictures, codes, labels, weight

    def _publish(self, settings, task, classes, fitted, net):
        module, choice = fitted.programmed, fitted.choice
        embedded = fitted.class_embeddings()
        text, mapped = module.text, module.head_kind == "mapping"
        self.__dict__.update(
            _settings=settings,
            _task=task.closed(),
            _fitted=fitted,
            _n_features_out=task.n_outputs,
            classes_=classes,
            class_names_=[names[0] for names in task.names],
            encoder_=fitted.encoder,
            net_=net,
            program_=task.program.picture(module.image.detach()).cpu().numpy(),
            text_delta_=None if text is None else text.detach().cpu().numpy(),
            used_tokens_=None if task.text is None else task.text.used.numpy(),
            label_mapping_=module.mapping.cpu().numpy() if mapped else None,
            class_embeddings_=None if embedded is None else embedded.cpu().numpy(),
            alpha_=choice.alpha,
            alpha_curve_=choice.curve,
            logit_scale_=choice.logit_scale,
            head_=choice.head,
            head_losses_=choice.losses,
            ood_score_=choice.score,
            ood_thresholds_=choice.thresholds,
            ood_threshold_=choice.thresholds.get(choice.score),
            history_=net.history,
            n_iter_=len(net.history),
            n_queries_=fitted.n_queries,
        )


def _codes(y, classes, n_rows):
    if len(y) != n_rows:
        raise ValueError(f"X holds {n_rows} pictures and y {len(y)} labels.")
    known = np.isin(y, classes)
    if not known.all():
        raise ValueError(f"y holds labels that are not among the classes: {y[~known][:10]}.")
    return np.searchsorted(classes, y)


class _Handle:
    """Carries an object through `clone` as it is."""

    def __init__(self, value):
        self.value = value

    def __sklearn_clone__(self):
        return self
