"""Tensor parallelism: the kv heads that a process has of a model, by transformers' own plan.

Under `torchrun` each process loads a part of every projection. Where the plan splits the outputs of
queries, keys and values (`colwise`), a process computes those of its heads alone. Where it gathers
them again (`colwise_gather_output`: fused projections, norms over all heads), each process computes
all, and the attention here keeps the process's own heads, so that caches are shared either way.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from kvquant.errors import UserError
from kvquant.formats.head_share import HeadShare
from kvquant.study.model_families import MODEL_FAMILIES, ModelFamily, supported_families

SPLIT, GATHERED = ("colwise",), ("colwise_gather_output", "colwise_rep")
# Of the output's projection, by that of its inputs.
OUTPUTS = {True: ("rowwise_split_input", "rowwise_rep"), False: ("rowwise",)}
SHARE, KEPT = "kvquant_share", "kvquant_kept_heads"  # attributes of decoders and of attentions
_LAYERS = "layers.*.self_attn."


@dataclass(frozen=True)
class KeptHeads:
    """What the attention of a process keeps of projections whose outputs are gathered.

    Attributes:
        share: The process's heads.
        mesh: The mesh of the processes that share the model.
    """

    share: HeadShare
    mesh: Any

    def own(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the process's heads of tensors `[batch_size, num_heads, seq_len, head_dim]`."""
        return tuple(self.share.part(x, 1) for x in parts)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., channels]` of the process's heads as the output's projection takes it."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(x, self.mesh, [Shard(x.dim() - 1)], run_check=False)


def is_shared(model: Any) -> bool:
    """Returns whether several processes share a model's layers by a tensor-parallel plan."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def own_tensor(x: torch.Tensor) -> torch.Tensor:
    """Returns the part of a weight that this process has, in the same memory."""
    return x.to_local() if hasattr(x, "to_local") else x


def _gathers(plan: dict[str, str], prefix: str, family: ModelFamily) -> bool:
    """Returns whether the outputs of the attention's projections are gathered.

    Raises:
        UserError: The plan does not share the heads.
    """
    inputs = [family.fused] if family.fused is not None else ["q_proj", "k_proj", "v_proj"]
    found = {name: plan.get(prefix + str(name)) for name in (*inputs, "o_proj")}
    styles = {found[name] for name in inputs}
    for gathered, allowed in ((False, SPLIT if family.fused is None else ()), (True, GATHERED)):
        if all(style in allowed for style in styles) and found["o_proj"] in OUTPUTS[gathered]:
            return gathered
    told = ", ".join(f"{name}: {style}" for name, style in found.items())
    raise UserError(
        f"tp_plan: does not share the heads of {family.label} as kvquant reads them ({told}); use "
        "the model's own plan (tp_plan='auto')"
    )


def plan_gathers(config: Any) -> bool:
    """Returns whether transformers' plan computes keys and values of all heads in every process.

    Args:
        config: The model's configuration.

    Raises:
        UserError: There is no plan for the model, or it does not share the heads.
    """
    family = MODEL_FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(f"model: '{config.model_type}' is none of {supported_families()}")
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise UserError(
            f"tp_plan: transformers has no plan for {family.label}; load the model without tp_plan"
        )
    return _gathers(plan, _LAYERS, family)


def plan_options(config: Any, tp_plan: str, device: str, device_map: Any) -> dict[str, Any]:
    """Returns the options with which transformers loads a process's part of a model.

    Args:
        config: The model's configuration.
        tp_plan: "auto", transformers' own plan.
        device: As the caller gave it.
        device_map: As the caller gave it.

    Returns:
        No options for a single process.

    Raises:
        UserError: The processes, their GPUs, the model or other options do not fit.
    """
    if tp_plan != "auto":
        raise UserError(f"tp_plan: '{tp_plan}' is not 'auto', the plan of transformers")
    if device_map is not None:
        raise UserError("device_map: cannot be given beside tp_plan; leave one of the two out")
    if device != "auto":
        raise UserError("device: tp_plan gives each process its own; leave device out")
    started = distributed.is_available() and distributed.is_initialized()
    if not started and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        raise UserError(
            "tp_plan: there are no processes to share the model; start the program by "
            "`torchrun --nproc-per-node N`, or leave tp_plan out"
        )
    ranks = distributed.get_world_size() if started else _count("WORLD_SIZE")
    if ranks == 1:
        return {}
    plan_gathers(config)
    _check_heads(config, ranks)
    _check_gpus(ranks)
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks)}


def _count(name: str) -> int:
    """Returns the number of processes that a variable of `torchrun` tells.

    Raises:
        UserError: It tells none.
    """
    told = os.environ[name]
    if not told.isdecimal() or not int(told):
        raise UserError(
            f"tp_plan: {name} is '{told}', which is no number of processes; start the program by "
            "`torchrun --nproc-per-node N`, or leave tp_plan out"
        )
    return int(told)


def _check_heads(config: Any, ranks: int) -> None:
    """Refuses a number of processes that does not divide the heads.

    Raises:
        UserError: It does not.
    """
    heads = int(config.num_key_value_heads)
    if heads % ranks:
        fitting = " or ".join(str(n) for n in range(1, heads + 1) if not heads % n)
        raise UserError(
            f"tp_plan: {ranks} processes cannot share {heads} kv heads (num_key_value_heads) "
            f"evenly; start {fitting} (torchrun --nproc-per-node)"
        )


def _check_gpus(ranks: int) -> None:
    """Refuses more processes than there are GPUs on this machine, if there are any.

    Raises:
        UserError: There are, or a process cannot know which GPU is its own.
    """
    if not torch.cuda.is_available():
        return
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "tp_plan: LOCAL_RANK is not set, so that a process does not know its GPU; start the "
            "program by `torchrun --nproc-per-node N`"
        )
    here = _count("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else ranks
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise UserError(
            f"tp_plan: {here} processes on this machine, but torch sees {gpus} GPU(s); start "
            f"{gpus} (torchrun --nproc-per-node), or let it see more (CUDA_VISIBLE_DEVICES)"
        )


def share_heads(model: Any, attentions: list[Any], family: ModelFamily) -> HeadShare | None:
    """Finds which kv heads of a model this process has, and prepares its attention for them.

    Args:
        model: The causal language model, loaded with or without a plan.
        attentions: Its self-attention modules.
        family: Their family.

    Returns:
        None where the process has all heads.

    Raises:
        UserError: The model's plan, or how it is spread otherwise, is not supported.
    """
    if not is_shared(model):
        return None
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    ranks = int(mesh.size())
    if ranks != distributed.get_world_size():
        raise UserError(
            f"model: {ranks} of {distributed.get_world_size()} processes share its heads, and it "
            "is spread otherwise, too (fsdp, pipeline); load it with tp_plan='auto' alone"
        )
    gathered = _gathers(model.tp_plan, f"model.{_LAYERS}", family)
    _check_heads(model.config, ranks)
    share = HeadShare(
        mesh.get_local_rank(), ranks, int(model.config.num_key_value_heads), mesh.get_group()
    )
    for number, attention in enumerate(attentions):
        if not gathered and (name := norm_by_head(attention, family)) is not None:
            raise UserError(
                f"tp_plan: layer {number} has a norm for each head ({name}), which the plan of "
                "transformers does not share; load the model without tp_plan"
            )
        setattr(attention, KEPT, KeptHeads(share, mesh) if gathered else None)
    setattr(model.model, SHARE, share)
    return share


def norm_by_head(attention: Any, family: ModelFamily) -> str | None:
    """Returns the norm of queries or keys that has weights for each head; None if there is none."""
    for name in family.norms:
        norm = getattr(attention, name, None)
        if norm is not None and any(weight.dim() > 1 for weight in norm.parameters()):
            return name
    return None


def kept_heads(attention: Any) -> KeptHeads | None:
    """Returns what an attention module keeps of its projections; None: all that they give."""
    found: KeptHeads | None = getattr(attention, KEPT, None)
    return found


def own_kv_heads(decoder: Any) -> int:
    """Returns the number of kv heads of a decoder that this process has."""
    share: HeadShare | None = getattr(decoder, SHARE, None)
    return int(decoder.config.num_key_value_heads) if share is None else share.count


def refuse_shared(model: Any, what: str) -> None:
    """Refuses a model whose heads processes share.

    Args:
        model: The causal language model.
        what: What cannot be done with it, and what to do instead.

    Raises:
        UserError: It is such a model.
    """
    if is_shared(model):
        raise UserError(f"tp_plan: {what}")
