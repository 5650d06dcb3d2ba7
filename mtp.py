r"""MTP: prune the channels of a segmentation network, judged by classification and segmentation
together.

    Chen, Zhang, Wang: MTP: Multi-Task Pruning for Efficient Semantic Segmentation Networks.
    Section, equation, table and line numbers below are the paper's.

The idea in five lines:
  1. The scale gamma of a channel's BN says how much the channel matters; an l1 norm shrinks it.
  2. A backbone serves two tasks, pre-training and segmentation, so both should have a say.
  3. Each task trains a copy of it, W1 and W3; an augmented Lagrangian draws the copies together.
  4. Channels with the smallest gamma, p percent of backbone and of decoder, are cut for real.
  5. The smaller network is fine-tuned on classification, then on segmentation.

    classification set -> [ N1: backbone W1 ] -> head -> class      Eq. (7)    every round: K
                                |  E, mu: W1 = W3                              batches of each task,
    segmentation set  --> [ N2: backbone W3 ] -> [ decoder W2 ] -> mask        then E and mu (10)
                                |                    |      Eqs. (8), (9)
                             gamma1               gamma2        sort, cut the lowest p percent
                                v                    v
                          [ narrow backbone ] -> [ narrow decoder ]  fine-tune: class, then mask

    paper                   here                                meaning
    N1, N2                  Classifier, Segmenter               the networks of the two tasks
    W1, W2, W3              Lagrangian.w1, .w2, .w3             backbone (task 1), decoder, backbone
    gamma1 gamma2 gamma3    .gamma1, .gamma2, .gamma3           BN scales among W1, W2, W3
    lambda, alpha1, alpha2  cfg.lam, cfg.alpha1, cfg.alpha2     Eq. (4)
    E, mu, rho              Lagrangian.e, .mu, cfg.rho          Eqs. (6), (10)
    p                       cfg.percentile                      percent of the channels removed
    tau1, tau2              keep_ranked                         thresholds: a rank, so exact

    python mtp.py --search                       1.6 minutes, 0.8 GiB on two CPU cores
    python mtp.py --train --eval                 about a minute: class, then mask; 34 mIoU
    python mtp.py --bench                        half a minute: dense beside all pruned networks
"""
import copy
import functools
import hashlib
import itertools
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common
import data
import latency
from common import (BaseConfig, InputError, Progress, autocast, average_gradients, check_finite,
                    clip_gradients, count_macs, count_params, cross_entropy, evaluate,
                    load_checkpoint, load_weights, narrowed, open_loader, open_split, opt, place,
                    rank, save_checkpoint, world_size)

# ---------------------------------------------------------------------------------------------
# Settings. Defaults are the paper's for DeepLabV3 on VOC (7.1); the tag says where it says so.
# ---------------------------------------------------------------------------------------------

# data.py lets torchvision load beside a torch built without CUDA, so it is taken from there.
ASPP = data.torchvision.models.segmentation.deeplabv3.ASPP
NAMES = ("deeplabv3_resnet18", "deeplabv3_resnet50", "deeplabv3_resnet101", "bisenet_resnet18",
         "pspnet_resnet50")
METHODS = ("mtp", "slimming", "uniform", "thinet", "fpgm", "dense")


@dataclass
class Config(BaseConfig):
    network: str = opt("deeplabv3_resnet101", "which network to prune (PAPER 4; deeplabv3_resnet18 "
                       "and _resnet50 are OURS, for small machines); a pruned one is as its "
                       "arch.json says", NAMES)
    backbone: str = opt("imagenet", "where training starts: imagenet (torchvision's weights), "
                        "none, or a file with a classifier's state_dict")
    cls_dataset: str = opt("synthetic", "the classification set of task 1 (PAPER: ImageNet)",
                           ("synthetic", "imagefolder"))
    cls_root: str = opt("", "its folder: {train,val}/<class>/*.jpg")
    cls_size: tuple[int, int] = opt((224, 224), "its crop, H W in pixels (OURS: ImageNet's usual)")
    cls_batch: int = opt(256, "its batch size (PAPER 7.1)")
    size: tuple[int, int] = opt((513, 513), "segmentation crop, H W in pixels (PAPER 7.1)")
    scales: tuple[float, float] = opt((0.5, 2.0), "random scaling, drawn uniformly (PAPER 7.1)")
    batch_size: int = opt(16, "segmentation batch over all processes (PAPER 7.1)")
    momentum: float = opt(0.9, "of SGD (OURS: the paper does not say; Chen et al.'s value)")
    weight_decay: float = opt(1e-4, "of SGD, never on prunable gammas (OURS: usual for ResNets)")
    dense_cls_epochs: int = opt(0, "Eq. (1), classification epochs from --backbone on; 0: it has "
                                "a trained head for these classes")
    dense_cls_lr: float = opt(0.1, "learning rate of Eq. (1), linear to 0 (OURS)")
    dense_epochs: int = opt(50, "Eq. (2), segmentation epochs of the dense network (PAPER 7.1)")
    dense_lr: float = opt(0.007, "learning rate of Eq. (2), poly 0.9 (PAPER 7.1)")
    aux_weight: float = opt(0.4, "loss of each auxiliary head of BiSeNet and PSPNet (OURS, "
                            "PSPNet's value)")
    method: str = opt("mtp", "how channels are chosen; dense: not at all", METHODS)
    percentile: float = opt(50.0, "p, percent of the prunable channels to remove (PAPER 3); the "
                            "paper's 0.75x is 25")
    rank: str = opt("auto", "scores compete in each layer, within backbone and within decoder "
                    "(independent, PAPER 3) or all together (unified, PAPER Table 4); auto: "
                    "independent for mtp and slimming, else layer",
                    ("auto", "layer", "independent", "unified"))
    least_width: float = opt(0.05, "share of a layer's channels that always stays, at least one, "
                             "where layers compete (OURS: an empty layer would cut the network in "
                             "two)")
    round_to: int = opt(1, "round kept widths to multiples, e.g. 8 (OURS: what kernels like); then "
                        "the total is only about p")
    lam: float = opt(1.0, "lambda of Eq. (4) (OURS: the paper does not give it)")
    alpha1: float = opt(1e-3, "l1 weight of gamma1 (PAPER 7.1; 1e-4 for BiSeNet and PSPNet)")
    alpha2: float = opt(1e-3, "l1 weight of gamma2 and gamma3 (PAPER 7.1; likewise)")
    rho: float = opt(1.5, "growth of mu a round, above 1 (PAPER Eq. 10; the value is OURS)")
    mu: float = opt(0.0, "first mu; 0: a pull of a tenth in the first round (OURS)")
    rounds: int = opt(20, "most rounds of lines 2 to 7 (OURS)")
    inner_steps: int = opt(500, "K, batches of each task a round (OURS)")
    tolerance: float = opt(1e-3, "line 7: stop when ||W1 - W3|| / ||W1|| is below and the kept set "
                           "has not changed for a round (OURS); 0: all rounds, and one sparse "
                           "training then serves several --percentile")
    save_steps: int = opt(100, "also write last.pt after so many steps within a round")
    search_cls_lr: float = opt(0.001, "learning rate of W1, linear to 0 (PAPER 7.1)")
    search_lr: float = opt(0.007, "learning rate of W2, W3, linear to 0 (OURS: Eq. (2)'s; at the "
                           "fine-tuning rate gamma would hardly move)")
    l1: str = opt("proximal", "how the l1 norm acts: soft threshold after a step, which gives true "
                  "zeros (OURS), or its subgradient", ("proximal", "subgradient"))
    recalibrate: int = opt(50, "batches that re-estimate BN statistics after the cut (OURS)")
    thinet_images: int = opt(64, "pictures on which ThiNet looks at each layer, in whole batches "
                             "(OURS)")
    cls_epochs: int = opt(20, "line 11: fine-tuning on classification; 0 = the row 'w/o ImageNet "
                          "finetuning' of Table 1 (PAPER 7.1)")
    cls_lr: float = opt(7e-4, "its learning rate, poly 0.9 (PAPER 7.1: one rate for fine-tuning)")
    epochs: int = opt(50, "line 11: fine-tuning on segmentation (PAPER 7.1)")
    lr: float = opt(7e-4, "its learning rate, poly 0.9 (PAPER 7.1)")
    frame: tuple[int, int] = opt((513, 513), "picture size H W of MACs and latency (PAPER Table 2)")
    arch: str = opt("", "arch.json to train, evaluate or bench [the run's own]; --bench also takes "
                    "'uniform': uniform widths at --percentile, random weights")
    weights: str = opt("", "checkpoint for --eval and --export [best.pt of the fine-tuning]")
    split: str = opt("val", "segmentation split for --eval")
    eval_scales: tuple[float, ...] = opt((1.0,), "average over rescaled pictures (PAPER 7.1, "
                                         "Cityscapes and ADE20K: 0.5 0.75 1 1.25 1.5 1.75)")
    eval_flip: bool = opt(False, "and over mirrored ones")
    export: str = opt("", "after the other stages, write the network as a torch.export program")


# Minutes on two cores, from random weights: few steps, so larger ones and a stronger l1 (OURS).
QUICK = dict(network="deeplabv3_resnet18", backbone="none", cls_size=(32, 32), cls_batch=32,
             size=(64, 96), scales=(0.75, 1.5), batch_size=8, dense_cls_epochs=2,
             dense_cls_lr=0.05, dense_epochs=2, dense_lr=0.05, alpha1=0.05, alpha2=0.05, rounds=6,
             inner_steps=8, tolerance=0.0, search_cls_lr=0.01, search_lr=0.01, rho=2.0,
             recalibrate=10, thinet_images=16, cls_epochs=2, cls_lr=0.01, epochs=4, lr=0.02,
             frame=(128, 256))

# What the dense, the sparse and the fine-tuned networks depend on: a stored one with other values
# is another network.
DENSE_CLS = ("network", "backbone", "cls_dataset", "cls_root", "cls_size", "cls_batch", "momentum",
             "weight_decay", "dense_cls_epochs", "dense_cls_lr", "seed")
DENSE_SEG = DENSE_CLS + ("dataset", "data_root", "size", "image_scale", "scales", "batch_size",
                         "dense_epochs", "dense_lr", "aux_weight")
SPARSE = DENSE_SEG + ("lam", "alpha1", "alpha2", "rho", "mu", "rounds", "inner_steps", "tolerance",
                      "search_cls_lr", "search_lr", "l1")

FINE_CLS = ("cls_dataset", "cls_root", "cls_size", "cls_batch", "cls_epochs", "cls_lr", "momentum",
            "weight_decay", "seed")
FINE_SEG = ("dataset", "data_root", "size", "image_scale", "scales", "batch_size", "epochs", "lr",
            "aux_weight")

# ---------------------------------------------------------------------------------------------
# 1. Networks. Names of submodules are the names of layers in arch.json.
# ---------------------------------------------------------------------------------------------


def conv_bn_relu(c_in, c_out, kernel=3, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def resize(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Group:
    """Channels that live or die together, and every layer that must be told.

    makers: ((convolution, its BN or None), ...), whose outputs are added or multiplied channel by
    channel, mostly one; readers: ((convolution, first input channel), ...), the second being the
    place in a concatenation. name, of the first maker, stands in arch.json.
    """
    part: str                   # "backbone" or "decoder"
    width: int
    makers: tuple
    readers: tuple

    @property
    def name(self):
        return self.makers[0][0]


class DeepLabDecoder(nn.Module):
    """ASPP and classifier of DeepLabV3 at output stride 16. No auxiliary head."""
    dilation, lag, deep_stem = {"layer4": 2}, True, False       # PAPER 4.1: multi-grid 1, 1, 1

    def __init__(self, channels, num_classes, auxiliary):
        super().__init__()
        self.aspp = ASPP(channels, [6, 12, 18])
        self.aspp.project[3].p = 0.0    # OURS: no dropout, DeepLabV3's paper has none either
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, image, maps):
        return [self.classifier(self.aspp(maps[-1]))]           # (B, K, H/16, W/16)

    def links(self):
        """[(makers, readers)] of the prunable channels, in the order of computation."""
        found, start = [], 0
        for i, branch in enumerate(self.aspp.convs):
            k = 1 if i == 4 else 0                              # the pooling branch begins with one
            found.append(([(f"aspp.convs.{i}.{k}", f"aspp.convs.{i}.{k + 1}")],
                          [("aspp.project.0", start)]))
            start += branch[k].out_channels
        return found + [([("aspp.project.0", "aspp.project.1")], [("classifier", 0)])]


class Attention(nn.Module):
    """BiSeNet's attention refinement: 3x3 convolution, then a gate a channel."""

    def __init__(self, c_in):
        super().__init__()
        self.conv = conv_bn_relu(c_in, 128)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(128, 128, 1, bias=False),
                                  nn.BatchNorm2d(128), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(x)


class BiSeNetDecoder(nn.Module):
    """Everything of BiSeNet but its ResNet: spatial path, attention refinement, fusion, head."""
    dilation, lag, deep_stem = {}, False, False

    def __init__(self, channels, num_classes, auxiliary):
        super().__init__()
        self.spatial = nn.Sequential(conv_bn_relu(3, 64, 7, 2), conv_bn_relu(64, 64, 3, 2),
                                     conv_bn_relu(64, 64, 3, 2), conv_bn_relu(64, 128, 1))
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(channels, 128, 1))
        self.arms = nn.ModuleList([Attention(channels), Attention(channels // 2)])
        self.refines = nn.ModuleList([conv_bn_relu(128, 128), conv_bn_relu(128, 128)])
        self.fuse = conv_bn_relu(256, 256, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(256, 256, 1, bias=False),
                                  nn.ReLU(inplace=True), nn.Conv2d(256, 256, 1, bias=False),
                                  nn.Sigmoid())
        self.head = conv_bn_relu(256, 64)
        self.classifier = nn.Conv2d(64, num_classes, 1)
        self.auxiliary = nn.ModuleList([
            nn.Sequential(conv_bn_relu(128, 256), nn.Conv2d(256, num_classes, 1))
            for _ in range(2 * auxiliary)])

    def forward(self, image, maps):
        x, extra = self.context(maps[3]), []                    # (B, 128, 1, 1)
        for i, (arm, refine) in enumerate(zip(self.arms, self.refines)):
            y = arm(maps[3 - i])                                # (B, 128, H/32, W/32), then H/16
            x = refine(resize(y + resize(x, y.shape[-2:]), maps[2 - i].shape[-2:]))
            if self.training and self.auxiliary:
                extra.append(self.auxiliary[i](x))
        spatial = self.spatial(image)                           # (B, 128, H/8, W/8)
        x = self.fuse(torch.cat([spatial, x], 1))
        return [self.classifier(self.head(x + x * self.gate(x))), *extra]

    def links(self):
        def layer(name):
            return (f"{name}.0", f"{name}.1")
        aux = [[(f"auxiliary.{i}.0.0", 0)] if self.auxiliary else [] for i in range(2)]
        path = [([layer(f"spatial.{i}")], [(f"spatial.{i + 1}.0", 0)]) for i in range(3)]
        gates = [(f"arms.{i}.gate.1", f"arms.{i}.gate.2") for i in range(2)]
        return [*path, ([layer("spatial.3")], [("fuse.0", 0)]),
                # Added or multiplied channel by channel: one decision for all three.
                ([("context.1", "context.2"), layer("arms.0.conv"), gates[0]],
                 [("refines.0.0", 0), (gates[0][0], 0)]),
                ([layer("refines.0"), layer("arms.1.conv"), gates[1]],
                 [("refines.1.0", 0), (gates[1][0], 0), *aux[0]]),
                ([layer("refines.1")], [("fuse.0", self.spatial[3][0].out_channels), *aux[1]]),
                # OURS: the gate's inner channels have no BN and so no score; they follow suit.
                ([layer("fuse"), ("gate.1", None), ("gate.3", None)],
                 [("gate.1", 0), ("gate.3", 0), ("head.0", 0)]),
                ([layer("head")], [("classifier", 0)])]


class PSPDecoder(nn.Module):
    """Pyramid pooling with bins 1, 2, 3, 6 and a 3x3 convolution, at output stride 8."""
    dilation, lag, deep_stem = {"layer3": 2, "layer4": 4}, False, True

    def __init__(self, channels, num_classes, auxiliary):
        super().__init__()
        self.pyramid = nn.ModuleList([
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), *conv_bn_relu(channels, channels // 4, 1))
            for bins in (1, 2, 3, 6)])
        self.fuse = conv_bn_relu(2 * channels, 512)
        self.classifier = nn.Conv2d(512, num_classes, 1)
        self.auxiliary = nn.ModuleList([
            nn.Sequential(conv_bn_relu(channels // 2, 256), nn.Conv2d(256, num_classes, 1))
            for _ in range(auxiliary)])

    def forward(self, image, maps):
        x = maps[-1]                                            # (B, 2048, H/8, W/8)
        x = torch.cat([x] + [resize(level(x), x.shape[-2:]) for level in self.pyramid], 1)
        extra = [head(maps[2]) for head in self.auxiliary if self.training]
        return [self.classifier(self.fuse(x)), *extra]

    def links(self):
        found = []
        start = self.fuse[0].in_channels - sum(level[1].out_channels for level in self.pyramid)
        for i, level in enumerate(self.pyramid):
            found.append(([(f"pyramid.{i}.1", f"pyramid.{i}.2")], [("fuse.0", start)]))
            start += level[1].out_channels
        return found + [([("fuse.0", "fuse.1")], [("classifier", 0)])]


def dilate(stage, rate, lag):
    """Keep the resolution of a ResNet stage: stride 1, its 3x3 convolutions dilated by `rate`.

    lag: the convolution that loses its stride keeps half the rate, as its input is not finer than
    before; this is torchvision's rule (DeepLab). Without: PSPNet's.
    """
    for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            d = rate // 2 if lag and conv.stride != (1, 1) else rate
            conv.dilation = conv.padding = (d, d)
        conv.stride = (1, 1)


def resnet(network, dilated):
    """torchvision's ResNet without its head, changed as `network` wants it; random weights."""
    decoder = DECODERS[network.split("_")[0]]
    net = common.classifier(network.split("_")[1])
    net.fc = nn.Identity()
    if decoder.deep_stem:       # three 3x3 convolutions in place of one 7x7, 128 channels out
        net.conv1 = nn.Sequential(conv_bn_relu(3, 64, 3, 2), conv_bn_relu(64, 64),
                                  *conv_bn_relu(64, 128)[:2])
        net.bn1, first = nn.Identity(), net.layer1[0]
        first.conv1 = nn.Conv2d(128, 64, 1, bias=False)
        first.downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
    for stage, rate in decoder.dilation.items() if dilated else ():
        dilate(getattr(net, stage), rate, decoder.lag)
    return net


def features(net, x):
    """The four stages' outputs; (B, C, H/4, W/4) to (B, 8 C, H/32, W/32) if nothing is dilated."""
    x, maps = net.maxpool(net.relu(net.bn1(net.conv1(x)))), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x)
    return maps


class Classifier(nn.Module):
    """N1, Eq. (1): backbone and linear head. (B, 3, H, W) -> (B, num_classes).

    OURS: not dilated, as pre-trained networks are; W1 and W3 have the same shapes all the same.
    """

    def __init__(self, network, num_classes):
        super().__init__()
        self.backbone = resnet(network, dilated=False)
        self.head = nn.Linear(WIDTH[network.split("_")[1]], num_classes)

    def forward(self, x):
        return self.head(features(self.backbone, x)[-1].mean((2, 3)))


class Segmenter(nn.Module):
    """N2, Eq. (2): backbone and decoder. (B, 3, H, W) -> logits (B, num_classes, H, W).

    auxiliary: with the training heads of BiSeNet or PSPNet; in training mode it then returns a
    list, the main output first.
    """

    def __init__(self, network, num_classes, auxiliary=False):
        super().__init__()
        self.backbone = resnet(network, dilated=True)
        self.decoder = DECODERS[network.split("_")[0]](WIDTH[network.split("_")[1]], num_classes,
                                                       auxiliary)

    def forward(self, x):
        outputs = [resize(y, x.shape[-2:])
                   for y in self.decoder(x, features(self.backbone, x))]
        return outputs if len(outputs) > 1 else outputs[0]


WIDTH = {"resnet18": 512, "resnet50": 2048, "resnet101": 2048}      # channels of the last stage
DECODERS = {"deeplabv3": DeepLabDecoder, "bisenet": BiSeNetDecoder, "pspnet": PSPDecoder}
# deeplabv3_resnet101(num_classes, auxiliary=False) -> Segmenter, and so on
deeplabv3_resnet18, deeplabv3_resnet50, deeplabv3_resnet101, bisenet_resnet18, pspnet_resnet50 = (
    functools.partial(Segmenter, name) for name in NAMES)

# ---------------------------------------------------------------------------------------------
# 2. What can be pruned, and networks of given widths
# ---------------------------------------------------------------------------------------------


def groups_of(net):
    """The prunable Groups of a Segmenter or Classifier, front to back.

    PAPER 7.1: of each residual block all convolutions but the last, whose output is added to the
    shortcut; so stem, last convolutions and shortcuts stay as they are. In the decoder every
    convolution with BN; not the classifier, whose outputs are the classes.
    """
    found = []
    for stage in range(1, 5):
        for b, block in enumerate(getattr(net.backbone, f"layer{stage}")):
            convs = [f"conv{i}" for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
            for i, (conv, after) in enumerate(itertools.pairwise(convs)):
                path = f"backbone.layer{stage}.{b}"
                found.append(Group("backbone", getattr(block, conv).out_channels,
                                   ((f"{path}.{conv}", f"{path}.bn{i + 1}"),),
                                   ((f"{path}.{after}", 0),)))
    for makers, readers in net.decoder.links() if hasattr(net, "decoder") else ():
        makers = tuple((f"decoder.{conv}", bn and f"decoder.{bn}") for conv, bn in makers)
        readers = tuple((f"decoder.{conv}", start) for conv, start in readers)
        found.append(Group("decoder", net.get_submodule(makers[0][0]).out_channels, makers,
                           readers))
    return found


def part_of(groups, part):
    return [g for g in groups if g.part == part]


def gammas(net, groups):
    """The BN scales of the groups' channels, one parameter a maker."""
    return [net.get_submodule(bn).weight for g in groups for _, bn in g.makers if bn]


def prune(net, groups, kept):
    """Line 10: a copy of the network without the removed channels; `net` is left alone.

    kept: {group name: sorted indices of the channels that stay}; groups it lacks stay whole.
    Convolutions that make a channel lose an output, those that read it an input.
    """
    out, into = {}, {}
    for g in (g for g in groups if g.name in kept):
        for conv, bn in g.makers:
            out[conv] = kept[g.name]
            if bn:
                out[bn] = kept[g.name]
        for conv, start in g.readers:
            stays = into.setdefault(conv, torch.ones(net.get_submodule(conv).in_channels,
                                                     dtype=torch.bool))
            stays[start:start + g.width] = False
            stays[start + kept[g.name]] = True
    memo = {}           # deepcopy puts the narrow layer wherever it meets the wide one
    for name in {**out, **into}:
        layer = net.get_submodule(name)
        memo[id(layer)] = narrowed(layer, out.get(name), into[name].nonzero()[:, 0]
                                   if name in into else None)
    return copy.deepcopy(net, memo)


def with_widths(net, widths, where):
    """`net` with the first widths[name] channels of each group: the shapes of a pruned network."""
    groups = groups_of(net)
    mine = {g.name: widths.get(g.name) for g in groups} if isinstance(widths, dict) else {}
    for g in groups:
        n = mine.get(g.name)
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= g.width:
            raise InputError(f"{where}: width {n} of layer {g.name} does not fit; it needs a whole "
                             f"number from 1 to {g.width}")
    return prune(net, groups, {name: torch.arange(n) for name, n in mine.items()})


def on_meta(kind, network, classes, **more):
    """The network's shapes without its numbers: nothing is allocated or initialised."""
    with torch.device("meta"):
        return kind(network, classes, **more)


def rebuild(kind, arch, state, where, **more):
    """A pruned Segmenter or Classifier (`kind`) from the JSON of arch.json and a state_dict alone.

    On the meta device first, so that no large network is initialised in vain. With auxiliary=True
    a Segmenter keeps the heads that only training uses.
    """
    net = on_meta(kind, arch["network"], arch["classes" if kind is Segmenter else "cls_classes"],
                  **more)
    net = with_widths(net, arch["widths"], where).to_empty(device="cpu")
    load_weights(net, {k: v for k, v in state.items() if more or "auxiliary" not in k}, where)
    return net


def read_arch(path):
    """The dict of an arch.json; InputError if it is not one."""
    arch = common.read_json(path, "arch.json")
    if not isinstance(arch, dict) or arch.get("network") not in NAMES:
        raise InputError(f"{path} does not name one of the networks {', '.join(NAMES)}")
    for key in ("classes", "cls_classes"):
        if not isinstance(arch.get(key), int) or not 2 <= arch[key] <= 100_000:
            raise InputError(f"{path} does not say for how many classes it was found ('{key}')")
    with_widths(on_meta(Segmenter, arch["network"], arch["classes"]), arch.get("widths"), path)
    return arch


# ---------------------------------------------------------------------------------------------
# 3. Losses and regularizers
# ---------------------------------------------------------------------------------------------


def cls_terms(forward, images, labels):
    """l_cls of Eq. (1)."""
    return {"cls": F.cross_entropy(forward(images).float(), labels)}


def seg_terms(forward, images, labels, aux_weight):
    """l_seg of Eq. (2); auxiliary heads, where the network has them, are part of it."""
    outputs = forward(images)
    main, *extra = outputs if isinstance(outputs, list) else [outputs]
    terms = {"seg": cross_entropy(main, labels)}
    if extra:
        terms["aux"] = aux_weight * sum(cross_entropy(y, labels) for y in extra)
    return terms


@torch.no_grad()
def soft_threshold_(x, t):
    """The proximal step of t ||x||_1, in place: towards zero by t, and no further."""
    x.copy_(x.sign() * (x.abs() - t).clamp_min(0))


def sgd(parameters, gamma, lr, cfg):
    """SGD whose weight decay spares the prunable gammas: two forces on them would be one too many
    (alpha would no longer say how sparse the network gets)."""
    special = {id(p) for p in gamma}
    rest = [p for p in parameters if id(p) not in special]
    return torch.optim.SGD([{"params": rest}, {"params": gamma, "weight_decay": 0.0}], lr,
                           cfg.momentum, weight_decay=cfg.weight_decay)


class Lagrangian:
    """Eq. (6): the blocks W1, W2, W3, the multipliers E and mu, and SGD for each block.

        L = l_cls(W1) + lambda l_seg(W3, W2) + mu/2 ||W1 - W3||^2 + <E, W1 - W3>
            + alpha1 ||gamma1||_1 + alpha2 (||gamma2||_1 + ||gamma3||_1)

    w1, w3: the parameters of the backbone in both networks, in one order; w2: those of the
    decoder; head: of the classifier, private to task 1 and so outside of the constraint (OURS).
    gamma1, gamma2, gamma3: the prunable scales among w1, w2, w3. BN statistics are no parameters:
    each network keeps its own (OURS: the pictures of the two tasks differ). Without w1 it is
    single-task training, Network Slimming.

    Eq. (5) is not quite Eq. (4): with W1 = W3 a shared gamma pays alpha1 + alpha2, not alpha1.
    """

    def __init__(self, w1, w2, w3, head, gamma1, gamma2, gamma3, cfg):
        self.w1, self.w2, self.w3, self.cfg = w1, w2, w3, cfg
        self.gamma1, self.gamma2, self.gamma3 = gamma1, gamma2, gamma3
        self.sgd1 = sgd([*w1, *head], gamma1, cfg.search_cls_lr, cfg) if w1 else None
        self.sgd23 = sgd([*w2, *w3], [*gamma2, *gamma3], cfg.search_lr, cfg)
        self.e = [torch.zeros_like(w) for w in w1]              # OURS: E = 0 at the start
        # OURS: K SGD steps close the gap by a share of about K lr mu / (1 - momentum). It starts
        # at a tenth and stops growing at mu = 0.1 / lr, far below 2 (1 + momentum) / lr, where SGD
        # on the quadratic term alone would diverge.
        lr = max(cfg.search_cls_lr, cfg.search_lr)
        self.mu = cfg.mu or 0.1 * (1 - cfg.momentum) / (cfg.inner_steps * lr)
        self.largest_mu = max(0.1 / lr, self.mu)

    def gradient_w1(self, loss):
        """Gradient of Eq. (7) w.r.t. W1 and head. loss: l_cls(N1(W1, X1), Y1)."""
        self.sgd1.zero_grad()
        loss.backward()
        # L1 = l_cls + <E, W1 - W3> + mu/2 ||W1 - W3||^2 + alpha1 ||gamma1||_1
        self._constrain(self.w1, 1)
        self._subgradient(self.gamma1, self.cfg.alpha1)

    def gradient_w2_w3(self, loss):
        """Gradient of Eq. (8) w.r.t. W2 and of Eq. (9) w.r.t. W3. loss: l_seg(N2(W3, W2, X2), Y2).

        OURS: one backward serves both, as L2 and L3 have the same first term; so W2 and W3 move at
        once and not in turn, for half the time.
        """
        self.sgd23.zero_grad()
        (self.cfg.lam * loss).backward()
        # L2 = lambda l_seg + alpha2 ||gamma2||_1
        self._subgradient(self.gamma2, self.cfg.alpha2)
        # L3 = lambda l_seg + mu/2 ||W1 - W3||^2 + <E, W1 - W3> + alpha2 ||gamma3||_1
        self._constrain(self.w3, -1)
        self._subgradient(self.gamma3, self.cfg.alpha2)

    @torch.no_grad()
    def _constrain(self, block, sign):
        """Add sign * (E + mu (W1 - W3)): d/dW1 has sign +1, d/dW3 has -1."""
        for w, e, a, b in zip(block, self.e, self.w1, self.w3):
            w.grad.add_(e, alpha=sign).add_(a, alpha=sign * self.mu).sub_(b, alpha=sign * self.mu)

    @torch.no_grad()
    def _subgradient(self, gamma, alpha):
        if self.cfg.l1 == "subgradient":
            for g in gamma:
                g.grad.add_(g.sign(), alpha=alpha)

    def step_w1(self, lr):
        """One SGD step on Eq. (7) with the gradient at hand."""
        self._descend(self.sgd1, [(self.gamma1, self.cfg.alpha1)], lr)

    def step_w2_w3(self, lr):
        """One SGD step on Eqs. (8) and (9)."""
        self._descend(self.sgd23, [(self.gamma2, self.cfg.alpha2),
                                   (self.gamma3, self.cfg.alpha2)], lr)

    def _descend(self, optimizer, penalties, lr):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        clip_gradients(parameters, 0)               # refuses NaN before it reaches the weights
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if self.cfg.l1 == "proximal":
            # OURS: with momentum m a constant gradient g moves a weight by lr g / (1 - m) a step.
            # The threshold needs the same factor, else the l1 norm would count (1 - m) alpha only.
            for gamma, alpha in penalties:
                for g in gamma:
                    soft_threshold_(g, lr * alpha / (1 - self.cfg.momentum))

    @torch.no_grad()
    def update_multipliers(self):
        """Eq. (10): E = E + mu (W1 - W3), then mu = rho mu, up to largest_mu (OURS)."""
        for e, a, b in zip(self.e, self.w1, self.w3):
            e.add_(a - b, alpha=self.mu)
        self.mu = min(self.cfg.rho * self.mu, self.largest_mu)

    @torch.no_grad()
    def gap(self):
        """(||W1 - W3|| / ||W1||, ||gamma1 - gamma3|| / ||gamma1||)."""
        def relative(xs, ys):
            far = sum(float((x - y).pow(2).sum()) for x, y in zip(xs, ys))
            return math.sqrt(far / max(sum(float(x.pow(2).sum()) for x in xs), 1e-30))
        return relative(self.w1, self.w3), relative(self.gamma1, self.gamma3)

    def state(self):
        return {"e": self.e, "mu": self.mu, "sgd23": self.sgd23.state_dict(),
                "sgd1": self.sgd1.state_dict() if self.sgd1 else {}}

    def load(self, state):
        for mine, stored in zip(self.e, state["e"]):
            mine.copy_(stored)
        self.mu = state["mu"]
        self.sgd23.load_state_dict(state["sgd23"])
        if self.sgd1:
            self.sgd1.load_state_dict(state["sgd1"])


# ---------------------------------------------------------------------------------------------
# 4. Data: two sets side by side
# ---------------------------------------------------------------------------------------------


def open_cls(cfg, split):
    return data.open_classification(cfg.cls_dataset, cfg.cls_root or None, split, cfg.cls_size,
                                    cfg.seed)


def open_cls_loader(cfg, split, train=False):
    """(set, loader) of the classification set; the same pictures in batches to evaluate."""
    images = open_cls(cfg, split)
    return images, data.make_loader(
        images, None, data.classification_transform(cfg.cls_size, train),
        max(1, cfg.cls_batch // world_size()), train, cfg.workers, cfg.seed, rank(), world_size())


def stream(images, transform, batch, start, stop, cfg, shared=False):
    """Batches start .. stop - 1 of endless shuffled passes over a set, entered at any place.

    What lies before `start` is not loaded, so that a resumed run continues at once. Under torchrun
    each rank gets its share of a batch, or all of it if `shared`.
    """
    per_pass, keys = max(1, len(images) // batch), []
    for t in range(start, stop):
        turn, place = divmod(t, per_pass)
        if place == 0 or t == start:
            order = np.random.default_rng((cfg.seed, turn)).permutation(len(images))
            order = np.resize(order, max(len(order), batch))
        part = order[place * batch:(place + 1) * batch]
        keys.append([(turn, int(i)) for i in (part if shared else part[rank()::world_size()])])
    return torch.utils.data.DataLoader(
        data.Samples(images, transform, cfg.seed), batch_sampler=keys, num_workers=cfg.workers,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())


class TwoSets:
    """Training pictures of both tasks: sets["cls"] is X1, Y1 of the paper, sets["seg"] X2, Y2.

    InputError for what would be found only later: damaged pairs, no val split, too few pictures.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.sets = {"seg": open_split(cfg, "train", cfg.size), "cls": open_cls(cfg, "train")}
        self.moves = {"cls": data.classification_transform(cfg.cls_size, train=True),
                      "seg": data.train_transform(cfg.size, cfg.scales, cfg.image_scale)}
        self.batch = {"cls": cfg.cls_batch, "seg": cfg.batch_size}
        data.check_segmentation(self.sets["seg"])
        data.check_segmentation(open_split(cfg, "val", cfg.size))
        open_cls(cfg, "val")
        if min(map(len, self.sets.values())) < 2 * world_size():
            raise InputError(f"{len(self.sets['seg'])} and {len(self.sets['cls'])} training "
                             "pictures: both tasks need 2 or more for each process, as BN after a "
                             "global pooling sees one value a picture")
        self.classes, self.cls_classes = (self.sets[t].num_classes for t in ("seg", "cls"))

    def batches(self, task, start, stop, shared=False):
        return stream(self.sets[task], self.moves[task], self.batch[task], start, stop, self.cfg,
                      shared)


# ---------------------------------------------------------------------------------------------
# 5. The dense networks: Eqs. (1) and (2)
# ---------------------------------------------------------------------------------------------


def settings(cfg, names):
    """What a stored network was trained with; another value means another network."""
    return {name: json.dumps(getattr(cfg, name)) for name in names}


@torch.no_grad()
def accuracy(net, loader, device, amp=False):
    """(top-1, top-5) shares of a classification split; top-5 is 1 for five classes or fewer."""
    training, hits = net.training, torch.zeros(3, dtype=torch.float64, device=device)
    net.eval()
    for images, labels in loader:
        with autocast(device, amp):
            scores = net(images.to(device)).float()
        best = scores.topk(min(5, scores.shape[1])).indices == labels.to(device)[:, None]
        hits += torch.stack([best[:, 0].sum(), best.any(1).sum(), torch.tensor(len(images))
                             .to(device)]).double()
    net.train(training)
    if world_size() > 1:
        dist.all_reduce(hits)
    return float(hits[0] / hits[2]), float(hits[1] / hits[2])


def train_classifier(stage, net, epochs, lr, power, cfg, device, folder, extra):
    """Classification training, poly schedule; `net` ends with its best epoch."""
    if not finished(stage, net, epochs, folder, extra, cfg.resume):
        _, loader = open_cls_loader(cfg, "train", train=True)
        _, val = open_cls_loader(cfg, "val")
        schedule = decay(net, lr, power, epochs * len(loader), cfg)
        common.fit(stage, net, cls_terms, *schedule, loader, None, None,
                   replace(cfg, epochs=epochs), device, folder, extra=extra, per_step=True,
                   validate=lambda model: ("accuracy", accuracy(model, val, device, cfg.amp)[0]))
        load_best(net, folder)


def train_segmenter(stage, net, classes, epochs, lr, cfg, device, folder, extra):
    """Segmentation training, poly schedule (PAPER 7.1); `net` ends with its best epoch."""
    if not finished(stage, net, epochs, folder, extra, cfg.resume):
        _, loader = open_loader(cfg, "train", train=True)
        _, val = open_loader(cfg, "val")
        schedule = decay(net, lr, 0.9, epochs * len(loader), cfg)
        common.fit(stage, net, functools.partial(seg_terms, aux_weight=cfg.aux_weight), *schedule,
                   loader, val, classes, replace(cfg, epochs=epochs), device, folder, extra=extra,
                   per_step=True)
        load_best(net, folder)


def decay(net, lr, power, steps, cfg):
    """(SGD, schedule): lr (1 - step / steps)^power; power 1 is linear. PAPER 7.1 prints the poly
    schedule with the power inside, 1 - (iter / iter_max)^0.9: a slip, poly means this."""
    optimizer = sgd(net.parameters(), gammas(net, groups_of(net)), lr, cfg)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / steps) ** power)


def earlier(path, need, resume):
    """The checkpoint an earlier run left at `path`, {} if none; a broken one matters to --resume
    alone, else it is written anew."""
    try:
        return load_checkpoint(path, need) if Path(path).exists() else {}
    except InputError as error:
        if resume:
            raise
        if rank() == 0:
            print(f"{error}; starting anew")
        return {}


def finished(stage, net, epochs, folder, extra, resume):
    """Whether `folder` holds the end of this very training; its best epoch is then loaded."""
    stored = earlier(Path(folder) / "last.pt", ("epoch",), resume)
    done = stored.get("epoch", -1) >= epochs and extra.items() <= stored.items()
    if done:
        load_best(net, folder)
        if rank() == 0:
            print(f"{stage}: trained already with these settings, taken from {folder}")
    return done


def load_best(net, folder):
    best = Path(folder) / "best.pt"
    load_weights(net, load_checkpoint(best)["model"], best)


@torch.no_grad()
def copy_weights(source, target):
    """Parameters only: BN statistics belong to a task."""
    for a, b in zip(source.parameters(), target.parameters()):
        b.copy_(a)


def start_from(cfg, net, cls_classes):
    """Weights of --backbone for N1, and its head where the classes are as many.

    InputError if the head is left random and Eq. (1) is not solved: its gradients would spoil W1.
    """
    name, head = cfg.network.split("_")[1], None
    if cfg.backbone == "imagenet" and cfg.network.startswith("pspnet"):
        raise InputError("torchvision has no ImageNet weights for PSPNet's deep stem; give "
                         "--backbone a file, or none with --dense-cls-epochs")
    if cfg.backbone == "imagenet":
        whole = common.classifier(name, "imagenet")
        head, whole.fc = whole.fc.state_dict(), nn.Identity()
        net.backbone.load_state_dict(whole.state_dict())
    elif cfg.backbone != "none":
        state = common.load_backbone(net.backbone, cfg.backbone)
        head = {key: state.get(f"fc.{key}") for key in ("weight", "bias")}
    if head and all(w is not None and len(w) == cls_classes for w in head.values()):
        net.head.load_state_dict(head)
    elif not cfg.dense_cls_epochs:
        raise InputError(f"--backbone {cfg.backbone} has no classifier of {cls_classes} classes, "
                         "so that of the first task would start at random; give "
                         "--dense-cls-epochs 1 or more")


def dense_networks(cfg, sets, device):
    """N1 and N2 trained the usual way, stored under <out>/dense for every --method to start from.

    Returns (Classifier, Segmenter): the classifier keeps its head and BN statistics of Eq. (1),
    its backbone's weights are those of the segmentation network, W1 = W3 (OURS: the start of
    Algorithm 1, "initial weights", is the trained network that is to be pruned).
    """
    out = Path(cfg.out) / "dense"
    torch.manual_seed(cfg.seed)
    cls = place(Classifier(cfg.network, sets.cls_classes), cfg, device)
    seg = place(Segmenter(cfg.network, sets.classes, auxiliary=True), cfg, device)
    start_from(cfg, cls, sets.cls_classes)
    if cfg.dense_cls_epochs:
        # Eq. (1): W1~ = argmin l_cls(N1(W1, X1), Y1)
        train_classifier("dense cls", cls, cfg.dense_cls_epochs, cfg.dense_cls_lr, 1.0, cfg,
                         device, out / "cls", settings(cfg, DENSE_CLS))
    # Eq. (2): W1*, W2* = argmin l_seg(N2(W1, W2, X2), Y2), W1 from W1~
    seg.backbone.load_state_dict(cls.backbone.state_dict())
    train_segmenter("dense seg", seg, sets.classes, cfg.dense_epochs, cfg.dense_lr, cfg, device,
                    out / "seg", settings(cfg, DENSE_SEG))
    copy_weights(seg.backbone, cls.backbone)
    return cls, seg

# ---------------------------------------------------------------------------------------------
# 6. Search: Algorithm 1, lines 1 to 7
# ---------------------------------------------------------------------------------------------


def sparse_folder(cfg):
    return Path(cfg.out) / f"sparse_{cfg.method}"


class SparseTraining:
    """State of lines 2 to 7: both networks, E, mu, and the place reached within a round."""

    def __init__(self, cls, seg, sets, cfg, device):
        self.nets, self.sets, self.cfg, self.device = {"cls": cls, "seg": seg}, sets, cfg, device
        self.groups, self.folder = groups_of(seg), sparse_folder(cfg)
        both = cfg.method == "mtp"
        self.tasks, self.judge = ("cls", "seg") if both else ("seg",), cls if both else seg
        inner, outer = part_of(self.groups, "backbone"), part_of(self.groups, "decoder")
        self.lagrangian = Lagrangian(
            list(cls.backbone.parameters()) if both else [], list(seg.decoder.parameters()),
            list(seg.backbone.parameters()), list(cls.head.parameters()) if both else [],
            gammas(cls, inner) if both else [], gammas(seg, outer), gammas(seg, inner), cfg)
        self.forward = {task: common.wrapped(net, cfg, device) for task, net in self.nets.items()}
        self.round, self.done, self.converged = 0, dict.fromkeys(self.tasks, 0), False
        self.kept, self.progress = self.choose(self.judge), None

    def choose(self, net):
        """The kept set at this moment if gamma1 is taken from the backbone of `net`."""
        return kept_channels(scores_of(net, self.nets["seg"], self.groups), self.groups, self.cfg)

    def batches(self, task):
        """What is left of the K mini-batches of this round."""
        steps, done = self.cfg.inner_steps, self.done[task]
        start = self.round * steps
        for batch in self.sets.batches(task, start + done, start + steps):
            yield common.to_device(*batch, self.cfg, self.device)
            self.done[task] += 1
            if self.done[task] % self.cfg.save_steps == 0:
                self.save()

    def learning_rate(self, task):
        """PAPER 7.1: linear; over the steps of all rounds."""
        total = self.cfg.rounds * self.cfg.inner_steps
        first = self.cfg.search_cls_lr if task == "cls" else self.cfg.search_lr
        return first * (1 - (self.round * self.cfg.inner_steps + self.done[task]) / total)

    def step(self, task, images, labels):
        """One mini-batch: gradient of Eq. (7), or of Eqs. (8) and (9), and an SGD step."""
        number = sum(self.done.values())
        with common.training_step(self.cfg.method, self.round, number):
            with autocast(self.device, self.cfg.amp):
                terms = (cls_terms(self.forward[task], images, labels) if task == "cls" else
                         seg_terms(self.forward[task], images, labels, self.cfg.aux_weight))
            check_finite(terms)
            if task == "cls":
                self.lagrangian.gradient_w1(sum(terms.values()))
                self.lagrangian.step_w1(self.learning_rate(task))
            else:
                self.lagrangian.gradient_w2_w3(sum(terms.values()))
                self.lagrangian.step_w2_w3(self.learning_rate(task))
        terms = {name: value.detach() for name, value in terms.items()}
        self.progress.step(self.round, number, terms, len(images) * world_size())
        return terms

    def end_round(self, terms):
        """Log what the round has come to, judge convergence, store it."""
        for net in self.nets.values():
            common.average_buffers(net)
        before, self.kept = self.kept, self.choose(self.judge)
        far, far_gamma = self.lagrangian.gap()
        every = torch.cat([g.detach().abs() for g in gammas(self.nets["seg"], self.groups)])
        record = {"gap": far, "gamma_gap": far_gamma, "mu": self.lagrangian.mu,
                  "agreement": overlap(self.kept, self.choose(self.nets["seg"]),
                                       part_of(self.groups, "backbone")),
                  "unchanged": overlap(before, self.kept, self.groups),
                  "zeros": float((every == 0).double().mean()), "mean_gamma": float(every.mean())}
        # Line 7. OURS: the paper does not say when; copies and kept set must have settled.
        self.converged = (len(self.tasks) == 2 and far < self.cfg.tolerance
                          and record["unchanged"] == 1.0)
        common.log_record(self.folder, stage="sparse", epoch=self.round, **record,
                          **{k: float(v) for k, v in terms.items()})
        both = (f" |W1-W3| {far:.4f} |g1-g3| {far_gamma:.4f} agree {record['agreement']:.3f}"
                * (len(self.tasks) == 2))
        self.progress.close(self.round, terms, f" |{both} unchanged {record['unchanged']:.3f} mean "
                            f"gamma {record['mean_gamma']:.3f} zeros {record['zeros']:.3f}")
        self.round, self.done = self.round + 1, dict.fromkeys(self.tasks, 0)
        self.save()

    def save(self):
        save_checkpoint(self.folder / "last.pt", model=self.nets["seg"].state_dict(),
                        cls=self.nets["cls"].state_dict(), lagrangian=self.lagrangian.state(),
                        round=self.round, done=self.done, kept=self.kept,
                        converged=self.converged, **settings(self.cfg, self.fields()))

    def fields(self):
        """Settings the sparse weights depend on; line 7 also looks at the kept set."""
        return SPARSE + (("percentile", "rank", "least_width", "round_to")
                         if self.cfg.tolerance > 0 and len(self.tasks) > 1 else ())

    def load(self):
        """Continue from last.pt, if it is of this run. True if there was nothing left to do."""
        path = self.folder / "last.pt"
        state = earlier(path, ("model", "cls", "lagrangian", "round", "done", "converged"),
                        self.cfg.resume)
        if not state:
            return False
        other = [name for name, value in settings(self.cfg, self.fields()).items()
                 if state.get(name) != value]
        finished = state["converged"] or state["round"] >= self.cfg.rounds
        if other and self.cfg.resume:
            raise InputError(f"{path} was trained with another --{other[0].replace('_', '-')}; "
                             "search without --resume or with another --out")
        if other or not (finished or self.cfg.resume):
            return False
        load_weights(self.nets["seg"], state["model"], path)
        load_weights(self.nets["cls"], state["cls"], path)
        self.lagrangian.load(state["lagrangian"])
        self.round, self.done, self.kept = state["round"], state["done"], state["kept"]
        self.converged = state["converged"]
        common.set_rng_state(state["rng"])
        return finished


def train_sparse(cls, seg, sets, cfg, device):
    """Algorithm 1, lines 1 to 7, in place. With --method slimming lines 4 and 5 without W1: the
    single-task method of Table 2, with the same number of segmentation steps."""
    s = SparseTraining(cls.train(), seg.train(), sets, cfg, device)
    if s.load():
        if rank() == 0:
            print(f"{cfg.method}: sparse training finished already, taken from {s.folder}")
        return
    if s.round == 0 and not any(s.done.values()):
        common.forget_log(s.folder, "sparse")
    s.progress = Progress(cfg.method, cfg.rounds, cfg.inner_steps * len(s.tasks), device, s.round)
    terms = {}
    while s.round < cfg.rounds and not s.converged:             # 2: repeat
        if "cls" in s.tasks:
            for images, labels in s.batches("cls"):             # 3: optimize W1 by Eq. (7)
                terms |= s.step("cls", images, labels)
        for images, labels in s.batches("seg"):                 # 4: optimize W2 by Eq. (8)
            terms |= s.step("seg", images, labels)              # 5: optimize W3 by Eq. (9)
        s.lagrangian.update_multipliers()                       # 6: update E and mu by Eq. (10)
        s.end_round(terms)                                      # 7: until convergence
    common.barrier()


def overlap(a, b, groups):
    """Share of the channels kept by `a` that `b` keeps too."""
    both = sum(len(np.intersect1d(a[g.name], b[g.name])) for g in groups)
    return both / max(1, sum(len(a[g.name]) for g in groups))


# ---------------------------------------------------------------------------------------------
# 7. Which channels stay: MTP, Network Slimming and three other baselines
# ---------------------------------------------------------------------------------------------


def scores_of(first, seg, groups):
    """Line 9: {group name: |gamma| of each channel}; the backbone's from `first`, gamma1 of W1
    for MTP (OURS: not gamma3, as in the algorithm box; both are logged).

    OURS: for channels that are added or multiplied, the mean over their makers: the sum would put
    BiSeNet's three-fold channels above all others.
    """
    found = {}
    for g in groups:
        net = first if g.part == "backbone" else seg
        found[g.name] = torch.stack([net.get_submodule(bn).weight.detach().abs().cpu()
                                     for _, bn in g.makers if bn]).mean(0)
    return found


def keep_ranked(scores, percentile, share=0.05):
    """Line 10: the kept channels after removing exactly floor(p N) of the N with one threshold.

    scores: {name: (C,)}; share: of each layer that stays in any case, at least one channel; its
    place is taken by the next in rank, so that the total holds. Of equal scores those that come
    first go first (a threshold would remove all of them or none). Returns {name: indices}.
    """
    flat = torch.cat(list(scores.values()))
    removable, start = torch.ones(len(flat), dtype=torch.bool), 0
    for score in scores.values():
        least = max(1, math.ceil(share * len(score)))
        removable[start + score.argsort(stable=True)[-least:]] = False
        start += len(score)
    order = flat.argsort(stable=True)
    order = order[removable[order]]
    count = math.floor(percentile * len(flat) / 100 + 1e-9)
    if count > len(order):
        raise InputError(f"--percentile {percentile:g} would remove {count} of {len(flat)} "
                         f"channels, but --least-width {share:g} lets only {len(order)} go")
    stays = torch.ones(len(flat), dtype=torch.bool)
    stays[order[:count]] = False
    return {name: part.nonzero()[:, 0] for name, part in
            zip(scores, stays.split([len(score) for score in scores.values()]))}


def keep_best(score, n):
    """Indices of the n largest scores of a layer, in the layer's order."""
    return score.argsort(stable=True)[len(score) - n:].sort().values


def rank_of(cfg):
    """--rank, with auto resolved."""
    default = "independent" if cfg.method in ("mtp", "slimming") else "layer"
    return default if cfg.rank == "auto" else cfg.rank


def layer_width(width, percentile, round_to=1):
    """Channels that stay of one layer by itself: round((1 - p) C), in multiples of round_to."""
    return rounded(max(1, math.floor((1 - percentile / 100) * width + 0.5)), width, round_to)


def rounded(n, width, round_to):
    """The multiple of round_to nearest to n, from round_to to what `width` channels can give."""
    if width < round_to:
        raise InputError(f"--round-to {round_to}: the narrowest layer has {width} channels")
    return min(max(1, math.floor(n / round_to + 0.5)), width // round_to) * round_to


def kept_channels(scores, groups, cfg):
    """--rank: PAPER 3 has one threshold for the backbone and one for the decoder, Table 4 tries
    one for both; `layer` keeps round((1 - p) C) in each layer (the paper's Uniform)."""
    groups = [g for g in groups if g.name in scores]
    if rank_of(cfg) == "layer":
        return {g.name: keep_best(scores[g.name], layer_width(g.width, cfg.percentile,
                                                              cfg.round_to)) for g in groups}
    pools = ((("backbone", "decoder"),) if rank_of(cfg) == "unified" else
             (("backbone",), ("decoder",)))
    kept = {}
    for parts in pools:
        pool = {g.name: scores[g.name] for g in groups if g.part in parts}
        kept |= keep_ranked(pool, cfg.percentile, cfg.least_width) if pool else {}
    if cfg.round_to > 1:
        kept = {g.name: keep_best(scores[g.name], rounded(len(kept[g.name]), g.width,
                                                          cfg.round_to)) for g in groups}
    return kept


def fpgm_scores(seg, groups):
    """FPGM (He et al., CVPR 2019): sum of the Euclidean distances of a filter to the others of its
    layer; the smallest lies nearest to the geometric median and is replaceable.

    By layer unless --rank says otherwise; ranked across layers, wide layers with large filters
    score higher (Table 3's sizes of FPGM are not those of uniform widths, so it may have been).
    """
    found = {}
    for g in groups:
        filters = torch.cat([seg.get_submodule(conv).weight.detach().flatten(1)
                             for conv, _ in g.makers], 1).double().cpu()
        found[g.name] = torch.cdist(filters, filters,
                                    compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    return found


def thinet_samples(conv, x, generator, positions=10):
    """Terms of the convolution's output at random places, one a channel of its input.

    conv: the layer that reads the channels to be judged; x (B, C, H, W) its input. A sample is one
    output value without bias at a random place and output channel, split into its C summands,
    sum over the kernel of W[o, c] x[c]. Returns (positions * B, C) in float64.
    """
    k, stride, pad, dilation = (p[0] for p in (conv.kernel_size, conv.stride, conv.padding,
                                               conv.dilation))
    x = F.pad(x, (pad,) * 4)
    h, w = ((side - dilation * (k - 1) - 1) // stride + 1 for side in x.shape[-2:])
    n = positions * len(x)

    def draw(high):
        return torch.randint(high, (n,), generator=generator).to(x.device)
    taps = dilation * torch.arange(k, device=x.device)
    image = torch.arange(len(x), device=x.device).repeat(positions)
    rows, columns = (stride * draw(side)[:, None] + taps for side in (h, w))        # (n, k)
    patches = x[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]     # (n, k, k, C)
    filters = conv.weight[draw(conv.out_channels)].permute(0, 2, 3, 1)              # (n, k, k, C)
    return (patches.double() * filters.double()).sum((1, 2))


def thinet_layer(terms, n):
    """ThiNet (Luo et al., ICCV 2017) for one layer. terms: (samples, C) of thinet_samples.

    Greedy: the removed set grows by the channel that keeps sum_i (sum_{j removed} terms_ij)^2
    smallest, until n channels stay. Then least squares: factors of those that stay which bring
    their sum closest to the full output. Returns (kept indices, factors (n,)).
    """
    removed, total = [], torch.zeros(len(terms), dtype=terms.dtype)
    squares = terms.pow(2).sum(0)
    for _ in range(terms.shape[1] - n):
        # ||total + t_c||^2 - ||total||^2 for every candidate c
        cost = squares + 2 * total @ terms
        cost[removed] = math.inf
        removed.append(int(cost.argmin()))
        total = total + terms[:, removed[-1]]
    stays = torch.ones(terms.shape[1], dtype=torch.bool)
    stays[removed] = False
    kept = stays.nonzero()[:, 0]
    factors = torch.linalg.lstsq(terms[:, kept], terms.sum(1)[:, None], driver="gelsy").solution
    return kept, factors[:, 0]


@torch.no_grad()
def thinet_kept(seg, groups, sets, cfg, device):
    """ThiNet front to back through the backbone (PAPER Table 2: the decoder stays dense).

    Each layer sees what those before it have left: weights of removed channels become 0 and those
    of the others are scaled in the layer that reads them, in place. OURS: no training between
    layers, as all methods are fine-tuned alike at the end; on segmentation pictures.
    """
    kept, generator = {}, torch.Generator().manual_seed(cfg.seed)
    count = max(1, cfg.thinet_images // cfg.batch_size)
    pictures = [images.to(device) for images, _ in sets.batches("seg", 0, count, shared=True)]
    seg.eval()
    for g in part_of(groups, "backbone"):
        reader, terms = seg.get_submodule(g.readers[0][0]), []
        hook = reader.register_forward_pre_hook(lambda conv, inputs: terms.append(
            thinet_samples(conv, inputs[0], generator).cpu()))
        for images in pictures:
            features(seg.backbone, images)
        hook.remove()
        n = layer_width(g.width, cfg.percentile, cfg.round_to)
        kept[g.name], factors = thinet_layer(torch.cat(terms), n)
        scale = torch.zeros(g.width, dtype=factors.dtype)
        scale[kept[g.name]] = factors
        reader.weight.mul_(scale.to(reader.weight)[None, :, None, None])
    return kept


@torch.no_grad()
def fold_constants(net, groups, kept):
    """Pass on what removed channels still carry, in place, before they are cut.

    With gamma = 0 a channel is the constant ReLU(beta). The layer that reads it gets a constant
    more on its output, which the next BN's running mean, or the bias, can take: exact for 1x1;
    for a padded 3x3 exact only inside the map, as the constant ends at the border. With
    gamma != 0 it is the value at the channel's mean. Left alone: channels that are added or
    gated (BiSeNet), whose value is not a constant of their own.
    """
    following, previous = {}, ("", None)                        # BN after a convolution
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(previous[1], nn.Conv2d):
            following[previous[0]] = module
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            previous = name, module
    for g in (g for g in groups if g.name in kept and len(g.makers) == 1):
        gone = torch.ones(g.width, dtype=torch.bool)
        gone[kept[g.name]] = False
        constant = net.get_submodule(g.makers[0][1]).bias[gone].relu()
        for name, start in g.readers:
            reader = net.get_submodule(name)
            shift = reader.weight[:, start:start + g.width][:, gone].sum((2, 3)) @ constant
            if name in following:
                following[name].running_mean -= shift
            elif reader.bias is not None:
                reader.bias += shift


@torch.no_grad()
def recalibrate(net, batches, device):
    """BN statistics anew, as plain means over the batches: those of the wide network are wrong."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    for images, _ in batches:
        net(images.to(device))
    for norm in norms:
        norm.momentum = 0.1
    net.eval()


def choose_and_prune(cls, seg, sets, cfg, device):
    """Lines 9 and 10 for every method -> (pruned Classifier, pruned Segmenter, kept).

    Both get the same backbone. Baselines know one set of weights, so their classifier takes the
    segmentation network's backbone.
    """
    groups = groups_of(seg)
    if cfg.method == "thinet":
        kept = thinet_kept(seg, groups, sets, cfg, device)
    elif cfg.method == "fpgm":
        kept = kept_channels(fpgm_scores(seg, groups), groups, cfg)
    else:
        # 9: gamma1 and gamma2 from W1 and W2
        first = cls if cfg.method == "mtp" else seg
        kept = kept_channels(scores_of(first, seg, groups), groups, cfg)
    if cfg.method != "mtp":
        copy_weights(seg.backbone, cls.backbone)
    found = []
    for task, net in (("cls", cls), ("seg", seg)):
        mine = groups_of(net)
        fold_constants(net, mine, kept)
        found.append(prune(net, mine, kept))                    # 10: prune by gamma1, gamma2
        if cfg.recalibrate:
            recalibrate(found[-1], sets.batches(task, 0, cfg.recalibrate, shared=True), device)
    return *found, kept

# ---------------------------------------------------------------------------------------------
# 8. The search stage: dense training, Algorithm 1, the cut
# ---------------------------------------------------------------------------------------------


def folder_of(cfg):
    """Run folder of one pruned network: another method, percentile or rank is another network."""
    if cfg.arch not in ("", "uniform"):
        return Path(cfg.arch).resolve().parent
    parts = ["dense"] if cfg.method == "dense" else [cfg.method, f"{cfg.percentile:g}"]
    if cfg.method != "dense":
        parts += [rank_of(cfg)] * (rank_of(cfg) != rank_of(replace(cfg, rank="auto")))
        parts += [f"by{cfg.round_to}"] * (cfg.round_to > 1)
    return Path(cfg.out) / "_".join(parts)


def search(cfg, device):
    """--search: dense networks, sparse training, pruning; writes arch.json and pruned.pt."""
    sets = TwoSets(cfg)
    shapes = groups_of(on_meta(Segmenter, cfg.network, sets.classes))
    kept_channels({g.name: torch.ones(g.width) for g in shapes}, shapes, cfg)   # refuses early
    cls, seg = dense_networks(cfg, sets, device)
    if cfg.method == "dense":
        return
    groups, folder, rows = groups_of(seg), folder_of(cfg), {}
    before = scores_of(seg, seg, groups)
    if cfg.method in ("mtp", "slimming"):
        train_sparse(cls, seg, sets, cfg, device)
    _, val = open_loader(cfg, "val")
    rows["before_miou"] = evaluate(seg, val, sets.classes, device, cfg.amp).miou()
    after = {"gamma3 (task 2)": scores_of(seg, seg, groups)}
    if cfg.method == "mtp":
        after["gamma1 (task 1)"] = scores_of(cls, seg, groups)
    start = time.perf_counter()
    small_cls, small_seg, kept = choose_and_prune(cls, seg, sets, cfg, device)
    rows["seconds"] = time.perf_counter() - start
    rows["pruned_miou"] = evaluate(small_seg, val, sets.classes, device, cfg.amp).miou()
    if rank() == 0:
        # Through the file and back, so that what is shown is what others will load.
        arch = {"network": cfg.network, "classes": sets.classes, "cls_classes": sets.cls_classes,
                "method": cfg.method, "percentile": cfg.percentile, "rank": rank_of(cfg),
                "least_width": cfg.least_width, "round_to": cfg.round_to,
                "widths": {g.name: len(kept[g.name]) if g.name in kept else g.width
                           for g in groups}}
        common.write_text(folder / "arch.json", json.dumps(arch, indent=1))
        save_checkpoint(folder / "pruned.pt", model=small_seg.state_dict(),
                        cls=small_cls.state_dict())
        draw_channels(folder / "channels.png", groups, arch["widths"],
                      f"{cfg.network}, {folder.name}: channels that stay (Figure 5)")
        draw_gammas(folder / "gammas.png", groups, before, after)
        if cfg.method == "mtp":
            draw_sparse(cfg)
        report_search(cfg, folder, groups, kept, rows, device)
    common.barrier()


def report_search(cfg, folder, groups, kept, rows, device):
    """What was removed, what it costs and what it brought: dense beside pruned."""
    for part in ("backbone", "decoder"):
        mine = part_of(groups, part)
        stay = sum(len(kept[g.name]) if g.name in kept else g.width for g in mine)
        print(f"{part}: {stay} of {sum(g.width for g in mine)} prunable channels stay")
    arch = read_arch(folder / "arch.json")
    state = load_checkpoint(folder / "pruned.pt")["model"]
    start = time.perf_counter()
    small = rebuild(Segmenter, arch, state, folder / "pruned.pt").eval()
    print(f"chosen, cut and recalibrated in {rows['seconds']:.2f} s; rebuilt from arch.json and "
          f"pruned.pt in {time.perf_counter() - start:.2f} s")
    wide = "sparse" if cfg.method in ("mtp", "slimming") else "dense"
    print(f"{cfg.method}: {wide} mIoU {100 * rows['before_miou']:.2f}, pruned mIoU "
          f"{100 * rows['pruned_miou']:.2f} (before fine-tuning)")
    nets = {"dense": Segmenter(cfg.network, arch["classes"]).eval(), folder.name: small}
    _, table = latency.compare(nets, cfg.frame, device, cfg)
    ratios = (table[folder.name][k] / table["dense"][k] for k in ("params", "conv_macs",
                                                                  "median_ms"))
    print("pruned / dense: parameters {:.2f}, MACs {:.2f}, latency {:.2f}".format(*ratios))
    common.log_record(folder, stage="search", **rows)
    print(f"in {folder}: arch.json, pruned.pt, channels.png, gammas.png\nnext: python mtp.py "
          f"--train --eval{common.flags_of(cfg, QUICK)}")


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw_channels(path, groups, widths, title):
    """Figure 5: a bar a layer, its full width pale and what stays dark; the decoder framed."""
    step, scale, top, bottom = max(8, min(36, 1000 // len(groups))), 2, 70, 300
    image = Image.new("RGB", (scale * max(600, 80 + step * len(groups)), scale * 340), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13 * scale)
    most = max(g.width for g in groups)

    def box(i, height, inset=1):
        return [scale * v for v in (60 + step * i + inset, bottom - (bottom - top) * height / most,
                                    60 + step * (i + 1) - inset, bottom)]
    for value in (0, most // 2, most):
        y = box(0, value)[1]
        draw.line((scale * 60, y, image.width - scale * 10, y), "#e0e0e0", scale)
        draw.text((scale * 52, y), str(value), "#303030", font, "rm")
    for i, g in enumerate(groups):
        dark, pale = ("#1f5fa8", "#c6dbef") if g.part == "backbone" else ("#c0392b", "#f5c6c0")
        draw.rectangle(box(i, g.width), pale)
        draw.rectangle(box(i, widths[g.name]), dark)
        if i % max(1, round(60 / step)) == 0:
            draw.text((scale * (60 + step * (i + 0.5)), scale * 306), str(i + 1), "#303030", font,
                      "mt")
    outer = [i for i, g in enumerate(groups) if g.part == "decoder"]
    frame = box(outer[0], most)[:2] + box(outer[-1], most)[2:]
    draw.rectangle((frame[0] - 4, frame[1] - 8, frame[2] + 4, frame[3] + 4), None, "#c0392b", 3)
    draw.text((scale * 12, scale * 20), title, "#202020", ImageFont.load_default(size=32), "lm")
    draw.text((scale * 60, scale * 40), "pale: dense, dark: stays, red: decoder; by layer",
              "#606060", font, "lm")
    common.save_png(image.resize((image.width // scale, image.height // scale),
                                  Image.Resampling.LANCZOS), path)


def draw_gammas(path, groups, before, after):
    """Histograms of |gamma| before and after the sparse training, for both tasks.

    before: {group name: scores} of the dense network, after: {task: the same}.
    """
    def flat(scores, part):
        return torch.cat([scores[g.name] for g in part_of(groups, part)]).numpy()
    series = {"backbone, dense": flat(before, "backbone"),
              "decoder, dense": flat(before, "decoder"),
              **{task: flat(scores, "backbone") for task, scores in after.items()},
              "gamma2 (decoder)": flat(after["gamma3 (task 2)"], "decoder")}
    top = max(float(v.max()) for v in series.values())
    edges = np.linspace(0, top or 1, 41)
    common.line_chart(path, "BN scales before and after the sparse training", "|gamma|",
                      "share of the channels", {
                          name: list(zip((edges[1:] + edges[:-1]) / 2,
                                         np.histogram(v, edges)[0] / len(v)))
                          for name, v in series.items()})


def draw_sparse(cfg):
    """From the log of Algorithm 1: does W1 = W3 come about, and do the kept sets agree?"""
    records = common.read_log(sparse_folder(cfg), "sparse")
    for name, title, lines in (
            ("constraint", "W1 and W3 come together", {
                "|W1 - W3| / |W1|": "gap", "|gamma1 - gamma3| / |gamma1|": "gamma_gap"}),
            ("kept", "Channels that would stay, round by round", {
                "by gamma1 and gamma3": "agreement", "as a round ago": "unchanged"})):
        common.line_chart(sparse_folder(cfg) / f"{name}.png", title, "round", "share", {
            text: [(r["epoch"] + 1, r[key]) for r in records] for text, key in lines.items()})


def results(cfg):
    """The rows of everything evaluated on --split in this --out, unless pruned anew since."""
    paths = sorted(Path(cfg.out).glob(f"*/result_{cfg.split}*.json"))
    rows = [(path.parent / "pruned.pt", common.read_json(path, "result")) for path in paths]
    return [row for pruned, row in rows if row.get("from") == fingerprint(pruned)]


def draw_results(cfg):
    """Figure 3: mIoU against parameters, of every network evaluated in this --out."""
    groups = {}
    for row in results(cfg):
        groups.setdefault(row["method"], []).append((row["params"] / 1e6, 100 * row["miou"],
                                                     row["name"]))
    common.scatter_chart(Path(cfg.out) / "miou_params.png", "mIoU against parameters (Figure 3)",
                         "parameters (M)", "mIoU (%)", groups, size=(720, 480))


# ---------------------------------------------------------------------------------------------
# 9. Fine-tune (line 11), evaluate, bench
# ---------------------------------------------------------------------------------------------


def arch_path(cfg):
    return Path(cfg.arch or folder_of(cfg) / "arch.json")


def fine_tuned(cfg):
    """Folder of the fine-tuned segmentation network; without classification it is another one."""
    with_cls = cfg.cls_epochs or cfg.method == "dense"
    return folder_of(cfg) / ("seg" if with_cls else "seg_without_cls")


def fits(arch, images, key, path):
    if arch[key] != images.num_classes:
        raise InputError(f"{path} was found for {arch[key]} classes ('{key}'), the data set has "
                         f"{images.num_classes}")


def fingerprint(path):
    """Tells one pruned.pt from another by its weights, equal widths or not; "" if there is none."""
    if not path.exists():
        return ""
    digest, stored = hashlib.sha256(), load_checkpoint(path, ("model", "cls"))
    for state in (stored["cls"], stored["model"]):
        for tensor in state.values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def fine_tune(cfg, device):
    """--train, line 11: the pruned network on classification, then on segmentation."""
    arch, folder = read_arch(arch_path(cfg)), folder_of(cfg)
    fits(arch, open_split(cfg, "train", cfg.size), "classes", arch_path(cfg))
    fits(arch, open_cls(cfg, "train"), "cls_classes", arch_path(cfg))
    pruned = folder / "pruned.pt"
    stored = load_checkpoint(pruned, ("model", "cls"))
    cls = place(rebuild(Classifier, arch, stored["cls"], pruned), cfg, device)
    seg = place(rebuild(Segmenter, arch, stored["model"], pruned, auxiliary=True), cfg, device)
    about = {"from": fingerprint(pruned), **settings(cfg, FINE_CLS)}
    if cfg.cls_epochs:
        train_classifier("fine-tune cls", cls, cfg.cls_epochs, cfg.cls_lr, 0.9, cfg, device,
                         folder / "cls", about)
        seg.backbone.load_state_dict(cls.backbone.state_dict())
    train_segmenter("fine-tune seg", seg, arch["classes"], cfg.epochs, cfg.lr, cfg, device,
                    fine_tuned(cfg), about | settings(cfg, FINE_SEG))
    if rank() == 0:
        print(f"in {folder}: cls/, {fine_tuned(cfg).name}/ with best.pt and log.jsonl\nnext: "
              f"python mtp.py --eval --bench{common.flags_of(cfg, QUICK)}")


def restore(kind, cfg, images, path, device):
    """A trained network in eval mode, with the widths of arch.json or dense, for these pictures."""
    stored, key = load_checkpoint(path), "classes" if kind is Segmenter else "cls_classes"
    pruned = folder_of(cfg) / "pruned.pt"
    if not cfg.weights and pruned.exists() and stored.get("from") != fingerprint(pruned):
        raise InputError(f"{path} was fine-tuned from another network than {pruned}; run --train")
    if cfg.method == "dense":
        widths = {g.name: g.width for g in groups_of(on_meta(kind, cfg.network, 2))}
        arch = {"network": cfg.network, "widths": widths, key: images.num_classes}
    else:
        arch = read_arch(arch_path(cfg))
        fits(arch, images, key, arch_path(cfg))
    return place(rebuild(kind, arch, stored["model"], path).eval(), cfg, device)


def evaluate_network(cfg, device):
    """--eval: mIoU at the label's own resolution, accuracy of the classifier (Table 7)."""
    images, loader = open_loader(cfg, cfg.split)
    folder, trained = folder_of(cfg), fine_tuned(cfg)
    net = restore(Segmenter, cfg, images, cfg.weights or trained / "best.pt", device)
    forward = torch.compile(net) if cfg.compile else net
    matrix = evaluate(forward, loader, images.num_classes, device, cfg.amp, cfg.eval_scales,
                      cfg.eval_flip)
    how = trained.name.removeprefix("seg")
    if cfg.eval_scales != (1.0,) or cfg.eval_flip:
        how += f"_{len(cfg.eval_scales)}scales" + "_flip" * cfg.eval_flip
    name = folder.name + how
    method = cfg.method if cfg.method == "dense" else read_arch(arch_path(cfg)).get("method")
    row = {"name": name, "folder": folder.name, "method": method, "split": cfg.split,
           "params": count_params(net), "conv_macs": count_macs(net, cfg.frame),
           "frame": cfg.frame, "miou": matrix.miou(),
           "pixel_accuracy": matrix.pixel_accuracy(), "scales": cfg.eval_scales,
           "image_scale": cfg.image_scale, "from": fingerprint(folder / "pruned.pt")}
    head = folder / "cls" / "best.pt"
    if head.exists() and trained.name == "seg":
        pictures, cls_loader = open_cls_loader(cfg, "val")
        cls = restore(Classifier, cfg, pictures, head, device)
        row["top1"], row["top5"] = accuracy(cls, cls_loader, device, cfg.amp)
    if rank() > 0:
        return
    common.report_segmentation(name, matrix, images, cfg, folder,
                               "dense" if method == "dense" else "retrained")
    if "top1" in row:
        print(f"{name}: classification accuracy on val, top-1 {100 * row['top1']:.2f}, top-5 "
              f"{100 * row['top5']:.2f} (Table 7)")
    common.draw_segmentations(net, images, cfg, device, folder)
    if not cfg.weights:
        stored = folder / f"result_{cfg.split}{how}.json"
        common.write_text(stored, json.dumps(row, indent=1))
        draw_results(cfg)
        print(f"in {cfg.out}: miou_params.png; in {folder}: {stored.name}")


def uniform_widths(network, classes, percentile):
    groups = groups_of(on_meta(Segmenter, network, classes))
    return {g.name: layer_width(g.width, percentile) for g in groups}


def bench(cfg, device):
    """--bench: parameters, conv MACs, latency of the dense network and of every pruned one in this
    --out (or of --arch), measured in turn; mIoU and accuracy where --eval has been run."""
    if cfg.arch == "uniform":
        network, classes = cfg.network, 21
        found = {f"uniform, {cfg.percentile:g}% cut": uniform_widths(network, classes,
                                                                   cfg.percentile)}
    else:
        paths = [Path(cfg.arch)] if cfg.arch else sorted(Path(cfg.out).glob("*/arch.json"))
        arches = {path.resolve().parent.name: read_arch(path) for path in paths}
        if len({(a["network"], a["classes"]) for a in arches.values()}) > 1:
            raise InputError(f"{cfg.out} holds networks of several kinds; name one by --arch")
        first = next(iter(arches.values()), {"network": cfg.network, "classes": 21})
        network, classes = first["network"], first["classes"]
        found = {name: arch["widths"] for name, arch in arches.items()}
    nets = {"dense": Segmenter(network, classes).eval()}        # latency needs no trained weights
    nets |= {name: with_widths(nets["dense"], widths, name) for name, widths in found.items()}
    print(f"{network}, {classes} classes")
    about, rows = latency.compare(nets, cfg.frame, device, cfg)
    known = results(cfg)
    for name, row in rows.items():
        row["latency_ratio"] = row["median_ms"] / rows["dense"]["median_ms"]
        mine = [(row["name"].removeprefix(name), row) for row in known if row["folder"] == name]
        print(f"{name:28s} " + "  ".join(
            f"{key} {row[key] / rows['dense'][key]:.3f}" for key in ("params", "conv_macs",
                                                                     "median_ms"))
            + "".join(f"  {key}{how} {100 * row[key]:.2f}" for how, row in mine
                      for key in ("miou", "top1") if key in row))
    compare_with_paper()
    common.write_text(Path(cfg.out) / "bench.json", json.dumps({**about, "networks": rows},
                                                               indent=1))
    print(f"in {cfg.out}: bench.json")


# What the paper prints (Tables 2, 3): network, classes, picture, channels kept, decoder too, G, M.
PAPER_SIZES = (("deeplabv3_resnet101", 21, (513, 513), 1, True, 58.04, 71.52),
               ("deeplabv3_resnet101", 21, (513, 513), 0.75, True, 40.18, 49.70),
               ("deeplabv3_resnet101", 21, (513, 513), 0.5, False, 32.88, 39.55),
               ("bisenet_resnet18", 19, (1024, 2048), 1, True, 12.89, 104.27),
               ("pspnet_resnet50", 21, (513, 513), 1, True, 46.71, 190.43))


def sizes(network, classes, frame, share, decoder):
    """(parameters, conv MACs) of a network of uniform widths, on the meta device."""
    widths = uniform_widths(network, classes, 100 * (1 - share))
    if not decoder:
        widths |= {name: n for name, n in uniform_widths(network, classes, 0).items()
                   if name.startswith("decoder.")}
    net = with_widths(on_meta(Segmenter, network, classes), widths, "widths")
    return count_params(net), count_macs(net, frame)


def compare_with_paper():
    """Sizes that do not depend on training, ours beside the paper's. Its counter adds elements of
    BN, ReLU and pooling to the multiply-adds, ours counts convolutions."""
    print("sizes, ours | paper (Tables 2 and 3)")
    for network, classes, frame, share, decoder, m, g in PAPER_SIZES:
        params, macs = sizes(network, classes, frame, share, decoder)
        what = f"{share}x" + ", backbone only" * (not decoder)
        print(f"  {network:20s} {what:20s} {params:11,d} {macs / 1e9:10.6f} G | {m} M {g} G")


def export_network(cfg):
    """--export FILE: the folded network as a torch.export program for pictures of --frame."""
    net = restore(Segmenter, cfg, open_split(cfg, cfg.split, cfg.size),
                  cfg.weights or fine_tuned(cfg) / "best.pt", torch.device("cpu"))
    error = common.export(net, cfg.frame, cfg.export)
    print(f"{cfg.export}: torch.export program for 1x3x{cfg.frame[0]}x{cfg.frame[1]}, largest "
          f"difference to the network {error:.1e}\nrun it anywhere: "
          f"torch.export.load('{cfg.export}').module()(image)")


# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------

STAGES = {"search": "dense training, Algorithm 1 (or --method), cut; writes arch.json, pruned.pt",
          "train": "fine-tune the pruned network: classification, then segmentation",
          "eval": "mIoU, classification accuracy and pictures of a trained network",
          "bench": "parameters, MACs and measured latency, dense beside pruned"}


def check(cfg, stages):
    """Refuse early what cannot work."""
    if not 0 < cfg.percentile < 100:
        raise InputError(f"--percentile {cfg.percentile:g}: percent of the channels to remove, "
                         "above 0 and below 100")
    if cfg.method in ("uniform", "thinet") and rank_of(cfg) != "layer":
        raise InputError(f"--method {cfg.method} chooses within each layer; leave out --rank")
    if cfg.rho <= 1 or cfg.mu < 0 or cfg.lam <= 0 or min(cfg.alpha1, cfg.alpha2) < 0:
        raise InputError("--rho must be above 1, --lam positive, --mu, --alpha1, --alpha2 not "
                         "negative")
    for name in ("rounds", "inner_steps", "save_steps", "round_to", "cls_batch", "thinet_images"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more")
    for name in ("dense_cls_lr", "dense_lr", "search_cls_lr", "search_lr", "cls_lr", "lr"):
        if not getattr(cfg, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    for name in ("dense_cls_epochs", "cls_epochs", "recalibrate", "tolerance", "aux_weight"):
        if getattr(cfg, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative")
    if not 0 <= cfg.least_width < 1 or not 0 <= cfg.momentum < 1 or cfg.dense_epochs < 1:
        raise InputError("--least-width and --momentum are from 0 to below 1, --dense-epochs is 1 "
                         "or more")
    if min(*cfg.cls_size, *cfg.frame) < 32 or min(cfg.eval_scales, default=0) <= 0:
        raise InputError("--cls-size and --frame need 32 pixels a side or more, --eval-scales "
                         "positive numbers")
    if cfg.method == "dense" and "train" in stages:
        raise InputError("--method dense is trained by --search; there is nothing to fine-tune, "
                         "leave out --train")
    for flag, batch in (("batch-size", cfg.batch_size), ("cls-batch", cfg.cls_batch)):
        share, rest = divmod(batch, world_size())
        if stages & {"search", "train"} and (rest or share < 2):
            raise InputError(f"--{flag} {batch} must give each of {world_size()} processes the "
                             "same number of pictures, 2 or more, as BN after a global pooling "
                             "sees one value a picture")


def main(argv=None):
    stages, cfg = common.parse_args(Config, "mtp", STAGES, QUICK, __doc__, argv)
    device = common.setup(cfg)
    check(cfg, stages)
    common.write_config(cfg, stages)
    if stages & {"train", "eval"}:
        open_split(cfg, "val", cfg.size)                    # missing? say so before hours of search
        open_cls(cfg, "val")
    if "search" in stages:
        search(cfg, device)
    if "train" in stages:
        fine_tune(cfg, device)
    if "eval" in stages:
        evaluate_network(cfg, device)
    if rank() == 0 and "bench" in stages:
        bench(cfg, device)
    if rank() == 0 and cfg.export:
        export_network(cfg)


if __name__ == "__main__":
    common.run_main(main)
