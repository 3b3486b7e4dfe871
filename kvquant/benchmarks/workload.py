"""Common code of the throughput and energy benchmarks: options, set-up and jobs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kvquant.benchmarks.prompt_run import PromptRun
from kvquant.benchmarks.prompts import prompt_batch
from kvquant.benchmarks.timing import synchronize
from kvquant.energy.gpus import devices_of
from kvquant.errors import UserError, unknown
from kvquant.fetch.model_manifest import study_manifest
from kvquant.fetch.texts import load_text, read_data_manifest
from kvquant.models.loading import (
    load_quantized_model,
    resolve_device,
    resolve_devices,
)
from kvquant.models.oom_retry import fits_in_memory, retry_on_overflow
from kvquant.quantization.quantizer_file import check_digest
from kvquant.runtime.devices import claim_timed
from kvquant.runtime.provenance import device_name
from kvquant.study.config import Study, load_study
from kvquant.study.digests import quantizer_digest
from kvquant.study.timing import Workload


@dataclass
class Prepared(PromptRun):
    """Holds a loaded model and the prompts of a workload.

    Attributes:
        study: The study.
        workload: The workload.
        inputs: Hashes of the files on which results depend, by their role.
    """

    study: Study
    workload: Workload
    inputs: dict[str, str]

    @cached_property
    def devices(self) -> list[torch.device]:
        """All devices of the model's weights."""
        return devices_of(self.qm.model.parameters())

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts, without padding."""
        return self.batch.tokens

    @property
    def quantizes(self) -> bool:
        """Whether the scheme's cache quantizes."""
        return self.qm.quantizes

    def baseline(self) -> Any:
        """Returns an empty unquantized cache."""
        return self.qm.baseline_cache()

    def scheme(self) -> Any:
        """Returns an empty cache of the scheme."""
        return self.qm.new_cache("A")

    @torch.inference_mode()
    def make_room(self) -> None:
        """Gives the scheme's caches room for the outliers of these prompts.

        They can have more than a cache expects. As an evaluation does, runs the prompts again with
        wider caches. What does not fit in memory is left to the measurement, which finds it again.

        Raises:
            OutlierOverflow: Wider caches have no room either.
        """

        def fill(cache: Any) -> None:
            self.decode(cache, self.prefill(cache), self.workload.answer)

        if self.quantizes:
            fits_in_memory(lambda: retry_on_overflow(self.scheme, fill))

    def job(self, new_cache: Callable[[], Any]) -> None:
        """Runs a whole job of prompts and answers and waits for the devices."""
        cache = new_cache()
        token = self.prefill(cache)
        self.decode(cache, token, self.workload.answer, graphs=True)
        synchronize(*self.devices)


def check_devices(
    args: argparse.Namespace, gpus: int = 1, field: str = "gpus", *, current: bool = True
) -> list[torch.device]:
    """Returns the devices of the work after checking their name, and claims them if they are GPUs.

    The workflow plans the name without CUDA. Here it is checked against the devices that torch
    uses, which are identified by their UUIDs. The first one becomes torch's current device.

    Args:
        args: Options `device` and `device_name`.
        gpus: Number of GPUs where no single one is named.
        field: What asks for that number, in a message.
        current: Whether this process itself works on them.

    Raises:
        UserError: A device has another name, other processes of kvquant use it, or there are fewer
            GPUs.
    """
    check_name([resolve_device(args.device)], args.device_name)
    found = resolve_devices(claim_timed(args.device, gpus, field, current=current))
    check_name(found, args.device_name)
    return found


def check_device(args: argparse.Namespace) -> torch.device:
    """Returns the one device of the work; see :func:`check_devices`."""
    return check_devices(args)[0]


def check_name(devices: Sequence[torch.device], name: str) -> None:
    """Checks that all devices have the name under which the work is recorded.

    Raises:
        UserError: A device has another name.
    """
    for device in devices:
        real = "cpu" if device.type == "cpu" else device_name(device)
        if name != real:
            raise UserError(
                f"--device-name: this is '{real}', not '{name}': set `device: {real}` in the "
                "study, so that results of different hardware are never mixed (on a host of "
                "different GPUs CUDA_DEVICE_ORDER=PCI_BUS_ID numbers them as the workflow does)"
            )


def prepare(
    args: argparse.Namespace, workloads: Callable[[Study], dict[str, Workload]]
) -> Prepared:
    """Checks the options and loads the model.

    Args:
        args: Options of :func:`kvquant.benchmarks.options.throughput`.
        workloads: Returns the stage's workloads of a study.

    Raises:
        UserError: A name is unknown, the result exists, the device has another name, or the
            workload exceeds the model's positions.
    """
    study = load_study(args.study)
    study.model(args.model)
    scheme = study.scheme(args.scheme)
    known = workloads(study)
    if args.workload not in known:
        raise unknown("workload", args.workload, known)
    if study.scheme(study.baseline).kind != "fp16":
        raise UserError(
            f"baseline: '{study.baseline}' is not of kind fp16, and timing and energy compare with "
            "the unquantized cache: name a scheme of kind fp16"
        )
    if scheme.registration.calibrated and args.quantizer is None:
        raise UserError(f"--quantizer: needed for scheme '{args.scheme}' (run `quantize`)")
    if args.rep < 0:
        raise UserError(f"--rep: must not be negative (got {args.rep})")
    if args.out.exists():  # report before minutes of measuring, not after
        raise UserError(f"--out: {args.out} exists: delete it by name to measure again")
    devices = check_devices(args, study.model(args.model).gpus, f"models.{args.model}.gpus")
    if scheme.registration.calibrated:
        check_digest(args.quantizer, quantizer_digest(study, args.model, args.scheme))
    workload = known[args.workload]
    dataset = study.calibration.dataset
    text = load_text(args.data_manifest, "test", dataset, study.datasets.get(dataset))
    if not text:
        raise UserError(
            f"calibration.dataset: the test part of '{dataset}' is empty, and timed prompts are "
            "pieces of it: name another data set"
        )
    qm = load_quantized_model(
        study_manifest(args.model_manifest, study, args.model),
        scheme,
        quantizer=args.quantizer if scheme.registration.calibrated else None,
        device_map=devices,
    )
    longest = workload.prompt + workload.answer
    if longest > qm.max_positions:
        raise UserError(
            f"workloads.{args.workload}: prompt and answer need {longest} positions, but the model "
            f"has {qm.max_positions}: shorten one of them"
        )
    ids = qm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    batch = prompt_batch(workload, ids, args.rep, qm.device)
    inputs = qm.inputs | {"timed_text": read_data_manifest(args.data_manifest).sha256}
    return Prepared(qm, batch, study, workload, inputs)
