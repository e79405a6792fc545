"""timm's models with the weights it downloads, or an error that says what to do without."""

import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants
from torch import nn

NETWORK = {"huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "urllib"}
# How timm's RuntimeErrors about a name begin.
WRONG_NAME = "Unknown model", "Invalid pretrained", "No pretrained weights"


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm.create_model, but what a user can mend is a ValueError.

    Raises:
        ValueError: there is no such model, timm has no weights of it, or they cannot be downloaded;
            without a network that is said at once.
    """
    unreachable = _unreachable() if pretrained else None
    offline = constants.HF_HUB_OFFLINE
    # Weights that are on disk already are still found, and nothing is tried again for a minute.
    constants.HF_HUB_OFFLINE = offline or unreachable is not None
    try:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    except RuntimeError as error:
        if not str(error).startswith(WRONG_NAME):
            raise
        raise ValueError(f"{error}: timm.list_models() has the names") from error
    except Exception as error:
        if isinstance(error, ValueError) or not (pretrained and _is_download(error)):
            raise
        reason = " ".join(str(unreachable or error).split()) or type(error).__name__
        raise ValueError(
            f"the pretrained weights of {model_name} cannot be downloaded ({reason}): connect to "
            f"the network, or download them elsewhere and give checkpoint=PATH instead"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _unreachable() -> OSError | None:
    """Why the server of timm's weights has no address here; None if it has one, or by a proxy."""
    if urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError as error:
        return error
    return None


def _is_download(error: Exception) -> bool:
    packages = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & NETWORK)
