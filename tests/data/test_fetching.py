"""Remote shards, from a real HTTP server on loopback that drops connections, fails and lies; and from pipes."""

import functools
import http.server
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from avar_lightning.data import SampleError, ShardDataModule, ShardLoader, find_shards, write_shards
from avar_lightning.data.fetching import FetchError, ShardCache
from avar_lightning.data.shards import MANIFEST, Shard
from avar_lightning.data.tars import LocalShard
from tests.data.conftest import make_sample


class FileServer:
    """Serves a folder with byte ranges.

    Attributes:
        faults: What happens to the next requests for tars: a status, "drop" after a part of the file, "other" (bytes
            that are not the file's), or something to call before.
        manifest_faults: The same for the others.
        requests: Path and range of each request.
        ranges: Whether it can go on in the middle of a file.
    """

    def __init__(self, folder: str) -> None:
        self.faults: list[Any] = []
        self.manifest_faults: list[Any] = []
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True
        handler = functools.partial(type("Handler", (_Handler,), {"state": self}), directory=folder)
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


class _Handler(http.server.SimpleHTTPRequestHandler):
    state: FileServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.state.ranges else None
        self.state.requests.append((self.path, self.headers.get("Range")))
        faults = self.state.faults if self.path.endswith(".tar") else self.state.manifest_faults
        fault = faults.pop(0) if faults else None
        if callable(fault):
            fault = fault() and None
        if isinstance(fault, int):
            return self.send_error(fault)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if first >= len(data):
            return self.send_error(416)
        version = f'"{hash(data)}"'
        if wanted and self.headers.get("If-Range") != version:
            wanted, first = None, 0
        whole = len(data)
        data = bytes(whole) if fault == "other" else data[first:]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", version)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{whole - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)
        self.close_connection = True
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(shards: Callable[..., str]) -> Iterator[FileServer]:
    server = FileServer(shards(20, 5))
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", patience=20)


def test_a_broken_transfer_goes_on_where_it_broke_off(
    served: FileServer, cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shard = Shard(f"{served.url}/shard-000000.tar")
    served.faults += ["drop", 503, "drop", 429]
    original = (tmp_path / "shards" / "shard-000000.tar").read_bytes()
    assert cache.path(shard).read_bytes() == original
    half = len(original) // 2
    ranges = [wanted for _, wanted in served.requests]
    assert ranges[:3] == [None, f"bytes={half}-", f"bytes={half}-"]
    assert len(ranges) == 5
    assert caplog.text.count("shard-000000.tar: ") == 1
    assert "trying again for 20 s" in caplog.text
    assert cache.path(shard).read_bytes() == original
    assert len(served.requests) == 5  # kept
    assert not list(cache.folder.glob("*.part"))


def test_a_shard_that_changes_on_its_way_is_fetched_anew(served: FileServer, cache: ShardCache, tmp_path: Path):
    """The rest of the newer version must not be put behind the beginning of the older one."""
    path = tmp_path / "shards" / "shard-000000.tar"
    newer = path.read_bytes().replace(b"Which cell", b"Whose cell")
    assert len(newer) == path.stat().st_size
    served.faults += ["drop", lambda: path.write_bytes(newer)]
    assert cache.path(Shard(f"{served.url}/shard-000000.tar")).read_bytes() == newer


def test_another_version_is_another_file(served: FileServer, cache: ShardCache, tmp_path: Path):
    spec = f"{served.url}/{MANIFEST}"
    before = [cache.path(shard) for shard in find_shards(spec)]
    write_shards([make_sample(i, words=5) for i in range(20)], tmp_path / "shards", samples_per_shard=5, overwrite=True)
    after = [cache.path(shard) for shard in find_shards(spec)]
    assert not {*before} & {*after}
    assert all(
        path.read_bytes() == (tmp_path / "shards" / f"shard-{i:06d}.tar").read_bytes() for i, path in enumerate(after)
    )


def test_a_command_that_ends_before_the_tar_does_is_not_believed(shards: Callable[..., str], tmp_path: Path):
    pipe = f"pipe:head -c 3000 {shards(4)}/shard-000000.tar"
    with pytest.raises(FetchError, match="could not be fetched"):
        ShardCache(tmp_path / "cache", patience=0.2).open(Shard(pipe))


def test_a_fetched_manifest_runs_no_commands(served: FileServer, tmp_path: Path):
    listed = [{"name": f"pipe:touch {tmp_path}/ran", "samples": 1}]
    (tmp_path / "shards" / MANIFEST).write_text(json.dumps({"shards": listed}))
    with pytest.raises(ValueError, match=r"lists 'pipe:.*expected a file beside it or http"):
        find_shards(f"{served.url}/{MANIFEST}")


@pytest.mark.slow
def test_a_manifest_that_cannot_be_reached_is_said():
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9/manifest.json cannot be reached .*; check the address"):
        find_shards(f"http://127.0.0.1:9/{MANIFEST}")


def test_a_busy_server_is_asked_again_for_its_manifest(served: FileServer):
    served.manifest_faults += [503, 429]
    assert len(find_shards(f"{served.url}/{MANIFEST}?signature=x")) == 4


@pytest.mark.slow
def test_processes_that_share_little_room_lose_nothing(served: FileServer, cache: ShardCache):
    """One makes room with what another is about to open."""
    found = find_shards(f"{served.url}/{MANIFEST}")
    limit = 1.5 * max(shard.bytes or 0 for shard in found)

    def work(seed: int) -> None:
        rng, small = random.Random(seed), ShardCache(cache.folder, limit=limit)
        for _ in range(60):
            shard = rng.choice(found)
            local = LocalShard(small.open(shard), shard.url, shard.samples)
            assert not isinstance(local.read(4), SampleError)

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3


def test_a_server_without_ranges_is_asked_for_the_whole_again(served: FileServer, cache: ShardCache, tmp_path: Path):
    served.ranges = False
    served.faults += ["drop", "drop"]
    path = cache.path(Shard(f"{served.url}/shard-000001.tar"))
    assert path.read_bytes() == (tmp_path / "shards" / "shard-000001.tar").read_bytes()


def test_what_differs_from_the_manifest_is_fetched_again(served: FileServer, cache: ShardCache, tmp_path: Path):
    original = (tmp_path / "shards" / "shard-000002.tar").read_bytes()
    checksum = json.loads((tmp_path / "shards" / MANIFEST).read_text())["shards"][2].get("sha256")
    served.faults += ["other"]
    known = Shard(f"{served.url}/shard-000002.tar", 5, len(original), checksum)
    assert known.sha256 is not None
    assert cache.path(known).read_bytes() == original
    short = Shard(f"{served.url}/shard-000003.tar", 5, 17)
    impatient = ShardCache(cache.folder, patience=0.2)
    with pytest.raises(OSError, match=r"shard-000003.tar could not be fetched in .* tries .*manifest says 17"):
        impatient.path(short)
    assert len(list(cache.folder.glob("*.tar"))) == 1


def test_what_will_not_pass_is_not_waited_for(served: FileServer, cache: ShardCache):
    with pytest.raises(OSError, match=r"none.tar answered with status 404; check the address"):
        cache.path(Shard(f"{served.url}/none.tar"))
    assert len(served.requests) == 1


def test_processes_fetch_a_shard_once(served: FileServer, cache: ShardCache):
    shard = Shard(f"{served.url}/shard-000000.tar")
    served.faults += ["drop"]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=cache.path, args=(shard,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(served.requests) == 2


def test_the_cache_keeps_to_its_limit(served: FileServer, cache: ShardCache, tmp_path: Path):
    found = find_shards(f"{served.url}/{MANIFEST}")
    size = max(shard.bytes or 0 for shard in found)
    small = ShardCache(cache.folder, limit=2.5 * size)
    for shard in found:
        small.path(shard)
        time.sleep(0.02)  # so that times of use differ
    kept = {path.name for path in cache.folder.glob("*.tar")}
    assert kept == {small.path(shard).name for shard in found[-2:]}


def indices(loader: ShardLoader) -> list[int]:
    return [columns["index"] for batch in loader for columns in batch["columns"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_from_a_server_that_drops_connections(
    served: FileServer, cache: ShardCache, processor: Any, tmp_path: Path, num_workers: int
):
    """A manifest behind a URL tells sizes, so the order is that of the same shards on a disk."""
    options = {"processor": processor, "batch_size": 4, "num_workers": num_workers, "shuffle_window": 6}
    served.faults += ["drop", 500, "drop"]
    remote = ShardDataModule(train=f"{served.url}/{MANIFEST}", cache_folder=str(cache.folder), **options)
    local = ShardDataModule(train=str(tmp_path / "shards"), **options)
    expected = indices(local.train_dataloader())
    assert sorted(expected) == list(range(20))
    assert indices(remote.train_dataloader()) == expected
    assert len({path for path, _ in served.requests if path.endswith(".tar")}) == 4
    before = len(served.requests)
    assert indices(remote.train_dataloader()) == expected
    assert len(served.requests) == before
    for each in (remote, local):
        each.teardown("fit")


def test_a_shard_that_is_gone_is_as_many_bad_samples(
    served: FileServer, cache: ShardCache, processor: Any, tmp_path: Path
):
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    data = ShardDataModule(
        train=f"{served.url}/{MANIFEST}",
        cache_folder=str(cache.folder),
        processor=processor,
        num_workers=0,
        batch_size=4,
        max_bad_fraction=0.5,
    )
    assert set(indices(data.train_dataloader())) == {*range(5), *range(10, 20)}
    assert data.counts["train"]["bad"] == 5
    nameless = ShardDataModule(
        train=f"{served.url}/shard-00000{{0..3}}.tar",
        cache_folder=str(cache.folder),
        processor=processor,
        num_workers=0,
    )
    with pytest.raises(RuntimeError, match=r"shard-000001.tar cannot be read .*404.*without it the epoch has no end"):
        indices(nameless.train_dataloader())


def test_pipes_are_fetched_and_must_end_well(cache: ShardCache, tmp_path: Path, shards: Callable[..., str]):
    folder = shards(4)
    good = cache.path(Shard(f"pipe:cat {folder}/shard-000000.tar"))
    assert good.read_bytes() == Path(folder, "shard-000000.tar").read_bytes()
    flag = tmp_path / "flag"
    twice = f"pipe:if [ -e {flag} ]; then cat {folder}/shard-000000.tar; else touch {flag}; echo half; exit 3; fi"
    assert cache.path(Shard(twice)).read_bytes() == good.read_bytes()
    with pytest.raises(OSError, match=r"pipe:exit 3 could not be fetched in \d+ tries"):
        ShardCache(cache.folder, patience=0.2).path(Shard("pipe:exit 3"))


@pytest.mark.parametrize(
    ("content", "says"), [("[]", "is no manifest"), ("{'", "is no manifest"), (None, "status 404; expected a manifest")]
)
def test_a_manifest_that_is_none_is_said(served: FileServer, tmp_path: Path, content: str | None, says: str):
    manifest = tmp_path / "shards" / MANIFEST
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        find_shards(f"{served.url}/{MANIFEST}")
