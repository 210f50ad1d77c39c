"""The number of workers never changes what is drawn: properties over random batch, slot and world sizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sid_ray.diffusion.denoiser import Denoiser
from sid_ray.teachers.sources import load_denoiser, load_teacher
from sid_ray.training.slots import Phase, SeededDraws, slots_of_rank

sizes = {"num_slots": st.integers(1, 24), "world": st.integers(1, 32)}


@pytest.fixture(scope="module")
def denoiser(tiny_teacher) -> Denoiser:
    return load_denoiser(str(tiny_teacher))[0]


def draws_of_rank(source: SeededDraws, nimg: int, num_slots: int, rank: int, world: int):
    """Slot number -> everything that is drawn for it, in the order in which a rank asks: phase by phase."""
    slots = [slot.number for slot in slots_of_rank(num_slots, rank, world) if slot.weight]
    fake = {number: source.fake_score(nimg, number) for number in slots}
    generator = {number: source.generator(nimg, number) for number in slots}
    masks = {}
    for number in slots:
        source.reseed(nimg, Phase.GENERATOR_DROPOUT, number)
        masks[number] = torch.rand(5)
    return {
        number: [t for t in (*fake[number], *generator[number], masks[number]) if t is not None] for number in slots
    }


@given(**sizes)
def test_every_slot_counts_exactly_once_and_all_ranks_take_equally_many_passes(num_slots, world):
    ranks = [slots_of_rank(num_slots, rank, world) for rank in range(world)]
    assert sorted(slot.number for slots in ranks for slot in slots if slot.weight == 1.0) == list(range(num_slots))
    assert {len(slots) for slots in ranks} == {-(-num_slots // world)}
    assert {slot.weight for slots in ranks for slot in slots} <= {0.0, 1.0}
    assert all(0 <= slot.number < num_slots for slots in ranks for slot in slots)


@settings(deadline=None, max_examples=30)
@given(
    micro_batch=st.integers(1, 5), nimg=st.integers(0, 10**9), seed=st.integers(0, 2**31 - 1),
    rollbacks=st.integers(0, 3), order=st.randoms(use_true_random=False), **sizes,
)  # fmt: skip
def test_a_slots_draws_are_the_same_whatever_the_world(
    denoiser, micro_batch, nimg, seed, rollbacks, order, num_slots, world
):
    source = SeededDraws(denoiser, micro_batch, seed, rollbacks, -1.2, 1.2, 800, torch.device("cpu"))
    alone = draws_of_rank(source, nimg, num_slots, 0, 1)
    assert sorted(alone) == list(range(num_slots))
    ranks = list(range(world))
    order.shuffle(ranks)
    together = {}
    for rank in ranks:
        together |= draws_of_rank(source, nimg, num_slots, rank, world)
    assert together.keys() == alone.keys()
    for number in alone:
        assert all(torch.equal(a, b) for a, b in zip(together[number], alone[number], strict=True))
    latents = [alone[number][0] for number in alone]
    assert len({tuple(z.flatten().tolist()) for z in latents}) == num_slots  # and no two slots share theirs


def test_class_weights_change_the_labels_and_nothing_else_that_is_drawn_before():
    denoiser = load_teacher("builtin:digits")
    plain = SeededDraws(denoiser, 500, 0, 0, -1.2, 1.2, 800, torch.device("cpu"))
    weighted = replace(plain, class_weights=[0, 1, 0, 0, 0, 0, 0, 0, 0, 3])
    for phase in ("fake_score", "generator"):
        alike, drawn = getattr(plain, phase)(0, 0), getattr(weighted, phase)(0, 0)
        assert torch.equal(alike.z, drawn.z)
        counts = drawn.class_labels.sum(0)
        assert counts[1] + counts[9] == 500 and abs(counts[9] - 375) < 4 * (500 * 0.25 * 0.75) ** 0.5
        assert (alike.class_labels.sum(0) > 0).all()
        assert torch.equal(getattr(weighted, phase)(0, 0).class_labels, drawn.class_labels)
