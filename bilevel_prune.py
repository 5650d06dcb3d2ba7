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
    w                    weights_of(net)                   all weights, BN's scales and shifts too
    s, b, tau            mask.s, mask.binary(), mask.tau   soft mask, binary mask, threshold
    L, L_reg, C          task_loss, regularizer, target    Eqs. (4), (5); MACs that may remain
    beta, lambda         cfg.beta, cfg.lam                 Eqs. (4), (15)
    o', i, k, t t'       left(out), left(into), k, area    Eq. (5); i' for i is OURS
    dL_m / ds            first - second + pull             Eq. (15): mask_gradient
    Section 4.2          learn                             the algorithm on one page

    python bilevel_prune.py --search                          dense network, masks, cut: 90 s of
                                                              one core's time
    python bilevel_prune.py --search --method uniform --eval  a baseline of the same budget
    python bilevel_prune.py --bench                           counts beside the paper's, latency
"""
import contextlib
import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook
from torchvision.ops import stochastic_depth

import common
import latency
from common import (BaseConfig, InputError, count_macs, count_params, enlarged, load_checkpoint,
                    load_weights, narrowed, open_loader, open_split, opt, rank)

# ---------------------------------------------------------------------------------------------
# 2. Settings. Defaults are the paper's; the tag says where it says so.
# ---------------------------------------------------------------------------------------------

NETWORKS = ("tiny", "small", "base", "base_cityscapes", "super", "deeplab")
METHODS = ("bilevel", "uniform", "magnitude", "slimming", "random", "dense")
MOMENTUM = 0.9                          # PAPER 5.2: of SGD, for weights and masks
SLIM_L1 = 1e-4                          # on BN's scales; the value of the slimming paper


@dataclass
class Config(BaseConfig):
    # PAPER 5.2 prunes super, "a larger per-layer width" than base; App. H deeplab, DeepLabV3+ on
    # MobileNet-V2. base_cityscapes has a narrower head.
    network: str = opt("super", "a size of TopFormer, or deeplab", "dense", NETWORKS)
    init: str = opt("none", "weights the dense network starts from: a published TopFormer "
                    "checkpoint; for deeplab MobileNet-V2's (a file, or imagenet)", "dense")
    # PAPER 5.2; on ADE20K 512 512.
    size: tuple[int, int] = opt((512, 1024), "training crop, H W", "dense", low=32)
    # PAPER 5.2 for ADE20K; on Cityscapes it draws 0.5, 0.75, 1 or 2.
    scales: tuple[float, float] = opt((0.5, 2.0), "random scale", "dense", low=0.01, high=16)
    # PAPER 5.2: 8 on each of 8 GPUs.
    batch_size: int = opt(64, "images a step over all processes", "dense", low=1)
    # OFFICIAL-CODE of TopFormer: 80k steps of 16 images.
    epochs: int = opt(430, "epochs of the dense training, and of --train", "dense", low=1)
    # PAPER 5.2: SGD, poly of power 0.9; the rate is 1.2e-4 on ADE20K, 0.01 on VOC. TopFormer's own
    # recipe is AdamW with a warm-up of 1,500 steps and ten times the rate for the head. The paper
    # states SGD with the same rates, so small that from random weights SGD hardly moves: give
    # --init or a larger --lr.
    lr: float = opt(3e-4, "learning rate; for random weights larger", "dense", low=1e-12)
    # OURS, not 1 / lambda: approximation 6 below. Of all weights (PAPER Eq. (7)); OFFICIAL-CODE of
    # TopFormer spares BN's scales and shifts and biases.
    weight_decay: float = opt(1e-4, "of the weights, BN's too", "dense")
    # OFFICIAL-CODE of TopFormer.
    drop_path: float = opt(0.1, "largest stochastic depth of a block", "dense", high=0.9)
    method: str = opt("bilevel", "how --search chooses channels, and whose network the other "
                      "stages take: the paper's, a baseline, or the dense one", "search", METHODS)
    widths: str = opt("", "arch.json whose widths --search takes over instead of --target and "
                      "--round-to, a control: --method chooses which channels", "search")
    # The ablation of Table 3 is --no-implicit.
    implicit: bool = opt(True, "second term of Eq. (15)", "search")
    dense: str = opt("", "checkpoint the search starts from [<out>/dense, trained if need be]",
                     "search")
    # PAPER 5.2: each conv layer; PAPER 1: the token pyramid alone.
    scope: str = opt("all", "which channels have masks", "search", ("all", "pyramid"))
    # PAPER: 2.4 of 8.2 GMACs.
    target: float = opt(0.29, "share of the dense MACs to be left", "search", low=1e-6, high=1)
    # OURS: 8 suits most hardware.
    round_to: int = opt(1, "widths are multiples of this, or full", "search", low=1)
    # PAPER 5.2.
    frame: tuple[int, int] = opt((512, 1024), "H W for MACs and latency", "search", low=32)
    # PAPER 3.2, and 5.2 for beta and lambda; about lambda see QUICK.
    tau: float = opt(0.5, "threshold of Eq. (2)", "search", low=1e-3, high=0.999)
    beta: float = opt(0.01, "weight of the MACs term, Eq. (4)", "search")
    lam: float = opt(0.1, "lambda of Eq. (15)", "search")
    # PAPER 4.2: a few; the number is OURS.
    weight_steps: int = opt(3, "weight steps between two mask steps", "search", low=1)
    # OURS, both; the paper has one step size, which it does not give.
    mask_lr: float = opt(0.0, "step size of a mask of mean cost; 0: by the steps", "search")
    cost_power: float = opt(0.5, "step sizes go with 1 / cost^this", "search", high=1)
    # OURS: as long as the dense training; at its end, weights train under the channels that have
    # been chosen, by any method.
    search_epochs: int = opt(430, "epochs of the search, its end included", "search", low=1)
    settle: float = opt(0.34, "share of it after the choice", "search", high=0.99)
    # PAPER 4.2: no fine-tuning is needed.
    finetune: bool = opt(True, "--train starts from the pruned weights; --no-finetune, a control, "
                         "from random ones", "train")
    against: str = opt("", "run folder of another search from the same dense network: say how far "
                       "the kept channels agree")


# A minute or two on two cores: the smallest network, learning rates for a few hundred steps. On a
# CPU both NHWC and widths in eights are needed to turn fewer MACs into less time.
# lam = 2 makes the second term of Eq. (15) about as long as the first. Measured: two searches from
# one dense network with other batches (below) keep channels that agree with kappa 0.62; with the
# paper's lam = 0.1 the second term is 0.07 of the first, and kappa 0.12. The paper's stays the
# default of its preset: there hundreds of epochs average the noise of the first term, here it has
# 75 mask steps.
#     python bilevel_prune.py --search --out runs/a
#     python bilevel_prune.py --search --out runs/b --seed 1 --dense runs/a/dense/best.pt \
#         --against runs/a
QUICK = dict(network="tiny", size=(96, 192), frame=(256, 512), scales=(0.75, 1.5),
             epochs=4, search_epochs=4, batch_size=8, lr=0.05, drop_path=0.0,
             lam=2.0, weight_steps=1, round_to=8, channels_last=True)

# ---------------------------------------------------------------------------------------------
# 3. Networks. Every layer says whose channels it reads and writes: masks, MACs, cutting read it
# ---------------------------------------------------------------------------------------------

# What a layer reads or writes is a space: a tuple of (Mask, channels for each element of the mask).
# Which layers share a mask, and where it stands (OURS: the paper says "each CONV layer", and
# Eq. (1) puts the mask right behind the convolution; but BN would turn its zero into BN's shift,
# and a ReLU behind it passes no gradient at zero, so that a pruned channel could not come back).
# So the mask stands where channels are mixed next: behind BN and activation, not before a
# depth-wise layer.
#
#   inverted residual    x --> expand --> depth --> [row3] --> project --> [c8] --> + --> y
#                        `----------------- masked by [c8] already -------------------^
#       An expansion channel passes its depth-wise filter alone: its rows of expand and depth and
#       its column of project go together, one mask. What is added must have the same channels: all
#       rows of a pyramid level share one.
#
#   t = 1, first row     x --------------> depth --> [c2] ---> project --> [c2] --> + --> y
#                        `--> [c2] -------------------------------------------------^
#       The stem's output comes unmasked, to pass `depth` first. Each term of the sum has the mask
#       for itself: one on the sum would block the gradient of those before it.
#
#   residual stream      tokens [c4|c8|c16|c32] --> q, k, v --> heads --> [heads0] --> project
#   of a block                  |                                     [c4|c8|c16|c32] <---'
#                               + <-------------------------------------'
#       The tokens are the four levels side by side, and so is their mask; mlp: [mlp0] likewise. A
#       head is one element: its q, k and v have to stay rectangular.
#
#   heads                local * scale + shift --> [inject] --> sum --> fuse --> [head] --> classify
#                        tiny: fuse is depth-wise, [inject] stands behind it alone


def fixed(n):
    """A space of n channels that stay: colours, classes."""
    return ((Mask(n), 1),)


def size_of(space):
    """Channels of a space."""
    return sum(mask.n * each for mask, each in space)


def gate(space, device):
    """The binary mask of each channel of a space, (channels,)."""
    return torch.cat([mask.binary().to(device).repeat_interleave(each) for mask, each in space])


def left_of(layer):
    """Which channels b leaves of what a layer writes and reads: (C',) and (C,) bool."""
    device = layer.conv.weight.device
    out = gate(layer.out, device)
    into = gate(layer.into, device)
    return out.bool(), into.bool()


def masked(x, space):
    """Eq. (1) with b: a_l = b_l (.) x, a depth-wise 1x1 convolution is one factor a channel.

    x (B, C, H, W) -> the same. Dense and pruned networks have no masks: x itself.
    """
    if all(mask.s is None for mask, _ in space):
        return x
    return x * gate(space, x.device).to(x.dtype).view(-1, 1, 1)


class Layer(nn.Module):
    """Convolution, BN or a bias, activation, mask. into, out: spaces."""

    def __init__(self, into, out, k=1, stride=1, dilation=1, depthwise=False, norm=True,
                 act=nn.Identity(), mask=False):
        super().__init__()
        self.into = into
        self.out = out
        self.depthwise = depthwise
        self.act = act
        self.mask = out if mask else ()
        groups = size_of(out) if depthwise else 1
        self.conv = nn.Conv2d(size_of(into), size_of(out), k, stride, k // 2 * dilation, dilation,
                              groups, bias=not norm)
        self.norm = nn.BatchNorm2d(size_of(out)) if norm else nn.Identity()

    def forward(self, x):
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        x = self.norm(self.conv(x))
        return masked(self.act(x), self.mask)


def depthwise(space, k=3, stride=1, dilation=1, **kind):
    """A depth-wise layer, masked."""
    return Layer(space, space, k, stride, dilation, depthwise=True, mask=True, **kind)


class InvertedResidual(nn.Module):
    """1x1 expand, k x k depth-wise, 1x1 project; (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, into, hidden, out, k=3, stride=1, dilation=1, act=F.relu):
        super().__init__()
        one = hidden == into                            # t = 1: no expansion, x comes unmasked
        self.expand = nn.Identity() if one else Layer(into, hidden, act=act)
        self.depth = depthwise(hidden, k, stride, dilation, act=act)
        self.project = Layer(hidden, out, mask=True)
        self.residual = stride == 1 and into == out
        self.skip = out if one else ()                  # what masks x, where nothing before has

    def forward(self, x):
        h = self.expand(x)                              # (B, t C, H, W)
        y = self.project(self.depth(h))                 # (B, C', H/stride, W/stride)
        return masked(x, self.skip) + y if self.residual else y


class Attention(nn.Module):
    """Multi-head attention of 1x1 convolutions over all positions; (B, C, H, W) -> the same."""
    KEY, VALUE = 16, 32                                 # channels of a head (OFFICIAL-CODE)

    def __init__(self, tokens, heads):
        super().__init__()
        keys = ((heads, self.KEY),)
        values = ((heads, self.VALUE),)
        self.products = keys + values                   # what q k^T and its product with v sum over
        self.to_q = Layer(tokens, keys)
        self.to_k = Layer(tokens, keys)
        self.to_v = Layer(tokens, values)
        self.project = Layer(values, tokens, mask=True)
        nn.init.zeros_(self.project.norm.weight)        # OFFICIAL-CODE: attention starts at zero

    def forward(self, x):
        b, _, h, w = x.shape
        q = self.to_q(x).view(b, -1, self.KEY, h * w)           # (B, heads, 16, N), N = H * W
        k = self.to_k(x).view(b, -1, self.KEY, h * w)           # (B, heads, 16, N)
        v = self.to_v(x).view(b, -1, self.VALUE, h * w)         # (B, heads, 32, N)
        # OFFICIAL-CODE: the products are not divided by sqrt(16).
        a = (q.transpose(2, 3) @ k).softmax(-1)                 # (B, heads, N, N)
        y = (v @ a.transpose(2, 3)).reshape(b, -1, h, w)        # (B, 32 heads, H, W)
        return self.project(masked(F.relu6(y), self.to_v.out))


class Block(nn.Module):
    """A transformer block; (B, C, H, W) -> the same. MLP: 1x1, 3x3 depth-wise with a bias, 1x1.

    drop_path: probability that a sample skips a branch in training.
    """

    def __init__(self, tokens, heads, hidden, drop_path):
        super().__init__()
        self.attention = Attention(tokens, heads)
        self.drop_path = drop_path
        self.mlp = nn.Sequential(OrderedDict(
            fc1=Layer(tokens, hidden), depth=depthwise(hidden, norm=False, act=F.relu6),
            fc2=Layer(hidden, tokens, mask=True)))

    def forward(self, x):
        for branch in (self.attention, self.mlp):
            x = x + stochastic_depth(branch(x), self.drop_path, "row", self.training)
        return x


class Injection(nn.Module):
    """Semantics scale and shift local tokens: (B, C, H, W), (B, C, h, w) -> (B, D, H, W)."""

    def __init__(self, into, out, mask):
        super().__init__()
        self.local = Layer(into, out)
        self.scale = Layer(into, out)
        self.shift = Layer(into, out)
        self.mask = out if mask else ()

    def forward(self, x, semantics):
        scale = enlarged(F.hardsigmoid(self.scale(semantics)), x.shape[-2:])    # (B, D, H, W)
        shift = enlarged(self.shift(semantics), x.shape[-2:])
        return masked(self.local(x) * scale + shift, self.mask)


class Network(nn.Module):
    """A network whose channels have names. masks: {name: Mask}; widths: {name: elements} of a
    pruned network, None = dense."""

    def __init__(self, name, num_classes, widths):
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.given = widths or {}
        self.masks = nn.ModuleDict()

    def space(self, name, n=0):
        """The channels of this name; n of them in the dense network, to be told the first time. In
        a pruned one its widths count, and n may be anything."""
        if name not in self.masks:
            self.masks[name] = Mask(self.given.get(name, n))
        return ((self.masks[name], 1),)

    def widths(self):
        return {name: mask.n for name, mask in self.masks.items()}


# name: (kernel k, expansion t, stride s) of each row, channels of the stem and the four levels,
# heads, injected width, whether the head's fusion is depth-wise (OFFICIAL-CODE).
KTS = ((3, 1, 1),                                   # 1/2 of the picture's size
       (3, 4, 2), (3, 3, 1),                        # 1/4
       (5, 3, 2), (5, 3, 1),                        # 1/8
       (3, 3, 2), (3, 3, 1),                        # 1/16
       (5, 6, 2), (5, 6, 1), (3, 6, 1))             # 1/32
SUPER = (*KTS[:2], (3, 4, 1),
         (5, 4, 2), (5, 4, 1),
         (3, 4, 2), (3, 4, 1),
         *KTS[7:])
VARIANTS = {
    "tiny": (KTS[:9], (16, 16, 32, 64, 96), 4, 128, True),
    "small": (KTS, (16, 24, 48, 96, 128), 6, 192, False),
    "base": (KTS, (16, 32, 64, 128, 160), 8, 256, False),
    # OFFICIAL-CODE: TopFormer's own base for Cityscapes, 4,839,667 parameters with 19 classes
    "base_cityscapes": (KTS, (16, 32, 64, 128, 160), 8, 128, False),
    # PAPER: 10.34 M parameters, 4.1 GMACs at 512x512, "a larger per-layer width". OURS: the widths;
    # 10,345,958 parameters and 4.101 GMACs.
    "super": (SUPER, (16, 64, 120, 200, 208), 8, 256, False)}


class TopFormer(Network):
    """(B, 3, H, W) -> logits (B, num_classes, H/8, W/8). variant: key of VARIANTS."""

    def __init__(self, variant, num_classes, widths=None, drop_path=0.1):
        super().__init__(variant, num_classes, widths)
        rows, channels, heads, inject, light = VARIANTS[variant]
        channels = dict(zip((2, 4, 8, 16, 32), channels))               # by stride
        stride, x = 2, self.space("c2", channels[2])
        self.stem = Layer(fixed(3), x, 3, 2, act=F.relu)
        self.rows = nn.Sequential()
        for i, (k, t, s) in enumerate(rows):
            hidden = self.space(f"row{i}", t * size_of(x)) if t > 1 else x
            stride *= s
            out = self.space(f"c{stride}", channels[stride])
            self.rows.append(InvertedResidual(x, hidden, out, k, s))
            x = out
        levels = [self.space(f"c{s}") for s in (4, 8, 16, 32)]
        tokens = sum(levels, ())
        self.blocks = nn.Sequential()
        for i in range(4):
            (mask, _), = self.space(f"heads{i}", heads)
            hidden = self.space(f"mlp{i}", 2 * size_of(tokens))
            self.blocks.append(Block(tokens, mask, hidden, drop_path * i / 3))
        x = self.space("inject", inject)
        self.injections = nn.ModuleList(Injection(level, x, not light) for level in levels[1:])
        self.fuse = (depthwise(x, 1, act=F.relu) if light else
                     Layer(x, self.space("head", inject), act=F.relu, mask=True))
        self.dropout = nn.Dropout2d(0.1)
        self.classify = Layer(self.fuse.out, fixed(num_classes), norm=False)

    def forward(self, x):
        x = self.stem(x)                                                      # (B, 16, H/2, W/2)
        taps = []
        for first, end in ((0, 3), (3, 5), (5, 7), (7, None)):      # to H/4, H/8, H/16, H/32
            x = self.rows[first:end](x)
            taps.append(x)
        size = [math.ceil(d / 2) for d in x.shape[-2:]]
        tokens = torch.cat([F.adaptive_avg_pool2d(t, size) for t in taps], 1)   # (B, D, H/64, W/64)
        semantics = self.blocks(tokens).split([t.shape[1] for t in taps], 1)
        maps = [f(a, b) for f, a, b in zip(self.injections, taps[1:], semantics[1:])]
        x = self.fuse(sum(enlarged(y, maps[0].shape[-2:]) for y in maps))         # (B, E, H/8, W/8)
        return self.classify(self.dropout(x))


def point(into, out):
    """1x1, BN, ReLU, masked."""
    return Layer(into, out, act=F.relu, mask=True)


def separable(into, out, dilation=1):
    """3x3 depth-wise and 1x1, BN and ReLU after both; (B, C, H, W) -> (B, C', H, W)."""
    return nn.Sequential(depthwise(into, 3, 1, dilation, act=F.relu), point(into, out))


class DeepLabV3Plus(Network):
    """App. H, MobileNet-V2 at output stride 16: (B, 3, H, W) -> logits (B, num_classes, H/4, W/4).

    The paper prints 2.26 M parameters and 9.5 GMACs and no structure. OURS: the ASPP and decoder
    that give both, 2,263,139 and 9,490,180,608 at 512x1024 with 19 classes.
    """
    # Expansion t, channels c, rows n, stride s: of MobileNet-V2, Table 2, but for the last stride
    # of 2, that of row 13. There the stride is 1; dilation from the next row on keeps what a filter
    # sees.
    STAGES = ((1, 16, 1, 1),
              (6, 24, 2, 2),
              (6, 32, 3, 2),
              (6, 64, 4, 2),
              (6, 96, 3, 1),
              (6, 160, 3, 1),
              (6, 320, 1, 1))

    def __init__(self, num_classes, widths=None):
        super().__init__("deeplab", num_classes, widths)
        x = self.space("stem", 32)
        self.stem = Layer(fixed(3), x, 3, 2, act=F.relu6)
        self.rows = nn.Sequential()
        for j, (t, c, n, s) in enumerate(self.STAGES):
            out = self.space(f"stage{j + 1}", c)
            for stride in (s, *[1] * (n - 1)):
                row = len(self.rows)
                hidden = self.space(f"row{row}", t * size_of(x)) if t > 1 else x
                dilation = 1 if row <= 13 else 2
                self.rows.append(InvertedResidual(x, hidden, out, 3, stride, dilation, F.relu6))
                x = out
        branches = [self.space(f"aspp{i}", 136) for i in range(5)]
        self.point = point(x, branches[0])
        self.pool = point(x, branches[4])
        self.atrous = nn.ModuleList(separable(x, branches[i], 6 * i) for i in (1, 2, 3))
        self.project = point(sum(branches, ()), self.space("high", 136))
        self.low = point(self.space("stage2"), self.space("low", 24))
        both = self.project.out + self.low.out
        self.fuse = nn.Sequential(separable(both, self.space("fuse1", 272)),
                                  separable(self.space("fuse1"), self.space("fuse2", 272)))
        self.classify = Layer(self.space("fuse2"), fixed(num_classes), norm=False)

    def forward(self, x):
        fine = self.rows[:3](self.stem(x))                                  # (B, 24, H/4, W/4)
        x = self.rows[3:](fine)                                             # (B, 320, H/16, W/16)
        pooled = self.pool(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[-2:])
        x = torch.cat([self.point(x), *(f(x) for f in self.atrous), pooled], 1)     # (B, 5 * 136)
        x = enlarged(self.project(x), fine.shape[-2:])                      # (B, 136, H/4, W/4)
        x = torch.cat([x, self.low(fine)], 1)                               # (B, 160, H/4, W/4)
        return self.classify(self.fuse(x))


def build(name, num_classes, widths=None, drop_path=0.0):
    """The network `name` of NETWORKS, dense or with the given widths."""
    return (DeepLabV3Plus(num_classes, widths) if name == "deeplab" else
            TopFormer(name, num_classes, widths, drop_path))


def layers_of(net):
    return [m for m in net.modules() if isinstance(m, Layer)]


def weights_of(net):
    """w: all parameters but the masks."""
    return [p for name, p in net.named_parameters() if not name.startswith("masks.")]


def by_mask(layers, value):
    """{started Mask: (n, channels of an element, of all layers that write it)} of value(layer), a
    number for each channel that the layer writes."""
    rows = {}
    for layer in layers:
        parts = value(layer).split([mask.n * each for mask, each in layer.out])
        for (mask, each), part in zip(layer.out, parts):
            if mask.s is not None:
                rows.setdefault(mask, []).append(part.view(-1, each))
    return {mask: torch.cat(parts, 1) for mask, parts in rows.items()}


# ---------------------------------------------------------------------------------------------
# 4. Masks, Sections 3.1 and 3.2
# ---------------------------------------------------------------------------------------------


#   forward    s (n,)  --> s > tau --> b (n,), 0 or 1 --> [ a b ] (B, C, H, W)
#   backward   dL/ds (n,) <-- as it is -- dL/db (n,) = sum_BHW  dL/d(a b) a
#
# A channel with b = 0 sends nothing on and gets no gradient for its weights; but dL/db is there all
# the same, it says what a little of the channel would do to the loss. So a pruned channel can be
# called back. And s is a memory: only where it passes tau does anything change. A channel far above
# is turned off by many steps of one opinion, one that has just fallen is back after one.


class Threshold(torch.autograd.Function):
    """Eqs. (2) and (3): s (n,), tau (n,) -> b (n,).

    least: so many largest stay even below tau (OURS: a layer without channels ends the network).
    """

    @staticmethod
    def forward(ctx, s, tau, least):
        b = s > tau                                         # Eq. (2): b = 1 if s > tau else 0
        # s - tau, not s: once chosen, tau is -inf or +inf, and the chosen ones come first.
        b[(s - tau).topk(least).indices] = True
        return b.to(s.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None                             # Eq. (3): dL/ds = dL/db


class Mask(nn.Module):
    """Decides about n elements, channels or attention heads, one by one. Layers that write the
    same elements share it.

    s (n,): the soft mask, None in a network without masks. tau (n,): the threshold; it is the same
    number everywhere until channels are chosen for good, then -inf where they stay, +inf where
    they go, so that s remains what was learnt.
    """

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.s = None

    def start(self, tau, least):
        """OURS: s starts at 1 everywhere, so the search starts from the dense network."""
        self.s = nn.Parameter(torch.ones(self.n))
        self.least = least
        self.register_buffer("tau", torch.full((self.n,), tau))

    def binary(self):
        """b (n,), with the gradient of Eq. (3)."""
        if self.s is None:
            return torch.ones(self.n)
        return Threshold.apply(self.s, self.tau, self.least)

    def choose(self, elements):
        """Keep these for good; elements: indices."""
        self.tau.fill_(math.inf)[elements] = -math.inf


def prunable(net, cfg):
    """{Mask: elements that have to stay} of all channels, or of the pyramid's alone.

    As many stay or go together at the end: --round-to channels, but single attention heads. Widths
    that are given need no rounding.
    """
    return {mask: 1 if name.startswith("heads") or cfg.widths else min(cfg.round_to, mask.n)
            for name, mask in net.masks.items()
            if cfg.scope == "all" or re.fullmatch(r"(c|row|stage)\d+|stem", name)}


def masks_of(net):
    """{name: Mask} of the masks that have been started."""
    return {name: mask for name, mask in net.masks.items() if mask.s is not None}


@contextlib.contextmanager
def pruned_weights_kept(net):
    """Around an optimizer step: weights of pruned channels stay (PAPER 3.2: "the information in
    pruned channels is preserved").

    Their gradient is zero, b = 0 blocks it. But weight decay would wear them down, and momentum
    would push them on, so that a channel that comes back would not be the one that left. Frozen are
    its rows, and the columns of later layers that read it. Not its BN statistics: the channel is
    still computed, so they follow its inputs.
    """
    old = []
    for layer in layers_of(net):
        out, into = left_of(layer)
        for p in layer.parameters():                    # (C', C, k, k), (C', 1, k, k) or (C',)
            moves = out.view(-1, 1, 1, 1) if p.ndim > 1 else out
            if p.ndim > 1 and not layer.depthwise:
                moves = moves & into.view(1, -1, 1, 1)
            old.append((p, moves, p.data.clone()))
    yield
    for p, moves, value in old:
        p.data.copy_(torch.where(moves, p.data, value))


# ---------------------------------------------------------------------------------------------
# 5. Losses, Section 3.3, and the gradient of the masks, Section 4.1
# ---------------------------------------------------------------------------------------------

# OURS: the unit of Eq. (5). The paper does not say in what it counts MACs; they are squared, so
# beta = 0.01 means nothing without it. beta was tuned (App. I) on a network of 8.2 GMACs, so the
# dense network counts as 8.2 here, whatever network and picture measure. How its pull compares with
# the loss's own gradient is logged at every mask step.
DENSE_UNITS = 8.2


def areas(net, frame):
    """{layer: t t', the positions of its output} for a picture of `frame`, a black one. Leaves the
    network in eval mode."""
    area = {}

    def note(module, inputs, output):
        if isinstance(module, (Layer, Attention)):
            area[module] = output.shape[-2:].numel()
    with torch.no_grad(), register_module_forward_hook(note):
        net.eval()(torch.zeros(1, 3, *frame))
    return area


def macs_of(area, counts):
    """MACs with counts {Mask: elements} left, and all of the masks that are not in it. A number,
    or a tensor with a gradient if the counts are."""
    def left(space):
        return sum(each * counts.get(mask, mask.n) for mask, each in space)

    total = 0
    for layer, positions in area.items():                       # sum_l o'_l i'_l k_l^2 t_l t'_l
        if isinstance(layer, Attention):                        # (N, N) pairs of positions a head
            total += left(layer.products) * positions ** 2
        else:
            # OURS: i' for the paper's i: a layer reads no more than what the one before has left.
            inputs = 1 if layer.depthwise else left(layer.into)
            total += left(layer.out) * inputs * layer.conv.kernel_size[0] ** 2 * positions
    return total


def counts_left(net):
    """{Mask: elements that b leaves}, float64 scalars with the gradient of Eq. (3)."""
    return {mask: mask.binary().double().sum() for mask in net.masks.values()}


def widths_left(net):
    """The same as whole numbers, by name: what prune() makes of the network."""
    return {name: int(mask.binary().sum()) for name, mask in net.masks.items()}


def share_left(net, area):
    """MACs that b leaves, as a share of the dense network's."""
    return macs_of(area, counts_left(net)).item() / macs_of(area, {})


def regularizer(net, area, target):
    """Eq. (5): L_reg = | sum_l o'_l i'_l t_l t'_l k_l^2 - C |^2, in units of the dense / 8.2."""
    unit = macs_of(area, {}) / DENSE_UNITS
    return ((macs_of(area, counts_left(net)) - target) / unit).square().float()


def task_loss(forward, images, labels, cfg):
    """L of Eq. (4): cross-entropy at the label's resolution."""
    with common.autocast(cfg):
        logits = forward(images)                                    # (B, K, h, w)
    return common.cross_entropy(enlarged(logits.float(), labels.shape[-2:]), labels)


# The gradient of the masks. g(w, s) = L(w, s) + |w|^2 / (2 lambda) is what the weights minimise,
# Eq. (7); w* is where it is least; L_m = L + beta L_reg is what the masks minimise there, Eqs. (4)
# and (6). L_reg does not depend on w, so grad_w L_m = grad_w L. For one layer: w (C, i, k, k) and
# BN's gamma, beta (C,); a(w) (B, C, H, W) is what the mask meets, a'(w) its derivative by w; b (C,)
# the mask; F the rest of the network and the loss, so that L = F(b a(w)), a scalar; F', F'' are the
# derivatives of F by its argument b a(w), F' (B, C, H, W). beta is the weight of Eq. (4) where it
# stands before L_reg, BN's shift everywhere else.
#
# The paper puts b on the weights, w_b = b w. For a bare convolution that is the same, a(b w) =
# b a(w), and the paper's grad_{w_b} L(w_b) is F' a'(w) below. Behind BN it is not: zero weights
# make no zero output there. (Eqs. (21) and (23) to (25) print s as a factor; it must be b.)
#
#   equation                                               code                    shape
#   (2)   b = 1 if s > tau else 0                          mask.binary()           (C,)
#   (1)   b a(w)                                           masked(x, out)          (B, C, H, W)
#   (8)   dL_m/ds = grad_s L_m + (dw*/ds) grad_w L_m       mask.s.grad             (C,)
#                                                          w* moves with s
#   (17)  grad_w g(w*, s) = 0                              w* is a minimum for every s, so
#   (19)  grad2_sw g + (dw*/ds) grad2_w g = 0              its derivative by s is 0 too
#   (9)   dw*/ds = - grad2_sw g (grad2_w g)^-1             never formed            (C, C i k k)
#   (10)  grad2_w g = grad2_w L + I / lambda               approximation 1: ~ I / lambda
#   (11)  dL_m/ds = grad_s L_m - lambda grad2_sw L grad_w L_m              grad2_sw g = grad2_sw L
#   (22)  grad_b L = sum_BHW F' a(w)                       first (by Eq. (3))      (C,)
#   (21)  grad_w L = b F' a'(w)                            p.grad                  (C, i, k, k)
#   (24)  grad2_bw L = F' a'(w) + b F'' a(w) a'(w)         approximation 2: ~ F' a'(w)
#   (12)  grad2_sw L = diag(F' a'(w))                      approximation 3: diagonal
#   (13)  dL_m/ds = grad_s L_m - lambda (F' a') (b F' a')  the second factor is grad_w L_m
#   (14)  F' a' = grad_w L_m where b = 1                   no copy of the gradients is needed
#   (15)  dL_m/ds = grad_s L_m - lambda b [grad_w L_m]^2   first - second + pull   (C,)
#         [grad_w L_m]^2 summed over i, k, k               squared_gradients       (C,)
#         grad_s (beta L_reg)                              pull                    (C,)
#
# Approximations. 1: L is piecewise linear in w. 2: in the channel's output too. (Eq. (25) should
# read diag(w*) times the second derivative; it vanishes either way.) 3: a mask meets the weights of
# its own channel alone. In a network it also meets those that make the channel's inputs and those
# that read it; their terms can be as large
# (test_bilevel_implicit_gradient_is_exact_but_for_the_diagonal). 4, Eq. (3): grad_s = grad_b. 5: w
# is what a few steps have reached, not w*. 6 (OURS): those steps decay w by --weight-decay, not by
# the 1 / lambda of Eq. (7): a decay of 10 would leave no network to prune. lambda weighs the second
# term alone. 7: what is squared is the gradient of a minibatch. Its mean square is (grad_w L)^2
# plus the variance of the batches, which near w* is nearly all of it; the term shrinks as batches
# grow, and over several processes the mean gradient is squared.
#
# Eq. (14) prints 0 where b = 0. F' a' is not 0 there, but Eq. (13) multiplies it by grad_w L_m,
# which is 0.
#
# What the first term says (Euler's identity). A mask behind BN and ReLU meets an a that is
# homogeneous of degree 1 in (gamma, beta): a(c gamma, c beta) = c a. So a = gamma da/dgamma + beta
# da/dbeta, and for a kept channel
#
#         grad_s L = gamma dL/dgamma + beta dL/dbeta         (ReLU and none exactly, relu6 nearly).
#
# At w* without decay of gamma and beta dL/dgamma and dL/dbeta vanish: the first term is noise
# around zero for every kept channel, and a mask learns only by falling below tau and being called
# back. With the decay mu of Eq. (7) it is -mu (gamma^2 + beta^2): an importance. Hence gamma and
# beta decay with the filters (PAPER).
#
# What the second term says: a mask rises by lambda times the squared gradients of its weights.
# Channels that the loss still works on are kept. At w* grad_w L = -w / lambda, and for a(w) linear
# both terms are -|w|^2 / lambda. Where BN makes the scale of w meaningless the term is misled: the
# gradient goes with 1 / |w| (test_bilevel_planted_scaled_filters_mislead_the_second_term).


def squared_gradients(net):
    """{Mask: (n,)}: [grad_w L]^2 summed over the weights of each channel, BN's included."""
    def of_channels(layer):                 # (C',): of the filter, BN's scale and shift, or bias
        return sum(p.grad.square().reshape(len(p), -1).sum(1) for p in layer.parameters())
    return {mask: rows.sum(1) for mask, rows in by_mask(layers_of(net), of_channels).items()}


def mask_gradient(net, loss, reg, lam):
    """The parts of Eq. (15), each (M,), the M elements of all masks one after another: dL_m/ds =
    first - second + pull. One backward pass of L gives `first` and `second`. reg: beta L_reg."""
    masks = masks_of(net).values()
    pull = torch.autograd.grad(reg, [mask.s for mask in masks])         # grad_s (beta L_reg)
    net.zero_grad()
    loss.backward()                                                     # grad_s L and grad_w L
    common.average_gradients(net.parameters())                          # before they are squared
    squares = squared_gradients(net)
    first = torch.cat([mask.s.grad for mask in masks])
    # lambda b [grad_w L]^2: where b = 0 the gradient is 0 already, so b need not be written.
    second = lam * torch.cat([squares[mask] for mask in masks])
    return first, second, torch.cat(pull)


def mask_rates(net, area, target, steps, cfg):
    """The step size of each element of all masks, (M,); called while all s are 1. OURS, twice; the
    paper gives no step size for s.

    - It goes with 1 / cost^--cost-power. The cost is the MACs of one element, with which goes the
      pull of Eq. (5). In tiny a channel of c2, at half resolution, costs 300 times one of mlp0:
      under one rate for all, the pull would prune c2 before the loss can speak. Divided by the cost
      itself, one noisy gradient would decide about the cheap ones.
    - Unless --mask-lr says how large: a mask of mean cost that the loss ignores would fall from 1
      to tau in a third of the mask steps, however many, at full momentum and the first rate, if Eq.
      (5) went on pulling as in the first. As momentum builds up and the schedule falls, it is about
      half of them. So beta weighs the MACs against the loss, and does not set the pace.
    """
    target = min(target, 0.9 * macs_of(area, {}))       # next to the dense the rate would be huge
    reg = regularizer(net, area, target)
    slope = torch.cat(torch.autograd.grad(reg, list(net.masks.parameters())))   # grad_s L_reg
    beta = cfg.beta or 0.01                             # no pull: at the pace of the paper's beta
    # Under a steady pull, SGD of momentum m moves s by rate beta slope / (1 - m) a step.
    fall = beta * slope.mean() / (1 - MOMENTUM) * steps / 3     # in a third of them, at rate 1
    rate = cfg.mask_lr or (1 - cfg.tau) / fall
    return rate * (slope.mean() / slope) ** cfg.cost_power


# ---------------------------------------------------------------------------------------------
# 6. Search, Section 4.2
# ---------------------------------------------------------------------------------------------

#   given      w of the dense network, s = 1
#   repeat     an iteration
#       repeat --weight-steps times
#           w <- w - lr [ grad_w L(w, s) + decay w ]               Eq. (7), approximation 6
#       s <- s - rate { grad_s L + beta grad_s L_reg - lambda b [grad_w L]^2 }        Eqs. (4), (15)
#   choose     the channels with the best s that the target has room for      OURS: section 7
#   repeat     Eq. (7), for the last --settle of the epochs                              OURS
#
# The paper's two steps are the two inner loops of learn(); w is a few steps of SGD away from w*
# (approximation 5), and its momentum goes on from iteration to iteration.
#
# Both optimizers are SGD with momentum under one poly schedule (PAPER 5.2). The mask step takes the
# next batch of the training set (OURS; the paper sets no pictures aside for the masks). A baseline
# learns no masks: it trains all its batches, and chooses by another score at the same epoch.
#
# Soft masks are free to go anywhere: Eq. (5) pulls less and less as the target comes near, and a
# channel that the loss wants rises. Clamped to [0, 1e9] the quick search did no better.
#
# Why choose at all, when thresholding is to "get rid of sorting"? Eq. (5) weighs the target against
# the loss, and the paper gives no rule for a search that ends elsewhere. In searches of a hundred
# mask steps the masks by themselves come to 40 to 80% of the MACs (docs/results.md; the report says
# how far), so the ranking by s, which moves tau, mask by mask, to where the target is met, does
# most of the cutting. And why train on after it? What the ranking cuts, it cuts at once; the
# paper's "no need for fine-tuning" holds for weights that have been trained under their masks.


def learn(run, net, loader, area, target, score):
    """Sections 3 and 4: trains the weights, learns the masks, chooses channels.

    run: of run_of_search(); net: the dense network, its masks started; score(net) -> mIoU.
    """
    cfg, soft = run.cfg, list(net.masks.parameters())
    weight_sgd, mask_sgd = run.parts["optimizer"], run.parts["mask_optimizer"]
    schedule = run.parts["schedule"]
    forward = common.training_form(net.train(), cfg)
    mask_steps = chosen_after(cfg) * (len(loader) // (cfg.weight_steps + 1))
    rates = mask_rates(net, area, target, mask_steps, cfg)              # (M,)
    for epoch in run.epochs():
        deciding = epoch < chosen_after(cfg)
        batches, rows = run.batches(loader), []
        before = None                                   # first - second of the mask step before
        while run.step < len(loader):
            # First step of an iteration: a few steps on w, the masks stay. Without their gradient
            # the backward pass is that of plain training.
            net.masks.requires_grad_(False)
            for images, labels in islice(batches, cfg.weight_steps):
                # Eq. (7): L(w, s) here, its |w|^2 as the optimizer's weight decay.
                terms = {"loss": task_loss(forward, images, labels, cfg)}
                if deciding and cfg.method == "slimming":
                    terms["l1"] = SLIM_L1 * sum(n.weight.abs().sum() for n in norms_of(net))
                with pruned_weights_kept(net):
                    run.descend(weight_sgd, **terms)
                schedule.step()

            # Second step: one on s; the weights stay, BN's running statistics do not. The optimizer
            # of s decays nothing: Eq. (15) alone moves a mask. (One batch, or none when decided.)
            net.masks.requires_grad_(True)
            for images, labels in islice(batches, int(deciding and cfg.method == "bilevel")):
                loss = task_loss(forward, images, labels, cfg)
                reg = cfg.beta * regularizer(net, area, target)                 # Eqs. (4), (5)
                first, second, pull = mask_gradient(net, loss, reg, cfg.lam * cfg.implicit)
                run.check(loss=loss, reg=reg, mask_gradient=first.norm() + second.norm())
                step = rates * (first - second + pull)                          # Eq. (15)
                for s, part in zip(soft, step.split([len(s) for s in soft])):
                    s.grad = part
                # One schedule for both: (1 - step / steps)^0.9. A scheduler of the masks' own would
                # have to count the weight steps too.
                mask_sgd.param_groups[0]["lr"] = schedule.get_last_lr()[0] / cfg.lr
                mask_sgd.step()
                row = forces(rates, first, second, pull, before)
                rows.append(row | {"macs": share_left(net, area)})
                before = first - second
                schedule.step()

        if epoch + 1 == chosen_after(cfg):              # from here on b is fixed, only w moves
            choose(net, scores_of(cfg.method, net), area, target, cfg)
        miou, share = score(net), share_left(net, area)
        run.end_epoch(note=f" | {share:.1%} of the MACs, masked mIoU {miou:.2%}",
                      masked_miou=miou, macs=share, mask_steps=rows, widths=widths_left(net))


def run_of_search(cfg, net, loader, folder):
    """The Run of a search: starts the masks of the dense network; SGD with momentum for the
    weights, and for the masks, whose gradients come times the rate of each."""
    for mask, least in prunable(net, cfg).items():
        mask.start(cfg.tau, least)                                      # s = 1: the dense network
    optimizer, schedule = optimizer_for(net.to(cfg.device), cfg, cfg.search_epochs * len(loader))
    return common.Run("search", "search", cfg, folder, cfg.search_epochs, stale=STALE,
                      model=net, optimizer=optimizer, schedule=schedule,
                      mask_optimizer=torch.optim.SGD(net.masks.parameters(), 1.0, MOMENTUM))


def forces(rates, first, second, pull, before):
    """What decides in a mask step, for the log: a dict of shares. All arguments (M,).

    second / first: lengths of the terms of Eq. (15). pull: the share of the MACs term in the step.
    cosine: of first - second and `before`, that of the mask step before, of another batch; near 0
    noise decides. The first step of an epoch has none.
    """
    moves = torch.stack([(rates * part).norm() for part in (first, second, pull)])
    row = {"second / first": float(second.norm() / first.norm()),
           "pull": float(moves[2] / moves.sum())}
    if before is not None:
        row["cosine"] = float(F.cosine_similarity(first - second, before, dim=0))
    return row


def optimizer_for(net, cfg, steps):
    """(SGD for the weights, its poly schedule over `steps`).

    Eq. (7) decays all of w. Sparing BN's scales and shifts, as is usual, would take all meaning
    from the first term of Eq. (15) for kept channels: Euler's identity in section 5.
    """
    optimizer = torch.optim.SGD(weights_of(net), cfg.lr, MOMENTUM, weight_decay=cfg.weight_decay)
    return optimizer, torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)


def chosen_after(cfg):
    """Epochs after which the channels are chosen, the same for every method."""
    return max(1, round(cfg.search_epochs * (1 - cfg.settle)))


def search(cfg, folder=None):
    """Learn masks and weights, choose, cut; writes arch.json.

    Returns what finish() does.
    """
    images, loader = open_loader(cfg, "train", train=True)
    if cfg.method == "bilevel" and len(loader) <= cfg.weight_steps:
        raise InputError(f"{len(loader)} batches an epoch are too few for --weight-steps "
                         f"{cfg.weight_steps} and a mask step; lower it, or --batch-size")
    score = common.scorer(cfg)
    net = dense_network(cfg, images.num_classes)
    area = areas(net, cfg.frame)
    target = target_of(cfg, net, area)                  # refused now, not after hours
    start(cfg, net)
    torch.manual_seed(cfg.seed)
    run = run_of_search(cfg, net, loader, folder or folder_of(cfg))
    learn(run, net, loader, area, target, score)
    return finish(run, net, area, target, score)


# ---------------------------------------------------------------------------------------------
# 7. Choose and cut: from masks to a small network
# ---------------------------------------------------------------------------------------------


# Channels of different masks are ranked against each other by s, as it is. All began at 1, and what
# moved them since is loss and MACs, times a step size that goes with 1 / cost^(1/2): s is what a
# channel has been worth so far over the root of its MACs, less its pull. An example, tau = 0.5:
#
#   soft masks            best first                     what the MACs have room for  arch.json
#   row3   2.1 0.9 0.3    2.1 1.7 0.9 0.8 0.3 0.1        2.1 1.7 0.9 | 0.8 0.3 0.1    "row3": 2
#   c8     1.7 0.8 0.1    |- above tau: 4 -|             the ranking cut one more     "c8":   1
#
# Cutting is by index. A layer that reads `into` and writes `out`, of which (C) and (C') stay (in
# section 5 C counts what is written, and i what is read):
#
#   conv.weight  (C', C, k, k)   rows of out, columns of into; depth-wise (C', 1, k, k): rows alone
#   conv.bias, BN's weight, bias, mean, var  (C',)             those of out
#   residual sums                                              nothing: all terms have one mask
#   concatenations                                             nothing: a space lists their masks


def target_of(cfg, net, area):
    """C of Eq. (5), MACs for one picture of --frame; InputError if no masks can meet it."""
    free, dense = prunable(net, cfg), macs_of(area, {})
    if cfg.widths:
        counts = counts_from(cfg.widths, net)
        if any(n < mask.n and mask not in free for mask, n in counts.items()):
            raise InputError(f"{cfg.widths} prunes what --scope {cfg.scope} leaves whole; give the "
                             "--scope of its search")
        return macs_of(area, counts)
    target, least = cfg.target * dense, macs_of(area, free)
    if target < least:
        raise InputError(f"{least / dense:.4f} of the MACs are left with the fewest channels in "
                         "every layer; raise --target above it, or try --scope all or a smaller "
                         "--round-to")
    return target


def counts_from(path, net):
    """{Mask: elements} of the arch.json at `path`; InputError if of another network."""
    name, _, widths = load_arch(path)
    if name != net.name:
        raise InputError(f"{path} is of {name}, not of {net.name}; choose another --network")
    return {mask: widths[key] for key, mask in net.masks.items()}


def best_counts(scores, area, target):
    """{Mask: elements to keep}: the best of all masks that the target has room for.

    A unit is --round-to channels (the last of a mask may be smaller) or one head; it stays or goes
    as a whole, by its mean score, and the best unit of a mask always stays. Down the ranking every
    unit is kept that still fits. Behind one that does not, the rest of its mask goes too: a mask
    keeps its best channels, so none of the others can stay without that unit.
    """
    counts, units = {}, []
    for mask, score in scores.items():
        parts = score.double().sort(descending=True).values.split(mask.least)
        counts[mask] = len(parts[0])
        units += [(part.mean().item(), mask, len(part)) for part in parts[1:]]
    units.sort(key=lambda unit: -unit[0])               # stable: of equals the first mask's
    closed = set()
    for _, mask, size in units:
        more = counts | {mask: counts[mask] + size}
        if mask in closed or macs_of(area, more) > target:
            closed.add(mask)
        else:
            counts = more
    return counts


def choose(net, scores, area, target, cfg):
    """Choose the channels for good. scores {Mask: (n,)}: higher stays.

    For the paper's method the score is s, so this moves the threshold from tau to where the target
    is met.
    """
    counts = counts_from(cfg.widths, net) if cfg.widths else best_counts(scores, area, target)
    for mask, score in scores.items():
        mask.choose(score.argsort(descending=True, stable=True)[:counts[mask]])


def prune(net):
    """The network without the channels whose b is 0; same output, Eq. (16): what b multiplies by 0
    meets only columns that go with it. BN works channel by channel, so it is narrowed alike."""
    small = build(net.name, net.num_classes, widths_left(net))
    for layer, cut in zip(layers_of(net), layers_of(small)):
        out, into = left_of(layer)
        cut.conv = narrowed(layer.conv, out, into)
        if norms_of(layer):
            cut.norm = narrowed(layer.norm, out)
    return small.train(net.training)


def load_arch(path):
    """(network, classes, widths) of an arch.json; InputError if it does not fit."""
    value = common.read_json(path, "arch.json")
    # It may have been edited by hand: every number is checked before a network is built from it.
    name, classes, widths = (value.get(key) for key in ("network", "classes", "widths"))
    if name not in NETWORKS or classes not in range(2, 255) or not isinstance(widths, dict):
        raise InputError(f"{path} is no arch.json of this program: it needs network (a --network), "
                         "classes (2 to 254) and widths")
    with torch.device("meta"):
        dense = build(name, classes).widths()
    for key in {**dense, **widths}:
        n, full = widths.get(key), dense.get(key, 0)
        if type(n) is not int or not 1 <= n <= full:
            raise InputError(f"{path} does not fit {name}: '{key}' is {n}, not 1 to {full}")
    return name, classes, widths


def write_arch(net, folder):
    common.write_json(Path(folder) / "arch.json", {
        "network": net.name, "classes": net.num_classes, "parameters": count_params(net),
        "widths": net.widths()})


def finish(run, net, area, target, score):
    """Cut the network, score it, write it, report. Returns its numbers, a row of --sweep."""
    cfg, folder, small = run.cfg, run.folder, prune(net)
    steps = sum((record["mask_steps"] for record in common.read_log(folder, "search")), [])
    by_masks = steps[-1]["macs"] if steps else 1.0
    share = share_left(net, area)
    wanted = target / macs_of(area, {})
    pruned_miou = score(small)                          # the last masked mIoU, but for rounding
    run.save("pruned.pt", model=small.state_dict())
    write_arch(small, folder)
    draw_search(net, small, steps, folder)
    report_masks(net, steps)
    met = "met" if abs(share / wanted - 1) <= 0.01 else "NOT met"
    print(f"MACs of the dense network: by themselves the masks left {by_masks:.1%}, the "
          f"ranking {share:.2%}\n"
          f"target {wanted:.2%} ({share / wanted - 1:+.2%}): {met} within 1%\n"
          f"pruned mIoU, nothing trained after the cut out, {pruned_miou:.2%}\n"
          f"in {folder}: arch.json, pruned.pt, last.pt, log.jsonl, *.png\n"
          + common.next_command(cfg, "bilevel_prune", "--eval --bench"))
    common.barrier()
    return f"{pruned_miou:.2%} | {count_params(small):,} | {by_masks:.1%} | {share:.1%}"


def report_masks(net, steps):
    """How decided the masks were."""
    masks = masks_of(net)
    if steps:
        soft = torch.cat([mask.s.detach() for mask in masks.values()])
        mean = {key: torch.tensor([step.get(key, math.nan) for step in steps]).nanmean()
                for key in steps[-1]}
        print(f"{len(soft)} masks from {soft.min():.2f} to {soft.max():.2f}, all began at 1; mean "
              "over the mask steps:", ", ".join(f"{key} {x:.2f}" for key, x in mean.items()))
        if 0 < mean["second / first"] < 0.5:            # 0: --no-implicit
            print("undecided: the second term is the smaller one, and the first is mostly noise of "
                  "the batch; another seed will choose other channels (raise --lam)")
    floor = [name for name, mask in masks.items()
             if mask.binary().sum() <= mask.least < mask.n]
    if floor:
        print(f"at their floor, --round-to or one head: {', '.join(floor)}")


# ---------------------------------------------------------------------------------------------
# 8. Baselines; the weights before and after the search
# ---------------------------------------------------------------------------------------------

# A baseline is a score for every channel. Network, target, data, optimizer, number of batches and
# the epoch of choosing are the paper's method's, whose mask steps use up some batches: the
# baselines get more weight steps.


def norms_of(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def filter_norms(layer):
    """L1 norm of each filter, (C',) (Li et al., ICLR 2017); the mean of its layer is 1, for one
    ranking of all."""
    norms = layer.conv.weight.abs().flatten(1).mean(1)
    return norms / norms.mean()


def norm_scales(layer):
    """|BN scale|, (C',), after training under an L1 penalty (Liu et al., ICCV 2017)."""
    return layer.norm.weight.abs()


@torch.no_grad()
def scores_of(method, net):
    """{Mask: (n,)}, higher stays. Of an element that stands for several channels, of several layers
    or of a head, their mean."""
    masks = masks_of(net).values()
    if method == "bilevel":
        return {mask: mask.s for mask in masks}
    if method == "random":                      # drawn on the CPU: the same on all ranks
        return {mask: torch.rand(mask.n).to(mask.s) for mask in masks}
    layers, value = layers_of(net), filter_norms
    if method == "slimming":
        layers, value = [layer for layer in layers if norms_of(layer)], norm_scales
    scores = {mask: rows.mean(1) for mask, rows in by_mask(layers, value).items()}
    if method == "uniform":                     # the same share of every mask: a filter's rank
        scores = {mask: -score.argsort(descending=True, stable=True).argsort() / mask.n
                  for mask, score in scores.items()}
    return scores


# Published TopFormer files -> names here. Older files use the second name of each pair. The first
# row has no expansion, so its places begin with the depth-wise layer.
PUBLISHED = (
    (r"^(module\.)?(backbone\.|decode_head\.)?", ""),
    (r"^(tpm|patch_embed)\.stem\.0", "stem"),
    (r"^(tpm|patch_embed)\.layer1\.conv\.0", "rows.0.depth"),
    (r"^(tpm|patch_embed)\.layer1\.conv\.2", "rows.0.project"),
    (r"^(tpm|patch_embed)\.layer(\d+)\.conv\.([024])", lambda m: f"rows.{int(m[2]) - 1}."
     + ("expand", "depth", "project")[int(m[3]) // 2]),
    (r"^trans\.transformer_blocks", "blocks"), (r"\.attn\.", ".attention."),
    (r"\.proj\.1\.", ".project."), (r"\.dwconv\.", ".depth.conv."),
    (r"^(SIM|fuse_blocks)\.(\d)", lambda m: f"injections.{int(m[2]) - 1}"),
    (r"\.(local_embedding|to_feat1)\.", ".local."), (r"\.(global_act|fuse2)\.", ".scale."),
    (r"\.(global_embedding|to_feat2)\.", ".shift."), (r"^linear_fuse", "fuse"),
    (r"^conv_seg", "classify.conv"), (r"\.c\.", ".conv."), (r"\.bn\.", ".norm."))


def our_name(key):
    """Name here of a tensor of a published checkpoint."""
    for pattern, name in PUBLISHED:
        key = re.sub(pattern, name, key)
    return key


def load_published(net, path):
    """Load a TopFormer file into the dense network; say what did not match.

    Pyramid and transformer must be there and fit, else InputError; injection and head may be
    missing (classification files), the classifier may have other classes.
    """
    theirs = {our_name(key): value for key, value in common.load_state_dict(path).items()}
    own = net.state_dict()
    fit = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
    random = [key for key in own if key not in fit and not key.endswith("num_batches_tracked")]
    for key in random:
        if key.startswith(("stem", "rows", "blocks")) or (
                key in theirs and not key.startswith("classify")):
            raise InputError(f"{path} is not of TopFormer-{net.name}: '{key}' is missing or has "
                             "another shape; choose another --network")
    net.load_state_dict(own | fit)
    print(f"{path}: {len(fit)} of {len(own)} tensors loaded; random: "
          f"{', '.join(random[:3]) or 'none'}; not used: "
          f"{', '.join(sorted(theirs.keys() - own.keys())[:3]) or 'none'}")


def load_mobilenet(net, init):
    """Copy torchvision's MobileNet-V2 into the encoder, whose tensors have the same order."""
    theirs = common.classifier("mobilenet_v2", init).features[:-1]      # not the last 1x1
    encoder = nn.ModuleList([net.stem, net.rows])
    encoder.load_state_dict(dict(zip(encoder.state_dict(), theirs.state_dict().values())))


def dense_network(cfg, num_classes):
    """The dense network with its first weights: random, or from --init."""
    torch.manual_seed(cfg.seed)
    net = build(cfg.network, num_classes, drop_path=cfg.drop_path)
    if cfg.init != "none":
        load = load_mobilenet if cfg.network == "deeplab" else load_published
        load(net, cfg.init)
    return net


def load_file(net, path):
    load_weights(net, load_checkpoint(path)["model"], path)


# What a new search makes meaningless in its folder.
STALE = ("arch.json", "pruned.pt", "retrained/best.pt", "retrained/last.pt")


def folder_of(cfg):
    """Run folder of a method: the paper's in --out itself, the others beside it."""
    ablation = cfg.method == "bilevel" and not cfg.implicit
    return Path(cfg.out) / ("no_implicit" if ablation else cfg.method.replace("bilevel", ""))


def training_of(cfg, net, name, stage, folder):
    """(Run, loss_terms, loader, score) of a network without masks, for common.fit."""
    _, loader = open_loader(cfg, "train", train=True)
    common.place(net, cfg)
    optimizer, schedule = optimizer_for(net, cfg, cfg.epochs * len(loader))

    def loss_terms(forward, images, labels):
        return {"loss": task_loss(forward, images, labels, cfg)}

    run = common.Run(name, stage, cfg, folder, cfg.epochs, shared=stage == "dense", model=net,
                     optimizer=optimizer, schedule=schedule)
    return run, loss_terms, loader, common.scorer(cfg)          # val chooses best.pt


def start(cfg, net):
    """Give the dense network the weights that the search starts from: --dense, or <out>/dense,
    trained now if it is not there."""
    if cfg.dense:
        load_file(common.place(net, cfg), cfg.dense)
        return
    folder = Path(cfg.out) / "dense"
    common.fit(*training_of(cfg, net, "dense", "dense", folder))
    write_arch(net, folder)


def found_network(cfg, classes):
    """(network of --arch with random weights, path of its arch.json); InputError if it has other
    classes than `classes`, unless these are None."""
    path = Path(cfg.arch or folder_of(cfg) / "arch.json")
    name, found, widths = load_arch(path)
    if classes and classes != found:
        raise InputError(f"{path} is for {found} classes, the data set has {classes}")
    torch.manual_seed(cfg.seed)
    return build(name, found, widths, cfg.drop_path), path


def train(cfg):
    """Train the found network further or, with --no-finetune, from random weights."""
    classes = open_split(cfg, "train").num_classes
    if cfg.method == "dense":
        start(cfg, dense_network(cfg, classes))
        return
    net, arch = found_network(cfg, classes)
    folder = folder_of(cfg) / "retrained"
    if cfg.finetune:
        load_file(net, arch.parent / "pruned.pt")
    best = common.fit(*training_of(cfg, net, "retrained", "train", folder))
    print(f"retrained: best mIoU on val {best:.2%} -> {folder}/best.pt\n"
          + common.next_command(cfg, "bilevel_prune", "--eval --bench"))


def trained_network(cfg, classes):
    """(its kind, the network of --method in eval mode): the dense one, or the found one, retrained
    if --train has done so."""
    net, arch = found_network(cfg, classes)
    folder = folder_of(cfg)
    for kind, path in (("dense", folder / "best.pt"), ("retrained", folder / "retrained/best.pt"),
                       ("pruned", arch.parent / "pruned.pt")):
        if path.exists():
            break
    if cfg.weights:
        kind, path = Path(cfg.weights).name, cfg.weights
    load_file(net, path)
    return kind, common.place(net.eval(), cfg)


# ---------------------------------------------------------------------------------------------
# 9. Evaluate, bench, sweep
# ---------------------------------------------------------------------------------------------


def evaluate_network(cfg):
    """mIoU of the network of --method at one scale (PAPER 5.2), and pictures.

    The paper tests Cityscapes at 512x1024: --image-scale 0.5 with --eval alone; labels keep their
    resolution (OURS).
    """
    images, loader = open_loader(cfg, cfg.split)
    kind, net = trained_network(cfg, images.num_classes)
    forward = torch.compile(net) if cfg.compile else net
    matrix = common.evaluate(forward, loader, images.num_classes, cfg)
    common.report_segmentation(cfg.method, kind, matrix, images, cfg, folder_of(cfg))
    common.draw_segmentations(net, images, cfg, folder_of(cfg))


PRINTED = {"tiny": "1.4 M / 0.6 G", "small": "3.1 M / 1.2 G", "base": "5.1 M / 1.8 G",
           "base_cityscapes": "5.1 M / 2.7 G", "super": "10.34 M / 4.1 G",
           "deeplab": "2.26 M / 9.5 G"}


def bench(cfg):
    """Parameters, MACs and measured latency, dense beside found and the paper's.

    App. F as far as PyTorch goes are --channels-last and --compile; sparse storage and matrix
    reordering are not needed (cut channels leave nothing sparse), a phone's kernels not to be had.
    """
    if rank() > 0:
        return
    print("parameters and MACs, ours | printed in the paper (150 classes, 512x512; deeplab and "
          "base_cityscapes 19, 512x1024)")
    for name, printed in PRINTED.items():
        cityscapes = name in ("deeplab", "base_cityscapes")             # else ADE20K
        net = build(name, 19 if cityscapes else 150)
        macs = count_macs(net, (512, 1024 if cityscapes else 512))
        print(f"  {name:15s} {count_params(net):11,d} {macs:15,d} | {printed}")
    nets = {"dense": build(cfg.network, 19)}
    if cfg.arch or (folder_of(cfg) / "arch.json").exists():
        found, _ = found_network(cfg, None)
        nets = {"dense": build(found.name, found.num_classes), "found": found}
    about, rows = latency.compare(nets, cfg.frame, cfg)
    latency.write_bench(cfg, about, rows)


def kept_in(folder):
    """[(n,) bool for each mask]: the channels that the search in `folder` has kept."""
    path = Path(folder) / "last.pt"
    state = load_checkpoint(path)["model"]
    kept = [tau == -math.inf for key, tau in state.items() if key.endswith(".tau")]
    if not any(b.any() for b in kept):
        raise InputError(f"{path} is of no finished search")
    return kept


def agreement(one, other):
    """Kappa of two choices, mask by mask: the overlap beyond that of random choices of the same
    widths, over the largest that these widths allow: 1 where in each mask one contains the other
    (Cohen's is smaller where widths differ)."""
    if [len(a) for a in one] != [len(b) for b in other]:
        raise InputError("the two searches are of different networks")
    overlap = chance = largest = 0
    for a, b in zip(one, other):
        overlap += int((a & b).sum())
        chance += int(a.sum()) * int(b.sum()) / len(a)
        largest += min(int(a.sum()), int(b.sum()))
    return (overlap - chance) / (largest - chance or 1)         # nothing pruned: 0


SWEEP = {"beta": (0.001, 0.01, 0.1, 1.0), "lam": (0.01, 0.1, 1.0),        # PAPER Apps. I, J
         "target": (0.76, 0.44, 0.29, 0.17, 0.12)}                      # its GMACs over 8.2


def sweep(cfg):
    """A search for each beta, lambda and target of Apps. I and J; writes sweep.md."""
    lines = ["| swept | value | pruned mIoU | parameters | MACs, by the masks alone | "
             "after the ranking |", "|---|---|---|---|---|---|"]
    for name, values in SWEEP.items():
        for value in values:
            folder = Path(cfg.out) / "sweep" / f"{name}{value:g}"
            row = search(replace(cfg, **{name: value}), folder)
            lines.append(f"| {name} | {value:g} | {row} |")
            common.write_text(Path(cfg.out) / "sweep.md", "\n".join(lines) + "\n")
    print("\n".join(lines) + f"\nin {cfg.out}: sweep.md")


def draw_search(net, small, rows, folder):
    """widths.png; masks.png, the soft masks; from the log search.png, what moved them."""
    widths, masks = small.widths(), masks_of(net)
    common.draw_bars(folder / "widths.png", "Channels before and after",
                     {name: (widths[name], n) for name, n in net.widths().items()})
    if rows:
        percent = torch.arange(0, 101, 5)
        soft = torch.stack([mask.s.detach().cpu().quantile(percent / 100)
                            for mask in masks.values()])
        common.draw_heat_map(folder / "masks.png", "Soft masks, sorted, column: %; 0 white, 1 and "
                             "more blue", list(masks), percent.tolist(), soft)
        series = {key: [row.get(key, math.nan) for row in rows]
                  for key in ("pull", "cosine", "macs")}
        ratios = [row["second / first"] for row in rows]        # one large one would hide the rest
        series["second of both"] = [ratio / (1 + ratio) for ratio in ratios]
        common.draw_lines(folder / "search.png", "What moved the masks", "mask step", "share",
                          {key: list(enumerate(line)) for key, line in series.items()})


# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------

# In the order in which they run.
STAGES = {"search": search, "train": train, "sweep": sweep, "eval": evaluate_network,
          "bench": bench}


def check(cfg, stages):
    """InputError on settings that do not go together."""
    searching = stages & {"search", "sweep"}
    dense = cfg.method == "dense"
    if searching and dense:
        raise InputError("--method dense prunes nothing; use --train, or another --method")
    if dense and cfg.dense:
        raise InputError("--train --method dense trains that network; leave --dense out")
    if cfg.arch and ("sweep" in stages or dense):
        raise InputError("--sweep finds networks and --method dense is one; leave --arch out")
    if "sweep" in stages and (cfg.method != "bilevel" or cfg.widths):
        raise InputError("--sweep is of the paper's method; leave out --method and --widths")
    if cfg.widths and cfg.method in ("bilevel", "dense"):
        raise InputError("--widths is a control: give --method random, magnitude or slimming too")
    if cfg.against:
        kept_in(cfg.against)                                # missing? say so before the search


def main(argv=None):
    stages, cfg = common.parse_args(Config, "bilevel_prune", STAGES, QUICK, __doc__, argv)
    common.setup(cfg)
    check(cfg, stages)
    if "eval" in stages:                                    # missing? say so before hours of work
        open_split(cfg, cfg.split)
    if stages & {"train", "search", "sweep"}:
        size = None if cfg.network == "deeplab" else cfg.size       # image pooling, or the tokens
        common.check_batch("batch-size", cfg.batch_size, len(open_split(cfg, "train")), size)
    common.run_stages(STAGES, stages, cfg)
    if cfg.against:
        kappa = agreement(kept_in(folder_of(cfg)), kept_in(cfg.against))
        print(f"kept channels, these and those of {cfg.against}: kappa {kappa:.2f} (0: no better "
              "than chance, 1: as far as the widths allow, the same)")
    if cfg.export:
        _, net = trained_network(cfg, open_split(cfg, cfg.split).num_classes)
        common.export(net, cfg.frame, cfg.export)


if __name__ == "__main__":
    common.run_main(main)
