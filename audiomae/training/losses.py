"""Losses over embeddings, as pure functions of tensors.

Every function takes unit vectors (`float[B, D]`, L2-normalised rows), computes in float32 (call it outside autocast)
and returns a scalar. Softmaxes are taken as log-sum-exp, so no temperature overflows and nothing is biased by an added
epsilon. Rows that a loss knows nothing about (`UNLABELLED`) are left out of it, as anchors and as negatives.

The masked-reconstruction loss needs the patches and lives with the model: `audiomae.model.audiomae.AudioMAE`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from audiomae.training.clips import UNLABELLED

MAX_LOGIT_SCALE = 100.0


def info_nce(
    embeddings: Tensor,
    groups: Tensor,
    temperature: float | Tensor = 0.07,
    positives: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """InfoNCE over a batch: each row is pulled to the other rows of its group and pushed from the rest.

    With one group per clip and two views per clip this is NT-Xent (Chen et al. 2020, SimCLR, eq. 1); with one group
    per label it is supervised contrastive learning (Khosla et al. 2020): `positives="mean"` averages the log-ratio
    over positives (their eq. 2, L_out), `"sum"` takes the log of the summed positives (eq. 3, L_in, without its
    constant; the form of the research note). The two agree when every row has one positive.

    Args:
        embeddings: float[M, D] unit rows; the views of a batch stacked.
        groups: int64[M]; equal value = positive pair. Rows alone in their group serve only as negatives.
        temperature: softmax temperature.

    Returns:
        The mean over rows that have a positive; 0 (with a gradient of 0) when none has.
    """
    z = embeddings.float()
    logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (groups[:, None] == groups[None, :]) & ~itself
    logits = logits.masked_fill(itself, -math.inf)
    denominator = logits.logsumexp(dim=1)
    count = positive.sum(dim=1)
    if positives == "mean":
        attraction = logits.masked_fill(~positive, 0.0).sum(dim=1) / count.clamp(min=1)
    else:
        # a row without positives would be log(0): give it its own denominator, it is dropped below
        attraction = logits.masked_fill(~positive & (count > 0)[:, None], -math.inf).logsumexp(dim=1)
    return _mean_where(denominator - attraction, count > 0)


def contrastive_groups(clips: Tensor, labels: Tensor | None) -> Tensor:
    """Which rows are positives of each other: same label when labelled, else the same clip.

    Args:
        clips: int64[M] index of the clip that each view was made from.
        labels: int64[M] class or `UNLABELLED`, or None for self-supervised.

    Returns:
        int64[M] group numbers for `info_nce`.
    """
    if labels is None:
        return clips
    return torch.where(labels == UNLABELLED, clips, clips.max() + 1 + labels)


def uniformity(embeddings: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean over pairs of exp(-t * ||x - y||^2); lower is more uniform on the sphere.

    Wang & Isola 2020, *Understanding Contrastive Representation Learning through Alignment and Uniformity*, eq. 5.

    Args:
        embeddings: float[M, D] unit rows, M >= 2.
    """
    z = embeddings.float()
    upper = torch.ones(len(z), len(z), dtype=torch.bool, device=z.device).triu(1)
    exponents = -t * (2 - 2 * (z @ z.T))[upper]
    return exponents.logsumexp(dim=0) - math.log(exponents.numel())


def alignment(first: Tensor, second: Tensor, alpha: float = 2.0) -> Tensor:
    """Mean distance^alpha between positives, row by row; lower is better aligned (Wang & Isola 2020, eq. 4).

    Args:
        first, second: float[M, D] unit rows, row i of each being two views of one clip.
    """
    squared = (first.float() - second.float()).pow(2).sum(dim=1)
    return squared.pow(alpha / 2).mean()


def initial_log_scale(temperature: float) -> float:
    """The log of the logit scale that a learnt temperature starts from."""
    return math.log(1 / temperature)


def clamped_scale(log_scale: Tensor) -> Tensor:
    """Logit scale learnt in log space and kept within 1 to 100, as in CLIP (Radford et al. 2021, section 2.5)."""
    return log_scale.float().clamp(0.0, math.log(MAX_LOGIT_SCALE)).exp()


def clap_lite(embeddings: Tensor, classes: Tensor, labels: Tensor, log_scale: Tensor) -> Tensor:
    """CLAP with learnt class vectors in place of text, both ways.

    Audio to class is cross-entropy over the C classes. Class to audio has many right answers: for each class in the
    batch, the target is uniform over its clips (and classes without a clip are left out).

    Args:
        embeddings: float[B, D] unit rows.
        classes: float[C, D]; normalised here.
        labels: int64[B] class or `UNLABELLED`.
        log_scale: scalar, log of the logit scale.

    Returns:
        The mean of both directions; 0 when no row is labelled.
    """
    labelled = labels != UNLABELLED
    embeddings, labels = embeddings[labelled], labels[labelled]
    logits = clamped_scale(log_scale) * embeddings.float() @ F.normalize(classes.float(), dim=1).T
    target = labels[:, None] == torch.arange(len(classes), device=labels.device)
    return (_multi_positive(logits, target) + _multi_positive(logits.T, target.T)) / 2


def clap(audio: Tensor, text: Tensor, captions: Tensor, log_scale: Tensor) -> Tensor:
    """Contrastive language-audio loss, both ways; clips that share a caption are positives of it, never negatives.

    Elizalde et al. 2022 (CLAP) and Radford et al. 2021 (CLIP), with the target spread evenly over equal captions.

    Args:
        audio: float[B, D] unit rows.
        text: float[B, D] unit rows, the caption of each clip.
        captions: int64[B] equal for equal captions; `UNLABELLED` for a clip without one.
        log_scale: scalar, log of the logit scale.
    """
    captioned = captions != UNLABELLED
    audio, text, captions = audio[captioned], text[captioned], captions[captioned]
    logits = clamped_scale(log_scale) * audio.float() @ text.float().T
    target = captions[:, None] == captions[None, :]
    return (_multi_positive(logits, target) + _multi_positive(logits.T, target)) / 2


def triplet_semi_hard(embeddings: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """Triplet loss with the negative chosen semi-hard (Schroff et al. 2015, FaceNet, section 3.2).

    For each anchor and positive: the nearest negative that is farther than the positive; when there is none, the
    farthest negative. Distances are squared Euclidean.

    Args:
        embeddings: float[B, D] unit rows.
        labels: int64[B] class or `UNLABELLED`.
        margin: by how much the negative must be farther.

    Returns:
        The mean hinge over all anchor-positive pairs that have a negative; 0 when there is none.
    """
    labelled = labels != UNLABELLED
    z, labels = embeddings[labelled].float(), labels[labelled]
    distances = (2 - 2 * (z @ z.T)).clamp(min=0)
    same = labels[:, None] == labels[None, :]
    with torch.no_grad():
        ordered, order = distances.masked_fill(same, math.inf).sort(dim=1)
        farther = torch.searchsorted(ordered, distances, right=True)
        last = (~same).sum(dim=1, keepdim=True) - 1
        chosen = order.gather(1, torch.minimum(farther, last).clamp(min=0))
    hinge = F.relu(distances - distances.gather(1, chosen) + margin)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return _mean_where(hinge, same & ~itself & (last >= 0))


def _multi_positive(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy to a target spread evenly over the true columns; rows without one are left out."""
    count = target.sum(dim=1)
    attraction = logits.masked_fill(~target, 0.0).sum(dim=1) / count.clamp(min=1)
    return _mean_where(logits.logsumexp(dim=1) - attraction, count > 0)


def _mean_where(values: Tensor, keep: Tensor) -> Tensor:
    kept = values.masked_fill(~keep, 0.0)
    return kept.sum() / keep.sum().clamp(min=1)
