"""The fast path: FFCV files, decoded and augmented in threads of compiled code.

FFCV is imported here, without its side effects, and nowhere else.
"""

# ruff: noqa: F401

from typing import Any

import numba
import torch

config: Any = numba.config

# Of numba's kinds of threads, "workqueue" aborts the process when two loaders run at once.
if config.THREADING_LAYER == "default":
    config.THREADING_LAYER = "threadsafe"
# Importing FFCV leaves PyTorch with one thread.
_torch_threads = torch.get_num_threads()
# FFCV keeps two numbers in numba's dictionary, which takes seconds to compile in every process.
_numba_dict, numba.typed.Dict = numba.typed.Dict, dict
try:
    from ffcv import types
    from ffcv.fields.rgb_image import get_random_crop
except (ImportError, OSError, ValueError) as error:
    raise ImportError(
        f"FFCV cannot be used here ({error}): run `make setup`, or install libopencv-dev, "
        "libturbojpeg0-dev, libjpeg-dev, pkg-config, g++ and libtbb12, then `pip install ffcv`"
    ) from error
finally:
    torch.set_num_threads(_torch_threads)
    numba.typed.Dict = _numba_dict
