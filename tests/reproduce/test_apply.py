"""Weights initialised by a method and taken away: what is written, that it loads back, and what is refused."""

import hashlib
import inspect
import io
import json
import re
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from torch.testing import assert_close

from common.functional import classification_loss
from common.types import DerivativeError
from papers import METHODS, InitResult, initialize
from reproduce import apply, examine, nio_schematic, overview
from reproduce.command import GO_ON, begin, end_well, options_of
from tests.conftest import ROOT
from tests.reproduce.commands import ENVIRONMENT

# A user's own: tied weights, a tensor that is not contiguous, statistics, and a convolution in another memory format.
MINE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(2)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight
        self.head.weight = nn.Parameter(torch.randn(8, 3).t())

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(1)
        return self.head(self.second(torch.relu(self.first(x))))


def build():
    return Net().float()


def loaders():
    generator = torch.Generator().manual_seed(3)
    def batch():
        x = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float32)
        return x, torch.randint(3, (6,), generator=generator)
    return [batch() for _ in range(4)], [batch()]


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 3)).float()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A folder with the user's module, which is the current one."""
    (tmp_path / "mine.py").write_text(MINE, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def config_of(**changes) -> apply.Config:
    base = apply.Config(
        model="mine:build", data="mine:loaders", method="gradinit", options=("steps=2",), device="cpu", quiet=True
    )
    return replace(base, **changes)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"mine.py", "__pycache__"}


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is written
def test_a_command_writes_weights_that_the_documented_lines_load_in_another_process(mine):
    done = run_python(
        mine, "-m", "reproduce.apply", "--model", "mine:build", "--data", "mine:loaders", "--method", "gradinit",
        "--options", "gamma=10", "steps=2", "--seed", "4", "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_in(mine) == {"weights.safetensors", "weights.json"}
    assert "GradInit: " in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())

    assert apply.__doc__ is not None
    lines = textwrap.dedent(apply.__doc__.split("tied weights too:\n")[1].split("\nA tensor")[0]).strip().splitlines()
    assert len(lines) == 3
    script = "\n".join([
        "from mine import build", *lines,
        "import torch",
        "assert model.second.weight is model.first.weight",
        "torch.save([model(torch.ones(2, 1, 4, 4)), dict(model.named_parameters())], 'seen.pt')",
    ])  # fmt: skip
    loaded = run_python(mine, "-c", script)
    assert loaded.returncode == 0, loaded.stderr

    # the same by hand: the model as seed 4 draws it, initialised on the same batches
    from mine import build

    torch.set_default_dtype(torch.float32)
    data = apply.bring_data("mine:loaders", device="cpu", caller="test")
    model = apply.bring_model("mine:build", data, seed=4)
    result = initialize(
        model, "gradinit", classification_loss, data.init_batches(seed=4), gamma=10.0, steps=2, progress=False
    )
    output, parameters = torch.load(mine / "seen.pt", weights_only=True)
    assert_close(parameters, dict(model.named_parameters()), rtol=1e-6, atol=1e-7)  # float32, in another process
    assert_close(output, model(torch.ones(2, 1, 4, 4)), rtol=1e-5, atol=1e-6)
    record = json.loads((mine / "weights.json").read_text("utf-8"))
    assert record["scales"] == pytest.approx(result.scales, rel=1e-6)
    assert set(result.scales) < set(dict(build().named_parameters()))


def test_the_json_tells_what_was_done(mine):
    result = apply.run(config_of())
    record = json.loads((mine / "weights.json").read_text("utf-8"))
    assert record["method"] == "gradinit"
    assert record["scales"] == result.scales
    assert record["skipped"] == result.skipped == {"norm.bias": "its norm is zero"}
    assert record["steps"] == 2
    assert record["last"] == apply.recorded(result.history[-1])
    assert record["last"]["step"] == 2
    assert record["config"]["options"] == ["steps=2"]
    assert record["data"]["sha256"]
    assert record["data"]["identity"]
    assert torch.__version__.startswith(record["versions"]["torch"])  # which may name its build
    weights = record["weights"]
    assert weights["sha256"] == hashlib.sha256((mine / "weights.safetensors").read_bytes()).hexdigest()
    assert weights["ties"] == {"second.weight": "first.weight"}
    assert weights["tensors"] == len(load_file(mine / "weights.safetensors")) == len(apply_state()) - 1


def apply_state() -> dict[str, torch.Tensor]:
    from mine import build

    return build().state_dict()


def test_a_baseline_has_no_last_line_and_infinite_scales_are_words(mine, monkeypatch):
    monkeypatch.setattr(apply, "initialize", lambda *_, **__: InitResult({"a": float("inf"), "b": 2.0}))
    apply.run(config_of(method="kaiming", options=()))
    record = json.loads((mine / "weights.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert record["scales"] == {"a": "inf", "b": 2.0}
    assert record["last"] is None
    assert record["steps"] == 0


def test_the_seed_decides_the_weights(mine):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        apply.run(config_of(method="kaiming", options=(), seed=seed, output=Path(f"{name}.safetensors")))
    a, b, c = (load_file(mine / f"{name}.safetensors") for name in "abc")
    assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["conv.weight"], c["conv.weight"])


def test_embedded_images_and_a_network_of_ours(tmp_path):
    torch.set_default_dtype(torch.float32)
    output = tmp_path / "net.safetensors"
    config = config_of(
        model="plain-3-4-bn", data="digits", method="lsuv", options=(), train_examples=100, batch_size=20, output=output
    )
    apply.run(config)
    data = apply.bring_data("digits", train_examples=100, batch_size=20, device="cpu", caller="test")
    model = apply.bring_model("plain-3-4-bn", data, seed=1)
    load_model(model, output)
    twin = apply.bring_model("plain-3-4-bn", data, seed=0)
    initialize(twin, "lsuv", classification_loss, data.init_batches(seed=0), generator=torch.Generator().manual_seed(0))
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_images_and_loss_are_as_asked_for(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    own = lambda model, batch: 100 + classification_loss(model, batch)
    monkeypatch.setattr(apply, "bring_loss", lambda spec, *_: {"mine:loss": own}[spec])
    result = apply.run(
        config_of(
            model="plain-3-4", data="digits", train_examples=40, batch_size=20, image_size=16, loss="mine:loss",
            output=tmp_path / "net.safetensors",
        )
    )  # fmt: skip
    assert all(100 < entry["loss"] < 110 for entry in result.history)
    record = json.loads((tmp_path / "net.json").read_text("utf-8"))
    assert "16×16" in record["data"]["identity"]


def test_metainits_own_way_sees_no_data(mine, monkeypatch):
    seen = []

    def spy(model, method, loss_fn, batches, **options):
        seen.append((batches, options["input_shape"]))
        return InitResult({})

    monkeypatch.setattr(apply, "initialize", spy)
    apply.run(config_of(method="metainit", options=("input_shape=[1, 4, 4]", "steps=1")))
    assert seen == [(None, (1, 4, 4))]


# ---------------------------------------------------------------------------------------------- tensors
def test_tensors_are_saved_once_and_stand_alone(tmp_path):
    storage = torch.arange(12.0)
    state = {
        "a": storage[:6].view(2, 3),
        "tied": storage[:6].view(2, 3),
        "rest": storage[6:],
        "turned": storage.view(3, 4).t(),
        "wide": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 2),
        "none": torch.zeros(0, 2),
        "count": torch.tensor(3),
    }
    tensors, ties = apply.distinct(state)
    assert ties == {"tied": "a"}
    assert list(tensors) == [name for name in state if name != "tied"]
    assert_close(tensors, {name: state[name] for name in tensors}, rtol=0, atol=0)
    apply.save_file(tensors, tmp_path / "all.safetensors")  # which refuses shared memory and odd strides
    state["a"].zero_()
    assert tensors["a"].any()


def test_the_metadata_tells_the_ties(mine):
    apply.run(config_of())
    with safe_open(mine / "weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "second.weight": "first.weight"}


def test_a_state_that_is_not_of_tensors_is_refused():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"any": 1}

    with pytest.raises(ValueError, match=r"must be made of tensors, got dict for '_extra_state'"):
        apply.distinct(Extra(2, 2).state_dict())


# ---------------------------------------------------------------------------------------------- files
def test_files_that_are_there_are_replaced_only_when_asked(mine):
    config = config_of(method="kaiming", options=())
    apply.run(config)
    before = (mine / "weights.safetensors").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"must be new, got weights\.safetensors, which exists\. Pass --overwrite"
    ):
        apply.run(replace(config, seed=1))
    assert (mine / "weights.safetensors").read_bytes() == before
    apply.run(replace(config, seed=1, overwrite=True))
    assert (mine / "weights.safetensors").read_bytes() != before
    (mine / "weights.safetensors").unlink()
    with pytest.raises(FileExistsError, match=r"weights\.json"):
        apply.run(config)


@pytest.mark.parametrize("error", [SafetensorError("No space left on device (os error 28)"), KeyboardInterrupt()])
def test_no_half_written_file_remains(mine, monkeypatch, error):
    config = config_of(method="kaiming", options=())
    apply.run(config)
    before = {name: (mine / name).read_bytes() for name in files_in(mine)}

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(apply, "save_file", half)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    told = None if kind is KeyboardInterrupt else r"\w+\.safetensors must be writable, got: No space left on device"
    for output in ("weights.safetensors", "new.safetensors"):
        with pytest.raises(kind, match=told):
            apply.run(replace(config, output=Path(output), overwrite=True))
        assert {name: (mine / name).read_bytes() for name in files_in(mine)} == before


def test_nothing_is_written_where_the_json_fails(mine, monkeypatch):
    monkeypatch.setattr(apply.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply.run(config_of(method="kaiming", options=()))
    assert files_in(mine) == set()


def test_a_json_never_tells_of_weights_that_are_not_there(mine, monkeypatch):
    replace_file, named = Path.replace, []

    def recording(self, target):
        named.append(Path(target).name)
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", recording)
    apply.run(config_of(method="kaiming", options=()))
    assert named == ["weights.safetensors", "weights.json"]


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("weights.pt", ValueError, r"`output` must end in \.safetensors, got weights\.pt"),
        ("nowhere/weights.safetensors", ValueError, "must be in a folder that can be written, got nowhere"),
        ("folder.safetensors", IsADirectoryError, r"must be a file, got folder\.safetensors, which is a folder"),
    ],
)
def test_the_output_is_checked_before_anything_else(mine, monkeypatch, output, error, message):
    (mine / "folder.safetensors").mkdir()
    monkeypatch.setattr(apply, "bring_data", lambda *_, **__: pytest.fail("data was loaded"))
    with pytest.raises(error, match=message):
        apply.run(config_of(output=Path(output), overwrite=True))


# ---------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10), ("1e-3", 1e-3), ("inf", float("inf")), ("Infinity", float("inf")), ("true", True), ("False", False),
        ("null", None), ("None", None), ("sgd", "sgd"), ('"10"', "10"), ("[1, 2]", (1, 2)),
        ("(0.9, 0.99)", (0.9, 0.99)), ('{"norm": [0.1, 2]}', {"norm": (0.1, 2)}), ("conv.*", "conv.*"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_values_are_read(text, value):
    read = options_of([f"key={text}"], "test")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("texts", [["gamma"], ["gamma="], ["=1"], ["a b=1"], ["a.b=1"], ["gamma=1", "gamma=2"]])
def test_other_forms_of_options_are_refused(texts):
    with pytest.raises(ValueError, match=r"test: an option must read key=value, each key once, got '"):
        options_of(texts, "test")


def test_options_of_several_methods_name_theirs():
    texts = ["gradinit.step=adam", "nio.steps=3"]
    assert options_of(texts, "test", "METHOD.key=value") == {"gradinit.step": "adam", "nio.steps": 3}
    for other in ("steps=3", "nio.=3", ".steps=3", "nio.steps.more=3", "nio.steps="):
        with pytest.raises(ValueError, match=r"test: an option must read METHOD\.key=value, each key once, got '"):
            options_of([other], "test", "METHOD.key=value")


def test_the_help_lists_every_method():
    listed = inspect.getsource(apply.Config).split("method: str\n")[1].split('"""')[1]
    assert [name.strip(" .\n") for name in listed.replace(" or ", ", ").split(",")] == list(METHODS)


# ---------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gradint"], r"got 'gradint'\. Did you mean 'gradinit'\?"),
        (["--method", "gradinit", "--options", "gama=1"], r"got 'gama'\. Did you mean 'gamma'\?"),
        (["--method", "gradinit", "--options", "gamma=-1"], r"gradinit: `gamma` .* must be positive, got -1"),
        (
            ["--method", "gradinit", "--model", "mine:wide"],
            r"the default loss must work .* got RuntimeError: .*shapes",
        ),
        (["--method", "fixup"], r"fixup_: `model` must have residual blocks"),
        (["--method", "kaiming", "--output", "w.bin"], r"`output` must end in \.safetensors"),
    ],
)
def test_a_mistake_ends_in_one_sentence(mine, monkeypatch, capsys, arguments, message):
    own = ["apply", "--model", "mine:build", "--data", "mine:loaders", "--device", "cpu", "--quiet", *arguments]
    monkeypatch.setattr(sys, "argv", own)
    with pytest.raises(SystemExit) as end:
        apply.main()
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert len(errors.strip().splitlines()) == 1
    assert re.search(message, errors)
    assert files_in(mine) == set()


LOWER = (
    "Take smaller batches (--help names the options that say how large they are), fewer --processes where there are "
    "several, or a smaller model."
)


def from_the_allocator() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("gradinit: `eta` [/red] must be"), "gradinit: `eta` [/red] must be"),
        (DerivativeError("gradinit: a layer is in the way."), "gradinit: a layer is in the way."),
        (torch.OutOfMemoryError("Tried\nto allocate"), f"got: Tried to allocate. {LOWER}"),
        (MemoryError(), f"got: MemoryError. {LOWER}"),
        (from_the_allocator(), LOWER),
    ],
    ids=["value", "layer", "GPU's memory", "memory", "CPU's memory"],
)
def test_what_a_user_can_mend_ends_a_command_in_a_sentence(capsys, error, told):
    def failing():
        raise error

    with pytest.raises(SystemExit) as end:
        end_well(failing)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.endswith(f"{told}\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("value", ["1", ""])
def test_a_traceback_can_be_asked_for(monkeypatch, value):
    def failing():
        raise ValueError("gradinit: no.")

    monkeypatch.setenv("LEARNED_INIT_TRACEBACK", value)
    with pytest.raises(ValueError if value else SystemExit):
        end_well(failing)


@dataclass(frozen=True)
class Asked:
    """Of any command."""

    data: str
    data_dir: Path | None = None
    output: Path | None = None
    quiet: bool = True


@dataclass(frozen=True)
class AskedOfSeveral(Asked):
    processes: int = 1


@pytest.mark.parametrize(
    ("data", "may"),
    [
        ("auto", True), ("cifar10", True), ("ptb", True), ("hub:mnist", True), ("hub:folder", False),
        ("folder", False), ("digits", False), ("noise", False), ("pydoc", False),
        ("stdlib", False), ("my.loaders:make", False),
        ("[/x]", True), ("[bold]", True),
    ],
)  # fmt: skip
def test_the_hub_is_named_only_where_it_may_be_asked(tmp_path, monkeypatch, data, may):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    screen = io.StringIO()
    begin("test", Asked(data, output=tmp_path / "run"), Console(file=screen, width=200))
    hub = "; from the hub this may take a minute the first time" if may else ""
    assert screen.getvalue() == f"Loading data ({data}){hub}.\n"


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    for processes in (1, 4, 2):
        folder = begin("test", AskedOfSeveral("digits", output=tmp_path, processes=processes), Console(quiet=True))
        folder.append({"kind": "work"})
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["processes"] == 1
    assert len(folder.records) == 3
    begin("test", Asked("digits", output=tmp_path / "another"), Console(quiet=True))  # has none


def test_a_bug_ends_a_command_in_its_traceback():
    with pytest.raises(ZeroDivisionError):
        end_well(lambda: 1 / 0)


def test_a_warning_is_told_in_a_sentence_and_others_with_their_place(capsys):
    def warning():
        warnings.simplefilter("always")
        warnings.warn("nio: `splits` [/red] are four.", stacklevel=1)
        warnings.warn("another's", DeprecationWarning, stacklevel=1)

    with pytest.warns(DeprecationWarning, match="another's") as passed_on:
        end_well(warning)
    assert len(passed_on) == 1
    assert capsys.readouterr().err == "warning: nio: `splits` [/red] are four.\n"
    assert warnings.showwarning.__module__ == "warnings"


def test_an_interruption_says_what_is_left(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    commands = (
        (lambda: end_well(interrupted), GO_ON),
        (examine.main, "Interrupted. No page was written."),
        *((module.main, "Interrupted. Nothing was written.") for module in (apply, overview, nio_schematic)),
    )
    monkeypatch.setattr(apply.tyro, "cli", interrupted)
    for command, said in commands:
        with pytest.raises(SystemExit) as end:
            command()
        assert end.value.code == 130
        assert capsys.readouterr().err == f"{said}\n"
