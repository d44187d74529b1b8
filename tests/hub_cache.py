"""A cache of the Hugging Face Hub as huggingface_hub lays it out, filled from local folders."""

import hashlib
import os
from pathlib import Path

FIRST, SECOND = "1" * 40, "2" * 40  # commits


def cached(cache: Path, model: str, folder: Path, commit: str = FIRST, ref: str = "main") -> Path:
    """Puts a folder's files into the cache as a commit of ``model``, and returns its snapshot."""
    owned = cache / f"models--{model.replace('/', '--')}"
    snapshot = owned / "snapshots" / commit
    (owned / "blobs").mkdir(parents=True, exist_ok=True)
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        data, link = file.read_bytes(), snapshot / file.relative_to(folder)
        blob = owned / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (owned / "refs").mkdir(exist_ok=True)
    if ref:
        (owned / "refs" / ref).write_text(commit)
    return snapshot
