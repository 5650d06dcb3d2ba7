"""Plumbing that no paper is about. The paper files import it; it imports only `data.py`.

    settings    opt, BaseConfig, parse_args, run_main       a dataclass is the command line
    processes   setup, rank, average_gradients, place       torchrun, devices, memory
    files       replacing, read_json, load_checkpoint       each whole or not at all
    Run         epochs, batches, descend, end_epoch         one training; it resumes bit for bit
    networks    classifier, narrowed, fold_bn, export       torchvision's, and cutting channels
    learning    evaluate, open_loader, fit                  for a network that has been found
    pictures    draw_lines, draw_heat_map, draw_bars, draw_segmentations

A paper's search is written out in its own file, on top of Run:

    run = Run("search", "search", cfg, cfg.out, epochs, model=net, optimizer=sgd)
    for epoch in run.epochs():                          # with --resume from where last.pt left off
        for images, labels in run.batches(loader):
            run.descend(sgd, task=F.cross_entropy(net(images), labels))
        run.end_epoch(miou=evaluate(net, ...).miou())   # log.jsonl, last.pt
"""
import argparse
import contextlib
import copy
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import draw_segmentation_masks, make_grid

import data
from data import IGNORE, InputError

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

# The order in which a network comes about. Each field of a Config names the first stage whose
# outcome depends on it: a checkpoint of a stage stores the fields of this and all earlier stages,
# and is neither resumed nor reused under other values.
STAGES = ("dense", "search", "train", "eval")


def opt(default, help, stage="", choices=None, low=0, high=math.inf):
    """A dataclass field that is also a flag --name-of-field.

    stage: the first of STAGES that depends on it, "" if none does. low, high: the range, ends
    included, of a number or of each in a tuple; none is negative unless `low` says so.
    """
    return field(default=default, metadata={"help": help, "stage": stage, "choices": choices,
                                            "low": low, "high": high})


@dataclass
class BaseConfig:
    """What all four files need. A paper's Config adds its own fields, among them size (training
    crop H W), scales (smallest and largest random scale), batch_size and epochs."""
    out: str = opt("", "run folder [runs/<method>]")
    preset: str = opt("", "[quick on synthetic data, else paper]", choices=("quick", "paper"))
    resume: bool = opt(False, "continue each stage from its last.pt")
    seed: int = opt(0, "of weights, samples and data order", "dense")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")      # setup() resolves auto
    amp: bool = opt(False, "bf16 autocast; slower on a CPU without bf16 instructions", "dense")
    compile: bool = opt(False, "torch.compile what is trained, evaluated by --eval and timed")
    channels_last: bool = opt(False, "NHWC memory: for depth-wise convolutions and tensor cores")
    workers: int = opt(0, "loader processes a rank, 4 to 8 on a GPU; samples do not change")
    dataset: str = opt("synthetic", "where images come from", "dense",
                       data.set_names("segmentation"))
    data_root: str = opt("", "folder of the data set (data.py shows the expected tree)", "dense")
    num_classes: int = opt(0, "classes of --dataset folder; other sets know theirs", "dense")
    image_scale: float = opt(1.0, "factor for all pictures", "dense", low=0.01, high=16)
    arch: str = opt("", "arch.json to train, evaluate or bench [the one in --out]", "train")
    weights: str = opt("", "checkpoint for --eval and --export [best.pt of the training]", "eval")
    split: str = opt("val", "split for --eval", "eval")
    export: str = opt("", "last of all, write the network as a torch.export program", "eval")
    flags: str = ""         # not a flag: the command line without stages, for `next:` lines


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def flag(name):
    return "--" + name.replace("_", "-")


def add_flag(parser, f):
    text = f"{f.metadata['help']} [{f.default}]".removesuffix(" []")
    kind = {"help": text.replace("%", "%%")}
    if f.type is bool:
        kind["action"] = argparse.BooleanOptionalAction
    elif hasattr(f.type, "__args__"):                   # tuple[int, int] or tuple[float, ...]
        item, *rest = f.type.__args__
        kind.update(type=item, nargs="+" if rest == [...] else 1 + len(rest), metavar="N")
    else:
        kind.update(type=f.type, choices=f.metadata["choices"])
    parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **kind)


def check_range(f, value):
    """InputError unless each number of the field lies in its range; NaN lies in none."""
    for number in value if isinstance(value, tuple) else (value,):
        low, high = f.metadata["low"], f.metadata["high"]
        if isinstance(number, (int, float)) and not low <= number <= high:
            raise InputError(f"{flag(f.name)} {number} is out of range: {low:g} to {high:g}")


def parse_args(config_class, method, stages, quick, description, argv=None):
    """Command line -> (set of chosen stages, config).

    stages: dict name -> function; a flag each, whose help is the function's first line. The
    dataclass defaults are the paper's values; `quick` (dict name -> value) replaces them under
    --preset quick, the default on synthetic data; an explicit flag wins over both. InputError:
    unknown flag or choice, a value out of range, a flag that only a later stage than the chosen
    ones would read, a file that one of them makes.
    """
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    parser = Parser(prog=f"{method}.py", description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, stage in stages.items():
        parser.add_argument(f"--{name}", action="store_true", help=stage.__doc__.splitlines()[0])
    options = [f for f in fields(config_class) if "help" in f.metadata]
    for f in options:
        add_flag(parser, f)
    given = vars(parser.parse_args(argv))
    chosen = {name for name in stages if given.pop(name)}
    synthetic = given.get("dataset", "synthetic") == "synthetic"
    preset = given.setdefault("preset", "quick" if synthetic else "paper")
    if not chosen and "export" not in given:
        parser.print_help()
        raise InputError(f"choose a stage, for example: python {method}.py --{next(iter(stages))}")
    reached = [STAGES.index(s) if s in STAGES else len(STAGES)
               for s in chosen | ({"export"} & set(given))]
    for name, stage in (("arch", "search"), ("weights", "train")):
        if given.get(name) and stage in chosen:
            raise InputError(f"--{stage} makes what --{name} would name; leave out one of them")
    for f in options:
        stage = f.metadata["stage"]
        if f.name in given and stage and STAGES.index(stage) > max(reached):
            raise InputError(f"{flag(f.name)} matters to --{stage} only: add that, or leave it out")
    values = {**(quick if preset == "quick" else {}), **given}
    cfg = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    for f in options:
        check_range(f, getattr(cfg, f.name))
    cfg.scales = tuple(sorted(cfg.scales))
    cfg.out = cfg.out or f"runs/{method}"
    cfg.flags = shlex.join(w for w in argv if w not in {"--resume", *(f"--{s}" for s in stages)})
    return chosen, cfg


def run_stages(stages, chosen, cfg):
    """Call the chosen ones of stages, dict name -> function(cfg), in the order of the dict."""
    if chosen & {"search", "train", "sweep"}:           # what makes networks
        write_config(cfg)
    for name, stage in stages.items():
        if name in chosen:
            stage(cfg)


def next_command(cfg, script, stages):
    """The line that a search or a training ends with: what to run next, with the same flags."""
    start = f"torchrun --nproc_per_node={world_size()}" if world_size() > 1 else "python"
    return f"next: {start} {script}.py {stages} {cfg.flags}".rstrip()


def settings_of(cfg, stage, **about):
    """What a network made by `stage` depends on: dict of settings; `about` adds to it."""
    reached = STAGES[:STAGES.index(stage) + 1]
    return {f.name: getattr(cfg, f.name) for f in fields(cfg)
            if f.metadata.get("stage") in reached} | {"processes": world_size(), **about}


def require_same(stored, wanted, path):
    """InputError naming the first setting under which `path` was made differently."""
    for name, value in wanted.items():
        if stored.get(name) != value:
            raise InputError(f"{path} was made with {flag(name)} {str(stored.get(name))[:60]}, now "
                             f"it is {str(value)[:60]}; give the same, another --out, or delete it")


def run_main(main):
    """Call main(); a user's mistake ends in one sentence on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # a scheduler's Ctrl-C
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Devices and processes
# ---------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(cfg):
    """Join torchrun's processes if there are any, seed everything, name the device in cfg.device.

    Every rank gets the same seed, so that weights start equal and architecture samples stay equal
    without being sent; drop-path masks coincide too, which is harmless. Data differ by rank through
    the sampler. A scheduler's WORLD_SIZE alone starts nothing: only torchrun does.
    """
    launched = dist.is_torchelastic_launched()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = cfg.device.partition(":")
    usable = kind in ("cuda", "auto") and not (launched and index)  # one GPU for all ranks: refused
    index = index or (os.environ["LOCAL_RANK"] if launched else "0")
    if cfg.device == "cpu" or cfg.device == "auto" and not gpus:
        cfg.device = "cpu"
    elif usable and index.isdigit() and int(index) < gpus:
        cfg.device = f"cuda:{index}"
        torch.cuda.set_device(cfg.device)
    else:
        raise InputError(f"--device {cfg.device} cannot be used: torch sees {gpus} GPUs; choose "
                         "auto, cpu, cuda or, without torchrun, cuda:N")
    if launched and not dist.is_initialized():
        dist.init_process_group("gloo" if cfg.device == "cpu" else "nccl")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")              # every rank reports; rank 0 is heard
    torch.manual_seed(cfg.seed)


def sum_over_ranks(tensor):
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def average(tensors):
    """Replace each tensor by its mean over all ranks: one message for all of them."""
    if tensors and world_size() > 1:
        flat = sum_over_ranks(torch.cat([t.flatten() for t in tensors])) / world_size()
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))            # keeps the layout, NHWC too


def average_gradients(parameters):
    """Mean of the gradients over all ranks, in place.

    The one mechanism for searching and training, in place of DistributedDataParallel, which knows
    one backward a step and one network. As there, a rank's mean counts as one share however many of
    its pixels are valid. Every rank must have gradients for the same parameters.
    """
    average([p.grad for p in parameters if p.grad is not None])


def average_buffers(model):
    """Mean of the BN statistics over all ranks, in place; without synchronised BN they differ."""
    average([b for b in model.buffers() if b.is_floating_point()])


def barrier():
    """Wait for all ranks: what rank 0 has written before, the others may read after."""
    if world_size() > 1:
        dist.barrier()


def training_form(model, cfg):
    """The model to call in a training step; it shares parameters and buffers with `model`.

    On several GPUs a twin whose BNs see the batches of all ranks: so the model itself keeps plain
    BNs, which can be folded, cut and run on a CPU. Compiled if asked for.
    """
    if world_size() > 1 and cfg.device != "cpu":
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, shared))
    return torch.compile(model) if cfg.compile else model


def place(net, cfg):
    """The network on the device, in NHWC memory with --channels-last."""
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    return net.to(cfg.device, memory_format=layout)


def to_device(images, labels, cfg):
    """A batch on the device. The first convolution lays images out as its kernel lies."""
    return [t.to(cfg.device, non_blocking=True) for t in (images, labels)]


def autocast(cfg):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.amp)


def peak_memory(device):
    """Most memory held so far, GiB: on the GPU, or by this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 2 ** (30 if sys.platform == "darwin" else 20)     # in bytes on macOS, else in KiB


# ---------------------------------------------------------------------------------------------
# Files: config.json, log.jsonl, checkpoints
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """Yield the path of a temporary file that takes the name `path` when the block has succeeded.

    Synced before it is renamed: after a kill or a power cut either the old file is there or the
    new one, whole. InputError if it cannot be written. All files are written here, and of several
    ranks only rank 0's: the others write to nowhere.
    """
    if rank() > 0:
        yield Path(os.devnull)
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch.save tells a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or f"is the disk full? {str(error)[:80]}"
        raise InputError(f"cannot write {path} ({reason}); what was there before is kept") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def read_json(path, what):
    """The JSON object in `path`, a dict; `what` names it in the message of the InputError."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise InputError(f"there is no {what} at {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable {what}: {error}") from None
    return value


def write_config(cfg):
    """config.json: settings, versions, device and git revision. Before all work, so that a folder
    that cannot be written is not found out after hours."""
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True,
                         cwd=Path(__file__).parent).stdout.strip()      # "" without git
    about = {"python": sys.version.split()[0], "torch": torch.__version__,
             "torchvision": data.torchvision.__version__, "numpy": np.__version__, "git": git,
             "threads": torch.get_num_threads(), "processes": world_size()}
    write_json(Path(cfg.out) / "config.json", {**asdict(cfg), **about})


def log_record(folder, **record):
    """Add one JSON object to log.jsonl. After --resume an epoch may stand there twice."""
    path = Path(folder) / "log.jsonl"
    before = path.read_text() if path.exists() else ""
    write_text(path, before + json.dumps(record) + "\n")       # whole, so never half a line


def read_log(folder, stage):
    """Records of one stage in the order of their epochs; of a repeated epoch the last counts."""
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = {r.get("epoch"): r for r in map(json.loads, lines) if r["stage"] == stage}
    return [records[key] for key in sorted(records)]


def load_checkpoint(path, need=("model",)):
    """The dict that torch.save has put into `path`, on the CPU. InputError if it is missing,
    truncated, not made of plain tensors and numbers, or lacks a key of `need`."""
    try:
        # Other programs store their options beside the weights as a Namespace, which is harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint at {path}") from None
    except Exception as error:        # torch raises many types for a truncated or foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise InputError(f"{path} is not a readable checkpoint (truncated?): {reason}") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= set(need):
        raise InputError(f"{path} is not a checkpoint of this program, or an old one: it has no "
                         f"{', '.join(need) or 'state_dict'}")
    return checkpoint


def load_state_dict(path):
    """The state_dict in a file of any program: bare, or under "state_dict" or "model"."""
    state = load_checkpoint(path, ())
    state = state.get("state_dict", state.get("model", state))
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state_dict, that is no dict of tensors")
    return state


def load_weights(model, state, path):
    """model.load_state_dict(state) with a mismatch told in one sentence."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split("\n\t")[1:2]) or "it is no state_dict"
        raise InputError(f"{path} does not fit this network ({reason[:150].strip()}); check --arch "
                         "and the number of classes") from None


# ---------------------------------------------------------------------------------------------
# One training: epochs, progress, log and checkpoint
# ---------------------------------------------------------------------------------------------


class Run:
    """One training of `epochs` epochs in a folder: progress line, log.jsonl, last.pt, best.pt.

    name: of its records and messages. stage: see STAGES. parts: modules, optimizers and schedules
    by name; with `values`, a dict of numbers, they are all that the training carries from one epoch
    to the next, and what last.pt holds. Every epoch starts from a random state of its own, the same
    on all ranks, so none has to be stored. about: dict of what else the outcome depends on, e.g. an
    architecture. stale: files that a new training makes meaningless. shared: always as under
    --resume, for a network that several commands use, such as a teacher: finished it is taken,
    interrupted it is continued, under other settings it is refused.

    A new training replaces an older one when its first epoch is over, not before: interrupted or
    diverged earlier it leaves everything as it was.
    """

    def __init__(self, name, stage, cfg, folder, epochs, steps=0, about=None, stale=(),
                 shared=False, **parts):
        self.name, self.cfg, self.folder = name, cfg, Path(folder)
        self.total, self.steps, self.parts, self.stale = epochs, steps, parts, stale
        self.settings = settings_of(cfg, stage, **(about or {}))
        self.resume, self.values, self.terms = cfg.resume or shared, {}, {}

    def epochs(self):
        """Yields the epochs that are left to do: all, or with --resume those after last.pt.
        InputError if that was made under other terms."""
        path, state = self.folder / "last.pt", {}
        if self.resume and path.exists():
            state = load_checkpoint(path, ("epoch", "settings", "values", *self.parts))
            require_same(state["settings"], self.settings, path)
            for key, part in self.parts.items():
                load_weights(part, state[key], path)
        if state.get("epoch") == self.total:
            print(f"{self.name}: trained already with these settings, taken from {self.folder}")
        self.values, self.fresh = dict(state.get("values", {})), not state
        self.began, self.images, self.done, self.shown = time.perf_counter(), 0, 0, 0.0
        self.epoch = self.step = 0
        for self.epoch in range(state.get("epoch", 0), self.total):
            torch.manual_seed(1_000_003 * self.cfg.seed + self.epoch)
            self.step, self.terms = 0, {}
            yield self.epoch

    def batches(self, loader):
        """Yields the loader's batches of this epoch on the device and shows the progress."""
        loader.sampler.set_epoch(self.epoch)
        self.steps = self.steps or len(loader)
        for images, labels in loader:
            self.step += 1                  # here: behind the last batch nobody asks on
            self.done += 1
            self.images += len(images) * world_size()
            yield to_device(images, labels, self.cfg)
            if sys.stdout.isatty() and time.perf_counter() - self.shown > 0.5:
                self.shown = time.perf_counter()
                print("\r" + self.progress()[:150], end="\x1b[K", flush=True)

    def progress(self):
        spent = max(time.perf_counter() - self.began, 1e-9)
        steps_left = self.steps * (self.total - self.epoch) - self.step
        losses = " ".join(f"{name} {float(value):.3f}" for name, value in self.terms.items())
        return (f"{self.name} epoch {self.epoch + 1}/{self.total} it {self.step}/{self.steps} "
                f"{losses} {self.images / spent:.1f} img/s "
                f"ETA {spent / max(self.done, 1) * steps_left / 60:.1f} min "
                f"{peak_memory(self.cfg.device):.2f} GiB")

    def check(self, **terms):
        """Note the loss terms (scalars) for progress and log; InputError if one is not finite."""
        terms = {name: value.detach() for name, value in terms.items()}
        self.terms |= terms
        if not torch.stack([v.float() for v in terms.values()]).isfinite().all():
            values = ", ".join(f"{name} = {float(v):.4g}" for name, v in terms.items())
            raise InputError(f"not finite in {self.name}, epoch {self.epoch + 1}, step "
                             f"{self.step}: {values}; lower the learning rate (the last "
                             "checkpoint is kept)")

    def descend(self, optimizer, **terms):
        """One optimizer step on the sum of the loss terms, with the mean gradient of all ranks.
        Stops before a NaN reaches the weights."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        sum(terms.values()).backward()
        average_gradients(parameters)                   # a NaN of one rank now stops all of them
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.check(**terms, gradient=norm)
        optimizer.step()

    def end_epoch(self, score=None, note="", **record):
        """Log the record and the last loss terms, print the progress line, store everything.

        score: the best epoch by it is kept as best.pt, with the part `model` alone.
        """
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                average_buffers(part)
        if self.fresh and rank() == 0:                  # what an older run has left is void now
            for name in ("last.pt", "log.jsonl", "best.pt", *self.stale):
                (self.folder / name).unlink(missing_ok=True)
        self.fresh = False
        terms = {name: float(value) for name, value in self.terms.items()}
        log_record(self.folder, stage=self.name, epoch=self.epoch, **terms, **record)
        live = sys.stdout.isatty()
        print("\r" * live + self.progress() + note + "\x1b[K" * live, flush=True)
        if score is not None and math.isnan(score):
            raise InputError("no pixel of the val split has a label, so no epoch can be chosen")
        if score is not None and score > self.values.get("best", -math.inf):
            self.values["best"] = score
            self.save("best.pt", model=self.parts["model"].state_dict(), score=score)
        self.save("last.pt", values=self.values,
                  **{key: part.state_dict() for key, part in self.parts.items()})
        barrier()

    def save(self, name, **items):
        """Write a checkpoint to the folder; it says how many epochs and which settings made it."""
        with replacing(self.folder / name) as temporary:
            torch.save({"epoch": self.epoch + 1, "settings": self.settings, **items}, temporary)


def fit(run, loss_terms, loader, score):
    """Train run.parts "model" with "optimizer" and "schedule", which steps after every batch.

    loss_terms(forward, images, labels) -> dict name -> scalar, summed and minimised; `forward` is
    the model, wrapped as the run needs it. score(model) -> number, higher is better, logged as
    miou; the best epoch is kept as best.pt and is what the model ends with (the optimizer with the
    last). Returns its score.
    """
    model, optimizer, schedule = (run.parts[k] for k in ("model", "optimizer", "schedule"))
    forward = training_form(model.train(), run.cfg)
    for _ in run.epochs():
        for images, labels in run.batches(loader):
            with autocast(run.cfg):
                terms = loss_terms(forward, images, labels)
            run.descend(optimizer, **terms)
            schedule.step()
        value = score(model)
        run.end_epoch(value, f" | val {100 * value:.2f}", miou=value)
    best = run.folder / "best.pt"
    load_weights(model, load_checkpoint(best)["model"], best)
    return run.values["best"]


# ---------------------------------------------------------------------------------------------
# Networks: torchvision's classifiers as encoders, cutting and folding, accounting
# ---------------------------------------------------------------------------------------------


def classifier(name, weights="none"):
    """torchvision.models.<name>, e.g. mobilenet_v2 or resnet50, with its 1000-class head.

    weights: "none" (random), "imagenet" (torchvision's own, downloaded once) or a file with the
    state_dict of the whole network or of its `features` alone, from which all but the head is
    taken. InputError if there is no network, or the file does not fit.
    """
    try:
        pretrained = "DEFAULT" if weights == "imagenet" else None
        net = data.torchvision.models.get_model(name, weights=pretrained)
    except OSError as error:
        raise InputError(f"cannot download the weights of {name} ({error}); give a file") from None
    if weights not in ("none", "imagenet"):
        state, own = load_state_dict(weights), net.state_dict()
        for key in own:
            if not key.startswith(("fc.", "classifier.")):
                own[key] = state.get(key, state.get(key.removeprefix("features."), torch.empty(0)))
        load_weights(net, own, weights)
    return net


def narrowed(layer, out=None, into=None):
    """A copy of a Conv2d or BatchNorm2d that keeps some of its channels only.

    out, into: index tensors of the output and input channels that stay, None = all. A depth-wise
    convolution and a BN have one set of channels: `out`.
    """
    small = copy.deepcopy(layer)
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    if depthwise and not layer.groups == layer.in_channels == layer.out_channels:
        raise ValueError(f"cannot cut channels out of a convolution of {layer.groups} groups")
    for tensor in (*small.parameters(), *small.buffers()):
        if tensor.ndim and out is not None:                 # ndim 0: BN's count of batches
            tensor.data = tensor.data[out]
        if tensor.ndim > 1 and into is not None and not depthwise:
            tensor.data = tensor.data[:, into]
    if isinstance(layer, nn.BatchNorm2d):
        small.num_features = len(small.running_mean)
    else:
        small.out_channels, small.in_channels = small.weight.shape[:2]
        if depthwise:
            small.in_channels = small.groups = small.out_channels
    return small


def fold_bn(model):
    """A copy in eval mode with every BN folded into the convolution registered just before it.

    Works where conv and BN are neighbours in registration order and in data flow, as in
    torchvision's backbones. A module where they are not brings a method fold_norms.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if hasattr(module, "fold_norms"):
            module.fold_norms()
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and (
                    norm.num_features == conv.out_channels):
                setattr(module, name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


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


def export(model, size, path):
    """Save the folded network as a torch.export program: runs without this source, batch 1.

    torch.export.load(path).module()(image (1, 3, *size)) -> logits.
    """
    folded = fold_bn(model).cpu().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        program = torch.export.export(folded, (torch.randn(1, 3, *size),))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)
    print(f"run it anywhere: torch.export.load('{path}').module()(image of {(1, 3, *size)})")


# ---------------------------------------------------------------------------------------------
# Learning: loss, mIoU, loaders, evaluation
# ---------------------------------------------------------------------------------------------


def cross_entropy(logits, label):
    """Mean over the pixels that are not IGNORE, 0 if none is. logits (B, K, H, W), label (B, H, W).
    """
    total = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)     # torch's mean over nothing is NaN


class ConfusionMatrix:
    """Pixel counts matrix[label, prediction] over a whole split; IGNORE pixels are left out."""

    def __init__(self, num_classes, device="cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, label, prediction):
        """label, prediction: integer tensors of one shape, prediction in 0..num_classes-1."""
        n, valid = len(self.matrix), label != IGNORE
        index = label[valid].long() * n + prediction[valid].long()
        self.matrix += torch.bincount(index, minlength=n * n).reshape(n, n)

    def iou(self):
        """(num_classes,) IoU; NaN for a class absent from both label and prediction."""
        m = self.matrix.double()
        return m.diag() / (m.sum(0) + m.sum(1) - m.diag())

    def miou(self):
        """Mean IoU over the classes that occur in label or prediction; absent ones are excluded."""
        return float(self.iou().nanmean())


def enlarged(logits, size):
    """(B, K, h, w) -> (B, K, *size), bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def probabilities(model, images, size, scales, flip):
    """Class probabilities (B, K, *size), averaged over rescaled and mirrored copies of the images.

    model(images (B, 3, H, W)) -> logits (B, K, h, w); scales: factors of H and W.
    """
    total = 0
    for scale in scales:
        scaled = [max(32, round(scale * side)) for side in images.shape[-2:]]
        x = images if scale == 1 else F.interpolate(images, scaled, mode="bilinear",
                                                    align_corners=False, antialias=True)
        total = total + enlarged(model(x).float(), size).softmax(1)
        if flip:
            total = total + enlarged(model(x.flip(-1)).float(), size).flip(-1).softmax(1)
    return total.div_(len(scales) * (1 + flip))


@torch.no_grad()
def evaluate(model, loader, num_classes, cfg, scales=(1.0,), flip=False):
    """ConfusionMatrix of a segmentation model over a loader, at the label's own resolution, added
    up over all ranks. One scale and no flip unless asked for."""
    training, matrix = model.training, ConfusionMatrix(num_classes, cfg.device)
    average_buffers(model)                                      # all ranks score the same network
    model.eval()
    for images, labels in loader:
        images, labels = images.to(cfg.device), labels.to(cfg.device)
        with autocast(cfg):
            mean = probabilities(model, images, labels.shape[-2:], scales, flip)
        matrix.update(labels, mean.argmax(1))
    model.train(training)
    sum_over_ranks(matrix.matrix)
    return matrix


def open_split(cfg, split, task="segmentation"):
    """The raw set of a split: dataset[i] -> (picture, label). InputError if it is not there."""
    return data.open_set(task, cfg.dataset, cfg.data_root or None, split,
                         cfg.num_classes or None, cfg.size, cfg.seed)


def open_loader(cfg, split, train=False, images=None, transform=None):
    """(set, loader) of a split: to train augmented and in batches, else as it is, one by one.

    images, transform: another set than that of --dataset, another augmentation.
    """
    images = open_split(cfg, split) if images is None else images
    data.check_pairs(images)
    transform = transform or (
        data.train_transform(cfg.size, cfg.scales, cfg.image_scale) if train
        else data.eval_transform(cfg.image_scale))
    return images, data.make_loader(
        images, None, transform, cfg.batch_size // world_size() if train else 1, train,
        cfg.workers, cfg.seed, rank(), world_size())


def check_batch(name, batch, pictures, size=None):
    """InputError if a batch, --name, of a set of so many pictures is no multiple of the processes,
    or leaves BN a single value a channel in one of them: the mean over a picture, or, with the
    `size` of a crop, what has 1/64 of its resolution."""
    places = math.prod(math.ceil(side / 64) for side in size or (1,))
    if batch % world_size() or min(batch, pictures) // world_size() * places < 2:
        raise InputError(f"--{name} {batch} of {pictures} training pictures over {world_size()} "
                         "process(es): it has to be a multiple of them and leave BN two values a "
                         "channel in each; take another one, larger crops or more pictures")


def scorer(cfg, task="segmentation", form=lambda net: net):
    """score(net) -> mIoU of form(net) on val, a number in [0, 1]."""
    images, loader = open_loader(cfg, "val", images=open_split(cfg, "val", task))
    return lambda net: evaluate(form(net), loader, images.num_classes, cfg).miou()


def report_segmentation(name, kind, matrix, images, cfg, folder):
    """Print the IoU of each class, their mean, the share of pixels that are right; log the last
    two. kind: which of the mIoUs it is."""
    for thing, iou in zip(images.class_names, matrix.iou().tolist()):
        print(f"  {thing:24s} {'absent' if math.isnan(iou) else f'{100 * iou:6.2f}'}")
    right = float(matrix.matrix.diag().sum() / matrix.matrix.sum())
    print(f"{name}: {kind} mIoU on {cfg.split} {100 * matrix.miou():.2f}, pixels {100 * right:.2f}")
    log_record(folder, stage="eval", kind=kind, split=cfg.split, miou=matrix.miou(), pixels=right)


# ---------------------------------------------------------------------------------------------
# Pictures, with Pillow and torchvision
# ---------------------------------------------------------------------------------------------

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
INK, FAINT = "#282828", "#dcdcdc"


def save_png(image, path):
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


@torch.no_grad()
def draw_segmentations(net, images, cfg, folder, count=4):
    """segmentations.png: a row for each of `count` pictures: picture, label, prediction.

    Pixels without a label show the picture alone.
    """
    samples, tiles = data.Samples(images, data.eval_transform(cfg.image_scale)), []
    colours, classes = [tuple(c) for c in images.palette], torch.arange(images.num_classes)
    for i in range(0, len(images), max(1, len(images) // count))[:count]:
        x, label = samples[0, i]                                        # (3, H, W), (H', W')
        guess = enlarged(net(x[None].to(cfg.device)).float(), label.shape).argmax(1)[0].cpu()
        picture = data.v2.functional.pil_to_tensor(images[i][0])        # (3, H', W')
        masks = [y == classes[:, None, None] for y in (label, guess)]   # (K, H', W') each
        tiles += [picture, *(draw_segmentation_masks(picture, m, 0.6, colours) for m in masks)]
    height, width = tiles[0].shape[1:]          # of the first picture, though sets may mix sizes
    tiles = [data.v2.functional.resize(tile, [240, 240 * width // height]) for tile in tiles]
    sheet = make_grid(torch.stack(tiles), nrow=3, padding=4, pad_value=255)
    save_png(data.v2.functional.to_pil_image(sheet), Path(folder) / "segmentations.png")
    print(f"picture: {folder}/segmentations.png (image, label, prediction)")


def draw_canvas(title, width, height):
    """(image, pen, font) of a white picture with a title."""
    image = Image.new("RGB", (int(width), int(height)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((12, 8), title, INK, ImageFont.load_default(size=16))
    return image, pen, ImageFont.load_default(size=12)


def draw_lines(path, title, x_label, y_label, series, dots=False):
    """Save lines, or dots. series: {name: [(x, y), ...]}; a point that is not finite is left out,
    one must be left; colours repeat after eight series."""
    series = {name: [p for p in line if all(map(math.isfinite, p))]
              for name, line in series.items()}
    points = torch.tensor([point for line in series.values() for point in line])       # (N, 2)
    low, high = points.amin(0).tolist(), points.amax(0).tolist()
    image, pen, font = draw_canvas(title, 900, 440)
    left, top, right, bottom = frame = 70, 56, 640, 390

    def at(x, y):
        return (left + (x - low[0]) / (high[0] - low[0] or 1) * (right - left),
                bottom - (y - low[1]) / (high[1] - low[1] or 1) * (bottom - top))

    pen.rectangle(frame, outline=FAINT)
    pen.text((left, top - 8), f"{y_label}: {low[1]:.4g} to {high[1]:.4g}", INK, font, "ls")
    pen.text((left, bottom + 8), f"{x_label}: {low[0]:.4g} to {high[0]:.4g}", INK, font, "lt")
    for k, (name, line) in enumerate(series.items()):
        colour, places = COLOURS[k % len(COLOURS)], [at(*point) for point in line]
        if not dots:
            pen.line(places, colour, 2, joint="curve")
        for x, y in places if dots or len(places) == 1 else ():
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour, "white")
        pen.rectangle((right + 20, top + 20 * k, right + 30, top + 20 * k + 10), colour)
        pen.text((right + 38, top + 20 * k - 1), name, INK, font)
    save_png(image, path)


def draw_heat_map(path, title, row_names, column_names, values):
    """Save a table of numbers, white = 0 (or less) to blue = 1 (or more), NaN = grey.

    values: (rows, columns), in the order of the names; of many columns not every one is named.
    """
    values = np.array(values, float)[..., None].clip(0, 1)                  # (rows, columns, 1)
    colours = np.where(np.isnan(values), 200, 255 + values * (np.array([8, 48, 107]) - 255))
    left, top, cell_h = 150, 56, 16
    cell_w = max(10, min(64, 900 // len(column_names)))
    cells = Image.fromarray(colours.round().astype(np.uint8)).resize(
        (cell_w * len(column_names), cell_h * len(row_names)), Image.Resampling.NEAREST)
    image, pen, font = draw_canvas(title, left + cells.width + 12, top + cells.height + 12)
    image.paste(cells, (left, top))
    for i, name in enumerate(row_names):
        pen.text((left - 6, top + cell_h * (i + 0.5)), str(name), INK, font, "rm")
    for j in range(0, len(column_names), math.ceil(64 / cell_w)):
        pen.text((left + cell_w * (j + 0.5), top - 4), str(column_names[j]), INK, font, "ms")
    save_png(image, path)


def draw_bars(path, title, rows):
    """Save width bars, one a layer: rows = {name: (kept, of)}; grey is what there was."""
    image, pen, font = draw_canvas(title, 760, 52 + 16 * len(rows))
    longest = max(total for _, total in rows.values())
    for i, (name, (kept, total)) in enumerate(rows.items()):
        y = 40 + 16 * i
        pen.text((190, y + 6), name, INK, font, "rm")
        for n, colour in ((total, FAINT), (kept, COLOURS[0])):
            pen.rectangle((200, y, 200 + 430 * n / longest, y + 11), colour)
        pen.text((208 + 430 * total / longest, y + 6), f"{kept} of {total}", INK, font, "lm")
    save_png(image, path)
