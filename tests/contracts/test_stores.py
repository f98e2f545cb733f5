"""One suite for every store: the guarantees of the verbs on which commits are built."""

from __future__ import annotations

import errno
import threading
import uuid
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import RefusedForSafety, SpecError, StorageError, UnsafeStore
from pipeline.models.flavors import read_model
from pipeline.spec.job_spec import JobSpec
from pipeline.storage.local import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import is_unfinished
from pipeline.testing.s3 import S3

RACERS = 12
PART_BYTES = 50 << 20
"""s3fs begins a multipart upload with more bytes than this."""


@pytest.fixture(params=["local", "memory", "s3", "seaweedfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return open_store(tmp_path / "root")
    if request.param == "memory":
        return open_store(f"memory://{uuid.uuid4().hex}")
    server: S3 = request.getfixturevalue(request.param)
    return open_store(server.url(uuid.uuid4().hex))


@pytest.fixture(params=["local", "s3", "seaweedfs"])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The kinds people keep jobs on. fsspec's memory file system looks, then writes, and shows files while they are
    written: it is for tests with one thread."""
    if request.param == "local":
        return open_store(tmp_path / "root")
    server: S3 = request.getfixturevalue(request.param)
    return open_store(server.url(uuid.uuid4().hex))


def test_of_many_that_create_one_name_one_wins(durable: Store) -> None:
    barrier, won = threading.Barrier(RACERS), []

    def put(number: int) -> None:
        barrier.wait()
        if durable.put_if_absent("d/name", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert durable.read("d/name") == str(won[0]).encode()
    assert durable.list("d") == ["name"]


def test_a_name_that_is_taken_keeps_its_bytes(store: Store) -> None:
    assert store.put_if_absent("d/name", b"one")
    assert not store.put_if_absent("d/name", b"two")
    assert store.read("d/name") == b"one"
    store.remove("d/name")
    assert store.put_if_absent("d/name", b"two")


def test_the_exclusive_create_is_proved_and_nothing_is_left(store: Store) -> None:
    store.check_conditional_writes()
    store.check_conditional_writes()
    assert store.list() == []
    assert store.list_folders() == []


def test_an_unchanged_name_is_replaced_and_a_changed_one_keeps_its_bytes(store: Store) -> None:
    store.check_conditional_replace()
    store.check_conditional_replace()
    assert store.list() == []
    assert store.version("d/name") == ""
    assert store.replace_if_unchanged("d/name", b"one", version="")
    assert not store.replace_if_unchanged("d/name", b"two", version="")
    first = store.version("d/name")
    assert store.replace_if_unchanged("d/name", b"three", version=first)
    assert store.version("d/name") != first
    assert not store.replace_if_unchanged("d/name", b"four", version=first)
    assert store.read("d/name") == b"three"
    third = store.version("d/name")
    store.remove("d/name")
    assert not store.replace_if_unchanged("d/name", b"five", version=third)
    assert not store.exists("d/name")


@pytest.mark.fault(66)
def test_of_many_that_replace_one_version_one_wins(any_s3: S3) -> None:
    store = open_store(any_s3.url(uuid.uuid4().hex))
    store.replace("d/name", b"before")
    version, barrier, won = store.version("d/name"), threading.Barrier(RACERS), []

    def put(number: int) -> None:
        barrier.wait()
        if store.replace_if_unchanged("d/name", str(number).encode(), version=version):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("d/name") == str(won[0]).encode()


def test_a_large_object_is_created_and_replaced_on_condition_in_one_request(any_s3: S3) -> None:
    """A condition on a multipart upload would be proven by no check, and s3fs has none for a replacement."""
    store = ObjectStore(any_s3.url(uuid.uuid4().hex))
    large = bytes(2 * PART_BYTES + 1)
    assert store.put_if_absent("large", large)
    assert not store.put_if_absent("large", large[1:])
    version = store.version("large")
    assert "-" not in version, "the ETag of a multipart upload"
    assert store.replace_if_unchanged("large", large[1:], version=version)
    assert not store.replace_if_unchanged("large", large, version=version)
    assert store.size("large") == 2 * PART_BYTES
    assert any_s3.pending_uploads() == []


def test_times_of_one_store_can_be_compared(store: Store) -> None:
    store.replace("one", b"1")
    store.replace("two", b"2")
    assert abs(store.modified("two") - store.modified("one")) < 60
    with pytest.raises(FileNotFoundError):
        store.modified("three")


def test_replace_makes_and_changes(store: Store) -> None:
    for data in (b"", b"a", b"bb" * 1000):
        store.replace("d/e/name", data)
        assert store.read("d/e/name") == data
        assert store.size("d/e/name") == len(data)
        assert store.exists("d/e/name")
    assert store.list("d/e") == ["name"]


def test_append_adds_whole_lines(store: Store) -> None:
    for line in ("one", "two\n", "three"):
        store.append("log", line)
    assert store.read("log") == b"one\ntwo\nthree\n"


def test_listings_are_sorted_flat_and_fresh(store: Store) -> None:
    assert store.list() == []
    for name in ("b/2", "a", "b/1", "b/c/3", "c", "bb/1", ".unfinished.tmp"):
        store.put_if_absent(name, b"x")
    assert store.list() == ["a", "c"]
    assert store.list_folders() == ["b", "bb"]
    assert store.list("b") == ["1", "2"]
    assert store.list_folders("b") == ["c"]
    store.remove("b/1")
    store.put_if_absent("b/0", b"")
    assert store.list("b") == ["0", "2"]
    assert store.size("b/0") == 0


def test_more_names_than_a_page_of_a_listing_holds(durable: Store) -> None:
    names = [f"{number:04d}" for number in range(1003)]
    if isinstance(durable, ObjectStore):
        durable.fs.pipe({durable._key(f"many/{name}"): b"x" for name in names})
    else:
        for name in names:
            Path(durable.root, "many").mkdir(parents=True, exist_ok=True)
            Path(durable.root, "many", name).write_bytes(b"x")
    assert durable.list("many") == names


def test_missing_names_are_missing(store: Store) -> None:
    assert store.list("nowhere") == []
    assert store.list_folders("nowhere") == []
    assert not store.exists("nowhere")
    store.remove("nowhere")
    store.remove_folder("nowhere")
    for verb in (store.read, store.size, store.open_input):
        with pytest.raises(FileNotFoundError):
            verb("nowhere")


def test_a_folder_is_no_file(store: Store) -> None:
    store.replace("d/name", b"x")
    assert not store.exists("d")


def test_removing_takes_what_is_meant(store: Store) -> None:
    for name in ("d/1", "d/e/2", "dd/3", "other"):
        store.replace(name, b"x")
    store.remove("other")
    store.remove_folder("d")
    assert store.list() == []
    # SeaweedFS keeps a folder whose last file was removed; nothing is in it.
    assert [name for name in store.list_folders() if store.list(name)] == ["dd"]
    assert store.list("dd") == ["3"]


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_an_output_is_there_once_it_is_closed(store: Store, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with store.open_output("d/out") as file:
        for start in range(0, size, 100_000):
            file.write(data[start : start + 100_000])
    assert store.read("d/out") == data
    assert store.size("d/out") == size
    with store.open_input("d/out") as opened:
        opened.seek(size // 2)
        assert opened.read() == data[size // 2 :]


def test_an_output_is_not_seen_before_it_is_whole(durable: Store) -> None:
    """On a file system it has its name from the start, which is why names in receipts count and listings do not."""
    with durable.open_output("d/out") as file:
        file.write(b"half")
        assert isinstance(durable, LocalStore) or durable.list("d") == []
    assert durable.list("d") == ["out"]


@pytest.mark.parametrize("size", [0, 4, PART_BYTES + (1 << 20)])
@pytest.mark.fault(35)
def test_an_output_whose_writer_raises_is_never_there(store: Store, size: int, request: pytest.FixtureRequest) -> None:
    def write() -> None:
        with store.open_output("d/out") as file:
            for _ in range(size // (1 << 20)):
                file.write(bytes(1 << 20))
            file.write(bytes(size % (1 << 20)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert store.list("d") == []
    assert not store.exists("d/out")
    if isinstance(store, ObjectStore) and store.root.startswith("s3://"):
        server: S3 = request.getfixturevalue(request.node.callspec.params["store"])
        assert server.pending_uploads() == []


def test_a_large_output_is_one_object(any_s3: S3) -> None:
    s3, store = any_s3, open_store(any_s3.url(uuid.uuid4().hex))
    with store.open_output("out") as file:
        for _ in range(3 + PART_BYTES // (1 << 20)):
            file.write(bytes(1 << 20))
        assert s3.pending_uploads(), "the case is about a multipart upload"
        assert store.list() == []
    assert store.size("out") == PART_BYTES + (3 << 20)
    assert s3.pending_uploads() == []


def test_taking_a_file_from_any_other_store(store: Store, tmp_path: Path) -> None:
    others = (store, open_store(tmp_path / "other"), open_store(f"memory://{uuid.uuid4().hex}"))
    for number, other in enumerate(others):
        other.replace("from/x", f"data {number}".encode())
        store.link_or_copy(f"to/{number}", other, "from/x")
        assert store.read(f"to/{number}") == f"data {number}".encode()
        assert other.read("from/x") == f"data {number}".encode()
        other.link_or_copy("back", store, f"to/{number}")
        assert other.read("back") == f"data {number}".encode()


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", ".", "a\\b", "a\0b", "a/./b", "a/"])
@pytest.mark.fault(46)
def test_names_stay_inside(store: Store, name: str) -> None:
    for verb in (store.read, store.size, store.exists, store.remove, store.remove_folder, store.list, store.url):
        with pytest.raises(RefusedForSafety):
            verb(name)
    for write in (
        lambda: store.put_if_absent(name, b""),
        lambda: store.replace(name, b""),
        lambda: store.append(name, ""),
        lambda: store.link_or_copy(name, store, "x"),
        lambda: store.open_output(name).__enter__(),
    ):
        with pytest.raises(RefusedForSafety):
            write()
    assert store.list() == []


@pytest.mark.parametrize("name", ["a b", "ü", "a+b", "a%2Fb", "a=b", "a#b", "x" * 200])
def test_odd_names_are_names(store: Store, name: str) -> None:
    assert store.put_if_absent(f"d/{name}", b"x")
    assert store.list("d") == [name]
    assert store.read(f"d/{name}") == b"x"


@pytest.mark.fault(34)
def test_an_s3_that_ignores_the_condition_is_refused(s3: S3) -> None:
    store = open_store(s3.url(uuid.uuid4().hex))
    assert s3.ignored is not None
    s3.ignored.add("HTTP_IF_NONE_MATCH")
    try:
        with pytest.raises(UnsafeStore, match="ignored") as caught:
            store.check_conditional_writes()
    finally:
        s3.ignored.clear()
    assert caught.value.exit_code == 6
    assert caught.value.where == store.root
    assert s3.names(store.root.rpartition("/")[2]) == []
    store.check_conditional_writes()


@pytest.mark.fault(69)
def test_a_store_that_ignores_the_condition_of_a_replacement_is_refused(s3: S3) -> None:
    store = ObjectStore(s3.url(uuid.uuid4().hex))
    assert s3.ignored is not None
    s3.ignored.add("HTTP_IF_MATCH")
    try:
        with pytest.raises(UnsafeStore, match="replace a key only if it is unchanged") as caught:
            store.check_conditional_replace()
    finally:
        s3.ignored.clear()
    assert caught.value.exit_code == 6
    assert s3.names(store.root.rpartition("/")[2]) == []
    store.check_conditional_replace()


def test_seaweedfs_invalid_argument_means_that_the_name_exists(seaweedfs: S3) -> None:
    """The answer of SeaweedFS becomes errno 22 in s3fs; other stores raise `FileExistsError`."""
    store = ObjectStore(seaweedfs.url(uuid.uuid4().hex))
    assert store.put_if_absent("name", b"one")
    with pytest.raises(OSError, match="pre-conditions") as caught:
        store.fs.pipe_file(store._key("name"), b"two", mode="create")
    assert caught.value.errno == errno.EINVAL
    assert not store.put_if_absent("name", b"two")
    assert store.put_if_absent("name", b"one"), "what is there is our own: a create that was asked for twice"
    assert store.read("name") == b"one"


@pytest.mark.parametrize("error", [NotImplementedError("no"), TypeError("mode"), OSError(38, "not implemented")])
def test_a_file_system_that_has_no_condition_is_refused(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{uuid.uuid4().hex}")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(store.fs, "pipe_file", refuse)
    with pytest.raises(UnsafeStore):
        store.check_conditional_writes()


def test_a_bucket_that_is_not_there_is_no_unsafe_store(s3: S3) -> None:
    with pytest.raises(StorageError, match="bucket"):
        open_store("s3://no-such-bucket-here/x").check_conditional_writes()


def test_unreachable_service_is_a_storage_error(s3: S3, tmp_path: Path) -> None:
    """The client library has errors of its own for that; none of them may look like a defect."""
    options = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    store = ObjectStore("s3://bucket/x", endpoint_url="http://127.0.0.1:9", config_kwargs=options)
    store.fs.retries = 1
    for verb in (
        lambda: store.read("a"),
        store.list,
        lambda: store.replace("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.remove("a"),
        lambda: store.open_input("a"),
    ):
        with pytest.raises(StorageError, match="storage failed"):
            verb()


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "sftp://me:secret@host/x"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RefusedForSafety, match="password") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_unknown_file_system_is_an_error_in_a_path() -> None:
    with pytest.raises(SpecError, match="cannot be used"):
        open_store("nonsense://bucket/x")


def test_a_job_spec_and_a_model_on_a_store_that_is_away(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9"})
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for read in (JobSpec.load, read_model):
        with pytest.raises(StorageError, match="storage failed"):
            read("s3://bucket/thing")


def test_refused_access_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{uuid.uuid4().hex}")

    def refuse(*_: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store.fs, "cat_file", refuse)
    with pytest.raises(StorageError, match="refused access") as caught:
        store.read("x")
    assert "storage.md" in caught.value.next_step


def test_unfinished_names_are_recognised_by_their_form() -> None:
    assert is_unfinished(".x.tmp")
    assert not is_unfinished("x.tmp")
    assert not is_unfinished(".x")
