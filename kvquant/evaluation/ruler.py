"""RULER tasks (arXiv 2404.06654), generated and scored by the pinned lm-eval package.

Prompts, answer prefixes, generation lengths and metrics are those of lm-eval at run time. Two
things of it want the network and are replaced: the download of the sentence splitter (a plain rule
splits the haystack) and the essays, which come from the fetched text of the study.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import io
import random
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

from kvquant.config import RulerTask
from kvquant.data import load_text
from kvquant.errors import UserError, unknown
from kvquant.evaluation.base import SuiteResult
from kvquant.generation import greedy
from kvquant.models import QuantizedModel

PACKAGE = "lm_eval.tasks.ruler"
NIAH = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery"),
)
TASKS = (*NIAH, "vt")
SPLIT = re.compile(r"(?<=[.!?])\s+")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: a split after '.', '!' or '?' and white space."""
    return [s for s in SPLIT.split(text.strip()) if s]


def _ruler(module: str) -> types.ModuleType:
    """A module of lm-eval's RULER, imported without its download of NLTK data."""
    import nltk

    find = nltk.data.find
    nltk.data.find = lambda *args, **kwargs: ""  # "already there": nothing is downloaded
    try:
        return importlib.import_module(f"{PACKAGE}.{module}")
    finally:
        nltk.data.find = find


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files; a `!function` tag becomes its text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_config(task: str) -> dict[str, Any]:
    """lm-eval's YAML of a task, with its includes merged."""
    name = {"qa_1": "qa_squad", "qa_2": "qa_hotpot"}.get(task, task)
    text = (importlib.resources.files(PACKAGE) / f"{name}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.load(text, Loader=_Loader)  # a SafeLoader
    include = config.pop("include", None)
    return {**(task_config(str(include).removesuffix(".yaml")) if include else {}), **config}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators that lm-eval draws from, puts them back, and mutes it."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _niah(task: str, tokenizer: Any, length: int, samples: int, haystack: str, answer: int) -> Any:
    niah_utils, prepare = _ruler("niah_utils"), _ruler("prepare_niah")
    captured: dict[str, Any] = {}

    def record(hay: Any, **kwargs: Any) -> list[dict[str, Any]]:
        captured.update(kwargs)
        return []

    words = re.sub(r"\s+", " ", haystack).split(" ")

    def hay(type_haystack: str) -> Any:
        return words if type_haystack == "essay" else prepare.get_haystack(type_haystack)

    generate, original_hay = niah_utils.generate_samples, niah_utils.get_haystack
    original_split, original_set = prepare.cached_sent_tokenize, niah_utils.download_dataset
    original_tokenizer = niah_utils.get_tokenizer
    try:
        # Let lm-eval's own task function say its needle types, then generate just what is needed.
        niah_utils.generate_samples = record
        niah_utils.get_haystack = lambda type_haystack: captured.update(hay=type_haystack)
        niah_utils.download_dataset = list
        niah_utils.get_tokenizer = lambda *args, **kwargs: tokenizer
        getattr(niah_utils, task)(max_seq_lengths=[length])
        kind = captured.pop("hay")
        captured.update(num_samples=samples, tokens_to_generate=answer)
        prepare.cached_sent_tokenize = split_sentences
        return generate(hay(kind), **captured)
    finally:
        niah_utils.generate_samples, niah_utils.get_haystack = generate, original_hay
        niah_utils.download_dataset, niah_utils.get_tokenizer = original_set, original_tokenizer
        prepare.cached_sent_tokenize = original_split


def _variable_tracking(tokenizer: Any, length: int, samples: int) -> Any:
    utils = _ruler("vt_utils")
    make = utils.sys_vartrack_w_noise_random
    example = make(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    return make(
        tokenizer=tokenizer, num_samples=samples, max_seq_length=length, icl_example=example
    )


def make_samples(
    task: str, tokenizer: Any, length: int, samples: int, seed: int, haystack: str
) -> tuple[list[dict[str, Any]], int]:
    """Documents of one seed (keys `input`, `outputs`, `gen_prefix`) and RULER's answer length.

    Raises:
        UserError: Unknown task, or a length without room for the task's fixed text.
    """
    if task not in TASKS:
        raise unknown("RULER task", task, TASKS)
    answer = int(task_config(task)["generation_kwargs"]["max_gen_toks"])
    try:
        with _seeded(seed):
            if task in NIAH:
                docs = _niah(task, tokenizer, length, samples, haystack, answer)
            else:
                docs = _variable_tracking(tokenizer, length, samples)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"length: {length} does not fit RULER's {task}: {error}") from None
    if len(docs) != samples:
        raise UserError(f"length: {length}: only {len(docs)} of {samples} samples of {task} fit")
    return docs, answer


def encode(tokenizer: Any, doc: dict[str, Any]) -> list[int]:
    """The prompt: the model's chat template, then the answer prefix in the assistant's turn.

    A tokenizer without a chat template gets the text and the prefix alone.
    """
    prefix = doc["gen_prefix"]
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": doc["input"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text + prefix, add_special_tokens=False).input_ids)
    return list(tokenizer(doc["input"] + " " + prefix).input_ids)


def run(qm: QuantizedModel, task: RulerTask, seed: int, data: str | None) -> SuiteResult:
    """Evaluates one seed."""
    if data is None:
        raise UserError("--data-manifest: needed for a RULER haystack")
    if task.length > qm.max_positions:
        raise UserError(f"length: {task.length} exceeds the model's {qm.max_positions} positions")
    common = _ruler("common_utils")
    docs, answer = make_samples(
        task.task, qm.tokenizer, task.length, task.samples, seed, load_text(data)
    )
    prompts = [encode(qm.tokenizer, doc) for doc in docs]
    new_tokens = task.max_new_tokens or answer
    result = greedy(qm, prompts, new_tokens, batch_size=task.batch_size)
    samples = []
    for number, (doc, tokens) in enumerate(zip(docs, result.tokens, strict=True)):
        output = qm.tokenizer.decode(tokens, skip_special_tokens=True)
        cleaned = common.postprocess_pred([output])
        samples.append(
            {
                "sample_id": f"{seed}-{number}",
                "score": 100.0 * common.string_match_all(cleaned, [doc["outputs"]]),
                "target": doc["outputs"],
                "output": output,
                "tokens": len(prompts[number]),
            }
        )
    score = sum(float(s["score"]) for s in samples) / len(samples)
    print(f"evaluate: {task.task}: {len(samples)} samples, score {score:.1f}", file=sys.stderr)
    return SuiteResult(
        protocol="A",
        metric="score",
        higher_is_better=True,
        metrics={"score": score},
        samples=samples,
        tokens=sum(len(p) for p in prompts),
        cache_bytes=result.cache_bytes,
        cache_elements=result.cache_elements,
    )
