"""conf/reducer: every method is there, with every option that it has."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from evit import reducers
from evit.commands import register
from evit.config import CONF_DIR
from evit.models import create_model

MICRO = "model=evit_deit_micro img_size=28"


@pytest.fixture
def composed():
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides)


@pytest.mark.parametrize(
    "kind", dict.fromkeys(reducers.REDUCERS.values()), ids=lambda kind: kind.name
)
def test_every_option_of_a_method_is_a_knob_with_its_default(kind, composed):
    cfg = composed(*MICRO.split(), f"reducer={kind.name}", "keep_rate=0.6")
    assert set(cfg.reducer) == reducers.options(kind) | {"_target_"}
    model = instantiate(cfg.model)
    assert type(model.reducer) is kind and model.keep_rate == (0.6,) * 3
    default = create_model("evit_deit_tiny_patch16", reducer=kind.name, keep_rate=0.6)
    assert model.reducer.extra_repr() == default.reducer.extra_repr()


@pytest.mark.parametrize(
    ("overrides", "name", "keep_rate"),
    [
        ("model=deit img_size=32", "evit", (1.0,) * 3),
        ("model=lvvit img_size=32", "evit", (1.0,) * 3),
        ("model=evit_lvvit img_size=32 reducer=tome", "tome", (0.7,) * 3),
        ("model=timm_vit img_size=32 reducer=merge", "merge", (0.7,) * 3),
        ("model=dynamicvit_deit_micro img_size=28", "dynamicvit", (0.7,) * 3),
        ("model=dynamicvit_deit_micro img_size=28 reducer=drop", "drop", (0.7,) * 3),
        ("experiment=dynamicvit_deit_s img_size=32", "dynamicvit", (0.7,) * 3),
        (f"{MICRO} reducer.at=[2,5] fusion=false", "evit", (0.7,) * 2),
        (f"{MICRO} reducer.counts=[12,8,2]", "evit", (12 / 16, 8 / 12, 2 / 8)),
    ],
)
def test_the_reducer_of_a_model(overrides, name, keep_rate, composed):
    model = instantiate(composed(*overrides.split()).model)
    assert (model.reducer.name, model.keep_rate) == (name, keep_rate)


def test_places_stand_at_the_reducer(composed):
    with pytest.raises(Exception, match="drop_loc is the reducer's"):
        instantiate(composed(*MICRO.split(), "+model.drop_loc=[2]").model)
