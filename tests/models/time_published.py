"""How much faster EViT-DeiT-S is than the plain implementation beside this file, on the CPU.

    python tests/models/time_published.py [keep_rate]

Both have the same weights and take turns. Each batch size has a process of its own, as the memory
allocator adapts to what it served before. Prints the median of the ratio over the rounds, its
quartiles, and how far the logits are apart.
"""

import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import timm
import torch
from published import published_forward

from evit.measure.speed import make_step, take_turns, warm_up

CPU, ROUNDS = torch.device("cpu"), 15


def compare(batch_size: int, keep_rate: float, fusion: bool) -> str:
    images = torch.randn(batch_size, 3, 224, 224)
    model = timm.create_model("evit_deit_small_patch16", keep_rate=keep_rate, fusion=fusion).eval()
    steps = [
        make_step(model, lambda x: published_forward(model, x)[0], images, None),
        make_step(model, model, images, None),
    ]
    calls = [warm_up(step, 0.5, CPU) for step in steps]
    published, ours = take_turns(steps, calls, ROUNDS, CPU)
    low, median, high = np.percentile(published / ours, [25, 50, 75])
    with torch.no_grad():
        apart = (published_forward(model, images)[0] - model(images)).abs().max()
    rest = "fused" if fusion else "dropped"
    return f"{batch_size:5d}  {rest:7s} {median:.2f}  {low:.2f} to {high:.2f}   {apart:.1e}"


def main(keep_rate: float = 0.5) -> None:
    print(f"keep rate {keep_rate}, {torch.get_num_threads()} threads, times the published")
    print("batch  rest   ratio  quartiles      logits apart")
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as executor:
        for batch_size in (1, 2, 4, 8, 16, 32, 64):
            for fusion in (True, False):
                row = executor.submit(compare, batch_size, keep_rate, fusion).result()
                print(row, flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
