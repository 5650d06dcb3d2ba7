"""Tests of fragment_metrics.py: `python fragment_tests.py`."""
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import fragment_metrics
from fragment_metrics import EdgeScores, SaliencyScores, edge_nms, match_edges, thin


def _pictures(count=5, height=12, width=9, seed=0):
    """Saliency maps with values on a grid of 1/255, and masks that go with them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mask = rng.random((height, width)) < 0.4
        noise = rng.integers(0, 256, mask.shape)
        yield (np.where(mask, 255 - noise // 2, noise) / 255).astype(np.float32), mask


def test_saliency_scores_against_loops():
    scores = SaliencyScores()
    precision, recall, errors = np.zeros(256), np.zeros(256), []
    for saliency, mask in _pictures():
        scores.update(torch.from_numpy(saliency), torch.from_numpy(mask.astype(np.uint8)))
        for k in range(256):
            found = saliency.astype(np.float64) >= k / 255 - 1e-6
            precision[k] += (found & mask).sum() / max(found.sum(), 1)
            recall[k] += (found & mask).sum() / mask.sum()
        errors.append(np.mean([abs(s - g) for s, g in zip(saliency.ravel(), mask.ravel())]))
    p, r = precision / 5, recall / 5
    expected = max((1.3 * a * b / (0.3 * a + b) for a, b in zip(p, r) if a + b > 0))
    result = scores.result()
    assert abs(result["F_beta"] - expected) < 1e-9 and 0.4 < expected < 1
    assert abs(result["MAE"] - np.mean(errors)) < 1e-6


def test_saliency_extremes():
    mask = next(_pictures())[1]
    for saliency, f, mae in ((mask, 1, 0), (~mask, None, 1), (mask * 0, None, mask.mean()),
                             (mask * 0.5, 1, mask.mean() / 2)):
        scores = SaliencyScores()
        scores.update(saliency.astype(np.float32), mask)
        result, share = scores.result(), mask.mean()
        # With nothing found but at threshold 0, where all is: P = share, R = 1.
        f = 1.3 * share / (0.3 * share + 1) if f is None else f
        assert abs(result["F_beta"] - f) < 1e-9 and abs(result["MAE"] - mae) < 1e-6
    before = scores.result()
    scores.update(np.zeros((4, 4)), np.zeros((4, 4)))  # an empty mask, nothing found
    assert scores.masks == 1 and abs(scores.result()["F_beta"] - before["F_beta"]) > 0.1
    for wrong in (np.full((4, 4), 1.1), np.full((4, 4), np.nan), np.zeros((4, 5))):
        try:
            scores.update(wrong, np.zeros((4, 4)))
        except ValueError:
            continue
        raise AssertionError("accepted")


def test_nms_leaves_the_crest_of_a_ridge():
    y, x = np.mgrid[:60, :70].astype(float)
    for degrees in (0, 15, 30, 45, 60, 90, 120, 150):
        normal = np.deg2rad(degrees)
        away = (x - 34.1) * np.cos(normal) + (y - 29.2) * np.sin(normal)
        ridge = 0.9 * np.exp(-(away / 2.5) ** 2)
        thinned = edge_nms(ridge)
        inside = np.s_[12:-12, 12:-12]
        kept = thinned[inside] > 0.3
        # Counted along the axis nearer to the normal: rows if the ridge is steep, else columns.
        counts = kept.sum(1 if abs(np.cos(normal)) > 0.7 else 0)
        crossed = (np.abs(away[inside]) < 0.5).any(1 if abs(np.cos(normal)) > 0.7 else 0)
        # Two on diagonals, whose pixels are 0.7 apart: both can lie within half a pixel.
        assert (counts[crossed] >= 1).all() and counts.max() <= 2, (degrees, counts)
        counts = thin(kept).sum(1 if abs(np.cos(normal)) > 0.7 else 0)
        assert (counts[2:-2] == 1).sum() >= crossed.sum() - 4, (degrees, counts)
        assert np.abs(away[inside][kept]).max() < 0.75, degrees
    assert (thinned[:, 0] == 0).all() and (thinned[-1] == 0).all()  # the frame fades to 0
    flat = edge_nms(np.zeros((20, 20)))
    assert (flat == 0).all() and edge_nms(ridge.astype(np.float32)).shape == (60, 70)


def _nms_pixel(edge, angle, y, x, margin=1.01):
    """The rule of the original for one pixel, radius 1: bilinear interpolation written out."""
    for d in (-1, 1):
        b = min(max(y + d * np.sin(angle), 0), edge.shape[0] - 1.001)
        a = min(max(x + d * np.cos(angle), 0), edge.shape[1] - 1.001)
        i, j = int(b), int(a)
        top = edge[i, j] + (a - j) * (edge[i, j + 1] - edge[i, j])
        low = edge[i + 1, j] + (a - j) * (edge[i + 1, j + 1] - edge[i + 1, j])
        if edge[y, x] * margin < top + (b - i) * (low - top):
            return 0.0
    return edge[y, x]


def test_nms_against_a_loop():
    rng = np.random.default_rng(3)
    image = rng.random((24, 31))

    def triangle(picture, radius):  # the filter as a double loop over a mirrored picture
        padded = np.pad(picture, radius, mode="symmetric")
        kernel = [radius + 1 - abs(k) for k in range(-radius, radius + 1)]
        out = np.zeros_like(picture)
        for i, j in np.ndindex(2 * radius + 1, 2 * radius + 1):
            part = padded[i:i + picture.shape[0], j:j + picture.shape[1]]
            out += kernel[i] * kernel[j] * part / (radius + 1) ** 4
        return out

    edge = triangle(image, 1)
    dy, dx = np.gradient(triangle(edge, 4))
    dxx, dxy, dyy = np.gradient(dx)[1], np.gradient(dy)[1], np.gradient(dy)[0]
    angle = np.mod(np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)), np.pi)
    expected = np.array([[_nms_pixel(edge, angle[y, x], y, x) for x in range(31)]
                         for y in range(24)])
    assert 0.1 < (expected > 0).mean() < 0.6
    assert np.allclose(edge_nms(image, border=0), expected)
    faded = edge_nms(image, border=5)
    assert np.isclose(faded[3, 15], expected[3, 15] * 3 / 5)
    assert np.isclose(faded[12, 28], expected[12, 28] * 2 / 5)
    assert np.array_equal(faded[5:-5, 5:-5] > 0, expected[5:-5, 5:-5] > 0)


def _components(mask):
    """Number of 8-connected components, by flood fill."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        stack, count = [left.pop()], count + 1
        while stack:
            y, x = stack.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
    return count


def _thin_pixel(mask, y, x, second):
    """Whether Guo & Hall let the pixel go, from the eight neighbours by name."""
    at = lambda dy, dx: bool(mask[y + dy, x + dx])
    e, ne, n, nw = at(0, 1), at(-1, 1), at(-1, 0), at(-1, -1)
    w, sw, s, se = at(0, -1), at(1, -1), at(1, 0), at(1, 1)
    g1 = sum((not a and (b or c)) for a, b, c in ((e, ne, n), (n, nw, w), (w, sw, s), (s, se, e)))
    n1 = (e or ne) + (n or nw) + (w or sw) + (s or se)
    n2 = (ne or n) + (nw or w) + (sw or s) + (se or e)
    g3 = (sw or s or not nw) and w if second else (ne or n or not se) and e
    return g1 == 1 and 2 <= min(n1, n2) <= 3 and not g3


def test_thin_against_a_loop():
    rng = np.random.default_rng(1)
    blobs = np.kron(rng.random((8, 9)) < 0.5, np.ones((4, 4), bool))  # touches the frame
    bar = np.zeros((12, 30), bool)
    bar[4:7, 3:27] = True
    for mask in (blobs, rng.random((30, 31)) < 0.4, bar):
        slow, changed = np.pad(mask, 1), True
        while changed:
            changed = False
            for second in (False, True):
                gone = [(y, x) for y, x in np.argwhere(slow) if _thin_pixel(slow, y, x, second)]
                for y, x in gone:
                    slow[y, x], changed = False, True
        thinned = thin(mask)
        assert np.array_equal(thinned, slow[1:-1, 1:-1]) and not (thinned & ~mask).any()
        assert _components(thinned) == _components(mask)
    assert thinned.sum(0).max() == 1 and thinned[5, 5:25].all()  # the middle of the bar
    assert not thin(np.zeros((3, 3), bool)).any()


def _largest_matching(prediction, truth, radius):
    """Number of pairs by Kuhn's augmenting paths, one pixel after the other."""
    truths = [tuple(t) for t in np.argwhere(truth)]
    near = [[k for k, (a, b) in enumerate(truths) if (a - y) ** 2 + (b - x) ** 2 <= radius ** 2]
            for y, x in np.argwhere(prediction)]
    partner = {}

    def place(pixel, seen):
        for k in near[pixel]:
            if k not in seen:
                seen.add(k)
                if k not in partner or place(partner[k], seen):
                    partner[k] = pixel
                    return True
        return False

    return sum(place(pixel, set()) for pixel in range(len(near)))


def test_matching_is_the_largest_and_one_to_one():
    rng, greedy, largest = np.random.default_rng(0), 0, 0
    keep = fragment_metrics._augment
    for trial in range(40):
        radius = (0.5, 1, 2.3, 3)[trial % 4]
        prediction = rng.random((14, 13)) < 0.12
        truth = rng.random((3, 14, 13)) < (0.05, 0.3)[trial % 2]
        found, hit = match_edges(prediction, truth, radius)
        assert found.shape == hit.shape == truth.shape
        assert not (found & ~prediction).any() and not (hit & ~truth).any()
        for a in range(3):
            best = _largest_matching(prediction, truth[a], radius)
            # All that is marked as matched can be matched, among itself: pairs exist.
            assert found[a].sum() == hit[a].sum() == best
            assert _largest_matching(found[a], hit[a], radius) == best
        fragment_metrics._augment = lambda *arguments: False
        try:
            greedy, largest = greedy + match_edges(prediction, truth, radius)[0].sum(), \
                largest + found.sum()
        finally:
            fragment_metrics._augment = keep
    print(f"      greedy alone finds {greedy / largest:.3f} of the largest matching")
    assert 0.85 < greedy / largest < 0.98
    # A chain: each prediction sits between two truths, greedy from the wrong end loses one.
    prediction, truth = np.zeros((1, 12), bool), np.zeros((1, 12), bool)
    prediction[0, [0, 2, 5]], truth[0, [1, 4, 7]] = True, True
    assert match_edges(prediction, truth, 2)[0].sum() == 3
    empty = np.zeros((2, 1, 12), bool)
    assert not any(found.any() for found in match_edges(prediction, empty, 2))
    assert not any(found.any() for found in match_edges(empty[0], ~empty, 2))


def _line(height=40, width=60, column=30):
    edge = np.zeros((height, width), bool)
    edge[8:-8, column] = True
    return edge


def test_edge_scores_at_the_extremes():
    truth = [_line(), _line(), _line()]
    # The diagonal is 72.1 pixels: at 0.03 the tolerance is 2.16 of them.
    for shift, value in ((0, 1), (2, 1), (3, 0)):
        scores = EdgeScores(9, tolerance=0.03)
        scores.update(_line(column=30 + shift).astype(np.float32), truth)
        result = scores.result()
        assert all(abs(result[k] - value) < 1e-9 for k in ("ODS", "OIS", "AP", "R50")), result
    scores = EdgeScores(9)
    scores.update(np.zeros((40, 60)), truth)
    assert all(scores.result()[k] == 0 for k in ("ODS", "OIS", "AP", "R50"))
    scores.update(_line() * 0.55, truth)  # found up to the threshold 0.5, in one of two pictures
    assert abs(scores.result()["ODS"] - 2 / 3) < 1e-9 and abs(scores.result()["OIS"] - 2 / 3) < 1e-9
    for wrong in (np.zeros((40, 61)), np.full((40, 60), np.nan)):
        try:
            scores.update(wrong, truth)
        except ValueError:
            continue
        raise AssertionError("accepted")
    assert scores.pictures == 2


def test_edge_scores_against_loops():
    """Counts per threshold and annotation with the slow matching; the measures from their texts."""
    rng, n = np.random.default_rng(7), 7
    scores, tables = EdgeScores(n, tolerance=0.1), []
    for _ in range(3):
        probability = np.round(rng.random((15, 20)) ** 3, 1)  # steps of 0.1: equal maps occur
        truth = [rng.random((15, 20)) < share for share in (0.05, 0.1)]
        scores.update(probability, truth)
        rows = []
        for k in range(n):
            edge, right = thin(probability >= (k + 1) / (n + 1)), 0
            hits = sum(_largest_matching(edge, t, 2.5) for t in truth)
            found = match_edges(edge, np.stack(truth), 2.5)[0]  # which pixels is not unique
            right = sum(any(found[a, y, x] for a in (0, 1)) for y, x in np.argwhere(edge))
            rows.append((hits, sum(t.sum() for t in truth), right, edge.sum()))
        tables.append(rows)
    tables = np.array(tables, float)  # (pictures, thresholds, 4)

    def f_of(row):
        r, p = row[0] / row[1], row[2] / row[3] if row[3] else 0
        return r, p, 2 * p * r / (p + r) if p + r else 0

    total = tables.sum(0)
    assert np.array_equal(scores.counts, total.T)
    curve = [f_of(row) for row in total]
    ods = 0
    for (r0, p0, _), (r1, p1, _) in zip(curve, curve[1:]):
        for a in np.linspace(0, 1, 100):
            r, p = r0 + a * (r1 - r0), p0 + a * (p1 - p0)
            ods = max(ods, 2 * p * r / (p + r))
    best = sum(rows[max(range(n), key=lambda k: f_of(rows[k])[2])] for rows in tables)

    def at(points, where):  # linear between measured points, None outside
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            if x0 <= where <= x1:
                return y0 + (where - x0) / (x1 - x0) * (y1 - y0)

    by_recall = sorted({r: p for r, p, _ in reversed(curve)}.items())
    by_precision = sorted({p: r for r, p, _ in reversed(curve)}.items())
    ap = sum(at(by_recall, k / 100) or 0 for k in range(101)) / 100
    assert curve[0][0] == 1  # all annotated pixels found: the end sample counts half
    ap -= curve[0][1] / 200
    result = scores.result()
    assert abs(result["ODS"] - ods) < 1e-9 and abs(result["OIS"] - f_of(best)[2]) < 1e-9
    assert abs(result["AP"] - ap) < 1e-9 and 0 < ap < 0.9
    r50 = at(by_precision, max(by_precision[0][0], 0.5))
    assert abs(result["R50"] - (r50 or 0)) < 1e-9
    assert result["OIS"] >= max(f for _, _, f in curve) - 1e-9


def test_average_precision_and_r50_on_a_curve_by_hand():
    scores = EdgeScores(3)
    scores.counts[:] = [[80, 40, 20], [100] * 3, [40, 40, 20], [100, 50, 20]]
    # (R, P): (0.8, 0.4), (0.4, 0.8), (0.2, 1.0): one straight line from 0.2 to 0.4 to 0.8.
    expected = sum(1.2 - k / 100 for k in range(20, 81)) / 100
    result = scores.result()
    assert abs(result["AP"] - expected) < 1e-9 and abs(result["R50"] - 0.7) < 1e-9
    assert abs(result["ODS"] - 0.6) < 1e-3  # between the thresholds, at R = P = 0.6
    assert abs(result["threshold"] - 0.375) < 0.01


def test_scores_add_up_over_processes():
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("fork")
        started = [context.Process(target=_rank, args=(folder, rank)) for rank in range(2)]
        [process.start() for process in started]
        [process.join() for process in started]
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    saliency, edges = SaliencyScores(), EdgeScores(4)
    for rank in range(2):
        _score(saliency, edges, rank)
    assert found[0] == found[1]
    for result, expected in zip(found[0], (saliency.result(), edges.result())):
        assert all(abs(result[k] - expected[k]) < 1e-9 for k in expected)


def _score(saliency, edges, rank):
    for map_, mask in _pictures(rank + 1, seed=rank):
        saliency.update(map_, mask)
        edges.update(map_, [mask])


def _rank(folder, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=2)
    saliency, edges = SaliencyScores(), EdgeScores(4)
    _score(saliency, edges, rank)
    torch.save([saliency.reduce().result(), edges.reduce().result()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            start = time.time()
            test()
            print(f"{time.time() - start:5.2f} s  {name}")
