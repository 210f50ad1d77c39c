"""evaluate, stats and generate as a user runs them, in one process and on Ray."""

import json
import os
import sys
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from sid_ray.cli import main
from sid_ray.errors import UserError
from sid_ray.evaluation.export_images import SampledImages
from sid_ray.evaluation.measure import prepare, scores
from sid_ray.evaluation.parts import cut, in_order, run_here
from sid_ray.evaluation.statistics import ReferenceStatistics, load_reference, save_reference
from sid_ray.launch.parallel import map_parts
from sid_ray.teachers.digits import digits_images
from sid_ray.teachers.model_directory import ModelConfig, load_model, save_model

DIGITS = "builtin:digits"


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Model directory of the untrained one-step generator: the digits teacher at sigma 2.5."""
    folder = tmp_path_factory.mktemp("models") / "generator"
    denoiser, teacher = load_model(DIGITS)
    config = ModelConfig(kind="generator", network=teacher.network, sigma_init=2.5)
    save_model(folder, denoiser.state_dict(), config, "# generator of the tests\n")
    return str(folder)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """All digits as PNG files."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    folder.mkdir()
    for number, image in enumerate(digits_images()[0][:, 0].numpy()):
        Image.fromarray(image).save(folder / f"{number:05d}.png")
    return folder


@pytest.fixture
def sid_ray(tmp_path, monkeypatch, capsys):
    """Function that runs a command in this process, in a folder of its own: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sid-ray", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return run


def test_evaluate_measures_everything_in_one_pass_and_prints_a_table(sid_ray, generator, tmp_path):
    fids = []
    for model in (generator, DIGITS):
        arguments = ("evaluate", model, "--metrics", "fid,is,kid,pr", "--num", "200", "--trials", "3", "--steps", "6")
        code, output, errors = sid_ray(*arguments, "--json", f"{len(fids)}.json")
        assert code == 0 and errors == ""
        rows = [line.split() for line in output.splitlines()]
        (heading,) = [row for row in rows if "FID" in row and "precision" in row]
        assert [h for h in heading if len(h) > 1] == ["seed", "FID", "IS", "KID", "precision", "recall"]
        assert all(any(name in row for row in rows) for name in ("0", "1", "2", "mean", "±"))
        document = json.loads((tmp_path / f"{len(fids)}.json").read_text())
        trials = document["trials"]
        assert [trial["seed"] for trial in trials] == [0, 1, 2]
        assert all(1 < t["IS"] <= 10 and 0 <= t["precision"] <= 1 and 0 <= t["recall"] <= 1 for t in trials)
        assert (document["num"], document["features"], document["reference_num"]) == (200, "digits", 1797)
        assert document["versions"]["torch"] == torch.__version__ and document["date"]
        assert f"{trials[1]['FID']:.4f}" in output and len({t["FID"] for t in trials}) == 3
        fids.append(np.mean([t["FID"] for t in trials]))
    assert fids[0] > 3 * fids[1] > 0  # a teacher in one evaluation, and in 11


def test_a_measurement_is_not_overwritten(sid_ray, generator, tmp_path):
    (tmp_path / "m.json").write_text("mine")
    code, _, errors = sid_ray("evaluate", generator, "--num", "70", "--json", "m.json")
    assert code == 2 and "--json: 'm.json' exists already" in errors
    assert (tmp_path / "m.json").read_text() == "mine"
    assert "is not a folder" in sid_ray("evaluate", generator, "--num", "70", "--json", "none/m.json")[2]


def test_a_teacher_of_ones_own_is_measured(sid_ray, tmp_path, monkeypatch):
    own = f"from sid_ray import load_teacher\ndef make():\n    return load_teacher({DIGITS!r})\n"
    (tmp_path / "my_teacher.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    code, output, errors = sid_ray("evaluate", "python:my_teacher:make", "--num", "70", "--steps", "2")
    assert code == 0 and "FID" in output, errors
    sys.modules.pop("my_teacher")


def test_few_images_are_warned_of(sid_ray, generator):
    code, output, errors = sid_ray("evaluate", generator, "--num", "40")
    assert code == 0 and "FID" in output
    assert "warning: 40 images for 64 features: their covariance is singular" in errors


def test_stats_of_a_folder_and_a_zip_are_the_packaged_reference(sid_ray, digits_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as z:
        for file in sorted(digits_folder.iterdir(), reverse=True):
            z.write(file, f"00000/{file.name}")
        z.writestr("dataset.json", "{}")
    packaged = load_reference(DIGITS)
    for source, out in ((digits_folder, "folder.npz"), (tmp_path / "digits.zip", "zip.npz")):
        arguments = ("stats", str(source), "--out", out, "--features", "digits", "--sample", "500")
        code, output, errors = sid_ray(*arguments)
        assert code == 0, errors
        assert "1797 images, 64 features of digits" in output
        made = load_reference(tmp_path / out)
        assert (made.num, made.features, made.sample.shape) == (1797, "digits", (500, 64))
        np.testing.assert_allclose(made.mu, packaged.mu, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.sigma, packaged.sigma, rtol=1e-3, atol=1e-5)
        code, _, errors = sid_ray(*arguments)
        assert code == 2 and "exists already" in errors
    assert sid_ray(*arguments, "--overwrite")[0] == 0
    code, output, _ = sid_ray("evaluate", DIGITS, "--num", "100", "--metrics", "fid,kid,pr", "--reference", "zip.npz")
    assert code == 0 and "KID" in output


def test_generated_images_are_images_for_stats(sid_ray, generator, tmp_path):
    """What generate writes, stats reads, in either form, and it is the same images."""
    for out in ("folder", "images.npz"):
        assert sid_ray("generate", generator, "--num", "30", "--out", out, "--batch", "8")[0] == 0
        code, _, errors = sid_ray("stats", out, "--out", f"{out}-ref.npz", "--features", "digits")
        assert code == 0, errors
    found = [load_reference(tmp_path / f"{out}-ref.npz") for out in ("folder", "images.npz")]
    np.testing.assert_allclose(found[0].sample, found[1].sample, rtol=1e-5)
    with np.load(tmp_path / "images.npz") as arrays:
        images = arrays["images"]
    assert images.shape == (30, 8, 8, 1) and images.dtype == np.uint8
    with Image.open(tmp_path / "folder" / "000017.png") as picture:
        assert np.array_equal(np.asarray(picture), images[17, ..., 0])
    assert sid_ray("generate", generator, "--num", "3", "--label", "10")[:2] == (2, "")


REFUSED = [
    (["evaluate", DIGITS, "--reference", "OTHER-DETECTOR"], "has 64 features of inception, the feature network digits"),
    (["evaluate", DIGITS, "--reference", "OTHER-DIMENSION"], "has 2048 features of an unnamed network"),
    (["evaluate", DIGITS, "--reference", "OTHER-DETECTOR", "--metrics", "pr"], "has 64 features of inception"),
    (["evaluate", DIGITS, "--features", "inception", "--detector", "none.pt"], "inception-2015-12-05.pt, sha256 f58c"),
    (["evaluate", DIGITS, "--features", "inception", "--detector", "WRONG"], "WRONG' is not the expected file"),
    (["evaluate", DIGITS, "--workers", "many"], "--workers: 'many' is not allowed; allowed: auto or a number"),
    (["evaluate", DIGITS, "--workers", "0"], "--workers: '0' is not allowed"),
    (["stats", "nowhere", "--out", "x.npz", "--features", "digits"], "IMAGES: 'nowhere' is not a folder"),
    (["stats", ".", "--out", "x.npy", "--features", "digits"], "--out: 'x.npy' is not allowed"),
    (["stats", "IMAGES", "--out", "x.npz", "--features", "digits"], "'digits' looks at images of 1 x 8 x 8"),
    (["stats", "IMAGES", "--out", "x.npz", "--detector", "WRONG"], "WRONG' is not the expected file"),
    (["distill", "digits", "--evaluation.reference", "OTHER-DETECTOR"], "has 64 features of inception"),
    (["distill", "digits", "--evaluation.features", "inception", "--evaluation.detector", "WRONG"], "expected f58cb9"),
    (["distill", "digits", "--evaluation.features", "python:nowhere:f"], "No module named 'nowhere'"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_does_not_fit_is_refused_and_nothing_is_written(arguments, words, sid_ray, tmp_path):
    save_reference(tmp_path / "OTHER-DETECTOR", ReferenceStatistics(np.zeros(64), np.eye(64), 100, "inception"))
    save_reference(tmp_path / "OTHER-DIMENSION", ReferenceStatistics(np.zeros(2048), np.eye(2048), 0, ""))
    (tmp_path / "WRONG").write_bytes(b"no detector")
    (tmp_path / "IMAGES").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "IMAGES" / "a.png")
    before = sorted(os.listdir(tmp_path))
    code, _, errors = sid_ray(*arguments)
    assert code == 2 and words in errors, errors
    assert sorted(os.listdir(tmp_path)) == before


def test_features_of_ones_own(sid_ray, generator, tmp_path, monkeypatch):
    """Statistics by the user's module fit the user's module and no other."""
    own = "import torch\nclass Rows(torch.nn.Module):\n    def forward(self, x):\n        return x[:, 0, 3].float()\n"
    (tmp_path / "my_rows.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    sid_ray("generate", generator, "--num", "40", "--out", "images.npz")
    code, output, errors = sid_ray("stats", "images.npz", "--out", "r.npz", "--features", "python:my_rows:Rows")
    assert code == 0 and "40 images, 8 features of python:my_rows:Rows" in output, errors
    same = ("evaluate", generator, "--num", "40", "--reference", "r.npz", "--features", "python:my_rows:Rows", "--json")
    assert sid_ray(*same, "m.json")[0] == 0
    assert json.loads((tmp_path / "m.json").read_text())["trials"][0]["FID"] == pytest.approx(0, abs=0.1)
    assert "8 features of python:my_rows:Rows" in sid_ray("evaluate", generator, "--reference", "r.npz")[2]
    sys.modules.pop("my_rows")


@dataclass(frozen=True)
class DiesOnce:
    """Work whose process is lost at the third part, the first time."""

    died: str

    def load(self, device):
        def run(part):
            if part.numbers.start == 2 and not os.path.exists(self.died):
                open(self.died, "w").close()
                os._exit(1)
            return list(part.numbers)

        return run


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same(generator, tmp_path, monkeypatch):
    """Two Ray tasks at a time against this process: the same features, metrics and images; a user's error arrives."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        setup = prepare(generator, "fid,is,kid,pr", "digits", DIGITS)
        parts = cut([0, 5], 100, batch=16)
        alone, both = run_here(setup.work, parts), map_parts(setup.work, parts, "2")
        here, there = (torch.cat(list(in_order(parts, results))) for results in (alone, both))
        torch.testing.assert_close(here, there)
        assert scores(here[:100], setup) == pytest.approx(scores(there[:100], setup), rel=1e-4)
        assert not torch.equal(here[:100], here[100:])

        images = SampledImages(generator, tuple(i % 10 for i in range(100)))
        one, two = ({p.numbers.start: x for p, x in map_parts(images, parts[:7], workers)} for workers in ("1", "2"))
        assert one.keys() == two.keys() == set(range(0, 100, 16))
        assert all(int((one[n].int() - two[n].int()).abs().max()) <= 1 for n in one)

        lost = map_parts(DiesOnce(str(tmp_path / "died")), cut([0], 6, batch=1), "2")
        assert sorted(n for _, numbers in lost for n in numbers) == list(range(6))
        assert (tmp_path / "died").exists()

        with pytest.raises(UserError, match="is not a model directory"):
            list(map_parts(SampledImages(str(tmp_path / "none"), None), parts, "2"))
        with pytest.raises(UserError, match=r"--workers: 3 needs as many CPUs; there are 2"):
            list(map_parts(images, parts, "3"))
        monkeypatch.setenv("RAY_ADDRESS", "auto")  # as on a cluster: all of it, without being asked
        cluster = {p.numbers.start: x for p, x in map_parts(images, parts[:7])}
        assert all(torch.equal(cluster[n], two[n]) for n in two)
    finally:
        ray.shutdown()


@pytest.mark.ray
def test_evaluate_on_two_workers_prints_the_same_table(sid_ray, generator):
    import ray

    arguments = ("evaluate", generator, "--num", "100", "--metrics", "fid,pr", "--trials", "2", "--batch", "20")
    alone, both = sid_ray(*arguments), sid_ray(*arguments, "--workers", "2")
    assert alone[0] == both[0] == 0, both[2]
    assert not ray.is_initialized()
    numbers = [
        [float(word) for word in output.replace("│", " ").split() if "." in word and word.replace(".", "").isdigit()]
        for _, output, _ in (alone, both)
    ]
    assert len(numbers[0]) == 12 and numbers[0] == pytest.approx(numbers[1], abs=2e-4)
