"""Fingerprints tell arrays apart by their values, types, shapes and order, and nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax.identity import changes, tree_fingerprint

COUNT = np.arange(6, dtype=np.float32)
TREES = {
    "vector": COUNT,
    "another value": COUNT + np.eye(6, dtype=np.float32)[5],
    "another sign of zero": np.array([-0.0, 1, 2, 3, 4, 5], np.float32),
    "another order": COUNT[::-1],
    "matrix": COUNT.reshape(2, 3),
    "matrix of the other shape": COUNT.reshape(3, 2),
    "axis of length 1": COUNT[None],
    "the same bytes as integers": COUNT.view(np.int32),
    "the other order of bytes": COUNT.astype(">f4"),
    "the same numbers in float64": COUNT.astype(np.float64),
    "cut in two": [COUNT[:2], COUNT[2:]],
    "cut elsewhere": [COUNT[:3], COUNT[3:]],
    "with an empty array": [COUNT, np.zeros(0, np.float32)],
    "with another empty array": [COUNT, np.zeros((0, 2), np.float32)],
    "number": np.float32(0),
    "vector of one number": np.zeros(1, np.float32),
    "nothing": [],
    "key": jax.random.key(0),
    "another key": jax.random.key(1),
    "bfloat16": jnp.arange(6, dtype=jnp.bfloat16),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(TREES, 2)))
def test_different_arrays_have_different_fingerprints(one, other):
    assert tree_fingerprint(TREES[one]) != tree_fingerprint(TREES[other])


@pytest.mark.parametrize(
    "same",
    [
        jnp.asarray(COUNT),
        {"a": COUNT, "static": 3},
        np.arange(12, dtype=np.float32)[::2] / 2,
        np.stack([COUNT, COUNT], 1)[:, 0],
    ],
)
def test_equal_arrays_have_equal_fingerprints_however_they_are_held(same):
    assert tree_fingerprint(same) == tree_fingerprint(COUNT)
    assert tree_fingerprint(same).startswith("6 numbers ")


def test_only_changes_are_named():
    was, now = {"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": None}
    assert changes(was, now) == "b was 2, is 4; gone was 3, is None"
    assert changes(now, now) == ""
