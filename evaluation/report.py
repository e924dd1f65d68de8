"""All metrics of a world, which validate.py prints. All input is checked before measuring.

`options` is a validate.ValidateOptions.
"""

import math
from functools import partial
from pathlib import Path

from utils.checkpoint import MODELS, build_model, load_checkpoint, load_world
from utils.cli import UserError
from utils.device import autocast_on, choose_device
from utils.hardening.files import data_fingerprint, make_folder
from utils.hardening.fit import check_fit
from utils.pictures import save_png

import torch

from data_utils import Clips, Dataset, open_dataset
from evaluation import stages
from evaluation.metrics import changed, warnings_of
from evaluation.news import news_of_codes
from evaluation.stages import CONTEXT, HORIZON
from evaluation.video_features import i3d_features, load_i3d, smallnet_features
from player.cuda_graph import graph_on

USAGE_FRAMES = 20_480  # the most frames that are encoded to count the use of codes
STILL = (
    "warning: nothing moves in the {n} clips of {name}, so there is nothing to predict or control;"
    " measure on data in which something does"
)


@torch.no_grad()
def measure(options) -> tuple[dict[str, float | None], list[str]]:
    """→ every metric of every stage found, as STAGE/NAME; and what to warn of.

    A metric is None where the clips do not define it: nothing moves in them, for example. Saves
    pictures with --save-images.
    """
    device = choose_device(options.device)
    world, loaded = load_stages(Path(options.checkpoint), device)
    models = {stage: model for stage, (_, model) in loaded.items() if stage != "dynamics"}
    dataset = open_data(options, world, loaded)
    clips = choose_clips(options, dataset, world, loaded)
    features = choose_features(options, world, clips)
    images = make_places(options)
    report, autocast = {}, autocast_on(device)

    def add(stage, values):
        report.update({f"{stage}/{name}": value for name, value in values.items()})

    if "tokenizer" in models:
        T = loaded["tokenizer"][0]["model_args"]["context_length"]
        everything = Clips(dataset, "val", T, val_fraction=1.0).evenly_spaced(USAGE_FRAMES // T)[0]
        given = (models["tokenizer"], clips["tokenizer"][0], everything)
        with autocast():
            add("tokenizer", stages.tokenizer_metrics(*given, device, images))
    if "lam" in models:
        with autocast():
            add("lam", stages.lam_metrics(models["lam"], *clips["lam"], device, images))
        given = (options, dataset, loaded["lam"][0], clips["lam"], device, autocast)
        add("lam", stages.classifier_nmi(*given))
        given = (options, dataset, *loaded["lam"], device, autocast, images)
        add("lam", news_on_held_out(*given))
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
    report = {name: None if math.isnan(value) else value for name, value in report.items()}
    frames = next(iter(clips.values()))[0]
    if not changed(stages.unit(frames[:, 1:]), stages.unit(frames[:, :-1])).any():
        return report, [STILL.format(n=len(frames), name=dataset.name)]
    return report, learned_from(options, dataset, loaded) + warnings_of(report)


def news_on_held_out(options, dataset, checkpoint, lam, device, autocast, images) -> dict:
    """{"news", "unforetold"} of evaluation/news.py; {} without data to learn from, and if tiny."""
    config, n_updates = checkpoint.get("config", {}), options.history_updates
    if n_updates is None:
        n_updates = 0 if config.get("preset") == "tiny" else 300
    if options.val_fraction == 1 or n_updates == 0:
        return {}
    split = [
        Clips(dataset, part, lam.context_length, val_fraction=options.val_fraction)
        for part in ("train", "val")
    ]
    values, picture = news_of_codes(lam, *split, n_updates, device, autocast)
    if images:
        save_png(picture, images / "lam_news.png")
    return values


def learned_from(options, dataset: Dataset, loaded: dict) -> list[str]:
    """[] or a warning: stages that are measured on what they were trained on."""
    seen = [stage for stage, (saved, _) in loaded.items() if was_trained_on(saved, dataset)]
    if not seen or options.val_fraction <= 0.1:  # training leaves out the last tenth
        return []
    return [
        f"warning: {' and '.join(seen)} learned from the first 90 % of {dataset.name}, and"
        f" --val-fraction {options.val_fraction:g} measures on a part of that; leave it out, or"
        " measure on another recording"
    ]


def was_trained_on(checkpoint: dict, dataset: Dataset) -> bool:
    """By the fingerprint of the data; checkpoints from before there was one know its path."""
    config = checkpoint.get("config", {})
    if config.get("data_fingerprint"):
        return config["data_fingerprint"] == data_fingerprint(dataset.frames)
    if config.get("use_dummy_data"):
        return dataset.name == "dummy data"
    path = config.get("data_path")
    return bool(path) and str(Path(path).resolve()) == dataset.name


def load_stages(path: Path, device):
    """A world's folder, or the file of one stage → the world or None, and what was loaded.

    The latter is {stage: (checkpoint, model)}; the model of "dynamics" is None: it is in the
    world. The file may be a stage's best or previous one: lam.best.pt, lam.previous.pt.
    """
    if not path.exists():
        raise UserError(
            f"no such checkpoint: {path}; give a world's folder or one of its .pt files"
        )
    folder = path if path.is_dir() else path.parent
    files = {stage: folder / f"{stage}.pt" for stage in MODELS}
    if path.is_dir():
        files = {stage: file for stage, file in files.items() if file.exists()}
    else:
        files = {stage: path for stage in MODELS if path.name.split(".")[0] == stage}
    if not files:
        raise UserError(f"no checkpoint in {path}; expected tokenizer.pt, lam.pt or dynamics.pt")
    loaded = {}
    for stage, file in files.items():
        checkpoint = load_checkpoint(file, stage)
        model = None if stage == "dynamics" else build_model(checkpoint, file).to(device)
        loaded[stage] = (checkpoint, model)
    if "tokenizer" in loaded and "lam" in loaded:
        check_fit(loaded["tokenizer"][0], loaded["lam"][0])
    if "dynamics" not in files:
        return None, loaded
    return load_world(folder, device, graph_on(device), files["dynamics"].name), loaded


def open_data(options, world, loaded) -> Dataset:
    """The dataset. Raises UserError unless its frames have the size that the models expect."""
    H, W = world.frame_size if world else next(iter(loaded.values()))[0]["model_args"]["frame_size"]
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
    lengths.pop("dynamics", None)
    clips = {stage: clips_of(length) for stage, length in lengths.items()}
    if not world:
        return clips
    clips["dynamics"] = clips_of(CONTEXT + HORIZON)
    actions = dataset.actions
    usable = actions is not None and actions.min() >= 0 and actions.max() < world.n_actions
    if world.lam is None and not usable:
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
    if options.save_images is None:
        return None
    world = Path(options.checkpoint)
    own = (world if world.is_dir() else world.parent) / "report"
    folder = Path(options.save_images or own)
    make_folder(folder)
    return folder
