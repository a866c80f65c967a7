"""Weights that cannot be loaded."""

import pytest
import torch
from tiny import byte_tokenizer, save_qwen3

from rwkvinside.errors import UserError
from rwkvinside.teacher.load import load_teacher


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(3000)])
def test_damaged_weights_of_torch_are_a_line(tmp_path, content):
    save_qwen3(tmp_path / "teacher", byte_tokenizer())
    (tmp_path / "teacher" / "model.safetensors").unlink()
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="the weights of teacher .* (cannot be loaded|do not fit)") as caught:
        load_teacher(str(tmp_path / "teacher"), None, torch.float32)
    assert "\n" not in caught.value.cause
