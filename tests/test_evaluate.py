"""Zero-shot classification, retrieval, the linear probe, and what evaluation makes of a model."""

import gzip
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from gpipe.models.clip_prompts import IMAGENET_TEMPLATES
from gpipe.training.data import build_data
from gpipe.training.data_captions import CaptionedImages, CaptionsConfig, Pairs
from gpipe.training.data_digits import ColouredDigitsConfig, DigitsConfig, coloured_digits, digits
from gpipe.training.data_folders import ImageFolderConfig
from gpipe.training.data_images import TensorImages
from gpipe.training.data_text import TextWindows
from gpipe.training.evaluate import evaluate
from gpipe.training.features import encode_images, evaluating
from gpipe.training.linear_probe import linear_probe
from gpipe.training.retrieval import ranks, retrieval, summarise
from gpipe.training.zero_shot import accuracy, class_features, classify, zero_shot_classifier


class Oracle(nn.Module):
    """Knows the label of every image and of every caption of a labelled data set; features are one-hot labels.

    Args:
        data: The data set.
        confuse: Labels by the label that is seen in their stead.
    """

    def __init__(self, data, confuse=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        seen = dict(confuse)
        texts = [t.replace("{}", name) for name in data.classes for t in data.templates]
        tokens = data.tokenizer(texts)[0]
        self.text_of = {tuple(row.tolist()): i // len(data.templates) for i, row in enumerate(tokens)}
        self.image_of = {}
        for images, labels in ((data.train_images, data.parts.train.labels), (data.test_images, data.test_labels)):
            for image, label in zip(images[torch.arange(len(labels))], labels.tolist(), strict=True):
                self.image_of[image.numpy().tobytes()] = seen.get(label, label)
        self.classes = len(data.classes)
        self.sizes = []

    def _features(self, labels):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.sizes.append(len(labels))
        one_hot = functional.one_hot(torch.tensor(labels), self.classes).float()
        return self.dropout(one_hot) * self.weight

    def encode_image(self, images):
        return self._features([self.image_of[image.numpy().tobytes()] for image in images])

    def encode_text(self, tokens, end):
        return self._features([self.text_of[tuple(row.tolist())] for row in tokens])


# Zero-shot classification


def test_class_features_average_directions_not_lengths():
    captions = torch.tensor([[[100.0, 0.0], [0.0, 1.0]], [[0.0, -2.0], [0.0, -4.0]]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(class_features(captions), torch.tensor([[half, half], [0.0, -1.0]]))


def test_classify_by_cosine_not_by_product():
    images = torch.tensor([[1.0, 0.9], [0.0, 3.0]])
    classes = torch.tensor([[1.0, 1.0], [0.0, 50.0]])
    assert classify(images, classes).tolist() == [0, 1]


def test_accuracy():
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 0])) == 0.75
    with pytest.raises(ValueError, match=r"as many predictions as labels.*got \(2,\) and \(3,\)"):
        accuracy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"at least one, got \(0,\)"):
        accuracy(torch.zeros(0), torch.zeros(0))


def test_a_zero_shot_classifier_of_class_names_and_prompts():
    data = digits(DigitsConfig(name="digits"), seed=0)
    oracle = Oracle(data)
    weights = zero_shot_classifier(oracle, data.tokenizer, data.classes, data.templates, batch_size=7)
    assert torch.equal(weights, torch.eye(10))
    assert set(oracle.sizes) == {7, 4}  # 60 captions
    images = encode_images(oracle, data.test_images, batch_size=100)
    assert torch.equal(classify(images, weights), data.test_labels)
    one = zero_shot_classifier(oracle, data.tokenizer, data.classes[7:8], data.templates[:1])
    assert one.argmax().item() == 7


def test_prompts_without_a_place_for_the_class_are_refused():
    for templates in (["a photo."], ["{} and {}"]):
        with pytest.raises(ValueError, match="exactly once in every template, got"):
            zero_shot_classifier(nn.Identity(), None, ["cat"], templates)
    with pytest.raises(ValueError, match="class names and caption templates, got 0 and 1"):
        zero_shot_classifier(nn.Identity(), None, [], ["a {}"])


def test_the_published_prompts_are_eighty_different_ones():
    assert len(set(IMAGENET_TEMPLATES)) == len(IMAGENET_TEMPLATES) == 80
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)
    assert IMAGENET_TEMPLATES[0] == "a bad photo of a {}."
    assert IMAGENET_TEMPLATES[-1] == "a tattoo of the {}."


# Retrieval


def pairs(*rows):
    return torch.tensor(rows)


ANGLES = torch.deg2rad(torch.tensor([0.0, 10.0, 21.0, 33.0, 46.0]))
FAN = torch.stack((ANGLES.cos(), ANGLES.sin()), dim=1)  # five directions, no two equally far from a third


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_ranks(chunk):
    matches = pairs((2, 3), (0, 3), (1, 0))
    assert ranks(FAN[:3], FAN * torch.tensor([[5.0], [1.0], [2.0], [4.0], [3.0]]), matches, chunk=chunk).tolist() == [
        4,
        2,
        3,
    ]


def test_the_best_of_several_right_answers_counts():
    assert ranks(FAN[:1], FAN, pairs((0, 4), (0, 1), (0, 3))).tolist() == [2]


def test_other_right_answers_do_not_push_a_rank_down():
    assert ranks(FAN[:1], FAN, pairs((0, 0), (0, 1), (0, 2))).tolist() == [1]
    assert ranks(FAN[4:], FAN, pairs((0, 0), (0, 3))).tolist() == [2]


def test_ties_count_against_the_model():
    same = torch.ones(4, 3)
    assert ranks(same, same, pairs((0, 0), (1, 1), (2, 2), (3, 3))).tolist() == [4] * 4
    assert ranks(same[:1], same, pairs((0, 0), (0, 1))).tolist() == [3]


def test_a_query_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="got none for 2 of 4, the first of them query 1"):
        ranks(FAN[:4], FAN, pairs((0, 0), (3, 0)))


def test_summary():
    expected = {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75, "median_rank": 6.0, "mean_rank": 6.25}
    assert summarise(torch.tensor([1, 7, 12, 5])) == expected


def test_both_directions():
    images, texts = FAN, FAN[[0, 3]]
    result = retrieval(images, texts, pairs((0, 0), (1, 0), (2, 0), (3, 0), (4, 1)))
    assert result["text_to_image"]["recall@1"] == 0.5  # text 1 finds image 3, then 2, then 4
    assert result["text_to_image"]["mean_rank"] == 2.0
    assert result["image_to_text"]["recall@1"] == 0.6  # images 2 and 3 are nearer to text 1
    assert result["image_to_text"]["mean_rank"] == 1.4


# Linear probe


def labelled(rows, seed, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    features = torch.randn(rows, 1, 6, generator=generator)
    features[:, 0, 0] = 1000 + labels * 2.0 + noise * torch.randn(rows, generator=generator)
    return features, labels


def test_linear_probe_reads_what_is_there():
    result = linear_probe(labelled(80, 0), labelled(40, 1), (labelled(60, 2), labelled(20, 3)))
    assert result["accuracy"] == 1.0
    assert result["C"] in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def test_linear_probe_chooses_by_the_validation_part_alone():
    train, choose = labelled(40, 0, noise=2.0), labelled(400, 1, noise=2.0)
    division = (labelled(40, 2, noise=2.0), choose)
    test, flipped = labelled(40, 3), (labelled(40, 3)[0], 1 - labelled(40, 3)[1])
    one, other = linear_probe(train, test, division), linear_probe(train, flipped, division)
    assert one["C"] == other["C"]
    assert one["accuracy"] == pytest.approx(1 - other["accuracy"])
    fits = {C: linear_probe(division[0], choose, division, strengths=[C])["accuracy"] for C in (0.001, 1.0, 100.0)}
    best = linear_probe(train, test, division, strengths=list(fits))["C"]
    assert fits[best] == max(fits.values())


def test_linear_probe_does_not_change_with_the_size_of_the_features():
    def scaled(part):
        return part[0] * 1e4 - 7, part[1]

    parts = [labelled(40, seed, noise=2.0) for seed in range(4)]
    train, test, fit, choose = parts
    large = [scaled(part) for part in parts]
    assert linear_probe(train, test, (fit, choose)) == linear_probe(large[0], large[1], (large[2], large[3]))


# The model


def test_evaluating_restores_every_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model) as device:  # noqa: PT012
        assert device == torch.device("cpu")
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, True, False, True]
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(scope="module")
def digits_data():
    return digits(DigitsConfig(name="digits"), seed=0)


def test_images_are_encoded_in_chunks(digits_data):
    model = Oracle(digits_data)
    features = encode_images(model, digits_data.test_images, batch_size=100)
    assert model.sizes == [100, 100, 100, 60]
    assert torch.equal(features.argmax(1), digits_data.test_labels)
    assert not features.requires_grad


def test_a_model_that_knows_everything(digits_data):
    result = evaluate(Oracle(digits_data), digits_data, batch_size=500)
    assert list(result) == ["zero_shot", "text_to_image", "image_to_text", "linear_probe", "raw_pixels"]
    assert result["zero_shot"] == {"accuracy": 1.0, "ensemble_accuracy": 1.0, "images": 360.0}
    for direction in ("text_to_image", "image_to_text"):
        assert result[direction]["recall@1"] == result[direction]["mean_rank"] == 1.0
    assert result["linear_probe"]["accuracy"] == 1.0
    assert 0.94 < result["raw_pixels"]["accuracy"] < 0.99


def test_a_model_that_takes_sevens_for_ones(digits_data):
    result = evaluate(Oracle(digits_data, confuse=[(7, 1)]), digits_data)
    right = (digits_data.test_labels != 7).double().mean().item()
    assert result["zero_shot"]["accuracy"] == result["image_to_text"]["recall@1"] == pytest.approx(right)
    assert result["text_to_image"]["recall@1"] == 0.8  # no image answers to "7", and sevens tie with ones for "1"
    assert result["linear_probe"]["accuracy"] == pytest.approx(right, abs=0.001)


def test_one_template_and_the_ensemble_are_told_apart(digits_data):
    class Forgetful(Oracle):
        def encode_text(self, tokens, end):
            features = super().encode_text(tokens, end)
            first = digits_data.tokenizer([t.replace("{}", "3") for t in digits_data.templates[:1]])[0]
            return torch.where((tokens == first).all(dim=1, keepdim=True), -features, features)

    result = evaluate(Forgetful(digits_data), digits_data)
    assert result["zero_shot"]["ensemble_accuracy"] == 1.0
    assert result["zero_shot"]["accuracy"] == pytest.approx((digits_data.test_labels != 3).double().mean().item())


def test_coloured_digits_are_judged_on_seen_and_unseen_pairs():
    data = coloured_digits(ColouredDigitsConfig(name="coloured_digits"), seed=0)
    unseen, seen = (data.parts.groups[f"{name}_pairs"].tolist() for name in ("unseen", "seen"))
    result = evaluate(Oracle(data, confuse=[(unseen[0], seen[0])]), data)
    wrong = int((data.test_labels == unseen[0]).sum())
    assert result["zero_shot_unseen_pairs"]["accuracy"] == pytest.approx(1 - wrong / 720)
    assert result["zero_shot_seen_pairs"] == {"accuracy": 1.0, "ensemble_accuracy": 1.0, "images": 2160.0}
    assert result["zero_shot"]["accuracy"] == pytest.approx(1 - wrong / 2880)
    assert result["linear_probe"].keys() == {"accuracy", "C"}
    assert "raw_pixels" not in result


def test_features_that_are_no_numbers_are_refused(digits_data):
    model = Oracle(digits_data)
    nn.init.constant_(model.weight, math.nan)
    with pytest.raises(ValueError, match="expected finite features, got NaN or infinity for 360 of 360 images"):
        evaluate(model, digits_data)


def test_a_model_without_encoders_is_refused(digits_data):
    with pytest.raises(ValueError, match="encode_image and encode_text, got Sequential without encode_image and"):
        evaluate(nn.Sequential(), digits_data)


def test_data_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"expected data from gpipe\.training\.data\.build_data, got dict"):
        evaluate(nn.Sequential(), {})


def test_captioned_images():
    class Colours(nn.Module):  # an image's red is the number in its caption
        def encode_image(self, images):
            return functional.one_hot((images[:, 0, 0, 0] * 8).round().long(), 8).float()

        def encode_text(self, tokens, end):
            words = [tokenizer.words[token - len(tokenizer.specials)] for token in tokens[:, 1].tolist()]
            return functional.one_hot(torch.tensor([int(word) for word in words]), 8).float()

    images = TensorImages(torch.arange(6).float().div(8).view(6, 1, 1, 1).expand(6, 3, 2, 2))
    everything = Pairs(images, [str(i) for i in range(6)], torch.tensor([(i, i) for i in range(6)]))
    config = CaptionsConfig(name="captions_csv", path="unused.csv", mean=[0.0] * 3, std=[1.0] * 3, context_length=4)
    data = CaptionedImages(everything, everything, config, seed=0)
    tokenizer = data.tokenizer
    result = evaluate(Colours(), data, batch_size=4)
    assert list(result) == ["text_to_image", "image_to_text"]
    assert all(direction["recall@1"] == 1.0 for direction in result.values())
    wrong = Pairs(images, everything.texts, torch.tensor([(i, 5 - i) for i in range(6)]))
    result = evaluate(Colours(), CaptionedImages(everything, wrong, config, seed=0))
    assert all(direction["recall@5"] == 0.0 for direction in result.values())  # all wrong ones tie or do better


class Constant(nn.Module):
    """Gives the same logits for every row, in inputs' leading shape."""

    def __init__(self, logits, dims):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dims = dims

    def forward(self, inputs):
        return self.logits.expand(*inputs.shape[: self.dims], -1)


def test_classification():
    data = digits(DigitsConfig(name="digits", task="classification"), seed=0)
    result = evaluate(Constant(torch.eye(10)[4], dims=1), data)
    right = (data.test_labels == 4).double().mean().item()
    assert list(result) == ["classification", "raw_pixels"]
    assert result["classification"] == {"accuracy": right, "images": 360.0}
    assert 0.94 < result["raw_pixels"]["accuracy"] < 0.99
    with pytest.raises(ValueError, match=r"logits of shape \(360, 10\) from the model, got \(360, 7\)"):
        evaluate(Constant(torch.zeros(7), dims=1), data)


@pytest.fixture
def dogs(tmp_path):
    """A labelled data set of one class, where there is nothing to tell apart."""
    (tmp_path / "dog").mkdir()
    for i in range(10):
        Image.new("RGB", (4, 4), (20 * i, 0, 0)).save(tmp_path / "dog" / f"{i}.png")

    def read(task):
        settings = {"name": "image_folder", "path": tmp_path, "image_size": 4, "task": task}
        return build_data(ImageFolderConfig(**settings), seed=0)

    return read


def test_no_probe_is_fitted_to_a_single_class(dogs):
    data = dogs("contrastive")
    assert list(evaluate(Oracle(data), data)) == ["zero_shot", "text_to_image", "image_to_text"]
    result = evaluate(Constant(torch.zeros(1), dims=1), dogs("classification"))
    assert result == {"classification": {"accuracy": 1.0, "images": 2.0}}


def test_more_than_logits_is_refused():
    class Several(Constant):
        def forward(self, inputs):
            return super().forward(inputs), inputs

    told = r"expected logits from the model, one tensor, got tuple: let it give them alone in eval mode"
    data = digits(DigitsConfig(name="digits", task="classification"), seed=0)
    with pytest.raises(TypeError, match=told):
        evaluate(Several(torch.zeros(10), dims=1), data)
    text = torch.zeros(100, dtype=torch.uint8)
    with pytest.raises(TypeError, match=told):
        evaluate(Several(torch.zeros(256), dims=2), TextWindows(text, text, 9, 0.1, seed=0))


def test_language_model():
    text = torch.zeros(1000, dtype=torch.uint8)
    data = TextWindows(text, text, 9, 0.1, seed=0)
    results = evaluate(Constant(torch.zeros(256), dims=2), data, batch_size=50)
    assert list(results) == ["language_model", "unigram", "gzip"]
    result = results["language_model"]
    assert result["nats_per_byte"] == pytest.approx(math.log(256), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    assert result["bytes"] == 999
    with pytest.raises(ValueError, match="expected finite logits"):
        evaluate(Constant(torch.full((256,), math.inf), dims=2), data)


def test_baselines_judge_the_bytes_that_the_model_judges():
    train, test = torch.tensor([7, 8] * 50).to(torch.uint8), torch.tensor([9, *[7] * 90, *[9] * 8]).to(torch.uint8)
    data = TextWindows(train, test, 9, 0.1, seed=0)  # ten windows: the first byte, and the last 8, are no targets
    results = evaluate(Constant(torch.zeros(256), dims=2), data)
    assert results["language_model"]["bytes"] == 90
    assert results["unigram"]["bits_per_byte"] == pytest.approx(-math.log2(51 / 356), rel=1e-9)
    assert results["gzip"]["bits_per_byte"] == 8 * len(gzip.compress(bytes([7] * 90), 9, mtime=0)) / 90
