"""DIMAML (AutoML workshop at ICML 2021): learn the law of each tensor's initial weights from training itself."""

from papers.dimaml.distributions import PLIF as PLIF
from papers.dimaml.distributions import Normal as Normal
from papers.dimaml.distributions import inverse_softplus as inverse_softplus
from papers.dimaml.distributions import softplus as softplus
from papers.dimaml.model import InitDistribution as InitDistribution
