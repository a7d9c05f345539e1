"""Models by their name on the Hugging Face Hub, `org/name` or `org/name@revision`: found in the local cache, or downloaded.

huggingface_hub knows where the cache lies and what its environment variables say; nothing is fetched unless asked for.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import MoecError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-][\w./-]*))?")
# what a compilation reads: no pickles, no code, no weights of other frameworks
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def hub_name(source: Path | str) -> tuple[str, str | None] | None:
    """Return the repository and the revision that a text names, if it may be the name of a model on the Hub."""
    found = _NAME.fullmatch(str(source))
    return None if found is None else (found[1], found[2])


def find_cached(source: Path | str) -> Path | None:
    """Return the folder of a model in the local cache; None if it is not there, or the text is no such name."""
    name = hub_name(source)
    if name is None:
        return None
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name[0], "config.json", revision=name[1])
        if isinstance(config, str):  # weights may be missing: some commands need none, the others say which
            return Path(config).parent
        return Path(snapshot_download(name[0], revision=name[1], local_files_only=True, allow_patterns=list(WANTED)))
    except (OSError, HFValidationError):  # a model that is not in the cache is an OSError too
        return None


def download_model(source: Path | str) -> Path:
    """Download a model into the local cache, or what of it has changed there, and return its folder.

    MoecError for a text that is no name, and where the Hub does not give the model.
    """
    name = hub_name(source)
    if name is None:
        what = "only a model on the Hugging Face Hub can be downloaded"
        raise MoecError(
            what, str(source), todo="give its name, as in allenai/OLMoE-1B-7B-0924, or leave out --download"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name[0], revision=name[1], allow_patterns=list(WANTED)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        todo = "check the name, the network and, for a model that asks for consent, `hf auth login`"
        raise MoecError(f"the model cannot be downloaded: {reason}", str(source), todo=todo) from error


def check_link(file: Path) -> None:
    """Raise MoecError for a file that is a link out of its folder to what has another name, such as a key or a password.

    The Hub's cache is a folder of links to its own files, and people make folders of links to the files of another model.
    """
    if not file.is_symlink():
        return
    folder, real = file.parent.resolve(), file.resolve()
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.name != file.name and not any(real.is_relative_to(place.resolve()) for place in (folder, cache)):
        what = f"{file.name} is a link to a file of another name outside of the checkpoint, which would be copied into the artifact"
        raise MoecError(what, where=str(file), todo="put the file itself there")
