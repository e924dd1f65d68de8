"""`python play.py --export-web FOLDER`: write the page and the world for any static host.

Three ONNX graphs per world:
  * `dynamics` is one MaskGIT pass, with its temporal cache as inputs and outputs
  * `decoder` turns tokens into pixels, with a cache of its own
  * `encoder` turns a picture that a visitor drops on the page into tokens
The loop around them is player/web/local.js; sampling is player/web/maskgit.js. Weights are rounded
to float16, stored as float16, and cast back when a graph is loaded. This halves the size. The
tokens are those that PyTorch gives with the rounded weights.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from utils.cli import UserError
from utils.hardening.files import make_folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dynamics import DynamicsModel
from models.st_transformer import SpatioTemporalTransformer, apply_rope, rope_angles
from models.video_tokenizer import VideoTokenizer
from models.world_model import WorldModel
from player.session import round_weights
from player.web.site import describe, files, legend

try:
    import onnx
    import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError:
    raise UserError(
        '--export-web needs onnx and onnxscript; get them with: pip install ".[web]"'
    ) from None

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.jspi.min.mjs",
    "ort-wasm-simd-threaded.jspi.mjs",
    "ort-wasm-simd-threaded.jspi.wasm",
)
NEXT_CACHE = ["next_keys", "next_values"]


# --- the graphs ------------------------------------------------------------------------------


class WithCache(nn.Module):
    """A model whose transformer takes and returns its caches as tensors.

    Keys and values are (blocks, N, heads, context_length - 1, d). Only the last `age` (1,) frames
    are filled.
    """

    def __init__(self, model: nn.Module, transformer: SpatioTemporalTransformer, positions):
        super().__init__()
        self.model, self.transformer = model, transformer
        quantizer = model.quantizer
        every = torch.arange(quantizer.codebook_size + 1)  # the last row is the mask token
        self.register_buffer("codes", quantizer.indices_to_codes(every))
        self.length, n = transformer.context_length - 1, len(transformer.blocks)
        n_patches, heads = len(positions.space), transformer.blocks[0].time.n_heads
        self.cache_shape = (n, n_patches, heads, self.length, transformer.head_dim)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The quantizer's indices_to_codes without integer division."""
        return F.embedding(tokens, self.codes)

    def unpack(self, keys: Tensor, values: Tensor, age: Tensor) -> list:
        times = torch.arange(self.length)
        rope = rope_angles(times, self.transformer.head_dim)
        filled = times >= self.length - age
        caches = self.transformer.new_cache()
        for cache, k, v in zip(caches, keys, values, strict=True):
            cache.keys, cache.values, cache.filled = k.clone(), v.clone(), filled.clone()
            cache.rotated = apply_rope(k, rope)
        return caches

    def pack(self, caches: list) -> tuple[Tensor, Tensor]:
        keys, values = zip(*[(cache.keys, cache.values) for cache in caches], strict=True)
        return torch.stack(keys), torch.stack(values)

    def example(self) -> dict[str, Tensor]:
        tokens = torch.zeros(1, self.cache_shape[1], dtype=torch.int32)
        keys, values = torch.zeros(2, *self.cache_shape)
        age = torch.zeros(1, dtype=torch.int32)
        return {"tokens": tokens, "keys": keys, "values": values, "age": age}


class DynamicsPass(WithCache):
    """tokens (1, N), action (1,), the cache → logits (N, codebook_size) and the next cache.

    The next cache includes this frame; local.js keeps it only if the frame is finished.
    """

    def __init__(self, model: DynamicsModel):
        super().__init__(model, model.transformer, model.positions)

    def forward(self, tokens, action, keys, values, age):
        caches = self.unpack(keys, values, age)
        self.model.quantizer.indices_to_codes = self.look_up
        inputs = (tokens.unsqueeze(1), action.unsqueeze(1))
        x = self.model.hidden_states(*inputs, cache=caches, finished=True)
        return self.model.head(x)[0, 0], *self.pack(caches)

    def example(self) -> dict[str, Tensor]:
        tokens, *cache = super().example().items()
        action = ("action", torch.zeros(1, dtype=torch.int32))
        return dict([tokens, action, *cache])


class Decoder(WithCache):
    """tokens (1, N), the cache → RGB (H, W, 3), integers from 0 to 255, and the next cache."""

    def __init__(self, model: VideoTokenizer):
        super().__init__(model, model.decoder, model.decoder_positions)

    def forward(self, tokens, keys, values, age):
        caches = self.unpack(keys, values, age)
        self.model.quantizer.indices_to_codes = self.look_up
        frame = self.model.decode(tokens.unsqueeze(1), caches)[0, 0]  # (3, H, W)
        return ((frame + 1) * 127.5).round().permute(1, 2, 0), *self.pack(caches)


class Encoder(nn.Module):
    """RGB (H, W, 3) from 0 to 255 → tokens (1, N)."""

    def __init__(self, model: VideoTokenizer):
        super().__init__()
        self.model = model

    def forward(self, frame):
        return self.model.encode((frame / 127.5 - 1).permute(2, 0, 1)[None, None])[:, 0].int()


def store_half(model):
    """Store large constants as float16 and cast them back in the graph, if this loses nothing.

    It loses nothing for the rounded weights; tables of angles stay float32.
    """
    for constant in list(model.graph.initializer):
        values, name = onnx.numpy_helper.to_array(constant), constant.name
        if values.dtype != np.float32 or values.size < 256:
            continue
        half = values.astype(np.float16)
        if not (half == values).all():
            continue
        model.graph.initializer.remove(constant)
        model.graph.initializer.append(onnx.numpy_helper.from_array(half, f"{name}.half"))
        to_float = onnx.TensorProto.FLOAT
        cast = onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=to_float)
        model.graph.node.insert(0, cast)
    return model


def save_graph(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path) -> None:
    """inputs: an example of each, by name. outputs: their names.

    Opset 20 is the newest whose operators WebGPU has; it lacks `Attention` of opset 23.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter itself
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            external_data=False,
            opset_version=20,
            input_names=list(inputs),
            output_names=outputs,
            verbose=False,
        )
    onnx.save(store_half(program.model_proto), path)


# --- one world -------------------------------------------------------------------------------


def export_world(world: WorldModel, starts: np.ndarray, folder: Path) -> dict:
    """Write the three graphs of one world to `folder`. → what else local.js must know."""
    round_weights(world)
    dynamics, decoder = DynamicsPass(world.dynamics), Decoder(world.tokenizer)
    encoder, frame = Encoder(world.tokenizer), torch.zeros(*world.frame_size, 3)
    save_graph(dynamics, dynamics.example(), ["logits", *NEXT_CACHE], folder / "dynamics.onnx")
    save_graph(decoder, decoder.example(), ["frame", *NEXT_CACHE], folder / "decoder.onnx")
    save_graph(encoder, {"frame": frame}, ["tokens"], folder / "encoder.onnx")
    for module in (dynamics, decoder):
        del module.model.quantizer.indices_to_codes  # undo the replacement by look_up
    clips = []
    for clip in starts:
        tokens, previous_actions = world.encode(clip)
        clips.append({"tokens": tokens.tolist(), "previous_actions": previous_actions.tolist()})
    (folder / "clips.bin").write_bytes(np.ascontiguousarray(starts).tobytes())
    return {
        "identity": world.identity,
        "steps": world.steps,
        "temperature": world.temperature,
        "mask": world.dynamics.mask_index,
        "reach": world.reach,
        "dynamics": dynamics.cache_shape,
        "decoder": decoder.cache_shape,
        "clips": clips,
    }


# --- the page --------------------------------------------------------------------------------


def runtime() -> Path:
    """The folder of ONNX Runtime Web. npm fetches it if it is missing."""
    cache = Path(__file__).parent / "runtime"
    dist = cache / "node_modules" / "onnxruntime-web" / "dist"
    if all((dist / name).exists() for name in RUNTIME_FILES):
        return dist
    cache.mkdir(exist_ok=True)
    # two exports at the same time do not write to the same folder
    with tempfile.TemporaryDirectory(dir=cache) as part:
        options = ["--no-audit", "--no-fund", "--ignore-scripts"]
        command = ["npm", "install", "--prefix", part, *options, RUNTIME]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            raise UserError(
                f"--export-web needs npm to fetch {RUNTIME} once; install Node.js,"
                f" or unpack that package to {cache}/node_modules"
            ) from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"npm could not fetch {RUNTIME}: {reason}")
        with contextlib.suppress(OSError):  # another export has already put it there
            os.replace(Path(part) / "node_modules", cache / "node_modules")
    return dist


def check_export(worlds: list, out: Path) -> None:
    for name, world, _ in worlds:
        objective = world.dynamics.objective
        if objective != "ce":
            raise UserError(
                f"{name} was trained with --objective {objective}; the exported page plays only"
                " MaskGIT worlds (--objective ce)"
            )
    earlier_export = (out / "worlds.json").exists()
    if out.is_file() or (out.exists() and any(out.iterdir()) and not earlier_export):
        raise UserError(
            f"--export-web {out} is not empty and not an earlier export; choose another folder"
        )


def export(worlds: list, out) -> None:
    """Write the page and worlds, a list of (name, WorldModel, starts), to folder `out`.

    The folder must be new, empty or an earlier export.
    """
    out = Path(out)
    check_export(worlds, out)
    dist = runtime()
    shutil.rmtree(out / "worlds", ignore_errors=True)  # of an earlier export
    make_folder(out / "runtime")
    for name, content in files(worlds, "local").items():
        make_folder((out / name).parent)
        (out / name).write_bytes(content)
    # hide its warnings about missing packages that are not needed here
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for i, (name, world, starts) in enumerate(worlds):
        folder = out / "worlds" / str(i)
        local = export_world(world, starts, folder)
        description = describe(name, world, starts) | {"local": local}
        (folder / "world.json").write_text(json.dumps(description))
        (folder / "legend.png").write_bytes([*legend(world, starts)][-1])
    for name in ("local.js", "maskgit.js"):
        shutil.copy(Path(__file__).parent / name, out)
    for name in RUNTIME_FILES:
        shutil.copy(dist / name, out / "runtime")

    size = dict(page=0, runtime=0)
    for path in filter(Path.is_file, out.rglob("*")):
        kind = "runtime" if path.parent.name == "runtime" else "page"
        size[kind] += path.stat().st_size / 2**20
    print(f"{out}: {size['page']:.1f} MB, and {size['runtime']:.0f} MB of ONNX Runtime Web")
    print(
        f"try it: python -m http.server --directory {out} --bind 127.0.0.1"
        "  (a browser cannot load it from a file:// address)"
    )
