"""llama.cpp, through the ``xllamacpp`` package, beside this project's models."""

import json
import urllib.request
from typing import Any

import pytest
import torch


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on one thread, keys and values in float32."""

    def __init__(self, path: Any, context: int = 512) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's package xllamacpp is not installed")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def logprobs(self, ids: list[int], vocab_size: int) -> torch.Tensor:
        """(V,) log-probabilities of the token after ``ids``; -inf where llama.cpp gives none."""
        found = torch.full((vocab_size,), float("-inf"))
        body = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": vocab_size, "cache_prompt": False}
        answer = self._server.handle_completions(body)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The next tokens, each the most likely one."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
        return self._post("/completion", body | {"cache_prompt": False})["tokens"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens parsed."""
        return self._post("/tokenize", {"content": text, "add_special": True})["tokens"]

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a chat."""
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
