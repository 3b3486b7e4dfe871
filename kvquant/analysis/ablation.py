"""Which options of the headline scheme a study varies one at a time, derived from its schemes.

A scheme belongs to an ablation if it is of the headline's kind and differs from it in exactly one
option. Where that option is `calibration`, the subject is the one field in which the two
calibrations differ. The workflow reads this module, so it imports neither torch nor pandas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvquant.study.config import Study
from kvquant.study.suite import likelihood_suites
from kvquant.study.wording import LABEL, Worded

CALIBRATION = "calibration"


@dataclass(frozen=True)
class Choice:
    """One value of a varied option.

    Attributes:
        scheme: The key of the scheme that has it.
        value: The value.
        words: The value as readers see it.
    """

    scheme: str
    value: Any
    words: str


@dataclass(frozen=True)
class Ablation:
    """An option of the headline scheme of which a study has several values.

    Attributes:
        option: The option's key, or "calibration-KEY" for a field of the calibration.
        label: What readers call the option.
        choices: Its values: numbers from small to large, others with the headline's first.
    """

    option: str
    label: str
    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """Returns the option in kebab case, as names of files have it."""
        return self.option.replace("_", "-")

    @property
    def ordered(self) -> bool:
        """Returns whether the order of the values means something, unlike that of seeds."""
        numbers = all(_is_number(choice.value) for choice in self.choices)
        return numbers and not self.option.endswith("seed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differing(one: Worded, other: Worded) -> list[str]:
    """Returns the options in which two sections of one class differ, but for the label."""
    options = (option for option in type(one).model_fields if option != LABEL)
    return [option for option in options if getattr(one, option) != getattr(other, option)]


def _subject(study: Study, scheme: str) -> tuple[str, str, Choice, Choice] | None:
    """Returns what a scheme varies: key, label, the headline's choice and the scheme's own.

    None where the scheme differs from the headline in nothing or in more than one option.
    """
    ours, other = study.schemes[study.headline], study.schemes[scheme]
    if type(ours) is not type(other):
        return None
    options = _differing(ours, other)
    if len(options) != 1:
        return None
    (option,) = options
    one: Worded = ours
    two: Worded = other
    key = option
    if option == CALIBRATION:
        names = [study.calibration_name(name) for name in (study.headline, scheme)]
        built = [study.calibrated_by(name) for name in names]
        fields = _differing(*built)
        if not fields:  # another name of the same calibration
            return None
        if len(fields) > 1:
            words = [name or "the study's" for name in names]
            return (
                key, ours.term(key), Choice(study.headline, names[0], words[0]),
                Choice(scheme, names[1], words[1]),
            )  # fmt: skip
        (option,) = fields
        key, (one, two) = f"{CALIBRATION}-{option}", built
    return (
        key, one.term(option),
        Choice(study.headline, getattr(one, option), one.value_in_words(option)),
        Choice(scheme, getattr(two, option), two.value_in_words(option)),
    )  # fmt: skip


def ablations(study: Study) -> list[Ablation]:
    """Returns the options of which a study has at least two values, in the order of its schemes.

    Of several schemes with one value the first stands for it.
    """
    if study.headline not in study.schemes:
        return []
    labels: dict[str, str] = {}
    found: dict[str, list[Choice]] = {}
    for scheme in study.schemes:
        subject = _subject(study, scheme)
        if subject is None:
            continue
        key, labels[key], first, choice = subject
        choices = found.setdefault(key, [first])
        if all(choice.value != known.value for known in choices):
            choices.append(choice)
    made = []
    for key, choices in found.items():
        if all(_is_number(choice.value) for choice in choices):
            choices.sort(key=lambda choice: choice.value)
        made.append(Ablation(key, labels[key], tuple(choices)))
    return made


def compares_kernels(study: Study, ablation: Ablation) -> bool:
    """Returns whether kernels are timed by schemes of two values of an option, at one size."""
    timed: dict[tuple[object, ...], set[str]] = {}
    for case in study.kernel_cases().values():
        size = (case.shape, case.batch, case.tokens, case.ragged)
        timed.setdefault(size, set()).add(study.kernel_scheme(case))
    varied = {choice.scheme for choice in ablation.choices}
    return any(len(schemes & varied) > 1 for schemes in timed.values())


def task_of(study: Study) -> str | None:
    """Returns the task on which ablations compare likelihoods: the headline's first such task."""
    for name, task in study.tasks.items():
        measured = all(study.evaluates(s, name) for s in (study.baseline, study.headline))
        if task.suite in likelihood_suites() and measured:
            return name
    return None


def drawable(study: Study) -> list[Ablation]:
    """Returns the ablations of which at least two values run the task of :func:`task_of`."""
    task = task_of(study)
    if task is None:
        return []
    return [
        ablation
        for ablation in ablations(study)
        if sum(study.evaluates(choice.scheme, task) for choice in ablation.choices) > 1
    ]
