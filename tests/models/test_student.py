"""The student: a timm ViT whose dense logits are its own head on pooled patch tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from cskd_pipeline.distill.losses import inference_heads
from cskd_pipeline.errors import StudentError
from cskd_pipeline.models.student import (
    Heads,
    Preprocessing,
    Student,
    create_student,
    inference_logits,
)

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
DISTILLED = ("deit_tiny_distilled_patch16_224", {})
PLAIN = ("vit_tiny_patch16_224", {})
AVERAGED = ("vit_tiny_patch16_224", {"global_pool": "avg"})
REGISTERS = ("vit_tiny_patch16_224", {"reg_tokens": 3})
TOKENLESS = ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False})
EVERY_VIT = [DISTILLED, PLAIN, AVERAGED, REGISTERS, TOKENLESS]


def student(kind: tuple[str, dict[str, Any]] = DISTILLED, **more: Any) -> Student:
    """Return a student of 8x8 tokens in eval mode, without parameters at their initial zeros."""
    torch.manual_seed(0)
    built = create_student(kind[0], num_classes=5, size=32, kwargs={**TINY, **kind[1], **more})
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def dense_of_every_token(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the head's logits of each patch token, (B, K, 8, 8)."""
    tokens = model.forward_features(x)[:, -64:]
    head = getattr(model, "head_dist", model.head)
    logits = torch.stack([head(model.fc_norm(token)) for token in tokens.unbind(1)], dim=2)
    return logits.view(len(x), -1, 8, 8)


@pytest.mark.parametrize("kind", EVERY_VIT)
@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (2, 4), (1, 1), (3, 3), (4, 3)])
def test_dense_logits_are_the_heads_on_every_token_pooled_to_the_grid(
    kind: tuple[str, dict[str, Any]], grid: tuple[int, int]
) -> None:
    vit = student(kind)
    with torch.inference_mode():
        dense = vit(images(), grid).dense
        expected = adaptive_avg_pool2d(dense_of_every_token(vit.model, images()), grid)
    assert dense is not None
    assert dense.shape == (2, 5, *grid)
    close(dense, expected)


def test_from_14_to_7_the_pooling_is_a_two_by_two_mean() -> None:
    torch.manual_seed(0)
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    vit = create_student(DISTILLED[0], num_classes=5, size=224, kwargs=kwargs).eval()
    assert vit.token_grid == (14, 14)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        tokens = vit.model.forward_features(x)[:, 2:]
        every = vit.model.head_dist(tokens).transpose(1, 2).reshape(1, 5, 14, 14)
        close(vit(x, (7, 7)).dense, avg_pool2d(every, 2))


def test_class_and_distillation_logits_are_those_of_timm() -> None:
    vit = student()
    with torch.inference_mode():
        heads = vit(images())
        close((heads.cls + heads.dist) / 2, vit.model(images()))
        vit.model.set_distilled_training(True)
        cls, dist = vit.model.train()(images())
    close(heads.cls, cls)
    close(heads.dist, dist)
    assert not torch.allclose(cls, dist)
    assert heads.dense is None


@pytest.mark.parametrize("kind", [PLAIN, AVERAGED, REGISTERS, TOKENLESS])
def test_a_vit_without_distillation_token_gives_timms_logits(
    kind: tuple[str, dict[str, Any]],
) -> None:
    vit = student(kind)
    with torch.inference_mode():
        heads = vit(images())
        assert torch.equal(heads.cls, vit.model(images()))
    assert heads.dist is None
    assert not vit.has_distillation_token


def test_the_prediction_is_the_mean_of_the_methods_heads() -> None:
    vit = student()
    with torch.inference_mode():
        heads = vit(images(), (4, 4))
        coarse = vit(images(), (1, 1))
    names = inference_heads("cskd", vit)
    assert names == ("cls", "dist", "dense")
    mean = (heads.cls + heads.dist + heads.dense.mean((2, 3))) / 3
    close(inference_logits(heads, names), mean)
    close(inference_logits(coarse, names), mean)
    assert inference_heads("deit", vit) == ("cls", "dist")
    close(inference_logits(heads, ("cls", "dist")), vit.model(images()).detach())
    assert inference_heads("none", vit) == inference_heads("none", student(PLAIN)) == ("cls",)
    assert inference_heads("cskd", student(PLAIN)) == ("cls", "dense")
    assert heads.logits().keys() == {"cls", "dist", "dense"}
    assert Heads(heads.cls).logits().keys() == {"cls"}


def test_without_its_distillation_head_timms_forward_is_half_the_class_head() -> None:
    vit = student()
    vit.freeze_distillation_head()
    with torch.inference_mode():
        close(vit.model(images()), vit(images()).cls / 2)
    frozen = {name for name, p in vit.model.named_parameters() if not p.requires_grad}
    assert frozen == {"head_dist.weight", "head_dist.bias"}
    student(PLAIN).freeze_distillation_head()  # has none


def test_any_timm_classifier_can_train_without_distillation() -> None:
    torch.manual_seed(0)
    cnn = create_student("resnet10t", num_classes=5, size=32).eval()
    with torch.inference_mode():
        heads = cnn(images())
        assert torch.equal(heads.cls, cnn.model(images()))
    assert heads == (heads.cls, None, None)
    cnn.require(method="none", grid=None)
    for method in ("deit", "cskd"):
        with pytest.raises(StudentError, match="no patch tokens"):
            cnn.require(method=method, grid=None)
    with pytest.raises(StudentError, match="no patch tokens"):
        cnn(images(), (1, 1))


def test_attention_pooling_has_no_head_for_single_tokens() -> None:
    vit = student(("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}))
    vit(images())
    with pytest.raises(StudentError, match="no patch tokens"):
        vit.require(method="cskd", grid=(4, 4))


def test_a_grid_finer_than_the_tokens_is_refused_with_both_sizes() -> None:
    vit = student()
    vit.require(method="cskd", grid=(8, 8))
    for grid in ((9, 8), (7, 14)):
        with pytest.raises(StudentError, match="coarser than the teacher's") as caught:
            vit.require(method="cskd", grid=grid)
        assert caught.value.found == "8x8 tokens"
        assert "{}x{}".format(*grid) in str(caught.value.expected)
        with pytest.raises(StudentError, match="coarser"):
            vit(images(), grid)


def test_what_is_saved_loads_with_timm_alone(tmp_path: Path) -> None:
    vit = student()
    save_file(vit.model.state_dict(), tmp_path / "student.safetensors")
    loaded = timm.create_model(
        DISTILLED[0],
        num_classes=5,
        img_size=32,
        checkpoint_path=str(tmp_path / "student.safetensors"),
        **TINY,
    ).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(images()), vit.model(images()))


def test_a_student_with_another_network_keeps_its_settings() -> None:
    vit, other = student(), student(depth=1)
    vit.preprocessing = vit.preprocessing.override(0.5, "bilinear")
    average = vit.with_model(other.model)
    assert average.model is other.model
    assert (average.name, average.preprocessing) == (vit.name, vit.preprocessing)
    assert average.has_distillation_token


def test_evaluation_preprocessing_can_be_overridden() -> None:
    vit = student()
    assert vit.mean == (0.485, 0.456, 0.406)
    assert vit.std == (0.229, 0.224, 0.225)
    preprocessing = vit.preprocessing
    assert preprocessing == Preprocessing(32, 0.9, "bicubic")
    assert student(PLAIN).mean == (0.5, 0.5, 0.5)
    for same in ((None, None), (0.0, "auto")):
        assert preprocessing.override(*same) == preprocessing
    other = preprocessing.override(0.875, "bilinear")
    assert other == Preprocessing(32, 0.875, "bilinear")
    assert (preprocessing.resized, other.resized) == (35, 36)


def test_heads_convert_to_float32() -> None:
    half = Heads(torch.ones(2, 3).half(), None, torch.ones(2, 3, 1, 1).bfloat16()).float()
    assert half.dist is None
    assert half.cls.dtype == half.dense.dtype == torch.float32


def test_stochastic_depth_reaches_the_blocks() -> None:
    vit = create_student(PLAIN[0], num_classes=5, size=32, kwargs=TINY, drop_path=0.2)
    assert vit.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_compiled_student_is_one_graph() -> None:
    vit = student()
    compiled = torch.compile(vit, fullgraph=True, backend="eager")
    with torch.no_grad():
        ours, theirs = compiled(images(), (4, 4)), vit(images(), (4, 4))
    for name in ("cls", "dist", "dense"):
        close(getattr(ours, name), getattr(theirs, name))


def test_the_input_size_reaches_the_model_and_must_not_contradict_its_arguments() -> None:
    assert student().token_grid == (8, 8)
    assert student(img_size=32).token_grid == (8, 8)
    with pytest.raises(StudentError, match="img_size is not the views' size"):
        student(img_size=64)


# --- try_out ------------------------------------------------------------------------------------


def test_try_out_changes_nothing() -> None:
    """Weights, batch norm statistics, gradients, mode and random states are unchanged."""
    kwargs = {"channels": [8, 8, 8, 8], "drop_rate": 0.5}
    cnn = create_student("resnet10t", num_classes=5, size=32, kwargs=kwargs).eval()
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    random = torch.get_rng_state()
    cnn.try_out(images(), 5, None)
    assert torch.equal(torch.get_rng_state(), random)
    assert not cnn.training
    assert all(parameter.grad is None for parameter in cnn.parameters())
    after = cnn.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", EVERY_VIT)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_trainable_students_pass(kind: tuple[str, dict[str, Any]], amp: torch.dtype | None) -> None:
    for grid in (None, (4, 4), (3, 3)):
        student(kind).try_out(images(1), 5, grid, amp)


def test_dropped_patches_exclude_dense_logits_only() -> None:
    vit = student(patch_drop_rate=0.5)
    vit.try_out(images(), 5, None)
    with pytest.raises(StudentError, match="does not keep a token for every patch") as caught:
        vit.try_out(images(), 5, (4, 4))
    assert caught.value.found in ("31 patch tokens", "32 patch tokens")
    assert "patch_drop_rate" in str(caught.value.action)


class Broken(torch.nn.Module):
    """A model that fails in the chosen way: forward, backward, or by its output."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.head = torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> Any:
        if self.fault == "size":
            raise AssertionError(f"Input height ({x.shape[2]}) doesn't match model (224).")
        logits = self.head(x.mean((2, 3)))
        if self.fault == "backward":
            logits = logits.detach()
        return (logits, logits) if self.fault == "auxiliary" else logits


@pytest.mark.parametrize(
    ("fault", "classes", "message"),
    [
        ("size", 5, "AssertionError: Input height (32) doesn't match model (224)."),
        ("backward", 5, "does not require grad"),
        ("auxiliary", 5, "tuple"),
        ("", 4, "logits {'cls': (2, 5)}, expected (2, 4)"),
    ],
)
def test_a_model_that_fails_in_training_is_refused_with_its_message(
    fault: str, classes: int, message: str
) -> None:
    broken = Student(Broken(fault), "broken", 32)
    with pytest.raises(StudentError, match="fails in its first training step") as caught:
        broken.try_out(images(), classes, None)
    assert message in str(caught.value.found)
    assert caught.value.where == "broken"
    Student(Broken(""), "sound", 32).try_out(images(), 5, None)


def test_batch_normalisation_of_one_image_is_refused_with_the_reason() -> None:
    cnn = create_student("resnet10t", num_classes=5, size=32, kwargs={"channels": [8] * 4})
    cnn.try_out(images(2), 5, None)
    with pytest.raises(StudentError, match="more than one image in every micro-batch"):
        cnn.try_out(images(1), 5, None)


def test_deprecated_timm_names_resolve_to_the_current_models() -> None:
    """Under a deprecated name timm does not report a fixed input size."""
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    old = create_student("vit_tiny_patch16_224_in21k", num_classes=5, size=32, kwargs=kwargs)
    new = create_student("vit_tiny_patch16_224", num_classes=5, size=32, kwargs=kwargs)
    assert old.token_grid == new.token_grid == (2, 2)
    assert old.state_dict().keys() == new.state_dict().keys()
    old.try_out(images(), 5, (2, 2))
    gone = [name for name, now in timm.models.get_deprecated_models().items() if now is None]
    for name in gone[:1]:
        with pytest.raises(StudentError, match="removed this model"):
            create_student(name, num_classes=5, size=32)


def test_names_and_arguments_that_timm_does_not_know_are_refused() -> None:
    with pytest.raises(StudentError, match="no model of this name") as caught:
        create_student("deit_tiny_distiled_patch16_224", num_classes=5, size=32)
    assert "deit_tiny_distilled_patch16_224" in str(caught.value.found)
    with pytest.raises(StudentError, match="cannot be created"):
        student(patches=3)
