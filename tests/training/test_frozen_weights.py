import os
from pathlib import Path

import pytest
import torch

from rwkvinside.errors import UserError
from rwkvinside.training.frozen_weights import NAME, read_frozen_weights, write_frozen_weights

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.codes": torch.arange(4, dtype=torch.uint8)}


def test_what_was_written_is_read(tmp_path):
    folder = tmp_path / "stage"
    digest = write_frozen_weights(folder, TENSORS)
    assert len(digest) == 64 and read_frozen_weights(folder, None) is None  # a stage that wrote none reads none
    found = read_frozen_weights(folder, digest)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_one_flipped_bit_is_refused(tmp_path):
    digest = write_frozen_weights(tmp_path, TENSORS)
    content = bytearray((tmp_path / NAME).read_bytes())
    content[-1] ^= 1
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match="frozen.safetensors is damaged: its SHA-256 is not the one written"):
        read_frozen_weights(tmp_path, digest)
    (tmp_path / NAME).unlink()
    with pytest.raises(UserError, match="frozen.safetensors cannot be read"):
        read_frozen_weights(tmp_path, digest)


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
