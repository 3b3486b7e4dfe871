"""A conversion opens its GGUF file once."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from kvquant.fetch.gguf_header import parsed_once


def test_all_who_open_a_file_share_a_reader_until_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = gguf.GGUFReader, gguf.get_tensor_name_map
    with parsed_once():
        reader = gguf.GGUFReader(str(file))
        assert gguf.GGUFReader(str(file)) is reader
        assert [tensor.name for tensor in reader.tensors] == ["token_embd.weight"]
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == plain
    with pytest.raises(RuntimeError, match="stop"), parsed_once():
        raise RuntimeError("stop")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == plain
