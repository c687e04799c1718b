"""Responses drawn by vLLM, in this process or by a server, from the policy's weights as they are saved for every draw.

`min_p` comes before `top_k` and `top_p` there, which makes a difference beside `top_p` alone.
Old log-probabilities come from the training forward pass, so that its rounding is not the policy's; beside them stand those
that vLLM drew with.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.files import read_json
from rlhf_cli.judges.asking import Asking
from rlhf_cli.judges.endpoint import Failure, connect, post
from rlhf_cli.rollout.generate import CPU_CACHE, Request, Response
from rlhf_cli.sections import VllmServer
from rlhf_cli.signals import Pause, no_pause

GPU_SHARE = 0.4
"""Of the GPU's memory, that vLLM takes for itself while it draws; the rest is for training."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of an adapter."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are those that train, too
    "VLLM_LOGGING_LEVEL": "ERROR",  # a reload warns of what has no weights in the files
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM reads from the environment, where that says nothing else."""
LOAD, UNLOAD, COMPLETIONS = "load_lora_adapter", "unload_lora_adapter", "completions"
TIMEOUTS = {LOAD: 600.0, UNLOAD: 10.0, COMPLETIONS: 3600.0}
"""Seconds that a server may take for each; for the responses to one prompt, of many that it draws at once."""
RETRIES, PARALLEL = 4, 256  # how often each is asked again; prompts at once


class VllmEngine:
    """Draws with vLLM in this process: on the first GPU that it sees, whose memory it has while it draws, or on a CPU."""

    kept: float | None = None

    def __init__(self, save: Callable[[Path], None], **start: Any) -> None:
        """`save`: writes an adapter or all weights into a folder; `start`: vLLM's own keys. MachineError: it is not installed."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise MachineError(f"rollout.engine: vllm cannot be imported ({error}); pip install 'rlhf-cli[vllm]'") from error
        self.vllm, self.lora_request, self.save = vllm, LoRARequest, save
        self.on_gpu = torch.cuda.is_available()
        # Its generators on a CPU cannot be set back, as is done where a prompt is read in parts.
        on_cpu = {"kv_cache_memory_bytes": CPU_CACHE, "enforce_eager": True, "enable_chunked_prefill": False}
        room = {"gpu_memory_utilization": GPU_SHARE, "enable_sleep_mode": True} if self.on_gpu else on_cpu
        self.start = start | room | {"skip_tokenizer_init": True, "use_tqdm_on_load": False}
        self.running: Any = None
        self.draws = 0

    def generate(self, request: Request, pause: Pause = no_pause) -> list[list[Response]]:
        """The responses; pauses before, for a draw that has begun is not left. Reproducible as far as vLLM's seeds are."""
        pause()
        self.draws += 1
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            outputs = self._load(folder)(
                [self.vllm.TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in request.prompts],
                [self.vllm.SamplingParams(detokenize=False, **sampling(request, number)) for number in request.numbers],
                use_tqdm=False,
            )
        if self.on_gpu:
            self.running.sleep()

        def logps(one: Any) -> list[float]:
            return [known[token].logprob for token, known in zip(one.token_ids, one.logprobs, strict=True)]

        return [_responses(request, [(one.token_ids, logps(one)) for one in output.outputs]) for output in outputs]

    def _load(self, folder: str) -> Callable[..., Any]:
        """Have the saved weights in force; what draws from them."""
        rank = adapter_rank(folder)
        if self.running is None:
            own: dict[str, Any] = {"model": folder, "revision": None}
            if rank is not None:
                largest = next((size for size in LORA_RANKS if size >= rank), rank)
                own = {"enable_lora": True, "max_loras": 1, "max_lora_rank": largest}
            threads = torch.get_num_threads()
            try:
                self.running = self.vllm.LLM(**self.start | own)
            except (ValueError, RuntimeError) as error:
                raise MachineError(f"rollout.engine: vllm does not start ({error}); mend that, or use transformers") from error
            torch.set_num_threads(threads)  # it may have left one
        else:
            if self.on_gpu:
                self.running.wake_up()
            if rank is None:
                self.running.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                if not self.on_gpu:
                    self.running.apply_model(_pack_head)
                self.running.reset_prefix_cache()
        # A new number, for vLLM keeps adapters by it.
        adapter = self.lora_request(f"draw-{self.draws}", self.draws, folder)
        return partial(self.running.generate, lora_request=None if rank is None else adapter)


class ServerEngine:
    """Draws with a running `vllm serve`, which loads the policy's adapter before every draw and lets go of it afterwards."""

    kept: float | None = None

    def __init__(self, settings: VllmServer, place: str, save: Callable[[Path], None]) -> None:
        """`place`: of the recipe, for messages; `save`: writes the adapter. UsageError: the URL or the key cannot be used."""
        self.settings, self.place, self.save = settings, place, save
        self.servers = {path: connect(settings.endpoint, "", seconds, place, path) for path, seconds in TIMEOUTS.items()}

    def generate(self, request: Request, pause: Pause = no_pause) -> list[list[Response]]:
        """The responses; what a server draws beside others is reproducible up to its rounding. MachineError: it fails."""
        name = f"rlhf-{uuid4().hex}"
        with tempfile.TemporaryDirectory(dir=self.settings.folder) as folder:
            Path(folder).chmod(0o755)  # the server may be another user's
            self.save(Path(folder))
            rank, adapter = adapter_rank(folder), {"lora_name": name, "lora_path": str(Path(folder).resolve())}
            try:
                self._ask(LOAD, [adapter], pause, str)
            except MachineError as error:
                how = f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank {rank}"
                raise MachineError(f"{error}\n  a server that takes adapters: {how}") from error
            asked = {"model": name, "return_token_ids": True}
            rows = zip(request.prompts, request.numbers, strict=True)
            bodies = [asked | {"prompt": prompt.tolist()} | sampling(request, number) for prompt, number in rows]
            try:
                return self._ask(COMPLETIONS, bodies, pause, partial(_completed, request))
            finally:
                with suppress(Failure):
                    post(self.servers[UNLOAD], {"lora_name": name})

    def _ask(self, path: str, bodies: Sequence[dict[str, Any]], pause: Pause, read: Callable[[str], Any]) -> list[Any]:
        server, found = self.servers[path], _Answers()
        asking = Asking(server, RETRIES, PARALLEL, self.place, lambda key, body: read(post(server, body)), "", pause=pause)
        asking.ask_all({str(number): body for number, body in enumerate(bodies)}, found)
        return [found[str(number)] for number in range(len(bodies))]


def _pack_head(model: Any) -> None:
    """On a CPU vLLM 0.32 multiplies by a packed head, and does not pack it again where it is tied to a reloaded embedding."""
    for layer in model.modules():
        if type(layer).__name__ == "ParallelLMHead":
            layer.quant_method.process_weights_after_loading(layer)


class _Answers(dict[str, Any]):
    keep = dict.__setitem__


def adapter_rank(folder: str) -> int | None:
    """Of the adapter in the folder; None: all weights are there. UsageError: vLLM cannot read it."""
    config = Path(folder) / "adapter_config.json"
    if not config.exists():
        return None
    settings = read_json(config)
    if settings.get("target_parameters") or settings.get("trainable_token_indices"):
        raise UsageError("rollout.engine: vllm reads no adapters of experts or of tokens; use transformers")
    return int(settings["r"])


def sampling(request: Request, number: int) -> dict[str, Any]:
    """How the responses to a prompt are drawn, in vLLM's words; all that a server may have another default for is said."""
    seed = blake2b(f"{request.seed},{number}".encode(), digest_size=4).digest()
    return {
        "n": request.samples if request.temperature else 1,
        "temperature": request.temperature,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": list(request.ends),
        "ignore_eos": True,  # `ends` names all that end a response
        "seed": int.from_bytes(seed, "little") >> 1,
        "logprobs": 0,  # of the tokens that are drawn
        "skip_special_tokens": False,
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        **request.warping.warps,
    }


def _responses(request: Request, drawn: Sequence[tuple[Sequence[int], Sequence[float]]]) -> list[Response]:
    """Of the ids and log-probabilities of each. ValueError: they are not as many as each other, or as were asked for."""
    if len(drawn) != (request.samples if request.temperature else 1) or any(len(ids) != len(logps) for ids, logps in drawn):
        raise ValueError
    own = [Response(np.array(ids, np.int32), ids[-1] in request.ends, np.array(logps, np.float64)) for ids, logps in drawn]
    # Greedy samples are all the same, and vLLM draws one only.
    return own * (request.samples // len(own))


def _completed(request: Request, text: str) -> list[Response]:
    """What a server drew. Failure: its answer is another one."""
    try:
        choices = json.loads(text)["choices"]
        return _responses(request, [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise Failure("no token ids with log-probabilities in its answer; is it `vllm serve`?", again=False) from None
