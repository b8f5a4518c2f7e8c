"""Presets as values: to JSON and back, from files, and in the summary of a run."""

import json

import pytest

from adv2_jax import cli, presets
from adv2_jax.presets import PRESETS, constant, from_dict, read, to_dict

ALL = [(preset, name) for preset, named in PRESETS.items() for name in named]


@pytest.mark.parametrize(("preset", "name"), ALL)
def test_every_preset_is_what_its_json_says(preset, name):
    known = PRESETS[preset][name]
    assert from_dict(name, json.loads(json.dumps(to_dict(known), allow_nan=False))) == known


def test_the_numbers_are_all_there():
    assert to_dict(PRESETS["quick"]["mask"]) == {
        "interpreter": {
            "kind": "mask",
            "size": None,
            "steps": 25,
            "learning_rate": 0.2,
            "objective": {
                "l1": 2.5,
                "tv": 10.0,
                "beta": 3.0,
                "blur": 0.6,
                "area": 0.0,
                "game": "deletion",
                "score": None,
            },
            "free": 1,
            "ahead": 1,
            "hypergradient": "unrolled",
        },
        "warm_steps": 0,
        "steps": 12,
        "step_size": {"shape": "decay", "first": 4 / 255, "last": 1 / 255 / 5},
        "balance": {"shape": "ramp", "first": 3000.0, "last": 6000.0},
        "tau": 0.03,
        "map_loss": "map_mse",
        "momentum": 0.85,
        "second_moment": 0.0,
        "smoothing": 0.02,
        "yielding": 0.1,
        "least_weight": 0.01,
        "calibrated": False,
        "enough": 0.0,
        "rounded": True,
        "score_every": 6,
        "warm_step_size": 1 / 255,
        "goal": "targeted",
        "restarts": 1,
    }


def test_what_a_file_does_not_say_is_that_of_default(tmp_path):
    (tmp_path / "my.json").write_text(
        '{"cam": {"steps": 7, "balance": 5}, "pgd": {"momentum": null}}'
    )
    found = read(tmp_path / "my.json")
    assert (found["cam"].steps, found["cam"].balance, found["pgd"].momentum) == (
        7,
        constant(5),
        None,
    )
    assert (
        found["cam"].step_size == PRESETS["default"]["cam"].step_size
        and found["grad"] == PRESETS["default"]["grad"]
    )
    assert presets.resolve(found, "cam", steps=3).steps == 3


BAD = {
    "[]": "must be an object of objects",
    '{"cam": 3}': "must be an object of objects",
    "{": "Expecting property name",
    '{"ig": {}}': "preset of 'ig' is not one of pgd, grad, cam, grad_cam, rts, mask, input_x_gradient",
    '{"cam": {"step": 3}}': "cam: number 'step' is not one of interpreter, warm_steps, steps",
    '{"cam": {"steps": 2.5}}': "cam: steps = 2.5: must be a whole number, 0 or more",
    '{"cam": {"steps": true}}': "cam: steps = true: must be a whole number",
    '{"cam": {"steps": -1}}': "cam: steps = -1: must be a whole number",
    '{"cam": {"momentum": 1}}': "cam: momentum = 1: must be below 1",
    '{"cam": {"smoothing": NaN}}': "cam: smoothing = NaN: must be a finite number",
    '{"cam": {"rounded": 1}}': "cam: rounded = 1: must be true or false",
    '{"cam": {"balance": "high"}}': 'cam: balance = "high": ',
    '{"cam": {"balance": {"shape": "step", "first": 1, "last": 2}}}': "must be a number, or shape (constant, ramp",
    '{"cam": {"step_size": {"shape": "decay", "first": 0, "last": 1}}}': "first and last must be above 0",
    '{"cam": {"map_loss": "map_l1"}}': "it 'map_l1' is not one of map_l2, map_mse",
    '{"cam": {"interpreter": {"kind": "grad"}}}': "must be a kind of cam",
    '{"mask": {"interpreter": {"steps": 0}}}': "steps = 0 must be 1 or more",
    '{"mask": {"interpreter": {"turns": 1}}}': "turns",
    '{"mask": {"interpreter": {"objective": {"score": "map_l1"}}}}': "score 'map_l1' is not one of log_odds",
    '{"grad": {"interpreter": {"kind": "smooth_relu_grad", "act": "relu"}}}': "act is a function, which only Python can give",
    '{"smooth_grad": {"interpreter": {"score": "map_l1"}}}': "score 'map_l1' is not one of log_odds",
    '{"smooth_grad": {"interpreter": {"draws": 0}}}': "draws = 0 must be 1 or more",
    '{"pgd": {"interpreter": {"kind": "cam"}}}': "plain PGD has none",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, capsys, text):
    (tmp_path / "my.json").write_text(text)
    words = [
        "attack",
        "--images",
        "shapes:6",
        "--out",
        str(tmp_path / "out"),
        "--preset",
        str(tmp_path / "my.json"),
    ]
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert (
        f"cannot read {tmp_path / 'my.json'}: " in message
        and BAD[text] in message
        and message.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_file_of_numbers(brightness, tmp_path, capsys):
    path = tmp_path / "my.json"
    path.write_text('{"cam": {"steps": 4, "balance": 9}}')
    words = [
        "attack",
        *brightness,
        "--limit",
        "2",
        "--interpreter",
        "cam",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main([*words, "--snapshots", "0", "--preset", str(path)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    noise, pgd, adv2 = summary["rows"]
    assert (noise["preset"], noise["gradient_evaluations"]) == (None, 0)
    assert (adv2["preset"]["steps"], adv2["preset"]["balance"], adv2["gradient_evaluations"]) == (
        4,
        9,
        4,
    )
    assert (pgd["preset"]["interpreter"], pgd["preset"]["steps"]) == (None, 4)
    assert summary["config"]["numbers"]["cam"] == adv2["preset"]
    assert (
        cli.main([*words[:-1], str(tmp_path / "gone"), "--preset", str(tmp_path / "none.json")])
        == 2
    )
    assert "none.json: No such file" in capsys.readouterr().err
