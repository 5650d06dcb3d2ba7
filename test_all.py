"""All tests: `python test_all.py`, or `python test_all.py WORD` for those with WORD in the name.

No network, no data set, no GPU; minutes on two CPU cores. Each test compares with something that
does not share code with what it tests: loops, brute force, torchvision, counts from the papers.
"""
import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
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
# The networks here are too small to gain from threads, and runs with equal threads are comparable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------
# data.py
# ---------------------------------------------------------------------------------------------


def _picture(path, height=6, width=8, colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def _label(path, values, palette=False):
    """Write rows of class indices; as a palette picture whose colours differ from the indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8))
    if palette:
        image = image.convert("L")
        image.putpalette([(7 * k + 3) % 256 for k in range(768)])
        assert image.mode == "P"
    image.save(path)


def _values(pair):
    return np.asarray(pair[1]).tolist()


def _refused(call, *words):
    """The call raises InputError, one line that holds all words -> that line."""
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


def test_camvid_tree():
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        _picture(root / "val/a.png", 2, 3)
        _picture(root / "val/b.jpg", 2, 3)
        _label(root / "valannot/a.png", [[0, 1, 2], [10, 11, 255]])
        _label(root / "valannot/b.png", [[3, 3, 3], [9, 9, 11]])
        camvid = data.open_segmentation("camvid", tmp, "val", num_classes=11)
        assert len(camvid) == 2 and camvid.num_classes == 11 and camvid.name(1) == "b.jpg"
        assert _values(camvid[0]) == [[0, 1, 2], [10, 255, 255]]
        assert _values(camvid[1]) == [[3, 3, 3], [9, 9, 255]]
        image, label = camvid[0]
        assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (3, 2)
        assert image.getpixel((0, 0)) == (10, 20, 30)
        assert camvid.class_names[3] == "road" and camvid.class_names[10] == "bicyclist"
        assert camvid.palette[3] == (128, 64, 128) and len(camvid.palette) == 11
        assert data.check_segmentation(camvid) == 2 and data.check_segmentation(camvid, 1) == 1


def test_cityscapes_tree():
    # Hand-written from the label table of the data set's paper: id in the file -> train id.
    expected = {0: 255, 6: 255, 7: 0, 8: 1, 9: 255, 11: 2, 17: 5, 18: 255, 19: 6, 23: 10, 24: 11,
                26: 13, 29: 255, 31: 16, 33: 18}
    with tempfile.TemporaryDirectory() as tmp:
        root, cities = Path(tmp), ("weimar", "aachen")
        for city in cities:
            stem = f"{city}/{city}_000000_000019"
            _picture(root / f"leftImg8bit/train/{stem}_leftImg8bit.png", 1, len(expected))
            _label(root / f"gtFine/train/{stem}_gtFine_labelIds.png", [list(expected)])
        found = data.open_segmentation("cityscapes", tmp, "train")
        assert [found.name(i).split("_")[0] for i in range(2)] == ["aachen", "weimar"]
        assert _values(found[0]) == [list(expected.values())]
        assert found.num_classes == 19 and found.class_names[0] == "road"
        assert found.class_names[18] == "bicycle" and found.palette[13] == (0, 0, 142)
        assert data.check_segmentation(found) == 2
        _refused(lambda: data.open_segmentation("cityscapes", tmp, "test"), "not public")
        _refused(lambda: data.open_segmentation("cityscapes", tmp, "val"), root / "leftImg8bit/val")
        label = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
        label.unlink()
        _refused(lambda: data.open_segmentation("cityscapes", tmp, "train"), label)
        (root / "leftImg8bit/train/notes.txt").write_text("a file among the cities")
        _refused(lambda: data.open_segmentation("cityscapes", tmp, "train"), "notes.txt")


def test_voc_tree_with_and_without_sbd():
    with tempfile.TemporaryDirectory() as tmp:
        base = Path(tmp) / "VOCdevkit/VOC2012"
        for stem in ("2007_01", "2007_02", "2008_03"):
            _picture(base / f"JPEGImages/{stem}.jpg", 1, 3)
            _label(base / f"SegmentationClassAug/{stem}.png", [[20, 0, 255]])
        _label(base / "SegmentationClass/2007_01.png", [[1, 15, 255]], palette=True)
        _label(base / "SegmentationClass/2007_02.png", [[2, 2, 0]], palette=True)
        lists = base / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("2007_01\n")
        (lists / "val.txt").write_text("2007_02\n")
        plain = data.open_segmentation("voc", tmp, "train")
        assert len(plain) == 1 and _values(plain[0]) == [[1, 15, 255]]
        assert plain.class_names[15] == "person" and plain.num_classes == 21
        assert plain.palette[1] == (128, 0, 0) and plain.palette[15] == (192, 128, 128)
        (lists / "trainaug.txt").write_text(
            "2008_03\n\n/JPEGImages/2007_01.jpg /SegmentationClassAug/2007_01.png\n")
        aug = data.open_segmentation("voc", tmp, "train")
        assert [aug.name(i) for i in range(len(aug))] == ["2008_03.jpg", "2007_01.jpg"]
        assert _values(aug[1]) == [[20, 0, 255]]
        assert _values(data.open_segmentation("voc", tmp, "val")[0]) == [[2, 2, 0]]
        own = data.open_segmentation("voc", tmp, "trainvoc")        # without SBD all the same
        assert _values(own[0]) == _values(plain[0]) and len(own) == 1
        (lists / "trainval.txt").write_text("2007_01\n2007_02\n")
        assert len(data.open_segmentation("voc", tmp, "trainval")) == 2
        (lists / "val.txt").unlink()
        _refused(lambda: data.open_segmentation("voc", tmp, "val"), "val.txt")


def test_ade20k_tree():
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / "ADEChallengeData2016"
        for name in ("training", "validation"):
            _picture(root / f"images/{name}/ADE_1.jpg", 1, 4)
            _label(root / f"annotations/{name}/ADE_1.png", [[0, 1, 2, 150]])
        for place in (tmp, root):
            found = data.open_segmentation("ade20k", place, "val")
            assert found.num_classes == 150 and _values(found[0]) == [[255, 0, 1, 149]]
        lines = ["Idx\tRatio\tTrain\tVal\tName"] + [f"{k}\t.1\t5\t5\tthing {k}, other"
                                                   for k in range(1, 151)]
        (root / "objectInfo150.txt").write_text("\n".join(lines))
        assert data.open_segmentation("ade20k", tmp, "train").class_names[149] == "thing 150"
        assert len(set(found.palette)) == 150
        _label(root / "annotations/validation/ADE_1.png", [[0, 1, 2, 151]])
        _refused(lambda: found[0], "ADE_1.png", "151")


def test_bdd100k_trees():
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        _picture(root / "images/10k/train/x.jpg", 1, 3)
        _label(root / "labels/sem_seg/masks/train/x.png", [[0, 18, 255]])
        new = data.open_segmentation("bdd100k", tmp, "train")
        assert _values(new[0]) == [[0, 18, 255]] and new.class_names[11] == "person"
        _picture(root / "seg/images/train/y.jpg", 1, 3)
        _label(root / "seg/labels/train/y_train_id.png", [[5, 6, 255]])
        old = data.open_segmentation("bdd100k", tmp, "train")
        assert old.name(0) == "y.jpg" and _values(old[0]) == [[5, 6, 255]]
        _refused(lambda: data.open_segmentation("bdd100k", tmp, "test"), "test", "train or val")


def _own_folder(tmp, values=((0, 1, 2), (2, 255, 0)), **kind):
    root = Path(tmp)
    _picture(root / "train/images/a.png", 2, 3)
    _label(root / "train/labels/a.png", values, **kind)
    return root / "train/images/a.png", root / "train/labels/a.png"


def test_folder_reads_palette_labels_as_indices():
    for palette in (False, True):
        with tempfile.TemporaryDirectory() as tmp:
            _own_folder(tmp, palette=palette)
            own = data.open_segmentation("folder", tmp, "train", num_classes=3)
            assert _values(own[0]) == [[0, 1, 2], [2, 255, 0]] and own.num_classes == 3
            assert data.check_segmentation(own) == 1


def test_wrong_names_and_folders_are_refused():
    opener = data.open_segmentation
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        _refused(lambda: opener("imagenet"), "imagenet", "camvid")
        _refused(lambda: opener("camvid"), "--data-root")
        _refused(lambda: opener("camvid", root / "nowhere"), root / "nowhere")
        _refused(lambda: opener("camvid", tmp, "trian"), "trian", "train or val or test")
        _refused(lambda: opener("synthetic", split="dev"), "dev")
        _refused(lambda: opener("synthetic", size=(16, 256)), "16x256")
        _refused(lambda: opener("synthetic", num_classes=19), "11", "19")
        _refused(lambda: opener("camvid", tmp, "val"), root / "val")
        (root / "val").mkdir()
        _refused(lambda: opener("camvid", tmp, "val"), root / "valannot")
        (root / "valannot").mkdir()
        _refused(lambda: opener("camvid", tmp, "val"), root / "val", "no image")
        _picture(root / "val/a.png")
        _refused(lambda: opener("camvid", tmp, "val"), root / "val/a.png", root / "valannot/a.png")
        _label(root / "valannot/a.png", [[0] * 8] * 6)
        _refused(lambda: opener("camvid", tmp, "val", num_classes=12), "11", "12")
        image, _ = _own_folder(tmp)
        _refused(lambda: opener("folder", tmp, "train"), "number of classes")
        _refused(lambda: opener("folder", tmp, "train", num_classes=300), "number of classes")
        _refused(lambda: opener("voc", tmp), root / "VOCdevkit/VOC2012")
        _refused(lambda: data.open_classification("cifar"), "cifar", "imagefolder")


def test_damaged_pairs_are_refused_by_name():
    with tempfile.TemporaryDirectory() as tmp:
        image, label = _own_folder(tmp)
        own = data.open_segmentation("folder", tmp, "train", num_classes=3)
        check, read = lambda: data.check_segmentation(own), lambda: own[0]
        for call in (check, read):
            _label(label, [[0, 1, 2], [2, 77, 0]])
            _refused(call, label, "77")
            _label(label, [[0, 1, 2]])
            _refused(call, image, label, "3x2", "3x1")
            _picture(label, 2, 3)
            _refused(call, label, "colour picture", "class indices are expected")
            label.write_text("no picture")
            _refused(call, label, "cannot read")
            _own_folder(tmp)
            noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
            _label(label, np.zeros((64, 48)))
            for kind in ("png", "jpeg"):
                Image.fromarray(noise).save(image, format=kind)
                call()  # a whole file is not refused
                image.write_bytes(image.read_bytes()[:image.stat().st_size // 2])
                _refused(call, image, "cannot read")
            image.unlink()
            _refused(call, image, "cannot read")
            _own_folder(tmp)


def test_imagefolder_tree():
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        for split, kind, colour in (("train", "dog", (200, 0, 0)), ("train", "cat", (0, 200, 0)),
                                    ("val", "cat", (0, 0, 200))):
            _picture(root / split / kind / "1.png", colour=colour)
        found = data.open_classification("imagefolder", tmp, "train")
        assert found.class_names == ("cat", "dog") and found.num_classes == len(found) == 2
        assert found[1][1] == 1 and found[1][0].getpixel((0, 0)) == (200, 0, 0)
        _refused(lambda: data.open_classification("imagefolder", tmp, "val"), "dog", root)
        (root / "val/dog").mkdir()
        _refused(lambda: data.open_classification("imagefolder", tmp, "val"), "dog")
        _refused(lambda: data.open_classification("imagefolder", tmp, "dev"), "dev")
        _refused(lambda: data.open_classification("imagefolder"), "--cls-root")
        (root / "train/cat/1.png").write_bytes(b"broken")
        _refused(lambda: found[0], root / "train/cat/1.png")


def test_synthetic_scenes():
    scenes = data.open_segmentation("synthetic", split="val", size=(64, 128), seed=5)
    again = data.open_segmentation("synthetic", split="val", size=(64, 128), seed=5)
    train = data.open_segmentation("synthetic", split="train", size=(64, 128), seed=5)
    assert (len(train), len(scenes)) == (400, 100) and scenes.num_classes == 11
    list(map(again.__getitem__, (7, 2)))  # history must not matter
    image, label = scenes[3]
    assert image.tobytes() == again[3][0].tobytes() and label.tobytes() == again[3][1].tobytes()
    assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (128, 64)
    other_seed = data.open_segmentation("synthetic", split="val", size=(64, 128), seed=6)
    for other in (scenes[4], train[3], other_seed[3]):
        assert image.tobytes() != other[0].tobytes()
    labels = np.stack([np.asarray(scenes[i][1]) for i in range(40)])
    share = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert set(np.flatnonzero(share)) == {*range(11), 255}
    assert share[:11].min() > 0.003 and 0.002 < share[255] < 0.1 and share.max() < 0.4
    for size in ((33, 200), (96, 40)):
        odd = data.open_segmentation("synthetic", size=size)[0]
        assert odd[0].size == odd[1].size == size[::-1]


def test_synthetic_poles_are_thin():
    scenes = data.open_segmentation("synthetic", split="val")
    runs = []
    for i in range(10):
        pole = np.pad(np.asarray(scenes[i][1]) == data.POLE, ((0, 0), (1, 1))).astype(np.int8)
        edge = np.diff(pole.ravel())
        runs.extend(np.flatnonzero(edge == -1) - np.flatnonzero(edge == 1))
    assert np.median(runs) <= 3


def test_synthetic_objects():
    objects = data.open_classification("synthetic", size=(40, 48))
    assert objects.num_classes == len(objects.class_names) == 8
    assert {objects[i][1] for i in range(16)} == set(range(8))
    image, kind = objects[9]
    assert image.size == (48, 40) and kind == 1
    assert image.tobytes() == data.open_classification("synthetic", size=(40, 48))[9][0].tobytes()
    assert image.tobytes() != objects[17][0].tobytes()


# Drawn at random and so not on one line: else a blend of two classes could look like a third.
COLOURS = np.random.default_rng(1).integers(0, 256, (12, 3))


class _Coded:
    """Pictures whose colour tells the label: class k is painted COLOURS[k]."""

    def __init__(self, height=40, width=60):
        blocks = np.random.default_rng(0).integers(0, 12, (height // 10, width // 10))
        self.classes = np.kron(blocks, np.ones((10, 10), int))

    def __len__(self):
        return 9

    def __getitem__(self, i):
        k = self.classes
        return (Image.fromarray(COLOURS[k].astype(np.uint8)),  # (H, W, 3)
                Image.fromarray(k.astype(np.uint8)))


def _decode(image):
    """(3, H, W) normalised -> class of each pixel, and whether the colour is one of the code.

    Undoes the normalisation with ImageNet's numbers written out.
    """
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = (image * std + mean) * 255
    code = torch.from_numpy(COLOURS.T)[:, :, None, None]
    distance = (pixels[:, None] - code).abs().amax(0)
    return distance.argmin(0), distance.amin(0) < 1.5


def test_train_transform_keeps_image_and_label_aligned():
    samples = data.Samples(_Coded(), data.train_transform((32, 32), (0.8, 2.0)), seed=3)
    flips, seen = set(), set()
    source = torch.from_numpy(_Coded().classes)
    for epoch in range(12):
        image, label = samples[epoch, 0]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert label.shape == (32, 32) and label.dtype == torch.int64
        assert type(image) is torch.Tensor and type(label) is torch.Tensor
        decoded, exact = _decode(image)
        exact &= label != 255
        assert exact.float().mean() > 0.5  # only borders of blocks are interpolated
        assert (decoded == label)[exact].all()
        seen.add(tuple(label.flatten().tolist()))
    assert len(seen) == 12
    for epoch in range(40):  # scale 1, whole picture: only the flip is left
        label = data.Samples(_Coded(), data.train_transform((40, 60), (1, 1)), 0)[epoch, 0][1]
        flips.add("same" if torch.equal(label, source) else
                  "flipped" if torch.equal(label, source.flip(1)) else "other")
    assert flips == {"same", "flipped"}


def test_label_is_not_shifted_against_the_image():
    # A vertical edge at 3/4 of the width; at factor 1/2 label and image must cut at the same pixel.
    label = np.zeros((16, 16), np.uint8)
    label[:, 11:] = 1

    class Edge(_Coded):
        def __getitem__(self, i):
            return Image.fromarray(np.repeat(255 * label[..., None], 3, -1)), Image.fromarray(label)

    centres_image, centres_label = [], []
    for width in range(5, 16):
        factor = width / 16
        transform = data.train_transform((16, width), (factor, factor))
        for epoch in range(4):
            image, out = data.Samples(Edge(), transform)[epoch, 0]
            rows = (out != 255).any(1)
            image, out = image[0][rows], out[rows].float()
            bright = ((image - image.min()) / (image.max() - image.min())).mean(0).sum()
            centres_image.append(bright / width), centres_label.append(out.mean())
    bias = (torch.stack(centres_image) - torch.stack(centres_label)).mean()
    assert abs(bias) < 0.03, bias  # -0.011 when written; 0.057 with v2's default for masks


def test_train_transform_pads_with_mean_and_ignore():
    samples = data.Samples(_Coded(), data.train_transform((64, 96), (1.0, 1.0)), seed=0)
    corners = set()
    for epoch in range(10):
        image, label = samples[epoch, 0]
        inside = label != 255
        assert inside.sum() == 40 * 60
        assert image[:, ~inside].abs().max() < 0.02  # the mean colour, rounded to 8 bits
        decoded, exact = _decode(image)
        assert exact[inside].all() and (decoded == label)[inside].all()
        corners.add(tuple(inside.nonzero()[0].tolist()))
    assert len(corners) > 3  # the picture lands anywhere in the crop
    half = data.Samples(_Coded(), data.train_transform((64, 96), (1.0, 1.0), base_scale=0.5))[0, 0]
    assert (half[1] != 255).sum() == 20 * 30


def test_eval_transform_leaves_the_label():
    coded = _Coded()
    for scale, shape in ((1.0, (40, 60)), (0.5, (20, 30))):
        image, label = data.Samples(coded, data.eval_transform(scale))[0, 0]
        assert image.shape == (3, *shape)
        assert torch.equal(label, torch.from_numpy(coded.classes))
    image, _ = data.Samples(coded, data.eval_transform())[0, 0]
    original = torch.from_numpy(np.array(coded[0][0])).permute(2, 0, 1)
    assert abs(image[0, 0, 0] - (original[0, 0, 0] / 255 - 0.485) / 0.229) < 1e-5
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406),
                                                          (0.229, 0.224, 0.225)))
    assert torch.allclose(image, (original / 255 - mean) / std, atol=1e-5)


def test_classification_transform():
    objects = data.open_classification("synthetic", size=(40, 48))
    for train in (True, False):
        transform = data.classification_transform((24, 32), train)
        loader = data.make_loader(objects, range(6), transform, 3, shuffle=False)
        images, kinds = next(iter(loader))
        assert images.shape == (3, 3, 24, 32) and kinds.tolist() == [0, 1, 2]
        assert kinds.dtype == torch.int64
    same = data.Samples(objects, data.classification_transform((40, 40), False))[0, 0][0]
    again = data.Samples(objects, data.classification_transform((40, 40), False))[9, 0][0]
    assert torch.equal(same, again)  # nothing random at evaluation


def test_samples_do_not_depend_on_workers_or_history():
    coded, transform = _Coded(), data.train_transform((32, 32))

    def epoch_of(workers, epoch, warm_up=0):
        loader = data.make_loader(coded, None, transform, 4, True, workers, seed=1)
        for past in range(warm_up):
            loader.sampler.set_epoch(past)
            list(loader)
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    torch.manual_seed(11)
    images, labels = epoch_of(0, 2)
    assert len(images) == 8  # 9 pictures, the incomplete batch dropped
    for workers, warm_up in ((2, 0), (0, 2), (2, 2)):
        other = epoch_of(workers, 2, warm_up)
        assert torch.equal(images, other[0]) and torch.equal(labels, other[1])
    assert not torch.equal(images, epoch_of(0, 3)[0])
    after = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), after)  # the global generator was left alone


def test_unreadable_file_keeps_its_sentence_through_a_worker():
    with tempfile.TemporaryDirectory() as tmp:
        image, _ = _own_folder(tmp)
        own = data.open_segmentation("folder", tmp, "train", num_classes=3)
        image.write_bytes(b"broken")
        for workers in (0, 1):
            loader = data.make_loader(own, None, data.train_transform((8, 8)), 1, True, workers)
            text = _refused(lambda: next(iter(loader)), "cannot read", image)
            assert text.startswith("cannot read")  # no worker's traceback before the sentence


def test_epoch_sampler_over_ranks():
    indices = list(range(100, 123))  # 23 of them
    for world in (1, 2, 4, 30):
        train = [data.EpochSampler(indices, True, 7, rank, world) for rank in range(world)]
        evaluation = [data.EpochSampler(indices, False, 7, rank, world) for rank in range(world)]
        for sampler in train + evaluation:
            sampler.set_epoch(5)
            assert len(list(sampler)) == len(sampler) and {e for e, _ in sampler} <= {5}
        shares = [[i for _, i in sampler] for sampler in train]
        assert len({len(share) for share in shares}) == 1 and len(shares[0]) == -(-23 // world)
        assert set(sum(shares, [])) == set(indices)
        shares = [[i for _, i in sampler] for sampler in evaluation]
        assert sorted(sum(shares, [])) == indices  # each exactly once
    sampler = data.EpochSampler(indices, True, 7)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([i for _, i in sampler])
    assert orders[0] == orders[2] != orders[1] and orders[0] != indices
    assert [i for _, i in data.EpochSampler(indices, True, 8)] != orders[0]


def test_make_loader_keeps_a_lone_small_batch():
    coded, transform = _Coded(), data.eval_transform()
    sizes = lambda **kw: [len(x) for x, _ in data.make_loader(coded, None, transform, **kw)]
    assert sizes(batch_size=4, shuffle=True) == [4, 4]
    assert sizes(batch_size=4, shuffle=False) == [4, 4, 1]
    assert sizes(batch_size=20, shuffle=True) == [9]
    assert sizes(batch_size=4, shuffle=True, drop_last=False) == [4, 4, 1]
    assert sizes(batch_size=4, shuffle=True, world_size=3) == [3]


def test_split_indices():
    for n in (10, 37, 400):
        parts = data.split_indices(n, (0.4, 0.4, 0.2), seed=3)
        assert sorted(sum(parts, [])) == list(range(n))  # disjoint and complete
        assert [len(p) for p in parts] == {10: [4, 4, 2], 37: [15, 15, 7], 400: [160, 160, 80]}[n]
    assert parts == data.split_indices(400, (2, 2, 1), seed=3)
    assert parts != data.split_indices(400, (2, 2, 1), seed=4)
    _refused(lambda: data.split_indices(2, (0.4, 0.4, 0.2)), "2 images", "3 parts")


def test_saliency_tree():
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        opener = lambda **kw: data.open_task("saliency", "msra_b", tmp, "val", **kw)
        _refused(opener, root / "val/images")
        _picture(root / "val/images/a.jpg", 1, 5)
        mask = root / "val/masks/a.png"
        _refused(opener, root / "val/masks")
        mask.parent.mkdir()
        _refused(opener, root / "val/images/a.jpg", mask)
        _label(mask, [[0, 1, 127, 128, 255]])
        found = opener(num_classes=2)
        assert found.num_classes == 2 and found.class_names == ("background", "salient")
        assert _values(found[0]) == [[0, 0, 0, 1, 1]] and data.check_segmentation(found) == 1
        _label(mask, [[0, 0, 200, 255, 0]])
        for mode in ("1", "P"):  # black and white, and a palette: brightness counts, not the index
            with Image.open(mask) as grey:
                grey.convert("L").convert(mode).save(mask)
            assert _values(found[0]) == [[0, 0, 1, 1, 0]], mode
        for damage, words in ((lambda: _picture(mask, 1, 5), ("colour picture", "grey mask")),
                              (lambda: _label(mask, [[0, 0]]), ("5x1", "2x1")),
                              (lambda: mask.write_text("no picture"), ("cannot read",))):
            damage()
            _refused(lambda: found[0], mask, *words)
            _refused(lambda: data.check_segmentation(found), mask, *words)
        _refused(lambda: opener(num_classes=3), "msra_b", "2 classes, not 3")
        _refused(lambda: data.open_task("saliency", "msra_b", tmp, "trainval"), "trainval")


def _annotated(root, split, stem, maps, first=0):
    _picture(root / split / f"{stem}.jpg", len(maps[0]), len(maps[0][0]))
    for k, edge in enumerate(maps, first):
        _label(root / f"{split}_edges/{stem}_{k}.png", edge)


def test_edge_tree_with_several_annotators():
    votes = [[0, 1, 2, 3, 4, 5, 6]]
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        # Row by row: annotators, and the label where 0, 1, 2 ... of them marked the pixel.
        expected = {1: [0, 1], 2: [0, 1, 1], 3: [0, 255, 1, 1], 4: [0, 255, 1, 1, 1],
                    5: [0, 255, 255, 1, 1, 1], 11: [0, 255, 255, 1, 1, 1, 1]}
        for count, label in expected.items():
            maps = [[[(v > k) * (40 + k) for v in votes[0][:len(label)]]] for k in range(count)]
            _annotated(root, "train", f"p{count:02}", maps, first=count % 2)
        _annotated(root, "train", "p01_7", [[[0, 0, 9]]])  # not a second annotator of p01
        _annotated(root, "val", "q", [[[0, 1]]])
        (root / "train_edges/p01_note.png").write_text("no annotation")
        found = data.open_task("edges", "bsds500", tmp, "train")
        assert [found.name(i) for i in (0, 1, 6)] == ["p01.jpg", "p01_7.jpg", "p11.jpg"]
        assert [len(found.annotations(i)) for i in range(7)] == [1, 1, 2, 3, 4, 5, 11]
        assert [_values(found[i])[0] for i in (0, 2, 3, 4, 5, 6)] == list(expected.values())
        marks = found.annotations(6)  # in numerical order: the tenth does not come second
        assert [int(m.sum()) for m in marks] == [6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0]
        assert marks[0].dtype == bool and marks[0].shape == (1, 7) and found.num_classes == 2
        assert data.check_segmentation(found) == 7
        both = data.open_task("edges", "bsds500", tmp, "trainval")
        assert len(both) == 8 and both.name(7) == "q.jpg" and _values(both[7]) == [[0, 1]]


def test_wrong_edge_trees_are_refused():
    with tempfile.TemporaryDirectory() as tmp:
        root, opener = Path(tmp), lambda: data.open_task("edges", "bsds500", tmp, "val")
        _refused(opener, root / "val")
        _annotated(root, "val", "a", [[[0, 1]], [[0, 1]]])
        found, second = opener(), root / "val_edges/a_1.png"
        check, read = lambda: data.check_segmentation(found), lambda: found[0]
        for call in (check, read):
            _label(second, [[0, 1, 1]])
            _refused(call, second, "3x1", "2x1")
            _label(root / "val_edges/a_0.png", [[0, 1, 1]])
            _refused(call, root / "val/a.jpg", "3x1", "2x1")
            second.write_bytes(b"broken")
            _refused(call, second, "cannot read")
            _annotated(root, "val", "a", [[[0, 1]], [[0, 1]]])
            call()
        _picture(root / "val/b.jpg")
        _refused(opener, root / "val/b.jpg", root / "val_edges/b_0.png")
        for path in (root / "val_edges").iterdir():
            path.unlink()
        (root / "val_edges").rmdir()
        _refused(opener, root / "val_edges")
        opener = data.open_task
        _refused(lambda: opener("edges", "bsds500", tmp, "dev"), "dev", "trainval")
        _refused(lambda: opener("edges", "bsds500"), "--data-root")
        _refused(lambda: opener("edges", "camvid", tmp), "camvid", "synthetic, bsds500")
        _refused(lambda: opener("depth", "synthetic"), "depth", "segmentation, saliency, edges")
        _refused(lambda: opener("edges", "synthetic", num_classes=11), "2 classes, not 11")
        _refused(lambda: opener("edges", "synthetic", split="trainval"), "trainval")
    assert opener("segmentation", "synthetic", size=(64, 96)).num_classes == 11


def test_synthetic_saliency_and_edges():
    for task in ("saliency", "edges"):
        sets = [data.open_task(task, "synthetic", None, "val", None, (64, 96), 5) for _ in range(2)]
        other = data.open_task(task, "synthetic", None, "val", None, (64, 96), 6)
        list(map(sets[1].__getitem__, (7, 2)))  # history must not matter
        (image, label), again = sets[0][3], sets[1][3]
        assert image.tobytes() == again[0].tobytes() and label.tobytes() == again[1].tobytes()
        assert label.tobytes() not in (sets[0][4][1].tobytes(), other[3][1].tobytes())
        assert image.mode == "RGB" and label.mode == "L" and image.size == label.size == (96, 64)
        assert data.check_segmentation(sets[0]) == 0 and "3" in sets[0].name(3)
        values = {v for i in range(8) for v in np.unique(np.asarray(sets[0][i][1])).tolist()}
        assert values == ({0, 1} if task == "saliency" else {0, 1, 255})
        if task == "saliency":
            masks = np.stack([np.asarray(sets[0][i][1]) for i in range(40)])
            columns = (masks.sum((0, 1)) / masks.sum()) @ np.arange(96)
            assert 0.03 < masks.mean() < 0.4 and abs(columns - 48) < 4 and masks.any((1, 2)).all()
            continue
        scenes = data.open_segmentation("synthetic", None, "val", None, (64, 96), 5)
        for i in range(6):
            k, marks = np.asarray(scenes[i][1]), sets[0].annotations(i)
            assert 4 <= len(marks) <= 6 and len({m.tobytes() for m in marks}) > 1
            border = np.zeros(k.shape, bool)
            for y, x in np.ndindex(64, 96):
                border[y, x] = any(k[min(y + a, 63), min(x + b, 95)] != k[y, x]
                                   for a, b in ((0, 1), (1, 0)))
            near = np.lib.stride_tricks.sliding_window_view(np.pad(border, 1), (3, 3)).any((2, 3))
            assert not any((m & ~near).any() for m in marks)  # moved by a pixel at most
            assert (border & np.any(marks, 0)).sum() > 0.8 * border.sum()
            assert np.array_equal(np.asarray(sets[0][i][1]), data.consensus(marks))


def _pieces(mask):
    """Number of 8-connected components, by flood fill."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        stack, count = [left.pop()], count + 1
        while stack:
            y, x = stack.pop()
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
    return count


def test_edge_transform_keeps_thin_lines():
    turn, sides = data.TurnEdges(), (61, 75)
    lines = {"row": [(30, x) for x in range(10, 60)], "column": [(y, 37) for y in range(10, 50)],
             "diagonal": [(12 + t, 15 + t) for t in range(36)],
             "steep": [(12 + t, 20 + t // 2) for t in range(36)]}
    for (kind, points), factor, step in itertools.product(lines.items(), (0.5, 1, 1.5), range(16)):
        label = torch.zeros(sides, dtype=torch.uint8)
        label[tuple(zip(*points))] = 1
        params = {"size": [round(s * factor) for s in sides], "quarters": step // 4,
                  "angle": step % 4 * 22.5}
        image = data.tv_tensors.Image(label[None].repeat(3, 1, 1) * 255)
        bright = turn.transform(image, params)[0].as_subclass(torch.Tensor).float()
        out = turn.transform(data.tv_tensors.Mask(label), params).as_subclass(torch.Tensor)
        edge = out == 1
        assert out.dtype == torch.uint8 and out.shape == bright.shape and _pieces(edge.numpy()) == 1
        length = factor * np.hypot(*np.subtract(points[-1], points[0]))
        assert 0.65 < edge.sum() / length < (2.6 if factor > 1 else 2.3), (kind, factor, step)
        inside = out != 255
        over = lambda *shift: (bright * inside * edge.roll(shift, (0, 1))).sum()
        assert over(0, 0) > max(over(-4, 0), over(4, 0), over(0, -4), over(0, 4))
        assert inside.all() if step % 4 == 0 else 0.6 < inside.float().mean() < 1
    ignored = torch.full(sides, 255, dtype=torch.uint8)
    ignored[20] = 1
    out = turn.transform(data.tv_tensors.Mask(ignored), params)
    assert set(out.unique().tolist()) == {1, 255}  # ignore stays ignore, the edge wins over it


def test_edge_transform_through_the_loader():
    edges = data.open_task("edges", "synthetic", size=(48, 64))
    loader = data.make_loader(edges, range(6), data.edge_transform((40, 40)), 3, True, seed=2)
    batches = [list(loader) for _ in range(2)]
    for (images, labels), (again, same) in zip(*batches):
        assert images.shape == (3, 3, 40, 40) and labels.shape == (3, 40, 40)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert torch.equal(images, again) and torch.equal(labels, same)

    class Full(_Coded):  # no ignored pixel of its own, all of it an edge
        def __getitem__(self, i):
            return super().__getitem__(i)[0], Image.fromarray(np.ones((40, 60), np.uint8))

    samples, sizes = data.Samples(Full(), data.edge_transform((120, 120))), set()
    for epoch in range(60):
        image, label = samples[epoch, 0]
        assert set(label.unique().tolist()) == {1, 255}
        # One pixel away from the picture, as those at its turned border are mixed.
        outside = F.max_pool2d((label == 1).float()[None], 3, 1, 1)[0] == 0
        assert image[:, outside].abs().max() < 0.03  # the mean colour
        sizes.add(int((label == 1).sum()))
    assert {20 * 30, 40 * 60, 60 * 90} <= sizes and len(sizes) >= 9


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def _find(path, color, off=40):
    """(rows, columns) of the pixels within `off` of an RGB colour, over the whole picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.nonzero(np.abs(pixels - np.array(color)).max(-1) <= off)


def _value_error(function, *arguments):
    try:
        function(*arguments)
    except ValueError:
        return True
    return False


def test_overlay_blends_and_darkens_ignored_pixels():
    image = torch.tensor([[[100, 200]], [[0, 10]], [[50, 80]]], dtype=torch.uint8)   # (3, 1, 2)
    out = common.overlay(image, torch.tensor([[1, 255]]), [(0, 0, 0), (200, 100, 20)], alpha=0.5)
    assert out.size == (2, 1) and out.mode == "RGB"
    assert out.getpixel((0, 0)) == (150, 50, 35)        # 0.5 * (100, 0, 50) + 0.5 * (200, 100, 20)
    assert out.getpixel((1, 0)) == (100, 5, 40)         # ignored: half of (200, 10, 80)
    other = common.overlay(image.permute(1, 2, 0).numpy(), np.array([[1, 255]], np.uint8),
                      np.array([(0, 0, 0), (200, 100, 20)]), alpha=0.5)
    assert other.tobytes() == out.tobytes()             # (H, W, 3) arrays give the same
    default = common.overlay(image, torch.tensor([[1, 1]]), [(0, 0, 0), (200, 100, 20)])
    assert default.getpixel((0, 0)) == (155, 55, 34)    # third: 0.45 * 50 + 0.55 * 20 = 33.5


def test_overlay_refuses_what_would_give_a_wrong_picture():
    palette, label = [(0, 0, 0), (9, 9, 9)], torch.zeros(4, 5, dtype=torch.long)
    assert _value_error(common.overlay, torch.zeros(3, 4, 5), label, palette)   # float
    assert _value_error(common.overlay, torch.zeros(3, 5, 4, dtype=torch.uint8), label, palette)
    assert _value_error(common.overlay, torch.zeros(3, 4, 5, dtype=torch.uint8), label + 2, palette)
    assert _value_error(common.overlay, torch.zeros(3, 4, 5, dtype=torch.uint8), label - 1, palette)


def test_comparison_grid_size_and_places():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "new", "grid.png")  # the folder is made
        red, blue = Image.new("RGB", (1000, 500), "red"), Image.new("RGB", (200, 100), "blue")
        common.comparison([[red, blue], [red]], ["picture", "label"], path)
        grid = Image.open(path).convert("RGB")
        assert grid.size == (2 * 364 + 4, 24 + 2 * 184)
        assert grid.getpixel((100, 100)) == (255, 0, 0) == grid.getpixel((100, 300))
        assert grid.getpixel((500, 100)) == (0, 0, 255)
        assert grid.getpixel((500, 300)) == (255, 255, 255) == grid.getpixel((366, 100))
        common.comparison([[Image.new("RGB", (32, 16), "red")]], [], path)
        assert Image.open(path).size == (64 + 8, 24 + 32 + 4)       # never more than twice
        assert os.listdir(os.path.dirname(path)) == ["grid.png"]    # no temporary file is left
    assert _value_error(common.comparison, [], [], "never.png") and not os.path.exists("never.png")


def test_ticks_follow_the_1_2_5_rule_and_enclose():
    texts = [text for _, text in common._ticks([0.0, 0.93], 5)]
    assert texts == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [value for value, _ in common._ticks([0.0, 3.0], 8, 1)] == [0, 1, 2, 3]
    for values in ([5.0], [0.0], [-3.0, -2.9], [1e-7, 3e-7], [1e9, 2e9], [0.1, 0.3], [], [1e9]):
        for count in (1, 4, 9):
            ticks = [value for value, _ in common._ticks(values, count)]
            assert 2 <= len(ticks) <= 2 * count + 4
            assert not values or ticks[0] <= min(values) + 1e-6 * abs(min(values))
            assert not values or ticks[-1] >= max(values) - 1e-6 * abs(max(values))
            assert len({text for _, text in common._ticks(values, count)}) == len(ticks)


def test_line_chart_puts_the_peak_at_the_top():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "line.png")
        peak = [(x, 1.0 if x == 10 else 0.0) for x in range(21)] + [(5.5, math.nan), (3, math.inf)]
        common.line_chart(path, "title", "epoch", "share",
                          {"a": peak, "dot": [(5, 0.5)], "none": []})
        assert Image.open(path).size == (760, 420)
        chart = common._Chart("", "", "", [0.0, 20.0], [0.0, 1.0], ["a", "dot", "none"], (760, 420),
                         tight=True)
        rows, columns = _find(path, common.CHART_COLORS[0])
        inside = columns < chart.box[2] / 2             # without the legend
        top = rows[inside].argmin()
        x, y = chart.at(10, 1)
        assert abs(columns[inside][top] - x / 2) <= 3 and abs(rows[inside][top] - y / 2) <= 4
        assert abs(rows[inside].max() - chart.at(0, 0)[1] / 2) <= 3
        rows, columns = _find(path, common.CHART_COLORS[1])
        inside = columns < chart.box[2] / 2
        x, y = chart.at(5, 0.5)                         # a single point is a dot
        assert inside.sum() > 10
        assert abs(columns[inside].mean() - x / 2) <= 1 and abs(rows[inside].mean() - y / 2) <= 1
        assert len(_find(path, common.CHART_COLORS[2])[0]) > 30          # empty, but in the legend
        common.line_chart(path, "", "", "", {})
        common.line_chart(path, "", "", "", {"a": [], "b": [(math.nan, 1.0)]})
        common.line_chart(path, "", "", "", {"constant": [(i, 3.0) for i in range(4)]})


def test_scatter_chart_dots_and_diagonal():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "scatter.png")
        groups = {"a": [(0, 0), (10, 10, "corner"), (5, math.nan)], "b": [(2.0, 8.0, "b")]}
        common.scatter_chart(path, "t", "x", "y", groups, diagonal=True, annotate="r = 0.99")
        values = [0.0, 10.0]
        chart = common._Chart("", "", "", values, values, groups, (520, 480))
        assert chart.range == (0, 0, 10, 10)
        pixels = Image.open(path).convert("RGB")
        for (x, y), color in (((10, 10), 0), ((2, 8), 1)):
            place = tuple(round(v / 2) for v in chart.at(x, y))
            assert pixels.getpixel(place) == common.CHART_COLORS[color]
        x, y = (round(v / 2) for v in chart.at(5, 5))
        assert min(sum(pixels.getpixel((x, y + d))) for d in (-1, 0, 1)) < 620   # the line y = x
        common.scatter_chart(path, "", "", "", {})


def test_stacked_chart_areas():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stack.png")
        layers = {"a": [0.25] * 5, "b": [0.5, 0.5, 0.5, 0.5, math.nan], "c": [0.25] * 4 + [0.75]}
        common.stacked_chart(path, "t", "epoch", layers, xs=[0, 10, 20, 30, 40])
        chart = common._Chart("", "", "", [0.0, 40.0], [0.0, 1.0], layers, (760, 420), tight=True)
        pixels = Image.open(path).convert("RGB")
        for y, color in ((0.1, 0), (0.5, 1), (0.9, 2)):
            place = tuple(round(v / 2) for v in chart.at(15, y))
            assert pixels.getpixel(place) == common.CHART_COLORS[color]
        common.stacked_chart(path, "t", "epoch", {"a": [0.5], "b": [0.5]})
        common.stacked_chart(path, "t", "epoch", {"a": torch.tensor([0.5, 0.6])})
        common.stacked_chart(path, "t", "epoch", {"a": []})
        common.stacked_chart(path, "t", "epoch", {})
        assert _value_error(common.stacked_chart, path, "t", "x", {"a": [1, 1], "b": [0]})
        assert _value_error(common.stacked_chart, path, "t", "x", {"a": [1, 1]}, (300, 200),
                            [1, 2, 3])


def test_heat_map_colours():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "heat.png")
        common.heat_map(path, "t", ["r0", "r1"], ["c0", "c1"], [[1, 0], [math.nan, 0.5]],
                        (400, 300))
        image = Image.open(path).convert("RGB")
        assert image.size == (400, 300)                 # rows: 60..160 and 160..260
        assert image.getpixel((60, 70)) == (8, 48, 107)
        assert image.getpixel((370, 70)) == (255, 255, 255)
        assert image.getpixel((60, 250)) == common.NO_VALUE
        assert image.getpixel((370, 250)) == (132, 152, 181)
        common.heat_map(path, "t", list(range(45)), list("abcde"), torch.rand(45, 5))
        assert Image.open(path).height == 100 + 45 * 20
        assert _value_error(common.heat_map, path, "t", ["r"], ["c"], [[1, 2]])


# ---------------------------------------------------------------------------------------------
# common.py and latency.py
# ---------------------------------------------------------------------------------------------


def test_confusion_matrix_against_loops():
    torch.manual_seed(0)
    label, guess = torch.randint(0, 4, (2, 9, 7)), torch.randint(0, 4, (2, 9, 7))
    label[0, :2] = 255
    label[label == 2], guess[guess == 3] = 0, 1           # 2 only predicted, 3 only in the label
    matrix = common.ConfusionMatrix(6)                    # 4 and 5 occur nowhere
    matrix.update(label[:1], guess[:1])
    matrix.update(label[1:], guess[1:])
    ious = []
    pairs = [(a, b) for a, b in zip(label.flatten().tolist(), guess.flatten().tolist()) if a != 255]
    for k in range(6):
        union = sum(a == k or b == k for a, b in pairs)
        if union:
            ious.append(sum(a == k and b == k for a, b in pairs) / union)
    assert len(ious) == 4 and abs(matrix.miou() - sum(ious) / 4) < 1e-12
    assert abs(matrix.pixel_accuracy() - sum(a == b for a, b in pairs) / len(pairs)) < 1e-6


def test_ohem_and_cross_entropy_against_loops():
    torch.manual_seed(1)
    logits, label = 2 * torch.randn(2, 5, 6, 8), torch.randint(0, 5, (2, 6, 8))
    label[0, 0] = 255
    for threshold, least in ((0.7, None), (0.999999, 3), (1e-6, 11)):
        losses = sorted((-math.log(float(torch.softmax(logits[b, :, i, j], 0)[label[b, i, j]]))
                         for b in range(2) for i in range(6) for j in range(8)
                         if label[b, i, j] != 255), reverse=True)
        hard = [v for v in losses if v > -math.log(threshold)]
        kept = max(len(hard), 96 // 16 if least is None else least)
        expected = sum(losses[:kept]) / kept
        assert abs(float(common.ohem(logits, label, threshold, least)) - expected) < 1e-5
    void = torch.full_like(label, 255)
    for loss in (common.ohem, common.cross_entropy):      # nothing labelled: zero, not NaN
        assert float(loss(logits, void)) == 0
    mean = F.cross_entropy(logits, label, ignore_index=255)
    assert abs(float(common.cross_entropy(logits, label) - mean)) < 1e-6


def test_count_params_and_macs_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 4, 1, groups=4, bias=False))
    assert common.count_params(net) == 3 * 8 * 9 + 8 + 16 + 8
    assert common.count_macs(net, (10, 14)) == 5 * 7 * (8 * 27 + 4 * 2)


def test_fold_bn_keeps_the_output():
    torch.manual_seed(0)
    for net in (torchvision.models.resnet18(), torchvision.models.mobilenet_v2()):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                shake(m)
        net, x = net.double().eval(), torch.randn(1, 3, 64, 64).double()
        folded = common.fold_bn(net)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert torch.allclose(folded(x), net(x), rtol=1e-9)
        assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()), "the original changed"


def test_checkpoints_are_whole_or_refused():
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "last.pt")
        common.save_checkpoint(path, model={"w": torch.ones(3)}, epoch=1)
        try:
            with common.replacing(path) as temporary:
                Path(temporary).write_text("half")
                raise RuntimeError
        except RuntimeError:
            pass
        assert common.load_checkpoint(path)["epoch"] == 1 and os.listdir(tmp) == ["last.pt"]
        path.write_bytes(path.read_bytes()[:200])
        _refused(lambda: common.load_checkpoint(path), path, "truncated")
        _refused(lambda: common.load_checkpoint(Path(tmp, "none.pt")), "no checkpoint")
        torch.save([1], path)
        _refused(lambda: common.load_checkpoint(path), "no 'model'")
        _refused(lambda: common.load_weights(nn.Linear(2, 2), {"weight": torch.zeros(3, 2)}, path),
                 "does not fit")


def test_command_line_from_the_dataclass():
    def parse(*flags):
        return common.parse_args(fastersg.Config, "fastersg", fastersg.STAGES, fastersg.QUICK, "",
                                 list(flags))
    stages, quick = parse("--search", "--train", "--no-decouple", "--widths", "2", "8")
    assert stages == {"search", "train"} and not quick.decouple and quick.widths == (2, 8)
    assert quick.layers == fastersg.QUICK["layers"] and quick.out == "runs/fastersg"
    _, paper = parse("--search", "--dataset", "camvid", "--lr", "0.5")
    assert paper.layers == 16 and paper.search_size == (160, 320) and paper.lr == 0.5
    assert parse("--bench", "--preset", "paper")[1].frame == (1024, 2048)
    assert parse("--bench-search", "--dataset", "camvid", "--preset", "quick")[1].layers == 6


def test_latency_table_is_complete_and_refuses_foreign_files():
    with tempfile.TemporaryDirectory() as tmp:
        made = []
        entries = {f"conv {c}": (lambda c=c: made.append(c) or nn.Conv2d(3, c, 3), [(1, 3, 16, 16)])
                   for c in (2, 4)}
        def build():
            return latency.build_table(entries, "cpu", (16, 16), tmp, rounds=2)
        first = build()
        assert sorted(made) == [2, 4] and all(v > 0 for v in first.values())
        assert build() == first and sorted(made) == [2, 4], "measured twice"
        path = next(Path(tmp).glob("latency_*.json"))
        good = path.read_text()
        path.write_text(good.replace('"threads": ', '"threads": 9'))
        _refused(build, path, "threads")
        path.write_text(good[:-30])
        _refused(build, path, "latency table")
        path.write_text(good.replace(str(first["conv 2"]), "-1.0"))
        _refused(build, path, "positive")
    report = latency.measure(nn.Conv2d(3, 4, 3), (1, 3, 20, 20), rounds=5)
    assert 0 < report["median"] <= report["p90"] and report["frame"] == [20, 20]


# ---------------------------------------------------------------------------------------------
# fastersg.py: counts of the paper and of the release
# ---------------------------------------------------------------------------------------------


def shake(norm):
    """Give a BN statistics and scales that are not those of a fresh one."""
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.1)
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 2)


def shaken(net):
    """The network with BN statistics and scales that are not those of a fresh one."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            shake(m)
    return net


def test_published_networks_have_their_exact_size():
    for arch, params, macs in ((fastersg.PAPER_STUDENT, 3421875, 27770486784),
                               (fastersg.PAPER_TEACHER, 22115203, 107778932736)):
        net = fastersg.FasterSeg(arch, 19)
        assert common.count_params(net) == params
        assert common.count_macs(net, (1024, 2048)) == macs
    auxiliary = fastersg.FasterSeg(fastersg.PAPER_STUDENT, 19, auxiliary=True).auxiliary
    assert common.count_params(auxiliary) == 931046
    s = fastersg.FasterSeg(fastersg.PAPER_STUDENT, 19)
    assert [i for i, _ in s.paths[16]][:3] == [i for i, _ in s.paths[32]][:3]
    assert len(s.cells) == 9 + 10 - 3, "the first three cells are shared, no other"


def test_search_space_counts_of_section_4_2():
    walks = {8: 0, 16: 0, 32: 0}                          # by walking, not by the formula
    def walk(s, l):
        if l == 16:
            walks[s] += 1
            return
        walk(s, l + 1)
        if s < 32 and l < 15:
            walk(2 * s, l + 1)
    walk(8, 0)
    assert (walks[8], walks[16], walks[32]) == (1, 15, 105)
    assert fastersg.count_paths(16) == 15 + 105 + 1575 == 1695
    assert fastersg.count_combinations(16, (4, 6, 8, 10, 12)) == 21 ** 42 + 125
    assert f"{fastersg.count_combinations(16, range(5)):.1e}" == "3.4e+55"
    assert len(fastersg.cells_of(16)) == 16 + 15 + 14
    arch = fastersg.ArchParameters(fastersg.Config())
    assert sum(s == 16 for s, _ in arch.keys["beta"]) == 14
    assert sum(s == 32 for s, _ in arch.keys["beta"]) == 13


def test_table_1_macs_and_parameters():
    x = 256, 32, 64
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    group = nn.Conv2d(256, 256, 3, padding=1, groups=2, bias=False)
    zoom = fastersg.CellNet("zoom", 256, 256, 1)
    def macs(net):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, *x))
        return round(counter.get_total_flops() / 2e9, 2)
    assert [macs(net) for net in (conv, group, zoom)] == [1.21, 0.6, 0.3]
    sizes = [sum(p.numel() for p in net.parameters() if p.dim() == 4)
             for net in (conv, group, zoom)]
    assert [round(n / 1e6, 2) for n in sizes] == [0.59, 0.29, 0.59]


def test_zoomed_convolution_sees_twice_as_far():
    def field(op):
        net = fastersg.CellNet(op, 1, 1, 2).double().eval()         # stride 2: no up-sampling
        nn.init.ones_(net.first[0].weight)
        x = torch.ones(1, 1, 64, 64).double().requires_grad_()
        net(x)[0, 0, 16, 16].backward()
        return int((x.grad[0, 0].abs().sum(0) > 0).sum())
    assert field("conv") == 3 and 6 <= field("zoom") <= 7           # RF 1 and 2 in Table 1


def test_footnote_1_and_equations_5_6():
    w = fastersg.solve_latency_weights((10.42, 0.01, 5.54))
    assert [round(v, 3) for v in w] == [0.001, 0.997, 0.002] and abs(sum(w) - 1) < 1e-12
    assert fastersg.solve_latency_weights((4.0, 2.0, 0.0)) == [1 / 3, 2 / 3, 0.0]
    assert abs(fastersg.target(0.7, 16.6, 8.3, -0.07) - 0.7 / 2 ** 0.07) < 1e-12
    assert fastersg.target(0.7, 8.3, 8.3, -0.07) == 0.7
    assert [fastersg.adapt_lambda(1, ms, (155, 175)) for ms in (5.0, 6.0, 9.0)] == [0.5, 1, 2]
    assert fastersg.adapt_lambda(1, 9.0, (0, 0)) == 1


def test_distillation_against_loops():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    kl = {"paper": 0.0, "release": 0.0}
    for b, i, j in itertools.product(range(2), repeat=3):
        p, q = torch.softmax(s[b, :, i, j], 0).tolist(), torch.softmax(t[b, :, i, j], 0).tolist()
        kl["paper"] += sum(a * math.log(a / c) for a, c in zip(p, q)) / 8
        kl["release"] += sum(c * math.log(c / a) for a, c in zip(p, q)) / 8 / 3
    for kind, value in kl.items():
        assert abs(float(fastersg.distillation(s, t, kind)) - value) < 1e-6


# ---------------------------------------------------------------------------------------------
# fastersg.py: supernet, relaxation, latency
# ---------------------------------------------------------------------------------------------

SMALL = dict(layers=5, widths=(2, 4, 6), stem_chi=4, label_stride=4, search_size=(32, 64),
             frame=(64, 96), search_batch=2)


def one_hot(cfg, seed):
    """Architecture logits whose softmax is one-hot."""
    g, arch, sure = random.Random(seed), fastersg.ArchParameters(cfg), 200.0
    with torch.no_grad():
        for p in arch.parameters():
            p.fill_(-sure)
            for row in p:
                row[g.randrange(len(row))] = sure
        first = g.randrange(2, cfg.layers - 1)
        for node in ((16, first), (32, g.randrange(first + 1, cfg.layers))):
            arch.beta[arch.keys["beta"].index(node)] = torch.tensor([sure, -sure])
    return arch


def doubled(w):
    return replace(w, alpha={k: v.double() for k, v in w.alpha.items()},
                   beta={k: v.double() for k, v in w.beta.items()},
                   width={k: (j, g.double()) for k, (j, g) in w.width.items()})


def made_up_table(cfg, classes, seed=0):
    g = random.Random(seed)
    return {key: g.uniform(0.1, 1) for key in fastersg.latency_entries(cfg, classes, cfg.frame)}


def small_supernet(cfg, classes=7):
    torch.manual_seed(0)
    net = fastersg.Supernet(cfg, classes)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            shake(m)
    return net


def test_derived_equals_relaxed():
    """The property that makes a search trustworthy: one-hot weights, copied kernels, same output
    and same latency; teacher and student, all branch sets, cells shared between branches."""
    cfg = fastersg.Config(**SMALL)
    net = small_supernet(cfg).double().eval()
    ms = made_up_table(cfg, 7)
    model = fastersg.LatencyModel(cfg, ms, 7)
    image, skips, shared = torch.randn(1, 3, 38, 53).double(), 0, 0
    for seed, who in itertools.product(range(5), (fastersg.TEACHER, fastersg.STUDENT)):
        arch = one_hot(cfg, seed)
        with torch.no_grad():
            w = arch.weights("argmax" if who else "max")
            relaxed, expected_ms = net(image, doubled(w), who), model(w)
        for rates, logits in zip(net.sets, relaxed):
            found = fastersg.derive(arch, cfg, who, rates)
            small = fastersg.FasterSeg(found, 7).double().eval()
            fastersg.inherit(small, net, arch, who)
            with torch.no_grad():
                error = (small(image) - fastersg.resize(logits, image.shape[-2:])).abs().max()
            assert error < 1e-9, (seed, who, rates, error)
            skips += any(len(cells) < cfg.layers for cells in found.branches.values())
            shared += len(small.cells) < sum(len(p) for p in small.paths.values())
            if who == fastersg.STUDENT and len(rates) == 2:
                total = fastersg.table_latency(found, ms, 7)
                assert abs(total - float(expected_ms[rates])) < 1e-5, (seed, rates)
    assert skips > 10 and shared > 10, "the draws must contain shrunk skips and shared cells"


def test_relaxed_latency_is_the_expectation_over_discrete_paths():
    cfg = fastersg.Config(**{**SMALL, "layers": 4})
    torch.manual_seed(3)
    ms = made_up_table(cfg, 7)
    model, arch = fastersg.LatencyModel(cfg, ms, 7), fastersg.ArchParameters(cfg)
    with torch.no_grad():
        for p in arch.parameters():
            p.normal_()
        w = arch.weights("max")
        w.soft = arch.probabilities("gamma")
        soft = model(w)
        expected = dict.fromkeys(soft, 0.0)
        nodes = list(w.beta)
        for picks in itertools.product((0, 1), repeat=len(nodes)):
            p = math.prod(float(w.beta[n][i]) for n, i in zip(nodes, picks))
            hard = {n: F.one_hot(torch.tensor(i), 2).float() for n, i in zip(nodes, picks)}
            for rates, value in model(replace(w, beta=hard)).items():
                expected[rates] += p * float(value)
    for rates in soft:
        assert abs(float(soft[rates]) - expected[rates]) < 1e-5


def test_every_weight_that_matters_has_a_latency_gradient():
    cfg = fastersg.Config(**SMALL)
    model = fastersg.LatencyModel(cfg, made_up_table(cfg, 7), 7)
    torch.manual_seed(0)
    arch = fastersg.ArchParameters(cfg)
    with torch.no_grad():
        for p in arch.parameters():
            p.normal_(std=0.5)
    full = model.mean(arch.weights("sample", torch.Generator().manual_seed(1)))
    full.backward()
    for name in ("alpha", "beta", "gamma"):
        rows = getattr(arch, name).grad.abs().max(1).values
        assert (rows > 0).all(), (name, rows)
    grads = {n: p.grad.clone() for n, p in arch.named_parameters()}
    arch.zero_grad()
    w = (0.2, 0.5, 0.3)
    weighed = fastersg.relaxed_latency(
        model, arch.weights("sample", torch.Generator().manual_seed(1)), w)
    weighed.backward()                                    # Eq. (3): same value, weighed gradients
    assert abs(weighed.item() - full.item()) < 1e-6
    for name, factor in zip(("alpha", "beta", "gamma"), w):
        assert torch.allclose(getattr(arch, name).grad, factor * grads[name], rtol=1e-4, atol=1e-8)


def test_sensitivities_see_what_moves_the_latency():
    cfg = fastersg.Config(**SMALL)
    entries = fastersg.latency_entries(cfg, 7, cfg.frame)
    arch = fastersg.ArchParameters(cfg)
    flat = fastersg.LatencyModel(cfg, dict.fromkeys(entries, 1.0), 7)
    o, s, chi = fastersg.sensitivities(flat, arch)
    assert o > 1 and chi < 1e-6, "all operators but the skip cost the same, whatever the width"
    wide = {k: (2.0 if "->48" in k or "->96" in k or "->192" in k else 1.0) for k in entries}
    assert fastersg.sensitivities(fastersg.LatencyModel(cfg, wide, 7), arch)[2] > 1


def test_derivation_against_brute_force():
    g = random.Random(0)
    for _ in range(200):
        layers = g.randrange(4, 9)
        beta = {(s, l): (b := g.random(), 1 - b) for s, start in ((16, 2), (32, 3))
                for l in range(start, layers)}
        places = fastersg.downsampling_places(beta, layers)
        best16 = max((beta[key][0], key[1]) for key in beta if key[0] == 16)[1]
        score, l1, l2 = max((beta[16, a][0] * beta[32, b][0], a, b) for a in range(2, layers)
                            for b in range(a + 1, layers))
        assert places == {8: (), 16: (best16,), 32: (l1, l2)}
    cfg = fastersg.Config(**SMALL)
    for seed in range(30):                                # one-hot: the walk back from the end
        arch = one_hot(cfg, seed)
        with torch.no_grad():
            w = arch.weights("argmax")
        for rate in (16, 32):
            s, l, turns = rate, cfg.layers, []
            while s > 8:
                l -= (l == cfg.layers)                    # the last cell keeps its rate
                if w.beta[s, l][0] > 0.5:
                    turns.append(l)
                    s //= 2
                l -= 1
            assert tuple(sorted(turns)) == fastersg.downsampling_places(w.beta, cfg.layers)[rate]


def test_merged_operators_equal_the_plain_ones():
    """What is run as one, folded and sliced by hand is Eq. (2): outputs, gradients, statistics."""
    torch.manual_seed(0)
    for stride, size, j in itertools.product((1, 2), ((6, 10), (5, 7)), (0, 1)):
        ops = fastersg.SuperOps(6, [4, 8], stride).double()
        twin, alpha = copy.deepcopy(ops), torch.rand(5).double()
        x = torch.randn(2, 6, *size).double()
        results = []
        for net, plain in ((ops, False), (twin, True)):
            a, y = alpha.clone().requires_grad_(), x.clone().requires_grad_()
            out = (fastersg.plain_ops(net, y, a, j) if plain else
                   net(y, fastersg.halve(y), a, j))
            out.square().sum().backward()
            found = {"out": out, "x": y.grad, "alpha": a.grad, **dict(net.named_buffers())}
            results.append(found | {k: p.grad for k, p in net.named_parameters()
                                    if p.grad is not None})
        assert results[0].keys() == results[1].keys() and len(results[0]) > 20
        for key, value in results[0].items():
            assert torch.allclose(value.double(), results[1][key].double(), atol=1e-9), key


def test_a_width_is_a_small_convolution():
    """A slice of the superkernel equals a separate small convolution, values and gradients."""
    torch.manual_seed(0)
    for hw in ((9, 7), (3, 4)):                           # 3x4: the matrix product of small maps
        big = fastersg.SuperConv(2, 12, [4, 6, 10], 1).double().train()
        x = torch.randn(2, 8, *hw).double().requires_grad_()
        y = big(x, 1, torch.tensor([0.3, 0.9]).double())  # 8 of 12 inputs, 6 of 10 outputs
        probe = torch.randn_like(y)
        (y * probe).sum().backward()
        small, ref = nn.Conv2d(8, 12, 3, padding=1, bias=False).double(), x.detach().clone()
        small.weight.data.copy_(big.weight[:, :6, :8].reshape(12, 8, 3, 3))
        norm = nn.BatchNorm2d(12).double()
        z = norm(small(ref.requires_grad_())) * torch.tensor([0.3] * 6 + [0.9] * 6).view(-1, 1, 1)
        (z * probe).sum().backward()
        assert torch.allclose(y, z) and torch.allclose(x.grad, ref.grad)
        assert torch.allclose(big.weight.grad[:, :6, :8].reshape(12, 8, 3, 3), small.weight.grad)
        outside = big.weight.grad.clone()
        outside[:, :6, :8] = 0
        assert not outside.any(), "channels outside the slice must get no gradient"
        assert torch.allclose(big.norms[1].running_mean, norm.running_mean)
        assert not big.norms[0].running_mean.any(), "BN of the other widths must not move"


def test_gumbel_softmax_draws_follow_gamma():
    cfg = fastersg.Config(**SMALL)
    arch = fastersg.ArchParameters(cfg)
    with torch.no_grad():
        arch.gamma.copy_(torch.tensor([0.0, 1.0, 2.0]).expand_as(arch.gamma))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = torch.softmax(arch.gamma[0], 0)
        draws = [w[0] for _ in range(300) for w in arch.weights("sample", g).width.values()]
    for j in range(3):
        assert abs(draws.count(j) / len(draws) - float(p[j])) < 0.03
    one, two = (arch.weights("sample", torch.Generator().manual_seed(5)) for _ in range(2))
    assert [j for j, _ in one.width.values()] == [j for j, _ in two.width.values()]
    gate = next(iter(one.width.values()))[1]
    assert abs(gate.item() - 1) < 1e-6                    # the value is hard ...
    gate.backward()
    assert arch.gamma.grad.abs().max() > 0                # ... the gradient soft
    assert {j for j, _ in arch.weights("min").width.values()} == {0}
    assert {j for j, _ in arch.weights("max").width.values()} == {2}


def test_updates_do_not_leak_into_each_other():
    cfg = fastersg.Config(**SMALL)
    s = fastersg.Searcher(cfg, 7, torch.device("cpu"))
    s.net.train()
    batch = torch.randn(2, 3, 32, 64), torch.randint(0, 7, (2, 32, 64))
    model = fastersg.LatencyModel(cfg, made_up_table(cfg, 7), 7)
    def copies():
        return ({k: v.clone() for k, v in s.net.state_dict().items() if "num_batches" not in k},
                [{k: v.clone() for k, v in a.state_dict().items()} for a in s.archs])
    def same(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)
    fastersg.pretrain_step(s.net, s.archs, batch, s.w, s.generator, cfg)
    net, archs = copies()
    fastersg.update_weights(s.net, s.archs[1], lambda _: 1, ("max", "sample"), *batch, s.w,
                            s.generator, cfg)
    assert same(copies()[1][0], archs[0]) and same(copies()[1][1], archs[1])
    assert not same(copies()[0], net)
    grads = {k: p.grad.clone() for k, p in s.net.named_parameters() if p.grad is not None}
    net, archs = copies()
    fastersg.update_architecture(s.net, s.archs[1], 1, *batch, s.a[1], s.generator, cfg,
                                 lambda w: 0.01 * fastersg.relaxed_latency(model, w, (1, 1, 1)))
    assert same(copies()[0], net), "an architecture step moved weights or BN statistics"
    assert same({k: p.grad for k, p in s.net.named_parameters() if k in grads}, grads)
    assert same(copies()[1][0], archs[0]) and not same(copies()[1][1], archs[1])
    fastersg.update_architecture(s.net, s.archs[0], 0, *batch, s.a[0], s.generator, cfg)
    assert s.archs[0].gamma.grad is None or not s.archs[0].gamma.grad.any()    # always widest


def test_search_data_are_disjoint_and_validation_is_unseen():
    cfg = fastersg.Config(**{**SMALL, "held_out": 0.1})
    opened, original = [], data.open_segmentation
    data.open_segmentation = lambda *a: opened.append(a[2]) or original(*a)
    try:
        _, loaders = fastersg.search_loaders(cfg)
    finally:
        data.open_segmentation = original
    a, b, held = (set(loader.sampler.indices) for loader in loaders)
    assert not (a & b or a & held or b & held) and len(a | b | held) == 400
    assert (len(a), len(b), len(held)) == (180, 180, 40) and opened == ["train"]


def test_networks_of_any_size_share_export_and_round_trip():
    torch.manual_seed(0)
    g, cfg = random.Random(1), fastersg.Config(**SMALL)
    for branches in (1, 2):
        cfg.branches = branches
        arch = fastersg.random_architecture(cfg, g)
        assert len(arch.branches) == branches
        assert fastersg.Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
        net = fastersg.FasterSeg(arch, 5, auxiliary=True)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                shake(m)
        x = torch.randn(2, 3, 37, 75)
        outputs = net(x)                                  # a list if the branches give auxiliaries
        assert all(y.shape == (2, 5, 37, 75) for y in
                   (outputs if isinstance(outputs, list) else [outputs]))
        net.eval()
        assert net(x).shape == (2, 5, 37, 75)
        folded = common.fold_bn(net)
        assert torch.allclose(folded(x), net(x), atol=1e-4)
    with tempfile.TemporaryDirectory() as tmp:
        assert common.export(net, (33, 47), Path(tmp, "net.pt2")) < 1e-5
    shared = fastersg.FasterSeg(fastersg.PAPER_STUDENT, 3).eval()
    calls = []
    shared.cells[0].register_forward_hook(lambda *_: calls.append(1))
    shared(torch.zeros(1, 3, 32, 64))
    assert len(calls) == 1, "a shared cell must run once for both branches"


def test_random_control_has_the_latency_of_the_student():
    cfg = fastersg.Config(**SMALL)
    ms = made_up_table(cfg, 7)
    student = fastersg.random_architecture(cfg, random.Random(4))
    twin = fastersg.random_like(cfg, student, ms, 7)
    assert abs(fastersg.table_latency(twin, ms, 7) / fastersg.table_latency(student, ms, 7) - 1) \
        <= 0.03 and twin != student


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    arch = fastersg.Architecture(2, {16: fastersg._branch("conv 8 32, zoom_x2 / 8 64"),
                                     8: fastersg._branch("conv 8 32")})
    scenes = data.open_segmentation("synthetic", size=(64, 128))
    samples = data.Samples(scenes, data.eval_transform())
    x, y = (torch.stack(t) for t in zip(samples[0, 0], samples[0, 1]))
    net = fastersg.FasterSeg(arch, 11)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(100):
        loss = common.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess, valid = net(x).argmax(1), y != 255
    assert (guess == y)[valid].float().mean() > 0.9


# ---------------------------------------------------------------------------------------------
# fastersg.py as a process
# ---------------------------------------------------------------------------------------------

TINY = ("--dataset folder --num-classes 3 --layers 4 --widths 2 4 --stem-chi 2 --search-size 32 64 "
        "--search-scale 1 --search-batch 2 --search-steps 2 --pretrain-epochs 1 --search-epochs 2 "
        "--held-out 0.2 --frame 32 64 --size 32 64 --epochs 2 --batch-size 4 --lr 0.02 "
        "--arch-lr 0.05").split()


def tiny_set(root):
    """12 + 4 pictures of three classes: a bright disc and a dark bar on grey ground."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for i in range(n):
            y, x = np.mgrid[:32, :64]
            cy, cx, bar = rng.integers(8, 24), rng.integers(8, 56), rng.integers(0, 56)
            bars = np.where(abs(x - bar) < 3, 2, 0)
            label = np.where((y - cy) ** 2 + (x - cx) ** 2 < 50, 1, bars)
            grey = np.array([120, 220, 30])[label] + rng.integers(-20, 20, (32, 64))
            for folder, values, suffix in (("images", grey, ".png"), ("labels", label, ".png")):
                path = Path(root, split, folder, f"{i}{suffix}")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(path)
    return str(root)


def run(*flags, script="fastersg.py", before=(), code=0):
    """Run a script as a user does; returns (stdout, stderr) and checks the exit code."""
    done = subprocess.run([sys.executable, *before, str(HERE / script), *map(str, flags)],
                          capture_output=True, text=True, timeout=280)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def refused(*flags, words=(), script="fastersg.py"):
    """The command ends with exit code 2 and one sentence on stderr that holds all words."""
    _, stderr = run(*flags, code=2, script=script)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in stderr and len(lines) == 1, stderr
    for word in words:
        assert str(word) in lines[0], f"'{word}' is missing in: {lines[0]}"


def state_of(path):
    """All tensors of a checkpoint, flat."""
    flat = {}
    def visit(value, name):
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, (dict, list)):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                visit(v, f"{name}.{k}")
    visit(torch.load(path, weights_only=True), "")
    return flat


def killed(flags, checkpoint, script="fastersg.py"):
    """Start a run, kill -9 it soon after `checkpoint` appears."""
    process = subprocess.Popen([sys.executable, str(HERE / script), *map(str, flags)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not checkpoint.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    _, stderr = process.communicate()
    assert checkpoint.exists(), stderr.decode()


def test_stages_resume_after_kill_bit_for_bit():
    """Whole runs as processes: search, train, eval, bench, export; killed twice and resumed, the
    weights are those of the run that was left alone."""
    with tempfile.TemporaryDirectory() as tmp:
        base = [*TINY, "--data-root", tiny_set(Path(tmp, "set"))]
        whole, broken = Path(tmp, "runs", "whole"), Path(tmp, "runs", "broken")
        export = Path(tmp, "student.pt2")
        out, _ = run("--search", "--train", "--eval", "--bench", *base, "--out", whole,
                     "--export", export)
        for word in ("Table 2", "supernet_miou", "derived_miou", "retrained mIoU", "next: python",
                     "27.770487 G", "teacher: best"):
            assert word in out, f"'{word}' is missing in:\n{out}"
        for name in ("config.json", "arch.json", "log.jsonl", "last.pt", "bench.json",
                     "arch_student.png", "arch_teacher.png", "search_trajectory.png",
                     "search_beta.png", "student/segmentations.png", "student/best.pt"):
            assert (whole / name).stat().st_size > 0, name
        net = torch.export.load(export).module()
        assert net(torch.zeros(1, 3, 32, 64)).shape == (1, 3, 32, 64)

        stages = ["--search", "--train", *base, "--out", broken]
        killed(stages, broken / "last.pt")
        killed([*stages, "--resume"], broken / "student" / "last.pt")
        run(*stages, "--resume")
        for name in ("last.pt", "teacher/last.pt", "student/last.pt", "student/best.pt"):
            a, b = state_of(whole / name), state_of(broken / name)
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]), f"{name}{key} differs after resuming"
        assert (whole / "arch.json").read_text() == (broken / "arch.json").read_text()

        for flags in (["--no-distill"], ["--network", "random"], ["--network", "pruned_teacher"]):
            out, _ = run("--train", "--eval", *base, "--out", whole, *flags, "--epochs", "1")
            assert "retrained mIoU on val" in out
        before = state_of(whole / "random" / "last.pt")   # a diverging run leaves it in place
        refused("--train", *base, "--out", whole, "--network", "random", "--no-distill", "--lr",
                "1e30", "--clip", "0", words=("not finite", "step"))
        assert all(torch.equal(v, before[k])
                   for k, v in state_of(whole / "random" / "last.pt").items())

        best = whole / "student" / "best.pt"
        best.write_bytes(best.read_bytes()[:5000])
        refused("--eval", *base, "--out", whole, words=(best, "truncated"))
        refused("--eval", *base, "--out", whole, "--arch", "paper", "--weights",
                whole / "teacher" / "best.pt", words=("another architecture",))


def test_published_architecture_trains_on_any_set():
    with tempfile.TemporaryDirectory() as tmp:
        out, _ = run("--train", "--eval", *TINY, "--data-root", tiny_set(Path(tmp, "set")), "--out",
                     Path(tmp, "out"), "--arch", "paper", "--no-distill", "--epochs", "1", "--amp")
        assert "student: retrained mIoU on val" in out


def test_ablations_of_table_3_and_figure_4():
    with tempfile.TemporaryDirectory() as tmp:
        base = ["--search", *TINY, "--data-root", tiny_set(Path(tmp, "set"))]
        run(*base, "--widths", "2", "--branches", "1", "--out", Path(tmp, "runs", "one"))
        arch = fastersg.load_architecture(str(Path(tmp, "runs", "one", "arch.json")), "student")
        assert len(arch.branches) == 1
        assert {c.chi for cells in arch.branches.values() for c in cells} <= {2}
        out, _ = run(*base, "--no-decouple", "--fps-range", "1", "2", "--out",
                     Path(tmp, "runs", "a"))
        assert "Table 2" not in out
        log = common.read_log(Path(tmp, "runs", "a"), "search")
        assert [r["lam"] for r in log] == [0.01, 0.005, 0.0025]


def test_synthetic_search_from_the_command_line():
    with tempfile.TemporaryDirectory() as tmp:
        flags = TINY[4:]                                  # without the data set: the default
        run("--search", *flags, "--out", Path(tmp, "r"))
        arch = json.loads(Path(tmp, "r", "arch.json").read_text())
        assert arch["classes"] == 11 and set(arch["student"]["branches"]) <= {"8", "16", "32"}


def test_synchronised_bn_leaves_the_network_plain():
    """The twin that trains on several GPUs shares every tensor, so the network itself can be cut
    and folded at any time. (Statistics over ranks need GPUs; in one process the twin is plain.)"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(
        nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)))
    twin = common.synchronised(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in twin.modules()) == 2
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules())
    for a, b in zip((*net.parameters(), *net.buffers()), (*twin.parameters(), *twin.buffers()),
                    strict=True):
        assert a.data_ptr() == b.data_ptr()
    optimizer, before = torch.optim.SGD(net.parameters(), 0.1), copy.deepcopy(net.state_dict())
    twin(torch.randn(8, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    for (key, a), b in zip(net.state_dict().items(), before.values()):
        assert key.startswith(("0.bias", "2.0.bias")) or not torch.equal(a, b), key
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(net.eval()(x), twin.eval()(x))
        assert torch.allclose(common.fold_bn(net)(x), net(x), atol=1e-5)
    assert len(common.narrowed(net[1], torch.tensor([0, 2])).running_mean) == 2


def test_two_processes_end_with_equal_weights():
    """torchrun with gloo: both ranks hold the same weights, close to one process with the joint
    batch (not equal: BN and OHEM see half of it)."""
    probe = ("import sys, hashlib, torch, torch.distributed as dist; sys.path.insert(0, {here!r}); "
             "import common, fastersg\n"
             "def tell(tag, net):\n"
             "    h = hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in "
             "net.parameters())).hexdigest()\n"
             "    sys.stdout.write(f'\\nHASH {{tag}} {{common.rank()}} {{h}}\\n')\n"
             "    sys.stdout.flush()\n"
             "finish = fastersg.finish_search\n"
             "def finish_and_tell(s, *a):\n"
             "    tell('supernet', s.net); tell('archs', s.archs); finish(s, *a)\n"
             "fastersg.finish_search = finish_and_tell\n"
             "fit = fastersg.fit\n"
             "def fit_and_tell(stage, net, *a):\n"
             "    best = fit(stage, net, *a); tell(stage, net); return best\n"
             "fastersg.fit = fit_and_tell\n"
             "common.run_main(fastersg.main)\n")
    with tempfile.TemporaryDirectory() as tmp:
        script = Path(tmp, "probe.py")
        script.write_text(probe.format(here=str(HERE)))
        base = ["--search", "--train", *TINY, "--data-root", tiny_set(Path(tmp, "set")),
                "--no-distill", "--search-batch", "4", "--out"]
        out, _ = run(*base, Path(tmp, "runs", "two"), script=script, before=(
            "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"))
        hashes = re.findall(r"HASH (supernet|archs|student) ([01]) ([0-9a-f]{64})", out)
        for tag in ("supernet", "archs", "student"):
            found = {rank: value for name, rank, value in hashes if name == tag}
            assert set(found) == {"0", "1"} and found["0"] == found["1"], (tag, found, out)
        run(*base, Path(tmp, "runs", "one"))
        two, one = (state_of(Path(tmp, "runs", n, "last.pt")) for n in ("two", "one"))
        far = sum(float((two[k] - one[k]).pow(2).sum()) for k in one if k.startswith(".model")
                  and k.endswith("weight"))
        size = sum(float(one[k].pow(2).sum()) for k in one if k.startswith(".model")
                   and k.endswith("weight"))
        assert math.sqrt(far / size) < 0.05, math.sqrt(far / size)


def test_wrong_input_ends_in_one_sentence():
    with tempfile.TemporaryDirectory() as tmp:
        root = tiny_set(Path(tmp, "set"))
        tail = ["--out", Path(tmp, "r"), "--data-root", root]
        refused("--search", *TINY, "--out", tmp, "--data-root", Path(tmp, "no"), words=("exist",))
        refused("--train", *TINY, *tail, words=("arch.json", "no"))
        arch = Path(tmp, "arch.json")
        good = {"student": fastersg.PAPER_STUDENT.to_json()}
        for text, word in (("{", "readable"), ("[]", "student"), ('{"student": {}}', "malformed"),
                           (json.dumps(good).replace("conv_x2, rate 8", "conv_9, rate 8", 1),
                            "conv_9"),
                           (json.dumps(good).replace("zoom_x2, rate 16", "zoom_x2, rate 8", 1),
                            "rate")):
            arch.write_text(text)
            _refused(lambda: fastersg.load_architecture(str(arch), "student"), word)
        refused("--train", *TINY, *tail, "--arch", arch, words=("arch.json",))
        refused("--search", "--layers", "3", *tail, words=("--layers",))
        refused("--search", "--widths", "4", "4", *tail, words=("--widths",))
        refused("--search", "--device", "cuda:7", *tail, words=("cuda",)) \
            if not torch.cuda.is_available() else None
        refused("--time", "paper", "--size", "8", "8", script="latency.py", words=("--size",))
        Image.fromarray(np.full((32, 64), 7, np.uint8)).save(Path(root, "train/labels/3.png"))
        refused("--search", *TINY, *tail, words=("3.png", "7"))
        Path(root, "train/labels/3.png").unlink()
        refused("--search", *TINY, *tail, words=("3.png", "label"))
        assert run(code=2)[1].strip().startswith("error: choose a stage")
        assert "unrecognized arguments: --layer" in run("--search", "--layer", "4", code=2)[1]


def test_latency_bench_from_the_command_line():
    with tempfile.TemporaryDirectory() as tmp:
        out, _ = run("--correlation", "4", "--layers", "4", "--widths", "2", "4", "--size", "32",
                     "64", "--rounds", "2", "--out", tmp, script="latency.py")
        assert "Pearson r" in out and Path(tmp, "latency_correlation.png").exists()
        out, _ = run("--time", "paper", "--size", "32", "64", "--rounds", "2", script="latency.py")
        assert json.loads(out)["median"] > 0


# ---------------------------------------------------------------------------------------------
# sparsemask.py
# ---------------------------------------------------------------------------------------------


def test_theorems_1_and_2():
    torch.manual_seed(0)
    a, b = (torch.randn(2, c, 5, 7, dtype=torch.float64) for c in (3, 4))
    weight = torch.randn(6, 7, 3, 3, dtype=torch.float64)
    whole = F.conv2d(torch.cat([a, b], 1), weight, padding=1)
    parts = F.conv2d(a, weight[:, :3], padding=1) + F.conv2d(b, weight[:, 3:], padding=1)
    assert torch.allclose(whole, parts, atol=1e-12)                         # Theorem 1
    point = torch.randn(6, 3, 1, 1, dtype=torch.float64)
    for size in ((10, 14), (9, 20)):
        first = sparsemask.resize(F.conv2d(a, point), size)
        assert torch.allclose(first, F.conv2d(sparsemask.resize(a, size), point), atol=1e-12)
    # Both in the decoder: one stage is the 1x1 convolution of all inputs, up-sampled and side by
    # side.
    stage = sparsemask.Decoder({"D1": ("E1", "E2", "E3", "G")}, dict(E1=3, E2=4, E3=5, G=5),
                               nn.Identity(), width=6).double()
    maps = {t: torch.randn(2, c, *size, dtype=torch.float64) for t, c, size in (
        ("E1", 3, (8, 12)), ("E2", 4, (4, 6)), ("E3", 5, (4, 6)), ("G", 5, (1, 1)))}
    side_by_side = torch.cat([sparsemask.resize(maps[t], (8, 12)) for t in maps], 1)
    weight = torch.cat([stage.conv[t].weight for t in maps], 1)
    want = stage.norm["D1"](F.conv2d(side_by_side, weight))
    assert torch.allclose(stage(maps), want, atol=1e-12)
    # f_up against the definition, pixel by pixel: corners on corners; as a matrix product too.
    for (h, w), training in itertools.product(((9, 13), (21, 30)), (False, True)):
        with torch.set_grad_enabled(training):
            x, up = a[0, 0], sparsemask.resize(a, (h, w))[0, 0]
        for i, j in itertools.product(range(h), range(w)):
            y, z = i * 4 / (h - 1), j * 6 / (w - 1)
            y0, z0 = min(int(y), 3), min(int(z), 5)
            value = sum((1 - abs(y - u)) * (1 - abs(z - v)) * x[u, v]
                        for u in (y0, y0 + 1) for v in (z0, z0 + 1))
            assert abs(value - up[i, j]) < 1e-12
    assert torch.equal(sparsemask.resize(a[:, :, :1, :1], (2, 3)),
                       a[:, :, :1, :1].expand(2, 3, 2, 3))


def dense_net(**options):
    """A Fully Dense Network in float64, BN statistics and affine unlike a fresh one, and w too."""
    torch.manual_seed(1)
    net = sparsemask.FullyDenseNet(num_classes=3, width=4, **options).double()
    shaken(net.decoder)
    for w in net.w.values():
        nn.init.uniform_(w, 0, net.top)
    return net


def test_fused_decoder_equals_the_plain_one():
    """Eq. (4) one connection at a time: same output, gradients and running statistics."""
    for bn, training in ((True, True), (True, False), (False, True)):
        net = dense_net(bn=bn)
        net.decoder.train(training)
        images = torch.randn(3, 3, 40, 72, dtype=torch.float64)
        with torch.no_grad():
            features = net.encoder(images)
        results = []
        start = {k: v.clone() for k, v in net.state_dict().items()}
        for decoder in (net.decoder, lambda *x: sparsemask.plain_decoder(net.decoder, *x)):
            net.load_state_dict(start)
            leaves = {k: v.clone().requires_grad_() for k, v in features.items()}
            net.zero_grad()
            out = decoder(leaves, dict(net.w))
            ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype)
            (out * ramp.view_as(out)).sum().backward()
            grads = {k: p.grad for k, p in [*net.decoder.named_parameters(), *net.w.items(),
                                            *leaves.items()]}
            results.append({"out": out.detach(), **grads,
                            **{k: v.clone() for k, v in net.decoder.named_buffers()
                               if "num_batches" not in k}})
        fused, plain = results
        assert fused.keys() == plain.keys() and len(fused) > 100 - 60 * (not bn)
        for key, value in fused.items():
            scale = plain[key].abs().max().clamp(min=1)
            assert torch.allclose(value / scale, plain[key] / scale, atol=1e-10), (bn, key)


def test_sparsemask_derived_equals_relaxed():
    """Binary w and BN folded in: the supernet's output is that of the pruned network."""
    for seed, options in enumerate(({}, {"w_range": "release"}, {"bn": False}, {"k": 2})):
        net = dense_net(**options).eval()
        generator = torch.Generator().manual_seed(seed)
        found = sparsemask.random_connectivity(9, generator)
        cfg = replace(sparsemask.Config(), width=4)
        if options.get("k"):                    # MaskConnect makes its real w binary by itself
            cfg = replace(cfg, loss="maskconnect", k=2)
        else:
            for stage, w in net.w.items():
                names = sparsemask.sources(int(stage[1:]), 9)
                w.data = net.top * torch.tensor([float(t in found.get(stage, ())) for t in names],
                                                dtype=w.dtype)
        found = sparsemask.prune(net.shares(), cfg)[0]
        small = sparsemask.inherit(net, found, cfg, 3)
        images = torch.randn(2, 3, 33, 70, dtype=torch.float64)
        with torch.no_grad():
            want, got = net(images), small(images)
        assert want.std() > 1e-3 and torch.allclose(want, got, atol=1e-12), options
        # As deployed: the BN of every stage folded into its convolutions.
        folded = common.fold_bn(small)
        assert torch.allclose(folded(images), got, atol=1e-10)
        assert isinstance(folded.decoder.norm["D1"], nn.Identity)


def test_sparse_loss_term_by_term():
    def entropy(p, q):
        return -p * math.log(q) - (1 - p) * math.log(1 - q)

    w = torch.tensor([0.2, 0.9, 0.5, 0.03], dtype=torch.float64, requires_grad=True)
    binary, sparse = sparsemask.sparse_loss(w, 0.25)
    mean = sum(w.tolist()) / 4
    assert abs(binary.item() - sum(entropy(v, v) for v in w.tolist()) / 4) < 1e-8
    assert abs(sparse.item() - entropy(0.25, mean)) < 1e-8
    gradient = torch.autograd.grad(binary, w)[0]
    assert gradient[0] > 0 and gradient[3] > 0 > gradient[1] and abs(gradient[2]) < 1e-8
    for start, sign in ((0.4, 1), (0.1, -1)):           # towards alpha from both sides
        v = torch.full((5,), start, requires_grad=True)
        assert (torch.autograd.grad(sparsemask.sparse_loss(v, 0.25)[1], v)[0] * sign > 0).all()
    edge = torch.tensor([0.0, 1.0], requires_grad=True)         # finite where w was clamped
    gradient = torch.autograd.grad(sum(sparsemask.sparse_loss(edge, 0.5)), edge)[0]
    assert gradient.isfinite().all() and gradient[0] > 0 > gradient[1]
    # |T_l| = 2 (L - l + 1), Eq. (5).
    assert [sparsemask.alpha(l, 9) for l in range(1, 10)] == [
        1 / 9, 1 / 8, 1 / 7, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1 / 2]
    assert sum(len(v) for v in sparsemask.fully_dense(9).values()) == 90    # 2^90, 4.1
    assert sum(len(v) for v in sparsemask.fully_dense(5).values()) == 30    # 2^30, 3.2


def test_regularizers_of_table_1_and_figure_4():
    net = dense_net(w_range="release").float()
    net.used = {stage: net.effective(w) for stage, w in net.w.items()}
    cfg, shares = sparsemask.Config(), {k: v.detach() / 2 for k, v in net.used.items()}
    want = {"binary": 0.0, "sparse": 0.0}
    for l in range(1, 10):
        binary, sparse = sparsemask.sparse_loss(shares[f"D{l}"], min(2 / (2 * (10 - l)), 0.5))
        want["binary"] += 0.01 * float(binary)
        want["sparse"] += 0.01 * float(sparse)
    for loss, names in (("ours", ["binary", "sparse"]), ("binary", ["binary"]),
                        ("sparse", ["sparse"]), ("task", []), ("maskconnect", [])):
        terms = sparsemask.regularizer(net, replace(cfg, loss=loss))
        assert sorted(terms) == names
        assert all(abs(v.item() - want[k]) < 1e-5 for k, v in terms.items())
    total = sum(float(v.sum()) for v in shares.values())
    l1 = sparsemask.regularizer(net, replace(cfg, loss="l1", l1=0.1))["l1"]
    assert abs(float(l1) - 0.1 * total) < 1e-4


def test_what_w_multiplies():
    w = torch.tensor([0.1, 0.7, 0.3, 0.6], requires_grad=True)
    net = sparsemask.FullyDenseNet(num_classes=2, width=2, k=2)
    assert net.eval().effective(w).tolist() == [0, 1, 0, 1]     # MaskConnect: the k largest
    draws = torch.stack([net.train().effective(w) for _ in range(600)])
    assert ((draws == 0) | (draws == 1)).all() and (draws.sum(1) == 2).all()
    share = draws.mean(0)
    assert share[1] > share[3] > share[2] > share[0] > 0
    gradient, = torch.autograd.grad(draws[0] @ torch.tensor([1., 2., 3., 4.]), w)
    assert gradient.tolist() == [1, 2, 3, 4]                    # straight through, to the real w
    assert net.effective(torch.tensor([0.2, 0.3])).tolist() == [1, 1]
    noisy = sparsemask.FullyDenseNet(num_classes=2, width=2, w_range="release")
    assert torch.equal(noisy.eval().effective(w), w)            # no noise in evaluation
    w2 = torch.full((4000,), 1.0)
    drawn = noisy.train().effective(w2)
    assert abs(drawn.std() - 0.1) < 0.01 and abs(drawn.mean() - 1) < 0.01
    noisy.w["D1"].data[:2] = torch.tensor([-1.0, 3.0])
    noisy.clamp()
    assert noisy.w["D1"][:2].tolist() == [0, 2] and noisy.shares()["D1"][:2] == [0, 1]
    net.freeze_affine()
    assert not any(m.weight.requires_grad for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_pruning_rules_against_graph_search():
    """A stage stays if a path leads to it from an encoder feature and from it to D1."""
    rng = random.Random(0)
    for trial in range(300):
        L = rng.choice((2, 3, 5))
        share = rng.choice((0.15, 0.3, 0.6))
        graph = {stage: tuple(t for t in names if rng.random() < share)
                 for stage, names in sparsemask.fully_dense(L).items()}

        def fed(t):
            return t[0] in "EG" or any(fed(s) for s in graph[t])

        def read(t):
            return t == "D1" or any(read(stage) for stage in graph if t in graph[stage])

        want = {stage: tuple(t for t in found if fed(t)) for stage, found in graph.items()
                if fed(stage) and read(stage)}
        if not fed("D1"):
            want = {}
        assert sparsemask.drop_useless(graph) == want
    shares = {"D2": [0.9, 0.0009], "D1": [0.001, 0.0, 0.4, 0.6]}
    found, gap = sparsemask.prune(shares, sparsemask.Config())
    assert found == {"D2": ("E2",), "D1": ("E1", "G", "D2")} and gap == (0.0009, 0.001)
    found, _ = sparsemask.prune(shares, replace(sparsemask.Config(), loss="maskconnect", k=1))
    assert found == {"D2": ("E2",), "D1": ("D2",)}
    _refused(lambda: sparsemask.prune({"D2": [1, 1], "D1": [0] * 4}, sparsemask.Config()), "D1")


def decoder_size(connectivity):
    return sparsemask.decoder_params(sparsemask.SparseMaskNet(connectivity))


def test_golden_case_of_the_release():
    """Its weights before the two extra passes, and the 15 connections after them."""
    golden = {"D9": ["G"], "D8": ["E9", "G"], "D7": ["E7", "G"], "D6": ["E6", "G"], "D5": ["G"],
              "D4": ["E6", "G"], "D3": ["G"], "D2": ["E7", "G"],
              "D1": "E9 E8 E7 E6 E1 G D2 D3 D4 D5 D6 D7 D8 D9".split()}
    golden = sparsemask.check_connectivity(golden, 9, "golden")
    shares = {stage: [float(t in golden[stage]) for t in names]
              for stage, names in sparsemask.fully_dense(9).items()}
    found, _ = sparsemask.prune(shares, sparsemask.Config())
    assert sum(map(len, found.values())) == 27 and decoder_size(found) == 1008085
    found = sparsemask.drop_repeated(found)
    assert found == sparsemask.CONNECTIVITIES["released"] and sum(map(len, found.values())) == 15


def test_decoder_counts():
    """The facts of Table 1, to the last parameter, and MACs at 512x512."""
    for name, params, macs in (("released", 560981, 205848576), ("unet", 164821, 638058496),
                               ("sparseacn", 721877, 646774784), ("fdn", 1934293, 1198735360)):
        net = sparsemask.SparseMaskNet(name)
        assert sparsemask.decoder_params(net) == params
        assert common.count_params(net.encoder) == 2223872
        whole = common.count_macs(net, (512, 512)) - common.count_macs(net.encoder, (512, 512))
        assert whole == macs + 64 * 21 * 256 * 256, name
    drawn = {k: v for k, v in sparsemask.CONNECTIVITIES["released"].items()}
    drawn["D1"] = tuple(t for t in drawn["D1"] if t != "E8")
    assert decoder_size(drawn) == 540501                            # Figure 3: 14 connections
    assert sparsemask.decoder_params(sparsemask.FCN()) == 26901
    assert sparsemask.decoder_params(sparsemask.DeepLabV3()) == 653525
    assert sparsemask.decoder_params(sparsemask.FullyDenseNet()) == 1945903


def test_encoders_are_torchvisions():
    for name, (strides, channels) in sparsemask.ENCODERS.items():
        with torch.device("meta"):                      # shapes alone: initialising takes seconds
            found = sparsemask.Encoder(name)(torch.zeros(2, 3, 64, 96))
            dilated = sparsemask.Encoder(name, dilate=True)(torch.zeros(2, 3, 64, 96))
        for l, (stride, c) in enumerate(zip(strides, channels), 1):
            assert found[f"E{l}"].shape == (2, c, 64 // stride, 96 // stride), (name, l)
        assert found["G"].shape == (2, channels[-1], 1, 1)
        assert dilated[f"E{len(strides)}"].shape[-2:] == (4, 6)     # DeepLab-V3: output stride 16
    with torch.device("meta"):
        encoder = sparsemask.Encoder("resnet50", dilate=True)
        vgg = sparsemask.Encoder("vgg16", dilate=True)
    assert [m.dilation[0] for m in encoder.stages[4].modules()
            if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)] == [1, 2, 2]
    assert all(m.dilation == (1, 1) for m in vgg.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(2, 3, 64, 96)
    for name in ("mobilenet_v2", "resnet50"):
        torch.manual_seed(0)
        encoder = sparsemask.Encoder(name).eval()
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None).eval()
        with torch.no_grad():
            found = encoder(x)
            if name == "mobilenet_v2":
                want = net.features(x)
            else:
                y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
                want = net.layer4(net.layer3(net.layer2(net.layer1(y))))
        last = found[f"E{len(encoder.channels)}"]
        assert torch.allclose(encoder.act(last), want, atol=1e-5)
        assert torch.allclose(found["G"], last.mean((2, 3), keepdim=True))


def test_transfer_matches_by_size():
    released, strides = sparsemask.CONNECTIVITIES["released"], sparsemask.ENCODERS
    mobile, resnet = strides["mobilenet_v2"][0], strides["resnet50"][0]
    assert sparsemask.transfer(released, mobile, mobile) == released
    # Figure 6: one stage fewer than Figure 3.
    assert sparsemask.transfer(released, mobile, resnet) == {
        "D5": ("E5", "G"), "D4": ("E4", "G"), "D1": ("E1", "E4", "E5", "G", "D5", "D4")}
    # No feature at 1/32: what needs one is dropped.
    assert sparsemask.transfer(released, mobile, (2, 4, 8, 16)) == {
        "D4": ("E4", "G"), "D1": ("E1", "E4", "G", "D4")}
    for name in ("resnet50", "vgg16"):
        net = sparsemask.SparseMaskNet("released", name, num_classes=2, width=4).eval()
        assert net(torch.zeros(1, 3, 33, 40)).shape == (1, 2, 33, 40)
    # D1, which the classifier reads, stays D1 beside a D2 of the same size.
    assert sparsemask.transfer({"D2": ("E9",), "D1": ("E1", "G", "D2")}, mobile, resnet) == {
        "D1": ("E1", "G")}
    generator = torch.Generator().manual_seed(0)
    size = dict(zip(mobile, (1, 1, 2, 3, 4, 4, 5, 5, 5)))           # stride -> ResNet stage
    for _ in range(50):
        found = sparsemask.random_connectivity(9, generator)
        moved = sparsemask.transfer(found, mobile, resnet)
        assert sparsemask.check_connectivity(moved, 5, "moved") == moved
        want = {f"E{size[mobile[int(t[1:]) - 1]]}" for t in found["D1"] if t[0] == "E"}
        assert {t for t in moved["D1"] if t[0] == "E"} == want
    back = sparsemask.transfer({"D5": ("E5", "G"), "D1": ("E1", "D5")}, resnet, mobile)
    assert back == {"D9": ("E9", "G"), "D1": ("E2", "D9")}


def test_random_connectivities():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        free = sparsemask.random_connectivity(9, generator)
        assert sparsemask.check_connectivity(free, 9, "random") == free
        ruled = sparsemask.random_connectivity(9, generator, rule=True)
        assert all(set(found) <= {"G", "E" + stage[1:]} for stage, found in ruled.items()
                   if stage != "D1")                                        # Section 4.2
        assert sparsemask.check_connectivity(ruled, 9, "random") == ruled


def test_connectivity_files():
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "mask.npy")
        mask = np.zeros((9, 9, 2), bool)                # facts: row r is D_{9-r}, column c E_{9-c}
        mask[1, 0] = mask[8, 0] = True                  # D8, D1 <- E9, G
        mask[2, [2, 0], [0, 1]] = mask[3, [3, 0], [0, 1]] = True    # D7 <- E7, G; D6 <- E6, G
        mask[8, [8, 3, 2, 1], 0] = True                 # D1 <- E1, E6, E7, E8
        mask[8, [2, 3, 4], 1] = True                    # D1 <- D8, D7, D6
        np.save(path, mask)
        assert sparsemask.read_connectivity(path) == ("mobilenet_v2",
                                                      sparsemask.CONNECTIVITIES["released"])
        np.save(path, mask[:5, :5])
        _refused(lambda: sparsemask.read_connectivity(path), path, "(5, 5, 2)")
        np.save(path, np.array([{"a": 1}], dtype=object))
        _refused(lambda: sparsemask.read_connectivity(path), path)
        path = Path(tmp, "arch.json")

        def refused_json(connectivity, *words, encoder="mobilenet_v2"):
            path.write_text(json.dumps({"encoder": encoder, "connectivity": connectivity}))
            _refused(lambda: sparsemask.read_connectivity(path), path, *words)

        refused_json({"D1": ["E1"], "D10": ["E9"]}, "D10")
        refused_json({"D1": ["E1", "X3"]}, "X3")
        refused_json({"D2": ["D1"], "D1": ["D2"]}, "cycle")
        refused_json({"D1": ["D1", "E1"]}, "cycle")
        refused_json({"D3": ["E2"], "D1": ["D3"]}, "finer")
        refused_json({"D3": ["E3"]}, "nothing reaches D1")
        refused_json({"D3": ["E3"], "D1": ["E1"]}, "D3", "no reader")
        refused_json({"D1": ["E1", "D3"]}, "D3", "no inputs")
        refused_json({"D1": ["E9"]}, "E9", encoder="resnet50")
        refused_json(["D1"], "not a connectivity")
        refused_json({"D1": ["E1"]}, "encoder", encoder="alexnet")
        rows = sparsemask.readable_json({"encoder": "vgg16", "connectivity": {"D1": ("E1", "G")}})
        assert '"D1": ["E1", "G"]' in rows
        assert json.loads(rows)["connectivity"] == {"D1": ["E1", "G"]}


def test_balanced_edge_loss_against_loops():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 2, 4, 5), torch.randint(0, 2, (2, 4, 5))
    labels[0, :2] = 255
    labels[1, 1:] = 0
    found = {0: [], 1: []}
    for b, i, j in itertools.product(range(2), range(4), range(5)):
        y = int(labels[b, i, j])
        if y != 255:
            found[y].append(-math.log(float(logits[b, :, i, j].softmax(0)[y])))
    want = (np.mean(found[0]) + np.mean(found[1])) / 2
    cfg = replace(sparsemask.Config(), task="edges")
    assert abs(float(sparsemask.task_loss(logits, labels, cfg)) - want) < 1e-5
    labels[labels == 1] = 255                           # a crop without an edge
    found = sparsemask.task_loss(logits, labels, cfg)
    other = F.cross_entropy(logits, labels, ignore_index=255) / 2
    assert abs(float(found - other)) < 1e-6
    labels[:] = 255
    assert float(sparsemask.task_loss(logits, labels, cfg)) == 0
    assert float(sparsemask.task_loss(logits, labels, sparsemask.Config())) == 0


def test_poly_sgd_groups():
    net = sparsemask.FullyDenseNet(num_classes=2, width=2)
    net.freeze_affine()
    optimizer, schedule = sparsemask.poly_sgd(net, sparsemask.Config(), steps=4)
    lr = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert lr == {id(p): 0.005 if name.startswith("encoder") else 0.05
                  for name, p in net.named_parameters() if p.requires_grad}
    for t in range(5):
        want = [lr * (1 - t / 4) ** 0.9 for lr in (0.005, 0.05)]
        assert np.allclose(sorted(g["lr"] for g in optimizer.param_groups), want)
        optimizer.step()
        schedule.step()
    other, _ = sparsemask.poly_sgd(net, replace(sparsemask.Config(), lr_w=0.7), steps=4)
    found, = [g["params"] for g in other.param_groups if g["lr"] == 0.7]
    assert [id(p) for p in found] == [id(w) for w in net.w.values()]
    assert all(m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    sparsemask.poly_sgd(net, sparsemask.Config(), steps=50000)
    assert net.decoder.norm["D1"].momentum == 3e-4


def test_classifier_weights_from_a_file():
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "features.pth")
        net = torchvision.models.mobilenet_v2()
        torch.save(net.features.state_dict(), path)
        encoder = sparsemask.Encoder("mobilenet_v2", str(path))
        assert torch.equal(encoder.stages[0][0].weight, net.features[0][0].weight)
        torch.save({"state_dict": net.state_dict()}, path)
        encoder = sparsemask.Encoder("mobilenet_v2", str(path))
        assert torch.equal(encoder.stages[8][0].weight, net.features[18][0].weight)
        _refused(lambda: sparsemask.Encoder("resnet50", str(path)), path, "another network")
        _refused(lambda: sparsemask.Encoder("mobilenet_v2", tmp + "/none.pth"), "none.pth")


def _pictures(count=5, height=12, width=9, seed=0):
    """Saliency maps with values on a grid of 1/255, and masks that go with them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mask = rng.random((height, width)) < 0.4
        noise = rng.integers(0, 256, mask.shape)
        yield (np.where(mask, 255 - noise // 2, noise) / 255).astype(np.float32), mask


def test_saliency_scores_against_loops():
    scores = sparsemask.SaliencyScores()
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
        scores = sparsemask.SaliencyScores()
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
        thinned = sparsemask.edge_nms(ridge)
        inside = np.s_[12:-12, 12:-12]
        kept = thinned[inside] > 0.3
        # Counted along the axis nearer to the normal: rows if the ridge is steep, else columns.
        counts = kept.sum(1 if abs(np.cos(normal)) > 0.7 else 0)
        crossed = (np.abs(away[inside]) < 0.5).any(1 if abs(np.cos(normal)) > 0.7 else 0)
        # Two on diagonals, whose pixels are 0.7 apart: both can lie within half a pixel.
        assert (counts[crossed] >= 1).all() and counts.max() <= 2, (degrees, counts)
        counts = sparsemask.thin(kept).sum(1 if abs(np.cos(normal)) > 0.7 else 0)
        assert (counts[2:-2] == 1).sum() >= crossed.sum() - 4, (degrees, counts)
        assert np.abs(away[inside][kept]).max() < 0.75, degrees
    assert (thinned[:, 0] == 0).all() and (thinned[-1] == 0).all()  # the frame fades to 0
    flat = sparsemask.edge_nms(np.zeros((20, 20)))
    assert (flat == 0).all() and sparsemask.edge_nms(ridge.astype(np.float32)).shape == (60, 70)


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
    assert np.allclose(sparsemask.edge_nms(image, border=0), expected)
    faded = sparsemask.edge_nms(image, border=5)
    assert np.isclose(faded[3, 15], expected[3, 15] * 3 / 5)
    assert np.isclose(faded[12, 28], expected[12, 28] * 2 / 5)
    assert np.array_equal(faded[5:-5, 5:-5] > 0, expected[5:-5, 5:-5] > 0)


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
        thinned = sparsemask.thin(mask)
        assert np.array_equal(thinned, slow[1:-1, 1:-1]) and not (thinned & ~mask).any()
        assert _pieces(thinned) == _pieces(mask)
    assert thinned.sum(0).max() == 1 and thinned[5, 5:25].all()  # the middle of the bar
    assert not sparsemask.thin(np.zeros((3, 3), bool)).any()


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
    keep = sparsemask._augment
    for trial in range(40):
        radius = (0.5, 1, 2.3, 3)[trial % 4]
        prediction = rng.random((14, 13)) < 0.12
        truth = rng.random((3, 14, 13)) < (0.05, 0.3)[trial % 2]
        found, hit = sparsemask.match_edges(prediction, truth, radius)
        assert found.shape == hit.shape == truth.shape
        assert not (found & ~prediction).any() and not (hit & ~truth).any()
        for a in range(3):
            best = _largest_matching(prediction, truth[a], radius)
            # All that is marked as matched can be matched, among itself: pairs exist.
            assert found[a].sum() == hit[a].sum() == best
            assert _largest_matching(found[a], hit[a], radius) == best
        sparsemask._augment = lambda *arguments: False
        try:
            greedy, largest = greedy + sparsemask.match_edges(prediction, truth, radius)[0].sum(), \
                largest + found.sum()
        finally:
            sparsemask._augment = keep
    print(f"      greedy alone finds {greedy / largest:.3f} of the largest matching")
    assert 0.85 < greedy / largest < 0.98
    # A chain: each prediction sits between two truths, greedy from the wrong end loses one.
    prediction, truth = np.zeros((1, 12), bool), np.zeros((1, 12), bool)
    prediction[0, [0, 2, 5]], truth[0, [1, 4, 7]] = True, True
    assert sparsemask.match_edges(prediction, truth, 2)[0].sum() == 3
    empty = np.zeros((2, 1, 12), bool)
    assert not any(found.any() for found in sparsemask.match_edges(prediction, empty, 2))
    assert not any(found.any() for found in sparsemask.match_edges(empty[0], ~empty, 2))


def _line(height=40, width=60, column=30):
    edge = np.zeros((height, width), bool)
    edge[8:-8, column] = True
    return edge


def test_edge_scores_at_the_extremes():
    truth = [_line(), _line(), _line()]
    # The diagonal is 72.1 pixels: at 0.03 the tolerance is 2.16 of them.
    for shift, value in ((0, 1), (2, 1), (3, 0)):
        scores = sparsemask.EdgeScores(9, tolerance=0.03)
        scores.update(_line(column=30 + shift).astype(np.float32), truth)
        result = scores.result()
        assert all(abs(result[k] - value) < 1e-9 for k in ("ODS", "OIS", "AP", "R50")), result
    scores = sparsemask.EdgeScores(9)
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
    scores, tables = sparsemask.EdgeScores(n, tolerance=0.1), []
    for _ in range(3):
        probability = np.round(rng.random((15, 20)) ** 3, 1)  # steps of 0.1: equal maps occur
        truth = [rng.random((15, 20)) < share for share in (0.05, 0.1)]
        scores.update(probability, truth)
        rows = []
        for k in range(n):
            edge, right = sparsemask.thin(probability >= (k + 1) / (n + 1)), 0
            hits = sum(_largest_matching(edge, t, 2.5) for t in truth)
            # Which pixels are matched is not unique: taken from the function itself.
            found = sparsemask.match_edges(edge, np.stack(truth), 2.5)[0]
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
    scores = sparsemask.EdgeScores(3)
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
    saliency, edges = sparsemask.SaliencyScores(), sparsemask.EdgeScores(4)
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
    saliency, edges = sparsemask.SaliencyScores(), sparsemask.EdgeScores(4)
    _score(saliency, edges, rank)
    torch.save([saliency.reduce().result(), edges.reduce().result()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


SPARSE = ("--dataset folder --num-classes 3 --size 32 64 --batch-size 4 --epochs 2 "
          "--search-epochs 2 --weights-encoder none --width 4 --lam 0.3 --frame 32 64 "
          "--scales 0.8 1.2").split()


def test_sparsemask_stages_resume_after_kill_bit_for_bit():
    script = "sparsemask.py"
    with tempfile.TemporaryDirectory() as tmp:
        base = [*SPARSE, "--data-root", tiny_set(Path(tmp, "set"))]
        whole, broken = Path(tmp, "whole"), Path(tmp, "broken")
        program = Path(tmp, "net.pt2")
        out, _ = run("--search", "--train", "--eval", "--bench", *base, "--out", whole, "--export",
                     program, "--eval-scales", "0.75", "1", "--flip", script=script)
        for word in ("supernet_miou", "derived_miou", "of 90 connections", "retrained mIoU on val",
                     "0.56, 98, 73.18", "next: python sparsemask.py"):
            assert word in out, f"'{word}' is missing in:\n{out}"
        for name in ("config.json", "arch.json", "log.jsonl", "last.pt", "bench.json",
                     "connectivity.png", "weights.png", "weights_over_time.png", "search.png",
                     "found/best.pt", "found/segmentations.png"):
            assert (whole / name).stat().st_size > 0, name
        net = torch.export.load(program).module()
        assert net(torch.zeros(1, 3, 32, 64)).shape == (1, 3, 32, 64)
        stages = ["--search", "--train", *base, "--out", broken]
        killed(stages, broken / "last.pt", script)
        killed([*stages, "--resume"], broken / "found" / "last.pt", script)
        run(*stages, "--resume", script=script)
        for name in ("last.pt", "found/last.pt", "found/best.pt"):
            a, b = state_of(whole / name), state_of(broken / name)
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]), f"{name}{key} differs after resuming"
        assert (whole / "arch.json").read_text() == (broken / "arch.json").read_text()
        # Another search beside this one (Figure 5), ablations and baselines.
        for flags in (["--loss", "l1", "--l1", "0.01", "--no-bn", "--beside", whole / "arch.json"],
                      ["--loss", "maskconnect", "--k", "3", "--simplify"],
                      ["--loss", "task", "--w-range", "release"]):
            out, _ = run("--search", *base, "--out", Path(tmp, "other"), "--search-epochs", "1",
                         *flags, script=script)
            assert "connections" in out
        for name in ("random_rule", "deeplabv3"):
            out, _ = run("--train", "--eval", *base, "--out", whole, "--network", name, "--epochs",
                         "1", script=script)
            assert f"{name}: retrained mIoU on val" in out
        refused("--train", *base, "--out", whole, "--resume", "--epochs", "3",
                words=("epochs 2", "epochs 3"), script=script)
        four = [f if f != "3" else "4" for f in base]                       # --num-classes 4
        out, _ = run("--train", *four, "--out", Path(tmp, "moved"), "--arch", whole / "arch.json",
                     "--init", whole / "found" / "best.pt", "--epochs", "1", script=script)
        assert "trained for 3 classes" in out
        best = whole / "found" / "best.pt"
        refused("--eval", *base, "--out", whole, "--network", "unet", "--weights", best,
                words=("another connectivity",), script=script)
        best.write_bytes(best.read_bytes()[:5000])
        refused("--eval", *base, "--out", whole, words=(best, "truncated"), script=script)


def test_sparsemask_other_tasks_from_the_command_line():
    small = ("--size 32 64 --batch-size 4 --epochs 1 --width 4 --network released --thresholds 3 "
             "--weights-encoder none").split()
    with tempfile.TemporaryDirectory() as tmp:
        saliency, edges = Path(tmp, "saliency"), Path(tmp, "edges")
        for split, n in (("train", 6), ("val", 3), ("test", 3)):
            for i in range(n):
                image, label = data.SyntheticScenes(split, (32, 64))[i]
                label = np.asarray(label)
                border = np.pad(label[1:] != label[:-1], ((0, 1), (0, 0)))
                for path, picture in ((saliency / split / f"images/{i}.jpg", image),
                                      (saliency / split / f"masks/{i}.png", (label > 1) * 255),
                                      (edges / split / f"{i}.jpg", image),
                                      (edges / f"{split}_edges" / f"{i}_0.png", border * 255),
                                      (edges / f"{split}_edges" / f"{i}_1.png", border * 255)):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(np.asarray(picture, np.uint8)).save(path)
        for task, root, name, score in (("saliency", saliency, "msra_b", "F_beta"),
                                        ("edges", edges, "bsds500", "ODS")):
            out, _ = run("--train", "--eval", *small, "--task", task, "--out", tmp, "--dataset",
                         name, "--data-root", root, script="sparsemask.py")
            assert score in out and Path(tmp, f"released_{task}", f"{task}.png").exists()


def test_sparsemask_two_processes_end_with_equal_weights():
    """With noise on w; and with a network that leaves the end of the encoder unread."""
    probe = (f"import sys, hashlib; sys.path.insert(0, {str(HERE)!r})\n"
             "import common, sparsemask\n"
             "fit = sparsemask.fit\n"
             "def fit_and_tell(stage, net, *a, **k):\n"
             "    best = fit(stage, net, *a, **k)\n"
             "    h = hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in "
             "net.parameters())).hexdigest()\n"
             "    sys.stdout.write(f'\\nHASH {stage} {common.rank()} {h}\\n')\n"
             "    sys.stdout.flush()\n"
             "    return best\n"
             "sparsemask.fit = fit_and_tell\n"
             "common.run_main(sparsemask.main)\n")
    with tempfile.TemporaryDirectory() as tmp:
        script = Path(tmp, "probe.py")
        script.write_text(probe)
        base = [*SPARSE, "--data-root", tiny_set(Path(tmp, "set")), "--out", Path(tmp, "run"),
                "--epochs", "1", "--search-epochs", "1", "--w-range", "release"]
        for flags, stages in ((["--search", "--train", "--eval"], ("search", "found")),
                              (["--train", "--network", "deeplabv3"], ("deeplabv3",))):
            out, _ = run(*flags, *base, script=script, before=(
                "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"))
            for stage in stages:
                hashes = dict(re.findall(rf"HASH {stage} ([01]) (\w{{64}})", out))
                assert set(hashes) == {"0", "1"} and len(set(hashes.values())) == 1, (stage, out)
            assert out.count("of 90 connections") == ("search" in stages)


def test_sparsemask_bench_of_a_search_step():
    out, _ = run("--bench-search", "--size", "32", "32", "--batch-size", "2",
                 script="sparsemask.py")
    assert out.count("median") == 2 and "plain" in out


def test_sparsemask_refuses_wrong_input():
    script = "sparsemask.py"
    with tempfile.TemporaryDirectory() as tmp:
        base = [*SPARSE, "--data-root", tiny_set(Path(tmp, "set")), "--out", Path(tmp, "run")]
        arch = Path(tmp, "arch.json")
        arch.write_text('{"encoder": "mobilenet_v2", "connectivity": {"D1": ["E1", "D1"]}}')
        refused("--train", *base, "--arch", arch, words=(arch, "cycle"), script=script)
        arch.write_text('{"encoder": "mobilenet_v2", "connect')
        refused("--bench", *base, "--arch", arch, words=(arch,), script=script)
        refused("--train", *base, words=("arch.json",), script=script)
        refused("--search", *base, "--weights-encoder", arch, words=(arch, "checkpoint"),
                script=script)
        refused("--search", *base, "--batch-size", "1", words=("--batch-size",), script=script)
        refused("--search", *base, "--task", "edges", words=("edges", "folder"), script=script)
        refused("--eval", *base, "--network", "unet", words=("unet/best.pt",), script=script)
        refused("--search", *base, "--beside", arch, words=(arch,), script=script)
        cfg = replace(sparsemask.Config(), dataset="synthetic")
        for stage, wrong, word in (
                ("search", {"sigma": 2.0}, "--sigma"), ("search", {"momentum": -1.0}, "--momentum"),
                ("train", {"weight_decay": -1.0}, "--weight-decay"),
                ("train", {"lr_encoder": float("nan")}, "--lr-encoder"),
                ("eval", {"eval_scales": (float("nan"),)}, "--eval-scales"),
                ("bench-search", {"batch_size": 1}, "--batch-size"),
                ("train", {"task": "edges", "image_scale": 0.5}, "--image-scale"),
                ("bench-search", {"compile": True}, "--compile"),
                ("search", {"arch": "arch.json"}, "--arch")):
            _refused(lambda: sparsemask.check(replace(cfg, **wrong), {stage}), word)
        refused("--search", *base, "--loss", "l1", "--l1", "100", "--search-epochs", "1",
                words=("D1", "--l1"), script=script)


# ---------------------------------------------------------------------------------------------
# bilevel_prune.py
# ---------------------------------------------------------------------------------------------


def random_gates(net, seed, sites=None):
    """Random 0/1 gates, at least one channel a site; every fourth site is whole."""
    g, gates = torch.Generator().manual_seed(seed), {}
    for i, site in enumerate(sites or bilevel_prune.sites_of(net)):
        n = net.widths[site]
        share = 1.0 if i % 4 == seed % 4 else float(torch.rand((), generator=g))
        gates[site] = (torch.rand(n, generator=g) < share).double()
        gates[site][torch.randint(n, (), generator=g)] = 1
    return gates


def test_counts_of_topformer_and_deeplab():
    build, params, macs = bilevel_prune.build, common.count_params, common.count_macs
    table = {"tiny": (1389654, 534110208, 1372755, 937148416),
             "small": (3034662, 1112297472, 3009379, 2027986944),
             "base": (5062646, 1752203264, 5028979, 3242262528),
             "super": (10345958, 4101214208, 10312291, 7940284416)}
    for name, (p150, m150, p19, m19) in table.items():
        net, city = build(name, 150), build(name, 19)
        assert (params(net), macs(net, (512, 512))) == (p150, m150), name
        assert (params(city), macs(city, (512, 1024))) == (p19, m19), name
    city = build("base_cityscapes", 19)
    assert (params(city), macs(city, (512, 1024))) == (4839667, 2697003008)
    net = bilevel_prune.DeepLabV3Plus(19)
    assert (params(net), macs(net, (512, 1024))) == (2263139, 9490180608)
    assert params(net.stem) + params(net.rows) == 1811712
    x = torch.randn(2, 3, 70, 100)
    assert bilevel_prune.TopFormer("tiny", 5)(x).shape == (2, 5, 9, 13)
    assert bilevel_prune.DeepLabV3Plus(5)(x).shape == (2, 5, 18, 25)


def test_masked_network_equals_pruned_network():
    """Derived = relaxed: every prunable layer type, strides, dilation, residual sums, concatenated
    and shared masks, attention; random masks down to one channel, float64, odd picture sizes. MACs
    from the masks = MACs counted on the small network. Rebuilt from JSON and a state_dict alone."""
    torch.manual_seed(0)
    for name, size in (("tiny", (70, 101)), ("small", (64, 96)), ("deeplab", (65, 70))):
        net = shaken(bilevel_prune.build(name, 5)).double().eval()
        macs, x = bilevel_prune.Macs(net, size), torch.randn(1, 3, *size).double()
        for seed in range(4):
            gates = random_gates(net, seed)
            if seed == 3:
                gates = {site: torch.eye(len(b))[-1].double() for site, b in gates.items()}
            small = bilevel_prune.prune(net, gates)
            with torch.no_grad():
                dense, want, got = net(x), net(x, gates), small(x)
            assert (want - got).abs().max() < 1e-9 * want.abs().max(), (name, seed)
            counted = common.count_macs(bilevel_prune.build(name, 5, small.widths), size)
            assert int(macs(gates)) == macs.of(small.widths) == counted
            assert (want - dense).abs().max() > 1e-3, "masks must matter"
        with tempfile.TemporaryDirectory() as tmp:
            bilevel_prune.write_arch(small, Path(tmp))
            again = bilevel_prune.build(*bilevel_prune.load_arch(Path(tmp, "arch.json"))).double()
            again.load_state_dict(small.state_dict())
            with torch.no_grad():
                assert torch.equal(again.eval()(x), got)
        assert macs.dense == common.count_macs(bilevel_prune.build(name, 5), size)


def test_masks_reach_what_they_cover_in_training_too():
    """In train mode BN sees the same numbers in both networks, so loss and gradients agree."""
    torch.manual_seed(0)
    net = bilevel_prune.build("tiny", 4).double().train()
    net.dropout.p = 0.0
    for block in net.blocks:                            # else attention is switched off at first
        nn.init.ones_(block.attention.project.norm.weight)
    gates, x = random_gates(net, 5), torch.randn(3, 3, 64, 96).double()
    small = bilevel_prune.prune(net, gates)
    small.dropout.p = 0.0
    net(x, gates).square().mean().backward()
    small(x).square().mean().backward()
    for layer, cut in zip(bilevel_prune.layers_of(net), bilevel_prune.layers_of(small)):
        out, into = (bilevel_prune.channels(gates, where, net.widths).bool()
                     for where in (layer.out, layer.into))
        full = layer.conv.weight.grad
        kept = full[out] if layer.depthwise else full[out][:, into]
        assert torch.allclose(kept, cut.conv.weight.grad, atol=1e-12)
        assert not full[~out].any(), "a pruned channel must get no gradient"
        assert layer.depthwise or not full[:, ~into].any()
        assert layer.norm is None or not layer.norm.weight.grad[~out].any()


def test_threshold_and_straight_through():
    s = torch.tensor([0.9, 0.5, 0.50001, 0.1], requires_grad=True)
    b = bilevel_prune.Threshold.apply(s, 0.5, 1)
    assert b.tolist() == [1, 0, 1, 0]                   # Eq. (2): s = tau is pruned
    (b * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert s.grad.tolist() == [1, 2, 3, 4]              # Eq. (3), pruned or not
    low = torch.tensor([0.1, 0.3, 0.2])
    assert bilevel_prune.Threshold.apply(low, 0.5, 1).tolist() == [0, 1, 0]
    # The surrogate: the loss as a function of continuous gates, at the binary ones.
    torch.manual_seed(1)
    net = shaken(bilevel_prune.build("tiny", 3)).double().eval()
    for block in net.blocks:
        nn.init.ones_(block.attention.project.norm.weight)
    masks = bilevel_prune.SoftMasks(net, bilevel_prune.sites_of(net)).double()
    with torch.no_grad():
        for site, gate in random_gates(net, 2).items():
            masks.s[site].copy_(0.2 + 0.6 * gate)
    x = torch.randn(1, 3, 64, 64).double()
    probe = torch.randn_like(net(x))
    (net(x, masks()) * probe).sum().backward()
    for site, s in masks.s.items():
        for k in {0, int(s.argmin()), int(s.argmax())}:
            values = []
            for step in (1e-6, -1e-6):
                gates = masks.binary()
                gates[site] = gates[site].clone()
                gates[site][k] += step
                with torch.no_grad():
                    values.append(float((net(x, gates) * probe).sum()))
            slope = (values[0] - values[1]) / 2e-6
            assert abs(slope - float(s.grad[k])) < 1e-5 * max(1, abs(slope)), (site, k)
        pruned = s < 0.5
        assert not pruned.any() or s.grad[pruned].any(), f"{site} could not come back"


class PiecewiseLinear(nn.Module):
    """A masked layer, then fixed ReLU layers and an L1 loss: piecewise linear in the layer."""

    def __init__(self, smooth=False):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        def draw(*shape):
            return torch.randn(*shape, generator=g).double()
        self.widths, self.smooth = {"": 1, "a": 6}, smooth
        self.layer = bilevel_prune.Layer(self.widths, (("", 4),), bilevel_prune.space("a"), 3,
                                         norm=False).double()
        self.head, self.x, self.y = draw(5, 6, 3, 3), draw(4, 4, 8, 8), draw(4, 5, 8, 8)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(draw(*p.shape))

    def loss(self, weights, b):
        """weights: [conv weight, bias]; b (6,) gates."""
        h = F.conv2d(self.x, *weights, padding=1) * b.view(-1, 1, 1)
        y = F.conv2d(h if self.smooth else F.relu(h), self.head, padding=1)
        return ((y - self.y) ** 2).mean() / 2 if self.smooth else (y - self.y).abs().mean()


def masks_of(b):
    masks = bilevel_prune.SoftMasks(PiecewiseLinear(), ["a"]).double()
    with torch.no_grad():
        masks.s["a"].copy_(0.2 + 0.6 * b)
    return masks


def paper_gradient(model, weights, b, lam, implicit=True):
    """What the program computes at these weights."""
    with torch.no_grad():
        for p, w in zip(model.layer.parameters(), weights):
            p.copy_(w)
    masks = masks_of(b)
    loss = model.loss(list(model.layer.parameters()), masks()["a"])
    bilevel_prune.mask_gradient(model, masks, loss, lam, implicit)
    return masks.s["a"].grad


def test_implicit_gradient_is_exact_where_the_paper_says_so():
    """Piecewise linear in w: Eq. (15) = autograd through one unrolled inner step, float64. The
    step of size lambda on g(w) = L + |w|^2 / (2 lambda), without the decay of the first w, which
    does not depend on s."""
    model, lam = PiecewiseLinear(), 1e-3
    b = torch.tensor([1.0, 0, 1, 1, 0, 1]).double()
    w0 = [p.detach().clone() for p in model.layer.parameters()]
    gate = b.clone().requires_grad_()
    leaves = [w.clone().requires_grad_() for w in w0]
    grads = torch.autograd.grad(model.loss(leaves, gate), leaves, create_graph=True)
    w1 = [w - lam * g for w, g in zip(leaves, grads)]
    exact, = torch.autograd.grad(model.loss(w1, gate), gate)
    w1 = [w.detach() for w in w1]
    # The same linear piece before and after the step, or there is nothing to compare.
    def signs(w):
        h = F.conv2d(model.x, *w, padding=1)
        y = F.conv2d(F.relu(h * b.view(-1, 1, 1)), model.head, padding=1)
        return (h > 0), (y > model.y)
    assert all(torch.equal(p, q) for p, q in zip(signs(w0), signs(w1)))
    ours, plain = (paper_gradient(model, w1, b, lam, flag) for flag in (True, False))
    second = (exact - plain).abs().max()
    assert second > 1e-7 and (ours - exact).abs().max() < 1e-9 * second, (ours, exact)
    assert torch.equal(ours[b == 0], plain[b == 0]) and (ours[b == 1] < plain[b == 1]).all()
    # At w* itself, grad_w L = -w* / lambda, both terms of Eq. (15) are -|w*|^2 / lambda.
    slope = torch.randn(6, 40).double()
    def linear(w, gate):
        return (slope * w * gate[:, None]).sum()
    star = -lam * b[:, None] * slope
    first = torch.autograd.grad(linear(star, gate), gate)[0]
    term = -lam * b * (b[:, None] * slope).square().sum(1)
    assert torch.allclose(first * b, term) and torch.allclose(term, -star.square().sum(1) / lam)


def test_what_the_diagonal_leaves_out():
    """Approximation 3: -lambda grad2_sw L grad_w L of a network of three layers, by autograd, split
    by layers. Eq. (15) has the masked layer's own part; a ReLU network is linear in each layer."""
    model, b = PiecewiseLinear(), torch.tensor([1.0, 0, 1, 1, 0, 1]).double()
    torch.manual_seed(0)
    before = (0.3 * torch.randn(4, 4, 3, 3).double()).requires_grad_()
    own = [p.detach().clone().requires_grad_() for p in model.layer.parameters()]
    after, gate = model.head.clone().requires_grad_(), b.clone().requires_grad_()
    h = F.conv2d(F.relu(F.conv2d(model.x, before, padding=1)), *own, padding=1)
    y = F.conv2d(F.relu(h * gate.view(-1, 1, 1)), after, padding=1)
    slopes = torch.autograd.grad((y - model.y).abs().mean(), [before, *own, after],
                                 create_graph=True)
    groups = {"before": slopes[:1], "own": slopes[1:-1], "after": slopes[-1:]}
    parts = {name: -torch.autograd.grad(sum((g * g.detach()).sum() for g in mine), gate,
                                        retain_graph=True)[0] for name, mine in groups.items()}
    for p, slope in zip(model.layer.parameters(), groups["own"]):
        p.grad = slope.detach()
    squares = bilevel_prune.squared_gradients(model)["a"]               # the program's
    assert torch.allclose(parts["own"][b == 1], -squares[b == 1])
    share = {name: float(part[b == 1].abs().sum()) for name, part in parts.items()}
    print("        second term of Eq. (11), sum over the channels: " + ", ".join(
        f"{name} {value:.4f}" for name, value in share.items()))
    assert share["before"] > 0.1 * share["own"] and share["after"] > 0.01 * share["own"]


def test_gap_to_the_exact_hypergradient_is_known():
    """A smooth inner problem, ridge regression, solved exactly: the true dL/ds by the implicit
    function theorem with its Hessian, beside Eq. (15) and beside the first term alone."""
    torch.manual_seed(0)
    model, b, rows = PiecewiseLinear(smooth=True), torch.tensor([1.0, 0, 1, 1, 0, 1]).double(), []
    shapes = [p.shape for p in model.layer.parameters()]
    def unpack(v):
        parts = v.split([s.numel() for s in shapes])
        return [p.view(s) for p, s in zip(parts, shapes)]
    size = sum(s.numel() for s in shapes)
    for lam in (1e-3, 1e-2, 0.1, 1.0):
        gate = b.clone().requires_grad_()
        def g(v, gate):
            return model.loss(unpack(v), gate) + v.square().sum() / (2 * lam)
        zero = torch.zeros(size).double().requires_grad_()
        slope, = torch.autograd.grad(g(zero, b), zero)
        hessian = torch.func.hessian(lambda v: g(v, b))(zero.detach())
        star = torch.linalg.solve(hessian, -slope)                  # quadratic: one Newton step
        leaf = star.clone().requires_grad_()
        loss = model.loss(unpack(leaf), gate)
        first, grad_w = torch.autograd.grad(loss, (gate, leaf), create_graph=True)
        mixed = torch.func.jacrev(lambda v: torch.func.grad(g, 1)(v, b))(star)       # (6, size)
        exact = first.detach() - mixed @ torch.linalg.solve(hessian, grad_w.detach())
        ours, plain = (paper_gradient(model, unpack(star), b, lam, flag) for flag in (True, False))
        alive = b == 1
        rows.append([float((v - exact)[alive].norm() / exact[alive].norm()) for v in (ours, plain)]
                    + [float(F.cosine_similarity(v[alive], exact[alive], dim=0))
                       for v in (ours, plain)] + [float(ours[alive].sum() / exact[alive].sum())])
        print(f"        lambda {lam:<6g} error of Eq. (15) {100 * rows[-1][0]:6.2f}%, of the first "
              f"term alone {100 * rows[-1][1]:6.2f}%; cosine {rows[-1][2]:.5f}, {rows[-1][3]:.5f}; "
              f"Eq. (15) / exact {rows[-1][4]:.3f}")
    assert rows[0][0] < 0.02 and abs(rows[0][1] - 0.5) < 0.02       # small lambda: right, and half
    assert all(a[0] < c[0] for a, c in zip(rows, rows[1:])), "the gap grows with lambda"


def small_search(tmp, **changes):
    """A Search on the tiny network, its data loader and settings."""
    flags = dict(bilevel_prune.QUICK, dataset="folder", data_root=tiny_set(Path(tmp, "set")),
                 num_classes=3, size=(32, 64), frame=(32, 64), batch_size=4, weight_steps=1,
                 search_epochs=4, drop_path=0.1, round_to=1) | changes
    cfg = bilevel_prune.Config(**flags)
    _, loader = common.open_loader(cfg, "train", train=True)
    net = bilevel_prune.dense_network(cfg, 3).train()
    return bilevel_prune.Search(cfg, net, torch.device("cpu"), len(loader)), next(iter(loader))


def test_pruned_channels_keep_their_weights_and_come_back():
    for optimizer in ("sgd", "adamw"):
        with tempfile.TemporaryDirectory() as tmp:
            s, batch = small_search(tmp, optimizer=optimizer, lr=0.01, weight_decay=0.1)
            for _ in range(2):                                  # momentum and Adam's averages exist
                s.train_weights(*batch)
            with torch.no_grad():
                for site, values in s.masks.s.items():
                    values[::2] = 0.3
            flips = s.refresh()
            assert flips == sum(len(v) // 2 for v in s.masks.s.values())
            left = {k: v.clone() for k, v in s.net.state_dict().items()}
            gates = {site: b.bool() for site, b in s.gates.items()}
            for _ in range(3):
                s.train_weights(*batch)
            moved = still = 0
            for layer, name in [(m, n) for n, m in s.net.named_modules()
                                if isinstance(m, bilevel_prune.Layer)]:
                out = bilevel_prune.channels(gates, layer.out, s.net.widths).bool()
                for key, p in layer.named_parameters():
                    same = (p == left[f"{name}.{key}"]).flatten(1).all(1) if p.ndim > 1 else (
                        p == left[f"{name}.{key}"])
                    assert same[~out].all(), f"{name}.{key} of a pruned channel moved"
                    moved, still = moved + int((~same).sum()), still + int(same.sum())
            assert moved > 1000 and still > 1000
            with torch.no_grad():
                for values in s.masks.s.values():
                    values[values == 0.3] = 0.6
            assert s.refresh() == flips and not s.stays
            s.train_weights(*batch)                             # ... and they learn again
            layer = s.net.rows[1].expand.conv.weight
            assert (layer[::2] != left["rows.1.expand.conv.weight"][::2]).any()


def test_mask_step_moves_masks_only_and_by_eq_15():
    with tempfile.TemporaryDirectory() as tmp:
        s, (images, labels) = small_search(tmp, lam=0.7, drop_path=0.0)
        s.net.dropout.p = 0.0
        before = {k: v.clone() for k, v in s.net.named_parameters()}
        with torch.no_grad():
            for values in s.masks.s.values():
                values[1] = 0.1
        s.refresh()
        old = {k: v.detach().clone() for k, v in s.masks.s.items()}
        s.move_masks(images, labels, 0.0)
        for name, p in s.net.named_parameters():
            assert torch.equal(p, before[name])
        # Eq. (15) by hand for an expansion channel, from the gradients that are still there.
        row, site = s.net.rows[3], "row3"
        squares = sum(p.grad.square().flatten(1).sum(1) if p.ndim > 1 else p.grad.square()
                      for layer in (row.expand, row.depth) for p in layer.parameters())
        implicit = s.masks.s[site].grad.clone()
        s.cfg.implicit = False
        with torch.no_grad():
            for k, v in s.masks.s.items():
                v.copy_(old[k])
        s.move_masks(images, labels, 0.0)
        plain, b = s.masks.s[site].grad, (old[site] > 0.5).float()
        assert torch.allclose(plain - implicit, 0.7 * b * squares, rtol=1e-3, atol=1e-9)
        assert float((plain - implicit).max()) > 0 and implicit[1] == plain[1]
        want = (old[site] - s.rates[site] * plain).clamp(min=0)
        assert torch.allclose(s.masks.s[site], want)
        # Shared masks gather from every layer that writes the site: c8 of rows 3 and 4, and its
        # quarter of the residual stream of the blocks.
        found = bilevel_prune.by_site(s.net, lambda layer: torch.ones(len(layer.conv.weight)))
        assert found["c8"].tolist() == [2 + 2 * 4] * 32 and found["heads0"].tolist() == [64] * 4


def test_macs_term_pulls_alike_at_any_size():
    net, pulls = bilevel_prune.build("tiny", 5), []
    masks = bilevel_prune.SoftMasks(net, bilevel_prune.sites_of(net))
    for frame in ((64, 128), (512, 1024)):
        macs = bilevel_prune.Macs(net, frame)
        gates = masks()
        value = bilevel_prune.regularizer(macs, gates, 0.5 * macs.dense)
        assert abs(float(value.detach()) - (8.2 / 2) ** 2) < 1e-9
        grads = torch.autograd.grad(value, list(masks.s.values()))
        pulls.append(sum(float(g.sum()) for g in grads))
        costs = macs.costs()
        for (site, s), g in zip(masks.s.items(), grads):    # one channel less, counted
            widths = net.widths | {site: net.widths[site] - 1}
            drop = macs.dense - macs.of(widths)
            assert 0.85 < drop / costs[site] <= 1 + 1e-9
            want = 2 * 8.2 ** 2 * 0.5 * costs[site] / macs.dense
            assert torch.allclose(g, torch.full_like(g, want), rtol=1e-5)
    assert abs(pulls[0] / pulls[1] - 1) < 0.1
    assert max(costs[k] for k in masks.s) > 250 * min(costs[k] for k in masks.s)
    # Masks that the loss ignores fall from 1 to tau in a third of the steps, all of them at once.
    cfg, steps = bilevel_prune.Config(), 60
    rates = bilevel_prune.mask_rates(masks, macs, 0.5 * macs.dense, steps, cfg)
    fall = {site: rates[site] * 0.01 * float(g[0]) * steps / 3
            for (site, _), g in zip(masks.s.items(), grads)}
    assert all(abs(v - 0.5) < 1e-5 for v in fall.values()), fall


def test_selection_meets_the_target_and_keeps_the_best():
    g = torch.Generator().manual_seed(0)
    for name, round_to, share in (("tiny", 1, 0.3), ("tiny", 8, 0.5), ("super", 8, 0.12),
                                  ("deeplab", 1, 0.9), ("deeplab", 8, 0.3)):
        net = bilevel_prune.build(name, 5)
        macs = bilevel_prune.Macs(net, (64, 128))
        scores = {site: torch.rand(net.widths[site], generator=g)
                  for site in bilevel_prune.sites_of(net)}
        gates = bilevel_prune.select(scores, macs, share * macs.dense, round_to)
        got = float(macs(gates)) / macs.dense
        assert share * 0.99 <= got <= share, (name, round_to, share, got)
        for site, b in gates.items():
            k, n = int(b.sum()), len(b)
            assert k >= 1 and scores[site][b == 1].min() >= scores[site][b == 0].max().nan_to_num(
                ) if k < n else k == n
            assert site.startswith("heads") or k % round_to == 0 or k == n
    net = bilevel_prune.build("tiny", 5)
    macs, cfg = bilevel_prune.Macs(net, (64, 128)), bilevel_prune.Config(frame=(64, 128))
    for share in (1.0, 0.02):
        cfg.target = share
        assert bilevel_prune.target_of(cfg, net, macs) == share * macs.dense
    cfg.target = 0.001
    _refused(lambda: bilevel_prune.target_of(cfg, net, macs), "below", "fewest channels")
    cfg.target_gmacs = 1.1e-9 * macs.dense
    _refused(lambda: bilevel_prune.target_of(cfg, net, macs), "above the dense")
    assert set(bilevel_prune.sites_of(net, "pyramid")) == {
        "c2", "c4", "c8", "c16", "c32", *(f"row{i}" for i in range(1, 9))}


def test_baseline_scores():
    torch.manual_seed(0)
    net = shaken(bilevel_prune.build("tiny", 5))
    macs = bilevel_prune.Macs(net, (64, 128))
    gates = bilevel_prune.select(bilevel_prune.uniform(net), macs, 0.5 * macs.dense)
    shares = [float(b.mean()) for b in gates.values() if len(b) > 30]
    assert max(shares) - min(shares) < 0.05, "uniform: the same share everywhere"
    with torch.no_grad():
        for row in (net.rows[3].expand, net.rows[3].depth):
            row.conv.weight[5] *= 100
            row.norm.weight[7] = 100
    for score, best in ((bilevel_prune.magnitude(net), 5), (bilevel_prune.slimming(net), 7)):
        assert int(score["row3"].argmax()) == best
        assert set(score) == set(bilevel_prune.sites_of(net))
    assert int(bilevel_prune.uniform(net)["row3"].argmax()) == 5
    with tempfile.TemporaryDirectory() as tmp:
        s, batch = small_search(tmp, method="slimming", slim_l1=0.01)
        assert s.free == 3 and "l1" in s.train_weights(*batch)
        s.epoch = 3
        assert "l1" not in s.train_weights(*batch)


def published_names(net, old=False):
    """{published name: name here} of every tensor, written from the files' own scheme."""
    names = {}
    def layer(theirs, ours, conv="c"):
        names[f"{theirs}.{conv}.weight"] = f"{ours}.conv.weight"
        for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{theirs}.bn.{x}"] = f"{ours}.norm.{x}"
    tpm, sim = ("patch_embed", "fuse_blocks") if old else ("tpm", "SIM")
    layer(f"backbone.{tpm}.stem.0", "stem")
    for i in range(len(net.rows)):
        parts = ("depth", "project") if i == 0 else ("expand", "depth", "project")
        for j, part in enumerate(parts):
            layer(f"backbone.{tpm}.layer{i + 1}.conv.{2 * j}", f"rows.{i}.{part}")
    for i in range(4):
        block = f"backbone.trans.transformer_blocks.{i}"
        for theirs, ours in (("attn.to_q", "attention.to_q"), ("attn.to_k", "attention.to_k"),
                             ("attn.to_v", "attention.to_v"), ("attn.proj.1", "attention.project"),
                             ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            layer(f"{block}.{theirs}", f"blocks.{i}.{ours}")
        for x in ("weight", "bias"):
            names[f"{block}.mlp.dwconv.{x}"] = f"blocks.{i}.mlp.depth.conv.{x}"
    parts = (("to_feat1", "local"), ("to_feat2", "shift"), ("fuse2", "scale")) if old else (
        ("local_embedding", "local"), ("global_embedding", "shift"), ("global_act", "scale"))
    for i, (theirs, ours) in itertools.product((1, 2, 3), parts):
        layer(f"backbone.{sim}.{i}.{theirs}", f"injections.{i - 1}.{ours}", "conv")
    layer("decode_head.linear_fuse", "fuse", "conv")
    for x in ("weight", "bias"):
        names[f"decode_head.conv_seg.{x}"] = f"classify.conv.{x}"
    return names


def test_published_checkpoints_load():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "topformer.pth")
        for variant, old, wrapper in (("tiny", False, None), ("small", True, "state_dict"),
                                      ("tiny", False, "state_dict_ema"), ("tiny", True, "model")):
            source, net = (bilevel_prune.build(variant, 7) for _ in range(2))
            names = published_names(source, old)
            assert set(names.values()) == set(source.state_dict())
            state = {theirs: source.state_dict()[ours] for theirs, ours in names.items()}
            torch.save({wrapper: state, "args": argparse.Namespace(lr=1)} if wrapper else state,
                       path)
            said = bilevel_prune.load_published(net, path)
            assert f"{len(names)} of {len(names)} tensors loaded" in said and "random" not in said
            assert all(torch.equal(v, net.state_dict()[k]) for k, v in source.state_dict().items())
        said = bilevel_prune.load_published(bilevel_prune.build("tiny", 9), path)
        assert "random: classify.conv.weight" in said
        torch.save({k: v for k, v in state.items() if "decode_head" not in k} | {
            "backbone.extra": torch.ones(1)}, path)
        said = bilevel_prune.load_published(bilevel_prune.build("tiny", 7), path)
        assert "random: fuse.conv.weight" in said and "not used: extra" in said
        for other in ("small", "base"):
            _refused(lambda: bilevel_prune.load_published(bilevel_prune.build(other, 7), path),
                     f"not of TopFormer-{other}", "--network")
        torch.save([1], path)
        _refused(lambda: bilevel_prune.load_published(net, path), "no state_dict")


def test_mobilenet_weights_reach_the_deeplab_encoder():
    torch.manual_seed(0)
    source = shaken(torchvision.models.mobilenet_v2()).eval()
    with tempfile.TemporaryDirectory() as tmp:
        torch.save(source.features.state_dict(), Path(tmp, "features.pth"))
        cfg = bilevel_prune.Config(network="deeplab", init=str(Path(tmp, "features.pth")))
        net = bilevel_prune.dense_network(cfg, 4).eval()
    with torch.no_grad():
        x = want = torch.randn(1, 3, 64, 96)
        for f in source.features[:14]:                      # as far as the strides agree
            want = f(want)
        x = F.relu6(net.stem(x))
        for row in net.rows[:13]:
            x = row(x)
        assert torch.allclose(x, want, atol=1e-5)
    last = source.features[17].conv[2].weight
    assert torch.equal(net.rows[16].project.conv.weight, last)
    assert [row.depth.conv.dilation[0] for row in net.rows] == [1] * 14 + [2] * 3


# ---------------------------------------------------------------------------------------------
# bilevel_prune.py as a process
# ---------------------------------------------------------------------------------------------

PRUNE = ("--dataset folder --num-classes 3 --network tiny --size 32 64 --frame 64 128 --epochs 1 "
         "--search-epochs 3 --batch-size 4 --weight-steps 1 --lr 0.02 --target 0.5 --scales 1 1"
         ).split()


def here(*flags):
    """bilevel_prune.main in this process, which saves the imports; returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bilevel_prune.main([*map(str, flags)])
    return out.getvalue()


def test_pruning_stages_resume_after_kill_bit_for_bit():
    script = "bilevel_prune.py"
    with tempfile.TemporaryDirectory() as tmp:
        base = [*PRUNE, "--data-root", tiny_set(Path(tmp, "set"))]
        whole, broken, export = Path(tmp, "whole"), Path(tmp, "broken"), Path(tmp, "small.pt2")
        out, _ = run("--search", "--eval", *base, "--out", whole, "--export", export, script=script)
        for word in ("met within 1%", "pruned mIoU on val", "no fine-tuning", "next: python",
                     "dense: best mIoU", "flips"):
            assert word in out, f"'{word}' is missing in:\n{out}"
        for name in ("config.json", "arch.json", "log.jsonl", "last.pt", "pruned.pt", "widths.png",
                     "search_macs.png", "search_flips.png", "search_loss.png", "search_miou.png",
                     "segmentations.png", "dense/best.pt", "dense/arch.json"):
            assert (whole / name).stat().st_size > 0, name
        result = json.loads((whole / "arch.json").read_text())["result"]
        dense = common.count_macs(bilevel_prune.build("tiny", 3), (64, 128))
        assert abs(result["macs"] / (0.5 * dense) - 1) <= 0.01 and result["met"]
        assert torch.export.load(export).module()(torch.zeros(1, 3, 64, 128)).shape[1] == 3

        stages = ["--search", *base, "--out", broken]
        killed(stages, broken / "last.pt", script)
        here(*stages, "--resume")
        _refused(lambda: here(*stages, "--resume", "--beta", "0.02"), "another --beta")
        for name in ("dense/best.pt", "last.pt", "pruned.pt"):
            a, b = state_of(whole / name), state_of(broken / name)
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]), f"{name}{key} differs after resuming"
        both = [json.loads((d / "arch.json").read_text())["widths"] for d in (whole, broken)]
        assert both[0] == both[1]

        for method in ("uniform", "slimming"):
            out = here("--search", "--eval", *base, "--out", whole, "--method", method,
                       "--round-to", "8")
            assert "dense: best" not in out and f"{method}: pruned mIoU on val" in out
        here("--search", *base, "--out", whole, "--no-implicit", "--scope", "pyramid",
             "--optimizer", "adamw", "--channels-last")
        widths = json.loads((whole / "no_implicit/arch.json").read_text())["widths"]
        assert widths["inject"] == 128 and widths["row8"] < 576
        out = here("--train", "--eval", *base, "--out", whole, "--method", "retrained", "--amp")
        assert "retrained: retrained mIoU on val" in out
        before = state_of(whole / "last.pt")                # a diverging run leaves it in place
        _refused(lambda: here("--search", *base, "--out", whole, "--lr", "1e30"), "not finite",
                 "step")
        assert all(torch.equal(v, before[k]) for k, v in state_of(whole / "last.pt").items())
        _refused(lambda: here("--search", *base, "--out", whole, "--dense", whole / "pruned.pt"),
                 "does not fit")
        before = (whole / "dense/best.pt").read_bytes()     # hours of training are not replaced
        for flags, word in ((("--seed", "5"), "another seed"),
                            (("--image-scale", "0.5"), "another dataset")):
            _refused(lambda: here("--search", *base, "--out", whole, *flags), word, "--train")
        _refused(lambda: here("--search", *base, "--out", whole, "--epochs", "9"), "of 9 epochs")
        _refused(lambda: here("--search", *base, "--out", whole, "--epochs", "9", "--resume"),
                 "another --epochs")
        assert (whole / "dense/best.pt").read_bytes() == before
        best = whole / "pruned.pt"
        best.write_bytes(best.read_bytes()[:5000])
        refused("--eval", *base, "--out", whole, script=script, words=(best, "truncated"))


def test_pruning_bench_and_sweep_from_the_command_line():
    with tempfile.TemporaryDirectory() as tmp:
        base = [*PRUNE, "--data-root", tiny_set(Path(tmp, "set")), "--out", Path(tmp, "r"),
                "--search-epochs", "2", "--settle", "0.5"]
        out = here("--sweep", *base, "--sweep-betas", "0.01", "1", "--sweep-lams", "0.1",
                   "--sweep-targets", "0.5", "0.3")
        table = Path(tmp, "r", "sweep.md").read_text()
        assert table.count("\n| ") == 5 and table.count("| beta |") == 2 and table in out
        found = json.loads(Path(tmp, "r", "sweep.json").read_text())
        assert len(found) == 3 and all(row["masks_macs"] > row["macs"] for row in found.values())
        _refused(lambda: here("--sweep", *base, "--sweep-targets", "0.5", "0.001"), "fewest")
        assert Path(tmp, "r", "sweep.md").read_text() == table, "refused before it begins"
        folder = next(Path(tmp, "r", "sweep").iterdir())
        os.environ["TORCHDYNAMO_DISABLE"] = "1"             # compiling takes a minute
        try:
            out, _ = run("--bench", "--bench-search", *base, "--arch", folder / "arch.json",
                         script="bilevel_prune.py")
        finally:
            del os.environ["TORCHDYNAMO_DISABLE"]
        for word in ("10,345,958", "9,490,180,608", "conv and BN folded", "channels_last",
                     "the implicit term costs", "found"):
            assert word in out, f"'{word}' is missing in:\n{out}"
        rows = json.loads(Path(tmp, "r", "bench.json").read_text())["networks"]
        assert rows["found"]["conv_macs"] < 0.51 * rows["dense"]["conv_macs"]


def equal_on_two_ranks(module, patch, port, tmp, *flags):
    """Run a paper file under torchrun with gloo. patch: code that replaces a function of `m`, the
    module, by one that calls tell(tensors) once; they must be the same bytes on both ranks."""
    probe = Path(tmp, "probe.py")
    probe.write_text(f"import sys, hashlib; sys.path.insert(0, {str(HERE)!r})\n"
                     f"import common, {module} as m\n"
                     "def tell(tensors):\n"
                     "    h = hashlib.sha256(b''.join(t.detach().numpy().tobytes() "
                     "for t in tensors))\n"
                     "    sys.stdout.write(f'\\nHASH {common.rank()} {h.hexdigest()}\\n')\n"
                     "    sys.stdout.flush()\n" + patch + "\ncommon.run_main(m.main)\n")
    out, _ = run(*flags, "--out", Path(tmp, "two"), script=probe, before=(
        "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"))
    found = dict(re.findall(r"HASH ([01]) ([0-9a-f]{64})", out))
    assert set(found) == {"0", "1"} and found["0"] == found["1"], out


def test_pruning_in_two_processes_keeps_masks_equal():
    patch = ("finish, fix = m.finish, m.Search.fix_masks\n"
             "def remember(run):\n"
             "    run.moved = [p.detach().clone() for p in run.masks.parameters()]; fix(run)\n"
             "def finish_and_tell(run, *rest):\n"
             "    tell([*run.net.parameters(), *run.moved]); return finish(run, *rest)\n"
             "m.finish, m.Search.fix_masks = finish_and_tell, remember")
    with tempfile.TemporaryDirectory() as tmp:
        equal_on_two_ranks("bilevel_prune", patch, 29617, tmp, "--search", *PRUNE, "--data-root",
                           tiny_set(Path(tmp, "set")))


def test_pruning_refuses_wrong_input_in_one_sentence():
    script = "bilevel_prune.py"
    with tempfile.TemporaryDirectory() as tmp:
        base = [*PRUNE, "--data-root", tiny_set(Path(tmp, "set")), "--out", Path(tmp, "r")]
        arch = Path(tmp, "arch.json")
        torch.save(bilevel_prune.build("tiny", 3).state_dict(), Path(tmp, "other.pth"))
        _refused(lambda: here("--search", *base, "--network", "base", "--init",
                              Path(tmp, "other.pth")), "not of TopFormer-base")
        good = {site: n for site, n in bilevel_prune.dense_widths("tiny").items()}
        refused("--search", *base, "--tau", "1", script=script, words=("--tau",))
        for value, words in (
                ([], ("no arch.json",)), ({"network": "huge"}, ("no arch.json",)),
                ({"network": "tiny", "classes": 3, "widths": {}}, ("c2", "None channels")),
                ({"network": "tiny", "classes": 3, "widths": good | {"row3": 49}}, ("row3", "48")),
                ({"network": "tiny", "classes": 3, "widths": good | {"row3": 0}}, ("row3", "0")),
                ({"network": "tiny", "classes": 3, "widths": good | {"row9": 5}}, ("row9",))):
            arch.write_text(json.dumps(value))
            _refused(lambda: bilevel_prune.load_arch(arch), arch, *words)
        _refused(lambda: here("--eval", *base, "--arch", arch), "row9")
        _refused(lambda: here("--eval", *base), "arch.json", "no")
        for flags, words in (
                ("--target 1.5", ("--target-gmacs",)), ("--method dense", ("prunes nothing",)),
                ("--search-epochs 1 --settle 0.9", ("no mask step",)),
                ("--batch-size 1", ("single value",)), ("--dense none.pt", ("no checkpoint",)),
                ("--target-gmacs 5", ("above the dense",)), ("--lr -1", ("--lr",)),
                ("--power -1", ("--power",)), ("--clip -1", ("--clip",)),
                ("--beta nan", ("--beta",)), ("--arch x.json", ("--arch",)),
                ("--target 0.001", ("fewest channels",))):
            _refused(lambda: here("--search", *base, *flags.split()), *words)
        for flags, word in (([], "choose a stage"), (["--search", "--beat", "1"], "--beat")):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    here(*flags)
                except SystemExit as stop:
                    assert stop.code == 2 and word in said.getvalue()


# ---------------------------------------------------------------------------------------------
# mtp.py: networks, counts, surgery
# ---------------------------------------------------------------------------------------------


def meta(network, classes, **kind):
    with torch.device("meta"):
        return mtp.Segmenter(network, classes, **kind)


def test_mtp_networks_have_their_exact_size():
    for name, classes, size, params, macs in (
            ("deeplabv3_resnet101", 21, (513, 513), 58040661, 71061387712),
            ("deeplabv3_resnet101", 19, (720, 1080), 58040147, 200573723648),
            ("bisenet_resnet18", 19, (1024, 2048), 12894163, 103723270144),
            ("pspnet_resnet50", 21, (513, 513), 46716373, 189710102720)):
        net = meta(name, classes)
        assert common.count_params(net) == params and common.count_macs(net, size) == macs, name
    assert common.count_params(meta("bisenet_resnet18", 19, auxiliary=True)) == 13494777
    assert common.count_params(meta("pspnet_resnet50", 21, auxiliary=True)) == 49081578
    with torch.device("meta"):                          # the names the issue and the README use
        assert common.count_params(mtp.deeplabv3_resnet101(21)) == 58040661
        assert common.count_params(mtp.bisenet_resnet18(19)) == 12894163
        assert common.count_params(mtp.pspnet_resnet50(21)) == 46716373
    backbone = mtp.on_meta(mtp.Classifier, "deeplabv3_resnet101", 1000)
    assert common.count_params(backbone) == sum(
        p.numel() for p in torchvision.models.resnet101(weights=None).parameters()) == 44549160


def test_mtp_uniform_pruning_has_the_papers_sizes():
    sizes = lambda *a: mtp.sizes("deeplabv3_resnet101", 21, (513, 513), *a)  # noqa: E731
    assert sizes(0.75, True) == (40179797, 49277240192)        # paper: 40.18 M
    assert sizes(0.5, True) == (25027925, 30889386816)
    assert sizes(0.5, False) == (32880085, 39153503680)        # ThiNet; paper: 32.88 M
    for share, decoder, params in ((0.75, False, 10146835), (0.5, False, 7399507),
                                   (0.75, True, 9576115), (0.5, True, 6352275)):
        assert mtp.sizes("bisenet_resnet18", 19, (64, 64), share, decoder)[0] == params
    for m, g, *rest in ((m, g, *rest) for *rest, m, g in mtp.PAPER_SIZES):
        params, macs = mtp.sizes(*rest)
        assert abs(params / 1e6 - m) < 0.01, (rest, params)
        assert 0 < g / (macs / 1e9) - 1 < 0.011, "the paper's counter adds BN, ReLU and pooling"


def test_mtp_prunable_channels():
    for name, inner, outer in (("deeplabv3_resnet101", 16256, 1536),
                               ("bisenet_resnet18", 1920, 1536)):
        groups = mtp.groups_of(meta(name, 19))
        count = {part: sum(g.width * sum(bn is not None for _, bn in g.makers)
                           for g in mtp.part_of(groups, part)) for part in ("backbone", "decoder")}
        assert count == {"backbone": inner, "decoder": outer}, name
    groups = mtp.groups_of(meta("deeplabv3_resnet101", 21))
    assert len(mtp.part_of(groups, "backbone")) == 66
    torch.manual_seed(0)
    scores = {g.name: torch.rand(g.width) for g in groups}
    for percentile, inner, outer in ((25, 12192, 1152), (50, 8128, 768)):
        cfg = mtp.Config(percentile=percentile, rank="independent")
        kept = mtp.kept_channels(scores, groups, cfg)
        for part, n in (("backbone", inner), ("decoder", outer)):
            assert sum(len(kept[g.name]) for g in mtp.part_of(groups, part)) == n
            # one threshold: nothing removed scores higher than anything kept, where width allows
            low, high = [], []
            for g in mtp.part_of(groups, part):
                stays = torch.zeros(g.width, dtype=torch.bool)
                stays[kept[g.name]] = True
                low.append(scores[g.name][stays].min())
                high.append(scores[g.name][~stays].max())
            assert max(high) <= min(low)
        unified = mtp.kept_channels(scores, groups, replace(cfg, rank="unified"))
        assert sum(map(len, unified.values())) == inner + outer


def test_mtp_exact_counts_with_ties_and_least_width():
    for p in (1, 10, 33.3, 50, 70, 94):
        n = 40 + 7 + 100
        gone = math.floor(p * n / 100)
        tied = {"a": torch.ones(40), "b": torch.ones(7), "c": torch.ones(100)}
        kept = mtp.keep_ranked(tied, p, 0.0)
        assert sum(map(len, kept.values())) == n - gone and all(map(len, kept.values()))
        low = {"a": torch.arange(40.0), "b": torch.arange(7.0) / 100, "c": torch.arange(100.0)}
        kept = mtp.keep_ranked(low, p, 0.05)
        assert sum(map(len, kept.values())) == n - gone, "the least width holds the total"
        assert len(kept["a"]) >= 2 and len(kept["b"]) >= 1 and len(kept["c"]) >= 5
        assert 6 in kept["b"], "what stays of a low layer is its best channel"
    _refused(lambda: mtp.keep_ranked(low, 99, 0.05), "--least-width", "145")
    assert mtp.keep_ranked({"a": torch.tensor([0.5, 0.5, 0.5, 0.1])}, 50, 0)["a"].tolist() == [1, 2]
    groups = mtp.groups_of(meta("deeplabv3_resnet18", 5))
    scores = {g.name: torch.rand(g.width) for g in groups}
    cfg = mtp.Config(percentile=60, rank="independent", round_to=8)
    kept = mtp.kept_channels(scores, groups, cfg)
    assert all(len(k) % 8 == 0 and len(k) > 0 for k in kept.values())
    plain = mtp.kept_channels(scores, groups, replace(cfg, round_to=1))
    assert all(abs(len(kept[k]) - len(plain[k])) <= 7 for k in kept)


def lively(net):
    """The network in float64 with BN statistics unlike fresh ones, in eval mode."""
    torch.manual_seed(1)
    return shaken(net).double().eval()


def some_kept(groups, seed=0):
    """Different widths for every group, chosen at random."""
    g = torch.Generator().manual_seed(seed)
    return {x.name: torch.randperm(x.width, generator=g)[:max(1, x.width * (3 + i % 5) // 9)]
            .sort().values for i, x in enumerate(groups)}


@torch.no_grad()
def masked(net, groups, kept):
    """gamma = beta = 0 for removed channels; where a maker has no BN, its filters are 0."""
    net = copy.deepcopy(net)
    for g in groups:
        gone = torch.ones(g.width, dtype=torch.bool)
        gone[kept[g.name]] = False
        for conv, bn in g.makers:
            layer = net.get_submodule(bn or conv)
            layer.weight[gone] = 0
            if bn:
                layer.bias[gone] = 0
    return net


def test_mtp_masked_equals_pruned():
    """Derived = relaxed: basic blocks (resnet18) and bottlenecks (resnet50), all three decoders,
    both tasks, with auxiliary heads."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 72, dtype=torch.float64)
    for name in ("deeplabv3_resnet18", "deeplabv3_resnet50", "bisenet_resnet18", "pspnet_resnet50"):
        net = lively(mtp.Segmenter(name, 5, auxiliary=True))
        groups = mtp.groups_of(net)
        kept = some_kept(groups)
        small, wide = mtp.prune(net, groups, kept), masked(net, groups, kept)
        with torch.no_grad():
            assert not torch.allclose(net(x), wide(x), atol=1e-3), "the mask must change something"
            assert torch.allclose(small(x), wide(x), rtol=0, atol=1e-9), name
            both = common.fold_bn(small)(x)
            assert torch.allclose(both, wide(x), rtol=0, atol=1e-9), name
            if name == "bisenet_resnet18":
                for a, b in zip(small.train()(x), wide.train()(x)):     # heads of training, too
                    assert torch.allclose(a, b, rtol=0, atol=1e-9), name
        assert common.count_params(small) < 0.7 * common.count_params(net)
        for g in groups:
            for conv, _ in g.makers:
                assert small.get_submodule(conv).out_channels == len(kept[g.name])
        if "deeplab" in name:
            cls = lively(mtp.Classifier(name, 7))
            mine = mtp.groups_of(cls)
            with torch.no_grad():
                assert torch.allclose(mtp.prune(cls, mine, kept)(x),
                                      masked(cls, mine, kept)(x), rtol=0, atol=1e-9), name


def test_mtp_rebuilt_from_widths_and_state_alone():
    torch.manual_seed(0)
    net = mtp.Segmenter("deeplabv3_resnet18", 4).eval()
    groups = mtp.groups_of(net)
    kept = some_kept(groups)
    start = time.perf_counter()
    small = mtp.prune(net, groups, kept)
    spent = time.perf_counter() - start
    x = torch.randn(1, 3, 48, 64)
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "pruned.pt")
        common.save_checkpoint(path, model=small.state_dict())
        widths = json.loads(json.dumps({k: len(v) for k, v in kept.items()}))
        state = common.load_checkpoint(path)["model"]
        start = time.perf_counter()
        arch = {"network": "deeplabv3_resnet18", "widths": widths, "classes": 4}
        again = mtp.rebuild(mtp.Segmenter, arch, state, path).eval()
        spent = max(spent, time.perf_counter() - start)
        assert torch.equal(again(x), small(x)) and spent < 0.5
        for key, value in (("backbone.layer1.0.conv1", 0), ("backbone.layer1.0.conv1", 65),
                           ("decoder.aspp.project.0", "many"), ("decoder.aspp.convs.4.1", None)):
            _refused(lambda: mtp.with_widths(net, {**widths, key: value}, "arch.json"), key, value)
        wrong = {**widths, "backbone.layer1.0.conv1": widths["backbone.layer1.0.conv1"] + 1}
        for bad, word in (({"widths": wrong}, "layer1.0.conv1"), ({"classes": 5}, "classifier")):
            _refused(lambda: mtp.rebuild(mtp.Segmenter, {**arch, **bad}, state, path), path, word)


def test_mtp_dilations():
    """Kernel taps, not attributes: how far an impulse in front of the last stage reaches."""
    stages = {name: meta(name, 3).backbone for name in ("deeplabv3_resnet18", "deeplabv3_resnet50",
                                                        "pspnet_resnet50", "bisenet_resnet18")}
    def of(stage):
        return [m.dilation[0] for m in stage.modules()
                if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert of(stages["deeplabv3_resnet50"].layer4) == [1, 2, 2]
    assert of(stages["deeplabv3_resnet18"].layer4) == [1, 2, 2, 2]
    assert of(stages["pspnet_resnet50"].layer3) == [2] * 6
    assert of(stages["pspnet_resnet50"].layer4) == [4] * 3
    assert of(stages["bisenet_resnet18"].layer4) == [1] * 4
    # A dilated backbone computes what the plain one does, and more places in between.
    torch.manual_seed(0)
    plain = lively(mtp.Classifier("deeplabv3_resnet18", 3)).backbone
    dense = lively(mtp.Segmenter("deeplabv3_resnet18", 3)).backbone
    dense.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    with torch.no_grad():
        a, b = (mtp.features(net, x)[-1] for net in (plain, dense))
    assert a.shape[-1] == 5 and b.shape[-1] == 10
    assert torch.allclose(a, b[..., ::2, ::2], atol=1e-9)


def test_mtp_constants_are_folded_exactly_for_1x1():
    torch.manual_seed(0)
    net = lively(mtp.Segmenter("deeplabv3_resnet50", 4))
    every = mtp.groups_of(net)
    # Readers with 1x1 kernels: conv2 -> conv3, branches -> projection -> classifier.
    groups = [g for g in every if net.get_submodule(g.readers[0][0]).kernel_size == (1, 1)]
    assert len(groups) == 16 + 6
    kept = some_kept(groups)
    with torch.no_grad():
        for g in groups:
            gone = torch.ones(g.width, dtype=torch.bool)
            gone[kept[g.name]] = False
            net.get_submodule(g.makers[0][1]).weight[gone] = 0          # beta stays
        x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
        wide = net(x)
        bare = mtp.prune(net, groups, kept)(x)
        mtp.fold_constants(net, groups, kept)
        assert not torch.allclose(bare, wide, atol=1e-3)
        assert torch.allclose(mtp.prune(net, groups, kept)(x), wide, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# mtp.py: the optimizer, baselines
# ---------------------------------------------------------------------------------------------


def test_mtp_scalar_problem_converges_to_its_closed_form():
    """min a/2 (w - p)^2 + lam b/2 (w - q)^2 + (a1 + a2) |w|: with both l1 steps and momentum."""
    a, b, lam, p, q, a1, a2 = 1, 2, 0.7, 1.3, -0.2, 0.05, 0.08
    exact = (a * p + lam * b * q - (a1 + a2)) / (a + lam * b)
    assert abs(exact - 0.3708333) < 1e-7
    for l1, momentum, start in (("proximal", 0.9, 2.0), ("proximal", 0.0, -1.0),
                                ("subgradient", 0.9, 1.0)):
        cfg = mtp.Config(lam=lam, alpha1=a1, alpha2=a2, inner_steps=20, search_cls_lr=0.02,
                         search_lr=0.02, momentum=momentum, weight_decay=0.1, l1=l1)
        w1, w3 = (nn.Parameter(torch.tensor([start], dtype=torch.float64)) for _ in range(2))
        w2 = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        s = mtp.Lagrangian([w1], [w2], [w3], [], [w1], [w2], [w3], cfg)
        for _ in range(80):
            for _ in range(cfg.inner_steps):
                s.gradient_w1((a / 2 * (w1 - p) ** 2).sum())
                s.step_w1(0.02)
            for _ in range(cfg.inner_steps):
                s.gradient_w2_w3((b / 2 * (w3 - q) ** 2 + (w2 - 0.01) ** 2).sum())
                s.step_w2_w3(0.02)
            s.update_multipliers()
        assert abs(w1.item() - exact) < 1e-6 and abs(w3.item() - exact) < 1e-6, (l1, w1, w3)
        assert abs(s.e[0].item() - 0.8791667) < 1e-6, (l1, s.e)
        if l1 == "proximal":                    # |grad| at 0 is 0.014 < alpha2: a true zero
            assert w2.item() == 0.0


def test_mtp_gradients_of_equations_7_8_9():
    """Against autograd of the Lagrangian as it is written, float64."""
    torch.manual_seed(0)
    cfg = mtp.Config(lam=0.7, alpha1=0.03, alpha2=0.05, l1="subgradient", mu=0.3)
    def layers():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    n1, n3, n2, head = layers(), layers(), layers(), nn.Conv2d(4, 2, 1).double()
    n2[0] = nn.Conv2d(4, 4, 3).double()
    for net in (n1, n2, n3):
        nn.init.normal_(net[1].weight)
    w1, w2, w3 = (list(net.parameters()) for net in (n1, n2, n3))
    s = mtp.Lagrangian(w1, w2, w3, list(head.parameters()), [n1[1].weight], [n2[1].weight],
                       [n3[1].weight], cfg)
    for e in s.e:
        nn.init.normal_(e)
    x, y = torch.randn(2, 3, 2, 9, 9, dtype=torch.float64)
    def l_cls():
        return head(n1(x)).pow(2).mean()
    def l_seg():
        return n2(n3(y)).pow(3).mean()
    far = [a - b for a, b in zip(w1, w3)]
    # Eq. (6), term by term
    lagrangian = (l_cls() + cfg.lam * l_seg() + s.mu / 2 * sum(d.pow(2).sum() for d in far)
                  + sum((e * d).sum() for e, d in zip(s.e, far))
                  + cfg.alpha1 * n1[1].weight.abs().sum()
                  + cfg.alpha2 * (n2[1].weight.abs().sum() + n3[1].weight.abs().sum()))
    blocks = [*w1, *head.parameters(), *w2, *w3]
    expected = torch.autograd.grad(lagrangian, blocks)
    s.gradient_w1(l_cls())
    s.gradient_w2_w3(l_seg())
    for p, g in zip(blocks, expected):
        assert torch.allclose(p.grad, g, rtol=1e-12, atol=1e-14)
    old = [e.clone() for e in s.e]                                  # Eq. (10)
    s.update_multipliers()
    for e, before, a, b in zip(s.e, old, w1, w3):
        assert torch.allclose(e, before + 0.3 * (a - b))
    assert abs(s.mu - 0.45) < 1e-12


def test_mtp_one_backward_moves_one_task():
    torch.manual_seed(0)
    cfg = mtp.Config(weight_decay=0.1)
    cls, seg = mtp.Classifier("deeplabv3_resnet18", 3), mtp.Segmenter("deeplabv3_resnet18", 4)
    groups = mtp.groups_of(seg)
    inner, outer = mtp.part_of(groups, "backbone"), mtp.part_of(groups, "decoder")
    s = mtp.Lagrangian(list(cls.backbone.parameters()), list(seg.decoder.parameters()),
                       list(seg.backbone.parameters()), list(cls.head.parameters()),
                       mtp.gammas(cls, inner), mtp.gammas(seg, outer), mtp.gammas(seg, inner), cfg)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    label = torch.randint(0, 4, (2, 32, 32))
    def copies(net):
        return {k: v.clone() for k, v in net.state_dict().items()}
    def same(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)
    a, b = copies(cls), copies(seg)
    s.gradient_w1(mtp.cls_terms(cls, x, y)["cls"])
    s.step_w1(0.01)
    assert same(copies(seg), b) and not same(copies(cls), a)
    assert all(p.grad is None for p in seg.parameters())
    a = copies(cls)
    for _ in range(2):                  # gradients and momentum of task 1 must not linger
        s.gradient_w2_w3(mtp.seg_terms(seg, x, label, 0.4)["seg"])
        s.step_w2_w3(0.01)
    assert same(copies(cls), a)
    now = copies(seg)
    assert not torch.equal(now["decoder.classifier.weight"], b["decoder.classifier.weight"])
    assert not torch.equal(now["backbone.conv1.weight"], b["backbone.conv1.weight"])
    # weight decay spares prunable scales: a step without loss moves the others only
    s = mtp.sgd(seg.parameters(), mtp.gammas(seg, groups), 0.1, cfg)
    for p in seg.parameters():
        p.grad = torch.zeros_like(p)
    s.step()
    after = copies(seg)
    assert torch.equal(after["backbone.layer1.0.bn1.weight"], now["backbone.layer1.0.bn1.weight"])
    assert not torch.equal(after["backbone.layer1.0.bn2.weight"],
                           now["backbone.layer1.0.bn2.weight"])


def test_mtp_fpgm_and_thinet_against_brute_force():
    torch.manual_seed(0)
    net = mtp.Segmenter("deeplabv3_resnet18", 3)
    groups = mtp.groups_of(net)
    first = groups[0]
    weight = net.get_submodule(first.name).weight.detach().double()
    wanted = [sum(float((weight[i] - weight[j]).pow(2).sum().sqrt()) for j in range(len(weight)))
              for i in range(len(weight))]
    assert np.allclose(mtp.fpgm_scores(net, groups[:1])[first.name], wanted)

    conv = nn.Conv2d(5, 4, 3, stride=2, padding=2, dilation=2).double().requires_grad_(False)
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    terms = mtp.thinet_samples(conv, x, torch.Generator().manual_seed(0), positions=50)
    assert terms.shape == (100, 5)
    split = torch.stack([F.conv2d(x[:, c:c + 1], conv.weight[:, c:c + 1], None, 2, 2, 2)
                         for c in range(5)], -1)            # (2, 4, h, w, 5): every possible row
    rows = split.reshape(-1, 5)
    for row in terms:                                       # each sample is one of them
        assert ((rows - row).abs().max(1).values < 1e-10).any()
    places = {int((rows - row).abs().max(1).values.argmin()) for row in terms}
    assert len(places) > 60, "places and output channels vary"

    kept, factors = mtp.thinet_layer(terms, 2)
    removed = []                                            # the greedy rule in loops
    for _ in range(3):
        costs = {c: float(sum((row[removed].sum() + row[c]) ** 2 for row in terms))
                 for c in range(5) if c not in removed}
        removed.append(min(costs, key=costs.get))
    assert kept.tolist() == sorted(set(range(5)) - set(removed))
    best = np.linalg.lstsq(terms[:, kept].numpy(), terms.sum(1).numpy(), rcond=None)[0]
    assert np.allclose(factors, best)


def test_mtp_thinet_zeroes_what_it_removes():
    """Front to back through the backbone: the network it leaves behind is the pruned one."""
    torch.manual_seed(0)
    cfg = mtp.Config(**{**mtp.QUICK, "batch_size": 2, "thinet_images": 4, "method": "thinet"})
    net = mtp.Segmenter(cfg.network, 11)
    groups, before = mtp.groups_of(net), net.backbone.layer1[0].conv2.weight.detach().clone()
    kept = mtp.thinet_kept(net, groups, mtp.TwoSets(cfg), cfg, torch.device("cpu"))
    assert set(kept) == {g.name for g in mtp.part_of(groups, "backbone")}
    assert all(2 * len(kept[g.name]) == g.width for g in groups if g.name in kept)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(mtp.prune(net, groups, kept)(x), net.eval()(x), atol=1e-4)
    after, stays = net.backbone.layer1[0].conv2.weight, kept["backbone.layer1.0.conv1"]
    ratio = after[:, stays] / before[:, stays]
    assert torch.allclose(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3)
    assert (ratio[0, :, 0, 0] - 1).abs().max() > 0.01, "those that stay are scaled"


def test_mtp_widths_in_multiples():
    """--round-to holds for every method, ThiNet's too, and refuses what a layer cannot give."""
    assert [mtp.layer_width(n, 30, 8) for n in (64, 20, 8)] == [48, 16, 8]
    assert [mtp.layer_width(n, 30) for n in (64, 5, 1)] == [45, 4, 1]
    assert mtp.rounded(99, 100, 8) == 96 and mtp.rounded(1, 100, 8) == 8
    _refused(lambda: mtp.rounded(4, 4, 8), "--round-to 8", "4 channels")
    cfg = mtp.Config(**{**mtp.QUICK, "batch_size": 2, "thinet_images": 2, "method": "thinet",
                        "round_to": 48})
    net = mtp.Segmenter(cfg.network, 11)
    kept = mtp.thinet_kept(net, mtp.groups_of(net), mtp.TwoSets(cfg), cfg, torch.device("cpu"))
    assert {len(k) for k in kept.values()} == {48, 144, 240}    # of 64 (32), 128 and 256, 512


def test_mtp_head_of_the_first_task():
    """Taken from the file where the classes are as many; never left random without training."""
    with tempfile.TemporaryDirectory() as tmp:
        torch.manual_seed(0)
        whole, path = data.torchvision.models.resnet18(num_classes=7), Path(tmp, "r18.pth")
        torch.save(whole.state_dict(), path)
        cfg = mtp.Config(**{**mtp.QUICK, "backbone": str(path), "dense_cls_epochs": 0})
        net = mtp.Classifier(cfg.network, 7)
        mtp.start_from(cfg, net, 7)
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(net.eval()(x), whole.eval()(x), atol=1e-5)
        _refused(lambda: mtp.start_from(cfg, mtp.Classifier(cfg.network, 8), 8), "8 classes",
                 "--dense-cls-epochs")


def test_mtp_recalibration_is_a_plain_mean():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    batches = [(3 * torch.randn(4, 3, 8, 8) + 1, None) for _ in range(5)]
    mtp.recalibrate(net, batches, torch.device("cpu"))
    means = torch.stack([net[0](x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    assert torch.allclose(net[1].running_mean, means, atol=1e-5)
    assert not net.training and net[1].momentum == 0.1


def test_mtp_stream_can_be_entered_anywhere():
    cfg = mtp.Config(**mtp.QUICK)
    pictures = data.open_classification("synthetic", None, "train", (32, 32), 0)
    pictures.length = 10
    move = data.classification_transform((32, 32), True)
    whole = [(x, y) for x, y in mtp.stream(pictures, move, 4, 0, 7, cfg)]
    late = [(x, y) for x, y in mtp.stream(pictures, move, 4, 3, 7, cfg)]
    assert len(whole) == 7 and len(late) == 4
    for (x, y), (u, v) in zip(whole[3:], late):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(whole[0][0], whole[2][0]), "another pass, another order and crop"
    keys = [k for batch in mtp.stream(pictures, move, 4, 0, 2, cfg).batch_sampler for k in batch]
    assert len(set(keys)) == 8, "no picture twice in a pass"


# ---------------------------------------------------------------------------------------------
# mtp.py as a process
# ---------------------------------------------------------------------------------------------

MTP_TINY = ("--dataset folder --num-classes 3 --preset quick --cls-batch 10 --size 32 64 "
            "--batch-size 4 --dense-cls-epochs 1 --dense-epochs 1 --rounds 2 --inner-steps 2 "
            "--recalibrate 2 --cls-epochs 1 --epochs 1 --frame 32 64 --thinet-images 4").split()


def tiny_classes(root):
    """20 + 10 pictures of two classes, bright and dark."""
    rng = np.random.default_rng(1)
    for split, n in (("train", 10), ("val", 5)):
        for kind, grey in (("dark", 60), ("bright", 190)):
            for i in range(n):
                path = Path(root, split, kind, f"{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = grey + rng.integers(-40, 40, (32, 32))
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(root)


def mtp_sets(tmp):
    return ["--data-root", tiny_set(Path(tmp, "set")), "--cls-dataset", "imagefolder",
            "--cls-root", tiny_classes(Path(tmp, "classes"))]


def test_mtp_stages_resume_after_kill_bit_for_bit():
    """Killed within an outer round (after one step of it) and resumed: same weights, E and mu."""
    with tempfile.TemporaryDirectory() as tmp:
        base = [*MTP_TINY, *mtp_sets(tmp)]
        whole, broken = Path(tmp, "runs", "whole"), Path(tmp, "runs", "broken")
        out, _ = run("--search", "--train", "--eval", "--bench", *base, "--out", whole,
                     script="mtp.py")
        for word in ("|W1-W3|", "agree", "960 of 1920", "768 of 1536", "sparse mIoU",
                     "pruned mIoU", "pruned / dense: parameters 0.", "retrained mIoU", "top-1",
                     "next: python mtp.py", "40,179,797"):
            assert word in out, f"'{word}' is missing in:\n{out}"
        for name in ("config.json", "bench.json", "miou_params.png", "mtp_50/arch.json",
                     "mtp_50/channels.png", "mtp_50/gammas.png", "mtp_50/segmentations.png",
                     "mtp_50/cls/best.pt", "mtp_50/seg/best.pt", "sparse_mtp/constraint.png"):
            assert (whole / name).stat().st_size > 0, name

        stages = ["--search", "--train", *base, "--save-steps", "1", "--out", broken]
        killed(stages, broken / "sparse_mtp" / "last.pt", script="mtp.py")
        state = torch.load(broken / "sparse_mtp" / "last.pt", weights_only=True)
        assert sum(state["done"].values()) > 0, "the kill must come within a round"
        run(*stages, "--resume", script="mtp.py")
        for name in ("sparse_mtp/last.pt", "mtp_50/pruned.pt", "mtp_50/cls/last.pt",
                     "mtp_50/seg/last.pt"):
            a, b = state_of(whole / name), state_of(broken / name)
            assert a.keys() == b.keys() and len(a) > 100
            for key in a:
                assert torch.equal(a[key], b[key]), f"{name}{key} differs after resuming"
        a, b = (torch.load(d / "sparse_mtp" / "last.pt", weights_only=True)["lagrangian"]["mu"]
                for d in (whole, broken))
        assert a == b
        assert (whole / "mtp_50/arch.json").read_text() == (broken / "mtp_50/arch.json").read_text()

        def inside(*flags):                 # the same without starting Python anew
            with contextlib.redirect_stdout(io.StringIO()) as out:
                mtp.main([str(flag) for flag in (*base, "--out", whole, *flags)])
            return out.getvalue()
        # The other methods start from the same dense network, which is not trained again.
        every = ("--search", "--train", "--eval", "--eval-scales", "0.5", "1")
        for flags, word in (((*every, "--method", "slimming"), "960 of 1920"),
                            ((*every, "--method", "slimming", "--rank", "unified", "--cls-epochs",
                              "0"), "prunable"),
                            ((*every, "--method", "uniform"), "960 of 1920"),
                            (("--search", "--method", "fpgm", "--percentile", "25"),
                             "1440 of 1920"),
                            (("--search", "--method", "thinet"), "1536 of 1536")):
            out = inside(*flags)
            assert word in out and out.count("trained already") >= 2, out
        out = inside("--bench")
        for name in ("mtp_50", "slimming_50", "uniform_50"):
            assert re.search(rf"^{name} .*miou.*top1", out, re.M), f"{name} is missing in:\n{out}"
        assert re.search("^fpgm_25 .*params", out, re.M)
        assert re.search("^slimming_50_unified .*params", out, re.M)
        assert (whole / "slimming_50_unified/result_val_without_cls_2scales.json").exists()
        arch = json.loads((whole / "uniform_50/arch.json").read_text())
        assert arch["widths"]["backbone.layer1.0.conv1"] == 32

        arch, wide = json.loads((whole / "mtp_50/arch.json").read_text()), Path(tmp, "wide.json")
        weights = ["--weights", whole / "mtp_50/seg/best.pt"]
        for width, words in ((arch["widths"]["backbone.layer1.0.conv1"] + 1, ("another shape",)),
                             (400, ("layer1.0.conv1", "1 to 64"))):
            arch["widths"]["backbone.layer1.0.conv1"] = width
            wide.write_text(json.dumps(arch))
            _refused(lambda: inside("--eval", "--arch", wide, *weights), *words)
        _refused(lambda: inside("--eval", "--num-classes", "4"), "classes")
        for flags, word in ((("--lam", "2"), "another --lam"), (("--dense-lr", "2"), "dense_lr")):
            _refused(lambda: inside("--search", "--resume", *flags), word)
        before = state_of(whole / "mtp_50/pruned.pt")       # new weights are not taken for old ones
        assert "trained already" in inside("--train")
        inside("--search", "--alpha1", "0.2")
        assert not torch.equal(state_of(whole / "mtp_50/pruned.pt")[".model.backbone.conv1.weight"],
                               before[".model.backbone.conv1.weight"])
        _refused(lambda: inside("--eval"), "fine-tuned from another network")
        assert not re.search("^mtp_50 .*miou", inside("--bench"), re.M), "a result of other weights"
        assert "trained already" not in inside("--train")


def test_mtp_two_processes_cut_the_same_channels():
    """W1, W2, W3, what is kept and the pruned networks."""
    patch = ("choose = m.choose_and_prune\n"
             "def choose_and_tell(cls, seg, *rest):\n"
             "    wide = [p.clone() for net in (cls, seg) for p in net.parameters()]\n"
             "    *small, kept = choose(cls, seg, *rest)\n"
             "    tell([*wide, *kept.values(), *(p for net in small for p in net.parameters())])\n"
             "    return *small, kept\n"
             "m.choose_and_prune = choose_and_tell")
    with tempfile.TemporaryDirectory() as tmp:
        equal_on_two_ranks("mtp", patch, 29618, tmp, "--search", *MTP_TINY, *mtp_sets(tmp))


def test_mtp_wrong_input_ends_in_one_sentence():
    with tempfile.TemporaryDirectory() as tmp:
        tail = ["--out", str(Path(tmp, "r"))]
        missing = str(Path(tmp, "no.pth"))
        for flags, words in (
                (["--search", "--percentile", "0"], ("--percentile", "0")),
                (["--search", "--percentile", "100"], ("--percentile", "100")),
                (["--search", "--rho", "1"], ("--rho",)),
                (["--search", "--inner-steps", "0"], ("--inner-steps",)),
                (["--search", "--method", "thinet", "--rank", "unified"], ("thinet", "--rank")),
                (["--search", "--batch-size", "1"], ("--batch-size", "BN")),
                (["--search", "--network", "pspnet_resnet50", "--backbone", "imagenet"],
                 ("deep stem",)),
                (["--search", "--cls-dataset", "imagefolder"], ("imagefolder", "--cls-root")),
                (["--search", "--cls-dataset", "imagefolder", "--cls-root", missing],
                 (missing, "--cls-root")),
                (["--search", "--lr", "0"], ("--lr",)), (["--search", "--rho", "nan"], ("--rho",)),
                (["--search", "--weight-decay", "-1"], ("--weight-decay",)),
                (["--eval", "--eval-scales", "nan"], ("--eval-scales",)),
                (["--search", "--round-to", "1000"], ("--round-to 1000", "64 channels")),
                (["--search", "--backbone", missing], (missing,)),
                (["--train"], ("arch.json", "no")),
                (["--search", "--train", "--method", "dense"], ("dense", "--train")),
                (["--eval", "--method", "dense"], ("no checkpoint", "best.pt")),
                (["--bench", "--arch", missing], (missing,))):
            _refused(lambda: mtp.main([*flags, *tail]), *words)
        for text, word in (("{", "readable"), ("[]", "network"), ('{"network": "resnet"}', "name"),
                           ('{"network": "bisenet_resnet18", "classes": 3, "cls_classes": 2}',
                            "width None")):
            Path(tmp, "a.json").write_text(text)
            _refused(lambda: mtp.read_arch(Path(tmp, "a.json")), word)
        refused("--search", *tail, "--percentile", "100", words=("--percentile",), script="mtp.py")
        assert "unrecognized arguments: --alpha" in run("--search", "--alpha", "1", code=2,
                                                        script="mtp.py")[1]


# ---------------------------------------------------------------------------------------------
# the runner
# ---------------------------------------------------------------------------------------------


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    tests = [(n, f) for n, f in globals().items() if n.startswith("test_") and wanted in n]
    failed = 0
    for name, test in tests:
        start = time.perf_counter()
        try:
            test()
            verdict = "ok  "
        except Exception:
            failed += 1
            verdict = "FAIL"
            traceback.print_exc()
        print(f"{verdict} {time.perf_counter() - start:6.2f} s  {name}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
