r"""Pruning parameterization with bi-level optimization: a mask on every channel, learnt together
with the weights under a MACs target; what is left is a small network, without fine-tuning.

    Yang et al.: Pruning Parameterization with Bi-level Optimization for Efficient Semantic
    Segmentation on the Edge. CVPR 2023. Numbers of sections, equations and tables below are those
    of the version with its appendices that was under review.

The idea in five lines:
  1. Every prunable layer is followed by a depth-wise 1x1 layer whose weight s is a soft mask.
  2. Forward, s is cut at tau into a binary mask b; backward, the gradient of b is handed to s.
  3. A penalty on the MACs that b leaves, (MACs - target)^2, joins the cross-entropy.
  4. Some steps train the weights under a fixed mask, then one step moves the mask; its gradient
     counts that the weights will follow: an implicit gradient that costs no extra backward pass.
  5. Pruned channels keep their weights and may come back. At the end they are cut out for good.

    expansion channels of an inverted residual (one mask s, one place, three layers shrink)

    x --> 1x1 expand, BN, ReLU --> k x k depth-wise, BN, ReLU --> [ x b ] --> 1x1 project, BN --> y
                                                                    ^
                                             b = (s > tau),  dL/ds := dL/db

    paper                here                              meaning
    w, s, b              net, masks.s, masks()             weights, soft masks, binary masks
    tau                  cfg.tau                           threshold of Eq. (2)
    L, L_reg, L_m        task_loss, regularizer, loss      Eqs. (4), (5)
    C                    target                            MACs that may remain
    beta, lambda         cfg.beta, cfg.lam                 Eqs. (4), (7)
    dL_m / ds            mask_gradient                     Eq. (15)
    o', i', t, t', k     Macs                              Eq. (5)

    python bilevel_prune.py --search                          1.6 minutes on two CPU cores
    python bilevel_prune.py --search --method uniform --eval  1.1 minutes more: a baseline
    python bilevel_prune.py --bench                           half a minute: counts, latency, App. F
"""
import copy
import json
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common
import data
import latency
from common import (BaseConfig, InputError, Progress, autocast, average_gradients, check_finite,
                    clip_gradients, count_macs, count_params, cross_entropy, evaluate,
                    load_checkpoint, load_weights, log_record, narrowed, open_loader, open_split,
                    opt, rank, save_checkpoint, world_size)

# ---------------------------------------------------------------------------------------------
# Settings. Defaults are the paper's; the tag says where it says so.
# ---------------------------------------------------------------------------------------------

NETWORKS = ("tiny", "small", "base", "base_cityscapes", "super", "deeplab")
METHODS = ("bilevel", "uniform", "magnitude", "slimming", "dense", "retrained")


@dataclass
class Config(BaseConfig):
    network: str = opt("super", "TopFormer tiny, small, base, base_cityscapes: a narrower head, or "
                       "super: wider than base (PAPER 5.2); deeplab: DeepLabV3+ on MobileNet-V2 "
                       "(PAPER App. H)", NETWORKS)
    init: str = opt("none", "weights the dense network starts from: a published TopFormer "
                    "checkpoint; for deeplab MobileNet-V2's (a file, or imagenet)")
    method: str = opt("bilevel", "how --search chooses channels, and whose network --eval and "
                      "--export take: the paper's, a baseline, the dense one, or the found widths "
                      "retrained from random weights", METHODS)
    implicit: bool = opt(True, "second term of Eq. (15); --no-implicit is the ablation of Table 3")
    scope: str = opt("all", "all: each conv layer of the network (PAPER 5.2); pyramid: the token "
                     "pyramid, or encoder, alone (PAPER 1)", ("all", "pyramid"))
    target: float = opt(0.29, "share of the dense MACs that may remain (PAPER: 2.4 of 8.2 GMACs)")
    target_gmacs: float = opt(0.0, "the same in GMACs for one picture of --frame; wins if not 0")
    round_to: int = opt(1, "widths are multiples of this, or full: 8 suits most hardware (OURS)")
    frame: tuple[int, int] = opt((512, 1024), "picture size H W for MACs and latency (PAPER 5.2)")
    tau: float = opt(0.5, "threshold of Eq. (2) (PAPER 3.2)")
    beta: float = opt(0.01, "weight of the MACs term, Eq. (4) (PAPER 5.2)")
    lam: float = opt(0.1, "lambda of Eq. (15) (PAPER 5.2)")
    weight_steps: int = opt(3, "weight steps between two mask steps (PAPER 4.2: a few; the number "
                            "is OURS)")
    mask_lr: float = opt(0.0, "step size of the masks; 0 = from the length of the search (OURS)")
    search_epochs: int = opt(430, "epochs of the search, its end included (OURS: as long as the "
                             "dense training)")
    settle: float = opt(0.34, "share of the search, at its end, under the final mask (OURS)")
    slim_l1: float = opt(1e-4, "L1 weight on BN scales of the slimming baseline (its paper)")
    optimizer: str = opt("sgd", "for the weights (PAPER: sgd)", ("sgd", "adamw"))
    lr: float = opt(3e-4, "learning rate, poly (PAPER 5.2; 1.2e-4 on ADE20K, 0.01 on VOC); that "
                    "small it suits adamw")
    power: float = opt(0.9, "of the poly policy (PAPER 5.2)")
    momentum: float = opt(0.9, "of sgd (PAPER 5.2)")
    weight_decay: float = opt(1e-4, "of w, not of norms, biases and masks (OURS, not 1 / lambda: "
                              "approximation 6; OFFICIAL-CODE of TopFormer: 0.01 with adamw)")
    clip: float = opt(0.0, "gradient norm clip, 0 = off")
    drop_path: float = opt(0.1, "largest stochastic depth of the blocks (OFFICIAL-CODE)")
    size: tuple[int, int] = opt((512, 1024), "training crop, H W (PAPER 5.2; ADE20K 512 512)")
    scales: tuple[float, float] = opt((0.5, 2.0), "random scale, drawn uniformly (PAPER 5.2 for "
                                      "ADE20K; on Cityscapes the paper draws 0.5, 0.75, 1 or 2)")
    image_scale: float = opt(1.0, "pictures are resized by this first, to train and to evaluate; "
                             "0.5 evaluates Cityscapes at the paper's 512x1024 (PAPER 5.2)")
    batch_size: int = opt(64, "images a step over all processes (PAPER 5.2: 8 on each of 8 GPUs)")
    epochs: int = opt(430, "epochs of the dense training (OFFICIAL-CODE of TopFormer: 80k steps "
                      "of 16 images)")
    dense: str = opt("", "checkpoint the search starts from [<out>/dense/best.pt, trained first "
                     "if need be]")
    arch: str = opt("", "arch.json for --train, --eval, --bench, --export [of --method]")
    weights: str = opt("", "checkpoint for --eval and --export [beside its arch.json]")
    split: str = opt("val", "split for --eval")
    sweep_betas: tuple[float, ...] = opt((0.001, 0.01, 0.1, 1.0), "for --sweep (PAPER App. I)")
    sweep_lams: tuple[float, ...] = opt((0.01, 0.1, 1.0), "for --sweep (PAPER App. I)")
    sweep_targets: tuple[float, ...] = opt((0.76, 0.44, 0.29, 0.17, 0.12), "for --sweep (PAPER "
                                           "App. J, its GMACs over 8.2)")
    export: str = opt("", "after the other stages, write the network as a torch.export program")


# Under two minutes on two cores: the smallest network, learning rates for a few hundred steps. On a
# CPU both NHWC and widths in eights are needed to turn half the MACs into half the time.
QUICK = dict(network="tiny", size=(96, 192), frame=(256, 512), scales=(0.75, 1.5), batch_size=8,
             epochs=4, search_epochs=4, lr=0.05, target=0.5, drop_path=0.0, round_to=8,
             channels_last=True)

# ---------------------------------------------------------------------------------------------
# 1. Networks. Every layer says to which sites its channels belong: masks, MACs and surgery read it
# ---------------------------------------------------------------------------------------------

# A site is a set of channels that one mask s_l decides about. A channel space is what a layer
# reads or writes: a tuple of (site, channels for each element of its mask). The site "" is one
# constant channel, so (("", 3),) are three channels that no mask touches.
#
# Which layers share a site (OURS; the paper says "each CONV layer"):
# - An expansion channel passes its depth-wise filter alone, so its rows of expand and depth-wise
#   and its column of project go together: one site.
# - What is added must have the same channels: all outputs of a pyramid level share one site. So do
#   the tokens cut from them, and with those the residual stream of the transformer, whose channels
#   are the four levels side by side.
# - An attention head is one element: its q, k and v have to stay rectangular.
RGB = (("", 3),)


def space(*sites):
    """A channel space of whole sites, side by side."""
    return tuple((site, 1) for site in sites)


def size_of(where, widths):
    """Channels of a space; widths: {site: elements, "": 1}."""
    return sum(widths[site] * each for site, each in where)


def channels(gates, where, widths, device=None):
    """The 0/1 vector of a space (channels,); sites without a gate keep everything."""
    return torch.cat([gates[site].repeat_interleave(each) if site in gates else
                      torch.ones(widths[site] * each, device=device) for site, each in where])


def masked(x, layer, gates):
    """Eq. (1): b_l as a depth-wise 1x1 convolution on what `layer` wrote; gates None: no masks.

    Where it stands matters. Not right behind the convolution: BN would turn a zero into its bias.
    Not before ReLU, which passes no gradient at zero: a pruned channel could not come back. Not
    before a depth-wise layer, for the first reason again. So: where channels are mixed next.
    x (B, C, H, W), gates {site: (n,)}.
    """
    if gates is None or not any(site in gates for site, _ in layer.out):
        return x
    return x * channels(gates, layer.out, layer.widths, x.device).view(-1, 1, 1).to(x.dtype)


class Layer(nn.Module):
    """A convolution with BN, or with a bias, from one channel space to another."""

    def __init__(self, widths, into, out, k=1, stride=1, dilation=1, depthwise=False, norm=True):
        super().__init__()
        self.widths, self.into, self.out, self.depthwise = widths, into, out, depthwise
        c_in, c_out = size_of(into, widths), size_of(out, widths)
        self.conv = nn.Conv2d(c_in, c_out, k, stride, k // 2 * dilation, dilation,
                              c_out if depthwise else 1, bias=not norm)
        self.norm = nn.BatchNorm2d(c_out) if norm else None

    def forward(self, x):
        return self.conv(x) if self.norm is None else self.norm(self.conv(x))


def depthwise(widths, where, k=3, stride=1, dilation=1, norm=True):
    return Layer(widths, where, where, k, stride, dilation, True, norm)


def resize(x, size):
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, size, mode="bilinear",
                                                               align_corners=False)


class InvertedResidual(nn.Module):
    """1x1 expand, k x k depth-wise, 1x1 project; (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, widths, into, hidden, out, k=3, stride=1, dilation=1, act=F.relu):
        super().__init__()
        self.expand = Layer(widths, into, hidden) if hidden != into else None   # t = 1 has none
        self.depth = depthwise(widths, hidden, k, stride, dilation)
        self.project = Layer(widths, hidden, out)
        self.residual, self.act = stride == 1 and into == out, act

    def forward(self, x, gates=None):
        h = x if self.expand is None else self.act(self.expand(x))
        h = masked(self.act(self.depth(h)), self.depth, gates)
        y = masked(self.project(h), self.project, gates)
        # The terms of the sum are masked one by one: a mask on the sum would block the gradient
        # of the masks before it. The stem's output comes unmasked, to go through `depth` first.
        if self.residual and self.expand is None:
            x = masked(x, self.project, gates)
        return x + y if self.residual else y


class Attention(nn.Module):
    """Multi-head attention of 1x1 convolutions over all positions; (B, C, H, W) -> the same."""

    def __init__(self, widths, tokens, heads, key_dim=16, ratio=2):
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, ratio * key_dim
        keys, values = ((heads, key_dim),), ((heads, self.value_dim),)
        self.to_q = Layer(widths, tokens, keys)
        self.to_k = Layer(widths, tokens, keys)
        self.to_v = Layer(widths, tokens, values)
        self.project = Layer(widths, values, tokens)
        nn.init.zeros_(self.project.norm.weight)        # OFFICIAL-CODE: attention starts at zero

    def forward(self, x, gates=None):
        b, _, h, w = x.shape
        q, k, v = (layer(x).view(b, -1, dim, h * w) for layer, dim in (
            (self.to_q, self.key_dim), (self.to_k, self.key_dim), (self.to_v, self.value_dim)))
        a = torch.matmul(q.transpose(2, 3), k).softmax(-1)      # (B, heads, N, N), N = H * W
        # OFFICIAL-CODE: the products are not divided by sqrt(key_dim)
        y = torch.matmul(v, a.transpose(2, 3)).reshape(b, -1, h, w)
        return masked(self.project(masked(F.relu6(y), self.to_v, gates)), self.project, gates)


class Mlp(nn.Module):
    """1x1, 3x3 depth-wise with a bias, 1x1; (B, C, H, W) -> the same."""

    def __init__(self, widths, tokens, hidden):
        super().__init__()
        self.fc1 = Layer(widths, tokens, hidden)
        self.depth = depthwise(widths, hidden, norm=False)
        self.fc2 = Layer(widths, hidden, tokens)

    def forward(self, x, gates=None):
        h = masked(F.relu6(self.depth(self.fc1(x))), self.depth, gates)
        return masked(self.fc2(h), self.fc2, gates)


class Block(nn.Module):
    """A transformer block; drop_path: probability that a sample skips a branch in training."""

    def __init__(self, widths, tokens, heads, hidden, drop_path):
        super().__init__()
        self.attention, self.mlp = Attention(widths, tokens, heads), Mlp(widths, tokens, hidden)
        self.drop_path = drop_path

    def dropped(self, y):
        if not self.training or self.drop_path == 0:
            return y
        stays = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop_path
        return y * stays / (1 - self.drop_path)

    def forward(self, x, gates=None):
        x = x + self.dropped(self.attention(x, gates))
        return x + self.dropped(self.mlp(x, gates))


class Injection(nn.Module):
    """Semantics scale and shift local tokens: (B, C, H, W), (B, C, h, w) -> (B, D, H, W)."""

    def __init__(self, widths, into, out):
        super().__init__()
        self.local, self.scale, self.shift = (Layer(widths, into, out) for _ in range(3))

    def forward(self, x, semantics):
        scale = resize(F.hardsigmoid(self.scale(semantics)), x.shape[-2:])
        return self.local(x) * scale + resize(self.shift(semantics), x.shape[-2:])


# name: (kernel k, expansion t, stride s) of each row, channels of the stem and the four levels,
# heads, injected width, whether the head's fusion is depth-wise (OFFICIAL-CODE).
KTS = ((3, 1, 1), (3, 4, 2), (3, 3, 1), (5, 3, 2), (5, 3, 1), (3, 3, 2), (3, 3, 1), (5, 6, 2),
       (5, 6, 1), (3, 6, 1))
VARIANTS = {
    "tiny": (KTS[:9], (16, 16, 32, 64, 96), 4, 128, True),
    "small": (KTS, (16, 24, 48, 96, 128), 6, 192, False),
    "base": (KTS, (16, 32, 64, 128, 160), 8, 256, False),
    # OFFICIAL-CODE: TopFormer's own base for Cityscapes, 4,839,667 parameters with 19 classes
    "base_cityscapes": (KTS, (16, 32, 64, 128, 160), 8, 128, False),
    # PAPER: 10.34 M parameters, 4.1 GMACs at 512x512, "a larger per-layer width". OURS: the widths;
    # 10,345,958 parameters and 4.101 GMACs.
    "super": (tuple((k, max(t, 4) if i else t, s) for i, (k, t, s) in enumerate(KTS)),
              (16, 64, 120, 200, 208), 8, 256, False)}


class TopFormer(nn.Module):
    """(B, 3, H, W) -> logits (B, num_classes, H/8, W/8).

    variant: key of VARIANTS; widths: {site: elements} of a pruned network, None = dense.
    forward(x, gates): gates {site: (n,) of 0 and 1} mask channels, None = none.
    """

    def __init__(self, variant, num_classes, widths=None, drop_path=0.1):
        super().__init__()
        rows, _, _, _, light = VARIANTS[variant]
        w = self.widths = {"": 1, **(widths or self.dense_widths(variant))}
        self.name, self.num_classes, self.drop_path = variant, num_classes, drop_path
        strides = [2 * math.prod(s for _, _, s in rows[:i]) for i in range(len(rows) + 1)]
        at = [space(f"c{s}") for s in strides]
        self.stem = Layer(w, RGB, at[0], 3, 2)
        self.rows = nn.ModuleList(
            InvertedResidual(w, at[i], space(f"row{i}") if t > 1 else at[i], at[i + 1], k, s)
            for i, (k, t, s) in enumerate(rows))
        self.taps = [i for i in range(1, len(rows)) if at[i + 1:i + 2] != at[i + 2:i + 3]]
        levels = [at[i + 1] for i in self.taps]
        tokens = sum(levels, ())
        self.blocks = nn.ModuleList(
            Block(w, tokens, f"heads{i}", space(f"mlp{i}"), drop_path * i / 3) for i in range(4))
        self.injections = nn.ModuleList(Injection(w, c, space("inject")) for c in levels[1:])
        self.fuse = (depthwise(w, space("inject"), 1) if light else
                     Layer(w, space("inject"), space("head")))
        self.dropout = nn.Dropout2d(0.1)
        self.classify = Layer(w, self.fuse.out, (("", num_classes),), norm=False)

    @staticmethod
    def dense_widths(variant):
        rows, channels, heads, inject, light = VARIANTS[variant]
        level, widths = 0, {"c2": channels[0]}
        for i, (_, t, s) in enumerate(rows):
            widths |= {f"row{i}": t * channels[level]} if t > 1 else {}
            level += s == 2
            widths[f"c{2 ** (level + 1)}"] = channels[level]
        for i in range(4):
            widths |= {f"heads{i}": heads, f"mlp{i}": 2 * sum(channels[1:])}
        return widths | {"inject": inject} | ({} if light else {"head": inject})

    def forward(self, x, gates=None):
        x, taps = F.relu(self.stem(x)), []                                    # (B, 16, H/2, W/2)
        for i, row in enumerate(self.rows):
            x = row(x, gates)
            if i in self.taps:
                taps.append(x)                              # at H/4, H/8, H/16, H/32
        size = [math.ceil(d / 2) for d in x.shape[-2:]]
        tokens = torch.cat([F.adaptive_avg_pool2d(t, size) for t in taps], 1)   # (B, D, H/64, W/64)
        for block in self.blocks:
            tokens = block(tokens, gates)
        semantics = tokens.split([t.shape[1] for t in taps], 1)
        maps = [f(a, b) for f, a, b in zip(self.injections, taps[1:], semantics[1:])]
        x = sum(resize(y, maps[0].shape[-2:]) for y in maps)                    # (B, E, H/8, W/8)
        if not self.fuse.depthwise:
            x = masked(x, self.injections[0].local, gates)
        x = masked(F.relu(self.fuse(x)), self.fuse, gates)
        return self.classify(self.dropout(x))


class Separable(nn.Module):
    """3x3 depth-wise and 1x1, BN and ReLU after both."""

    def __init__(self, widths, into, out, dilation=1):
        super().__init__()
        self.depth, self.point = depthwise(widths, into, 3, 1, dilation), Layer(widths, into, out)

    def forward(self, x, gates=None):
        x = masked(F.relu(self.depth(x)), self.depth, gates)
        return masked(F.relu(self.point(x)), self.point, gates)


class DeepLabV3Plus(nn.Module):
    """App. H, MobileNet-V2 at output stride 16: (B, 3, H, W) -> logits (B, num_classes, H/4, W/4).

    The paper prints 2.26 M parameters and 9.5 GMACs and no structure. OURS: the ASPP and decoder
    that give both, 2,263,139 and 9,490,180,608 at 512x1024 with 19 classes.
    """
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
              (6, 160, 3, 2), (6, 320, 1, 1))        # t, c, n, s of MobileNet-V2, Table 2

    def __init__(self, num_classes, widths=None):
        super().__init__()
        w = self.widths = {"": 1, **(widths or self.dense_widths())}
        self.name, self.num_classes, self.drop_path = "deeplab", num_classes, 0.0
        x, rows, stride, rate = space("stem"), [], 2, 1
        self.stem = Layer(w, RGB, x, 3, 2)
        for j, (t, _, n, s) in enumerate(self.STAGES):
            for i in range(n):
                out, hidden = space(f"stage{j + 1}"), space(f"row{len(rows)}") if t > 1 else x
                step = s if i == 0 and stride * s <= 16 else 1      # beyond 1/16: dilation instead
                rows.append(InvertedResidual(w, x, hidden, out, 3, step, rate, F.relu6))
                rate = 2 if i == 0 and s > step else rate           # from the next row on
                stride, x = stride * step, out
        self.rows = nn.ModuleList(rows)
        branches = [space(f"aspp{i}") for i in range(5)]
        self.point, self.pool = Layer(w, x, branches[0]), Layer(w, x, branches[4])
        self.atrous = nn.ModuleList(Separable(w, x, branches[i], 6 * i) for i in (1, 2, 3))
        self.project = Layer(w, sum(branches, ()), space("high"))
        self.low = Layer(w, space("stage2"), space("low"))
        self.fuse = nn.ModuleList((Separable(w, space("high", "low"), space("fuse1")),
                                   Separable(w, space("fuse1"), space("fuse2"))))
        self.classify = Layer(w, space("fuse2"), (("", num_classes),), norm=False)

    @classmethod
    def dense_widths(cls):
        widths, c_in, row = {"stem": 32}, 32, 0
        for j, (t, c, n, _) in enumerate(cls.STAGES):
            for _ in range(n):
                widths |= {f"row{row}": t * c_in} if t > 1 else {}
                c_in, row = c, row + 1
            widths[f"stage{j + 1}"] = c
        return widths | {f"aspp{i}": 136 for i in range(5)} | {
            "high": 136, "low": 24, "fuse1": 272, "fuse2": 272}

    def forward(self, x, gates=None):
        def block(layer, y):
            return masked(F.relu(layer(y)), layer, gates)

        x = F.relu6(self.stem(x))                                           # (B, 32, H/2, W/2)
        for row in self.rows[:3]:
            x = row(x, gates)
        fine = x                                                            # (B, 24, H/4, W/4)
        for row in self.rows[3:]:
            x = row(x, gates)
        pooled = block(self.pool, F.adaptive_avg_pool2d(x, 1))
        x = torch.cat([block(self.point, x), *(f(x, gates) for f in self.atrous),
                       pooled.expand(-1, -1, *x.shape[-2:])], 1)            # (B, 680, H/16, W/16)
        x = resize(block(self.project, x), fine.shape[-2:])
        x = torch.cat([x, block(self.low, fine)], 1)                        # (B, 160, H/4, W/4)
        for separable in self.fuse:
            x = separable(x, gates)
        return self.classify(x)


def build(name, num_classes, widths=None, drop_path=0.0):
    """The network `name` of NETWORKS, dense or with the given widths."""
    return (DeepLabV3Plus(num_classes, widths) if name == "deeplab" else
            TopFormer(name, num_classes, widths, drop_path))


def dense_widths(name):
    """{site: elements} of a dense network."""
    return DeepLabV3Plus.dense_widths() if name == "deeplab" else TopFormer.dense_widths(name)


def layers_of(net):
    return [m for m in net.modules() if isinstance(m, Layer)]


def sites_of(net, scope="all"):
    """Sites that get a mask; "pyramid" leaves out transformer, injection and head."""
    return [site for site in net.widths if site and (
        scope == "all" or re.fullmatch(r"(c|row|stage)\d+|stem", site))]


def by_site(net, value):
    """Sum over all layers of value(layer), a number for each channel that the layer writes,
    gathered by the elements of the masks: {site: (n,)}."""
    total = {}
    for layer in layers_of(net):
        parts = value(layer).split([net.widths[site] * each for site, each in layer.out])
        for (site, each), part in zip(layer.out, parts):
            if site:
                total[site] = total.get(site, 0) + part.view(-1, each).sum(1)
    return total


# ---------------------------------------------------------------------------------------------
# 2. Weights to start from
# ---------------------------------------------------------------------------------------------

# Published TopFormer files -> names here. Older files use the second name of each pair.
PUBLISHED = (
    (r"^(module\.)?(backbone\.|decode_head\.)?", ""),
    (r"^(tpm|patch_embed)\.stem\.0", "stem"),
    (r"^(tpm|patch_embed)\.layer(\d+)\.conv\.(\d)", lambda m: f"rows.{int(m[2]) - 1}.{m[3]}"),
    (r"^trans\.transformer_blocks", "blocks"), (r"\.attn\.", ".attention."),
    (r"\.proj\.1\.", ".project."), (r"\.dwconv\.", ".depth.conv."),
    (r"^(SIM|fuse_blocks)\.(\d)", lambda m: f"injections.{int(m[2]) - 1}"),
    (r"\.(local_embedding|to_feat1)\.", ".local."), (r"\.(global_act|fuse2)\.", ".scale."),
    (r"\.(global_embedding|to_feat2)\.", ".shift."), (r"^linear_fuse", "fuse"),
    (r"^conv_seg", "classify.conv"), (r"\.c\.", ".conv."), (r"\.bn\.", ".norm."))


def our_name(key, net):
    """Name in `net` of a tensor of a published checkpoint."""
    for pattern, name in PUBLISHED:
        key = re.sub(pattern, name, key)
    row = re.match(r"rows\.(\d+)\.(\d)", key)
    if row and int(row[1]) < len(net.rows):         # without an expansion, the places begin later
        place = int(row[2]) // 2 + (net.rows[int(row[1])].expand is None)
        part = ("expand", "depth", "project")[min(place, 2)]
        key = key.replace(row[0], f"rows.{row[1]}.{part}", 1)
    return key


def load_published(net, path):
    """Load a TopFormer file into the dense network; returns a sentence on what did not match.

    Pyramid and transformer must be there and fit, else InputError; injection and head may be
    missing (classification files), the classifier may have other classes.
    """
    state = load_checkpoint(path, ())
    for wrapper in ("state_dict", "state_dict_ema", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    common.require_state(state, path)
    found = {our_name(key, net): value for key, value in state.items()}
    own, left = net.state_dict(), []
    for key, value in own.items():
        fits = key in found and found[key].shape == value.shape
        if fits:
            own[key] = found[key]
        elif not key.endswith("num_batches_tracked"):
            if not key.startswith("classify") and (key in found or key.startswith(
                    ("stem", "rows", "blocks"))):
                raise InputError(f"{path} is not of TopFormer-{net.name}: '{key}' is missing or "
                                 "has another shape; choose another --network")
            left.append(key)
    net.load_state_dict(own)
    said = f"{path}: {len(own) - len(left)} of {len(own)} tensors loaded"
    for what, names in (("random", left), ("not used", sorted(set(found) - set(own)))):
        said += f"; {what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else ""
    return said


def load_mobilenet(net, init):
    """Copy torchvision's MobileNet-V2 into the encoder, layer by layer in the order of the net."""
    features = common.classifier("mobilenet_v2", init).features[:-1]    # not the last 1x1
    pairs = [m for m in features.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    layers = layers_of(nn.ModuleList([net.stem, net.rows]))
    for layer, conv, norm in zip(layers, pairs[::2], pairs[1::2], strict=True):
        layer.conv.load_state_dict(conv.state_dict())
        layer.norm.load_state_dict(norm.state_dict())


def dense_network(cfg, num_classes):
    """The dense network with its first weights: random, or from --init."""
    torch.manual_seed(cfg.seed)
    net = build(cfg.network, num_classes, drop_path=cfg.drop_path)
    if cfg.init != "none":
        if cfg.network == "deeplab":
            load_mobilenet(net, cfg.init)
        else:
            said = load_published(net, cfg.init)
            if rank() == 0:
                print(said)
    return net


# ---------------------------------------------------------------------------------------------
# 3. Masks, Sections 3.1 and 3.2
# ---------------------------------------------------------------------------------------------


class Threshold(torch.autograd.Function):
    """Eqs. (2) and (3): s (n,) -> b (n,).

    least: so many largest stay even below tau (OURS: a layer without channels ends the network).
    """

    @staticmethod
    def forward(ctx, s, tau, least):
        b = s > tau                                         # Eq. (2): b = 1 if s > tau else 0
        if b.sum() < least:
            b[s.topk(least).indices] = True
        return b.to(s.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None                             # Eq. (3): dL/ds = dL/db


class SoftMasks(nn.Module):
    """The soft masks s of some sites; calling it gives the gates {site: b} that a network takes.

    OURS: s starts at 1 everywhere, so the search starts from the dense network.
    """

    def __init__(self, net, sites, tau=0.5, least=1):
        super().__init__()
        self.tau, self.least = tau, least
        self.s = nn.ParameterDict({site: torch.ones(net.widths[site]) for site in sites})

    def forward(self):
        return {site: Threshold.apply(s, self.tau, unit_of(site, len(s), self.least))
                for site, s in self.s.items()}

    def binary(self):
        """The gates as constants."""
        return {site: b.detach() for site, b in self().items()}


class Masked(nn.Module):
    """The search network as a function of the picture alone, e.g. for common.evaluate."""

    def __init__(self, net, masks):
        super().__init__()
        self.net, self.masks = net, masks

    def forward(self, x):
        return self.net(x, self.masks.binary())


# ---------------------------------------------------------------------------------------------
# 4. Losses, Section 3.3
# ---------------------------------------------------------------------------------------------

# OURS: the unit of Eq. (5). The paper does not say in what it counts MACs; they are squared, so
# beta = 0.01 means nothing without it. It was tuned (App. I) on a network of 8.2 GMACs, and with
# GMACs the pull on a mask is of the size of the loss's own gradient. So the dense network counts as
# 8.2 here, whatever network and picture measure.
DENSE_UNITS = 8.2


class Macs:
    """MACs of the masked network as a function of its gates: n^T Q n, n the elements that stay.

    Eq. (5) counts o' i t t' k^2 for a layer with o' of its outputs left. i is left over as well: a
    layer reads no more than the layer before wrote, so both counts come from masks.
    """

    def __init__(self, net, frame, device="cpu"):
        self.widths, self.sites = net.widths, list(net.widths)
        index = {site: i for i, site in enumerate(self.sites)}
        q, area = torch.zeros(len(index), len(index), dtype=torch.float64), areas(net, frame)
        for name, m in net.named_modules():
            if isinstance(m, Layer):
                taps = m.conv.kernel_size[0] ** 2 * area[name]                  # k^2 t t'
                for o, many in m.out:
                    for i, each in ((("", 1),) if m.depthwise else m.into):
                        q[index[o], index[i]] += many * each * taps
            elif isinstance(m, Attention):                  # q k^T and its product with v
                q[index[m.heads], index[""]] += area[name] ** 2 * (m.key_dim + m.value_dim)
        self.q = q.to(device)
        self.dense = self.of(net.widths)

    def counts(self, widths):
        return self.q.new_tensor([widths[site] for site in self.sites])

    def __call__(self, gates):
        """Scalar with a gradient to the gates {site: (n,)}; a site without gate is whole."""
        n = torch.stack([gates[site].sum().double() if site in gates else full
                         for site, full in zip(self.sites, self.counts(self.widths))])
        return n @ self.q @ n

    def of(self, widths):
        """The same number for {site: elements}."""
        n = self.counts(widths)
        return float(n @ self.q @ n)

    def costs(self):
        """{site: MACs that go with one element of its mask, in the dense network}."""
        return dict(zip(self.sites, ((self.q + self.q.T) @ self.counts(self.widths)).tolist()))


def areas(net, frame):
    """{name of a layer: H * W of its output} for a picture of `frame`; nothing is computed."""
    probe, area = copy.deepcopy(net).to("meta").float().eval(), {}
    for name, m in probe.named_modules():
        if isinstance(m, (Layer, Attention)):
            m.register_forward_hook(lambda m, _, y, name=name: area.update(
                {name: y.shape[-2] * y.shape[-1]}))
    with torch.no_grad():
        probe(torch.zeros(1, 3, *frame, device="meta"))
    return area


def regularizer(macs, gates, target):
    """Eq. (5): L_reg = | sum_l o'_l i'_l t_l t'_l k_l^2 - C |^2, in units of the dense / 8.2."""
    return (DENSE_UNITS * (macs(gates) - target) / macs.dense) ** 2


def task_loss(forward, gates, images, labels, cfg):
    """L of Eq. (4): cross-entropy at the label's resolution."""
    with autocast(images.device, cfg.amp):
        logits = forward(images, gates)
    return cross_entropy(resize(logits.float(), labels.shape[-2:]), labels)


# ---------------------------------------------------------------------------------------------
# 5. The gradient of the masks, Section 4.1
# ---------------------------------------------------------------------------------------------

# g(w, s) = L(w, s) + |w|^2 / (2 lambda) is what the weights minimise, Eq. (7); w* is where it is
# least; L_m = L + beta L_reg is what the masks minimise there, Eqs. (4) and (6).
#
#   Eq. (8)    dL_m/ds = grad_s L_m + (dw*/ds) grad_w L_m        w* moves with s
#   Eq. (17)   grad_w g(w*, s) = 0                               w* is a minimum, for every s, so
#   Eq. (19)   grad2_sw g + (dw*/ds) grad2_w g = 0               its derivative by s is 0 too
#   Eq. (9)    dw*/ds = - grad2_sw g (grad2_w g)^-1
#   Eq. (10)   grad2_w g = grad2_w L + I / lambda ~ I / lambda
#
# Approximation 1: grad2_w L = 0, as if L were piecewise linear in w.
#
#   Eq. (11)   dL_m/ds = grad_s L_m - lambda grad2_sw L grad_w L_m           grad2_sw g = grad2_sw L
#
# Let a(w) be the output of a channel where its mask meets it; the loss sees b a(w): L = F(b a(w)).
# (App. C takes a(w) = w. With BN and ReLU inside a(w) the same lines hold.)
#
#   Eq. (21)   grad_w L  = b F' a'(w)
#   Eq. (22)   grad_b L  =   F' a(w)
#   Eq. (24)   grad2_bw L =  F' a'(w) + b F'' a(w) a'(w)
#   Eq. (12)   grad2_bw L =  F' a'(w) =: grad_wb L
#
# Approximation 2: F'' = 0, the loss is linear in the channel's output too. (Eq. (25) should read
# diag(w*) times the second derivative; it vanishes either way.)
# Approximation 3, the diag of Eq. (12): a mask meets the weights of its own channel alone. In a
# network it also meets those that make the channel's inputs and those that read the channel; their
# terms can be as large as the one that is kept (test_what_the_diagonal_leaves_out).
# Approximation 4, Eq. (3): grad_s = grad_b.
#
#   Eq. (13)   dL_m/ds = grad_s L_m - lambda (F' a') (b F' a')     the second factor is grad_w L_m
#   Eq. (14)   F' a' = grad_w L_m where b = 1: no second copy of the gradients is needed. It is not
#              zero where b = 0, as printed, but meets grad_w L_m = 0 there in Eq. (13).
#   Eq. (15)   dL_m/ds = grad_s L_m - lambda b [grad_w L_m]^2      summed over a channel's weights
#
# Approximation 5: w is what a few steps of training have reached, not w*.
# Approximation 6 (OURS): those steps decay w by --weight-decay, not by the 1 / lambda of Eq. (7): a
# decay of 10 would leave no network to prune. lambda weighs the second term of Eq. (15) alone.
#
# What it does. By Eq. (15) a channel's mask rises by lambda times the summed squares of its
# weights' gradients: channels that the loss still works on are kept. At w* itself
# grad_w L = -w / lambda, and for a(w) linear both terms of Eq. (15) are -|w|^2 / lambda.


def squared_gradients(net):
    """{site: (n,)}: [grad_w L_m]^2 summed over the weights of each channel, BN's included."""
    return by_site(net, lambda layer: sum(p.grad.square().flatten(1).sum(1) if p.ndim > 1 else
                                          p.grad.square() for p in layer.parameters()))


def mask_gradient(net, masks, loss, lam, implicit=True):
    """Leave dL_m/ds of Eq. (15) in the masks' .grad; one backward pass gives both terms."""
    parameters = [*net.parameters(), *masks.parameters()]
    for p in parameters:
        p.grad = None
    loss.backward()                                     # grad_s L_m and grad_w L_m
    average_gradients(parameters)                       # before they are squared
    if implicit:
        squares = squared_gradients(net)
        for site, b in masks.binary().items():
            masks.s[site].grad -= lam * b * squares[site].to(b.dtype)


def mask_rates(masks, macs, target, steps, cfg):
    """{site: step size of its masks}. OURS, twice; the paper gives no step size for s.

    - Divided by the MACs of the site's elements: a 1x1 at full resolution costs 300 times a channel
      of the transformer, and under one rate its masks would be gone before the loss can speak.
      Then L_reg pulls at all masks alike, and L per MAC decides who goes first. A positive factor
      does not move the point where the gradient is zero.
    - Unless --mask-lr gives it, so large that a mask which the loss ignores falls from 1 to tau in
      a third of the steps, however many, under the first pull of beta = 0.01.
    """
    costs, sizes = macs.costs(), {site: len(s) for site, s in masks.s.items()}
    mean = sum(costs[site] * n for site, n in sizes.items()) / sum(sizes.values())
    gap = max(macs.dense - target, 0.1 * macs.dense)    # a target next to the dense needs no haste
    pull = 0.01 * 2 * DENSE_UNITS ** 2 * gap * mean / macs.dense ** 2
    rate = cfg.mask_lr or (1 - cfg.tau) / max(pull * steps / 3, 1e-12)
    return {site: rate * mean / costs[site] for site in sizes}


# ---------------------------------------------------------------------------------------------
# 6. Search, Section 4.2
# ---------------------------------------------------------------------------------------------


def mask_step(forward, net, masks, macs, target, images, labels, rates, beta, cfg):
    """Second step of Section 4.2: move the masks, leave the weights. Returns the loss terms.

    OURS: on the next batch of the training set; the paper sets no pictures aside for the masks.
    """
    gates = masks()
    terms = {"loss": task_loss(forward, gates, images, labels, cfg),
             "reg": beta * regularizer(macs, gates, target).float()}
    check_finite(terms)
    mask_gradient(net, masks, sum(terms.values()), cfg.lam, cfg.implicit)       # Eqs. (4), (15)
    clip_gradients(masks.parameters(), 0.0)     # no clipping; a NaN stops here
    with torch.no_grad():
        for site, s in masks.s.items():         # no weight decay: Eq. (5) alone makes masks fall
            s -= rates[site] * s.grad
            s.clamp_(min=0)                     # OURS: what was pruned long ago can still come back
    return {name: value.detach() for name, value in terms.items()}


def protected(net, gates):
    """[(parameter, bool tensor)]: its entries whose input and output channels both stay."""
    found = []
    for layer in layers_of(net):
        device = layer.conv.weight.device
        out = channels(gates, layer.out, net.widths, device).bool()
        into = channels(gates, layer.into, net.widths, device).bool()
        for p in layer.parameters():
            stays = out
            if p.ndim > 1:
                stays = out.view(-1, 1, 1, 1)
                stays = stays if layer.depthwise else stays & into.view(1, -1, 1, 1)
            if not stays.all():
                found.append((p, stays))
    return found


def weight_step(forward, net, gates, stays, images, labels, optimizer, cfg, penalty=None):
    """First step of Section 4.2: train the weights under fixed masks. Returns the loss terms.

    A pruned channel gets no gradient, but weight decay and momentum would move it: `stays`, from
    protected(), puts it back, so it returns with the weights it left with.
    """
    terms = {"loss": task_loss(forward, gates, images, labels, cfg)}
    if penalty:
        terms |= penalty()
    check_finite(terms)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    average_gradients(list(net.parameters()))
    clip_gradients(net.parameters(), cfg.clip)
    with torch.no_grad():
        before = [p.clone() for p, _ in stays]
        optimizer.step()
        for (p, keep), old in zip(stays, before):
            p.copy_(torch.where(keep, p, old))
    return {name: value.detach() for name, value in terms.items()}


def optimizer_for(net, cfg, steps):
    """(optimizer of the weights, poly schedule over `steps`); norms and biases do not decay."""
    groups = [{"params": [p for p in net.parameters() if (p.ndim > 1) == decays],
               "weight_decay": cfg.weight_decay * decays} for decays in (True, False)]
    optimizer = (torch.optim.SGD(groups, cfg.lr, cfg.momentum) if cfg.optimizer == "sgd" else
                 torch.optim.AdamW(groups, cfg.lr))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: max(0.0, 1 - i / steps) ** cfg.power)


def settings_of(cfg):
    """What must not change between a search and its resumption."""
    return {name: str(getattr(cfg, name)) for name in (
        "network", "init", "dense", "dataset", "data_root", "num_classes", "method", "implicit",
        "scope", "target", "target_gmacs", "round_to", "frame", "tau", "beta", "lam",
        "weight_steps", "mask_lr", "search_epochs", "settle", "slim_l1", "optimizer", "lr", "power",
        "momentum", "weight_decay", "clip", "drop_path", "epochs", "batch_size", "size", "scales",
        "image_scale", "amp", "seed")}


def to_resume(cfg, path):
    """What --resume goes on from, or None; InputError if it is of a search with other settings."""
    if not cfg.resume or not path.exists():
        return None
    state = load_checkpoint(path, ("model", "masks", "optimizer", "schedule", "settings"))
    for name, value in settings_of(cfg).items():
        if state["settings"].get(name) != value:
            raise InputError(f"{path} is of a search with another --{name.replace('_', '-')} ("
                             f"{state['settings'].get(name)}, not {value}); leave out --resume or "
                             "give another --out")
    return state


def free_epochs(cfg):
    """Epochs before channels are chosen: masks move, or BN scales shrink; others choose at once."""
    return round(cfg.search_epochs * (1 - cfg.settle)) * (cfg.method in ("bilevel", "slimming"))


def check_mask_steps(cfg, steps):
    if cfg.method == "bilevel" and free_epochs(cfg) * steps <= cfg.weight_steps:
        raise InputError(f"{free_epochs(cfg)} search epochs of {steps} batches before the masks "
                         "settle leave no mask step; raise --search-epochs, lower --weight-steps")


class Search:
    """State of a search: weights, masks, optimizer, and how to save it."""

    def __init__(self, cfg, net, device, steps):
        """steps: batches of an epoch."""
        self.cfg, self.net, self.epoch, self.seconds, self.reached = cfg, net, 0, 0.0, None
        self.macs = Macs(net, cfg.frame, device)
        self.target = target_of(cfg, net, self.macs)
        sites = sites_of(net, cfg.scope)
        self.masks = SoftMasks(net, sites, cfg.tau, cfg.round_to).to(device)
        self.optimizer, self.schedule = optimizer_for(net, cfg, cfg.search_epochs * steps)
        self.free = free_epochs(cfg)
        self.mask_steps = self.free * steps // (cfg.weight_steps + 1)
        self.rates = mask_rates(self.masks, self.macs, self.target, max(self.mask_steps, 1), cfg)
        self.forward = common.wrapped(net, cfg, device)
        self.refresh()

    def refresh(self):
        """To be called when the masks have moved; returns how many of them flipped."""
        old, self.gates = getattr(self, "gates", None), self.masks.binary()
        self.stays = protected(self.net, self.gates)
        return sum(int((old[k] != b).sum()) for k, b in self.gates.items()) if old else 0

    def move_masks(self, images, labels, done):
        """One mask step; done: share of the mask steps taken, below 1.

        OURS: the rate of the masks is poly too, and beta grows as it falls: the noise of the loss
        dies away, while the pull to the target keeps its pace. Under a constant beta the two
        balance where the MACs are still above the target.
        """
        fall = (1 - done) ** self.cfg.power
        rates = {site: rate * fall for site, rate in self.rates.items()}
        return mask_step(self.forward, self.net, self.masks, self.macs, self.target, images, labels,
                         rates, self.cfg.beta / fall, self.cfg)

    def train_weights(self, images, labels):
        penalty = None
        if self.cfg.method == "slimming" and self.epoch < self.free:
            penalty = lambda: {"l1": self.cfg.slim_l1 * scale_norm(self.net)}
        return weight_step(self.forward, self.net, self.gates, self.stays, images, labels,
                           self.optimizer, self.cfg, penalty)

    def fix_masks(self):
        """Fix the masks: the channels with the best scores that the target has room for.

        For the paper's method the score is s, so this moves the threshold from tau to where the
        target is met (OURS: Eq. (5) comes close to it but weighs it against the loss).
        """
        self.reached = float(self.macs(self.gates))
        scores = scores_of(self.cfg.method, self.net, self.masks)
        with torch.no_grad():
            for site, b in select(scores, self.macs, self.target, self.cfg.round_to).items():
                self.masks.s[site].copy_(b)
        self.refresh()

    def save(self, path):
        save_checkpoint(path, model=self.net.state_dict(), masks=self.masks.state_dict(),
                        optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict(),
                        epoch=self.epoch, seconds=self.seconds, reached=self.reached,
                        settings=settings_of(self.cfg))

    def load(self, state, path):
        load_weights(self.net, state["model"], path)
        load_weights(self.masks, state["masks"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.seconds, self.reached = (state[k] for k in ("epoch", "seconds", "reached"))
        common.set_rng_state(state["rng"])
        self.refresh()


def search(cfg, device, folder):
    """Learn masks and weights together, cut, evaluate without fine-tuning. Returns its numbers."""
    images, loader = open_loader(cfg, "train", train=True)
    _, val_loader = open_loader(cfg, "val")
    net = dense_network(cfg, images.num_classes)
    target_of(cfg, net, Macs(net, cfg.frame))           # refused now, not after hours
    steps = len(loader)
    check_mask_steps(cfg, steps)
    stored = to_resume(cfg, folder / "last.pt")         # before the dense network is touched
    net = start(cfg, net, device, loader, val_loader)
    run = Search(cfg, net.train(), device, steps)
    torch.manual_seed(cfg.seed)         # as if the dense network had been there before
    if stored:
        run.load(stored, folder / "last.pt")
    else:
        common.forget_log(folder, "search")
        if run.free == 0:
            run.fix_masks()
    progress = Progress(f"search {cfg.method}", cfg.search_epochs, steps, device, run.epoch)
    while run.epoch < cfg.search_epochs:
        begun, trace, losses, terms = time.perf_counter(), [], [], {}
        moving = cfg.method == "bilevel" and run.epoch < run.free
        loader.sampler.set_epoch(cfg.epochs + run.epoch)        # not the crops of dense training
        for i, (pictures, labels) in enumerate(loader):
            pictures, labels = common.to_device(pictures, labels, cfg, device)
            done = run.epoch * steps + i
            turn, rest = divmod(done, cfg.weight_steps + 1)
            with common.training_step("search", run.epoch, i):              # Section 4.2
                if moving and rest == cfg.weight_steps:                     # its second step
                    terms |= run.move_masks(pictures, labels, turn / run.mask_steps)
                    flips = run.refresh()
                    trace.append([done, float(run.macs(run.gates)) / run.macs.dense, flips])
                else:                                                       # its first step
                    terms |= run.train_weights(pictures, labels)
            run.schedule.step()
            losses.append(terms["loss"])
            progress.step(run.epoch, i, terms, len(pictures) * world_size())
        run.seconds += time.perf_counter() - begun
        common.average_buffers(run.net)
        run.epoch += 1
        if run.epoch == run.free:
            run.fix_masks()
        mean = {"loss": torch.stack(losses).mean()}
        extra = record_epoch(run, terms | mean, trace, val_loader, device, folder)
        run.save(folder / "last.pt")
        progress.close(run.epoch - 1, terms, extra)
    return finish(run, images, val_loader, device, folder)


def record_epoch(run, terms, trace, val_loader, device, folder):
    """Log losses, MACs, flips, what is left of every site and the masked mIoU; returns a remark."""
    share = float(run.macs(run.gates)) / run.macs.dense
    miou = evaluate(Masked(run.net, run.masks), val_loader, run.net.num_classes, device,
                    run.cfg.amp).miou()
    log_record(folder, stage="search", epoch=run.epoch - 1, masked_miou=miou, macs=share,
               trace=trace, widths={site: int(b.sum()) for site, b in run.gates.items()},
               **{name: float(value) for name, value in terms.items()})
    return (f" | {100 * share:.1f}% of the MACs, {sum(flips for *_, flips in trace)} flips, masked "
            f"mIoU {100 * miou:.2f}")


# ---------------------------------------------------------------------------------------------
# 7. Cut: from masks to a small network
# ---------------------------------------------------------------------------------------------


def unit_of(site, n, round_to):
    """Elements that stay or go together: --round-to channels, but single attention heads."""
    return 1 if site.startswith("heads") else min(max(1, round_to), n)


def target_of(cfg, net, macs):
    """C of Eq. (5), MACs for one picture of --frame; InputError if no masks can meet it."""
    target = cfg.target_gmacs * 1e9 or cfg.target * macs.dense
    if target > macs.dense:
        raise InputError(f"the target of {target / 1e9:.4g} GMACs is above the dense network's "
                         f"{macs.dense / 1e9:.4g} at {cfg.frame[0]}x{cfg.frame[1]}; lower it")
    sites = sites_of(net, cfg.scope)
    least = macs.of(net.widths | {k: unit_of(k, net.widths[k], cfg.round_to) for k in sites})
    if target < least:
        raise InputError(f"the target of {target / 1e9:.4g} GMACs is below the {least / 1e9:.4g} "
                         "that are left with the fewest channels in every layer; raise the target, "
                         "or try --scope all or a smaller --round-to")
    return target


def select(scores, macs, target, round_to=1):
    """The gates {site: b} that keep the best channels the target has room for.

    scores {site: (n,)}: higher stays. Channels are taken in units of --round-to, the best of all
    sites first. Where one does not fit its site is closed; what is cheaper may still fit.
    """
    order, units, widths = {}, [], dict(macs.widths)
    for site, s in scores.items():
        s = s.detach().double().cpu()
        order[site] = s.argsort(descending=True, stable=True)
        parts = s[order[site]].split(unit_of(site, len(s), round_to))
        widths[site] = len(parts[0])                        # the first unit is not up for choice
        units += [(float(part.mean()), site, len(part)) for part in parts[1:]]
    closed = set()
    for _, site, many in sorted(units, key=lambda unit: -unit[0]):
        if site not in closed:
            widths[site] += many
            if macs.of(widths) > target:
                widths[site] -= many
                closed.add(site)
    gates = {site: torch.zeros_like(s) for site, s in scores.items()}
    for site, b in gates.items():
        b[order[site][:widths[site]].to(b.device)] = 1
    return gates


def prune(net, gates):
    """The network without the channels whose gate is 0; same output as net(x, gates), Eq. (16)."""
    widths = {site: int(gates[site].sum()) if site in gates else n
              for site, n in net.widths.items()}
    small, like = build(net.name, net.num_classes, widths, net.drop_path), next(net.parameters())

    def kept(where):
        return channels(gates, where, net.widths, like.device).nonzero()[:, 0]

    for layer, cut in zip(layers_of(net), layers_of(small), strict=True):
        into = None if layer.depthwise else kept(layer.into)
        cut.conv.load_state_dict(narrowed(layer.conv, kept(layer.out), into).state_dict())
        if layer.norm is not None:
            cut.norm.load_state_dict(narrowed(layer.norm, kept(layer.out)).state_dict())
    return small.to(like).train(net.training)


def load_arch(path):
    """(network, classes, widths) of an arch.json; InputError if it does not fit."""
    value = common.read_json(path, "arch.json")
    name, classes, widths = ([value.get(key) for key in ("network", "classes", "widths")]
                             if isinstance(value, dict) else (None, None, None))
    if name not in NETWORKS or type(classes) is not int or not isinstance(widths, dict) or not (
            2 <= classes <= 254):
        raise InputError(f"{path} is no arch.json of this program: it needs network (one of "
                         f"{', '.join(NETWORKS)}), classes (2 to 254) and widths")
    dense = dense_widths(name)
    for site in {**dense, **widths}:
        n, full = widths.get(site), dense.get(site, 0)
        if type(n) is not int or not 1 <= n <= full:
            raise InputError(f"{path} does not fit {name}: " + (
                f"site '{site}' has {n} channels, not 1 to {full}" if full else
                f"it has no site '{site}'"))
    return name, classes, widths


def restore(cfg, classes, device):
    """A trained network of --method in eval mode, rebuilt from its arch.json and a state_dict."""
    path = Path(cfg.arch or folder_of(cfg) / "arch.json")
    name, found, widths = load_arch(path)
    if found != classes:
        raise InputError(f"{path} is for {found} classes, the data set has {classes}")
    net = build(name, classes, widths)
    plain = cfg.method in ("dense", "retrained")
    path = cfg.weights or path.parent / ("best.pt" if plain else "pruned.pt")
    load_weights(net, load_checkpoint(path)["model"], path)
    return common.place(net.eval(), cfg, device)


def write_arch(net, folder, **about):
    common.write_text(folder / "arch.json", json.dumps(
        {"network": net.name, "classes": net.num_classes, "parameters": count_params(net), **about,
         "widths": {site: n for site, n in net.widths.items() if site}}, indent=1))


def finish(run, images, val_loader, device, folder):
    """Cut, check the small network against the masked one, measure both, write it all.

    Returns a dict of what was found, on rank 0.
    """
    cfg, small = run.cfg, prune(run.net, run.gates).eval()
    run.net.eval()
    picture = val_loader.dataset[0, 0][0][None].to(device)
    with torch.no_grad():
        apart = float((small(picture) - run.net(picture, run.gates)).abs().max())
    scores = {name: evaluate(net, val_loader, images.num_classes, device, cfg.amp).miou()
              for name, net in (("masked", Masked(run.net, run.masks)), ("pruned", small))}
    macs, target = count_macs(small, cfg.frame), run.target
    met, row = abs(macs / target - 1) <= 0.01, None
    if rank() == 0:
        save_checkpoint(folder / "pruned.pt", model=small.state_dict())
        about, rows = latency.compare({"dense": run.net, cfg.method: small}, cfg.frame, device, cfg)
        row = {"method": cfg.method, "implicit": cfg.implicit, "masked_miou": scores["masked"],
               "pruned_miou": scores["pruned"], "parameters": count_params(small), "macs": macs,
               "target": target, "met": met, "search_seconds": round(run.seconds, 1),
               "latency_ms": rows[cfg.method]["median_ms"],
               "dense_latency_ms": rows["dense"]["median_ms"]}
        if cfg.method == "bilevel":     # what Eq. (5) has reached before the ranking
            row["masks_macs"] = run.reached
        write_arch(small, folder, frame=list(cfg.frame), result=row, measured_on=about)
        draw_widths(folder / "widths.png", run.net.widths, small.widths, cfg)
        draw_search(folder, target / run.macs.dense)
        masks = (f"the masks came to {run.reached / 1e9:.4f}, " if cfg.method == "bilevel" else "")
        again = cfg if folder == folder_of(cfg) else replace(cfg, arch=str(folder / "arch.json"))
        print(f"target {target / 1e9:.4f} GMACs: {masks}the "
              f"ranking to {macs / 1e9:.4f} ({100 * (macs / target - 1):+.2f}%): "
              f"{'met within 1%' if met else 'NOT met within 1%'}\n"
              f"masked mIoU {100 * scores['masked']:.2f}, pruned mIoU, no fine-tuning, "
              f"{100 * scores['pruned']:.2f}; largest difference of a logit {apart:.1e}\n"
              f"in {folder}: arch.json, pruned.pt, last.pt, log.jsonl, widths.png, search_*.png\n"
              f"next: python bilevel_prune.py --eval --bench{common.flags_of(again, QUICK)}")
    common.barrier()
    return row


# ---------------------------------------------------------------------------------------------
# 8. Baselines and dense training
# ---------------------------------------------------------------------------------------------

# A baseline is a score for every channel. Network, target, data, optimizer and number of batches
# are the paper's method's, whose mask steps use up some: the baselines get more weight steps.


def uniform(net):
    """The same share of every site: a channel's rank by L1 norm within its site."""
    return {site: -s.argsort(descending=True, stable=True).argsort() / len(s)
            for site, s in magnitude(net).items()}


def magnitude(net):
    """L1 norm of the filter (Li et al., ICLR 2017); the mean of its layer is 1, for one ranking."""
    def norms(layer):
        norm = layer.conv.weight.detach().abs().flatten(1).mean(1)
        return norm / norm.mean()
    return site_means(net, norms, lambda layer: True)


def slimming(net):
    """|BN scale| after training under an L1 penalty (Liu et al., ICCV 2017)."""
    return site_means(net, lambda layer: layer.norm.weight.detach().abs(),
                      lambda layer: layer.norm is not None)


def site_means(net, value, counts):
    """Mean of value(layer) over the layers that write a site and for which counts(layer)."""
    def zero(layer):
        return torch.zeros_like(layer.conv.weight[:, 0, 0, 0])
    total = by_site(net, lambda layer: value(layer) if counts(layer) else zero(layer))
    number = by_site(net, lambda layer: zero(layer) + bool(counts(layer)))
    return {site: total[site] / number[site] for site in total}


def scale_norm(net):
    """L1 norm of all BN scales."""
    return sum(layer.norm.weight.abs().sum() for layer in layers_of(net) if layer.norm is not None)


def scores_of(method, net, masks):
    """{site: (n,)} for the sites that have a mask; higher stays."""
    if method == "bilevel":
        return {site: s.detach() for site, s in masks.s.items()}
    found = {"uniform": uniform, "magnitude": magnitude, "slimming": slimming}[method](net)
    return {site: found[site] for site in masks.s}


def folder_of(cfg, method=None):
    """Run folder of a network: the paper's method in --out itself, the others beside it."""
    method = method or cfg.method
    name = "" if method == "bilevel" and cfg.implicit else (
        "no_implicit" if method == "bilevel" else method)
    return Path(cfg.out) / name


def train_network(cfg, net, device, folder, loader, val_loader):
    """Plain training of a network; best.pt and last.pt in `folder`. Returns the best mIoU."""
    net = common.place(net, cfg, device)
    optimizer, schedule = optimizer_for(net, cfg, cfg.epochs * len(loader))

    def loss_terms(forward, images, labels):
        return {"loss": task_loss(forward, None, images, labels, cfg)}

    torch.manual_seed(cfg.seed)
    best = common.fit(folder.name, net, loss_terms, optimizer, schedule, loader, val_loader,
                      net.num_classes, cfg, device, folder, cfg.clip, identity_of(cfg, net), True)
    if rank() == 0:
        write_arch(net, folder)
        print(f"{folder.name}: best mIoU on val {100 * best:.2f} -> {folder}/best.pt")
    common.barrier()
    return best


def identity_of(cfg, net):
    """What a checkpoint says about itself, so that it is not taken for another network's."""
    root = Path(cfg.data_root).resolve() if cfg.data_root else ""
    return {"network": f"{net.name} {net.num_classes} {net.widths}",
            "dataset": f"{cfg.dataset} {root} x{cfg.image_scale:g}", "init": cfg.init,
            "seed": str(cfg.seed)}


def start(cfg, net, device, loader, val_loader):
    """The dense network the search starts from: --dense, or what --train made, or made now.

    InputError if what is stored there is of another network, data set or seed, or not finished:
    only --train replaces it.
    """
    folder, path = Path(cfg.out) / "dense", cfg.dense
    if not path:
        path, last = folder / "best.pt", folder / "last.pt"
        wanted = identity_of(cfg, net)
        state = load_checkpoint(last, ("epoch",)) if last.exists() else {"epoch": 0, **wanted}
        other = [key for key, value in wanted.items() if state.get(key) != value]
        if other:
            raise InputError(f"{last} is of another {other[0]} than this run; give another --out, "
                             "or --train to train the dense network anew")
        if 0 < state["epoch"] < cfg.epochs and not cfg.resume:
            raise InputError(f"{last} has {state['epoch']} of {cfg.epochs} epochs: --resume goes "
                             "on, --train starts anew")
        if state["epoch"] < cfg.epochs:
            train_network(cfg, net, device, folder, loader, val_loader)
    load_weights(net, load_checkpoint(path)["model"], path)
    return common.place(net, cfg, device)


def train(cfg, device):
    """--train: the dense network, or with --method retrained the found widths from scratch."""
    images, loader = open_loader(cfg, "train", train=True)
    _, val_loader = open_loader(cfg, "val")                     # chooses best.pt
    if cfg.method == "retrained":
        name, classes, widths = load_arch(cfg.arch or Path(cfg.out) / "arch.json")
        if classes != images.num_classes:
            raise InputError(f"arch.json is for {classes} classes, not {images.num_classes}")
        torch.manual_seed(cfg.seed)
        net, folder = build(name, classes, widths, cfg.drop_path), folder_of(cfg)
    else:
        net, folder = dense_network(cfg, images.num_classes), Path(cfg.out) / "dense"
    train_network(cfg, net, device, folder, loader, val_loader)
    if rank() == 0:
        stage = "--eval" if cfg.method == "retrained" else "--search"
        again = replace(cfg, method="bilevel") if cfg.method == "dense" else cfg
        print(f"next: python bilevel_prune.py {stage}{common.flags_of(again, QUICK)}")


# ---------------------------------------------------------------------------------------------
# 9. Evaluate, bench, sweep
# ---------------------------------------------------------------------------------------------


def evaluate_network(cfg, device):
    """--eval: mIoU of the small network as it left the search, one scale (5.2), and pictures."""
    images, loader = open_loader(cfg, cfg.split)
    net, folder = restore(cfg, images.num_classes, device), folder_of(cfg)
    forward = torch.compile(net) if cfg.compile else net
    matrix = evaluate(forward, loader, images.num_classes, device, cfg.amp)
    if rank() == 0:
        kind = {"dense": "dense", "retrained": "retrained"}.get(cfg.method, "pruned")
        common.report_segmentation(cfg.method, matrix, images, cfg, folder, kind)
        common.draw_segmentations(net, images, cfg, device, folder)


PRINTED = {"tiny": "1.4 M / 0.6 G", "small": "3.1 M / 1.2 G", "base": "5.1 M / 1.8 G",
           "base_cityscapes": "5.1 M / 2.7 G", "super": "10.34 M / 4.1 G",
           "deeplab": "2.26 M / 9.5 G"}


def bench(cfg, device):
    """--bench: counts beside the paper's; dense and found networks; the backends of App. F."""
    print("parameters and MACs, ours | printed in the paper (150 classes, 512x512; deeplab and "
          "base_cityscapes 19, 512x1024)")
    for name in NETWORKS:
        wide = name in ("deeplab", "base_cityscapes")
        classes, size = (19, (512, 1024)) if wide else (150, (512, 512))
        net = build(name, classes)
        print(f"  {name:15s} {count_params(net):11,d} {count_macs(net, size):15,d} | "
              f"{PRINTED[name]}")
    nets, classes, network = {}, 19, cfg.network
    paths = {"bilevel": Path(cfg.out) / "arch.json", **{
        m: Path(cfg.out) / m / "arch.json" for m in ("no_implicit", *METHODS[1:4])}}
    for method, path in ({"found": Path(cfg.arch)} if cfg.arch else paths).items():
        if cfg.arch or path.exists():
            network, classes, widths = load_arch(path)
            nets[method] = build(network, classes, widths).eval()
    nets = {"dense": build(network, classes).eval(), **nets}
    about, rows = latency.compare(nets, cfg.frame, device, cfg)
    backends = bench_backends(*list(nets.items())[:2][-1], cfg.frame, device)
    common.write_text(Path(cfg.out) / "bench.json", json.dumps(
        {**about, "networks": rows, "backends": backends}, indent=1))
    print(f"in {cfg.out}: bench.json")


def bench_backends(name, net, frame, device):
    """App. F as far as PyTorch goes: each step on the same network, measured in turn."""
    x, last = torch.randn(1, 3, *frame, device=device), torch.channels_last
    net = copy.deepcopy(net).to(device)
    folded = common.fold_bn(net)
    nhwc, y = copy.deepcopy(folded).to(memory_format=last), x.contiguous(memory_format=last)
    calls = {"as trained": lambda: net(x), "conv and BN folded": lambda: folded(x),
             "folded, channels_last": lambda: nhwc(y)}
    try:
        compiled, compiled_nhwc = torch.compile(folded), torch.compile(nhwc)
        with torch.no_grad():
            compiled(x), compiled_nhwc(y)
        calls |= {"folded, compiled": lambda: compiled(x),
                  "folded, channels_last, compiled": lambda: compiled_nhwc(y)}
    except Exception as error:                      # no C++ compiler, no Triton: many types
        print(f"torch.compile does not work here ({type(error).__name__}); left out")
    rows = latency.measure_many(calls, device)
    print(f"App. F in PyTorch, {name}. Not reproduced: sparse storage and matrix reordering (cut "
          "channels leave nothing sparse),\ngenetic tuning of a phone's kernels, its Adreno GPU")
    for name, t in rows.items():
        print(f"  {name:32s} {t['median']:8.2f} ms, p90 {t['p90']:8.2f} ms")
    return rows


def bench_search(cfg, device):
    """--bench-search: time of the two steps of the search; what the implicit term costs."""
    net = common.place(dense_network(cfg, 19), cfg, device).train()
    run = Search(replace(cfg, method="bilevel"), net, device, 100)
    shape = (cfg.batch_size, *cfg.size)
    images, labels = common.to_device(torch.randn(shape[0], 3, *shape[1:]),
                                      torch.randint(0, 19, shape), cfg, device)
    gates = run.masks.binary()

    def masks(implicit, weights=True):
        net.requires_grad_(weights)
        run.cfg = replace(run.cfg, implicit=implicit)
        mask_step(run.forward, net, run.masks, run.macs, run.target, images, labels,
                  dict.fromkeys(run.rates, 0.0), cfg.beta, run.cfg)
        net.requires_grad_(True)

    steps = {"weight step": lambda: weight_step(run.forward, net, gates, run.stays, images, labels,
                                                run.optimizer, run.cfg),
             "mask step, Eq. (15)": lambda: masks(True),
             "mask step, --no-implicit": lambda: masks(False),
             "the same without weight gradients": lambda: masks(False, False)}
    t = measure_steps(steps, device)
    print(f"{latency.device_name(device)}, {torch.get_num_threads()} threads, {cfg.network}, batch "
          f"{shape[0]}, 3x{shape[1]}x{shape[2]}")
    for name, ms in t.items():
        print(f"  {name:36s} {ms:9.1f} ms")
    k = cfg.weight_steps
    full, plain, bare = (k * t["weight step"] + t[name] for name in list(t)[1:])
    print(f"{k} weight steps and a mask step: the implicit term costs "
          f"{100 * (full / plain - 1):+.1f}% (paper, Table 3: 1.3 against 1.1 GPU days);\na plain "
          "step that leaves out the weights' gradients would save "
          f"{100 * (1 - bare / plain):.1f}%. Peak memory {common.peak_memory(device):.2f} GiB")


def measure_steps(steps, device, rounds=9):
    """{name: median ms}; latency.measure_many works without gradients."""
    times = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i > 1:
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: sorted(ms)[len(ms) // 2] for name, ms in times.items()}


def sweep(cfg, device):
    """--sweep, Apps. I and J: one search for each beta, lambda and target; sweep.md and .json.

    The table says what the masks came to by Eq. (5) alone, and after the ranking that meets the
    target whatever beta is. It is written anew after every search.
    """
    settings = [("beta", {"beta": v}) for v in cfg.sweep_betas]
    settings += [("lambda", {"lam": v}) for v in cfg.sweep_lams]
    settings += [("target", {"target": v, "target_gmacs": 0.0}) for v in cfg.sweep_targets]
    net = build(cfg.network, open_split(cfg, "train", cfg.size).num_classes)
    macs = Macs(net, cfg.frame)
    goals = [target_of(replace(cfg, **change), net, macs) for _, change in settings]
    done, lines = {}, [
        "| swept | value | pruned mIoU | parameters | target GMACs | by the masks alone | after "
        "the ranking | ms | search s |", "|---|---|---|---|---|---|---|---|---|"]
    for (name, change), goal in zip(settings, goals):
        changed = replace(cfg, **change)
        key = f"beta{changed.beta:g}_lambda{changed.lam:g}_mmacs{goal / 1e6:.6g}"
        if key not in done:
            done[key] = search(changed, device, Path(cfg.out) / "sweep" / key)
        row, value = done[key], next(iter(change.values()))
        if rank() == 0:
            lines.append(f"| {name} | {value:g} | {100 * row['pruned_miou']:.2f} | "
                         f"{row['parameters']:,} | {goal / 1e9:.4f} | "
                         f"{row['masks_macs'] / 1e9:.4f} | {row['macs'] / 1e9:.4f} | "
                         f"{row['latency_ms']:.1f} | {row['search_seconds']:.0f} |")
            common.write_text(Path(cfg.out) / "sweep.json", json.dumps(done, indent=1))
            common.write_text(Path(cfg.out) / "sweep.md", "\n".join(lines) + "\n")
    if rank() == 0:
        print("\n".join(lines) + f"\nin {cfg.out}: sweep.md, sweep.json")


def export_network(cfg):
    """--export FILE: the folded network as a torch.export program for pictures of --frame."""
    classes = open_loader(cfg, cfg.split)[0].num_classes
    net = restore(cfg, classes, torch.device("cpu"))
    error = common.export(net, cfg.frame, cfg.export)
    print(f"{cfg.export}: torch.export program for 1x3x{cfg.frame[0]}x{cfg.frame[1]}, largest "
          f"difference to the network {error:.1e}\nrun it anywhere: "
          f"torch.export.load('{cfg.export}').module()(image)")


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw_widths(path, before, after, cfg):
    """A row for each site: how many elements there were (grey), how many stay (blue)."""
    sites, scale = [site for site in before if site], 2
    image = Image.new("RGB", (scale * 640, scale * (60 + 18 * len(sites))), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12 * scale)
    draw.text((20, 36), f"Channels before and after, {cfg.network}, {cfg.method}", "black",
              ImageFont.load_default(size=16 * scale), "lm")
    longest = max(before[site] for site in sites)
    for i, site in enumerate(sites):
        y, x0 = scale * (52 + 18 * i), scale * 70
        draw.text((x0 - 12, y + 14), site, "black", font, "rm")
        for n, color in ((before[site], "#d0d0d0"), (after[site], "#3182bd")):
            draw.rectangle((x0, y, x0 + scale * 460 * n / longest, y + 26), color)
        draw.text((x0 + scale * 460 * before[site] / longest + 12, y + 14),
                  f"{after[site]} of {before[site]}", "black", font, "lm")
    common.save_png(image.resize((image.width // scale, image.height // scale),
                                  Image.Resampling.LANCZOS), path)


def draw_search(folder, target):
    """From the log: MACs and mask flips by mask step, loss and masked mIoU by epoch."""
    records = common.read_log(folder, "search")
    steps = [point for r in records for point in r["trace"]]
    if steps:
        first, last = steps[0][0], steps[-1][0]
        common.line_chart(folder / "search_macs.png", "MACs that the masks leave", "batch",
                          "share of the dense network", {
                              "masks": [(at, share) for at, share, _ in steps],
                              "target": [(first, target), (last, target)]})
        common.line_chart(folder / "search_flips.png", "Mask flips", "batch", "masks that changed "
                          "in a mask step", {"flips": [(at, flips) for at, _, flips in steps]})
    common.line_chart(folder / "search_loss.png", "Training loss", "epoch", "cross-entropy, "
                      "mean of the epoch", {"loss": [(r["epoch"] + 1, r["loss"]) for r in records]})
    common.line_chart(folder / "search_miou.png", "Masked network on val", "epoch", "mIoU (%)", {
        "masked mIoU": [(r["epoch"] + 1, 100 * r["masked_miou"]) for r in records]})


# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------

STAGES = {"train": "train the dense network, or retrain found widths (--method retrained)",
          "search": "learn masks and weights, cut the small network out; writes arch.json",
          "eval": "mIoU and pictures of the network of --method",
          "bench": "parameters, MACs and measured latency, App. F's steps one by one",
          "bench-search": "time of a weight step and a mask step",
          "sweep": "a search for each beta, lambda and target of Apps. I and J; a table"}


def check(cfg):
    """Refuse early what cannot work."""
    if not 0 < cfg.target <= 1:
        raise InputError(f"--target {cfg.target:g} is a share of the dense MACs, above 0 and at "
                         "most 1; give GMACs with --target-gmacs")
    if cfg.target_gmacs < 0 or cfg.round_to < 1 or cfg.weight_steps < 1:
        raise InputError("--target-gmacs must not be negative, --round-to and --weight-steps need "
                         "1 or more")
    if not 0 <= cfg.momentum < 1 or cfg.power < 0 or not cfg.lr > 0:
        raise InputError("--lr must be positive, --momentum from 0 to below 1, --power 0 or more")
    if min(*cfg.sweep_betas, *cfg.sweep_lams) < 0:
        raise InputError("--sweep-betas and --sweep-lams are not negative")
    if not 0 < cfg.tau < 1 or min(cfg.beta, cfg.lam, cfg.mask_lr, cfg.slim_l1) < 0:
        raise InputError("--tau lies between 0 and 1; --beta, --lam, --mask-lr, --slim-l1 are not "
                         "negative")
    if not 0 <= cfg.settle < 1 or cfg.search_epochs < 1 or not 0 <= cfg.drop_path < 1:
        raise InputError("--settle and --drop-path are shares from 0 to below 1, --search-epochs "
                         "needs 1 or more")
    if min(cfg.frame) < 32:
        raise InputError("--frame needs 32 pixels a side or more")
    if not all(0 < t <= 1 for t in cfg.sweep_targets):
        raise InputError("--sweep-targets are shares of the dense MACs, above 0 and at most 1")


def check_batches(cfg, pictures):
    """BN needs two values a channel: on the tokens, or in the image pooling of deeplab.

    pictures: of the training set, which may have fewer than a batch.
    """
    share, rest = divmod(cfg.batch_size, world_size())
    share = min(share, -(-pictures // world_size()))
    if rest:
        raise InputError(f"--batch-size {cfg.batch_size} does not divide over {world_size()} "
                         "processes")
    if share * (cfg.network == "deeplab" or math.prod(math.ceil(d / 64) for d in cfg.size)) < 2:
        raise InputError(f"--size {cfg.size[0]} {cfg.size[1]} and batches of {share} pictures "
                         "leave BN a single value; take a larger crop or batch, or more pictures")


def main(argv=None):
    stages, cfg = common.parse_args(Config, "bilevel_prune", STAGES, QUICK, __doc__, argv)
    check(cfg)
    device = common.setup(cfg)
    if "search" in stages and cfg.method in ("dense", "retrained"):
        raise InputError(f"--search --method {cfg.method} prunes nothing; use --train, or choose "
                         f"from {', '.join(METHODS[:4])}")
    if "search" in stages and cfg.arch:
        raise InputError("--search finds an architecture, --arch names one; leave one of them out")
    if "sweep" in stages and cfg.method != "bilevel":
        raise InputError(f"--sweep is of the paper's method; leave out --method {cfg.method}")
    if stages & {"train", "search", "sweep", "eval"}:
        open_split(cfg, "val", cfg.size)                    # missing? say so before hours of work
    if stages & {"train", "search", "sweep"}:
        pictures = open_split(cfg, "train", cfg.size)
        data.check_segmentation(pictures)
        check_batches(cfg, len(pictures))
    common.write_config(cfg, stages, folder_of(cfg))
    if "train" in stages:
        train(cfg, device)
    if "search" in stages:
        search(cfg, device, folder_of(cfg))
    if "sweep" in stages:
        sweep(cfg, device)
    if "eval" in stages:
        evaluate_network(cfg, device)
    if rank() == 0 and "bench" in stages:
        bench(cfg, device)
    if "bench-search" in stages:
        if world_size() > 1:
            raise InputError("--bench-search measures a single process; run it without torchrun")
        check_batches(cfg, cfg.batch_size)
        bench_search(cfg, device)
    if rank() == 0 and cfg.export:
        export_network(cfg)


if __name__ == "__main__":
    common.run_main(main)
