"""`train plan`: steps, memory and time of a run on this machine, predicted without loading weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llava_core.cli.console import human_bytes, human_seconds, say, show, table
from llava_core.cli.translation import translated
from llava_core.device import default_dtype, free_memory, matmul_rate
from llava_core.language.model import context_of
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.projector.projector import parameter_count
from llava_core.types import JsonDict
from train.config import RunConfig
from train.data.batch import TextCounts
from train.data.feature_cache import pick_residence, worth_caching
from train.data.packing import cut, tokens_of
from train.data.prefetch import AHEAD
from train.data.samples import Samples
from train.data.schedule import Schedule
from train.flops import Work, head_width
from train.initialization import projector_of, require_same_kind
from train.model.loss import CHUNK_LOGITS
from train.resources import TrainingResources
from train.run_folder import RunFolder
from train.throughput import Throughput, peak_memory

SAMPLED = 256
"""Samples, spread over all, whose tokens are counted."""
EFFICIENCY = {"cuda": 0.4, "mps": 0.4, "cpu": 0.45}
"""Share of the matmul rate that training is assumed to reach; benchmarks/RESULTS.md has the measured ones,
which are those of CPUs."""
SHARE = 0.75
"""Of the free RAM, what a run may take: predicted memory is right within a third."""
COSTLESS = frozenset(("out", "lr", "weight_decay", "warmup", "decay"))
"""Flags that change nothing of a Prediction."""
COUNTS = (
    *("shards", "samples", "steps", "frozen_parameters", "trained_parameters", "visual_tokens"),
    *("tokens_per_step", "micro_tokens", "answer_tokens_per_step"),
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run will take: time within a factor of 2, if nothing else runs; memory within a third."""

    samples: int
    steps: int
    ending: str
    """What ends the run (Schedule.ending)."""
    frozen_parameters: int
    trained_parameters: int
    """Of the projector and of the language model."""
    visual_tokens: int
    """Visual tokens of a sample, as the language model sees them."""
    tokens_per_step: float
    """Visual ones included."""
    micro_tokens: int
    """--micro-tokens, or as many as the free RAM holds activations of."""
    answer_tokens_per_step: float
    operations_per_step: float
    matmul_rate: float
    """Operations per second of all processes, measured."""
    efficiency: float
    """Assumed share of that rate."""
    memory: dict[str, int]
    """Bytes held at the peak, by what holds them; on a CPU the process itself is among it."""
    seconds: float
    """Steps and evaluations."""
    work: Work

    @property
    def steps_per_s(self) -> float:
        return self.matmul_rate * self.efficiency / self.operations_per_step

    def compared(self, measured: Throughput) -> JsonDict:
        """Speed and memory, measured in this process and predicted; empty if it made no step."""
        if not measured.total_steps:
            return {}
        return {
            "steps_per_s": measured.total_steps / measured.total_seconds,
            "planned_steps_per_s": self.steps_per_s,
            "memory_bytes": peak_memory(measured.device),
            "planned_memory_bytes": sum(self.memory.values()),
        }


def run(config: RunConfig) -> JsonDict:
    """`train plan`, and `train run --dry-run`: print and return the figures of a Prediction."""
    RunFolder(config.out, config)  # or refuse, as the run would
    resources = TrainingResources(config, weights=False)
    if config.init is not None:
        require_same_kind(
            load_checkpoint(config.init),
            projector_of(config, resources.shards[0], resources.llm.hidden),
            config.tune,
        )
    predicted = forecast(config, resources)
    figures = {key: value for key, value in vars(predicted).items() if key != "work"}
    samples, _ = resources.samples(config)
    figures |= {
        "shards": len(resources.shards),
        "feature_bytes_per_epoch": feature_bytes_per_epoch(config, samples),
        **({"left_out": samples.left_out} if samples.left_out else {}),
    }
    for line in samples.described(config.shares):
        say(line)
    _print(predicted, figures)
    return figures


def feature_bytes_per_epoch(config: RunConfig, samples: Samples) -> int:
    """Bytes that an epoch reads from disk."""
    mix, total = Schedule.of(config, samples.sizes).mix, 0.0
    drawn = samples.sizes if mix is None else mix.drawn(len(samples))
    for (_, indices), draws in zip(samples.by_source(), drawn, strict=True):
        shown = (samples.place(index)[0] for index in indices if samples.has_picture(index))
        total += sum(samples.shards[s].row_bytes for s in shown) * draws / len(indices)
    return round(total)


def forecast(config: RunConfig, resources: TrainingResources, measure_for: float = 2.0) -> Prediction:
    """`predict` for a run on these resources, before it has begun and in one process."""
    resources.use(config)
    resources.tune(config)
    samples, held_out_samples = resources.samples(config)
    held_out = len(held_out_samples) if held_out_samples else 0
    schedule = Schedule.of(config, samples.sizes)
    training = worth_caching(config.resident, schedule.repeats)
    needed = training * samples.feature_bytes
    needed += held_out_samples.feature_bytes if held_out_samples else 0
    here = pick_residence(config.resident, needed, resources.device) == resources.device
    cached = here * round(training * schedule.read * samples.share_with_picture)
    cached += here * len(held_out_samples.with_picture) if held_out_samples else 0
    return predict(
        config,
        samples,
        resources.llm.model,
        resources.device,
        resources.memory_before,
        held_out,
        cached,
        measure_for=measure_for,
    )


def predict(
    config: RunConfig,
    samples: Samples,
    model: Any,
    device: torch.device,
    memory_before: int,
    held_out: int = 0,
    cached: int = 0,
    processes: int = 1,
    measure_for: float = 0.3,
) -> Prediction:
    """Steps, memory and time of a run, for a transformers model that may be on the meta device.

    `memory_before` are the bytes that the process held before the model was loaded, `held_out` the samples of
    an evaluation, `cached` the rows whose features stay on the device; `processes` train together, each on a
    device of its own. Measures the machine's matmul rate for `measure_for` seconds.
    """
    first, dtype = samples.shards[0], default_dtype(device)
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = parameter_count(model) - tuned
    schedule = Schedule.of(config, samples.sizes)
    batch = min(config.batch_size, len(samples))
    examples = [samples.example(index, epoch=0) for index in schedule.spread(SAMPLED)]
    projector = projector_of(config, first, model.get_input_embeddings().weight.shape[1])
    visual = projector.tokens_out(first.tokens)
    lengths = [tokens_of(example, visual) for example in examples]
    longest = samples.example(max(range(len(samples)), key=samples.weight), epoch=0)
    most = [max(*lengths, tokens_of(longest, visual))]
    list(cut(most, config.micro_tokens, context_of(model.config)))  # what the run would refuse
    counts = TextCounts.of(examples)
    work, per_step = Work.of(model, projector, first.tokens), batch / len(examples)
    operations = work.operations(counts, visual) * per_step
    copies, recomputes = config.tune == "llm" and dtype != torch.float32, config.gradient_checkpointing
    rate, efficiency = matmul_rate(device, dtype, measure_for) * processes, EFFICIENCY[device.type]
    evaluations = 0
    if config.eval_features:
        evaluations = 1 + -(-schedule.steps // config.eval_every)
    # An evaluation takes two forward passes a sample, about what training on it takes.
    evaluated = evaluations * held_out / batch
    per_token = activation_bytes(model.config, dtype, config.tune, recomputes)
    weights = parameter_count(model) * dtype.itemsize
    # Beside the batches of steps those of an evaluation, with the right pictures and with others.
    ahead = AHEAD + 1 + 2 * min(AHEAD + 1, held_out / batch)
    others = {
        "projector_and_optimizer": parameter_count(projector) * 16,
        # Its gradient and AdamW's two moments in fp32, and a copy in fp32 of weights in a shorter type.
        **({"tuned_and_optimizer": tuned * (12 + 4 * copies)} if tuned else {}),
        "features_read_ahead": round(ahead * counts.pictures * per_step * samples.row_bytes),
        **({"features_kept": cached * samples.row_bytes} if cached else {}),
    }
    micro_tokens, needed = config.micro_tokens, sum(lengths) * per_step
    if device.type != "cuda":  # which says itself when its memory is full
        loaded = weights if model.device.type != "meta" else 0
        free = SHARE * (free_memory(device) + loaded) - weights - sum(others.values())
        micro_tokens = min(micro_tokens, max(*most, int(free / per_token)))
    tokens = min(micro_tokens, needed)
    head_rows = min(
        CHUNK_LOGITS // model.config.vocab_size, counts.answers * per_step * tokens / sum(lengths)
    )
    return Prediction(
        samples=len(samples),
        steps=schedule.steps,
        ending=schedule.ending,
        frozen_parameters=frozen,
        trained_parameters=parameter_count(projector) + tuned,
        visual_tokens=visual,
        tokens_per_step=needed,
        micro_tokens=micro_tokens,
        answer_tokens_per_step=counts.answers * per_step,
        operations_per_step=operations,
        matmul_rate=rate,
        efficiency=efficiency,
        memory={
            **({"process": memory_before} if device.type != "cuda" else {}),
            "language_model": weights,
            "activations": round(tokens * per_token),
            # In fp32 as logits and as probabilities, and once more in the model's own type.
            "logits": round(head_rows * model.config.vocab_size * (8 + dtype.itemsize)),
            **others,
        },
        seconds=(schedule.steps + evaluated) * operations / (rate * efficiency),
        work=work,
    )


def activation_bytes(
    config: Any, dtype: torch.dtype, tune: str = "projector", recomputes: bool = False
) -> int:
    """Bytes per token that the blocks keep for the backward pass.

    Norms keep their input in fp32; attention its queries, its output, and keys and values for every query's
    head; SwiGLU three of its width. Layers with LoRA, or whose weights train, keep their input; norms whose
    weights train what they scale. If it `recomputes`, only what goes into each block stays, and all of one.
    """
    heads, width, hidden = config.num_attention_heads, head_width(config), config.hidden_size
    queries, keys = heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width
    norms = 2 * hidden + queries + keys
    wide = getattr(config, "intermediate_size", 4 * hidden)
    others = 4 * queries + 3 * wide
    others += (tune != "projector") * (2 * hidden + queries + wide) + (tune == "llm") * norms
    block, layers = 4 * norms + dtype.itemsize * others, config.num_hidden_layers
    return int(layers * hidden * dtype.itemsize + block if recomputes else layers * block)


def outcome_line(outcome: JsonDict) -> str:
    """The figures of `Prediction.compared` as a line of the log."""
    return (
        f"planned {outcome['planned_steps_per_s']:.2f} steps/s and "
        f"{human_bytes(outcome['planned_memory_bytes'])}, was {outcome['steps_per_s']:.2f} steps/s "
        f"({outcome['steps_per_s'] / outcome['planned_steps_per_s']:.0%}) and "
        f"{human_bytes(outcome['memory_bytes'])} "
        f"({outcome['memory_bytes'] / outcome['planned_memory_bytes']:.0%})"
    )


def _print(predicted: Prediction, figures: JsonDict) -> None:
    total = sum(predicted.memory.values())
    rows = [(key.replace("_", " "), f"{figures[key]:,.0f}") for key in COUNTS]
    rows.insert(COUNTS.index("steps") + 1, ("the run", translated(predicted.ending)))
    rows += [("feature bytes per epoch", human_bytes(figures["feature_bytes_per_epoch"]))]
    rows += [(f"memory: {key.replace('_', ' ')}", human_bytes(n)) for key, n in predicted.memory.items()]
    rows += [
        ("memory in all, within about a third", human_bytes(total)),
        ("needed operations per step", f"{predicted.operations_per_step:.3g}"),
        ("matmul rate of this machine, measured", f"{predicted.matmul_rate / 1e12:.3g} TFLOP/s"),
        ("share of it that is assumed", f"{predicted.efficiency:.0%}"),
        ("steps per second", f"{predicted.steps_per_s:.3g}"),
        ("time if nothing else runs, within about a factor of 2", human_seconds(predicted.seconds)),
    ]
    show(table(rows))
