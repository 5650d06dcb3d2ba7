"""All tests: `python test_all.py`, or `python test_all.py WORD` for those with WORD in the name.

No network, no data set, no GPU; one to three minutes on two CPU cores. Each test compares
with something that does not share code with what it tests: loops, brute force, torchvision, an
identity, counts from the papers.

A GPU is left alone: its sums have no fixed order, and many tests compare two runs bit for bit. On
one, `CUDA_VISIBLE_DEVICES=0 python test_all.py cuda` runs what is for it.
"""
import collections
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

# The networks here are too small to gain from threads, and runs with equal threads are comparable.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch.utils.flop_counter import FlopCounterMode

import bilevel_prune
import common
import data
import fastersg
import latency
import mtp
import sparsemask
from data import torchvision

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------


def _refused(call, *words):
    """The call raises InputError, one line that holds all words; returns that line."""
    try:
        call()
    except data.InputError as error:
        text = str(error)
        assert "\n" not in text, text
        for word in words:
            assert str(word) in text, f"'{word}' is missing in: {text}"
        # Its frames hold the loader in a cycle; collected that way, workers take 5 s to end.
        error.__traceback__ = None
        return text
    raise AssertionError(f"not refused; expected a message with {words}")


def heard(call, *args, **options):
    """What the call returns, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        returned = call(*args, **options)
    return returned, out.getvalue()


def quiet(call, *args, **options):
    return heard(call, *args, **options)[0]


def call_main(module, *flags):
    """module.main in this process, which saves the imports; returns what it prints."""
    return heard(module.main, [*map(str, flags)])[1]


def on_two_ranks(job):
    """job(rank) in two processes, this one and a fork of it, joined by gloo."""
    with tempfile.TemporaryDirectory() as tmp:
        child, failed = os.fork(), True
        try:
            dist.init_process_group("gloo", init_method=f"file://{tmp}/meet", world_size=2,
                                    rank=int(child == 0), timeout=timedelta(seconds=60))
            job(dist.get_rank())
            dist.barrier()
            failed = False
        finally:
            if child == 0:
                if failed:
                    traceback.print_exc()
                os._exit(failed)
            dist.destroy_process_group()
            assert os.waitpid(child, 0)[1] == 0, "rank 1 failed"


def shake_norms(net, seed=0):
    """Random BN statistics, scales and shifts, as after training; returns the network."""
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.running_mean, -1), (m.running_var, 0.5), (m.weight, 0.5),
                           (m.bias, -1)):
                t.data.copy_(low + 1.5 * torch.rand(t.shape, generator=generator))
    return net


def tensors_of(path):
    """All tensors of a checkpoint, flat."""
    flat = {}

    def visit(value, name):
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, (dict, list, tuple)):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                visit(v, f"{name}.{k}")
    visit(torch.load(path, weights_only=True), "")
    return flat


@contextlib.contextmanager
def scratch():
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def put(path, content):
    """Write a text, or an array as a picture, grey or RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        Image.fromarray(np.array(content).astype(np.uint8)).save(path)


def three_classes(root, train=12, val=4, height=33, width=65):
    """Pictures of three classes: a bright disc and a dark bar on grey ground; returns the root."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            cy, cx, bar = rng.integers(8, 24), rng.integers(8, 56), rng.integers(0, 56)
            bars = np.where(abs(x - bar) < 3, 2, 0)
            label = np.where((y - cy) ** 2 + (x - cx) ** 2 < 50, 1, bars)
            grey = np.array([120, 220, 30])[label] + rng.integers(-20, 20, (height, width))
            put(Path(root, split, "images", f"{i}.png"), grey)
            put(Path(root, split, "labels", f"{i}.png"), label)
    return str(root)


# ---------------------------------------------------------------------------------------------
# data.py
# ---------------------------------------------------------------------------------------------


def label_of(dataset, i=0):
    return np.asarray(dataset[i][1]).tolist()


def open_files(name, root=None, split="train", classes=None):
    tasks = {"msra_b": "saliency", "bsds500": "edges", "imagefolder": "classification"}
    return data.open_set(tasks.get(name, "segmentation"), name, root, split, classes)


def own_folder(root):
    """One pair of the user's own, three pixels -> paths of its image and its label."""
    image, label = root / "train/images/a.png", root / "train/labels/a.png"
    put(image, [[10, 20, 30]])
    put(label, [[0, 2, 255]])
    return image, label


VOC, ADE = "VOCdevkit/VOC2012", "ADEChallengeData2016"
# From the tables in the sets' papers and the notes they come with: set, split, image, label,
# {value in the label file: class, or None where it means nothing}, classes, name of the last.
TREES = (
    ("camvid", "val", "val/a.png", "valannot/a.png",
     {0: 0, 10: 10, 11: 255, 255: 255, 12: None}, 11, "bicyclist"),
    ("cityscapes", "train", "leftImg8bit/train/ulm/a_leftImg8bit.png",
     "gtFine/train/ulm/a_gtFine_labelIds.png",
     {0: 255, 7: 0, 8: 1, 9: 255, 11: 2, 17: 5, 18: 255, 23: 10, 33: 18, 34: None},
     19, "bicycle"),
    ("voc", "val", f"{VOC}/JPEGImages/a.jpg", f"{VOC}/SegmentationClass/a.png",
     {0: 0, 20: 20, 255: 255, 21: None}, 21, "tvmonitor"),
    ("ade20k", "train", "images/training/a.jpg", "annotations/training/a.png",
     {0: 255, 2: 1, 151: None}, 150, "class 149"),
    ("ade20k", "val", f"{ADE}/images/validation/a.jpg", f"{ADE}/annotations/validation/a.png",
     {0: 255, 1: 0, 150: 149}, 150, "thing 150"),
    ("bdd100k", "train", "images/10k/train/a.jpg", "labels/sem_seg/masks/train/a.png",
     {0: 0, 255: 255, 19: None}, 19, "bicycle"),
    ("bdd100k", "val", "seg/images/val/a.jpg", "seg/labels/val/a_train_id.png",
     {18: 18}, 19, "bicycle"),
    ("folder", "test", "test/images/a.png", "test/labels/a.png",
     {0: 0, 2: 2, 255: 255, 3: None}, 3, "class 2"),
    ("msra_b", "val", "val/images/a.jpg", "val/masks/a.png",
     {0: 0, 127: 0, 128: 1, 255: 1}, 2, "salient"),
    ("bsds500", "val", "val/a.jpg", "val_edges/a_0.png", {0: 0, 1: 1, 255: 1}, 2, "edge"),
)


def test_data_every_set_is_read_from_its_tree():
    things = "".join(f"{k}\t.1\tthing {k} , other\n" for k in range(1, 151))
    for name, split, image, label, values, classes, last in TREES:
        with scratch() as root:
            _refused(lambda: open_files(name, root, split, classes), root)  # the missing folder
            put(root / VOC / "ImageSets/Segmentation/val.txt", "a\n")
            if ADE in image:
                put(root / ADE / "objectInfo150.txt", "Idx\tRatio\tName\n" + things)
            put(root / image, [[200]])
            put((root / image).with_name("._b.png"), [[1]])  # left behind by another system
            put(root / label, [[0]])
            pairs = open_files(name, root, split, classes)
            assert len(pairs) == 1 and pairs[0][0].getpixel((0, 0)) == (200, 200, 200)
            assert pairs.num_classes == len(set(pairs.palette)) == classes
            assert len(pairs.class_names) == classes and pairs.class_names[-1] == last
            for value, expected in values.items():
                put(root / label, [[value]])
                if expected is None:
                    _refused(lambda: pairs[0], label, value)
                else:
                    assert label_of(pairs) == [[expected]], (name, value)


def test_data_voc_takes_the_labels_of_sbd_where_they_are():
    with scratch() as root:
        base, lists = root / VOC, root / VOC / "ImageSets/Segmentation"
        for stem in ("2007_01", "2008_03"):
            put(base / f"JPEGImages/{stem}.jpg", [[0]])
            put(base / f"SegmentationClass/{stem}.png", [[15]])
            put(base / f"SegmentationClassAug/{stem}.png", [[20]])
        put(lists / "train.txt", "2007_01\n")
        assert label_of(open_files("voc", root)) == [[15]]
        put(lists / "trainaug.txt", "2008_03\n\n/JPEGImages/2007_01.jpg /x/2007_01.png\n")
        for split, count, value in (("train", 2, 20), ("trainvoc", 1, 15)):
            pairs = open_files("voc", root, split)
            assert len(pairs) == count and label_of(pairs) == [[value]]
        assert pairs.palette[20] == (0, 64, 128)  # as its development kit prints it
        _refused(lambda: open_files("voc", root, "val"), "val.txt")


def test_data_labels_are_indices_and_masks_are_brightness():
    indexed = Image.fromarray(np.array([[0, 2, 255]], np.uint8))
    indexed.putpalette([(7 * k + 3) % 256 for k in range(768)])
    with scratch() as root:
        _, label = own_folder(root)
        indexed.save(label)
        assert label_of(open_files("folder", root, classes=3)) == [[0, 2, 255]]
        put(root / "train/masks/a.png", [[0]])
        Image.fromarray(np.array([[False, True, True]])).save(root / "train/masks/a.png")
        assert label_of(open_files("msra_b", root)) == [[0, 1, 1]]
        put(root / "bsds/train/a.jpg", [[0, 0, 0]])
        (root / "bsds/train_edges").mkdir()
        indexed.save(root / "bsds/train_edges/a_0.png")     # index 0 is a dark grey, not black
        assert label_of(open_files("bsds500", root / "bsds")) == [[1, 1, 1]]


def test_data_wrong_names_and_folders_are_refused():
    with scratch() as root:
        (root / "val").mkdir()
        (root / "valannot").mkdir()
        for name, split, folder, classes, word in (
                ("camvid", "val", None, None, "--data-root"),
                ("camvid", "val", root, None, "no image"),
                ("cityscapes", "test", root, None, "train val"),
                ("folder", "val", root, 255, "--num-classes"),
                ("imagefolder", "val", None, None, "--cls-root"),
                ("synthetic", "train", None, 12, "11 classes")):
            _refused(lambda: open_files(name, folder, split, classes), word)
    _refused(lambda: data.open_set("edges", "camvid", "."), "bsds500")
    _refused(lambda: synthetic("edges", (31, 256)), "31")


def test_data_damaged_pairs_are_refused_by_name():
    damages = {"77": [[0, 1, 77]], "size": [[0, 1]], "mode RGB": np.zeros((1, 3, 3)),
               "cannot read": "no picture"}
    with scratch() as root:
        image, label = own_folder(root)
        pairs = [(image, image)] * 7 + [(image, label)] + [(image, image)] * 2
        own = data.FilePairs(pairs, range(31), [])
        assert data.check_pairs(own, 3) == 3  # 0, 3, 6
        for word, content in damages.items():
            put(label, content)
            _refused(lambda: data.check_pairs(own, 4), label, word)  # 0, 2, 5, 7
        put(label, [[0, 255, 0]])                               # a mask of black and white
        _refused(lambda: data.check_pairs(data.FilePairs([(image, label)], "ab", [])), "one class")
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6                     # a phone's photo, lying
        Image.fromarray(np.zeros((3, 1, 3), np.uint8)).save(root / "photo.jpg", exif=exif)
        upright, _ = data.FilePairs([(root / "photo.jpg", label)], "ab", [])[0]
        assert upright.size == (3, 1)
        put(image, np.random.default_rng(0).integers(0, 256, (99, 99)))
        image.write_bytes(image.read_bytes()[:5000])  # cut short
        loader = data.make_loader(own, [0], data.eval_transform(), 1, True, workers=1)
        said = _refused(lambda: next(iter(loader)), image)
        assert said.startswith("cannot read")  # no worker's traceback before the sentence
        label.unlink()
        _refused(lambda: open_files("folder", root, classes=3), image, label)


def test_data_imagefolder_tree():
    with scratch() as root:
        put(root / "train/cat/1.png", "broken")
        put(root / "train/dog/1.png", [[200]])
        put(root / "val/cat/1.png", [[0]])
        pictures = open_files("imagefolder", root)
        assert list(pictures.class_names) == ["cat", "dog"] and len(pictures) == 2
        assert pictures[1][1] == 1 and pictures[1][0].getpixel((0, 0)) == (200, 200, 200)
        _refused(lambda: pictures[0], root / "train/cat/1.png")
        _refused(lambda: open_files("imagefolder", root, "val"), "dog")


def test_data_consensus_of_annotators():
    # Annotators, and the label where 0, 1, 2 ... of them marked the pixel.
    labels = {1: [0, 1], 2: [0, 1, 1], 3: [0, 255, 1, 1], 5: [0, 255, 255, 1, 1, 1],
              9: [0, 255, 255, 1, 1, 1, 1, 1, 1, 1]}
    for count, label in labels.items():
        marks = [np.arange(count + 1)[None] > k for k in range(count)]
        assert data.consensus(marks).tolist() == [label]


def test_data_edges_of_several_annotators():
    with scratch() as root:
        for name in ("train/p1", "train/p1_7", "val/q"):  # p1_7_0 is no second annotator of p1
            put(root / f"{name}.jpg", [[0, 0, 0]])
            put(root / f"{name.replace('/', '_edges/')}_0.png", [[0, 0, 255]])
        put(root / "val_edges/q_note.png", "no annotation")
        put(root / "val_edges/q_10.png", [[0, 9, 255]])
        put(root / "val_edges/q_2.png", [[0, 0, 255]])
        pairs = open_files("bsds500", root, "trainval")
        assert [len(pairs.annotations(i)) for i in range(3)] == [1, 1, 3]
        assert label_of(pairs, 0) == [[0, 0, 1]] and label_of(pairs, 2) == [[0, 255, 1]]


def synthetic(task, size=(64, 96), split="train", seed=0):
    return data.open_set(task, "synthetic", None, split, None, size, seed)


def test_data_synthetic_sets_depend_on_seed_split_and_index_only():
    for task, classes in (("segmentation", range(11)), ("edges", [0, 1]), ("saliency", [0, 1]),
                          ("classification", [3])):
        pictures = synthetic(task, split="val", seed=5)
        image, label = pictures[3]
        found = set(np.unique(label))
        assert image.size == (96, 64) and classes[-1] in found and found <= {*classes, 255}
        again, same_label = synthetic(task, split="val", seed=5)[3]  # whatever came before
        assert image.tobytes() == again.tobytes() and np.array_equal(label, same_label)
        for other in (pictures[4], synthetic(task, seed=5)[3], synthetic(task, split="val")[3]):
            assert image.tobytes() != other[0].tobytes()
    assert len(list(itertools.islice(pictures, 201))) == 200  # a plain `for` ends
    salient = synthetic("saliency", split="val", seed=5)
    shown = [{6}, {1}, {7}, {7, 8}, {7, 8}, {9}, {9}, {10}]     # tree, house, lamp, 2 signs ...
    for i, classes in enumerate(shown):
        image, label = pictures.draw(i)
        assert image.tobytes() == pictures[i][0].tobytes() == salient[i][0].tobytes()
        assert set(np.unique(label)) == {0, *classes} and pictures[i][1] == i
        thing = np.asarray(label) > 0
        assert np.array_equal(label_of(salient, i), thing)
        assert 0.4 < thing.any(1).mean() < 0.96         # it is the picture's one large thing


def test_data_scenes_are_those_of_earlier_searches():
    """Else searches are not comparable with earlier ones. Of each class, void last: its share in %,
    its mean brightness, the mean step between neighbours of that class."""
    shares = [17.86, 24.57, 27.07, 9.58, 2.69, 4.80, 7.27, 1.00, 0.87, 3.46, 0.52, 0.31]
    levels = [152, 98, 112, 103, 110, 66, 75, 91, 101, 59, 101, 109]
    grains = [3.1, 11.5, 9.8, 9.2, 5.4, 16.8, 18.2, 9.1, 9.2, 11.3, 12.0, 9.9]
    scenes = data.open_set("segmentation", "synthetic", split="val")
    pairs = [scenes[i] for i in range(30)]
    grey = np.stack([np.asarray(image).mean(2) for image, _ in pairs])
    labels = np.stack([np.asarray(label) for _, label in pairs])
    steps = np.abs(np.diff(grey))
    for k, *expected in zip((*range(11), 255), shares, levels, grains):
        inside = (labels[..., 1:] == k) & (labels[..., :-1] == k)
        found = 100 * (labels == k).mean(), grey[labels == k].mean(), steps[inside].mean()
        assert np.allclose(found, expected, rtol=0.06), (k, found)


def test_data_synthetic_edges_are_the_borders_of_the_scenes():
    edges, shares = synthetic("edges"), []
    for i in range(6):
        label = np.pad(label_of(synthetic("segmentation"), i), (0, 1), mode="edge")
        here, right, below = label[:-1, :-1], label[:-1, 1:], label[1:, :-1]
        border, marks = (here != right) | (here != below), np.array(edges.annotations(i))
        assert len(marks) == 5 and not (marks & ~border).any()
        one_side = (here != right) & (here == below)
        for (a, b), mark in itertools.product(itertools.combinations(np.unique(label), 2), marks):
            between = one_side & ((here == a) & (right == b) | (here == b) & (right == a))
            assert len(set(mark[between])) < 2          # all, or one of both is overlooked
        assert np.array_equal(edges[i][1], data.consensus(marks))
        shares.extend(marks.sum((1, 2)) / border.sum())
    assert len(set(shares)) > 15 and 0.6 < np.mean(shares) < 0.85  # each overlooks a few classes


# The colour of class k, at random: no blend of two looks like a third. Of 255: the mean colour.
COLOURS = np.random.default_rng(1).integers(0, 256, (256, 3))
COLOURS[255] = 124, 116, 104
BLOCKS = np.kron(np.random.default_rng(0).integers(0, 12, (4, 6)), np.ones((10, 10), int))


def coded(classes=BLOCKS):
    """Nine times a picture whose colour tells the label."""
    picture, label = (Image.fromarray(v.astype(np.uint8)) for v in (COLOURS[classes], classes))
    return 9 * [(picture, label)]


def pixels_of(image):
    """(3, H, W) normalised by ImageNet's numbers -> grey levels."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (image * std + mean) * 255


def drawn(transform, epochs=1, pictures=coded()):
    """The transform's picture and label of these many epochs, all different draws."""
    samples = data.Samples(pictures, transform)
    return [samples[epoch, 0] for epoch in range(epochs)]


def assert_aligned(image, label):
    """Two pixels away from the next class, the picture has the colour of the label."""
    around = label.unfold(0, 5, 1).unfold(1, 5, 1).flatten(2)           # (H - 4, W - 4, 25)
    expected = torch.from_numpy(COLOURS)[label].permute(2, 0, 1)
    wrong = (pixels_of(image) - expected).abs().amax(0)[2:-2, 2:-2] > 1.5
    inside = around.amax(2) == around.amin(2)
    assert inside.any() and not wrong[inside].any()


def test_data_train_transform_moves_image_and_label_alike():
    found = {}
    for size, scales in (((32, 32), (0.8, 2.0)), ((64, 96), (1, 1)), ((40, 60), (1, 1))):
        found[size] = set()
        for image, label in drawn(data.train_transform(size, scales), 20):
            assert image.shape == (3, *size) and label.shape == size
            assert_aligned(image, label)
            found[size].add(label.numpy().tobytes())
    assert len(found[32, 32]) == 20 and len(found[64, 96]) > 6  # crops; places in a larger crop
    assert found[40, 60] == {BLOCKS.tobytes(), BLOCKS[:, ::-1].tobytes()}  # the flip is left
    (image, half), = drawn(data.train_transform((64, 96), (1, 1), 0.5))
    assert (half != 255).sum() == 20 * 30
    (distorted, same), = drawn(data.train_transform((64, 96), (1, 1), 0.5, distortion=True))
    assert torch.equal(half, same) and not torch.equal(image, distorted)
    assert pixels_of(distorted).amin() < 60     # of the colours, not of what is normalised
    factors = np.sqrt([float((label != 255).sum()) / BLOCKS.size
                       for _, label in drawn(data.train_transform((80, 120), (0.5, 2)), 60)])
    assert 0.45 < factors.min() < 0.6 < 1.1 < factors.mean() < 1.4 < 1.9 < factors.max() < 2.01


def test_data_label_is_not_shifted_against_the_image():
    """What is symmetric stays so at a third of the size. v2's default for masks takes the left."""
    symmetric = np.concatenate([BLOCKS, BLOCKS[:, ::-1]], 1)
    transform = data.train_transform((10, 40), (1 / 3, 1 / 3))
    (_, label), = drawn(transform, pictures=coded(symmetric))
    assert torch.equal(label, label.flip(-1)) and len(label.unique()) > 4


def test_data_eval_transform_leaves_the_label():
    for sizes, shape in (((0.5,), (20, 30)), ((1.0, (25, 35)), (25, 35)), ((1.0,), (40, 60))):
        (image, label), = drawn(data.eval_transform(*sizes))
        assert image.shape == (3, *shape) and np.array_equal(label, BLOCKS)
    assert_aligned(image, label)


def test_data_classification_transform():
    # A ramp of 0 ... 255 along x shows which part of the picture is left.
    ramp = data.tv_tensors.Image(torch.arange(256, dtype=torch.uint8).expand(3, 256, 256))

    def part(size, train):
        image, _ = data.classification_transform((size, size), train)(ramp, 3)
        return pixels_of(image)[0, 0].aminmax()

    assert np.allclose(part(224, False), (16, 239), atol=1)  # 256 -> 224: 16 on each side
    assert np.allclose(part(128, False), (16, 239), atol=2)
    assert np.allclose(part(64, False), (1.5, 253.5), atol=2)  # small ones have no margin
    assert np.allclose(part(127, False), (1, 254), atol=2)
    torch.manual_seed(0)
    for size, smallest in ((64, 0.4), (160, 0.08)):  # share of the area, 3 : 4 at the narrowest
        transform = data.classification_transform((size, size), True)
        rows = [pixels_of(transform(ramp, 3)[0])[0, 0] for _ in range(60)]
        widths = [float(row.amax() - row.amin()) / 256 for row in rows]
        assert 1 < min(widths) / (smallest * 3 / 4) ** 0.5 < 1.3 and max(widths) > 0.9
        assert 20 < sum(bool(row[0] > row[-1]) for row in rows) < 40    # flipped


def test_data_samples_do_not_depend_on_workers_or_history():
    def labels(workers, *epochs):
        loader = data.make_loader(coded(), None, data.train_transform((32, 32)), 4, True, workers)
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            batches = [label for _, label in loader]
        return torch.cat(batches)

    torch.manual_seed(11)
    first = labels(0, 2)
    assert torch.equal(first, labels(0, 0, 1, 2)) and torch.equal(first, labels(2, 0, 1, 2))
    after = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), after)  # the global generator was left alone
    crops = set()                             # of one picture by seed, epoch and index
    for seed, epoch, i in itertools.product((0, 1), (0, 1), (0, 1)):
        loader = data.make_loader(coded(), [i], data.train_transform((32, 32)), 1, True, seed=seed)
        loader.sampler.set_epoch(epoch)
        (_, label), = loader
        crops.add(label.numpy().tobytes())
    assert len(crops) == 8                    # each counts, and not their sum alone


def order_of(shuffle, seed=7, epoch=5, rank=0, world=1):
    sampler = data.make_loader("", range(100, 123), None, 1, shuffle, 0, seed, rank, world).sampler
    sampler.set_epoch(epoch)
    order = [i for _, i in sampler]
    assert len(order) == len(sampler)
    return order


def test_data_every_rank_draws_its_share():
    indices = list(range(100, 123))
    for world in (1, 2, 4, 30):
        shares = [order_of(True, rank=rank, world=world) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-23 // world)}  # equally many, none left out
        assert set(sum(shares, [])) == set(indices)
        shares = [order_of(False, rank=rank, world=world) for rank in range(world)]
        assert sorted(sum(shares, [])) == indices  # each exactly once
    orders = {tuple(order_of(True, *at)) for at in ((7, 0), (7, 0), (7, 1), (8, 0))}
    assert len(orders) == 3


def test_data_loader_keeps_a_lone_small_batch():
    for shuffle, batch_size, world, expected in (
            (True, 4, 1, [4, 4]), (False, 4, 1, [4, 4, 1]), (True, 20, 1, [9]), (True, 4, 3, [3])):
        loader = data.make_loader(coded(), None, data.eval_transform(), batch_size, shuffle,
                                  world_size=world)
        assert [len(images) for images, _ in loader] == expected


def test_data_split_indices():
    parts = data.split_indices(37, (0.4, 0.4, 0.2), seed=3)
    assert sorted(sum(parts, [])) == list(range(37))  # disjoint and complete
    assert [len(part) for part in parts] == [15, 15, 7] and parts == [sorted(p) for p in parts]
    assert parts != data.split_indices(37, (0.4, 0.4, 0.2), seed=4)
    _refused(lambda: data.split_indices(2, (0.4, 0.4, 0.2)), "2 images")


def connected(mask):
    """Whether 8-neighbours lead from one pixel of the mask to all others."""
    mask = torch.as_tensor(mask).float()[None]
    reached = torch.zeros_like(mask)
    reached[tuple(mask.nonzero()[0])] = 1
    for _ in range(int(mask.sum())):
        reached = F.max_pool2d(reached, 3, 1, 1) * mask
    return torch.equal(reached, mask)


def turned(label, factor, degrees):
    """scale_and_turn of a label and of a picture that is white where the label is not 0."""
    picture = data.tv_tensors.Image((label[None] > 0).repeat(3, 1, 1).to(torch.uint8) * 255)
    image, label = data.scale_and_turn(picture, data.tv_tensors.Mask(label), factor, degrees)
    return image[0].as_subclass(torch.Tensor).float(), label.as_subclass(torch.Tensor)


def test_data_edge_augmentation_keeps_thin_lines():
    line, t = torch.zeros(61, 75, dtype=torch.uint8), torch.arange(36)
    line[12 + t, 20 + t // 2] = 1
    for factor, step in itertools.product((0.5, 1, 1.5), range(0, 16, 3)):
        bright, label = turned(line, factor, 22.5 * step)
        edge, inside = label == 1, label != 255
        length = factor * np.hypot(35, 17)
        assert connected(edge) and 0.65 < edge.sum() / length < 2.6
        # All of the picture is there, an odd row and column apart; what the turn adds is ignored.
        area = int(60 * factor) * int(74 * factor)
        assert abs(inside.sum() / area - 1) < 0.03
        shifts = (0, 0), (-4, 0), (4, 0), (0, -4), (0, 4)
        light = [(bright * inside * edge.roll(shift, (0, 1))).sum() for shift in shifts]
        assert light[0] > max(light[1:])  # the edge is where the picture has it
    label = torch.full((20, 30), 255, dtype=torch.uint8)
    label[10] = 1
    assert set(turned(label, 0.5, 22.5)[1].unique().tolist()) == {1, 255}  # the edge wins


def test_data_edge_transform_draws_scales_and_angles():
    sizes, everywhere = [], coded(np.ones((40, 60), int))  # a picture that is edge all over
    for image, label in drawn(data.edge_transform((120, 120)), 40, everywhere):
        assert label.shape == (120, 120) and set(label.unique().tolist()) == {1, 255}
        assert_aligned(image, label)
        sizes.append(int((label == 1).sum()))
    assert {20 * 30, 40 * 60, 60 * 90} <= set(sizes) and len(set(sizes)) >= 8
    turns = []
    still = lambda image, label, *turn: turns.append(turn) or (image, label)
    with mock.patch.object(data, "scale_and_turn", still):
        found = {label.numpy().tobytes() for _, label in drawn(data.edge_transform((40, 60)), 150)}
    factors, angles = map(set, zip(*turns))
    assert factors == {0.5, 1, 1.5} and angles == {22.5 * k for k in range(16)}
    assert found == {BLOCKS.tobytes(), BLOCKS[:, ::-1].tobytes()}       # the flip is left


def smoothed(picture, radius):
    """A triangle is two boxes, one after the other."""
    padded = torch.from_numpy(np.pad(picture, radius, mode="symmetric"))[None]
    once = F.avg_pool2d(padded, radius + 1, 1)
    return F.avg_pool2d(once, radius + 1, 1)[0].numpy()


def test_data_nms_against_a_loop():
    image, kept = np.random.default_rng(3).random((24, 31)), np.zeros((24, 31))
    edge = smoothed(image, 1)
    dy, dx = np.gradient(smoothed(edge, 4))
    dxx, dxy, dyy = np.gradient(dx)[1], np.gradient(dy)[1], np.gradient(dy)[0]
    angle = np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5))
    for y, x in np.ndindex(24, 31):
        beside = []
        for d in (-1, 1):
            b = min(max(y + d * np.sin(angle[y, x]), 0), 22.999)
            a = min(max(x + d * np.cos(angle[y, x]), 0), 29.999)
            i, j = int(b), int(a)
            row = (1 - b + i) * edge[i] + (b - i) * edge[i + 1]
            beside.append((1 - a + j) * row[j] + (a - j) * row[j + 1])
        frame = min(y, 23 - y, 5) / 5 * min(x, 30 - x, 5) / 5  # it fades over 5 pixels
        if edge[y, x] * 1.01 >= max(beside):
            kept[y, x] = edge[y, x] * frame
    assert 0.1 < (kept > 0).mean() < 0.6 and np.allclose(data.edge_nms(image), kept)


def test_data_nms_leaves_the_crest_of_a_ridge():
    """Exactly along x and y, where a second derivative is 0."""
    ridge = np.exp(-(np.arange(40) - 20.0) ** 2 / 6)[None].repeat(40, 0)
    for kept in (data.edge_nms(ridge), data.edge_nms(ridge.T).T):
        assert np.array_equal(np.flatnonzero(kept[20] > 0.3), [20]) and (kept[6:-6, 20] > 0.3).all()


def thinned(mask):
    """Guo & Hall by loops, from the eight neighbours by name."""
    mask, before = np.pad(mask, 1), -1
    while before != mask.sum():
        before = mask.sum()
        for second in (False, True):
            gone = []
            for y, x in np.argwhere(mask):
                (nw, n, ne), (w, _, e), (sw, s, se) = mask[y - 1:y + 2, x - 1:x + 2].tolist()
                corners = (e, ne, n), (n, nw, w), (w, sw, s), (s, se, e)
                crossings = sum(not a and (b or c) for a, b, c in corners)
                fewest = min(sum(a or b for a, b, _ in corners), sum(b or c for _, b, c in corners))
                kept = w and (sw or s or not nw) if second else e and (ne or n or not se)
                if crossings == 1 and 2 <= fewest <= 3 and not kept:
                    gone.append((y, x))
            for y, x in gone:
                mask[y, x] = False
    return mask[1:-1, 1:-1]


def test_data_thin_against_a_loop():
    rng = np.random.default_rng(1)
    blobs = np.kron(rng.random((8, 9)) < 0.5, np.ones((4, 4), bool))  # touches the frame
    for mask in (blobs, rng.random((30, 31)) < 0.4, np.ones((5, 20), bool)):
        assert np.array_equal(data.thin(mask), thinned(mask))


def greedy(prediction, truth, radius):
    """Pair by pair: shortest first, then by offset (dy, dx), then by pixel -> two masks."""
    offsets = [(int(a - y), int(b - x), y, x) for y, x in np.argwhere(prediction)
               for a, b in np.argwhere(truth) if np.hypot(a - y, b - x) <= radius]
    matched, matched_truth = np.zeros_like(prediction), np.zeros_like(truth)
    for dy, dx, y, x in sorted(offsets, key=lambda o: (o[0] ** 2 + o[1] ** 2, o)):
        if not matched[y, x] and not matched_truth[y + dy, x + dx]:
            matched[y, x] = matched_truth[y + dy, x + dx] = True
    return matched, matched_truth


def test_data_matching_is_one_to_one_and_nearest_first():
    rng = np.random.default_rng(0)
    for radius in (0.5, 1, 2.3, 3):
        prediction = rng.random((13, 12)) < 0.12
        truths = rng.random((4, 13, 12)) < 0.2
        matches = data.match_edges(prediction, truths, radius)
        for truth, *matched in zip(truths, *matches):
            assert np.array_equal(matched, greedy(prediction, truth, radius))


def f_of(row):
    """Counts of one threshold -> F, the harmonic mean of recall and precision."""
    matched_truth, truth, matched, predicted = row
    return 2 / (truth / matched_truth + predicted / matched) if matched else 0


def test_data_edge_scores_count_as_loops_do():
    rng, tables, scores = np.random.default_rng(7), [], data.EdgeScores(7, tolerance=0.1)
    for _ in range(3):
        probability, truth = rng.random((15, 20)) ** 3, rng.random((2, 15, 20)) < 0.08
        probability.flat[::37] = 0.5                        # a threshold itself
        scores.update(probability, truth)
        rows = []
        for k in range(1, 8):
            edge = thinned(probability >= k / 8)
            (first, first_truth), (other, other_truth) = (greedy(edge, t, 2.5) for t in truth)
            found = first_truth.sum() + other_truth.sum()
            right = (first | other).sum()  # in any annotation
            rows.append((found, truth.sum(), right, edge.sum()))
        tables.append(rows)
    assert np.array_equal(scores.counts, np.sum(tables, 0).T)
    best = np.sum([max(rows, key=f_of) for rows in tables], 0)
    assert abs(scores.result()["OIS"] - f_of(best)) < 1e-9
    assert scores.sums[0] is scores.counts and np.array_equal(scores.sums[1], best)
    for wrong in (probability[1:], probability + np.nan):
        with contextlib.suppress(ValueError):
            scores.update(wrong, truth)
            raise AssertionError("not refused")


def test_data_average_precision_and_r50_on_a_curve_by_hand():
    scores = data.EdgeScores(3)
    assert scores.result()["ODS"] == scores.result()["AP"] == 0  # nothing is found
    scores.counts[:] = [[80, 40, 20], [100] * 3, [40, 40, 20], [100, 50, 20]]
    # (R, P): (0.8, 0.4), (0.4, 0.8), (0.2, 1.0): one straight line from 0.2 to 0.4 to 0.8.
    expected = sum(1.2 - k / 100 for k in range(20, 81)) / 100
    result = scores.result()
    assert abs(result["AP"] - expected) < 1e-9 and abs(result["R50"] - 0.7) < 1e-9
    assert abs(result["ODS"] - 0.6) < 1e-3  # between the thresholds, at R = P = 0.6
    assert abs(result["threshold"] - 0.375) < 0.01
    scores.counts[:] = [[50] * 3, [100] * 3, [60] * 3, [80] * 3]  # a binary map: one point
    assert abs(scores.result()["AP"] - 0.5 * 0.75) < 1e-9
    scores.counts[2:] = [[40] * 3, [100] * 3]  # precision never reaches 0.5
    assert scores.result()["R50"] == 0


# ---------------------------------------------------------------------------------------------
# common.py
# ---------------------------------------------------------------------------------------------


@dataclass
class Settings(common.BaseConfig):
    """A paper's Config, made up."""
    device: str = common.opt("cpu", "device")
    size: tuple[int, int] = common.opt((32, 32), "crop", "dense", low=32)
    scales: tuple[float, float] = common.opt((0.5, 1.0), "scales", "dense", low=0.1, high=9)
    batch_size: int = common.opt(4, "batch", "dense", low=1)
    lam: float = common.opt(0.5, "lambda", "search", high=1)
    epochs: int = common.opt(3, "epochs", "train", low=1)
    shares: tuple[float, ...] = common.opt((1.0,), "shares", "search", high=9)


def parse(flags):
    """-> stages, settings"""
    stages = {"search": "", "train": "", "bench": ""}
    return common.parse_args(Settings, "demo", stages, {"lam": 0.25}, "", flags.split())


def test_command_line_from_the_dataclass():
    stages, cfg = parse("--search --train --size 40 50 --shares 1 2 0.5 --scales 2 0.5")
    assert stages == {"search", "train"} and cfg.out == "runs/demo"
    assert cfg.size == (40, 50) and cfg.shares == (1, 2, 0.5) and cfg.scales == (0.5, 2)
    # lam is 0.25 under the preset quick, and 0.5 under paper; a flag wins over both.
    for flags, lam in (("", 0.25), ("--preset paper", 0.5), ("--dataset camvid", 0.5),
                       ("--dataset camvid --preset quick", 0.25), ("--lam 1", 1)):
        assert parse(f"--search {flags}")[1].lam == lam
    for flags in ("--lam 1.01", "--lam nan", "--size 40 31", "--size 40", "--lamb 1", "--dataset c",
                  "--epochs 5", "--weights x.pt"):
        _refused(lambda: parse(f"--search {flags}"), flags.split()[0])
    assert parse("--train --epochs 5")[1].epochs == 5
    assert parse("--search --weights x.pt --export y.pt2")[1].weights == "x.pt"
    _refused(lambda: quiet(parse, "--lam 1"), "choose a stage")
    _, cfg = parse("--search --resume --lam 1")
    assert common.next_command(cfg, "demo", "--train") == "next: python demo.py --train --lam 1"


def test_a_checkpoint_depends_on_the_settings_of_its_stage_and_before():
    dense, search, train = (common.settings_of(Settings(), s) for s in ("dense", "search", "train"))
    assert set(search) - set(dense) == {"lam", "shares"}
    assert set(train) - set(search) == {"arch", "epochs"}
    assert "seed" in dense and not {"out", "device", "workers", "resume"} & set(train)
    common.require_same(search, dense, "x.pt")
    other = {**search, "lam": 0.75}
    _refused(lambda: common.require_same(search, other, "x.pt"), "x.pt", "--lam", 0.75)


def test_setup_seeds_and_every_rank_takes_its_device():
    """How many GPUs there are, whether torchrun has started this rank 1, which is not heard; "" is
    refused."""
    for gpus, launched, device, expected in (
            (0, False, "auto", "cpu"), (0, False, "cuda", ""), (2, False, "auto", "cuda:0"),
            (2, False, "cuda:1", "cuda:1"), (2, False, "cuda:2", ""), (2, False, "cpu:0", ""),
            (2, True, "cpu", "cpu"), (2, True, "cuda", "cuda:1"), (2, True, "cuda:1", "")):
        with (mock.patch.object(torch.cuda, "is_available", lambda: gpus > 0),
              mock.patch.object(torch.cuda, "device_count", lambda: gpus),
              mock.patch.object(torch.cuda, "set_device") as chosen,
              mock.patch.object(dist, "is_torchelastic_launched", lambda: launched),
              mock.patch.object(dist, "init_process_group") as joined,
              mock.patch.object(common, "rank", lambda: int(launched)),
              mock.patch.object(sys, "stdout", io.StringIO()) as heard_here,
              mock.patch.dict(os.environ, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"})):
            cfg = Settings(device=device, seed=3)
            torch.manual_seed(0)
            if expected:
                common.setup(cfg)
                assert cfg.device == expected and torch.initial_seed() == 3
                assert expected == "cpu" or chosen.call_args.args == (expected,)
                backend = mock.call("gloo" if expected == "cpu" else "nccl")
                assert joined.mock_calls == [backend] * launched    # WORLD_SIZE starts nothing
                print("x")
                assert len(heard_here.getvalue()) == 2 * (not launched)
            else:
                _refused(lambda: common.setup(cfg), device)


def test_peak_memory_is_in_gib():
    with mock.patch.object(torch.cuda, "max_memory_allocated", return_value=2 ** 30):
        assert common.peak_memory("cuda:0") == 1
    assert 0.05 < common.peak_memory("cpu") < 64


def test_files_are_whole_or_not_there():
    """On a full disk, of which torch.save tells by a RuntimeError."""
    with scratch() as tmp:
        path = tmp / "new" / "a.txt"
        common.write_text(path, "old")

        def save():
            with common.replacing(path) as temporary:
                temporary.write_text("half")
                raise RuntimeError
        _refused(save, "cannot write", path)
        with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left")):
            _refused(lambda: common.write_text(path, "new"), "No space left", path)
        assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


def test_damaged_and_foreign_files_are_refused():
    with scratch() as tmp:
        path, w, linear = tmp / "a.pt", torch.arange(4.0), nn.Linear(2, 2)
        _refused(lambda: common.load_checkpoint(path), "no checkpoint", path)
        _refused(lambda: common.read_json(path, "arch.json"), "no arch.json", path)
        for text in ("{", "[]"):
            put(path, text)
            _refused(lambda: common.read_json(path, "arch.json"), "readable", path)
        torch.save({"weights": w}, path)
        _refused(lambda: common.load_checkpoint(path), path, "no model")
        path.write_bytes(path.read_bytes()[:200])
        _refused(lambda: common.load_checkpoint(path), path, "truncated")
        for wrapped in ({"w": w}, {"state_dict": {"w": w}}, {"model": {"w": w}}):
            torch.save(wrapped, path)
            assert torch.equal(common.load_state_dict(path)["w"], w)
        torch.save({"model": [1]}, path)
        _refused(lambda: common.load_state_dict(path), path, "no state_dict")
        _refused(lambda: common.load_weights(linear, {"weight": w, "bias": w}, path), path, "fit")


def toy_run(folder, stop=None, epochs=3, lr=0.1, shared=False, out=None, **settings):
    """Random draws, batch statistics, momentum: all that a resumed run has to get right. Three
    batches an epoch, interrupted in epoch `stop`; the second and the third epoch score best."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 3, 1))
    sgd = torch.optim.SGD(net.parameters(), lr, 0.9)
    cfg = Settings(out=str(folder), device="cpu", **settings)
    images = torch.utils.data.Subset(synthetic("segmentation", (32, 32)), range(12))
    _, loader = common.open_loader(cfg, "train", True, images)
    run = common.Run("toy", "train", cfg, folder, epochs, model=net, optimizer=sgd,
                     schedule=common.poly(sgd, 3 * epochs), stale=["arch.json"], shared=shared)

    def terms(forward, x, y):
        if run.epoch == stop:
            raise KeyboardInterrupt
        return {"loss": F.cross_entropy(forward(x), y % 3)}

    with (contextlib.redirect_stdout(out or io.StringIO()),
          contextlib.suppress(KeyboardInterrupt)):
        common.fit(run, terms, loader, lambda model: min(run.epoch, 1))
    return net


def test_progress_is_live_on_a_terminal():
    out = io.StringIO()
    out.isatty = lambda: True
    with scratch() as tmp:
        toy_run(tmp, epochs=1, out=out)
    _, live, *_, last = out.getvalue().split("\r")
    assert live.startswith("toy epoch 1/1 it 1/3 loss ")
    assert re.fullmatch(r"toy epoch 1/1 it 3/3 loss \d\.\d+ gradient \d\.\d+ \d+\.\d img/s ETA "
                        r"0\.0 min \d+\.\d\d GiB \| val 0.00\x1b\[K\n", last)
    with scratch() as tmp:                  # 4 epochs of 5; in 240 s 2 steps are done, 18 are left
        run = common.Run("x", "train", Settings(), tmp, 4, 5)
        next(run.epochs())
        run.began, run.step, run.done, run.images = time.perf_counter() - 240, 2, 2, 480
        assert " 2.0 img/s ETA 36.0 min " in run.progress()


def test_run_resumes_bit_for_bit():
    with scratch() as tmp:
        toy_run(tmp / "whole")
        toy_run(tmp / "broken", stop=1)
        common.log_record(tmp / "broken", stage="toy", epoch=2)     # what is done again counts
        common.log_record(tmp / "broken", stage="eval", epoch=3)
        toy_run(tmp / "broken", resume=True)
        a, b = tensors_of(tmp / "whole/last.pt"), tensors_of(tmp / "broken/last.pt")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert common.read_log(tmp / "whole", "toy") == common.read_log(tmp / "broken", "toy")
        _refused(lambda: toy_run(tmp / "broken", resume=True, image_scale=0.5), "--image-scale")


def test_new_run_replaces_an_older_one_after_its_first_epoch():
    with scratch() as tmp:
        toy_run(tmp)
        put(tmp / "arch.json", "old")
        before = {path: path.read_bytes() for path in tmp.iterdir()}
        toy_run(tmp, stop=0, seed=1)
        _refused(lambda: toy_run(tmp, lr=1e38, seed=1), "epoch 1", "step", "loss", "learning rate")
        assert {path: path.read_bytes() for path in tmp.iterdir()} == before
        with mock.patch.object(common.Run, "save", side_effect=data.InputError("disk full")):
            shutil.copytree(tmp, tmp / "copy")
            _refused(lambda: toy_run(tmp / "copy", seed=1), "full")
        assert not (tmp / "copy/last.pt").exists()          # or --resume would go on with the old
        toy_run(tmp, stop=1, seed=1)
        assert not (tmp / "arch.json").exists() and len(common.read_log(tmp, "toy")) == 1
        lr, = common.load_checkpoint(tmp / "last.pt")["schedule"]["_last_lr"]
        assert abs(lr - 0.1 * (1 - 3 / 9) ** 0.9) < 1e-9        # 3 of 9 batches, poly


def test_an_epoch_logs_its_own_terms():
    """Not those of an earlier one, which may have trained by another loss."""
    with scratch() as tmp:
        run = common.Run("x", "train", Settings(), tmp, 2, 1, model=nn.Linear(1, 1))
        for epoch in run.epochs():
            run.check(**{f"loss{epoch}": torch.tensor(1.0)})
            quiet(run.end_epoch)
            _refused(lambda: quiet(run.end_epoch, math.nan), "no pixel")
        assert [("loss0" in r, "loss1" in r) for r in common.read_log(tmp, "x")] == [
            (True, False), (False, True)]


def test_every_epoch_and_seed_has_its_own_random_numbers():
    """Else the dropout, and the widths of a search, of all epochs would be alike."""
    with scratch() as tmp:
        runs = [common.Run("x", "train", Settings(seed=seed), tmp, 2) for seed in (0, 0, 1)]
        draws = [[float(torch.rand(())) for _ in run.epochs()] for run in runs]
    assert draws[0] == draws[1] and len({*draws[0], *draws[2]}) == 4


def test_trained_once_then_shared():
    with scratch() as tmp:
        first = toy_run(tmp)
        again = toy_run(tmp, stop=0, shared=True)           # nothing is left to train
        best = common.load_checkpoint(tmp / "best.pt")
        last = common.load_checkpoint(tmp / "last.pt")
        for net in (first, again):
            assert torch.equal(net[0].weight, best["model"]["0.weight"])
        assert best["epoch"] == 2 and last["epoch"] == 3
        _refused(lambda: toy_run(tmp, shared=True, seed=1), "--seed 0")
        toy_run(tmp, stop=0, epochs=4, shared=True)         # goes on, unasked
        assert common.load_checkpoint(tmp / "last.pt")["epoch"] == 4


def test_two_ranks_stay_equal():
    def job(rank):
        with mock.patch.object(common, "load_weights"):     # as trained: not read from one file
            net = toy_run(tmp)
        for key, value in net.state_dict().items():
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, value), key           # BN statistics too
        w, grid = nn.Parameter(torch.zeros(2, 3, 4, 5)), torch.arange(120.0).view(2, 3, 4, 5)
        grid = grid.contiguous(memory_format=torch.channels_last)
        w.grad = grid * (1 + 2 * rank)
        common.average_gradients([w, nn.Parameter(torch.zeros(1))])
        assert torch.equal(w.grad, 2 * grid) and w.grad.stride() == grid.stride()
        # NaN on one rank alone has to stop both.
        run = common.Run("x", "train", Settings(), tmp, 1)
        next(run.epochs())
        loss = w.sum() * (math.nan if rank else 1)
        _refused(lambda: run.descend(torch.optim.SGD([w], 0.1), loss=loss), "not finite")
        assert w.count_nonzero() == 0
        if rank == 1:
            common.write_text(tmp / "theirs", "")           # rank 0 writes, the others nothing
            assert not (tmp / "theirs").exists()
    with scratch() as tmp:
        on_two_ranks(job)


def test_synchronised_bn_leaves_the_network_plain():
    """The twin that trains on several GPUs shares every tensor, so the network itself can be cut
    and folded at any time. (Statistics over ranks need GPUs; in one process the twin is plain.)"""
    net = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))
    with mock.patch.object(common, "world_size", lambda: 2):
        assert common.training_form(net, Settings()) is net
        twin = common.training_form(net, Settings(device="cuda"))
    assert type(twin[0][0]) is nn.SyncBatchNorm and type(net[0][0]) is nn.BatchNorm2d
    shared = twin.state_dict(keep_vars=True)
    for key, tensor in net.state_dict(keep_vars=True).items():
        assert tensor is shared[key], key


def test_every_process_gets_a_batch_that_bn_can_use():
    cfg = Settings(device="cpu", batch_size=4, size=(32, 32))
    with mock.patch.object(common, "world_size", lambda: 2):
        assert common.open_loader(cfg, "train", True)[1].batch_size == 2
        for loader in (common.open_loader(cfg, "val")[1], common.open_loader(cfg, "train")[1]):
            assert loader.batch_size == 1 and not loader.sampler.shuffle
    cfg = replace(cfg, image_scale=0.5, scales=(1.0, 1.0), seed=7)
    with (mock.patch.object(common, "world_size", lambda: 2),
          mock.patch.object(common, "rank", lambda: 1)):
        images, loader = common.open_loader(cfg, "train", True)
        sampler = loader.sampler
        assert (sampler.rank, sampler.world_size) == (1, 2)     # its own share
        assert images.seed == sampler.seed == loader.dataset.seed == 7
        assert (next(iter(loader))[1] != 255).sum() <= 2 * 16 * 16
        image, label = next(iter(common.open_loader(cfg, "val")[1]))
        assert image.shape == (1, 3, 16, 16) and label.shape == (1, 32, 32)
    for ranks, batch, pictures, size, fits in (
            (1, 2, 9, None, True), (1, 1, 9, None, False), (1, 2, 1, None, False),
            (2, 4, 4, None, True), (2, 5, 9, None, False), (2, 2, 9, None, False),
            (2, 4, 3, None, False),
            (2, 2, 9, (64, 65), True), (2, 2, 9, (64, 64), False), (1, 1, 1, (65, 1), True)):
        with mock.patch.object(common, "world_size", lambda: ranks):
            if fits:
                common.check_batch("batch", batch, pictures, size)
            else:
                _refused(lambda: common.check_batch("batch", batch, pictures, size),
                         f"--batch {batch} of {pictures} training pictures over {ranks} process")


def test_narrowed_layers_by_hand():
    out, into, x = torch.tensor([0, 2, 3]), torch.tensor([1, 4]), torch.randn(2, 5, 7, 7)
    for layer in (nn.Conv2d(5, 5, 3, groups=5), shake_norms(nn.BatchNorm2d(5)).eval()):
        small = common.narrowed(layer, out, into)           # `into` means nothing here
        assert torch.allclose(small(x[:, out]), layer(x)[:, out], atol=1e-6)
    x[:, [0, 2, 3]] = 0                                     # what is cut away does not count
    conv = nn.Conv2d(5, 4, 3)
    small = common.narrowed(conv, out, into)
    assert small.in_channels == 2 and torch.allclose(small(x[:, into]), conv(x)[:, out], atol=1e-5)
    with contextlib.suppress(ValueError):
        common.narrowed(nn.Conv2d(4, 4, 1, groups=2), out)
        raise AssertionError("half-grouped convolution was cut")


def test_fold_bn_keeps_the_output():
    net = shake_norms(torchvision.models.mobilenet_v2()).double().eval()
    x, folded = torch.randn(1, 3, 32, 32).double(), common.fold_bn(net)
    assert "BatchNorm2d" in str(net) and "BatchNorm2d" not in str(folded)
    assert torch.allclose(folded(x), net(x), rtol=1e-9)
    apart = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)])      # neighbours of two sizes
    assert isinstance(common.fold_bn(apart)[1], nn.BatchNorm2d)


def test_classifier_weights_from_a_file():
    """All but the head, of a whole network or of its `features`."""
    net = torchvision.models.squeezenet1_1()
    with scratch() as tmp:
        path = tmp / "a.pth"
        for state in (net.state_dict(), net.features.state_dict()):
            torch.save(state, path)
            again = common.classifier("squeezenet1_1", str(path))
            equal = [torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters())]
            assert all(equal[:-2]) and not equal[-2]
        _refused(lambda: common.classifier("shufflenet_v2_x0_5", str(path)), path, "fit")


def test_confusion_matrix_counts_what_occurs():
    torch.manual_seed(0)
    label, guess = torch.randint(0, 4, (2, 9, 7)), torch.randint(0, 4, (2, 9, 7))
    label[0, :2] = 255
    label[label == 2], guess[guess == 3] = 0, 1             # 2 only predicted, 3 only in the label
    matrix, ious = common.ConfusionMatrix(6), []            # 4 and 5 occur nowhere
    matrix.update(label[:1], guess[:1])
    matrix.update(label[1:], guess[1:])
    for k in range(4):
        seen, found = label[label != 255] == k, guess[label != 255] == k
        ious.append((seen & found).sum() / (seen | found).sum())
    assert abs(matrix.miou() - sum(ious) / 4) < 1e-6
    assert matrix.iou().isnan().tolist()[4:] == [True, True]


def test_cross_entropy_leaves_out_void():
    logits, label = torch.randn(2, 5, 6, 8), torch.randint(0, 5, (2, 6, 8))
    chosen = logits.softmax(1).gather(1, label[:, None])[:, 0]
    label[0, 0] = 255
    expected = -chosen[label != 255].log().mean()
    assert abs(common.cross_entropy(logits, label) - expected) < 1e-5
    assert common.cross_entropy(logits, torch.full_like(label, 255)) == 0       # not NaN


def test_evaluation_at_the_labels_resolution():
    """One scale is the argmax of the enlarged logits; several are means of probabilities."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5)).train()
    image, label = torch.randn(1, 3, 40, 48), torch.randint(0, 5, (1, 70, 80))
    half = F.interpolate(image, (32, 36), mode="bilinear", antialias=True)      # 30 is below 32

    def logits(x):
        with torch.no_grad():
            return F.interpolate(copy.deepcopy(net).eval()(x), (70, 80), mode="bilinear")

    def both(x):
        return logits(x).softmax(1) + logits(x.flip(-1)).flip(-1).softmax(1)

    def expect(scores, pictures=1, total=1, **options):
        found = common.evaluate(net, [(image, label)] * pictures, 5, Settings(), **options).matrix
        for a, b in np.ndindex(5, 5):
            assert found[a, b] == total * ((label == a) & (scores.argmax(1) == b)).sum()

    expect(logits(image))
    expect(both(image), flip=True)
    four = both(image) + both(half)
    expect(four, flip=True, scales=(1.0, 0.75))
    with torch.no_grad():
        mean = common.probabilities(copy.deepcopy(net).eval(), image, (70, 80), (1.0, 0.75), True)
    assert torch.allclose(mean, four / 4, atol=1e-6)
    assert net.training
    net.eval()
    expect(logits(image))
    assert not net.training                                 # as it was
    on_two_ranks(lambda rank: expect(logits(image), 1 + rank, total=3))


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def where(path, colour):
    """(rows, columns) of the pixels of this colour, left of the legend."""
    pixels = np.asarray(Image.open(path))[:, :650].astype(int)
    return np.nonzero(abs(pixels - data.ImageColor.getrgb(colour)).max(-1) <= 8)


def test_lines_and_dots():
    peak = [(x, float(x == 15)) for x in range(10, 31)]
    series = {"peak": peak + [(3, math.inf)], "dot": [(30, 0.5)], "none": []}
    with scratch() as tmp:
        common.draw_lines(tmp / "a.png", "title", "epoch", "share", series)
        rows, columns = where(tmp / "a.png", common.COLOURS[0])
        _, x = where(tmp / "a.png", common.COLOURS[1])
    top = columns[rows <= rows.min() + 3].mean()            # the peak is at 5 of 20
    assert abs((top - columns.min()) / np.ptp(columns) - 0.25) < 0.01
    assert abs(x.mean() - columns.max()) < 3                # one point is drawn as a dot


def test_heat_map_and_bars():
    with scratch() as tmp:
        path, values = tmp / "a.png", [[0.5, math.nan], [-1, 2]]
        common.draw_heat_map(path, "t", ["r0", "r1"], ["c0", "c1"], values)
        picture = Image.open(path)
        cells = [picture.getpixel((182 + 64 * x, 64 + 16 * y)) for y, x in np.ndindex(2, 2)]
        assert cells == [(132, 152, 181), (200, 200, 200), (255, 255, 255), (8, 48, 107)]
        common.draw_bars(path, "t", {"first": (10, 40), "second": (30, 30)})
        rows, columns = where(path, common.COLOURS[0])
    first, second = (np.ptp(columns[rows == row]) for row in (rows.min(), rows.max()))
    assert abs(first / second - 10 / 30) < 0.02


def test_segmentations_are_drawn_beside_their_labels():
    """All is class 0, the last rows void; the network sees class 1 everywhere."""
    net = lambda x: torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    with scratch() as tmp:
        put(tmp / "a.png", np.full((20, 30), 100))
        put(tmp / "b.png", [[0] * 30] * 15 + [[255] * 30] * 5)
        pairs = [(tmp / "a.png", tmp / "b.png")] * 3
        pictures = data.FilePairs(pairs, "ab", [(255, 0, 0), (0, 0, 255)])
        quiet(common.draw_segmentations, net, pictures, Settings(), tmp)
        sheet = np.asarray(Image.open(tmp / "segmentations.png"))
    height, width = sheet.shape[0] // 3, sheet.shape[1] // 3
    row = sheet[height // 2, width // 2::width].tolist()
    assert row == [[100, 100, 100], [193, 40, 40], [40, 40, 193]]       # 0.4 picture + 0.6
    assert sheet[height - 15, width + width // 2].tolist() == [100, 100, 100]           # void


# ---------------------------------------------------------------------------------------------
# latency.py
# ---------------------------------------------------------------------------------------------


def conv_table(sizes, root, ms=None, chunk=24):
    """build_table for convolutions of these sizes; ms: made up, else measured."""
    entries = {f"conv {c}": (functools.partial(nn.Conv2d, 3, c, 3), [(1, 3, 16, 16)])
               for c in sizes}
    made_up = lambda calls, *rest: {name: {"median": ms} for name in calls}
    with mock.patch.object(latency, "measure", made_up if ms else latency.measure):
        return quiet(latency.build_table, entries, "cpu", (16, 16), root, 2, chunk)


def test_latency_table_is_completed_in_random_order_by_chunk():
    """Sizes grow from entry to entry; a slow minute must not hit the large ones only."""
    tables = []
    store = lambda path, value: tables.append(list(value["ms"]))
    with scratch() as root, mock.patch.object(latency, "write_json", store):
        torch.manual_seed(0)
        table = conv_table(range(1, 13), root, 1.0, chunk=5)
        after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == after                          # drawn as with a stored table
    assert [len(rows) for rows in tables] == [5, 10, 12] and tables[0] != list(table)[:5]


def test_latency_table_measures_what_is_missing_and_refuses_foreign_files():
    with scratch() as root:
        first = conv_table([2, 4], root)
        table = conv_table([2, 4, 6], root)
        assert list(table) == ["conv 2", "conv 4", "conv 6"] and min(table.values()) > 0
        assert table | first == table == conv_table([2, 4, 6], root, 1.0)     # not measured again
        path, = root.iterdir()
        good, value = path.read_text(), str(table["conv 2"])
        for old, new in (('"threads": ', '"threads": 9'), (value, "0.0"), (value, "NaN"),
                         (value, '"1"'), ("}", "")):
            put(path, good.replace(old, new))
            _refused(lambda: conv_table([2], root), path, "latency table" if new == "" else "other")


def test_latency_table_is_rank_0s():
    def job(rank):
        with scratch() as root:
            assert conv_table([2], root, ms=1.0 + rank) == {"conv 2": 1.0}
    on_two_ranks(job)


def test_latency_is_measured_in_turn_after_warm_up():
    """On a clock that the calls move: by so many ms, and 500 more the first time."""
    now, order, ms = [0.0], [], {"a": 0.25, "b": 30, "c": 0.001}

    def call(name):
        now[0] += (ms[name] + 500 * (name not in order)) / 1000
        order.append(name)

    calls = {name: functools.partial(call, name) for name in ms}
    with mock.patch.object(time, "perf_counter", lambda: now[0]):
        found = latency.measure(calls, "cpu", rounds=5)
    for name in ms:
        assert abs(found[name]["median"] - ms[name]) < 1e-6
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b", "c"] * 6
    # Two of warm-up; then short calls are repeated, until 1 ms or 20 times.
    assert [order.count(name) for name in ms] == [2 + 5 * 4, 2 + 5, 2 + 5 * 20]
    samples = [1, 1, *range(20, 0, -1)]                     # two of warm-up
    with mock.patch.object(latency, "milliseconds", side_effect=samples):
        assert latency.measure({"a": None}, "cpu", rounds=20) == {"a": {"median": 10.5, "p90": 19}}


def test_latency_on_a_gpu_is_taken_by_its_own_events():
    """Stand-ins for CUDA's; each sample says 0.5 ms, so calls are made by twos."""
    cuda = mock.MagicMock()
    cuda.Event().elapsed_time.return_value = 0.5
    with mock.patch.multiple(torch.cuda, Event=cuda.Event, device=cuda.device):
        found = latency.measure({"a": cuda.call}, "cuda:1", rounds=3)
    assert found["a"]["median"] == 0.25 and cuda.call.call_count == 10 + 3 * 2
    cuda.device.assert_called_once_with(torch.device("cuda:1"))
    assert cuda.Event.call_args_list[1:] == 2 * (10 + 3) * [mock.call(enable_timing=True)]
    done = [name.replace("Event().", "") for name, *_ in cuda.mock_calls]
    assert done[-7:-1] == ["record", "call", "call", "record", "synchronize", "elapsed_time"]
    assert done[-1] == "device().__exit__"


def test_latency_on_a_gpu_is_that_of_a_graph():
    """Stand-ins for CUDA's: after a warm-up the call is captured once, and then only replayed."""
    cuda, names = mock.MagicMock(), ("Stream", "current_stream", "stream", "CUDAGraph", "graph")
    with (mock.patch.multiple(torch.cuda, **{name: getattr(cuda, name) for name in names}),
          torch.backends.cudnn.flags(benchmark=False)):
        latency.captured(cuda.call)()
        assert torch.backends.cudnn.benchmark
    kinds = "call", "graph().__enter__", "CUDAGraph().replay"
    done = [name for name, *_ in cuda.mock_calls if name in kinds]
    assert done == ["call", "call", "call", "graph().__enter__", "call", "CUDAGraph().replay"]


def test_latency_conditions_and_what_is_measured():
    net = shake_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch.manual_seed(0)
    call = latency.prepare(net, [(2, 3, 9, 9)], "cpu", torch.float64, channels_last=True)
    with mock.patch.object(F, "batch_norm", None):          # it is folded
        seen = call()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9).double()
    assert torch.allclose(seen, copy.deepcopy(net).double().eval()(x), atol=1e-5)
    assert seen.dtype == torch.float64 and seen.shape == (2, 4, 7, 7) and net.training
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert latency.prepare(net, [(2, 3, 9, 9)], "cpu")().is_contiguous()
    with mock.patch.object(latency, "device_name", str):
        for device, allowed, dtype in (("cuda", True, "tf32"), ("cuda", False, "float32"),
                                       ("cpu", True, "float32")):
            with torch.backends.cudnn.flags(allow_tf32=allowed):
                about = latency.conditions(device, torch.float32, (4, 6), True, True)
            assert about["dtype"] == dtype and about["graph"] == (device == "cuda")
            assert about["frame"] == [4, 6] and about["layout"] == "NHWC" and about["compiled"]
            assert about["threads"] == (None if device == "cuda" else torch.get_num_threads())
            assert about["device"] == device and about["torch"] == torch.__version__
        about = latency.conditions("cpu", torch.bfloat16, (4, 6))
        assert (about["dtype"], about["layout"], about["compiled"]) == ("bfloat16", "NCHW", False)
    cfg = Settings(amp=True, channels_last=True)
    with (mock.patch.object(latency, "prepare", wraps=latency.prepare) as prepared,
          mock.patch.object(latency, "measure", lambda *_: {"a": {"median": 4.0, "p90": 5.0}})):
        about, rows = quiet(latency.compare, {"a": net}, (9, 9), cfg)
    prepared.assert_called_once_with(net, [(1, 3, 9, 9)], "cpu", torch.bfloat16, True, False)
    assert about == latency.conditions("cpu", torch.bfloat16, (9, 9), True, False)
    assert rows == {"a": {"params": 4 * 27 + 4 + 8, "conv_macs": 49 * 4 * 27, "median_ms": 4.0,
                          "p90_ms": 5.0, "fps": 250.0}}


# ---------------------------------------------------------------------------------------------
# fastersg.py: counts of the paper and of the release, networks
# ---------------------------------------------------------------------------------------------

TEACHER, STUDENT = fastersg.TEACHER, fastersg.STUDENT


def test_fastersg_published_networks_have_their_exact_size():
    """Cells that the branches share are counted once, in parameters and in MACs."""
    for arch, params, macs in ((fastersg.PAPER_STUDENT, 3421875, 27770486784),
                               (fastersg.PAPER_TEACHER, 22115203, 107778932736)):
        net = fastersg.FasterSeg(arch, 19)
        assert common.count_params(net) == params
        assert common.count_macs(net, (1024, 2048)) == macs
    training = fastersg.FasterSeg(fastersg.PAPER_STUDENT, 19, auxiliary=True)
    assert common.count_params(training.auxiliary) == 931046


def test_fastersg_counts_of_section_4_2_and_weights_of_footnote_1():
    assert fastersg.count_paths(16) == 15 + 105 + 1575 == 1695
    assert fastersg.count_combinations(16, (4, 6, 8, 10, 12)) == 21 ** 42 + 125
    keys = fastersg.ArchParameters(fastersg.Config()).keys
    assert len(keys["alpha"]) == 16 + 15 + 14 and len(keys["beta"]) == 14 + 13
    assert len(keys["gamma"]) == 16 + 16 + 15
    w = fastersg.solve_footnote_1((10.42, 0.01, 5.54))
    assert [round(v, 3) for v in w] == [0.001, 0.997, 0.002] and abs(sum(w) - 1) < 1e-12
    assert fastersg.solve_footnote_1((4.0, 2.0, 0.0)) == [1 / 3, 2 / 3, 0.0]


def test_fastersg_losses_against_loops():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    kl = F.kl_div(log_t, log_s, reduction="sum", log_target=True)   # KL(q^s || q^t)
    assert abs(fastersg.distillation(student, teacher) - kl / (2 * 4 * 5)) < 1e-6
    logits, label = 2 * torch.randn(2, 5, 6, 8), torch.randint(0, 5, (2, 6, 8))
    label[0, 0] = 255
    few = torch.full_like(label, 255)
    few[1, 2, 3] = 4                                        # less than a sixteenth is valid
    for target, threshold in ((label, 0.7), (label, 1e-6), (few, 1e-6)):
        p, losses = torch.softmax(logits, 1), []
        for b, y, x in (target != 255).nonzero().tolist():
            losses.append(-math.log(p[b, target[b, y, x], y, x]))
        losses.sort(reverse=True)
        hard = [loss for loss in losses if loss > -math.log(threshold)]
        kept = max(hard, losses[:96 // 16], key=len)
        assert abs(fastersg.ohem(logits, target, threshold) - sum(kept) / len(kept)) < 1e-5
    assert fastersg.ohem(logits, torch.full_like(label, 255)) == 0      # zero, not NaN
    # That of the search: every prediction counts, against every third pixel's label.
    label, outputs = torch.randint(0, 5, (2, 6, 9)), torch.randn(6, 2, 5, 4, 4).unbind()
    expected = sum(fastersg.ohem(sized(y, (2, 3)), label[:, ::3, ::3]) for y in outputs)
    found = fastersg.seg_loss(lambda *_: outputs, None, STUDENT, None, label, tiny(label_stride=3))
    assert abs(found - expected) < 1e-5


# The operators of Section 3.1.2 and App. A as formulas, their kernels sliced under autograd.

def conv_bn(layer, x, j=0):
    kernel = layer.conv.weight[:layer.c_outs[j], :x.shape[1]]
    return layer.norms[j](F.conv2d(x, kernel, None, layer.conv.stride, layer.conv.padding))


def sized(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def plain_operator(name, op, x, stride, j=0):
    size, half = x.shape[-2:], [-(-d // 2) for d in x.shape[-2:]]
    if name == "skip" and stride == 1:
        return torch.cat([x, 0 * x], 1)[:, :op.c_outs[j]]
    if name == "skip":
        odd = F.pad(x[..., 1:, 1:], (0, 1, 0, 1))
        return F.relu(torch.cat([conv_bn(op.even, x, j), conv_bn(op.odd, odd, j)], 1))
    y = conv_bn(op.first, sized(x, half) if "zoom" in name else x, j)
    if "x2" in name:
        y = conv_bn(op.second, F.relu(y), j)
    if "zoom" in name and stride == 1:
        y = sized(y, size)
    return F.relu(y)


def test_fastersg_equation_2_and_its_slices():
    """Outputs, gradients, which add up, and BN statistics, at every width of the input."""
    torch.manual_seed(0)
    for stride, j, c_in in itertools.product((1, 2), (0, 1), (4, 6)):
        net = fastersg.Mixture(6, [4, 8], stride).double()
        twin, gradients = copy.deepcopy(net), []
        x = torch.randn(2, c_in, 5, 6).double().requires_grad_()
        alpha = torch.rand(5).double().requires_grad_()
        plain = sum(a * plain_operator(name, op, x, stride, j)
                    for a, name, op in zip(alpha, fastersg.OPERATORS, twin.ops))
        for out in (plain, net(x, alpha, j)):
            x.grad = alpha.grad = None
            for _ in range(2):
                out.square().sum().backward(retain_graph=True)
            gradients.append(torch.cat([out.flatten(), x.grad.flatten(), alpha.grad]))
        assert torch.allclose(*gradients, atol=1e-9)
        for p, q in zip(net.parameters(), twin.parameters()):
            assert (p.grad is None) == (q.grad is None)     # those of another width
            assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-9)
        for p, q in zip(net.buffers(), twin.buffers()):
            assert not p.is_floating_point() or torch.allclose(p, q, atol=1e-9)


FORKED = fastersg.Architecture.from_json({"stem_chi": 2, "branches": {
    16: ["conv_x2 s=8 chi=2", "zoom /2 s=8 chi=2", "zoom_x2 s=16 chi=3"],
    32: ["conv_x2 s=8 chi=2", "zoom /2 s=8 chi=2", "skip /2 s=16 chi=1"]}})


@torch.no_grad()
def test_fastersg_network_written_out():
    """The forked network, of any size, its auxiliary heads, and with BN folded."""
    torch.manual_seed(0)
    net = shake_norms(fastersg.FasterSeg(FORKED, 5, auxiliary=True)).double().eval()
    x = torch.randn(2, 3, 70, 95).double()

    def up(layer, coarse, fine):
        y = sized(F.relu(conv_bn(layer.reduce, coarse)), fine.shape[-2:])
        return F.relu(conv_bn(layer.fuse, torch.cat([y, fine], 1)))

    def chain(layers, y):
        for layer in layers:
            y = conv_bn(layer, y) if isinstance(layer, fastersg.ConvBN) else layer(y)
        return y

    def classify(head, *maps):
        return sized(chain(head, torch.cat(maps, 1)), x.shape[-2:])
    stem = chain(net.stem, x)                               # (2, 16, 9, 12)
    a = plain_operator("conv_x2", net.cells[0], stem, 1)    # (2, 16, 9, 12)
    b = plain_operator("zoom", net.cells[1], a, 2)          # (2, 32, 5, 6)
    c = plain_operator("zoom_x2", net.cells[2], b, 1)       # (2, 48, 5, 6)
    d = plain_operator("skip", net.cells[3], b, 2)          # (2, 32, 3, 3)
    (from_16,), (to_16, then_8) = net.head.ups["16"], net.head.ups["32"]
    fine, coarse = up(from_16, c, a), up(then_8, up(to_16, d, b), a)
    expected = [classify(net.head.classifiers["(16, 32)"], coarse, fine),
                classify(net.auxiliary["16"], b, c), classify(net.auxiliary["32"], d)]
    for forward in (net, common.fold_bn(net)):
        assert torch.allclose(forward(x), expected[0], atol=1e-9)
    for m in net.modules():                                 # train mode, but with these statistics
        m.training = not isinstance(m, nn.BatchNorm2d)
    for y, wanted in zip(net(x), expected, strict=True):
        assert torch.allclose(y, wanted, atol=1e-9)


def test_fastersg_pieces_make_up_the_network():
    """What is measured for the table is what the network runs; MACs of Table 1."""
    def macs_of(piece, frame):
        make, shapes = fastersg.make_piece(piece, frame)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            make().eval()(*map(torch.zeros, shapes))
        return counter.get_total_flops() // 2
    macs = [macs_of(piece, (96, 160)) for piece in fastersg.pieces_of(FORKED, 5)]
    assert sum(macs) == common.count_macs(fastersg.FasterSeg(FORKED, 5), (96, 160))
    for name, published in (("conv", 1.21), ("zoom", 0.3)):
        assert round(macs_of((name, 256, 256, 32, 1), (1024, 2048)) / 1e9, 2) == published


# ---------------------------------------------------------------------------------------------
# fastersg.py: supernet, relaxation, latency, derivation
# ---------------------------------------------------------------------------------------------

TINY = dict(device="cpu", layers=4, widths=(1, 2), stem_chi=2, label_stride=4, search_size=(32, 64),
            frame=(64, 96), search_batch=2)


def tiny(**changes):
    return fastersg.Config(**{**TINY, **changes})


def table_of(cfg, cost, classes=7):
    """{entry: cost(piece)} of a student's space."""
    pieces = dict.fromkeys(itertools.chain(*fastersg.space_pieces(cfg, classes).values()))
    return {fastersg.entry(piece): cost(piece) for piece in pieces}


def made_up_table(cfg, classes=7):
    g = random.Random(0)
    return table_of(cfg, lambda piece: g.uniform(0.1, 1), classes)


def one_hot_arch(cfg, g, **given):
    """ArchParameters whose probabilities are one-hot: of the choices given by kind, in the order of
    the keys, or of random ones."""
    arch = fastersg.ArchParameters(cfg)
    for kind, p in arch.named_parameters():
        choices = given.get(kind) or [g.randrange(p.shape[1]) for _ in p]
        p.data = 300.0 * F.one_hot(torch.tensor(choices), p.shape[1])
    return arch


def paths_of(cfg):
    """One-hot beta of every path."""
    return list(itertools.product(range(2), repeat=2 * cfg.layers - 5))


def every_skip(cfg, g, beta):
    """This path with each place of skips on it, all other choices random."""
    path = one_hot_arch(cfg, g, beta=beta, alpha=[1] * (3 * cfg.layers - 3))
    branches = fastersg.derive(path.draw(path.widest()), cfg, STUDENT, fastersg.RATES).branches
    used = {(cell.rate, cell.layer) for cells in branches.values() for cell in cells}
    for count in range(len(used) + 1):
        for skips in itertools.combinations(sorted(used), count):
            alpha = {cell: g.randrange(1, 5) for cell in path.keys["alpha"]}
            alpha |= dict.fromkeys(skips, 0)
            yield one_hot_arch(cfg, g, beta=beta, alpha=list(alpha.values()))


@torch.no_grad()
def test_fastersg_derived_has_the_relaxed_latency():
    """Every path with every place of skips at L = 4, samples at L = 5 and 6."""
    g = random.Random(0)
    for layers, stem_chi in ((4, 2), (5, 2), (6, 1)):
        cfg = tiny(layers=layers, stem_chi=stem_chi)
        ms = made_up_table(cfg)
        table = fastersg.LatencyTable(cfg, ms, 7)
        for beta in g.sample(paths_of(cfg), 8):
            archs = every_skip(cfg, g, beta) if layers == 4 else [one_hot_arch(cfg, g, beta=beta)]
            for draw in (arch.draw(arch.likeliest()) for arch in archs):
                for rates, relaxed in table(draw).items():
                    found = fastersg.derive(draw, cfg, STUDENT, rates)
                    assert abs(fastersg.table_latency(found, ms, 7) - relaxed) < 1e-5, beta


@torch.no_grad()
def test_fastersg_derived_equals_relaxed():
    """The property that makes a search trustworthy: one-hot parameters, copied kernels, same
    output, for teacher and student; every path of L = 4, samples at L = 5 and 6."""
    g, image = random.Random(0), torch.randn(1, 3, 38, 53).double()
    for layers, count in ((4, 8), (5, 2), (6, 1)):
        cfg = tiny(layers=layers)
        net = shake_norms(fastersg.Supernet(cfg, 7)).double().eval()
        for i, beta in enumerate(g.sample(paths_of(cfg), count)):
            who, arch = i % 2, one_hot_arch(cfg, g, beta=beta).double()
            draw = arch.draw(arch.widest() if who == TEACHER else arch.likeliest())
            relaxed = dict(zip(net.sets, net(image, draw, who)))
            for rates in net.final_sets:
                small = fastersg.FasterSeg(fastersg.derive(draw, cfg, who, rates), 7)
                fastersg.inherit(small.double().eval(), net, who, cfg.widths)
                wanted = sized(relaxed[rates], image.shape[-2:])
                assert torch.allclose(small(image), wanted, atol=1e-9), (layers, beta, rates)


@torch.no_grad()
def test_fastersg_expected_latency_against_enumeration():
    """Eqs. (1), (2) with latencies: the mean over discrete networks, weighed by probability. All
    of beta is soft; so are the widths of some nodes, and two cells may be skips."""
    cfg = tiny()
    ms, expected = made_up_table(cfg), dict.fromkeys(fastersg.final_sets(2), 0.0)
    arch = one_hot_arch(cfg, random.Random(1), alpha=[2, 4, 1, 3, 2, 4, 1, 3, 2])
    torch.manual_seed(3)
    soft = [("beta", node) for node in arch.keys["beta"]]
    soft += [("alpha", (8, 0)), ("alpha", (8, 1)), ("gamma", (8, 2)), ("gamma", (16, 2)),
             ("gamma", (8, 4)), ("gamma", (16, 4)), ("gamma", (32, 4))]
    for kind, key in soft:                                  # the first two choices
        logits = getattr(arch, kind)[arch.keys[kind].index(key)]
        logits[:] = -math.inf
        logits[:2] = torch.randn(2)
    mixed = arch.draw(torch.softmax(arch.gamma, 1))
    for choices in itertools.product(range(2), repeat=len(soft)):
        p, hard = 1.0, fastersg.Draw(dict(mixed.alpha), dict(mixed.beta), dict(mixed.gamma))
        for (kind, key), i in zip(soft, choices):
            rows = getattr(hard, kind)
            p *= float(rows[key][i])
            rows[key] = torch.eye(5)[i]
        for rates in expected:
            found = fastersg.derive(hard, cfg, STUDENT, rates)
            expected[rates] += p * fastersg.table_latency(found, ms, 7)
    found = fastersg.LatencyTable(cfg, ms, 7)(mixed)
    assert found.keys() == expected.keys()
    for rates, value in found.items():
        assert abs(value - expected[rates]) < 1e-5, rates


def test_fastersg_expected_latency_by_hand():
    """The example in LatencyTable: half skip (0 ms), half conv (2 ms, at 1/16 4), down always 3."""
    cfg = tiny(branches=1)

    def cost(piece):
        kind, rate, stride = piece[0], piece[-2], piece[-1]
        if kind not in fastersg.OPERATORS or kind == "skip" and stride == 1:
            return 0.0                                      # stem and head too
        if stride == 2:
            return 3.0
        return 4.0 if rate == 16 else 2.0
    table = fastersg.LatencyTable(cfg, table_of(cfg, cost), 7)
    arch = fastersg.ArchParameters(cfg)
    with torch.no_grad():
        arch.alpha[:, :2] = 100.0                           # half skip, half conv
        arch.beta.copy_(torch.tensor([[-100.0, 100.0]] * 3))            # stay
        arch.beta[0] = torch.tensor([math.log(1 / 4), math.log(3 / 4)])
        values = table(arch.draw(arch.widest()))
    # At 1/8 four cells of 1; 4.75 of node (16, 2) and two cells of 2; down, down, two cells of 1.
    for rate, ms in ((8, 4), (16, 4.75 + 4), (32, 3 + 3 + 2)):
        assert abs(float(values[rate,]) - ms) < 1e-5


def test_fastersg_equation_3_weighs_the_gradients():
    cfg = tiny(layers=5, widths=(2, 4, 6))
    table = fastersg.LatencyTable(cfg, made_up_table(cfg), 7)
    torch.manual_seed(0)
    arch = fastersg.ArchParameters(cfg)
    for p in arch.parameters():
        nn.init.normal_(p, std=0.5)
    draw, w = arch.draw(arch.gumbel()), (0.2, 0.5, 0.3)
    full, weighed = table.mean(draw), fastersg.weighed_latency(table, draw, w)
    assert abs(weighed - full) < 1e-5
    for p, factor in zip(arch.parameters(), w):             # alpha, beta, gamma
        grad, = torch.autograd.grad(full, p, retain_graph=True)
        ours, = torch.autograd.grad(weighed, p, retain_graph=True)
        assert (grad.abs().max(1).values > 0).all()         # every choice has an influence
        assert torch.allclose(ours, factor * grad, rtol=1e-4, atol=1e-6)
    assert fastersg.choose_eq3_w(replace(cfg, decouple=False), table) == (1.0, 1.0, 1.0)
    w, _ = heard(fastersg.choose_eq3_w, cfg, table)
    exact, arch = copy.deepcopy(table), arch.double()       # and the gradient is the latency's
    exact.ms = {group: ms.double() for group, ms in table.ms.items()}
    exact.stem_width = table.stem_width.double()
    assert torch.autograd.gradcheck(
        lambda *_: exact.mean(arch.draw(torch.softmax(arch.gamma, 1))), [*arch.parameters()],
        fast_mode=True)
    assert w == fastersg.solve_footnote_1(fastersg.sensitivities(table, cfg))


def test_fastersg_sensitivities_of_table_2():
    """Tables that make the numbers known: branches 8, 16, 32 alone, alpha uniform."""
    cfg = tiny(layers=5, branches=1)

    def changes(cost):
        ms = table_of(cfg, lambda piece: float(piece[0] in fastersg.OPERATORS and cost(*piece[1:])))
        return fastersg.sensitivities(fastersg.LatencyTable(cfg, ms, 7), cfg)
    # All cells cost 1 ms, but for skips that stay: those alone leave 0, 1 and 2 cells of 5.
    assert np.allclose(changes(lambda *channels: 1), [(5 + 4 + 3) / 3, 0, 0], atol=1e-5)
    # Those of rate 16 that stay: branch 16 has one if it goes down late, four if early.
    operator, rate, width = changes(lambda c_in, c_out, s, stride: s == 16 and stride == 1)
    assert operator > 0 and abs(rate - 0.8 * (4 - 1) / 3) < 1e-5 and abs(width) < 1e-5


def test_fastersg_places_against_brute_force():
    g, layers = random.Random(0), 6
    places, nodes = range(1, layers), fastersg.ArchParameters(tiny(layers=layers)).keys["beta"]
    for _ in range(50):
        given = {node: (p := g.random(), 1 - p) for node in nodes}
        beta = {node: p for node, (p, _) in given.items()}
        beta[16, 1] = beta[32, 2] = 0.5                     # one input: as if undecided
        alone = max(places, key=lambda l: beta[16, l])
        pair = max(itertools.combinations(places, 2),
                   key=lambda pair: beta[16, pair[0]] * beta[32, pair[1]])
        assert fastersg.downsampling_places(given, layers) == {8: (), 16: (alone,), 32: pair}
    start = dict.fromkeys(given, (0.5, 0.5))                # of equal places the last
    assert fastersg.downsampling_places(start, layers) == {8: (), 16: (5,), 32: (4, 5)}


def test_fastersg_a_cell_that_goes_down_has_its_own_width():
    """Where the product of footnote 2 takes a node that prefers to stay, and the cell that would
    have stayed is a skip, the node is as wide as gamma says, not as wide as the skip's input."""
    cfg = tiny(layers=8)
    arch = fastersg.ArchParameters(cfg)
    with torch.no_grad():
        arch.beta.copy_(torch.tensor([[-3.0, 3.0]] * len(arch.beta)))
        for node, p in (((16, 5), 0.9), ((32, 6), 0.4)):    # 0.36 against 1/4 of (16, 1), (32, 2)
            row = arch.keys["beta"].index(node)
            arch.beta[row] = torch.tensor([p, 1 - p]).log()
        arch.alpha[:, 1] = 1.0
        arch.alpha[arch.keys["alpha"].index((32, 5))] = torch.tensor([9.0, 0, 0, 0, 0])
        arch.gamma[arch.keys["gamma"].index((32, 6)), 1] = 1.0          # the wider of two
    cells = fastersg.derive(arch.draw(arch.likeliest()), cfg, fastersg.STUDENT, (32,)).branches[32]
    assert [(c.rate, c.layer, c.chi) for c in cells if c.down] == [(8, 4, 1), (16, 5, 2)]


def test_fastersg_gumbel_softmax_is_torchs():
    """On the same noise: values, which are hard, and gradients, which are not."""
    arch = fastersg.ArchParameters(tiny(tau=0.7))
    torch.manual_seed(0)
    nn.init.normal_(arch.gamma)
    torch.manual_seed(5)
    noise = torch.empty(arch.gamma.shape).exponential_()    # F.gumbel_softmax takes -log of it
    with mock.patch.object(torch, "rand", lambda *shape: torch.exp(-noise)):
        ours = arch.gumbel()
    torch.manual_seed(5)
    theirs = F.gumbel_softmax(F.log_softmax(arch.gamma, 1), tau=0.7, hard=True)
    assert torch.allclose(ours, theirs, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), arch.gamma)[0] for y in (ours, theirs)]
    assert grads[0].abs().max() > 1e-3 and torch.allclose(*grads, atol=1e-6)


class Batches(list):
    """A loader of given batches."""
    class sampler:
        set_epoch = staticmethod(lambda epoch: None)


def test_fastersg_each_update_moves_what_appendix_f_says():
    """Each pass of pretraining and of the four updates: whose, at which widths, on which data; and
    what has moved since the one before."""
    cfg = tiny(widths=(1, 2, 3), pretrain_epochs=1, search_epochs=1, search_steps=1)
    torch.manual_seed(0)
    net = fastersg.Supernet(cfg, 7)
    teacher, student = fastersg.ArchParameters(cfg), fastersg.ArchParameters(cfg)
    everything = nn.ModuleDict({"W": net, "T": teacher, "S": student})
    table = fastersg.LatencyTable(cfg, made_up_table(cfg), 7)
    a, b = ((torch.randn(2, 3, 32, 64), torch.randint(0, 7, (2, 32, 64))) for _ in range(2))
    passes, states, real_loss = [], [], fastersg.seg_loss

    def note_state():
        states.append({name: p.detach().clone() for name, p in everything.named_parameters()})

    def spy(network, draw, who, images, *rest):
        widths = {int(gamma.argmax()) for gamma in draw.gamma.values()}
        width = "mixed" if len(widths) > 1 else "min" if 0 in widths else "max"
        passes.append(f"{'TS'[who]} {width} {'A' if images is a[0] else 'B'}")
        note_state()
        return real_loss(network, draw, who, images, *rest)
    with (scratch() as out, mock.patch.object(Batches.sampler, "set_epoch") as order,
          mock.patch.multiple(fastersg, seg_loss=spy, end_search_epoch=mock.DEFAULT) as mocks):
        quiet(fastersg.run_search, replace(cfg, out=str(out)), net, teacher, student, table,
              (Batches([a, a]), Batches([b, b]), None))
    assert order.call_args_list == [mock.call(0), mock.call(1), mock.call(1)]   # A; B and A
    note_state()
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        passes[i] += "".join(sorted({" W" if "W" in name else " " + name for name in moved}))
    assert passes == ["T max A", "S min A", "S mixed A", "S mixed A W",     # pretraining
                      "T max A W",                                          # 1
                      "S min A", "S max A", "S mixed A W",                  # 2
                      "T max B T.alpha T.beta",                             # 3
                      "S mixed B S.alpha S.beta S.gamma"]                   # 4
    left = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert abs(left.norm() - 5) < 1e-3                      # of update 2, clipped; 3 and 4 add none
    sgd = mocks["end_search_epoch"].call_args.args[0].parts["sgd"]
    group, = sgd.param_groups
    assert abs(group["lr"] - 0.01 * 0.99 ** 2) < 1e-9                       # App. H
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_fastersg_search_data_are_disjoint_and_validation_is_unseen():
    cfg = tiny(held_out=0.1, image_scale=0.5, search_scale=0.5, seed=5)
    with mock.patch.object(data, "open_set", wraps=data.open_set) as opened:
        classes, loaders = fastersg.search_loaders(cfg)
    assert classes == 11 and opened.call_args.args[3] == "train" and opened.call_count == 1
    parts = [set(loader.sampler.indices) for loader in loaders]
    assert [len(part) for part in parts] == [180, 180, 40] and len(set.union(*parts)) == 400
    assert [loader.sampler.shuffle for loader in loaders] == [True, True, False]
    assert [(loader.sampler.seed, loader.dataset.seed) for loader in loaders] == 3 * [(5, 5)]
    others = fastersg.search_loaders(replace(cfg, seed=6))[1]
    assert parts[2] != set(others[2].sampler.indices)
    assert next(iter(loaders[0]))[0].shape == (2, 3, 32, 64)
    assert next(iter(loaders[2]))[0].shape == (1, 3, 16, 32)            # all of a scene, at 1/2


@torch.no_grad()
def test_fastersg_selection_by_appendix_b():
    """The teacher by the supernet's accuracy, the student by Eq. (5)."""
    torch.manual_seed(0)
    cfg = tiny(target_power=-0.5)
    net, ms = shake_norms(fastersg.Supernet(cfg, 3)).train(), made_up_table(cfg, 3)
    archs = [one_hot_arch(cfg, random.Random(seed)) for seed in (3, 4)]
    loader = [(torch.randn(1, 3, 32, 64), torch.randint(0, 3, (1, 32, 64))) for _ in range(2)]
    found, rows = fastersg.select(cfg, net, *archs, ms, loader)
    assert net.training
    net.eval()
    for who, name, widths in ((TEACHER, "teacher", archs[0].widest()),
                              (STUDENT, "student", archs[1].likeliest())):
        draw, targets = archs[who].draw(widths), {}
        for rates in net.final_sets:
            matrix = common.ConfusionMatrix(3)
            for x, label in loader:
                logits = net(x, draw, who)[net.sets.index(rates)]
                matrix.update(label, sized(logits, (32, 64)).argmax(1))
            targets[rates] = matrix.miou()
            if who == STUDENT:
                small = fastersg.derive(draw, cfg, STUDENT, rates)
                targets[rates] *= (8.3 / fastersg.table_latency(small, ms, 3)) ** 0.5
            assert abs(rows[f"{name} {rates}"]["target"] - targets[rates]) < 1e-9
        best = tuple(found[name].branches)
        assert best == max(targets, key=targets.get)
        derived = rows[name]["derived_miou"]                # one-hot: that of the relaxed network
        assert abs(derived - rows[f"{name} {best}"]["supernet_miou"]) < 1e-3
    alike = mock.patch.object(fastersg, "supernet_miou", lambda *_: dict.fromkeys(net.sets, 0.5))
    with alike:                                             # the fastest, which is not the first
        found, rows = fastersg.select(cfg, net, *archs, ms, loader)
    times = {rates: rows[f"student {rates}"]["table_ms"] for rates in net.final_sets}
    fastest_set = min(times, key=times.get)
    assert tuple(found["student"].branches) == fastest_set != net.final_sets[0]
    assert max(times.values()) < 8.3                        # targets are larger than accuracies


def test_fastersg_random_control():
    """They have the student's latency, and their paths are those that a search can find."""
    cfg, g = tiny(), random.Random(4)
    ms = made_up_table(cfg)
    student = fastersg.random_architecture(cfg, g)
    wanted = fastersg.table_latency(student, ms, 7)
    twins = fastersg.controls(cfg, student, ms, 7)
    assert len({str(arch) for arch in (student, *twins.values())}) == 4
    for twin in twins.values():
        assert abs(fastersg.table_latency(twin, ms, 7) / wanted - 1) <= 0.03

    def path_of(arch):
        return [(s, c.layer) for s, cells in arch.branches.items() for c in cells if c.down]
    paths = collections.Counter()
    for _ in range(1200):
        arch = fastersg.random_architecture(cfg, g)
        paths[tuple(arch.branches), str(path_of(arch))] += 1
    expected = {(8, 16): 400 / 3, (8, 32): 400 / 3, (16, 32): 400 / 7}      # all alike in a set
    assert len(paths) == 3 + 3 + 7
    assert all(abs(n / expected[rates] - 1) < 0.35 for (rates, _), n in paths.items()), paths
    pruned = fastersg.pruned(FORKED, 1, 4)                  # the slimmest width, the student's stem
    text = json.dumps(FORKED.to_json()).replace('"stem_chi": 2', '"stem_chi": 4')
    assert pruned.to_json() == json.loads(re.sub(r"chi=\d", "chi=1", text))


def test_fastersg_says_how_decided_it_is():
    arch = fastersg.ArchParameters(tiny(widths=(2,)))
    with torch.no_grad():
        arch.alpha[:, 0] = 1e-3 + math.log(4)               # (1/2, 1/8, 1/8, 1/8, 1/8)
    _, text = heard(fastersg.print_decidedness, arch)
    assert np.allclose(fastersg.decidedness(arch)["operator"], (0.5, 0.375))
    assert "width" not in text and text.count("UNDECIDED") == 1         # that of the rate


def test_fastersg_logs_what_a_search_epoch_has_found():
    cfg = tiny(pretrain_epochs=1)
    teacher, student = fastersg.ArchParameters(cfg), one_hot_arch(cfg, random.Random(0), **{
        "alpha": [2] * 9, "beta": [1] * 3, "gamma": [0] * 11})
    net, run = mock.Mock(final_sets=fastersg.final_sets(2)), mock.Mock(cfg=cfg, epoch=1)
    net.buffers.return_value = []
    scores = {(8, 16): 0.1, (8, 32): 0.2, (16, 32): 0.6, (8,): 0.9}     # one branch does not count
    table = fastersg.LatencyTable(cfg, made_up_table(cfg), 7)
    with mock.patch.object(fastersg, "supernet_miou", lambda *_: scores):
        fastersg.end_search_epoch(run, net, teacher, student, table, None)
    record = run.end_epoch.call_args.kwargs
    assert abs(record["supernet_miou"] - 0.3) < 1e-9 and record["searching"] is True
    shares = record["student"]["shares"]
    assert {name for name, share in shares.items() if share > 0.99} == {"conv_x2", "stay", "chi 1"}


def test_fastersg_trains_teacher_then_student():
    """Eq. (4) for the student, unless --no-distill; the teacher once, and it stays as it is."""
    batches = Batches([(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)))] * 3)
    images, small = mock.Mock(num_classes=3), fastersg.pruned(FORKED, 1, 4)
    with (scratch() as out,
          mock.patch.object(fastersg, "open_loader", lambda *a, **k: (images, batches)),
          mock.patch.object(common, "open_loader", lambda *a, **k: (images, batches)),
          mock.patch.object(fastersg, "ohem", wraps=fastersg.ohem) as mined,
          mock.patch.object(fastersg, "distillation", wraps=fastersg.distillation) as distilled):
        cfg = fastersg.Config(device="cpu", out=str(out), epochs=1, batch_size=2, lr_decay=0.5)
        archs = {"teacher": FORKED.to_json(), "student": small.to_json()}
        (out / "arch.json").write_text(json.dumps(archs))
        for folder, distill in (("student", True), ("student_alone", False), ("student", True)):
            _, text = heard(fastersg.train, replace(cfg, distill=distill))
            state = common.load_checkpoint(out / folder / "last.pt", ("optimizer",))
            group, = state["optimizer"]["param_groups"]
            assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.005, 0.9, 5e-4)
        assert "teacher: trained already" in text
        assert [call.args[1].requires_grad for call in distilled.call_args_list] == [False] * 6
        teacher = fastersg.restore(replace(cfg, network="teacher"), out / "teacher/best.pt", 3)
        soft = teacher(batches[0][0])
        assert all(torch.equal(call.args[1], soft) for call in distilled.call_args_list)
        kl = float(fastersg.distillation(*distilled.call_args.args).detach())
        last = common.read_log(out / "student", "student")[-1]
        mined = [call.args for call in mined.call_args_list[-3:]]
        seg, *auxiliary = (float(fastersg.ohem(*args).detach()) for args in mined)
        wanted = kl, seg, 0.2 * sum(auxiliary)
        assert np.allclose([last["kl"], last["seg"], last["aux"]], wanted, rtol=1e-5)
        path = out / "student" / "best.pt"
        net = fastersg.restore(cfg, path, 3)
        assert not net.training and net.auxiliary is None
        _refused(lambda: fastersg.restore(replace(cfg, arch="paper"), path, 3), "--arch")


def test_fastersg_figure_3_correlates_table_and_clock():
    cfg = tiny(correlation=5)
    ms, g = made_up_table(cfg, 19), random.Random(cfg.seed)
    archs = [fastersg.random_architecture(cfg, g) for _ in range(5)]
    estimates = [fastersg.table_latency(arch, ms, 19) for arch in archs]
    clock = {i: {"median": 10 / estimate} for i, estimate in enumerate(estimates)}
    with (mock.patch.object(latency, "measure", return_value=clock),
          mock.patch.object(latency, "prepare") as prepared,
          mock.patch.object(common, "draw_lines")):
        found, _ = heard(fastersg.correlate, cfg, ms)
    for call, arch in zip(prepared.call_args_list, archs, strict=True):
        assert str(call.args[0]) == str(fastersg.FasterSeg(arch, 19))
        assert call.args[1] == [(1, 3, *cfg.frame)]
    measured = [t["median"] for t in clock.values()]        # the slower the table, the faster
    r = np.corrcoef(estimates, measured)[0, 1]
    assert -1 < r < -0.9 and abs(found["pearson_r"] - r) < 1e-9
    assert found["table_ms"] == estimates and found["measured_ms"] == measured


def test_fastersg_wrong_input_is_refused():
    for flags, word in (("--pretrain-epochs 0 --search-epochs 0", "no epoch"),
                        ("--stem-chi 3", "--stem-chi"), ("--compile", "compile"),
                        ("--correlation 5", "--bench"), ("--bench --correlation 2", "3 networks"),
                        ("--search-batch 1 --search-size 32 64", "--search-batch"),
                        ("--train --batch-size 1 --size 32 64", "--batch-size"),
                        ("--train --arch paper", "--arch"), ("--eval", "--train"),
                        ("--train --eval --weights x", "--weights")):
        _refused(lambda: fastersg.main(["--search", *flags.split()]), word)
    fastersg.check(tiny(search_batch=1, search_size=(64, 65)), {"search"})  # two values: enough
    with scratch() as out:
        path = out / "arch.json"
        good = json.dumps({"classes": 1, "student": FORKED.to_json()})
        for old, new, word in (("student", "teacher", "student"), ("zoom", "zomo", "zomo"),
                               ("zoom_x2 s=16", "zoom s=8", "rates"), ("chi=2", "chi=0", "chi=0"),
                               ('"32"', '"64"', "64"),
                               ('"stem_chi": 2', '"stem_chi": 0', "stem_chi")):
            path.write_text(good.replace(old, new, 1))
            _refused(lambda: fastersg.load_architecture(str(path), "student"), word)
        path.write_text(good)
        _refused(lambda: fastersg.networks_to_bench(fastersg.Config(arch=str(path))), "classes")


# ---------------------------------------------------------------------------------------------
# fastersg.py: searches whose right answer is known
# ---------------------------------------------------------------------------------------------

PLANT = dict(device="cpu", layers=4, widths=(2, 4), frame=(128, 256), pretrain_epochs=0,
             search_epochs=1, search_steps=60, arch_lr=0.1, lam=1.0)


def modelled_ms(piece):
    """0.02 ms and about its MACs, at 20 G a second."""
    kind, *n = piece
    kernels = {"skip": 1, "conv": 9, "conv_x2": 18, "zoom": 2, "zoom_x2": 4}
    work = sum(n) / 4                                       # stem, up, classifier
    if kind in kernels:
        c_in, c_out, s, stride = n
        work = kernels[kind] * c_in * c_out / (s * stride) ** 2
    return 0.02 + work * 128 * 256 / 20e6


def fastest(cfg, ms, branches):
    """The least latency that a network with these two branches can have, by brute force over paths,
    operators and widths. (A bound: where they part they may even differ in operator.)"""
    chi = cfg.stem_chi

    def cost(*piece):
        return ms[fastersg.entry(piece)]

    def head(s, c):
        if s == 8:
            return cost("classifier", c[8] + 8 * chi, 16 * chi, 7)
        if s == 16:
            return cost("up", 16, c[16], c[8], 8 * chi)
        return cost("up", 32, c[32], c[16], 16 * chi) + head(16, {8: c[8], 16: 16 * chi})

    def behind(l, s, c, stride, ends):
        """The best cell (s, l) of this stride and what follows."""
        choices = [rest(l + 1, s, c, ends)] if stride == 1 else []      # a skip
        for op, width in itertools.product(fastersg.OPERATORS[stride % 2:], cfg.widths):
            c_out, s_out = s * stride * width, s * stride
            follows = rest(l + 1, s_out, tuple({**dict(c), s_out: c_out}.items()), ends)
            choices.append(cost(op, dict(c)[s], c_out, s, stride) + follows)
        return min(choices)

    @functools.cache
    def rest(l, s, c, ends):
        """Of the branches that end at these rates; c: channels of their last maps by rate."""
        if l == cfg.layers:
            return head(s, dict(c)) if ends == (s,) else math.inf
        choices = [behind(l, s, c, 1, ends)]
        if s < 32 and l < cfg.layers - 1:
            choices.append(behind(l, s, c, 2, ends))
            if len(ends) == 2:                              # the second goes down alone
                choices.append(behind(l, s, c, 1, ends[:1]) + behind(l, s, c, 2, ends[1:]))
        return min(choices)
    fixed = cost("stem", chi) + (0.0 if 8 in branches else head(8, {8: 8 * chi}))
    return fixed + rest(0, 8, ((8, 8 * chi),), branches)


def indifferent(*rest):
    """A segmentation loss without gradient."""
    return torch.zeros((), requires_grad=True)


def search_alone(cfg, table, loss, net=None, batches=None):
    """Teacher and student after run_search under another segmentation loss."""
    net, archs = net or nn.Linear(1, 1), [fastersg.ArchParameters(cfg) for _ in range(2)]
    batches = batches or Batches([(torch.zeros(1), torch.zeros(1))] * cfg.search_steps)
    with scratch() as out, mock.patch.multiple(fastersg, seg_loss=loss,
                                               end_search_epoch=mock.DEFAULT):
        quiet(fastersg.run_search, replace(cfg, out=str(out)), net, *archs, table,
              (batches, batches, None))
    return archs


def test_fastersg_planted_fastest_network():
    """With the segmentation loss switched off the search finds the fastest network of the space,
    each pair within 2% of it by brute force; for tables perturbed by 30%, too. (It is a gradient:
    for others it ends further off.)"""
    for stem_chi, sigma, seed in ((4, 0.0, 0), (2, 0.3, 2), (4, 0.3, 2)):
        cfg, g = fastersg.Config(**PLANT, stem_chi=stem_chi), random.Random(seed)
        ms = table_of(cfg, lambda piece: modelled_ms(piece) * math.exp(sigma * g.gauss(0, 1)))
        table = fastersg.LatencyTable(cfg, ms, 7)
        _, student = search_alone(cfg, table, indifferent)
        excess = []
        for arch in (student, fastersg.ArchParameters(cfg)):            # searched, and not
            draw = arch.draw(arch.likeliest())
            for rates in table.final_sets:
                found = fastersg.derive(draw, cfg, STUDENT, rates)
                excess.append(fastersg.table_latency(found, ms, 7) / fastest(cfg, ms, rates) - 1)
        assert min(excess) > -1e-9 and max(excess[:3]) < 0.02 < 0.05 < max(excess[3:]), excess


def test_fastersg_planted_sensitivities():
    """Section 3.2: accuracy wants the slow choices, equally much of operators, rates and widths;
    the latency pulls harder at operators, which it is the most sensitive to. With the weights of
    footnote 1 all three kinds give way; without, operators collapse alone (Figure 4a)."""
    cfg = fastersg.Config(**PLANT, stem_chi=2)
    table = fastersg.LatencyTable(cfg, table_of(cfg, modelled_ms), 7)
    start = fastersg.ArchParameters(cfg)
    table.mean(start.draw(torch.softmax(start.gamma, 1))).backward()
    slow = [p.grad.argmax(1) for p in start.parameters()]

    def shares(alpha, beta, gamma):
        """Mean probability of the slow choices of each kind."""
        return [rows.gather(1, choice[:, None]).mean()
                for rows, choice in zip((alpha, beta, gamma), slow)]

    def accuracy(net, draw, *rest):
        kinds = [torch.stack([*kind.values()]) for kind in (draw.alpha, draw.beta, draw.gamma)]
        return indifferent() - sum(shares(*kinds))
    changes, kept = fastersg.sensitivities(table, cfg), {}
    for decouple, scale in ((True, fastersg.solve_footnote_1(changes)[0]), (False, 1.0)):
        _, student = search_alone(replace(cfg, decouple=decouple, lam=12 / changes[0] / scale),
                                  table, accuracy)
        kept[decouple] = shares(*(torch.softmax(p, 1) for p in student.parameters()))
    operators, rates, widths = kept[False]
    assert operators < 0.05 and rates > 0.9 and widths > 0.5, kept
    assert max(kept[True]) < 0.4, kept


def planted_pictures(distant):
    """Batches of 64x96 pictures in three colours. Local: 16-pixel blocks, the label is the block's
    colour. Distant: grey, in each of two bands a marker; the label is the colour of its band's."""
    g, batches = torch.Generator().manual_seed(0), Batches()
    rows, columns = (2, 1) if distant else (4, 6)
    for _ in range(12):
        label = torch.randint(0, 3, (6, rows, columns), generator=g)
        label = label.repeat_interleave(64 // rows, 1).repeat_interleave(96 // columns, 2)
        image = 3 * F.one_hot(label, 3).permute(0, 3, 1, 2) - 1.5
        if distant:
            marker = torch.zeros(6, 1, 64, 96)
            for b, band in itertools.product(range(6), (0, 32)):
                y, x = (int(torch.randint(0, n, (), generator=g)) for n in (17, 81))
                marker[b, :, band + y:band + y + 16, x:x + 16] = 1
            image = image * marker
        batches.append((image + 0.2 * torch.randn(image.shape, generator=g), label))
    return batches


def test_fastersg_planted_skips_and_reach():
    """Accuracy alone: where the label is the colour below it the search finds skips, where it is
    far away operators with a wide field. Teacher and student each on a supernet of their own that
    nothing has pretrained, so that each of the four updates is needed."""
    cfg = fastersg.Config(device="cpu", layers=4, widths=(2,), stem_chi=2, branches=1, lam=0.0,
                          search_lr=0.1, arch_lr=0.15, pretrain_epochs=0, search_epochs=2,
                          search_steps=9)
    table, found = fastersg.LatencyTable(cfg, made_up_table(cfg, 3), 3), []
    real_loss, real_update = fastersg.seg_loss, fastersg.update_weights

    def one_pass(*rest):                                    # of one width all passes are the same
        real_update(*rest[:-1], rest[-1][-1:])
    for chosen, distant in ((TEACHER, False), (STUDENT, False),
                            (STUDENT, True)):
        def loss(net, draw, who, *rest):
            return (real_loss if who == chosen else indifferent)(net, draw, who, *rest)
        torch.manual_seed(0)
        net = fastersg.Supernet(cfg, 3).train()
        with mock.patch.object(fastersg, "update_weights", one_pass):
            arch = search_alone(cfg, table, loss, net, planted_pictures(distant))[chosen]
        alpha = torch.softmax(arch.alpha.detach(), 1)[:4].mean(0)       # of the cells at 1/8
        reach = alpha @ torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0])
        found.append((float(alpha[0]), float(reach)))
    # At the start, and where a network's W is not trained: skips 0.2 and reach 1.5 to 1.8. Seeds
    # and processors move the reach by 0.15: found are 0.6, 0.6 and 2.1.
    teacher, (near_skips, near_reach), (far_skips, far_reach) = found
    assert teacher[0] > 0.35 and teacher[1] < 1.2, found
    assert near_skips > 0.1 + far_skips and near_reach < 1.2 < 1.5 < far_reach, found


# ---------------------------------------------------------------------------------------------
# fastersg.py as a process
# ---------------------------------------------------------------------------------------------

def test_fastersg_ablations_from_the_command_line():
    """Rows of Table 3 (one branch, one width), Figure 4(a), and the published network elsewhere."""
    with scratch() as tmp:
        out, method = tmp / "runs" / "one", METHODS["fastersg"]
        flags = "--widths", 2, "--branches", 1, "--no-decouple", "--channels-last"
        assert "Table 2" not in call_main(fastersg, "--search", *method.flags(tmp, out), *flags)
        for which in fastersg.NETWORKS:
            arch = fastersg.load_architecture(str(out / "arch.json"), which)
            (cells,) = arch.branches.values()
            assert {cell.chi for cell in cells} <= {2}
        said = call_main(fastersg, "--train", "--eval", *method.flags(tmp, out, train=True),
                         "--arch", "paper", "--no-distill", "--amp")
        assert "student: retrained mIoU on val" in said
        wrong = "--network", "random", "--weights", out / "student_alone/best.pt"
        _refused(lambda: call_main(fastersg, "--eval", *method.flags(tmp, out), *wrong),
                 "--network student")


# ---------------------------------------------------------------------------------------------
# sparsemask.py: networks
# ---------------------------------------------------------------------------------------------


def test_sparsemask_theorems_1_and_2():
    """A stage is the 1x1 convolution of all its inputs, up-sampled and side by side."""
    stage = sparsemask.Decoder({"D1": ("E1", "E2")}, {"E1": 3, "E2": 4}, nn.Identity())
    fine, coarse = torch.randn(2, 3, 8, 12), torch.randn(2, 4, 5, 7)
    side_by_side = torch.cat([fine, sparsemask.f_up(coarse, (8, 12))], 1)
    weight = torch.cat([conv.weight for conv in stage.conv.values()], 1)
    want = stage.norm["D1"](F.conv2d(side_by_side, weight))
    assert torch.allclose(stage({"E1": fine, "E2": coarse}), want, atol=1e-5)


def test_sparsemask_encoder_runs_as_far_as_it_is_read():
    for inputs, stages in ((("E1", "E3"), 3), (("E1", "G"), 9)):
        net = sparsemask.SparseMaskNet({"D1": inputs}, sparsemask.Encoder("mobilenet_v2"), 3, 8)
        assert net(torch.randn(2, 3, 33, 65)).shape == (2, 3, 33, 65)
        assert len(net.encoder(torch.randn(2, 3, 33, 65)).keys() - {"G"}) == stages


def test_sparsemask_f_up_is_interpolate():
    """Also where it is a product of matrices: enlarged four times or more, with a gradient."""
    for cells in ((1, 1), (3, 5), (9, 12), (33, 49)):
        x = torch.randn(1, 2, *cells).double().requires_grad_()
        want = F.interpolate(x, (33, 49), mode="bilinear", align_corners=True)
        weight = torch.randn_like(want)
        slopes = [torch.autograd.grad((y * weight).sum(), x)[0]
                  for y in (want, sparsemask.f_up(x, (33, 49)))]
        assert torch.allclose(sparsemask.f_up(x, (33, 49)), want) and torch.allclose(*slopes)


def test_sparsemask_coarse_cells_lie_where_they_belong():
    """Every 32nd pixel of a ramp, enlarged again, is the ramp: at 32 k + 1 pixels, to which
    pictures of other sizes are padded."""
    class EveryCell(nn.Module):
        def forward(self, images):
            return sparsemask.f_up(images[..., ::32, ::32], images.shape[-2:])

    padded = sparsemask.Padded(EveryCell().eval())
    ramp = torch.arange(144.0).expand(1, 3, 130, 144) + torch.arange(130.0)[:, None]
    logits = padded(ramp)
    assert logits.shape == ramp.shape and not padded.training
    assert torch.allclose(logits[..., :129, :129], ramp[..., :129, :129], atol=1e-3)
    assert all(side % 32 == 1 for side in (*sparsemask.Config.size, *sparsemask.QUICK["size"]))


def dense_net(**options):
    """A Fully Dense Network in float64, BN statistics and affine unlike a fresh one, and w too."""
    torch.manual_seed(1)
    net = sparsemask.FullyDenseNet(sparsemask.Encoder("mobilenet_v2"), 3, 8, **options).double()
    shake_norms(net.decoder)
    for w in net.w.values():
        nn.init.uniform_(w, 0.1, 1)
    return net


def plain_decoder(decoder, features, w):
    """Eq. (4) as it is written: convolution, BN, up-sampling and w one connection at a time."""
    features = dict(features)
    for stage, inputs in decoder.connectivity.items():
        size, total = features["E" + stage[1:]].shape[-2:], 0
        for t, w_t in zip(inputs, w[stage]):
            slot, norm = decoder.slot(stage, t), decoder.link_norm[t]
            z = F.conv2d(decoder.act(features[t]), decoder.conv[t].weight[slot])
            if isinstance(norm, nn.BatchNorm2d):
                z = F.batch_norm(z, norm.running_mean[slot], norm.running_var[slot],
                                 norm.weight[slot], norm.bias[slot], True, norm.momentum)
            total = total + w_t * F.interpolate(z, size, mode="bilinear", align_corners=True)
        features[stage] = decoder.norm[stage](total)
    return decoder.act(features["D1"])


def test_sparsemask_fused_decoder_equals_the_plain_one():
    """Same output, gradients and running statistics."""
    for bn in (True, False):
        fused = dense_net(bn=bn)
        plain = copy.deepcopy(fused)
        plain.decoder.forward = functools.partial(plain_decoder, plain.decoder)
        images = torch.randn(3, 3, 40, 72, dtype=torch.float64)
        pairs = [(fused(images), plain(images))]
        for logits in pairs[0]:
            logits.square().mean().backward()
        for a, b in zip(fused.parameters(), plain.parameters()):
            if a.requires_grad:
                pairs.append((a.grad, b.grad))
        pairs += zip(fused.decoder.buffers(), plain.decoder.buffers())
        for a, b in pairs:
            if a.is_floating_point():                   # not num_batches_tracked
                assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp(min=1)


def test_sparsemask_derived_equals_relaxed():
    """The supernet's output is the pruned network's: with what was dropped at 0 and the rest
    anywhere, with nothing dropped and no BN, under MaskConnect."""
    for options, share in (({}, 0.5), ({"bn": False}, 0.0), ({"k": 2}, 0.5)):
        net = dense_net(**options).eval()
        for w in net.w.values():
            w.data *= torch.rand(w.shape) >= share
        cfg = sparsemask.Config(loss="maskconnect" if "k" in options else "ours")
        inputs = sparsemask.prune(net.connection_weights(), cfg)
        for stage, every in sparsemask.fully_dense(9).items():
            kept = [t in inputs.get(stage, ()) for t in every]
            if cfg.loss == "ours":                      # nor is a stage read that nothing feeds
                net.w[stage].data *= torch.tensor(kept)
        small = sparsemask.inherit(net, inputs)
        folded = common.fold_bn(small)                  # as deployed
        assert isinstance(folded.decoder.norm["D1"], nn.Identity)
        images = torch.randn(2, 3, 33, 70, dtype=torch.float64)
        want = net(images)
        assert torch.allclose(want, small(images), atol=1e-12)
        assert torch.allclose(want, folded(images), atol=1e-10)


def test_sparsemask_maskconnect_takes_k_inputs():
    """The k largest; in training drawn, the larger ones more often."""
    torch.manual_seed(0)
    w = torch.tensor([0.1, 0.7, 0.3], requires_grad=True)
    assert sparsemask.k_inputs(w, 2, False).tolist() == [0, 1, 1]
    draws = torch.stack([sparsemask.k_inputs(w, 2, True) for _ in range(300)])
    assert (draws.sum(1) == 2).all()
    assert draws.mean(0).argsort().tolist() == [0, 2, 1]
    gradient, = torch.autograd.grad(draws[0] @ torch.arange(3.0), w)
    assert gradient.tolist() == [0, 1, 2]               # straight through, to the real w
    # Of many w that are 0, evaluation and pruning take the same.
    assert sparsemask.k_inputs(torch.zeros(4), 2, False).tolist() == [1, 1, 0, 0]
    tied = {"D1": dict.fromkeys(("E1", "E2", "G", "D2"), 0.0)}
    kept = sparsemask.kept_inputs(tied, sparsemask.Config(loss="maskconnect", k=2))
    assert kept == {"D1": ("E1", "E2")}


def test_sparsemask_encoders_are_torchvisions():
    """Without the head, which makes of E_L what torchvision's network says."""
    for name, (strides, channels) in sparsemask.ENCODERS.items():
        with torch.device("meta"):                      # shapes alone
            encoder = sparsemask.Encoder(name)
            images = torch.zeros(2, 3, 64, 96)
        features = encoder(images)
        for l, (stride, c) in enumerate(zip(strides, channels), 1):
            assert features[f"E{l}"].shape == (2, c, 64 // stride, 96 // stride), (name, l)
        sparsemask.undo_last_stride(encoder)            # DeepLab-V3: output stride 16
        assert encoder(images)[f"E{len(strides)}"].shape[-2:] == (4, 6)
        dilated = [m for m in encoder.modules() if getattr(m, "dilation", 1) == (2, 2)]
        assert len(dilated) == {"vgg16": 0, "mobilenet_v2": 3}.get(name, 2)
    images = torch.randn(2, 3, 64, 96)
    for name, deepest, head in (("mobilenet_v2", "E9", "classifier"), ("resnet50", "E5", "fc")):
        net = shake_norms(torchvision.models.get_model(name)).eval()
        with mock.patch.object(common, "classifier", return_value=net):
            encoder = sparsemask.Encoder(name)
        features, want = encoder(images), net(images)
        got = net.get_submodule(head)(encoder.act(features[deepest]).mean((2, 3)))
        assert torch.allclose(got, want, atol=1e-4 * float(want.detach().abs().max()))
        assert torch.equal(features["G"], features[deepest].mean((2, 3), keepdim=True))
        # On MobileNet-V2, E1 is taken before its activation, and stays that way.
        assert bool((features["E1"] < 0).any()) == (name == "mobilenet_v2")


def on_meta(network, **changes):
    """The network of that name for 21 classes, without values: for counts and shapes."""
    with torch.device("meta"):
        return sparsemask.build(sparsemask.Config(network=network, **changes), 21)


def test_sparsemask_decoder_counts():
    """Table 1's decoders to the last parameter, and their MACs at 512x512; Table 2's 7 M."""
    encoder = common.count_macs(on_meta("fdn").encoder, (512, 512))
    for name, params, macs in (
            ("released", 560981, 293928960), ("unet", 164821, 726138880),
            ("sparseacn", 721877, 734855168), ("fdn", 1934293, 1286815744)):
        net = on_meta(name)
        assert sparsemask.decoder_params(net) == params, name
        assert common.count_params(net.encoder) == 2223872                  # 2.22 M
        assert common.count_macs(net, (512, 512)) - encoder == macs, name
    assert sparsemask.decoder_params(on_meta("fcn")) == 26901
    assert sparsemask.decoder_params(on_meta("deeplabv3")) == 653525
    assert {m.dilation[0] for m in on_meta("deeplabv3").aspp.modules()
            if isinstance(m, nn.Conv2d)} == {1, 6, 12, 18}
    moved = on_meta("released", encoder="resnet101", width=512)
    assert 6.8e6 < sparsemask.decoder_params(moved) < 6.9e6


# ---------------------------------------------------------------------------------------------
# sparsemask.py: connectivities
# ---------------------------------------------------------------------------------------------


def test_sparsemask_pruning_rules_against_graph_search():
    """A stage stays if a path leads to it from an encoder feature and from it to D1."""
    def fed(t):
        return t[0] in "EG" or any(fed(s) for s in graph[t])

    def read(t):
        return t == "D1" or any(read(stage) for stage in graph if t in graph[stage])

    rng = random.Random(0)
    for _ in range(300):
        share, graph = rng.choice((0.15, 0.3, 0.6)), {}
        for stage, every in sparsemask.fully_dense(rng.choice((2, 3, 5))).items():
            graph[stage] = tuple(t for t in every if rng.random() < share)
        stages = [stage for stage in graph if fed("D1") and fed(stage) and read(stage)]
        want = {stage: tuple(filter(fed, graph[stage])) for stage in stages}
        assert sparsemask.drop_useless(graph) == want


def test_sparsemask_rule_1_and_its_report():
    cfg = sparsemask.Config()
    w = {"D2": {"E2": 0.9, "G": 0.0009}, "D1": {"E1": 0.001, "E2": 0.0, "G": 0.1, "D2": 0.6}}
    assert sparsemask.prune(w, cfg) == {"D2": ("E2",), "D1": ("E1", "G", "D2")}
    assert sparsemask.decisions(w, cfg) == {
        "kept": 4, "undecided": 1, "smallest_kept_w": 0.001, "largest_dropped_w": 0.0009}
    _refused(lambda: sparsemask.prune({"D1": {"E1": 0.0005}}, cfg), "D1", "--sigma")


def test_sparsemask_golden_case_of_the_release():
    """Its weights before the two extra passes, 27 connections, and after them."""
    golden = {"D9": "G", "D8": "E9 G", "D7": "E7 G", "D6": "E6 G", "D5": "G", "D4": "E6 G",
              "D3": "G", "D2": "E7 G", "D1": "E9 E8 E7 E6 E1 G D2 D3 D4 D5 D6 D7 D8 D9"}
    w = {}
    for stage, every in sparsemask.fully_dense(9).items():
        w[stage] = {t: float(t in golden[stage].split()) for t in every}
    assert sum(map(len, sparsemask.prune(w, sparsemask.Config()).values())) == 27
    assert sparsemask.prune(w, sparsemask.Config(simplify=True)) == sparsemask.RELEASED


def test_sparsemask_extra_passes_of_the_release():
    """D3 goes only where D2 reads all that it reads, and has all its readers."""
    covered = {"D3": ("E4",), "D2": ("E3", "E4"), "D1": ("D3", "D2")}
    assert sparsemask.drop_repeated(covered, 4) == {"D2": ("E3", "E4"), "D1": ("D2",)}
    for stage, inputs in (("D3", ("E4", "G")), ("D2", ("E3", "E4", "D3"))):
        graph = {**covered, stage: inputs}
        assert sparsemask.drop_repeated(graph, 4) == graph
    # D4 is D3 too, for whoever reads that.
    same = {"D4": ("E4",), "D3": ("E4",), "D2": ("E2", "D3"), "D1": ("E1", "D4", "D2")}
    want = {"D4": ("E4",), "D2": ("E2", "D4"), "D1": ("E1", "D4", "D2")}
    assert sparsemask.drop_repeated(same, 4) == want


def test_sparsemask_transfer_matches_by_size():
    mobile, resnet = (sparsemask.ENCODERS[name][0] for name in ("mobilenet_v2", "resnet50"))
    assert sparsemask.transfer(sparsemask.RELEASED, mobile, resnet) == {    # Figure 6
        "D5": ("E5", "G"), "D4": ("E4", "G"), "D1": ("E1", "E4", "E5", "G", "D5", "D4")}
    # No feature at 1/32: what needs one is dropped.
    assert sparsemask.transfer(sparsemask.RELEASED, mobile, resnet[:4]) == {
        "D4": ("E4", "G"), "D1": ("E1", "E4", "G", "D4")}
    # Of two stages of one size the deeper one takes the place; D1 stays D1.
    graph = {"D9": ("E9",), "D8": ("G",), "D2": ("E2",), "D1": ("E1", "D9", "D8", "D2")}
    small = {"D5": ("E5",), "D1": ("E1", "D5")}
    assert sparsemask.transfer(graph, mobile, resnet) == small
    # Where there are more stages of a size, the deepest.
    assert sparsemask.transfer(small, resnet, mobile) == {"D9": ("E9",), "D1": ("E2", "D9")}


def test_sparsemask_random_connectivities():
    generator, others, read = torch.Generator().manual_seed(0), set(), set()
    for i in range(50):
        inputs = sparsemask.connectivity_of(sparsemask.Config(network="random", seed=i))
        assert sparsemask.check_connectivity(inputs, 9, "random") == inputs
        others.update(t[0] for t in inputs.get("D2", ()))   # all may be read
        inputs = sparsemask.connectivity_of(sparsemask.Config(network="random_rule", seed=i))
        for stage in inputs.keys() - {"D1"}:                                # Section 4.2
            assert set(inputs[stage]) <= {"G", "E" + stage[1:]}
            read.update(t[0] for t in inputs[stage])
    assert others == {*"EGD"} and read == {*"EG"}
    drawn = [len(sparsemask.random_connectivity(9, generator)["D1"]) for _ in range(50)]
    assert 8 < np.mean(drawn) < 10, "half of 18"
    for _ in range(6):                                  # 559,104 of the 560,981: the convolutions
        like = sparsemask.random_like(sparsemask.RELEASED, "mobilenet_v2", generator)
        assert abs(sparsemask.link_params(like, "mobilenet_v2") / 559104 - 1) < 0.1


def test_sparsemask_connectivity_files():
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "arch.json")
        for encoder, graph, word in (
                ("vgg16", {"D1": ["E1"], "D6": ["G"]}, "D6"), ("vgg16", ["D1"], "not a connec"),
                ("vgg16", {"D3": ["E2"], "D1": ["D3"]}, "E2"), ("alexnet", {}, "encoder"),
                ("vgg16", {"D3": ["E3"]}, "nothing"), ("vgg16", {"D1": [["E1"]]}, "cannot")):
            path.write_text(json.dumps({"encoder": encoder, "connectivity": graph}))
            _refused(lambda: sparsemask.read_connectivity(path), path, word)


# ---------------------------------------------------------------------------------------------
# sparsemask.py: losses and the search
# ---------------------------------------------------------------------------------------------


def test_sparsemask_balanced_edge_loss():
    """Half the mean over edge pixels and half that over the others, a crop without edges too."""
    logits, labels = torch.randn(2, 2, 4, 5), torch.randint(0, 2, (2, 4, 5))
    labels[0, :2] = 255
    of_pixel = -logits.log_softmax(1)
    edge, other = of_pixel[:, 1][labels == 1].mean(), of_pixel[:, 0][labels == 0].mean()
    for halves in (edge + other, other):
        assert abs(sparsemask.task_loss(logits, labels, "edges") - halves / 2) < 1e-5
        labels[labels == 1] = 255


def test_sparsemask_a_fresh_search():
    """w in the middle, BN's gamma and beta fixed, the paper's learning rates, poly."""
    net = sparsemask.FullyDenseNet(sparsemask.Encoder("mobilenet_v2"), 2, 2)
    assert all((w == 0.5).all() for w in net.used_w().values())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.weight.requires_grad or m.bias.requires_grad for m in norms)
    sgd, schedule = sparsemask.poly_sgd(net, sparsemask.Config(lr_w=0.7), steps=4)
    sgd.step()
    schedule.step()
    named = [name for name, p in net.named_parameters() if p.requires_grad]
    for name, group in zip(named, sgd.param_groups, strict=True):
        rate = {"encoder": 0.005, "w": 0.7}.get(name.split(".")[0], 0.05)
        assert group["momentum"] == 0.9 and group["weight_decay"] == 4e-5
        assert abs(group["lr"] - rate * 0.75 ** 0.9) < 1e-9, name
    for steps, want in ((4, 0.1), (1000, 0.01), (50000, 3e-4)):
        sparsemask.poly_sgd(net, sparsemask.Config(), steps)
        assert norms[-1].momentum == want


class Blocks(nn.Module):
    """In an encoder's place: E_l is channels 8 l - 8 .. 8 l of a picture, every 2^l-th pixel."""
    strides, channels, name, act = (2, 4, 8, 16), (8,) * 4, "blocks", nn.Identity()

    def forward(self, images):
        features = {}
        for l, part in enumerate(images.split(8, 1), 1):
            features[f"E{l}"] = part[..., ::2 ** l, ::2 ** l]
        return {**features, "G": part[..., :1, :1]}


def planted_batch(levels):
    """A batch of noise N(0, 1) in which the label speaks in these E_l only.

    There a map of two classes adds 3 times its one-hot to the first channels. It is the larger of
    two Gaussian fields on a grid of E_l's size; several such maps make one label.
    """
    images, label = torch.randn(8, 40, 33, 33), 0
    for l in levels:
        cells = min(32 // 2 ** l + 1, 9)
        truth = sparsemask.f_up(torch.randn(8, 2, cells, cells), (33, 33)).argmax(1)
        images[:, 8 * l - 8:8 * l - 6] += 3 * F.one_hot(truth, 2).permute(0, 3, 1, 2)
        label = 2 * label + truth
    return images, label


class SparseBatches(list):
    sampler = mock.Mock()


def run_search(net, batches, cfg, epochs=1):
    """A search without data sets or pictures: (connectivity, pruned network, last log record)."""
    sgd, schedule = sparsemask.poly_sgd(net, cfg, epochs * len(batches))
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        run = common.Run("search", "search", cfg, tmp, epochs, model=net,
                         optimizer=sgd, schedule=schedule)
        inputs, small = sparsemask.search_connectivity(net, batches, run, cfg, lambda net: 0.0)
        assert max(schedule.get_last_lr()) == 0, "poly ends at 0 with the last step"
        return inputs, small, common.read_log(tmp, "search")[-1]


def search_planted(levels, shuffled=False, **changes):
    """The encoder features that are read after a search, decisions(w) and w, accuracy."""
    torch.manual_seed(41)
    cfg = sparsemask.Config(device="cpu", lam=0.1, lr_w=0.25, **changes)
    net = sparsemask.FullyDenseNet(Blocks(), 2 ** len(levels), 8, k=changes.get("k", 0))
    batches = SparseBatches(planted_batch(levels) for _ in range(100))
    if shuffled:                                        # there is nothing to find
        batches[:] = [(images, labels.roll(1, 0)) for images, labels in batches]
    inputs, small, _ = run_search(net, batches, cfg)
    read = {t for names in inputs.values() for t in names if t[0] != "D"}
    images, labels = planted_batch(levels)
    right = small(images).argmax(1) == labels
    w = net.connection_weights()
    return read, {"w": w, **sparsemask.decisions(w, cfg)}, right.double().mean()


def test_sparsemask_planted_sources_are_found():
    """The encoder features read after pruning are those in which the label speaks, w is binary."""
    for levels, sources in (((2,), {"E2"}), ((2, 4), {"E2", "E4"})):
        read, told, right = search_planted(levels)
        assert read == sources and right > 0.55, (read, right)
        assert told["kept"] < 13 and told["undecided"] < 4, told
        assert told["largest_dropped_w"] == 0 and told["smallest_kept_w"] > 0.02, told
    assert search_planted((2, 4), shuffled=True)[2] < 0.45


def test_sparsemask_planted_each_half_of_equation_2_is_needed():
    """Table 1, 20 connections: with the task loss alone, or the sparse half alone, nearly all stay
    and w is undecided; the binary half decides. The sparse half brings the mean w of a stage to
    alpha, 2 / |T_l|, where the task loss leaves it elsewhere."""
    read, binary, _ = search_planted((2,), loss="binary")
    assert "E2" in read and binary["kept"] < 13 and binary["smallest_kept_w"] > 0.1, binary
    for loss in ("task", "sparse"):
        told = search_planted((2,), loss=loss)[1]
        assert told["kept"] > 15 and told["smallest_kept_w"] < 0.1, (loss, told)
        w = search_planted((2, 4), loss=loss)[1]["w"]
        off = max(abs(np.mean([*w[stage].values()]) - 2 / len(w[stage])) for stage in ("D2", "D1"))
        assert off < 0.05 if loss == "sparse" else off > 0.08, (loss, off)


def test_sparsemask_planted_l1_and_maskconnect():
    """Figure 5: L1 shrinks all w alike, so that kept and dropped ones are not apart. MaskConnect
    takes k inputs a stage, needed or not, and some with smaller w than others that it drops."""
    l1 = search_planted((2,), loss="l1", l1=5e-3)[1]
    assert 0 < l1["largest_dropped_w"] and l1["smallest_kept_w"] < 0.1, l1
    read, mask, _ = search_planted((2,), loss="maskconnect", k=2)
    assert mask["kept"] == 8 and read > {"E2"} and mask["undecided"] > 5, (read, mask)
    assert mask["smallest_kept_w"] < mask["largest_dropped_w"], mask


def first_step(epochs=1, **changes):
    """A search of one step an epoch: (FullyDenseNet, how it started, last log record)."""
    torch.manual_seed(0)
    cfg = sparsemask.Config(device="cpu", lr_decoder=0.1, weight_decay=0.0, **changes)
    net = sparsemask.FullyDenseNet(Blocks(), 2, 4)
    for w in net.w.values():
        nn.init.uniform_(w, 0.1, 0.9)
    start = copy.deepcopy(net)
    return net, start, run_search(net, SparseBatches([planted_batch((3,))]), cfg, epochs)[2]


def equation_2(w):
    """Its halves and L1 with lambda 0.3 and l1 0.2, of {stage: w_l}."""
    terms = {"binary": 0, "sparse": 0, "l1": 0}
    for w_l in w.values():
        alpha_l = torch.tensor(min(2 / len(w_l), 0.5)).double()
        terms["binary"] += 0.3 * F.binary_cross_entropy(w_l, w_l)
        terms["sparse"] += 0.3 * F.binary_cross_entropy(w_l.mean(), alpha_l)
        terms["l1"] += 0.2 * w_l.sum()
    return terms


def test_sparsemask_search_step_against_equations_2_and_3():
    """The logged terms are Eq. (2) of the w before the step; w moves by its rate times their
    derivative, taken by differences, and the task's."""
    task_alone, _, _ = first_step(loss="task")
    for loss, names in (("ours", {"binary", "sparse"}), ("binary", {"binary"}),
                        ("sparse", {"sparse"}), ("l1", {"l1"})):
        net, start, record = first_step(loss=loss, lam=0.3, l1=0.2)
        w = {stage: w_l.detach().double() for stage, w_l in start.w.items()}
        terms = equation_2(w)
        assert terms.keys() & record.keys() == names
        assert all(abs(record[name] - terms[name]) < 1e-5 for name in names)
        for stage, w_l in w.items():
            moved = net.w[stage] - task_alone.w[stage]
            for j in range(len(w_l)):
                w_l[j] += 1e-6
                higher = equation_2(w)
                w_l[j] -= 1e-6
                slope = sum(higher[name] - terms[name] for name in names) / 1e-6
                assert abs(moved[j] + 0.1 * slope) < 1e-5, (loss, stage, j)


def test_sparsemask_warm_up_and_clamp():
    """Warm-up: w rests and the network learns. Always: w is clamped, and can leave 0 and 1."""
    for epochs, rests in ((1, True), (2, False)):
        net, start, _ = first_step(epochs, warmup=1)
        assert torch.equal(net.w["D1"], start.w["D1"]) == rests
        assert not torch.equal(net.classifier.weight, start.classifier.weight)
    net, _, _ = first_step(epochs=2, lam=50.0)
    assert net.w["D1"].min() == 0 and net.w["D1"].max() == 1

    def ends(w, *_):
        w.data.copy_(torch.arange(len(w)) % 2)              # 0, 1, 0, ..: none is stuck there
    with mock.patch.object(nn.init, "uniform_", ends):
        net, start, _ = first_step(loss="task")
    was, now = (torch.cat([*n.w.values()]) for n in (start, net))
    assert (now[was == 0] > 0).any() and (now[was == 1] < 1).any()


def test_sparsemask_search_trains_through_a_twin():
    """On several GPUs the step runs in a twin of net, which shares its parameters. Here the
    twin's BNs stay plain, as on a CPU synchronised ones refuse to work."""
    def twin_of(net, cfg):
        shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
        twin.side_effect = copy.deepcopy(net, shared)
        return twin

    twin = mock.Mock()
    with mock.patch.object(common, "training_form", twin_of):
        net, _, record = first_step()
    plain, _, want = first_step()
    assert twin.call_count == 1 and record == want
    assert all(map(torch.equal, net.state_dict().values(), plain.state_dict().values()))


# ---------------------------------------------------------------------------------------------
# sparsemask.py: scores, command line
# ---------------------------------------------------------------------------------------------


def test_sparsemask_saliency_scores_threshold_by_threshold():
    """A noisy map, one with nothing where there is something, an empty mask; one rank and two."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (3, 6, 5))
    masks = levels + rng.integers(-90, 90, levels.shape) > 128
    levels[1], masks[2] = 0, False
    one, first, second = (sparsemask.SaliencyScores() for _ in range(3))
    for level, mask, half in zip(levels, masks, (first, second, first)):
        for scores in (one, half):
            scores.update((level / 255).astype(np.float32), mask)
    want = {"F_beta": 0, "MAE": abs(levels / 255 - masks).mean()}
    for k in range(256):
        salient = levels >= k
        hits = (masks & salient).sum((1, 2))
        precision = np.mean(hits / salient.sum((1, 2)).clip(1))
        recall = np.mean((hits / masks.sum((1, 2)).clip(1))[:2])        # the third mask is empty
        f = 1.3 / (1 / (precision + 1e-9) + 0.3 / (recall + 1e-9))      # beta^2 = 0.3
        want["F_beta"] = max(want["F_beta"], f)
    exact = sparsemask.SaliencyScores()
    exact.update(np.array([[1, 0]]), np.array([[1, 0]]))            # a single pixel, and right
    assert np.allclose(list(exact.result().values()), (1, 0))
    for total, more in zip(first.sums, second.sums, strict=True):       # of two ranks
        total += more
    for scores in (one, first):
        for name, value in scores.result().items():
            assert abs(value - want[name]) < 1e-6, name


def test_sparsemask_derived_network_and_ablations():
    """What the search has learned can be evaluated, and is where a training may start."""
    def of_padded(net, *rest):
        assert isinstance(net, sparsemask.Padded)
        asked.append(rest[3:])                          # scales, flip
        return common.evaluate(net, *rest)

    def run(flags, *path):
        return call_main(sparsemask, *base.split(), "--out", tmp, *flags.split(), *path)

    asked, made = [], mock.Mock(wraps=sparsemask.FullyDenseNet)
    with (tempfile.TemporaryDirectory() as tmp,
          mock.patch.object(sparsemask, "evaluate", of_padded),
          mock.patch.object(sparsemask, "FullyDenseNet", made)):
        base = ("--dataset folder --num-classes 3 --size 33 65 --batch-size 4 --width 4 "
                f"--weights-encoder none --data-root {three_classes(tmp, train=2, val=2)}")
        path = Path(tmp, "derived.pt")
        run("--search --search-epochs 1 --loss maskconnect --k 3 --no-bn")
        assert made.call_args.args[-2:] == (False, 3)
        run("--search --search-epochs 2 --lam 0.3")
        for found in common.read_log(tmp, "found"):
            assert found["supernet"] == found["derived"]
        derived = f"val {100 * found['derived']:.2f}"
        assert "derived mIoU on " + derived in run("--eval --weights", path)
        _refused(lambda: run("--eval --network unet --weights", path), "made with --arch")
        with mock.patch.object(common, "fit", side_effect=KeyboardInterrupt) as fit:
            with contextlib.suppress(KeyboardInterrupt):
                run("--train --epochs 2 --init", path)
        run_of_it, _, loader, _ = fit.call_args.args
        assert run_of_it.parts["schedule"].total_iters == 2 * len(loader)   # of two epochs
        state = run_of_it.parts["model"].state_dict()
        learned = common.load_checkpoint(path)["model"]
        assert state.keys() == learned.keys(), "a training starts there"
        assert all(torch.equal(state[key], value) for key, value in learned.items())
        assert "starts anew" in run("--train --epochs 1 --num-classes 4 --init", path)
        for name in ("random_like", "deeplabv3"):
            run("--train --eval --epochs 1 --flip --network", name)
            assert asked[-1] == ((1.0,), True)


def test_sparsemask_refuses_wrong_input():
    for stage, word, wrong in (
            ("train", "--arch", {"arch": "x", "network": "unet"}),
            ("eval", "--init", {"init": "x"}), ("train", "--weights", {"weights": "x"}),
            ("search", "--warmup", {"warmup": 50}),
            ("train", "--image-scale", {"task": "edges", "image_scale": 0.5})):
        cfg = sparsemask.Config(**wrong)
        _refused(lambda: sparsemask.check(cfg, {stage}), word)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        sparsemask.check(sparsemask.Config(size=(129, 256)), {"search"})
    assert "129 256 is not 32 k + 1" in said.getvalue()
    cfg = sparsemask.Config(network="unet", out="/nowhere", split="val")
    _refused(lambda: sparsemask.check_files(cfg, {"eval"}), "/nowhere/unet/best.pt")
    with mock.patch.object(common, "world_size", lambda: 2):
        for flags in ("--search", "--train --network unet"):
            _refused(lambda: sparsemask.main([*flags.split(), "--batch-size", "3"]), "3 of 400")


def test_sparsemask_opens_the_data_of_each_task():
    """Edges have an augmentation of their own."""
    for task, classes in (("segmentation", 11), ("saliency", 2), ("edges", 2)):
        for train in (True, False):
            with mock.patch.object(data, "edge_transform") as of_edges:
                images, loader = sparsemask.open_data(sparsemask.Config(task=task), "val", train)
            used = loader.dataset.transform is of_edges.return_value
            assert images.num_classes == classes and used == (train and task == "edges")


def test_sparsemask_eval_scores_every_map_against_its_own_annotation():
    """A network that knows masks and edges, up to noise; scored picture by picture."""
    for task in ("saliency", "edges"):
        cfg = sparsemask.Config(device="cpu", task=task, thresholds=3, flip=True)
        images = common.open_split(cfg, "val", task)
        loader = data.make_loader(images, [3, 1], data.eval_transform(), 1, False)
        maps = [torch.rand(1, 1, *labels.shape[-2:]) + (labels == 1) for _, labels in loader]
        answers = iter([each for drawn in maps for each in (drawn, drawn.flip(-1))])

        def knowing(pixels):
            foreground = next(answers)
            return torch.cat([torch.zeros_like(foreground), foreground], 1)
        with mock.patch.object(common, "sum_over_ranks", wraps=common.sum_over_ranks) as summed:
            scores = sparsemask.map_scores(cfg, knowing, images, loader)
        assert summed.call_count == 2
        one_by_one = sparsemask.SaliencyScores() if task == "saliency" else data.EdgeScores(3)
        for i, drawn in zip((3, 1), maps):
            likely = torch.sigmoid(drawn[0, 0]).double().numpy()
            if task == "edges":
                one_by_one.update(data.edge_nms(likely), images.annotations(i))
            else:
                one_by_one.update(likely, images[i][1])
        want = one_by_one.result()
        assert all(abs(scores[name] - want[name]) < 1e-6 for name in want), (scores, want)
        assert min(want.values()) > 0.05


# ---------------------------------------------------------------------------------------------
# bilevel_prune.py
# ---------------------------------------------------------------------------------------------


def with_masks(net):
    """The network with a soft mask of 1 on every channel; attention, zero at first, works."""
    for mask in net.masks.values():
        mask.start(0.5, 1)
    for module in net.modules():
        if isinstance(module, bilevel_prune.Attention):
            nn.init.ones_(module.project.norm.weight)
    return net.to(bilevel_prune.weights_of(net)[0].dtype)


def test_bilevel_counts_of_topformer_and_deeplab():
    for name, classes, width, parameters, macs in (
            ("tiny", 150, 512, 1389654, 534110208),
            ("small", 150, 512, 3034662, 1112297472),
            ("base", 150, 512, 5062646, 1752203264),
            ("super", 150, 512, 10345958, 4101214208),
            ("base_cityscapes", 19, 1024, 4839667, 2697003008),
            ("deeplab", 19, 1024, 2263139, 9490180608)):
        net = bilevel_prune.build(name, classes)
        assert common.count_params(net) == parameters, name
        assert common.count_macs(net, (512, width)) == macs, name
    x, tiny = torch.randn(2, 3, 70, 100), bilevel_prune.build("tiny", 19)
    assert tiny(x).shape == (2, 19, 9, 13) and net(x).shape == (2, 19, 18, 25)
    assert all(layer.conv.dilation == (1, 1) for layer in bilevel_prune.layers_of(tiny))


@torch.no_grad()
def test_bilevel_masked_network_equals_pruned_network():
    """Derived = relaxed for all layer types, odd pictures and masks down to one channel, where all
    soft masks are below tau; in training too, where BN sees the batch. The pruned network comes
    from its files alone."""
    torch.manual_seed(0)
    for name, size, largest in (
            ("tiny", (66, 97), 1.0), ("small", (64, 72), 0.5), ("deeplab", (33, 38), 1.0)):
        net = with_masks(shake_norms(bilevel_prune.build(name, 5)))
        area = bilevel_prune.areas(net, size)
        for mask in net.masks.values():
            mask.s.copy_(largest * torch.rand(mask.n) if torch.rand(()) < 0.75 else torch.ones(()))
        pruned, x = bilevel_prune.prune(net.double()), torch.randn(2, 3, *size).double()
        with scratch() as tmp:
            bilevel_prune.write_arch(pruned, tmp)
            small = bilevel_prune.build(*bilevel_prune.load_arch(tmp / "arch.json"))
        macs = bilevel_prune.macs_of(area, bilevel_prune.counts_left(net))
        assert macs == common.count_macs(small, size), name
        small.double().load_state_dict(pruned.state_dict())
        with mock.patch.object(F, "dropout2d", lambda x, *rest: x):
            for training in (False, True):
                want = net.train(training)(x)
                apart = (want - small.train(training)(x)).abs().max()
                assert apart < 1e-9 * want.abs().max(), (name, training)


def test_bilevel_threshold_and_straight_through():
    mask = bilevel_prune.Mask(4)
    mask.start(0.5, 1)
    mask.s.data = torch.tensor([0.9, 0.5, 0.4, 0.1])
    b = mask.binary()
    assert b.tolist() == [1, 0, 0, 0]                   # Eq. (2): s = tau is pruned
    (b * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert mask.s.grad.tolist() == [1, 2, 3, 4]         # Eq. (3), pruned or not
    mask.least = 2
    assert mask.binary().tolist() == [1, 1, 0, 0]
    mask.choose(torch.tensor([1, 3]))                   # for good: tau decides, whatever s is
    assert mask.binary().tolist() == [0, 1, 0, 1]


class Sandwich(bilevel_prune.Network):
    """Three layers; that in the middle has masks and two of its six channels pruned. With ReLU and
    an L1 loss piecewise linear in each layer."""

    def __init__(self):
        super().__init__("sandwich", 5, None)
        torch.manual_seed(0)
        layer, colours, inner = bilevel_prune.Layer, bilevel_prune.fixed(4), self.space("a", 6)
        self.before = layer(colours, colours, 3, norm=False, act=F.relu)
        self.own = layer(colours, inner, 3, norm=False, act=F.relu, mask=True)
        self.after = layer(inner, bilevel_prune.fixed(5), 3, norm=False)
        self.s = with_masks(self.double()).masks["a"].s
        self.s.data[[1, 4]] = 0
        self.x, self.y = torch.randn(4, 4, 8, 8).double(), torch.randn(4, 5, 8, 8).double()

    def forward(self):
        """The loss."""
        return (self.after(self.own(self.before(self.x))) - self.y).abs().mean()


def test_bilevel_implicit_gradient_is_exact_but_for_the_diagonal():
    """Eq. (15) = autograd through one inner step of size lambda on L, of the layer before the mask;
    the step stays on the same linear piece. Approximation 3: - lambda grad2_sw L grad_w L of the
    layers beside it, by autograd, can be as large."""
    net, lam = Sandwich(), 1e-3
    start = {name: p for name, p in net.named_parameters() if name.startswith("own")}
    slopes = torch.autograd.grad(net(), list(start.values()), create_graph=True)
    moved = {name: w - lam * slope for (name, w), slope in zip(start.items(), slopes)}
    exact, = torch.autograd.grad(torch.func.functional_call(net, moved), net.s)
    net.load_state_dict(moved, strict=False)
    first, second, _ = bilevel_prune.mask_gradient(net, net(), 0 * net.s.sum(), lam)
    assert (first - second - exact).abs().max() < 1e-9 * second.max(), (first - second, exact)
    assert ((second > 1e-9) == (net.s == 1)).all()
    for layer, least in ((net.before, 0.1), (net.after, 0.01)):
        slopes = torch.autograd.grad(net(), list(layer.parameters()), create_graph=True)
        left, = torch.autograd.grad(sum((g * g.detach()).sum() for g in slopes), net.s)
        assert lam * left[net.s == 1].norm() > least * second.norm()


def test_bilevel_second_term_decides_an_order_solved_by_hand():
    """Channels a = w + c under L = (b a - y)^2 / 2: with r = b a - y the inner optimum is
    r = (c - y) / (1 + lambda), w = -lambda r, the exact dL/ds (r c - 2 lambda r^2) / (1 + lambda).
    The first term, r c - lambda r^2, lets channel 0 go first; the truth is the opposite."""
    lam, c, r = 0.5, torch.tensor([1.5, 1.0]).double(), torch.tensor([2.0, 1.0]).double()
    y, exact = c - (1 + lam) * r, (r * c - 2 * lam * r ** 2) / (1 + lam)
    net = bilevel_prune.Network("by hand", 2, None)
    net.layer = bilevel_prune.Layer(bilevel_prune.fixed(1), net.space("a", 2), norm=False)
    mask = with_masks(net.double()).masks["a"]
    net.layer.conv.bias.data.copy_(-lam * r)
    a = net.layer(torch.zeros(1, 1, 1, 1).double()).flatten() + c
    loss = (mask.binary() * a - y).square().sum() / 2
    first, second, _ = bilevel_prune.mask_gradient(net, loss, 0 * mask.s.sum(), lam)
    assert torch.allclose(first, r * c - lam * r ** 2) and first[0] > first[1]
    assert torch.allclose(first - second, (1 + lam) * exact) and exact[0] < exact[1]


def test_bilevel_eulers_identity_and_pruned_channels_keep_their_weights():
    """grad_s L = gamma dL/dgamma + beta dL/dbeta for kept channels behind BN and ReLU; pruned ones
    have a gradient that can call them back, and neither decay nor momentum moves their weights.
    Squares are summed over the layers that share a mask."""
    torch.manual_seed(0)
    net = with_masks(shake_norms(bilevel_prune.build("tiny", 3)).double().train())
    optimizer = torch.optim.SGD(bilevel_prune.weights_of(net), 0.01, 0.9, weight_decay=0.1)
    for s in (1.0, 0.3):                                # momentum exists when the masks fall
        for mask in net.masks.values():
            mask.s.data[::2] = s
        before = {p: p.detach().clone() for p in bilevel_prune.weights_of(net)}
        net.zero_grad()
        net(torch.randn(2, 3, 64, 64).double()).square().mean().backward()
        with bilevel_prune.pruned_weights_kept(net):
            optimizer.step()
    for mask in net.masks.values():
        assert mask.s.grad[::2].any()
    row, mask = net.rows[4], net.masks["row4"]
    want = sum(p.grad.reshape(mask.n, -1).square().sum(1)
               for layer in (row.expand, row.depth) for p in layer.parameters())
    assert torch.allclose(bilevel_prune.squared_gradients(net)[mask], want)
    gamma, beta = row.depth.norm.parameters()
    euler = before[gamma] * gamma.grad + before[beta] * beta.grad
    assert torch.allclose(mask.s.grad[1::2], euler[1::2], atol=1e-12)
    for layer in bilevel_prune.layers_of(net):
        out = bilevel_prune.gate(layer.out, "cpu").bool()
        for p in layer.parameters():
            same = (p == before[p]).reshape(len(p), -1).all(1)
            assert same[~out].all(), "pruned"
            assert p.ndim == 1 or not same[out].any(), "kept"
    weight = row.expand.conv.weight
    assert torch.equal(weight[:, ::2], before[weight][:, ::2]), "what reads pruned channels"


def test_bilevel_first_term_vanishes_at_an_inner_optimum_but_for_decay():
    """By Euler's identity grad_s L of frozen features, scaled, shifted, is -mu (gamma^2 + beta^2)
    where gamma and beta are optimal under a decay of mu, and 0 without: section 5 relies on it.
    Here least squares, solved by hand."""
    torch.manual_seed(0)
    features, y = torch.randn(2, 400, 6).double()
    features = (features - features.mean(0)) / features.std(0, correction=0)
    for mu in (0.0, 1e-2):
        net = bilevel_prune.Network("scaled", 3, None)
        net.layer = bilevel_prune.depthwise(net.space("a", 6), 1)
        net.layer.conv.weight.data.fill_(1)
        gamma, beta = with_masks(net.double()).layer.norm.parameters()
        gamma.data = (features * y).mean(0) / (1 + mu)
        beta.data = y.mean(0) / (1 + mu)
        distance = net.layer(features[..., None, None]).flatten(1) - y
        loss, none = distance.square().sum(1).mean() / 2, 0 * net.masks["a"].s.sum()
        first, *_ = bilevel_prune.mask_gradient(net, loss, none, 1.0)
        assert torch.allclose(first, -mu * (gamma ** 2 + beta ** 2), rtol=0.01, atol=1e-6)


def test_bilevel_macs_term_pulls_alike_at_any_size():
    """A mask of mean cost that the loss ignores falls from 1 to tau in a third of 300 steps, with
    momentum, whatever beta; dear ones faster by the root of their cost."""
    net = with_masks(bilevel_prune.build("tiny", 5))
    for frame in ((512, 1024), (64, 128)):
        area = bilevel_prune.areas(net, frame)
        dense = bilevel_prune.macs_of(area, {})
        value = bilevel_prune.regularizer(net, area, dense / 2)
        assert abs(value.item() / (8.2 / 2) ** 2 - 1) < 1e-6
    pull = torch.cat(torch.autograd.grad(value, [mask.s for mask in net.masks.values()]))
    assert pull.max() > 250 * pull.min()
    # Without a pull at the pace of the paper's beta; next to the dense as if a tenth had to go.
    for beta, share, pace in ((0.01, 0.5, 0.01), (1.0, 0.5, 1.0), (0.0, 0.5, 0.01),
                              (0.01, 1.0, 0.01 / 5)):
        cfg = bilevel_prune.Config(beta=beta)
        rates = bilevel_prune.mask_rates(net, area, share * dense, 300, cfg)
        falls = rates * pace * pull * 100 / (1 - 0.9)
        assert torch.allclose(falls, 0.5 * (pull / pull.mean()).sqrt())


def test_bilevel_choice_meets_the_target_and_keeps_the_best():
    torch.manual_seed(0)
    for name, scope, round_to, share in (
            ("super", "all", 8, 0.12), ("tiny", "all", 3, 0.3), ("tiny", "pyramid", 8, 0.6)):
        cfg = bilevel_prune.Config(scope=scope, round_to=round_to, target=share)
        net = bilevel_prune.build(name, 5)
        for mask, least in bilevel_prune.prunable(net, cfg).items():
            mask.start(0.5, least)
        masks, area = bilevel_prune.masks_of(net), bilevel_prune.areas(net, (64, 128))
        target = bilevel_prune.target_of(cfg, net, area)
        scores = {mask: torch.rand(mask.n) for mask in masks.values()}
        bilevel_prune.choose(net, scores, area, target, cfg)
        assert 0.99 <= bilevel_prune.share_left(net, area) / share <= 1
        for key, mask in masks.items():
            b, left = mask.binary() == 1, int(mask.binary().sum())
            assert torch.equal(b, scores[mask] >= scores[mask].topk(left).values[-1])
            assert key.startswith("heads") or left in (mask.n, left // round_to * round_to)
    assert " ".join(masks) == "c2 row1 c4 row2 row3 c8 row4 row5 c16 row6 row7 c32 row8"


def test_bilevel_ranking_by_hand():
    """An element of a costs 10, two at a time, one of b costs 1. 21 are left at least; then come 20
    for a (score 0.65), 1 for b (0.5), 20 for a (0.25), 1 for b (0.2), 10 for a, 1 for b (0.05)."""
    a, b = bilevel_prune.Mask(7), bilevel_prune.Mask(4)
    a.start(0.5, 2), b.start(0.5, 1)
    layers = [bilevel_prune.Layer(bilevel_prune.fixed(1), ((mask, 1),)) for mask in (a, b)]
    scores = {a: torch.tensor([0.3, 0.7, 0.9, 0.6, 0.8, 0.2, 0.1]),
              b: torch.tensor([0.05, 0.5, 0.95, 0.2])}
    for target, want in ((43, {a: 4, b: 3}), (53, {a: 4, b: 4})):   # 53: a's 10 not without its 20
        assert bilevel_prune.best_counts(scores, dict(zip(layers, (10, 1))), target) == want


def test_bilevel_baseline_scores():
    torch.manual_seed(0)
    net = with_masks(bilevel_prune.build("tiny", 5))
    row3 = net.masks["row3"]
    for layer in (net.rows[3].expand, net.rows[3].depth):
        layer.conv.weight.data[5] *= 100
        layer.norm.weight.data[7] = -100
    for method, best in (("slimming", 7), ("magnitude", 5), ("uniform", 5)):
        scores = bilevel_prune.scores_of(method, net)
        assert int(scores[row3].argmax()) == best, method
        for mask in (row3, net.masks["heads0"]):            # none is above the others by its kind
            assert abs(scores[mask].mean() - 1) < 1e-5 or method != "magnitude"
    for mask, ranks in scores.items():                  # uniform: the same share everywhere
        assert torch.allclose(ranks.sort().values, torch.arange(1 - mask.n, 1) / mask.n)
    # Shared masks gather from every layer that writes them: c8 of rows 3 and 4, and its quarter of
    # the residual stream of the blocks; a head from all its rows.
    layers = bilevel_prune.layers_of(net)
    rows = bilevel_prune.by_mask(layers, lambda layer: torch.ones(layer.conv.out_channels))
    assert rows[net.masks["c8"]].shape == (32, 2 + 2 * 4)
    assert rows[net.masks["heads0"]].shape == (4, 16 + 16 + 32)


class Planted(bilevel_prune.Network):
    """Three 1x1 layers over three colours, a noise and a constant channel. Of each layer's channels
    the first 8 are a teacher's, which made the labels. The others are of no use: 3 read noise
    alone, 3 the constant, 3 are read by nobody. Their filters are six times larger."""
    KINDS = [0] * 8 + [1] * 3 + [2] * 3 + [3] * 3       # useful, noise, constant, dead
    # What each kind reads of each.
    READS = torch.tensor([[1, 0.05, 0.05, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])

    def __init__(self):
        super().__init__("planted", 5, None)
        into, read = bilevel_prune.fixed(5), [0, 0, 0, 1, 2]
        self.layers = nn.Sequential()
        for i in range(3):
            out = self.space(f"planted{i}", 17)
            layer = bilevel_prune.Layer(into, out, act=F.relu, mask=True)
            filters = self.wire(layer, self.KINDS, read)
            filters /= filters.abs().sum(1, keepdim=True)
            filters[8:] *= 6
            self.layers.append(layer)
            into, read = out, self.KINDS
        self.classify = bilevel_prune.Layer(into, bilevel_prune.fixed(5), norm=False)
        self.wire(self.classify, [0] * 5, read)
        self.area = {layer: 64 for layer in bilevel_prune.layers_of(self)}
        self.target = bilevel_prune.macs_of(self.area, dict.fromkeys(self.masks.values(), 8))

    def wire(self, layer, wrote, read):
        """What is not read stays so: no gradient. Returns the filters."""
        strength = self.READS[wrote][:, read, None, None]
        layer.conv.weight.register_hook(lambda g: g * (strength > 0))
        return layer.conv.weight.data.mul_(strength)

    def forward(self, x):
        return self.classify(self.layers(x))

    def useless_kept(self):
        """Share of the useless channels that are still there."""
        return torch.cat([mask.binary()[8:] for mask in self.masks.values()]).mean().item()


@functools.cache
def trained_planted():
    """(state of a network trained a little, 120 batches with the teacher's labels)."""
    torch.manual_seed(2)
    net, pairs = Planted(), []
    teacher = with_masks(copy.deepcopy(net))
    for mask in teacher.masks.values():
        mask.choose(torch.arange(8))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
    for x in torch.randn(120, 8, 5, 8, 8):
        x[:, 4] = 1
        logits = teacher(x).detach()
        labels = (logits - logits.mean((0, 2, 3), keepdim=True)).argmax(1)
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
        pairs.append((x, labels))
    return net.state_dict(), pairs


def planted():
    net = Planted()
    net.load_state_dict(trained_planted()[0])
    return net


class MaskBatches(list):
    """A loader of fixed (images, labels), the same in every epoch."""
    sampler = mock.Mock()


def learnt(net, batches=120, pruned=(), **settings):
    """learn() on these batches, one epoch unless told; returns (settings, log). pruned: channels of
    the first layer that are so from the start."""
    cfg = bilevel_prune.Config(**{"search_epochs": 1, "settle": 0.0, "lr": 0.02,
                                  "weight_steps": 1, "device": "cpu", **settings})
    loader = MaskBatches(trained_planted()[1][:batches])
    with scratch() as tmp:
        run = bilevel_prune.run_of_search(cfg, net, loader, tmp)
        net.masks["planted0"].s.data[list(pruned)] = 0.3
        quiet(bilevel_prune.learn, run, net, loader, net.area, net.target, lambda net: 0.0)
        return cfg, common.read_log(tmp, "search")


def test_bilevel_mask_step_moves_masks_only_and_by_eq_15():
    """Batches 0 and 2 for the weights, at a rate of nothing, 1 and 3 for the masks; then by hand:
    v = 0.9 v + first - second + pull, s -= rate (1 - i / 4)^0.9 v."""
    net, plain, steps = planted(), with_masks(planted()), []
    sgd_step = torch.optim.SGD.step
    with mock.patch.object(torch.optim.SGD, "step", autospec=True,
                           side_effect=lambda sgd: steps.append(sgd) or sgd_step(sgd)):
        cfg, (record,) = learnt(net, 4, lr=1e-12, weight_decay=0.0, lam=0.7, beta=0.1)
    assert steps[0] is steps[2] is not steps[1] is steps[3] and len(steps) == 4
    for p, q in zip(bilevel_prune.weights_of(plain), bilevel_prune.weights_of(net)):
        assert (p - q).abs().max() < 1e-6
    rates = bilevel_prune.mask_rates(plain, plain.area, plain.target, 2, cfg)
    v, s, before = 0, torch.ones(51), None
    for i, row in zip((1, 3), record["mask_steps"]):
        images, labels = trained_planted()[1][i]
        loss = F.cross_entropy(plain(images), labels)
        reg = 0.1 * bilevel_prune.regularizer(plain, plain.area, plain.target)
        first, second, pull = bilevel_prune.mask_gradient(plain, loss, reg, 0.7)
        v = 0.9 * v + first - second + pull
        s = s - rates * (1 - i / 4) ** 0.9 * v
        for mask, values in zip(plain.masks.values(), s.split(17)):
            mask.s.data.copy_(values)
        lengths = [(rates * part).norm() for part in (first, second, pull)]
        want = [second.norm() / first.norm(), lengths[2] / sum(lengths)]
        if before is not None:
            want.append(F.cosine_similarity(first - second, before, dim=0))
        got = [row[key] for key in ("second / first", "pull", "cosine") if key in row]
        assert np.allclose(got, want, rtol=1e-3, atol=1e-3)
        before = first - second
    assert torch.allclose(torch.cat([mask.s for mask in net.masks.values()]), s, atol=1e-3)
    assert abs(record["mask_gradient"] / (first.norm() + second.norm()) - 1) < 1e-3


def test_bilevel_search_starts_from_a_given_dense_network():
    given, net = (bilevel_prune.build("tiny", 3) for _ in range(2))
    with scratch() as tmp:
        torch.save({"model": given.state_dict()}, tmp / "best.pt")
        bilevel_prune.start(bilevel_prune.Config(device="cpu", dense=str(tmp / "best.pt")), net)
    agree(net.state_dict(), given.state_dict())


def test_bilevel_training_ends_with_its_schedule():
    cfg = bilevel_prune.Config(device="cpu", size=(32, 32), batch_size=8, epochs=3)
    net = bilevel_prune.build("tiny", 11)
    run, _, loader, _ = bilevel_prune.training_of(cfg, net, "x", "train", "x")
    assert run.parts["schedule"].total_iters == 3 * len(loader)


def test_bilevel_says_when_the_target_is_missed():
    net = with_masks(bilevel_prune.build("tiny", 3))
    area = bilevel_prune.areas(net, (64, 64))
    for share, word in ((0.98, "): NOT met"), (0.995, "): met"), (1.02, "): NOT met")):
        with scratch() as tmp, mock.patch.object(bilevel_prune, "draw_search"):
            run = mock.Mock(cfg=bilevel_prune.Config(), folder=tmp)
            target = bilevel_prune.macs_of(area, {}) / share
            _, said = heard(bilevel_prune.finish, run, net, area, target, lambda net: 0.0)
        assert word in said, said


def test_bilevel_methods_choose_after_the_same_epoch():
    for method in bilevel_prune.METHODS[:-1]:
        net, l1 = planted(), 0.0
        for layer in net.layers:
            layer.norm.weight.data[0] *= -1
            l1 += 1e-4 * layer.norm.weight.abs().sum().item()
        _, log = learnt(net, 8, method=method, search_epochs=3, settle=0.34)
        steps = [len(record["mask_steps"]) for record in log]
        assert steps == ([4, 4, 0] if method == "bilevel" else [0, 0, 0])
        assert log[1]["widths"] == log[2]["widths"] != net.widths()
        assert method == "bilevel" or log[0]["widths"] == net.widths()
        if method == "slimming":
            assert abs(log[0]["l1"] / l1 - 1) < 0.01 and "l1" not in log[2]


SLOW = {"lam": 100.0, "mask_lr": 1e-4}                  # no mask is ever tried at 0


def test_bilevel_planted_useless_channels_are_found():
    """Magnitude keeps most of them, the paper's method none: 60 mask steps, lambda 10, with which
    the second term outweighs the batch's noise. Where no mask is ever tried at 0, the first term
    has mean zero and ranks by noise, the second alone finds the useless."""
    for settings, least, most in (
            ({"method": "magnitude"}, 0.8, 1.0),
            ({"lam": 10.0}, 0.0, 0.0),
            (SLOW, 0.0, 0.1),
            ({"implicit": False, **SLOW}, 0.3, 1.0)):
        net = planted()
        learnt(net, **settings)
        assert least <= net.useless_kept() <= most, (settings, net.useless_kept())


def test_bilevel_planted_scaled_filters_mislead_the_second_term():
    """BN takes any scale out of the function, but the gradient goes with 1 / |w|: with useful
    filters 30 times larger and useless ones 1,000 times smaller, noise is ranked above use."""
    net = planted()
    for layer in net.layers:
        layer.conv.weight.data[:8] *= 30
        layer.conv.weight.data[8:] *= 0.001
    learnt(net, **SLOW)
    assert net.useless_kept() > 0.2, net.useless_kept()


def test_bilevel_planted_pruned_channel_comes_back_when_it_matters():
    """Pruned from the start: a useful channel and a dead one, whose filter stays."""
    net = planted()
    filters = net.layers[0].conv.weight.detach().clone()
    learnt(net, 60, pruned=(0, -1), lr=1e-3, beta=0.0, mask_lr=1.0)
    s = net.masks["planted0"].s
    assert s[0] > 0.5 and abs(s[-1] - 0.3) < 1e-6, s
    assert torch.equal(net.layers[0].conv.weight[-1], filters[-1])


def test_bilevel_agreement_of_two_choices():
    a = [torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 1, 1, 0]).bool()]
    b = [torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 0, 0, 0]).bool()]
    assert bilevel_prune.agreement(a, a) == 1
    # 1 in common, 1 by chance, 2 at most; then 1 in common, 0.75 by chance, 1 at most
    assert abs(bilevel_prune.agreement(a, b) - (2 - 1.75) / (3 - 1.75)) < 1e-9
    _refused(lambda: bilevel_prune.agreement(a, b[:1]), "different networks")


# Tensors of the published files, what they are here, and words that older files have.
BLOCK = "backbone.trans.transformer_blocks"
PUBLISHED_NAMES = {
    "backbone.tpm.stem.0.c.weight": "stem.conv.weight",
    "module.backbone.tpm.layer1.conv.0.c.weight": "rows.0.depth.conv.weight",
    "backbone.tpm.layer1.conv.2.bn.bias": "rows.0.project.norm.bias",
    "backbone.tpm.layer2.conv.0.bn.weight": "rows.1.expand.norm.weight",
    "backbone.tpm.layer10.conv.2.c.weight": "rows.9.depth.conv.weight",
    "backbone.tpm.layer3.conv.4.c.weight": "rows.2.project.conv.weight",
    f"{BLOCK}.3.attn.proj.1.bn.weight": "blocks.3.attention.project.norm.weight",
    f"{BLOCK}.2.mlp.dwconv.bias": "blocks.2.mlp.depth.conv.bias",
    "backbone.SIM.1.local_embedding.conv.weight": "injections.0.local.conv.weight",
    "backbone.SIM.2.global_embedding.conv.weight": "injections.1.shift.conv.weight",
    "backbone.SIM.3.global_act.bn.weight": "injections.2.scale.norm.weight",
    "decode_head.linear_fuse.conv.weight": "fuse.conv.weight",
    "decode_head.conv_seg.bias": "classify.conv.bias"}
OLDER = {"tpm": "patch_embed", "SIM": "fuse_blocks", "local_embedding": "to_feat1",
         "global_embedding": "to_feat2", "global_act": "fuse2"}


def test_bilevel_published_checkpoints_load():
    for theirs, ours in PUBLISHED_NAMES.items():
        older = re.sub("|".join(OLDER), lambda m: OLDER[m[0]], theirs)
        assert bilevel_prune.our_name(theirs) == bilevel_prune.our_name(older) == ours
    state = bilevel_prune.build("tiny", 7).state_dict()     # these names are also theirs
    pyramid = {k: v for k, v in state.items() if not k.startswith(("fuse", "classify"))}
    with scratch() as tmp:
        file = tmp / "topformer.pth"
        for given, classes, words in (
                (state, 7, "random: none; not used: none"),
                (state, 9, "random: classify.conv.weight"),
                (pyramid, 7, "random: fuse.conv.weight")):
            torch.save({"state_dict": given}, file)
            net = bilevel_prune.build("tiny", classes)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                bilevel_prune.load_published(net, file)
            assert words in said.getvalue()
            found = net.state_dict()
            assert all(torch.equal(found[key], value) for key, value in pyramid.items())
        small = bilevel_prune.build("small", 7)
        _refused(lambda: bilevel_prune.load_published(small, file), "--network")


@torch.no_grad()
def test_bilevel_mobilenet_weights_reach_the_deeplab_encoder():
    torch.manual_seed(0)
    source = shake_norms(torchvision.models.mobilenet_v2()).features.eval()
    with scratch() as tmp:
        torch.save(source.state_dict(), tmp / "features.pth")
        cfg = bilevel_prune.Config(network="deeplab", init=tmp / "features.pth")
        net = bilevel_prune.dense_network(cfg, 4).eval()
    x = torch.randn(1, 3, 64, 96)                       # as far as the strides agree
    assert torch.allclose(net.rows[:13](net.stem(x)), source[:14](x), atol=1e-5)
    assert torch.equal(net.rows[16].project.conv.weight, source[17].conv[2].weight)
    assert [row.depth.conv.dilation[0] for row in net.rows] == [1] * 14 + [2] * 3


def test_bilevel_architectures_are_checked():
    good = bilevel_prune.build("tiny", 3).widths()
    for network, widths, word in (
            ("huge", good, "no arch.json"),
            ("tiny", {}, "c2"),
            ("tiny", good | {"row3": 49}, "48"),
            ("tiny", good | {"row9": 1}, "row9")):
        value = {"network": network, "classes": 3, "widths": widths}
        with mock.patch.object(common, "read_json", lambda *_: value):
            _refused(lambda: bilevel_prune.load_arch("arch.json"), word)


def test_bilevel_controls_and_sweep_from_the_command_line():
    settings = ("--dataset folder --num-classes 3 --network tiny --size 32 64 --frame 32 64 "
                "--batch-size 4 --weight-steps 1 --target 0.5 --epochs 1 --search-epochs 1")
    with scratch() as tmp, mock.patch.object(bilevel_prune, "SWEEP", {"target": (0.3,)}):
        root, out = three_classes(tmp / "set", 8, 2), tmp / "r"
        arch, other = out / "arch.json", out / "random/arch.json"
        control = ("--method", "random", "--widths", arch, "--target", "0.9", "--round-to", "64")

        def main(*flags):
            return call_main(bilevel_prune, *settings.split(), "--data-root", root, "--out", out,
                             *flags)
        said = main("--sweep")
        assert (out / "sweep.md").read_text() in said
        assert re.search(r"\| target \| 0.3 \| .*% \| (29.[6-9]|30.0)% \|\n", said), said
        main("--search")
        said = main("--search", *control, "--against", out)
        assert re.search(r"kappa -?0\.\d\d ", said) and ": met within 1%" in said, said
        widths = bilevel_prune.load_arch(arch)[2]
        assert bilevel_prune.load_arch(other)[2] == widths
        assert [int(b.sum()) for b in bilevel_prune.kept_in(out)] == list(widths.values())
        (out / "random/pruned.pt").unlink()
        assert "retrained mIoU" in main("--train", "--no-finetune", "--eval", "--arch", other)
        for *flags, word in (
                ("--search", *control, "--network", "small", "--network"),
                ("--search", "--widths", arch, "--method"),
                ("--train", "--method", "dense", "--widths", arch, "--widths"),
                ("--search", "--method", "dense", "prunes nothing"),
                ("--search", "--arch", other, "--arch"),
                ("--eval", "--method", "dense", "--arch", other, "--arch"),
                ("--sweep", "--method", "random", "--sweep"),
                ("--search", "--against", out / "dense", "no finished search"),
                ("--search", "--weight-steps", "9", "--weight-steps"),
                ("--search", "--batch-size", "1", "two values")):
            _refused(lambda: main(*flags), word)


# ---------------------------------------------------------------------------------------------
# mtp.py: networks, counts, surgery
# ---------------------------------------------------------------------------------------------

agree = torch.testing.assert_close          # float64: to 1e-7; also for lists and dicts of tensors
TINY_TASKS = dict(device="cpu", network="deeplabv3_resnet18", cls_size=(32, 32), cls_batch=4,
                  size=(32, 32), batch_size=4, recalibrate=0)


class NarrowResNet(torchvision.models.ResNet):
    """Stages of 8 to 64 channels in place of 64 to 512: small enough for float64 and training."""

    def _make_layer(self, block, planes, *rest, **more):
        return super()._make_layer(block, planes // 8, *rest, **more)


def narrow_classifier(blocks, name, weights="none"):
    kinds = torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck
    return NarrowResNet(kinds[name != "resnet18"], [blocks] * 4)


def narrow(blocks=2):
    """Within this context mtp builds narrow networks, with so many blocks a stage."""
    return mock.patch.object(common, "classifier", functools.partial(narrow_classifier, blocks))


def narrow_net(name, classes, kind=mtp.Segmenter, seed=0):
    """In float64, as after training, in eval mode."""
    torch.manual_seed(seed)
    with narrow():
        return shake_norms(kind(name, classes), seed).double().eval()


@mock.patch.object(copy, "deepcopy", lambda net: net)       # saves half of the time
def test_mtp_networks_have_the_papers_sizes():
    counts = ((58040147, 200573723648), (58040661, 71061387712), (40179797, 49277240192),
              (32880085, 39153503680), (12894163, 103723270144), (46716373, 189710102720))
    for (*about, m, g), (params, macs) in zip(mtp.PAPER_SIZES, counts, strict=True):
        assert mtp.sizes(*about) == (params, macs)
        assert abs(params / 1e6 - m) < 0.01
        assert 0 < g / (macs / 1e9) - 1 < 0.011, "the paper's counter adds BN, ReLU and pooling"
    # with the heads that only training uses
    rates = [conv[0].dilation[0] for conv in mtp.DeepLabDecoder(8, 3).aspp.convs[1:4]]
    assert rates == [6, 12, 18]
    for name, params, prunable_channels in (("deeplabv3_resnet101", 58040661, 16256 + 1536),
                                            ("bisenet_resnet18", 13495935, 1920 + 1536),
                                            ("pspnet_resnet50", 49081578, 7552 + 2560)):
        net = mtp.on_meta(mtp.Segmenter, name, 21)
        assert common.count_params(net) == params
        scales = mtp.gammas(net, mtp.groups_of(net))
        assert sum(map(len, scales)) == prunable_channels


def test_mtp_exact_counts_with_ties_and_least_width():
    low = {"a": torch.arange(40.0), "b": torch.arange(7.0) / 100, "c": torch.arange(53.0)}
    tied = {name: torch.ones(len(score)) for name, score in low.items()}
    for scores in (low, tied):
        a, b, c = mtp.keep_ranked(scores, 33.3, least=0.05).values()
        assert len(a) + len(b) + len(c) == 100 - 33
        a, b, c = mtp.keep_ranked(scores, 94, least=0.05).values()      # all go that may
        assert (len(a), len(b), len(c)) == (2, 1, 3)
        assert b == 6, "the best of a low layer, the last of equals"
    _refused(lambda: mtp.keep_ranked(low, 95, 0.05), "--percentile 95")


def test_mtp_overlap_by_hand():
    a, b = {"x.0": torch.tensor([0, 1, 2, 3])}, {"x.0": torch.tensor([0, 2, 5, 7])}
    assert mtp.overlap(a, a, [prunable("x", 10)]) == (1, 1)
    # 2 of 4; by chance 4 in 10 would agree
    assert mtp.overlap(a, b, [prunable("x", 10)]) == (0.5, (0.5 - 0.4) / (1 - 0.4))


def some_kept(groups):
    return {g.name: (torch.rand(g.width) < 0.6).nonzero()[:, 0] for g in groups}


@torch.no_grad()
def test_mtp_masked_equals_pruned():
    """Derived = relaxed: basic blocks, bottlenecks, all decoders, both tasks, training heads."""
    x = torch.randn(2, 3, 40, 72).double()
    nets = [narrow_net(name, 5) for name in mtp.NETWORKS if "101" not in name]
    nets.append(narrow_net("deeplabv3_resnet50", 7, mtp.Classifier))
    for net in nets:
        groups, before, wide = mtp.groups_of(net), net(x), copy.deepcopy(net)
        kept = some_kept(groups)
        small = mtp.prune(net, groups, kept)
        for g in groups:
            assert small.get_submodule(g.name).out_channels == len(kept[g.name])
            gone = torch.ones(g.width).index_fill(0, kept[g.name], 0).bool()
            # gamma = beta = 0 for removed channels; where there is no BN, their filters are 0
            for conv, bn in g.makers:
                for p in wide.get_submodule(bn or conv).parameters():
                    p[gone] = 0
        assert torch.equal(net(x), before), "the network itself is left alone"
        assert not torch.allclose(wide(x), before, atol=1e-3), "the mask must change something"
        agree(small(x), wide(x))
        if isinstance(net, mtp.Segmenter):
            agree(mtp.deployed(small)(x), wide(x))
            agree(small.train()(x), wide.train()(x))


def test_mtp_rebuilt_from_widths_and_state_alone():
    net = narrow_net("bisenet_resnet18", 4)
    groups = mtp.groups_of(net)
    small = mtp.prune(net, groups, some_kept(groups)).float()
    state, layer = small.state_dict(), "backbone.layer1.0.conv1"
    widths = {g.name: small.get_submodule(g.name).out_channels for g in groups}
    arch = {"network": "bisenet_resnet18", "widths": widths, "classes": 4, "cls_classes": 3}
    with narrow(), tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "arch.json")
        path.write_text(json.dumps(arch))
        assert mtp.read_arch(path, classes=4, cls_classes=3) == arch
        x = torch.randn(2, 3, 48, 64)
        agree(mtp.rebuild(mtp.Segmenter, arch, state, path).eval()(x), small(x))
        _refused(lambda: mtp.read_arch(path, classes=4, cls_classes=5), "3 classes", "has 5")
        for key, wrong in (("network", "resnet"), ("classes", "3"), ("widths", None),
                           ("widths", {**widths, layer: 0}), ("widths", {**widths, layer: 9})):
            path.write_text(json.dumps({**arch, key: wrong}))
            _refused(lambda: mtp.read_arch(path), path, key.rstrip("s"))
        common.write_json(path, {**arch, "widths": {**widths, layer: 1}})
        assert mtp.read_arch(path)["widths"][layer] == 1    # the least that fits
        widths[layer] += 1
        _refused(lambda: mtp.rebuild(mtp.Segmenter, arch, state, path), layer)


@torch.no_grad()
def test_mtp_bisenet_decoder_written_out():
    """BiSeNet's Figure 2, step by step."""
    net = narrow_net("bisenet_resnet18", 5)
    x = torch.randn(1, 3, 64, 96).double()
    d, maps = net.decoder, mtp.features(net.backbone, x)

    def up(y, factor):
        return F.interpolate(y, scale_factor=factor, mode="bilinear")

    def mean(y):
        return y.mean((2, 3), keepdim=True)

    def refined(arm, y):
        y = arm.conv(y)
        return y * torch.sigmoid(arm.gate[2](arm.gate[1](mean(y))))
    context = d.context[1:](mean(maps[3]))
    low = d.refines[0](up(refined(d.arms[0], maps[3]) + context, 2))
    high = d.refines[1](up(refined(d.arms[1], maps[2]) + low, 2))
    fused = d.fuse(torch.cat([d.spatial(x), high], 1))
    gate = torch.sigmoid(d.gate[3](torch.relu(d.gate[1](mean(fused)))))
    agree(net(x), up(d.classifier(d.head(fused * (1 + gate))), 8))


@torch.no_grad()
def test_mtp_dilated_backbones():
    """PSPNet's rates; DeepLabV3's backbone computes what the plain one does, and more places."""
    psp = narrow_net("pspnet_resnet50", 3).backbone
    for stage, rate in ((psp.layer2, 1), (psp.layer3, 2), (psp.layer4, 4)):
        assert all(block.conv2.dilation == (rate, rate) for block in stage)
    plain = narrow_net("deeplabv3_resnet18", 3, mtp.Classifier).backbone
    dilated = narrow_net("deeplabv3_resnet18", 3).backbone
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 160, 160).double()
    few, many = mtp.features(plain, x)[-1], mtp.features(dilated, x)[-1]
    assert many.shape[-1] == 10
    agree(many[..., ::2, ::2], few)


# ---------------------------------------------------------------------------------------------
# mtp.py: Algorithm 1
# ---------------------------------------------------------------------------------------------


class Repeated(list):
    """The same K batches every round."""
    sampler = mock.Mock()


def two_parts(backbone, decoder):
    net = nn.Sequential()
    net.backbone, net.decoder = backbone, decoder
    return net


def prunable(part, width):
    """The scales of the second layer of a part."""
    return mtp.Group(part, width, ((f"{part}.0", f"{part}.1"),), ())


def sparse_run(tasks, groups, cfg):
    """train_sparse, in place -> its log and last.pt. Resumed, it has nothing left to do."""
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stdout(io.StringIO()):
        mtp.train_sparse(*tasks, groups, cfg, Path(tmp))
        log = common.read_log(tmp, cfg.method)
        mtp.train_sparse(*tasks, groups, replace(cfg, resume=True), Path(tmp))
        assert common.read_log(tmp, cfg.method) == log
        return log, torch.load(Path(tmp, "last.pt"))


def test_mtp_scalar_problem_converges_to_its_closed_form():
    """min sum (w - p)^2 / 2 + lam (w - q)^2 + (alpha1 + alpha2) |w|; one w ends at 0."""
    p = torch.tensor([1.3, 0.02]).double()
    q = torch.tensor([-0.2, 0.01]).double()
    exact = (p + 0.7 * 2 * q - (0.05 + 0.08)).clamp(min=0) / (1 + 0.7 * 2)
    cfg = mtp.Config(device="cpu", lam=0.7, alpha1=0.05, alpha2=0.08, rounds=30, inner_steps=20,
                     gamma_rate=4.0, search_cls_lr=0.03, search_lr=0.03, weight_decay=0.1,
                     tolerance=1e-4)
    layers = nn.Sequential(nn.Identity(), nn.BatchNorm2d(2)).double()
    nets = two_parts(layers, None), two_parts(copy.deepcopy(layers), None)
    w1, w3 = (net.backbone[1].weight for net in nets)
    batches = Repeated([(torch.zeros(1), torch.zeros(1))] * cfg.inner_steps)
    tasks = (mtp.Task(nets[0], lambda *_: (w1 - p).square().sum() / 2, batches),
             mtp.Task(nets[1], lambda *_: (w3 - q).square().sum(), batches))
    log, last = sparse_run(tasks, [prunable("backbone", 2)], cfg)
    for w in (w1, w3):
        assert (w - exact).abs().max() < 3e-4
    # where w1 has settled, E is -dl_cls/dw1 - alpha1
    agree(last["multipliers"]["0"][0], 1.3 - exact[0] - 0.05, rtol=0, atol=1e-3)
    # line 7: the first round below the tolerance is the last
    gaps = [record["gap"] for record in log]
    assert len(gaps) < 30 and gaps[-1] < 1e-4 <= min(gaps[:-1])
    assert abs(gaps[-1] - (w1 - w3).norm() / w1.norm()) < 1e-12


def test_mtp_line_7_waits_for_the_zeros():
    """W1 = W3 is not enough to stop: they start like that."""
    run, cfg = mock.Mock(values={"mu": 1.0}), mtp.Config(tolerance=1e-4)
    # gap of W1 and W3, zeros among the gammas, whether this is the end
    for gap, zeros, end in ((0, 0, False), (0, 0, False), (0, 1, False), (1, 1, False),
                            (0, 1, True), (0, 2, False)):
        gamma = [(torch.arange(3) >= zeros).float()]
        mtp.end_round(run, gap, [gamma, [], gamma], cfg)
        assert run.values["converged"] == end


def algorithm_1_in_loops(nets, x, y, cfg):
    """Eqs. (6) to (10): SGD by hand on the whole Lagrangian, then a soft threshold -> E, mu."""
    sides = {"mtp": (0, 1), "slimming": (1,), "slimming_cls": (0,)}[cfg.method]
    first_lr, alpha = (cfg.search_cls_lr, cfg.search_lr), (cfg.alpha1, cfg.alpha2)
    velocity, steps = {}, cfg.rounds * cfg.inner_steps
    E = {k: 0.0 for k, _ in nets[0].named_parameters() if k.startswith("backbone")}
    # a tenth of the gap in the first round, at most a tenth of what one step can bear
    mu = 0.1 * (1 - cfg.momentum) / (cfg.inner_steps * max(first_lr)) if len(sides) == 2 else 0

    def gap(k):
        return nets[0].get_parameter(k) - nets[1].get_parameter(k)

    def pull(k):
        return mu / cfg.gamma_rate if k == "backbone.1.weight" else mu

    def lagrangian():
        l_cls, l_seg = (F.cross_entropy(net(x), y) for net in nets)
        total = l_cls + cfg.lam * l_seg
        for k in E:
            total += pull(k) / 2 * gap(k).square().sum() + (E[k] * gap(k)).sum()
        return total

    for start in range(0, steps, cfg.inner_steps):
        for side, i in itertools.product(sides, range(cfg.inner_steps)):
            names, parameters = zip(*nets[side].named_parameters())
            slopes = torch.autograd.grad(lagrangian(), parameters)
            for k, w, slope in zip(names, parameters, slopes):
                lr, threshold = first_lr[side] * (1 - (start + i) / steps), 0
                if k in ("backbone.1.weight", "decoder.1.weight"):
                    lr *= cfg.gamma_rate
                    threshold = lr * alpha[side] / (1 - cfg.momentum)
                else:
                    slope = slope + cfg.weight_decay * w.data
                velocity[side, k] = cfg.momentum * velocity.get((side, k), 0) + slope
                w.data -= lr * velocity[side, k]
                w.data -= w.data.clamp(-threshold, threshold)
        for k in E:
            E[k] = E[k] + pull(k) * gap(k).detach()
        mu = min(cfg.rho * mu, 0.1 / max(first_lr))
    return E, mu


def test_mtp_algorithm_1_against_loops():
    """Weights, gammas, E and mu after four rounds of both tasks, and of each task alone."""
    def loss(net, x, y):
        return F.cross_entropy(net(x), y)               # the losses of mtp round to float32
    def layers():
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                             nn.Conv2d(4, 3, 1))
    groups = [prunable("backbone", 4), prunable("decoder", 4)]
    for method in ("mtp", "slimming", "slimming_cls"):
        torch.manual_seed(0)
        cfg = mtp.Config(device="cpu", method=method, lam=0.7, alpha1=0.3, alpha2=0.2, rounds=4,
                         rho=4.0, inner_steps=2, search_cls_lr=0.03, search_lr=0.02, tolerance=0.0,
                         gamma_rate=5.0, weight_decay=0.1)
        x, y = torch.randn(5, 3, 6, 6).double(), torch.randint(3, (5, 6, 6))
        # W1 is not W3: the constraint has work
        nets = [two_parts(layers(), nn.Conv2d(3, 3, 1)), two_parts(layers(), layers())]
        for scale in mtp.gammas(nets[1], groups):
            nn.init.uniform_(scale, 0.1, 0.9)
        tasks = [mtp.Task(net.double(), loss, Repeated([(x, y)] * 2)) for net in nets]
        again = copy.deepcopy(nets)
        log, last = sparse_run(tasks, groups, cfg)
        E, mu = algorithm_1_in_loops(again, x, y, cfg)
        for net, expected in zip(nets, again):
            agree(list(net.parameters()), list(expected.parameters()))
        assert abs(last["values"]["mu"] - mu) < 1e-9
        assert sum(log[-1]["zeros"]) > 0, "true zeros"
        if method == "mtp":
            assert mu == 0.1 / 0.03, "its largest value"
            agree(list(last["multipliers"].values()), list(E.values()))


def test_mtp_loss_of_segmentation_counts_training_heads():
    main, extra = torch.randn(2, 1, 3, 4, 4)
    labels = torch.randint(3, (1, 4, 4))
    expected = F.cross_entropy(main, labels) + 0.4 * F.cross_entropy(extra, labels)
    agree(mtp.l_seg(lambda images: [main, extra], None, labels), expected)


def test_mtp_rounds_draw_their_pictures_anew():
    tasks = mtp.tasks_of(None, None, mtp.Config(**TINY_TASKS))
    with mock.patch.object(mtp, "accuracy") as judge:       # on val, nothing is drawn
        tasks[0].score(None)
    assert not judge.call_args.args[1].sampler.shuffle
    for task in tasks:
        task.batches.sampler.indices = list(range(10))  # two batches of four a pass
        seen = []
        for number, order in ((0, 0), (1, 0), (0, 1), (0, 0)):
            batches = mtp.RoundOf(task.batches, 3, order)
            batches.set_epoch(number)
            seen += [images for images, _ in batches]
        assert len(seen) == 12
        agree(seen[9:], seen[:3])                       # a killed round is replayed
        for a, b in itertools.combinations(seen[:9], 2):
            assert not torch.equal(a, b), "another order and other crops"


class Factors:
    """Ten batches of 48 factors of +-1 a pixel, new ones every time; label: argmax of A x, whose
    columns are 0 where a factor does not matter and of norm 1 where it does."""
    sampler = mock.Mock()

    def __init__(self, useless, shape):
        a = torch.randn(4, 48)
        self.a, self.shape = F.normalize(a - a.mean(0), dim=0), shape
        self.a[:, useless] = 0
        self.a[:, NONE] = 0

    def __iter__(self):
        for _ in range(10):
            x = 2.0 * torch.randint(2, self.shape) - 1
            yield x, torch.einsum("kf,bfhw->bkhw", self.a, x).argmax(1)


# Factors that serve one task alone, or none; 16 to 23 serve both.
CLS, SEG, NONE = slice(0, 8), slice(8, 16), slice(24, 48)


def planted_gammas(method):
    """|gamma1| and |gamma3|, one a factor, after the sparse training from random weights."""
    torch.manual_seed(11)
    gammas = nn.BatchNorm2d(48)
    nn.init.uniform_(gammas.weight, 0.5, 1.5)
    backbone = nn.Sequential(nn.Identity(), gammas, nn.ReLU(), nn.Conv2d(48, 32, 1),
                             nn.BatchNorm2d(32))
    nets = [two_parts(copy.deepcopy(backbone), nn.Conv2d(32, 4, 1)) for _ in "13"]
    tasks = (mtp.Task(nets[0], mtp.l_cls, Factors(SEG, (64, 48, 1, 1))),
             mtp.Task(nets[1], mtp.l_seg, Factors(CLS, (16, 48, 4, 4))))
    cfg = mtp.Config(device="cpu", method=method, rounds=12, inner_steps=10, tolerance=0.0,
                     alpha1=0.01, alpha2=0.01, search_cls_lr=0.1, search_lr=0.1, gamma_rate=3.0)
    sparse_run(tasks, [prunable("backbone", 48)], cfg)
    return [net.backbone[1].weight.detach().abs() for net in nets]


def test_mtp_planted_truth_and_its_ablations():
    """MTP keeps what either task needs and drops the rest. Slimming by one task, which is what
    mu = E = 0 leaves of it, loses what the other one needs."""
    for gamma in planted_gammas("mtp"):
        assert sorted(gamma.topk(24).indices.tolist()) == list(range(24))
        assert (gamma[NONE] == 0).sum() >= 23, "true zeros"
        assert 0.5 < gamma[SEG].mean() / gamma[CLS].mean() < 2, "both tasks count"
    gamma1, gamma3 = planted_gammas("slimming_cls")[0], planted_gammas("slimming")[1]
    assert gamma1[SEG].mean() < 0.05 < 0.2 < gamma1[CLS].mean()
    assert gamma3[CLS].mean() < 0.05 < 0.2 < gamma3[SEG].mean()


# ---------------------------------------------------------------------------------------------
# mtp.py: baselines, the cut
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mtp_scores_of_channels_with_three_makers():
    """FPGM's by pairs of filters; gammas by their mean."""
    net = narrow_net("bisenet_resnet18", 3)
    g = mtp.groups_of(net)[12]
    filters = torch.cat([net.get_submodule(conv).weight.flatten(1) for conv, _ in g.makers], 1)
    distances = [sum((a - b).norm() for b in filters) for a in filters]
    agree(mtp.fpgm_scores(net, [g])[g.name], torch.stack(distances))
    first, second, third = (net.get_submodule(bn).weight.abs() for _, bn in g.makers)
    agree(mtp.scores_of(None, net, [g])[g.name], (first + second + third) / 3)


@torch.no_grad()
def test_mtp_thinet_against_brute_force():
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, 3, stride=2, padding=2, dilation=2).double()
    x = torch.randn(2, 5, 9, 11).double()
    terms = mtp.thinet_samples(conv, x, 50, torch.Generator().manual_seed(0))
    # each sample is one of all outputs, split by input channel
    every = [F.conv2d(x[:, c:c + 1], conv.weight[:, c:c + 1], None, 2, 2, 2).flatten()
             for c in range(5)]
    apart = torch.cdist(terms, torch.stack(every, 1))
    assert terms.shape == (100, 5) and (apart.amin(1) < 1e-6).all()
    assert len(apart.argmin(1).unique()) > 60, "places and output channels vary"

    kept, factors = mtp.thinet_layer(terms, 2)
    removed = []
    for _ in range(3):                                  # greedy: the least change of the output
        rest = set(range(5)) - set(removed)
        removed.append(min(rest, key=lambda c: terms[:, [*removed, c]].sum(1).norm()))
    assert kept.tolist() == sorted(set(range(5)) - set(removed))
    agree(factors, torch.linalg.pinv(terms[:, kept]) @ terms.sum(1))


def small_tasks(**settings):
    """cfg, and both tasks with narrow networks, as after training."""
    cfg = mtp.Config(**{**TINY_TASKS, **settings})
    cls = narrow_net(cfg.network, 8, mtp.Classifier).float()
    seg = narrow_net(cfg.network, 11, seed=1).float()
    return cfg, mtp.tasks_of(cls, seg, cfg)


@torch.no_grad()
def test_mtp_thinet_leaves_the_pruned_network_behind():
    """Front to back through the backbone, in place: what goes weighs 0, what stays is scaled."""
    cfg, tasks = small_tasks(network="deeplabv3_resnet50", method="thinet")
    net, x = tasks[1].net, torch.randn(1, 3, 64, 64)
    reader = net.backbone.layer2[0].conv2
    before, statistics = reader.weight.clone(), net.backbone.bn1.running_mean.clone()
    net.train()
    with (mock.patch.object(mtp, "thinet_layer", wraps=mtp.thinet_layer) as layer,
          mock.patch.object(mtp, "THINET_IMAGES", 6)):
        _, small, kept = mtp.choose_and_prune(tasks, cfg)
    assert torch.equal(net.backbone.bn1.running_mean, statistics), "nothing is trained"
    assert torch.allclose(small(x), net(x), atol=1e-3)
    for g in mtp.groups_of(net):
        cut = 2 if g.part == "backbone" else 1          # the decoder stays dense
        assert len(kept[g.name]) == g.width / cut
    for (terms, left), _ in layer.call_args_list:
        assert len(terms) >= 10 * terms.shape[1], "ten samples for each unknown"
    stays = kept["backbone.layer2.0.conv1"]
    factors = (reader.weight / before)[0, stays, 0, 0]
    agree(reader.weight[:, stays], before[:, stays] * factors[:, None, None])
    assert (factors - 1).abs().max() > 0.01
    rows = next(rows for (rows, left), _ in layer.call_args_list if rows.shape[1] == len(before[0])
                and torch.equal(mtp.thinet_layer(rows, left)[0], stays))
    agree(factors.double(), torch.linalg.pinv(rows[:, stays]) @ rows.sum(1), rtol=1e-3, atol=1e-3)


def test_mtp_recalibration_is_a_plain_mean():
    torch.manual_seed(0)
    batches = Repeated((3 * torch.randn(4, 3, 8, 8) + 1, None) for _ in range(5))
    norm = nn.BatchNorm2d(3)
    norm(100 + batches[0][0])                           # what it has seen so far no longer counts
    mtp.recalibrate(norm, batches, mtp.Config(device="cpu"))
    agree(norm.running_mean, sum(x.mean((0, 2, 3)) for x, _ in batches) / 5)
    agree(norm.running_var, sum(x.var((0, 2, 3)) for x, _ in batches) / 5)
    assert norm.momentum == 0.1


@torch.no_grad()
def test_mtp_choice_and_cut_by_method():
    """Which gammas decide, and in which pools they compete; which weights the two pruned networks
    get, and that their BN statistics are taken anew."""
    cfg, tasks = small_tasks(recalibrate=1, percentile=25)
    cls, seg = (task.net for task in tasks)
    groups = mtp.groups_of(seg)
    parts = [mtp.part_of(groups, part) for part in ("backbone", "decoder")]
    for gamma in mtp.gammas(cls, parts[0]):
        gamma.copy_(torch.randn_like(gamma))            # signs do not count
    for method, pool, judge, rivals, sources in (
            ("mtp", "auto", cls, parts, (cls, seg)),
            ("mtp", "network", cls, [groups], (cls, seg)),
            ("slimming", "auto", seg, parts, (seg, seg)),
            ("slimming_cls", "auto", cls, parts, (cls, cls)),
            ("gammas", "auto", seg, parts, (seg, seg)),
            ("fpgm", "auto", seg, [[g] for g in groups], (seg, seg)),
            ("uniform", "auto", seg, [[g] for g in groups], (seg, seg))):
        copies = [task._replace(net=copy.deepcopy(task.net)) for task in tasks]
        settings = replace(cfg, method=method, pool=pool)
        *small, kept = mtp.choose_and_prune(copies, settings)
        scores = {}
        for g in groups:
            gamma, = mtp.gammas(judge if g in parts[0] else seg, [g])
            scores[g.name] = gamma.abs()
        if method == "fpgm":
            scores = mtp.fpgm_scores(seg, groups)
        for members in rivals:                          # all but the lowest quarter stay
            every = torch.cat([scores[g.name] for g in members])
            stay = torch.cat([scores[g.name][kept[g.name]] for g in members])
            agree(stay.sort().values, every.sort().values[len(every) // 4:])
        for net, source in zip(small, sources):
            agree(net.backbone.conv1.weight, source.backbone.conv1.weight)
            assert net.backbone.bn1.num_batches_tracked == 1, "one batch, counted anew"


@torch.no_grad()
def test_mtp_head_of_the_first_task():
    """Taken from the file where the classes are as many; never left random without training."""
    torch.manual_seed(0)
    whole, x = narrow_classifier(2, "resnet18").eval(), torch.randn(2, 3, 64, 64)
    whole.fc = nn.Linear(64, 7)
    with tempfile.TemporaryDirectory() as tmp, narrow():
        cfg = mtp.Config(network="deeplabv3_resnet18", backbone=f"{tmp}/r18.pth")
        torch.save(whole.state_dict(), cfg.backbone)
        net, other = (mtp.Classifier(cfg.network, classes).eval() for classes in (7, 8))
        mtp.start_from(cfg, net, 7)
        agree(net(x), whole(x))
        _refused(lambda: mtp.start_from(cfg, other, 8), "8 classes", "--dense-cls-epochs")
        other = mtp.Classifier(cfg.network, 8)
        mtp.start_from(replace(cfg, dense_cls_epochs=1), other, 8)
        agree(other.backbone.conv1.weight, whole.conv1.weight)
        cfg.backbone = "imagenet"
        with mock.patch.object(common, "classifier", return_value=whole) as taken:
            mtp.start_from(cfg, net, 7)
        taken.assert_called_once_with("resnet18", "imagenet")
        deep = replace(cfg, network="pspnet_resnet50", dense_cls_epochs=1)
        _refused(lambda: mtp.start_from(deep, None, 7), "PSPNet")


def test_mtp_every_process_gets_two_pictures_a_step():
    _refused(lambda: mtp.main(["--search", "--train", "--arch", "uniform"]), "--arch")
    for stage, flag in itertools.product(("--search", "--train"), ("--batch-size", "--cls-batch")):
        with mock.patch.object(common, "world_size", lambda: 2):
            _refused(lambda: mtp.main([stage, flag, "3"]), f"{flag} 3 of", "over 2 process")


def test_mtp_accuracy_by_hand():
    net = nn.Dropout(1.0).train()       # in eval mode the picture is its own score
    pictures, labels = torch.eye(4)[[0, 1, 1, 3, 2]], torch.tensor([0, 1, 2, 3, 0])
    batches = [(pictures[:3], labels[:3]), (pictures[3:], labels[3:])]
    assert mtp.accuracy(net, batches, mtp.Config(device="cpu")) == 3 / 5 and net.training


# ---------------------------------------------------------------------------------------------
# mtp.py: the stages, beside what the table below has for all scripts
# ---------------------------------------------------------------------------------------------


def test_mtp_what_each_training_starts_from():
    """Eq. (1), Eq. (2), W1 = W3; line 11: classification, then segmentation from what that has
    learnt. A training here is a step at random."""
    names, starts, ends = [], [], []                    # of each training; states of its backbone

    @torch.no_grad()
    def train(stage, task, name, epochs, lr, power, *rest, **about):
        names.append((stage, name, power))
        starts.append(copy.deepcopy(task.net.backbone.state_dict()))
        for t in task.net.state_dict().values():
            t += torch.randn(t.shape).abs().to(t.dtype)
        ends.append(copy.deepcopy(task.net.backbone.state_dict()))

    @torch.no_grad()
    def train_sparse(task1, task2, *rest):
        w1, w3 = task1.net.backbone, task2.net.backbone
        agree(list(w1.parameters()), list(w3.parameters()))
        assert not torch.equal(w1.bn1.running_mean, w3.bn1.running_mean), "each keeps its own"
        w1.conv1.weight += 1
    with (tempfile.TemporaryDirectory() as tmp, narrow(blocks=1),
          mock.patch.multiple(mtp, train=train, train_sparse=train_sparse)):
        flags, out = METHODS["mtp"].flags(tmp, tmp), Path(tmp, "mtp_50")
        (out / "seg").mkdir(parents=True)               # fine-tuned from an older cut: void
        call_main(mtp, "--search", "--train", *flags)
        assert not (out / "seg").exists()
        call_main(mtp, "--search", "--train", "--cls-epochs", "0", *flags)      # Table 1
        narrow_pair = torch.load(out / "pruned.pt")
        only_seg = torch.load(f"{out}_without_cls/pruned.pt")
        _refused(lambda: call_main(mtp, "--train", "--lam", "2", *flags), "--lam", "now it is 2")
    dense = [("dense", "cls", 1.0), ("dense", "seg", 0.9)]
    fine = [("train", "cls", 0.9), ("train", "seg", 0.9)]
    assert names == [*dense, *fine, *dense, fine[1]]
    agree(starts[1], ends[0])
    agree(starts[3], ends[2])
    agree(starts[2]["conv1.weight"], narrow_pair["cls"]["backbone.conv1.weight"])
    agree(starts[6]["conv1.weight"], only_seg["model"]["backbone.conv1.weight"])


def test_mtp_training_hands_on_the_best_epoch():
    net, scores = nn.Linear(1, 1), iter((0.9, 0.1))         # the first of two
    batches = Repeated([(torch.randn(3, 1), torch.randn(3, 1))])
    task = mtp.Task(net, lambda forward, x, y: (forward(x) - y).square().mean(), batches,
                    lambda *_: next(scores))
    with scratch() as tmp:
        quiet(mtp.train, "train", task, "x", 2, 0.1, 0.9, mtp.Config(device="cpu"), tmp)
        best, last = (torch.load(tmp / "x" / name)["model"]["weight"]
                      for name in ("best.pt", "last.pt"))
    assert torch.equal(net.weight, best) and not torch.equal(best, last)


def test_mtp_one_dense_pair_serves_all_methods_and_percentiles():
    times = {"median": 1.0, "p90": 1.0}   # measuring takes seconds
    with (tempfile.TemporaryDirectory() as tmp, narrow(blocks=1),
          mock.patch.object(latency, "measure", lambda calls, *_: dict.fromkeys(calls, times)),
          mock.patch.object(mtp, "PAPER_SIZES", ())):
        flags = METHODS["mtp"].flags(tmp, f"{tmp}/runs")

        def said(*more, words, loaded=0):
            text = call_main(mtp, *flags, *more)
            assert text.count("trained already") == loaded
            for word in words:
                assert word in text, f"'{word}' is missing in:\n{text}"
        # dose: 0.01 (1 + 3/4 + 2/4 + 1/4) x 250 alpha / (1 - 0.9), alpha = 1e-3
        said("--search", words=("gamma1: mean 1.0", "dose 0.0625", "warning: the l1 term can move",
                                "60 of 120", "768 of 1536"))
        schedule = torch.load(f"{tmp}/runs/dense/cls/last.pt")["schedule"]
        assert schedule["last_epoch"] == schedule["total_iters"], "it ends with the steps"
        said("--search", "--resume", words=["cut already"])
        # both dense networks and Algorithm 1; the dense networks
        said("--search", "--resume", "--percentile", "25", loaded=3, words=["90 of 120"])
        said("--search", "--method", "slimming", "--batch-order", "1", loaded=2,
             words=["gamma3: mean", "of them mtp_50 keeps"])
        said("--eval", "--arch", f"{tmp}/runs/dense/arch.json", words=["dense: dense mIoU"])
        said("--bench", "--arch", "uniform", words=["uniform, 50% cut"])
        for more, word in ((["--percentile", "97"], "5% of each layer"),
                           (["--method", "thinet", "--pool", "network"], "within each layer")):
            with mock.patch.object(mtp, "dense_networks", None):        # before any training
                _refused(lambda: call_main(mtp, "--search", *flags, *more), word)


# ---------------------------------------------------------------------------------------------
# The four scripts from the command line: one table, and what holds for all of them
# ---------------------------------------------------------------------------------------------


@dataclass
class Method:
    """A script with flags for runs of seconds on a folder of three classes."""
    module: object
    search: str                         # flags of --search
    train: str                          # further flags of --train --eval --bench
    files: str                          # what these stages leave in --out
    words: tuple                        # what they print
    refusals: tuple                     # (stages and flags, words of the message) on a finished run
    endless: str = "--search-epochs 9999"       # makes a search last for hours
    ranks: str = ""                     # further flags of a search on two ranks
    apart: float = 1e-6                 # how far float32 takes two ranks from one, relatively
    around: object = contextlib.nullcontext

    def flags(self, tmp, out, train=False):
        """Flags of --search, or of all stages, with data sets made below `tmp`."""
        sets = ["--dataset", "folder", "--num-classes", "3", "--data-root",
                three_classes(Path(tmp, "set"))]
        if self.module is mtp:
            sets += ["--cls-dataset", "imagefolder", "--cls-root", two_kinds(Path(tmp, "kinds"))]
        return [*sets, "--out", out, *self.search.split(), *(self.train.split() if train else ())]


def two_kinds(root):
    """A classification set of dark and bright pictures; returns its root."""
    rng = np.random.default_rng(1)
    for split, n in (("train", 8), ("val", 3)):
        for kind, grey in (("dark", 60), ("bright", 190)):
            for i in range(n):
                path = Path(root, split, kind, f"{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = grey + rng.integers(-40, 40, (32, 32))
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(root)


METHODS = {
    "fastersg": Method(
        fastersg,
        "--layers 4 --widths 2 4 --stem-chi 2 --search-size 32 64 --search-scale 1 "
        "--search-batch 4 --search-steps 2 --pretrain-epochs 1 --search-epochs 1 --held-out 0.2 "
        "--frame 32 64 --arch-lr 0.05",
        "--size 32 64 --epochs 1 --batch-size 4 --lr 0.02",
        "arch.json last.pt log.jsonl arch_student.png arch_teacher.png teacher/best.pt "
        "student/segmentations.png student/best.pt bench.json",
        ("Table 2", "it 1/1 seg", "supernet_miou", "derived_miou", "27.770487 G", "teacher: best"),
        (("--search --resume --tau 0.5", "--tau"), ("--search --layers 3", "--layers"),
         ("--search --widths 4 4", "--widths"), ("--search --target-ms 0", "--target-ms"),
         ("--train --no-distill --lr 1e30", "not finite", "step"),
         ("--train --arch none.json", "none.json")),
        apart=1e-4),                    # Adam divides a gradient by its own size, however small
    "sparsemask": Method(
        sparsemask,
        "--size 33 65 --batch-size 4 --search-epochs 2 --weights-encoder none --width 4 "
        "--lam 0.3 --scales 0.8 1.2",
        "--epochs 1 --frame 32 64",
        "arch.json last.pt log.jsonl connectivity.png weights.png derived.pt found/best.pt "
        "found/segmentations.png bench.json",
        ("mIoU on val: supernet", "of 90 connections", "best retrained mIoU", "0.56, 98, 73.18"),
        (("--search --resume --lam 0.2", "--lam"), ("--search --sigma 2", "--sigma"),
         ("--search --arch x.json", "--arch"), ("--train --arch none.json", "none.json"),
         ("--search --task edges", "edges", "folder"), ("--search --batch-size 1", "--batch-size"),
         ("--search --lr-decoder 1e30", "not finite", "step")),
        ranks="--search-epochs 1",
        # of the bench, which counts each network for seconds
        around=lambda: mock.patch.object(sparsemask, "PAPER", {
            name: sparsemask.PAPER[name] for name in ("deeplabv3", "released")})),
    "bilevel_prune": Method(
        bilevel_prune,
        "--network tiny --size 32 64 --frame 32 64 --epochs 1 --search-epochs 2 "
        "--batch-size 4 --weight-steps 1 --lr 0.02 --target 0.5 --scales 1 1", "",
        "arch.json last.pt log.jsonl pruned.pt widths.png masks.png search.png dense/best.pt "
        "retrained/best.pt segmentations.png bench.json",
        (": met within 1%", "nothing trained after", "by themselves the masks", "10,345,958",
         "9,490,180,608", "BN folded"),
        (("--search --resume --beta 0.02", "--beta"), ("--search --tau 1", "--tau"),
         ("--search --target 1.5", "--target"), ("--train --arch none.json", "none.json"),
         ("--search --seed 5", "--seed"), ("--search --target 0.001", "fewest channels")),
        ),
    "mtp": Method(
        mtp,
        "--preset quick --cls-batch 8 --size 32 64 --batch-size 4 --dense-cls-epochs 1 "
        "--dense-epochs 1 --dense-cls-lr 0.02 --scales 1 1 --rounds 2 --inner-steps 2 "
        "--recalibrate 2 --percentile 50 --frame 32 64",
        "--cls-epochs 1 --epochs 1",
        "mtp_50/arch.json sparse_mtp/last.pt mtp_50/channels.png mtp_50/seg/best.pt bench.json "
        "mtp_50/segmentations.png dense/seg/best.pt",
        ("dose", "pruned mIoU", "top-1", "40.18 M", "train cls: best on val"),
        (("--search --resume --alpha1 0.5", "--alpha1"), ("--search --percentile 100", "--perc"),
         ("--train --arch none.json", "none.json"), ("--search --rho 0.5", "--rho")),
        "--dense-cls-epochs 9999",
        "--dense-cls-lr 1e-4 --dense-lr 1e-4 --search-cls-lr 1e-4 --search-lr 1e-4", 5e-6,
        functools.partial(narrow, 1)),
}


def contents(folder):
    """{relative path: bytes} of the checkpoints and architectures in a run folder."""
    paths = [p for p in Path(folder).rglob("*") if p.suffix == ".pt" or p.name == "arch.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def differences(a, b):
    """How two contents differ: {path, or path.key of a tensor: largest difference, or inf}."""
    apart = dict.fromkeys(a.keys() ^ b.keys(), math.inf)
    for path in (a.keys() & b.keys()):
        if a[path] == b[path]:
            continue
        if not path.endswith(".pt"):
            apart[path] = math.inf
            continue
        x, y = (tensors_of(io.BytesIO(side[path])) for side in (a, b))
        if x.keys() != y.keys():
            apart[path] = math.inf
        for key in x.keys() & y.keys():
            if not torch.equal(x[key], y[key]):
                far = (x[key].double() - y[key].double()).abs()
                apart[path + key] = float((far / x[key].double().abs().max().clamp(min=1)).max())
    return apart


def scores_in(folder):
    """What was measured on val, in the order of the logs."""
    lines = [line for log in sorted(folder.rglob("log.jsonl")) for line in log.open()]
    return [v for r in map(json.loads, lines) for k, v in r.items() if k.endswith("miou")]


class Reached(BaseException):
    """Ends a run: the folder holds what it should."""


def killed_at_every_rename(name):
    """The state of the folder just before each file gets its name is what a kill at that moment
    leaves (after one rename is before the next). From each of them --resume comes to the next, and
    so, one by one, to the end of the whole run. Left out: the log and config.json, which no stage
    reads to go on.
    """
    method = METHODS[name]
    with tempfile.TemporaryDirectory() as tmp, method.around():
        whole, states, rename = Path(tmp, "runs", "whole"), [], os.replace

        def recording(source, target):
            name = Path(target).name
            if whole in Path(target).parents and (name.endswith(".pt") or name == "arch.json"):
                states.append(Path(tmp, "runs", f"{len(states)} before {name}"))
                shutil.copytree(whole, states[-1])
            rename(source, target)

        flags = method.flags(tmp, whole, train=True)
        with mock.patch.object(os, "replace", recording):
            call_main(method.module, "--search", "--train", *flags)
        assert len(states) > 4 and any(list(folder.rglob("*.tmp")) for folder in states)
        wanted = [contents(folder) for folder in (*states[1:], whole)]
        for folder, want in zip(states, wanted):
            def stopping(source, target):
                rename(source, target)
                if not differences(want, contents(folder)):
                    raise Reached

            flags[flags.index("--out") + 1] = folder
            try:
                with mock.patch.object(os, "replace", stopping):
                    call_main(method.module, "--search", "--train", "--resume", *flags)
            except Reached:
                continue
            assert False, f"killed at {folder.name}: {differences(want, contents(folder))}"
        flags[flags.index("--out") + 1] = whole
        with mock.patch.object(common.Run, "end_epoch", None):      # no epoch is left to do
            call_main(method.module, "--search", "--train", "--resume", *flags)


def finished_run(name):
    """Search, train, eval, bench and export in one go, then what a finished run has to refuse."""
    method = METHODS[name]
    with (tempfile.TemporaryDirectory() as tmp, method.around(),
          mock.patch.object(common, "export", wraps=common.export) as exported,
          mock.patch.object(torch, "compile", lambda net, **_: net)):       # it takes a minute
        out, program = Path(tmp, "runs", "a"), Path(tmp, "net.pt2")
        flags = method.flags(tmp, out, train=True)
        said = call_main(method.module, "--search", "--train", "--eval", "--bench", *flags,
                         "--export", program)
        for word in (*method.words, "retrained mIoU on val", f"next: python {name}.py"):
            assert word in said, f"'{word}' is missing in:\n{said}"
        for file in method.files.split():
            assert (out / file).stat().st_size > 0, file
        for arch in out.rglob("arch.json"):
            assert not re.search(r"miou|_ms|seconds", arch.read_text()), "measured"
        image = torch.randn(1, 3, 32, 64)
        logits, net = torch.export.load(program).module()(image), exported.call_args.args[0]
        assert logits.shape[:2] == (1, 3) and torch.allclose(logits, net(image), atol=1e-3)
        # What was trained last, at its best epoch, is what was evaluated and exported; every
        # schedule has come to its end.
        best = torch.load(max(out.rglob("best.pt"), key=lambda path: path.stat().st_mtime_ns))
        agree(net.state_dict(), {key: best["model"][key.removeprefix("net.")]
                                 for key in net.state_dict()})
        told = [r for log in out.rglob("log.jsonl") for r in common.read_log(log.parent, "eval")]
        assert min(abs(record["miou"] - best["score"]) for record in told) < 1e-9
        for part in (part for path in out.rglob("last.pt") for part in torch.load(path).values()):
            if isinstance(part, dict) and "total_iters" in part:
                assert part["last_epoch"] == part["total_iters"]
        before = contents(out)
        for command, *words in method.refusals:
            flags = method.flags(tmp, out, train="--train" in command)
            _refused(lambda: call_main(method.module, *flags, *command.split()), *words)
        assert contents(out) == before          # a refusal leaves everything in place


def started(name, flags, errors):
    """The script as a user starts it, in a process of its own, until it has stored an epoch;
    returns its id. errors: the file for what it says on stderr."""
    if (child := os.fork()) == 0:               # saves the imports
        code = 1
        try:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
            sys.argv[1:] = map(str, flags)
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    while not list(errors.parent.rglob("last.pt")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), errors.read_text()
        time.sleep(0.01)
    return child


def test_killed_for_real():
    """SIGKILL once the search has stored an epoch, then --resume: bit for bit the whole run. One
    method will do: what a kill leaves is the same to all of them."""
    method = METHODS["sparsemask"]
    with scratch() as tmp, method.around():
        flags = ["--search", *method.flags(tmp, tmp / "killed")]
        child = started("sparsemask", flags, tmp / "stderr")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = call_main(method.module, *flags, "--resume")
        assert "epoch 1/" not in said, said
        call_main(method.module, *flags, "--out", tmp / "whole")
        assert differences(contents(tmp / "whole"), contents(tmp / "killed")) == {}


def stopped_by_a_scheduler(name):
    """SIGTERM ends a script like Ctrl-C."""
    method = METHODS[name]
    with scratch() as tmp, method.around():
        flags = ["--search", *method.flags(tmp, tmp / "runs"), *method.endless.split()]
        child = started(name, flags, tmp / "stderr")
        os.kill(child, signal.SIGTERM)
        said = (tmp / "stderr").read_text
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130, said()
        assert said() == "interrupted; the same command with --resume continues\n"
        assert list(tmp.rglob("last.pt")) and not list(tmp.rglob("*.tmp"))


def on_frozen_statistics(x, mean, var, weight, bias, training, momentum, eps):
    """F.batch_norm that knows no batch: the running statistics, always."""
    return REAL_BATCH_NORM(x, mean, var, weight, bias, False, momentum, eps)


REAL_BATCH_NORM = F.batch_norm


def two_ranks_are_one(name):
    """A search on two ranks is that on the joint batch, but for the rounding of float32 over a
    few steps, once nothing looks at a rank's own batch: neither BN nor the choice of OHEM."""
    method = METHODS[name]
    with (tempfile.TemporaryDirectory() as tmp, method.around(),
          mock.patch.object(F, "batch_norm", on_frozen_statistics),
          mock.patch.object(fastersg, "ohem", common.cross_entropy)):
        one, two = Path(tmp, "runs", "one"), Path(tmp, "runs", "two")
        # Without random scales no crop is padded: all ranks have as many pixels that count.
        flags = [*method.flags(tmp, two), "--scales", "1", "1", *method.ranks.split()]
        call_main(method.module, "--search", *flags, "--out", one)

        def job(rank):
            assert bool(call_main(method.module, "--search", *flags)) == (rank == 0)
        on_two_ranks(job)
        apart = differences(contents(one), contents(two))
        assert scores_in(one) and np.allclose(scores_in(one), scores_in(two), atol=3e-3)
        assert all(far <= method.apart for far in apart.values()), apart        # a NaN is not


def test_bilevel_prune_two_ranks_are_one():
    """The first epoch, weight and mask steps, before equal masks are chosen by rounding; without
    dropout, whose draws are those of a rank's own batch."""
    method, end_epoch, ends = METHODS["bilevel_prune"], common.Run.end_epoch, []

    def first_epoch(run, *rest, **record):
        end_epoch(run, *rest, **record)
        if run.name == "search":
            ends.append({k: v.clone() for k, v in run.parts["model"].state_dict().items()})
            raise KeyboardInterrupt

    def job(out):
        with contextlib.suppress(KeyboardInterrupt):
            call_main(method.module, "--search", *flags, "--out", out, "--search-epochs", 3,
                      "--drop-path", 0)
    with (tempfile.TemporaryDirectory() as tmp,
          mock.patch.object(F, "batch_norm", on_frozen_statistics),
          mock.patch.object(F, "dropout2d", lambda x, *rest: x),
          mock.patch.object(common.Run, "end_epoch", first_epoch)):
        flags = method.flags(tmp, tmp)          # once: it writes the pictures that both ranks read
        job(Path(tmp, "one"))
        on_two_ranks(lambda rank: job(Path(tmp, "two")))
    one, two = ends
    assert sum(key.startswith("masks") and bool((one[key] != 1).any()) for key in one) > 5
    for key, value in one.items():
        far = (value.double() - two[key].double()).abs()
        assert value.numel() == 0 or far.max() <= 1e-5 * max(1, value.abs().max()), key


def test_bilevel_prune_two_ranks_hold_the_same_weights():
    """Not those of one process: of masks that are still equal, rounding chooses."""
    method, end_epoch = METHODS["bilevel_prune"], common.Run.end_epoch

    def checked(run, *rest, **record):
        end_epoch(run, *rest, **record)
        for p in run.parts["model"].parameters():
            first = p.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, p)
    with tempfile.TemporaryDirectory() as tmp, mock.patch.object(common.Run, "end_epoch", checked):
        flags = method.flags(tmp, Path(tmp, "two"))
        on_two_ranks(lambda rank: call_main(method.module, "--search", *flags))


def cuda_steps_are_the_cpus():
    """In float64, no rounding hides a kernel that does something else: loss and gradient of a step
    of every search. FasterSeg's loss is float32. NHWC too."""
    torch.manual_seed(0)
    cfg = fastersg.Config(**TINY)
    arch = one_hot_arch(cfg, random.Random(0)).double()
    supernet = nn.ModuleList([fastersg.Supernet(cfg, 3), arch]).double()

    def of_supernet(nets, images, labels):
        net, arch = nets
        return fastersg.seg_loss(net, arch.draw(arch.likeliest()), fastersg.STUDENT, images, labels,
                                 cfg)

    def plain(net, images, labels):
        logits = net(images)
        main = logits[0] if isinstance(logits, list) else logits
        return common.cross_entropy(common.enlarged(main, labels.shape[-2:]), labels)
    cases = {"fastersg": (supernet, of_supernet), "sparsemask": (dense_net(), plain),
             "bilevel_prune": (with_masks(bilevel_prune.build("tiny", 3).double()), plain),
             "mtp": (mtp.Segmenter("deeplabv3_resnet18", 3).double(), plain)}
    images, labels = torch.rand(4, 3, 65, 97).double(), torch.randint(0, 3, (4, 65, 97))
    for name, (net, loss_of) in cases.items():
        for module in net.modules():
            if isinstance(module, nn.Dropout2d):        # draws other masks on a GPU
                module.p = 0.0
        found = []
        for device, layout in (("cpu", torch.contiguous_format), ("cuda", torch.contiguous_format),
                               ("cuda", torch.channels_last)):
            copied = copy.deepcopy(net).to(device, memory_format=layout).train()
            loss = loss_of(copied, images.to(device, memory_format=layout), labels.to(device))
            loss.backward()
            grads = [p.grad.cpu().flatten() for p in copied.parameters() if p.grad is not None]
            found.append((float(loss.detach()), torch.cat(grads)))
        for loss, gradient in found[1:]:
            assert abs(loss / found[0][0] - 1) < 1e-6, name
            assert (gradient - found[0][1]).norm() < 1e-5 * found[0][1].norm(), name


def cuda_graph_computes_what_the_network_does():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x, seen = torch.randn(1, 3, 9, 9).cuda(), []
    folded = common.fold_bn(net).cuda()
    with torch.no_grad():
        replay = latency.captured(lambda: seen.append(folded(x)))
        x.copy_(torch.randn(1, 3, 9, 9))                # the graph reads the same memory
        replay()
        torch.cuda.synchronize()
        assert torch.allclose(seen[-1].cpu(), net(x.cpu()), atol=1e-2)          # TF32
    times = latency.measure({"a": latency.prepare(net, [(1, 3, 64, 64)], "cuda")}, "cuda")
    assert 0 < times["a"]["median"] < 100


def cuda_stages_run(name):
    """All stages with bf16 in NHWC memory, and once more, resumed; the export runs on a CPU."""
    method = METHODS[name]
    with tempfile.TemporaryDirectory() as tmp, method.around():
        program = Path(tmp, "net.pt2")
        flags = [*method.flags(tmp, Path(tmp, "runs", "a"), train=True), "--device", "cuda",
                 "--amp", "--channels-last"]
        call_main(method.module, "--search", "--train", *flags)
        said = call_main(method.module, "--search", "--train", "--eval", "--bench", "--resume",
                         *flags, "--export", program)
        for word in (*method.words[-2:], "retrained mIoU on val"):
            assert word in said, f"'{word}' is missing in:\n{said}"
        image = torch.randn(1, 3, 32, 64)
        assert torch.export.load(program).module()(image).isfinite().all()


if torch.cuda.device_count():
    test_cuda_steps_are_the_cpus = cuda_steps_are_the_cpus
    test_cuda_graph_computes_what_the_network_does = cuda_graph_computes_what_the_network_does
    for name in METHODS:
        globals()[f"test_cuda_stages_run_{name}"] = functools.partial(cuda_stages_run, name)

for check in (killed_at_every_rename, stopped_by_a_scheduler, finished_run, two_ranks_are_one):
    for name in METHODS:
        if (check, name) != (two_ranks_are_one, "bilevel_prune"):
            globals()[f"test_{name}_{check.__name__}"] = functools.partial(check, name)

# Started first, so that none of them comes late: in part of the name.
LONGEST = ("killed_at_every_rename", "finished_run", "scheduler", "planted", "killed_for_real",
           "two_ranks", "ablations", "controls", "derived", "sizes")


# ---------------------------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------------------------


def run_tests(names, results):
    """Take names from a queue until None; put (name, seconds, what went wrong or "")."""
    for name in iter(names.get, None):
        start, wrong = time.perf_counter(), ""
        try:
            globals()[name]()
        except BaseException:                   # SystemExit too: a test must not end the runner
            wrong = traceback.format_exc()
        results.put((name, time.perf_counter() - start, wrong))


def main():
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    tests = [name for name in globals() if name.startswith("test_") and word in name]
    tests.sort(key=lambda name: [part in name for part in LONGEST], reverse=True)
    fork, start, failed = multiprocessing.get_context("fork"), time.perf_counter(), 0
    names, results, count = fork.Queue(), fork.Queue(), min(4, max(2, os.cpu_count() or 1))
    for name in (*tests, *[None] * count):
        names.put(name)
    workers = [fork.Process(target=run_tests, args=(names, results)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for _ in tests:
        name, seconds, wrong = results.get(timeout=900)     # a worker that was killed says nothing
        failed += bool(wrong)
        print(f"{wrong}{'FAIL' if wrong else 'ok  '} {seconds:6.2f} s  {name}", flush=True)
    for worker in workers:
        worker.join()
    print(f"{len(tests)} tests in {time.perf_counter() - start:.0f} s")
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0 or not tests)


if __name__ == "__main__":
    main()
