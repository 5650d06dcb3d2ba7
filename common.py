"""Plumbing that no paper is about: settings and command line, devices and processes, run folder and
checkpoints, losses, mIoU, the train and evaluate loops, size accounting, pictures.

Everything here is called by the paper files, which import it; it imports only `data.py`. In the
order in which a run meets it:

    settings     opt, BaseConfig, parse_args, flags_of, run_main
    processes    setup, rank, world_size, average_gradients, average_buffers, barrier, synchronised,
                 wrapped, distribute, place, to_device
    run folder   write_text, write_config, log_record, read_log, save_checkpoint, load_checkpoint,
                 Progress, training_step, check_finite, clip_gradients
    networks     classifier, load_backbone, narrowed
    learning     cross_entropy, ohem, ConfusionMatrix, probabilities, evaluate, open_split,
                 open_loader, report_segmentation, draw_segmentations, fit
    accounting   count_params, count_macs, fold_bn, export
    pictures     overlay, comparison, line_chart, scatter_chart, stacked_chart, heat_map
"""
import argparse
import contextlib
import copy
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import data
from data import IGNORE, InputError

# ---------------------------------------------------------------------------------------------
# Settings: a dataclass is the documentation, the defaults and the command line
# ---------------------------------------------------------------------------------------------


def opt(default, help, choices=None):
    """A dataclass field with its help text: name, default and type become a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class BaseConfig:
    """What every paper file needs to be told; a paper's own Config adds its hyper-parameters."""
    out: str = opt("", "run folder [default: runs/<method>]")
    resume: bool = opt(False, "continue each stage from its last.pt")
    seed: int = opt(0, "seed of weights, samples and data order")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    amp: bool = opt(False, "bf16 autocast; on a CPU without bf16 instructions it is slower")
    compile: bool = opt(False, "torch.compile the networks that are trained, evaluated and timed")
    channels_last: bool = opt(False, "NHWC memory: for depth-wise convolutions and tensor cores")
    workers: int = opt(0, "loader processes; samples are the same for any number")
    dataset: str = opt("synthetic", "where images come from", data.SEGMENTATION_SETS)
    data_root: str = opt("", "folder of the data set (data.py shows the expected tree)")
    num_classes: int = opt(0, "classes of --dataset folder; other sets know theirs")
    size: tuple[int, int] = opt((512, 1024), "training crop, H W in pixels (OFFICIAL-CODE)")
    image_scale: float = opt(1.0, "pictures are resized by this first, to train and to evaluate")
    scales: tuple[float, float] = opt((0.75, 1.25), "range of the random scale, drawn uniformly "
                                      "(OURS; the release draws .75, 1 or 1.25)")
    batch_size: int = opt(12, "images a training step, over all processes "
                          "(OFFICIAL-CODE)")
    epochs: int = opt(600, "training epochs of one network (OFFICIAL-CODE: 600)")


def _add_flag(parser, f, hint):
    name = "--" + f.name.replace("_", "-")
    kind = {"help": f.metadata["help"] + f" [{f.default}]", "default": argparse.SUPPRESS}
    if hint is bool:
        kind["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is tuple:
        item, *rest = typing.get_args(hint)
        kind.update(type=item, nargs="+" if rest == [...] else len(rest) + 1, metavar="N")
    else:
        kind.update(type=hint, choices=f.metadata["choices"])
        if kind["choices"] is None:
            kind["metavar"] = f.name.upper()
    parser.add_argument(name, **kind)


def parse_args(config_class, method, stages, quick, description, argv=None):
    """Command line -> (set of chosen stages, config).

    The dataclass defaults are the paper's values; `quick` (dict name -> value) replaces them under
    --preset quick, which is the default on synthetic data; an explicit flag wins over both.
    `stages`: dict name -> help. Unknown flags and no stage at all end with exit code 2.
    """
    parser = argparse.ArgumentParser(
        prog=f"{method}.py", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for stage, text in stages.items():
        parser.add_argument(f"--{stage}", action="store_true", help=text)
    parser.add_argument("--preset", choices=("quick", "paper"), help="quick: minutes on a CPU, "
                        "default on synthetic data; paper: the paper's values")
    hints = typing.get_type_hints(config_class)
    for f in fields(config_class):
        _add_flag(parser, f, hints[f.name])
    given = vars(parser.parse_args(argv))
    chosen = {stage for stage in stages if given.pop(stage.replace("-", "_"))}
    if not chosen:
        parser.print_help()
        print(f"\nerror: choose a stage, for example: python {method}.py --{next(iter(stages))}",
              file=sys.stderr)
        sys.exit(2)
    preset = given.pop("preset") or (
        "quick" if given.get("dataset", "synthetic") == "synthetic" else "paper")
    values = {**(quick if preset == "quick" else {}), **given}
    cfg = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    cfg.out = cfg.out or f"runs/{method}"
    for name, value in vars(cfg).items():
        numbers = [v for v in (value if isinstance(value, tuple) else (value,))
                   if isinstance(v, float)]
        if not all(map(math.isfinite, numbers)) or (
                min(numbers, default=0) < 0 and name.endswith(("lr", "decay", "clip"))):
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range")
    for name in ("epochs", "batch_size", "image_scale"):
        if not getattr(cfg, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    if not 0 < cfg.scales[0] <= cfg.scales[1] < 16 or min(cfg.workers, cfg.seed) < 0:
        raise InputError("--scales needs two positive numbers, the smaller first; --workers and "
                         "--seed are not negative")
    if min(cfg.size) < 32:
        raise InputError(f"--size {cfg.size[0]} {cfg.size[1]} is too small: use 32 or more pixels")
    return chosen, cfg


def flags_of(cfg, quick):
    """The flags that give a bare command this configuration again, for 'next:' lines."""
    bare = type(cfg)(**(quick if cfg.dataset == "synthetic" else {}))
    words = []
    for f in fields(cfg):
        value, name = getattr(cfg, f.name), "--" + f.name.replace("_", "-")
        if f.name not in ("resume", "export") and value != getattr(bare, f.name):
            words += ([name if value else "--no" + name[1:]] if isinstance(value, bool) else
                      [name, *map(str, value if isinstance(value, tuple) else (value,))])
    return "".join(" " + word for word in words)


def run_main(main):
    """Call main(); a user's mistake ends in one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Devices and processes
# ---------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(cfg):
    """Join torchrun's process group if there is one, seed everything, return the torch.device.

    Every rank gets the same seed: weights start equal, and architecture samples stay equal. Data
    differ by rank through the sampler.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    wanted = cfg.device if cfg.device != "auto" else (
        "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise InputError(f"--device {cfg.device} is not a device; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda, but torch sees no GPU; use --device cpu")
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed)
    return device


def average_gradients(parameters):
    """Mean of the gradients over all ranks, in place; nothing to do in a single process."""
    if world_size() > 1:
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world_size()


@torch.no_grad()
def average_buffers(model):
    """Mean of the floating-point buffers (BN statistics) over all ranks, in place."""
    if world_size() > 1:
        for b in model.buffers():
            if b.is_floating_point():
                dist.all_reduce(b)
                b /= world_size()


def barrier():
    """Wait for all ranks: what rank 0 has written before, the others may read after."""
    if world_size() > 1:
        dist.barrier()


def synchronised(model):
    """A twin of the model whose BNs see the batches of all ranks; GPUs only.

    Twin and model share parameters and buffers, so training one trains the other. The model keeps
    plain BNs, which can be folded, cut and run on a CPU.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, shared))


def wrapped(model, cfg, device):
    """The model to train by hand: with synchronised BN on several GPUs, compiled if asked for.

    The caller averages gradients. The model has to be in train mode.
    """
    if world_size() > 1 and device.type == "cuda":
        model = synchronised(model)
    return torch.compile(model) if cfg.compile else model


def distribute(model, device):
    """The model, under torchrun in DistributedDataParallel (synchronised BN on GPUs)."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.parallel.DistributedDataParallel(synchronised(model), device_ids=[device.index])
    return nn.parallel.DistributedDataParallel(model)


def place(net, cfg, device):
    """The network on the device, in NHWC memory with --channels-last."""
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    return net.to(device, memory_format=layout)


def to_device(images, labels, cfg, device):
    """A batch on the device, its images laid out as place() has laid out the network."""
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout), labels.to(device)


def autocast(device, enabled):
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def peak_memory(device):
    """Most memory held so far, GiB: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024        # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


# ---------------------------------------------------------------------------------------------
# Run folder: config.json, log.jsonl, checkpoints; each file written whole or not at all
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, renamed onto it only if the block succeeds."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)               # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path, text):
    if rank() == 0:
        with replacing(path) as temporary:
            Path(temporary).write_text(text)


def read_json(path, what):
    """The JSON value in `path`; `what` names it in the message of the InputError."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"there is no {what} at {path}")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable {what}: {error}")


def write_config(cfg, stages, folder=None):
    """config.json: every setting, the stages, package versions, device, git revision if any.

    folder: where to put it, if not in --out. Stages that make no network leave the settings of the
    one that is there.
    """
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        git = ""
    about = {"stages": sorted(stages), "python": platform.python_version(),
             "torch": torch.__version__, "torchvision": data.torchvision.__version__,
             "numpy": np.__version__, "device": device_name(cfg.device), "git": git or None,
             "threads": torch.get_num_threads(), "processes": world_size()}
    path = Path(folder or cfg.out) / "config.json"
    if not path.exists() or stages & {"search", "train", "sweep"}:
        write_text(path, json.dumps({**asdict(cfg), **about}, indent=1))


def device_name(device):
    """What latencies depend on: the GPU's name, or the processor's."""
    if str(device).startswith("cuda") or (str(device) == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def log_record(folder, **record):
    """Append one JSON object to log.jsonl. After --resume an epoch may stand there twice."""
    if rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def forget_log(folder, stage):
    """Drop the records of a stage that starts anew, so that pictures do not mix two runs."""
    path = Path(folder) / "log.jsonl"
    if rank() == 0 and path.exists():
        kept = [line for line in path.read_text().splitlines(True)
                if f'"stage": "{stage}"' not in line]
        write_text(path, "".join(kept))


def read_log(folder, stage):
    """Records of one stage in the order of their epochs; of a repeated epoch the last counts."""
    path, found = Path(folder) / "log.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):            # a line cut off by a kill
            record = json.loads(line)
            if record.get("stage") == stage:
                found[record.get("epoch", len(found))] = record
    return [found[key] for key in sorted(found)]


def rng_state():
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path, **items):
    """Write {"model": ..., "epoch": ..., ...} with the random state; rank 0 alone writes."""
    if rank() == 0:
        with replacing(path) as temporary:
            torch.save({**items, "rng": rng_state()}, temporary)


def load_checkpoint(path, need=("model",)):
    """The dict of save_checkpoint, on the CPU. InputError if missing, truncated or foreign."""
    try:
        # Other programs store their options beside the weights as a Namespace, which is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint at {path}")
    except Exception as error:        # torch raises many types for a truncated or foreign file
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a readable checkpoint (truncated?): {reason}")
    missing = [k for k in need if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise InputError(f"{path} is not a checkpoint of this program: it has no '{missing[0]}'")
    return checkpoint


def load_weights(model, state, path):
    """model.load_state_dict(state); a mismatch is one sentence naming the first wrong entry."""
    own = model.state_dict()
    require_state(state, path)
    for key in [*own, *state]:
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise InputError(f"{path} does not fit this network: '{key}' is missing or has another "
                             "shape; check --arch and the number of classes")
    model.load_state_dict(state)


def require_state(state, path):
    """InputError unless `state` is a dict of tensors."""
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state_dict, that is no dict of tensors")


class Progress:
    """One line about long work: stage, epoch, iteration, losses, images/s, ETA, peak memory.

    On a terminal the line rewrites itself; elsewhere one line an epoch is printed.
    """

    def __init__(self, stage, epochs, steps, device, start_epoch=0):
        self.stage, self.epochs, self.steps, self.device = stage, epochs, steps, device
        self.start, self.images, self.shown = time.perf_counter(), 0, 0.0
        self.left = max((epochs - start_epoch) * steps, 1)
        self.done, self.live = 0, sys.stdout.isatty() and rank() == 0

    def text(self, epoch, step, terms):
        spent = max(time.perf_counter() - self.start, 1e-9)
        eta = spent / max(self.done, 1) * (self.left - self.done)
        losses = " ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
        return (f"{self.stage} epoch {epoch + 1}/{self.epochs} it {step + 1}/{self.steps} {losses} "
                f"{self.images / spent:.1f} img/s ETA {int(eta) // 60}:{int(eta) % 60:02d} "
                f"{peak_memory(self.device):.2f} GiB")

    def step(self, epoch, step, terms, images):
        self.done += 1
        self.images += images
        if self.live and time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            print("\r" + self.text(epoch, step, terms)[:150], end="\x1b[K", flush=True)

    def close(self, epoch, terms, extra=""):
        if rank() == 0:
            print("\r" * self.live + self.text(epoch, self.steps - 1, terms) + extra
                  + "\x1b[K" * self.live, flush=True)


def check_finite(terms):
    """Raise FloatingPointError, listing the terms, if one of them (scalars) is NaN or infinite."""
    if not all(math.isfinite(float(v.detach())) for v in terms.values()):
        raise FloatingPointError(", ".join(f"{k} = {float(v.detach()):.4g}"
                                           for k, v in terms.items()))


def clip_gradients(parameters, limit):
    """Clip the gradient norm to `limit` (0: leave it); FloatingPointError if it is not finite."""
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm = {float(norm):.4g}")


@contextlib.contextmanager
def training_step(stage, epoch, step):
    """Stop at the first NaN, before it reaches the weights, saying where it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise InputError(f"loss is not finite in {stage}, epoch {epoch + 1}, step {step + 1} "
                         f"({error}); lower the learning rate, the last checkpoint is kept")


# ---------------------------------------------------------------------------------------------
# Networks: torchvision's classifiers as encoders, and cutting channels out of layers
# ---------------------------------------------------------------------------------------------


def classifier(name, weights="none"):
    """torchvision.models.<name>, e.g. mobilenet_v2 or resnet50, with its 1000-class head.

    weights: "none" (random), "imagenet" (torchvision's own, downloaded once) or the path of a
    state_dict of the whole network, or of its `features` alone; a head in the file is left out.
    InputError for a file that belongs to another network.
    """
    build = data.torchvision.models.get_model
    if weights == "imagenet":
        try:
            return build(name, weights="DEFAULT")
        except OSError as error:
            raise InputError(f"cannot download the ImageNet weights of {name} ({error}); give a "
                             "file or none")
    net = build(name, weights=None)
    if weights != "none":
        load_backbone(net, weights)
    return net


def load_backbone(net, path):
    """Load the file's state_dict into a torchvision classifier, all but its head; returns it."""
    state = load_checkpoint(path, ())
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    require_state(state, path)
    own = {key: value for key, value in net.state_dict().items()
           if not key.startswith(("fc.", "classifier."))}
    for key, value in own.items():
        found = [k for k in (key, key.removeprefix("features.")) if k in state]
        if not found or state[found[0]].shape != value.shape:
            raise InputError(f"{path} holds the weights of another network: "
                             f"'{key}' is missing or has another shape")
        own[key] = state[found[0]]
    net.load_state_dict(own, strict=False)
    return state


def narrowed(layer, out=None, into=None):
    """A copy of a Conv2d, Linear or BatchNorm2d that keeps some of its channels only.

    out, into: index tensors of the output and input channels that stay, None = all. A depth-wise
    convolution and a BN have one set of channels: `out`.
    """
    small = copy.deepcopy(layer)
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    if depthwise and not layer.groups == layer.in_channels == layer.out_channels:
        raise ValueError(f"cannot cut channels out of a convolution of {layer.groups} groups")
    for name, tensor in list(small._parameters.items()) + list(small._buffers.items()):
        if tensor is None or tensor.ndim == 0:               # no bias; BN's count of batches
            continue
        kept = tensor.detach() if out is None else tensor.detach()[out]
        if into is not None and name == "weight" and not depthwise and kept.ndim > 1:
            kept = kept[:, into]
        if name in small._parameters:
            kept = nn.Parameter(kept.clone(), tensor.requires_grad)
        setattr(small, name, kept)
    if isinstance(layer, nn.BatchNorm2d):
        small.num_features = len(small.running_mean)
    elif isinstance(layer, nn.Linear):
        small.out_features, small.in_features = small.weight.shape
    else:
        small.out_channels = len(small.weight)
        small.in_channels = small.out_channels if depthwise else small.weight.shape[1]
        small.groups = small.out_channels if depthwise else 1
    return small


# ---------------------------------------------------------------------------------------------
# Losses, mIoU, the train and evaluate loops
# ---------------------------------------------------------------------------------------------


def cross_entropy(logits, label):
    """Mean over the pixels that are not IGNORE. logits (B, K, H, W), label (B, H, W)."""
    if not (label != IGNORE).any():                       # the mean over nothing would be NaN
        return logits.sum() * 0
    return F.cross_entropy(logits.float(), label, ignore_index=IGNORE)


def ohem(logits, label, threshold=0.7, min_kept=None):
    """Cross-entropy with online hard example mining (Shrivastava et al., CVPR 2016).

    Mean over the pixels whose true class is predicted with probability below `threshold`, but
    over at least the `min_kept` hardest (default B*H*W / 16, OFFICIAL-CODE of FasterSeg).
    logits (B, K, H, W), label (B, H, W) with IGNORE. Returns a scalar.
    """
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    loss = loss[label != IGNORE]
    if loss.numel() == 0:
        return logits.sum() * 0
    kept = min(label.numel() // 16 if min_kept is None else min_kept, loss.numel())
    hard = loss > -math.log(threshold)
    if int(hard.sum()) >= kept:
        return loss[hard].mean() if hard.any() else loss.sum() * 0
    return loss.topk(kept).values.mean()


class ConfusionMatrix:
    """Pixel counts matrix[label, prediction] over a whole split; IGNORE pixels are left out."""

    def __init__(self, num_classes, device="cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, label, prediction):
        """label, prediction: integer tensors of one shape, prediction in 0..num_classes-1."""
        n = len(self.matrix)
        valid = label != IGNORE
        index = label[valid].long() * n + prediction[valid].long()
        self.matrix += torch.bincount(index, minlength=n * n).reshape(n, n)

    def reduce(self):
        """Add up the counts of all ranks."""
        if world_size() > 1:
            dist.all_reduce(self.matrix)
        return self

    def iou(self):
        """(num_classes,) IoU; NaN for a class absent from both label and prediction."""
        m = self.matrix.double()
        return m.diag() / (m.sum(0) + m.sum(1) - m.diag())

    def miou(self):
        """Mean IoU over the classes that occur in label or prediction; absent ones are excluded."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self):
        return float(self.matrix.diag().sum() / self.matrix.sum())


def probabilities(model, images, size, scales=(1.0,), flip=False):
    """Class probabilities (B, K, *size), averaged over rescaled and mirrored copies of the images.

    model(images (B, 3, H, W)) -> logits (B, K, h, w); scales: factors of H and W.
    """
    total = 0
    for scale in scales:
        scaled = [max(32, round(scale * side)) for side in images.shape[-2:]]
        x = images if scale == 1 else F.interpolate(images, scaled, mode="bilinear",
                                                    align_corners=False, antialias=True)
        for mirrored in (False, True)[:1 + flip]:
            logits = model(x.flip(-1) if mirrored else x).float()
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            total = total + (logits.flip(-1) if mirrored else logits).softmax(1)
    return total / (len(scales) * (1 + flip))


@torch.no_grad()
def evaluate(model, loader, num_classes, device, amp=False, scales=(1.0,), flip=False):
    """ConfusionMatrix of a segmentation model over a loader, at the label's own resolution.

    One scale and no flip unless asked for; otherwise the mean of the probabilities decides.
    """
    training, matrix = model.training, ConfusionMatrix(num_classes, device)
    model.eval()
    for images, labels in loader:
        with autocast(device, amp):
            scores = probabilities(model, images.to(device), labels.shape[-2:], scales, flip)
        matrix.update(labels.to(device), scores.argmax(1))
    model.train(training)
    return matrix.reduce()


def open_split(cfg, split, size):
    return data.open_segmentation(cfg.dataset, cfg.data_root or None, split,
                                  cfg.num_classes or None, size, cfg.seed)


def open_loader(cfg, split, train=False, images=None, transform=None):
    """(set, loader) of a split: to train augmented and in batches, else as it is, one by one.

    images, transform: another set than that of --dataset, another augmentation.
    """
    images = open_split(cfg, split, cfg.size) if images is None else images
    data.check_segmentation(images)
    transform = transform or (
        data.train_transform(cfg.size, cfg.scales, cfg.image_scale) if train
        else data.eval_transform(cfg.image_scale))
    return images, data.make_loader(
        images, range(len(images)), transform, cfg.batch_size // world_size() if train else 1,
        train, cfg.workers, cfg.seed, rank(), world_size())


def report_segmentation(name, matrix, images, cfg, folder, kind="retrained"):
    """Print IoU by class and the means of a ConfusionMatrix; log them. kind: which mIoU it is."""
    for thing, iou in zip(images.class_names, matrix.iou().tolist()):
        print(f"  {thing:24s} {'absent' if math.isnan(iou) else f'{100 * iou:6.2f}'}")
    print(f"{name}: {kind} mIoU on {cfg.split} {100 * matrix.miou():.2f}, pixel accuracy "
          f"{100 * matrix.pixel_accuracy():.2f}")
    log_record(folder, stage="eval", split=cfg.split, miou=matrix.miou())


@torch.no_grad()
def draw_segmentations(net, images, cfg, device, folder, count=4):
    """segmentations.png: picture, label and the network's prediction of `count` pictures."""
    rows, samples = [], data.Samples(images, data.eval_transform(cfg.image_scale))
    for i in range(0, len(images), max(1, len(images) // count))[:count]:
        x, label = samples[0, i]
        scores = probabilities(net, x[None].to(device), label.shape)
        picture = images[i][0]
        pixels = np.asarray(picture)
        rows.append([picture, overlay(pixels, label, images.palette),
                     overlay(pixels, scores.argmax(1)[0].cpu(), images.palette)])
    comparison(rows, ("image", "label", "prediction"), Path(folder) / "segmentations.png")
    print(f"picture: {folder}/segmentations.png")


def _short(key, value):
    """A setting for a message; a whole architecture is only named."""
    return f"{key} {value}" if len(str(value)) < 60 else f"another {key}"


def _resume(path, model, optimizer, scheduler, extra):
    """Load everything from last.pt -> (epochs done, best mIoU)."""
    state = load_checkpoint(path, ("model", "optimizer", "scheduler", "epoch", "best"))
    for key, value in extra.items():
        if state.get(key) != value:
            raise InputError(f"{path} was trained with {_short(key, state.get(key))}, not "
                             f"{_short(key, value)}; train without --resume or with another --out")
    load_weights(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    set_rng_state(state["rng"])
    return state["epoch"], state["best"]


def fit(stage, model, loss_terms, optimizer, scheduler, train_loader, val_loader, num_classes, cfg,
        device, folder, clip=0.0, extra=None, per_step=False, after_step=None, observe=None,
        validate=None):
    """Train a segmentation network; returns its best validation mIoU.

    loss_terms(forward, images, labels) -> dict name -> scalar, summed and minimised; `forward` is
    the model, wrapped as the run needs it. The scheduler steps once an epoch, or after every step
    if `per_step` (poly schedules). last.pt and best.pt (highest mIoU) go to `folder`, one record an
    epoch to its log.jsonl. extra: dict of strings that say what is trained on what, stored too; a
    checkpoint with other ones is not resumed. after_step() follows every optimizer step;
    observe() -> dict joins the record of the epoch. validate(model) -> (name, score): another score
    than the mIoU on val_loader, for networks that do not segment.
    """
    folder, start, best = Path(folder), 0, -1.0
    if cfg.resume and (folder / "last.pt").exists():
        start, best = _resume(folder / "last.pt", model, optimizer, scheduler, extra or {})
    else:
        forget_log(folder, stage)
    forward = distribute(model.train(), device)
    if cfg.compile:
        forward = torch.compile(forward)
    progress = Progress(stage, cfg.epochs, len(train_loader), device, start)
    for epoch in range(start, cfg.epochs):
        train_loader.sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(train_loader):
            images, labels = to_device(images, labels, cfg, device)
            with training_step(stage, epoch, step):
                with autocast(device, cfg.amp):
                    terms = loss_terms(forward, images, labels)
                check_finite(terms)
                optimizer.zero_grad()
                sum(terms.values()).backward()
                clip_gradients(model.parameters(), clip)
                optimizer.step()
            if after_step:
                after_step()
            if per_step:
                scheduler.step()
            terms = {name: value.detach() for name, value in terms.items()}
            progress.step(epoch, step, terms, len(images) * world_size())
        if not per_step:
            scheduler.step()
        average_buffers(model)
        name, score = validate(model) if validate else ("mIoU", evaluate(
            model, val_loader, num_classes, device, cfg.amp).miou())
        progress.close(epoch, terms, f" | val {name} {100 * score:.2f}")
        log_record(folder, stage=stage, epoch=epoch, **{name.lower(): score},
                   **{k: float(v) for k, v in terms.items()}, **(observe() if observe else {}))
        improved, best = score > best, max(score, best)
        items = dict(model=model.state_dict(), epoch=epoch + 1, best=best, **{name.lower(): score},
                     **(extra or {}))
        if improved:
            save_checkpoint(folder / "best.pt", **items)
        save_checkpoint(folder / "last.pt", optimizer=optimizer.state_dict(),
                        scheduler=scheduler.state_dict(), **items)
    barrier()
    return best


# ---------------------------------------------------------------------------------------------
# Accounting: parameters, MACs, the network as it is deployed
# ---------------------------------------------------------------------------------------------


def count_params(model):
    """Number of scalars in model.parameters()."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model, size):
    """Multiply-accumulates of convolutions and matrix products for one (1, 3, *size) image.

    torch's flop counter halved, on the meta device, so nothing is computed; BN, ReLU and
    interpolation are not counted.
    """
    model = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size, device="meta"))
    return counter.get_total_flops() // 2


def fold_bn(model):
    """A copy in eval mode with every BN folded into the convolution registered just before it.

    Works where conv and BN are neighbours in registration order and in data flow, as in
    torchvision's backbones. A module where they are not brings a method fold_norms.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if hasattr(module, "fold_norms"):
            module.fold_norms()
        previous = previous_name = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(previous, nn.Conv2d):
                setattr(module, previous_name, fuse_conv_bn_eval(previous, child))
                setattr(module, name, nn.Identity())
            previous, previous_name = child, name
    return model


def export(model, size, path):
    """Save the folded network as a torch.export program: runs without this source, batch 1.

    torch.export.load(path).module()(image (1, 3, *size)) -> logits. Returns the largest absolute
    difference between program and network on a random image.
    """
    folded, image = fold_bn(model).cpu(), torch.randn(1, 3, *size)
    with torch.no_grad():
        program = torch.export.export(folded, (image,))
        with replacing(path) as temporary, open(temporary, "wb") as f:
            torch.export.save(program, f)
        return float((torch.export.load(path).module()(image) - folded(image)).abs().max())


# ---------------------------------------------------------------------------------------------
# Pictures: segmentations beside their labels and small charts, with Pillow only (no matplotlib)
# ---------------------------------------------------------------------------------------------

CHART_COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
                (140, 86, 75), (240, 120, 200), (110, 110, 110), (190, 185, 20), (20, 195, 215))
INK, FAINT, NO_VALUE = (40, 40, 40), (226, 226, 226), (190, 190, 190)


def save_png(image, path):
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def _array(x):
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _fit(text, font, width):
    """`text`, its end replaced by "..." if it is wider than `width` pixels."""
    short = text = str(text)
    while text and font.getlength(short) > width:
        text = text[:-1]
        short = text + "..."
    return short


def overlay(image, label, palette, alpha=0.55):
    """Blend class colours into a picture: (1 - alpha) * image + alpha * palette[label].

    image: uint8 (3, H, W) or (H, W, 3); label: int (H, W), 255 = ignore, shown as the image at
    half brightness; palette: (K, 3) RGB in 0..255. Returns an RGB PIL image of H x W.
    Raises ValueError for other shapes, for a float image and for a class outside the palette.
    """
    image, label, palette = _array(image), _array(label), _array(palette)
    if image.shape == (3, *label.shape):
        image = image.transpose(1, 2, 0)                                        # (H, W, 3)
    if image.dtype != np.uint8 or image.shape != (*label.shape, 3):
        raise ValueError(f"overlay needs a uint8 image of the label's size, not {image.dtype} "
                         f"{image.shape} with a label {label.shape}")
    ignore = label == 255
    known = np.where(ignore, 0, label)
    if known.min() < 0 or known.max() >= len(palette):
        raise ValueError(f"label has a class outside the palette of {len(palette)} colours")
    mixed = (1 - alpha) * image + alpha * palette[known]
    mixed = np.where(ignore[..., None], 0.5 * image, mixed)
    return Image.fromarray(mixed.round().astype(np.uint8))


def comparison(rows, titles, path):
    """Save a grid of PIL images, rows[i][j] under titles[j] (e.g. picture, label, prediction).

    All get the same width: 360 px, or twice the narrowest image where that is less, because a
    larger blow-up shows interpolation rather than data. Raises ValueError if there is no image.
    """
    width = min(360, 2 * min(image.width for row in rows for image in row))
    rows = [[image.convert("RGB").resize((width, max(1, image.height * width // image.width)),
                                         Image.Resampling.BICUBIC) for image in row]
            for row in rows if row]
    heights, pitch = [max(image.height for image in row) + 4 for row in rows], width + 4
    sheet = Image.new("RGB", (max(map(len, rows)) * pitch + 4, 24 + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for j, title in enumerate(titles):
        draw.text((4 + j * pitch + width / 2, 12), _fit(title, font, width), INK, font, "mm")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (4 + j * pitch, 24 + sum(heights[:i])))
    save_png(sheet, path)


def _finite(points):
    """Points (x, y, ...) whose x and y are finite: a diverged run must still get its chart."""
    return [(float(x), float(y), *text) for x, y, *text in points
            if math.isfinite(x) and math.isfinite(y)]


def _ticks(values, count, least=0.0):
    """[(value, text)]: about `count` ticks, 1, 2 or 5 times a power of ten apart, around `values`.

    `least` is the smallest step: 1 for epochs, where 0.5 means nothing.
    """
    lo, hi = (min(values), max(values)) if values else (0.0, 1.0)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):     # a constant has no scale of its own
        lo, hi = lo - (0.1 * abs(lo) or 1), hi + (0.1 * abs(hi) or 1)
    raw = (hi - lo) / max(count, 2)
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f".{digits}f" if digits < 6 and max(-lo, hi) < 1e7 else ".10g"
    return [(i * step, format(i * step, form))
            for i in range(math.floor(lo / step + 1e-6), math.ceil(hi / step - 1e-6) + 1)]


class _Chart:
    """White canvas with title, axes, grid and a legend at the right; `at` maps data to pixels.

    xs, ys: finite values to enclose; tight: the x axis ends at the data, not at a tick;
    names: of the series, in the order of CHART_COLORS; note: at the right above the plot; upward:
    legend from bottom to top, as stacked layers lie. Drawn at twice `size` (the pixels below)
    and halved by `save`, which smooths the lines.
    """

    def __init__(self, title, x_label, y_label, xs, ys, names, size, tight=False, note="",
                 upward=False):
        w, h = 2 * size[0], 2 * size[1]
        self.image = Image.new("RGB", (w, h), "white")
        self.draw = draw = ImageDraw.Draw(self.image)
        self.font, bold = ImageFont.load_default(size=24), ImageFont.load_default(size=32)
        font, top, bottom = self.font, 120, h - 96
        self.legend = [(str(n), CHART_COLORS[i % len(CHART_COLORS)]) for i, n in enumerate(names)]
        side = max((font.getlength(name) + 76 for name, _ in self.legend), default=0)
        right = w - 48 - min(0.35 * w, side)
        y_ticks = _ticks(ys, (bottom - top) / 100)
        left = 44 + max(font.getlength(text) for _, text in y_ticks)
        x_ticks = y_ticks if xs is ys else _ticks(xs, (right - left) / 130,
                                                  all(x.is_integer() for x in xs))
        if not tight or not xs or min(xs) == max(xs):
            xs = [x for x, _ in x_ticks]
        x0, y0, x1, y1 = self.range = (min(xs), y_ticks[0][0], max(xs), y_ticks[-1][0])
        self.box = left, top, right, bottom
        for value, text in y_ticks:
            y = self.at(x0, value)[1]
            draw.line((left, y, right, y), FAINT, 2)
            draw.text((left - 12, y), text, INK, font, "rm")
        for value, text in x_ticks:
            if x0 <= value <= x1:
                x = self.at(value, y0)[0]
                draw.line((x, top, x, bottom), FAINT, 2)
                draw.text((x, bottom + 12), text, INK, font, "mt")
        draw.line((left, top, left, bottom, right, bottom), INK, 2)
        draw.text((20, 36), _fit(title, bold, w - 40), INK, bold, "lm")
        room = right - 60 - font.getlength(note)    # one line for the y label and the note
        draw.text((20, 88), _fit(y_label, font, room), INK, font, "lm")
        draw.text((right, 88), note, INK, font, "rm")
        draw.text(((left + right) / 2, h - 28), _fit(x_label, font, right - left), INK, font, "mm")
        for i, (name, color) in enumerate(self.legend[::-1] if upward else self.legend):
            x, y = right + 36, top + 38 * i + 16
            draw.rectangle((x, y - 9, x + 18, y + 9), color)
            draw.text((x + 30, y), _fit(name, font, w - x - 40), INK, font, "lm")

    def at(self, x, y):
        (left, top, right, bottom), (x0, y0, x1, y1) = self.box, self.range
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))

    def dot(self, x, y, color):
        """Draw a dot; returns its bounding box."""
        x, y = self.at(x, y)
        self.draw.ellipse((x - 8, y - 8, x + 8, y + 8), color, "white", 2)
        return x - 8, y - 8, x + 8, y + 8

    def save(self, path):
        save_png(self.image.resize((self.image.width // 2, self.image.height // 2),
                                    Image.Resampling.LANCZOS), path)


def line_chart(path, title, x_label, y_label, series, size=(760, 420)):
    """Save lines: series = {name: [(x, y), ...]}; size in pixels.

    Points that are not finite are skipped, a series of one point is a dot, none at all is fine.
    The colours repeat after ten series; about fifteen names fit beside a plot of this height.
    """
    lines = [_finite(points) for points in series.values()]
    chart = _Chart(title, x_label, y_label, [x for line in lines for x, _ in line],
                   [y for line in lines for _, y in line], series, size, tight=True)
    for (_, color), line in zip(chart.legend, lines):
        if len(line) == 1:
            chart.dot(*line[0], color)
        chart.draw.line([chart.at(*point) for point in line], color, 4, joint="curve")
    chart.save(path)


def scatter_chart(path, title, x_label, y_label, groups, diagonal=False, annotate=None,
                  size=(520, 480)):
    """Save dots: groups = {name: [(x, y) or (x, y, text), ...]}; non-finite points are skipped.

    diagonal: same range on both axes and the line y = x; annotate: a short remark above the plot
    at the right, e.g. "r = 0.99". A point's text is left out where it would cover something.
    """
    clouds = [_finite(points) for points in groups.values()]
    xs, ys = ([point[k] for cloud in clouds for point in cloud] for k in (0, 1))
    if diagonal:
        xs = ys = xs + ys
    chart = _Chart(title, x_label, y_label, xs, ys, groups, size, note=annotate or "")
    left, top, right, bottom = chart.box
    if diagonal:
        chart.draw.line((left, bottom, right, top), NO_VALUE, 3)
    taken = [chart.dot(*point[:2], color)
             for (_, color), cloud in zip(chart.legend, clouds) for point in cloud]
    for x, y, text in (point for cloud in clouds for point in cloud if len(point) == 3):
        x, y = chart.at(x, y)
        for dx, dy, anchor in ((14, 0, "lm"), (-14, 0, "rm"), (0, -14, "mb"), (0, 14, "mt")):
            a, b, c, d = chart.draw.textbbox((x + dx, y + dy), str(text), chart.font, anchor)
            if left < a and c < right + 24 and d < bottom and not any(
                    a < r and c > p and b < s and d > q for p, q, r, s in taken):
                chart.draw.text((x + dx, y + dy), str(text), INK, chart.font, anchor)
                taken.append((a, b, c, d))
                break
    chart.save(path)


def stacked_chart(path, title, x_label, layers, size=(760, 420), xs=None):
    """Save shares over time as stacked areas, the first layer at the bottom.

    layers = {name: [share in [0, 1] at each x]}; xs: the common x values, 0, 1, 2, ... if None.
    NaN counts as 0. Raises ValueError if the lengths differ.
    """
    shares = np.nan_to_num(np.atleast_2d([_array(v).astype(float) for v in layers.values()]))
    xs = [float(x) for x in (range(shares.shape[1]) if xs is None else xs)]
    if len(xs) != shares.shape[1]:
        raise ValueError(f"{len(xs)} x values for {shares.shape[1]} shares of each layer")
    chart = _Chart(title, x_label, "share", xs, [0.0, 1.0], layers, size, tight=True,
                   upward=True)
    if len(xs) == 1:                                # one step is drawn as flat bands
        xs, shares = chart.range[::2], shares.repeat(2, axis=1)
    # From the top layer down, each area reaching the axis, the next one covering its lower part.
    # Shares summed in float32 may exceed 1 by a rounding error, which would leave the plot.
    for (_, color), roof in reversed(list(zip(chart.legend, shares.cumsum(0).clip(0, 1)))):
        edge = [chart.at(x, y) for x, y in zip(xs, roof)]
        if edge:
            chart.draw.polygon([*edge, chart.at(xs[-1], 0), chart.at(xs[0], 0)], color)
            chart.draw.line(edge, "white", 2)
    chart.save(path)


def heat_map(path, title, row_names, column_names, values, size=None):
    """Save a table of values (rows, columns) in [0, 1], white = 0 to deep blue = 1, NaN = grey.

    The value is printed where its cell is large enough. size: pixels (width, height); None gives
    every cell room for its value. Raises ValueError if the names do not match `values`.
    """
    values, font = _array(values).astype(float), ImageFont.load_default(size=12)
    bold, (n, m) = ImageFont.load_default(size=16), (len(row_names), len(column_names))
    if values.shape != (n, m) or not n * m:
        raise ValueError(f"heat map of {values.shape} values has {n} row and {m} column names")
    left = 20 + max(font.getlength(_fit(name, font, 240)) for name in row_names)
    widest = max(font.getlength(str(name)) for name in column_names) + 12
    w, h = size or (math.ceil(max(left + m * max(40, widest) + 14, bold.getlength(title) + 24)),
                    100 + 20 * n)
    cell_w, cell_h = (w - left - 14) / m, (h - 100) / n
    image = Image.new("RGB", (w, h), "white")
    draw = ImageDraw.Draw(image)

    def blue(value):
        return tuple(round(255 + (deep - 255) * min(max(value, 0), 1)) for deep in (8, 48, 107))

    draw.text((10, 20), _fit(title, bold, w - 20), INK, bold, "lm")
    for j in range(0, m, math.ceil(widest / cell_w)):       # names thinned where they would touch
        x = min(left + (j + 0.5) * cell_w, w - widest / 2)
        draw.text((x, 52), str(column_names[j]), INK, font, "ms")
    for i in range(n):
        y = 60 + i * cell_h
        if i % math.ceil(14 / cell_h) == 0:
            draw.text((left - 8, y + cell_h / 2), _fit(row_names[i], font, 240), INK, font, "rm")
        for j, value in enumerate(values[i]):
            x, missing = left + j * cell_w, math.isnan(value)
            draw.rectangle((x, y, x + cell_w, y + cell_h), NO_VALUE if missing else blue(value),
                           FAINT if min(cell_w, cell_h) > 8 else None)
            if cell_h >= 14 and cell_w >= 30 and not missing:
                draw.text((x + cell_w / 2, y + cell_h / 2), f"{value:.2f}",
                          "white" if value > 0.45 else INK, font, "mm")
    for k in range(100):                                    # the scale, below the cells
        draw.line((left + 14 + k, h - 25, left + 14 + k, h - 15), blue(k / 99))
    draw.text((left, h - 20), "0", INK, font, "lm")
    draw.text((left + 120, h - 20), "1", INK, font, "lm")
    save_png(image, path)
