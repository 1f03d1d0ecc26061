"""The model hub, on a machine that may have no network."""

from __future__ import annotations

from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from lowlevel.heartbeat import working

_unreached: list[str] = []  # the hub that did not answer, if offline mode was set here


def offline_without_network() -> None:
    """Set huggingface_hub's offline mode if the hub does not answer: what is cached is used, the rest fails at once.

    Without it, huggingface_hub 2.4 tries for 27 s before each file, also before those in its cache.
    """
    if constants.HF_HUB_OFFLINE and not _unreached:  # the user has set it
        return
    _unreached.clear()
    constants.HF_HUB_OFFLINE = False
    try:
        with working(f"waiting for {constants.ENDPOINT}"):
            _ask(constants.ENDPOINT)
    except Exception:  # of the HTTP client
        _unreached.append(constants.ENDPOINT)
        constants.HF_HUB_OFFLINE = True


@cache  # of an answer; an error is raised again
def _ask(address: str) -> None:
    get_session().head(address, timeout=10.0)
