"""Train a flow to answer: which action led from s to s′?

    P=extras/flow_inverse_dynamics/configs/dataset
    python -m extras.flow_inverse_dynamics.train --dataset-config $P/pendulum.json

Reads the triplets that create_dataset.py wrote, or those in `--triplets FILE`. Writes
`flow_inverse_dynamics.pt` with its log and curves to --out. `--reflow-epochs` straightens the paths
afterwards, so that a single step samples nearly as well as a hundred.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from utils.checkpoint import CheckpointSaver, load_checkpoint
from utils.cli import CheckpointError, Parser, UserError, check_ranges, option, print_user_errors
from utils.device import choose_device
from utils.hardening.files import data_fingerprint, previous_of
from utils.hardening.settings import resumed
from utils.hardening.steps import StepGuard, StopSignal
from utils.hardening.untrusted import rebuild_untrusted
from utils.log import TrainLog, progress
from utils.optimizer import count_parameters, lr_at, make_optimizer, set_lr

import torch
from torch import Tensor

from extras.flow_inverse_dynamics.create_dataset import read_arrays, triplets_path
from extras.flow_inverse_dynamics.model import FlowInverseDynamics
from extras.flow_inverse_dynamics.pendulum import Sequences, read_config

CONFIGS = Path(__file__).parent / "configs"
STAGE = "flow_inverse_dynamics"


@dataclass
class FlowConfig:
    """The fields of a model configuration. The defaults are those of the reference text."""

    diffusion_step_embed_dim: int = 16
    down_dims: list = (16, 32, 64)
    num_inference_steps: int = 100


@dataclass
class TrainConfig:
    dataset_config: str = option(str(CONFIGS / "dataset" / "pendulum.json"), "of the dataset, JSON")
    model_config: str = option(str(CONFIGS / "model" / "pendulum_flow.json"), "of the model, JSON")
    triplets: str = option("", "a file of triplets, instead of that of --dataset-config")
    out: str = option("checkpoints/flow_inverse_dynamics", "folder of the checkpoint")
    num_epochs: int = option(100, "passes over the triplets", above=0)
    reflow_epochs: int = option(0, "further passes that straighten the paths", low=0)
    learning_rate: float = option(1e-3, "peak; 50 steps warm-up, then linear decay", above=0)
    batch_size: int = option(64, "triplets per step", above=0)
    seed: int = option(0, "fixes initial weights, batches and noise")
    device: str = option("auto", "auto, cpu or cuda")
    resume: bool = option(False, "continue from the checkpoint in --out")
    data_fingerprint: str = ""  # of the triplets; not an option


def load_triplets(path: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """→ s (n, S), a (n, chunk, A), s_next (n, S), float32 tensors.

    Raises UserError if their shapes do not fit together.
    """
    arrays = read_arrays(path, ["s", "a", "s_next"])
    s, a, s_next = (torch.from_numpy(array).float() for array in arrays)
    if not len(s) == len(a) == len(s_next) or s.shape != s_next.shape or a.ndim != 3:
        shapes = f"{list(s.shape)}, {list(a.shape)}, {list(s_next.shape)}"
        raise UserError(
            f"{path}: s, a and s_next have the shapes {shapes}; make them with create_dataset.py"
        )
    return s, a, s_next


def load_saved(path: str | Path) -> dict:
    """The checkpoint that main has written. Raises CheckpointError where there is none."""
    if not (Path(path).is_file() or previous_of(Path(path)).is_file()):
        command = "python -m extras.flow_inverse_dynamics.train"
        raise CheckpointError(f"no checkpoint at {path}; make one with: {command}")
    return load_checkpoint(path, STAGE)


def load_flow(
    path: str | Path,
    state_dim: int | None = None,
    action_dim: int | None = None,
    device: str = "cpu",
) -> FlowInverseDynamics:
    """The trained model of a checkpoint.

    Raises CheckpointError where it is for other dimensions.
    """
    saved = load_saved(path)
    sizes = saved["model_args"]
    model = rebuild_untrusted(lambda: FlowInverseDynamics(**sizes), saved, path)
    for name, found in (("state_dim", state_dim), ("action_dim", action_dim)):
        if found is not None and sizes[name] != found:
            raise CheckpointError(
                f"{path} is for {name} {sizes[name]}, but the data have {found};"
                " train a model on these data"
            )
    return model.to(device)


def batches(n: int, batch_size: int, epoch: int, seed: int) -> Tensor:
    """Row numbers of an epoch (n_batches, batch_size), in an order fixed by seed and epoch."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed((seed << 32) + epoch))
    return order[: n - n % batch_size].view(-1, batch_size) if n >= batch_size else order[None]


def parse_config(argv: list[str] | None) -> TrainConfig:
    """The command line, with the fields that the spine's optimizer and saver read.

    With --resume the rest comes from the checkpoint.
    """
    parser = Parser(description=__doc__)
    parser.add_fields(TrainConfig)
    given = vars(parser.parse_args(argv))
    device = choose_device(given.get("device", "auto"))
    given = {"out": TrainConfig.out} | given | {"device": str(device)}
    resume = given.get("resume")
    cfg = resumed(TrainConfig, STAGE, given, device) if resume else TrainConfig(**given)
    check_ranges(cfg)
    cfg.data_path = cfg.triplets
    if not cfg.triplets:
        cfg.data_path = str(triplets_path(read_config(cfg.dataset_config, Sequences).path))
    cfg.optimizer, cfg.n_updates = "adamw", 0
    return cfg


def build_flow(
    cfg: TrainConfig, s: Tensor, a: Tensor, s_next: Tensor
) -> tuple[FlowInverseDynamics, dict]:
    """→ (the untrained model, the arguments that make it)."""
    sizes = asdict(read_config(cfg.model_config, FlowConfig))
    sizes["down_dims"] = list(sizes["down_dims"])
    model_args = dict(state_dim=s.shape[1], action_dim=a.shape[2], chunk=a.shape[1], **sizes)
    model = FlowInverseDynamics(**model_args).to(cfg.device)
    model.fit_scales(s, a, s_next)
    print(f"model: {count_parameters(model):,} parameters")
    return model, model_args


def reflow_pairs(
    cfg: TrainConfig, model: FlowInverseDynamics, s: Tensor, a: Tensor, s_next: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise (n, chunk, A), one per triplet. → (the action that the flow makes of it, the noise)."""
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(cfg.device)
    parts = zip(s.split(4096), s_next.split(4096), noise.split(4096), strict=True)
    return torch.cat([model.sample(s, s_next, noise=noise) for s, s_next, noise in parts]), noise


def saved_pairs(cfg: TrainConfig, path: Path) -> tuple[Tensor, Tensor] | None:
    """The pairs of the run that is resumed: the model that made them is straightened by now."""
    pairs = load_checkpoint(path, STAGE).get("pairs") if cfg.resume else None
    return tuple(part.to(cfg.device) for part in pairs) if pairs else None


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    torch.manual_seed(cfg.seed)

    # --- data, model and optimizer
    parts = load_triplets(cfg.data_path)
    cfg.data_fingerprint = data_fingerprint(
        torch.cat([part.flatten(1) for part in parts], 1).numpy()
    )
    s, a, s_next = (part.to(cfg.device) for part in parts)
    chunks = f"{a.shape[1]} × {a.shape[2]}"
    print(f"data: {len(s):,} triplets, states of {s.shape[1]} numbers, chunks of {chunks}")
    model, model_args = build_flow(cfg, s, a, s_next)
    optimizer = make_optimizer(model, cfg)
    per_epoch = len(batches(len(s), cfg.batch_size, 0, cfg.seed))
    flow_updates = cfg.num_epochs * per_epoch
    n_updates = flow_updates + cfg.reflow_epochs * per_epoch

    # --- output folder and resume
    saver = CheckpointSaver(cfg, STAGE, model, optimizer, model_args=model_args)
    start_step, n_updates = saver.resume(n_updates)
    stop = StopSignal()
    log = TrainLog(cfg, STAGE, start_step, n_updates, stop)
    guard = StepGuard(log, start_step)

    # --- loop
    done, pairs = start_step, saved_pairs(cfg, saver.path)
    bar = progress(start_step, n_updates, "flow")
    for step in bar:
        rows = batches(len(s), cfg.batch_size, step // per_epoch, cfg.seed)[step % per_epoch]
        if step < flow_updates:
            set_lr(optimizer, lr_at(step, flow_updates, cfg))
            loss = model(s[rows], a[rows], s_next[rows])
        else:  # reflow, with a warm-up and decay of its own
            set_lr(optimizer, lr_at(step - flow_updates, n_updates - flow_updates, cfg))
            pairs = pairs or reflow_pairs(cfg, model, s, a, s_next)
            loss = model(s[rows], pairs[0][rows], s_next[rows], noise=pairs[1][rows])
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard.is_finite(step, loss, grad_norm, saved=saver.last_saved()):
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == n_updates or stop.asked
        if done % 100 == 0 or last:
            log.write(done, loss=loss.detach(), grad_norm=grad_norm)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if last or done == flow_updates:
            saver.save(done, log, guard, pairs=pairs)
        if last:
            break

    # --- finish
    evaluate = f"python -m extras.flow_inverse_dynamics.evaluate --checkpoint {cfg.out}"
    saver.finish(done, log, guard, evaluate)


if __name__ == "__main__":
    print_user_errors()
    torch.set_num_threads(1)  # more threads do not speed up so small a model
    main()
