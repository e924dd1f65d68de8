"""The command line: options as dataclass fields, and a user's mistake as one line, exit code 2."""

import argparse
import dataclasses
import re
import sys
from typing import Any, NoReturn


class UserError(ValueError):
    """Something that the user can correct: the value, the reason and the remedy in one line."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another stage, or does not fit the others."""


def option(
    default: Any,
    help: str,
    choices: tuple = (),
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    bare: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    above, low, high: the range of its values; above is exclusive, low and high are inclusive.
    A default of None makes an option of the type that `above`, `low` or `bare` has.
    bare: the value of the option when none is typed behind it.
    """
    metadata = dict(help=help, choices=choices, above=above, low=low, high=high, bare=bare)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, `_` and `-` alike in option names, no abbreviations."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        words = sys.argv[1:] if argv is None else list(argv)
        for i, word in enumerate(words):
            if name := re.match("--[^=]*", word):
                words[i] = name[0].replace("_", "-") + word[name.end() :]
        return super().parse_args(words)

    def add_fields(self, kind: type) -> None:
        """An option for each field of a dataclass. Options that are not typed are left out."""
        for field in filter(lambda field: field.metadata, dataclasses.fields(kind)):
            self.add_argument(flag(field.name), default=argparse.SUPPRESS, **_argument(field))


def _argument(field) -> dict:
    """What argparse is told of a field."""
    default, metadata = field.default, field.metadata
    shown = "" if default in ("", 0, 0.0, False, None) else f" [{default}]"
    help = metadata["help"] + shown
    if isinstance(default, bool):
        return dict(action="store_true", help=help)
    if isinstance(default, tuple):
        return dict(type=integers, metavar="N,N,…", help=help)
    kind = type(default)
    if metadata["bare"] is not None:
        return dict(nargs="?", const=metadata["bare"], help=help)
    if default is None:
        limit = metadata["above"] if metadata["low"] is None else metadata["low"]
        kind = type(limit)
    return dict(type=kind, choices=metadata["choices"] or None, help=help)


def flag(name: str) -> str:
    """batch_size → --batch-size"""
    return "--" + name.replace("_", "-")


def integers(text: str) -> tuple:
    """ "4,4,4" → (4, 4, 4)."""
    return tuple(int(part) for part in text.split(","))


def check_ranges(values: Any) -> None:
    """Raise UserError for a number in a dataclass that is outside the range of its option."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if type(value) not in (int, float):
            continue
        above, low, high = (field.metadata[limit] for limit in ("above", "low", "high"))
        if high is None and type(value) is int:
            high = 2**31 - 1
        if above is not None and not value > above:
            wanted = f"be above {above:,}" if above else "be positive"
        elif low is not None and not value >= low:
            wanted = f"be at least {low:,}" if low else "not be negative"
        elif high is not None and not value <= high:
            wanted = f"be at most {high:,}"
        else:
            continue
        if type(value) is float and low is not None and high is not None:
            wanted = f"lie in {low:,} … {high:,}"
        raise UserError(f"{flag(field.name)} must {wanted}, got {value}")


def parse_options(kind: type, description: str, argv: list[str] | None = None) -> Any:
    """The command line → an instance of the dataclass `kind`, its ranges checked."""
    parser = Parser(description=description)
    parser.add_fields(kind)
    options = kind(**vars(parser.parse_args(argv)))
    check_ranges(options)
    return options


def print_user_errors() -> None:
    """From here on a UserError that nobody caught is one line on stderr and exit code 2."""
    from utils.hardening.errors import print_error  # here, because it needs this file

    sys.excepthook = print_error
