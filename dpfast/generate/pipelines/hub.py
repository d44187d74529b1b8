"""Models of the Hugging Face Hub: from "owner/name" to the folder of a snapshot in its cache.

    HF_HUB_CACHE/models--owner--name/refs/main                  the commit of a branch or tag
    HF_HUB_CACHE/models--owner--name/snapshots/COMMIT/unet/...  links to the files of ../../blobs

Where the cache is (``HF_HOME``, ``HF_HUB_CACHE``) and whether anything may be downloaded
(``HF_HUB_OFFLINE``) decides huggingface_hub. Reading writes nothing, so that a cache may be
read-only; ``fetch`` alone downloads, before a model is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from dpfast.config import pipeline_folder
from dpfast.config.recipe import INDEX
from dpfast.errors import InputError, first_line
from dpfast.files import is_folder, listed, there

log = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")
PINNED = re.compile(r"@[0-9a-f]{40}(?=$|[:/])")  # in what a recipe names
CACHED = "models--"  # begins the name of a model's folder in the cache
WATCHED = 2.0  # seconds between two looks at how much of a download is there
ANSWERS = 10.0  # seconds within which the Hub says what it has, without a second try


class IncompleteError(InputError):
    """A model of the Hub, or a part of it, that is not in the cache."""


def is_model_id(source: str | Path) -> bool:
    """Returns True if a text has the form "owner/name", which no path with "./", "/" or "~" has."""
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return str(source).count("/") == 1


def parted(source: str) -> tuple[str, str]:
    """Returns the model and the revision of "owner/name@revision", "" where it names none."""
    model, _, revision = source.partition("@")
    return (model, revision) if is_model_id(model) else (source, "")


def without_commit(text: str) -> str:
    """Returns what a recipe names without the commit that a run has put behind it."""
    return PINNED.sub("", text)


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a folder that is a snapshot in a cache; None for other folders."""
    place = folder.absolute()
    inside = place.parent.name == "snapshots" and place.parent.parent.name.startswith(CACHED)
    return place.name if inside and COMMIT.fullmatch(place.name) else None


def model_of(folder: Path) -> str | None:
    """Returns the "owner/name" of a folder in a cache, or of a snapshot in one; None for other
    folders.
    """
    place = folder.absolute()
    if commit_of(place) is not None:
        place = place.parent.parent
    parts = place.name.split("--")
    known = place.name.startswith(CACHED) and len(parts) == 3 and is_folder(place / "snapshots")
    return "/".join(parts[1:]) if known else None


def located(source: str | Path, revision: str = "", *, field: str = "pipeline") -> Path:
    """Returns the folder of a model: ``source`` where it is one, else the snapshot of the Hub's
    model of that name in the cache.

    source: a folder, the folder of a model in a cache (models--owner--name), the name of an
    embedded pipeline, or "owner/name"; of other fields than "pipeline" also "owner/name@revision".
    revision: a branch, a tag or a commit; "": of a model of the Hub its main branch. field: what
    the caller calls ``source``.

    Raises ``IncompleteError`` where the cache has no such model or revision, and ``InputError`` for
    a revision of a plain folder. A path that leads nowhere is returned as it is.
    """
    path = pipeline_folder(source) if field == "pipeline" else Path(source)
    if not is_folder(path):
        named = (str(source), revision) if field == "pipeline" else parted(str(source))
        return _snapshot(*named, None, field) if is_model_id(named[0]) else path
    model = model_of(path)
    if model is not None and commit_of(path) is None:
        return _snapshot(model, revision, path.parent, field)
    if revision not in ("", commit_of(path)):
        raise InputError(
            f"revision = {revision!r}: is for models of the Hub, and {field} = {str(source)!r} is "
            "a folder"
        )
    return path


def _snapshot(model: str, revision: str, cache: Path | None, field: str) -> Path:
    """Returns the folder of a model's snapshot in ``cache``, None: that of huggingface_hub."""
    place = Path(constants.HF_HUB_CACHE if cache is None else cache)
    try:
        # that the snapshot is whole is looked at part by part: diffusers downloads a part of it
        found = huggingface_hub.snapshot_download(
            model,
            revision=revision or None,
            cache_dir=place,
            local_files_only=True,
            allow_patterns=[INDEX],
        )
    except LocalEntryNotFoundError as error:
        left = getattr(error, "snapshot_path", None)  # a part of a snapshot
        if left is None:
            raise IncompleteError(_absent(model, revision, place, field)) from None
        found = left
    except (OSError, ValueError) as error:  # of a revision that is no name, or an unreadable cache
        raise InputError(
            f"revision = {revision!r}: {field} = {model!r}: {first_line(error)}"
        ) from error
    return Path(found)


def _absent(model: str, revision: str, cache: Path, field: str) -> str:
    """Returns the reason why there is no snapshot of a model in the cache, and what gets it."""
    owned = cache / f"{CACHED}{model.replace('/', '--')}"
    command = download_command(model, revision)
    barred = " (HF_HUB_OFFLINE is set)" if offline() else ""
    if not is_folder(owned):
        return (
            f"{field} = {model!r}: no such folder, and no model of that name in the Hub's cache "
            f"{str(cache)!r}{barred}; to download it: {command}"
        )
    refs = owned / "refs"
    names = [str(each.relative_to(refs)) for each in sorted(refs.rglob("*")) if each.is_file()]
    known = [*names, *(each.name for each in listed(owned / "snapshots"))]
    return (
        f"revision = {revision or 'main'!r}: {field} = {model!r} has in the Hub's cache "
        f"{str(cache)!r}{barred} {', '.join(known) or 'nothing'} alone; to download it: {command}"
    )


def offline() -> bool:
    """Returns True if nothing may be downloaded."""
    return bool(constants.HF_HUB_OFFLINE)


def download_command(model: str, revision: str = "") -> str:
    """Returns the command that brings a model of the Hub into the cache."""
    return f"hf download {model}" + (f" --revision {revision}" if revision else "")


def hint(folder: Path) -> str:
    """Returns the command that completes a folder that is a snapshot in a cache; empty for other
    folders.
    """
    model, commit = model_of(folder), commit_of(folder)
    if model is None or commit is None:
        return ""
    return f"; its download is not complete: {download_command(model, commit)}"


def fetch(
    source: str,
    revision: str = "",
    variant: str = "",
    *,
    field: str = "pipeline",
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Downloads a model of the Hub into the cache; a file that is there is left as it is.

    Of a pipeline (``field``) it takes what diffusers loads of it: safetensors, of ``variant`` alone
    where they have it. beat: called while the download grows.

    Raises ``InputError`` where the Hub has no such model, revision or variant, or does not answer.
    """
    log.info("downloading %s from the Hub into %s", source, constants.HF_HUB_CACHE)
    owned = Path(constants.HF_HUB_CACHE) / f"{CACHED}{source.replace('/', '--')}"
    try:
        huggingface_hub.HfApi().model_info(source, revision=revision or None, timeout=ANSWERS)
        with _watched(owned / "blobs", beat):
            if field == "pipeline":
                diffusers.DiffusionPipeline.download(
                    source,
                    revision=revision or None,
                    variant=variant or None,
                    use_safetensors=True,
                    safety_checker=None,
                    feature_extractor=None,
                )
            else:
                huggingface_hub.snapshot_download(
                    source, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]
                )
    except Exception as error:  # of diffusers, huggingface_hub and its HTTP client
        raise InputError(
            f"{field} = {source!r}: no such folder, not in the Hub's cache, and downloading it "
            f"failed: {_refusal(error, source, revision)}"
        ) from error


def _refusal(error: Exception, model: str, revision: str) -> str:
    """Returns why the Hub did not give a model, and what helps."""
    if isinstance(error, GatedRepoError):  # a kind of the next one
        return (
            f"its owner asks for consent; give it on https://huggingface.co/{model}, and say "
            "'hf auth login'"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no model of that name, or it is private ('hf auth login')"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision or 'main'!r}"
    return f"{first_line(error)}; where there is a network: {download_command(model, revision)}"


@contextlib.contextmanager
def _watched(blobs: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Calls ``beat`` while the files in a folder grow: a download that hangs is no progress."""
    ended = threading.Event()

    def watch() -> None:
        before = -1
        while not ended.wait(WATCHED):
            size = sum(each.stat().st_size for each in listed(blobs) if there(each))
            if size != before:
                before = size
                beat()

    thread = threading.Thread(target=watch, name="dpfast-download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
