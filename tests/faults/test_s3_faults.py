"""Storage verbs on an S3 server that loses replies, resets connections and says SlowDown."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from pipeline.errors import StorageError
from pipeline.storage.object_store import ObjectStore
from pipeline.testing.s3 import S3
from pipeline.testing.s3_proxy import Proxy, proxy_s3

FOR_EVER = 10_000
MIB = 1 << 20


@pytest.fixture
def proxy(any_s3: S3) -> Iterator[Proxy]:
    with proxy_s3(any_s3.endpoint) as running:
        yield running


@pytest.fixture
def store(any_s3: S3, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A store behind the proxy, whose client tries again as often as ever, but soon."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    retries = {"max_attempts": 4, "mode": "standard"}
    store = ObjectStore(any_s3.url(uuid.uuid4().hex), endpoint_url=proxy.endpoint, config_kwargs={"retries": retries})
    store.fs.retries = 2
    return store


@pytest.fixture
def direct(any_s3: S3, store: ObjectStore) -> ObjectStore:
    """The same place without the proxy."""
    return ObjectStore(store.root)


def requests(proxy: Proxy, method: str, path: str) -> int:
    return sum(line.startswith(f"{method} ") and path in line for line in proxy.seen)


@pytest.mark.fault(33)
def test_a_create_whose_reply_is_lost_is_ours(store: ObjectStore, direct: ObjectStore, proxy: Proxy) -> None:
    """The client asks again by itself, and is told that the key exists: its own."""
    lost = proxy.add("lose reply", "PUT", "/receipt")
    assert store.put_if_absent("receipt", b"mine")
    assert lost.done == 1
    assert requests(proxy, "PUT", "/receipt") >= 2
    assert direct.read("receipt") == b"mine"
    assert not direct.put_if_absent("receipt", b"other")


@pytest.mark.fault(33)
def test_a_create_whose_every_reply_is_lost_is_read_back(store: ObjectStore, direct: ObjectStore, proxy: Proxy) -> None:
    proxy.add("lose reply", "PUT", "/receipt", times=FOR_EVER)
    assert store.put_if_absent("receipt", b"mine")
    assert direct.read("receipt") == b"mine"


@pytest.mark.fault(33)
def test_a_create_that_came_second_stays_second_when_its_reply_is_lost(
    store: ObjectStore, direct: ObjectStore, proxy: Proxy
) -> None:
    direct.put_if_absent("receipt", b"other")
    proxy.add("lose reply", "PUT", "/receipt")
    assert not store.put_if_absent("receipt", b"mine")
    assert direct.read("receipt") == b"other"


def test_create_that_never_arrives_is_an_error(store: ObjectStore, direct: ObjectStore, proxy: Proxy) -> None:
    proxy.add("reset", "PUT", "/receipt", times=FOR_EVER)
    with pytest.raises(StorageError) as caught:
        store.put_if_absent("receipt", b"mine")
    assert caught.value.exit_code == 74
    assert not direct.exists("receipt")


@pytest.mark.fault(33)
def test_a_create_of_which_nothing_can_be_learnt_is_an_error(
    store: ObjectStore, direct: ObjectStore, proxy: Proxy
) -> None:
    """Landed, but no reply and no way to look: unknown, and so nothing may be deleted."""
    proxy.add("lose reply", "PUT", "/receipt", times=FOR_EVER)
    proxy.add("reset", "GET", "/receipt", times=FOR_EVER)
    with pytest.raises(StorageError):
        store.put_if_absent("receipt", b"mine")
    assert direct.read("receipt") == b"mine"


@pytest.mark.parametrize("action", ["slow down", "fail", "reset", "lose reply"])
@pytest.mark.fault(32)
def test_every_verb_gets_over_a_bad_moment(store: ObjectStore, direct: ObjectStore, proxy: Proxy, action: str) -> None:
    for number, method in enumerate(("PUT", "GET", "HEAD", "PUT", "DELETE")):
        proxy.add(action, method, ".", times=1 + number % 2)  # type: ignore[arg-type]
    assert store.put_if_absent("d/a", b"1")
    store.replace("d/b", b"2")
    store.append("d/log", "line")
    with store.open_output("d/out") as file:
        file.write(b"3")
    store.link_or_copy("d/copy", store, "d/out")
    assert store.list("d") == ["a", "b", "copy", "log", "out"]
    assert [store.read(f"d/{name}") for name in ("a", "b", "copy", "log")] == [b"1", b"2", b"3", b"line\n"]
    assert store.size("d/out") == 1
    store.remove("d/b")
    store.remove_folder("d")
    assert direct.list("d") == []
    assert all(rule.done == rule.times for rule in proxy.rules)


@pytest.mark.parametrize("action", ["slow down", "fail"])
@pytest.mark.fault(32)
def test_a_store_that_stays_overloaded_is_a_storage_error(
    store: ObjectStore, direct: ObjectStore, proxy: Proxy, action: str
) -> None:
    direct.replace("x", b"1")
    proxy.add(action, "GET", "/x", times=FOR_EVER)  # type: ignore[arg-type]
    with pytest.raises(StorageError) as caught:
        store.read("x")
    assert caught.value.exit_code == 74
    assert requests(proxy, "GET", "/x") >= 3


@pytest.mark.parametrize("size", [3, 51 * MIB], ids=["one request", "multipart"])
def test_an_upload_whose_end_was_not_answered_counts_once_it_is_there(
    store: ObjectStore, direct: ObjectStore, proxy: Proxy, any_s3: S3, size: int
) -> None:
    lost = proxy.add("lose reply", "PUT" if size == 3 else "POST", "/out" if size == 3 else "/out.*uploadId=")
    with store.open_output("out") as file:
        file.write(bytes(size))
    assert lost.done == 1
    assert direct.size("out") == size
    assert any_s3.pending_uploads() == []


@pytest.mark.parametrize("size", [3, 51 * MIB], ids=["one request", "multipart"])
@pytest.mark.fault(35)
def test_an_upload_that_cannot_be_ended_leaves_nothing(
    store: ObjectStore, direct: ObjectStore, proxy: Proxy, any_s3: S3, size: int
) -> None:
    """Also no multipart upload that would be paid for until somebody finds it."""
    proxy.add("fail", "PUT" if size == 3 else "POST", "/out" if size == 3 else "/out.*uploadId=", times=FOR_EVER)

    def write() -> None:
        with store.open_output("out") as file:
            file.write(bytes(size))

    with pytest.raises(StorageError):
        write()
    assert not direct.exists("out")
    assert any_s3.pending_uploads() == []


@pytest.mark.fault(35)
def test_a_part_that_cannot_be_sent_leaves_nothing(store: ObjectStore, proxy: Proxy, any_s3: S3) -> None:
    proxy.add("reset", "PUT", "partNumber=", times=FOR_EVER)

    def write() -> None:
        with store.open_output("out") as file:
            for _ in range(52):
                file.write(bytes(MIB))

    with pytest.raises(StorageError):
        write()
    assert any_s3.pending_uploads() == []
    assert any_s3.names(store.root.rpartition("/")[2]) == []
