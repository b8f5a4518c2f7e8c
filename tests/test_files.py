"""Reading never unpickles and says what is wrong; writing is all or nothing."""

import argparse
import collections
import datetime
import decimal
import os
import pathlib
import pickle
import re
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest

from adv2_jax import files
from adv2_jax.state_dicts import read_weights

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer/0.weight": np.array([1, 2], np.uint8),
}


class Dangerous:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "arrays.npz"
    files.write_arrays(path, ARRAYS)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_arrays_come_back_under_their_names(archive, kind):
    assert_same(read_weights(kind(archive)), ARRAYS)


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(ARRAYS, tmp_path / "arrays.safetensors")
    assert_same(read_weights(tmp_path / "arrays.safetensors"), ARRAYS)


def damaged(path, archive):
    path.write_bytes(archive.read_bytes()[:-30])


def flipped(path, archive):
    """A whole directory with a broken member: only its checksum tells."""
    data = bytearray(archive.read_bytes())
    data[90] ^= 0xFF
    path.write_bytes(data)


def pickled(path, archive):
    np.savez(path, a=np.array([Dangerous(), None], object))


def single(path, archive):
    with path.open("wb") as file:
        np.save(file, ARRAYS["a"])


BROKEN = {
    "weights.npz": (lambda path, archive: None, "no such file"),
    "truncated.npz": (damaged, "not a whole .npz archive"),
    "flipped.npz": (flipped, "."),
    "empty.npz": (lambda path, archive: path.touch(), "not a whole .npz archive"),
    "single.npz": (single, "not a whole .npz archive"),
    "pickled.npz": (pickled, "it holds pickled objects, only plain arrays are read"),
    "folder.npz": (lambda path, archive: path.mkdir(), "directory"),
    "weights.h5x": (
        lambda path, archive: path.touch(),
        r"suffix '\.h5x' is not one of \.npz, \.safetensors, \.pth, \.pt, .*begin",
    ),
    "weights": (lambda path, archive: path.touch(), "suffix '' is not one of"),
    "keras.h5": (lambda path, archive: path.write_bytes(b"\x89HDF\r\n"), "it is an HDF5 file"),
    "packed.pth.tar.gz": (
        lambda path, archive: path.write_bytes(b"\x1f\x8b\x08"),
        "compressed by gzip",
    ),
    "page.pth": (lambda path, archive: path.write_bytes(b"<!DOCTYPE html>"), "it is a web page"),
    "pointer.npz": (
        lambda path, archive: path.write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        "a pointer of Git LFS",
    ),
    "model-00001-of-00002.safetensors": (
        lambda path, archive: path.touch(),
        "a checkpoint in several files: join them",
    ),
    "pytorch_model.bin.index.json": (
        lambda path, archive: path.touch(),
        "a checkpoint in several files: join them",
    ),
    "garbage.safetensors": (lambda path, archive: path.write_bytes(b"\xff" * 40), "."),
    "missing.safetensors": (lambda path, archive: None, "no such file"),
    "missing.pth": (lambda path, archive: None, "no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_files_are_one_line_with_the_path_and_the_reason(tmp_path, archive, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    spoil, reason = BROKEN[name]
    path = tmp_path / name
    spoil(path, archive)
    with pytest.raises(ValueError, match=reason) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")
    assert "\n" not in str(caught.value)


TORCH_BROKEN = {
    "missing.pth": (lambda path, torch: None, "no such file"),
    "empty.pth": (lambda path, torch: path.touch(), "."),
    "garbage.pth": (
        lambda path, torch: path.write_bytes(b"garbage"),
        "damaged or holds other objects",
    ),
    "malicious.pth": (
        lambda path, torch: torch.save({"a": torch.ones(2), "b": Dangerous()}, path),
        "other objects than tensors",
    ),
    "plain_pickle.pt": (
        lambda path, torch: path.write_bytes(pickle.dumps(Dangerous())),
        "other objects than tensors",
    ),
    "module.pth": (
        lambda path, torch: torch.save(torch.nn.Linear(1, 1), path),
        "only a state dict is read",
    ),
    "tensor.pth": (
        lambda path, torch: torch.save(torch.ones(2), path),
        "it holds no tensors by name",
    ),
    "nothing.pth": (
        lambda path, torch: torch.save({"epoch": 3}, path),
        "it holds no tensors by name",
    ),
}


@pytest.mark.parametrize("name", TORCH_BROKEN)
def test_unreadable_files_of_torch_are_one_line_with_the_path_and_the_reason(tmp_path, name):
    spoil, reason = TORCH_BROKEN[name]
    spoil(tmp_path / name, pytest.importorskip("torch"))
    with pytest.raises(ValueError, match=reason) as caught:
        read_weights(tmp_path / name)
    assert str(caught.value).startswith(f"cannot read {tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "nesting", [(), ("state_dict",), ("model_state_dict",), ("model",), ("state_dict", "model")]
)
def test_tensors_are_read_and_the_rest_is_passed_over(tmp_path, nesting):
    torch = pytest.importorskip("torch")
    entries = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "n": torch.tensor(7),
        "p": torch.nn.Parameter(torch.ones(2)),
        "epoch": 3,
    }
    entries |= {
        "double": torch.ones(1).double(),
        "half": torch.full((1,), 0.5).half(),
        "bfloat": torch.ones(1).bfloat16(),
    }
    for key in reversed(nesting):
        entries = {"epoch": 3, "state": [torch.ones(1)], key: entries}
    torch.save(entries, tmp_path / "arrays.pth")
    single, double = np.float32, np.float64
    expected = {
        "a": np.arange(6, dtype=single).reshape(2, 3).T,
        "n": np.array(7),
        "p": np.ones(2, single),
    }
    expected |= {
        "double": np.ones(1, double),
        "half": np.full(1, 0.5, single),
        "bfloat": np.ones(1, single),
    }
    assert_same(read_weights(tmp_path / "arrays.pth"), expected)


# Contents decide, not names: these are the names under which training checkpoints are distributed.
@pytest.mark.parametrize(
    "name",
    [
        "net.th",
        "net.pth.tar",
        "net.tar",
        "last.ckpt",
        "pytorch_model.bin",
        "NET.PTH",
        "net",
        "net.v2",
        "net.npz",
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_are_read_under_any_name(tmp_path, name, zipped):
    torch = pytest.importorskip("torch")
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "epoch": 3},
        tmp_path / name,
        _use_new_zipfile_serialization=zipped,
    )
    assert_same(read_weights(tmp_path / name), {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize("name", ["ARRAYS.NPZ", "arrays.bin", "arrays"])
def test_archives_are_read_under_any_name(tmp_path, archive, name):
    archive.rename(tmp_path / name)
    assert_same(read_weights(tmp_path / name), ARRAYS)


@pytest.mark.parametrize("name", ["ARRAYS.SAFETENSORS", "pytorch_model.bin", "arrays"])
def test_safetensors_are_read_under_any_name(tmp_path, name):
    pytest.importorskip("safetensors.numpy").save_file(ARRAYS, tmp_path / name)
    assert_same(read_weights(tmp_path / name), ARRAYS)


def test_upper_case_suffixes_are_written(tmp_path):
    files.write_arrays(tmp_path / "arrays.NPZ", ARRAYS)
    assert_same(read_weights(tmp_path / "arrays.NPZ"), ARRAYS)


def test_programs_of_torch_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")
    with pytest.raises(
        ValueError, match=r"it is a TorchScript program, only a state dict is read: torch\.save"
    ):
        read_weights(tmp_path / "net.pt")


class Settings(argparse.Namespace):
    """Settings of a kind that nothing but these tests knows."""


class Items(dict):
    """A dict with attributes, as settings often are."""

    def __init__(self, *items):
        super().__init__(*items, lr=0.1)
        self.frozen = True


BESIDE = {
    "arguments": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")),
    "numbers": [np.float64(0.5), np.int64(3), np.float32(1), np.bool_(True), np.dtype("f4")],
    "arrays": {
        "best": np.arange(3),
        "names": np.array(["a"]),
        "state": np.random.default_rng(0).bit_generator.state,
    },
    "paths": [pathlib.Path("a"), pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/b")],
    "times": [datetime.datetime(2020, 1, 1), datetime.timedelta(1), datetime.date(2020, 1, 1)],
    "containers": [
        collections.defaultdict(list, a=[1]),
        collections.Counter("aab"),
        {1, 2},
        frozenset([3]),
        types.SimpleNamespace(a=1),
    ],
    "numbers of Python": [
        1 + 2j,
        10**30,
        slice(3),
        bytes(3),
        bytearray(3),
        decimal.Decimal("0.5"),
        range(3),
        ...,
    ],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_harmless_objects_beside_the_tensors_are_passed_over(tmp_path, beside, zipped):
    torch = pytest.importorskip("torch")
    checkpoint = {
        beside: BESIDE[beside],
        "state_dict": {"a": torch.ones(2), "args": BESIDE[beside]},
    }
    torch.save(checkpoint, tmp_path / "arrays.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_weights(tmp_path / "arrays.pth"), {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (Settings, "omegaconf.dictconfig.DictConfig"),
        (Items, "yacs.config.CfgNode"),
        (Items, "lightning.fabric.utilities.data_structures.AttributeDict"),
    ],
)
def test_settings_of_trainers_need_not_be_installed(tmp_path, monkeypatch, base, name):
    torch = pytest.importorskip("torch")
    module, _, last = name.rpartition(".")
    kind = type(last, (base,), {"__module__": module})
    with monkeypatch.context() as patch:  # as if it were installed where the file is written
        patch.setitem(sys.modules, module.partition(".")[0], types.ModuleType(module))
        patch.setitem(sys.modules, module, types.SimpleNamespace(**{last: kind}))
        torch.save(
            {"hyper_parameters": kind(), "state_dict": {"a": torch.ones(2)}}, tmp_path / "last.ckpt"
        )
    assert_same(read_weights(tmp_path / "last.ckpt"), {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Settings(), "test_files.Settings"),
        (Dangerous(), "_pytest.outcomes."),
        (os.getcwd, "posix.getcwd"),
    ],
)
def test_other_objects_are_named(tmp_path, value, name, zipped):
    torch = pytest.importorskip("torch")
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "args": value},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        ValueError,
        match=r"holds other objects than tensors \(.*, only a state dict is read: .*state_dict",
    ) as caught:
        read_weights(tmp_path / "a.pth")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def checkpoint(torch, *names):
    """Weights of one number each under dotted names: 0, 1, ..."""
    found = {}
    for i, name in enumerate(names):
        *outer, last = name.split(".")
        inner = found
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = {"w": torch.full((1,), float(i)), "n": torch.tensor(i)}
    return found


@pytest.mark.parametrize(
    ("names", "key", "read", "others"),
    [
        (["state_dict", "state_dict_ema"], None, 0, "state_dict_ema"),
        (["state_dict_ema", "state_dict"], None, 1, "state_dict_ema"),
        (["state_dict", "state_dict_ema"], "state_dict_ema", 1, None),
        (["model", "model_ema"], "model_ema", 1, None),
        (["model", "ema.model", "ema.shadow"], None, 0, "ema.model, ema.shadow"),
        (["model", "ema.model"], "ema.model", 1, None),
        (["params", "params_ema"], "params_ema", 1, None),
        (["teacher"], None, 0, None),
        (["student.model"], None, 0, None),
        (["state_dict", "optimizer.state", "optim"], None, 0, None),
    ],
)
def test_one_of_several_state_dicts(tmp_path, caplog, names, key, read, others):
    torch = pytest.importorskip("torch")
    path = tmp_path / "arrays.pth"
    torch.save(checkpoint(torch, *names) | {"epoch": 3, "best": torch.tensor(0.9)}, path)
    assert read_weights(path, key)["w"] == read
    said = (
        [
            f"{path}: {names[read]} is read; there is also {others} (--weights-key NAME, or key= in Python)"
        ]
        if others
        else []
    )
    assert caplog.messages == said


def test_several_state_dicts_without_a_usual_name_must_be_chosen_from(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(checkpoint(torch, "student", "teacher"), tmp_path / "a.pth")
    with pytest.raises(
        ValueError,
        match=r"it holds several state dicts, student, teacher: choose one \(--weights-key NAME",
    ):
        read_weights(tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth", "teacher")["w"] == 1
    with pytest.raises(ValueError, match="it holds no weights called 'ema', but student, teacher"):
        read_weights(tmp_path / "a.pth", "ema")


def test_key_is_the_beginning_of_names_too(tmp_path):
    write = {"model.a": np.zeros(1), "model_ema.module.a": np.ones(1), "model_ema.n": np.ones(1)}
    files.write_arrays(tmp_path / "a.npz", write)
    assert_same(
        read_weights(tmp_path / "a.npz", "model_ema"),
        {"module.a": np.ones(1), "n": np.ones(1)},
    )
    assert_same(read_weights(tmp_path / "a.npz", "model_ema.module"), {"a": np.ones(1)})
    with pytest.raises(
        ValueError, match=r"it holds no weights called 'ema', but model, model_ema$"
    ):
        read_weights(tmp_path / "a.npz", "ema")
    torch = pytest.importorskip("torch")
    torch.save(
        {"state_dict": {key: torch.tensor(value) for key, value in write.items()}},
        tmp_path / "a.ckpt",
    )
    assert_same(read_weights(tmp_path / "a.ckpt", "model_ema.module"), {"a": np.ones(1)})
    assert_same(read_weights(tmp_path / "a.ckpt", "state_dict.model"), {"a": np.zeros(1)})


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".ckpt"])
def test_without_torch_its_files_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / f"weights{suffix}"
    path.touch()
    with pytest.raises(ValueError) as caught:
        read_weights(path)
    assert (
        str(caught.value)
        == f"cannot read {path}: reading {suffix} needs torch: pip install torch, or convert the file elsewhere"
    )


def test_safetensors_are_written_whatever_their_strides(tmp_path):
    pytest.importorskip("safetensors")
    arrays = ARRAYS | {"transposed": ARRAYS["a"].T}
    files.write_arrays(tmp_path / "arrays.safetensors", arrays)
    assert_same(read_weights(tmp_path / "arrays.safetensors"), arrays)
    assert os.listdir(tmp_path) == ["arrays.safetensors"]


def test_without_safetensors_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(
        ValueError,
        match=r"^writing \.safetensors needs safetensors: pip install 'adv2_jax\[weights\]'$",
    ):
        files.write_arrays(tmp_path / "arrays.safetensors", ARRAYS)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["arrays.pth", "arrays"])
def test_other_suffixes_are_not_written(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"^cannot write .*: suffix '(\.pth)?' is not one of \.npz, \.safetensors$"
    ):
        files.write_arrays(tmp_path / name, ARRAYS)
    assert os.listdir(tmp_path) == []


def test_files_without_a_place_are_not_written(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    for name, reason in (
        ("none/arrays.npz", f"there is no folder {tmp_path / 'none'}"),
        ("folder.npz", "it is a folder"),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"cannot write {tmp_path / name}: {reason}")
        ):
            files.write_arrays(tmp_path / name, ARRAYS)
    assert os.listdir(tmp_path) == ["folder.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(error), files.atomic(path, "w") as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_the_old_file_stays_until_the_end(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with files.atomic(path, "w") as file:
        file.write("ADV²")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "ADV²"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_objects_are_not_written(tmp_path, archive):
    with pytest.raises(ValueError):
        files.write_arrays(archive, {"a": np.array([None, {}], object)})
    assert_same(files.read_arrays(archive), ARRAYS)
    assert os.listdir(tmp_path) == [archive.name]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_permissions_are_those_of_any_new_file(tmp_path, archive):
    (tmp_path / "plain").touch()
    assert archive.stat().st_mode == (tmp_path / "plain").stat().st_mode


def streamed(arrays, size):
    for name, values in arrays.items():
        blocks = [values[i : i + size] for i in range(0, len(values), size)]
        yield name, files.Stream(values.shape, values.dtype, blocks)


def test_streams_are_the_arrays_whatever_their_blocks(tmp_path):
    arrays = ARRAYS | {
        "flags": np.array([True, False, True]),
        "names": np.array(["a", "bee"]),
        "none": np.zeros((0, 3)),
    }
    for size in (1, 2, 5):
        files.write_streams(tmp_path / f"{size}.npz", streamed(arrays, size))
        assert_same(files.read_arrays(tmp_path / f"{size}.npz"), arrays)
        assert (tmp_path / f"{size}.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
    assert files.stored(tmp_path / "1.npz") == {
        name: (values.shape, values.dtype) for name, values in arrays.items()
    }
    assert files.read_arrays(tmp_path / "1.npz", {"flags", "other"}.__contains__).keys() == {
        "flags"
    }


def test_streams_are_never_whole_in_memory(tmp_path):
    block = np.random.default_rng(0).integers(0, 256, (4, 2**16), np.uint8)
    peaks = []
    for count in (2, 40):
        tracemalloc.start()
        files.write_streams(
            tmp_path / "a.npz",
            [("a", files.Stream((4 * count, 2**16), block.dtype, (block for _ in range(count))))],
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert files.stored(tmp_path / "a.npz")["a"][0] == (160, 2**16)
    assert peaks[1] < peaks[0] + block.nbytes  # 40 blocks take no more than 2


def test_pictures_are_cut_and_numbers_are_not(tmp_path):
    arrays = ARRAYS | {
        "images": np.arange(5 * 6).reshape(5, 1, 2, 3),
        "names": np.array(["a", "bee"]),
        "one": np.zeros((1, 2, 2)),
    }
    files.write_streams(tmp_path / "a.npz", streamed(arrays, 2))
    assert_same(
        files.read_arrays(tmp_path / "a.npz", pictures=3), arrays | {"images": arrays["images"][:3]}
    )
    np.savez(tmp_path / "other_order.npz", a=np.asfortranarray(arrays["images"]))
    np.testing.assert_array_equal(
        files.read_arrays(tmp_path / "other_order.npz", pictures=3)["a"], arrays["images"][:3]
    )
    np.savez(tmp_path / "bad.npz", a=np.array([None], object))
    with pytest.raises(
        ValueError,
        match=r"^cannot read .*bad\.npz: it holds pickled objects, only plain arrays are read$",
    ):
        files.read_arrays(tmp_path / "bad.npz", pictures=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "ro', r"cannot read {path}: Unterminated string"),
        ('{"schema": 2}', r"{path} has schema 2, this adv2 reads schema 1$"),
        ("{}", r"{path} has schema None, this adv2 reads schema 1$"),
    ],
)
def test_summaries_that_are_damaged_or_of_another_schema_are_refused(tmp_path, text, message):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="^" + message.format(path=re.escape(str(path)))):
        files.read_summary(tmp_path)


def member(shape, data=b"", kind="|u1"):
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "read",
    [
        read_weights,
        files.read_arrays,
        files.stored,
        lambda path: files.read_arrays(path, pictures=1),
    ],
)
@pytest.mark.parametrize(
    ("entry", "data", "compression", "message"),
    [
        ("a.npy", member((2, 2), b"1234"), zipfile.ZIP_BZIP2, "'a' is compressed in another way"),
        (
            "a.npy",
            member((10**12,), b"1234"),
            zipfile.ZIP_STORED,
            "'a' holds 4 bytes, an array of uint8 .* takes 1000000000000",
        ),
        (
            "a.npy",
            member((3,), b"1234"),
            zipfile.ZIP_STORED,
            "'a' holds 4 bytes, an array of uint8 .* takes 3",
        ),
        ("a.npy", member((-1, -4), b"1234"), zipfile.ZIP_STORED, "array"),
        ("a.npy", b"not an array", zipfile.ZIP_STORED, "magic string"),
        ("a.txt", b"not an array", zipfile.ZIP_STORED, "magic string"),
        (
            "a.npy",
            member((65 << 20,), bytes(65 << 20)),
            zipfile.ZIP_DEFLATED,
            "unpack to .* over 10 times as many",
        ),
    ],
)
def test_members_that_are_not_what_they_say_are_refused_before_they_are_read(
    tmp_path, read, entry, data, compression, message
):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr(entry, data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"cannot read .*a\.npz: .*{message}") as caught:
        read(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and "\n" not in str(caught.value)


def test_what_compresses_well_is_read_up_to_64_mb(tmp_path):
    masks = np.zeros((8, 1024, 1024), bool)
    files.write_arrays(tmp_path / "a.npz", {"masks": masks})
    assert (tmp_path / "a.npz").stat().st_size < masks.size / 100
    assert_same(files.read_arrays(tmp_path / "a.npz"), {"masks": masks})


def test_readers_of_one_file_inside_each_other_name_it_once(tmp_path):
    (path := tmp_path / "results.npz").write_bytes(b"PK")
    with pytest.raises(ValueError) as error, files.intact(path):
        files.read_arrays(path)
    assert str(error.value) == f"cannot read {path}: not a whole .npz archive"
