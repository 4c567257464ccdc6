"""Checkpoints from the Hugging Face hub: a pinned revision, safetensors alone, and a download that goes on where it was.

huggingface_hub 2 throws a partial file away when its process ends, so files are fetched here one by one through its `http_get`
into `<name>.part`, which the next run continues, and each is checked against the hash that the hub states for it.
The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` left; HF_ENDPOINT and HF_HUB_OFFLINE are honoured.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

from refusal.io.errors import UserError
from refusal.io.files import write_whole
from refusal.lm.checkpoint import INDEX, SINGLE, read_json, weight_map

# Never pickles, never code, and no folders: `original/` and `onnx/` hold the same weights once more.
SMALL = ("*.json", "*.jinja", "*.tiktoken", "tokenizer.model", "merges.txt", "vocab.txt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*"
_ID = re.compile(rf"{_NAME}(?:/{_NAME})?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]*")  # at the root, of which a path may be made
_REVISION = re.compile(rf"{_NAME}(?:/{_NAME})*")


@dataclass(frozen=True)
class File:
    """A file of a repository as the hub lists it. `sha256` of the content for large files, else git's `blob_id`."""

    size: int  # bytes
    sha256: str | None
    blob_id: str | None


def fetch(model_id: str, revision: str, cache: Path, look: Callable[[Path], object]) -> tuple[Path, str]:
    """The checkpoint's folder under `cache`, whole, and the commit hash that `revision` (a commit hash or tag) stands for.

    `look` sees the folder when configuration and tokenizer are there and no weight yet: what it raises saves the download.
    Then the disk must have room for the weights and two copies more (the stage's output and DVC's cache).

    Raises UserError as `peek` does, and for a full disk.
    """
    folder, commit, weights = peek(model_id, revision, cache)
    look(folder)
    _check_disk(folder, weights, model_id)
    _get(model_id, commit, folder, weights)
    return folder, commit


def peek(model_id: str, revision: str, cache: Path) -> tuple[Path, str, dict[str, File]]:
    """The checkpoint's folder with configuration and tokenizer in it, its commit, and the weights that are to be fetched.

    Raises UserError for a malformed id, an unknown or unpinned revision, a repository without safetensors, one
    that needs a licence or a token, no network, or offline mode without these files in `cache`.
    """
    if not _ID.fullmatch(model_id):
        raise UserError(
            f"params.yaml: model.id: {model_id!r} is no hub id: give <owner>/<name>, or null model.revision for a folder"
        )
    if not _REVISION.fullmatch(revision) or revision in ("main", "master"):
        raise UserError(
            f"params.yaml: model.revision: {revision!r} pins nothing: give a commit hash or a tag of {model_id}, "
            f"as listed on {_endpoint()}/{model_id}/commits/main"
        )
    home = cache / model_id.replace("/", "--")
    listing = home / f"{quote(revision, safe='')}.json"
    if _offline():
        commit, files = _listed(listing, model_id, revision)
    else:
        commit, files = _list(model_id, revision)
        fields = {"commit": commit, "files": {name: asdict(file) for name, file in files.items()}}
        write_whole(listing, json.dumps(fields).encode())
    if not {SINGLE, INDEX} & files.keys():
        pickles = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in _PICKLES))
        held = f"only {pickles[0]}, and a pickle can run code when loaded" if pickles else "no weights"
        raise UserError(
            f"{model_id}@{revision}: holds {held}: give a revision that has safetensors (the hub's conversion is often "
            "offered as refs/pr/<n>)"
        )
    folder = home / commit
    folder.mkdir(exist_ok=True)
    small = [name for name in files if any(fnmatch(name, pattern) for pattern in SMALL)]
    _get(model_id, commit, folder, {name: files[name] for name in small})
    weights = [SINGLE] if SINGLE in files else sorted(set(weight_map(folder).values()))
    for name in weights:
        if name not in files:
            raise UserError(f"{model_id}@{revision}: {INDEX} names {name!r}, which the repository does not hold")
    return folder, commit, {name: files[name] for name in weights}


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _list(model_id: str, revision: str) -> tuple[str, dict[str, File]]:
    """The commit of a revision and the files at the root of its tree."""
    from huggingface_hub import HfApi

    with _one_sentence(model_id, revision):
        info = HfApi().model_info(model_id, revision=revision, files_metadata=True)
    files = {
        s.rfilename: File(s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
        if _FILE.fullmatch(s.rfilename)
    }
    if not info.sha or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise UserError(f"{model_id}@{revision}: {_endpoint()} names no commit for it: is HF_ENDPOINT a hub?")
    return info.sha, files


def _listed(listing: Path, model_id: str, revision: str) -> tuple[str, dict[str, File]]:
    if not listing.is_file():
        raise UserError(
            f"{model_id}@{revision}: not downloaded yet, and HF_HUB_OFFLINE is set: unset it, or make model.id a folder"
        )
    fields = read_json(listing.parent, listing.name)  # our own, and written by rename
    return fields["commit"], {name: File(**file) for name, file in fields["files"].items()}


def _check_disk(folder: Path, weights: dict[str, File], model_id: str) -> None:
    total = sum(file.size for file in weights.values())
    held = sum(path.stat().st_size for name in weights for path in (folder / name, folder / f"{name}.part") if path.is_file())
    needed, free = 3 * total - held, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{model_id}: needs {needed / 1e9:.1f} GB ({(total - held) / 1e9:.1f} to download, the rest for models/base and "
            f"DVC's cache), and {free / 1e9:.1f} GB are free under {folder.parent.parent}: make room"
        )


def _get(model_id: str, commit: str, folder: Path, files: dict[str, File]) -> None:
    """Download what is missing, each file under its own name only when it is whole and its hash right."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    for name, file in files.items():
        path, part = folder / name, folder / f"{name}.part"
        if path.is_file() and path.stat().st_size == file.size:
            continue
        if _offline():
            raise UserError(f"{path}: not downloaded yet, and HF_HUB_OFFLINE is set: unset it and run again")
        with _one_sentence(model_id, commit), part.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            http_get(
                hf_hub_url(model_id, name, revision=commit),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=name,
            )
        if not _right(part, file):
            part.unlink()
            raise UserError(f"{model_id}: {name} came with other content than the hub states for it: run again")
        part.rename(path)


def _right(path: Path, file: File) -> bool:
    """Whether a file has the size and hash that the hub states: SHA-256, or git's hash of a blob."""
    if file.sha256 is None and file.blob_id is None:
        return path.stat().st_size == file.size
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return path.stat().st_size == file.size and digest.hexdigest() == (file.sha256 or file.blob_id)


@contextmanager
def _one_sentence(model_id: str, revision: str) -> Iterator[None]:
    """Turns what can go wrong between here and the hub into one sentence that says what to do."""
    import httpx2
    from huggingface_hub import errors

    page = f"{_endpoint()}/{model_id}"
    try:
        yield
    except errors.GatedRepoError:
        says = f"its licence must be accepted first: do so at {page}, and set HF_TOKEN to your token"
    except errors.RevisionNotFoundError:
        says = f"no such revision: give model.revision a commit hash or tag from {page}/commits/main"
    except errors.RepositoryNotFoundError:
        says = "no such repository, or it is private: check model.id, and set HF_TOKEN to a token that may read it"
    except errors.HfHubHTTPError as error:
        says = f"the hub answered {error.response.status_code}: run again later; what is downloaded is kept"
    except httpx2.HTTPError as error:
        says = f"{_endpoint()} cannot be reached ({type(error).__name__}): run again; what is downloaded is kept"
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        says = "the connection ended early: run again; what is downloaded is kept"
    else:
        return
    raise UserError(f"{model_id}@{revision}: {says}")
