"""Pre-train the encoder on recordings, without their actions: predict the features of hidden patches from the patches that are shown (V-JEPA).

    python extras/vjepa_ac/pretrain.py --data 'data/vpt/train-*.tar' --size nano --out checkpoints/vjepa
    python extras/vjepa_ac/pretrain.py --data 'data/vpt/train-*.tar' --out checkpoints/vjepa      # ViT-L/16, for GPUs

Writes OUT/pretrain.pt; in OUT/pretrain/: metrics.jsonl and loss.png. A falling loss proves nothing here, since targets that are all the same are predicted
best; so feature_std and effective_rank of the target encoder are logged beside it.
"""
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, choose_device, print_user_errors  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from extras.vjepa_ac.model import (  # noqa: E402
    MASKS,
    PATCH,
    SIZES,
    TUBELET,
    Encoder,
    MaskedPredictor,
    block_masks,
    crowding,
    health,
    normalised,
)
from extras.vjepa_ac.vpt import Clips, ProcessVPT, batches, find_shards  # noqa: E402
from models.checkpoint import load_checkpoint  # noqa: E402
from models.distributed import n_ranks  # noqa: E402
from optimizer import make_optimizer, rate_at  # noqa: E402
from train_utils import Run, set_up, wrap  # noqa: E402

STAGE = "pretrain"


class Pretraining(nn.Module):
    """Encoder, predictor, and the target encoder, which follows the encoder slowly. video uint8 (B, T, 3, S, S) → (loss, the targets).

    spread: weight of a penalty on features that crowd into few directions. V-JEPA has none; but with a batch of 16 instead of 3,072 and minutes
    instead of days, what is predicted best is brightness, and without it the features end with an effective rank of 4 out of 192.
    """

    def __init__(self, size, tubelets, encoder, masked, spread=0.0):
        super().__init__()
        self.encoder = Encoder(size, *encoder)
        self.predictor = MaskedPredictor(size // PATCH, tubelets, encoder[0], *masked)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.tubelets, self.spread = tubelets, spread

    def forward(self, video):
        with torch.no_grad():
            targets = normalised(self.target(video).float())  # (B, T/2·N, E)
        loss = 0.0
        for kind, mask in enumerate(MASKS):
            shown, hidden = block_masks(len(video), self.tubelets, self.encoder.grid, *mask, video.device)
            seen = self.encoder(video, shown)
            predicted = self.predictor(seen, shown, hidden, kind)
            truth = targets.gather(1, hidden[..., None].expand(-1, -1, targets.shape[2]))
            loss = loss + (predicted - truth).abs().mean() / len(MASKS)
            if self.spread:  # less the mean of each place, else saying where one is would count as variety
                loss = loss + self.spread * crowding((normalised(seen.float()) - targets.mean(0)[shown]).flatten(0, 1)) / len(MASKS)
        return loss, targets

    @torch.no_grad()
    def follow(self, momentum):
        for slow, fast in zip(self.target.parameters(), self.encoder.parameters()):
            slow.lerp_(fast, 1 - momentum)


def parser_of(description):
    """What pretrain.py and train.py have in common. The defaults are the seed's; a smaller --size has its own, in model.py."""
    parser = Parser(description=description)
    parser.add_argument("--data", nargs="+", required=True, metavar="TAR", help="shards of recordings; patterns are fine")
    parser.add_argument("--out", required=True, help="folder, for example checkpoints/vjepa")
    parser.add_argument("--size", choices=SIZES, default="vit-l", help="[vit-l]; nano for a CPU, which also changes the defaults below")
    parser.add_argument("--num-frames", type=int, default=16, help="frames of a clip [16]")
    parser.add_argument("--fps", type=int, default=5, help="frames per second of a clip [5]")
    parser.add_argument("--every", type=int, default=64, help="ticks from the start of one clip to the next one's [64]")
    parser.add_argument("--buffer", type=int, default=64, help="clips that are mixed [64]")
    parser.add_argument("--mirror", type=float, default=0.0, help="share of the clips in which left and right change places [0]")
    parser.add_argument("--workers", type=int, default=1, help="processes that read [1]")
    parser.add_argument("--max-problems", type=int, default=100, help="broken recordings, lines and unknown keys before it stops [100]")
    parser.add_argument("--n-updates", type=int, default=2000, help="[2000]")
    parser.add_argument("--batch-size", type=int, default=8, help="clips per process [8]")
    parser.add_argument("--learning-rate", type=float, help="peak")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="[adamw]; muon needs fewer steps")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints [500]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with the next clip")
    return parser


def parse(parser, stage, argv):
    """The command line, over the defaults of --size; bad numbers are refused, and what train_utils.py wants to know is added."""
    parser.set_defaults(**SIZES[parser.parse_args(argv).size][stage])
    cfg = parser.parse_args(argv)
    for name in ("num_frames", "fps", "every", "workers", "n_updates", "batch_size", "learning_rate", "save_every", "max_problems"):
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(cfg, name)}")
    if min(cfg.buffer, cfg.seed) < 0 or not 0 <= cfg.mirror <= 1:
        raise UserError(f"--buffer {cfg.buffer} and --seed {cfg.seed} must not be negative, and --mirror must lie in 0 … 1, got {cfg.mirror}")
    if cfg.num_frames % TUBELET:
        raise UserError(f"--num-frames must be even, got {cfg.num_frames}: a tubelet has {TUBELET}")
    cfg.device = str(choose_device(cfg.device))
    cfg.data_path, cfg.data_type, cfg.use_dummy_data = " ".join(cfg.data), "shards", False
    cfg.accumulate, cfg.compile, cfg.recompute = 1, False, False
    return cfg


def reading(cfg):
    """What must not change for a resumed stream to go on with the next clip."""
    return {name: getattr(cfg, name) for name in ("data", "num_frames", "fps", "every", "buffer", "mirror", "workers", "seed")} | {"processes": n_ranks()}


class Stream:
    """Endless batches of clips on the device. It knows how long the loop has waited for them, and where each reader is."""

    def __init__(self, cfg, process, shards, passed=None):
        self.passed, self.device, self.waited, self.began = dict(passed or {}), cfg.device, 0.0, time.perf_counter()
        clips = Clips(shards, process, cfg.every, cfg.buffer, cfg.seed, max_problems=cfg.max_problems, passed=self.passed, mirror=cfg.mirror)
        self.batches = batches(clips, cfg.batch_size, cfg.workers)

    def positions(self):
        """How far the readers of all processes are, for the checkpoint."""
        if n_ranks() == 1:
            return dict(self.passed)
        everywhere = [None] * n_ranks()
        dist.all_gather_object(everywhere, self.passed)
        return {reader: n for passed in everywhere for reader, n in passed.items()}

    def next(self, *names):
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        self.passed[str(int(batch["worker"][0]))] = int(batch["position"].max())
        return [batch[name].to(self.device, non_blocking=True) for name in names]

    def share(self):
        """Share of the time since the last question that the loop has waited."""
        now = time.perf_counter()
        share, self.waited, self.began = self.waited / (now - self.began), 0.0, now
        return share


def main(argv=None):
    # --- settings and set-up
    parser = parser_of(__doc__)
    parser.add_argument("--ema", type=float, default=0.99925, help="share of the target encoder that stays, each step [0.99925]")
    parser.add_argument("--spread", type=float, default=0.0, help="weight of a penalty on features that crowd into few directions [0]")
    cfg = parse(parser, STAGE, argv)
    if not 0 <= cfg.ema < 1 or cfg.spread < 0:
        raise UserError(f"--ema must lie in 0 … 1, got {cfg.ema}, and --spread not be negative, got {cfg.spread}")
    device, autocast = set_up(cfg)

    # --- data
    sizes = SIZES[cfg.size]
    shards = find_shards(cfg.data)
    process = ProcessVPT(cfg.num_frames, cfg.fps, TUBELET, sizes["size"])

    # --- model
    model_args = dict(size=sizes["size"], tubelets=cfg.num_frames // TUBELET, encoder=list(sizes["encoder"]), masked=list(sizes["masked"]), spread=cfg.spread)
    model = Pretraining(**model_args).to(device)
    network = wrap(model, cfg)
    print(f"model: {sum(p.numel() for p in model.encoder.parameters()):,} parameters in the encoder, {sum(p.numel() for p in model.predictor.parameters()):,} in the predictor")

    # --- optimizer and schedule
    optimizer = make_optimizer(model, cfg)

    # --- output folder and resume
    run = Run(cfg, STAGE)
    first, n_updates = run.open(model, optimizer, cfg.n_updates, model_args=model_args, reading=reading(cfg))
    stream = Stream(cfg, process, shards, load_checkpoint(run.path, STAGE)["passed"] if first else None)
    done = first

    # --- loop
    bar = tqdm(range(first, n_updates), initial=first, total=n_updates, unit="step", desc=STAGE, mininterval=1, disable=not run.first)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, n_updates, cfg)
        (video,) = stream.next("video")
        with autocast():
            loss, targets = network(video)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if run.sound(step, loss, norm):
            optimizer.step()
        optimizer.zero_grad()
        model.follow(cfg.ema)

        done = step + 1
        last = done == n_updates or run.stopped(done)
        if done % 20 == 0 or last:
            std, rank = health(targets)
            run.log(done, loss=loss.detach(), grad_norm=norm, feature_std=std, effective_rank=rank, waited=stream.share())
            bar.set_postfix_str(f"loss {loss:.3f}, features: deviation {std:.2f}, rank {rank:.0f}", refresh=False)
        if done % cfg.save_every == 0 or last:
            run.save(model, optimizer, done, n_updates, model_args=model_args, reading=reading(cfg), passed=stream.positions())
        if last:
            break

    # --- finish
    if run.first and done > first:
        print(f"features: deviation {std:.2f}, effective rank {rank:.1f} of {sizes['encoder'][0]}" + (
            "; they have collapsed: try a smaller --learning-rate, an --ema nearer to 1, or --spread" if std < 0.1 or rank < 5 else ""))  # fmt: skip
    run.finish(done, n_updates, f"python extras/vjepa_ac/train.py --data {cfg.data_path} --encoder {run.path} --size {cfg.size} --out {cfg.out}")


if __name__ == "__main__":
    print_user_errors()
    main()
