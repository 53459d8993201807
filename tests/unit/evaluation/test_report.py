"""The report as a reader gets it: right numbers, whole in one file, safe with hostile names; and its pictures."""

import base64
import re

import numpy as np
import pytest

from audiomae.evaluation import plots
from audiomae.evaluation.report import LISTENING_RATE, draw_plots, render_report, worst_queries
from audiomae.evaluation.rows import LabelledRows, per_clip, shared_rows
from audiomae.evaluation.runs import ProtocolConfig, compare_runs, evaluate_rows
from audiomae.vectors import normalised

PNG = b"\x89PNG\r\n\x1a\n"


def make_rows(name="ours", noise=0.6, seed=0, per_file=1):
    rng = np.random.default_rng(seed)
    classes = ["dog & <cat>", "rain", "siren"]
    labels = np.array([classes[i % 3] for i in range(45)]).repeat(per_file)
    centres = {label: rng.normal(size=8) for label in classes}
    vectors = np.stack([centres[label] for label in labels]) + noise * rng.normal(size=(len(labels), 8))
    return LabelledRows(
        name=name,
        vectors=normalised(vectors.astype(np.float32)),
        labels=labels,
        groups=np.array([str(i % 5) for i in range(45)]).repeat(per_file),
        uris=np.array([f"{i}.wav" for i in range(45)]).repeat(per_file),
        spans=np.stack([np.tile(np.arange(per_file), 45), np.tile(np.arange(per_file) + 1, 45)], axis=1).astype(float),
        corpus_root="/corpus",
    )


@pytest.fixture(scope="module")
def runs():
    protocol = ProtocolConfig(group="fold", resamples=200)
    return [evaluate_rows(make_rows(), protocol), evaluate_rows(make_rows("baseline", noise=3.0, seed=0), protocol)]


def read_span(uri, start, end):
    if uri == "0.wav":
        return None
    return np.sin(np.arange(int((end - start) * LISTENING_RATE)) / 7).astype(np.float32)


def test_the_report_is_one_file_with_every_part(runs):
    tests = compare_runs(runs[0], runs[1:])
    worst = worst_queries(runs[0], read_span, count=4)
    page = render_report(runs, tests, draw_plots(runs, "PCA", 0), worst, {"corpus": "/corpus"}, ["3 rows had no label"])
    assert f"{runs[0].summary['mAP']:.3f}" in page and "3 rows had no label" in page
    assert 'id="comparisons"' in page and 'id="groups"' in page and page.count('class="worst"') == 4
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 5 + 4
    assert all(base64.b64decode(image).startswith(PNG) for image in images)
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page
    assert "<cat>" not in page and "dog &amp; &lt;cat&gt;" in page


def test_the_worst_queries_are_the_worst_and_of_several_classes(runs):
    worst = worst_queries(runs[0], read_span, count=5)
    precisions = [query.average_precision for query in worst]
    assert precisions == sorted(precisions)
    assert precisions[0] == pytest.approx(runs[0].scores.values["AP"].min())
    assert max(np.unique([query.label for query in worst], return_counts=True)[1]) <= 2
    assert all(query.picture.startswith(PNG) for query in worst)


def test_unreadable_audio_is_said_not_hidden(runs):
    silent = worst_queries(runs[0], lambda *_: None, count=1)
    assert silent[0].sounds == [] and silent[0].picture.startswith(PNG)


def test_without_groups_the_report_has_no_group_table():
    run = evaluate_rows(make_rows(), ProtocolConfig(resamples=200))
    page = render_report([run], [], draw_plots([run], "PCA", 0), [], {})
    assert 'id="groups"' not in page and 'id="comparisons"' not in page and "Leave-one-out" in page


def test_group_means_and_spread_come_from_the_groups(runs):
    values = [means["mAP"] for means in runs[0].per_group.values()]
    assert list(runs[0].per_group) == ["0", "1", "2", "3", "4"]
    assert runs[0].group_spread("mAP") == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert runs[0].as_dict()["group_spread"]["mAP"]["mean"] == pytest.approx(np.mean(values))


def test_runs_are_paired_on_the_queries_they_share():
    protocol = ProtocolConfig(group="fold", resamples=200)
    whole = make_rows()
    order = np.random.default_rng(1).permutation(45)[:40]
    part = LabelledRows(
        "part",
        whole.vectors[order],
        whole.labels[order],
        whole.groups[order],
        whole.uris[order],
        whole.spans[order],
        "",
    )
    tests = compare_runs(evaluate_rows(whole, protocol), [evaluate_rows(part, protocol)])
    assert {test["num_queries"] for test in tests} == {40}
    assert [test["metric"] for test in tests] == ["mAP", "R@1"]
    assert abs(tests[0]["difference"]) < 0.1
    mine, theirs = shared_rows(["a", "b", "c"], ["c", "x", "a"])
    assert (mine.tolist(), theirs.tolist()) == ([0, 2], [2, 0])


def test_the_better_run_wins_with_significance(runs):
    test = compare_runs(runs[0], runs[1:])[0]
    assert test["difference"] > 0.1 and test["low"] > 0 and test["p_holm"] < 0.01


def test_a_sample_of_queries_is_the_same_in_every_run():
    protocol = ProtocolConfig(max_queries=10, resamples=200)
    one = evaluate_rows(make_rows(), protocol)
    other = evaluate_rows(make_rows(noise=1.0, seed=3), protocol)
    assert len(one.scores) == 10 and one.scores.num_gallery == 45
    np.testing.assert_array_equal(one.scores.query_rows, other.scores.query_rows)
    rest = evaluate_rows(make_rows(), ProtocolConfig(max_queries=10, resamples=200, seed=1))
    assert one.scores.query_rows.tolist() != rest.scores.query_rows.tolist()


def test_windows_average_to_clips_in_order():
    windows = make_rows(per_file=3)
    clips = per_clip(windows)
    assert len(clips) == 45 and clips.uris.tolist() == [f"{i}.wav" for i in range(45)]
    assert clips.spans[0].tolist() == [0.0, 3.0]
    mean = windows.vectors[:3].mean(axis=0)
    np.testing.assert_allclose(clips.vectors[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_windows_of_one_file_are_one_sampling_unit():
    windows = evaluate_rows(make_rows(per_file=3), ProtocolConfig(group="fold", level="window", resamples=500))
    assert len(windows.scores) == 135
    assert windows.confidence["mAP"]["low"] < windows.summary["mAP"] < windows.confidence["mAP"]["high"]


def test_the_map_is_the_same_for_the_same_seed():
    rows = make_rows()
    np.testing.assert_array_equal(
        plots.project_2d(rows.vectors, "t-SNE", 3), plots.project_2d(rows.vectors, "t-SNE", 3)
    )
    assert plots.project_2d(rows.vectors[:2], "t-SNE", 0).shape == (2, 2)
    with pytest.raises(ValueError, match="expected 't-SNE' or 'PCA'"):
        plots.project_2d(rows.vectors, "umap", 0)


def test_pictures_survive_many_classes_and_empty_sounds():
    names = [f"class {i:02d}" for i in range(60)]
    assert plots.confusion(names, names[::-1], "many").startswith(PNG)
    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    assert plots.embedding_map(vectors, np.array(names), "PCA", 0).startswith(PNG)
    silence = plots.Picture(np.zeros(4000, np.float32), "silence", None)
    assert plots.spectrogram_row([silence, plots.Picture(np.zeros(0, np.float32), "gone", False)], 16000).startswith(
        PNG
    )
