"""FFCV, imported without its side effects. Import it from here and nowhere else."""

# ruff: noqa: F401

from typing import Any

import numba
import torch

config: Any = numba.config

# Importing FFCV starts numba's threads and leaves PyTorch with one. Of numba's kinds of threads,
# "workqueue" aborts the process when two loaders run at once.
if config.THREADING_LAYER == "default":
    config.THREADING_LAYER = "threadsafe"
_torch_threads = torch.get_num_threads()
# FFCV keeps two numbers in numba's dictionary, which takes seconds to compile in every process.
_numba_dict, numba.typed.Dict = numba.typed.Dict, dict
try:
    from ffcv import types
    from ffcv.fields.rgb_image import get_random_crop
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage
except (ImportError, OSError, ValueError) as error:
    raise ImportError(
        f"FFCV cannot be used here ({error}): run `make setup`, or install libopencv-dev, "
        "libturbojpeg0-dev, libjpeg-dev, pkg-config, g++ and libtbb12, then `pip install ffcv`"
    ) from error
finally:
    torch.set_num_threads(_torch_threads)
    numba.typed.Dict = _numba_dict


def _set_num_threads(num_threads: int) -> None:
    Compiler.num_threads = num_threads
    numba.set_num_threads(num_threads)


# FFCV's own sets PyTorch's threads too, for every loader and every epoch.
Compiler.set_num_threads = _set_num_threads
