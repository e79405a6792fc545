"""Start and end of every command: compose its knobs; turn usage errors into one line."""

import difflib
import gc
import importlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evit import files
from evit.config import CONF_DIR, RESOLVERS, Recipe, scale_of

# Commands that are a function in a file of another name; the others are `run` in their own.
FILES = dict(evaluate="use", visualize="use", predict="use", export="use", dashboard="report")
NOT_COMPOSED = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def main() -> None:
    """Run the command whose script was started: src/NAME.py or evit-NAME."""
    name = Path(sys.argv[0]).stem.removeprefix("evit-")
    if name == "sweep":  # it composes the configurations of many runs
        with ended_in_a_line():
            sys.exit(importlib.import_module("evit.commands.sweep").run(sys.argv[1:]))
    start(name, "config" if name == "train" else name)


def start(command: str, config: str) -> None:
    """Compose conf/CONFIG.yaml with the command line; then import the command and run it."""

    def run(cfg: DictConfig) -> Any:
        with ended_in_a_line():  # or Hydra adds a line of its own
            for knob in (name for name in map(str, cfg) if OmegaConf.is_missing(cfg, name)):
                raise ValueError(f"{knob}=... is needed: conf/{config}.yaml says what it is for")
            if (name := str(cfg.get("name"))).startswith(("/", "~")):
                raise ValueError(f"name={name} is in outputs/: for another, hydra.run.dir={name}")
            file = "plan" if cfg.get("dry_run") else FILES.get(command, command)
            work = importlib.import_module(f"evit.commands.{file}")
            gc.enable()
            return getattr(work, command if command in FILES else "run")(cfg)

    gc.disable()  # imports leave no garbage: 25 % less time until the work begins
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints errors itself
    with ended_in_a_line():
        register()
        try:
            sys.argv[1:] = arguments(sys.argv[1:], config)
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config)(run)()
        except NOT_COMPOSED as error:
            raise explained(error, config) from error
        finally:
            gc.enable()


def register() -> None:
    """Tell Hydra the schema of a recipe, and OmegaConf the resolvers of conf/."""
    ConfigStore.instance().store(name="schema", node=dict(recipe=Recipe))
    for resolver in RESOLVERS:
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def arguments(given: list[str], config: str) -> list[str]:
    """Prepare the command line for Hydra: quote and check overrides, add the scale."""
    parts = [word.split("=", 1) if word.startswith("--") else [word] for word in given]
    words = ["dry_run=true" if word == "--dry-run" else word for p in parts for word in p]
    words.sort(key=lambda word: "=" in word)  # argparse wants flags before all overrides, or after
    words = [word if word.startswith("-") else quoted(word) for word in words]
    check_spelling(words, config)
    asks = {"--help", "-h", "--hydra-help", "--info", "--shell-completion"} & set(words)
    return words if config != "config" or asks else with_scale(words)


def quoted(override: str) -> str:
    """Quote the value of an override if Hydra's grammar would refuse or trim it."""
    knob, equals, value = override.partition("=")
    with suppress(HydraException):
        OverridesParser.create().parse_override(override)
        if value == value.strip():
            return override
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{knob}='{escaped}'" if equals else override


def with_scale(words: list[str]) -> list[str]:
    """Add the scale that the data need, if none is given; in a multirun the first values decide."""
    overrides = [word for word in words if not word.startswith("-") and "=" in word]
    for option, folder in zip(words, words[1:], strict=False):
        if option in ("--config-dir", "-cd"):
            overrides.append(f"hydra.searchpath=['file://{Path(folder).absolute()}']")
    for i, one in enumerate(OverridesParser.create().parse_overrides(overrides)):
        if one.is_sweep_override():
            overrides[i] = f"{one.key_or_group}={next(one.sweep_string_iterator())}"
    return words + scale_of(composed("config", overrides))


def composed(config: str, overrides: list[str], scaled: bool = False) -> DictConfig:
    """A configuration of conf/, with `hydra` in it; scaled: as `with_scale` would have it."""
    register()
    options, begun = dict(version_base="1.3"), GlobalHydra.instance().is_initialized()
    with nullcontext() if begun else hydra.initialize_config_dir(str(CONF_DIR), **options):
        try:
            cfg = hydra.compose(config, overrides, return_hydra_config=True)
        except NOT_COMPOSED as error:
            raise explained(error, config) from error
    more = scale_of(cfg) if scaled else []
    return composed(config, overrides + more) if more else cfg


def knobs(config: str) -> dict[str, Any]:
    """The knobs of conf/CONFIG.yaml, its groups, and the knobs in these, with their defaults."""
    content: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / f"{config}.yaml"))
    chosen = [entry for entry in content.pop("defaults", []) if isinstance(entry, dict)]
    known = {group for entry in chosen for group in entry if " " not in group}
    for file in CONF_DIR.glob("*/*.yaml"):
        if (group := file.parent.name) in known - {"experiment", "scale"}:
            known |= {f"{group}.{n}" for n in re.findall(r"(?m)^([a-z]\w+):", file.read_text())}
    known |= {f"recipe.{name}" for name in Recipe.__dataclass_fields__ if "recipe" in known}
    return dict.fromkeys(known) | content


def check_spelling(overrides: list[str], config: str) -> None:
    """Refuse unknown knobs, with the nearest known one, and values of a wrong type."""
    known, wrong = knobs(config), str | list if config == "config" else str
    for override in overrides:
        if not (found := re.match(r"[+~]*(([\w-]+)[\w./@-]*)=", override)):
            continue
        path, root = found.groups()
        if root not in known:
            raise ValueError(f"unknown knob {root!r} in {override!r}: {nearest(root, known)}")
        kind = "true or false" if isinstance(known.get(path), bool) else "a number"
        if isinstance(known.get(path), int | float) and path not in ("keep_rate", "compile"):
            parsed = OverridesParser.create().parse_override(override)
            if not parsed.is_sweep_override() and isinstance(value := parsed.value(), wrong):
                raise ValueError(f"{path} must be {kind}, got {value!r}")


def nearest(name: str, known: Any) -> str:
    """Suggest the known name nearest to a misspelt one, else list its neighbours."""
    inside = [other for other in known if other.endswith(f".{name}")]
    if near := inside or difflib.get_close_matches(name, known, 1):
        return f"did you mean {near[0]}?"
    beside = [other for other in known if other.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"there are {', '.join(sorted(beside))}"


def explained(error: BaseException, config: str) -> ValueError:
    """Turn an error of composing into a ValueError of one line, with the way out."""
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file).replace("/", "=")
        options = [name for name in error.options if not name.startswith("_")]
        return ValueError(f"there is no {wanted}: {nearest(wanted.split('=')[-1], options)}")
    if found := re.match(r"Could not override '([\w.]+)'", str(error)):
        known = knobs(config)
        hint = f"+{found[1]}=... adds it" if found[1] in known else nearest(found[1], known)
        return ValueError(f"unknown knob {found[1]!r}: {hint}")
    texts = dict.fromkeys(str(e) for e in (error, error.__cause__) if e)
    return ValueError(" ".join(" ".join(texts).split()))


@contextmanager
def ended_in_a_line() -> Iterator[None]:
    """End the program with one line for a signal, a full disk, or a usage error."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in numbers}
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # tells here, and not at exit, whether anybody reads it
    except KeyboardInterrupt:
        terminate(signal.SIGINT)
    except Exception as error:
        (reader := select.poll()).register(1, 0)
        if isinstance(error, BrokenPipeError) and reader.poll(0):  # it has ended, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print goes nowhere
            sys.exit(128 + signal.SIGPIPE)
        text = mistake(error)
        if "TORCHELASTIC_RUN_ID" in os.environ and (os.environ["RANK"] != "0" or not text):
            time.sleep(20)  # torchrun ends this process where another has said why
        if not text:
            raise
        lines = map(files.printable, text.split("\n"))
        print("error:", "\n".join(lines), file=sys.stderr)
        sys.exit(2)
    finally:
        clear(run_folder().absolute())
        for number, handler in before.items():
            signal.signal(number, handler)


def clear(folder: Path) -> None:
    """Remove Hydra's folder of this run, and those around it in outputs/, if they are empty."""
    with suppress(OSError):
        ends = {Path.cwd(), Path(os.path.abspath(os.environ.get("EVIT_OUTPUT", "")))}
        while folder not in ends:
            folder.rmdir()
            folder = folder.parent if ends & {*folder.parents} else Path.cwd()


def mistake(error: BaseException) -> str | None:
    """The message of an error that the user can correct; None for others (traceback)."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("evit"):
        return f"{error.name} is not installed: pip install 'evit-lab[all]'"
    kinds: tuple[type[BaseException], ...] = (ValueError, FloatingPointError, ChildProcessError)
    if isinstance(error, InstantiationException) and error.__cause__:  # from a constructor
        error, kinds = error.__cause__, (ValueError, TypeError, ImportError)
    if isinstance(error, OmegaConfBaseException):  # a missing value, for example
        return " ".join(str(error).split())
    return files.refused(error, run_folder()) or (str(error) if isinstance(error, kinds) else None)


def terminate(number: int, _: Any = None) -> NoReturn:
    """End the program after a signal, with one line for a machine's processes; SIGUSR1 requeues."""
    job = os.environ.get("SLURM_JOB_ID")
    if number == signal.SIGUSR1 and job and os.environ.get("SLURM_PROCID") == "0":
        with suppress(OSError):  # some containers have no scontrol
            subprocess.run(["scontrol", "requeue", job])
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("SLURM_LOCALID", "0") == "0":
        goes_on = (run_folder() / "checkpoints/last.ckpt").is_file()
        text = f"stopped by {signal.Signals(number).name}" + ": the same command goes on" * goes_on
        with suppress(OSError):  # the terminal may be gone
            print(text, file=sys.stderr, flush=True)
    sys.exit(128 + number)


def run_folder() -> Path:
    """Hydra's folder for this run; the current folder before there is one."""
    known: Any = HydraConfig.get().runtime if HydraConfig.initialized() else {}
    return Path(known.get("output_dir") or "")
