# SPDX-License-Identifier: Apache-2.0
"""Models of the Hub: downloads of what is needed of a repository, and uploads."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from vit_jax import hub
from vit_jax.errors import UserError, one_line

# What is known about a model besides its weights, in its folder.
_BESIDE = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def download(
    url: str, choose: Callable[[Path, list[str]], list[str]], weights: bool
) -> Path:
    """The local file or folder that ``url`` names, with what is needed of it.

    Args:
      url: ``hf://owner/name[@revision][/file or folder]``.
      choose: which files of a folder hold the weights; called with the local folder,
        where the config files are already, and all names in the folder at the Hub.
      weights: whether to download more than the config files.

    Raises:
      UserError: there is no such thing, it may not be read, or the Hub cannot be
        reached and it is not in the cache.
    """
    repo, revision, inside = hub.parsed(url)
    with hub.explained(url):
        api, get = hub.repository(repo)
        beside = [_join(d, n) for d in (inside, _parent(inside)) for n in _BESIDE]
        beside.append(str(PurePosixPath(inside).with_suffix(".json")) if inside else "")
        root = Path(get(revision=revision or None, allow_patterns=hub.exactly(beside)))
        names = hub.names(api, repo, root)
        if inside in names:
            wanted = [inside]
        else:
            start = f"{inside}/" if inside else ""
            under = [n.removeprefix(start) for n in names if n.startswith(start)]
            under = [n for n in under if "/" not in n]
            if not under:
                raise UserError(f"{url}: there is no {inside!r} among {names[:8]}")
            wanted = [_join(inside, n) for n in choose(root / inside, under)]
        if weights:
            # By the commit: between two requests the branch may move.
            get(revision=root.name, allow_patterns=hub.exactly(wanted))
    return root / inside


def upload(url: str, folder: Path, private: bool = False, update: bool = False) -> str:
    """Makes a repository of the files in ``folder``; returns the address of its page.

    Args:
      url: ``hf://owner/name``.
      folder: what it will hold.
      private: whether only its owner sees it; of a new repository.
      update: whether it may exist; what is there stays in its history.

    Raises:
      UserError: no token, the name is taken or not yours, or the Hub cannot be reached.
    """
    from huggingface_hub import errors, get_token

    repo = new_repository(url)
    if not get_token():
        raise UserError(
            f"{url} needs a token that may write: set HF_TOKEN, or run `hf auth login`"
        )
    api, created = hub.api(), False
    try:
        page = api.create_repo(repo, private=private or None, exist_ok=update)
        created = True
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model")
    except Exception as e:  # of the network, in whichever library carries it
        refused = isinstance(e, errors.HfHubHTTPError)
        said = refused and e.server_message
        reason = Exception(said) if said else e if refused else e.__cause__ or e
        why = _REFUSALS.get(e.response.status_code if refused else 0, one_line(reason))
        again = " (the repository exists now: go on with --update)" * created
        raise UserError(f"{url} cannot be uploaded: {why}{again}") from e
    return str(page)


def new_repository(url: str) -> str:
    """The owner/name that can be uploaded to. Raises: UserError: ``url`` is no whole
    repository."""
    repo, revision, inside = hub.parsed(url)
    if revision or inside:
        raise UserError(f"{url}: a whole repository is uploaded: write hf://{repo}")
    return repo


_REFUSALS = {
    401: "the Hub does not accept the token: set HF_TOKEN to one that may write",
    403: "the token may not write there: is OWNER your account or organization?",
    409: "the name is taken: give another, or --update to replace what is there",
}


def in_cache(url: str) -> bool:
    """Whether weights of ``url`` were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    repo, revision, inside = hub.parsed(url)
    file = inside or "model.safetensors"
    found = try_to_load_from_cache(repo, file, hub.cache(), revision or None)
    return isinstance(found, str)


def _parent(inside: str) -> str:
    return str(PurePosixPath(inside).parent) if "/" in inside else ""


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
