import os
from pathlib import Path

import pytest
import torch

from rwkvinside.errors import UserError
from rwkvinside.training.frozen_weights import NAME, frozen_weights_digest, read_frozen_weights, write_frozen_weights

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.codes": torch.arange(4, dtype=torch.uint8)}


def test_what_was_written_is_read(tmp_path):
    assert read_frozen_weights(tmp_path) is None and frozen_weights_digest(tmp_path) is None
    write_frozen_weights(tmp_path / "stage", TENSORS)
    found = read_frozen_weights(tmp_path / "stage")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert len(frozen_weights_digest(tmp_path / "stage")) == 64
    (tmp_path / "stage" / NAME).write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="frozen.safetensors is damaged"):
        read_frozen_weights(tmp_path / "stage")


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Checkpoints remember its hash: after a power failure there must be the whole file or none."""
    done, fsync, replace, folder = [], os.fsync, os.replace, tmp_path / "stage"

    def flushing(descriptor):
        done.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renaming(source, target):
        assert not Path(target).exists()
        done.append(("rename", Path(source).stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", renaming)
    write_frozen_weights(folder, TENSORS)
    (file,) = folder.iterdir()
    content, entry = file.stat().st_ino, folder.stat().st_ino
    assert file.name == NAME and done == [("fsync", content), ("rename", content), ("fsync", entry)]


def test_what_cannot_be_flushed_is_not_kept(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="cannot write .*frozen.safetensors: .*Input/output error"):
        write_frozen_weights(tmp_path, TENSORS)
    assert not list(tmp_path.iterdir())
