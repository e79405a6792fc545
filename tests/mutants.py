"""Mutation testing: do the tests of a file notice small faults in it?

    python tests/mutants.py [FILE ...] [--count N] [--again]

Puts faults into a copy of the project, one at a time: another comparison or operator, a number one
larger, a condition negated, an argument, a call or a returned value left out. Of each file of
tests/mutants.yaml N are tried, a sample that is always the same. The tests beside it run until one
fails, in a process forked from one that has paid for the imports. results/mutants/ gets the counts,
and the faults that no test noticed; a reason why none can, written there by hand, is kept. --again
tries those without a reason alone, where the file is as it was.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "results" / "mutants"
TESTS = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())
IMPORTS = "PIL.Image lightning timm torch._dynamo torchmetrics.classification hydra numba ffcv"
PAIRS = (
    "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or, Add Sub, Mult Div, min max, any all, "
)
PAIRS += "argmin argmax, amin amax, floor ceil, zeros ones"
OTHER = dict(FloorDiv="Mult", Mod="Mult", Pow="Mult")
for a, b in map(str.split, PAIRS.split(", ")):
    OTHER |= {a: b, b: a}
UNTOUCHED = ast.Raise | ast.Assert | ast.JoinedStr | ast.Import  # messages, and what always holds


def changed(node: Any) -> Iterator[tuple[Any, str]]:
    """Parts of a node, each with the source that takes its place."""
    new = copy.copy(node)
    match node:
        case ast.Compare() | ast.BoolOp() | ast.BinOp() | ast.AugAssign():
            ops = getattr(node, "ops", None) or [node.op]
            for i, op in enumerate(ops):
                if other := OTHER.get(type(op).__name__):
                    new.op = getattr(ast, other)()
                    new.ops = [*ops[:i], new.op, *ops[i + 1 :]]
                    yield node, ast.unparse(new)
        case ast.UnaryOp():
            yield node, ast.unparse(node.operand)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, str(value + 1)
        case ast.Return(value=ast.expr()):
            yield node, "return None"
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in OTHER:
            new.id = new.attr = OTHER[name]
            yield node, ast.unparse(new)
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield test, f"not ({ast.unparse(test)})"
        case ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.Call(keywords=given):
            for i, keyword in enumerate(given):
                if keyword.arg not in (None, "device"):  # there is but one
                    new.keywords = [*given[:i], *given[i + 1 :]]
                    yield node, ast.unparse(new)


def parts(node: ast.AST, inside: str = "") -> Iterator[tuple[str, Any]]:
    """What may be changed, and the function it is in."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                if not isinstance(child, UNTOUCHED):
                    scope = inside
                    if isinstance(child, ast.ClassDef | ast.FunctionDef):
                        scope = f"{inside}.{child.name}"
                    yield scope, child
                    yield from parts(child, scope)


def mutants(source: str) -> dict[str, str]:
    """The source with one fault each, by "function: in a line: what -> what instead"."""
    data, lines = source.encode(), source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for scope, node in parts(ast.parse(source)):
        for old, new in changed(node):
            first = starts[old.lineno - 1] + old.col_offset
            last = starts[old.end_lineno - 1] + old.end_col_offset
            line = lines[old.lineno - 1].decode().strip()
            before = " ".join(data[first:last].decode().split())
            where = "" if line == before else f"in {line}: "
            name = f"{scope.strip('.')}: {where}{before} -> {new}"
            seen[name] += 1
            name += f" (#{seen[name]})" if seen[name] > 1 else ""
            text = f"({new})" if isinstance(old, ast.expr) else new
            found[name] = (data[:first] + text.encode() + data[last:]).decode()
    return found


def passes(tests: str, seconds: int) -> tuple[bool, float]:
    """Whether tests pass, in a process of their own with so much CPU time; and what they took."""
    if not (pid := os.fork()):
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(20 * seconds)  # of one that waits for ever
        os._exit(
            pytest.main(["-x", "-m", "not slow", "-p", "no:cacheprovider", *shlex.split(tests)])
        )
    _, status, usage = os.wait4(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status == 0, usage.ru_utime + usage.ru_stime


def test_file(name: str, before: dict[str, Any], count: int, again: bool) -> dict[str, Any]:
    """Try faults of a file: how many, and those that no test noticed, with the reasons known."""
    path, survived, known = Path("src", "evit", name), {}, before.get("survived", {})
    source, found = path.read_text(), mutants(path.read_text())
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    again = again and before.get("source") == digest
    count = before["tried"] if again else count
    good, seconds = passes(TESTS[name], 600)
    if not good:
        sys.exit(f"{name}: its tests fail as it is: pytest {TESTS[name]}")
    tried = sorted(found, key=lambda mutant: hashlib.sha256(mutant.encode()).digest())[:count]
    for mutant in tried:
        if known.get(mutant):
            survived[mutant] = known[mutant]
        elif not again or mutant in known:
            path.write_text(found[mutant])
            for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
                stale.unlink()  # of one as long, and of the same second, Python would not tell it
            if passes(TESTS[name], int(3 * seconds + 5))[0]:
                survived[mutant] = ""
                print(f"  {name} {mutant}", flush=True)
    path.write_text(source)
    print(
        f"{name}: {len(survived)} of {len(tried)} survive; tests take {seconds:.1f} s", flush=True
    )
    return dict(source=digest, all=len(found), tried=len(tried), survived=survived)


def write(results: dict[str, Any]) -> None:
    """mutants.json, and a table of it."""
    TARGET.mkdir(exist_ok=True)
    (TARGET / "mutants.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    rows = []
    for name, file in sorted(results.items()):
        reasons = [bool(reason) for reason in file["survived"].values()]
        killed = file["tried"] - len(reasons)
        rows.append((name, file["all"], file["tried"], killed, len(reasons), sum(reasons)))
    total = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    head = ("file", "faults", "tried", "noticed", "survived", "explained"), ("---",) * 6
    table = ["| " + " | ".join(map(str, row)) + " |" for row in (*head, *rows, ("all", *total))]
    (TARGET / "table.md").write_text("\n".join(table) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Do the tests of a file notice small faults?")
    parser.add_argument("files", nargs="*", default=[*TESTS], metavar="FILE")
    parser.add_argument("--count", type=int, default=12, help="faults tried in each file")
    parser.add_argument("--again", action="store_true", help="those without a reason alone")
    given = parser.parse_args()
    stored = TARGET / "mutants.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for name in IMPORTS.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        for part in ("src", "tests", "conf", "docs"):
            shutil.copytree(ROOT / part, Path(folder, part))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, folder)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = f"{folder}/src:{folder}"
        for name in given.files:
            before = results.get(name, {})
            results[name] = test_file(name, before, given.count, given.again)
            write(results)


if __name__ == "__main__":
    main()
