"""The trained module: gradients reach the encoder, losses are formed as configured, ranks agree with one process."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from audiomae.errors import ConfigError
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from audiomae.training.losses import UNLABELLED
from audiomae.training.objectives import ClipTargets, Objective, ObjectiveConfig

BACKBONE = {
    "kind": "audiomae",
    "size": "debug",
    "img_size": (32, 32),
    "patch_size": (8, 16),
    "embed_dim": 16,
    "decoder_embed_dim": 16,
    "depth": 1,
}
CLASSES = 3
FRAMES, BANDS = 32, 32


def encoder(pooling: str = "mean", decoder: bool = True, **fields) -> AudioEncoder:
    config = EncoderConfig(features={"n_mels": BANDS}, backbone=BACKBONE, pooling=pooling, **fields)
    return AudioEncoder.from_config(config, seed=1, with_decoder=decoder)


def objective(pooling: str = "mean", classes: int = CLASSES, captions=None, text=None, **fields) -> Objective:
    torch.manual_seed(0)
    config = ObjectiveConfig(**fields)
    return Objective(encoder(pooling, config.reconstructs, text=text), config, classes, captions).train()


def batch(rows: int = 8, views: int = 2, seed: int = 0) -> tuple[torch.Tensor, ClipTargets]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(views, rows, FRAMES, BANDS, generator=draw) * 2 - 4
    labels = torch.arange(rows) % CLASSES
    return x, ClipTargets(torch.arange(rows) + 100 * seed, labels, labels)


def masks(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EVERYTHING = {"mae": 1.0, "contrastive": 0.5, "uniformity": 0.1, "alignment": 0.2, "triplet": 0.3, "clap_lite": 0.4}


@pytest.mark.parametrize("name", ["contrastive", "uniformity", "alignment", "triplet", "clap_lite"])
@pytest.mark.parametrize("view_tokens", ["visible", "all"])
def test_every_comparing_loss_trains_the_encoder(name, view_tokens):
    module = objective(mae=0.0, view_tokens=view_tokens, **{name: 1.0})
    module(*batch(), masks()).loss.backward()
    backbone = dict(module.encoder.backbone.named_parameters())
    for reached in ("patch_proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"):
        assert backbone[reached].grad is not None and backbone[reached].grad.abs().max() > 0, reached


def test_the_loss_is_the_weighted_sum_of_its_parts():
    out = objective(**EVERYTHING)(*batch(), masks())
    assert set(out.parts) == set(EVERYTHING)
    expected = sum(weight * float(out.parts[name]) for name, weight in EVERYTHING.items())
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_positives_are_labels_when_there_are_any_and_else_the_other_view():
    x, targets = batch()
    config = {"mae": 0.0, "contrastive": 1.0, "view_tokens": "all"}
    by_label = objective(**config)(x, targets, masks()).loss
    by_view = objective(classes=0, **config)(x, targets, masks()).loss
    forced = objective(supervised=False, **config)(x, targets, masks()).loss
    unlabelled = targets._replace(labels=torch.full_like(targets.labels, UNLABELLED))
    nothing_known = objective(**config)(x, unlabelled, masks()).loss
    assert by_view.item() == forced.item() == nothing_known.item()
    assert by_label.item() != pytest.approx(by_view.item())


def test_visible_views_cost_one_pass_and_differ_from_whole_ones():
    calls = []
    for view_tokens in ("visible", "all"):
        module = objective(mae=1.0, contrastive=1.0, view_tokens=view_tokens)
        module.encoder.backbone.blocks[0].register_forward_hook(lambda *_, v=view_tokens: calls.append(v))
        module(*batch(), masks())
    assert calls.count("visible") == 1 and calls.count("all") == 2


@pytest.mark.parametrize(
    "pooling", ["cls", "mean", "mean_cls", "cls_mean_concat", "max", "attention_score", "attention"]
)
def test_every_pooling_but_one_takes_visible_tokens(pooling):
    out = objective(pooling, mae=1.0, contrastive=1.0)(*batch(), masks())
    assert torch.isfinite(out.loss)


def test_reconstructing_the_first_view_decodes_half_as_much():
    rows = []
    for which in ("first", "all"):
        module = objective(mae=1.0, mae_views=which)
        module.encoder.backbone.decoder.pred.register_forward_hook(lambda _m, _i, out: rows.append(len(out)))
        module(*batch(), masks())
    assert rows == [8, 16]


def test_masks_repeat_with_their_generator():
    module = objective(mae=1.0, contrastive=1.0)
    losses = [float(module(*batch(), masks(seed)).loss.detach()) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_a_projector_serves_contrastive_losses_only():
    module = objective(mae=0.0, contrastive=1.0, triplet=1.0, projector=12)
    out = module(*batch(), masks())
    out.loss.backward()
    assert module.projector[0].weight.grad.abs().max() > 0
    plain = objective(mae=0.0, contrastive=1.0, triplet=1.0)(*batch(), masks())
    assert float(out.parts["triplet"]) == pytest.approx(float(plain.parts["triplet"]))


def test_clap_trains_audio_text_projection_and_temperature():
    vectors = torch.randn(CLASSES, 6, generator=masks(5))
    module = objective(mae=0.0, clap=1.0, captions=vectors, text={"dim": 6})
    module(*batch(), masks()).loss.backward()
    for parameter in (module.encoder.text_projection.weight, module.clap_scale, module.encoder.backbone.norm.weight):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mae": 0.0, "triplet": 1.0, "classes": 0}, "triplet need labels"),
        ({"mae": 0.0, "contrastive": 1.0, "supervised": True, "classes": 0}, "contrastive .* need labels"),
        ({"mae": 0.0, "contrastive": 1.0, "views": 1, "classes": 0}, "set objective.views=2"),
        ({"mae": 0.0, "clap": 1.0, "text": {"dim": 6}}, "neither captions nor labels"),
        ({"mae": 0.0, "clap": 1.0, "captions": torch.zeros(3, 6)}, "no text tower"),
        ({"mae": 1.0, "contrastive": 1.0, "pooling": "freq_concat"}, "set objective.view_tokens=all"),
    ],
)
def test_what_the_data_cannot_serve_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        objective(**kwargs)


@pytest.mark.parametrize("broken", [{"mae": 0.0}, {"views": 1, "alignment": 1.0}])
def test_inconsistent_objectives_are_refused(broken):
    with pytest.raises(ValueError):
        ObjectiveConfig(**broken)


# --- two ranks against one process ------------------------------------------------------------------------------------

CASES = {
    "contrastive": {"mae": 0.0, "contrastive": 1.0, "view_tokens": "all"},
    "self-supervised": {"mae": 0.0, "contrastive": 1.0, "supervised": False, "projector": 8},
    "everything": EVERYTHING,
}


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, config in CASES.items():
        module = objective(**config)
        joined = DistributedDataParallel(module)
        out = joined(*batch(rows=4, seed=rank), masks(rank))
        out.loss.backward()
        results[name] = (float(out.loss.detach()), {key: p.grad for key, p in module.named_parameters()})
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(_two_ranks, (folder,), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process_on_the_joined_batch(ranks, case):
    module = objective(**CASES[case])
    shares = [batch(rows=4, seed=rank) for rank in (0, 1)]
    embedded, rebuilt = zip(
        *(module.embed_views(x, masks(rank), module.config.mae > 0) for rank, (x, _) in enumerate(shares)), strict=True
    )
    targets = ClipTargets(*(torch.cat(parts) for parts in zip(*(t for _, t in shares), strict=True)))
    parts = module.compare(torch.cat(embedded, dim=1), targets)
    if module.config.mae:
        parts["mae"] = torch.stack([part["mae"] for part in rebuilt]).mean()
    loss = module.weighted(parts)
    loss.backward()
    assert sum(ranks[rank][case][0] for rank in (0, 1)) / 2 == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, parameter), rank in itertools.product(module.named_parameters(), (0, 1)):
        theirs = ranks[rank][case][1][name]
        if parameter.grad is None:
            assert theirs is None or theirs.abs().max() == 0
        else:
            torch.testing.assert_close(theirs, parameter.grad, rtol=1e-4, atol=1e-6)


def test_each_view_hides_in_its_own_way():
    module = objective(mae=0.0, contrastive=1.0, view_mask_modes=("time", "frequency"), mask_ratio=0.5)
    steps, bands = module.encoder.backbone.config.grid
    _, drawn = module._encode_visible(torch.zeros(8, 1, FRAMES, BANDS), masks())
    hidden = drawn.mask.unflatten(1, (steps, bands)).bool()
    assert torch.equal(hidden[:4].all(2), hidden[:4].any(2)), "the first view hides whole time steps"
    assert torch.equal(hidden[4:].all(1), hidden[4:].any(1)), "the second hides whole bands"
    with pytest.raises(ValueError, match="set views: 2"):
        ObjectiveConfig(views=1, view_mask_modes=("time", "frequency"))


def test_latent_targets_train_the_encoder_and_the_teacher_follows():
    module = objective(mae=0.0, latent=1.0, views=1)
    out = module(*batch(views=1), masks())
    out.loss.backward()
    student = module.encoder.backbone
    assert student.patch_proj.weight.grad.abs().max() > 0 and module.latent_head.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    before = module.teacher.patch_proj.weight.clone()
    with torch.no_grad():
        student.patch_proj.weight += 1.0
    module.after_step(progress=0.0)
    torch.testing.assert_close(module.teacher.patch_proj.weight, before + 0.01, atol=1e-6, rtol=0)
    module.after_step(progress=1.0)  # by the end of the training it stands still
    torch.testing.assert_close(module.teacher.patch_proj.weight, before + 0.01, atol=1e-6, rtol=0)
    assert "teacher.patch_proj.weight" in module.state_dict(), "a resumed run goes on with the same teacher"
