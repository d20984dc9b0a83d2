"""Human sentiment ratings of 23,703 short texts, fetched and checked.

Source: Hutto & Gilbert 2014, https://doi.org/10.1609/icwsm.v8i1.14550.

The source distribution of `vaderSentiment` 3.1.1 (MIT) carries them: movie-review snippets,
product-review snippets, editorial snippets and tweets, each with the mean rating of about 20
people on a scale from -4 (most negative) to 4 (most positive).
"""

import hashlib
import html
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "vaderSentiment==3.1.1"
ARCHIVE = "vaderSentiment-3.1.1.tar.gz"
ARCHIVE_SHA256 = "e785199720894eecae503842abf1fed4092fdbfffe8ccac246a035f3ae34f06b"
DATASET = "vaderSentiment-3.1.1/additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {
    "movie": ("movieReviewSnippets_GroundTruth.txt", 10_605),
    "product": ("amazonReviewSnippets_GroundTruth.txt", 3_708),
    "editorial": ("nytEditorialSnippets_GroundTruth.txt", 5_190),
    "tweet": ("tweets_GroundTruth.txt", 4_200),
}
"""Domain -> (file, number of texts)."""


@dataclass(frozen=True)
class RatedText:
    """A text, the mean of its human ratings in [-4, 4], and where it is from.

    `source` names the review or article that the text was cut from, or the text itself.
    """

    text: str
    rating: float
    domain: str
    source: str


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/ppo_kernel`, or `~/.cache/ppo_kernel`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ppo_kernel"


def load_ratings(cache: Path | None = None) -> list[RatedText]:
    """All rated texts, in the order of the source; downloads 2.5 MB the first time.

    Args:
        cache: folder of the archive; None takes `cache_folder()`.

    Raises:
        RuntimeError: pip cannot fetch the archive, or it fetched another one.
        ValueError: the archive is not the published one, or holds something unexpected.
    """
    archive = _fetch(cache or cache_folder())
    with tarfile.open(archive) as outer, tarfile.open(fileobj=_open(outer, DATASET)) as inner:
        return [
            rated
            for domain, (name, count) in DOMAINS.items()
            for rated in _parse(_open(inner, f"hutto_ICWSM_2014/{name}").read(), domain, count)
        ]


def _fetch(cache: Path) -> Path:
    archive = cache / ARCHIVE
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        done = _download(cache)
        if done.returncode or not archive.is_file():
            raise RuntimeError(
                f"could not fetch {REQUIREMENT} (pip exit code {done.returncode}):\n"
                f"{done.stderr.strip()[-2000:]}\nPut {ARCHIVE} into {cache} by hand to go on."
            )
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise ValueError(
            f"{archive} has SHA-256 {digest}, expected {ARCHIVE_SHA256}: it is not the published "
            "file. Delete it to fetch it again."
        )
    return archive


def _download(cache: Path) -> subprocess.CompletedProcess[str]:
    """Let pip fetch the archive, from wherever it is set up to fetch packages."""
    with tempfile.TemporaryDirectory() as folder:
        # pip runs code of a source distribution to learn its metadata. With a hash, which only a
        # file can give, it compares before it unpacks.
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n", "utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(cache)]
        command += ["--requirement", str(requirements)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def _open(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    """One regular file of an archive, in memory: nothing is unpacked to disk."""
    try:
        member = archive.getmember(name)
    except KeyError:
        raise ValueError(f"the archive has no file {name!r}; it is not the expected one.") from None
    stream = archive.extractfile(member) if member.isreg() else None
    if stream is None or member.size > 20_000_000:
        raise ValueError(f"{name!r} in the archive is not a plain file of the expected size.")
    return io.BytesIO(stream.read())


def _parse(data: bytes, domain: str, count: int) -> list[RatedText]:
    lines = data.decode("utf-8-sig").replace("\r\n", "\n").strip("\n").split("\n")
    if len(lines) != count:
        raise ValueError(f"{domain}: expected {count} rated texts, found {len(lines)}.")
    parsed = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        try:
            identifier, rating, text = fields
            value = float(rating)
        except ValueError:
            raise ValueError(
                f"{domain}, line {number}: expected id, rating and text, got {line[:80]!r}."
            ) from None
        if not -4.0 <= value <= 4.0:
            raise ValueError(f"{domain}, line {number}: rating {value} is outside [-4, 4].")
        source = f"{domain} {identifier.partition('_')[0]}"
        parsed.append(RatedText(" ".join(html.unescape(text).split()), value, domain, source))
    return parsed
