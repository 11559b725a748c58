"""Data sets read from files: what a batch holds, that it follows from (seed, step) alone, what is refused."""

import csv
import pickle

import numpy
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torchvision.datasets import CIFAR10

from gpipe.training.data import DataConfig, build_data
from gpipe.training.data_images import FileImages

CONFIG = TypeAdapter(DataConfig)


def build(seed=0, **settings):
    return build_data(CONFIG.validate_python(settings), seed=seed)


def same(one, other):
    """Whether two trees of tuples, tensors and None are equal to the bit."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one is other is None if one is None or other is None else torch.equal(one, other)


def paint(path, colour, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        paint(tmp_path / "photos" / "tabby_cat" / f"{i}.png", (200, 10 * i, 0))
        paint(tmp_path / "photos" / "dog" / f"{i}.png", (0, 10 * i, 200))
    return tmp_path / "photos"


@pytest.fixture
def captions(tmp_path):
    rows = [(f"images/{i}.png", f"picture number {i}") for i in range(5)]
    rows += [("images/0.png", "another word, for it"), ("images/1.png", "another word, for it")]
    for i in range(5):
        paint(tmp_path / "images" / f"{i}.png", (50 * i, 0, 0))
    return write_csv(tmp_path / "captions.csv", [("image", "caption"), *rows])


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The published layout with two images a file; torchvision's checksums are those of the real files."""
    where = tmp_path / "cifar-10-batches-py"
    where.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        data = numpy.full((2, 3072), 40 * i, dtype=numpy.uint8)
        data[:, :1024] = 255  # the red plane comes first
        data[:, 2 * 1024 + 5] = 7  # the blue plane's first row, sixth column
        (where / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 3, (i + 1) % 3]}))
    (where / "batches.meta").write_bytes(pickle.dumps({"label_names": ["aeroplane", "bird", "cat"]}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return tmp_path


@pytest.fixture
def novel(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_bytes(bytes(range(100)))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "digits"},
        {"name": "digits", "task": "classification"},
        {"name": "coloured_digits"},
        "folder",
        "csv",
        "text",
    ],
    ids=str,
)
def test_batches_follow_from_seed_and_step_alone(settings, folder, captions, novel):
    paths = {
        "folder": {"name": "image_folder", "path": folder, "image_size": 4},
        "csv": {"name": "captions_csv", "path": captions, "image_size": 4},
        "text": {"name": "text", "path": novel, "context_length": 8},
    }
    settings = paths.get(settings, settings) if isinstance(settings, str) else settings
    data, state = build(seed=5, **settings), torch.get_rng_state()
    straight = [data.batch(step, 4) for step in range(6)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was moved"
    torch.rand(3)
    resumed = build(seed=5, **settings)
    assert all(same(resumed.batch(step, 4), straight[step]) for step in (5, 3, 4))
    assert not same(straight[0], straight[1])
    assert not same(build(seed=6, **settings).batch(0, 4), straight[0])


# Image folder and CIFAR-10


def test_image_folder(folder):
    data = build(name="image_folder", path=folder, image_size=4, augment=None, mean=[0.0] * 3, std=[1.0] * 3)
    assert data.classes == ["dog", "tabby cat"]
    assert (data.rows, len(data.test_images)) == (8, 2)
    assert sorted(data.test_labels.tolist()) == [0, 1]
    assert "a photo of a tabby cat." in data.captions
    (images, tokens, end), targets = data.batch(0, 8)
    assert (images.shape, tokens.shape, end.shape, targets) == ((8, 3, 4, 4), (8, 77), (8,), None)
    assert sorted(images[:, 2, 0, 0].tolist()) == pytest.approx([0.0] * 4 + [200 / 255] * 4)


def test_image_folder_for_classification_with_a_test_folder(folder, tmp_path):
    paint(tmp_path / "test" / "dog" / "x.png", (1, 2, 3))
    paint(tmp_path / "test" / "tabby_cat" / "x.png", (1, 2, 3))
    data = build(name="image_folder", path=folder, test_path=tmp_path / "test", image_size=4, task="classification")
    images, labels = data.batch(0, 10)
    assert (data.rows, data.test_labels.tolist()) == (10, [0, 1])
    assert (images.shape, sorted(labels.tolist())) == ((10, 3, 4, 4), [0] * 5 + [1] * 5)


def test_files_keep_their_aspect_and_lose_their_edges(tmp_path):
    wide = numpy.zeros((4, 12, 3), dtype=numpy.uint8)
    wide[:, 4:8] = 255  # the middle third
    Image.fromarray(wide).save(tmp_path / "wide.png")
    tall = Image.fromarray(wide).rotate(90, expand=True).convert("L")
    tall.save(tmp_path / "tall.png")
    images = FileImages([tmp_path / "wide.png", tmp_path / "tall.png"], 4)[torch.tensor([0, 1])]
    assert torch.equal(images, torch.ones(2, 3, 4, 4))


def test_grey_images_of_16_bits_keep_their_range(tmp_path):
    grey = numpy.array([[0, 257], [32768, 65535]], dtype=numpy.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    images = FileImages([tmp_path / "grey.png", tmp_path / "grey.tiff"], 2)[torch.tensor([0, 1])]
    assert images.mul(255).tolist() == [[[[0, 1], [128, 255]]] * 3] * 2


@pytest.mark.parametrize(("kind", "mode"), [(numpy.int32, "I"), (numpy.float32, "F")])
def test_images_of_unknown_range_are_refused(tmp_path, kind, mode):
    Image.fromarray(numpy.ones((2, 2), dtype=kind)).save(tmp_path / "x.tiff")
    images = FileImages([tmp_path / "x.tiff"], 2)
    with pytest.raises(
        ValueError, match=rf"x\.tiff, which cannot be decoded \(pixels of mode '{mode}' have no known ra"
    ):
        images[torch.tensor([0])]


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    paint(tmp_path / "bomb.png", (1, 2, 3))
    images = FileImages([tmp_path / "bomb.png"], 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11)  # more than twice as many are refused
    with pytest.raises(
        ValueError, match=r"expected an image file, got .*bomb\.png, which cannot be decoded \(Image size"
    ):
        images[torch.tensor([0])]


def test_missing_folder_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a folder that holds one folder of images per class.*nowhere"):
        build(name="image_folder", path=tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="path: expected a folder that holds one folder of images per class"):
        build(name="image_folder", path=tmp_path / "flat")


def test_folders_with_other_classes_are_refused(folder, tmp_path):
    paint(tmp_path / "test" / "dog" / "x.png", (1, 2, 3))
    with pytest.raises(ValueError, match=r"test_path: expected the class folders.*\['tabby_cat'\] are in only one"):
        build(name="image_folder", path=folder, test_path=tmp_path / "test")


def test_a_class_of_one_image_cannot_be_divided(folder):
    paint(folder / "bird" / "x.png", (1, 2, 3))
    with pytest.raises(ValueError, match="path: expected at least 2 images of every class, got 1 of 'bird'"):
        build(name="image_folder", path=folder)


def test_a_damaged_image_is_named(folder):
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"no image")
    data = build(name="image_folder", path=folder, image_size=4)
    with pytest.raises(ValueError, match=r"expected an image file, got .*\.png, which cannot be decoded"):
        data.batch(0, 1)


def test_cifar10(cifar):
    data = build(name="cifar10", path=cifar, augment=None, mean=[0.0] * 3, std=[1.0] * 3)
    assert (data.rows, len(data.test_images)) == (10, 2)
    assert data.classes == ["aeroplane", "bird", "cat"]
    (images, tokens, _), targets = data.batch(0, 10)
    assert (images.shape, tokens.shape, targets) == ((10, 3, 32, 32), (10, 77), None)
    assert (images[:, 0] == 1).all()
    assert sorted(images[:, 1, 0, 0].mul(255).round().tolist()) == [0, 0, 40, 40, 80, 80, 120, 120, 160, 160]
    assert data.test_images[torch.tensor([1])][0, 2, 31, 31] == 200 / 255
    assert (images[:, 2] == 7 / 255).nonzero()[:, 1:].tolist() == [[0, 5]] * 10


def test_missing_cifar10_says_what_was_expected(tmp_path):
    with pytest.raises(
        ValueError, match=r"path: expected a folder that holds cifar-10-batches-py/.*data_batch_1.*unpack"
    ):
        build(name="cifar10", path=tmp_path)


# Captions


def captions_of(data, step, rows):
    """The texts of a batch."""
    tokens = data.batch(step, rows)[0][1]
    known = {tuple(data.tokenizer([text])[0][0].tolist()): text for text in data.train.texts}
    return [known[tuple(row.tolist())] for row in tokens]


def test_captions_csv(captions):
    data = build(name="captions_csv", path=captions, image_size=4, augment=None, mean=[0.0] * 3, std=[1.0] * 3)
    assert len(data.test_images) == 1
    assert data.rows == 7 - len(data.matches)
    (images, _, end), targets = data.batch(0, data.rows)
    assert targets is None
    assert (images.shape, end.shape) == ((data.rows, 3, 4, 4), (data.rows,))
    texts = captions_of(data, 0, data.rows)
    assert texts.count("another word, for it") == 2 - data.captions.count("another word, for it")
    assert len(set(texts)) == len(data.train.texts)
    numbers = images[:, 0, 0, 0].mul(255 / 50).round().int().tolist()
    for number, text in zip(numbers, texts, strict=True):
        assert text == f"picture number {number}" or (text == "another word, for it" and number in (0, 1))


def test_an_images_captions_stay_on_one_side(captions):
    data = build(name="captions_csv", path=captions, image_size=4)
    for part in (data, data.validation()):
        train = {part.train.images[torch.tensor([i])].sum().item() for i in range(len(part.train.images))}
        test = {part.test.images[torch.tensor([i])].sum().item() for i in range(len(part.test.images))}
        assert not train & test
        assert sorted(set(part.matches[:, 0].tolist())) == list(range(len(part.test_images)))
        assert sorted(set(part.matches[:, 1].tolist())) == list(range(len(part.captions)))


def test_captions_of_several_images_are_matched_to_all(captions):
    data = build(name="captions_csv", path=captions, test_path=captions, image_size=4)
    assert (data.rows, len(data.test_images), len(data.captions)) == (7, 5, 6)
    shared = data.captions.index("another word, for it")
    assert {int(image) for image, text in data.matches if text == shared} == {0, 1}


def test_one_file_is_one_image_however_it_is_spelt(captions, tmp_path):
    path = write_csv(
        tmp_path / "b.csv",
        [("image", "caption"), ("images/0.png", "a"), ("./images/../images/0.png", "b"), ("images/1.png", "c")],
    )
    data = build(name="captions_csv", path=path, test_path=path, image_size=4)
    assert (len(data.test_images), len(data.captions), len(data.matches)) == (2, 3, 3)


def test_bad_rows_are_named_by_line(captions, tmp_path):
    rows = [("image", "caption"), ("images/0.png", "fine"), ("images/9.png", "gone"), ("images/1.png", " ")]
    path = write_csv(tmp_path / "bad.csv", [*rows, ("images/2.png",), ("images/3.png", "a", "b")])
    faults = ["line 3: there is no file .*9.png", "line 4: .* empty", "line 5: .* empty", "line 6: more fields .*"]
    with pytest.raises(ValueError, match=r"got 4 bad rows; .*:\n  " + r"\n  ".join(faults)):
        build(name="captions_csv", path=path)


def test_a_damaged_image_is_named_by_line(captions, tmp_path):
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    data = build(name="captions_csv", path=captions, test_path=captions, image_size=4)
    with pytest.raises(ValueError, match=r"captions\.csv, line 5: expected an image file, got .*3\.png"):
        data.batch(0, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,caption\n", r"expected the columns 'image' and 'caption'.*got \['file', 'caption'\]"),
        (b"", r"expected the columns 'image' and 'caption'.*got \[\]"),
        (b"image,caption\n", "expected at least 2 images in .* got 0"),
        (b"image,caption\nx.png,caf\xe9\n", "expected a CSV file in UTF-8"),
    ],
)
def test_files_that_are_no_captions_are_refused(content, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(name="captions_csv", path=tmp_path / "x.csv")


def test_missing_captions_file_is_named(captions, tmp_path):
    with pytest.raises(ValueError, match=r"^path: expected a CSV file, got .*gone\.csv"):
        build(name="captions_csv", path=tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"^test_path: expected a CSV file, got .*gone\.csv"):
        build(name="captions_csv", path=captions, test_path=tmp_path / "gone.csv")


def test_a_test_caption_too_long_is_refused_before_training(captions, tmp_path):
    long = write_csv(tmp_path / "long.csv", [("image", "caption"), ("images/0.png", "a " * 9), ("images/1.png", "b")])
    with pytest.raises(ValueError, match="context_length"):
        build(name="captions_csv", path=captions, test_path=long, context_length=8)


# Text


def test_text_windows_are_shifted_by_one(novel):
    data = build(name="text", path=novel, context_length=8)
    assert (data.rows, data.test_rows) == (11, 1)  # 90 bytes and 10
    inputs, targets = data.batch(0, 11)
    assert (inputs.shape, inputs.dtype) == ((11, 8), torch.int64)
    assert torch.equal(targets, inputs + 1)  # byte i of the file is i
    assert sorted(inputs[:, 0].tolist()) == list(range(0, 88, 8))
    assert build(name="text", path=novel, context_length=9).rows == 9  # the last byte of a part can only be a target
    inputs, targets = data.test_batch(torch.tensor([0]))
    assert (inputs.tolist(), targets[0, -1]) == ([list(range(90, 98))], 98)


def test_text_of_several_files_is_laid_end_to_end(novel, tmp_path):
    (tmp_path / "more.txt").write_bytes(bytes(range(100, 200)))
    data = build(name="text", path=[str(novel), str(tmp_path / "more.txt")], context_length=8)
    assert data.train.tolist() + data.test.tolist() == list(range(200))


def test_text_validation_is_the_end_of_the_training_part(novel):
    division = build(name="text", path=novel, context_length=4, evaluate_on="validation")
    assert division.train.tolist() == list(range(81))
    assert division.test.tolist() == list(range(81, 90))


def test_text_that_fills_no_window_is_refused(novel, tmp_path):
    with pytest.raises(ValueError, match="context_length: expected at most 9, one less than the bytes of the held-out"):
        build(name="text", path=novel, context_length=10)
    with pytest.raises(ValueError, match=r"path: expected a text file, got .*gone\.txt"):
        build(name="text", path=tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="got an empty list"):
        build(name="text", path=[])
