"""Remote shards: fetched once and only when asked to, from a server on this machine."""

import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_cases import CLASSES, COUNTS, assert_same, batches, image_data, make_tree

from visattn.__main__ import main
from visattn.data.module import ImageData
from visattn.data.remote import fetch_shards, is_remote
from visattn.data.shards import find_shards
from visattn.data.tar_index import INDEX

pytest.importorskip("webdataset", reason="the extra `shards` is not installed")
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches with curl")


class Handler(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    assert main(["pack", str(make_tree(folder / "photos")), str(folder / "validation set")]) == 0
    return folder / "validation set"  # a word that names no split here


@pytest.fixture
def url(packed, tmp_path, monkeypatch):
    """What serves the shards' folder, and a new folder to fetch into."""
    monkeypatch.chdir(tmp_path)
    Handler.asked.clear()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(packed.parent))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/validation%20set/{{train,val}}-000000.tar"
        server.shutdown()


def test_only_urls_are_remote():
    assert is_remote("https://a.org/x.tar") and is_remote("gs://bucket/x-{00..07}.tar")
    assert not any(map(is_remote, [None, "photos", Path("a/b"), "C:/photos"]))


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("https://a.org/x.zip", r"'https://a\.org/x\.zip' is not the URL of a tar shard"),
        ("https://a.org/x.TAR", r"end with \.tar"),
        ("s3://bucket/x.tar", r"must begin with http, https, gs, hf"),
        ("file:///tmp/x.tar", r"must begin with http, https, gs, hf"),
        ("pipe://x;touch ran;.tar", r"must begin with http, https, gs, hf"),
        (
            "http://a.org/{a,b}.tar::pipe:touch ran;echo .tar",
            r"'pipe:touch ran;echo \.tar' is not the URL",
        ),
        ("https://{a,b}.org/x.tar", r"2 shards, but only 1 different paths"),
        ("https://a.org/x.tar?part={a,b}", r"2 shards, but only 1 different paths"),
    ],
)
def test_what_is_no_shard_is_refused_before_it_is_asked_for(root, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        fetch_shards(root, download=True)
    assert not list(tmp_path.iterdir())


def test_fetched_shards_are_those_that_were_packed(url, packed):
    data = ImageData(url, image_size=(11, 17), batch_size=5, num_workers=0, download=True)
    data.prepare_data()
    data.setup("fit")
    here = ImageData(str(packed), image_size=(11, 17), batch_size=5, num_workers=0)
    here.setup("fit")
    assert data.classes == CLASSES
    assert_same(batches(data.train_dataloader()), batches(here.train_dataloader()))
    assert_same(batches(data.val_dataloader()), batches(here.val_dataloader()))
    (folder,) = Path("data").iterdir()
    assert (folder / INDEX).is_file()


def test_nothing_is_fetched_unasked_or_twice(url):
    with pytest.raises(FileNotFoundError, match=r"root: 2 of 2 shards of .*set download: true"):
        image_data(url)
    assert not Handler.asked
    fetch_shards(url, download=True)
    assert sorted(path.rpartition("/")[2] for path in Handler.asked) == [
        "classes.txt",
        "train-000000.tar",
        "val-000000.tar",
    ]
    assert image_data(url).classes == CLASSES  # without a word to the server
    assert fetch_shards(url, download=True) and len(Handler.asked) == 3


def test_shards_that_are_not_there_are_named_and_the_others_kept(url, packed):
    more = url.replace("{train,val}-000000", "train-{000000..000001}")
    with pytest.raises(FileNotFoundError, match=r"root: cannot fetch '.*train-000001\.tar'"):
        fetch_shards(more, download=True)
    (folder,) = Path("data").iterdir()
    assert [path.name for path in folder.glob("*.tar")] == ["train-000000.tar"]


def test_what_is_no_tar_is_not_kept(url, packed):
    broken, root = packed / "broken-000000.tar", url.replace("{train,val}", "broken")
    broken.write_bytes(b"not a tar")
    with pytest.raises(ValueError, match=r"root: '.*broken-000000\.tar' returns no tar file"):
        fetch_shards(root, download=True)
    broken.write_bytes((packed / "val-000000.tar").read_bytes())
    assert [path.name for path in find_shards(fetch_shards(root, download=True))] == [
        "broken-000000.tar"
    ]
    broken.unlink()


@pytest.mark.parametrize("text", [None, "", "<html>\nnothing here\n</html>"])
def test_classes_without_a_list_are_their_numbers(url, packed, text, caplog):
    names = packed / "classes.txt"
    kept = names.read_text()
    names.unlink() if text is None else names.write_text(text)
    try:
        fetch_shards(url, download=True)
    finally:
        names.write_text(kept)
    assert (
        image_data(url).classes == ["0", "1", "2"]
        and "classes are named by the labels of the shards" in caplog.text
    )


def test_processes_that_fetch_together_fetch_once(url, packed):
    script = [
        "import sys",
        "from visattn.data.module import ImageData",
        "data = ImageData(sys.argv[1], download=True)",
        "data.setup('fit')",
        "print(*data.classes, data.class_counts)",
    ]
    command = [sys.executable, "-c", "; ".join(script), url]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0].strip() for process in started}
    assert said == {f"{' '.join(CLASSES)} {list(COUNTS['train'])}"} and len(Handler.asked) == 3
