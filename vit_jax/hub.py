# SPDX-License-Identifier: Apache-2.0
"""``hf://owner/name[@revision][/file or folder]``, through huggingface_hub.

The cache is the one that transformers and datasets use. HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean there; downloads resume, and what is
cached is used where the Hub cannot be reached.
"""

import functools
import glob
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm.auto import tqdm

from vit_jax.errors import UserError, one_line


def parsed(url: str) -> tuple[str, str, str]:
    """(owner/name, revision or "", file or folder or "")"""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*?))?/?", url)
    if not match:
        raise UserError(f"{url}: write hf://OWNER/NAME or hf://OWNER/NAME/FILE")
    repo, revision, inside = match.groups(default="")
    return repo, urllib.parse.unquote(revision), inside


def repository(repo: str, kind: str = "model") -> tuple[Any, Callable[..., str]]:
    """The API, and ``snapshot_download`` of a repository of a kind: model or dataset."""
    client = api()
    get = functools.partial(
        client.snapshot_download,
        repo,
        repo_type=kind,
        cache_dir=cache(),
        tqdm_class=_Bar,
    )
    return client, get


def api() -> Any:
    """Of the Hub, or of the server that HF_ENDPOINT names."""
    from huggingface_hub import HfApi

    # None: what it has read from the environment when it was imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="vit_jax")


def cache() -> str | None:
    """None: where huggingface_hub itself looks."""
    return os.environ.get("HF_HUB_CACHE")


def names(api: Any, repo: str, root: Path, kind: str = "model") -> list[str]:
    """All files of the commit; those in the cache if the Hub cannot be asked."""
    try:
        return sorted(api.list_repo_files(repo, revision=root.name, repo_type=kind))
    except Exception:  # of the network, in whichever library carries it
        files = (p for p in root.rglob("*") if p.is_file())
        return sorted(str(PurePosixPath(p.relative_to(root))) for p in files)


def exactly(names: list[str]) -> list[str]:
    """Patterns that match these names alone."""
    return [glob.escape(name) for name in names if name]


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Errors of the Hub as one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as e:
        why = "ask for access on its page, and set HF_TOKEN"
        raise UserError(f"{url} is gated: {why}") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(
            f"{url}: there is no such repository, or it is private: check the spelling, "
            "or set HF_TOKEN if your account may read it"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"{url}: the repository has no such revision") from e
    except errors.LocalEntryNotFoundError as e:
        why = one_line(e.__cause__ if isinstance(e.__cause__, Exception) else e)
        raise UserError(
            f"{url} is not in the cache and cannot be downloaded ({why}): is there a "
            "network? Alternatives: a local path, or an https:// URL of a mirror"
        ) from e
    except Exception as e:  # of the network, in whichever library carries it
        raise UserError(f"{url} cannot be downloaded: {one_line(e)}") from e


class _Bar(tqdm):
    """Progress on a terminal only."""

    def __init__(self, *args: Any, **settings: Any):
        settings.pop("name", None)
        super().__init__(*args, **{**settings, "disable": None})
