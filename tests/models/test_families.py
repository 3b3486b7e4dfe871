"""What every registered model family must do; tests of caches run over all families, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvquant.errors import UserError
from kvquant.models.hooks import attention_layers
from kvquant.models.loading import load_quantized_model
from kvquant.study.model_families import MODEL_FAMILIES, ModelFamily, family_of_attention
from kvquant.study.schemes import Fp8Scheme
from tests.support.models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_a_saved_model_loads_and_answers(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, vocab_size=512)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert model.config.model_type == name
    loaded = load_quantized_model(tmp_path, Fp8Scheme(kind="fp8", block_size=16), device="cpu")
    assert len(attention_layers(loaded.model)) == 2
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        cache = loaded.new_cache()
        first = loaded.model(input_ids=ids[:, :32], past_key_values=cache).logits
        second = loaded.model(input_ids=ids[:, 32:], past_key_values=cache).logits
    torch.testing.assert_close(first, expected[:, :32], atol=1e-4, rtol=1e-4)
    error = (second - expected[:, 32:]).norm() / expected[:, 32:].norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("family", MODEL_FAMILIES.values(), ids=lambda family: family.name)
def test_an_attention_class_belongs_to_one_family(family: ModelFamily) -> None:
    attentions = [one.attention for one in MODEL_FAMILIES.values()]
    assert len(set(attentions)) == len(attentions)
    assert family in map(family_of_attention, attentions)


def test_other_models_are_refused_with_the_list_of_families() -> None:
    with pytest.raises(UserError, match="'Olmo2Attention' is not supported") as found:
        attention_layers(tiny_model("olmo2"))
    assert all(family.label in str(found.value) for family in MODEL_FAMILIES.values())
    assert family_of_attention("Olmo2Attention") is None
