"""The facts of a variant, class variables of its config, held against the types that the framework reads them by."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any

from lora_lite.core.errors import listed


def require_facts(cfg: Any) -> None:
    """Raise unless the facts of a config are of their types. A string would be read letter by letter, or searched for names inside.

    Raises:
        TypeError: it names the fact.
        ValueError: where a tolerance is negative or nan, or the variant acts at some positions or couples rows, and its `uses` or `linear`
            do not say so.
    """
    name = type(cfg).__name__
    if not isinstance(cfg.name, str) or not cfg.name:
        raise TypeError(f'{name}.name: expected a string that is not empty, found {cfg.name!r}. Write e.g. name = "mine".')
    if not _holds_strings(cfg.uses, AbstractSet):
        raise TypeError(f'{name}.uses: expected a set of words, found {cfg.uses!r}. Write e.g. uses = frozenset({{"output"}}).')
    if cfg.steered is not None and not _holds_strings(cfg.steered, Sequence):
        raise TypeError(f'{name}.steered: expected a tuple of names or None, found {cfg.steered!r}. Write e.g. steered = ("B",).')
    for fact in ("calibrated", "original", "linear", "rowwise", "cast", "tied"):
        if not isinstance(value := getattr(cfg, fact), bool):
            raise TypeError(f"{name}.{fact}: expected True or False, found {value!r}. Write e.g. {fact} = True.")
    for fact in ("trained", "macs"):
        if not isinstance(value := getattr(cfg, fact), str | None):
            raise TypeError(f'{name}.{fact}: expected a formula as a string or None, found {value!r}. Write e.g. {fact} = "r * (i + o)".')
    if isinstance(cfg.identity, Real) and not float(cfg.identity) >= 0:
        raise ValueError(
            f"{name}.identity: expected a tolerance >= 0 or None, found {cfg.identity!r}. Write e.g. identity = 0.0 for exact."
        )
    if cfg.identity is not None and (isinstance(cfg.identity, bool) or not isinstance(cfg.identity, Real)):
        raise TypeError(f"{name}.identity: expected a tolerance or None, found {cfg.identity!r}. Write e.g. identity = 0.0 for exact.")
    if cfg.acts_at is not None and not callable(cfg.acts_at):
        raise TypeError(f"{name}.acts_at: expected a function (model, arguments) -> mask or None, found {cfg.acts_at!r}. Write a function.")
    if cfg.acts_at is not None and "positions" not in cfg.uses:
        raise ValueError(
            f'{name}.uses: expected "positions" among {listed(sorted(cfg.uses))}, since acts_at masks them. Add the word, so that layers '
            "without positions are refused."
        )
    if cfg.linear and (cfg.acts_at is not None or not cfg.rowwise):
        why = "acts at some positions only" if cfg.acts_at is not None else "couples rows (rowwise = False)"
        raise ValueError(
            f"{name}.linear: expected False for a variant that {why}, since merged weights act on each input alike, found True. Write "
            "linear = False."
        )


def _holds_strings(value: Any, kind: Any) -> bool:
    """Whether a value is a list or a tuple of strings, or such a collection of `kind`, and no string itself."""
    return isinstance(value, kind | list | tuple) and not isinstance(value, str) and all(isinstance(word, str) for word in value)
