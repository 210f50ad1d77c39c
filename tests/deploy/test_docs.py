"""docs/cluster.md: its commands are ones that sid-ray takes, its files are there, its numbers are the planner's."""

import re
import shlex

import pytest
import yaml

from sid_ray.cli import parse_overrides
from sid_ray.config import load_config
from tests.launching import ROOT

DOC = (ROOT / "docs/cluster.md").read_text()


def commands():
    """Every command that runs sid-ray, in blocks and in the table, as words after its name."""
    blocks = [re.sub(r"^ +", "", block, flags=re.MULTILINE) for block in re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:submit|sid-ray) [^`]+)`", DOC)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["sid-ray"]:
            found.append(words[1:])
        elif words[:4] == ["submit", "python", "-m", "sid_ray"]:
            found.append(words[4:])
    return found


def test_there_is_the_whole_way():
    assert {"doctor", "distill", "sweep", "board", "generate"} == {words[0] for words in commands()}
    order = [
        "aws configure",
        "cloudformation deploy",
        "get-auth-token",
        "ray up -y cluster.yaml",
        "ray dashboard cluster",
    ]
    order += ["sid_ray distill digits", "sid_ray distill cifar10-uncond", "ray down -y cluster.yaml", "delete-stack"]
    places = [DOC.index(text) for text in order]
    assert places == sorted(places)


@pytest.mark.parametrize("words", [w for w in commands() if w[0] in ("distill", "doctor", "sweep")], ids=" ".join)
def test_commands_are_accepted(words):
    command, what, *rest = words
    for option in ("--plan", "--price-per-gpu-hour"):
        if option in rest:
            del rest[rest.index(option) : rest.index(option) + 2]
    overrides = parse_overrides([word for word in rest if word != "--dry-run"])
    if command == "sweep":
        settings = yaml.safe_load((ROOT / what).read_text())
        load_config(settings["preset"], overrides)
    else:
        config = load_config(what, overrides)
        assert "--dry-run" in rest or config.run.storage.startswith(("s3://", "/")), "a job's own folder is removed"


def test_files_and_links_are_there():
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", DOC):
        assert (ROOT / "docs" / link).exists(), link
    for path in re.findall(r"\b(deploy/[\w./-]+|tune_spaces/[\w.]+|cluster\.yaml)", DOC):
        assert (ROOT / path.rstrip(".")).exists(), path
    for target in re.findall(r"(?:^|`)make ([\w-]+)", DOC, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_prices_and_hours_are_the_planners():
    """The example of the text, from the counts of the catalogue."""
    from sid_ray.teachers.public import public_teacher
    from sid_ray.training.planner import UTILISATION, images_per_second, parse_machine

    config = load_config("cifar10-uncond")
    flops = round(public_teacher(config.teacher.path).gflop * 1e9)
    rate = images_per_second(config, flops, parse_machine("4xL40S-48GB"), UTILISATION)
    days = config.total_nimg / rate / 86400
    assert f"about {round(rate, -1):.0f} images a second" in DOC
    assert f"{days:.1f} days, or {round(days * 24 * 4 * 2.62, -2):,.0f} USD" in DOC.replace("\n", " ")
