"""ConSPO (arXiv:2605.12969), the group-contrastive loss for RL with verifiable rewards, as fused kernels."""

from .conspo import ConSPOOutput
from .logprobs import (
    linear_token_logprobs,
    linear_weighted_logprob_loss,
    sequence_scores,
    token_logprobs,
    weighted_logprob_loss,
)
from .loss import conspo_loss, conspo_loss_from_scores, linear_conspo_loss
from .margin import CosineMargin
from .modules import ConSPOLoss, LinearConSPOLoss
from .parallel import Parallel
from .trust_region import trust_region
from .two_phase import (
    ConSPOWeights,
    conspo_scores,
    conspo_weights,
    linear_conspo_scores,
    linear_weighted_score_loss,
    weighted_score_loss,
)

__version__ = "0.1.0"

__all__ = [
    "ConSPOLoss",
    "ConSPOOutput",
    "ConSPOWeights",
    "CosineMargin",
    "LinearConSPOLoss",
    "Parallel",
    "conspo_loss",
    "conspo_loss_from_scores",
    "conspo_scores",
    "conspo_weights",
    "linear_conspo_loss",
    "linear_conspo_scores",
    "linear_token_logprobs",
    "linear_weighted_logprob_loss",
    "linear_weighted_score_loss",
    "sequence_scores",
    "token_logprobs",
    "trust_region",
    "weighted_logprob_loss",
    "weighted_score_loss",
]
