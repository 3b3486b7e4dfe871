"""Names that readers see: the `label` of an entry of the study, or what its options say in words.

Keys such as `nuq3-1pct` name files and are typed; figures, tables and claims show names such as
"NUQ 3 bits, 1 % outliers". Two entries never have the same name (:func:`told_apart`). Where one
option is the subject, as in an ablation, its name and its values are words, too (:class:`Worded`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from kvquant.study.strict import Strict

LABEL = "label"
MAX_LABEL = 60
Words = Mapping[str, Callable[[Any], str]]


def _printable(text: str) -> str:
    if text != " ".join(text.split()) or not text.isprintable():
        raise ValueError("must be one line of text, without spaces at its ends or twice in a row")
    return text


class Worded(Strict):
    """The base class of sections whose options stand in the heads of tables and on axes."""

    # What options are called there; those without an entry go by the words of their key.
    terms: ClassVar[Mapping[str, str]] = {}
    # How values read there, also the default; those without an entry read as they are written.
    values: ClassVar[Words] = {}

    @classmethod
    def term(cls, option: str) -> str:
        """Returns what an option is called."""
        return cls.terms.get(option, option.replace("_", " "))

    def value_in_words(self, option: str) -> str:
        """Returns the value of an option without the option's name, also where it is the default.

        Args:
            option: An option of this section.
        """
        value = getattr(self, option)
        if option in self.values:
            return self.values[option](value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if value is None:
            return "not given"
        return f"{value:,}" if isinstance(value, int | float) else str(value)


class Named(Worded):
    """The base class of what readers know by a name: models, schemes, tasks, workloads."""

    later: ClassVar[tuple[str, ...]] = (LABEL,)
    # How options read in a name; those without an entry read as their name and value.
    words: ClassVar[Words] = {}
    label: Annotated[str, AfterValidator(_printable)] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABEL,
        description="name in figures and tables; absent: derived from the options",
    )

    def title(self, key: str) -> str:
        """Returns the name that the options give, which another entry may have as well.

        Args:
            key: The name in the study.
        """
        return key

    def telling(self) -> list[str]:
        """Returns the options that may tell entries of one title apart, the first ones first."""
        return [name for name in type(self).model_fields if name != LABEL]

    def in_words(self, option: str) -> str:
        """Returns an option with its value as a part of a name; empty at its default."""
        field = type(self).model_fields.get(option)
        value = getattr(self, option, None)
        if field is None or value is None or (not field.is_required() and value == field.default):
            return ""
        if option in self.words:
            return self.words[option](value)
        plain = option.replace("_", " ")
        if isinstance(value, bool):
            return plain if value else f"no {plain}"
        return f"{plain} {value:,}" if isinstance(value, int | float) else f"{plain} {value}"

    def meaning(self, *without: str) -> dict[str, Any]:
        """Returns the options that results depend on: all but the label and those named."""
        return self.model_dump(mode="json", exclude={LABEL, *without})


def short_count(tokens: int) -> str:
    """Returns a number of tokens as readers say it: 16K for 16,384."""
    return f"{tokens // 1024:,}K" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def _with_options(group: Mapping[str, Named], title: str) -> dict[str, str]:
    """Returns names of entries of one title: with as many differing options as tell them apart."""
    options = dict.fromkeys(option for spec in group.values() for option in spec.telling())
    names = dict.fromkeys(group, title)
    for option in options:
        if len(set(names.values())) == len(group):
            break
        if len({repr(getattr(spec, option, None)) for spec in group.values()}) == 1:
            continue
        for key, spec in group.items():
            words = spec.in_words(option)
            names[key] += f", {words}" if words else ""
    return names


def told_apart(specs: Mapping[str, Named], reserved: Iterable[str] = ()) -> dict[str, str]:
    """Returns the name of every entry by its key, no two of them alike.

    Args:
        specs: Models, schemes, tasks or workloads of a study.
        reserved: Names of other things beside them.
    """
    given = {key: spec.label for key, spec in specs.items() if spec.label is not None}
    titles = {key: spec.title(key) for key, spec in specs.items() if key not in given}
    derived: dict[str, str] = {}
    for title in dict.fromkeys(titles.values()):
        derived |= _with_options({k: specs[k] for k, t in titles.items() if t == title}, title)
    counts = Counter(derived.values())
    taken, names = {*reserved, *given.values()}, dict(given)
    for key, name in derived.items():
        if counts[name] > 1:
            name += f" ({key})"
        while name in taken:
            name += f" ({key})"
        taken.add(name)
        names[key] = name
    return {key: names[key] for key in specs}


def repeated_labels(specs: Mapping[str, Named]) -> list[tuple[str, str]]:
    """Returns (key, other key) of every entry whose label an entry before it has."""
    first: dict[str, str] = {}
    return [
        (key, first[spec.label])
        for key, spec in specs.items()
        if spec.label is not None and first.setdefault(spec.label, key) != key
    ]
