"""The human ratings: what is read from the archive, and what is refused."""

import hashlib
import io
import os
import tarfile

import pytest

from ppo_kernel.demos import human_ratings


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LINES = {
    "movie": b"1\t2.5\tA fine &amp; moving film.\r\n2\t-1.25\tDull,  very dull.",
    "product": b"\xef\xbb\xbf7_1\t0.5\tIt works.\r\n7_2\t-3\tIt broke.",
    "editorial": b"1_1\t0\tThe council met.",
    "tweet": b"1\t4\tyay!",
}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Writes an archive of the published layout into a cache and makes its digest the expected."""

    def write(lines=LINES, *, keep_digest: bool = False, dataset: str = human_ratings.DATASET):
        domains = {domain: (f"{domain}.txt", LINES[domain].count(b"\n") + 1) for domain in LINES}
        inner = _tar({f"hutto_ICWSM_2014/{domain}.txt": data for domain, data in lines.items()})
        data = _tar({dataset: inner})
        (tmp_path / human_ratings.ARCHIVE).write_bytes(data)
        monkeypatch.setattr(human_ratings, "DOMAINS", domains)
        if not keep_digest:
            digest = hashlib.sha256(data).hexdigest()
            monkeypatch.setattr(human_ratings, "ARCHIVE_SHA256", digest)
        return tmp_path

    return write


def test_texts_ratings_domains_and_sources_are_read(archive):
    rated = human_ratings.load_ratings(archive())
    assert [(r.text, r.rating, r.domain) for r in rated] == [
        ("A fine & moving film.", 2.5, "movie"),
        ("Dull, very dull.", -1.25, "movie"),
        ("It works.", 0.5, "product"),
        ("It broke.", -3.0, "product"),
        ("The council met.", 0.0, "editorial"),
        ("yay!", 4.0, "tweet"),
    ]
    assert rated[0].source != rated[1].source
    assert rated[2].source == rated[3].source, "two snippets of one review"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1\t2.5\tA\tB\r\n2\t1\tC", "movie, line 1: expected id, rating and text"),
        (b"1\tgood\tA\r\n2\t1\tC", "movie, line 1: expected id, rating and text"),
        (b"1\t2.5\tA\r\n2\t4.5\tC", "movie, line 2: rating 4.5 is outside"),
        (b"1\t2.5\tA\r\n2\tnan\tC", "movie, line 2: rating nan is outside"),
        (b"1\t2.5\tA", "movie: expected 2 rated texts, found 1"),
    ],
)
def test_unexpected_content_is_refused(archive, line, message):
    with pytest.raises(ValueError, match=message):
        human_ratings.load_ratings(archive(LINES | {"movie": line}))


BACKEND = b"""
import os, pathlib
pathlib.Path(os.environ["MARKER"]).touch()
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "vaderSentiment-3.1.1.dist-info"
    info.mkdir()
    lines = "Metadata-Version: 2.1", "Name: vaderSentiment", "Version: 3.1.1", ""
    (info / "METADATA").write_text("\\n".join(lines))
    return info.name
"""
PROJECT = b"""
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.mark.parametrize("published", [True, False])
def test_nothing_of_another_archive_is_run_by_the_download(tmp_path, monkeypatch, published):
    """pip finds a source distribution of the right name, whose build code leaves a mark."""
    top = "vaderSentiment-3.1.1"
    data = _tar({f"{top}/pyproject.toml": PROJECT, f"{top}/backend.py": BACKEND})
    found, cache, marker = (tmp_path / name for name in ("found", "cache", "marker"))
    found.mkdir()
    (found / human_ratings.ARCHIVE).write_bytes(data)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(found)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("MARKER", str(marker))
    if published:
        monkeypatch.setattr(human_ratings, "ARCHIVE_SHA256", hashlib.sha256(data).hexdigest())
        with pytest.raises(ValueError, match="has no file"):
            human_ratings.load_ratings(cache)
        assert (cache / human_ratings.ARCHIVE).read_bytes() == data
    else:
        with pytest.raises(RuntimeError, match=r"(?s)could not fetch.*HASHES"):
            human_ratings.load_ratings(cache)
        assert not (cache / human_ratings.ARCHIVE).exists()
    assert marker.exists() == published, "what it runs, it has compared"


def test_another_archive_is_refused(archive):
    with pytest.raises(ValueError, match="it is not the published file"):
        human_ratings.load_ratings(archive(keep_digest=True))
    with pytest.raises(ValueError, match="has no file"):
        human_ratings.load_ratings(archive(dataset="elsewhere.tar.gz"))
