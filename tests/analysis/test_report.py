"""The page: complete by itself, true to the run, and outspoken about what it cannot show."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from finished_runs import CLASSES

from pipeline import configure, evaluate, recipes
from pipeline.analysis import report
from pipeline.config import ConfigError
from pipeline.run_directory import RunDirectory


class Page(HTMLParser):
    """Attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(make_run):
    return report.write(make_run()).read_text()


def test_needs_no_other_file_and_no_network(page):
    addresses = [
        value for _, name, value in Page(page).attributes if re.search(r"src|href|action$", name)
    ]
    assert len([address for address in addresses if address.startswith("data:image/png")]) == 12
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<base", page)
    assert len(page) < 1_000_000


def test_ids_are_unique_and_every_reference_has_its_target(page):
    attributes = Page(page).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    wanted = set(re.findall(r"url\(#([^)]+)\)", page))
    wanted |= {value[1:] for _, name, value in attributes if name.endswith("href") and "#" in value}
    assert len(ids) == len(set(ids))
    assert wanted
    assert wanted <= set(ids)


def test_figures_take_their_colours_from_the_page(page):
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", figures) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", figures))
    for scheme in re.findall(r":root \{(.*?)\}", page, re.DOTALL):
        assert used <= set(re.findall(r"--([\w-]+):", scheme))


def test_names_are_escaped(page):
    assert "<b>bold" not in page
    assert CLASSES[0] in Page(page).text
    assert CLASSES[1] in Page(page).text


def test_the_same_run_gives_the_same_bytes(make_run):
    directory = make_run()
    first = report.write(directory).read_bytes()
    assert report.write(directory).read_bytes() == first
    assert not list(directory.path.glob("*.partial"))


def test_headlines_are_those_of_the_evaluation(make_run, shards):
    directory = make_run()
    folder = directory.evaluation_of(shards)
    summary, samples = evaluate.load(folder)
    summary = replace(
        summary, top1=0.8125, top5=0.9375, loss=0.4321, mean_steps=1.75,
        multiply_adds=30e6, nominal_multiply_adds=40_000_000,
    )  # fmt: skip
    evaluate.save(folder, summary, samples)
    text = Page(report.write(directory).read_text()).text
    assert "81.25 % top-1 accuracy, 18 test images" in text
    assert "93.75 % top-5 accuracy" in text
    assert "0.4321 loss" in text
    assert "30.00 M multiply-adds per image as executed, 75.0 % of nominal 40.00 M" in text
    assert "1.75 recursive steps per image of at most 4" in text
    evaluate.save(folder, replace(summary, top5=None), samples)
    text = Page(report.write(directory).read_text()).text
    assert "81.25 % top-1 accuracy" in text
    assert "top-5 accuracy" not in text
    # Three classes: seven outputs of 64 features and a bias fewer than the ten-class 179,198.
    assert f"{179_198 - 7 * (64 + 1):,} parameters" in text


def test_histogram_is_the_summarys(make_run, shards):
    directory = make_run()
    folder = directory.evaluation_of(shards)
    summary, samples = evaluate.load(folder)
    summary = replace(summary, steps_histogram=(1, 0, 41, 13, 7), mean_steps=2.403)
    evaluate.save(folder, summary, samples)
    page = report.write(directory).read_text()
    taken = np.repeat(range(5), summary.steps_histogram)
    assert "1 images took 0, 41 images took 2, 13 images took 3, 7 images took 4" in page
    assert [n for n in ("41", "13") if f">{n}</text>" not in page] == []
    assert f"standard deviation of {taken.std():.2f}" in Page(page).text
    assert "executes 2.40 on average" in Page(page).text
    # Two cells of two steps at t = 0.7: 2 * (0.7 + 0.49).
    assert "at its target it would be 2.38" in Page(page).text


def test_configuration_on_the_page_is_a_recipe(make_run, tmp_path):
    directory = make_run()
    page = report.write(directory).read_text()
    (shown,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    values = yaml.safe_load("".join(Page(shown).texts))
    assert configure.build(values) == directory.read_config()


def test_network_without_gates(make_run):
    text = Page(report.write(make_run("resnet20")).read_text()).text
    assert "resnet20 has no gates" in text
    assert "lowest loss" in text
    assert "fewest executed steps" not in text
    assert "recursive steps per image" not in text


def test_recursive_network_without_gates_has_no_rates_to_show(make_run):
    text = Page(report.write(make_run("r_resnet16")).read_text()).text
    assert "r_resnet16 has no gates" in text
    assert "lowest loss" in text


def test_run_that_has_only_begun(make_run):
    page = report.write(make_run(tracked=False, evaluated=False)).read_text()
    text = Page(page).text
    assert "Nothing was recorded yet." in text
    assert text.count("Not evaluated yet: reprise eval RUN") == 3
    assert "<img" not in page


def test_missing_shard_set_leaves_the_rest(make_run, shards, tmp_path):
    directory = make_run()
    kept = directory.config_file.read_text()
    directory.config_file.write_text(kept.replace(str(shards.root), str(tmp_path / "gone")))
    page = report.write(directory).read_text()
    text = Page(page).text
    assert f"The images cannot be shown: {tmp_path / 'gone'} holds no manifest.json" in text
    assert "<img" not in page
    assert "77.78 % top-1 accuracy" in text
    assert "parameters" not in text.split("Accuracy")[0]


def test_damaged_evaluation_is_named(make_run, shards):
    directory = make_run()
    folder = directory.evaluation_of(shards)
    (folder / evaluate.SAMPLES).write_bytes(b"PK")
    text = Page(report.write(directory).read_text()).text
    assert f"The evaluation {folder.name} cannot be read" in text
    assert "Not evaluated yet" in text


def test_own_evaluation_leads_and_others_follow(make_run, shards):
    directory = make_run()
    summary, samples = evaluate.load(directory.evaluation_of(shards))
    evaluate.save(directory.evaluation / "a-first-test", replace(summary, top1=0.25), samples)
    page = Page(report.write(directory).read_text())
    own = directory.evaluation_of(shards).name
    rows = [text for text in page.texts if text in ("a-first-test", own)]
    assert rows == [own, "a-first-test"]
    assert "77.78 % top-1 accuracy" in page.text


def test_the_gap_is_what_is_lost_to_the_other_set(make_run, shards):
    directory = make_run()
    folder = directory.evaluation_of(shards)
    summary, samples = evaluate.load(folder)
    evaluate.save(folder, replace(summary, top1=0.9), samples)
    evaluate.save(directory.evaluation / "other-test", replace(summary, top1=0.75), samples)
    text = Page(report.write(directory).read_text()).text
    assert "Gap to other-test: 15.00 points, 75.00 % there" in text


def test_paper_is_quoted_with_what_the_run_does_differently():
    own = recipes.load("drnn/cifar10/dr_resnet16", ["train.epochs=1", "data.path=elsewhere"])
    quote = report.quoted(own)
    assert quote == report.Quote("8.14 % error, Table 1", [("train.epochs", 1, 350)])
    assert report.quoted(recipes.load("drnn/digits/dr_resnet16")) is None
    assert report.quoted(own.model_copy(update={"name": "mine"})) is None


def test_quote_is_on_the_page(make_run, shards):
    directory = make_run()
    own = recipes.load("drnn/cifar10/dr_resnet16", ["train.epochs=1", f"data.path={shards.root}"])
    directory.config_file.write_text(own.to_yaml())
    text = Page(report.write(directory).read_text()).text
    assert "The paper gives 8.14 % error, Table 1, as its own measurement on its own data." in text
    assert "train.epochs is 1 instead of 350." in text
    assert "This run learns from 18 images of images." in text


def test_what_is_not_finished_says_so(make_run):
    directory = make_run()
    assert "not finished" not in Page(report.write(directory).read_text()).text
    own = recipes.load("drnn/cifar10/dr_resnet16", ["train.epochs=8"])
    directory.config_file.write_text(own.to_yaml())
    text = Page(report.write(directory).read_text()).text
    assert "8 epochs of batch 256" in text
    assert "not finished: epoch 3.0 of 8" in text
    assert "on its own data. It is not finished. This run departs" in text


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        report.write(RunDirectory(tmp_path))
