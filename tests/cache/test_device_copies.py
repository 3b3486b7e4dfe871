"""Layers on several devices, pretended on a CPU: what one device gives, and nothing is mixed.

Each operation on tensors of two devices is an error there, as it is on GPUs. Also covers:
models.placement.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.pretend_gpus import pretend_gpus
from tests.support.several_devices import (
    IMPOSSIBLE,
    SCHEMES,
    USES,
    OnItsDevice,
    on_one_and_two,
)


@pytest.fixture()
def gpus() -> Iterator[None]:
    """Two GPUs and more."""
    with pretend_gpus():
        yield


def devices(cache: Any) -> list[str]:
    """The device of what each layer of a filled cache holds."""
    return [str(layer.store.tail[0].device) for layer in cache.layers]


@pytest.mark.parametrize("protocol", ["A", "B"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_use_gives_what_one_device_gives(
    scheme: str, use: str, protocol: Any, tmp_path: Path, gpus: None
) -> None:
    if (scheme, use) in IMPOSSIBLE or (protocol == "B" and not SCHEMES[scheme].quantizes):
        pytest.skip("the cache cannot do that on any number of devices")
    model = tiny_model(num_hidden_layers=4)
    one, two = on_one_and_two(model, scheme, tmp_path)
    expected = USES[use](OnItsDevice(one), one.new_cache(protocol))
    found = USES[use](OnItsDevice(two), two.new_cache(protocol))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
