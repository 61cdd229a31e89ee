"""What of the installed trainers is supported, and which path would run: `python -m conspo_kernels info --trainer`."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any, NamedTuple

from .required import MINIMUM, required


class Supported(NamedTuple):
    """A framework, as an integration needs it.

    tested: the version that the tests run with.  companions: other packages whose versions matter.  parts: what of it
    the integration calls or replaces, "module:name.attribute".  paths: what runs.
    """

    tested: str
    companions: Sequence[str]
    parts: Sequence[str]
    paths: Sequence[str]


FRAMEWORKS = {
    "trl": Supported(
        "1.16.0", ("transformers", "accelerate", "peft", "datasets", "deepspeed", "vllm"),
        (
            "trl:GRPOConfig", "trl:GRPOTrainer._get_per_token_logps_and_entropies",
            "trl:GRPOTrainer._generate_and_score_completions", "trl:GRPOTrainer._calculate_rewards",
            "trl:GRPOTrainer._prepare_inputs", "trl:GRPOTrainer._compute_loss",
            "trl.trainer.utils:shuffle_sequence_dict",
            "trl.trainer.utils:split_tensor_dict", "trl.trainer.utils:selective_log_softmax_and_entropy",
            "trl.kernels:ChunkedLogProbFunction",
        ),
        (
            'ConSPOTrainer, loss_head="auto": linear_token_logprobs and linear_weighted_score_loss',
            "ConSPOTrainer with ZeRO-3, torch_compile, DeepSpeed in fp16, or a head that does not fit: TRL's own",
            "fused_loss_head(): linear_token_logprobs and token_logprobs in every trainer of TRL",
        ),
    ),
    "transformers": Supported(
        "5.23.0", ("accelerate", "peft"),
        ("transformers:PreTrainedModel.get_output_embeddings", "transformers:PreTrainedModel.base_model"),
        ("conspo_loss_of: linear_conspo_loss of the base model's hidden states, where check_head agrees",),
    ),
    "verl": Supported(
        "0.9.1", ("ray", "tensordict", "transformers", "vllm", "sglang"),
        (
            "verl.trainer.ppo.core_algos:register_adv_est", "verl.trainer.ppo.core_algos:register_policy_loss",
            "verl.trainer.ppo.ray_trainer:compute_advantage", "verl.trainer.ppo.ray_trainer:compute_data_metrics",
            "verl.utils.skip.skip_manager:SkipManager.step",
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
        ),
        (
            "register(): weights in the trainer's process, a linear loss in its workers",
            "replace_loss_head(): linear_token_logprobs, with use_fused_kernels=True and impl_backend=triton",
        ),
    ),
}  # fmt: skip


def support(framework: str) -> dict[str, Any]:
    """Versions, whether the installed one is supported, which parts are missing, and what would run. Imports it.

    Args:
        framework: a name of FRAMEWORKS.
    """
    needed = FRAMEWORKS[framework]
    reason = None
    try:
        required(framework)
    except ImportError as error:
        reason = str(error)
    missing = {} if reason is not None else _missing(needed.parts)
    if missing:
        reason = "this version lacks what the integration calls"
    return {
        "framework": framework,
        "versions": {name: _version_of(name) for name in (framework, *needed.companions)},
        "minimum": MINIMUM[framework],
        "tested": needed.tested,
        "supported": reason is None,
        "reason": reason,
        "missing": missing,
        "paths": list(needed.paths),
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(parts: Sequence[str]) -> dict[str, str]:
    """Why a part is not there, for those that are not."""
    reasons = {}
    for part in parts:
        module, _, names = part.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for name in names.split("."):
                value = getattr(value, name)
        except Exception as error:  # whatever an import of a foreign package runs into
            reasons[part] = f"{type(error).__name__}: {error}"
    return reasons


def lines(described: dict[str, Any]) -> list[str]:
    """What `support` found, to be printed."""
    versions = described["versions"]
    name = described["framework"]
    result = [f"{package:18} {version or 'absent'}" for package, version in versions.items()]
    result.append(f"{'needed, tested':18} {name} >= {described['minimum']}, {described['tested']}")
    result.append(f"{'supported':18} {'yes' if described['supported'] else 'no: ' + described['reason']}")
    result += [f"{'missing':18} {part}: {why}" for part, why in described["missing"].items()]
    return result + [f"{'what runs':18} {path}" for path in (described["paths"] if described["supported"] else [])]
