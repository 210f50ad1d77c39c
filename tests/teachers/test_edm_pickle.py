"""EDM checkpoints are read bitwise, and nothing in a file is ever executed."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sid_ray.errors import UserError
from sid_ray.teachers.edm_pickle import read_edm_pickle
from sid_ray.teachers.model_directory import read_model_config
from sid_ray.teachers.sources import convert, load_denoiser, load_teacher
from tests.golden_numbers import GOLDEN, NETWORKS, load_golden, under
from tests.teachers.hostile import MARKER, corpus, dumped, network, persistence, tensor

CORPUS = corpus()


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_pickles_convert_bitwise_and_agree(name, tmp_path):
    numbers, meta = load_golden(f"networks/{name}")
    config = convert(str(GOLDEN / "networks" / f"{name}.pkl"), tmp_path / "out", licence="CC BY-NC-SA 4.0")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = under(numbers, "net.")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[k], expected[k]) for k in expected)
    assert config.network["model_type"] == meta["init_kwargs"]["model_type"]
    assert read_model_config(str(tmp_path / "out")).licence == "CC BY-NC-SA 4.0"
    denoiser = load_teacher(str(tmp_path / "out"))
    denoised = denoiser(numbers["x"], numbers["sigma"], numbers.get("labels"))
    torch.testing.assert_close(
        denoised, numbers["denoised"], rtol=0, atol=2e-5 * numbers["denoised"].abs().max().item()
    )


def test_a_pickle_is_a_source_wherever_a_model_is(tmp_path):
    path = GOLDEN / "networks" / "ddpmpp_cond.pkl"
    denoiser, config = load_denoiser(str(path))
    assert denoiser.label_dim == 10 and config.licence == "unknown"
    named = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    named.write_bytes(path.read_bytes())
    assert load_denoiser(str(named))[1].licence == "CC BY-NC-SA 4.0"


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(str(GOLDEN / "networks" / "ddpmpp_cond.pkl"), tmp_path / "out")


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_and_broken_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "teacher.pkl"
    file.write_bytes(CORPUS[name])
    with pytest.raises(UserError, match=r"teacher\.pkl"):
        convert(str(file), tmp_path / "out")
    assert os.listdir(tmp_path) == ["teacher.pkl"], "something was executed or written"


def test_the_refusal_names_what_was_asked_for(tmp_path):
    file = tmp_path / "teacher.pkl"
    file.write_bytes(CORPUS["os.system"])
    with pytest.raises(UserError, match=r"it asks for posix\.system, which no checkpoint needs"):
        read_edm_pickle(file)


def test_the_corpus_is_dangerous(tmp_path, monkeypatch):
    """The usual way of loading does execute it, so the test above means something."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(CORPUS["os.system"])
    assert Path(MARKER).exists()


def test_modules_that_contain_each_other_are_refused(tmp_path):
    """A record whose modules hold the record itself, through the memo."""
    inner = dumped(persistence({"_init_kwargs": {"img_resolution": 8}, "_modules": {}}))
    # memoize the record, then BUILD it with a state that refers to it
    cyclic = inner[:-1] + b"\x94" + b"}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00mh\x00ssb."
    count = sum(op.name == "MEMOIZE" for op, _, _ in __import__("pickletools").genops(inner))
    cyclic = cyclic.replace(b"mh\x00ssb.", b"mh" + bytes([count]) + b"ssb.")
    file = tmp_path / "cyclic.pkl"
    file.write_bytes(cyclic)
    with pytest.raises(UserError, match="contain each other"):
        read_edm_pickle(file)


def test_one_storage_for_many_parameters_is_not_a_bomb(tmp_path):
    shared = tensor(torch.zeros(1000))
    file = tmp_path / "bomb.pkl"
    file.write_bytes(dumped(network(_parameters={f"w{i}": shared for i in range(100)})))
    with pytest.raises(UserError, match=r"bomb\.pkl"):
        read_edm_pickle(file)


def mutate(data, rng):
    """A golden file with a few bytes changed, cut out, doubled, or put elsewhere."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 3:
            other = rng.randrange(len(data) + 1)
            data[at : at + 32] = data[other : other + 32]
        else:
            data[at:at] = rng.choice([b"R", b"b", b"\x81", b"Q", b"\x93", b"cos\nsystem\n", b"\x94", b"0", b"2", b"e"])
    return bytes(data)


def fuzz(files, seed, folder):
    """Read so many mutated checkpoints; returns how many of them were still checkpoints."""
    rng = random.Random(seed)
    pickles = (GOLDEN / "networks" / "ddpmpp_uncond.pkl", GOLDEN / "networks" / "ncsnpp_uncond.pkl")
    sources = [p.read_bytes() for p in pickles]
    # The structure is what matters: most of a checkpoint is numbers, in which a change means nothing.
    small = [
        dumped(network(_parameters={"w": tensor(torch.arange(6.0))})),
        *(v for v in CORPUS.values() if len(v) < 10_000),
    ]
    file, accepted = folder / "fuzz.pkl", 0
    for number in range(files):
        source = rng.choice(sources) if rng.random() < 0.2 else rng.choice(small)
        file.write_bytes(mutate(source or b"\x80\x04.", rng))
        try:
            read_edm_pickle(file)
            accepted += 1
        except UserError:
            pass
        assert not (folder / MARKER).exists(), f"seed {seed}, file {number}: executed"
    return accepted


def test_fuzzing_ends_in_a_message(tmp_path, monkeypatch):
    """`python -m tests.teachers.test_edm_pickle FILES SEED` does the same for longer."""
    monkeypatch.chdir(tmp_path)
    assert 0 < fuzz(300, 0, tmp_path) < 300


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        files = int(sys.argv[1])
        print(f"{files} files read, {fuzz(files, int(sys.argv[2]), Path(folder))} of them still checkpoints")
