"""Change the mathematics a little, many times, and see whether the tests notice.

    python scripts/mutants.py draw --seed 0 --count 520     # the list, into scripts/mutants.json
    python scripts/mutants.py run [--minutes 60]            # goes on where an earlier run stopped
    python scripts/mutants.py again [--minutes 60]          # those not killed, in today's tree

A function of the mathematics (files without a leading underscore) is drawn, each as likely as any
other, then one place in it. The list is in random order: any beginning of it is a fair sample.
A mutant is run in a copy of the tree that the list was drawn from: first the tests that are named
after its file, then those of its folder and of properties that import it, then the contract; it may
take 30 s of processor time. It is killed if a test fails that passes on the tree as it is, or if
the tests no longer end. Run again, a mutant is made in the last commit, in the same statement of
the same function; it is "gone" where there is none.
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "mutants.json"
ROOMS = ("backbone", "performative", "reprogramming", "influence", "components")
LIMIT = 30  # seconds of processor time
WARM = ("torch", "torch.func", "sklearn.utils.estimator_checks", "skorch", "pandas", "pytest")
WARM += ("scipy.stats", "safetensors.torch", "cloudpickle", "joblib")
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


# Places ------------------------------------------------------------------------------------------


def functions(tree):
    """Every function and method of a file, nested ones within their own."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node)


def inside(node):
    """Nodes of a body that compute: neither annotations, docstrings, nor texts of errors."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            yield child
            if not isinstance(child, ast.Raise):
                yield from inside(child)


def is_number(node):
    """Whether a node is a number, or True or False."""
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def changes_of(node):
    """Name what can be changed at a node: (kind, function that gives another node)."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", lambda n: n.__setattr__("op", ARITHMETIC[type(n.op)]())
        if isinstance(node.op, ast.Mult | ast.Div | ast.MatMult):
            yield "sign", lambda n: n.__setattr__("left", ast.UnaryOp(ast.USub(), n.left))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", lambda n: n.__setattr__("op", ast.UAdd())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", lambda n: n.ops.__setitem__(0, COMPARISONS[type(n.ops[0])]())
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield "condition", lambda n: n.__setattr__("op", other())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition", lambda n: n.__setattr__("test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: n.__setattr__("value", not n.value)
    elif is_number(node):
        yield "constant", lambda n: n.__setattr__("value", another(n.value))
    if isinstance(node, ast.Subscript) and is_number(node.slice):
        yield "index", lambda n: n.slice.__setattr__("value", n.slice.value + 1)
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not starred(node.args[:2]):
        yield "arguments", lambda n: n.args.__setitem__(slice(0, 2), n.args[1::-1])
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise):
        yield "statement", None


def starred(arguments):
    """Whether some arguments are unpacked, and so can't be swapped."""
    return any(isinstance(argument, ast.Starred) for argument in arguments)


def another(value):
    """Give another number of the same kind."""
    return (2 * value or 1.0) if isinstance(value, float) else value + 1


def places(function):
    """Every change of a function: (number of the node, kind)."""
    body = ast.Module(function.body, [])
    nodes = [*inside(function.args), *inside(body)]
    return [(i, kind) for i, node in enumerate(nodes) for kind, _ in changes_of(node)]


def mutated(source, where, at, kind):
    """Give the source with one change, and the line before and after it."""
    tree = ast.parse(source)
    function = list(functions(tree))[where]
    node = [*inside(function.args), *inside(ast.Module(function.body, []))][at]
    before = copy.deepcopy(node)
    if kind == "statement":
        for parent in ast.walk(function):
            for _, block in ast.iter_fields(parent):
                if isinstance(block, list) and node in block:
                    block[block.index(node)] = ast.copy_location(ast.Pass(), node)
        after = "pass"
    else:
        next(change for name, change in changes_of(node) if name == kind)(node)
        after = ast.unparse(ast.fix_missing_locations(node)).splitlines()[0]
    return ast.unparse(ast.fix_missing_locations(tree)), ast.unparse(before).splitlines()[0], after


def qualified(tree, within=""):
    """Every function of a file as `functions` gives them, with its name and that of its class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{within}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from qualified(node, f"{within}{node.name}.")


def statements(function):
    """Each node that can be changed, and where it stands: (text of its statement, place in it)."""
    nodes = [*inside(function.args), *inside(ast.Module(function.body, []))]
    known = {id(node): ("", i) for i, node in enumerate(nodes)}
    for own in ast.walk(ast.Module(function.body, [])):  # outer ones first
        if isinstance(own, ast.stmt):
            text = ast.unparse(own)
            known |= {id(node): (text, i) for i, node in enumerate([own, *inside(own)])}
    return [known[id(node)] for node in nodes]


def carried(old, new, place):
    """Give the place in a newer source, or None where its statement is no more."""
    where, at, kind = place
    name, before = list(qualified(ast.parse(old)))[where]
    for i, (own, after) in enumerate(qualified(ast.parse(new))):
        if own == name and ast.unparse(after) == ast.unparse(before):
            return [i, at, kind]
        if own == name and statements(before)[at] in statements(after):
            return [i, statements(after).index(statements(before)[at]), kind]
    return None


def draw(count, seed):
    """Draw mutants, uniformly over functions, then over places, none twice."""
    rng = random.Random(seed)
    files = [f for room in ROOMS for f in sorted((ROOT / "skperf" / room).glob("[!_]*.py"))]
    files += [ROOT / "skperf" / "metrics.py", ROOT / "skperf" / "model_selection.py"]
    known = [
        (file, i, function.name, places(function))
        for file in files
        for i, function in enumerate(functions(ast.parse(file.read_text())))
    ]
    known = [each for each in known if each[3]]
    drawn = {}
    while len(drawn) < count:
        file, i, name, own = rng.choice(known)
        at, kind = rng.choice(own)
        path = file.relative_to(ROOT).as_posix()
        _, before, after = mutated(file.read_text(), i, at, kind)
        drawn[path, i, at, kind] = {
            "file": path,
            "function": name,
            "place": [i, at, kind],
            "before": before,
            "after": after,
        }
    return {"functions": len(known), "seed": seed, "mutants": list(drawn.values())}


# Runs --------------------------------------------------------------------------------------------


@functools.cache
def tests_of(root, path):
    """Test files of a module: named after it, then importing it, then the contract."""
    file = root / path
    folder = root / "tests" / (file.parent.name if file.parent.name in ROOMS else "")
    own = folder / f"test_{file.stem}.py"
    module = path.removesuffix(".py").replace("/", ".")
    forms = (f"from {module} import", f"from {module.rpartition('.')[0]} import {file.stem}")
    nearby = [*sorted(folder.glob("test_*.py")), *sorted(root.glob("tests/test_properties*.py"))]
    importing = [f for f in nearby if f != own and any(form in f.read_text() for form in forms)]
    found = [own] * own.exists() + importing
    if not found:
        found = sorted(folder.glob("test_*.py"), key=lambda f: f.stat().st_size)
    return [f.relative_to(root).as_posix() for f in [*found, root / "tests/test_contract.py"]]


def run_tests(tree, arguments, limit=LIMIT, change=None):
    """Run tests in a child: "passed", the first that failed, or "time"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reading)
            in_limits(tree, arguments, writing, limit, change)
        os._exit(0)
    os.close(writing)
    deadline = time.time() + 10 * limit
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with os.fdopen(reading) as said:
        return said.read() or "time"


def in_limits(tree, arguments, writing, limit, change):
    """Run tests of a tree, silent and for so many seconds, and write what came of it to a pipe."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    os.setpgid(0, 0)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    try:
        if change is not None:
            change()
    except (ValueError, StopIteration, KeyError) as error:
        os.write(writing, f"not exchanged: {error}".encode())
        return
    os.write(writing, in_child(arguments).encode())


class First:
    """The first test that fails."""

    failed = ""

    def pytest_runtest_logreport(self, report):
        """Note a test."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        """Note a file that can't be collected."""
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid}: not collected"


def in_child(arguments):
    """Run pytest and say what came of it."""
    import pytest

    first = First()
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(
            ["-x", "-q", "-n0", "-m", "not slow", "-p", "no:randomly", *arguments], plugins=[first]
        )
    return "passed" if code == 0 else first.failed or f"code {code}"


def warm_up():
    """Import what tests need beside the package, so that no child does it again."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
    os.environ["SCIPY_ARRAY_API"] = "1"
    sys.dont_write_bytecode = True  # a file changed within a second and of the same length is stale
    for name in WARM:
        __import__(name)


def copied(folder, commit="HEAD"):
    """Copy a committed tree."""
    archive = subprocess.run(
        ["git", "archive", commit, "skperf", "tests", "pyproject.toml", "README.md", "scripts"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)


def write(state, results):
    """Write the list, a mutant a line, whole."""
    lines = ",\n".join(json.dumps(mutant) for mutant in state["mutants"])
    head = json.dumps({name: value for name, value in state.items() if name != "mutants"})
    unfinished = results.with_suffix(".part")
    unfinished.write_text(f'{head[:-1]}, "mutants": [\n{lines}\n]}}\n')
    unfinished.replace(results)


def run(minutes, results):
    """Run what has no outcome yet."""
    state = json.loads(results.read_text())
    warm_up()
    end = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copied(tree, state["commit"])
        plain = functools.cache(lambda *arguments: run_tests(tree, arguments, 2 * LIMIT))
        for mutant in state["mutants"]:
            if "outcome" in mutant or time.time() > end:
                continue
            file = tree / mutant["file"]
            source = file.read_text()
            file.write_text(mutated(source, *mutant["place"])[0])
            started = time.time()
            tests = tests_of(tree, mutant["file"])
            said = run_tests(tree, tests)
            file.write_text(source)
            mutant["seconds"] = round(time.time() - started, 1)
            mutant["outcome"], mutant["by"] = judged(said, plain, tests)
            write(state, results)
            print(mutant["outcome"], mutant["file"], mutant["function"], mutant["by"], flush=True)


def again(minutes, results):
    """Run what is not killed, and what has not been run, in the tree at hand.

    The tree at hand is imported once; a child exchanges the code of one function, which takes a
    second where a fresh process takes ten.
    """
    state, commit = json.loads(results.read_text()), last_commit()
    warm_up()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    end = time.time() + 60 * minutes
    plain = functools.cache(lambda *arguments: run_tests(ROOT, ("--assert=plain", *arguments)))
    with tempfile.TemporaryDirectory() as folder:
        copied(folder, state["commit"])
        for mutant in state["mutants"]:
            tried = mutant.get("since") == commit
            if tried or mutant.get("outcome", "alive") != "alive" or time.time() > end:
                continue
            file, old = ROOT / mutant["file"], (Path(folder) / mutant["file"]).read_text()
            place = carried(old, file.read_text() if file.exists() else "", mutant["place"])
            mutant |= {"since": commit, "outcome": "gone", "by": ""}
            if place is not None:
                tests = tests_of(ROOT, mutant["file"])
                started, change = time.time(), functools.partial(exchange, mutant["file"], place)
                said = run_tests(ROOT, ["--assert=plain", *tests], change=change)
                mutant["seconds"] = round(time.time() - started, 1)
                mutant["outcome"], mutant["by"] = judged(said, plain, tests)
            write(state, results)
            print(mutant["outcome"], mutant["file"], mutant["function"], mutant["by"], flush=True)


def exchange(path, place):
    """Give a function of an imported module the code of its mutant."""
    source = (ROOT / path).read_text()
    name, _ = list(qualified(ast.parse(source)))[place[0]]
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    changed = {key: value for key, value in vars(module).items() if key.startswith("__")}
    exec(compile(mutated(source, *place)[0], path, "exec"), changed)
    ours, theirs = (function_of(names, name) for names in (vars(module), changed))
    ours.__code__, ours.__kwdefaults__ = theirs.__code__, theirs.__kwdefaults__
    ours.__defaults__ = theirs.__defaults__


def function_of(names, name):
    """Find a function by its qualified name, under whatever wraps it."""
    first, *rest = name.split(".")
    found = names[first]
    for part in rest:
        found = vars(found)[part]
    while not isinstance(found, types.FunctionType) or hasattr(found, "__wrapped__"):
        inner = ("fget", "__func__", "func", "__wrapped__")
        found = next(getattr(found, key) for key in inner if hasattr(found, key))
    return found


def judged(said, plain, tests):
    """Hold what the tests said against what they say of the tree as it is."""
    if said == "passed":
        return "alive", ""
    if said == "time":
        # the whole set must end in time on the tree as it is
        return ("killed", "no end") if plain(*tests) == "passed" else ("alive", "time")
    if "not collected" in said or plain(said) == "passed":
        return "killed", said
    return "void", said


def main():
    """Draw or run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["draw", "run", "again"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=520)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "draw":
        state = {"commit": last_commit()} | draw(options.count, options.seed)
        write(state, options.results)
    else:
        {"run": run, "again": again}[options.what](options.minutes, options.results)


def last_commit():
    """Name the commit of the tree."""
    told = ["git", "rev-parse", "HEAD"]
    said = subprocess.run(told, cwd=ROOT, check=True, capture_output=True, text=True)
    return said.stdout.strip()


if __name__ == "__main__":
    main()
