"""Weights that cannot be loaded."""

import pytest
import torch
from tiny import byte_tokenizer, save_qwen3

from rwkvinside.errors import UserError
from rwkvinside.teacher.load import check_files, load_teacher
from rwkvinside.teacher.settings import TeacherConfig


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(3000)])
def test_damaged_weights_of_torch_are_a_line(tmp_path, content):
    save_qwen3(tmp_path / "teacher", byte_tokenizer())
    (tmp_path / "teacher" / "model.safetensors").unlink()
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="the weights of teacher .* (cannot be loaded|do not fit)") as caught:
        load_teacher(str(tmp_path / "teacher"), None, torch.float32)
    assert "\n" not in caught.value.cause


@pytest.mark.parametrize("content", [b"junk", b"", b"PK\x03\x04", bytes(3000)])
def test_they_are_noticed_before_anything_is_loaded(tmp_path, content):
    save_qwen3(tmp_path / "teacher", byte_tokenizer())
    (tmp_path / "teacher" / "model.safetensors").unlink()
    file = tmp_path / "teacher" / "pytorch_model.bin"
    torch.save({"weight": torch.ones(2)}, file)
    check_files(TeacherConfig(path=str(tmp_path / "teacher")))
    file.write_bytes(content)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged, or not a file of weights"):
        check_files(TeacherConfig(path=str(tmp_path / "teacher")))
