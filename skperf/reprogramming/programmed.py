"""A frozen encoder with programs around it, in training."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from skperf.reprogramming.encoders import FrozenEncoder
from skperf.reprogramming.programs import InputProgram, Prompts, TextProgram
from skperf.reprogramming.residual import mixed, unit


class ProgrammedEncoder(nn.Module):
    """The trainable part: program, text delta and head. The encoder is no child of it."""

    zero_shot: Tensor | None
    mapping: Tensor
    shift: Tensor
    stretch: Tensor
    none_level: Tensor

    def __init__(
        self,
        encoder: FrozenEncoder,
        program: InputProgram,
        n_outputs: int,
        n_classes: int,
        head: str,
        *,
        text: TextProgram | None = None,
        prompts: Prompts | None = None,
        zero_shot: Tensor | None = None,
        init: str = "zeros",
        seed: int = 0,
        exact: bool = True,
        training_alpha: float = 0.0,
        none_margin: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.none_margin = none_margin
        self.training_alpha = training_alpha
        self.program = program
        self.text_program = text
        self.prompts = prompts
        self.head_kind = head
        self.exact = exact
        self.n_queries = 0
        self.outputs: Tensor | None = None
        self.image = nn.Parameter(program.start(init, torch.Generator().manual_seed(seed)))
        self.text = None if text is None else nn.Parameter(torch.zeros(text.shape))
        self.register_buffer("zero_shot", None if zero_shot is None else zero_shot.clone())
        self.head = None
        if head == "linear":
            # no draws: the layer starts from zeros
            self.head = nn.utils.skip_init(nn.Linear, n_outputs, n_classes, bias=zero_shot is None)
            for parameter in self.head.parameters():
                parameter.data.zero_()
        self.register_buffer("mapping", torch.full((n_outputs, n_classes), 1 / n_outputs))
        self.register_buffer("shift", torch.zeros(n_outputs))
        self.register_buffer("stretch", torch.ones(n_outputs))
        self.register_buffer("none_level", torch.zeros(()))
        if encoder.dtype == torch.float64:
            self.double()

    @property
    def has_unit_embeddings(self) -> bool:
        """Whether images and classes meet in the space of a text-image encoder."""
        return self.zero_shot is not None

    def forward(
        self, placed: Tensor, plain: Tensor | None = None, classes: Tensor | None = None
    ) -> Tensor:
        """Compute logits of all classes, or of some: placed (n, ...) -> those of `logits`."""
        return self.logits(self.encode(placed, self.image), plain, classes)

    def encode(self, placed: Tensor, weights: Tensor | None) -> Tensor:
        """Encode images on the canvas: placed (n, channels, height, width) -> (n, n_outputs)."""
        self.n_queries += len(placed)
        with torch.set_grad_enabled(self.exact and torch.is_grad_enabled()):
            seen = placed
            if weights is not None and weights.numel():
                seen = self.program.add(placed, weights)
            try:
                outputs = self.encoder.encode_image(seen)
            except RuntimeError as error:  # numpy inside the forward
                if not (seen.requires_grad and "requires grad" in str(error)):
                    raise
                self._refuse_for_want_of_gradients(error)
        if seen.requires_grad and not outputs.requires_grad:
            self._refuse_for_want_of_gradients(None)
        if self.has_unit_embeddings:
            outputs = unit(outputs)
        self.outputs = outputs.detach()
        return outputs

    def logits(
        self, outputs: Tensor, plain: Tensor | None = None, classes: Tensor | None = None
    ) -> Tensor:
        """Compute class logits: outputs (n, n_outputs) -> (n, m), (2, n, m) or (2, n, m + 1)."""
        if self.head_kind == "mapping":
            return outputs @ self.mapping
        if self.zero_shot is None:
            assert self.head is not None
            logits: Tensor = self.head((outputs - self.shift) * self.stretch)
            return logits
        embedded = self.classes(classes)
        similarities = outputs @ embedded.T
        if plain is not None:
            alpha = self.training_alpha
            zero_shot = self.zero_shot if classes is None else self.zero_shot[classes]
            mixes = mixed(outputs, plain, alpha) @ mixed(embedded, zero_shot, alpha).T
            similarities = torch.stack([similarities, mixes])
        if plain is not None and self.none_margin is not None:
            none = self.none_level.expand(*similarities.shape[:-1], 1)
            similarities = torch.cat([similarities, none], -1)
        return self.encoder.logit_scale * similarities + self.encoder.logit_bias

    def classes(self, wanted: Tensor | None = None) -> Tensor:
        """Embed classes, with all that was trained: wanted (m,) -> (m, n_outputs)."""
        return self.shifted(self.embedded_prompts(self.encoder, wanted=wanted), wanted)

    def embedded_prompts(
        self, encoder: FrozenEncoder, model: Any = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Embed the prompts, with the text program: wanted (m,) -> (m, n_outputs)."""
        assert self.zero_shot is not None
        if self.text_program is None or self.text is None or self.prompts is None:
            return self.zero_shot if wanted is None else self.zero_shot[wanted]
        prompts = self.prompts if wanted is None else self.prompts.of(wanted)
        return prompts.embeddings(encoder, self.text_program.hook(self.text), model)

    def shifted(self, prompts: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Add the linear head's offsets, where there are any: prompts (m, n_outputs)."""
        if self.head is None:
            return prompts
        offsets = self.head.weight if wanted is None else self.head.weight[wanted]
        return unit(prompts + offsets)

    def set_none_level(self, plain: Tensor, weight: Tensor | None) -> None:
        """Place the logit of "none of these" above those of zero-shot: plain (n, n_outputs)."""
        assert self.zero_shot is not None
        assert self.none_margin is not None
        largest = (plain.to(self.zero_shot) @ self.zero_shot.T).amax(1)
        weight = torch.ones_like(largest) if weight is None else weight.to(largest)
        margin = self.none_margin / self.encoder.logit_scale
        self.none_level.copy_(largest @ weight / weight.sum() + margin)

    def standardise(self, outputs: Tensor) -> None:
        """Take over means and deviations, for the linear head: outputs (n, n_outputs)."""
        deviation = outputs.double().std(0, correction=0)
        self.shift.copy_(outputs.double().mean(0))
        self.stretch.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 1.0))

    def _refuse_for_want_of_gradients(self, cause: Exception | None) -> NoReturn:
        raise ValueError(
            f"{type(self.encoder.model).__name__} lets no gradient through from its outputs to its "
            "pictures (numpy or detach() inside its forward?), so no program on them can be "
            "trained through it: set border=0, which trains on its features, or gradient='spsa', "
            "which only calls it."
        ) from cause

    def __getstate__(self) -> dict[str, Any]:
        # the encoder travels with whoever holds this module, once
        return {**self.__dict__, "encoder": None, "outputs": None}
