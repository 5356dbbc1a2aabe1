"""The house: what the pages about it say is so, and imports point one way."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from spikingjelly.activation_based import layer
from torch import nn

import util.rate
from tests.experiment.script_helpers import ANALYSIS, PREDICT, metrics, only_run, run_here, tiny_networks
from tests.rate.method_helpers import MODES, assert_same_gradients, attached, lif_node, train_step

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
# Room -> what of the repository its modules may import, apart from themselves.
ROOMS = {
    "util": ("model",),
    "util/rate": (),
    "util/dataset": ("util/errors", "util/staging"),
    "util/train": ("util", "model"),
    "util/analysis": ("util", "model"),
    "model": (),
    "experiment": ("util", "model"),
    "experiment/report": ("experiment", "util", "model", "tests"),
}


def imported(path: Path) -> set[str]:
    """What of the repository a module imports, as paths: 'util/rate/rule', 'model', ...; of packages the names too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return {name.replace(".", "/") for name in names if (ROOT / name.split(".")[0]).is_dir()}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}/")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    inner = [ROOT / other for other in ROOMS if other.startswith(f"{room}/")]
    modules = [path for path in (ROOT / room).rglob("*.py") if not any(path.is_relative_to(other) for other in inner)]
    assert modules
    for path in modules:
        forbidden = {name for name in imported(path) if not any(within(name, may) for may in (room, *ROOMS[room]))}
        assert not forbidden, path


def test_the_method_is_imported_by_relative_names_alone():
    """So that the same files are the package `rate_backprop`."""
    for path in (ROOT / "util" / "rate").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "util":
                assert node.level, path


def test_nothing_is_checked_by_assert_which_python_minus_o_leaves_out():
    for room in ("util", "model", "experiment"):
        for path in (ROOT / room).rglob("*.py"):
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "doc/method/method.md", "doc/guide/architecture.md"])
def test_files_and_tests_that_a_page_names_exist(page):
    for path, inside in re.findall(
        r"`((?:util|model|tests|experiment|doc)/[\w/.]*)(?:::(\w+))?`", (ROOT / page).read_text()
    ):
        assert (ROOT / path).exists(), path
        if inside:
            assert re.search(rf"(def|class) {inside}\b", (ROOT / path).read_text()), (path, inside)


def test_the_version_is_the_same_wherever_it_is_said():
    said = {"pyproject.toml": r'^version = "(.+?)"', "CITATION.cff": r"^version: (.+)", "CHANGELOG.md": r"^## (.+)"}
    found = {re.search(where, (ROOT / page).read_text(), re.MULTILINE)[1] for page, where in said.items()}
    assert len(found) == 1, found


def test_relative_links_resolve():
    pages = [*ROOT.glob("*.md"), *(ROOT / "doc").rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)\s]*)?\)", text):
            assert (page.parent / link).exists(), (page, link)


def test_the_tests_that_hold_the_rows_of_attach_md_exist():
    page = (ROOT / "doc" / "guide" / "attach.md").read_text()
    named = re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for path, test in named:
        file = ROOT / path if "/" in path else ROOT / "tests" / "rate" / path
        assert file.exists(), path
        assert not test or re.search(rf"def {test}\(", file.read_text()), (path, test)


def test_each_row_of_what_attach_md_serves_and_refuses_names_a_test():
    page = (ROOT / "doc" / "guide" / "attach.md").read_text().split("## What is served")[1].split("### Left to you")[0]
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    assert len(rows) > 20
    assert not [row for row in rows if "held by" not in row and "---" not in row and ".py::test_" not in row]


def example(beginning: str, page: str = "architecture.md", longest: int = 25) -> str:
    """The code in a page of doc/guide/ whose docstring begins so."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "doc" / "guide" / page).read_text(), re.DOTALL)
    assert all(len(list(filter(None, block.splitlines()))) <= longest for block in blocks)
    (block,) = [block for block in blocks if block.startswith((f'"""{beginning}', f"# {beginning}"))]
    return block


def test_a_data_set_of_one_s_own_as_a_script(tmp_path, capfd):
    script = tmp_path / "experiment" / "mine" / "main.py"
    script.parent.mkdir(parents=True)
    whole, ending = example("Own data set").split("if __name__")
    script.write_text(f"{whole}{example('What reads a file')}\n\nif __name__{ending}")
    flags = ["--rate_flag", "--T", "2", "--num_epoch", "3", "--train_batch_size", "20", "--log_path", tmp_path / "log"]
    with tiny_networks("resnet18"):
        assert run_here(*flags, script=script) == 0
    directory = only_run(tmp_path / "log")
    assert "BRIGHT" in directory.name
    assert metrics(directory)[-1]["train_acc"] > 90
    Image.new("L", (20, 20), "white").save(tmp_path / "bright.png")
    own = ["--script", script]
    with tiny_networks("resnet18"):
        assert run_here(directory, tmp_path / "bright.png", script=PREDICT) == 2
        assert "name it with --script" in capfd.readouterr().err
        assert run_here(directory, tmp_path / "bright.png", *own, script=PREDICT) == 0
        assert "bright.png: 1 " in capfd.readouterr().out
        assert run_here("confusion", directory, *own, script=ANALYSIS) == 0


@pytest.fixture(scope="module")
def noise() -> type[nn.Module]:
    """The layer of the example; its rule can be registered only once."""
    names: dict = {"__name__": "example"}
    exec(example("Own layer rule"), names)
    return names["Noise"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("time_step", [1, 3])
def test_a_layer_rule_of_one_s_own(noise, mode, time_step):
    """The same gains give BPTT's output at any T, and at T = 1 its gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(6, 8), lif_node(v_threshold=0.3), noise(), layer.Linear(8, 4)).double()
    x, found = torch.rand(time_step, 5, 6, dtype=torch.float64), {}
    for method in ("bptt", "rate"):
        torch.manual_seed(1)
        found[method] = train_step(attached(net, method, time_step, mode), x, torch.arange(5) % 4, mode)
    torch.testing.assert_close(found["rate"].output, found["bptt"].output, rtol=1e-12, atol=1e-12)
    if time_step == 1:
        assert_same_gradients(found["rate"].grads, found["bptt"].grads, 1e-9)
    else:  # the head's weights see the mean of what reaches it, up to the covariance of rates and gains
        assert (
            torch.nn.functional.cosine_similarity(
                found["rate"].grads["3.weight"].flatten(), found["bptt"].grads["3.weight"].flatten(), dim=0
            )
            > 0.95
        )


def test_a_neuron_of_one_s_own_with_a_surrogate_of_its_own(monkeypatch, capsys):
    """On this version of SpikingJelly, in both step modes; its output is that of the equations."""
    monkeypatch.setitem(sys.modules, "rate_backprop", util.rate)  # as pip installs it
    names: dict = {"__name__": "example"}
    exec(example("Own neuron", "attach.md", 35), names)
    assert names["served"]
    net, x = names["net"], 3 * torch.rand(4, 5, 8)
    assert names["check_network"](net, x, "s")
    assert not re.search("costs T", capsys.readouterr().out)
    v, spikes = 0.0, []
    for current in net[0](x):
        v = v + 0.5 * (current + v * (v - 0.5))
        spikes.append((v >= 1).float())
        v = v - spikes[-1]
    net[1].step_mode = "m"
    assert 0.01 < torch.stack(spikes).mean() < 0.9
    torch.testing.assert_close(net[1](net[0](x)), torch.stack(spikes))
