"""Speed, measured on the spot: training, play, memory, and how the cost of a frame grows. About two minutes on two cores.

    python bench.py --json results/bench.json
    python bench.py --peer-size --peer ../tinyworlds    # at the sizes of a public peer, and the peer itself in the same run
    python bench.py --large                             # for GPUs: a dynamics model of 140 M parameters, and what each trick brings it
    python bench.py --beside                            # what a second training on the same cores costs: eight minutes

Models have random weights and the footage is the dummy world: speed does not depend on either, but for the wait for a file, which
--data-path measures. Training steps are whole ones (data, forward, backward, clipping, optimizer); utilisation is their matrix-product
FLOPs per second over what this machine reaches on one large product, measured first. Numbers are medians. Machines are noisy: compare
ratios of one run, not numbers of two.
"""
import json
import os
import resource
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from config import PRESETS, DynamicsConfig, Parser, TokenizerConfig, UserError, choose_device, make_folder, print_user_errors

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_utils import Clips, TokenClips, dummy_world, open_footage, to_float
from models.dynamics import DynamicsModel
from models.latent_action_model import LatentActionModel
from models.st_transformer import SpatioTemporalTransformer, causal_band
from models.video_tokenizer import VideoTokenizer
from models.world_model import WorldModel
from optimizer import make_optimizer
from play import DEFAULT
from speedrun import describe_device, git_commit
from train_utils import autocast_on, reuse_memory, wrap

LARGE = dict(embed_dim=1024, hidden_dim=4096, n_heads=16, n_blocks=6)
PEER = dict(batch_size=8, context_length=4, embed_dim=128, hidden_dim=512, n_heads=4, n_blocks=4, steps=10, temperature=1.0)


def seconds(action, device, repeats=12, warm_up=4):
    """Sorted durations of `repeats` calls, once warm."""
    durations = []
    for i in range(warm_up + repeats):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    return sorted(durations[warm_up:])


def median(values):
    return values[len(values) // 2]


def ceiling(device, dtype):
    """FLOPs per second of one large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, dtype=dtype, device=device)
    return 2 * n**3 / seconds(lambda: a @ a, device, repeats=20)[0]


def build(settings, device):
    """The three models with the sizes of a preset, or of the peer: settings(stage, name) → value."""
    def sizes(stage):  # fmt: skip
        names = ("embed_dim", "hidden_dim", "n_heads", "n_blocks", "context_length")
        return {name: settings(stage, name) for name in names}

    frames = dict(frame_size=[64, 64], patch_size=8)
    levels = list(TokenizerConfig.levels)
    return {
        "tokenizer": VideoTokenizer(levels=levels, **frames, **sizes("tokenizer")).to(device),
        "lam": LatentActionModel(n_actions=8, **frames, **sizes("lam")).to(device),
        "dynamics": DynamicsModel(grid=[8, 8], levels=levels, n_actions=8, **sizes("dynamics")).to(device),
    }


def training_step(network, model, optimizer, batch, cfg, autocast):
    with autocast():
        loss, _ = network(*batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def bench_training(models, footage, cfg, device, autocast, ceilings):
    """Whole training steps of each stage, and of the dynamics model also without the token cache."""
    result, waits = {}, []
    clips = Clips(footage, "train", cfg.context_length, cfg.batch_size)
    tokenizer, lam = models["tokenizer"], models["lam"]

    @torch.no_grad()
    def label(frames, _):
        video = to_float(frames, device)
        with autocast():
            return tokenizer.eval().encode(video), lam.eval().infer(video)

    began = time.perf_counter()
    labelled = TokenClips(clips, label, "")
    result["train/labelling_frames_per_s"] = labelled.tokens.shape[0] * cfg.context_length / (time.perf_counter() - began)
    batches = {
        "tokenizer": (clips, lambda frames, _: (to_float(frames, device),)),
        "lam": (clips, lambda frames, _: (to_float(frames, device),)),
        "dynamics": (labelled, lambda *batch: tuple(x.to(device, non_blocking=True) for x in batch)),
        "dynamics_uncached": (clips, label),
    }
    for name, (source, prepare) in batches.items():
        model = models[name.removesuffix("_uncached")].train()
        network, optimizer, counter = wrap(model, cfg), make_optimizer(model, cfg), iter(range(10**9))
        waited = []

        def step(source=source, prepare=prepare, network=network, optimizer=optimizer, counter=counter, waited=waited, model=model):
            began = time.perf_counter()
            batch = source.batch(next(counter))
            waited.append(time.perf_counter() - began)
            batch = prepare(*batch)
            model.train()
            training_step(network, model, optimizer, batch, cfg, autocast)

        durations = seconds(step, device)
        typical = median(durations)
        frames = cfg.batch_size * cfg.context_length
        waits.append(sum(waited[4:]) / sum(durations))
        result |= {f"train/{name}_frames_per_s": frames / typical, f"train/{name}_tokens_per_s": 64 * frames / typical}
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):  # fused attention on a CPU would not be counted
            step()
        result[f"train/{name}_gflops"] = flops.get_total_flops() / typical / 1e9
        result[f"train/{name}_utilisation"] = flops.get_total_flops() / typical / ceilings["bfloat16" if autocast.keywords["enabled"] else "float32"]
    return result | {"train/data_wait": max(waits)}


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
    """Steps of a dynamics model on tokens that lie on the device: against the roof, and what each thing brings, as its step's time over the usual one's."""
    T, N = cfg.context_length, 64
    tokens, actions = torch.randint(1024, (cfg.batch_size, T, N), device=device), torch.randint(8, (cfg.batch_size, T - 1), device=device)

    def step_of(change=lambda model: model, batch=cfg.batch_size, unfused=False, **settings):
        model = DynamicsModel(grid=[8, 8], levels=[4] * 5, n_actions=8, context_length=T, **sizes).to(device)
        optimizer, network = make_optimizer(model, replace(cfg, **settings)), wrap(model, replace(cfg, compile=False, **settings))
        network = change(network)
        for group in optimizer.param_groups if unfused else ():
            group["fused"] = False

        return (lambda: training_step(network, model, optimizer, (tokens[:batch], actions[:batch]), cfg, autocast)), model

    def time_of(**changes):
        return median(seconds(step_of(**changes)[0], device))

    usual, model = step_of()
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        usual()
    usual, parameters = median(seconds(usual, device)), sum(p.numel() for p in model.parameters())
    moved = 4 * 8 * parameters  # weights, gradients and two moments, read and written: what a step of any batch must move at least
    result = {"parameters": parameters, "step_ms": 1e3 * usual, "frames_per_s": cfg.batch_size * T / usual, "utilisation": flops.get_total_flops() / usual / peak,
              "roof_ms": 1e3 * max(flops.get_total_flops() / peak, moved / bandwidth(device))}  # fmt: skip
    del model
    rows = {"AdamW instead of Muon": dict(optimizer="adamw"), "AdamW, not fused": dict(optimizer="adamw", unfused=True), "activations recomputed": dict(recompute=True)}
    if cfg.compile or device.type == "cuda":
        rows |= {"compiled whole": dict(change=torch.compile), "compiled per block": dict(change=per_block)}
    result |= {f"time/{name}": time_of(**changes) / usual for name, changes in rows.items()}
    with sdpa_kernel(SDPBackend.MATH):
        result["time/attention not fused"] = time_of() / usual
    result["time/half the batch, per clip"] = 2 * time_of(batch=cfg.batch_size // 2) / usual
    return {f"pieces/{name}": value for name, value in result.items()}


def make_world(models, cfg):
    return WorldModel(*(models[stage].eval() for stage in ("tokenizer", "lam", "dynamics")), steps=cfg.steps, temperature=cfg.temperature)


def bench_play(models, cfg, device, autocast):
    """Frames per second for 1, 8 and 64 worlds at once; the shipped world as it is."""
    result, frames, world = {}, torch.from_numpy(dummy_world(300)[0]), make_world(models, cfg)
    for n in (1, 8, 64, 256) if device.type == "cuda" else (1, 8, 64):
        with autocast_on(device, "float32")() if n == 1 else autocast():  # bfloat16 pays from a few worlds on
            world.reset(torch.stack([frames[i : i + 4] for i in range(n)]))
            times = seconds(lambda n=n: world.step([1] * n), device, repeats={1: 200, 8: 20}.get(n, 6))
        result[f"play/fps_b{n}"] = n / median(times)
        if n == 1:
            result |= {"play/latency_p50_ms": 1e3 * median(times), "play/latency_p99_ms": 1e3 * times[int(0.99 * len(times))]}
    result["play/batch_gain_b64"] = result["play/fps_b64"] / result["play/fps_b1"]
    if device.type == "cuda":  # the same step, not recorded as a CUDA graph
        world = WorldModel(world.tokenizer, world.lam, world.dynamics, steps=cfg.steps, temperature=cfg.temperature, capture=False)
        world.reset(frames[:4])
        result["play/graph_gain"] = median(seconds(lambda: world.step(1), device, repeats=100)) / (result["play/latency_p50_ms"] / 1e3)
    shipped = WorldModel.load(DEFAULT, device)
    shipped.reset(shipped.start_frames[0])
    return result | {"play/shipped_fps": 1 / median(seconds(lambda: shipped.step(1), device, repeats=100))}


def bench_age(models, cfg, device, age):
    """Latency of a young and of an old world, in turn, and what growing old does to memory."""
    old, young = make_world(models, cfg), make_world(models, cfg)
    for world in (old, young):
        world.reset(dummy_world(300)[0][:4])
        for _ in range(10):
            world.step(1)
    memory = memory_now(device)
    for _ in range(age - 64):
        old.step(1)
    pairs = [[seconds(lambda world=world: world.step(1), device, repeats=1, warm_up=0)[0] for world in (young, old)] for _ in range(50)]  # in turn
    result = {f"play/latency_frame_{n}_ms": 1e3 * median(sorted(times)) for n, times in zip((20, age), zip(*pairs))}
    return result | {"play/memory_growth_mb": memory_now(device) - memory}


def bench_growth(device):
    """One pass for a new frame (E 128, 4 blocks), as a function of the frames in its window and of the patches in a frame.

    Time is a + b·T: attention over time takes over where b·T = a. It is a + b·N + c·N²: attention in space takes over where c·N² = b·N.
    """
    times = {}
    for T, N in [(8, 64), (16, 64), (32, 64), (64, 64), (8, 256), (8, 1024)]:
        model = SpatioTemporalTransformer(128, 512, 4, 4, T).to(device).eval()
        cache = model.new_cache()
        with torch.no_grad():
            model(torch.randn(1, T - 1, N, 128, device=device), cache=cache, finished=True)
            x = torch.randn(1, 1, N, 128, device=device)
            times[T, N] = median(seconds(lambda model=model, x=x, cache=cache: model(x, cache=cache), device, repeats=60))
    T, N = np.array([8, 16, 32, 64]), np.array([64, 256, 1024])
    over_T, over_N = np.array([times[t, 64] for t in T]), np.array([times[8, n] for n in N])
    (slope, start), (square, linear, _) = np.polyfit(T, over_T, 1), np.polyfit(N, over_N, 2)
    return {f"growth/pass_T{t}_N{n}_ms": 1e3 * value for (t, n), value in times.items()} | {
        "growth/exponent_T": float(np.polyfit(np.log(T), np.log(over_T), 1)[0]),
        "growth/exponent_N": float(np.polyfit(np.log(N), np.log(over_N), 1)[0]),
        "growth/time_takes_over_at_T": float(start / slope),
        "growth/space_takes_over_at_N": float(linear / square),
    }


def bench_attention(device):
    """Fused over plain attention, forward and backward, as ratios of time: what `attend` in models/st_transformer.py decides by."""
    result = {}
    shapes = {"space_64": ((32, 4, 64, 32), None), **{f"time_{T}": ((512, 4, T, 32), causal_band(T, T, T, device)) for T in (4, 8, 16, 32)}}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (shape, mask) in shapes.items():
            q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

            def plain(q=q, k=k, v=v, mask=mask):
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
                scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
                (scores.softmax(dim=-1) @ v).sum().backward()

            def fused(q=q, k=k, v=v, mask=mask):
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

            result[f"attention/{name}_{str(dtype)[6:]}_fused_over_plain"] = median(seconds(fused, device)) / median(seconds(plain, device))
    return result


def print_step_time(kind, duration):
    """Train a stage with the `cpu` preset's sizes, or play the shipped world, for so many seconds; print the median seconds of a step."""
    device, autocast = torch.device("cpu"), autocast_on(torch.device("cpu"))
    cfg = DynamicsConfig(dtype="bfloat16" if autocast.keywords["enabled"] else "float32")
    if kind == "play":
        world = WorldModel.load(DEFAULT)
        world.reset(world.start_frames[0])

        def step():
            world.step(1)
    else:
        model = build(lambda stage, name: getattr(DynamicsConfig if stage == "dynamics" else TokenizerConfig, name), device)[kind]
        B, T = cfg.batch_size, cfg.context_length
        tokens = torch.randint(1024, (B, T, 64)), torch.randint(8, (B, T - 1))
        batch = tokens if kind == "dynamics" else (torch.rand(B, T, 3, 64, 64) * 2 - 1,)
        optimizer = make_optimizer(model, cfg)

        def step():
            training_step(model, model, optimizer, batch, cfg, autocast)

    reuse_memory()
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < duration:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(median(sorted(times[len(times) // 3 :])))  # the first third is for warming up, and until others have started, too


def bench_beside(kinds=("tokenizer", "lam", "dynamics", "play"), duration=25):
    """How much longer a step takes beside a training of the tokenizer, with the short spin of config.py and with OpenMP's usual one."""
    result = {}
    for spin, count in (("short_spin", "1000"), ("usual_spin", "300000")):  # libgomp's manual names the usual one
        for kind in kinds:

            def start(kind, duration, count=count):
                command = [sys.executable, "-c", f"import bench; bench.print_step_time({kind!r}, {duration})"]
                return subprocess.Popen(command, cwd=Path(__file__).parent, env={**os.environ, "GOMP_SPINCOUNT": count}, stdout=subprocess.PIPE, text=True)

            alone = float(start(kind, duration / 2).communicate()[0])
            other, child = start("tokenizer", 2 * duration), start(kind, duration)
            beside = float(child.communicate()[0])
            other.kill()
            other.communicate()
            result |= {f"beside/{kind}_{spin}_alone_ms": 1e3 * alone, f"beside/{kind}_{spin}_beside_ms": 1e3 * beside, f"beside/{kind}_{spin}": beside / alone}
    return result


def peak_memory(device):
    """Megabytes: of the GPU, or of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_now(device):
    """Megabytes: of the GPU, or of the process (Linux; elsewhere the peak must do)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20 if statm.exists() else peak_memory(device)


def bench_peer(folder):
    """extras/peer.py in a process of its own: its packages have the same names as ours."""
    script = Path(__file__).parent / "extras" / "peer.py"
    result = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"--peer {folder} cannot be measured: {(result.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def table(report):
    """The README's table of speed, from a run with --peer-size and --peer."""
    rows = {
        "training: tokenizer": "train/tokenizer_frames_per_s",
        "training: latent actions": "train/lam_frames_per_s",
        "training: dynamics, tokens computed once": "train/dynamics_frames_per_s",
        "training: dynamics, tokens computed for each batch": "train/dynamics_uncached_frames_per_s",
        "play: one world": "play/fps_b1",
        "play: 64 worlds at once": "play/fps_b64",
    }
    lines = ["| frames per second | here | tinyworlds | ratio |", "|---|---|---|---|"]
    for what, name in rows.items():
        peer = [f"{report[f'peer/{name}']:.3g}", f"{report[f'ratio/{name}']:.2g}"] if f"peer/{name}" in report else ["", ""]
        lines.append(f"| {what} | " + " | ".join([f"{report[name]:.3g}", *peer]) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="", help="sizes to measure at [what the device suggests]")
    parser.add_argument("--peer-size", action="store_true", help="64×64, patch 8, E 128, hidden 512, 4 blocks, 8 clips of 4 frames, 10 MaskGIT passes")
    parser.add_argument("--peer", default="", metavar="FOLDER", help="a clone of tinyworlds to measure in the same run")
    parser.add_argument("--large", action="store_true", help="only a dynamics model of 140 M parameters, with --batch-size clips a step")
    parser.add_argument("--beside", action="store_true", help="only what a second training on the same CPU cores costs")
    parser.add_argument("--batch-size", type=int, default=0, help="clips a step [the preset's]")
    parser.add_argument("--data-path", default="", metavar="FILE", help="footage to train on, for the time that training waits for it [the dummy world]")
    parser.add_argument("--age", type=int, default=1000, help="frame whose latency is compared with frame 20's [1000]")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    if args.age < 100:
        raise UserError(f"--age must be at least 100 frames, got {args.age}")
    if args.batch_size < 0 or args.batch_size == 1:
        raise UserError(f"--batch-size must be at least 2, got {args.batch_size}")
    if args.json:
        make_folder(Path(args.json).parent)
    reuse_memory()
    torch.manual_seed(0)
    common, stages = PRESETS[preset]

    def settings(stage, name):
        return PEER[name] if args.peer_size else {**common, **stages[stage]}.get(name, getattr(DynamicsConfig if stage == "dynamics" else TokenizerConfig, name))

    chosen = {name: settings("dynamics", name) for name in PEER} | dict(compile=args.compile, out="-", device=str(device))
    chosen |= (LARGE if args.large else {}) | ({"batch_size": args.batch_size} if args.batch_size else {})
    cfg = DynamicsConfig(**chosen)
    footage = open_footage(Namespace(data_path=args.data_path, data_type="auto", use_dummy_data=not args.data_path, frame_size=64))
    autocast = autocast_on(device)
    cfg.dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    peer = [bench_peer(args.peer)] if args.peer and not (args.large or args.beside) else []
    ceilings = {} if args.beside else {str(dtype)[6:]: ceiling(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    report = {f"ceiling/{name}_gflops": value / 1e9 for name, value in ceilings.items()}
    if args.beside:
        report |= bench_beside()
    elif args.large:
        sizes = {name: getattr(cfg, name) for name in LARGE}
        report |= bench_pieces(sizes, cfg, device, autocast, 1e9 * report[f"ceiling/{'bfloat16' if autocast.keywords['enabled'] else 'float32'}_gflops"])
    else:
        models = build(settings, device)
        report |= bench_training(models, footage, cfg, device, autocast, ceilings)
        report |= bench_play(models, cfg, device, autocast)
        if args.peer:  # just before and just after: what else the machine does hits both
            peer.append(bench_peer(args.peer))
        report |= bench_age(models, cfg, device, args.age) | bench_growth(device) | bench_attention(device)
    report["memory/peak_mb"] = peak_memory(device)
    for name in peer[0] if peer else ():
        report[f"peer/{name}"] = sum(run[name] for run in peer) / 2
        report[f"ratio/{name}"] = report[name] / report[f"peer/{name}"]

    for name, value in report.items():
        print(f"{name:44} {value:10.4g}")
    if args.json:
        report |= {"device": describe_device(), "torch": str(torch.__version__), "commit": git_commit(), "preset": "large" if args.large else "peer" if args.peer_size else preset,
                   "command": " ".join(["python bench.py", *(sys.argv[1:] if argv is None else argv)])}  # fmt: skip
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
