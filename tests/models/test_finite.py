"""Numbers that are NaN or infinite stop an evaluation or a calibration by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvquant.calibration.collect import calibrate
from kvquant.errors import NonFinite, UserError
from kvquant.evaluation.perplexity import measure_windows
from kvquant.models.generation import greedy
from kvquant.models.loading import QuantizedModel
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import Fp16Scheme, KiviScheme
from tests.support.caches import quantized
from tests.support.models import tiny_model

KIVI = KiviScheme(kind="kivi", bits=4, group=16, residual=32)
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def overflowing(dtype: torch.dtype, spec: Any) -> QuantizedModel:
    """A model whose last layer overflows in fp16, and in no wider type."""
    model = tiny_model(intermediate_size=64, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(3e7)
        model.model.layers[-1].mlp.up_proj.weight.mul_(1e3)
    qm = quantized(model.to(dtype), spec)
    qm.tokenizer = SimpleNamespace(eos_token_id=96)
    return qm


@pytest.mark.fault(
    "evaluation",
    "NaN or infinite logits while answering",
    "stops; names scheme, step and bf16",
)
@pytest.mark.parametrize("spec", [Fp16Scheme(kind="fp16"), KIVI], ids=["fp16", "kivi"])
def test_answers_from_nan_logits_are_refused(spec: Any) -> None:
    with pytest.raises(NonFinite, match=rf"scheme {spec.kind}.*step 0.*float16.*bfloat16"):
        greedy(overflowing(torch.float16, spec), PROMPTS, 4, batch_size=2)
    found = greedy(overflowing(torch.bfloat16, spec), PROMPTS, 4, batch_size=2, eos_ids=[])
    assert [len(tokens) for tokens in found.tokens] == [4, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 3])
def test_the_step_is_named(bad: float, step: int) -> None:
    qm = overflowing(torch.float32, Fp16Scheme(kind="fp16"))
    calls = iter(range(100))

    def spoil(module: Any, args: Any, output: Any) -> Any:
        if next(calls) == step:
            output.logits[0, -1, 7] = bad
        return output

    qm.model.register_forward_hook(spoil)
    with pytest.raises(NonFinite, match=f"logits of step {step} of an answer"):
        greedy(qm, PROMPTS, 5, batch_size=2, eos_ids=[])


def test_what_follows_the_end_of_an_answer_does_not_count() -> None:
    qm = overflowing(torch.float32, Fp16Scheme(kind="fp16"))
    plain = greedy(qm, PROMPTS, 5, batch_size=2, eos_ids=[])
    end = plain.tokens[0][1]
    calls = iter(range(100))

    def spoil(module: Any, args: Any, output: Any) -> Any:
        if next(calls) >= 2 and output.logits.shape[0] == 2:
            output.logits[0] = float("nan")
        return output

    qm.model.register_forward_hook(spoil)
    found = greedy(qm, PROMPTS, 5, batch_size=2, eos_ids=[end])
    assert found.tokens[0] == plain.tokens[0][:1]


@pytest.mark.fault(
    "evaluation",
    "NaN losses in perplexity",
    "stops; names token and window",
)
@pytest.mark.parametrize("spec", [Fp16Scheme(kind="fp16"), KIVI], ids=["fp16", "kivi"])
@pytest.mark.parametrize("kl", [False, True])
def test_perplexity_of_nan_logits_is_refused(spec: Any, kl: bool) -> None:
    ids = torch.arange(1, 41)[None]
    with pytest.raises(NonFinite, match=r"losses from token 1 of window 0 on.*bfloat16"):
        measure_windows(overflowing(torch.float16, spec), ids, "A", 16, kl=kl)
    assert measure_windows(overflowing(torch.bfloat16, spec), ids, "A", 16).nll.isfinite().all()


SPEC = CalibrationSpec(windows=2, window=64, bins=64, outlier_fractions=[0.0])


class Spoiled:
    """A model of which the loss of one window is wrong."""

    def __init__(self, model: Any, window: list[int], spoil: Any) -> None:
        self.inner, self.window, self.spoil = model, window, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        loss = self.inner(input_ids=input_ids, **kwargs).loss
        return SimpleNamespace(
            loss=self.spoil(loss) if input_ids[0].tolist() == self.window else loss
        )


class Endless(torch.autograd.Function):
    """Finite forwards, infinite backwards: an fp16 gradient that overflows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf")


@pytest.mark.fault(
    "evaluation",
    "a NaN loss or gradient in a calibration window",
    "stops; names the window",
)
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda loss: loss * float("nan"), "the loss"),
        (lambda loss: loss * float("inf"), "the loss"),
        (Endless.apply, "gradients"),
    ],
)
def test_a_calibration_window_that_overflows_stops_it(spoil: Any, named: str) -> None:
    model, windows = tiny_model(initializer_range=0.2), torch.randint(1, 97, (2, 64)).tolist()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(NonFinite, match=f"calibration: window 2/2: .*{named}.*not finite"):
        calibrate(Spoiled(model, windows[1], spoil), windows, SPEC)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert len(calibrate(model, windows, SPEC)) == 2


@pytest.mark.fault(
    "evaluation",
    "overflowing keys or values in calibration",
    "stops; names the layer",
)
@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_overflow_name_the_layer(part: str, bad: float) -> None:
    model, windows = tiny_model(initializer_range=0.2), torch.randint(1, 97, (1, 64)).tolist()
    projection = getattr(model.model.layers[1].self_attn, part)
    if bad == 1e30 and part == "k_proj":
        pytest.skip("finite keys: their histogram has the range of fp32")

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, 9, 3] = bad
        return output

    projection.register_forward_hook(spoil)
    with pytest.raises(NonFinite, match=r"calibration: window 1/1: layer 1: (keys|values)"):
        calibrate(model, windows, SPEC)


@pytest.mark.parametrize("windows", [[], [[5]]])
def test_nothing_to_calibrate_from_is_refused(windows: list[list[int]]) -> None:
    with pytest.raises(UserError, match="calibration: needs windows of at least 2 tokens"):
        calibrate(tiny_model(), windows, SPEC)
