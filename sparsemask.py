r"""SparseMask: learn which connections of a densely connected decoder to keep.

    Wu, Zhang, Huang: SparseMask: Differentiable Connectivity Learning for Dense Image Prediction.
    ICCV 2019. Section, equation and table numbers below are the paper's.

The idea in five lines:
  1. A pre-trained classifier, cut into L stages, is the encoder; its features are E_1 .. E_L and G.
  2. A decoder of L stages D_L .. D_1 reads everything that is not finer: the Fully Dense Network.
  3. Each connection has a weight w in [0, 1]; a loss makes the weights binary, and few of them 1.
  4. Connections with w < sigma go, then stages without input or without reader.
  5. The small network that is left is trained anew, or moved to other encoders, data and tasks.

    image -> [E1 1/2] -> [E2 1/2] -> [E3 1/4] -> .. -> [E9 1/32] -> (G 1x1)
                |            |           |                 |          |
                v            v           v                 v          v      every D_l may read
    mask  <- [D1 1/2] <- [D2 1/2] <- [D3 1/4] <- .. <- [D9 1/32] <----+      E_i (i >= l),
                                                                             D_i (i > l) and G

    paper              here                                meaning
    E_l, G, D_l        "E9", "G", "D9"                     features of encoder and decoder, 1 finest
    T_l                sources(l, L)                       what D_l may read, 2 (L - l + 1) features
    conv_l^t, bn_l^t   Decoder.conv[t], .link_norm[t]      of all readers of t, side by side
    w_l^t              FullyDenseNet.w[D_l]                importance of a connection
    f_up               resize                              bilinear up-sampling
    L_s, L_m, mu       sparse_loss, cross, mean            Eq. (2)
    alpha_l, lambda    alpha(l, L), cfg.lam                Eq. (5), Eq. (3)
    sigma              cfg.sigma                           pruning threshold, Section 3.3

    python sparsemask.py --search                1.3 minutes, 0.7 GiB on two CPU cores
    python sparsemask.py --train --eval          1.5 minutes: the found network, retrained, 53 mIoU
    python sparsemask.py --bench                 10 seconds: Table 1's decoders, exact counts
"""
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.func import functional_call

import common
import data
import latency
from common import (BaseConfig, InputError, autocast, count_macs, count_params, cross_entropy,
                    evaluate, fit, load_checkpoint, load_weights, log_record, opt, place,
                    rank, world_size)
from data import IGNORE, torchvision

# ---------------------------------------------------------------------------------------------
# 1. Settings. Defaults are the paper's; the tag says where it says so.
# ---------------------------------------------------------------------------------------------

LOSSES = ("ours", "binary", "sparse", "task", "l1", "maskconnect")


@dataclass
class Config(BaseConfig):
    size: tuple[int, int] = opt((513, 513), "training crop, H W in pixels (PAPER 4.1)")
    scales: tuple[float, float] = opt((0.5, 2.0), "range of the random scale, drawn uniformly "
                                      "(PAPER 4.1; OFFICIAL-CODE draws steps of 0.25); edges are "
                                      "augmented as HED does it")
    batch_size: int = opt(16, "images a training step, over all processes (PAPER 4.1)")
    epochs: int = opt(50, "epochs of a pruned network or baseline (PAPER 4.1)")
    search_epochs: int = opt(50, "epochs of the Fully Dense Network (PAPER 4.1)")
    encoder: str = opt("mobilenet_v2", "classifier that becomes the encoder (PAPER 4.1, 5.1)",
                       ("mobilenet_v2", "vgg16", "resnet50", "resnet101"))
    weights_encoder: str = opt("imagenet", "none, imagenet (torchvision's, downloaded) or a file")
    width: int = opt(64, "channels of every decoder stage (OFFICIAL-CODE)")
    lam: float = opt(0.01, "lambda of Eq. (3) (PAPER 4.1)")
    sigma: float = opt(0.001, "connections with w below it are dropped (PAPER 4.1)")
    dataset: str = opt("synthetic", "where images come from",
                       tuple(dict.fromkeys(sum(data.TASK_SETS.values(), ()))))
    loss: str = opt("ours", "what drives w besides the task loss: ours = Eq. (2), its binary or "
                    "sparse part alone, task = nothing (Table 1); l1, maskconnect (Figure 4)",
                    LOSSES)
    l1: float = opt(5e-3, "strength of --loss l1 (PAPER 4.2: 1e-3, 5e-3, 1e-2)")
    k: int = opt(2, "inputs of every stage with --loss maskconnect (PAPER 4.2: 2 to 5)")
    bn: bool = opt(True, "BN on every connection, Eq. (4); --no-bn is the ablation of 4.2")
    w_range: str = opt("paper", "paper: w in [0, 1]; release: noisy w in [0, 2], halved in the "
                       "loss and for pruning", ("paper", "release"))
    simplify: bool = opt(False, "after the paper's rules, drop duplicate and subset stages "
                         "(OFFICIAL-CODE)")
    lr_encoder: float = opt(0.005, "SGD, encoder (PAPER 4.1)")
    lr_decoder: float = opt(0.05, "SGD, decoder (PAPER 4.1)")
    lr_w: float = opt(0.0, "SGD, w; 0 = the decoder's (OFFICIAL-CODE)")
    momentum: float = opt(0.9, "of SGD (PAPER 4.1)")
    weight_decay: float = opt(4e-5, "of SGD (PAPER 4.1), on w too (OFFICIAL-CODE)")
    poly: float = opt(0.9, "lr = lr0 (1 - step / steps)^poly (PAPER 4.1, power OFFICIAL-CODE)")
    bn_momentum: float = opt(0.0, "of running BN statistics; 0 = 3e-4 (OFFICIAL-CODE), or "
                             "10 / steps where that is more (OURS: a short run would never get "
                             "away from the initial statistics)")
    task: str = opt("segmentation", "what is predicted (PAPER 5.3)",
                    ("segmentation", "saliency", "edges"))
    network: str = opt("found", "what --train, --eval and --export work on: found is --arch",
                       ("found", "released", "unet", "sparseacn", "fdn", "random", "random_rule",
                        "fcn", "deeplabv3"))
    arch: str = opt("", "arch.json, or the release's mask as .npy [<out>/arch.json]")
    init: str = opt("", "checkpoint to start --train from: the later steps of 5.1")
    weights: str = opt("", "checkpoint for --eval and --export [<out>/<network>/best.pt]")
    train_split: str = opt("", "split for --train [trainval of bsds500, else train]; voc has "
                           "trainvoc and trainval for the later steps of 5.1")
    split: str = opt("", "split for --eval [test of msra_b and bsds500, else val]")
    eval_scales: tuple[float, ...] = opt((1.0,), "scales for --eval, averaged (PAPER 5.1)")
    flip: bool = opt(False, "average over mirrored pictures in --eval (PAPER 5.1)")
    thresholds: int = opt(99, "thresholds of the edge scores, as in the benchmark")
    frame: tuple[int, int] = opt((512, 512), "picture H W of the latency (PAPER Table 1)")
    beside: str = opt("", "arch.json of another search, drawn beside this one as in Figure 5")
    export: str = opt("", "after the other stages, write the network as a torch.export program")


# Minutes on two cores. Two hundred steps cannot make w binary with the paper's lambda and learning
# rate, so the quick preset takes larger ones (OURS). Its encoder is untrained, so do not read much
# into what it finds: G, for one, says nothing before the encoder has learned something.
QUICK = dict(size=(64, 128), batch_size=8, epochs=8, search_epochs=4, weights_encoder="none",
             lam=0.1, lr_w=0.25, lr_encoder=0.05, frame=(128, 256), scales=(0.75, 1.5),
             thresholds=19)

# ---------------------------------------------------------------------------------------------
# 2. Connectivities: {"D8": ("E9", "G"), ...}, deepest stage first
# ---------------------------------------------------------------------------------------------

# Strides of E_1 .. E_L, and their channels.
ENCODERS = {
    "mobilenet_v2": ((2, 2, 4, 8, 16, 16, 32, 32, 32), (32, 16, 24, 32, 64, 96, 160, 320, 1280)),
    "vgg16": ((2, 4, 8, 16, 32), (64, 128, 256, 512, 512)),
    "resnet50": ((2, 4, 8, 16, 32), (64, 256, 512, 1024, 2048)),
    "resnet101": ((2, 4, 8, 16, 32), (64, 256, 512, 1024, 2048))}


def sources(l, L):
    """T_l of Eq. (1), 2 (L - l + 1) names: E_l .. E_L, G, D_L .. D_{l+1}."""
    return (*(f"E{i}" for i in range(l, L + 1)), "G", *(f"D{i}" for i in range(L, l, -1)))


def fully_dense(L):
    """Every connection of Eq. (1); 2^{L (L + 1)} subsets."""
    return {f"D{l}": sources(l, L) for l in range(L, 0, -1)}


def unet(L):
    """D_l reads E_l and D_{l+1}; the deepest stage reads E_L only (no G)."""
    return {f"D{l}": (f"E{l}", f"D{l + 1}")[:1 + (l < L)] for l in range(L, 0, -1)}


def sparse_acn(L):
    """Of T_l in the order above, what lies 1, 2, 4, 8, 16 places back from the newest.

    OURS: the only simple logarithmic pattern that gives Table 1's 0.72 M parameters.
    """
    return {stage: tuple(t for i, t in enumerate(found) if len(found) - i in (1, 2, 4, 8, 16))
            for stage, found in fully_dense(L).items()}


def drop_useless(connectivity):
    """Rules (2) and (3) of Section 3.3, until nothing changes: stages without input go, stages that
    nobody reads go. D_1 is read by the classifier. {} if nothing reaches D_1."""
    while True:
        read = {t for found in connectivity.values() for t in found} | {"D1"}
        kept = {stage: tuple(t for t in found if t[0] != "D" or connectivity.get(t))
                for stage, found in connectivity.items() if found and stage in read}
        if kept == connectivity:
            return kept
        connectivity = kept


def in_order(names):
    """Names of features as T_l lists them: E from fine to deep, G, D from deep to fine."""
    return tuple(sorted(names, key=lambda t: ("EGD".index(t[0]),
                                              int(t[1:] or 0) * (-1 if t[0] == "D" else 1))))


def drop_repeated(connectivity):
    """The release's two passes after the paper's rules (OFFICIAL-CODE); D_1 is exempt.

    Duplicates: of stages with the same inputs the deepest survives, for the others' readers too.
    Subsets: a deeper stage goes if a finer one has all of its inputs and all of its readers.
    """
    kept = {stage: set(found) for stage, found in connectivity.items()}
    inner = [stage for stage in kept if stage != "D1"]                      # deepest first

    def readers(stage):
        return {reader for reader, found in kept.items() if stage in found}

    def drop(stage, heir=None):
        for reader in readers(stage):
            kept[reader] = kept[reader] - {stage} | ({heir} if heir else set())
        del kept[stage]

    for i, deep in enumerate(inner):
        for fine in inner[i + 1:]:
            if deep in kept and fine in kept and kept[deep] == kept[fine]:
                drop(fine, heir=deep)
    for i, fine in reversed(list(enumerate(inner))):
        for deep in inner[:i]:
            if (deep in kept and fine in kept and kept[deep] <= kept[fine]
                    and readers(deep) <= readers(fine)):
                drop(deep)
    return {stage: in_order(found) for stage, found in kept.items()}


def check_connectivity(value, L, where):
    """A connectivity read from outside, in the order used here; InputError says what is wrong."""
    known = fully_dense(L)
    if not isinstance(value, dict) or not all(isinstance(v, (list, tuple)) for v in value.values()):
        raise InputError(f"{where} is not a connectivity: stages with lists of their inputs, such "
                         'as {"D1": ["E1", "G"]}, are expected')
    for stage, found in value.items():
        if stage not in known:
            raise InputError(f"{where}: there is no decoder stage {stage}; this encoder has "
                             f"D{L} to D1")
        for t in found:
            if t not in known["D1"] and t != "D1":
                raise InputError(f"{where}: {stage} reads {t}, but there are only E1 to E{L}, G "
                                 f"and D{L} to D1")
            if t not in known[stage]:
                raise InputError(f"{where}: {stage} cannot read {t}: inputs may not be finer than "
                                 "the stage, and a decoder stage read by itself or by a deeper "
                                 "one would close a cycle")
            if t[0] == "D" and not value.get(t):
                raise InputError(f"{where}: {stage} reads {t}, which has no inputs")
    if not value.get("D1"):
        raise InputError(f"{where}: nothing reaches D1, which the classifier reads; give it inputs")
    read = {t for found in value.values() for t in found} | {"D1"}
    useless = [stage for stage in value if stage not in read or not value[stage]]
    if useless:
        raise InputError(f"{where}: {useless[0]} has no inputs or no reader; leave it out")
    return {stage: in_order(set(value[stage])) for stage in known if stage in value}


def from_release_mask(mask, where):
    """The release's bool mask (L, L, 2) -> connectivity.

    Row r is stage D_{L-r}; [r, c, 0] is E_{L-c}, [r, 0, 1] is G, [r, c, 1] is D_{L+1-c}.
    """
    if mask.ndim != 3 or mask.dtype != bool or mask.shape != (len(mask), len(mask), 2):
        raise InputError(f"{where} is not a mask of the release: {mask.dtype} of shape "
                         f"{mask.shape}, expected bool (L, L, 2)")
    L = len(mask)
    found = {f"D{L - r}": [f"E{L - c}" if kind == 0 else "G" if c == 0 else f"D{L + 1 - c}"
                           for c, kind in np.argwhere(mask[r])] for r in range(L)}
    return check_connectivity({stage: names for stage, names in found.items() if names}, L, where)


def read_connectivity(path):
    """(encoder name, connectivity) of an arch.json or of the release's .npy mask."""
    if str(path).endswith(".npy"):
        try:
            mask = np.load(path)                        # allow_pickle is False by default
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"cannot read the mask {path} ({error})")
        if len(np.shape(mask)) and len(mask) != len(ENCODERS["mobilenet_v2"][0]):
            raise InputError(f"{path} is a mask of shape {mask.shape}; MobileNet-V2's is (9, 9, 2)")
        return "mobilenet_v2", from_release_mask(np.asarray(mask), path)
    value = common.read_json(path, "arch.json")
    if not isinstance(value, dict) or value.get("encoder") not in ENCODERS:
        raise InputError(f"{path} does not name its encoder ({', '.join(ENCODERS)}); run --search")
    L = len(ENCODERS[value["encoder"]][0])
    return value["encoder"], check_connectivity(value.get("connectivity"), L, path)


def transfer(connectivity, old, new):
    """Section 5.1: the connectivity for another encoder, features matched by spatial size.

    old, new: strides of the encoders' features. A size may have several features in one encoder
    and fewer in the other: counted from the deepest of that size, the k-th goes to the k-th, or to
    the last there is (OURS; D_1 goes to D_1, which the classifier reads). A decoder stage whose
    place is missing, or taken by a deeper one, is dropped.
    """
    def place(l):
        deeper = sum(stride == old[l - 1] for stride in old[l:])
        same = [i for i, stride in enumerate(new, 1) if stride == old[l - 1]][::-1]
        return same[min(deeper, len(same) - 1)] if same else None

    stages = {"D1": "D1"}                                   # old stage -> new stage
    for stage in connectivity:                              # deepest first
        target = place(int(stage[1:]))
        if stage != "D1" and target and f"D{target}" not in stages.values():
            stages[stage] = f"D{target}"

    def renamed(t):
        if t[0] == "E":
            return f"E{place(int(t[1:]))}" if place(int(t[1:])) else None
        return t if t == "G" else stages.get(t)

    moved = {}
    for stage, found in connectivity.items():
        if stage in stages:
            readable = sources(int(stages[stage][1:]), len(new))
            moved[stages[stage]] = in_order({renamed(t) for t in found} & set(readable))
    return drop_useless(moved)


def random_connectivity(L, generator, rule=False):
    """A random subset of all connections, pruned by Section 3.3's rules.

    rule: as in Section 4.2, all but the last decoder stage read a part of {E_l, G} only.
    """
    while True:
        found = {stage: tuple(t for t in names if torch.rand((), generator=generator) < 0.5
                              and (not rule or stage == "D1" or t in ("G", "E" + stage[1:])))
                 for stage, names in fully_dense(L).items()}
        if kept := drop_useless(found):
            return kept


# The release's, 15 connections. Figure 3 draws it without E8 -> D1; the 0.56 M need all 15.
CONNECTIVITIES = {
    "released": {"D8": ("E9", "G"), "D7": ("E7", "G"), "D6": ("E6", "G"),
                 "D1": ("E1", "E6", "E7", "E8", "E9", "G", "D8", "D7", "D6")},
    "unet": unet(9), "sparseacn": sparse_acn(9), "fdn": fully_dense(9)}


def named_connectivity(name, encoder):
    """A key of CONNECTIVITIES for any encoder: the patterns anew, the released one transferred."""
    patterns = {"unet": unet, "sparseacn": sparse_acn, "fdn": fully_dense}
    strides = ENCODERS[encoder][0]
    if name in patterns:
        return patterns[name](len(strides))
    return transfer(CONNECTIVITIES[name], ENCODERS["mobilenet_v2"][0], strides)

# ---------------------------------------------------------------------------------------------
# 3. Networks: encoder (3.1.1), decoder (3.1.2), search form and pruned form, baselines
# ---------------------------------------------------------------------------------------------


def resize(x, size):
    """f_up: bilinear, align_corners (OFFICIAL-CODE). A 1x1 map becomes a constant one.

    Linear along each axis, so f_up(x) = A x B^T. In training, where much is enlarged, this form is
    taken: on a CPU forward and backward of F.interpolate take two to four times as long.
    """
    if x.shape[-2:] == size:
        return x
    if x.shape[-2:] == (1, 1):
        return x.expand(*x.shape[:2], *size)
    if torch.is_grad_enabled() and size[0] >= 4 * x.shape[-2]:
        a, b = (ramp(n, m).to(x) for n, m in zip(x.shape[-2:], size))
        with torch.autocast(x.device.type, enabled=False):
            return a @ (x @ b.T)
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def ramp(n, m):
    """(m, n): row i holds the weights of n equidistant samples at the i-th of m places, corners on
    corners; float64."""
    place = torch.linspace(0, n - 1, m, dtype=torch.float64)[:, None]
    return (1 - (place - torch.arange(n)).abs()).clamp(min=0)


class Encoder(nn.Module):
    """A torchvision classifier without its head: images (B, 3, H, W) -> {"E1": .., "EL": .., "G"}.

    E_l has stride ENCODERS[name][0][l - 1]; G is the global average of E_L. On MobileNet-V2, E_1
    and E_9 are taken before their activation (OFFICIAL-CODE), which the decoder applies. A stage
    of VGG16 ends with its pooling, so that the five strides are those of Figure 6 (OURS).
    weights: as common.classifier. dilate: the last halving is left out, for DeepLab-V3. last: the
    deepest stage that is read; what lies beyond is kept, as the paper counts it, but neither run
    nor trained. G needs all stages.
    """

    def __init__(self, name, weights="none", dilate=False, last=None):
        super().__init__()
        net = common.classifier(name, weights)
        if name == "mobilenet_v2":
            f = net.features
            second = nn.Sequential(nn.ReLU6(), f[1])        # not in place: it would change E_1
            cuts = [nn.Sequential(f[0][0], f[0][1]), second, f[2:4], f[4:7], f[7:11], f[11:14],
                    f[14:17], f[17:18], nn.Sequential(f[18][0], f[18][1])]
        elif name == "vgg16":
            cuts = [net.features[a:b] for a, b in ((0, 5), (5, 10), (10, 17), (17, 24), (24, 31))]
        else:
            cuts = [nn.Sequential(net.conv1, net.bn1, net.relu),
                    nn.Sequential(net.maxpool, net.layer1), net.layer2, net.layer3, net.layer4]
        self.stages = nn.ModuleList(cuts)
        self.strides, self.channels = ENCODERS[name]
        self.act = nn.ReLU6() if name == "mobilenet_v2" else nn.ReLU()
        self.last = last or len(cuts)
        self.stages[self.last:].requires_grad_(False)       # DDP would wait for their gradients
        if dilate:
            undo_stride([s for s, stride in zip(cuts, self.strides) if stride == 32])

    def forward(self, images):
        features, x = {}, images
        for l, stage in enumerate(self.stages[:self.last], 1):
            x = features[f"E{l}"] = stage(x)
        if self.last == len(self.stages):
            features["G"] = x.mean((2, 3), keepdim=True)
        return features


def undo_stride(stages):
    """Stride 2 becomes 1, and the 3x3 convolutions behind it look twice as far."""
    undone = False
    for module in (m for stage in stages for m in stage.modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride, undone = (1, 1), True
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and undone:
            module.dilation = module.padding = (2, 2)
        elif isinstance(module, nn.MaxPool2d):              # VGG16: nothing comes behind it
            module.kernel_size, module.stride, module.padding = 3, 1, 1


class Decoder(nn.Module):
    """Eqs. (1) and (4) for any connectivity: features {"E1": .., "G": ..} -> D_1 (B, width, h, w).

    Theorem 2: 1x1 convolution and up-sampling commute, so all convolutions run at the resolution
    of their input. As they do not depend on the reader's resolution, one convolution serves all
    readers of a feature, its output channels side by side. Up-sampling is linear: what has one
    resolution is summed first, and up-sampled once.

    search: with bn_l^t and, in forward, w_l^t. OFFICIAL-CODE, where the paper is silent: every
    input passes `act` first, and one BN a stage follows the sum and stays after pruning.
    """

    def __init__(self, connectivity, channels, act, width=64, search=False, bn=True):
        """channels: dict name of an encoder feature -> channels."""
        super().__init__()
        self.connectivity, self.act, self.width = connectivity, act, width
        self.readers = {}                       # feature -> [(stage, position among its inputs)]
        for stage, found in connectivity.items():
            for j, t in enumerate(found):
                self.readers.setdefault(t, []).append((stage, j))
        channels = {**channels, **dict.fromkeys(connectivity, width)}
        # Theorem 1: a convolution of concatenated features is a sum of convolutions.
        self.conv = nn.ModuleDict({
            t: nn.Conv2d(channels[t], width * len(readers), 1, bias=False)
            for t, readers in self.readers.items()})
        self.link_norm = nn.ModuleDict({
            t: nn.BatchNorm2d(conv.out_channels) for t, conv in self.conv.items() if search and bn})
        self.norm = nn.ModuleDict({stage: nn.BatchNorm2d(width) for stage in connectivity})

    def channels_of(self, t, stage):
        """The output channels of conv[t] that go to this stage."""
        place = self.width * [reader for reader, _ in self.readers[t]].index(stage)
        return slice(place, place + self.width)

    def links(self, t, x, w):
        """The feature x, named t, on its way to each reader: {stage: (B, width, h, w)}."""
        z, readers = self.conv[t](self.act(x)), self.readers[t]
        if w is not None:
            scale = torch.stack([w[stage][j] for stage, j in readers]).repeat_interleave(self.width)
            if t in self.link_norm:         # w bn(z) is a BN with w times its affine parameters
                norm = self.link_norm[t]
                z = functional_call(norm, {"weight": norm.weight * scale,
                                           "bias": norm.bias * scale}, z)
            else:
                z = z * scale[:, None, None]
        return {stage: part for (stage, _), part in zip(readers, z.split(self.width, 1))}

    def forward(self, features, w=None):
        """w: {stage: (|T_l|,)}, or None for the pruned form."""
        features, links = dict(features), {}
        for stage, found in self.connectivity.items():
            sums = {}                                       # resolution -> sum over T_l
            for t in found:
                if t not in links:
                    links[t] = self.links(t, features[t], w)
                part = links[t].pop(stage)
                size = part.shape[-2:]
                sums[size] = sums[size] + part if size in sums else part
            size = features["E" + stage[1:]].shape[-2:]
            features[stage] = self.norm[stage](sum(resize(part, size) for part in sums.values()))
        return self.act(features["D1"])


def plain_decoder(decoder, features, w):
    """Eq. (4) as it is written: convolution, BN, up-sampling and w one connection at a time.

    The same parameters and running statistics as `decoder`, whose speed it is compared with.
    """
    features = dict(features)
    for stage, found in decoder.connectivity.items():
        size, total = features["E" + stage[1:]].shape[-2:], 0
        for j, t in enumerate(found):
            part = decoder.channels_of(t, stage)
            z = F.conv2d(decoder.act(features[t]), decoder.conv[t].weight[part])
            if t in decoder.link_norm:
                norm = decoder.link_norm[t]
                z = F.batch_norm(z, norm.running_mean[part], norm.running_var[part],
                                 norm.weight[part], norm.bias[part], norm.training,
                                 norm.momentum, norm.eps)
            z = F.interpolate(z, size, mode="bilinear", align_corners=True)
            total = total + w[stage][j] * z
        features[stage] = decoder.norm[stage](total)
    return decoder.act(features["D1"])


class FullyDenseNet(nn.Module):
    """The search space: encoder, fully dense decoder with w, classifier; Figures 1a and 7.

    images (B, 3, H, W) -> logits (B, num_classes, H, W). encoder: name in ENCODERS. `w` holds the
    learned parameters {stage: (|T_l|,)}; `used` what the last forward pass multiplied by, in the
    range of `w_range`. k: MaskConnect's number of inputs, 0 for the paper's method.
    """

    def __init__(self, encoder="mobilenet_v2", num_classes=21, weights="none", width=64, bn=True,
                 w_range="paper", k=0):
        super().__init__()
        self.encoder = Encoder(encoder, weights)
        channels, L = feature_channels(self.encoder), len(self.encoder.channels)
        self.decoder = Decoder(fully_dense(L), channels, self.encoder.act, width, True, bn)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        # OURS: w starts in the middle of its range, as the release's does (1 of [0, 2]). There the
        # binary part of Eq. (2) has no gradient yet: task loss and sparse part take sides first.
        self.top = 2.0 if w_range == "release" else 1.0
        self.w = nn.ParameterDict({stage: nn.Parameter(torch.full((len(found),), self.top / 2))
                                   for stage, found in self.decoder.connectivity.items()})
        self.noisy, self.k, self.used = w_range == "release", k, None

    def freeze_affine(self):
        """OFFICIAL-CODE: BN's gamma and beta are fixed while searching, or they would do w's work
        of scaling a connection; at (1, 0) in the decoder, as pre-trained in the encoder."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)

    def forward(self, images):
        # Kept for the regularizer: it has to see the very noise that this pass saw.
        self.used = {stage: self.effective(w) for stage, w in self.w.items()}
        features = self.decoder(self.encoder(images), self.used)
        return resize(self.classifier(features), images.shape[-2:])

    def effective(self, w):
        """What a connection is multiplied by: w, noisy w (release) or k ones (MaskConnect)."""
        if self.k:
            # MaskConnect: draw k inputs with probabilities w / sum(w), use them with weight 1, and
            # hand the gradient on to the real w. OURS: the small number lets k be drawn where fewer
            # w are above 0; evaluation takes the k largest.
            k = min(self.k, len(w))
            chosen = (torch.multinomial(w.detach() + 1e-6, k) if self.training
                      else w.detach().topk(k).indices)
            return torch.zeros_like(w).index_fill(0, chosen, 1.0) + (w - w.detach())
        if self.noisy and self.training:        # the release adds noise in evaluation too: a slip
            return (w + 0.1 * torch.randn_like(w)).clamp(0, self.top)
        return w

    @torch.no_grad()
    def clamp(self):
        """After an optimizer step: back into the range."""
        for w in self.w.values():
            w.clamp_(0, self.top)

    def shares(self):
        """{stage: w in [0, 1]} as numbers, for pruning, pictures and arch.json."""
        return {stage: (w.detach() / self.top).tolist() for stage, w in self.w.items()}


def feature_channels(encoder):
    """dict E_l, G -> channels."""
    names = [f"E{l}" for l in range(1, len(encoder.channels) + 1)]
    return {**dict(zip(names, encoder.channels)), "G": encoder.channels[-1]}


class SparseMaskNet(nn.Module):
    """The pruned network of a connectivity: images (B, 3, H, W) -> logits (B, num_classes, H, W).

    connectivity: {"D8": ("E9", "G"), ...} for this encoder, or a key of CONNECTIVITIES. InputError
    if it does not fit the encoder.
    """

    def __init__(self, connectivity, encoder="mobilenet_v2", num_classes=21, weights="none",
                 width=64):
        super().__init__()
        if isinstance(connectivity, str):
            connectivity = named_connectivity(connectivity, encoder)
        L = len(ENCODERS[encoder][0])
        found = check_connectivity(connectivity, L, "connectivity")
        read = {t for names in found.values() for t in names}
        last = L if "G" in read else max(int(t[1:]) for t in read if t[0] == "E")
        self.encoder = Encoder(encoder, weights, last=last)
        self.decoder = Decoder(found, feature_channels(self.encoder), self.encoder.act, width)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        # D_1 is at 1/2; OURS: an activation before the classifier, else both are one linear map.
        return resize(self.classifier(self.decoder(self.encoder(images))), images.shape[-2:])

    def fold_norms(self):
        """Eval mode: every stage's BN goes into its convolutions, the shift into the first one."""
        decoder = self.decoder
        for stage, found in decoder.connectivity.items():
            norm = decoder.norm[stage]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            for j, t in enumerate(found):
                conv, part = decoder.conv[t], decoder.channels_of(t, stage)
                conv.weight.data[part] *= scale[:, None, None, None]
                if conv.bias is None:
                    conv.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
                if j == 0:
                    conv.bias.data[part] = norm.bias - norm.running_mean * scale
            decoder.norm[stage] = nn.Identity()


class FCN(nn.Module):
    """The baseline of Table 1: one 1x1 convolution on E_L, up-sampled."""

    def __init__(self, encoder="mobilenet_v2", num_classes=21, weights="none"):
        super().__init__()
        self.encoder = Encoder(encoder, weights)
        self.classifier = nn.Conv2d(self.encoder.channels[-1], num_classes, 1)

    def forward(self, images):
        features = self.encoder(images)
        deepest = self.encoder.act(features[f"E{len(self.encoder.channels)}"])
        return resize(self.classifier(deepest), images.shape[-2:])


class DeepLabV3(nn.Module):
    """The baseline of Table 1 at output stride 16: ASPP of 1x1, three 3x3 and pooling, a 3x3.

    OURS: the paper's 0.67 M parameters do not identify it. On MobileNet-V2 the ASPP reads E_8 (320
    channels, before the expansion to 1280).
    """

    def __init__(self, encoder="mobilenet_v2", num_classes=21, weights="none", width=64):
        super().__init__()
        self.source = "E8" if encoder == "mobilenet_v2" else "E5"
        self.encoder = Encoder(encoder, weights, dilate=True, last=int(self.source[1:]))
        channels = feature_channels(self.encoder)[self.source]
        self.aspp = torchvision.models.segmentation.deeplabv3.ASPP(channels, [6, 12, 18], width)
        self.head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        features = self.encoder(images)
        deepest = self.encoder.act(features[self.source])
        return resize(self.classifier(self.head(self.aspp(deepest))), images.shape[-2:])


# ---------------------------------------------------------------------------------------------
# 4. The sparse loss (3.2) and what it is compared with
# ---------------------------------------------------------------------------------------------


def cross(p, q):
    """L_m(p, q) of Eq. (2), element by element; 1e-10 as in the release, log(0) being infinite."""
    return -p * (q + 1e-10).log() - (1 - p) * (1 - q + 1e-10).log()


def alpha(l, L):
    """Eq. (5): every stage tends to two inputs."""
    return min(2 / len(sources(l, L)), 0.5)


def sparse_loss(w, ratio):
    """The two terms of L_s(w_l, alpha), Eq. (2): w (|T_l|,) in [0, 1], ratio = alpha -> scalars.

    The first pushes every w to the nearer of 0 and 1: its gradient log((1 - w) / w) / |T_l| is
    positive below 1/2. The second pulls the mean of w to alpha.
    """
    mean = w.mean()
    return cross(w, w).mean(), cross(ratio, mean)


def regularizer(net, cfg):
    """What is added to the task loss, by name; lambda sum_l L_s of Eq. (3) for --loss ours.

    OURS: l1 is summed over all connections, as an L1 norm is; the paper prints its strength alone.
    """
    shares = {int(stage[1:]): used / net.top for stage, used in net.used.items()}
    if cfg.loss == "l1":
        return {"l1": cfg.l1 * sum(w.abs().sum() for w in shares.values())}
    L = len(shares)
    binary, sparse = map(sum, zip(*(sparse_loss(w, alpha(l, L)) for l, w in shares.items())))
    return {name: cfg.lam * term for name, term in (("binary", binary), ("sparse", sparse))
            if cfg.loss in ("ours", name)}


def task_loss(logits, labels, cfg):
    """L_task: pixel-wise cross-entropy (4.1); OURS for saliency too, with two classes.

    Edges: balanced between the classes as HED does it, so that both count the same however rare
    edges are. OURS: the mean over edge pixels and the mean over the others, half each, over the
    batch; HED's sum over pixels would need learning rates of its own.
    """
    if cfg.task != "edges":
        return cross_entropy(logits, labels)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    present = [loss[labels == k].mean() for k in (0, 1) if (labels == k).any()]
    return sum(present) / 2 if present else logits.sum() * 0


# ---------------------------------------------------------------------------------------------
# 5. Search: train the Fully Dense Network under Eq. (3)
# ---------------------------------------------------------------------------------------------


def open_data(cfg, split, train=False):
    """(set, loader) of a split for cfg.task: to train augmented and in batches, else one by one."""
    transform = data.edge_transform(cfg.size) if train and cfg.task == "edges" else None
    return common.open_loader(cfg, split, train, open_images(cfg, split), transform)


def open_images(cfg, split):
    return data.open_task(cfg.task, cfg.dataset, cfg.data_root or None, split,
                          cfg.num_classes or None, cfg.size, cfg.seed)


def poly_sgd(net, cfg, steps):
    """The paper's protocol (4.1): SGD, learning rates for encoder, decoder and w, poly.

    Also sets the momentum of the BN statistics (OURS: in the training too, the release's value
    being known for the search). Returns (optimizer, scheduler, one step a batch).
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = cfg.bn_momentum or min(0.1, max(3e-4, 10 / steps))
    rates = {"encoder": cfg.lr_encoder, "w": cfg.lr_w or cfg.lr_decoder}
    groups = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            groups.setdefault(rates.get(name.split(".")[0], cfg.lr_decoder), []).append(p)
    optimizer = torch.optim.SGD([{"params": found, "lr": lr} for lr, found in groups.items()],
                                momentum=cfg.momentum, weight_decay=cfg.weight_decay)
    return optimizer, torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, cfg.poly)


def supernet(cfg, classes, device, weights="none"):
    """The Fully Dense Network that the settings describe."""
    net = FullyDenseNet(cfg.encoder, classes, weights, cfg.width, cfg.bn, cfg.w_range,
                        cfg.k if cfg.loss == "maskconnect" else 0)
    net.freeze_affine()
    return place(net, cfg, device)


# A search, or a training, goes on from a checkpoint only if these are what they were.
SAME_TRAINING = ("seed", "size", "scales", "image_scale", "batch_size", "lr_encoder", "lr_decoder",
                 "weight_decay", "momentum", "poly", "width")
SAME_SEARCH = (*SAME_TRAINING, "encoder", "task", "dataset", "data_root", "loss", "lam", "l1", "k",
               "bn", "w_range", "lr_w", "search_epochs")


def search(cfg, device):
    """--search: Figure 1: transform, search, prune; writes arch.json and pictures."""
    images, loader = open_data(cfg, "train", train=True)
    _, val_loader = open_data(cfg, "val")
    net = supernet(cfg, images.num_classes, device, cfg.weights_encoder)    # transform, Fig. 1a
    optimizer, schedule = poly_sgd(net, cfg, cfg.search_epochs * len(loader))

    def loss_terms(forward, images, labels):
        return {"task": task_loss(forward(images), labels, cfg), **regularizer(net, cfg)}

    def observe():
        shares = torch.tensor(sum(net.shares().values(), []))
        return {"w": net.shares(), "kept": int((shares >= cfg.sigma).sum()),
                "undecided": float(((shares > 0.1) & (shares < 0.9)).float().mean())}

    # Search, Fig. 1b. What `fit` does, for every batch of every epoch:
    #     L = L_task + lambda sum_l L_s(w_l, alpha_l)            Eq. (3): loss_terms
    #     weights and w together: one step of SGD on L
    #     w back into [0, 1]                                     net.clamp
    fit("search", net, loss_terms, optimizer, schedule, loader, val_loader, images.num_classes,
        replace(cfg, epochs=cfg.search_epochs), device, cfg.out, per_step=True,
        after_step=net.clamp, observe=observe,
        extra={"arch": "fully dense", **{key: str(getattr(cfg, key)) for key in SAME_SEARCH}})
    connectivity, gap = prune(net.shares(), cfg)                            # Fig. 1c
    derived = inherit(net.eval(), connectivity, cfg, images.num_classes)
    miou = evaluate(derived, val_loader, images.num_classes, device, cfg.amp).miou()
    if cfg.simplify:
        connectivity = drop_repeated(connectivity)
    if rank() == 0:
        before = common.read_log(cfg.out, "search")[-1]["miou"]
        report_search(cfg, net.shares(), connectivity, gap,
                      {"supernet_miou": before, "derived_miou": miou}, images)
    common.barrier()


# ---------------------------------------------------------------------------------------------
# 6. Prune (3.3)
# ---------------------------------------------------------------------------------------------


def prune(shares, cfg):
    """Section 3.3: {stage: [w in [0, 1]]} -> (connectivity, (largest dropped w, smallest kept)).

    MaskConnect keeps the k largest of every stage instead of comparing with sigma.
    """
    L, rows = len(shares), {}
    for stage, names in fully_dense(L).items():
        w = shares[stage]
        if cfg.loss == "maskconnect":
            best = sorted(range(len(w)), key=lambda j: -w[j])[:cfg.k]
            rows[stage] = [j in best for j in range(len(w))]
        else:
            rows[stage] = [value >= cfg.sigma for value in w]               # rule (1)
    pairs = [(w, kept) for stage in rows for w, kept in zip(shares[stage], rows[stage])]
    gap = (max((w for w, kept in pairs if not kept), default=None),
           min((w for w, kept in pairs if kept), default=None))
    connectivity = drop_useless({                                           # rules (2), (3)
        stage: tuple(t for t, kept in zip(names, rows[stage]) if kept)
        for stage, names in fully_dense(L).items()})
    if not connectivity:
        raise InputError("every connection of D1 was dropped: nothing is left to classify; search "
                         "with a smaller --lam or --l1, or with --sigma below "
                         f"{max(shares['D1']):.1e}")
    return connectivity, gap


@torch.no_grad()
def inherit(net, connectivity, cfg, classes):
    """The pruned network with the supernet's weights: w and bn_l^t folded into the convolutions.

    In eval mode bn(z) w = a z + b with numbers a, b a channel. a scales the convolution; b is a
    constant map, which up-sampling leaves alone, and moves the mean of the stage's BN.
    """
    pruned = SparseMaskNet(connectivity, cfg.encoder, classes, width=cfg.width)
    pruned.to(net.classifier.weight)                        # its device and dtype
    pruned.encoder.load_state_dict(net.encoder.state_dict())
    pruned.classifier.load_state_dict(net.classifier.state_dict())
    old, new = net.decoder, pruned.decoder
    for stage, found in connectivity.items():
        new.norm[stage].load_state_dict(old.norm[stage].state_dict())
        for t in found:
            a = net.effective(net.w[stage])[old.connectivity[stage].index(t)]
            here, there = old.channels_of(t, stage), new.channels_of(t, stage)
            if t in old.link_norm:
                norm = old.link_norm[t]
                scale = norm.weight[here] / (norm.running_var[here] + norm.eps).sqrt()
                new.norm[stage].running_mean -= a * (norm.bias[here]
                                                     - norm.running_mean[here] * scale)
                a = (a * scale)[:, None, None, None]
            new.conv[t].weight[there] = a * old.conv[t].weight[here]
    return pruned.eval()


def report_search(cfg, shares, connectivity, gap, miou, images):
    """Print what was found; arch.json and the pictures."""
    L = len(shares)
    links, (dropped, least) = sum(map(len, connectivity.values())), gap
    print("\n".join(f"  {stage} <- {', '.join(found)}" for stage, found in connectivity.items()))
    print(f"{links} of {L * (L + 1)} connections, {len(connectivity)} of {L} decoder stages")
    if dropped is None:
        print(f"nothing was below sigma, the smallest w is {least:.1e}")
    else:
        print(f"largest dropped w {dropped:.1e}, smallest kept {least:.1e}"
              + (f", {least / dropped:.3g} times as much" if dropped else ""))
    print("".join(f"{name} {100 * value:.2f} " for name, value in miou.items())
          + "(retrained mIoU comes from --train)")
    size, dense = (decoder_params(SparseMaskNet(found, cfg.encoder, images.num_classes,
                                                width=cfg.width))
                   for found in (connectivity, fully_dense(L)))
    print(f"decoder: {size:,} parameters of the {dense:,} of the Fully Dense Network")
    names = fully_dense(L)
    arch = {"encoder": cfg.encoder, "connectivity": connectivity, "task": cfg.task,
            "dataset": cfg.dataset, "loss": cfg.loss, "decoder_params": size, **miou,
            "largest_dropped_w": gap[0], "smallest_kept_w": gap[1],
            "w": {stage: dict(zip(names[stage], [round(w, 6) for w in shares[stage]]))
                  for stage in names}}
    common.write_text(Path(cfg.out) / "arch.json", readable_json(arch))
    draw_search(cfg, connectivity, shares)
    print(f"in {cfg.out}: arch.json, connectivity.png, weights.png, weights_over_time.png, "
          f"search.png\nnext: python sparsemask.py --train --eval --bench"
          f"{common.flags_of(cfg, QUICK)}")


def decoder_params(net):
    """Parameters that are not the encoder's, as the paper counts them."""
    return count_params(net) - count_params(net.encoder)


def readable_json(arch):
    """JSON with one row a connectivity stage: D8: [E9, G]."""
    rows = []
    for key, value in arch.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            text = "{" + ",".join(f"\n  {json.dumps(k)}: {json.dumps(v)}"
                                  for k, v in value.items()) + "}"
        rows.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(rows) + "}\n"


# ---------------------------------------------------------------------------------------------
# 7. Pictures of a search
# ---------------------------------------------------------------------------------------------

SOURCE_COLOURS = {"E": (60, 110, 190), "G": (200, 120, 30), "D": (40, 140, 70)}


def draw_connectivity(path, connectivity, encoder, title):
    """As Figure 3: encoder on the left, decoder on the right, finest stage on top; what was dropped
    is pale."""
    strides, channels = ENCODERS[encoder]
    L, row, font = len(strides), 64, ImageFont.load_default(size=20)
    image = Image.new("RGB", (1180, 110 + row * (L + 1)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 34), title, common.INK, ImageFont.load_default(size=26), "lm")
    place = {"G": (190, 80 + row * L + 24)}
    for l in range(1, L + 1):
        place[f"E{l}"], place[f"D{l}"] = (190, 80 + row * l - 40), (720, 80 + row * l - 40)
    for stage, found in connectivity.items():
        for t in found:
            (x0, y0), (x1, y1) = place[t], place[stage]
            if t[0] == "D":                                 # an arc on the right, not through boxes
                x0, x1, bulge = x0 + 50, x1 + 50, 60 + 45 * (int(t[1:]) - int(stage[1:]))
            else:
                x0, x1, bulge = x0 + 50, x1 - 50, 0
            steps = [i / 40 for i in range(41)]
            draw.line([(x0 + (x1 - x0) * s + 4 * bulge * s * (1 - s) * 0.75, y0 + (y1 - y0) * s)
                       for s in steps], SOURCE_COLOURS[t[0]], 3, joint="curve")
    used = {t for found in connectivity.values() for t in found} | set(connectivity)
    for name, (x, y) in place.items():
        colour = SOURCE_COLOURS[name[0]] if name in used else common.FAINT
        draw.rounded_rectangle((x - 50, y - 20, x + 50, y + 20), 8, "white", colour, 3)
        draw.text((x, y), name, common.INK if name in used else common.NO_VALUE, font, "mm")
        if name[0] == "E":
            l = int(name[1:])
            draw.text((x - 64, y), f"{channels[l - 1]}, 1/{strides[l - 1]}", common.INK,
                      ImageFont.load_default(size=16), "rm")
    common.save_png(image, path)


def weight_rows(shares):
    """(row names, column names, values with NaN) of a heat map: stage by input."""
    L, columns = len(shares), sources(1, len(shares))
    values = [[shares[stage][names.index(t)] if t in names else math.nan for t in columns]
              for stage, names in fully_dense(L).items()]
    return list(fully_dense(L)), columns, values


def read_weights(path, encoder):
    """(loss, {stage: [w]}) of the arch.json of a search on the same encoder."""
    other, L = common.read_json(path, "arch.json"), len(ENCODERS[encoder][0])
    w = other.get("w") if isinstance(other, dict) else None
    fits = isinstance(w, dict) and list(w) == list(fully_dense(L)) and all(
        isinstance(w[stage], dict) and tuple(w[stage]) == names
        and all(isinstance(v, (int, float)) for v in w[stage].values())
        for stage, names in fully_dense(L).items())
    if not fits:
        raise InputError(f"{path} holds no weights w of a search on {encoder}; --beside takes the "
                         "arch.json that --search wrote")
    return other.get("loss"), {stage: list(row.values()) for stage, row in w.items()}


def draw_search(cfg, connectivity, shares):
    """connectivity.png, weights.png (Figure 5), weights_over_time.png, search.png."""
    out, rows = Path(cfg.out), common.read_log(cfg.out, "search")
    draw_connectivity(out / "connectivity.png", connectivity, cfg.encoder,
                      f"{sum(map(len, connectivity.values()))} connections kept, "
                      f"loss {cfg.loss}, {cfg.dataset}")
    names, columns, values = weight_rows(shares)
    title = f"w after the search, loss {cfg.loss}"
    if cfg.beside:
        loss, other = read_weights(cfg.beside, cfg.encoder)
        more, title = weight_rows(other)[2], f"{title}; below: loss {loss}"
        names = names + [""] + names
        values = values + [[math.nan] * len(columns)] + more
    common.heat_map(out / "weights.png", title, names, columns, values)
    links = [(stage, j, t) for stage, found in fully_dense(len(shares)).items()
             for j, t in enumerate(found)]
    common.heat_map(out / "weights_over_time.png", "w of every connection after each epoch",
                    [f"{t} to {stage}" for stage, _, t in links], [r["epoch"] + 1 for r in rows],
                    [[r["w"][stage][j] for r in rows] for stage, j, _ in links],
                    (max(500, 160 + 14 * len(rows)), 100 + 14 * len(links)))
    common.line_chart(out / "search.png", "Search", "epoch", "share", {
        "kept (w >= sigma)": [(r["epoch"] + 1, r["kept"] / len(links)) for r in rows],
        "undecided (0.1 to 0.9)": [(r["epoch"] + 1, r["undecided"]) for r in rows],
        "supernet mIoU": [(r["epoch"] + 1, r["miou"]) for r in rows]})


# ---------------------------------------------------------------------------------------------
# 8. Train the pruned network, or a baseline (3.3, 4.1, 5)
# ---------------------------------------------------------------------------------------------


def find_connectivity(cfg):
    """The connectivity that --network and --arch name, for cfg.encoder."""
    L = len(ENCODERS[cfg.encoder][0])
    if cfg.network.startswith("random"):
        generator = torch.Generator().manual_seed(cfg.seed)
        return random_connectivity(L, generator, cfg.network == "random_rule")
    if cfg.network != "found":
        return named_connectivity(cfg.network, cfg.encoder)
    path = cfg.arch or str(Path(cfg.out) / "arch.json")
    old, connectivity = read_connectivity(path)
    if old == cfg.encoder:
        return connectivity
    moved = transfer(connectivity, ENCODERS[old][0], ENCODERS[cfg.encoder][0])
    return check_connectivity(moved, L, f"{path}, transferred from {old} to {cfg.encoder}")


def build(cfg, classes, weights="none"):
    """The network that --network names."""
    if cfg.network == "fcn":
        return FCN(cfg.encoder, classes, weights)
    if cfg.network == "deeplabv3":
        return DeepLabV3(cfg.encoder, classes, weights, cfg.width)
    return SparseMaskNet(find_connectivity(cfg), cfg.encoder, classes, weights, cfg.width)


def folder_of(cfg):
    """Run folder of one trained network."""
    parts = [cfg.network] + [value for value, usual in ((cfg.encoder, "mobilenet_v2"),
                                                        (cfg.task, "segmentation"))
                             if value != usual]
    return Path(cfg.out) / "_".join(parts)


def identity_of(cfg):
    """What a checkpoint says about itself, so that it is not taken for another network's."""
    arch = cfg.network if cfg.network in ("fcn", "deeplabv3") else json.dumps(
        find_connectivity(cfg))
    return {"arch": f"{cfg.encoder} {arch}", "dataset": f"{cfg.dataset} {cfg.data_root}",
            "task": cfg.task}


def start_from(net, path):
    """--init: the weights of an earlier step; a classifier for other classes starts anew."""
    state = load_checkpoint(path)["model"]
    own = net.state_dict()
    old, new = state.get("classifier.bias"), own["classifier.bias"]
    if old is not None and len(old) != len(new):
        if rank() == 0:
            print(f"{path} was trained for {len(old)} classes: the classifier starts anew")
        state = {**state, "classifier.weight": own["classifier.weight"], "classifier.bias": new}
    load_weights(net, state, path)


def train_split(cfg):
    return cfg.train_split or ("trainval" if cfg.dataset == "bsds500" else "train")  # PAPER 5.3


def eval_split(cfg):
    return cfg.split or ("test" if cfg.dataset in ("msra_b", "bsds500") else "val")  # PAPER 5.3


def checkpoint_of(cfg):
    """The best epoch; of edges the last (OURS: mIoU, which tells the best, says little there)."""
    return Path(cfg.weights or folder_of(cfg) / ("last.pt" if cfg.task == "edges" else "best.pt"))


def train(cfg, device):
    """--train: the network under L_task alone, by the protocol of the search."""
    images, loader = open_data(cfg, train_split(cfg), train=True)
    _, val_loader = open_data(cfg, "val")
    torch.manual_seed(cfg.seed)
    net = build(cfg, images.num_classes, "none" if cfg.init else cfg.weights_encoder)
    if cfg.init:
        start_from(net, cfg.init)
    net, folder = place(net, cfg, device), folder_of(cfg)
    optimizer, schedule = poly_sgd(net, cfg, cfg.epochs * len(loader))

    def loss_terms(forward, images, labels):
        return {"task": task_loss(forward(images), labels, cfg)}

    best = fit(cfg.network, net, loss_terms, optimizer, schedule, loader, val_loader,
               images.num_classes, cfg, device, folder, per_step=True,
               extra={**identity_of(cfg), "train_split": train_split(cfg),
                      **{key: str(getattr(cfg, key)) for key in ("epochs", *SAME_TRAINING)}})
    if rank() == 0:
        print(f"{cfg.network}: {decoder_params(net):,} decoder parameters, best retrained mIoU on "
              f"val {100 * best:.2f} -> {checkpoint_of(cfg)}\n"
              f"next: python sparsemask.py --eval --bench{common.flags_of(cfg, QUICK)}")


# ---------------------------------------------------------------------------------------------
# 9. Scores of saliency and edge maps (5.3)
# ---------------------------------------------------------------------------------------------


def sum_over_ranks(scores, names, device):
    """Replace these arrays or numbers of `scores` by their float64 sums over all ranks."""
    for name in names:
        values = torch.as_tensor(np.asarray(getattr(scores, name), np.float64)).to(device)
        if world_size() > 1:
            torch.distributed.all_reduce(values)
        setattr(scores, name, values.cpu().numpy())
    return scores


class SaliencyScores:
    """Largest F-beta and MAE, the measures of Table 5.

    update(map, mask) one picture at a time: map (H, W) in [0, 1], mask (H, W) bool or {0, 1}.
    Precision and recall are taken at the thresholds k / 255, k = 0 ... 255 (salient: S >= k / 255),
    averaged over pictures, and F = (1 + b) P R / (b P + R), b = beta^2 = 0.3, of the averages; its
    largest value counts. MAE = mean |S - G| of a picture, averaged over pictures.
    OURS, where the papers are silent: a map with no pixel above the threshold has precision 0; a
    picture whose mask is empty counts for MAE and the precision (0), not for the recall.
    """

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

    def reduce(self, device="cpu"):
        """Add up the sums of all ranks; through `device`, as nccl needs a GPU's memory."""
        return sum_over_ranks(self, ("precision", "recall", "error", "pictures", "masks"), device)

    def result(self):
        """-> {"F_beta", "MAE"}, floats in [0, 1]."""
        precision = self.precision / max(self.pictures, 1)
        recall = self.recall / max(self.masks, 1)
        f = (1 + self.beta2) * precision * recall
        f /= np.maximum(self.beta2 * precision + recall, 1e-12)
        return {"F_beta": float(f.max()), "MAE": float(self.error / max(self.pictures, 1))}


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


class EdgeScores:
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
        counts, before = np.zeros_like(self.counts), None
        for k, threshold in enumerate(self.thresholds):
            edge = probability >= threshold
            size = edge.sum()
            if size == before:  # nothing lies between two thresholds: the same map again
                counts[:, k] = counts[:, k - 1]
                continue
            before, edge = size, thin(edge)
            found, hit = match_edges(edge, truth, radius)
            counts[:, k] = hit.sum(), truth.sum(), found.any(0).sum(), edge.sum()
        self.counts += counts
        self.best += counts[:, _f_measure(counts)[2].argmax()]
        self.pictures += 1

    def reduce(self, device="cpu"):
        """Add up the sums of all ranks; through `device`, as nccl needs a GPU's memory."""
        return sum_over_ranks(self, ("counts", "best", "pictures"), device)

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


# ---------------------------------------------------------------------------------------------
# 10. Evaluate and bench
# ---------------------------------------------------------------------------------------------


def restore(cfg, classes, device):
    """The trained network in eval mode."""
    path = checkpoint_of(cfg)
    state = load_checkpoint(path, ("model", "arch"))
    if state["arch"] != identity_of(cfg)["arch"]:
        raise InputError(f"{path} was trained for another connectivity or encoder than this "
                         "command names; train again or name its own --arch, --network, --encoder")
    net = build(cfg, classes)
    load_weights(net, state["model"], path)
    return place(net.eval(), cfg, device)


def evaluate_network(cfg, device):
    """--eval: mIoU, or the scores of Tables 5 and 6, and pictures."""
    cfg = replace(cfg, split=eval_split(cfg))
    images, loader = open_data(cfg, cfg.split)
    net = restore(cfg, images.num_classes, device)
    forward = torch.compile(net) if cfg.compile else net
    if cfg.task != "segmentation":
        return evaluate_map(cfg, forward, images, loader, device)
    matrix = evaluate(forward, loader, images.num_classes, device, cfg.amp, cfg.eval_scales,
                      cfg.flip)
    if rank() == 0:
        common.report_segmentation(cfg.network, matrix, images, cfg, folder_of(cfg))
        common.draw_segmentations(net, images, cfg, device, folder_of(cfg))


@torch.no_grad()
def evaluate_map(cfg, net, images, loader, device):
    """Saliency: F_beta, MAE. Edges: ODS, OIS, AP, R50 after non-maximum suppression (5.3)."""
    scores = SaliencyScores() if cfg.task == "saliency" else EdgeScores(cfg.thresholds)
    rows, start = [], time.perf_counter()
    indices = list(loader.sampler)                          # this rank's pictures
    for (pixels, labels), (_, i) in zip(loader, indices):
        with autocast(device, cfg.amp):
            y = common.probabilities(net, pixels.to(device), labels.shape[-2:], cfg.eval_scales,
                                     cfg.flip)[0, 1].double().cpu().numpy()
        if cfg.task == "edges":
            thinned = edge_nms(y)
            scores.update(thinned, images.annotations(i))
        else:
            scores.update(y, labels[0])
        if len(rows) < 4 and i % max(1, len(images) // 4) == 0:
            drawn = [y] if cfg.task == "saliency" else [y, thinned]
            rows.append([images[i][0], *(Image.fromarray((255 * m).astype(np.uint8)) for m in
                                         (np.asarray(labels[0]) == 1, *drawn))])
    result = scores.reduce(device).result()
    if rank() == 0:
        folder = folder_of(cfg)
        titles = ("image", "label", cfg.task) + ("thinned",) * (cfg.task == "edges")
        common.comparison(rows, titles, folder / f"{cfg.task}.png")
        log_record(folder, stage="eval", split=cfg.split, **result)
        print(f"{cfg.network} on {cfg.split}, {len(images)} pictures in "
              f"{time.perf_counter() - start:.0f} s: "
              + ", ".join(f"{name} {value:.3f}" for name, value in result.items())
              + f"\npicture: {folder}/{cfg.task}.png")


# Table 1: mIoU on VOC val, decoder parameters in M, FPS at 512x512 on a Titan Xp.
PAPER = {"fcn": (63.80, 0.03, 156), "deeplabv3": (72.51, 0.67, 50), "unet": (64.72, 0.16, 97),
         "sparseacn": (72.23, 0.72, 74), "fdn": (72.72, 1.93, 37), "released": (73.18, 0.56, 98)}


def bench(cfg, device):
    """--bench: parameters, conv MACs and latency (BN folded) beside Table 1; writes bench.json."""
    found = cfg.arch or (Path(cfg.out) / "arch.json").exists()
    names = list(dict.fromkeys((["found"] if found else []) + [
        *PAPER, *([cfg.network] if cfg.network != "found" else [])]))
    nets = {name: build(replace(cfg, network=name), 21).eval() for name in names}
    about, rows = latency.compare(nets, cfg.frame, device, cfg)
    paper = PAPER if cfg.encoder == "mobilenet_v2" else {}
    print(f"{'21 classes':12s} {'decoder params':>14s} {'conv MACs':>10s}" + (
        " | paper: M params, FPS at 512x512 on a Titan Xp, mIoU on VOC" if paper else ""))
    for name, net in nets.items():
        macs = rows[name]["conv_macs"] - count_macs(net.encoder, cfg.frame)
        rows[name].update(decoder_params=decoder_params(net), decoder_macs=macs)
        miou, params, fps = paper.get(name, (None,) * 3)
        print(f"{name:12s} {decoder_params(net):14,d} {macs / 1e9:8.3f} G"
              + (f" | {params:.2f}, {fps}, {miou:.2f}" if params else ""))
    common.write_text(Path(cfg.out) / "bench.json", json.dumps(
        {**about, "networks": rows, "paper": PAPER}, indent=1))
    print(f"in {cfg.out}: bench.json")


def bench_search(cfg, device):
    """--bench-search: a search step with the decoder as it is here and as Eq. (4) is written."""
    net = supernet(cfg, 21, device)
    optimizer, _ = poly_sgd(net, cfg, 1000)
    shape = (cfg.batch_size, *cfg.size)
    images = torch.randn(shape[0], 3, *shape[1:]).to(device)
    labels = torch.randint(0, 21, shape).to(device)

    def step(decoder):
        start = time.perf_counter()
        with autocast(device, cfg.amp):
            net.used = {stage: net.effective(w) for stage, w in net.w.items()}
            d1 = decoder(net.encoder(images), net.used)
            logits = resize(net.classifier(d1), images.shape[-2:])
            loss = cross_entropy(logits, labels) + sum(regularizer(net, cfg).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.clamp()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    decoders = {"fused": net.decoder, "plain": lambda *x: plain_decoder(net.decoder, *x)}
    print(f"{latency.device_name(device)}, {torch.get_num_threads()} threads, batch {shape[0]}, "
          f"3x{shape[1]}x{shape[2]}, 21 classes, {cfg.encoder}; a step: forward, backward, update")
    peak = {}
    for name, decoder in decoders.items():                  # the smaller first: peaks only grow
        for _ in range(3):
            step(decoder)
        peak[name] = common.peak_memory(device)
    times = {name: [] for name in decoders}
    for _ in range(9):
        for name, decoder in decoders.items():
            times[name].append(step(decoder))
    for name, t in times.items():
        t.sort()
        print(f"{name}: median {t[4]:.2f} s of 9 in turn ({t[0]:.2f} to {t[-1]:.2f}), peak memory "
              f"{peak[name]:.2f} GiB", flush=True)


def export_network(cfg):
    """--export FILE: the folded network as a torch.export program for pictures of --frame."""
    net = restore(cfg, open_images(cfg, eval_split(cfg)).num_classes, torch.device("cpu"))
    error = common.export(net, cfg.frame, cfg.export)
    print(f"{cfg.export}: torch.export program for 1x3x{cfg.frame[0]}x{cfg.frame[1]}, largest "
          f"difference to the network {error:.1e}")


# ---------------------------------------------------------------------------------------------
# 11. main
# ---------------------------------------------------------------------------------------------

STAGES = {"search": "train the Fully Dense Network, prune it; writes arch.json",
          "train": "train --network from the pre-trained encoder",
          "eval": "scores and pictures of a trained network",
          "bench": "parameters, MACs and measured latency beside Table 1",
          "bench-search": "time and memory of a search step, against the plain formulation"}


def check(cfg, stages):
    """Refuse early what cannot work."""
    if min(cfg.width, cfg.search_epochs, cfg.k, cfg.thresholds) < 1:
        raise InputError("--width, --search-epochs, --k and --thresholds must be 1 or more")
    if not 0 < cfg.sigma < 1 or not 0 <= cfg.bn_momentum <= 1 or not 0 <= cfg.momentum < 1:
        raise InputError("--sigma, --momentum and --bn-momentum lie between 0 and 1")
    for name in ("lam", "l1", "lr_encoder", "lr_decoder", "lr_w", "weight_decay", "poly"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be a number of 0 or more")
    if not cfg.eval_scales or not all(0 < s < 16 for s in cfg.eval_scales) or min(cfg.frame) < 32:
        raise InputError("--eval-scales must be positive and below 16, --frame 32 pixels a side "
                         "or more")
    if cfg.dataset not in data.TASK_SETS[cfg.task]:
        raise InputError(f"--task {cfg.task} has no data set {cfg.dataset}; choose "
                         f"{', '.join(data.TASK_SETS[cfg.task])}")
    if cfg.task == "edges" and cfg.image_scale != 1:
        raise InputError("--image-scale does not go with --task edges: an edge map has no other "
                         "resolution than its picture")
    if stages & {"search", "train", "bench-search"} and (
            cfg.batch_size % world_size() or cfg.batch_size // world_size() < 2):
        raise InputError(f"--batch-size {cfg.batch_size} over {world_size()} processes: each needs "
                         "the same number and 2 or more, as BN sees one value a picture at G")
    if "bench-search" in stages and (cfg.compile or world_size() > 1):
        raise InputError("--bench-search times both decoders as they are written, in one process; "
                         "leave out --compile and torchrun")
    if "search" in stages and cfg.arch:
        raise InputError("--search writes an arch.json of its own, in --out; leave out --arch")


def check_files(cfg, stages):
    """Refuse before hours of work what a later stage would find missing."""
    if stages & {"search", "train"}:
        open_images(cfg, "val")
    if "train" in stages:
        open_images(cfg, train_split(cfg))
        if cfg.init:
            load_checkpoint(cfg.init)
    if "eval" in stages:
        open_images(cfg, eval_split(cfg))
    if "search" in stages and cfg.beside:
        read_weights(cfg.beside, cfg.encoder)
    if (stages & {"train", "eval"} or cfg.export) and not (
            "search" in stages and cfg.network == "found"):
        identity_of(cfg)                                    # reads arch.json
    if ("eval" in stages or cfg.export) and "train" not in stages:
        load_checkpoint(checkpoint_of(cfg))


def main(argv=None):
    stages, cfg = common.parse_args(Config, "sparsemask", STAGES, QUICK, __doc__, argv)
    device = common.setup(cfg)
    check(cfg, stages)
    check_files(cfg, stages)
    if "bench-search" not in stages:
        common.write_config(cfg, stages)
    if "search" in stages:
        search(cfg, device)
    if "train" in stages:
        train(cfg, device)
    if "eval" in stages:
        evaluate_network(cfg, device)
    if rank() == 0 and "bench" in stages:
        bench(cfg, device)
    if "bench-search" in stages:
        bench_search(cfg, device)
    if rank() == 0 and cfg.export:
        export_network(cfg)


if __name__ == "__main__":
    common.run_main(main)
