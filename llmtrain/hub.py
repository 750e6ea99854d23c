"""Whether the Hugging Face hub, or what stands in its place, can be reached."""

import os
import urllib.error
import urllib.request
from functools import cache

HUB = "https://huggingface.co"
WAIT_SECONDS = 4


def endpoint() -> str:
    """The hub's address, or the mirror's that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


@cache
def go_offline_if_unreachable() -> None:
    """Have its library look into its cache alone where nothing answers.

    By itself it would try for half a minute, and say so in a dozen lines.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not answers(endpoint()):
        constants.HF_HUB_OFFLINE = True


def is_offline() -> bool:
    """Whether the hub's library looks into its cache alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def answers(address: str) -> bool:
    """Whether a server answers at all, through a proxy where one is set."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=WAIT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
