"""A config's docstring names all its fields: those of the classes that it builds on are added to its own."""

import inspect
import re

_ARGS = re.compile(r"^Args:\n((?: {4}.*\n?)+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): .*\n?(?: {5}.*\n?)*", re.MULTILINE)


def fields_in(doc: str) -> dict[str, str]:
    """Return the entries of a docstring's Args by the names that each describes, e.g. `"beta1, beta2"`."""
    section = _ARGS.search(inspect.cleandoc(doc))
    return {m[1]: m[0].rstrip("\n") for m in _ENTRY.finditer(section[1])} if section else {}


def with_inherited(cls: type) -> str | None:
    """Return a class's docstring with the fields of its bases after its own; None where it has none, for which a base's is shown."""
    own = vars(cls).get("__doc__")
    if not own:
        return None
    doc, entries = inspect.cleandoc(own), fields_in(own)
    known = {name for names in entries for name in names.split(", ")}
    for base in cls.__mro__[1:]:
        for names, entry in fields_in(vars(base).get("__doc__") or "").items():
            if not known & set(names.split(", ")):
                entries[names] = entry
        known |= {name for names in entries for name in names.split(", ")}
    section, found = "Args:\n" + "\n".join(entries.values()), _ARGS.search(doc)
    if found is None:
        return f"{doc}\n\n{section}" if entries else doc
    return f"{doc[: found.start()]}{section}\n{doc[found.end() :]}".rstrip("\n")
