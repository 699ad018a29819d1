"""Data sets from the Hugging Face hub or its local cache.

HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the token of `hf auth login` are honoured: huggingface_hub and
`datasets` do the work. A failed download is a DataError that gives the reason in one line.
"""

import functools
import os
import re
import sys

from support.tables import DataError


@functools.cache
def unreachable() -> bool:
    """True if the hub does not answer within five seconds; then the libraries are switched to offline mode.

    Otherwise they would retry for minutes.
    """
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=5)
        return False
    except requests.RequestException:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return True


def hub_file(repo: str, file: str) -> str:
    """The path of a data set's file in the hub's cache; downloads it if necessary."""
    unreachable()
    try:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repo, file, repo_type="dataset")
    except Exception as error:  # about ten types: network, disk, permissions
        raise DataError(why_not(error, repo)) from None


def hub_rows(repo: str, config: str | None = None, *, split: str) -> list[dict]:
    """The rows of one split of a data set.

    Without a network `datasets` finds its own cache, but not that of the hub, where `hf download` puts files.
    """
    unreachable()
    try:
        from datasets import load_dataset
        from huggingface_hub import snapshot_download

        try:
            return list(load_dataset(repo, config, split=split))
        except Exception as error:
            try:
                folder = snapshot_download(repo, repo_type="dataset", local_files_only=True)
            except Exception:
                raise error from None
            return list(load_dataset(folder, config, split=split))
    except Exception as error:
        raise DataError(why_not(error, repo)) from None


def why_not(error: Exception, repo: str) -> str:
    """The reason of a failed download in one line, with what to do if that is known."""
    from huggingface_hub import constants, errors

    text = " ".join(str(error).split()) or type(error).__name__
    if type(error) is errors.RepositoryNotFoundError:  # a GatedRepoError is one, too
        return f"{repo} is not on the hub, or private (then run `hf auth login`)"
    if isinstance(error, errors.GatedRepoError) or "gated" in text:
        return f"{repo} is gated: accept its terms on its page, then run `hf auth login`"
    if "scripts are no longer supported" in text:
        return f"{repo} comes as a script, which `datasets` does not run any more"
    not_cached = isinstance(error, errors.LocalEntryNotFoundError)
    if not_cached or re.search("LocalEntryNotFoundError|[Oo]ffline", text):
        offline = "HF_HUB_OFFLINE is set, and it is not in the hub's cache"
        return offline if constants.HF_HUB_OFFLINE and not unreachable() else "no connection"
    return text[:150]
