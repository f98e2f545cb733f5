"""The storage verbs, on a local disk and on an object store."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import DiskFull, RefusedForSafety, StorageError, UnsafeStore
from pipeline.storage import local as write_behind
from pipeline.storage.local import STRIDE, LocalStore, starter
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import Store, open_store
from pipeline.testing.stores import Crash, Faults, FaultyStore, disk_full, faulty_os, io_error


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return open_store(root)


def test_first_put_wins(store: Store) -> None:
    assert store.put_if_absent("a/b.json", b"one")
    assert not store.put_if_absent("a/b.json", b"two")
    assert store.read("a/b.json") == b"one"
    assert store.list("a") == ["b.json"]


def test_racing_puts_have_one_winner(tmp_path: Path) -> None:
    store, barrier, won = LocalStore(tmp_path), threading.Barrier(8), []

    def put(number: int) -> None:
        barrier.wait()
        if store.put_if_absent("name", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("name") == str(won[0]).encode()
    assert os.listdir(tmp_path) == ["name"]


def test_link_whose_reply_is_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lossy(one: object, other: object) -> None:
        link(one, other)  # type: ignore[arg-type]
        raise OSError(errno.EIO, "reply lost")

    monkeypatch.setattr(os, "link", lossy)
    assert LocalStore(tmp_path).put_if_absent("name", b"mine")
    assert os.listdir(tmp_path) == ["name"]


def test_retransmitted_link_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(one: object, other: object) -> None:
        link(one, other)  # type: ignore[arg-type]
        link(one, other)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", twice)
    assert LocalStore(tmp_path).put_if_absent("name", b"mine")


def test_store_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(UnsafeStore, match="hard links"):
        LocalStore(tmp_path).put_if_absent("name", b"x")
    assert os.listdir(tmp_path) == []


def test_left_over_after_a_landed_put_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_unlink(*_: object, **__: object) -> None:
        raise io_error()

    monkeypatch.setattr(os, "unlink", no_unlink)
    store = LocalStore(tmp_path)
    assert store.put_if_absent("name", b"x")
    assert store.list() == ["name"]


def test_replace_sets_new_bytes(store: Store) -> None:
    store.replace("x", b"1")
    store.replace("x", b"22")
    assert store.read("x") == b"22"
    assert store.size("x") == 2


def test_append_continues_after_a_torn_line(store: Store) -> None:
    store.append("log", "one")
    store.replace("log", store.read("log") + b'{"torn')
    store.append("log", "two")
    assert store.read("log") == b'one\n{"torn\ntwo\n'


def test_missing_things(store: Store) -> None:
    assert store.list("nowhere") == []
    assert store.list_folders("nowhere") == []
    assert not store.exists("x")
    store.remove("x")
    store.remove_folder("y")
    for verb in (store.read, store.size, store.open_input):
        with pytest.raises(FileNotFoundError):
            verb("x")


def test_output_is_removed_when_the_block_raises(store: Store) -> None:
    def write() -> None:
        with store.open_output("d/out") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert store.list("d") == []


def test_output_and_input(store: Store) -> None:
    with store.open_output("d/out") as file:
        file.write(b"whole")
    with store.open_input("d/out") as file:
        assert file.read() == b"whole"
    assert store.list_folders() == ["d"]
    assert store.list() == []


def test_output_never_overwrites_a_local_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.replace("x", b"1")
    with pytest.raises(FileExistsError), store.open_output("x"):
        pass
    assert store.read("x") == b"1"


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", ".", "a\\b", "a\0b", "a/./b"])
@pytest.mark.parametrize("verb", ["read", "size", "exists", "remove", "remove_folder", "list", "url"])
@pytest.mark.fault(46)
def test_names_stay_inside(store: Store, name: str, verb: str) -> None:
    with pytest.raises(RefusedForSafety):
        getattr(store, verb)(name)


def test_writes_with_bad_names_stay_inside(store: Store) -> None:
    for write in (
        lambda: store.put_if_absent("../x", b""),
        lambda: store.replace("../x", b""),
        lambda: store.append("../x", ""),
        lambda: store.link_or_copy("../x", store, "x"),
        lambda: store.open_output("../x").__enter__(),
    ):
        with pytest.raises(RefusedForSafety):
            write()


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
@pytest.mark.fault(52)
def test_private_modes_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = open_store(tmp_path / "a" / "job", private=True)
        store.put_if_absent("x/one", b"")
        store.replace("x/two", b"")
        store.append("x/three", "line")
        with store.open_output("x/y/four"):
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / "a").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_shared_store_follows_the_umask(tmp_path: Path) -> None:
    private = LocalStore(tmp_path / "job", private=True)
    private.replace("x", b"1")
    before = os.umask(0o027)
    try:
        shared = LocalStore(tmp_path / "out")
        shared.link_or_copy("x", private, "x")
        shared.replace("y", b"")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in "xy"] == [0o640, 0o640]


def test_take_links_on_one_device_and_copies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    source.replace("x", b"data")
    target.link_or_copy("linked", source, "x")
    assert os.path.samefile(tmp_path / "a/x", tmp_path / "b/linked")
    target.link_or_copy("linked", source, "x")

    def other_device(*_: object) -> None:
        raise OSError(errno.EXDEV, "other device")

    monkeypatch.setattr(os, "link", other_device)
    target.link_or_copy("copied", source, "x")
    assert target.read("copied") == b"data"
    assert not os.path.samefile(tmp_path / "a/x", tmp_path / "b/copied")
    assert sorted(os.listdir(tmp_path / "b")) == ["copied", "linked"]


def test_take_between_kinds_of_stores(tmp_path: Path) -> None:
    local, remote = LocalStore(tmp_path / "a"), ObjectStore(f"memory://{uuid.uuid4().hex}")
    local.replace("x", b"data")
    remote.link_or_copy("d/y", local, "x")
    remote.link_or_copy("d/z", remote, "d/y")
    local.link_or_copy("back", remote, "d/z")
    assert local.read("back") == b"data"


def test_full_disk_names_the_place(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with faulty_os(Faults(1, fault=disk_full)), pytest.raises(DiskFull) as caught:
        store.replace("x", b"data")
    assert str(tmp_path / "x") in str(caught.value)
    assert caught.value.exit_code == 74


def _verbs(store: Store) -> dict[str, Callable[[], object]]:
    return {
        "put_if_absent": lambda: store.put_if_absent("d/new", b"new"),
        "replace": lambda: store.replace("d/old", b"new"),
        "link_or_copy": lambda: store.link_or_copy("d/old", store, "d/other"),
        "append": lambda: store.append("log", "line"),
    }


@pytest.mark.parametrize("verb", ["put_if_absent", "replace", "link_or_copy", "append"])
@pytest.mark.parametrize("fault", [Crash, io_error], ids=["crash", "error"])
@pytest.mark.fault(30)
def test_every_system_call_may_fail(tmp_path: Path, verb: str, fault: Callable[[], BaseException]) -> None:
    """Whichever call of a verb fails, a file is old or new, and doing it again works."""
    step = 0
    while True:
        store = LocalStore(tmp_path / str(step))
        store.replace("d/old", b"old")
        store.replace("d/other", b"new")
        faults = Faults(step, fault=fault)
        with faulty_os(faults), suppress(Crash, StorageError):
            _verbs(store)[verb]()
        assert store.read("d/old") in (b"old", b"new")
        assert not store.exists("d/new") or store.read("d/new") == b"new"
        _verbs(store)[verb]()
        if verb == "append":
            assert store.read("log").endswith(b"line\n")
        else:
            assert store.read("d/new" if verb == "put_if_absent" else "d/old") == b"new"
        if not faults.has_failed:
            break
        step += 1
    assert step >= 3


def test_object_store_settles_a_lost_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{uuid.uuid4().hex}")
    pipe = store.fs.pipe_file

    def lossy(path: str, value: bytes, mode: str = "overwrite") -> None:
        pipe(path, value, mode=mode)
        raise TimeoutError("reply lost")

    monkeypatch.setattr(store.fs, "pipe_file", lossy)
    assert store.put_if_absent("x", b"mine")
    monkeypatch.undo()
    assert not store.put_if_absent("x", b"other")


def test_object_store_knows_its_own_object_after_a_retry_inside_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{uuid.uuid4().hex}")
    pipe = store.fs.pipe_file

    def retried(path: str, value: bytes, mode: str = "overwrite") -> None:
        pipe(path, value, mode=mode)
        pipe(path, value, mode=mode)

    monkeypatch.setattr(store.fs, "pipe_file", retried)
    assert store.put_if_absent("x", b"mine")


def test_object_store_reports_a_create_that_did_not_land(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{uuid.uuid4().hex}")

    def refused(*_: object, **__: object) -> None:
        raise OSError(22, "no")

    monkeypatch.setattr(store.fs, "pipe_file", refused)
    with pytest.raises(StorageError):
        store.put_if_absent("x", b"mine")


def test_faulty_store_fails_once_or_dies(tmp_path: Path) -> None:
    once = FaultyStore(LocalStore(tmp_path), Faults(1, fault=io_error))
    once.replace("x", b"1")
    with pytest.raises(OSError, match="error"):
        once.read("x")
    assert once.read("x") == b"1"
    dead = FaultyStore(LocalStore(tmp_path), Faults(0))
    for _ in range(2):
        with pytest.raises(Crash):
            dead.replace("x", b"2")
    assert once.read("x") == b"1"


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(
        write_behind, "starter", lambda: lambda descriptor, offset, count: found.append((offset, count))
    )
    return found


def write(store: LocalStore, *sizes: int) -> bytes:
    pieces = [os.urandom(size) for size in sizes]
    with store.open_output("file") as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
    return b"".join(pieces)


def test_each_complete_stride_is_started_once_in_order(tmp_path: Path, hints: list[tuple[int, int]]) -> None:
    sizes = (100, STRIDE // 2, STRIDE, 3 * STRIDE, 5, STRIDE - 1)
    wanted = write(LocalStore(tmp_path), *sizes)
    assert (tmp_path / "file").read_bytes() == wanted
    assert len(hints) >= 3
    assert hints[0][0] == 0
    assert all(before[0] + before[1] == after[0] for before, after in itertools.pairwise(hints))
    assert all(count >= STRIDE for _, count in hints)
    assert sum(count for _, count in hints) > len(wanted) - 2 * STRIDE


def test_no_write_behind_without_fsync(tmp_path: Path, hints: list[tuple[int, int]]) -> None:
    write(LocalStore(tmp_path, fsync=False), 3 * STRIDE)
    assert hints == []


def test_small_files_are_left_to_fsync(tmp_path: Path, hints: list[tuple[int, int]]) -> None:
    assert write(LocalStore(tmp_path), 1000, 10) == (tmp_path / "file").read_bytes()
    assert hints == []


def test_files_are_written_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "starter", lambda: None)
    assert write(LocalStore(tmp_path), 2 * STRIDE) == (tmp_path / "file").read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sync_file_range is a call of Linux")
def test_the_kernel_takes_the_hint(tmp_path: Path) -> None:
    start = starter()
    assert start is not None
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * (1 << 20))
        file.flush()
        assert start(file.fileno(), 0, 1 << 20) == 0
        assert start(-1, 0, 1 << 20) == -1, "a hint that fails says so, and no more"
