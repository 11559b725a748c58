"""An optimizer's state by the names of its parameters, so that it fits every division of them among ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gpipe.saving.plain_values import JSON, decoded, encoded, from_inline, inline

STATE = "optimizer.state"
_LIVE = ("params", "param_names")  # of a group: what the optimizer at hand says, not the save

Names = Mapping[nn.Parameter, str]
"""A name for every parameter that an optimizer may hold."""


def parameter_names(optimizer: Optimizer, names: Names) -> list[list[str]]:
    """Names of an optimizer's parameters, group by group.

    Raises:
        ValueError: It holds a parameter that has no name.
    """
    found: list[list[str]] = []
    for i, group in enumerate(optimizer.param_groups):
        for k, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise ValueError(
                    f"parameter {k} of the optimizer's group {i}, of shape {tuple(parameter.shape)}, belongs neither "
                    "to the module nor to the loss, so the save has no name for it: give the optimizer their "
                    "parameters alone, and the loss as loss_fn="
                )
        found.append([names[parameter] for parameter in group["params"]])
    return found


def described(optimizer: Optimizer, names: Names, put: Callable[[str, Tensor], JSON]) -> dict[str, Any]:
    """An optimizer's state as JSON, with its tensors put aside as ``optimizer.state.<parameter>.<key>``.

    Raises:
        TypeError, ValueError: It holds what a save cannot.
    """
    own = parameter_names(optimizer, names)
    held = optimizer.state_dict()
    if held.keys() != {"state", "param_groups"}:
        raise TypeError(
            f"{type(optimizer).__name__}.state_dict() must have the keys 'state' and 'param_groups', as torch's "
            f"optimizers do, but has {sorted(held)}: keep what is more elsewhere, as in extra="
        )
    groups: list[dict[str, Any]] = []
    of_index: dict[Any, str] = {}
    for i, (group, group_names) in enumerate(zip(held["param_groups"], own, strict=True)):
        options = {key: value for key, value in group.items() if key not in _LIVE}
        described_options = encoded(options, f"option of the optimizer's group {i}", inline)
        groups.append({"index": i, "options": described_options, "parameters": group_names})
        of_index.update(zip(group["params"], group_names, strict=True))
    state = {}
    for index, values in held["state"].items():
        if index not in of_index:
            raise TypeError(f"the optimizer keeps state for {index!r}, which is none of its parameters")
        name = of_index[index]
        state[name] = encoded(values, f"{STATE}.{name}", put)
    return {"type": type(optimizer).__name__, "groups": groups, "state": state}


def joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The optimizers of all ranks as one; None stands for a rank without.

    Raises:
        ValueError: They are not of one type.
    """
    there = [part for part in parts if part is not None]
    if not there:
        return None
    types = sorted({part["type"] for part in there})
    if len(types) > 1:
        raise ValueError(f"all ranks must have the same optimizer, but they have {', '.join(types)}")
    groups: list[dict[str, Any]] = []
    for part in there:
        for group in part["groups"]:
            _add(groups, group)
    return {
        "type": types[0],
        "groups": sorted(groups, key=lambda group: group["index"]),
        "state": {name: state for part in there for name, state in part["state"].items()},
    }


def _add(groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
    for other in groups:
        if (other["index"], other["options"]) == (group["index"], group["options"]):
            other["parameters"] += [name for name in group["parameters"] if name not in other["parameters"]]
            return
    groups.append({**group, "parameters": list(group["parameters"])})


def check_type(saved: dict[str, Any] | None, optimizer: Optimizer) -> dict[str, Any]:
    """What was saved of the optimizer.

    Raises:
        ValueError: None was saved, or one of another type.
    """
    if saved is None:
        raise ValueError("it was written without an optimizer: read it without one, too, or go on from another save")
    if saved["type"] != type(optimizer).__name__:
        raise ValueError(
            f"it holds the state of {saved['type']}, but the optimizer given is {type(optimizer).__name__}: give one "
            "of the same type, or read it without an optimizer"
        )
    return saved


def restored(
    saved: dict[str, Any], optimizer: Optimizer, names: Names, take: Callable[[Any], Tensor]
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, of the parameters that this optimizer holds.

    Args:
        saved: Of ``joined``; has all its parameters.
        optimizer: As it is to be; its groups may hold any of the saved parameters.
        names: As when it was described.
        take: Gives the tensor of a key.

    Raises:
        ValueError: Parameters of one group had different options.
    """
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    held = optimizer.state_dict()["param_groups"]
    own = parameter_names(optimizer, names)
    for i, (group, group_names) in enumerate(zip(held, own, strict=True)):
        options = _options(saved["groups"], group_names, i)
        live = {key: value for key, value in group.items() if key in _LIVE or options is None}
        groups.append({**_on_device(options or {}, group), **live})
        for index, name in zip(group["params"], group_names, strict=True):
            if name in saved["state"]:
                state[index] = decoded(saved["state"][name], take)
    return {"state": state, "param_groups": groups}


def _options(groups: Sequence[dict[str, Any]], names: Sequence[str], i: int) -> dict[str, Any] | None:
    """The options of group ``i``, which holds ``names``: those its parameters had; None if nothing says which."""
    if names:
        of_name = {name: group["options"] for group in groups for name in group["parameters"]}
        found = [(repr(name), of_name[name]) for name in names]
    else:
        found = [("a parameter", group["options"]) for group in groups if group["index"] == i]
    other = next((name for name, options in found if options != found[0][1]), None)
    if not found or (other and not names):
        return None
    if other:
        raise ValueError(
            f"the optimizer's group {i} holds {found[0][0]} and {other}, which had different options when it was "
            "written: group the parameters as they were grouped then"
        )
    options: dict[str, Any] = decoded(found[0][1], from_inline)
    return options


def _on_device(options: dict[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """The options, tensors on the device of those that are there now."""
    return {
        key: value.to(live[key].device) if isinstance(value, Tensor) and isinstance(live.get(key), Tensor) else value
        for key, value in options.items()
    }
