"""Latency: measuring modules, a table of operator latencies (LUT), a bench of whole networks.

How it is measured: eval mode, BN folded, no gradients, after warm-up, synchronised. On a CPU wall
time counts; on a GPU CUDA events, of a CUDA graph, because a small kernel runs in less time than
Python takes to launch it. Candidates take turns, so that a slow moment of the machine hits all of
them, and the median over the turns is reported with the 90th percentile. Backends are never mixed
in one table: `conditions` says what a latency is valid for, and stands beside every number.

    latency.measure({"a": latency.prepare(net, [(1, 3, 512, 512)], device)}, device)["a"]["median"]

It knows no paper. `python fastersg.py --bench --correlation 40` measures how well a table predicts
whole networks.
"""
import hashlib
import json
import platform
import random
import re
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common import (InputError, count_macs, count_params, fold_bn, rank, read_json,
                    world_size, write_json)

# Shorter calls are repeated within one sample, at most 20 times, to rise above the timer's noise.
SHORTEST_MS = 1.0


def milliseconds(call, repeats, device):
    """Milliseconds of one call, averaged over `repeats` calls in a row."""
    if device.type == "cuda":
        # The GPU's own clock: a call returns before its kernels have run.
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
def measure(calls, device, rounds=15):
    """Time candidates in turn. calls: dict name -> function without arguments; device: where they
    run. Returns dict name -> {"median", "p90"} in ms.
    """
    device = torch.device(device)
    repeats, samples = {}, {name: [] for name in calls}
    # Events belong to the current GPU: on another one than the kernels' they would measure nothing.
    with torch.cuda.device(device if device.type == "cuda" else -1):        # -1: none
        for name, call in calls.items():                                    # warm-up
            for _ in range(10 if device.type == "cuda" else 2):
                first = milliseconds(call, 1, device)
            repeats[name] = max(1, round(SHORTEST_MS / max(first, SHORTEST_MS / 20)))
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(milliseconds(call, repeats[name], device))
    return {name: {"median": statistics.median(ms), "p90": sorted(ms)[int(0.9 * rounds)]}
            for name, ms in samples.items()}


@torch.no_grad()
def prepare(module, shapes, device, dtype=torch.float32, channels_last=False, compiled=False):
    """A function without arguments that runs a copy of the module, its BN folded, once.

    shapes: one (B, C, H, W) an input; the inputs are random numbers, drawn here and now.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = fold_bn(module).to(device, dtype).to(memory_format=layout)
    inputs = [torch.randn(shape).to(device, dtype, memory_format=layout) for shape in shapes]
    forward = torch.compile(module) if compiled else module
    if torch.device(device).type != "cuda":
        return lambda: forward(*inputs)
    return captured(lambda: forward(*inputs))


def captured(call):
    """The kernels of the call as one CUDA graph; returns what replays it. Leaves cudnn's search for
    the fastest algorithms on."""
    torch.backends.cudnn.benchmark = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):              # compiles and chooses algorithms, which no graph may hold
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_=call):                 # the graph reads memory that belongs to the call
        graph.replay()
    return replay


def device_name(device):
    """What latencies depend on: the GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return name[1] if name else platform.processor() or platform.machine()


def conditions(device, dtype, frame, channels_last=False, compiled=False):
    """What a latency is valid for: dict of device, dtype, threads, versions, frame (H, W)."""
    gpu = torch.device(device).type == "cuda"
    # Convolutions of float32 tensors run in TF32 on a GPU unless told otherwise: 10-bit mantissas.
    short = gpu and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return {"device": device_name(device), "torch": str(torch.__version__),
            "threads": None if gpu else torch.get_num_threads(),
            "dtype": "tf32" if short else str(dtype).removeprefix("torch."),
            "layout": "NHWC" if channels_last else "NCHW", "compiled": compiled, "graph": gpu,
            "frame": list(frame)}


def compare(nets, frame, cfg):
    """Parameters, conv MACs and latency of networks, measured in turn and printed as a table.

    nets: dict name -> network for one (1, 3, *frame) picture; cfg: device, amp, compile and
    channels_last count. Returns (the conditions, dict name -> its numbers).
    """
    dtype, options = torch.bfloat16 if cfg.amp else torch.float32, (cfg.channels_last, cfg.compile)
    calls = {name: prepare(net, [(1, 3, *frame)], cfg.device, dtype, *options)
             for name, net in nets.items()}
    about, rows = conditions(cfg.device, dtype, frame, *options), {}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + ", batch 1, BN folded")
    print(f"{'network':28s} {'params':>11s} {'conv MACs':>11s} {'median':>10s} {'p90':>10s}  FPS")
    for name, t in measure(calls, cfg.device).items():
        net = nets[name]
        rows[name] = {"params": count_params(net), "conv_macs": count_macs(net, frame),
                      "median_ms": t["median"], "p90_ms": t["p90"], "fps": 1e3 / t["median"]}
        print(f"{name:28s} {rows[name]['params']:11,d} {rows[name]['conv_macs'] / 1e9:9.3f} G "
              f"{t['median']:7.1f} ms {t['p90']:7.1f} ms  {rows[name]['fps']:.1f}")
    return about, rows


def write_bench(cfg, about, rows):
    """bench.json: what compare() has returned, and what was added to the rows since."""
    write_json(Path(cfg.out) / "bench.json", {**about, "networks": rows})
    print(f"in {cfg.out}: bench.json")


def build_table(entries, device, frame, folder="runs", rounds=9, chunk=24):
    """Measure each entry that the stored table lacks; returns dict entry -> median ms.

    entries: dict entry -> (function that makes the module, [input shapes]). The table is stored
    after every chunk, so an interrupted run continues. Under torchrun rank 0 measures for all.
    Raises InputError: a stored table that is damaged or of other conditions.
    """
    about, ms = conditions(device, torch.float32, frame), {}
    # One file for each kind of conditions.
    code = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    path = Path(folder) / f"latency_{frame[0]}x{frame[1]}_{code}.json"
    if rank() == 0:
        if path.exists():
            stored = read_json(path, "latency table")
            ms = stored.get("ms")
            valid = isinstance(ms, dict) and all(isinstance(v, float) and v > 0
                                                 for v in ms.values())
            if stored.get("about") != about or not valid:
                raise InputError(f"{path} is damaged, or of other conditions than its name says; "
                                 "delete it to measure again")
        missing = [key for key in entries if key not in ms]
        random.Random(0).shuffle(missing)       # neighbours in time are not neighbours in size
        for i in range(0, len(missing), chunk):
            with torch.random.fork_rng():       # on a CPU a run is the same with a stored table
                calls = {key: prepare(entries[key][0](), entries[key][1], device)
                         for key in missing[i:i + chunk]}
            for key, times in measure(calls, device, rounds).items():
                ms[key] = times["median"]
            write_json(path, {"about": about, "ms": ms})
        print(f"latency table: {len(missing)} operators measured -> {path}", flush=True)
    box = [ms]
    if world_size() > 1:                        # or the ranks would search by different latencies
        dist.broadcast_object_list(box)
    return {key: box[0][key] for key in entries}
