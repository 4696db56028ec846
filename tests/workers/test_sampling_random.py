"""Random numbers: published vectors, exactness, and no visible structure over seeds and positions."""

from __future__ import annotations

import numpy as np

from nanovllm_dist.workers.sampling_random import splitmix64, uniform


def test_splitmix64_gives_the_published_sequence_of_seed_1234567() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]

    outputs = splitmix64(np.full(5, 1234567, dtype=np.uint64), np.arange(5, dtype=np.uint64))

    assert outputs.tolist() == published


def test_a_uniform_depends_on_its_own_seed_and_position_only() -> None:
    seeds = np.array([0, 1, 2**64 - 1, 42], dtype=np.uint64)
    positions = np.array([0, 7, 131071, 7], dtype=np.int64)

    together = uniform(seeds, positions)

    alone = [uniform(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


def test_uniforms_are_multiples_of_2_to_the_minus_53_below_one() -> None:
    values = uniform(np.arange(100_000, dtype=np.uint64), np.arange(100_000))

    assert ((values >= 0) & (values < 1)).all()
    assert ((values * 2.0**53) % 1 == 0).all()


def test_uniforms_fill_the_square_of_neighbouring_seeds_and_positions_evenly() -> None:
    # pairs (u(s, p), u(s + 1, p)) and (u(s, p), u(s, p + 1)) over a 10 x 10 grid: 99 degrees of freedom
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    values = uniform(seeds.ravel(), positions.ravel()).reshape(200, 200)

    for left, right in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:])):
        counts, _, _ = np.histogram2d(left.ravel(), right.ravel(), bins=10, range=[[0, 1], [0, 1]])
        expected = counts.sum() / 100
        assert ((counts - expected) ** 2 / expected).sum() < 150  # p = 0.0007


def test_seeds_apart_by_the_generators_own_step_do_not_share_a_shifted_stream() -> None:
    step = 0x9E3779B97F4A7C15

    ahead = uniform(np.full(50, 0, dtype=np.uint64), np.arange(1, 51))
    shifted = uniform(np.full(50, step, dtype=np.uint64), np.arange(50))

    assert not set(ahead.tolist()) & set(shifted.tolist())
