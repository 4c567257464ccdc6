"""Checkpoints from the Hugging Face hub: a pinned revision, safetensors alone, in the hub's own cache.

huggingface_hub lists, fetches and links, so what its cache holds already is not fetched again, whoever fetched it. It discards a
partial file when its process ends, though: weights are therefore fetched here, into the cache's `blobs/<hash>.incomplete`, which
the next run continues. HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN (or `hf auth login`) and HF_HUB_OFFLINE are honoured.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_cached_repo_tree,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, filter_repo_objects
from huggingface_hub.utils.sha import git_hash

from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.lm.adapter import WEIGHTS
from refusal.lm.checkpoint import INDEX, SINGLE, real_file, weight_map
from refusal.lm.validate import SMALL_FILES

_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5"]
# No folders, of which `original/` and `onnx/` hold the same weights once more, and no name that could lead elsewhere.
_NO_FILE_NAMES = ["*[!A-Za-z0-9_.+ -]*", ".*"]
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*"
_ID = re.compile(rf"{_NAME}(?:/{_NAME})?")
_REVISION = re.compile(rf"{_NAME}(?:/{_NAME})*")
_NO_HUB = (errors.FileMetadataError, AssertionError, LookupError, TypeError, ValueError)
_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


def fetch(model_id: str, revision: str, look: Callable[[Path], object], target: Path) -> tuple[Path, str]:
    """The folder of a checkpoint in the hub's cache, whole, and the commit that `revision` (a commit hash or tag) stands for.

    `look` sees the folder when configuration and tokenizer are there and, unless the cache has them, no weights yet: what it
    raises saves the download. Then the disks must have room for what is to be downloaded and for two copies of the weights where
    `target` lies (the stage's output and DVC's cache).

    Raises UserError as `peek` does, and for a full disk.
    """
    folder, commit, sizes = peek(model_id, revision)
    look(folder)
    _complete(model_id, revision, commit, folder, target, sizes, 2)
    return folder, commit


def fetch_file(model_id: str, revision: str, name: str, target: Path) -> tuple[Path, str]:
    """One GGUF file of a repository, in the hub's cache, and the commit; nothing else of the repository is fetched.

    Raises UserError as `fetch` does, and for a repository without that file.
    """
    path, commit, size = peek_file(model_id, revision, name)
    # A quantized weight of 4 bits takes 32 in float32.
    _complete(model_id, revision, commit, path.parent, target, {name: size}, 16)
    return path, commit


def peek_file(model_id: str, revision: str, name: str) -> tuple[Path, str, int]:
    """Where such a file lies in the cache, or will, the commit, and its size in bytes."""
    folder, pinned = _pin(model_id, revision, [])
    files = _files(model_id, pinned, folder)
    if name not in files:
        held = sorted(filter_repo_objects(files, allow_patterns=["*.gguf"]))
        raise UserError(
            f"{model_id}@{revision}: model.file: the repository holds no {name} at its root"
            + (f"; it holds {', '.join(held[:20])}" if held else ", nor any other GGUF file")
        )
    return folder / name, pinned.resolved, files[name]


def _complete(model_id: str, revision: str, commit: str, folder: Path, target: Path, sizes: dict[str, int], copies: int) -> None:
    """Download what is missing of these files, where the disks have room for it and for so many times these files in copies."""
    missing = [name for name in sizes if not (folder / name).exists()]
    if missing and constants.is_offline_mode():
        raise UserError(f"{folder / missing[0]}: not downloaded yet, and HF_HUB_OFFLINE is set: unset it and run again")
    if missing:
        _check_disk(model_id, folder, target, sum(sizes[name] for name in missing), copies * sum(sizes.values()))
    for name in missing:
        with _one_sentence(model_id, revision):
            _download(model_id, commit, name, folder)
    _check_content(folder, sizes)


def peek(model_id: str, revision: str) -> tuple[Path, str, dict[str, int]]:
    """The checkpoint's or adapter's folder with its small files in it, its commit, and its weight files, there or not, in bytes.

    Raises UserError for a malformed id, an unknown or unpinned revision, a repository without safetensors, one
    that needs a licence or a token, no network, content whose hash is wrong, or offline mode without these files in the cache.
    """
    folder, pinned = _pin(model_id, revision, SMALL_FILES)
    sizes = _files(model_id, pinned, folder)
    if not {SINGLE, INDEX, WEIGHTS} & sizes.keys():
        if quantized := sorted(filter_repo_objects(sizes, allow_patterns=["*.gguf"])):
            raise UserError(
                f"{model_id}@{revision}: holds GGUF files and no safetensors: set model.file to one of them "
                f"({', '.join(quantized[:20])}), which is then dequantized"
            )
        pickles = sorted(filter_repo_objects(sizes, allow_patterns=_PICKLES))
        held = f"only {pickles[0]}, and a pickle can run code when loaded" if pickles else "no weights"
        raise UserError(
            f"{model_id}@{revision}: holds {held}: give a revision that has safetensors (the hub's conversion is often "
            "offered as refs/pr/<n>)"
        )
    _check_content(folder, filter_repo_objects(sizes, allow_patterns=SMALL_FILES))
    single = next((name for name in (WEIGHTS, SINGLE) if name in sizes), None)
    weights = [single] if single else sorted(set(weight_map(folder).values()))
    for name in weights:
        if name not in sizes:
            raise UserError(f"{model_id}@{revision}: {INDEX} names {name!r}, which the repository does not hold")
    return folder, pinned.resolved, {name: sizes[name] for name in weights}


def _pin(model_id: str, revision: str, files: list[str]) -> tuple[Path, Any]:
    """The folder of a revision in the hub's cache, with the files there that these patterns match, and the hub's word for it."""
    if not _ID.fullmatch(model_id):
        raise UserError(
            f"params.yaml: model.id: {model_id!r} is no hub id: give <owner>/<name>, or null model.revision for a folder"
        )
    if not _REVISION.fullmatch(revision) or revision in ("main", "master"):
        raise UserError(
            f"params.yaml: model.revision: {revision!r} pins nothing: give a commit hash or a tag of {model_id}, "
            f"as listed on {constants.ENDPOINT}/{model_id}/commits/main"
        )
    offline = constants.is_offline_mode()
    with _one_sentence(model_id, revision):
        pinned = HfApi().resolve_revision(model_id, revision=revision, local_files_only=offline)
        if not _SHA1.fullmatch(pinned.resolved):
            raise ValueError("no commit hash")
        patterns: Any = {"allow_patterns": files, "ignore_patterns": _NO_FILE_NAMES}
        folder = Path(snapshot_download(model_id, revision=pinned, local_files_only=offline, **patterns))
    folder.mkdir(parents=True, exist_ok=True)  # where the repository has neither
    return folder, pinned


def _files(model_id: str, pinned: Any, folder: Path) -> dict[str, int]:
    """The files at the root of the repository, in bytes; without a listing those in the cache, and weights that are missing."""
    try:
        files = {file.path: file.size for file in get_cached_repo_tree(model_id, revision=pinned)}
    except errors.CachedRepoTreeNotFoundError:  # offline, in a cache that an older huggingface_hub filled
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        files = dict.fromkeys(weight_map(folder).values() if INDEX in files else [SINGLE], 0) | files
    return {name: files[name] for name in filter_repo_objects(files, ignore_patterns=_NO_FILE_NAMES)}


def _check_disk(model_id: str, folder: Path, target: Path, download: int, copies: int) -> None:
    partial = sum(path.stat().st_size for path in (folder.parents[1] / "blobs").glob("*.incomplete"))
    download = max(0, download - partial)
    one_disk = folder.stat().st_dev == target.stat().st_dev
    for place, needed in ((folder, download + one_disk * copies), (target, copies)):
        if needed > (free := shutil.disk_usage(place).free):
            raise UserError(
                f"{model_id}: needs {needed / 1e9:.1f} GB under {place} (in all {download / 1e9:.1f} GB to download, and "
                f"{copies / 1e9:.1f} GB for models/base and DVC's cache), and {free / 1e9:.1f} GB are free: make room, or point "
                "HF_HUB_CACHE to another disk"
            )


def _download(model_id: str, commit: str, name: str, folder: Path) -> None:
    """Fetch a file into the cache, going on where an earlier attempt ended, and link it into the folder of its commit."""
    url = hf_hub_url(model_id, name, revision=commit)
    stated = get_hf_file_metadata(url)
    if stated.size is None or not (_SHA256.fullmatch(stated.etag or "") or _SHA1.fullmatch(stated.etag or "")):
        raise ValueError("no size or no hash of a file")
    repository = folder.parents[1]
    blob, lock = repository / f"blobs/{stated.etag}", repository.parent / f".locks/{repository.name}/{stated.etag}.lock"
    partial = blob.with_name(f"{blob.name}.incomplete")
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the one that huggingface_hub takes
        if not blob.exists() and stated.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:  # beyond, 50 GB, by Xet alone
            goes_on = partial.exists() and partial.stat().st_size <= stated.size
            with partial.open("ab" if goes_on else "wb") as out:
                headers = build_hf_headers() | {"Accept-Encoding": "identity"}
                http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=stated.size, displayed_filename=name)
            partial.rename(blob)
    hf_hub_download(model_id, name, revision=commit)


def _check_content(folder: Path, names: Iterable[str]) -> None:
    """Compare files with the hashes that the hub stated when they were fetched, which name the blobs that they are links to."""
    paths = [folder / name for name in names]
    with progress(sum(path.stat().st_size for path in paths), f"hash of {folder.name[:7]}", "B") as bar:
        for path in paths:
            stated = actual = path.readlink().name if path.is_symlink() else ""
            with (blob := real_file(folder, path.name)).open("rb") as file:
                if _SHA256.fullmatch(stated):
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
                elif _SHA1.fullmatch(stated):
                    actual = git_hash(file.read())
            if actual != stated:
                blob.unlink()
                raise UserError(f"{path}: its content is not what the hub states, so it is deleted: run again to fetch it")
            bar.update(path.stat().st_size)


@contextmanager
def _one_sentence(model_id: str, revision: str) -> Iterator[None]:
    """Turns what can go wrong between here and the hub into one sentence that says what to do."""
    try:
        yield
        return
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as error:  # not in the cache, and the hub failed
        problem: BaseException = error.__cause__ or error
    except (OSError, ImportError, httpx2.HTTPError, *_NO_HUB) as error:
        problem = error
    page, kept = f"{constants.ENDPOINT}/{model_id}", "what is downloaded is kept"
    offline = "and HF_HUB_OFFLINE is set: unset it, or make model.id a folder"
    status = problem.response.status_code if isinstance(problem, errors.HfHubHTTPError) else type(problem).__name__
    sentences: dict[Any, str] = {
        errors.GatedRepoError: f"its licence must be accepted first: do so at {page}, and set HF_TOKEN to your token",
        errors.RevisionNotFoundError: f"no such revision: give model.revision a commit hash or tag from {page}/commits/main",
        errors.RepositoryNotFoundError: (
            "no such repository, or it is private: check model.id, and set HF_TOKEN to a token that may read it"
        ),
        errors.HfHubHTTPError: f"the hub answered {status}: run again later; {kept}",
        errors.IncompleteSnapshotError: f"{str(problem).partition('. ')[0]}, {offline}",  # it names the files
        (errors.LocalEntryNotFoundError, errors.RevisionResolutionError): f"not downloaded yet, {offline}",
        httpx2.HTTPError: f"{constants.ENDPOINT} cannot be reached ({status}): run again; {kept}",
        _NO_HUB: f"{constants.ENDPOINT} does not answer as a hub does ({status}): check HF_ENDPOINT",
    }
    if isinstance(problem, ImportError) or "proxy" in str(problem):  # so httpx2 says both
        why = " ".join(str(problem).split())[:120]
        says = f"the proxy that ALL_PROXY or HTTPS_PROXY names cannot be used ({why}): name an http:// one"
    elif "Consistency check failed" in str(problem):
        says = f"the connection ended early: run again; {kept}"
    elif (says := next((says for kind, says in sentences.items() if isinstance(problem, kind)), "")) == "":
        raise problem
    raise UserError(f"{model_id}@{revision}: {says}")
