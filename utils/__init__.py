"""What surrounds a training loop: command line, optimizer, checkpoints, log, device, pictures.

OpenMP's threads spin while they wait for each other. Its library reads how long once, when torch
loads it, so this comes before any import of torch. With the usual spin two training runs on the
same cores slow each other up to elevenfold; with a short one less than twofold, and one alone is
as fast (docs/speed.md). What the user has set stays; other OpenMP libraries ignore the variable.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
