"""Data sets by name: their configuration, the digits and the coloured digits."""

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from gpipe.training.data import DataConfig, build_data
from gpipe.training.data_digits import NAMES, TINTS

CONFIG = TypeAdapter(DataConfig)


def build(seed=0, **settings):
    return build_data(CONFIG.validate_python(settings), seed=seed)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValidationError, match=r"digits.*coloured_digits.*image_folder.*cifar10.*captions_csv.*text"):
        build(name="mnist")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "digits", "augmnt": None}, r"augmnt\n *Extra inputs"),
        ({"name": "digits", "augment": {"degrees": "15"}}, r"augment.degrees\n *Input should be a valid number"),
        ({"name": "digits", "augment": {"scale": 1.0}}, r"augment.scale\n *Input should be less than 1"),
        ({"name": "digits", "context_length": True}, r"context_length\n *Input should be a valid integer"),
        ({"name": "image_folder"}, r"path\n *Field required"),
        ({"name": "text", "path": "a.txt", "test_fraction": 0.6}, r"test_fraction\n *Input should be less than or"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        build(**settings)


def test_configuration_survives_its_own_yaml_form():
    config = CONFIG.validate_python({"name": "text", "path": ["a.txt", "b.txt"]})
    assert CONFIG.validate_python({"name": "text", "path": ["a.txt", "b.txt"]}) == config
    assert CONFIG.validate_json(CONFIG.dump_json(config)) == config
    assert config.path == [Path("a.txt"), Path("b.txt")]


def test_a_bad_seed_is_refused_when_built():
    with pytest.raises(ValueError, match="seed of at least 0, got -1"):
        build(seed=-1, name="digits")


# Digits


def test_digits():
    data = build(name="digits")
    assert (data.rows, len(data.test_images), len(data.test_labels)) == (1437, 360, 360)
    assert data.classes == [str(digit) for digit in range(10)]
    assert data.templates[0] == 'a photo of the number: "{}".'
    assert len(set(data.templates)) == 6
    counts = torch.bincount(data.test_labels)
    assert (counts.min(), counts.max()) == (35, 37)
    assert data.captions == [f'a photo of the number: "{digit}".' for digit in range(10)]
    assert torch.equal(data.matches, torch.stack((torch.arange(360), data.test_labels), dim=1))
    pixels = data.test_images[torch.arange(360)]
    assert (pixels.shape, pixels.dtype, float(pixels.min()), float(pixels.max())) == (
        (360, 1, 8, 8),
        torch.float32,
        -1,
        1,
    )


def test_digits_batch_pairs_image_and_caption():
    templates = ["{}", "a {}", "the number {}", "this is a {}", "one more {} is here", "what a fine {} this is"]
    data = build(name="digits", augment=None, templates=templates)
    (images, tokens, end), targets = data.batch(0, 300)
    assert targets is None
    assert (images.shape, tokens.shape, end.shape) == ((300, 1, 8, 8), (300, 16), (300,))
    pixels = data.parts.train.images[torch.arange(data.rows)] * 2 - 1
    seen = set()
    for row in range(300):
        label = int(data.parts.train.labels[(pixels == images[row]).all(dim=(1, 2, 3))][0])
        texts = [template.format(label) for template in data.templates]
        expected = data.tokenizer(texts)[0]
        template = (expected == tokens[row]).all(dim=1).nonzero()
        assert len(template) == 1
        seen.add(int(template))
        assert end[row] == data.tokenizer(texts)[1][template]
    assert seen == set(range(6))


def test_digits_for_classification():
    data = build(name="digits", task="classification", augment=None)
    images, labels = data.batch(0, 32)
    pixels = data.parts.train.images[torch.arange(data.rows)] * 2 - 1
    assert labels.dtype == torch.int64
    for image, label in zip(images, labels, strict=True):
        assert label in data.parts.train.labels[(pixels == image).all(dim=(1, 2, 3))]


def test_the_test_part_does_not_depend_on_the_seed():
    one, other = build(seed=0, name="digits"), build(seed=1, name="digits")
    rows = torch.arange(360)
    assert torch.equal(one.test_images[rows], other.test_images[rows])


def rows_of(images):
    return {image.numpy().tobytes() for image in images[torch.arange(len(images))]}


def test_validation_is_taken_from_the_training_part():
    data = build(name="digits")
    division = data.validation()
    assert rows_of(division.train_images) | rows_of(division.test_images) == rows_of(data.train_images)
    assert not rows_of(division.test_images) & rows_of(data.test_images)
    assert (division.rows, len(division.test_images)) == (1149, 288)
    deeper = division.validation()
    assert rows_of(deeper.train_images) | rows_of(deeper.test_images) == rows_of(division.train_images)


def test_evaluate_on_validation_is_the_validation_division():
    one, other = build(name="digits", evaluate_on="validation"), build(name="digits").validation()
    for a, b in zip(one.batch(2, 8)[0], other.batch(2, 8)[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.test_labels, other.test_labels)


def test_templates_need_one_place_for_the_class():
    with pytest.raises(ValueError, match=r"templates: expected \{\} exactly once.*got 'a digit'"):
        build(name="digits", templates=["a digit"])
    with pytest.raises(ValueError, match="templates: expected at least one"):
        build(name="digits", templates=[])


def test_tokenizer_is_found_by_its_path():
    with pytest.raises(ValueError, match=r"tokenizer: expected a dotted path such as .*WordTokenizer.*no_such"):
        build(name="digits", tokenizer="gpipe.models.tokenizer.no_such")
    with pytest.raises(ValueError, match=r"tokenizer: expected a callable of \(texts, context_length\), got math"):
        build(name="digits", tokenizer="math.sqrt")


# Coloured digits


def pair_sets(data):
    return set(data.parts.train.labels.tolist()), set(data.test_labels.tolist())


def test_coloured_digits_never_show_the_unseen_pairs():
    data = build(name="coloured_digits")
    shown, tested = pair_sets(data)
    unseen = set(data.parts.groups["unseen_pairs"].tolist())
    assert (len(data.classes), len(shown), len(unseen), len(tested)) == (80, 60, 20, 80)
    assert shown == set(range(80)) - unseen == set(data.parts.groups["seen_pairs"].tolist())
    assert {pair // 8 for pair in unseen} == set(range(10))
    assert {pair % 8 for pair in unseen} == set(range(8))
    drawn = {int(label) for step in range(30) for label in batch_labels(data, step)}
    assert drawn <= shown
    assert len(drawn) == 60


def batch_labels(data, step):
    """The classes of a batch, read back from its captions."""
    tokens = data.batch(step, 64)[0][1]
    texts = [t.replace("{}", name) for name in data.classes for t in data.templates]
    known = {tuple(row.tolist()): i // len(data.templates) for i, row in enumerate(data.tokenizer(texts)[0])}
    return [known[tuple(row.tolist())] for row in tokens]


def test_coloured_digits_have_the_colour_of_their_caption():
    data = build(name="coloured_digits")
    assert data.classes[7 * 8] == "red seven"
    assert data.captions[7 * 8] == "a red seven."
    assert [name.split()[1] for name in data.classes[::8]] == NAMES
    pixels = (data.test_images[torch.arange(len(data.test_images))] + 1) / 2
    for label, image in zip(data.test_labels.tolist(), pixels, strict=True):
        tint = torch.tensor(TINTS[data.classes[label].split()[0]])
        torch.testing.assert_close(image, image.amax(dim=0) * tint[:, None, None])  # every tint's largest part is 1


def test_coloured_digits_probe_is_the_digit():
    data = build(name="coloured_digits")
    for labels, digits in zip((data.parts.train.labels, data.test_labels), data.probe_labels(), strict=True):
        names = [data.classes[label].split()[1] for label in labels.tolist()]
        assert names == [NAMES[digit] for digit in digits.tolist()]


def test_coloured_digits_groups_cover_the_test_images():
    groups = build(name="coloured_digits").groups
    assert {name: int(mask.sum()) for name, mask in groups.items()} == {"unseen_pairs": 720, "seen_pairs": 2160}


def test_coloured_validation_has_unseen_pairs_of_its_own_and_touches_no_test_pair():
    data = build(name="coloured_digits")
    never = set(data.parts.groups["unseen_pairs"].tolist())
    for _ in range(2):
        data = data.validation()
        shown, tested = pair_sets(data)
        unseen = set(data.parts.groups["unseen_pairs"].tolist())
        assert len(unseen) == 10
        assert not (shown | tested) & never
        assert not shown & unseen
        assert tested == shown | unseen
        never |= unseen


def test_coloured_validation_holds_out_digits_in_every_tint():
    data = build(name="coloured_digits")
    division = data.validation()

    def shapes(images):  # the digit without its tint
        return {image.amax(dim=0).numpy().tobytes() for image in images[torch.arange(len(images))]}

    assert not shapes(division.train_images) & shapes(division.test_images)
    assert not shapes(data.test_images) & shapes(division.test_images)


# Examples


@pytest.mark.parametrize("example", ["clip_digits", "clip_colours"])
def test_examples_fit_their_tokenizer(example):
    file = yaml.safe_load((Path(__file__).parents[1] / "examples" / f"{example}.yaml").read_text())
    tokenizer = build(**file["data"]).tokenizer
    arguments = file["model"]["arguments"]
    assert arguments["vocabulary_size"] == tokenizer.vocabulary_size
    assert arguments["context_length"] == tokenizer.context_length
