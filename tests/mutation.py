"""Mutants made from a module's own source: each a written-down edit that some check must notice."""

import inspect
import sys
from collections.abc import Callable, Iterable
from types import ModuleType


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module with `old` replaced by `new`, of which there must be exactly one."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{source.count(old)} places for the mutant {old!r}"
    mutant = ModuleType(f"mutant of {module.__name__}")
    mutant.__package__ = module.__package__
    sys.modules[mutant.__name__] = mutant  # where dataclasses look for the module of a class
    exec(compile(source.replace(old, new), mutant.__name__, "exec"), mutant.__dict__)
    return mutant


def fails(check: Callable[[ModuleType], None], module: ModuleType) -> bool:
    """Whether the check notices: a wrong number, or no number at all."""
    try:
        check(module)
    except (AssertionError, RuntimeError, ValueError, TypeError, ArithmeticError):
        return True
    return False


def survives(checks: Iterable[Callable[[ModuleType], None]], module: ModuleType) -> bool:
    return not any(fails(check, module) for check in checks)
