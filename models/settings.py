"""Checks of a model's settings: what was expected, what was given, what to do."""

from collections.abc import Collection


def require_counts(**settings: object) -> None:
    """Refuse settings that are not whole numbers of at least 1.

    Args:
        **settings: the settings to check, under the names the user knows them by.

    Raises:
        ValueError: if one of them is not a positive int; the message names it.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"expected {name} to be a whole number of at least 1, given {value!r}; set {name} to a positive int"
            )


def require_multiple(whole: str, whole_value: int, part: str, part_value: int) -> None:
    """Refuse a pair of settings of which the first is not a multiple of the second.

    Args:
        whole: name of the setting that must be divisible.
        whole_value: its value.
        part: name of the setting that must divide it.
        part_value: its value, at least 1.

    Raises:
        ValueError: if it does not divide; the message offers the two nearest multiples.
    """
    if whole_value % part_value:
        below = whole_value // part_value * part_value
        nearest = f"{below} or {below + part_value}" if below else f"{part_value}"
        raise ValueError(
            f"expected {whole} to be a multiple of {part}, given {whole}={whole_value} and "
            f"{part}={part_value}; set {whole} to {nearest}, or change {part}"
        )


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a setting that is not one of the known names.

    Args:
        name: the setting.
        value: what was given.
        choices: what is allowed.

    Raises:
        ValueError: if ``value`` is not among ``choices``.
    """
    if not isinstance(value, str) or value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"expected {name} to be one of {allowed}, given {value!r}; choose one of them")


def require_probability(name: str, value: object) -> None:
    """Refuse a dropout probability outside [0, 1).

    Args:
        name: the setting.
        value: what was given.

    Raises:
        ValueError: if ``value`` is not a number of at least 0 and below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(
            f"expected {name} to be a number of at least 0 and below 1, given {value!r}; "
            f"set {name} to 0.0 to turn it off"
        )
