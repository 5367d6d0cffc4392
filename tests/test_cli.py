# SPDX-License-Identifier: Apache-2.0
"""The training command as a user calls it: one clear line for every mistake, and no
traceback."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fast import FAST_COMPILE
from PIL import Image

from vit_jax import cli, config, config_file
from vit_jax.__main__ import COMMANDS
from vit_jax.errors import UserError

ROOT = Path(__file__).parent.parent
ENV = os.environ | {
    "XLA_FLAGS": FAST_COMPILE,
    "JAX_PLATFORMS": "cpu",
}
TINY = "--config=tests/tiny.py"


def run(*args, module="vit_jax.main", env=ENV):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def folder_of_images(path, classes=("cat", "dog"), count=6):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 16), (40 * i, 10, 200)).save(path / name / f"{i}.png")
    return path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--config is missing"]),
        ([TINY], ["--workdir is missing"]),
        (
            ["--config=vit_b16"],
            ["--workdir is missing", "shards from", ":imagenet", "source=synthetic"],
        ),
        ([TINY, "--config.stepss=3"], ["stepss", "steps"]),
        ([TINY, "--config.steps=many"], ["steps", "many"]),
        ([TINY, "--config.loss=softmx"], ["config.loss", "softmx", "softmax"]),
        (
            [TINY, "--config.data.source=fodler"],
            ["config.data.source", "fodler", "folder"],
        ),
        (
            [TINY, "--config.batch=7", "--config.accumulate=2"],
            ["config.batch=7", "config.accumulate"],
        ),
        (
            ["--config=configs/digitss.py", "--config.steps=3"],
            ["configs/digitss.py", "did you mean 'digits'"],
        ),
        ([TINY, "--config.model.name.foo=3"], ["model.name.foo", "no keys"]),
        ([TINY, "--wrkdir=x"], ["wrkdir", "workdir"]),
        ([TINY, "surplus"], ["surplus"]),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    args, words, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "run"
    if "--workdir is missing" not in words:
        args = [*args, f"--workdir={workdir}"]
    line = command(*args).error
    for word in words:
        assert word in line
    assert not workdir.exists()


@pytest.mark.process
def test_a_mistake_is_one_line_of_a_real_process(tmp_path):
    result = run(TINY, "--config.stepss=3", f"--workdir={tmp_path}")
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "did you mean 'steps'" in result.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_its_flags(name, command):
    module = f"vit_jax.{name}"
    ended = command("--help", module=module)
    assert (ended.returncode, ended.stderr) == (0, "")
    # An example, and every flag that the module asks for; none of Abseil's.
    assert f"python -m {module}" in ended.stdout
    source = importlib.util.find_spec(module)
    if source.submodule_search_locations:
        source = importlib.util.find_spec(f"{module}.__main__")
    text = Path(source.origin).read_text()
    asked = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", text)
    asked += ["config"] * ("define_config_flag" in text)
    asked += ["coordinator", "process_id"] * ("define_process_flags" in text)
    shown = re.findall(r"^  --(\w+)", ended.stdout, re.MULTILINE)
    assert set(asked) <= set(shown)
    assert not {"verbosity", "logtostderr", "pdb", "flagfile"} & set(shown)
    flags = ended.stdout.partition("Flags:")[2]
    assert max(map(len, flags.splitlines())) <= 88


def test_the_package_lists_its_commands(command):
    ended = command(module="vit_jax")
    assert ended.returncode == 0
    assert [line.split()[0] for line in ended.stdout.splitlines()[2:]] == list(COMMANDS)
    for name, about in COMMANDS.items():
        assert importlib.util.find_spec(f"vit_jax.{name}"), name
        assert about in ended.stdout
    assert "did you mean 'predict'" in command("predikt", module="vit_jax").error
    assert "did you mean 'main'" in command("train", module="vit_jax").error
    assert (
        "unknown key config.stepss"
        in command("main", "--config.stepss=1", module="vit_jax").error
    )


@pytest.mark.parametrize(
    "name", ["digits", "digits.py", "configs/digits", "configs/digits.py"]
)
def test_a_config_that_ships_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = config_file.Parser().parse(name)
    assert config.from_dict(values).data.source == "digits"
    (tmp_path / "digits.py").write_text(
        "import vit_jax.config as c\nget_config = c.Config\n"
    )
    # A file of one's own comes first.
    mine = config.from_dict(config_file.Parser().parse("digits.py"))
    assert mine == config.Config()
    (tmp_path / "digits.py").rename(tmp_path / "mine.py")
    for name in ("mine", "./mine", tmp_path / "mine"):
        assert config.from_dict(config_file.Parser().parse(str(name))) == mine


@pytest.mark.parametrize(
    ("code", "module", "extra"),
    [
        ("def main(argv):\n    import tensorflow_datasets.core", "tensorflow_datasets", "train"),
        ("cli.need('matplotlib')\nimport matplotlib", "matplotlib", "analysis"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_one_line(
    code, module, extra, tmp_path, command, monkeypatch
):
    """As in an installation without the extra that brings it."""
    (tmp_path / "command.py").write_text(
        f"from vit_jax import cli\n{code}\n"
        "if __name__ == '__main__':\n    cli.run(main)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util,
        "find_spec",
        lambda name: None if name == module else real(name),
    )
    line = command(module="command").error
    assert module in line
    assert f"pip install 'vit_jax[{extra}]'" in line


@pytest.mark.process
def test_the_core_needs_no_extra(tmp_path):
    """Loading, predicting, embedding and converting, as README promises."""
    code = (
        "import sys\n"
        "import numpy as np\n"
        "import vit_jax\n"
        "from vit_jax import cli\n"
        "sys.modules |= dict.fromkeys(cli.EXTRAS)\n"  # as if none were installed
        "from vit_jax import convert, embed, predict, weights\n"
        "fields = dict(width=16, depth=1, mlp_dim=32, heads=2, patch=8, num_classes=3)\n"
        "model = vit_jax.create_model('', image_size=16, **fields)\n"
        "weights.save('x.npz', model.cfg, weights.fit.initial(model.cfg))\n"
        "model, params = vit_jax.load('x.npz')\n"
        "images = np.zeros((1, 16, 16, 3), np.float32)\n"
        "assert model.apply({'params': params}, images).shape == (1, 3)\n"
        "(found,) = predict.predict('x.npz', ['x.png'])\n"
        "assert len(found['top']) == 3\n"
        "assert embed.embed('x.npz', ['x.png'], 'vectors.npz').written == 1\n"
        "convert.convert('x.npz', 'hf')\n"
        "assert weights.read('hf').cfg.width == 16\n"
    )
    Image.new("RGB", (20, 16)).save(tmp_path / "x.png")
    env = ENV | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [["vit_jax.weights", "list"], ["vit_jax.weights", "--help"], ["vit_jax"]],
)
def test_output_that_nobody_reads_ends_quietly(arguments):
    """As with `| head -n 0`: no traceback, and nothing on standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, env=ENV, stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", ["SyntaxError", "line 1"]),
        ("import os\nimport nothing_such\n", ["line 2: ModuleNotFoundError"]),
        ("def get_config():\n    return {}['x']\n", ["line 2: KeyError: 'x'"]),
        ("steps = 3\n", ["no function get_config()"]),
        ("def get_config():\n    pass\n", ["get_config() returned None", "Config"]),
        ("def get_config(x):\n    pass\n", ["TypeError", "argument"]),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(text, words, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        config_file.Parser().parse(f"{tmp_path}/mine.py")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_config_file_may_return_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from vit_jax.config import Config\n"
        "def get_config(steps):\n    return Config(steps=int(steps))\n"
    )
    values = config_file.Parser().parse("~/mine.py:5")
    assert config.from_dict(values) == config.Config(steps=5)


@pytest.mark.parametrize("case", ["missing", "empty", "empty class", "unknown tfds"])
def test_bad_data_is_one_line(case, tmp_path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "photos"
    args = ["--config.data.source=folder", f"--config.data.path={path}"]
    words = [str(path), "data.path"]
    if case == "empty":
        path.mkdir()
    elif case == "empty class":
        folder_of_images(path)
        (path / "emu").mkdir()
        words = ["emu"]
    elif case == "unknown tfds":
        args, words = (
            ["--config.data.source=tfds", "--config.data.name=cifar11"],
            ["cifar11", "cifar10"],
        )
    line = command(
        TINY, *args, "--config.data.num_classes=0", f"--workdir={tmp_path / 'run'}"
    ).error
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_a_folder_of_images_trains_without_an_edit(tmp_path):
    path = folder_of_images(tmp_path / "photos")
    # A user's environment: nothing that tells jax, libtpu or tensorflow to be quiet.
    loud = {
        k: v
        for k, v in ENV.items()
        if not k.startswith(("JAX_PLATFORMS", "TF_", "TPU_"))
    }
    result = run(
        TINY, "--config.data.source=folder", f"--config.data.path={path}", "--config.data.num_classes=0",
        "--config.steps=4", "--config.batch=4", f"--workdir={tmp_path / 'run'}", env=loud,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for phase in ("devices", "data", "initialize", "first batch", "compile"):
        assert any(
            line.startswith(phase) and line.endswith(" s")
            for line in result.stdout.splitlines()
        )
    assert "2 classes" in result.stdout
    assert "python -m vit_jax.predict" in result.stdout
    assert '"cat"' in (tmp_path / "run" / "dataset.json").read_text()
    # Nothing but what is worth knowing: no warning of a library, no traceback.
    noise = [x for x in result.stderr.splitlines() if not x.startswith("INFO ")]
    assert not noise


def test_an_unknown_benchmark_is_one_line(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = command(TINY, "--what=speed", module="vit_jax.benchmark").error
    assert "unknown --what 'speed'" in line


@pytest.mark.parametrize("flag", ["--rounds=0", "--round_steps=-1"])
def test_a_benchmark_of_nothing_is_one_line(flag, command):
    assert flag in command(flag, module="vit_jax.benchmark").error


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_kept():
    """The second 50 MB are those that the first ones left: no page comes from the
    system."""
    code = (
        "import resource, numpy as np; from vit_jax import runtime\n"
        "runtime.glob.glob = lambda pattern: []\n"
        "runtime.keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "np.ones(50_000_000, np.uint8)\n"
        "before = faults(); np.ones(50_000_000, np.uint8); print(faults() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000_000 / 4096 / 10
