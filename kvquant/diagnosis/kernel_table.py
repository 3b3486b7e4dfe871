"""Which kernels each scheme's cache of a model would get on a device, and why not faster ones.

The decision is that of :mod:`kvquant.kernels.backends`; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.diagnosis.checks import Check, State
from kvquant.diagnosis.model_facts import CacheFacts, ModelFacts
from kvquant.errors import UserError
from kvquant.kernels.backends import CANDIDATES, Operation, Selection, device_facts, wish
from kvquant.kernels.prompt_backend import BACKENDS, decide_prompt
from kvquant.schemes.backend_report import backend_report
from kvquant.schemes.packed_blocks import shape_codec
from kvquant.schemes.registry import ModelShape, build_caches
from kvquant.study.model_families import MODEL_FAMILIES
from kvquant.study.scheme_kinds import Scheme


@dataclass(frozen=True)
class SchemeKernels:
    """The backends of one scheme.

    Attributes:
        name: What the scheme is called.
        kind: Its kind.
        selections: The backend of each operation; empty for a scheme that packs no blocks.
        problem: Why the scheme does not serve the model here; empty if it does.
        device: Type of the device.
    """

    name: str
    kind: str
    selections: Mapping[Operation, Selection]
    problem: str
    device: str

    @property
    def state(self) -> State:
        """Returns "ok" where each operation has the fastest backend that the device has."""
        if self.problem or any(s.backend is None for s in self.selections.values()):
            return "missing"
        if self.device != "cuda":
            return "ok"  # PyTorch is all that a CPU has
        first = all(s.backend == next(iter(CANDIDATES[o])) for o, s in self.selections.items())
        return "ok" if first else "warning"

    def as_json(self) -> dict[str, Any]:
        """Returns the row as the JSON has it."""
        return {
            "scheme": self.name,
            "kind": self.kind,
            "state": self.state,
            "problem": self.problem,
            "operations": {
                operation: {
                    "backend": selection.backend,
                    "refused": [
                        {"backend": backend, "reasons": list(reasons)}
                        for backend, reasons in selection.refused
                    ],
                }
                for operation, selection in self.selections.items()
            },
        }


def scheme_problem(scheme: Scheme, facts: CacheFacts) -> str:
    """Returns why a scheme does not serve a model here, or "" if it does."""
    try:
        shape_codec(scheme, facts.kv_heads, facts.head_dim)
        if scheme.registration.caches is not None and not scheme.registration.calibrated:
            shape = ModelShape(
                len(facts.windows), facts.kv_heads, facts.head_dim, facts.windows, facts.soft_cap
            )
            build_caches(scheme, shape, None)
    except UserError as error:
        return str(error)
    return ""


def prompt_check(model: ModelFacts, dtype: torch.dtype, device: torch.device) -> Check:
    """Returns the row of 8-bit attention of prompts: who would compute it, and why no other.

    Args:
        model: A supported model.
        dtype: The dtype of its weights.
        device: Where it would be.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the known values.
    """
    assert model.cache is not None
    family = MODEL_FAMILIES.get(model.model_type)
    if model.cache.soft_cap is not None or (family is not None and family.sink_logits is not None):
        lacks = "attention sinks" if model.cache.soft_cap is None else "caps of scores"
        fix = "leave prompt_attention at 16-bit"
        return Check("model", "8-bit prompts", "missing", f"no {lacks} in 8-bit attention", fix)
    facts = device_facts(device)
    selection = decide_prompt(model.cache.head_dim, dtype, facts, wish(), load=False)
    found, fix = f"attention by {selection.backend}", ""
    if selection.backend != BACKENDS[0]:
        told, _, fix = selection.reasons(BACKENDS[0])[0].partition(";")
        found = f"{found}, not {BACKENDS[0]}: {told}"
    slow = device.type == "cuda" and selection.backend == "pytorch"
    return Check("model", "8-bit prompts", "warning" if slow else "ok", found, fix.strip())


def scheme_kernels(
    name: str,
    scheme: Scheme,
    facts: CacheFacts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantized_weights: bool = False,
) -> SchemeKernels:
    """Returns the backends of a scheme's cache of a model.

    Args:
        name: What the scheme is called.
        scheme: The scheme.
        facts: The model.
        dtype: The dtype of the model's weights.
        device: Where the model would be.
        quantized_weights: Whether its weights are quantized, so that nothing is folded into them.

    Raises:
        UserError: `KVQUANT_KERNELS` is not one of the known values.
    """
    problem = scheme_problem(scheme, facts)
    selections: Mapping[Operation, Selection] = {}
    if not problem:
        selections = backend_report(
            scheme,
            head_dim=facts.head_dim,
            kv_heads=facts.kv_heads,
            query_heads=facts.heads,
            dtype=dtype,
            device=device,
            static_rope=facts.static_rope,
            kept_rope=facts.kept_rope,
            rotates_values=quantized_weights,
        )
    return SchemeKernels(name, scheme.kind, selections, problem, device.type)
