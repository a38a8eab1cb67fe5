"""The teacher: spatial logits of CNNs whose head pools, a reason for all others."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from cskd_pipeline.distill.losses import DistillationLoss, mixed_targets
from cskd_pipeline.distill.targets import LogitTargets
from cskd_pipeline.errors import MissingPackageError, TeacherError, WeightsError
from cskd_pipeline.models.cut import head_per_location
from cskd_pipeline.models.student import Heads
from cskd_pipeline.models.teacher import Teacher, TeacherSource, load_teacher
from cskd_pipeline.models.weights import state_digest

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FAMILIES = {
    "resnet10t": 32,
    "regnetx_002": 32,
    "regnety_002": 32,
    "convnext_atto": 32,
    "efficientnet_lite0": 32,
    "mobilenetv3_small_050": 32,
    "densenet121": 32,
    "resnetv2_50": 32,
    "tests.models.factories:vgg_that_pools": 16,
}


def views(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small(name: str = "tests.models.factories:pooled", **options: Any) -> Teacher:
    given = {"weights": "random", "num_classes": 5, "size": 64, **options}
    own = {field.name for field in fields(TeacherSource)} & given.keys()
    source = TeacherSource(name, **{key: given.pop(key) for key in own})
    return load_teacher(source, **given)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_applies_its_own_head_at_every_location(name: str) -> None:
    teacher = small(name, num_classes=7, batch_size=2)
    side = 64 // FAMILIES[name]
    assert teacher.grid == (side, side)
    assert teacher.num_classes == 7
    x = views(3, 64)
    response = teacher.respond(x)
    assert response.spatial.shape == (3, 7, side, side)
    assert response.global_.shape == (3, 7)
    assert response.spatial.dtype == response.global_.dtype == torch.float16
    with torch.inference_mode():
        features = teacher.model.forward_features(x)
        close = {"rtol": 2e-3, "atol": 2e-3 * float(response.spatial.abs().max())}
        logits = teacher.model.forward_head(features)
        torch.testing.assert_close(response.global_.float(), logits, **close)
        for row in range(side):
            for column in range(side):
                location = features[:, :, row : row + 1, column : column + 1]
                logits = teacher.model.forward_head(location)
                found = response.spatial[:, :, row, column].float()
                torch.testing.assert_close(found, logits, **close)


@pytest.mark.parametrize("name", ["resnet10t", "regnety_002", "tests.models.factories:pooled"])
def test_global_logits_are_the_mean_of_spatial_logits_for_a_linear_head(name: str) -> None:
    response = small(name).respond(views(2, 64))
    mean = response.spatial.float().mean(dim=(2, 3))
    torch.testing.assert_close(response.global_.float(), mean, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, "tokens (1, 17, 192)"),
        ("mixer_s32_224", {}, "tokens"),
        ("vgg11_bn", {"mlp_ratio": 0.01}, "depends on the order of locations"),
        ("tests.models.factories:large_kernel", {}, "depends on the order of locations"),
        ("tests.models.factories:attention_pooled", {}, "depends on the order of locations"),
        ("tests.models.factories:flattening", {}, "its head fails"),
    ],
)
def test_a_model_without_spatial_logits_is_refused_with_the_reason(
    name: str, kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TeacherError, match="no spatial logits") as caught:
        small(name, kwargs=kwargs)
    assert reason in str(caught.value.found)


def test_an_unsupported_input_size_is_refused() -> None:
    with pytest.raises(TeacherError) as caught:
        small(size=8)
    assert "fails at 8 px" in str(caught.value.found)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels_last": False},
        *(
            pytest.param({"device": "cuda", "precision": precision}, marks=NEEDS_GPU)
            for precision in ("float32", "float16")
        ),
    ],
    ids=str,
)
def test_a_response_does_not_depend_on_the_other_views_of_the_batch(
    name: str, options: dict[str, Any]
) -> None:
    teacher = small(name, batch_size=4, **options)
    x = views(9, 64).to(teacher.device)
    together = teacher.respond(x)
    for i in range(len(x)):
        alone = teacher.respond(x[i : i + 1])
        assert torch.equal(alone.spatial[0], together.spatial[i])
        assert torch.equal(alone.global_[0], together.global_[i])
    order = torch.tensor([8, 3, 5, 0, 1])
    assert torch.equal(teacher.respond(x[order]).spatial, together.spatial[order])
    assert torch.equal(teacher.respond(x).spatial, together.spatial)


def test_the_model_always_sees_the_same_number_of_views() -> None:
    teacher = small("tests.models.factories:watched", batch_size=4)
    teacher.model.backbone_runs.clear()
    assert len(teacher.respond(views(6, 64)).global_) == 6
    assert [run[1] for run in teacher.model.backbone_runs] == [4, 4]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_backbone_runs_in_the_given_precision_and_the_head_in_float32(precision: str) -> None:
    teacher = small("tests.models.factories:watched", precision=precision)
    teacher.model.backbone_runs.clear()
    teacher.model.head_runs.clear()
    response = teacher.respond(views(2, 64))
    assert [run[0] for run in teacher.model.backbone_runs] == [getattr(torch, precision)]
    assert [run[0] for run in teacher.model.head_runs] == [torch.float32, torch.float32]
    exact = small("tests.models.factories:watched").respond(views(2, 64))
    torch.testing.assert_close(response.spatial, exact.spatial, rtol=0.02, atol=0.02)


def test_float32_never_means_tf32() -> None:
    teacher = small("tests.models.factories:watched")
    teacher.model.backbone_runs.clear()
    teacher.model.head_runs.clear()
    before = torch.backends.cudnn.allow_tf32
    teacher.respond(views(2, 64))
    runs = [*teacher.model.backbone_runs, *teacher.model.head_runs]
    assert [run[-1] for run in runs] == [False] * 3
    assert torch.backends.cudnn.allow_tf32 == before


def test_logits_are_rounded_once_to_float16() -> None:
    teacher = small(batch_size=2)
    x = views(2, 64)
    response = teacher.respond(x)
    with torch.inference_mode():
        features = teacher.model.forward_features(x)
        global_ = teacher.model.forward_head(features)
        spatial = head_per_location(teacher.model, features)
    for found, exact in ((response.global_, global_), (response.spatial, spatial)):
        assert np.array_equal(found.numpy(), exact.numpy().astype(np.float16))
    up = response.spatial.float().abs() > spatial.abs()
    assert up.any(), "to the nearest value, not towards zero"
    assert not up.all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_views_are_converted_to_the_given_memory_format(
    channels_last: bool,
) -> None:
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    teacher = small("resnet10t", channels_last=channels_last)
    weight = teacher.model.conv1[3].weight
    assert weight.is_contiguous(memory_format=formats[channels_last])
    assert not weight.is_contiguous(memory_format=formats[not channels_last])
    seen = []
    teacher.model.conv1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for given in formats.values():
        for count in (3, teacher.batch_size):  # padded and full
            teacher.respond(views(count, 64).contiguous(memory_format=given))
    assert len(seen) == 4
    assert all(x.is_contiguous(memory_format=formats[channels_last]) for x in seen)


def test_channels_last_gives_the_same_response_up_to_rounding() -> None:
    plain = small("resnet10t", channels_last=False).respond(views(2, 64))
    strided = small("resnet10t", channels_last=True).respond(views(2, 64))
    torch.testing.assert_close(plain.spatial, strided.spatial, rtol=2e-3, atol=2e-3)


@NEEDS_GPU
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_gpu_and_cpu_give_the_same_response(precision: str) -> None:
    options: dict[str, Any] = {"precision": precision, "channels_last": True}
    teacher = small("resnet10t", device="cuda", **options)
    response = teacher.respond(views(3, 64).cuda())
    expected = small("resnet10t", **options).respond(views(3, 64))
    torch.testing.assert_close(response.spatial.cpu(), expected.spatial, rtol=0.02, atol=0.02)


def test_logits_beyond_float16_are_refused_with_the_fix() -> None:
    with pytest.raises(TeacherError, match="not finite in float16") as caught:
        small("tests.models.factories:loud").respond(views(1, 64))
    assert "precision" in str(caught.value.action)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (small("resnet10t", seed=seed).weights_sha256 for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factorys_network_states_its_normalisation() -> None:
    teacher = small()
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (teacher.name, teacher.source) == ("tests.models.factories:pooled", "random")
    assert small(weights="hub", num_classes=None).source == "factory"
    assert small("resnet10t").mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("no.such.module:make", "ModuleNotFoundError"),
        ("tests.models.factories:absent", "AttributeError"),
        ("tests.models.factories:not_callable", "TypeError"),
        ("tests.models.factories:broken", "ValueError: the disk is upside down"),
        ("tests.models.factories:no_module", "dict"),
    ],
)
def test_a_factory_that_fails_is_refused_with_the_reason(factory: str, reason: str) -> None:
    with pytest.raises(TeacherError, match="factory") as caught:
        small(factory)
    assert reason in str(caught.value.found)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_weights_file_determines_the_class_count(tmp_path: Path, suffix: str) -> None:
    state = timm.create_model("resnet10t", num_classes=11).state_dict()
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    teacher = load_teacher(TeacherSource("resnet10t", path), size=64)
    assert (teacher.num_classes, teacher.source) == (11, "file")
    assert teacher.weights_sha256 == state_digest(state)
    with pytest.raises(TeacherError, match="class count is not the data's") as caught:
        load_teacher(TeacherSource("resnet10t", path, 10), size=64)
    assert (caught.value.found, caught.value.expected) == ("11 classes", "10 classes")


def test_weights_of_another_model_are_refused_with_missing_and_unexpected_names(
    tmp_path: Path,
) -> None:
    save_file(
        timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "w.safetensors"
    )
    with pytest.raises(WeightsError, match="do not fit") as caught:
        small("regnetx_002", weights=tmp_path / "w.safetensors")
    assert "missing (stem.conv.weight" in str(caught.value.found)
    assert "unexpected (bn1.bias" in str(caught.value.found)


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(TeacherError, match="no model of this name") as caught:
        small("regnety_16")
    assert "regnety_160" in str(caught.value.found)


def test_arguments_that_a_model_does_not_take_are_named() -> None:
    with pytest.raises(TeacherError, match="cannot be created") as caught:
        small("resnet10t", kwargs={"no_such_argument": 1})
    assert "no_such_argument" in str(caught.value.found)


def test_an_unreachable_hub_points_to_a_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match="cannot be downloaded") as caught:
        load_teacher(TeacherSource("resnet10t.c3_in1k"), size=64)
    assert "model.safetensors" in str(caught.value.action)
    assert caught.value.where == "resnet10t.c3_in1k"


def test_pretrained_weights_are_named_with_their_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    make = timm.create_model

    def offline(name: str, pretrained: bool, **kwargs: Any) -> torch.nn.Module:
        assert pretrained
        assert "num_classes" not in kwargs, "would put a random head on pretrained features"
        return make(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    teacher = load_teacher(TeacherSource("resnet10t", num_classes=1000), size=64)
    assert (teacher.name, teacher.source) == ("resnet10t.c3_in1k", "hub")
    with pytest.raises(TeacherError, match="class count is not the data's"):
        load_teacher(TeacherSource("resnet10t", num_classes=10), size=64)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_live_response_gives_gradients(kind: str) -> None:
    targets = LogitTargets(*small().respond(views(2, 64)))
    cls, dist = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    dense = torch.randn(2, 5, 4, 4, requires_grad=True)
    label = torch.tensor([0, 1])
    labels = mixed_targets(label, label, torch.ones(2), 5, 0.0)
    DistillationLoss(global_kind=kind, spatial_kind=kind)(
        Heads(cls, dist, dense), labels, targets, 0.5
    ).total.backward()
    assert all(bool(leaf.grad.abs().sum() > 0) for leaf in (cls, dist, dense))


def test_a_machine_that_cannot_compile_is_refused_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile(function: Any, **options: Any) -> Any:
        def called(*args: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: none\nmore for developers")

        return called

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(
        MissingPackageError, match=r"torch\.compile does not work on this machine"
    ) as caught:
        small(compile=True)
    assert caught.value.found == "InvalidCxxCompiler: none"
    assert "dump.compile=false" in str(caught.value.action)
    small(compile=False)
