"""What both benchmarks share: options, set-up, one job of prompt and answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvquant.benchmarks.timing import synchronize
from kvquant.config import Study, Workload, load_study
from kvquant.errors import UserError, unknown
from kvquant.generation import left_pad
from kvquant.models import QuantizedModel, load_quantized_model, read_manifest
from kvquant.provenance import device_name
from kvquant.specs import needs_calibration


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant throughput` and `kvquant energy`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--rep", required=True, type=int)
    parser.add_argument("--device-name", required=True, help="checked against the real device")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--model-manifest", required=True, type=Path)
    parser.add_argument("--quantizer", type=Path, help="quantizer.json, for calibrated schemes")
    parser.add_argument("--out", required=True, type=Path, help="record to write")


def prompt_lengths(workload: Workload) -> list[int]:
    """Tokens of each prompt: all equal, or falling evenly from `prompt` to half of it.

    Example: prompt 512, batch 3, ragged: 512, 384, 256.
    """
    n, longest = workload.batch_size, workload.prompt
    if not workload.ragged or n == 1:
        return [longest] * n
    return [longest - round(i * (longest / 2) / (n - 1)) for i in range(n)]


@dataclass
class Prepared:
    """A loaded model and the padded prompts of a workload."""

    study: Study
    qm: QuantizedModel
    workload: Workload
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, padding not counted."""
        return sum(prompt_lengths(self.workload))

    def baseline(self) -> Any:
        """An empty unquantized cache."""
        return self.qm.baseline_cache()

    def scheme(self) -> Any:
        """An empty cache of the scheme."""
        return self.qm.new_cache("A")

    @torch.inference_mode()
    def prefill(self, cache: Any) -> torch.Tensor:
        """Runs the prompts; returns the first answer token `[batch_size, 1]`."""
        logits = self.qm.model(
            input_ids=self.ids,
            attention_mask=self.mask if self.workload.ragged else None,
            position_ids=self.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def decode(self, cache: Any, token: torch.Tensor, steps: int) -> None:
        """Greedy decoding of `steps` further tokens, whatever they are."""
        mask, last = self.mask, self.positions[:, -1:]
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], 1)
            last = last + 1
            logits = self.qm.model(
                input_ids=token,
                attention_mask=mask if self.workload.ragged else None,
                position_ids=last,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    def job(self, new_cache: Callable[[], Any]) -> None:
        """The whole job: prompts and answers."""
        cache = new_cache()
        token = self.prefill(cache)
        self.decode(cache, token, self.workload.answer)
        synchronize(self.qm.device)


def prepare(
    args: argparse.Namespace, workloads: Callable[[Study], dict[str, Workload]]
) -> Prepared:
    """Checks the options and loads the model.

    Raises:
        UserError: An unknown name, a device that is not the one named, or a workload beyond the
            model's positions.
    """
    study = load_study(args.study)
    study.model(args.model)
    scheme = study.scheme(args.scheme)
    known = workloads(study)
    if args.workload not in known:
        raise unknown("workload", args.workload, known)
    if needs_calibration(scheme) and args.quantizer is None:
        raise UserError(f"--quantizer: needed for scheme '{args.scheme}' (run `quantize`)")
    workload = known[args.workload]
    real = "cpu" if args.device == "cpu" else device_name()
    if args.device_name != real:
        raise UserError(
            f"--device-name: this is '{real}', not '{args.device_name}'; set `device: {real}` in "
            "the study, so that results of different hardware are never mixed"
        )
    qm = load_quantized_model(
        read_manifest(args.model_manifest),
        scheme,
        quantizer=args.quantizer if needs_calibration(scheme) else None,
        device=args.device,
    )
    longest = workload.prompt + workload.answer
    if longest > qm.max_positions:
        raise UserError(
            f"workloads.{args.workload}: prompt and answer take {longest} positions, the model has "
            f"{qm.max_positions}"
        )
    generator = torch.Generator().manual_seed(args.rep)
    vocabulary = int(qm.model.config.vocab_size)
    prompts = [
        torch.randint(0, vocabulary, (n,), generator=generator).tolist()
        for n in prompt_lengths(workload)
    ]
    ids, mask = left_pad(prompts, 0, qm.device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    return Prepared(study, qm, workload, ids, mask, positions)
