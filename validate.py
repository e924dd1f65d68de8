"""Measure a world: every metric of every stage, beside its trivial baseline.

    python validate.py --checkpoint checkpoints/pong --data-path data/pong-test.h5
    python validate.py --checkpoint checkpoints/pong/tokenizer.pt --data-path data/pong-test.h5

The result is a table, JSON (--json) and pictures (--save-images). All is measured on the last
--val-fraction of the data, but for codebook use, which needs all of it. Recorded true actions,
where the data has them, are the yardstick for the latent ones; a supervised classifier, trained
on the true actions of the rest of the data, shows what can be known.

Measured rollouts are sampled at a low temperature (--temperature), because PSNR rewards the mean
of what may come. A world is played at a higher one, because the mean soon fades to empty frames.
The report says which (dynamics/temperature, dynamics/steps); action pictures are sampled as in
play.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from utils.cli import UserError, option, parse_options, print_user_errors

from evaluation.report import measure

SAMPLING = dict(steps=2, temperature=0.2)  # of the rollouts that are measured


@dataclass
class ValidateOptions:
    checkpoint: str = option("", "a world's folder, or one stage's .pt file in it")
    data_path: str = option("", "data, best recorded with a seed that was never trained on")
    data_type: str = option("auto", "kind of data", ("auto", "folder", "video", "h5", "dummy"))
    use_dummy_data: bool = option(False, "the small procedural world instead of --data-path")
    val_fraction: float = option(0.1, "share at the end of the data to measure on", above=0, high=1)
    clips: int = option(128, "clips to measure on, from all over that part", above=0)
    save_images: str = option(None, "save pictures, by default in the world's report/", bare="")
    json: str = option("", "file for the report")
    fvd_features: str = option("", "TorchScript I3D for the published FVD [a small network]")
    classifier_updates: int = option(
        None, "updates of the classifier of true actions; 0: none [400; tiny worlds 50]", low=0
    )
    history_updates: int = option(None, "updates for lam/news; 0: none [300; tiny worlds 0]", low=0)
    steps: int = option(SAMPLING["steps"], "MaskGIT passes per frame of the rollouts", low=1)
    temperature: float = option(SAMPLING["temperature"], "of rollouts; 0 is greedy", low=0)
    device: str = option("auto", "auto, cpu or cuda")


def main(argv=None):
    options = parse_options(ValidateOptions, __doc__, argv)
    if not options.checkpoint:
        raise UserError("the following arguments are required: --checkpoint; see --help")
    report, warnings = measure(options)
    for name, value in report.items():
        print(f"{name:40} {value:10.4g}" if value is not None else f"{name:40} {'-':>10}")
    for line in warnings:
        print(line)
    if options.json:
        values = {name: value if value is None else float(value) for name, value in report.items()}
        Path(options.json).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
