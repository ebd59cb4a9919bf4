"""Checks of single options: each error names the option, its value and, where there is one, the way out."""

import math
from numbers import Integral, Real


def check_choice(caller: str, name: str, value: object, choices: tuple, remedy: str = "") -> None:
    """One of a few values.

    Raises:
        ValueError: Another.
    """
    if value not in choices:
        raise ValueError(f"{caller}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.{remedy}")


def check_number(caller: str, remedy: str = "", **values: object) -> None:
    """Numbers of Python or NumPy, whatever their size: what may be compared.

    Raises:
        TypeError: Anything else; a tensor too.
    """
    for name, value in values.items():
        if not isinstance(value, Real):
            raise TypeError(f"{caller}: `{name}` must be a number, got {value!r}.{remedy}")


def check_whole(caller: str, remedy: str = "", *, smallest: int = 0, **values: object) -> None:
    """Whole numbers, `smallest` or more.

    Raises:
        TypeError: No number.
        ValueError: Another number.
    """
    check_number(caller, remedy, **values)
    for name, value in values.items():
        if not isinstance(value, Integral) or value < smallest:
            raise ValueError(f"{caller}: `{name}` must be a whole number, {smallest} or more, got {value}.{remedy}")


def check_positive(caller: str, remedy: str = "", **values: object) -> None:
    """Finite numbers above zero.

    Raises:
        TypeError: No number.
        ValueError: Another number.
    """
    check_number(caller, remedy, **values)
    for name, value in values.items():
        if not (isinstance(value, Real) and 0 < float(value) < math.inf):
            raise ValueError(f"{caller}: `{name}` must be positive and finite, got {value}.{remedy}")
