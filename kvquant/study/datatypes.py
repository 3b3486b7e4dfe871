"""Registers the datatypes of calibrated schemes, the values of the option `datatype`.

A datatype is registered here and nowhere else: studies accept its name, and
:mod:`kvquant.quantization.nuq` finds the function that computes its codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from kvquant.errors import unknown
from kvquant.study.registrations import by_name


@dataclass(frozen=True)
class Datatype:
    """A way to choose the `2**bits` levels of a codebook on [-1, 1].

    Attributes:
        name: The value of the option `datatype`.
        levels: The name ("module:function") of a function that returns the levels. It takes the
            bits and a :class:`kvquant.quantization.nuq.Histogram` or None.
        label: The name in figures.
        summary: A description of the levels, for the table of datatypes.
        fitted: Whether the levels are fitted to calibration data. Others need key ranges only.
    """

    name: str
    levels: str
    label: str
    summary: str
    fitted: bool = False


DATATYPES = by_name(
    (
        Datatype(
            name="nuq",
            levels="kvquant.quantization.nuq:fit_nuq",
            label="NUQ",
            summary="weighted k-means of the calibration data, solved exactly (KVQuant)",
            fitted=True,
        ),
        Datatype(
            name="nf",
            levels="kvquant.quantization.nuq:normal_float",
            label="NF",
            summary="quantiles of the normal distribution (QLoRA's NormalFloat)",
        ),
        Datatype(
            name="uniform",
            levels="kvquant.quantization.nuq:uniform",
            label="UNIFORM",
            summary="evenly spaced levels, both ends included",
        ),
        # A new datatype goes above this line.
    )
)


def _known(name: str) -> str:
    if name not in DATATYPES:
        raise ValueError(str(unknown("datatype", name, DATATYPES)))
    return name


DatatypeName = Annotated[str, AfterValidator(_known)]
