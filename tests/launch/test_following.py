"""What the driver makes of the news: losses, outcomes, room for more."""

from sid_ray.launch.bulletin import Bulletin
from sid_ray.launch.following import Growth

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
