"""Where published files lie: a repository of the Hugging Face hub, a folder of Google Cloud Storage.

Both are read through their own clients' file systems (fsspec). A `Remote` lists its files with the checksums its server
publishes, opens one of them, and says in one line what a fault of its client means.
"""

import base64
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Protocol

from data.errors import BadInput

PUBLIC_BUCKETS = {"openpi-assets", "big_vision"}  # read without credentials, which may be wrong ones


class Unreachable(BadInput):
    """No answer, or a broken one: trying again may help."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One published file."""

    name: str  # below the remote's folder, "/" between parts
    size: int  # bytes
    sums: Mapping[str, str]  # what its server says of its content: "sha256" | "git" | "md5" | "crc32c" -> hex
    path: str  # what the client opens


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a remote holds at one moment."""

    files: tuple[RemoteFile, ...]
    revision: str  # names that moment, "" if the server has no name for it


class Remote(Protocol):
    """A place to fetch from."""

    @property
    def name(self) -> str:
        """How messages and manifests call it."""
        ...

    @property
    def by_hand(self) -> str:
        """The command that brings it as a folder to another machine."""
        ...

    def listing(self) -> Listing: ...

    def open(self, file: RemoteFile, block: int) -> Any:
        """A stream that seeks, each read one request for at most `block` bytes."""
        ...

    def explain(self, error: Exception) -> BadInput | None:
        """What to tell a person; None if it is none of the client's faults."""
        ...


@dataclass(frozen=True)
class Hub:
    """A model repository of the Hugging Face hub, at the commit its branch has when asked."""

    repo: str  # "owner/name"
    revision: str = "main"  # branch, or "refs/pr/N" for a proposal

    @property
    def name(self) -> str:
        return f"hub {self.repo}"

    @property
    def by_hand(self) -> str:
        branch = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download {self.repo}{branch} --local-dir {self.repo.split('/')[-1]}"

    @cached_property
    def _system(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), skip_instance_cache=True)

    def listing(self) -> Listing:
        from huggingface_hub import HfApi

        commit = HfApi(endpoint=self._system.endpoint).repo_info(self.repo, revision=self.revision).sha
        root = f"{self.repo}@{commit}"
        found = self._system.find(root, detail=True)
        return Listing(files=tuple(self._file(root, info) for info in found.values()), revision=str(commit))

    def _file(self, root: str, info: Mapping[str, Any]) -> RemoteFile:
        large = info.get("lfs")
        sums = {"sha256": large["sha256"]} if large else {"git": info["blob_id"]}
        return RemoteFile(name=_name(info["name"], root), size=info["size"], sums=sums, path=info["name"])

    def open(self, file: RemoteFile, block: int) -> Any:
        return self._system.open(file.path, "rb", block_size=block, cache_type="none")

    def explain(self, error: Exception) -> BadInput | None:
        import httpx
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return BadInput(
                f"{self.name} is gated: accept its licence on its page, then `hf auth login`, and try again"
            )
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status in (401, 404) or isinstance(error, errors.HFValidationError | FileNotFoundError):
            return BadInput(f"{self.name}: no such repository, or a private one; check the name, or `hf auth login`")
        if status and status < 500:
            return BadInput(f"{self.name}: the hub answers {status}; try again later")
        if isinstance(error, httpx.HTTPError | ConnectionError | TimeoutError):  # offline mode is a ConnectionError
            return Unreachable(f"no connection to {_host(self._system.endpoint)}")
        return None


@dataclass(frozen=True)
class Bucket:
    """A folder of Google Cloud Storage: "gs://bucket/folder"."""

    url: str

    @property
    def name(self) -> str:
        return self.url

    @property
    def by_hand(self) -> str:
        return f"gcloud storage cp -r {self.url} ."

    @cached_property
    def _system(self) -> Any:
        try:
            from gcsfs.core import GCSFileSystem  # pyright: ignore[reportMissingImports]  (not the one that asks by gRPC)
        except ImportError:
            raise BadInput(f"{self.url}: needs gcsfs, which is not installed here; `make setup` installs it") from None
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises as well
        token = "anon" if self._root.split("/")[0] in PUBLIC_BUCKETS else None
        proxies = {"trust_env": True}  # as every other client here
        return GCSFileSystem(project="-", token=token, session_kwargs=proxies, skip_instance_cache=True)

    @property
    def _root(self) -> str:
        return self.url.removeprefix("gs://").strip("/")

    @property
    def _address(self) -> str:
        return str(self._system.base)

    def listing(self) -> Listing:
        self._refuse_unless_reachable()
        found = self._system.find(self._root, detail=True)
        return Listing(files=tuple(self._file(info) for info in found.values() if info["name"][-1] != "/"), revision="")

    def _refuse_unless_reachable(self) -> None:
        """Asked first, because gcsfs tries for a minute before it says that there is no network."""
        import urllib.error
        import urllib.request

        try:
            urllib.request.urlopen(self._address, timeout=10).close()
        except urllib.error.HTTPError:
            return  # any answer will do
        except OSError as error:
            raise Unreachable(f"no connection to {_host(self._address)}") from error

    def _file(self, info: Mapping[str, Any]) -> RemoteFile:
        published = {"md5": info.get("md5Hash"), "crc32c": info.get("crc32c")}  # composite objects have no md5
        sums = {name: base64.b64decode(value).hex() for name, value in published.items() if value}
        return RemoteFile(name=_name(info["name"], self._root), size=info["size"], sums=sums, path=info["name"])

    def open(self, file: RemoteFile, block: int) -> Any:
        return self._system.open(file.path, "rb", block_size=block, cache_type="none")

    def explain(self, error: Exception) -> BadInput | None:
        import aiohttp
        import requests
        from gcsfs.retry import HttpError  # pyright: ignore[reportMissingImports]
        from google.auth.exceptions import GoogleAuthError

        code = str(getattr(error, "code", "")) if isinstance(error, HttpError) else ""
        if code in ("401", "403") or isinstance(error, GoogleAuthError) or "Forbidden" in str(error)[:20]:
            return BadInput(f"{self.url}: access denied; `gcloud auth application-default login`, and try again")
        if isinstance(error, FileNotFoundError):
            return BadInput(f"{self.url}: nothing there; check the address")
        faults = (HttpError, aiohttp.ClientError, requests.RequestException, ConnectionError, TimeoutError)
        return Unreachable(f"no connection to {_host(self._address)}") if isinstance(error, faults) else None


def _name(path: str, root: str) -> str:
    """`path` below `root`. Raises `BadInput` for one that would leave the folder it is written to."""
    name = path.removeprefix(f"{root}/")
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or "\\" in name or not name.isprintable() or os.path.isabs(name):
        raise BadInput(f"{root}: {path[:80]!r} is no name for a file below a folder; nothing was fetched")
    return name


def _host(address: str) -> str:
    return re.sub(r"^\w+://", "", address).split("/")[0]
