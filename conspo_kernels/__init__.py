"""ConSPO (arXiv:2605.12969), the group-contrastive loss for RL with verifiable rewards, as fused kernels."""

from .distributed.vocab import VocabParallel
from .logprobs import linear_token_logprobs, sequence_scores, token_logprobs
from .loss import ConSPOOutput, conspo_loss, conspo_loss_from_scores, linear_conspo_loss
from .margin import CosineMargin
from .modules import ConSPOLoss, LinearConSPOLoss
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
    "VocabParallel",
    "conspo_loss",
    "conspo_loss_from_scores",
    "conspo_scores",
    "conspo_weights",
    "linear_conspo_loss",
    "linear_conspo_scores",
    "linear_token_logprobs",
    "linear_weighted_score_loss",
    "sequence_scores",
    "token_logprobs",
    "weighted_score_loss",
]
