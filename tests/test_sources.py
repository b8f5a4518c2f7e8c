"""Images of the user's own: folders, label files, single photographs of every kind, and TensorFlow Datasets."""

import io
import logging
import os
import resource
import struct
import sys
import time
import tracemalloc
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from adv2_jax.data import ImageSet, load, photos, shapes, sizes_vary
from adv2_jax.data.class_files import ClassList, read_classes, read_labels
from adv2_jax.data.images import check_classes
from adv2_jax.data.splits import training_sets
from adv2_jax.files import write_arrays

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


def write(path, pixels=PIXELS[0], **options):
    """One image file, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)
    return path


@pytest.fixture
def flat(tmp_path):
    """Four images 0.png .. 3.png."""
    for i in range(4):
        write(tmp_path / "photos" / f"{i}.png", PIXELS[i])
    return tmp_path / "photos"


@pytest.fixture
def folders(tmp_path):
    """Two images of cats, one of dogs and one of eels."""
    for i, name in enumerate(("eel/x.png", "cat/b.png", "dog/c.png", "cat/a.png")):
        write(tmp_path / "photos" / name, PIXELS[i])
    return tmp_path / "photos"


def text(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_photo(path):
    """The pixels of one photograph."""
    return photos.read(path)[0]


def refused(message, *arguments, **options):
    """One line that holds the message, at the latest when the images are decoded."""
    with pytest.raises(ValueError) as caught:
        np.asarray(load(*arguments, **options).images)
    assert message in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


# Folders


def test_class_folders_are_classes_in_sorted_order(folders):
    images = load(folders)
    assert images.names.tolist() == ["cat/a.png", "cat/b.png", "dog/c.png", "eel/x.png"]
    np.testing.assert_array_equal(images.images, PIXELS[[3, 1, 2, 0]])
    assert images.labels.tolist() == [0, 0, 1, 2] and images.labels.dtype == np.int32
    assert images.classes == ("cat", "dog", "eel")
    assert images.targets is None


def test_a_guessed_class_order_must_fit_the_network(folders):
    images = load(folders)
    check_classes(images, 3)
    with pytest.raises(
        ValueError,
        match=r"has 3 class folders, the network 1000 classes: name the classes with --classes FILE",
    ):
        check_classes(images, 1000)
    check_classes(load("shapes:2"), 11)


def test_folders_that_are_numbers_are_the_labels(tmp_path):
    for i, name in enumerate(("10", "007", "2")):
        write(tmp_path / name / "a.png", PIXELS[i])
    images = load(tmp_path)
    assert dict(zip(images.names, images.labels, strict=True)) == {
        "007/a.png": 7,
        "10/a.png": 10,
        "2/a.png": 2,
    }
    assert images.classes is None
    check_classes(images, 1000)
    with pytest.raises(ValueError, match="label 10 of image 1 is out of range"):
        check_classes(images, 10)


ORDER = sorted(map(str, range(12)))  # as text: 0, 1, 10, 11, 2


@pytest.fixture
def twelve(tmp_path):
    """Class folders 0 .. 11, one image each."""
    for name in ORDER:
        write(tmp_path / "photos" / name / "a.png")
    return tmp_path / "photos"


def by_folder(images):
    return {
        name.split("/")[0]: int(label)
        for name, label in zip(images.names, images.labels, strict=True)
    }


@pytest.mark.parametrize("line", ["{}", "{:0>3}", "{} thing", "n{:0>8} {}"], ids=str)
def test_a_class_file_that_names_numbers_gives_their_order(twelve, tmp_path, line):
    images = load(
        twelve, classes=text(tmp_path / "c.txt", *(line.format(name, name) for name in ORDER))
    )
    assert by_folder(images) == {name: ORDER.index(name) for name in ORDER}


def test_a_class_file_of_other_names_leaves_numbers_as_they_are(twelve, tmp_path):
    names = [f"thing{chr(97 + i)}" for i in range(12)]
    assert by_folder(load(twelve, classes=text(tmp_path / "c.txt", *names))) == {
        name: int(name) for name in ORDER
    }
    refused("class 11 is out of range: ", twelve, classes=text(tmp_path / "c.txt", *names[:11]))
    refused(
        "class '11' is in no line of",
        twelve,
        classes=text(tmp_path / "c.txt", *map(str, range(11)), "background"),
    )


def test_numbers_that_imagefolder_would_sort_otherwise_come_with_advice(twelve, tmp_path):
    images = load(twelve)
    assert by_folder(images) == {name: int(name) for name in ORDER}
    assert "give the order with --classes FILE" in images.advice
    with pytest.raises(
        ValueError,
        match=r"label 11 of image 3 is out of range: the network has 11 classes, 0..10; the class folders",
    ):
        check_classes(images, 11)
    for folder in ("0", "01", "02"):
        write(tmp_path / "padded" / folder / "a.png")
    assert load(tmp_path / "padded").advice is None  # both orders are one
    for folder in ("3", "17"):
        write(tmp_path / "gaps" / folder / "a.png")
    assert (
        by_folder(load(tmp_path / "gaps")) == {"3": 3, "17": 17} and load(tmp_path / "gaps").advice
    )
    assert load(twelve, classes=text(tmp_path / "c.txt", *ORDER)).advice is None


def test_folders_of_one_class_are_refused(tmp_path):
    for folder in ("one/7", "one/007", "two/caf\u00e9", "two/cafe\u0301"):
        write(tmp_path / folder / "a.png")
    refused("class folders '007' and '7' of", tmp_path / "one")
    refused("class folders 'cafe\\u0301' and 'caf\\xe9' of", tmp_path / "two")


def test_accents_are_one_name_however_they_are_encoded(tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for name, other in ((composed, apart), (apart, composed)):
        base = tmp_path / str(len(name))
        write(base / name / "a.png")
        write(base / "zoo" / "a.png")
        assert load(base).classes == (composed, "zoo")
        assert load(base, classes=text(tmp_path / "c.txt", "zoo", other)).labels.tolist() == [1, 0]
        write(base / "flat" / f"{name}.png")
        for spelling in (f"{other}.png", other, f"{other.upper()}.PNG"):
            images = load(
                base / "flat",
                labels=text(tmp_path / "l.csv", f"{spelling},{other}"),
                classes=tmp_path / "c.txt",
            )
            assert images.names.tolist() == [f"{name}.png"] and images.labels.tolist() == [1]
    write(tmp_path / "both" / f"{composed}.png")
    write(tmp_path / "both" / f"{apart}.png")
    refused(
        "may be any of 'cafe\\u0301.png', 'caf\\xe9.png'",
        tmp_path / "both",
        labels=text(tmp_path / "l.csv", f"{apart}.png,0"),
    )
    assert len(load(tmp_path / "both").images) == 2


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["1 euro", "2 euro", "3D printer"], ["1 euro", "2 euro", "3D printer"]),
        (["1 euro", "2 pence", "3D printer"], ["1 euro", "2 pence", "3D printer"]),
        (["3D printer", "scissors"], ["3D printer", "scissors"]),
        (["4x4 car", "mp3 player", "n95 mask"], ["4x4 car", "mp3 player", "n95 mask"]),
        (["7 up", "cola"], ["7 up", "cola"]),
        (["0 cat", "1 dog", "10 eel"], ["cat", "dog", "eel"]),
        (["c0 reading", "c1 writing a letter"], ["reading", "writing a letter"]),
        (["n01440764\ttench, Tinca tinca", "3D printer"], ["tench, Tinca tinca", "3D printer"]),
        (["2CV", "911"], ["2CV", "911"]),
    ],
    ids=str,
)
def test_what_is_an_identifier(tmp_path, lines, names):
    assert list(read_classes(text(tmp_path / "c.txt", *lines)).names) == names


def test_repeated_lines_matter_where_they_are_named(folders, tmp_path):
    """ImageNet's list has two cranes."""
    classes = text(tmp_path / "c.txt", "crane", "cat", "dog", "eel", "crane")
    assert load(folders, classes=classes).labels.tolist() == [1, 1, 2, 3]
    write(folders / "crane" / "a.png")
    refused("class 'crane' may be any of lines 1, 5 of", folders, classes=classes)


def test_a_class_file_gives_the_order(folders, tmp_path):
    classes = text(tmp_path / "classes.txt", "n07 dog", "cat", "n08", "an eel", "n09 eel")
    images = load(folders, classes=classes)
    assert images.labels.tolist() == [1, 1, 0, 4]
    assert images.classes == ("dog", "cat", "n08", "an eel", "eel")
    check_classes(images, 5)
    with pytest.raises(ValueError, match=r"classes.txt has 5 classes, the network 6 classes"):
        check_classes(images, 6)


def test_a_folder_is_a_line_its_identifier_or_its_name(tmp_path):
    for name in ("n01", "n02 a fish", "great white", "hen"):
        write(tmp_path / "photos" / name / "a.png")
    classes = text(
        tmp_path / "classes.txt", "n01 tench", "n02 a fish", "great white", "great auk", "n05 hen"
    )
    images = load(tmp_path / "photos", classes=classes)
    assert dict(zip([name.split("/")[0] for name in images.names], images.labels, strict=True)) == {
        "n01": 0,
        "n02 a fish": 1,
        "great white": 2,
        "hen": 4,
    }
    assert images.classes == ("tench", "a fish", "great white", "great auk", "hen")


def test_the_class_file_may_lie_beside_the_folders(folders):
    assert load(
        folders, classes=text(folders / "classes.txt", "eel", "dog", "cat")
    ).labels.tolist() == [2, 2, 1, 0]


def test_a_class_file_has_no_empty_line(tmp_path):
    for lines, number in ((["", "cat"], 1), (["cat", " ", "dog"], 2), (["", ""], 1)):
        with pytest.raises(ValueError, match=f"c.txt line {number} is empty"):
            read_classes(text(tmp_path / "c.txt", *lines))
    assert read_classes(text(tmp_path / "c.txt", "cat", "", "")).lines == ("cat",)


def test_unknown_and_ambiguous_folders_are_refused(folders, tmp_path):
    refused(
        "class 'eel' is in no line of",
        folders,
        classes=text(tmp_path / "classes.txt", "cat", "dog"),
    )
    refused(
        "class 'eel' may be any of lines 2, 4 of",
        folders,
        classes=text(tmp_path / "c.txt", "cat", "eel", "dog", "eel"),
    )
    refused("c.txt line 2 is empty", folders, classes=text(tmp_path / "c.txt", "cat", "", "dog"))
    refused("c.txt line 1 is empty", folders, classes=text(tmp_path / "c.txt", ""))
    refused("cannot read nowhere.txt: No such file", folders, classes="nowhere.txt")


def test_a_flat_folder_has_no_labels(flat):
    images = load(str(flat))
    assert images.labels is None and images.classes is None
    assert images.names.tolist() == ["0.png", "1.png", "2.png", "3.png"]
    np.testing.assert_array_equal(images.images, PIXELS[:4])
    check_classes(images, 10)
    second = images.take(np.array([2]))
    assert second.names.tolist() == ["2.png"] and second.labels is None


def test_what_people_did_not_put_there_is_passed_over(flat, folders):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (flat / name).write_bytes(b"no image")
        (flat / "cat" / name).write_bytes(b"no image")
    (flat / ".hidden").mkdir()
    refused("holds both folders (cat) and files (0.png)", flat)
    for i in range(4):
        (flat / f"{i}.png").unlink()
    assert len(load(folders).images) == 4


LEFT_BEHIND = [
    "__MACOSX",
    "@eaDir",
    ".ipynb_checkpoints",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "#recycle",
]


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_folders_that_systems_leave_are_no_classes(folders, flat, name):
    for parent in (folders, folders / "cat"):
        write(parent / name / "thumb.png")
    for i in range(4):
        (flat / f"{i}.png").unlink()
    (folders / "Icon\r").write_bytes(b"")
    images = load(folders)
    assert images.classes == ("cat", "dog", "eel") and len(images.images) == 4


def test_class_folders_without_an_image_are_refused_by_name(folders, tmp_path):
    for i in range(7):
        (folders / f"empty{i}").mkdir()
    (folders / "empty0" / ".DS_Store").write_bytes(b"")
    refused(
        f"class folders of {folders} hold no images: empty0, empty1, empty2, empty3, empty4 and 2 more",
        folders,
    )
    for i in range(1, 7):
        (folders / f"empty{i}").rmdir()
    refused(
        f"class folders of {folders} hold no images: empty0",
        folders,
        classes=text(tmp_path / "c.txt", "cat", "dog", "eel"),
    )
    with pytest.raises(ValueError, match="hold no images: empty0"):
        training_sets(str(folders))


def test_names_that_cannot_be_printed(tmp_path):
    """Bytes that are no UTF-8, line breaks, links in a circle."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        Image.fromarray(PIXELS[0]).save(file, "PNG")
    assert load(tmp_path).names.tolist() == ["caf\ufffd.png"]
    write(tmp_path / "a\nb.png")
    assert len(load(tmp_path, labels=text(tmp_path / "l.csv", '"a\nb.png",1')).images) == 1
    (tmp_path / "l.csv").unlink()
    text(tmp_path / "c\nd.txt")
    refused("c d.txt is not an image", tmp_path)
    (tmp_path / "c\nd.txt").unlink()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    refused(
        "loop.png: Too many levels of symbolic links",
        tmp_path,
        labels=text(tmp_path / "l.csv", "loop,1"),
    )


def test_folders_and_files_that_may_not_be_read(flat, monkeypatch):
    def no(*arguments, **options):
        raise PermissionError(13, "Permission denied", "photos")

    monkeypatch.setattr(photos._pillow(), "open", no)
    refused(f"cannot read {flat / '0.png'}: Permission denied", flat)
    monkeypatch.setattr(type(flat), "iterdir", no)
    refused("cannot read photos: Permission denied", flat)


def test_other_files_are_refused_by_name(flat, folders, tmp_path):
    write(tmp_path / "one" / "a.png")
    text(tmp_path / "one" / "readme.txt")
    refused("readme.txt is not an image: suffix '.txt' is not one of .bmp, .gif", tmp_path / "one")
    write(tmp_path / "two" / "cat" / "inner" / "a.png")
    refused("inner is a folder in a class folder", tmp_path / "two")
    (tmp_path / "three" / "cat").mkdir(parents=True)
    refused("three hold no images", tmp_path / "three")
    (tmp_path / "four").mkdir()
    refused("four holds no images", tmp_path / "four")
    (tmp_path / "five").mkdir()
    os.mkfifo(tmp_path / "five" / "a.png")
    refused("a.png is not a file but a pipe", tmp_path / "five")


def test_paths_that_are_no_source_are_refused(tmp_path):
    refused(
        "neither shapes, shapes:N nor an .npz file, nor tfds:NAME/SPLIT or a folder",
        tmp_path / "nowhere",
    )


# Labels of a flat folder


def test_labels_in_a_csv_file(flat):
    table = text(flat / "labels.csv", "file,class,target", "3.png, 7, 1", "", '"1.png",2,0')
    images = load(flat, labels=table)  # in the folder itself, where it is no image
    assert images.names.tolist() == ["1.png", "3.png"]
    assert images.labels.tolist() == [2, 7] and images.targets.tolist() == [0, 1]
    assert images.labels.dtype == images.targets.dtype == np.int32
    np.testing.assert_array_equal(images.images, PIXELS[[1, 3]])


def test_labels_may_be_names_and_the_header_may_be_missing(flat, tmp_path):
    table = text(tmp_path / "labels.csv", "\ufeff2.png,eel", "0.png,0")
    images = load(flat, labels=table, classes=text(tmp_path / "classes.txt", "n1 cat", "n2 eel"))
    assert images.names.tolist() == ["0.png", "2.png"]
    assert images.labels.tolist() == [0, 1] and images.targets is None
    assert images.classes == ("cat", "eel")


@pytest.mark.parametrize(
    "name",
    [
        "a0.png",
        "a0",
        "photos/a0.png",
        "./a0",
        "/data/photos/a0.png",
        "data\\photos\\a0.png",
        "A0.PNG",
        "A0",
    ],
)
def test_a_file_may_be_named_in_other_ways(tmp_path, name):
    write(tmp_path / "photos" / "a0.png", PIXELS[1])
    write(tmp_path / "photos" / "b.1.JPG", PIXELS[2])
    images = load(
        tmp_path / "photos", labels=text(tmp_path / "l.csv", "image_id,dx", f"{name},1", "b.1,2")
    )
    assert images.names.tolist() == ["a0.png", "b.1.JPG"] and images.labels.tolist() == [1, 2]
    for other in ("test/a0.png", "a0.jpg", "a", "png", "photos", "b"):
        refused(
            f"line 2: no image {other!r} in the folder",
            tmp_path / "photos",
            labels=text(tmp_path / "l.csv", "id,dx", f"{other},1"),
        )


def test_a_name_must_fit_one_file(tmp_path):
    for name in ("a.png", "a.jpg", "A.bmp", "b.png", "b.png.jpg"):
        write(tmp_path / "photos" / name)
    text(tmp_path / "photos" / "b.txt")
    refused(
        "line 1: 'a' may be any of 'a.jpg', 'a.png'",
        tmp_path / "photos",
        labels=text(tmp_path / "l.csv", "a,1"),
    )
    refused(
        "line 2: 'b' for the second time",
        tmp_path / "photos",
        labels=text(tmp_path / "l.csv", "b.png,1", "b,1"),
    )
    images = load(
        tmp_path / "photos",
        labels=text(tmp_path / "l.csv", "a.png,1", "A,2", "b.png,3", "b.png.jpg,4"),
    )
    assert dict(zip(images.names.tolist(), images.labels.tolist(), strict=True)) == {
        "a.png": 1,
        "A.bmp": 2,
        "b.png": 3,
        "b.png.jpg": 4,
    }


@pytest.mark.parametrize(
    "first",
    [
        "missing.heic,1",
        "missing,1",
        "missing,-1",
        "missing,1.0",
        "missing,nan",
        "missing,",
        "missing,dog",
    ],
)
def test_a_first_line_with_a_class_is_no_header(flat, tmp_path, first):
    table, classes = (
        text(tmp_path / "l.csv", first, "1.png,0"),
        text(tmp_path / "c.txt", "n1 cat", "n2 dog"),
    )
    refused("line 1: no image 'missing", flat, labels=table, classes=classes)


def test_a_first_line_for_a_file_is_no_header(flat, tmp_path):
    classes = text(tmp_path / "c.txt", "cat", "dog")
    refused(
        "line 1: class 'cta' is in no line",
        flat,
        labels=text(tmp_path / "l.csv", "0,cta", "1,cat"),
        classes=classes,
    )
    refused(
        "line 1: 1 columns, expected 2 or 3", flat, labels=text(tmp_path / "l.csv", "file", "1,0")
    )


def test_numbers_in_a_table_are_names_where_the_class_file_has_them(flat, tmp_path):
    classes = text(tmp_path / "c.txt", *ORDER)
    images = load(
        flat, labels=text(tmp_path / "l.csv", "0.png,10", "1.png,2", "2.png,011"), classes=classes
    )
    assert images.labels.tolist() == [2, 4, 3]
    refused(
        "line 1: class '12' is in no line",
        flat,
        labels=text(tmp_path / "l.csv", "0.png,12,10"),
        classes=classes,
    )


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators_are_named(flat, tmp_path, mark):
    table = text(tmp_path / "l.csv", f"file{mark}class", f"0.png{mark}1")
    refused("line 1: 1 columns, expected 2 or 3: file name, class", flat, labels=table)
    refused(f"commas separate columns, not {mark!r}", flat, labels=table)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_named(flat, folders, tmp_path, encoding):
    (tmp_path / "l.csv").write_text("0.png,1\n", encoding=encoding)
    refused(
        "l.csv: it is not a UTF-8 text but, it seems, UTF-16; save it as UTF-8",
        flat,
        classes=tmp_path / "l.csv",
    )
    (tmp_path / "l.csv").write_text("caf\u00e9,1\n", encoding="latin-1")
    refused("l.csv: it is not a UTF-8 text", flat, classes=tmp_path / "l.csv")


def test_line_ends_of_every_system_and_no_others(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "c.txt").write_bytes(end.join(["a\u2028b", "c\x0cd", "e"]).encode())
        assert read_classes(tmp_path / "c.txt").lines == ("a\u2028b", "c\x0cd", "e")


def test_a_long_table_takes_seconds(tmp_path):
    classes = ClassList("c.txt", tuple(f"n{i:08} thing {i}" for i in range(1000)))
    files = [f"{i}.png" for i in range(20000)]
    table = text(tmp_path / "l.csv", "id,class", *(f"{i},thing {i % 1000}" for i in range(20000)))
    start = time.process_time()
    assert len(read_labels(table, tmp_path, files, classes)) == 20000
    # a million lines in less than a minute or two; 0.4 s here
    assert time.process_time() - start < 3


BAD_LABELS = {
    "line 2: no image 'x.png' in the folder": ["1.png,0", "x.png,0"],
    "line 1: no image 'y.png' in the folder": ["y.png,0", "1.png,0"],
    "line 3: '1.png' for the second time": ["1.png,0", "2.png,0", "1.png,0"],
    "line 1: class 'eel' is in no line of": ["1.png,eel"],
    "line 1: class 2 is out of range": ["1.png,2"],
    "line 1: class '-1' is in no line of": ["1.png,-1"],
    "line 2: 1 columns, expected 2: file name, class": ["1.png,0", "2.png"],
    "line 2: 2 columns, expected 3: file name, class": ["1.png,0,1", "2.png,0"],
    "line 1: the target class of '1.png' is its class, 'dog'": ["1.png,dog,1"],
    "names none of the files": ["file,class"],
}


@pytest.mark.parametrize("message", BAD_LABELS)
def test_bad_labels_are_refused_by_line(flat, tmp_path, message):
    classes = text(tmp_path / "classes.txt", "cat", "dog")
    refused(
        message, flat, labels=text(tmp_path / "labels.csv", *BAD_LABELS[message]), classes=classes
    )


def test_labels_that_cannot_be_used_are_refused(flat, folders, tmp_path):
    table = text(tmp_path / "labels.csv", "0.png,cat")
    refused("are for a folder of images, which 'shapes' is not", "shapes", labels=table)
    for i in range(4):
        (flat / f"{i}.png").unlink()
    refused("are for a flat folder", folders, labels=table)
    write(tmp_path / "flat" / "0.png")
    refused(
        "line 1: class 'cat' is not a whole number, 0 or more; names need --classes FILE",
        tmp_path / "flat",
        labels=table,
    )
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe")
    refused("is not a UTF-8 text", tmp_path / "flat", labels=table)


# One photograph


def test_the_size_of_the_real_photographs(data_dir):
    """The crops of the data set, made elsewhere, are these pixels exactly."""
    images = load(data_dir / "photos_jpg", size=224)
    with np.load(data_dir / "photos40_224.npz") as truth:
        order = [truth["wnids"].tolist().index(name.split("_")[0]) for name in images.names]
        np.testing.assert_array_equal(images.images, truth["images"][order])


def test_an_image_of_the_right_size_is_left_alone():
    image = PIXELS[0]
    assert photos.fit(image, 8) is photos.fit(image, None) is image
    assert photos.fit(image, 9).shape == (9, 9, 3)
    assert photos.fit(np.zeros((100, 3, 3), np.uint8), 8).shape == (8, 8, 3)


def test_the_centre_is_taken():
    wide = np.random.default_rng(0).integers(0, 256, (224, 1025, 3), np.uint8)
    # 196 * 256 / 224 is 224: nothing to resize
    np.testing.assert_array_equal(photos.fit(wide, 196), wide[14:210, 414:610])
    tall = wide.swapaxes(0, 1)
    np.testing.assert_array_equal(photos.fit(tall, 196), tall[414:610, 14:210])


def test_a_large_image_is_averaged_not_picked():
    checker = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert np.ptp(photos.fit(checker, 28)) <= 2
    assert set(np.unique(photos.fit(checker, 28, nearest=True))) <= {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    corner = np.zeros((16, 32), np.uint8)
    corner[:8, :8] = 255
    path = write(tmp_path / "a.jpg", corner, quality=95, exif=_orientation(orientation))
    turned = corner if orientation < 5 else corner.T
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    np.testing.assert_array_equal(read_photo(path)[..., 0] > 128, turned > 128)


def _orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_odd_metadata_is_not_the_users_concern(flat):
    # a text beyond the end
    outside = (
        b"II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0" + bytes([100, 0, 0, 0, 200, 0, 0, 0]) + bytes(4)
    )
    write(flat / "4.jpg", PIXELS[0], exif=b"Exif\0\0" + outside)
    with pytest.warns(UserWarning, match="Skipping tag"):
        read_photo(flat / "4.jpg")
    assert len(load(flat).images) == 5


BROKEN_EXIF = (
    b"garbage! more garbage",
    b"Exif\0\0II*\0",
    b"\0\x08\0\x02\x01\x12\0\x03",
    b"Exif\0\0MM\0*\xff\xff\xff\xff",
)


@pytest.mark.parametrize("block", BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_malformed_exif_turns_nothing(tmp_path, kind, block):
    options = {"quality": 95} if kind == "jpg" else {"lossless": True} if kind == "webp" else {}
    write(tmp_path / f"a.{kind}", PIXELS[0], exif=block, **options)
    write(tmp_path / "plain" / f"a.{kind}", PIXELS[0], **options)
    np.testing.assert_array_equal(
        load(tmp_path / "plain").images[0], photos.reader(tmp_path, [f"a.{kind}"], None)(0)
    )


def test_an_orientation_that_is_none_turns_nothing(tmp_path):
    for value in (0, 9, 65535):
        np.testing.assert_array_equal(
            read_photo(write(tmp_path / "a.png", PIXELS[0], exif=_orientation(value))), PIXELS[0]
        )
    write(tmp_path / "b.tiff", PIXELS[0], tiffinfo={0x0112: 3})
    np.testing.assert_array_equal(read_photo(tmp_path / "b.tiff"), PIXELS[0][::-1, ::-1])


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (2, 40000), (3, 999)], ids=str)
def test_of_a_strip_the_middle_alone_is_resized(shape):
    """As if the whole strip had been resized, but for roundings; memory does not grow with its length."""
    strip = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    tracemalloc.start()  # sees what NumPy holds
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # and this what Pillow held, in KiB
    large, mask = photos.fit(strip, 224), photos.fit(strip[..., 0] // 128, 224, nearest=True)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # whole: 1 to 5 GB
    tracemalloc.stop()
    assert (
        large.shape == (224, 224, 3) and mask.shape == (224, 224) and set(np.unique(mask)) <= {0, 1}
    )
    side = round(16 * 256 / 224)
    width, height = (round(side * n / min(shape)) for n in shape[::-1])
    left, top = (width - 16) // 2, (height - 16) // 2
    whole = np.asarray(Image.fromarray(strip).resize((width, height), Image.Resampling.BILINEAR))[
        top : top + 16, left : left + 16
    ]
    # Pillow rounds each of its two passes, boxes to float32
    assert np.abs(photos.fit(strip, 16).astype(int) - whole).max() <= 2
    assert photos.fit(strip, 1).shape == (1, 1, 3)


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def _palette():
    return Image.fromarray(PIXELS[0] // 128 * 255).quantize(8)


MODES = {
    "1": (Image.fromarray(GREY > 100), "png", (GREY > 100) * 255),
    "L": (Image.fromarray(GREY), "png", GREY),
    "LA": (
        Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 8), 0)]),
        "png",
        np.full((8, 8), 255),
    ),
    "RGBA": (
        Image.fromarray(np.dstack([GREY] * 3 + [np.full((8, 8), 255, np.uint8)])),
        "png",
        GREY,
    ),
    "half": (
        Image.fromarray(np.dstack([0 * GREY] * 3 + [0 * GREY + 51])),
        "png",
        np.full((8, 8), 204),
    ),
    "I;16": (Image.fromarray(np.array(GREY, np.uint16) * 257 + 128), "png", GREY),
    "I;16 tiff": (Image.fromarray(np.array(GREY, np.uint16) * 257), "tiff", GREY),
    "I pgm": (Image.fromarray(np.array(GREY, np.uint16) * 257), "pgm", GREY),
    "CMYK": (
        Image.merge("CMYK", [Image.fromarray(255 - GREY)] * 3 + [Image.new("L", (8, 8))]),
        "tiff",
        GREY,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_out_in_rgb(tmp_path, mode):
    image, suffix, grey = MODES[mode]
    read = read_photo(write(tmp_path / f"a.{suffix}", image))
    np.testing.assert_array_equal(read, np.repeat(np.asarray(grey)[..., None], 3, -1))


def test_palettes_are_looked_up(tmp_path):
    plain, see_through = (
        read_photo(write(tmp_path / "a.png", _palette(), **options))
        for options in ({}, {"transparency": 0})
    )
    np.testing.assert_array_equal(plain, PIXELS[0] // 128 * 255)
    hidden = np.asarray(_palette()) == 0
    assert (see_through[hidden] == 255).all() and hidden.any()
    np.testing.assert_array_equal(see_through[~hidden], plain[~hidden])


TWELVE = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)


def _png16(path, numbers):
    """A 16-bit PNG in colour, which Pillow cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, bands = numbers.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in numbers)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "name", ["a.png", "a.tiff", "a.pgm", "swapped.tiff", "rgb.png", "rgba.png", "la.png"]
)
def test_twelve_bits_in_sixteen_are_refused(tmp_path, name):
    opaque = np.full_like(TWELVE, 65535)
    colours = {"rgb": [TWELVE] * 3, "rgba": [TWELVE] * 3 + [opaque], "la": [TWELVE, opaque]}
    stem = name.split(".")[0]
    for numbers in (TWELVE, 16 * TWELVE):
        if stem in colours:
            scale = numbers.max() // 4095
            _png16(
                tmp_path / name,
                np.stack([band if band is opaque else scale * band for band in colours[stem]], -1),
            )
        else:
            write(tmp_path / name, numbers.astype(">u2") if stem == "swapped" else numbers)
        if numbers is TWELVE:
            refused(
                f"the 16-bit images of {tmp_path} hold no number above 4095, of 65535, and would be black: multiply",
                tmp_path,
            )
    assert np.abs(load(tmp_path).images[0] - np.linspace(0, 255, 64).reshape(8, 8, 1)).max() <= 1


def test_one_bright_image_vouches_for_its_set(tmp_path):
    write(tmp_path / "a.png", TWELVE)
    write(tmp_path / "b.png", TWELVE * 16)
    assert len(load(tmp_path).images) == 2
    write(tmp_path / "black" / "a.png", 0 * TWELVE)
    write(tmp_path / "black" / "eight.png", PIXELS[0])
    assert len(load(tmp_path / "black").images) == 2


def _frames(path, count):
    frames = [Image.fromarray(image) for image in PIXELS[:count]]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_files_that_are_no_single_image_are_refused_by_name(tmp_path):
    whole = write(
        tmp_path / "w" / "whole.png",
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
    ).read_bytes()
    jpeg = write(tmp_path / "w" / "whole.jpg", PIXELS.reshape(48, 8, 3)).read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "cut.png").write_bytes(whole[: len(whole) // 2])
    (bad / "cut.jpg").write_bytes(jpeg[: len(jpeg) - 60])
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.jpg").write_bytes(b"not at all an image")
    write(bad / "float.tiff", np.zeros((8, 8), np.float32))
    write(bad / "wide.tiff", np.zeros((8, 8), np.int32))
    _frames(bad / "animated.gif", 3)
    _frames(bad / "pages.tiff", 2)
    reasons = {
        "cut.png": "cut.png: ",
        "cut.jpg": "cut.jpg: image file is truncated",
        "empty.png": "empty.png: damaged, or not an image (BMP",
        "text.jpg": "text.jpg: damaged, or not an image (BMP",
        "float.tiff": "float.tiff: it holds floats or 32-bit numbers",
        "wide.tiff": "wide.tiff: it holds floats or 32-bit numbers",
        "animated.gif": "animated.gif: it holds 3 frames",
        "pages.tiff": "pages.tiff: it holds 2 frames",
    }
    for name, reason in reasons.items():
        alone = tmp_path / name.replace(".", "_")
        write(alone / "a.png", PIXELS[0])
        (alone / name).write_bytes((bad / name).read_bytes())
        refused(f"cannot read {alone / reason}", alone, size=8)
    _frames(tmp_path / "single.gif", 1)
    _frames(tmp_path / "phone.mpo", 2)  # a JPEG with a preview
    assert (
        read_photo(tmp_path / "single.gif").shape
        == read_photo(tmp_path / "phone.mpo").shape
        == (8, 8, 3)
    )


@pytest.mark.parametrize(
    "pixels", [60, 40]
)  # Pillow warns of up to twice its limit, and refuses beyond
def test_decompression_bombs_are_refused(flat, monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels if pixels > 50 else 20)
    refused("0.png: Image size (64 pixels) exceeds limit", flat)


def test_images_of_several_sizes_need_one(flat, tmp_path):
    write(flat / "9.png", np.zeros((10, 12, 3), np.uint8))
    refused("0.png is 8 x 8 pixels, 9.png 12 x 10: --size N brings images to one size", flat)
    assert load(flat, size=6).images.shape == (5, 6, 6, 3)
    (flat / "9.png").unlink()
    assert load(flat).images.shape == (4, 8, 8, 3)
    refused("size must be at least 1 and at most 4096, got 0", flat, size=0)


def test_without_pillow_one_line_says_what_to_install(flat, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused("pip install 'adv2_jax[images]'", flat)
    refused("pip install 'adv2_jax[images]'", "shapes:2", size=32)
    assert len(load("shapes:2").images) == 2


# Sizes and samples of arrays


def test_arrays_of_another_size_are_cropped_with_their_masks(tmp_path):
    scenes = shapes.generate(3, seed=1)
    images = load("shapes:3", size=32)
    np.testing.assert_array_equal(images.images[2], photos.fit(scenes.images[2], 32))
    assert images.objects.shape == (3, 32, 32) and images.objects.dtype == bool
    np.testing.assert_array_equal(
        images.objects[2], photos.fit(scenes.objects[2].astype(np.uint8), 32, nearest=True) == 1
    )
    assert np.abs(images.objects.mean() - scenes.objects.mean()) < 0.05
    np.testing.assert_array_equal(load("shapes:3", size=64).images, scenes.images)
    maps, masks = np.random.default_rng(0).random((6, 2, 2), np.float32), PIXELS[..., 0] > 128
    arrays = {"images": PIXELS, "labels": np.arange(6), "target_maps": maps}
    write_arrays(tmp_path / "a.npz", arrays)
    write_arrays(tmp_path / "b.npz", arrays | {"masks": masks})
    images = load(tmp_path / "a.npz", size=4)
    assert images.images.shape == (6, 4, 4, 3) and images.objects is None
    nearest = photos.fit(masks[0].astype(np.uint8), 4, nearest=True) == 1
    np.testing.assert_array_equal(load(tmp_path / "b.npz", size=4).objects[0], nearest)
    np.testing.assert_array_equal(images.target_maps, maps)


def test_a_sample_is_drawn_from_the_seed(flat, tmp_path):
    write_arrays(tmp_path / "a.npz", {"images": np.repeat(PIXELS, 10, 0), "labels": np.arange(60)})
    one, same, other = (
        load(tmp_path / "a.npz", sample=5, seed=seed).labels.tolist() for seed in (3, 3, 4)
    )
    assert one == same == sorted(set(one)) and one != other and len(one) == 5
    # the labels number the images
    assert load(tmp_path / "a.npz", sample=5, seed=3).positions.tolist() == one
    assert load(flat, sample=2, seed=1).positions.tolist() == _drawn(4, 2, 1).tolist()
    np.testing.assert_array_equal(
        load("shapes:20", sample=3, seed=2).images, load("shapes:20").images[_drawn(20, 3, 2)]
    )
    assert (
        load(flat, sample=4).names.tolist()
        == load(flat, sample=9).names.tolist()
        == ["0.png", "1.png", "2.png", "3.png"]
    )
    refused("sample must be at least 1, got 0", flat, sample=0)


def _drawn(n, sample, seed):
    return np.sort(np.random.default_rng(seed).choice(n, sample, replace=False))


def test_only_the_sample_is_decoded(flat, tmp_path):
    (chosen,) = _drawn(4, 1, 0)
    for i in range(4):
        if i != chosen:
            (flat / f"{i}.png").write_bytes(b"damaged")
    images = load(
        flat, sample=1, labels=text(tmp_path / "l.csv", *(f"{i}.png,{i}" for i in range(4)))
    )
    assert images.names.tolist() == [f"{chosen}.png"] and images.labels.tolist() == [chosen]


def test_classes_name_those_of_arrays(tmp_path):
    write_arrays(tmp_path / "a.npz", {"images": PIXELS, "labels": np.array([0, 1, 0, 1, 0, 1])})
    images = load(tmp_path / "a.npz", classes=text(tmp_path / "c.txt", "n1 cat", "n2 dog"))
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1] and images.classes == ("cat", "dog")


@pytest.fixture
def several(tmp_path):
    """Files of several sets, as MedMNIST and Keras write them."""
    grey, labels = PIXELS[..., 0], np.arange(6, dtype=np.uint8) % 3
    med = {
        "train_images": grey[:4],
        "train_labels": labels[:4, None],
        "test_images": PIXELS[4:],
        "test_labels": labels[4:, None],
    }
    np.savez(tmp_path / "med.npz", **med)
    np.savez(
        tmp_path / "keras.npz",
        x_train=grey[:4, ..., None],
        y_train=labels[:4],
        x_test=grey[4:],
        y_test=labels[4:],
    )
    np.savez(tmp_path / "one.npz", val_images=grey, val_labels=labels)
    return tmp_path


def test_one_of_several_sets_in_a_file(several):
    grey = np.repeat(PIXELS[..., :1], 3, -1)
    for source, pixels, labels in (
        ("med.npz/train", grey[:4], [0, 1, 2, 0]),
        ("med.npz/test", PIXELS[4:], [1, 2]),
        ("keras.npz/train", grey[:4], [0, 1, 2, 0]),
        ("keras.npz/test", grey[4:], [1, 2]),
        ("one.npz", grey, [0, 1, 2, 0, 1, 2]),
    ):
        images = load(several / source)
        np.testing.assert_array_equal(images.images, pixels)
        assert images.labels.tolist() == labels and images.labels.dtype == np.int32
    assert not sizes_vary(several / "med.npz/test")
    assert len(load(several / "med.npz/train", sample=2, size=4).images) == 2


def test_files_of_several_sets_are_refused_once(several):
    refused(
        f"med.npz holds the sets train, test: name one, {several}/med.npz/test", several / "med.npz"
    )
    refused("med.npz has no set 'val'; it holds train, test", several / "med.npz/val")
    refused("cannot read", several / "none.npz/test")
    np.savez(several / "many.npz", test_images=PIXELS, test_labels=np.zeros((6, 14), np.uint8))
    refused(
        "many.npz/test: labels must be integers [6], one an image, got uint8 [6, 14]",
        several / "many.npz/test",
    )
    np.savez(
        several / "solid.npz",
        test_images=np.zeros((2, 8, 8, 8), np.uint8),
        test_labels=np.zeros((2, 1), np.uint8),
    )
    refused("images must be non-empty, [N, H, W, 3], got [2, 8, 8, 8]", several / "solid.npz/test")
    np.savez(several / "half.npz", test_images=PIXELS)
    refused("half.npz lacks images and labels; it holds test_images", several / "half.npz")


def test_which_sources_have_images_of_any_size(tmp_path):
    assert [
        sizes_vary(source)
        for source in ("shapes", "shapes:3", "a.npz", tmp_path, "tfds:mnist/test")
    ] == [False] * 3 + [True] * 2


def test_images_of_a_folder_with_the_name_of_a_file_have_any_size(tmp_path):
    (tmp_path / "photos.npz/val").mkdir(parents=True)
    assert sizes_vary(tmp_path / "photos.npz") and sizes_vary(tmp_path / "photos.npz/val")


def test_an_image_set_may_be_images_alone():
    images = ImageSet(PIXELS)
    check_classes(images, 2)
    assert len(images.take(np.arange(6) > 3).images) == 2


# TensorFlow Datasets


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """(name, features, examples, ...) -> a data set that is really prepared, in a folder of its own. TensorFlow is not needed."""
    tfds = pytest.importorskip("tensorflow_datasets")
    writer = pytest.importorskip("array_record.python.array_record_module")
    from tensorflow_datasets.core import constants
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    # TFDS_DATA_DIR, read when the library was imported
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))

    def make(name, features, examples, **info):
        folder = tmp_path / "tfds" / name / "1.0.0"
        folder.mkdir(parents=True)
        file = writer.ArrayRecordWriter(
            str(folder / f"{name}-test.array_record-00000-of-00001"), "group_size:1"
        )
        for example in examples:
            record = tf_example_pb2.Example()
            for key, value in example.items():
                kept = record.features.feature[key]
                (kept.bytes_list if isinstance(value, bytes) else kept.int64_list).value.append(
                    value
                )
            file.write(record.SerializeToString())
        file.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split="test", filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name="test", shard_lengths=[len(examples)], num_bytes=1, filename_template=template
        )
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features,
            split_infos=[split],
            filename_template=template,
            check_data=False,
            **info,
        )
        return folder

    return make


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image_and_label(channels=3, names=("n02", "n01")):
    tfds = pytest.importorskip("tensorflow_datasets")
    image = tfds.features.Image(shape=(None, None, channels))
    return {"image": image, "label": tfds.features.ClassLabel(names=list(names))}


def test_a_prepared_data_set_is_read_without_tensorflow(prepare, tmp_path, caplog):
    prepare(
        "pictures", image_and_label(), [{"image": png(PIXELS[i]), "label": i % 2} for i in range(6)]
    )
    with caplog.at_level(logging.INFO):
        images = load("tfds:pictures/test")
    np.testing.assert_array_equal(images.images, PIXELS)
    assert images.labels.tolist() == [0, 1] * 3 and images.labels.dtype == np.int32
    assert images.classes == ("n02", "n01") and images.names is None
    assert "tensorflow" not in sys.modules and not caplog.records
    np.testing.assert_array_equal(load("tfds:pictures:1.0.0/test[1:3]").images, PIXELS[1:3])
    np.testing.assert_array_equal(
        load("tfds:pictures/test", sample=2, seed=5).images, PIXELS[_drawn(6, 2, 5)]
    )
    assert load("tfds:pictures/test", size=6).images.shape == (6, 6, 6, 3)
    assert (
        load(
            "tfds:pictures/test", classes=text(tmp_path / "c.txt", "n01 tench", "n02 eel")
        ).labels.tolist()
        == [1, 0] * 3
    )
    with pytest.raises(
        ValueError, match="tfds:pictures/test has 2 classes, the network 1000 classes"
    ):
        check_classes(images, 1000)


def test_grey_and_transparent_data_sets(prepare):
    prepare("grey", image_and_label(1), [{"image": png(GREY), "label": 0}])
    np.testing.assert_array_equal(load("tfds:grey/test").images[0], np.dstack([GREY] * 3))
    prepare(
        "clear", image_and_label(4), [{"image": png(np.zeros((8, 8, 4), np.uint8)), "label": 0}]
    )
    assert (np.asarray(load("tfds:clear/test").images) == 255).all()
    prepare(
        "wrong", image_and_label(3), [{"image": png(np.zeros((8, 8, 4), np.uint8)), "label": 0}]
    )
    refused(
        "cannot read tfds:wrong/test, example 0: it must be uint8 with 1, 3 or 4 channels, got uint8 [8, 8, 4]",
        "tfds:wrong/test",
    )


def test_unlabelled_data_sets(prepare):
    features = image_and_label()
    prepare("test_only", features, [{"image": png(PIXELS[0]), "label": -1}])
    assert load("tfds:test_only/test").labels is None
    prepare("partly", features, [{"image": png(PIXELS[i]), "label": -i} for i in range(2)])
    refused("tfds:partly/test: some images have labels and some have none", "tfds:partly/test")
    prepare("plain", {"image": features["image"]}, [{"image": png(PIXELS[0])}])
    assert load("tfds:plain/test").labels is None


def test_labels_are_read_without_decoding_the_images(prepare):
    rows = [{"image": png(PIXELS[i]), "label": i % 2} for i in range(6)]
    prepare("damaged", image_and_label(), [*rows, {"image": b"no image", "label": 1}])
    images = load("tfds:damaged/test")
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1, 1]
    np.testing.assert_array_equal(images.take(np.arange(7) > 3).images[:2], PIXELS[4:])
    refused("cannot read tfds:damaged/test, example 6: cannot identify image", "tfds:damaged/test")


def test_classes_without_names_are_numbers(prepare, tmp_path):
    prepare("digits", image_and_label(names="01"), [{"image": png(PIXELS[0]), "label": 1}])
    images = load("tfds:digits/test", classes=text(tmp_path / "c.txt", "zero", "one"))
    assert images.labels.tolist() == [1] and images.classes == ("zero", "one")
    images = load("tfds:digits/test", classes=text(tmp_path / "c.txt", "1", "0"))
    assert images.labels.tolist() == [0]
    refused(
        "class 1 is out of range: ", "tfds:digits/test", classes=text(tmp_path / "c.txt", "zero")
    )


def test_features_are_found_or_refused(prepare):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = image_and_label()
    two = {**features, "coarse": features["label"]}
    rows = [{"image": png(PIXELS[0]), "label": 1, "coarse": 0}]
    prepare("two", two, rows)
    refused("tfds:two/test: exactly one ClassLabel feature is wanted, the set has", "tfds:two/test")
    prepare("two_keyed", two, rows, supervised_keys=("image", "label"))
    assert load("tfds:two_keyed/test").labels.tolist() == [1]
    prepare("text", {"words": tfds.features.Text()}, [{"words": b"none"}])
    refused("exactly one Image feature is wanted, the set has words (Text)", "tfds:text/test")


def test_data_sets_that_cannot_be_read_are_refused(prepare, tmp_path):
    folder = prepare("pictures", image_and_label(), [{"image": png(PIXELS[0]), "label": 0}])
    refused("expected tfds:NAME/SPLIT", "tfds:pictures")
    refused("expected tfds:NAME/SPLIT", "tfds:pictures/")
    refused(
        "cannot read tfds:pictures/train: Unknown split 'train'. Should be one of ['test']",
        "tfds:pictures/train",
    )
    refused("cannot read tfds:pictures/test[5:9]: Requested slice", "tfds:pictures/test[5:9]")
    refused(
        "has no data set 'cifar11', and none of that name is prepared; did you mean cifar10",
        "tfds:cifar11/test",
    )
    refused(
        "cannot read tfds:cifar10:9.9.9: Dataset cifar10 cannot be loaded at version 9.9.9, only:",
        "tfds:cifar10:9.9.9/test",
    )
    (folder / "pictures-test.array_record-00000-of-00001").unlink()
    refused("cannot read tfds:pictures/test: open() failed: No such file", "tfds:pictures/test")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refused("prepare it as array_record in another folder (TFDS_DATA_DIR)", "tfds:pictures/test")


def test_data_sets_not_prepared_say_how_to(prepare, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        refused(
            f"tfds:mnist/test is not prepared: there is none in {tmp_path / 'tfds' / 'mnist'}",
            "tfds:mnist/test",
        )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    recipe = "(needs pip install tensorflow): python -c \"import tensorflow_datasets as tfds; tfds.builder('mnist'"
    refused(recipe + ", file_format='array_record').download_and_prepare()\"", "tfds:mnist/test")
    manual = tmp_path / "tfds" / "downloads" / "manual"
    refused(
        f"download its files by hand into {manual} (manual_dir should contain two files: ILSVRC",
        "tfds:imagenet2012/validation",
    )


def test_mocked_data_sets():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=5):
        images = load("tfds:cifar10/test")
        assert images.images.shape == (5, 32, 32, 3) and images.images.dtype == np.uint8
        assert len(images.classes) == 10 and images.labels.shape == (5,)
        assert load("tfds:mnist/test", size=32, sample=3).images.shape == (3, 32, 32, 3)
        assert load("tfds:imagenet2012/validation", size=16).images.shape == (5, 16, 16, 3)
        refused("--size N brings images to one size", "tfds:imagenet2012/validation")
