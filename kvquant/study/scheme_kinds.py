"""Registers scheme kinds, each by a decorator on the class of its options.

A kind's :class:`SchemeKind` holds everything that other modules need to know of it. It is read by
the study's schema, the table of kinds, the labels of figures, the tests that every kind must pass,
and :mod:`kvquant.schemes.registry`, which imports the implementation when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from kvquant.study.datatypes import DATATYPES
from kvquant.study.registrations import only_value, register
from kvquant.study.wording import LABEL, Named, Words

PROMPT_ATTENTION = "prompt_attention"
PromptAttention = Literal["16-bit", "8-bit"]
MIN_COLUMNS = 128  # new columns of a call from which on its attention may run in 8 bits
FAMILIES = ("16-bit", "ours", "peers")  # unquantized caches, this project's schemes, all others


@dataclass(frozen=True)
class SchemeKind:
    """The registration of a scheme kind.

    Attributes:
        name: The value of the key `kind`.
        options: The class of its options.
        label: The name in figures.
        summary: What the cache is, for the table of kinds.
        codec: The name ("module:function") of a function that returns a layer's codec. It takes the
            options, the layer's index and the layer's calibrated tables or None.
        caches: The name of a function that returns a factory of whole caches. It takes the options,
            the model's shape and the tables of all layers or None. A kind with neither `codec` nor
            `caches` leaves the model its own cache.
        tables: The name of the class of a layer's calibrated tables, for calibrated kinds.
        builder: The name of the function that builds the tables of all layers from calibration
            statistics. It takes the statistics, the options, the calibrated outlier fractions and
            the number of kv heads, and returns the tables and errors by name.
        nominal_bits: Bits per element without scales and outliers; None takes the option `bits`.
        protocols: The protocols that the cache can be measured under.
        quantizes: Whether the cache quantizes at all.
        batches: Whether a sequence reads back the same data in every batch.
        splits_heads: Whether processes may have some of the kv heads each (tensor parallelism), and
            get the codes that one process with all heads gets.
        prompt_attention: Whether prompts may attend in 8 bits over the cache.
        reference: The publication; empty for none.
        extra: The optional dependencies of this package that the kind needs; empty for none.
        ours: Whether the method is this project's own; the other quantized caches are peers.
    """

    name: str
    options: type[Scheme]
    label: str
    summary: str
    codec: str | None
    caches: str | None
    tables: str
    builder: str
    nominal_bits: int | None
    protocols: tuple[str, ...]
    quantizes: bool
    batches: bool
    splits_heads: bool
    prompt_attention: bool
    reference: str
    extra: str
    ours: bool

    @property
    def calibrated(self) -> bool:
        """Returns whether the kind needs a quantizer that is built from calibration statistics."""
        return issubclass(self.options, CalibratedScheme)


def _kept(none: str, one: str, several: str) -> Callable[[int], str]:
    """Returns words for a number of tokens."""
    return lambda n: none if n == 0 else one if n == 1 else several.format(f"{n:,}")


def outliers_in_words(fraction: float) -> str:
    """Returns a fraction of outliers as a part of a name."""
    return f"{100 * fraction:g} % outliers" if fraction else "no outliers"


def no_prompt_attention(kind: str) -> str:
    """Returns why a kind of scheme cannot have 8-bit attention of prompts, and the fix."""
    return f"kind '{kind}' has an attention of its own, which is in 16 bits; leave this option out"


class Scheme(Named):
    """A scheme of a study, with its kind and the options of the kind."""

    later: ClassVar[tuple[str, ...]] = (LABEL, PROMPT_ATTENTION)
    words: ClassVar[Words] = {
        "sinks": _kept("no sink", "1 sink", "{} sinks"),
        "residual": _kept("no window", "window of 1", "window of {}"),
        "block_size": "blocks of {}".format,
        "group": "groups of {}".format,
        "tile": "tiles of {}".format,
        "outliers": outliers_in_words,
        PROMPT_ATTENTION: "{} attention".format,
    }
    terms: ClassVar[Mapping[str, str]] = {
        "bits": "bits per code",
        "sinks": "first tokens in 16 bits",
        "residual": "latest tokens in 16 bits",
        "block_size": "tokens per block",
        "group": "elements per group",
        "outliers": "exact outliers",
        PROMPT_ATTENTION: "attention of prompts",
    }
    values: ClassVar[Words] = {"outliers": lambda fraction: f"{100 * fraction:g} %"}
    prompt_attention: PromptAttention = Field(
        "16-bit",
        description="in how many bits calls with many new columns attend, whatever the cache is",
    )
    registration: ClassVar[SchemeKind]
    if TYPE_CHECKING:  # a field that each subclass declares, in the order of its options
        kind: str

    @model_validator(mode="after")
    def _can_attend(self) -> Self:
        if self.prompt_attention != "16-bit" and not self.registration.prompt_attention:
            raise ValueError(f"{PROMPT_ATTENTION}: {no_prompt_attention(self.kind)}")
        return self

    def method(self) -> str:
        """Returns the name of the method, by which figures choose colors."""
        return self.registration.label

    def curve(self) -> str:
        """Returns the method and its attention: schemes that differ in neither make a curve."""
        return self._named(self.method())

    def _named(self, cache: str) -> str:
        return ", ".join(filter(None, (cache, self.in_words(PROMPT_ATTENTION))))

    def title(self, key: str) -> str:
        """Returns the name of the cache, and the attention of prompts where it is not in 16 bits.

        Args:
            key: The name in the study.
        """
        return self._named(self.cache_title())

    def cache_title(self) -> str:
        """Returns the method with its bits."""
        bits, values = getattr(self, "bits", None), getattr(self, "value_bits", None)
        if bits is None:
            return self.method()
        both = f"{bits:g}" if values in (None, bits) else f"{bits:g}/{values:g}"
        return f"{self.method()} {both} bit{'' if both == '1' else 's'}"

    def telling(self) -> list[str]:
        """Returns the options that may tell schemes of one title apart."""
        told = ("kind", "bits", "value_bits", PROMPT_ATTENTION)
        return [option for option in super().telling() if option not in told]

    @property
    def protocols(self) -> tuple[str, ...]:
        """Returns the protocols that the scheme's cache can be measured under."""
        return self.registration.protocols

    @property
    def quantizes(self) -> bool:
        """Returns whether the scheme quantizes at all."""
        return self.registration.quantizes

    @property
    def exact(self) -> bool:
        """Returns whether results are those of the model: neither cache nor attention rounds."""
        return not self.quantizes and self.prompt_attention == "16-bit"

    @property
    def family(self) -> str:
        """Returns one of :data:`FAMILIES`."""
        if not self.quantizes:
            return FAMILIES[0]
        return FAMILIES[1] if self.registration.ours else FAMILIES[2]

    @property
    def batches(self) -> bool:
        """Returns whether a sequence reads back the same data in every batch."""
        return self.registration.batches

    @property
    def nominal_bits(self) -> int:
        """Returns the bits per element without scales and outliers, rounded down.

        Where values have bits of their own, it is the mean of keys and values.
        """
        fixed = self.registration.nominal_bits
        if fixed is not None:
            return fixed
        bits = getattr(self, "bits")  # noqa: B009
        return int((bits + (getattr(self, "value_bits", None) or bits)) / 2)


class CalibratedScheme(Scheme):
    """A scheme that needs a quantizer built from calibration statistics."""

    later: ClassVar[tuple[str, ...]] = (*Scheme.later, "calibration")
    words: ClassVar[Words] = {**Scheme.words, "calibration": "calibration {}".format}
    calibration: str | None = Field(
        None, description="entry of `calibrations`; absent: the study's `calibration`"
    )
    if TYPE_CHECKING:  # fields that each subclass declares, as above
        bits: float
        sinks: int

    @property
    def table_bits(self) -> float:
        """Returns the bits that the shapes of calibrated tables depend on."""
        return self.bits

    @property
    def sampled_tokens(self) -> int:
        """Returns how many whole tokens per layer calibration must keep, at most."""
        return 0

    @property
    def keys_after_rope(self) -> bool:
        """Returns whether calibration must keep histograms of keys after RoPE."""
        return False


class CodebookScheme(CalibratedScheme):
    """A calibrated scheme with one codebook for the keys and one for the values of each layer."""

    terms: ClassVar[Mapping[str, str]] = {
        **Scheme.terms,
        "datatype": "datatype of codes",
        "weighting": "weights of the codebooks",
        "q_norm": "levels matched to mean and variance",
    }
    values: ClassVar[Words] = {
        **Scheme.values,
        "datatype": lambda name: DATATYPES[name].label,
        "weighting": {
            "fisher-range2": "Fisher, range squared",
            "fisher": "Fisher",
            "none": "equal",
        }.__getitem__,
    }
    if TYPE_CHECKING:
        bits: int
        outliers: float
        datatype: str
        weighting: str
        q_norm: bool

    def cache_title(self) -> str:
        """Returns the method with its bits and outliers."""
        return f"{super().cache_title()}, {outliers_in_words(self.outliers)}"

    def telling(self) -> list[str]:
        """Returns the options that may tell schemes of one title apart."""
        return [option for option in super().telling() if option != "outliers"]


SCHEME_KINDS: dict[str, SchemeKind] = {}
Options = TypeVar("Options", bound=Scheme)


def scheme_kind(
    *,
    label: str,
    summary: str,
    codec: str | None = None,
    caches: str | None = None,
    tables: str = "kvquant.formats.layer_quantizer:LayerQuantizer",
    builder: str = "kvquant.calibration.build:build_layers",
    nominal_bits: int | None = None,
    protocols: tuple[str, ...] = ("A", "B"),
    quantizes: bool = True,
    batches: bool = True,
    splits_heads: bool = False,
    prompt_attention: bool = True,
    reference: str = "",
    extra: str = "",
    ours: bool = False,
) -> Callable[[type[Options]], type[Options]]:
    """Registers the decorated class as the options of a scheme kind (see :class:`SchemeKind`).

    Raises:
        ValueError: The kind is registered already, or the registration contradicts itself.
    """

    def with_options(options: type[Options]) -> type[Options]:
        name = only_value(options, "kind")
        if codec is not None and caches is not None:
            raise ValueError(f"scheme kind '{name}': names codecs and caches; leave one out")
        if nominal_bits is None and "bits" not in options.model_fields:
            raise ValueError(f"scheme kind '{name}': needs nominal_bits, or an option `bits`")
        options.registration = SchemeKind(
            name=name,
            options=options,
            label=label,
            summary=summary,
            codec=codec,
            caches=caches,
            tables=tables,
            builder=builder,
            nominal_bits=nominal_bits,
            protocols=protocols,
            quantizes=quantizes,
            batches=batches,
            splits_heads=splits_heads,
            prompt_attention=prompt_attention,
            reference=reference,
            extra=extra,
            ours=ours,
        )
        register(SCHEME_KINDS, options.registration)
        return options

    return with_options
