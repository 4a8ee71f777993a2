"""`llava doctor`: hardware, packages, what each command lacks, and a measured self-test.

torch is imported only once it is known to be installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from llava_align.config import DoctorConfig
from llava_align.doctor import flash_attention
from llava_core.cli.console import human_bytes, say, show, visible, width
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError, first_line
from llava_core.launcher_variables import usable_cores
from llava_core.types import JsonDict

PACKAGE = "llava-align"
TORCH = "https://pytorch.org/get-started/locally"
OPTIONAL = {"llava download, push --to modelscope": "modelscope", "train run --report-to wandb": "wandb"}
"""Shared packages that one command or flag alone needs; the others run without them."""
EXTRAS = {
    "llava demo": "plots",
    "llava demo-stage2": "plots",
    "train sweep": "sweep",
    "train run --report-to tensorboard": "tensorboard",
    "extract run --ray, train sweep --ray": "ray",
    "language models as GGUF, export --to gguf": "gguf",
    "infer score, words by jieba": "score",
    "the lessons in docs/learn": "notebook",
}
"""Extra that each command or feature needs besides the packages that all commands share."""
SHARED = ("extract, train, infer", "llava trace, examples, match, chat-llm, import, export, push --to hf")
"""Commands that need no extra."""
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF"),
    *("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_CACHE", "MODELSCOPE_API_TOKEN"),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY", "LLAVA_API_KEY"),
)
"""Environment variables that change what a command does."""
SECRET = re.compile("KEY|TOKEN")


def run(config: DoctorConfig) -> JsonDict:
    """Print a table for each section. The exit code is 1 if the demo cannot run here."""
    packages, missing = _packages()
    report: JsonDict = {"machine": _machine(config.folder), "packages": packages}
    faults: list[str] = []
    if "torch" not in missing:
        report["torch"], faults = _torch()
    if "CUDA" in report.get("torch", ()):
        report["flash-attn"] = {"advice": flash_attention.advice(_place())}
    commands = _commands(missing, faults)
    report |= {
        "commands": commands,
        "caches": _caches(os.environ),
        "environment": environment(os.environ),
    }
    for title, rows in report.items():
        _print(title, rows)
    needed = [*missing, *({"plots"} if commands["llava demo"] != commands[SHARED[0]] else ())]
    report["missing"] = needed
    if needed:
        say(f"missing: {', '.join(needed)}; pip install '{PACKAGE}[plots]'")
    for fault in faults:
        say(fault)
    if needed or faults:
        return {**report, "exit_code": 1}
    if config.test:
        say("measuring, for up to a minute")
        try:
            report["self-test"] = _self_test(config.folder)
        except (LlavaError, OSError, RuntimeError) as error:  # the last is torch's own
            say(f"the self-test failed: {first_line(error)}")
            return {**report, "exit_code": 1}
    show(translated("\nthe demo can run here: python -m llava_align demo"))
    return report


def _machine(folder: Path) -> JsonDict:
    from llava_core import __version__

    free = shutil.disk_usage(folder)
    return {
        PACKAGE: __version__,
        "Python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
        "CPU cores": usable_cores(),
        "disk": f"{human_bytes(free.free)} free of {human_bytes(free.total)}",
        "C compiler, for --compile": shutil.which("cc") or shutil.which("gcc") or "none",
    }


def _torch() -> tuple[JsonDict, list[str]]:
    """Facts about torch, and faults that keep it from working although it is installed."""
    try:
        import torch

        from llava_core.device import free_ram
    except (ImportError, OSError) as error:  # built for another Python, or CUDA's libraries are missing
        why = first_line(error)
        fault = f"torch cannot be imported: {why}; install one for this machine: {TORCH}"
        return {"torch": f"cannot be imported: {why}"}, [fault]
    found = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none: this torch is for CPUs",
        "free RAM": human_bytes(free_ram()),
    }
    if torch.version.cuda and not torch.cuda.is_available():
        found["GPU"] = "none that this torch can use: see nvidia-smi, and the driver's CUDA version"
    elif not torch.version.cuda and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        found["GPU"] = f"this machine has an NVIDIA GPU: install a torch with CUDA: {TORCH}"
    if torch.cuda.device_count():
        found["NVIDIA driver"] = driver()
    faults = []
    for index in range(torch.cuda.device_count()):
        try:
            found[f"GPU {index}"] = gpu(index)
        except (RuntimeError, AssertionError) as error:  # busy, too old or new for this torch, lost
            found[f"GPU {index}"] = f"cannot be used: {first_line(error)}"
            faults.append(f"GPU {index} {found[f'GPU {index}']}; without it: CUDA_VISIBLE_DEVICES=")
    return found, faults


def gpu(index: int) -> str:
    """Name, capability and memory of a working GPU. Raises RuntimeError, or AssertionError without CUDA."""
    import torch

    its, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
    torch.ones(2, device=f"cuda:{index}").sum().item()
    return f"{its.name}, compute {its.major}.{its.minor}, {human_bytes(free)} free of {human_bytes(total)}"


def driver() -> str:
    """Version of the NVIDIA driver, and the newest CUDA version that it supports."""
    try:
        output = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {first_line(error)}"
    versions = re.findall(r"(?:Driver|CUDA) Version: *(\S+)", output)
    return ", for CUDA up to ".join(versions) or "unknown: nvidia-smi names none"


def _place() -> flash_attention.Place:
    import torch

    return flash_attention.Place(
        python=sys.version_info[:2],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cxx11_abi=torch.compiled_with_cxx11_abi(),
        platform=sysconfig.get_platform().replace("-", "_"),
    )


def requirements(extra: str = "") -> list[Requirement]:
    """Packages that all commands share, or that an extra adds, as the installed project declares them."""
    try:
        declared = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise LlavaError(f"{PACKAGE} is not installed", do="pip install -c constraints.txt -e .") from None
    wanted: list[Requirement] = []
    for requirement in map(Requirement, declared):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else marker and not always and marker.evaluate({"extra": extra}):
            nested = [r for name in requirement.extras for r in requirements(name)]
            wanted += nested if requirement.name == PACKAGE else [requirement]
    return wanted


def installed(requirement: Requirement) -> str | None:
    """Installed version of the package, suitable or not; None without one."""
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def met(requirement: Requirement) -> bool:
    version = installed(requirement)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def state(requirement: Requirement) -> str:
    """Installed version, and whether it is suitable."""
    version = installed(requirement)
    if version is None:
        return "missing"
    return version if met(requirement) else f"{version}: too old or new"


def _packages() -> tuple[JsonDict, list[str]]:
    """State of each shared package, and the names of those that are missing or unsuitable."""
    states = {str(r).split(";")[0]: state(r) for r in requirements()}
    return states, [r.name for r in requirements() if not met(r) and r.name not in OPTIONAL.values()]


def _commands(missing: list[str], faults: list[str]) -> JsonDict:
    """What each command lacks, or "ready"."""
    shared = f"lack {', '.join(missing)}" if missing else "cannot run: see torch" if faults else "ready"
    commands = dict.fromkeys(SHARED, shared)
    for command, extra in EXTRAS.items():
        wanted = requirements(extra)
        lacking = [r.name for r in wanted if not met(r)]
        if lacking:
            commands[command] = f"lacks {', '.join(lacking)}: pip install '{PACKAGE}[{extra}]'"
        elif wanted:
            commands[command] = shared
        else:
            commands[command] = f"an older {PACKAGE} is installed: pip install -c constraints.txt -e ."
    for command, package in OPTIONAL.items():
        lacking = [str(r) for r in requirements() if r.name == package and not met(r)]
        commands[command] = f"lacks {package}: pip install '{lacking[0]}'" if lacking else shared
    return commands


def _caches(variables: Mapping[str, str]) -> JsonDict:
    """Sizes and folders of the caches of ModelScope, Hugging Face and torch.compile."""
    home = Path("~/.cache").expanduser()
    user = Path.home().name
    folders = {
        "ModelScope": variables.get("MODELSCOPE_CACHE") or home / "modelscope",
        "Hugging Face": variables.get("HF_HOME") or home / "huggingface",
        "torch.compile": variables.get("TORCHINDUCTOR_CACHE_DIR")
        or Path(tempfile.gettempdir()) / f"torchinductor_{user}",
    }
    return {name: f"{human_bytes(_bytes_in(Path(folder)))} in {folder}" for name, folder in folders.items()}


def _bytes_in(folder: Path) -> int:
    paths = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in paths)


def environment(variables: Mapping[str, str]) -> JsonDict:
    """The VARIABLES that are set; secrets, and passwords in URLs, are masked."""
    return {
        name: "(set)" if SECRET.search(name) else re.sub("//[^/@]*@", "//…@", variables[name])
        for name in VARIABLES
        if variables.get(name)
    }


def _self_test(folder: Path) -> JsonDict:
    """Measure, print and return the rates."""
    from llava_align.doctor.selftest import measure

    rates = measure(folder)
    _print(
        "self-test",
        {
            f"matrix products on {rates['device']}": f"{rates['matmul_per_s'] / 1e12:.3g} TFLOP/s",
            "rows of features from disk, at random": f"{human_bytes(rates['disk_bytes_per_s'])}/s",
            "encode, the demo's pictures": f"{rates['encoded_per_s']:,.0f} images/s",
            "train on the demo's world": f"{rates['trained_per_s']:,.1f} samples/s",
            "attention in training": rates["attention"],
            "faster attention, not taken": rates["attention_passed_over"] or "none is known for this device",
            "`train plan` for Qwen3-0.6B, batches of 16": f"{rates['planned_reference_samples_per_s']:,.3g} "
            f"samples/s, {human_bytes(rates['planned_reference_memory_bytes'])}",
        },
    )
    return rates


def _print(title: str, rows: Mapping[str, Any]) -> None:
    """Print a titled table, all left-aligned, since most values are words."""
    named = {translated(name): translated(str(value)) for name, value in rows.items()}
    wide = max(map(width, named), default=0)
    lines = (
        f"{name}{' ' * (wide - width(name))}  {visible(value)}".rstrip() for name, value in named.items()
    )
    show("\n".join(("", translated(title), *lines)))
