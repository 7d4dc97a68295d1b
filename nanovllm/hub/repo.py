"""A repository of the Hugging Face hub at one commit: its files, and those that a model needs.

On top of huggingface-hub it selects files (never pickles), refuses other architectures before their
weights are downloaded, and turns errors into one line with the remedy.
"""

import errno
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeAlias
from urllib.parse import quote, urlsplit

from huggingface_hub import (
    constants,
    errors,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not marked as exported
    tqdm,
    validate_repo_id,
)
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from nanovllm.errors import CheckpointError, ModelNotFoundError, printable
from nanovllm.hub import transfer
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import read_config
from nanovllm.model.tokenizer_files import has_tokenizer, missing_tokenizer
from nanovllm.progress import shows_progress

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "README.md", "LICENSE",
)  # fmt: skip
MAX_LISTING_BYTES = 16 << 20  # some 50,000 files
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
_MESSAGE_CHARACTERS = 1000
_Sha256: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_GitSha1: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
_Commit: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")]
_Shard: TypeAlias = Annotated[str, Field(pattern=r"^[^/\\\p{C}\p{Zl}\p{Zp}]+\.safetensors$")]
"""Text of the hub that becomes part of paths and URLs."""
_FAILURES: tuple[type[Exception], ...] = (
    OSError, transfer.HTTP_ERROR, errors.HFValidationError, transfer.TooLargeError,
)  # fmt: skip


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True)


class _LargeFile(_Checked):
    size: NonNegativeInt
    sha256: _Sha256


class _Sibling(_Checked):
    rfilename: str
    size: NonNegativeInt | None = None
    blobId: _GitSha1 | None = None  # noqa: N815 - the hub's name
    lfs: _LargeFile | None = None


class _Listing(_Checked):
    """The hub's answer about a repository."""

    id: str
    sha: _Commit
    siblings: list[_Sibling] | None = None


class _Index(_Checked):
    """A model.safetensors.index.json: the file of each tensor."""

    weight_map: Annotated[dict[str, _Shard], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file at the top level of a repository, with the hub's size and checksum if known.

    Large files (LFS or Xet storage) have a `sha256`, the others a `git_sha1`, the id of the blob.
    """

    name: str
    size_bytes: int | None
    sha256: str | None
    git_sha1: str | None

    @property
    def has_checksum(self) -> bool:
        """Return whether a local file can be verified."""
        return bool(self.sha256 or self.git_sha1)


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository at one commit.

    Attributes:
        asked_for: the requested name.
        repo: the hub's name for it, which differs after a rename.
        files: the files at the top level, by name.
        token: access token; None for HF_TOKEN or the token of `hf auth login`.
    """

    asked_for: str
    repo: str
    commit: str
    files: Mapping[str, HubFile]
    endpoint: str
    token: str | None = field(repr=False)

    @classmethod
    def look_up(
        cls,
        name: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> "HubRepo":
        """Look up `name` at a branch, tag or commit; raises ModelNotFoundError with the remedy."""
        endpoint = _checked_endpoint(endpoint or constants.ENDPOINT)
        with explained(name, endpoint, revision):
            validate_repo_id(name)
            suffix = "" if revision is None else f"/revision/{quote(revision, safe='')}"
            url = f"{endpoint}/api/models/{name}{suffix}"
            listing = transfer.read(url, MAX_LISTING_BYTES, token=token, params={"blobs": "true"})
        try:
            info = _Listing.model_validate_json(listing)
            validate_repo_id(info.id)
        except ValueError as error:  # ValidationError and HFValidationError are
            reason = printable(" ".join(str(error).split()))
            raise ModelNotFoundError(_not_a_hub(endpoint, reason)) from None
        files = {
            entry.rfilename: _hub_file(entry)
            for entry in info.siblings or ()
            if "/" not in entry.rfilename and "\\" not in entry.rfilename
        }
        return cls(name, info.id, info.sha, files, endpoint, token)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Return the content of a small file."""
        content = io.BytesIO()
        self.fetch(name, content, limit_bytes)
        return content.getvalue()

    def fetch(self, name: str, into: BinaryIO, limit_bytes: int) -> None:
        """Append the rest of a file to `into`, with a progress bar on a terminal.

        Its size is limited by the declared size and by `limit_bytes`.
        """
        size_bytes = self.files[name].size_bytes
        limit_bytes = limit_bytes if size_bytes is None else min(limit_bytes, size_bytes)
        url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint)
        file = transfer.Transfer(url, limit_bytes, self.token, size_bytes, name)
        with explained(self.repo, self.endpoint):
            try:
                file.append_to(into)
            except transfer.TooLargeError:
                raise CheckpointError(
                    f"{name} of {self.repo} is larger than the {limit_bytes:,} bytes that "
                    "it may have; it was not kept"
                ) from None

    def config(self) -> ModelConfig:
        """Return the repository's config.json; raises CheckpointError if it is unsupported."""
        if "config.json" not in self.files:
            raise CheckpointError(
                f"{self.repo} has no config.json, so it is not a model in Hugging Face format"
            )
        try:
            raw = json.loads(self.read("config.json", MAX_CONFIG_BYTES))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"config.json of {self.repo} is not JSON: {error}") from None
        if not isinstance(raw, dict):
            kind = type(raw).__name__
            raise CheckpointError(
                f"config.json of {self.repo} holds a {kind} but must hold an object"
            )
        try:
            return read_config(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{self.repo}: {error}") from None

    def model_files(self) -> list[HubFile]:
        """Return the weights in safetensors, and the COMPANIONS; raises CheckpointError."""
        if WEIGHTS in self.files:
            weights = [WEIGHTS]
        elif WEIGHTS_INDEX in self.files:
            weights = [
                *_shard_names(
                    self.read(WEIGHTS_INDEX, MAX_INDEX_BYTES), f"{WEIGHTS_INDEX} of {self.repo}"
                ),
                WEIGHTS_INDEX,
            ]
        else:
            raise CheckpointError(self._without_safetensors())
        missing = [name for name in weights if name not in self.files]
        if missing:
            raise CheckpointError(
                f"{self.repo} lacks files that its {WEIGHTS_INDEX} lists: {', '.join(missing[:5])}"
            )
        if not has_tokenizer(self.files):
            raise CheckpointError(missing_tokenizer(self.repo, self.files))
        return [self.files[name] for name in (*weights, *COMPANIONS) if name in self.files]

    def _without_safetensors(self) -> str:
        others = sorted(
            printable(name, 80)
            for name in self.files
            if name.endswith((".bin", ".h5", ".msgpack", ".ot", ".pt", ".ckpt", ".gguf"))
        )
        if not others:
            return f"{self.repo} has no weights in safetensors format"
        return (
            f"{self.repo} has no safetensors, only {', '.join(others[:5])}. Pickles (.bin, .pt) "
            "are not read, since reading one can run any code; if you trust the repository, "
            "convert it where torch and transformers are installed: "
            'python -c "from transformers import '
            f"AutoModelForCausalLM as M, AutoTokenizer as T; n = '{self.repo}'; "
            "[c.from_pretrained(n).save_pretrained('converted') for c in (M, T)]\", "
            "and give the folder 'converted'"
        )


class _TerminalBar(tqdm):
    """A progress bar on terminals only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("disable", not shows_progress())
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]


def cached_snapshot(repo: str) -> Path | None:
    """Return the folder of `repo` in the Hugging Face cache, if the model there is complete."""
    with explained(repo, constants.ENDPOINT):
        config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / WEIGHTS_INDEX
    weights = (
        [WEIGHTS]
        if (folder / WEIGHTS).is_file() or not index.is_file()
        else _shard_names(index.read_bytes(), str(index))
    )
    files = {path.name for path in folder.iterdir() if path.is_file()}
    return folder if has_tokenizer(files) and files.issuperset(weights) else None


def fetch_snapshot(repo: str) -> Path:
    """Download `repo` into the Hugging Face cache and return its folder there."""
    hub = HubRepo.look_up(repo)
    hub.config()
    names = [file.name for file in hub.model_files()]
    with explained(hub.repo, hub.endpoint):
        return Path(snapshot_download(repo, allow_patterns=names, tqdm_class=_TerminalBar))


@contextmanager
def explained(repo: str, endpoint: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface-hub and the system into ModelNotFoundError with the remedy."""
    try:
        yield
    except _FAILURES as error:
        message = _explanation(error, repo, endpoint, revision)
        raise ModelNotFoundError(printable(message, _MESSAGE_CHARACTERS)) from None


def _explanation(error: Exception, repo: str, endpoint: str, revision: str | None) -> str:
    elsewhere = f"download {repo} on another machine, copy the folder here and give its path"
    match error:
        case errors.HFValidationError():
            text = f"{repo} cannot be the name of a model on the hub, which is owner/name"
        case errors.GatedRepoError():
            text = (
                f"{repo} is gated: accept its terms at {endpoint}/{repo}, then set HF_TOKEN to a "
                "token of that account"
            )
        case errors.RepositoryNotFoundError():
            text = (
                f"{endpoint} has no model {repo}, or it is private: check the spelling; for a "
                "private one set HF_TOKEN to a token that may read it"
            )
        case errors.RevisionNotFoundError():
            text = f"{repo} has no revision {revision}: give one of its branches, tags or commits"
        case errors.OfflineModeIsEnabled():
            text = (
                f"HF_HUB_OFFLINE is set, so {endpoint} is not asked for {repo}: unset it, "
                f"or {elsewhere}"
            )
        case transfer.TooLargeError():
            text = _not_a_hub(endpoint, "its list of files has no end")
        case errors.HfHubHTTPError():
            text = _explanation_of_status(error, repo, endpoint)
        case OSError(errno=errno.ENOSPC):
            text = f"the disk is full before {repo} is complete: free some space and try again"
        case OSError() if not isinstance(error, errors.LocalEntryNotFoundError):
            text = f"{repo} could not be fetched: {error}; try again"
        case _:
            cause = error.__cause__ or error
            text = (
                f"no connection to {endpoint} ({type(cause).__name__}: {cause}): check the "
                f"network, set HF_ENDPOINT to a mirror, or {elsewhere}"
            )
    return text


def _not_a_hub(endpoint: str, reason: str) -> str:
    return f"{endpoint} does not answer as a Hugging Face hub does ({reason}); check HF_ENDPOINT"


def _explanation_of_status(error: errors.HfHubHTTPError, repo: str, endpoint: str) -> str:
    status = error.response.status_code
    detail = f" ({error.server_message})" if error.server_message else ""
    remedies = {
        401: "check that HF_TOKEN is valid and may read it, or unset it for a public model",
        429: "wait a few minutes, or set HF_TOKEN, which raises the limit",
    }
    remedies[403] = remedies[401]
    remedy = remedies.get(status, "try again later, or set HF_ENDPOINT to a mirror")
    many = ", too many requests" if status == 429 else ""
    return f"{endpoint} answered {status}{detail} for {repo}{many}: {remedy}"


def _hub_file(entry: _Sibling) -> HubFile:
    if entry.lfs is not None:
        return HubFile(entry.rfilename, entry.lfs.size, entry.lfs.sha256, None)
    return HubFile(entry.rfilename, entry.size, None, entry.blobId)


def _checked_endpoint(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        valid = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        valid = False
    if not valid:
        raise ModelNotFoundError(
            f"the hub's address is {endpoint!r}, which is not a URL such as "
            "https://huggingface.co; correct HF_ENDPOINT"
        )
    return endpoint.rstrip("/")


def _shard_names(index: bytes, source: str) -> list[str]:
    """Return the sorted weight files of a model.safetensors.index.json; `source` names it."""
    try:
        return sorted(set(_Index.model_validate_json(index).weight_map.values()))
    except ValidationError:
        raise CheckpointError(
            f"{source} has no weight_map from tensor names to .safetensors files beside it"
        ) from None
