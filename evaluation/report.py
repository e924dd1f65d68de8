"""All metrics of a world, which validate.py prints. All input is checked before measuring.

`options` is a validate.ValidateOptions.
"""

from functools import partial
from pathlib import Path

from utils.checkpoint import MODELS, build_model, load_checkpoint, load_world
from utils.cli import UserError
from utils.device import autocast_on, choose_device
from utils.hardening.files import make_folder
from utils.hardening.fit import check_fit

import torch

from data_utils import Clips, Dataset, open_dataset
from evaluation import stages
from evaluation.stages import CONTEXT, HORIZON
from evaluation.video_features import i3d_features, load_i3d, smallnet_features
from player.cuda_graph import graph_on

USAGE_FRAMES = 20_480  # the most frames that are encoded to count the use of codes


@torch.no_grad()
def measure(options) -> dict[str, float]:
    """→ every metric of every stage found, as STAGE/NAME. Saves pictures with --save-images."""
    device = choose_device(options.device)
    world, loaded = load_stages(Path(options.checkpoint), device)
    dataset = open_data(options, world, loaded)
    clips = choose_clips(options, dataset, world, loaded)
    features = choose_features(options, world, clips)
    images = make_places(options)
    report, autocast = {}, autocast_on(device)

    def add(stage, values):
        report.update({f"{stage}/{name}": value for name, value in values.items()})

    if "tokenizer" in loaded:
        checkpoint, model = loaded["tokenizer"]
        T = checkpoint["model_args"]["context_length"]
        everything = Clips(dataset, "val", T, val_fraction=1.0).evenly_spaced(USAGE_FRAMES // T)[0]
        frames = clips["tokenizer"][0]
        with autocast():
            add("tokenizer", stages.tokenizer_metrics(model, frames, everything, device, images))
    if "lam" in loaded:
        checkpoint, model = loaded["lam"]
        with autocast():
            add("lam", stages.lam_metrics(model, *clips["lam"], device))
        given = (options, dataset, checkpoint, clips["lam"], device, autocast)
        add("lam", stages.classifier_nmi(*given))
    if world:
        measured = world.twin()
        measured.steps, measured.temperature = options.steps, options.temperature
        frames, true_actions = clips["dynamics"]
        with autocast():
            values = stages.dynamics_metrics(measured, clips["dynamics"], device, images, features)
            add("dynamics", values)
            if images:
                some = slice(None, None, max(1, len(frames) // 4))
                actions = None if world.lam else true_actions[some][:4, : CONTEXT - 1]
                initial = frames[some][:4, :CONTEXT]
                stages.save_action_pictures(world, initial, actions, images)
    return report


def load_stages(path: Path, device):
    """→ (the world or None, {stage: (checkpoint, model)} of the tokenizer and the LAM)."""
    if not path.exists():
        raise UserError(
            f"no such checkpoint: {path}; give a world's folder or one of its .pt files"
        )
    folder = path if path.is_dir() else path.parent
    found = [stage for stage in MODELS if (folder / f"{stage}.pt").exists()]
    if not path.is_dir():
        found = [stage for stage in MODELS if path.name == f"{stage}.pt"]
    if not found:
        raise UserError(f"no checkpoint in {path}; expected tokenizer.pt, lam.pt or dynamics.pt")
    world = load_world(folder, device, graph_on(device)) if "dynamics" in found else None
    loaded = {}
    for stage in found:
        if stage != "dynamics":
            file = folder / f"{stage}.pt"
            checkpoint = load_checkpoint(file, stage)
            loaded[stage] = (checkpoint, build_model(checkpoint, file).to(device))
    if "tokenizer" in loaded and "lam" in loaded:
        check_fit(loaded["tokenizer"][0], loaded["lam"][0])
    return world, loaded


def open_data(options, world, loaded) -> Dataset:
    """The dataset. Raises UserError unless its frames have the size that the models expect."""
    H, W = world.frame_size if world else (0, 0)
    for checkpoint, _ in loaded.values():
        H, W = checkpoint["model_args"]["frame_size"]
    source = (options.data_path, options.data_type, options.use_dummy_data)
    dataset = open_dataset(*source, frame_size=H)
    found = list(dataset.frames.shape[1:3])
    if found != [H, W]:
        raise UserError(
            f"{dataset.name} has frames of {found[0]}×{found[1]}, {options.checkpoint} is for"
            f" {H}×{W}; record at that size"
        )
    return dataset


def choose_clips(options, dataset, world, loaded) -> dict:
    """→ {stage: (frames, true actions)}, with clips of the length that each stage needs."""

    def clips_of(length):
        part = Clips(dataset, "val", length, val_fraction=options.val_fraction)
        return part.evenly_spaced(options.clips)

    lengths = {s: saved["model_args"]["context_length"] for s, (saved, _) in loaded.items()}
    clips = {stage: clips_of(length) for stage, length in lengths.items()}
    if not world:
        return clips
    clips["dynamics"] = clips_of(CONTEXT + HORIZON)
    actions = dataset.actions
    if world.lam is None and (actions is None or actions.max() >= world.n_actions):
        raise UserError(
            f"{options.checkpoint} was trained on true actions 0 … {world.n_actions - 1};"
            f" {dataset.name} must have the same ones"
        )
    return clips


def choose_features(options, world, clips) -> tuple:
    """→ the name and the function of the features for the video distance."""
    if not options.fvd_features:
        return "smallnet", smallnet_features
    i3d = load_i3d(options.fvd_features)
    if world is None or len(clips["dynamics"][0]) < stages.FVD_CLIPS:
        raise UserError(
            f"--fvd-features needs a dynamics model and {stages.FVD_CLIPS} clips of"
            f" {CONTEXT + HORIZON} frames; use more data or --clips"
        )
    return "i3d", partial(i3d_features, i3d)


def make_places(options) -> Path | None:
    """Create the folders for the report and the pictures. → the latter, or None if not wanted."""
    if options.json and Path(options.json).is_dir():
        raise UserError(f"--json {options.json} is a folder; give the name of a file")
    if options.json:
        make_folder(Path(options.json).parent)
    if not options.save_images:
        return None
    make_folder(options.save_images)
    return Path(options.save_images)
