"""Which figures a study has something to show for; read by the workflow, so without torch."""

from __future__ import annotations

from kvquant.errors import UserError
from kvquant.study.config import PasskeyTask, PerplexityTask, Study


def _compared(study: Study, kind: type) -> bool:
    """Whether a scheme beside the baseline is evaluated on a task of `kind`."""
    return any(
        study.evaluates(scheme, name)
        for name, task in study.tasks.items()
        if isinstance(task, kind)
        for scheme in study.schemes
        if scheme != study.baseline
    )


def reasons(study: Study) -> dict[str, str]:
    """Figure -> why this study has nothing to show in it; "" for one that is made."""
    lengths = {t.length for t in study.tasks.values() if isinstance(t, PasskeyTask)}
    checks = {
        "pareto": (_compared(study, object), "compares no scheme with the baseline"),
        "perplexity": (_compared(study, PerplexityTask), "compares no scheme on a perplexity task"),
        "throughput": (bool(study.throughput_cells()), "times no workload of a scheme"),
        "passkey": (len(lengths) > 1, "has passkey tasks of fewer than two lengths"),
        "append": (study.append is not None, "has no section 'append'"),
        "kernels": (bool(study.kernel_cases()), "has no section 'kernels'"),
    }
    return {name: "" if shown else f"the study {why}" for name, (shown, why) in checks.items()}


def shown(study: Study) -> list[str]:
    """Names of the figures that are made."""
    return [name for name, reason in reasons(study).items() if not reason]


def check(study: Study, name: str) -> None:
    """Refuses a figure that has nothing to show.

    Raises:
        UserError: With the reason, and the figures that there are.
    """
    if reason := reasons(study)[name]:
        there = ", ".join(shown(study)) or "none"
        raise UserError(f"figure {name}: {reason}; figures of this study: {there}")
