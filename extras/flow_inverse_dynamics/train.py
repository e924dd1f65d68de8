"""Train a flow that answers: which action led from s to s′?

    python extras/flow_inverse_dynamics/train.py --dataset-config extras/flow_inverse_dynamics/configs/dataset/pendulum.json

Reads the triplets that create_dataset.py wrote, or those of `--triplets FILE`; writes `flow_inverse_dynamics.pt` with its log and curves to --out. With
`--reflow-epochs` the paths are straightened afterwards, so that a single step samples as well as a hundred.
"""
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, choose_device, print_user_errors  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from extras.flow_inverse_dynamics.create_dataset import read_arrays, triplets_path  # noqa: E402
from extras.flow_inverse_dynamics.model import FlowInverseDynamics  # noqa: E402
from extras.flow_inverse_dynamics.pendulum import Sequences, read_config  # noqa: E402
from models.checkpoint import CheckpointError, load_checkpoint, rebuild  # noqa: E402
from optimizer import make_optimizer, rate_at  # noqa: E402
from train_utils import Run  # noqa: E402

CONFIGS = Path(__file__).parent / "configs"
STAGE = "flow_inverse_dynamics"


@dataclass
class FlowConfig:
    """What a model configuration may say; the defaults are the article's."""

    diffusion_step_embed_dim: int = 16
    down_dims: list = (16, 32, 64)
    num_inference_steps: int = 100


def load_triplets(path):
    """→ s (n, S), a (n, chunk, A), s_next (n, S), float32 tensors. Raises UserError if their lengths disagree."""
    s, a, s_next = (torch.from_numpy(array).float() for array in read_arrays(path, ["s", "a", "s_next"]))
    if not len(s) == len(a) == len(s_next) or s.shape != s_next.shape or a.ndim != 3:
        raise UserError(f"{path}: s, a and s_next have the shapes {list(s.shape)}, {list(a.shape)}, {list(s_next.shape)}; make them with create_dataset.py")
    return s, a, s_next


def load_flow(path, state_dim=None, action_dim=None, device="cpu"):
    """The trained model of a checkpoint. Raises CheckpointError where it is for other dimensions."""
    saved = load_checkpoint(path, STAGE)
    sizes = saved["model_args"]
    model = rebuild(lambda: FlowInverseDynamics(**sizes), saved, path)
    for name, found in (("state_dim", state_dim), ("action_dim", action_dim)):
        if found is not None and sizes[name] != found:
            raise CheckpointError(f"{path} is for {name} {sizes[name]}, but the data have {found}; train one for them")
    return model.to(device)


def batches(n, batch_size, epoch, seed):
    """Row numbers of the batches of an epoch, in an order that seed and epoch decide."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed((seed << 32) + epoch))
    return order[: n - n % batch_size].view(-1, batch_size) if n >= batch_size else order[None]


def main(argv=None):
    # --- settings and set-up
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset-config", default=str(CONFIGS / "dataset" / "pendulum.json"), help="of the dataset [pendulum.json]")
    parser.add_argument("--model-config", default=str(CONFIGS / "model" / "pendulum_flow.json"), help="[pendulum_flow.json]")
    parser.add_argument("--triplets", default="", metavar="FILE", help="these triplets instead of the dataset configuration's")
    parser.add_argument("--out", default="checkpoints/flow_inverse_dynamics")
    parser.add_argument("--num-epochs", type=int, default=100)
    parser.add_argument("--reflow-epochs", type=int, default=0, help="epochs that straighten the paths afterwards [0]")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    cfg = parser.parse_args(argv)
    for name in ("num_epochs", "learning_rate", "batch_size"):
        if not getattr(cfg, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {getattr(cfg, name)}")
    if cfg.reflow_epochs < 0:
        raise UserError(f"--reflow-epochs must not be negative, got {cfg.reflow_epochs}")
    device = choose_device(cfg.device)
    cfg.device = str(device)
    cfg.data_path = cfg.triplets or str(triplets_path(read_config(cfg.dataset_config, Sequences).path))
    cfg.optimizer, cfg.use_dummy_data, cfg.data_type, cfg.n_updates = "adamw", False, "h5", 0
    torch.manual_seed(cfg.seed)

    # --- data
    data = [part.to(device) for part in load_triplets(cfg.data_path)]
    s, a, s_next = data
    print(f"data: {len(s):,} triplets, states of {s.shape[1]} numbers, chunks of {a.shape[1]} × {a.shape[2]}")

    # --- model
    sizes = asdict(read_config(cfg.model_config, FlowConfig))
    model_args = dict(state_dim=s.shape[1], action_dim=a.shape[2], chunk=a.shape[1], **{k: list(v) if k == "down_dims" else v for k, v in sizes.items()})
    model = FlowInverseDynamics(**model_args).to(device)
    model.fit_scales(s, a, s_next)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")

    # --- optimizer and schedule
    optimizer = make_optimizer(model, cfg)
    per_epoch = len(batches(len(s), cfg.batch_size, 0, cfg.seed))
    straight_from = cfg.num_epochs * per_epoch
    n_updates = straight_from + cfg.reflow_epochs * per_epoch

    # --- output folder and resume
    run = Run(cfg, STAGE)
    first, n_updates = run.open(model, optimizer, n_updates, model_args=model_args)
    done, pairs = first, None

    # --- loop
    bar = tqdm(range(first, n_updates), initial=first, total=n_updates, unit="step", desc="flow", mininterval=1)
    for step in bar:
        rows = batches(len(s), cfg.batch_size, step // per_epoch, cfg.seed)[step % per_epoch]
        if step >= straight_from and pairs is None:  # what the flow, as it is now, makes of one noise per triplet
            noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(device)
            parts = [model.sample(*part[:2], noise=part[2]) for part in zip(s.split(4096), s_next.split(4096), noise.split(4096))]
            pairs = torch.cat(parts), noise
        for group in optimizer.param_groups:  # each of the two trainings has its own decay
            begun, length = (0, straight_from) if step < straight_from else (straight_from, n_updates - straight_from)
            group["lr"] = rate_at(step - begun, length, cfg)
        if step < straight_from:
            loss = model(s[rows], a[rows], s_next[rows])
        else:
            loss = model(s[rows], pairs[0][rows], s_next[rows], noise=pairs[1][rows])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if run.sound(step, loss, norm):
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == n_updates or run.stopped(done)
        if done % 100 == 0 or last:
            run.log(done, loss=loss.detach(), grad_norm=norm)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if last or done == straight_from:
            run.save(model, optimizer, done, n_updates, model_args=model_args)
        if last:
            break

    # --- finish
    run.finish(done, n_updates, f"python extras/flow_inverse_dynamics/evaluate.py --checkpoint {run.path}")


if __name__ == "__main__":
    print_user_errors()
    torch.set_num_threads(1)  # so small a model trains no faster on more
    main()
