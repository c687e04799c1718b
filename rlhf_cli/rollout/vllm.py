"""Responses drawn by vLLM, from the policy's weights as they are saved for every draw.

Written after vLLM's documentation and tested against a stand-in: the real library could not be run where this was made.
`min_p` comes before `top_k` and `top_p` there, which makes a difference beside `top_p` alone.
Old log-probabilities come from the training forward pass, so that its rounding is not the policy's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.errors import MachineError, UsageError
from rlhf_cli.files import read_json
from rlhf_cli.rollout.generate import Request, Response
from rlhf_cli.signals import Pause, no_pause

GPU_SHARE = 0.4
"""Of the GPU's memory, that vLLM takes for itself; the rest is for training."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of an adapter."""


class VllmEngine:
    """Draws with vLLM on the first GPU that this process sees."""

    kept: float | None = None

    def __init__(self, base: str, revision: str | None, dtype: str, save: Callable[[Path], None]) -> None:
        """`base`: what an adapter sits on; `save`: writes the adapter, or else all weights, into a folder.

        MachineError: vLLM is not installed.
        """
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise MachineError(f"rollout.engine: vllm cannot be imported ({error}); pip install 'rlhf-cli[vllm]'") from error
        self.vllm, self.lora_request = vllm, LoRARequest
        self.base, self.revision, self.dtype, self.save = base, revision, dtype, save
        self.running: Any = None
        self.draws = 0

    def generate(self, request: Request, pause: Pause = no_pause) -> list[list[Response]]:
        """The responses; pauses before, for a draw that has begun is not left. Reproducible as far as vLLM's seeds are."""
        pause()
        self.draws += 1
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            adapter = self._load(Path(folder))
            outputs = self.running.generate(
                [self.vllm.TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in request.prompts],
                [self._sampling(request, number) for number in request.numbers],
                use_tqdm=False,
                lora_request=adapter,
            )
        # Greedy samples are all the same, and vLLM draws one only.
        times = 1 if request.temperature else request.samples
        found = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
        return [
            [Response(np.array(ids, np.int32), bool(ids) and ids[-1] in request.ends) for ids in own] * times for own in found
        ]

    def _load(self, folder: Path) -> Any:
        """Have the saved weights in force; an adapter's name for this draw, else None."""
        config = folder / "adapter_config.json"
        if not config.exists():
            self.running = None  # its memory is needed for the new weights
            self.running = self._start(str(folder), None)
            return None
        settings = read_json(config)
        if settings.get("target_parameters") or settings.get("trainable_token_indices"):
            raise UsageError("rollout.engine: vllm reads no adapters of experts or of tokens; use transformers")
        if self.running is None:
            rank = settings["r"]
            largest = next((size for size in LORA_RANKS if size >= rank), rank)
            self.running = self._start(self.base, self.revision, enable_lora=True, max_loras=1, max_lora_rank=largest)
        # A new number, for vLLM keeps adapters by it.
        return self.lora_request(f"draw-{self.draws}", self.draws, str(folder))

    def _start(self, model: str, revision: str | None, **more: Any) -> Any:
        return self.vllm.LLM(
            model=model, revision=revision, dtype=self.dtype, skip_tokenizer_init=True, gpu_memory_utilization=GPU_SHARE, **more
        )

    def _sampling(self, request: Request, number: int) -> Any:
        seed = blake2b(f"{request.seed},{number}".encode(), digest_size=4).digest()
        return self.vllm.SamplingParams(
            n=request.samples if request.temperature else 1,
            temperature=request.temperature,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(request.ends),
            ignore_eos=True,  # `ends` names all that end a response
            seed=int.from_bytes(seed, "little") >> 1,
            detokenize=False,
            skip_special_tokens=False,
            **request.warping.warps,
        )
