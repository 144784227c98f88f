"""The command line: what it shows, what it refuses and how, and that a refusal leaves nothing."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from jobs import cli, describe
from jobs.errors import Exit, guarded
from pipeline.models import list_models
from pipeline.recipes import RECIPES
from tests.conftest import ROOT
from tests.data import shard_set
from tests.jobs import command
from tests.jobs.command import assert_untouched, ended, started, until

HEAVY = ["torch", "deepspeed", "mlflow", "nvidia", "sklearn", "matplotlib", "numpy", "webdataset"]
COMMANDS = sorted(cli.cli.commands)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def reprise(capsys, tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Answer]]:
    """The command in this process, in an empty working folder."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*args: object) -> Answer:
        root.handlers.clear()  # a process of its own has none either
        monkeypatch.setattr(sys, "argv", ["reprise", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return Answer(int(end.value.code or 0), shown.out, shown.err)

    yield call
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['reprise', '--help']\n"
        "from jobs.cli import main\n"
        "try: main()\n"
        f"finally: print([n for n in {HEAVY} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_the_module_is_the_command(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "jobs.cli", "models", "resnet20"]
    listed = subprocess.run(module, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "resnet20" in listed.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(reprise, name: str) -> None:
    answer = reprise(name, "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: reprise {name}")
    assert cli.cli.commands[name].help


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "command": (["trian"], ["'trian'", "Did you mean 'train'"]),
    "option": (["train", "RECIPE", "--quite"], ["--quite", "--quiet"]),
    "no argument": (["prep"], ["KIND", "digits, folder, cifar"]),
    "kind": (["prep", "digts", "--out", "x"], ["'digts'", "'digits'"]),
    "no ranks": (["train", "RECIPE", "--nproc", "0"], ["--nproc", "x>=1"]),
    "recipe": (["train", "drnn/digits/dr_resnet61"], ["did you mean 'drnn/digits/dr_resnet16'"]),
    "depth": (
        ["train", "drnn/cifar10/dr_resnet17"],
        ["did you mean 'drnn/cifar10/dr_resnet16'? "],
    ),
    "no shards": (["train", "drnn/digits/dr_resnet16"], ["data/digits", "reprise prep"]),
    "override": (["train", "RECIPE", "train.epoch=1"], ["did you mean 'train.epochs'"]),
    "model": (["train", "RECIPE", "model=resnet21"], ["unknown model 'resnet21'", "resnet20"]),
    "option of a model": (
        ["train", "RECIPE", "model_options.target_rat=0.7"],
        ["'target_rat'", "did you mean 'target_rate'"],
    ),
    "group": (
        ["train", "RECIPE", "model=resnet20", "optimizer.groups.gate.lr_factor=2"],
        ["optimizer.groups.gate", "selects no parameter", "norm, rest"],
    ),
    "batch": (["train", "RECIPE", "--nproc", "3"], ["16", "3"]),
    "no source": (["prep", "folder", "--out", "x"], ["source"]),
    "lost source": (["prep", "folder", "--source", "lost", "--out", "x"], ["lost"]),
    "verify nothing": (["verify", "x"], ["x holds no manifest.json"]),
    "eval nothing": (["eval", "x"], ["there is no run 'x'", "reprise runs"]),
    "steps that are no numbers": (["eval", "x", "--steps", "2,x"], ["'2,x'", "such as 2,3,4"]),
    "report nothing": (["report", "x"], ["there is no run 'x'"]),
    "cluster": (["submit", "RECIPE", "--cluster", "labb"], ["'labb'", "did you mean 'lab'"]),
    "time": (["submit", "RECIPE", "--cluster", "lab", "--time", "5"], ["'5'", "90m, 24h or 2d"]),
    "sweep": (["submit", "RECIPE", "--cluster", "lab", "--sweep", "seed=1"], ["seed=0,1,2"]),
    "no run": (["logs", "x"], ["there is no run 'x'", "reprise runs"]),
    "pattern": (["models", "vgg*"], ["'vgg*'", "reprise models"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    reprise, recipe: Path, tmp_path: Path, case: str
) -> None:
    arguments, words = REFUSED[case]
    answer = reprise(*[str(recipe) if word == "RECIPE" else word for word in arguments])
    assert answer.code == 2
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert_untouched(tmp_path)


def test_one_unreadable_run_does_not_hide_the_others(
    reprise, finished: Path, tmp_path: Path
) -> None:
    for name in ("bad", "good"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    bad = Path("runs/bad/config.yaml")
    bad.write_text(bad.read_text().replace("seed:", "sead:"))
    listed = reprise("runs")
    assert listed.code == 0
    first, second = listed.out.splitlines()[2:]
    assert first.split()[0] == "bad"
    assert "unreadable: config.yaml: unknown key 'sead'" in first
    assert second.split()[:2] == ["good", "finished"]
    refused = reprise("eval", "runs/bad", "--quiet")
    assert refused.code == 2
    assert f"{bad}: unknown key 'sead'" in refused.err


def test_a_dry_run_shows_the_plan_and_starts_nothing(reprise, recipe: Path, tmp_path: Path) -> None:
    answer = reprise("train", recipe, "optimizer.groups.gate.lr_factor=0.5", "--dry-run")
    assert answer.code == 0
    rows = {line.split()[0]: line.split() for line in answer.out.splitlines() if line.strip()}
    assert rows["gate"][2:] == ["0.025", "0.0005"]
    assert rows["shared"][2:] == rows["norm"][2:] == ["0.05", "0.0005"]
    assert "1 epoch of 4 steps, batch 16, fp32, ZeRO 0" in answer.out
    assert_untouched(tmp_path)
    _, separator, text = answer.out.partition("name: tiny\n")
    (tmp_path / "again.yaml").write_text(separator + text)
    assert reprise("train", "again.yaml", "--dry-run").out == answer.out
    quiet = reprise("train", "again.yaml", "--dry-run", "--quiet")
    assert quiet.out == separator + text  # a recipe's own file, as docs/phases.md has it


def test_large_images_in_a_recipe_for_small_ones_are_remarked_on(reprise, recipe: Path) -> None:
    assert "note:" not in reprise("train", recipe, "--dry-run").out
    small = reprise("train", recipe, "data.augment.size=8", "--dry-run").out
    assert "note: crop=pad cuts 8 pixels out of images of 32 pixels and more, unscaled" in small


def test_a_plan_says_what_of_a_schedule_is_never_reached(reprise, recipe: Path) -> None:
    late = ["schedule={name: step, milestones: [0.5, 1, 2], warmup_epochs: 2}"]
    planned = reprise("train", recipe, *late, "--dry-run").out
    assert "(milestones never reached: 1, 2; warm-up of 2 epochs never ends)" in planned
    phases = "phases=[{name: a, steps: 2, schedule: {warmup_epochs: 3}}, {name: b, epochs: 4}]"
    planned = reprise("train", recipe, "train.epochs=null", phases, "--dry-run").out
    first, second = (line for line in planned.splitlines() if re.match("phase [ab]:", line))
    assert "constant schedule (warm-up of 3 epochs never ends), scorer" in first
    assert "constant schedule, scorer" in second


def test_a_run_keeps_its_configuration(reprise, finished: Path, recipe: Path) -> None:
    before = sorted(finished.rglob("*"))
    answer = reprise("train", finished, "seed=1")
    assert answer.code == 2
    assert "a run keeps its configuration" in answer.err
    other = command.reprise("train", recipe, "seed=3", "--run", finished, cwd=finished.parent)
    assert other.returncode == 2
    assert "is a run with seed=0, now 3" in other.stderr.splitlines()[-1]
    assert sorted(finished.rglob("*")) == before


def test_the_best_checkpoint_has_an_evaluation_of_its_own(reprise, finished: Path) -> None:
    own = {path.name for path in (finished / "evaluation").iterdir()}
    shown = reprise("eval", finished, "--best", "--quiet")
    assert shown.out.rstrip().endswith("-test-best")
    assert {path.name for path in (finished / "evaluation").iterdir()} > own
    page = reprise("report", finished)
    assert page.code == 0
    text = (finished / "report.html").read_text()
    assert "-test-best" in text
    assert "Gap to" not in text


def test_a_dry_run_asks_for_the_weights_to_start_from(reprise, recipe: Path) -> None:
    refused = reprise("train", recipe, "init_from.path=runs/nowhere", "--dry-run")
    assert refused.code == 2
    assert "init_from.path=runs/nowhere: there is no" in refused.err


def test_a_run_does_not_stop_before_where_it_is(reprise, finished: Path) -> None:
    refused = reprise("train", finished, "--stop-after", "1")
    assert refused.code == 2
    assert f"--stop-after 1: {finished} is at step 4 already" in refused.err


def test_a_run_is_known_by_its_name_and_a_recipe_by_its_own(
    reprise, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "mine")
    shutil.copytree(finished, tmp_path / "runs" / "drnn" / "digits" / "dr_resnet16")
    shown = reprise("train", "mine", "--dry-run")
    assert shown.code == 0, shown.err
    assert shown.out == reprise("train", finished, "--dry-run").out
    assert "runs/mine is a run, and" in reprise("train", "mine", "seed=1").err
    assert "data/digits holds no" in reprise("train", "drnn/digits/dr_resnet16", "--dry-run").err


def test_a_run_that_ends_before_it_is_to_stop_says_what_comes_next(reprise, recipe: Path) -> None:
    train = ("train", recipe, "--run", "run", "--quiet", "--stop-after")
    stopped = reprise(*train, 2)
    assert (stopped.code, stopped.out) == (0, ""), stopped.err
    finished = reprise(*train, 100)
    assert finished.code == 0, finished.err
    assert "evaluate:    reprise eval run\n" in finished.out


def test_a_sweep_shows_its_members_and_one_configuration(reprise, recipe: Path) -> None:
    sweep = ("--cluster", "lab", "--sweep", "seed=0,1", "optimizer.lr=0.1,0.2", "--dry-run")
    shown = reprise("submit", recipe, *sweep)
    assert shown.code == 0, shown.err
    members = [line for line in shown.out.splitlines() if line.startswith("member: ")]
    assert len(members) == 4
    assert members[1].endswith("-sweep/seed=0,optimizer.lr=0.2")
    assert shown.out.count("\nseed: ") == 1
    assert_untouched(Path())


def test_a_folder_with_other_files_is_not_taken(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    answer = command.reprise("train", recipe, "--run", "mine", "--quiet", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr == "error: mine holds other files: give another --run folder\n"
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["thesis.tex"]
    shutil.rmtree(tmp_path / "mine")
    assert_untouched(tmp_path)


def test_preparation_is_verified_to_the_byte(reprise, images: Path) -> None:
    made = reprise("prep", "folder", "--source", images, "--out", "set", "--quiet")
    assert made.code == 0
    assert made.out.startswith("set: 16 test, 64 train images of 4 classes\n")
    assert reprise("verify", "set").out == "set: as its manifest says\n"
    shard = Path("set/train-000000.tar")
    damaged = bytearray(shard.read_bytes())
    damaged[1000] ^= 1
    shard.write_bytes(damaged)
    found = reprise("verify", "set")
    assert found.code == 1
    assert "train-000000.tar" in found.out
    assert "prepare it again" in found.err


def test_a_set_with_val_and_test_is_trained_on_and_both_are_measured(
    reprise, images: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "photos")
    shutil.copytree(images / "test", tmp_path / "photos" / "val")
    (tmp_path / "photos" / "val" / "class0" / "00.png").unlink()
    made = reprise("prep", "folder", "--source", "photos", "--out", "set", "--quiet")
    assert made.code == 0
    assert "training evaluates on val; `reprise eval RUN --split test` measures test" in made.out
    trained = reprise("train", recipe, "data.path=set", "--run", "run", "--quiet")
    assert trained.code == 0, trained.err
    assert "15 (val)" in reprise("eval", "run", "--quiet").out
    assert "16 (test)" in reprise("eval", "run", "--split", "test", "--quiet").out


def test_a_set_that_cannot_be_trained_on_is_named_once_it_is_made(
    reprise, images: Path, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(images / "train", tmp_path / "photos" / "train")
    made = reprise("prep", "folder", "--source", "photos", "--out", "set", "--quiet")
    assert made.code == 0
    warning = made.out.splitlines()[-1]
    assert warning.startswith("cannot be trained on: set has no split besides 'train'")
    assert "add val/ or test/ to the source and prepare it into another folder" in warning
    refused = reprise("train", recipe, "data.path=set", "--quiet")
    assert refused.code == 2
    assert "no split besides 'train'" in refused.err


def test_a_set_of_one_class_is_remarked_on(reprise, images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(images / split / "class0", tmp_path / "photos" / split / "all")
    made = reprise("prep", "folder", "--source", "photos", "--out", "set", "--quiet")
    assert made.code == 0
    assert made.out.startswith("set: 4 test, 16 train images of 1 class\n")
    assert "there is one class alone, 'all', and nothing to tell apart: give each" in made.out


def test_a_set_is_estimated_made_looked_at_and_staged(reprise, images: Path, monkeypatch) -> None:
    prep = ("prep", "folder", "--source", images, "--out", "set", "--quiet")
    said = reprise(*prep, "--estimate")
    assert said.code == 0
    assert "for 80 images, within" in said.out
    assert not Path("set").exists()
    assert reprise(*prep, "--shard-size", "1MB").code == 0
    assert json.loads(Path("set/manifest.json").read_text())["settings"]["shard_bytes"] == 10**6
    assert reprise("verify", "set", "--quick").out.endswith("as its manifest says\n")
    listed = reprise("inspect", "set", "--samples", "3", "--sheet", "sheets/set.png")
    assert len([line for line in listed.out.splitlines() if line.startswith("test-")]) == 3
    assert "train: 64 images" in listed.out
    assert Path("sheets/set.png").read_bytes().startswith(b"\x89PNG")
    assert "test-000000.tar: 16 images" in reprise("inspect", "set/test-000000.tar").out
    assert reprise("stage", "set", "--to", "fast").out.startswith("fast: 2 shards copied, 0 there")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    share = reprise("stage", "set", "--to", "part", "--rank-aware")
    assert share.out.startswith("part: 1 shard copied")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--shard-size", "256"), "'256' is no size: give such as 256MB"),
        (("--shard-size", "1GB", "--samples-per-shard", "9"), "exclude each other"),
        (("--trust", "--resize-short", "256"), "exclude each other"),
        (("--quality", "80"), "give --resize-short too"),
        (("--allow-partial",), "leave --allow-partial away"),
    ],
)
def test_options_of_preparation_that_make_no_sense(reprise, images: Path, options, problem) -> None:
    refused = reprise("prep", "folder", "--source", images, "--out", "set", *options)
    assert refused.code == 2
    assert problem in refused.err
    assert not Path("set").exists()


def test_lists(reprise) -> None:
    listed = reprise("models", "*resnet16")
    rows = {line.split()[0]: line.split()[1] for line in listed.out.splitlines()[2:4]}
    assert rows == {"dr_resnet16": "179,198", "r_resnet16": "177,562"}
    assert list_models("*resnet16") == sorted(rows)
    listed = reprise("recipes")
    assert len(listed.out.splitlines()) == len(RECIPES) + 2
    (row,) = [line for line in listed.out.splitlines() if "cifar10/dr_resnet40" in line]
    assert "6.51 % error, Table 1" in row
    some = [line.split()[0] for line in reprise("recipes", "cifar10/dr_").out.splitlines()[2:]]
    assert some == [name for name in RECIPES if "cifar10/dr_" in name]
    assert [*reprise("recipes", "rc/*-short").out.splitlines()[2:]]
    unknown = reprise("recipes", "vgg")
    assert unknown.code == 2
    assert "no recipe matches 'vgg': `reprise recipes` lists them all" in unknown.err


def test_recipes_fit_a_terminal() -> None:
    lines = describe.recipes("*", width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert {line.split()[0] for line in lines} >= set(RECIPES)


def test_evaluation_of_a_run(reprise, finished: Path, shards: Path, tmp_path: Path) -> None:
    own = reprise("eval", finished, "--quiet")
    assert own.code == 0
    assert "16 (test)" in own.out
    shutil.copytree(shards, tmp_path / "again")
    other = reprise("eval", finished, "--data", "again", "--quiet")
    assert other.code == 0

    def accuracy(answer: Answer) -> list[str]:
        return [line for line in answer.out.splitlines() if line.startswith(("top-1", "loss"))]

    assert accuracy(other) == accuracy(own)
    images = tmp_path / "images"
    for split in ("train", "test"):
        for name in "abcd":
            (images / split / name).mkdir(parents=True)
            picture = shard_set.encode(shard_set.picture(1), "png")
            (images / split / name / "1.png").write_bytes(picture)
    assert reprise("prep", "folder", "--source", images, "--out", "foreign").code == 0
    refused = reprise("eval", finished, "--data", "foreign", "--quiet")
    assert refused.code == 2
    assert "class_map_sha256" in refused.err
    assert len(refused.err.splitlines()) == 1


def test_evaluation_at_several_numbers_of_steps(
    reprise, recipe: Path, finished: Path, tmp_path: Path
) -> None:
    adjustable = ["model=rc_r2", "steps.probabilities={2: 0.2, 3: 0.3, 4: 0.5}"]
    small = ["data.augment.size=8", "data.augment.eval_resize=8"]
    dry = reprise("train", recipe, *adjustable, *small, "--dry-run")
    assert "at 3 steps: 21.35 M" in dry.out
    done = reprise("train", recipe, *adjustable, *small, "--run", "run", "--quiet")
    assert done.code == 0, done.err
    answer = reprise("eval", "run", "--steps", "4,2", "--quiet")
    assert answer.code == 0, answer.err
    header, _, *rows = answer.out.splitlines()[:4]
    assert header.split() == ["steps", "top-1", "loss", "multiply-adds", "images/s"]
    assert [row.split()[0] for row in rows] == ["2", "4"]
    assert [row.split()[4:6] for row in rows] == [["11.91", "M"], ["23.70", "M"]]
    default = reprise("eval", "run", "--quiet")
    assert "23.70 M (100.0 % of nominal)" in default.out
    for run, steps, message in (
        ("run", "3,5", "steps=5: this network was built for 2, 3, 4 steps: give one of them"),
        (finished, "2", "steps=2: this network always takes the same steps"),
    ):
        refused = reprise("eval", run, "--steps", steps, "--quiet")
        assert refused.code == 2
        assert message in refused.err
        assert len(refused.err.splitlines()) == 1
    page = reprise("report", "run")
    assert page.code == 0
    assert 'id="costs"' in (tmp_path / "run" / "report.html").read_text()
    alone = reprise("report", "run", "--beside", finished)
    assert alone.code == 2
    assert "has no cost-accuracy curve" in alone.err


def test_evaluation_needs_a_checkpoint(reprise, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(finished / "config.yaml", tmp_path / "bare")
    answer = reprise("eval", "bare", "--quiet")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert line.startswith("error: bare has no ")
    assert line.endswith("checkpoint yet: reprise train bare")


def test_a_finished_run_is_named_without_touching_what_another_process_writes(
    finished: Path, tmp_path: Path, caplog
) -> None:
    from jobs import tasks
    from pipeline.run_directory import RunDirectory

    shutil.copytree(finished, tmp_path / "run")
    partial = tmp_path / "run" / "checkpoints" / ".partial-step-000000008"
    partial.mkdir()
    tasks._say_finished(RunDirectory(tmp_path / "run"))
    assert "finished at step 4 before this call" in caplog.text
    assert partial.is_dir()


def test_a_set_is_no_run_and_a_run_no_set(reprise, finished: Path, shards: Path) -> None:
    for command_name in ("eval", "report", "logs"):
        refused = reprise(command_name, shards)
        assert refused.code == 2
        assert f"{shards} is a shard set and not a run: give a run" in refused.err
    for arguments in (("verify",), ("verify", "--quick"), ("inspect",), ("stage", "--to", "fast")):
        refused = reprise(*arguments, finished)
        assert refused.code == 2
        assert f"{finished} is a run and not a shard set: give the one that it" in refused.err
        assert refused.err.endswith(f"trains on, {shards}\n")
        assert "reprise prep" not in refused.err


def test_report(reprise, finished: Path) -> None:
    answer = reprise("report", finished)
    assert answer.code == 0
    assert answer.out.strip() == str(finished / "report.html")


def test_the_ui_names_a_server(reprise, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    answer = reprise("ui")
    assert answer.code == 0
    assert "open http://tracking.example:5000" in answer.out


def test_the_ui_refuses_a_taken_port(reprise) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = reprise("ui", "--port", taken.getsockname()[1])
    assert answer.code == 2
    assert "give another --port" in answer.err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_ui_serves_and_leaves_no_process(tmp_path: Path, stop: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started("ui", "--port", port, cwd=tmp_path) as process:

        def answers() -> bool:
            assert process.poll() is None, process.communicate()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    return "MLflow" in page.read().decode()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                return False

        until(answers, "the page is served")
        # Eight processes and 1.4 GB that serve language models.
        children = psutil.Process(process.pid).children(recursive=True)
        assert not [child for child in children if "mlflow.server.jobs" in str(child.cmdline())]
        os.kill(process.pid, stop)  # this process alone: the server must end too
        answer = ended(process)
    assert answer.returncode == 130
    assert "GET /" not in answer.stdout + answer.stderr  # a line for each picture of each page


def test_the_ui_leads_to_the_runs(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "run")
    shutil.copy(finished.parent / "mlflow.db", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started("ui", "--port", port, cwd=tmp_path) as process:
        assert process.stdout is not None
        said = ""
        while not said.startswith("open "):
            said = process.stdout.readline()
            assert said, process.communicate()
        number = re.fullmatch(
            rf"open http://127.0.0.1:{port}/#/experiments/(\d+)/runs \(.*\)\n", said
        )
        assert number, said
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id={number[1]}"
        ) as answer:
            assert json.load(answer)["experiment"]["name"] == "reprise"


def test_the_address_is_said_once_the_server_answers() -> None:
    from jobs import mlflow_page

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served: list[int] = []

    def ready() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
            served.append(page.status)
        raise KeyboardInterrupt

    server = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    with pytest.raises(KeyboardInterrupt):
        mlflow_page.serve(server, port, ready)
    assert served == [200]
    assert mlflow_page.serve([sys.executable, "-c", "raise SystemExit(3)"], port, ready) == 3
    assert served == [200]


def test_the_ui_asks_an_unreachable_store_once(tmp_path: Path, monkeypatch, caplog) -> None:
    from jobs import mlflow_page
    from pipeline.tracking import Tracker

    monkeypatch.setattr(mlflow_page, "REPLAY_SECONDS", 5.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for name in ("a", "b", "c"):
            tracker = Tracker(tmp_path / name, run_name=name, experiment="x", uri=uri)
            tracker.metrics({"loss": 1.0}, 1)
            tracker._journal.close()
        with caplog.at_level(logging.WARNING):
            mlflow_page.send_journals(tmp_path)
    assert "2 more runs" in caplog.text
    assert "run " + str(tmp_path / "a") in caplog.text
    assert "run " + str(tmp_path / "b") not in caplog.text


def test_the_ui_sends_what_the_members_of_a_sweep_hold(tmp_path: Path, monkeypatch) -> None:
    from jobs import mlflow_page
    from pipeline.tracking import Tracker

    monkeypatch.setattr(mlflow_page, "REPLAY_SECONDS", command.PATIENCE)
    uri, sweep = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "runs" / "sweep"
    Tracker(sweep, run_name="sweep", experiment="x", uri=uri).close("FINISHED")
    member = Tracker(sweep / "seed=0", run_name="seed=0", experiment="x", uri=uri, parent=sweep)
    member.metrics({"loss": 1.0}, 1)
    member.close("FINISHED")
    waiting = Tracker(sweep / "seed=1", run_name="seed=1", experiment="x", uri=uri, parent=sweep)
    waiting.params({"seed": 1})
    mlflow_page.send_journals(tmp_path / "runs")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as rows:
        runs = rows.execute("select name, status from runs").fetchall()
        points = rows.execute("select key, value, step from metrics").fetchall()
    # The one that waits for its job is sent by it, and has no end before.
    assert sorted(runs) == [("seed=0", "FINISHED"), ("sweep", "FINISHED")]
    assert points == [("loss", 1.0, 1)]


def _ours() -> int:
    from pipeline import configure

    configure.build({})
    return 0


def _library() -> int:
    import numpy as np

    np.zeros(2).reshape(3)
    return 0


def _system() -> int:
    Path("/nowhere/at/all").read_text()
    return 0


def _away() -> int:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "shards/train-000000.tar")


def _lost() -> int:
    from torch.distributed import distributed_c10d

    # As the module's own code would raise it.
    exec("raise RuntimeError('Connection closed by peer [127.0.0.1]:1')", vars(distributed_c10d))
    return 0


@pytest.mark.parametrize(
    ("work", "code", "word"),
    [
        (_ours, Exit.USER_ERROR, "name is missing"),
        (_library, Exit.BUG, "Traceback"),
        (_system, Exit.USER_ERROR, "/nowhere/at/all"),
        (_away, Exit.FILES_AWAY, "train-000000.tar'.*the same command resumes"),
        (_lost, Exit.RANK_LOST, "connection to another rank broke"),
    ],
)
def test_whose_error_it_is(work: Callable[[], int], code: Exit, word: str, caplog) -> None:
    assert guarded(work) == code
    assert re.search(word, caplog.text)
    assert ("this is a bug of Reprise" in caplog.text) == (code is Exit.BUG)
