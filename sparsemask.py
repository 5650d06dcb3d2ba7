r"""SparseMask: learn which connections of a densely connected decoder to keep.

    Wu, Zhang, Huang: SparseMask: Differentiable Connectivity Learning for Dense Image Prediction.
    ICCV 2019. Section, equation, figure and table numbers below are the paper's.

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
    w_l^t              FullyDenseNet.w["D9"][j]            importance of the connection t -> D_l
    f_up               f_up                                bilinear up-sampling
    L_m, mu            L_m, .mean()                        Eq. (2)
    alpha_l, lambda    alpha_l, cfg.lam                    Eq. (5), Eq. (3)
    sigma              cfg.sigma                           pruning threshold, Section 3.3

    python sparsemask.py --search                69 seconds on two CPU cores, 1.1 GiB
    python sparsemask.py --train --eval          the found network, retrained
    python sparsemask.py --bench                 10 seconds: Table 1's decoders beside its counts
"""
import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import latency
from common import BaseConfig, InputError, autocast, evaluate, open_split, opt, place, rank
from data import IGNORE, torchvision

# ---------------------------------------------------------------------------------------------
# 1. Settings. Defaults are the paper's; the tag says where it says so.
# ---------------------------------------------------------------------------------------------

# --loss: what is added to the task loss. ours is Eq. (2), binary and sparse are its halves and task
# is neither (Table 1); l1 and maskconnect are what Figure 4 compares with.
TERMS = {
    "ours": ("binary", "sparse"),
    "binary": ("binary",),
    "sparse": ("sparse",),
    "task": (),
    "l1": ("l1",),
    "maskconnect": ()}
NETWORKS = ("found", "released", "unet", "sparseacn", "fdn", "random", "random_rule", "random_like",
            "fcn", "deeplabv3")


@dataclass
class Config(BaseConfig):
    # Sides of 32 k + 1 pixels: f_up puts the corners of a map on the corners of the larger one, but
    # cell j of E_9 is centred on pixel 32 j. Both are true only if the last cell is the last pixel.
    # PAPER 4.1 crops 513, without saying why. VGG16 has no such size: its 2x2 poolings centre cell
    # j of E_5 on pixel 32 j + 15.5.
    size: tuple[int, int] = opt((513, 513), "training crop, H W in pixels, each 32 k + 1 "
                                "(PAPER 4.1)", "search", low=32)
    # OFFICIAL-CODE draws scales in steps of 0.25; here uniformly. Edges: augmented as HED does it.
    scales: tuple[float, float] = opt((0.5, 2.0), "range of the random scale (PAPER 4.1); not of "
                                      "edges", "search", low=0.01, high=16)
    batch_size: int = opt(16, "images a step, over all processes (PAPER 4.1)", "search", low=2)
    search_epochs: int = opt(50, "epochs of the Fully Dense Network (PAPER 4.1)", "search", low=1)
    epochs: int = opt(50, "epochs of a pruned network or baseline (PAPER 4.1)", "train", low=1)
    task: str = opt("segmentation", "what is predicted (PAPER 5.3)", "search",
                    ("segmentation", "saliency", "edges"))
    dataset: str = opt("synthetic", "where images come from; each task has sets of its own",
                       "dense", sorted({*data.set_names("segmentation"),
                                        *data.set_names("saliency"), *data.set_names("edges")}))
    encoder: str = opt("mobilenet_v2", "classifier that becomes the encoder (PAPER 4.1, 5.1)",
                       "search", ("mobilenet_v2", "vgg16", "resnet50", "resnet101"))
    weights_encoder: str = opt("imagenet", "none, imagenet (downloaded) or a file", "search")
    # The 7 M of Table 2's ResNet-101 decoder take a width of 512, which the paper does not say.
    width: int = opt(64, "channels of every decoder stage (OFFICIAL-CODE)", "search", low=1)
    loss: str = opt("ours", "what drives w besides the task loss: ours = Eq. (2), its binary or "
                    "sparse half alone, task = nothing (Table 1); l1, maskconnect (Figure 4)",
                    "search", tuple(TERMS))
    lam: float = opt(0.01, "lambda of Eq. (3) (PAPER 4.1)", "search")
    warmup: int = opt(0, "first epochs of the search in which w rests at 1/2 (OURS; PAPER: none)",
                      "search")
    l1: float = opt(5e-3, "strength of --loss l1 (PAPER 4.2: 1e-3, 5e-3, 1e-2)", "search")
    k: int = opt(2, "inputs a stage of --loss maskconnect (PAPER 4.2: 2 to 5)", "search", low=1)
    bn: bool = opt(True, "BN on every connection, Eq. (4); --no-bn: 4.2's ablation", "search")
    sigma: float = opt(0.001, "connections with w below it are dropped (PAPER 4.1)", "search",
                       low=1e-9, high=0.999)
    simplify: bool = opt(False, "drop duplicate and subset stages too (OFFICIAL-CODE)", "search")
    lr_encoder: float = opt(0.005, "SGD, encoder (PAPER 4.1)", "search")
    lr_decoder: float = opt(0.05, "SGD, decoder (PAPER 4.1)", "search")
    lr_w: float = opt(0.0, "SGD, w; 0 = the decoder's (OFFICIAL-CODE)", "search")
    weight_decay: float = opt(4e-5, "of SGD (PAPER 4.1), on w too (OFFICIAL-CODE)", "search")
    network: str = opt("found", "what --train, --eval and --export work on: found is --arch; "
                       "random_like is random, of about the size of --arch", "train", NETWORKS)
    arch: str = opt("", "arch.json [<out>/arch.json]", "train")
    init: str = opt("", "checkpoint to start --train from: derived.pt of the search, or the "
                    "earlier step of 5.1", "train")
    # voc also has trainvoc and trainval (data.py).
    train_split: str = opt("", "split for --train [trainval of bsds500, else train: PAPER 5.3]",
                           "train")
    split: str = opt("", "split for --eval [test of msra_b, bsds500, else val: PAPER 5.3]", "eval")
    eval_scales: tuple[float, ...] = opt((1.0,), "scales for --eval, averaged (PAPER 5.1)",
                                         "eval", low=0.05, high=16)
    flip: bool = opt(False, "average over mirrored pictures in --eval (PAPER 5.1)", "eval")
    thresholds: int = opt(99, "thresholds of the edge scores, as in the benchmark", "eval", low=1)
    frame: tuple[int, int] = opt((512, 512), "picture H W of --bench and --export (PAPER Table 1)",
                                 low=32)


# Two hundred steps cannot make w binary at the paper's learning rate of w: the quick preset takes a
# larger one (OURS), with the paper's lambda. Its encoder is untrained, so do not read much into
# what it finds: seeds 0 and 1 kept 12 and 13 connections, 4 of them the same (by chance 1.7).
QUICK = dict(size=(65, 129), batch_size=8, epochs=8, search_epochs=4, weights_encoder="none",
             lr_w=2.0, lr_encoder=0.05, frame=(129, 257), scales=(0.75, 1.5), thresholds=19)

# ---------------------------------------------------------------------------------------------
# 2. Connectivities: {"D8": ("E9", "G"), ...}, a stage and its inputs, deepest stage first
# ---------------------------------------------------------------------------------------------

# A connectivity is all that a search finds and all that is transferred: a dict of names, plain data
# that arch.json holds as it is. It lists stages as they are computed, D_L .. D_1, and the inputs of
# a stage as T_l does, so that w, masks and files share one order.

# Strides of E_1 .. E_L, and their channels. PAPER 4.1 counts nine stages of MobileNet-V2 and Figure
# 6 five of the others; OFFICIAL-CODE says which: the first convolution, the seven groups of blocks
# of one width, the last convolution.
RESNET = ((2, 4, 8, 16, 32), (64, 256, 512, 1024, 2048))
ENCODERS = {
    "mobilenet_v2": ((2, 2, 4, 8, 16, 16, 32, 32, 32),
                     (32, 16, 24, 32, 64, 96, 160, 320, 1280)),
    "vgg16": ((2, 4, 8, 16, 32), (64, 128, 256, 512, 512)),
    "resnet50": RESNET,
    "resnet101": RESNET}


def level(name):
    """5 of "E5" or "D5"."""
    return int(name[1:])


def sources(l, L):
    """T_l of Eq. (1), 2 (L - l + 1) names: E_l .. E_L, G, D_L .. D_{l+1}."""
    encoder = [f"E{i}" for i in range(l, L + 1)]
    decoder = [f"D{i}" for i in range(L, l, -1)]
    return (*encoder, "G", *decoder)


def fully_dense(L):
    """Every connection of Eq. (1): L (L + 1) of them, so 2^{L (L + 1)} possible decoders."""
    return {f"D{l}": sources(l, L) for l in range(L, 0, -1)}


def unet(L):
    """Table 1's U-Net: D_l reads E_l and D_{l+1}; the deepest stage reads E_L only (no G), which
    gives the 0.16 M parameters that the paper prints."""
    decoder = {f"D{l}": (f"E{l}", f"D{l + 1}") for l in range(L, 0, -1)}
    return {**decoder, f"D{L}": (f"E{L}",)}


def sparse_acn(L):
    """Of T_l in the order above, what lies 1, 2, 4, 8, 16 places back from the newest.

    OURS: the only simple logarithmic pattern that gives Table 1's 0.72 M parameters.
    """
    return {stage: tuple(every[-back] for back in (16, 8, 4, 2, 1) if back <= len(every))
            for stage, every in fully_dense(L).items()}


# The release's, 15 connections. Figure 3 draws it without E8 -> D1; the 0.56 M need all 15.
RELEASED = {"D8": ("E9", "G"), "D7": ("E7", "G"), "D6": ("E6", "G"),
            "D1": ("E1", "E6", "E7", "E8", "E9", "G", "D8", "D7", "D6")}


def drop_useless(connectivity):
    """Rules (2) and (3) of Section 3.3: stages without input go, stages that nobody reads go.

    Until nothing changes, as a stage that goes may have been the only input or reader of another:
    of {D3: (), D2: (D3,), D1: (D2, E1)} first D3 goes, then D2, and D1 reads E1 alone. D_1 is read
    by the classifier. {} if nothing reaches D_1.
    """
    while True:
        read = {"D1"}.union(*connectivity.values())
        kept = {}
        for stage, inputs in connectivity.items():
            if inputs and stage in read:                                    # rules (2) and (3)
                # get: () for a stage that goes now, None for one that is not listed at all
                kept[stage] = tuple(t for t in inputs if t[0] != "D" or connectivity.get(t))
        if kept == connectivity:
            return kept
        connectivity = kept


def drop_repeated(connectivity, L):
    """The release's two passes after the paper's rules (OFFICIAL-CODE). D_1 always stays: it has no
    reader, and it reads whatever else is there, if by way of others.

    Duplicates: of stages with the same inputs the deepest survives, for the others' readers too
    (OURS: also those that merging makes; the release may miss them).
    Subsets: a deeper stage goes if a finer one has all of its inputs and all of its readers: with
    {D5: (E6,), D3: (E6, E3), D1: (D5, D3)} all that D5 reads reaches D1 through D3 too.
    """
    kept = {stage: set(inputs) for stage, inputs in connectivity.items()}
    pairs = list(itertools.combinations(kept, 2))

    def readers(stage):
        return {reader for reader, inputs in kept.items() if stage in inputs}

    def drop(stage, instead):
        for reader in readers(stage):
            kept[reader] = kept[reader] - {stage} | {instead}
        del kept[stage]

    for deep, fine in pairs:                                # from the deepest stages on
        if deep in kept and fine in kept and kept[deep] == kept[fine]:
            drop(fine, deep)
    for deep, fine in sorted(pairs, key=lambda pair: level(pair[1])):       # from D_2 on
        if deep in kept and fine in kept:
            if kept[deep] <= kept[fine] and readers(deep) <= readers(fine):     # <=: subset
                drop(deep, fine)                            # its readers read `fine` already
    return in_order(kept, L)


def in_order(connectivity, L):
    """The same connectivity with stages and inputs in the order of fully_dense(L)."""
    return {stage: tuple(t for t in every if t in connectivity[stage])
            for stage, every in fully_dense(L).items() if stage in connectivity}


def check_connectivity(value, L, where):
    """A connectivity read from outside, in the order used here; InputError says what is wrong."""
    known = fully_dense(L)
    rows = value.values() if isinstance(value, dict) else [None]
    if not all(isinstance(inputs, (list, tuple)) for inputs in rows):
        raise InputError(f"{where} is not a connectivity: stages with lists of their inputs, such "
                         'as {"D1": ["E1", "G"]}, are expected')
    for stage, inputs in value.items():
        # Finer inputs, unknown ones, and those that would close a cycle: none is in T_l.
        if stage not in known or any(t not in known[stage] for t in inputs):
            raise InputError(f"{where}: {stage} cannot read {inputs}; with this encoder D1 to D{L} "
                             "read E_i (i >= l), G and D_i (i > l)")
    connectivity = in_order(value, L)
    if drop_useless(connectivity) != connectivity or not connectivity:
        raise InputError(f"{where}: nothing reaches D1, or a stage has no inputs or no reader; "
                         "leave such stages out")
    return connectivity


def read_connectivity(path):
    """(encoder name, connectivity) of an arch.json."""
    value = common.read_json(path, "arch.json")
    if value.get("encoder") not in ENCODERS:
        raise InputError(f"{path} does not name its encoder ({', '.join(ENCODERS)}); run --search")
    L = len(ENCODERS[value["encoder"]][0])
    return value["encoder"], check_connectivity(value.get("connectivity"), L, path)


def matched_levels(old, new):
    """{l: the stage of the new encoder that stands for stage l of the old one}; old, new: strides.

    PAPER 5.1 matches by spatial size. OURS, as a size may have several stages in one encoder and
    fewer in the other: counted from the deepest of that size, the k-th goes to the k-th, or to the
    last there is. MobileNet-V2 to ResNet: 9, 8, 7 -> 5; 6, 5 -> 4; 4 -> 3; 3 -> 2; 2, 1 -> 1.
    """
    match = {}
    for stride in set(old) & set(new):
        here = [l for l, s in enumerate(old, 1) if s == stride]
        there = [l for l, s in enumerate(new, 1) if s == stride]
        for k, l in enumerate(reversed(here), 1):                           # deepest first
            match[l] = there[-min(k, len(there))]
    return match


def transfer(connectivity, old, new):
    """Section 5.1, Figure 6: the connectivity for another encoder; old, new: strides.

    "If a match fails, we simply drop the corresponding decoder stage"; OURS: one whose place is
    taken too, by D_1, which stays D_1 as the classifier reads it, or by a deeper one.
    """
    match, L, stages = matched_levels(old, new), len(new), {"D1": "D1"}
    for stage in connectivity:                                              # deepest first
        target = f"D{match.get(level(stage))}"
        if stage != "D1" and target in fully_dense(L) and target not in stages.values():
            stages[stage] = target
    renamed = {"G": "G", **stages, **{f"E{l}": f"E{m}" for l, m in match.items()}}
    # Inputs that get one name become one; None, an input without a match, is left out by in_order.
    moved = {stages[stage]: {renamed.get(t) for t in inputs}
             for stage, inputs in connectivity.items() if stage in stages}
    return drop_useless(in_order(moved, L))


def feature_channels(channels):
    """{E_l, G: channels} from the channels of E_1 .. E_L."""
    return {f"E{l}": c for l, c in enumerate(channels, 1)} | {"G": channels[-1]}


def link_params(connectivity, encoder, width):
    """Weights of the connections' 1x1 convolutions. They are nearly all of a decoder: the 1,280
    channels of E_9 and G make a connection from there cost as much as 20 between stages."""
    channels = feature_channels(ENCODERS[encoder][1])
    read = itertools.chain(*connectivity.values())
    return sum(width * channels.get(t, width) for t in read)


def random_connectivity(L, generator, rule=False, share=0.5):
    """A random subset of all connections, pruned by the rules of Section 3.3.

    rule: as in Section 4.2, all but the last decoder stage read a part of {E_l, G} only.
    share: the probability of a connection (OURS; PAPER 4.2 does not give it).
    """
    while True:
        subset = {}
        for stage, every in fully_dense(L).items():
            drawn = [t for t in every if torch.rand((), generator=generator) < share]
            if rule and stage != "D1":
                drawn = [t for t in drawn if t in ("G", "E" + stage[1:])]
            subset[stage] = tuple(drawn)
        if kept := drop_useless(subset):
            return kept


def random_like(connectivity, encoder, generator, width):
    """OURS: a random connectivity within a tenth of the size of this one.

    The fair control: a random half of all connections is larger than what a search finds.
    """
    L, wanted = len(ENCODERS[encoder][0]), link_params(connectivity, encoder, width)
    while True:
        share = 0.05 + 0.9 * float(torch.rand((), generator=generator))
        drawn = random_connectivity(L, generator, share=share)
        if abs(link_params(drawn, encoder, width) / wanted - 1) < 0.1:
            return drawn


def connectivity_of(cfg):
    """The connectivity that --network and --arch name, for cfg.encoder."""
    strides = ENCODERS[cfg.encoder][0]
    L, generator = len(strides), torch.Generator().manual_seed(cfg.seed)
    patterns = {"unet": unet, "sparseacn": sparse_acn, "fdn": fully_dense}
    if cfg.network in patterns:
        return patterns[cfg.network](L)
    if cfg.network in ("random", "random_rule"):                            # Figure 4
        return random_connectivity(L, generator, rule=cfg.network == "random_rule")
    path = cfg.arch or str(Path(cfg.out) / "arch.json")
    old, connectivity = ("mobilenet_v2", RELEASED) if cfg.network == "released" else (
        read_connectivity(path))
    if old != cfg.encoder:
        moved = transfer(connectivity, ENCODERS[old][0], strides)
        connectivity = check_connectivity(moved, L, f"{path}, moved from {old}")
    if cfg.network == "random_like":
        return random_like(connectivity, cfg.encoder, generator, cfg.width)
    return connectivity


# ---------------------------------------------------------------------------------------------
# 3. Networks: encoder (3.1.1), decoder (3.1.2), pruned network, baselines
# ---------------------------------------------------------------------------------------------


def f_up(x, size):
    """(B, C, h, w) -> (B, C, *size): bilinear, align_corners (OFFICIAL-CODE; Eq. (7) writes
    H_in / H_out in place of (H_in - 1) / (H_out - 1)), see Config.size.

    It is linear along each axis, f_up(x) = A x B^T. On a CPU, and where much is enlarged, forward
    and backward of this form take a half to a quarter of F.interpolate's: a sixth of a search step.
    """
    if x.shape[-2:] == size:                                # interpolate would copy it
        return x
    if x.device.type == "cpu" and torch.is_grad_enabled() and size[0] >= 4 * x.shape[-2]:
        A, B = (ramp(n, m, x) for n, m in zip(x.shape[-2:], size))          # (H, h), (W, w)
        with torch.autocast("cpu", enabled=False):
            return A @ (x @ B.T)
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def ramp(n, m, x):
    """(m, n), as x: row i weighs n equidistant samples at the i-th of m places, ends on ends."""
    return F.interpolate(torch.eye(n).to(x)[None], m, mode="linear", align_corners=True)[0].T


class Encoder(nn.Module):
    """A torchvision classifier without its head: images (B, 3, H, W) -> {"E1": .., "EL": .., "G"}.

    E_l is (B, channels[l - 1], H / strides[l - 1], W / ..), each halving rounded up, on VGG16 down;
    G (B, channels[-1], 1, 1), the global average of E_L. On MobileNet-V2, E_1 and E_9 are taken
    before their activation (OFFICIAL-CODE), which the decoder applies; so G is the mean of what
    ReLU6 has not yet seen, and the decoder takes ReLU6 of the mean (the paper's global pooling is
    the mean of ReLU6). A stage of VGG16 ends with its pooling, so that the five strides are those
    of Figure 6 (OURS).
    weights: as common.classifier.
    """

    def __init__(self, name, weights="none"):
        super().__init__()
        net = common.classifier(name, weights)
        if name == "mobilenet_v2":
            f = net.features
            # OFFICIAL-CODE's first block expands by a convolution of 1,088 parameters more;
            # torchvision's does not. Both are 2.22 M, what the paper prints.
            second = nn.Sequential(nn.ReLU6(), f[1])    # not in place: it would change E_1
            # Cut by hand, as slices of f[0] and f[18] would be built anew by their constructor.
            first, last = (nn.Sequential(f[i][0], f[i][1]) for i in (0, 18))
            groups = itertools.pairwise((2, 4, 7, 11, 14, 17, 18))
            stages = [first, second, *(f[a:b] for a, b in groups), last]
        elif name == "vgg16":
            cuts = itertools.pairwise((0, 5, 10, 17, 24, 31))
            stages = [net.features[a:b] for a, b in cuts]
        else:
            stages = [nn.Sequential(net.conv1, net.bn1, net.relu),
                      nn.Sequential(net.maxpool, net.layer1),
                      net.layer2, net.layer3, net.layer4]
        self.stages = nn.ModuleList(stages)
        self.name = name
        self.strides, self.channels = ENCODERS[name]
        self.act = nn.ReLU6() if name == "mobilenet_v2" else nn.ReLU()
        # forward runs the stages 1 .. last; G needs all. The others stay, as the paper counts them.
        self.last = len(stages)

    def forward(self, images):
        features, x = {}, images                        # (B, 3, H, W)
        for l, stage in enumerate(self.stages[:self.last], 1):
            x = features[f"E{l}"] = stage(x)            # (B, C_l, H / stride_l, W / stride_l)
        if self.last == len(self.stages):
            features["G"] = x.mean((2, 3), keepdim=True)                    # (B, C_L, 1, 1)
        return features


def scale_and_shift(norm, part=slice(None)):
    """The a, b (channels,) of a BN in eval mode, bn(z) = a z + b, for some of its channels."""
    a = norm.weight[part] / (norm.running_var[part] + norm.eps).sqrt()
    return a, norm.bias[part] - norm.running_mean[part] * a


class Decoder(nn.Module):
    """Eqs. (1) and (4) for any connectivity: {"E1": .., "G": ..} -> act(D_1) (B, width, H_1, W_1)

        D_l = bn_l( sum_{t in T_l} w_l^t f_up(bn_l^t(conv_l^t(act(t)))) )

    While searching with w in forward and link_norm, bn_l^t; pruned, both are gone. OFFICIAL-CODE,
    where the paper is silent: conv_l^t is 1x1 without bias, every input passes `act` first (on
    MobileNet-V2 the ReLU6 that its linear bottlenecks do not have), and bn_l, one a stage, follows
    the sum and stays after pruning.

    The sum over t and the convolution before f_up are what the paper's theorems make of one 1x1
    convolution over all inputs, up-sampled and concatenated. As written, one connection at a time,
    a search step on MobileNet-V2 makes 90 convolutions and keeps 90 maps of their readers' sizes;
    the test compares with that form. Here one convolution serves all readers of a feature, and
    maps of one size are summed before f_up, which may change places with a sum as it is linear.
    """

    def __init__(self, connectivity, channels, act, width=64, link_norm=None):
        """channels: dict name of an encoder feature -> channels. link_norm: nn.BatchNorm2d, or
        nn.Identity for the ablation without it; None for the pruned form."""
        super().__init__()
        self.connectivity, self.act, self.width = connectivity, act, width
        self.readers = {}                               # feature t -> the stages that read it
        for stage, inputs in connectivity.items():
            for t in inputs:
                self.readers.setdefault(t, []).append(stage)
        channels = {**channels, **dict.fromkeys(connectivity, width)}
        # Theorem 1: a convolution of concatenated features is a sum of one convolution each.
        # Theorem 2: 1x1 convolution and up-sampling commute, so conv_l^t runs at the size of t,
        # whoever reads it: one convolution for all readers of t, their outputs side by side.
        self.conv = nn.ModuleDict({
            t: nn.Conv2d(channels[t], width * len(readers), 1, bias=False)
            for t, readers in self.readers.items()})
        self.link_norm = nn.ModuleDict()                # empty in the pruned form
        if link_norm:
            for t, conv in self.conv.items():
                self.link_norm[t] = link_norm(conv.out_channels)
        self.norm = nn.ModuleDict({stage: nn.BatchNorm2d(width) for stage in connectivity})

    def slot(self, stage, t):
        """Which output channels of conv[t] are conv_l^t."""
        first = self.width * self.readers[t].index(stage)
        return slice(first, first + self.width)

    def links(self, t, x, w):
        """w_l^t bn_l^t(conv_l^t(act(t))) for every reader l of t: {stage: (B, width, H_t, W_t)}.
        x: the feature t."""
        readers = self.readers[t]
        z = self.conv[t](self.act(x))                   # (B, width * readers, H_t, W_t)
        if w is not None:
            w_t = [w[l][self.connectivity[l].index(t)] for l in readers]
            # `width` channels a reader; bn_l^t of all readers are one BN, as BN is per channel.
            w_of_channel = torch.stack(w_t).repeat_interleave(self.width)[:, None, None]
            z = w_of_channel * self.link_norm[t](z)     # Eq. (4): w_l^t bn_l^t(conv_l^t(act(t)))
        return dict(zip(readers, z.split(self.width, 1)))

    def forward(self, features, w=None):
        """w: {stage l: (|T_l|,)}, or None for the pruned form, in which w and bn_l^t are gone.

        features[t] is asked for all its links at once, when its first reader comes. The shares are
        views of one map; its memory can be freed when the last reader has taken its own.
        """
        features, links = dict(features), {}
        for stage, inputs in self.connectivity.items():                     # D_L .. D_1
            sums = {}                                   # (h, w) -> what has this size, summed
            for t in inputs:
                if t not in links:
                    links[t] = self.links(t, features[t], w)
                z = links[t].pop(stage)                 # (B, width, H_t, W_t), its own share
                in_size = z.shape[-2:]
                sums[in_size] = sums[in_size] + z if in_size in sums else z
            # f_up is linear and comes last here: what has one size is up-sampled once.
            out_size = features[f"E{level(stage)}"].shape[-2:]
            total = sum(f_up(z, out_size) for z in sums.values())           # (B, width, H_l, W_l)
            # While w is learnt, bn_l takes out what a stage's w have in common: D_l is the same for
            # w_l and w_l / 2, but for BN's eps. The task loss sees their ratios only.
            features[stage] = self.norm[stage](total)
        # OFFICIAL-CODE: the classifier reads act(D_1); conv_1^t, bn_1 and it were one affine map.
        return self.act(features["D1"])


class SparseMaskNet(nn.Module):
    """The pruned network of a connectivity: images (B, 3, H, W) -> logits (B, num_classes, H, W).

    connectivity: {"D8": ("E9", "G"), ...}; InputError if it does not fit the encoder, an Encoder.
    """

    def __init__(self, connectivity, encoder, num_classes=21, width=64):
        super().__init__()
        L = len(encoder.channels)
        connectivity = check_connectivity(connectivity, L, "connectivity")
        read = set().union(*connectivity.values())
        # Without G the encoder stops at the deepest E_l that is read. Whatever feeds D_l comes from
        # an E_i, i >= l, so E_l, which gives D_l its size in Decoder.forward, is still computed.
        if "G" not in read:
            encoder.last = max(level(t) for t in read if t[0] == "E")
        self.encoder = encoder
        self.decoder = Decoder(connectivity, feature_channels(encoder.channels), encoder.act,
                               width)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        d1 = self.decoder(self.encoder(images))         # (B, width, H/2, W/2)
        return f_up(self.classifier(d1), images.shape[-2:])                 # (B, K, H, W)

    def fold_norms(self):
        """Eval mode: every stage's BN goes into its convolutions, the shift into the first one.

        common.fold_bn calls it: sum_t conv_l^t(t) comes between conv and BN, so the general rule,
        which folds a BN into the convolution before it, does not see that they belong together.
        """
        decoder = self.decoder
        for stage, inputs in decoder.connectivity.items():
            a, b = scale_and_shift(decoder.norm[stage])
            for t in inputs:
                conv, slot = decoder.conv[t], decoder.slot(stage, t)
                conv.weight.data[slot] *= a[:, None, None, None]
                if conv.bias is None:
                    conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
                if t == inputs[0]:
                    conv.bias.data[slot] = b
            decoder.norm[stage] = nn.Identity()


class Padded(nn.Module):
    """A network for pictures of any size: images (B, 3, H, W) -> logits (B, K, H, W).

    OURS: rows and columns of zeros, the mean colour, make the sides 32 k + 1 as in training, and
    are cut off again. E_9 of a picture of 144 rows has 5 cells, on rows 0 to 128; align_corners
    would draw the last one on row 143. A network that has learnt where cells lie loses 9 mIoU by
    that (CamVid, docs/results.md).
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        # A new Module is in training mode. evaluate() puts back the mode of what it is given, so
        # this one takes that of net, or evaluating would leave net in training mode.
        self.train(net.training)

    def forward(self, images):
        h, w = images.shape[-2:]
        below, right = -(h - 1) % 32, -(w - 1) % 32         # what is missing to the next 32 k + 1
        logits = self.net(F.pad(images, (0, right, 0, below)))
        return logits[..., :h, :w]                          # (B, K, H, W)


class FCN(nn.Module):
    """The baseline of Table 1: one 1x1 convolution on E_L, up-sampled."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Conv2d(encoder.channels[-1], num_classes, 1)

    def forward(self, images):
        deepest = self.encoder(images)[f"E{self.encoder.last}"]             # (B, C_L, H/32, W/32)
        logits = self.classifier(self.encoder.act(deepest))
        return f_up(logits, images.shape[-2:])                              # (B, K, H, W)


class DeepLabV3(nn.Module):
    """The baseline of Table 1 at output stride 16: ASPP of 1x1, three 3x3 and pooling, a 3x3.

    OURS: the paper's 0.67 M parameters do not identify it. On MobileNet-V2 the ASPP reads E_8 (320
    channels, before the expansion to 1280), through the ReLU6 that a linear bottleneck lacks, as
    every decoder here does.
    """

    def __init__(self, encoder, num_classes, width):
        super().__init__()
        self.encoder = encoder
        self.source = "E8" if encoder.name == "mobilenet_v2" else "E5"
        encoder.last = level(self.source)
        undo_last_stride(encoder)
        self.aspp = torchvision.models.segmentation.deeplabv3.ASPP(
            feature_channels(encoder.channels)[self.source], [6, 12, 18], width)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images):
        x = self.encoder.act(self.encoder(images)[self.source])             # (B, 320, H/16, W/16)
        logits = self.classifier(self.head(self.aspp(x)))                   # (B, K, H/16, W/16)
        return f_up(logits, images.shape[-2:])                              # (B, K, H, W)


def undo_last_stride(encoder):
    """The halving to 1/32 is left out, and the 3x3 convolutions behind it look twice as far."""
    undone = False
    first = encoder.strides.index(32)                       # the first of the stages at 1/32
    for module in encoder.stages[first:].modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride, undone = (1, 1), True
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and undone:
            module.dilation = module.padding = (2, 2)
        elif isinstance(module, nn.MaxPool2d):              # VGG16: nothing comes behind it
            module.kernel_size, module.stride, module.padding = 3, 1, 1

# ---------------------------------------------------------------------------------------------
# 4. Relaxation (3.2): the Fully Dense Network, whose connections have weights w
# ---------------------------------------------------------------------------------------------


class FullyDenseNet(nn.Module):
    """The search space, Figures 1a and 7: an Encoder, the fully dense decoder with w, a classifier.

    images (B, 3, H, W) -> logits (B, num_classes, H, W).
    w: {stage: (|T_l|,)} in [0, 1], in the order of T_l: how much of a connection there is, between
    none and all. "Relax w to be a continuous number between 0 and 1" (3.2) is all there is to it;
    that w says anything about importance is due to bn_l^t, without which a convolution could undo
    a small w with large weights. (OFFICIAL-CODE, not offered here: noisy w in [0, 2], halved for
    the loss and for pruning.)
    k: MaskConnect's number of inputs, 0 for the paper's method.
    """

    def __init__(self, encoder, num_classes=21, width=64, bn=True, k=0):
        super().__init__()
        self.encoder, self.k = encoder, k
        connectivity = fully_dense(len(encoder.channels))
        self.decoder = Decoder(connectivity, feature_channels(encoder.channels), encoder.act,
                               width, nn.BatchNorm2d if bn else nn.Identity)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        # OFFICIAL-CODE: w starts in the middle of its range (there 1 of [0, 2]). At 1/2 the binary
        # part of Eq. (2) has no gradient, and the sparse part pushes all w of a stage down alike
        # (in D_L and D_{L-1}, where alpha is 1/2, not at all): the task loss takes sides.
        self.w = nn.ParameterDict({stage: nn.Parameter(torch.full((len(inputs),), 0.5))
                                   for stage, inputs in connectivity.items()})
        # OFFICIAL-CODE: BN's gamma and beta are fixed while searching, or they would do w's work
        # of scaling a connection; at (1, 0) in the decoder, as pre-trained in the encoder.
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)

    def forward(self, images):
        d1 = self.decoder(self.encoder(images), self.used_w())              # (B, width, H/2, W/2)
        return f_up(self.classifier(d1), images.shape[-2:])                 # (B, K, H, W)

    def used_w(self):
        """{stage l: (|T_l|,)} what Eq. (4) multiplies with: w, or k ones a stage (MaskConnect)."""
        if not self.k:
            return dict(self.w)
        return {stage: k_inputs(w, self.k, self.training) for stage, w in self.w.items()}

    @torch.no_grad()
    def clamp(self):
        """After an optimizer step: w back into [0, 1]. OFFICIAL-CODE; PAPER 3.2 says "between 0 and
        1" and not how."""
        for w in self.w.values():
            w.clamp_(0, 1)

    def connection_weights(self):
        """{stage: {t: w}} as numbers, for pruning, pictures and arch.json."""
        return {stage: dict(zip(inputs, self.w[stage].tolist()))
                for stage, inputs in self.decoder.connectivity.items()}


def k_inputs(w, k, training):
    """MaskConnect: (n,) w -> (n,) with k ones; the gradient goes on to the real w.

    In training the k are drawn with probabilities w / sum(w); OURS: the small number lets k be
    drawn where fewer w are above 0. Evaluation takes the k largest, as the pruning will; of equal
    ones, and w are often clamped to 0, the first.
    """
    k = min(k, len(w))
    chosen = (torch.multinomial(w + 1e-6, k) if training
              else w.argsort(descending=True, stable=True)[:k])
    ones = torch.zeros_like(w).index_fill(0, chosen, 1.0)
    return ones + (w - w.detach())              # straight through: value of `ones`, gradient of w

# ---------------------------------------------------------------------------------------------
# 5. Losses: the pieces of Eq. (2), the task losses
# ---------------------------------------------------------------------------------------------


def L_m(p, q):
    """L_m(p, q) of Eq. (2), element by element; 1e-10 as in the release, log(0) being infinite.

    L_m(w, w) is largest at 1/2: its gradient log((1 - w) / w) pushes w to the nearer of 0 and 1.
    L_m(alpha, mean) is least at mean = alpha.
    """
    return -p * (q + 1e-10).log() - (1 - p) * (1 - q + 1e-10).log()


def task_loss(logits, labels, task="segmentation"):
    """L_task: pixel-wise cross-entropy (4.1); OURS for saliency too, with two classes.

    logits (B, K, H, W), labels (B, H, W). Edges: balanced between the classes as HED does it, so
    that both count the same however rare edges are. OURS: the mean over edge pixels and the mean
    over the others, half each, over the batch; HED's sum over pixels would need learning rates of
    its own.
    """
    if task != "edges":
        return common.cross_entropy(logits, labels)
    other, edge = (torch.where(labels == k, labels, IGNORE) for k in (0, 1))
    return (common.cross_entropy(logits, other) + common.cross_entropy(logits, edge)) / 2


# ---------------------------------------------------------------------------------------------
# 6. Search: the algorithm on one page (Figure 1)
# ---------------------------------------------------------------------------------------------


def search_connectivity(net, loader, run, cfg, score):
    """Search, prune, inherit: a FullyDenseNet (Figure 1a) -> (connectivity, pruned network).

    run: a common.Run with the parts `optimizer` and `schedule`. score(network) -> mIoU.
    """
    sgd, schedule = run.parts["optimizer"], run.parts["schedule"]
    forward = common.training_form(net.train(), cfg)
    for epoch in run.epochs():
        for w_l in net.w.values():                      # OURS: w rests in the first --warmup epochs
            w_l.requires_grad_(epoch >= cfg.warmup)

        for images, labels in run.batches(loader):                          # Figure 1b
            with autocast(cfg):
                logits = forward(images)                # (B, K, H, W)

            # Eq. (2): L_s(w_l, alpha_l) = mu(L_m(w_l, w_l)) + L_m(alpha_l, mu(w_l)). The first half
            # makes w binary, the second pulls its mean to alpha_l. Summed over l, as in Eq. (3).
            parts = {"binary": 0, "sparse": 0, "l1": 0}
            for w_l in net.w.values():                  # (|T_l|,), l = L .. 1
                alpha_l = min(2 / len(w_l), 0.5)        # Eq. (5): two inputs a stage, in D_L one
                parts["binary"] += L_m(w_l, w_l).mean()
                parts["sparse"] += L_m(alpha_l, w_l.mean())
                # OURS: the L1 term is a sum over all w; the paper gives its strength only. w is
                # never below 0; abs is for its gradient at 0, which is 0: no push on a clamped w.
                parts["l1"] += w_l.abs().sum()                              # 4.2

            # Eq. (3): L = L_task + lambda sum_l L_s(w_l, alpha_l), one step of SGD for the weights
            # of the network and w together, on one batch (DARTS takes two data splits in turn).
            # Ablations leave out a half, or take another term.
            strength = cfg.l1 if cfg.loss == "l1" else cfg.lam
            terms = {name: strength * parts[name] for name in TERMS[cfg.loss]}
            run.descend(sgd, task=task_loss(logits, labels, cfg.task), **terms)
            net.clamp()                                 # w back into [0, 1]
            schedule.step()
        run.end_epoch(miou=score(net), w=net.connection_weights())  # no best.pt: the last w count

    connectivity = prune(net.connection_weights(), cfg)                     # Figure 1c, 3.3
    return connectivity, inherit(net.eval(), connectivity)

# ---------------------------------------------------------------------------------------------
# 7. Prune (3.3), and the network that is left
#
#   w of the supernet   {"D2": {"E2": 0.9, "E3": 0, "G": 0, "D3": 1}, ...}     connection_weights()
#     rule (1)          {"D2": ("E2", "D3"), ...}                              kept_inputs()
#     rules (2), (3)    stages without input or reader go, in section 2        drop_useless()
#     --simplify        duplicate and subset stages too (OFFICIAL-CODE)        drop_repeated()
#   connectivity        what arch.json holds, and --train reads                prune()
#     folding           w and bn_l^t go into the 1x1 convolutions              inherit()
#   pruned network      derived.pt, from which --train can start (--init)
#
# A rule of the paper never drops a stage by a number of its own: it goes because all of its inputs
# went, or all of its readers. That is how nine stages become few. Only --simplify compares stages.
# ---------------------------------------------------------------------------------------------


def kept_inputs(w, cfg):
    """Rule (1) of Section 3.3: {stage: {t: w}} -> {stage: the t with w >= sigma}.

    MaskConnect's are the k largest of a stage.
    """
    kept = {}
    for stage, row in w.items():
        if cfg.loss == "maskconnect":                   # the k largest; of equal ones the first
            chosen = sorted(row, key=row.get, reverse=True)[:cfg.k]
        else:
            chosen = [t for t in row if row[t] >= cfg.sigma]
        kept[stage] = tuple(t for t in row if t in chosen)              # in the order of T_l again
    return kept


def prune(w, cfg):
    """Section 3.3: {stage: {t: w in [0, 1]}} -> connectivity. InputError if nothing is left."""
    connectivity = drop_useless(kept_inputs(w, cfg))                        # rules (1), (2), (3)
    if not connectivity:
        raise InputError("nothing reaches D1 by the rules of 3.3, so there is nothing to classify; "
                         "search with a smaller --lam, --l1 or --sigma")
    return drop_repeated(connectivity, len(w)) if cfg.simplify else connectivity


@torch.no_grad()
def inherit(net, connectivity):
    """The pruned network with the supernet's weights: w and bn_l^t folded into the convolutions.

    In eval mode w bn(z) = w (a z + b) with numbers a, b a channel, so

        D_l = bn_l( sum_t f_up((w a conv)(act(t))) + sum_t w b ).

    w a scales the convolution. w b is a constant map, which up-sampling leaves alone; bn_l takes
    its running mean m off, and (x + w b) - m = x - (m - w b): so m becomes m - w b.

    Lost are the connections of w < sigma. Where they are 0, as the clamp makes them, that costs
    nothing; but a stage that goes because all of its inputs went was not silent: bn_l enlarges a
    sum of tiny w again, and makes -m / sqrt(v + eps) of a sum of 0 until its running mean m has
    come down to 0. Otherwise the derived mIoU is the supernet's, and training need not start from
    the encoder alone, as in the paper, but can start here (--init derived.pt). --simplify
    loses more: stages whose w are not small, and whose readers get another stage's features, by a w
    of their own, which may be 0.
    """
    pruned = SparseMaskNet(connectivity, copy.deepcopy(net.encoder), net.classifier.out_channels,
                           net.decoder.width)
    pruned.to(net.classifier.weight)                        # its device and dtype
    pruned.classifier.load_state_dict(net.classifier.state_dict())
    old, new, used = net.decoder, pruned.decoder, net.used_w()
    for stage, inputs in connectivity.items():
        new.norm[stage].load_state_dict(old.norm[stage].state_dict())
        for t in inputs:
            w = used[stage][old.connectivity[stage].index(t)]
            slot = old.slot(stage, t)
            weight = w * old.conv[t].weight[slot]                           # (width, C_t, 1, 1)
            if isinstance(old.link_norm[t], nn.BatchNorm2d):                # not with --no-bn
                a, b = scale_and_shift(old.link_norm[t], slot)              # (width,) each
                new.norm[stage].running_mean -= w * b
                weight = a[:, None, None, None] * weight
            new.conv[t].weight[new.slot(stage, t)] = weight
    return pruned.eval()


def search(cfg):
    """Train the Fully Dense Network, prune it; writes arch.json and derived.pt."""
    images, loader = open_data(cfg, "train", train=True)
    encoder = Encoder(cfg.encoder, cfg.weights_encoder)
    k = cfg.k if cfg.loss == "maskconnect" else 0
    net = place(FullyDenseNet(encoder, images.num_classes, cfg.width, cfg.bn, k), cfg)
    sgd, schedule = poly_sgd(net, cfg, cfg.search_epochs * len(loader))
    run = common.Run("search", "search", cfg, cfg.out, cfg.search_epochs,
                     stale=("arch.json", "derived.pt"), model=net, optimizer=sgd, schedule=schedule)
    score = common.scorer(cfg, cfg.task, Padded)
    connectivity, derived = search_connectivity(net, loader, run, cfg, score)
    w = net.connection_weights()
    miou = {"supernet": score(net), "derived": score(derived)}
    common.write_json(Path(cfg.out) / "arch.json",
                      {"encoder": cfg.encoder, "connectivity": connectivity, "w": w})
    run.save("derived.pt", model=derived.state_dict(),
             settings={**run.settings, "arch": connectivity})
    report_search(cfg, w, connectivity, derived, miou)
    draw_search(cfg, w, connectivity)
    print(f"in {cfg.out}: arch.json, derived.pt, connectivity.png, weights.png\n"
          + common.next_command(cfg, "sparsemask", "--train --eval --bench"))
    common.barrier()


def decisions(w, cfg):
    """How clearly rule (1) has decided: dict of numbers. w: {stage: {t: w in [0, 1]}}.

    PAPER 4.2: the largest dropped w was 200 times smaller than the smallest kept (1.3e-4, 2.7e-2),
    with L1 2.6 times. Here dropped ones are often exactly 0, by the clamp, so both are told.
    """
    kept, dropped = [], []
    inputs = kept_inputs(w, cfg)
    for stage, row in w.items():
        for t, value in row.items():
            (kept if t in inputs[stage] else dropped).append(value)
    undecided = sum(0.1 < value < 0.9 for value in kept + dropped)
    return {"kept": len(kept), "undecided": undecided,
            "smallest_kept_w": min(kept, default=None),
            "largest_dropped_w": max(dropped, default=None)}


def report_search(cfg, w, connectivity, derived, miou):
    """Print and log what was found, and how clearly.

    Three numbers called mIoU: of the supernet; derived, of the pruned network with its weights;
    retrained, of the pruned network trained anew, the one that the paper reports.
    """
    told = decisions(w, cfg)
    links = sum(map(len, connectivity.values()))
    total = sum(map(len, w.values()))
    common.log_record(cfg.out, stage="found", links=links, **told, **miou)
    print("\n".join(f"  {stage} <- {', '.join(inputs)}" for stage, inputs in connectivity.items()))
    print(f"{links} of {total} connections, {len(connectivity)} of {len(w)} decoder stages, "
          f"{decoder_params(derived):,} decoder parameters\nby rule (1): smallest w kept "
          f"{told['smallest_kept_w']}, largest dropped {told['largest_dropped_w']}; "
          f"{told['undecided']} lie between 0.1 and 0.9")
    if cfg.loss in ("ours", "binary") and told["undecided"] > total / 10:
        print("warning: w is not binary; search longer, or with a larger --lr-w")
    if len(connectivity) == 1:
        print("warning: only D1 is left, no other decoder stage was found worth its connections")
    print(f"mIoU on val: supernet {100 * miou['supernet']:.2f}, derived "
          f"{100 * miou['derived']:.2f}; the retrained one comes from --train")


def decoder_params(net):
    """Parameters that are not the encoder's, as the paper counts them."""
    return common.count_params(net) - common.count_params(net.encoder)


def draw_search(cfg, w, connectivity):
    """connectivity.png (Figure 3); weights.png, w after each epoch (its last column: Figure 5)."""
    draw_connectivity(Path(cfg.out) / "connectivity.png", connectivity, cfg.encoder,
                      f"{sum(map(len, connectivity.values()))} connections, loss {cfg.loss}")
    log, names, values = common.read_log(cfg.out, "search"), [], []
    for stage, row in w.items():
        for t in row:
            names.append(f"{t} to {stage}")
            values.append([record["w"][stage][t] for record in log])
    common.draw_heat_map(Path(cfg.out) / "weights.png", f"w after each epoch, loss {cfg.loss}",
                         names, range(1, len(log) + 1), values)


def draw_connectivity(path, connectivity, encoder, title):
    """As Figure 3: encoder on the left, decoder on the right, finest stage on top; what nobody
    reads any more is pale."""
    strides = ENCODERS[encoder][0]
    L = len(strides)
    image, pen, font = common.draw_canvas(title, 820, 60 + 46 * (L + 1))
    centre = {"G": (190, 60 + 46 * L)}
    for l, stride in enumerate(strides, 1):
        y = 14 + 46 * l
        centre[f"E{l}"], centre[f"D{l}"] = (190, y), (520, y)
        pen.text((146, y), f"1/{stride}", common.INK, font, "rm")
    colours = {"E": "#3c6ebe", "G": "#c8781e", "D": "#288c46"}
    for stage, inputs in connectivity.items():
        for t in inputs:
            (x0, y0), (x1, y1) = centre[t], centre[stage]
            if t[0] == "D":                             # an arc on the right, not through the boxes
                bulge = 45 + 23 * (level(t) - level(stage))
                pen.arc((x0 + 34 - bulge, y1, x0 + 34 + bulge, y0), -90, 90, colours["D"], 2)
            else:
                pen.line((x0 + 34, y0, x1 - 34, y1), colours[t[0]], 2)
    used = {"D1"}.union(*connectivity.values())
    for name, (x, y) in centre.items():
        colour = common.INK if name in used else common.FAINT
        pen.rounded_rectangle((x - 34, y - 14, x + 34, y + 14), 6, "white", colour, 2)
        pen.text((x, y), name, colour, font, "mm")
    common.save_png(image, path)

# ---------------------------------------------------------------------------------------------
# 8. Train the pruned network, or a baseline (3.3, 4.1, 5)
# ---------------------------------------------------------------------------------------------


def open_data(cfg, split, train=False):
    """(set, loader) of a split for cfg.task: to train augmented and in batches, else one by one."""
    transform = data.edge_transform(cfg.size) if train and cfg.task == "edges" else None
    images = open_split(cfg, split, cfg.task)
    return common.open_loader(cfg, split, train, images, transform)


def poly_sgd(net, cfg, steps):
    """The paper's protocol (4.1): SGD with poly, learning rates for encoder, decoder and w.

    The encoder knows something already, so its rate is a tenth of the decoder's. The rate of w
    decides how far w comes: lambda times the slope of the binary half, log((1 - w) / w) / |T_l|,
    is so small that at the paper's rates a w needs more than a thousand steps from 1/2 to 0.
    Also sets the momentum of the running BN statistics: 3e-4 (OFFICIAL-CODE), or 10 / steps
    where that is more (OURS: with 3e-4 a short run would never get away from the initial
    statistics). Returns (optimizer, schedule, one step a batch).
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = min(0.1, max(3e-4, 10 / steps))
    rates = {"encoder": cfg.lr_encoder, "w": cfg.lr_w or cfg.lr_decoder}
    groups = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            lr = rates.get(name.split(".")[0], cfg.lr_decoder)
            groups.append({"params": [parameter], "lr": lr})
    sgd = torch.optim.SGD(groups, momentum=0.9, weight_decay=cfg.weight_decay)      # PAPER 4.1
    return sgd, torch.optim.lr_scheduler.PolynomialLR(sgd, steps, 0.9)  # power: OFFICIAL-CODE


def decoder_of(cfg):
    """What --network names: a connectivity, or the name of a baseline that has none. A checkpoint
    stores it, so that it is not taken for another network's."""
    return cfg.network if cfg.network in ("fcn", "deeplabv3") else connectivity_of(cfg)


def build(cfg, classes, weights="none"):
    """The network that --network names."""
    encoder, decoder = Encoder(cfg.encoder, weights), decoder_of(cfg)
    if decoder == "fcn":
        return FCN(encoder, classes)
    if decoder == "deeplabv3":
        return DeepLabV3(encoder, classes, cfg.width)
    return SparseMaskNet(decoder, encoder, classes, cfg.width)


def folder_of(cfg):
    """Run folder of one trained network."""
    parts = [cfg.network, cfg.encoder, cfg.task]
    return Path(cfg.out) / "_".join(p for p in parts if p not in ("mobilenet_v2", "segmentation"))


def start_from(net, path):
    """--init: the weights of an earlier step; a classifier for other classes starts anew."""
    state = dict(common.load_checkpoint(path)["model"])
    for name, fresh in net.classifier.state_dict(prefix="classifier.").items():
        if name in state and len(state[name]) != len(fresh):
            state[name] = fresh
            print(f"{path} was trained for other classes: {name} starts anew")
    common.load_weights(net, state, path)


def checkpoint_of(cfg):
    """The best epoch; of edges the last (OURS: mIoU, which tells the best, says little there)."""
    return Path(cfg.weights or folder_of(cfg) / ("last.pt" if cfg.task == "edges" else "best.pt"))


def train(cfg):
    """Train --network from the pre-trained encoder, under L_task alone (3.3, 4.1).

    One function for what was found, transferred (5.1), named or random, and for baselines, so that
    all are trained alike. Section 5.1 trains in steps, each from the last one's weights: --init.
    The release's 73.18 mIoU takes a further step, 50 epochs on VOC's own 1,464 pictures at a tenth
    of the learning rates (--init, --train-split trainvoc), which the paper does not mention. With
    --train-split trainval the val pictures, whose mIoU chooses best.pt, have been trained on.
    """
    images, loader = open_data(cfg, cfg.train_split, train=True)
    torch.manual_seed(cfg.seed)
    net = build(cfg, images.num_classes, "none" if cfg.init else cfg.weights_encoder)
    if cfg.init:
        start_from(net, cfg.init)
    net = place(net, cfg)
    sgd, schedule = poly_sgd(net, cfg, cfg.epochs * len(loader))
    run = common.Run(cfg.network, "train", cfg, folder_of(cfg), cfg.epochs,
                     about={"arch": decoder_of(cfg)}, model=net, optimizer=sgd, schedule=schedule)

    def loss_terms(forward, images, labels):
        return {"task": task_loss(forward(images), labels, cfg.task)}

    best = common.fit(run, loss_terms, loader, common.scorer(cfg, cfg.task, Padded))
    cfg.flags = cfg.flags.replace(f"--init {cfg.init}", "")     # it is for --train alone
    print(f"{cfg.network}: {decoder_params(net):,} decoder parameters, best retrained mIoU on "
          f"val {100 * best:.2f}, in {folder_of(cfg)}\n"
          + common.next_command(cfg, "sparsemask", "--eval --bench"))

# ---------------------------------------------------------------------------------------------
# 9. Evaluate and bench
# ---------------------------------------------------------------------------------------------


class SaliencyScores:
    """Largest F-beta and MAE, the measures of Table 5.

    update(map, mask) one picture at a time: map (H, W) in [0, 1], mask (H, W) bool or {0, 1}.
    Precision and recall are taken at the thresholds k / 255, k = 0 ... 255 (salient: S >= k / 255),
    averaged over pictures, and F = (1 + b) P R / (b P + R), b = beta^2 = 0.3, of the averages; its
    largest value counts. MAE = mean |S - G| of a picture, averaged over pictures.
    OURS, where the papers are silent: a map with no pixel above the threshold has precision 0; a
    picture whose mask is empty counts for MAE and the precision (0), not for the recall.
    """

    def __init__(self):
        # Over the pictures: sums of precision and of recall, each a row; of error, 1, has a mask.
        self.curves, self.counts = self.sums = np.zeros((2, 256)), np.zeros(3)

    def update(self, saliency, mask):
        saliency, mask = np.ravel(saliency), np.ravel(mask) > 0                 # (H W,)
        salient = saliency >= np.arange(256)[:, None] / 255                     # (256, H W)
        hits = (salient & mask).sum(1)
        self.curves[0] += hits / salient.sum(1).clip(1)
        self.curves[1] += hits / mask.sum().clip(1)
        self.counts += np.abs(saliency - mask).mean(), 1, mask.any()

    def result(self):
        """-> {"F_beta", "MAE"}, floats in [0, 1]."""
        error, pictures, masks = self.counts
        precision, recall = self.curves[0] / pictures, self.curves[1] / max(masks, 1)
        f = 1.3 * precision * recall / np.maximum(0.3 * precision + recall, 1e-12)
        return {"F_beta": float(f.max()), "MAE": float(error / pictures)}


def restore(cfg, classes):
    """The trained network, Padded, in eval mode; InputError if the checkpoint is another's."""
    path = checkpoint_of(cfg)
    state, arch = common.load_checkpoint(path, ("model", "settings")), decoder_of(cfg)
    common.require_same(state["settings"], {"encoder": cfg.encoder, "arch": arch}, path)
    net = build(cfg, classes)
    common.load_weights(net, state["model"], path)
    return place(Padded(net.eval()), cfg)


def evaluate_network(cfg):
    """mIoU of a trained network, or the scores of Tables 5 and 6, and pictures."""
    images, loader = open_data(cfg, cfg.split)
    net, folder = restore(cfg, images.num_classes), folder_of(cfg)
    forward = torch.compile(net) if cfg.compile else net
    if cfg.task == "segmentation":
        matrix = evaluate(forward, loader, images.num_classes, cfg, cfg.eval_scales, cfg.flip)
        kind = "derived" if Path(cfg.weights).name == "derived.pt" else "retrained"
        common.report_segmentation(cfg.network, kind, matrix, images, cfg, folder)
    else:
        scores = map_scores(cfg, forward, images, loader)
        common.log_record(folder, stage="eval", split=cfg.split, **scores)
        told = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"{cfg.network} on {cfg.split}, {len(images)} pictures: {told}")
    common.draw_segmentations(net, images, cfg, folder)


@torch.no_grad()
def map_scores(cfg, net, images, loader):
    """Saliency: F_beta, MAE. Edges: ODS, OIS, AP, R50 after non-maximum suppression (5.3)."""
    scores = SaliencyScores() if cfg.task == "saliency" else data.EdgeScores(cfg.thresholds)
    pictures = [i for _, i in loader.sampler]           # (epoch, picture) of this rank, in order
    for i, (pixels, labels) in zip(pictures, loader):
        with autocast(cfg):
            p = common.probabilities(net, pixels.to(cfg.device), labels.shape[-2:], cfg.eval_scales,
                                     cfg.flip)                              # (1, 2, H, W)
        likely = p[0, 1].double().cpu().numpy()                             # (H, W) in [0, 1]
        if cfg.task == "edges":
            scores.update(data.edge_nms(likely), images.annotations(i))
        else:
            scores.update(likely, labels[0])
    for array in scores.sums:                   # through the device: nccl needs a GPU's memory
        array[:] = common.sum_over_ranks(torch.tensor(array, device=cfg.device)).cpu()
    return scores.result()


# Table 1: decoder parameters in M, FPS at 512x512 on a Titan Xp, mIoU on VOC val. (Its two ablation
# rows, 1.92 M for the sparse half alone and 0.89 M for the binary one, are found, not published.)
PAPER = {
    "fcn": (0.03, 156, 63.80),
    "deeplabv3": (0.67, 50, 72.51),
    "unet": (0.16, 97, 64.72),
    "sparseacn": (0.72, 74, 72.23),
    "fdn": (1.93, 37, 72.72),
    "released": (0.56, 98, 73.18)}


def bench(cfg):
    """Parameters, conv MACs and latency (BN folded) beside Table 1; writes bench.json.

    Always with 21 classes, as in Table 1, and at --frame, where --eval pads to 32 k + 1. Fewer
    parameters are not fewer MACs, which depend on the size of what a stage reads, and fewer MACs
    are not less time: up-sampling is in no MACs.
    """
    if rank() > 0:
        return
    names = dict.fromkeys([cfg.network, *PAPER])
    if not cfg.arch and not (Path(cfg.out) / "arch.json").exists():
        names.pop("found", None)
    nets = {name: build(replace(cfg, network=name), 21).eval() for name in names}
    about, rows = latency.compare(nets, cfg.frame, cfg)
    print("21 classes    decoder params  conv MACs | paper, MobileNet-V2: M params, FPS at 512x512 "
          "on a Titan Xp, mIoU on VOC")
    for name, net in nets.items():
        params = decoder_params(net)
        macs = rows[name]["conv_macs"] - common.count_macs(net.encoder, cfg.frame)
        rows[name] |= {"decoder_params": params, "decoder_macs": macs}
        print(f"{name:12s} {params:15,d} {macs / 1e9:8.3f} G | {PAPER.get(name, '')}")
    latency.write_bench(cfg, about, rows)

# ---------------------------------------------------------------------------------------------
# 10. main
# ---------------------------------------------------------------------------------------------

STAGES = {"search": search, "train": train, "eval": evaluate_network, "bench": bench}


def check(cfg, stages):
    """Refuse early what cannot work together, data sets that are missing, batches that do not fit.
    """
    if cfg.task == "edges" and cfg.image_scale != 1:
        raise InputError("--image-scale does not go with --task edges: an edge map has no other "
                         "resolution than its picture")
    if cfg.arch and cfg.network not in ("found", "random_like"):
        raise InputError("--arch is for --network found and random_like; leave it out")
    if cfg.init and "train" not in stages:
        raise InputError("--init is where --train starts; add --train, or leave it out")
    if "search" in stages and cfg.warmup >= cfg.search_epochs:
        raise InputError(f"--warmup {cfg.warmup} leaves no epoch of {cfg.search_epochs} to decide")
    if (stages & {"search", "train"} and cfg.encoder != "vgg16"
            and any(side % 32 != 1 for side in cfg.size)):
        print(f"note: --size {cfg.size[0]} {cfg.size[1]} is not 32 k + 1: coarse features lie up "
              "to a cell, 32 pixels, from where they do in --eval, which pads pictures to 32 k + 1")
    for stage, split in (("search", "train"), ("train", cfg.train_split), ("eval", cfg.split)):
        if stage in stages:
            images = open_split(cfg, split, cfg.task)
            if stage != "eval":                             # BN sees one value a picture at G
                common.check_batch("batch-size", cfg.batch_size, len(images))


def main(argv=None):
    stages, cfg = common.parse_args(Config, "sparsemask", STAGES, QUICK, __doc__, argv)
    common.setup(cfg)
    cfg.train_split = cfg.train_split or ("trainval" if cfg.dataset == "bsds500" else "train")
    cfg.split = cfg.split or ("test" if cfg.dataset in ("msra_b", "bsds500") else "val")
    check(cfg, stages)
    common.run_stages(STAGES, stages, cfg)
    if cfg.export:
        classes = open_split(cfg, cfg.split, cfg.task).num_classes
        common.export(restore(cfg, classes), cfg.frame, cfg.export)


if __name__ == "__main__":
    common.run_main(main)
