"""Nothing that is read may run code: no loader in the shipped code can execute what a file holds."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in ("objdyn", "pipeline", "jobs") for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
WEIGHTS_OF_KNOWN_CHECKSUM = {"jobs/fetch_weights.py"}


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            tops = {str(node.module)} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            found += sorted({top.partition(".")[0] for top in tops} & MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "torch.load" and keyword(node, "weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if called in ("eval", "exec", "torch.load", "yaml.load") or called.endswith(".extractall"):
            found.append(called)
        if called in ("np.load", "numpy.load") and keyword(node, "allow_pickle") is not False:
            found.append("np.load without allow_pickle=False")
        if keyword(node, "allow_pickle") is True:
            found.append("allow_pickle=True")
        if keyword(node, "shell") is True or called == "os.system":
            found.append("shell")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_cannot_run_what_it_reads(path):
    allowed = ["torch.load"] if str(path.relative_to(ROOT)) in WEIGHTS_OF_KNOWN_CHECKSUM else []
    assert dangers(path.read_text()) == allowed


def test_an_unsafe_load_is_seen_where_a_safe_one_is_allowed():
    assert dangers("torch.load(file, weights_only=True)") == ["torch.load"]
    for line in ("torch.load(file)", "torch.load(file, weights_only=False)", "torch.load(file, weights_only=safe)"):
        assert dangers(line) == ["torch.load without weights_only=True", "torch.load"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "tar.extractall(folder)",
        "eval(text)",
    ],
)
def test_the_search_would_see_it(line):
    assert dangers(line)


def test_model_eval_and_safe_loads_pass_the_search():
    assert dangers("model.eval(); np.load(path, allow_pickle=False); subprocess.run(['ls'])") == []
