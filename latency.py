"""Latency: measuring a module, a lookup table (LUT) of operator latencies, and how well the table
predicts whole networks.

    python latency.py --table --size 320 640          # build or complete the table of FasterSeg
    python latency.py --time paper --size 512 1024    # time a network (paper, or an arch.json)
    python latency.py --correlation 40                # estimate against measurement, Pearson r

How it is measured: eval mode, BN folded, no gradients, after warm-up, synchronised (CUDA events on
a GPU, wall time on a CPU). Candidates take turns, so that a slow moment of the machine hits all of
them, and the median over the turns is reported with the 90th percentile.
"""
import argparse
import hashlib
import json
import random
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common import (InputError, count_macs, count_params, device_name, fold_bn, rank, read_json,
                    run_main, scatter_chart, world_size, write_text)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORTEST_MS = 1.0        # shorter calls are repeated within one sample, above the timer's noise


def _once(call, repeats, device):
    """Milliseconds of one call, averaged over `repeats` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - start) / repeats


@torch.no_grad()
def measure_many(calls, device, rounds=15, warmup=2):
    """Time several candidates in turn. calls: dict name -> function without arguments.

    Returns dict name -> {"median", "p90", "samples"} in ms.
    """
    device, repeats, samples = torch.device(device), {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(warmup):
            first = _once(call, 1, device)
        repeats[name] = max(1, min(20, round(SHORTEST_MS / max(first, 1e-3))))
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_once(call, repeats[name], device))
    return {name: {"median": statistics.median(ms), "samples": len(ms),
                   "p90": sorted(ms)[min(len(ms) - 1, int(0.9 * len(ms)))]}
            for name, ms in samples.items()}


def prepare(module, shapes, device, dtype=torch.float32, channels_last=False):
    """A function that runs the folded module once on random inputs of the given shapes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = fold_bn(module).to(device, dtype).to(memory_format=layout)
    inputs = [torch.randn(shape).to(device, dtype, memory_format=layout) for shape in shapes]
    return lambda: module(*inputs)


def measure(module, shape, device="cpu", dtype=torch.float32, rounds=15, channels_last=False):
    """Latency of module(x), x of `shape` (B, C, H, W): dict median and p90 in ms, and how measured.
    """
    call = prepare(module, [shape], device, dtype, channels_last)
    return {**measure_many({"": call}, device, rounds)[""], **identity(device, dtype, shape[-2:])}


def compare(nets, frame, device, cfg):
    """Parameters, conv MACs and latency of networks, measured in turn and printed as a table.

    nets: dict name -> network in eval mode for one (1, 3, *frame) picture; cfg: amp, compile and
    channels_last count. Returns (what it was measured on, dict name -> its numbers).
    """
    dtype, calls, rows = torch.bfloat16 if cfg.amp else torch.float32, {}, {}
    for name, net in nets.items():
        call = prepare(net, [(1, 3, *frame)], device, dtype, cfg.channels_last)
        calls[name] = torch.compile(call) if cfg.compile else call
    times, about = measure_many(calls, device), identity(device, dtype, frame)
    print(f"{about['device']}, torch {about['torch']}, {about['threads']} threads, "
          f"{about['dtype']}, 1x3x{frame[0]}x{frame[1]}, BN folded" + ", compiled" * cfg.compile)
    print(f"{'network':20s} {'params':>11s} {'conv MACs':>11s} {'median':>10s} {'p90':>10s}  FPS")
    for name, net in nets.items():
        t = times[name]
        rows[name] = {"params": count_params(net), "conv_macs": count_macs(net, frame),
                      "median_ms": t["median"], "p90_ms": t["p90"], "fps": 1e3 / t["median"]}
        print(f"{name:20s} {rows[name]['params']:11,d} {rows[name]['conv_macs'] / 1e9:9.3f} G "
              f"{t['median']:7.1f} ms {t['p90']:7.1f} ms  {rows[name]['fps']:.1f}")
    return about, rows


def identity(device, dtype, frame):
    """What a latency is only valid for: device, torch, threads, dtype, frame (H, W)."""
    return {"device": device_name(device), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."),
            "frame": list(frame)}


def table_path(folder, about):
    """Where the table of this device, torch, threads, dtype and frame lives under `folder`."""
    code = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    return Path(folder) / f"latency_{about['frame'][0]}x{about['frame'][1]}_{code}.json"


def read_table(path, about):
    """dict entry -> ms from a table file; InputError if damaged or measured under other terms."""
    stored = read_json(path, "latency table")
    advice = "delete it to measure again"
    if not (isinstance(stored, dict) and isinstance(stored.get("ms"), dict)
            and isinstance(stored.get("about"), dict)):
        raise InputError(f"{path} is not a latency table; {advice}")
    for key, value in about.items():
        if stored["about"].get(key) != value:
            raise InputError(f"{path} was measured with {key} {stored['about'].get(key)}, this run "
                             f"has {value}; {advice}")
    if not all(isinstance(v, float) and 0 < v < 1e7 for v in stored["ms"].values()):
        raise InputError(f"{path} holds a latency that is not a positive number; {advice}")
    return stored["ms"]


def build_table(entries, device, frame, folder="runs", dtype=torch.float32, rounds=9, chunk=24):
    """Measure each entry that the stored table lacks; returns dict entry -> median ms.

    entries: dict entry -> (function that makes the module, [input shapes]). The table is stored
    after every chunk, so an interrupted run continues. Under torchrun rank 0 measures for all.
    """
    about = identity(device, dtype, frame)
    path, ms = table_path(folder, about), {}
    if rank() == 0:
        if path.exists():
            ms = read_table(path, about)
        missing = [key for key in entries if key not in ms]
        random.Random(0).shuffle(missing)       # neighbours in time are not neighbours in size
        for i in range(0, len(missing), chunk):
            with torch.random.fork_rng():       # a run is the same with and without a stored table
                calls = {key: prepare(entries[key][0](), entries[key][1], device, dtype)
                         for key in missing[i:i + chunk]}
            ms.update({k: v["median"] for k, v in measure_many(calls, device, rounds).items()})
            write_text(path, json.dumps({"about": about, "ms": ms}, indent=0, sort_keys=True))
            done = min(i + chunk, len(missing))
            if done == len(missing) or i // chunk % 8 == 0:
                print(f"latency table: {done}/{len(missing)} operators -> {path}", flush=True)
    if world_size() > 1:
        box = [ms]
        dist.broadcast_object_list(box)
        ms = box[0]
    return {key: ms[key] for key in entries}


def pearson(xs, ys):
    """Linear correlation coefficient of two equally long lists."""
    return float(torch.corrcoef(torch.tensor([xs, ys], dtype=torch.float64))[0, 1])


# ---------------------------------------------------------------------------------------------
# The bench: tables, single networks, and Figure 3 of the FasterSeg paper
# ---------------------------------------------------------------------------------------------


def correlation(args, cfg, device, dtype):
    """FasterSeg, App. E and Figure 3: random networks, LUT estimate against measurement."""
    import fastersg
    ms = build_table(fastersg.latency_entries(cfg, 19, args.size), device, args.size, args.out,
                     dtype, args.rounds)
    generator = random.Random(args.seed)
    nets = [fastersg.random_architecture(cfg, generator) for _ in range(args.correlation)]
    estimates = [fastersg.table_latency(net, ms, 19) for net in nets]
    calls = {i: prepare(fastersg.FasterSeg(net, 19), [(1, 3, *args.size)], device, dtype)
             for i, net in enumerate(nets)}
    real = [r["median"] for r in measure_many(calls, device, args.rounds).values()]
    r = pearson(estimates, real)
    ratio = statistics.median(a / b for a, b in zip(estimates, real))
    picture = Path(args.out) / "latency_correlation.png"
    scatter_chart(picture, f"Table estimate against measurement, {args.size[0]}x{args.size[1]}",
                  "estimate (ms)", "measured (ms)", {"network": list(zip(estimates, real))},
                  diagonal=True, annotate=f"r = {r:.4f}")
    print(f"{len(nets)} random networks, {min(real):.1f} to {max(real):.1f} ms: Pearson r = {r:.4f}"
          f" (paper, Figure 3: 0.993), median estimate / measured = {ratio:.3f}\n"
          f"picture: {picture}")


def parse(argv):
    p = argparse.ArgumentParser(prog="latency.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", action="store_true", help="build or complete FasterSeg's table")
    p.add_argument("--time", metavar="ARCH", help="time a network: paper, or an arch.json")
    p.add_argument("--correlation", type=int, metavar="N", help="N random networks, at least 3")
    p.add_argument("--size", type=int, nargs=2, default=[320, 640], metavar=("H", "W"))
    p.add_argument("--widths", type=int, nargs="+", default=[4, 8, 12], help="expansion ratios chi")
    p.add_argument("--layers", type=int, default=16, help="L")
    p.add_argument("--rounds", type=int, default=15, help="turns of each operator and network")
    p.add_argument("--threads", type=int, help="CPU threads [torch's default]")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs", help="folder of tables and pictures")
    args = p.parse_args(argv)
    if not (args.table or args.time or args.correlation is not None):
        p.print_help()
        raise InputError("choose one, for example: python latency.py --correlation 40")
    args.size = tuple(args.size)
    if min(args.size) < 32 or args.rounds < 1:
        raise InputError("--size needs 32 pixels or more a side, and --rounds 1 or more")
    if args.correlation is not None and args.correlation < 3:
        raise InputError("--correlation needs 3 networks or more")
    return args


def main(argv=None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {args.device} is not usable here; try --device cpu")
    dtype = DTYPES[args.dtype]
    import fastersg          # only the bench knows a paper; the tools above know modules
    cfg = fastersg.Config(widths=tuple(args.widths), layers=args.layers)
    fastersg.check(cfg)
    if args.table:
        ms = build_table(fastersg.latency_entries(cfg, 19, args.size), device, args.size, args.out,
                         dtype, args.rounds)
        print(f"{len(ms)} entries in {table_path(args.out, identity(device, dtype, args.size))}")
    if args.time:
        net = fastersg.FasterSeg(fastersg.load_architecture(args.time, "student"), 19)
        print(json.dumps(measure(net, (1, 3, *args.size), device, dtype, args.rounds)))
    if args.correlation is not None:
        correlation(args, cfg, device, dtype)


if __name__ == "__main__":
    run_main(main)
