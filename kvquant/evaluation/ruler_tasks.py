"""RULER's samples, made by the pinned lm-eval package without its downloads.

Prompts, sizes, generation lengths and the metric are lm-eval's and read at run time. Parts that
need a network, cannot be repeated or are slow are replaced:

- The essay haystack, a hub data set, is replaced by the essays of the study, which are a prefix of
  RULER's own and are split into words in the same way.
- NLTK's sentence splitter is used without its trained list of abbreviations, which would be a
  download. Only the possible places of a needle, ends of sentences, depend on it.
- The random generators (`random`, numpy's and one of lm-eval's own) are seeded for the call and
  restored afterwards.
- The list of six million needle keys is computed on demand from two lists of words (`WordPairs`).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from kvquant.errors import UserError, unknown
from kvquant.evaluation.ruler_limits import TokenCounter, bounded, flaw
from kvquant.fetch.lm_eval_files import file_module, task_files, without_manager

PACKAGE = "lm_eval.tasks.ruler"
# Maps names of RULER's paper to lm-eval's where they differ.
LM_EVAL_NAMES = {
    "vt": "ruler_vt",
    "cwe": "ruler_cwe",
    "fwe": "ruler_fwe",
    "qa_1": "ruler_qa_squad",
    "qa_2": "ruler_qa_hotpot",
}
# Maps lm-eval's functions of a task to those that read its documents, which would download them.
READERS = {"get_squad": "read_squad", "get_hotpotqa": "read_hotpotqa"}
# Maps lm-eval's modules to their function that takes the number of samples.
GENERATORS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}

SMALLEST = "the smallest prompt does not fit"
EXAMPLE = "its worked example has 500 tokens at most in lm-eval, too few with this tokenizer"


@dataclass(frozen=True)
class RulerSample:
    """Holds a sample.

    Attributes:
        question: The prompt without the answer's start.
        prefix: The start of the answer.
        references: Texts that the answer must contain.
    """

    question: str
    prefix: str
    references: list[str]


@dataclass(frozen=True)
class RulerDefinition:
    """Describes a RULER task of lm-eval.

    Attributes:
        name: RULER's name of the task.
        module: lm-eval's module.
        function: The module's function that makes the samples.
        max_new_tokens: Length of the longest answer in tokens.
        any_reference: Whether one reference in the answer is enough ("match part"); otherwise the
            fraction of all references counts.
        score: lm-eval's metric of (document, [answer]), with one value per length.
    """

    name: str
    module: str
    function: str
    max_new_tokens: int
    any_reference: bool
    score: Callable[[dict[str, Any], list[str]], dict[str, float]]


@functools.cache
def ruler_names() -> tuple[str, ...]:
    """Returns the tasks that can be run, by their names in RULER's paper."""
    ours = {theirs: name for name, theirs in LM_EVAL_NAMES.items()}
    files = task_files(PACKAGE)
    return tuple(sorted(ours.get(r["task"], r["task"]) for r in files if "custom_dataset" in r))


def definition(name: str) -> RulerDefinition:
    """Returns a task's definition.

    Raises:
        UserError: The name is unknown; the message offers the nearest known ones.
    """
    if name not in ruler_names():
        raise unknown("RULER task", name, ruler_names())
    wanted = LM_EVAL_NAMES.get(name, name)
    raw = next(r for r in task_files(PACKAGE) if r.get("task") == wanted)
    module, function = raw["custom_dataset"].rsplit(".", 1)
    where, scorer = raw["process_results"].rsplit(".", 1)
    return RulerDefinition(
        name=name,
        module=module,
        function=function,
        max_new_tokens=int(raw["generation_kwargs"]["max_gen_toks"]),
        any_reference=scorer == "process_results_part",
        score=getattr(_scorers(where), scorer),
    )


@functools.cache
def _scorers(name: str) -> ModuleType:
    """Imports lm-eval's file with the metrics, without the generators and their packages."""
    return file_module(PACKAGE, name)


def score_answer(task: RulerDefinition, references: list[str], answer: str) -> float:
    """Returns RULER's score of an answer, computed by lm-eval's metric.

    If one reference is enough, RULER gives 1 if any is found, but lm-eval 0.4.13 the fraction of
    references found. Asked about one reference at a time, the two agree.
    """

    def ask(outputs: list[str]) -> float:
        return float(task.score({"outputs": outputs, "max_length": 0}, [answer])["0"])

    return max(ask([one]) for one in references) if task.any_reference else ask(references)


class WordPairs(Sequence[str]):
    """Acts as `sorted({f"{first}-{second}" ...})` over two word lists without building the list.

    Pairs sort by their first word, unless a first word with a hyphen begins another one ("blue",
    "blue-eyed"). The pairs of such a group are built and sorted.
    """

    def __init__(self, firsts: Iterable[str], seconds: Iterable[str]) -> None:
        self._seconds = sorted(set(seconds))
        self._groups: list[str | list[str]] = []
        self._ends: list[int] = []
        waiting = sorted({first + "-" for first in firsts})
        end = at = 0
        while at < len(waiting):
            root, start = waiting[at], at
            while at < len(waiting) and waiting[at].startswith(root):
                at += 1
            alike = waiting[start:at]
            if len(alike) > 1:
                group = sorted({first + second for first in alike for second in self._seconds})
                self._groups.append(group)
                end += len(group)
            else:
                self._groups.append(root)
                end += len(self._seconds)
            self._ends.append(end)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        group, place = self._groups[which], index - (self._ends[which - 1] if which else 0)
        return group + self._seconds[place] if isinstance(group, str) else group[place]


@functools.cache
def _niah_modules() -> tuple[ModuleType, ModuleType]:
    """Imports private copies of lm-eval's `niah_utils` and `prepare_niah`.

    An ordinary import asks NLTK for a download, loads all of NLTK and sorts six million words,
    which takes about 15 seconds and one gigabyte in every job.
    """
    wonderwords = importlib.import_module("wonderwords")
    words = wonderwords.RandomWord()._categories
    none = SimpleNamespace(_categories={name: [] for name in words})
    nltk = ModuleType("nltk")
    nltk.data = SimpleNamespace(find=lambda name: None)  # type: ignore[attr-defined]
    nltk.sent_tokenize = split_sentences  # type: ignore[attr-defined]
    with without_manager():
        for needed in ("datasets", f"{PACKAGE}.common_utils"):
            importlib.import_module(needed)  # permanently, not only during the patches below
        with (
            mock.patch.dict(sys.modules, {"nltk": nltk}),
            mock.patch.object(wonderwords, "RandomWord", lambda: none),
        ):
            niah = importlib.import_module(f"{PACKAGE}.niah_utils")
            source = importlib.import_module(f"{PACKAGE}.prepare_niah")
    source.WORDS = WordPairs(words["adjectives"], words["nouns"])  # type: ignore[attr-defined]
    return niah, source


@functools.cache
def _import(module: str) -> ModuleType:
    """Imports a private copy of one of lm-eval's RULER modules."""
    if module == "niah_utils":
        return _niah_modules()[0]
    with without_manager():
        return importlib.import_module(f"{PACKAGE}.{module}")


@functools.lru_cache(maxsize=32)
def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences by NLTK's rules, without a trained model."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return list(PunktSentenceTokenizer().tokenize(text))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of `random` and numpy and restores their state afterwards."""
    import numpy

    before, before_numpy = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        numpy.random.set_state(before_numpy)


@contextlib.contextmanager
def _offline(
    module: ModuleType,
    counter: TokenCounter,
    length: int,
    samples: int,
    seed: int,
    text: Callable[[], str],
) -> Iterator[None]:
    """Patches lm-eval's module for one call: tokenizer, number of samples, texts and silence."""
    name = module.__name__.rsplit(".", 1)[-1]
    generator = getattr(module, GENERATORS[name])

    def generate(*args: Any, **kwargs: Any) -> Any:
        # vt makes its single worked example with the same function.
        wanted = 1 if kwargs.get("num_samples") == 1 else samples
        if name == "qa_utils":
            # Seed 0 takes the first questions, as RULER does, and the next seed the following ones.
            questions = len(kwargs["qas"])
            if questions < samples:
                raise ValueError(f"{samples} samples, but the data set has {questions} questions")
            kwargs["pre_samples"] = seed * samples % (questions - samples + 1)
        bound = bounded(kwargs["max_seq_length"], counter)
        try:
            found = generator(*args, **{**kwargs, "num_samples": wanted, "max_seq_length": bound})
        except Exception:  # any kind may occur once texts are reported as empty
            if not counter.gave_up:
                raise
        if counter.gave_up:
            if name == "vt_utils" and "icl_example" not in kwargs:
                raise ValueError(EXAMPLE)
            raise ValueError(SMALLEST)
        return [{**row, "max_length": int(bound)} for row in found]

    def quiet(items: Any, **kwargs: Any) -> Any:
        return items

    with contextlib.ExitStack() as stack:

        def patch(owner: ModuleType, what: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(owner, what, new))

        patch(module, "get_tokenizer", lambda *args, **kwargs: counter)
        patch(module, GENERATORS[name], generate)
        if name == "niah_utils":
            source = _niah_modules()[1]

            def haystack(type_haystack: str) -> Any:
                if type_haystack != "essay":
                    return source.get_haystack(type_haystack)
                words = re.sub(r"\s+", " ", text()).split(" ")
                # A word has at least one token. With too few, lm-eval silently shortens the prompt.
                if len(words) < length and counter.measure(" ".join(words)) < length:
                    raise UserError(
                        f"length: {length} tokens, but the essays have fewer: shorten it or give "
                        "the task a longer text"
                    )
                return words

            patch(module, "get_haystack", haystack)
            patch(source, "cached_sent_tokenize", split_sentences)
            patch(source, "tqdm", quiet)
        else:
            patch(module, "tqdm", quiet)
        if name == "qa_utils":
            logger = module.eval_logger
            stack.enter_context(mock.patch.object(logger, "warning", lambda *args: None))
            patch(module, "download_json", lambda url: json.loads(text()))
            for reader in READERS.values():
                # The function without its cache, which would return an earlier text's rows.
                patch(module, reader, getattr(module, reader).__wrapped__)
        if name == "vt_utils":
            build = module.generate_input_output

            def build_or_give_up(*args: Any, **kwargs: Any) -> tuple[str, list[str]]:
                while not counter.gave_up:
                    try:
                        return build(*args, **kwargs)
                    except IndexError:  # it drew a variable's name twice: draw again
                        counter.tick()
                    except ValueError:  # no room for noise, with which lm-eval would try for ever
                        counter.tick()
                        if not counter.gave_up:
                            raise
                return "", []

            patch(module, "generate_input_output", build_or_give_up)
        if name == "cwe_utils":
            # lm-eval's own generator, which would continue from call to call.
            patch(module, "RNG", random.Random(seed))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(seeded(seed))
        yield


def make_samples(
    task: RulerDefinition,
    count_tokens: Callable[[str], int],
    *,
    length: int,
    overhead: int,
    samples: int,
    seed: int,
    text: Callable[[], str],
) -> list[RulerSample]:
    """Returns the samples of a seed.

    Args:
        task: The task.
        count_tokens: Returns the number of tokens of a text.
        length: Largest number of tokens of prompt and answer together.
        overhead: Tokens of the chat template and the answer's prefix, which lm-eval does not count.
        samples: Number of samples.
        seed: Seed that chooses needles, places and words.
        text: Returns the essays, or the questions and documents as JSON; called only if needed.

    Raises:
        UserError: The length is too short for the task.
    """
    if task.module == "fwe_utils":
        overhead += task.max_new_tokens  # this generator alone leaves no room for the answer
    # Sizes change by 100 tokens or more per step, and a sample shrinks a few times.
    counter = TokenCounter(count_tokens, overhead, limit=200 + length // 50 + 50 * samples)
    module = _import(task.module)
    try:
        with _offline(module, counter, length, samples, seed, text):
            found = getattr(module, task.function)(max_seq_lengths=[length])["test"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        if task.function not in READERS:
            raise
        raise UserError(
            f"task: the documents of {task.name} have an unknown form "
            f"({type(error).__name__} {error}): fetch them again"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise _too_short(task, length, (str(error) or SMALLEST).splitlines()[0]) from None
    rows = []
    for row in found:
        # cwe's worked example precedes the question, as in RULER.
        example = row["input_example"] + "\n" if row.get("input_example") else ""
        rows.append(RulerSample(example + row["input"], row["gen_prefix"], list(row["outputs"])))
    if len(rows) != samples:
        raise _too_short(task, length, "there is no room for every sample")
    if task.function not in READERS:  # answers about documents may be "yes", which no text holds
        for index, sample in enumerate(rows):
            ranked = task.module == "fwe_utils"
            if wrong := flaw(sample.question, sample.references, ranked=ranked):
                raise _too_short(task, length, f"sample {index} {wrong}")
    return rows


def _too_short(task: RulerDefinition, length: int, reason: str) -> UserError:
    fix = "leave the task out" if reason == EXAMPLE else "give it a longer `length`"
    return UserError(f"length: {length} tokens are too few for {task.name}: {reason}: {fix}")
