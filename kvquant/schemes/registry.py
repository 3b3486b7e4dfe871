"""Makes the codecs of a scheme's layers, or the scheme's own caches.

The kind's registration (:mod:`kvquant.study.schemes`) names the function that makes them. The
function is imported here when a scheme of the kind is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvquant.cache.codec import Codec
from kvquant.errors import UserError
from kvquant.formats.head_share import HeadShare
from kvquant.formats.layer_quantizer import LayerTables
from kvquant.formats.rope import Rope
from kvquant.study.dotted import load
from kvquant.study.scheme_kinds import Scheme

Tables = Sequence[LayerTables] | None
CacheFactory = Callable[[Any, Rope], Any]  # (protocol, rotary table) -> an empty cache


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that its cache depends on.

    Attributes:
        num_layers: Number of layers, those with a sliding window included.
        num_kv_heads: Number of key/value heads.
        head_dim: Channels per head.
        windows: The sliding window of each layer, None for one that sees all tokens; empty where
            all do.
        soft_cap: Bound of the scores (Gemma 2); None: there is none.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = ()
    soft_cap: float | None = None


def _check_tables(spec: Scheme, tables: Tables) -> None:
    if spec.registration.calibrated and tables is None:
        raise UserError(
            f"quantizer: scheme kind '{spec.kind}' needs a quantizer file; kvquant.calibrate "
            "makes one (in a study: `kvquant quantize`)"
        )


def build_codecs(
    spec: Scheme, num_layers: int, tables: Tables, share: HeadShare | None = None
) -> list[Codec] | None:
    """Returns one codec per layer; None for schemes without codecs.

    Args:
        spec: The scheme.
        num_layers: Number of layers of the model.
        tables: The layers of the quantizer file, for schemes that need calibration.
        share: Which of the model's kv heads this process has; None: all.

    Raises:
        UserError: The scheme needs tables and none are given, or its heads cannot be shared.
    """
    if share is not None and not spec.registration.splits_heads:
        raise UserError(
            f"tp_plan: scheme kind '{spec.kind}' codes the kv heads of a token together, so that "
            "processes cannot have some each; load the model without tp_plan, or use kind 'nuq'"
        )
    if spec.registration.codec is None:
        return None
    _check_tables(spec, tables)
    make: Callable[[Scheme, int, LayerTables | None], Codec] = load(spec.registration.codec)
    if share is not None and tables is not None:
        tables = [table.of_heads(share.own) for table in tables]
    codecs = [
        make(spec, layer, None if tables is None else tables[layer]) for layer in range(num_layers)
    ]
    if share is not None:
        for codec in codecs:
            codec.keep_share(share)
    return codecs


def build_caches(spec: Scheme, shape: ModelShape, tables: Tables) -> CacheFactory | None:
    """Returns a function that makes the scheme's own caches; None for schemes without any.

    Args:
        spec: The scheme.
        shape: The shape of the model.
        tables: As for :func:`build_codecs`.

    Raises:
        UserError: The scheme does not fit the model, or a package or tables are missing.
    """
    if spec.registration.caches is None:
        return None
    _check_tables(spec, tables)
    make: Callable[[Scheme, ModelShape, Tables], CacheFactory] = load(spec.registration.caches)
    return make(spec, shape, tables)
