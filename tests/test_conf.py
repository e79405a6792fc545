"""The configuration: every file composes, the knobs are frozen, an experiment wins."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from evit import commands as cli
from evit.config import CONF_DIR, Recipe, folder_name

GROUP_FILES = sorted(CONF_DIR.glob("*/[a-z]*.yaml"))
SCALES = sorted(CONF_DIR.glob("scale/*/*.yaml"))
KNOBS = set(OmegaConf.load(CONF_DIR / "config.yaml")) - {"defaults", "hydra"}
EXPERIMENTS = sorted(path.stem for path in CONF_DIR.glob("experiment/*.yaml"))


@pytest.fixture(autouse=True)
def resolvers(monkeypatch):
    cli.register()
    monkeypatch.delenv("IMAGENET_DIR", raising=False)


def composed(*overrides: str, config: str = "config", folder: Path = CONF_DIR, **kwargs):
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(config, list(overrides), **kwargs)


def test_the_knobs_are_these():
    """A new knob is a decision: it goes into the README too."""
    assert KNOBS == {
        *("name", "keep_rate", "fusion", "img_size", "seed", "checkpoint", "pretrained"),
        *("compile", "overwrite", "resume", "checkpoint_every_n_steps", "dry_run"),
        "keep_checkpoint_every_n_epochs",
    }


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_group_file_composes(path):
    group, name = path.parent.name, path.stem
    config = OmegaConf.to_container(
        composed(f"{group}={name}"), resolve=True, throw_on_missing=True
    )
    assert config["keep_rate"] == 0.7


def test_the_knobs_of_a_sweep_are_these():
    """None of them is one of a run: what is not a knob of the sweep is for its runs."""
    knobs = set(OmegaConf.load(CONF_DIR / "sweep.yaml"))
    assert knobs == {"job", "slots", "dry_run", "launcher", "slurm"}
    assert knobs & KNOBS == {"dry_run"}


@pytest.mark.parametrize("config", ["config", "evaluate", "benchmark", "search"])
def test_the_environment_says_where_runs_go(config, monkeypatch):
    monkeypatch.setenv("EVIT_OUTPUT", "/scratch/me")
    cfg = composed(config=config, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    assert cfg.hydra.run.dir == f"/scratch/me/{cfg.name}/default"
    assert composed(config="report").runs == "/scratch/me"


def test_prepare_composes():
    cfg = composed("source=/photos", config="prepare")
    assert OmegaConf.to_container(cfg)["target"] is None


def test_the_knobs_of_an_evaluation_are_these():
    assert set(OmegaConf.load(CONF_DIR / "evaluate.yaml")) - {"defaults", "hydra"} == {
        *("checkpoint", "name", "keep_rate", "keep_rates", "fusion", "selection", "img_size"),
        *("crop_pct", "max_val_images", "batch_size", "seed", "gmacs", "compile"),
        "model",
    }


def test_an_evaluation_composes_with_every_value_open_that_a_run_can_give():
    cfg = composed("checkpoint=a.ckpt", config="evaluate")
    knobs = ("keep_rate", "keep_rates", "fusion", "img_size", "crop_pct", "max_val_images")
    assert [cfg[knob] for knob in knobs] == [None] * 6
    assert cfg.model == {} and cfg.selection is None


def test_report_composes():
    cfg = composed(config="report")
    assert (cfg.runs, cfg.target, cfg.page) == ("outputs", None, True)


def test_a_benchmark_and_an_export_compose():
    assert composed(config="benchmark").models == ["evit_deit_small_patch16"]
    assert composed("keep_rate=0.5", config="export").model == {}


def test_a_picture_and_a_dashboard_compose():
    assert composed("keep_rate=0.5", config="visualize").images is None
    assert composed(config="dashboard").project == composed().logger.project


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_value_that_an_experiment_sets_is_the_value_composed(name):
    content = yaml.safe_load((CONF_DIR / "experiment" / f"{name}.yaml").read_text())
    cfg = composed(f"experiment={name}")
    defaults = content.pop("defaults", [])
    assert content
    assert OmegaConf.merge(cfg, content) == cfg
    for entry in defaults:
        ((group, choice),) = entry.items()
        group = group.removeprefix("override /")
        own = yaml.safe_load((CONF_DIR / group / f"{choice}.yaml").read_text())
        own.pop("defaults", None)
        raw = OmegaConf.to_container(cfg[group], resolve=False)
        for key in own.keys() - content.get(group, {}).keys():
            value = own[key]
            assert raw[key] == value or float(raw[key]) == float(value), (group, key)


def test_the_command_line_wins_over_an_experiment():
    assert composed("experiment=fashion_mnist", "img_size=56").img_size == 56


@pytest.mark.parametrize("group", sorted({path.parent.name for path in GROUP_FILES}))
def test_every_file_opens_with_what_it_is_for(group):
    for path in CONF_DIR.glob(f"{group}/*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ") and len(lines[0]) > 25 or lines[1].startswith("# ")


def test_the_model_and_the_data_follow_the_knobs():
    cfg = composed("keep_rate=0.5", "img_size=304", "fusion=false")
    reducer = cfg.model.reducer
    assert (reducer.keep_rate, cfg.model.img_size, reducer.fusion) == (0.5, 304, False)
    assert cfg.data.img_size == 304


def test_a_keep_rate_for_each_reorganization():
    assert composed("keep_rate=[0.9,0.7,0.5]").model.reducer.keep_rate == [0.9, 0.7, 0.5]


@pytest.mark.parametrize("typo", ["keeprate=0.5", "recipe.epoch=3"])
def test_hydra_refuses_a_knob_that_is_not_there(typo):
    with pytest.raises(ConfigCompositionException):
        composed(typo)


@pytest.mark.parametrize(
    ("overrides", "epochs", "batch_size", "max_train_images"),
    [
        ([], 1, 32, 512),
        (["data.root=/photos"], 30, 32, None),
        (["data=folder", "data.root=/photos"], 30, 32, None),
        (["data=imagenet", "data.root=/imagenet"], 300, 2048, None),
        (["data=imagenet"], 300, 2048, None),
    ],
)
def test_the_default_recipe_fits_the_data(overrides, epochs, batch_size, max_train_images):
    recipe: Recipe = OmegaConf.to_object(scaled(*overrides).recipe)
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch_size)
    assert recipe.max_train_images == max_train_images
    assert scaled(*overrides, "recipe.epochs=7").recipe.epochs == 7
    assert scaled(*overrides, "scale=published").recipe.epochs == 300


def scaled(*overrides: str):
    """As src/train.py composes it."""
    return composed(*cli.with_scale(list(overrides)))


@pytest.mark.parametrize("path", SCALES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_scale_of_a_recipe_has_its_values(path):
    scale, recipe = path.parent.name, path.stem
    published, found = composed(f"recipe={recipe}"), composed(f"recipe={recipe}", f"scale={scale}")
    raw = OmegaConf.to_container(found.recipe, resolve=False)
    for key, value in yaml.safe_load(path.read_text()).items():
        if key != "defaults":
            assert raw[key] == value or float(raw[key]) == float(value), key
    assert found.recipe != published.recipe
    assert found.recipe.batch_size == 32


def test_a_scale_wins_over_an_experiment_and_leaves_other_recipes_alone():
    assert scaled("experiment=deit_s", "data=auto", "data.root=/x").recipe.batch_size == 32
    assert scaled("experiment=deit_s").recipe.batch_size == 1024
    own = scaled("recipe=fashion_mnist", "data.root=/x").recipe
    assert own == composed("recipe=fashion_mnist").recipe


def test_of_a_multirun_the_first_value_chooses_the_scale():
    words = cli.with_scale(["-m", "keep_rate=0.5,0.7", "data.root=/a,/b"])
    assert words == ["-m", "keep_rate=0.5,0.7", "data.root=/a,/b", "scale=own"]


def test_imagenet_dir_in_the_environment_makes_it_the_published_recipe(monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", "/imagenet")
    assert composed().data.root == "/imagenet"
    assert scaled().recipe.epochs == 300
    assert scaled("data.root=/imagenet/").recipe.epochs == 300
    assert scaled("data.root=/photos").recipe.epochs == 30


@pytest.mark.parametrize(("name", "repeats"), [("deit", 3), ("lvvit", 1), ("dynamicvit", 1)])
def test_the_published_recipes_augment_and_small_data_is_not_repeated(name, repeats):
    for data, expected in (["data=imagenet"], repeats), (["data=folder", "data.root=/i"], 1):
        recipe = scaled(f"recipe={name}", *data).recipe
        assert (recipe.rand_augment, recipe.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
        assert recipe.repeated_augmentations == expected


def test_run_folders_say_what_was_overridden_and_have_no_separators():
    assert folder_name("") == "default"
    assert folder_name("data.root-/a/b+keep_rate-[1,0.5]") == "data.root-_a_b+keep_rate-_1_0.5_"
    named = folder_name(f"data.root-/für/{'x' * 100}+keep_rate-0.5+seed-3")
    assert named.startswith("seed-3+keep_rate-0.5+data.root-_f_r_x") and named.isascii()
    assert folder_name("a-ü") != folder_name("a-ä")
    long = [folder_name(f"data.root={'x' * 300}{i}") for i in range(2)]
    assert len(set(long)) == 2 and max(map(len, long)) < 200


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("epochs", [1, 10, 600])
def test_schedules_given_in_epochs_scale_with_the_epochs_unless_they_are_given(name, epochs):
    published = OmegaConf.to_object(composed(f"experiment={name}").recipe)
    cfg = composed(f"experiment={name}", f"recipe.epochs={epochs}")
    recipe: Recipe = OmegaConf.to_object(cfg.recipe)
    share = epochs / published.epochs
    assert recipe.warmup_epochs == pytest.approx(published.warmup_epochs * share)
    for knob in ("shrink_start_epoch", "shrink_epochs", "cooldown_epochs"):
        assert getattr(recipe, knob) == round(getattr(published, knob) * share)
    assert composed(f"recipe.epochs={epochs}", "recipe.warmup_epochs=5").recipe.warmup_epochs == 5
