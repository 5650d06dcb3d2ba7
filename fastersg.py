r"""FasterSeg: search operators, resolutions and widths under a latency budget, teacher and student
together.

    Chen, Gong, Liu, Zhang, Li, Wang: FasterSeg: Searching for Faster Real-time Semantic
    Segmentation. ICLR 2020. Section, equation and table numbers below are the paper's.

The idea in five lines:
  1. A supernet holds L layers of cells at strides 8, 16, 32; each cell mixes five operators.
  2. Softmax weights choose: alpha an operator, beta the predecessor, gamma the channel width.
  3. The latency of that mixture, from a measured table, is differentiable and joins the loss.
  4. Two architectures share one supernet's weights: an unconstrained teacher and a fast student.
  5. Derive both by argmax, train the teacher, then distil it into the student.

    image -> stem -> [8,0] -> [8,1] -> [8,2] -> .. -> [8,L-1] -------------\
             (1/8)      \        \        \                                +-> head -> mask
                         [16,1] -> [16,2] -> .. -> [16,L-1] --- up -------/   (b = 2 of the
                                \        \                                    3 branches)
                                 [32,2] -> .. -> [32,L-1] --- up - up ---/

    paper             here                                   meaning
    s, l, L           rate, layer, cfg.layers                downsample rate 8/16/32, layer index
    O^k               OPERATORS[k]                           candidate operators of a cell
    alpha, beta       weights.alpha, weights.beta            operator / predecessor probabilities
    gamma, chi        weights.width, cfg.widths              width probabilities, expansion ratios
    I_sl, O_sl        nodes[rate], keep / down               a cell's input, its two outputs
    Lat, w1 w2 w3     relaxed_latency, latency_weights       Section 3.2, Eq. (3)
    lambda, T         cfg.lam, cfg.target_ms                 Eq. (8), Eq. (5)
    q^s, q^t          logits of student and teacher          Eq. (4)

    python fastersg.py --search                  1.5 minutes, 0.7 GiB on two CPU cores
    python fastersg.py --train --eval            4.5 minutes: teacher 52, distilled student 55 mIoU
    python fastersg.py --bench --arch paper      10 seconds: the published network, exact counts
"""
import copy
import itertools
import json
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common
import data
import latency
from common import (BaseConfig, ConfusionMatrix, InputError, Progress, autocast, average_gradients,
                    check_finite, clip_gradients, count_macs, count_params, evaluate, fit,
                    load_checkpoint, load_weights, log_record, ohem, open_loader, open_split, opt,
                    place, rank, save_checkpoint, world_size)

# ---------------------------------------------------------------------------------------------
# Settings. Defaults are the paper's; the tag says where it says so.
# ---------------------------------------------------------------------------------------------


@dataclass
class Config(BaseConfig):
    layers: int = opt(16, "L, layers of cells (PAPER 4.2)")
    widths: tuple[int, ...] = opt((4, 6, 8, 10, 12), "expansion ratios chi; channels = chi * rate "
                                  "(PAPER 4.2); one value, e.g. 8, is Table 3's fixed width")
    branches: int = opt(2, "b, branches of the derived networks: 2, or 1 for Table 3 (PAPER 4.2)")
    stem_chi: int = opt(8, "chi of the student's stem and head (OFFICIAL-CODE); the teacher's is "
                        "the widest")
    search_size: tuple[int, int] = opt((160, 320), "crop while searching, H W (PAPER App. H)")
    search_scale: float = opt(0.5, "pictures resized by this first (PAPER App. H)")
    search_batch: int = opt(2, "images a search step (OFFICIAL-CODE: 3 pretraining, 2 search)")
    pretrain_epochs: int = opt(20, "epochs without architecture updates (PAPER App. F)")
    search_epochs: int = opt(30, "epochs with them (PAPER App. F)")
    search_steps: int = opt(0, "steps an epoch while searching, 0 = one pass over trainA")
    search_lr: float = opt(0.01, "SGD for W while searching (OFFICIAL-CODE: 0.02, then 0.01)")
    lr: float = opt(0.01, "SGD when training a derived network (OFFICIAL-CODE)")
    lr_decay: float = opt(0.99, "learning rate factor an epoch (PAPER App. H for the "
                          "search; OFFICIAL-CODE training: 0.992)")
    momentum: float = opt(0.9, "of SGD (PAPER App. H)")
    weight_decay: float = opt(5e-4, "of SGD (PAPER App. H)")
    clip: float = opt(5.0, "gradient norm clip, 0 = off (OFFICIAL-CODE)")
    arch_lr: float = opt(3e-4, "Adam for alpha, beta, gamma (PAPER App. H)")
    tau: float = opt(1.0, "temperature of Gumbel-softmax (PAPER App. C)")
    lam: float = opt(0.01, "lambda of Eq. (8), a millisecond (PAPER App. F)")
    fps_range: tuple[float, float] = opt((0.0, 0.0), "double / halve lambda after an epoch when "
                                         "the student is slower / faster; OFFICIAL-CODE: 155 175, "
                                         "0 0 = constant (PAPER)")
    decouple: bool = opt(True, "Eq. (3); --no-decouple gives Figure 4(a)")
    latency_weights: str = opt("auto", "w1,w2,w3 of Eq. (3): auto solves footnote 1 for this "
                               "device, paper = 0.001,0.997,0.002, or three numbers")
    frame: tuple[int, int] = opt((1024, 2048), "picture size H W of the latency (PAPER Table 2)")
    target_ms: float = opt(8.3, "T of Eq. (5), ms (PAPER App. B)")
    target_power: float = opt(-0.07, "alpha = beta of Eq. (6) (PAPER App. B)")
    held_out: float = opt(0.1, "share of training images kept for App. B (OURS: the paper does not "
                          "say on which images ACC is taken; its validation set stays unseen)")
    label_stride: int = opt(8, "search losses at 1/8 of the resolution (OFFICIAL-CODE)")
    arch: str = opt("", "arch.json to train, evaluate or bench, or 'paper' [<out>/arch.json]")
    network: str = opt("student", "what --train, --eval, --export work on: random is a random "
                       "network of the student's latency, pruned_teacher the row of Table 3",
                       ("student", "teacher", "pruned_teacher", "random"))
    distill: bool = opt(True, "Eq. (4), from the teacher, which is trained first if need be")
    distill_kl: str = opt("paper", "paper: KL(S||T), mean over pixels; release: KL(T||S), also "
                          "divided by the classes", ("paper", "release"))
    aux_weight: float = opt(0.2, "weight of each auxiliary head (OFFICIAL-CODE)")
    weights: str = opt("", "checkpoint for --eval and --export [<out>/<network>/best.pt]")
    split: str = opt("val", "split for --eval")
    export: str = opt("", "after the other stages, write the network as a torch.export program")


# Minutes on two cores. A few hundred architecture steps cannot move logits at the paper's 3e-4,
# so the quick preset takes a larger step (OURS).
QUICK = dict(layers=6, widths=(2, 4, 6), stem_chi=4, size=(128, 256), search_size=(64, 128),
             search_scale=1.0, search_batch=6, search_steps=20, pretrain_epochs=1, search_epochs=2,
             arch_lr=0.02, search_lr=0.02, label_stride=4, held_out=0.06, frame=(128, 256),
             epochs=8, batch_size=8, lr=0.05)

# What arch.json says about the space it was found in; the random control needs it.
SPACE = ("layers", "widths", "branches", "stem_chi", "frame")
RATES = (8, 16, 32)
OPERATORS = ("skip", "conv", "conv_x2", "zoom", "zoom_x2")                   # Section 3.1.2
TEACHER, STUDENT = 0, 1

# ---------------------------------------------------------------------------------------------
# 1. Architectures: what the search returns and arch.json holds
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell of a branch. Two cells are equal, and shared, if these four fields agree."""
    op: str                     # one of OPERATORS
    rate: int                   # downsample rate of its input
    down: bool                  # stride 2: the output has twice the rate
    chi: int                    # expansion ratio of its output
    layer: int = field(default=-1, compare=False)     # cell of the supernet it came from

    @property
    def c_out(self):            # channels = chi * rate of the output, Section 3.1.3
        return self.chi * self.rate * (2 if self.down else 1)


@dataclass(frozen=True)
class Architecture:
    """A derived network: {final rate: (Cell, ...)}, and chi of stem and head."""
    stem_chi: int
    branches: dict

    def inputs(self, rate):
        """[(cell, input channels), ...] of one branch."""
        channels = [self.stem_chi * 8] + [cell.c_out for cell in self.branches[rate]]
        return list(zip(self.branches[rate], channels))

    def channels(self, rate):
        """(channels at the branch's end, {r: channels of its last map at each finer rate r})."""
        last = {cell.rate: c_in for cell, c_in in self.inputs(rate) if cell.down}
        return ([self.stem_chi * 8] + [c.c_out for c in self.branches[rate]])[-1], last

    def to_json(self):
        rows = {str(rate): [f"{c.op}{' /2' if c.down else ''}, rate {c.rate}, chi {c.chi}, "
                            f"layer {c.layer}" for c in cells]
                for rate, cells in self.branches.items()}
        return {"stem_chi": self.stem_chi, "branches": rows}

    @staticmethod
    def from_json(value, where="architecture"):
        """Inverse of to_json; InputError says what is wrong in a malformed one."""
        try:
            branches = {}
            for rate, rows in value["branches"].items():
                cells = []
                for row in rows:
                    op, *rest = row.split(", ")
                    named = dict(item.split(" ") for item in rest)
                    cells.append(Cell(op.removesuffix(" /2"), int(named["rate"]),
                                      op.endswith(" /2"), int(named["chi"]),
                                      int(named.get("layer", -1))))
                branches[int(rate)] = tuple(cells)
            arch = Architecture(int(value["stem_chi"]), branches)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{where} is malformed ({type(error).__name__}: {error}); a cell "
                             "reads like 'zoom_x2 /2, rate 8, chi 4'")
        arch.check(where)
        return arch

    def check(self, where):
        if not 1 <= len(self.branches) <= 3 or self.stem_chi < 1:
            raise InputError(f"{where}: it needs 1 to 3 branches and a positive stem_chi")
        for final, cells in self.branches.items():
            rate = 8
            for i, cell in enumerate(cells):
                if cell.op not in OPERATORS or cell.chi < 1 or cell.rate != rate:
                    raise InputError(f"{where}: cell {i + 1} of branch {final} ({cell.op}, rate "
                                     f"{cell.rate}, chi {cell.chi}) does not fit: its input has "
                                     f"rate {rate}, operators are {', '.join(OPERATORS)}")
                rate *= 2 if cell.down else 1
            if rate != final or final not in RATES:
                raise InputError(f"{where}: branch {final} ends at rate {rate}")


def _branch(text):
    """'conv_x2 8 32, zoom / 8 128': operator, / for stride 2, input rate, output channels."""
    cells = []
    for row in text.split(","):
        op, *down, rate, channels = row.split()
        rate, down = int(rate), bool(down)
        cells.append(Cell(op, rate, down, int(channels) // (rate * (2 if down else 1))))
    return tuple(cells)


# Table 7 and Figure 6. Where the table prints s * chi, a cell that downsamples has 2 s * chi
# output channels (its bold rows); the parameter count confirms it (OFFICIAL-CODE).
PAPER_STUDENT = Architecture(8, {
    16: _branch("conv_x2 8 32, conv_x2 8 32, zoom_x2 8 32, zoom_x2 8 32, conv_x2 8 32, "
                "conv_x2 / 8 64, zoom_x2 16 64, zoom_x2 16 192, zoom_x2 16 128"),
    32: _branch("conv_x2 8 32, conv_x2 8 32, zoom_x2 8 32, zoom / 8 128, zoom_x2 16 64, "
                "zoom_x2 16 64, zoom_x2 16 64, zoom_x2 / 16 128, zoom_x2 32 128, zoom_x2 32 256")})
# The teacher is not printed in the paper (OFFICIAL-CODE).
PAPER_TEACHER = Architecture(12, {
    16: _branch("zoom 8 96," + "zoom_x2 8 96," * 3 + "zoom_x2 / 8 192, conv_x2 16 192, "
                "zoom_x2 16 192, zoom 16 192" + ", zoom_x2 16 192" * 8),
    32: _branch("zoom 8 96," + "zoom_x2 8 96," * 4 + "zoom_x2 / 8 192, zoom_x2 16 192, "
                "zoom 16 192," + "zoom_x2 16 192," * 5 + "zoom_x2 / 16 384, conv_x2 32 384, "
                "conv_x2 32 384")})


def pruned(teacher, chi, stem_chi):
    """Table 3, 'T -> pruned T': the teacher's cells at the slimmest ratio, the student's stem."""
    return Architecture(stem_chi, {
        rate: tuple(replace(cell, chi=chi) for cell in cells)
        for rate, cells in teacher.branches.items()})


def load_architecture(path, which):
    """Architecture `which` (student, teacher) of an arch.json; 'paper' gives the published ones."""
    if path == "paper":
        return PAPER_TEACHER if which == "teacher" else PAPER_STUDENT
    value = common.read_json(path, "arch.json")
    if not isinstance(value, dict) or which not in value:
        raise InputError(f"{path} holds no architecture named {which}; run --search first")
    return Architecture.from_json(value[which], f"{path}, {which}")


def as_table(arch):
    """The rows of Table 7 as text."""
    lines = []
    for rate, cells in arch.branches.items():
        lines += [f"branch 1/{rate}: cell  operator    s  chi  c_out"]
        lines += [f"{i + 1:17d}  {c.op + (' /2' if c.down else ''):10s} {c.rate:2d} {c.chi:4d} "
                  f"{c.c_out:6d}" for i, c in enumerate(cells)]
    return "\n".join(lines)


def count_paths(layers):
    """Section 4.2: resolution paths of all pairs of branches; 1695 for L = 16.

    A branch that ends at 1/16 goes down after one of L - 1 cells, one at 1/32 after two of them.
    """
    places = {8: 1, 16: layers - 1, 32: math.comb(layers - 1, 2)}
    return sum(places[s] * places[t] for s, t in itertools.combinations(RATES, 2))


def count_combinations(layers, widths):
    """Section 4.2: (1 + 4 |X|)^((L-1)+(L-2)+(L-3)) + |X|^3, printed with a plus; 3.4e55.

    A cell that is not a skip has a width, a skip has none: 1 + 4 * 5 = 21 choices.
    """
    choices = 1 + (len(OPERATORS) - 1) * len(widths)
    return choices ** (3 * layers - 6) + len(widths) ** 3


# ---------------------------------------------------------------------------------------------
# 2. The network to deploy
# ---------------------------------------------------------------------------------------------


class SlicedConv2d(nn.Conv2d):
    """A convolution that takes its first channels only when its input is narrower."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :x.shape[1]], self.bias, self.stride, self.padding)


def conv_bn(c_in, c_out, kernel=3, stride=1, conv=nn.Conv2d):
    """Convolution without bias and BN; ReLU follows at the call, not always at once."""
    return nn.Sequential(conv(c_in, c_out, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(c_out))


def resize(x, size):
    # PAPER App. H: bilinear. OFFICIAL-CODE: align_corners.
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def halve(x):
    """Bilinear 1/2, rounded up like a padded stride-2 convolution, so that any size works."""
    return resize(x, [(d + 1) // 2 for d in x.shape[-2:]])


def shifted(x):
    """x one pixel up and left: the odd rows and columns land where stride 2 looks."""
    return F.pad(x, (0, 1, 0, 1))[..., 1:, 1:]


class CellNet(nn.Module):
    """One cell as deployed, Section 3.1.2. (B, c_in, h, w) -> (B, c_out, h/stride, w/stride)."""

    def __init__(self, op, c_in, c_out, stride):
        super().__init__()
        self.op, self.stride = op, stride
        if op == "skip":        # at stride 2 only (OFFICIAL-CODE): two shifted 1x1 convolutions
            self.even = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
            self.odd = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
            self.norm = nn.ModuleList([nn.BatchNorm2d(c_out)])   # a list: not folded into `odd`
        else:
            # A zoomed convolution has already halved the picture: stride 2 only leaves out the up.
            self.first = conv_bn(c_in, c_out, stride=1 if "zoom" in op else stride)
            if op.endswith("x2"):
                self.second = conv_bn(c_out, c_out)

    def forward(self, x):
        if self.op == "skip":
            return F.relu(self.norm[0](torch.cat([self.even(x), self.odd(shifted(x))], 1)))
        y = self.first(halve(x) if "zoom" in self.op else x)
        if self.op.endswith("x2"):
            y = self.second(F.relu(y))
        if "zoom" in self.op and self.stride == 1:
            y = resize(y, x.shape[-2:])
        return F.relu(y)        # OFFICIAL-CODE: after the up-sampling


class Stem(nn.Sequential):
    """App. A: (B, 3, H, W) -> (B, 8 chi, H/8, W/8). OFFICIAL-CODE: the fourth layer has stride 2
    but keeps the channels, which the paper's text doubles; the counts agree with the release."""

    def __init__(self, chi):
        c, layers = 8 * chi, []
        shapes = (3, c // 2, 2), (c // 2, c, 2), (c, c, 1), (c, c, 2), (c, c, 1)
        for c_in, c_out, stride in shapes:
            layers += [*conv_bn(c_in, c_out, stride=stride), nn.ReLU()]
        super().__init__(*layers)


class Up(nn.Module):
    """App. A: 1x1 reduces the coarse map, bilinear up, concatenate the finer one, 3x3 fuses."""

    def __init__(self, c_coarse, c_fine, c_out, conv=nn.Conv2d):
        super().__init__()
        self.reduce = conv_bn(c_coarse, c_out, 1, conv=conv)
        self.fuse = conv_bn(c_out + c_fine, c_out, conv=conv)

    def forward(self, coarse, fine):        # (B, c_coarse, h/2, w/2), (B, c_fine, h, w)
        y = resize(F.relu(self.reduce(coarse)), fine.shape[-2:])
        return F.relu(self.fuse(torch.cat([y, fine], 1)))              # (B, c_out, h, w)


class Classifier(nn.Module):
    """3x3 conv-BN-ReLU and 1x1 to classes; after an optional 1x1 that mixes the branches."""

    def __init__(self, c_in, num_classes, c_mix=None, conv=nn.Conv2d):
        super().__init__()
        self.mix = conv_bn(c_in, c_mix, 1, conv=conv) if c_mix else None
        c_in = c_mix or c_in
        c_mid = c_in if c_in <= 256 else c_in // 2                     # OFFICIAL-CODE
        self.conv = conv_bn(c_in, c_mid, conv=conv)
        self.logits = nn.Conv2d(c_mid, num_classes, 1)

    def forward(self, x):
        x = F.relu(self.mix(x)) if self.mix is not None else x
        return self.logits(F.relu(self.conv(x)))


class Head(nn.Module):
    """App. A: every branch is brought to 1/8, then the branches of a set are fused.

    sets: tuples of rates, one prediction each (the supernet asks for several);
    ends: {rate: channels}, lasts: {rate: {finer rate: channels}} as in Architecture.channels.
    """

    def __init__(self, sets, ends, lasts, chi, num_classes, conv=nn.Conv2d):
        super().__init__()
        self.sets, self.ups, self.classifiers = sets, nn.ModuleDict(), nn.ModuleDict()
        for rate in sorted(set(itertools.chain(*sets))):
            c = ends[rate]
            for fine in (r for r in (16, 8) if r < rate):
                self.ups[f"{rate}_{fine}"] = Up(c, lasts[rate][fine], chi * fine, conv)
                c = chi * fine
        for rates in sets:
            c = sum(ends[8] if r == 8 else chi * 8 for r in rates)
            self.classifiers["_".join(map(str, rates))] = Classifier(
                c, num_classes, chi * 8 * len(rates), conv)

    def forward(self, ends, lasts):
        """ends: {rate: final map}, lasts: {rate: {finer rate: last map}} -> logits a set, 1/8."""
        maps = {}
        for rate in ends:
            y = ends[rate]
            for fine in (r for r in (16, 8) if f"{rate}_{r}" in self.ups):
                y = self.ups[f"{rate}_{fine}"](y, lasts[rate][fine])
            maps[rate] = y
        # Coarse first: the map at 1/8 alone varies in width, and slices are cut from the end.
        return [self.classifiers["_".join(map(str, rates))](
            torch.cat([maps[r] for r in sorted(rates, reverse=True)], 1)) for rates in self.sets]


class FasterSeg(nn.Module):
    """A derived network: (B, 3, H, W) -> logits (B, num_classes, H, W), any H and W.

    auxiliary: add the heads of training; then a network in train mode returns a list, the
    prediction first. Branches share cells, and their maps, up to the first difference (3.4).
    """

    def __init__(self, arch, num_classes, auxiliary=False):
        super().__init__()
        self.arch, self.stem, self.cells = arch, Stem(arch.stem_chi), nn.ModuleList()
        self.paths, prefixes = {}, {}
        for rate in sorted(arch.branches):
            path = []
            for i, (cell, c_in) in enumerate(arch.inputs(rate)):
                prefix = arch.branches[rate][:i + 1]
                if prefix not in prefixes:
                    prefixes[prefix] = len(self.cells)
                    self.cells.append(CellNet(cell.op, c_in, cell.c_out, 2 if cell.down else 1))
                path.append((prefixes[prefix], cell))
            self.paths[rate] = path
        ends, lasts = ({rate: arch.channels(rate)[k] for rate in self.paths} for k in (0, 1))
        self.head = Head([tuple(self.paths)], ends, lasts, arch.stem_chi, num_classes)
        self.auxiliary = nn.ModuleDict()
        if auxiliary:           # OFFICIAL-CODE: one head at each rate coarser than 1/8
            for r in (16, 32):
                c = sum(lasts[b].get(r, 0) if b != r else ends[b] for b in self.paths)
                if c:
                    self.auxiliary[str(r)] = Classifier(c, num_classes)

    def forward(self, x):
        stem, outputs, ends, lasts = self.stem(x), {}, {}, {}
        for rate, path in self.paths.items():
            y, lasts[rate] = stem, {}
            for index, cell in path:
                if cell.down:
                    lasts[rate][cell.rate] = y
                if index not in outputs:
                    outputs[index] = self.cells[index](y)
                y = outputs[index]
            ends[rate] = y
        logits = self.head(ends, lasts)
        if self.training:
            for r, head in self.auxiliary.items():
                maps = [ends[b] if b == int(r) else lasts[b].get(int(r)) for b in self.paths]
                logits.append(head(torch.cat([m for m in maps if m is not None], 1)))
        logits = [resize(y, x.shape[-2:]) for y in logits]
        return logits if self.training and self.auxiliary else logits[0]

# ---------------------------------------------------------------------------------------------
# 3. The supernet: every operator at every place, every width in one superkernel
# ---------------------------------------------------------------------------------------------


class Corner(torch.autograd.Function):
    """weight (n, O, I, k, k) -> weight[:, :c_out, :c_in] as one kernel (n * c_out, c_in, k, k).

    Plain slicing would make autograd write the gradient of every slice as a tensor of full size,
    mostly zeros; here it is added to the corner of weight.grad that it belongs to.
    """

    @staticmethod
    def forward(ctx, weight, c_out, c_in):
        ctx.weight, ctx.corner = weight, (slice(None), slice(c_out), slice(c_in))
        return weight[ctx.corner].flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        corner = weight.grad[ctx.corner]
        corner += grad.view_as(corner)
        return None, None, None


def corner(weight, c_out, c_in):
    """The kernel of the first c_out and c_in channels; the whole weight is left to autograd."""
    if (c_out, c_in) == tuple(weight.shape[1:3]):
        return weight.flatten(0, 1)
    return Corner.apply(weight, c_out, c_in)


def convolve(x, weight, stride):
    """F.conv2d with padding k // 2. On a CPU, maps of a few pixels go through one matrix product:
    384 -> 768 channels, forward and backward, 2x4 pixels 8 ms and not 27, 4x8 pixels 16 and not 24.
    """
    b, h, w = len(x), *(-(-d // stride) for d in x.shape[-2:])             # of the output
    if x.device.type == "cpu" and h * w <= 32 and weight.shape[-1] == 3:
        columns = F.unfold(x, 3, padding=1, stride=stride).transpose(0, 1).flatten(1)
        return (weight.flatten(1) @ columns).view(-1, b, h, w).transpose(0, 1)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def batch_norm(x, norm, scale):
    """BN whose output is multiplied by `scale` ((1,) or (channels,)) on the way.

    A probability before a ReLU costs nothing here: a * relu(BN(x)) = relu(a * BN(x)) for a >= 0.
    """
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight * scale,
                        norm.bias * scale, norm.training, norm.momentum, norm.eps)


class SuperConv(nn.Module):
    """n convolutions of one input, each with BN, run as one; any width (Section 3.1.3).

    c_outs: output channels by width; kernels are the first channels of one superkernel, BN is
    separate for each output width (OFFICIAL-CODE). (B, c, h, w) -> (B, n * c_outs[j], h', w').
    """

    def __init__(self, n, c_in, c_outs, stride):
        super().__init__()
        self.c_outs, self.stride = c_outs, stride
        self.weight = nn.Parameter(torch.empty(n, c_outs[-1], c_in, 3, 3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n * c) for c in c_outs)
        nn.init.normal_(self.weight, std=math.sqrt(2 / (9 * c_in)))

    def forward(self, x, j, scale):
        c = self.c_outs[j]
        y = convolve(x, corner(self.weight, c, x.shape[1]), self.stride)
        return batch_norm(y, self.norms[j], scale.repeat_interleave(c))


class SuperOps(nn.Module):
    """The alpha-weighted sum of the five operators at one stride: a line of Eq. (2)."""

    def __init__(self, c_in, c_outs, stride):
        super().__init__()
        self.c_outs, self.stride = c_outs, stride
        self.first = SuperConv(2, c_in, c_outs, stride)         # conv and the first of conv_x2
        self.second = SuperConv(1, c_outs[-1], c_outs, 1)
        self.zoom_first = SuperConv(2, c_in, c_outs, 1)         # zoom and the first of zoom_x2
        self.zoom_second = SuperConv(1, c_outs[-1], c_outs, 1)
        if stride == 2:
            self.skip = nn.ParameterList(torch.randn(1, c_outs[-1] // 2, c_in, 1, 1)
                                         * math.sqrt(2 / c_in) for _ in "eo")       # even, odd
            self.skip_norms = nn.ModuleList(nn.BatchNorm2d(c) for c in c_outs)

    def forward(self, x, half, alpha, j):
        """x (B, c, h, w), half = halve(x), alpha (5,), j: index of the output width."""
        c, one = self.c_outs[j], torch.ones_like(alpha[0])
        conv, y = F.relu(self.first(x, j, torch.stack([alpha[1], one]))).split(c, 1)
        conv_x2 = F.relu(self.second(y, j, alpha[2:3]))
        zoom, z = self.zoom_first(half, j, torch.stack([alpha[3], one])).split(c, 1)
        zoom_x2 = self.zoom_second(F.relu(z), j, alpha[4:5])
        if self.stride == 1:
            zoom, zoom_x2 = resize(zoom, x.shape[-2:]), resize(zoom_x2, x.shape[-2:])
            # PAPER: a skip connection. OURS: cut or padded to the sampled width, which is lossless
            # where a skip has no width of its own (1 + 4 * 5 choices, 4.2; see `tie_skips`).
            # OFFICIAL-CODE: a 1x1 convolution here, nothing when derived.
            skip = alpha[0] * match(x, c)
        else:
            even = F.conv2d(x, corner(self.skip[0], c // 2, x.shape[1]), stride=2)
            odd = F.conv2d(shifted(x), corner(self.skip[1], c // 2, x.shape[1]), stride=2)
            skip = F.relu(batch_norm(torch.cat([even, odd], 1), self.skip_norms[j], alpha[0:1]))
        return skip + conv + conv_x2 + F.relu(zoom) + F.relu(zoom_x2)


def match(x, channels):
    """The first `channels` channels of x, zeros after its last."""
    missing = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x[:, :channels]


def mix(b, new, old):
    """b[0] * new + b[1] * old for maps of different width (channels that lack count as zero)."""
    channels = max(new.shape[1], old.shape[1])
    return b[0] * match(new, channels) + b[1] * match(old, channels)


def branch_sets(branches):
    """What the search predicts from, and App. B chooses among: for b = 2 the three pairs, and each
    branch alone, whose loss trains it directly (OFFICIAL-CODE: all three, and two pairs)."""
    return [(r,) for r in RATES] + (list(itertools.combinations(RATES, 2)) if branches == 2 else [])


class Supernet(nn.Module):
    """The search space of Figure 1. Teacher and student share the cells (PAPER 3.3); stem and head
    are their own (OFFICIAL-CODE), as their widths differ."""

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.layers, chi, widths = cfg.layers, max(cfg.widths), cfg.widths
        self.sets = branch_sets(cfg.branches)
        chis = (chi, cfg.stem_chi)                                          # teacher, student
        self.stems = nn.ModuleList(Stem(c) for c in chis)
        ends = {r: r * chi for r in RATES}
        # At rate 8 the last map before going down may be the stem's.
        lasts = {16: {8: 8 * max(*chis)}, 32: {8: 8 * max(*chis), 16: 16 * chi}}
        self.heads = nn.ModuleList(Head(self.sets, ends, lasts, c, num_classes, SlicedConv2d)
                                   for c in chis)
        self.keep, self.down = nn.ModuleDict(), nn.ModuleDict()
        for l, s in cells_of(cfg.layers):
            c_in = max(s * chi, 8 * cfg.stem_chi if l == 0 else 0)
            self.keep[f"{s}_{l}"] = SuperOps(c_in, [s * c for c in widths], 1)
            if s < 32 and l < cfg.layers - 1:               # nothing reads a last layer's down
                self.down[f"{s}_{l}"] = SuperOps(c_in, [2 * s * c for c in widths], 2)

    def forward(self, images, weights, who):
        """images (B, 3, H, W), weights: Weights, who: TEACHER or STUDENT -> logits a set, at 1/8.

        `lasts[s]` holds the map at each finer rate that a branch through node (s, l) saw last
        before it went down. It is mixed by the same beta as the nodes, so that the head reads in
        the supernet what it reads in the derived network (OURS; the release joins final maps).
        """
        nodes, lasts = {8: self.stems[who](images)}, {8: {}, 16: {}, 32: {}}
        for l in range(self.layers):
            keep, down = {}, {}
            for s, x in nodes.items():
                half = halve(x)                             # of both strides' zoomed convolutions
                alpha = weights.alpha[s, l]
                j, gate = weights.width[s, l + 1]
                keep[s] = self.keep[f"{s}_{l}"](x, half, alpha * gate, j)           # Eq. (2)
                if f"{s}_{l}" in self.down:
                    j, gate = weights.width[2 * s, l + 1]
                    down[2 * s] = self.down[f"{s}_{l}"](x, half, alpha * gate, j)
            before, seen = nodes, lasts
            nodes, lasts = dict(keep), dict(seen)
            for s in down:
                passed = {s // 2: before[s // 2], **seen[s // 2]}
                if s in keep:
                    b = weights.beta[s, l + 1]
                    nodes[s] = b[0] * down[s] + b[1] * keep[s]                      # Eq. (1)
                    lasts[s] = {r: mix(b, m, seen[s][r]) for r, m in passed.items()}
                else:                                       # the first node of its rate
                    nodes[s], lasts[s] = down[s], passed
        return self.heads[who](nodes, lasts)


def cells_of(layers):
    """(layer, rate) of every cell: rate 16 from layer 1, rate 32 from layer 2."""
    return [(l, s) for l in range(layers) for k, s in enumerate(RATES) if l >= k]


# ---------------------------------------------------------------------------------------------
# 4. Relaxation: alpha, beta, gamma
# ---------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """One draw of the architecture, App. D. Keys are (rate, layer); a node (s, l) is the input of
    cell (s, l), and layer L its output.

    alpha[s, l]: (5,); beta[s, l]: (2,), from rate s/2 and from s, where both exist;
    width[s, l]: (j, gate), index of the width of what is written to the node, and a scalar equal
    to 1 that carries gamma's gradient; soft[s, l]: (|X|,), probabilities or the one-hot draw.
    """
    alpha: dict
    beta: dict
    width: dict
    soft: dict

    def part(self, alpha=False, beta=False, width=False):
        """The same values with a gradient to the named kinds only."""
        def take(kind, live):
            return kind if live else {key: v.detach() for key, v in kind.items()}
        return Weights(take(self.alpha, alpha), take(self.beta, beta), self.width,
                       take(self.soft, width))


class ArchParameters(nn.Module):
    """Logits of one architecture; App. D: softmax makes them probabilities."""

    def __init__(self, cfg):
        super().__init__()
        self.num_widths, self.tau = len(cfg.widths), cfg.tau
        self.stem_index = (cfg.widths.index(cfg.stem_chi) if cfg.stem_chi in cfg.widths
                           else None)
        cells = cells_of(cfg.layers)
        self.keys = {
            "alpha": [(s, l) for l, s in cells],
            "beta": [(s, l) for l, s in cells if s > 8 and l > (s == 16) + 2 * (s == 32)],
            "gamma": [(s, l + 1) for l, s in cells] + [(2 * s, l + 1) for l, s in cells
                                                       if (2 * s, l + 1) == (16, 1) or
                                                       (2 * s, l + 1) == (32, 2)]}
        sizes = {"alpha": len(OPERATORS), "beta": 2, "gamma": self.num_widths}
        for name, size in sizes.items():            # OFFICIAL-CODE: all logits start at 1e-3
            self.register_parameter(name, nn.Parameter(
                torch.full((len(self.keys[name]), size), 1e-3)))

    def probabilities(self, name):
        """{(rate, layer): softmax of the logits}."""
        return dict(zip(self.keys[name], torch.softmax(getattr(self, name), 1)))

    def tie_skips(self, j):
        """j: width index of each node. A likeliest skip hands on the width it reads (3.4 removes
        it, and Section 4.2 counts no widths for it)."""
        j = dict(zip(self.keys["gamma"], j.tolist()))
        beta, stem = self.probabilities("beta"), self.stem_index
        for (s, l), a in sorted(self.probabilities("alpha").items(), key=lambda item: item[0][1]):
            b = beta.get((s, l + 1))
            if a.argmax() == 0 and (b is None or b[1] > b[0]):
                j[s, l + 1] = j[s, l] if l else j[s, 1] if stem is None else stem
        return torch.tensor([j[key] for key in self.keys["gamma"]])

    def weights(self, widths, generator=None):
        """Weights with the widths "max", "min", "random", "sample" (App. C) or "argmax".

        Draws come from `generator` on the CPU, so that every rank and device draws the same.
        """
        gamma = torch.softmax(self.gamma, 1)
        n, m = gamma.shape
        if widths == "sample":
            u = torch.rand(n, m, generator=generator).clamp(1e-10, 1 - 1e-7).to(gamma.device)
            noise = -torch.log(-torch.log(u))                       # App. C: Gumbel noise o
            p = torch.softmax((torch.log(gamma) + noise) / self.tau, 1)
            j = p.argmax(1)
            soft = F.one_hot(j, m) + p - p.detach()                 # straight-through
        else:
            j = {"max": lambda: torch.full((n,), m - 1), "min": lambda: torch.zeros(n).long(),
                 "random": lambda: torch.randint(m, (n,), generator=generator),
                 "argmax": lambda: self.tie_skips(gamma.argmax(1))}[widths]().to(gamma.device)
            soft = F.one_hot(j, m).to(gamma.dtype)
        gates = soft.gather(1, j[:, None])[:, 0]
        keys = self.keys["gamma"]
        return Weights(self.probabilities("alpha"), self.probabilities("beta"),
                       {k: (i, g) for k, i, g in zip(keys, j.tolist(), gates)},
                       dict(zip(keys, soft)))


# ---------------------------------------------------------------------------------------------
# 5. Latency: from a measured table to a differentiable number
# ---------------------------------------------------------------------------------------------


def cell_key(op, c_in, c_out, rate, down):
    return f"{op}{' /2' if down else ''} {c_in}->{c_out} @1/{rate}"


def up_key(rate, c_coarse, c_fine, c_out):
    return f"up {c_coarse}+{c_fine}->{c_out} @1/{rate}"


def classifier_key(c_in, c_mix, num_classes):
    return f"classifier {c_in}->{c_mix}->{num_classes}"


def latency_entries(cfg, num_classes, frame):
    """Every operator the student's latency can need, each once: {key: (make module, shapes)}.

    The stride-1 skip is not in it: it does nothing and costs nothing.
    """
    chi, entries = cfg.stem_chi, {"stem": (lambda: Stem(cfg.stem_chi), [(1, 3, *frame)])}

    def shape(c, rate):
        return 1, c, math.ceil(frame[0] / rate), math.ceil(frame[1] / rate)

    for rate, down, op in itertools.product(RATES, (False, True), OPERATORS):
        if rate == 32 and down or op == "skip" and not down:
            continue
        ins = {rate * w for w in cfg.widths} | ({8 * chi} if rate == 8 else set())
        for c_in, w in itertools.product(sorted(ins), cfg.widths):
            args = (op, c_in, w * rate * (1 + down), 1 + down)
            entries[cell_key(op, c_in, args[2], rate, down)] = (
                lambda args=args: CellNet(*args), [shape(c_in, rate)])
    for rate, fine, widths in ((16, 8, cfg.widths), (32, 16, cfg.widths), (16, 8, (chi,))):
        fines = {fine * w for w in cfg.widths} | ({8 * chi} if fine == 8 else set())
        for w, c_fine in itertools.product(widths, sorted(fines)):
            args = (rate * w, c_fine, chi * fine)
            entries[up_key(rate, *args)] = (lambda args=args: Up(*args),
                                            [shape(rate * w, rate), shape(c_fine, fine)])
    for rates in branch_sets(cfg.branches):
        for w in cfg.widths + (chi,):
            c = sum(8 * w if r == 8 else 8 * chi for r in rates)
            args = (c, num_classes, 8 * chi * len(rates))
            entries[classifier_key(c, args[2], num_classes)] = (
                lambda args=args: nn.Sequential(Classifier(*args), nn.Upsample(
                    tuple(frame), mode="bilinear", align_corners=True)), [shape(c, 8)])
    return entries


def table_latency(arch, ms, num_classes):
    """ms of a derived network: the sum of its table entries, shared cells once."""
    chi, total, counted, to_fuse = arch.stem_chi, ms["stem"], set(), 0
    for rate in arch.branches:
        for i, (cell, c_in) in enumerate(arch.inputs(rate)):
            prefix = arch.branches[rate][:i + 1]
            if prefix not in counted:
                counted.add(prefix)
                total += ms[cell_key(cell.op, c_in, cell.c_out, cell.rate, cell.down)]
        c, lasts = arch.channels(rate)
        for r in (r for r in (32, 16) if r <= rate):
            total += ms[up_key(r, c, lasts[r // 2], chi * r // 2)]
            c = chi * r // 2
        to_fuse += c
    return total + ms[classifier_key(to_fuse, 8 * chi * len(arch.branches), num_classes)]


class LatencyModel:
    """The table as tensors, by index of width; index |X| stands for the stem's chi."""

    def __init__(self, cfg, ms, num_classes, device="cpu"):
        widths, chi = cfg.widths, cfg.stem_chi
        both, self.layers, self.num_widths = widths + (chi,), cfg.layers, len(widths)
        self.sets = [s for s in branch_sets(cfg.branches) if len(s) == cfg.branches]

        def tensor(rows):
            return torch.tensor(rows, dtype=torch.float64, device=device)

        def cell(rate, down, op, w_in, w):
            if op == "skip" and not down:
                return 0.0
            key = cell_key(op, rate * w_in, w * rate * (1 + down), rate, down)
            return ms.get(key, 0.0)      # the stem's width at rates 16 and 32 never occurs

        self.stem = ms["stem"]
        self.cells = {(s, down): tensor([[[cell(s, down, op, wi, wo) for wo in widths]
                                          for wi in both] for op in OPERATORS])
                      for s in RATES for down in (False, True) if not (s == 32 and down)}
        self.ups = {(s, f): tensor([[ms.get(up_key(s, s * wc, f * wf, chi * f), 0.0)
                                     for wf in both] for wc in both])
                    for s, f in ((16, 8), (32, 16))}
        self.classifiers = {rates: tensor([ms[classifier_key(
            sum(8 * w if r == 8 else 8 * chi for r in rates), 8 * chi * len(rates), num_classes)]
            for w in both]) for rates in self.sets}

    def __call__(self, weights):
        """Expected latency (ms) of each set of branches: {rates: scalar}.

        Section 3.2: operators are replaced by their latencies in Eqs. (1) and (2). Reaching node
        (s, l+1) costs sum over its inputs of beta * (reaching the source + the cell between).
        With one-hot weights this is the sum of the table entries of the derived network.
        """
        soft = {k: F.pad(v, (0, 1)).double() for k, v in weights.soft.items()}
        stem = F.one_hot(torch.tensor(self.num_widths), self.num_widths + 1).double()
        soft[8, 0] = stem.to(next(iter(soft.values())).device)
        alone, together, lasts = {8: 0.0}, {}, {8: {}, 16: {}, 32: {}}
        for l in range(self.layers):
            into = {}               # rate of a node of layer l+1 -> [(probability, source, ms)]
            for s in RATES:
                sources = [r for r in (s // 2, s) if r in alone and not (r < s and
                                                                         l == self.layers - 1)]
                if sources:
                    b = weights.beta[s, l + 1] if len(sources) == 2 else (1.0,)
                    into[s] = [(p, r, torch.einsum(
                        "k,kij,i,j->", weights.alpha[r, l].double(), self.cells[r, r < s],
                        soft[r, l], soft[s, l + 1][:-1])) for p, r in zip(b, sources)]
            # Two branches pay once for the cells before they part: the walks back from nodes
            # s and t have met when their sources are the same.
            together = {(s, t): sum(p * q * (m + n + (alone[a] if a == c else
                                                      together[tuple(sorted((a, c)))]))
                                    for p, a, m in into[s] for q, c, n in into[t])
                        for s, t in itertools.combinations(sorted(into), 2)}
            alone, lasts = (
                {s: sum(p * (alone[r] + m) for p, r, m in ways) for s, ways in into.items()},
                {s: self._lasts(s, ways, lasts, soft, l) for s, ways in into.items()})
        return {rates: self.stem + (alone[rates[0]] if len(rates) == 1 else together[rates])
                + self._head(rates, soft, lasts) for rates in self.sets}

    def _lasts(self, s, ways, lasts, soft, l):
        """{finer rate: distribution of the width of the last map there}, as in Supernet.forward."""
        found = {}
        for p, r, _ in ways:
            for rate, w in (lasts[s] if r == s else {r: soft[r, l], **lasts[r]}).items():
                found[rate] = found.get(rate, 0.0) + p * w
        return found

    def _head(self, rates, soft, lasts):
        total, fixed = 0.0, soft[8, 0]                  # fixed: chi of the head is the stem's
        for s in rates:
            c = soft[s, self.layers]
            for r in (r for r in (32, 16) if r <= s):
                total = total + c @ self.ups[r, r // 2] @ lasts[s][r // 2]
                c = fixed
        w = soft[8, self.layers] if 8 in rates else fixed
        return total + w @ self.classifiers[rates]

    def mean(self, weights):
        """Lat(M): mean over the sets that App. B will choose from (OURS: all stay possible)."""
        values = self(weights).values()
        return sum(values) / len(values)


def sensitivities(model, arch):
    """Table 2: change of the supernet's latency (ms) with O, s and chi, the others uniform."""
    probe = copy.deepcopy(arch)
    with torch.no_grad():
        for p in probe.parameters():
            p.zero_()
        w = probe.weights("max")
        w.soft = probe.probabilities("gamma")

        def lat(**changed):
            return float(model.mean(replace(w, **changed)))

        def one_hot(kind, pick):
            return {k: F.one_hot(torch.tensor(pick(k)), len(v)).to(v) for k, v in kind.items()}

        def slowest(key, sign):          # operator by its expected latency at this place
            s, l = key
            g_in = F.pad(w.soft[s, l], (0, 1)).double() if l else F.one_hot(
                torch.tensor(model.num_widths), model.num_widths + 1).to(w.alpha[key]).double()
            cost = torch.einsum("kij,i,j->k", model.cells[s, False], g_in,
                                w.soft[s, l + 1].double())
            return int((sign * cost).argmax())

        op = [lat(alpha=one_hot(w.alpha, lambda k: slowest(k, sign))) for sign in (1, -1)]
        # The two extremes of resolution: going down as late, and as early, as possible.
        rate = [lat(beta=one_hot(w.beta, lambda k: i)) for i in (0, 1)]
        chi = [lat(soft=one_hot(w.soft, lambda k: i)) for i in (model.num_widths - 1, 0)]
    return [abs(a - b) for a, b in (op, rate, chi)]


def solve_latency_weights(delta):
    """Footnote 1: delta_1 w1 = delta_2 w2 = delta_3 w3 with w1 + w2 + w3 = 1.

    delta = (10.42, 0.01, 5.54) gives 0.001, 0.997, 0.002. A kind without influence (one width)
    needs no weight.
    """
    inverse = [1 / d if d > 1e-9 else 0.0 for d in delta]
    total = sum(inverse) or 1.0
    return [v / total for v in inverse]


def relaxed_latency(model, weights, w):
    """Eq. (3): w1 Lat(O | s, chi) + w2 Lat(s | O, chi) + w3 Lat(chi | O, s).

    OURS: each term sees the other two kinds as constants at their current values (the release puts
    neutral ones), so the sum weighs the gradients while its value stays the latency, as w sums
    to 1. w = None: not decoupled.
    """
    if w is None:
        return model.mean(weights)
    return (w[0] * model.mean(weights.part(alpha=True)) + w[1] * model.mean(weights.part(beta=True))
            + w[2] * model.mean(weights.part(width=True)))

# ---------------------------------------------------------------------------------------------
# 6. Search, App. F
# ---------------------------------------------------------------------------------------------


class frozen:
    """Within it the supernet gets no gradients and its BN statistics do not move."""

    def __init__(self, net):
        self.net = net
        self.norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    def __enter__(self):
        self.net.requires_grad_(False)
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_):
        self.net.requires_grad_(True)
        for norm in self.norms:
            norm.momentum = 0.1


def seg_loss(net, weights, who, images, labels, cfg):
    """L_seg of Eq. (8): OHEM cross-entropy, summed over the predictions of all branch sets."""
    size = [math.ceil(d / cfg.label_stride) for d in labels.shape[-2:]]
    labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].long()
    with autocast(images.device, cfg.amp):
        logits = net(images, weights, who)
    return sum(ohem(y if y.shape[-2:] == labels.shape[-2:] else resize(y.float(), size), labels)
               for y in logits)


def descend(optimizer, parameters, clip=0.0):
    """One optimizer step on gradients that stem from several backward passes and all ranks.

    Not through DistributedDataParallel: it would send the gradients of every pass, and its hooks
    do not see what Corner adds.
    """
    average_gradients(parameters)
    clip_gradients(parameters, clip)
    optimizer.step()


def update_weights(net, arch, who, widths, images, labels, optimizer, generator, cfg):
    """One step on W: one forward and backward for each of `widths`, their gradients added up.

    One backward a pass, so that one graph is alive at a time. Returns the mean loss.
    """
    optimizer.zero_grad()
    losses = []
    for kind in widths:
        with torch.no_grad():
            weights = arch.weights(kind, generator)
        loss = seg_loss(net, weights, who(kind), images, labels, cfg)
        check_finite({f"loss of the pass {kind}": loss})
        loss.backward()
        losses.append(loss.detach())
    descend(optimizer, list(net.parameters()), cfg.clip)
    return sum(losses) / len(losses)


def update_architecture(net, arch, who, images, labels, optimizer, generator, cfg, lat=None):
    """One step on alpha, beta (and gamma): W is frozen, so nothing of it leaks into a W step.

    lat(weights) -> relaxed latency in ms times lambda, or None. Returns (loss, latency term).
    """
    optimizer.zero_grad()
    with frozen(net):
        weights = arch.weights("sample" if who == STUDENT else "max", generator)
        loss = seg_loss(net, weights, who, images, labels, cfg)
        penalty = lat(weights) if lat else torch.zeros(())
        check_finite({"architecture loss": loss, "latency": penalty})
        (loss + penalty).backward()                         # Eq. (8)
    descend(optimizer, list(arch.parameters()))
    return loss.detach(), penalty.detach()


def pretrain_step(net, archs, batch, optimizer, generator, cfg):
    """App. F: smallest, largest and two random widths. The widest pass trains the teacher's stem
    and head, the others the student's (in the release the student's enter the search untrained)."""
    return {"seg": update_weights(
        net, archs[STUDENT], lambda kind: TEACHER if kind == "max" else STUDENT,
        ("max", "min", "random", "random"), *batch, optimizer, generator, cfg)}


def search_step(net, archs, batch_a, batch_b, optimizers, generator, cfg, lat):
    """The four alternating updates of App. F, each with its own backward."""
    w, a_t, a_s = optimizers
    # 1. W by grad L_seg(M | W, alpha_T, beta_T) on trainA; the teacher is always widest.
    seg_t = update_weights(net, archs[TEACHER], lambda _: TEACHER, ("max",), *batch_a, w,
                           generator, cfg)
    # 2. W by grad L_seg(M | W, alpha_S, beta_S, gamma_S) on trainA: largest, smallest, sampled.
    seg_s = update_weights(net, archs[STUDENT], lambda _: STUDENT, ("max", "min", "sample"),
                           *batch_a, w, generator, cfg)
    # 3. alpha_T, beta_T by grad L_seg on trainB.
    arch_t, _ = update_architecture(net, archs[TEACHER], TEACHER, *batch_b, a_t, generator, cfg)
    # 4. alpha_S, beta_S, gamma_S by grad L_seg + lambda grad Lat on trainB.
    arch_s, penalty = update_architecture(net, archs[STUDENT], STUDENT, *batch_b, a_s, generator,
                                          cfg, lat)
    return {"T": seg_t, "S": seg_s, "archT": arch_t, "archS": arch_s, "lat": penalty}


@torch.no_grad()
def supernet_miou(net, arch, who, loader, num_classes, device, amp=False):
    """{branch set: mIoU} of the supernet itself (not of a derived network) at the likeliest
    widths; the counts of all ranks are added up."""
    net.eval()
    weights = arch.weights("argmax" if who == STUDENT else "max")
    matrices = {rates: ConfusionMatrix(num_classes, device) for rates in net.sets}
    for images, labels in loader:
        with autocast(device, amp):
            outputs = net(images.to(device), weights, who)
        for matrix, logits in zip(matrices.values(), outputs):
            prediction = resize(logits.float(), labels.shape[-2:]).argmax(1)
            matrix.update(labels.to(device), prediction)
    net.train()
    return {rates: matrix.reduce().miou() for rates, matrix in matrices.items()}


def search_loaders(cfg):
    """(train set, loaders of trainA, trainB and held-out training images); disjoint, App. F."""
    train = open_split(cfg, "train", cfg.search_size)
    rest = (1 - cfg.held_out) / 2
    parts = data.split_indices(len(train), (rest, rest, cfg.held_out), cfg.seed)
    moved = data.train_transform(cfg.search_size, cfg.scales, cfg.search_scale)
    plain = data.eval_transform(cfg.search_scale)
    batch = cfg.search_batch // world_size()
    share = (cfg.workers, cfg.seed, rank(), world_size())
    return train, [
        data.make_loader(train, part, transform, size, shuffle, *share)
        for part, transform, size, shuffle in zip(
            parts, (moved, moved, plain), (batch, batch, 1), (True, True, False))]


class Searcher:
    """State of a search: supernet, two architectures, their optimizers, and how to save it."""

    def __init__(self, cfg, num_classes, device):
        self.cfg, self.device = cfg, device
        self.net = Supernet(cfg, num_classes).to(device)
        self.archs = nn.ModuleList([ArchParameters(cfg), ArchParameters(cfg)]).to(device)
        # fused: without it the update of a large supernet makes full-size temporaries
        self.w = torch.optim.SGD(self.net.parameters(), cfg.search_lr, cfg.momentum,
                                 weight_decay=cfg.weight_decay, fused=True)
        for p in self.net.parameters():     # fused SGD wants all momentum buffers or none; a
            self.w.state[p]["momentum_buffer"] = torch.zeros_like(p)    # pass leaves many None
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.w, cfg.lr_decay)
        self.a = [torch.optim.Adam(arch.parameters(), cfg.arch_lr, betas=(0.5, 0.999))
                  for arch in self.archs]                   # OFFICIAL-CODE: betas
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.epoch, self.lam = 0, cfg.lam

    def save(self, path):
        save_checkpoint(path, model=self.net.state_dict(), archs=self.archs.state_dict(),
                        optimizer=[o.state_dict() for o in (self.w, *self.a)],
                        schedule=self.schedule.state_dict(), epoch=self.epoch, lam=self.lam,
                        generator=self.generator.get_state())

    def load(self, path):
        state = load_checkpoint(path, ("model", "archs", "optimizer", "schedule", "generator"))
        load_weights(self.net, state["model"], path)
        load_weights(self.archs, state["archs"], path)
        for optimizer, saved in zip((self.w, *self.a), state["optimizer"]):
            optimizer.load_state_dict(saved)
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.epoch, self.lam = state["epoch"], state["lam"]
        common.set_rng_state(state["rng"])


def adapt_lambda(lam, ms, fps_range):
    """OFFICIAL-CODE: halved when a student is already fast, doubled when it is too slow."""
    low, high = fps_range
    if high <= 0:
        return lam
    return lam / 2 if 1e3 / ms >= high else 2 * lam if 1e3 / ms <= low else lam


def search(cfg, device):
    """Pretrain, search, derive, choose the branches; writes arch.json and the pictures."""
    train, (loader_a, loader_b, held_out) = search_loaders(cfg)
    data.check_segmentation(train)
    out, classes = Path(cfg.out), train.num_classes
    if rank() == 0:
        print(f"search space (4.2): {count_paths(cfg.layers)} paths of two branches, times "
              f"{count_combinations(cfg.layers, cfg.widths):.1e} cells and widths")
    ms = latency.build_table(latency_entries(cfg, classes, cfg.frame), device, cfg.frame,
                             out.parent)
    model = LatencyModel(cfg, ms, classes, device)
    s = Searcher(cfg, classes, device)
    w123 = choose_latency_weights(cfg, model, s.archs[STUDENT])
    if cfg.resume and (out / "last.pt").exists():
        s.load(out / "last.pt")
    else:
        common.forget_log(out, "search")
    epochs = cfg.pretrain_epochs + cfg.search_epochs
    steps = min(len(loader_a), len(loader_b), cfg.search_steps or len(loader_a))
    progress = Progress("search", epochs, steps, device, s.epoch)
    s.net.train()
    while s.epoch < epochs:
        epoch, searching = s.epoch, s.epoch >= cfg.pretrain_epochs
        loader_a.sampler.set_epoch(epoch)
        loader_b.sampler.set_epoch(epoch)
        batches_b = iter(loader_b) if searching else None
        for step, batch in enumerate(itertools.islice(loader_a, steps)):
            batch = [t.to(device) for t in batch]
            with common.training_step("search", epoch, step):
                if searching:
                    batch_b = [t.to(device) for t in next(batches_b)]
                    terms = search_step(
                        s.net, s.archs, batch, batch_b, (s.w, *s.a), s.generator, cfg,
                        lambda weights: s.lam * relaxed_latency(model, weights, w123))
                else:
                    terms = pretrain_step(s.net, s.archs, batch, s.w, s.generator, cfg)
            progress.step(epoch, step, terms, len(batch[0]) * world_size())
        s.schedule.step()
        common.average_buffers(s.net)
        extra = record_epoch(s, epoch, searching, terms, held_out, model, classes)
        s.epoch += 1
        s.save(out / "last.pt")
        progress.close(epoch, terms, extra)
    finish_search(s, model, ms, held_out, classes)


def three_weights(text):
    """'paper' or 'w1,w2,w3' -> [w1, w2, w3], summing to 1 as Eq. (3) wants."""
    try:
        w = [float(v) for v in text.replace("paper", "0.001,0.997,0.002").split(",")]
    except ValueError:
        w = []
    if len(w) != 3 or not all(v >= 0 for v in w) or abs(sum(w) - 1) > 1e-6:
        raise InputError(f"--latency-weights {text}: give auto, paper, or three numbers that sum "
                         "to 1, as 0.1,0.8,0.1")
    return w


def choose_latency_weights(cfg, model, arch):
    """w1, w2, w3 of Eq. (3) as the settings ask for them; prints Table 2 for this device."""
    if not cfg.decouple:
        return None
    if cfg.latency_weights != "auto":
        return three_weights(cfg.latency_weights)
    delta = sensitivities(model, arch)
    w = solve_latency_weights(delta)
    if rank() == 0:
        print("sensitivity of the latency on this device (paper, Table 2: 10.42, 0.01, 5.54 ms)")
        for name, d, v in zip(("O  operator", "s  downsample rate", "chi  width"), delta, w):
            print(f"  {name:20s} {d:9.3f} ms   w = {v:.4f}")
    return w


def record_epoch(s, epoch, searching, terms, held_out, model, classes):
    """Log losses, supernet mIoU, expected latency and signs of collapse; returns a remark."""
    arch = s.archs[STUDENT]
    with torch.no_grad():
        latency_ms = float(model.mean(arch.weights("argmax")))
    scores = supernet_miou(s.net, arch, STUDENT, held_out, classes, s.device, s.cfg.amp)
    pairs = [v for rates, v in scores.items() if len(rates) == s.cfg.branches]
    miou = sum(pairs) / len(pairs)
    if searching:
        s.lam = adapt_lambda(s.lam, latency_ms, s.cfg.fps_range)
    record = {}
    for who, name in ((TEACHER, "teacher"), (STUDENT, "student")):
        p = {kind: torch.softmax(getattr(s.archs[who], kind).detach(), 1).cpu()
             for kind in ("alpha", "beta", "gamma")}
        record[name] = {"operators": p["alpha"].mean(0).tolist(),
                        "down": p["beta"][:, 0].tolist(), "widths": p["gamma"].mean(0).tolist(),
                        "entropy": float(-(p["alpha"] * p["alpha"].log()).sum(1).mean())}
    log_record(s.cfg.out, stage="search", epoch=epoch, supernet_miou=miou, ms=latency_ms, lam=s.lam,
               searching=searching, **{k: float(v) for k, v in terms.items()}, **record)
    share = record["student"]["operators"][0]
    return (f" | supernet mIoU {100 * miou:.2f}, {latency_ms:.2f} ms, skips {100 * share:.0f}%, "
            f"entropy {record['student']['entropy']:.3f}")


# ---------------------------------------------------------------------------------------------
# 7. Derive, Section 3.4
# ---------------------------------------------------------------------------------------------


def downsampling_places(beta, layers):
    """{rate: layers of the nodes entered from the finer rate}: footnote 2 over all places.

    beta: {(rate, layer): (beta0, beta1)}. 1/16 needs l1* = argmax beta0[16, l]; 1/32 needs
    (l1*, l2*) = argmax beta0[16, l1] * beta0[32, l2] with l1 < l2. OURS: the first node of a rate
    has one input, so no beta, and the footnote's argmax cannot compare it: of the 15 places that
    Section 4.2 counts for 1/16 it chooses among 14. Of equal places the last wins, which the walk
    back from the branch's end meets first: one-hot beta derives the network it describes.
    """
    first, second = range(2, layers), range(3, layers)
    score = {key: float(b[0]) for key, b in beta.items()}
    pairs = [(score[16, a] * score[32, b], b, a) for a in first for b in second if a < b]
    _, l2, l1 = max(pairs)
    return {8: (), 16: (max((score[16, a], a) for a in first)[1],), 32: (l1, l2)}


def derive(arch, cfg, who, rates, places=None):
    """The discrete network of the branches `rates` from architecture logits.

    places: {rate: nodes entered from the finer rate}, by default from beta.
    """
    with torch.no_grad():
        w = arch.weights("argmax" if who == STUDENT else "max")
    widths, branches = cfg.widths, {}
    places = places or downsampling_places(w.beta, cfg.layers)
    for rate in rates:
        s, cells = 8, []
        for l in range(cfg.layers):
            down = l + 1 in places[rate]
            op = OPERATORS[int(w.alpha[s, l].argmax())]
            node = (2 * s if down else s, l + 1)
            if op != "skip" or down:            # a skip is shrunk: the branch loses a cell
                cells.append(Cell(op, s, down, widths[w.width[node][0]], l))
            s = node[0]
        branches[rate] = tuple(cells)
    return Architecture(max(cfg.widths) if who == TEACHER else cfg.stem_chi, branches)


def target(accuracy, ms, target_ms, power):
    """Eqs. (5), (6): ACC * (LAT / T)^w, with the same w on both sides of T."""
    return accuracy * (ms / target_ms) ** power


def finish_search(s, model, ms, held_out, classes):
    """App. B for the student, accuracy alone for the teacher, which has no latency constraint."""
    cfg, out, found, rows = s.cfg, Path(s.cfg.out), {}, {}
    for who, name in ((TEACHER, "teacher"), (STUDENT, "student")):
        scores = supernet_miou(s.net, s.archs[who], who, held_out, classes, s.device, cfg.amp)
        best = -math.inf
        for rates in (r for r in s.net.sets if len(r) == cfg.branches):
            arch = derive(s.archs[who], cfg, who, rates)
            row = {"supernet_miou": scores[rates], "target": scores[rates]}
            if who == STUDENT:
                row["table_ms"] = table_latency(arch, ms, classes)
                row["target"] = target(scores[rates], row["table_ms"], cfg.target_ms,
                                       cfg.target_power)
            rows[f"{name} {rates}"] = row
            if row["target"] > best:
                best, found[name] = row["target"], arch
        net = FasterSeg(found[name], classes).to(s.device)
        inherit(net, s.net, s.archs[who], who)
        rows[name] = {"derived_miou": evaluate(net, held_out, classes, s.device, cfg.amp).miou()}
    if rank() == 0:
        common.write_text(out / "arch.json", json.dumps(
            {**{k: a.to_json() for k, a in found.items()}, "classes": classes, "space": {
                k: getattr(cfg, k) for k in SPACE}, "selection": rows}, indent=1))
        for name, row in rows.items():
            print(f"{name:20s} " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
        print("\nstudent\n" + as_table(found["student"]))
        for name, arch in found.items():
            draw_architecture(out / f"arch_{name}.png", arch, cfg.layers, f"FasterSeg {name}")
        alpha = {f"1/{r} layer {l}": p.tolist() for (r, l), p in sorted(
            s.archs[STUDENT].probabilities("alpha").items())}
        common.heat_map(out / "search_alpha_cells.png", "alpha of the student at the end",
                        list(alpha), OPERATORS, list(alpha.values()))
        draw_search(out, cfg)
        print(f"\nin {out}: arch.json, log.jsonl, last.pt, arch_*.png, search_*.png\nnext: "
              f"python fastersg.py --train --eval{common.flags_of(cfg, QUICK)}")
    common.barrier()


@torch.no_grad()
def inherit(net, supernet, arch, who):
    """Copy the supernet's weights into a derived network: kernels and BN of its widths.

    The supernet's mIoU, this network's and the retrained network's are three different numbers.
    """
    net.stem.load_state_dict(supernet.stems[who].state_dict())
    sources = dict(supernet.heads[who].named_modules())
    for name, module in net.head.named_modules():           # same names, wider inputs
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(sources[name].weight[:, :module.weight.shape[1]])
            if module.bias is not None:
                module.bias.copy_(sources[name].bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(sources[name].state_dict())
    for index, cell in {i: c for path in net.paths.values() for i, c in path}.items():
        ops = (supernet.down if cell.down else supernet.keep)[f"{cell.rate}_{cell.layer}"]
        copy_cell(net.cells[index], ops, cell, ops.c_outs.index(cell.c_out))


def copy_norm(norm, source, start=0):
    c = norm.num_features
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).copy_(getattr(source, name)[start:start + c])


def copy_cell(cell_net, ops, cell, j):
    """One derived cell from the superkernels of its place; j: index of its width."""
    if cell.op == "skip":
        for conv, weight in ((cell_net.even, ops.skip[0]), (cell_net.odd, ops.skip[1])):
            conv.weight.copy_(weight[0, :conv.out_channels, :conv.in_channels])
        copy_norm(cell_net.norm[0], ops.skip_norms[j])
        return
    first, second = (ops.zoom_first, ops.zoom_second) if "zoom" in cell.op else (
        ops.first, ops.second)
    n = int(cell.op.endswith("x2"))
    conv, norm = cell_net.first
    conv.weight.copy_(first.weight[n, :conv.out_channels, :conv.in_channels])
    copy_norm(norm, first.norms[j], n * conv.out_channels)
    if n:
        conv, norm = cell_net.second
        conv.weight.copy_(second.weight[0, :conv.out_channels, :conv.in_channels])
        copy_norm(norm, second.norms[j])


def random_architecture(cfg, generator):
    """A network with every choice drawn uniformly: branches, paths, operators, widths.

    generator: random.Random.
    """
    arch = ArchParameters(cfg)
    with torch.no_grad():
        for p in arch.parameters():
            p.copy_(torch.tensor([[generator.random() for _ in row] for row in p]))
    sets = [s for s in branch_sets(cfg.branches) if len(s) == cfg.branches]
    places = {8: (), 16: (generator.randrange(1, cfg.layers),),
              32: tuple(sorted(generator.sample(range(1, cfg.layers), 2)))}
    return derive(arch, cfg, STUDENT, generator.choice(sets), places)


def random_like(cfg, student, ms, classes, tolerance=0.03, tries=20000):
    """The control: a random network whose table latency is within 3% of the student's."""
    generator, wanted = random.Random(cfg.seed), table_latency(student, ms, classes)
    for _ in range(tries):
        arch = random_architecture(cfg, generator)
        if abs(table_latency(arch, ms, classes) / wanted - 1) <= tolerance:
            return arch
    raise InputError(f"no random network within {100 * tolerance:.0f}% of {wanted:.2f} ms in "
                     f"{tries} draws; is arch.json of another --widths or --frame?")

# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

OP_COLORS = dict(zip(OPERATORS, ("#bdbdbd", "#9ecae1", "#3182bd", "#fdae6b", "#e6550d")))


def draw_architecture(path, arch, layers, title):
    """Figure 6: branches over layers (left to right) and rates (top to bottom), shared cells once.

    A box is a cell: its colour the operator, its number chi; `/2` goes down one row.
    """
    column, top, scale = 62, 74, 2
    longest = max([layers] + [len(c) for c in arch.branches.values()])
    image = Image.new("RGB", (scale * (column * (longest + 3) + 30), scale * 390), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13 * scale)

    def xy(column_index, rate, lane):
        return (scale * (20 + column * (column_index + 1)),
                scale * (top + 92 * RATES.index(rate) + 34 * lane))

    def box(x, y, text, color):
        draw.rounded_rectangle((x - 50, y - 22, x + 50, y + 22), 8, color, "#404040", 2)
        draw.text((x, y), text, "black", font, "mm")

    draw.text((20 * scale, 22 * scale), title, "black", ImageFont.load_default(size=32), "lm")
    for rate in RATES:
        draw.text((14, xy(0, rate, 0)[1]), f"1/{rate}", "#606060", font, "lm")
    boxes, links, drawn, end = [], [], set(), xy(longest + 1, 8, 0)
    for lane, rate in enumerate(sorted(arch.branches)):
        previous = xy(0, 8, 0)
        for i, cell in enumerate(arch.branches[rate]):
            prefix = arch.branches[rate][:i + 1]
            # Equal cells may stem from different layers: drawn once, at the first of them.
            same = [o[i] for o in arch.branches.values() if o[:i + 1] == prefix]
            layer = min(c.layer for c in same)
            at = xy((layer if layer >= 0 else i) + 1, cell.rate, 0 if len(same) > 1 else lane)
            links.append((previous, at))
            if prefix not in drawn:
                boxes.append((*at, f"{cell.chi}{' /2' if cell.down else ''}", OP_COLORS[cell.op]))
            drawn.add(prefix)
            previous = at
        links += [(previous, (end[0] - 60, previous[1])), ((end[0] - 60, previous[1]), end)]
    for a, b in links:
        draw.line((*a, *b), "#909090", 4)
    for item in boxes + [(*xy(0, 8, 0), "stem", "#e5f5e0"), (*end, "head", "#e5f5e0")]:
        box(*item)
    for k, op in enumerate(OPERATORS):
        x = scale * (30 + 105 * k)
        draw.rectangle((x, scale * 350, x + 28, scale * 364), OP_COLORS[op], "#404040")
        draw.text((x + 40, scale * 357), op, "black", font, "lm")
    with common.replacing(path) as temporary:
        image.resize((image.width // scale, image.height // scale), Image.Resampling.LANCZOS).save(
            temporary, format="PNG")


def draw_search(out, cfg):
    """From the log: alpha, beta, gamma over time, and Figure 4, mIoU and latency."""
    records = common.read_log(out, "search")
    epochs = [r["epoch"] + 1 for r in records]
    for who in ("teacher", "student"):
        shares = list(zip(*(r[who]["operators"] for r in records)))
        common.stacked_chart(out / f"search_alpha_{who}.png", f"alpha of the {who}, mean over "
                             "cells", "epoch", dict(zip(OPERATORS, shares)), xs=epochs)
    gammas = zip(*(r["student"]["widths"] for r in records))
    common.stacked_chart(out / "search_gamma.png", "gamma of the student, mean over nodes", "epoch",
                         {f"chi {chi}": g for chi, g in zip(cfg.widths, gammas)}, xs=epochs)
    down = zip(*(r["student"]["down"] for r in records))
    nodes = [f"1/{s} layer {l}" for s, l in ArchParameters(cfg).keys["beta"]]
    common.line_chart(out / "search_beta.png", "beta0 of the student", "epoch",
                      "probability of coming from the finer rate, by node",
                      {n: list(zip(epochs, v)) for n, v in zip(nodes, down)}, size=(
                          760, 420 + 20 * max(0, len(nodes) - 15)))
    common.scatter_chart(out / "search_trajectory.png", "Supernet during the search (Figure 4)",
                         "expected latency (ms)", "mIoU (%)", {
                             name: [(r["ms"], 100 * r["supernet_miou"], r["epoch"] + 1)
                                    for r in records if r["searching"] == flag]
                             for name, flag in (("pretraining", False), ("searching", True))})


# ---------------------------------------------------------------------------------------------
# 8. Retrain: teacher, then student with distillation (Section 3.3)
# ---------------------------------------------------------------------------------------------


def distillation(student, teacher, kind="paper"):
    """Eq. (4). Logits (B, K, H, W) -> scalar.

    paper: KL(q^s || q^t) of each pixel, mean over pixels. release: KL(q^t || q^s), mean over
    elements, i.e. divided by K as well.
    """
    log_s = F.log_softmax(student.float(), 1)
    log_t = F.log_softmax(teacher.float(), 1)
    if kind == "release":
        return (log_t.exp() * (log_t - log_s)).mean()
    return (log_s.exp() * (log_s - log_t)).sum(1).mean()


def space_of(cfg, path):
    """cfg with the search space that arch.json was found in; the paper's for 'paper'."""
    space = {k: getattr(Config, k) for k in SPACE}
    if path != "paper":
        space = common.read_json(path, "arch.json").get("space")
        if not isinstance(space, dict) or set(space) != set(SPACE):
            raise InputError(f"{path} does not say in which space it was found; run --search")
        space = {k: tuple(v) if isinstance(v, list) else v for k, v in space.items()}
    return replace(cfg, **space)


def find_architecture(cfg, which, classes, device):
    """The architecture that --network names, from --arch or the run folder."""
    path = cfg.arch or str(Path(cfg.out) / "arch.json")
    if which in ("student", "teacher"):
        return load_architecture(path, which)
    teacher, student = (load_architecture(path, w) for w in ("teacher", "student"))
    space = space_of(cfg, path)
    if which == "pruned_teacher":
        return pruned(teacher, min(space.widths), student.stem_chi)
    drawn, wanted = Path(cfg.out) / "random" / "arch.json", student.to_json()
    if not drawn.exists() or common.read_json(drawn, "arch.json").get("student") != wanted:
        ms = latency.build_table(latency_entries(space, classes, space.frame), device, space.frame,
                                 Path(cfg.out).parent)
        arch = random_like(space, student, ms, classes)
        common.write_text(drawn, json.dumps({"random": arch.to_json(), "student": wanted},
                                            indent=1))
        common.barrier()
    return load_architecture(str(drawn), "random")          # the same control in every stage


def folder_of(cfg, which):
    """Run folder of one trained network: runs without distillation do not overwrite the others."""
    alone = which != "teacher" and not cfg.distill
    return Path(cfg.out) / (which + "_alone" * alone)


def train_network(cfg, which, device, train_loader, val_loader, classes, teacher=None):
    """Train one derived network from scratch; returns it with its best weights."""
    arch = find_architecture(cfg, which, classes, device)
    torch.manual_seed(cfg.seed)
    net = place(FasterSeg(arch, classes, auxiliary=True), cfg, device)
    folder = folder_of(cfg, which)

    def loss_terms(forward, images, labels):
        outputs = forward(images)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        terms = {"seg": ohem(outputs[0], labels)}
        if outputs[1:]:
            terms["aux"] = cfg.aux_weight * sum(ohem(y, labels) for y in outputs[1:])
        if teacher is not None:             # equal weights for both losses, Section 3.3
            with torch.no_grad():
                soft = teacher(images)
            terms["kl"] = distillation(outputs[0], soft, cfg.distill_kl)
        return terms

    optimizer = torch.optim.SGD(net.parameters(), cfg.lr, cfg.momentum,
                                weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, cfg.lr_decay)
    best = fit(which, net, loss_terms, optimizer, schedule, train_loader, val_loader, classes, cfg,
               device, folder, cfg.clip, identity_of(cfg, arch))
    if rank() == 0:
        print(f"{which}: best retrained mIoU on val {100 * best:.2f} -> {folder}/best.pt")
    return restore(cfg, which, classes, device, folder / "best.pt")


def identity_of(cfg, arch):
    """What a checkpoint says about itself, so that it is not taken for another network's."""
    return {"arch": json.dumps(arch.to_json()), "dataset": f"{cfg.dataset} {cfg.data_root}"}


def restore(cfg, which, classes, device, path):
    """A trained network in eval mode, without its auxiliary heads."""
    state = load_checkpoint(path, ("model", "arch"))
    arch = find_architecture(cfg, which, classes, device)
    if state["arch"] != identity_of(cfg, arch)["arch"]:
        raise InputError(f"{path} was trained for another architecture than --arch holds; train "
                         "again or name its own arch.json")
    net = FasterSeg(arch, classes)
    load_weights(net, {k: v for k, v in state["model"].items() if "auxiliary" not in k}, path)
    return place(net.eval(), cfg, device)


def finished(cfg, which, classes, device):
    """Whether this network has been trained to the end, for this architecture and data set."""
    path = folder_of(cfg, which) / "last.pt"
    if not path.exists():
        return False
    state = load_checkpoint(path, ("epoch", "arch", "dataset"))
    identity = identity_of(cfg, find_architecture(cfg, which, classes, device))
    return state["epoch"] >= cfg.epochs and identity.items() <= state.items()


def train(cfg, device):
    """--train: the chosen network; its teacher first, unless that one is there already."""
    images, loader = open_loader(cfg, "train", train=True)
    _, val_loader = open_loader(cfg, "val")                    # chooses best.pt
    classes, teacher = images.num_classes, None
    if cfg.distill and cfg.network != "teacher":
        if finished(cfg, "teacher", classes, device):
            teacher = restore(cfg, "teacher", classes, device,
                              folder_of(cfg, "teacher") / "best.pt")
        else:
            teacher = train_network(cfg, "teacher", device, loader, val_loader, classes)
    train_network(cfg, cfg.network, device, loader, val_loader, classes, teacher)
    if rank() == 0:
        print(f"next: python fastersg.py --eval --bench{common.flags_of(cfg, QUICK)}")


# ---------------------------------------------------------------------------------------------
# 9. Evaluate, bench, export
# ---------------------------------------------------------------------------------------------


def evaluate_network(cfg, device):
    """--eval: mIoU at the label's own resolution, one scale, no flip (4.4), and pictures."""
    images, loader = open_loader(cfg, cfg.split)
    classes, folder = images.num_classes, folder_of(cfg, cfg.network)
    net = restore(cfg, cfg.network, classes, device, cfg.weights or folder / "best.pt")
    forward = torch.compile(net) if cfg.compile else net
    matrix = evaluate(forward, loader, classes, device, cfg.amp)
    if rank() > 0:
        return
    common.report_segmentation(cfg.network, matrix, images, cfg, folder)
    common.draw_segmentations(net, images, cfg, device, folder)


def bench(cfg, device):
    """--bench: parameters, conv MACs and measured latency (BN folded); writes bench.json."""
    path, classes = cfg.arch or str(Path(cfg.out) / "arch.json"), 19
    nets = {"published student": PAPER_STUDENT, "published teacher": PAPER_TEACHER}
    if path != "paper" and (cfg.arch or Path(path).exists()):
        load_architecture(path, "student")                  # refuses what is no arch.json
        classes = common.read_json(path, "arch.json").get("classes")
        if not isinstance(classes, int) or not 2 <= classes <= 254:
            raise InputError(f"{path} does not say for how many classes it was found")
        found = {"student": None, "teacher": None, cfg.network: None}
        nets = {f"found {w}": find_architecture(cfg, w, classes, device) for w in found} | nets
    nets = {name: FasterSeg(arch, classes).eval() for name, arch in nets.items()}
    about, rows = latency.compare(nets, cfg.frame, device, cfg)
    full = FasterSeg(PAPER_STUDENT, 19)
    rows["paper"] = {"params": 4.4e6, "flops": 28.2e9, "fps": 163.9}
    rows["published student, 19 classes, 1024x2048"] = {
        "params": count_params(full), "conv_macs": count_macs(full, (1024, 2048)),
        "params_with_auxiliary": count_params(FasterSeg(PAPER_STUDENT, 19, True))}
    ours = rows["published student, 19 classes, 1024x2048"]
    print("published student at 1024x2048, 19 classes, ours | paper (Table 3):\n"
          f"  parameters {ours['params']:,}, in training {ours['params_with_auxiliary']:,} "
          f"| 4.4 M\n  conv MACs {ours['conv_macs'] / 1e9:.6f} G | 28.2 G with BN and ReLU\n"
          "  latency: another device and backend, not comparable | 163.9 FPS (1080Ti, TensorRT)")
    common.write_text(Path(cfg.out) / "bench.json", json.dumps({**about, "networks": rows},
                                                               indent=1))
    print(f"in {cfg.out}: bench.json")


def plain_ops(ops, x, alpha, j):
    """SuperOps as Eq. (2) is written: each operator by itself, alpha times its output, kernels
    sliced under autograd. The same numbers; --bench-search measures what the difference is worth.
    """
    c = ops.c_outs[j]

    def enlarged(y):
        return resize(y, x.shape[-2:]) if ops.stride == 1 else y

    def conv(layer, k, y):
        norm, own = layer.norms[j], slice(k * c, (k + 1) * c)
        y = F.conv2d(y, layer.weight[k, :c, :y.shape[1]], stride=layer.stride, padding=1)
        return F.batch_norm(y, norm.running_mean[own], norm.running_var[own], norm.weight[own],
                            norm.bias[own], norm.training, norm.momentum, norm.eps)

    if ops.stride == 1:
        skip = match(x, c)
    else:
        norm = ops.skip_norms[j]
        y = [F.conv2d(p, w[0, :c // 2, :x.shape[1]], stride=2)
             for p, w in zip((x, shifted(x)), ops.skip)]
        skip = F.relu(F.batch_norm(torch.cat(y, 1), norm.running_mean, norm.running_var,
                                   norm.weight, norm.bias, norm.training, norm.momentum, norm.eps))
    found = [skip, F.relu(conv(ops.first, 0, x)),
             F.relu(conv(ops.second, 0, F.relu(conv(ops.first, 1, x)))),
             F.relu(enlarged(conv(ops.zoom_first, 0, halve(x)))),
             F.relu(enlarged(conv(ops.zoom_second, 0, F.relu(conv(ops.zoom_first, 1,
                                                                  halve(x))))))]
    return sum(a * y for a, y in zip(alpha, found))


def bench_search(cfg, device):
    """--bench-search: time and memory of the two steps of the search on random pictures, in turn
    with the same steps of the plain formulation."""
    classes, generator = 19, torch.Generator().manual_seed(0)
    s = Searcher(cfg, classes, device)
    s.net.train()
    cells = [m for m in s.net.modules() if isinstance(m, SuperOps)]

    def batch():
        shape = (cfg.search_batch, *cfg.search_size)
        return (torch.randn(shape[0], 3, *shape[1:]).to(device),
                torch.randint(0, classes, shape).to(device))

    print(f"{latency.device_name(device)}, {torch.get_num_threads()} threads, "
          f"{'bf16 autocast' if cfg.amp else 'float32'}, batch {cfg.search_batch}, 3x"
          f"{cfg.search_size[0]}x{cfg.search_size[1]}, L = {cfg.layers}, widths {cfg.widths}, "
          f"{classes} classes, {count_params(s.net) / 1e6:.1f} M supernet parameters")
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)        # what the device can do at best
    call = latency.prepare(conv, [(2, 256, 64, 128)], device)
    ms = latency.measure_many({"conv": call}, device)["conv"]["median"]
    print(f"one large 3x3 convolution alone: {2 * 64 * 128 * 9 * 256 ** 2 / ms / 1e6:.0f} G MACs/s")
    entries = latency_entries(cfg, classes, cfg.search_size)
    model = LatencyModel(cfg, dict.fromkeys(entries, 1.0), classes, device)     # any table: speed
    w123 = [1 / 3] * 3
    steps = {"pretraining step": lambda: pretrain_step(s.net, s.archs, batch(), s.w, generator,
                                                       cfg),
             "search step": lambda: search_step(
                 s.net, s.archs, batch(), batch(), (s.w, *s.a), generator, cfg,
                 lambda weights: s.lam * relaxed_latency(model, weights, w123))}

    def timed(step, plain):
        for ops in cells:
            if plain:       # an attribute of the object goes before the method of its class
                ops.forward = lambda x, half, alpha, j, ops=ops: plain_ops(ops, x, alpha, j)
            else:
                vars(ops).pop("forward", None)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    peak = {}
    for plain in (False, True):                             # the smaller first: peaks only grow
        for step in steps.values():
            timed(step, plain)
        peak[plain] = common.peak_memory(device)
    times = {(name, plain): [] for name in steps for plain in peak}
    for _ in range(5):
        for (name, plain), seen in times.items():
            seen.append(timed(steps[name], plain))
    for (name, plain), seen in times.items():
        seen.sort()
        print(f"{name:17s} {'plain' if plain else 'as here':8s} median {seen[2]:.2f} s of 5 in "
              f"turn ({seen[0]:.2f} to {seen[-1]:.2f}), peak memory {peak[plain]:.2f} GiB",
              flush=True)


def export_network(cfg):
    """--export FILE: the folded network as a torch.export program for pictures of --frame."""
    classes = open_loader(cfg, cfg.split)[0].num_classes
    path = cfg.weights or folder_of(cfg, cfg.network) / "best.pt"
    net = restore(cfg, cfg.network, classes, torch.device("cpu"), path)
    error = common.export(net, cfg.frame, cfg.export)
    print(f"{cfg.export}: torch.export program for 1x3x{cfg.frame[0]}x{cfg.frame[1]}, largest "
          f"difference to the network {error:.1e}\nrun it anywhere: "
          f"torch.export.load('{cfg.export}').module()(image)")


# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------

STAGES = {"search": "pretrain the supernet, search, derive; writes arch.json",
          "train": "train --network from scratch (and its teacher)",
          "eval": "mIoU and pictures of a trained network",
          "bench": "parameters, MACs and measured latency",
          "bench-search": "time and memory of a pretraining and a search step, against the plain "
                          "formulation"}


def check(cfg):
    """Refuse early what cannot work."""
    if cfg.layers < 4:
        raise InputError(f"--layers {cfg.layers}: three rates need 4 layers or more")
    if not cfg.widths or len(set(cfg.widths)) < len(cfg.widths) or min(cfg.widths) < 1:
        raise InputError("--widths needs different positive numbers, e.g. 4 6 8 10 12")
    if cfg.stem_chi < 1 or cfg.branches not in (1, 2):
        raise InputError("--stem-chi must be positive and --branches 1 or 2")
    if not 0 < cfg.held_out < 1 or cfg.pretrain_epochs < 0 or cfg.search_epochs < 0:
        raise InputError("--held-out is a share between 0 and 1, epochs are not negative")
    if min(*cfg.search_size, *cfg.frame) < 32 or min(cfg.search_scale, cfg.tau) <= 0:
        raise InputError("--search-size and --frame need 32 pixels a side or more, --search-scale "
                         "and --tau must be positive")
    if cfg.search_batch < 1 or cfg.label_stride < 1:
        raise InputError("--search-batch and --label-stride must be 1 or more")
    if cfg.latency_weights != "auto":
        three_weights(cfg.latency_weights)
    cfg.widths = tuple(sorted(cfg.widths))                  # everything below counts on the order


def check_batches(cfg, stages):
    """BN needs two values a channel: the coarsest map is a zoomed one at rate 32."""
    for stage, flag, batch, size in (("search", "search-", cfg.search_batch, cfg.search_size),
                                     ("train", "", cfg.batch_size, cfg.size)):
        if stage in stages and batch % world_size():
            raise InputError(f"--{flag}batch{'-size' * (not flag)} {batch} does not divide over "
                             f"{world_size()} processes")
        values = batch // world_size() * math.prod(math.ceil(d / 64) for d in size)
        if stage in stages and values < 2:
            raise InputError(f"--{flag}size {size[0]} {size[1]} leaves BN a single value at 1/64 "
                             "of the resolution; take a larger crop or batch")


def main(argv=None):
    stages, cfg = common.parse_args(Config, "fastersg", STAGES, QUICK, __doc__, argv)
    check(cfg)
    device = common.setup(cfg)
    check_batches(cfg, stages)
    if "bench-search" not in stages:
        common.write_config(cfg, stages)
    if stages & {"train", "eval"}:
        open_split(cfg, "val", cfg.size)                    # missing? say so before hours of search
    if "search" in stages:
        search(cfg, device)
    if "train" in stages:
        train(cfg, device)
    if "eval" in stages:
        evaluate_network(cfg, device)
    if rank() == 0 and "bench" in stages:
        bench(cfg, device)
    if "bench-search" in stages:
        if world_size() > 1:
            raise InputError("--bench-search measures a single process; run it without torchrun")
        bench_search(cfg, device)
    if rank() == 0 and cfg.export:
        export_network(cfg)


if __name__ == "__main__":
    common.run_main(main)
