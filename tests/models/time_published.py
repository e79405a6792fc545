"""How much faster EViT-DeiT-S is than the plain implementation beside this file, on the CPU.

    python tests/models/time_published.py [keep_rate]

Both have the same weights, and take turns at each batch size. Prints the median of the ratio over
the rounds, its quartiles, and how far the logits are apart.
"""

import sys

import timm
import torch
from published import published_forward

from evit.measure.speed import quartiles, take_turns, warm_up
from evit.measure.steps import inference_step

CPU, ROUNDS = torch.device("cpu"), 7


def main(keep_rate: float = 0.5) -> None:
    print(f"keep rate {keep_rate}, {torch.get_num_threads()} threads, times the published")
    print("batch  rest   ratio  quartiles      logits apart")
    for batch_size in (1, 2, 4, 8, 16, 32, 64):
        images = torch.randn(batch_size, 3, 224, 224)
        for fusion in (True, False):
            torch.manual_seed(0)
            name = "evit_deit_small_patch16"
            model = timm.create_model(name, keep_rate=keep_rate, fusion=fusion).eval()
            steps = [
                inference_step(lambda x, m=model: published_forward(m, x)[0], images),
                inference_step(model, images),
            ]
            calls = [warm_up(step, 0.5, CPU) for step in steps]
            published, ours = take_turns(steps, calls, ROUNDS, CPU)
            low, median, high = quartiles(published / ours)
            with torch.no_grad():
                apart = (published_forward(model, images)[0] - model(images)).abs().max()
            kind = "fused" if fusion else "dropped"
            print(
                f"{batch_size:5d}  {kind:7s} {median:.2f}  {low:.2f} to {high:.2f}   {apart:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
