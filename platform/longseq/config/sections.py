"""The configuration: every key with its type, default and meaning, in the order in which it is shown.

No torch here. ``config.merging`` reads YAML files and overrides into these classes and refuses what does not fit;
``config.checks`` does the arithmetic across keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from longseq.attention.options import OPTIONS, AttentionOptions, option
from longseq.config.durations import duration_seconds
from longseq.config.finetune import FinetuneConfig
from longseq.config.plan import layers_of
from longseq.config.sources import Source
from longseq.config.training import OptimConfig, TrainerConfig
from longseq.errors import ConfigError
from longseq.models.presets import BLOCK_KEYS, BLOCKS, PRESETS, BlockRecipe
from longseq.models.spec import FFNS, NORMS, ROTARY_BASE, PerformerSpec
from longseq_data.readers.formats import FORMATS

key = option  # a configuration key: a field that carries its meaning and its limits


@dataclass
class RunConfig:
    name: str | None = key(None, "folder of the run under run.dir; default: name of the config file and the time")
    dir: str = key("runs", "where run folders are made")
    branch: str | None = key(
        None,
        "`longseq resume`: name of a new run, next to this one, that goes on from its checkpoint with other keys, a "
        "schedule that ends say; this run stays as it is",
    )
    seed: int = key(0, "everything random is a function of it: data order, masking, projections, weights", at_least=0)


@dataclass
class ModelConfig:
    preset: str = key("small", "sizes by name, for the four keys below where they are null", choices=tuple(PRESETS))
    dim: int | None = key(None, "width of the residual stream", at_least=2)
    depth: int | None = key(None, "number of blocks", at_least=1)
    heads: int | None = key(None, "attention heads; dim / heads must be even", at_least=1)
    ffn_dim: int | None = key(None, "width of the MLP's hidden layer", at_least=1)
    block: str = key(
        "classic",
        "what blocks are made of, for the five keys below and attention.qk_norm where they are null; classic: "
        "layernorm, gelu, biases and nothing else; modern: rmsnorm, swiglu, no biases, a convolution of width 4, the "
        "value residual and qk_norm",
        choices=tuple(BLOCKS),
    )
    norm_kind: str | None = key(None, "what norms divide by: deviation or root mean square", choices=NORMS)
    ffn: str | None = key(
        None,
        "the MLP's activation; swiglu has three matrices of two thirds of ffn_dim, so that the number of weights stays",
        choices=FFNS,
    )
    bias: bool | None = key(None, "biases in MLPs and norms")
    conv: int | None = key(
        None,
        "width of a short convolution on queries, keys and values, each channel by itself; with a masked objective "
        "centred; 0: none",
        at_least=0,
    )
    value_residual: bool | None = key(
        None, "each layer mixes the first layer's values into its own, in a share that each head learns"
    )
    dropout: float = key(0.0, "probability, on the embedding and on each residual branch", at_least=0, below=1)
    objective: str = key(
        "causal",
        "predict the next token, or 15 % masked ones; fim: the next one, where a share data.fim_rate of the documents "
        "is laid out as prefix, suffix, middle, so that the model can fill in, too",
        choices=("causal", "masked", "fim"),
    )
    init_from: str | None = key(
        None,
        "weights to begin with: an exported or imported folder, a run, or one of its checkpoints; the model and "
        "attention sections and data.tokenizer are those it has, where this configuration does not say otherwise",
    )
    # What tells families of Transformers apart; `longseq import` sets them.
    position: str = key("rotary", "positions: rotary, or a learned vector for each", choices=("rotary", "learned"))
    max_positions: int = key(0, "how many learned positions there are; 0 with rotary ones", at_least=0)
    rotary_base: float = key(
        ROTARY_BASE,
        "the slowest pair of a head turns by position / base, nearly: content is matched across distances up to about "
        "the base, so take it well above data.length",
        at_least=1,
    )
    norm: str = key("pre", "a norm before each branch, or after each sum (BERT's)", choices=("pre", "post"))
    norm_eps: float = key(1e-5, "added to the variance in each norm", at_least=0)
    embedding_norm: bool = key(False, "a norm behind the embedding (BERT's)")
    attention_bias: bool = key(False, "biases on queries, keys, values and the attention's output")
    head: str = key(
        "linear",
        "transform: a linear layer, GELU and a norm before the logits (BERT's)",
        choices=("linear", "transform"),
    )
    mask_scaling: bool = key(
        False, "masked tokens embed as zeros and the others are scaled in return (ESM's token dropout)"
    )
    sequence_tile: int | None = key(
        None,
        "tokens that norms, projections, MLPs and, in causal FAVOR+ models, all layers compute at a time, once more in "
        "the backward pass, so that memory hardly grows with data.length; 0: off; default: 4096 (on GPUs 65,536) "
        "from a data.length of 32,768 on, where activations need more than the model, else 0. Unless it is 0, trained "
        "models are read in tiles, too, whatever data.length is",
        at_least=0,
    )


Layers = list[Any]  # each the name of a kind, or a mapping of options


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttentionOptions):
    """Attention's options; which blocks have qk_norm is a matter of model.block."""

    layers: Layers | None = key(
        None,
        "layers of several kinds, repeated over the depth: kinds, or mappings of what a layer has of its own, where "
        "the rest is this section's: [favor, favor, favor, exact], or [{kind: favor, window: 64}, exact]; null: all "
        "are alike",
    )

    qk_norm: bool | None = key(  # type: ignore[assignment]
        None,
        "unit-length queries and keys with a learned temperature per head (next to no effect with kernel relu); "
        "default: as model.block says, classic false",
    )


Sources = list[Any]  # names of files, or each a config.sources.Source


@dataclass
class DataConfig:
    train: Sources = key(
        [],
        "files, plain or gzipped: paths, globs, URLs; folders of text, tables or images; "
        "hub:OWNER/NAME[:CONFIG]#SPLIT; or one corpus of `longseq data prepare`, with its own splits; or several such "
        "sources by weight: [{path: a.fasta.gz, weight: 0.7}, {path: prepared, weight: 0.3, name: uniref}]",
    )
    valid: Sources = key(
        [],
        "files for validation while training, or sources with a curve each, {NAME: FILE, ...}; empty: "
        "data.valid_fraction of train",
    )
    test: Sources = key([], "files for `longseq evaluate --split test`; empty: data.test_fraction of train")
    ood: Sources = key([], "out-of-distribution files for `longseq evaluate --split ood`")
    reweighted: list[str] = key(
        [], "weights that the sources of train had up to some sample; `longseq resume` writes it where they change"
    )
    split_by: str = key(
        "sequence",
        "what is hashed to hold a share of train out: the sequence of a protein, so that it stays where it is whatever "
        "file and identifier it comes with, or the record's id; texts and images go by their ids. A run without this "
        "key, of a version before, goes by ids",
        choices=("sequence", "id"),
    )
    valid_fraction: float = key(0.05, "share of train held out by data.split_by", at_least=0, below=1)
    test_fraction: float = key(0.05, "another such share, never looked at while training", at_least=0, below=1)
    format: str = key(
        "auto",
        "of all files; auto: by their names, FASTA where they say nothing; lines: one document per line; jsonl, "
        "parquet and hub have columns",
        choices=("auto", *FORMATS),
    )
    tokenizer: str = key(
        "auto",
        "what the tokens are: protein (residues), dna (A, C, G, T, N), bytes (of text), pixels, or a "
        "Hugging Face tokenizers FILE.json; "
        "auto: protein for FASTA, pixels for images, else bytes",
    )
    column: str | None = key(None, "field of a table with the text or image; default: text, or image with pixels")
    part_bytes: int = key(
        1_048_576, "a longer text is read as several documents, cut at the end of a line", at_least=64
    )
    image_size: int = key(64, "pixels on each side of an image, cropped and scaled down to it", at_least=1)
    length: int = key(512, "tokens per sequence", at_least=2)
    packing: str = key(
        "concat",
        "concat: records joined by EOS and cut at length; crop: one record a sequence, padded or cropped at random; "
        "bucket: the same, in steps of similar lengths and up to data.batch_tokens tokens, of a prepared corpus; "
        "family: the members of a cluster (data.clusters) joined by EOS in random order, one family a sequence, in "
        "such steps",
        choices=("concat", "crop", "bucket", "family"),
    )
    reset: bool = key(
        False, "with packing concat: attention and positions begin anew at each document, which gets BOS and EOS"
    )
    crop: str = key(
        "random",
        "with packing crop or bucket: which part of a longer record is taken, also for scores",
        choices=("random", "first"),
    )
    batch_tokens: int = key(
        16384, "tokens of one optimiser step, over all processes and accumulated batches, padding included", at_least=1
    )
    shuffle_buffer: int = key(
        10_000,
        "records held to shuffle the stream, 64 MiB of them at most; 1: files come in a random order, each read as "
        "it is, a proteome say; a prepared corpus is shuffled as a whole",
        at_least=1,
    )
    later_epochs: str = key(
        "auto",
        "order of files after the first epoch: a permutation of all records, from the blocks in data.cache, or through "
        "the buffer like the first; auto: of a new run permutation, where it has a cache and data.shuffle_buffer is "
        "above 1",
        choices=("auto", "buffer", "permutation"),
    )
    cache: str = key(
        "auto",
        "folder for what files are turned into, blocks of tokens, once for all processes and runs; auto: "
        "$LONGSEQ_CACHE, or longseq in $XDG_CACHE_HOME or ~/.cache; none: while a training runs, the last 512 MiB of "
        "blocks of each of its sources, in $TMPDIR",
    )
    clusters: str | None = key(
        None,
        "of prepared corpora: a table of representative and member, tab-separated, as MMseqs2 and UniRef write it; "
        "with packing crop or bucket an epoch takes one member of each cluster, drawn anew, with family all of them",
    )
    fim_rate: float | None = key(
        None,
        "with model.objective fim: probability that a training document is cut at two places and laid out as prefix, "
        "suffix, middle, 0.5 if it is not given; evaluations are read from left to right",
        at_least=0,
        below=1,
    )
    reverse_complement: bool = key(
        False, "of DNA: half of the training sequences, drawn by run.seed, come as the other strand"
    )
    reverse: float = key(
        0.0,
        "of proteins, causal models: the share of the training sequences, drawn by run.seed, that come from their last "
        "residue to their first, without a mark; `longseq score` and `benchmark proteingym` then take the mean "
        "log-likelihood of both directions",
        at_least=0,
        below=1,
    )
    strict: bool = key(
        False, "refuse letters outside the alphabet instead of reading them as X, and bytes that are not UTF-8"
    )
    workers: int = key(0, "extra processes that prepare batches, for each training process", at_least=0)
    valid_samples: int = key(256, "sequences of one validation while training", at_least=1)
    accept_changes: bool = key(
        False, "`longseq resume`: go on although the data are not those the run was started with; once"
    )

    @property
    def by_length(self) -> bool:
        """Whether a step has sequences of similar lengths, as many as fit into batch_tokens."""
        return self.packing in ("bucket", "family")

    def files(self, split: str) -> list[str]:
        """All that a split names, of all its sources; or the table of "clusters", where there is one."""
        if split == "clusters":
            return [self.clusters] if self.clusters else []
        entries = getattr(self, split)
        return [path for entry in entries for path in (entry["path"] if isinstance(entry, dict) else [entry])]

    def sources(self, split: str) -> list[Source]:
        """The sources of a split; empty where it names files alone."""
        return [entry for entry in getattr(self, split) if isinstance(entry, dict)]


# Tiles cost a fourth forward pass in three; the paper's Regular model needs 3 GB of activations at 8,192 tokens.
TILE, TILE_ON_GPU = 4096, 65536
_TILED_FROM = 32768


@dataclass
class Sections:
    """The sections of the YAML files, and what follows from their keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    deepspeed: dict[str, Any] = key({}, "passed through to DeepSpeed's own configuration")

    @property
    def fim_rate(self) -> float | None:
        """Of training documents that are laid out for infilling, of model.objective=fim alone."""
        if self.model.objective != "fim":
            return None
        return 0.5 if self.data.fim_rate is None else self.data.fim_rate

    @property
    def causal(self) -> bool:
        """Whether a token is predicted from those before it."""
        return self.model.objective != "masked"

    @property
    def batch_sequences(self) -> int:
        """Sequences of one process in one micro-batch, or slices of them; by length about the fewest."""
        trainer, data = self.trainer, self.data
        return data.batch_tokens // data.length // (self.replicas * trainer.accumulate)

    @property
    def slice_length(self) -> int:
        """Tokens of a sequence that one process holds."""
        return -(-self.data.length // self.trainer.context_parallel)

    def sequence_tile(self, *, on_cuda: bool) -> int:
        """model.sequence_tile, with its default filled in."""
        given = self.model.sequence_tile
        if given is None:
            return (TILE_ON_GPU if on_cuda else TILE) if self.slice_length >= _TILED_FROM else 0
        return given

    @property
    def processes(self) -> int:
        """Training processes on all machines together."""
        return self.trainer.nodes * self.trainer.devices

    @property
    def replicas(self) -> int:
        """Groups of processes that have sequences of their own: trainer.context_parallel processes each."""
        return self.processes // self.trainer.context_parallel

    @property
    def samples_per_step(self) -> int:
        """Sequences of one optimiser step, over all processes and accumulated batches; with bucket the fewest."""
        return self.data.batch_tokens // self.data.length

    @property
    def block(self) -> BlockRecipe:
        """What blocks are made of: the keys that are given, the others by model.block."""
        recipe = BLOCKS[self.model.block]
        given = {name: getattr(self.model, name) for name in BLOCK_KEYS} | {"qk_norm": self.attention.qk_norm}
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})

    def performer_spec(self, vocabulary: int, *, on_cuda: bool = False) -> PerformerSpec:
        """The model's architecture, sizes filled in from the preset where they are null.

        on_cuda: whether it will be trained on a GPU, which the default of model.sequence_tile depends on.

        Raises:
            ConfigError: for sizes that do not fit together.
        """
        size, model = PRESETS[self.model.preset], self.model
        own = {**vars(self.attention), **vars(self.block)}
        section = AttentionOptions(**{name: own[name] for name in OPTIONS})
        try:
            return PerformerSpec(
                vocabulary=vocabulary,
                dim=model.dim or size.dim,
                depth=model.depth or size.depth,
                heads=model.heads or size.heads,
                ffn_dim=model.ffn_dim or size.ffn_dim,
                causal=self.causal,
                dropout=model.dropout,
                **{**own, "layers": layers_of(self.attention.layers, section)},
                seed=self.finetune.feature_seed if self.finetune.table else self.run.seed,
                position=model.position,
                max_positions=model.max_positions,
                rotary_base=model.rotary_base,
                norm=model.norm,
                norm_eps=model.norm_eps,
                embedding_norm=model.embedding_norm,
                attention_bias=model.attention_bias,
                head=model.head,
                mask_scaling=model.mask_scaling,
                activation_checkpointing=self.trainer.activation_checkpointing,
                activation_offload=self.trainer.activation_offload,
                sequence_tile=self.sequence_tile(on_cuda=on_cuda),
                # Between tiles that go through all layers, ZeRO-3 would gather all weights.
                carry=not (self.trainer.strategy == "deepspeed" and self.trainer.zero_stage == 3),
            )
        except ValueError as error:
            raise ConfigError(f"{error}.") from None

    @property
    def time_limit_seconds(self) -> float | None:
        """trainer.time_limit in seconds.

        Raises:
            ConfigError: if it is no time.
        """
        limit = self.trainer.time_limit
        try:
            return None if limit is None else duration_seconds(limit)
        except ValueError as error:
            raise ConfigError(f"trainer.time_limit={limit}: {error}.") from None
