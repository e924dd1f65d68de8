"""Capture a step of a world as one CUDA graph: one launch instead of hundreds."""

from collections.abc import Callable

import torch


def graph_on(device: torch.device) -> Callable | None:
    """The value for load_world(capture=…): capture_cuda_graph on a GPU, else None."""
    return capture_cuda_graph if device.type == "cuda" else None


def capture_cuda_graph(step: Callable, generator: torch.Generator) -> Callable:
    """Run `step` three times to warm up, then capture it. → the same step as one CUDA graph.

    step takes no arguments, uses the same memory each time and draws from `generator`.
    """
    with torch.cuda.device(generator.device):
        random_state, cached = generator.get_state(), torch.is_autocast_cache_enabled()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()
        # a weight that is cast outside the graph would be freed before the graph is replayed
        torch.set_autocast_cache_enabled(False)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            result = step()
        torch.set_autocast_cache_enabled(cached)
        generator.set_state(random_state)

    def replay():
        graph.replay()
        return result

    return replay
