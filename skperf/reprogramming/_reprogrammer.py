"""The estimator: a frozen encoder, reprogrammed for a task of one's own."""

import copy

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from skperf.backbone._callbacks import CallbackSupportMixin, tells_callbacks
from skperf.backbone._sklearn import DOC_LINK, check_sample_weight, fit_context
from skperf.backbone._state import unchanged_on_error
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.reprogramming._fitted import ProgrammedMixin
from skperf.reprogramming._judging import assemble, choose
from skperf.reprogramming._task import CONSTRAINTS, RELEASED_SETTINGS, settle
from skperf.reprogramming._training import hold_out, make_net, prepare_head

_SHARED = ("encoder", "processor", "tokenizer")
_PRIVATE = ("_task", "_module", "_n_features_out")


class Reprogrammer(CallbackSupportMixin, ProgrammedMixin, BaseEstimator):
    """Classifier around a frozen encoder: a program on its inputs and one on its tokens.

    Logits are ``scale * mix(u, u0) @ mix(q, q0).T``, where u and q embed the reprogrammed
    images and prompts, u0 and q0 the plain ones, and ``mix(a, b) = (1 - alpha) a + alpha b``.
    Only the programs are trained; the encoder is shared by clones and left as it was found.

    Parameters
    ----------
    encoder : object, optional
        A transformers ``CLIPModel`` or ``SiglipModel``; an object with ``encode_image`` and
        ``encode_text`` as in open_clip; any ``nn.Module`` from images to logits or features;
        a callable from arrays (n, channels, height, width) to scores (n, s), with `gradient`
        "rge" or "spsa". None: fixed features of flat rows of any range.
    processor, tokenizer : object, optional
        A transformers processor; a transformers or open_clip tokenizer.
    class_names : list or dict, optional
        In the order of ``classes_``, or by label; by default the labels as words.
    prompts : str or list of str, default="a photo of a {}"
        Templates; the embeddings of several are averaged.
    image_shape : tuple, optional
        (height, width) or (channels, height, width) of flat rows.
    channels : {"first", "last"}, default="first"
        Where 4-D arrays have their channels; one channel is repeated where three are needed.
    input_range : pair of float, default=(0, 1)
        Darkest and brightest value of float images.
    normalize : "auto", None or (mean, std), default="auto"
        Of the encoder's input; "auto" takes what encoder or processor say.
    canvas : "auto", int or (height, width), default="auto"
        Size that the encoder sees; "auto" takes the encoder's own, else that of the images.
    layout : {"overlay", "pad"}, default="overlay"
        Whether the border lies on the picture's edge or the picture shrinks into it.
    border : int, default=16
        Width of the border in pixels of the canvas (meant for 224).
    bound : {"tanh", "clamp", "none"}, default="tanh"
        Keeps the border's values in (-1, 1).
    clip : {"inward", "plain"}, default="inward"
        Gradient of the clipping to [0, 1]: "inward" lets no pixel get stuck outside.
    init : {"zeros", "normal"}, default="zeros"
        Start of the border; zeros start from the plain picture.
    text : {"auto", "none", "bias", "position", "table", "table+position"}, default="auto"
        What is added to token embeddings: one row, a row for each position, one for each
        token in the prompts. "auto" is "table", unless `head` is "linear".
    head : {"auto", "prompts", "mapping", "linear"}, default="auto"
        Class prompts; a map of the encoder's own labels; a trained linear layer, which where
        there are prompts is an offset to their unit embeddings. "auto" goes by the encoder: with
        text towers "linear" if `text` is "auto" too, else "prompts".
    mapping : {"blm", "blm+", "rlm", "flm", "ilm", "linear"} or array (s, n_classes), default="blm"
        Bayesian, its soft form, random, frequent, iterative, trained, or given.
    mapping_m : int, default=1
        Source labels of a class in the one-to-one mappings.
    mapping_smoothing : float, default=1.0
        Of the Bayesian mappings.
    objective : {"cross_entropy", "contrastive"}, default="cross_entropy"
        Over all classes, or between the images and captions of a batch.
    focal_gamma, focal_alpha : float, default=0.0, 1.0
        Exponent and factor of the focal form.
    alpha : "auto", float or list of float, default="auto"
        0 = reprogrammed, 1 = zero-shot. Of a list, or of 0, 0.1, ..., 1 for "auto", the best
        on the rows held out (accuracy, then loss); 0 without a zero-shot head.
    training_alpha : float, default=0.5
        The mix whose loss is averaged with that of the reprogrammed representation in
        training; 0 trains the latter alone, as the released code does.
    none_margin : float or None, default=2.0
        Training adds one logit to those of the classes, "none of these": the same for all
        images, so far above the mean of the zero-shot classifier's largest logits. The right
        class has to beat it, which gives the similarities themselves a meaning ("max_logit"
        and "energy" then reject better). Without effect where `training_alpha` is 0, in
        contrast within the batch, and for encoders without a text tower.
    renormalize : bool, default=False
        Whether mixed embeddings are scaled back to unit length.
    logit_scale : "encoder", "calibrated" or float, default="encoder"
        Between cosines and logits; "calibrated" fits it to the rows held out.
    ood_score : {"mcm", "max_logit", "energy", "entropy", "disagreement"}, default="mcm"
        Score of :meth:`score_samples`.
    ood_temperature : float, default=1.0
        Divides the cosines (or logits) in the score.
    ood_retention : float, default=0.95
        Share of the rows held out that the threshold keeps.
    lr : "auto" or float, default="auto"
        Learning rate of the border; "auto" is 0.03 where there are prompts, else 0.1.
    text_lr, head_lr : "auto" or float, default="auto"
        Learning rates of text delta and linear head; "auto" goes by the scale of what they
        are added to, which differs by orders of magnitude between encoders.
    weight_decay, text_decay : float, default=0.0
        Coupled decay of the border, decoupled decay of the text delta towards the
        pre-trained embeddings.
    schedule : {"cosine", "constant"}, default="cosine"
        Of the learning rates.
    warmup : float, default=0.05
        Share of the steps; from 1 on, their number.
    max_epochs : int, default=25
        0 is the zero-shot classifier.
    batch_size : int, default=128
        Images in a step.
    validation_fraction : float, default=0.1
        Share of every class held out for alpha, threshold and early stopping; where
        nothing is held out these are taken from the training rows.
    early_stopping : bool, default=False
        Stop when the loss held out has not improved, and go back to its best.
    n_iter_no_change : int, default=5
        Epochs of patience.
    gradient : {"exact", "rge", "spsa"}, default="exact"
        How the border's gradient is found; the latter two only call the encoder.
    n_directions, smoothing : int, float, default=8, 0.01
        Number and length of the differences of an estimated gradient.
    query_budget : int, optional
        Images that `fit` may send to the encoder.
    device : str, optional
        Where to work; an encoder that lives elsewhere is copied there.
    random_state : int, RandomState or None, default=None
        Seeds the split, the order and whatever is drawn.
    verbose : int, default=0
        Above 0, shows progress.
    net_params : dict, optional
        Passed on to the skorch net, such as ``{"callbacks": [...]}``.

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
        With `head` "mapping".
    alpha_, logit_scale_, ood_threshold_ : float
        What was chosen.
    alpha_curve_ : AlphaCurve or None
        Accuracy and loss of each alpha on the rows held out.
    encoder_ : FrozenEncoder
        Handle to the encoder.
    net_ : ProgramNet
        The skorch net, with ``history_``; it owns the programs only.
    history_ : skorch.History
        Losses by epoch.
    n_iter_, n_queries_ : int
        Epochs, and images that `fit` sent to the encoder.

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

    def __init__(
        self,
        encoder=None,
        *,
        processor=None,
        tokenizer=None,
        class_names=None,
        prompts="a photo of a {}",
        image_shape=None,
        channels="first",
        input_range=(0.0, 1.0),
        normalize="auto",
        canvas="auto",
        layout="overlay",
        border=16,
        bound="tanh",
        clip="inward",
        init="zeros",
        text="auto",
        head="auto",
        mapping="blm",
        mapping_m=1,
        mapping_smoothing=1.0,
        objective="cross_entropy",
        focal_gamma=0.0,
        focal_alpha=1.0,
        alpha="auto",
        training_alpha=0.5,
        none_margin=2.0,
        renormalize=False,
        logit_scale="encoder",
        ood_score="mcm",
        ood_temperature=1.0,
        ood_retention=0.95,
        lr="auto",
        text_lr="auto",
        head_lr="auto",
        weight_decay=0.0,
        text_decay=0.0,
        warmup=0.05,
        schedule="cosine",
        max_epochs=25,
        batch_size=128,
        validation_fraction=0.1,
        early_stopping=False,
        n_iter_no_change=5,
        gradient="exact",
        n_directions=8,
        smoothing=0.01,
        query_budget=None,
        device=None,
        random_state=None,
        verbose=0,
        net_params=None,
    ):
        self.encoder = encoder
        self.processor = processor
        self.tokenizer = tokenizer
        self.class_names = class_names
        self.prompts = prompts
        self.image_shape = image_shape
        self.channels = channels
        self.input_range = input_range
        self.normalize = normalize
        self.canvas = canvas
        self.layout = layout
        self.border = border
        self.bound = bound
        self.clip = clip
        self.init = init
        self.text = text
        self.head = head
        self.mapping = mapping
        self.mapping_m = mapping_m
        self.mapping_smoothing = mapping_smoothing
        self.objective = objective
        self.focal_gamma = focal_gamma
        self.focal_alpha = focal_alpha
        self.alpha = alpha
        self.training_alpha = training_alpha
        self.none_margin = none_margin
        self.renormalize = renormalize
        self.logit_scale = logit_scale
        self.ood_score = ood_score
        self.ood_temperature = ood_temperature
        self.ood_retention = ood_retention
        self.lr = lr
        self.text_lr = text_lr
        self.head_lr = head_lr
        self.weight_decay = weight_decay
        self.text_decay = text_decay
        self.warmup = warmup
        self.schedule = schedule
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.gradient = gradient
        self.n_directions = n_directions
        self.smoothing = smoothing
        self.query_budget = query_budget
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.net_params = net_params

    @classmethod
    def released(cls, encoder=None, **params):
        """Make an estimator with the settings of the authors' released code.

        Parameters
        ----------
        encoder : object, optional
            As in the constructor.
        **params : dict
            Override the settings; on small images the border, on short training the
            warm-up must be.

        Returns
        -------
        Reprogrammer
            Not fitted.
        """
        return cls(encoder, **(RELEASED_SETTINGS | params))

    @fit_context(prefer_skip_nested_validation=False)
    @tells_callbacks
    def fit(self, X, y, sample_weight=None):
        """Train the programs, then choose alpha and the threshold on rows held out.

        Parameters
        ----------
        X : array-like of shape (n, 3, H, W), (n, 1, H, W) or (n, n_features)
            Images in [0, 1] or uint8; flat rows need `image_shape`.
        y : array-like of shape (n,)
            Labels.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows.

        Returns
        -------
        Reprogrammer
            Itself.
        """
        with unchanged_on_error(self):
            self._forget()
            self._train(*self._open(X, y, sample_weight))
        return self

    def _train(self, images, codes, classes, weight):
        def part(rows):
            return images[rows], codes[rows], None if weight is None else weight[rows]

        task = settle(self, images, classes)
        train, held_out = self._split(codes)
        judged = held_out if len(held_out) else train
        net = make_net(self, task, n_train=len(train), n_held_out=len(held_out))
        stopping = None
        if self.early_stopping and len(held_out):
            stopping = images[held_out], torch.as_tensor(codes[held_out])
        with task.encoder.open():
            net.begin(images, task.n_classes)
            prepare_head(net, self, *part(train))
            net.learn(*part(train), stopping)
            choice = choose(self, net, task.alphas, *part(judged))
            self.__dict__.update(assemble(self, net, task, classes, choice))

    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train the programs one epoch further, at a constant rate.

        From the second call on, alpha and the threshold are chosen on the new rows before
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
        first = not hasattr(self, "net_")
        known = classes if first else self.classes_
        images, codes, labels, weight = self._open(X, y, sample_weight, known, reset=first)
        task = settle(self, images, labels) if first else self._task
        with task.encoder.open():
            if first:
                net = make_net(self, task, n_train=len(images), n_held_out=0)
                net.begin(images, task.n_classes)
                prepare_head(net, self, images, codes, weight)
                alphas = task.alphas[:1]
            else:
                net, alphas = copy.deepcopy(self.net_), task.alphas
            choice = choose(self, net, alphas, images, codes, weight)
            net.set_params(max_epochs=1, callbacks=[])
            net.learn(images, codes, weight)
            self.__dict__.update(assemble(self, net, task, labels, choice))
        return self

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

    def _open(self, X, y, sample_weight, classes=None, *, reset=True):
        X, y = check_labelled_rows(self, X, y, reset=reset)
        images = self._as_images(X)
        labels = np.unique(y if classes is None else np.asarray(classes))
        if len(labels) < 2:
            raise ValueError(f"y holds one class only ({labels.tolist()}); at least 2 are needed.")
        known = np.isin(y, labels)
        if not known.all():
            raise ValueError(f"y holds labels that are not among the classes: {y[~known][:10]}.")
        weight = None
        if sample_weight is not None:
            weight = check_sample_weight(sample_weight, X, dtype=np.float64)
            if classes is None and len(np.unique(y[weight > 0])) < 2:
                raise ValueError("only one class has rows of positive weight.")
        return images, np.searchsorted(labels, y), labels, weight

    def _split(self, codes):
        rows = np.arange(len(codes))
        if self.max_epochs == 0:
            # nothing is trained, so every row is as good as held out
            return rows, rows[:0]
        return hold_out(codes, self.validation_fraction, check_random_state(self.random_state))


class _Handle:
    """Carries an object through `clone` as it is."""

    def __init__(self, value):
        self.value = value

    def __sklearn_clone__(self):
        return self
