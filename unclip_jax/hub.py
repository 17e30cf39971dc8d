"""Reads and writes models on the Hugging Face Hub: hf:OWNER/NAME, hf:OWNER/NAME/FOLDER, and either with @REVISION.

Only configs, safetensors and tokenizers are ever fetched, never a pickle. They are kept in huggingface_hub's own cache,
and loaded as any bundle is, by its sha256. Who is logged in, and where the Hub is, is that library's business: see its
`hf auth login`, HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from unclip_jax.errors import UserError

PREFIX = "hf:"
ENDINGS = (".json", ".safetensors", ".model")  # of the files of bundles


class Place(NamedTuple):
    """A folder of a repository on the Hub. folder: "" for the whole. revision: branch, tag or commit; None: main."""

    repository: str
    folder: str
    revision: str | None


def place(text: str) -> Place:
    """Reads hf:OWNER/NAME[/FOLDER][@REVISION]. Raises UserError for another form."""
    name = r"[A-Za-z0-9_][\w.-]*"
    found = re.fullmatch(rf"hf:({name}/{name})((?:/{name})*)(?:@([\w./-]+))?", text)
    if not found:
        raise UserError(f"{text}: expected hf:OWNER/NAME, with /FOLDER or @REVISION behind it if need be")
    return Place(found[1], found[2].strip("/"), found[3])


@functools.cache
def pull(text: str) -> Path:
    """Fetches what the cache lacks of a place on the Hub, once in each process; returns its folder on the disk.

    Raises UserError where there is no such place, or where the Hub cannot be reached and the cache lacks it.
    """
    from huggingface_hub import snapshot_download

    where = place(text)
    within = f"{where.folder}/" if where.folder else ""
    patterns = [f"{within}*{ending}" for ending in ENDINGS]
    if where.folder.endswith(ENDINGS):  # a file
        patterns.append(where.folder)
    with _hub_errors(text):
        folder = Path(snapshot_download(where.repository, revision=where.revision, allow_patterns=patterns))
    found = folder / where.folder
    if not found.exists():
        raise UserError(f"{text}: the repository {where.repository} has no {where.folder}")
    return found


def push(folder: Path, files: list[str], text: str, card: str, private: bool) -> str:
    """Uploads files of a folder, and then a README.md, to a repository, which is made if need be, and so is a branch;
    returns the address of the commit.

    files: by their places below the folder. Raises UserError where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    where, api = place(text), HfApi()
    if where.folder:
        raise UserError(f"{text}: give the whole repository, hf:OWNER/NAME")
    with _hub_errors(text):
        api.create_repo(where.repository, private=private, exist_ok=True)
        if where.revision:
            api.create_branch(where.repository, branch=where.revision, exist_ok=True)
        known = {"repo_id": where.repository, "revision": where.revision}
        api.upload_folder(folder_path=folder, allow_patterns=files, **known)
        done = api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **known)
    return str(done.commit_url)


@contextlib.contextmanager
def _hub_errors(text: str) -> Iterator[None]:
    """Turns errors of the Hub within the context into a UserError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{text}: there is no such repository, or it is private: run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{text}: the repository has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{text} cannot be reached, and is not in the cache: is this machine online?") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        said = str(error).strip().splitlines()
        raise UserError(f"{text}: the Hub says: {said[0] if said else type(error).__name__}") from error
    except Exception as error:
        # Errors of the library that huggingface_hub sends by, which is another from version to version.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests", "urllib3"):
            raise
        kind = type(error).__name__
        raise UserError(f"{text}: the Hub cannot be reached ({kind}): is this machine online?") from error
