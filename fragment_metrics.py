"""Scores of saliency and edge maps (SparseMask §5.3)."""
import numpy as np
import torch

# --------------------------------------------------------------------------------------------------
# Saliency: F-beta and MAE
# --------------------------------------------------------------------------------------------------


class _Counts:
    """float64 sums that several processes can add up: the arrays named in `summed`."""

    summed = ()

    def reduce(self, device="cpu"):
        """Add up the sums of all ranks, where torch.distributed runs. device: the rank's GPU for
        NCCL, which does not move what lies on the CPU."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name in self.summed:
                total = torch.as_tensor(np.asarray(getattr(self, name), np.float64)).to(device)
                torch.distributed.all_reduce(total)
                setattr(self, name, total.cpu().numpy())
        return self


class SaliencyScores(_Counts):
    """Largest F-beta and MAE, the measures of Table 5.

    update(map, mask) one picture at a time: map (H, W) in [0, 1], mask (H, W) bool or {0, 1}.
    Precision and recall are taken at the thresholds k / 255, k = 0 ... 255 (salient: S >= k / 255),
    averaged over pictures, and F = (1 + b) P R / (b P + R), b = beta^2 = 0.3, of the averages; its
    largest value counts. MAE = mean |S - G| of a picture, averaged over pictures.
    OURS, where the papers are silent: a map with no pixel above the threshold has precision 0; a
    picture whose mask is empty counts for MAE and the precision (0), not for the recall.
    """

    summed = ("precision", "recall", "error", "pictures", "masks")

    def __init__(self, beta2=0.3):
        self.beta2 = beta2
        self.precision, self.recall = np.zeros(256), np.zeros(256)  # sums over pictures
        self.error, self.pictures, self.masks = 0.0, 0, 0

    def update(self, saliency, mask):
        saliency, mask = np.asarray(saliency, np.float64), np.asarray(mask) > 0
        if saliency.shape != mask.shape or not (saliency >= 0).all() or not (saliency <= 1).all():
            raise ValueError(f"saliency {saliency.shape} must lie in [0, 1] and have the mask's "
                             f"shape {mask.shape}")
        # The pixels at or above k / 255, for all k at once: a histogram summed from its end. The
        # small number keeps k / 255 itself, stored as float32, in bin k.
        level = np.floor(saliency * 255 + 1e-4).astype(int)
        above, hit = (np.bincount(pixels, minlength=256)[::-1].cumsum()[::-1]
                      for pixels in (level.ravel(), level[mask]))
        self.precision += hit / np.maximum(above, 1)
        self.recall += hit / max(mask.sum(), 1)
        self.error += np.abs(saliency - mask).mean()
        self.pictures += 1
        self.masks += int(mask.any())

    def result(self):
        """-> {"F_beta", "MAE"}, floats in [0, 1]."""
        precision = self.precision / max(self.pictures, 1)
        recall = self.recall / max(self.masks, 1)
        f = (1 + self.beta2) * precision * recall
        f /= np.maximum(self.beta2 * precision + recall, 1e-12)
        return {"F_beta": float(f.max()), "MAE": float(self.error / max(self.pictures, 1))}


# --------------------------------------------------------------------------------------------------
# Edges: thinning, matching, ODS, OIS, AP, R50
# --------------------------------------------------------------------------------------------------

def _smooth(image, radius):
    """Triangle filter of 2 radius + 1 pixels along both axes, mirrored at the border."""
    kernel = np.concatenate([np.arange(1, radius + 2), np.arange(radius, 0, -1)])
    for axis in (0, 1):
        widths = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(image, widths, mode="symmetric")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis)
        image = windows @ (kernel / (radius + 1) ** 2)
    return image


def edge_nms(probability, radius=1, border=5, margin=1.01):
    """Non-maximum suppression of an edge map: (H, W) in [0, 1] -> (H, W) float64, thinned.

    Dollar & Zitnick, "Fast edge detection using structured forests" [9], with the settings every
    BSDS evaluation uses: the map is smoothed over 3 pixels; the normal of an edge comes from the
    second derivatives of the map smoothed over 9 more; a pixel goes when times `margin` it is still
    below the map, interpolated, at some distance 1 ... radius along the normal on either side; and
    what is left within `border` pixels of the frame fades linearly to 0.
    """
    edge = _smooth(np.asarray(probability, np.float64), 1)
    height, width = edge.shape
    dy, dx = np.gradient(_smooth(edge, 4))
    dxx, (dyy, dyx) = np.gradient(dx, axis=1), np.gradient(dy)
    # OURS: the sign of 0 is taken as 1. The original has 0, which leaves a line exactly along
    # x, where dyx = 0, with the wrong normal: natural pictures have none, drawn ones do.
    sign = np.where(dyx > 0, -1.0, 1.0)
    angle = np.arctan(dyy * sign / (dxx + 1e-5))
    y, x = np.mgrid[:height, :width]
    keep = np.ones(edge.shape, bool)
    for distance in (d for r in range(1, radius + 1) for d in (-r, r)):
        at_y = np.clip(y + distance * np.sin(angle), 0, height - 1.001)
        at_x = np.clip(x + distance * np.cos(angle), 0, width - 1.001)
        y0, x0 = at_y.astype(int), at_x.astype(int)
        b, a = at_y - y0, at_x - x0
        beside = ((1 - b) * ((1 - a) * edge[y0, x0] + a * edge[y0, x0 + 1])
                  + b * ((1 - a) * edge[y0 + 1, x0] + a * edge[y0 + 1, x0 + 1]))
        keep &= edge * margin >= beside
    for size, axis in zip(edge.shape, (0, 1)):
        inward = np.minimum(np.arange(size), np.arange(size)[::-1])  # pixels to the frame
        fade = np.clip(inward / border, 0, 1) if border else np.ones(size)
        edge = edge * np.expand_dims(fade, 1 - axis)
    return edge * keep


def _thinning_tables():
    """(2, 256) bool: which neighbourhoods of a pixel let it go, in each half step.

    Guo & Hall's conditions as MATLAB's bwmorph states them. Bit k of the index is neighbour
    x_(k+1): east, north-east, ... counter-clockwise.
    """
    x = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)  # (256, 8): x[:, 0] is x_1
    ring = lambda k: x[:, (k - 1) % 8]
    crossings = sum(~ring(2 * i - 1) & (ring(2 * i) | ring(2 * i + 1)) for i in range(1, 5))
    n1 = sum((ring(2 * k - 1) | ring(2 * k)).astype(int) for k in range(1, 5))
    n2 = sum((ring(2 * k) | ring(2 * k + 1)).astype(int) for k in range(1, 5))
    few = np.minimum(n1, n2)
    simple = (crossings == 1) & (few >= 2) & (few <= 3)
    first = simple & ~((ring(2) | ring(3) | ~ring(8)) & ring(1))
    second = simple & ~((ring(6) | ring(7) | ~ring(4)) & ring(5))
    return np.stack([first, second])


THINNING = _thinning_tables()


def thin(mask):
    """(H, W) bool -> (H, W) bool: lines one pixel wide, connected as before.

    The benchmark thins every thresholded map so: non-maximum suppression keeps all pixels within
    about half a pixel of a crest, two side by side on a diagonal, where the second would count as a
    false positive.
    """
    height, width = mask.shape
    padded = np.pad(mask, 1).ravel()
    around = np.array([1, -width - 1, -width - 2, -width - 3, -1, width + 1, width + 2, width + 3])
    pixels, before = np.flatnonzero(padded), None
    while len(pixels) != before:
        before = len(pixels)
        for table in THINNING:
            code = (padded[pixels[:, None] + around] << np.arange(8)).sum(1)
            gone = table[code]
            padded[pixels[gone]] = False
            pixels = pixels[~gone]
    return padded.reshape(height + 2, width + 2)[1:-1, 1:-1]


def _offsets(radius):
    """All (dy, dx) no longer than radius, shortest first."""
    reach = int(radius)
    offsets = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)
               if dy * dy + dx * dx <= radius * radius]
    return sorted(offsets, key=lambda o: (o[0] * o[0] + o[1] * o[1], o))


def match_edges(prediction, truth, radius):
    """Largest one-to-one matching of edge pixels at most `radius` pixels apart.

    prediction (H, W) bool, truth (..., H, W) bool: each of the maps is matched by itself
    -> matched prediction, matched truth, both bool of truth's shape, with equally many pixels.

    First greedily, offsets (dy, dx) from short to long: at one offset a pixel has exactly one
    partner, so all pairs still free are matched at once. That alone finds 85 to 98% of the pairs
    possible on random maps (the test prints it), 94 to 99% on BSDS's. Then chains of matched pairs
    move over by one wherever that makes room for one pair more, until there is no such chain: the
    number of pairs is the largest possible. The benchmark instead solves the assignment of least
    total distance, with a price of 100 radii for a pixel left alone. That has as many pairs, up to
    the approximations of its solver; which pixels are paired may differ, and so may, slightly, how
    many predicted pixels have a partner in any annotation.
    """
    reach = int(radius)
    pad = [(0, 0)] * (truth.ndim - 2) + [(reach, reach)] * 2
    free_truth = np.pad(truth, pad)
    free = np.pad(np.broadcast_to(prediction, truth.shape), pad)
    shape, inner = free.shape, (..., slice(reach, reach + truth.shape[-2]),
                                slice(reach, reach + truth.shape[-1]))
    steps = np.array([dy * shape[-1] + dx for dy, dx in _offsets(radius)])
    free, free_truth = free.ravel(), free_truth.ravel()
    is_prediction = free.copy()
    mate = np.full(free.size, -1, np.int32)  # truth pixel -> its prediction
    pixels = np.flatnonzero(free)
    for step in steps:
        hit = free_truth[pixels + step]
        matched = pixels[hit]
        mate[matched + step] = matched
        free[matched] = free_truth[matched + step] = False
        pixels = pixels[~hit]
    left = np.flatnonzero(free_truth)
    left = left[is_prediction[left[:, None] - steps].any(1)]  # the others never get a partner
    while len(left) and _augment(is_prediction, free, left, mate, steps):
        left = left[mate[left] < 0]
    # A truth pixel is matched when it has a mate, a prediction when it is one.
    taken = np.zeros(free.size, bool)
    taken[mate[mate >= 0]] = True
    return taken.reshape(shape)[inner], (mate >= 0).reshape(shape)[inner]


def _augment(is_prediction, free, front, mate, steps):
    """One phase of augmenting paths, in place -> whether there were any. All arrays are flat.

    Breadth first from `front`, the free truth pixels: `move[p]` is the truth pixel that prediction
    p could turn to, because it is free or its mate can move on itself. A free prediction with a
    move starts a path. Paths are followed in step; one that meets a pixel of another is dropped
    until the next phase.
    """
    move = np.full(free.size, -1, np.int32)
    back, pairs = np.empty_like(move), np.flatnonzero(mate >= 0)
    back[mate[pairs]] = pairs  # prediction -> its truth pixel
    starts = []
    while len(front):
        truth = np.repeat(front, len(steps))
        pixel = (front[:, None] - steps).ravel()
        new = is_prediction[pixel] & (move[pixel] < 0)
        truth, pixel = truth[new], pixel[new]
        move[pixel] = truth
        pixel = pixel[move[pixel] == truth]  # of several truths the last one written
        starts.append(pixel[free[pixel]])
        front = back[pixel[~free[pixel]]]
    pixel = np.concatenate(starts)
    if not len(pixel):
        return False
    owner, path, trail = np.full_like(move, -1), np.arange(len(pixel)), []
    alive = np.ones(len(pixel), bool)
    while len(pixel):
        truth = move[pixel]
        fresh = owner[truth] < 0
        owner[truth[fresh]] = path[fresh]
        won = owner[truth] == path
        alive[path[~won]] = False
        pixel, truth, path = pixel[won], truth[won], path[won]
        trail.append((pixel, truth, path))
        on = mate[truth] >= 0
        pixel, path = mate[truth[on]], path[on]
    for pixel, truth, path in trail:
        pixel, truth = pixel[alive[path]], truth[alive[path]]
        mate[truth], free[pixel] = pixel, False
    return True


class EdgeScores(_Counts):
    """ODS, OIS, AP and R50 with BSDS's conventions, the measures of Table 6.

    update(probability, annotations) one picture at a time: probability (H, W) in [0, 1], after
    edge_nms; annotations: one (H, W) bool array an annotator. tolerance: largest distance of a
    match, as a share of the picture's diagonal. At each of the thresholds k / (n + 1), k = 1 ... n,
    the map is cut, thinned and matched with every annotation by itself. A predicted pixel is right
    when any annotation has a partner for it; recall counts over all annotations.
    ODS: best F of the counts summed over pictures, at one threshold for all. OIS: F of the counts
    summed at the threshold best for each picture. AP: area under precision over recall. R50: recall
    at precision 0.5.
    """

    summed = ("counts", "best", "pictures")

    def __init__(self, thresholds=99, tolerance=0.0075):
        self.thresholds = np.arange(1, thresholds + 1) / (thresholds + 1)
        self.tolerance = tolerance
        # Rows: annotated pixels matched, annotated; predicted pixels matched, predicted.
        self.counts, self.best, self.pictures = np.zeros((4, thresholds)), np.zeros(4), 0

    def update(self, probability, annotations):
        probability, truth = np.asarray(probability), np.asarray(annotations, bool)
        if truth.ndim != 3 or truth.shape[1:] != probability.shape:
            raise ValueError(f"edge map {probability.shape} and annotations {truth.shape} must be "
                             "(H, W) and (A, H, W) with A of at least 1")
        if not np.isfinite(probability).all():
            raise ValueError("the edge map holds a NaN or an infinite value")
        radius = self.tolerance * np.hypot(*probability.shape)
        counts = np.zeros_like(self.counts)
        for k, threshold in enumerate(self.thresholds):
            edge = probability >= threshold
            size = edge.sum()
            if k and size == last:  # nothing lies between two thresholds: the same map again
                counts[:, k] = counts[:, k - 1]
                continue
            last, edge = size, thin(edge)
            found, hit = match_edges(edge, truth, radius)
            counts[:, k] = hit.sum(), truth.sum(), found.any(0).sum(), edge.sum()
        self.counts += counts
        self.best += counts[:, _f_measure(counts)[2].argmax()]
        self.pictures += 1

    def result(self):
        """-> {"ODS", "OIS", "AP", "R50", "threshold"}, floats; threshold is that of ODS.

        OFFICIAL-CODE (Dollar's edgesEvalDir): between two thresholds precision and recall are
        linear, also for ODS; a threshold with nothing predicted has precision 0; AP samples the
        recalls 0, 0.01 ... 1, and those outside the range measured count 0.
        OURS: the release divides 101 samples by 100, here the two end samples weigh one half, so
        that AP never exceeds 1; it differs only where recall 0 or 1 is reached with some precision.
        A curve of one point (a binary map) is extended to recall 0; the release gives AP 0. R50 is
        0 where precision stays below 0.5; the release gives NaN.
        """
        recall, precision, _ = _f_measure(self.counts)
        n = len(self.thresholds)
        fine = np.linspace(0, n - 1, 99 * (n - 1) + 1)
        r, p = (np.interp(fine, np.arange(n), curve) for curve in (recall, precision))
        f = 2 * p * r / np.maximum(p + r, 1e-12)
        # Of thresholds with equal recall (for R50: precision) the lowest stands for all.
        r, first = np.unique(recall, return_index=True)
        samples = np.interp(np.linspace(0, 1, 101), r, precision[first], left=0, right=0)
        area = (samples[1:] + samples[:-1]).mean() / 2 if len(r) > 1 else r[0] * precision[0]
        p, first = np.unique(precision, return_index=True)
        return {"ODS": float(f.max()), "OIS": float(_f_measure(self.best)[2]), "AP": float(area),
                "R50": float(np.interp(max(p[0], 0.5), p, recall[first], right=0)),
                "threshold": float(np.interp(fine[f.argmax()], np.arange(n), self.thresholds))}


def _f_measure(counts):
    """counts (4, ...) as in EdgeScores -> recall, precision, F, each (...); 0 / 0 is 0."""
    recall, precision = (hit / np.maximum(total, 1e-12)
                         for hit, total in (counts[:2], counts[2:]))
    f = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return recall, precision, f
