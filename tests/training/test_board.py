"""The board on a disk that fails for a while: nothing of the figures is lost, nothing is told twice."""

from sid_ray.config import load_config
from sid_ray.training.best_effort import BestEffort
from sid_ray.training.board import Board, read_metrics
from sid_ray.training.run_directory import RunDirectory
from tests.alone import largest_file


def test_rows_that_could_not_be_written_follow_later(tmp_path):
    run, notes = RunDirectory(tmp_path / "run"), []
    run.path.mkdir()
    board = Board(run, load_config("digits"), 0, BestEffort(notes.append))
    board.scalars(1, {"loss": 1.0})
    with largest_file(run.metrics.stat().st_size + 5):  # half a row fits
        board.scalars(2, {"loss": 2.0})
        board.scalars(3, {"loss": 3.0})
        assert [row["nimg"] for row in read_metrics(run.metrics)] == [1]
    board.scalars(4, {"loss": float("nan")})
    board.close()
    assert [(row["nimg"], row["loss"]) for row in read_metrics(run.metrics)] == [(1, 1), (2, 2), (3, 3), (4, None)]
    assert len([n for n in notes if n.startswith("warning: metrics.jsonl: ")]) == 1
    assert scalars(run.tensorboard, "loss")[:3] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    again = Board(run, load_config("digits"), 2, BestEffort(notes.append))
    again.scalars(3, {"loss": 5.0})
    again.close()
    assert [(row["nimg"], row["loss"]) for row in read_metrics(run.metrics)] == [(1, 1), (2, 2), (3, 5)]
    assert scalars(run.tensorboard, "loss") == [(1, 1.0), (2, 2.0), (3, 5.0)]


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]
