r"""MTP: prune the channels of a segmentation network, judged by classification and segmentation
together.

    Chen, Zhang, Wang: MTP: Multi-Task Pruning for Efficient Semantic Segmentation Networks.
    Equation, table and line numbers below are the paper's. PAPER 7.1: the paper's section 7.1 says
    so; OURS: it leaves that open or differs. "Section 6" is this file's.

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

    paper                   here                       meaning
    N1, N2                  n1, n2                     Classifier, Segmenter: one network a task
    W1, W2, W3              w1, w2, w3                 backbone in N1, decoder, backbone in N2
    gamma1 gamma2 gamma3    gamma1, gamma2, gamma3     the prunable BN scales among W1, W2, W3
    l_cls, l_seg            l_cls, l_seg               cross-entropy of classes, of pixels
    lambda, alpha1, alpha2  cfg.lam, .alpha1, .alpha2  weights in Eq. (4)
    E, mu, rho              E, mu, cfg.rho             multipliers, Eqs. (6) and (10)
    p; tau1, tau2           cfg.percentile             percent removed; thresholds, here ranks
    0.75x, 0.5x             --percentile 25, 50        share of the channels that stays

    python mtp.py --search                       106 seconds on two CPU cores, 1.4 GiB
    python mtp.py --train --eval                 fine-tune: class, then mask
    python mtp.py --bench                        dense beside all pruned networks
"""
import copy
import itertools
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import latency
from common import (BaseConfig, InputError, Run, autocast, average_buffers, barrier, count_macs,
                    count_params, cross_entropy, enlarged, evaluate, load_checkpoint, load_weights,
                    log_record, narrowed, open_loader, open_split, opt, place, rank,
                    sum_over_ranks, world_size)

# data.py lets torchvision load beside a torch built without CUDA, so it is taken from there.
ASPP = data.torchvision.models.segmentation.deeplabv3.ASPP

# ---------------------------------------------------------------------------------------------
# 2. Settings. Defaults are the paper's for DeepLabV3 on VOC (7.1) where it gives them.
# ---------------------------------------------------------------------------------------------


@dataclass
class Config(BaseConfig):
    # Networks and data of both tasks. PAPER 4: deeplabv3_resnet101, bisenet_resnet18 and
    # pspnet_resnet50; OURS: the other two, for small machines. PAPER 7.1: batches of 256 and 16,
    # crops of 513x513, scales. OURS: 224x224 for classification, as ImageNet is used.
    network: str = opt("deeplabv3_resnet101", "which network to prune", "dense", (
        "deeplabv3_resnet18", "deeplabv3_resnet50", "deeplabv3_resnet101", "bisenet_resnet18",
        "pspnet_resnet50"))
    backbone: str = opt("imagenet", "where training starts: imagenet (torchvision's weights), "
                        "none, or a file with a classifier's state_dict", "dense")
    cls_dataset: str = opt("synthetic", "classification set of task 1; ImageNet is an imagefolder",
                           "dense", data.set_names("classification"))
    cls_root: str = opt("", "its folder: {train,val}/<class>/*.jpg", "dense")
    cls_size: tuple[int, int] = opt((224, 224), "its crop, H W in pixels", "dense", low=32)
    cls_batch: int = opt(256, "its batch over all processes", "dense", low=2)
    size: tuple[int, int] = opt((513, 513), "segmentation crop, H W in pixels", "dense", low=32)
    scales: tuple[float, float] = opt((0.5, 2.0), "its random scaling", "dense", low=0.01)
    batch_size: int = opt(16, "segmentation batch over all processes", "dense", low=2)

    # The dense networks, Eqs. (1) and (2). PAPER 7.1: 50 epochs of segmentation at 0.007, poly.
    # OURS: SGD's momentum and decay and Eq. (1)'s rate, all usual for ResNets.
    momentum: float = opt(0.9, "of SGD", "dense", high=0.999)
    weight_decay: float = opt(1e-4, "of SGD", "dense")
    dense_cls_epochs: int = opt(0, "classification epochs before segmentation; 0: --backbone has "
                                "a trained head for these classes", "dense")
    dense_cls_lr: float = opt(0.1, "their learning rate, linear to 0", "dense", low=1e-9)
    dense_epochs: int = opt(50, "segmentation epochs of the dense network", "dense", low=1)
    dense_lr: float = opt(0.007, "their learning rate, poly 0.9", "dense", low=1e-9)

    # The sparse training, lines 2 to 7. PAPER 7.1: both alphas (1e-4 for BiSeNet and PSPNet) and
    # search_cls_lr; PAPER Eq. (10): rho above 1. All other values are OURS, the paper gives none:
    # search_lr is Eq. (2)'s; tolerance and gamma_rate are explained in section 6.
    method: str = opt("mtp", "how channels are chosen (section 7)", "search", (
        "mtp", "slimming", "slimming_cls", "gammas", "uniform", "thinet", "fpgm"))
    lam: float = opt(1.0, "lambda of Eq. (4)", "search", low=1e-9)
    alpha1: float = opt(1e-3, "l1 weight of gamma1", "search")
    alpha2: float = opt(1e-3, "l1 weight of gamma2 and gamma3", "search")
    rho: float = opt(1.5, "growth of mu a round", "search", low=1.0001)
    rounds: int = opt(20, "most rounds of lines 2 to 7", "search", low=1)
    inner_steps: int = opt(500, "K, batches of each task a round", "search", low=1)
    tolerance: float = opt(1e-3, "line 7: largest ||W1 - W3|| / ||W1||; 0: all rounds", "search")
    search_cls_lr: float = opt(0.001, "learning rate of W1, linear to 0", "search", low=1e-9)
    search_lr: float = opt(0.007, "learning rate of W2, W3, linear to 0", "search", low=1e-9)
    gamma_rate: float = opt(30.0, "its factor for prunable gammas", "search", low=1)
    batch_order: int = opt(0, "another number: other batches in the sparse training, from the same "
                           "dense networks; what two orders disagree on is chance", "search")

    # The cut, lines 9 and 10. PAPER 3: p, and thresholds by part; PAPER Table 4: one for all.
    # OURS: recalibration.
    percentile: float = opt(50.0, "p, percent of the prunable channels to remove; the paper's "
                            "0.75x is 25", low=0.1, high=99.9)
    pool: str = opt("auto", "whose scores compete: those of a layer, of a part (backbone, "
                    "decoder), of the network; auto: part where gammas are compared, else layer",
                    choices=("auto", "layer", "part", "network"))
    recalibrate: int = opt(50, "batches that re-estimate BN statistics", "search")

    # Fine-tuning, line 11, and what comes after. PAPER 7.1: epochs and rates.
    # 0 is another network, so with --search too; --resume keeps the sparse training of the first.
    cls_epochs: int = opt(20, "fine-tuning on classification; 0: none, Table 1", "train")
    cls_lr: float = opt(7e-4, "its learning rate, poly 0.9", "train", low=1e-9)
    epochs: int = opt(50, "fine-tuning on segmentation", "train", low=1)
    lr: float = opt(7e-4, "its learning rate, poly 0.9", "train", low=1e-9)
    frame: tuple[int, int] = opt((513, 513), "picture size H W of MACs and latency", low=32)
    arch: str = opt("", "arch.json to train, evaluate or bench [the run's own]; --bench also takes "
                    "'uniform': uniform widths at --percentile, random weights", "train")
    eval_scales: tuple[float, ...] = opt((1.0,), "average over rescaled pictures (PAPER 7.1, "
                                         "Cityscapes: 0.5 0.75 1 1.25 1.5 1.75)", "eval", low=0.01)


# PAPER 7.1 for the other networks and sets, in the order of the settings:
#
#     DeepLabV3, Cityscapes   crop 512x1024, batch 32, 480 epochs at 0.01; fine-tuning 20 and 240
#                             epochs at 5e-4 (trained on train and val for the test server)
#     BiSeNet, Cityscapes     ImageNet batch 512, crop 768x1536, scales 0.75 to 2, batch 32, 80
#                             epochs at 0.01; both alphas 1e-4; 50 and 80 epochs at 1e-3
#     PSPNet, ADE20K          ImageNet batch 128, crop 480x480, batch 32, 120 epochs at 0.01; both
#                             alphas 1e-4; 50 and 120 epochs at 5e-4; six scales in evaluation
#
# Minutes on two cores, from random weights: few steps, so larger ones (OURS). p = 75 for a reason:
# 45% of the gammas end as true zeros and many more nearly so. The threshold of p = 50 falls among
# those, where chance decides; what two batch orders agree on shows in the largest quarter. With 96
# steps alpha2 must lie above most of segmentation's gradients, or its dose reaches nothing: the
# report warns of that, and the zeros by layer show that still not all went together.
#
# Does it find channels, or chance? Search again with --method slimming or --batch-order 1, or both:
# what is printed is the share of the kept channels that the other run keeps too; chance is 0.25.
# Means over three seeds and both orders (docs/results.md):
#
#     backbone   MTP and MTP 0.49, slimming and slimming 0.49, MTP and slimming 0.38
#     decoder    0.81, 0.81, 0.82: both train it by the same loss
QUICK = dict(network="deeplabv3_resnet18", backbone="none", cls_size=(32, 32), cls_batch=64,
             size=(64, 96), scales=(0.75, 1.5), batch_size=8, dense_cls_epochs=6,
             dense_epochs=2, dense_lr=0.05, gamma_rate=250.0, rounds=6,
             inner_steps=16, tolerance=0.0, search_cls_lr=0.01, search_lr=0.01, rho=2.0,
             percentile=75.0, recalibrate=10, cls_epochs=2, cls_lr=0.01, epochs=4,
             lr=0.02, frame=(128, 256))

# ---------------------------------------------------------------------------------------------
# 3. Networks: a torchvision ResNet as backbone, three decoders
#
# Both networks of a pair have one kind of backbone, so W1 and W3 correspond parameter by parameter:
#
#     Classifier  N1:   picture -> backbone -> mean over the map -> head -> class
#     Segmenter   N2:   picture -> backbone -> four maps -> decoder -> enlarged -> mask
#
#     network     backbone             last map    its decoder reads            training heads
#     deeplabv3   ResNet-18, 50, 101   H/16        the last map                 none
#     bisenet     ResNet-18            H/32        the last two, the picture    two
#     pspnet      ResNet-50            H/8         the last map                 one, on map 3
#
# A decoder takes (picture, maps) and returns a list, the main output first. Its links() say which
# of its channels can be pruned, a row for channels that live or die together: ([convolutions that
# make them], {convolution that reads them: the input channel where they begin}). The names of
# submodules are the names of layers in arch.json.
# ---------------------------------------------------------------------------------------------


def conv_bn_relu(c_in, c_out, kernel=3, stride=1):
    """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride), rounded up."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def pooled(bins, c_in, c_out):
    """Means over a grid of bins x bins places, then 1x1 convolution, BN, ReLU."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(bins), *conv_bn_relu(c_in, c_out, 1))


def training_head(c_in, num_classes):
    """An auxiliary output that only training uses; deployed() drops it."""
    return nn.Sequential(conv_bn_relu(c_in, 256), nn.Conv2d(256, num_classes, 1))


class DeepLabDecoder(nn.Module):
    """ASPP and classifier of DeepLabV3: what PAPER 2 calls a vanilla decoder, W2.

    Five branches look at the last map with different reach (1x1, 3x3 at three rates, the mean of
    the whole map); a 1x1 convolution projects their 5 x 256 channels. channels: of that map.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.aspp = ASPP(channels, [6, 12, 18])         # rates at output stride 16 (PAPER 4.1)
        self.aspp.project[3].p = 0.0    # OURS: no dropout, DeepLabV3's paper has none either
        self.classifier = nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.ModuleList()

    def forward(self, image, maps):
        x = self.aspp(maps[-1])                         # (B, 2048, H/16, W/16) -> (B, 256, ...)
        return [self.classifier(x)]                     # (B, K, H/16, W/16)

    def links(self):
        return [
            # side by side in the concatenation
            (["aspp.convs.0.0"], {"aspp.project.0": 0}),
            (["aspp.convs.1.0"], {"aspp.project.0": 256}),
            (["aspp.convs.2.0"], {"aspp.project.0": 512}),
            (["aspp.convs.3.0"], {"aspp.project.0": 768}),
            (["aspp.convs.4.1"], {"aspp.project.0": 1024}),     # behind the image pooling, 4.0
            (["aspp.project.0"], {"classifier": 0})]


class Attention(nn.Module):
    """BiSeNet's attention refinement: 3x3 convolution, then a gate a channel."""

    def __init__(self, c_in):
        super().__init__()
        self.conv = conv_bn_relu(c_in, 128)
        self.gate = pooled(1, 128, 128)
        self.gate[3] = nn.Sigmoid()                     # in place of the ReLU

    def forward(self, x):
        x = self.conv(x)                                # (B, 128, h, w)
        return x * self.gate(x)                         # times (B, 128, 1, 1)


class BiSeNetDecoder(nn.Module):
    """Everything of BiSeNet but its ResNet: spatial path, attention refinement, fusion, head.

    The spatial path sees the picture itself and keeps detail; the context path comes down from the
    ResNet's last map, refined at H/32 and H/16; both meet at H/8:

        picture ------------------------------------------------- spatial --+
        mean of map 4 --+                                                   cat - fuse - gate - head
        map 4 -- arm 0 -+- refine 0 -+                                      |
        map 3 -- arm 1 --------------+- refine 1 ---------------------------+

    Where maps are added or gated channel by channel, the convolutions that make them must lose the
    same channels.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.spatial = nn.Sequential(
            conv_bn_relu(3, 64, 7, 2),
            conv_bn_relu(64, 64, 3, 2),
            conv_bn_relu(64, 64, 3, 2),
            conv_bn_relu(64, 128, 1))
        self.context = pooled(1, channels, 128)
        self.arms = nn.ModuleList([Attention(channels), Attention(channels // 2)])
        self.refines = nn.ModuleList([conv_bn_relu(128, 128), conv_bn_relu(128, 128)])
        self.fuse = conv_bn_relu(256, 256, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(256, 256, 1, bias=False), nn.ReLU(),
            nn.Conv2d(256, 256, 1, bias=False), nn.Sigmoid())
        self.head = conv_bn_relu(256, 64)
        self.classifier = nn.Conv2d(64, num_classes, 1)
        self.auxiliary = nn.ModuleList([training_head(128, num_classes) for _ in range(2)])

    def forward(self, image, maps):
        x, refined = self.context(maps[3]), []                  # (B, 128, 1, 1)
        for i, (arm, refine) in enumerate(zip(self.arms, self.refines)):
            y = arm(maps[3 - i])                                # (B, 128, H/32, W/32), then H/16
            y = y + enlarged(x, y.shape[-2:])
            x = refine(enlarged(y, maps[2 - i].shape[-2:]))     # (B, 128, H/16, W/16), then H/8
            refined.append(x)
        spatial = self.spatial(image)                           # (B, 128, H/8, W/8)
        x = self.fuse(torch.cat([spatial, x], 1))               # (B, 256, H/8, W/8)
        x = self.head(x + x * self.gate(x))                     # (B, 64, H/8, W/8)
        extra = [head(y) for head, y in zip(self.auxiliary, refined) if self.training]
        return [self.classifier(x), *extra]                     # (B, K, ...) each

    def links(self):
        extra = [{f"auxiliary.{i}.0.0": 0} for i in range(2)]
        if not self.auxiliary:                          # deployed() has dropped them
            extra = [{}, {}]
        return [
            # the spatial path, up to its place in the concatenation
            (["spatial.0.0"], {"spatial.1.0": 0}),
            (["spatial.1.0"], {"spatial.2.0": 0}),
            (["spatial.2.0"], {"spatial.3.0": 0}),
            (["spatial.3.0"], {"fuse.0": 0}),
            # H/32: context + arm * gate, so channel by channel one decision for all three
            (["context.1", "arms.0.conv.0", "arms.0.gate.1"],
             {"refines.0.0": 0, "arms.0.gate.1": 0}),
            # H/16: refined + arm * gate, likewise
            (["refines.0.0", "arms.1.conv.0", "arms.1.gate.1"],
             {"refines.1.0": 0, "arms.1.gate.1": 0} | extra[0]),
            # H/8: second in the concatenation
            (["refines.1.0"], {"fuse.0": 128} | extra[1]),
            # x + x * gate(x): gate.3 must lose the channels of fuse. What lies between gate.1 and
            # gate.3 need not; OURS: without BN it has no score, so it follows.
            (["fuse.0", "gate.1", "gate.3"], {"gate.1": 0, "gate.3": 0, "head.0": 0}),
            (["head.0"], {"classifier": 0})]


class PSPDecoder(nn.Module):
    """Pyramid pooling with bins 1, 2, 3, 6 and a 3x3 convolution over them and the map itself.

    The map's own 2048 channels are outputs of a residual block and stay; the levels' can go.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.channels = channels
        self.pyramid = nn.ModuleList(
            [pooled(bins, channels, channels // 4) for bins in (1, 2, 3, 6)])
        self.fuse = conv_bn_relu(2 * channels, 512)
        self.classifier = nn.Conv2d(512, num_classes, 1)
        self.auxiliary = nn.ModuleList([training_head(channels // 2, num_classes)])

    def forward(self, image, maps):
        x = maps[-1]                                                    # (B, 2048, H/8, W/8)
        size = x.shape[-2:]
        levels = [enlarged(level(x), size) for level in self.pyramid]   # (B, 512, H/8, W/8) each
        x = self.fuse(torch.cat([x, *levels], 1))                       # (B, 512, H/8, W/8)
        extra = [head(maps[2]) for head in self.auxiliary if self.training]
        return [self.classifier(x), *extra]                             # (B, K, H/8, W/8)

    def links(self):
        c = self.channels               # the levels come after the backbone's c, each c / 4
        rows = [([f"pyramid.{i}.1"], {"fuse.0": c + i * c // 4}) for i in range(4)]
        return [*rows, (["fuse.0"], {"classifier": 0})]


class Network(NamedTuple):
    """One row of NETWORKS."""
    resnet: str                 # torchvision's name
    decoder: type
    dilation: dict              # stage -> rate; such a stage keeps the resolution, stride 1
    lag: bool = True            # a dilated stage's first 3x3 has half the rate (torchvision's rule)
    deep_stem: bool = False     # three 3x3 convolutions in place of one 7x7


# The output stride is 32, halved by each dilated stage: 16 (PAPER 4.1: multi-grid 1, 1, 1), 32, 8.
NETWORKS = {
    "deeplabv3_resnet18": Network("resnet18", DeepLabDecoder, {"layer4": 2}),
    "deeplabv3_resnet50": Network("resnet50", DeepLabDecoder, {"layer4": 2}),
    "deeplabv3_resnet101": Network("resnet101", DeepLabDecoder, {"layer4": 2}),
    "bisenet_resnet18": Network("resnet18", BiSeNetDecoder, {}),
    "pspnet_resnet50": Network("resnet50", PSPDecoder, {"layer3": 2, "layer4": 4}, lag=False,
                               deep_stem=True)}


def dilate(stage, rate, lag):
    """Keep the resolution of a ResNet stage: stride 1, its 3x3 convolutions dilated by `rate`.

    lag: the convolution that loses its stride keeps half the rate, as its input is not finer than
    before. So a dilated stage computes what the plain one does, and more places in between.
    """
    for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            reach = rate // 2 if lag and conv.stride != (1, 1) else rate
            conv.dilation = conv.padding = (reach, reach)
        conv.stride = (1, 1)


def resnet(network, dilated):
    """torchvision's ResNet without its head, changed as `network` wants it; random weights."""
    kind = NETWORKS[network]
    net = common.classifier(kind.resnet)
    net.fc = nn.Identity()
    if kind.deep_stem:
        conv, bn, _ = conv_bn_relu(64, 128)         # no ReLU: features() applies the ResNet's own
        net.conv1 = nn.Sequential(conv_bn_relu(3, 64, 3, 2), conv_bn_relu(64, 64), conv, bn)
        net.bn1 = nn.Identity()                     # that BN is the last one of conv1 now
        first = net.layer1[0]                       # 128 channels go in, not 64
        first.conv1 = nn.Conv2d(128, first.conv1.out_channels, 1, bias=False)
        first.downsample[0] = nn.Conv2d(128, first.downsample[0].out_channels, 1, bias=False)
    if dilated:
        for stage, rate in kind.dilation.items():
            dilate(net.get_submodule(stage), rate, kind.lag)
    return net


def features(net, x):
    """Outputs of the four stages: (B, C, H/4, W/4) to (B, 8 C, H/32, W/32) if not dilated."""
    x, maps = net.relu(net.bn1(net.conv1(x))), []                       # (B, 64, H/2, W/2)
    x = net.maxpool(x)                                                  # (B, 64, H/4, W/4)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x)
    return maps


class Classifier(nn.Module):
    """N1, Eq. (1): backbone and linear head. Its backbone's parameters are W1.

    OURS: not dilated, like pre-trained networks; W1 and W3 have the same shapes all the same.
    """

    def __init__(self, network, num_classes):
        super().__init__()
        self.backbone = resnet(network, dilated=False)
        # torchvision's inplanes, once the ResNet is built: the channels of its last map.
        self.head = nn.Linear(self.backbone.inplanes, num_classes)

    def forward(self, x):
        last = features(self.backbone, x)[-1]                   # (B, 3, H, W) -> (B, C, h, w)
        return self.head(last.mean((2, 3)))                     # (B, C) -> (B, K)


class Segmenter(nn.Module):
    """N2, Eq. (2): backbone (W3, or W1 before there are two) and decoder (W2). With training heads
    (BiSeNet, PSPNet) it returns in training mode a list, the main output first."""

    def __init__(self, network, num_classes):
        super().__init__()
        self.backbone = resnet(network, dilated=True)
        self.decoder = NETWORKS[network].decoder(self.backbone.inplanes, num_classes)

    def forward(self, x):
        outputs = self.decoder(x, features(self.backbone, x))
        outputs = [enlarged(y, x.shape[-2:]) for y in outputs]  # (B, 3, H, W) -> (B, K, H, W)
        return outputs if len(outputs) > 1 else outputs[0]


def deployed(net):
    """A copy of a Segmenter in eval mode, without the heads that only training uses."""
    net = copy.deepcopy(net).eval()
    net.decoder.auxiliary = nn.ModuleList()
    return net

# ---------------------------------------------------------------------------------------------
# 4. What can be pruned, and networks of given widths
#
# A channel is made by a convolution and its BN (a row of the filters, an entry of gamma, beta, mean
# and variance) and read by the next convolution (a column of its filters). Cutting it for real
# means to cut all of these. In a bottleneck of a ResNet:
#
#     x -> conv1 bn1 -> conv2 bn2 -> conv3 bn3 -> + x         conv1: makes group A
#              A            B           stays                 conv2: reads A, makes B
#                                                             conv3: reads B, its outputs stay
# ---------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Channels that live or die together, and every layer that must be told.

    makers: [(convolution, its BN or None), ...], whose outputs are added or multiplied channel by
    channel, mostly one; readers: {convolution: first input channel}, its place in a concatenation.
    name, of the first maker, stands in arch.json.
    """
    part: str                   # "backbone" or "decoder"
    width: int
    makers: list
    readers: dict

    @property
    def name(self):
        return self.makers[0][0]


def bn_behind(net, conv):
    """Name of a convolution's BN: bn1 of conv1, else the next in an nn.Sequential; None if what is
    there is no BN."""
    path, _, name = conv.rpartition(".")
    bn = f"{path}.{int(name) + 1 if name.isdigit() else name.replace('conv', 'bn')}"
    return bn if isinstance(net.get_submodule(bn), nn.BatchNorm2d) else None


def groups_of(net):
    """The prunable Groups of a dense Segmenter or Classifier, front to back.

    PAPER 7.1: the first two convolutions of each bottleneck; OURS: of a basic block the first. The
    last one's outputs are added to the shortcut, so stem, last convolutions and shortcuts stay as
    they are. OURS: in the decoder every convolution with BN, training heads excepted; not the
    classifier, whose outputs are the classes.
    """
    groups = []

    def add(part, makers, readers):
        makers = [f"{part}.{conv}" for conv in makers]
        groups.append(Group(part, net.get_submodule(makers[0]).out_channels,
                            [(conv, bn_behind(net, conv)) for conv in makers],
                            {f"{part}.{conv}": start for conv, start in readers.items()}))

    for path, block in net.backbone.named_modules():
        for i in (1, 2):                                # the ResNet itself has no conv2
            if hasattr(block, f"conv{i + 1}"):
                add("backbone", [f"{path}.conv{i}"], {f"{path}.conv{i + 1}": 0})
    for makers, readers in net.decoder.links() if hasattr(net, "decoder") else ():
        add("decoder", makers, readers)
    return groups


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
    outputs, inputs = {}, {}            # {layer: indices of outputs}, {layer: mask of inputs}
    for g in groups:
        stays = kept.get(g.name, torch.arange(g.width))
        for layer in filter(None, itertools.chain(*g.makers)):
            outputs[layer] = stays
        for conv, start in g.readers.items():
            # Several groups may share a reader (ASPP's projection has five): each clears and
            # refills its own stretch of the inputs.
            if conv not in inputs:
                inputs[conv] = torch.ones(net.get_submodule(conv).in_channels, dtype=torch.bool)
            inputs[conv][start:start + g.width] = False
            inputs[conv][start + stays] = True
    small = copy.deepcopy(net)
    for name in {**outputs, **inputs}:                          # a layer may be in both
        layer = narrowed(net.get_submodule(name), outputs.get(name), inputs.get(name))
        small.set_submodule(name, layer)
    return small


def with_widths(net, widths):
    """`net` with the first widths[name] channels of each group: the shapes of a pruned network."""
    return prune(net, groups_of(net), {name: torch.arange(n) for name, n in widths.items()})


def on_meta(kind, network, classes):
    """The network's shapes without its numbers: nothing is allocated or initialised."""
    with torch.device("meta"):
        return kind(network, classes)


def rebuild(kind, arch, state, where):
    """A pruned Segmenter or Classifier (`kind`) from the JSON of arch.json and a state_dict alone.

    On the meta device first, so that no large network is initialised in vain. where: file that an
    InputError names.
    """
    net = on_meta(kind, arch["network"], arch["classes" if kind is Segmenter else "cls_classes"])
    net = with_widths(net, arch["widths"]).to_empty(device="cpu")
    load_weights(net, state, where)
    return net


def read_arch(path, **classes):
    """The dict of an arch.json; InputError if it is not one, or was found for other data sets.
    classes: how many those of today have, as classes=... and cls_classes=..."""
    arch = common.read_json(path, "arch.json")
    if arch.get("network") not in NETWORKS:
        raise InputError(f"{path} does not name one of the networks {', '.join(NETWORKS)}")
    for key in ("classes", "cls_classes"):
        if not isinstance(arch.get(key), int) or not 2 <= arch[key] <= 100_000:
            raise InputError(f"{path} does not say for how many classes it was found ('{key}')")
        if classes.get(key, arch[key]) != arch[key]:
            raise InputError(f"{path} was found for {arch[key]} classes ('{key}'), the data set "
                             f"has {classes[key]}")
    widths = arch.get("widths")
    for g in groups_of(on_meta(Segmenter, arch["network"], arch["classes"])):
        n = widths.get(g.name) if isinstance(widths, dict) else None
        if type(n) is not int or not 1 <= n <= g.width:
            raise InputError(f"{path}: width {n} of layer {g.name} does not fit; it needs a whole "
                             f"number from 1 to {g.width}")
    return arch

# ---------------------------------------------------------------------------------------------
# 5. The two tasks: losses, data, and the l1 norm
#
# PAPER 2: task 1 is classification (ImageNet), task 2 segmentation. Everything that trains, dense,
# sparse or fine-tuning, is given a Task and need not know which of the two it is.
# ---------------------------------------------------------------------------------------------


def l_cls(forward, images, labels):
    """Eq. (1): cross-entropy. images (B, 3, H, W), labels (B,) -> scalar."""
    return F.cross_entropy(forward(images).float(), labels)


def l_seg(forward, images, labels):
    """Eq. (2): cross-entropy over the pixels that have a label, (B, H, W) -> scalar. Auxiliary
    heads, where the network has them, are part of it (OURS: 0.4, PSPNet's weight)."""
    outputs = forward(images)
    main, *extra = outputs if isinstance(outputs, list) else [outputs]
    loss = cross_entropy(main, labels)
    return loss + 0.4 * sum(cross_entropy(y, labels) for y in extra)


class Task(NamedTuple):
    """One of the two: its network N, its loss, its data X, Y."""
    net: nn.Module          # Classifier or Segmenter
    loss: object            # loss(forward, images, labels) -> scalar
    batches: object         # training batches; .sampler.set_epoch(number) comes first
    score: object = None    # score(net) -> top-1 or mIoU on val


def open_cls(cfg, split):
    return data.open_set("classification", cfg.cls_dataset, cfg.cls_root or None, split, None,
                         cfg.cls_size, cfg.seed)


def open_cls_loader(cfg, split, train=False):
    """(set, loader) of the classification set; the same pictures in batches to evaluate."""
    images = open_cls(cfg, split)
    transform = data.classification_transform(cfg.cls_size, train)
    batch = cfg.cls_batch // world_size()
    return images, data.make_loader(images, None, transform, batch, train, cfg.workers, cfg.seed,
                                    rank(), world_size())


def tasks_of(cls, seg, cfg):
    """(task 1, task 2) for a pair of networks, augmented batches, this rank's share of each."""
    _, batches1 = open_cls_loader(cfg, "train", train=True)
    _, batches2 = open_loader(cfg, "train", train=True)
    _, val1 = open_cls_loader(cfg, "val")

    def top1(net):
        return accuracy(net, val1, cfg)

    task1 = Task(cls, l_cls, batches1, top1)
    task2 = Task(seg, l_seg, batches2, common.scorer(cfg))
    return task1, task2


@torch.no_grad()
def accuracy(net, loader, cfg):
    """Share of a classification split that the network gets right (top-1), over all ranks."""
    counts = torch.zeros(2, dtype=torch.float64, device=cfg.device)
    training = net.training
    average_buffers(net)
    net.eval()
    for images, labels in loader:
        with autocast(cfg):
            guess = net(images.to(cfg.device)).argmax(1)                    # (B, K) -> (B,)
        counts[0] += (guess == labels.to(cfg.device)).sum()
        counts[1] += len(labels)
    net.train(training)
    right, seen = sum_over_ranks(counts)
    return float(right / seen)


class RoundOf:
    """The K batches of a round, out of as many passes over a loader's set as they take.

    OURS: each round draws its pictures anew, from (seed, round), so that a killed round can be
    replayed from its start. order: another number gives other batches (--batch-order).
    """

    def __init__(self, loader, steps, order=0):
        self.loader, self.steps, self.order = loader, steps, order
        # Its own sampler, as callers name the round by loader.sampler.set_epoch(number).
        self.sampler = self

    def set_epoch(self, number):
        self.number = number

    def __iter__(self):
        passes, left = math.ceil(self.steps / len(self.loader)), self.steps
        for i in range(passes):
            self.loader.sampler.set_epoch(1_000_000 * self.order + passes * self.number + i)
            yield from itertools.islice(self.loader, left)
            left -= len(self.loader)

# ---------------------------------------------------------------------------------------------
# 6. Search: Algorithm 1, lines 1 to 7
#
# When does the l1 norm tell channels apart? conv-BN-ReLU-conv-BN computes the same when all gammas
# (and betas) of a layer are halved. So near gamma = 1 nothing resists a pull that all of them feel
# alike; the loss resists differences, and its gradient grows as 1 / gamma. Therefore
#   - the way to zero must be short enough: the l1 term moves a gamma by lr alpha / (1 - m) a step
#     (m: momentum). If the sum of these, the dose, is below the mean gamma, all that happens is a
#     shift of all gammas, and the ranking stays the dense network's.
#   - alpha must lie among the gradients |dl/dgamma| of the channels: above them all, everything
#     goes to zero together, and the network with it.
# OURS: the prunable gammas have f = --gamma-rate times the learning rate. That multiplies the dose
# by f and leaves the end, |dl/dgamma| = alpha, where it is. --search prints dose and gradients
# first.
# ---------------------------------------------------------------------------------------------


def sparse_sgd(net, gamma, lr, cfg):
    """(SGD, its schedule) of the sparse training: linear to 0 (PAPER 7.1 for W1; OURS for W2, W3).

    OURS: no weight decay on prunable gammas, as a second force towards zero would move the point
    where |dl/dgamma| = alpha.
    """
    special = {id(g) for g in gamma}
    rest = [p for p in net.parameters() if id(p) not in special]
    sgd = torch.optim.SGD([{"params": rest, "weight_decay": cfg.weight_decay},
                           {"params": gamma, "lr": cfg.gamma_rate * lr}], lr, cfg.momentum)
    steps = cfg.rounds * cfg.inner_steps
    return sgd, torch.optim.lr_scheduler.PolynomialLR(sgd, steps, 1.0)


@torch.no_grad()
def shrink_(gamma, alpha, sgd, cfg):
    """The l1 term's proximal step: towards zero by t, and no further (OURS: true zeros, about
    which a subgradient would jump).

    With momentum m a constant gradient g moves a weight by lr g / (1 - m) a step; t has the same
    factor, else the l1 norm would count (1 - m) alpha only.
    """
    lr = sgd.param_groups[1]["lr"]              # group 1 of sparse_sgd: the prunable gammas
    t = lr * alpha / (1 - cfg.momentum)
    for g in gamma:
        g.copy_(F.softshrink(g, t))             # sign(g) max(|g| - t, 0)


def pulls(cfg):
    """(first mu, largest mu); without a second task both are 0, and E stays 0.

    OURS: K SGD steps close the gap by a share of about K lr mu / (1 - m). It starts at a tenth and
    stops growing at mu = 0.1 / lr, far below 2 (1 + m) / lr, where SGD on the quadratic term alone
    would diverge.
    """
    if cfg.method != "mtp":
        return 0.0, 0.0
    lr = max(cfg.search_cls_lr, cfg.search_lr)
    return 0.1 * (1 - cfg.momentum) / (cfg.inner_steps * lr), 0.1 / lr


def constraint(E, gap, mus):
    """<E, W1 - W3> + mu/2 ||W1 - W3||^2 of Eq. (6), scalar; gap: W1 - W3; lists by parameter.

    What E does: where W1 = W3 has settled, the gradients of L for both vanish, so E is -dl_cls/dW1
    and also lambda dl_seg/dW3 (weight decay and l1 aside). It holds the copies together where each
    task alone would leave, without a large mu. For a shared gamma the two conditions add up: it can
    stay at zero only where |dl_cls/dgamma + lambda dl_seg/dgamma| <= alpha1 + alpha2.
    """
    linear = sum((e * d).sum() for e, d in zip(E, gap))
    return linear + sum(mu / 2 * d.square().sum() for d, mu in zip(gap, mus))


def train_sparse(task1, task2, groups, cfg, folder):
    """Algorithm 1, lines 1 to 7, in place: SGD on the augmented Lagrangian, Eq. (6)

        L = l_cls(W1) + lambda l_seg(W3, W2) + mu/2 ||W1 - W3||^2 + <E, W1 - W3>
            + alpha1 ||gamma1||_1 + alpha2 (||gamma2||_1 + ||gamma3||_1)

    W1, W3: the parameters of task.net.backbone in N1 and N2. W2: all others of N2. The head of N1
    is private to task 1 and so outside of the constraint (OURS). BN statistics are no parameters:
    each network keeps its own (OURS: the pictures of the two tasks differ).

    --method slimming and slimming_cls have one task: the other network takes no step, mu = E = 0.
    That is Network Slimming, on segmentation as the paper has it, or on classification, Eq. (3).

    Eq. (5) is not quite Eq. (4): with W1 = W3 a shared gamma pays alpha1 + alpha2, not alpha1.
    """
    n1, n2 = task1.net.train(), task2.net.train()
    w1 = list(n1.backbone.parameters())
    w3 = list(n2.backbone.parameters())
    gamma1 = gammas(n1, part_of(groups, "backbone"))
    gamma2 = gammas(n2, part_of(groups, "decoder"))
    gamma3 = gammas(n2, part_of(groups, "backbone"))
    sgd1, linear1 = sparse_sgd(n1, gamma1, cfg.search_cls_lr, cfg)
    sgd2, linear2 = sparse_sgd(n2, [*gamma2, *gamma3], cfg.search_lr, cfg)
    fast = {id(g) for g in gamma1}
    forward1 = common.training_form(n1, cfg)
    forward2 = common.training_form(n2, cfg)
    # OURS: E = 0 at the start, where W1 = W3. A module, so that last.pt holds it.
    E = nn.ParameterList([nn.Parameter(torch.zeros_like(w), False) for w in w1])
    with_cls = cfg.method != "slimming"
    with_seg = cfg.method != "slimming_cls"
    run = Run(cfg.method, "search", cfg, folder, cfg.rounds,
              (with_cls + with_seg) * cfg.inner_steps, cls=n1, seg=n2, sgd1=sgd1, sgd2=sgd2,
              linear1=linear1, linear2=linear2, multipliers=E)
    first_mu, largest_mu = pulls(cfg)

    for _ in run.epochs():                                              # 2: repeat
        if run.values.get("converged"):
            break
        mu = run.values.get("mu", first_mu)
        # OURS: where steps are gamma_rate times as long, so much less mu pulls as elsewhere.
        mus = [mu / cfg.gamma_rate if id(w) in fast else mu for w in w1]

        for images, labels in run.batches(task1.batches) if with_cls else ():   # 3: W1 by Eq. (7)
            # L1 = l_cls(W1) + <E, W1 - W3> + mu/2 ||W1 - W3||^2  (+ alpha1 ||gamma1||_1, below)
            with autocast(cfg):
                loss = task1.loss(forward1, images, labels)
            gap = [a - b.detach() for a, b in zip(w1, w3)]
            run.descend(sgd1, cls=loss, constraint=constraint(E, gap, mus))
            shrink_(gamma1, cfg.alpha1, sgd1, cfg)
            linear1.step()

        # OURS: one backward serves lines 4 and 5, as L2 and L3 have the same first term; so W2 and
        # W3 move at once and not in turn, for half the time.
        for images, labels in run.batches(task2.batches) if with_seg else ():   # 4: W2 by Eq. (8)
            # L2 = lambda l_seg(W3, W2)  (+ alpha2 ||gamma2||_1)              # 5: W3 by Eq. (9)
            # L3 = lambda l_seg(W3, W2) + mu/2 ||W1 - W3||^2 + <E, W1 - W3>  (+ alpha2 ||gamma3||_1)
            with autocast(cfg):
                loss = task2.loss(forward2, images, labels)
            gap = [a.detach() - b for a, b in zip(w1, w3)]
            run.descend(sgd2, seg=cfg.lam * loss, constraint=constraint(E, gap, mus))
            shrink_([*gamma2, *gamma3], cfg.alpha2, sgd2, cfg)
            linear2.step()

        with torch.no_grad():                                           # 6: E and mu by Eq. (10)
            for e, a, b, m in zip(E, w1, w3, mus):
                e += m * (a - b)                                        # E = E + mu (W1 - W3)
        run.values["mu"] = min(cfg.rho * mu, largest_mu)                # mu = rho mu
        end_round(run, distance(w1, w3), [gamma1, gamma2, gamma3], cfg)     # 7: until convergence


@torch.no_grad()
def distance(xs, ys):
    """||x - y|| / ||x|| over two series of tensors."""
    x, y = (nn.utils.parameters_to_vector(series) for series in (xs, ys))
    return float((x - y).norm() / x.norm().clamp_min(1e-15))


def end_round(run, gap, scales, cfg):
    """Log what the round has come to, judge convergence, store it. gap: ||W1 - W3|| / ||W1||;
    scales: [gamma1, gamma2, gamma3], of which the zeros are counted."""
    zeros = []
    for gamma in scales:
        zeros.append(sum(int((g == 0).sum()) for g in gamma))
    # OURS: the paper does not say when. W1 = W3 is not enough, as they start like that: some gammas
    # must be at zero, and as many as a round before. With one task one of W1, W3 rests, so the gap
    # does not close and all rounds are done.
    settled = sum(zeros) > 0 and zeros == run.values.get("zeros")
    run.values["converged"] = gap < cfg.tolerance and settled
    run.values["zeros"] = zeros
    # "mu" is the next round's: train_sparse has raised it already.
    gamma_gap = distance(scales[0], scales[2])
    record = {"gap": gap, "gamma_gap": gamma_gap, "mu": run.values["mu"]}
    note = " ".join(f"{name} {value:.2g}" for name, value in record.items())
    run.end_epoch(note=f" | {note} zeros {zeros}", zeros=zeros, **record)

# ---------------------------------------------------------------------------------------------
# 7. Which channels stay, and the cut: Algorithm 1, lines 9 and 10, and what it is compared with
#
#     mtp             gamma1 and gamma2 after Algorithm 1
#     slimming        gamma3 and gamma2 after segmentation alone (PAPER: Network Slimming)
#     slimming_cls    after classification alone, Eq. (3); the decoder's are the dense ones
#     gammas          the dense network's (OURS: what does the sparse training bring?)
#     uniform         as many in each layer (PAPER Table 2); OURS: those of the largest |gamma|
#     fpgm, thinet    He et al. (PAPER Table 3), Luo et al. (PAPER Table 2)
#
# Line 10 of two layers of a part, four channels each, p = 50 (x: removed, tau between 0.2 and 0.3):
#
#     layer a    0.9  0.0x 0.3  0.8        layer b    0.1x 0.2x 0.0x 0.4
#
# So a layer's width is found, not given. Its gammas must mean the same as those of other layers;
# that is why one alpha pulls all of a part, and why the backbone, which both losses train, and the
# decoder, which l_seg alone trains, have a threshold each.
# ---------------------------------------------------------------------------------------------

SPARSE = ("mtp", "slimming", "slimming_cls")            # methods with a sparse training


@torch.no_grad()
def scores_of(first, last, groups):
    """Line 9: {group name: |gamma| of each channel (C,)}; the backbone's from the network `first`,
    for MTP gamma1 of W1 (PAPER: line 9 names gamma1, not gamma3), the decoder's from `last`.

    OURS: for channels that are added or multiplied, the mean over their makers: the sum would put
    BiSeNet's three-fold channels above all others.
    """
    scores = {}
    for g in groups:
        scales = gammas(first if g.part == "backbone" else last, [g])
        scores[g.name] = torch.stack(scales).abs().mean(0).cpu()
    return scores


def cut_of(n, percentile):
    """How many of n channels go: floor(p N / 100), the same for a layer and for a whole network."""
    return math.floor(percentile * n / 100)


def keep_ranked(scores, percentile, least=0.05):
    """Line 10: the kept channels after removing floor(p N / 100) of the N with one threshold.

    scores: {name: (C,)}; least: share of each layer that stays in any case, at least one channel
    (OURS: an empty layer would cut the network in two); where such a channel would have gone, the
    next in rank goes, so that the total holds. Of equal scores those that come first go first (a
    threshold would remove all of them or none): of too many true zeros, those of the front layers.
    Returns {name: indices}.
    """
    ranked = []
    for score in scores.values():
        order = score.argsort(stable=True)                                  # smallest first
        safe = order[-max(1, math.ceil(least * len(score))):]
        ranked.append(score.double().index_fill(0, safe, math.inf))
    flat = torch.cat(ranked)                                                # (N,)
    count = cut_of(len(flat), percentile)
    removable = int(flat.isfinite().sum())                                  # all but the safe ones
    if count > removable:
        raise InputError(f"--percentile {percentile:g} would remove {count} of {len(flat)} "
                         f"channels, but {least:.0%} of each layer stay, so {removable} at most")
    stays = torch.ones(len(flat), dtype=torch.bool)
    stays[flat.argsort(stable=True)[:count]] = False
    parts = stays.split([len(score) for score in scores.values()])
    return {name: part.nonzero()[:, 0] for name, part in zip(scores, parts)}


def pool_of(cfg):
    """--pool, with auto resolved."""
    if cfg.pool != "auto":
        return cfg.pool
    return "part" if cfg.method in (*SPARSE, "gammas") else "layer"


def kept_channels(scores, groups, cfg):
    """{group name: sorted indices of the channels that stay} by --pool.

    PAPER 3: one threshold for the backbone (tau1) and one for the decoder (tau2), as their gammas
    are optimized alternately; Table 4 tries one for both; one a layer is Uniform.
    """
    pools = {"layer": [[g] for g in groups], "network": [groups],
             "part": [part_of(groups, "backbone"), part_of(groups, "decoder")]}
    kept = {}
    for pool in filter(None, pools[pool_of(cfg)]):
        kept |= keep_ranked({g.name: scores[g.name] for g in pool}, cfg.percentile)
    return kept


def overlap(a, b, groups):
    """(share of the channels kept by `a` that `b` keeps too, the same beyond chance): Cohen's kappa
    for two sets of one size, 0 if they agree as random ones would and 1 if they are the same."""
    def stays(kept):                                                        # (channels,), 0 or 1
        masks = [torch.zeros(g.width).index_fill(0, kept[g.name], 1) for g in groups]
        return torch.cat(masks).double()

    one, other = stays(a), stays(b)
    share = float((one * other).sum() / one.sum())
    chance = float(other.mean())
    return share, (share - chance) / max(1 - chance, 1e-9)


@torch.no_grad()
def fpgm_scores(seg, groups):
    """FPGM (He et al., CVPR 2019): sum of the Euclidean distances of a filter to the others of its
    layer; the smallest lies nearest to the geometric median and is replaceable.

    By layer unless --pool says otherwise; ranked across layers, wide layers with large filters
    score higher (Table 3's sizes of FPGM are not those of uniform widths, so it may have been).
    """
    scores = {}
    for g in groups:
        filters = torch.cat([seg.get_submodule(conv).weight.flatten(1)
                             for conv, _ in g.makers], 1).double().cpu()        # (C, inputs k k)
        scores[g.name] = torch.cdist(filters, filters,
                                     compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    return scores


THINET_IMAGES, THINET_SAMPLES = 64, 10      # pictures; outputs for each channel of a layer


def thinet_samples(conv, x, positions, generator):
    """Terms of the convolution's output at random places, one a channel of its input.

    conv: the layer that reads the channels to be judged; x (B, C, H, W) its input. A sample is one
    output value without bias at a random place and output channel, split into its C summands,
    sum over the kernel of W[o, c] x[c]. Returns (B * positions, C) in float64.
    """
    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator).to(x.device)

    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride) # (B, Ckk, L)
    places = draw(patches.shape[2], len(x), 1, positions)
    patches = patches.gather(2, places.expand(-1, patches.shape[1], -1))    # (B, Ckk, positions)
    patches = patches.transpose(1, 2).unflatten(2, (x.shape[1], -1))    # (B, positions, C, kk)
    filters = conv.weight.flatten(2)[draw(conv.out_channels, len(x), positions)]     # the same
    return (patches.double() * filters.double()).sum(3).flatten(0, 1)


def thinet_layer(terms, n):
    """ThiNet (Luo et al., ICCV 2017) for one layer. terms: (samples, C) of thinet_samples.

    Greedy: the removed set grows by the channel that keeps sum_i (sum_{j removed} terms_ij)^2
    smallest, until n channels stay. Then least squares: factors of those that stay which bring
    their sum closest to the full output. Returns (kept indices, factors (n,)).
    """
    squares = terms.square().sum(0)                                         # (C,)
    stays, total = torch.ones_like(squares).bool(), torch.zeros_like(terms[:, 0])
    for _ in range(terms.shape[1] - n):
        # ||total + t_c||^2 - ||total||^2 for every candidate c
        cost = squares + 2 * total @ terms                                  # (C,)
        least = int(cost.where(stays, math.inf).argmin())
        stays[least], total = False, total + terms[:, least]
    full = terms.sum(1, keepdim=True)                                       # (samples, 1)
    factors = torch.linalg.lstsq(terms[:, stays], full, driver="gelsy").solution
    return stays.nonzero()[:, 0], factors[:, 0]


@torch.no_grad()
def thinet_kept(seg, groups, samples, cfg):
    """ThiNet front to back through the backbone (the size in PAPER Table 2 is that of a dense
    decoder). It asks not how large a channel is but whether the next layer would miss it.

    samples: data.Samples of segmentation; the same pictures on all ranks. Each layer sees what
    those before it have left: weights of removed channels become 0 and those of the others are
    scaled in the layer that reads them, in place. OURS: no training between layers, as all methods
    are fine-tuned alike at the end; on segmentation pictures; ten samples for each unknown (its
    authors take 100,000 a layer).
    """
    kept = {g.name: torch.arange(g.width) for g in groups}
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(samples), generator=generator)[:THINET_IMAGES].tolist()
    pictures = torch.stack([samples[0, i][0] for i in order])               # (n, 3, H, W)
    seg.eval()
    for g in part_of(groups, "backbone"):
        reader, terms = seg.get_submodule(next(iter(g.readers))), []
        positions = math.ceil(THINET_SAMPLES * g.width / len(pictures))
        hook = reader.register_forward_pre_hook(lambda conv, inputs: terms.append(
            thinet_samples(conv, inputs[0], positions, generator).cpu()))
        for images in pictures.split(cfg.batch_size):
            features(seg.backbone, images.to(cfg.device))
        hook.remove()
        left = g.width - cut_of(g.width, cfg.percentile)
        kept[g.name], factors = thinet_layer(torch.cat(terms), left)
        scale = torch.zeros(g.width)
        scale[kept[g.name]] = factors.float()
        reader.weight.mul_(scale.to(cfg.device).view(1, -1, 1, 1))
    return kept


@torch.no_grad()
def recalibrate(net, batches, cfg):
    """BN statistics anew, as plain means over the batches: those of the wide network are wrong, as
    what a removed channel still carried, ReLU(beta) at the least, is missing now."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                            # a mean over all batches, none favoured
    net.train()
    batches.sampler.set_epoch(0)
    for images, _ in batches:
        net(images.to(cfg.device))
    for norm in norms:
        norm.momentum = 0.1
    average_buffers(net)


@torch.no_grad()
def copy_weights(source, target):
    """Parameters only: BN statistics belong to a task."""
    for a, b in zip(source.parameters(), target.parameters()):
        b.copy_(a)


def choose_and_prune(tasks, cfg):
    """Lines 9 and 10 for every method -> (pruned Classifier, pruned Segmenter, kept).

    Both networks lose the same channels. All methods but MTP know one set of weights, so both
    networks take its backbone. MTP keeps two: W1 in the pruned Classifier, W3 in the pruned
    Segmenter. fine_tune trains W1 on classification, then copies it over W3; W3 itself goes on only
    with --cls-epochs 0.
    """
    cls, seg = (task.net for task in tasks)
    groups = groups_of(seg)
    if cfg.method == "thinet":
        kept = thinet_kept(seg, groups, tasks[1].batches.dataset, cfg)
    elif cfg.method == "fpgm":
        kept = kept_channels(fpgm_scores(seg, groups), groups, cfg)
    else:                                               # 9: gamma1, or gamma3 in place of it
        first = cls if cfg.method in ("mtp", "slimming_cls") else seg
        kept = kept_channels(scores_of(first, seg, groups), groups, cfg)
    if cfg.method == "slimming_cls":
        copy_weights(cls.backbone, seg.backbone)
    elif cfg.method != "mtp":
        copy_weights(seg.backbone, cls.backbone)
    small = [prune(net, groups_of(net), kept) for net in (cls, seg)]    # 10: by gamma1, gamma2
    for net, task in zip(small, tasks) if cfg.recalibrate else ():
        recalibrate(net, RoundOf(task.batches, cfg.recalibrate), cfg)
    return *small, kept

# ---------------------------------------------------------------------------------------------
# 8. Training before and after: Eqs. (1) and (2), and fine-tuning (line 11)
#
# The order is the same twice, and it is the paper's point that it matters (Table 1): classification
# first, then segmentation from the backbone that classification has trained.
#
#     before:  W1~ by Eq. (1)  ->  W1*, W2* by Eq. (2)        dense_networks
#     after:   narrow W1 on classification  ->  narrow W1, W2 on segmentation        fine_tune
# ---------------------------------------------------------------------------------------------


def train(stage, task, name, epochs, lr, power, cfg, folder, **about):
    """Train task.net with SGD and the poly schedule, into <folder>/<name>. stage: "dense", once for
    all methods, or "train"; name: cls or seg.

    PAPER 7.1 prints poly with the power inside, 1 - (iter / iter_max)^0.9: a slip, poly means
    (1 - iter / iter_max)^0.9. Power 1 is linear. OURS: the best epoch on val is kept and later
    reported on val; --split test is unseen where a set has one. OURS: prunable gammas decay here
    like other weights. (torchvision's ResNet-50 and -101 come from a newer recipe that spares them,
    not from the one of the paper's time.)
    """
    sgd = torch.optim.SGD(task.net.parameters(), lr, cfg.momentum, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(sgd, epochs * len(task.batches), power)
    run = Run(f"{stage} {name}", stage, cfg, folder / name, epochs, about=about,
              shared=stage == "dense", model=task.net, optimizer=sgd, schedule=schedule)

    def loss_terms(*batch):
        return {"loss": task.loss(*batch)}

    best = common.fit(run, loss_terms, task.batches, task.score)
    print(f"{stage} {name}: best on val {100 * best:.2f}")          # top-1 (Table 7), or mIoU


def start_from(cfg, net, cls_classes):
    """Weights of --backbone for N1, and its head where the classes are as many.

    InputError if the head is left random and Eq. (1) is not solved: its gradients would spoil W1.
    """
    kind, head = NETWORKS[cfg.network], {}
    if cfg.backbone == "imagenet" and kind.deep_stem:
        raise InputError("torchvision has no ImageNet weights for PSPNet's deep stem; give "
                         "--backbone a file, or none with --dense-cls-epochs")
    if cfg.backbone != "none":
        state = (common.classifier(kind.resnet, "imagenet").state_dict()
                 if cfg.backbone == "imagenet" else common.load_state_dict(cfg.backbone))
        head = {key: state.pop(f"fc.{key}") for key in ("weight", "bias") if f"fc.{key}" in state}
        load_weights(net.backbone, state, cfg.backbone)
    if [len(w) for w in head.values()] == [cls_classes] * 2:
        net.head.load_state_dict(head)
    elif not cfg.dense_cls_epochs:
        raise InputError(f"--backbone {cfg.backbone} has no classifier of {cls_classes} classes, "
                         "so that of the first task would start at random; give "
                         "--dense-cls-epochs 1 or more")


def dense_networks(cfg, classes, cls_classes):
    """Both tasks with networks trained the usual way, stored under <out>/dense for every --method.

    OURS: Algorithm 1 starts with W1 = W3 and E = 0: its "initial weights" are those of the trained
    segmentation network, which is to be pruned. The classifier keeps its head and BN statistics.
    """
    out = Path(cfg.out) / "dense"
    torch.manual_seed(cfg.seed)
    cls = place(Classifier(cfg.network, cls_classes), cfg)
    seg = place(Segmenter(cfg.network, classes), cfg)
    start_from(cfg, cls, cls_classes)
    task1, task2 = tasks_of(cls, seg, cfg)
    if cfg.dense_cls_epochs:
        # Eq. (1): W1~ = argmin l_cls(N1(W1, X1), Y1)
        train("dense", task1, "cls", cfg.dense_cls_epochs, cfg.dense_cls_lr, 1.0, cfg, out)
    # Eq. (2): W1*, W2* = argmin l_seg(N2(W1, W2, X2), Y2), W1 from W1~
    seg.backbone.load_state_dict(cls.backbone.state_dict())
    train("dense", task2, "seg", cfg.dense_epochs, cfg.dense_lr, 0.9, cfg, out)
    copy_weights(seg.backbone, cls.backbone)
    return task1, task2


def fine_tune(cfg):
    """Fine-tune the pruned network on classification, then on segmentation (line 11)."""
    folder, path = folder_of(cfg), folder_of(cfg) / "pruned.pt"
    arch = read_arch(arch_path(cfg), classes=open_split(cfg, "train").num_classes,
                     cls_classes=open_cls(cfg, "train").num_classes)
    stored = load_checkpoint(path, ("model", "cls", "settings"))
    common.require_same(stored["settings"], cut_settings(cfg), path)
    cls = place(rebuild(Classifier, arch, stored["cls"], path), cfg)
    seg = place(rebuild(Segmenter, arch, stored["model"], path), cfg)
    task1, task2 = tasks_of(cls, seg, cfg)
    if cfg.cls_epochs:
        train("train", task1, "cls", cfg.cls_epochs, cfg.cls_lr, 0.9, cfg, folder, arch=arch)
        # The weights that classification has trained are where segmentation starts (Table 1).
        seg.backbone.load_state_dict(cls.backbone.state_dict())
    train("train", task2, "seg", cfg.epochs, cfg.lr, 0.9, cfg, folder, arch=arch)
    print(f"in {folder}: cls/, seg/ with best.pt and log.jsonl")
    print(common.next_command(cfg, "mtp", "--eval --bench"))

# ---------------------------------------------------------------------------------------------
# 9. The stages --search, --eval, --bench
#
# Four mIoUs with four names: dense (Eq. 2), sparse (after Algorithm 1, nothing cut), pruned (after
# the cut, before fine-tuning), retrained (after line 11). All files below the run folder, --out:
#
#     <out>/dense/                            the dense networks, shared by all methods: cls/, seg/
#           sparse_<method>.../               the sparse training: last.pt, log.jsonl
#           <method>_<percentile>.../         arch.json, pruned.pt, and fine-tuned: cls/, seg/
# ---------------------------------------------------------------------------------------------


def cut_settings(cfg):
    """What pruned.pt depends on: all that the sparse training does, and how the cut was made."""
    return common.settings_of(cfg, "search", percentile=cfg.percentile, pool=pool_of(cfg))


def variant(cfg):
    return f"{cfg.method}_order{cfg.batch_order}" if cfg.batch_order else cfg.method


def folder_of(cfg):
    """Run folder of one pruned network: another method, percentile or pool is another network."""
    if cfg.arch not in ("", "uniform"):
        return Path(cfg.arch).resolve().parent
    pool = "" if cfg.pool == "auto" else f"_{cfg.pool}"
    table_1 = "" if cfg.cls_epochs else "_without_cls"
    return Path(cfg.out) / f"{variant(cfg)}_{cfg.percentile:g}{pool}{table_1}"


def arch_path(cfg):
    return Path(cfg.arch or folder_of(cfg) / "arch.json")


def search(cfg):
    """Dense networks, Algorithm 1 (or --method), the cut; writes arch.json, pruned.pt."""
    classes = open_split(cfg, "train").num_classes
    cls_classes = open_cls(cfg, "train").num_classes
    groups = groups_of(on_meta(Segmenter, cfg.network, classes))
    folder = folder_of(cfg)
    # A percentile that cannot be is refused here, before hours of training.
    kept_channels({g.name: torch.ones(g.width) for g in groups}, groups, cfg)
    done = folder / "pruned.pt"
    if cfg.resume and done.exists() and (
            load_checkpoint(done, ("settings",))["settings"] == cut_settings(cfg)):
        print(f"{cfg.method}: cut already, {done}", flush=True)
        return
    tasks = dense_networks(cfg, classes, cls_classes)
    # The dense network has an arch.json like all others, so that --eval --arch serves it too.
    arch = {"network": cfg.network, "classes": classes, "cls_classes": cls_classes,
            "widths": {g.name: g.width for g in groups}}
    common.write_json(Path(cfg.out) / "dense" / "arch.json", arch)
    if cfg.method in SPARSE:
        sparse_stage(tasks, groups, cfg)
    # ThiNet works in place, so the wide networks are scored before anything is cut.
    wide = [task.score(task.net) for task in tasks]
    *small, kept = choose_and_prune(tasks, cfg)
    pruned = [task.score(net) for task, net in zip(tasks, small)]
    arch |= {"widths": {name: len(indices) for name, indices in kept.items()},
             "method": cfg.method, "percentile": cfg.percentile, "pool": pool_of(cfg)}
    store_cut(folder, arch, small, kept, cfg)
    report_cut(cfg, folder, groups, kept, wide, pruned)
    barrier()


def store_cut(folder, arch, small, kept, cfg):
    """arch.json and pruned.pt. What was fine-tuned from an older cut is void and goes."""
    for name in ("cls", "seg"):
        shutil.rmtree(folder / name, ignore_errors=True)
    common.write_json(folder / "arch.json", arch)
    with common.replacing(folder / "pruned.pt") as temporary:
        torch.save({"cls": small[0].state_dict(),
                    "model": small[1].state_dict(),
                    "kept": kept,
                    "settings": cut_settings(cfg)}, temporary)


def sparse_stage(tasks, groups, cfg):
    """Lines 1 to 7 by --method, with both tasks or one; reports before and after."""
    task1, task2 = (
        task._replace(batches=RoundOf(task.batches, cfg.inner_steps, cfg.batch_order))
        for task in tasks)
    inner, outer = part_of(groups, "backbone"), part_of(groups, "decoder")
    dense = scores_of(task2.net, task2.net, groups)
    if cfg.method != "slimming":
        report_dose("gamma1", task1, 1.0, inner, cfg.alpha1, cfg.search_cls_lr, cfg)
    if cfg.method != "slimming_cls":
        report_dose("gamma3", task2, cfg.lam, inner, cfg.alpha2, cfg.search_lr, cfg)
        report_dose("gamma2", task2, cfg.lam, outer, cfg.alpha2, cfg.search_lr, cfg)
    train_sparse(task1, task2, groups, cfg, Path(cfg.out) / f"sparse_{variant(cfg)}")
    first = task2.net if cfg.method == "slimming" else task1.net
    report_gammas(dense, scores_of(first, task2.net, groups))


def report_dose(name, task, weight, groups, alpha, lr, cfg):
    """Before the sparse training: can the l1 term bring a gamma to zero, and will it spare some?
    Prints the dose and |dl/dgamma| (section 6), the mean over 50 batches, and warns. weight: of the
    task's loss in Eq. (4), 1 or lambda."""
    net = copy.deepcopy(task.net).train()
    scales, mean, count = gammas(net, groups), 0, min(50, cfg.inner_steps)
    task.batches.sampler.set_epoch(0)
    for images, labels in itertools.islice(task.batches, count):
        loss = weight * task.loss(net, *common.to_device(images, labels, cfg))
        mean = mean + torch.cat(torch.autograd.grad(loss, scales)) / count  # (channels,)
    mean = sum_over_ranks(mean) / world_size()
    quantiles = mean.abs().quantile(mean.new_tensor([0.1, 0.5, 0.9, 0.99])).tolist()
    size = float(torch.cat(scales).detach().abs().mean())
    steps = cfg.rounds * cfg.inner_steps
    # the sum of lr alpha / (1 - m) over all steps, of a rate that falls linearly to 0
    dose = cfg.gamma_rate * lr * (steps + 1) / 2 * alpha / (1 - cfg.momentum)
    print(f"{name}: mean {size:.3f}, dose {dose:.3g}; |dl/dgamma| over {count} batches at 10, 50, "
          f"90, 99%: {', '.join(f'{q:.1e}' for q in quantiles)}; alpha {alpha:.1e}")
    if dose < size:
        print(f"warning: the l1 term can move a {name} by {dose:.2g} in all, not from {size:.2g} "
              "to 0; raise --gamma-rate, --inner-steps or --rounds")
    if alpha > quantiles[2]:
        print("warning: alpha is above the gradients of 90% of the channels, which may go to zero "
              "together; lower it and raise --gamma-rate")


def report_gammas(dense, sparse):
    """After the sparse training: true zeros, mean and spread of the gammas, layer by layer."""
    print(f"{'layer':30s} zeros   mean  std/mean, dense -> sparse")
    for name, gamma in sparse.items():
        zeros = (gamma == 0).double().mean()
        before = dense[name].std() / dense[name].mean().clamp_min(1e-12)
        after = gamma.std() / gamma.mean().clamp_min(1e-12)
        print(f"{name:30s} {zeros:5.2f} {gamma.mean():6.3f}  {before:.3f} -> {after:.3f}")


def report_cut(cfg, folder, groups, kept, wide, pruned):
    """What was removed, what that brings, and what other methods chose. wide, pruned: [top-1, mIoU]
    before the cut and after.

    Two methods differ only if they agree less than each does with itself under another
    --batch-order.
    """
    for part in ("backbone", "decoder"):
        rows = part_of(groups, part)
        print(f"{part}: {sum(len(kept[g.name]) for g in rows)} of {sum(g.width for g in rows)} "
              "prunable channels stay")
        for path in sorted(Path(cfg.out).glob("*/pruned.pt")):
            other, name = load_checkpoint(path, ("kept",))["kept"], path.parent.name
            if path.parent != folder and all(g.name in other for g in groups):
                share, kappa = overlap(kept, other, rows)
                print(f"  of them {name} keeps {share:.3f} (kappa {kappa:.2f})")
    # Where task 1 was not trained, its top-1 is that of segmentation's backbone below the old head.
    kind = "sparse" if cfg.method in ("mtp", "slimming") else "dense"
    print(f"{cfg.method}, before fine-tuning: {kind} mIoU {100 * wide[1]:.2f}, pruned mIoU "
          f"{100 * pruned[1]:.2f}; top-1 before the cut {100 * wide[0]:.2f}, after it "
          f"{100 * pruned[0]:.2f}")
    common.draw_bars(folder / "channels.png", f"{folder.name}: channels that stay (Figure 5)",
                     {g.name: (len(kept[g.name]), g.width) for g in groups})
    log_record(folder, stage="search", wide=wide, pruned=pruned)
    print(f"in {folder}: arch.json, pruned.pt, channels.png")
    print(common.next_command(cfg, "mtp", "--train --eval"))


def restore(cfg, images):
    """The trained Segmenter in eval mode, for these pictures."""
    path = Path(cfg.weights or folder_of(cfg) / "seg" / "best.pt")
    arch = read_arch(arch_path(cfg), classes=images.num_classes)
    net = rebuild(Segmenter, arch, load_checkpoint(path)["model"], path)
    return place(deployed(net), cfg)


def evaluate_network(cfg):
    """mIoU of a trained network at the label's own resolution, and pictures."""
    images, loader = open_loader(cfg, cfg.split)
    folder, net = folder_of(cfg), restore(cfg, images)
    forward = torch.compile(net) if cfg.compile else net
    matrix = evaluate(forward, loader, images.num_classes, cfg, cfg.eval_scales)
    kind = "dense" if folder.name == "dense" else "retrained"
    # Into the training's own folder: when it is trained anew, what was measured goes with it.
    common.report_segmentation(folder.name, kind, matrix, images, cfg,
                               folder if cfg.weights else folder / "seg")
    common.draw_segmentations(net, images, cfg, folder)


def uniform_widths(net, percentile):
    return {g.name: g.width - cut_of(g.width, percentile) for g in groups_of(net)}


def bench(cfg):
    """Parameters, conv MACs and measured latency, dense beside pruned.

    Of every pruned network in this --out, or of --arch; mIoU of those that --eval has seen.
    """
    if rank() > 0:
        return
    paths = sorted(Path(cfg.out).glob("*/arch.json"))
    if cfg.arch:
        paths = [] if cfg.arch == "uniform" else [Path(cfg.arch).resolve()]
    paths = {path.parent.name: path for path in paths}
    arches = {name: read_arch(path) for name, path in paths.items()}
    kinds = {(a["network"], a["classes"]) for a in arches.values()} or {(cfg.network, 21)}
    if len(kinds) > 1:
        raise InputError(f"{cfg.out} holds networks of several kinds; name one by --arch")
    dense = deployed(Segmenter(*kinds.pop()))                   # latency needs no trained weights
    widths = {name: arch["widths"] for name, arch in arches.items()}
    if cfg.arch == "uniform":
        widths = {f"uniform, {cfg.percentile:g}% cut": uniform_widths(dense, cfg.percentile)}
    nets = {"dense": dense} | {name: with_widths(dense, w) for name, w in widths.items()}
    about, rows = latency.compare(nets, cfg.frame, cfg)
    print("beside the dense network:")
    for name, row in rows.items():
        shown = [f"{key} {row[key] / rows['dense'][key]:.3f}"
                 for key in ("params", "conv_macs", "median_ms")]
        for record in common.read_log(paths.get(name, Path()).parent / "seg", "eval"):
            row["miou"] = record["miou"]
            shown.append(f"mIoU {100 * row['miou']:.2f}")
        print(f"{name:28s} " + ", ".join(shown))
    compare_with_paper()
    latency.write_bench(cfg, about, rows)


# What the paper prints (Tables 2, 3): network, classes, picture, channels kept, decoder too, M, G.
PAPER_SIZES = (("deeplabv3_resnet101", 19, (720, 1080), 1, True, 58.04, 201.88),
               ("deeplabv3_resnet101", 21, (513, 513), 1, True, 58.04, 71.52),
               ("deeplabv3_resnet101", 21, (513, 513), 0.75, True, 40.18, 49.70),
               ("deeplabv3_resnet101", 21, (513, 513), 0.5, False, 32.88, 39.55),
               ("bisenet_resnet18", 19, (1024, 2048), 1, True, 12.89, 104.27),
               ("pspnet_resnet50", 21, (513, 513), 1, True, 46.71, 190.43))


def sizes(network, classes, frame, share, decoder):
    """(parameters, conv MACs) of a network of uniform widths as it is deployed, on the meta device;
    decoder: whether that is pruned too."""
    net = deployed(on_meta(Segmenter, network, classes))
    widths = {name: n for name, n in uniform_widths(net, 100 * (1 - share)).items()
              if decoder or name.startswith("backbone")}
    net = with_widths(net, widths)
    return count_params(net), count_macs(net, frame)


def compare_with_paper():
    """Sizes that do not depend on training, ours beside the paper's. Its counts are up to 1.1%
    larger, so they seem to include BN, ReLU and pooling; ours are of convolutions. Slips of the
    paper: 31.16 M in Table 3 is 0.54x of the dense network, not 0.56x; its 201.88 G are not of
    2048x1024, as its footnote says, but of Table 4's 1080x720; Slimming-Ind in Table 4 drops by
    2.36."""
    print("sizes, ours | paper (Tables 2 and 3)")
    for network, classes, frame, share, decoder, m, g in PAPER_SIZES:
        params, macs = sizes(network, classes, frame, share, decoder)
        what = f"{share}x" if decoder else f"{share}x, backbone only"
        print(f"  {network:20s} {'x'.join(map(str, frame)):9s} {what:19s} {params:11,d} "
              f"{macs / 1e9:10.6f} G | {m} M {g} G")

# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------


STAGES = {"search": search, "train": fine_tune, "eval": evaluate_network, "bench": bench}


def main(argv=None):
    stages, cfg = common.parse_args(Config, "mtp", STAGES, QUICK, __doc__, argv)
    common.setup(cfg)
    if cfg.method in ("uniform", "thinet") and pool_of(cfg) != "layer":
        raise InputError(f"--method {cfg.method} chooses within each layer; leave out --pool")
    if "eval" in stages:
        open_split(cfg, cfg.split)                          # missing? say so before hours of search
    if stages & {"search", "train"}:                        # BN sees one value a picture
        common.check_batch("cls-batch", cfg.cls_batch, len(open_cls(cfg, "train")))
        common.check_batch("batch-size", cfg.batch_size, len(open_split(cfg, "train")))
    common.run_stages(STAGES, stages, cfg)
    if cfg.export:
        net = restore(cfg, open_split(cfg, cfg.split))
        common.export(net, cfg.frame, cfg.export)


if __name__ == "__main__":
    common.run_main(main)
