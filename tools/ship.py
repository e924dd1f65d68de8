"""Make a trained world small enough to ship, measure what is shipped, and write its card.

    python -m tools.record doom-maze --frames 24000 --seed 2000 --out data/doom-maze-card.h5
    python -m tools.ship --checkpoint checkpoints/doom-maze --test data/doom-maze-card.h5

Weights become float16; optimizer and random state go, so training cannot be resumed from a
shipped world. The numbers on the card are measured on the files that are shipped; time and commit
come from the report that tools/speedrun.py left.
"""

import json
from pathlib import Path

from utils.checkpoint import MODELS, fingerprint, load_checkpoint, save_checkpoint
from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.files import make_folder

import h5py

import validate
from tools.record import GAMES
from tools.speedrun import FRAMES, TEST_SEED

CARD = """# {name}

A world learned from video alone: no button was seen in training.
Play it: `python play.py --checkpoint {out}`

* **Data**: {n_train:,} frames of {game}, 64×64, {fps:g} frames per second, recorded by
  `tools/record.py` (seed 0) with random buttons ({buttons}), each held for 1-8 frames.
  The numbers below were measured on other games (seed {seed}; the recipe was chosen in view of seed
  {chosen}).{map}
* **Recipe**: preset {preset}, made by `{command}` at commit {commit} in {minutes:.1f} minutes on
  {device}. Files: float16 weights, no optimizer, {megabytes:.1f} MB.
* **Licences**: {licence}

The same again, with the number of updates that the minutes came to (another processor may round
differently):

```
git checkout {commit}
python -m tools.record {game} --frames {n_train} --out {data}
{training}
python -m tools.record {game} --frames {n_test} --seed {seed} --out {test}
python validate.py --checkpoint {source} --data-path {test} --val-fraction 0.5 --clips {clips:.0f}
```

| latent action | what it does | share |
|---|---|---|
{actions}

On {clips:.0f} clips; `dynamics/clips_for_0.3_db` of them would narrow the interval of the smallest
ΔPSNR to ± 0.3 dB. `…_per_clip` is the mean of each clip's own difference.

| metric | value | 95 % interval |
|---|---|---|
{numbers}
"""
ONE_MAP = " The scenario has one map:\n  those games are other walks through the same rooms."
LICENCES = {
    "ale_py": "the pictures are Atari's game, run by ale-py (GPL-2.0)",
    "vizdoom": "the pictures are VizDoom scenarios (MIT) on Freedoom's assets (BSD-3-Clause)",
    "crafter": "the pictures are Crafter's (MIT)",
    "procgen": "the pictures are Procgen's (MIT)",
}
SHOWN = """tokenizer/psnr tokenizer/psnr_changing tokenizer/codebook_usage lam/actions_used
lam/largest_share lam/nmi lam/nmi_classifier lam/accuracy lam/majority dynamics/rollout_psnr_t1
dynamics/rollout_psnr_t4 dynamics/copy_psnr_t4 dynamics/rollout_psnr_t16 dynamics/copy_psnr_t16
dynamics/temperature dynamics/delta_psnr_min_t4 dynamics/delta_psnr_min_t4_per_clip
dynamics/delta_psnr_t4 dynamics/delta_psnr_null_t4 dynamics/delta_psnr_marginal_t4
dynamics/delta_psnr_button_t4 dynamics/delta_psnr_button_t4_per_clip dynamics/clips_for_0.3_db
dynamics/fvd_smallnet dynamics/fvd_smallnet_copy""".split()


def shrink(source, out):
    """The checkpoints and the action table of `source`, small, into `out`."""
    saved = {stage: load_checkpoint(source / f"{stage}.pt", stage) for stage in MODELS}
    for checkpoint in saved.values():
        checkpoint["model"] = {name: weight.half() for name, weight in checkpoint["model"].items()}
        for name in ("optimizer", "rng"):
            checkpoint.pop(name, None)
    dynamics = saved["dynamics"]
    dynamics["inputs"] = {stage: fingerprint(saved[stage]) for stage in dynamics["inputs"]}
    dynamics["start_frames"] = dynamics["start_frames"][:6].clone()
    for stage, checkpoint in saved.items():
        save_checkpoint(out / f"{stage}.pt", checkpoint)
    table = json.loads((source / "actions.json").read_text(encoding="utf-8"))
    table["lam"] = fingerprint(saved["lam"])
    table.pop("picture", None)
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    (out / "actions.json").write_text(text, encoding="utf-8")
    return saved, table["actions"]


def number_rows(numbers):
    """The rows of the table of metrics, each with its interval where it has one."""
    for name in SHOWN:
        if name in numbers:
            ends = [numbers.get(f"{name}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else "{:.3g} – {:.3g}".format(*ends)
            value = numbers[name]
            shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            yield f"| {name} | {shown} | {interval} |"


def card(source, out, test, made, saved, rows, numbers):
    """The text of card.md."""
    with h5py.File(test) as file:
        seed, n_test = file.attrs.get("seed", "unknown"), len(file["frames"])
    game, preset = GAMES[made["world"]], saved["dynamics"]["config"]["preset"]
    n_train = FRAMES[preset][0]
    data = f"data/{made['world']}-{n_train}.h5"
    training = [
        f"python train_{stage}.py --data-path {data} --out {source.as_posix()}"
        f" --preset {preset} --n-updates {checkpoint['n_updates']}"
        for stage, checkpoint in saved.items()
    ]
    actions = [f"| {row['action']} | {row['label']} | {row['share']:.0%} |" for row in rows]
    return CARD.format(
        name=source.name,
        out=out.as_posix(),
        game=made["world"],
        fps=game.fps,
        buttons=", ".join(game.actions),
        n_train=n_train,
        test=test,
        seed=seed,
        map=ONE_MAP if game.package == "vizdoom" else "",
        chosen=TEST_SEED,
        n_test=n_test,
        preset=preset,
        training="\n".join(training),
        data=data,
        source=source.as_posix(),
        command=made["command"],
        commit=made["commit"][:8],
        minutes=made["minutes/total"],
        device=made["device"],
        megabytes=sum(path.stat().st_size for path in out.glob("*.pt")) / 2**20,
        licence=LICENCES[game.package],
        actions="\n".join(actions),
        clips=numbers["dynamics/clips"],
        numbers="\n".join(number_rows(numbers)),
    )


def main(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder of a world that tools/speedrun.py has trained")
    add("--test", required=True, help="data with true actions that training never saw")
    add("--clips", type=int, default=256, help="clips to measure on [256]")
    add("--out", default="", help="folder of the shipped world [checkpoints/shipped/NAME]")
    args = parser.parse_args(argv)
    source = Path(args.checkpoint)
    out = Path(args.out or Path("checkpoints/shipped") / source.name)
    report = source / "report" / "report.json"
    if not report.exists():
        raise UserError(f"no {report}; a shipped world is made by tools/speedrun.py")
    made = json.loads(report.read_text())
    make_folder(out)
    saved, rows = shrink(source, out)
    words = ["--checkpoint", str(out), "--data-path", args.test, "--val-fraction", "0.5"]
    words += ["--clips", str(args.clips), "--json", str(out / "report.json")]
    numbers = validate.main(words)
    text = card(source, out, args.test, made, saved, rows, numbers)
    (out / "card.md").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    print(f"{out}: {size:.1f} MB, with card.md")


if __name__ == "__main__":
    print_user_errors()
    main()
