"""Recipes, streams and data modules of the tests."""

from dataclasses import fields

from evit.config import Recipe
from evit.data import Folder

KNOBS = {field.name for field in fields(Recipe)}


def recipe_of(**knobs):
    return Recipe(**dict(epochs=1, lr=1.0, batch_size=8) | knobs)


def apart(options):
    """The options that are knobs of a recipe, and the others."""
    ours = {name: value for name, value in options.items() if name in KNOBS}
    return ours, {name: value for name, value in options.items() if name not in KNOBS}


def module(kind, *arguments, **options):
    """A data module, whose recipe's knobs stand among its options."""
    knobs, rest = apart(dict(img_size=28, batch_size=4) | options)
    return kind(*arguments, recipe=recipe_of(**knobs), **rest)


def folder(root, cache_dir, **options):
    """Folder, ready to be read."""
    data = module(Folder, root, cache_dir=cache_dir, **options)
    data.prepare_data()
    data.setup()
    return data


def stream(path, train=True, *, rank=0, world_size=1, seed=0, **options):
    """FFCVStream of 32 px in batches of 8."""
    from evit.data.ffcv.stream import FFCVStream
    from evit.data.order import Shard

    knobs, rest = apart(options)
    size = knobs.pop("batch_size", 8)
    recipe = recipe_of(**knobs, batch_size=size * world_size)
    shard = Shard(rank, world_size, size, seed)
    rest = dict(img_size=32) | rest
    return FFCVStream(path, recipe=recipe, shard=shard, train=train, **rest)
