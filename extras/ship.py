"""Make a trained world small enough to ship, measure what is shipped, and write its card.

    python record.py doom-maze --frames 24000 --seed 2000 --out data/doom-maze-card.h5
    python extras/ship.py --checkpoint checkpoints/doom-maze --test data/doom-maze-card.h5

Weights become float16; optimizer and random state go, so training cannot be resumed from a shipped world. The numbers on the
card are measured on the files that are shipped; time and commit come from the report that speedrun.py left.
"""
import json
import sys
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import validate  # noqa: E402
from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from models.checkpoint import MODELS, fingerprint, load_checkpoint, save_checkpoint  # noqa: E402
from record import GAMES  # noqa: E402
from speedrun import FRAMES, TEST_SEED  # noqa: E402

CARD = """# {name}

A world learned from video alone: no button was seen in training. Play it: `python play.py --checkpoint {out}`

* **Data**: {n_train:,} frames of {game}, 64×64, {fps:g} frames per second, recorded by `record.py` (seed 0) with random buttons
  ({buttons}), each held for 1-8 frames. The numbers below were measured on other games (seed {seed}; the recipe was chosen with
  seed {chosen} in view).
* **Recipe**: preset {preset}, made by `{command}` at commit {commit} in {minutes:.1f} minutes on {device}. Files: float16 weights,
  no optimizer, {megabytes:.1f} MB.
* **Licences**: {licence}

The same again, with the number of updates that the minutes came to (another processor may round differently):

```
git checkout {commit}
python record.py {game} --frames {n_train} --out {data}
{training}
python record.py {game} --frames {n_test} --seed {seed} --out {test}
python validate.py --checkpoint {source} --data-path {test} --val-fraction 0.5
```

| latent action | what it does | share |
|---|---|---|
{actions}

| metric | value |
|---|---|
{numbers}
"""
LICENCES = {
    "ale_py": "the pictures are Atari's game, run by ale-py (GPL-2.0)",
    "vizdoom": "the pictures are VizDoom scenarios (MIT) on Freedoom's assets (BSD-3-Clause)",
    "crafter": "the pictures are Crafter's (MIT)",
    "procgen": "the pictures are Procgen's (MIT)",
}
SHOWN = """tokenizer/psnr tokenizer/psnr_changing tokenizer/codebook_usage lam/actions_used lam/largest_share lam/nmi lam/nmi_ceiling
lam/accuracy lam/majority dynamics/rollout_psnr_t1 dynamics/rollout_psnr_t4 dynamics/copy_psnr_t4 dynamics/rollout_psnr_t16
dynamics/copy_psnr_t16 dynamics/temperature dynamics/delta_psnr_t4 dynamics/delta_psnr_null_t4 dynamics/fvd_smallnet dynamics/fvd_smallnet_copy""".split()


def shrink(source, out):
    """The three checkpoints and the action table of `source`, as float16 and without training state, into `out`."""
    saved = {stage: load_checkpoint(source / f"{stage}.pt", stage) for stage in MODELS}
    for stage, checkpoint in saved.items():
        checkpoint["model"] = {name: weight.half() for name, weight in checkpoint["model"].items()}
        for name in ("optimizer", "rng"):
            checkpoint.pop(name, None)
    saved["dynamics"]["inputs"] = {stage: fingerprint(saved[stage]) for stage in saved["dynamics"]["inputs"]}
    saved["dynamics"]["start_frames"] = saved["dynamics"]["start_frames"][:6].clone()
    for stage, checkpoint in saved.items():
        save_checkpoint(out / f"{stage}.pt", checkpoint)
    table = json.loads((source / "actions.json").read_text(encoding="utf-8")) | {"lam": fingerprint(saved["lam"])}
    table.pop("picture", None)
    (out / "actions.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return saved, table["actions"]


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of a world that speedrun.py has trained")
    parser.add_argument("--test", required=True, help="footage with recorded buttons that training never saw")
    parser.add_argument("--out", default="", help="[checkpoints/shipped/NAME]")
    args = parser.parse_args(argv)
    source = Path(args.checkpoint)
    out = Path(args.out or Path("checkpoints/shipped") / source.name)
    report = source / "report" / "report.json"
    if not report.exists():
        raise UserError(f"no {report}; a shipped world is made by speedrun.py")
    made = json.loads(report.read_text())
    make_folder(out)
    saved, rows = shrink(source, out)
    numbers = validate.main(["--checkpoint", str(out), "--data-path", args.test, "--val-fraction", "0.5", "--json", str(out / "report.json")])
    with h5py.File(args.test) as file:
        seed, n_test = file.attrs.get("seed", "unknown"), len(file["frames"])
    game, preset = GAMES[made["world"]], saved["dynamics"]["config"]["preset"]
    data = f"data/{made['world']}-{FRAMES[preset][0]}.h5"
    (out / "card.md").write_text(CARD.format(
        name=source.name, out=out.as_posix(), game=made["world"], fps=game.fps, buttons=", ".join(game.actions),
        n_train=FRAMES[preset][0], test=args.test, seed=seed, chosen=TEST_SEED, n_test=n_test, preset=preset,
        training="\n".join(
            f"python train_{stage}.py --data-path {data} --out {source.as_posix()} --preset {preset} --n-updates {checkpoint['n_updates']}"
            for stage, checkpoint in saved.items()),
        data=data, source=source.as_posix(), command=made["command"], commit=made["commit"][:8], minutes=made["minutes/total"], device=made["device"],
        megabytes=sum(path.stat().st_size for path in out.glob("*.pt")) / 2**20, licence=LICENCES[game.package],
        actions="\n".join(f"| {row['action']} | {row['label']} | {row['share']:.0%} |" for row in rows),
        numbers="\n".join(f"| {name} | {numbers[name]:.3g} |" for name in SHOWN if name in numbers),
    ), encoding="utf-8")  # fmt: skip
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 2**20:.1f} MB, with card.md")


if __name__ == "__main__":
    print_user_errors()
    main()
