"""Measure speed on this machine: training, play, memory, and how the cost of a frame grows.

    python -m tools.bench --json docs/results/bench.json
    python -m tools.bench --peer-size --peer ../tinyworlds    # beside tinyworlds, at its sizes
    python -m tools.bench --large      # for GPUs: 140 M parameters, and the effect of each change
    python -m tools.bench --beside     # two training runs on the same cores: 8 minutes

It takes about two minutes on two cores. Models have random weights and the data is the dummy
world, because speed depends on neither. Only the wait for a file does; --data-path measures that. A
training step includes data, forward, backward, clipping and optimizer. Utilisation is the
matrix-product FLOPs per second of a step, relative to those of one large product on this machine.
Numbers are medians. Timings vary: compare ratios within a run, not numbers of two runs.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from config import PRESETS, DynamicsConfig, TokenizerConfig
from utils.checkpoint import load_world
from utils.cli import Parser, UserError, print_user_errors
from utils.device import autocast_on, choose_device, parallelize
from utils.hardening.files import make_folder
from utils.hardening.settings import preset_values
from utils.optimizer import count_parameters, make_optimizer

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_utils import Clips, TokenClips, dummy_world, open_dataset, to_float
from models.dynamics import DynamicsModel
from models.latent_action_model import LatentActionModel
from models.st_transformer import SpatioTemporalTransformer, causal_band
from models.video_tokenizer import VideoTokenizer
from models.world_model import WorldModel
from player.cuda_graph import graph_on
from player.session import DEFAULT
from tools.speedrun import describe_device, git_commit

ROOT = Path(__file__).resolve().parents[1]
LARGE = dict(embed_dim=1024, hidden_dim=4096, n_heads=16, n_blocks=6)
PEER = dict(batch_size=8, context_length=4, embed_dim=128, hidden_dim=512, n_heads=4, n_blocks=4)
PEER |= dict(steps=10, temperature=1.0)


def seconds(action, device, repeats=12, warm_up=4):
    """Sorted durations of `repeats` calls, after `warm_up` calls that do not count."""
    durations = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    return sorted(durations[warm_up:])


def median(values):
    return values[len(values) // 2]


def ceiling(device, dtype):
    """The machine's peak: FLOPs per second of one large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, dtype=dtype, device=device)
    return 2 * n**3 / seconds(lambda: a @ a, device, repeats=20)[0]


def build(settings, device):
    """The three models with the sizes that settings(stage, name) gives."""

    def sizes(stage):
        names = ("embed_dim", "hidden_dim", "n_heads", "n_blocks", "context_length")
        return {name: settings(stage, name) for name in names}

    frames = dict(frame_size=[64, 64], patch_size=8)
    levels = list(TokenizerConfig.levels)
    return {
        "tokenizer": VideoTokenizer(levels=levels, **frames, **sizes("tokenizer")).to(device),
        "lam": LatentActionModel(n_actions=8, **frames, **sizes("lam")).to(device),
        "dynamics": DynamicsModel(grid=[8, 8], levels=levels, n_actions=8, **sizes("dynamics")).to(
            device
        ),
    }


def training_step(network, model, optimizer, batch, cfg, autocast):
    with autocast():
        loss, _ = network(*batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def bench_training(models, dataset, cfg, device, autocast, ceilings):
    """Training steps of each stage, and of the dynamics model without the token cache."""
    clips = Clips(dataset, "train", cfg.context_length, cfg.batch_size)
    tokenizer, lam = models["tokenizer"], models["lam"]

    @torch.no_grad()
    def label(frames, _):
        video = to_float(frames, device)
        with autocast():
            return tokenizer.eval().encode(video), lam.eval().infer(video)

    def video(frames, _):
        return (to_float(frames, device),)

    def tokens(*batch):
        return tuple(x.to(device, non_blocking=True) for x in batch)

    began = time.perf_counter()
    labelled = TokenClips(clips, label, "")
    n_frames = labelled.tokens.shape[0] * cfg.context_length
    result = {"train/labelling_frames_per_s": n_frames / (time.perf_counter() - began)}
    waits = []
    for name, source, prepare in (
        ("tokenizer", clips, video),
        ("lam", clips, video),
        ("dynamics", labelled, tokens),
        ("dynamics_uncached", clips, label),
    ):
        model = models[name.removesuffix("_uncached")].train()
        values, wait = bench_stage(model, source, prepare, cfg, device, autocast, ceilings)
        result |= {f"train/{name}_{what}": value for what, value in values.items()}
        waits.append(wait)
    return result | {"train/data_wait": max(waits)}


def bench_stage(model, source, prepare, cfg, device, autocast, ceilings):
    """→ (frames, tokens and FLOPs per second, utilisation; the share of time spent on data)."""
    network, optimizer = parallelize(model, cfg), make_optimizer(model, cfg)
    counter, waited = iter(range(10**9)), []

    def step():
        began = time.perf_counter()
        batch = source.batch(next(counter))
        waited.append(time.perf_counter() - began)
        batch = prepare(*batch)
        model.train()
        training_step(network, model, optimizer, batch, cfg, autocast)

    durations = seconds(step, device)
    typical, frames = median(durations), cfg.batch_size * cfg.context_length
    wait = sum(waited[4:]) / sum(durations)
    # the counter does not see fused attention on a CPU
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        step()
    rate = flops.get_total_flops() / typical
    dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    values = {
        "frames_per_s": frames / typical,
        "tokens_per_s": 64 * frames / typical,
        "gflops": rate / 1e9,
        "utilisation": rate / ceilings[dtype],
    }
    return values, wait


def bandwidth(device):
    """Bytes per second of copying one large tensor."""
    a = torch.empty(1 << (28 if device.type == "cuda" else 24), device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), device)[0]


def per_block(model):
    for block in model.transformer.blocks:
        block.compile()
    return model


def bench_pieces(sizes, cfg, device, autocast, peak):
    """Training steps of a dynamics model on tokens that are on the device already.

    → the time of a step with its lower bound (roof_ms), and for each change the time of a step
    relative to the unchanged one.
    """
    T, N = cfg.context_length, 64
    tokens = torch.randint(1024, (cfg.batch_size, T, N), device=device)
    actions = torch.randint(8, (cfg.batch_size, T - 1), device=device)
    fixed = dict(grid=[8, 8], levels=[4] * 5, n_actions=8, context_length=T)

    def step_of(change=lambda model: model, batch=cfg.batch_size, unfused=False, **settings):
        model = DynamicsModel(**fixed, **sizes).to(device)
        optimizer = make_optimizer(model, replace(cfg, **settings))
        network = change(parallelize(model, replace(cfg, compile=False, **settings)))
        if unfused:
            for group in optimizer.param_groups:
                group["fused"] = False
        data = (tokens[:batch], actions[:batch])
        return lambda: training_step(network, model, optimizer, data, cfg, autocast), model

    def time_of(**changes):
        return median(seconds(step_of(**changes)[0], device))

    usual, model = step_of()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        usual()
    flops, parameters = counter.get_total_flops(), count_parameters(model)
    usual = median(seconds(usual, device))
    # in bytes: any step must at least read and write weights, gradients and two moments
    moved = 4 * 8 * parameters
    result = {
        "parameters": parameters,
        "step_ms": 1e3 * usual,
        "frames_per_s": cfg.batch_size * T / usual,
        "utilisation": flops / usual / peak,
        "roof_ms": 1e3 * max(flops / peak, moved / bandwidth(device)),
    }
    del model
    rows = {
        "AdamW instead of Muon": dict(optimizer="adamw"),
        "AdamW, not fused": dict(optimizer="adamw", unfused=True),
        "activations recomputed": dict(recompute=True),
    }
    if cfg.compile or device.type == "cuda":
        rows["compiled whole"] = dict(change=torch.compile)
        rows["compiled per block"] = dict(change=per_block)
    result |= {f"time/{name}": time_of(**changes) / usual for name, changes in rows.items()}
    with sdpa_kernel(SDPBackend.MATH):
        result["time/attention not fused"] = time_of() / usual
    result["time/half the batch, per clip"] = 2 * time_of(batch=cfg.batch_size // 2) / usual
    return {f"pieces/{name}": value for name, value in result.items()}


def make_world(models, cfg, capture=True):
    networks = [models[stage].eval() for stage in ("tokenizer", "lam", "dynamics")]
    device = next(networks[0].parameters()).device
    return WorldModel(
        *networks,
        steps=cfg.steps,
        temperature=cfg.temperature,
        capture=graph_on(device) if capture else None,
    )


def bench_play(models, cfg, device, autocast):
    """Frames per second of 1, 8 and 64 worlds at once, and of the shipped world."""
    result, frames = {}, torch.from_numpy(dummy_world(300)[0])
    world = make_world(models, cfg)
    for n in (1, 8, 64, 256) if device.type == "cuda" else (1, 8, 64):
        # for a single world bfloat16 is no faster
        with autocast_on(device, "float32")() if n == 1 else autocast():
            world.reset(torch.stack([frames[i : i + 4] for i in range(n)]))
            repeats = {1: 200, 8: 20}.get(n, 6)
            times = seconds(lambda n=n: world.step([1] * n), device, repeats=repeats)
        result[f"play/fps_b{n}"] = n / median(times)
        if n == 1:
            result["play/latency_p50_ms"] = 1e3 * median(times)
            result["play/latency_p99_ms"] = 1e3 * times[int(0.99 * len(times))]
    result["play/batch_gain_b64"] = result["play/fps_b64"] / result["play/fps_b1"]
    if device.type == "cuda":
        plain = make_world(models, cfg, capture=False)
        plain.reset(frames[:4])
        time_plain = median(seconds(lambda: plain.step(1), device, repeats=100))
        result["play/graph_gain"] = 1e3 * time_plain / result["play/latency_p50_ms"]
    shipped = load_world(DEFAULT, device, graph_on(device))
    shipped.reset(shipped.start_frames[0])
    time_shipped = median(seconds(lambda: shipped.step(1), device, repeats=100))
    return result | {"play/shipped_fps": 1 / time_shipped}


def bench_age(models, cfg, device, age):
    """Latency at frame 20 and at frame `age`, and how much memory grows in between."""
    old, young = make_world(models, cfg), make_world(models, cfg)
    for world in (old, young):
        world.reset(dummy_world(300)[0][:4])
        for _ in range(10):
            world.step(1)
    memory = memory_now(device)
    for _ in range(age - 64):
        old.step(1)
    times = {20: [], age: []}
    for _ in range(50):
        for n, world in ((20, young), (age, old)):  # alternately, so that other load affects both
            step = partial(world.step, 1)
            times[n].append(seconds(step, device, repeats=1, warm_up=0)[0])
    result = {f"play/latency_frame_{n}_ms": 1e3 * median(sorted(t)) for n, t in times.items()}
    return result | {"play/memory_growth_mb": memory_now(device) - memory}


def bench_growth(device):
    """Time of one pass for a new frame (E 128, 4 blocks), for T frames in the window, N patches."""
    times = {}
    for T, N in [(8, 64), (16, 64), (32, 64), (64, 64), (8, 256), (8, 1024)]:
        model = SpatioTemporalTransformer(128, 512, 4, 4, T).to(device).eval()
        cache = model.new_cache()
        with torch.no_grad():
            model(torch.randn(1, T - 1, N, 128, device=device), cache=cache, finished=True)
            x = torch.randn(1, 1, N, 128, device=device)
            times[T, N] = median(
                seconds(
                    lambda model=model, x=x, cache=cache: model(x, cache=cache), device, repeats=60
                )
            )
    T, N = np.array([8, 16, 32, 64]), np.array([64, 256, 1024])
    over_T, over_N = np.array([times[t, 64] for t in T]), np.array([times[8, n] for n in N])
    return {f"growth/pass_T{t}_N{n}_ms": 1e3 * value for (t, n), value in times.items()} | {
        "growth/exponent_T": float(np.polyfit(np.log(T), np.log(over_T), 1)[0]),
        "growth/exponent_N": float(np.polyfit(np.log(N), np.log(over_N), 1)[0]),
    }


def bench_attention(device):
    """Time of fused relative to plain attention, forward and backward: the basis of `attend`."""
    result = {}
    shapes = {
        "space_64": ((32, 4, 64, 32), None),
        **{f"time_{T}": ((512, 4, T, 32), causal_band(T, T, T, device)) for T in (4, 8, 16, 32)},
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, (shape, mask) in shapes.items():
            q, k, v = (
                torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
            )

            def plain(q=q, k=k, v=v, mask=mask):
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
                scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
                (scores.softmax(dim=-1) @ v).sum().backward()

            def fused(q=q, k=k, v=v, mask=mask):
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

            result[f"attention/{name}_{str(dtype)[6:]}_fused_over_plain"] = median(
                seconds(fused, device)
            ) / median(seconds(plain, device))
    return result


def print_step_time(kind, duration):
    """Train a stage of preset cpu's sizes, or play the shipped world, for `duration` seconds.

    Prints the median duration of a step in seconds.
    """
    device, autocast = torch.device("cpu"), autocast_on(torch.device("cpu"))
    cfg = DynamicsConfig(dtype="bfloat16" if autocast.keywords["enabled"] else "float32")
    if kind == "play":
        world = load_world(DEFAULT)
        world.reset(world.start_frames[0])

        def step():
            world.step(1)
    else:
        model = build(
            lambda stage, name: getattr(
                DynamicsConfig if stage == "dynamics" else TokenizerConfig, name
            ),
            device,
        )[kind]
        B, T = cfg.batch_size, cfg.context_length
        tokens = torch.randint(1024, (B, T, 64)), torch.randint(8, (B, T - 1))
        batch = tokens if kind == "dynamics" else (torch.rand(B, T, 3, 64, 64) * 2 - 1,)
        optimizer = make_optimizer(model, cfg)

        def step():
            training_step(model, model, optimizer, batch, cfg, autocast)

    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < duration:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    # without the first third, in which caches warm up and other processes start
    print(median(sorted(times[len(times) // 3 :])))


def start_beside(kind, duration, spin):
    """Start a process that prints the duration of a step."""
    code = f"from tools import bench; bench.print_step_time({kind!r}, {duration})"
    environment = os.environ | {"GOMP_SPINCOUNT": spin}
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], **options)


def bench_beside(kinds=("tokenizer", "lam", "dynamics", "play"), duration=25):
    """How much longer a step takes while another process trains a tokenizer.

    With the short spin of utils/__init__.py, and with OpenMP's usual one (libgomp's manual).
    """
    result = {}
    for name, spin in (("short_spin", "1000"), ("usual_spin", "300000")):
        for kind in kinds:
            alone = float(start_beside(kind, duration / 2, spin).communicate()[0])
            other = start_beside("tokenizer", 2 * duration, spin)
            beside = float(start_beside(kind, duration, spin).communicate()[0])
            other.kill()
            other.communicate()
            result[f"beside/{kind}_{name}_alone_ms"] = 1e3 * alone
            result[f"beside/{kind}_{name}_beside_ms"] = 1e3 * beside
            result[f"beside/{kind}_{name}"] = beside / alone
    return result


def peak_memory(device):
    """Peak megabytes: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def memory_now(device):
    """Megabytes now: of the GPU, or of the process (its peak where there is no /proc)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    statm = Path("/proc/self/statm")
    return (
        int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
        if statm.exists()
        else peak_memory(device)
    )


def bench_peer(folder):
    """Run tools/peer.py in its own process, because the peer's packages have the names of ours."""
    script = Path(__file__).parent / "peer.py"
    env = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, script]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"--peer {folder} cannot be measured: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def table(report):
    """The table of docs/speed.md, from a report with --peer-size and --peer."""
    rows = {
        "training: tokenizer": "train/tokenizer_frames_per_s",
        "training: latent actions": "train/lam_frames_per_s",
        "training: dynamics, tokens computed once": "train/dynamics_frames_per_s",
        "training: dynamics, tokens computed for each batch": (
            "train/dynamics_uncached_frames_per_s"
        ),
        "play: one world": "play/fps_b1",
        "play: 64 worlds at once": "play/fps_b64",
    }
    lines = ["| frames per second | here | tinyworlds | ratio |", "|---|---|---|---|"]
    for what, name in rows.items():
        peer = (
            [f"{report[f'peer/{name}']:.3g}", f"{report[f'ratio/{name}']:.2g}"]
            if f"peer/{name}" in report
            else ["", ""]
        )
        lines.append(f"| {what} | " + " | ".join([f"{report[name]:.3g}", *peer]) + " |")
    return "\n".join(lines)


def parse(argv):
    parser = Parser(description=__doc__)
    add, switch = parser.add_argument, dict(action="store_true")
    add("--preset", default="", help="sizes to measure at [by device: cpu or gpu]")
    add("--peer-size", **switch, help="E 128, 4 blocks, 8 clips of 4 frames, 10 MaskGIT passes")
    add("--peer", default="", metavar="FOLDER", help="a clone of tinyworlds to measure as well")
    add("--large", **switch, help="measure only a dynamics model of 140 M parameters")
    add("--beside", **switch, help="measure only two training runs on the same cores")
    add("--batch-size", type=int, default=0, help="clips per step [the preset's]")
    add("--data-path", default="", help="data to train on, read from this file [the dummy world]")
    add("--age", type=int, default=1000, help="the frame to compare with frame 20 [1000]")
    add("--compile", **switch, help="torch.compile the models")
    add("--json", default="", metavar="FILE", help="where to write the numbers")
    add("--device", default="auto", help="auto, cpu or cuda [auto]")
    args = parser.parse_args(argv)
    if args.age < 100:
        raise UserError(f"--age must be at least 100 frames, got {args.age}")
    if args.batch_size < 0 or args.batch_size == 1:
        raise UserError(f"--batch-size must be at least 2, got {args.batch_size}")
    return args


def sizes_to_measure(args, preset):
    """→ a function settings(stage, name) of the preset's or the peer's values."""

    def settings(stage, name):
        if args.peer_size:
            return PEER[name]
        kind = DynamicsConfig if stage == "dynamics" else TokenizerConfig
        return preset_values(PRESETS, preset, stage).get(name, getattr(kind, name))

    return settings


def measure(args, cfg, device, settings, autocast):
    """All numbers except the peer's."""
    dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    if args.beside:
        return bench_beside()
    ceilings = {str(d)[6:]: ceiling(device, d) for d in (torch.float32, torch.bfloat16)}
    report = {f"ceiling/{name}_gflops": value / 1e9 for name, value in ceilings.items()}
    if args.large:
        sizes = {name: getattr(cfg, name) for name in LARGE}
        return report | bench_pieces(sizes, cfg, device, autocast, ceilings[dtype])
    dataset = open_dataset(args.data_path, use_dummy_data=not args.data_path)
    models = build(settings, device)
    report |= bench_training(models, dataset, cfg, device, autocast, ceilings)
    report |= bench_play(models, cfg, device, autocast)
    report |= bench_age(models, cfg, device, args.age)
    return report | bench_growth(device) | bench_attention(device)


def main(argv=None):
    args = parse(argv)
    device = choose_device(args.device)
    preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
    preset_values(PRESETS, preset, "tokenizer")  # report a mistake before minutes of measuring
    if args.json:
        make_folder(Path(args.json).parent)
    if args.data_path:
        open_dataset(args.data_path)
    torch.manual_seed(0)
    settings, autocast = sizes_to_measure(args, preset), autocast_on(device)
    chosen = {name: settings("dynamics", name) for name in PEER} | (LARGE if args.large else {})
    if args.batch_size:
        chosen["batch_size"] = args.batch_size
    dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    chosen |= dict(compile=args.compile, out="-", device=str(device), dtype=dtype)
    cfg = DynamicsConfig(**chosen)

    # the peer just before and just after, so that other load affects both
    with_peer = args.peer and not (args.large or args.beside)
    peer = [bench_peer(args.peer)] if with_peer else []
    report = measure(args, cfg, device, settings, autocast)
    if with_peer:
        peer.append(bench_peer(args.peer))
    report["memory/peak_mb"] = peak_memory(device)
    for name in peer[0] if peer else ():
        report[f"peer/{name}"] = sum(run[name] for run in peer) / 2
        report[f"ratio/{name}"] = report[name] / report[f"peer/{name}"]

    for name, value in report.items():
        print(f"{name:44} {value:10.4g}")
    if args.json:
        typed = sys.argv[1:] if argv is None else argv
        report |= {
            "device": describe_device(),
            "torch": str(torch.__version__),
            "commit": git_commit(),
            "preset": "large" if args.large else "peer" if args.peer_size else preset,
            "command": " ".join(["python -m tools.bench", *typed]),
        }
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
