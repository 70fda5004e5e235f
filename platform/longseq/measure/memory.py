"""How much memory a training process needs, by arithmetic from the configuration. No torch here.

Counted are the bytes of tensors, as ``longseq check`` measures them: what torch's allocator has handed out at its peak.
Not counted: the Python process and its libraries (0.4 GiB on a CPU; a CUDA context, about as much, and NCCL's buffers),
what the allocator holds without using it (fragments: leave a tenth), and the data loader's worker processes.

P is the number of weights, n the number of ranks, w the bytes of a weight in training (fp32 4, bf16 and fp16 2):

    weights       w P;  ZeRO-3 w P / n, and w P gathered at the end of the forward pass
    optimiser     8 P of AdamW's moments (4 P of Muon's matrices), and 4 P of fp32 weights where DeepSpeed keeps its own
                  (ZeRO 1-3, half precision); ZeRO 1-3 divide both by n
    gradients     w P;  ZeRO 1-3 w P / n, and the buffer in which gradients wait to be summed over the ranks
    activations   what the backward pass needs of every block (or with activation checkpointing of one block, and every
                  block's input), and what it holds at its most besides; with tiles of the sequence see :func:`_tiled`
    in the step   the fp32 gradients of this rank's part
    behind it     4 P, with trainer.benchmarks: the copy of all weights that is measured
    in the CPU's  what is offloaded: the optimiser, weights, and what recomputations start from; and the
                  copies that a checkpoint is written from: 12 P of fp32 weights and moments (ZeRO 1-3 divide by n),
                  and rank 0's w P; with trainer.memory_checkpoint_every five times as much besides. Pinned memory
                  rounds each tensor up to a power of two: up to twice as much

The peak is that of three moments: the beginning of the backward pass, its end, and the optimiser's step or what is
behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longseq.attention.options import OWN_KERNELS
from longseq.config.schema import Config
from longseq.models.spec import PerformerSpec

# One state of the scan is kept for each group of this many positions: longseq.attention.scan.CHUNK * GROUP.
SCAN_GROUP = 128
# attention.backends.triton.scan keeps no states: it makes them anew, for as many sequences and heads at a time as fit
# into STATE_BYTES, one for each CHUNK positions at most (two in the backward pass); and a few more numbers a query.
STATE_BYTES, CHUNK, TRITON_NUMBERS = 512 * 1024**2, 64, 4
TRITON_WIDEST = 128
# longseq.models.head: logits at a time, and rows of them at most.
LOGITS, MOST_ROWS = 2**24, 8192
DEEPSPEED_BUCKET = 500_000_000  # DeepSpeed's own default, in elements: gigabytes, however small the model
_MAX_LIVE = 1_000_000_000  # weights that ZeRO-3 leaves gathered, DeepSpeed's default


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int  # less than their sum: they do not need their most at the same time
    host: int  # next to a GPU: what is offloaded to the CPU's memory, and what rank 0 copies for a checkpoint

    def line(self) -> str:
        """For people."""
        parts = f"weights {gib(self.weights)}, gradients {gib(self.gradients)}, optimiser {gib(self.optimizer)}, "
        parts += f"activations {gib(self.activations)}"
        host = f", and {gib(self.host)} in the CPU's memory" if self.host else ""
        return f"about {gib(self.peak)} of tensors per process ({parts}){host}"


def estimate(config: Config, vocabulary: int, *, on_cuda: bool = True) -> MemoryEstimate:
    """What one rank needs to train this configuration with so many tokens in its vocabulary, on GPUs or on CPUs."""
    spec, trainer = config.performer_spec(vocabulary, on_cuda=on_cuda), config.trainer
    count, ranks = spec.parameter_count, config.processes
    deepspeed = trainer.strategy == "deepspeed"
    stage = trainer.zero_stage if deepspeed else 0
    width = 4 if trainer.precision == "fp32" else 2
    part = count / ranks if stage else count  # elements of the optimiser that are this rank's
    held = count / ranks if stage == 3 else count  # and of the weights

    weights = (width if deepspeed else 4) * held
    if not deepspeed and width == 2:
        weights += width * count  # autocast's copies
    gathered = width * min(count, _MAX_LIVE) if stage == 3 else 0
    masters = 4 * part if stage or (deepspeed and width == 2) else 0
    state = 8 * count - (4 * spec.matrix_count if config.optim.name == "muon" else 0)
    optimizer = masters + state * part / count
    mean = 4 * held if trainer.ema_decay else 0
    part_gradients = (width if deepspeed else 4) * part
    buffers = 2 if _overlaps(config) else 1
    bucket = buffers * width * reduce_bucket(config, count) if stage else 4 * count if trainer.strategy == "ddp" else 0
    gradients = part_gradients + bucket
    read = part if stage else count * bool(masters)  # gradients in fp32, for the optimiser
    step = 4.0 * read

    tokens = config.batch_sequences * config.slice_length
    layers = [(layer := spec.layer(number), on_cuda and runs_triton(layer)) for number in range(spec.depth)]
    blocks = [block_bytes(layer, config, width, triton=triton) for layer, triton in layers]
    block, behind = max(blocks), _backward(spec, width)
    if width < 4 and any(layer.kind == "favor" and not triton for layer, triton in layers):
        behind += 4 * 3 * spec.dim  # queries, keys and values once more: these backends compute in fp32
    head = 3.0 * width * spec.dim  # a token's, but for the logits
    start = width * spec.dim  # what a recomputation starts from
    kept = 1.0 * tokens * (spec.depth * start if spec.activation_checkpointing else sum(blocks))
    recomputed = tokens * (block - start) if spec.activation_checkpointing else 0
    tiles = 0 < spec.tile < config.slice_length
    if tiles:
        kept, recomputed, head = _tiled(spec, layers, config, width)
        block = behind = 0
    offloaded = 0.0
    if trainer.activation_offload and on_cuda and not (tiles and _carries(spec, config)):
        offloaded = tokens * spec.depth * start
        kept -= max(0, tokens * (spec.depth - 2) * start)  # one is in use, and one on its way
    inputs = tokens * 2 * 8  # tokens and targets, 64 bits each
    logits = _logits(spec, tokens, width)
    states = max(_states(layer, config, _carries(spec, config)) if triton else 0.0 for layer, triton in layers)
    first = inputs + max(kept + recomputed + max(tokens * behind, states), kept + tokens * head + logits)
    last = inputs + (recomputed + states if tiles else tokens * blocks[0] + max(tokens * behind, states))

    if trainer.offload_optimizer != "none":
        offloaded, optimizer, step = offloaded + optimizer + 4 * part, 0, 4 * part  # and the fp32 gradients it reads
    if trainer.offload_params != "none":
        offloaded, weights = offloaded + weights, 0
    if on_cuda:  # rank 0's: where all ranks hold the same, it alone writes
        offloaded += 12 * part + (width if deepspeed else 4) * count
    if trainer.memory_checkpoint_every:  # two copies here, two of the rank of another node, and what they are made from
        offloaded += 5 * (12 * part + (width if deepspeed else 4) * count + (4 * count if trainer.ema_decay else 0))
    always = weights + optimizer + mean
    # What ZeRO-3 has for good, the others have from the backward pass to the step.
    early, late, left = (gradients, gradients, gradients) if stage == 3 else (bucket, gradients, part_gradients)
    copy = 4 * count if trainer.benchmarks else 0
    moments = always + gathered + early + first, always + gathered + late + last, always + left + max(step, copy)
    return MemoryEstimate(
        weights=round(weights + gathered),
        gradients=round(gradients),
        optimizer=round(optimizer + mean),
        activations=round(first),
        peak=round(max(moments)),
        host=round(offloaded),
    )


def reduce_bucket(config: Config, parameters: int) -> int:
    """Elements of the buffer in which DeepSpeed collects gradients: as many as the model has, unless it is told."""
    given = config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size")
    return int(given) if isinstance(given, (int, float)) else min(DEEPSPEED_BUCKET, parameters)


def _overlaps(config: Config) -> bool:
    """Whether gradients are summed during the backward pass, out of one buffer while another one fills (ZeRO-1, 2)."""
    given = config.deepspeed.get("zero_optimization", {}).get("overlap_comm", config.trainer.overlap_comm)
    return bool(given) and config.trainer.zero_stage < 3


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def runs_triton(spec: PerformerSpec) -> bool:
    """Whether attention takes the Triton kernels on a GPU."""
    known = spec.kernel in OWN_KERNELS and spec.head_dim <= TRITON_WIDEST
    return spec.kind == "favor" and (spec.backend == "triton" or (spec.backend == "auto" and known))


def _states(spec: PerformerSpec, config: Config, carries: bool) -> float:
    """Bytes of the states that the Triton kernels have in memory at a time, at most."""
    rows = config.batch_sequences * spec.heads
    one = 4 * spec.features * (spec.head_dim + 1)
    length = min(spec.tile or config.slice_length, config.slice_length) if carries else config.slice_length
    return min(STATE_BYTES, 2.0 * one * rows * -(-length // CHUNK))


def block_bytes(spec: PerformerSpec, config: Config, width: int, *, triton: bool = False) -> float:
    """Bytes per token that the backward pass of one block needs: those that its forward pass saves.

    The residual stream twice, both norms' outputs and the attention's output as its map reads it; the hidden layer
    before and after its activation; queries, keys, values and output of attention; and what its kind keeps. What goes
    through a convolution is kept before it and behind it, and so are values that the first layer's are mixed into.
    """
    dim, heads = spec.dim, spec.heads
    hidden = (3 if spec.ffn == "swiglu" else 2) * spec.hidden
    total = width * (5.0 * dim + hidden) + 2 * 4 * (1 if spec.norm_kind == "rmsnorm" else 2)  # and the norms' numbers
    total += width * 3 * dim if spec.conv else 0
    # q, k and v are slices of one tensor, which lives on as long as one of them is needed as it is; but not where
    # longseq.attention.backends.triton.heads takes them apart. Exact attention with forget gates is a long window.
    dense = spec.kind == "exact" and (not spec.forget_gate or config.trainer.context_parallel > 1)
    whole_qkv = (dense or config.batch_sequences == 1) and not spec.value_residual
    if spec.value_residual:
        total += width * dim  # what the first layer's values differ by
    if spec.forget_gate:  # logits, what their logsigmoid keeps, log f, and sums both ways in float64
        total += (4 * 4 + 8 * (1 if spec.causal else 2)) * heads
    if dense:
        total += width * ((3 if whole_qkv else 1) + 2 + 1) * dim + 4 * heads
        total += _mask(spec, config)
    else:
        total += width * (3 if whole_qkv and not triton else 1) * dim  # all of them, or the values
        total += width * 2 * dim + 4 * dim  # queries and keys, and the output in fp32
        total += _favor(spec, config, width, triton)
    if spec.qk_norm and triton:
        total += 2 * 4 * heads  # lengths
    elif spec.qk_norm:
        # Normalised q and k, what they were before (in fp32 the slices themselves), and the norms.
        total += width * 2 * dim + 4 * 2 * heads
        total += 0 if whole_qkv and width == 4 else width * 3 * dim if width == 4 else 4 * 2 * dim
    if spec.learned_covariance:
        total += 4 * 2 * dim  # what its matrices are multiplied with
    if spec.dropout:
        total += width * 2 * dim  # what was dropped
    return total


def _favor(spec: PerformerSpec, config: Config, width: int, triton: bool) -> float:
    """Bytes per token: states between the groups of chunks, denominators, each part's output where there are two."""
    state = 4 * spec.heads * spec.features * (spec.head_dim + 1)
    plain = not (spec.window or spec.learned_decay or spec.forget_gate or _packs(config))
    numbers = TRITON_NUMBERS if triton else 0
    if not spec.causal and plain:
        return state / config.slice_length + (1 + numbers) * 4 * spec.heads
    if spec.kind == "exact":
        return 4.0 * spec.heads
    one = (2 + numbers) * 4.0 * spec.heads
    if not triton:
        one += state / min(SCAN_GROUP, config.slice_length)
    total = one
    if spec.window:
        total += 4 * spec.dim + 3 * 4 * spec.heads  # the window's own output, and the weights of both
    if not spec.causal:
        # The scan of the reversed row: reversed queries, keys and values, and its output both ways.
        total += one + (width * 3 + 4 * 2) * spec.dim + 3 * 4 * spec.heads
    return total


def _packs(config: Config) -> bool:
    """Whether rows hold documents that do not see each other."""
    return config.data.reset


def _mask(spec: PerformerSpec, config: Config) -> float:
    """Bytes per token of what is quadratic in exact attention, where padding, documents or a decay ask for a mask."""
    if config.trainer.context_parallel > 1:  # a ring, which keeps nothing quadratic
        return 0
    length, rows = config.data.length, config.batch_sequences
    masked = config.data.packing != "concat" or _packs(config)
    if spec.learned_decay:  # a mask that learns: torch keeps all weights
        return 4 * spec.heads * length + (4 * spec.heads + 8) * length * (1 if masked else 1 / rows)
    return (1 + 4) * length if masked else 0


def _logits(spec: PerformerSpec, tokens: int, width: int) -> float:
    """Bytes of the logits that exist at a time in fp32, of their gradients, and of the head's gradient."""
    rows = min(tokens, MOST_ROWS, max(256, LOGITS // spec.vocabulary))
    return rows * spec.vocabulary * (2 * 4 + (2 * width if width < 4 else 0)) + 2 * 4 * spec.vocabulary * spec.dim


def _carries(spec: PerformerSpec, config: Config) -> bool:
    """Whether a tile goes through all layers."""
    return spec.carries and config.trainer.context_parallel == 1 and not (_packs(config) or _pads(config))


def _tiled(
    spec: PerformerSpec, layers: Sequence[tuple[PerformerSpec, bool]], config: Config, width: int
) -> tuple[float, float, float]:
    """With tiles of the sequence: bytes that are kept, bytes of one recomputation, and the head's bytes per token.

    layers: each with whether it takes the Triton kernels.

    Where a tile goes through all layers, the states between the tiles are kept, and one tile of all layers is computed
    again with two gradients of all weights. Elsewhere each block's input is kept, and the attention of one block is
    computed again as a whole: its queries, keys, values and output, the gradients of these and the residual stream's.
    """
    rows, length, dim = config.batch_sequences, config.slice_length, spec.dim
    ones = [block_bytes(layer, config, width, triton=triton) + _backward(spec, width) for layer, triton in layers]
    if _carries(spec, config):
        state = sum(4 * (spec.heads * x.features * (spec.head_dim + 1) + 2 * x.window * dim) for x in spec.plan)
        state += sum(4 * spec.heads * x.window for x in spec.plan if x.forget_gate)
        extra = 4 * 4 * dim  # the output of each part, and of both
        again = rows * spec.tile * (sum(ones) + spec.depth * extra) + 2 * 4 * spec.parameter_count
        return rows * -(-length // spec.tile) * state, again, 0
    block = 11.0 * width * dim if width == 4 else width * 11 * dim + 4 * 8 * dim
    mixing = (
        _favor(layer, config, width, triton) if layer.kind == "favor" or layer.forget_gate else _mask(layer, config)
        for layer, triton in layers
    )
    again = rows * (length * (block + max(mixing)) + spec.tile * max(ones))
    return rows * length * (spec.depth + 1) * width * dim, again, 3 * width * dim


def _pads(config: Config) -> bool:
    """Whether rows may be padded."""
    return config.data.packing != "concat"


def _backward(spec: PerformerSpec, width: int) -> float:
    """Bytes per token that the backward pass of a block holds at most, beyond what is kept for it.

    In the MLP the gradients of the residual stream and of the hidden layer; in the attention, where the MLP's are gone,
    those of q, k, v, its output and their copies.
    """
    kept, gone = (3, 3) if spec.ffn == "swiglu" else (1, 2)
    return width * max(spec.dim + kept * spec.hidden, (8 + 6 * bool(spec.conv)) * spec.dim - gone * spec.hidden)
