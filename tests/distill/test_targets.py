"""One interface to the teacher's response: the same labels however it is stored."""

from __future__ import annotations

import pytest
import torch

from cskd_pipeline.distill import ckf
from cskd_pipeline.distill.targets import EnvelopeTargets, LogitTargets, Targets
from cskd_pipeline.errors import CacheError


def response(classes: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # coarse values, so that many locations tie
    spatial = torch.randn(6, classes, 7, 7, generator=generator).mul(8).round().div(8)
    return spatial.half(), spatial.mean((2, 3)).half()


def test_the_envelope_gives_the_labels_of_the_logits_at_every_ratio() -> None:
    spatial, global_ = response()
    logits = LogitTargets(spatial, global_)
    planes = ckf.upper_envelope(spatial, global_)
    labels = ckf.hard_global_labels(global_)
    for stored in (labels, labels.to(torch.uint16), labels.to(torch.int32)):
        assert torch.equal(EnvelopeTargets(planes, stored).hard_global(), logits.hard_global())
    envelope = EnvelopeTargets(planes, labels)
    for epoch in range(301):
        for schedule in ckf.SCHEDULES:
            r = ckf.ckf_ratio(schedule, epoch / 300)
            assert torch.equal(envelope.hard_spatial(r), logits.hard_spatial(r))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_log_probabilities_are_those_of_the_fused_logits(temperature: float) -> None:
    spatial, global_ = response()
    logits = LogitTargets(spatial, global_)
    d, g = spatial.double(), global_.double()

    def expected(values: torch.Tensor) -> torch.Tensor:
        values = (values / temperature).exp()
        return (values / values.sum(1, keepdim=True)).log().float()

    found = logits.global_log_probabilities(temperature)
    torch.testing.assert_close(found, expected(g))
    for r in (0.0, 0.3, 1.0):
        found = logits.spatial_log_probabilities(r, temperature)
        torch.testing.assert_close(found, expected(r * d + (1 - r) * g[:, :, None, None]))


def test_soft_targets_of_an_envelope_are_refused_with_the_fix() -> None:
    spatial, global_ = response(5)
    envelope = EnvelopeTargets(ckf.upper_envelope(spatial, global_), global_.argmax(1))
    for call in (
        lambda: envelope.global_log_probabilities(1.0),
        lambda: envelope.spatial_log_probabilities(0.5, 1.0),
    ):
        with pytest.raises(CacheError, match="encoding envelope does not support soft") as caught:
            call()
        assert "dense-q8" in str(caught.value.expected)
        assert "distill.global_kind and distill.spatial_kind to hard" in str(caught.value.action)


def test_a_users_targets_are_named_by_their_class() -> None:
    class Own(Targets):
        pass

    with pytest.raises(CacheError, match="encoding of Own does not support hard targets") as caught:
        Own().hard_global()
    assert "distill.spatial_kind to soft" in str(caught.value.action)
