import errno
import os

import numpy as np
import pytest
from dlsr.cache import array_sha256, cache_folder, kept_hash, key, locked, replace_file
from dlsr.errors import UserError

from conftest import one_sentence


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DLSR_CACHE")
    assert cache_folder().name == "dlsr"
    assert not cache_folder().is_relative_to(tmp_path)


def test_keys_and_hashes_tell_names_values_shapes_and_types_apart():
    assert key(a=1, b=(2, 3)) == key(b=[2, 3], a=np.int64(1))
    assert len({key(a=1), key(a=2), key(b=1), key(a="1"), key(a=1.5), key(a=None), key()}) == 7
    x = np.arange(6.0)
    others = (x, x + 1, x.reshape(2, 3), x.astype(np.float32), x[::-1])
    assert len({array_sha256(one) for one in others}) == 5


def test_files_are_hashed_once_and_a_change_is_noticed(tmp_path):
    file, reads = tmp_path / "images.bin", []
    read = lambda: reads.append(file.read_text()) or reads[-1]  # noqa: E731
    # First another time and the same size, then another size and the same time.
    for content, seconds in ((b"one", 1), (b"two", 2), (b"three", 2)):
        file.write_bytes(content)
        os.utime(file, (seconds, seconds))
        for _ in range(2):
            assert kept_hash([file], read) == content.decode()
    assert reads == ["one", "two", "three"]


def test_replace_file_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "new" / "file.txt"
    replace_file(file, lambda path: path.write_text("old"))

    def fail(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"file\.txt could not be written .*No space") as error:
        replace_file(file, fail)
    assert "DLSR_CACHE" in one_sentence(error)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / "features"
    for call in (locked, lambda place: replace_file(place, lambda path: path.touch())):
        with pytest.raises(UserError, match="DLSR_CACHE") as error:
            call(place)
        one_sentence(error)


def test_a_users_mistake_is_one_sentence_that_jupyter_shows_alone():
    error = UserError("First line\n  and\tmore.")
    assert str(error) == "First line and more."
    assert error._render_traceback_() == ["dlsr: First line and more."]
    assert isinstance(error, ValueError)
