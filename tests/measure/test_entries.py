"""Which models are timed, by the names that users give them."""

import pytest

from evit.measure.speed import Entry, build, choose, dense, facts

KNOBS: dict = dict(paper=None, keep_rates=[0.5], fusion=[True], img_sizes=[32])
TINY = "evit_deit_tiny_patch16"


def chosen(*models, reducers=None, **knobs):
    own = dict(models=[(model, {}) for model in models], reducers=reducers or {None: {}})
    return choose(KNOBS | own | knobs)


def test_every_reduced_model_has_its_dense_model_and_itself_with_every_token():
    found = chosen(TINY, fusion=[True, False])
    base = Entry("deit_tiny_patch16_224", img_size=32, dense=True)
    whole, *reduced = (entry for entry in found if not entry.dense)
    assert set(found.values()) == {base} and whole == Entry(TINY, img_size=32)
    assert [entry.fusion for entry in reduced] == [True, False]


def test_an_lvvit_that_keeps_every_token_is_its_dense_model():
    found = [(e.model, e.dense) for e in chosen("evit_lvvit_t", keep_rates=[1, 0.5])]
    assert found == [("lvvit_t", True), ("evit_lvvit_t", False)]


def test_a_shortcut_chooses_the_rows_of_the_paper():
    found = choose(dict(paper="lvvit_s"))
    assert len(found) == 10
    assert set(found.values()) == {Entry("lvvit_s", dense=True)}
    assert Entry("evit_lvvit_s", 0.7, True, 448) in found
    assert [entry.img_size for entry in found if entry.dense] == [224, 384]


FAMILIES = dict(
    evit_deit_base_patch16="deit_base_patch16_224",
    dynamicvit_deit_small_patch16="deit_small_patch16_224",
    evit_lvvit_m="lvvit_m",
    dynamicvit_lvvit_s="lvvit_s",
    deit3_small_patch16_224="deit3_small_patch16_224",
)


@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_has_its_dense_model(model):
    assert dense(Entry(model)).model == FAMILIES[model]


def test_any_timm_model_is_reduced_beside_timm_s_own():
    entry = Entry("deit_tiny_patch16_224", 0.5, True, 32)
    assert hasattr(build(entry), "reducer") and not hasattr(build(dense(entry)), "reducer")
    assert facts(dense(entry))["macs"] == facts(Entry(entry.model, img_size=32))["macs"]


def test_reducers_are_entries_beside_each_other():
    evit, tome = dict(_target_="evit.reducers.EViT"), dict(_target_="evit.reducers.ToMe")
    nodes = dict(evit=evit | dict(fusion=None, keep_rate=None), tome=tome | dict(keep_rate=None))
    found = chosen("deit_tiny_patch16_224", TINY, reducers=nodes, fusion=[False])
    own, other, *both = (entry for entry in found if entry.keep_rate != 1)
    assert [(e.reducer, e.fusion) for e in (own, other)] == [("evit", False), ("tome", None)]
    models = [build(entry) for entry in (own, other, *both)]
    assert [model.reducer.name for model in models] == ["evit", "tome"] * 2
    assert {model.keep_rate for model in models} == {(0.5,) * 3} and not models[0].fusion
    assert "deit_tiny_patch16_224 tome keep_rate=0.5" in str(other)
