"""Errors: each message says what went wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Iterable


class FxMergeError(Exception):
    """Base class of every error that fxmerge raises on purpose."""


class TraceError(FxMergeError):
    """The module could not be turned into a graph that reproduces it."""


class InputError(FxMergeError):
    """Example inputs, data or parameters cannot be used as given."""


class StructureError(FxMergeError):
    """The parents differ in a way that no coupling of neurons can bridge."""


class NoIdentityError(StructureError):
    """A unit that a shallower network lacks cannot pass on what it reads; ``output`` is its last node."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


class UnknownOpError(FxMergeError):
    """An operation without a rule was met under ``strict=True``."""


class VerifyError(FxMergeError):
    """An inferred symmetry, or a rewritten graph, changed the function."""


class FormatError(FxMergeError):
    """A saved folder is damaged, foreign, or would be overwritten."""


class FxMergeWarning(UserWarning):
    """Something was left out or pinned; the result is right but less than it could be."""


def told(error: Exception) -> str:
    """What another library's error says, to stand inside a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(". \n")


def cut(text: str) -> str:
    """The head of a text that may hold whatever a file holds."""
    return text if len(text) <= 500 else f"{text[:500]} .."


def few(names: list[str]) -> str:
    """Three of the names and the number of the others."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def nth(number: int) -> str:
    """1 -> "first"."""
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def one_of(owner: str, **options: tuple[object, Iterable[object]]) -> None:
    """Every option (value, known values) must have a known value; else an InputError names the choices."""
    for name, (value, known) in options.items():
        choices = list(known)
        if value not in choices:
            said = f"{owner}({name}={value!r})" if owner else f"{name}={value!r}"
            raise InputError(f"{said}: choose one of {', '.join(map(repr, choices))}")
