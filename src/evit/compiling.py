"""torch.compile keeps what it has compiled for the next process, in a folder of one's own."""

import os
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir


def private_cache() -> None:
    """Make sure that nobody else could have put something into the cache of torch.compile.

    By default that is a folder of /tmp with a name that can be guessed, with libraries and pickles.

    Raises:
        ValueError: it is another user's, or all may write to it.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = Path(default_cache_dir())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        raise ValueError(
            f"{folder}, where torch.compile keeps code, is not yours alone: remove it, or set "
            f"TORCHINDUCTOR_CACHE_DIR to a folder of your own"
        )
