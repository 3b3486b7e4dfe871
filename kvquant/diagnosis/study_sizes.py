"""Chooses how much a drafted study measures, as model, texts and machine allow, and what it costs.

On a CPU a study is small enough to end while its user waits; on a GPU windows are as long as those
of published perplexities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from kvquant.errors import UserError

SEEDS = 5
SCHEMES = 5  # the baseline among them
TEST_SHARE = 0.25
SHORTEST = 64  # tokens of a window of calibration or perplexity
LEAST_TOKENS = 1024  # of a text
SHORT_PROMPT = 256  # tokens; shorter prompts get blocks that they fill
# A CPU's decode step reads all weights: bytes per second of one core, and seconds to start a job.
CPU_BYTES_PER_S, START_SECONDS = 8e9, 12.0


@dataclass(frozen=True)
class Sizes:
    """How much a study measures.

    Attributes:
        window: Tokens per window of perplexity.
        windows: Windows per seed; 0 takes the whole text.
        calibration_window: Tokens per window of calibration.
        calibration_windows: Number of these windows.
        block_size: Tokens per block of our schemes, and per 16-bit residual of KIVI.
        length: Tokens of prompt and answer together; 0 without prompts.
        answer: Tokens of the longest answer.
        samples: Prompts per seed.
        kl: Whether perplexity also measures the distance from the unquantized cache.
    """

    window: int
    windows: int
    calibration_window: int
    calibration_windows: int
    block_size: int
    length: int = 0
    answer: int = 0
    samples: int = 0
    kl: bool = False


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1) if most > 0 else 0


def choose_sizes(
    positions: int,
    text_tokens: int,
    prompts: Sequence[int],
    answers: Sequence[int],
    *,
    gpu: bool,
) -> Sizes:
    """Returns the sizes of a study.

    Args:
        positions: The longest sequence of the model.
        text_tokens: Tokens of the text, of which the last quarter is test text.
        prompts: Tokens of each prompt; none without prompts.
        answers: Tokens of the longest accepted answer of each prompt; empty where agreement is
            scored.
        gpu: Whether the study runs on a GPU.

    Raises:
        UserError: The text, or the model's positions, are too few.
    """
    if text_tokens < LEAST_TOKENS:
        raise UserError(
            f"--text: {text_tokens:,} tokens; at least {LEAST_TOKENS:,} are needed, of which "
            f"calibration reads {100 * (1 - TEST_SHARE):.0f} %: give more files"
        )
    test = int(text_tokens * TEST_SHARE * 0.9)  # parts are cut by characters, not by tokens
    train = int(text_tokens * (1 - TEST_SHARE) * 0.9)
    longest = _power_of_two(positions)
    target = 2048 if gpu else 512
    window = max(SHORTEST, min(target, longest, _power_of_two(test // (2 * SEEDS))))
    calibration = max(SHORTEST, min(target, longest, _power_of_two(train // 4)))
    if window > positions:
        raise UserError(f"--model: {positions} positions; at least {SHORTEST} are needed")
    length, answer, samples = 0, 0, 0
    if prompts:
        answer = min(128, max(16, 2 * max(answers))) if answers else (128 if gpu else 32)
        answer = min(answer, max(1, positions // 4))
        needed = max(prompts) + answer
        length = min(positions, max(512, 64 * math.ceil(2 * needed / 64)))
        if needed > length:
            raise UserError(
                f"--prompts: one has {max(prompts):,} tokens, which with {answer} of answer exceed "
                f"the model's {positions:,} positions: shorten it"
            )
        samples = min(math.ceil(len(prompts) / SEEDS), 50 if gpu else 8)
    usual = median(prompts) if prompts else window
    return Sizes(
        window=window,
        windows=0 if gpu else max(1, min(2, test // (SEEDS * window))),
        calibration_window=calibration,
        calibration_windows=max(2, min(16 if gpu else 8, train // calibration)),
        block_size=64 if min(usual, window) >= SHORT_PROMPT else 32,
        length=length,
        answer=answer,
        samples=samples,
        kl=gpu,
    )


@dataclass(frozen=True)
class Cost:
    """What a run of a study costs.

    Attributes:
        tokens: Tokens that go through the model, for all schemes and seeds.
        steps: Decode steps of batches of prompts.
        minutes: The time of a run on this machine's CPU; None on a GPU, where it was not measured.
    """

    tokens: int
    steps: int
    minutes: float | None


def cost_of(
    sizes: Sizes,
    prompts: Sequence[int],
    text_tokens: int,
    parameters: int,
    *,
    agreement: bool,
    speed: float | None,
    cores: int,
) -> Cost:
    """Returns what a run costs, with the time that the arithmetic takes on a CPU.

    Args:
        sizes: The sizes.
        prompts: Tokens of each prompt.
        text_tokens: Tokens of the text.
        parameters: Weights of the model.
        agreement: Whether the unquantized cache answers every prompt once more.
        speed: Operations per second of one core; None on a GPU.
        cores: Cores that run at a time.
    """
    windows = sizes.windows or int(text_tokens * TEST_SHARE) // sizes.window
    passes = SCHEMES + (SCHEMES - 1) * sizes.kl
    read = SEEDS * windows * sizes.window * passes
    answers = SCHEMES + (SCHEMES - 1) * agreement
    asked = SEEDS * sizes.samples * (round(sum(prompts) / len(prompts)) if prompts else 0) * answers
    calibration = 3 * sizes.calibration_windows * sizes.calibration_window  # with gradients
    steps = SEEDS * math.ceil(sizes.samples / 4) * sizes.answer * answers
    tokens = read + asked + calibration
    if speed is None:
        return Cost(tokens, steps, None)
    # Codes of a block are unpacked in every step, which takes a CPU about as long as the weights.
    seconds = tokens * 2 * parameters / speed + steps * 2 * 4 * parameters / CPU_BYTES_PER_S
    jobs = 3 * SCHEMES + 20  # fetching, quantizers, evaluations, tables and figures
    busy = min(cores, SCHEMES)
    return Cost(tokens, steps, (seconds + jobs * START_SECONDS) / busy / 60)


def core_speed(seconds: float = 0.3) -> float:
    """Measures the multiplications and additions per second of one core, in fp32 products.

    Args:
        seconds: How long to measure.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.ones(256, 1024), torch.ones(1024, 1024)
        torch.mm(a, b)
        start, rounds = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            torch.mm(a, b)
            rounds += 1
        return rounds * 2 * a.numel() * b.shape[1] / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
