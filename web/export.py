"""`python play.py --export-web FOLDER`: the page with the world in it, for any static host.

Three ONNX graphs per world: `dynamics` is one MaskGIT pass with its temporal cache as inputs and outputs, `decoder` turns tokens into
pixels with a cache of its own, `encoder` turns a picture that a visitor drops into tokens. The loop around them is web/local.js, sampling is web/maskgit.js. Weights are
rounded to float16, stored so, and cast back when a graph is loaded: half the size, and the tokens of PyTorch with rounded weights.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import UserError, make_folder
from game import round_weights
from models.st_transformer import SpatioTemporalPositionalEncoding
from web.site import describe, files, legend

try:
    import onnx
    import onnxscript  # noqa: F401  torch.onnx needs it
except ImportError:
    raise UserError('--export-web needs onnx and onnxscript; get them with: pip install ".[web]"') from None

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm", "ort.jspi.min.mjs",
                 "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm")  # fmt: skip


class WithCache(nn.Module):
    """A transformer's caches as tensors: keys and values (blocks, N, heads, context_length - 1, d), of which the last `age` (1,) are filled."""

    def __init__(self, model, transformer):
        super().__init__()
        self.model, self.transformer = model, transformer
        quantizer = model.quantizer
        self.register_buffer("codes", quantizer.indices_to_codes(torch.arange(quantizer.codebook_size + 1)))  # and a row for the mask
        self.length, n = transformer.context_length - 1, len(transformer.blocks)
        heads = transformer.blocks[0].time.n_heads
        self.cache_shape = (n, len(self.patches()), heads, self.length, transformer.head_dim)

    def patches(self):
        positions = self.model.positions if hasattr(self.model, "positions") else self.model.decoder_positions
        return positions.space

    def look_up(self, tokens):
        return F.embedding(tokens, self.codes)  # as indices_to_codes, without integer division

    def caches(self, keys, values, age):
        times = torch.arange(self.length)
        rotation = SpatioTemporalPositionalEncoding.rotation(times, self.transformer.head_dim)
        filled = times >= self.length - age
        caches = self.transformer.new_cache()
        for cache, k, v in zip(caches, keys, values):
            cache.keys, cache.values, cache.filled = k.clone(), v.clone(), filled.clone()
            cache.rotated = SpatioTemporalPositionalEncoding.rotate(k, rotation)
        return caches

    def inputs(self):
        N = self.cache_shape[1]
        return [torch.zeros(1, N, dtype=torch.int32), *torch.zeros(2, *self.cache_shape), torch.zeros(1, dtype=torch.int32)]


class DynamicsPass(WithCache):
    """tokens (1, N), action (1,), the cache → logits (N, codebook_size), and the cache if this frame were finished."""

    def __init__(self, model):
        super().__init__(model, model.transformer)

    def forward(self, tokens, action, keys, values, age):
        caches = self.caches(keys, values, age)
        self.model.quantizer.indices_to_codes = self.look_up
        x = self.model.states(tokens.unsqueeze(1), self.model.condition(action.unsqueeze(1)), cache=caches, finished=True)
        return self.model.head(x)[0, 0], torch.stack([c.keys for c in caches]), torch.stack([c.values for c in caches])


class Decoder(WithCache):
    """tokens (1, N), the cache → RGB (H, W, 3) as whole numbers from 0 to 255, and the cache."""

    def __init__(self, model):
        super().__init__(model, model.decoder)

    def forward(self, tokens, keys, values, age):
        caches = self.caches(keys, values, age)
        self.model.quantizer.indices_to_codes = self.look_up
        frame = self.model.decode(tokens.unsqueeze(1), caches)[0, 0]  # (3, H, W)
        return ((frame + 1) * 127.5).round().permute(1, 2, 0), torch.stack([c.keys for c in caches]), torch.stack([c.values for c in caches])


class Encoder(nn.Module):
    """RGB (H, W, 3) from 0 to 255 → tokens (1, N)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frame):
        return self.model.encode((frame / 127.5 - 1).permute(2, 0, 1)[None, None])[:, 0].int()


def store_half(model):
    """Keep large constants as float16 and cast them back in the graph, where that loses nothing: weights that were rounded, but no table."""
    for constant in list(model.graph.initializer):
        values = onnx.numpy_helper.to_array(constant)
        if values.dtype == np.float32 and values.size >= 256 and (values.astype(np.float16) == values).all():
            name = constant.name
            model.graph.initializer.remove(constant)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            model.graph.node.insert(0, onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    return model


def save_graph(module, inputs, names, path):
    """names: of inputs and outputs. Opset 20: the newest whose operators WebGPU has (`Attention` of 23 is missing there)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
        program = torch.onnx.export(
            module.eval(), tuple(inputs), dynamo=True, external_data=False, opset_version=20, input_names=names[0], output_names=names[1], verbose=False
        )
    onnx.save(store_half(program.model_proto), path)


def export_world(world, starts, folder):
    """The three graphs of one world into `folder`; → what local.js must know besides."""
    round_weights(world)
    dynamics, decoder = DynamicsPass(world.dynamics), Decoder(world.tokenizer)
    tokens, keys, values, age = dynamics.inputs()
    cache = (["keys", "values"], ["next_keys", "next_values"])
    save_graph(dynamics, [tokens, torch.zeros(1, dtype=torch.int32), keys, values, age],
               (["tokens", "action", *cache[0], "age"], ["logits", *cache[1]]), folder / "dynamics.onnx")  # fmt: skip
    save_graph(decoder, decoder.inputs(), (["tokens", *cache[0], "age"], ["frame", *cache[1]]), folder / "decoder.onnx")
    save_graph(Encoder(world.tokenizer), [torch.zeros(*world.frame_size, 3)], (["frame"], ["tokens"]), folder / "encoder.onnx")
    for module in (dynamics, decoder):
        del module.model.quantizer.indices_to_codes  # the models are themselves again
    clips = [[found.tolist() for found in world.encode(clip)] for clip in starts]
    (folder / "clips.bin").write_bytes(np.ascontiguousarray(starts).tobytes())
    return {
        "identity": world.identity, "steps": world.steps, "temperature": world.temperature, "mask": world.dynamics.mask_index, "reach": world.reach,
        "dynamics": dynamics.cache_shape, "decoder": decoder.cache_shape, "clips": [{"tokens": tokens, "led_to": led_to} for tokens, led_to in clips],
    }  # fmt: skip


def runtime():
    """The folder of ONNX Runtime Web, fetched with npm at first."""
    cache = Path(__file__).parent / "runtime"
    dist = cache / "node_modules" / "onnxruntime-web" / "dist"
    if not all((dist / name).exists() for name in RUNTIME_FILES):
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:  # two exports at once do not write to the same place
            try:
                done = subprocess.run(["npm", "install", "--prefix", part, "--no-audit", "--no-fund", "--ignore-scripts", RUNTIME], capture_output=True, text=True)
            except OSError:
                raise UserError(f"--export-web needs npm once, to get {RUNTIME}; install Node.js, or unpack that package to {cache}/node_modules") from None
            if done.returncode:
                raise UserError(f"npm could not get {RUNTIME}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
            with contextlib.suppress(OSError):  # the other was first
                os.replace(Path(part) / "node_modules", cache / "node_modules")
    return dist


def export(worlds, out):
    """The page and worlds, a list of (name, WorldModel, starts), into folder `out`, which must be new, empty or an earlier export."""
    out = Path(out)
    for name, world, _ in worlds:
        if world.dynamics.objective != "ce":
            raise UserError(f"{name} was trained with --objective {world.dynamics.objective}; the page in the browser plays MaskGIT worlds (--objective ce) alone")
    if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / "worlds.json").exists()):
        raise UserError(f"--export-web {out} is not empty and no earlier export; choose another folder")
    dist = runtime()
    shutil.rmtree(out / "worlds", ignore_errors=True)  # of an earlier export
    make_folder(out / "runtime")
    for name, content in files(worlds, "local").items():
        make_folder((out / name).parent)
        (out / name).write_bytes(content)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses packages that nobody needs here
    for i, (name, world, starts) in enumerate(worlds):
        local = export_world(world, starts, out / "worlds" / str(i))
        (out / "worlds" / str(i) / "world.json").write_text(json.dumps(describe(name, world, starts) | {"local": local}))
        (out / "worlds" / str(i) / "legend.png").write_bytes([*legend(world, starts)][-1])
    for name in ("local.js", "maskgit.js"):
        shutil.copy(Path(__file__).parent / name, out)
    for name in RUNTIME_FILES:
        shutil.copy(dist / name, out / "runtime")
    ours = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.parent.name != "runtime")
    print(f"{out}: {ours / 2**20:.1f} MB, and {sum(path.stat().st_size for path in (out / 'runtime').iterdir()) / 2**20:.0f} MB of ONNX Runtime Web")
    print(f"try it: python -m http.server --directory {out} --bind 127.0.0.1  (a browser cannot load it from a file:// address)")
