"""The screen of `kvquant compare`: a table of caches, what its columns mean, and the answers."""

from __future__ import annotations

from typing import Any

from rich.padding import Padding
from rich.text import Text

from kvquant.diagnosis.screen import Screen
from kvquant.playground.side_by_side import agreeing

MARK = "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _median(times: dict[str, Any] | None) -> str:
    """Returns a median of milliseconds with three digits at least."""
    if times is None:
        return "-"
    return format(times["median"], ",.0f" if times["median"] >= 100 else ".1f")


def _cells(row: dict[str, Any], base: bool) -> list[str]:
    distance = None if base else row["distance"]
    nbytes = row["cache_bytes"]
    same = "-"
    if not base and row["same_answer"]:
        same = "all"
    elif not base and row["same_tokens"] is not None:
        same = f"{row['same_tokens']}"
    return [
        row["title"],
        _number(row["bits_per_element"], ".2f"),
        _number(None if nbytes is None else nbytes / 1e6, ",.2f"),
        _median(row["prefill_ms"]),
        _median(row["decode_ms_per_token"]),
        _number(None if distance is None else distance["kl"], ".4f"),
        _number(None if distance is None else 100 * distance["top1"], ".1f"),
        same,
    ]


def show(found: dict[str, Any], screen: Screen) -> None:
    """Prints what :func:`kvquant.playground.compare.report` found."""
    rows, on_cpu = found["caches"], found["device"] == "cpu"
    answered = rows[0]["answer"] is not None
    place = "the CPU" if on_cpu else found["device"]
    question = " and a question" if found["question"] else ""
    screen.line(
        f"{found['model']} on {place} ({found['dtype']} weights): {found['prompt_tokens']:,} "
        f"tokens of {found['file']}{question}",
        "bold",
    )
    heads = ["cache", "bits", "MB", "prefill ms", "ms/token", "KL", "top-1 %"]
    heads += ["same"] if answered else []
    cells = [_cells(row, number == 0)[: len(heads)] for number, row in enumerate(rows)]
    screen.table(heads, cells, right=heads[1:], wide=("cache",))
    for line in _legend(found, answered, on_cpu):
        screen.line(line)
    for row in rows:
        if row["problem"]:
            screen.line(f"{row['title']}: {row['problem']}", "red")
        if row["calibration_overlap"]:
            screen.line(
                f"{row['title']}: {100 * row['calibration_overlap']:.0f} % of this text is in the "
                "texts that it was calibrated on, so that KL and top-1 may look too good.",
                "yellow",
            )
    if answered:
        screen.line()
        _answers(rows, screen)


def _legend(found: dict[str, Any], answered: bool, on_cpu: bool) -> list[str]:
    """Returns what the columns mean, and what the numbers are not."""
    if found["protocol"] == "B":
        read = "protocol B: one forward pass, in which every token reads quantized keys and values"
    else:
        read = (
            f"protocol A, as a cache here has no other: chunks of {found['chunk']}, each of which "
            "is exact for itself and reads the earlier ones from the cache"
        )
    lines = [
        "bits: per key or value element, everything allocated; MB: of the cache; both after the "
        "prefill. Short prompts take more bits, as the latest tokens stay in 16.",
        f"KL (mean, nats), top-1 agreement: next-token distributions over the "
        f"{found['prompt_tokens'] - 1:,} tokens of the prompt against fp16's ({read}).",
    ]
    steps = found["new_tokens"] - 1
    rounds = f"medians of {found['rounds']} rounds" if found["rounds"] > 1 else "one round"
    times = f"prefill ms, ms/token (of {steps} decode steps): {rounds}, the caches in turns."
    if on_cpu:
        times += " On a CPU they are times of PyTorch code, and say nothing of GPU kernels."
    lines.append(times)
    if answered:
        lines.append(f"same: leading tokens of the answer that are fp16's, of {steps + 1}.")
    lines.append("One prompt illustrates; the workflow measures with seeds and tests.")
    return lines


def _answers(rows: list[dict[str, Any]], screen: Screen) -> None:
    """Prints the answers, marked where they first differ from fp16's."""
    first = rows[0]["answer"]
    for number, row in enumerate(rows):
        answer = row["answer"]
        if answer is None:
            continue
        if number and row["same_answer"]:
            screen.line(f"{row['title']}: the same answer", "bold")
            continue
        count = f"{row['answer_tokens']} tokens"
        if number:
            count += f", from {MARK} on not fp16's"
        screen.line(f"{row['title']} ({count})", "bold")
        at = agreeing(answer, first) if number else len(answer)
        shown = [answer[:at]] + ([MARK, answer[at:]] if number else [])
        if screen.rich:
            text = Text.assemble(*((part, "yellow" if i else "") for i, part in enumerate(shown)))
            screen.console.print(Padding(text, (0, 0, 0, 2)))
        else:
            lines = "".join(shown).splitlines() or [""]
            screen.line("\n".join(f"  {line}".rstrip() for line in lines))
