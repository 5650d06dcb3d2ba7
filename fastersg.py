r"""FasterSeg: search operators, resolutions and widths under a latency budget, teacher and student
together.

    Chen, Gong, Liu, Zhang, Li, Wang: FasterSeg: Searching for Faster Real-time Semantic
    Segmentation. ICLR 2020. Section, equation and table numbers below are the paper's.

The idea in five lines:
  1. A supernet holds L layers of cells at rates 8, 16, 32; each cell mixes five operators.
  2. Softmax probabilities choose: alpha an operator, beta the predecessor, gamma the width.
  3. The latency of that mixture, from a measured table, is differentiable and joins the loss.
  4. Two architectures share one supernet's weights: an unconstrained teacher and a fast student.
  5. Derive both by argmax, train the teacher, then distil it into the student.

    image -> stem -> [8,0] -> [8,1] -> [8,2] -> .. -> [8,L-1] -------------\
             (1/8)      \        \        \                                +-> head -> mask
                         [16,1] -> [16,2] -> .. -> [16,L-1] --- up -------/   (b = 2 of the
                                \        \                                    3 branches)
                                 [32,2] -> .. -> [32,L-1] --- up - up ---/

    paper             here                             meaning
    s, l, L           s, l, cfg.layers                 downsample rate 8/16/32, layer, layers
    O^k               OPERATORS[k], operator()         candidate operators of a cell
    chi, X            cfg.widths, j                    expansion ratios; j is an index into them
    alpha             draw.alpha[s, l]                 probabilities of a cell's operators
    beta              draw.beta[s, l]                  and of a node's predecessors
    gamma             draw.gamma[s, l]                 one-hot: the width that a node has for now
    I_sl              maps[s][s]                       node (s, l): the input of cell (s, l)
    O_s->s, O_s->2s   keep, down                       the two outputs of a cell
    Lat, w1 w2 w3     LatencyTable, weighed_latency    Section 3.2, Eq. (3)
    lambda, T         cfg.lam, cfg.target_ms           Eq. (8), Eq. (5)
    q^s, q^t          logits of student and teacher    Eq. (4)

    python fastersg.py --search                  68 seconds on two CPU cores, 0.9 GiB
    python fastersg.py --train --eval            teacher, then the distilled student
    python fastersg.py --bench --arch paper      10 seconds: the published network, exact counts
"""
import math
import re
import statistics
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice, product
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import latency
from common import (BaseConfig, ConfusionMatrix, InputError, Run, autocast, average_gradients,
                    count_macs, count_params, evaluate, load_checkpoint, load_weights, log_record,
                    open_loader, open_split, opt, place, rank, world_size)
from data import IGNORE

# ---------------------------------------------------------------------------------------------
# 2. Settings. Defaults are the paper's; the tag says where it says so.
# ---------------------------------------------------------------------------------------------

NETWORKS = ("student", "teacher", "pruned_teacher", "random", "random1", "random2")


@dataclass
class Config(BaseConfig):
    # The search space, Section 3.1. Channels are chi * rate. One value in widths, e.g. 8, is the
    # fixed width of Table 3, one branch its single backbone. With four layers 1/32 has a choice.
    layers: int = opt(16, "L, layers of cells (PAPER 4.2)", "search", low=4)
    widths: tuple[int, ...] = opt((4, 6, 8, 10, 12), "ratios chi (PAPER 4.2)", "search", low=1)
    branches: int = opt(2, "b, branches of a network, 1 or 2 (PAPER 4.2)", "search", low=1, high=2)
    # Of the student; the teacher's is the widest. OURS: one of widths, so that skips, which hand on
    # what they read, never meet a width that nothing else has.
    stem_chi: int = opt(8, "chi of stem and head, one of --widths (OFFICIAL-CODE)", "search", low=1)

    # The search, App. F and H. Crops are small, as all operators of all cells run on each of them.
    search_size: tuple[int, int] = opt((160, 320), "crop, H W (PAPER App. H)", "search", low=32)
    search_scale: float = opt(0.5, "pictures resized by this first, on top of --image-scale (PAPER "
                              "App. H)", "search", low=0.01, high=16)
    search_batch: int = opt(2, "images a search step (OFFICIAL-CODE)", "search", low=1)
    pretrain_epochs: int = opt(20, "epochs for W alone (PAPER App. F)", "search")
    search_epochs: int = opt(30, "epochs for W and architecture (PAPER App. F)", "search", low=1)
    search_steps: int = opt(0, "steps an epoch, 0 and at most one pass over trainA", "search")
    # OURS: one rate throughout; OFFICIAL-CODE has 0.02 while pretraining, then this.
    search_lr: float = opt(0.01, "SGD for W while searching", "search")
    search_decay: float = opt(0.99, "factor of --search-lr an epoch (PAPER App. H)", "search",
                              high=1)
    arch_lr: float = opt(3e-4, "Adam for alpha, beta, gamma (PAPER App. H)", "search")
    tau: float = opt(1.0, "temperature of Gumbel-softmax (PAPER App. C)", "search", low=1e-3)
    label_stride: int = opt(8, "losses at 1/8 of the size (OFFICIAL-CODE)", "search", low=1)
    # For ACC of Eq. (5). PAPER App. H: never on val or test; on which training images it does not
    # say. OURS: some that neither W nor the architecture has seen.
    held_out: float = opt(0.1, "share of training images for App. B", "search", low=1e-3, high=0.9)

    # Latency, Section 3.2. A processor's milliseconds are not a 1080Ti's: lambda and target_ms mean
    # something else on each device, and so do w1 w2 w3 (`choose_eq3_w`).
    lam: float = opt(0.01, "lambda of Eq. (8), per millisecond (PAPER App. F)", "search")
    decouple: bool = opt(True, "Eq. (3); --no-decouple gives Figure 4(a)", "search")
    frame: tuple[int, int] = opt((1024, 2048), "picture of all latencies, H W (PAPER Table 2)",
                                 "search", low=32)
    # As alpha = beta in Eq. (6), T scales all candidates alike and decides nothing.
    target_ms: float = opt(8.3, "T of Eq. (5), ms (PAPER App. B); changes no choice", "search",
                           low=1e-3)
    target_power: float = opt(-0.07, "alpha = beta of Eq. (6) (PAPER App. B)", "search", low=-10,
                              high=10)

    # The networks that are trained from scratch. But for Eq. (4) the paper is silent on that. An
    # epoch of the release is 1000 batches; OURS: one pass, 247 batches of Cityscapes.
    arch: str = opt("", "arch.json, or 'paper': the published networks [<out>/arch.json]", "train")
    network: str = opt("student", "which one: pruned_teacher is a row of Table 3, random ones are "
                       "the nearest of 200 to the student's latency", "train", NETWORKS)
    # Small crops are better 32 k + 1: with align_corners 3 cells on 96 pixels stand 47.5 apart, not
    # 32, and 4 on 97 exactly 32. One seed of CamVid, crops of 96x128 and 97x129: 28 and 31 mIoU.
    size: tuple[int, int] = opt((512, 1024), "training crop H W (OFFICIAL-CODE)", "train", low=32)
    # OURS: uniform; OFFICIAL-CODE: .75, 1 or 1.25. The search draws scales too.
    scales: tuple[float, float] = opt((0.75, 1.25), "random scale", "search", low=0.1, high=10)
    batch_size: int = opt(12, "images a training step (OFFICIAL-CODE)", "train", low=1)
    epochs: int = opt(600, "training epochs of one network (OFFICIAL-CODE)", "train", low=1)
    lr: float = opt(0.01, "SGD when training a derived network (OFFICIAL-CODE)", "train")
    lr_decay: float = opt(0.992, "factor of --lr an epoch (OFFICIAL-CODE)", "train", high=1)
    distill: bool = opt(True, "Eq. (4), from the teacher, trained first if need be", "train")
    weights: str = opt("", "checkpoint to evaluate or export [<out>/<network>/best.pt]", "eval")
    correlation: int = opt(0, "--bench: N random networks against the table (Figure 3)")


# A small search (OURS): a small space, so that each choice gets many steps, and a learning rate of
# W that falls fast, so that weights that stand still judge the architecture. How far two searches
# from one pretrained supernet agree, with other batches (seeds 0, 1, 2; docs/results.md): on 5, 3,
# 5 of 9 operators, where 2.3, 2.7, 2.9 are chance, on all 3 rates (1.7) and on 8, 10, 9 of 11
# widths, as many as chance (8.4, 8.4, 9.0): nearly all are the narrowest, by the latency. Twice the
# epochs raise the margins but not this: on these scenes operators matter little.
QUICK = dict(layers=4, widths=(2, 4), stem_chi=2, size=(128, 256), search_size=(48, 96),
             search_scale=1.0, search_batch=12, pretrain_epochs=3, search_epochs=4, search_lr=0.05,
             search_decay=0.6, arch_lr=0.03, lam=0.1, label_stride=4, held_out=0.06,
             frame=(128, 256), epochs=8, batch_size=8, lr=0.05)

RATES = (8, 16, 32)
FIRST = {8: 0, 16: 1, 32: 2}                            # the first layer that has a cell of a rate
COARSE = {8: (), 16: (16,), 32: (32, 16)}               # rates that a branch's ups start from
OPERATORS = ("skip", "conv", "conv_x2", "zoom", "zoom_x2")                   # Section 3.1.2
KINDS = ("operator", "rate", "width")                   # O, s, chi: chosen by alpha, beta, gamma
TEACHER, STUDENT = 0, 1

# ---------------------------------------------------------------------------------------------
# 3. Search space, first part: architectures, which are what the search returns
#
# A branch is a walk through Figure 1 from the stem to the last layer: it starts at rate 8, and a
# cell of stride 2 takes it one rate down. A network has b branches, which end at different rates
# and which the head joins. Everything that a derived network is can be read in arch.json.
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell of a branch, as text `zoom_x2 /2 s=8 chi=4 layer=3`.

    Equal cells behind equal cells are shared by the branches (3.4). OURS: the layer of the supernet
    they come from must be equal too, where the paper names operator, rate and width: as skips are
    shrunk, the k-th cells of two branches may come from different layers, with other weights.
    """
    op: str                     # one of OPERATORS
    down: bool                  # stride 2: the output has twice the rate
    rate: int                   # s, downsample rate of the input
    chi: int                    # expansion ratio of the output
    layer: int = -1             # l; -1: not from a supernet

    @property
    def rate_out(self):
        return 2 * self.rate if self.down else self.rate

    @property
    def c_out(self):            # 3.1.3: channels = chi * rate, of the output
        return self.chi * self.rate_out

    def __str__(self):
        layer = f" layer={self.layer}" if self.layer >= 0 else ""
        return f"{self.op}{' /2' if self.down else ''} s={self.rate} chi={self.chi}{layer}"

    @staticmethod
    def parse(text):
        """Inverse of str; ValueError."""
        match = re.fullmatch(r"(\w+)( /2)? s=(\d+) chi=([1-9]\d*)( layer=(\d+))?", text)
        if not match or match[1] not in OPERATORS:
            raise ValueError(f"'{text}' is no cell; one reads like 'zoom_x2 /2 s=8 chi=4'")
        op, down, rate, chi, _, layer = match.groups()
        return Cell(op, bool(down), int(rate), int(chi), int(layer or -1))


@dataclass(frozen=True)
class Architecture:
    """A derived network: {final rate: [Cell, ...]}, and chi of stem and head."""
    stem_chi: int
    branches: dict

    def walk(self, rate):
        """One branch: ({a cell and all before it: its input channels}, {r: channels of the branch's
        last map at rate r}).

        The last maps are what the head reads: that of `rate` is the branch's end, a finer one is
        the input of the cell that goes down. Two cells, stem_chi 8, branch 16:
            conv s=8 chi=4 | zoom /2 s=8 chi=6 -> {(conv,): 64, (conv, zoom): 32}, {8: 32, 16: 96}
        """
        inputs, last, cells = {}, {8: 8 * self.stem_chi}, ()
        for cell in self.branches[rate]:
            cells = (*cells, cell)
            inputs[cells] = last[cell.rate]
            last[cell.rate_out] = cell.c_out
        return inputs, last

    def distinct_cells(self):
        """{a cell and all before it: its input channels} of the cells that run.

        3.4: branches "share both cell weights and feature maps" up to the first difference.
        """
        return {cells: c_in for rate in self.branches for cells, c_in in self.walk(rate)[0].items()}

    def to_json(self):
        rows = {str(rate): list(map(str, cells)) for rate, cells in self.branches.items()}
        return {"stem_chi": self.stem_chi, "branches": rows}

    @staticmethod
    def from_json(value, where="architecture"):
        """Inverse of to_json; InputError says what is wrong in a malformed one."""
        try:
            arch = Architecture(int(value["stem_chi"]), {
                int(rate): list(map(Cell.parse, rows)) for rate, rows in value["branches"].items()})
            if not 1 <= len(arch.branches) <= 3 or arch.stem_chi < 1:
                raise ValueError("it needs 1 to 3 branches and a positive stem_chi")
            for final, cells in arch.branches.items():
                if final not in RATES:
                    raise ValueError(f"a branch ends at rate 8, 16 or 32, not {final}")
                rates = [8] + [cell.rate_out for cell in cells]
                if [cell.rate for cell in cells] != rates[:-1] or rates[-1] != final:
                    raise ValueError(f"the rates of branch {final} do not follow each other")
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{where} is malformed ({type(error).__name__}: {error})") from None
        return arch


def pruned(teacher, chi, stem_chi):
    """Table 3, 'T -> pruned T': the teacher's cells at the slimmest ratio, the student's stem."""
    return Architecture(stem_chi, {rate: [replace(cell, chi=chi) for cell in cells]
                                   for rate, cells in teacher.branches.items()})


# Table 7 and Figure 6. Where the table prints s * chi, a cell that downsamples has 2 s * chi
# output channels: row 6 on the left, 4 and 8 on the right. The parameter count confirms it.
PAPER_STUDENT = Architecture.from_json({"stem_chi": 8, "branches": {
    16: 2 * ["conv_x2 s=8 chi=4"] + 2 * ["zoom_x2 s=8 chi=4"] + [
        "conv_x2 s=8 chi=4", "conv_x2 /2 s=8 chi=4",
        "zoom_x2 s=16 chi=4", "zoom_x2 s=16 chi=12", "zoom_x2 s=16 chi=8"],
    32: 2 * ["conv_x2 s=8 chi=4"] + ["zoom_x2 s=8 chi=4", "zoom /2 s=8 chi=8"]
        + 3 * ["zoom_x2 s=16 chi=4"] + ["zoom_x2 /2 s=16 chi=4"]
        + ["zoom_x2 s=32 chi=4", "zoom_x2 s=32 chi=8"]}})
# The teacher is not printed in the paper (OFFICIAL-CODE).
PAPER_TEACHER = Architecture.from_json({"stem_chi": 12, "branches": {
    16: ["zoom s=8 chi=12"] + 3 * ["zoom_x2 s=8 chi=12"] + ["zoom_x2 /2 s=8 chi=12"]
        + ["conv_x2 s=16 chi=12", "zoom_x2 s=16 chi=12", "zoom s=16 chi=12"]
        + 8 * ["zoom_x2 s=16 chi=12"],
    32: ["zoom s=8 chi=12"] + 4 * ["zoom_x2 s=8 chi=12"] + ["zoom_x2 /2 s=8 chi=12"]
        + ["zoom_x2 s=16 chi=12", "zoom s=16 chi=12"] + 5 * ["zoom_x2 s=16 chi=12"]
        + ["zoom_x2 /2 s=16 chi=12"] + 2 * ["conv_x2 s=32 chi=12"]}})
# Table 3's pruned teacher has 4.7 M parameters; the release's teacher at chi 4 has 2.9 M, with the
# auxiliary heads 3.2 M.
PUBLISHED = {"student": PAPER_STUDENT, "teacher": PAPER_TEACHER,
             "pruned_teacher": pruned(PAPER_TEACHER, 4, 8)}


def load_architecture(path, which):
    """Architecture `which`, one of NETWORKS, of an arch.json; 'paper' means the published ones."""
    archs = PUBLISHED if path == "paper" else common.read_json(path, "arch.json")
    if which not in archs:
        raise InputError(f"{path} holds no architecture named {which}, only {', '.join(archs)}; "
                         "run --search for others")
    if path == "paper":
        return archs[which]
    return Architecture.from_json(archs[which], f"{path}, {which}")


def cells_of(layers):
    """(s, l) of every cell of the supernet: 3 L - 3 of them."""
    return [(s, l) for s in RATES for l in range(FIRST[s], layers)]


def sources_of(l, layers):
    """{s: rates r of the cells (r, l - 1) that write node (s, l), the input of cell (s, l)}.

    They are s / 2, which goes down, and s. The last layer does not go down (4.2: L - 1 places).
    Of L = 4 layers: sources_of(1) = {8: [8], 16: [8]}, sources_of(2) = {8: [8], 16: [8, 16], 32:
    [16]}, and sources_of(4), what the head reads, = {8: [8], 16: [16], 32: [32]}.
    """
    sources = {s: [] for s in RATES if FIRST[s] <= l}
    for s in sources:
        finer = s // 2
        if finer in sources and FIRST[finer] < l < layers:
            sources[s].append(finer)
        if FIRST[s] < l:
            sources[s].append(s)
    return sources


def final_sets(branches):
    """The sets of branches that App. B chooses among: for b = 2 the three pairs of rates."""
    return list(combinations(RATES, branches))


def count_paths(layers, branches):
    """Section 4.2: resolution paths of all sets of branches; 1695 for L = 16 and pairs.

    A branch that ends at 1/16 goes down after one of L - 1 cells, one at 1/32 after two of them.
    The paper multiplies them; beta can say fewer, as it is the same for both branches of a pair.
    """
    paths = {8: 1, 16: layers - 1, 32: math.comb(layers - 1, 2)}
    return sum(math.prod(paths[s] for s in rates) for rates in final_sets(branches))


def count_combinations(layers, widths):
    """Section 4.2: (1 + 4 |X|)^((L-1)+(L-2)+(L-3)) + |X|^3, printed with a plus; 3.4e55.

    A cell that is not a skip has a width, a skip has none: 1 + 4 * 5 = 21 choices.
    """
    choices = 1 + (len(OPERATORS) - 1) * len(widths)
    return choices ** (3 * layers - 6) + len(widths) ** 3


# ---------------------------------------------------------------------------------------------
# 3. Search space, second part: operators, stem and head
#
# Supernet and derived network are made of the same modules. In the supernet a module knows several
# widths, and runs at one of them at a time: it takes the first channels of its kernel, as many as
# its input has and its width asks for. In a derived network it knows one width and has no slack,
# so that deriving is copying the corners of kernels (`inherit`), and "derived = relaxed" is exact.
# ---------------------------------------------------------------------------------------------


class SliceKernel(torch.autograd.Function):
    """weight (O, I, k, k) -> weight[:c_out, :c_in], for training loops only.

    Plain slicing makes autograd write the gradient of every slice as a tensor of full size, mostly
    zeros. Here it is added to its corner of weight.grad, and autograd gets none: whoever copies
    this must know that torch.autograd.grad does not see the weight and hooks are not called.
    """

    @staticmethod
    def forward(ctx, weight, c_out, c_in):
        ctx.weight, ctx.shape = weight, (c_out, c_in)
        return weight[:c_out, :c_in]

    @staticmethod
    def backward(ctx, grad):
        weight, (c_out, c_in) = ctx.weight, ctx.shape
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad[:c_out, :c_in] += grad
        return None, None, None


class ConvBN(nn.Module):
    """Convolution without bias and BN, of any of the widths c_outs (3.1.3: searchable superkernel).

    Wider connections take a larger corner of one kernel: its first output and input channels. Where
    32 channels come in and 48 are wanted, of a kernel (96, 96, 3, 3) the corner [:48, :32] runs, a
    sixth of its numbers. The first channels belong to all widths and learn in every pass. BN is
    separate for each output width (OFFICIAL-CODE): sums over 32 and over 96 inputs differ in mean
    and variance, and shared statistics would fit none of them in eval mode.
    """

    def __init__(self, c_in, c_outs, kernel=3, stride=1):
        super().__init__()
        self.c_outs = c_outs
        self.conv = nn.Conv2d(c_in, c_outs[-1], kernel, stride, kernel // 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in c_outs)

    def forward(self, x, j=0):              # (B, c_in or fewer, h, w) -> (B, c_outs[j], h', w')
        kernel, shape = self.conv.weight, (self.c_outs[j], x.shape[1])
        if shape != kernel.shape[:2]:
            kernel = SliceKernel.apply(kernel, *shape)
        y = F.conv2d(x, kernel, self.conv.bias, self.conv.stride, self.conv.padding)
        return self.norms[j](y)             # ReLU follows at the call, not always at once

    def fold_norms(self):
        """Called by common.fold_bn, for a derived network."""
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv, self.norms[0])
        self.norms = nn.ModuleList([nn.Identity()])


def resize(x, size):
    # PAPER App. H: bilinear. OFFICIAL-CODE: align_corners.
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def match(x, channels):
    """The first `channels` channels of x, zeros after its last."""
    missing = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x[:, :channels]


class Skip(nn.Module):
    """Skip connection of stride 1. PAPER: it hands on its input, and derived networks shrink it.

    In the supernet it must write the width that the other operators write: the map is cut or filled
    with zeros (OURS; OFFICIAL-CODE: a 1x1 convolution here, but nothing in the derived network).
    """

    def __init__(self, c_outs):
        super().__init__()
        self.c_outs = c_outs

    def forward(self, x, j=0):              # (B, c, h, w) -> (B, c_outs[j], h, w)
        return match(x, self.c_outs[j])


class SkipDown(nn.Module):
    """Skip connection of stride 2 (OFFICIAL-CODE): two 1x1 convolutions, of the pixels that are
    even and of those that are odd in both directions. Of 4x4 pixels `even` reads (0,0) (0,2) (2,0)
    (2,2), `odd` (1,1) (1,3) (3,1) (3,3); the others are not read."""

    def __init__(self, c_in, c_outs):
        super().__init__()
        halves = [c // 2 for c in c_outs]
        self.even, self.odd = ConvBN(c_in, halves, 1, 2), ConvBN(c_in, halves, 1, 2)

    def forward(self, x, j=0):              # (B, c_in, h, w) -> (B, c_outs[j], h/2, w/2)
        # one pixel up and left: the odd rows and columns land where stride 2 looks
        shifted = F.pad(x, (0, 1, 0, 1))[..., 1:, 1:]
        return F.relu(torch.cat([self.even(x, j), self.odd(shifted, j)], 1))


class Convolutions(nn.Module):
    """3x3 conv. or 3x3 conv. x 2; zoomed ones run at half the resolution (3.1.2, Table 1).

    zoom_x2, stride 1, 64 channels to 32, at 1/8 of 1024x2048: (B, 64, 128, 256), halved (B, 64, 64,
    128), two 3x3 (B, 32, 64, 128), enlarged (B, 32, 128, 256). A quarter of the pixels and so of
    the MACs, and one 3x3 kernel spans 6x6 pixels of x.
    """

    def __init__(self, c_in, c_outs, stride, twice, zoomed):
        super().__init__()
        self.zoomed, self.enlarge = zoomed, zoomed and stride == 1
        # A zoomed convolution has already halved the map: stride 2 only leaves out the upsampling.
        self.first = ConvBN(c_in, c_outs, stride=1 if zoomed else stride)
        self.second = ConvBN(c_outs[-1], c_outs) if twice else None

    def forward(self, x, j=0):      # (B, c_in, h, w) -> (B, c_outs[j], h/stride, w/stride)
        y = x
        if self.zoomed:
            # OURS: halves are rounded up, like those of a stride-2 convolution, so that any size
            # works; the release floors, which differs at 720x960.
            y = resize(x, [(d + 1) // 2 for d in x.shape[-2:]])         # (B, c_in, h/2, w/2)
        y = self.first(y, j)
        if self.second is not None:
            y = self.second(F.relu(y), j)
        if self.enlarge:
            y = resize(y, x.shape[-2:])
        return F.relu(y)            # OFFICIAL-CODE: after the upsampling


def operator(name, c_in, c_outs, stride):
    """O^k of Eq. (2): a module (x, j) -> map of c_outs[j] channels; of one width without j."""
    if name == "skip":
        return Skip(c_outs) if stride == 1 else SkipDown(c_in, c_outs)
    return Convolutions(c_in, c_outs, stride, name.endswith("x2"), name.startswith("zoom"))


class Stem(nn.Sequential):
    """App. A: (B, 3, H, W) -> (B, 8 chi, H/8, W/8). OFFICIAL-CODE: the fourth layer has stride 2
    but keeps the channels, which the paper's text doubles; the counts agree with the release."""

    def __init__(self, chi):
        c, layers = 8 * chi, []
        shapes = (3, c // 2, 2), (c // 2, c, 2), (c, c, 1), (c, c, 2), (c, c, 1)
        for c_in, c_out, stride in shapes:
            layers += [ConvBN(c_in, [c_out], stride=stride), nn.ReLU()]
        super().__init__(*layers)


class Up(nn.Module):
    """App. A: 1x1 reduces the coarse map, bilinear up, concatenate the finer one, 3x3 fuses."""

    def __init__(self, c_coarse, c_fine, c_out):
        super().__init__()
        self.reduce = ConvBN(c_coarse, [c_out], 1)
        self.fuse = ConvBN(c_out + c_fine, [c_out])

    def forward(self, coarse, fine):        # (B, c_coarse, h/2, w/2), (B, c_fine, h, w)
        y = resize(F.relu(self.reduce(coarse)), fine.shape[-2:])       # (B, c_out, h, w)
        return F.relu(self.fuse(torch.cat([y, fine], 1)))              # (B, c_out, h, w)


class Classifier(nn.Sequential):
    """(B, c_in, h, w) -> (B, num_classes, h, w): 3x3 and 1x1, after a 1x1 that mixes c_in channels
    into c_mix, if that is not None."""

    def __init__(self, c_in, c_mix, num_classes):
        mix = [] if c_mix is None else [ConvBN(c_in, [c_mix], 1), nn.ReLU()]
        c = c_mix or c_in
        c_mid = c if c <= 256 else c // 2                              # OFFICIAL-CODE
        super().__init__(*mix, ConvBN(c, [c_mid]), nn.ReLU(), nn.Conv2d(c_mid, num_classes, 1))


def ups_of(s, last, chi):
    """The ups of a branch that ends at rate s: [(rate of the coarse map, its channels, channels of
    the finer map, channels of the result), ...]. last: {r: channels of its last map at rate r}.

    With chi = 8 and last = {8: 32, 16: 96, 32: 128}, a branch that ends at 1/32 has two, from 1/32
    to 1/16 and on to 1/8: [(32, 128, 96, 128), (16, 128, 32, 64)].
    """
    ups, c = [], last[s]
    for coarse in COARSE[s]:
        fine = coarse // 2
        ups.append((coarse, c, last[fine], chi * fine))
        c = chi * fine
    return ups


def joint_channels(rates, c_8, chi):
    """(c_in, c_mix) of the classifier of a set; c_8: channels at the end of branch 8, if it is in
    the set. The others end in an up, which gives them 8 chi."""
    return sum(c_8 if s == 8 else 8 * chi for s in rates), 8 * chi * len(rates)


class Head(nn.Module):
    """App. A: every branch is brought to 1/8, then the branches of a set are fused.

        end at 1/32 -- up -- up -\
                       |     |    concat -> classifier -> logits of the set (16, 32)
        end at 1/16 ---|---- up -/
                       |     |
           the branch's own last maps at 1/16 and 1/8

    sets: tuples of rates, one prediction each (the supernet asks for several).
    last: {branch: {r: channels of its last map at rate r}}, as in Architecture.walk.

    PAPER_STUDENT: (256, H/32) -> up, with 64 -> (128, H/16) -> up, with 32 -> (64, H/8), and (128,
    H/16) -> up, with 32 -> (64, H/8); together (128, H/8), to the classifier.
    """

    def __init__(self, sets, last, chi, num_classes):
        super().__init__()
        self.sets = sets
        self.ups = nn.ModuleDict({
            str(s): nn.ModuleList(Up(*channels) for _, *channels in ups_of(s, last[s], chi))
            for s in last})
        self.classifiers = nn.ModuleDict({
            str(rates): Classifier(*joint_channels(rates, last[rates[0]][8], chi), num_classes)
            for rates in sets})

    def forward(self, maps):
        """maps: {branch: {r: last map (B, c, H/r, W/r)}} -> [logits (B, K, H/8, W/8) a set]."""
        fine_maps = {}
        for s in maps:
            y = maps[s][s]
            for up, coarse in zip(self.ups[str(s)], COARSE[s]):
                y = up(y, maps[s][coarse // 2])
            fine_maps[s] = y                                           # (B, c, H/8, W/8)
        # Coarse first: a ConvBN drops its last inputs only, so what varies in width must be last: a
        # branch at 1/8 ends in a width of its own, the others end in an Up of 8 chi channels.
        return [self.classifiers[str(rates)](torch.cat([fine_maps[s] for s in reversed(rates)], 1))
                for rates in self.sets]


class FasterSeg(nn.Module):
    """A derived network: (B, 3, H, W) -> logits (B, num_classes, H, W), any H and W.

    In train mode a list, the prediction first, then those of the auxiliary heads, if it has them.
    A cell that branches share runs once (3.4).
    """

    def __init__(self, arch, num_classes, auxiliary=False):
        super().__init__()
        rates = sorted(arch.branches)
        walks = {s: arch.walk(s) for s in rates}
        last = {s: last for s, (_, last) in walks.items()}
        self.stem, self.cells = Stem(arch.stem_chi), nn.ModuleList()
        index = {}                                  # {a cell and all before it: its number}
        for cells, c_in in arch.distinct_cells().items():
            index[cells], cell = len(index), cells[-1]
            self.cells.append(operator(cell.op, c_in, [cell.c_out], 1 + cell.down))
        self.paths = {                              # {branch: [(number of the cell, cell), ...]}
            s: [(index[cells], cells[-1]) for cells in inputs] for s, (inputs, _) in walks.items()}
        self.head = Head([tuple(rates)], last, arch.stem_chi, num_classes)
        self.auxiliary = nn.ModuleDict()
        for r in (16, 32) if auxiliary else ():     # OFFICIAL-CODE: at each rate coarser than 1/8
            c = sum(last[s].get(r, 0) for s in rates)
            if c:
                self.auxiliary[str(r)] = Classifier(c, None, num_classes)

    def forward(self, x):
        stem, outputs, maps = self.stem(x), {}, {}          # stem: (B, 8 stem_chi, H/8, W/8)
        for s, path in self.paths.items():
            maps[s] = {8: stem}
            for index, cell in path:
                if index not in outputs:                    # (B, c_out, H/rate_out, W/rate_out)
                    outputs[index] = self.cells[index](maps[s][cell.rate])
                maps[s][cell.rate_out] = outputs[index]
        logits = resize(self.head(maps)[0], x.shape[-2:])
        if not self.training:
            return logits
        predictions = [logits]
        for r, head in self.auxiliary.items():              # all maps at 1/r, coarse branch first
            joint = [maps[s][int(r)] for s in reversed(maps) if int(r) in maps[s]]
            predictions.append(resize(head(torch.cat(joint, 1)), x.shape[-2:]))
        return predictions


# ---------------------------------------------------------------------------------------------
# 3. Search space, third part: the supernet, Figure 1 with Eqs. (1) and (2)
#
#     node (8, l) ---- cell (8, l) --- O_8->8 ------------------> node (8, l+1)
#                          \--------- O_8->16 -- beta0 --\
#                                                         +--> node (16, l+1)
#     node (16, l) --- cell (16, l) -- O_16->16 - beta1 --/
#
# Both outputs of a cell have the same alpha, and operators of their own.
# ---------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """All operators of a cell at one stride: a line of Eq. (2)."""

    def __init__(self, c_in, c_outs, stride):
        super().__init__()
        self.ops = nn.ModuleList(operator(name, c_in, c_outs, stride) for name in OPERATORS)

    def forward(self, x, alpha, j):
        """Eq. (2): O(x) = sum_k alpha_k O^k(x, chi_j, stride).

        (B, c, h, w), (5,) -> (B, c_outs[j], h/stride, w/stride).
        """
        return sum(a * op(x, j) for a, op in zip(alpha, self.ops))


class Supernet(nn.Module):
    """The search space of Figure 1. Teacher and student share the cells (PAPER 3.3); stem and head
    are their own (OFFICIAL-CODE), as their widths differ. BN is per rank, not synchronised (OURS).
    """

    def __init__(self, cfg, num_classes):
        super().__init__()
        self.layers, self.num_classes, widest = cfg.layers, num_classes, max(cfg.widths)
        # One prediction for each set of branches that App. B chooses among, for b = 2 the three
        # pairs, and for each branch alone, so that its loss trains it directly (OFFICIAL-CODE: all
        # branches alone, and two pairs).
        self.final_sets = final_sets(cfg.branches)
        self.sets = final_sets(1) + (self.final_sets if cfg.branches > 1 else [])
        chis = widest, cfg.stem_chi                                         # of TEACHER, STUDENT
        last = {s: {r: r * widest for r in RATES if r <= s} for s in RATES}
        self.stems = nn.ModuleList(Stem(chi) for chi in chis)
        self.heads = nn.ModuleList(Head(self.sets, last, chi, num_classes) for chi in chis)
        self.keep, self.down = nn.ModuleDict(), nn.ModuleDict()
        for s, l in cells_of(cfg.layers):
            self.keep[f"{s} {l}"] = Mixture(s * widest, [s * chi for chi in cfg.widths], 1)
            if s < 32 and l < cfg.layers - 1:               # the last layer does not go down
                self.down[f"{s} {l}"] = Mixture(s * widest, [2 * s * chi for chi in cfg.widths], 2)

    def forward(self, images, draw, who):
        """images (B, 3, H, W), draw: Draw, who: TEACHER or STUDENT -> [logits at 1/8 of each set].

        maps[s][r] is the map (B, c, H/r, W/r) at rate r that a branch through node (s, l) saw last.
        Those of finer rates are mixed by the same beta as the node, so that the head reads in the
        supernet what it reads in the derived network (OURS; the release joins final maps).
        """
        # Rates r by node s: {8: {8}} before cell (8, 0), {8: {8}, 16: {8, 16}} behind layer 0, and
        # from layer 1 on {8: {8}, 16: {8, 16}, 32: {8, 16, 32}}.
        maps = {8: {8: self.stems[who](images)}}
        for l in range(self.layers):
            reached = {}                                    # the nodes of layer l + 1
            for s, sources in sources_of(l + 1, self.layers).items():
                # The width chi_j belongs to the node that is written, for both its producers
                # (OFFICIAL-CODE; Eq. (2) indexes it by cell).
                gamma, ways = draw.gamma[s, l + 1], []
                j = int(gamma.argmax())
                for r in sources:
                    cell = self.keep[f"{s} {l}"] if r == s else self.down[f"{r} {l}"]
                    # Times 1, with the gradient of softmax (App. C), which reaches all logits of
                    # the node: up for j and down for the others, or the reverse.
                    alpha = gamma[j] * draw.alpha[r, l]
                    output = cell(maps[r][r], alpha, j)                     # Eq. (2)
                    ways.append({**maps[r], s: output})     # and the finer maps behind it
                reached[s] = mixed(draw.beta[s, l + 1], *ways) if len(ways) == 2 else ways[0]
            maps = reached
        return self.heads[who](maps)


def mixed(beta, from_finer, from_same):
    """Eq. (1): I_{s,l} = beta0 O_{s/2->s,l-1} + beta1 O_{s->s,l-1}; the same for the finer maps.
    Dicts {r: (B, c, H/r, W/r)}.

    At rate s both ways have the width of the node. At finer rates they may not: chi 4 and 8 at 1/8
    are 32 and 64 channels, and 32 channels of zeros are put behind the first.
    """
    maps = {}
    for r in from_finer:
        c = max(from_finer[r].shape[1], from_same[r].shape[1])
        maps[r] = beta[0] * match(from_finer[r], c) + beta[1] * match(from_same[r], c)
    return maps


# ---------------------------------------------------------------------------------------------
# 4. Relaxation: alpha, beta, gamma (Section 3.1.4, App. C and D)
#
# alpha and beta are mixtures: all operators and both predecessors run, weighed by probability.
# gamma is a sample: one width of each node runs at a time, and the gradient comes by way of
# Gumbel-softmax. What supernet and table read is a Draw; what is learned are the logits behind it.
# ---------------------------------------------------------------------------------------------


@dataclass
class Draw:
    """One draw of an architecture. Keys are (s, l); node (s, l) is the input of cell (s, l), and
    layer L its output.

    alpha[s, l]: (5,). beta[s, l]: (2,), from rate s/2 and from s, where both exist.
    gamma[s, l]: (|X|,), one-hot, of the node's width. The latency takes probabilities too.
    """
    alpha: dict
    beta: dict
    gamma: dict


class ArchParameters(nn.Module):
    """Logits of one architecture; App. D, Eq. (7): softmax makes them probabilities.

    alpha: (cells, 5), beta: (nodes with two inputs, 2), gamma: (nodes, |X|). L = 16, five widths:
    45, 27 and 47 rows, 514 numbers beside the 250 million of W. The methods below return Draws that
    differ in their widths. The teacher's gamma is never read: it is always widest (3.3).
    """

    def __init__(self, cfg):
        super().__init__()
        self.layers, self.tau = cfg.layers, cfg.tau
        self.stem_j = cfg.widths.index(cfg.stem_chi)
        self.cells, self.nodes, self.merges = cells_of(cfg.layers), [], []
        for l in range(1, cfg.layers + 1):
            for s, sources in sources_of(l, cfg.layers).items():
                self.nodes.append((s, l))
                if len(sources) == 2:
                    self.merges.append((s, l))
        self.alpha = nn.Parameter(torch.zeros(len(self.cells), len(OPERATORS)))
        self.beta = nn.Parameter(torch.zeros(len(self.merges), 2))
        self.gamma = nn.Parameter(torch.zeros(len(self.nodes), len(cfg.widths)))

    def draw(self, gamma):
        """A Draw with these widths, gamma: (nodes, |X|)."""
        return Draw(dict(zip(self.cells, torch.softmax(self.alpha, 1))),
                    dict(zip(self.merges, torch.softmax(self.beta, 1))),
                    dict(zip(self.nodes, gamma)))

    def one_hot(self, j):
        """Widths by index: one number for all nodes, or (nodes,) -> (nodes, |X|)."""
        j = torch.as_tensor(j, device=self.gamma.device).expand(len(self.gamma))
        return F.one_hot(j, self.gamma.shape[1]).to(self.gamma.dtype)

    def narrowest(self):
        return self.draw(self.one_hot(0))

    def widest(self):
        return self.draw(self.one_hot(self.gamma.shape[1] - 1))

    def uniform(self):
        """Random widths. From the CPU's generator, so that all ranks and devices draw the same."""
        return self.draw(self.one_hot(torch.randint(self.gamma.shape[1], (len(self.gamma),))))

    def gumbel(self):
        """App. C: argmax_i softmax_i((log gamma + o) / tau), o = -log(-log(u)), u uniform.

        The argmax of log gamma + o is an exact sample of gamma, whatever tau is; tau smooths the
        gradient only. OFFICIAL-CODE: straight-through: one-hot, with the gradient of the softmax.
        """
        # The clamp: u = 0 and u = 1 would be infinite noise.
        u = torch.rand(self.gamma.shape).clamp(1e-10, 1 - 1e-7).to(self.gamma.device)
        noise = -torch.log(-torch.log(u))
        p = torch.softmax((F.log_softmax(self.gamma, 1) + noise) / self.tau, 1)
        return self.draw(self.one_hot(p.argmax(1)) + p - p.detach())

    @torch.no_grad()
    def likeliest(self):
        """3.4: argmax of gamma. Where a skip is the likeliest, its node has the width that the skip
        reads: it is shrunk, and Section 4.2 counts no widths for it. Here and not after the search,
        so that the widths whose latency is reported are those that are derived."""
        j = dict(zip(self.nodes, self.gamma.argmax(1).tolist()))
        places = downsampling_places(self.draw(self.gamma).beta, self.layers)
        # Nodes that a branch enters by going down. None gets two wishes: branch 16 enters rate 16
        # where branch 32 does, or after branch 32 has left it, as both follow one beta0[16].
        entered = [(16, places[16][0]), (16, places[32][0]), (32, places[32][1])]
        for (s, l), k in zip(self.cells, self.alpha.argmax(1)):     # a rate's layers in order
            if OPERATORS[k] == "skip" and (s, l + 1) not in entered:
                j[s, l + 1] = j[s, l] if l else self.stem_j
        return self.draw(self.one_hot(torch.tensor(list(j.values()))))


# ---------------------------------------------------------------------------------------------
# 5. Losses: segmentation, and latency from a measured table
#
# Eq. (8): L = L_seg(M) + lambda Lat(M). The table holds the measured time of every piece that a
# student of the space can be made of, for one picture size. A derived network's latency is the sum
# of its pieces (App. E: correlation 0.993; `--bench --correlation 40` measures it here), Lat(M) the
# expectation of that sum under alpha, beta and gamma, which one can differentiate.
# ---------------------------------------------------------------------------------------------


def ohem(logits, label, threshold=0.7):
    """App. F: cross-entropy with online hard example mining.

    Mean over the pixels whose true class has a probability below `threshold`, but over at least
    the hardest sixteenth of all (OFFICIAL-CODE: 0.7 and 1/16): of 8x8 pixels, 3 of them below 0.7,
    over 4. Without it the loss of a nearly perfect crop would hang on a few mislabelled pixels.
    logits (B, K, H, W), label (B, H, W) with IGNORE. Returns a scalar.
    """
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    loss = loss[label != IGNORE]                            # (valid pixels,)
    if loss.numel() == 0:
        return logits.sum() * 0                             # the mean over nothing would be NaN
    hard = int((loss > -math.log(threshold)).sum())
    least = max(1, min(label.numel() // 16, loss.numel()))
    return loss.topk(max(hard, least)).values.mean()


def seg_loss(net, draw, who, images, labels, cfg):
    """L_seg of Eq. (8): OHEM cross-entropy, summed over the predictions of all branch sets.

    images (B, 3, H, W), labels (B, H, W) -> scalar. Labels come down to 1 / label_stride, instead
    of all predictions going up to the full size. At stride 8 nearest takes pixel (8 i, 8 j), on
    which cell (i, j) of the stem's map is centred: a 3x3 of stride 2 centres output i on 2 i.
    """
    size = [math.ceil(d / cfg.label_stride) for d in labels.shape[-2:]]
    labels = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()
    with autocast(cfg):
        logits = net(images, draw, who)                     # each (B, K, H/8, W/8)
    return sum(ohem(resize(y.float(), size), labels) for y in logits)


def pieces_of(arch, num_classes):
    """The pieces of a derived network; a cell that branches share is one piece.

    A piece is a tuple (kind, *numbers), which also says how it is made:
        stem chi | up s c_coarse c_fine c_out | classifier c_in c_mix num_classes
        conv, conv_x2, zoom, zoom_x2, skip: operator c_in c_out s stride
    {8: [conv s=8 chi=4]} with stem_chi 8 and 19 classes has three: ("stem", 8),
    ("conv", 64, 32, 8, 1), ("classifier", 32, 64, 19).
    """
    chi, last = arch.stem_chi, {s: arch.walk(s)[1] for s in sorted(arch.branches)}
    pieces = [("stem", chi)]
    for (*_, cell), c_in in arch.distinct_cells().items():
        pieces.append((cell.op, c_in, cell.c_out, cell.rate, 1 + cell.down))
    for s in last:
        pieces += [("up", *up) for up in ups_of(s, last[s], chi)]
    c_8 = last[8][8] if 8 in last else None
    return pieces + [("classifier", *joint_channels(last, c_8, chi), num_classes)]


def space_pieces(cfg, num_classes):
    """{group: pieces} that a student of the space can need. A group is a tensor of LatencyTable,
    its pieces stand in the order of the axes: operator, width of the input, width of the output."""
    chi, pairs = cfg.stem_chi, list(product(cfg.widths, cfg.widths))
    groups = {"stem": [("stem", chi)]}
    for s, stride in ((8, 1), (8, 2), (16, 1), (16, 2), (32, 1)):
        groups[s, stride] = [(op, s * i, s * stride * j, s, stride)
                             for op in OPERATORS for i, j in pairs]
    for s in (16, 32):
        groups["up", s] = [("up", s, s * i, s // 2 * j, s // 2 * chi) for i, j in pairs]
    for rates in final_sets(cfg.branches):          # one without branch 8: |X| times the same
        groups[rates] = [("classifier", *joint_channels(rates, 8 * j, chi), num_classes)
                         for j in cfg.widths]
    return groups


def make_piece(piece, frame):
    """(function that makes the module, [shapes of its inputs])."""
    kind, *n = piece

    def shape(c, rate):
        return 1, c, math.ceil(frame[0] / rate), math.ceil(frame[1] / rate)

    if kind == "stem":
        return lambda: Stem(*n), [(1, 3, *frame)]
    if kind == "up":
        s, c_coarse, c_fine, c_out = n
        return lambda: Up(c_coarse, c_fine, c_out), [shape(c_coarse, s), shape(c_fine, s // 2)]
    if kind == "classifier":
        c_in, c_mix, num_classes = n
        full = nn.Upsample(tuple(frame), mode="bilinear", align_corners=True)
        return lambda: nn.Sequential(Classifier(c_in, c_mix, num_classes), full), [shape(c_in, 8)]
    c_in, c_out, s, stride = n
    return lambda: operator(kind, c_in, [c_out], stride), [shape(c_in, s)]


def measured_table(cfg, num_classes):
    """{piece: ms} for cfg.frame on this device; stored beside the run folders, measured once."""
    pieces = list(chain(*space_pieces(cfg, num_classes).values()))
    # A skip of stride 1 does nothing, and costs nothing.
    names = {piece: " ".join(map(str, piece)) for piece in pieces
             if piece[0] != "skip" or piece[-1] == 2}
    modules = {name: make_piece(piece, cfg.frame) for piece, name in names.items()}
    ms = latency.build_table(modules, cfg.device, cfg.frame, Path(cfg.out).parent)
    return {piece: ms[names[piece]] if piece in names else 0.0 for piece in pieces}


class LatencyTable:
    """Lat(M): the table as tensors, one a group of space_pieces; expected latencies of a Draw.
    piece_ms: {piece: ms} of all of them."""

    def __init__(self, cfg, piece_ms, num_classes):
        self.piece_ms, self.num_classes = piece_ms, num_classes
        self.layers, self.n = cfg.layers, len(cfg.widths)
        self.final_sets = final_sets(cfg.branches)
        one_hot = [float(chi == cfg.stem_chi) for chi in cfg.widths]
        self.stem_width = torch.tensor(one_hot, device=cfg.device)              # (|X|,)
        self.ms = {}
        for group, pieces in space_pieces(cfg, num_classes).items():
            self.ms[group] = torch.tensor([piece_ms[p] for p in pieces], device=cfg.device)

    def network_ms(self, arch):
        """App. E: ms of a derived network, the sum of its pieces: operators run one after the
        other, so what they take alone adds up, but for caches and launches (--correlation)."""
        return sum(self.piece_ms[piece] for piece in pieces_of(arch, self.num_classes))

    def __call__(self, draw):
        """{set of branches: expected ms}. Section 3.2: latencies in place of operators in Eqs. (1)
        and (2).

        P(r, l -> s) is beta of node (s, l + 1), or 1 where it has a single input r; g is gamma.
        ms(s, l + 1)    = sum_r P(r, l -> s) [ms(r, l) + sum_kij alpha_k width_i g_j ms_kij]
        width(s, l + 1) = sum_r P(r, l -> s) [skip width(r, l) + (1 - skip) g], skip = alpha_0 if
                          r = s, else 0: a skip hands on the width that it reads
        shared(s, t)    = sum_ab P(a -> s) P(b -> t) shared(a, b), shared(s, s) = ms(s): what the
                          branches of two nodes of layer l + 1 have in common, which is paid once.
                          Walk both back together: while they stand on different nodes they share
                          nothing, from the first node on that they have in common all before it
        Lat of (s, t)   = stem + ms(s, L) + ms(t, L) - shared(s, t) + head

        By hand: skip costs 0 ms, going down 3 by any operator, conv 2 at 1/8 and 4 at 1/16; each
        alpha is half skip and half conv, beta of node (16, 2) is (1/4, 3/4). Then ms(8, 1) = 1 and
        ms(16, 1) = 3, and ms(16, 2) = 1/4 (1 + 3) + 3/4 (3 + 2) = 4.75.
        """
        # nodes[s]: {"ms": ms(s, l), r: width of the last map at rate r, as probabilities}
        nodes, shared = {8: {"ms": 0.0, 8: self.stem_width}}, {(8, 8): 0.0}
        for l in range(self.layers):
            reached, chances = {}, {}                   # chances[s] = {r: P(r, l -> s)}
            for s, sources in sources_of(l + 1, self.layers).items():
                chances[s] = dict(zip(sources, draw.beta.get((s, l + 1), (1.0,))))
                reached[s] = {}
                for r, p in chances[s].items():
                    for key, value in self.through_cell(draw, nodes[r], r, s, l).items():
                        reached[s][key] = reached[s].get(key, 0.0) + p * value
            before, shared = shared, {(s, s): reached[s]["ms"] for s in reached}
            for s, t in combinations(reached, 2):
                shared[s, t] = sum(p * q * before[a, b] for a, p in chances[s].items()
                                   for b, q in chances[t].items())
            nodes = reached
        latencies = {}
        for rates in self.final_sets:
            latencies[rates] = (self.ms["stem"][0] + sum(nodes[s]["ms"] for s in rates)
                                + self.head_ms(rates, nodes))
            if len(rates) == 2:
                latencies[rates] = latencies[rates] - shared[rates]
        return latencies

    def through_cell(self, draw, node, r, s, l):
        """What a branch from `node` has spent, and how wide its last maps are, behind the cell
        between nodes (r, l) and (s, l + 1).

        Widths (4, 8); conv costs 1 or 2 ms from 4 and 2 or 4 from 8, skip nothing, both have alpha
        1/2; the branch reads 8 and the node has 4: 1/2 * 2 = 1 ms.
        """
        alpha, gamma = draw.alpha[r, l], draw.gamma[s, l + 1]
        by_width = self.ms[r, s // r].view(-1, self.n, self.n)          # (5, |X| in, |X| out)
        # over the operator k, the width i that is read, the width j that is written
        ms = torch.einsum("k,i,j,kij", alpha, node[r], gamma, by_width)
        width = gamma
        if r == s:
            skip = alpha[OPERATORS.index("skip")]
            width = skip * node[s] + (1 - skip) * gamma
        return {**node, "ms": node["ms"] + ms, s: width}

    def head_ms(self, rates, nodes):
        """App. A. OURS: the widths of two maps that meet count as independent."""
        total = self.ms[rates] @ nodes[8][8]                # (|X|,), by the width at 1/8
        for s in rates:
            c = nodes[s][s]                                 # a branch's end, then chi of the head
            for coarse in COARSE[s]:
                by_width = self.ms["up", coarse].view(self.n, self.n)   # (|X| coarse, |X| fine)
                total = total + c @ by_width @ nodes[s][coarse // 2]
                c = self.stem_width
        return total

    def mean(self, draw):
        """Lat(M): mean over the sets that App. B will choose from (OURS: all stay possible)."""
        values = self(draw).values()
        return sum(values) / len(values)


def weighed_latency(table, draw, w):
    """Eq. (3): w1 Lat(O | s, chi) + w2 Lat(s | O, chi) + w3 Lat(chi | O, s), ms.

    "X | Y, Z": Y and Z are constants, at their present values (OURS; the release puts neutral ones:
    uniform, widest). All three terms equal Lat, and so does their weighted sum, as w sums to 1: w
    changes no value, only how much of the gradient alpha, beta and gamma each get, and one pass
    does it. (With --no-decouple, w = 1, 1, 1, it is Lat with its full gradient.) With w1 = 0.001 an
    operator hears a thousandth of what it costs; rates, which hardly move the latency, nearly all.
    """
    def weighed(kind, weight):
        return {key: weight * x + (1 - weight) * x.detach() for key, x in kind.items()}

    return table.mean(replace(draw, alpha=weighed(draw.alpha, w[0]), beta=weighed(draw.beta, w[1]),
                              gamma=weighed(draw.gamma, w[2])))


@torch.no_grad()
def sensitivities(table, cfg):
    """Table 2: by how much the supernet's latency (ms) changes with O, with s and with chi: largest
    minus smallest over the choices, all cells making the same one, the other kinds uniform."""
    changes = []
    for kind, logits in ArchParameters(cfg).named_parameters():             # alpha, beta, gamma
        values = []
        for choice in range(logits.shape[1]):
            probe = ArchParameters(cfg).to(cfg.device)
            getattr(probe, kind)[:, choice] = 100.0         # softmax: 1
            values.append(float(table.mean(probe.draw(torch.softmax(probe.gamma, 1)))))
        changes.append(max(values) - min(values))
    return changes


def solve_footnote_1(changes):
    """d1 w1 = d2 w2 = d3 w3 with w1 + w2 + w3 = 1: (10.42, 0.01, 5.54) gives 0.001, 0.997, 0.002.

    A kind without influence (one width) needs no weight.
    """
    inverse = [1 / d if d > 1e-9 else 0.0 for d in changes]
    total = sum(inverse) or 1.0
    return [v / total for v in inverse]


def choose_eq3_w(cfg, table):
    """w of Eq. (3): footnote 1 solved for this device (OURS; PAPER: 0.001, 0.997, 0.002, which
    balance the latencies of a 1080Ti and of no other device). Prints this device's Table 2."""
    if not cfg.decouple:
        return 1.0, 1.0, 1.0                    # Lat itself, of which Figure 4(a) tells
    changes = sensitivities(table, cfg)
    w = solve_footnote_1(changes)
    print("sensitivity of the latency on this device (paper, Table 2: 10.42, 0.01, 5.54 ms)")
    for name, change, weight in zip(KINDS, changes, w):
        print(f"  {name:9s} {change:9.3f} ms   w = {weight:.4f}")
    return w


# ---------------------------------------------------------------------------------------------
# 6. Search: Appendix F on one page
#
# Three data sets, all from the training split: trainA moves the supernet's weights W, trainB the
# architectures, and the held-out pictures choose the branches in the end.
#
#   given      W at random, all probabilities equal, w of Eq. (3) from the table (footnote 1)
#   repeat     --pretrain-epochs times, a batch of trainA a step
#       W <- W - lr grad_W of L_seg at the widest (T), narrowest and two random widths (S)
#   repeat     --search-epochs times, a batch of trainA and one of trainB a step
#       1. W                            by L_seg of the teacher, widest                   trainA
#       2. W                            by L_seg of the student, three widths             trainA
#       3. alpha_T, beta_T              by L_seg of the teacher                           trainB
#       4. alpha_S, beta_S, gamma_S     by Eq. (8): L_seg of the student + lambda Lat     trainB
#   derive     section 7
#
# The order of the updates is the appendix's. (The release sums teacher and student into one loss,
# architecture first.) W is never where L_seg is least: as in DARTS, one step stands for all, and
# the architecture is judged by weights on their way.
# ---------------------------------------------------------------------------------------------


def run_search(run, table, loaders):
    """App. F. run: see start_run, table: LatencyTable, loaders: of trainA, trainB and held-out
    pictures. Supernet (its weights are W) and both architectures are trained in place."""
    net, teacher, student, sgd, decay, adam_t, adam_s = run.parts.values()
    train_a, train_b, held_out = loaders
    w = choose_eq3_w(run.cfg, table)                                            # of Eq. (3)
    for epoch in run.epochs():
        # Not to the loader's own end: --search-steps may be less, trainB may have a batch less.
        batches = islice(run.batches(train_a), run.steps)
        if epoch < run.cfg.pretrain_epochs:
            pretrain_epoch(run, batches, net, teacher, student, sgd)
        else:
            train_b.sampler.set_epoch(epoch)
            pairs = zip(batches, train_b)
            search_epoch(run, pairs, net, teacher, student, sgd, adam_t, adam_s, table, w)
        decay.step()
        end_search_epoch(run, net, teacher, student, table, held_out)


def pretrain_epoch(run, batches, net, teacher, student, sgd):
    """W alone, "each operator with the smallest width, largest width, and 2 random widths". The
    widest pass trains the teacher's stem and head, the others the student's (OURS: in the release
    those enter the search untrained)."""
    for batch in batches:
        with torch.no_grad():
            passes = [(TEACHER, teacher.widest())]
            for draw in (student.narrowest(), student.uniform(), student.uniform()):
                passes.append((STUDENT, draw))
        update_weights(run, "seg", sgd, net, batch, passes)


def search_epoch(run, pairs, net, teacher, student, sgd, adam_t, adam_s, table, w):
    """The four updates of App. F in turn; a pair is a batch of trainA and one of trainB."""
    cfg = run.cfg
    for batch, batch_b in pairs:
        with torch.no_grad():                           # to W the architectures are constants
            t_widest, narrowest = teacher.widest(), student.narrowest()
            widest, sampled = student.widest(), student.gumbel()
        # 1. W by grad_W L_seg(M | W, alpha_T, beta_T) on trainA. T is always widest (3.3).
        update_weights(run, "T", sgd, net, batch, [(TEACHER, t_widest)])
        # 2. W by grad_W L_seg(M | W, alpha_S, beta_S, gamma_S) on trainA, "with the smallest
        #    width, largest width, and the width that is sampled from the current gamma". All
        #    widths are too many; those between are corners of the widest that hold the narrowest.
        update_weights(run, "S", sgd, net, batch, [
            (STUDENT, narrowest), (STUDENT, widest), (STUDENT, sampled)])
        # 3. alpha_T, beta_T by their grad of L_seg(M | W, alpha_T, beta_T) on trainB: on trainA
        #    W would speak for the operator with the most weights, for what it has memorised. First
        #    order: W counts as a constant, so none of it leaks into the next update of W.
        batch_b = common.to_device(*batch_b, cfg)
        net.requires_grad_(False)
        run.descend(adam_t, arch_T=seg_loss(net, teacher.widest(), TEACHER, *batch_b, cfg))
        # 4. alpha_S, beta_S, gamma_S by their grad of Eq. (8) with Eq. (3) in it, on trainB:
        #    L = L_seg(M | W, alpha_S, beta_S, gamma_S) + lambda Lat(alpha_S, beta_S, gamma_S)
        draw = student.gumbel()
        run.descend(adam_s, arch_S=seg_loss(net, draw, STUDENT, *batch_b, cfg),
                    latency=cfg.lam * weighed_latency(table, draw, w))
        net.requires_grad_(True)


def update_weights(run, name, sgd, net, batch, passes):
    """One step on W by the gradients of some passes, [(who, draw), ...], added up.

    One backward a pass, so that one graph is alive at a time. BN statistics move in every pass, and
    in those on trainB too.
    """
    sgd.zero_grad()
    mean = 0.0                                          # for the log; gradients add up
    for who, draw in passes:
        loss = seg_loss(net, draw, who, *batch, run.cfg)
        loss.backward()
        mean = mean + loss.detach() / len(passes)
    average_gradients(list(net.parameters()))           # a NaN of one rank now stops all of them
    norm = nn.utils.clip_grad_norm_(net.parameters(), 5.0)                  # OFFICIAL-CODE
    run.check(**{name: mean}, gradient_W=norm)
    sgd.step()


def start_run(cfg, net, teacher, student, steps):
    """The Run of a search, of so many steps an epoch; its parts: Supernet, the ArchParameters of
    teacher and student, SGD for W and its decay, Adam for either architecture."""
    # App. H. fused holds 4% less memory, but wants the momentum of all parameters or of none.
    sgd = torch.optim.SGD(net.parameters(), cfg.search_lr, 0.9, weight_decay=5e-4, fused=True)
    for p in net.parameters():
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    decay = torch.optim.lr_scheduler.ExponentialLR(sgd, cfg.search_decay)       # App. H
    adam_t, adam_s = (torch.optim.Adam(arch.parameters(), cfg.arch_lr, betas=(0.5, 0.999))
                      for arch in (teacher, student))       # OFFICIAL-CODE: betas
    # A new search makes void what an older one has found, and what was trained of it; networks of
    # another --arch in these folders go too.
    trained = product(NETWORKS, ("", "_alone"), ("/last.pt", "/best.pt"))
    stale = ["arch.json", *("".join(parts) for parts in trained)]
    # Another device, or other threads, would go on with another table.
    about = {"latency": latency.conditions(cfg.device, torch.float32, cfg.frame)}
    return Run("search", "search", cfg, cfg.out, cfg.pretrain_epochs + cfg.search_epochs,
               steps, about, stale, model=net, teacher=teacher, student=student, sgd=sgd,
               decay=decay, adam_t=adam_t, adam_s=adam_s)


def search_loaders(cfg):
    """(number of classes, loaders of trainA, trainB and of held-out training images).

    App. F: trainA and trainB are disjoint halves, here of what is not held out for App. B.
    """
    # OURS: synthetic scenes are drawn so that a crop shows all of one.
    size = tuple(round(side / cfg.search_scale) for side in cfg.search_size)
    images = open_split(replace(cfg, size=size), "train")
    half = (1 - cfg.held_out) / 2
    parts = data.split_indices(len(images), (half, half, cfg.held_out), cfg.seed)
    scale, batch = cfg.search_scale * cfg.image_scale, cfg.search_batch // world_size()
    crops = data.train_transform(cfg.search_size, cfg.scales, scale)
    data.check_pairs(images)

    def loader(part, transform, batch, shuffle):
        return data.make_loader(images, part, transform, batch, shuffle, cfg.workers, cfg.seed,
                                rank(), world_size())
    train_a, train_b = (loader(part, crops, batch, True) for part in parts[:2])
    return images.num_classes, (train_a, train_b, loader(parts[2], data.eval_transform(scale), 1,
                                                         False))


@torch.no_grad()
def supernet_miou(net, draw, who, loader, cfg):
    """{set of branches that App. B chooses from: mIoU} of the supernet itself (not of a derived
    network) over all ranks. One pass scores all sets; common.evaluate would need one for each."""
    common.average_buffers(net)
    net.eval()
    matrices = {rates: ConfusionMatrix(net.num_classes, cfg.device) for rates in net.final_sets}
    for images, labels in loader:
        with autocast(cfg):
            outputs = net(images.to(cfg.device), draw, who)[-len(matrices):]
        for matrix, logits in zip(matrices.values(), outputs):
            prediction = resize(logits.float(), labels.shape[-2:]).argmax(1)
            matrix.update(labels.to(cfg.device), prediction)
    net.train()
    for matrix in matrices.values():
        common.sum_over_ranks(matrix.matrix)
    return {rates: matrix.miou() for rates, matrix in matrices.items()}


@torch.no_grad()
def decidedness(arch):
    """{kind: (mean largest probability, mean margin to the second)} of the kinds with a choice.

    Neither this nor entropy is a proof: on the synthetic scenes a larger --arch-lr and more steps
    moved both, and two searches agreed no better.
    """
    sureness = {}
    for kind, logits in zip(KINDS, arch.parameters()):
        if logits.shape[1] > 1:
            first, second = torch.softmax(logits, 1).topk(2).values.mean(0).tolist()
            sureness[kind] = first, first - second
    return sureness


@torch.no_grad()
def end_search_epoch(run, net, teacher, student, table, held_out):
    """Log and store. `shares`, the mean probability of each choice, shows a collapse; `decided`
    tells whether an argmax means anything."""
    draw = student.likeliest()
    scores = supernet_miou(net, draw, STUDENT, held_out, run.cfg)
    record = {"supernet_miou": statistics.mean(scores.values()),
              "ms": float(table.mean(draw)), "searching": run.epoch >= run.cfg.pretrain_epochs}
    choices = *OPERATORS, "go down", "stay", *(f"chi {chi}" for chi in run.cfg.widths)
    for name, kinds in (("teacher", (teacher.alpha, teacher.beta)),
                        ("student", (student.alpha, student.beta, student.gamma))):
        means = [torch.softmax(logits, 1).mean(0).tolist() for logits in kinds]
        record[name] = {"shares": dict(zip(choices, chain(*means)))}
    record["student"]["decided"] = decidedness(student)
    margins = [f"{kind} {margin:.2f}" for kind, (_, margin) in record["student"]["decided"].items()]
    run.end_epoch(note=f" | supernet mIoU {100 * record['supernet_miou']:.2f}, {record['ms']:.2f} "
                  f"ms, margins {', '.join(margins)}", **record)


# ---------------------------------------------------------------------------------------------
# 7. Derive, Section 3.4 and App. B
#
# `derive` takes the argmax of alpha in each cell, `downsampling_places` that of beta over the
# places where a branch can go down, `ArchParameters.likeliest` that of gamma in each node. Skips
# are shrunk, branches share what they have in common, and App. B chooses which branches. With
# one-hot probabilities the derived network is the relaxed one: same output from the same weights,
# same latency.
# ---------------------------------------------------------------------------------------------


def downsampling_places(beta, layers):
    """{branch: layers l of the nodes that it enters from the finer rate}, Section 3.4.

    beta: {(s, l): (beta0, beta1)}. For 1/16, l* = argmax_l beta0[16, l]. Footnote 2, for 1/32:
    (l1*, l2*) = argmax beta0[16, l1] beta0[32, l2] with l1 < l2. The first node of a rate has one
    input and so no beta: of the 15 places that 4.2 counts the argmax cannot compare one. OURS: it
    counts as an undecided node, 0.5: for 1/16 it wins where all others prefer to stay, for 1/32 the
    product decides. Of equal places the last wins, which the walk back from the branch's end meets
    first: with one-hot beta this is the path that Eq. (1) takes.

    L = 4, beta0[16, 2] = .6, beta0[16, 3] = .3, beta0[32, 3] = .7. For 1/16: .5, .6, .3, so l* = 2.
    For 1/32: (1, 2) .5 * .5, (1, 3) .5 * .7, (2, 3) .6 * .7, so (2, 3).
    """
    beta0 = {(16, 1): 0.5, (32, 2): 0.5} | {node: float(b[0]) for node, b in beta.items()}
    _, once = max((beta0[16, l], l) for l in range(1, layers))
    _, second, first = max((beta0[16, a] * beta0[32, b], b, a)
                           for a, b in combinations(range(1, layers), 2))
    return {8: (), 16: (once,), 32: (first, second)}


@torch.no_grad()
def derive(draw, cfg, who, rates):
    """The discrete network of the branches `rates`: argmax of alpha, beta; widths of the draw.

    L = 4, places[16] = (2,): cells (8, 0), (8, 1) /2, (16, 2), (16, 3), of which the second enters
    node (16, 2) and so has that node's width. If cell (16, 2) is a skip, three cells are left.
    """
    places, branches = downsampling_places(draw.beta, cfg.layers), {}
    for rate in rates:
        s, cells = 8, []
        for l in range(cfg.layers):
            s_out = 2 * s if l + 1 in places[rate] else s
            op = OPERATORS[int(draw.alpha[s, l].argmax())]
            chi = cfg.widths[int(draw.gamma[s_out, l + 1].argmax())]
            # 3.4: a skip is shrunk, the branch loses a cell. OURS: one that goes down stays; the
            # release takes the next best operator, and keeps a least number of cells.
            if op != "skip" or s_out > s:
                cells.append(Cell(op, s_out > s, s, chi, l))
            s = s_out
        branches[rate] = cells
    return Architecture(max(cfg.widths) if who == TEACHER else cfg.stem_chi, branches)


def target(accuracy, ms, cfg):
    """Eqs. (5), (6): ACC * (LAT / T)^w. The paper has w = alpha where LAT <= T and w = beta above,
    and sets both to -0.07: one number here. ACC 0.70 stays 0.700 at T, is 0.667 at 2 T and 0.735 at
    T / 2: a mild preference beside lambda, which drives the search itself."""
    return accuracy * (ms / cfg.target_ms) ** cfg.target_power


def select(cfg, net, teacher, student, table, held_out):
    """App. B: the set of branches with the best target, of those that the supernet scores.

    The teacher, which has no latency constraint, is chosen by accuracy alone (OURS). Returns
    ({name: architecture}, {candidate: its numbers}).
    """
    archs, rows = {}, {}
    for who, name, draw in ((TEACHER, "teacher", teacher.widest()),
                            (STUDENT, "student", student.likeliest())):
        candidates, targets = {}, {}
        # OURS: ACC of Eq. (5) is the supernet's; no candidate is trained for this.
        for rates, accuracy in supernet_miou(net, draw, who, held_out, cfg).items():
            candidates[rates] = derive(draw, cfg, who, rates)
            row = {"supernet_miou": accuracy, "target": accuracy}
            if who == STUDENT:
                row["table_ms"] = table.network_ms(candidates[rates])
                row["target"] = target(accuracy, row["table_ms"], cfg)
            rows[f"{name} {rates}"], targets[rates] = row, row["target"]
        archs[name] = candidates[max(targets, key=targets.get)]
        small = FasterSeg(archs[name], net.num_classes).to(cfg.device)
        inherit(small, net, who, cfg.widths)
        # With the BN statistics of mixtures, not measured again: a sign of life, not a result.
        matrix = evaluate(small, held_out, net.num_classes, cfg)
        rows[name] = {"derived_miou": matrix.miou()}
    return archs, rows


@torch.no_grad()
def inherit(small, net, who, widths):
    """Give a derived network the supernet's weights: kernels and BN of its widths."""
    copy_slices(small.stem, net.stems[who])
    copy_slices(small.head, net.heads[who])
    for index, cell in chain(*small.paths.values()):
        ops = (net.down if cell.down else net.keep)[f"{cell.rate} {cell.layer}"].ops
        copy_slices(small.cells[index], ops[OPERATORS.index(cell.op)], widths.index(cell.chi))


def copy_slices(small, wide, j=0):
    """Same-named tensors, the first channels of each; BN of width j.

    Not load_state_dict: what a superkernel has beyond the width found is left behind. The kernel of
    chi_j is the corner [:c_out, :c_in] of the widest (3.1.3), so shapes alone say which part it is;
    BN has its own statistics for each width, and j names them. At 1/8, chi 6 behind chi 4:
    conv.weight (48, 32, 3, 3) is a corner of (96, 96, 3, 3), norms.0.weight (48,) all of norms.1's.
    """
    source = wide.state_dict()
    for name, tensor in small.state_dict().items():
        whole = source[name.replace("norms.0.", f"norms.{j}.")]
        tensor.copy_(whole[tuple(slice(n) for n in tensor.shape)])


@torch.no_grad()
def random_architecture(cfg, generator):
    """A network of the search's own space: what derive makes of normal logits, for a random set of
    branches. So paths have the odds that they have before a search: in a deep network few branches
    enter 1/16 at once, as the first place counts as undecided. generator: torch.Generator."""
    arch, sets = ArchParameters(cfg), final_sets(cfg.branches)
    for logits in arch.parameters():
        logits.normal_(generator=generator)
    rates = sets[int(torch.randint(len(sets), (), generator=generator))]
    return derive(arch.likeliest(), cfg, STUDENT, rates)


def controls(cfg, student, table):
    """The control that the paper does not have: of 200 random networks of the space the three whose
    table latency is nearest to the student's, {"random": ..., "random1": ..., ...}.

    Nearest, not within a bound: a search of hours must not end in "there is none".
    """
    generator, archs = torch.Generator().manual_seed(cfg.seed), []
    wanted = table.network_ms(student)
    for _ in range(200):
        arch = random_architecture(cfg, generator)
        if arch not in (student, *archs):
            archs.append(arch)
    archs.sort(key=lambda arch: abs(table.network_ms(arch) - wanted))
    return dict(zip(("random", "random1", "random2"), archs))


# ---------------------------------------------------------------------------------------------
# 8. Retrain: teacher, then student with distillation (Section 3.3)
#
# The supernet's weights are thrown away: both networks are trained from scratch, the teacher first.
# Rows of Table 3, in its order: a search with --widths 8 --stem-chi 8 --branches 1, then with
# --branches 2 (the student of each alone: --no-distill); of a full search --network student
# --no-distill, --network pruned_teacher, --network student. --network random is the control, see
# `controls`.
# ---------------------------------------------------------------------------------------------


def distillation(student, teacher):
    """Eq. (4): E_i KL(q^s_i || q^t_i), i over the pixels. Logits (B, K, H, W) -> scalar.

    PAPER. The release has KL(q^t || q^s), and divides by the classes too.
    """
    log_s = F.log_softmax(student.float(), 1)
    log_t = F.log_softmax(teacher.float(), 1)
    return (log_s.exp() * (log_s - log_t)).sum(1).mean()


def folder_of(cfg):
    """Run folder of one trained network: runs without distillation do not overwrite the others."""
    alone = "" if cfg.distill or cfg.network == "teacher" else "_alone"
    return Path(cfg.out) / f"{cfg.network}{alone}"


def arch_path(cfg):
    return cfg.arch or str(Path(cfg.out) / "arch.json")


def train_network(cfg, teacher=None):
    """Train one derived network from scratch, or take a teacher that is there; returns it."""
    images, loader = open_loader(cfg, "train", train=True)
    arch = load_architecture(arch_path(cfg), cfg.network)
    torch.manual_seed(cfg.seed)
    net = place(FasterSeg(arch, images.num_classes, auxiliary=True), cfg)
    optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9, weight_decay=5e-4)  # as in search
    # The rate falls once an epoch; fit steps the schedule once a batch.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cfg.lr_decay ** (step // len(loader)))
    # A teacher serves several students: it is trained once. The others anew with each command.
    run = Run(cfg.network, "train", cfg, folder_of(cfg), cfg.epochs, about={"arch": arch.to_json()},
              shared=cfg.network == "teacher", model=net, optimizer=optimizer, schedule=schedule)

    def loss_terms(forward, images, labels):
        logits, *auxiliary = forward(images)
        terms = {"seg": ohem(logits, labels)}
        if auxiliary:
            terms["aux"] = 0.2 * sum(ohem(y, labels) for y in auxiliary)    # OFFICIAL-CODE
        if teacher is not None:             # equal weights for both losses, Section 3.3
            with torch.no_grad():
                soft = teacher(images)
            terms["kl"] = distillation(logits, soft)
        return terms

    best = common.fit(run, loss_terms, loader, common.scorer(cfg))      # val chooses best.pt
    print(f"{cfg.network}: best retrained mIoU on val {100 * best:.2f} -> {run.folder}/best.pt")
    return net.eval()                                                   # that of best.pt


def restore(cfg, path, classes):
    """A trained network in eval mode, without auxiliary heads; its checkpoint says which one."""
    state, wanted = load_checkpoint(path, ("model", "settings")), {"network": cfg.network}
    if cfg.arch:
        wanted["arch"] = load_architecture(cfg.arch, cfg.network).to_json()
    common.require_same(state["settings"], wanted, path)
    net = FasterSeg(Architecture.from_json(state["settings"].get("arch"), path), classes)
    load_weights(net, {k: v for k, v in state["model"].items() if "auxiliary" not in k}, path)
    return place(net.eval(), cfg)


def train(cfg):
    """Train --network from scratch; its teacher first, unless that one is there already."""
    teacher = None
    if cfg.distill or cfg.network == "teacher":
        teacher = train_network(replace(cfg, network="teacher", distill=True))
    if cfg.network != "teacher":
        train_network(cfg, teacher)
    print(common.next_command(cfg, "fastersg", "--eval --bench"))


# ---------------------------------------------------------------------------------------------
# 9. The stages --search, --eval, --bench; export, pictures
#
# Three mIoUs that must not be confused: supernet_miou, of all operators at once; derived_miou, of
# the derived network with the supernet's weights, usually low; retrained mIoU, which counts.
# ---------------------------------------------------------------------------------------------


def search(cfg):
    """Pretrain the supernet, search, derive; writes arch.json, with nothing measured in it.

    arch.json holds six networks: teacher and student as derived, the teacher at the smallest width
    (pruned_teacher, Table 3), and three random ones near the student's latency. --train --network
    takes any of them.
    """
    num_classes, loaders = search_loaders(cfg)
    print(f"search space (4.2): {count_paths(cfg.layers, cfg.branches)} paths, "
          f"times {count_combinations(cfg.layers, cfg.widths):.1e} cells and widths")
    table = LatencyTable(cfg, measured_table(cfg, num_classes), num_classes)
    net = place(Supernet(cfg, num_classes), cfg).train()
    teacher, student = (ArchParameters(cfg).to(cfg.device) for _ in range(2))
    steps = min(len(loaders[0]), len(loaders[1]), cfg.search_steps or len(loaders[0]))
    run = start_run(cfg, net, teacher, student, steps)
    run_search(run, table, loaders)
    archs, rows = select(cfg, net, teacher, student, table, loaders[2])
    archs["pruned_teacher"] = pruned(archs["teacher"], min(cfg.widths), cfg.stem_chi)
    archs |= controls(cfg, archs["student"], table)
    out = Path(cfg.out)
    common.write_json(out / "arch.json", {name: arch.to_json() for name, arch in archs.items()})
    for name in ("random", "random1", "random2"):
        rows[name] = {"table_ms": table.network_ms(archs[name])}
    log_record(out, stage="selection", **rows)
    for name, row in rows.items():
        print(f"{name:20s} " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
    for rate, cells in archs["student"].branches.items():       # Table 7
        print(f"student, branch 1/{rate}", *cells, sep="\n  ")
    print_decidedness(student)
    for name in ("student", "teacher"):
        draw_architecture(out / f"arch_{name}.png", archs[name], f"FasterSeg {name}")
    draw_search(cfg)
    print(f"\nin {out}: arch.json, log.jsonl, last.pt, arch_*.png, search_*.png\n"
          + common.next_command(cfg, "fastersg", "--train --eval"))
    common.barrier()                            # the other ranks may read arch.json now


def print_decidedness(arch):
    """How sure the argmax of derive is, and a warning where it is little more than a guess."""
    for kind, (largest, margin) in decidedness(arch).items():
        print(f"{kind:9s} mean largest probability {largest:.2f}, mean margin {margin:.2f}")
        if margin < 0.05:
            print(f"  warning: UNDECIDED, another seed may choose another {kind}; compare two "
                  "searches before you train")

def draw_architecture(path, arch, title):
    """Figure 6: a branch is a row of boxes, lower where its resolution is. A box is a cell: its
    colour the operator, its number chi; framed in black are the cells that branches share."""
    rows, colours = list(arch.branches.values()), dict(zip(OPERATORS, common.COLOURS))
    image, pen, font = common.draw_canvas(title, 56 * max(6, *map(len, rows)) + 90,
                                          130 * len(rows) + 70)
    for row, (rate, cells) in enumerate(arch.branches.items()):
        top = 60 + 130 * row
        pen.text((12, top), f"branch 1/{rate}", common.INK, font)
        for i, cell in enumerate(cells):
            shared = all(cells[:i + 1] == other[:i + 1] for other in rows)
            x, y = 90 + 56 * i, top + 36 * RATES.index(cell.rate)
            pen.rectangle((x, y, x + 48, y + 24), colours[cell.op],
                          common.INK if shared and len(rows) > 1 else None, 2)
            text = f"{cell.chi} /2" if cell.down else str(cell.chi)
            pen.text((x + 24, y + 12), text, common.INK, font, "mm")
    for i, (op, colour) in enumerate(colours.items()):
        pen.text((12 + 76 * i, image.height - 20), op, colour, font)
    common.save_png(image, path)


def draw_search(cfg):
    """From the log: what moved when, and Figure 4 (OURS: on held-out pictures; the paper: val)."""
    records, out = common.read_log(cfg.out, "search"), Path(cfg.out)
    shares = [r["student"]["shares"] for r in records]
    common.draw_heat_map(out / "search_shares.png", "mean probabilities of the student by epoch",
                         list(shares[0]), [r["epoch"] + 1 for r in records],
                         [[share[name] for share in shares] for name in shares[0]])
    path = {"pretraining": [], "searching": []}
    for r in records:
        path["searching" if r["searching"] else "pretraining"].append(
            (r["ms"], 100 * r["supernet_miou"]))
    common.draw_lines(out / "search_trajectory.png", "Supernet, held-out pictures (as Figure 4)",
                      "expected latency (ms)", "mIoU (%)", path, dots=True)


def evaluate_network(cfg):
    """mIoU at the label's own resolution, one scale, no flip (4.4), and pictures."""
    images, loader = open_loader(cfg, cfg.split)
    folder, classes = folder_of(cfg), images.num_classes
    net = restore(cfg, cfg.weights or folder / "best.pt", classes)
    forward = torch.compile(net) if cfg.compile else net
    matrix = evaluate(forward, loader, classes, cfg)
    common.report_segmentation(cfg.network, "retrained", matrix, images, cfg, folder)
    common.draw_segmentations(net, images, cfg, folder)


def bench(cfg):
    """Parameters, conv MACs and measured latency (BN folded); writes bench.json.

    The published networks and, if there is an arch.json, those found; 19 classes, as in Table 3.
    """
    names, path = dict.fromkeys(("student", "teacher", cfg.network)), arch_path(cfg)
    archs = {f"published {name}": PUBLISHED[name] for name in names if name in PUBLISHED}
    if path != "paper" and (cfg.arch or Path(path).exists()):
        archs |= {f"found {name}": load_architecture(path, name) for name in names}
    piece_ms = measured_table(cfg, 19) if cfg.correlation else {}
    if rank() > 0:                      # only here: a table is measured by rank 0 for all of them
        return
    nets = {name: FasterSeg(arch, 19).eval() for name, arch in archs.items()}
    about, rows = latency.compare(nets, cfg.frame, cfg)
    student = FasterSeg(PAPER_STUDENT, 19)
    macs, params = count_macs(student, (1024, 2048)), count_params(student)
    print("19 classes; published student at 1024x2048, ours | paper (Table 3):\n"
          f"  parameters {params:,} | 4.4 M with the auxiliary heads\n"
          f"  conv MACs {macs / 1e9:.6f} G | 28.2 G with BN and ReLU\n"
          "  latency: another device and backend, not comparable | 163.9 FPS (1080Ti, TensorRT)")
    if cfg.correlation:
        rows["correlation"] = correlate(cfg, LatencyTable(cfg, piece_ms, 19))
    latency.write_bench(cfg, about, rows)


def correlate(cfg, table):
    """App. E, Figure 3: what the table says of random networks, against their measured latency.

    Layers, widths and frame are the settings'. latency_correlation.png; returns the numbers.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    archs = [random_architecture(cfg, generator) for _ in range(cfg.correlation)]
    estimates = [table.network_ms(arch) for arch in archs]
    calls = {i: latency.prepare(FasterSeg(arch, 19), [(1, 3, *cfg.frame)], cfg.device)
             for i, arch in enumerate(archs)}
    measured = [t["median"] for t in latency.measure(calls, cfg.device).values()]
    r = statistics.correlation(estimates, measured)
    print(f"{len(archs)} random networks, {min(measured):.1f} to {max(measured):.1f} ms: Pearson "
          f"r = {r:.4f} (paper, Figure 3: 0.993)")
    common.draw_lines(Path(cfg.out) / "latency_correlation.png",
                      f"Table against measurement, r = {r:.4f}", "sum of pieces (ms)",
                      "measured (ms)", {"random network": list(zip(estimates, measured))},
                      dots=True)
    return {"pearson_r": r, "table_ms": estimates, "measured_ms": measured}


def export_network(cfg):
    """--export FILE: the folded network as a torch.export program for pictures of --frame."""
    classes = open_split(cfg, cfg.split).num_classes
    net = restore(cfg, cfg.weights or folder_of(cfg) / "best.pt", classes)
    common.export(net, cfg.frame, cfg.export)


# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------

STAGES = {"search": search, "train": train, "eval": evaluate_network, "bench": bench}


def check(cfg, stages):
    """Refuse early what cannot work; what relates two settings."""
    cfg.widths = tuple(sorted(cfg.widths))                  # everything counts on the order
    if len(set(cfg.widths)) < len(cfg.widths) or cfg.stem_chi not in cfg.widths:
        raise InputError(f"--widths {cfg.widths} must differ, and contain --stem-chi "
                         f"{cfg.stem_chi}: a skip hands on the stem's width")
    if cfg.correlation and ("bench" not in stages or cfg.correlation < 3):
        raise InputError("--correlation needs --bench and 3 networks or more")
    if "search" in stages and "train" not in stages and ("eval" in stages or cfg.export):
        raise InputError("--search makes void what was trained before; --eval and --export need "
                         "--train with it")
    if cfg.compile and "search" in stages:
        raise InputError("--compile is for --train, --eval and --bench: the slices of the supernet "
                         "write their gradients themselves, which torch.compile cannot follow; run "
                         "--search alone without it")
    for stage, split in (("train", "val"), ("eval", cfg.split)):
        if stage in stages:                                 # missing? say so before hours of search
            open_split(cfg, split)
    # BN needs two values a channel: the coarsest map is a zoomed one at rate 32, 1/64.
    if "search" in stages:                                  # trainA and trainB, see search_loaders
        part = int((1 - cfg.held_out) / 2 * len(open_split(cfg, "train")))
        common.check_batch("search-batch", cfg.search_batch, part, cfg.search_size)
    if "train" in stages:
        pictures = len(open_split(cfg, "train"))
        common.check_batch("batch-size", cfg.batch_size, pictures, cfg.size)


def main(argv=None):
    stages, cfg = common.parse_args(Config, "fastersg", STAGES, QUICK, __doc__, argv)
    common.setup(cfg)
    check(cfg, stages)
    common.run_stages(STAGES, stages, cfg)
    if cfg.export:
        export_network(cfg)


if __name__ == "__main__":
    common.run_main(main)
