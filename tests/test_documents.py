"""The documents are true: their commands run, their links resolve, their trees are the tree."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import cli
from pipeline.recipes import RECIPES
from tests.conftest import ROOT
from tests.data import shard_set

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
REPRISE = Path(sys.executable).with_name("reprise")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.splitlines() if line]


def images(folder: Path, splits: dict[str, int], classes: int = 2) -> None:
    for split, count in splits.items():
        for number in range(count):
            file = folder / split / f"class{number % classes}" / f"{number:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = 40 + number % 5 if folder.name == "photos" else 32
            file.write_bytes(shard_set.encode(shard_set.picture(number, size, size), "jpg"))


def run(arguments: list[str], folder: Path) -> str:
    assert arguments[0] == "reprise"
    done = subprocess.run([REPRISE, *arguments[1:]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_training_on_ones_own_images_works_as_written(tmp_path: Path) -> None:
    images(tmp_path / "photos", {"train": 32, "val": 8})
    for arguments in commands(blocks("sh")[0]):
        run(arguments, tmp_path)
    assert (tmp_path / "runs/photos/report.html").is_file()


def test_stopping_resuming_and_two_ranks_work_as_written(tmp_path: Path) -> None:
    prepare, *others = commands(blocks("sh")[1])
    assert prepare == ["reprise", "prep", "digits", "--out", "data/digits"]
    images(tmp_path / "digits", {"train": 128, "test": 8})  # the real ones take minutes
    run(["reprise", "prep", "folder", "--source", "digits", "--out", "data/digits"], tmp_path)
    for arguments in others:
        run(arguments, tmp_path)
    assert "resumed from" in (tmp_path / "runs/digits/logs/rank-0.log").read_text()
    assert (tmp_path / "runs/two-ranks/logs/rank-1.log").is_file()


def test_the_cifar_commands_are_accepted(tmp_path: Path) -> None:
    prepare, train = commands(blocks("sh")[2])
    images(tmp_path / "cifar-10", {"train": 260, "test": 10}, classes=10)
    prepare[prepare.index("--source") + 1] = "cifar-10"
    run(prepare, tmp_path)
    assert "350 epochs of 1 step, batch 256, bf16" in run([*train, "--dry-run"], tmp_path)


def test_the_denoising_commands_are_accepted(tmp_path: Path, bsd_tar: Path) -> None:
    prepare, train = commands(blocks("sh")[3])
    (tmp_path / "bsd-denoise.tar").symlink_to(bsd_tar)
    run(prepare, tmp_path)
    assert "rc_r3_4 on bsd" in run([*train, "--dry-run"], tmp_path)


def test_there_are_no_other_commands_to_run() -> None:
    assert len(blocks("sh")) == 4
    for document in DOCUMENTS[1:]:
        for block in blocks("sh", document.read_text()):
            for arguments in commands(block):
                assert arguments[0] in ("reprise", "make", "python"), arguments


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve_and_commands_exist(document: Path) -> None:
    text = document.read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert not target.startswith("http"), target
        assert (document.parent / target).exists(), target
    for name in re.findall(r"`reprise (\w+)", text):
        assert name in cli.commands, name
    for name in re.findall(r"reprise (?:train|submit) ([a-z]+/[a-z]\S*/\S+)", text):
        assert name in RECIPES or name.startswith("runs/"), name


def test_every_command_is_in_the_readme() -> None:
    for name in cli.commands:
        assert f"reprise {name}" in README, name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)\b +#", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_recipe_tables_have_every_figure_of_the_papers() -> None:
    tables = README + (ROOT / "docs/recipes.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/-]+)` \|[^|]*\| ([^|]*?) ?\|$", tables, re.MULTILINE))
    reported = {name: recipe.reported for name, recipe in RECIPES.items() if recipe.reported}
    for name, figure in reported.items():
        assert rows[name] == re.split(" error|, Table", figure)[0], name
    assert rows.keys() <= RECIPES.keys()


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listed.stdout.splitlines()]


def test_the_readme_shows_every_room() -> None:
    shown = re.findall(r"^(\w+)/ ", blocks("text")[0], re.MULTILINE)
    rooms = {path.parts[0] for path in tracked() if len(path.parts) > 1}
    assert set(shown) == {room for room in rooms if not room.startswith(".")}


def test_the_architecture_shows_the_tree_that_there_is() -> None:
    tree = blocks("text", (ROOT / "docs/architecture.md").read_text())[0]
    shown, room = set(), ""
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        room = name if not indent else room
        shown.add(name.rstrip("/") if not indent else f"{room}{name.rstrip('/')}")
    for path in shown:
        assert (ROOT / path).exists(), path
    inside = {"/".join(p.parts[:2]) for p in tracked() if p.parts[0] in ("data_prep", "pipeline")}
    missing = {path for path in inside if not path.endswith("__init__.py")} - shown
    assert not missing, sorted(missing)


def test_the_project_names_no_machine_and_no_registry() -> None:
    forbidden = re.compile(r"pypi\.org|pythonhosted|npmjs|deb\.debian|/work/|/opt/wheels|/opt/pypi")
    for path in tracked():
        file = ROOT / path
        if file.suffix in (".png",) or file == Path(__file__) or not file.is_file():
            continue
        found = forbidden.search(file.read_text(errors="replace"))
        assert not found, f"{path}: {found and found.group()}"
