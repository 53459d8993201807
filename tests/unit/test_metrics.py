"""Retrieval metrics against definitions written out slowly, and against sklearn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from audiomae import metrics
from audiomae.metrics import Labelled, score_protocol, summarise


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = np.array(list("aabbbcdd"))[rng.integers(0, 8, 60)]
    centres = {label: rng.normal(size=6) for label in "abcd"}
    vectors = np.stack([centres[label] for label in labels]) + rng.normal(size=(60, 6))
    return vectors.astype(np.float32), labels, np.arange(60) % 3


def scores_of(query_vectors, query_labels, gallery_vectors, gallery_labels, query_ids=None, gallery_ids=None, **more):
    sides = (
        Labelled(query_vectors, query_labels, query_ids),
        Labelled(gallery_vectors, gallery_labels, gallery_ids),
    )
    return metrics.score_queries(*sides, **more)


def metrics_of(*sides, **more):
    return summarise(scores_of(*sides, **more))


def slow_scores(query, label, gallery, gallery_labels, k):
    """One query: the textbook definitions with plain loops."""
    cosine = [float(query @ g / np.linalg.norm(query) / np.linalg.norm(g)) for g in gallery]
    ranked = [gallery_labels[i] == label for i in sorted(range(len(gallery)), key=lambda i: -cosine[i])]
    precisions = [sum(ranked[: i + 1]) / (i + 1) for i, hit in enumerate(ranked) if hit]
    return {
        "AP": sum(precisions) / len(precisions),
        f"R@{k}": float(any(ranked[:k])),
        f"P@{k}": sum(ranked[:k]) / k,
    }


def test_every_metric_equals_its_definition(data):
    vectors, labels, _ = data
    queries, gallery = slice(0, 20), slice(20, 60)
    found = scores_of(vectors[queries], labels[queries], vectors[gallery], labels[gallery], ks=(1, 5, 10))
    for i in range(20):
        relevance = (labels[gallery] == labels[i]).astype(float)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        similarity = unit[gallery] @ unit[i]
        assert found.values["AP"][i] == pytest.approx(average_precision_score(relevance, similarity))
        assert found.values["nDCG@5"][i] == pytest.approx(ndcg_score([relevance], [similarity], k=5))
        for k in (1, 5, 10):
            slow = slow_scores(vectors[i], labels[i], vectors[gallery], labels[gallery], k)
            for name, value in slow.items():
                assert found.values[name][i] == pytest.approx(value), (i, name)


def test_means_and_per_class(data):
    vectors, labels, _ = data
    result = metrics_of(vectors[:20], labels[:20], vectors[20:], labels[20:])
    scores = scores_of(vectors[:20], labels[:20], vectors[20:], labels[20:])
    assert result["mAP"] == pytest.approx(scores.values["AP"].mean())
    assert result["num_queries"] == 20 and result["num_gallery"] == 40 and result["queries_without_match"] == 0
    for label, row in result["per_class"].items():
        assert row["num_queries"] == (labels[:20] == label).sum()
        assert row["R@1"] == pytest.approx(scores.values["R@1"][labels[:20] == label].mean())


def test_perfect_and_opposite_rankings():
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    good = metrics_of(vectors, [0, 0, 1, 1], vectors, [0, 0, 1, 1], query_ids=range(4), gallery_ids=range(4))
    assert good["mAP"] == good["R@1"] == good["kNN"] == good["nDCG@10"] == 1.0
    bad = metrics_of(vectors[:1], [1], vectors, [0, 0, 1, 1], knn_k=1)
    assert bad["R@1"] == bad["kNN"] == 0.0
    assert bad["mAP"] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_knn_vote_is_weighted_by_similarity():
    gallery = np.array([[1, 0], [0.2, 1], [0.2, 1]], np.float32)
    found = scores_of([[1, 0]], ["near"], gallery, ["near", "far", "far"], knn_k=3)
    assert found.voted.tolist() == ["near"]


def test_a_collapsed_encoder_scores_chance_whatever_the_order_of_the_gallery():
    labels = np.repeat(np.arange(10), 40)
    result = score_protocol(Labelled(np.ones((400, 8), np.float32), labels))
    assert summarise(result)["R@1"] < 0.3
    assert 0.05 < summarise(result)["mAP"] < 0.2


def test_leave_one_out_never_finds_itself_nor_its_recording(data):
    vectors, labels, _ = data
    alone = score_protocol(Labelled(vectors, labels))
    assert not (alone.top == np.arange(60)[:, None]).any()
    recordings = np.arange(60) // 2
    scores = score_protocol(Labelled(vectors, labels, recordings))
    assert not (recordings[scores.top] == recordings[:, None])[scores.top >= 0].any()


def test_groups_search_only_the_other_groups(data):
    vectors, labels, groups = data
    scores = score_protocol(Labelled(vectors, labels), groups=groups)
    assert scores.query_rows.tolist() == list(range(60))
    assert (groups[scores.top] != groups[:, None]).all()
    inside = groups == 1
    one = score_protocol(Labelled(vectors, labels), groups=groups, query_groups=[1])
    assert one.query_rows.tolist() == np.flatnonzero(inside).tolist()
    np.testing.assert_allclose(one.values["AP"], scores.values["AP"][inside])
    expected = metrics_of(vectors[inside], labels[inside], vectors[~inside], labels[~inside])
    assert summarise(one)["mAP"] == pytest.approx(expected["mAP"])


def test_query_rows_ask_against_everything(data):
    vectors, labels, groups = data
    some = score_protocol(Labelled(vectors, labels), groups=groups, query_rows=[3, 50])
    whole = score_protocol(Labelled(vectors, labels), groups=groups)
    assert some.query_rows.tolist() == [3, 50]
    np.testing.assert_array_equal(some.top, whole.top[[3, 50]])


def test_blocks_do_not_change_the_result(data, monkeypatch):
    vectors, labels, _ = data
    whole = score_protocol(Labelled(vectors, labels))
    monkeypatch.setattr(metrics, "_SIMILARITIES_PER_BLOCK", 7 * 60)
    blocked = score_protocol(Labelled(vectors, labels))
    np.testing.assert_array_equal(whole.top, blocked.top)
    for name, column in whole.values.items():
        np.testing.assert_allclose(column, blocked.values[name])


def test_a_query_without_a_relevant_candidate_is_counted_and_left_out():
    vectors = np.eye(4, dtype=np.float32)
    result = metrics_of(vectors[:2], ["lonely", "x"], vectors[2:], ["x", "y"])
    assert result["queries_without_match"] == 1
    assert result["mAP"] in (1.0, 0.5)
    assert result["per_class"]["lonely"]["mAP"] == 0.0


def test_a_small_gallery_still_divides_precision_by_k():
    result = metrics_of(np.ones((1, 2)), ["a"], np.ones((2, 2)), ["a", "a"], ks=(5,))
    assert result["P@5"] == pytest.approx(2 / 5) and result["nDCG@5"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_vectors": np.full((2, 2), np.nan)}, "2 of 2 vectors hold NaN"),
        ({"query_labels": ["a"]}, "2 vectors but labels of shape"),
        ({"gallery_vectors": np.ones((2, 3))}, "2 dimensions, gallery vectors 3"),
        ({"query_ids": [1, 2]}, "go together"),
        ({"ks": (0,)}, "must be positive"),
        ({"gallery_vectors": np.empty((0, 2)), "gallery_labels": []}, "at least one row"),
    ],
)
def test_wrong_input_is_named(change, message):
    good = {
        "query_vectors": np.ones((2, 2)),
        "query_labels": ["a", "b"],
        "gallery_vectors": np.ones((2, 2)),
        "gallery_labels": ["a", "b"],
    }
    with pytest.raises(ValueError, match=message):
        metrics_of(**{**good, **change})


def test_wrong_groups_are_named(data):
    vectors, labels, groups = data
    with pytest.raises(ValueError, match="at least two"):
        score_protocol(Labelled(vectors, labels), groups=np.zeros(60))
    with pytest.raises(ValueError, match="query group 9"):
        score_protocol(Labelled(vectors, labels), groups=groups, query_groups=[9])
    with pytest.raises(ValueError, match="no query is left"):
        score_protocol(Labelled(vectors, labels), groups=groups, query_groups=[1], query_rows=[0])
