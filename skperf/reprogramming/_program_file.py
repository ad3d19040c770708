"""A fitted program as a small file, for whoever has the same encoder."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skperf.backbone.files import whole
from skperf.reprogramming._net import ProgramNet
from skperf.reprogramming._options import RECORD_OF, Settings, form_of
from skperf.reprogramming._task import Task, on_device, prepared, settle
from skperf.reprogramming._training import make_net, record_of
from skperf.reprogramming.encoders import FrozenEncoder, open_encoder
from skperf.reprogramming.fitted import FittedProgram
from skperf.reprogramming.heads import rebuilt
from skperf.reprogramming.judging import Choice
from skperf.reprogramming.pictures import Pictures
from skperf.reprogramming.pixels import PixelPipeline
from skperf.reprogramming.programs import TextProgram
from skperf.reprogramming.rejection import FEATURE_SCORES, SCORES

FORMAT = 3
#: Parameters that give a program its meaning; they travel with it.
_PARAMETERS = (
    *("image_shape", "channels", "input_range", "layout", "border", "bound", "clip", "shrink"),
    *("renormalize", "ood_temperature", "ood_retention"),
)
#: What `pixels` may say of the encoder's own preparation of images.
_SAID = {"normalize": "auto", "resize": "auto", "interpolation": "auto", "shrink": None}


@dataclass(frozen=True)
class ReadProgram:
    """What a file holds, around the reader's encoder."""

    task: Task
    fitted: FittedProgram
    net: ProgramNet
    classes: np.ndarray
    n_features: int | None


def write_program(
    fitted: FittedProgram, settings: Settings, task: Task, known: dict[str, Any], path: Any
) -> None:
    """Write program, text delta, heads and decisions."""
    if settings.encoder is None:
        raise ValueError(
            "encoder=None stands for a built-in encoder made from the training rows; there is "
            "nobody to load its program. Use pickle."
        )
    if settings.pixels.rows != "pictures":
        raise ValueError(
            f"rows={settings.pixels.rows!r}: how rows are drawn was learned from the training rows "
            "and has no place in a program file. Use pickle."
        )
    choice, module = fitted.choice, fitted.programmed
    text, canvas = task.text, settings.pixels.canvas
    description = known | {
        "format": FORMAT,
        "encoder": fitted.encoder._fingerprint(),
        "pipeline": asdict(fitted.encoder.pipeline),
        "said": {name: getattr(settings.pixels, name) for name in _SAID},
        "outputs": [fitted.encoder.outputs, fitted.encoder.probabilities],
        "parameters": {name: _value(settings, name) for name in _PARAMETERS},
        "class_names": task.names,
        "texts": task.texts,
        "prompts": settings.prompts if _is_text(settings.prompts) else None,
        "module_head": module.head_kind,
        "head_kind": settings.head,
        "text_kind": settings.text,
        "text": None if text is None else [text.n_positions, text.width, text.first],
        "set_canvas": None if isinstance(canvas, str) else np.broadcast_to(canvas, 2),
        "input_shape": task.image_shape,
        "canvas": task.program.canvas,
        "choice": {name: getattr(choice, name) for name in _CHOSEN},
        "class_head": None if fitted.head is None else fitted.head.describe(),
    }
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != "zero_shot"}
    if text is not None:
        tensors["used_tokens"] = text.used
    if fitted.head is not None:
        tensors |= {f"class_head.{n}": t for n, t in fitted.head.state_dict().items()}
    if choice.score in fitted.scorers:
        scorer = vars(fitted.scorers[choice.score])
        description["scorer"] = {n: v for n, v in scorer.items() if not torch.is_tensor(v)}
        tensors |= {f"scorer.{n}": v for n, v in scorer.items() if torch.is_tensor(v)}
    kept = {*SCORES, "disagreement", choice.score}
    thresholds = description["choice"]["thresholds"]
    description["choice"]["thresholds"] = {n: t for n, t in thresholds.items() if n in kept}
    tensors = {n: tensor.detach().cpu().contiguous().clone() for n, tensor in tensors.items()}
    description = json.loads(json.dumps(description, default=lambda v: v.tolist()))
    description["checksum"] = _checksum(description, tensors)
    with whole(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata={"skperf_program": json.dumps(description)})


def _checksum(known: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    own = {name: value for name, value in known.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


_CHOSEN = ("alpha", "logit_scale", "score", "thresholds", "head")


def read_program(settings: Settings, path: Any) -> tuple[dict[str, Any], ReadProgram]:
    """Read a file: the parameters that belong to the program, and the program."""
    try:
        return _read(settings, path)
    except SafetensorError as error:
        raise ValueError(f"{path} holds no program of a Reprogrammer: {error}.") from error
    except (LookupError, TypeError, AttributeError, MemoryError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or of another version: its description lacks or garbles {error}."
        ) from error
    except ValueError as error:  # of any part of it
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _read(settings: Settings, path: Any) -> tuple[dict[str, Any], ReadProgram]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "skperf_program" not in metadata:
            raise ValueError(f"{path} holds no program of a Reprogrammer.")
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        known = json.loads(metadata["skperf_program"])
        _check(known, shapes, path)
        tensors = {name: file.get_tensor(name) for name in names}
        if known["checksum"] != _checksum(known, tensors):
            raise ValueError(f"{path} is damaged: it is not what was written, by its checksum.")
        encoder, told = _opened(settings, known)
    classes = np.array(known["classes"])
    params = _parameters(known) | told
    reader = _reader(settings, known, params, encoder)
    first = np.zeros((1, known["input_shape"][0], *known["canvas"]), dtype=np.uint8)
    form = form_of(reader.pixels)
    task = settle(reader, Pictures(first, form), classes)
    text = known["text"]
    if text is not None:
        text = TextProgram(tensors.pop("used_tokens"), *text)
    task = replace(task, text=text, image_shape=tuple(known["input_shape"]))
    net = make_net(reader, task, 1, 0, 0, reader.max_epochs, False).begin(task.n_classes)
    parts: dict[str, dict[str, torch.Tensor]] = {"": {}, "class_head": {}, "scorer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part if part in parts else ""][rest if part in parts else name] = tensor
    module = net.module_
    _load(module, parts[""], path)
    choice = Choice(**known["choice"], curve=None)
    head, scorers = None, {}
    try:
        if known["class_head"] is None and parts["class_head"]:
            raise KeyError("class_head")
        if known["class_head"] is not None:
            head = rebuilt(known["class_head"], parts["class_head"])
            if head(torch.zeros(1, task.n_outputs)).shape != (1, task.n_classes):
                raise KeyError("class_head")
        if known.get("scorer") is not None:
            values = parts["scorer"] | known["scorer"]
            kind = FEATURE_SCORES[choice.score]
            if set(values) != {part.name for part in fields(kind)}:
                raise ValueError(
                    f"{path} holds its score {choice.score!r} as an earlier version wrote it "
                    f"({sorted(values)}); fit and save the program anew."
                )
            scorer = kind(**values)
            scorer.score(torch.zeros(2, task.n_outputs))
            scorers = {choice.score: scorer}
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its head or score does not fit: {error}.") from error
    fitted = record_of(reader, task, net, choice, head, scorers, form, 1)
    return params, ReadProgram(task, fitted, net, classes, known["n_features"])


def _check(known: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: Any) -> None:
    """Refuse what no program can be, before anything of its size is made."""

    def refuse(what: str) -> None:
        raise ValueError(f"{path} is damaged: {what}.")

    if known["format"] != FORMAT:
        refuse(f"its format is {known['format']}, expected {FORMAT}; save the program anew")
    classes, canvas, inputs = known["classes"], known["canvas"], known["input_shape"]
    if len(classes) < 2 or len({*map(str, classes)}) != len(classes):
        refuse(f"its classes {classes[:20]} are fewer than two or not all different")
    if len(known["class_names"]) != len(classes):
        refuse(f"it names {len(known['class_names'])} of {len(classes)} classes")
    if known["texts"] is not None and len(known["texts"]) != len(classes):
        refuse(f"it has prompts for {len(known['texts'])} of {len(classes)} classes")
    sides = [*canvas, *inputs]
    if len(canvas) != 2 or len(inputs) != 3 or not all(0 < int(side) <= 8192 for side in sides):
        refuse(f"its canvas {canvas} or the shape of its pictures {inputs} is none")
    chosen = known["choice"]
    numbers = [chosen["alpha"], chosen["logit_scale"], *chosen["thresholds"].values()]
    if not np.isfinite(np.asarray(numbers, dtype=float)).all() or not 0 <= chosen["alpha"] <= 1:
        refuse("alpha, scale or thresholds are not finite, or alpha is not in [0, 1]")
    missing = {"image", "mapping", "shift", "stretch", "none_level"} - set(shapes)
    if missing:
        refuse(f"it lacks the tensors {sorted(missing)}")
    if known["text"] is not None:
        n_positions, width, _ = known["text"]
        n_rows = shapes["used_tokens"][0] + abs(n_positions)
        if shapes["text"] != (n_rows, width):
            refuse(f"its text program is of another shape than {(n_rows, width)}")
    (height, width), border = canvas, int(known["parameters"]["border"])
    inner = max(0, height - 2 * border) * max(0, width - 2 * border)
    pixels = height * width - inner if known["parameters"]["layout"] != "mask" else None
    if pixels is None and shapes["image"][-1] < height * width:
        refuse(f"a pattern and a mask on {canvas} have more weights than {shapes['image']}")
    if pixels is not None and shapes["image"][-1:] != (pixels,):
        refuse(f"a border of {border} on {canvas} has {pixels} pixels, its own {shapes['image']}")
    told = known["set_canvas"]
    if told is not None and (told if isinstance(told, list) else [told] * 2) != list(canvas):
        refuse(f"its canvas {told} is another than {canvas}")
    if len(shapes["mapping"]) != 2 or shapes["mapping"][1] != len(classes):
        refuse(f"its {len(classes)} classes do not go with tensors of shape {shapes['mapping']}")


def _opened(settings: Settings, known: dict[str, Any]) -> tuple[FrozenEncoder, dict[str, Any]]:
    """Give the reader's encoder the file's pipeline, and say what must be told to get it."""
    encoder = open_encoder(
        on_device(settings), processor=settings.processor, tokenizer=settings.tokenizer
    )
    if encoder._fingerprint() != known["encoder"]:
        raise ValueError(
            "the program was made for another encoder: its fingerprint is "
            f"{known['encoder'][:16]}..., that of this encoder {encoder._fingerprint()[:16]}..."
        )
    if known["texts"] is not None and encoder.tokenize is None:
        raise ValueError("the program has prompts, which must be tokenized: give tokenizer=.")
    stored = known["pipeline"]
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
    pipeline = PixelPipeline(**values)
    pixels, params = settings.pixels, dict[str, Any]()
    silent = all(_same(getattr(pixels, name), value) for name, value in _SAID.items())
    if silent:  # what the writer said beside the processor holds
        said = _SAID | known.get("said", {})
        pixels, params = SimpleNamespace(**said), {n: v for n, v in said.items() if v != _SAID[n]}
    own = prepared(pixels, encoder.pipeline)
    told = settings.processor is not None or not silent
    differing = [n for n in values if getattr(own, n) != values[n] and n != "shrink"]
    if told and differing:
        seen = {name: getattr(own, name) for name in differing}
        raise ValueError(
            "the program was made with another preparation of the images: "
            f"{ {name: values[name] for name in differing} }; processor or pixels now say {seen}. "
            "Leave them out, and the program's own is used."
        )
    if differing:
        statistics = (pipeline.mean, pipeline.std)
        params["normalize"] = None if pipeline.mean is None else statistics
        params["interpolation"] = pipeline.interpolation
        params["resize"] = pipeline.resize if pipeline.resize != "patches" else "auto"
    outputs, probabilities = known["outputs"]
    changes = {"outputs": outputs, "probabilities": probabilities, "pipeline": pipeline}
    return replace(encoder, **changes), params


def _parameters(known: dict[str, Any]) -> dict[str, Any]:
    params = dict(known["parameters"])
    names = known["class_names"]
    params["class_names"] = [own[0] if len(own) == 1 else own for own in names]
    params |= {name: known[name] for name in ("prompts", "text_kind", "head_kind")}
    params["text"], params["head"] = params.pop("text_kind"), params.pop("head_kind")
    if params["prompts"] is None:
        params["prompts"] = dict(zip(known["classes"], known["texts"] or [], strict=False))
    params["alpha"], params["ood_score"] = known["choice"]["alpha"], known["choice"]["score"]
    if known["set_canvas"] is not None:
        params["canvas"] = known["set_canvas"]
    return params


def _reader(
    settings: Settings, known: dict[str, Any], params: dict[str, Any], encoder: FrozenEncoder
) -> Settings:
    """Make the settings under which the program is put together again."""
    for name, value in (params | _SAID).items():
        if name in RECORD_OF:
            getattr(settings, RECORD_OF[name]).set_params(**{name: value})
    texts = known["texts"]
    changed = {name: value for name, value in params.items() if name not in RECORD_OF}
    changed |= {"encoder": encoder, "head": known["module_head"], "ood_score": "mcm"}
    changed["text"] = "none" if texts is not None else "auto"
    changed["prompts"] = {} if texts is None else dict(zip(known["classes"], texts, strict=True))
    return settings.but(**changed)


def _load(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Any) -> None:
    wanted = {n: t for n, t in module.state_dict().items() if n != "zero_shot"}
    wrong = {
        "missing": sorted(set(wanted) - set(tensors)),
        "unknown": sorted(set(tensors) - set(wanted)),
        "of another shape": [
            f"{n} {tuple(tensors[n].shape)} for {tuple(wanted[n].shape)}"
            for n in sorted(set(wanted) & set(tensors))
            if tensors[n].shape != wanted[n].shape
        ],
    }
    found = {what: names for what, names in wrong.items() if names}
    if found:
        raise ValueError(f"{path} is damaged, or made with other parameters: tensors {found}.")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path} is damaged: tensor {name!r} holds values that are not finite."
            )
    module.load_state_dict(tensors, strict=False)


def _is_text(prompts: Any) -> bool:
    many = isinstance(prompts, list | tuple)
    return isinstance(prompts, str) or (many and all(isinstance(p, str) for p in prompts))


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, str) and value == default)


def _value(settings: Settings, name: str) -> Any:
    record = RECORD_OF.get(name)
    return getattr(settings if record is None else getattr(settings, record), name)
