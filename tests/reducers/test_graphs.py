"""One graph, compiled and exported: token counts are static."""

import onnxruntime
import pytest
import torch

from evit.reducers import REDUCERS
from tests.reducers.tiny import images, reduced, run, vit

NAMES = sorted(set(REDUCERS) - {"topk"})  # which is drop
every = pytest.mark.parametrize("name", NAMES)


def shallow(name):
    """Two reductions and a block after them: what is traced is the time of these tests."""
    return reduced(name, vit(depth=3), at=(0, 1), counts=[40, 24])


@every
@torch.no_grad()
def test_it_is_one_graph_with_any_batch(name):
    """Exported with a batch of any size: equal at another; that is one graph without a break."""
    model = shallow(name)
    batch = {"x": {0: torch.export.Dim("batch", min=1)}}
    exported = torch.export.export(model, (images(4),), dynamic_shapes=batch).module()
    for size in (1, 3):
        expected = run(model, images(size))
        torch.testing.assert_close(run(exported, images(size)), expected, atol=1e-5, rtol=0)


@every
@torch.no_grad()
def test_it_compiles_to_one_graph(name):
    model, x = shallow(name), images()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(run(compiled, x), run(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "tome"])
@torch.no_grad()
def test_onnx_computes_the_same(name, tmp_path):
    model, path = shallow(name), tmp_path / "model.onnx"
    batch = {"x": {0: torch.export.Dim("batch", min=1)}}
    torch.onnx.export(
        model, (images(4),), path, dynamo=True, dynamic_shapes=batch, input_names=["images"]
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images(3).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images(3)), atol=1e-4, rtol=0)
