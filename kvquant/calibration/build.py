"""`kvquant quantize`: builds the quantizer of one scheme from calibration statistics."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvquant import __version__
from kvquant.calibration.key_histograms import KeyHistograms
from kvquant.calibration.statistics import LayerStatistics, load_statistics
from kvquant.errors import UserError
from kvquant.fetch.text_overlap import CalibratedText
from kvquant.formats.layer_quantizer import LayerQuantizer, LayerTables
from kvquant.quantization.nuq import Histogram, fit, q_norm
from kvquant.quantization.quantizer_file import QuantizerManifest, save_quantizer
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.config import load_study
from kvquant.study.digests import calibration_digest, quantizer_digest
from kvquant.study.dotted import load
from kvquant.study.scheme_kinds import CalibratedScheme, CodebookScheme

Builder = Callable[
    [list[LayerStatistics], CalibratedScheme, list[float], int],
    tuple[Sequence[LayerTables], dict[str, float]],
]
GRID = 1024  # bins of normalized histograms on [-1, 1]


def percentile(
    counts: torch.Tensor, low: torch.Tensor, width: torch.Tensor, q: float
) -> torch.Tensor:
    """Returns a quantile of each row's histogram, interpolated linearly inside a bin.

    Args:
        counts: fp32 `[rows, bins]`, elements per bin.
        low: fp32 `[rows]`, left end of the grid.
        width: fp32 `[rows]`, width of a bin.
        q: Quantile in [0, 1].

    Returns:
        fp32 `[rows]`.
    """
    cumulative = counts.double().cumsum(1)
    target = cumulative[:, -1:] * q
    # The first bin whose cumulated count reaches the target; for q = 0 the first filled bin.
    index = torch.searchsorted(cumulative, target.clamp(min=1e-9)).clamp_(max=counts.shape[1] - 1)
    inside = counts.double().gather(1, index)
    before = cumulative.gather(1, index) - inside
    fraction = ((target - before) / inside.clamp(min=1e-12)).clamp_(0, 1)
    return (low.double() + (index + fraction).squeeze(1) * width.double()).float()


def key_ranges(
    statistics: KeyHistograms, outliers: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns zero and scale of each key channel, and which channels are constant.

    If one bin holds half of a channel's elements, as for a constant, a quantile inside this bin
    does not tell where in it they lie. The range then includes the whole bin and the rounding error
    of its ends, so that the constant is an inlier and any other value an outlier.

    Args:
        statistics: Histograms of the layer's keys.
        outliers: Fraction of the elements outside the range; from 1 on the range has none.

    Returns:
        Zero, fp32 `[channels]`, scale, fp32 `[channels]`, and constant, bool `[channels]`.
    """
    tail = outliers / 2 if outliers < 1 else 0.0
    counts, left, width = statistics.counts, statistics.low, statistics.width
    low = percentile(counts, left, width, tail)
    high = percentile(counts, left, width, 1.0 - tail)
    fullest = counts.max(1)
    crowded = fullest.values * 2 >= counts.sum(1)
    begin = left.double() + fullest.indices * width.double()
    end = begin + width.double()
    rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(begin.abs(), end.abs())
    low = torch.where(crowded, torch.minimum(low, (begin - rounding).float()), low)
    high = torch.where(crowded, torch.maximum(high, (end + rounding).float()), high)
    constant = crowded & (high - low <= 2 * (width + 2 * rounding.float()))
    return (low + high) / 2, (high - low) / 2, constant


def key_histogram(
    statistics: KeyHistograms,
    zero: torch.Tensor,
    scale: torch.Tensor,
    constant: torch.Tensor,
    weighting: str,
) -> Histogram:
    """Returns one histogram of all inlier keys of a layer, normalized by `(x - zero) / scale`.

    Constant channels are left out, because every level codes them equally well.
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

    return Histogram(bin_centers(GRID), collect(weights), collect(statistics.counts))


def bin_centers(bins: int) -> np.ndarray:
    """Returns the centers of equal bins on [-1, 1], float64 `[bins]`."""
    return (np.arange(bins) + 0.5) * (2.0 / bins) - 1.0


def value_histogram(statistics: LayerStatistics, fraction: int, weighting: str) -> Histogram:
    """Returns the histogram of a layer's normalized values for one outlier fraction, by index."""
    source = {
        "none": statistics.value_counts,
        "fisher": statistics.value_fisher,
        "fisher-range2": statistics.value_fisher_range2,
    }[weighting]
    counts = statistics.value_counts[fraction].double().numpy()
    return Histogram(bin_centers(counts.size), source[fraction].double().numpy(), counts)


def build_layer(
    statistics: LayerStatistics, spec: CodebookScheme, fractions: list[float], heads: int
) -> tuple[LayerQuantizer, float, float]:
    """Builds the key ranges and codebooks of one layer.

    Args:
        statistics: The layer's histograms.
        spec: The scheme.
        fractions: Outlier fractions of the calibration.
        heads: Number of kv heads.

    Returns:
        The layer's quantizer, and the weighted mean squared errors of coding normalized keys and
        normalized values.

    Raises:
        UserError: The scheme does not fit the statistics.
    """
    of_keys = _of_keys(statistics, spec)
    zero, scale, constant = key_ranges(of_keys, spec.outliers)
    if spec.outliers == 0 and bool(constant.any()):
        raise UserError(
            f"outliers: 0, but {int(constant.sum())} key channels of a layer were constant in "
            "calibration, so that any other value would be lost: choose outliers > 0, which keeps "
            "such values exactly, or a longer calibration text"
        )
    keys = key_histogram(of_keys, zero, scale, constant, spec.weighting)
    values = value_histogram(statistics, _fraction(spec, fractions), spec.weighting)
    levels, errors = [], []
    for name, histogram in (("keys", keys), ("values", values)):
        datatype = spec.datatype
        if not histogram.counts.any():  # all channels are constant: any levels will do
            datatype = "uniform"
        elif not histogram.weights.any():
            raise UserError(
                f"weighting: '{spec.weighting}', but all gradients of the {name} of a layer were "
                "0 in calibration: calibrate in fp32, or choose weighting: none"
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


def _of_keys(statistics: LayerStatistics, spec: CodebookScheme) -> KeyHistograms:
    """Returns the histograms of keys as the scheme quantizes them, before or after RoPE."""
    if not spec.keys_after_rope:
        return statistics
    found = statistics.roped_keys()
    if found is None:
        raise UserError(
            "keys: after-rope needs histograms of keys after RoPE, but --stats has none, as it was "
            "made for other schemes: calibrate again with this study "
            "(`snakemake --forcerun calibrate`)"
        )
    return found


def _fraction(spec: CodebookScheme, fractions: list[float]) -> int:
    if spec.outliers >= 1:
        return 0
    return fractions.index(spec.outliers)


def build_layers(
    statistics: list[LayerStatistics], spec: CodebookScheme, fractions: list[float], heads: int
) -> tuple[list[LayerQuantizer], dict[str, float]]:
    """Builds the quantizers of all layers, each from its own statistics.

    Args:
        statistics: Histograms of each layer.
        spec: The scheme.
        fractions: Outlier fractions of the calibration.
        heads: Number of kv heads.

    Returns:
        The layers, and the weighted errors of normalized keys and values, as means over layers.

    Raises:
        UserError: The scheme does not fit the statistics.
    """
    if spec.outliers < 1 and spec.outliers not in fractions:
        raise UserError(
            f"outliers: {spec.outliers} was not calibrated: choose one of "
            f"{fractions}, or add it to calibration.outlier_fractions"
        )
    built = [build_layer(layer, spec, fractions, heads) for layer in statistics]
    errors = {
        "keys": float(np.mean([b[1] for b in built])),
        "values": float(np.mean([b[2] for b in built])),
    }
    return [b[0] for b in built], errors


def coding_error(histogram: Histogram, levels: np.ndarray) -> float:
    """Returns the weighted mean squared error of coding a histogram with sorted levels."""
    codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, histogram.centers)
    total = histogram.weights.sum()
    error = histogram.weights * (histogram.centers - levels[codes]) ** 2
    return float(error.sum() / total) if total > 0 else 0.0


class StatisticsInfo(BaseModel):
    """Describes the fields of stats.json that building a quantizer needs."""

    model_config = ConfigDict(strict=True)

    weights_sha256: str | None
    model_identity: str | None
    text: CalibratedText
    calibration: CalibrationSpec
    spec_digest: str
    num_layers: int
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)


def build_quantizer(
    layers: list[LayerStatistics],
    info: StatisticsInfo,
    spec: CalibratedScheme,
    *,
    model: str,
    scheme: str,
    spec_digest: str,
) -> tuple[QuantizerManifest, Sequence[LayerTables]]:
    """Builds the quantizer of a scheme from calibration statistics.

    Args:
        layers: Statistics of every layer that sees all tokens.
        info: What the statistics were collected from.
        spec: The scheme.
        model: Name of the model.
        scheme: Name of the scheme.
        spec_digest: Digest of all that the quantizer depends on.

    Returns:
        The manifest, whose hashes saving sets, and the tables of each layer.

    Raises:
        UserError: The scheme does not fit the model or the statistics.
    """
    build: Builder = load(spec.registration.builder)
    fractions = info.calibration.outlier_fractions
    tables, errors = build(layers, spec, fractions, info.num_kv_heads)
    manifest = QuantizerManifest(
        library_version=__version__,
        model=model,
        weights_sha256=info.weights_sha256,
        model_identity=info.model_identity,
        text=info.text,
        scheme=scheme,
        spec=spec.meaning(),
        calibration=info.calibration.model_dump(mode="json"),
        spec_digest=spec_digest,
        num_layers=info.num_layers,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        calibration_error=errors,
    )
    return manifest, tables


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


def run(args: argparse.Namespace) -> None:
    """Runs `kvquant quantize`."""
    study = load_study(args.study)
    study.model(args.model)
    spec = study.scheme(args.scheme)
    if not isinstance(spec, CalibratedScheme):
        raise UserError(f"--scheme: '{args.scheme}' (kind {spec.kind}) needs no quantizer")
    layers, found = load_statistics(args.stats)
    info = _info(args.stats, found)
    wanted = calibration_digest(study, args.model, study.calibration_name(args.scheme))
    if info.spec_digest != wanted:
        raise UserError(
            f"--stats: {args.stats} is of another calibration or model: calibrate again"
        )
    try:
        manifest, built = build_quantizer(
            layers,
            info,
            spec,
            model=args.model,
            scheme=args.scheme,
            spec_digest=quantizer_digest(study, args.model, args.scheme),
        )
    except UserError as error:
        raise UserError(f"schemes.{args.scheme}.{error}") from None
    errors = manifest.calibration_error
    save_quantizer(args.out, manifest, built)
    print(
        f"quantize: {args.scheme}: {len(built)} layers, {spec.bits:g} bits; weighted error of "
        f"keys {errors['keys']:.2e}, values {errors['values']:.2e}"
    )
