"""A user's networks as teachers: each supported form is cut, any other refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from cskd_pipeline.errors import TeacherError, WeightsError
from cskd_pipeline.models.cut import cut_network
from cskd_pipeline.models.teacher import Teacher
from cskd_pipeline.models.weights import state_digest
from cskd_pipeline.runtime.device import place
from tests.models import plain
from tests.models.test_teacher import small, views

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def load(name: str, **options: Any) -> Teacher:
    return small(name, **{"batch_size": 2, **IMAGENET, **options})


# Networks without forward_features, and their grid at 64 px.
PLAIN = {
    "tests.models.plain:pool_layer": (4, 4),
    "tests.models.plain:pool_function": (4, 4),
    "tests.models.plain:mean_method": (4, 4),
    "tests.models.plain:relu_function": (4, 4),
    "tests.models.plain:relu_in_place": (4, 4),
    "tests.models.plain:two_heads": (4, 4),
    "tests.models.plain:oblong": (2, 4),
    "torchvision:resnet18": (2, 2),
    "torchvision:densenet121": (2, 2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_any_network_of_features_pooling_and_a_linear_layer_is_a_teacher(name: str) -> None:
    teacher = load(name)
    assert teacher.grid == PLAIN[name]
    x = views(2, 64)
    response = teacher.respond(x)
    network = teacher.model.network
    with torch.inference_mode():
        logits = network(x)
    scale = float(logits.abs().max())
    torch.testing.assert_close(response.global_.float(), logits, rtol=2e-3, atol=2e-3 * scale)
    mean = response.spatial.float().mean(dim=(2, 3))
    torch.testing.assert_close(mean, logits, rtol=5e-3, atol=5e-3 * scale)
    assert response.spatial.shape == (2, 5, *teacher.grid)
    assert float(response.spatial.float().std(dim=(2, 3)).max()) > 0
    assert teacher.weights_sha256 == state_digest(network.state_dict())


def test_rows_and_columns_of_the_grid_are_those_of_the_image() -> None:
    """Lighting the upper right quarter of a dark view changes that quarter's locations only."""
    teacher = load("tests.models.plain:oblong")
    dark = torch.zeros(1, 3, 64, 64)
    lit = dark.clone()
    lit[:, :, :32, 32:] = 1.0
    differs = (teacher.respond(lit).spatial != teacher.respond(dark).spatial).any(dim=1)[0]
    assert differs.tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("mambaout_femto", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_feature_maps_with_channels_last_are_permuted(name: str, kwargs: dict[str, Any]) -> None:
    teacher = load(name, kwargs=kwargs)
    x = views(2, 64)
    response = teacher.respond(x)
    network = teacher.model.network
    with torch.inference_mode():
        logits = network(x)
        features = network.forward_features(x)
        close: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3 * float(logits.abs().max())}
        torch.testing.assert_close(response.global_.float(), logits, **close)
        for row in range(2):
            for column in range(2):
                location = features[:, row : row + 1, column : column + 1]
                expected = network.forward_head(location)
                torch.testing.assert_close(
                    response.spatial[:, :, row, column].float(), expected, **close
                )


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("max_pooled", "is not the mean of a feature map"),
        ("softened", "its output is not that of a linear layer"),
        ("convolutional", "its output is not that of a linear layer"),
        (
            "one_location",
            "follows no feature map of 8 channels and more than one location at 64 px",
        ),
        ("map_out", "its forward returns (1, 5, 64, 64), not logits (B, K)"),
    ],
)
def test_another_form_is_refused_with_the_reason(factory: str, reason: str) -> None:
    with pytest.raises(TeacherError, match="no spatial logits") as caught:
        load(f"tests.models.plain:{factory}")
    assert "it has no forward_features and no forward_head, and " in str(caught.value.found)
    assert reason in str(caught.value.found)
    assert "dump-teacher --help" in str(caught.value.action)


def test_a_teacher_found_in_a_plain_network_can_be_compiled_as_one_graph() -> None:
    network = cut_network(plain.relu_function().eval(), "plain", 64).network
    compiled = torch.compile(network.forward_features, backend="eager", fullgraph=True)
    x = views(2, 64)
    with torch.inference_mode():
        assert torch.equal(compiled(x), network.forward_features(x))


def test_half_precision_is_that_of_the_backbone_alone() -> None:
    name = "tests.models.plain:pool_function"
    response = load(name, precision="bfloat16").respond(views(2, 64))
    exact = load(name).respond(views(2, 64))
    torch.testing.assert_close(response.spatial, exact.spatial, rtol=0.02, atol=0.02)
    assert not torch.equal(response.spatial, exact.spatial)


# Class count, normalisation and several problems


@pytest.mark.parametrize("factory", ["fixed", "forwarding"])
def test_a_factory_need_not_take_the_class_count(factory: str) -> None:
    """It is passed to ``**kwargs``; a factory without the argument keeps its own count."""
    assert load(f"tests.models.plain:{factory}").num_classes == 5


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    torch.save({"net": {"fc.weight": torch.zeros(5, 8)}}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match="the teacher has 3 problems") as caught:
        load("tests.models.plain:max_pooled", weights=tmp_path / "w.pth", mean=(), std=())
    weights, head, pixels = caught.value.problems
    assert "weights do not fit" in weights
    assert "missing (conv.weight" in weights
    assert "not the mean of a feature map" in head
    assert "no mean and no std" in pixels
    assert "--mean R,G,B" in str(caught.value.action)
    with pytest.raises(TeacherError) as caught:
        load("tests.models.plain:fixed", num_classes=7, std=())
    classes, pixels = caught.value.problems
    assert "5 classes" in classes
    assert "no std" in pixels


def test_a_single_problem_is_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="normalisation of the teacher's images"):
        load("tests.models.plain:fixed", mean=(), std=())
    torch.save({"fc.bias": torch.zeros(5)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="do not fit"):
        load("tests.models.plain:fixed", weights=tmp_path / "w.pth")


def test_given_mean_and_std_override_the_networks_own() -> None:
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    teacher = load("resnet10t", **given)
    assert (teacher.mean, teacher.std) == (given["mean"], given["std"])
    assert load("resnet10t", mean=(), std=()).mean == IMAGENET["mean"]


# torchvision


def test_torchvisions_published_weights_set_mean_std_and_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = []

    def fetch(url: str, **options: Any) -> dict[str, torch.Tensor]:
        fetched.append((url, options["weights_only"], options["check_hash"]))
        return dict(torchvision.models.resnet18().state_dict())

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    for name in ("torchvision:resnet18", "torchvision:resnet18.IMAGENET1K_V1"):
        teacher = load(name, weights="hub", num_classes=1000, mean=(), std=())
        assert teacher.name == "torchvision:resnet18.IMAGENET1K_V1"
        assert (teacher.source, teacher.mean) == ("hub", IMAGENET["mean"])
    (url, *safely), _ = fetched
    assert "resnet18" in url
    assert safely == [True, True]
    with pytest.raises(TeacherError, match="class count is not the data's"):
        load("torchvision:resnet18", weights="hub")


def test_a_weights_file_determines_the_class_count_of_a_torchvision_model(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=9).state_dict(), tmp_path / "w.pth")
    teacher = load("torchvision:resnet18", weights=tmp_path / "w.pth", num_classes=None)
    assert (teacher.num_classes, teacher.source) == (9, "file")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("torchvision:resnet19", {}, "resnet18"),
        ("torchvision:resnet18.V9", {"weights": "hub"}, "IMAGENET1K_V1"),
        ("torchvision:resnet18.IMAGENET1K_V1", {}, "own weights only"),
        ("torchvision:resnet18", {"kwargs": {"weights": "DEFAULT"}}, "weights"),
        ("torchvision:resnet18", {"kwargs": {"no_such": 1}}, "no_such"),
        ("torchvision:resnet18", {"weights": "hub"}, "the network is down"),
    ],
)
def test_bad_torchvision_names_tags_and_arguments_are_refused(
    name: str, options: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(url: str, **_: object) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", down)
    with pytest.raises(TeacherError) as caught:
        load(name, **options)
    assert expected in str(caught.value)


# Memory format


def test_five_dimensional_tensors_keep_their_memory_format() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, 3))
    conv, volume = network
    assert place(network, "cpu", channels_last=True) is network
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    assert volume.weight.is_contiguous()  # type: ignore[union-attr]
    place(network, "cpu", channels_last=False)
    assert conv.weight.is_contiguous()  # type: ignore[union-attr]


def test_a_teacher_with_five_dimensional_weights_responds() -> None:
    response = load("lambda_resnet26t").respond(views(1, 64))
    assert response.spatial.shape == (1, 5, 2, 2)
