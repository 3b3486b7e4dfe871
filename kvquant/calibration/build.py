"""From calibration statistics to the quantizer of one scheme."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvquant import __version__
from kvquant.calibration.statistics import LayerStatistics, load_statistics
from kvquant.errors import UserError
from kvquant.fetch.text_overlap import CalibratedText
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.quantization.nuq import Histogram, fit, q_norm
from kvquant.quantization.quantizer_file import QuantizerManifest, save_quantizer
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.config import load_study
from kvquant.study.digests import calibration_digest, quantizer_digest
from kvquant.study.scheme_kinds import CalibratedScheme

GRID = 1024


def percentile(
    counts: torch.Tensor, low: torch.Tensor, width: torch.Tensor, q: float
) -> torch.Tensor:
    """Quantile of each row's histogram, linear inside a bin.

    Args:
        counts: fp32 `[rows, bins]`.
        low: fp32 `[rows]`, left end of the grid.
        width: fp32 `[rows]`, width of a bin.
        q: Quantile in [0, 1].

    Returns:
        fp32 `[rows]`.
    """
    cumulative = counts.double().cumsum(1)
    target = cumulative[:, -1:] * q
    # the first bin whose cumulated count reaches the target; for q = 0 the first filled one
    index = torch.searchsorted(cumulative, target.clamp(min=1e-9)).clamp_(max=counts.shape[1] - 1)
    inside = counts.double().gather(1, index)
    before = cumulative.gather(1, index) - inside
    fraction = ((target - before) / inside.clamp(min=1e-12)).clamp_(0, 1)
    return (low.double() + (index + fraction).squeeze(1) * width.double()).float()


def key_ranges(
    statistics: LayerStatistics, outliers: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zero and scale of each key channel, and which channels have no range to speak of.

    A quantile that falls into a bin with half of a channel's elements, as of a constant, says
    nothing about where in it they are. Such a bin is inside the range whole, with what rounding may
    have moved, so that the constant is no outlier and whatever differs from it is one.

    Returns:
        fp32 `[channels]`, fp32 `[channels]`, bool `[channels]`.
    """
    tail = outliers / 2 if outliers < 1 else 0.0
    counts, left, width = statistics.counts, statistics.low, statistics.width
    low = percentile(counts, left, width, tail)
    high = percentile(counts, left, width, 1.0 - tail)
    most = counts.max(1)
    crowded = most.values * 2 >= counts.sum(1)
    begin = left.double() + most.indices * width.double()
    end = begin + width.double()
    rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(begin.abs(), end.abs())
    low = torch.where(crowded, torch.minimum(low, (begin - rounding).float()), low)
    high = torch.where(crowded, torch.maximum(high, (end + rounding).float()), high)
    constant = crowded & (high - low <= 2 * (width + 2 * rounding.float()))
    return (low + high) / 2, (high - low) / 2, constant


def key_histogram(
    statistics: LayerStatistics,
    zero: torch.Tensor,
    scale: torch.Tensor,
    constant: torch.Tensor,
    weighting: str,
) -> Histogram:
    """The layer's keys normalized by `(x - zero) / scale`, inliers only, all channels together.

    Constant channels are left out: any level is as good for them.
    """
    bins = statistics.counts.shape[1]
    centers = statistics.low[:, None] + (torch.arange(bins) + 0.5) * statistics.width[:, None]
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    normalized = (centers - zero[:, None]) / safe[:, None]
    inlier = (normalized.abs() <= 1.0) & ((scale > 0) & ~constant)[:, None]
    if weighting == "none":
        weights = statistics.counts
    elif weighting == "fisher":
        weights = statistics.fisher
    else:
        weights = statistics.fisher * (scale**2)[:, None]
    index = ((normalized + 1.0) * (GRID / 2)).long().clamp_(0, GRID - 1)[inlier]

    def collect(source: torch.Tensor) -> np.ndarray:
        out = torch.zeros(GRID, dtype=torch.float64)
        return out.index_add_(0, index, source[inlier].double()).numpy()

    return Histogram(_centers(GRID), collect(weights), collect(statistics.counts))


def _centers(bins: int) -> np.ndarray:
    return (np.arange(bins) + 0.5) * (2.0 / bins) - 1.0


def value_histogram(statistics: LayerStatistics, fraction: int, weighting: str) -> Histogram:
    """The layer's normalized values for one of the calibrated outlier fractions."""
    source = {
        "none": statistics.value_counts,
        "fisher": statistics.value_fisher,
        "fisher-range2": statistics.value_fisher_range2,
    }[weighting]
    counts = statistics.value_counts[fraction].double().numpy()
    return Histogram(_centers(counts.size), source[fraction].double().numpy(), counts)


def build_layer(
    statistics: LayerStatistics, spec: CalibratedScheme, fractions: list[float], heads: int
) -> tuple[LayerQuantizer, float, float]:
    """Ranges and codebooks of one layer.

    Returns:
        The tables, and the weighted mean squared error of coding the normalized keys and values.
    """
    zero, scale, constant = key_ranges(statistics, spec.outliers)
    if spec.outliers == 0 and bool(constant.any()):
        raise UserError(
            f"outliers: 0, but {int(constant.sum())} key channels of a layer were constant in "
            "calibration, and nothing would be left of what differs from them later; choose "
            "outliers > 0, which keeps that exactly, or a longer calibration text"
        )
    keys = key_histogram(statistics, zero, scale, constant, spec.weighting)
    values = value_histogram(statistics, _fraction(spec, fractions), spec.weighting)
    levels, errors = [], []
    for name, histogram in (("keys", keys), ("values", values)):
        datatype = spec.datatype
        if not histogram.counts.any():  # all constant: any levels will do
            datatype = "uniform"
        elif not histogram.weights.any():
            raise UserError(
                f"weighting: '{spec.weighting}', but all gradients of the {name} of a layer were "
                "0 in calibration; calibrate in 32 bits, or choose weighting: none"
            )
        level = fit(datatype, spec.bits, histogram)
        if spec.q_norm:
            level = torch.from_numpy(q_norm(level.double().numpy(), histogram)).float()
        levels.append(level)
        errors.append(coding_error(histogram, level.double().numpy()))
    tables = LayerQuantizer(
        zero.view(heads, -1).contiguous(), scale.view(heads, -1).contiguous(), *levels
    )
    return tables, errors[0], errors[1]


def _fraction(spec: CalibratedScheme, fractions: list[float]) -> int:
    if spec.outliers >= 1:
        return 0
    return fractions.index(spec.outliers)


def coding_error(histogram: Histogram, levels: np.ndarray) -> float:
    """Weighted mean squared error of coding a histogram with sorted levels."""
    codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, histogram.centers)
    total = histogram.weights.sum()
    error = histogram.weights * (histogram.centers - levels[codes]) ** 2
    return float(error.sum() / total) if total > 0 else 0.0


class StatisticsInfo(BaseModel):
    """What stats.json tells of the statistics beside it."""

    model_config = ConfigDict(strict=True)

    weights_sha256: str
    model_identity: str
    text: CalibratedText
    calibration: CalibrationSpec
    spec_digest: str
    num_layers: int
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)


def _info(stats: Path, raw: dict[str, object]) -> StatisticsInfo:
    try:
        return StatisticsInfo.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"--stats: {stats.with_suffix('.json')} is damaged ({where}: {first['msg']}): "
            "calibrate again"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kvquant quantize`."""
    parser.add_argument("--study", required=True, help="study file (YAML or JSON)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--stats", required=True, type=Path, help="stats.safetensors")
    parser.add_argument("--out", required=True, type=Path, help="quantizer.json")


def run(args: argparse.Namespace) -> None:
    """Builds and writes one quantizer."""
    study = load_study(args.study)
    study.model(args.model)
    spec = study.scheme(args.scheme)
    if not isinstance(spec, CalibratedScheme):
        raise UserError(f"--scheme: '{args.scheme}' (kind {spec.kind}) needs no quantizer")
    layers, found = load_statistics(args.stats)
    info = _info(args.stats, found)
    if info.spec_digest != calibration_digest(study, args.model):
        raise UserError(
            f"--stats: {args.stats} is of another calibration or model: calibrate again"
        )
    fractions = info.calibration.outlier_fractions
    if spec.outliers < 1 and spec.outliers not in fractions:
        raise UserError(f"schemes.{args.scheme}.outliers: not calibrated, known: {fractions}")
    built = [build_layer(layer, spec, fractions, info.num_kv_heads) for layer in layers]
    errors = {
        "keys": float(np.mean([b[1] for b in built])),
        "values": float(np.mean([b[2] for b in built])),
    }
    manifest = QuantizerManifest(
        library_version=__version__,
        model=args.model,
        weights_sha256=info.weights_sha256,
        model_identity=info.model_identity,
        text=info.text,
        scheme=args.scheme,
        spec=spec.model_dump(mode="json"),
        calibration=info.calibration.model_dump(mode="json"),
        spec_digest=quantizer_digest(study, args.model, args.scheme),
        num_layers=info.num_layers,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        calibration_error=errors,
    )
    save_quantizer(args.out, manifest, [b[0] for b in built])
    print(
        f"quantize: {args.scheme}: {len(built)} layers, {2**spec.bits} levels; weighted error of "
        f"normalized keys {errors['keys']:.2e}, values {errors['values']:.2e}"
    )
