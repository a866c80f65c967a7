"""What tells one teacher from another."""

import json

import pytest
import torch
from hybrid_cases import teacher as sparse
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_qwen3

from rwkvinside.errors import UserError
from rwkvinside.support.digests import FileDigests
from rwkvinside.teacher import files
from rwkvinside.teacher.files import check_unchanged, local_hashes, model_identity
from rwkvinside.teacher.load import check_files, load_teacher
from rwkvinside.teacher.settings import TeacherConfig


@pytest.fixture
def teacher(tmp_path):
    save_qwen3(tmp_path / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"))
    return tmp_path / "teacher"


def identity(folder):
    return model_identity(str(folder), None, FileDigests())


def test_each_part_has_its_own_hash(teacher):
    before = identity(teacher)
    assert set(before) == {"weights", "tokenizer", "configuration"}
    (teacher / "README.md").write_text("says nothing about what it computes")
    assert identity(teacher) == before
    (teacher / "model.safetensors").rename(teacher / "model-00001-of-00001.safetensors")
    assert identity(teacher) == before  # whatever its files are called
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    changed = identity(teacher)
    assert {name for name in before if before[name] != changed[name]} == {"tokenizer"}
    with pytest.raises(UserError, match="teacher T is not the one .* its tokenizer changed"):
        check_unchanged("teacher T", before, changed)
    check_unchanged("teacher T", before, before)


def test_a_model_of_the_hub_is_downloaded_before_it_is_hashed(teacher, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns[0], ignore_patterns))
        return str(teacher)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert model_identity("owner/name", "v1", FileDigests()) == identity(teacher)
    assert asked == [("owner/name", "v1", "*.safetensors", ["*/*.safetensors", "*/*.bin", "consolidated*"])]
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    del asked[:]
    model_identity("owner/name", None, FileDigests())
    assert [patterns for _, _, patterns, _ in asked] == ["*.safetensors", "*.bin"]


def test_a_model_that_is_nowhere_is_one_line():
    with pytest.raises(UserError, match="the weights of teacher no/such cannot be loaded") as caught:
        model_identity("no/such", None, FileDigests())
    assert "\n" not in caught.value.cause


def test_a_damaged_index_is_said(teacher):
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(UserError, match="cannot be read as an index of weights"):
        identity(teacher)


def test_hashes_of_what_is_here(teacher, tmp_path):
    weights, configuration = local_hashes(str(teacher), None, FileDigests())
    assert len(weights) == len(configuration) == 16
    (teacher / "generation_config.json").write_text("{}")  # does not change what it computes
    assert local_hashes(str(teacher), None, FileDigests()) == (weights, configuration)
    (teacher / "model.safetensors").unlink()
    assert local_hashes(str(teacher), None, FileDigests()) == (None, None)
    assert local_hashes("no/such", None, FileDigests()) == (None, None)


def test_published_files_of_sparse_models_have_a_tensor_for_each_expert(tmp_path):
    original = sparse("qwen3_moe")
    original.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names and len(names) < 60
    check_files(TeacherConfig(path=str(tmp_path)))
    loaded = load_teacher(str(tmp_path), None, torch.float32)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in original.named_parameters())
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if ".experts.2.down" not in n}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model.layers.0.mlp.experts.2.down_proj.weight \(of 2 that are missing"):
        check_files(TeacherConfig(path=str(tmp_path)))
    save_file(original.state_dict() | {"lm_head.weight": torch.zeros(50, 32)}, tmp_path / "model.safetensors")
    check_files(TeacherConfig(path=str(tmp_path)))  # as the model has them
