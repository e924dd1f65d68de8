"""Train the predictor: which features follow from features so far and an action? (V-JEPA 2-AC on recordings in VPT's form.)

    python extras/vjepa_ac/train.py --data 'data/vpt/train-*.tar' --size nano --encoder checkpoints/vjepa/pretrain.pt --out checkpoints/vjepa
    python extras/vjepa_ac/train.py --data 'data/vpt/train-*.tar' --encoder-checkpoint vitl.pt --out checkpoints/vjepa      # Meta's weights

Writes OUT/action_predictor.pt, which holds the frozen encoder too; in OUT/action_predictor/: metrics.jsonl and loss.png, with the error of the
prediction that nothing changes (copy) beside the losses.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import UserError, print_user_errors  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from extras.vjepa_ac.model import SIZES, TUBELET, ActionPredictor, Encoder, load_encoder, losses  # noqa: E402
from extras.vjepa_ac.pretrain import Pretraining, Stream, parse, parser_of, reading  # noqa: E402
from extras.vjepa_ac.vpt import Problems, ProcessVPT, find_shards, statistics  # noqa: E402
from models.checkpoint import CheckpointError, load_checkpoint, rebuild  # noqa: E402
from optimizer import make_optimizer, rate_at  # noqa: E402
from train_utils import Run, set_up, wrap  # noqa: E402

STAGE = "action_predictor"


class ActionTraining(nn.Module):
    """The frozen encoder and the predictor. (video uint8 (B, T, 3, S, S), actions, states) → (teacher-forced loss, rollout loss, error of a copy).

    remember: how many tubelets' features are kept. Clips that begin every few ticks share most of their tubelets, and the encoder does not change.
    """

    def __init__(self, encoder, predictor, auto_steps, exponent, remember=0):
        super().__init__()
        self.encoder, self.predictor, self.auto_steps, self.exponent = encoder.requires_grad_(False), predictor, auto_steps, exponent
        self.remember, self.known = remember, {}

    @torch.no_grad()
    def features(self, video):
        """Encoder.each_tubelet, but what is known is not encoded again."""
        if not self.remember:
            return self.encoder.each_tubelet(video)
        tubelets = video.unflatten(1, (-1, TUBELET)).flatten(0, 1)  # (B·T/2, 2, 3, S, S)
        keys = [hash(tubelet.tobytes()) for tubelet in tubelets.cpu().numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        if new:
            self.known.update(zip(new, self.encoder.each_tubelet(tubelets[list(new.values())])[:, 0]))
        x = torch.stack([self.known[key] for key in keys])  # (B·T/2, N, E)
        for key in list(self.known)[: -self.remember]:  # the oldest
            del self.known[key]
        return x.unflatten(0, (len(video), -1))

    def forward(self, video, actions, states):
        features = self.features(video)  # (B, T/2, N, E); context and, one further, targets
        forced, rolled = losses(self.predictor, features, actions, states, self.auto_steps, self.exponent)
        return forced, rolled, ((features[:, 1:] - features[:, :-1]).abs() ** self.exponent).mean() / self.exponent


def pretrained(path):
    """The target encoder of pretrain.py."""
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}; make one with: python extras/vjepa_ac/pretrain.py")
    saved = load_checkpoint(path, "pretrain")
    return rebuild(lambda: Pretraining(**saved["model_args"]), saved, path).target


def load_model(path, device="cpu"):
    """→ (encoder, predictor, ProcessVPT as in training), for use. Raises CheckpointError where the file is something else."""
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}; make one with: python extras/vjepa_ac/train.py")
    saved = load_checkpoint(path, STAGE)
    sizes = saved["model_args"]
    model = rebuild(lambda: ActionTraining(Encoder(**sizes["encoder"]), ActionPredictor(**sizes["predictor"]), 1, 1), saved, path).to(device)
    return model.encoder, model.predictor, ProcessVPT(**saved["process"])


def main(argv=None):
    # --- settings and set-up
    parser = parser_of(__doc__)
    parser.add_argument("--encoder", default="", metavar="PT", help="what pretrain.py wrote")
    parser.add_argument("--encoder-checkpoint", default="", metavar="PT", help="or a public V-JEPA 2 checkpoint file")
    parser.add_argument("--v-jepa-1", action="store_true", help="that file is V-JEPA 1's")
    parser.add_argument("--action-dim", type=int, default=13, help="13: mouse and hotbar; 36 or 38: all keys, see vpt.py [13]")
    parser.add_argument("--auto-steps", type=int, default=2, help="tubelets of the rollout in the loss [2]")
    parser.add_argument("--remember", type=int, default=0, metavar="N", help="tubelets whose features are kept, 12 KB each in nano and 1 MB in vit-l; worth it where --every makes clips overlap [0]")
    parser.add_argument("--loss-exponent", type=float, default=1.0, help="1: absolute error; 2: squared (the seed) [1]")
    cfg = parse(parser, "train", argv)
    if not 1 <= cfg.auto_steps < cfg.num_frames // TUBELET:
        raise UserError(f"--auto-steps must lie in 1 … {cfg.num_frames // TUBELET - 1}, with {cfg.num_frames} frames; got {cfg.auto_steps}")
    if cfg.remember < 0:
        raise UserError(f"--remember must not be negative, got {cfg.remember}")
    if bool(cfg.encoder) == bool(cfg.encoder_checkpoint):
        raise UserError("give one of --encoder (from pretrain.py) and --encoder-checkpoint (a public V-JEPA file)")
    device, autocast = set_up(cfg)

    # --- frozen encoder
    encoder = pretrained(cfg.encoder) if cfg.encoder else load_encoder(cfg.encoder_checkpoint, "sinusoid" if cfg.v_jepa_1 else "rotary-public")

    # --- data
    shards = find_shards(cfg.data)
    settings = dict(num_frames=cfg.num_frames, fps=cfg.fps, frameskip=TUBELET, size=encoder.size, action_dim=cfg.action_dim)
    settings["statistics"] = statistics(shards, ProcessVPT(**settings), Problems(cfg.max_problems))
    process = ProcessVPT(**settings)

    # --- model
    dim, depth, heads = SIZES[cfg.size]["predictor"]
    encoder_args = dict(size=encoder.size, dim=encoder.dim, depth=len(encoder.blocks), heads=encoder.blocks[0].attn.heads, kind=encoder.kind,
                        hidden=encoder.blocks[0].mlp.fc1.out_features)  # fmt: skip
    predictor_args = dict(grid=encoder.grid, encoder_dim=encoder.dim, action_dim=cfg.action_dim, dim=dim, depth=depth, heads=heads)
    model_args = dict(encoder=encoder_args, predictor=predictor_args)
    model = ActionTraining(encoder, ActionPredictor(**predictor_args), cfg.auto_steps, cfg.loss_exponent, cfg.remember).to(device)
    network = wrap(model, cfg)
    print(f"model: {sum(p.numel() for p in model.predictor.parameters()):,} parameters, on an encoder of {sum(p.numel() for p in encoder.parameters()):,}")

    # --- optimizer and schedule
    optimizer = make_optimizer(model.predictor, cfg)

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
        batch = stream.next("video", "actions", "states")
        with autocast():
            forced, rolled, copy = network(*batch)
        (forced + rolled).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.predictor.parameters(), 1.0)
        if run.sound(step, forced + rolled, norm):
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == n_updates or run.stopped(done)
        if done % 50 == 0 or last:
            with torch.no_grad(), autocast():  # the other clips' actions: as long as that makes no difference, the actions do nothing
                other = model(batch[0], batch[1].roll(1, 0), batch[2])[0]
            run.log(done, loss=forced.detach() + rolled.detach(), forced=forced.detach(), rollout=rolled.detach(), other_actions=other, copy=copy,
                    grad_norm=norm, waited=stream.share())  # fmt: skip
            bar.set_postfix_str(f"one step {forced:.3f}, with other actions {other:.3f}, copy {copy:.3f}", refresh=False)
        if done % cfg.save_every == 0 or last:
            run.save(model, optimizer, done, n_updates, model_args=model_args, process=settings, reading=reading(cfg), passed=stream.positions())
        if last:
            break

    # --- finish
    run.finish(done, n_updates, f"python extras/vjepa_ac/evaluate.py --checkpoint {run.path} --data {cfg.data_path} --test TAR")


if __name__ == "__main__":
    print_user_errors()
    main()
