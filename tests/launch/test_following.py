"""What the driver makes of the news: losses, outcomes, room for more."""

import pytest

from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.launch.bulletin import Bulletin
from sid_ray.launch.following import Growth
from sid_ray.launch.trainer import resolve_workers

CPU = {"CPU": 1.0}


def test_growth_waits_for_lasting_room_and_doubts_room_that_was_none():
    growth = Growth(4, CPU, patience=100)
    free = {"CPU": 0.0}
    assert not growth.due(0, lambda: free, 0)
    assert not growth.due(2, lambda: free, 10) and not growth.due(2, lambda: free, 500)
    free = {"CPU": 1.0}
    assert not growth.due(2, lambda: free, 510) and not growth.due(2, lambda: free, 599)
    assert growth.due(2, lambda: free, 601)
    assert not growth.due(0, lambda: free, 602)
    assert not growth.due(3, lambda: free, 620) and growth.patience == 100  # it grew
    assert growth.due(3, lambda: free, 721)
    assert not growth.due(3, lambda: free, 740) and growth.patience == 100
    assert not growth.due(0, lambda: free, 741)
    assert not growth.due(3, lambda: free, 760) and growth.patience == 200  # it did not help
    assert not growth.due(3, lambda: free, 950) and growth.due(3, lambda: free, 961)
    assert not growth.due(4, lambda: free, 10_000)


def test_room_must_hold_a_whole_worker_with_all_it_needs():
    growth = Growth(4, {"CPU": 2.0, "GPU": 1.0}, patience=10)
    growth.due(1, dict, 0)
    assert not growth.due(1, lambda: {"CPU": 8.0}, 100)
    assert not growth.due(1, lambda: {"CPU": 1.0, "GPU": 1.0}, 200)
    assert not growth.due(1, lambda: {"CPU": 2.0, "GPU": 1.0}, 205)
    assert growth.due(1, lambda: {"CPU": 2.0, "GPU": 1.0}, 211)


def test_after_a_loss_the_outcome_counts():
    bulletin = Bulletin()
    assert bulletin.join(0, 2) and bulletin.join(1, 2)
    bulletin.post({"kimg": 1})
    news = bulletin.exchange(False)
    assert (news.at_work, news.joined, news.reports) == (2, True, [{"kimg": 1}])
    bulletin.lose("worker 1 died")
    news = bulletin.exchange(False)
    assert (news.at_work, news.joined, news.losses) == (0, False, ["worker 1 died"])
    bulletin.lose("worker 1 died")  # Ray says it at each look until it has dealt with it
    assert bulletin.exchange(False).losses == []
    assert bulletin.join(0, 2)
    bulletin.end({"nimg": 5})
    assert bulletin.exchange(False).losses == []
    assert bulletin.result() == (None, {"nimg": 5}, None)


def test_nobody_starts_what_is_over():
    stopped, hopeless = Bulletin(), Bulletin()
    stopped.exchange(True)
    assert not stopped.join(0, 2) and stopped.should_stop()
    assert hopeless.join(0, 2)
    assert hopeless.give_up(1, "UserError", "no such file") == 1 == hopeless.give_up(1, "UserError", "no such file")
    assert not hopeless.join(0, 2)
    assert hopeless.result() == (("UserError", "no such file"), None, None)


def test_the_dead_are_named_before_those_who_missed_them():
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from sid_ray.launch.group import describe_loss

    dead = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("gone"))
    assert describe_loss({0: RuntimeError("Connection closed by peer"), 1: dead}) == "worker 1 died"
    assert describe_loss({0: ValueError("bad\nlines")}) == "worker 0 failed: ValueError: bad"


def cluster(**fields):
    return load_config("digits", {f"cluster.{name}": value for name, value in fields.items()})


def test_workers_by_what_is_there():
    assert resolve_workers(cluster(), 0) == ((2, 2), False)
    assert resolve_workers(cluster(), 8) == ((8, 8), True)
    assert resolve_workers(cluster(use_gpu=False), 8) == ((2, 2), False)
    assert resolve_workers(cluster(workers="2-4"), 8) == ((2, 4), True)


def test_machines_with_gpus_may_still_come_to_a_cluster_that_grows():
    wanted = cluster(use_gpu=True, workers=4)
    assert resolve_workers(wanted, 0, may_grow=True) == ((4, 4), True)
    with pytest.raises(UserError, match=r"cluster.use_gpu: true, but the cluster has no GPU; allowed: auto or false$"):
        resolve_workers(wanted, 0)
    with pytest.raises(UserError, match=r"or a number for cluster.workers if machines"):
        resolve_workers(cluster(use_gpu=True), 0, may_grow=True)
