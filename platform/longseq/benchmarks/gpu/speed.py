"""What it costs on this GPU: attention next to SDPA, a step next to OPT's, a million tokens, decoding.

The bars are those that were set for an H200 (8 heads of 64, 256 features, causal, bf16): a smaller GPU may miss them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longseq.benchmarks import attention as attention_benchmark
from longseq.benchmarks import step as step_benchmark
from longseq.benchmarks.gpu.rows import Rows
from longseq.benchmarks.request import CAUSAL, AttentionRequest, StepRequest
from longseq.benchmarks.results import Results, ratios
from longseq.measure.peaks import PeakMeter
from longseq.measure.timing import seconds_per_call
from longseq.models.decoding import WARM_UP, Decoder
from longseq.models.performer import PerformerLM
from longseq.models.presets import PRESETS
from longseq.models.spec import PerformerSpec

# Sequences times tokens: with 8 heads enough rows for any GPU at every length.
TOKENS = 131_072
GEMM_SIZE = 8192
AGAINST_SDPA = {4_096: 1.2, 16_384: 5.0, 65_536: 20.0}
SHARE_OF_GEMM, STEP_AGAINST_OPT, MILLION_AGAINST_SHORT = 0.35, 1.35, 0.9
MILLION, SHORT = 2**20, 8_192
TILE = 65_536
STEP_LENGTHS = (1_024, 4_096, 16_384, 65_536)
PRESET = "regular"


class _Quiet:
    """A benchmark's progress that nobody watches."""

    def now(self, text: str) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, flush=True)


def attention(rows: Rows, device: str, folder: Path) -> None:
    """Forward and backward pass at each length, and their share of a matrix product's rate."""
    for length, bar in AGAINST_SDPA.items():
        request = AttentionRequest(
            lengths=(length,),
            directions=(CAUSAL,),
            contenders=("favor", "window", "exact", "fla"),
            batch=TOKENS // length,
            device=device,
            backend=_backend(device),
            dtype="bfloat16",
            seconds=20.0,
            gemm_size=GEMM_SIZE,
        )
        results = attention_benchmark.empty_results(request)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attention_benchmark.measure(request, results, _Quiet())
        _attention_rows(rows, results, length, bar)


def step(rows: Rows, device: str, folder: Path) -> None:
    """A Regular model's step at each length, its attention exchanged for OPT's."""
    for length in STEP_LENGTHS:
        request = StepRequest(
            lengths=(length,),
            directions=(CAUSAL,),
            contenders=("favor", "window", "opt"),
            preset=PRESET,
            batch=TILE // length,
            device=device,
            backend=_backend(device),
            dtype="bfloat16",
            seconds=20.0,
            gemm_size=GEMM_SIZE,
        )
        results = step_benchmark.empty_results(request)
        step_benchmark.measure(request, results, _Quiet())
        for name in ("favor", "window"):
            _ratio_row(rows, f"{name}'s step over OPT's at {length:,}", results, name, length)


def million(rows: Rows, device: str, folder: Path) -> None:
    """Tokens a second of a Regular model on one sequence of 2^20 tokens, in tiles, and on 8 of 8,192."""
    rates = {}
    for length, batch in ((SHORT, TILE // SHORT), (MILLION, 1)):
        meter = PeakMeter(torch.device(device))
        rates[length] = length * batch / _step_seconds(length, batch, device)
        what, peak = f"{batch} × {length:,} tokens, a step", f"{meter.stop() / 2**30:.2f} GiB at most"
        rows.add(what, rates[length], "tokens/s", note=peak)
    share = rates[MILLION] / rates[SHORT]
    rows.add(f"tokens/s at {MILLION:,} over those at {SHORT:,}", share, "×", least=MILLION_AGAINST_SHORT)


@torch.no_grad()
def decode(rows: Rows, device: str, folder: Path) -> None:
    """The logits of decoding against the forward pass's, in fp32 and bf16; and how fast tokens come."""
    large, options = device == "cuda", {"window": 16, "learned_share": True, "learned_decay": True}
    for dtype, most in ((torch.float32, 2e-3), (torch.bfloat16, 3e-2)):  # with room for TF32
        model = _model(PRESET if large else "tiny", device, **options).to(dtype).eval()
        for name, weight in model.named_parameters():
            if name.endswith(("qkv.weight", "attention.out.weight")):
                weight.mul_(10)  # else attention hardly matters next to the residual stream
        tokens = _tokens(model, 2, 600 if large else 70, device)
        half = tokens.shape[1] // 2
        expected = model(tokens).double()
        _, state = model.prefill(tokens[:, :half], last_only=True)
        found = []
        for at in range(half, tokens.shape[1]):
            logits, state = model.decode(tokens[:, at], state)
            found.append(logits)
        difference = float((torch.stack(found, 1) - expected[:, half:]).norm() / expected[:, half:].norm())
        what = f"logits of {len(found)} tokens, one by one, against the forward pass's, {dtype}"
        rows.add(what, difference, most=most)
        decoder = Decoder(model, model.prefill(tokens[:, :half], last_only=True)[1], in_place=True)
        steps = torch.stack([decoder.step(token).clone() for token in tokens[:, half:].unbind(1)], 1)
        difference = float((steps - torch.stack(found, 1)).abs().max())
        graph = "no graph" if decoder.graph is None else "a CUDA graph"
        rows.add(f"logits of the same tokens in place ({graph}), {dtype}", difference, most=most)
    if not large:
        return
    model = _model(PRESET, device).to(torch.bfloat16).eval()
    for batch in (1, 8, 64):
        prompt = _tokens(model, batch, 2_048, device)
        _, state = model.prefill(prompt, last_only=True)
        token = prompt[:, -1]
        for _ in range(3):
            model.decode(token, state)
        seconds = seconds_per_call(partial(model.decode, token, state), torch.device(device), 50)
        what = f"a token of {batch} sequences behind 2,048, bf16"
        rows.add(what, seconds * 1e3, "ms", note=f"{batch / seconds:,.0f} tokens/s")
        decoder = Decoder(model, state)
        for _ in range(WARM_UP + 1):
            decoder.step(token)
        if decoder.graph is None:
            rows.skipped(f"{what}, as a CUDA graph", "it was not captured: the log says why")
            continue
        seconds = seconds_per_call(partial(decoder.step, token), torch.device(device), 50)
        rows.add(f"{what}, as a CUDA graph", seconds * 1e3, "ms", note=f"{batch / seconds:,.0f} tokens/s")


def _attention_rows(rows: Rows, results: Results, length: int, bar: float) -> None:
    found = {name: results.series(CAUSAL, attention_benchmark.TRAINING, name) for name in results.about}
    gemm, at = median(results.gemm_rates), f"at {length:,}"
    rows.add(f"matrix product {GEMM_SIZE:,}² in bf16, {at}", gemm / 1e12, "TFLOP/s")
    if not found["favor"]:
        rows.failed(f"attention {at}", _why(results, "favor"))
        return
    ours = found["favor"][0]
    memory = f"{ours.memory / 2**30:.2f} GiB beyond inputs and outputs"
    rows.add(f"forward + backward {at}", ours.median * 1e3, "ms", note=memory)
    for name, least in (("exact", bar), ("fla", None)):
        what = f"{'SDPA' if name == 'exact' else name} over FAVOR+ {at}"
        if found[name]:
            rows.add(what, ratios(found[name], found["favor"])[length], "×", least=least)
        else:
            rows.skipped(what, _why(results, name))
    if found["window"] and found["exact"]:
        rows.add(f"SDPA over FAVOR+ behind a window {at}", ratios(found["exact"], found["window"])[length], "×")
    if ours.flops is not None:
        share, strict = (flops / ours.median / gemm for flops in (ours.flops.needed, ours.flops.strict))
        note = f"{strict:.1%} without what is computed a second time"
        rows.add(f"share of the matrix product's rate {at}", share, least=SHARE_OF_GEMM, note=note)


def _ratio_row(rows: Rows, what: str, results: Results, name: str, length: int) -> None:
    ours, opt = (results.series(CAUSAL, step_benchmark.STEP, contender) for contender in (name, "opt"))
    found = ratios(ours, opt)
    if length in found:
        rows.add(what, found[length], "×", most=STEP_AGAINST_OPT, note=f"{ours[0].median * 1e3:.1f} ms")
    else:
        rows.failed(what, _why(results, name))


def _backend(device: str) -> str:
    """On a GPU our kernels or an error: PyTorch's loop in their place would be timed without a word."""
    return "triton" if device == "cuda" else "auto"


def _why(results: Results, name: str) -> str:
    return "; ".join(note.text for note in results.notes if note.contender == name) or "it was not measured"


def _step_seconds(length: int, batch: int, device: str) -> float:
    """Of a whole training step: forward, loss, backward, AdamW."""
    model = _model(PRESET, device, sequence_tile=TILE if length > TILE else 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = (_tokens(model, batch, length, device, seed) for seed in (0, 1))

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss, _ = model(tokens, targets=targets)
        (loss / targets.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return median(seconds_per_call(step, torch.device(device)) for _ in range(3))


def _model(preset: str, device: str, **options: Any) -> PerformerLM:
    torch.manual_seed(0)
    spec = PerformerSpec(256, causal=True, **PRESETS[preset].sizes, **options)
    return PerformerLM(spec).to(device)


def _tokens(model: PerformerLM, batch: int, length: int, device: str, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(model.spec.vocabulary, (batch, length), generator=rng).to(device)
