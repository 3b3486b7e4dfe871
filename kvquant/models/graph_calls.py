"""Lets a model's own decode steps run as a CUDA graph, so that `generate` is as fast as kernels.

A decode step called from Python is bound by the host, which launches hundreds of kernels. After a
few steps of one token per sequence over the same quantized cache, the model's forward pass replays
them as one graph (:mod:`kvquant.models.graph_decoding`). Whoever calls the model sees no
difference: masks and positions are checked as before, and logits are a copy. Every call that is
not such a step, and every change of the cache in between, runs without the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import weakref
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvquant.cache.kvquant_cache import KVQuantCache
from kvquant.models.graph_decoding import CapturedStep, GraphedDecoder
from kvquant.models.model_call import CACHE_NAMES, UNREAD, arguments, find_cache, parameters
from kvquant.models.oom_retry import release_memory
from kvquant.runtime.progress import note

# Steps without a change of the cache before a graph is captured, which costs about as much as 3.
STEPS_BEFORE = 8
# Room for this many tokens beyond those that a sequence has; then the graph is captured anew.
MIN_ROOM, ROOM_SHARE = 256, 8

_IGNORED = {"use_cache": (None, True), "return_dict": (None, True), "logits_to_keep": (None, 0, 1)}
_OFF = ("labels", "inputs_embeds", "output_attentions", "output_hidden_states")
_CONFIGURED = ("output_attentions", "output_hidden_states")  # in a model's configuration
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE_FIELD = next(name for name in CACHE_NAMES if name in _FIELDS)
_READ = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES)
_USED = frozenset({*_READ, *_IGNORED, *_OFF, *UNREAD})


# Packages whose modules keep their settings, so that no step spends time on comparing them.
_SETTLED = ("torch", "transformers", "kvquant")
# Attributes that every module has and that are compared otherwise.
_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}


class OwnSettings:
    """What a module of another library is set to: its numbers, words and switches.

    The active adapters of PEFT and their strength are such attributes.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = own = module.__dict__
        self._count = len(own)  # a switch of the class may become one of the module
        names = [name for name in own if name not in _OF_MODULES and _is_setting(own[name])]
        self._read = operator.itemgetter(*names)  # "training" is always among them
        self._values = copy.deepcopy(self._read(own))

    def hold(self) -> bool:
        """Returns whether they are as they were."""
        own = self._own
        try:
            return len(own) == self._count and bool(self._read(own) == self._values)
        except KeyError:  # one is gone
            return False


def _is_setting(value: Any) -> bool:
    """Returns whether a value is a number, a word or a switch, or holds nothing else."""
    if isinstance(value, dict):
        return all(map(_is_setting, value)) and all(map(_is_setting, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)


class ModelState:
    """What a graph depends on in a model: its weights, modules, hooks, modes and settings.

    Args:
        model: The model whose steps are captured.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._parts: list[tuple[dict[str, Any], str, Any]] = []
        self._weights: list[tuple[torch.Tensor, int]] = []
        self._hooks: list[tuple[dict[int, Any], int]] = []
        self._settings: list[OwnSettings] = []
        for module in model.modules():
            own = module.__dict__
            if type(module).__module__.partition(".")[0] not in _SETTLED:
                self._settings.append(OwnSettings(module))
            self._parts.append((own, "forward", own.get("forward")))
            for parts in (module._modules, module._parameters, module._buffers):
                self._parts += [(parts, name, part) for name, part in parts.items()]
            tensors = (*module._parameters.values(), *module._buffers.values())
            self._weights += [(x, x.data_ptr()) for x in tensors if x is not None]
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                self._hooks.append((hooks, len(hooks)))
        self._modes = self._modes_of(model)

    @staticmethod
    def _modes_of(model: nn.Module) -> tuple[Any, ...]:
        return model.training, torch.is_autocast_enabled("cuda")

    def is_of(self, model: nn.Module) -> bool:
        """Returns whether a graph of this state still does what the model would do."""
        return (
            self._model() is model
            and self._modes == self._modes_of(model)
            and all(parts.get(name) is part for parts, name, part in self._parts)
            and all(x.data_ptr() == address for x, address in self._weights)
            and all(len(hooks) == count for hooks, count in self._hooks)
            and all(settings.hold() for settings in self._settings)
        )


class CachedSteps:
    """The steps of one cache: how many were alike, and their graph once there is one.

    Attributes:
        lengths: Tokens of each sequence after the last step.
        changes: The cache's number of changes then.
        alike: Number of successive steps between which nothing changed the cache.
        decoder: The captured steps; None before there are enough, and after a change.
        model: What the graph of these steps depends on in the model.
        refused: Whether the steps of this cache cannot be captured.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.changes = 0
        self.alike = 0
        self.decoder: GraphedDecoder | None = None
        self.model: ModelState | None = None
        self.refused = False

    def begin(self, cache: KVQuantCache, model: Any) -> None:
        """Notes that a step begins, and forgets the graph if it does not go on from the last."""
        now, changes = cache.lengths, cache.changes
        same = now == self.lengths and changes == self.changes
        if self.decoder is not None and (self.model is None or not self.model.is_of(model)):
            same = False
        self.alike = self.alike + 1 if same else 0
        self.lengths, self.changes = [n + 1 for n in now], changes
        if not same:
            self.decoder = None

    def forget(self) -> None:
        """Forgets the graph after a call that is no step."""
        self.alike, self.lengths, self.decoder = 0, [], None


def _is_step(given: dict[str, Any]) -> bool:
    """Returns whether a call's arguments are those of a plain decode step on a GPU."""
    ids = given.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return False
    if not ids.is_cuda or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
        return False
    if any(given.get(name) is not None and given[name] is not False for name in _OFF):
        return False
    for name in ("attention_mask", "position_ids"):  # on the host they would be read there
        tensor = given.get(name)
        if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.is_cuda):
            return False
    for name, usual in _IGNORED.items():
        value = given.get(name)
        if isinstance(value, torch.Tensor) or value not in usual:
            return False
    return all(name in _USED or value is None for name, value in given.items())


def graphed_logits(model: Any, given: dict[str, Any]) -> torch.Tensor | None:
    """Returns the logits of a step by its cache's graph, or None if the call must run as usual.

    Args:
        model: The model.
        given: Arguments of the call by name.

    Returns:
        `[batch_size, 1, vocab_size]`, a copy.
    """
    cache = find_cache(given)
    if not isinstance(cache, KVQuantCache) or cache.calls.handed is not None or not cache.graphs:
        return None
    steps: CachedSteps = cache.steps or CachedSteps()
    cache.steps = steps
    if steps.refused:
        return None
    asked = any(getattr(model.config, name, False) for name in _CONFIGURED)
    if asked or not _is_step(given) or len(given["input_ids"]) != len(cache.lengths):
        steps.forget()
        return None
    steps.begin(cache, model)
    at_limit = cache.columns in (cache.position_limit, cache.window)  # the usual call tells there
    if at_limit or not cache.continues_counting(given.get("position_ids") is not None):
        steps.forget()
        return None
    if steps.decoder is None and steps.alike >= STEPS_BEFORE:
        _begin(model, cache, steps)
    captured = _captured(steps)
    if steps.decoder is None or captured is None:
        return None
    positions = steps.decoder.positions
    cache.check_step(given.get("attention_mask"), given.get("position_ids"), positions)
    logits = steps.decoder.replay(captured, given["input_ids"]).clone()
    cache.outer = None  # the decoder's hooks, which take it, have not run
    return logits[:, None]


def _begin(model: Any, cache: KVQuantCache, steps: CachedSteps) -> None:
    """Prepares the graph of a cache's next steps, or notes that there can be none."""
    room = max(MIN_ROOM, max(cache.lengths) // ROOM_SHARE)
    try:
        steps.decoder = GraphedDecoder(model, cache, room, borrowed=True)
    except ValueError:  # the decode kernel does not take this cache, or there are several GPUs
        steps.refused = True
    else:
        steps.model = ModelState(model)


def _captured(steps: CachedSteps) -> CapturedStep | None:
    """Returns the graph of the next step; a cache whose steps cannot be captured goes on without.

    A step may run where its capture does not: a hook that waits for the device, too little memory.
    """
    if steps.decoder is None:
        return None
    try:
        return steps.decoder.ready()
    except RuntimeError as error:
        note(f"decoding without a CUDA graph: {str(error).partition(chr(10))[0]}")
        steps.forget()
        steps.refused = True
    release_memory()
    return None


class GraphedCalls(nn.Module):
    """The class that a model gets so that its decode steps may run as graphs.

    :func:`graph_calls` changes the class of a model in place; weights, names and hooks stay.

    Attributes:
        original_class: The original class of the model.
    """

    original_class: type[nn.Module]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the original class, from which unpickling makes a model with graphs again."""
        return _blank, (self.original_class,), self.__getstate__()


_CLASSES: dict[type[nn.Module], type[GraphedCalls]] = {}


def _class_of(own: type[nn.Module]) -> type[GraphedCalls]:
    """Returns the subclass of a model's class whose steps may run as graphs."""
    if own in _CLASSES:
        return _CLASSES[own]
    names, usual = parameters(own.forward), own.forward

    @functools.wraps(usual)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = arguments(names, args, kwargs)
            logits = graphed_logits(self, given)
            if logits is not None:
                cache: Any = find_cache(given)
                return CausalLMOutputWithPast(logits=logits, **{_CACHE_FIELD: cache})
        return usual(self, *args, **kwargs)

    _CLASSES[own] = type(
        own.__name__,  # what transformers writes into a saved configuration
        (GraphedCalls, own),
        {"__module__": own.__module__, "__doc__": own.__doc__, "original_class": own,
         "forward": forward},
    )  # fmt: skip
    return _CLASSES[own]


def _blank(own: type[nn.Module]) -> nn.Module:
    """Makes a model without state, of the class with graphs."""
    kind = _class_of(own)
    return kind.__new__(kind)


def graph_calls(model: nn.Module) -> None:
    """Lets the decode steps of a model run as graphs; repeated calls change nothing.

    A model whose `forward` was replaced in the instance keeps it, and runs without graphs.
    """
    if not isinstance(model, GraphedCalls) and "forward" not in model.__dict__:
        model.__class__ = _class_of(type(model))


def no_graph_calls(model: nn.Module) -> None:
    """Restores the class that a model had before :func:`graph_calls`."""
    if isinstance(model, GraphedCalls):
        model.__class__ = model.original_class  # type: ignore[assignment]
