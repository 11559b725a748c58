"""CLIP's weights from files and to files: OpenAI's, OpenCLIP's and Hugging Face's.

No file can run code: archives of TorchScript are read as tensors alone, pickles with torch's ``weights_only``.
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gpipe.models.attention import Activation
from gpipe.models.clip import CLIP, clip
from gpipe.models.clip_layouts import from_hugging_face, is_hugging_face, to_hugging_face
from gpipe.models.clip_variants import Name
from gpipe.models.settings import require_choice
from gpipe.models.torchscript_archive import is_torchscript, read_torchscript

Layout = Literal["published", "hugging_face"]

_OF_THE_LOSS = frozenset({"logit_scale", "logit_bias"})
# Numbers beside the weights in OpenAI's archives.
_SETTINGS = frozenset({"input_resolution", "context_length", "vocab_size"})
_SHOWN = 5


def load_weights(
    path: str | os.PathLike[str], model: CLIP, loss: nn.Module | None = None, *, activation: Activation
) -> None:
    """Load a file into a model, and its ``logit_scale`` into a loss, or refuse it whole.

    Values are converted to the dtypes of the model's parameters, so half-precision files load into a float32 model.

    Args:
        path: see :func:`read_weights`.
        model: what the weights go to; the one inside a pipe on the same devices will do.
        loss: what takes ``logit_scale``; without one it is left out.
        activation: the one the weights were trained with, which nothing in a file says: ``"quick_gelu"`` for OpenAI's
            and for OpenCLIP's models named ``*-quickgelu``, ``"gelu"`` for OpenCLIP's others. Hugging Face's
            ``config.json`` calls it ``hidden_act``.

    Raises:
        ValueError: if the activation is not the model's, or the file cannot be read, or it lacks a weight, has an
            unknown one, or one of another shape. Nothing has been loaded then.
        FileNotFoundError: if there is no such file.
    """
    require_choice("activation", activation, ("quick_gelu", "gelu"))
    if activation != model.activation:
        raise ValueError(
            f"expected weights trained with the model's activation {model.activation!r}, given activation="
            f"{activation!r}; build the model with activation={activation!r}"
        )
    weights = read_weights(path)
    if loss is None:
        weights = {name: weight for name, weight in weights.items() if name not in _OF_THE_LOSS}
    own = model.state_dict() | ({} if loss is None else loss.state_dict())
    _check(path, weights, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def read_weights(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights in a file under their published names, on the CPU.

    Args:
        path: a TorchScript archive as OpenAI publishes; a ``.safetensors`` file; or what ``torch.save`` wrote of a
            state dict, alone or under ``state_dict`` as OpenCLIP's training does it. Names may be Hugging Face's.
        dtype: what floating-point weights are converted to; None leaves them as they are in the file.

    Raises:
        ValueError: if the file is damaged, of another kind, or would run code.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, given {path}, which is none; correct the path")
    weights = _read(path)
    if is_hugging_face(weights):
        weights = from_hugging_face(weights)
    if dtype is None:
        return weights
    return {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}


def save_weights(
    path: str | os.PathLike[str],
    model: CLIP,
    loss: nn.Module | None = None,
    *,
    layout: Layout = "published",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model's weights, and its loss's ``logit_scale``, as safetensors.

    A ``.safetensors`` file in the published layout is what OpenCLIP reads, which asks for ``logit_scale`` too.

    Args:
        path: the file; it is replaced once all is written.
        model: whose weights are written.
        loss: whose weights are written beside them.
        layout: ``"published"``, or ``"hugging_face"`` for models with a Vision Transformer.
        dtype: what floating-point weights are converted to; None leaves them as they are.

    Raises:
        ValueError: if the layout is not known, or has no names for the model's weights.
        OSError: if the file cannot be written.
    """
    from safetensors.torch import save_file  # of the extra `train`; models can be built without

    require_choice("layout", layout, ("published", "hugging_face"))
    weights = model.state_dict() | ({} if loss is None else loss.state_dict())
    if layout == "hugging_face":
        weights = to_hugging_face(weights)
    converted = {
        name: weight.detach().to("cpu", dtype if weight.is_floating_point() else None).contiguous()
        for name, weight in weights.items()
    }
    beside = Path(f"{os.fspath(path)}.partial")
    try:
        save_file(converted, beside, metadata={"format": "pt"})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Tensor]:
    if is_torchscript(path):
        return {name: weight for name, weight in read_torchscript(path).items() if name not in _SETTINGS}
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file, given {path}: {error}; get the file anew, or rename it if it is another kind"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """What torch.save wrote."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError) as error:
        cause = error.__context__ or error  # torch wraps what it found in advice to load the file nevertheless
        reason = str(cause).partition("\n")[0] or type(cause).__name__
        raise ValueError(
            f"expected a file of nothing but tensors, given {path}, which would run code or is damaged ({reason}); get "
            "the weights as safetensors, or convert the file where you trust what is in it"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(weight, Tensor) for weight in content.values()):
        raise ValueError(
            f"expected a state dict in {path}, or one under 'state_dict', given {type(content).__name__} of something "
            "else; save model.state_dict()"
        )
    # What DistributedDataParallel puts before every name.
    return {str(name).removeprefix("module."): weight for name, weight in content.items()}


def _check(path: object, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not all there, of the shapes and kinds expected, and nothing besides."""
    other = [name for name, wanted in expected.items() if name in weights and not _fits(weights[name], wanted)]
    problems = [
        _listed("lacks", [name for name in expected if name not in weights]),
        _listed("has unknown", [name for name in weights if name not in expected]),
        _listed("has others of", [f"{name}: {_form(weights[name])}, not {_form(expected[name])}" for name in other]),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        remedy = _remedy(weights, expected)
        raise ValueError(f"expected exactly the weights of the model in {path}, which {found}; {remedy}")


def _form(weight: Tensor) -> str:
    return f"{tuple(weight.shape)} {weight.dtype}"


def _fits(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}"


def _remedy(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What to do, by what the file seems to hold."""
    differing = weights.keys() ^ expected.keys()
    if differing and differing <= _OF_THE_LOSS:
        return "give the loss that the weights were trained with, or none to leave out the temperature"
    if name := published_name(weights):
        return f"the file's shapes are those of {name!r}: build the model with clip({name!r})"
    return "build the model with the sizes of the file's, or get a file of this model's"


def published_name(weights: Mapping[str, Tensor]) -> Name | None:
    """Which of the nine published CLIPs has weights of these shapes, if one does.

    Args:
        weights: by their published names.
    """
    names: tuple[Name, ...] = get_args(Name)
    for name in names:
        with torch.device("meta"):
            expected = clip(name).state_dict()
        if all(key in weights and weights[key].shape == wanted.shape for key, wanted in expected.items()):
            return name
    return None
