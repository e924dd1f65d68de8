"""Settings: one dataclass for what the three stages share, one per stage, presets as one table.

A value comes from the command line, else from the preset, else from the dataclass; with --resume
all come from the checkpoint. Without --preset the device decides.
Each option is written once: default, help, choices and range.
"""

from dataclasses import dataclass

from utils.cli import option
from utils.hardening.settings import read_settings


@dataclass
class Config:
    data_path: str = option("", "a folder of videos, one video, or an HDF5 file")
    data_type: str = option("auto", "kind of data", ("auto", "folder", "video", "h5", "dummy"))
    use_dummy_data: bool = option(False, "a small procedural world instead of --data-path")
    frame_size: int = option(64, "videos are resized to squares of this side", above=0, high=8192)
    out: str = option("", "folder of the world [checkpoints/NAME OF THE DATA]")
    preset: str = option("", "tiny, cpu, gpu or article; by default what the device suggests")
    n_updates: int = option(0, "budget in optimizer steps")
    num_epochs: float = option(0.0, "budget in passes over the training frames")
    minutes: float = option(0.0, "budget in minutes, turned into updates once, at the start")
    batch_size: int = option(8, "clips per process and backward pass", above=0)
    accumulate: int = option(1, "backward passes per step", above=0)
    context_length: int = option(8, "frames per clip, and that attention sees", low=2, high=256)
    optimizer: str = option("muon", "muon (matrices of the blocks) or adamw", ("muon", "adamw"))
    learning_rate: float = option(4e-3, "peak; 50 steps warm-up, then linear decay", above=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    max_skipped: int = option(20, "stop after so many steps in a row not finite", above=0)
    embed_dim: int = option(128, "width of the transformer", above=0, high=65536)
    hidden_dim: int = option(512, "width of its feed-forward layers", above=0, high=65536)
    n_heads: int = option(4, "attention heads", above=0)
    n_blocks: int = option(2, "spatio-temporal blocks (in encoder and decoder each)", above=0)
    sample_every: int = option(500, "steps between validations, each with a picture", above=0)
    save_every: int = option(500, "steps between checkpoints", above=0)
    seed: int = option(0, "fixes initial weights, batches and masks", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto: the faster one", ("auto", "float32", "bfloat16"))
    compile: bool = option(False, "torch.compile: a minute to begin, then a quarter faster or more")
    recompute: bool = option(False, "recompute activations: less memory, more time")
    resume: bool = option(False, "continue from the checkpoint in --out")
    data_fingerprint: str = ""  # of what was found at data_path; not an option

    def transformer_sizes(self) -> dict[str, int]:
        names = ("embed_dim", "hidden_dim", "n_heads", "n_blocks", "context_length")
        return {name: getattr(self, name) for name in names}


@dataclass
class TokenizerConfig(Config):
    patch_size: int = option(8, "pixels per side of a token", above=0)
    levels: tuple = option((4, 4, 4, 4, 4), "FSQ levels per dimension; 4,4,4,4,4 makes 1,024 codes")
    latent_dim: int = option(0, "a short form of --levels: so many dimensions of 4 levels", low=0)


@dataclass
class LatentActionConfig(Config):
    patch_size: int = option(8, "pixels per side of a patch", above=0)
    n_actions: int = option(8, "how many latent actions; a power of two")
    keep_rate: float = option(1.0, "share of the history the decoder sees", low=0, high=1)
    masking: str = option("always", "when the rest is hidden", ("always", "training"))
    # pairs: both frames; matches: also how patches match when shifted; frames: each pooled alone
    encoder: str = option("matches", "what the encoder sees", ("matches", "pairs", "frames"))
    # warp: shift patches of the last frame, then add; change: add; frame: draw from nothing
    decoder: str = option("warp", "how the next frame is made", ("warp", "change", "frame"))
    latent_norm: str = option("rms", "of actions before quantization", ("rms", "none"))
    soft_rate: float = option(0.5, "share of action bits not rounded in training", low=0, high=1)
    entropy_lambda: float = option(0.25, "weight of the bonus for using all actions")
    var_target: float = option(0.2, "variance of an action bit below which the penalty begins")
    var_lambda: float = option(1.0, "weight of that penalty")
    teach_weight: float = option(1.0, "of imitating what the past does not foretell", low=0)
    history_updates: int = option(600, "steps of the network that foretells", above=0)
    player: str = option("", "X,Y: the pixel of the player in the first frame, which is followed")
    label_weight: float = option(0.0, "of imitating recorded actions, where known", low=0)

    def lam_args(self) -> dict:
        names = "n_actions encoder decoder keep_rate soft_rate entropy_lambda var_target var_lambda"
        values = {name: getattr(self, name) for name in [*names.split(), "masking"]}
        return values | {"unit_rms": self.latent_norm == "rms"}


@dataclass
class DynamicsConfig(Config):
    n_blocks: int = option(4, "spatio-temporal blocks", above=0)
    video_tokenizer_path: str = option("", "by default tokenizer.pt in --out")
    lam_path: str = option("", "by default lam.pt in --out")
    objective: str = option("ce", "ce: masked tokens; mse: regress next latents", ("ce", "mse"))
    # true: as recorded, an oracle; random: a baseline
    actions: str = option("latent", "that the model is told", ("latent", "true", "random"))
    context: str = option("clean", "the past in training (Genie: masked)", ("clean", "masked"))
    token_kernel: int = option(3, "embed each token with its neighbours; 1: alone", above=0)
    conditioning: str = option("adaln", "how the action enters (Genie: add)", ("adaln", "add"))
    latent_dim: int = option(0, "dimensions that the tokenizer must have; 0: any", low=0)
    fsdp: bool = option(False, "under torchrun: shard the weights over the processes")
    steps: int = option(2, "MaskGIT passes per frame when playing", low=1)
    temperature: float = option(1.0, "of sampling when playing; low values fade", low=0)


# What departs from the defaults above, for all stages and for each.
PRESETS = {
    "tiny": {  # seconds; for tests and for seeing that everything runs
        "all": dict(n_updates=150, batch_size=32, context_length=4, sample_every=100)
        | dict(embed_dim=64, hidden_dim=128, n_blocks=1),
        "lam": dict(batch_size=16, teach_weight=0.0),
    },
    # two CPU cores, ten minutes for the three stages
    "cpu": dict(tokenizer=dict(minutes=2.8), lam=dict(minutes=2.4), dynamics=dict(minutes=4.4)),
    "gpu": {  # one CUDA GPU
        "all": dict(batch_size=64, context_length=16, learning_rate=1e-3)
        | dict(embed_dim=256, hidden_dim=1024, n_heads=8),
        "tokenizer": dict(minutes=6.0, n_blocks=4),
        "lam": dict(minutes=4.0, n_blocks=4),
        "dynamics": dict(minutes=10.0, n_blocks=8),
    },
    "article": {  # what the articles say that this project began with: docs/texts.md
        "all": dict(n_updates=10_000, batch_size=32, context_length=4, frame_size=128)
        | dict(optimizer="adamw", learning_rate=1e-4, n_blocks=2),
        "lam": dict(encoder="frames", decoder="frame", keep_rate=0.0, masking="training")
        | dict(latent_norm="none", soft_rate=0.0, entropy_lambda=0.0, teach_weight=0.0),
        "dynamics": dict(context="masked", token_kernel=1),
    },
}


def parse_config(kind: type, stage: str, description: str, argv=None) -> Config:
    """The command line → an instance of `kind`, checked. Prints what it settled on."""
    return read_settings(kind, stage, description, argv, PRESETS)
