"""DIMAML (AutoML workshop at ICML 2021): learn the law of each tensor's initial weights from training itself."""

from papers.dimaml.algorithm import dimaml as dimaml
from papers.dimaml.algorithm import released_inner as released_inner
from papers.dimaml.distributions import PLIF as PLIF
from papers.dimaml.distributions import Normal as Normal
from papers.dimaml.distributions import inverse_softplus as inverse_softplus
from papers.dimaml.distributions import softplus as softplus
from papers.dimaml.model import InitDistribution as InitDistribution
from papers.dimaml.objective import evaluation_steps as evaluation_steps
from papers.dimaml.objective import loss_auc as loss_auc
from papers.dimaml.objective import meta_gradient as meta_gradient
